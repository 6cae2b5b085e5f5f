"""Images of servers: what they hold, what is said of them, and that nothing is left where one does not come to be."""

import msgspec
import pytest

from kilonova.kit.bus import opened
from kilonova.model import options
from kilonova.model.capture import MARK
from kilonova.store import servers
from kilonova.virt.sim_disk import facts
from tests.cloud.test_volume_boot import boot, made, of_image, of_volume
from tests.stories import Crash, telling


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def images(cloud, **filters):
    said = "&".join(f"{k}={v}" for k, v in filters.items())
    return cloud.services.json("GET", f"/image/v2/images?{said}", token=cloud.admin)["images"]


def image(cloud, id, token=None):
    return cloud.services.json("GET", f"/image/v2/images/{id}", token=token or cloud.user.token)


def bytes_of(cloud, id):
    return cloud.services.ask("GET", f"/image/v2/images/{id}/file", token=cloud.user.token).read()


def snapshot(s, name="snap", **more):
    settle = more.pop("settle", True)
    return s.act("createImage", {"name": name, **more}, settle=settle)["image_id"]


# ---- createImage


def test_a_snapshot_is_an_image(cloud):
    s = cloud.boot("one")
    id = snapshot(s, metadata={"why": "because"})
    made = image(cloud, id)
    assert (made["status"], made["name"], made["visibility"], made["disk_format"]) == (
        "active",
        "snap",
        "private",
        "raw",
    )
    assert (made["owner"], made["min_disk"], made["min_ram"]) == (cloud.user.project_id, 1, 0)
    told = {k: made[k] for k in ("image_type", "instance_uuid", "base_image_ref", "user_id", "owner_id", "why")}
    assert told == {
        "image_type": "snapshot",
        "instance_uuid": s.id,
        "base_image_ref": cloud.image_id,
        "user_id": cloud.user.id,
        "owner_id": cloud.user.project_id,
        "why": "because",
    }
    held = facts(bytes_of(cloud, id))
    assert (held.server, held.image) == (s.id, cloud.image_id)
    assert (s.status, s.row.task_state) == ("ACTIVE", None)
    assert s.events()[-1] == ("compute_snapshot_instance", "Success")
    assert len(s.events()) == 2


def test_a_server_is_made_of_a_snapshot(cloud):
    id = snapshot(cloud.boot("one"))
    two = cloud.boot("two", imageRef=id)
    assert two.status == "ACTIVE"
    assert image(cloud, snapshot(two))["base_image_ref"] == cloud.image_id


@pytest.mark.parametrize("action", ["os-stop", "pause", "suspend"])
def test_it_stays_as_it_was(cloud, action):
    s = cloud.boot()
    s.act(action)
    before = s.row
    assert image(cloud, snapshot(s))["status"] == "active"
    assert (s.row.vm_state, s.row.power_state) == (before.vm_state, before.power_state)


def test_what_is_on_the_way_is_seen(cloud):
    s = cloud.boot()
    id = snapshot(s, settle=False)
    seen = []
    while cloud.bus.letters or cloud.woken:
        if (state := s.row.task_state) not in seen:
            seen.append(state)
        cloud.step()
    assert seen == ["image_snapshot_pending", "image_snapshot", "image_uploading"]
    assert image(cloud, id)["status"] == "active"


def test_until_2_44_it_is_told_by_its_address(cloud):
    s = cloud.boot()
    path = f"/compute/v2.1/servers/{s.id}/action"
    answer = cloud.services.ask("POST", path, {"createImage": {"name": "old"}}, cloud.user.token)
    assert (answer.status, answer.read()) == (202, b"")
    cloud.settle()
    assert image(cloud, answer.headers["location"].rsplit("/", 1)[1])["name"] == "old"


def test_it_is_refused_before_anything_is_made(cloud):
    s = cloud.boot()
    s.act("os-stop", settle=False)
    s.act("createImage", {"name": "x"}, ok=409)
    assert images(cloud, image_type="snapshot") == []
    other = cloud.services.person("bob", "member")
    cloud.json("POST", f"/servers/{s.id}/action", {"createImage": {"name": "x"}}, ok=404, token=other.token)
    assert images(cloud, image_type="snapshot") == []


def test_who_comes_second_leaves_no_image(cloud):
    """The state was good when it was looked at, and another took the server before the claim."""
    s = cloud.boot()
    create = cloud.neighbours.image.create

    def slow(*args, **wish):
        made = create(*args, **wish)
        cloud.neighbours.image.create = create
        s.act("pause", settle=False)
        return made

    cloud.neighbours.image.create = slow
    s.act("createImage", {"name": "x"}, ok=409)
    assert images(cloud, image_type="snapshot") == []


