"""Resize and cold migration, one flow: the machine is turned off, made anew elsewhere of its disks, and waits for a word.

Until its user confirms or reverts, the old machine is kept where it was, and its share of that host is the migration's.
"""

import msgspec

from kilonova.conductor import moves, outside
from kilonova.conductor.moves import Goal, Joined, able, home, rebind
from kilonova.conductor.verbs import timeout_s
from kilonova.conductor.world import World
from kilonova.contracts.compute import Abandon, Arrive, Depart, Done, Drop, Luggage, Prepare, Return, Stay
from kilonova.contracts.jobs import Resize, Settle
from kilonova.contracts.scheduler import Chosen
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import HostGone, Trouble
from kilonova.kit.journal import reached
from kilonova.kit.workflow import Run, command, effect, record, workflow
from kilonova.model.flavor import Flavor
from kilonova.model.host import Place
from kilonova.model.server import Server
from kilonova.model.states import VM, PowerState, Task
from kilonova.store import migrations, placement, seats, servers
from kilonova.store.migrations import Status


@workflow
def resize(run: Run, job: Resize) -> None:
    s = job.server
    assert s.host is not None
    run.if_undone(stayed, job, run.id, run.now)
    job = msgspec.structs.replace(job, server=(s := moves.alone(run, s)))
    assert s.host is not None
    old = run(home, s.host, s.node)
    run(able, s.host, "Depart", "Stay", "Return", "Drop")
    goal = find(run, job)
    run(on_the_way, s, job.migration, Task.resize_migrating, Status.migrating, run.now)
    luggage = run(depart, s, s.host, s.epoch)
    run(on_the_way, s, job.migration, Task.resize_migrated, Status.post_migrating, run.now)
    joined = Joined(run(rebind, s, goal.place, old), moves.carry(run, s, goal.place))
    run(on_the_way, s, job.migration, Task.resize_finish, Status.post_migrating, run.now)
    done = run(arrive, job, goal, joined, luggage)
    moves.carried(run, joined)
    run(resized, job, goal, joined, done.power_state, run.now)
    run.no_return()
    moves.left(run, s, joined)


def find(run: Run, job: Resize) -> Goal:
    """A place that is claimed and ready; the next, where one cannot have it. Until here its user notices nothing."""
    tried: list[str] = []
    last: Trouble | None = None
    chosen = Chosen()
    for turn in range(moves.TURNS):
        chosen = run(choose, job, tried, turn > 0)
        if not chosen.places:
            break
        for place in chosen.places:
            tried.append(place.host)
            with run.attempt():
                try:
                    goal = run(claim, job, place, run.now)
                    outside.agreed(run, chosen, job.server.id, job.migration)
                    run(prepare, job, goal)
                    return goal
                except Trouble as e:
                    last = e
                    raise
    raise moves.nowhere(last, tried, chosen)


@effect(event="conductor_migrate_server")
def choose(world: World, key: str, job: Resize, tried: list[str], fresh: bool) -> Chosen:
    if len(tried) >= world.config.scheduler.attempts:
        return Chosen()
    avoid = tried if job.same_host else [*tried, job.server.host or ""]
    return moves.choice(world, job.server, job.flavor, avoid=avoid, host=job.host, forced=False, fresh=fresh)


@record(event="cold_migrate")
def claim(tx: Tx, job: Resize, place: Place, now: float) -> Goal:
    return moves.claimed(tx, job.server, job.migration, place, job.flavor, now, Status.pre_migrating)


@claim.undo
def _(tx: Tx, job: Resize, place: Place, now: float) -> None:
    moves.given_back(tx, job.server, job.migration, now)


@command(patience_s=300, event="compute_prep_resize")
def prepare(job: Resize, goal: Goal) -> To[Done]:
    """The machine without its NICs: they are not there yet."""
    bare = moves.machine(msgspec.structs.replace(job.server, flavor=job.flavor), goal, Joined())
    return To(goal.place.host, Prepare(machine=bare))


REACHED = {Task.resize_migrating: "prepared", Task.resize_migrated: "departed"}  # as notifications know it


@record
def on_the_way(tx: Tx, server: Server, migration: str, task: Task, status: Status, now: float) -> None:
    servers.step(tx, server, str(task), now)
    migrations.change(tx, migration, now, status)
    if task in REACHED:
        reached(tx, server.id, "resize", REACHED[task], now)


@command(event="compute_resize_instance")
def depart(server: Server, host: str, epoch: int) -> To[Luggage]:
    return To(host, Depart(server=server.id, epoch=epoch, timeout_s=timeout_s(server)))


@depart.undo
def _(server: Server, host: str, epoch: int) -> To[Done]:
    return To(host, Stay(server=server.id, power_state=server.power_state))


@depart.on("abort")
def _(server: Server, host: str, epoch: int) -> To[Done]:
    return To(host, Abandon(server=server.id))


@command(event="compute_finish_resize")
def arrive(job: Resize, goal: Goal, joined: Joined, luggage: Luggage) -> To[Done]:
    larger = msgspec.structs.replace(job.server, flavor=job.flavor)
    beside = job.server.epoch if goal.place.host == job.server.host else None
    start = VM(job.was) == VM.active
    told = Arrive(machine=moves.machine(larger, goal, joined), luggage=luggage, start=start, beside=beside)
    return To(goal.place.host, told)


@arrive.undo
def _(job: Resize, goal: Goal, joined: Joined, luggage: Luggage) -> To[Done]:
    return To(goal.place.host, Drop(server=job.server.id, epoch=goal.epoch))


