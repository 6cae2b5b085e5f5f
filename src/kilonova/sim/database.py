"""The simulator's database: SQLite in memory, whose transactions come in between each other as READ COMMITTED lets them.

What PostgreSQL and MariaDB do at that level, told of many transactions over one connection:

1. Each statement sees what is committed when it begins, and what its own transaction wrote.
2. A row that a transaction wrote, or read FOR UPDATE, is locked until it ends.  Who wants to write or lock that row
   waits, and then looks again: it finds the row as it is now, or no longer finds it.  The same of unique keys.
3. Who would wait for himself is refused, and begins anew.

SQLite has one writer, so one transaction at a time is *inside*.  When another one's turn comes, it is rolled back and
stands aside; when it goes on, what it had written is written again, and must come out as it did: the same rows, the
same counts.  Triggers tell which rows and keys a statement wrote; those are its locks.  Where it does not come out
the same (a parent row that went meanwhile, say), the transaction is refused as a deadlock is, which a database may do
at any time.  So every history told here is one that those databases can tell; they can tell a few more.
"""

import sqlite3
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite.base import SQLiteCompiler
from sqlalchemy.sql.util import find_tables

from kilonova.kit.db import Db, Tx, meta

Key = tuple[Any, ...]  # a row, or what is unique of it: (table, which key, *values)


def _never() -> None: ...


def _no_wait(_: list[Callable[[], None]]) -> bool:
    return False


