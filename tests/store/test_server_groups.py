"""Members of a strict group that are claimed for at the same time, by threads: the policy holds. `TEST_DB` names another database."""

import os
import threading

import pytest

from kilonova.kit.db import Db, meta
from kilonova.kit.errors import NoCapacity
from kilonova.model.flavor import Flavor
from kilonova.model.host import Stock
from kilonova.model.options import Quota
from kilonova.model.server import Server
from kilonova.model.server_group import ServerGroup, admits
from kilonova.store import placement, server_groups, servers

TABLES = [
    t
    for t in meta.sorted_tables
    if t.name.startswith(
        (
            "resource_",
            "inventories",
            "allocations",
            "consumers",
            "traits",
            "servers",
            "server_groups",
            "seats",
            "quota",
            "migrations",
        )
    )
]
FLAVOR, HOSTS = Flavor("f", "f", 1, 512, 1), ("a", "b", "c")


@pytest.fixture
def db(tmp_path):
    db = Db(os.environ.get("TEST_DB") or f"sqlite:///{tmp_path}/cloud.db")
    meta.drop_all(db.engine, tables=TABLES)
    meta.create_all(db.engine, tables=TABLES)
    with db.tx() as tx:
        for host in HOSTS:
            placement.offer(tx, host, host, [Stock("VCPU", 99)], [], now=1.0)
    yield db
    db.close()


def grouped(db, policy, most, n):
    with db.tx() as tx:
        server_groups.create(tx, Quota(), ServerGroup("g", "p", "u", "g", policy, most), 1.0)
        servers.create(tx, [Server(f"s{i}", "p", "u", "s", "s", FLAVOR, group_id="g") for i in range(n)])
    with db.read() as tx:
        return list(servers.find(tx, [f"s{i}" for i in range(n)]).values())


def claim(tx, server, host):
    server_groups.admit(tx, server, host, host)
    placement.claim(tx, server.id, host, {"VCPU": 1}, now=2.0, project_id="p", user_id="u", new=True)
    servers.settle(tx, server, host, host, 1, "networking", 2.0)


@pytest.mark.parametrize(
    ("policy", "most", "placed"), [("anti-affinity", 1, 3), ("anti-affinity", 2, 6), ("affinity", None, 4)]
)
def test_many_at_once(db, policy, most, placed):
    """All want the same host first, or each another one."""
    all = grouped(db, policy, most, 12)
    ready, got = threading.Barrier(len(all)), []

    def one(i, server):
        ready.wait()
        first = 0 if policy == "anti-affinity" else i
        for k in range(len(HOSTS)):
            host = HOSTS[(first + k) % len(HOSTS)] if policy == "anti-affinity" else HOSTS[first % len(HOSTS)]
            try:
                db.run(claim, server, host)
                got.append(host)
                return
            except NoCapacity:
                pass

    crew = [threading.Thread(target=one, args=(i, s)) for i, s in enumerate(all)]
    for t in crew:
        t.start()
    for t in crew:
        t.join()
    at = {h: got.count(h) for h in got}
    assert sum(at.values()) == placed
    assert all_fit(policy, most or 1, at)
    with db.read() as tx:
        assert server_groups.company(tx, "nobody", "g").at == at


def all_fit(policy, most, at):
    return all(admits(policy, most, n - 1, sum(at.values()) - n) for n in at.values())


def test_a_server_in_the_middle_of_a_move_is_in_two_places(db):
    one, two, three, _ = grouped(db, "anti-affinity", None, 4)
    db.run(claim, one, "a")
    db.run(placement.claim, one.id, "b", {"VCPU": 1}, now=3.0, project_id="p", user_id="u")
    for host in ("a", "b"):
        with pytest.raises(NoCapacity, match="Anti-affinity instance group policy was violated"):
            db.run(claim, two, host)
    db.run(claim, two, "c")
    db.run(placement.release, one.id, "a", now=4.0)
    with pytest.raises(NoCapacity):
        db.run(claim, three, "a")  # its row still says so


def test_itself_is_no_company(db):
    one, *_ = grouped(db, "anti-affinity", None, 1)
    db.run(claim, one, "a")
    with db.read() as tx:
        one = servers.get(tx, one.id)
    db.run(server_groups.admit, one, "a", "a")
    with db.read() as tx:
        assert server_groups.company(tx, one, "g").at == {}


def test_a_group_that_is_gone_binds_nobody(db):
    one, two = grouped(db, "anti-affinity", None, 2)
    db.run(claim, one, "a")
    db.run(server_groups.delete, "g")
    db.run(claim, two, "a")
    with db.read() as tx:
        assert server_groups.company(tx, two, "g") is None
        assert servers.get(tx, one.id).group_id is None
