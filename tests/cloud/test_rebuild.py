"""Rebuild: what stays, what comes anew, and what becomes of one that fails."""

import base64

import msgspec
import pytest

from kilonova.model import options
from tests.stories import telling


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def rebuild(s, image=None, settle=True, ok=202, version="2.96", **more):
    body = {"rebuild": {"imageRef": image or s.cloud.image_id, **more}}
    said = s.cloud.json("POST", f"/servers/{s.id}/action", body, ok=ok, version=version)
    if settle:
        s.cloud.settle()
    return said.get("server")


def another_image(cloud, **more):
    wish = {"name": "other", "disk_format": "raw", "container_format": "bare", "visibility": "public", **more}
    id = cloud.services.json("POST", "/image/v2/images", wish, cloud.admin, ok=201)["id"]
    path = f"/image/v2/images/{id}/file"
    cloud.services.ask("PUT", path, b"\0" * 512, cloud.admin, Content_Type="application/octet-stream").read()
    return id


def test_it_comes_back_anew(cloud):
    s = cloud.boot("one", metadata={"a": "b"})
    before, machine = s.row, s.state.machines[s.id].machine
    other = another_image(cloud)
    told = rebuild(s, other, name="two", metadata={"c": "d"}, description="why", adminPass="s3cret", settle=False)
    assert (told["status"], told["adminPass"], told["name"], told["image"]["id"]) == ("REBUILD", "s3cret", "two", other)
    cloud.settle()
    row, made = s.row, s.state.machines[s.id].machine
    assert (s.status, row.task_state, row.name, row.description, row.metadata) == (
        "ACTIVE",
        None,
        "two",
        "why",
        {"c": "d"},
    )
    assert (row.host, row.plugs, row.epoch, row.flavor) == (before.host, before.plugs, before.epoch, before.flavor)
    assert row.launched_at > before.launched_at
    assert (made.disks[0].source.image_id, made.admin_password, made.identity.name) == (other, "s3cret", "two")
    assert [n.port_id for n in made.nics] == [n.port_id for n in machine.nics]
    assert s.events()[-2:] == [("rebuild_server", "Success"), ("compute_rebuild_instance", "Success")]


def test_the_same_image_asks_no_scheduler(cloud):
    s = cloud.boot()
    state = s.state.machines[s.id]
    state.disk = "what the guest wrote"
    rebuild(s)
    assert s.state.machines[s.id].disk == ""
    assert s.events()[-1] == ("compute_rebuild_instance", "Success")
    assert ("rebuild_server", "Success") not in s.events()


def test_one_that_was_stopped_is_stopped(cloud):
    s = cloud.boot()
    s.act("os-stop")
    rebuild(s, settle=False)
    seen = []
    while cloud.bus.letters or cloud.woken:
        if (state := s.row.task_state) not in seen:
            seen.append(state)
        cloud.step()
    assert seen == ["rebuilding", "rebuild_spawning", "powering-off"]
    cloud.settle()
    assert (s.status, s.row.power_state) == ("SHUTOFF", 4)


def test_what_is_said_and_what_is_taken_away(cloud):
    key = {
        "keypair": {
            "name": "k",
            "public_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPYvM5xQfZ0C0HjQ2TDFdGEsVYEg1N3bLrqIKVGFc3Wm",
        }
    }
    cloud.json("POST", "/os-keypairs", key, ok=201)
    data = base64.b64encode(b"#!/bin/sh").decode()
    s = cloud.boot()
    told = rebuild(s, key_name="k", user_data=data, hostname="other", accessIPv4="192.0.2.1")
    assert (told["key_name"], told["user_data"], told["accessIPv4"]) == ("k", data, "192.0.2.1")
    assert s.state.machines[s.id].machine.identity.keypair.name == "k"
    assert s.row.hostname == "other"
    told = rebuild(s, key_name=None, user_data=None)
    assert (told["key_name"], told["user_data"]) == (None, None)
    assert (s.row.keypair, s.row.user_data, s.row.access_ip_v4) == (None, None, "192.0.2.1")


def test_files_until_2_56(cloud):
    s = cloud.boot()
    file = {"path": "/etc/motd", "contents": base64.b64encode(b"hello").decode()}
    rebuild(s, version="2.56", personality=[file])
    assert s.state.machines[s.id].machine.identity.files == [("/etc/motd", file["contents"])]


def test_bad_wishes_change_nothing(cloud):
    s = cloud.boot()
    before = s.row
    nobody = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"
    rebuild(s, nobody, ok=400)
    rebuild(s, another_image(cloud, min_ram=4096), ok=400)
    rebuild(s, key_name="nobody's", ok=400)
    rebuild(s, user_data="***", ok=400)
    rebuild(s, accessIPv6="192.0.2.1", ok=400)
    s.act("pause", settle=False)
    rebuild(s, ok=409, settle=False)
    cloud.settle()
    after = s.row
    assert (after.image, after.name, after.user_data, after.keypair) == (before.image, before.name, None, None)


def test_an_image_that_its_host_cannot_run(cloud):
    s = cloud.boot()
    before = s.row
    rebuild(s, another_image(cloud, hw_architecture="sparc"))
    assert (s.status, s.row.image) == ("ERROR", before.image)
    assert s.show()["fault"]["message"].startswith("No valid host was found")
    assert s.state.machines[s.id].machine.disks[0].source.image_id == cloud.image_id
    rebuild(s)
    assert s.status == "ACTIVE"


def test_a_disabled_host_rebuilds_what_it_has(cloud):
    s = cloud.boot()
    for one in cloud.json("GET", "/os-services?binary=nova-compute", token=cloud.admin)["services"]:
        cloud.json("PUT", f"/os-services/{one['id']}", {"status": "disabled"}, token=cloud.admin)
    rebuild(s, another_image(cloud))
    assert s.status == "ACTIVE"


def test_a_host_that_refuses_is_an_error_and_it_can_be_tried_again(cloud):
    s = cloud.boot()
    cloud.driver(s.row.host).options = options.Sim(failure_rate=1.0)
    rebuild(s)
    assert (s.status, s.events()[-1]) == ("ERROR", ("compute_rebuild_instance", "Error"))
    cloud.driver(s.row.host).options = options.Sim()
    rebuild(s)
    assert s.status == "ACTIVE"


def test_a_delete_overtakes_it(cloud):
    for n in range(5):
        s = cloud.boot(f"s{n}")
        rebuild(s, settle=False)
        for _ in range(n):
            cloud.step()
        s.delete()
        assert s.row.vm_state == "deleted"
        assert cloud.check() == []


def test_no_password_where_none_is_shown(tmp_path):
    config = msgspec.structs.replace(options.Config(), api=options.Api(enable_instance_password=False))
    with telling(tmp_path, config=config) as cloud:
        assert "adminPass" not in rebuild(cloud.boot())