class Memory(Db):
    """A database that is gone with its process.

    `between()` is called before each statement of transactions that are `open`: others may have their turn in there.
    `wait(wakes)` lets this thread sleep until what it adds to `wakes` is called; False where that cannot be.
    """

    def __init__(self) -> None:
        super().__init__(
            "sqlite://",
            poolclass=sa.StaticPool,
            connect_args={"check_same_thread": False, "factory": _Wire, "cached_statements": 4000},
        )
        self.engine._connection_cls = _Line
        dialect: Any = self.engine.dialect
        dialect.statement_compiler = _Compiler
        dialect.driver = "memory"  # what is compiled for it is not for others
        dialect.do_execute = self._seen(dialect.do_execute)
        dialect.do_executemany = self._seen(dialect.do_executemany)
        self.between: Callable[[], None] = _never
        self.wait: Callable[[list[Callable[[], None]]], bool] = _no_wait
        self.inside: _Work | None = None
        self.works: list[_Work] = []  # that have begun and not ended
        self.free: list[_Line] = []
        self.sent: list[tuple[Any, str, Any]] = []  # (cursor, statement, parameters) of the statement under way
        self.touched: set[Key] = set()  # by it
        self.waits = self.refusals = self.interludes = 0
        line: Any = self.engine.connect()
        self.wire: sqlite3.Connection = line.connection.dbapi_connection
        self.wire.create_function("touched", -1, self._touched)
        line.close()

    def restore(self, template: bytes) -> None:
        """Be as it was when `template` was taken."""
        assert not self.works
        self.wire.deserialize(template)
        self.wire.execute("PRAGMA foreign_keys = ON")
        self.statements = self.commits = self.waits = self.refusals = self.interludes = 0

    def connected(self) -> Any:
        line = self.engine.connect()
        line.begin()  # to SQLAlchemy each is in one transaction for ever
        return line

    def abandon(self) -> None:
        """Nobody is in a transaction any longer: their cloud is over."""
        if self.inside is not None:
            self.inside._step_aside()
        self.works.clear()

    def tx(self, open: bool = False) -> Any:
        return _Work(self, open)

    read = tx

    def watch(self) -> None:
        """Once, when all tables are there: who writes a row says so."""
        for table in meta.tables.values():
            self.wire.executescript(_triggers(table))

    def _touched(self, table: str, which: int, *values: Any) -> None:
        if None not in values:  # NULLs are all different
            self.touched.add((table, which, *values))

    def _seen(self, send: Callable[..., None]) -> Callable[..., None]:
        def seen(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
            send(cursor, statement, parameters, context)
            self.sent.append((cursor, statement, parameters))

        return seen


class _Work:
    """One transaction. Leaving the block commits; an exception rolls back."""

    __slots__ = ("db", "line", "locks", "open", "rows", "waits_for", "wakes", "wrote")

    def __init__(self, db: Memory, open: bool) -> None:
        self.db, self.open = db, open
        self.wrote: list[tuple[str, Any, int]] = []  # statements, their parameters, how many rows
        self.rows: set[Key] = set()  # that it wrote
        self.locks: set[Key] = set()  # and those that it read FOR UPDATE
        self.waits_for: _Work | None = None
        self.wakes: list[Callable[[], None]] = []  # those who wait for its end

    def __enter__(self) -> Tx:
        free = self.db.free
        self.line = line = free.pop() if free else self.db.connected()
        line.work = self
        self.db.works.append(self)
        return line

    def __exit__(self, kind: Any, trouble: Any, trace: Any) -> None:
        try:
            if trouble is None and self.wrote:
                self._come_in()
                self._tell("COMMIT")
                self.db.commits += 1
        finally:
            self._step_aside()  # however it ends, it holds nothing any longer
            self.line.work = None
            self.db.free.append(self.line)
            if self in self.db.works:
                self.db.works.remove(self)
            for wake in self.wakes:
                wake()

    def send(self, do: Callable[..., Any], statement: Any, parameters: Any, options: Any) -> Any:
        """A statement; once it has what it must lock."""
        db = self.db
        if self.open:
            db.between()
        while True:
            if db.inside is not self:
                self._come_in()
            db.sent.clear()
            db.touched.clear()
            found = do(self.line, statement, parameters, execution_options=options)
            wanted = self._wanted()
            if not wanted or (owner := self._owner(wanted)) is None:
                break
            self._step_aside()
            self._wait(owner)
        if wanted:
            self.locks |= wanted
            self.rows |= db.touched
        self.wrote += [(text, values, c.rowcount) for c, text, values in db.sent if not text.startswith("SELECT")]
        return found

    def _wanted(self) -> set[Key]:
        """What the statement that was just sent must lock."""
        wanted = set(self.db.touched)
        for _, text, values in self.db.sent:
            if text.endswith("*/"):
                wanted.update(_locked(self.db.wire, text, values))
        return wanted

    def _owner(self, wanted: set[Key]) -> "_Work | None":
        """Another who has locked some of it."""
        works = self.db.works
        if len(works) == 1:
            return None
        return next((w for w in works if w is not self and not w.locks.isdisjoint(wanted)), None)

    def _come_in(self) -> None:
        """Be inside, with all that it has written so far."""
        db = self.db
        if db.inside is self:
            return
        if db.inside is not None:
            db.inside._step_aside()
        db.wire.execute("BEGIN")
        db.inside = self
        if not self.wrote:
            return
        db.interludes += 1
        db.touched.clear()
        try:
            for text, values, n in self.wrote:
                cursor = db.wire.cursor()
                (cursor.executemany if isinstance(values, list) else cursor.execute)(text, values)
                if cursor.rowcount != n:
                    break
            else:
                if db.touched == self.rows:
                    return
        except sqlite3.Error:
            pass
        raise self._refused("could not serialize")

    def _step_aside(self) -> None:
        if self.db.inside is self:
            self._tell("ROLLBACK")

    def _tell(self, what: str) -> None:
        self.db.wire.execute(what)
        self.db.inside = None

    def _wait(self, owner: "_Work") -> None:
        """Until `owner` has ended; for whom nobody may wait who waits for us."""
        after: _Work | None = owner
        while after is not None:
            if after is self:
                raise self._refused("deadlock")
            after = after.waits_for
        self.waits_for, self.db.waits = owner, self.db.waits + 1
        try:
            if not self.db.wait(owner.wakes):
                raise self._refused("lock not available")
        finally:
            self.waits_for = None

    def _refused(self, why: str) -> Exception:
        self._step_aside()
        self.db.refusals += 1
        return sa.exc.OperationalError("", {}, Exception(why))


class _Line(sa.Connection):
    """What code is given as `tx`."""

    work: _Work | None = None

    def execute(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> Any:
        if self.work is None:
            return super().execute(statement, parameters, execution_options=execution_options)
        return self.work.send(sa.Connection.execute, statement, parameters, execution_options)

    def scalars(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> Any:
        return self.execute(statement, parameters, execution_options=execution_options).scalars()


class _Cursor(sqlite3.Cursor):
    """All rows are there at once: who stands aside may have read but half of them."""

    rows: Iterator[Any] = iter(())

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        _execute(self, statement, parameters)
        if self.description:
            self.rows = iter(_fetchall(self))
        return self

    def fetchone(self) -> Any:
        return next(self.rows, None)

    def fetchall(self) -> list[Any]:
        return list(self.rows)

    def fetchmany(self, size: int | None = 1) -> list[Any]:
        return list(islice(self.rows, size or 1))


_execute, _fetchall = sqlite3.Cursor.execute, sqlite3.Cursor.fetchall


class _Wire(sqlite3.Connection):
    def cursor(self, factory: Any = _Cursor) -> Any:
        return _cursor(self, factory)


_cursor = sqlite3.Connection.cursor


class _Compiler(SQLiteCompiler):
    """SQLite knows no row locks. Here a statement says whose rows it would lock."""

    def for_update_clause(self, select: Any, **kw: Any) -> str:
        tables = {t.name for f in select.get_final_froms() for t in find_tables(f, include_joins=True)}
        return f" {LOCKS}{','.join(sorted(tables & meta.tables.keys()))}*/"


LOCKS = "/*locks "


def _locked(wire: sqlite3.Connection, text: str, values: Any) -> Iterator[Key]:
    """The rows that this statement read FOR UPDATE, by their primary keys."""
    at = text.rfind(LOCKS)
    if at < 0:
        return
    tables = [meta.tables[name] for name in text[at + len(LOCKS) : text.index("*/", at)].split(",")]
    keys = [[f"{t.name}.{c.name}" for c in t.primary_key] for t in tables]
    rest = text[text.index("\nFROM ") :]
    for row in wire.execute(f"SELECT {', '.join(c for key in keys for c in key)} {rest}", values).fetchall():
        for table, key in zip(tables, keys, strict=True):
            yield (table.name, 0, *row[: len(key)])
            row = row[len(key) :]


def _triggers(table: sa.Table) -> str:
    """Each row that is written is told by its primary key and by all that must be unique of it, as it was and is."""
    keys = [[c.name for c in table.primary_key] or ["rowid"]]
    keys += [[c.name for c in u.columns] for u in table.constraints if isinstance(u, sa.UniqueConstraint)]
    keys += [[c.name for c in i.columns] for i in table.indexes if i.unique]
    told = {"INSERT": ("NEW",), "DELETE": ("OLD",), "UPDATE": ("OLD", "NEW")}
    made = []
    for event, rows in told.items():
        said = [
            f"touched('{table.name}', {i}, {', '.join(f'{row}.{column}' for column in key)})"
            for row in rows
            for i, key in enumerate(sorted(keys, key=lambda k: k != keys[0]))
        ]
        made.append(
            f"CREATE TRIGGER told_{event}_{table.name} AFTER {event} ON {table.name} BEGIN SELECT {', '.join(said)}; END;"
        )
    return "\n".join(made)
