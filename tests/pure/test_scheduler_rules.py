"""Every filter, weigher, pre-filter and hint of the specification: which hosts it lets through, which it likes better."""

import itertools
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from kilonova.contracts.scheduler import Choose
from kilonova.kit.errors import Invalid, NoCapacity
from kilonova.model import numa, wants
from kilonova.model import seat as seat_model
from kilonova.model.ask import amounts_of, ask
from kilonova.model.flavor import Alias, Flavor
from kilonova.model.host import Cell, HostDevice, Place, Stock
from kilonova.model.numa import GuestCell
from kilonova.model.options import Compute
from kilonova.model.server import Image, Server
from kilonova.scheduler.cells import Cells
from kilonova.scheduler.choice import FILTERS, WEIGHERS
from kilonova.scheduler.rules import RULES, TASTES
from kilonova.store import hosts, placement, providers, seats, servers
from tests.pure.test_scheduler import FACTS, SMALL, House

SPEC = Path(__file__).parents[2].parent / "shared/spec/scheduler.md"
ALL = {"a", "b", "c"}


def cloud(*names, **options):
    house = House(**options)
    for i, name in enumerate(names or "abc"):
        house.host(name, host_ip=f"192.0.{i}.10")
    return house


def aggregate(house, name, members, **metadata):
    made = house.tx(hosts.create_aggregate, name, uuid=f"u-{name}", now=1.0)
    for host in members:
        house.tx(hosts.add_host, made.id, host, 1.0)
    house.tx(hosts.set_metadata, made.id, metadata, 1.0)


def server(house, id, host, *, task=None, vm="active", properties=None):
    flavor = Flavor("1", "f", 1, 64, 1)
    s = Server(
        id,
        "p",
        "u",
        id,
        id,
        flavor,
        vm_state=vm,
        task_state=task,
        host=host,
        image=Image("i", properties=properties or {}),
    )
    house.tx(servers.create, [s])


def first(house, **wish):
    return house.choose(most=1, **wish).places[0].host


# ---- names


@pytest.mark.skipif(not SPEC.exists(), reason="the specification is not beside this checkout")
def test_nova_s_names_are_known():
    text = SPEC.read_text()
    filters = {
        line.split("|")[1].strip()
        for line in text.split("## 3.")[1].split("## 4.")[0].splitlines()
        if line.startswith("| ")
    }
    filters = {f for f in filters if f[:1].isupper()}
    assert len(filters) == 22 and filters <= FILTERS.keys()
    options = {
        w.split(" ")[0].strip("−")
        for line in text.split("## 8.")[1].split("## 9.")[0].splitlines()
        if (w := line.split("|")[3].strip() if line.count("|") > 3 else "")
    }
    options -= {"multiplier", "---", "cross_cell_move_weight_multiplier", "metrics.weight_multiplier"}
    assert options <= set(WEIGHERS.values())
    for mine in {m for ms in FILTERS.values() for m in ms}:
        assert mine in RULES
    assert WEIGHERS.keys() <= TASTES.keys()


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_each_of_nova_s_filters_can_be_enabled(name):
    house = cloud(rules=[name], max_instances_per_host=5)
    assert house.names() == ALL
    assert house.names(amounts={"VCPU": 999}) == set()  # Placement sees to room, whatever is enabled


def test_computes_that_are_silent_count_when_nobody_asks():
    house = cloud(rules=["AllHostsFilter"])
    house.clock.at += 1000
    assert house.names() == ALL
    house.tx(hosts.set_service, house.tx(hosts.service_of, "a").uuid, 1.0, disabled=True)
    assert house.names() == {"b", "c"}


def test_names_that_nobody_knows():
    for options in (
        {"rules": ["SmellFilter"]},
        {"tastes": {"smell_weight_multiplier": 1.0}},
        {"file": "/nowhere/x.py"},
    ):
        with pytest.raises(Invalid):
            House(**options)


# ---- hints


def test_near_servers_and_far_from_them():
    house = cloud()
    assert house.names(near=["a", "c"]) == {"a", "c"}
    assert house.names(near=[]) == set()
    assert house.names(far=["a"]) == {"b", "c"}


@pytest.mark.parametrize(
    ("hints", "who"),
    [
        ({"build_near_host_ip": "192.0.1.77"}, {"b"}),
        ({"build_near_host_ip": "192.0.1.77", "cidr": "/16"}, ALL),
        ({"build_near_host_ip": ["192.0.2.1"], "cidr": ["/24"]}, {"c"}),
        ({"build_near_host_ip": "junk"}, set()),
        ({"build_near_host_ip": "192.0.1.77", "cidr": "/99"}, set()),
        ({"cidr": "/24"}, ALL),
    ],
)
def test_near_an_address(hints, who):
    assert cloud(rules=["SimpleCIDRAffinityFilter"]).names(hints=hints) == who


