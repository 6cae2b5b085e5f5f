"""The engine with its threads: many runs at once, real letters, real time. `TEST_DB` names another database."""

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from kilonova.kit.bus import Agent, Call, Contract, Ledger, MemoryBus, To
from kilonova.kit.clock import WallClock
from kilonova.kit.db import Db, Tx, meta
from kilonova.kit.errors import Refused
from kilonova.kit.journal import ALONE, RUNS, STEPS
from kilonova.kit.worker import ROUND, Worker
from kilonova.kit.workflow import Engine, Run, command, effect, record, start, workflow


class Toss(Call[int], frozen=True):
    n: int


tosses = Contract("tosses")
tosses(Toss)


class World:
    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.inside: Counter[str] = Counter()
        self.overlaps = 0
        self.kept: dict[str, int] = {}


@record
def note(tx: Tx, n: int) -> int:
    return n


@effect
def keep(world: World, key: str, n: int) -> None:
    with world.guard:
        world.kept[key] = n


@keep.undo
def _(world: World, key: str, n: int) -> None:
    with world.guard:
        world.kept.pop(key, None)


@command(patience_s=60)
def toss(n: int, host: str) -> To[int]:
    return To(host, Toss(n=n))


@toss.undo
def _(n: int, host: str) -> To[int]:
    return To(host, Toss(n=-n - 1))


@workflow
def tossed(run: Run, n: int) -> None:
    run(keep, n)
    for host in ("h0", "h1"):
        with run.attempt():
            run(note, n)
            run(toss, n, host)
            return
    raise Refused("nowhere")


@effect
def be_inside(world: World, key: str, subject: str) -> None:
    with world.guard:
        world.inside[subject] += 1
        world.overlaps += world.inside[subject] > 1
    time.sleep(0.005)
    with world.guard:
        world.inside[subject] -= 1


@workflow
def alone_inside(run: Run, n: int) -> None:
    run.when_alone()
    run(be_inside, run.subject)


@pytest.fixture
def db(tmp_path: Any) -> Iterator[Db]:
    db = Db(os.environ.get("TEST_DB") or f"sqlite:///{tmp_path}/cloud.db")
    meta.drop_all(db.engine, tables=[RUNS, STEPS, ALONE])
    meta.create_all(db.engine, tables=[RUNS, STEPS, ALONE])
    yield db
    db.close()


def engine(db: Db, bus: MemoryBus, name: str = "c0", world: Any = None) -> Engine:
    return Engine(name, db, world or World(), bus.send, clock=WallClock(), dice=random.Random(0))


def wait(until: Callable[[], object], most_s: float = 30) -> None:
    end = time.monotonic() + most_s
    while not until():
        assert time.monotonic() < end, "it does not come to rest"
        time.sleep(0.01)


def states(db: Db) -> Counter[str]:
    with db.read() as tx:
        return Counter(tx.execute(sa.select(RUNS.c.state)).scalars())


def begin(db: Db, flow: Any, n: int, subject: str, id: str) -> str:
    return db.run(lambda tx: start(tx, flow, n, id=id, subject=subject, now=time.time()))


def test_many_runs_on_two_conductors_all_come_to_their_end(db: Db) -> None:
    bus, world, acts, guard = MemoryBus(), World(), Counter[int](), threading.Lock()
    others = set(threading.enumerate())  # clouds of other tests may not have gone to sleep yet

    def answered(host: str, m: Toss) -> int:
        with guard:
            acts[m.n] += 1
        if m.n >= 0 and m.n % (3 if host == "h0" else 9) == 0:
            raise Refused("not here")
        return m.n

    for h in ("h0", "h1"):
        bus.serve(h, Agent(tosses, [answered], h, bus.send, Ledger(), clock=WallClock()).receive, threads=3)
    engines = [engine(db, bus, f"c{i}", world) for i in range(2)]
    workers = [Worker(e, threads=2, sweep_s=0.2) for e in engines]
    for e, w in zip(engines, workers, strict=True):
        bus.serve("conductor", e.receive, threads=2)
        w.start()
    for n in range(90):
        run = begin(db, tossed, n, f"s{n}", f"r{n}")
        workers[n % 2].wake(run)
        workers[(n + 1) % 2].wake(run)  # both are told: one has it
    wait(lambda: not states(db)["running"])
    for w in workers:
        w.close()
    bus.close()
    assert states(db) == {"done": 80, "failed": 10}
    assert len(world.kept) == 80 and not [n for n, times in acts.items() if times > 2]
    assert not set(threading.enumerate()) - others


