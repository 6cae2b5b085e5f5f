"""One engine, and two ways into it: `tx` to change something, `read` to look.

The connection in a transaction is the unit of work, and it is the first argument of every function that
needs one: a function without `tx` cannot touch the database, and one with it cannot commit.

SQLite has one writer.  A thread that finds it busy sleeps, by SQLite's own back-off, 1 to 100 ms; a lock
in the process hands the pen over in microseconds, so writers queue here and `busy_timeout` is only for
other processes.  BEGIN IMMEDIATE takes the pen at once: a transaction that began as a reader and then
wants to write can be refused half-way, and no waiting will help it.
"""

import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa

from kilonova.kit.errors import Unavailable
from kilonova.kit.postgres import Line, Transaction
from kilonova.kit.ready import WIRE, misfit

P = ParamSpec("P")
R = TypeVar("R")
Tx = sa.Connection

meta = sa.MetaData()

PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = NORMAL",
    "busy_timeout = 5000",
    "foreign_keys = ON",
    "cache_size = -16000",
    "temp_store = MEMORY",
)


class Db:
    """`url` as SQLAlchemy writes it: sqlite:///PATH, postgresql+psycopg://…, mysql+pymysql://…"""

    def __init__(self, url: str, *, threads: int = 16, dice: random.Random | None = None, **engine: Any) -> None:
        sqlite = url.startswith("sqlite")
        if not engine:
            engine = {"poolclass": sa.NullPool} if sqlite else {"pool_size": threads, "max_overflow": 0}
        if url.startswith(("mysql", "mariadb")):
            # As PostgreSQL does it. Their default shows a transaction the past, after it has waited for a lock, too.
            engine.setdefault("isolation_level", "READ COMMITTED")
        # Its errors are logged with the statement; what was to be written may be a secret.
        self.engine = sa.create_engine(url, hide_parameters=True, **engine)
        self.sqlite = sqlite
        self.pen: AbstractContextManager[Any] = threading.Lock() if sqlite else nullcontext()
        self.dice = dice or random.Random()
        self.statements = self.commits = 0  # how many were sent, and carried out; bench and tests read them
        self.line = Line(self.engine, threads, self) if self.engine.dialect.driver == "psycopg" else None
        self.idle: list[tuple[Tx, Any]] = []  # of SQLite: connections, each with its driver's, that nobody uses now
        # Not by SQLAlchemy's events: as soon as an engine has one, each statement asks for a dozen of them.
        dialect: Any = self.engine.dialect
        dialect.do_execute = self._sending(dialect.do_execute)
        dialect.do_executemany = self._sending(dialect.do_executemany)
        if sqlite:
            sa.event.listen(self.engine, "connect", _pragmas)

    def tx(self) -> AbstractContextManager[Tx]:
        """One transaction. Leaving the block commits; an exception rolls back."""
        if self.sqlite:
            return _Lite(self, "BEGIN IMMEDIATE", self.pen)
        return self._begun() if self.line is None else Transaction(self.line, True)

    def read(self) -> AbstractContextManager[Tx]:
        """A look that keeps nobody waiting: at one moment with SQLite, else each statement at its own, as in `tx`."""
        if self.sqlite:
            return _Lite(self, "BEGIN", _NO_PEN)
        return self._begun() if self.line is None else Transaction(self.line, False)

    @contextmanager
    def snapshot(self) -> Iterator[Tx]:
        """A look at all as it is at one moment, however long it takes."""
        if self.sqlite:
            with self.read() as tx:
                yield tx
        else:
            with self.engine.connect().execution_options(isolation_level="REPEATABLE READ") as tx, tx.begin():
                yield tx

    @contextmanager
    def _begun(self) -> Iterator[Tx]:
        with self.engine.begin() as tx:
            yield tx
        self.commits += 1

    def run(self, work: Callable[Concatenate[Tx, P], R], *args: P.args, **more: P.kwargs) -> R:
        """`work(tx, *args)` in a transaction; again from the top when the database says so.

        Safe because a transaction changes nothing outside the database.  Five tries, then the database's error.  One
        try more where something was not there when it looked, and was when it came to write it: it will see it now.
        """
        surprised = False
        for left in reversed(range(5)):
            try:
                with self.tx() as tx:
                    return work(tx, *args, **more)
            except sa.exc.IntegrityError:
                if surprised or not left:
                    raise
                surprised = True
            except sa.exc.OperationalError:  # deadlock, serialization failure, busy
                if not left:
                    raise
                self.sleep(self.dice.uniform(0, 0.02) * (5 - left))
        raise AssertionError("not reached")

    def look(self, work: Callable[Concatenate[Tx, P], R], *args: P.args, **more: P.kwargs) -> R:
        """`work(tx, *args)` on a reading connection."""
        with self.read() as tx:
            return work(tx, *args, **more)

    def listen(self, heard: Callable[[Tx, Any], None], *, closely: bool = False) -> None:
        """`heard(tx, happened)` is told of runs that begin and end, in the transaction that says so. Before the first.

        `closely`: also of each change of a thing's state, for which it is read before and after.
        """
        dialect: Any = self.engine.dialect
        dialect.heard, dialect.closely = heard, closely

    def owe(self) -> None:
        """What is claimed and given back is owed to another service, and noted for it (`store/dues.py`). Before the first."""
        dialect: Any = self.engine.dialect
        dialect.owes = True

    def close(self) -> None:
        while self.idle:
            self.idle.pop()[0].close()
        if self.line is not None:
            self.line.close()
        self.engine.dispose()

    sleep = staticmethod(time.sleep)

    def _sending(self, send: Callable[..., None]) -> Callable[..., None]:
        misfits = self.engine.dialect.loaded_dbapi.DataError, OverflowError, UnicodeEncodeError

        def counted(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
            self.statements += 1
            try:
                if self.line is not None and (wire := getattr(cursor.connection, WIRE, None)) is not None:
                    wire.flush()
                send(cursor, statement, parameters, context)
            except misfits as e:
                raise misfit(e) from e

        return counted


def ill(e: Exception) -> Unavailable | None:
    """What the database's own trouble is to somebody who asked us for something; None: it is none of the database's."""
    if not isinstance(e, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError):
        return None
    return Unavailable("The database cannot be used now; try again.", why=f"{type(e).__name__}: {e}")


def claim(tx: Tx, statement: sa.Update, parameters: dict[str, Any] | None = None) -> bool:
    """Did this one conditional UPDATE take what it wanted? No RETURNING: MariaDB has none on UPDATE."""
    return bool(tx.execute(statement, parameters or {}).rowcount)


def one_writer(tx: Tx) -> bool:
    """Does nobody else write before this transaction ends? So it is with SQLite, but for the simulator's."""
    return tx.dialect.name == "sqlite" and tx.dialect.driver != "memory"


def anywhere(text: str) -> str:
    """LIKE's pattern for this text at any place, for `LIKE … ESCAPE '/'`."""
    return "%" + re.sub(r"([%_/])", r"/\1", text) + "%"


def _pragmas(dbapi: Any, _: Any) -> None:
    dbapi.isolation_level = None  # the driver shall not begin transactions on its own
    for pragma in PRAGMAS:
        dbapi.execute(f"PRAGMA {pragma}")


class _Lite:
    """A transaction on SQLite. To SQLAlchemy each connection is in one transaction for ever: its own bookkeeping, and
    its pool's, cost more than a BEGIN and a COMMIT straight to the driver."""

    __slots__ = ("conn", "db", "driver", "how", "pen")

    def __init__(self, db: Db, how: str, pen: AbstractContextManager[Any]) -> None:
        self.db, self.how, self.pen = db, how, pen

    def __enter__(self) -> Tx:
        self.pen.__enter__()
        try:
            try:
                self.conn, self.driver = self.db.idle.pop()
            except IndexError:
                self.conn = self.db.engine.connect()
                self.conn.begin()
                self.driver = self.conn.connection.dbapi_connection
            self._tell(self.how)
        except BaseException as e:
            self.pen.__exit__(type(e), e, e.__traceback__)
            raise
        return self.conn

    def __exit__(self, kind: Any, trouble: BaseException | None, trace: Any) -> None:
        try:
            self._tell("COMMIT" if trouble is None else "ROLLBACK")
            self.db.commits += trouble is None
        finally:
            if not self.conn.invalidated:
                self.db.idle.append((self.conn, self.driver))
            self.pen.__exit__(None, None, None)

    def _tell(self, what: str) -> None:
        try:
            if what != "ROLLBACK" or self.driver.in_transaction:  # a full disk, say, has rolled it back already
                self.driver.execute(what)
        except sqlite3.Error as e:
            if self.driver.in_transaction:
                self.driver.execute("ROLLBACK")
            if what == "BEGIN" or what == "BEGIN IMMEDIATE":
                self.db.idle.append((self.conn, self.driver))
            raise sa.exc.DBAPIError.instance(
                what, None, e, sqlite3.Error, hide_parameters=True, dialect=self.conn.dialect
            ) from e


_NO_PEN: AbstractContextManager[Any] = nullcontext()
