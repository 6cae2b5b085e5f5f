"""What a guest reads, version by version."""

import base64
import json
import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilonova.metadata import documents
from kilonova.metadata.documents import EC2, OPENSTACK, Subject, resolve
from kilonova.model.disks import disks
from kilonova.model.flavor import Flavor
from kilonova.model.identity import identity_of, number_of
from kilonova.model.machine import BlankSource, Disk, FixedIp, Identity, ImageSource, Keypair, Nic, VolumeSource
from kilonova.model.server import Address, Image, Plug, Server

KEY = Keypair("mine", "ssh-ed25519 AAAA me@home")
ROOT = Disk("vda", ImageSource("c0ffee00-0000-4000-8000-000000000000", "qcow2", 1), boot_index=0)
NIC = Nic(
    port_id="11111111-2222-4333-8444-555555555555",
    network_id="net-1",
    mac="fa:16:3e:00:00:01",
    device="tap11111111-22",
    mtu=1450,
    ips=[FixedIp("10.0.0.7", prefix=24, gateway="10.0.0.1", dns=["10.0.0.2"], floating=["172.24.4.9"])],
)
WHOLE = Identity(
    uuid="6d1b4c5e-0000-4000-8000-000000000001",
    name="Web 1",
    hostname="web-1",
    project_id="p" * 32,
    availability_zone="nova",
    launch_index=2,
    meta={"role": "wéb"},
    keypair=KEY,
    user_data=base64.b64encode(b"#!/bin/sh\n\x00\xff").decode(),
    reservation_id="r-1234abcd",
    instance_type="m1.small",
    security_groups=["default", "web"],
    ec2_id=42,
    image_ec2_id=7,
    nics=[NIC],
    disks=[ROOT],
)
BARE = Identity("6d1b4c5e-0000-4000-8000-000000000002", "bare", "bare", "p" * 32)


def subject(identity=WHOLE, **more):
    return Subject(identity, more.pop("today", "2026-11-20"), random.Random(1).randbytes, **more)


def text(path, **more):
    found = resolve(subject(**more), path)
    return None if found is None else found.content.decode()


def meta(version, **more):
    found = resolve(subject(**more), f"/openstack/{version}/meta_data.json")
    assert found.content_type == "application/json"
    return json.loads(found.content)


# ---- listings


def test_roots_list_their_versions():
    assert text("/").split("\n") == [*EC2, "latest"]
    assert text("/ec2/") == text("/") == text("")
    assert text("/openstack").split("\n") == [*OPENSTACK, "latest"]


def test_versions_of_the_future_do_not_exist_yet():
    assert text("/openstack", today="2016-10-05").split("\n") == [*OPENSTACK[:5], "latest"]
    assert text("/openstack/2016-10-06/meta_data.json", today="2016-10-05") is None
    assert "vendor_data2.json" not in text("/openstack/latest", today="2016-10-05")


@pytest.mark.parametrize(
    ("version", "files"),
    [
        ("2012-08-10", "meta_data.json user_data"),
        ("2013-04-04", "meta_data.json user_data password"),
        ("2013-10-17", "meta_data.json user_data password vendor_data.json"),
        ("2015-10-15", "meta_data.json user_data password vendor_data.json network_data.json"),
        ("2016-06-30", "meta_data.json user_data password vendor_data.json network_data.json"),
        ("2016-10-06", "meta_data.json user_data password vendor_data.json network_data.json vendor_data2.json"),
        ("latest", "meta_data.json user_data password vendor_data.json network_data.json vendor_data2.json"),
    ],
)
def test_files_of_an_openstack_version(version, files):
    assert text(f"/openstack/{version}/").split("\n") == files.split()
    assert all(text(f"/openstack/{version}/{f}") is not None for f in files.split() if f != "user_data")
    later = {"password", "vendor_data.json", "vendor_data2.json"} - set(files.split())
    assert all(text(f"/openstack/{version}/{f}") is None for f in later)


def test_without_user_data_there_is_no_such_file():
    assert "user_data" not in text("/openstack/latest", identity=BARE).split("\n")
    assert text("/openstack/latest/user_data", identity=BARE) is None
    assert text("/latest/user-data", identity=BARE) is None
    assert text("/latest", identity=BARE) == "meta-data/"


@pytest.mark.parametrize(
    "path",
    ["/openstack/2012-08-11", "/openstack/latest/meta_data", "/openstack/latest/meta_data.json/x", "/3.0", "/1.0/x", "/openstack/x/y/z",
     "/openstack/content", "/openstack/content/0000", "/latest/meta-data/public-keys/1", "/latest/meta-data/hostname/x", "/../etc/passwd",
     "/latest/api/token", "/openstack/latest/..", "/ec2/ec2"],
)  # fmt: skip
def test_what_is_not_there_is_nothing(path):
    assert text(path) is None


