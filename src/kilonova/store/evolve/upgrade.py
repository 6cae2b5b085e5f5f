"""Taking the steps, by Alembic; and what differs between a database and the tables of the code.

Each step is a transaction, with its stamp, in PostgreSQL and SQLite; MariaDB commits each change of structure by
itself, so a step has one of those, or looks first.  SQLite's file is copied before: there is no other way back.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from kilonova.kit.db import Db
from kilonova.kit.errors import Refused
from kilonova.store.evolve import STEPS, VERSION, Standing, Step, alone, everything, standing


def chosen(now: Standing, *, finish: bool) -> list[Step]:
    """What is to be done: up to the last `before_` step, in order; `finish`: also the `after_` steps behind it.

    An `after_` step with a `before_` step behind it is of an earlier release: nobody who could mind it is left.
    """
    if finish:
        return now.pending
    last = max((s.number for s in now.pending if s.line == "before"), default=0)
    return [s for s in now.pending if s.number <= last]


def upgrade(
    db: Db, *, finish: bool, say: Callable[[str], None] = lambda line: None, folder: Path = STEPS
) -> list[Step]:
    """Take what is `chosen`. What was done. Raises Refused where the database is of a newer release."""
    with alone(db):
        now = standing(db, folder)
        if now.unknown:
            raise Refused(f"The database belongs to a newer release of Kilonova ({now.unknown[0]}).")
        todo = chosen(now, finish=finish)
        if not todo:
            return []
        if db.sqlite and not now.empty and (kept := _kept(db, now)):
            say(f"kept as it was in {kept}")
        engine = _engine(db)
        try:
            for step in todo:
                with engine.connect() as connection:
                    _take(connection, step, folder)
                say(f"done: {step.name}")
        finally:
            engine.dispose()
    return todo


def differences(db: Db) -> list[str]:
    """In what a database differs from the tables of the code, in words; nothing when they agree."""
    tables = everything()
    with db.engine.connect() as connection:
        return sorted(_said(d) for d in compare_metadata(_context(connection, STEPS, ours=set(tables.tables)), tables))


def _kept(db: Db, now: Standing) -> Path | None:
    """A copy of the file beside it, named after the last step that it has."""
    file = db.engine.url.database
    if not file or file == ":memory:":
        return None
    copy = Path(f"{file}.step-{max(now.have.values(), default=0)}")
    copy.unlink(missing_ok=True)
    connection = db.engine.raw_connection()
    try:
        connection.driver_connection.execute("VACUUM INTO ?", (str(copy),))  # type: ignore[union-attr]
    finally:
        connection.close()
    copy.chmod(0o600)
    return copy


def _engine(db: Db) -> sa.Engine:
    """Of its own: in SQLite a table that is made anew must not take its children with it, and a step is a transaction."""
    engine = sa.create_engine(db.engine.url, poolclass=sa.NullPool, hide_parameters=True)
    if db.sqlite:
        sa.event.listen(engine, "connect", lambda dbapi, _: setattr(dbapi, "isolation_level", None))
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _take(connection: sa.Connection, step: Step, folder: Path) -> None:
    script = ScriptDirectory(str(folder.parent), version_locations=[str(folder)])
    context = _context(connection, folder, fn=lambda heads, _: script._upgrade_revs(step.name, heads), script=script)
    with Operations.context(context):
        context.run_migrations()
    if step.name not in context.get_current_heads():
        raise Refused(f"The step {step.name} does not follow what the database is at.")


def _context(
    connection: sa.Connection,
    folder: Path,
    *,
    fn: Callable[[Any, Any], Iterable[Any]] | None = None,
    script: ScriptDirectory | None = None,
    ours: set[str] | None = None,
) -> MigrationContext:
    options: dict[str, Any] = {
        "fn": fn,
        "script": script,
        "transaction_per_migration": True,
        "include_name": lambda name, kind, _: kind != "table" or ours is None or name in ours,
        "include_object": lambda thing, *_: thing is not VERSION,
        "target_metadata": everything() if ours is not None else None,
        # A collation is told by some databases and not by others; Json is Text, and Boolean a number in MariaDB.
        "compare_server_default": False,
    }
    if connection.dialect.name in ("sqlite", "postgresql"):
        options["transactional_ddl"] = True
    return MigrationContext.configure(connection=connection, opts=options)


def _said(difference: Any) -> str:
    """Alembic's tuples (several changes of one column are a list of them), in words."""
    first = difference[0] if isinstance(difference, list) else difference
    what, *things = first
    if what.startswith("modify_"):
        _, table, column, _, was, is_ = things
        return f"{table}.{column}: {what.removeprefix('modify_')} is {was}, should be {is_}"
    thing = things[-1]
    name = getattr(thing, "name", None) or thing
    table = things[1] if what.endswith("_column") else getattr(getattr(thing, "table", None), "name", "")
    missing = "is missing" if what.startswith("add_") else "is too many"
    return f"{what.split('_', 1)[1]} {name}{f' of {table}' if table else ''} {missing}"
