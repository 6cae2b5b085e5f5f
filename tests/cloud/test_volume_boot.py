"""Servers that boot from volumes, and other block device mappings: what is made, reserved, shown, and what is left."""

import msgspec
import pytest

from kilonova.companions import volume
from kilonova.store import block_devices, placement
from tests.stories import telling


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def made(cloud, size=1, token="", **more):
    wish = {"size": size, **more}
    said = cloud.services.json("POST", "/volume/v3/volumes", {"volume": wish}, token or cloud.user.token, ok=202)
    return said["volume"]["id"]


def seen(cloud, id):
    return cloud.services.json("GET", f"/volume/v3/volumes/{id}", token=cloud.admin)["volume"]


def volumes(cloud):
    listed = cloud.services.json("GET", "/volume/v3/volumes/detail?all_tenants=1", token=cloud.admin)["volumes"]
    return {v["id"]: v["status"] for v in listed}


def boot(cloud, *devices, image=None, ok=202, version="2.96", **more):
    """The server; or what is said against it."""
    wish = {"name": "one", "flavorRef": "small", "imageRef": image, "networks": "none"}
    wish |= {"block_device_mapping_v2": list(devices)} | more
    wish = {k: v for k, v in wish.items() if v is not None}
    if int(version[2:]) < 37:
        wish.pop("networks")
    said = cloud.json("POST", "/servers", {"server": wish}, ok=ok, version=version)
    if ok != 202:
        return next(iter(said.values()))["message"]
    s = cloud.handle(said["server"]["id"])
    cloud.settle()
    return s


def of_volume(id, **more):
    return {"boot_index": 0, "uuid": id, "source_type": "volume", "destination_type": "volume"} | more


def of_image(cloud, size=1, **more):
    return {
        "boot_index": 0,
        "uuid": cloud.image_id,
        "source_type": "image",
        "destination_type": "volume",
        "volume_size": size,
    } | more


def local_image(cloud):
    return {"boot_index": 0, "uuid": cloud.image_id, "source_type": "image", "destination_type": "local"}


def claimed(tx, s):
    (found,) = placement.allocations_of(tx, s.id).values()
    return found


def disks(s):
    return [(d.device, type(d.source).__name__, d.size_bytes >> 30) for d in s.state.machines[s.id].machine.disks]


# ---- what is made


def test_a_server_boots_from_a_volume(cloud):
    id = made(cloud, imageRef=cloud.image_id)
    s = boot(cloud, of_volume(id))
    shown = s.show()
    assert (shown["status"], shown["image"]) == ("ACTIVE", "")
    assert shown["os-extended-volumes:volumes_attached"] == [{"id": id, "delete_on_termination": False}]
    assert shown["OS-EXT-SRV-ATTR:root_device_name"] == "/dev/vda"
    (a,) = seen(cloud, id)["attachments"]
    assert (a["server_id"], a["device"], a["host_name"]) == (s.id, "/dev/vda", s.row.host)
    assert seen(cloud, id)["status"] == "in-use"
    (disk,) = s.state.machines[s.id].machine.disks
    assert (disk.device, disk.boot_index, disk.serial) == ("vda", 0, id)
    assert disk.source.connection_info["driver_volume_type"] == "local"
    with cloud.db.read() as tx:
        assert claimed(tx, s) == {"VCPU": 1, "MEMORY_MB": 512}
    s.delete()
    assert volumes(cloud) == {id: "available"}


def test_volumes_are_made_of_images_snapshots_and_nothing(cloud):
    first = made(cloud, imageRef=cloud.image_id)
    snapshot = cloud.services.json(
        "POST", "/volume/v3/snapshots", {"snapshot": {"volume_id": first}}, cloud.user.token, ok=202
    )["snapshot"]["id"]
    s = boot(
        cloud,
        of_image(cloud, 2, delete_on_termination=True),
        {"uuid": snapshot, "source_type": "snapshot", "destination_type": "volume", "delete_on_termination": True},
        {"source_type": "blank", "destination_type": "volume", "volume_size": 3},
    )
    assert [(d[0], d[1], d[2]) for d in disks(s)] == [
        ("vda", "VolumeSource", 2),
        ("vdb", "VolumeSource", 1),
        ("vdc", "VolumeSource", 3),
    ]
    attached = s.show()["os-extended-volumes:volumes_attached"]
    assert [a["delete_on_termination"] for a in attached] == [True, True, False]
    assert [seen(cloud, a["id"])["metadata"] for a in attached] == [{"attached_mode": "rw"}] * 3
    assert seen(cloud, attached[0]["id"])["os-vol-tenant-attr:tenant_id"] == s.row.project_id
    s.delete()
    assert volumes(cloud) == {first: "available", attached[2]["id"]: "available"}
    cloud.services.json("DELETE", f"/volume/v3/snapshots/{snapshot}", token=cloud.admin, ok=202)


