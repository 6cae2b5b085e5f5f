"""Migrations: what moves, or moved, a server, as the API shows it; and who holds what of the host it came from.

While a resize waits for its user's word, the old host's share is held by the migration (a consumer named by its UUID),
and the old machine lies there: `kept`.  The share of a host that was evacuated is held so as well, until that host
is back and holds nothing.
"""

from collections.abc import Collection
from enum import StrEnum
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import NotFound
from kilonova.kit.ready import Among, each, ready
from kilonova.model.flavor import Flavor
from kilonova.model.server import Server


class Kind(StrEnum):
    """migration_type of the Compute API."""

    migration = "migration"
    resize = "resize"
    live = "live-migration"
    evacuation = "evacuation"


class Status(StrEnum):
    """states.md, section 8."""

    accepted = "accepted"
    queued = "queued"
    preparing = "preparing"
    running = "running"
    pre_migrating = "pre-migrating"
    migrating = "migrating"
    post_migrating = "post-migrating"
    finished = "finished"
    confirming = "confirming"
    confirmed = "confirmed"
    reverting = "reverting"
    reverted = "reverted"
    done = "done"
    completed = "completed"
    cancelled = "cancelled"
    failed = "failed"
    error = "error"


OVER = Status.confirmed, Status.reverted, Status.done, Status.completed, Status.cancelled, Status.failed, Status.error
# The servers API shows live migrations that are on their way.
ON_THE_WAY = Status.queued, Status.preparing, Status.running, Status.post_migrating
KEEPING = Status.finished, Status.confirming, Status.reverting  # the old machine lies on the source

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
T = sa.Table(
    "migrations",
    meta,
    sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
    sa.Column("uuid", sa.String(36), nullable=False, unique=True),
    sa.Column("server", sa.String(36), nullable=False),
    sa.Column("project_id", sa.String(64), nullable=False),
    sa.Column("user_id", sa.String(64), nullable=False),
    sa.Column("type", sa.String(16), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("source", sa.String(255)),
    sa.Column("source_node", sa.String(255)),
    sa.Column("source_epoch", sa.Integer, nullable=False),  # of the machine on the source
    sa.Column("dest", sa.String(255)),
    sa.Column("dest_node", sa.String(255)),
    sa.Column("dest_ip", sa.String(64)),
    sa.Column("last_epoch", sa.Integer, nullable=False),  # the highest that was ever given out in it
    sa.Column("old_flavor", sa.Text),  # JSON
    sa.Column("new_flavor", sa.Text),
    sa.Column("was", sa.String(24)),  # vm_state before
    sa.Column("memory_total", _NUMBER),
    sa.Column("memory_remaining", _NUMBER),
    sa.Column("memory_processed", _NUMBER),
    sa.Column("disk_total", _NUMBER),
    sa.Column("disk_remaining", _NUMBER),
    sa.Column("disk_processed", _NUMBER),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double),
    sa.Index("migrations_of_server", "server", "created_at"),
    sa.Index("migrations_newest", "created_at", "id"),
    sa.Index("migrations_status", "status", "source"),
)


class Migration(msgspec.Struct, frozen=True):
    """One row. Moments in seconds since 1970."""

    id: int
    uuid: str
    server: str
    project_id: str
    user_id: str
    type: str
    status: str
    source: str | None
    source_node: str | None
    source_epoch: int
    dest: str | None
    dest_node: str | None
    dest_ip: str | None
    last_epoch: int
    old_flavor: Flavor | None
    new_flavor: Flavor | None
    was: str | None
    memory_total: int | None
    memory_remaining: int | None
    memory_processed: int | None
    disk_total: int | None
    disk_remaining: int | None
    disk_processed: int | None
    created_at: float
    updated_at: float | None


# ---- written


