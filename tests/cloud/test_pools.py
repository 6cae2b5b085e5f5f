"""Storage that hosts share: a provider of the Placement API in an aggregate with them, of which servers get their disks."""

import msgspec
import pytest
import sqlalchemy as sa

from kilonova import main as commands
from kilonova.cli import hosts as command
from kilonova.conductor import examine
from kilonova.store import dues, hosts, placement
from tests.stories import Cloud, telling

POOL = "70000000-0000-4000-8000-000000000007"
LEARNED_S = 620  # by then hosts have been asked what they have


def shared(cloud, total=100, names=("h0", "h1", "h2")):
    """An operator makes a pool of storage, and an aggregate with it and its hosts; hosts do not count it as theirs any more."""
    group = cloud.json("POST", "/os-aggregates", {"aggregate": {"name": "nfs"}}, token=cloud.admin)["aggregate"]
    uuid = next(iter(cloud.db.look(hosts.aggregates))).uuid
    for host in names:
        add = {"add_host": {"host": host}}
        cloud.json("POST", f"/os-aggregates/{group['id']}/action", add, token=cloud.admin)
    tell(cloud, "POST", "/resource_providers", {"name": "nfs", "uuid": POOL})
    at = f"/resource_providers/{POOL}"
    stocks = {"DISK_GB": {"total": total}}
    tell(cloud, "PUT", f"{at}/inventories", {"resource_provider_generation": 0, "inventories": stocks})
    marks = ["MISC_SHARES_VIA_AGGREGATE"]
    tell(cloud, "PUT", f"{at}/traits", {"resource_provider_generation": 1, "traits": marks})
    said = {"resource_provider_generation": 2, "aggregates": [uuid]}
    tell(cloud, "PUT", f"{at}/aggregates", said)
    cloud.pass_time(LEARNED_S)
    cloud.settle()


def tell(cloud, method, path, body=None):
    return cloud.services.json(
        method, f"/placement{path}", body, token=cloud.admin, OpenStack_API_Version="placement 1.39"
    )


def used(cloud):
    return tell(cloud, "GET", f"/resource_providers/{POOL}/usages")["usages"]["DISK_GB"]


def of(cloud, consumer):
    """What it holds of the pool, and of its host."""
    held = cloud.db.look(placement.allocations_of, consumer)
    pool = held.pop(POOL, {})
    (own,) = held.values()
    return pool, own


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as cloud:
        shared(cloud)
        yield cloud


def test_disks_of_a_pool_wherever_the_server_goes(cloud):
    s = cloud.boot()
    small = s.row.flavor.disk_gb
    assert of(cloud, s.id) == ({"DISK_GB": small}, {"VCPU": s.row.flavor.vcpus, "MEMORY_MB": s.row.flavor.memory_mb})
    for last, ok in (("revertResize", 202), ("confirmResize", 204)):
        s.act("resize", {"flavorRef": "large"})
        assert s.status == "VERIFY_RESIZE" and cloud.check() == []
        assert used(cloud) == small + s.row.flavor.disk_gb  # until it is decided, both are kept
        s.act(last, ok=ok)
        assert used(cloud) == s.row.flavor.disk_gb and cloud.check() == []
    for _ in s.moves():
        assert used(cloud) == s.row.flavor.disk_gb and cloud.check() == []
    s.act("shelve")
    assert used(cloud) == 0
    s.act("unshelve")
    assert s.status == "ACTIVE" and used(cloud) == s.row.flavor.disk_gb
    cloud.dead.add(host := s.row.host)
    cloud.pass_time(100)
    cloud.json("POST", f"/servers/{s.id}/action", {"evacuate": {}}, token=cloud.admin)
    cloud.settle()
    assert s.row.host != host and s.status == "SHUTOFF"
    cloud.dead.clear()
    cloud.pass_time(60)
    assert used(cloud) == s.row.flavor.disk_gb and cloud.check() == []
    s.delete()
    assert used(cloud) == 0


