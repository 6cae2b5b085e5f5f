"""PostgreSQL without detours: a transaction, and statements that are ready (`kit/ready.py`), straight to libpq.

psycopg's cursors cost 60 µs of each statement before the server sees it, and SQLAlchemy's pool with its BEGIN and
COMMIT 200 µs of each transaction; a build has forty of the one and ten of the other.  libpq itself takes ten.  So this
file speaks to `psycopg.pq`, psycopg's own face of libpq: statements are prepared once for each connection and sent as
text, and psycopg's loaders make values of what comes back.  What is not ready goes psycopg's way, in the same
transaction.  Figures, and what was tried besides: docs/decisions/postgres-wire.md.
"""

import select
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import sqlalchemy as sa

from kilonova.kit.ready import WIRE

PATIENCE_S = 30.0  # for a connection, while all are in use
TOGETHER = 100  # statements in one message: their answers must find room on the way while nobody reads
MOST = 500  # statements prepared on one connection; then it forgets them all

_BEGIN = b"", b"BEGIN"
FLOAT, BOOL = 701, 16  # the server's numbers of types; what is 0 it finds by itself


class Counts(Protocol):
    """Who counts what is sent (`Db`)."""

    statements: int
    commits: int


class Line:
    """Connections to one database that are open and that nobody uses now; at most `threads` are in use at a time."""

    def __init__(self, engine: sa.Engine, threads: int, counts: Counts) -> None:
        self.engine, self.counts = engine, counts
        self.seats = threading.BoundedSemaphore(threads)
        self.idle: list[tuple[sa.Connection, Wire]] = []

    def take(self) -> "tuple[sa.Connection, Wire]":
        """Raises sqlalchemy's TimeoutError, or what a database says that cannot be reached."""
        if not self.seats.acquire(timeout=PATIENCE_S):
            raise sa.exc.TimeoutError(f"no connection was free within {PATIENCE_S:.0f} s")
        try:
            return self.idle.pop()
        except IndexError:
            pass
        try:
            # To SQLAlchemy, and to psycopg, it is in no transaction ever: theirs is ours to begin and to end.
            conn = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            conn.begin()
            driver: Any = conn.connection.dbapi_connection
            wire = conn.info[WIRE] = Wire(driver, self.counts)
            setattr(driver, WIRE, wire)
        except BaseException:
            self.seats.release()
            raise
        return conn, wire

    def give_back(self, conn: sa.Connection, wire: "Wire") -> None:
        """One that broke is not used again, and none of those that are as old as it."""
        wire.settle()
        if conn.invalidated or wire.broken:
            conn.invalidate()
            conn.close()
            self.close()
        else:
            self.idle.append((conn, wire))
        self.seats.release()

    def close(self) -> None:
        while self.idle:
            conn, _ = self.idle.pop()
            conn.invalidate()
            conn.close()


class Transaction:
    """`with` it: what was changed holds, or with an exception does not. `begins` False: each look is one of its own."""

    __slots__ = ("begins", "conn", "line", "wire")

    def __init__(self, line: Line, begins: bool) -> None:
        self.line, self.begins = line, begins

    def __enter__(self) -> sa.Connection:
        self.conn, self.wire = self.line.take()
        if self.begins:
            self.wire.waiting.append(_BEGIN)
        return self.conn

    def __exit__(self, kind: type[BaseException] | None, trouble: BaseException | None, trace: object) -> None:
        try:
            if self.begins and not (self.wire.broken and trouble is not None):
                self._end(trouble is None)
            self.line.counts.commits += trouble is None  # a look counts, as everywhere
        finally:
            self.line.give_back(self.conn, self.wire)

    def _end(self, well: bool) -> None:
        try:
            self.wire.commit() if well else self.wire.rollback()
        except self.wire.Error as e:
            raise sa.exc.DBAPIError.instance(
                "COMMIT" if well else "ROLLBACK",
                None,
                e,
                self.wire.Error,
                hide_parameters=True,
                connection_invalidated=self.wire.broken,
                dialect=self.line.engine.dialect,
            ) from e


class Answer:
    """What came of a statement: as much of a cursor as `ready.Found` uses."""

    __slots__ = ("result", "rows", "wire")

    def __init__(self, wire: "Wire", result: Any) -> None:
        self.wire, self.result = wire, result
        self.rows: list[Any] = []
        if n := result.ntuples:
            wire.values.set_pgresult(result)
            self.rows = wire.values.load_rows(0, n, tuple)

    @property
    def rowcount(self) -> int:
        return int(self.result.command_tuples or 0)

    @property
    def description(self) -> list[tuple[str, int]]:
        """(name, number of its type) of each column."""
        return [(str(self.result.fname(i)), self.result.ftype(i)) for i in range(self.result.nfields)]

    def fetchone(self) -> Any:
        return self.rows[0] if self.rows else None

    def fetchall(self) -> list[Any]:
        return self.rows

    def close(self) -> None: ...


