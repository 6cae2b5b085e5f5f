"""The promises of the run engine, one test each: on a real database, with clock, dice and letters in our hands.

`TEST_DB` names another database than SQLite, as SQLAlchemy writes it.
"""

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from kilonova.kit import journal
from kilonova.kit.bus import Answered, Call, Letter, To, Wake, letter
from kilonova.kit.db import Db, Tx, meta
from kilonova.kit.errors import Fault, HostGone, NoCapacity, NotFound, Refused, Unavailable
from kilonova.kit.journal import ALONE, RUNS, STEPS, Cause
from kilonova.kit.workflow import (
    LAST_ALONE,
    LOOK_S,
    RECORDS,
    Engine,
    Run,
    Workflow,
    command,
    effect,
    first_try,
    noted,
    open_runs,
    record,
    signal,
    start,
    wake_host,
    when_alone,
    workflow,
)

# ---- workflows to try it with


class Ping(Call[int], frozen=True):
    n: int


class Stop(Call[int], frozen=True):
    pass


class World:
    """What effects act on. `moods` are raised one after the other, `meanwhile` is done while an effect is at work."""

    def __init__(self, db: Db) -> None:
        self.db = db
        self.did: list[tuple[str, int]] = []
        self.moods: list[Exception] = []
        self.meanwhile: list[Callable[[], object]] = []

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


@command(patience_s=100)
def quiet_ping(n: int) -> To[int]:
    return To("h", Ping(n=n))


@effect
def add(world: World, key: str, x: int) -> int:
    world.did.append((key, x))
    if world.meanwhile:
        world.meanwhile.pop(0)()
    if world.moods:
        raise world.moods.pop(0)
    return x


@add.undo
def _(world: World, key: str, x: int) -> None:
    world.did.append((key, -x))
    if world.moods:
        raise world.moods.pop(0)


@record
def refuse(tx: Tx) -> None:
    raise Refused("no", why="a secret")


@record
def write(tx: Tx, said: str) -> str:
    """Changes something that the test can see: the subject's first run is marked."""
    tx.execute(sa.update(RUNS).where(RUNS.c.id == "r").values(user_id=RUNS.c.user_id + said))
    return said


@record
def write_badly(tx: Tx, said: str, trouble: str) -> None:
    write.do(tx, said)
    raise ZeroDivisionError if trouble == "bug" else Refused(trouble)


@effect
def count_rows(world: World, key: str) -> int:
    with world.db.read() as tx:
        n = int(tx.execute(sa.select(sa.func.count()).select_from(STEPS)).scalar_one())
    world.did.append((key, n))
    return n


@workflow
def two(run: Run, n: int) -> None:
    a, b = run.all(ping(n), ping(n + 1))
    run(add, a + b)


@workflow
def one(run: Run, n: int) -> None:
    run(add, run(ping, n))


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


@workflow
def inner_return(run: Run, n: int) -> None:
    run(add, 1)
    with run.attempt():
        run(add, 2)
        run.no_return()
        run(refuse)
    run(add, 3)


@workflow
def rests(run: Run, n: int) -> None:
    with run.attempt():
        run(refuse)
    run(count_rows)
    run(count_rows)


@workflow
def hosts(run: Run, n: int) -> None:
    run.if_undone(write, "gave up")
    for i in range(1, n + 1):
        with run.attempt():
            run(quiet_ping, i)
            return
    raise NoCapacity("No valid host was found.")


@workflow
def writes(run: Run, n: int) -> None:
    for _ in range(n):
        run(write, "x")


@workflow
def spoilt(run: Run, trouble: str) -> None:
    run(write, "a")
    with run.attempt():
        run(write_badly, "b", trouble)
    run(write, "c")


@workflow
def buggy(run: Run, n: int) -> None:
    run(add, 1)
    raise KeyError("what a pity")


@workflow
def alone(run: Run, n: int) -> None:
    run.when_alone()
    run(add, n)


class Job(msgspec.Struct, frozen=True):
    name: str
    sizes: dict[str, int]


class Made(msgspec.Struct, frozen=True):
    name: str
    many: tuple[int, ...]


@record
def make(tx: Tx, job: Job) -> Made:
    return Made(job.name, tuple(job.sizes.values()))


@workflow
def typed(run: Run, job: Job) -> None:
    made = run(make, job)
    assert isinstance(made, Made)
    run(add, sum(made.many))


class StillClock:
    """Stands until it is moved; sleeping moves it."""

    at = 0.0

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


class Desk:
    """An engine whose clock and letters are in our hands."""

    def __init__(self, db: Db) -> None:
        self.db, self.clock, self.out, self.world = db, StillClock(), list[Letter](), World(db)
        self.gone: set[str] = set()
        self.engine = self.another("c")

    def another(self, name: str, db: Any = None) -> Engine:
        return Engine(
            name,
            db or self.db,
            self.world,
            self.send,
            clock=self.clock,
            dice=random.Random(1),
            gone=lambda tx, host: host in self.gone,
            lease_s=10,
        )

    def send(self, to: str, raw: bytes) -> None:
        self.out.append(msgspec.msgpack.decode(raw, type=Letter))

    def start(self, flow: Workflow[Any], job: Any = 1, id: str = "r", carry: bool = True, **how: Any) -> None:
        with self.db.tx() as tx:
            start(tx, flow, job, id=id, subject="s", now=self.clock.at, **how)
        if carry:
            self.engine.carry(id)

    def call(self, name: str) -> None:
        """Call out to all that are at work on the subject, and wake nobody."""
        with self.db.tx() as tx:
            signal(tx, "s", name)

    def answer(self, key: str, value: Any = 0, fault: Fault | None = None, engine: Engine | None = None) -> None:
        said = None if fault else msgspec.json.encode(value).decode()
        (engine or self.engine).receive(letter(Answered(key, answer=said, fault=fault)))

    def row(self, id: str = "r") -> Any:
        with self.db.read() as tx:
            return tx.execute(sa.select(RUNS).where(RUNS.c.id == id)).one()

    def state(self, id: str = "r") -> str:
        return str(self.row(id).state)

    def steps(self, id: str = "r") -> list[journal.Event]:
        with self.db.read() as tx:
            return journal.journal(tx, id)

    def sent(self) -> list[str]:
        return [m.key for m in self.out]