@pytest.mark.parametrize(
    ("query", "who"),
    [
        ([">=", "$free_ram_mb", 10_000], {"b", "c"}),
        (["and", [">=", "$free_ram_mb", 10_000], ["=", "$host", "c"]], {"c"}),
        (["or", ["=", "$host", "a"], ["=", "$host", "c"]], {"a", "c"}),
        (["not", ["=", "$host", "a"]], {"b", "c"}),
        (["in", "$host", "a", "b"], {"a", "b"}),
        (["<", "$vcpus_used", 1], {"b", "c"}),
        (["=", "$cpu_info.vendor", "AMD"], ALL),
        (["=", "$hypervisor_type", "QEMU"], ALL),
        (["=", "$num_instances", 0], ALL),
        (["<=", "$nothing", 1], set()),
        (["=", "$host"], set()),
        (["explode", 1], set()),
        ([], set()),
        ({"a": 1}, ALL),
        (7, ALL),
        ([">", "$host", 7], set()),
    ],
)
def test_expressions(query, who):
    house = cloud(rules=["JsonFilter"])
    house.claim("a", {"MEMORY_MB": 8000, "VCPU": 2}, "x")
    house.clock.at += 1
    assert house.names(hints={"query": query}) == who
    assert house.names(hints={"query": json.dumps(query)}) == who


def test_expressions_that_go_too_far():
    deep = ["="]
    for _ in range(200):
        deep = ["not", deep]
    house = cloud(rules=["JsonFilter"])
    assert house.names(hints={"query": deep}) in (set(), ALL)
    assert house.names(hints={"query": "[" * 5000}) == set()


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=3)
        | st.sampled_from(["$host", "$free_ram_mb", "and", "not", "<"]),
        lambda x: st.lists(x, max_size=4),
        max_leaves=12,
    )
)
def test_no_expression_is_too_strange(junk):
    ODD.names(hints={"query": junk})


ODD = cloud(rules=["JsonFilter"])


# ---- images


@pytest.mark.parametrize(
    ("options", "image", "who"),
    [
        ({"isolated_hosts": ["a"], "isolated_images": ["i"]}, "i", {"a"}),
        ({"isolated_hosts": ["a"], "isolated_images": ["i"]}, "j", {"b", "c"}),
        ({"isolated_hosts": ["a"], "isolated_images": ["i"], "restrict_isolated_hosts": False}, "i", {"a"}),
        ({"isolated_hosts": ["a"], "isolated_images": ["i"], "restrict_isolated_hosts": False}, "j", ALL),
        ({"isolated_hosts": ["a"]}, "j", {"b", "c"}),
        ({"isolated_hosts": ["a"], "restrict_isolated_hosts": False}, "j", ALL),
        ({"isolated_images": ["i"]}, "i", set()),
        ({}, "i", ALL),
    ],
)
def test_isolated_hosts(options, image, who):
    assert cloud(**options).names(image_id=image) == who


def test_traits_of_images():
    house = House(require_image_type=True, image_devices_as_traits=True)
    house.host("a", traits=["COMPUTE_IMAGE_TYPE_QCOW2"]).host(
        "b", traits=["COMPUTE_IMAGE_TYPE_RAW", "COMPUTE_STORAGE_BUS_SCSI"]
    )
    assert house.names(image_format="qcow2") == {"a"}
    assert house.names(image_format="") == {"a", "b"}
    assert house.names(properties={"hw_disk_bus": "scsi"}) == {"b"}
    assert house.names(properties={"hw_disk_bus": "scsi", "hw_vif_model": "odd"}) == {
        "a",
        "b",
    }  # one has no trait: all is off
    assert cloud().names(image_format="qcow2") == ALL


def test_a_trait_that_says_disabled():
    house = House().host("a", traits=["COMPUTE_STATUS_DISABLED"]).host("b")
    assert house.names() == {"b"}


# ---- aggregates


@pytest.mark.parametrize(
    ("name", "metadata", "wish", "who"),
    [
        ("AggregateImagePropertiesIsolation", {"os": "linux"}, {"properties": {"os": "linux"}}, ALL),
        ("AggregateImagePropertiesIsolation", {"os": "linux"}, {"properties": {"os": "windows"}}, {"b", "c"}),
        ("AggregateImagePropertiesIsolation", {"os": "linux,bsd"}, {"properties": {"os": "bsd"}}, ALL),
        ("AggregateImagePropertiesIsolation", {"os": "linux"}, {"properties": {"size": "1"}}, ALL),
        ("AggregateTypeAffinityFilter", {"instance_type": "m1.big"}, {"flavor": "m1.small"}, {"b", "c"}),
        ("AggregateTypeAffinityFilter", {"instance_type": "m1.big,m1.small"}, {"flavor": "m1.small"}, ALL),
        ("AggregateMultiTenancyIsolation", {"filter_tenant_id": "p"}, {"project_id": "q"}, {"b", "c"}),
        ("AggregateMultiTenancyIsolation", {"filter_tenant_id2": "p,q"}, {"project_id": "q"}, ALL),
        ("AggregateInstanceExtraSpecsFilter", {"ssd": "true"}, {"extra_specs": {"ssd": "true"}}, {"a"}),
        (
            "AggregateInstanceExtraSpecsFilter",
            {"n": "4"},
            {"extra_specs": {"aggregate_instance_extra_specs:n": ">= 3"}},
            {"a"},
        ),
        ("AggregateInstanceExtraSpecsFilter", {"n": "4"}, {"extra_specs": {"hw:n": "7"}}, ALL),
        ("AggregateNumInstancesFilter", {"max_instances_per_host": "1"}, {}, {"b", "c"}),
        ("AggregateNumInstancesFilter", {"max_instances_per_host": "9,3"}, {}, ALL),
        ("AggregateNumInstancesFilter", {"max_instances_per_host": "junk"}, {}, ALL),
        ("AggregateIoOpsFilter", {"max_io_ops_per_host": "1"}, {}, {"b", "c"}),
    ],
)
def test_what_aggregates_say(name, metadata, wish, who):
    house = cloud(rules=[name])
    server(house, "s", "a", task="rebuilding")
    aggregate(house, "one", ["a"], **metadata)
    assert house.names(**wish) == who


