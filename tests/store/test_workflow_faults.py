"""The same short stories with a fault at every boundary: all or nothing, whatever fails, and whenever.

A small cloud in one thread: an engine, two hosts, a scheduler and a network, with the real database and the real
letters between them.  Before and after each commit, each act and each letter there is a boundary, and at the k-th
of them something happens.  A story is told for k = 1, 2, 3 … until k is more than it has boundaries.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from kilonova.kit.bus import Agent, Call, Contract, Ledger, To, Wake, letter
from kilonova.kit.db import Db, Tx, meta
from kilonova.kit.errors import HostGone, NoCapacity, Refused, Unavailable
from kilonova.kit.journal import ALONE, RUNS, STEPS
from kilonova.kit.workflow import FOREVER, Engine, Run, command, effect, record, signal, start, workflow

own = sa.MetaData()
SERVERS = sa.Table(
    "servers_of_test",
    own,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("host", sa.String(12)),
)
ROOMS = sa.Table(
    "rooms_of_test", own, sa.Column("host", sa.String(12), primary_key=True), sa.Column("used", sa.Integer)
)
CLAIMS = sa.Table("claims_of_test", own, sa.Column("server", sa.String(36)), sa.Column("host", sa.String(12)))
HOSTS = ("h0", "h1")


class Crash(BaseException):
    """The process is no more."""


# ---- the flows


class Choose(Call[list[str]], frozen=True):
    server: str


class Spawn(Call[str], frozen=True):
    server: str
    port: str


class Destroy(Call[None], frozen=True):
    server: str


compute = Contract("compute")
for message in (Choose, Spawn, Destroy):
    compute(message)


class Job(msgspec.Struct, frozen=True):
    server: str


@workflow
def erect(run: Run, job: Job) -> None:
    run.if_undone(broken, job.server)
    port = run(plug, job.server)
    for host in run(emptiest, run(chosen, job.server)):
        with run.attempt():
            run(claim, job.server, host)
            run(spawned, job.server, host, port)
            run(built, job.server, host)
            return
    raise NoCapacity("No valid host was found.")


@workflow
def raze(run: Run, job: Job) -> None:
    run.when_alone()
    host = run(whereabouts, job.server)
    if host:
        try:
            run(destroyed, job.server, host)
        except HostGone:
            pass
    run(unplug_all, job.server)
    run(deleted, job.server)


@record
def broken(tx: Tx, server: str) -> None:
    tx.execute(sa.update(SERVERS).where(SERVERS.c.id == server).values(state="error", host=None))


@effect
def plug(cloud: "Cloud", key: str, server: str) -> str:
    with cloud.request("plug"):
        cloud.ports[key] = server
    return key


@plug.undo
def _(cloud: "Cloud", key: str, server: str) -> None:
    with cloud.request("unplug"):
        cloud.ports.pop(key, None)


@command(patience_s=300)
def chosen(server: str) -> To[list[str]]:
    return To("scheduler", Choose(server=server))


@effect
def emptiest(cloud: "Cloud", key: str, hosts: list[str]) -> list[str]:
    """It only looks, and sees something else each time."""
    cloud.looks += 1
    return hosts[cloud.looks % 2 :] + hosts[: cloud.looks % 2]


@emptiest.only_looks
def _(cloud: "Cloud", hosts: list[str]) -> bool:
    return True


@record
def claim(tx: Tx, server: str, host: str) -> None:
    tx.execute(sa.update(ROOMS).where(ROOMS.c.host == host).values(used=ROOMS.c.used + 1))
    tx.execute(sa.insert(CLAIMS), {"server": server, "host": host})
    CLOUD.act("claim")


@claim.undo
def _(tx: Tx, server: str, host: str) -> None:
    here = sa.and_(CLAIMS.c.server == server, CLAIMS.c.host == host)
    if tx.execute(sa.delete(CLAIMS).where(here)).rowcount:
        tx.execute(sa.update(ROOMS).where(ROOMS.c.host == host).values(used=ROOMS.c.used - 1))


@command(patience_s=200)
def spawned(server: str, host: str, port: str) -> To[str]:
    return To(host, Spawn(server=server, port=port))


@spawned.undo
def _(server: str, host: str, port: str) -> To[None]:
    return To(host, Destroy(server=server))


@record
def built(tx: Tx, server: str, host: str) -> None:
    tx.execute(sa.update(SERVERS).where(SERVERS.c.id == server).values(state="active", host=host))
    CLOUD.act("built")


@record
def whereabouts(tx: Tx, server: str) -> str | None:
    return tx.execute(sa.select(SERVERS.c.host).where(SERVERS.c.id == server)).scalar()


@command(patience_s=FOREVER)
def destroyed(server: str, host: str) -> To[None]:
    return To(host, Destroy(server=server))


@effect(patience_s=FOREVER)
def unplug_all(cloud: "Cloud", key: str, server: str) -> None:
    with cloud.request("unplug all"):
        for k in [k for k, s in cloud.ports.items() if s == server]:
            del cloud.ports[k]


@record
def deleted(tx: Tx, server: str) -> None:
    for host in tx.execute(sa.select(CLAIMS.c.host).where(CLAIMS.c.server == server)).scalars().all():
        tx.execute(sa.update(ROOMS).where(ROOMS.c.host == host).values(used=ROOMS.c.used - 1))
    tx.execute(sa.delete(CLAIMS).where(CLAIMS.c.server == server))
    tx.execute(sa.update(SERVERS).where(SERVERS.c.id == server).values(state="deleted", host=None))


# ---- the cloud


class Cloud:
    """Everything, in one thread. `fault(boundary)` is called at the k-th boundary, `mood` at the k-th act."""

    def __init__(self, db: Db, k: int = 0, fault: Callable[["Cloud", str], None] | None = None) -> None:
        global CLOUD
        CLOUD = self
        self.real, self.at, self.k, self.fault, self.boundaries = db, 0.0, k, fault, 0
        self.ports: dict[str, str] = {}
        self.machines: dict[str, set[str]] = {h: set() for h in HOSTS}
        self.ledgers = {a: Ledger() for a in (*HOSTS, "scheduler")}
        self.wire: list[tuple[float, str, bytes]] = []
        self.mood = ""  # of the commit under way
        self.refuse: Counter[str] = Counter()
        self.struck = ""  # the boundary it was
        self.gone: set[str] = set()
        self.looks = 0
        self.lives = count()  # to tell runs apart
        with db.tx() as tx:
            for t in (SERVERS, ROOMS, CLAIMS, RUNS, STEPS, ALONE):
                tx.execute(sa.delete(t))
            tx.execute(sa.insert(ROOMS), [{"host": h, "used": 0} for h in HOSTS])
        self.engine = self.new_engine()
        self.agents = {a: self.new_agent(a) for a in self.ledgers}

    # -- time, wire and database, as the engine and the hosts have them

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds

    def send(self, to: str, raw: bytes) -> None:
        self.boundary(f"before a letter to {to}")
        self.wire.append((self.at, to, raw))
        self.boundary(f"after a letter to {to}")

    def read(self) -> Any:
        return self.real.read()

    @contextmanager
    def tx(self) -> Iterator[Tx]:
        self.boundary("before a commit")
        with self.real.tx() as tx:
            yield tx
            self.boundary("in a commit")
            if self.mood == "refused":
                self.mood = ""
                raise sa.exc.OperationalError("commit", {}, Exception("deadlock"))
        if self.mood == "unknown":
            self.mood = ""
            raise sa.exc.OperationalError("commit", {}, Exception("connection lost"))
        self.boundary("after a commit")

    @contextmanager
    def request(self, what: str) -> Iterator[None]:
        self.boundary(f"before {what}")
        self.act(what)
        yield
        self.act(f"half {what}")
        self.boundary(f"after {what}")

    def boundary(self, what: str) -> None:
        self.boundaries += 1
        if self.boundaries == self.k and self.fault:
            self.struck = what
            self.fault(self, what)

    def act(self, what: str) -> None:
        if self.refuse[what] > 0:
            self.refuse[what] -= 1
            raise Refused(f"cannot {what}")
        if self.refuse[f"later {what}"] > 0:
            self.refuse[f"later {what}"] -= 1
            raise Unavailable(f"cannot {what} now")

    # -- processes

    def new_engine(self, name: str = "c0") -> Engine:
        return Engine(
            name,
            self,
            self,
            self.send,
            clock=self,
            dice=random.Random(1),
            lease_s=30,
            gone=lambda tx, host: host in self.gone,
        )

    def new_agent(self, name: str) -> Agent:
        return Agent(compute, [choose, spawn, destroy], (self, name), self.send, self.ledgers[name], clock=self)

    def alive(self, who: str, do: Callable[..., object], *args: object) -> None:
        """Let this process do that; if it dies of it, it is started again."""
        try:
            do(*args)
        except Crash:
            if who in self.agents:
                self.agents[who] = self.new_agent(who)
            else:
                self.engine = self.new_engine()
                self.alive(who, self.engine.recover)
        except sa.exc.OperationalError:
            pass  # as a worker does, which then takes the next

    def settle(self, limit_s: float = 5000) -> None:
        end = self.at + limit_s
        while self.at < end:
            while self.wire:
                self.at += 0.01
                self.after(1)
            with self.real.read() as tx:
                if not tx.execute(sa.select(RUNS.c.id).where(RUNS.c.state == "running")).first():
                    return
            self.at += 1
            self.alive("conductor", self.engine.sweep)
        raise AssertionError("it does not come to rest")

    # -- what users do

    def create(self, server: str) -> None:
        with self.real.tx() as tx:
            tx.execute(sa.insert(SERVERS), {"id": server, "state": "building"})
            run = start(tx, erect, Job(server), id=f"b{next(self.lives)}-{server}", subject=server, now=self.at)
        self.wire.append((self.at, "conductor", letter(Wake(run))))

    def delete(self, server: str) -> None:
        with self.real.tx() as tx:
            signal(tx, server, "abort")
            run = start(tx, raze, Job(server), id=f"d{next(self.lives)}-{server}", subject=server, now=self.at)
        self.wire.append((self.at, "conductor", letter(Wake(run))))

    def after(self, letters: int) -> None:
        """Let so many letters be read."""
        for _ in range(letters):
            if self.wire:
                _, to, raw = self.wire.pop(0)
                receive = self.engine.receive if to == "conductor" else self.agents[to].receive
                if to not in self.gone:
                    self.alive(to, receive, raw)

    # -- what must be true of any cloud at rest

    def wrong(self) -> list[str]:
        with self.real.read() as tx:
            runs = tx.execute(sa.select(RUNS)).all()
            claims = [(c.server, c.host) for c in tx.execute(sa.select(CLAIMS))]
            rooms = tx.execute(sa.select(ROOMS)).all()
            servers = tx.execute(sa.select(SERVERS)).all()
            open_steps = sa.select(STEPS.c.step).join(RUNS, RUNS.c.id == STEPS.c.run).where(STEPS.c.finished.is_(None))
            endless = tx.execute(open_steps.where(RUNS.c.state == "done")).scalars().all()
        wrong = [f"{step} has no end" for step in endless]
        wrong += [f"{r.id} is {r.state}" for r in runs if r.state not in ("done", "failed")]
        wrong += [f"{r.id} is {r.state}: {r.fault}" for r in runs if (r.state == "failed") != bool(r.fault)]
        wrong += [f"{r.host}: {r.used} used" for r in rooms if r.used != sum(h == r.host for _, h in claims)]
        wrong += [f"{s.id} ends as {s.state}" for s in servers if s.state not in ("active", "error", "deleted")]
        for s in servers:
            at = [h for h in HOSTS if s.id in self.machines[h] and h not in self.gone]
            claimed = [h for owner, h in claims if owner == s.id]
            ports = sum(owner == s.id for owner in self.ports.values())
            expect = [s.host] if s.state == "active" else []
            if (at, claimed, ports) != (expect, expect, len(expect)):
                wrong.append(f"{s.id} {s.state}@{s.host}: machines {at}, claims {claimed}, {ports} ports")
        return wrong


CLOUD: Cloud


def choose(host: tuple[Cloud, str], m: Choose) -> list[str]:
    host[0].boundary("the choice")
    return list(HOSTS)


def spawn(host: tuple[Cloud, str], m: Spawn) -> str:
    cloud, name = host
    with cloud.request("spawn"):
        cloud.machines[name].add(m.server)
    return "a domain"


def destroy(host: tuple[Cloud, str], m: Destroy) -> None:
    cloud, name = host
    cloud.boundary("before destroy")
    cloud.machines[name].discard(m.server)
    cloud.boundary("after destroy")


# ---- the stories


def build(cloud: Cloud) -> None:
    cloud.create("s")
    cloud.settle()


def build_elsewhere(cloud: Cloud) -> None:
    """The first host declines, half-way."""
    cloud.refuse["half spawn"] = 1
    cloud.create("s")
    cloud.settle()


def build_nowhere(cloud: Cloud) -> None:
    cloud.refuse["spawn"] = 2
    cloud.create("s")
    cloud.settle()


def build_and_delete(cloud: Cloud) -> None:
    cloud.create("s")
    cloud.settle()
    cloud.delete("s")
    cloud.settle()


def overtaken(letters: int) -> Callable[[Cloud], None]:
    def delete_overtakes_build(cloud: Cloud) -> None:
        cloud.create("s")
        cloud.after(letters)
        cloud.delete("s")
        cloud.settle()

    return delete_overtakes_build


STORIES = {
    "build": (build, "active"),
    "the first host declines": (build_elsewhere, "active"),
    "all hosts decline": (build_nowhere, "error"),
    "build, delete": (build_and_delete, "deleted"),
    "delete overtakes build early": (overtaken(1), "deleted"),
    "delete overtakes build": (overtaken(4), "deleted"),
}


# ---- the faults


def crashed(cloud: Cloud, boundary: str) -> None:
    """The process that is at it dies, and is started again at once."""
    raise Crash


def refused(cloud: Cloud, boundary: str) -> None:
    """The database refuses the transaction."""
    cloud.mood = "refused"


def unknown(cloud: Cloud, boundary: str) -> None:
    """The database does as it is told, and the answer is lost."""
    cloud.mood = "unknown"


def lost(cloud: Cloud, boundary: str) -> None:
    cloud.wire[:] = cloud.wire[:-1] if boundary.startswith("after a letter") else cloud.wire


def doubled(cloud: Cloud, boundary: str) -> None:
    cloud.wire.extend(cloud.wire[-1:])


def late(cloud: Cloud, boundary: str) -> None:
    """The last letter comes when its sender has long sent another, and perhaps undone it."""
    if boundary.startswith("after a letter"):
        _, to, raw = cloud.wire.pop()
        cloud.held = getattr(cloud, "held", [])  # type: ignore[attr-defined]
        cloud.held.append((to, raw))  # type: ignore[attr-defined]


def stolen(cloud: Cloud, boundary: str) -> None:
    """The engine is held up for longer than its lease; another carries on, and then it wakes up.

    Not between the look at the lease and a request to a neighbour: nothing but the neighbour can fence that.
    """
    if "commit" not in boundary and "letter" not in boundary:
        return
    cloud.at += 31
    other = cloud.new_engine("c1")
    for _ in range(3):
        other.sweep()
        cloud.at += 0.5


FAULTS = {
    "crashed": (crashed, ("before", "after", "the choice")),
    "refused": (refused, ("in a commit",)),
    "unknown": (unknown, ("in a commit",)),
    "lost": (lost, ("after a letter",)),
    "doubled": (doubled, ("after a letter",)),
    "stolen": (stolen, ("before a commit", "after a commit", "before a letter", "after a letter")),
}


@pytest.fixture(scope="module")
def db() -> Iterator[Db]:
    db = Db("sqlite://", poolclass=sa.StaticPool, connect_args={"check_same_thread": False})
    meta.create_all(db.engine, tables=[RUNS, STEPS, ALONE])
    own.create_all(db.engine)
    yield db
    db.close()


def state(db: Db) -> str | None:
    with db.read() as tx:
        return tx.execute(sa.select(SERVERS.c.state)).scalar()


@pytest.mark.parametrize("story", STORIES)
def test_a_story_without_faults_ends_as_it_should(db: Db, story: str) -> None:
    tell, end = STORIES[story]
    cloud = Cloud(db)
    tell(cloud)
    assert cloud.wrong() == [] and state(db) == end


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("story", STORIES)
def test_a_story_with_a_fault_at_every_boundary(db: Db, story: str, fault: str) -> None:
    (tell, end), (strike, where) = STORIES[story], FAULTS[fault]
    struck = 0
    for k in count(1):
        cloud = Cloud(db, k, lambda cloud, what: strike(cloud, what) if what.startswith(where) else None)
        tell(cloud)
        assert cloud.wrong() == [], (k, cloud.struck)
        # One fault is survived: it changes when, not what. But where a host dies in its act, that may be a refusal.
        if cloud.boundaries < k:
            break
        struck += cloud.struck.startswith(where)
        assert state(db) == end, (k, cloud.struck)
    assert struck


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("kind", ["", "later "])
def test_each_node_fails_and_all_is_undone_or_tried_again(db: Db, story: str, kind: str) -> None:
    """Every act declines, before and half-way; for good, or for now."""
    tell, end = STORIES[story]
    for what in ("plug", "half plug", "claim", "spawn", "half spawn", "built"):
        for times in (1, 2, 5):
            cloud = Cloud(db)
            cloud.refuse[kind + what] = times
            tell(cloud)
            assert cloud.wrong() == [], (what, times)
            if kind and "overtakes" not in story:
                assert state(db) == end, (what, times)


@pytest.mark.parametrize("story", STORIES)
def test_each_letter_is_late_by_more_than_its_senders_patience(db: Db, story: str) -> None:
    tell, _ = STORIES[story]
    for k in count(1):
        cloud = Cloud(db, k, late)
        tell(cloud)
        cloud.at += 3600
        for to, raw in getattr(cloud, "held", []):
            (cloud.engine if to == "conductor" else cloud.agents[to]).receive(raw)
        cloud.settle()
        assert cloud.wrong() == [], (k, cloud.struck)
        if cloud.boundaries < k:
            break


@pytest.mark.parametrize("story", STORIES)
def test_a_host_dies_for_good_at_every_boundary(db: Db, story: str) -> None:
    def gone(cloud: Cloud, boundary: str) -> None:
        cloud.gone.add("h0")
        cloud.machines["h0"].clear()
        if boundary in (
            "before spawn",
            "after spawn",
            "before destroy",
            "after destroy",
            "after a letter to conductor",
        ):
            raise Crash

    tell, _ = STORIES[story]
    for k in count(1):
        cloud = Cloud(db, k, gone)
        tell(cloud)
        wrong = [w for w in cloud.wrong() if "active@h0: machines []" not in w]  # evacuation is another story
        assert wrong == [], (k, cloud.struck)
        if cloud.boundaries < k:
            break


def test_storms(db: Db) -> None:
    """Everything at once, from a seed: crashes, lost, doubled and late letters, moods of the database."""
    for seed in range(60):
        dice = random.Random(seed)
        cloud = Cloud(db)

        def weather(what: str, dice: random.Random = dice, cloud: Cloud = cloud) -> None:
            cloud.boundaries += 1
            if cloud.boundaries > 400:
                return
            luck = dice.random()
            if what == "in a commit":
                cloud.mood = "refused" if luck < 0.03 else "unknown" if luck < 0.05 else ""
            elif luck < 0.02:
                raise Crash
            elif what.startswith("after a letter"):
                last = cloud.wire.pop()
                cloud.wire.extend([] if luck < 0.1 else [last, last] if luck < 0.2 else [last])
                if luck > 0.8:
                    dice.shuffle(cloud.wire)
            elif luck > 0.98:
                cloud.refuse[dice.choice(["spawn", "half spawn", "later plug", "later half plug", "claim"])] += 1

        cloud.boundary = weather  # type: ignore[method-assign]
        servers = [f"s{i}" for i in range(4)]
        for s in servers:
            cloud.create(s)
            cloud.after(dice.randrange(8))
            if dice.random() < 0.5:
                cloud.delete(dice.choice(servers[: servers.index(s) + 1]) if dice.random() < 0.1 else s)
                cloud.after(dice.randrange(4))
        cloud.settle()
        assert cloud.wrong() == [], seed


# ---- a commit that comes late


class Late(Cloud):
    """The connection breaks at a commit, and what stood between it and the database (a proxy that plays a transaction
    again) carries the transaction out later: whole, if each statement changes as many rows as it did the first time.
    """

    def __init__(self, db: Db) -> None:
        super().__init__(db)
        self.late: list[tuple[Any, Any, int]] = []
        self.hooks: dict[str, Callable[[], None]] = {}  # at the next boundary of this name

    @contextmanager
    def tx(self) -> Iterator[Tx]:
        with super().tx() as tx:
            heard = Heard(tx)
            yield heard  # type: ignore[misc]
            if self.mood == "late":
                self.mood, self.late = "", heard.said
                raise sa.exc.OperationalError("commit", {}, Exception("connection lost"))

    def boundary(self, what: str) -> None:
        super().boundary(what)
        if what in getattr(self, "hooks", {}):
            self.hooks.pop(what)()

    def carry_out(self) -> bool:
        """Did it come to be?"""
        try:
            with self.real.tx() as tx:
                for statement, values, changed in self.late:
                    if tx.execute(statement, values).rowcount != changed:
                        raise Crash  # it is another world
        except Crash:
            return False
        return True


class Heard:
    """A transaction that remembers what it was told to change."""

    def __init__(self, tx: Tx) -> None:
        self.tx, self.said = tx, list[tuple[Any, Any, int]]()

    def execute(self, statement: Any, values: Any = None) -> Any:
        done = self.tx.execute(statement, values)
        if statement.is_dml:
            self.said.append((statement, values, done.rowcount))
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tx, name)


def test_a_commit_that_is_carried_out_late_lets_nobody_in(db: Db) -> None:
    """It was to park the run, and nobody knew whether it did; by now the run is at work again."""
    cloud = Late(db)
    other = cloud.new_engine("c1")
    came: list[bool] = []

    def parking_breaks() -> None:
        cloud.refuse["later plug"] = 1  # so it is parked, and its commit is told as lost
        cloud.mood = "late"
        cloud.hooks["before plug"] = comes_late  # when it is at work again

    def comes_late() -> None:
        came.append(cloud.carry_out())
        cloud.delete("s")  # and whoever is let in now undoes a plug that is being made
        cloud.at += 20  # within the lease of who is at work
        for _ in range(3):
            other.sweep()
            cloud.at += 1

    cloud.hooks["before plug"] = parking_breaks
    cloud.create("s")
    cloud.settle()
    assert cloud.late and came == [False]
    assert cloud.wrong() == []
