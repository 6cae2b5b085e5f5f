"""Shelve: the guest is turned off and its disk becomes an image; offload: its host is free of it; unshelve: it is somewhere again.

What a shelved server keeps: its row, its ports (bound to no host), its volumes (reserved for it), its image.  A shelve
that fails lets the guest run again; an unshelve that fails leaves it shelved.
"""

import logging
from typing import Any

import msgspec

from kilonova.conductor import moves, outside, ports, volumes, wishes
from kilonova.conductor.capture import STEPS as COPIES
from kilonova.conductor.capture import drop_image, on_its_way, put_down
from kilonova.conductor.moves import nowhere
from kilonova.conductor.ports import Plugged
from kilonova.conductor.verbs import STEPS, timeout_s
from kilonova.conductor.volumes import Connected
from kilonova.conductor.world import World
from kilonova.contracts.compute import Abandon, Destroy, Done, Power, Spawn
from kilonova.contracts.jobs import Offload, Shelve, Unshelve
from kilonova.contracts.scheduler import Choose, Chosen
from kilonova.kit.bus import To
from kilonova.kit.clock import iso
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, HostGone, NotFound, Trouble
from kilonova.kit.journal import reached
from kilonova.kit.reconcile import reconciler
from kilonova.kit.workflow import FOREVER, Run, command, effect, record, start, workflow
from kilonova.model.ask import ask
from kilonova.model.capture import SHELVED, SHELVED_AT, SHELVED_HOST, SHELVED_IMAGE
from kilonova.model.devices import Device
from kilonova.model.host import Place
from kilonova.model.plan import from_image, plan
from kilonova.model.seat import Seat
from kilonova.model.server import Image, Server
from kilonova.model.states import VERBS, VM, PowerState, Task
from kilonova.store import compare, placement, seats, server_groups, servers

log = logging.getLogger(__name__)
TURNS = 10  # that places are asked for: claims may be lost to others
KEEP_TRYING_S = 86_400.0  # an image service that is away for longer keeps what it has


# ---- shelve


@workflow
def shelve(run: Run, job: Shelve) -> None:
    s = job.server
    assert s.host is not None
    run.if_undone(as_it_is, s, run.id, run.now)
    if job.image_id is not None:
        run.if_undone(drop_image, job.image_id)
    job = msgspec.structs.replace(job, server=(s := moves.alone(run, s)))
    assert s.host is not None
    failed: Trouble | None = None
    with run.attempt():
        try:
            lay_down(run, job, s.host)
        except Trouble as e:
            failed = e
            raise
    if failed is not None:
        if s.vm_state == VM.active:
            wake_up(run, s, s.host)
        raise failed
    run.no_return()
    run(shelved, job, run.now)
    if job.offload:
        try:
            leave(run, s, s.host)
        except Trouble:  # it stays where it is, and that is tried again
            run(put_down, s, VM.shelved, run.id, run.now)


def lay_down(run: Run, job: Shelve, host: str) -> None:
    """Off, and its disk an image; a disk that is a volume needs none."""
    s = job.server
    if job.image_id is None:
        run(off, s, host)
        run(is_off, s, run.now)
        return
    freeze, upload = COPIES["shelve"]
    run(off, s, host)
    run(is_off, s, run.now)
    run(freeze, s, host, job.image_id, job.disk_format)
    run(on_its_way, s, Task.shelving_image_pending_upload, run.now)
    run(on_its_way, s, Task.shelving_image_uploading, run.now)
    run(upload, s, host, job.image_id)


def wake_up(run: Run, s: Server, host: str) -> None:
    """It ran, and shall not be off because of us."""
    try:
        done = run(again, s, host)
        run(runs, s, done.power_state, run.now)
    except Trouble:
        pass  # then it is stopped, and says so


@record
def as_it_is(tx: Tx, server: Server, run: str, now: float) -> None:
    """A guest that we turned off is stopped; one that we did not touch is as it was."""
    off = servers.get(tx, server.id).power_state == PowerState.shutdown
    servers.finish(tx, server, VM.stopped if off else server.vm_state, now, fault_run=run)


@command(patience_s=600)
def off(server: Server, host: str) -> To[Done]:
    return To(host, Power(server=server.id, to="stop", timeout_s=timeout_s(server)))


@off.on("abort")
def _(server: Server, host: str) -> To[Done]:
    return To(host, Abandon(server=server.id))


@command(patience_s=600)
def again(server: Server, host: str) -> To[Done]:
    return To(host, Power(server=server.id, to="start"))


@record
def is_off(tx: Tx, server: Server, now: float) -> None:
    servers.step(tx, server, str(Task.shelving), now, power_state=int(PowerState.shutdown))


@record
def runs(tx: Tx, server: Server, power_state: int, now: float) -> None:
    servers.step(tx, server, str(Task.shelving), now, power_state=power_state)


