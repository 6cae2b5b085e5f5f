"""The guest image in a plain QEMU without acceleration: what users see of it, on its console and over ssh."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kilonova.companions.guest import GuestImage, build
from kilonova.kit.errors import Unavailable, Unsupported
from kilonova.metadata.drive import iso9660

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = [pytest.mark.metal, pytest.mark.skipif(QEMU is None, reason="not installed: qemu-system-x86_64")]

UUID = "0f7b6a64-9f4f-4b3a-8f0e-0a51c2a0b7aa"
BOOT_S = 40.0  # a bound for a machine that does much else; idle it is 3
HOST, GUEST, METADATA = "169.254.169.2", "169.254.169.15", "169.254.169.254"


class Guest:
    """QEMU with the image's disk. `said` waits for its console, `ssh` runs a command in it."""

    def __init__(self, directory: Path, disk: Path, *args: str, memory_mb: int = 128, machine: str = "q35") -> None:
        self.directory = directory
        self.monitor = directory / "qmp"
        self.monitor.unlink(missing_ok=True)
        assert QEMU
        command = [
            QEMU, "-accel", "tcg", "-machine", machine, "-cpu", "max", "-m", str(memory_mb), "-nodefaults",
            "-display", "none", "-serial", "stdio", "-qmp", f"unix:{self.monitor},server=on,wait=off",
            "-device", "virtio-rng-pci",
            *(("-device", "pcie-root-port,id=spare,chassis=1") if machine == "q35" else ()),
            "-drive", f"if=none,id=root,file={disk},format=raw", "-device", "virtio-blk-pci,drive=root,bootindex=1",
            *args,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.console, self.seen = "", 0
        self.news = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout
        while piece := os.read(self.process.stdout.fileno(), 65536):
            with self.news:
                self.console += piece.decode(errors="replace").replace("\r", "")
                self.news.notify_all()

    def said(self, pattern: str, within_s: float = BOOT_S) -> re.Match[str]:
        """The next place on the console, after the last one found, that matches."""
        found = None

        def match() -> bool:
            nonlocal found
            found = re.compile(pattern, re.MULTILINE).search(self.console, self.seen)
            return found is not None or self.process.poll() is not None

        with self.news:
            self.news.wait_for(match, within_s)
            assert found, f"no {pattern!r} on the console:\n{self.console[self.seen :][-4000:]}"
            self.seen = found.end()
        return found

    def types(self, text: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def ask(self, execute: str, **arguments: Any) -> Any:
        """One command to QEMU's monitor."""
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(self.monitor))
            f = s.makefile("rw")
            f.readline()
            for one in ({"execute": "qmp_capabilities"}, {"execute": execute, "arguments": arguments}):
                f.write(json.dumps(one) + "\n")
                f.flush()
                while "event" in (answer := json.loads(f.readline())):
                    pass
            assert "return" in answer, answer
            return answer["return"]

    def ended(self, within_s: float = 20) -> int:
        return self.process.wait(within_s)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def image() -> GuestImage:
    """From the cache that `up` and `demo` use as well: built once for all tests on a machine."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        return build(home / "kilonova" / "guest", progress=lambda sentence: None)
    except (Unavailable, Unsupported) as e:
        pytest.skip(e.said)


@pytest.fixture
def boot(image: GuestImage, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    with contextlib.ExitStack() as ends:
        disk = tmp_path / "disk"
        shutil.copy(image.disk, disk)

        def start(*args: str, **options: Any) -> Guest:
            guest = Guest(tmp_path, disk, *args, **options)
            ends.callback(guest.close)
            return guest

        yield start


# One process for each of the guest's connections, its request on stdin: QEMU's guestfwd.
SERVICE = """
import json, sys
path = sys.stdin.readline().split()[1]
while sys.stdin.readline().strip(): pass
body = json.load(open(sys.argv[1])).get(path.removeprefix("/openstack/latest/"))
status = "200 OK" if body is not None else "404 Not Found"
print(f"HTTP/1.0 {status}\\r\\nContent-Length: {len(body or '')}\\r\\n\\r\\n{body or ''}", end="", flush=True)
"""


def served(directory: Path, ssh_port: int, tree: dict[str, str]) -> list[str]:
    """QEMU's user network with a metadata service, and the guest's ssh on a port of ours."""
    (directory / "service.py").write_text(SERVICE)
    (directory / "tree.json").write_text(json.dumps(tree))
    command = f"{sys.executable} {directory}/service.py {directory}/tree.json"
    net = f"net=169.254.169.0/24,host={HOST},dhcpstart={GUEST},hostfwd=tcp:127.0.0.1:{ssh_port}-:22"
    netdev = f"user,id=net0,{net},guestfwd=tcp:{METADATA}:80-cmd:{command}"
    return ["-netdev", netdev, "-device", "virtio-net-pci,netdev=net0,romfile="]


def drive(file: Path, content: bytes, device: str) -> list[str]:
    file.write_bytes(content)
    return ["-drive", f"if=none,id=config,file={file},format=raw,read-only=on", "-device", f"{device},drive=config"]


def key(directory: Path) -> tuple[Path, str]:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    file = directory / "key"
    file.touch(0o600)
    file.write_bytes(private.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption()))
    return file, private.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH).decode() + "\n"


def ssh(port: int, key: Path, command: str, user: str = "kilonova") -> str:
    trust = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes"]
    options = [word for option in trust for word in ("-o", option)]
    words = ["ssh", *options, "-o", "ConnectTimeout=20", "-i", str(key), "-p", str(port), f"{user}@127.0.0.1", command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    return done.stdout if done.returncode == 0 else f"ssh: {done.returncode}: {done.stderr}"


def test_second_build_is_a_look_into_the_cache(image: GuestImage) -> None:
    told: list[str] = []
    began = time.monotonic()
    again = build(image.disk.parent.parent, progress=told.append)
    assert again == image and not told
    assert time.monotonic() - began < 0.5
    assert image.sizes["disk"] == image.disk.stat().st_size < 64 << 20


def test_a_server_with_metadata_service(boot: Callable[..., Guest], tmp_path: Path, free_port: int) -> None:
    private, public = key(tmp_path)
    tree = {
        "meta_data.json": json.dumps(
            {
                "uuid": UUID,
                "hostname": "w\u0065b-1.novalocal",
                "public_keys": {'my "own" key': public},
                "keys": [{"name": "k", "type": "ssh", "data": public}],
                "random_seed": "c2VlZA==",
                "meta": {"note": "a {tricky} [value], \\ \u00e9\n"},
            }
        ),
        "user_data": "#!/bin/sh\necho told to the console by $(id -un)\nexit 3\n",
    }
    net = served(tmp_path, free_port, tree)
    guest = boot(*net)
    guest.said("^.*Linux version")
    assert guest.said(r"^kilonova: boot (\d+) kernel up [\d.]+ s")[1] == "1"
    guest.said(rf"kilonova: eth0 {GUEST}/24 gw {HOST}")
    assert guest.said(r"kilonova: instance-id (\S+) from (\S+)\s").groups() == (UUID, "metadata-service")
    begun = guest.seen
    guest.said(r"kilonova: ready [\d.]+ s")
    for once in ("web-1 login: ", "told to the console by root", "kilonova: user-data ended 3"):
        assert guest.console.count(once, begun) == 1, guest.console[begun:]

    # at the console, by the documented password
    guest.types("kilonova\n")
    guest.said("Password: ")
    guest.types("kilonova\n")
    guest.said("root@web-1:.*# ")
    guest.types("echo it is $((6 * 7)); exit\n")
    guest.said("it is 42")

    # over ssh, by the key and by nothing else
    if shutil.which("ssh"):
        assert (
            ssh(free_port, private, "hostname; id -u; cat /proc/sys/kernel/random/entropy_avail") == "web-1\n0\n256\n"
        )
        stranger, _ = key(tmp_path)
        assert "Permission denied" in ssh(free_port, stranger, "id")

    # a card and a disk come and go
    guest.ask("netdev_add", type="user", id="net1", net="10.7.0.0/24")
    guest.ask("device_add", driver="virtio-net-pci", netdev="net1", id="card", bus="spare")
    guest.said(r"kilonova: eth1 10\.7\.0\.15/24 gw 10\.7\.0\.2")
    guest.ask("device_del", id="card")
    guest.said("kilonova: eth1 gone")

    # the power button
    guest.ask("system_powerdown")
    guest.said("kilonova: power button")
    assert guest.ended() == 0

    # what was on the disk is there again, and what is for the first boot only is not done again
    guest = boot(*net)
    assert guest.said(r"^kilonova: boot (\d+)")[1] == "2"
    guest.said("kilonova: instance-id")
    begun = guest.seen
    guest.said("kilonova: ready")
    assert "user-data" not in guest.console[begun:]
    guest.ask("send-key", keys=[{"type": "qcode", "data": k} for k in ("ctrl", "alt", "delete")])
    guest.said("kilonova: reboot")
    assert guest.said(r"^kilonova: boot (\d+)")[1] == "3"


def test_a_server_with_config_drive_only(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """No service, no DHCP: name, password and address come on a disk; and the server's own disk is a larger one."""
    mac = "52:54:00:00:00:07"
    network = {
        "links": [{"id": "tap0", "type": "bridge", "ethernet_mac_address": mac, "mtu": 1500}],
        "networks": [
            {
                "id": "network0",
                "link": "tap0",
                "type": "ipv4",
                "ip_address": "10.0.9.20",
                "netmask": "255.255.255.0",
                "routes": [{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.0.9.2"}],
            }
        ],
        "services": [{"type": "dns", "address": "10.0.9.3"}],
    }
    content = iso9660(
        {
            "openstack/latest/meta_data.json": json.dumps(
                {"uuid": UUID, "hostname": "vault", "admin_pass": "S3cr&t pass"}
            ).encode(),
            "openstack/latest/network_data.json": json.dumps(network).encode(),
            "openstack/latest/user_data": b"#cloud-config\n",
        }
    )
    os.truncate(tmp_path / "disk", 300 << 20)
    card = f"virtio-net-pci,netdev=net0,romfile=,mac={mac}"
    net = ["-netdev", "hubport,id=net0,hubid=0", "-device", card]  # a wire that leads nowhere
    guest = boot(*drive(tmp_path / "config", content, "virtio-blk-pci"), *net)
    guest.said(r"kilonova: eth0 10\.0\.9\.20/24 gw 10\.0\.9\.2$")
    guest.said(f"kilonova: instance-id {UUID} from config-drive")
    guest.said("kilonova: ready")
    assert "is no script, left alone" in guest.console
    guest.types("kilonova\n")
    guest.said("Password: ")
    guest.types("S3cr&t pass\n")
    guest.said("root@vault:.*# ")
    guest.types("set -- $(df -m / | tail -1); [ $2 -gt 250 ] && echo it has grown; cat /etc/resolv.conf; ip -4 a\n")
    guest.said("it has grown", 5)
    guest.said("nameserver 10.0.9.3")
    guest.types("poweroff\n")
    assert guest.ended() == 0
