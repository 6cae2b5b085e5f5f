"""Durable functions: plain Python whose steps are journaled, parked, replayed and undone.

    @workflow
    def migrate(run: Run, job: Migrate) -> None:
        run.if_undone(put_down, job.server)          # last of all: the server is itself again
        landing = run(prepare, job.server, job.to)   # a command: the host's answer comes minutes later
        run(send, job.server, landing)
        run.no_return()
        run(settle, job.server, job.to)

A run is a function that is called again and again.  What it has done stands in the journal; a replay is given
those answers, in microseconds, and goes on where the journal ends.  Where it must wait for a host, the function
is *left*, by raising `Parked`: no thread waits and no stack is kept.  The answer is journaled and the function is
called again, by whichever conductor has a hand free.  So what happens after a crash is what happens always:
there is no recovery code, because there is no other code.

What a workflow owes in return: between its steps it branches on nothing but its arguments and the answers of
steps, and looks at neither clock nor dice nor the world.

The rules that this file rests on:

1. Wake-ups are hints, `due` is the promise: each open run has a time when somebody looks, lost letter or not.
2. Letters are sent after the commit that journals them. Parking compares `wakes`, so no news is slept through.
3. `epoch` moves with *every* commit: a late owner, and a commit whose fate was unknown, change nothing.
4. An act rests on journaled facts only. An effect's own row may wait for the next commit; rows before it may not.
5. An undo is a step with a place of its own. It names the key it takes back, and the host remembers: an act that
   arrives after its undo does not happen.
6. An effect is undone even when it was "never" taken: a predecessor may have died between act and journal.
7. One transaction holds all that can be one: the news that woke the run, the records it leads to, the parking.
   It ends before anything is done that a rollback cannot take back: an effect, a letter.
"""

import logging
import random
import typing
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

import msgspec
import sqlalchemy as sa

from kilonova.kit import journal
from kilonova.kit.bus import Answered, Door, Send, To, Wake, letter
from kilonova.kit.clock import Clock
from kilonova.kit.db import Tx, claim
from kilonova.kit.errors import Aborted, Fault, HostGone, Refused, Trouble, Unavailable
from kilonova.kit.journal import (
    ALONE,
    RUNS,
    STEPS,
    Action,
    Cause,
    Event,
    action,
    actions,
    again,
    events,
    fault_of,
    faults_of,
    forget,
    noted,
    open_runs,
    signal,
    stuck,
    wake_host,
)  # fmt: skip
from kilonova.kit.log import about
from kilonova.kit.ready import ready

__all__ = [
    "ALONE",
    "FOREVER",
    "RUNS",
    "STEPS",
    "Action",
    "Ask",
    "Cause",
    "Diverged",
    "Engine",
    "Event",
    "Run",
    "Step",
    "Stuck",
    "Workflow",
    "action",
    "actions",
    "again",
    "command",
    "effect",
    "events",
    "fault_of",
    "faults_of",
    "first_try",
    "forget",
    "noted",
    "open_runs",
    "record",
    "signal",
    "start",
    "stuck",
    "wake_host",
    "workflow",
]  # fmt: skip

log = logging.getLogger(__name__)

P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")
Kind = Literal["record", "effect", "command"]

FOREVER = 1e9  # seconds: all the patience in the world
RESEND_S = 10.0  # until a letter is sent again; doubled each time, to a minute
RETRY_S = 0.5  # until a step that was Unavailable is tried again; the same
RECORD_S = 5.0  # … but for records
ABSENT_S = 30.0  # who looks so much later than he wanted was not there: stopped, or asleep with its machine
LOOK_S = 600.0  # the longest that nobody looks at an open run
RECORDS = 20  # in one transaction: it keeps others waiting
TRIES = 5  # of a transaction that the database refuses

ILL = sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError  # of the database, not of the run


# ---- what a workflow is made of


class Step(Generic[P, R]):
    """`record`: in one transaction with its journal row: exactly once.
    `effect`: a quick act from here, e.g. over HTTP; named by `key`, it may happen twice and must not matter.
    `command`: a letter to a host; says where and what, and comes back with the answer, much later.

    An undo stands beside its act, is of the same kind, and is told what the act was told, never what it answered:
    the act may have died half-way.  An effect's undo is given the key of the act.
    """

    def __init__(
        self, do: Callable[..., Any], kind: Kind, patience_s: float, event: str | None, name: str = ""
    ) -> None:
        self.do, self.kind, self.patience_s, self.event = do, kind, patience_s, event
        self.name = name or do.__name__
        assert len(self.name) <= 59, f"the journal has no room for {self.name}"
        self.undoes: Step[P, Any] | None = None
        self.looks: Callable[..., bool] | None = None
        self.signals: dict[str, Callable[..., To[Any]]] = {}
        self.decoder: msgspec.json.Decoder[R] | None = None

    def __call__(self, *args: P.args, **more: P.kwargs) -> "Ask[R]":
        """This step, to be done with these arguments: for `run.all`."""
        return Ask(self, args, more)

    def undo(self, do: Callable[..., Any]) -> "Step[P, Any]":
        """What takes this step back. It has all the patience in the world."""
        self.undoes = Step(do, self.kind, FOREVER, None, f"undo {self.name}")
        return self.undoes

    def only_looks(self, when: Callable[Concatenate[Any, P], bool]) -> Callable[Concatenate[Any, P], bool]:
        """`when(world, *args)`: this effect changes nothing then, and asks nobody who may be slow. So it need not be alone:

        the transaction that we are in goes on over it, and its answer is kept with what comes next.
        """
        assert self.kind == "effect" and self.undoes is None
        self.looks = when
        return when

    def on(self, signal: str) -> Callable[[Callable[..., To[Any]]], Callable[..., To[Any]]]:
        """While the host is at this command, pass `signal` on to it as the message made here."""
        assert self.kind == "command"
        return lambda do: self.signals.setdefault(signal, do)

    def decoded(self, answer: str) -> R:
        if self.decoder is None:
            hint = typing.get_type_hints(self.do).get("return", Any)
            if self.kind == "command":
                hint = (typing.get_args(hint) or (Any,))[0]
            self.decoder = msgspec.json.Decoder(hint)
        return self.decoder.decode(answer)


