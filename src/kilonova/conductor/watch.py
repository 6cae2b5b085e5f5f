"""What nobody asked for: hosts say what they hold, and it is compared with what should be there.

A report may be old when it comes, so it is only a suspicion.  For each suspicion a hidden run asks the host again,
behind whatever is being done to that server, and judges in one transaction, on what is written then.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec

import kilonova
from kilonova.clients import Port
from kilonova.conductor import attach, meet, ports, resize
from kilonova.conductor.capture import unfinished
from kilonova.conductor.delete import reclaimed
from kilonova.conductor.shelve import lying
from kilonova.conductor.verbs import STEPS
from kilonova.conductor.world import World
from kilonova.contracts.compute import (
    Depart,
    Destroy,
    DetachNic,
    DetachShare,
    DetachVolume,
    Discard,
    Done,
    Drop,
    Look,
    Luggage,
    Power,
    Seen,
)
from kilonova.contracts.conductor import HeldHere, HypervisorAway, PowerChanged, Report, Sending
from kilonova.contracts.jobs import Settle
from kilonova.kit.bus import To, letter
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, HostGone, NotFound, Refused, Trouble
from kilonova.kit.journal import Said, tell
from kilonova.kit.reconcile import reconciler
from kilonova.kit.workflow import Cause, Run, command, forget, noted, record, start, wake_host, workflow
from kilonova.model.devices import Device
from kilonova.model.notices import COMPUTE, unreached
from kilonova.model.server import Server
from kilonova.model.states import VERBS, VM, PowerState, Task, Verb
from kilonova.store import compare, hosts, migrations, placement, seats, servers, shares
from kilonova.store.migrations import Status

log = logging.getLogger(__name__)

RUNNING, PAUSED = PowerState.running, PowerState.paused
DOWN = PowerState.shutdown, PowerState.crashed
RELEARN_S = 600.0  # then what a host says is written again, though it is the same: others write there, too
AGO_S = 1.0  # longer than what is said is on its way, and gathered
STUCK_S = 60.0  # so long a server may be on its way with nobody at work: no commit takes longer
DOUBTFUL = 50  # servers that are looked after at a time
KEEP_HIDDEN_S = 3600.0  # journals of what nobody asked for

KEPT_OFF = frozenset({VM.shelved, VM.soft_deleted})  # they are off, and stay what they are

# The verbs of nobody. As `stop`, from wherever a guest can be found off; and the way back after a host was off.
HALT = replace(VERBS["stop"], start=frozenset({VM.active, VM.stopped, VM.paused, *KEPT_OFF}), launched=False)
REVIVE = Verb("revive", frozenset({VM.active}), Task.powering_on, VM.active, "start", "start", host=True)


# ---- what hosts say


def reported(world: World, reports: Sequence[Report]) -> None:
    """Hosts live, and hold this. What does not fit is looked into."""
    reports = [r for r in reports if not meet.another(world, r)]
    now = world.clock.now()
    with world.guard:
        for r in reports:
            world.beats[r.host] = max(now, world.beats.get(r.host, 0.0))
    for r in reports:
        if r.host in world.forced_down:
            for server, epoch in world.db.look(_outlived, r):
                world.send(r.host, letter(Destroy(server=server, epoch=epoch), about=server))
    facts = {r.host: _facts(r) for r in reports if r.facts is not None}
    known, rest = _known(world, facts, now), dict[str, Report]()
    for r in reports:
        if world.lives.get(r.host) != r.born or (r.facts is not None and r.host not in known):
            _learned(world, r, facts.get(r.host, b""), now)
        else:
            rest[r.host] = r
    _compared(world, list(rest.values()), now)


def _learned(world: World, r: Report, facts: bytes, now: float) -> None:
    try:
        runs = world.db.run(_met, world, r, now)
    except Conflict:
        meet.turn_away(world, r)
        return
    written = world.db.look(hosts.written, [r.host]).get(r.host) if facts else None
    with world.guard:
        world.lives[r.host] = r.born
        world.well.pop(r.host, None)
        world.fits.pop(r.host, None)
        if facts:
            world.learned[r.host] = facts, now, written
    world.started(runs)


def _compared(world: World, reports: list[Report], now: float) -> None:
    """What fitted when it was said before is compared again with the next whole report: each minute, as a rule."""
    holds = {r.host: b"" if r.facts else _digest([r.holds, r.busy]) for r in reports}
    reports = [r for r in reports if not holds[r.host] or world.fits.get(r.host) != holds[r.host]]
    if not reports:
        return
    with world.db.read() as tx:
        odd, moved = _odd(tx, world, reports, now - AGO_S)
        suspects = {r.host: _idle(tx, r, odd[r.host]) for r in reports if odd[r.host]}
    with world.guard:
        for r in reports:
            world.fits[r.host] = b"" if odd[r.host] or r.host in moved else holds[r.host]
    for host, some in suspects.items():
        if some:
            world.started(world.db.run(_look_into, world, host, some, False))


def _facts(r: Report) -> bytes:
    """What it says of what lasts, as one value."""
    assert r.facts is not None
    said = (msgspec.structs.replace(r.facts, uptime=""), r.stocks, sorted(r.speaks), r.version, r.host_ip, r.identity)
    return _digest(said)


def _digest(said: Any) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode(said), digest_size=16).digest()


def _known(world: World, facts: dict[str, bytes], now: float) -> set[str]:
    """Who said the same a while ago; nobody has written other facts since, and nothing waits for their being back."""
    same = {}
    for host, mine in facts.items():
        said, at, written = world.learned.get(host, (b"", 0.0, None))
        if said == mine and written is not None and 0 <= now - at < RELEARN_S:
            same[host] = written
    if not same:
        return set()
    with world.db.read() as tx:
        there, left = hosts.written(tx, same), migrations.left(tx, same)
    return {host for host, written in same.items() if there.get(host) == written and host not in left}


def power_changed(world: World, m: PowerChanged) -> None:
    """A hint: whatever is so, the host will say when it is asked."""
    with world.db.read() as tx:
        row = compare.found(tx, [m.server]).get(m.server)
    if row is not None and row.host == m.host and row.task_state is None and row.power_state != m.power_state:
        world.started(world.db.run(_look_into, world, m.host, [m.server], False))


def hypervisor_away(world: World, m: HypervisorAway) -> None:
    """Nothing follows from it: the host is down in time. Who listens is told why."""
    said = Said(
        event="libvirt.connect.error", binary=COMPUTE, at=m.at, host=m.host, of=lambda tx: unreached(m.host_ip, m.why)
    )
    world.db.run(tell, said)


def sending(world: World, m: Sending) -> None:
    """How far a live migration is: for those who watch it, and never later than it ends."""
    fields = "memory_total memory_remaining memory_processed disk_total disk_remaining disk_processed".split()
    world.db.run(migrations.progress, m.server, m.host, world.clock.now(), {f: getattr(m, f) for f in fields})


def _met(tx: Tx, world: World, r: Report, now: float) -> list[str]:
    """Write down what it says of itself. Whom to wake.

    With another life of it than we knew, the letters of who waits for it may be lost.  What should run and does not
    is found in the same transaction: there is only one first report.
    """
    before = hosts.heard(tx, r.host)
    hosts.learn(tx, r, uuid=world.ids.uuid, now=now)
    _told_of_evacuations(tx, r, now)
    reborn = before is not None and before.born != r.born
    woken = wake_host(tx, r.host) if reborn else []
    suspects = _idle(tx, r, _odd(tx, world, [r])[0][r.host]) if before is not None else []
    return woken + _look_into(tx, world, r.host, suspects, reborn)


def _told_of_evacuations(tx: Tx, r: Report, now: float) -> None:
    """It is back, and holds nothing any longer of what left it when it was down: its share is free."""
    for m in migrations.evacuated(tx, r.host):
        there = m.server in r.busy or any(h.server == m.server and h.epoch <= m.source_epoch for h in r.holds)
        if not there and r.at >= m.created_at:
            placement.release(tx, m.uuid, now=now)
            migrations.change(tx, m.uuid, now, Status.completed)


def _outlived(tx: Tx, r: Report) -> list[tuple[str, int]]:
    """What a host that is said to be down, and speaks, has of servers that live elsewhere by now: (server, epoch).

    No run can tell it anything, for nobody waits for a host that is down; and none is needed: it is fenced by the epoch.
    """
    held = {h.server: h.epoch for h in r.holds}
    gone = compare.moved_away(tx, r.host, held) - migrations.kept(tx, r.host).keys() - compare.at_work(tx, held)
    return [(id, held[id]) for id in sorted(gone)]


def _odd(
    tx: Tx, world: World, reports: list[Report], ago: float = float("inf")
) -> tuple[dict[str, list[str]], set[str]]:
    """Of each host the servers of which it has something else than it should; and hosts of which that cannot be said yet.

    `ago`: of a server that was changed since, and after the report, that one knows nothing; the next one will.
    """
    here = compare.on_hosts(tx, [r.host for r in reports])
    odd, moved, whole = dict[str, list[str]](), set[str](), list[HeldHere]()
    for r in reports:
        held = {h.server: h for h in r.holds}  # of two, the newer
        before = max(r.at, ago)
        mine = {id: row for id, row in here[r.host].items() if not _since(row, before)}
        loose = [h for h in r.holds if h.server not in here[r.host]]
        beside = [h for h in r.holds if h is not held[h.server]]
        kept = migrations.kept(tx, r.host) if loose or beside else {}
        strange, fresh = _strange(tx, world, r.host, [h for h in loose if kept.get(h.server) != h.epoch], before)
        differ = [id for id, row in mine.items() if _differs(row, held.get(id))]
        odd[r.host] = strange + differ + [h.server for h in beside if kept.get(h.server) != h.epoch]
        whole += [held[id] for id, row in mine.items() if id in held and row.task_state is None]
        if fresh or len(mine) < len(here[r.host]):
            moved.add(r.host)
    plugged = set(_otherwise_plugged(tx, whole))
    for r in reports:
        odd[r.host] = list(dict.fromkeys(odd[r.host] + [id for id in here[r.host] if id in plugged]))
    return odd, moved


def _since(row: Any, before: float) -> bool:
    return (row.updated_at or 0.0) > before


def _strange(tx: Tx, world: World, host: str, loose: list[HeldHere], before: float) -> tuple[list[str], bool]:
    """Those of these machines that are of no server here, and have not been for a while; are there others?"""
    if not loose:
        return [], False
    epochs = {h.server: h.epoch for h in loose}
    rows = compare.found(tx, epochs)
    strange = [id for id in epochs if id not in rows or not _since(rows[id], before)]
    fresh = len(strange) < len(epochs)
    if strange and world.config.compute.lost_server == "log":
        moved = compare.moved_away(tx, host, {id: epochs[id] for id in strange})
        if lost := [id for id in strange if id not in moved]:
            log.warning("%s has machines that no server of it owns: %s", host, ", ".join(lost))
        strange = sorted(moved)
    return strange, fresh


def _idle(tx: Tx, r: Report, odd: list[str]) -> list[str]:
    """Those of them that nobody is at work on."""
    wanted = [id for id in odd if id not in r.busy]
    known = hosts.heard(tx, r.host) if wanted else None
    if known is not None and known.forced_down:
        return []  # nothing can be told to it
    at_work = compare.at_work(tx, wanted)
    return [id for id in wanted if id not in at_work]


def _differs(row: Any, held: HeldHere | None) -> bool:
    if row.task_state is not None or row.vm_state == VM.building:
        return False
    if held is None:
        return str(row.vm_state) != VM.error  # a build or an act that failed may well have left nothing
    return bool(held.power_state != row.power_state or held.captures)


def _otherwise_plugged(tx: Tx, held: list[HeldHere]) -> list[str]:
    """Those with a NIC, a volume or a share that is not theirs, or without a volume or a share that is.

    It was taken back while the host was not there to hear of it; or taken out, and nobody was there to hear of that.
    """
    found: list[str] = []
    nics = {h.server: set(h.ports) for h in held if h.ports}
    disks = {h.server: set(h.volumes) for h in held if h.volumes is not None}
    trees = {h.server: set(h.shares) for h in held if h.shares is not None}
    for told, ask in ((nics, compare.plugs), (disks, compare.volumes), (trees, compare.shares)):
        known = ask(tx, told) if told else {}
        found += [id for id, parts in told.items() if parts - known.get(id, parts)]
    found += [id for id, lacks in _lacking(tx, disks).items() if lacks]
    found += [id for id, mine in (compare.shares(tx, trees, settled=True) if trees else {}).items() if mine - trees[id]]
    return list(dict.fromkeys(found))


def _lacking(tx: Tx, disks: dict[str, set[str]]) -> dict[str, list[Device]]:
    """What hosts have, against the volumes that are the servers' and neither come nor go."""
    settled = compare.settled(tx, disks) if disks else {}
    return {id: [d for d in devices if d.volume_id not in disks[id]] for id, devices in settled.items()}


