"""A server's ports: made or bound where it will run, let go of where it will not. All is safe to do twice.

A port that we made carries a mark in its binding profile, which only services may write; by it we know, whatever
became of the process that made it, that it goes with its server.  Others are only bound and let go of.
"""

from contextlib import suppress
from typing import Any

import msgspec

from kilonova.clients import STALE, FloatingIp, NetworkInfo, Port, Subnet, plug
from kilonova.conductor.world import World
from kilonova.contracts.jobs import Build
from kilonova.kit.errors import Conflict, NotFound, Unavailable
from kilonova.kit.workflow import first_try
from kilonova.model.host import Place
from kilonova.model.machine import Nic
from kilonova.model.server import Address, Plug, Server, Wanted

MARK = "kilonova"  # in the binding profile
LOOKS = 5  # at a port that others change just now


class Plugged(msgspec.Struct, frozen=True):
    """Ports as their host needs them, and as the API shows them."""

    nics: list[Nic] = []
    plugs: list[Plug] = []


def bind(world: World, key: str, job: Build, place: Place) -> Plugged:
    """All that the caller wants, on this host. Raises what the network service says; Conflict where it cannot be there."""
    wanted = _wanted(world, job)
    if not wanted:
        return Plugged()
    network, again = world.neighbours.network, not first_try()
    if again:
        world.doubt(job.server.id)
    there = [p for p in network.ports(servers=[job.server.id]) if _trusted(p, job)] if again else []
    ports = [_bound(world, key, job, w, place, there) for w in wanted]
    return described(world, job.server, ports, [w.tag for w in wanted])


def release(world: World, server: str) -> None:
    """Remove what we made for it, let go of the others."""
    for p in world.neighbours.network.ports(servers=[server]):
        let_go(world, p)


def take_back(world: World, server: str, key: str, host: str) -> None:
    """What one act has made, and no other: we may come late, and another try may have made ports of its own."""
    for p in world.neighbours.network.ports(servers=[server]):
        if (p.profile or {}).get(MARK) == key or (not ours(p) and p.host == host):
            let_go(world, p)


def let_go(world: World, port: Port) -> None:
    network = world.neighbours.network
    if ours(port):
        network.delete_port(port.id)
        return
    with suppress(NotFound):
        for b in network.bindings(port.id):
            if b.status != "ACTIVE":
                network.forget_binding(port.id, b.host)
    network.unbind_port(port.id)


def ours(port: Port) -> bool:
    return MARK in (port.profile or {})


def described(
    world: World, server: Server, ports: list[Port], tags: list[str | None], *, every: bool = False
) -> Plugged:
    """Bound ports, with what must be known of their networks. Asked anew only where what we know is old.

    A port that we made just now has no floating address; `every`: they are asked for all the same.
    """
    networks = _networks(world, ports)
    subnets = _subnets(world, ports)
    groups = _groups(world, ports)
    brought = [p.id for p in ports if every or not ours(p)]
    floating = world.neighbours.network.floating_ips(ports=brought) if brought else []
    nics = [
        plug(p, networks[p.network_id], subnets.get(p.network_id, []), floating, tag or "")
        for p, tag in zip(ports, tags, strict=True)
    ]
    plugs = [
        Plug(
            port_id=p.id,
            network_id=p.network_id,
            label=networks[p.network_id].name or "",
            mac=p.mac,
            addresses=_addresses(p, floating),
            security_groups=list(dict.fromkeys(groups[g] for g in p.security_groups if g in groups)),
            tag=tag,
            ours=ours(p),
        )
        for p, tag in zip(ports, tags, strict=True)
    ]
    return Plugged(nics, plugs)


# ---- from host to host


def rebind(world: World, server: Server, place: Place) -> Plugged:
    """All ports that it has are on this host from now on; one that is gone meanwhile is left out.

    Raises Conflict where the network service cannot have one there.
    """
    owner = {"device_id": server.id, "device_owner": f"compute:{place.zone or 'nova'}"}
    found, tags = _own(world, server)
    return described(
        world, server, [world.neighbours.network.bind_port(p.id, place.host, **owner) for p in found], tags
    )


def present(world: World, server: Server) -> Plugged:
    """As they are now, wherever that is."""
    found, tags = _own(world, server)
    return described(world, server, found, tags, every=True)


