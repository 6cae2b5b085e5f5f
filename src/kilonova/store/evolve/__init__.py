"""How a database comes to have today's tables: all at once where there are none, else by the steps in `steps/`.

Steps go in two lines, told apart by their names.  A `before_` step adds what the new release needs and the old one does
not mind: it is taken while the old one works.  An `after_` step takes away, or makes strict, what the new one does not
use: it is taken when no process of the old release is left.  So for a while one schema carries both releases, and a
process asks two things only: are all the `before_` steps that I know done, and is there an `after_` step that I do not
know?  `alembic_version` holds the newest step of each line.

There is no way down: a downgrade is a restore (docs/how/a-column.md).
"""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa

from kilonova.kit.db import Db, Tx, meta
from kilonova.kit.errors import Refused, Unavailable

STEPS = Path(__file__).parent / "steps"
MARK = "runs"  # a database that has this table is a cloud's
LOCK = 0x6B696C6F  # whoever changes the schema holds it
LOCK_S = 600

# As Alembic makes it.
VERSION = sa.Table(
    "alembic_version",
    sa.MetaData(),
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)

_NAME = re.compile(r"(before|after)_([0-9]{4})_[a-z0-9_]+")


class Step(NamedTuple):
    """A file in `steps/`; its name is Alembic's revision."""

    number: int
    line: Literal["before", "after"]
    name: str


class Standing(NamedTuple):
    """How far a database has come. `have`: of each line the newest step; none: it was never stamped."""

    empty: bool
    have: dict[str, int]
    pending: list[Step]
    unknown: list[str]  # steps of a newer release


def steps(folder: Path = STEPS) -> list[Step]:
    """All that this release knows, in the order in which they are taken."""
    return sorted(_step(file.stem) for file in folder.glob("*_[0-9][0-9][0-9][0-9]_*.py"))


def standing(db: Db, folder: Path = STEPS) -> Standing:
    with db.read() as tx:
        return _standing(tx, folder)


def _standing(tx: Tx, folder: Path = STEPS) -> Standing:
    known, there = steps(folder), sa.inspect(tx)
    if not there.has_table(VERSION.name):
        return Standing(not there.has_table(MARK), {}, known, [])
    found = [_step(name) for name in tx.execute(sa.select(VERSION.c.version_num)).scalars()]
    have: dict[str, int] = {s.line: s.number for s in found}
    unknown = [s.name for s in found if s not in known]
    return Standing(False, have, [s for s in known if s.number > have.get(s.line, 0)], unknown)


def _step(name: str) -> Step:
    """Raises Refused: the table is not ours."""
    if not (told := _NAME.fullmatch(name)):
        raise Refused(f"The database is at the step {name!r}, which is none of ours.")
    return Step(int(told[2]), "before" if told[1] == "before" else "after", name)


def trouble(now: Standing) -> str:
    """Why a process of this release cannot work with such a database; "" where it can."""
    if now.empty:
        return "The database is empty: kilonova db upgrade makes its tables."
    if newer := [name for name in now.unknown if name.startswith("after_")]:
        return (
            f"The database belongs to a newer release of Kilonova ({newer[0]}). Use that, or restore what was before."
        )
    if older := [s.name for s in now.pending if s.line == "before"]:
        return f"The database is of an older release ({older[0]} is to be done): kilonova db upgrade."
    return ""


def ready(db: Db, folder: Path = STEPS) -> None:
    """For a process that begins to work: makes the tables where there are none. Raises Refused where it cannot work.

    What an earlier Kilonova made without a stamp is stamped, if it has all that today's has.
    """
    now = standing(db, folder)
    if not now.have:
        _made(db, folder)
        now = standing(db, folder)
    if why := trouble(now):
        raise Refused(why)


def _made(db: Db, folder: Path) -> None:
    """Who comes at the same time waits, and finds it done. The other tables of the database are not ours to mind."""
    everything()
    with alone(db), db.tx() as tx:
        if _standing(tx, folder).have:
            return
        meta.create_all(tx)
        if strange := misfits(tx):
            raise Refused(
                f"The database was made by another version of Kilonova: {'; '.join(strange[:3])}. Use that version, or begin "
                "anew: kilonova down --purge."
            )
        VERSION.create(tx, checkfirst=True)
        last = {s.line: s.name for s in steps(folder)}
        tx.execute(sa.insert(VERSION), [{"version_num": name} for name in last.values()])


def misfits(tx: Tx) -> list[str]:
    """Columns that it, or we, do not know."""
    found = []
    for (_, name), columns in sa.inspect(tx).get_multi_columns().items():
        if (table := meta.tables.get(name)) is not None:
            theirs, ours = {c["name"] for c in columns}, {c.name for c in table.columns}
            found += [f"the table {name} has no {c}" for c in sorted(ours - theirs)]
            found += [f"the table {name} has a {c}" for c in sorted(theirs - ours)]
    return found


def everything() -> sa.MetaData:
    """`kit.db.meta`, with all tables in it: those of `store/`, and of runs."""
    store = importlib.import_module("kilonova.store")
    importlib.import_module("kilonova.kit.workflow")
    for module in pkgutil.iter_modules(store.__path__):
        importlib.import_module(f"kilonova.store.{module.name}")
    return meta


@contextmanager
def alone(db: Db) -> Iterator[None]:
    """Nobody else changes the schema meanwhile. In SQLite whoever writes is alone anyhow. Raises Unavailable."""
    said: dict[str, Any] = {"lock": LOCK, "name": "kilonova-schema", "most": LOCK_S}
    if db.sqlite:
        yield
    elif db.engine.dialect.name == "postgresql":
        with db.tx() as tx:  # the lock goes with the transaction
            tx.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), said)
            yield
    else:
        with db.tx() as tx:
            if tx.execute(sa.text("SELECT GET_LOCK(:name, :most)"), said).scalar() != 1:
                raise Unavailable(f"Another process has been changing the schema for {LOCK_S} s.")
            try:
                yield
            finally:
                tx.execute(sa.text("SELECT RELEASE_LOCK(:name)"), said)