# ---- OpenStack


FIRST = {"uuid", "name", "hostname", "launch_index", "availability_zone", "meta", "public_keys", "keys"}
SINCE = {
    "2013-04-04": {"random_seed"},
    "2015-10-15": {"project_id"},
    "2016-06-30": {"devices"},
    "2020-10-14": {"dedicated_cpus"},
}


@pytest.mark.parametrize("version", [*OPENSTACK, "latest"])
def test_members_of_meta_data(version):
    expected = FIRST.union(*(names for since, names in SINCE.items() if version >= since))
    assert meta(version).keys() == expected


def test_values_of_meta_data():
    shown = meta("latest", identity=msgspec.structs.replace(WHOLE, dedicated_cpus=[3, 1]))
    assert shown["uuid"] == WHOLE.uuid and shown["name"] == "Web 1" and shown["hostname"] == "web-1.novalocal"
    assert shown["meta"] == {"role": "wéb"} and shown["launch_index"] == 2 and shown["availability_zone"] == "nova"
    assert shown["public_keys"] == {"mine": KEY.public_key}
    assert shown["keys"] == [{"name": "mine", "type": "ssh", "data": KEY.public_key}]
    assert shown["dedicated_cpus"] == [1, 3] and shown["project_id"] == "p" * 32
    assert len(base64.b64decode(shown["random_seed"])) == 512
    assert meta("latest", domain="")["hostname"] == "web-1"


def test_every_read_has_another_seed():
    s = subject()
    one, other = (json.loads(resolve(s, "/openstack/latest/meta_data.json").content)["random_seed"] for _ in range(2))
    assert one != other


def test_what_is_empty_is_absent():
    assert meta("2012-08-10", identity=BARE).keys() == {"uuid", "name", "hostname", "launch_index", "availability_zone"}
    assert meta("latest", identity=BARE)["devices"] == [] and meta("latest", identity=BARE)["dedicated_cpus"] == []


def test_the_admin_password_is_only_an_extra():
    assert "admin_pass" not in meta("latest")
    assert meta("latest", extra={"admin_pass": "s3cret"})["admin_pass"] == "s3cret"


def test_user_data_are_the_bytes_given():
    assert resolve(subject(), "/openstack/2012-08-10/user_data").content == b"#!/bin/sh\n\x00\xff"
    assert resolve(subject(), "/2009-04-04/user-data").content == b"#!/bin/sh\n\x00\xff"


def test_injected_files_are_numbered():
    i = msgspec.structs.replace(WHOLE, files=[("/etc/motd", base64.b64encode(b"hi\xff").decode()), ("/x", "")])
    assert meta("2012-08-10", identity=i)["files"] == [
        {"path": "/etc/motd", "content_path": "/content/0000"},
        {"path": "/x", "content_path": "/content/0001"},
    ]
    assert resolve(subject(i), "/openstack/content/0000").content == b"hi\xff"
    assert resolve(subject(i), "/openstack/content/0002") is None


def test_password_and_vendor_data():
    assert text("/openstack/latest/password") == "" and text("/openstack/latest/password", password="x") == "x"
    vendor = {"static": lambda: {"a": 1}, "dynamic": lambda: {"cmdb": {"b": 2}}}
    assert json.loads(text("/openstack/latest/vendor_data.json", **vendor)) == {"a": 1}
    assert json.loads(text("/openstack/latest/vendor_data2.json", **vendor)) == {"static": {"a": 1}, "cmdb": {"b": 2}}
    assert documents.is_password(subject(), "/openstack//latest/password/")
    for path in ("/openstack/2012-08-10/password", "/openstack/latest/password/x", "/latest/password", "/openstack"):
        assert not documents.is_password(subject(), path)


def test_devices_by_version():
    tagged = msgspec.structs.replace(NIC, tag="data")
    plain = msgspec.structs.replace(NIC, mac="fa:16:3e:00:00:02")
    vlan = msgspec.structs.replace(NIC, mac="fa:16:3e:00:00:03", details={"vlan": 7})
    disk = Disk("vdb", VolumeSource("v"), serial="abc", tag="db")
    i = msgspec.structs.replace(WHOLE, nics=[tagged, plain, vlan], disks=[ROOT, disk])
    old, middle, new = (meta(v, identity=i)["devices"] for v in ("2016-06-30", "2017-02-22", "2018-08-27"))
    nic = {"type": "nic", "bus": "pci", "address": "none", "mac": NIC.mac, "tags": ["data"]}
    told = {"type": "disk", "bus": "pci", "address": "none", "serial": "abc", "path": "/dev/vdb", "tags": ["db"]}
    assert old == [nic, told]
    assert [d.get("vlan") for d in middle] == [None, 7, None]
    assert [d.get("mac") for d in new] == [NIC.mac, plain.mac, vlan.mac, None]
    assert [d.get("vf_trusted") for d in new] == [False, False, False, None]