def look_into(tx: Tx, world: World, host: str, suspects: list[str]) -> list[str]:
    """For who suspects them for reasons of his own. The runs."""
    return _look_into(tx, world, host, suspects, False)


def _look_into(tx: Tx, world: World, host: str, suspects: list[str], reborn: bool) -> list[str]:
    """A hidden run for each that nobody is at work on. Whom to wake."""
    if not suspects:
        return []
    free = set(suspects) - compare.at_work(tx, suspects)
    rows = compare.found(tx, suspects)
    orphans: Literal["stop", "destroy"] = "stop" if world.config.compute.lost_server == "stop" else "destroy"
    revive = reborn and world.config.compute.resume_servers_on_start
    now = world.clock.now()
    lost = {id for id in suspects if id not in rows or rows[id].deleted_at is not None}
    jobs = [
        Mend(id, host, rows[id].generation if id in rows else 0, orphans if id in lost else "destroy", revive)
        for id in suspects
        if id in free
    ]
    return [start(tx, mend, job, id=world.ids.uuid(), subject=job.server, now=now) for job in jobs]


# ---- looking into one


class Mend(msgspec.Struct, frozen=True):
    """`generation`: of the server when it was suspected; if it moves, another was at it and what was seen is old.

    `revive`: the host has just begun to live; what should run and does not is started again.
    """

    server: str
    host: str
    generation: int
    orphan: Literal["stop", "destroy"] = "destroy"
    revive: bool = False


