"""The schema by steps: they lead to the tables of the code, from whichever side one comes, and old code goes on meanwhile.

tests/fleet/test_databases.py tells the same on PostgreSQL and MariaDB.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import kilonova
from kilonova.cli.database import at_work
from kilonova.cli.db import undisturbed
from kilonova.kit.db import Db, meta
from kilonova.kit.errors import Conflict, Refused
from kilonova.model.options import Config
from kilonova.store import evolve, hosts
from kilonova.store.evolve import STEPS, Standing, Step
from kilonova.store.evolve.draft import draft
from kilonova.store.evolve.upgrade import chosen, differences, upgrade
from tests.schemas import fingerprint

# What the next release could bring: a column that old code does not say, and one that nobody uses any more.
BEFORE = '''"""Services have a colour."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "before_9001_colour", {last!r}


def upgrade() -> None:
    op.add_column("services", sa.Column("colour", sa.String(8), nullable=False, server_default="red"))
    op.create_index("services_colour", "services", ["colour"])
'''
AFTER = '''"""Nobody asks why a service is disabled."""

from alembic import op

revision, down_revision = "after_9002_no_reason", None


def upgrade() -> None:
    with op.batch_alter_table("services") as table:
        table.drop_column("disabled_reason")
'''


@pytest.fixture
def urls(tmp_path: Path) -> Callable[[], str]:
    """Of empty databases, on the server at TEST_DB or as files."""
    server, all = os.environ.get("TEST_DB"), list[str]()

    def one() -> str:
        all.append(f"kilonova_{tmp_path.name[:40]}_{len(all)}")
        if server is None:
            return f"sqlite:///{tmp_path}/{all[-1]}.db"
        _tell(server, f"CREATE DATABASE {all[-1]}")
        return sa.make_url(server).set(database=all[-1]).render_as_string(hide_password=False)

    return one  # a server that was made for tests goes as a whole


def _tell(server: str, what: str) -> None:
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(what))
    engine.dispose()


@pytest.fixture
def made(urls: Callable[[], str]) -> Iterator[Callable[[], Db]]:
    all: list[Db] = []

    def one() -> Db:
        all.append(Db(urls(), dice=random.Random(1)))
        return all[-1]

    yield one
    for db in all:
        db.close()


def today(folder: Path) -> Path:
    """A copy of our steps."""
    folder.mkdir()
    for file in STEPS.glob("*.py"):
        (folder / file.name).write_text(file.read_text())
    return folder


def next_release(folder: Path) -> Path:
    """Our steps, and two more."""
    today(folder)
    last = [s.name for s in evolve.steps() if s.line == "before"][-1]
    (folder / "before_9001_colour.py").write_text(BEFORE.format(last=last))
    (folder / "after_9002_no_reason.py").write_text(AFTER)
    return folder


def test_both_ways_lead_to_the_same(made: Callable[[], Db]) -> None:
    at_once, by_steps = made(), made()
    evolve.ready(at_once)
    upgrade(by_steps, finish=True)
    assert fingerprint(at_once) == fingerprint(by_steps)
    assert evolve.standing(at_once) == evolve.standing(by_steps)
    assert differences(at_once) == differences(by_steps) == []


def test_the_tables_of_the_code_have_their_steps(tmp_path: Path) -> None:
    """Who changes a table writes a step: python -m kilonova.store.evolve.draft before_WHAT_IT_DOES"""
    assert draft("before_x", today(tmp_path / "steps")) is None


def test_a_draft_is_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[], Db]) -> None:
    folder, more = today(tmp_path / "steps"), sa.MetaData()
    for table in evolve.everything().tables.values():
        table.to_metadata(more)
    more.tables["services"].append_column(sa.Column("colour", sa.String(8)))
    monkeypatch.setattr("kilonova.store.evolve.draft.everything", lambda: more)
    file = draft("before_services_have_a_colour", folder)
    assert file is not None
    text = file.read_text()
    assert "add_column(sa.Column('colour', sa.String(length=8), nullable=True))" in text, text
    db = made()
    evolve.ready(db)
    assert [s.name for s in upgrade(db, finish=False, folder=folder)] == [file.stem]


def test_steps_are_well_named() -> None:
    all = evolve.steps()
    assert [s.number for s in all] == list(range(1, len(all) + 1)) and all[0].line == "before"
    for step in all:
        assert len(step.name) <= 32, "alembic_version has no more room"
        text = (STEPS / f"{step.name}.py").read_text()
        assert f'revision, down_revision = "{step.name}"' in text
        assert "kilonova" not in text.replace("kilonova.store.evolve", ""), (
            "a step knows nothing of the code of its day"
        )


def test_old_code_works_on_while_the_new_one_comes(tmp_path: Path, made: Callable[[], Db]) -> None:
    db, folder = made(), next_release(tmp_path / "steps")
    evolve.ready(db)
    said: list[str] = []
    assert [s.name for s in upgrade(db, finish=False, say=said.append, folder=folder)] == ["before_9001_colour"]
    assert said[0].startswith("kept as it was in ") == db.sqlite

    evolve.ready(db)  # of the old release: it is not disturbed
    now, ids = 1000.0, iter("abc")
    db.run(hosts.beat, "h", hosts.CONDUCTOR, uuid=lambda: next(ids), now=now, born=now, version="1")
    with db.read() as tx:
        assert tx.execute(sa.text("SELECT colour FROM services")).scalar() == "red"
    evolve.ready(db, folder)  # of the new one
    assert [s.name for s in evolve.standing(db, folder).pending] == ["after_9002_no_reason"]

    upgrade(db, finish=True, folder=folder)
    with db.read() as tx:
        assert tx.execute(sa.text("SELECT count(*) FROM services")).scalar() == 1
    evolve.ready(db, folder)
    with pytest.raises(Refused, match="newer release"):
        evolve.ready(db)
    assert differences(db) == [
        "column colour of services is too many",
        "column disabled_reason of services is missing",
        "index services_colour of services is too many",
    ]


def test_nobody_finishes_while_a_process_of_another_release_works(tmp_path: Path, made: Callable[[], Db]) -> None:
    db, folder, now, config = made(), next_release(tmp_path / "steps"), time.time(), Config()
    evolve.ready(db)
    ids = iter(str(n) for n in range(99))

    def say(role: str, version: str, at: float) -> None:
        db.run(hosts.lives, "c1", role, uuid=lambda: next(ids), now=at, born=at, version=version)

    say("api", kilonova.__version__, now)
    say("api", "0.0.1", now - 30)  # it lives beside the new one, and has not been silent for long
    say("console", "0.0.1", now - 3600)  # it is no more
    assert len(at_work(db, config)) == 2
    with pytest.raises(Conflict, match=r"kilonova-api on c1 \(0.0.1\)\."):
        undisturbed(db, config, folder)
    undisturbed(db, config)  # of this release nothing is pending that anybody would mind
    say("api", "0.0.1", now - config.compute.host_down_after_s - 1)  # it was stopped
    undisturbed(db, config, folder)
    say("api", "0.0.2", now + 2 * hosts.DAY_S)
    with db.read() as tx:
        there = [s.binary for s in hosts.services(tx, processes=True)]
    assert there == ["kilonova-console/0.0.1", "kilonova-api/0.0.2"], "who is silent for a day is forgotten"


def test_a_newer_release_does_not_begin_before_its_steps(tmp_path: Path, made: Callable[[], Db]) -> None:
    db = made()
    evolve.ready(db)
    with pytest.raises(Refused, match="kilonova db upgrade"):
        evolve.ready(db, next_release(tmp_path / "steps"))


def test_a_step_that_fails_leaves_nothing(tmp_path: Path, made: Callable[[], Db]) -> None:
    db, folder = made(), next_release(tmp_path / "steps")
    evolve.ready(db)
    file = folder / "before_9001_colour.py"
    file.write_text(file.read_text() + '    op.execute("SELECT nothing FROM nowhere")\n')
    was = fingerprint(db)
    if db.engine.dialect.name not in ("sqlite", "postgresql"):
        pytest.skip("MariaDB commits each change of structure by itself")
    with pytest.raises(sa.exc.DBAPIError):
        upgrade(db, finish=True, folder=folder)
    assert fingerprint(db) == was and evolve.standing(db).pending == []


def test_what_was_there_before_steps_is_stamped_or_refused(tmp_path: Path, made: Callable[[], Db]) -> None:
    db = made()
    evolve.everything().create_all(db.engine)
    assert not evolve.standing(db).empty and evolve.standing(db).have == {}
    evolve.ready(db)
    assert evolve.standing(db).pending == []

    older = made()
    meta.create_all(older.engine)
    with older.tx() as tx:
        tx.execute(sa.text("ALTER TABLE services DROP COLUMN version"))
    with pytest.raises(Refused, match="the table services has no version"):
        evolve.ready(older)


def test_many_who_begin_at_once(urls: Callable[[], str]) -> None:
    url, wrong = urls(), list[BaseException]()

    def begin() -> None:
        db = Db(url)
        try:
            evolve.ready(db)
        except BaseException as e:
            wrong.append(e)
        db.close()

    crew = [threading.Thread(target=begin) for _ in range(4)]
    for t in crew:
        t.start()
    for t in crew:
        t.join(60)
    assert wrong == []
    db = Db(url)
    assert evolve.standing(db).pending == []
    db.close()


@pytest.mark.parametrize(
    ("pending", "now", "finished"),
    [
        ("b1", "b1", "b1"),
        ("b1 a2", "b1", "b1 a2"),
        ("a2", "", "a2"),
        ("a2 b3", "a2 b3", "a2 b3"),  # of two releases ago: nobody needs what it takes away
        ("b1 a2 b3 a4", "b1 a2 b3", "b1 a2 b3 a4"),
        ("", "", ""),
    ],
)
def test_which_steps_are_taken(pending: str, now: str, finished: str) -> None:
    lines: dict[str, Any] = {"b": "before", "a": "after"}
    todo = [Step(int(word[1]), lines[word[0]], word) for word in pending.split()]
    at = Standing(False, {"before": 1}, todo, [])
    assert [s.name for s in chosen(at, finish=False)] == now.split()
    assert [s.name for s in chosen(at, finish=True)] == finished.split()