def test_only_keys_of_a_namespace():
    house = cloud(rules=["AggregateImagePropertiesIsolation"], aggregate_image_properties_namespace="iso")
    aggregate(house, "one", ["a"], os="linux", **{"iso.os": "linux"})
    assert house.names(properties={"os": "windows"}) == ALL
    assert house.names(properties={"iso.os": "windows"}) == {"b", "c"}


def test_projects_with_hosts_of_their_own():
    house = cloud(limit_tenants_to_aggregates=True)
    aggregate(house, "one", ["a"], filter_tenant_id="p")
    assert (house.names(project_id="p"), house.names(project_id="q")) == ({"a"}, {"b", "c"})
    strict = cloud(limit_tenants_to_aggregates=True, aggregate_required_for_tenants=True)
    aggregate(strict, "one", ["a"], filter_tenant_id="p")
    assert (strict.names(project_id="p"), strict.names(project_id="q")) == ({"a"}, set())


def test_aggregates_that_only_take_who_asks_for_them():
    house = House(isolate_aggregates=True).host("a", traits=["CUSTOM_GPU"]).host("b")
    aggregate(house, "gpu", ["a"], **{"trait:CUSTOM_GPU": "required"})
    assert (house.names(), house.names(required=["CUSTOM_GPU"])) == ({"b"}, {"a"})


# ---- loads


def test_hosts_that_have_enough():
    house = cloud(rules=["NumInstancesFilter", "IoOpsFilter"], max_instances_per_host=2, max_io_ops_per_host=1)
    server(house, "s1", "a")
    server(house, "s2", "a")
    server(house, "s3", "b", vm="building")
    assert house.names() == {"c"}
    server(house, "s4", "c", task="rescuing")
    assert house.choose(fresh=True).why == {"num_instances": 1, "io_ops_few": 2}


ALONE = dict.fromkeys(TASTES, 0.0)


def test_metrics():
    house = House(metrics={"fan": 1.0, "heat": -2.0}, tastes=ALONE | {"metrics": 1.0})
    house.host("a", metrics={"fan": 9.0, "heat": 1.0}).host("b", metrics={"fan": 9.0, "heat": 4.0}).host(
        "c", metrics={"fan": 1.0}
    )
    assert house.names() == {"a", "b"}
    assert first(house) == "a"
    only = ALONE | {"metrics": 1.0}
    loose = (
        House(metrics={"heat": -1.0}, metrics_required=False, tastes=only).host("a", metrics={"heat": 1.0}).host("c")
    )
    assert loose.names() == {"a", "c"} and first(loose) == "a"


def test_providers_that_are_not_for_servers():
    house = House()
    for name in "ab":
        house.host(name, traits=["OWNER_NOVA"])
    assert house.names() == {"a", "b"}
    b = next(n.uuid for n in house.tx(hosts.nodes) if n.host == "b")
    house.tx(providers.set_traits, b, ["OWNER_CYBORG"])
    assert house.names() == {"a"}
    house.host("c", traits=[])  # of an older release: then nobody is asked
    assert house.names() == ALL


def test_hosts_that_a_routed_network_reaches():
    house = cloud()
    aggregate(house, "one", "ab")
    aggregate(house, "two", "bc")
    assert house.names(member_of=[["u-one"]]) == {"a", "b"}
    assert house.names(member_of=[["u-one"], ["u-two", "u-three"]]) == {"b"}
    assert house.choose(member_of=[["u-three"]]).why == {"segments": 3}


# ---- NUMA


CELLS = [Cell(4, 4096, {2048: 1024}), Cell(8, 8192, {2048: 512, 1048576: 4})]


@pytest.mark.parametrize(
    ("specs", "size", "who"),
    [
        ({}, (16, 32_000), {"a", "b"}),
        ({"hw:numa_nodes": "1"}, (8, 8192), {"a"}),
        ({"hw:numa_nodes": "1"}, (9, 1024), set()),
        ({"hw:numa_nodes": "2"}, (8, 8192), {"a"}),
        ({"hw:numa_nodes": "2"}, (10, 8192), set()),
        (
            {
                "hw:numa_nodes": "2",
                "hw:numa_cpus.0": "0-7",
                "hw:numa_cpus.1": "8,9",
                "hw:numa_mem.0": "8000",
                "hw:numa_mem.1": "100",
            },
            (10, 8100),
            {"a"},
        ),
        ({"hw:numa_nodes": "3"}, (3, 300), set()),
        ({"hw:numa_nodes": "junk"}, (1, 1), set()),
        ({"hw:cpu_policy": "dedicated"}, (1, 1024), set()),  # no CPU of either is for one server alone
        ({"hw:cpu_policy": "shared"}, (16, 1024), {"a", "b"}),
        ({"hw:mem_page_size": "large"}, (1, 4096), {"a"}),
        ({"hw:mem_page_size": "large"}, (1, 5000), set()),
        ({"hw:mem_page_size": "1GB"}, (1, 4096), {"a"}),
        ({"hw:mem_page_size": "2048"}, (5, 1024), {"a"}),
        ({"hw:mem_page_size": "2048"}, (5, 2048), set()),
        ({"hw:mem_page_size": "small"}, (1, 1024), {"a"}),
    ],
)
def test_numa_nodes(specs, size, who):
    house = (
        House(rules=["NUMATopologyFilter"])
        .host("a", vcpus=64, memory_mb=64_000, cells=CELLS)
        .host("b", vcpus=64, memory_mb=64_000)
    )
    assert house.names(extra_specs=specs, vcpus=size[0], memory_mb=size[1]) == who


