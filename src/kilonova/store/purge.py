"""What is dead for long and can go: deleted servers with all that was written of them, and journals of nobody any more.

Safe while the cloud works: a deleted server does not come back, a run that ended is not read by a run, and what anybody
could still be at is left alone.  Each call is one short transaction.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy as sa

from kilonova.kit.db import Tx
from kilonova.kit.journal import RUNS, STEPS
from kilonova.store import consoles, migrations, placement, servers
from kilonova.store.migrations import Status

# What is written of a server, by the column that names it; the server's own row goes last.
OF_SERVERS = ((migrations.T, "server"), (consoles.T, "server"), (servers.T, "id"))


def count(tx: Tx, before: float) -> dict[str, int]:
    """How many rows would go, by table."""
    dead, ended = _dead(before).subquery(), _loose(before).subquery()
    mine, loose = RUNS.c.subject.in_(sa.select(dead.c.id)), RUNS.c.id.in_(sa.select(ended.c.id))
    runs = sa.select(RUNS.c.id).where(mine | loose).subquery()
    counts = {
        RUNS.name: sa.select(sa.func.count()).select_from(runs),
        STEPS.name: sa.select(sa.func.count()).where(STEPS.c.run.in_(sa.select(runs.c.id))),
    } | {t.name: sa.select(sa.func.count()).where(t.c[of].in_(sa.select(dead.c.id))) for t, of in OF_SERVERS}
    return {name: int(tx.execute(query).scalar() or 0) for name, query in counts.items()}


def dead(tx: Tx, before: float, most: int) -> list[str]:
    """Servers that were deleted before that moment, the oldest first, and that nobody is at any more."""
    return [row.id for row in tx.execute(_dead(before).limit(most))]


def loose(tx: Tx, before: float, most: int) -> list[str]:
    """Runs that ended before that moment, about what is no server, or no longer."""
    return [row.id for row in tx.execute(_loose(before).limit(most))]


def of_servers(tx: Tx, ids: list[str]) -> dict[sa.Table, list[Any]]:
    """The rows that are written of these servers, in the order in which they can go."""
    runs = list(tx.execute(sa.select(RUNS.c.id).where(RUNS.c.subject.in_(ids))).scalars())
    return of_runs(tx, runs) | {t: list(tx.execute(sa.select(t).where(t.c[of].in_(ids)))) for t, of in OF_SERVERS}


def of_runs(tx: Tx, ids: list[str]) -> dict[sa.Table, list[Any]]:
    found: dict[sa.Table, list[Any]] = {STEPS: [], RUNS: []}
    for some in _by(ids):
        found[STEPS] += tx.execute(sa.select(STEPS).where(STEPS.c.run.in_(some)))
        found[RUNS] += tx.execute(sa.select(RUNS).where(RUNS.c.id.in_(some)))
    return found


def remove(tx: Tx, rows: dict[sa.Table, list[Any]]) -> dict[str, int]:
    """These rows. How many went, by table."""
    gone = {}
    for table, all in rows.items():
        name = "run" if table is STEPS else next(iter(table.primary_key.columns)).name
        keys = list(dict.fromkeys(getattr(row, name) for row in all))
        for some in _by(keys):
            tx.execute(sa.delete(table).where(table.c[name].in_(some)))
        gone[table.name] = len(all)
    return gone


def _by(ids: list[Any], n: int = 500) -> Iterator[list[Any]]:
    for i in range(0, len(ids), n):
        yield ids[i : i + n]


def _dead(before: float) -> sa.Select[Any]:
    """Not the newest of all: SQLite would give its number, and so its name on hosts, to the next.

    Nor one that holds something still, is worked on, or was evacuated from a host that has not come back.
    """
    s, r, m = servers.T.c, RUNS.c, migrations.T.c
    open_ = sa.exists().where(r.subject == s.id, r.state.in_(["running", "stuck"]))
    kept = sa.exists().where(m.server == s.id, m.status.in_([str(Status.finished), str(Status.done)]))
    holds = sa.exists().where(placement.ALLOCATIONS.c.consumer == s.id)
    newest = sa.select(sa.func.max(s.number)).scalar_subquery()
    where = s.deleted_at < before, s.number < newest, ~open_, ~kept, ~holds
    return sa.select(s.id).where(*where).order_by(s.deleted_at, s.id)


def _loose(before: float) -> sa.Select[Any]:
    r = RUNS.c
    known = sa.exists().where(servers.T.c.id == r.subject)
    return sa.select(r.id).where(r.finished < before, r.state.in_(["done", "failed"]), ~known).order_by(r.finished)


def plain(rows: Iterable[Any], table: sa.Table) -> Iterator[dict[str, Any]]:
    """For an archive: each row by the names of its columns."""
    names = [str(c.name) for c in table.columns]
    return ({"table": str(table.name)} | dict(zip(names, row, strict=True)) for row in rows)
