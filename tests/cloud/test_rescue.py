"""A guest in need: another system for a while, a new password, a dump; and how it is doing."""

import msgspec
import pytest

from kilonova.model import options
from kilonova.store import servers
from kilonova.virt.sim import SimDriver
from tests.cloud import tables
from tests.cloud.test_rebuild import another_image
from tests.stories import telling


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def rescue(s, said=None, settle=True, ok=200, version="2.96"):
    told = s.cloud.json("POST", f"/servers/{s.id}/action", {"rescue": said}, ok=ok, version=version)
    if settle:
        s.cloud.settle()
    return told


def running(s) -> list[tuple[str, str]]:
    """What its guest sees just now: (device, image) of each disk."""
    driver: SimDriver = s.cloud.driver(s.row.host)
    return [(d.device, getattr(d.source, "image_id", "")) for d in driver.running(s.id).disks]


# ---- rescue


def test_rescue_and_back(cloud):
    s = cloud.boot()
    image = another_image(cloud)
    told = rescue(s, {"rescue_image_ref": image, "adminPass": "s3cret"}, settle=False)
    assert told == {"adminPass": "s3cret"}
    assert s.row.task_state == "rescuing"
    cloud.settle()
    assert (s.status, s.row.power_state, s.row.task_state) == ("RESCUE", 1, None)
    assert running(s) == [("vda", image), ("vdb", cloud.image_id)]
    assert s.state.machines[s.id].password == "s3cret"
    assert s.events()[-1] == ("compute_rescue_instance", "Success")
    s.act("unrescue")
    assert (s.status, s.row.power_state) == ("ACTIVE", 1)
    assert running(s) == [("vda", cloud.image_id)]
    assert s.events()[-1] == ("compute_unrescue_instance", "Success")


def test_without_an_image_it_is_its_own(cloud):
    s = cloud.boot()
    assert len(rescue(s)["adminPass"]) == 12
    assert running(s) == [("vda", cloud.image_id), ("vdb", cloud.image_id)]
    s.act("unrescue")


def test_stable_disks_stay_where_they_are(cloud):
    s = cloud.boot()
    for more, device in (
        ({"hw_rescue_device": "cdrom"}, "sdb"),
        ({"hw_rescue_device": "disk", "hw_rescue_bus": "usb"}, "sdb"),
        ({"hw_rescue_bus": "virtio"}, "vdb"),
    ):
        image = another_image(cloud, **more)
        rescue(s, {"rescue_image_ref": image})
        assert running(s) == [("vda", cloud.image_id), (device, image)]
        s.act("unrescue")


@pytest.mark.parametrize("start", ["os-stop", None])
def test_from_where(cloud, start):
    s = cloud.boot()
    if start:
        s.act(start)
    rescue(s)
    assert s.status == "RESCUE"
    for action in ("os-stop", "pause", "rescue"):
        s.act(action, ok=409, settle=False)
    s.act("unrescue")
    assert s.status == "ACTIVE"
    s.act("unrescue", ok=409)


def test_images_that_make_no_sense(cloud):
    s = cloud.boot()
    nobody = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"
    rescue(s, {"rescue_image_ref": nobody}, ok=400)
    rescue(s, {"rescue_image_ref": another_image(cloud, hw_rescue_device="tape")}, ok=400)
    rescue(s, {"rescue_image_ref": another_image(cloud, hw_rescue_bus="pigeon")}, ok=400)
    rescue(s, {"rescue_image_ref": another_image(cloud, img_block_device_mapping="[]")}, ok=400)
    assert (s.status, s.row.task_state) == ("ACTIVE", None)


def test_a_host_that_refuses_is_an_error(cloud):
    s = cloud.boot()
    cloud.driver(s.row.host).options = options.Sim(failure_rate=1.0)
    rescue(s)
    assert s.status == "ERROR"
    cloud.driver(s.row.host).options = options.Sim()
    rescue(s)
    assert s.status == "RESCUE"


def test_delete_while_rescued(cloud):
    s = cloud.boot()
    rescue(s)
    s.delete()
    assert [len(state.machines) for state in cloud.states.values()] == [0, 0, 0]


def test_a_rescued_guest_that_ends_itself_stays_rescued(cloud):
    s = cloud.boot()
    rescue(s)
    cloud.driver(s.row.host).guest_shuts_down(s.id)
    cloud.settle()
    assert (s.status, s.row.power_state) == ("RESCUE", 4)
    s.act("unrescue")
    assert (s.status, s.row.power_state) == ("ACTIVE", 1)


