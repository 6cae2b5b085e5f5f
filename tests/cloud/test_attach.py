"""Volumes that come and go: attached, shown, changed, swapped, detached; volumes, devices and machines agree."""

import msgspec
import pytest

from kilonova.compute.agent import FACTS_EVERY
from kilonova.kit.bus import opened
from kilonova.model.options import Compute, Config
from kilonova.store import block_devices, volumes
from tests.cloud import tables
from tests.cloud.test_volume_boot import boot, made, of_volume, seen
from tests.stories import telling

NOBODY = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def attach(cloud, s, id, ok=200, version="2.96", token="", settle=True, **wish):
    """What is said of it; or against it."""
    body = {"volumeAttachment": {"volumeId": id, **wish}}
    said = cloud.json("POST", f"/servers/{s.id}/os-volume_attachments", body, ok=ok, version=version, token=token)
    if settle:
        cloud.settle()
    return said["volumeAttachment"] if ok == 200 else said and next(iter(said.values()))["message"]


def detach(cloud, s, id, ok=202, version="2.96", settle=True, token=""):
    said = cloud.json("DELETE", f"/servers/{s.id}/os-volume_attachments/{id}", ok=ok, version=version, token=token)
    if settle:
        cloud.settle()
    return said and next(iter(said.values()))["message"]


def change(cloud, s, at, ok=202, version="2.96", token="", settle=True, **wish):
    body = {"volumeAttachment": wish}
    path = f"/servers/{s.id}/os-volume_attachments/{at}"
    said = cloud.json("PUT", path, body, ok=ok, version=version, token=token)
    if settle:
        cloud.settle()
    return said and next(iter(said.values()))["message"]


def listed(cloud, s, version="2.96", query=""):
    return cloud.json("GET", f"/servers/{s.id}/os-volume_attachments{query}", version=version)["volumeAttachments"]


def machine(s):
    return s.state.machines[s.id].machine


def used(s):
    return [(d.device, d.serial) for d in machine(s).disks if d.serial]


# ---- attach and detach


def test_a_server_on_no_host_has_its_volumes_all_the_same(cloud):
    s = cloud.boot()
    s.act("shelve")
    cloud.settle()
    assert s.status == "SHELVED_OFFLOADED"
    id, other = made(cloud), made(cloud)
    attach(cloud, s, id)
    attach(cloud, s, other)
    assert [seen(cloud, v)["status"] for v in (id, other)] == ["in-use", "in-use"]
    assert sorted(a["volumeId"] for a in listed(cloud, s)) == sorted([id, other])
    detach(cloud, s, other)
    assert seen(cloud, other)["status"] == "available"
    s.act("unshelve")
    cloud.settle()
    assert s.status == "ACTIVE" and [serial for _, serial in used(s)] == [id]
    detach(cloud, s, id)
    assert seen(cloud, id)["status"] == "available" and used(s) == []
    cloud.check()


def test_a_volume_comes_and_goes(cloud):
    s, id = cloud.boot(networks="none"), made(cloud)
    said = attach(cloud, s, id, tag="data")
    d = s.row.devices[0]
    assert said == {
        "device": "/dev/vdb",
        "serverId": s.id,
        "volumeId": id,
        "id": id,
        "tag": "data",
        "delete_on_termination": False,
    }
    assert used(s) == [("vdb", id)] and machine(s).disks[1].tag == "data"
    assert machine(s).identity.disks == machine(s).disks
    v = seen(cloud, id)
    (a,) = v["attachments"]
    assert (v["status"], a["server_id"], a["device"], a["host_name"]) == ("in-use", s.id, "/dev/vdb", s.row.host)
    assert listed(cloud, s) == [
        {k: x for k, x in said.items() if k != "id"} | {"attachment_id": a["attachment_id"], "bdm_uuid": d.uuid}
    ]
    assert s.show()["os-extended-volumes:volumes_attached"] == [{"id": id, "delete_on_termination": False}]
    assert s.events()[-1] == ("compute_attach_volume", "Success")
    detach(cloud, s, id)
    assert (used(s), s.row.devices, seen(cloud, id)["status"]) == ([], [], "available")
    assert s.events()[-1] == ("compute_detach_volume", "Success")


