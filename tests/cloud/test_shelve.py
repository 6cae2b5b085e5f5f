"""Shelve, offload, unshelve: what is kept, what is given back, and where it comes back."""

import msgspec
import pytest

from kilonova.model import options
from tests.cloud.test_captures import image, images
from tests.stories import telling


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def keeping(tmp_path, seconds):
    config = msgspec.structs.replace(options.Config(), compute=options.Compute(shelved_offload_time_s=seconds))
    return telling(tmp_path, config=config)


def zones(cloud, **hosts):
    """Aggregates, each with a zone of its name."""
    for name, members in hosts.items():
        body = {"aggregate": {"name": name, "availability_zone": name}}
        id = cloud.json("POST", "/os-aggregates", body, token=cloud.admin)["aggregate"]["id"]
        for host in members:
            cloud.json("POST", f"/os-aggregates/{id}/action", {"add_host": {"host": host}}, token=cloud.admin)
    cloud.clock.sleep(2)


def act(s, action, said=None, ok=202, settle=True, version="2.96", token=""):
    s.cloud.json(
        "POST", f"/servers/{s.id}/action", {action: said}, ok=ok, version=version, token=token or s.cloud.user.token
    )
    if settle:
        s.cloud.settle()


# ---- shelve


def test_it_leaves_its_host_and_comes_back(cloud):
    s = cloud.boot("one", metadata={"a": "b"})
    before, state = s.row, s.state
    state.machines[s.id].log = "what the guest wrote"
    act(s, "shelve", settle=False)
    seen = []
    while cloud.bus.letters or cloud.woken:
        if (now := (s.row.vm_state, s.row.task_state)) not in seen:
            seen.append(now)
        cloud.step()
    assert seen == [("active", "shelving"), ("active", "shelving_image_uploading"), ("shelved", "shelving_offloading")]
    cloud.settle()
    row = s.row
    assert (s.status, row.host, row.node, row.power_state, row.task_state) == ("SHELVED_OFFLOADED", None, None, 0, None)
    assert s.id not in state.machines
    shown = s.show()
    assert [a["addr"] for a in shown["addresses"]["private"]] == [p.addresses[0].address for p in before.plugs]
    made = images(cloud, name="one-shelved")[0]
    assert (made["status"], made["image_type"], row.system_metadata["shelved_image_id"]) == (
        "active",
        "snapshot",
        made["id"],
    )
    assert row.system_metadata["shelved_host"] == before.host
    assert s.events()[-2:] == [("compute_shelve_instance", "Success"), ("compute_shelve_offload_instance", "Success")]
    port = cloud.neighbours.network.port(before.plugs[0].port_id)
    assert (port.device_id, port.host) == (s.id, "")
    assert cloud.check() == []

    act(s, "unshelve")
    row = s.row
    assert (s.status, row.power_state, row.plugs, row.image) == ("ACTIVE", 1, before.plugs, before.image)
    assert row.epoch > before.epoch
    machine = s.state.machines[s.id].machine
    assert machine.disks[0].source.image_id == made["id"]
    assert machine.identity.meta == {"a": "b"}
    assert images(cloud, image_type="snapshot") == []
    assert not [k for k in row.system_metadata if k.startswith("shelved")]
    assert s.events()[-1] == ("compute_unshelve_instance", "Success")
    s.act("reboot", {"type": "HARD"})
    assert s.status == "ACTIVE"


@pytest.mark.parametrize("action", ["os-stop", "pause", "suspend"])
def test_from_where(cloud, action):
    s = cloud.boot()
    s.act(action)
    act(s, "shelve")
    assert s.status == "SHELVED_OFFLOADED"
    act(s, "unshelve")
    assert s.status == "ACTIVE"


