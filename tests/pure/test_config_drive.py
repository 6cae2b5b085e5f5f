"""The config drive: what is on it, and that readers of its two file systems find it there."""

import base64
import io
import json
import shutil
import subprocess
from random import Random

import msgspec
import pycdlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilonova.kit.clock import Ids
from kilonova.kit.errors import Unavailable
from kilonova.metadata import drive, vfat
from kilonova.metadata.documents import EC2, OPENSTACK
from kilonova.metadata.drive import config_drive, iso9660
from kilonova.metadata.vendor import Vendor
from kilonova.model.machine import FixedIp, Identity, Keypair, Machine, Nic
from kilonova.model.options import Metadata

USER_DATA = b"#cloud-config\n" + bytes(range(256)) * 40
NIC = Nic(
    "11111111-2222-4333-8444-555555555555", "net-1", "fa:16:3e:00:00:01", "tap11111111-22", ips=[FixedIp("10.0.0.7")]
)
IDENTITY = Identity(
    uuid="6d1b4c5e-0000-4000-8000-000000000001",
    name="Web 1",
    hostname="web-1",
    project_id="p" * 32,
    keypair=Keypair("mine", "ssh-ed25519 AAAA me@home"),
    user_data=base64.b64encode(USER_DATA).decode(),
    files=[("/etc/motd", base64.b64encode(b"hello").decode())],
    nics=[NIC],
)  # fmt: skip
MACHINE = Machine(
    IDENTITY.uuid, "instance-0000002a", 1, 64, [], [NIC], IDENTITY, config_drive=True, admin_password="s3cret"
)


class Noon:
    """Always the same moment."""

    def now(self) -> float:
        return 1795176000.0

    def sleep(self, seconds: float) -> None: ...


def made(machine=MACHINE, options=None, **more):
    return config_drive(machine, clock=Noon(), ids=Ids(Random(1)), options=options or Metadata(), **more)


def tree(machine=MACHINE, options=None):
    options = options or Metadata()
    return drive.tree(machine, clock=Noon(), ids=Ids(Random(1)), options=options, vendor=Vendor(options))


def read_iso(image: bytes, how: str) -> dict[str, bytes]:
    """Path → bytes, by the names of Rock Ridge ("rr_path") or Joliet ("joliet_path")."""
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(image))
    files = {}
    for folder, _, names in iso.walk(**{how: "/"}):
        for name in names:
            path = f"{folder.rstrip('/')}/{name}"
            out = io.BytesIO()
            iso.get_file_from_iso_fp(out, **{how: path})
            files[path.strip("/")] = out.getvalue()
    iso.close()
    return files


def test_what_is_on_it():
    files = tree()
    assert files["openstack/latest/user_data"] == USER_DATA == files["ec2/latest/user-data"]
    assert files["openstack/content/0000"] == b"hello"
    meta = json.loads(files["openstack/latest/meta_data.json"])
    assert meta["admin_pass"] == "s3cret" and meta["hostname"] == "web-1.novalocal" and meta["uuid"] == IDENTITY.uuid
    folders = {p.split("/")[1] for p in files if p.startswith("openstack/")}
    assert folders == {*OPENSTACK, "latest", "content"}
    assert not [p for p in files if p.endswith("/password")]


@pytest.mark.parametrize(
    ("name", "since"),
    [("meta_data.json", ""), ("user_data", ""), ("vendor_data.json", "2013-10-17"), ("network_data.json", "2015-10-15"), ("vendor_data2.json", "2016-10-06")],
)  # fmt: skip
def test_files_came_with_versions(name, since):
    files = tree()
    assert [v for v in (*OPENSTACK, "latest") if f"openstack/{v}/{name}" in files] == [
        v for v in (*OPENSTACK, "latest") if v >= since
    ]


def test_the_ec2_tree_is_json_without_names_of_keys():
    files = tree()
    assert {p.split("/")[1] for p in files if p.startswith("ec2/")} == {"2009-04-04", "latest"}
    shown = json.loads(files["ec2/2009-04-04/meta-data.json"])
    assert shown["public-keys"] == {"0": {"openssh-key": "ssh-ed25519 AAAA me@home"}}
    assert shown["local-ipv4"] == "10.0.0.7" and shown["placement"] == {"availability-zone": ""}
    every = tree(options=Metadata(config_drive_ec2_versions=EC2))
    assert "instance-type" not in json.loads(every["ec2/1.0/meta-data.json"])


def test_without_user_data_and_password():
    machine = msgspec.structs.replace(
        MACHINE, admin_password="", identity=msgspec.structs.replace(IDENTITY, user_data=None, files=[])
    )
    files = tree(machine)
    assert not [p for p in files if "user" in p or "content" in p]
    assert "admin_pass" not in json.loads(files["openstack/latest/meta_data.json"])


