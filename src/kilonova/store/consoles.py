"""Who may look at a console. Only a token's hash is kept; it is good for one server, where it was then, for a while.

Nothing takes a token back: it says for which stay of the server (`epoch`) it was given, and is asked together with
the server's row.  So it ends with the server, and with its move to another host.
"""

import hashlib

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import NotFound
from kilonova.model.console import Where
from kilonova.model.server import Server
from kilonova.store import servers

T = sa.Table(
    "console_tokens",
    meta,
    sa.Column("hash", sa.String(64), primary_key=True),
    sa.Column("server", sa.String(36), nullable=False),
    sa.Column("type", sa.String(16), nullable=False),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("at", sa.Text, nullable=False),  # a Where
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.Index("console_tokens_expire", "expires_at"),
)


class Grant(msgspec.Struct, frozen=True):
    """What a token is good for."""

    server: str
    type: str
    host: str
    at: Where


def grant(tx: Tx, token: str, server: Server, type: str, at: Where, *, now: float, lasts_s: float) -> None:
    """Those that are over are forgotten on the way, so the table stays as small as its use."""
    tx.execute(sa.delete(T).where(T.c.expires_at < now))
    row = {"hash": _hash(token), "server": server.id, "type": type, "host": server.host, "epoch": server.epoch}
    tx.execute(sa.insert(T), row | {"at": msgspec.json.encode(at).decode(), "expires_at": now + lasts_s})


def granted(tx: Tx, token: str, now: float) -> Grant:
    """Raises NotFound: there is no such token, it is over, or its server has gone from there."""
    s = servers.T.c
    here = sa.and_(s.id == T.c.server, s.host == T.c.host, s.epoch == T.c.epoch, s.deleted_at.is_(None))
    query = sa.select(T).join(servers.T, here).where(T.c.hash == _hash(token), T.c.expires_at >= now)
    found = tx.execute(query).first()
    if found is None:
        raise NotFound("Token not found")
    return Grant(found.server, found.type, found.host, msgspec.json.decode(found.at, type=Where))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
