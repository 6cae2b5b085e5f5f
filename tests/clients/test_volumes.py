"""Volumes with the `openstack` client as it comes from PyPI, in a real cloud. What the SDK does is in `cloud/test_volume.py`."""

import pytest

from tests.real import RealCloud

pytestmark = [pytest.mark.clients, pytest.mark.metal]


def test_a_volume_of_the_guests_image(cloud: RealCloud) -> None:
    made = cloud.json("volume create --size 1 --image kilonova-guest --property a=b first")
    rows = cloud.wait(
        lambda: [v for v in cloud.json("volume list --long") if v["Status"] == "available"], 60, "it is not available"
    )
    assert (rows[0]["Name"], rows[0]["Bootable"], rows[0]["Properties"]) == ("first", True, {"a": "b"})
    file = cloud.state / "volumes" / "volumes" / made["id"]
    with file.open("rb") as disk:
        assert disk.read(512)[510:] == b"\x55\xaa", "a raw disk with a boot sector, whatever the image was"
    cloud.openstack("volume set --name vol --size 2 --property c=d first")
    cloud.openstack("volume snapshot create --volume vol snap")
    assert cloud.json("volume show vol")["properties"] == {"a": "b", "c": "d"} and file.stat().st_size == 2 << 30
    assert cloud.json("volume snapshot list")[0]["Name"] == "snap"
    assert not cloud.openstack("volume delete vol", check=False).startswith("0 "), "it has a snapshot"
    cloud.openstack("volume delete --purge vol")
    assert {s["State"] for s in cloud.json("volume service list")} == {"up"}
    cloud.wait(lambda: not file.exists() and not cloud.json("volume list"), 30, "it is still there")


def test_a_server_boots_from_a_volume(cloud: RealCloud) -> None:
    """A guest's disk is a volume; another is put in and taken out; both outlive what they are not to die with."""
    words = "server create --flavor m1.nano --image kilonova-guest --boot-from-volume 1 --network private --wait"
    server = cloud.json(words, "from-volume")
    assert server["status"] == "ACTIVE"
    assert server["id"] in cloud.console("from-volume", "login:")
    root = cloud.json("volume list --long")
    assert [(v["Status"], v["Bootable"], v["Attached to"][0]["server_id"]) for v in root] == [
        ("in-use", True, server["id"])
    ]
    cloud.openstack("volume create --size 1 data")
    cloud.openstack("server add volume from-volume data")
    cloud.wait(lambda: cloud.json("volume show data")["status"] == "in-use", 60, "it is not attached")
    cloud.openstack("volume snapshot create --force --volume", root[0]["ID"], "then")
    cloud.wait(lambda: cloud.json("volume snapshot show then")["status"] == "available", 60, "there is no snapshot")
    assert not cloud.openstack("volume delete data", check=False).startswith("0 "), "it is in use"
    cloud.openstack("server remove volume from-volume data")
    cloud.wait(lambda: cloud.json("volume show data")["status"] == "available", 60, "it is not free")
    cloud.openstack("server delete --wait from-volume")
    cloud.wait(lambda: all(v["Status"] == "available" for v in cloud.json("volume list")), 60, "one is still in use")
    cloud.openstack("volume delete data")
    cloud.openstack("volume delete --purge", root[0]["ID"])