def unbind(world: World, server: Server, host: str | None = None) -> None:
    """They are the server's, and on no host; or not on this one: what has gone elsewhere meanwhile stays there."""
    found, _ = _own(world, server)
    for p in found:
        if p.host and host in (None, p.host):
            with suppress(NotFound):
                world.neighbours.network.update_port(p.id, **{"binding:host_id": ""})


def expect(world: World, server: Server, host: str) -> Plugged:
    """Its ports can come to this host, and this is how they will be there. Raises Conflict."""
    found, tags = _own(world, server)
    there = [(p, world.neighbours.network.expect_port(p, host)) for p in found]
    coming = [msgspec.structs.replace(p, host=b.host, vif_type=b.vif_type, vif_details=b.vif_details) for p, b in there]
    return described(world, server, coming, tags)


def switch(world: World, server: Server, host: str) -> None:
    """They have come."""
    found, _ = _own(world, server)
    for p in found:
        if p.host != host:
            with suppress(NotFound):
                world.neighbours.network.switch_port(p.id, host)


def unexpect(world: World, server: Server, host: str) -> None:
    """They do not come to this host, or do not come back to it; one that is there stays."""
    found, _ = _own(world, server)
    for p in found:
        if p.host != host:
            world.neighbours.network.forget_binding(p.id, host)


def bring(world: World, port: Port, server: Server, zone: str) -> None:
    """To where its server is, if the network service can."""
    with suppress(Conflict):
        owner = {"device_id": server.id, "device_owner": f"compute:{zone}"}
        world.neighbours.network.bind_port(port.id, server.host or "", **owner)


def alone(world: World, port: Port) -> list[str]:
    """It comes to no other host than where it is. To which it could have come."""
    with suppress(NotFound):
        others = [b.host for b in world.neighbours.network.bindings(port.id) if b.status != "ACTIVE"]
        for host in others:
            world.neighbours.network.forget_binding(port.id, host)
        return others
    return []


def _own(world: World, server: Server) -> tuple[list[Port], list[str | None]]:
    """The ports that the server is written down with, in that order, as they are now; and their tags."""
    known = {p.port_id: p.tag for p in server.plugs}
    there = {p.id: p for p in world.neighbours.network.ports(servers=[server.id])} if known else {}
    return [there[id] for id in known if id in there], [tag for id, tag in known.items() if id in there]


# ---- one port


def _bound(world: World, key: str, job: Build, w: Wanted, place: Place, there: list[Port]) -> Port:
    """This one, on this host. What an earlier try has left is taken again; `there` loses what was taken."""
    if w.port_id is not None:
        return brought(world, job.server, w.port_id, place.host, place.zone)
    for port in there:
        if port.network_id == w.network_id and ours(port) and _has(port, w.fixed_ip):
            there.remove(port)
            if port.host == place.host and (port.profile or {}).get(MARK) == key:
                return port
            mark: dict[str, Any] = {"binding:profile": {MARK: key}}
            return world.neighbours.network.bind_port(port.id, place.host, **_owned(job.server, place.zone), **mark)
    return made(world, key, job.server, w, place.host, place.zone, job.security_groups)


def brought(world: World, server: Server, port_id: str, host: str, zone: str) -> Port:
    """The caller's own port, bound to this host. Raises Conflict where another has it, or takes it at the same time."""
    network = world.neighbours.network
    for _ in range(LOOKS):
        port = network.port(port_id)
        if port.device_id not in ("", None, server.id):
            raise Conflict(f"Port {port_id} is still in use.")
        named = _named(world, server, port)
        try:
            return network.bind_port(port_id, host, seen=port.seen, **_owned(server, zone), **named)
        except Conflict as e:
            if e.code != STALE:
                raise
    raise Unavailable("The port is changed by others all the time.", why=port_id)


