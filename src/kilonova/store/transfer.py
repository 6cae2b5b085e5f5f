"""A whole database into another one, of whatever make: all rows of all tables, in one transaction, and then compared."""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Conflict, Refused
from kilonova.store import evolve

BATCH = 1000
Told = Callable[[str, int, int], None]  # of a table: how many rows are over, of how many


def filled(tx: Tx) -> list[str]:
    """The tables that have rows."""
    return [t.name for t in evolve.everything().sorted_tables if tx.execute(sa.select(t).limit(1)).first() is not None]


def copy(source: Db, target: Db, told: Told = lambda *_: None) -> dict[str, int]:
    """How many rows each table has, in both. Nothing is there when it failed.

    Raises Conflict where the target has something, Refused where the two are not the same afterwards.
    """
    now = evolve.standing(source)
    if now.empty or now.pending or now.unknown:
        raise Conflict("The source is not at the schema of this release: see kilonova db status.")
    evolve.ready(target)
    with source.snapshot() as ours, target.tx() as theirs:
        if full := filled(theirs):
            raise Conflict(f"The target is not empty: there are rows in {', '.join(full[:5])}.")
        tables = evolve.everything().sorted_tables
        sizes = {t.name: int(ours.execute(sa.select(sa.func.count()).select_from(t)).scalar() or 0) for t in tables}
        sums = {t.name: _over(ours, theirs, t, sizes[t.name], told) for t in tables}
        for t in tables:
            _numbered(theirs, t)
        wrong = [t.name for t in tables if _seen(theirs, t) != (sizes[t.name], sums[t.name])]
        if wrong:
            raise Refused(f"What arrived is not what was sent: {', '.join(wrong)}. Nothing was kept.")
    return sizes


def _over(ours: Tx, theirs: Tx, table: sa.Table, size: int, told: Told) -> int:
    done = sum_ = 0
    told(table.name, 0, size)
    for rows in _rows(ours, table):
        theirs.execute(sa.insert(table), [dict(r._mapping) for r in rows])
        sum_ += _sum(rows)
        done += len(rows)
        told(table.name, done, size)
    return sum_


def _seen(tx: Tx, table: sa.Table) -> tuple[int, int]:
    n = sum_ = 0
    for rows in _rows(tx, table):
        n, sum_ = n + len(rows), sum_ + _sum(rows)
    return n, sum_


def _rows(tx: Tx, table: sa.Table) -> Iterator[list[Any]]:
    streamed = sa.select(table).execution_options(stream_results=True, max_row_buffer=BATCH)
    found = tx.execute(streamed)
    while rows := found.fetchmany(BATCH):
        yield list(rows)


def _sum(rows: list[Any]) -> int:
    """Whatever their order is: databases sort texts as they like."""
    return sum(zlib.crc32(msgspec.msgpack.encode(tuple(row))) for row in rows)


def _numbered(tx: Tx, table: sa.Table) -> None:
    """PostgreSQL counts on from where its own inserts were, and has not seen ours."""
    column = table.autoincrement_column
    if column is None or tx.dialect.name != "postgresql":
        return
    last = sa.select(sa.func.max(column)).scalar_subquery()
    sequence = sa.func.pg_get_serial_sequence(table.name, column.name)
    if tx.execute(sa.select(last)).scalar() is not None:
        tx.execute(sa.select(sa.func.setval(sequence, last)))
