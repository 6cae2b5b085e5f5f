"""A statement that is sent often: written with SQLAlchemy, compiled once, and handed to the driver as it is.

    GET = ready(sa.select(T).where(T.c.id == sa.bindparam("the_id")))
    tx.execute(GET, {"the_id": id}).first()

SQLAlchemy's own way builds a context, a cache key and a result for each statement: some 60 µs, where SQLite itself
takes 8.  A build sends forty of them.  For what stands in the source once and is sent a thousand times a second
this file does the same with a tenth of that: it binds by position, calls the driver through the dialect (so that the
count and the misfits of `kit/db.py` are the same), and gives the rows as named tuples.

A list's statement depends on what is asked, but people ask in few ways: `Shapes` keeps one for each of them, its values
as parameters.  Not for `IN (…)` with a list of any length: that has another text each time.
"""

import operator
from collections import namedtuple
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import sqlalchemy as sa

from kilonova.kit.errors import Invalid

S = TypeVar("S")
MANY = 64  # values of an `IN (…)` that is compiled beforehand, at most
ROWS = 8  # that are written at a time, where that is one statement
WIRE = "kilonova_wire"  # in a connection's `info`, and on the driver's: the way to PostgreSQL that goes past psycopg's cursors (`kit/postgres.py`)

Values = Mapping[str, Any]
NOTHING: Values = {}


def ready(statement: S, later: bool = False) -> S:
    """The same statement, to be executed as any other. What is derived from it (`.where`) is a plain one again.

    `later`: nobody asks what came of it, and nobody can say no to it but by a bug; where it saves a way to the database
    it is sent with the next statement, or with the end.
    """
    return cast("S", Ready(statement, later))


def each(values: Iterable[str]) -> list[Any]:
    """For an `IN (…)` whose values stand in the source: they are as many each time."""
    return [sa.bindparam("each", str(v), type_=sa.String, unique=True) for v in values]


class Ready:
    """Compiled once for each database and each set of parameters. Threads may share it: the last to compile wins."""

    __slots__ = ("known", "later", "statement")

    def __init__(self, statement: Any, later: bool = False) -> None:
        self.statement, self.later = statement, later
        self.known: dict[tuple[str, ...], _Compiled] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.statement, name)

    def _execute_on_connection(self, tx: sa.Connection, many: Sequence[Values], options: object) -> "Found":
        """SQLAlchemy's way in: `Connection.execute` asks this of whatever it is given."""
        driver = tx.dialect.driver
        if driver == "psycopg" and (wire := tx.info.get(WIRE)) is not None:
            return self._wired(tx, wire, many)
        return self._compiled(tx.dialect, driver, many).send(tx, many)

    def _wired(self, tx: sa.Connection, wire: Any, many: Sequence[Values]) -> "Found":
        """By a `postgres.Wire`; what is to be written of several rows, some rows at a time."""
        if len(many) < 2 or not isinstance(self.statement, sa.Insert):
            return self._compiled(_numbered(), WIRE, many).wired(tx, wire, many, self.later)
        some, rest = many[:ROWS], many[ROWS:]
        rows = {f"{name}_{i}": value for i, row in enumerate(some) for name, value in row.items()}
        key = (WIRE, str(len(some)), *some[0])
        compiled = self.known.get(key)
        if compiled is None:
            c = self.statement.table.c
            values = [{n: sa.bindparam(f"{n}_{i}", type_=c[n].type) for n in row} for i, row in enumerate(some)]
            compiled = self.known[key] = _Compiled(self.statement.values(values), _numbered(), ())
        found = compiled.wired(tx, wire, [rows], self.later)
        return self._wired(tx, wire, rest) if rest else found

    def _compiled(self, dialect: Any, way: str, many: Sequence[Values]) -> "_Compiled":
        key = (way, *many[0]) if many else (way,)
        compiled = self.known.get(key)
        if compiled is None:
            compiled = self.known[key] = _Compiled(self.statement, dialect, key[1:])
        return compiled

    _execute_on_scalar = None


@cache
def _numbered() -> Any:
    """PostgreSQL's words with its own parameters: $1, $2, …"""
    from sqlalchemy.dialects.postgresql import psycopg

    return psycopg.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]


def misfit(e: Exception) -> Invalid:
    """A value that no column can hold (a NUL in a text, too long, too large a number) is its giver's fault."""
    why = f"{type(e).__name__}: {e}"
    return Invalid("A value is too long, too large, or has a character that cannot be kept.", why=why)


