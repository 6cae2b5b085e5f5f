"""Which host a server gets: each rule's yes and no, tastes, alternates, bursts, and why there was none."""

import random
import threading
from collections import Counter

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from kilonova.compute.report import parted, stocks
from kilonova.contracts.conductor import Report
from kilonova.contracts.scheduler import Choose
from kilonova.kit.clock import Ids
from kilonova.kit.db import Db, meta
from kilonova.kit.errors import Invalid
from kilonova.model import fit
from kilonova.model.ask import Ask, amounts, ask
from kilonova.model.flavor import Flavor
from kilonova.model.host import HostFacts, Stock
from kilonova.model.options import Compute
from kilonova.model.options import Scheduler as Options
from kilonova.model.server import Image, Server
from kilonova.scheduler.select import Scheduler
from kilonova.store import hosts, placement

SMALL = {"VCPU": 1, "MEMORY_MB": 512, "DISK_GB": 1}
FACTS = HostFacts(
    vcpus=8,
    memory_mb=16_384,
    disk_gb=100,
    disk_free_gb=90,
    hypervisor_type="QEMU",
    hypervisor_version=7_002_022,
    hypervisor_hostname="",
    cpu_info={"arch": "x86_64", "vendor": "AMD"},
    traits=["HW_CPU_X86_AVX2"],
)


class Hand:
    at = 1000.0

    def now(self):
        return self.at

    def sleep(self, seconds):
        self.at += seconds


class House:
    """A database with hosts, and a scheduler that looks at them."""

    def __init__(self, **options):
        self.db = Db("sqlite://", poolclass=sa.StaticPool, connect_args={"check_same_thread": False})
        meta.create_all(self.db.engine)
        self.clock, self.ids = Hand(), Ids(random.Random(1))
        self.scheduler = Scheduler(self.db, clock=self.clock, dice=random.Random(1), options=Options(**options))

    def host(self, name, *, compute=None, host_ip="", **facts):
        compute = compute or Compute(reserved_memory_mb=0)
        said = parted(msgspec.structs.replace(FACTS, hypervisor_hostname=name, **facts), compute)
        r = Report(
            name,
            self.clock.now(),
            1.0,
            [],
            facts=said,
            stocks=stocks(said, compute),
            host_ip=host_ip,
        )
        with self.db.tx() as tx:
            hosts.learn(tx, r, uuid=self.ids.uuid, now=self.clock.now())
        return self

    def choose(self, most=3, fresh=False, **wish):
        wanted = Ask(amounts=wish.pop("amounts", SMALL), **wish)
        return self.scheduler.choose(Choose(server="s", ask=wanted, most=most, fresh=fresh))

    def names(self, **wish):
        return {p.host for p in self.choose(most=99, **wish).places}

    def tx(self, what, *args, **more):
        with self.db.tx() as tx:
            return what(tx, *args, **more)

    def claim(self, host, wanted, consumer):
        provider = next(n.uuid for n in self.tx(hosts.nodes) if n.host == host)
        self.tx(placement.claim, consumer, provider, wanted, now=self.clock.now(), project_id="p", user_id="u")


@pytest.fixture
def house():
    h = House()
    for name in ("a", "b", "c"):
        h.host(name)
    return h


def test_the_best_and_its_alternates(house):
    chosen = house.choose()
    assert sorted(p.host for p in chosen.places) == ["a", "b", "c"]
    assert {p.zone for p in chosen.places} == {"nova"}
    assert chosen.hosts == 3


def test_the_roomiest_first(house):
    house.claim("a", {"MEMORY_MB": 8192}, "x")
    house.claim("b", {"MEMORY_MB": 1024}, "y")
    house.clock.at += 1
    assert [p.host for p in house.choose().places] == ["c", "b", "a"]
    packing = House(tastes={"ram": -1.0, "cpu": 0.0, "disk": 0.0}).host("a").host("b")
    packing.claim("a", {"MEMORY_MB": 8192}, "x")
    assert packing.choose().places[0].host == "a"


def test_a_burst_spreads_before_anything_is_claimed(house):
    first = Counter(house.choose(most=1).places[0].host for _ in range(9))
    assert set(first.values()) == {3}


def test_those_who_ask_together_are_answered_together(house):
    found, ready = [], threading.Barrier(12)

    def one():
        ready.wait()
        found.append(house.choose(most=2).places[0].host)

    crew = [threading.Thread(target=one) for _ in range(12)]
    for t in crew:
        t.start()
    for t in crew:
        t.join()
    assert set(Counter(found).values()) == {4}