def test_a_volume_that_takes_long_is_waited_for(cloud):
    cloud.services.volumes.held = True
    wish = {"name": "one", "flavorRef": "small", "networks": "none"}
    wish |= {"block_device_mapping_v2": [of_image(cloud, delete_on_termination=True)]}
    said = cloud.json("POST", "/servers", {"server": wish}, ok=202)
    s = cloud.handle(said["server"]["id"])
    for _ in range(30):
        cloud.step()
    assert (s.row.task_state, list(volumes(cloud).values())) == ("block_device_mapping", ["downloading"])
    cloud.services.volumes.held = False
    volume.resume(cloud.services.volumes)
    cloud.settle()
    assert s.status == "ACTIVE"
    s.delete()
    assert volumes(cloud) == {}


def test_a_volume_that_cannot_be_made_is_said(cloud):
    cloud.services.volumes.held = True
    wish = {"name": "one", "flavorRef": "small", "networks": "none"}
    wish |= {"block_device_mapping_v2": [of_image(cloud)]}
    s = cloud.handle(cloud.json("POST", "/servers", {"server": wish}, ok=202)["server"]["id"])
    (id,) = volumes(cloud)
    cloud.services.json(
        "POST", f"/volume/v3/volumes/{id}/action", {"os-reset_status": {"status": "error"}}, cloud.admin, ok=202
    )
    cloud.services.volumes.held = False
    cloud.settle()
    assert (s.status, s.show()["fault"]["message"]) == (
        "ERROR",
        f"Volume {id} did not finish being created: it is in status error.",
    )
    for _ in "ab":  # the making that was never begun stands in the way of the end
        volume.resume(cloud.services.volumes)
    assert volumes(cloud) == {}
    s.delete()


def test_where_no_host_is_nothing_is_left(cloud):
    mine = made(cloud, imageRef=cloud.image_id)
    s = boot(
        cloud,
        of_volume(mine),
        {"source_type": "blank", "destination_type": "volume", "volume_size": 1},
        flavorRef="huge",
    )
    assert s.status == "ERROR"
    assert volumes(cloud) == {mine: "available"}
    assert s.show()["os-extended-volumes:volumes_attached"] == [{"id": mine, "delete_on_termination": False}]
    assert cloud.json("GET", f"/servers/{s.id}/os-volume_attachments")["volumeAttachments"] == []
    s.delete()


def test_the_next_host_gets_another_attachment(cloud):
    mine = made(cloud, imageRef=cloud.image_id)
    for name, state in cloud.states.items():
        state.broken = name != "h2"
    s = boot(cloud, of_volume(mine))
    for state in cloud.states.values():
        state.broken = False
    assert (s.status, s.row.host) == ("ACTIVE", "h2")
    (a,) = seen(cloud, mine)["attachments"]
    assert (a["host_name"], a["attachment_id"]) == ("h2", s.row.devices[0].attachment_id)
    s.delete()


def test_a_root_device_is_described_beside_an_image(cloud):
    """As clients do: the image's own disk is one of the mappings, and is nothing that we would have to remember."""
    s = boot(cloud, local_image(cloud), image=cloud.image_id)
    assert (s.row.devices, s.show()["image"]["id"]) == ([], cloud.image_id)
    s.delete()
    mine = made(cloud)
    s = boot(cloud, local_image(cloud), of_volume(mine, boot_index=-1, tag="data"), image=cloud.image_id)
    assert [d[:2] for d in disks(s)] == [("vda", "ImageSource"), ("vdb", "VolumeSource")]
    assert s.state.machines[s.id].machine.disks[1].tag == "data"
    with cloud.db.read() as tx:
        assert claimed(tx, s)["DISK_GB"] == 1
    s.delete()


def test_several_servers_get_a_volume_each(cloud):
    said = cloud.json(
        "POST",
        "/servers",
        {
            "server": {
                "name": "many",
                "flavorRef": "small",
                "networks": "none",
                "max_count": 3,
                "block_device_mapping_v2": [of_image(cloud, delete_on_termination=True)],
            }
        },
        ok=202,
    )
    cloud.settle()
    assert list(volumes(cloud).values()) == ["in-use"] * 3
    found = cloud.json("GET", "/servers/detail")["servers"]
    assert len({s["os-extended-volumes:volumes_attached"][0]["id"] for s in found}) == 3
    assert said["server"]["id"] in {s["id"] for s in found}
    for s in found:
        cloud.handle(s["id"]).delete()
    assert volumes(cloud) == {}