class Verdict(msgspec.Struct, frozen=True):
    """`unplug`: its parts are not those that are written.  `beside`: an older machine lies there, and nobody will come back to it.  `keep`: what is kept for a revert began to
    come back, and its host was not there to hear that nothing came of it; `epoch` is what it is to be of."""

    do: Literal["nothing", "orphan", "beside", "lost", "halt", "revive", "unplug", "keep"]
    server: Server | None = None  # as it was taken
    ports: list[str] = []  # of NICs that are not its own
    volumes: list[str] = []  # the same of disks
    shares: list[str] = []  # the same of shared file systems
    lacks: list[Device] = []  # its own, and not in the machine
    epoch: int = 0


@workflow
def mend(run: Run, job: Mend) -> None:
    run.when_alone()
    seen = run(look, job.server, job.host)
    for image_id in seen.captures:  # nobody is at work on it, so nobody wants them
        run(discard, job.server, job.host, image_id)
    verdict = run(judged, job, seen, run.id, run.now)
    if verdict.do == "orphan":
        if job.orphan == "destroy":
            run(destroy, job.server, job.host, seen.epoch)
        else:
            run(halt, job.server, job.host)
    elif verdict.do == "beside" and seen.kept is not None:
        run(drop, job.server, job.host, seen.kept)
    elif verdict.do == "keep":
        run(keep, job.server, job.host, verdict.epoch)
    elif verdict.do == "unplug":
        for port_id in verdict.ports:
            run(unplug, job.server, job.host, port_id)
        for volume_id in verdict.volumes:
            run(take_out, job.server, job.host, volume_id)
        for share_id in verdict.shares:
            run(let_go, job.server, job.host, share_id)
        if verdict.server is not None:
            for device in verdict.lacks:
                way = run(attach.connect, job.server, device, job.host)
                run(attach.plug_in, verdict.server, job.host, device, way.connection)
    elif verdict.server is not None:
        take_up(run, job, verdict.do, verdict.server)


