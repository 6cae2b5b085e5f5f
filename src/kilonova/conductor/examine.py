"""Examine: all that must be equal and is kept in two places, looked at together, for an operator who asks (`kilonova doctor`).

Nothing here knows better than the reconcilers of `watch.py` and its like: what it finds is what they would, and mending is
calling them now.  What somebody is at work on, or was since the examination began, is left alone: it may change any moment.
A run a host, so that a slow or silent one keeps no other waiting.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec

from kilonova.conductor import capture, shares, volumes, watch
from kilonova.conductor.world import World
from kilonova.contracts.compute import Holdings, TellHoldings
from kilonova.contracts.conductor import HeldHere
from kilonova.contracts.jobs import Examine, ExamineHost
from kilonova.kit.bus import To
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Trouble
from kilonova.kit.journal import again, faults_of, stuck
from kilonova.kit.reconcile import Reconciler
from kilonova.kit.workflow import Run, command, effect, workflow
from kilonova.model.ask import amounts_of
from kilonova.model.server import Server
from kilonova.model.states import VM
from kilonova.store import block_devices, compare, migrations, servers

log = logging.getLogger(__name__)

LATE_S = 120.0  # so long a run may be due with nobody there to look; a commit takes no longer
PAGE = 500
MOST = 500  # findings of one kind: who has more has one trouble, not many
Kind = Literal["run", "server", "claim", "move", "port", "volume", "share", "image", "machine", "host", "service"]


class Finding(msgspec.Struct, frozen=True):
    """What is not as it must be, in words; and what puts it right: "" where a person must."""

    kind: Kind
    subject: str
    said: str
    mends: str = ""


class Found(msgspec.Struct, frozen=True):
    """`mended`: what was put right, or begun to be. `runs`: those that are at it."""

    findings: list[Finding] = []
    mended: list[str] = []
    runs: list[str] = []


# ---- what is written, and what neighbours say


@workflow
def examine(run: Run, job: Examine) -> None:
    run(written, job)
    if job.mend:
        run(mended)


@effect(patience_s=120)
def written(world: World, key: str, job: Examine) -> Found:
    found = examined(world.db, world.clock.now())
    for ask in (_ports, _volumes, _images, _shares):
        try:
            found += list(ask(world))[:MOST]
        except Trouble as e:
            found.append(Finding("service", ask.__name__.strip("_"), f"could not be looked at: {e.said}"))
    return Found(found)


@effect(patience_s=300)
def mended(world: World, key: str) -> Found:
    """Each reconciler once. What one of them cannot do, the others still do."""
    said, runs = [], list[str]()
    for reconciler in MENDERS:
        try:
            said += reconciler(world)
        except Trouble as e:
            log.warning("%s could not mend: %s", reconciler.name, e.said)
    with world.db.read() as tx:
        waiting = [a.run for a in stuck(tx)]
    for id in waiting:
        if world.db.run(again, id, world.clock.now()):
            said.append(f"run {id} tries again")
            runs.append(id)
    world.started(runs)
    return Found(mended=said, runs=runs)


MENDERS: list[Reconciler] = [
    watch.stuck, watch.claims, watch.counts, watch.undecided, watch.strays, watch.misplaced,
    volumes.promises, volumes.loose, volumes.halfway, volumes.astray, capture.unfinished, shares.open_doors,
]  # fmt: skip


def examined(db: Db, now: float) -> list[Finding]:
    """What is written, held against itself. Needs no conductor."""
    found: list[Finding] = []
    for ask in (_runs, _servers, _claims, _moves):
        with db.read() as tx:
            found += list(ask(tx, now))[:MOST]
    return found + list(_each(db))[:MOST]


def _runs(tx: Tx, now: float) -> Iterator[Finding]:
    for a in stuck(tx):
        why = a.fault.said if a.fault else "nobody knows why"
        yield Finding("run", a.run, f"{a.workflow} of {a.subject} is stuck: {why}", "another try")
    for r in compare.overdue(tx, now - LATE_S, MOST):
        late = now - (r.due or now)
        said = f"{r.workflow} of {r.subject} has waited for a conductor" + (f" for {late:.0f} s" if r.due else "")
        yield Finding("run", r.id, said)


def _servers(tx: Tx, now: float) -> Iterator[Finding]:
    for id in compare.stuck(tx, now - watch.STUCK_S, MOST):
        yield Finding("server", id, "is on its way, and nobody is at work on it", "stuck")
    overdue = block_devices.overdue(tx, now - volumes.OVERDUE_S)
    for p in overdue[:MOST]:
        yield Finding("volume", p.volume or p.device, f"was reserved for {p.server}, which came to nothing", "promises")


def _claims(tx: Tx, now: float) -> Iterator[Finding]:
    for consumer, provider in compare.unowned(tx, MOST):
        yield Finding("claim", consumer, f"holds something of {provider} and is not there", "claims")
    for id, provider in compare.unclaimed(tx, MOST):
        yield Finding("claim", id, f"is on {provider} and holds nothing of it", "claims")
    for provider, name, used, held in compare.miscounted(tx, MOST):
        yield Finding("claim", provider, f"{used} {name} are counted, and {held} are held", "counts")


def _moves(tx: Tx, now: float) -> Iterator[Finding]:
    for m in compare.abandoned(tx, MOST):
        yield Finding(
            "move", m.uuid, f"the {m.type} of {m.server} waits for a word that makes no sense any more", "undecided"
        )
    for m in compare.left_under_way(tx, now - LATE_S, MOST):
        yield Finding("move", m.uuid, f"the {m.type} of {m.server} is {m.status}, and nobody is at work on it")


def _each(db: Db) -> Iterator[Finding]:
    """All living servers at rest, a page at a time: claims are as their flavors say, and who is in error says why."""
    last = 0
    while True:
        with db.snapshot() as tx:
            query = servers.SELECT.where(servers.T.c.number > last, servers.T.c.deleted_at.is_(None))
            rows = tx.execute(query.order_by(servers.T.c.number).limit(PAGE)).all()
            all = [servers.of(r) for r in rows]
            busy = compare.at_work(tx, [s.id for s in all])
            claimed = compare.claimed(tx, [s.id for s in all])
            faults = faults_of(tx, [s.fault_run for s in all if s.vm_state == VM.error and s.fault_run])
        if not rows:
            return
        last = rows[-1].number
        for s in all:
            if s.id not in busy and s.task_state is None:
                yield from _of_server(s, claimed.get(s.id, {}), faults)


def _of_server(s: Server, claimed: dict[str, dict[str, int]], faults: dict[str, Any]) -> Iterator[Finding]:
    wanted = amounts_of(s)
    for host, held in claimed.items():
        if host == s.host and held != wanted:
            yield Finding("claim", s.id, f"holds {_listed(held)} of {host}, and should hold {_listed(wanted)}")
    if s.vm_state == VM.error and (s.fault_run is None or faults.get(s.fault_run) is None):
        yield Finding("server", s.id, "is in error, and nobody says why")


def _listed(amounts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(amounts.items())) or "nothing"


def _ports(world: World) -> Iterator[Finding]:
    for p in watch.stray_ports(world):
        yield Finding("port", p.id, f"was left of {p.device_id}", "strays")
    for p, s in watch.resting_ports(world):
        if (p.host or None) != s.host:
            yield Finding(
                "port", p.id, f"is on {p.host or 'no host'}, and its server {s.id} on {s.host or 'none'}", "misplaced"
            )


def _volumes(world: World) -> Iterator[Finding]:
    for a in volumes.left_over(world):
        yield Finding("volume", a.volume_id, f"its attachment {a.id} was left of {a.server_id}", "loose")
    for volume, server in volumes.staying(world):
        yield Finding("volume", volume, f"is said to be leaving {server}, and nobody is at it", "halfway")
    for host, s, d in volumes.led_elsewhere(world):
        yield Finding("volume", d.volume_id or "", f"leads to {host}, and its server {s.id} is on {s.host}", "astray")


def _shares(world: World) -> Iterator[Finding]:
    for id, said in shares.left_open(world):
        yield Finding("share", id, said, "open_doors")


def _images(world: World) -> Iterator[Finding]:
    for image in capture.without_bytes(world):
        yield Finding("image", image.id, "has no bytes, and nobody is bringing them", "unfinished")


# ---- what a host holds


@workflow
def examine_host(run: Run, job: ExamineHost) -> None:
    run(compared, job, run(holdings, job.host))


@command(patience_s=60)
def holdings(host: str) -> To[Holdings]:
    return To(host, TellHoldings())


@effect(patience_s=120)
def compared(world: World, key: str, job: ExamineHost, told: Holdings) -> Found:
    """With `mend`, a hidden run looks into each server that something is found of: it asks the host again, and judges then."""
    with world.db.read() as tx:
        found = against(tx, job.host, told, job.since)
    subjects = list(dict.fromkeys(f.subject for f in found if f.mends))
    if not job.mend or not subjects:
        return Found(found)
    runs = world.db.run(watch.look_into, world, job.host, subjects)
    world.started(runs)
    return Found(found, [f"{job.host}: looked into {len(runs)} servers"] if runs else [], runs)


def against(tx: Tx, host: str, told: Holdings, since: float) -> list[Finding]:
    """In what a host differs from what is written of it, but for what somebody was at since that moment."""
    here = compare.on_host(tx, host)
    ids = list(dict.fromkeys([h.server for h in told.holds] + list(here)))
    busy = set(told.busy)
    for some in _by(ids):
        busy |= compare.since(tx, some, since)
    held = {h.server: h for h in told.holds}  # of two, the newer
    kept = migrations.kept(tx, host)
    found: list[Finding] = []
    for h in told.holds:
        if h.server in busy:
            continue
        if h.server not in here and kept.get(h.server) != h.epoch:
            found.append(
                Finding("machine", h.server, f"is on {host}, and no server of it", "look, then compute.lost_server")
            )
        elif h is not held[h.server] and kept.get(h.server) != h.epoch:
            found.append(Finding("machine", h.server, f"an older one of it lies on {host}", "look, then drop"))
    for id, row in here.items():
        if id not in busy and row.task_state is None and row.vm_state != VM.building:
            found += _of_machine(host, row, held.get(id))
    mine = [h for id, h in held.items() if id in here and id not in busy]
    return (found + _parts(tx, host, mine))[:MOST]


def _of_machine(host: str, row: Any, h: HeldHere | None) -> Iterator[Finding]:
    if h is None:
        if row.vm_state != VM.error:  # a build or an act that failed may well have left nothing
            yield Finding("machine", row.id, f"is not on {host}, where its server is", "look, then error")
        return
    if h.power_state != row.power_state and row.vm_state != VM.error:
        said = f"its power is {h.power_state} on {host}, written is {row.power_state}"
        yield Finding("machine", row.id, said, "look, then power")
    if h.captures:
        yield Finding(
            "machine", row.id, f"copies for images {', '.join(h.captures)} lie on {host}", "look, then discard"
        )


def _parts(tx: Tx, host: str, mine: list[HeldHere]) -> list[Finding]:
    """NICs, volumes, shares: what is too many is taken out; a volume that is missing is put back, a NIC comes with a hard reboot."""
    found: list[Finding] = []
    for some in _by(mine):
        nics = {h.server: set(h.ports) for h in some if h.ports is not None}
        disks = {h.server: set(h.volumes) for h in some if h.volumes is not None}
        trees = {h.server: set(h.shares) for h in some if h.shares is not None}
        for what, has, ask, lack, mend in (
            ("port", nics, compare.plugs, ": a hard reboot brings it", ""),
            ("volume", disks, compare.volumes, "", "look, then plug"),
            ("share", trees, compare.shares, ": a hard reboot brings it", ""),
        ):
            known = ask(tx, has) if has else {}
            for id, parts in has.items():
                over, lacks = parts - known.get(id, parts), known.get(id, parts) - parts
                said = [
                    (f"has {what} {part} on {host}, which is not its own", "look, then unplug") for part in sorted(over)
                ]
                said += [(f"lacks its {what} {part} on {host}{lack}", mend) for part in sorted(lacks)]
                found += [Finding("machine", id, words, mends) for words, mends in said]
    return found


def _by(all: Iterable[Any], n: int = 500) -> Iterator[list[Any]]:
    rest = list(all)
    for i in range(0, len(rest), n):
        yield rest[i : i + n]