def test_an_image_whose_asker_died_is_swept(cloud):
    s = cloud.boot()
    begin = cloud.db.run

    def dies(*args):
        raise Crash

    api = cloud.api.world.db
    api.run = dies
    try:
        with pytest.raises(Crash):
            s.act("createImage", {"name": "x"})
    finally:
        api.run = begin
    (left,) = images(cloud, image_type="snapshot")
    assert left["status"] == "queued"
    assert cloud.check()
    cloud.clock.sleep(300)
    assert cloud.mend("unfinished") == [f"image {left['id']} had no bytes, and nobody was bringing them"]
    assert images(cloud, image_type="snapshot") == []


def test_a_host_that_refuses_leaves_nothing(cloud):
    s = cloud.boot()
    cloud.driver(s.row.host).options = options.Sim(failure_rate=1.0)
    snapshot(s)
    assert images(cloud, image_type="snapshot") == []
    assert (s.status, s.row.task_state, s.events()[-1]) == ("ACTIVE", None, ("compute_snapshot_instance", "Error"))


def test_an_image_that_its_owner_deletes_meanwhile(cloud):
    s = cloud.boot()
    id = snapshot(s, settle=False)
    cloud.services.ask("DELETE", f"/image/v2/images/{id}", token=cloud.user.token).read()
    cloud.settle()
    assert (s.status, s.row.task_state) == ("ACTIVE", None)
    assert images(cloud) and not s.state.captures


def test_a_delete_overtakes_it(cloud):
    for n in range(6):
        s = cloud.boot(f"s{n}")
        snapshot(s, settle=False)
        for _ in range(n):
            cloud.step()
        s.delete()
        assert s.row.vm_state == "deleted"
        assert cloud.check() == []


def test_a_copy_on_a_host_that_was_gone_is_swept(cloud):
    s = cloud.boot()
    cloud.bus.lose = lambda to, raw: opened(raw).name == "Upload"
    snapshot(s, settle=False)
    cloud.tick()
    state = s.state
    assert list(state.captures)
    cloud.dead.add(s.row.host)
    cloud.settle()
    assert (s.status, s.row.task_state) == ("ACTIVE", None)
    cloud.bus.lose = lambda to, raw: False
    cloud.dead.clear()
    cloud.settle()
    assert state.captures == {}


def test_what_is_true_of_one_image_only_is_not_inherited(cloud):
    wish = {"name": "x", "disk_format": "qcow2", "container_format": "bare", "visibility": "public"}
    more = {"hw_disk_bus": "virtio", "img_signature": "abc", "os_type": "linux"}
    made = cloud.services.json("POST", "/image/v2/images", wish | more, cloud.admin, ok=201)
    path = f"/image/v2/images/{made['id']}/file"
    from kilonova.virt.sim_disk import qcow2

    cloud.services.ask("PUT", path, qcow2(bytes(512)), cloud.admin, Content_Type="application/octet-stream").read()
    s = cloud.boot(imageRef=made["id"])
    got = image(cloud, snapshot(s))
    assert (got["hw_disk_bus"], got["os_type"], got["disk_format"]) == ("virtio", "linux", "qcow2")
    assert "img_signature" not in got
    assert got["virtual_size"] % 512 == 0
    assert facts(bytes_of(cloud, got["id"])).server == s.id
    assert MARK not in s.show()


def test_metadata_has_a_limit_until_2_38(tmp_path):
    config = msgspec.structs.replace(options.Config(), quota=options.Quota(metadata_items=1))
    with telling(tmp_path, config=config) as cloud:
        s = cloud.boot()
        body = {"createImage": {"name": "x", "metadata": {"a": "1", "b": "2"}}}
        cloud.json("POST", f"/servers/{s.id}/action", body, ok=403, version="2.38")
        cloud.json("POST", f"/servers/{s.id}/action", body, ok=202, version="2.39")


# ---- createBackup


def backup(s, name, rotation, kind="daily"):
    return s.act("createBackup", {"name": name, "backup_type": kind, "rotation": rotation})


def test_backups_rotate(cloud):
    s, other = cloud.boot(), cloud.boot("other")
    backup(other, "of-another", 2)
    backup(s, "weekly", 2, "weekly")
    for n in range(4):
        backup(s, f"b{n}", 2)
    assert sorted(i["name"] for i in images(cloud, image_type="backup")) == ["b2", "b3", "of-another", "weekly"]
    made = images(cloud, name="b3")[0]
    assert (made["backup_type"], made["status"]) == ("daily", "active")
    assert s.events()[-1] == ("compute_backup_instance", "Success")
    assert s.status == "ACTIVE"


def test_with_no_rotation_none_is_kept(cloud):
    s = cloud.boot()
    backup(s, "b", "0")
    assert images(cloud, image_type="backup") == []


