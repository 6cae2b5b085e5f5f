"""What operators look after: services, hypervisors, availability zones."""

import re
from typing import Annotated, Any, Literal

import msgspec
import sqlalchemy as sa
from msgspec import Meta

from kilonova.api import notices
from kilonova.api.bodies import Boolish, Digits, HostName, truth
from kilonova.api.registry import R, next_link, page_limit
from kilonova.kit.clock import iso_us
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound, Unsupported
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType, since
from kilonova.model import notices as words
from kilonova.store import hosts, migrations, placement, servers
from kilonova.store.migrations import Status

# ---- services


class Filter(msgspec.Struct):
    host: list[str] = []
    binary: list[str] = []


@R.get("/v2.1/os-services", query=Filter, strict="2.75", policy="os_compute_api:os-services:list")
def services(call: Call) -> dict[str, Any]:
    q: Filter = call.query
    with call.world.db.read() as tx:
        found = hosts.services(tx, host=q.host[-1] if q.host else None, binary=q.binary[-1] if q.binary else None)
        named = hosts.zones(tx)
    return {"services": [_service(call, s, _zone(call, s, named)) for s in found]}


def _zone(call: Call, s: hosts.Service, named: dict[str, str]) -> str:
    api = call.world.config.api
    if s.binary != "nova-compute":
        return str(api.internal_availability_zone)
    return str(named.get(s.host, api.default_availability_zone))


def _up(call: Call, s: hosts.Service) -> bool:
    return s.up(call.world.clock.now(), call.world.config.compute.host_down_after_s)


def _service(call: Call, s: hosts.Service, zone: str) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": s.uuid if call.version >= 53 else s.id,
        "binary": s.binary,
        "host": s.host,
        "zone": zone,
        "status": "disabled" if s.disabled else "enabled",
        "state": "up" if _up(call, s) else "down",
        "updated_at": iso_us(s.last_seen),
        "disabled_reason": s.disabled_reason,
    }
    return shown | {"forced_down": s.forced_down} if call.version >= 11 else shown


class OldChange(msgspec.Struct, forbid_unknown_fields=True):
    """To 2.52: what is done stands in the path."""

    host: HostName
    binary: Annotated[str, Meta(min_length=1, max_length=255)]
    disabled_reason: Annotated[str, Meta(min_length=1, max_length=255)] | UnsetType = UNSET
    forced_down: Annotated[Boolish | UnsetType, since("2.11")] = UNSET


class Change(msgspec.Struct, forbid_unknown_fields=True):
    status: Literal["enabled", "disabled"] | UnsetType = UNSET
    disabled_reason: Annotated[str, Meta(min_length=1, max_length=255)] | UnsetType = UNSET
    forced_down: Boolish | UnsetType = UNSET


@R.put("/v2.1/os-services/{id}", versions="2.1-2.52", body=OldChange, policy="os_compute_api:os-services:update")
def update_by_word(call: Call, id: str) -> dict[str, Any]:
    w: OldChange = call.body
    word = id
    if word not in ("enable", "disable", "disable-log-reason", "force-down") or (
        word == "force-down" and call.version < 11
    ):
        raise NotFound("Unknown action")
    if word == "disable-log-reason" and w.disabled_reason is UNSET:
        raise Invalid("Missing disabled reason field")
    if word == "force-down" and w.forced_down is UNSET:
        raise Invalid("Missing forced_down field")
    if w.binary != "nova-compute":
        raise Invalid(f"Updating a {w.binary} service is not supported. Only nova-compute services can be updated.")
    known: dict[str, dict[str, Any]] = {
        "enable": {"disabled": False, "disabled_reason": None},
        "disable": {"disabled": True, "disabled_reason": None},
        "disable-log-reason": {"disabled": True, "disabled_reason": w.disabled_reason},
        "force-down": {"forced_down": truth(w.forced_down)},
    }
    facts = known[word]
    told: dict[str, Any] = {"host": w.host, "binary": w.binary}
    with call.world.db.tx() as tx:
        s = hosts.service_of(tx, w.host, w.binary)
        _can_be_up(tx, s, facts)
        _told(call, tx, "update", hosts.set_service(tx, s.uuid, call.world.clock.now(), **facts), hosts.zones(tx))
    if word == "force-down":
        return {"service": told | {"forced_down": facts["forced_down"]}}
    told |= {"status": "disabled" if facts["disabled"] else "enabled"}
    return {"service": told | ({"disabled_reason": facts["disabled_reason"]} if word == "disable-log-reason" else {})}


