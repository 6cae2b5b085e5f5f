"""Volumes come and go: connected to the server's host, plugged in, in use; and the way back. Or one takes another's place.

Alone with the server: who moves it or rebuilds it plans its disks from what is written, and must not miss one.
A guest on a host that is gone may still write: its volume is not given to others before the host is heard of again, or
the server is deleted.
"""

from typing import Any

import msgspec

from kilonova.conductor import volumes
from kilonova.conductor.world import World
from kilonova.contracts.compute import AttachVolume, DetachVolume, Done, ExtendVolume, SwapVolume
from kilonova.contracts.jobs import AttachVolume as AttachJob
from kilonova.contracts.jobs import DetachVolume as DetachJob
from kilonova.contracts.jobs import ExtendVolume as ExtendJob
from kilonova.contracts.jobs import SwapVolume as SwapJob
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, NotFound, Unavailable
from kilonova.kit.workflow import FOREVER, Run, command, effect, record, workflow
from kilonova.model import disks
from kilonova.model.devices import Device
from kilonova.model.machine import Disk
from kilonova.model.server import Server
from kilonova.model.states import VERBS, Verb
from kilonova.store import block_devices, servers


class Way(msgspec.Struct, frozen=True):
    """An attachment, and how the host reaches its volume."""

    attachment_id: str
    connection: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Way({self.attachment_id})"  # how may hold passwords


# ---- attach


@workflow
def attach_volume(run: Run, job: AttachJob) -> None:
    run.if_undone(unattached, job.server.id, job.device.uuid, run.now)
    run(reserved, job.server.id, job.device)
    run.when_alone()
    found = run(place, job.server.id, job.device.uuid, "attach_volume")
    host, device = found.host, job.device
    if found.attachment:
        device = msgspec.structs.replace(device, attachment_id=found.attachment)
    if host is not None:
        way = run(connect, job.server.id, device, host)
        run(plug_in, job.server, host, job.device, way.connection)
        run(volumes.complete, [way.attachment_id])
    else:
        run(volumes.complete, [device.attachment_id or ""])  # no host has it, and it is taken all the same
    run(attached, job.server.id, job.device.uuid, run.now)


@effect
def reserved(world: World, key: str, server: str, device: Device) -> None:
    """It is, by the request; this is where that is undone."""


@reserved.undo
def _(world: World, key: str, server: str, device: Device) -> None:
    for a in world.neighbours.volume.attachments(server_id=server, volume_id=device.volume_id):
        world.neighbours.volume.release(a.id)


class Place(msgspec.Struct, frozen=True):
    """`attachment`: the device's, which may be another than when it was asked for: it has been elsewhere meanwhile."""

    host: str | None
    attachment: str = ""


@record
def place(tx: Tx, id: str, device: str, verb: str) -> Place:
    """Where it is, now that nobody moves it. Raises Conflict where that cannot be done any longer."""
    server = _still(tx, id, VERBS[verb])
    mine = next((d for d in server.devices if d.uuid == device), None)
    if mine is None:
        raise NotFound(f"Instance {id} does not have that volume any longer.")
    return Place(server.host, mine.attachment_id or "")


@effect
def connect(world: World, key: str, server: str, device: Device, host: str) -> Way:
    """The attachment that was reserved leads to this host from now on."""
    return _connected(world, device.attachment_id or "", device, host)


def _connected(world: World, attachment: str, device: Device, host: str) -> Way:
    told = volumes.connector(world, host) | ({"mountpoint": device.name} if device.name else {})
    a = world.neighbours.volume.connect(attachment, told)
    return Way(a.id, volumes.info_of(a, device))


@command(patience_s=600, event="compute_attach_volume")
def plug_in(server: Server, host: str, device: Device, connection: dict[str, Any]) -> To[Done]:
    return To(host, AttachVolume(server=server.id, disk=_disk(server, device, connection)))


@plug_in.undo
def _(server: Server, host: str, device: Device, connection: dict[str, Any]) -> To[Done]:
    return To(host, DetachVolume(server=server.id, volume_id=device.volume_id or "", timeout_s=0, anyway=True))


@record
def attached(tx: Tx, id: str, device: str, now: float) -> None:
    block_devices.change(tx, id, device, now, busy="")


@record
def unattached(tx: Tx, id: str, device: str, now: float) -> None:
    block_devices.remove(tx, id, device, now)


def _disk(server: Server, device: Device, connection: dict[str, Any]) -> Disk:
    return disks.disk(server, device, connections={device.volume_id or "": connection})


# ---- detach


@workflow
def detach_volume(run: Run, job: DetachJob) -> None:
    id, device = job.server.id, job.device
    run.if_undone(kept, id, device.uuid, run.now)
    run(leaving, device.volume_id or "")
    run.when_alone()
    found = run(place, id, device.uuid, "detach_volume")
    if found.host is not None:
        run(unplug, id, found.host, device.volume_id or "")
    run.no_return()
    attachment = found.attachment or device.attachment_id or ""
    run(let_go if found.host is not None else let_go_offloaded, attachment)
    run(detached, id, device.uuid, run.now)


@effect
def leaving(world: World, key: str, volume: str) -> None:
    """Its service knows that it is being detached, so that nobody else begins."""
    if world.neighbours.volume.show(volume).status != "detaching":
        world.neighbours.volume.begin_detaching(volume)


@leaving.undo
def _(world: World, key: str, volume: str) -> None:
    try:
        if world.neighbours.volume.show(volume).status == "detaching":
            world.neighbours.volume.roll_detaching(volume)
    except NotFound:
        pass