def take_up(run: Run, job: Mend, do: str, server: Server) -> None:
    """It was taken in the transaction that judged; now it has to be put down."""
    if do == "lost":
        run.if_undone(broken, server, 0, run.id, run.now)
        raise Refused(f"The machine of instance {server.id} is no longer on its host.")
    if do == "halt":
        try:
            done = run(halt, job.server, job.host)
        except Trouble:
            run.if_undone(broken, server, server.power_state, run.id, run.now)
            raise
        run(halted, server, done.power_state, run.id, run.now)
    if do == "revive":
        try:
            done = run(STEPS["start"], server, job.host)
        except Trouble:
            run.if_undone(broken, server, PowerState.shutdown, run.id, run.now)
            raise
        run(revived, server, done.power_state, run.now)


@command(patience_s=120)
def look(server: str, host: str) -> To[Seen]:
    return To(host, Look(server=server))


@command
def discard(server: str, host: str, image_id: str) -> To[Done]:
    return To(host, Discard(server=server, image_id=image_id))


@command
def destroy(server: str, host: str, epoch: int) -> To[Done]:
    return To(host, Destroy(server=server, epoch=epoch))


@command
def drop(server: str, host: str, epoch: int) -> To[Done]:
    return To(host, Drop(server=server, epoch=epoch))


