"""Time, dice, the dead, and who takes part: the production code unchanged, its threads are greenlets.

API, conductors, scheduler, hosts, identity, images, networks and SQL are the real ones.  At every boundary (before
and after each commit, each act on a host, each request to a neighbour, each letter, each line of a ledger) the
simulator may let time pass, so that another thread comes in between, or may kill the process.  Between the statements
of a transaction others may come in as well, as far as READ COMMITTED lets them: see `database.py`.  Nothing else is
random, so a seed is a history.
"""

import collections
import errno
import hashlib
import heapq
import itertools
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import greenlet
import msgspec
import sqlalchemy as sa

from kilonova.api.app import service as compute_service
from kilonova.api.host_book import HostBook
from kilonova.api.registry import World as ApiWorld
from kilonova.clients import SERVICE_USER, Account, Answer, Image, Inside, Login, Neighbours, Session, neighbours
from kilonova.companions import identity, image, network, share, volume
from kilonova.compute.agent import ComputeHost, Images
from kilonova.compute.examine import tell_holdings
from kilonova.conductor.app import Conductor
from kilonova.conductor.examine import Finding, against, examined
from kilonova.contracts.compute import TellHoldings
from kilonova.contracts.conductor import Report
from kilonova.kit.bus import Letter, Wake, letter
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.db import Db, Tx, meta
from kilonova.kit.errors import Refused, Trouble, Unavailable
from kilonova.kit.journal import RUNS, over
from kilonova.kit.routes import Context
from kilonova.model import options
from kilonova.model.candidates import SHARES
from kilonova.model.flavor import Flavor
from kilonova.model.host import Stock
from kilonova.model.machine import Machine
from kilonova.scheduler.select import Scheduler
from kilonova.sim.database import Memory
from kilonova.sim.invariants import wrong
from kilonova.store import catalog, placement, providers, quotas
from kilonova.store import hosts as book
from kilonova.virt.sim import SimDriver, SimMachine, SimState, copies, copy, plugged, seated, shared, used

BEGAN = 1_800_000_000.0
FLAVOR = Flavor("small", "small", 1, 1024, 10)
LARGE = Flavor("large", "large", 2, 1536, 10)
PINNED = Flavor("pinned", "pinned", 1, 1024, 10, extra_specs={"hw:cpu_policy": "dedicated"})
URL = "http://cloud.sim"
POOL = "70000000-0000-4000-8000-000000000007"
PASSWORD = "of the simulator"
MOST = 7  # servers of the only project
DAWDLE_S = 3.0
HASTE = 4  # reconcilers that have a turn before their time
QUIET = frozenset({"Report", "report", "turn"})  # these would drown the others
CONFIG = options.Config(
    compute=options.Compute(max_concurrent_builds=0),
    workers=options.Workers(lease_s=30),
    quota=options.Quota(instances=MOST),
)


class Crash(BaseException):
    """The process is no more."""


class Faults(msgspec.Struct, frozen=True):
    """How often what goes wrong: a chance for each boundary, letter, transaction, act or request."""

    crash: float = 0.004
    pause: float = 0.3
    lost: float = 0.05
    twice: float = 0.05
    slow: float = 0.1
    aborted: float = 0.02  # transactions that the database refuses
    unknown: float = 0.01  # transactions that were committed, though we are told they were not
    refused: float = 0.1  # acts that a host declines
    unavailable: float = 0.1  # of neighbours, before they act or after
    for_good: float = 0.1  # of a host's crashes
    power_cut: float = 0.2  # of a host's crashes: its guests are off as well
    fallen: float = 0.012  # of transactions of companions, after which they are no more
    between: float = 0.06  # of statements in a transaction, before which others have their turn


CALM = Faults(*[0.0] * 13)
CROWDED = Faults(between=0.3, pause=0.05, slow=0.02)  # all come at once: who looks first and takes then is found out