def test_one_run_at_a_time_is_alone_on_its_subject(db: Db) -> None:
    bus, world = MemoryBus(), World()
    workers = [Worker(engine(db, bus, f"c{i}", world), threads=3, sweep_s=0.1) for i in range(2)]
    for w in workers:
        w.start()
    for n in range(24):
        workers[n % 2].wake(begin(db, alone_inside, n, f"s{n % 3}", f"r{n}"))
    wait(lambda: not states(db)["running"])
    for w in workers:
        w.close()
    assert world.overlaps == 0 and states(db) == {"done": 24}


def test_what_was_started_elsewhere_is_swept_up(db: Db) -> None:
    worker = Worker(engine(db, MemoryBus()), threads=1, sweep_s=0.05)
    worker.start()
    begin(db, alone_inside, 1, "s", "r")
    wait(lambda: states(db)["done"] == 1)
    worker.close()


def test_a_start_takes_over_what_the_last_life_held(db: Db) -> None:
    begin(db, alone_inside, 1, "s", "r")
    with db.tx() as tx:  # as a process leaves it that was killed in the middle
        tx.execute(sa.update(RUNS).values(owner="c0#1234", lease=time.time() + 60, epoch=5))
    worker = Worker(engine(db, MemoryBus()), threads=1, sweep_s=0.05)
    worker.start()
    wait(lambda: states(db)["done"] == 1, 5)
    worker.close()


def test_an_error_kills_no_thread_and_a_wake_up_twice_is_one(db: Db, caplog: pytest.LogCaptureFixture) -> None:
    conductor, carried = engine(db, MemoryBus()), list[str]()
    go, done = threading.Event(), threading.Event()

    def carry(id: str) -> None:
        go.wait(10)
        carried.append(id)
        if id == "last":
            done.set()
        raise ZeroDivisionError

    conductor.carry = carry  # type: ignore[method-assign]
    worker = Worker(conductor, threads=1, sweep_s=60)
    worker.start()
    for run in ("first", "twice", "twice", "last"):
        worker.wake(run)
    wait(lambda: "first" not in worker.queued)
    go.set()
    assert done.wait(10)
    worker.close()
    assert carried == ["first", "twice", "last"] and caplog.text.count("ZeroDivisionError") >= 2


def test_an_ill_database_does_not_end_the_sweeper(db: Db, caplog: pytest.LogCaptureFixture) -> None:
    conductor = engine(db, MemoryBus())
    looks, due = threading.Semaphore(0), conductor.due

    def moody(most: int = 100, fresh_s: float = 0.0) -> list[str]:
        looks.release()
        if len(caplog.records) < 2:
            raise sa.exc.OperationalError("select", {}, Exception("gone away"))
        return due(most, fresh_s)

    conductor.due = moody  # type: ignore[method-assign]
    worker = Worker(conductor, threads=1, sweep_s=0.01)
    worker.start()
    for _ in range(4):
        assert looks.acquire(timeout=10)
    begin(db, alone_inside, 1, "s", "r")
    wait(lambda: states(db)["done"] == 1)
    worker.close()


def test_what_nobody_has_had_yet_is_left_to_who_was_told_of_it_and_found_when_he_did_not_come(db: Db) -> None:
    conductor = engine(db, MemoryBus())
    begin(db, alone_inside, 1, "s", "r")
    assert conductor.due(fresh_s=60) == []
    assert conductor.due() == conductor.due(fresh_s=-60) == ["r"]
    conductor.carry("r")
    begin(db, alone_inside, 1, "t", "q")
    worker = Worker(conductor, threads=1, sweep_s=0.05)
    worker.start()
    wait(lambda: states(db)["done"] == 2)
    worker.close()


def test_more_than_a_look_is_for_is_found_by_the_next_looks(db: Db) -> None:
    conductor, many = engine(db, MemoryBus()), 3 * ROUND
    for i in range(many):
        begin(db, alone_inside, 1, f"s{i}", f"r{i}")
    worker = Worker(conductor, threads=2, sweep_s=0.3)
    worker.start()
    wait(lambda: states(db)["done"] == many)
    worker.close()


def test_closing_ends_all_threads_and_leaves_what_is_queued_to_the_next_life(db: Db) -> None:
    worker = Worker(engine(db, MemoryBus()), threads=2, sweep_s=60)
    worker.start()
    worker.close()
    worker.wake(begin(db, alone_inside, 1, "s", "r"))
    assert not [t for t in worker.crew if t.is_alive()] and states(db) == {"running": 1}
    Worker(engine(db, MemoryBus())).close()  # never started