class Wire:
    """One connection, and what is prepared on it. Raises psycopg's errors."""

    def __init__(self, driver: Any, counts: Counts) -> None:
        import psycopg  # not everybody has it
        from psycopg.adapt import Transformer
        from psycopg.errors import error_from_result
        from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus

        self.driver, self.pg, self.counts = driver, driver.pgconn, counts
        driver.prepare_threshold = None  # its own statements it forgets with a DEALLOCATE ALL, and ours with them
        self.values: Any = Transformer(driver)
        self.known: dict[tuple[Any, ...], bytes] = {}
        self.waiting: list[tuple[bytes, Any]] = []  # (name of what is prepared, its values), or (nothing, a word)
        self.Error, self.DataError, self.Broken = psycopg.Error, psycopg.DataError, psycopg.OperationalError
        self.error_of = error_from_result
        self.readable, self.writable = select.poll(), select.poll()
        self.readable.register(self.pg.socket, select.POLLIN)
        self.writable.register(self.pg.socket, select.POLLOUT)
        self.good = ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK
        self.bad, self.idle = ConnStatus.BAD, TransactionStatus.IDLE

    @property
    def broken(self) -> bool:
        return bool(self.pg.status == self.bad)

    def commit(self) -> None:
        """What waits goes with it; of a transaction that came to nothing the server never hears."""
        if not self.waiting:
            self._good(self.pg.exec_(b"COMMIT"))
        elif self.waiting[0] != _BEGIN or any(name for name, _ in self.waiting):
            self._together((b"", b"COMMIT"))
        self.waiting.clear()

    def rollback(self) -> None:
        begun = not (self.waiting and self.waiting[0] == _BEGIN)
        self.waiting.clear()
        if begun:
            self._good(self.pg.exec_(b"ROLLBACK"))

    def settle(self) -> None:
        """Be in no transaction, whatever went before."""
        self.waiting.clear()
        if not self.broken and self.pg.transaction_status != self.idle:
            self.pg.exec_(b"ROLLBACK")

    def later(self, word: bytes) -> None:
        """A statement without parameters, of which nobody waits to hear: with the next."""
        self.counts.statements += 1
        self.waiting.append((b"", word))

    def send(self, text: str, values: Sequence[Any], later: bool = False) -> "Answer | None":
        """`text` has its parameters as $1, $2, … `later`: with the next, or with the end; what it is refused for is heard then."""
        self.counts.statements += 1
        told = [None if v is None else self._told(v) for v in values]
        kinds = tuple(FLOAT if type(v) is float else BOOL if type(v) is bool else 0 for v in values)
        name = self.known.get((text, kinds)) or self._prepared(text, kinds)
        if later:
            self.waiting.append((name, told))
            if len(self.waiting) >= TOGETHER:
                self.flush()
            return None
        if not self.waiting:
            return Answer(self, self._good(self.pg.exec_prepared(name, told)))
        return Answer(self, self._together((name, told)))

    def flush(self) -> None:
        """Others speak now, in the same transaction."""
        if self.waiting:
            self._together()

    def _together(self, *more: tuple[bytes, Any]) -> Any:
        """One way there and back for what waits, and more. The last one's result; raises the first one's trouble."""
        words, self.waiting = [*self.waiting, *more], []
        pg, trouble, last = self.pg, None, None
        pg.enter_pipeline_mode()
        for name, told in words:
            if name:
                pg.send_query_prepared(name, told)
            else:
                pg.send_query_params(told, None)
        pg.pipeline_sync()
        for _ in words:
            while (result := self._next()) is not None:
                last = result
                if trouble is None and result.status not in self.good:
                    trouble = result
        self._next()  # the end of them
        if not self.broken:
            pg.exit_pipeline_mode()
        if trouble is not None or last is None:
            raise self.Broken("the connection was lost") if trouble is None else self._trouble(trouble)
        return last

    def _next(self) -> Any:
        """The next result, None between two. To wait is our own affair: libpq would do it with the interpreter's lock held."""
        pg = self.pg
        while pg.flush() and not self.broken:
            self.writable.poll(1000)
        while pg.is_busy() and not self.broken:
            self.readable.poll()
            pg.consume_input()
        return pg.get_result()

    def _prepared(self, text: str, kinds: tuple[int, ...]) -> bytes:
        if len(self.known) >= MOST:
            self.flush()
            self._good(self.pg.exec_(b"DEALLOCATE ALL"))
            self.known.clear()
        name = b"r%d" % len(self.known)
        self._good(self.pg.prepare(name, text.encode(), kinds))
        self.known[text, kinds] = name
        return name

    def _told(self, value: Any) -> bytes:
        """As the server reads it."""
        if isinstance(value, str):
            if "\0" in value:
                raise self.DataError("a text with a NUL in it")
            return value.encode()
        if isinstance(value, bool):
            return b"t" if value else b"f"
        if isinstance(value, int | float):
            return repr(value + 0).encode()  # of an enumeration its number
        assert isinstance(value, bytes), f"a {type(value).__name__} is no value of a column"
        return b"\\x" + value.hex().encode()

    def _good(self, result: Any) -> Any:
        if result.status not in self.good:
            raise self._trouble(result)
        return result

    def _trouble(self, result: Any) -> Exception:
        """What the server says bears a SQLSTATE; without one it is libpq's own word, and that is that the server is gone."""
        e: Exception = self.error_of(result, encoding="utf-8")
        return e if getattr(e, "sqlstate", None) else self.Broken(str(e))
