"""What guests ask of the store: the row of their server, its zone and its shares, and one password they may leave there."""

from typing import NamedTuple

import sqlalchemy as sa

from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, NotFound
from kilonova.kit.ready import ready
from kilonova.model.server import Server
from kilonova.store import hosts, servers, shares

PASSWORD_CHUNKS, CHUNK = 4, 255  # as readers of system metadata know it: password_0 … password_3
PASSWORD_BYTES = PASSWORD_CHUNKS * CHUNK
_KEYS = [f"password_{i}" for i in range(PASSWORD_CHUNKS)]


class Guest(NamedTuple):
    """A living server, the zone of its host ("" where no aggregate says one), and the shares that its machine has."""

    server: Server
    zone: str
    shares: list[tuple[str, str]]  # (its id, its tag)


def guest(tx: Tx, id: str) -> Guest:
    """Raises NotFound.

    SELECT servers.*, m.value, s.share_id, s.tag FROM servers
      LEFT JOIN (aggregate_hosts h JOIN aggregate_metadata m ON m.aggregate = h.aggregate AND m.key = 'availability_zone')
             ON h.host = servers.host
      LEFT JOIN server_shares s ON s.server = servers.id AND s.busy = ''
     WHERE servers.id = :id
    """
    rows = tx.execute(GUEST, {"the_id": id}).all()
    if not rows:
        raise NotFound(f"Instance {id} could not be found.")
    *values, zone, _, _ = rows[0]
    lent = dict.fromkeys((share_id, tag) for *_, share_id, tag in rows if share_id is not None)
    return Guest(_living(servers.of(values), id), zone or "", list(lent))


def password(server: Server) -> str:
    """What its guest left there, encrypted with the server's key; "" where nothing."""
    return "".join(server.system_metadata.get(k, "") for k in _KEYS)


def keep_password(tx: Tx, id: str, text: str) -> None:
    """Once: raises Conflict where there is one already. NotFound. `text` is as long as PASSWORD_BYTES at most."""
    server = _living(servers.held(tx, id), id)
    if password(server):
        raise Conflict("The password of this server has been set already.")
    chunks = {k: text[i * CHUNK : (i + 1) * CHUNK] for i, k in enumerate(_KEYS)}
    servers.change(tx, id, None, system_metadata=server.system_metadata | chunks)


def clear_password(tx: Tx, id: str) -> None:
    """So that a guest may leave another. Raises NotFound."""
    server = _living(servers.held(tx, id), id)
    kept = {k: v for k, v in server.system_metadata.items() if k not in _KEYS}
    servers.change(tx, id, None, system_metadata=kept)


def _living(server: Server, id: str) -> Server:
    if server.deleted_at is not None:
        raise NotFound(f"Instance {id} could not be found.")
    return server


_zone = (
    sa.select(hosts.AGGREGATE_HOSTS.c.host, hosts.AGGREGATE_METADATA.c.value.label("zone"))
    .join(hosts.AGGREGATE_METADATA, hosts.AGGREGATE_METADATA.c.aggregate == hosts.AGGREGATE_HOSTS.c.aggregate)
    .where(hosts.AGGREGATE_METADATA.c.key == hosts.ZONE)
    .subquery()
)
GUEST = ready(
    servers.GET.add_columns(_zone.c.zone, shares.T.c.share_id, shares.T.c.tag)
    .outerjoin_from(servers.T, _zone, _zone.c.host == servers.T.c.host)
    .outerjoin(shares.T, (shares.T.c.server == servers.T.c.id) & (shares.T.c.busy == ""))
    .order_by(shares.T.c.at, shares.T.c.uuid)
)