def test_the_older_words_mean_the_same(cloud):
    mine = made(cloud, imageRef=cloud.image_id)
    wish = {"name": "old", "flavorRef": "small"}
    wish |= {"block_device_mapping": [{"device_name": "vda", "volume_id": mine, "delete_on_termination": "1"}]}
    s = cloud.handle(cloud.json("POST", "/os-volumes_boot", {"server": wish}, ok=202, version="2.1")["server"]["id"])
    cloud.settle()
    assert (s.status, s.row.volume_backed) == ("ACTIVE", True)
    shown = cloud.json("GET", f"/os-volumes_boot/{s.id}", version="2.2")["server"]
    assert shown["os-extended-volumes:volumes_attached"] == [{"id": mine}]
    cloud.json("GET", f"/os-volumes_boot/{s.id}", version="2.103", ok=404)
    s.delete()
    assert volumes(cloud) == {}


def test_an_image_may_bring_its_mapping(cloud):
    """As those that were taken of volume-backed servers."""
    first = made(cloud, imageRef=cloud.image_id)
    snapshot = cloud.services.json(
        "POST", "/volume/v3/snapshots", {"snapshot": {"volume_id": first}}, cloud.user.token, ok=202
    )["snapshot"]["id"]
    told = {"source_type": "snapshot", "destination_type": "volume", "snapshot_id": snapshot, "boot_index": 0}
    told |= {"delete_on_termination": True, "device_name": "/dev/vda", "volume_size": 2}
    mapping = msgspec.json.encode([told]).decode()
    wish = {"name": "of volumes", "disk_format": "raw", "container_format": "bare", "visibility": "public"}
    image = cloud.services.json(
        "POST",
        "/image/v2/images",
        wish | {"block_device_mapping": mapping, "bdm_v2": "True"},
        cloud.admin,
        ok=201,
    )["id"]
    cloud.services.ask(
        "PUT", f"/image/v2/images/{image}/file", b"", cloud.admin, Content_Type="application/octet-stream"
    ).read()
    s = boot(cloud, local_image(cloud) | {"uuid": image}, image=image)
    assert (s.status, s.show()["image"]) == ("ACTIVE", "")
    assert disks(s) == [("vda", "VolumeSource", 2)]
    s.delete()
    assert volumes(cloud) == {first: "available"}
    cloud.services.json("DELETE", f"/volume/v3/snapshots/{snapshot}", token=cloud.admin, ok=202)


def test_local_disks_are_as_they_are_described(cloud):
    body = {"flavor": {"name": "local", "id": "local", "vcpus": 1, "ram": 64, "disk": 1, "swap": 64}}
    body["flavor"]["OS-FLV-EXT-DATA:ephemeral"] = 4
    cloud.json("POST", "/flavors", body, token=cloud.admin)
    blank = {"source_type": "blank", "destination_type": "local"}
    s = boot(
        cloud,
        local_image(cloud),
        blank | {"volume_size": 4, "guest_format": "xfs"},
        image=cloud.image_id,
        flavorRef="local",
    )
    assert [d[0] for d in disks(s)] == ["vda", "vdb", "vdc"]
    assert [d.source.format for d in s.state.machines[s.id].machine.disks[1:]] == ["xfs", "swap"]
    s.delete()
    said = boot(cloud, local_image(cloud), blank | {"volume_size": 5}, image=cloud.image_id, flavorRef="local", ok=400)
    assert said.startswith("Ephemeral disks requested are larger than the instance type allows.")
    swap = blank | {"guest_format": "swap", "volume_size": 65}
    said = boot(cloud, local_image(cloud), swap, image=cloud.image_id, flavorRef="local", ok=400)
    assert said == "Swap drive requested is larger than instance type allows."
    small = [blank | {"volume_size": 1}] * 3
    said = boot(cloud, local_image(cloud), *small, image=cloud.image_id, flavorRef="local", ok=400)
    assert said == "Block Device Mapping is Invalid: You specified more local devices than the limit allows"


# ---- what is refused