def test_it_is_there_after_a_hard_reboot_and_another_life_of_the_host(cloud):
    s, id = cloud.boot(networks="none"), made(cloud)
    attach(cloud, s, id)
    s.act("reboot", {"type": "HARD"})
    s.state.power_cut()
    cloud.start_hosts()
    cloud.settle()
    assert used(s) == [("vdb", id)]
    s.act("os-stop")
    other = made(cloud)
    attach(cloud, s, other)
    detach(cloud, s, id)
    s.act("os-start")
    assert used(s) == [("vdc", other)]
    s.delete()
    assert seen(cloud, other)["status"] == "available"


def test_one_goes_with_its_server(cloud):
    s, id, other = cloud.boot(networks="none"), made(cloud), made(cloud)
    attach(cloud, s, id, delete_on_termination=True)
    attach(cloud, s, other)
    change(cloud, s, other, volumeId=other, delete_on_termination=True)
    change(cloud, s, id, volumeId=id, delete_on_termination=False)
    s.delete()
    assert seen(cloud, id)["status"] == "available"
    assert cloud.services.refused(404, "GET", f"/volume/v3/volumes/{other}", token=cloud.admin)


def test_a_volume_with_a_snapshot_outlives_its_server(cloud):
    s, id = cloud.boot(networks="none"), made(cloud)
    body = {"snapshot": {"volume_id": id}}
    snapshot = cloud.services.json("POST", "/volume/v3/snapshots", body, cloud.user.token, ok=202)["snapshot"]["id"]
    attach(cloud, s, id, delete_on_termination=True)
    s.delete()
    assert (s.row.vm_state, seen(cloud, id)["status"]) == ("deleted", "available")
    cloud.services.json("DELETE", f"/volume/v3/snapshots/{snapshot}", token=cloud.admin, ok=202)


def test_names_are_given_and_kept(cloud):
    s = cloud.boot(networks="none")
    ids = [made(cloud) for _ in range(4)]
    assert attach(cloud, s, ids[0], device="/dev/sdd")["device"] == "/dev/vdd"  # of its bus, where it was asked for
    assert attach(cloud, s, ids[1])["device"] == "/dev/vdb"
    assert attach(cloud, s, ids[2], device="/dev/vdb", ok=409) == "The supplied device path (/dev/vdb) is in use."
    assert attach(cloud, s, ids[2], device="/dev/vda", ok=409) == "The supplied device path (/dev/vda) is in use."
    assert attach(cloud, s, ids[2], device=None)["device"] == "/dev/vdc"
    assert seen(cloud, ids[3])["status"] == "available"
    detach(cloud, s, ids[1])
    assert attach(cloud, s, ids[3])["device"] == "/dev/vdb"
    assert [d["device"] for d in listed(cloud, s, query="?limit=2&offset=1")] == ["/dev/vdc", "/dev/vdb"]
    s.delete()


def test_a_host_that_refuses_leaves_nothing(cloud):
    s, id = cloud.boot(networks="none"), made(cloud)
    s.state.broken = True
    attach(cloud, s, id)
    assert (s.row.devices, used(s), seen(cloud, id)["status"], s.status) == ([], [], "available", "ACTIVE")
    assert s.events()[-1] == ("compute_attach_volume", "Error")
    s.state.broken = False
    attach(cloud, s, id)
    s.state.broken = True
    detach(cloud, s, id)
    s.state.broken = False
    assert (used(s), seen(cloud, id)["status"]) == ([("vdb", id)], "in-use")
    detach(cloud, s, id)


def test_a_guest_that_does_not_let_go_keeps_it(cloud):
    s, id = cloud.boot(networks="none"), made(cloud)
    attach(cloud, s, id)
    s.state.deaf.add(s.id)
    detach(cloud, s, id)
    assert (used(s), seen(cloud, id)["status"]) == ([("vdb", id)], "in-use")
    assert s.events()[-1] == ("compute_detach_volume", "Error")
    s.act("os-stop")
    detach(cloud, s, id)
    assert (used(s), seen(cloud, id)["status"]) == ([], "available")