@R.put("/v2.1/os-services/{id}", versions="2.53-", body=Change, policy="os_compute_api:os-services:update")
def update(call: Call, id: str) -> dict[str, Any]:
    w: Change = call.body
    _uuid(id)
    if w.disabled_reason is not UNSET and w.status != "disabled":
        raise Invalid("Specifying disabled_reason is only valid when status is 'disabled'.")
    facts: dict[str, Any] = {}
    if w.status is not UNSET:
        facts |= {
            "disabled": w.status == "disabled",
            "disabled_reason": None if w.disabled_reason is UNSET else w.disabled_reason,
        }
    if w.forced_down is not UNSET:
        facts["forced_down"] = truth(w.forced_down)
    if not facts:
        raise Invalid("No updates were requested. Fields 'status' or 'forced_down' should be specified.")

    def record(tx: Tx) -> tuple[hosts.Service, dict[str, str]]:
        s = hosts.service(tx, id)
        if s.binary != "nova-compute":
            raise Invalid(f"Updating a {s.binary} service is not supported. Only nova-compute services can be updated.")
        _can_be_up(tx, s, facts)
        after, named = hosts.set_service(tx, id, call.world.clock.now(), **facts), hosts.zones(tx)
        _told(call, tx, "update", after, named)
        return after, named

    s, named = call.world.db.run(record)
    return {"service": _service(call, s, _zone(call, s, named))}


def _can_be_up(tx: Tx, s: hosts.Service, facts: dict[str, Any]) -> None:
    """Not while it may still run what was evacuated from it. It hears of that as soon as it speaks, forced down or not."""
    if s.forced_down and facts.get("forced_down") is False and migrations.evacuated(tx, s.host):
        raise Invalid(
            f"Service '{s.binary}' on host '{s.host}' cannot be forced up: evacuated servers may still be there. "
            "It can be when the host has reported that they are not."
        )


@R.delete("/v2.1/os-services/{id}", ok=204, policy="os_compute_api:os-services:delete")
def delete(call: Call, id: str) -> None:
    if call.version >= 53:
        _uuid(id)
    elif not id.isdecimal():
        raise Invalid(f"Invalid input for field/attribute id. Value: {id[:60]}. It is no integer.")

    def record(tx: Tx) -> None:
        s = hosts.service(tx, id if call.version >= 53 else int(id))
        if s.binary == "nova-compute" and _servers_on(tx, [s.host]):
            raise Conflict(
                "Unable to delete compute service that is hosting instances. Migrate or delete the instances first."
            )
        if s.binary == "nova-compute" and migrations.in_progress(tx, s.host):
            raise Conflict(
                "Unable to delete compute service that has in-progress migrations. Complete the migrations or delete the instances first."
            )
        for m in migrations.evacuated(tx, s.host) if s.binary == "nova-compute" else ():
            placement.release(tx, m.uuid, now=call.world.clock.now())  # it will not come back to hear of it
            migrations.change(tx, m.uuid, call.world.clock.now(), Status.completed)
        _told(call, tx, "delete", s, hosts.zones(tx))
        hosts.forget_service(tx, s.uuid)

    call.world.db.run(record)


def _told(call: Call, tx: Tx, what: str, s: hosts.Service, named: dict[str, str]) -> None:
    of = lambda: words.service(s, _zone(call, s, named))
    notices.told(call, tx, f"service.{what}", of=of, binary=s.binary, host=s.host)


def _uuid(id: str) -> None:
    if not re.fullmatch(r"(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", id):
        raise Invalid(f"Invalid uuid {id[:60]}")


def _servers_on(tx: Tx, names: list[str]) -> dict[str, list[dict[str, str]]]:
    """Host → its living servers as {uuid, name}: SELECT host, id, name FROM servers WHERE host IN (…) AND deleted_at IS NULL"""
    t = servers.T.c
    found: dict[str, list[dict[str, str]]] = {}
    for r in tx.execute(
        sa.select(t.host, t.id, t.number).where(t.host.in_(names), t.deleted_at.is_(None)).order_by(t.number)
    ):
        found.setdefault(r.host, []).append({"uuid": r.id, "name": f"instance-{r.number:08x}"})
    return found


