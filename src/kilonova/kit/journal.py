"""The book of runs: two tables, what may be written from outside a run, and the views that users see.

A row of `runs` is an instance action (or, without an action's name, work that nobody asked for); its rows in
`steps` are the events.  Nobody writes history twice.  Who carries a run, and how, is `workflow.py`.
"""

from collections.abc import Callable
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.mysql import MEDIUMTEXT

from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import Fault, NotFound
from kilonova.kit.log import named
from kilonova.kit.ready import ready

# MariaDB's TEXT ends at 64 KiB; a server's user data alone may be that.
_LONG = sa.Text().with_variant(MEDIUMTEXT(), "mysql", "mariadb")

RUNS = sa.Table(
    "runs",
    meta,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("subject", sa.String(64), nullable=False),  # what it is about
    sa.Column("workflow", sa.String(64), nullable=False),
    sa.Column("args", _LONG, nullable=False),  # JSON
    sa.Column("action", sa.String(64)),  # what users call it; NULL: not theirs to see
    sa.Column("request_id", sa.String(64), nullable=False),
    sa.Column("global_request_id", sa.String(64)),  # what he who asked calls it, for the log
    sa.Column("user_id", sa.String(64), nullable=False),
    sa.Column("project_id", sa.String(64), nullable=False),
    sa.Column("state", sa.String(8), nullable=False),  # running, done, failed, stuck
    sa.Column("fault", sa.Text),  # a Fault as JSON
    sa.Column("started", sa.Double, nullable=False),
    sa.Column("finished", sa.Double),
    sa.Column("signals", sa.String(255), nullable=False),  # what was called out to it, in order, a space around each
    sa.Column("due", sa.Double, nullable=False),  # when somebody should look at it, at the latest
    sa.Column("owner", sa.String(64)),
    sa.Column("lease", sa.Double, nullable=False),  # until then it is the owner's; 0: nobody's
    sa.Column("epoch", sa.Integer, nullable=False),  # moves with every commit: a late owner finds it moved
    sa.Column("wakes", sa.Integer, nullable=False),  # how often something happened to it meanwhile
    sa.Index("runs_due", "state", "due"),
    sa.Index("runs_subject", "subject", "started"),
    sa.Index("runs_project", "project_id", "subject"),
    sa.Index("runs_finished", "finished"),
)
STEPS = sa.Table(
    "steps",
    meta,
    sa.Column("run", sa.String(64), primary_key=True),
    sa.Column("n", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("step", sa.String(64), nullable=False),
    sa.Column("event", sa.String(64)),  # what users call it; NULL: not theirs to see
    sa.Column("host", sa.String(255)),
    sa.Column("started", sa.Double, nullable=False),
    sa.Column("finished", sa.Double),
    sa.Column("answer", _LONG),  # JSON
    sa.Column("fault", sa.Text),  # a Fault as JSON
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("due", sa.Double, nullable=False),  # next try, or next letter
    sa.Column("until", sa.Double, nullable=False),  # then it has failed
    sa.Column("heeded", sa.String(64), nullable=False),  # the signals that this step took up
)
ALONE = sa.Table(  # who is the one run that has its subject for itself; void when that run has ended
    "alone",
    meta,
    sa.Column("subject", sa.String(64), primary_key=True),
    sa.Column("run", sa.String(64), nullable=False),
)


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """Who asked for a run, and what he calls it: "create", "reboot", "live-migration"."""

    action: str
    request_id: str = ""
    user_id: str = ""
    project_id: str = ""


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """A run, as its users see it. Moments in seconds since 1970."""

    run: str
    subject: str
    workflow: str
    action: str | None
    request_id: str
    user_id: str
    project_id: str
    started: float
    updated: float  # when a step of it last began or ended
    finished: float | None
    result: Literal["Success", "Error"] | None  # None: it is at work
    fault: Fault | None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a run. Moments in seconds since 1970."""

    run: str
    n: int
    step: str
    event: str | None
    host: str | None  # who was asked; None: it was done by the conductor
    started: float
    finished: float | None
    result: Literal["Success", "Error"] | None
    fault: Fault | None


class Happened(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a run that somebody asked for: it began, it ended well or badly ("start", "end", "error"), or came
    as far as its workflow has a word for (`reached`). `args` are JSON.

    Told in the transaction that says so, to who listens at this database (`Db.listen`).
    """

    phase: str
    run: str
    subject: str
    workflow: str
    action: str
    request_id: str
    user_id: str
    project_id: str
    at: float
    args: str = "null"
    fault: Fault | None = None


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """Something else that happened, already in others' words. `of` makes the payload, and is only asked where somebody
    listens."""

    event: str
    binary: str
    at: float
    of: Callable[[Tx], dict[str, Any]]
    host: str | None = None


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """A thing's state changed. `before` None: it is new."""

    before: Any
    after: Any
    at: float


def tell(tx: Tx, happened: Happened | Said | Moved) -> None:
    heard = getattr(tx.dialect, "heard", None)
    if heard is not None:
        heard(tx, happened)


def closely(tx: Tx) -> bool:
    """Does somebody want to hear of each change of state?"""
    return getattr(tx.dialect, "closely", False)


def reached(tx: Tx, subject: str, workflow: str, phase: str, now: float) -> None:
    """For a record to say: the run that it is a step of has come so far. Where nobody listens it costs nothing."""
    if getattr(tx.dialect, "heard", None) is None:
        return
    where = (
        RUNS.c.subject == subject,
        RUNS.c.workflow == workflow,
        RUNS.c.state == "running",
        RUNS.c.action.is_not(None),
    )
    r = tx.execute(sa.select(RUNS).where(*where).order_by(RUNS.c.started).limit(1)).first()
    if r is not None:
        told = Happened(
            phase=phase,
            run=r.id,
            subject=subject,
            workflow=workflow,
            action=r.action,
            request_id=r.request_id,
            user_id=r.user_id,
            project_id=r.project_id,
            at=now,
            args=r.args,
        )
        tell(tx, told)


# ---- written from outside


def opened(
    tx: Tx, workflow: str, args: bytes, *, id: str, subject: str, now: float, cause: Cause | None, done: bool = False
) -> None:
    """The row of a new run."""
    tx.execute(
        OPEN,
        {
            "id": id,
            "subject": subject,
            "workflow": workflow,
            "args": args.decode(),
            "action": cause and cause.action,
            "request_id": cause.request_id if cause else "",
            "global_request_id": named().get("global_request_id"),
            "user_id": cause.user_id if cause else "",
            "project_id": cause.project_id if cause else "",
            "state": "done" if done else "running",
            "started": now,
            "finished": now if done else None,
            "signals": " ",
            "due": 0.0,
            "lease": 0.0,
            "epoch": 0,
            "wakes": 0,
        },
    )
    if cause is not None and getattr(tx.dialect, "heard", None) is not None:
        for phase in ("start", "end") if done else ("start",):
            tell(
                tx,
                Happened(
                    phase=phase,
                    run=id,
                    subject=subject,
                    workflow=workflow,
                    action=cause.action,
                    request_id=cause.request_id,
                    user_id=cause.user_id,
                    project_id=cause.project_id,
                    at=now,
                    args=args.decode(),
                ),
            )


def noted(
    tx: Tx, *, id: str, subject: str, now: float, cause: Cause, event: str | None = None, host: str | None = None
) -> str:
    """An action that was over with the caller's own transaction: lock, unlock. `event`: its one event, if it has any."""
    opened(tx, "noted", b"null", id=id, subject=subject, now=now, cause=cause, done=True)
    if event is not None:
        row = {"run": id, "n": 0, "step": "noted", "event": event, "host": host, "started": now, "finished": now}
        tx.execute(STEP, row | {"answer": "null", "tries": 1, "due": now, "until": now, "heeded": ""})
    return id


def signal(tx: Tx, subject: str, name: str, *, workflow: str = "", run: str = "") -> list[str]:
    """Call out to every run that is at work on this subject: "abort", "force_complete". Whom to wake after the commit.

    Or to those of one workflow, or to this one alone.  Once is enough: to a run that was told before, the second call
    says nothing new.
    """
    found = tx.execute(OPEN_ON, {"the_subject": subject})
    ids = [r.id for r in found if workflow in ("", r.workflow) and run in ("", r.id)]
    for id in ids:
        tx.execute(SIGNAL, {"the_id": id, "told": f"% {name} %", "tell": f"{name} "})
    return ids


def open_runs(tx: Tx, subject: str) -> list[str]:
    """Who is at work on this subject, the oldest first."""
    return list(tx.execute(OPEN_ON, {"the_subject": subject}).scalars())


def wake_host(tx: Tx, host: str) -> list[str]:
    """Let every run that waits for this host look again, now that more is known of it. Whom to wake after the commit.

    If it is gone, nobody waits any longer; if it lives, it is sent at once what it has not answered: its last life may
    have taken letters with it.
    """
    ids = list(tx.execute(WAITING_FOR, {"the_host": host}).scalars())
    for id in ids:
        tx.execute(WAKE, {"the_id": id})
        tx.execute(SEND_AGAIN, {"the_id": id, "the_host": host})
    return ids


def again(tx: Tx, run: str, now: float) -> bool:
    """Let a stuck run try again at what it stuck at: for an operator who has mended the cause. False: it is not stuck."""
    if not tx.execute(AGAIN, {"the_id": run}).rowcount:
        return False
    last = sa.select(sa.func.max(_s.n)).where(_s.run == run, _s.finished.is_not(None)).scalar_subquery()
    n = tx.execute(sa.select(_s.n, _s.fault).where(_s.run == run, _s.n == last)).first()
    if n is not None and n.fault is not None:
        reopened = {"finished": None, "fault": None, "tries": 0, "due": 0.0, "until": now + 3600.0}
        tx.execute(sa.update(STEPS).where(_s.run == run, _s.n == n.n).values(reopened))
    return True


def forget(tx: Tx, before: float, *, hidden_only: bool = False, most: int = 500) -> int:
    """Drop the journals of runs that ended before that moment, at most so many; call it until it says less.

    `hidden_only`: of those alone that nobody asked for.  Stuck ones stay: somebody has to look at them.
    """
    old = sa.select(_r.id).where(_r.finished < before, _r.state.in_(["done", "failed"]))
    if hidden_only:
        old = old.where(_r.action.is_(None))
    ids = list(tx.execute(old.order_by(_r.finished).limit(most)).scalars())
    for part in (ids[i : i + 100] for i in range(0, len(ids), 100)):
        tx.execute(sa.delete(ALONE).where(ALONE.c.run.in_(part)))
        tx.execute(sa.delete(STEPS).where(_s.run.in_(part)))
        tx.execute(sa.delete(RUNS).where(_r.id.in_(part)))
    return len(ids)


# ---- views


def actions(
    tx: Tx,
    subject: str,
    *,
    limit: int | None = None,
    marker: str | None = None,
    since: float | None = None,
    before: float | None = None,
) -> list[Action]:
    """What was done to this subject, the newest first, in one query.

    `since`, `before`: updated not earlier, not later.  `marker`: the request id after which the page begins;
    raises NotFound if there is no such action.
    """
    page = ACTIONS.where(_r.subject == subject, _r.action.is_not(None)).order_by(_r.started.desc(), _r.id.desc())
    if marker is not None:
        last = action(tx, subject, marker)
        page = page.where(sa.or_(_r.started < last.started, sa.and_(_r.started == last.started, _r.id < last.run)))
    if since is not None:
        page = page.where(_updated >= since)
    if before is not None:
        page = page.where(_updated <= before)
    return [_action(row) for row in tx.execute(page.limit(limit))]


def action(tx: Tx, subject: str, request_id: str) -> Action:
    """What this request did to this subject. Raises NotFound."""
    one = ACTIONS.where(_r.subject == subject, _r.request_id == request_id, _r.action.is_not(None))
    row = tx.execute(one.order_by(_r.started, _r.id).limit(1)).first()
    if row is None:
        raise NotFound(f"There is no action of request {request_id}.")
    return _action(row)


def events(tx: Tx, run: str) -> list[Event]:
    """The steps of a run that users know by a name, in order. Steps of one name on one host are one event."""
    found: dict[tuple[str, str | None], Event] = {}
    for e in journal(tx, run):
        if e.event is not None:
            same = found.get((e.event, e.host))
            found[e.event, e.host] = e if same is None else _joined(same, e)
    shown = list(found.values())
    if shown and not any(e.fault for e in shown) and (fault := fault_of(tx, run)) is not None:
        # Every step did well, and what they said was not enough: that is how the last of them ended.
        shown[-1] = msgspec.structs.replace(shown[-1], result=shown[-1].finished and "Error", fault=fault)
    return shown


def _joined(one: Event, two: Event) -> Event:
    """From the first's start to the second's end; it failed where one of them did."""
    over = None if one.finished is None or two.finished is None else max(one.finished, two.finished)
    result: Literal["Success", "Error"] | None = "Error" if "Error" in (one.result, two.result) else two.result
    return msgspec.structs.replace(
        one, finished=over, result=result if over is not None else None, fault=one.fault or two.fault
    )


def journal(tx: Tx, run: str) -> list[Event]:
    """All steps of a run, in order: for operators and tests."""
    return [
        Event(
            run=s.run, n=s.n, step=s.step, event=s.event, host=s.host, started=s.started, finished=s.finished,
            result=None if s.finished is None else "Error" if s.fault else "Success", fault=_fault(s.fault),
        )
        for s in tx.execute(JOURNAL, {"the_id": run})
    ]  # fmt: skip


def over(tx: Tx, run: str) -> bool:
    """Has it come to its end, whatever that was? A run that is stuck has none, and nobody should wait for it."""
    return tx.execute(sa.select(_r.state).where(_r.id == run)).scalar() != "running"


def answer_of(tx: Tx, run: str, step: str) -> bytes | None:
    """What the last step of this name answered, as JSON."""
    said = sa.select(_s.answer).where(_s.run == run, _s.step == step, _s.answer.is_not(None))
    text = tx.execute(said.order_by(_s.n.desc()).limit(1)).scalar()
    return None if text is None else str(text).encode()


def fault_of(tx: Tx, run: str) -> Fault | None:
    """Why it failed. None: it did not, or not yet, or there is no such run."""
    return _fault(tx.execute(sa.select(_r.fault).where(_r.id == run)).scalar())


def faults_of(tx: Tx, runs: list[str]) -> dict[str, Fault | None]:
    """The same of many, one query for some hundreds."""
    found: dict[str, Fault | None] = {}
    for i in range(0, len(runs), 500):
        rows = tx.execute(sa.select(_r.id, _r.fault).where(_r.id.in_(runs[i : i + 500])))
        found |= {row.id: _fault(row.fault) for row in rows}
    return found


def stuck(tx: Tx) -> list[Action]:
    """Runs that can go neither forward nor back: a person must look."""
    return [_action(row) for row in tx.execute(ACTIONS.where(_r.state == "stuck").order_by(_r.started))]


class Load(msgspec.Struct, frozen=True):
    """How the engine is doing: for health and metrics."""

    running: int
    stuck: int
    late_s: float  # by how much the longest waiting run is overdue; seconds of it are normal, minutes are not


def load(tx: Tx, now: float) -> Load:
    """Two looks into one index, whatever the age of the book."""
    n: dict[str, int] = {row[0]: row[1] for row in tx.execute(OPEN_COUNTS)}
    due = tx.execute(LONGEST_DUE, {"now": now}).scalar()
    return Load(n.get("running", 0), n.get("stuck", 0), 0.0 if not due else max(0.0, now - due))


def _action(row: Any) -> Action:
    result: Literal["Success", "Error"] | None = None
    if row.state != "running":
        result = "Success" if row.state == "done" else "Error"
    return Action(
        run=row.id, subject=row.subject, workflow=row.workflow, action=row.action, request_id=row.request_id,
        user_id=row.user_id, project_id=row.project_id, started=row.started, updated=row.updated,
        finished=row.finished, result=result, fault=_fault(row.fault),
    )  # fmt: skip


def _fault(text: str | None) -> Fault | None:
    return None if text is None else msgspec.json.decode(text, type=Fault)


# ---- the SQL, once
# Parameters named as columns are what is SET; `the_…` and the like are in the WHERE.

_r, _s, _b = RUNS.c, STEPS.c, sa.bindparam
_open_on = (_r.subject == _b("the_subject")) & (_r.state == "running")
# (SELECT max(coalesce(finished, started)) FROM steps WHERE run = runs.id), or the run's own end, or its start
_last = sa.select(sa.func.max(sa.func.coalesce(_s.finished, _s.started))).where(_s.run == _r.id).scalar_subquery()
_updated = sa.func.coalesce(_r.finished, _last, _r.started)

OPEN = ready(sa.insert(RUNS))
STEP = ready(sa.insert(STEPS), later=True)
OPEN_ON = ready(sa.select(_r.id, _r.workflow).where(_open_on).order_by(_r.started, _r.id))
# UPDATE runs SET signals = signals || :tell, due = 0, wakes = wakes + 1 WHERE it is open AND was not told before
SIGNAL = ready(
    sa.update(RUNS)
    .where(_r.id == _b("the_id"), _r.state == "running", _r.signals.not_like(_b("told")))
    .values(signals=_r.signals + _b("tell"), due=0.0, wakes=_r.wakes + 1)
)
WAKE = ready(sa.update(RUNS).where(_r.id == _b("the_id")).values(due=0.0, wakes=_r.wakes + 1))
WAITING_FOR = ready(
    sa.select(_r.id).where(
        _r.state == "running",
        sa.exists().where(_s.run == _r.id, _s.host == _b("the_host"), _s.finished.is_(None)),
    )
)
SEND_AGAIN = ready(
    sa.update(STEPS).where(_s.run == _b("the_id"), _s.host == _b("the_host"), _s.finished.is_(None)).values(due=0.0)
)
AGAIN = ready(
    sa.update(RUNS)
    .where(_r.id == _b("the_id"), _r.state == "stuck")
    .values(state="running", fault=None, finished=None, due=0.0, lease=0.0, epoch=_r.epoch + 1, wakes=_r.wakes + 1)
)
ACTIONS = sa.select(
    _r.id, _r.subject, _r.workflow, _r.action, _r.request_id, _r.user_id, _r.project_id, _r.state, _r.started,
    _r.finished, _r.fault, _updated.label("updated"),
)  # fmt: skip
OPEN_COUNTS = sa.select(_r.state, sa.func.count()).where(_r.state.in_(["running", "stuck"])).group_by(_r.state)
# A new run has due = 0: it waits since it was started.
LONGEST_DUE = ready(
    sa.select(sa.func.min(sa.case((_r.due > 0, _r.due), else_=_r.started))).where(
        _r.state == "running", _r.due <= _b("now"), _r.lease <= _b("now")
    )
)
JOURNAL = ready(sa.select(STEPS).where(_s.run == _b("the_id")).order_by(_s.n))
