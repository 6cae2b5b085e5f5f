"""The simulator's database tells what PostgreSQL and MariaDB can tell at READ COMMITTED, and nothing else."""

from collections.abc import Callable, Iterator
from typing import Any

import greenlet
import pytest
import sqlalchemy as sa

from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import NoCapacity
from kilonova.model.host import Stock
from kilonova.sim.database import Memory
from kilonova.store import placement, quotas, volumes

T = quotas.LOCKS
ONE = sa.select(T.c.n).where(T.c.project_id == "p")


class Turns:
    """Threads that have their turns where a transaction lets others in, in the order in which they came."""

    def __init__(self, db: Memory) -> None:
        self.ready: list[Callable[[], Any]] = []
        self.hub = greenlet.getcurrent()
        db.between, db.wait = self.let_in, self.until

    def let_in(self) -> None:
        if (me := greenlet.getcurrent()) is not self.hub:
            self.ready.append(me.switch)
            self.hub.switch()

    def until(self, wakes: list[Callable[[], None]]) -> bool:
        me = greenlet.getcurrent()
        wakes.append(lambda: self.ready.append(me.switch))
        self.hub.switch()
        return True

    def play(self, *threads: Callable[[], Any]) -> None:
        self.ready += [greenlet.greenlet(t, parent=self.hub).switch for t in threads]
        while self.ready:
            self.ready.pop(0)()


@pytest.fixture
def db() -> Iterator[Memory]:
    db = Memory()
    meta.create_all(db.engine)
    db.watch()
    with db.tx() as tx:
        tx.execute(sa.insert(T), [{"project_id": p, "n": 0} for p in ("p", "q")])
    yield db
    db.close()


def n(db: Memory, project: str = "p") -> int:
    with db.read() as tx:
        return int(tx.execute(sa.select(T.c.n).where(T.c.project_id == project)).scalar_one())


def bump(tx: Tx, project: str = "p") -> int:
    return tx.execute(sa.update(T).where(T.c.project_id == project).values(n=T.c.n + 1)).rowcount


def test_what_was_read_and_then_written_is_lost(db: Memory) -> None:
    def careless() -> None:
        with db.tx(open=True) as tx:
            seen = tx.execute(ONE).scalar_one()
            tx.execute(sa.update(T).where(T.c.project_id == "p").values(n=seen + 1))

    Turns(db).play(careless, careless)
    assert n(db) == 1


def test_what_is_raised_in_one_statement_is_not_lost(db: Memory) -> None:
    def careful() -> None:
        with db.tx(open=True) as tx:
            tx.execute(ONE)
            bump(tx)
            tx.execute(ONE)

    Turns(db).play(careful, careful, careful)
    assert n(db) == 3
    assert db.waits > 0


def test_what_is_compared_and_taken_is_taken_once(db: Memory) -> None:
    took = []

    def take() -> None:
        with db.tx(open=True) as tx:
            tx.execute(ONE)
            took.append(tx.execute(sa.update(T).where(T.c.project_id == "p", T.c.n == 0).values(n=1)).rowcount)
            tx.execute(ONE)

    Turns(db).play(take, take)
    assert sorted(took) == [0, 1]


def test_each_statement_sees_what_is_committed_by_then_and_no_more(db: Memory) -> None:
    seen = []

    def look() -> None:
        with db.tx(open=True) as tx:
            seen.extend(tx.execute(ONE).scalar_one() for _ in range(4))

    def write() -> None:
        with db.tx(open=True) as tx:
            bump(tx)
            seen.append(("mine", tx.execute(ONE).scalar_one()))

    Turns(db).play(look, write)
    assert seen[0] == 0 and seen[-1] == 1 and ("mine", 1) in seen
    mine = seen.index(("mine", 1))
    assert 1 not in seen[:mine], "nobody sees what is not committed"


def test_a_row_that_was_read_for_update_is_its_readers(db: Memory) -> None:
    order = []
    held = sa.select(T).where(T.c.project_id == "p").with_for_update()

    def one(name: str) -> None:
        with db.tx(open=True) as tx:
            seen = tx.execute(held).one().n
            order.append((name, seen))
            tx.execute(sa.update(T).where(T.c.project_id == "p").values(n=seen + 1))

    Turns(db).play(lambda: one("a"), lambda: one("b"))
    assert order == [("a", 0), ("b", 1)] and n(db) == 2