PINNED = Compute(reserved_memory_mb=0, cpu_dedicated_set="2-11")
CORES = [
    Cell(6, 8192, {2048: 1024}, list(range(6)), [[0, 1], [2, 3], [4, 5]]),
    Cell(6, 8192, {}, list(range(6, 12)), [[6, 7], [8, 9], [10, 11]]),
]
DEDICATED = {"hw:cpu_policy": "dedicated"}


def seated_house():
    """One host of two cells: 4 and 6 CPUs are for one server each, two for all others."""
    house = House()
    return house.host("a", vcpus=12, memory_mb=16_384, cells=CORES, compute=PINNED, traits=["HW_CPU_HYPERTHREADING"])


def sit(house, id, vcpus, specs, memory_mb=512):
    s = Server(id, "p", "u", id, id, Flavor("1", "f", vcpus, memory_mb, 1, extra_specs=specs))
    place = house.choose(amounts=amounts_of(s), extra_specs=specs, vcpus=vcpus, memory_mb=memory_mb, fresh=True).places
    return house.tx(seats.claim, s, place[0].provider, now=house.clock.now()) if place else None


@pytest.mark.parametrize(
    ("specs", "sizes"),
    [
        (DEDICATED, [4, 2, 4]),
        (DEDICATED, [6, 4]),
        (DEDICATED | {"hw:numa_nodes": "2"}, [8]),
        (DEDICATED | {"hw:cpu_thread_policy": "require"}, [3, 2, 4]),
        ({"hw:cpu_policy": "mixed", "hw:cpu_dedicated_mask": "^0"}, [3, 3]),
        (DEDICATED | {"hw:emulator_threads_policy": "isolate"}, [5, 3]),
    ],
)
def test_each_pinned_cpu_is_given_once(specs, sizes):
    house = seated_house()
    cpus = []
    for i, n in enumerate(sizes):
        seat = sit(house, f"s{i}", n, specs)
        assert seat is not None, (i, n)
        assert len({c.host for c in seat.cells}) == len(seat.cells)
        cpus += sorted(seat.cpus)
    assert len(cpus) == len(set(cpus)) and set(cpus) <= set(range(2, 12))
    left = 10 - len(cpus)
    assert sit(house, "one more", left + 1, specs) is None


def test_who_goes_leaves_his_cpus():
    house = seated_house()
    first = sit(house, "s0", 6, DEDICATED)
    assert sit(house, "s1", 6, DEDICATED) is None and sit(house, "s2", 4, DEDICATED) is not None
    assert house.names(amounts={"MEMORY_MB": 64}, extra_specs=DEDICATED, vcpus=1, memory_mb=64) == set()
    house.tx(placement.move, "s0", "m0", now=house.clock.now())
    assert house.tx(seats.of, "s0") is None and house.tx(seats.of, "m0") == first
    assert house.tx(placement.release, "m0", now=house.clock.now())
    assert house.tx(seats.of, "m0") is None
    assert sit(house, "s3", 6, DEDICATED).cpus == first.cpus


def test_huge_pages_are_given_once():
    house = seated_house()
    specs = {"hw:mem_page_size": "2MB"}
    for i in range(2):
        seat = sit(house, f"s{i}", 1, specs, 1024)
        assert [(c.host, c.page_kb, c.pins) for c in seat.cells] == [(0, 2048, {})]
    assert sit(house, "s2", 1, specs, 2) is None
    assert sit(house, "s3", 1, {"hw:mem_page_size": "any"}, 1024).cells[0].page_kb == 4


def test_threads_of_a_core_stay_together_and_isolated_ones_want_hosts_without():
    house = seated_house()
    pins = sit(house, "s0", 2, DEDICATED).cells[0].pins
    assert abs(pins[0] - pins[1]) == 1 and min(pins.values()) % 2 == 0
    assert sit(house, "s1", 1, DEDICATED | {"hw:cpu_thread_policy": "isolate"}) is None


@pytest.mark.parametrize(
    ("specs", "properties"),
    [
        ({"hw:numa_nodes": "3"}, {}),
        ({"hw:numa_nodes": "0"}, {}),
        ({"hw:numa_nodes": "2", "hw:numa_cpus.0": "0", "hw:numa_mem.0": "64"}, {}),
        ({"hw:numa_nodes": "1", "hw:numa_cpus.0": "0-9", "hw:numa_mem.0": "1024"}, {}),
        ({"hw:numa_nodes": "1", "hw:numa_cpus.0": "0-3", "hw:numa_mem.0": "1000"}, {}),
        ({"hw:numa_nodes": "1", "hw:numa_cpus.0": "3-0", "hw:numa_mem.0": "1024"}, {}),
        ({"hw:numa_nodes": "1"}, {"hw_numa_nodes": "2"}),
        ({"hw:cpu_policy": "shared"}, {"hw_cpu_policy": "dedicated"}),
        ({"hw:cpu_policy": "pinned"}, {}),
        ({"hw:cpu_policy": "mixed"}, {}),
        ({"hw:cpu_policy": "mixed", "hw:cpu_dedicated_mask": "0-3"}, {}),
        ({"hw:cpu_dedicated_mask": "0"}, {}),
        ({"hw:cpu_thread_policy": "require"}, {}),
        ({"hw:emulator_threads_policy": "isolate"}, {}),
        ({"hw:cpu_realtime": "yes"}, {}),
        ({"hw:mem_page_size": "2XB"}, {}),
        ({"hw:mem_page_size": "small"}, {"hw_mem_page_size": "large"}),
        ({}, {"hw_mem_page_size": "large"}),
        ({"hw:locked_memory": "true"}, {}),
    ],
)
def test_guests_that_cannot_be(specs, properties):
    with pytest.raises(Invalid):
        numa.guest(specs, properties, 4, 1024)
    assert numa.parted(specs, properties, 4, 1024) == (0, 4)


