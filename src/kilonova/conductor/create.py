"""Build: choose a host and claim it, bind ports there, let it spawn; where a host refuses, try the next."""

from collections.abc import Callable
from contextlib import suppress

import msgspec

from kilonova.clients.volume import given_back
from kilonova.conductor import outside, ports, volumes, wishes
from kilonova.conductor.ports import Plugged
from kilonova.conductor.volumes import Connected
from kilonova.conductor.world import World
from kilonova.contracts.compute import Abandon, Destroy, Done, Spawn
from kilonova.contracts.jobs import Build
from kilonova.contracts.scheduler import Choose, Chosen
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import (
    Conflict,
    Forbidden,
    HostGone,
    Invalid,
    NoCapacity,
    NotFound,
    OverQuota,
    Refused,
    Trouble,
)
from kilonova.kit.workflow import Run, command, effect, record, workflow
from kilonova.model.ask import ask
from kilonova.model.devices import Device
from kilonova.model.host import Place
from kilonova.model.plan import plan
from kilonova.model.seat import Seat
from kilonova.model.server import Server
from kilonova.model.states import VM, Task
from kilonova.store import hosts, placement, seats, server_groups, servers

NO_HOST = "No valid host was found. There are not enough hosts available."
CHOICES = 10  # claims may be lost to others; to be asked so often for new places is more than bad luck
HOPELESS = Conflict, Forbidden, Invalid, NotFound, OverQuota  # said by the network service: the same on any host


@workflow
def build(run: Run, job: Build) -> None:
    placed(run, job, settle_on, Task.networking)


@workflow
def build_bare(run: Run, job: Build) -> None:
    """The same where it has neither ports nor volumes: nobody is asked for anything between its claim and its spawn."""
    placed(run, job, spawn_on, Task.spawning)


def placed(run: Run, job: Build, settle: Callable[[Run, Build, Place, "Claimed"], None], then: Task) -> None:
    """On the first host that takes it. `settle` is the rest of the way when it is claimed, `then` what it is at by then."""
    run.if_undone(broken, job.server, run.id, run.now)
    if job.server.has_volumes:
        run(hold, job.server)
        job = msgspec.structs.replace(job, server=fill(run, job.server))
    tried: list[str] = []
    last: Trouble | None = None
    chosen = Chosen()
    epoch = job.server.epoch
    for turn in range(CHOICES):
        chosen = run(choose, job, tried, turn > 0)
        if not chosen.places:
            break
        for place in chosen.places:
            epoch += 1
            with run.attempt():
                claimed = run(claim, job.server, place, epoch, run.now, then)
                try:
                    outside.agreed(run, chosen, job.server.id)
                    settle(run, job, place, claimed)
                    return
                except Trouble as e:
                    last = e
                    tried.append(place.host)
                    if isinstance(e, Refused | HostGone):
                        run(failed, place.host)
                    raise
            if isinstance(last, HOPELESS) and last.code != "PortBindingFailed":
                raise last
    raise no_host(job, tried, last, chosen)


def settle_on(run: Run, job: Build, place: Place, claimed: "Claimed") -> None:
    plugged = run(plug, job, place)
    if job.server.has_volumes:
        run(mapping, job.server, run.now)
        connected = volumes.connected(run, job.server, place.host)
        run(spawning, job.server, plugged, run.now, connected.devices)
        done = run(spawn, job, place, claimed, plugged, connected)
        run(volumes.complete, [d.attachment_id or "" for d in connected.devices if d.is_volume])
    else:
        run(spawning, job.server, plugged, run.now)
        done = run(spawn, job, place, claimed, plugged)
    run(built, job.server, place, done.power_state, run.now)
    for d in job.server.devices:
        if d.is_volume and d.source != "volume":
            run.no_return()  # else nobody would know it for ours
            with suppress(Trouble):
                run(volumes.hand_over, d.volume_id or "")


def spawn_on(run: Run, job: Build, place: Place, claimed: "Claimed") -> None:
    done = run(spawn, job, place, claimed, Plugged())
    run(built, job.server, place, done.power_state, run.now)


def no_host(job: Build, tried: list[str], last: Trouble | None, chosen: Chosen) -> Trouble:
    """What the user is told: Nova's own sentences, then the last host's, if one was asked at all; operators, why."""
    if last is None:
        return NoCapacity(NO_HOST, detail=f"{NO_HOST} {chosen.explained()}")
    if job.forced or len(tried) == 1:
        return last
    return NoCapacity(
        "Exceeded maximum number of retries. Exhausted all hosts available for retrying build failures for "
        f"instance {job.server.id}. Last trouble: {last.said}"
    )


@record
def broken(tx: Tx, server: Server, run: str, now: float) -> None:
    """It has no volume any more: those that it was to have are free, those that were made for it are gone."""
    facts = {"devices": [left for d in server.devices if (left := _without(d))]} if server.devices else {}
    servers.finish(tx, server, VM.error, now, fault_run=run, **facts)


def _without(d: Device) -> Device | None:
    if not d.is_volume:
        return d
    return msgspec.structs.replace(d, attachment_id=None) if d.source == "volume" else None


