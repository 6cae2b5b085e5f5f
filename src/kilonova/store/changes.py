"""What changed since a moment: states of servers, and runs about them that began or ended. Two looks into indexes.

A moment is no order: a transaction that began before it may end after it.  Who reads on from where he stopped reads
`OVERLAP_S` more, and knows by their ids what he has seen.
"""

from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.kit.clock import iso_us
from kilonova.kit.db import Tx
from kilonova.kit.errors import Fault
from kilonova.kit.journal import RUNS
from kilonova.model.states import status
from kilonova.store import servers

OVERLAP_S = 10.0
MOST = 1000  # of each kind, the oldest first: who comes back after long reads page by page


class Change(msgspec.Struct, frozen=True):
    """`id` is the same whenever it is read; `event` is "server", or "action" with its phase in `data`."""

    id: str
    project_id: str
    at: float
    event: str
    data: dict[str, Any]


def since(tx: Tx, at: float, project_id: str | None = None, *, begun: float | None = None) -> tuple[list[Change], bool]:
    """In the order of their moments, of one project or of all; and whether there are more behind the last of them.

    `begun`: of what ended since `at`, the beginnings since then, too; for who reads page by page.
    """
    kinds = [_states(tx, at, project_id), *_runs(tx, at, project_id, at if begun is None else begun)]
    full = [kind[-1].at for kind in kinds if len(kind) >= MOST]
    end = min(full, default=None)
    found = [c for kind in kinds for c in kind if end is None or c.at <= end]
    return sorted(found, key=lambda c: (c.at, _ORDER[c.data.get("phase")], c.id)), end is not None


_ORDER = {"start": 0, None: 1, "end": 2, "error": 2}  # at the same moment: it begins, is, and ends


def _states(tx: Tx, at: float, project_id: str | None) -> list[Change]:
    columns = s.id, s.project_id, s.name, s.vm_state, s.task_state, s.power_state, s.progress, s.updated_at
    query = sa.select(*columns).where(s.updated_at >= at).order_by(s.updated_at).limit(MOST)
    if project_id is not None:
        query = query.where(s.project_id == project_id)
    return [_state(row) for row in tx.execute(query)]


def _state(row: Any) -> Change:
    data = {
        "server": row.id,
        "name": row.name,
        "status": status(row.vm_state, row.task_state),
        "vm_state": row.vm_state,
        "task_state": row.task_state,
        "power_state": row.power_state,
        "progress": row.progress,
        "at": iso_us(row.updated_at),
    }
    return Change(f"{row.id}/{row.updated_at:.6f}/{row.task_state}", row.project_id, row.updated_at, "server", data)


def _runs(tx: Tx, at: float, project_id: str | None, begun: float) -> list[list[Change]]:
    """Those that are at work, and those that are over: each with its beginning, where that is as new."""
    columns = r.id, r.subject, r.action, r.request_id, r.project_id, r.user_id, r.state, r.fault, r.started, r.finished
    open_ = sa.select(*columns).where(r.state == "running", r.started >= at)
    over = sa.select(*columns).where(r.finished >= at)
    found = []
    for query, moment in ((open_, r.started), (over, r.finished)):
        mine = query.where(r.action.is_not(None), *([r.project_id == project_id] if project_id is not None else []))
        rows = tx.execute(mine.order_by(moment).limit(MOST)).all()
        starts = [_run(row, "start", row.started) for row in rows if row.started >= begun]
        ends = [_run(row, "end" if row.state == "done" else "error", row.finished) for row in rows if row.finished]
        found.append(starts + ends)
    return found


def _run(row: Any, phase: str, at: float) -> Change:
    data = {
        "server": row.subject,
        "action": row.action,
        "phase": phase,
        "request_id": row.request_id,
        "user_id": row.user_id,
        "at": iso_us(at),
    }
    if phase == "error" and row.fault:
        data["message"] = msgspec.json.decode(row.fault, type=Fault).said
    return Change(f"{row.id}/{phase}", row.project_id, at, "action", data)


s, r = servers.T.c, RUNS.c