def test_operators_see_hosts_and_their_pool(cloud, tmp_path, capsys):
    cloud.boot()
    for v in ("2.1", "2.87", "2.88"):
        shown = cloud.json("GET", "/os-hypervisors/detail", token=cloud.admin, version=v)["hypervisors"]
        assert len(shown) == 3 and all(h["local_gb"] == 100 for h in shown if "local_gb" in h)
    cloud.json("GET", "/os-hypervisors/statistics", token=cloud.admin, version="2.87")
    config = tmp_path / "k.toml"
    config.write_text(f'[database]\nurl = "{cloud.db.engine.url}"\n')

    def hosts_(*words):
        assert command.main(commands._parser("hosts"), ["--config", str(config), *words]) == 0
        return capsys.readouterr().out

    assert hosts_().splitlines()[-1] == "nfs is shared by 3 hosts: 1/100 DISK_GB (99)"
    for h in msgspec.json.decode(hosts_("--json")):
        assert h["shared"]["nfs"]["DISK_GB"]["used"] == 1 and "DISK_GB" not in h["resources"]
    assert "small could live on 3 of 3 hosts." in hosts_("why", "small")


def test_a_full_pool_is_a_reason(tmp_path):
    """And no host is asked for what none of them has."""
    with telling(tmp_path) as cloud:
        shared(cloud, total=2)
        size = cloud.boot("one").row.flavor.disk_gb
        others = [cloud.boot(f"s{i}") for i in range(2 // size)]
        assert [s.status for s in others][-1] == "ERROR"
        assert others[-1].show()["fault"]["details"].endswith("Of 3 hosts: room turned away 3.")
        assert used(cloud) == 2 // size * size


def test_what_went_astray_is_found_and_mended(cloud):
    """A claim of host and pool that is lost; one of the pool that is nobody's any more."""
    s = cloud.boot()
    assert examine.examined(cloud.db, cloud.clock.now()) == []
    cloud.db.run(placement.release, s.id, now=cloud.clock.now())
    assert used(cloud) == 0
    found = examine.examined(cloud.db, cloud.clock.now())
    assert [f.subject for f in found] == [s.id]
    cloud.mend("claims")
    assert used(cloud) == s.row.flavor.disk_gb and cloud.check() == []
    with cloud.db.tx() as tx:
        a = placement.ALLOCATIONS
        tx.execute(sa.delete(a).where(a.c.consumer == s.id, a.c.provider == POOL))
    cloud.mend("counts")
    found = examine.examined(cloud.db, cloud.clock.now())
    assert [f.subject for f in found] == [s.id] and "should hold" in found[0].said
    s.delete()
    t = cloud.boot("two")
    gone = "00000000-0000-4000-8000-00000000000a"
    size = {"DISK_GB": 1}
    cloud.db.run(placement.claim, gone, POOL, size, now=cloud.clock.now(), project_id="p", user_id="u")
    cloud.mend("claims")
    assert used(cloud) == t.row.flavor.disk_gb


def test_a_crash_anywhere_and_the_pool_is_as_its_servers_say(tmp_path):
    """Of the steps of a build and a resize, each thirteenth."""
    cloud = Cloud(tmp_path)
    shared(cloud)
    for crash_at in range(0, 80, 13):
        s = cloud.crashed(crash_at)
        assert cloud.check() == []
        s.delete()
        cloud.settle()
        assert used(cloud) == 0
    assert cloud.check() == []
    cloud.db.close()


def test_another_placement_service_hears_of_it(tmp_path):
    with telling(tmp_path, outside=True) as cloud:
        cloud.mend("owed")
        shared(cloud)
        s = cloud.boot()
        cloud.mend("owed")
        assert cloud.db.look(dues.first, 10) == []
        with cloud.elsewhere.read() as tx:
            assert placement.allocations_of(tx, s.id) == cloud.db.look(placement.allocations_of, s.id)
            assert POOL in placement.allocations_of(tx, s.id)