@command
def keep(server: str, host: str, epoch: int) -> To[Luggage]:
    return To(host, Depart(server=server, epoch=epoch, timeout_s=0))


@command(patience_s=120)
def unplug(server: str, host: str, port_id: str) -> To[Done]:
    return To(host, DetachNic(server=server, port_id=port_id, timeout_s=0, anyway=True))


@command(patience_s=120)
def take_out(server: str, host: str, volume_id: str) -> To[Done]:
    return To(host, DetachVolume(server=server, volume_id=volume_id, timeout_s=0, anyway=True))


@command(patience_s=120)
def let_go(server: str, host: str, share_id: str) -> To[Done]:
    return To(host, DetachShare(server=server, share_id=share_id, anyway=True))


@command(patience_s=600)
def halt(server: str, host: str) -> To[Done]:
    return To(host, Power(server=server, to="stop", timeout_s=0))


@record
def judged(tx: Tx, job: Mend, seen: Seen, me: str, now: float) -> Verdict:
    """What is wrong, if anything is; the server is taken, if something must be done to it."""
    row = compare.found(tx, [job.server]).get(job.server)
    kept = migrations.kept(tx, job.host).get(job.server)
    there_epoch = row.epoch if row is not None and row.host == job.host else 0
    if row is not None and row.deleted_at is None and kept is not None and seen.epoch > max(kept, there_epoch):
        return Verdict("keep", epoch=kept)
    if row is None or row.deleted_at is not None or row.host != job.host:
        return Verdict("orphan" if seen.there and seen.epoch != kept else "nothing")
    if seen.kept is not None and seen.kept != kept:
        return Verdict("beside")
    if row.generation != job.generation or row.task_state is not None or row.vm_state == VM.building:
        return Verdict("nothing")
    if not seen.there:
        return Verdict("lost", servers.get(tx, job.server))
    loose = set(seen.ports or ()) - compare.plugs(tx, [job.server])[job.server]
    strange = set(seen.volumes or ()) - compare.volumes(tx, [job.server])[job.server]
    lacks = [] if seen.volumes is None else _lacking(tx, {job.server: set(seen.volumes)}).get(job.server, [])
    trees = set() if seen.shares is None else set(seen.shares) - compare.shares(tx, [job.server])[job.server]
    if seen.shares is not None:
        shares.lost(tx, job.server, set(seen.shares))
    if loose or strange or trees or lacks:
        server = servers.get(tx, job.server) if lacks else None
        return Verdict("unplug", server, sorted(loose), sorted(strange), sorted(trees), lacks)
    return _power_judged(tx, job, VM(row.vm_state), PowerState(seen.power_state), row.power_state, me, now)


