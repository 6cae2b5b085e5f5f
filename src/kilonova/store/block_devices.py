"""A server's block devices, one at a time. They lie in its row: a list of servers needs no further query for them.

They change as a whole, so the row is held meanwhile.

A volume is reserved, or made, before the transaction that says what for: only then can it be refused to who asks.  So
it is promised back first.  A promise ends in the transaction that writes the device (`keep`), or it is kept: whoever
takes it, the request that came to nothing or a conductor when it is overdue, gives the volume back.
"""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import NotFound, Unavailable
from kilonova.kit.ready import ready
from kilonova.model.devices import Device
from kilonova.model.server import Server
from kilonova.store import servers


def add(tx: Tx, id: str, device: Device, now: float) -> None:
    """One more device of the server `id`; twice is once. Raises NotFound: there is no such server any more."""

    def added(devices: list[Device]) -> list[Device]:
        return [d for d in devices if d.uuid != device.uuid] + [device]

    _change(tx, id, added, now)


def change(tx: Tx, id: str, uuid: str, now: float, **facts: Any) -> Server:
    """Other facts of one device. Nothing, if it is gone; raises NotFound when the server is."""

    def changed(devices: list[Device]) -> list[Device]:
        return [msgspec.structs.replace(d, **facts) if d.uuid == uuid else d for d in devices]

    return _change(tx, id, changed, now)


def remove(tx: Tx, id: str, uuid: str, now: float) -> None:
    """The server has this device no longer. Nothing, if it had it not, or is gone itself."""
    try:
        _change(tx, id, lambda devices: [d for d in devices if d.uuid != uuid], now)
    except NotFound:
        pass


def of_volume(server: Server, volume_id: str) -> Device | None:
    """The device that is this volume."""
    return next((d for d in server.devices if d.is_volume and d.volume_id == volume_id), None)


def _change(tx: Tx, id: str, to: Callable[[list[Device]], list[Device]], now: float) -> Server:
    """SELECT … FOR UPDATE; UPDATE servers SET devices = …"""
    server = servers.held(tx, id)
    devices = to(server.devices)
    if devices != server.devices:
        servers.change(tx, id, now, devices=devices)
    return msgspec.structs.replace(server, devices=devices)


# ---- promises

PROMISES = sa.Table(
    "volume_promises",
    meta,
    sa.Column("device", sa.String(36), primary_key=True),  # the uuid of the device it is for
    sa.Column("server", sa.String(36), nullable=False),
    sa.Column("volume", sa.String(36)),  # NULL: it is made for this device, and bears its uuid
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("taken", sa.Boolean, nullable=False),  # somebody is giving it back
)
_p = PROMISES.c


class Promise(msgspec.Struct, frozen=True):
    """Give this back: the attachments of `volume` to `server`, or the volumes that were made for `device`."""

    device: str
    server: str
    volume: str | None


def promise(tx: Tx, promises: Iterable[Promise], now: float) -> None:
    """Before anything is asked of the volume service."""
    rows = [{"device": p.device, "server": p.server, "volume": p.volume, "at": now, "taken": False} for p in promises]
    tx.execute(sa.insert(PROMISES), rows)


def keep(tx: Tx, devices: Iterable[str]) -> None:
    """Their devices are written now. Raises Unavailable where one was taken back meanwhile.

    DELETE FROM volume_promises WHERE device IN (…) AND NOT taken
    """
    wanted = set(devices)
    if wanted and tx.execute(sa.delete(PROMISES).where(_p.device.in_(wanted), ~_p.taken)).rowcount != len(wanted):
        raise Unavailable("The request took too long. Try again.", why="its volumes were given back")


def take(tx: Tx, device: str) -> bool:
    """From now on it cannot be kept any more. False: it was, or nobody knows of it."""
    tx.execute(sa.update(PROMISES).where(_p.device == device, ~_p.taken).values(taken=True))
    return tx.execute(sa.select(_p.device).where(_p.device == device)).first() is not None


def overdue(tx: Tx, before: float) -> list[Promise]:
    """Made before that moment, and neither kept nor fulfilled; or somebody died while he gave it back."""
    return [Promise(*r) for r in tx.execute(OVERDUE, {"before": before})]


def promised(tx: Tx, devices: Iterable[str] | None = None) -> list[Promise]:
    """All that are open, or those of them for these devices."""
    return [Promise(*r) for r in tx.execute(OPEN if devices is None else OPEN.where(_p.device.in_(list(devices))))]


def superseded(tx: Tx, p: Promise, after: float) -> bool:
    """Has another request brought the same volume to the same server? Its attachments are not this promise's any longer.

    Raises Unavailable while another is under way, promised since `after`: it may or may not come to have it.
    """
    rivals = OPEN.where(_p.server == p.server, _p.volume == p.volume, _p.device != p.device, _p.at >= after, ~_p.taken)
    if tx.execute(rivals.limit(1)).first() is not None:
        raise Unavailable(f"Volume {p.volume} is being attached.")
    known = servers.find(tx, [p.server]).get(p.server)
    device = of_volume(known, p.volume or "") if known is not None and known.deleted_at is None else None
    return device is not None and device.uuid != p.device


def fulfilled(tx: Tx, device: str) -> None:
    """It was given back."""
    tx.execute(sa.delete(PROMISES).where(_p.device == device))


OPEN = sa.select(_p.device, _p.server, _p.volume)
OVERDUE = ready(OPEN.where((_p.at < sa.bindparam("before")) | _p.taken).limit(100))