def test_who_would_wait_for_himself_is_refused_and_begins_anew(db: Memory) -> None:
    def both(first: str, second: str) -> None:
        def work(tx: Tx) -> None:
            bump(tx, first)
            bump(tx, second)

        for _ in range(3):
            try:
                with db.tx(open=True) as tx:
                    return work(tx)
            except sa.exc.OperationalError:
                pass
        raise AssertionError("it was refused each time")

    Turns(db).play(lambda: both("p", "q"), lambda: both("q", "p"))
    assert (n(db), n(db, "q"), db.refusals) == (2, 2, 1)


def test_what_is_unique_is_there_once(db: Memory) -> None:
    came = []

    def add() -> None:
        try:
            with db.tx(open=True) as tx:
                tx.execute(ONE)
                tx.execute(sa.insert(T), {"project_id": "new", "n": 0})
                tx.execute(ONE)
            came.append(True)
        except sa.exc.IntegrityError:
            came.append(False)

    Turns(db).play(add, add)
    assert sorted(came) == [False, True]


def test_who_is_taken_back_leaves_nothing_and_others_go_on(db: Memory) -> None:
    def fails() -> None:
        with pytest.raises(ZeroDivisionError), db.tx(open=True) as tx:
            bump(tx)
            tx.execute(ONE)
            raise ZeroDivisionError

    def works() -> None:
        with db.tx(open=True) as tx:
            bump(tx)

    Turns(db).play(fails, works)
    assert n(db) == 1


def test_a_quotas_lock_is_taken_here_too(db: Memory) -> None:
    inside = []

    def ask(name: str) -> None:
        with db.tx(open=True) as tx:
            quotas.lock(tx, "p")
            inside.append(name)
            tx.execute(ONE)
            inside.append(name)

    Turns(db).play(lambda: ask("a"), lambda: ask("b"))
    assert inside == ["a", "a", "b", "b"]


def test_a_locked_volume_is_one_of_those_that_lock(db: Memory) -> None:
    with db.tx() as tx:
        volumes.lock(tx, "none")
        assert "FOR UPDATE" not in str(volumes._LOCKED.known) and db.sent[-1][1].endswith("/*locks volumes*/")


# ---- what of ours would be lost between two looks


@pytest.fixture
def host(db: Memory) -> Memory:
    """With a provider "h" that has room for one, and a volume "v"."""
    with db.tx() as tx:
        placement.offer(tx, "h", "h", [Stock("VCPU", 1)], [], now=1.0)
        who = {"project_id": "p", "user_id": "u"}
        volumes.add(
            tx, volumes.Volume(id="v", created_at=1.0, updated_at=1.0, size_gb=1, type_id="t", zone="nova", **who)
        )
    return db


def used(db: Memory) -> float:
    with db.read() as tx:
        return float(tx.execute(sa.select(placement.INVENTORIES.c.used)).scalar_one())


def claimed(db: Memory, consumer: str) -> bool:
    try:
        with db.tx(open=True) as tx:
            placement.claim(tx, consumer, "h", {"VCPU": 1}, now=2.0, project_id="p", user_id="u")
        return True
    except NoCapacity:
        return False


def test_the_last_room_is_taken_once(host: Memory) -> None:
    got = []
    Turns(host).play(*[lambda who=who: got.append(claimed(host, who)) for who in ("a", "b", "c")])
    assert (sorted(got), used(host)) == ([False, False, True], 1)


def test_what_two_give_back_is_given_back_once(host: Memory) -> None:
    assert claimed(host, "a")
    gave = []

    def give() -> None:
        with host.tx(open=True) as tx:
            gave.append(placement.release(tx, "a", now=3.0))

    Turns(host).play(give, give)
    assert (sorted(gave), used(host)) == ([False, True], 0)


def test_of_two_who_look_at_a_volume_and_take_it_the_second_sees_what_the_first_made_of_it(host: Memory) -> None:
    saw = []

    def take() -> None:
        with host.tx(open=True) as tx:
            found = volumes.lock(tx, "v")
            assert found is not None
            saw.append(found.status)
            volumes.change(tx, volumes.Volume, "v", status="reserved")

    Turns(host).play(take, take)
    assert saw == ["creating", "reserved"]
