"""A server's volumes: shown, attached, detached, changed, swapped.

To attach is answered when the volume is reserved and its name in the guest is known; the rest is a run.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, field

from kilonova.api.bodies import Boolish, Tag, Uuid, dashed, truth
from kilonova.api.devices import free, same_zone
from kilonova.api.registry import R, World, cause, the_server, unlocked
from kilonova.api.reserved import reserved
from kilonova.clients import VolumeInfo
from kilonova.contracts.compute import AttachVolume, DetachVolume, SwapVolume
from kilonova.contracts.jobs import AttachVolume as AttachJob
from kilonova.contracts.jobs import DetachVolume as DetachJob
from kilonova.contracts.jobs import SwapVolume as SwapJob
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Forbidden, Invalid, NotFound, Unsupported
from kilonova.kit.routes import Call, Reply
from kilonova.kit.versions import UNSET, UnsetType, since, until
from kilonova.kit.workflow import start
from kilonova.model import disks
from kilonova.model.devices import Device
from kilonova.model.server import Server
from kilonova.model.states import VERBS, VM
from kilonova.store import block_devices, servers

PATH = "/v2.1/servers/{server_id}/os-volume_attachments"
RULES = "os_compute_api:os-volumes-attachments"
SHELVED = VM.shelved, VM.shelved_offloaded
DeviceName = Annotated[str, Meta(pattern=r"(^/dev/x{0,1}[a-z]{0,1}d{0,1})([a-z]+)[0-9]*$")]


class Shown(msgspec.Struct):
    id: Annotated[str, until("2.88")]
    device: str | None
    server_id: str = field(name="serverId")
    volume_id: str = field(name="volumeId")
    tag: Annotated[str | None, since("2.70")] = None
    delete_on_termination: Annotated[bool, since("2.79")] = False
    attachment_id: Annotated[str | None, since("2.89")] = None
    bdm_uuid: Annotated[str, since("2.89")] = ""


class One(msgspec.Struct):
    attachment: Shown = field(name="volumeAttachment")


class Many(msgspec.Struct):
    attachments: list[Shown] = field(name="volumeAttachments")


class Query(msgspec.Struct):
    limit: list[str] = []
    offset: list[str] = []


@R.get(PATH, query=Query, strict="2.75", policy=f"{RULES}:index", late=True)
def index(call: Call, server_id: str) -> Many:
    with call.world.db.read() as tx:
        server = the_server(call, tx, server_id)
    most: int = call.world.config.api.max_limit
    offset, limit = _number(call, "offset") or 0, _number(call, "limit")
    found = _volumes(call, server)[offset:][: min(most, limit or most)]
    return Many([_shown(server, d) for d in found])


@R.get(PATH + "/{id}", strict="2.1000000", policy=f"{RULES}:show", late=True)
def show(call: Call, server_id: str, id: str) -> One:
    with call.world.db.read() as tx:
        server = the_server(call, tx, server_id)
    found = next((d for d in _volumes(call, server) if d.volume_id == dashed(id)), None)
    if found is None:
        raise NotFound(f"Instance {server_id} is not attached to volume {id}.")
    return One(_shown(server, found))


def _volumes(call: Call, server: Server) -> list[Device]:
    """Those that there are; since 2.89 those that are attached."""
    return [d for d in server.devices if d.is_volume and d.volume_id and (d.attachment_id or call.version < 89)]


def _shown(server: Server, d: Device) -> Shown:
    return Shown(
        id=d.volume_id or "",
        device=d.name,
        server_id=server.id,
        volume_id=d.volume_id or "",
        tag=d.tag,
        delete_on_termination=d.delete_on_termination,
        attachment_id=d.attachment_id,
        bdm_uuid=d.uuid,
    )


def _number(call: Call, name: str) -> int | None:
    said = getattr(call.query, name)
    if not said:
        return None
    if not said[-1].isdecimal() or len(said[-1]) > 18:
        raise Invalid(f"Invalid input for query parameters {name}. Value: {said[-1][:60]}. It is no number from 0 on.")
    return int(said[-1])


# ---- attach


class Wish(msgspec.Struct, forbid_unknown_fields=True):
    volume_id: Uuid = field(name="volumeId")
    device: DeviceName | None = None
    tag: Annotated[Tag | UnsetType, since("2.49")] = UNSET
    delete_on_termination: Annotated[Boolish, since("2.79")] = False


class Body(msgspec.Struct, forbid_unknown_fields=True):
    attachment: Wish = field(name="volumeAttachment")


class Made(msgspec.Struct):
    """What is said of a new one: less, and longer, than of those that are there."""

    id: Annotated[str, until("2.100")]
    device: str | None
    server_id: str = field(name="serverId")
    volume_id: str = field(name="volumeId")
    tag: Annotated[str | None, since("2.70")] = None
    delete_on_termination: Annotated[bool, since("2.79")] = False


class MadeBody(msgspec.Struct):
    attachment: Made = field(name="volumeAttachment")


@R.post(PATH, body=Body, ok=lambda v: 202 if v >= 101 else 200, policy=f"{RULES}:create", late=True)
def create(call: Call, server_id: str) -> MadeBody | Reply:
    world: World = call.world
    wish: Wish = call.body.attachment
    with world.db.read() as tx:
        server = the_server(call, tx, server_id)
    unlocked(call, server)
    _fit(call, server, "attach_volume")
    reachable(world, server, AttachVolume.__name__)
    device = _wanted(call, server, wish)
    with reserved(call, {server.id: [device]}) as got:
        device, run = world.db.run(_begun, call, server.id, got[server.id][0], wish.device)
    world.wake(run)
    if call.version >= 101:
        return Reply(None)
    return MadeBody(
        Made(
            device.volume_id or "",
            device.name,
            server.id,
            device.volume_id or "",
            device.tag,
            device.delete_on_termination,
        )
    )


def _fit(call: Call, server: Server, verb: str) -> None:
    """Shelved servers may be touched since 2.20."""
    if server.vm_state in SHELVED and call.version < 20:
        raise Conflict(f"Cannot '{verb}' instance {server.id} while it is in vm_state {server.vm_state}")
    servers.check(server, VERBS[verb])


def reachable(world: World, server: Server, message: str) -> None:
    """Nobody should wait for a host that is not there, or does not know what is meant."""
    if server.host is None:
        return
    if world.hosts.status(server.host) in ("DOWN", "UNKNOWN"):
        raise Conflict(f"The host of instance {server.id} does not answer.")
    if not world.hosts.speaks(server.host, message):
        raise Unsupported("The requested functionality is not supported.")


def _wanted(call: Call, server: Server, wish: Wish) -> Device:
    """What is to be attached. Raises NotFound, Invalid, Forbidden, Conflict."""
    world: World = call.world
    id = dashed(wish.volume_id)
    if block_devices.of_volume(server, id) is not None:
        raise Invalid(f"Invalid volume: volume {id} already attached")
    volume = world.neighbours.volume.show(id, call.context.token)
    free(call, volume)
    if server.vm_state == VM.shelved_offloaded and wish.tag:
        raise Invalid("Attaching tagged volumes is not supported for shelved-offloaded instances.")
    if server.vm_state == VM.shelved_offloaded and volume.multiattach:
        raise Invalid("Attaching multiattach volumes is not supported for shelved-offloaded instances.")
    same_zone(call, volume, world.hosts.zone(server.host) if server.host else server.availability_zone)
    most = world.config.compute.disks_max
    if 0 <= most <= len(disks.names(server)):
        raise Forbidden(
            f"The maximum allowed number of disk devices ({most}) to attach to a single instance has been exceeded."
        )
    return Device(
        world.ids.uuid(),
        volume_id=id,
        size=volume.size_gb,
        tag=wish.tag or None,
        delete_on_termination=truth(wish.delete_on_termination),
        multiattach=volume.multiattach,
    )


def _begun(tx: Tx, call: Call, id: str, device: Device, name: str | None) -> tuple[Device, str]:
    """The device is written, and its run is started."""
    world: World = call.world
    now = world.clock.now()
    unlocked(call, the_server(call, tx, id))
    block_devices.keep(tx, [device.uuid])
    server = servers.begin(tx, id, VERBS["attach_volume"], now)
    if block_devices.of_volume(server, device.volume_id or "") is not None:
        raise Invalid(f"Invalid volume: volume {device.volume_id} already attached")
    device = msgspec.structs.replace(device, name=_name(server, device, name))
    why = cause(call, "attach_volume")
    device = msgspec.structs.replace(device, busy="attaching")
    block_devices.add(tx, id, device, now)
    job = AttachJob(server, device)
    return device, start(tx, "attach_volume", job, id=world.ids.uuid(), subject=id, now=now, cause=why)


def _name(server: Server, device: Device, said: str | None) -> str:
    """As it was asked for, with the prefix of its bus; else the next that is free. Raises Conflict."""
    bus = disks.bus_of(server, device)
    if said is None or not disks.letters_of(said):
        return disks.next_name(server, bus)
    if disks.has_name(server, said):
        raise Conflict(f"The supplied device path ({said}) is in use.")
    return f"/dev/{disks.PREFIXES[bus]}{disks.letters_of(said)}"


# ---- change, swap


class Change(msgspec.Struct, forbid_unknown_fields=True):
    volume_id: Uuid = field(name="volumeId")
    device: Annotated[DeviceName | None | UnsetType, since("2.85")] = UNSET
    tag: Annotated[Tag | UnsetType, since("2.85")] = UNSET
    delete_on_termination: Annotated[Boolish | UnsetType, since("2.85")] = UNSET
    server_id: Annotated[Uuid | UnsetType, since("2.85")] = field(default=UNSET, name="serverId")
    id: Annotated[Uuid | UnsetType, since("2.85")] = UNSET


class ChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    attachment: Change = field(name="volumeAttachment")


@R.put(PATH + "/{id}", body=ChangeBody, ok=202, policy=f"{RULES}:update", late=True)
def update(call: Call, server_id: str, id: str) -> None:
    """The same volume since 2.85: a change. Any other: its place is taken by another volume, for the volume service."""
    wish: Change = call.body.attachment
    if call.version < 85 or dashed(wish.volume_id) != dashed(id):
        _swap(call, server_id, dashed(id), wish)
    else:
        call.world.db.run(_changed, call, server_id, dashed(id), wish)


def _changed(tx: Tx, call: Call, server_id: str, volume_id: str, wish: Change) -> None:
    device = _device(the_server(call, tx, server_id), volume_id)
    same: list[tuple[str, Any, Any]] = [
        ("id", wish.id, volume_id),
        ("serverId", wish.server_id, server_id),
        ("device", wish.device, device.name),
        ("tag", wish.tag, device.tag),
    ]
    for name, said, known in same:
        known_as = dashed(said) if name in ("id", "serverId") and isinstance(said, str) else said
        if said is not UNSET and known_as != known:
            raise Invalid(f"The {name} of a volume attachment cannot be changed.")
    if wish.delete_on_termination is not UNSET:
        now, doomed = call.world.clock.now(), truth(wish.delete_on_termination)
        block_devices.change(tx, server_id, device.uuid, now, delete_on_termination=doomed)


def _swap(call: Call, server_id: str, old_id: str, wish: Change) -> None:
    world: World = call.world
    with world.db.read() as tx:
        server = the_server(call, tx, server_id, rule=f"{RULES}:swap")
    device = _device(server, old_id)
    unlocked(call, server)
    servers.check(server, VERBS["swap_volume"])
    reachable(world, server, SwapVolume.__name__)
    old = world.neighbours.volume.show(old_id)
    try:
        new = world.neighbours.volume.show(dashed(wish.volume_id), call.context.token)
    except NotFound as e:
        raise Invalid(e.said) from None
    _check_swap(call, server, device, old, new)

    def record(tx: Tx) -> str:
        now = world.clock.now()
        unlocked(call, the_server(call, tx, server_id, rule=f"{RULES}:swap"))
        server = servers.begin(tx, server_id, VERBS["swap_volume"], now)
        device = _idle(_device(server, old_id))
        block_devices.change(tx, server_id, device.uuid, now, busy="swapping")
        job = SwapJob(server, device, new.id, new.size_gb, migrating=bool(old.migration))
        why = cause(call, "swap_volume")
        return start(tx, "swap_volume", job, id=world.ids.uuid(), subject=server_id, now=now, cause=why)

    world.wake(world.db.run(record))


def _check_swap(call: Call, server: Server, device: Device, old: VolumeInfo, new: VolumeInfo) -> None:
    if not old.migration:
        raise Conflict(f"Volume {old.id} is not being migrated: its place on a server cannot be taken by another.")
    if old.attachment_of(server.id) is None:
        raise Invalid("Invalid volume: Old volume is attached to a different instance.")
    if new.attachments or new.status not in ("available", "reserved"):
        raise Invalid("Invalid volume: New volume must be detached in order to swap.")
    if new.size_gb < old.size_gb:
        raise Invalid("Invalid volume: New volume must be the same size or larger.")
    if device.multiattach and len(old.attachments) > 1:
        raise Invalid("Swapping multi-attach volumes with more than one read/write attachment is not supported.")
    same_zone(call, new, call.world.hosts.zone(server.host) if server.host else None)


def _device(server: Server, volume_id: str) -> Device:
    found = block_devices.of_volume(server, volume_id)
    if found is None:
        raise NotFound(f"No volume Block Device Mapping with id {volume_id[:80]}.")
    return found


def _idle(d: Device) -> Device:
    """Raises Invalid where somebody is at it, or where it never came to be."""
    if d.busy or d.attachment_id is None:
        raise Invalid(
            f"Invalid volume: Unable to detach volume {d.volume_id}. Volume status must be 'in-use' and attach_status "
            "must be 'attached' to detach."
        )
    return d


# ---- detach


@R.delete(PATH + "/{id}", ok=202, policy=f"{RULES}:delete", late=True)
def delete(call: Call, server_id: str, id: str) -> None:
    world: World = call.world

    def record(tx: Tx) -> str:
        now = world.clock.now()
        server = the_server(call, tx, server_id)
        unlocked(call, server)
        device = _device(server, dashed(id))
        _fit(call, server, "detach_volume")
        if device.role == "root":
            raise Invalid("Cannot detach a root device volume")
        reachable(world, server, DetachVolume.__name__)
        server = servers.begin(tx, server_id, VERBS["detach_volume"], now)
        device = _idle(_device(server, dashed(id)))
        block_devices.change(tx, server_id, device.uuid, now, busy="detaching")
        why = cause(call, "detach_volume")
        job = DetachJob(server, device)
        return start(tx, "detach_volume", job, id=world.ids.uuid(), subject=server_id, now=now, cause=why)

    world.wake(world.db.run(record))
