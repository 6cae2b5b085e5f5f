"""An ordinary user's data plane: a user namespace of his own, entered, left, entered again, and ended.

The tests run as root and become somebody else (who need not exist) for it, with a copy of what is needed, because
neither checkout nor interpreter of root's can be read by others everywhere.
"""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import kilonova

USER = 54321
NEEDED = ("ip", "nft", "dnsmasq", "unshare", "setpriv")
PATH = f"{os.environ.get('PATH')}:/usr/sbin:/sbin"
ABSENT = [p for p in NEEDED if not shutil.which(p, path=PATH)]
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming an ordinary user needs root"),
    pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}"),
]

STORY = r"""
import json, logging, os, socket, sys, threading
logging.basicConfig(level=logging.DEBUG, format="%(relativeCreated)d %(message)s")
from pathlib import Path
from kilonova.companions.wires import Ground, Wires, userns
from kilonova.companions.wires.forward import Forward
from kilonova.companions.wires.ground import CLOUD, MACHINE
from kilonova.kit.clock import WallClock
from kilonova.model.wiring import FloatingWire, NetworkWire, PortWire, RouterWire, Rule, SubnetWire, Wiring

state = Path(sys.argv[1])
outer = [] if os.environ.get("KILONOVA_INSIDE") else [socket.create_server(("127.0.0.1", 0))]
if outer:
    print(json.dumps({"pid": os.getpid(), "port": outer[0].getsockname()[1]}), flush=True)
userns.reexec_if_needed([sys.executable, *sys.argv], outer, state)
(door,) = userns.inherited()

def metadata(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]

ground = Ground.choose(state)
wires = Wires(ground, metadata_app=metadata, metadata_secret="s", clock=WallClock(), state_dir=state)
inner = SubnetWire("s", "10.0.0.0/24", gateway="10.0.0.1", dhcp_address="10.0.0.2")
outside = SubnetWire("o", "172.24.4.0/24", gateway="172.24.4.1", dhcp=False)
rules = [Rule("egress"), Rule("ingress", protocol="tcp", port_min=22, port_max=22)]
port = PortWire("p", "net-1", "fa:16:3e:00:00:05", "tap5", [("s", "10.0.0.5")], server_id="server", rules=rules)
router = RouterWire(
    "r", [("net-1", "10.0.0.1/24", "fa:16:3f:00:00:01")], ("net-2", "172.24.4.9/24", "fa:16:3f:00:00:02"), "172.24.4.1",
    floating=[FloatingWire("172.24.4.50", "10.0.0.5")],
)
networks = [NetworkWire("net-1", "knone", subnets=[inner]), NetworkWire("net-2", "kntwo", external=True, subnets=[outside])]
wires.apply(Wiring(networks, [port], [router]))
if ground.make("guest"):
    ground.run("ip link add tap5 type veth peer name eth0 address fa:16:3e:00:00:05 netns guest".split())
    ground.run("ip link set tap5 master knone up".split())
    for words in ("address add 10.0.0.5/24 dev eth0", "link set eth0 up", "route add default via 10.0.0.1"):
        ground.run(["ip", *words.split()], "guest")
Forward(door, "172.24.4.50", 22)
with ground.listener("0.0.0.0", 22, "guest") as ssh:
    runtime = ground.runtime / "dhcp-net-1" / "pid"
    said = {"pid": os.getpid(), "uid": os.getuid(), "kind": ground.kind, "dhcp": int(runtime.read_text())}
    print(json.dumps(said | {"problems": wires.status().problems, "out": wires.status().way_out}), flush=True)
    def greet():
        while True:  # who came before the guest's link was up comes again
            guest = ssh.accept()[0]
            guest.sendall(b"hello from the guest")
            guest.close()
    threading.Thread(target=greet, daemon=True).start()
    sys.stdin.readline()  # until somebody was greeted
with ground.enter("guest"):
    wire = socket.create_connection(("169.254.169.254", 80), 5)
wire.sendall(b"GET / HTTP/1.1\r\n\r\n")
print(json.dumps({"metadata": wire.recv(100).decode().splitlines()[0]}), flush=True)
wires.close()
os._exit(0)
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that the user may enter, with a copy of the package and of what it imports."""
    folder = Path(tempfile.mkdtemp(prefix="kilonova-user-"))
    folder.chmod(0o755)
    skip = shutil.ignore_patterns("__pycache__")
    try:
        for package in (kilonova, msgspec):
            source = Path(package.__file__ or "").parent
            shutil.copytree(source, folder / "lib" / source.name, ignore=skip)
        (folder / "story.py").write_text(STORY)
        (folder / "subid").write_text("somebody:300000:65536\n")
        users = {"root": 0, "nobody": 65534, "somebody": USER}
        (folder / "passwd").write_text("".join(f"{name}:x:{id}:{id}::/:/bin/sh\n" for name, id in users.items()))
        os.mknod(folder / "tun", 0o600 | stat.S_IFCHR, os.makedev(10, 200))
        (folder / "tun").chmod(0o666)
        (folder / "state").mkdir()
        os.chown(folder / "state", USER, USER)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def python(home: Path) -> str:
    """An interpreter that the user can run, of the version that our compiled packages are for."""
    for one in (sys.executable, "/usr/bin/python3"):
        tried = subprocess.run([*become(home), one, "-c", "import msgspec"], capture_output=True, check=False, cwd="/")
        if tried.returncode == 0:
            return one
    pytest.skip("no Python here that an ordinary user can run")


