"""A server's block devices, one at a time. They lie in its row: a list of servers needs no further query for them.

They change as a whole, so the row is held meanwhile.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from kilonova.kit.db import Tx
from kilonova.kit.errors import NotFound
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
