"""What a server is made of, before it is made: NUMA cells, pinned CPUs, pages and devices; and where they came to be."""

from typing import Any

import msgspec

from kilonova.api.registry import R, owner, the_server
from kilonova.kit.errors import Invalid
from kilonova.kit.routes import Call
from kilonova.model import numa, wants
from kilonova.model.flavor import Alias, Flavor
from kilonova.model.options import Config
from kilonova.model.server import Image
from kilonova.store import seats


def made_of(config: Config, flavor: Flavor, image: Image) -> Flavor:
    """The flavor, with what its PCI aliases mean now. Raises Invalid where flavor and image ask for what cannot be."""
    numa.guest(flavor.extra_specs, image.properties, flavor.vcpus, flavor.memory_mb)
    named = wants.aliases(flavor.extra_specs)
    if not named:
        return flavor
    if unknown := sorted(named.keys() - config.pci.aliases.keys()):
        raise Invalid(f"PCI alias {unknown[0][:255]} is not defined")
    return msgspec.structs.replace(flavor, aliases={n: _alias(config.pci.aliases[n]) for n in named})


def same_topology(flavor: Flavor, old: Image, new: Image) -> None:
    """Raises Invalid where a server of this flavor would be made of other cells with the other image: it stays where it is."""
    was, is_ = (numa.guest(flavor.extra_specs, i.properties, flavor.vcpus, flavor.memory_mb) for i in (old, new))
    if was != is_:
        raise Invalid(
            "An instance's NUMA topology cannot be changed as part of a rebuild. The image provided is invalid for this "
            "instance."
        )


def _alias(said: str) -> Alias:
    name, *more = (word.strip() for word in said.split(","))
    policy = next((word for word in more if word in ("required", "legacy", "preferred", "socket")), "")
    return Alias(name, sorted(word for word in more if word and word != policy), policy)


@R.get("/v2.1/servers/{server_id}/topology", versions="2.78-", policy="compute:server:topology:index", late=True)
def topology(call: Call, server_id: str) -> dict[str, Any]:
    """The guest's cells; administrators see on which of the host's they are."""
    with call.world.db.read() as tx:
        server = the_server(call, tx, server_id)
        seat = seats.of(tx, server_id)
    whole = call.may("compute:server:topology:host:index", owner(server))
    said = server.flavor.extra_specs.get("hw:cpu_threads", "")
    threads = int(said) if said.isdecimal() else 1
    nodes = []
    for c in seat.cells if seat else ():
        shown: dict[str, Any] = {"memory_mb": c.memory_mb, "vcpu_set": c.cpus, "siblings": _siblings(c.cpus, threads)}
        if whole:
            shown |= {"host_node": c.host, "cpu_pinning": {str(cpu): at for cpu, at in sorted(c.pins.items())}}
        nodes.append(shown)
    sizes = {c.page_kb for c in seat.cells if c.page_kb} if seat else set()
    return {"nodes": nodes, "pagesize_kb": min(sizes, default=None)}


def _siblings(cpus: list[int], threads: int) -> list[list[int]]:
    """Those that are threads of one core in the guest."""
    return [cpus[i : i + threads] for i in range(0, len(cpus), threads)] if threads > 1 else []
