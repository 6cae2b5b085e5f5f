"""What the run engine costs: medians of several goes. Say on what machine.

    python bench/engine.py              everything, on SQLite
    python bench/engine.py builds [URL] durable builds a second, end to end, in one process; statements and commits of each
    python bench/engine.py replay       microseconds a journaled step

A build is what it is in a cloud, less the hypervisor: the API's transaction, a port over "HTTP", a choice by the
scheduler, the claim, the spawn on a host, the end.  Client, engine, hosts and database share the machine.
"""

import random
import statistics
import sys
import tempfile
import threading
import time
from itertools import count
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.kit.bus import Agent, Call, Contract, Ledger, MemoryBus, To, Wake, letter
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.db import Db, Tx, meta
from kilonova.kit.errors import NoCapacity
from kilonova.kit.journal import RUNS, Cause
from kilonova.kit.workflow import Engine, Run, Unit, command, effect, record, start, workflow

SERVERS = sa.Table(
    "bench_servers",
    meta,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("project", sa.String(36), index=True),
    sa.Column("host", sa.String(64), index=True),
    sa.Column("state", sa.String(24), nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
)
PROVIDERS = sa.Table(
    "bench_providers",
    meta,
    sa.Column("host", sa.String(64), primary_key=True),
    sa.Column("room", sa.Integer, nullable=False),
)
CLAIMS = sa.Table(
    "bench_claims",
    meta,
    sa.Column("server", sa.String(36), primary_key=True),
    sa.Column("host", sa.String(64), primary_key=True),
)
_p, _v = PROVIDERS.c, SERVERS.c
TAKE_ROOM = sa.update(PROVIDERS).where(_p.host == sa.bindparam("at"), _p.room > 0).values(room=_p.room - 1)
FINISH = sa.update(SERVERS).where(_v.id == sa.bindparam("the_id"), _v.generation == sa.bindparam("ours"))


class Done(msgspec.Struct, frozen=True):
    pass


class Chosen(msgspec.Struct, frozen=True):
    hosts: list[str]


class Choose(Call[Chosen], frozen=True):
    server: str


class Spawn(Call[Done], frozen=True):
    server: str
    port: str


SCHEDULER, COMPUTE = Contract("scheduler"), Contract("compute")
SCHEDULER(Choose)
COMPUTE(Spawn)


class Build(msgspec.Struct, frozen=True):
    server: str


@workflow
def build(run: Run, job: Build) -> None:
    run.if_undone(broken, job.server)
    port = run(plug, job.server)
    for host in run(choose, job.server).hosts:
        with run.attempt():
            run(claim, job.server, host)
            run(spawn, job.server, host, port)
            run(built, job.server, host)
            return
    raise NoCapacity("No valid host was found.")


@record
def broken(tx: Tx, server: str) -> None:
    tx.execute(FINISH, {"the_id": server, "ours": 0, "state": "error"})


@effect
def plug(world: dict[str, str], key: str, server: str) -> str:
    return world.setdefault(key, key)


@command(patience_s=300)
def choose(server: str) -> To[Chosen]:
    return To("scheduler", Choose(server=server))


@record
def claim(tx: Tx, server: str, host: str) -> None:
    if not tx.execute(TAKE_ROOM, {"at": host}).rowcount:
        raise NoCapacity(f"{host} has no room left.")
    tx.execute(sa.insert(CLAIMS), {"server": server, "host": host})


@command(patience_s=600, event="compute__do_build_and_run_instance")
def spawn(server: str, host: str, port: str) -> To[Done]:
    return To(host, Spawn(server=server, port=port))


@record
def built(tx: Tx, server: str, host: str) -> None:
    tx.execute(FINISH, {"the_id": server, "ours": 0, "state": "active", "host": host})


def fresh(url: str | None = None) -> Db:
    db = Db(url or f"sqlite:///{tempfile.mkdtemp()}/cloud.db")
    meta.drop_all(db.engine)
    meta.create_all(db.engine)
    return db


def spawned(host: dict[str, str], m: Spawn) -> Done:
    host[m.server] = m.port
    return Done()


def builds(url: str | None = None, n: int = 1500, hosts: int = 20, threads: int = 2) -> dict[str, float]:
    db, bus, names = fresh(url), MemoryBus(), [f"h{i}" for i in range(hosts)]
    clock, ids, dice = WallClock(), Ids(), random.Random()
    with db.tx() as tx:
        tx.execute(sa.insert(PROVIDERS), [{"host": h, "room": 10**6} for h in names])
    engine = Engine("c0", db, {}, bus.send, clock=clock, dice=dice)
    turn = count()

    def chosen(_: Any, m: Choose) -> Chosen:
        i = next(turn)
        return Chosen([names[(i + k) % hosts] for k in range(3)])

    machines: list[dict[str, str]] = [{} for _ in names]
    for h, mine in zip(names, machines, strict=True):
        bus.serve(h, Agent(COMPUTE, [spawned], mine, bus.send, Ledger(), clock=clock).receive)
    bus.serve("scheduler", Agent(SCHEDULER, [chosen], None, bus.send, Ledger(), clock=clock).receive)
    bus.serve("conductor", engine.receive, threads)

    def create(tx: Tx) -> str:
        server = ids.uuid()
        tx.execute(
            sa.insert(SERVERS), {"id": server, "project": "p", "host": None, "state": "building", "generation": 0}
        )
        cause = Cause(action="create", request_id=ids.request(), user_id="u", project_id="p")
        return start(tx, build, Build(server), id=ids.uuid(), subject=server, now=clock.now(), cause=cause)

    def ask(part: int) -> None:
        for _ in range(part, n, threads):
            bus.send("conductor", letter(Wake(db.run(create))))

    db.statements = db.commits = 0
    began = time.perf_counter()
    users = [threading.Thread(target=ask, args=(p,)) for p in range(threads)]
    for t in users:
        t.start()
    for t in users:
        t.join()
    accepted = time.perf_counter() - began
    left, looks = sa.select(sa.func.count()).where(RUNS.c.state == "running"), 0
    while db.look(lambda tx: tx.execute(left).scalar()):
        looks += 1
        time.sleep(0.02)
    took = time.perf_counter() - began
    statements = db.statements - looks
    done = db.look(lambda tx: tx.execute(sa.select(sa.func.count()).where(RUNS.c.state == "done")).scalar())
    assert done == n == sum(map(len, machines)), (done, n)
    bus.close()
    db.close()
    return {
        "built a second": n / took,
        "accepted a second meanwhile": n / accepted,
        "statements a build": statements / n,
        "transactions a build": (db.commits - looks) / n,
    }


@record
def nothing(tx: Tx) -> int:
    return 1


@workflow
def many(run: Run, n: int) -> None:
    for _ in range(n):
        run(nothing)


@effect
def nothing_outside(world: None, key: str) -> int:
    return 1


@workflow
def many_outside(run: Run, n: int) -> None:
    for _ in range(n):
        run(nothing_outside)


def replay(n: int = 2000) -> dict[str, float]:
    """First through; then the same again from the journal. In microseconds a step."""
    db = fresh()
    engine = Engine("c0", db, None, lambda to, raw: None, clock=WallClock(), dice=random.Random())
    took = {}
    for name, flow in (("first time, records in one commit", many), ("first time, a commit each", many_outside)):
        with db.tx() as tx:
            start(tx, flow, n, id=name, subject="s", now=0.0)
        t0 = time.perf_counter()
        engine.carry(name)
        took[name] = time.perf_counter() - t0
    with db.tx() as tx:
        tx.execute(sa.update(RUNS).values(state="running", due=0, lease=0))
    with _stopwatch(took, "row loaded"), Unit(engine.db) as unit:
        run = engine._take(unit, "first time, records in one commit")
    assert run is not None
    with _stopwatch(took, "replayed"):
        many.do(run, n)
    db.close()
    return {name: s / n * 1e6 for name, s in took.items()}


class _stopwatch:
    def __init__(self, took: dict[str, float], name: str) -> None:
        self.took, self.name = took, name

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.took[self.name] = time.perf_counter() - self.began


def table(title: str, goes: list[dict[str, float]]) -> None:
    print(f"\n{title} (median, least, most of {len(goes)})")
    for name in goes[0]:
        values = sorted(g[name] for g in goes)
        print(f"  {name:36}{statistics.median(values):12,.1f}{values[0]:12,.1f}{values[-1]:12,.1f}")


def main(args: list[str]) -> None:
    what, rest = (args[0], args[1:]) if args else ("all", [])
    if what in ("all", "builds"):
        url = rest[0] if rest else None
        name = sa.engine.make_url(url).get_backend_name() if url else "sqlite"
        threads = int(rest[1]) if len(rest) > 1 else 2
        table(f"Durable builds, {name}, {threads} threads", [builds(url, threads=threads) for _ in range(5)])
    if what in ("all", "replay"):
        table("Microseconds a step", [replay() for _ in range(5)])


if __name__ == "__main__":
    main(sys.argv[1:])