def test_another_projects_image_is_no_backup(cloud):
    """Anybody can write that an image is a backup of somebody's server."""
    s = cloud.boot()
    bob = cloud.services.person("bob", "member")
    about = {"image_type": "backup", "backup_type": "daily", "instance_uuid": s.id, "visibility": "community"}
    wish = {"name": "trap", "disk_format": "raw", "container_format": "bare", **about}
    trap = cloud.services.json("POST", "/image/v2/images", wish, bob.token, ok=201)["id"]
    path = f"/image/v2/images/{trap}/file"
    cloud.services.ask("PUT", path, b"\0" * 512, bob.token, Content_Type="application/octet-stream").read()
    backup(s, "b", 0)
    assert image(cloud, trap, bob.token)["status"] == "active"


# ---- where the root disk is a volume


def snapshots(cloud):
    said = cloud.services.json("GET", "/volume/v3/snapshots/detail?all_tenants=1", token=cloud.admin)["snapshots"]
    return [(s["volume_id"], s["status"], s["metadata"]) for s in said]


def on_volumes(cloud):
    return boot(cloud, of_image(cloud, delete_on_termination=True), of_volume(made(cloud, 2), boot_index=None))


def test_an_image_of_volumes_is_booted_from(cloud):
    s = on_volumes(cloud)
    root, data = (d.volume_id for d in s.row.devices)
    id = snapshot(s, metadata={"why": "because"})
    shown = image(cloud, id)
    assert (shown["status"], shown["size"], shown["bdm_v2"], shown["why"]) == ("active", 0, "True", "because")
    assert (shown["root_device_name"], shown["image_type"], s.status) == ("/dev/vda", "snapshot", "ACTIVE")
    told = msgspec.json.decode(shown["block_device_mapping"])
    assert [(m["source_type"], m["destination_type"], m.get("boot_index"), m["volume_size"]) for m in told] == [
        ("snapshot", "volume", 0, 1),
        ("snapshot", "volume", None, 2),
    ]
    assert snapshots(cloud) in ([(root, "available", {}), (data, "available", {})], [(data, "available", {}), (root, "available", {})])  # fmt: skip
    assert s.events()[-1] == ("api_snapshot_instance", "Success")
    two = cloud.boot("two", imageRef=id)
    assert (two.status, two.row.volume_backed, len(two.row.devices)) == ("ACTIVE", True, 2)
    assert not {d.volume_id for d in two.row.devices} & {root, data}
    assert [d.size for d in two.row.devices] == [1, 2]
    two.act("createBackup", {"name": "b", "backup_type": "daily", "rotation": 1}, ok=400)


def test_a_quota_that_is_full_leaves_neither_image_nor_snapshots(cloud):
    s = on_volumes(cloud)
    body = {"quota_set": {"snapshots": 1}}
    cloud.services.json("PUT", f"/volume/v3/os-quota-sets/{cloud.user.project_id}", body, cloud.admin)
    cloud.json("POST", f"/servers/{s.id}/action", {"createImage": {"name": "x"}}, ok=403)
    cloud.pass_time(300)
    assert (s.status, images(cloud, image_type="snapshot"), snapshots(cloud)) == ("ACTIVE", [], [])


def test_who_asked_for_one_of_volumes_and_died_leaves_nothing(cloud):
    s = on_volumes(cloud)
    begin = servers.begin

    class Dead(BaseException):
        pass

    def die(*_):
        raise Dead

    servers.begin = die
    try:
        with pytest.raises(Dead):
            cloud.json("POST", f"/servers/{s.id}/action", {"createImage": {"name": "x"}})
    finally:
        servers.begin = begin
    assert (len(images(cloud, image_type="snapshot")), len(snapshots(cloud))) == (1, 2)
    cloud.pass_time(400)
    assert (s.status, images(cloud, image_type="snapshot"), snapshots(cloud)) == ("ACTIVE", [], [])


def test_a_delete_overtakes_one_of_volumes(cloud):
    s = on_volumes(cloud)
    s.act("createImage", {"name": "x"}, settle=False)
    s.delete()
    assert s.row.vm_state == "deleted"
    assert images(cloud, image_type="snapshot") == []


def test_a_guest_that_must_hold_still_is_not_copied_while_it_runs(cloud):
    wish = {"name": "q", "disk_format": "raw", "container_format": "bare", "os_require_quiesce": "yes"}
    id = cloud.services.json("POST", "/image/v2/images", wish | {"visibility": "public"}, cloud.admin, ok=201)["id"]
    path = f"/image/v2/images/{id}/file"
    cloud.services.ask("PUT", path, b"\0" * 512, cloud.admin, Content_Type="application/octet-stream").read()
    for s in (cloud.boot("one", imageRef=id), boot(cloud, of_image(cloud) | {"uuid": id})):
        said = cloud.json("POST", f"/servers/{s.id}/action", {"createImage": {"name": "x"}}, ok=400)
        assert said["badRequest"]["message"].startswith(f"Quiescing is not supported in instance {s.id}")
        s.act("os-stop")
        assert image(cloud, snapshot(s))["status"] == "active"
