"""Claims: check and claim are one statement, so what there is is never given out twice. `TEST_DB` names another database."""

import os
import random
import threading
from collections import Counter

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from kilonova.kit.db import Db, meta
from kilonova.kit.errors import Conflict, NoCapacity, NotFound
from kilonova.model.host import Stock
from kilonova.store import placement
from kilonova.store.placement import ALLOCATIONS, CONSUMERS, INVENTORIES, PROVIDERS

TABLES = [
    t
    for t in meta.sorted_tables
    if t.name.startswith(("resource_", "inventories", "allocations", "consumers", "traits", "seats"))
]
WHO = {"project_id": "p", "user_id": "u"}
SMALL = {"VCPU": 1, "MEMORY_MB": 512, "DISK_GB": 1}


def fresh(url, **engine):
    db = Db(url, **engine)
    meta.drop_all(db.engine, tables=TABLES)
    meta.create_all(db.engine, tables=TABLES)
    return db


@pytest.fixture
def db(tmp_path):
    db = fresh(os.environ.get("TEST_DB") or f"sqlite:///{tmp_path}/cloud.db")
    yield db
    db.close()


def stocks(vcpus=4, ram=4096, disk=10, ratio=2.0):
    return [
        Stock("VCPU", vcpus, max_unit=vcpus, allocation_ratio=ratio),
        Stock("MEMORY_MB", ram, reserved=512),
        Stock("DISK_GB", disk),
    ]


def offered(db, *names, **how):
    with db.tx() as tx:
        for n in names:
            placement.offer(tx, n, n, stocks(**how), [], now=1.0)


def used(db, provider):
    with db.read() as tx:
        return {c: u for c, (_, u) in placement.stocks(tx, [provider])[provider].items()}


def generation(db, provider):
    with db.read() as tx:
        return tx.execute(sa.select(PROVIDERS.c.generation).where(PROVIDERS.c.uuid == provider)).scalar()


def sums_hold(db):
    with db.read() as tx:
        a = ALLOCATIONS.c
        held = {
            (p, c): n
            for p, c, n in tx.execute(
                sa.select(a.provider, a.resource_class, sa.func.sum(a.amount)).group_by(a.provider, a.resource_class)
            )
        }
        for i in tx.execute(sa.select(INVENTORIES)):
            assert i.used == held.pop((i.provider, i.resource_class), 0)
            assert i.used <= (i.total - i.reserved) * i.allocation_ratio
        assert not held
        consumers = set(tx.execute(sa.select(CONSUMERS.c.uuid)).scalars())
        assert consumers == set(tx.execute(sa.select(a.consumer)).scalars())


def test_a_claim_takes_all_classes_and_moves_the_generation(db):
    offered(db, "a")
    before = generation(db, "a")
    db.run(placement.claim, "s1", "a", SMALL, now=2.0, **WHO)
    assert used(db, "a") == SMALL
    assert generation(db, "a") == before + 1
    with db.read() as tx:
        assert placement.allocations_of(tx, "s1") == {"a": SMALL}
        assert placement.usage(tx, "p") == SMALL
        assert placement.usage(tx, "p", "another") == {}


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ({"VCPU": 4}, True),
        ({"VCPU": 5}, False),  # more than one server may have, though the ratio allows 8
        ({"MEMORY_MB": 3584}, True),
        ({"MEMORY_MB": 3585}, False),  # some is reserved
        ({"VCPU": 1, "DISK_GB": 11}, False),
        ({"VCPU": 1, "VGPU": 1}, False),
        ({}, True),
    ],
)
def test_what_fits(db, wanted, fits):
    offered(db, "a")
    if fits:
        db.run(placement.claim, "s1", "a", wanted, now=2.0, **WHO)
    else:
        with pytest.raises(NoCapacity):
            db.run(placement.claim, "s1", "a", wanted, now=2.0, **WHO)
        assert set(used(db, "a").values()) == {0}
        with db.read() as tx:
            assert placement.allocations_of(tx, "s1") == {}


def test_steps_and_least_amounts(db):
    with db.tx() as tx:
        placement.offer(tx, "a", "a", [Stock("CUSTOM_X", 100, min_unit=4, step_size=2)], [], now=1.0)
    for n in (2, 5):
        with pytest.raises(NoCapacity):
            db.run(placement.claim, "s", "a", {"CUSTOM_X": n}, now=1.0, **WHO)
    db.run(placement.claim, "s", "a", {"CUSTOM_X": 6}, now=1.0, **WHO)


def test_nobody_knows_the_provider(db):
    with pytest.raises(NotFound):
        db.run(placement.claim, "s1", "nowhere", SMALL, now=2.0, **WHO)