@arrive.on("abort")
def _(job: Resize, goal: Goal, joined: Joined, luggage: Luggage) -> To[Done]:
    return To(goal.place.host, Abandon(server=job.server.id))


@record
def resized(tx: Tx, job: Resize, goal: Goal, joined: Joined, power_state: int, now: float) -> None:
    """What it may become again still counts for the quota."""
    there = {"host": goal.place.host, "node": goal.place.node, "epoch": goal.epoch} | joined.facts
    size = servers.sized(job.flavor, job.server.flavor)
    servers.finish(tx, job.server, VM.resized, now, power_state=power_state, launched_at=now, **there, **size)
    migrations.change(tx, job.migration, now, Status.finished)


@record
def stayed(tx: Tx, job: Resize, run: str, now: float) -> None:
    servers.finish(tx, job.server, VM(job.was), now, fault_run=run, **servers.sized(job.server.flavor))
    migrations.change(tx, job.migration, now, Status.error)


# ---- the word: yes


class Kept(msgspec.Struct, frozen=True):
    """What a resize left at its source."""

    host: str
    node: str | None
    epoch: int
    flavor: Flavor
    was: VM


@record
def kept(tx: Tx, migration: str) -> Kept:
    m = migrations.get(tx, migration)
    assert m.source is not None and m.old_flavor is not None
    return Kept(m.source, m.source_node, m.source_epoch, m.old_flavor, VM(m.was or VM.active))


@workflow
def confirm(run: Run, job: Settle) -> None:
    run.if_undone(undecided, job, run.id, run.now)
    old = run(kept, job.migration)
    try:
        run(drop, job.server.id, old.host, old.epoch)
    except HostGone:
        pass  # swept when it returns
    run(confirmed, job, run.now)


@command(patience_s=600, event="compute_confirm_resize")
def drop(server: str, host: str, epoch: int) -> To[Done]:
    return To(host, Drop(server=server, epoch=epoch))


@record
def confirmed(tx: Tx, job: Settle, now: float) -> None:
    off = servers.get(tx, job.server.id).power_state == PowerState.shutdown
    placement.release(tx, job.migration, now=now)
    to = VM.stopped if off else VM.active
    servers.finish(tx, job.server, to, now, **servers.sized(job.server.flavor))
    migrations.change(tx, job.migration, now, Status.confirmed)


@record
def undecided(tx: Tx, job: Settle, run: str, now: float) -> None:
    """It can be asked again."""
    servers.finish(tx, job.server, VM.resized, now, fault_run=run)
    migrations.change(tx, job.migration, now, Status.finished)


# ---- the word: no


@workflow
def revert(run: Run, job: Settle) -> None:
    """The new machine is off before the old one runs, and removed when it does. Is its host gone, so is the machine."""
    s = job.server
    assert s.host is not None
    run.if_undone(undecided, job, run.id, run.now)
    job = msgspec.structs.replace(job, server=(s := moves.alone(run, s)))
    assert s.host is not None
    old = run(kept, job.migration)
    back, there = run(home, old.host, old.node), run(home, s.host, s.node)
    goal = run(returning, job, back, run.now)
    try:
        run(leave, s, s.host)
    except HostGone:
        pass
    joined = Joined(run(rebind, s, back, there), moves.carry(run, s, back))
    done = run(come_back, job, old, goal, joined)
    moves.carried(run, joined)
    run.no_return()
    try:
        run(leave_nothing, s.id, s.host, s.epoch)
    except Trouble:
        pass  # it is found there, and swept
    run(reverted, job, old, goal, joined, done.power_state, run.now)
    moves.left(run, s, joined)


@record
def returning(tx: Tx, job: Settle, back: Place, now: float) -> Goal:
    """Where it sat is its migration's as yet."""
    return Goal(back, migrations.next_epoch(tx, job.server, job.migration), seats.of(tx, job.migration))


@command(event="compute_revert_resize")
def leave(server: Server, host: str) -> To[Luggage]:
    return To(host, Depart(server=server.id, epoch=server.epoch, timeout_s=timeout_s(server)))


@leave.undo
def _(server: Server, host: str) -> To[Done]:
    return To(host, Stay(server=server.id, power_state=server.power_state))


@leave.on("abort")
def _(server: Server, host: str) -> To[Done]:
    return To(host, Abandon(server=server.id))


@command(patience_s=600, event="compute_finish_revert_resize")
def come_back(job: Settle, old: Kept, goal: Goal, joined: Joined) -> To[Done]:
    smaller = msgspec.structs.replace(job.server, flavor=old.flavor)
    machine = moves.machine(smaller, goal, joined)
    return To(old.host, Return(machine=machine, was=old.epoch, start=old.was == VM.active))


@come_back.undo
def _(job: Settle, old: Kept, goal: Goal, joined: Joined) -> To[Luggage]:
    """As it lay there."""
    return To(old.host, Depart(server=job.server.id, epoch=old.epoch, timeout_s=0))


@command(patience_s=600)
def leave_nothing(server: str, host: str, epoch: int) -> To[Done]:
    return To(host, Drop(server=server, epoch=epoch))


@record
def reverted(tx: Tx, job: Settle, old: Kept, goal: Goal, joined: Joined, power_state: int, now: float) -> None:
    moves.given_back(tx, job.server, job.migration, now)
    there = {"host": goal.place.host, "node": goal.place.node, "epoch": goal.epoch} | joined.facts
    size = servers.sized(old.flavor)
    servers.finish(tx, job.server, old.was, now, power_state=power_state, launched_at=now, **there, **size)
    migrations.change(tx, job.migration, now, Status.reverted)