def test_a_no_is_said_after_a_look_at_everything(house):
    """Choices that nobody claims do not keep others out, nor does what we saw a while ago."""
    big = {"MEMORY_MB": 16_000}
    for _ in range(3):
        assert house.choose(most=1, amounts=big).places
    assert house.choose(most=1, amounts=big).places  # the three were not claimed
    for i, name in enumerate("abc"):
        house.claim(name, big, f"x{i}")
    chosen = house.choose(amounts=big, fresh=True)
    assert (chosen.places, chosen.why, chosen.hosts) == ([], {"room": 3}, 3)
    house.tx(placement.release, "x0", now=house.clock.now())
    assert house.names(amounts=big) == {"a"}


# ---- rules


def test_disabled_and_silent_hosts(house):
    a = house.tx(hosts.service_of, "a")
    house.tx(hosts.set_service, a.uuid, 1.0, disabled=True, disabled_reason="it smells")
    assert house.names() == {"b", "c"}
    assert "COMPUTE_STATUS_DISABLED" in house.tx(placement.traits)[house.tx(hosts.nodes, host="a")[0].uuid]
    house.tx(hosts.set_service, house.tx(hosts.service_of, "b").uuid, 1.0, forced_down=True)
    assert house.names() == {"c"}
    house.tx(hosts.set_service, a.uuid, 1.0, disabled=False)
    assert house.names() == {"a", "c"}
    house.clock.at += 100
    house.tx(hosts.seen, {"a": house.clock.at})
    assert house.names() == {"a"}
    house.clock.at += 100
    assert house.choose().why == {"up": 3}


@pytest.mark.parametrize(
    ("wish", "who"),
    [
        ({"host": "b"}, {"b"}),
        ({"node": "c"}, {"c"}),
        ({"host": "b", "node": "c"}, set()),
        ({"avoid": ["a", "b"]}, {"c"}),
        ({"required": ["HW_CPU_X86_AVX2"]}, {"a", "b"}),
        ({"forbidden": ["HW_CPU_X86_AVX2"]}, {"c"}),
        ({"required": ["CUSTOM_NOBODY"]}, set()),
        ({"amounts": {"VCPU": 9}}, set()),
        ({"amounts": {"VGPU": 1}}, set()),
        ({"properties": {"hw_architecture": "amd64"}}, {"a", "b"}),
        ({"properties": {"hw_architecture": "aarch64"}}, {"c"}),
        ({"properties": {"img_hv_type": "kvm"}}, {"a", "b", "c"}),
        ({"properties": {"img_hv_type": "hyperv"}}, set()),
        ({"properties": {"hw_vm_mode": "xen"}}, set()),
        ({"extra_specs": {"capabilities:hypervisor_type": "s== QEMU"}}, {"a", "b", "c"}),
        ({"extra_specs": {"capabilities:vendor": "Intel"}}, {"c"}),
        ({"extra_specs": {"capabilities:nothing": "1"}}, set()),
    ],
)
def test_rules(wish, who):
    house = House().host("a").host("b").host("c", traits=[], cpu_info={"arch": "aarch64", "vendor": "Intel"})
    assert house.names(**wish) == who


def test_zones_are_aggregates_with_a_name_for_it(house):
    zone = house.tx(hosts.create_aggregate, "one", uuid="u1", now=1.0, availability_zone="z")
    house.tx(hosts.add_host, zone.id, "b", 1.0)
    assert house.names(zone="z") == {"b"}
    assert house.names(zone="nova") == {"a", "c"}
    assert house.names(zone="elsewhere") == set()
    assert house.choose(zone="z").places[0].zone == "z"


def test_some_hosts_are_for_some_projects(house):
    theirs = house.tx(hosts.create_aggregate, "theirs", uuid="u1", now=1.0)
    house.tx(hosts.add_host, theirs.id, "b", 1.0)
    house.tx(hosts.set_metadata, theirs.id, {"filter_tenant_id": "p1,p2"}, 1.0)
    assert house.names(project_id="p1") == {"a", "b", "c"}
    assert house.names(project_id="p3") == {"a", "c"}


def test_rules_that_must_be_asked_for():
    fast = {"extra_specs": {"ssd": "true"}}
    plain, strict = House(), House(rules=["enabled", "up", "room", "aggregate_extra_specs"])
    for house in (plain, strict):
        house.host("a").host("b")
        aggregate = house.tx(hosts.create_aggregate, "fast", uuid="u", now=1.0)
        house.tx(hosts.add_host, aggregate.id, "a", 1.0)
        house.tx(hosts.set_metadata, aggregate.id, {"ssd": "true"}, 1.0)
    assert (plain.names(**fast), strict.names(**fast)) == ({"a", "b"}, {"a"})
    with pytest.raises(Invalid, match="no rule smell"):
        House(rules=["smell"])
    with pytest.raises(Invalid, match="no taste salt"):
        House(tastes={"salt": 1.0})