# ---- what a guest is told


def test_a_new_password(cloud):
    s = cloud.boot()
    s.act("changePassword", {"adminPass": "n3w"}, settle=False)
    assert s.status == "PASSWORD"
    cloud.settle()
    assert s.state.machines[s.id].password == "n3w"
    assert (s.status, s.events()[-1]) == ("ACTIVE", ("compute_set_admin_password", "Success"))
    with cloud.db.read() as tx:
        from kilonova.kit.journal import RUNS, STEPS

        said = str(tx.execute(RUNS.select()).all()) + str(tx.execute(STEPS.select()).all())
    assert "n3w" not in said


def test_a_guest_that_does_not_answer_keeps_its_password(cloud):
    s = cloud.boot()
    s.state.deaf.add(s.id)
    s.act("changePassword", {"adminPass": "n3w"})
    assert (s.status, s.events()[-1]) == ("ACTIVE", ("compute_set_admin_password", "Error"))
    cloud.json("POST", f"/servers/{s.id}/action", {"lock": None}, ok=202, token=cloud.admin)
    s.act("changePassword", {"adminPass": "n3w"}, ok=409)


def test_a_crash_dump(cloud):
    s = cloud.boot()
    s.act("trigger_crash_dump")
    assert s.state.machines[s.id].dumps == 1
    assert (s.status, s.events()[-1]) == ("ACTIVE", ("compute_trigger_crash_dump", "Success"))
    s.act("os-stop")
    s.act("trigger_crash_dump", ok=409)
    cloud.json("POST", f"/servers/{s.id}/action", {"trigger_crash_dump": None}, ok=404, version="2.16")


def test_network_facts_are_asked_anew(cloud):
    s = cloud.boot()
    (plug,) = s.row.plugs
    with cloud.db.tx() as tx:
        servers.change(tx, s.id, None, plugs=[msgspec.structs.replace(plug, mac="fa:16:3e:00:00:00", addresses=[])])
    body = {"injectNetworkInfo": None}
    cloud.json("POST", f"/servers/{s.id}/action", body, ok=403)
    cloud.json("POST", f"/servers/{s.id}/action", body, ok=202, token=cloud.admin)
    cloud.settle()
    assert s.row.plugs == [plug]
    assert len(s.events()) == 1


# ---- how it is doing


def test_diagnostics(cloud):
    s = cloud.boot()
    cloud.pass_time(100)
    shown = cloud.json("GET", f"/servers/{s.id}/diagnostics", token=cloud.admin)
    assert (shown["state"], shown["num_cpus"], shown["num_disks"], shown["num_nics"]) == ("running", 1, 1, 1)
    assert shown["memory_details"] == {"maximum": 512, "used": 512}
    assert shown["uptime"] >= 100
    assert shown["nic_details"][0]["mac_address"] == s.row.plugs[0].mac
    old = cloud.json("GET", f"/servers/{s.id}/diagnostics", token=cloud.admin, version="2.47")
    assert {"cpu0_time", "memory", "vda_read", "vda_write_req"} <= old.keys()
    cloud.json("GET", f"/servers/{s.id}/diagnostics", ok=403)
    s.act("os-stop")
    assert cloud.json("GET", f"/servers/{s.id}/diagnostics", token=cloud.admin)["state"] == "shutdown"
    nowhere = cloud.boot("two", flavor="huge")
    cloud.json("GET", f"/servers/{nowhere.id}/diagnostics", token=cloud.admin, ok=409)


@pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")
def test_diagnostics_are_as_specified(cloud):
    s = cloud.boot()
    (entry,) = tables.group("server-diagnostics")
    for version in tables.changes(entry["response"], 1, 104):
        shown = cloud.json("GET", f"/servers/{s.id}/diagnostics", token=cloud.admin, version=f"2.{version}")
        assert tables.disagreements(tables.said(entry, "response", version), shown) == []


def test_topology(cloud):
    s = cloud.boot()
    assert cloud.json("GET", f"/servers/{s.id}/topology") == {"nodes": [], "pagesize_kb": None}
    cloud.json("GET", f"/servers/{s.id}/topology", ok=404, version="2.77")