def test_vendor_data_of_a_file_and_of_a_service_that_is_away(tmp_path):
    file = tmp_path / "vendor.json"
    file.write_text('{"cloud": "ours"}')
    options = Metadata(
        vendordata_file=file, vendordata_targets={"cmdb": "http://127.0.0.1:1/"}, vendordata_timeout_s=0.5
    )
    files = tree(options=options)
    assert json.loads(files["openstack/latest/vendor_data.json"]) == {"cloud": "ours"}
    assert json.loads(files["openstack/latest/vendor_data2.json"]) == {"static": {"cloud": "ours"}, "cmdb": {}}
    with pytest.raises(Unavailable):
        tree(options=msgspec.structs.replace(options, vendordata_failure_fatal=True))


@pytest.mark.parametrize("how", ["rr_path", "joliet_path"])
def test_an_iso_image_reads_back_by_its_long_names(how):
    image = made()
    assert read_iso(image, how) == tree()
    assert image[0x8001:0x8006] == b"CD001" and image[0x8028:0x8048].rstrip() == b"config-2"
    assert len(image) < 1 << 20 and len(image) % 2048 == 0


@pytest.mark.skipif(not shutil.which("isoinfo"), reason="isoinfo is not here")
def test_another_reader_finds_the_same(tmp_path):
    file = tmp_path / "drive.iso"
    file.write_bytes(made())
    asked = ["isoinfo", "-i", str(file)]
    listed = subprocess.run([*asked, "-R", "-f"], capture_output=True, text=True, check=True).stdout.split()
    assert "/openstack/latest/meta_data.json" in listed and "/ec2/latest/user-data" in listed
    path = ["-R", "-x", "/openstack/latest/user_data"]
    assert subprocess.run([*asked, *path], capture_output=True, check=True).stdout == USER_DATA


# ---- vfat


def read_vfat(image: bytes) -> dict[str, bytes]:
    """A reader of its own, by long names, so that the tests need no tools."""
    at = lambda where, size: int.from_bytes(image[where : where + size], "little")
    sector, per, reserved, fats, roots, fat_sectors = at(11, 2), at(13, 1), at(14, 2), at(16, 1), at(17, 2), at(22, 2)
    root = (reserved + fats * fat_sectors) * sector
    data, cluster, fat = root + roots * 32, sector * per, reserved * sector
    assert image[fat : fat + fat_sectors * sector] == image[fat + fat_sectors * sector : fat + 2 * fat_sectors * sector]

    def content(first: int) -> bytes:
        whole = bytearray()
        while 2 <= first < 0xFFF8:
            whole += image[data + (first - 2) * cluster : data + (first - 1) * cluster]
            first = at(fat + 2 * first, 2)
        return bytes(whole)

    def walk(entries: bytes, path: str) -> dict[str, bytes]:
        files, name = {}, ""
        for n in range(0, len(entries), 32):
            e = entries[n : n + 32]
            if e[0] == 0:
                break
            if e[11] == 0x0F:
                name = (e[1:11] + e[14:26] + e[28:32]).decode("utf-16-le").partition("\0")[0] + name
                continue
            first, size = int.from_bytes(e[26:28], "little"), int.from_bytes(e[28:32], "little")
            if e[11] & 0x10 and not e.startswith(b"."):
                files |= walk(content(first), f"{path}{name}/")
            elif not e[11] & 0x18:
                files[path + name] = content(first)[:size]
            name = ""
        return files

    return walk(image[root:data], "")


def test_a_vfat_image_reads_back():
    image = made(format="vfat")
    assert len(image) == 64 << 20
    assert read_vfat(image) == tree()


@pytest.mark.skipif(not shutil.which("mtype"), reason="mtools are not here")
def test_mtools_read_the_vfat_image(tmp_path):
    file = tmp_path / "drive.vfat"
    file.write_bytes(made(format="vfat"))
    told = subprocess.run(
        ["mtype", "-i", str(file), "::/openstack/latest/user_data"], capture_output=True, check=True
    ).stdout
    assert told == USER_DATA
    assert "CONFIG-2" in subprocess.run(["mdir", "-i", str(file), "::/"], capture_output=True, text=True).stdout
    if shutil.which("fsck.vfat"):
        subprocess.run(["fsck.vfat", "-n", str(file)], capture_output=True, check=True)


names = st.text("abcdefghijklmnopqrstuvwxyz0123456789._-", min_size=1, max_size=40).filter(lambda n: n.strip("."))


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(names, st.dictionaries(names, st.binary(max_size=6000), min_size=1, max_size=12), max_size=6))
def test_any_small_tree_reads_back(folders):
    files = {f"{folder}/{name}": content for folder, inside in folders.items() for name, content in inside.items()}
    assert read_vfat(vfat.vfat(files, "config-2")) == files
    assert read_iso(iso9660(files), "rr_path") == files


def test_too_much_for_vfat_is_said():
    with pytest.raises(ValueError, match="too much"):
        vfat.vfat({"a": bytes(65 << 20)}, "config-2")
