"""The tour of the README and more, with the `openstack` client as it comes from PyPI, on a real guest."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.real import RealCloud

pytestmark = [pytest.mark.clients, pytest.mark.metal]
SERVER = "tour"
SIT_DOWN = """
import sys
from websockets.sync.client import connect
with connect(sys.argv[1]) as line:
    line.send("\\r")
    told = b""
    while b"login:" not in told:
        told += line.recv(timeout=60)
print(told.decode(errors="replace"))
"""


def test_the_catalog_is_as_it_should_be(cloud: RealCloud) -> None:
    assert cloud.openstack("token issue -f value -c id").strip()
    types = {s["Type"] for s in cloud.json("catalog list")}
    assert {"compute", "identity", "image", "network", "block-storage"} <= types
    image = cloud.json("image show kilonova-guest")
    assert (image["status"], image["disk_format"], image["visibility"]) == ("active", "raw", "public")
    assert {n["Name"] for n in cloud.json("network list")} == {"private", "public"}
    assert "m1.nano" in {f["Name"] for f in cloud.json("flavor list")}


def test_things_are_made_for_a_server(cloud: RealCloud, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    made = cloud.json("image create --disk-format raw --container-format bare --file", str(disk), "mine")
    assert cloud.json(f"image show {made['id']}")["size"] == 1 << 20
    lie = cloud.openstack(
        "image create --disk-format qcow2 --container-format bare --file", str(disk), "lie", check=False
    )
    assert not lie.startswith("0 ")
    assert "qcow2" in lie
    cloud.openstack("flavor create --ram 128 --disk 1 --vcpus 1 --id tour --property tour:of=duty tour")
    assert cloud.json("flavor show tour")["properties"] == {"tour:of": "duty"}
    key = tmp_path / "key"
    key.write_text(cloud.openstack("keypair create generated"))
    assert "PRIVATE KEY" in key.read_text()
    assert cloud.json("keypair show generated")["name"] == "generated"
    cloud.openstack("image delete mine")
    cloud.openstack("keypair delete generated")


def test_a_server_lives(cloud: RealCloud) -> None:
    """Boot, look, every simple verb, events, delete: one story, since a guest costs seconds."""
    server = cloud.json("server create --flavor m1.nano --image kilonova-guest --network private --wait", SERVER)
    assert server["status"] == "ACTIVE"
    text = cloud.console(SERVER, "login:")
    assert server["id"] in text, "the guest read its own id from the metadata service"
    assert "metadata-service" in text
    screen = cloud.json("console url show --novnc", SERVER)
    assert screen["type"] == "novnc" and "/vnc_auto.html?path=%3Ftoken%3D" in screen["url"]
    line = cloud.json("console url show --serial", SERVER)["url"]
    assert "login:" in cloud.run(sys.executable, "-c", SIT_DOWN, line)
    row = next(s for s in cloud.json("server list --long") if s["ID"] == server["id"])
    assert (row["Status"], row["Flavor Name"] if "Flavor Name" in row else row["Flavor"]) == ("ACTIVE", "m1.nano")
    for verb, status in (
        ("pause", "PAUSED"),
        ("unpause", "ACTIVE"),
        ("resize --flavor m1.micro", "VERIFY_RESIZE"),
        ("resize confirm", "ACTIVE"),
        ("suspend", "SUSPENDED"),
        ("resume", "ACTIVE"),
        ("reboot --hard --wait", "ACTIVE"),
        ("stop", "SHUTOFF"),
        ("resize --flavor m1.nano", "VERIFY_RESIZE"),
        ("resize revert", "SHUTOFF"),
        ("start", "ACTIVE"),
        ("lock", "ACTIVE"),
        ("unlock", "ACTIVE"),
    ):
        cloud.openstack(f"server {verb} {SERVER}")
        cloud.wait(
            lambda status=status: cloud.json(f"server show {SERVER}")["status"] == status, 90, f"{verb}: no {status}"
        )
    cloud.openstack(f"server set --name renamed {SERVER}")
    cloud.openstack(f"server set --name {SERVER} renamed")
    actions = {e["Action"] for e in cloud.json(f"server event list {server['id']}")}
    assert actions >= {"create", "pause", "unpause", "suspend", "resume", "reboot", "stop", "start", "lock", "unlock"}
    assert actions >= {"resize", "revertResize", "confirmResize"}
    assert "m1.micro" in str(cloud.json(f"server show {SERVER}")["flavor"])
    request = next(e["Request ID"] for e in cloud.json(f"server event list {server['id']}") if e["Action"] == "create")
    assert "compute__do_build_and_run_instance" in cloud.openstack(f"server event show {server['id']} {request}")
    cloud.openstack(f"server delete --wait {SERVER}")
    assert server["id"] not in cloud.openstack("server list --all-projects")
    held = [p for p in cloud.json("port list --long") if p.get("Device Owner", "").startswith("compute:")]
    assert not held


def test_interfaces_come_and_go(cloud: RealCloud) -> None:
    """A guest is given a card while it runs, finds it, gets an address on it, and lets go of it again."""
    server = cloud.json("server create --flavor m1.nano --image kilonova-guest --network private --wait", "cards")
    cloud.console("cards", "ready")
    cloud.openstack("server add network cards private")
    found = cloud.json("port list --server cards")
    assert len(found) == 2
    line = next(words for words in cloud.console("cards", "eth1 ").splitlines() if "eth1 " in words)
    second = next(p for p in found if f"eth1 {_address(p)}/" in line)
    shown = cloud.json("server show cards")["addresses"]["private"]
    assert sorted(shown) == sorted(map(_address, found))
    cloud.openstack(f"server remove port cards {second['ID']}")
    cloud.wait(lambda: len(cloud.json("port list --server cards")) == 1, 60, "the port is still there")
    cloud.console("cards", "eth1 gone")
    actions = {e["Action"] for e in cloud.json(f"server event list {server['id']}")}
    assert actions >= {"attach_interface", "detach_interface"}
    cloud.openstack("server delete --wait cards")


def _address(port: dict[str, Any]) -> str:
    return str(port["Fixed IP Addresses"][0]["ip_address"])


def test_operators_look(cloud: RealCloud) -> None:
    assert {s["Binary"] for s in cloud.json("compute service list")} >= {"nova-compute", "nova-conductor"}
    assert cloud.json("hypervisor list")[0]["State"] == "up"
    assert [z["Zone Name"] for z in cloud.json("availability zone list --compute")].count("nova") == 1
    assert cloud.json("limits show --absolute")
    cloud.openstack("quota set --instances 7 admin")
    assert {q["Resource"]: q["Limit"] for q in cloud.json("quota show admin")}["instances"] == 7
    cloud.openstack("quota set --instances 10 admin")
    cloud.openstack("usage list", check=False)


def test_novaclient(cloud: RealCloud) -> None:
    """`nova list/show/start/stop/reboot --hard/reset-state/delete/service-list/service-disable/enable`."""
    image = cloud.json("image show kilonova-guest")["id"]
    network = cloud.json("network show private")["id"]
    cloud.nova(f"boot --flavor m1.nano --image {image} --nic net-id={network} --poll by-nova", timeout_s=180)
    assert "by-nova" in cloud.nova("list")
    assert "ACTIVE" in cloud.nova("show by-nova")
    cloud.nova("reboot --hard --poll by-nova")
    cloud.nova("stop by-nova")
    cloud.wait(lambda: "SHUTOFF" in cloud.nova("show by-nova"), 90, "not stopped")
    cloud.nova("start by-nova")
    cloud.wait(lambda: "ACTIVE" in cloud.nova("show by-nova"), 60, "not started")
    cloud.nova("reset-state by-nova")
    assert "error" in cloud.nova("show by-nova")
    cloud.nova("reset-state --active by-nova")
    cloud.nova("delete by-nova")
    cloud.wait(lambda: "by-nova" not in cloud.nova("list"), 60, "not deleted")
    service = next(s for s in cloud.json("compute service list") if s["Binary"] == "nova-compute")
    assert service["Host"] in cloud.nova("service-list")
    cloud.nova(f"service-disable {service['ID']}")
    assert "disabled" in cloud.nova("service-list")
    cloud.nova(f"service-enable {service['ID']}")


SDK = """
import openstack, sys
c = openstack.connect()
image, network = c.image.find_image("kilonova-guest"), c.network.find_network("private")
flavor = c.compute.find_flavor("m1.nano")
assert c.compute.get_server_password is not None
s = c.compute.create_server(name="sdk", image_id=image.id, flavor_id=flavor.id, networks=[{"uuid": network.id}])
s = c.compute.wait_for_server(s, wait=120, interval=0.5)
assert s.status == "ACTIVE", s
assert any(a["addr"] for rows in s.addresses.values() for a in rows)
c.compute.pause_server(s); c.compute.wait_for_server(s, status="PAUSED", wait=60, interval=0.5)
c.compute.unpause_server(s); c.compute.wait_for_server(s, wait=60, interval=0.5)
c.compute.set_server_metadata(s, role="guest")
assert c.compute.get_server(s.id).metadata == {"role": "guest"}
assert [x.id for x in c.compute.servers(name="sdk")] == [s.id]
assert len(list(c.compute.server_actions(s))) >= 3
c.compute.delete_server(s); c.compute.wait_for_delete(s, wait=60, interval=0.5)
assert c.compute.find_server("sdk") is None
print("well")
"""


def test_openstacksdk(cloud: RealCloud) -> None:
    assert cloud.run(sys.executable, "-c", SDK, timeout_s=240).strip() == "well"