# ---- network_data.json


def network(*nics):
    found = resolve(subject(msgspec.structs.replace(WHOLE, nics=list(nics))), "/openstack/2012-08-10/network_data.json")
    assert found.content_type.startswith("text/plain")
    return json.loads(found.content)


def test_a_network_with_dhcp():
    assert network(NIC) == {
        "links": [
            {"id": "tap11111111-22", "vif_id": NIC.port_id, "type": "bridge", "mtu": None, "ethernet_mac_address": NIC.mac}
        ],
        "networks": [{"id": "network0", "type": "ipv4_dhcp", "link": "tap11111111-22", "network_id": "net-1"}],
        "services": [{"type": "dns", "address": "10.0.0.2"}],
    }  # fmt: skip


def test_static_networks_say_all_a_guest_needs():
    four = msgspec.structs.replace(NIC.ips[0], dhcp=False, routes=[("192.168.0.0/16", "10.0.0.254")])
    six = FixedIp("fd00::7", 6, 64, "fd00::1", ["fd00::2", "10.0.0.2"], dhcp=False)
    second = msgspec.structs.replace(NIC.ips[0], address="10.0.1.7", dhcp=False)
    shown = network(msgspec.structs.replace(NIC, ips=[four, six, second], vif_type="user", device=""))
    assert shown["links"][0]["id"] == "interface0" and shown["links"][0]["mtu"] == 1450
    assert shown["links"][0]["type"] == "phy"
    assert shown["networks"] == [
        {
            "id": "network0", "type": "ipv4", "link": "interface0", "network_id": "net-1", "ip_address": "10.0.0.7",
            "netmask": "255.255.255.0", "services": [{"type": "dns", "address": "10.0.0.2"}],
            "routes": [
                {"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.0.0.1"},
                {"network": "192.168.0.0", "netmask": "255.255.0.0", "gateway": "10.0.0.254"},
            ],
        },
        {
            "id": "network1", "type": "ipv6", "link": "interface0", "network_id": "net-1", "ip_address": "fd00::7",
            "netmask": "ffff:ffff:ffff:ffff::", "routes": [{"network": "::", "netmask": "::", "gateway": "fd00::1"}],
            "services": [{"type": "dns", "address": "fd00::2"}, {"type": "dns", "address": "10.0.0.2"}],
        },
    ]  # fmt: skip
    assert [s["address"] for s in shown["services"]] == ["10.0.0.2", "fd00::2"]


def test_address_modes_are_types():
    ip = FixedIp("fd00::7", 6, 64, mode="slaac")
    assert network(msgspec.structs.replace(NIC, ips=[ip]))["networks"][0]["type"] == "ipv6_slaac"
    assert network(msgspec.structs.replace(NIC, ips=[])) == {} and network() == {}


# ---- EC2


EC2_FIRST = {"ami-id", "instance-id", "ami-launch-index", "reservation-id", "security-groups", "hostname", "ami-manifest-path",
             "local-ipv4", "public-keys/"}  # fmt: skip
EC2_SINCE = {
    "2007-01-19": {"local-hostname", "public-hostname", "public-ipv4"},
    "2007-08-29": {"instance-type"},
    "2007-12-15": {"block-device-mapping/"},
    "2008-02-01": {"placement/"},
    "2008-09-01": {"instance-action"},
}


@pytest.mark.parametrize("version", [*EC2, "latest"])
def test_members_of_an_ec2_version(version):
    of = version if version != "latest" else "2009-04-04"
    expected = EC2_FIRST.union(*(names for since, names in EC2_SINCE.items() if of >= since))
    assert text(f"/{version}/meta-data").split("\n") == sorted(expected)
    for name in expected:
        assert text(f"/ec2/{version}/meta-data/{name}") is not None
    assert text(f"/{version}") == "meta-data/\nuser-data"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ami-id", "ami-00000007"),
        ("instance-id", "i-0000002a"),
        ("ami-launch-index", "2"),
        ("ami-manifest-path", "FIXME"),
        ("reservation-id", "r-1234abcd"),
        ("security-groups", "default\nweb"),
        ("hostname", "web-1.novalocal"),
        ("local-hostname", "web-1.novalocal"),
        ("public-hostname", "web-1.novalocal"),
        ("local-ipv4", "10.0.0.7"),
        ("public-ipv4", "172.24.4.9"),
        ("public-keys", "0=mine"),
        ("public-keys/0/", "openssh-key"),
        ("public-keys/0/openssh-key", KEY.public_key),
        ("instance-type", "m1.small"),
        ("block-device-mapping/", "ami\nroot"),
        ("block-device-mapping/root", "/dev/vda"),
        ("block-device-mapping/ami", "vda"),
        ("placement/availability-zone", "nova"),
        ("instance-action", "none"),
        ("kernel-id", None),
    ],
)
def test_values_of_ec2(name, value):
    assert text(f"/latest/meta-data/{name}") == value


