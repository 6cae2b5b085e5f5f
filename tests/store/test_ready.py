"""A statement that is sent often says the same as SQLAlchemy's own way, on any database."""

import os
from typing import Any

import pytest
import sqlalchemy as sa

from kilonova.kit.db import Db
from kilonova.kit.errors import Invalid
from kilonova.kit.ready import Ready, ready
from kilonova.store.networks import Json

META = sa.MetaData()
THINGS = sa.Table(
    "ready_things",
    META,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(20), unique=True, nullable=False),
    sa.Column("open", sa.Boolean, nullable=False),
    sa.Column("size", sa.Double),
    sa.Column("more", Json(), nullable=False),
)
T = THINGS.c
ADD = ready(sa.insert(THINGS))
BY_NAME = ready(sa.select(THINGS).where(T.name == sa.bindparam("the_name")))
OPEN = ready(sa.select(T.id, T.name).where(T.open.is_(True)).order_by(T.id))
CHANGE = ready(sa.update(THINGS).where(T.name == sa.bindparam("the_name")))
GROW = ready(
    sa.update(THINGS).where(T.name == sa.bindparam("the_name"), T.size < 100).values(size=T.size + sa.bindparam("by"))
)


@pytest.fixture
def db(tmp_path: Any) -> Any:
    db = Db(os.environ.get("TEST_DB") or f"sqlite:///{tmp_path}/ready.db")
    META.drop_all(db.engine)
    META.create_all(db.engine)
    rows = [{"id": i, "name": f"n{i}", "open": i % 2 == 0, "size": i / 2, "more": {"i": [i]}} for i in range(4)]
    with db.tx() as tx:
        assert tx.execute(ADD, rows).rowcount == 4
    yield db
    META.drop_all(db.engine)
    db.close()


def test_rows_are_those_of_sqlalchemy(db: Db) -> None:
    assert isinstance(BY_NAME, Ready)
    with db.read() as tx:
        for name in ("n0", "n1", "nobody"):
            said, plain = tx.execute(BY_NAME, {"the_name": name}), tx.execute(BY_NAME.statement, {"the_name": name})
            ours, theirs = said.all(), plain.all()
            assert [tuple(r) for r in ours] == [tuple(r) for r in theirs]
            assert [dict(r._mapping) for r in ours] == [dict(r._mapping) for r in theirs]
        one = tx.execute(BY_NAME, {"the_name": "n2"}).first()
        assert (one.id, one.open, one.size, one.more) == (2, True, 1.0, {"i": [2]}) and one.open is True
        assert [tuple(r) for r in tx.execute(OPEN)] == [(0, "n0"), (2, "n2")]
        assert tx.execute(OPEN).scalars().all() == [0, 2] and tx.execute(OPEN).scalar() == 0
        assert (
            tx.execute(BY_NAME, {"the_name": "x"}).first() is None
            and tx.execute(BY_NAME, {"the_name": "x"}).scalar() is None
        )
        with pytest.raises(sa.exc.NoResultFound):
            tx.execute(BY_NAME, {"the_name": "x"}).one()


def test_what_is_set_is_what_was_said(db: Db) -> None:
    with db.tx() as tx:
        assert tx.execute(CHANGE, {"the_name": "n1", "open": True}).rowcount == 1
        assert tx.execute(CHANGE, {"the_name": "n1", "size": None, "more": {}}).rowcount == 1
        assert tx.execute(CHANGE, {"the_name": "nobody", "open": True}).rowcount == 0
        assert tx.execute(GROW, {"the_name": "n2", "by": 5}).rowcount == 1
    with db.read() as tx:
        assert tuple(tx.execute(BY_NAME, {"the_name": "n1"}).first()) == (1, "n1", True, None, {})
        assert tx.execute(BY_NAME, {"the_name": "n2"}).first().size == 6.0


def test_a_value_that_was_forgotten_is_not_null(db: Db) -> None:
    with pytest.raises(KeyError), db.read() as tx:
        tx.execute(BY_NAME, {"name": "n1"})


def test_the_databases_troubles_are_called_what_sqlalchemy_calls_them(db: Db) -> None:
    row = {"id": 9, "name": "n1", "open": True, "size": 0, "more": {"password": "hidden"}}
    with pytest.raises(sa.exc.IntegrityError) as caught, db.tx() as tx:
        tx.execute(ADD, row)
    assert "hidden" not in str(caught.value), "what was to be written may be a secret"
    with pytest.raises(Invalid), db.tx() as tx:
        tx.execute(ADD, row | {"name": "n9", "id": 2**70})
    with db.read() as tx:
        assert tx.execute(OPEN).scalars() == [0, 2]


def test_what_is_another_text_each_time_is_refused(db: Db) -> None:
    many = ready(sa.select(T.id).where(T.id.in_(sa.bindparam("ids", expanding=True))))
    with pytest.raises(AssertionError), db.read() as tx:
        tx.execute(many, {"ids": [1, 2]})


def test_what_is_derived_is_a_plain_statement(db: Db) -> None:
    with db.read() as tx:
        assert tx.execute(OPEN.where(T.id > 0)).all() == [(2, "n2")]


def test_an_error_in_the_middle_takes_back_all_and_the_connection_goes_on(db: Db) -> None:
    with pytest.raises(ZeroDivisionError), db.tx() as tx:
        tx.execute(CHANGE, {"the_name": "n1", "open": True})
        raise ZeroDivisionError
    with db.tx() as tx:
        assert tx.execute(OPEN).scalars() == [0, 2]
