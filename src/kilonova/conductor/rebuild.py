"""Rebuild: the same host, ports and volumes; disks anew. With another image the scheduler is asked whether the host can run it.

It cannot be taken back: the old disks are gone when the new ones are begun.
"""

from typing import Any

import msgspec

from kilonova.conductor import moves, ports, volumes
from kilonova.conductor.capture import on_its_way
from kilonova.conductor.ports import Plugged
from kilonova.conductor.verbs import STEPS
from kilonova.conductor.world import World
from kilonova.contracts.compute import Abandon, Done, Power
from kilonova.contracts.compute import Rebuild as Make
from kilonova.contracts.jobs import Rebuild
from kilonova.contracts.scheduler import Choose
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, NoCapacity, Trouble, Unavailable
from kilonova.kit.workflow import Run, command, effect, record, workflow
from kilonova.model.ask import Ask, ask
from kilonova.model.devices import Device
from kilonova.model.plan import plan
from kilonova.model.seat import Seat
from kilonova.model.server import Image, Server
from kilonova.model.states import VM, Task
from kilonova.store import hosts, seats, servers

NO_HOST = "No valid host was found. There are not enough hosts available."


@workflow
def rebuild(run: Run, job: Rebuild) -> None:
    s, was = job.server, job.server.vm_state
    assert s.host is not None
    run.if_undone(broken, s, run.id, run.now)
    s = moves.alone(run, s)  # who plugs or unplugs something must be done: it is made of what is written then
    assert s.host is not None
    job = msgspec.structs.replace(job, server=s)
    if job.before is not None:
        try:
            run(fits, s)
        except Trouble:
            run(not_made, s, job.before, run.now)
            raise
    found = run(present, s)
    run(on_its_way, s, Task.rebuild_block_device_mapping, run.now)
    root = None
    if job.reimage:
        run(off, s.id, s.host)
        root = reimage(run, s, job.image_id)
    run(on_its_way, s, Task.rebuild_spawning, run.now)
    done = run(make, job, s.host, found, root)
    if was == VM.stopped:
        run(running, s, found.plugged, done.power_state, run.now)
        done = run(STEPS["stop"], s, s.host)
    run(rebuilt, s, found.plugged, VM.stopped if was == VM.stopped else VM.active, done.power_state, run.now)


@record
def broken(tx: Tx, server: Server, run: str, now: float) -> None:
    servers.finish(tx, server, VM.error, now, fault_run=run)


# ---- before anything is touched


@effect(event="rebuild_server")
def fits(world: World, key: str, server: Server) -> None:
    """Raises NoCapacity where its host cannot run this image."""
    wanted: Ask = msgspec.structs.replace(ask(server, host=server.host), amounts={}, in_place=True)
    chosen = world.choose(Choose(server=server.id, ask=wanted, most=1))
    if not chosen.places:
        raise NoCapacity(NO_HOST, detail=f"{NO_HOST} {chosen.explained()}")


@record
def not_made(tx: Tx, server: Server, before: Image, now: float) -> None:
    """It is still of the image that it was made of."""
    servers.change(tx, server.id, now, image=before, image_id=before.id)


class Present(msgspec.Struct, frozen=True):
    """Its ports and where it is, as its new machine must know them."""

    plugged: Plugged
    zone: str
    seat: Seat | None = None


@effect
def present(world: World, key: str, server: Server) -> Present:
    with world.db.read() as tx:
        zone = hosts.zones(tx).get(server.host or "", world.config.api.default_availability_zone)
        seat = seats.of(tx, server.id)
    return Present(ports.present(world, server), zone, seat)


# ---- a root disk that is a volume


class Root(msgspec.Struct, frozen=True):
    """The device, and how its host reaches it."""

    device: Device
    connection: dict[str, Any]

    def __repr__(self) -> str:
        return f"Root({self.device.volume_id})"  # how may hold passwords


def reimage(run: Run, server: Server, image_id: str) -> Root:
    """A volume that a host has cannot be written by its service: it is let go of, written, and had again."""
    root = next(d for d in server.devices if d.boot_index == 0 and d.is_volume)
    assert root.volume_id is not None and server.host is not None
    run(let_go, server.id, root)
    run(write, root.volume_id, image_id)
    run(written, root.volume_id)
    again = run(connect, server, root, server.host)
    run(had_again, server, again.device, run.now)
    run(volumes.complete, volumes.attachments_of([again.device]))  # whatever becomes of the machine
    return again


@command(patience_s=600)
def off(server: str, host: str) -> To[Done]:
    return To(host, Power(server=server, to="stop", timeout_s=0))


@effect
def let_go(world: World, key: str, server: str, root: Device) -> None:
    """Reserved all the while, so that nobody else takes it."""
    volume = root.volume_id or ""
    there = [a for a in world.neighbours.volume.attachments(server_id=server) if a.volume_id == volume]
    if not any(a.status == volumes.RESERVED for a in there):
        world.neighbours.volume.reserve(volume, server)
    for id in volumes.attachments_of([root]):
        world.neighbours.volume.release(id)


@effect
def write(world: World, key: str, volume: str, image_id: str) -> None:
    if world.neighbours.volume.show(volume).status != "downloading":
        world.neighbours.volume.reimage(volume, image_id, reserved=True)


@effect(patience_s=3600)
def written(world: World, key: str, volume: str) -> None:
    status = world.neighbours.volume.show(volume).status
    if status.startswith("error"):
        raise Conflict(f"Volume {volume} could not be written: it is in status {status}.")
    if status == "downloading":
        raise Unavailable(f"Volume {volume} is being written.")


@effect
def connect(world: World, key: str, server: Server, root: Device, host: str) -> Root:
    there = world.neighbours.volume.attachments(server_id=server.id)
    mine = volumes.reserved(world, server.id, root.volume_id or "", there)
    a = world.neighbours.volume.connect(mine.id, volumes.connector(world, host))
    return Root(msgspec.structs.replace(root, attachment_id=a.id), volumes.info_of(a, root))


@record
def had_again(tx: Tx, server: Server, root: Device, now: float) -> None:
    devices = [root if d.uuid == root.uuid else d for d in servers.held(tx, server.id).devices]
    servers.step(tx, server, str(Task.rebuild_block_device_mapping), now, devices=devices)


# ---- on its host


@command(patience_s=1800, event="compute_rebuild_instance")
def make(job: Rebuild, host: str, found: Present, root: Root | None) -> To[Done]:
    server = msgspec.structs.replace(job.server, plugs=found.plugged.plugs)
    machine = plan(
        server,
        nics=found.plugged.nics,
        number=server.number,
        epoch=server.epoch,
        seat=found.seat,
        zone=found.zone,
        admin_password=job.admin_password,
        files=job.files,
        connections={root.device.volume_id or "": root.connection} if root else None,
    )
    return To(host, Make(machine=machine))


@make.on("abort")
def _(job: Rebuild, host: str, found: Present, root: Root | None) -> To[Done]:
    return To(host, Abandon(server=job.server.id))


@record
def running(tx: Tx, server: Server, plugged: Plugged, power_state: int, now: float) -> None:
    """It was off before, and will be again."""
    servers.step(tx, server, str(Task.powering_off), now, plugs=plugged.plugs, power_state=power_state)


@record
def rebuilt(tx: Tx, server: Server, plugged: Plugged, to: VM, power_state: int, now: float) -> None:
    servers.finish(tx, server, to, now, plugs=plugged.plugs, power_state=power_state, launched_at=now)
