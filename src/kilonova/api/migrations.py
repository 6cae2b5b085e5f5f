"""What moves, or moved, servers: the operators' list, and a server's live migrations that are on their way."""

from typing import Annotated, Any

import msgspec
from msgspec import field

from kilonova.api.bodies import Digits
from kilonova.api.registry import R, cause, links, next_link, owner, page_limit, the_server, unlocked
from kilonova.kit.clock import iso_us, parsed
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.kit.versions import since
from kilonova.kit.workflow import noted, signal
from kilonova.model.states import VM, Task
from kilonova.store import catalog
from kilonova.store import migrations as store
from kilonova.store.migrations import ON_THE_WAY, Kind, Migration, Status

# ---- all of them


class Query(msgspec.Struct):
    hidden: list[str] = []
    host: list[str] = []
    instance_uuid: list[str] = []
    source_compute: list[str] = []
    status: list[str] = []
    migration_type: list[str] = []
    limit: Annotated[Digits | None, since("2.59")] = None
    marker: Annotated[str | None, since("2.59")] = None
    changes_since: Annotated[str | None, since("2.59")] = field(default=None, name="changes-since")
    changes_before: Annotated[str | None, since("2.66")] = field(default=None, name="changes-before")
    user_id: Annotated[str | None, since("2.80")] = None
    project_id: Annotated[str | None, since("2.80")] = None


@R.get("/v2.1/os-migrations", query=Query, strict="2.59", policy="os_compute_api:os-migrations:index")
def index(call: Call) -> dict[str, Any]:
    """None of ours is ever hidden."""
    q: Query = call.query
    if q.project_id is None or q.project_id != call.context.project_id:
        call.check(rule="os_compute_api:os-migrations:index:all_projects")
    since_, before = _moment(q.changes_since, "changes-since"), _moment(q.changes_before, "changes-before")
    if since_ is not None and before is not None and since_ > before:
        raise Invalid("The value of changes-since must be less than or equal to changes-before.")
    paged = call.version >= 59
    limit = page_limit(call, q.limit) if paged else None
    wanted = store.Wanted(
        q.instance_uuid, q.host, q.source_compute, q.status, q.migration_type, q.user_id, q.project_id, since_, before
    )
    with call.world.db.read() as tx:
        try:
            found = store.page(tx, wanted, newest=paged, limit=limit, marker=q.marker)
        except NotFound:
            raise Invalid(f"Marker {q.marker} could not be found.") from None
        numbers = catalog.flavor_numbers(tx, {f.id for m in found for f in (m.old_flavor, m.new_flavor) if f})
    where = call.may("os_compute_api:os-migrations:index:host")
    body: dict[str, Any] = {"migrations": [_row(call, m, numbers, where) for m in found]}
    if limit and len(found) == limit:
        body["migrations_links"] = next_link(call, found[-1].uuid, "os-migrations")
    return body


def _row(call: Call, m: Migration, numbers: dict[str, int], where: bool) -> dict[str, Any]:
    shown = {
        "id": m.id,
        "instance_uuid": m.server,
        "status": m.status,
        "old_instance_type_id": numbers.get(m.old_flavor.id) if m.old_flavor else None,
        "new_instance_type_id": numbers.get(m.new_flavor.id) if m.new_flavor else None,
        "created_at": iso_us(m.created_at),
        "updated_at": None if m.updated_at is None else iso_us(m.updated_at),
    }
    if call.version >= 23:
        shown["migration_type"] = m.type
        if m.type == Kind.live and m.status in ON_THE_WAY:
            shown["links"] = links(call, "servers", m.server, "migrations", str(m.id))
    return shown | _both_ends(m, where) | _newer(call, m)


def _both_ends(m: Migration, where: bool) -> dict[str, str | None]:
    """From where to where, for those who may know hosts."""
    ends = {
        "source_compute": m.source,
        "source_node": m.source_node,
        "dest_compute": m.dest,
        "dest_node": m.dest_node,
        "dest_host": m.dest_ip or m.dest,
    }
    return ends if where else dict.fromkeys(ends)


def _newer(call: Call, m: Migration) -> dict[str, str]:
    shown = {"uuid": m.uuid} if call.version >= 59 else {}
    return shown | ({"user_id": m.user_id, "project_id": m.project_id} if call.version >= 80 else {})


