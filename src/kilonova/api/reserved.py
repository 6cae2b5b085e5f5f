"""Volumes are reserved for a server, or made for it, in the name of who asks, before it is written that it has them.

Whatever becomes of the request, nothing is left: each is promised back first (`store/block_devices.py`).
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import msgspec

from kilonova.api.registry import World
from kilonova.clients.volume import MADE_FOR, given_back
from kilonova.kit.errors import Conflict, Invalid, Trouble
from kilonova.kit.routes import Call
from kilonova.model.devices import Device
from kilonova.store import block_devices
from kilonova.store.block_devices import Promise

log = logging.getLogger(__name__)
LONG_S = 120.0  # no request takes so long


@contextmanager
def reserved(call: Call, wanted: Mapping[str, list[Device]]) -> Iterator[dict[str, list[Device]]]:
    """Devices by server, with what their volumes are now known by. `block_devices.keep` them in here, or lose them.

    Raises Invalid (a volume is not free), OverQuota, NotFound.
    """
    world: World = call.world
    volumes = [(server, d) for server, devices in wanted.items() for d in devices if d.is_volume]
    if not volumes:
        yield dict(wanted)
        return
    promises = [Promise(d.uuid, s, d.volume_id if d.source == "volume" else None) for s, d in volumes]
    world.db.run(block_devices.promise, promises, world.clock.now())
    try:
        yield {s: [_held(call, s, d) if d.is_volume else d for d in devices] for s, devices in wanted.items()}
    except Exception:
        for p in promises:
            _give_back(world, p)
        raise
    if len(wanted) > 1:  # there may have been no room for some of them
        with world.db.read() as tx:
            left = block_devices.promised(tx, [p.device for p in promises])
        for p in left:
            _give_back(world, p)


def _held(call: Call, server: str, d: Device) -> Device:
    volumes, token = call.world.neighbours.volume, call.context.token
    if d.source != "volume":
        made = volumes.create(
            d.size,
            image_id=d.image_id,
            snapshot_id=d.snapshot_id,
            volume_type=d.volume_type,
            metadata={MADE_FOR: d.uuid},
            token=token,
        )
        return msgspec.structs.replace(d, volume_id=made.id)
    try:
        attachment = volumes.reserve(d.volume_id or "", server, token=token)
    except (Invalid, Conflict) as e:
        raise Invalid(e.said if e.said.startswith("Invalid volume") else f"Invalid volume: {e.said}", why=e.why) from e
    return msgspec.structs.replace(d, attachment_id=attachment.id)


def _give_back(world: World, p: Promise) -> None:
    """At once, so that who asked can ask again; else a conductor does it in a while."""
    try:
        if world.db.run(block_devices.take, p.device):
            others = partial(world.db.look, block_devices.superseded, p, world.clock.now() - LONG_S)
            given_back(world.neighbours.volume, p.server, p.volume, p.device, others)
            world.db.run(block_devices.fulfilled, p.device)
    except Trouble as e:
        log.info("what was promised for device %s is given back later: %s (%s)", p.device, e.said, e.why)