def test_guests_as_flavor_and_image_say_together():
    def g(specs, properties=None):
        return numa.guest(specs, properties or {}, 4, 1024)

    assert g({}) is None and g({"hw:cpu_policy": "shared"}) is None
    assert [c.pinned for c in g({}, {"hw_cpu_policy": "dedicated"}).cells] == [[0, 1, 2, 3]]
    assert g({"resources:PCPU": "4"}).pcpus == 4 and g({"resources:PCPU": "3"}) is None
    mixed = g({"hw:cpu_policy": "mixed", "hw:cpu_realtime_mask": "^0-1", "hw:cpu_realtime": "yes"})
    assert (mixed.cells[0].pinned, mixed.realtime) == ([2, 3], [2, 3])
    assert g({"hw:mem_page_size": "large"}, {"hw_mem_page_size": "1GB"}).page_kb == 1048576
    two = g(
        {
            "hw:numa_nodes": "2",
            "hw:numa_cpus.0": "0,3",
            "hw:numa_cpus.1": "1-2",
            "hw:numa_mem.0": "24",
            "hw:numa_mem.1": "1000",
        }
    )
    assert [(c.cpus, c.memory_mb) for c in two.cells] == [([0, 3], 24), ([1, 2], 1000)]


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
)
def test_the_columns_say_what_the_claim_would(guest, host):
    """Whether there is a host cell for each of the guest's: by columns, by the claim, and by trying all."""
    cells = [Cell(c, 64 * m) for c, m in host]
    wanted, at = list[GuestCell](), 0
    for n, m in guest:
        cpus = list(range(at, at := at + n))
        wanted.append(GuestCell(cpus, cpus, 64 * m))
    right = len(guest) <= len(host) and any(
        all(g[0] <= h[0] and g[1] <= h[1] for g, h in zip(guest, some, strict=True))
        for some in itertools.permutations(host, len(guest))
    )
    facts = msgspec.structs.replace(FACTS, cells=cells, dedicated=list(range(sum(c for c, _ in host))))
    seat = next(seat_model.seats(numa.Guest(wanted), facts, ()), None)
    assert (seat is not None) == right
    columns = Cells(_Rows([facts]))
    columns.refresh(_Nobody())
    assert columns.fit(numa.Guest(wanted)).tolist() == [right]


class _Rows:
    """Of hosts only what the columns of cells look at."""

    def __init__(self, kinds):
        self.kinds, self.n = kinds, len(kinds)
        self.kind, self.generation = np.arange(self.n), np.zeros(self.n, np.int64)
        self.places = [Place(f"h{i}", f"h{i}", f"p{i}") for i in range(self.n)]


class _Nobody:
    """A database in which nobody sits anywhere."""

    def execute(self, query):
        return []


# ---- devices


GPU = HostDevice("0000:81:00.0", "VGPU", 4, "mdev", cell=1, traits=["CUSTOM_FAST"])
NIC = HostDevice("0000:82:00.0", "CUSTOM_PCI_NIC", 2, "pci", ["0000:82:00.1", "0000:82:00.2"], cell=0)
CARD = HostDevice("0000:83:00.0", "CUSTOM_PCI_CARD", cell=1)


def device_house():
    house = House()
    house.host("a", devices=[GPU, NIC])
    house.host("b", devices=[CARD, msgspec.structs.replace(CARD, address="0000:84:00.0")])
    return house.host("c")


@pytest.mark.parametrize(
    ("specs", "who"),
    [
        ({"resources:VGPU": "4"}, {"a"}),
        ({"resources:VGPU": "5"}, set()),
        ({"resources:VGPU": "1", "trait:CUSTOM_FAST": "required"}, {"a"}),
        ({"resources:VGPU": "1", "trait:CUSTOM_SLOW": "required"}, set()),
        ({"resources1:VGPU": "1", "trait1:CUSTOM_FAST": "required", "resources2:CUSTOM_PCI_NIC": "2"}, {"a"}),
        ({"resources1:VGPU": "1", "trait1:CUSTOM_FAST": "forbidden"}, set()),
        ({"resources1:CUSTOM_PCI_CARD": "1", "resources2:CUSTOM_PCI_CARD": "1", "group_policy": "isolate"}, {"b"}),
        ({"resources1:VGPU": "1", "resources2:VGPU": "1", "group_policy": "isolate"}, set()),
        ({"resources1:VGPU": "1", "resources2:VGPU": "1", "group_policy": "none"}, {"a"}),
        ({"resources1:CUSTOM_PCI_CARD": "2"}, set()),  # of one provider, and each has one
        ({"resources1:MEMORY_MB": "64"}, {"a", "b", "c"}),
    ],
)
def test_devices_by_groups(specs, who):
    house, s = device_house(), Server("s", "p", "u", "s", "s", Flavor("1", "f", 1, 64, 1, extra_specs=specs))
    wish = ask(s)
    places = house.scheduler.choose(Choose(server="s", ask=wish, most=9)).places
    assert {p.host for p in places} == who
    for p in places:
        house.tx(seats.claim, msgspec.structs.replace(s, id=p.host), p.provider, now=house.clock.now())