class Sim:
    """One cloud. `crash_at`: the one boundary at which somebody dies, counted from 1; 0: only by the dice.

    `restorable_s`: so long a deleted server can be restored; 0: not at all. `pooled`: hosts get their disks of a pool.
    `look_at`: the one boundary at which all reconcilers begin to look, and dawdle: much happens between two of their questions.
    `hasty`: what is compared every few minutes is so every few seconds, in the middle of everything.
    """

    def __init__(
        self,
        seed: int = 0,
        faults: Faults | None = None,
        *,
        crash_at: int = 0,
        look_at: int = 0,
        hosts: int = 4,
        conductors: int = 2,
        restorable_s: int = 0,
        pooled: bool = False,
        hasty: bool = False,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.dice, self.faults, self.tell_ = random.Random(seed), faults or Faults(), tell
        self.hasty, self.look_at, self.looks = hasty, look_at, 0
        self.crash_at, self.boundaries, self.seen = crash_at, 0, collections.Counter[str]()
        self.now, self.heap, self.order, self.hub = (
            BEGAN,
            list[tuple[float, int, Any, Any]](),
            itertools.count(),
            greenlet.getcurrent(),
        )
        self.config = msgspec.structs.replace(
            CONFIG, compute=msgspec.structs.replace(CONFIG.compute, reclaim_interval_s=restorable_s)
        )
        self.conductors: list[ConductorProcess] = []
        self.gone = {"broker": 0.0, "database": 0.0, "companions": 0.0}  # until when
        self.wrong: list[str] = []
        self.where, self.crashes, self.history = "?", 0, hashlib.sha256()
        self.patience: dict[Any, float] = {}
        self.ids = Ids(random.Random(self.dice.getrandbits(64)))
        self.directory = Path(tempfile.mkdtemp(prefix="kilonova-sim-", dir=_memory()))
        template = _template()
        shutil.copytree(template.directory, self.directory, dirs_exist_ok=True)
        self.db = _spare.pop() if _spare else Memory()
        self.db.restore(template.rows)
        self.db.dice, self.db.between, self.db.wait = self.dice, self._between, self._until
        self.db.sleep = self.pause  # type: ignore[assignment]
        self.companions = Companions(self, "companions")
        with self.db.read() as tx:
            self.user = Context(
                **msgspec.json.decode((self.directory / "user.json").read_bytes())
                | {"roles": frozenset({"member", "reader"})}
            )
            assert catalog.flavor(tx, FLAVOR.id)
        self.admin = msgspec.structs.replace(self.user, user_id="admin", roles=frozenset({"admin", "member", "reader"}))
        self.image_id = (self.directory / "image").read_text()
        self.share_id = (self.directory / "share").read_text()
        self.states: dict[str, SimState] = {}  # of all hosts whose hypervisors can be reached
        self.hosts = {f"h{i}": Host(self, f"h{i}") for i in range(hosts)}
        self.conductors += [ConductorProcess(self, f"c{i}") for i in range(conductors)]
        self.run(self.now + 30)  # hosts are met
        while pooled:
            try:
                with self.db.tx() as tx:
                    _pooled(tx, self.now)
                pooled = False
            except sa.exc.OperationalError:  # a conductor has one of these rows just now
                self.run(self.now + 1)

    def close(self) -> None:
        self.db.abandon()
        _spare.append(self.db)
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- calamities: they last a while, and all are over when the storm is

    def calamity(self, what: str, seconds: float) -> None:
        """The broker, the database or what companions there are is gone; or one of those who take part is cut off, stopped, or has no disk left."""
        until = self.now + seconds
        if what in self.gone:
            self.tell(f"the {what} is gone for {seconds:.0f} s")
            self.gone[what] = until
            return
        whom: Process = self.dice.choice([*self.hosts.values(), *(self.conductors if what == "stopped" else ())])
        self.tell(f"{whom.name} is {what} for {seconds:.0f} s")
        whom.until[what] = until

    def lacks(self, what: str) -> bool:
        return self.gone[what] > self.now

    # -- time

    def at(self, delay: float, func: Callable[..., Any], *args: Any) -> None:
        heapq.heappush(self.heap, (self.now + max(0.0, delay), next(self.order), func, args))

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        while self.heap and self.heap[0][0] <= until and not done():
            self.now, _, func, args = heapq.heappop(self.heap)
            func(*args)
        if not done():
            self.now = max(self.now, until)

    def pause(self, seconds: float) -> None:
        """Let this thread sleep. If its process dies meanwhile, it does not wake up."""
        me: Any = greenlet.getcurrent()
        if me is self.hub:
            self.now += seconds
            return
        process, life, where = me.process, me.life, self.where
        self.at(seconds, me.switch)
        self.hub.switch()
        while process.until["stopped"] > self.now:
            self.at(process.until["stopped"] - self.now, me.switch)
            self.hub.switch()
        self.where = where
        if process.life != life:
            raise greenlet.GreenletExit

    def _until(self, wakes: list[Callable[[], None]]) -> bool:
        """Let this thread sleep until it is called."""
        me: Any = greenlet.getcurrent()
        if me is self.hub:
            return False
        process, life, where = me.process, me.life, self.where
        wakes.append(lambda: self.at(0, me.switch))
        self.hub.switch()
        self.where = where
        if process.life != life:
            raise greenlet.GreenletExit
        return True

    def _between(self) -> None:
        """In the middle of a transaction: others may have their turn, and more than one."""
        if self.lacks("database"):
            raise sa.exc.OperationalError("", {}, Exception("connection refused"))
        if self.chance("between") and greenlet.getcurrent() is not self.hub:
            self.pause(self.dice.expovariate(2.0))
        self._dawdle()

    def _dawdle(self) -> None:
        """Who looks slowly."""
        if getattr(greenlet.getcurrent(), "slow", False):
            self.pause(self.dice.uniform(0, DAWDLE_S))

    # -- faults

    def boundary(self, process: "Process", what: str) -> None:
        quiet = self.where in QUIET
        if self.crash_at or self.look_at or self.faults is not CALM:
            self.boundaries += not quiet
            self.seen[f"{process.kind} {self.where} {what}"] += 1
        if (self.boundaries == self.crash_at > 0 == self.crashes and not quiet) or self.chance("crash"):
            self.crashes += 1
            self.tell(f"{process.name} crashes, {self.where} {what}")
            raise Crash
        if self.boundaries >= self.look_at > 0 == self.looks and self.conductors and not quiet:
            self.looks = self.conductors[0].look_slowly()
        self._dawdle()
        if self.chance("pause"):
            self.pause(self.dice.expovariate(1.0) if self.dice.random() < 0.9 else self.dice.uniform(0, 50))

    def chance(self, fault: str) -> bool:
        p = getattr(self.faults, fault)
        return bool(p and self.dice.random() < p)

    def tell(self, what: str) -> None:
        line = f"{self.now - BEGAN:9.2f}  {what}"
        self.history.update(line.encode())
        if self.tell_:
            self.tell_(line)

    # -- the bus: letters get lost, doubled, late and out of order; unread ones wait for the reader's return

    def send(self, process: "Process", to: str, raw: bytes) -> None:
        kind = to.rstrip("0123456789")
        self.boundary(process, f"before a letter to {kind}")
        for _ in range(2 if self.chance("twice") else 1):
            if self.chance("lost"):
                continue
            delay = (self.dice.expovariate(5.0) if self.faults is not CALM else 0.05) + (
                self.dice.uniform(0, 30) if self.chance("slow") else 0
            )
            self.at(delay, self._posted, process, process.life, to, raw)
        self.boundary(process, f"after a letter to {kind}")

    def _posted(self, process: "Process", life: int, to: str, raw: bytes) -> None:
        """It lies in its sender's box as long as that cannot reach the broker, and dies with it."""
        until = max(self.gone["broker"], process.until["cut off"])
        if until <= self.now:
            self.deliver(to, raw)
        elif process.life == life:
            self.at(until - self.now + self.dice.random(), self._posted, process, life, to, raw)

    def deliver(self, to: str, raw: bytes) -> None:
        if to in self.hosts and (until := max(self.gone["broker"], self.hosts[to].until["cut off"])) > self.now:
            self.at(until - self.now + self.dice.random(), self.deliver, to, raw)
            return
        homes: list[Any] = self.conductors if to == "conductor" else [self.hosts[to]]
        if up := [p for p in homes if p.up]:
            self.dice.choice(up).go(self._deliver, to, raw)
        elif not all(p.for_good for p in homes):
            self.at(1 + self.dice.random(), self.deliver, to, raw)

    def _deliver(self, to: str, raw: bytes) -> None:
        self.where = msgspec.msgpack.decode(raw, type=Letter).name
        process: Any = greenlet.getcurrent()
        acked = False
        try:
            process.process.receive(raw)
            acked = True
        finally:
            if not acked:
                self.at(1 + self.dice.random(), self.deliver, to, raw)

    # -- the end

    def settle(self, limit_s: float = 20_000) -> None:
        """The storm is over: whoever can returns, and everything must come to rest."""
        faults, self.faults, self.crash_at, self.look_at = self.faults, CALM, 0, 0
        self.gone = dict.fromkeys(self.gone, 0.0)
        for p in (*self.hosts.values(), *self.conductors):
            p.until.clear()
        for _ in range(3):  # what nobody asked about is found by comparing, and that has its rhythm
            self.run(self.now + limit_s, self.at_rest)
            self.run(self.now + 150)
        self.run(self.now + limit_s, self.at_rest)
        self.faults = faults

    def at_rest(self) -> bool:
        with self.db.read() as tx:
            return tx.execute(sa.select(RUNS.c.id).where(RUNS.c.state == "running").limit(1)).first() is None

    def swapping(self) -> bool:
        """Does any server exchange a volume for another?"""
        of = RUNS.c.state == "running", RUNS.c.workflow == "swap_volume"
        with self.db.read() as tx:
            return tx.execute(sa.select(RUNS.c.id).where(*of).limit(1)).first() is not None

    def check(self) -> list[str]:
        """What must be true of any cloud at rest."""
        holds = {h.name: copy(h.state) for h in self.hosts.values() if not h.for_good}
        left = {h.name: copies(h.state) for h in self.hosts.values() if not h.for_good}
        nics = {h.name: plugged(h.state) for h in self.hosts.values() if not h.for_good}
        disks = {h.name: used(h.state) for h in self.hosts.values() if not h.for_good}
        sat = {h.name: seated(h.state) for h in self.hosts.values() if not h.for_good}
        trees = {h.name: shared(h.state) for h in self.hosts.values() if not h.for_good}
        return self.wrong + wrong(self.db, holds, copies=left, nics=nics, disks=disks, sat=sat, trees=trees)

    def examined(self) -> list[Finding]:
        """What a doctor finds; where all is well, nothing."""
        found = examined(self.db, self.now)
        for h in self.hosts.values():
            if h.up and not h.for_good:
                host: Any = h.host
                told = tell_holdings(host, TellHoldings())
                with self.db.read() as tx:
                    found += against(tx, h.name, told, self.now)
        return found

    def within_quota(self) -> None:
        """Never has a project more than it may have."""
        with self.db.read() as tx:
            n = quotas.usage(tx, self.user.project_id or "").instances
        if n > MOST:
            self.wrong.append(f"there were {n} servers of {MOST} at {self.now - BEGAN:.1f}")

    def twins(self, id: str) -> None:
        """Two hosts that are both well must not run the same server."""
        at = [
            h.name
            for h in self.hosts.values()
            if (m := h.state.machines.get(id)) and m.power == "running" and not h.for_good
        ]
        if len(at) > 1 and all(self.hosts[h].up and not self.hosts[h].was_gone for h in at):
            self.wrong.append(f"{id} ran on {at} at {self.now - BEGAN:.1f}")


class SimClock:
    """Of one process, which may be some seconds wrong."""

    def __init__(self, sim: Sim, process: "Process | None", skew_s: float = 0.0) -> None:
        self.sim, self.process, self.skew_s = sim, process, skew_s

    def now(self) -> float:
        return self.sim.now + self.skew_s

    def sleep(self, seconds: float) -> None:
        self.sim.pause(seconds)


class SimDb:
    """The real thing, with a boundary on either side of a transaction, and a database that has its moods."""

    def __init__(self, process: "Process") -> None:
        self.process, self.sim, self.engine = process, process.sim, process.sim.db.engine
        self.dice = process.sim.dice

    @contextmanager
    def tx(self) -> Iterator[Tx]:
        sim = self.sim
        sim.boundary(self.process, "before a transaction")
        with sim.db.tx(open=True) as tx:
            yield tx
            if sim.chance("aborted"):
                raise sa.exc.OperationalError("commit", {}, Exception("deadlock"))
        if sim.chance("unknown"):
            raise sa.exc.OperationalError("commit", {}, Exception("connection lost"))
        sim.boundary(self.process, "after a transaction")

    def read(self) -> AbstractContextManager[Tx]:
        look: AbstractContextManager[Tx] = self.sim.db.read(open=True)
        return look

    run: Any = Db.run
    look: Any = Db.look

    def sleep(self, seconds: float) -> None:
        self.sim.pause(seconds)


class SimCarrier:
    """A neighbour somewhere behind HTTP: it may not be there, and may have done it all the same."""

    def __init__(self, process: "Process", name: str) -> None:
        self.process, self.name = process, name

    def send(self, method: str, path: str, headers: Mapping[str, str], body: Any) -> Answer:
        sim, what = self.process.sim, f"{method} {self.name}"
        acts = method != "GET" and self.name != "identity"
        if acts:
            sim.boundary(self.process, f"before {what}")
        gone = not sim.companions.up or sim.lacks("companions") or sim.lacks("database")
        if sim.chance("unavailable") or gone or self.process.until["cut off"] > sim.now:
            raise Unavailable(f"The {self.name} service does not answer.")
        try:
            answer = sim.companions.doors[self.name].send(method, path, headers, body)
        except Crash:  # theirs, in the middle of it
            raise Unavailable(f"The {self.name} service does not answer any more; it may have done it.") from None
        if sim.chance("unavailable"):
            raise Unavailable(f"The {self.name} service does not answer; it may have done it.")
        if acts:
            sim.boundary(self.process, f"after {what}")
        return answer


class SimBus:
    """As a process sees it."""

    def __init__(self, process: "Process") -> None:
        self.process = process

    def serve(self, address: str, receive: Callable[[bytes], None], threads: int = 1) -> Callable[[], None]:
        return lambda: None

    def send(self, to: str, raw: bytes) -> None:
        self.process.sim.send(self.process, to, raw)

    def serves(self, address: str) -> bool:
        return True


# ---- who takes part


class Process:
    """Something that lives, dies, and as a rule lives again. Memory goes, disks stay."""

    kind = "process"

    def __init__(self, sim: Sim, name: str) -> None:
        self.sim, self.name, self.life, self.up, self.for_good = sim, name, 0, False, False
        self.until: collections.defaultdict[str, float] = collections.defaultdict(float)  # when a calamity is over
        self.start()

    def start(self) -> None:
        self.up = not self.for_good
        if self.up:
            self.begin()

    def begin(self) -> None: ...

    def crashed(self) -> None: ...

    def receive(self, raw: bytes) -> None: ...

    def near(self, clock: Clock) -> Neighbours:
        """Whom this process asks, as it sees them."""
        carriers: Any = {name: SimCarrier(self, name) for name in self.sim.companions.services}
        password = (self.sim.directory / "service-password").read_text().strip()
        return neighbours(clock, Login(SERVICE_USER, password), **carriers)

    def go(self, func: Callable[..., Any], *args: Any) -> None:
        """A new thread of this process."""
        if self.until["stopped"] > self.sim.now:
            self.sim.at(self.until["stopped"] - self.sim.now, self._go_if_alive, self.life, func, *args)
            return
        g: Any = greenlet.greenlet(self._body, parent=self.sim.hub)
        g.process, g.life = self, self.life
        g.switch(func, *args)

    def _go_if_alive(self, life: int, func: Callable[..., Any], *args: Any) -> None:
        if self.life == life:
            self.go(func, *args)

    def _body(self, func: Callable[..., Any], *args: Any) -> None:
        me: Any = greenlet.getcurrent()
        try:
            func(*args)
        except Crash:
            if self.life == me.life:
                self.life, self.up = self.life + 1, False
                self.sim.at(self.sim.dice.choice([1, 5, 20, 100]), self.start)
                self.crashed()
        except sa.exc.OperationalError:
            pass  # a worker logs it and takes the next letter
        except Unavailable:
            pass  # the next round will do
        except OSError:
            pass  # no space left: what was acted upon and not written down comes again
        except Exception as e:
            if not (isinstance(e, Trouble) and self.kind == "api"):  # a user is told, and goes his way
                self.sim.wrong.append(f"{self.name}, {self.sim.where}: {type(e).__name__}: {e}")

    def every(self, seconds: float, func: Callable[[], Any], name: str) -> None:
        """A thread that does this again and again, for as long as this life lasts."""
        life = self.life

        def turn() -> None:
            self.sim.where = name
            func()

        def again() -> None:
            if self.life == life:
                self.sim.at(seconds * self.sim.dice.uniform(0.8, 1.2), again)
                self.go(turn)

        self.sim.at(self.sim.dice.uniform(0, seconds), again)


class Companions(Process):
    """Identity, images, networks, volumes and shares of our own, in a process that may die in the middle of a request."""

    kind = "companions"

    def begin(self) -> None:
        sim, clock, again = self.sim, SimClock(self.sim, None), self.life > 0
        db: Any = CompanionsDb(self)
        realm = identity.open_realm(db, clock, sim.ids, QUICK, sim.directory)
        images = image.open_store(db, clock, sim.ids, options.Image(), sim.directory / "images")
        self.services: dict[str, Any] = {
            "identity": identity.service(realm),
            "image": image.service(images, realm.gate),
            "network": network.make_service(network.World(db, clock, sim.ids, options.Network()), realm.gate),
        }
        volumes = _volumes(db, clock, sim.ids, sim.directory, self.services, realm.gate)
        shares = share.open_store(
            db, clock, sim.ids, options.Share(), sim.directory / "shares", authenticate=realm.gate
        )
        self.services |= {"volume": volume.make_service(volumes), "share": share.make_service(shares)}
        self.doors = {name: Inside(service, f"{URL}/{name}") for name, service in self.services.items()}
        if again:
            self.go(self._recover, images, volumes, shares)
        self.every(30, lambda: volume.resume(volumes), "companions")  # who asked may have died while it was at work

    def _recover(self, images: Any, volumes: Any, shares: Any) -> None:
        image.recover(images)
        volume.recover(volumes)
        share.recover(shares)

    def mortal(self) -> None:
        """A moment in which it may die, whoever's request it is at."""
        sim = self.sim
        if greenlet.getcurrent() is not sim.hub and sim.chance("fallen"):
            sim.crashes += 1
            sim.tell(f"{self.name} crash, {sim.where}")
            self.life, self.up = self.life + 1, False
            sim.at(sim.dice.choice([1, 5, 20]), self.start)
            raise Crash


class CompanionsDb:
    """The database as they see it: they may die after each of their transactions."""

    def __init__(self, process: Companions) -> None:
        self.process, self.inner = process, process.sim.db

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @contextmanager
    def tx(self) -> Iterator[Tx]:
        with self.inner.tx() as tx:
            yield tx
        self.process.mortal()

    run: Any = Db.run
    look: Any = Db.look


class ConductorProcess(Process):
    kind = "conductor"

    def begin(self) -> None:
        sim = self.sim
        self.clock, self.db = SimClock(sim, self, sim.dice.uniform(-1, 1)), SimDb(self)
        dice = random.Random(sim.dice.getrandbits(64))
        near = self.near(self.clock)
        scheduler = Scheduler(sim.db, clock=self.clock, dice=random.Random(dice.getrandbits(64)))
        self.conductor = Conductor(
            self.name,
            self.db,  # type: ignore[arg-type]
            SimBus(self),
            near,
            scheduler.choose,
            clock=self.clock,
            ids=sim.ids,
            dice=dice,
            config=sim.config,
            watch_steps=self._at,
        )
        self.conductor.engine.turns = nullcontext()  # threads here take turns anyhow, and one may sleep in its turn
        judge = self.conductor.world.gone

        def gone(tx: Tx, host: str) -> bool:
            """Who was taken for dead may still run what was given to another: nothing but fencing helps there."""
            verdict = judge(tx, host)
            if verdict:
                sim.hosts[host].was_gone = True
            return verdict

        self.conductor.engine.gone = gone
        self.conductor.world.wake = lambda run: sim.send(self, "conductor", letter(Wake(run=run)))
        self.go(self.conductor.engine.recover)
        self.every(2, self.conductor.engine.sweep, "sweep")
        self.conductor.engine.door.on(Report, self.conductor.reports.take)
        self.every(0.5, self.conductor.reports.turn, "Report")
        self.every(5, self._turn, "turn")

    def receive(self, raw: bytes) -> None:
        self.conductor.engine.receive(raw)

    def _turn(self) -> None:
        reconcilers = self.conductor.reconcilers
        if self.sim.hasty:
            for name in self.sim.dice.sample(sorted(reconcilers.next), HASTE):
                reconcilers.next[name] = 0.0
        reconcilers.turn()

    def look_slowly(self) -> int:
        """All reconcilers, each in a thread of its own. How many they are."""
        for name in sorted(self.conductor.reconcilers.all):
            self.sim.at(0, self.go, self._slowly, name)
        return len(self.conductor.reconcilers.all)

    def _slowly(self, name: str) -> None:
        me: Any = greenlet.getcurrent()
        me.slow = True
        self.conductor.reconcilers.run_once(name)

    def _at(self, flow: str, step: str) -> None:
        self.sim.where = f"{flow}.{step}"


WRITES = {
    "spawn",
    "prepare",
    "arrive",
    "rebuild",
    "rescue",
    "capture",
    "prepare a landing",
    "branch_volume",
    "fetch an image for",
}


class SimHypervisor(SimDriver):
    """With a boundary around each act, acts that take long, and hosts that decline."""

    process: "Host"

    def _act(self, what: str, may_fail: bool = True) -> None:
        sim = self.process.sim
        sim.boundary(self.process, f"before {what}")
        if sim.faults is not CALM or sim.crash_at or sim.look_at:
            sim.pause(sim.dice.uniform(0.5, 1) * {"spawn": 20}.get(what, 3))
        else:
            sim.pause(1)
        if what in WRITES and self.process.until["without disk"] > sim.now:
            raise Refused("No space left on device.")
        if may_fail and sim.chance("refused"):
            raise Refused(f"The hypervisor refused to {what} the machine.")

    def _turn(self, id: str, m: SimMachine, power: Any) -> None:
        super()._turn(id, m, power)
        if power == "running":
            self.process.sim.twins(id)
        self.process.sim.boundary(self.process, f"after it is {power}")

    def destroy(self, id: str) -> None:
        super().destroy(id)
        self.process.sim.boundary(self.process, "after destroy")

    def _become(self, id: str, m: SimMachine, machine: Machine) -> None:
        super()._become(id, m, machine)
        self.process.sim.boundary(self.process, "after it is another machine")

    def _switched(self, id: str, m: SimMachine, there: SimMachine, target: SimState) -> bool:
        sim = self.process.sim
        sim.boundary(self.process, "before a guest moves")
        done = super()._switched(id, m, there, target)
        sim.twins(id)
        sim.boundary(self.process, "after a guest moved")
        return done

    def _newest(self, id: str, machine: Machine, of: SimMachine | None = None) -> None:
        super()._newest(id, machine, of)
        self.process.sim.boundary(self.process, "after another machine is meant")


class Disk(dict[str, bytes]):
    """A ledger, and a boundary before and after each line that is written."""

    def __init__(self, process: "Host") -> None:
        super().__init__()
        self.process = process

    def get(self, key: str) -> bytes | None:  # type: ignore[override]
        return dict.get(self, key)

    def put(self, key: str, answer: bytes, at: float) -> None:
        self.process.sim.boundary(self.process, "before the ledger")
        if self.process.until["without disk"] > self.process.sim.now:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.setdefault(key, answer)
        self.process.sim.boundary(self.process, "after the ledger")


class Host(Process):
    kind = "host"

    def __init__(self, sim: Sim, name: str) -> None:
        self.state, self.ledger = SimState(), Disk(self)
        sim.states[name] = self.state
        self.was_gone, self.skew_s = False, sim.dice.uniform(-2, 2)
        super().__init__(sim, name)

    def begin(self) -> None:
        sim = self.sim
        clock = SimClock(sim, self, self.skew_s)
        driver = SimHypervisor(
            self.name,
            self.state,
            clock=clock,
            dice=random.Random(sim.dice.getrandbits(64)),
            options=options.Sim(cpus=6, memory_mb=4608, disk_gb=100),
            peers=sim.states,
        )
        driver.process = self
        compute = msgspec.structs.replace(sim.config.compute, cpu_allocation_ratio=1.0, cpu_dedicated_set="4-5")
        near = self.near(clock)
        self.host = ComputeHost(
            self.name,
            driver,
            SimBus(self),
            clock=clock,
            options=compute,
            ledger=self.ledger,
            images=Images(near.image),
        )
        self.every(10, self._report, "report")

    def receive(self, raw: bytes) -> None:
        self.host.receive(raw)

    def _report(self) -> None:
        self.sim.send(self, "conductor", letter(self.host.report()))

    def down(self, seconds: float) -> None:
        """It works no more for so long; its guests do."""
        self.life, self.up = self.life + 1, False
        self.sim.at(seconds, self.start)

    def crashed(self) -> None:
        if self.sim.chance("for_good") and sum(not h.for_good for h in self.sim.hosts.values()) > 1:
            self.sim.tell(f"{self.name} will not return")
            self.for_good = True
            self.sim.states.pop(self.name, None)
        elif self.sim.chance("power_cut"):
            self.sim.tell(f"{self.name} loses its power")
            self.state.power_cut()


class Api(Process):
    """Asks for things, as users do: at any time, and not always wisely."""

    kind = "api"

    def begin(self) -> None:
        sim = self.sim
        self.clock, self.db = SimClock(sim, self), SimDb(self)
        self.neighbours = near = self.near(self.clock)
        for part in (near.image, near.network, near.volume, near.share):
            part.session = _AsOurselves(part.session)  # type: ignore[assignment]
        book = HostBook(sim.db, self.clock, sim.config)

        def wake(run: str) -> None:
            sim.send(self, "conductor", letter(Wake(run=run)))

        def ask(*_: Any) -> Any:
            raise Unavailable("Nobody asks hosts here.")

        world = ApiWorld(self.db, self.clock, sim.ids, sim.config, near, book, wake, ask, self._ended)  # type: ignore[arg-type]
        service = compute_service(world, lambda token: sim.admin if token == "admin" else sim.user)
        self.inside = Inside(service, f"{URL}/compute")

    def _ended(self, run: str, timeout_s: float) -> bool:
        end = self.sim.now + timeout_s
        while not self.sim.db.look(over, run) and self.sim.now < end:
            self.sim.pause(1)
        return self.sim.db.look(over, run)

    def ask(self, method: str, path: str, body: Any = None, *, token: str = "t") -> tuple[int, Any]:
        """`token`: "admin" is an administrator's."""
        self.sim.where = f"api {method}"
        calm = self.sim.faults is CALM  # a host that was asked in a storm may well refuse
        headers = {"X-Auth-Token": token, "OpenStack-API-Version": "compute 2.100", "Content-Type": "application/json"}
        answer = self.inside.send(method, f"/v2.1{path}", headers, None if body is None else msgspec.json.encode(body))
        raw = answer.read()
        self.sim.tell(f"api: {method} {path} → {answer.status}")
        if answer.status >= 500 and answer.status != 503 and calm:
            self.sim.wrong.append(f"{method} {path} was answered with {answer.status}: {raw[:200]!r}")
        return answer.status, msgspec.json.decode(raw) if raw else None


class _AsOurselves:
    """A session in which users' tokens are ours: the simulator's users have none."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.session, name)

        def ours(*args: Any, **more: Any) -> Any:
            return call(*args, **({**more, "token": None} if "token" in more else more))

        return ours if callable(call) else call


# ---- the first moment, made once


def _pooled(tx: Tx, now: float) -> None:
    """All hosts but the last have their disks of a pool that they share, where there is not room for everybody."""
    members = [n.uuid for n in book.nodes(tx)][:-1]
    placement.offer(tx, POOL, "pool", [Stock("DISK_GB", 65)], {SHARES}, now=now)
    for uuid in (POOL, *members):
        placement.lock(tx, uuid, now)
        providers.set_aggregates(tx, uuid, [POOL])
    for uuid in members:
        providers.drop_stocks(tx, uuid, ["DISK_GB"])


def _volumes(
    db: Db,
    clock: Any,
    ids: Ids,
    directory: Path,
    services: Mapping[str, Any],
    authenticate: Callable[[str], Context],
) -> volume.World:
    """The block-storage service; it asks for images as a process that never fails."""
    inside = {name: Inside(services[name], f"{URL}/{name}") for name in ("identity", "image")}
    login = Login(SERVICE_USER, (directory / "service-password").read_text().strip())
    images = Image(Session("image", inside["image"], clock, Account(inside["identity"], login, clock)))
    return volume.open_store(
        db, clock, ids, options.Volume(), directory / "volumes", images=images, host="sim", authenticate=authenticate
    )


QUICK = options.Identity(password_hash_cost=10, token_lifetime_s=10**9)


class _Template(msgspec.Struct, frozen=True):
    directory: Path
    rows: bytes  # of its database


_made: _Template | None = None
_spare: list[Memory] = []  # databases that nobody uses now; each knows how to compile what it was ever asked


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 (a temporary directory is made in it)


def _template() -> _Template:
    """A cloud with a user, an image, a network and a flavor, before anything happened."""
    global _made
    if _made is not None:
        return _made
    directory = Path(tempfile.mkdtemp(prefix="kilonova-sim-template-", dir=_memory()))
    ids = Ids(random.Random(0))

    class Still:
        def now(self) -> float:
            return BEGAN

        def sleep(self, seconds: float) -> None: ...

    db, clock = Memory(), Still()
    meta.create_all(db.engine)
    db.watch()
    realm = identity.open_realm(db, clock, ids, QUICK, directory)
    first = identity.bootstrap(realm, directory, admin_password=PASSWORD, service_password=PASSWORD)
    (directory / "service-password").write_text(PASSWORD)
    images = image.open_store(db, clock, ids, options.Image(), directory / "images")
    services = {"identity": identity.service(realm), "image": image.service(images, realm.gate)}
    inside = {name: Inside(app, f"{URL}/{name}") for name, app in services.items()}
    _volumes(db, clock, ids, directory, services, realm.gate)
    near = neighbours(
        clock,
        Login("admin", PASSWORD, project_name="admin"),
        identity=inside["identity"],
        image=inside["image"],
        network=inside["image"],
        share=Inside(
            share.make_service(
                share.open_store(db, clock, ids, options.Share(), directory / "shares", authenticate=realm.gate)
            ),
            f"{URL}/share",
        ),
    )
    made = near.image.create(name="tiny", disk_format="raw", container_format="bare", visibility="public")
    near.image.upload(made.id, iter([bytes(512)]))
    network.bootstrap(network.World(db, clock, ids, options.Network()), first.admin_project_id)
    with db.tx() as tx:
        catalog.add_flavor(tx, FLAVOR, BEGAN)
        catalog.add_flavor(tx, LARGE, BEGAN)
        catalog.add_flavor(tx, PINNED, BEGAN)
    (directory / "image").write_text(made.id)
    wish = {"share": {"share_proto": "NFS", "size": 1}}
    (directory / "share").write_text(
        near.share.session.json("POST", "/v2/shares", dict[str, dict[str, Any]], body=wish)["share"]["id"]
    )
    (directory / "user.json").write_bytes(
        msgspec.json.encode({"user_id": "user", "project_id": first.demo_project_id, "user_name": "user"})
    )
    _made = _Template(directory, db.wire.serialize())
    _spare.append(db)
    return _made