def _power_judged(tx: Tx, job: Mend, vm: VM, power: PowerState, written: int, me: str, now: float) -> Verdict:
    """states.md, section 10; but what ran when its host went down runs again when the host is back."""
    if vm == VM.active and power in DOWN and job.revive:
        return Verdict("revive", servers.begin(tx, job.server, REVIVE, now))
    if vm == VM.active and power == PowerState.shutdown:  # it turned itself off: nothing is left to be done
        server = servers.begin(tx, job.server, HALT, now)
        servers.finish(tx, server, VM.stopped, now, power_state=int(power))
        _noted_stop(tx, server, me, now)
        return Verdict("nothing")
    if (
        (vm == VM.active and power in (PowerState.crashed, PowerState.suspended))
        or (vm == VM.stopped and power in (RUNNING, PAUSED, PowerState.suspended))
        or (vm == VM.paused and power in DOWN)
        or (vm in KEPT_OFF and power in (RUNNING, PAUSED, PowerState.suspended))
    ):
        return Verdict("halt", servers.begin(tx, job.server, HALT, now))
    if power != written:
        servers.change(tx, job.server, now, power_state=int(power))
    return Verdict("nothing")


@record
def halted(tx: Tx, server: Server, power_state: int, me: str, now: float) -> None:
    to = server.vm_state if server.vm_state in KEPT_OFF else VM.stopped
    if servers.finish(tx, server, to, now, power_state=power_state) and to == VM.stopped:
        _noted_stop(tx, server, me, now)


@record
def revived(tx: Tx, server: Server, power_state: int, now: float) -> None:
    servers.finish(tx, server, VM.active, now, power_state=power_state)


@record
def broken(tx: Tx, server: Server, power_state: int, run: str, now: float) -> None:
    servers.finish(tx, server, VM.error, now, power_state=power_state, fault_run=run)


def _noted_stop(tx: Tx, server: Server, me: str, now: float) -> None:
    """Users find it among the server's actions, though none of them asked for it."""
    cause = Cause(action="stop", request_id=f"req-{me[:36]}", project_id=server.project_id)
    noted(tx, id=f"{me}-stop", subject=server.id, now=now, cause=cause, event="compute_stop_instance", host=server.host)


# ---- what must not happen


class Heal(msgspec.Struct, frozen=True):
    server: Server


@workflow
def heal(run: Run, job: Heal) -> None:
    run.if_undone(broken, job.server, job.server.power_state, run.id, run.now)
    raise Trouble("The action came to an end that was not written down.")


@reconciler(every_s=60)
def stuck(world: World) -> list[str]:
    """A server on its way that no run is at: it can be deleted, but nobody must wait for it any longer."""
    before = world.clock.now() - STUCK_S
    with world.db.read() as tx:
        found = compare.stuck(tx, before)
    return [said for id in found if (said := world.db.run(_heal, world, id, before))]


def _heal(tx: Tx, world: World, id: str, before: float) -> str | None:
    if id not in compare.stuck(tx, before, most=10_000):
        return None
    server, now = servers.get(tx, id), world.clock.now()
    start(tx, heal, Heal(server), id=world.ids.uuid(), subject=id, now=now)
    return f"{id} was {server.vm_state}, {server.task_state}, and nobody at work on it"


# ---- moves that nobody decides


class Tidy(msgspec.Struct, frozen=True):
    server: str
    migration: str


@workflow
def tidy(run: Run, job: Tidy) -> None:
    """A server that waited for a word is something else by now, by an administrator's: what is kept of it is dropped."""
    run.when_alone()
    old = run(resize.kept, job.migration)
    if not run(abandoned, job):
        return
    try:
        run(drop, job.server, old.host, old.epoch)
    except HostGone:
        pass
    run(tidied, job, run.now)


@record
def abandoned(tx: Tx, job: Tidy) -> bool:
    return any(m.uuid == job.migration for m in compare.abandoned(tx))


@record
def tidied(tx: Tx, job: Tidy, now: float) -> None:
    placement.release(tx, job.migration, now=now)
    migrations.change(tx, job.migration, now, Status.confirmed)
    s = servers.get(tx, job.server)
    servers.change(tx, s.id, None, vcpus=s.flavor.vcpus, memory_mb=s.flavor.memory_mb)


