"""`kilonova demo` for an ordinary user who may have neither namespaces nor taps: QEMU's user networking, and what it gives.

The tests run as root and become somebody else for it, on a machine whose /dev/net/tun he may not open.
"""

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import kilonova
from kilonova.companions.guest import build

pytest.importorskip("libvirt", reason="libvirt's Python module is not installed")
PATH = f"{os.environ.get('PATH')}:/usr/sbin:/sbin"
NEEDED = ("libvirtd", "qemu-system-x86_64", "qemu-img", "setpriv", "unshare", "ssh", "newuidmap", "dnsmasq", "nft")
ABSENT = [p for p in NEEDED if not shutil.which(p, path=PATH)]
pytestmark = [
    pytest.mark.metal,
    pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming an ordinary user needs root"),
]
USER = 65534  # nobody: libvirtd wants a user that has a name
SOURCE = Path(kilonova.__file__).parents[1]
BOOT_S = 180.0  # idle it is 8


class Somebody:
    """An ordinary user with a home that is deep enough to break socket names, on a machine without taps for him."""

    def __init__(self, home: Path) -> None:
        self.home, self.state = home, home / ("state " + "x" * 80)
        env = [f"HOME={home}", f"PATH={PATH}", f"PYTHONPATH={SOURCE}", "PYTHONDONTWRITEBYTECODE=1", "LANG=C.UTF-8"]
        words = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "env", "-i", *env]
        os.mknod(home / "tun", 0o600 | stat.S_IFCHR, os.makedev(10, 200))
        hidden = f'mount --bind {home}/tun /dev/net/tun; exec "$@"'
        self.become = ["unshare", "-m", "sh", "-ec", hidden, "sh", *words]

    def kilonova(self, *words: str) -> list[str]:
        return [*self.become, sys.executable, "-m", "kilonova.main", *words, "--state-dir", str(self.state)]

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(self.kilonova(*words), capture_output=True, text=True, timeout=120, check=False, cwd="/")


@pytest.fixture
def somebody() -> Iterator[Somebody]:
    home = Path(tempfile.mkdtemp(prefix="kilonova-somebody-"))
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    shutil.copy(build(Path(cache) / "kilonova" / "guest", progress=print).disk, home / "guest")
    for path in (home, home / "guest"):
        os.chown(path, USER, USER)
    one = Somebody(home)
    tried = subprocess.run(
        [*one.become, sys.executable, "-c", "import kilonova, libvirt, falcon"],
        capture_output=True,
        check=False,
        cwd="/",
    )
    if tried.returncode:
        pytest.skip(f"another user cannot run {sys.executable}")
    try:
        yield one
    finally:
        one.run("down", "--purge")
        shutil.rmtree(home)


def test_who_can_make_no_networks_has_a_server_all_the_same(somebody: Somebody) -> None:
    argv = somebody.kilonova("demo", "--port", "0", "--image", str(somebody.home / "guest"))
    out = somebody.home / "out"
    with out.open("wb") as file:
        cloud = subprocess.Popen(argv, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd="/")
    try:
        until = time.monotonic() + BOOT_S
        while "Ctrl-C ends" not in out.read_text() and cloud.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        said = out.read_text()
        assert "may not open /dev/net/tun" in said  # why
        assert "no security groups, routers and floating IPs" in said  # plainly
        id = re.search(r"accepted: server (\S+)", said)
        assert id and f"kilonova: instance-id {id[1]} from metadata-service" in said, said
        assert re.search(r"^first login:|\| first login:", said, re.MULTILINE)
        way = re.search(r"ssh -i (.+) -p (\d+) kilonova@127\.0\.0\.1", said)
        assert way, said
        trust = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o BatchMode=yes".split()
        there = ["ssh", *trust, "-i", shlex.split(way[1])[0], "-p", way[2], "kilonova@127.0.0.1"]
        asked = "timeout 10 wget -qO- http://169.254.169.254/openstack/latest/meta_data.json"
        until = time.monotonic() + BOOT_S
        while id[1] not in (met := heard([*there, asked])) and time.monotonic() < until:  # sshd comes after the prompt
            time.sleep(1)
        assert id[1] in met, (met, said)
        url = re.search(r"up at http://127\.0\.0\.1:(\d+)", said)
        assert url
        beyond = f"timeout 5 wget -qO- http://10.0.0.1:{url[1]}/identity/ && echo reached"
        alone = heard([*there, f"{beyond}; echo tried"])
        assert "tried" in alone and "reached" not in alone  # the machine's loopback is its own
        status = somebody.run("status", "--json")
        assert msgspec.json.decode(status.stdout)["ssh_ports"] == {id[1]: int(way[2])}
    finally:
        cloud.send_signal(signal.SIGINT)
        code = cloud.wait(60)
    assert code == 0, out.read_text()
    assert living(somebody.state) != set()  # the guest goes on
    done = somebody.run("down", "--purge")
    assert done.returncode == 0, done.stderr
    assert not somebody.state.exists()
    until = time.monotonic() + 20
    while living(somebody.state) and time.monotonic() < until:
        time.sleep(0.1)
    assert not living(somebody.state)


def test_who_wants_a_namespace_and_cannot_have_one_is_told(somebody: Somebody) -> None:
    done = somebody.run("up", "--no-image", "--port", "0", "--config", str(config(somebody, "user")))
    assert done.returncode == 1 and "kilonova up: guests' network cards" in done.stderr, done
    assert "Traceback" not in done.stdout + done.stderr
    done = somebody.run("up", "--no-image", "--port", "0", "--config", str(config(somebody, "root")))
    assert done.returncode == 1 and "neither root nor in a user namespace" in done.stderr, done
    assert "Traceback" not in done.stdout + done.stderr


def heard(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


def config(somebody: Somebody, plane: str) -> Path:
    file = somebody.home / f"{plane}.toml"
    file.write_text(f'[network]\nplane = "{plane}"\n')
    return file


def living(state: Path) -> set[int]:
    """Processes whose command line names the state directory."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if str(state).encode() in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                continue
    return found