@pytest.mark.parametrize("steps", range(7))
@pytest.mark.parametrize("errand", [("shelve", "unshelve"), ("rescue", "unrescue")], ids=lambda e: e[0])
def test_what_comes_and_goes_at_the_same_moment(cloud, errand, steps):
    """A volume comes, another and a NIC go, and nobody waits for that: what is written is what its machine has."""
    s = cloud.boot()
    old, new = (cloud.neighbours.volume.create(1, token=cloud.user.token).id for _ in range(2))
    path = f"/servers/{s.id}/os-volume_attachments"
    cloud.json("POST", path, {"volumeAttachment": {"volumeId": old}})
    cloud.settle()
    cloud.json("POST", path, {"volumeAttachment": {"volumeId": new}})
    cloud.json("DELETE", f"{path}/{old}", ok=202)
    cloud.json("DELETE", f"/servers/{s.id}/os-interface/{s.row.plugs[0].port_id}", ok=202)
    for _ in range(steps):
        cloud.step()
    act(s, errand[0], ok=200 if errand[0] == "rescue" else 202)
    assert cloud.check() == []
    act(s, errand[1])
    assert cloud.check() == []
    assert s.status == "ACTIVE"


def test_a_host_may_keep_it_for_a_while(tmp_path):
    with keeping(tmp_path, 300) as cloud:
        s = cloud.boot()
        act(s, "shelve")
        host = s.row.host
        assert (s.status, host is not None, s.row.power_state) == ("SHELVED", True, 4)
        assert cloud.check() == []
        cloud.pass_time(200)
        assert s.status == "SHELVED"
        cloud.pass_time(200)
        cloud.settle()
        assert (s.status, s.row.host) == ("SHELVED_OFFLOADED", None)
        act(s, "unshelve")
        assert s.status == "ACTIVE"


def test_or_for_ever(tmp_path):
    with keeping(tmp_path, -1) as cloud:
        s = cloud.boot()
        act(s, "shelveOffload", ok=409, token=cloud.admin)
        act(s, "shelve")
        cloud.pass_time(400)
        assert s.status == "SHELVED"
        machine = s.state.machines[s.id]
        act(s, "unshelve")
        assert (s.status, s.state.machines[s.id] is machine, machine.power) == ("ACTIVE", True, "running")
        assert images(cloud, image_type="snapshot") == []
        act(s, "shelve")
        act(s, "shelveOffload", ok=403)
        act(s, "shelveOffload", token=cloud.admin)
        assert s.status == "SHELVED_OFFLOADED"


def test_a_guest_that_is_started_behind_our_back_is_stopped_again(tmp_path):
    with keeping(tmp_path, -1) as cloud:
        s = cloud.boot()
        act(s, "shelve")
        cloud.driver(s.row.host).start(s.id)
        cloud.settle()
        assert (s.status, s.state.machines[s.id].power) == ("SHELVED", "shutdown")


def test_one_that_cannot_be_copied_runs_again(cloud):
    s = cloud.boot()
    driver = cloud.driver(s.row.host)

    def refuses(*_):
        from kilonova.kit.errors import Refused

        raise Refused("There is no room for a copy.")

    driver.capture = refuses
    act(s, "shelve")
    assert (s.status, s.row.power_state, s.row.task_state) == ("ACTIVE", 1, None)
    assert images(cloud, image_type="snapshot") == []
    assert s.events()[-1] == ("compute_shelve_instance", "Error")
    s.act("os-stop")
    act(s, "shelve")
    assert s.status == "SHUTOFF"
    del driver.capture
    act(s, "shelve")
    assert s.status == "SHELVED_OFFLOADED"


def test_where_its_host_is_gone(cloud):
    s = cloud.boot()
    state = s.state
    act(s, "shelve", settle=False)
    while s.row.vm_state != "shelved":
        cloud.step()
    cloud.dead.add(s.row.host)
    cloud.settle()
    assert s.status == "SHELVED_OFFLOADED"
    assert s.id in state.machines
    cloud.dead.clear()
    cloud.settle()
    assert s.id not in state.machines


# ---- unshelve


def test_no_room_leaves_it_shelved(cloud):
    s = cloud.boot(flavor="large")
    act(s, "shelve")
    quota = {"quota_set": {"instances": -1, "cores": -1, "ram": -1, "force": True}}
    cloud.json("PUT", f"/os-quota-sets/{cloud.user.project_id}", quota, token=cloud.admin)
    many = [cloud.boot(f"s{i}", flavor="large", settle=False) for i in range(9)]
    cloud.settle()
    act(s, "unshelve")
    assert (s.status, s.row.task_state, s.row.host) == ("SHELVED_OFFLOADED", None, None)
    assert cloud.check() == []
    many[0].delete()
    act(s, "unshelve")
    assert s.status == "ACTIVE"