def test_ec2_of_a_server_with_little_and_with_much():
    assert text("/latest/meta-data/public-keys", identity=BARE) is None
    assert text("/latest/meta-data/local-ipv4", identity=BARE, caller="10.9.8.7") == "10.9.8.7"
    assert text("/latest/meta-data/public-ipv4", identity=BARE) == ""
    four = [Disk("vdc", BlankSource("swap")), ROOT, Disk("vdb", BlankSource("ext4")), Disk("vdd", VolumeSource("v"))]
    much = msgspec.structs.replace(WHOLE, disks=four, kernel_ec2_id=1, ramdisk_ec2_id=2)
    paths = {
        n: text(f"/latest/meta-data/block-device-mapping/{n}", identity=much)
        for n in ("ephemeral0", "swap", "ebs0", "root")
    }
    assert paths == {"ephemeral0": "/dev/vdb", "swap": "/dev/vdc", "ebs0": "/dev/vdd", "root": "/dev/vda"}  # fmt: skip
    assert text("/latest/meta-data/kernel-id", identity=much) == "aki-00000001"
    assert text("/latest/meta-data/ramdisk-id", identity=much) == "ari-00000002"


# ---- of a stored server


def test_identity_of_a_row():
    addresses = [Address("fd00::7", 6), Address("10.0.0.7"), Address("172.24.4.9", floating=True)]
    server = Server(
        id=WHOLE.uuid, project_id="p", user_id="u", name="Web 1", hostname="web-1", number=42,
        flavor=Flavor(id="1", name="m1.small", vcpus=1, memory_mb=64, disk_gb=1, swap_mb=8),
        image=Image(id="c0ffee00-0000-4000-8000-000000000000", properties={"kernel_id": "0000000b-0000-4000-8000-000000000000"}),
        plugs=[Plug("11111111-2222-4333-8444-555555555555", "net-1", "private", NIC.mac, addresses, ["default"], tag="data")],
        metadata={"a": "b"}, keypair=KEY, system_metadata={"boot_roles": "member,reader"}, availability_zone="asked",
    )  # fmt: skip
    i = identity_of(server, zone="real", disks=disks(server))
    assert (i.availability_zone, i.ec2_id, i.image_ec2_id, i.kernel_ec2_id) == ("real", 42, 0xC0FFEE00, 11)
    assert (i.security_groups, i.boot_roles, i.meta, i.keypair) == (["default"], "member,reader", {"a": "b"}, KEY)
    assert text("/latest/meta-data/local-ipv4", identity=i) == "10.0.0.7"
    assert text("/latest/meta-data/public-ipv4", identity=i) == "172.24.4.9"
    assert text("/latest/meta-data/block-device-mapping", identity=i) == "ami\nroot\nswap"
    assert meta("latest", identity=i)["devices"][0]["tags"] == ["data"]
    assert identity_of(server, nics=[NIC], disks=[ROOT]).nics == [NIC]
    assert identity_of(server).availability_zone == "asked" and number_of("") == 0


# ---- junk


@given(
    st.lists(
        st.sampled_from(
            [
                "openstack",
                "ec2",
                "latest",
                "2009-04-04",
                "meta-data",
                "public-keys",
                "0",
                "..",
                "",
                "é",
                "content",
                "\x00",
            ]
        ),
        max_size=8,
    )
)
def test_no_path_fails(parts):  # fmt: skip
    resolve(subject(), "/".join(parts))
    resolve(subject(BARE), "/" + "/".join(parts))


SPEC = Path(__file__).parents[2].parent / "shared/spec/metadata.md"


@pytest.mark.skipif(not SPEC.exists(), reason="the specification is not beside this checkout")
def test_the_versions_are_those_of_the_specification():
    said = SPEC.read_text()
    assert f"Versions: {', '.join(EC2)}, latest" in said.replace("\n", " ")
    assert f"Versions: {', '.join(OPENSTACK)}, latest" in said.replace("\n", " ").replace(",  ", ", ")
