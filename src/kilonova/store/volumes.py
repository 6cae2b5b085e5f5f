"""Block storage at rest: volumes, snapshots, backups, attachments, types, shares, and the acts that are under way.

A thing that is on its way (`creating`, `deleting`, `uploading`, …) has an act: a row that is written in the same
transaction as that status and goes in the same transaction as its end.  So nothing is on its way with nobody to
bring it there.  The bytes are in `companions/volume/bytes.py`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Tx, claim, meta
from kilonova.kit.errors import OverQuota
from kilonova.kit.ready import Among, Shapes, ready
from kilonova.store.networks import Json, holds

S = TypeVar("S", bound=msgspec.Struct)

UNLIMITED = -1
IN_ONE_QUERY = 5000  # ids


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """`image` are the properties of the image it was made of. `multiattach`: several servers may have it at once.

    `migration` is "target" or None. Moments in seconds since 1970.
    """

    id: str
    project_id: str
    user_id: str
    created_at: float
    updated_at: float
    size_gb: int
    type_id: str
    zone: str
    status: str = "creating"
    name: str | None = None
    description: str | None = None
    bootable: bool = False
    multiattach: bool = False
    readonly: bool | None = None  # None: nobody said
    snapshot_id: str | None = None
    source_id: str | None = None
    migration: str | None = None
    metadata: dict[str, str] = {}
    image: dict[str, str] = {}


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    project_id: str
    user_id: str
    volume_id: str
    created_at: float
    updated_at: float
    size_gb: int
    status: str = "creating"
    name: str | None = None
    description: str | None = None
    metadata: dict[str, str] = {}


class Backup(msgspec.Struct, frozen=True, kw_only=True):
    """`data_at`: the moment of which it tells. `snapshot_id`: made of a snapshot and not of the volume as it is."""

    id: str
    project_id: str
    user_id: str
    volume_id: str
    created_at: float
    updated_at: float
    data_at: float
    size_gb: int
    status: str = "creating"
    name: str | None = None
    description: str | None = None
    container: str | None = None
    zone: str | None = None
    snapshot_id: str | None = None
    failed: str | None = None
    metadata: dict[str, str] = {}


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """One way from a volume to a server, or to a bare host. `info` is how to connect, once it was told to whom."""

    id: str
    volume_id: str
    project_id: str
    created_at: float
    status: str = "reserved"
    server_id: str | None = None
    host: str | None = None
    mountpoint: str | None = None
    mode: str | None = None
    connector: dict[str, Any] | None = None
    info: dict[str, Any] | None = None
    attached_at: float | None = None


class Type(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of volume. `projects`: who may use one that is not public."""

    id: str
    name: str
    created_at: float
    description: str | None = None
    is_public: bool = True
    extra_specs: dict[str, str] = {}
    projects: list[str] = []


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong with something, for its owner (user messages, API 3.3)."""

    id: str
    project_id: str
    request_id: str
    kind: str  # VOLUME, VOLUME_SNAPSHOT, VOLUME_BACKUP
    subject: str
    event: str
    said: str
    created_at: float


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """Something long that was promised. `subject` is the volume, snapshot or backup that it is about.

    `job` is what `kind` needs to know; `back` the status that its volume has again afterwards.
    """

    id: str
    kind: str
    subject: str
    created_at: float
    request_id: str = ""
    back: str = ""
    job: dict[str, Any] = {}


def _text(name: str, length: int = 255, **how: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.String(length), **{"nullable": False} | how)


def _maybe(name: str, length: int = 255, **how: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.String(length), **how)


def _owned() -> list[sa.Column[Any]]:
    """What everything that users make has."""
    return [
        _text("id", 36, primary_key=True),
        _text("project_id", index=True),
        _text("user_id"),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        sa.Column("size_gb", sa.Integer, nullable=False),
        _text("status", 32, index=True),
        _maybe("name"),
        _maybe("description"),
        sa.Column("metadata", Json, nullable=False),
    ]


VOLUMES = sa.Table(
    "volumes",
    meta,
    *_owned(),
    _text("type_id", 36),
    _text("zone"),
    sa.Column("bootable", sa.Boolean, nullable=False),
    sa.Column("multiattach", sa.Boolean, nullable=False),
    sa.Column("readonly", sa.Boolean),
    _maybe("snapshot_id", 36),
    _maybe("source_id", 36),
    _maybe("migration", 64),
    sa.Column("image", Json, nullable=False),
    sa.Index("volumes_newest", "created_at", "id"),
)
SNAPSHOTS = sa.Table("volume_snapshots", meta, *_owned(), _text("volume_id", 36, index=True))
BACKUPS = sa.Table(
    "volume_backups",
    meta,
    *_owned(),
    _text("volume_id", 36, index=True),
    sa.Column("data_at", sa.Double, nullable=False),
    _maybe("container"),
    _maybe("zone"),
    _maybe("snapshot_id", 36),
    sa.Column("failed", sa.Text),
)
ATTACHMENTS = sa.Table(
    "volume_attachments",
    meta,
    _text("id", 36, primary_key=True),
    _text("volume_id", 36, index=True),
    _text("project_id", index=True),
    sa.Column("created_at", sa.Double, nullable=False),
    _text("status", 32),
    _maybe("server_id", index=True),
    _maybe("host"),
    _maybe("mountpoint"),
    _maybe("mode", 32),
    sa.Column("connector", Json),
    sa.Column("info", Json),
    sa.Column("attached_at", sa.Double),
)
TYPES = sa.Table(
    "volume_types",
    meta,
    _text("id", 36, primary_key=True),
    _text("name", unique=True),
    sa.Column("created_at", sa.Double, nullable=False),
    _maybe("description"),
    sa.Column("is_public", sa.Boolean, nullable=False),
    sa.Column("extra_specs", Json, nullable=False),
    sa.Column("projects", Json, nullable=False),
)
MESSAGES = sa.Table(
    "volume_messages",
    meta,
    _text("id", 36, primary_key=True),
    _text("project_id", index=True),
    _text("request_id", 64),
    _text("kind", 32),
    _text("subject", 36),
    _text("event", 64),
    sa.Column("said", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)
ACTS = sa.Table(
    "volume_acts",
    meta,
    _text("id", 36, primary_key=True),
    _text("kind", 32),
    _text("subject", 36, index=True),
    sa.Column("created_at", sa.Double, nullable=False),
    _text("request_id", 64),
    _text("back", 32),
    sa.Column("job", Json, nullable=False),
)
SHARES = sa.Table(
    "volume_shares",
    meta,
    _text("project_id", primary_key=True),
    _text("resource", primary_key=True),
    sa.Column("used", sa.BigInteger, nullable=False),
    sa.Column("hard_limit", sa.BigInteger),
)
TABLES: dict[type[msgspec.Struct], sa.Table] = {
    Volume: VOLUMES,
    Snapshot: SNAPSHOTS,
    Backup: BACKUPS,
    Attachment: ATTACHMENTS,
    Type: TYPES,
    Message: MESSAGES,
    Act: ACTS,
}
_ALL = {k: sa.select(*(t.c[f] for f in k.__struct_fields__)) for k, t in TABLES.items()}
_ONE = {k: ready(s.where(TABLES[k].c.id == sa.bindparam("the_id"))) for k, s in _ALL.items()}
_LOCKED = ready(_ALL[Volume].where(VOLUMES.c.id == sa.bindparam("the_id")).with_for_update())


# ---- for all kinds alike


def look(tx: Tx, kind: type[S], id: str) -> S | None:
    row = tx.execute(_ONE[kind], {"the_id": id}).first()
    return None if row is None else kind(**row._mapping)


def find(tx: Tx, kind: type[S], *where: Any) -> list[S]:
    """All that fit, the oldest first."""
    c = TABLES[kind].c
    return [kind(**row._mapping) for row in tx.execute(_ALL[kind].where(*where).order_by(c.created_at, c.id))]


def page(tx: Tx, kind: type[S], where: Sequence[Any], order: Sequence[Any], limit: int, offset: int = 0) -> list[S]:
    query = _ALL[kind].where(*where).order_by(*order).limit(limit).offset(offset)
    return [kind(**row._mapping) for row in tx.execute(query)]


def count(tx: Tx, kind: type[msgspec.Struct], *where: Any) -> int:
    return tx.execute(sa.select(sa.func.count()).select_from(TABLES[kind]).where(*where)).scalar_one()


def add(tx: Tx, thing: msgspec.Struct) -> None:
    """Raises IntegrityError where something unique is there already."""
    tx.execute(sa.insert(TABLES[type(thing)]), _row(thing))


def change(tx: Tx, kind: type[msgspec.Struct], id: str, **values: Any) -> bool:
    """What no state stands against."""
    named = [(TABLES[kind].c[n], v) for n, v in values.items()]
    if any(isinstance(v, sa.ClauseElement) for _, v in named):
        return claim(tx, sa.update(TABLES[kind]).where(TABLES[kind].c.id == id).values(values))

    def write() -> sa.Update:
        new = {c: sa.bindparam(f"new_{c.name}", type_=c.type) for c, _ in named}
        return sa.update(TABLES[kind]).where(TABLES[kind].c.id == sa.bindparam("the_id")).values(new)

    told = {"the_id": id} | {f"new_{c.name}": v for c, v in named}
    return claim(tx, _CHANGES.of((kind, *values), write), told)


def step(tx: Tx, kind: type[msgspec.Struct], id: str, now: float, *, to: str, over: Iterable[str], **more: Any) -> bool:
    """UPDATE volumes SET status = :to … WHERE id = :id AND status IN (:over)"""
    c = TABLES[kind].c
    values = {"status": to, "updated_at": now, **more}
    return claim(tx, sa.update(TABLES[kind]).where(c.id == id, c.status.in_(list(over))).values(values))


_CHANGES = Shapes()


def remove(tx: Tx, kind: type[msgspec.Struct], id: str) -> bool:
    return bool(tx.execute(sa.delete(TABLES[kind]).where(TABLES[kind].c.id == id)).rowcount)


def _row(thing: msgspec.Struct) -> dict[str, Any]:
    return msgspec.structs.asdict(thing)


# ---- what hangs on a volume


def attachments_of(tx: Tx, volume_ids: Iterable[str]) -> dict[str, list[Attachment]]:
    """By volume, the oldest first: one query for a page."""
    found: dict[str, list[Attachment]] = {}
    ids = list(volume_ids)
    for first in range(0, len(ids), IN_ONE_QUERY):
        for row in tx.execute(*_ATTACHMENTS(ids[first : first + IN_ONE_QUERY])):
            found.setdefault(row.volume_id, []).append(Attachment(**row._mapping))
    return found


_ATTACHMENTS = Among(
    lambda some: (
        _ALL[Attachment].where(ATTACHMENTS.c.volume_id.in_(some)).order_by(ATTACHMENTS.c.created_at, ATTACHMENTS.c.id)
    )
)


def lock(tx: Tx, volume_id: str) -> Volume | None:
    """The volume, and nobody else changes it or its attachments before this transaction ends (SQLite: nobody can)."""
    row = tx.execute(_LOCKED, {"the_id": volume_id}).first()
    return None if row is None else Volume(**row._mapping)


def is_read(tx: Tx, id: str) -> bool:
    """Is something being made of the bytes of this volume, snapshot or backup?"""
    query = sa.select(ACTS.c.id).where(holds(ACTS.c.job, pair("id", id).decode())).limit(1)
    return tx.execute(query).first() is not None


def pair(name: str, value: str) -> bytes:
    return msgspec.json.encode({name: value})[1:-1]


def has_metadata(kind: type[msgspec.Struct], name: str, value: str, column: str = "metadata") -> Any:
    """The SQL of: this is among its metadata. A text inside a text has its quotes escaped, so the pair is unique."""
    return holds(TABLES[kind].c[column], pair(name, value).decode())


# ---- shares

_CHARGE = (
    sa.update(SHARES)
    .where(
        SHARES.c.project_id == sa.bindparam("project"),
        SHARES.c.resource == sa.bindparam("what"),
        sa.or_(
            sa.func.coalesce(SHARES.c.hard_limit, sa.bindparam("standard")) == UNLIMITED,
            SHARES.c.used + sa.bindparam("n") <= sa.func.coalesce(SHARES.c.hard_limit, sa.bindparam("standard")),
        ),
    )
    .values(used=SHARES.c.used + sa.bindparam("n"))
)


class Share(NamedTuple):
    limit: int | None
    used: int


def charge(tx: Tx, project: str, resource: str, n: int, standard: int) -> None:
    """Take `n` of the project's share; `standard` is the limit where it has none of its own. Raises OverQuota.

    UPDATE volume_shares SET used = used + :n WHERE … AND used + :n <= coalesce(hard_limit, :standard)
    """
    told = {"project": project, "what": resource, "n": n, "standard": standard}
    if tx.execute(_CHARGE, told).rowcount:
        return
    here = SHARES.c.project_id == project, SHARES.c.resource == resource
    if tx.execute(sa.select(SHARES.c.used).where(*here)).first() is None:
        tx.execute(sa.insert(SHARES).values(project_id=project, resource=resource, used=0))
        if tx.execute(_CHARGE, told).rowcount:
            return
    raise OverQuota(f"{resource} exceeds the share of the project.", code=resource)


def discharge(tx: Tx, project: str, resource: str, n: int = 1) -> None:
    here = SHARES.c.project_id == project, SHARES.c.resource == resource
    tx.execute(sa.update(SHARES).where(*here).values(used=SHARES.c.used - n))


def shares(tx: Tx, project: str) -> dict[str, Share]:
    query = sa.select(SHARES.c.resource, SHARES.c.hard_limit, SHARES.c.used).where(SHARES.c.project_id == project)
    return {resource: Share(limit, used) for resource, limit, used in tx.execute(query)}


def limit(tx: Tx, project: str, resource: str, hard_limit: int | None) -> None:
    """Give a project a limit of its own; None takes it back."""
    here = SHARES.c.project_id == project, SHARES.c.resource == resource
    if not claim(tx, sa.update(SHARES).where(*here).values(hard_limit=hard_limit)) and hard_limit is not None:
        tx.execute(sa.insert(SHARES).values(project_id=project, resource=resource, used=0, hard_limit=hard_limit))


def unlimit(tx: Tx, project: str) -> None:
    tx.execute(sa.update(SHARES).where(SHARES.c.project_id == project).values(hard_limit=None))
