"""What is sent together, or later, is as if it had been sent at once: on any database, and by `kit/postgres.py` above all."""

import os
import threading
from typing import Any

import pytest
import sqlalchemy as sa

from kilonova.kit.db import Db
from kilonova.kit.errors import Invalid
from kilonova.kit.ready import ready

META = sa.MetaData()
THINGS = sa.Table(
    "wire_things",
    META,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("n", sa.Integer, nullable=False),
    sa.Column("at", sa.Double),
    sa.Column("open", sa.Boolean, nullable=False),
    sa.Column("text", sa.Text),
    sa.Column("big", sa.BigInteger),
)
T, _b = THINGS.c, sa.bindparam
ADD, LATER = ready(sa.insert(THINGS)), ready(sa.insert(THINGS), later=True)
ONE = ready(sa.select(THINGS).where(T.id == _b("the_id")))
GROW = ready(sa.update(THINGS).where(T.id == _b("the_id")).values(n=T.n + _b("by")))
SAVE, BACK = ready(sa.text("SAVEPOINT step")), ready(sa.text("ROLLBACK TO SAVEPOINT step"))
COUNT = sa.select(sa.func.count()).select_from(THINGS)


def row(id: object, **other: Any) -> dict[str, Any]:
    return {"id": str(id), "n": 1, "at": 1.5, "open": True, "text": "it's 100%", "big": 2**40} | other


@pytest.fixture
def db(tmp_path: Any) -> Any:
    db = Db(os.environ.get("TEST_DB") or f"sqlite:///{tmp_path}/wire.db", threads=3)
    META.drop_all(db.engine)
    META.create_all(db.engine)
    yield db
    db.close()


def n(db: Db, id: object) -> int:
    with db.read() as tx:
        return int(tx.execute(ONE, {"the_id": str(id)}).one().n)


def count(db: Db) -> int:
    with db.read() as tx:
        return int(tx.execute(COUNT).scalar() or 0)


def test_values_come_back_as_they_were(db: Db) -> None:
    with db.tx() as tx:
        tx.execute(ADD, row("a"))
        tx.execute(ADD, row("b", at=2, open=False, text=None, big=-1))
    with db.read() as tx:
        assert tuple(tx.execute(ONE, {"the_id": "a"}).one()) == ("a", 1, 1.5, True, "it's 100%", 2**40)
        assert tuple(tx.execute(ONE, {"the_id": "b"}).one()) == ("b", 1, 2.0, False, None, -1)
        assert tx.execute(ready(sa.select(T.id).where(T.text.like("it%100%")).limit(2))).scalars() == ["a"]
        assert tx.execute(ONE, {"the_id": "c"}).first() is None


@pytest.mark.parametrize("many", [2, 8, 9, 20, 150])
def test_as_many_rows_as_there_are(db: Db, many: int) -> None:
    with db.tx() as tx:
        tx.execute(ADD, [row(i, n=i) for i in range(many)])
        tx.execute(LATER, [row(f"later-{i}", n=i) for i in range(many)])
        tx.execute(GROW, [{"the_id": str(i), "by": i} for i in range(many)])
    assert count(db) == 2 * many and n(db, many - 1) == 2 * (many - 1) and n(db, f"later-{many - 1}") == many - 1


def test_what_is_sent_later_is_there_for_what_comes_after(db: Db) -> None:
    with db.tx() as tx:
        tx.execute(LATER, row(1))
        assert tx.execute(ONE, {"the_id": "1"}).one().n == 1  # ready as well
        tx.execute(LATER, row(2))
        assert tx.execute(COUNT).scalar() == 2  # by SQLAlchemy's own way
        tx.execute(LATER, row(3))
        with tx.begin_nested():
            assert tx.execute(GROW, {"the_id": "3", "by": 1}).rowcount == 1
        tx.execute(LATER, row(4))  # with the end
    assert count(db) == 4 and n(db, 3) == 2


def test_a_savepoint_holds_what_was_before_it(db: Db) -> None:
    with db.tx() as tx:
        tx.execute(LATER, row(1))
        tx.execute(SAVE)
        tx.execute(GROW, {"the_id": "1", "by": 5})
        tx.execute(LATER, row(2))
        tx.execute(BACK)
        for _ in range(6):  # drivers that prepare statements forget them with what is taken back
            with pytest.raises(sa.exc.IntegrityError), tx.begin_nested():
                tx.execute(sa.insert(THINGS), row(1))
        tx.execute(GROW, {"the_id": "1", "by": 1})
    assert count(db) == 1 and n(db, 1) == 2


def test_what_is_refused_changes_nothing_and_the_next_goes_on(db: Db) -> None:
    db.run(lambda tx: tx.execute(ADD, row(1)))
    for add in (ADD, LATER):
        with pytest.raises(sa.exc.IntegrityError):
            db.run(lambda tx, add=add: (tx.execute(ADD, row(2)), tx.execute(add, row(1))))
        assert count(db) == 1
    with pytest.raises(KeyError), db.tx() as tx:
        tx.execute(GROW, {"the_id": "1", "by": 5})
        tx.execute(LATER, row(3))
        raise KeyError
    with db.tx():
        pass  # nothing was asked for
    assert count(db) == 1 and n(db, 1) == 1


@pytest.mark.parametrize("ill", [{"text": "\ud800"}, {"big": 2**80}])
def test_what_no_column_holds_is_its_givers_fault(db: Db, ill: dict[str, Any]) -> None:
    with pytest.raises(Invalid), db.tx() as tx:
        tx.execute(ADD, row(1, **ill))
    assert count(db) == 0


def test_threads_that_wait_for_each_others_rows_go_on(db: Db) -> None:
    """In one process: who waits for the database must not keep the others from going on."""
    db.run(lambda tx: tx.execute(ADD, [row("a"), row("b")]))
    met = threading.Barrier(2, timeout=20)

    def both(one: str, other: str) -> None:
        first = not db.sqlite  # SQLite has one writer, and the second does not begin

        def work(tx: Any) -> None:
            nonlocal first
            tx.execute(GROW, {"the_id": one, "by": 1})
            if first:
                first = False
                met.wait()
            tx.execute(LATER, row(f"of-{one}"))
            tx.execute(GROW, {"the_id": other, "by": 1})

        db.run(work)

    crew = [threading.Thread(target=both, args=p, daemon=True) for p in (("a", "b"), ("b", "a"))]
    for t in crew:
        t.start()
    for t in crew:
        t.join(30)
    assert not any(t.is_alive() for t in crew)
    assert (n(db, "a"), n(db, "b"), count(db)) == (3, 3, 4)
