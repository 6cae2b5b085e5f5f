"""Servers: lists, one, its name and notes, its end; and the acts that need no host."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, field

from kilonova.api import notices, views
from kilonova.api.allowance import allowance_of
from kilonova.api.bodies import DiskConfig, Name, Text255, address
from kilonova.api.create import OneName, ShortName, hostname_of
from kilonova.api.registry import R, World, cause, next_link, page_limit, the_server, unlocked
from kilonova.contracts.compute import ConsoleLog
from kilonova.contracts.jobs import Delete, Restore, SoftDelete
from kilonova.kit.clock import parsed
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Forbidden, Invalid, NotFound
from kilonova.kit.ready import Condition
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType, since, was
from kilonova.kit.workflow import faults_of, noted, signal, start
from kilonova.model.server import Server
from kilonova.model.states import VERBS, VM, Task, Verb, status
from kilonova.store import quotas, servers
from kilonova.store import server_pages as pages

# ---- one


class ServerBody(msgspec.Struct):
    server: views.ServerView


@R.get("/v2.1/servers/{id}", policy="os_compute_api:servers:show", late=True)
def show(call: Call, id: str) -> ServerBody:
    with call.world.db.read() as tx:
        server = the_server(call, tx, id)
        more = about(call, tx, [server])[server.id]
    return ServerBody(views.server(call, server, more))


class Change(msgspec.Struct, forbid_unknown_fields=True):
    name: Name | UnsetType = UNSET
    disk_config: DiskConfig | UnsetType = field(default=UNSET, name="OS-DCF:diskConfig")
    access_v4: str | UnsetType = field(default=UNSET, name="accessIPv4")
    access_v6: str | UnsetType = field(default=UNSET, name="accessIPv6")
    description: Annotated[Text255 | None | UnsetType, since("2.19")] = UNSET
    hostname: Annotated[OneName | UnsetType, was(ShortName | UnsetType, until="2.93"), since("2.90")] = UNSET
    zone: Annotated[Annotated[str, Meta(min_length=1, max_length=255)] | None | UnsetType, since("2.104")] = field(
        default=UNSET, name="pinned_availability_zone"
    )


class ChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    server: Change


@R.put("/v2.1/servers/{id}", body=ChangeBody, policy="os_compute_api:servers:update", late=True)
def update(call: Call, id: str) -> ServerBody:
    wish: Change = call.body.server
    plain = {"name": wish.name, "description": wish.description, "disk_config": wish.disk_config}
    facts: dict[str, Any] = {name: value for name, value in plain.items() if value is not UNSET}
    if not isinstance(wish.access_v4, UnsetType):
        facts["access_ip_v4"] = address(wish.access_v4, 4, "accessIPv4") if wish.access_v4 else ""
    if not isinstance(wish.access_v6, UnsetType):
        facts["access_ip_v6"] = address(wish.access_v6, 6, "accessIPv6") if wish.access_v6 else ""
    if not isinstance(wish.hostname, UnsetType):
        facts["hostname"] = hostname_of(wish.hostname, id)

    def write(tx: Tx) -> tuple[Server, views.Shown]:
        before = the_server(call, tx, id)
        if not isinstance(wish.zone, UnsetType):
            facts["availability_zone"] = _repinned(call, before, wish.zone)
        if facts:
            servers.change(tx, id, call.world.clock.now(), **facts)
        server = servers.get(tx, id)
        notices.updated(call, tx, before, server)
        return server, about(call, tx, [server])[id]

    server, more = call.world.db.run(write)
    return ServerBody(views.server(call, server, more, whole=call.version >= 75))


def _repinned(call: Call, server: Server, zone: str | None) -> str | None:
    """2.104: null unpins; a name may only be that of the zone where it is, and only when it is not pinned."""
    if zone is None or zone == server.availability_zone:
        return zone
    if server.availability_zone is None and zone == call.world.hosts.zone(server.host):
        return zone
    raise Conflict(f"Cannot pin instance {server.id} to availability zone {zone}.")


@R.delete("/v2.1/servers/{id}", ok=204, policy="os_compute_api:servers:delete", late=True)
def delete(call: Call, id: str) -> None:
    """Delete may overtake anything: what runs is told to stop, and the deletion begins when it has."""
    world: World = call.world

    def record(tx: Tx) -> list[str]:
        server = the_server(call, tx, id)
        unlocked(call, server)
        if world.config.compute.reclaim_interval_s and _restorable(server):
            return soft_deleted(call, tx, server)
        return deleted(call, tx, server, "delete")

    for run in world.db.run(record):
        world.wake(run)


def deleted(call: Call, tx: Tx, server: Server, verb: str) -> list[str]:
    """Begin it. Whom to wake."""
    if server.task_state == Task.deleting:
        return []  # asked twice: the first is at it
    return _overtaken(call, tx, server.id, VERBS[verb], "delete", Delete)


def _restorable(server: Server) -> bool:
    """It has something that could run again: a machine on a host, and nothing about it is undecided."""
    return server.launched_at is not None and server.host is not None and server.vm_state != VM.resized


def soft_deleted(call: Call, tx: Tx, server: Server) -> list[str]:
    if server.vm_state == VM.soft_deleted or server.task_state in (Task.soft_deleting, Task.deleting):
        return []  # asked twice
    return _overtaken(call, tx, server.id, VERBS["soft_delete"], "soft_delete", SoftDelete)


def _overtaken(call: Call, tx: Tx, id: str, verb: Verb, flow: str, job: Callable[[Server], Any]) -> list[str]:
    """Take the server from whoever has it; they are told to stop. Whom to wake."""
    now = call.world.clock.now()
    server = servers.begin(tx, id, verb, now)
    others = signal(tx, id, "abort")
    told = cause(call, verb.action)
    return [*others, start(tx, flow, job(server), id=call.world.ids.uuid(), subject=id, now=now, cause=told)]


@R.post("/v2.1/servers/{id}/action", action="forceDelete", ok=202, body=Any,
        policy="os_compute_api:os-deferred-delete:force", late=True)  # fmt: skip
def force_delete(call: Call, id: str) -> None:
    """For good, whatever could have been restored."""

    def record(tx: Tx) -> list[str]:
        server = the_server(call, tx, id)
        unlocked(call, server)
        return deleted(call, tx, server, "force_delete")

    for run in call.world.db.run(record):
        call.world.wake(run)


@R.post("/v2.1/servers/{id}/action", action="restore", ok=202, body=Any,
        policy="os_compute_api:os-deferred-delete:restore", late=True)  # fmt: skip
def restore(call: Call, id: str) -> None:
    """What was soft-deleted counts again, so there must be room for it in the quota."""
    world: World = call.world
    most = allowance_of(call, id)

    def record(tx: Tx) -> str:
        before = the_server(call, tx, id)
        if before.locked and not call.context.is_admin:
            raise Conflict(f"Instance {id} is in an invalid state for 'restore'")
        servers.check(before, VERBS["restore"])
        quotas.claim_again(tx, most, before)
        now = world.clock.now()
        job = Restore(servers.begin(tx, id, VERBS["restore"], now))
        return start(tx, "restore", job, id=world.ids.uuid(), subject=id, now=now, cause=cause(call, "restore"))

    world.wake(world.db.run(record))


# ---- many


Many = list[str]
F = TypeVar("F", Server, pages.Short)


class Query(msgspec.Struct):
    """Text, judged by what the caller may filter by: most callers give one or two of them."""

    user_id: Many = []
    project_id: Many = []
    tenant_id: Many = []
    launch_index: Many = []
    image_ref: Many = []
    image: Many = []
    kernel_id: Many = []
    ramdisk_id: Many = []
    hostname: Many = []
    key_name: Many = []
    power_state: Many = []
    vm_state: Many = []
    task_state: Many = []
    host: Many = []
    node: Many = []
    flavor: Many = []
    reservation_id: Many = []
    launched_at: Many = []
    terminated_at: Many = []
    availability_zone: Many = []
    name: Many = []
    display_name: Many = []
    description: Many = []
    display_description: Many = []
    locked_by: Many = []
    uuid: Many = []
    root_device_name: Many = []
    config_drive: Many = []
    access_ip_v4: Many = []
    access_ip_v6: Many = []
    auto_disk_config: Many = []
    progress: Many = []
    sort_key: Many = []
    sort_dir: Many = []
    all_tenants: Many = []
    soft_deleted: Many = []
    deleted: Many = []
    status: Many = []
    changes_since: Many = field(default_factory=list, name="changes-since")
    ip: Many = []
    ip6: Many = []
    created_at: Many = []
    limit: Many = []
    marker: Many = []
    block_device_mapping: Many = []
    services: Many = []
    metadata: Many = []
    system_metadata: Many = []
    info_cache: Many = []
    security_groups: Many = []
    pci_devices: Many = []
    tags: Annotated[Many, since("2.26")] = []
    tags_any: Annotated[Many, since("2.26")] = field(default_factory=list, name="tags-any")
    not_tags: Annotated[Many, since("2.26")] = field(default_factory=list, name="not-tags")
    not_tags_any: Annotated[Many, since("2.26")] = field(default_factory=list, name="not-tags-any")
    changes_before: Annotated[Many, since("2.66")] = field(default_factory=list, name="changes-before")
    locked: Annotated[Many, since("2.73")] = []


FORBIDDEN = (
    "block_device_mapping",
    "services",
    "metadata",
    "system_metadata",
    "info_cache",
    "security_groups",
    "pci_devices",
)
EVERYBODYS = {"reservation_id", "name", "status", "image", "flavor", "ip", "changes_since", "all_tenants"}
LATER = {
    5: {"ip6"},
    26: {"tags", "tags_any", "not_tags", "not_tags_any"},
    66: {"changes_before"},
    73: {"locked"},
    83: {
        "availability_zone", "config_drive", "key_name", "created_at", "launched_at", "terminated_at", "power_state",
        "task_state", "vm_state", "progress", "user_id",
    },
    90: {"hostname"},
}  # fmt: skip
IGNORED_SORTS = frozenset(
    "architecture cell_name cleaned default_ephemeral_device default_swap_device deleted deleted_at disable_terminate ephemeral_gb "
    "ephemeral_key_uuid id key_data launched_on locked memory_mb os_type reservation_id root_gb shutdown_terminate user_data vcpus vm_mode".split()
)


@R.get("/v2.1/servers", query=Query, strict="2.75", policy="os_compute_api:servers:index")
def index(call: Call) -> dict[str, Any]:
    with call.world.db.read() as tx:
        found, limit = _found(call, tx, "index", pages.short_page)
    return _page(call, [views.short(call, s) for s in found], found, limit, "servers")


@R.get("/v2.1/servers/detail", query=Query, strict="2.75", policy="os_compute_api:servers:detail")
def detail(call: Call) -> dict[str, Any]:
    with call.world.db.read() as tx:
        found, limit = _found(call, tx, "detail", pages.page)
        more = about(call, tx, found)
    return _page(
        call, [views.server(call, s, more[s.id], listed=True) for s in found], found, limit, "servers", "detail"
    )


def _page(
    call: Call, shown: list[Any], found: Sequence[Server | pages.Short], limit: int, *path: str
) -> dict[str, Any]:
    body: dict[str, Any] = {"servers": shown}
    if found and len(found) == limit:
        body["servers_links"] = next_link(call, found[-1].id, *path)
    return body


def _found(call: Call, tx: Tx, which: str, read: Callable[[Tx, pages.Page], list[F]]) -> tuple[list[F], int]:
    said = {f: v for f in Query.__struct_fields__ if (v := getattr(call.query, f))}
    limit = page_limit(call, said["limit"][-1] if "limit" in said else None)
    sort = _sorting(call, said.pop("sort_key", []), said.pop("sort_dir", []))
    marker = said.pop("marker", [None])[-1]
    said.pop("limit", None)
    where = _conditions(call, _allowed(call, said), which)
    if where is None or limit == 0:
        return [], limit
    return read(tx, pages.Page(where, sort, limit, marker)), limit


def _allowed(call: Call, said: dict[str, list[str]]) -> dict[str, list[str]]:
    if call.may("os_compute_api:servers:allow_all_filters"):
        for name in said:
            if name in FORBIDDEN:
                raise Invalid(f"Invalid filter: {name}")
        return said
    known = EVERYBODYS.union(*(names for v, names in LATER.items() if call.version >= v))
    return {k: v for k, v in said.items() if k in known or k in ("deleted", "tenant_id")}


def _conditions(call: Call, said: dict[str, list[str]], which: str) -> list[Condition] | None:
    """What the page must fulfil; None where nothing can."""
    where: list[Condition] = []
    where += _whose(call, said, which)
    where += _which_life(call, said)
    if "status" in said:
        if "DELETED" in {s.upper() for s in said["status"]} and not call.context.is_admin:
            raise Forbidden("Only administrators may list deleted servers")
        has = pages.has_status(said["status"])
        if has is None:
            if call.version >= 38:
                raise Invalid(f"Invalid status value: {said['status'][0][:60]}")
            return None
        where.append(has)
    for name in ("image_ref", "vm_state", "flavor", "uuid", "host", "task_state", "user_id"):
        if name in said:
            where.append(pages.is_one_of(name, [v.lower() if name == "vm_state" else v for v in said[name]]))
    if "image" in said:
        where.append(pages.is_one_of("image_ref", said["image"]))
    for name in said.keys() & pages.SEARCHED.keys():
        where.append(pages.matches(name, said[name][-1]))
    for name in said.keys() & {"created_at", "launched_at", "terminated_at"}:
        where.append(pages.on_day(name, said[name][-1]))
    for name, any_of, negated in (("tags", 0, 0), ("tags_any", 1, 0), ("not_tags", 0, 1), ("not_tags_any", 1, 1)):
        if name in said:
            where.append(pages.tagged(said[name][-1].split(","), any=bool(any_of), negated=bool(negated)))
    if "locked" in said:
        where.append(pages.is_locked(_bool(said["locked"][-1], "locked")))
    if "config_drive" in said:
        where.append(pages.has_config_drive(said["config_drive"][-1].lower() in ("true", "1", "yes", "on", "t")))
    for name, version in (("ip", 4), ("ip6", 6)):
        if name in said:
            where.append(pages.has_address(said[name][-1], version))
    return where


def _whose(call: Call, said: dict[str, list[str]], which: str) -> list[Condition]:
    everybody = False
    if "all_tenants" in said:
        text = said["all_tenants"][-1]
        everybody = text == "" or _bool(text, "all_tenants")
    if everybody:
        call.check(rule=f"os_compute_api:servers:{which}:get_all_tenants")
        wanted = said.get("project_id") or said.get("tenant_id")
        return [pages.is_one_of("project_id", wanted)] if wanted else []
    return [pages.is_one_of("project_id", [call.context.project_id or ""])]


def _which_life(call: Call, said: dict[str, list[str]]) -> list[Condition]:
    since_, before = _moment(said, "changes_since"), _moment(said, "changes_before")
    if since_ is not None and before is not None and since_ > before:
        raise Invalid("The value of changes-since must be less than or equal to changes-before.")
    where = pages.updated(since_, before)
    admin = call.context.is_admin
    if "deleted" in said and admin:
        if said["deleted"][-1].lower() in ("true", "1", "yes", "on", "t", "y"):
            return [*where, pages.dead_or_soft_deleted()]
        where.append(pages.alive())
    elif not where:
        where.append(pages.alive())
    else:
        return where
    if "soft_deleted" not in said or not admin or not said["soft_deleted"][-1]:
        where.append(pages.not_soft_deleted())
    return where


def _moment(said: dict[str, list[str]], name: str) -> float | None:
    if name not in said:
        return None
    text = said[name][-1]
    try:
        return parsed(text.replace(" ", "+"))
    except ValueError:
        shown = name.replace("_", "-")
        raise Invalid(
            f"Invalid input for query parameters {shown}. Value: {text[:60]}. '{text[:60]}' is not a 'date-time'"
        ) from None


def _bool(text: str, name: str) -> bool:
    low = text.lower()
    if low in ("true", "1", "yes", "on", "t", "y"):
        return True
    if low in ("false", "0", "no", "off", "f", "n"):
        return False
    raise Invalid(f"Invalid value for {name}: {text[:60]}")


def _sorting(call: Call, keys: list[str], directions: list[str]) -> list[tuple[str, bool]]:
    if any(d not in ("asc", "desc") for d in directions):
        raise Invalid(f"Unknown sort direction, must be one of: asc, desc ({directions[0][:20]})")
    if len(directions) > len(keys) and keys:
        raise Invalid("Sort direction size exceeds sort key size")
    sort = []
    for i, key in enumerate(keys):
        desc = (directions[i] if i < len(directions) else directions[-1] if directions else "desc") == "desc"
        ignored = key in IGNORED_SORTS and call.version < (73 if key == "locked" else 75)
        if not ignored and key not in pages.SORTS:
            raise Invalid(
                f"Invalid input for query parameters sort_key. Value: {key[:60]}. '{key[:60]}' is not one of the keys that can be sorted by"
            )
        if key in ("host", "node") and not call.context.is_admin:
            raise Forbidden("Only administrators can sort servers by host or node")
        if not ignored:
            sort.append((key, desc))
    return sort


def about(call: Call, tx: Tx, found: list[Server]) -> dict[str, views.Shown]:
    """What is not in the rows themselves: zones and health of hosts (known here), faults (one look at the journal)."""
    book = call.world.hosts
    hosts = {h: (book.zone(h), book.status(h)) for h in {s.host for s in found if s.host}}
    faulty = {s.id: s.fault_run for s in found if s.fault_run and status(s.vm_state, s.task_state) in views.FAULTY}
    faults = faults_of(tx, list(faulty.values())) if faulty else {}
    shown = {}
    for s in found:
        zone, health = hosts[s.host] if s.host else (s.availability_zone or "", "")
        shown[s.id] = views.Shown(
            zone=zone,
            host_status=health,
            fault=faults.get(faulty.get(s.id, "")),
            fault_at=s.updated_at,
            groups=[s.group_id] if s.group_id and s.deleted_at is None else [],
        )
    return shown


# ---- what needs no flow


class Lock(msgspec.Struct, forbid_unknown_fields=True):
    locked_reason: Annotated[str, Meta(min_length=1, max_length=255)] | UnsetType = UNSET


@R.post("/v2.1/servers/{id}/action", action="lock", ok=202, body=Annotated[Lock | None, was(Any, until="2.72")],
        policy="os_compute_api:os-lock-server:lock", late=True)  # fmt: skip
def lock(call: Call, id: str) -> None:
    reason = call.body.locked_reason if isinstance(call.body, Lock) and call.body.locked_reason is not UNSET else None

    def record(tx: Tx) -> None:
        server = the_server(call, tx, id)
        owner = "owner" if server.project_id == call.context.project_id else "admin"
        if server.locked_by == "owner" and owner == "owner" and reason is None:
            return
        servers.change(tx, id, call.world.clock.now(), locked_by=owner, locked_reason=reason)
        _note(call, tx, id, "lock", "api_lock")

    call.world.db.run(record)


@R.post(
    "/v2.1/servers/{id}/action",
    action="unlock",
    ok=202,
    body=Any,
    policy="os_compute_api:os-lock-server:unlock",
    late=True,
)
def unlock(call: Call, id: str) -> None:
    def record(tx: Tx) -> None:
        server = the_server(call, tx, id)
        owner = "owner" if server.project_id == call.context.project_id else "admin"
        if server.locked_by not in (None, owner):
            call.check(
                {"project_id": server.project_id, "user_id": server.user_id},
                "os_compute_api:os-lock-server:unlock:unlock_override",
            )
        servers.change(tx, id, call.world.clock.now(), locked_by=None, locked_reason=None)
        _note(call, tx, id, "unlock", "api_unlock")

    call.world.db.run(record)


class Reset(msgspec.Struct, forbid_unknown_fields=True):
    state: Literal["active", "error"]


@R.post(
    "/v2.1/servers/{id}/action",
    action="os-resetState",
    ok=202,
    body=Reset,
    policy="os_compute_api:os-admin-actions:reset_state",
    late=True,
)
def reset_state(call: Call, id: str) -> None:
    """An administrator's word against the table's. Whatever runs goes on and finds that the server is no longer its own."""

    def record(tx: Tx) -> None:
        server = the_server(call, tx, id)
        unlocked(call, server)
        servers.reset(tx, id, VM.active if call.body.state == "active" else VM.error, call.world.clock.now())
        _note(call, tx, id, "resetState", None)

    call.world.db.run(record)


def _note(call: Call, tx: Tx, id: str, action: str, event: str | None) -> None:
    noted(tx, id=call.world.ids.uuid(), subject=id, now=call.world.clock.now(), cause=cause(call, action), event=event)


class Output(msgspec.Struct, forbid_unknown_fields=True):
    length: int | Annotated[str, Meta(pattern=r"^-?[0-9]+$", max_length=12)] | None = None


@R.post(
    "/v2.1/servers/{id}/action",
    action="os-getConsoleOutput",
    body=Output,
    policy="os_compute_api:os-console-output",
    late=True,
)
def console_output(call: Call, id: str) -> dict[str, str]:
    lines = None if call.body.length is None else int(call.body.length)
    if lines is not None and lines < -1:
        raise Invalid(
            f"Invalid input for field/attribute length. Value: {lines}. {lines} is less than the minimum of -1"
        )
    with call.world.db.read() as tx:
        server = the_server(call, tx, id)
    if not server.host or server.vm_state == VM.building:
        raise Conflict(f"Instance {id} is not ready")
    try:
        text: str = call.world.ask(server.host, ConsoleLog(server=id, lines=None if lines == -1 else lines), 15.0).text
    except NotFound:
        raise NotFound(
            f"Unable to get console log for instance {id}, functionality not implemented or no log yet."
        ) from None
    return {"output": "".join(c for c in text if c in "\n\t\r" or c.isprintable())}
