"""A server's volumes: told which host will use them, let go of where it will not. All is safe to do twice.

The way from a volume to a server is an attachment of the volume service; what was once told of a host does not forget
it.  So where a host turns out to be the wrong one, another attachment takes the place of the first, and is made before
the first is given back: the volume is never free for others.
"""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import msgspec

from kilonova.clients import Attachment
from kilonova.clients.volume import given_back
from kilonova.conductor.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound, Trouble, Unavailable
from kilonova.kit.reconcile import reconciler
from kilonova.kit.workflow import Run, effect, first_try
from kilonova.model.devices import Device
from kilonova.model.server import Server
from kilonova.store import block_devices, compare, hosts, servers

log = logging.getLogger(__name__)

OVERDUE_S = 120.0  # no request takes so long
RESERVED = "reserved"  # an attachment that no host was told of


class Connected(msgspec.Struct, frozen=True):
    """Its devices with the attachments that lead to a host, and how that host reaches each volume, by volume id."""

    devices: list[Device] = []
    connections: dict[str, dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"Connected({[d.volume_id for d in self.devices]})"  # how may hold passwords


# ---- all of a server, for flows that give it to a host


@effect
def ready(world: World, key: str, volume: str) -> None:
    """A volume that was made for it is there."""
    try:
        found = world.neighbours.volume.show(volume)
    except NotFound:
        raise Conflict(f"Volume {volume} could not be found.") from None
    if found.status.startswith("error"):
        raise Conflict(f"Volume {volume} did not finish being created: it is in status {found.status}.")
    if found.status in ("creating", "downloading"):
        raise Unavailable(f"Volume {volume} is still being made.")


@effect
def reserve(world: World, key: str, server: str, volume: str) -> str:
    """An attachment that leads to no host yet. Undone with the server's other ones, by `release`."""
    return reserved(world, server, volume, [] if first_try() else _attachments(world, server)).id


def connected(run: Run, server: Server, host: str) -> Connected:
    """All its volumes, to this host."""
    return run(connect, msgspec.structs.replace(server, devices=run(free, server)), host)


@effect
def free(world: World, key: str, server: Server) -> list[Device]:
    """The devices of a server on no host, each with an attachment that is there; a new one where it has none.

    Undone with the server's other ones, by `release`.
    """
    there = _attachments(world, server.id)
    own = {d.volume_id or "": a.id for d in server.devices for a in there if a.id == d.attachment_id}
    return _each_with(world, server, there, own)


def _each_with(world: World, server: Server, there: Sequence[Attachment], own: dict[str, str]) -> list[Device]:
    """Its devices, each with an attachment that leads to no host: a reserved one, or its own, or else a new one."""
    free = own | {a.volume_id: a.id for a in there if a.status == RESERVED}
    devices = []
    for d in server.devices:
        if d.is_volume:
            id = d.volume_id or ""
            mine = free[id] if id in free else world.neighbours.volume.reserve(id, server.id).id
            d = msgspec.structs.replace(d, attachment_id=mine)
        devices.append(d)
    return devices


@effect
def connect(world: World, key: str, server: Server, host: str) -> Connected:
    """Its attachments, as they were free, lead to this host."""
    return _led(world, server, host)


def _led(world: World, server: Server, host: str) -> Connected:
    """The attachments of its devices, told of this host."""
    told = connector(world, host)
    devices, connections = {}, {}
    for d in server.devices:
        if d.is_volume:
            a = world.neighbours.volume.connect(d.attachment_id or "", told | _mounted(d))
            devices[d.uuid] = msgspec.structs.replace(d, attachment_id=a.id)
            connections[d.volume_id or ""] = info_of(a, d)
    return Connected([devices.get(d.uuid, d) for d in server.devices], connections)


@connect.undo
def _(world: World, key: str, server: Server, host: str) -> None:
    """Others take their place, and no host is told of those.

    Only of these: who comes to this late, when the server has been given to another host since, finds them gone.
    """
    there = _attachments(world, server.id)
    mine = {d.attachment_id for d in server.devices}
    for a in there:
        if a.status != RESERVED and a.id in mine:
            if not any(o.volume_id == a.volume_id and o.status == RESERVED for o in there):
                world.neighbours.volume.reserve(a.volume_id, server.id)
            world.neighbours.volume.release(a.id)


@effect
def carry(world: World, key: str, server: Server, host: str) -> Connected:
    """All its volumes, to this host as well: other attachments beside those that it has."""
    old = set(attachments_of(server.devices))
    there = [a for a in _attachments(world, server.id) if a.id not in old]

    def other(d: Device) -> Device:
        return msgspec.structs.replace(d, attachment_id=reserved(world, server.id, d.volume_id or "", there).id)

    others = [other(d) if d.is_volume else d for d in server.devices]
    return _led(world, msgspec.structs.replace(server, devices=others), host)


@carry.undo
def _(world: World, key: str, server: Server, host: str) -> None:
    """But for what it has by now: who comes to this late may find that it was carried elsewhere since."""
    there = _attachments(world, server.id)
    with world.db.read() as tx:
        now = servers.get(tx, server.id)
    kept = {d.attachment_id for d in (*server.devices, *now.devices)}
    for a in there:
        if a.id not in kept:
            world.neighbours.volume.release(a.id)


@effect(patience_s=1e9)
def leave(world: World, key: str, attachments: list[str]) -> None:
    """They lead to a host that it has left."""
    for id in attachments:
        world.neighbours.volume.release(id)


def attachments_of(devices: Iterable[Device]) -> list[str]:
    return [d.attachment_id for d in devices if d.is_volume and d.attachment_id]


@effect(patience_s=1e9)
def rest(world: World, key: str, server: Server) -> list[Device]:
    """No host has them any longer, nor can anybody else: its devices, each with an attachment that leads to no host."""
    devices = _each_with(world, server, _attachments(world, server.id), {})
    kept = {d.attachment_id for d in devices}
    for id in attachments_of(server.devices):
        if id not in kept:
            world.neighbours.volume.release(id)
    return devices


@effect
def complete(world: World, key: str, attachments: list[str]) -> None:
    """The guest has them."""
    for id in attachments:
        world.neighbours.volume.complete(id)


@effect(patience_s=3600)
def hand_over(world: World, key: str, volume: str) -> None:
    """A volume that was made for a server is like any other from now on: our mark goes."""
    world.neighbours.volume.unmark(volume)


@effect(patience_s=1e9)
def release(world: World, key: str, server: str) -> None:
    """All its volumes are others' to have."""
    for a in _attachments(world, server):
        world.neighbours.volume.release(a.id)


@effect(patience_s=300)
def erase(world: World, key: str, volume: str) -> None:
    """Delete a volume with its server. One that cannot be, since it has snapshots, stays."""
    try:
        found = world.neighbours.volume.show(volume)
    except NotFound:
        return
    if found.status == "deleting":
        return
    if found.status in ("in-use", "reserved", "attaching", "detaching", "creating", "downloading"):
        raise Unavailable(f"Volume {volume} is {found.status}.")
    try:
        world.neighbours.volume.delete(volume)
    except Invalid as e:
        log.warning("volume %s outlives its server: %s", volume, e.said)


def connector(world: World, host: str) -> dict[str, Any]:
    """Who a host is to a volume service (Block Storage API, attachments: connector)."""
    with world.db.read() as tx:
        known = hosts.connector(tx, host)
    return {"host": host, "multipath": False, "os_type": "linux", "platform": "x86_64"} | known


def info_of(a: Attachment, d: Device) -> dict[str, Any]:
    """How to reach it, as a host is told."""
    return (a.connection_info or {}) | ({"multiattach": True} if d.multiattach else {})


def reserved(world: World, server: str, volume: str, there: Sequence[Attachment]) -> Attachment:
    """Its attachment to this volume: one that is there, one without a host first; else a new one."""
    mine = sorted((a for a in there if a.volume_id == volume), key=lambda a: a.status != RESERVED)
    return mine[0] if mine else world.neighbours.volume.reserve(volume, server)


def _attachments(world: World, server: str) -> Sequence[Attachment]:
    return world.neighbours.volume.attachments(server_id=server)


def _mounted(d: Device) -> dict[str, str]:
    return {"mountpoint": d.name} if d.name else {}


# ---- what must not be left


@reconciler(every_s=30)
def promises(world: World) -> list[str]:
    """What requests reserved or made, and never came to write down."""
    before = world.clock.now() - OVERDUE_S
    with world.db.read() as tx:
        found = block_devices.overdue(tx, before)
    said = []
    for p in found:
        if world.db.run(block_devices.take, p.device):
            others = partial(world.db.look, block_devices.superseded, p, before)
            try:
                given_back(world.neighbours.volume, p.server, p.volume, p.device, others)
            except Unavailable as e:
                log.info("what was promised for device %s is given back later: %s", p.device, e.said)
                continue
            world.db.run(block_devices.fulfilled, p.device)
            said.append(f"device {p.device} of {p.server} came to nothing")
    return said


@reconciler(every_s=300)
def loose(world: World) -> list[str]:
    """Attachments to servers of ours that do not have that volume, or are dead: as `watch.strays` for ports.

    What a request has just reserved is promised; we look at the promises after we have seen the attachments.
    """
    said = []
    for a in left_over(world):
        world.neighbours.volume.release(a.id)
        said.append(f"attachment {a.id} of volume {a.volume_id} was left of {a.server_id}")
    return said


def left_over(world: World) -> list[Attachment]:
    """Those of `loose`."""
    if not world.neighbours.volume.there:
        return []
    seen = [a for a in world.neighbours.volume.attachments() if a.server_id]
    ids = {a.server_id or "" for a in seen}
    with world.db.read() as tx:  # a promise is followed by a run, and that by what is written
        open = {(p.server, p.volume) for p in block_devices.promised(tx)}
        at_work = compare.at_work(tx, ids)
        known = servers.find(tx, ids)
    found = []
    for a in seen:
        server = known.get(a.server_id or "")
        mine: Iterable[Device] = server.devices if server is not None and server.deleted_at is None else ()
        if (
            server is None  # somebody else's: bare metal, or another cloud on the same volume service
            or a.server_id in at_work
            or (a.server_id, a.volume_id) in open
            or any(d.attachment_id == a.id for d in mine)
        ):
            continue
        found.append(a)
    return found


@reconciler(every_s=300)
def halfway(world: World) -> list[str]:
    """Volumes that are said to be leaving a server of ours which nobody is at work on, and which keeps them: who said so
    came after that had been taken back. They stay, and can be detached again."""
    said = []
    for volume, server in staying(world):
        world.neighbours.volume.roll_detaching(volume)
        said.append(f"volume {volume} was said to be leaving {server}")
    return said


def staying(world: World) -> list[tuple[str, str]]:
    """(volume, server) of `halfway`."""
    if not world.neighbours.volume.there:
        return []
    leaving = list(world.neighbours.volume.list(all_projects=True, status="detaching"))
    of = {(v.id, a.server_id or "") for v in leaving for a in v.attachments}
    with world.db.read() as tx:
        rest = compare.at_rest(tx, {server for _, server in of})
    return sorted(
        (volume, server)
        for volume, server in of
        if server in rest and any(d.volume_id == volume and not d.busy for d in rest[server].devices)
    )


@reconciler(every_s=300)
def astray(world: World) -> list[str]:
    """Attachments of servers that lead to another host than theirs: as `watch.misplaced` for ports.

    A conductor that stalled in the middle of leading a volume to a host may find, much later, the attachment by which
    another has led it elsewhere since, and take it for its own.
    """
    said = []
    for host, server, device in led_elsewhere(world):
        try:
            a = world.neighbours.volume.reserve(device.volume_id or "", server.id)
            world.neighbours.volume.connect(a.id, connector(world, server.host or "") | _mounted(device))
            world.neighbours.volume.complete(a.id)
        except Trouble as e:  # what was reserved is loose
            log.warning("volume %s of %s is led to %s, and stays so: %s", device.volume_id, server.id, host, e.said)
            continue
        back = world.db.run(_led_back, server.id, device, a.id, world.clock.now())
        world.neighbours.volume.release((device.attachment_id or "") if back else a.id)
        if back:
            said.append(f"volume {device.volume_id} of {server.id} was led to {host}")
    return said


def led_elsewhere(world: World) -> list[tuple[str, Server, Device]]:
    """(host, server, device) of `astray`, as far as nobody is at work on the server."""
    if not world.neighbours.volume.there:
        return []
    used = world.neighbours.volume.list(all_projects=True, status="in-use")
    leads = {a.id: (a.host, a.server_id) for v in used for a in v.attachments if a.host and a.server_id}
    with world.db.read() as tx:
        rest = compare.at_rest(tx, {id for _, id in leads.values()})
    return [
        (leads[d.attachment_id][0], s, d)
        for s in rest.values()
        if s.host is not None
        for d in s.devices
        if d.attachment_id in leads and not d.busy and leads[d.attachment_id][0] != s.host
    ]


def _led_back(tx: Tx, id: str, device: Device, attachment: str, now: float) -> bool:
    """Unless it has come to something else meanwhile."""
    s = compare.at_rest(tx, [id]).get(id)
    if s is None or device not in s.devices:
        return False
    block_devices.change(tx, id, device.uuid, now, attachment_id=attachment)
    return True


RECONCILERS = [promises, loose, halfway, astray]