def test_each_function_is_given_once_and_comes_back():
    house = device_house()
    alias = {"nic": Alias("CUSTOM_PCI_NIC", [])}
    flavor = Flavor("1", "f", 1, 64, 1, extra_specs={"pci_passthrough:alias": "nic:1"}, aliases=alias)

    def sit_down(id):
        s = Server(id, "p", "u", id, id, flavor)
        found = house.scheduler.choose(Choose(server=id, ask=ask(s), most=1, fresh=True))
        return house.tx(seats.claim, s, found.places[0].provider, now=house.clock.now()) if found.places else found

    got = [sit_down(f"s{i}").devices[0].address for i in range(2)]
    assert sorted(got) == NIC.functions
    assert sit_down("s2").why == {"room": 3}
    house.tx(placement.release, "s0", now=house.clock.now())
    assert sit_down("s3").devices[0].address == got[0]


def test_a_device_that_is_gone_gives_out_nothing():
    house = device_house()
    s = Server("s", "p", "u", "s", "s", Flavor("1", "f", 1, 64, 1, extra_specs={"resources:VGPU": "1"}))
    place = house.scheduler.choose(Choose(server="s", ask=ask(s), most=1)).places[0]
    house.tx(seats.claim, s, place.provider, now=house.clock.now())
    house.host("a", devices=[NIC])
    assert house.names(amounts={"VGPU": 1}) == set() and house.names(amounts={"CUSTOM_PCI_NIC": 1}) == {"a"}
    house.tx(placement.release, "s", now=house.clock.now())
    house.host("a", devices=[])
    assert len(house.tx(lambda tx: tx.execute(sa.select(placement.PROVIDERS)).all())) == 3 + 2  # hosts, cards


@pytest.mark.parametrize(("policy", "cells"), [("required", {1}), ("preferred", {0, 1}), ("", {1})])
def test_devices_are_near(policy, cells):
    house = House().host("a", vcpus=12, memory_mb=16_384, cells=CORES, compute=PINNED, devices=[GPU])
    specs = DEDICATED | {"resources:VGPU": "1"} | ({"hw:pci_numa_affinity_policy": policy} if policy else {})
    s = Server("s", "p", "u", "s", "s", Flavor("1", "f", 2, 64, 1, extra_specs=specs))
    house.tx(
        placement.claim,
        "x",
        place := house.choose().places[0].provider,
        {"MEMORY_MB": 1},
        now=1.0,
        project_id="p",
        user_id="u",
    )
    seat = house.tx(seats.claim, s, place, now=1.0)
    assert {c.host for c in seat.cells} <= cells
    six = msgspec.structs.replace(s, id="six", flavor=msgspec.structs.replace(s.flavor, vcpus=5))
    if policy == "required":
        with pytest.raises(NoCapacity):  # cell 1 has 4 left
            house.tx(seats.claim, six, place, now=1.0)


@pytest.mark.parametrize(
    ("policy", "vcpus", "who"),
    [
        ("required", 2, {"near", "one socket"}),
        ("required", 5, set()),  # the card's cell has four
        ("socket", 5, {"one socket"}),
        ("legacy", 2, {"near", "one socket", "nowhere"}),
        ("preferred", 5, {"near", "one socket", "nowhere"}),
        ("", 2, {"near", "one socket", "nowhere"}),
    ],
)
def test_the_columns_know_how_near_devices_are(policy, vcpus, who):
    """And the claim says the same, on each host."""
    house, card = House(), HostDevice("0000:83:00.0", "CUSTOM_PCI_CARD")
    for name, cell in (("near", 0), ("one socket", 0), ("nowhere", None)):
        cells = [msgspec.structs.replace(c, socket=0) for c in CORES] if name == "one socket" else CORES
        device = msgspec.structs.replace(card, cell=cell)
        traits = ["COMPUTE_SOCKET_PCI_NUMA_AFFINITY"]
        house.host(name, vcpus=12, memory_mb=16_384, cells=cells, compute=PINNED, devices=[device], traits=traits)
    specs = DEDICATED | {"resources:CUSTOM_PCI_CARD": "1"} | ({"hw:pci_numa_affinity_policy": policy} if policy else {})
    s = Server("s", "p", "u", "s", "s", Flavor("1", "f", vcpus, 64, 1, extra_specs=specs))
    assert {p.host for p in house.scheduler.choose(Choose(server="s", ask=ask(s), most=9)).places} == who
    for p in house.scheduler.hosts.places:
        mine = msgspec.structs.replace(s, id=p.host)
        if p.host in who:
            assert house.tx(seats.claim, mine, p.provider, now=1.0).devices
        else:
            with pytest.raises(NoCapacity):
                house.tx(seats.claim, mine, p.provider, now=1.0)


# ---- tastes


