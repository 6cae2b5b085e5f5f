"""Live migration: a guest moves while it runs, and is itself on one host at any moment.

Until it has gone all can be undone, and it runs where it was.  When the source does not say whether it has gone, the
target is asked, which is told to expect nobody any longer: no answer is no answer.
"""

import msgspec

from kilonova.conductor import moves, outside, ports
from kilonova.conductor.moves import Goal, Joined
from kilonova.conductor.ports import Plugged
from kilonova.conductor.world import World
from kilonova.contracts.compute import (
    Abandon,
    CloseLanding,
    Destroy,
    Done,
    Drop,
    Hurry,
    Land,
    Landed,
    Landing,
    PrepareLanding,
    SendAway,
    Stay,
)
from kilonova.contracts.jobs import LiveMigrate
from kilonova.contracts.scheduler import Chosen
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import Aborted, HostGone, Refused, Trouble, Unavailable
from kilonova.kit.journal import reached
from kilonova.kit.workflow import FOREVER, Run, command, effect, record, workflow
from kilonova.model.host import Place
from kilonova.model.server import Server
from kilonova.model.states import Task
from kilonova.store import migrations, placement, servers
from kilonova.store.migrations import Status


@workflow
def live_migrate(run: Run, job: LiveMigrate) -> None:
    trouble: Trouble | None = None
    status = Status.error
    with run.attempt():
        try:
            run(queued, job, run.now)
            job = msgspec.structs.replace(job, server=moves.alone(run, job.server))
            run(moves.able, job.server.host or "", "SendAway", "Stay")
            run(turn, job, run.now)
            goal, joined, landing = land_somewhere(run, job)
            run(running, job, run.now)
            status = Status.failed
            sent(run, job, goal, landing)
            run.no_return()
            settle(run, job, goal, joined)
            return
        except Aborted as e:
            trouble, status = e, Status.cancelled
            raise Refused(e.said) from e  # all of it is undone now, and not only when the run has ended
        except Trouble as e:
            trouble = e
            raise
    assert trouble is not None
    run.if_undone(stayed, job, status, run.id, run.now)
    raise trouble


def land_somewhere(run: Run, job: LiveMigrate) -> tuple[Goal, Joined, Landing]:
    tried: list[str] = []
    last: Trouble | None = None
    chosen = Chosen()
    for turns in range(moves.TURNS):
        chosen = run(choose, job, tried, turns > 0)
        if not chosen.places:
            break
        for place in chosen.places:
            tried.append(place.host)
            with run.attempt():
                try:
                    goal = run(claim, job, place, run.now)
                    outside.agreed(run, chosen, job.server.id, job.migration)
                    joined = Joined(run(expect, job.server, place.host), moves.carry(run, job.server, place))
                    return goal, joined, run(prepare, job, goal, joined)
                except Trouble as e:
                    last = e
                    raise
    raise moves.nowhere(last, tried, chosen)


def sent(run: Run, job: LiveMigrate, goal: Goal, landing: Landing) -> None:
    s = job.server
    assert s.host is not None
    try:
        run(send, job, s.host, landing, goal.epoch)
    except Trouble:
        if not there(run, s, goal):
            raise


def there(run: Run, server: Server, goal: Goal) -> bool:
    """Did it go? The target decides, also when somebody has just called it off."""
    try:
        try:
            return run(arrived, server.id, goal.place.host, goal.epoch).there
        except Aborted:
            return run(arrived, server.id, goal.place.host, goal.epoch).there
    except HostGone:
        return False


def settle(run: Run, job: LiveMigrate, goal: Goal, joined: Joined) -> None:
    """It runs there. What is refused here must not hold up the rest: it is found by comparing."""
    s, power_state = job.server, job.server.power_state
    assert s.host is not None
    run(moved, job, goal, joined, run.now)
    run(switch, s, goal.place.host)
    try:
        power_state = run(land, job, goal, joined).power_state
    except Trouble:
        pass
    moves.carried_at_last(run, joined)
    try:
        run(leave_nothing, s.id, s.host, s.epoch)
    except Trouble:
        pass
    run(unexpect, s, s.host)
    run(settled, job, power_state, run.now)
    moves.left(run, s, joined)


# ---- its turn


@record
def queued(tx: Tx, job: LiveMigrate, now: float) -> None:
    migrations.change(tx, job.migration, now, Status.queued)


@record(patience_s=FOREVER)
def turn(tx: Tx, job: LiveMigrate, now: float) -> None:
    """So many at the same time leave a host; the others stay queued."""
    assert job.server.host is not None
    if job.most and migrations.sending(tx, job.server.host) >= job.most:
        raise Unavailable("Other servers leave this host just now.")
    migrations.change(tx, job.migration, now, Status.preparing)