def test_a_host_that_is_not_there(cloud):
    """Its guest may still write: the volume stays its own. With its server it is let go of, and the host that returns
    does so as well."""
    s, id, other = cloud.boot(networks="none"), made(cloud), made(cloud)
    attach(cloud, s, id)
    host = s.row.host
    cloud.dead.add(host)
    detach(cloud, s, id, settle=False)  # nobody knows yet
    cloud.settle()
    assert (s.row.devices[0].busy, seen(cloud, id)["status"]) == ("", "in-use")
    assert attach(cloud, s, other, ok=409) == f"The host of instance {s.id} does not answer."
    assert detach(cloud, s, id, ok=409) == f"The host of instance {s.id} does not answer."
    cloud.dead.discard(host)
    cloud.start_hosts()
    cloud.settle()
    cloud.pass_time(30)
    detach(cloud, s, id)
    assert used(s) == []


def test_delete_overtakes_attach(cloud):
    s, id = cloud.boot(networks="none"), made(cloud)
    attach(cloud, s, id, settle=False)
    s.delete()
    assert (s.row.vm_state, seen(cloud, id)["status"]) == ("deleted", "available")


def test_one_that_was_lost_while_it_was_plugged_in_is_taken_out_again(cloud):
    """By the run that plugged it in; that it would be swept away one day is another matter."""
    s, id = cloud.boot(networks="none"), made(cloud)
    cloud.bus.lose = lambda to, raw: to == "conductor" and opened(raw).name == "Answered"
    attach(cloud, s, id, settle=False)
    cloud.tick()
    assert used(s) == [("vdb", id)]
    for a in cloud.neighbours.volume.attachments(server_id=s.id):
        cloud.neighbours.volume.release(a.id)
    cloud.bus.lose = lambda to, raw: False
    cloud.go_on(120)
    assert (used(s), s.row.devices, seen(cloud, id)["status"]) == ([], [], "available")


def test_what_a_stranger_reserved_is_not_ours_to_keep(cloud):
    """Somebody asks the volume service itself for an attachment to a server that does not have the volume."""
    s, id = cloud.boot(networks="none"), made(cloud)
    cloud.neighbours.volume.reserve(id, s.id)
    assert cloud.mend("loose") != []
    assert seen(cloud, id)["status"] == "available"
    attach(cloud, s, id)
    assert cloud.mend("loose") == []
    detach(cloud, s, id)


def test_who_says_too_late_that_a_volume_leaves(cloud):
    """A conductor that stalled asks for it after the detachment was given up, and undone: the volume stays, and can go."""
    s, id = cloud.boot(networks="none"), made(cloud)
    attach(cloud, s, id)
    cloud.neighbours.volume.begin_detaching(id)
    assert cloud.mend("halfway") == [f"volume {id} was said to be leaving {s.id}"]
    assert seen(cloud, id)["status"] == "in-use" and cloud.mend("halfway") == []
    detach(cloud, s, id, settle=False)  # it is on its way now, and somebody is at it
    assert cloud.mend("halfway") == []
    cloud.settle()
    assert seen(cloud, id)["status"] == "available"


def test_what_was_led_to_another_host_too_late_is_led_back(cloud):
    """A conductor that stalled takes another's attachment for its own, and leads it to the host that it had chosen."""
    s, id = cloud.boot(networks="none"), made(cloud)
    attach(cloud, s, id)
    other = next(h for h in ("h0", "h1") if h != s.row.host)
    volume, (before,) = cloud.neighbours.volume, (d.attachment_id for d in s.row.devices)
    with cloud.db.tx() as tx:
        volumes.change(tx, volumes.Attachment, before, host=other)
    assert cloud.check()
    assert cloud.mend("astray") == [f"volume {id} of {s.id} was led to {other}"]
    assert s.row.devices[0].attachment_id != before
    assert [a.host for a in volume.show(id).attachments] == [s.row.host] and cloud.mend("astray") == []
    detach(cloud, s, id)