_first: ContextVar[bool] = ContextVar("first", default=False)


def first_try() -> bool:
    """Inside an effect: nobody can have tried it before, so nobody need look for what an earlier try has left.

    For the row before it was written by this very carrier; an earlier one, had he come so far, had written it.
    """
    return _first.get()


class Ask(Generic[R]):
    """A step and what it is told."""

    __slots__ = ("args", "more", "step")

    def __init__(self, step: Step[Any, R], args: tuple[Any, ...], more: dict[str, Any]) -> None:
        self.step, self.args, self.more = step, args, more


class _Declare(Protocol):
    """What `@record(patience_s=…)` returns; the two others have theirs."""

    def __call__(self, do: Callable[Concatenate[Tx, P], R]) -> Step[P, R]: ...


class _DeclareEffect(Protocol):
    def __call__(self, do: Callable[Concatenate[Any, str, P], R]) -> Step[P, R]: ...


class _DeclareCommand(Protocol):
    def __call__(self, do: Callable[P, To[R]]) -> Step[P, R]: ...


@overload
def record(do: Callable[Concatenate[Tx, P], R]) -> Step[P, R]: ...
@overload
def record(*, patience_s: float = 600, event: str | None = None) -> _Declare: ...
def record(do: Any = None, *, patience_s: float = 600, event: str | None = None) -> Any:
    """`def claim(tx, server, host)`. A Trouble rolls it back and is its verdict; Unavailable: later, while patience lasts.

    `event` is what users are shown of the step; without one it is not shown.
    """
    return _declared(do, "record", patience_s, event)


@overload
def effect(do: Callable[Concatenate[Any, str, P], R]) -> Step[P, R]: ...
@overload
def effect(*, patience_s: float = 600, event: str | None = None) -> _DeclareEffect: ...
def effect(do: Any = None, *, patience_s: float = 600, event: str | None = None) -> Any:
    """`def plug(world, key, server)`. Must be well over within half a lease: give its requests a timeout."""
    return _declared(do, "effect", patience_s, event)


@overload
def command(do: Callable[P, To[R]]) -> Step[P, R]: ...
@overload
def command(*, patience_s: float = 3600, event: str | None = None) -> _DeclareCommand: ...
def command(do: Any = None, *, patience_s: float = 3600, event: str | None = None) -> Any:
    """`def spawn(server, host) -> To[Spawned]`. Pure: it is asked again for every letter."""
    return _declared(do, "command", patience_s, event)


def _declared(do: Any, kind: Kind, patience_s: float, event: str | None) -> Any:
    return Step(do, kind, patience_s, event) if do else lambda do: Step(do, kind, patience_s, event)


class Workflow(Generic[A]):
    """A function of a run and its job, known by its name."""

    def __init__(self, do: Callable[["Run", A], None]) -> None:
        self.do, self.name = do, do.__name__
        self.decoder: msgspec.json.Decoder[A] | None = None

    def job(self, args: str) -> A:
        if self.decoder is None:
            second = list(typing.get_type_hints(self.do).items())[1]
            self.decoder = msgspec.json.Decoder(second[1])
        return self.decoder.decode(args)


WORKFLOWS: dict[str, Workflow[Any]] = {}


def workflow(do: Callable[["Run", A], None]) -> Workflow[A]:
    """`def build(run: Run, job: Build) -> None`: its job is decoded as what it is annotated with."""
    known = WORKFLOWS.get(do.__name__)
    assert known is None or known.do.__module__ == do.__module__, f"there are two workflows named {do.__name__}"
    flow = WORKFLOWS[do.__name__] = Workflow(do)
    return flow


# These are not errors of the workflow, so no `except Exception` in one may catch them.


class Parked(BaseException):
    """Nothing more can be done until something happens."""


class Lost(BaseException):
    """Another conductor carries this run now."""


class Overtaken(BaseException):
    """While we judged a command to have failed, its answer came."""


class Ill(BaseException):
    """The database failed; its own error is the cause."""


class Stuck(BaseException):
    """It can go neither forward nor back; a person must look."""


class Diverged(Stuck):
    """The code no longer takes the path that the journal took."""