def made(world: World, key: str, server: Server, w: Wanted, host: str, zone: str, groups: list[str]) -> Port:
    """A new port on this host, marked with the act that made it. No groups: as the network service has it."""
    assert w.network_id is not None
    wish: dict[str, Any] = {
        **_owned(server, zone),
        "project_id": server.project_id,
        "binding:host_id": host,
        "binding:profile": {MARK: key},
        **_named(world, server, None),
    }
    if w.fixed_ip:
        wish["fixed_ips"] = [{"ip_address": w.fixed_ip}]
    if groups:
        wish["security_groups"] = groups
    try:
        port = world.neighbours.network.create_port(w.network_id, **wish)
    except Unavailable:
        world.doubt(server.id)
        raise
    if port.vif_type == "binding_failed":
        raise Conflict(f"Binding failed for port {port.id}.", why=f"on {host}", code="PortBindingFailed")
    return port


def marked(world: World, server: str, key: str) -> Port | None:
    """What this act has made for the server, if it has."""
    known = world.neighbours.network.ports(servers=[server])
    return next((p for p in known if (p.profile or {}).get(MARK) == key), None)


def _owned(server: Server, zone: str) -> dict[str, str]:
    return {"device_id": server.id, "device_owner": f"compute:{zone or 'nova'}"}


def _trusted(port: Port, job: Build) -> bool:
    """A tenant can write any `device_id`: a port of another project is not this server's."""
    return port.project_id == job.server.project_id


def _has(port: Port, address: str | None) -> bool:
    return address is None or any(a.ip_address == address for a in port.fixed_ips)


def _named(world: World, server: Server, port: Port | None) -> dict[str, Any]:
    """The guest's name for DHCP and DNS; a real network service knows it only with an extension."""
    if world.config.network.url is not None or (port is not None and port.dns_name):
        return {}
    return {"dns_name": server.hostname} if server.hostname else {}


# ---- what is wanted


def _wanted(world: World, job: Build) -> list[Wanted]:
    match job.networks:
        case "none":
            return []
        case "auto":
            return [Wanted(network_id=world.neighbours.network.auto_network(job.server.project_id))]
        case "":
            return _only(world, job)
        case listed:
            assert isinstance(listed, list)
            return listed


def _only(world: World, job: Build) -> list[Wanted]:
    """The one network that the project has or may share. None: none. Several: he must say which."""
    network, project = world.neighbours.network, job.server.project_id
    seen = {n.id: n for n in network.networks(project_id=project) + network.networks(shared="true") if not n.external}
    if len(seen) > 1:
        raise Conflict("Multiple possible networks found, use a Network ID to be more specific.")
    return [Wanted(network_id=id) for id in seen]


# ---- what they hang on


def _networks(world: World, ports: list[Port]) -> dict[str, NetworkInfo]:
    def ask(ids: list[str]) -> dict[str, NetworkInfo]:
        return {n.id: n for n in world.neighbours.network.networks(ids=ids)}

    found = world.networks.of(sorted({p.network_id for p in ports}), ask)
    for p in ports:
        if p.network_id not in found:
            raise NotFound(f"Network {p.network_id} could not be found.")
    return found


def _subnets(world: World, ports: list[Port]) -> dict[str, list[Subnet]]:
    """By network. One that we have not heard of is a reason to ask again."""

    def ask(ids: list[str]) -> dict[str, list[Subnet]]:
        said: dict[str, list[Subnet]] = {id: [] for id in ids}
        for s in world.neighbours.network.subnets(networks=ids):
            said.setdefault(s.network_id, []).append(s)
        return said

    ids = sorted({p.network_id for p in ports if p.fixed_ips})
    found = world.subnets.of(ids, ask) if ids else {}
    known = {s.id for subnets in found.values() for s in subnets}
    if any(a.subnet_id not in known for p in ports for a in p.fixed_ips):
        found = world.subnets.of(ids, ask, fresh=True)
    return found


def _groups(world: World, ports: list[Port]) -> dict[str, str]:
    """Names of security groups."""

    def ask(ids: list[str]) -> dict[str, Any]:
        return {g.id: g for g in world.neighbours.network.security_groups(ids=ids)}

    ids = sorted({g for p in ports for g in p.security_groups})
    return {id: g.name for id, g in world.groups.of(ids, ask).items()} if ids else {}


def _addresses(port: Port, floating: list[FloatingIp]) -> list[Address]:
    fixed = [Address(a.ip_address, 6 if ":" in a.ip_address else 4) for a in port.fixed_ips]
    outer = [Address(f.floating_ip_address, 4, floating=True) for f in floating if f.port_id == port.id]
    return fixed + outer