def test_a_volume_that_was_attached_meanwhile_takes_nobodys_place(cloud):
    """It was free when the swap was asked for, and is the server's own when its turn comes."""
    s, old, new = cloud.boot(networks="none"), made(cloud), made(cloud)
    attach(cloud, s, old)
    status = {"os-reset_status": {"migration_status": "migrating"}}
    cloud.services.json("POST", f"/volume/v3/volumes/{old}/action", status, cloud.admin, ok=202)
    path = f"/servers/{s.id}/os-volume_attachments/{old}"
    cloud.json("PUT", path, {"volumeAttachment": {"volumeId": new}}, ok=202, token=cloud.admin)
    attach(cloud, s, new, settle=False)
    cloud.settle()
    assert sorted(v for _, v in used(s)) == sorted([old, new])
    assert sorted(a["volumeId"] for a in listed(cloud, s)) == sorted([old, new])


def test_a_request_that_dies_gives_back_what_it_took(cloud):
    s, id = cloud.boot(networks="none"), made(cloud)
    keep = block_devices.keep

    class Dead(BaseException):
        pass

    def die(*_):
        raise Dead

    block_devices.keep = die
    try:
        with pytest.raises(Dead):
            attach(cloud, s, id)
    finally:
        block_devices.keep = keep
    assert seen(cloud, id)["status"] == "reserved"
    cloud.pass_time(200)
    assert seen(cloud, id)["status"] == "available"


@pytest.mark.parametrize("moved", [False, True])
def test_what_a_host_took_out_unheard_is_put_back(cloud, moved):
    """It did as it was told, and was gone before anybody heard of it: the detachment was given up, and the volume is the server's."""
    s, id = cloud.boot(), made(cloud)
    attach(cloud, s, id)
    if moved:
        cloud.json("POST", f"/servers/{s.id}/action", {"migrate": None}, ok=202, token=cloud.admin)
        cloud.settle()
        assert s.status == "VERIFY_RESIZE"
    host = s.row.host
    cloud.driver(host).detach_volume(s.id, id, 0.0, True)
    assert used(s) == []
    for _ in range(FACTS_EVERY):  # in one of them it says all
        cloud.report()
    cloud.settle()
    assert [v for _, v in used(s)] == [id]
    assert [a["volumeId"] for a in listed(cloud, s)] == [id]
    assert cloud.check() == []


def test_what_a_dead_request_promised_is_not_taken_from_the_next(cloud):
    """It died before it asked for anything; the same volume was attached by another, and stays."""
    s, id = cloud.boot(networks="none"), made(cloud)
    reserve, volumes = cloud.neighbours.volume.reserve, cloud.neighbours.volume

    class Dead(BaseException):
        pass

    def die(*_, **__):
        raise Dead

    object.__setattr__(volumes, "reserve", die)
    try:
        with pytest.raises(Dead):
            attach(cloud, s, id)
    finally:
        object.__delattr__(volumes, "reserve")
    assert reserve == volumes.reserve
    attach(cloud, s, id)
    cloud.pass_time(200)
    assert (seen(cloud, id)["status"], used(s)) == ("in-use", [("vdb", id)])
    assert cloud.check() == []
    detach(cloud, s, id)


def test_two_that_ask_for_the_same_at_once(cloud):
    """The second is told that it is not free, and takes nothing from the first."""
    s, id = cloud.boot(networks="none"), made(cloud)
    reserve, volumes = cloud.neighbours.volume.reserve, cloud.neighbours.volume

    def both(*args, **more):
        got = reserve(*args, **more)
        object.__setattr__(volumes, "reserve", reserve)
        attach(cloud, s, id, ok=400, settle=False)
        return got

    object.__setattr__(volumes, "reserve", both)
    try:
        attach(cloud, s, id)
    finally:
        object.__delattr__(volumes, "reserve")
    cloud.pass_time(200)
    assert (seen(cloud, id)["status"], used(s)) == ("in-use", [("vdb", id)])
    detach(cloud, s, id)