@pytest.mark.parametrize(("taste", "key"), [(t, k) for t, k in WEIGHERS.items() if t in ("ram", "cpu", "disk")])
def test_free_room_is_liked_and_aggregates_may_dislike_it(taste, key):
    name = {"ram": "MEMORY_MB", "cpu": "VCPU", "disk": "DISK_GB"}[taste]
    only = dict.fromkeys(TASTES, 0.0) | {key: 1.0}
    del only[taste]
    house = cloud(tastes=only)
    house.claim("a", {name: 4}, "x")
    house.claim("b", {name: 2}, "y")
    house.clock.at += 1
    assert [p.host for p in house.choose().places] == ["c", "b", "a"]
    for some in ALL:
        aggregate(house, f"dislikes-{some}", [some], **{key: "-1.0"})
    assert [p.host for p in house.choose(fresh=True).places] == ["a", "b", "c"]


def test_servers_and_images_there():
    house = cloud(tastes=dict.fromkeys(TASTES, 0.0) | {"instances": 1.0})
    server(house, "s1", "b")
    assert first(house) == "b"
    alike = cloud(tastes=dict.fromkeys(TASTES, 0.0) | {"image_props_weight_multiplier": 1.0})
    server(alike, "s1", "b", properties={"os": "linux"})
    server(alike, "s2", "c", properties={"os": "windows"})
    assert first(alike, properties={"os": "linux"}) == "b"
    assert first(alike, properties={"os": "windows"}) == "c"
    picky = cloud(tastes=dict.fromkeys(TASTES, 0.0) | {"image_properties": 1.0}, image_properties_weights={"a": 1.0})
    server(picky, "s1", "b", properties={"os": "linux"})
    server(picky, "s2", "c", properties={"a": "1"})
    assert first(picky, properties={"os": "linux", "a": "1"}) == "c"


def test_devices_are_kept_for_who_asks_for_them():
    house = cloud(tastes=ALONE | {"pci_weight_multiplier": 1.0})
    provider = next(n.uuid for n in house.tx(hosts.nodes) if n.host == "a")
    house.tx(providers.set_stocks, provider, [Stock("VGPU", 4)], keep=True)
    house.tx(hosts.mark)
    assert {first(house) for _ in range(6)} == {"b", "c"}
    assert house.names(amounts=SMALL | {"VGPU": 1}) == {"a"}
    house.host("a")  # the host reports again: what others said of it stays
    assert house.names(amounts=SMALL | {"VGPU": 1}) == {"a"}


def test_versions_of_hypervisors():
    house = House(tastes=dict.fromkeys(TASTES, 0.0) | {"hypervisor_version": 1.0})
    house.host("a", hypervisor_version=7).host("b", hypervisor_version=9)
    assert first(house) == "b"


def test_chance():
    house = cloud("a", "b", driver="chance", tastes={"ram": 100.0})
    house.claim("a", {"MEMORY_MB": 8000}, "x")
    house.clock.at += 1
    assert {first(house) for _ in range(30)} == {"a", "b"}
    assert cloud(driver="caching").names() == ALL


# ---- an operator's own


OWN = """
from kilonova.scheduler.rules import rows, rule, taste

@rule()
def night_shift(hosts, ask, view):
    return rows(hosts, lambda p: p.host == "a") if ask.hints.get("shift") == "night" else ...

@rule(standard=False)
def never(hosts, ask, view):
    return rows(hosts, lambda p: False)

@taste(1000.0)
def last_letters(hosts, ask, view):
    return [ord(p.host[0]) for p in hosts.places]
"""


def test_rules_of_an_operator_s_own(tmp_path):
    file = tmp_path / "rules.py"
    file.write_text(OWN)
    house = cloud(file=file)
    assert house.names(hints={"shift": "night"}) == {"a"}
    assert first(house) == "c"
    assert cloud(file=file, rules=["ComputeFilter"]).names(hints={"shift": "night"}) == {"a"}
    assert cloud(file=file, rules=["room", "never"]).names() == set()
    assert cloud(file=file, tastes={"last_letters": -1.0}).choose().places[0].host == "a"
    assert "night_shift" not in RULES and "last_letters" not in TASTES
    with pytest.raises(Invalid, match="no rule never"):
        House(rules=["never"])
    file.write_text("1 / 0")
    with pytest.raises(Invalid, match="ZeroDivisionError"):
        House(file=file)


# ---- what is asked for


@pytest.mark.parametrize(
    ("specs", "expect"),
    [
        ({}, {"VCPU": 2, "MEMORY_MB": 64, "DISK_GB": 1}),
        ({"resources:VCPU": "1", "resources:MEMORY_MB": "0"}, {"VCPU": 1, "DISK_GB": 1}),
        ({"resources:VGPU": "1", "resources1:VGPU": "2"}, {"VCPU": 2, "MEMORY_MB": 64, "DISK_GB": 1, "VGPU": 3}),
        ({"resources_X:VCPU": "4"}, {"VCPU": 4, "MEMORY_MB": 64, "DISK_GB": 1}),
        ({"resources:PCPU": "2"}, {"PCPU": 2, "MEMORY_MB": 64, "DISK_GB": 1}),
        (
            {"resources:VGPU": "x", "resources:vgpu": "1", "resources:VGPU2": "-1"},
            {"VCPU": 2, "MEMORY_MB": 64, "DISK_GB": 1},
        ),
        ({"resources:VGPU": "99999999999"}, {"VCPU": 2, "MEMORY_MB": 64, "DISK_GB": 1}),
        ({"hw:mem_encryption": "true"}, {"VCPU": 2, "MEMORY_MB": 64, "DISK_GB": 1, "MEM_ENCRYPTION_CONTEXT": 1}),
        ({"hw:pmem": "6GB,6GB"}, {"VCPU": 2, "MEMORY_MB": 64, "DISK_GB": 1, "CUSTOM_PMEM_NAMESPACE_6GB": 2}),
    ],
)
def test_amounts(specs, expect):
    assert wants.amounts(Flavor("1", "f", 2, 64, 1, extra_specs=specs)) == expect


