"""Two real guests on one network: ssh with an injected key, user data, ping, a security group, a floating IP."""

import subprocess
from pathlib import Path

import pytest

from tests.real import RealCloud

pytestmark = [pytest.mark.clients, pytest.mark.metal]
USER_DATA = "#!/bin/sh\necho user data was here > /tmp/user-data\n( while :; do echo well | nc -l -p 8080; done ) &\n"
SSH = [
    "ssh",
    "-o",
    "BatchMode=yes",
    "-o",
    "StrictHostKeyChecking=no",
    "-o",
    "UserKnownHostsFile=/dev/null",
    "-o",
    "ConnectTimeout=5",
]


def ssh(cloud: RealCloud, key: Path, address: str, command: str, *, check: bool = True) -> str:
    return cloud.run(*SSH, "-i", str(key), f"kilonova@{address}", command, timeout_s=60, check=check)


def test_two_guests(cloud: RealCloud, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    script = tmp_path / "user-data"
    script.write_text(USER_DATA)
    cloud.openstack("keypair create guests --public-key", f"{key}.pub")
    cloud.openstack("security group create open")
    cloud.openstack("security group rule create open --protocol tcp --dst-port 22")
    cloud.openstack("security group rule create open --protocol icmp")
    made = {}
    for name in ("one", "two"):
        words = "server create --flavor m1.nano --image kilonova-guest --network private --key-name guests --security-group open"
        made[name] = cloud.json(f"{words} --user-data", str(script), "--wait", name)
    address = {n: cloud.json(f"server show {n}")["addresses"]["private"][0] for n in made}
    floating = cloud.json("floating ip create public")["floating_ip_address"]
    cloud.openstack(f"server add floating ip one {floating}")
    for name, server in made.items():
        text = cloud.console(name, "kilonova: ready", 180)
        assert server["id"] in text
        assert "user-data ended 0" in text

    # A floating IP reaches it from the machine, with the injected key; its user data ran.
    cloud.wait(lambda: ssh(cloud, key, floating, "true", check=False).startswith("0"), 60, "no ssh by the floating IP")
    assert ssh(cloud, key, floating, "cat /tmp/user-data").strip() == "user data was here"
    assert ssh(cloud, key, floating, "hostname").strip() == "one"
    shown = cloud.json("server show one")["addresses"]["private"]
    assert floating in shown

    def told() -> str:
        return ssh(cloud, key, floating, "wget -q -O - http://169.254.169.254/latest/meta-data/public-ipv4").strip()

    cloud.wait(lambda: told() == floating, 30, "the guest is not told of it")  # it asked before: that is kept a while

    # The two hear each other.
    assert "0% packet loss" in ssh(cloud, key, floating, f"ping -c 2 -W 2 {address['two']}")

    # A security group opens a port and closes it.
    def port_8080() -> str:
        return ssh(cloud, key, floating, f"timeout 3 nc {address['two']} 8080 </dev/null", check=False)

    assert "well" not in port_8080()
    rule = cloud.json("security group rule create open --protocol tcp --dst-port 8080")["id"]
    cloud.wait(lambda: "well" in port_8080(), 30, "an opened port does not answer")
    cloud.openstack(f"security group rule delete {rule}")
    cloud.wait(lambda: "well" not in port_8080(), 30, "a closed port answers")

    # Without the floating IP there is no way in from the machine.
    cloud.openstack(f"server remove floating ip one {floating}")
    assert not ssh(cloud, key, floating, "true", check=False).startswith("0 ")
    cloud.openstack(f"floating ip delete {floating}")
    cloud.openstack("server delete --wait one two")
    cloud.openstack("security group delete open")
    cloud.openstack("keypair delete guests")