def begin(
    tx: Tx, server: Server, kind: Kind, status: Status, *, uuid: str, now: float, was: str, flavor: Flavor | None = None
) -> str:
    """A server is about to move; it has been taken in this transaction. `was`: its vm_state before. The uuid."""
    row = {
        "uuid": uuid,
        "server": server.id,
        "project_id": server.project_id,
        "user_id": server.user_id,
        "type": str(kind),
        "status": str(status),
        "source": server.host,
        "source_node": server.node,
        "source_epoch": server.epoch,
        "last_epoch": server.epoch,
        "old_flavor": _text(server.flavor),
        "new_flavor": _text(flavor or server.flavor),
        "was": was,
        "created_at": now,
    }
    tx.execute(sa.insert(T), row)
    return uuid


def change(tx: Tx, uuid: str, now: float, status: Status | None = None, **facts: Any) -> None:
    """Columns of T. Flavors never change."""
    values = facts | {"updated_at": now} | ({} if status is None else {"status": str(status)})
    tx.execute(sa.update(T).where(_t.uuid == uuid).values(values))


def progress(tx: Tx, server: str, source: str, now: float, how_far: dict[str, int | None]) -> bool:
    """Of the live migration that is running; when a host tells of one that is over, nothing is written."""
    running = _t.server == server, _t.source == source, _t.status == str(Status.running)
    return bool(tx.execute(sa.update(T).where(*running).values(how_far | {"updated_at": now})).rowcount)


def next_epoch(tx: Tx, server: Server, uuid: str) -> int:
    """One that no machine of this server ever had, wherever it may still lie. It is written down as given out."""
    highest = tx.execute(sa.select(sa.func.max(_t.last_epoch)).where(_t.server == server.id)).scalar()
    epoch = max(server.epoch, int(highest or 0)) + 1
    tx.execute(sa.update(T).where(_t.uuid == uuid).values(last_epoch=epoch))
    return epoch


# ---- asked


def get(tx: Tx, uuid: str) -> Migration:
    found = tx.execute(SELECT.where(_t.uuid == uuid)).first()
    if found is None:
        raise NotFound(f"Migration {uuid} could not be found.")
    return of(found)


def one_of(tx: Tx, server: str, id: str) -> Migration:
    """By the number that the servers API names it by. Raises NotFound."""
    row = None
    if id.isdecimal() and len(id) < 19:
        row = tx.execute(SELECT.where(_t.server == server, _t.id == int(id))).first()
    if row is None:
        raise NotFound(f"Migration {id} for server {server} could not be found.")
    return of(row)


def unfinished(tx: Tx, server: str) -> Migration | None:
    """The resize that waits for its user's word."""
    waiting = _t.server == server, _t.status == str(Status.finished), _t.type.in_(["migration", "resize"])
    row = tx.execute(SELECT.where(*waiting).order_by(_t.id.desc())).first()
    return None if row is None else of(row)


def live(tx: Tx, server: str) -> list[Migration]:
    """Those of this server that are on their way while it runs."""
    going = _t.server == server, _t.type == str(Kind.live), _t.status.in_([str(s) for s in ON_THE_WAY])
    return [of(r) for r in tx.execute(SELECT.where(*going).order_by(_t.id))]


def holding(tx: Tx, server: str) -> list[Migration]:
    """Those of this server that may still hold something of their source, and those whose source may hold its machine."""
    return [of(r) for r in tx.execute(HOLDING, {"the_server": server})]


def kept(tx: Tx, host: str) -> dict[str, int]:
    """{server: epoch} of the old machines that lie on this host until somebody says what becomes of them."""
    return {r.server: r.source_epoch for r in tx.execute(KEPT, {"the_host": host})}


def evacuated_since(tx: Tx, source: str, at: float) -> set[str]:
    """Servers whose evacuation from that host began since then, whatever came of it."""
    t = T.c
    query = sa.select(t.server).where(t.source == source, t.type == Kind.evacuation, t.created_at >= at)
    return set(tx.execute(query).scalars())