# ---- hypervisors


class PageQuery(msgspec.Struct):
    limit: Annotated[Digits | None, since("2.33")] = None
    marker: Annotated[str | None, since("2.33")] = None
    pattern: Annotated[
        Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9-._]*$")] | None, since("2.53")
    ] = msgspec.field(default=None, name="hypervisor_hostname_pattern")
    with_servers: Annotated[Boolish, since("2.53")] = False


class OneQuery(msgspec.Struct):
    with_servers: Annotated[Boolish, since("2.53")] = False


@R.get("/v2.1/os-hypervisors", query=PageQuery, strict="2.53", policy="os_compute_api:os-hypervisors:list")
def hypervisors(call: Call) -> dict[str, Any]:
    return _hypervisors(call, _short)


@R.get(
    "/v2.1/os-hypervisors/detail", query=PageQuery, strict="2.53", policy="os_compute_api:os-hypervisors:list-detail"
)
def hypervisors_detail(call: Call) -> dict[str, Any]:
    return _hypervisors(call, _long, "detail")


@R.get(
    "/v2.1/os-hypervisors/statistics",
    versions="2.1-2.87",
    strict="2.1000000",
    policy="os_compute_api:os-hypervisors:statistics",
)
def statistics(call: Call) -> dict[str, Any]:
    with call.world.db.read() as tx:
        return {"hypervisor_statistics": msgspec.structs.asdict(hosts.statistics(tx))}