def test_a_host_that_refuses_is_followed_by_the_next(cloud):
    s = cloud.boot()
    act(s, "shelve")
    for name in ("h0", "h1"):
        cloud.driver(name).options = options.Sim(failure_rate=1.0)
    act(s, "unshelve")
    assert (s.status, s.row.host) == ("ACTIVE", "h2")
    for name in ("h0", "h1"):
        cloud.driver(name).options = options.Sim()


def test_hosts_that_all_refuse_leave_it_shelved(cloud):
    s = cloud.boot()
    act(s, "shelve")
    for name in cloud.states:
        cloud.driver(name).options = options.Sim(failure_rate=1.0)
    act(s, "unshelve")
    assert (s.status, s.row.host, len(s.row.plugs)) == ("SHELVED_OFFLOADED", None, 1)
    assert cloud.check() == []
    for name in cloud.states:
        cloud.driver(name).options = options.Sim()
    act(s, "unshelve")
    assert s.status == "ACTIVE"


def test_without_its_image_it_cannot_come_back(cloud):
    s = cloud.boot()
    act(s, "shelve")
    id = s.row.system_metadata["shelved_image_id"]
    cloud.services.ask("DELETE", f"/image/v2/images/{id}", token=cloud.user.token).read()
    act(s, "unshelve")
    assert s.status == "SHELVED_OFFLOADED"
    assert s.events()[-1] == ("get_image_info", "Error")
    s.delete()


def test_zones_and_hosts(cloud):
    zones(cloud, east=["h0"], west=["h1", "h2"])
    s = cloud.boot(availability_zone="east")
    assert s.row.host == "h0"
    act(s, "unshelve", {"availability_zone": "west"}, ok=409)
    act(s, "shelve")
    act(s, "unshelve", {}, ok=400, version="2.77")
    act(s, "unshelve", {"availability_zone": "nowhere"}, ok=400)
    act(s, "unshelve", {"host": "h1"}, ok=403)
    act(s, "unshelve", {"host": "h1"}, ok=409, token=cloud.admin)
    act(s, "unshelve", {"host": "h9"}, ok=400, token=cloud.admin)
    act(s, "unshelve", {"host": "h1"}, ok=400, version="2.90", token=cloud.admin)
    assert s.row.task_state is None
    act(s, "unshelve", {"availability_zone": "west"}, version="2.77")
    assert (s.row.host in ("h1", "h2"), s.row.availability_zone) == (True, "west")
    act(s, "shelve")
    act(s, "unshelve", {"availability_zone": None, "host": "h0"}, token=cloud.admin)
    assert (s.row.host, s.row.availability_zone) == ("h0", None)
    act(s, "shelve")
    act(s, "unshelve", version="2.77")
    assert s.status == "ACTIVE"


def test_a_shelved_server_in_a_place_is_not_moved(tmp_path):
    with keeping(tmp_path, -1) as cloud:
        s = cloud.boot()
        act(s, "shelve")
        act(s, "unshelve", {"availability_zone": "nova"}, ok=409)
        act(s, "unshelve")


# ---- delete


def test_nothing_is_left_of_a_deleted_one(cloud):
    s = cloud.boot()
    act(s, "shelve")
    (made,) = images(cloud, image_type="snapshot")
    assert image(cloud, made["id"])["name"] == "one-shelved"
    s.delete()
    assert images(cloud, image_type="snapshot") == []
    assert cloud.neighbours.network.ports(servers=[s.id]) == []


def test_a_delete_overtakes(cloud):
    for n in range(14):
        s = cloud.boot(f"s{n}")
        act(s, "shelve", settle=n >= 9)
        if n >= 9:
            act(s, "unshelve", settle=False)
        for _ in range(n % 9):
            cloud.step()
        s.delete()
        assert s.row.vm_state == "deleted"
        assert cloud.check() == []