def evacuated(tx: Tx, host: str) -> list[Migration]:
    """Those that left this host when it was down, and of which it may not know yet."""
    return [of(r) for r in tx.execute(EVACUATED, {"the_host": host})]


def left(tx: Tx, hosts: Collection[str]) -> set[str]:
    """Those of these hosts that such servers left."""
    return set(tx.execute(*LEFT(hosts)).scalars()) if hosts else set()


def in_progress(tx: Tx, host: str) -> bool:
    """Does anything that comes or goes still need this host?"""
    going = _t.source.in_([host]) | _t.dest.in_([host]), _t.status.not_in([str(s) for s in OVER])
    return tx.execute(sa.select(_t.id).where(*going).limit(1)).first() is not None


def sending(tx: Tx, source: str) -> int:
    """How many live migrations leave this host just now."""
    now = _t.source == source, _t.type == str(Kind.live), _t.status.in_(["preparing", "running", "post-migrating"])
    return int(tx.execute(sa.select(sa.func.count()).where(*now)).scalar() or 0)


class Wanted(msgspec.Struct, frozen=True):
    """What a list shall hold (GET /os-migrations)."""

    server: list[str] = []
    host: list[str] = []
    source: list[str] = []
    status: list[str] = []
    kind: list[str] = []
    user_id: str | None = None
    project_id: str | None = None
    since: float | None = None
    before: float | None = None


def page(tx: Tx, w: Wanted, *, newest: bool, limit: int | None = None, marker: str | None = None) -> list[Migration]:
    """Raises NotFound where there is no such marker."""
    query = SELECT.where(*_conditions(w))
    if not newest:
        query = query.order_by(_t.id)
    else:
        query = query.order_by(_t.created_at.desc(), _t.id.desc())
        if marker is not None:
            last = get(tx, marker)
            older = sa.or_(_t.created_at < last.created_at, sa.and_(_t.created_at == last.created_at, _t.id < last.id))
            query = query.where(older)
    return [of(r) for r in tx.execute(query.limit(limit))]


def _conditions(w: Wanted) -> list[Any]:
    where: list[Any] = []
    for column, values in ((_t.server, w.server), (_t.status, w.status), (_t.type, w.kind)):
        if values:
            where.append(column.in_(values))
    if w.host:
        where.append(_t.source.in_(w.host) | _t.dest.in_(w.host))
    elif w.source:
        where.append(_t.source.in_(w.source))
    if w.user_id is not None:
        where.append(_t.user_id == w.user_id)
    if w.project_id is not None:
        where.append(_t.project_id == w.project_id)
    moved = sa.func.coalesce(_t.updated_at, _t.created_at)
    if w.since is not None:
        where.append(moved >= w.since)
    if w.before is not None:
        where.append(moved <= w.before)
    return where


def of(row: Any) -> Migration:
    values = list(row)
    for i in _FLAVORS:
        if values[i] is not None:
            values[i] = _DECODER.decode(values[i])
    return Migration(*values)


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


_t, _b = T.c, sa.bindparam
_DECODER = msgspec.json.Decoder(Flavor)
_FLAVORS = [Migration.__struct_fields__.index(f) for f in ("old_flavor", "new_flavor")]
SELECT = sa.select(*[T.c[f] for f in Migration.__struct_fields__])
_evacuated = _t.status == str(Status.done), _t.type == str(Kind.evacuation)
EVACUATED = ready(SELECT.where(_t.source == sa.bindparam("the_host"), *_evacuated))
LEFT = Among(lambda some: sa.select(_t.source).where(_t.source.in_(some), *_evacuated).distinct())
KEPT = ready(
    sa.select(_t.server, _t.source_epoch)
    .where(_t.source == _b("the_host"), _t.status.in_(each(KEEPING)))
    .order_by(_t.id)
)
HOLDING = ready(
    SELECT.where(_t.server == _b("the_server"), _t.status.not_in(each(s for s in OVER if s != Status.done))).order_by(
        _t.id
    )
)
