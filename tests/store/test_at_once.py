"""Many at the same time, by real threads, and nothing is given out twice. `TEST_DB` names another database than SQLite."""

import os
import random
import threading
from collections import Counter

import msgspec
import pytest
import sqlalchemy as sa

from kilonova.compute.report import parted, stocks
from kilonova.contracts.conductor import Report
from kilonova.contracts.scheduler import Choose
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.db import Db, meta
from kilonova.kit.errors import NoCapacity
from kilonova.model.ask import Ask, ask
from kilonova.model.candidates import SHARES
from kilonova.model.flavor import Flavor
from kilonova.model.host import Cell, HostDevice, HostFacts, Stock
from kilonova.model.options import Compute
from kilonova.model.server import Server
from kilonova.scheduler.select import Scheduler
from kilonova.store import hosts, placement, providers, seats
from tests.cloud.placements import Placement

NAMES = ("resource_", "inventories", "allocations", "consumers", "traits", "seats", "marks", "services", "nodes",
         "aggregate", "servers", "server_groups")  # fmt: skip
TABLES = [t for t in meta.sorted_tables if t.name.startswith(NAMES)]
FACTS = HostFacts(8, 8192, 100, 90, "QEMU", 7_002_022, "")
WHO = {"project_id": "p", "user_id": "u"}


@pytest.fixture
def db(tmp_path):
    db = Db(os.environ.get("TEST_DB") or f"sqlite:///{tmp_path}/cloud.db", threads=24)
    meta.drop_all(db.engine, tables=TABLES)
    meta.create_all(db.engine, tables=TABLES)
    yield db
    db.close()


def learnt(tx, name, compute, ids, **facts):
    """A host that says what it has; its provider."""
    now = WallClock().now()
    said = parted(msgspec.structs.replace(FACTS, hypervisor_hostname=name, **facts), compute)
    hosts.learn(tx, Report(name, now, 1.0, [], facts=said, stocks=stocks(said, compute)), uuid=ids.uuid, now=now)
    return hosts.nodes(tx, host=name)[0].uuid


def crew(n, do):
    """`do(me, start)` by so many threads that begin together. Whatever one raises is raised here."""
    wrong, start = [], threading.Barrier(n)

    def one(me):
        try:
            start.wait()
            do(me)
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not wrong, wrong[:3]


def over_committed(db):
    """Classes of which more is held than there is, or than the rows say."""
    a, i = placement.ALLOCATIONS.c, placement.INVENTORIES.c
    with db.read() as tx:
        rows = tx.execute(
            sa.select(a.provider, a.resource_class, sa.func.sum(a.amount)).group_by(a.provider, a.resource_class)
        )
        sums = {(p, c): int(n) for p, c, n in rows}
        return [
            (r.provider, r.resource_class, r.used)
            for r in tx.execute(sa.select(*i))
            if r.used != sums.get((r.provider, r.resource_class), 0)
            or r.used > (r.total - r.reserved) * r.allocation_ratio
        ]


def test_64_schedulers_never_give_out_more_than_there_is(db):
    """Each sees its own columns; what they choose is claimed, and the claim decides. 64 threads, three small hosts."""
    ids, compute = Ids(), Compute(reserved_memory_mb=0, cpu_allocation_ratio=1.5, memory_allocation_ratio=1.0)
    with db.tx() as tx:
        for name in "abc":
            learnt(tx, name, compute, ids)
    fits = 3 * 12  # eight CPUs, one and a half times; memory for 16 of 512 MB
    got, refused = [], []

    def one(me):
        scheduler = Scheduler(db, clock=WallClock(), dice=random.Random(me))
        wish = Ask(amounts={"VCPU": 1, "MEMORY_MB": 512}, project_id="p")
        for turn in range(8):
            places = scheduler.choose(Choose(server=f"s{me}", ask=wish, fresh=turn > 0)).places
            if not places:
                break
            for p in places:
                try:
                    db.run(placement.claim, f"s{me}", p.provider, wish.amounts, now=WallClock().now(), new=True, **WHO)
                    got.append(p.host)
                    return
                except NoCapacity:
                    continue
        refused.append(me)

    crew(64, one)
    assert len(got) + len(refused) == 64 and over_committed(db) == []
    with db.read() as tx:
        held = tx.execute(sa.select(sa.func.count()).select_from(placement.CONSUMERS)).scalar()
    assert held == len(got) == fits  # none too many; and none too few, for who was refused had looked again


