"""What a cloud has and does, in numbers: for metrics. Each is one query that reads an index, or one row a host."""

from typing import NamedTuple

import sqlalchemy as sa

from kilonova.kit.db import Tx
from kilonova.kit.journal import RUNS
from kilonova.store import hosts, placement, servers


class OpenRuns(NamedTuple):
    """Of one workflow in one state: how many, and since when the first of them."""

    workflow: str
    state: str
    n: int
    oldest: float


def open_runs(tx: Tx) -> list[OpenRuns]:
    """Those that are at work or stuck."""
    r = RUNS.c
    query = sa.select(r.workflow, r.state, sa.func.count(), sa.func.min(r.started)).group_by(r.workflow, r.state)
    return [OpenRuns(*row) for row in tx.execute(query.where(r.state.in_(["running", "stuck"])))]


def claims(tx: Tx) -> dict[str, tuple[float, float]]:
    """By resource class: what is held of all hosts together, and what can be."""
    i = placement.INVENTORIES.c
    capacity = sa.func.sum((i.total - i.reserved) * i.allocation_ratio)
    query = sa.select(i.resource_class, sa.func.sum(i.used), capacity).group_by(i.resource_class)
    return {name: (float(used), float(most)) for name, used, most in tx.execute(query)}


def silences(tx: Tx, now: float) -> list[tuple[float | None, bool, bool]]:
    """Of each host: for how long it has said nothing (None: it never did), is it forced down, is it disabled."""
    s = hosts.SERVICES.c
    query = sa.select(s.last_seen, s.forced_down, s.disabled).where(s.binary == hosts.COMPUTE)
    return [(None if at is None else max(0.0, now - at), bool(down), bool(off)) for at, down, off in tx.execute(query)]


def states(tx: Tx) -> dict[tuple[str, str], int]:
    """Living servers by state, and by what is being done to them."""
    t = servers.T.c
    query = sa.select(t.vm_state, t.task_state, sa.func.count()).where(t.deleted_at.is_(None))
    return {(vm, task or ""): n for vm, task, n in tx.execute(query.group_by(t.vm_state, t.task_state))}