@R.get("/v2.1/os-hypervisors/{id}", query=OneQuery, strict="2.53", policy="os_compute_api:os-hypervisors:show")
def hypervisor(call: Call, id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        node = _node(call, tx, id)
        held = _servers_on(tx, [node.host]) if truth(call.query.with_servers) else None
    return {"hypervisor": _long(call, node) | _held(call, node, held)}


@R.get(
    "/v2.1/os-hypervisors/{id}/uptime",
    versions="2.1-2.87",
    strict="2.1000000",
    policy="os_compute_api:os-hypervisors:uptime",
)
def uptime(call: Call, id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        node = _node(call, tx, id)
    if not _up(call, node.service):
        raise Invalid(f"Compute service of {node.host} is unavailable at this time.")
    if not node.facts.uptime:
        raise Unsupported("Virt driver does not implement uptime function.")
    return {"hypervisor": _short(call, node) | {"uptime": node.facts.uptime}}


@R.get(
    "/v2.1/os-hypervisors/{id}/search",
    versions="2.1-2.52",
    strict="2.1000000",
    policy="os_compute_api:os-hypervisors:search",
)
def search(call: Call, id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        found = hosts.nodes(tx, pattern=id)
    if not found:
        raise NotFound(f"No hypervisor matching '{id[:60]}' could be found.")
    return {"hypervisors": [_short(call, n) for n in found]}


@R.get(
    "/v2.1/os-hypervisors/{id}/servers",
    versions="2.1-2.52",
    strict="2.1000000",
    policy="os_compute_api:os-hypervisors:servers",
)
def hypervisor_servers(call: Call, id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        found = hosts.nodes(tx, pattern=id)
        held = _servers_on(tx, [n.host for n in found])
    if not found:
        raise NotFound(f"No hypervisor matching '{id[:60]}' could be found.")
    return {"hypervisors": [_short(call, n) | ({"servers": held[n.host]} if n.host in held else {}) for n in found]}


def _node(call: Call, tx: Tx, id: str) -> hosts.Node:
    if call.version >= 53:
        _uuid(id)
        return hosts.node(tx, id)
    if not id.isdecimal() or len(id) > 9:
        raise NotFound(f"Hypervisor with ID '{id[:60]}' could not be found.")
    return hosts.node(tx, int(id))


def _hypervisors(call: Call, look: Any, *path: str) -> dict[str, Any]:
    q: PageQuery = call.query
    if q.pattern and (q.limit or q.marker):
        raise Invalid("Paging over hypervisors with the hypervisor_hostname_pattern query parameter is not supported.")
    limit = page_limit(call, q.limit) if call.version >= 33 else None
    with call.world.db.read() as tx:
        marker: str | int | None = q.marker
        if q.marker is not None and call.version < 53:
            if not q.marker.isdecimal() or len(q.marker) > 9:
                raise Invalid(f"marker [{q.marker[:60]}] not found")
            marker = int(q.marker)
        try:
            found = hosts.nodes(tx, limit=limit, marker=marker, pattern=q.pattern)
        except NotFound:
            raise Invalid(f"marker [{q.marker}] not found") from None
        held = _servers_on(tx, [n.host for n in found]) if truth(q.with_servers) else None
    if q.pattern and not found:
        raise NotFound(f"No hypervisor matching '{q.pattern}' could be found.")
    body: dict[str, Any] = {"hypervisors": [look(call, n) | _held(call, n, held) for n in found]}
    if limit is not None and found and len(found) == limit and not q.pattern:
        last = found[-1].uuid if call.version >= 53 else str(found[-1].id)
        body["hypervisors_links"] = next_link(call, last, "os-hypervisors", *path)
    return body


def _held(call: Call, node: hosts.Node, held: dict[str, list[dict[str, str]]] | None) -> dict[str, Any]:
    if held is None or (node.host not in held and call.version < 75):
        return {}
    return {"servers": held.get(node.host, [])}


def _short(call: Call, n: hosts.Node) -> dict[str, Any]:
    return {
        "id": n.uuid if call.version >= 53 else n.id,
        "hypervisor_hostname": n.node,
        "state": "up" if _up(call, n.service) else "down",
        "status": "disabled" if n.service.disabled else "enabled",
    }


def _long(call: Call, n: hosts.Node) -> dict[str, Any]:
    f = n.facts
    service_id = n.service.uuid if call.version >= 53 else n.service.id
    shown = _short(call, n) | {
        "host_ip": n.host_ip or None,
        "hypervisor_type": f.hypervisor_type,
        "hypervisor_version": f.hypervisor_version,
        "service": {"id": service_id, "host": n.host, "disabled_reason": n.service.disabled_reason},
    }
    if call.version >= 88:
        return shown | {"uptime": f.uptime or None}
    cpu_info: Any = f.cpu_info if call.version >= 28 else msgspec.json.encode(f.cpu_info).decode()
    used = {k: n.used.get(k, 0) for k in ("VCPU", "MEMORY_MB", "DISK_GB")}
    return shown | {
        "cpu_info": cpu_info,
        "vcpus": f.vcpus,
        "vcpus_used": used["VCPU"],
        "memory_mb": f.memory_mb,
        "memory_mb_used": used["MEMORY_MB"],
        "free_ram_mb": f.memory_mb - used["MEMORY_MB"],
        "local_gb": f.disk_gb,
        "local_gb_used": used["DISK_GB"],
        "free_disk_gb": f.disk_gb - used["DISK_GB"],
        "disk_available_least": f.disk_free_gb,
        "running_vms": n.running,
        "current_workload": n.workload,
    }


# ---- availability zones


@R.get("/v2.1/os-availability-zone", policy="os_compute_api:os-availability-zone:list")
def zones(call: Call) -> dict[str, Any]:
    shown = [
        {"zoneName": z, "zoneState": {"available": up}, "hosts": None}
        for z, up, _ in _zones(call)
        if z != call.world.config.api.internal_availability_zone
    ]
    return {"availabilityZoneInfo": shown}


@R.get("/v2.1/os-availability-zone/detail", policy="os_compute_api:os-availability-zone:detail")
def zones_detail(call: Call) -> dict[str, Any]:
    shown = [
        {"zoneName": z, "zoneState": {"available": up}, "hosts": in_it if up else None} for z, up, in_it in _zones(call)
    ]
    return {"availabilityZoneInfo": shown}


def _zones(call: Call) -> list[tuple[str, bool, dict[str, Any]]]:
    """(zone, has an enabled service, host → binary → health), the usable ones first."""
    with call.world.db.read() as tx:
        found, named = hosts.services(tx), hosts.zones(tx)
    by_zone: dict[str, list[hosts.Service]] = {}
    for s in found:
        by_zone.setdefault(_zone(call, s, named), []).append(s)
    rows = []
    for zone, members in by_zone.items():
        enabled = [s for s in members if not s.disabled]
        in_it: dict[str, Any] = {}
        for s in enabled:
            in_it.setdefault(s.host, {})[s.binary] = {
                "available": _up(call, s),
                "active": True,
                "updated_at": iso_us(s.last_seen),
            }
        rows.append((zone, bool(enabled), in_it))
    return sorted(rows, key=lambda r: (not r[1], r[0]))
