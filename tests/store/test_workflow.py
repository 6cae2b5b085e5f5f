"""The promises of the run engine, on a real database, with clock, dice and letters in our hands."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from kilonova.kit import journal
from kilonova.kit.bus import Answered, Call, Contract, Letter, To, Wake, letter
from kilonova.kit.db import Db, Tx, meta
from kilonova.kit.errors import Aborted, Conflict, Fault, HostGone, NoCapacity, Refused, Unavailable
from kilonova.kit.journal import RUNS, STEPS, Cause
from kilonova.kit.workflow import (
    FOREVER, Engine, Run, Workflow, command, effect, noted, open_runs, record, signal, start, wake_host, workflow,
)  # fmt: skip

# ---- workflows to try it with


class Ping(Call[int], frozen=True):
    n: int


class Stop(Call[int], frozen=True):
    pass


pings = Contract("pings")
pings(Ping)
pings(Stop)


class World:
    """What effects act on; `moods` are raised one after the other."""

    def __init__(self, db: Db | None = None) -> None:
        self.did: list[tuple[str, int]] = []
        self.moods: list[Exception] = []
        self.db = db

    @property
    def done(self) -> list[int]:
        return [x for _, x in self.did]


@command(patience_s=100, event="compute_ping")
def ping(n: int) -> To[int]:
    return To("h", Ping(n=n))


@ping.undo
def _(n: int) -> To[int]:
    return To("h", Ping(n=-n))


@ping.on("abort")
def _(n: int) -> To[int]:
    return To("h", Stop())


@effect
def add(world: World, key: str, x: int) -> int:
    world.did.append((key, x))
    if world.moods:
        raise world.moods.pop(0)
    return x


@add.undo
def _(world: World, key: str, x: int) -> None:
    world.did.append((key, -x))


@record
def refuse(tx: Tx) -> None:
    raise Refused("no")


@workflow
def two(run: Run, n: int) -> None:
    a, b = run.all(ping(n), ping(n + 1))
    run(add, a + b)


@workflow
def tries(run: Run, n: int) -> None:
    run(add, 1)
    with run.attempt():
        run(add, 2)
        run(refuse)
    run(add, 3)
    run(refuse)


@workflow
def forward(run: Run, n: int) -> None:
    run(add, 1)
    run.no_return()
    run(refuse)


class WallHands:
    """A clock that stands until it is moved; sleeping moves it."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


class Desk:
    """An engine whose clock and letters are in our hands."""

    def __init__(self, db: Db) -> None:
        self.db, self.clock, self.out, self.world = db, WallHands(), list[Letter](), World(db)
        self.gone: set[str] = set()
        self.engine = self.another("c")

    def another(self, name: str, **how: Any) -> Engine:
        return Engine(
            name, how.pop("db", self.db), self.world, self.send, clock=self.clock, dice=random.Random(1),
            gone=lambda tx, host: host in self.gone, lease_s=10, **how,
        )  # fmt: skip

    def send(self, to: str, raw: bytes) -> None:
        self.out.append(msgspec.msgpack.decode(raw, type=Letter))

    def start(self, flow: Workflow[Any], job: Any = 1, id: str = "r", carry: bool = True, **how: Any) -> None:
        with self.db.tx() as tx:
            start(tx, flow, job, id=id, subject="s", now=self.clock.at, **how)
        if carry:
            self.engine.carry(id)

    def answer(self, key: str, value: Any = 0, fault: Fault | None = None) -> None:
        said = None if fault else msgspec.json.encode(value).decode()
        self.engine.receive(letter(Answered(key, answer=said, fault=fault)))

    def row(self, id: str = "r") -> Any:
        with self.db.read() as tx:
            return tx.execute(sa.select(RUNS).where(RUNS.c.id == id)).one()

    def state(self, id: str = "r") -> str:
        return str(self.row(id).state)

    def keys(self) -> list[str]:
        return [m.key for m in self.out]


@pytest.fixture
def db(tmp_path: Any) -> Iterator[Db]:
    db = Db(f"sqlite:///{tmp_path}/cloud.db")
    meta.create_all(db.engine)
    yield db
    db.close()


@pytest.fixture
def desk(db: Db) -> Desk:
    return Desk(db)


# ---- the stories


def test_commands_are_parked_and_answers_carry_the_run_on(desk: Desk) -> None:
    desk.start(two, cause=Cause(action="two"))
    assert [(m.name, m.key, m.about, m.reply) for m in desk.out] == [
        ("Ping", "r/0", "s", "conductor"), ("Ping", "r/1", "s", "conductor")]  # fmt: skip
    desk.answer("r/1", 7)
    assert desk.state() == "running"
    desk.answer("r/1", 8)  # heard already
    desk.answer("r/0", 5)
    assert desk.state() == "done" and desk.world.did == [("r/2", 12)]
    with desk.db.read() as tx:
        assert [(e.step, e.host, e.result) for e in journal.journal(tx, "r")] == [
            ("ping", "h", "Success"), ("ping", "h", "Success"), ("add", None, "Success")]  # fmt: skip


def test_unanswered_letters_are_sent_again_then_judged_and_undone_by_key(desk: Desk) -> None:
    desk.start(two)
    for desk.clock.at in (5, 11, 32, 73, 101, 102):
        desk.engine.sweep()
    assert desk.keys()[:6] == ["r/0", "r/1"] * 3
    undos = [(m.key, m.undoes) for m in desk.out if m.undoes]
    assert undos == [("r/2", "r/1")]  # one after the other, newest first
    desk.answer("r/2", 0)
    desk.answer("r/3", 0)
    assert desk.state() == "failed"


def test_an_abort_goes_to_every_host_that_is_at_it_and_their_answers_decide(desk: Desk) -> None:
    desk.start(two)
    with desk.db.tx() as tx:
        assert signal(tx, "s", "abort") == ["r"]
    desk.engine.carry("r")
    assert {"r/0/abort", "r/1/abort"} <= set(desk.keys())


def test_undo_attempts_and_replay_take_the_same_way(desk: Desk) -> None:
    desk.start(tries)
    assert desk.world.done == [1, 2, -2, 3, -3, -1] and desk.state() == "failed"
    assert desk.world.did[1][0] == desk.world.did[2][0]  # an undo is told the key of its act


def test_no_return_means_forward_or_stuck(desk: Desk) -> None:
    desk.start(forward)
    assert desk.world.done == [1] and desk.state() == "stuck"