def become(home: Path, mapped: bool = False) -> list[str]:
    """The words before a command that is to run as the user; `mapped`: he has a line in /etc/subuid."""
    env = [f"HOME={home}/state", f"PATH={PATH}", f"PYTHONPATH={home}/lib", "PYTHONDONTWRITEBYTECODE=1"]
    words = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "env", "-i", *env]
    mounts = ["mount --bind tun /dev/net/tun"]  # its usual mode, which not every machine has
    if mapped:
        mounts += [
            "mount --bind subid /etc/subuid",
            "mount --bind subid /etc/subgid",
            "mount --bind passwd /etc/passwd",
        ]
    return ["unshare", "-m", "sh", "-ec", f'cd {home}; {"; ".join(mounts)}; cd /; exec "$@"', "sh", *words]


@pytest.mark.parametrize("mapped", [False, True], ids=["without-uidmap", "with-uidmap"])
def test_an_ordinary_user_has_a_data_plane_too(home: Path, python: str, mapped: bool) -> None:
    if mapped and not (shutil.which("newuidmap", path=PATH) and "--map-auto" in told(["unshare", "--help"])):
        pytest.skip("no newuidmap, or an unshare that does not know it")
    command = [*become(home, mapped), python, str(home / "story.py"), str(home / "state")]
    holder, exit, seen = 0, 0, []
    way_out = "by NAT" if shutil.which("slirp4netns", path=PATH) else "none: this namespace has no default route"
    try:
        for _ in range(2):
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            with subprocess.Popen(command, **pipes, text=True, cwd="/") as run:
                assert run.stdin is not None and run.stdout is not None and run.stderr is not None
                outer = json.loads(
                    run.stdout.readline() or pytest.skip(f"no user namespaces: {run.stderr.read()[-300:]}")
                )
                line = run.stdout.readline()
                assert line, run.stderr.read()
                within = json.loads(line)
                assert any(heard(outer["port"]) == b"hello from the guest" for _ in range(5)), (
                    run.kill(),
                    run.stderr.read(),
                )
                print(file=run.stdin, flush=True)
                assert json.loads(run.stdout.readline()) == {"metadata": "HTTP/1.1 200 OK"}, run.stderr.read()
                assert run.wait(20) == 0
            assert within["pid"] == outer["pid"]  # who stops it from outside finds it
            assert within["kind"] == "inside" and within["uid"] == (0 if mapped else USER)
            assert not within["problems"] and within["out"] == way_out
            seen.append(within)
            held = json.loads((home / "state/inside.json").read_text())
            holder, exit = held["pid"], held["exit"]
        assert seen[0]["dhcp"] == seen[1]["dhcp"]  # it went on in between
        assert alive(seen[0]["dhcp"]) and alive(holder)
    finally:
        ends = "import sys; from pathlib import Path; from kilonova.companions.wires import userns; userns.close(Path(sys.argv[1]))"
        subprocess.run([*become(home), python, "-c", ends, str(home / "state")], check=True, cwd="/")
    assert not alive(seen[0]["dhcp"]) and not alive(holder) and not (exit and alive(exit))


def heard(port: int) -> bytes:
    """What the machine is told at that port; nothing while the guest's link is not up yet."""
    try:
        with socket.create_connection(("127.0.0.1", port), 10) as guest:
            guest.settimeout(10)
            said = b""
            while more := guest.recv(100):
                said += more
            return said
    except ConnectionResetError:
        return b""


def told(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": PATH}).stdout


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