def test_a_forced_host_is_only_asked_for_room(house):
    house.tx(hosts.set_service, house.tx(hosts.service_of, "a").uuid, 1.0, disabled=True)
    assert house.names(host="a", forced=True, required=["CUSTOM_NOBODY"]) == {"a"}
    assert house.names(host="a", forced=True, amounts={"VCPU": 99}) == set()


def test_hosts_where_builds_fail_come_last(house):
    for _ in range(10):
        house.tx(hosts.failed, "a")
        house.tx(hosts.failed, "b")
    assert house.choose().places[0].host == "c"
    house.tx(hosts.succeeded, "a")
    assert {house.choose().places[0].host for _ in range(4)} == {"a", "c"}


def test_a_host_that_comes_later_is_seen(house):
    house.choose()
    house.host("d")
    assert house.names() == {"a", "b", "c", "d"}


@pytest.mark.parametrize("lately", [0, 1000])
def test_a_look_sees_what_is_claimed_of_a_host_and_under_it(house, lately):
    """Whether little has changed lately and all of that is read, or much and it is first asked what we do not know."""
    node = next(n for n in house.tx(hosts.nodes) if n.host == "a")
    gpu = Stock("CUSTOM_GPU", 4)
    house.tx(placement.offer, "under a", "gpu", [gpu], [], now=house.clock.at, parent=node.uuid)
    house.tx(house.scheduler.hosts.load, house.clock.at)
    house.clock.at += 10
    house.claim("a", {"VCPU": 3}, "x")
    house.tx(placement.claim, "y", "under a", {"CUSTOM_GPU": 2}, now=house.clock.at, project_id="p", user_id="u")
    house.clock.at += 1
    house.scheduler.hosts.lately = lately
    assert house.choose(most=1).places
    columns = house.scheduler.hosts
    row = columns.row[node.uuid]
    assert columns.used[row, columns.classes["VCPU"]] == 3
    assert columns.children[row]["under a"].inventories["CUSTOM_GPU"].used == 2
    assert columns.lately < 1000


# ---- what is asked


def test_what_a_flavor_takes():
    flavor = Flavor("1", "f", 2, 1024, 10, ephemeral_gb=5, swap_mb=1500)
    assert amounts(flavor) == {"VCPU": 2, "MEMORY_MB": 1024, "DISK_GB": 17}
    assert amounts(flavor, volume_backed=True)["DISK_GB"] == 7
    assert amounts(Flavor("1", "f", 1, 64, 0)) == {"VCPU": 1, "MEMORY_MB": 64}
    specs = {"resources:VCPU": "0", "resources:CUSTOM_GOLD": "3"}
    assert amounts(Flavor("1", "f", 1, 64, 0, extra_specs=specs)) == {"MEMORY_MB": 64, "CUSTOM_GOLD": 3}


def test_what_flavor_and_image_require():
    flavor = Flavor("1", "f", 1, 64, 0, extra_specs={"trait:A": "required", "trait:B": "forbidden"})
    image = Image(id="i", properties={"trait:C": "required"})
    asked = ask(Server("s", "p", "u", "n", "n", flavor, image=image))
    assert (asked.required, asked.forbidden) == (["A", "C"], ["B"])


@pytest.mark.parametrize(
    ("value", "wanted", "yes"),
    [
        ("4", "4", True),
        ("4", "= 3", True),
        ("4", ">= 5", False),
        ("4", "== 4.0", True),
        ("four", "== 4", False),
        ("abc", "s== abc", True),
        ("abc", "s< abd", True),
        ("abc", "<in> b", True),
        ("a b c", "<all-in> a c", True),
        ("a b", "<all-in> a c", False),
        ("x", "<or> x <or> y", True),
        ("z", "<or> x <or> y", False),
        ("", "", True),
    ],
)
def test_operators_of_extra_specs(value, wanted, yes):
    assert fit.matches(value, wanted) is yes


@given(st.text(), st.text())
def test_no_extra_spec_is_too_strange(value, wanted):
    assert fit.matches(value, wanted) in (True, False)


@given(
    st.lists(st.tuples(st.integers(1, 16), st.integers(0, 32), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 12),
)
def test_as_a_plain_chooser_would(cloud, wanted):
    """The hosts that may be chosen are those that a loop over all of them finds."""
    house = House()
    expect = set()
    for i, (vcpus, taken, disabled) in enumerate(cloud):
        name = f"h{i}"
        house.host(name, vcpus=vcpus, compute=Compute(cpu_allocation_ratio=2.0))
        if (taken := min(taken, vcpus)) > 0:
            house.claim(name, {"VCPU": taken}, f"x{i}")
        if disabled:
            house.tx(hosts.set_service, house.tx(hosts.service_of, name).uuid, 1.0, disabled=True)
        if not disabled and wanted <= vcpus and taken + wanted <= vcpus * 2:
            expect.add(name)
    assert house.names(amounts={"VCPU": wanted}) == expect
    house.db.close()