@reconciler(every_s=60)
def undecided(world: World) -> list[str]:
    """A resize is confirmed when its user says nothing for long, if the operator wants it so; or when it makes no sense any more."""
    window_s, now = world.config.compute.resize_confirm_window_s, world.clock.now()
    with world.db.read() as tx:
        late = compare.undecided(tx, now - window_s) if window_s else []
        odd = compare.abandoned(tx)
    said = [f"the resize of {m.server} is confirmed" for m in late if world.db.run(_confirm, world, m.server, m.uuid)]
    return said + [f"the resize of {m.server} is dropped" for m in odd if world.db.run(_tidy, world, m.server, m.uuid)]


def _confirm(tx: Tx, world: World, server: str, migration: str) -> bool:
    now = world.clock.now()
    m = migrations.unfinished(tx, server)
    if m is None or m.uuid != migration:
        return False
    try:
        s = servers.begin(tx, server, VERBS["confirm"], now)
    except (Conflict, NotFound):
        return False
    migrations.change(tx, migration, now, Status.confirming)
    cause = Cause(action="confirmResize", request_id=world.ids.request(), project_id=s.project_id)
    start(tx, resize.confirm, Settle(s, migration), id=world.ids.uuid(), subject=server, now=now, cause=cause)
    return True


def _tidy(tx: Tx, world: World, server: str, migration: str) -> bool:
    if server in compare.at_work(tx, [server]):
        return False
    start(tx, tidy, Tidy(server, migration), id=world.ids.uuid(), subject=server, now=world.clock.now())
    return True


# ---- in its own rhythm


@reconciler(every_s=2, at_once=True)
def beats(world: World) -> list[str]:
    """Write down who was heard of."""
    with world.guard:
        heard, world.beats = world.beats, {}
    if heard:
        world.db.run(hosts.seen, heard)
    return []


@reconciler(every_s=10, at_once=True)
def present(world: World) -> list[str]:
    """Say that we live, as the services that we are."""
    me, now = world.me, world.clock.now()
    ours = (hosts.CONDUCTOR,) if world.config.scheduler.apart else (hosts.CONDUCTOR, hosts.SCHEDULER)

    def write(tx: Tx) -> None:
        for binary in ours:
            hosts.beat(tx, me, binary, uuid=world.ids.uuid, now=now, born=world.born, version=kilonova.__version__)

    world.db.run(write)
    return []


@reconciler(every_s=10)
def silent_hosts(world: World) -> list[str]:
    """A host that nobody should wait for any longer: let those who wait look at once."""

    def look_again(tx: Tx) -> list[str]:
        all = hosts.all_heard(tx)
        world.forced_down = frozenset(s.host for s in all if s.forced_down)
        gone = [s.host for s in all if world.silent(s.host, s)]
        return [id for host in gone for id in wake_host(tx, host)]

    world.started(world.db.run(look_again))
    return []


@reconciler(every_s=120)
def claims(world: World) -> list[str]:
    """What nobody holds any longer is given back; what somebody uses is claimed, if there is room."""
    with world.db.read() as tx:
        loose, bare = compare.unowned(tx), compare.unclaimed(tx)
    return world.db.run(_claims_mended, world, loose, bare) if loose or bare else []


def _claims_mended(tx: Tx, world: World, loose: list[tuple[str, str]], bare: list[tuple[str, str]]) -> list[str]:
    said, now = [], world.clock.now()
    for consumer, provider in set(loose) & set(compare.unowned(tx, 10_000)):
        if placement.release(tx, consumer, provider, now=now):
            said.append(f"{consumer} held something of {provider} and is not there")
    for id, provider in set(bare) & set(compare.unclaimed(tx, 10_000)):
        if seats.claim_anyhow(tx, servers.get(tx, id), provider, now=now):
            said.append(f"{id} is on {provider} and held nothing of it")
    return sorted(said)


@reconciler(every_s=600)
def counts(world: World) -> list[str]:
    """What is held of a host is what its holders hold, together."""
    with world.db.read() as tx:
        odd = compare.miscounted(tx)
    now = world.clock.now()
    return [
        f"of {provider} {used} {name} were counted, and {held} are held"
        for provider, name, used, held in odd
        if world.db.run(placement.recount, provider, name, now=now)
    ]