@pytest.fixture
def db(tmp_path: Any) -> Iterator[Db]:
    db = Db(os.environ.get("TEST_DB") or f"sqlite:///{tmp_path}/cloud.db")
    meta.drop_all(db.engine, tables=[RUNS, STEPS, ALONE])
    meta.create_all(db.engine, tables=[RUNS, STEPS, ALONE])
    yield db
    db.close()


@pytest.fixture
def desk(db: Db) -> Desk:
    return Desk(db)


# ---- parking and replay


def test_commands_are_parked_and_answers_carry_the_run_on(desk: Desk) -> None:
    desk.start(two)
    assert [(m.name, m.key, m.about, m.reply) for m in desk.out] == [
        ("Ping", "r/0", "s", "conductor"),
        ("Ping", "r/1", "s", "conductor"),
    ]
    desk.answer("r/1", 7)
    assert desk.state() == "running"
    desk.answer("r/1", 8)  # heard already
    desk.answer("r/0", 5)
    assert desk.state() == "done" and desk.world.did == [("r/2", 12)]
    assert [(e.step, e.host, e.result) for e in desk.steps()] == [
        ("ping", "h", "Success"),
        ("ping", "h", "Success"),
        ("add", None, "Success"),
    ]


def test_answers_to_what_nobody_asked_change_nothing(desk: Desk) -> None:
    desk.start(one)
    for key in ("r/7", "nobody/0", "r", "", "/", "r/0/abort", "r/x"):
        desk.answer(key, 1)
    desk.engine.receive(letter(Wake("nobody")))
    desk.engine.receive(b"no letter at all")
    assert desk.state() == "running" and len(desk.out) == 1


def test_a_wake_letter_carries_a_run(desk: Desk) -> None:
    desk.start(one, carry=False)
    desk.engine.receive(letter(Wake("r")))
    assert desk.sent() == ["r/0"]


def test_jobs_and_answers_come_as_their_types(desk: Desk) -> None:
    desk.start(typed, Job("a", {"x": 2, "y": 3}))
    assert desk.world.done == [5] and desk.state() == "done"


def test_a_run_can_be_started_by_name_and_waits_for_a_conductor_that_knows_it(desk: Desk) -> None:
    with desk.db.tx() as tx:
        start(tx, "two", 1, id="r", subject="s", now=0)
        start(tx, "of a later release", 1, id="later", subject="s2", now=0)
    desk.engine.sweep()
    assert desk.sent() == ["r/0", "r/1"]
    assert desk.state("later") == "running" and desk.row("later").due == 30 and desk.row("later").lease == 0