class Condition(NamedTuple):
    """A piece of WHERE: `write` is given a parameter for each of `values`, and depends on nothing but `shape`.

    No shape: it is another each time, and so is the statement that holds it.
    """

    shape: Hashable
    write: Callable[..., Any]
    values: tuple[Any, ...] = ()


def written(where: Sequence[Condition]) -> list[Any]:
    """Conditions in SQLAlchemy's words, to be executed with their `given`."""
    return [c.write(*[sa.bindparam(f"w{i}_{j}") for j in range(len(c.values))]) for i, c in enumerate(where)]


def given(where: Sequence[Condition]) -> dict[str, Any]:
    return {f"w{i}_{j}": value for i, c in enumerate(where) for j, value in enumerate(c.values)}


class Shapes:
    """Statements by the shape of the question that they answer; the last `most` of them."""

    def __init__(self, most: int = 256) -> None:
        self.most, self.known = most, dict[Hashable, Any]()

    def of(self, shape: Hashable, write: Callable[[], S]) -> S:
        """The one that `write` wrote when this was first asked. It must not depend on anything but `shape`."""
        found = self.known.get(shape)
        if found is None:
            if len(self.known) >= self.most:
                self.known.clear()  # strangers have asked all sorts of things; what is usual comes back at once
            found = self.known[shape] = ready(write())
        return cast("S", found)


class Among:
    """A question about some of many, to be asked as `tx.execute(*PLUGS(ids))`: compiled once for each power of two.

        PLUGS = Among(lambda some: sa.select(T.c.id, T.c.plugs).where(T.c.id.in_(some)))

    Whoever asks about none should not ask.  `more` are its other parameters.
    """

    def __init__(self, write: Callable[[list[Any]], Any]) -> None:
        self.write, self.known = write, dict[int, Any]()

    def __call__(self, ids: Collection[str], **more: Any) -> tuple[Any, dict[str, Any]]:
        if len(ids) > MANY:
            return self.write(list(ids)), more
        n = 1 << max(0, len(ids) - 1).bit_length()
        statement = self.known.get(n)
        if statement is None:
            statement = self.known[n] = ready(self.write([sa.bindparam(f"one{i}", type_=sa.String) for i in range(n)]))
        values = list(ids)
        values += values[-1:] * (n - len(values))
        return statement, {f"one{i}": id for i, id in enumerate(values)} | more


def among(tx: sa.Connection, name: str, statement: Any, column: Any, values: Collection[str]) -> Any:
    """The same of a statement that is not written down beforehand, executed; `name` is its own."""
    if not values:
        return tx.execute(statement.where(column.in_([])))
    if name not in _AMONG:
        _AMONG[name] = Among(lambda some: statement.where(column.in_(some)))
    return tx.execute(*_AMONG[name](values))


_AMONG = dict[str, Among]()