SEQUENCE = "Block Device Mapping is Invalid: Boot sequence for the instance and image/block device mapping combination is not valid."
NOBODY = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"
BLANK = {"source_type": "blank", "destination_type": "volume", "volume_size": 1}
REFUSED = [
    ([BLANK], SEQUENCE),
    ([BLANK | {"boot_index": 1}], SEQUENCE),
    ([BLANK | {"boot_index": 0}, BLANK | {"boot_index": 0}], SEQUENCE),
    ([BLANK | {"boot_index": 0, "uuid": NOBODY}], "Block Device Mapping is Invalid: Invalid device UUID."),
    ([{"source_type": "volume", "boot_index": 0}], "Block Device Mapping is Invalid: Missing device UUID."),
    (
        [{"source_type": "volume", "boot_index": 0, "uuid": NOBODY}],
        f"Block Device Mapping is Invalid: failed to get volume {NOBODY}.",
    ),
    (
        [{"source_type": "snapshot", "boot_index": 0, "uuid": NOBODY}],
        f"Block Device Mapping is Invalid: failed to get snapshot {NOBODY}.",
    ),
    (
        [{"source_type": "image", "destination_type": "volume", "boot_index": 0, "uuid": NOBODY, "volume_size": 1}],
        f"Block Device Mapping is Invalid: failed to get image {NOBODY}.",
    ),
    (
        [{"source_type": "image", "destination_type": "local", "boot_index": 0, "uuid": NOBODY}],
        "Block Device Mapping is Invalid: Mapping image to local is not supported.",
    ),
    (
        [{"source_type": "volume", "destination_type": "local", "boot_index": 0, "uuid": NOBODY}],
        "Block Device Mapping is Invalid: Mapping volume to local is not supported.",
    ),
    (
        [{"source_type": "blank", "destination_type": "volume", "boot_index": 0}],
        "Blank volumes (source: 'blank', dest: 'volume') need to have non-zero size",
    ),
    (
        [BLANK | {"boot_index": 0, "disk_bus": "wire"}],
        "Block Device Mapping is Invalid: wire is not a disk_bus that servers can have here.",
    ),
    (
        [BLANK | {"boot_index": 0, "destination_type": "local", "volume_type": "x"}],
        "Block Device Mapping is Invalid: Specifying a volume_type with destination_type=local is not supported.",
    ),
]


@pytest.mark.parametrize("n", range(len(REFUSED)))
def test_what_makes_no_sense_is_refused(tmp_path, n):
    """And nothing was reserved or made for it."""
    devices, said = REFUSED[n]
    with telling(tmp_path) as cloud:
        assert boot(cloud, *devices, ok=400) == said
        assert volumes(cloud) == {}


def test_what_is_not_free_is_refused(cloud):
    mine, empty = made(cloud, imageRef=cloud.image_id), made(cloud)
    s = boot(cloud, of_volume(mine))
    said = boot(cloud, of_volume(mine), ok=400)
    assert said == f"Invalid volume: volume '{mine}' status must be 'available'. Currently in 'in-use'"
    assert boot(cloud, of_volume(empty), ok=400) == f"Block Device {empty} is not bootable."
    both = {"min_count": 2}
    assert boot(cloud, of_volume(empty), ok=400, **both) == "Cannot attach one or more volumes to multiple instances"
    bob = cloud.services.person("bob", "member").token
    others = made(cloud, token=bob, imageRef=cloud.image_id)
    assert boot(cloud, of_volume(others), ok=400).endswith(f"failed to get volume {others}.")
    old = {"block_device_mapping": [{"volume_id": empty}]}
    assert "syntaxes" in boot(cloud, of_volume(empty), ok=400, **old)
    cloud.json(
        "POST", "/servers", {"server": {"name": "n", "flavorRef": "small", "networks": "none"}}, ok=400
    )  # neither
    s.delete()


def test_a_quota_that_is_full_leaves_nothing(cloud):
    """Volumes are made for as many servers as there is room for, and given back when one more thing is in the way."""
    project = cloud.user.project_id
    cloud.json("PUT", f"/os-quota-sets/{project}", {"quota_set": {"instances": 2}}, token=cloud.admin)
    wish = {"name": "q", "flavorRef": "small", "networks": "none", "min_count": 1, "max_count": 5}
    wish |= {"block_device_mapping_v2": [of_image(cloud, delete_on_termination=True)]}
    cloud.json("POST", "/servers", {"server": wish}, ok=202)
    cloud.settle()
    assert list(volumes(cloud).values()) == ["in-use"] * 2
    cloud.json("POST", "/servers", {"server": wish}, ok=403)
    assert len(volumes(cloud)) == 2
    limit = {"quota_set": {"volumes": 2}}
    cloud.services.json("PUT", f"/volume/v3/os-quota-sets/{project}", limit, cloud.admin)
    cloud.json("PUT", f"/os-quota-sets/{project}", {"quota_set": {"instances": 9}}, token=cloud.admin)
    said = cloud.json("POST", "/servers", {"server": wish}, ok=403)
    assert "olume" in said["forbidden"]["message"]
    assert len(volumes(cloud)) == 2
    for s in cloud.json("GET", "/servers")["servers"]:
        cloud.handle(s["id"]).delete()