def test_changed_code_is_noticed(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.start(two)
    with desk.db.tx() as tx:
        tx.execute(sa.update(STEPS).values(step="pong"))
        tx.execute(sa.update(RUNS).values(due=0))
    desk.engine.carry("r")
    assert desk.state() == "stuck" and "the code asks for ping" in caplog.text
    with desk.db.read() as tx:
        assert [a.run for a in journal.stuck(tx)] == ["r"]


# ---- letters


def test_unanswered_letters_are_sent_again_ever_more_rarely_then_judged_and_undone_by_key(desk: Desk) -> None:
    desk.start(two)
    for desk.clock.at in (5, 11, 32, 73, 101, 102):
        desk.engine.sweep()
    assert desk.sent()[:6] == ["r/0", "r/1"] * 3
    assert [m.until for m in desk.out[::2]][:3] == [20, 41, 82]  # a host does not begin what is sent again anyway
    undos = [(m.key, m.undoes) for m in desk.out if m.undoes]
    assert undos == [("r/2", "r/1")]  # one after the other, newest first
    desk.answer("r/2", 0)
    desk.answer("r/3", 0)
    assert desk.state() == "failed"


def test_a_deadline_is_kept_to_the_second(desk: Desk) -> None:
    desk.start(one)
    for desk.clock.at in (11, 32, 73):
        desk.engine.sweep()
    assert desk.row().due == 100  # not 73 + 60


def test_who_was_not_there_to_hear_the_answer_asks_once_more_before_he_judges(desk: Desk) -> None:
    """The machine slept for a night in the middle of a build; the host has done it, and its answer is in its ledger."""
    desk.start(one)
    desk.clock.at = 30_000
    desk.engine.sweep()
    assert desk.sent() == ["r/0", "r/0"] and desk.state() == "running" and desk.out[1].until > 30_000
    desk.clock.at = 30_031
    desk.engine.sweep()
    assert [m.undoes for m in desk.out if m.undoes] == ["r/0"]


def test_patience_without_end_is_patient_for_years(desk: Desk) -> None:
    """2 ** tries outgrows a float after some 1,024 tries, which is 17 hours."""
    desk.start(one)
    with desk.db.tx() as tx:
        tx.execute(sa.update(STEPS).values(tries=5000, due=0))
        tx.execute(sa.update(RUNS).values(due=0))
    desk.engine.carry("r")
    assert desk.sent() == ["r/0", "r/0"] and desk.state() == "running"


def test_letters_are_sent_after_the_commit_that_journals_them(desk: Desk) -> None:
    seen: list[int] = []

    def send(to: str, raw: bytes) -> None:
        with desk.db.read() as tx:
            seen.append(tx.execute(sa.select(sa.func.count()).select_from(STEPS)).scalar_one())

    desk.engine.send = send
    desk.start(two)
    assert seen == [2, 2]


def test_a_host_that_is_gone_is_not_waited_for_and_gets_no_undo(desk: Desk) -> None:
    desk.start(one)
    desk.gone.add("h")
    with desk.db.tx() as tx:
        assert wake_host(tx, "h") == ["r"] and wake_host(tx, "another") == []
    desk.engine.sweep()
    assert desk.state() == "failed" and desk.sent() == ["r/0"]
    assert [(e.step, e.fault and e.fault.kind) for e in desk.steps()] == [
        ("ping", "HostGone"),
        ("undo ping", "HostGone"),
    ]


def test_a_host_that_lives_anew_is_sent_again_what_its_last_life_may_have_lost(desk: Desk) -> None:
    desk.start(two)
    desk.answer("r/0", 1)
    with desk.db.tx() as tx:
        assert wake_host(tx, "h") == ["r"]
    desk.engine.sweep()
    assert desk.sent() == ["r/0", "r/1", "r/1"]


def test_a_start_tries_at_once_what_was_unavailable_before(desk: Desk) -> None:
    desk.world.moods = [Unavailable("503")]
    desk.start(tries)
    assert desk.engine.sweep() == 0
    again = desk.another("c")
    again.recover()
    assert again.sweep() == 1 and desk.state() == "failed"


def test_a_judgement_never_overwrites_an_answer_that_came_after_the_look(desk: Desk) -> None:
    @workflow
    def judged(run: Run, n: int) -> None:
        run(add, 1)
        run.all(quiet_ping(1), quiet_ping(2))
        run(add, 2)

    desk.start(judged)
    engine = desk.engine
    for desk.clock.at in (11, 32, 73, 99):  # somebody was there all the time: at 100 it is judged
        engine.sweep()
    with desk.db.tx() as tx:
        tx.execute(sa.update(RUNS).values(due=0))
    run = taken(engine)  # has loaded the journal, and holds no transaction: as before an effect
    desk.clock.at = 101
    with desk.db.tx() as tx:  # both answers, by a process that saw the lease taken
        done = {"finished": 100.0, "answer": "1"}
        tx.execute(sa.update(STEPS).where(STEPS.c.run == "r", STEPS.c.n == 1).values(done))
        tx.execute(sa.update(STEPS).where(STEPS.c.run == "r", STEPS.c.n == 2).values(done))
        tx.execute(sa.update(RUNS).values(wakes=RUNS.c.wakes + 1, due=0))
    finish(run)
    desk.clock.at = 112
    engine.sweep()
    assert desk.state() == "done" and desk.world.done == [1, 2]


# ---- undo


def test_undo_attempts_and_replay_take_the_same_way(desk: Desk) -> None:
    desk.start(tries)
    assert desk.world.done == [1, 2, -2, 3, -3, -1] and desk.state() == "failed"
    assert desk.world.did[1][0] == desk.world.did[2][0]  # an undo is told the key of its act
    with desk.db.read() as tx:
        assert journal.fault_of(tx, "r") == Fault("Refused", "no")


def test_a_refused_command_is_undone_for_it_may_have_happened_half(desk: Desk) -> None:
    desk.start(one)
    desk.answer("r/0", fault=Fault("Refused", "no disk"))
    assert [(m.key, m.undoes) for m in desk.out] == [("r/0", ""), ("r/1", "r/0")]
    desk.answer("r/1", 0)
    assert desk.state() == "failed"


def test_of_parallel_steps_each_is_undone_whichever_failed(desk: Desk) -> None:
    desk.start(two)
    desk.answer("r/0", fault=Fault("Refused", "no"))
    assert not [m for m in desk.out if m.undoes]  # the other has no verdict yet
    desk.answer("r/1", 7)
    desk.answer("r/2", 0)
    desk.answer("r/3", 0)
    assert [(m.key, m.undoes) for m in desk.out if m.undoes] == [("r/2", "r/1"), ("r/3", "r/0")]
    assert desk.state() == "failed"


def test_an_effect_that_was_refused_is_undone_for_a_predecessor_may_have_died_in_it(desk: Desk) -> None:
    desk.world.moods = [Refused("no")]
    desk.start(tries)
    assert desk.world.done == [1, -1] and desk.state() == "failed"


def test_an_effect_that_was_aborted_untaken_is_undone_all_the_same(desk: Desk) -> None:
    desk.start(one)
    desk.call("abort")
    desk.answer("r/0", 5)  # the host had done it; the effect after it is aborted
    assert desk.world.did == [("r/1", -5)]
    desk.answer("r/3", 0)
    assert desk.state() == "failed"


def test_the_next_host_is_tried_and_what_was_promised_is_done_last(desk: Desk) -> None:
    desk.start(hosts, 2)
    desk.answer("r/0", fault=Fault("Refused", "no"))
    desk.answer("r/1", fault=Fault("Refused", "no"))
    assert desk.state() == "failed" and desk.row().user_id == "gave up"
    with desk.db.read() as tx:
        assert journal.fault_of(tx, "r") == Fault("NoCapacity", "No valid host was found.")


def test_no_return_means_forward_or_stuck(desk: Desk) -> None:
    desk.start(forward)
    assert desk.world.done == [1] and desk.state() == "stuck"


def test_no_return_inside_an_attempt_ends_the_trying(desk: Desk) -> None:
    desk.start(inner_return)
    assert desk.world.done == [1, 2] and desk.state() == "stuck"


def test_an_undo_that_is_refused_leaves_the_run_stuck_until_somebody_lets_it_try_again(desk: Desk) -> None:
    desk.world.moods = [Refused("no"), Refused("never")]
    desk.start(tries)
    assert desk.state() == "stuck" and desk.world.done == [1, -1]
    with desk.db.tx() as tx:
        assert journal.again(tx, "r", 0) and not journal.again(tx, "nobody", 0)
    desk.engine.sweep()
    assert desk.state() == "failed" and desk.world.done == [1, -1, -1]


def test_an_undo_that_cannot_be_done_now_is_tried_for_as_long_as_it_takes(desk: Desk) -> None:
    desk.world.moods = [Refused("no"), *[Unavailable("503")] * 50]
    desk.start(tries)
    while desk.state() == "running":
        desk.clock.at += 60
        desk.engine.sweep()
    assert desk.state() == "failed" and desk.world.done == [1] + [-1] * 51 and desk.clock.at > 2000


def test_an_error_of_ours_comes_to_grief_like_any_other(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.world.moods = [ValueError("/etc/shadow")]
    desk.start(tries)
    desk.start(buggy, id="b")
    assert (desk.state(), desk.state("b")) == ("failed", "failed") and desk.world.done == [1, -1, 1, -1]
    with desk.db.read() as tx:
        assert journal.fault_of(tx, "r") == Fault("Trouble", "An unexpected error occurred (ValueError).")
        assert journal.fault_of(tx, "b") == Fault("Trouble", "An unexpected error occurred (KeyError).")
    assert "/etc/shadow" in caplog.text and "what a pity" in caplog.text


# ---- records


def test_a_refused_record_takes_back_its_own_changes_and_no_others(desk: Desk) -> None:
    for trouble in ("full", "bug"):
        desk.start(spoilt, trouble, id="r")
        assert desk.state() == "done" and desk.row().user_id == "ac"
        with desk.db.tx() as tx:
            tx.execute(sa.delete(RUNS))
            tx.execute(sa.delete(STEPS))


def test_records_that_follow_each_other_are_one_commit_but_not_without_end(desk: Desk) -> None:
    desk.start(writes, RECORDS, carry=False)
    desk.db.commits = 0
    desk.engine.carry("r")
    assert desk.row().user_id == "x" * RECORDS and desk.db.commits == 2  # with the look of `row`
    desk.start(writes, 2 * RECORDS + 1, id="r2", carry=False)
    desk.db.commits = 0
    desk.engine.carry("r2")
    assert desk.db.commits == 3 and desk.state("r2") == "done"


def test_a_build_costs_five_transactions_and_no_more_statements_than_it_did(desk: Desk) -> None:
    """Create; take; park at a command; and for each answer one that hears it, records, and parks or ends."""

    @workflow
    def like_a_build(run: Run, n: int) -> None:
        run(add, 1)
        run(quiet_ping, 1)
        run(write, "claimed")
        run(quiet_ping, 2)
        run(write, "built")

    desk.engine.gone = None
    desk.db.commits = desk.db.statements = 0
    desk.start(like_a_build)
    desk.answer("r/1", 1)
    desk.answer("r/3", 1)
    takings = 0 if desk.db.engine.dialect.name == "postgresql" else 3  # it says at once what was taken
    assert (desk.db.commits, desk.db.statements) == (5, 19 + takings)
    assert desk.state() == "done"


@effect
def peep(world: World, key: str, n: int) -> int:
    world.did.append((key, n))
    return n + 1


@peep.only_looks
def _(world: World, n: int) -> bool:
    return n == 1


@workflow
def peeps(run: Run, n: int) -> None:
    run(write, str(run(peep, n)))


def test_who_only_looks_does_not_end_the_transaction_that_he_is_in(desk: Desk) -> None:
    for n, commits in ((1, 1), (2, 2)):
        desk.start(peeps, n, id=f"r{n}", carry=False)
        desk.db.commits = 0
        desk.engine.carry(f"r{n}")
        assert desk.db.commits == commits
        assert desk.row(f"r{n}").state == "done"
    assert desk.world.did == [("r1/0", 1), ("r2/0", 2)]


def test_an_act_rests_on_journaled_facts_only(desk: Desk) -> None:
    """A refusal that only the process knew was acted on; it died; the replay was not refused."""
    desk.start(rests)
    assert desk.world.done == [1, 2] and desk.state() == "done"


@effect
def look(world: World, key: str, x: int) -> None:
    world.did.append((key, int(first_try())))
    if world.moods:
        raise world.moods.pop(0)


@look.undo
def _(world: World, key: str, x: int) -> None:
    assert not first_try()


@workflow
def looks(run: Run, n: int) -> None:
    run(write, "a")
    run(look, 1)
    run(look, 2)
    run(refuse)


def test_an_effect_knows_when_nobody_can_have_tried_it_before(desk: Desk) -> None:
    """Then it need not look for what a try has left. A row before it that was there already may be another's."""
    desk.start(looks)
    assert desk.world.did == [("r/1", 1), ("r/2", 1)]
    desk.world.did.clear()
    desk.world.moods = [Unavailable("503")]
    desk.start(looks, id="q")
    desk.clock.at = 2
    killed = desk.another("killed")
    desk.world.moods = [KeyboardInterrupt()]  # type: ignore[list-item]
    with pytest.raises(KeyboardInterrupt):
        killed.sweep()
    desk.clock.at = 20
    desk.engine.sweep()
    assert desk.world.did == [("q/1", 1), ("q/1", 0), ("q/1", 0), ("q/2", 0)] and desk.state("q") == "failed"


# ---- waiting


def test_unavailable_waits_without_a_thread(desk: Desk) -> None:
    desk.world.moods = [Unavailable("503"), Unavailable("503")]
    desk.start(tries)
    assert len(desk.world.did) == 1 and desk.engine.sweep() == 0
    for desk.clock.at in (1.1, 4):
        assert desk.engine.sweep() == 1
    assert desk.state() == "failed" and desk.world.done[:4] == [1, 1, 1, 2]


def test_patience_ends_and_unavailable_becomes_the_verdict(desk: Desk) -> None:
    desk.world.moods = [Unavailable("503")] * 100
    desk.start(tries)
    while desk.state() == "running" and desk.clock.at < 1000:
        desk.clock.at += 5
        desk.engine.sweep()
        if desk.clock.at > 600:
            desk.world.moods.clear()
    with desk.db.read() as tx:
        assert journal.fault_of(tx, "r") == Fault("Unavailable", "503")
    assert 600 <= desk.clock.at <= 610


def test_every_open_run_has_a_time_when_somebody_looks(desk: Desk) -> None:
    desk.start(one)
    assert 0 < desk.row().due <= LOOK_S
    desk.start(alone, 1, id="a")
    assert 0 < desk.row("a").due <= LOOK_S


def test_a_run_waits_until_it_is_alone_and_is_told_when_it_is(desk: Desk) -> None:
    desk.start(one, 1)
    desk.start(alone, 7, id="a")
    desk.start(alone, 8, id="b")
    assert desk.world.done == []
    desk.answer("r/0", 1)  # ends the first; nobody sweeps
    assert desk.world.done == [1, 7, 8] and {desk.state(i) for i in "rab"} == {"done"}


def test_two_that_wait_to_be_alone_do_not_wait_for_each_other_nor_go_together(desk: Desk) -> None:
    @workflow
    def alone_for_long(run: Run, n: int) -> None:
        run.when_alone()
        run(quiet_ping, n)

    desk.start(one, 1)
    desk.start(alone_for_long, 7, id="a")
    desk.start(alone_for_long, 8, id="b")
    desk.answer("r/0", 1)
    went = [m.key for m in desk.out[1:]]
    assert len(went) == 1
    first, second = ("a", "b") if went == ["a/1"] else ("b", "a")
    for desk.clock.at in (1, 2, 4, 8):
        desk.engine.sweep()
    assert f"{second}/1" not in desk.sent()
    desk.answer(f"{first}/1", 1)
    assert f"{second}/1" in desk.sent()


def test_who_waits_to_be_alone_stops_when_it_is(desk: Desk) -> None:
    """What it undoes is not taken from under the hands of another; and it goes before others that wait."""

    @workflow
    def reserved(run: Run, n: int) -> None:
        run(add, n)
        run.when_alone()
        run(quiet_ping, n)

    @workflow
    def alone_for_long(run: Run, n: int) -> None:
        run.when_alone()
        run(quiet_ping, n)

    desk.start(alone_for_long, 1)
    desk.start(reserved, 7, id="a")
    desk.start(alone, 3, id="b")
    with desk.db.tx() as tx:
        assert signal(tx, "s", "abort", run="a") == ["a"]
    for desk.clock.at in (1, 2, 4, 8):
        desk.engine.sweep()
    assert desk.world.done == [7] and desk.state("a") == "running"
    desk.answer("r/1", 1)
    assert desk.state("r") == "done" and desk.state("a") == "failed" and desk.world.done == [7, -7, 3]
    with desk.db.read() as tx:
        assert journal.fault_of(tx, "a") == Fault("Aborted", "The action was aborted.")


def test_being_alone_is_taken_by_comparing(desk: Desk) -> None:
    """Who saw an old holder does not get it, though all he saw had ended: another went first."""

    class Late:
        """A transaction that saw who was alone last before another became it."""

        def __init__(self, tx: Tx, saw: str | None) -> None:
            self.tx, self.saw = tx, saw

        def execute(self, statement: Any, *terms: Any) -> Any:
            found = self.tx.execute(statement, *terms)
            return Scalar(self.saw) if statement is LAST_ALONE else found

    class Scalar:
        def __init__(self, value: str | None) -> None:
            self.value = value

        def scalar(self) -> str | None:
            return self.value

    for n, saw in (("1", None), ("2", "r1")):
        desk.start(alone, 1, id=f"r{n}")
        with desk.db.tx() as tx:
            assert tx.execute(sa.select(ALONE.c.run)).scalars().all() == [f"r{n}"]
        with pytest.raises(Unavailable), desk.db.tx() as tx:
            when_alone.do(Late(tx, saw), "s", "late")
    with desk.db.tx() as tx:
        when_alone.do(tx, "s", "next")


# ---- signals


def test_an_abort_goes_to_every_host_that_is_at_it_and_their_answers_decide(desk: Desk) -> None:
    desk.start(two)
    desk.call("abort")
    desk.call("abort")
    desk.engine.carry("r")
    assert sorted(desk.sent()) == ["r/0", "r/0", "r/0/abort", "r/1", "r/1", "r/1/abort"]
    assert {m.about for m in desk.out if m.key.endswith("/abort")} == {""}  # or it would queue behind its command
    desk.answer("r/0", 1)
    desk.answer("r/1", 1)
    assert desk.state() == "done"


def test_an_abort_before_a_command_is_sent_means_it_is_not_sent(desk: Desk) -> None:
    desk.start(one, carry=False)
    desk.call("abort")
    desk.engine.carry("r")
    assert desk.out == [] and desk.state() == "failed"
    with desk.db.read() as tx:
        assert journal.fault_of(tx, "r") == Fault("Aborted", "The action was aborted.")


def test_an_abort_does_not_try_the_next_host(desk: Desk) -> None:
    desk.start(hosts, 3)
    desk.call("abort")
    desk.answer("r/0", fault=Fault("Aborted", "The action was aborted."))
    assert desk.sent() == ["r/0"] and desk.state() == "failed"


def test_after_the_point_of_no_return_an_abort_is_too_late(desk: Desk) -> None:
    @workflow
    def gone_by(run: Run, n: int) -> None:
        run.no_return()
        run(quiet_ping, n)
        run(add, n)

    desk.start(gone_by)
    desk.call("abort")
    desk.answer("r/0", 1)
    assert desk.state() == "done" and desk.world.done == [1]


def test_a_signal_for_a_later_step_is_kept_until_then(desk: Desk) -> None:
    @command
    def sending(n: int) -> To[int]:
        return To("h", Ping(n=n))

    @sending.on("force_complete")
    def _(n: int) -> To[int]:
        return To("h", Stop())

    @workflow
    def forced(run: Run, n: int) -> None:
        run(quiet_ping, 1)
        run(sending, 2)

    desk.start(forced)
    desk.call("force_complete")
    desk.engine.carry("r")
    assert set(desk.sent()) == {"r/0"}
    desk.answer("r/0", 1)
    assert desk.sent()[-2:] == ["r/1", "r/1/force_complete"]
    desk.clock.at = 11
    desk.engine.sweep()
    assert desk.sent()[-2:] == ["r/1", "r/1/force_complete"] and len(desk.sent()) >= 5  # both are sent again


def test_signals_never_outgrow_their_column(desk: Desk) -> None:
    desk.start(one)
    for _ in range(100):
        desk.call("abort")
        desk.call("force_complete")
    assert desk.row().signals == " abort force_complete "


def test_news_that_came_while_we_looked_is_not_slept_through(desk: Desk) -> None:
    """A signal comes while an effect is at work: the run is looked at again at once, and nobody has to sweep."""

    @workflow
    def told_late(run: Run, n: int) -> None:
        run(add, 1)
        run(ping, 1)

    desk.world.meanwhile = [lambda: desk.call("abort")]
    desk.start(told_late)
    assert "r/1/abort" in desk.sent()
    assert desk.row().lease == 0


# ---- leases, late owners, and a database with moods


def taken(engine: Engine, id: str = "r") -> Run:
    """A run in the hands of a thread that is then held up: it holds a lease, and no transaction."""
    from kilonova.kit.workflow import Unit

    unit = Unit(engine.db)
    run = engine._take(unit, id)
    assert run is not None
    run._commit(run.held_until)
    return run


def finish(run: Run) -> None:
    """The thread goes on, and its engine takes care of what happens to it."""
    run.engine._bring_one(run.id, lambda unit, id: _given(run, unit))


def _given(run: Run, unit: Any) -> Run | None:
    if run.unit is unit:
        return None
    if run.n:  # played before
        return None
    run.unit = unit
    return run


def test_a_late_owner_changes_nothing(desk: Desk) -> None:
    desk.start(tries, carry=False)
    late = taken(desk.engine)
    desk.clock.at = 11
    desk.another("other").carry("r")
    assert desk.state() == "failed"
    before, row = list(desk.world.did), desk.row()
    finish(late)
    assert desk.world.did == before and desk.row() == row


def test_a_late_owner_writes_no_record(desk: Desk) -> None:
    desk.start(writes, 1, carry=False)
    late = taken(desk.engine)
    desk.clock.at = 11
    desk.another("other").carry("r")
    finish(late)
    assert desk.row().user_id == "x"


def test_nobody_acts_on_the_last_half_of_a_lease(desk: Desk) -> None:
    """An owner that was held up finds out before it acts, not after."""
    desk.start(tries, carry=False)
    late = taken(desk.engine)
    with desk.db.tx() as tx:
        tx.execute(sa.update(RUNS).values(epoch=RUNS.c.epoch + 1))  # another took it
    desk.clock.at = 6
    finish(late)
    assert desk.world.did == []


def test_a_run_that_another_holds_is_left_alone_until_its_lease_ends(desk: Desk) -> None:
    desk.start(tries, carry=False)
    taken(desk.engine)
    other = desk.another("other")
    assert other.sweep() == 0
    other.carry("r")
    assert desk.world.did == []
    desk.clock.at = 10
    assert other.sweep() == 1 and desk.state() == "failed"


def test_an_answer_that_comes_while_another_holds_the_run_is_kept_and_not_slept_through(desk: Desk) -> None:
    @workflow
    def both(run: Run, n: int) -> None:
        run(add, sum(run.all(quiet_ping(1), add(2))))

    desk.world.moods = [Unavailable("503")]
    desk.start(both)
    other = desk.another("other")
    desk.world.meanwhile = [lambda: desk.answer("r/0", 5, engine=other)]
    desk.clock.at = 1
    assert desk.engine.sweep() == 1  # once
    assert desk.state() == "done" and desk.world.done == [2, 2, 7]


def test_a_new_life_takes_over_at_once_what_its_last_one_held(desk: Desk) -> None:
    desk.start(tries, carry=False)
    desk.start(one, 1, id="parked")
    taken(desk.engine)
    other = desk.another("other")
    assert other.recover() == 0
    again = desk.another("c")
    assert again.recover() == 2
    again.sweep()
    assert desk.state() == "failed" and desk.world.done == [1, 2, -2, 3, -3, -1]
    assert (
        desk.sent() == ["parked/0"] and desk.row("parked").lease == 0
    )  # looked at, and not sent again before its time


class Moody:
    """A database that refuses, or says it did: `moods` holds one word for each transaction to come."""

    def __init__(self, db: Db) -> None:
        self.db, self.moods, self.read = db, list[str](), db.read

    @contextmanager
    def tx(self) -> Iterator[Tx]:
        mood = self.moods.pop(0) if self.moods else ""
        with self.db.tx() as tx:
            yield tx
            if mood == "refused":
                raise sa.exc.OperationalError("commit", {}, Exception("deadlock"))
        if mood == "unknown":
            raise sa.exc.OperationalError("commit", {}, Exception("connection lost"))


@workflow
def mixed(run: Run, n: int) -> None:
    run(write, "a")
    run(add, 1)
    run(write, "b")
    run(quiet_ping, 1)
    run(write, "c")


@pytest.mark.parametrize("mood", ["refused", "unknown"])
@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("times", [1, 3])
def test_each_record_is_done_once_whatever_the_database_says(desk: Desk, mood: str, at: int, times: int) -> None:
    moody = Moody(desk.db)
    engine = desk.another("c", moody)
    desk.start(mixed, carry=False)
    moody.moods = [""] * at + [mood] * times
    engine.carry("r")
    desk.answer("r/3", 1, engine=engine)
    for desk.clock.at in (20, 40):  # at most a letter was not sent
        engine.sweep()
    assert desk.state() == "done" and desk.row().user_id == "abc"
    assert 1 <= len(desk.world.did) <= 1 + times and {k for k, _ in desk.world.did} == {"r/1"}


def test_who_lost_hold_of_a_run_does_not_take_it_from_one_of_its_own_house(desk: Desk) -> None:
    """The database refuses a taking; before it is tried again, another thread of the same engine has the run."""
    moody = Moody(desk.db)
    engine, held = desk.another("c", moody), list[Run]()
    desk.start(mixed, carry=False)
    moody.moods = ["refused"]
    desk.clock.sleep = lambda seconds: held.append(taken(desk.another("c")))  # type: ignore[method-assign]
    engine.dice.seed(2)  # a process has one; two that agree would agree on the names of takings, too
    engine.carry("r")
    assert len(held) == 1 and desk.world.did == [] and desk.row().user_id == ""
    finish(held[0])
    assert desk.sent() == ["r/3"]


def test_while_the_database_is_ill_the_run_is_left_and_then_found_without_waiting_for_the_lease(desk: Desk) -> None:
    moody = Moody(desk.db)
    engine = desk.another("c", moody)
    desk.start(mixed, carry=False)
    moody.moods = [""] + ["refused"] * 5  # after an effect: we hold a lease
    with pytest.raises(sa.exc.OperationalError):
        engine.carry("r")
    assert desk.row().lease > desk.clock.at and desk.world.done == [1]
    desk.another("other").sweep()
    assert desk.sent() == []
    engine.sweep()
    assert desk.sent() == ["r/3"] and desk.row().user_id == "ab"


def test_an_ill_database_is_no_trouble_of_the_workflow(desk: Desk) -> None:
    @workflow
    def catches_all(run: Run, n: int) -> None:
        try:
            run(write, "a")
        except Exception:
            run(add, 1)

    moody = Moody(desk.db)
    engine = desk.another("c", moody)
    desk.start(catches_all, carry=False)
    moody.moods = ["refused", "refused"]
    engine.carry("r")
    assert desk.state() == "done" and desk.row().user_id == "a" and desk.world.done == []


# ---- the sweeper


def test_the_sweeper_finds_what_nobody_was_told_of(desk: Desk) -> None:
    for i in range(5):
        with desk.db.tx() as tx:
            start(tx, one, i, id=f"r{i}", subject=f"s{i}", now=0)
    assert desk.engine.sweep(most=3) == 3 and desk.engine.sweep(most=3) == 2 and desk.engine.sweep() == 0
    assert sorted(desk.sent()) == [f"r{i}/0" for i in range(5)]


# ---- views


def asked(action: str, n: int) -> Cause:
    return Cause(action=action, request_id=f"req-{n}", user_id="u", project_id="p")


def test_instance_actions_and_events_are_views_of_the_journal(desk: Desk) -> None:
    desk.start(one, cause=asked("create", 1))
    desk.clock.at = 5
    with desk.db.read() as tx:
        [a] = journal.actions(tx, "s")
        assert (a.action, a.request_id, a.user_id, a.project_id) == ("create", "req-1", "u", "p")
        assert (a.started, a.updated, a.finished, a.result, a.fault) == (0, 0, None, None, None)
        [e] = journal.events(tx, "r")
        assert (e.event, e.host, e.started, e.finished, e.result) == ("compute_ping", "h", 0, None, None)
    desk.answer("r/0", fault=Fault("Refused", "no disk"))
    with desk.db.read() as tx:
        assert journal.action(tx, "s", "req-1").updated == 5
    desk.clock.at = 7
    desk.answer("r/1", 0)
    with desk.db.read() as tx:
        a = journal.action(tx, "s", "req-1")
        assert (a.updated, a.finished, a.result, a.fault) == (7, 7, "Error", Fault("Refused", "no disk"))
        [e] = journal.events(tx, "r")  # the undo is not theirs to see
        assert (e.finished, e.result, e.fault) == (5, "Error", Fault("Refused", "no disk"))
        assert [s.step for s in journal.journal(tx, "r")] == ["ping", "undo ping"]


def test_what_needs_no_steps_is_noted_and_what_nobody_asked_for_is_hidden(desk: Desk) -> None:
    desk.start(writes, 1, id="hidden")
    with desk.db.tx() as tx:
        noted(tx, id="l", subject="s", now=3, cause=asked("lock", 1), event="api_lock")
        noted(tx, id="m", subject="s", now=4, cause=asked("resetState", 2))
        assert open_runs(tx, "s") == []
        assert [(a.action, a.result, a.updated) for a in journal.actions(tx, "s")] == [
            ("resetState", "Success", 4),
            ("lock", "Success", 3),
        ]
        assert [(e.event, e.result) for e in journal.events(tx, "l")] == [("api_lock", "Success")]
        assert journal.events(tx, "m") == []


def test_actions_come_in_pages_the_newest_first(desk: Desk) -> None:
    with desk.db.tx() as tx:
        for i in range(6):
            noted(tx, id=f"r{i}", subject="s", now=float(i // 2), cause=asked("lock", i))
        noted(tx, id="else", subject="another", now=9, cause=asked("lock", 9))

        def page(**how: Any) -> list[str]:
            return [a.request_id[-1] for a in journal.actions(tx, "s", **how)]

        assert page() == ["5", "4", "3", "2", "1", "0"]
        assert page(limit=2) == ["5", "4"] and page(limit=2, marker="req-4") == ["3", "2"]
        assert page(since=1.0) == ["5", "4", "3", "2"] and page(before=1.0) == ["3", "2", "1", "0"]
        assert page(since=1.0, before=1.0, limit=1) == ["3"]
        with pytest.raises(NotFound):
            page(marker="req-9")
        with pytest.raises(NotFound):
            journal.action(tx, "s", "req-9")


def test_a_page_of_actions_is_one_query(desk: Desk) -> None:
    with desk.db.tx() as tx:
        for i in range(50):
            noted(tx, id=f"r{i}", subject="s", now=float(i), cause=asked("lock", i))
    with desk.db.read() as tx:
        before = desk.db.statements
        assert len(journal.actions(tx, "s")) == 50 and desk.db.statements == before + 1


def test_what_a_run_was_told_is_forgotten_when_it_is_over(desk: Desk) -> None:
    desk.start(typed, Job("a secret", {"x": 1}), id="r")
    desk.start(forward, 7, id="stuck")
    assert (desk.row().args, desk.row("stuck").args) == ("null", "7")


def test_the_load_says_how_many_and_how_late(desk: Desk) -> None:
    desk.start(one, 1, id="a")
    desk.start(forward, 1, id="b")
    desk.start(writes, 1, id="c")
    with desk.db.read() as tx:
        assert journal.load(tx, 5) == journal.Load(1, 1, 0)
        assert journal.load(tx, 25) == journal.Load(1, 1, 15)
    desk.clock.at = 20
    desk.start(one, 1, id="d", carry=False)
    with desk.db.read() as tx:
        assert journal.load(tx, 25) == journal.Load(2, 1, 15)


def test_an_ill_database_does_not_tell_what_it_was_told(desk: Desk) -> None:
    with pytest.raises(sa.exc.IntegrityError) as e, desk.db.tx() as tx:
        for _ in range(2):
            start(tx, typed, Job("a secret", {}), id="r", subject="s", now=0)
    assert "a secret" not in str(e.value)


def test_old_journals_are_forgotten_in_bounded_bites_and_only_those(desk: Desk) -> None:
    for i in range(7):
        desk.start(writes, 2, id=f"h{i}")
    desk.start(one, 1, id="open")
    desk.start(forward, 1, id="stuck")
    with desk.db.tx() as tx:
        noted(tx, id="a", subject="s", now=0, cause=asked("lock", 1), event="api_lock")
        assert journal.forget(tx, 0.0) == 0
        assert journal.forget(tx, 1.0, hidden_only=True, most=4) == 4
        assert journal.forget(tx, 1.0, hidden_only=True, most=4) == 3
        assert [a.run for a in journal.actions(tx, "s")] == ["a"]
        assert journal.forget(tx, 1.0) == 1
        assert set(tx.execute(sa.select(STEPS.c.run)).scalars()) == {"open", "stuck"}
        assert set(tx.execute(sa.select(RUNS.c.id)).scalars()) == {"open", "stuck"}


def test_the_queries_that_are_asked_all_day_use_an_index(db: Db) -> None:
    if db.engine.name != "sqlite":
        pytest.skip("EXPLAIN QUERY PLAN is SQLite's")
    from kilonova.kit import workflow as w

    asked_all_day: dict[str, tuple[Any, dict[str, Any], str]] = {
        "due": (w.DUE, {"now": 0.0, "old": 0.0, "most": 1}, "runs_due"),
        "take": (w.TAKE[0], {"the_id": "", "me": "", "now": 0.0, "till": 0.0}, "sqlite_autoindex_runs"),
        "others": (journal.OPEN_ON, {"the_subject": ""}, "runs_subject"),
        "journal": (journal.JOURNAL, {"the_id": ""}, "sqlite_autoindex_steps"),
        "answer": (w.ANSWER, {"the_run": "", "the_n": 0, "answer": ""}, "sqlite_autoindex_steps"),
    }
    with db.read() as tx:
        for name, (statement, terms, index) in asked_all_day.items():
            plan: list[str] = []

            def explain(conn: Any, cursor: Any, text: str, values: Any, *_: Any, plan: list[str] = plan) -> Any:
                plan.extend(row[3] for row in cursor.connection.execute("EXPLAIN QUERY PLAN " + text, values))

            sa.event.listen(db.engine, "before_cursor_execute", explain)
            tx.execute(statement.statement, terms)
            sa.event.remove(db.engine, "before_cursor_execute", explain)
            assert index in plan[0] and "SCAN" not in plan[0], (name, plan)


def test_nothing_secret_is_said(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kilonova.kit.workflow")  # whatever another test set up
    desk.start(forward)
    assert "a secret" in caplog.text and "a secret" not in str(desk.row()) + str(desk.steps())


def test_host_gone_is_the_only_fault_of_an_undo_that_is_taken_for_good(desk: Desk) -> None:
    desk.world.moods = [Refused("no"), HostGone("gone")]
    desk.start(tries)
    assert desk.state() == "failed"