def test_a_request_that_comes_too_late_is_told_so(cloud):
    """Its promise was taken back while it slept; nothing is written."""
    s, id = cloud.boot(networks="none"), made(cloud)
    reserve, volumes = cloud.neighbours.volume.reserve, cloud.neighbours.volume

    def slow(*args, **more):
        got = reserve(*args, **more)
        cloud.pass_time(200)
        return got

    object.__setattr__(volumes, "reserve", slow)
    try:
        assert attach(cloud, s, id, ok=503) == "The request took too long. Try again."
    finally:
        object.__delattr__(volumes, "reserve")
    assert (s.row.devices, seen(cloud, id)["status"]) == ([], "available")
    attach(cloud, s, id)
    s.delete()


def test_a_volume_grows_under_its_guest(cloud):
    """The volume service makes it larger, and says so."""
    s, id = cloud.boot(networks="none"), made(cloud)
    attach(cloud, s, id, tag="data")
    more = {"OpenStack_API_Version": "volume 3.42"}
    body = {"os-extend": {"new_size": 3}}
    cloud.services.json("POST", f"/volume/v3/volumes/{id}/action", body, cloud.user.token, ok=202, **more)
    event = {"name": "volume-extended", "server_uuid": s.id, "tag": id}
    for _ in "ab":
        cloud.json("POST", "/os-server-external-events", {"events": [event]}, token=cloud.admin)
        cloud.settle()
    disk = machine(s).disks[1]
    assert (disk.size_bytes >> 30, disk.tag, s.row.devices[0].size) == (3, "data", 3)
    assert s.events()[-1] == ("compute_extend_volume", "Success")
    s.delete()


# ---- several servers


def test_a_volume_of_several(cloud):
    body = {"volume_type": {"name": "shared", "extra_specs": {"multiattach": "<is> True"}}}
    cloud.services.json("POST", "/volume/v3/types", body, cloud.admin)
    id = made(cloud, volume_type="shared")
    one, two = cloud.boot("one", networks="none"), cloud.boot("two", networks="none")
    old = "Volume multiattach is only supported starting with compute API version 2.60."
    assert attach(cloud, one, id, ok=400, version="2.59") == old
    attach(cloud, one, id)
    attach(cloud, two, id)
    assert machine(two).disks[1].source.connection_info["multiattach"] is True
    assert sorted(a["server_id"] for a in seen(cloud, id)["attachments"]) == sorted([one.id, two.id])
    detach(cloud, one, id)
    assert (seen(cloud, id)["status"], used(two)) == ("in-use", [("vdb", id)])
    two.delete()
    assert seen(cloud, id)["status"] == "available"


# ---- swap


def test_a_volume_takes_anothers_place(cloud):
    s, old, new, small = cloud.boot(networks="none"), made(cloud, 2), made(cloud, 3), made(cloud, 1)
    attach(cloud, s, old, tag="data", delete_on_termination=True)
    said = change(cloud, s, old, volumeId=new, token=cloud.admin, ok=409)
    assert "is not being migrated" in said
    status = {"os-reset_status": {"migration_status": "migrating"}}
    cloud.services.json("POST", f"/volume/v3/volumes/{old}/action", status, cloud.admin, ok=202)
    change(cloud, s, old, volumeId=new, ok=403)
    said = change(cloud, s, old, volumeId=small, token=cloud.admin, ok=400)
    assert said == "Invalid volume: New volume must be the same size or larger."
    assert "could not be found" in change(cloud, s, old, volumeId=NOBODY, token=cloud.admin, ok=400)
    s.state.broken = True
    change(cloud, s, old, volumeId=new, token=cloud.admin)
    s.state.broken = False
    assert (used(s), seen(cloud, old)["status"], seen(cloud, new)["status"]) == (
        [("vdb", old)],
        "in-use",
        "available",
    )
    change(cloud, s, old, volumeId=new, token=cloud.admin, version="2.1")
    assert (used(s), seen(cloud, old)["status"], seen(cloud, new)["status"]) == (
        [("vdb", new)],
        "available",
        "in-use",
    )
    (shown,) = listed(cloud, s)
    assert (shown["volumeId"], shown["tag"], shown["delete_on_termination"]) == (new, "data", True)
    assert s.events()[-1] == ("compute_swap_volume", "Success")
    s.delete()


