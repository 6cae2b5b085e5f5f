"""What disks a server has, and what they are called."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kilonova.model.ask import amounts_of
from kilonova.model.devices import Device
from kilonova.model.disks import GIB, MIB, disks, has_name, named, next_name, root_name
from kilonova.model.flavor import Flavor
from kilonova.model.machine import BlankSource, ImageSource, VolumeSource
from kilonova.model.server import Image, Server

FLAVOR = Flavor("1", "f", 1, 512, 10, ephemeral_gb=5, swap_mb=64)
IMAGE = Image(id="image", size_bytes=1)


def server(*devices: Device, flavor: Flavor = FLAVOR, image: Image = IMAGE) -> Server:
    return Server("s", "p", "u", "n", "n", flavor, image=image, devices=list(devices))


def shown(s: Server) -> list[tuple[str, type, int]]:
    return [(d.device, type(d.source), d.size_bytes) for d in disks(s)]


def volume(uuid: str, **facts: object) -> Device:
    return msgspec.structs.replace(Device(uuid, volume_id=f"v-{uuid}", size=1), **facts)


def test_flavor_and_image_tell_of_three():
    assert shown(server()) == [
        ("vda", ImageSource, 10 * GIB),
        ("vdb", BlankSource, 5 * GIB),
        ("vdc", BlankSource, 64 * MIB),
    ]
    assert [d.device for d in disks(server(flavor=Flavor("1", "f", 1, 64, 0)))] == ["vda"]


def test_a_cd_boots_from_its_own_bus():
    iso = Image(id="i", disk_format="iso", properties={"hw_disk_bus": "scsi"})
    assert [(d.device, d.bus, d.kind) for d in disks(server(image=iso))][:2] == [
        ("sda", "sata", "cdrom"),
        ("sdb", "scsi", "disk"),
    ]


def test_a_volume_may_be_the_root():
    s = server(volume("1", boot_index=0), image=Image())
    assert [(d.device, type(d.source)) for d in disks(s)] == [
        ("vda", VolumeSource),
        ("vdb", BlankSource),
        ("vdc", BlankSource),
    ]
    assert s.volume_backed and amounts_of(s)["DISK_GB"] == 6
    assert not server(volume("1")).volume_backed and amounts_of(server(volume("1")))["DISK_GB"] == 16


def test_how_to_connect_is_told_with_the_volume():
    told = disks(server(volume("1", name="/dev/vdx", tag="t")), {"v-1": {"driver_volume_type": "nbd"}})[-1]
    assert told.source == VolumeSource("v-1", {"driver_volume_type": "nbd"})
    assert (told.device, told.serial, told.tag, told.boot_index) == ("vdx", "v-1", "t", None)


def test_what_is_on_its_way_is_no_disk_yet_but_has_its_name():
    s = server(volume("1", name="/dev/vdd", busy="attaching"), Device("2", "/dev/vde", source="blank"))
    assert [d.device for d in disks(s)] == ["vda", "vdb", "vdc"]
    assert next_name(s, "virtio") == "/dev/vdf"


def test_devices_take_the_place_of_what_the_flavor_tells():
    eph = Device("1", source="blank", destination="local", size=2, format="xfs")
    swap = Device("2", source="blank", destination="local", size=32, format="swap", bus="scsi")
    assert shown(server(eph, swap, eph)) == [
        ("vda", ImageSource, 10 * GIB),
        ("vdb", BlankSource, 2 * GIB),
        ("vdc", BlankSource, 2 * GIB),
        ("sdd", BlankSource, 32 * MIB),
    ]
    assert disks(server(eph))[1].source == BlankSource("xfs")


def test_a_name_stays():
    """Also when the flavor grows a disk before it, or a neighbour goes."""
    small = Flavor("1", "f", 1, 64, 10)
    devices = named(server(volume("1"), volume("2", bus="sata"), flavor=small))
    assert [d.name for d in devices] == ["/dev/vdb", "/dev/sdc"]
    assert [d.device for d in disks(server(*devices))] == ["vda", "vdd", "vde", "vdb", "sdc"]
    left = server(devices[1], flavor=small)
    assert next_name(left, "virtio") == "/dev/vdb"
    assert has_name(left, "/dev/vdc") and has_name(left, "/dev/vda") and not has_name(left, "/dev/vdb")


def test_the_root_is_named():
    assert root_name(server()) == "/dev/vda"
    assert root_name(server(volume("1", boot_index=0, bus="scsi"), image=Image())) == "/dev/sda"
    assert root_name(server(volume("1", boot_index=0, name="/dev/vdq"), image=Image())) == "/dev/vdq"


roles = st.sampled_from(
    [
        {"boot_index": 0},
        {"source": "blank", "destination": "local", "format": "swap"},
        {"source": "blank", "destination": "local"},
        {},
    ]
)


@given(st.lists(roles, max_size=40), st.sampled_from(["virtio", "scsi", "ide"]))
def test_no_two_disks_are_called_the_same(wanted, bus):
    s = server(*(volume(str(i), bus=bus, **facts) for i, facts in enumerate(wanted)))
    s = msgspec.structs.replace(s, devices=named(s))
    names = [d.device for d in disks(s)]
    assert len({n[2:] for n in names}) == len(names)
    assert not has_name(s, next_name(s, bus))
    assert named(s) == sorted(s.devices, key=s.devices.index)
