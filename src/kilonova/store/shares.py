"""The shared file systems of servers, a row each. Few servers have any, so they are no part of a server's row.

Which rules of access there must be at the service that keeps a share follows from these rows, and from nothing else.
"""

from collections.abc import Iterable
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Tx, claim, meta
from kilonova.kit.errors import Conflict, Trouble
from kilonova.kit.ready import ready
from kilonova.model.server import Server
from kilonova.model.shares import Sharing
from kilonova.model.states import Verb

T = sa.Table(
    "server_shares",
    meta,
    sa.Column("uuid", sa.String(36), primary_key=True),
    sa.Column("server", sa.String(36), nullable=False),
    sa.Column("share_id", sa.String(36), nullable=False),
    sa.Column("tag", sa.String(255), nullable=False),
    sa.Column("export", sa.String(1024), nullable=False),
    sa.Column("proto", sa.String(16), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("who", sa.String(255), nullable=False),
    sa.Column("busy", sa.String(16), nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.UniqueConstraint("server", "share_id"),
    sa.UniqueConstraint("server", "tag"),
    sa.Index("server_shares_of_share", "share_id"),
)
SELECT = sa.select(*(T.c[f] for f in Sharing.__struct_fields__))
OF_SERVER = ready(SELECT.where(T.c.server == sa.bindparam("the_server")).order_by(T.c.at, T.c.uuid))


def of(tx: Tx, server: str) -> list[Sharing]:
    """The oldest first."""
    return [Sharing(*r) for r in tx.execute(OF_SERVER, {"the_server": server})]


def all(tx: Tx) -> list[Sharing]:
    return [Sharing(*r) for r in tx.execute(SELECT)]


def find(tx: Tx, uuid: str) -> Sharing | None:
    row = tx.execute(SELECT.where(T.c.uuid == uuid)).first()
    return None if row is None else Sharing(*row)


def add(tx: Tx, s: Sharing) -> None:
    """Raises Conflict where the server has that share, or another of that tag."""
    other(s.server, of(tx, s.server), s.share_id, s.tag)
    try:
        tx.execute(sa.insert(T), msgspec.structs.asdict(s))
    except sa.exc.IntegrityError as e:
        raise Conflict(f"Share '{s.share_id}' is already associated with instance {s.server}.", why=str(e)) from None


def other(server: str, known: Iterable[Sharing], share_id: str, tag: str) -> None:
    """Is this another than those that it has? Raises Conflict."""
    for s in known:
        if s.share_id == share_id:
            raise Conflict(f"Share '{share_id}' is already associated with instance {server}.")
        if s.tag == tag:
            raise Conflict(f"Share tag '{tag}' is already in use by another share of instance {server}.")


def change(tx: Tx, uuid: str, over: Iterable[str] | None = None, **values: Any) -> bool:
    """UPDATE server_shares SET … WHERE uuid = :uuid AND busy IN (:over)"""
    where = [T.c.uuid == uuid] + ([] if over is None else [T.c.busy.in_(list(over))])
    return claim(tx, sa.update(T).where(*where).values(values))


def leave(tx: Tx, uuid: str) -> str | None:
    """It is to be detached. What it was, as it is taken: what was read before may be old. None: somebody is at it."""
    return next((was for was in ("", "error") if change(tx, uuid, [was], busy="detaching")), None)


def remove(tx: Tx, uuid: str) -> None:
    tx.execute(sa.delete(T).where(T.c.uuid == uuid))


def rules(tx: Tx, share_id: str, besides: str = "") -> set[tuple[str, str]]:
    """(kind, who) of those that must reach it: of all servers that have it, or are to have it, but for one."""
    query = sa.select(T.c.kind, T.c.who).where(T.c.share_id == share_id, T.c.uuid != besides, T.c.who != "")
    return {(kind, who) for kind, who in tx.execute(query)}


def lost(tx: Tx, server: str, has: set[str]) -> None:
    """Those that its machine does not have any longer, and that neither come nor go: nobody need reach them."""
    for s in of(tx, server):
        if not s.busy and s.share_id not in has:
            change(tx, s.uuid, [""], busy="error", kind="", who="")


def unshared(tx: Tx, server: Server, verb: Verb, refusal: type[Trouble] = Conflict) -> None:
    """Raises Conflict (or what is said) where it has shares: this is not done to servers that have."""
    if of(tx, server.id):
        raise refusal(
            f"Feature not supported with instances that have shares: '{verb.op}' instance {server.id} is refused."
        )
