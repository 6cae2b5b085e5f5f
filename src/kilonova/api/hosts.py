"""os-hosts, until 2.42: what operators had before there were os-services and os-hypervisors."""

from typing import Any, Literal

import msgspec

from kilonova.api.registry import R
from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid, NotFound, Unsupported
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType
from kilonova.store import hosts, servers

PLACE, OLD = "/v2.1/os-hosts", "2.1-2.42"
RULE = "os_compute_api:os-hosts"
Word = Literal["ENABLE", "Enable", "enable", "DISABLE", "Disable", "disable"]


class Query(msgspec.Struct):
    zone: list[str] = []


class Change(msgspec.Struct, forbid_unknown_fields=True):
    status: Word | UnsetType = UNSET
    maintenance_mode: Word | UnsetType = UNSET


@R.get(PLACE, versions=OLD, query=Query, strict="2.1000000", policy=f"{RULE}:list")
def index(call: Call) -> dict[str, Any]:
    api = call.world.config.api
    with call.world.db.read() as tx:
        found, zones = hosts.services(tx), hosts.zones(tx)
    shown = [
        {
            "host_name": s.host,
            "service": s.binary.removeprefix("nova-"),
            "zone": zones.get(s.host, api.default_availability_zone)
            if s.binary == hosts.COMPUTE
            else api.internal_availability_zone,
        }
        for s in found
        if not s.disabled
    ]
    wanted = (call.query.zone or [""])[-1] or None
    return {"hosts": [h for h in shown if wanted in (None, h["zone"])]}


@R.get(PLACE + "/{id}", versions=OLD, strict="2.1000000", policy=f"{RULE}:show")
def show(call: Call, id: str) -> dict[str, Any]:
    """What there is, what is claimed, what flavors promise; then project by project."""
    with call.world.db.read() as tx:
        _known(tx, id)
        nodes = hosts.nodes(tx, host=id)
        on = servers.on_host(tx, id)
    total = _sum(id, "(total)", [(n.facts.vcpus, n.facts.memory_mb, n.facts.disk_gb) for n in nodes])
    used = _sum(id, "(used_now)", [(n.vcpus_used, n.memory_used_mb, n.disk_used_gb) for n in nodes])
    sizes = {s.id: (s.flavor.vcpus, s.flavor.memory_mb, s.flavor.disk_gb + s.flavor.ephemeral_gb) for s in on}
    most = _sum(id, "(used_max)", list(sizes.values()))
    projects = dict.fromkeys(s.project_id for s in on)
    each = [_sum(id, p, [sizes[s.id] for s in on if s.project_id == p]) for p in projects]
    return {"host": [total, used, most, *each]}


def _sum(host: str, project: str, sizes: list[tuple[int, int, int]]) -> dict[str, Any]:
    cpu, memory, disk = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0, 0)
    return {"resource": {"host": host, "project": project, "cpu": cpu, "memory_mb": memory, "disk_gb": disk}}


@R.put(PLACE + "/{id}", versions=OLD, body=Change, policy=f"{RULE}:update")
def update(call: Call, id: str) -> dict[str, Any]:
    wish: Change = call.body
    if wish.status is UNSET and wish.maintenance_mode is UNSET:
        raise Invalid("Invalid input for field/attribute host. Give a status or a maintenance_mode.")
    if wish.maintenance_mode is not UNSET:
        with call.world.db.read() as tx:
            _known(tx, id)
        raise Unsupported("Hosts have no maintenance mode: disable them, and move their servers away.")
    disabled = str(wish.status).lower() == "disable"

    def record(tx: Tx) -> None:
        known = _known(tx, id)
        hosts.set_service(tx, known.uuid, call.world.clock.now(), disabled=disabled, disabled_reason=None)

    call.world.db.run(record)
    return {"host": id, "status": "disabled" if disabled else "enabled"}


def _power(call: Call, id: str) -> None:
    with call.world.db.read() as tx:
        _known(tx, id)
    raise Unsupported("Hosts are not turned on and off from here.")


for _action, _rule in (("startup", "start"), ("shutdown", "shutdown"), ("reboot", "reboot")):
    R.get(f"{PLACE}/{{id}}/{_action}", versions=OLD, strict="2.1000000", policy=f"{RULE}:{_rule}")(_power)


def _known(tx: Tx, host: str) -> hosts.Service:
    try:
        return hosts.service_of(tx, host)
    except NotFound:
        raise NotFound(f"Compute host {host[:255]} could not be found.") from None