@record
def shelved(tx: Tx, job: Shelve, now: float) -> None:
    """From here on it is shelved, whatever becomes of its place on the host."""
    s = job.server
    about = {SHELVED_AT: iso(now) or "", SHELVED_HOST: s.host or ""}
    about |= {SHELVED_IMAGE: job.image_id} if job.image_id else {}
    facts: dict[str, Any] = {"system_metadata": servers.held(tx, s.id).system_metadata | about}
    facts |= {"power_state": int(PowerState.shutdown)}
    if job.offload:
        servers.step(tx, s, str(Task.shelving_offloading), now, vm_state=str(VM.shelved), **facts)
        reached(tx, s.id, "shelve", "shelved", now)
    else:
        servers.finish(tx, s, VM.shelved, now, **facts)


# ---- offload


@workflow
def offload(run: Run, job: Offload) -> None:
    run.if_undone(put_down, job.server, VM.shelved, run.id, run.now)
    leave(run, moves.alone(run, job.server), job.server.host or "")


def leave(run: Run, s: Server, host: str) -> None:
    """Its host is free of it. One that is gone sweeps it when it returns."""
    try:
        run(destroy, s.id, host, s.epoch)
    except HostGone:
        pass
    run.no_return()
    run(unbind, s)
    devices = run(volumes.rest, s) if s.has_volumes else None
    run(offloaded, s, devices, run.now)


@command(patience_s=600, event="compute_shelve_offload_instance")
def destroy(id: str, host: str, epoch: int) -> To[Done]:
    return To(host, Destroy(server=id, epoch=epoch))


@effect(patience_s=FOREVER)
def unbind(world: World, key: str, server: Server) -> None:
    ports.unbind(world, server)


@record
def offloaded(tx: Tx, server: Server, devices: list[Device] | None, now: float) -> None:
    placement.release(tx, server.id, now=now)
    facts: dict[str, Any] = {"host": None, "node": None, "power_state": 0}
    facts |= {"devices": devices} if devices is not None else {}
    servers.finish(tx, server, VM.shelved_offloaded, now, **facts)


@reconciler(every_s=60)
def lying(world: World) -> list[str]:
    """Shelved servers that have kept their place on a host for as long as they may."""
    after_s = world.config.compute.shelved_offload_time_s
    if after_s < 0:
        return []
    now = world.clock.now()
    with world.db.read() as tx:
        found = [
            s
            for s in compare.resting(tx, VM.shelved)
            if (s.system_metadata.get(SHELVED_AT) or "") <= _iso(now - after_s)
        ]
    said = []
    for s in found:
        try:
            world.started([world.db.run(_begun, world, s, now)])
        except Conflict:
            continue  # somebody was at it first
        said.append(f"{s.id} is offloaded")
    return said


def _begun(tx: Tx, world: World, server: Server, now: float) -> str:
    job = Offload(servers.begin(tx, server.id, VERBS["offload"], now))
    return start(tx, offload, job, id=world.ids.uuid(), subject=server.id, now=now)


def _iso(at: float) -> str:
    return iso(at) or ""


# ---- unshelve


@workflow
def unshelve(run: Run, job: Unshelve) -> None:
    s = job.server
    image_id = s.system_metadata.get(SHELVED_IMAGE)
    run.if_undone(put_down, s, s.vm_state, run.id, run.now)
    job = msgspec.structs.replace(job, server=(s := moves.alone(run, s)))
    if s.vm_state == VM.shelved:
        run(on_its_way, s, Task.powering_on, run.now)
        done = run(STEPS["start"], s, s.host or "")
        run.no_return()
        run(back, s, None, None, done.power_state, run.now)
    else:
        image = None if image_id is None else run(snapshot, image_id)
        land(run, job, image)
    if image_id is not None:
        try:
            run(drop_shelved, image_id)
        except Trouble as e:
            log.warning("image %s of %s was left: %s", image_id, s.id, e.said)


def land(run: Run, job: Unshelve, image: Image | None) -> None:
    """A place that is claimed and has it; the next, where one cannot have it."""
    s, tried, last = job.server, list[str](), None
    epoch, chosen = s.epoch, Chosen()
    for turn in range(TURNS):
        chosen = run(choose, job, tried, turn > 0)
        if not chosen.places:
            break
        for place in chosen.places:
            epoch += 1
            tried.append(place.host)
            with run.attempt():
                try:
                    settle_on(run, s, image, chosen, place, epoch)
                    return
                except Trouble as e:
                    last = e
                    raise
    if tried and s.has_volumes:
        run(kept, s, run(volumes.rest, s), run.now)
    raise nowhere(last, tried, chosen)