def test_a_request_that_dies_gives_back_what_it_took(cloud):
    """It had reserved one volume and made another; then its process was no more."""
    mine = made(cloud, imageRef=cloud.image_id)
    wish = {"name": "one", "flavorRef": "small", "networks": "none"}
    wish |= {"block_device_mapping_v2": [of_volume(mine), BLANK]}
    keep = block_devices.keep

    class Dead(BaseException):
        pass

    def die(*_):
        raise Dead

    block_devices.keep = die
    try:
        with pytest.raises(Dead):
            cloud.json("POST", "/servers", {"server": wish}, ok=202)
    finally:
        block_devices.keep = keep
    assert sorted(volumes(cloud).values()) == ["available", "reserved"]
    cloud.pass_time(300)
    assert volumes(cloud) == {mine: "available"}


# ---- what becomes of one that boots from a volume


def attachments(cloud, id):
    return [(a["server_id"], a["host_name"]) for a in seen(cloud, id)["attachments"]]


def act(s, action, said=None, ok=202, version="2.96"):
    told = s.cloud.json("POST", f"/servers/{s.id}/action", {action: said}, ok=ok, version=version)
    s.cloud.settle()
    return told


def image(cloud, **more):
    wish = {"name": "other", "disk_format": "raw", "container_format": "bare", "visibility": "public", **more}
    id = cloud.services.json("POST", "/image/v2/images", wish, cloud.admin, ok=201)["id"]
    path = f"/image/v2/images/{id}/file"
    cloud.services.ask("PUT", path, b"\1" * 512, cloud.admin, Content_Type="application/octet-stream").read()
    return id


def test_it_is_shelved_without_an_image_and_comes_back_with_its_volumes(cloud):
    data = made(cloud)
    s = boot(cloud, of_image(cloud), of_volume(data, boot_index=None))
    root = s.row.devices[0].volume_id
    act(s, "shelve")
    assert (s.status, s.row.host, list(cloud.neighbours.image.list(image_type="snapshot"))) == (
        "SHELVED_OFFLOADED",
        None,
        [],
    )
    assert {seen(cloud, id)["status"] for id in (root, data)} == {"reserved"}
    assert cloud.check() == []
    act(s, "unshelve")
    assert (s.status, attachments(cloud, root)) == ("ACTIVE", [(s.id, s.row.host)])
    assert [d.source.volume_id for d in s.state.machines[s.id].machine.disks] == [root, data]
    assert {seen(cloud, id)["status"] for id in (root, data)} == {"in-use"}


def test_it_is_rebuilt_on_the_same_volume(cloud):
    """Its own image leaves the volume as it is; another is written over it, since 2.93."""
    s = boot(cloud, of_image(cloud))
    root, other = s.row.devices[0].volume_id, image(cloud)
    act(s, "rebuild", {"imageRef": cloud.image_id}, version="2.92")
    assert (s.status, seen(cloud, root)["volume_image_metadata"]["image_id"]) == ("ACTIVE", cloud.image_id)
    act(s, "rebuild", {"imageRef": other}, ok=400, version="2.92")
    act(s, "rebuild", {"imageRef": other})
    assert (s.status, seen(cloud, root)["volume_image_metadata"]["image_id"]) == ("ACTIVE", other)
    assert [d.volume_id for d in s.row.devices] == [root]
    assert (seen(cloud, root)["status"], attachments(cloud, root)) == ("in-use", [(s.id, s.row.host)])


def test_it_is_rescued_where_all_its_disks_stay_in_their_places(cloud):
    s = boot(cloud, of_image(cloud))
    root = s.row.devices[0].volume_id
    stable = image(cloud, hw_rescue_device="disk", hw_rescue_bus="usb")
    act(s, "rescue", {"rescue_image_ref": cloud.image_id}, ok=400)
    act(s, "rescue", {"rescue_image_ref": stable}, ok=400, version="2.86")
    act(s, "rescue", {"rescue_image_ref": stable}, ok=200)
    assert (s.status, seen(cloud, root)["status"]) == ("RESCUE", "in-use")
    running = cloud.driver(s.row.host).running(s.id)
    assert [getattr(d.source, "volume_id", None) or d.source.image_id for d in running.disks] == [root, stable]
    act(s, "unrescue")
    running = cloud.driver(s.row.host).running(s.id)
    assert (s.status, [d.source.volume_id for d in running.disks]) == ("ACTIVE", [root])