def test_what_hosts_share_is_not_given_out_twice(db):
    """24 schedulers, each for three servers, on four hosts with two pools; some servers go again. What is left fits."""
    ids, compute = Ids(), Compute(reserved_memory_mb=0)
    groups = [str(ids.uuid()) for _ in range(2)]
    with db.tx() as tx:
        for i, name in enumerate("abcd"):
            here = learnt(tx, name, compute, ids, disk_gb=0)
            providers.set_aggregates(tx, here, [groups[i // 2]] if name != "d" else groups)
        for i, group in enumerate(groups):
            placement.offer(tx, pool := ids.uuid(), f"pool{i}", [Stock("DISK_GB", 95)], {SHARES}, now=1.0)
            providers.set_aggregates(tx, pool, [group])
    flavor = Flavor("1", "f", 1, 64, 10)
    left, refused = [], []

    def one(me):
        dice, scheduler = random.Random(me), Scheduler(db, clock=WallClock(), dice=random.Random(me))
        for i in range(3):
            s = Server(f"{me}-{i}", "p", "u", "s", "s", flavor)
            placed = False
            for turn in range(8):
                for p in scheduler.choose(Choose(server=s.id, ask=ask(s), fresh=turn > 0)).places:
                    try:
                        db.run(seats.claim, s, p.provider, now=WallClock().now(), new=True, shared=p.shared)
                    except NoCapacity:
                        continue
                    placed = True
                    break
                if placed:
                    break
            if not placed:
                refused.append(s.id)
            elif dice.random() < 0.5:
                assert db.run(placement.release, s.id, now=WallClock().now())
            else:
                left.append(s.id)

    crew(24, one)
    assert over_committed(db) == []
    with db.read() as tx:
        held = {c: placement.allocations_of(tx, c) for c in tx.execute(sa.select(placement.CONSUMERS.c.uuid)).scalars()}
    assert set(held) == set(left) and 0 < len(left) <= 18 and refused
    assert all(sorted(c for of in h.values() for c in of) == ["DISK_GB", "MEMORY_MB", "VCPU"] for h in held.values())


def test_no_cpu_page_or_device_is_given_twice(db):
    """Who sits down, who leaves, and the host that says meanwhile what it has: on two hosts, by 16 threads."""
    ids, compute = Ids(), Compute(reserved_memory_mb=0, cpu_dedicated_set="0-7")
    has = {
        "cells": [Cell(4, 4096, {2048: 64}, [0, 1, 2, 3]), Cell(4, 4096, {2048: 64}, [4, 5, 6, 7])],
        "devices": [HostDevice("0000:81:00.0", "CUSTOM_NIC", 3, functions=[f"0000:81:00.{n}" for n in "123"])],
    }
    with db.tx() as tx:
        of = {name: learnt(tx, name, compute, ids, **has) for name in "ab"}
    specs = {"hw:cpu_policy": "dedicated", "hw:mem_page_size": "2MB"}
    pinned = Flavor("1", "f", 2, 64, 1, extra_specs=specs)
    with_nic = msgspec.structs.replace(pinned, vcpus=1, extra_specs=specs | {"resources:CUSTOM_NIC": "1"})
    told = list[str]()

    def one(me):
        dice, mine = random.Random(me), []
        for i in range(6):
            if me < 2:
                db.run(learnt, "ab"[me], compute, ids, **(has | {"memory_mb": 8192 + i}))
                continue
            if mine and dice.random() < 0.4:
                assert db.run(placement.release, mine.pop(), now=1.0)
                told.append("left")
                continue
            s = Server(f"{me}-{i}", "p", "u", "s", "s", dice.choice([pinned, with_nic]))
            try:
                db.run(seats.claim, s, of[dice.choice("ab")], now=1.0, new=True)
                mine.append(s.id)
                told.append("sat")
            except NoCapacity:
                told.append("refused")

    crew(16, one)
    n = Counter(told)
    assert min(n["sat"], n["left"], n["refused"]) > 0 and over_committed(db) == []
    with db.read() as tx:
        sat = seats.of_providers(tx)
        holders = set(tx.execute(sa.select(placement.CONSUMERS.c.uuid)).scalars())
    assert {c for there in sat.values() for c in there} == holders and len(holders) == n["sat"] - n["left"]
    for there in sat.values():
        cpus = [cpu for s in there.values() for cpu in s.cpus]
        nics = [t.address for s in there.values() for t in s.devices]
        pages = Counter()
        for s in there.values():
            for c in s.cells:
                pages[c.host] += c.memory_mb // 2
        assert len(cpus) == len(set(cpus)) and len(nics) == len(set(nics)) and max(pages.values()) <= 64


def test_the_scheduler_and_the_claim_mean_the_same(db):
    """What is chosen for a guest with a part of its own can be claimed, until there is nothing left; and then none is chosen."""
    ids, compute = Ids(), Compute(reserved_memory_mb=0, cpu_dedicated_set="0-7")
    with db.tx() as tx:
        learnt(tx, "a", compute, ids, cells=[Cell(4, 4096, ids=[0, 1, 2, 3]), Cell(4, 4096, ids=[4, 5, 6, 7])])
    scheduler = Scheduler(db, clock=WallClock(), dice=random.Random(1))
    for i, fits in enumerate((3, 3, 0)):
        s = Server(f"s{i}", "p", "u", "s", "s", Flavor("1", "f", 3, 64, 1, extra_specs={"hw:cpu_policy": "dedicated"}))
        found = scheduler.choose(Choose(server=s.id, ask=ask(s), most=1, fresh=True))
        assert bool(found.places) == bool(fits)
        if fits:
            assert len(db.run(seats.claim, s, found.places[0].provider, now=1.0).cpus) == 3
    assert found.why == {"room": 1}


def test_clients_of_the_placement_api_at_once(db):
    """16 threads write allocations over two providers and a child, with generations: what is refused changes nothing."""
    p = Placement(db=db)
    one, two = p.provider("one", VCPU=8), p.provider("two", VCPU=8)
    card = p.provider("card", one, CUSTOM_CARD=3) if p.say("PUT", "/resource_classes/CUSTOM_CARD") is None else ""
    told = list[int]()

    def client(me):
        dice = random.Random(me)
        consumer = str(Ids(dice).uuid())
        held = None
        for _ in range(6):
            if held is not None and dice.random() < 0.4:
                status = p.ask("DELETE", f"/allocations/{consumer}").status
                assert status == 204, status
                held = None
                continue
            wish = dice.choice([{one: {"VCPU": 2}}, {two: {"VCPU": 3}}, {one: {"VCPU": 1}, card: {"CUSTOM_CARD": 1}}])
            generation = None if held is None else p.say("GET", f"/allocations/{consumer}")["consumer_generation"]
            body = {
                "allocations": {at: {"resources": r} for at, r in wish.items()},
                "project_id": "p", "user_id": "u", "consumer_type": "INSTANCE", "consumer_generation": generation,
            }  # fmt: skip
            status = p.ask("PUT", f"/allocations/{consumer}", body).status
            told.append(status)
            assert status in (204, 409), status
            held = wish if status == 204 else held

    crew(16, client)
    assert set(told) == {204, 409} and over_committed(db) == []
