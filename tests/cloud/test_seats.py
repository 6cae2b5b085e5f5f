"""Servers with CPUs, pages and devices of their own: from the flavor to the machine, wherever they go."""

import threading

import msgspec
import pytest

from kilonova.model import options
from kilonova.model.options import Config
from kilonova.store import seats
from tests.stories import telling

HOSTS = options.Sim(
    cpus=8,
    memory_mb=16_384,
    disk_gb=100,
    cells=2,
    pages={"2048": 512},
    devices=("VGPU=2@1", "CUSTOM_PCI_NIC=2@0", "CUSTOM_PCI_CARD@1"),
)
CONFIG = msgspec.structs.replace(
    Config(),
    compute=options.Compute(cpu_dedicated_set="1-3,5-7", reserved_memory_mb=0, allow_resize_to_same_host=True),
    pci=options.Pci(aliases={"nic": "CUSTOM_PCI_NIC", "card": "CUSTOM_PCI_CARD,COMPUTE_MANAGED_PCI_DEVICE,required"}),
)
ADMIN_SEES = {"host_node", "cpu_pinning"}


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path, hosts=2, sim=HOSTS, config=CONFIG) as cloud:
        yield cloud


def flavor(cloud, name, vcpus=2, ram=512, **specs):
    body = {"flavor": {"name": name, "id": name, "vcpus": vcpus, "ram": ram, "disk": 1}}
    cloud.json("POST", "/flavors", body, token=cloud.admin)
    told = {k.replace("__", ":"): v for k, v in specs.items()}
    cloud.json("POST", f"/flavors/{name}/os-extra_specs", {"extra_specs": told}, token=cloud.admin)
    return name


def seat_of(s):
    with s.cloud.db.read() as tx:
        return seats.of(tx, s.id)


def machine(s):
    return s.state.machines[s.id].machine


def usages(cloud, host):
    """What is held of a host and of the devices under it, by the Placement API."""

    def ask(path):
        return cloud.services.json(
            "GET", f"/placement{path}", token=cloud.admin, OpenStack_API_Version="placement 1.39"
        )

    return {
        p["name"]: {c: n for c, n in ask(f"/resource_providers/{p['uuid']}/usages")["usages"].items() if n}
        for p in ask("/resource_providers")["resource_providers"]
        if p["name"].startswith(host)
    }


def test_pinned_cpus_from_the_flavor_to_the_machine(cloud):
    flavor(cloud, "pinned", hw__cpu_policy="dedicated", hw__numa_nodes="2", hw__mem_page_size="2MB")
    s = cloud.boot(flavor="pinned")
    seat = machine(s).seat
    assert [c.page_kb for c in seat.cells] == [2048, 2048] and {c.host for c in seat.cells} == {0, 1}
    assert len(seat.cpus) == 2 and machine(s).identity.dedicated_cpus == [0, 1]
    shown = cloud.json("GET", f"/servers/{s.id}/topology", token=cloud.admin)
    assert shown["pagesize_kb"] == 2048
    assert [n["cpu_pinning"] for n in shown["nodes"]] == [{str(k): v for k, v in c.pins.items()} for c in seat.cells]
    assert [n["host_node"] for n in shown["nodes"]] == [c.host for c in seat.cells]
    mine = cloud.json("GET", f"/servers/{s.id}/topology")
    assert [n["vcpu_set"] for n in mine["nodes"]] == [[0], [1]] and not ADMIN_SEES & mine["nodes"][0].keys()
    s.act("reboot", {"type": "HARD"})
    s.act("rebuild", {"imageRef": cloud.image_id})
    assert machine(s).seat == seat
    assert cloud.json("GET", f"/servers/{cloud.boot().id}/topology") == {"nodes": [], "pagesize_kb": None}


def test_a_seat_goes_along_and_comes_back(cloud):
    flavor(cloud, "pinned", hw__cpu_policy="dedicated")
    flavor(cloud, "larger", vcpus=3, hw__cpu_policy="dedicated")
    s, first = cloud.boot(flavor="pinned"), None
    first, home = seat_of(s), s.row.host
    for confirmed in (False, True):
        s.act("resize", {"flavorRef": "larger"})
        assert s.status == "VERIFY_RESIZE" and len(machine(s).seat.cpus) == 3
        assert cloud.check() == []
        s.act("confirmResize", ok=204) if confirmed else s.act("revertResize")
        if not confirmed:
            assert (s.row.host, seat_of(s), machine(s).seat) == (home, first, first)
    for _ in s.moves():
        assert machine(s).seat == seat_of(s) and len(seat_of(s).cpus) == 3
        assert cloud.check() == []
    s.act("shelve")
    assert seat_of(s) is None
    s.act("unshelve")
    assert s.status == "ACTIVE" and len(machine(s).seat.cpus) == 3
    s.delete()
    assert seat_of(s) is None