def test_a_release_can_be_said_twice(db):
    offered(db, "a", "b")
    for p in ("a", "b"):
        db.run(placement.claim, "s1", p, SMALL, now=2.0, **WHO)
    assert db.run(placement.release, "s1", "a", now=3.0)
    assert not db.run(placement.release, "s1", "a", now=3.0)
    assert used(db, "a") == dict.fromkeys(SMALL, 0)
    assert used(db, "b") == SMALL
    assert db.run(placement.release, "s1", now=3.0)
    sums_hold(db)


def test_claiming_more_adds_to_what_is_held(db):
    offered(db, "a")
    db.run(placement.claim, "s1", "a", {"VCPU": 1}, now=2.0, **WHO)
    db.run(placement.claim, "s1", "a", {"VCPU": 2, "DISK_GB": 1}, now=2.0, **WHO)
    assert used(db, "a") == {"VCPU": 3, "MEMORY_MB": 0, "DISK_GB": 1}
    sums_hold(db)


def test_another_consumer_takes_over(db):
    offered(db, "a")
    db.run(placement.claim, "s1", "a", SMALL, now=2.0, **WHO)
    db.run(placement.move, "s1", "m1", now=3.0)
    with db.read() as tx:
        assert placement.allocations_of(tx, "s1") == {}
        assert placement.allocations_of(tx, "m1") == {"a": SMALL}
    sums_hold(db)


def test_what_is_offered_can_change_under_what_is_held(db):
    offered(db, "a")
    db.run(placement.claim, "s1", "a", SMALL, now=2.0, **WHO)
    with db.tx() as tx:
        assert not placement.offer(tx, "a", "a", stocks(), [], now=3.0)
        assert placement.offer(tx, "a", "a", [*stocks(vcpus=8)[:1], Stock("VGPU", 2)], ["HW_X"], now=3.0)
        assert placement.traits(tx) == {"a": {"HW_X"}}
    assert used(db, "a") == SMALL | {"VGPU": 0}
    with pytest.raises(NoCapacity):  # it is not offered any longer, though somebody has some
        db.run(placement.claim, "s2", "a", {"DISK_GB": 1}, now=2.0, **WHO)
    with pytest.raises(Conflict):
        db.run(placement.withdraw, "a")
    db.run(placement.release, "s1", now=3.0)
    db.run(placement.withdraw, "a")


@pytest.mark.parametrize("seed", [1, 2])
def test_many_at_once_never_take_more_than_there_is(db, seed):
    """16 threads claim and release on a small cloud; sums are those of the rows, and nothing is given out twice."""
    offered(db, "a", "b", "c", vcpus=4, ratio=1.5)
    told, wrong = Counter(), []

    def one(me):
        dice = random.Random(f"{seed}/{me}")
        mine = []
        for i in range(25):
            try:
                if mine and dice.random() < 0.4:
                    told["released"] += db.run(placement.release, mine.pop(dice.randrange(len(mine))), now=1.0)
                else:
                    name = f"{me}-{i}"
                    db.run(
                        placement.claim,
                        name,
                        dice.choice("abc"),
                        {"VCPU": dice.choice([1, 2]), "DISK_GB": 1},
                        now=1.0,
                        **WHO,
                    )
                    mine.append(name)
                    told["claimed"] += 1
            except NoCapacity:
                told["refused"] += 1
            except Exception as e:
                wrong.append(e)

    crew = [threading.Thread(target=one, args=(i,)) for i in range(16)]
    for t in crew:
        t.start()
    for t in crew:
        t.join()
    assert not wrong
    assert min(told["claimed"], told["released"], told["refused"]) > 10
    sums_hold(db)


def test_two_who_release_the_same_give_it_back_once(db):
    offered(db, "a")
    for i in range(10):
        db.run(placement.claim, f"s{i % 2}", "a", {"VCPU": 1} if i < 2 else {}, now=1.0, **WHO)
    crew = [threading.Thread(target=lambda: db.run(placement.release, "s0", now=1.0)) for _ in range(8)]
    for t in crew:
        t.start()
    for t in crew:
        t.join()
    assert used(db, "a")["VCPU"] == 1
    sums_hold(db)


@given(st.lists(st.tuples(st.sampled_from(["claim", "release"]), st.integers(0, 3), st.integers(1, 3)), max_size=30))
def test_any_order_of_claims_and_releases(story):
    db = fresh("sqlite://", poolclass=sa.StaticPool, connect_args={"check_same_thread": False})
    offered(db, "a", vcpus=3, ratio=1.0)
    held = Counter()
    for what, who, n in story:
        if what == "claim":
            fits = sum(held.values()) + n <= 3
            try:
                db.run(placement.claim, f"s{who}", "a", {"VCPU": n}, now=1.0, **WHO)
                assert fits
                held[who] += n
            except NoCapacity:
                assert not fits
        else:
            assert db.run(placement.release, f"s{who}", now=1.0) == bool(held.pop(who, 0))
    assert used(db, "a")["VCPU"] == sum(held.values())
    db.close()
