"""One engine, and two ways into it: `tx` to change something, `read` to look.

The connection in a transaction is the unit of work, and it is the first argument of every function that
needs one: a function without `tx` cannot touch the database, and one with it cannot commit.

SQLite has one writer.  A thread that finds it busy sleeps, by SQLite's own back-off, 1 to 100 ms; a lock
in the process hands the pen over in microseconds, so writers queue here and `busy_timeout` is only for
other processes.  BEGIN IMMEDIATE takes the pen at once: a transaction that began as a reader and then
wants to write can be refused half-way, and no waiting will help it.
"""

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa

from kilonova.kit.errors import Invalid

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
            engine = {"pool_size": threads, "max_overflow": 0}
        if url.startswith(("mysql", "mariadb")):
            # As PostgreSQL does it. Their default shows a transaction the past, after it has waited for a lock, too.
            engine.setdefault("isolation_level", "READ COMMITTED")
        # Its errors are logged with the statement; what was to be written may be a secret.
        self.engine = sa.create_engine(url, hide_parameters=True, **engine)
        self.sqlite = sqlite
        self.pen: AbstractContextManager[Any] = threading.Lock() if sqlite else nullcontext()
        self.dice = dice or random.Random()
        self.statements = 0  # how many were sent; bench and tests read it
        # Not by SQLAlchemy's events: as soon as an engine has one, each statement asks for a dozen of them.
        dialect: Any = self.engine.dialect
        dialect.do_execute = self._sending(dialect.do_execute)
        dialect.do_executemany = self._sending(dialect.do_executemany)
        if sqlite:
            sa.event.listen(self.engine, "connect", _pragmas)

    @contextmanager
    def tx(self) -> Iterator[Tx]:
        """One transaction. Leaving the block commits; an exception rolls back."""
        with self.pen, self.engine.begin() as tx:
            if self.sqlite:
                _begin(tx, "BEGIN IMMEDIATE")
            yield tx

    @contextmanager
    def read(self) -> Iterator[Tx]:
        """A look, at one moment, that keeps nobody waiting."""
        with self.engine.begin() as tx:
            if self.sqlite:
                _begin(tx, "BEGIN")
            yield tx

    def run(self, work: Callable[Concatenate[Tx, P], R], *args: P.args, **more: P.kwargs) -> R:
        """`work(tx, *args)` in a transaction; again from the top when the database says so.

        Safe because a transaction changes nothing outside the database.  Five tries, then the database's error.
        """
        for left in reversed(range(5)):
            try:
                with self.tx() as tx:
                    return work(tx, *args, **more)
            except sa.exc.OperationalError:  # deadlock, serialization failure, busy
                if not left:
                    raise
                self.sleep(self.dice.uniform(0, 0.02) * (5 - left))
        raise AssertionError("not reached")

    def look(self, work: Callable[Concatenate[Tx, P], R], *args: P.args, **more: P.kwargs) -> R:
        """`work(tx, *args)` on a reading connection."""
        with self.read() as tx:
            return work(tx, *args, **more)

    def close(self) -> None:
        self.engine.dispose()

    sleep = staticmethod(time.sleep)

    def _sending(self, send: Callable[..., None]) -> Callable[..., None]:
        """A value that no column can hold (a NUL in a text, too long, too large a number) is its giver's fault."""
        misfits = self.engine.dialect.loaded_dbapi.DataError, OverflowError, UnicodeEncodeError

        def counted(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
            self.statements += 1
            try:
                send(cursor, statement, parameters, context)
            except misfits as e:
                why = f"{type(e).__name__}: {e}"
                raise Invalid("A value is too long, too large, or has a character that cannot be kept.", why=why) from e

        return counted


def claim(tx: Tx, statement: sa.Update, parameters: dict[str, Any] | None = None) -> bool:
    """Did this one conditional UPDATE take what it wanted? No RETURNING: MariaDB has none on UPDATE."""
    return bool(tx.execute(statement, parameters or {}).rowcount)


def _pragmas(dbapi: Any, _: Any) -> None:
    dbapi.isolation_level = None  # the driver shall not begin transactions on its own
    for pragma in PRAGMAS:
        dbapi.execute(f"PRAGMA {pragma}")


def _begin(tx: Tx, how: str) -> None:
    """Straight to the driver: SQLAlchemy's own way costs more than the BEGIN itself."""
    driver: Any = tx.connection.dbapi_connection
    try:
        driver.execute(how)
    except sqlite3.OperationalError as e:
        raise sa.exc.OperationalError(how, None, e) from e