# ---- its volumes, before there is a host


def fill(run: Run, server: Server) -> Server:
    """Those that were made for it are ready, and reserved for it like those that were there."""
    if all(d.attachment_id for d in server.devices if d.is_volume):
        return server
    run(mapping, server, run.now)
    devices = []
    for d in server.devices:
        if d.is_volume and not d.attachment_id:
            assert d.volume_id is not None
            run(volumes.ready, d.volume_id)
            d = msgspec.structs.replace(d, attachment_id=run(volumes.reserve, server.id, d.volume_id))
        devices.append(d)
    run(filled, server, devices, run.now)
    return msgspec.structs.replace(server, devices=devices)


@effect
def hold(world: World, key: str, server: Server) -> None:
    """They are reserved and made already, by the request; this is where that is undone."""


@hold.undo
def _(world: World, key: str, server: Server) -> None:
    for a in world.neighbours.volume.attachments(server_id=server.id):
        world.neighbours.volume.release(a.id)
    for d in server.devices:
        if d.is_volume and d.source != "volume":
            given_back(world.neighbours.volume, server.id, None, d.uuid)


@record
def mapping(tx: Tx, server: Server, now: float) -> None:
    servers.step(tx, server, str(Task.block_device_mapping), now)


@record
def filled(tx: Tx, server: Server, devices: list[Device], now: float) -> None:
    servers.step(tx, server, str(Task.scheduling), now, devices=devices)


# ---- choose and claim


@effect
def choose(world: World, key: str, job: Build, tried: list[str], fresh: bool) -> Chosen:
    """Nowhere, when as many hosts were tried as may be: one for a forced host."""
    attempts = 1 if job.forced else world.config.scheduler.attempts
    if len(tried) >= attempts:
        return Chosen()
    wanted = ask(job.server, host=job.host, node=job.node, forced=job.forced)
    if tried:
        wanted = msgspec.structs.replace(wanted, avoid=tried)
    if isinstance(job.networks, list):
        wanted = wishes.of_new(world, wanted, job.networks)
    return world.choose(Choose(server=job.server.id, ask=wanted, most=attempts - len(tried), fresh=fresh))


@choose.only_looks
def _(world: World, job: Build, tried: list[str], fresh: bool) -> bool:
    asked = isinstance(job.networks, list) and wishes.asks(world, job.networks)
    return world.chooses_at_once and not asked


class Claimed(msgspec.Struct, frozen=True):
    number: int
    epoch: int
    seat: Seat | None = None


@record
def claim(tx: Tx, server: Server, place: Place, epoch: int, now: float, then: Task) -> Claimed:
    server_groups.admit(tx, server, place.host, place.provider)
    seat = seats.claim(tx, server, place.provider, now=now, shared=place.shared, new=epoch == server.epoch + 1)
    servers.settle(tx, server, place.host, place.node, epoch, str(then), now)
    return Claimed(server.number or servers.get(tx, server.id).number, epoch, seat)


@claim.undo
def _(tx: Tx, server: Server, place: Place, epoch: int, now: float, then: Task) -> None:
    placement.release(tx, server.id, place.provider, now=now)
    servers.unsettle(tx, server.id, place.host, now)


@record
def failed(tx: Tx, host: str) -> None:
    hosts.failed(tx, host)


# ---- ports


@effect
def plug(world: World, key: str, job: Build, place: Place) -> Plugged:
    return ports.bind(world, key, job, place)


@plug.undo
def _(world: World, key: str, job: Build, place: Place) -> None:
    ports.take_back(world, job.server.id, key, place.host)


# ---- spawn


@record
def spawning(tx: Tx, server: Server, plugged: Plugged, now: float, devices: list[Device] | None = None) -> None:
    facts = {} if devices is None else {"devices": devices}
    servers.step(tx, server, str(Task.spawning), now, plugs=plugged.plugs, **facts)


@command(patience_s=1800, event="compute__do_build_and_run_instance")
def spawn(job: Build, place: Place, claimed: Claimed, plugged: Plugged, connected: Connected | None = None) -> To[Done]:
    server = msgspec.structs.replace(job.server, plugs=plugged.plugs)
    machine = plan(
        server,
        nics=plugged.nics,
        number=claimed.number,
        epoch=claimed.epoch,
        seat=claimed.seat,
        zone=place.zone,
        admin_password=job.admin_password,
        files=job.files,
        connections=connected.connections if connected else None,
    )
    return To(place.host, Spawn(machine=machine))


@spawn.undo
def _(job: Build, place: Place, claimed: Claimed, plugged: Plugged, connected: Connected | None = None) -> To[Done]:
    return To(place.host, Destroy(server=job.server.id, epoch=claimed.epoch))


@spawn.on("abort")
def _(job: Build, place: Place, claimed: Claimed, plugged: Plugged, connected: Connected | None = None) -> To[Done]:
    return To(place.host, Abandon(server=job.server.id))


@record
def built(tx: Tx, server: Server, place: Place, power_state: int, now: float) -> None:
    servers.finish(tx, server, VM.active, now, power_state=power_state, launched_at=now)
    if place.failures:
        hosts.succeeded(tx, place.host)