class _Compiled:
    """The text, and how its parameters and rows are made."""

    def __init__(self, statement: Any, dialect: Any, names: tuple[str, ...]) -> None:
        # as for many rows: so that an INSERT does not ask for the key that the database gave
        c = statement.compile(dialect=dialect, column_keys=list(names) or None, for_executemany=True)
        assert not c.literal_execute_params and not c.post_compile_params, f"it is another each time: {c}"
        assert not getattr(c, "insert_prefetch", ()) and not getattr(c, "update_prefetch", ()), f"it has defaults: {c}"
        self.text, self.positional = str(c), bool(c.positional)
        given = c.params
        processors = c._bind_processors
        order = c.positiontup if self.positional else list(c.bind_names.values())
        needed = {name for bind, name in c.bind_names.items() if bind.required}
        self.binds = [(n, c.escaped_bind_names.get(n, n), n in needed, given.get(n), processors.get(n)) for n in order]
        self.plain = None
        if self.positional and len(order) > 1 and all(n in names for n in order) and not any(b[-1] for b in self.binds):
            self.plain = operator.itemgetter(*order)
        self.columns = [(r.keyname, r.type) for r in c._result_columns]
        self.row: Callable[[Sequence[Any]], Any] | None = None

    def bound(self, values: Values) -> Any:
        """What the driver is given for one row."""
        if self.plain is not None:
            return self.plain(values)
        made = [
            (as_, v if how is None else how(v))
            for name, as_, needed, given, how in self.binds
            for v in (values[name] if needed else values.get(name, given),)
        ]
        return tuple(v for _, v in made) if self.positional else dict(made)

    def send(self, tx: sa.Connection, many: Sequence[Values]) -> "Found":
        dialect: Any = tx.dialect
        driver: Any = tx.connection.dbapi_connection
        cursor = driver.cursor()
        try:
            if len(many) > 1:
                dialect.do_executemany(cursor, self.text, [self.bound(v) for v in many])
            else:
                dialect.do_execute(cursor, self.text, self.bound(many[0] if many else NOTHING))
        except dialect.loaded_dbapi.Error as e:
            raise self._known(tx, dialect, driver, cursor, e) from e
        if self.row is None and self.columns:
            self.row = self._rows(dialect, cursor.description)
        return Found(cursor, self.row)

    def wired(self, tx: sa.Connection, wire: Any, many: Sequence[Values], later: bool) -> "Found":
        """The same by a `postgres.Wire`."""
        if self.text.startswith("SAVEPOINT"):
            return Found(wire.later(self.text.encode()), None)
        try:
            for values in many[:-1]:
                wire.send(self.text, self.bound(values), True)
            answer = wire.send(self.text, self.bound(many[-1] if many else NOTHING), later)
        except (wire.DataError, UnicodeEncodeError) as e:
            raise misfit(e) from e
        except wire.Error as e:
            raise self._known(tx, tx.dialect, wire.driver, None, e) from e
        if self.row is None and self.columns:
            self.row = self._rows(tx.dialect, answer.description)
        return Found(answer, self.row)

    def _known(self, tx: sa.Connection, dialect: Any, driver: Any, cursor: Any, e: Exception) -> Exception:
        """As SQLAlchemy calls it; a connection that broke is not used again."""
        broken = dialect.is_disconnect(e, driver, cursor)
        if broken:
            tx.invalidate(e)
        elif cursor is not None:
            cursor.close()
        kind = dialect.loaded_dbapi.Error
        return sa.exc.DBAPIError.instance(
            self.text, None, e, kind, hide_parameters=True, connection_invalidated=broken, dialect=dialect
        )

    def _rows(self, dialect: Any, description: Any) -> Callable[[Sequence[Any]], Any]:
        """Named tuples; values as the columns' types have them."""
        named: Any = namedtuple("Named", [n for n, _ in self.columns], rename=True)  # type: ignore[misc]
        kind: Any = type("Row", (_Row, named), {"__slots__": ()})
        make: Callable[[Sequence[Any]], Any] = kind._make
        types = enumerate(zip(self.columns, description, strict=True))
        read = [(i, how) for i, ((_, t), d) in types if (how := t._cached_result_processor(dialect, d[1]))]
        if not read:
            return make

        def processed(row: Sequence[Any]) -> Any:
            values = list(row)
            for i, how in read:
                values[i] = how(values[i])
            return make(values)

        return processed


class _Row:
    """What SQLAlchemy's rows can do beside being tuples with names."""

    __slots__ = ()

    @property
    def _mapping(self) -> dict[str, Any]:
        return self._asdict()  # type: ignore[attr-defined,no-any-return]


class Found:
    """What came of it: as much of SQLAlchemy's result as we use."""

    __slots__ = ("cursor", "row")

    def __init__(self, cursor: Any, row: Callable[[Sequence[Any]], Any] | None) -> None:
        self.cursor, self.row = cursor, row

    @property
    def rowcount(self) -> int:
        return int(self.cursor.rowcount)

    def first(self) -> Any:
        assert self.row is not None
        found = self.cursor.fetchone()
        self.cursor.close()
        return None if found is None else self.row(found)

    def one(self) -> Any:
        found = self.first()
        if found is None:
            raise sa.exc.NoResultFound("No row was found when one was required")
        return found

    def all(self) -> list[Any]:
        assert self.row is not None
        found = list(map(self.row, self.cursor.fetchall()))
        self.cursor.close()
        return found

    def __iter__(self) -> Iterator[Any]:
        return iter(self.all())

    def scalar(self) -> Any:
        found = self.first()
        return None if found is None else found[0]

    def scalars(self) -> "Scalars":
        return Scalars(row[0] for row in self.all())


class Scalars(list[Any]):
    """The first column of all rows."""

    def all(self) -> list[Any]:
        return self

    def first(self) -> Any:
        return self[0] if self else None