# ---- what is refused


def test_what_cannot_be_attached(cloud):
    s, two, id = cloud.boot("one", networks="none"), cloud.boot("two", networks="none"), made(cloud)
    assert "could not be found" in attach(cloud, s, NOBODY, ok=404)
    bob = cloud.services.person("bob", "member").token
    others = made(cloud, token=bob)
    assert "could not be found" in attach(cloud, s, others, ok=404)
    attach(cloud, s, id, ok=404, token=bob)
    detach(cloud, s, id, ok=404, token=bob)
    attach(cloud, s, id)
    assert attach(cloud, s, id, ok=400) == f"Invalid volume: volume {id} already attached"
    said = attach(cloud, two, id, ok=400)
    assert said == f"Invalid volume: volume '{id}' status must be 'available'. Currently in 'in-use'"
    s.act("lock")
    cloud.json("POST", f"/servers/{s.id}/action", {"os-resetState": {"state": "error"}}, ok=202, token=cloud.admin)
    word = f"Cannot 'attach_volume' instance {s.id} while it is in vm_state error"
    assert attach(cloud, s, id, ok=409) == f"Instance {s.id} is locked"
    assert detach(cloud, s, id, ok=409) == f"Instance {s.id} is locked"
    s.act("unlock")
    assert attach(cloud, s, id, ok=409) == word
    s.delete()
    two.delete()


def test_what_cannot_be_detached(cloud):
    root = made(cloud, imageRef=cloud.image_id)
    s, id = boot(cloud, of_volume(root)), made(cloud)
    assert detach(cloud, s, root, ok=400) == "Cannot detach a root device volume"
    assert detach(cloud, s, id, ok=404) == f"No volume Block Device Mapping with id {id}."
    attach(cloud, s, id, settle=False)
    said = detach(cloud, s, id, ok=400, settle=False)
    assert said.startswith(f"Invalid volume: Unable to detach volume {id}.")
    cloud.settle()
    detach(cloud, s, id, settle=False)
    assert detach(cloud, s, id, ok=400).startswith(f"Invalid volume: Unable to detach volume {id}.")
    cloud.settle()
    assert seen(cloud, id)["status"] == "available"
    s.delete()


def test_what_cannot_be_changed(cloud):
    s, id = cloud.boot(networks="none"), made(cloud)
    attach(cloud, s, id, tag="a")
    for wrong in ({"tag": "b"}, {"device": "/dev/vdx"}, {"serverId": NOBODY}, {"id": NOBODY}):
        assert "cannot be changed" in change(cloud, s, id, ok=400, volumeId=id, **wrong)
    same = {"tag": "a", "device": "/dev/vdb", "serverId": s.id, "id": id}
    change(cloud, s, id, volumeId=id, **same)
    assert change(cloud, s, NOBODY, ok=404, volumeId=NOBODY).startswith("No volume Block Device Mapping")
    s.delete()


def test_so_many_disks_and_no_more(tmp_path):
    few = msgspec.structs.replace(Config(), compute=Compute(disks_max=2))
    with telling(tmp_path, config=few) as cloud:
        s, id, other = cloud.boot(networks="none"), made(cloud), made(cloud)
        attach(cloud, s, id)
        assert attach(cloud, s, other, ok=403).startswith("The maximum allowed number of disk devices (2)")
        s.delete()


@pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")
def test_what_is_answered_is_as_specified(cloud):
    s, id = cloud.boot(networks="none"), made(cloud)
    attach(cloud, s, id)
    for key, entry, (first, last) in tables.routes():
        if "os-volume_attachments" not in key or not isinstance(entry.get("response"), dict):
            continue
        for v in tables.changes(entry["response"], first, last):
            method, path = key.replace("{server_id}", s.id).replace("{id}", id).split()
            body = {"volumeAttachment": {"volumeId": made(cloud)}} if method == "POST" else None
            ok = 202 if body and v >= 101 else 200
            said = cloud.json(method, path, body, version=f"2.{v}", ok=ok)
            assert tables.disagreements(tables.said(entry, "response", v), said) == [], (key, v)
    cloud.settle()
    s.delete()