@pytest.mark.parametrize(
    ("specs", "properties", "required", "forbidden"),
    [
        (
            {"trait:A": "required", "trait1:B": "required", "trait:C": "forbidden"},
            {"trait:D": "required", "trait:E": "forbidden"},
            {"A", "B", "D"},
            {"C"},
        ),
        ({"accel:device_profile": "x"}, {}, {"COMPUTE_ACCELERATORS"}, set()),
        ({"hw:virtio_packed_ring": "true"}, {}, {"COMPUTE_NET_VIRTIO_PACKED"}, set()),
        ({}, {"hw_virtio_packed_ring": "1"}, {"COMPUTE_NET_VIRTIO_PACKED"}, set()),
        (
            {"hw:ephemeral_encryption": "true", "hw:ephemeral_encryption_format": "luks"},
            {},
            {"COMPUTE_EPHEMERAL_ENCRYPTION", "COMPUTE_EPHEMERAL_ENCRYPTION_LUKS"},
            set(),
        ),
        ({"hw:sound_model": "virtio"}, {}, {"COMPUTE_SOUND_MODEL_VIRTIO"}, set()),
        (
            {"hw:tpm_version": "2.0", "hw:tpm_model": "tpm-crb", "hw:tpm_secret_security": "host"},
            {},
            {"COMPUTE_SECURITY_TPM_2_0", "COMPUTE_SECURITY_TPM_CRB", "COMPUTE_SECURITY_TPM_SECRET_SECURITY_HOST"},
            set(),
        ),
        (
            {},
            {"hw_tpm_version": "1.2"},
            {"COMPUTE_SECURITY_TPM_1_2", "COMPUTE_SECURITY_TPM_TIS", "COMPUTE_SECURITY_TPM_SECRET_SECURITY_USER"},
            set(),
        ),
        ({"hw:cpu_thread_policy": "isolate"}, {}, set(), {"HW_CPU_HYPERTHREADING"}),
        ({"hw:cpu_thread_policy": "require"}, {}, {"HW_CPU_HYPERTHREADING"}, set()),
        ({"os:secure_boot": "required"}, {}, {"COMPUTE_SECURITY_UEFI_SECURE_BOOT"}, set()),
        ({"hw:pci_numa_affinity_policy": "socket"}, {}, {"COMPUTE_SOCKET_PCI_NUMA_AFFINITY"}, set()),
        ({"hw:maxphysaddr_mode": "emulate"}, {}, {"COMPUTE_ADDRESS_SPACE_EMULATED"}, set()),
        ({}, {"hw_firmware_stateless": "true"}, {"COMPUTE_SECURITY_STATELESS_FIRMWARE"}, set()),
        ({"hw:mem_encryption": "true"}, {}, {"HW_CPU_X86_AMD_SEV"}, set()),
    ],
)
def test_traits_that_follow(specs, properties, required, forbidden):
    assert wants.required(specs, properties) == required
    assert wants.forbidden(specs, properties) == forbidden


def test_hints_go_along():
    raw = {"query": msgspec.Raw(b'["=", 1, 2]'), "huge": msgspec.Raw(b"123456789012345678901234567890")}
    s = Server(
        "s", "p", "u", "n", "n", Flavor("1", "f", 1, 64, 0), scheduler_hints=raw, image=Image("i", disk_format="qcow2")
    )
    asked = ask(s)
    assert (asked.hints, asked.image_format, asked.vcpus) == ({"query": ["=", 1, 2]}, "qcow2", 1)


# ---- against a plain chooser


HOSTS = st.lists(
    st.tuples(st.integers(1, 8), st.booleans(), st.booleans(), st.sampled_from(["", "p", "q"]), st.integers(0, 3)),
    min_size=1,
    max_size=6,
)


@given(HOSTS, st.integers(1, 6), st.booleans(), st.sampled_from(["p", "q"]), st.integers(0, 2))
def test_several_rules_at_once_as_a_plain_chooser_would(rows, vcpus, fast, project, far):
    house = House(
        rules=["ComputeFilter", "DifferentHostFilter", "AggregateMultiTenancyIsolation", "IsolatedHostsFilter"],
        isolated_hosts=["h1"],
    )
    expect = set()
    for i, (cpus, has, disabled, owner, taken) in enumerate(rows):
        name = f"h{i}"
        house.host(name, vcpus=cpus, traits=["CUSTOM_FAST"] if has else [], compute=Compute(cpu_allocation_ratio=1.0))
        if disabled:
            house.tx(hosts.set_service, house.tx(hosts.service_of, name).uuid, 1.0, disabled=True)
        if owner:
            aggregate(house, f"of-{name}", [name], filter_tenant_id=owner)
        if held := min(taken, cpus):
            house.claim(name, {"VCPU": held}, f"x{i}")
        if not disabled and held + vcpus <= cpus and (has or not fast) and owner in ("", project) and i not in (1, far):
            expect.add(name)
    wish = {
        "amounts": {"VCPU": vcpus},
        "project_id": project,
        "far": [f"h{far}"],
        "required": ["CUSTOM_FAST"] if fast else [],
    }
    assert house.names(**wish) == expect
    house.db.close()