# ---- where to


@effect(event="conductor_live_migrate_instance")
def choose(world: World, key: str, job: LiveMigrate, tried: list[str], fresh: bool) -> Chosen:
    if tried and job.host is not None:
        return Chosen()
    s = job.server
    avoid = [*tried, s.host or ""]
    return moves.choice(world, s, s.flavor, avoid=avoid, host=job.host, forced=job.forced, fresh=fresh)


@record
def claim(tx: Tx, job: LiveMigrate, place: Place, now: float) -> Goal:
    s = job.server
    return moves.claimed(tx, s, job.migration, place, s.flavor, now, Status.preparing)


@claim.undo
def _(tx: Tx, job: LiveMigrate, place: Place, now: float) -> None:
    moves.given_back(tx, job.server, job.migration, now)


@effect
def expect(world: World, key: str, server: Server, host: str) -> Plugged:
    """Its ports can come there."""
    return ports.expect(world, server, host)


@expect.undo
def _(world: World, key: str, server: Server, host: str) -> None:
    ports.unexpect(world, server, host)


@command(patience_s=300, event="compute_pre_live_migration")
def prepare(job: LiveMigrate, goal: Goal, joined: Joined) -> To[Landing]:
    return To(goal.place.host, PrepareLanding(machine=moves.machine(job.server, goal, joined)))


@prepare.undo
def _(job: LiveMigrate, goal: Goal, joined: Joined) -> To[Done]:
    """Whatever is there of it: when this is said it is decided that the guest stays where it was."""
    return To(goal.place.host, Drop(server=job.server.id, epoch=goal.epoch))


# ---- away


@record
def running(tx: Tx, job: LiveMigrate, now: float) -> None:
    migrations.change(tx, job.migration, now, Status.running)
    reached(tx, job.server.id, "live_migrate", "prepared", now)


@command(patience_s=86_400, event="compute_live_migration")
def send(job: LiveMigrate, source: str, landing: Landing, epoch: int) -> To[Done]:
    return To(source, SendAway(server=job.server.id, landing=landing, epoch=epoch, block=job.block))


@send.undo
def _(job: LiveMigrate, source: str, landing: Landing, epoch: int) -> To[Done]:
    return To(source, Stay(server=job.server.id, power_state=job.server.power_state))


@send.on("abort")
def _(job: LiveMigrate, source: str, landing: Landing, epoch: int) -> To[Done]:
    return To(source, Abandon(server=job.server.id))


@send.on("force_complete")
def _(job: LiveMigrate, source: str, landing: Landing, epoch: int) -> To[Done]:
    return To(source, Hurry(server=job.server.id))


@command(patience_s=FOREVER)
def arrived(server: str, target: str, epoch: int) -> To[Landed]:
    return To(target, CloseLanding(server=server, epoch=epoch))


# ---- there


@record
def moved(tx: Tx, job: LiveMigrate, goal: Goal, joined: Joined, now: float) -> None:
    there = {"host": goal.place.host, "node": goal.place.node, "epoch": goal.epoch}
    servers.step(tx, job.server, str(Task.migrating), now, **there, **joined.facts)
    migrations.change(tx, job.migration, now, Status.post_migrating)
    reached(tx, job.server.id, "live_migrate", "gone", now)


@effect(patience_s=FOREVER)
def switch(world: World, key: str, server: Server, host: str) -> None:
    ports.switch(world, server, host)


@command(patience_s=600, event="compute_post_live_migration_at_destination")
def land(job: LiveMigrate, goal: Goal, joined: Joined) -> To[Done]:
    return To(goal.place.host, Land(machine=moves.machine(job.server, goal, joined)))


@command(patience_s=600)
def leave_nothing(server: str, source: str, epoch: int) -> To[Done]:
    return To(source, Destroy(server=server, epoch=epoch))


@effect(patience_s=FOREVER)
def unexpect(world: World, key: str, server: Server, host: str) -> None:
    ports.unexpect(world, server, host)


@record
def settled(tx: Tx, job: LiveMigrate, power_state: int, now: float) -> None:
    placement.release(tx, job.migration, now=now)
    servers.finish(tx, job.server, job.server.vm_state, now, power_state=power_state, progress=0)
    migrations.change(tx, job.migration, now, Status.completed)
    reached(tx, job.server.id, "live_migrate", "landed", now)


@record
def stayed(tx: Tx, job: LiveMigrate, status: Status, run: str, now: float) -> None:
    servers.finish(tx, job.server, job.server.vm_state, now, fault_run=run)
    migrations.change(tx, job.migration, now, status)