def settle_on(run: Run, s: Server, image: Image | None, chosen: Chosen, place: Place, epoch: int) -> None:
    seat = run(claim, s, place, epoch, run.now)
    outside.agreed(run, chosen, s.id)
    plugged = run(plug, s, place)
    connected = volumes.connected(run, s, place.host) if s.has_volumes else None
    run(on_its_way, s, Task.spawning, run.now)
    done = run(spawn, s, image, place, epoch, plugged, connected, seat)
    run.no_return()
    if connected is not None:
        run(volumes.complete, [d.attachment_id or "" for d in connected.devices if d.is_volume])
    run(back, s, plugged, connected.devices if connected else None, done.power_state, run.now)


@effect(event="get_image_info")
def snapshot(world: World, key: str, image_id: str) -> Image:
    """What it is made of. Raises Conflict where somebody deleted it: then it cannot come back."""
    try:
        info = world.neighbours.image.show(image_id)
    except NotFound:
        raise Conflict(f"Unshelve attempted but the image {image_id} cannot be found.") from None
    return Image(
        id=info.id,
        name=info.name,
        disk_format=info.disk_format,
        size_bytes=info.size,
        virtual_size_bytes=info.virtual_size,
        hash_algo=info.hash_algo,
        hash_value=info.hash_value,
    )


@effect(event="schedule_instances")
def choose(world: World, key: str, job: Unshelve, tried: list[str], fresh: bool) -> Chosen:
    attempts = 1 if job.host else world.config.scheduler.attempts
    if len(tried) >= attempts:
        return Chosen()
    wanted = wishes.of_living(world, msgspec.structs.replace(ask(job.server, host=job.host), avoid=tried), job.server)
    return world.choose(Choose(server=job.server.id, ask=wanted, most=attempts - len(tried), fresh=fresh))


@record
def claim(tx: Tx, server: Server, place: Place, epoch: int, now: float) -> Seat | None:
    server_groups.admit(tx, server, place.host, place.provider)
    seat = seats.claim(tx, server, place.provider, now=now, shared=place.shared)
    servers.settle(tx, server, place.host, place.node, epoch, str(Task.unshelving), now)
    return seat


@claim.undo
def _(tx: Tx, server: Server, place: Place, epoch: int, now: float) -> None:
    placement.release(tx, server.id, place.provider, now=now)
    servers.unsettle(tx, server.id, place.host, now, plugs=server.plugs)


@effect
def plug(world: World, key: str, server: Server, place: Place) -> Plugged:
    return ports.rebind(world, server, place)


@plug.undo
def _(world: World, key: str, server: Server, place: Place) -> None:
    ports.unbind(world, server, place.host)


@command(patience_s=1800, event="compute_unshelve_instance")
def spawn(
    server: Server,
    image: Image | None,
    place: Place,
    epoch: int,
    plugged: Plugged,
    connected: Connected | None,
    seat: Seat | None = None,
) -> To[Done]:
    there = msgspec.structs.replace(server, plugs=plugged.plugs, devices=connected.devices if connected else [])
    connections = connected.connections if connected else None
    machine = plan(
        there if connected else msgspec.structs.replace(there, devices=server.devices),
        nics=plugged.nics,
        number=server.number,
        epoch=epoch,
        seat=seat,
        zone=place.zone,
        connections=connections,
    )
    return To(place.host, Spawn(machine=machine if image is None else from_image(machine, image)))


@spawn.undo
def _(
    server: Server,
    image: Image | None,
    place: Place,
    epoch: int,
    plugged: Plugged,
    connected: Connected | None,
    seat: Seat | None = None,
) -> To[Done]:
    return To(place.host, Destroy(server=server.id, epoch=epoch))


@spawn.on("abort")
def _(
    server: Server,
    image: Image | None,
    place: Place,
    epoch: int,
    plugged: Plugged,
    connected: Connected | None,
    seat: Seat | None = None,
) -> To[Done]:
    return To(place.host, Abandon(server=server.id))


@record
def back(
    tx: Tx, server: Server, plugged: Plugged | None, devices: list[Device] | None, power_state: int, now: float
) -> None:
    told = servers.held(tx, server.id).system_metadata
    facts: dict[str, Any] = {"system_metadata": {k: v for k, v in told.items() if k not in SHELVED}}
    facts |= {"plugs": plugged.plugs} if plugged is not None else {}
    facts |= {"devices": devices} if devices is not None else {}
    servers.finish(tx, server, VM.active, now, power_state=power_state, launched_at=now, **facts)


@record
def kept(tx: Tx, server: Server, devices: list[Device], now: float) -> None:
    servers.step(tx, server, str(Task.unshelving), now, devices=devices)


@effect(patience_s=KEEP_TRYING_S)
def drop_shelved(world: World, key: str, image_id: str) -> None:
    """Nothing there: done."""
    world.neighbours.image.delete(image_id)