def test_cpus_run_out_and_operators_see_which(cloud):
    flavor(cloud, "pinned", vcpus=3, hw__cpu_policy="dedicated")
    all = [cloud.boot(f"s{i}", flavor="pinned") for i in range(5)]
    assert [s.status for s in all] == ["ACTIVE"] * 4 + ["ERROR"]
    assert all[4].show()["fault"]["details"].endswith("Of 2 hosts: room turned away 2.")
    all[0].delete()
    flavor(cloud, "two", vcpus=2, hw__cpu_policy="dedicated", hw__numa_nodes="2")
    s = cloud.boot(flavor="two")
    assert s.show()["fault"]["details"].endswith("Of 2 hosts: room turned away 1, numa turned away 1.")


def test_devices_are_chosen_claimed_and_named(cloud):
    flavor(cloud, "gpu", resources__VGPU="1", pci_passthrough__alias="nic:2")
    s = cloud.boot(flavor="gpu")
    devices = {(t.resource_class, t.kind, t.address) for t in machine(s).seat.devices}
    assert devices == {
        ("VGPU", "mdev", "0000:01:00.0"),
        ("CUSTOM_PCI_NIC", "pci", "0000:02:01.0"),
        ("CUSTOM_PCI_NIC", "pci", "0000:02:01.1"),
    }
    of = usages(cloud, s.row.host)
    assert of[f"{s.row.host}_0000:01:00.0"] == {"VGPU": 1} and of[f"{s.row.host}_0000:02:00.0"] == {"CUSTOM_PCI_NIC": 2}
    other = cloud.boot("two", flavor="gpu")
    assert other.row.host != s.row.host
    assert cloud.boot("three", flavor="gpu").status == "ERROR"
    s.delete()
    assert cloud.boot("four", flavor="gpu").status == "ACTIVE"
    s = cloud.boot("five", flavor=flavor(cloud, "near", hw__cpu_policy="dedicated", pci_passthrough__alias="card:1"))
    assert [c.host for c in seat_of(s).cells] == [1] and [t.cell for t in seat_of(s).devices] == [1]


def test_what_cannot_be_is_refused_at_the_door(cloud):
    for name, specs in {
        "nobodys": {"pci_passthrough__alias": "nothing:1"},
        "uneven": {"hw__numa_nodes": "3"},
        "maskless": {"hw__cpu_policy": "mixed"},
    }.items():
        flavor(cloud, name, **specs)
        wish = {"name": "x", "flavorRef": name, "imageRef": cloud.image_id, "networks": "none"}
        cloud.json("POST", "/servers", {"server": wish}, ok=400)
        s = cloud.boot()
        s.act("resize", {"flavorRef": name}, ok=400)
        s.delete()


def test_many_at_once_and_no_cpu_twice(tmp_path):
    """Real threads claim seats of one host; the columns are as old as they can be."""
    with telling(tmp_path, hosts=1, sim=HOSTS, config=CONFIG) as cloud:
        flavor(
            cloud,
            "pinned",
            vcpus=1,
            hw__cpu_policy="dedicated",
            hw__mem_page_size="2MB",
            pci_passthrough__alias="nic:1",
        )
        one = cloud.boot(flavor="pinned")
        server, place = one.row, next(n for n in cloud.hosts.hosts)
        one.delete()
        with cloud.db.read() as tx:
            provider = next(iter(seats.of_providers(tx)), None)
            assert provider is None
        got, no, start = [], [], threading.Barrier(8)
        uuid = cloud.services.json("GET", f"/placement/resource_providers?name={place}", token=cloud.admin)[
            "resource_providers"
        ][0]["uuid"]

        def sit(me):
            start.wait()
            for i in range(4):
                s = msgspec.structs.replace(server, id=f"{me}-{i}")
                try:
                    got.append(cloud.db.run(seats.claim, s, uuid, now=1.0))
                except Exception as e:
                    no.append(type(e).__name__)

        crew = [threading.Thread(target=sit, args=(i,)) for i in range(8)]
        for t in crew:
            t.start()
        for t in crew:
            t.join(60)
        assert len(got) == 2 and set(no) == {"NoCapacity"} and len(no) == 30
        assert len({cpu for s in got for cpu in s.cpus}) == 2
        assert len({t.address for s in got for t in s.devices}) == 2
        with cloud.db.tx() as tx:
            for id in seats.of_providers(tx)[uuid]:
                seats.placement.release(tx, id, now=2.0)