@command(patience_s=900, event="compute_detach_volume")
def unplug(id: str, host: str, volume: str) -> To[Done]:
    return To(host, DetachVolume(server=id, volume_id=volume))


@effect(patience_s=FOREVER)
def let_go(world: World, key: str, attachment: str) -> None:
    world.neighbours.volume.release(attachment)


@effect(patience_s=FOREVER, event="api_detach_volume")
def let_go_offloaded(world: World, key: str, attachment: str) -> None:
    """There is no host to be asked."""
    world.neighbours.volume.release(attachment)


@record
def detached(tx: Tx, id: str, device: str, now: float) -> None:
    block_devices.remove(tx, id, device, now)


@record
def kept(tx: Tx, id: str, device: str, now: float) -> None:
    """It is as it was; the server may be gone."""
    try:
        block_devices.change(tx, id, device, now, busy="")
    except NotFound:
        pass


# ---- larger


@workflow
def extend_volume(run: Run, job: ExtendJob) -> None:
    """The volume service has made it larger already; there is no way back."""
    id, device = job.server.id, job.device
    run.when_alone()
    host = run(place, id, device.uuid, "detach_volume").host
    size_gb = run(sized, device.volume_id or "")
    if host is not None:
        run(grow, id, host, device.volume_id or "", size_gb)
    run(extended, id, device.uuid, size_gb, run.now)


@effect
def sized(world: World, key: str, volume: str) -> int:
    return world.neighbours.volume.show(volume).size_gb


@command(patience_s=300, event="compute_extend_volume")
def grow(id: str, host: str, volume: str, size_gb: int) -> To[Done]:
    return To(host, ExtendVolume(server=id, volume_id=volume, size_bytes=size_gb * disks.GIB))


@record
def extended(tx: Tx, id: str, device: str, size_gb: int, now: float) -> None:
    block_devices.change(tx, id, device, now, size=size_gb)


# ---- swap


@workflow
def swap_volume(run: Run, job: SwapJob) -> None:
    """The guest goes on while its bytes are copied; then the new one is the old one, to it and to the volume service."""
    id, old = job.server.id, job.device
    new = msgspec.structs.replace(old, volume_id=job.new_volume_id, size=job.size_gb)
    run.if_undone(kept, id, old.uuid, run.now)
    if job.migrating:
        run(migrating, old.volume_id or "", job.new_volume_id)
    run.when_alone()
    found = run(place, id, old.uuid, "swap_volume")
    host = found.host
    assert host is not None, "who is active has a host"
    way = run(take_up, id, new, host)
    run(exchange, job.server, host, old, new, way.connection)
    run.no_return()
    run(volumes.complete, [way.attachment_id])
    saved = run(migrated, old.volume_id or "", job.new_volume_id) if job.migrating else job.new_volume_id
    run(let_go, found.attachment or old.attachment_id or "")
    run(swapped, id, old.uuid, saved, way.attachment_id, job.size_gb, run.now)


@effect
def migrating(world: World, key: str, old: str, new: str) -> None:
    """The volume service waits for us; this is where it is told that nothing came of it."""


@migrating.undo
def _(world: World, key: str, old: str, new: str) -> None:
    try:
        world.neighbours.volume.complete_migration(old, new, failed=True)
    except NotFound:
        pass


@effect
def take_up(world: World, key: str, server: str, new: Device, host: str) -> Way:
    """Raises Conflict where the server has that volume by now, Unavailable while a request may be bringing it."""
    if _of_others(world, server, new):
        raise Conflict(f"Volume {new.volume_id} is attached to instance {server} already.")
    there = world.neighbours.volume.attachments(server_id=server, volume_id=new.volume_id)
    return _connected(world, volumes.reserved(world, server, new.volume_id or "", there).id, new, host)


@take_up.undo
def _(world: World, key: str, server: str, new: Device, host: str) -> None:
    others = _of_others(world, server, new)
    for a in world.neighbours.volume.attachments(server_id=server, volume_id=new.volume_id):
        if a.id not in others:
            world.neighbours.volume.release(a.id)


def _of_others(world: World, server: str, new: Device) -> set[str]:
    """Attachments of this very volume that are other devices' of the server. Raises Unavailable while one is promised."""
    with world.db.read() as tx:
        if any((p.server, p.volume) == (server, new.volume_id) for p in block_devices.promised(tx)):
            raise Unavailable(f"Volume {new.volume_id} is being attached.")
        known = servers.find(tx, [server]).get(server)
    devices = known.devices if known is not None else []
    return {d.attachment_id or "" for d in devices if d.volume_id == new.volume_id and d.uuid != new.uuid}


@command(patience_s=6 * 3600, event="compute_swap_volume")
def exchange(server: Server, host: str, old: Device, new: Device, connection: dict[str, Any]) -> To[Done]:
    disk = _disk(server, new, connection)
    return To(host, SwapVolume(server=server.id, volume_id=old.volume_id or "", disk=disk))


@effect(patience_s=FOREVER)
def migrated(world: World, key: str, old: str, new: str) -> str:
    """Which of the two ids goes on."""
    return world.neighbours.volume.complete_migration(old, new)


@record
def swapped(tx: Tx, id: str, device: str, volume: str, attachment: str, size_gb: int, now: float) -> None:
    facts = {"volume_id": volume, "attachment_id": attachment, "size": size_gb, "busy": ""}
    block_devices.change(tx, id, device, now, **facts)


# ---- all


def _still(tx: Tx, id: str, verb: Verb) -> Server:
    """As it is now: while we waited to be alone another may have brought it where this cannot be done."""
    server = servers.get(tx, id)
    if server.deleted_at is not None or server.vm_state not in verb.start:
        raise servers.why_not(server, verb)
    return server
