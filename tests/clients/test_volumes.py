"""Volumes with the `openstack` client as it comes from PyPI: made, changed, copied, uploaded, restored, deleted."""

from pathlib import Path

import pytest

from tests.real import RealCloud

pytestmark = [pytest.mark.clients, pytest.mark.metal]


def _status(cloud: RealCloud, what: str, name: str, wanted: str) -> None:
    cloud.wait(lambda: cloud.json(f"{what} show {name}")["status"] == wanted, 60, f"{name} is not {wanted}")


def test_a_volume_and_its_copies(cloud: RealCloud) -> None:
    made = cloud.json("volume create --size 1 --image kilonova-guest --property a=b first")
    _status(cloud, "volume", "first", "available")
    shown = cloud.json("volume show first")
    assert (shown["size"], shown["properties"], shown["bootable"]) == (1, {"a": "b"}, True)
    assert shown["volume_image_metadata"]["image_name"] == "kilonova-guest"
    file = cloud.state / "volumes" / "volumes" / made["id"]
    assert file.stat().st_size == 1 << 30 and b"EFI" not in file.read_bytes()[:3]
    cloud.openstack("volume set --name vol --size 2 --property c=d first")
    cloud.openstack("volume unset --property a vol")
    assert cloud.json("volume show vol")["properties"] == {"c": "d"} and file.stat().st_size == 2 << 30
    cloud.openstack("volume snapshot create --volume vol snap")
    _status(cloud, "volume snapshot", "snap", "available")
    cloud.openstack("volume create --snapshot snap from-snap")
    cloud.openstack("volume backup create --name back vol")
    _status(cloud, "volume", "from-snap", "available")
    _status(cloud, "volume backup", "back", "available")
    copy = cloud.state / "volumes" / "volumes" / cloud.json("volume show from-snap")["id"]
    with file.open("rb") as one, copy.open("rb") as other:
        assert one.read(32 << 20) == other.read(32 << 20)
    rows = {v["Name"]: v["Status"] for v in cloud.json("volume list")}
    assert rows == {"vol": "available", "from-snap": "available"}
    for command in ("volume backup delete back", "volume delete from-snap", "volume delete --purge vol"):
        cloud.openstack(command)
    cloud.wait(lambda: not cloud.json("volume list"), 30, "volumes are left")
    assert not [
        *Path(cloud.state / "volumes" / "volumes").iterdir(),
        *Path(cloud.state / "volumes" / "snapshots").iterdir(),
    ]


def test_the_service_and_its_shares(cloud: RealCloud) -> None:
    assert {s["State"] for s in cloud.json("volume service list")} == {"up"}
    assert {t["Name"] for t in cloud.json("volume type list")} == {"__DEFAULT__", "multiattach"}
    assert cloud.json("availability zone list --volume")[0]["Zone Name"] == "nova"
    cloud.openstack("quota set --volumes 3 admin")
    shown = {q["Resource"]: q["Limit"] for q in cloud.json("quota show --volume admin")}
    assert (shown["volumes"], shown["gigabytes"]) == (3, 1000)
    limits = {row["Name"]: row["Value"] for row in cloud.json("limits show --absolute")}
    assert limits["max_total_volumes"] == 3
    cloud.openstack("quota delete --volume admin")


def test_what_is_attached_by_hand(cloud: RealCloud) -> None:
    cloud.openstack("volume create --size 1 --type multiattach shared")
    _status(cloud, "volume", "shared", "available")
    how = "--os-volume-api-version 3.54"
    made = cloud.json(f"{how} volume attachment create shared --connect --host h1 --mode ro")
    found = cloud.json(f"{how} volume attachment list")
    assert len(found) == 1 and "local" in str(made)
    cloud.openstack(f"{how} volume attachment complete {found[0]['ID']}")
    _status(cloud, "volume", "shared", "in-use")
    refused = cloud.openstack("volume delete shared", check=False)
    assert not refused.startswith("0 ")
    cloud.openstack(f"{how} volume attachment delete {found[0]['ID']}")
    cloud.openstack("volume delete shared")


def test_errors_have_words(cloud: RealCloud) -> None:
    said = cloud.openstack("volume create --size 100000 huge", check=False)
    assert "quota" in said
    assert "no volume" in cloud.openstack("volume show nothing", check=False).lower()
