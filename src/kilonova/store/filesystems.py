"""Shared file systems at rest, as their own service keeps them: shares, who may reach them, and what must not be done.

What servers have of them is in `store/shares.py`; the bytes are directories (`companions/share.py`).
"""

from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Tx, claim, meta
from kilonova.kit.ready import ready
from kilonova.store.networks import Json

S = TypeVar("S", bound=msgspec.Struct)


class FileSystem(msgspec.Struct, frozen=True, kw_only=True):
    """A share, of a project. `status` is "available", or "deleting" while its directory goes."""

    id: str
    project_id: str
    user_id: str
    created_at: float
    updated_at: float
    size_gb: int
    proto: str = "NFS"
    status: str = "available"
    name: str | None = None
    description: str | None = None
    is_public: bool = False
    metadata: dict[str, str] = {}


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Who may reach a share: `kind` is "ip", "user", "cephx" …, `who` an address or a name, `level` "rw" or "ro"."""

    id: str
    share_id: str
    created_at: float
    kind: str
    who: str
    level: str = "rw"
    metadata: dict[str, str] = {}


class Lock(msgspec.Struct, frozen=True, kw_only=True):
    """What is not to be done to something: `action` is "delete", or "show" of a rule. `resource` is its id."""

    id: str
    project_id: str
    user_id: str
    created_at: float
    resource: str
    kind: str = "share"  # or access_rule
    action: str = "delete"
    context: str = "user"  # who locked it: user, service, admin
    reason: str | None = None


def _text(name: str, length: int = 255, **how: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.String(length), **{"nullable": False} | how)


SHARES = sa.Table(
    "filesystems",
    meta,
    _text("id", 36, primary_key=True),
    _text("project_id", index=True),
    _text("user_id"),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.Column("size_gb", sa.Integer, nullable=False),
    _text("proto", 16),
    _text("status", 32),
    _text("name", nullable=True),
    _text("description", nullable=True),
    sa.Column("is_public", sa.Boolean, nullable=False),
    sa.Column("metadata", Json, nullable=False),
)
RULES = sa.Table(
    "filesystem_rules",
    meta,
    _text("id", 36, primary_key=True),
    _text("share_id", 36),
    sa.Column("created_at", sa.Double, nullable=False),
    _text("kind", 16),
    _text("who"),
    _text("level", 2),
    sa.Column("metadata", Json, nullable=False),
    sa.UniqueConstraint("share_id", "kind", "who"),
)
LOCKS = sa.Table(
    "filesystem_locks",
    meta,
    _text("id", 36, primary_key=True),
    _text("project_id", index=True),
    _text("user_id"),
    sa.Column("created_at", sa.Double, nullable=False),
    _text("resource", 36, index=True),
    _text("kind", 16),
    _text("action", 16),
    _text("context", 8),
    _text("reason", 1023, nullable=True),
)
TABLES: dict[type[msgspec.Struct], sa.Table] = {FileSystem: SHARES, Access: RULES, Lock: LOCKS}
_ALL = {k: sa.select(*(t.c[f] for f in k.__struct_fields__)) for k, t in TABLES.items()}
_ONE = {k: ready(s.where(TABLES[k].c.id == sa.bindparam("the_id"))) for k, s in _ALL.items()}


def look(tx: Tx, kind: type[S], id: str) -> S | None:
    row = tx.execute(_ONE[kind], {"the_id": id}).first()
    return None if row is None else kind(**row._mapping)


def find(tx: Tx, kind: type[S], *where: Any, limit: int | None = None, offset: int = 0) -> list[S]:
    """All that fit, the newest first."""
    c = TABLES[kind].c
    query = _ALL[kind].where(*where).order_by(c.created_at.desc(), c.id).limit(limit).offset(offset)
    return [kind(**row._mapping) for row in tx.execute(query)]


def add(tx: Tx, thing: msgspec.Struct) -> None:
    """Raises IntegrityError where something unique is there already."""
    tx.execute(sa.insert(TABLES[type(thing)]), msgspec.structs.asdict(thing))


def change(tx: Tx, kind: type[msgspec.Struct], id: str, **values: Any) -> bool:
    return claim(tx, sa.update(TABLES[kind]).where(TABLES[kind].c.id == id).values(values))


def remove(tx: Tx, kind: type[msgspec.Struct], *where: Any) -> None:
    tx.execute(sa.delete(TABLES[kind]).where(*where))


def locks_of(tx: Tx, resource: str, action: str) -> list[Lock]:
    return find(tx, Lock, LOCKS.c.resource == resource, LOCKS.c.action == action)