@reconciler(every_s=300)
def strays(world: World) -> list[str]:
    """Ports that we made or bound, and that no server has: their run has ended, and their server does not know them.

    A conductor that stalls between its look at the lease and its request acts long after another has undone that
    act.  A host remembers what was taken back; a network service does not, so this is compared.
    """
    return _let_go(world, stray_ports(world))


@reconciler(every_s=5)
def doubtful(world: World) -> list[str]:
    """The same, soon and of few servers: those for which a port was asked for, and no answer came."""
    now = world.clock.now()
    with world.guard:
        due = sorted(server for server, times in world.doubts.items() if times[0] <= now)[:DOUBTFUL]
    if not due:
        return []
    with world.db.read() as tx:
        due = sorted(set(due) - compare.at_work(tx, due))
    found = world.neighbours.network.ports(servers=due) if due else []
    said = _let_go(world, _strays_of(world, found))
    with world.guard:
        for server in due:
            if not (left := [at for at in world.doubts.pop(server, []) if at > now]):
                continue
            world.doubts[server] = left
    return said


def _let_go(world: World, found: list[Port]) -> list[str]:
    said = []
    for p in found:
        ports.let_go(world, p)
        said.append(f"port {p.id} was left of {p.device_id or ''}")
    return said


def stray_ports(world: World) -> list[Port]:
    """Those of `strays`."""
    return _strays_of(world, _ports_of_servers(world))


def _strays_of(world: World, found: list[Port]) -> list[Port]:
    made = [p for p in found if ports.ours(p) or p.host]
    servers = {p.device_id or "" for p in made}
    with world.db.read() as tx:
        at_work = compare.at_work(tx, servers)
        known = compare.plugs(tx, servers)
    return [p for p in made if (id := p.device_id or "") not in at_work and p.id not in known.get(id, set())]


def _ports_of_servers(world: World) -> list[Port]:
    """Such as say of themselves that they are, in whatever zone."""
    named = world.config.api.default_availability_zone
    with world.db.read() as tx:
        owners = sorted({f"compute:{z}" for z in {named, "nova", *hosts.zones(tx).values()}})
    return world.neighbours.network.ports(device_owner=owners)


@reconciler(every_s=300)
def misplaced(world: World) -> list[str]:
    """Ports that are on another host than their server: who moved it, or took that back, came late or had no answer."""
    named, said = world.config.api.default_availability_zone, []
    with world.db.read() as tx:
        zones = hosts.zones(tx)
        lately = compare.lately_moved(tx, world.clock.now() - KEEP_HIDDEN_S)
    for p, s in resting_ports(world):
        if s.host is None and p.host:
            ports.unbind(world, s, p.host)
            said.append(f"port {p.id} of {s.id} was on {p.host}")
        elif s.host is not None and p.host != s.host:
            ports.bring(world, p, s, zones.get(s.host, named))
            said.append(f"port {p.id} of {s.id} was on {p.host}")
        elif s.id in lately:
            said += [f"port {p.id} of {s.id} could still come to {host}" for host in ports.alone(world, p)]
    return said


def resting_ports(world: World) -> list[tuple[Port, Server]]:
    """Ports with the servers that they are of, as far as nobody is at work on those."""
    found = [p for p in _ports_of_servers(world) if p.device_id]
    with world.db.read() as tx:
        rest = compare.at_rest(tx, {p.device_id or "" for p in found})
    pairs = [(p, s) for p in found if (s := rest.get(p.device_id or "")) is not None]
    return [(p, s) for p, s in pairs if s.vm_state != VM.building and p.id in {plug.port_id for plug in s.plugs}]


@reconciler(every_s=600)
def journals(world: World) -> list[str]:
    """Drop what nobody asked for and nobody will ask about."""
    while world.db.run(forget, world.clock.now() - KEEP_HIDDEN_S, hidden_only=True) >= 500:
        pass
    return []


RECONCILERS = [
    beats,
    present,
    silent_hosts,
    stuck,
    claims,
    counts,
    undecided,
    strays,
    doubtful,
    misplaced,
    unfinished,
    lying,
    reclaimed,
    journals,
]
