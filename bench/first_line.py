"""From the accepted POST to the first line of the guest's kernel, through the whole cloud; beside QEMU alone with the same disk.

    python bench/first_line.py [RUNS]

A cloud of its own is started (as root in a network namespace of its own, so the machine sees nothing of it), and
removed.  Turns are taken, so that both meet the same machine: a server by the public API, then QEMU with as many CPUs
and as much memory and an overlay on the same image.  The console's file is watched, which costs the cloud nothing.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from kilonova.cli.client import Client
from kilonova.cli.state import StateDir
from kilonova.companions.guest import build
from kilonova.kit.clock import Ids
from kilonova.kit.errors import NotFound

SOURCE = Path(__file__).resolve().parents[1] / "src"
MARK = b"Linux version"
MOST_S = 300.0


def main(words: list[str]) -> None:
    if os.geteuid() == 0 and not os.environ.get("KILONOVA_BENCH_ALONE"):
        os.environ["KILONOVA_BENCH_ALONE"] = "1"
        script = 'ip link set lo up && exec "$@"'
        os.execvp("unshare", ["unshare", "-n", "sh", "-ec", script, "sh", sys.executable, __file__, *words])
    runs = int(words[0]) if words else 5
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    disk = build(Path(home) / "kilonova" / "guest", progress=print).disk
    with tempfile.TemporaryDirectory(prefix="kilonova-bench-") as there:
        turns = list[tuple[Turn, Turn]]()
        with up(Path(there) / "state") as client:
            made(client, Path(there) / "state")  # the first one fetches the image
            for number in range(runs):
                turns.append((made(client, Path(there) / "state"), alone(disk, Path(there), number)))
                one, other = turns[-1]
                print(
                    f"  cloud {one.wall_s:5.2f} s ({one.cpu_s:.2f} s of CPU), QEMU alone {other.wall_s:5.2f} s ({other.cpu_s:.2f})"
                )
    wall = [statistics.median(turn[which].wall_s for turn in turns) for which in (0, 1)]
    cpu = [statistics.median(turn[which].cpu_s for turn in turns) for which in (0, 1)]
    begun = statistics.median(turn[0].begun_s for turn in turns)
    print("| median of", runs, "| the cloud | QEMU alone | difference |\n|---|--:|--:|--:|")
    print(f"| to the kernel's first line | {wall[0]:.2f} s | {wall[1]:.2f} s | {wall[0] - wall[1]:.2f} s |")
    print(f"| of it until QEMU began | {begun:.2f} s | | |")
    print(f"| CPU time that QEMU took for it | {cpu[0]:.2f} s | {cpu[1]:.2f} s | {cpu[0] - cpu[1]:.2f} s |")


class Turn(NamedTuple):
    """Seconds until QEMU began (its console's file was there), to the first line, and of CPU that QEMU took."""

    begun_s: float
    wall_s: float
    cpu_s: float


@contextmanager
def up(state: Path) -> Iterator[Client]:
    """A cloud, until it could place a server and has an image."""
    env = os.environ | {"PYTHONPATH": str(SOURCE)}
    words = [sys.executable, "-m", "kilonova.main"]
    out = state.parent / "out"
    with out.open("wb") as file:
        where = ["--state-dir", str(state)]
        cloud = subprocess.Popen([*words, "up", "--port", "0", "--yes", *where], env=env, stdout=file, stderr=file)
    try:
        until(lambda: b"Next:" in out.read_bytes() or cloud.poll() is not None)
        url = next(w for w in out.read_text().split() if w.startswith("http://"))
        client = Client(url, StateDir(state).secrets(Ids()).admin_password)
        client.login()
        until(lambda: client.get("/image/v2/images?status=active")["images"])
        yield client
    finally:
        cloud.send_signal(signal.SIGTERM)
        cloud.wait(60)
        subprocess.run([*words, "down", "--purge", *where], env=env, check=True, stdout=subprocess.DEVNULL)


def made(client: Client, state: Path) -> Turn:
    """From the accepted POST. The server is removed."""
    image = client.get("/image/v2/images?status=active")["images"][0]["id"]
    network = next(n["id"] for n in client.get("/network/v2.0/networks")["networks"] if not n["router:external"])
    wish = {"name": "one", "imageRef": image, "flavorRef": "42", "networks": [{"uuid": network}]}
    id = client.post("/compute/v2.1/servers", {"server": wish})["server"]["id"]
    began, name = time.monotonic(), f"hosts/*/instances/{id}/console.log"
    until(lambda: any(state.glob(name)))
    qemu = time.monotonic() - began
    (console,) = state.glob(name)
    until(lambda: MARK in console.read_bytes())
    seconds, cpu = time.monotonic() - began, max(cpu_s(pid) for pid in of_server(id))
    client.delete(f"/compute/v2.1/servers/{id}")
    until(lambda: gone(client, id))
    return Turn(qemu, seconds, cpu)


def of_server(id: str) -> list[int]:
    """Processes whose command line names it: QEMU's, above all."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and id.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def gone(client: Client, id: str) -> bool:
    try:
        client.get(f"/compute/v2.1/servers/{id}")
    except NotFound:
        return True
    return False


def alone(disk: Path, there: Path, number: int) -> Turn:
    """QEMU with the same disk, and nothing around it; emulated, as the cloud's are where KVM does not work."""
    overlay, console = there / f"{number}.qcow2", there / f"{number}.log"
    made_ = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(disk), str(overlay), "1G"]
    subprocess.run(made_, check=True)
    machine = "-machine q35,accel=tcg -cpu max -m 128 -smp 1 -nodefaults -display none -no-reboot".split()
    drive = ["-drive", f"file={overlay},format=qcow2,if=virtio", "-serial", f"file:{console}"]
    began = time.monotonic()
    qemu = subprocess.Popen(["qemu-system-x86_64", *machine, *drive])
    try:
        until(lambda: console.exists() and MARK in console.read_bytes())
        return Turn(0, time.monotonic() - began, cpu_s(qemu.pid))
    finally:
        qemu.kill()
        qemu.wait()


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + MOST_S
    while not true():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


if __name__ == "__main__":
    main(sys.argv[1:])