def start(
    tx: Tx, flow: Workflow[A] | str, job: A, *, id: str, subject: str, now: float, cause: Cause | None = None
) -> str:
    """Begin a run inside the caller's transaction: no run without its cause, no cause without its run.

    Wake it after the commit, or let the sweeper find it.  Without a `cause` it is nobody's action, and not shown.
    A role that may not import the workflow says its name.
    """
    name = flow if isinstance(flow, str) else flow.name
    journal.opened(tx, name, msgspec.json.encode(job), id=id, subject=subject, now=now, cause=cause)
    return id


def runs_past(tx: Tx, subject: str, step: str) -> int:
    """How many runs of this subject have this step behind them."""
    of_subject = sa.select(RUNS.c.id).where(RUNS.c.subject == subject)
    done = sa.select(sa.func.count()).where(
        STEPS.c.run.in_(of_subject), STEPS.c.step == step, STEPS.c.finished.is_not(None)
    )
    return int(tx.execute(done).scalar() or 0)


@record(patience_s=FOREVER)
def when_alone(tx: Tx, subject: str, me: str) -> None:
    """Have the subject for yourself; not now, while another run is at work on it.

    Those that wait here themselves do not count, or two would wait for each other; but those of them that were told
    to stop go first, and stop when they are alone: what they undo is in nobody's hands then.  That only one of them goes on is
    the claim's business: a row for each subject, taken by comparing.  (It was tried to lock all runs of the subject
    and look: each holds its own row by then and wants the others', and PostgreSQL takes a second to see that.)
    """
    last = tx.execute(LAST_ALONE, {"the_subject": subject}).scalar()  # first: it must be over when we look who is not
    others = set(open_runs(tx, subject)) - {me}
    if others and others - _who_lets_us_pass(tx, subject, me):
        raise Unavailable("Another action has not ended yet.")
    try:
        if last is None:
            tx.execute(FIRST_ALONE, {"subject": subject, "run": me})
        elif not claim(tx, NEXT_ALONE, {"the_subject": subject, "seen": last, "run": me}):
            raise Unavailable("Another action went first.")
    except sa.exc.IntegrityError as e:
        raise Unavailable("Another action went first.") from e


def _who_lets_us_pass(tx: Tx, subject: str, me: str) -> set[str]:
    waiting = set(tx.execute(WAITING, {"the_subject": subject}).scalars())
    stopping = set(tx.execute(TOLD_TO_STOP, {"the_subject": subject}).scalars())
    return waiting if me in stopping else waiting - stopping