def _moment(text: str | None, name: str) -> float | None:
    try:
        return None if text is None else parsed(text.replace(" ", "+"))
    except ValueError:
        raise Invalid(
            f"Invalid input for query parameters {name}. Value: {text}. {text!r} is not a 'date-time'"
        ) from None


# ---- a server's, while they last

PATH = "/v2.1/servers/{server_id}/migrations"


@R.get(PATH, versions="2.23-", policy="os_compute_api:servers:migrations:index", late=True)
def of_server(call: Call, server_id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        server = the_server(call, tx, server_id)
        found = store.live(tx, server_id)
    where = call.may("os_compute_api:servers:migrations:index:host", owner(server))
    return {"migrations": [_progress(call, m, where) for m in found]}


@R.get(PATH + "/{id}", versions="2.23-", policy="os_compute_api:servers:migrations:show", late=True)
def show(call: Call, server_id: str, id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        the_server(call, tx, server_id)
        m = store.one_of(tx, server_id, id)
    if m.type != Kind.live:
        raise NotFound(f"Migration {id} for server {server_id} is not live-migration.")
    if m.status not in ON_THE_WAY:
        raise NotFound(f"Migration {id} for server {server_id} is not in progress.")
    return {"migration": _progress(call, m, True)}


def _progress(call: Call, m: Migration, where: bool) -> dict[str, Any]:
    """What is not known, or nothing, is null."""
    shown: dict[str, Any] = {
        "id": m.id,
        "server_uuid": m.server,
        "status": m.status,
        "created_at": iso_us(m.created_at),
        "updated_at": iso_us(m.updated_at or m.created_at),
    }
    for what in ("memory", "disk"):
        for part in ("total", "processed", "remaining"):
            shown[f"{what}_{part}_bytes"] = getattr(m, f"{what}_{part}") or None
    return shown | _both_ends(m, where) | _newer(call, m)


@R.delete(PATH + "/{id}", ok=202, versions="2.24-", policy="os_compute_api:servers:migrations:delete", late=True)
def abort(call: Call, server_id: str, id: str) -> None:
    may_be = {Status.running} | ({Status.queued, Status.preparing} if call.version >= 65 else set())
    _call_out(call, server_id, id, "abort", "abort live migration", frozenset(VM), may_be, "live_migration_cancel")


@R.post(
    PATH + "/{id}/action",
    action="force_complete",
    ok=202,
    versions="2.22-",
    body=type(None),
    policy="os_compute_api:servers:migrations:force_complete",
    late=True,
)
def force_complete(call: Call, server_id: str, id: str) -> None:
    active = frozenset({VM.active})
    _call_out(
        call,
        server_id,
        id,
        "force_complete",
        "force_complete",
        active,
        {Status.running},
        "live_migration_force_complete",
    )


def _call_out(
    call: Call, server_id: str, id: str, name: str, op: str, states: frozenset[VM], may_be: set[Status], action: str
) -> None:
    """To the run that is at it. Raises Conflict for the server's state, Invalid for the migration's."""

    def record(tx: Tx) -> list[str]:
        server = the_server(call, tx, server_id)
        unlocked(call, server)
        for what, value, allowed in (
            ("vm_state", server.vm_state, {str(s) for s in states}),
            ("task_state", server.task_state, {str(Task.migrating)}),
        ):
            if value not in allowed:
                raise Conflict(f"Cannot '{op}' instance {server_id} while it is in {what} {value}")
        m = store.one_of(tx, server_id, id)
        if m.type != Kind.live or m.status not in may_be:
            raise Invalid(
                f"Migration {id} state of instance {server_id} is {m.status}. Cannot {op} while the migration is in this state."
            )
        now = call.world.clock.now()
        event = "compute_live_migration_abort" if name == "abort" else "compute_live_migration_force_complete"
        noted(
            tx,
            id=call.world.ids.uuid(),
            subject=server_id,
            now=now,
            cause=cause(call, action),
            event=event,
            host=m.source,
        )
        return signal(tx, server_id, name, workflow="live_migrate")

    for run in call.world.db.run(record):
        call.world.wake(run)
