"""Evacuate: the host is down, so the server is made anew on another, of its image or its volumes.

The old host is told nothing.  When it is back it finds that another has a newer epoch of that server: what it holds is
swept (`watch.py`), and then its share is free.
"""

import msgspec

from kilonova.conductor import moves, outside
from kilonova.conductor.moves import Goal, Joined, home, rebind
from kilonova.conductor.verbs import timeout_s
from kilonova.conductor.world import World
from kilonova.contracts.compute import Abandon, Destroy, Done, Power, Spawn
from kilonova.contracts.jobs import Evacuate
from kilonova.contracts.scheduler import Chosen
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import NotFound, Refused, Trouble
from kilonova.kit.workflow import Run, command, effect, record, workflow
from kilonova.model.host import Place
from kilonova.model.server import Server
from kilonova.model.states import VM, Task
from kilonova.store import hosts, migrations, servers
from kilonova.store.migrations import Status


@workflow
def evacuate(run: Run, job: Evacuate) -> None:
    assert job.server.host is not None
    run.if_undone(stayed, job, run.id, run.now)
    run.when_alone()
    run(still_down, job.server.host)
    s = run(standing, job)
    old = run(home, job.server.host, job.server.node)
    goal, joined, power_state = somewhere(run, job, s, old)
    run(rebuilt, job, s, goal, joined, power_state, run.now)
    run.no_return()
    if job.stopped:
        power_state = stop(run, job, s, goal, power_state)
    moves.left(run, s, joined)


def somewhere(run: Run, job: Evacuate, s: Server, old: Place) -> tuple[Goal, Joined, int]:
    tried: list[str] = []
    last: Trouble | None = None
    chosen = Chosen()
    for turn in range(moves.TURNS):
        chosen = run(choose, job, s, tried, turn > 0)
        if not chosen.places:
            break
        for place in chosen.places:
            tried.append(place.host)
            with run.attempt():
                try:
                    goal = run(claim, job, s, place, run.now)
                    outside.agreed(run, chosen, s.id, job.migration)
                    joined = Joined(run(rebind, s, place, old), moves.carry(run, s, place))
                    run(spawning, job, run.now)
                    done = run(spawn, job, s, goal, joined)
                    moves.carried(run, joined)
                    return goal, joined, done.power_state
                except Trouble as e:
                    last = e
                    raise
    raise moves.nowhere(last, tried, chosen)


def stop(run: Run, job: Evacuate, s: Server, goal: Goal, power_state: int) -> int:
    """What cannot be stopped runs, and is shown so."""
    to = VM.stopped
    try:
        power_state = run(halt, s, goal.place.host).power_state
    except Trouble:
        to = VM.active
    run(rests, job, to, power_state, run.now)
    return power_state


@effect
def still_down(world: World, key: str, host: str) -> None:
    """Two of one server are worse than none: who is back is not evacuated."""
    now, down_after_s = world.clock.now(), world.config.compute.host_down_after_s
    with world.db.read() as tx:
        try:
            up = hosts.service_of(tx, host).up(now, down_after_s)
        except NotFound:
            return
    if up:
        raise Refused(f"Compute service of {host} is still in use.")


@record
def standing(tx: Tx, job: Evacuate) -> Server:
    """As it is now that others have ended. Raises Refused where one of them has moved it."""
    s = servers.get(tx, job.server.id)
    if s.host != job.server.host:
        raise Refused(f"Instance {s.id} is no longer on {job.server.host}.")
    return msgspec.structs.replace(s, generation=job.server.generation)


@effect(event="rebuild_server")
def choose(world: World, key: str, job: Evacuate, server: Server, tried: list[str], fresh: bool) -> Chosen:
    if len(tried) >= (1 if job.host else world.config.scheduler.attempts):
        return Chosen()
    avoid = [*tried, server.host or ""]
    return moves.choice(world, server, server.flavor, avoid=avoid, host=job.host, forced=job.forced, fresh=fresh)


@record
def claim(tx: Tx, job: Evacuate, server: Server, place: Place, now: float) -> Goal:
    goal = moves.claimed(tx, server, job.migration, place, server.flavor, now, Status.pre_migrating)
    servers.step(tx, job.server, str(Task.rebuild_block_device_mapping), now)
    return goal


@claim.undo
def _(tx: Tx, job: Evacuate, server: Server, place: Place, now: float) -> None:
    moves.given_back(tx, server, job.migration, now)
    servers.step(tx, job.server, str(Task.rebuilding), now)


@record
def spawning(tx: Tx, job: Evacuate, now: float) -> None:
    servers.step(tx, job.server, str(Task.rebuild_spawning), now)


@command(patience_s=1800, event="compute_rebuild_instance")
def spawn(job: Evacuate, server: Server, goal: Goal, joined: Joined) -> To[Done]:
    machine = moves.machine(server, goal, joined, admin_password=job.admin_password)
    return To(goal.place.host, Spawn(machine=machine))


@spawn.undo
def _(job: Evacuate, server: Server, goal: Goal, joined: Joined) -> To[Done]:
    return To(goal.place.host, Destroy(server=server.id, epoch=goal.epoch))


@spawn.on("abort")
def _(job: Evacuate, server: Server, goal: Goal, joined: Joined) -> To[Done]:
    return To(goal.place.host, Abandon(server=server.id))


@record
def rebuilt(tx: Tx, job: Evacuate, server: Server, goal: Goal, joined: Joined, power_state: int, now: float) -> None:
    """From now on it belongs to this host. What the old one held is its migration's until that host is back."""
    there = {"host": goal.place.host, "node": goal.place.node, "epoch": goal.epoch, "power_state": power_state}
    facts = there | {"launched_at": now} | joined.facts
    if job.stopped:
        servers.step(tx, job.server, str(Task.powering_off), now, **facts)
    else:
        servers.finish(tx, job.server, VM.active, now, **facts)
    migrations.change(tx, job.migration, now, Status.done)


@command(patience_s=600, event="compute_stop_instance")
def halt(server: Server, host: str) -> To[Done]:
    return To(host, Power(server=server.id, to="stop", timeout_s=timeout_s(server)))


@record
def rests(tx: Tx, job: Evacuate, to: VM, power_state: int, now: float) -> None:
    servers.finish(tx, job.server, to, now, power_state=power_state)


@record
def stayed(tx: Tx, job: Evacuate, run: str, now: float) -> None:
    """Where it was, whatever is left of it there. An older fault says more than ours of a server that was in error."""
    fault = {} if VM(job.was) == VM.error else {"fault_run": run}
    servers.finish(tx, job.server, VM(job.was), now, **fault)
    migrations.change(tx, job.migration, now, Status.error)