class Engine:
    """One conductor's hands. Any number of threads may use it; the database says who carries which run.

    Nothing in here waits or has a thread: see `worker.py`.  `world` is what effects are given.  `gone(tx, host)`
    says that a host is no more, so that nobody waits for its answer.  `watch(workflow, step)` is told each step
    that is taken or looked at.  `turns`, if given, is a lock: one thread carries at a time.
    """

    def __init__(
        self,
        me: str,
        db: "Transacts",
        world: Any,
        send: Send,
        *,
        clock: Clock,
        dice: random.Random,
        gone: Callable[[Tx, str], bool] | None = None,
        lease_s: float = 60.0,
        address: str = "conductor",
        watch: Callable[[str, str], object] | None = None,
        turns: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.turns = turns or nullcontext()
        self.me, self.db, self.world, self.send = me, db, world, send
        self.clock, self.dice, self.gone, self.lease_s = clock, dice, gone, lease_s
        self.address, self.watch = address, watch
        self.ended: Callable[[str], object] = lambda run: None  # told after each run's end: a hint
        self.dropped: dict[str, Run] = {}  # left in the middle because the database failed
        self.door = Door()
        self.door.on(Wake, lambda m: self.carry(m.run))
        self.door.on(Answered, self.answered)
        self.receive = self.door.receive

    def carry(self, id: str) -> None:
        """Take the run, unless another has it, and bring it as far as it will go."""
        self._bring(id, self._take)

    def answered(self, m: Answered) -> None:
        """Journal an answer, and bring the run on, if it is free: one transaction."""
        id, slash, n = m.key.rpartition("/")
        if not slash or not n.isdecimal():
            return  # to a signal: what counts is what becomes of the command
        told = {"the_run": id, "the_n": int(n), "answer": m.answer, "fault": m.fault and _json(m.fault)}

        def take(unit: "Unit", id: str) -> "Run | None":
            tx = unit.opened()  # the run's row before the step's, as everywhere: two orders are a deadlock
            row = _taken(tx, TAKE_WOKEN, self._terms(id))
            if row is None:
                tx.execute(journal.WAKE, {"the_id": id})
            if not tx.execute(ANSWER, told | {"finished": self.clock.now()}).rowcount:
                unit.rollback()  # heard before, or judged meanwhile
                return None
            return None if row is None else self._run_of(unit, row)

        self._bring(id, take)

    def due(self, most: int = 100, fresh_s: float = 0.0) -> list[str]:
        """What somebody should look at: new, unanswered, waiting for better times, or left by one who died.

        Everything that wakes a run is a hint.  This is the promise.  `fresh_s`: so long what nobody has had yet is left
        to those who were told of it.
        """
        self._let_go()
        now = self.clock.now()
        with self.db.read() as tx:
            return list(tx.execute(DUE, {"now": now, "old": now - fresh_s, "most": most}).scalars())

    def sweep(self, most: int = 100) -> int:
        """Carry what is due."""
        due = self.due(most)
        for id in due:
            self.carry(id)
        return len(due)

    def recover(self) -> int:
        """At start-up: what an earlier life of this name held is held by nobody, and what it had parked is due.

        For its letters may never have been sent, and what was unavailable then may be there now.  How many runs
        that were.
        """
        with self.db.tx() as tx:
            name = self.me.replace("/", "//").replace("%", "/%").replace("_", "/_")
            return tx.execute(RECOVER, {"any_of_mine": f"{name}#%"}).rowcount

    # -- taking and bringing

    def _bring(self, id: str, take: "Take") -> None:
        """Bring a run as far as it will go, and then those that waited for its end."""
        todo: deque[tuple[str, Take]] = deque([(id, take)])
        while todo:
            with self.turns:
                todo.extend((other, self._wake) for other in self._bring_one(*todo.popleft()))

    def _bring_one(self, id: str, take: "Take") -> list[str]:
        """Take a run and play it; again while there is news, and from the top when the database refuses.

        After a failure nobody knows what was committed.  A replay knows: it reads it.
        """
        run, tries = None, 0
        while True:
            try:
                with Unit(self.db) as unit:
                    run = take(unit, id) or (run and self._retaken(unit, run))
                    if run is None:
                        return []
                    with about(**run.names):
                        quiet = run.play()
                    if quiet:
                        return run.others
                    run, take = None, self._take
            except Lost:
                return []
            except Overtaken:
                continue
            except (Ill, *ILL) as e:
                tries += 1
                if tries == TRIES:
                    if run:
                        self.dropped[id] = run
                    raise (e.__cause__ or e) from None
                self.clock.sleep(self.dice.uniform(0, 0.02) * tries)

    def _take(self, unit: "Unit", id: str) -> "Run | None":
        row = _taken(unit.opened(), TAKE, self._terms(id))
        return None if row is None else self._run_of(unit, row)

    def _wake(self, unit: "Unit", id: str) -> "Run | None":
        """Something happened to it: take it if it is free, though it be not due; else let its owner know."""
        tx = unit.opened()
        if (row := _taken(tx, TAKE_WOKEN, self._terms(id))) is not None:
            return self._run_of(unit, row)
        tx.execute(journal.WAKE, {"the_id": id})
        return None

    def _retaken(self, unit: "Unit", run: "Run") -> "Run | None":
        """Our own run again, whether or not our last commit came to be."""
        terms = self._terms(run.id) | {"ours": run.row.owner}
        row = _taken(unit.opened(), RETAKE, terms)
        return None if row is None else self._run_of(unit, row)

    def _run_of(self, unit: "Unit", row: Any) -> "Run":
        # The epoch moves with every commit: with the first taking there is no step yet.
        steps: Any = unit.opened().execute(journal.JOURNAL, {"the_id": row.id}) if row.epoch > 1 else ()
        return Run(self, unit, row, {s[1]: _stored(s) for s in steps})

    def _terms(self, id: str) -> dict[str, Any]:
        """A name for each taking: so that a thread that lost hold of a run does not take it from one of its own house."""
        now = self.clock.now()
        return {
            "the_id": id,
            "me": f"{self.me}#{self.dice.getrandbits(40):010x}",
            "now": now,
            "till": now + self.lease_s,
        }

    def _let_go(self) -> None:
        """Give back what the database would not let us give back before: its lease need not run out."""
        for id, run in list(self.dropped.items()):
            with self.db.tx() as tx:
                tx.execute(LET_GO, {"the_id": id, "ours": run.row.owner})
            self.dropped.pop(id, None)


class Transacts(Protocol):
    """A `Db`, as far as an engine needs one."""

    def tx(self) -> AbstractContextManager[Tx]: ...

    def read(self) -> AbstractContextManager[Tx]: ...


class Unit:
    """The transaction we are in, if we are in one: opened when first needed, and over before anything is done outside.

    Left with an exception it is rolled back, else committed.
    """

    def __init__(self, db: Transacts) -> None:
        self.db = db
        self.tx: Tx | None = None
        self.scope: AbstractContextManager[Tx] | None = None

    def __enter__(self) -> "Unit":
        return self

    def __exit__(self, kind: Any, trouble: BaseException | None, trace: Any) -> None:
        if trouble is None:
            self.commit()
        else:
            self.rollback(trouble)

    def opened(self) -> Tx:
        if self.tx is None:
            scope = self.db.tx()
            self.tx, self.scope = scope.__enter__(), scope
        return self.tx

    def commit(self) -> None:
        if scope := self._left():
            scope.__exit__(None, None, None)

    def rollback(self, trouble: BaseException | None = None) -> None:
        if scope := self._left():
            trouble = trouble or Lost()
            try:
                scope.__exit__(type(trouble), trouble, trouble.__traceback__)
            except BaseException as e:
                if e is not trouble:
                    raise

    def _left(self) -> AbstractContextManager[Tx] | None:
        scope, self.scope, self.tx = self.scope, None, None
        return scope


Take = Callable[[Unit, str], "Run | None"]


# ---- one run, carried once


class Past(msgspec.Struct):
    """A row of the journal. Fields as in STEPS, in their order."""

    run: str
    n: int
    step: str
    event: str | None = None
    host: str | None = None
    started: float = 0.0
    finished: float | None = None
    answer: str | None = None
    fault: str | None = None
    tries: int = 0
    due: float = 0.0
    until: float = 0.0
    heeded: str = ""
    stored: bool = False
    loaded: bool = False  # it was there when we took the run

    def close(self, now: float, answer: Any = None, fault: Trouble | None = None) -> None:
        self.finished = now
        self.answer = _json(answer) if fault is None else None
        self.fault = None if fault is None else _json(Fault.of(fault))

    def trouble(self) -> Trouble:
        assert self.fault
        return _FAULT.decode(self.fault).trouble()


class Run:
    """A run in somebody's hands: what its workflow is given as `run`."""

    def __init__(self, engine: Engine, unit: Unit, row: sa.Row[Any], past: dict[int, Past]) -> None:
        self.engine, self.unit, self.row, self.journal = engine, unit, row, past
        self.id: str = row.id
        self.subject: str = row.subject
        self.started: float = row.started
        self.held_until: float = row.lease
        self.epoch: int = row.epoch  # as we left it
        self.n = 0  # the next position
        self.stack: list[tuple[Past | None, Step[Any, Any], tuple[Any, ...], dict[str, Any]]] = []  # to be undone
        self.dirty: dict[int, Past] = {}  # rows to be written
        self.outbox: list[tuple[str, bytes]] = []  # letters to be sent after that
        self.records = 0  # in the transaction that we are in
        self.due = float("inf")
        self.final = self.unwinding = False
        self.others: list[str] = []  # who may go on when this one has ended
        self.called = set(row.signals.split()) - {s for p in past.values() if p.heeded for s in p.heeded.split()}
        self.heeding: set[str] = set()

    # -- for workflows

    @property
    def cause(self) -> Cause | None:
        """Who asked for it."""
        r = self.row
        if r.action is None:
            return None
        return Cause(action=r.action, request_id=r.request_id, user_id=r.user_id, project_id=r.project_id)

    @property
    def names(self) -> dict[str, str | None]:
        """What the log shall say of who is at it."""
        r = self.row
        asked = {"request_id": r.request_id, "global_request_id": r.global_request_id}
        return {**asked, "run": self.id, "server": self.subject}

    @property
    def now(self) -> float:
        """What time it is, for a record to write down. It is another at each replay: nothing may branch on it."""
        return self.engine.clock.now()

    def __call__(self, step: Step[P, R], *args: P.args, **more: P.kwargs) -> R:
        """Do this step, or be told what came of it. Raises the Trouble that it ended with."""
        past = self._reach(step, args, more)
        self._heeded()
        if past.finished is None:
            raise Parked
        if past.fault is not None:
            raise past.trouble()
        assert past.answer is not None
        return step.decoded(past.answer)

    def all(self, *asks: Ask[R]) -> list[R]:
        """Several at once: `run.all(ping(1), ping(2))`. Their answers, in this order.

        Each has its verdict before the first trouble is raised, so undo knows them all.
        """
        pasts = [self._reach(a.step, a.args, a.more) for a in asks]
        self._heeded()
        if any(p.finished is None for p in pasts):
            raise Parked
        for p in pasts:
            if p.fault is not None:
                raise p.trouble()
        return [a.step.decoded(p.answer or "") for p, a in zip(pasts, asks, strict=True)]

    def when_alone(self) -> None:
        """Wait until every other run on this subject has ended. One run at a time touches a machine."""
        self(when_alone, self.subject, self.id)

    def if_undone(self, step: Step[P, Any], *args: P.args, **more: P.kwargs) -> None:
        """What is to be done if the run comes to grief, when all that follows has been undone."""
        self.stack.append((None, step, args, more))

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Try; if it comes to grief, undo what was done in here and go on after the block."""
        mark, final = len(self.stack), self.final
        try:
            yield
        except Aborted:
            raise  # the grief is not the host's: do not try the next
        except Trouble:
            if self.final and not final:
                raise  # the point of no return was inside
            self._unwind(mark)

    def no_return(self) -> None:
        """From here the run only goes forward; nothing above this line will be undone."""
        self.stack.clear()
        self.final = True

    # -- the way through the journal

    def _reach(self, step: Step[Any, Any], args: tuple[Any, ...], more: dict[str, Any], of: Past | None = None) -> Past:
        """The journal's next row. If there is none yet, take the step; if it is open, see what can be done."""
        n, self.n = self.n, self.n + 1
        past = self.journal.get(n)
        if past is None:
            now = self.engine.clock.now()
            past = Past(self.id, n, step.name, step.event, started=now, until=now + step.patience_s)
            self.journal[n] = past
        elif past.step != step.name:
            raise Diverged(f"run {self.id}, step {n}: the journal has {past.step}, the code asks for {step.name}")
        if past.finished is None:
            self._try(past, step, args, more, of)
        if step.undoes is not None and (
            step.kind == "effect"  # it may have died unnoted
            or (step.kind == "record" and past.fault is None)
            or (step.kind == "command" and past.host is not None)
        ):
            self.stack.append((past, step, args, more))
        return past

    def _try(self, past: Past, step: Step[Any, Any], args: Any, more: dict[str, Any], of: Past | None) -> None:
        if self.engine.watch:
            self.engine.watch(self.row.workflow, step.name)
        at_it = past.host is not None  # a host is: its answer decides
        # Who waits to be alone stops when it is.
        if "abort" in self.called and not (at_it or self.unwinding or self.final or step is when_alone):
            self._heed(past, "abort")
            past.close(self.engine.clock.now(), fault=Aborted("The action was aborted."))
            self.dirty[past.n] = past
        elif step.kind == "record":
            self._record(past, step, args, more)
        elif step.kind == "effect":
            self._effect(past, step, args, more, of)
        else:
            self._command(past, step, args, more, of)

    def _record(self, past: Past, step: Step[Any, Any], args: Any, more: dict[str, Any]) -> None:
        """In the transaction that we are in; its refusal takes back its own changes and no other's."""
        if self.records == RECORDS:
            self._commit(self.held_until)
        tx = self._held()
        self.records += 1
        self.dirty[past.n] = past
        with _ills():
            tx.execute(SAVE)
            try:
                past.close(self.engine.clock.now(), step.do(tx, *args, **more))
            except ILL:
                raise
            except Exception as e:
                tx.execute(TAKE_BACK)
                self._failed(past, step.kind, e)

    def _effect(self, past: Past, step: Step[Any, Any], args: Any, more: dict[str, Any], of: Past | None) -> None:
        """Its row is written with the next commit: should we die before, it happens twice, as it may.

        But what it rests on must be in the journal.  A refusal that only this process knows can be another answer
        on replay, and then the act was done on a way that was never taken.  Who only looks may rest on anything.
        """
        looks = step.looks is not None and step.looks(self.engine.world, *args, **more)
        late = self.engine.clock.now() > self.held_until - self.engine.lease_s / 2
        if late or (not looks and (self.dirty or self.unit.tx)):
            self._held()
            self._commit(self.held_until)  # nor act on the last half of a lease
        self.dirty[past.n] = past
        before = self.journal.get(past.n - 1)
        known = _first.set(before is not None and not (before.loaded or past.loaded or of))
        try:
            answer = step.do(self.engine.world, f"{self.id}/{(of or past).n}", *args, **more)
            past.close(self.engine.clock.now(), answer)
        except Exception as e:
            self._failed(past, step.kind, e)
        finally:
            _first.reset(known)

    def _command(self, past: Past, step: Step[Any, Any], args: Any, more: dict[str, Any], of: Past | None) -> None:
        """Sent after its row is committed, again when due, and judged when patience or the host is gone."""
        now = self.engine.clock.now()
        try:
            to: To[Any] = step.do(*args, **more)
        except Exception as e:
            self._failed(past, step.kind, e)
            self.dirty[past.n] = past
            return
        news = sorted(self.called & step.signals.keys())
        if self._gone(to.host):
            past.close(now, fault=HostGone(f"{to.host} is gone."))
        elif past.stored and now >= past.until and now > past.due + ABSENT_S:
            past.until = now + 3 * RESEND_S  # nobody was here to hear the answer: ask once more before we judge
            self._post(past, step, args, more, of, to)
        elif past.stored and now >= past.until:
            past.close(now, fault=Refused(f"{to.host} did not answer in time."))
        elif now >= past.due or news:
            for s in news:
                self._heed(past, s)
            self._post(past, step, args, more, of, to)
        else:
            self.due = min(self.due, past.due)
            return
        self.dirty[past.n] = past

    def _gone(self, host: str) -> bool:
        if self.engine.gone is None:
            return False
        tx = self._held()
        with _ills():
            return self.engine.gone(tx, host)

    def _post(self, past: Past, step: Step[Any, Any], args: Any, more: Any, of: Past | None, to: To[Any]) -> None:
        now = self.engine.clock.now()
        past.host, past.tries = to.host, past.tries + 1
        past.due = min(now + _backed_off(RESEND_S, past.tries - 1), past.until)
        self.due = min(self.due, past.due)
        key, until = f"{self.id}/{past.n}", min(past.due + RESEND_S, past.until)
        raw = letter(
            to.call,
            key=key,
            reply=self.engine.address,
            about=self.subject,
            undoes=f"{self.id}/{of.n}" if of else "",
            until=until,
        )
        self.outbox.append((to.host, raw))
        for s in past.heeded.split():  # about nothing: it must not queue behind the command that it is for
            told: To[Any] = step.signals[s](*args, **more)
            self.outbox.append((told.host, letter(told.call, key=f"{key}/{s}", until=until)))

    def _failed(self, past: Past, kind: Kind, trouble: Exception) -> None:
        """A step came to grief. If it is a matter of time, it is tried again; else that is its verdict."""
        if isinstance(trouble, ILL):
            trouble = Unavailable("The database does not answer.", why=str(trouble))
        trouble = self._trouble(past.step, trouble)
        now = self.engine.clock.now()
        if not isinstance(trouble, Unavailable) or now >= past.until:
            past.close(now, fault=trouble)
            return
        past.tries += 1  # nobody waits: the run is parked until then, or until something happens
        # A look at our own rows is cheap; neighbours are given time.
        wait_s = _backed_off(RETRY_S, past.tries, RECORD_S if kind == "record" else 60.0)
        past.due = min(now + wait_s * self.engine.dice.uniform(0.8, 1.0), past.until)
        self.due = min(self.due, past.due)

    def _trouble(self, where: str, e: Exception) -> Trouble:
        """What the user is told of it. An error of ours comes to grief like any other, so that all is undone."""
        if not isinstance(e, Trouble):
            log.error("run %s, %s: an error of ours", self.id, where, exc_info=e)
            return Trouble(f"An unexpected error occurred ({type(e).__name__}).")
        if e.why:
            log.info("run %s, %s: %s (%s)", self.id, where, e.said, e.why)
        return e

    def _heed(self, past: Past, name: str) -> None:
        self.heeding.add(name)
        past.heeded = f"{past.heeded} {name}".strip()

    def _heeded(self) -> None:
        """All that are at work have been told: what was called is said."""
        if self.heeding:
            self.called -= self.heeding
            self.heeding.clear()

    def _unwind(self, to: int = 0) -> None:
        """Undo, newest first. An undo is a step like another, with its own place in the journal."""
        outer, self.unwinding = self.unwinding, True
        while len(self.stack) > to:
            act, step, args, more = self.stack.pop()
            undo = step if act is None else step.undoes
            assert undo is not None
            p = self._reach(undo, args, more, of=act)
            if p.finished is None:
                raise Parked
            if p.fault is not None and not isinstance(trouble := p.trouble(), HostGone):
                raise Stuck(f"Could not undo {step.name}: {trouble.said}")
        self.unwinding = outer

    # -- being carried

    def play(self) -> bool:
        """Call the function. True: it is parked or over; False: something happened, take it again."""
        flow = WORKFLOWS.get(self.row.workflow)
        if flow is None:  # of a newer release, as a rule: another conductor will know it
            log.warning("run %s: nobody here knows the workflow %s", self.id, self.row.workflow)
            self.due = self.engine.clock.now() + 30
            return self._park()
        try:
            try:
                flow.do(self, flow.job(self.row.args))
            except Exception as e:
                trouble = self._trouble(flow.name, e)
                if self.final:
                    raise Stuck(trouble.said) from e
                self._unwind()
                return self._end("failed", Fault.of(trouble))
            return self._end("done")
        except Parked:
            return self._park()
        except Stuck as e:
            log.exception("run %s (%s %s) is stuck", self.id, flow.name, self.subject)
            return self._end("stuck", Fault(type(e).__name__, str(e)))

    def _park(self) -> bool:
        """Let go of the run; quietly, unless something happened to it since we looked."""
        at = min(self.due, self.engine.clock.now() + LOOK_S)
        quiet = self._guarded(PARK, {"at": at, "seen": self.row.wakes})
        if not quiet and not self._guarded(DROP, {}):
            raise Lost
        self._commit(0.0)
        for to, raw in self.outbox:
            self.engine.send(to, raw)
        return quiet

    def _end(self, state: str, fault: Fault | None = None) -> bool:
        now, text = self.engine.clock.now(), fault and _json(fault)
        how = END if state == "stuck" else END_WHOLE
        if not self._guarded(how, {"state": state, "fault": text, "finished": now}):
            raise Lost
        if self.row.action is not None and getattr(self.unit.opened().dialect, "heard", None) is not None:
            with _ills():
                self._tell(state, fault, now)
        with _ills():  # who may have waited for the subject to be free; woken after this, for their rows are theirs
            self.others = [r for r in open_runs(self.unit.opened(), self.subject) if r != self.id]
        self._commit(0.0)
        log.info(
            "%s: %s after %.1f s%s", self.row.workflow, state, now - self.started, f": {fault.said}" if fault else ""
        )
        self.engine.ended(self.id)
        return True

    def _tell(self, state: str, fault: Fault | None, now: float) -> None:
        """To who listens to what becomes of runs, in the transaction of their end."""
        r = self.row
        told = journal.Happened(
            phase="end" if state == "done" else "error",
            run=r.id,
            subject=r.subject,
            workflow=r.workflow,
            action=r.action,
            request_id=r.request_id,
            user_id=r.user_id,
            project_id=r.project_id,
            at=now,
            args=r.args,
            fault=fault,
        )
        journal.tell(self.unit.opened(), told)

    # -- one transaction: our hold on the run, what records do, and what the journal has to say of it

    def _held(self) -> Tx:
        """The transaction that we are in. A new one begins with our hold on the run, so that no other can be in it."""
        if self.unit.tx is None:
            lease = self.engine.clock.now() + self.engine.lease_s
            if not self._guarded(HOLD, {"lease": lease}):
                raise Lost
            self.held_until = lease
        with _ills():
            return self.unit.opened()

    def _guarded(self, how: sa.Update, values: dict[str, Any]) -> bool:
        """Change the run's row, if it is still as we left it."""
        with _ills():
            if not self.unit.opened().execute(how, {"the_id": self.id, "ours": self.epoch, **values}).rowcount:
                return False
        self.epoch += 1
        return True

    def _commit(self, held_until: float) -> None:
        """The journal's rows with all the rest. Raises Overtaken if one of them was answered meanwhile."""
        with _ills():
            tx = self.unit.opened()
            if new := [_row(p) for p in self.dirty.values() if not p.stored]:
                tx.execute(journal.STEP, new)
            for p in self.dirty.values():
                if p.stored and not tx.execute(UPDATE, _changes(p)).rowcount:
                    raise Overtaken
            self.unit.commit()
        self.held_until, self.records = held_until, 0
        for p in self.dirty.values():
            p.stored = True
        self.dirty.clear()


class _ills:
    """The database's failures are no business of the workflow's: carry them past it.

    Not made with `contextmanager`: it is on the way of every statement.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, e: BaseException | None, trace: Any) -> None:
        if isinstance(e, ILL):
            raise Ill from e


def _backed_off(first_s: float, times: int, most_s: float = 60.0) -> float:
    return min(first_s * 2.0 ** min(times, 10), most_s)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _stored(row: Any) -> Past:
    past = Past(*row)
    past.stored = past.loaded = True
    return past


def _row(p: Past) -> dict[str, Any]:
    return {f: getattr(p, f) for f in _FIELDS}


def _changes(p: Past) -> dict[str, Any]:
    return {
        "the_run": p.run, "the_n": p.n, "host": p.host, "finished": p.finished, "answer": p.answer,
        "fault": p.fault, "tries": p.tries, "due": p.due, "until": p.until, "heeded": p.heeded,
    }  # fmt: skip


def _taking(take: sa.Update) -> tuple[sa.Update, Any]:
    """A statement by which a run is taken; and the same, which says what it took."""
    return ready(take), ready(take.returning(*RUNS.c))


def _taken(tx: Tx, taking: tuple[sa.Update, Any], terms: dict[str, Any]) -> Any:
    """The run's row as it is now that it is ours, in one statement where the database can; None: it is not ours."""
    take, take_row = taking
    if tx.dialect.name == "postgresql":
        return tx.execute(take_row, terms).first()
    return tx.execute(RUN, {"the_id": terms["the_id"]}).one() if tx.execute(take, terms).rowcount else None


_FIELDS = [f for f in Past.__struct_fields__ if f not in ("stored", "loaded")]
_FAULT = msgspec.json.Decoder(Fault)


# ---- the SQL, once
# Parameters named as columns are what is SET; `the_…` and the like are in the WHERE.

_r, _s, _b = RUNS.c, STEPS.c, sa.bindparam
_ours = (_r.id == _b("the_id")) & (_r.epoch == _b("ours")) & (_r.state == "running")
_open = (_s.run == _b("the_run")) & (_s.n == _b("the_n")) & _s.finished.is_(None)
_free = (_r.state == "running") & (_r.due <= _b("now")) & (_r.lease <= _b("now"))
# Left by us, and taken by nobody since: no two takings have the same owner.
_left = (_r.id == _b("the_id")) & (_r.owner == _b("ours")) & (_r.state == "running")

# UPDATE runs SET owner = :me, lease = :till, epoch = epoch + 1 WHERE id = :the_id AND it is due AND nobody's
_mine = {"owner": _b("me"), "lease": _b("till"), "epoch": _r.epoch + 1}
TAKE = _taking(sa.update(RUNS).where(_r.id == _b("the_id"), _free).values(_mine))
TAKE_WOKEN = _taking(
    sa.update(RUNS)
    .where(_r.id == _b("the_id"), _r.state == "running", _r.lease <= _b("now"))
    .values(_mine | {"due": 0.0, "wakes": _r.wakes + 1})
)
RETAKE = _taking(sa.update(RUNS).where(_left).values(lease=_b("till"), epoch=_r.epoch + 1))
LET_GO = ready(sa.update(RUNS).where(_left).values(lease=0.0, due=0.0, epoch=_r.epoch + 1))
RECOVER = ready(
    sa.update(RUNS)
    .where(_r.state == "running", _r.owner.like(_b("any_of_mine"), escape="/"))
    .values(lease=0.0, due=0.0, epoch=_r.epoch + 1)
)
# The epoch moves with every commit, not only with every owner: a commit whose fate the database could not tell us
# ("connection lost") can then not be done a second time.
HOLD = ready(sa.update(RUNS).where(_ours).values(epoch=_r.epoch + 1))
PARK = ready(HOLD.where(_r.wakes == _b("seen")).values(lease=0.0, due=_b("at")))
DROP = ready(HOLD.values(lease=0.0, due=0.0))
END = ready(HOLD.values(lease=0.0))
END_WHOLE = ready(END.values(args="null"))  # what it was told may be large, or secret; nobody will play it again
DUE = ready(
    sa.select(_r.id).where(_free, (_r.epoch > 0) | (_r.started <= _b("old"))).order_by(_r.due).limit(_b("most"))
)
RUN = ready(sa.select(RUNS).where(_r.id == _b("the_id")))
WAITING = ready(
    sa.select(_s.run)
    .join(RUNS, _r.id == _s.run)
    .where(_r.subject == _b("the_subject"), _r.state == "running", _s.step == "when_alone", _s.finished.is_(None))
)
TOLD_TO_STOP = ready(
    sa.select(_r.id).where(_r.subject == _b("the_subject"), _r.state == "running", _r.signals.like("% abort %"))
)
LAST_ALONE = ready(sa.select(ALONE.c.run).where(ALONE.c.subject == _b("the_subject")))
FIRST_ALONE = ready(sa.insert(ALONE))
NEXT_ALONE = ready(sa.update(ALONE).where(ALONE.c.subject == _b("the_subject"), ALONE.c.run == _b("seen")))
SAVE, TAKE_BACK = ready(sa.text("SAVEPOINT step")), ready(sa.text("ROLLBACK TO SAVEPOINT step"))
UPDATE = ANSWER = ready(sa.update(STEPS).where(_open))
