"""An ordinary user's ground: a user namespace of our own, in which Kilonova has its network as root has.

A small process (`inside.py hold`) keeps the namespaces.  Kilonova goes inside under its own process id; guests, DHCP
and the hypervisor's daemon live on in there when it ends, and the next start enters the same place.  `close` ends all.

With the package uidmap and a line in /etc/subuid the user is root in there; without, he keeps his name and has root's
rights over the network only.  Nothing in there is reachable from the machine but through what was handed in: sockets
that listen outside, `argv_inside` (a shell, ssh) and `Forward`.

The way out is a program's work, too: where slirp4netns is installed, guests reach what this user reaches (TCP and UDP;
a resolver answers at 10.0.2.3), though nothing that listens on the machine's loopback.  Without it they do not get out.
"""

import contextlib
import functools
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from kilonova.companions.wires import inside
from kilonova.companions.wires.ground import INSIDE, PATH
from kilonova.kit.errors import Unavailable, Unsupported

SOCKETS = "KILONOVA_SOCKETS"  # file descriptors handed to the process inside, as JSON
UNSHARE = ["unshare", "-n", "-m", "-u", "-U"]  # processes keep their numbers: who stops Kilonova finds it by its own
# fmt: off
WAYS = {
    "uidmap": ["--map-auto", "--map-root-user"],
    "keep":   ["-c", "--keep-caps"],
}
# fmt: on
TUN = "/dev/net/tun"
START_S = 20


class Holder(msgspec.Struct, frozen=True):
    """The process that keeps the namespaces; `began` tells it from another of its number. `exit` is the way out."""

    pid: int
    began: str
    way: Literal["uidmap", "keep"]
    exit: int = 0
    exit_began: str = ""


@functools.cache
def ways() -> tuple[list[str], str]:
    """Which of WAYS work for this user, best first; and, when none does, why not, as a sentence."""
    if not shutil.which("unshare", path=PATH):
        return [], "unshare (package util-linux) is not installed."
    if not os.access(TUN, os.R_OK | os.W_OK):
        return [], f"guests' network cards cannot be made: this user may not open {TUN} (its usual mode is 666)."
    found, why = [], ""
    for name, words in WAYS.items():
        if name == "uidmap" and not shutil.which("newuidmap", path=PATH):
            continue
        # Some systems grant the namespace and no rights in it: only a try tells.
        tried = subprocess.run(
            [*UNSHARE, *words, "ip", "link", "set", "lo", "up"], env=_env(), capture_output=True, text=True, check=False
        )
        if tried.returncode == 0:
            found.append(name)
        else:
            why = tried.stderr.strip().splitlines()[-1] if tried.stderr.strip() else "not permitted"
    return found, "" if found else f"User namespaces cannot be had here: {why}"


def reexec_if_needed(argv: Sequence[str], listen_sockets: Iterable[socket.socket], state_dir: Path) -> None:
    """Becomes `argv` inside, unless this process is root or inside already: then it returns.

    Sockets that listen on the machine are handed on: `inherited` finds them in there.  Raises Unsupported, with the
    reason, where this user can have no namespaces; the caller may go on with QEMU's user networking.
    """
    if os.geteuid() == 0 or os.environ.get(INSIDE):
        return
    command = argv_inside(start(state_dir), argv)
    fds = []
    for one in listen_sockets:
        one.set_inheritable(True)
        fds.append(one.fileno())
    os.environ[SOCKETS] = json.dumps(fds)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, {**os.environ, INSIDE: "1"})  # noqa: S606  (no shell is the point)


def inherited() -> list[socket.socket]:
    """The sockets that were handed in, in their order; none outside."""
    fds = json.loads(os.environ.pop(SOCKETS, "[]"))
    found = []
    for fd in fds:
        one = socket.socket(fileno=fd)
        one.set_inheritable(False)
        found.append(one)
    return found


def start(state_dir: Path) -> Holder:
    """The namespaces of this state directory: those that are there, or new ones. Raises Unsupported, Unavailable."""
    if found := holder(state_dir):
        return _with_exit(found, state_dir)
    possible, why = ways()
    if not possible:
        raise Unsupported(why)
    state_dir.mkdir(parents=True, exist_ok=True)
    way: Literal["uidmap", "keep"] = "uidmap" if possible[0] == "uidmap" else "keep"
    name = f"kilonova-{hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:6]}"
    command = [*UNSHARE, *WAYS[way], *_program("hold"), name, *_kept(state_dir)]
    with (state_dir / "inside.log").open("wb") as log:
        begun = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True, env=_env()
        )
    assert begun.stdout is not None
    with begun.stdout as said:
        if said.readline() != b"ready\n":
            begun.wait(START_S)
            told = (state_dir / "inside.log").read_text(errors="replace").strip().splitlines()
            raise Unavailable("The user namespace did not start.", why=told[-1] if told else "")
    return _with_exit(Holder(begun.pid, _began(begun.pid), way), state_dir)


def holder(state_dir: Path) -> Holder | None:
    """Who keeps the namespaces of this state directory, if they are there."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        found = msgspec.json.decode(_file(state_dir).read_bytes(), type=Holder)
        if _is(found.pid, found.began):
            return found
    return None


def argv_inside(held: Holder, argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` inside; for a shell or `ssh` of the same user as well."""
    return [*_program("enter"), str(held.pid), *argv]


def close(state_dir: Path, timeout_s: float = 10) -> None:
    """Ends the namespaces and every process in them: guests, daemons, Kilonova. `timeout_s` for each to obey."""
    found = holder(state_dir)
    if found:
        place = Path(f"/proc/{found.pid}/ns/user").stat().st_ino
        for number in (signal.SIGTERM, signal.SIGKILL):
            _end(_living_in(place) - {found.pid, os.getpid()}, number, timeout_s)
        for number in (signal.SIGTERM, signal.SIGKILL):  # last, or nobody would find the others again
            _end({found.pid} & _living_in(place), number, timeout_s)
        if _is(found.exit, found.exit_began):
            _end({found.exit}, signal.SIGKILL, timeout_s)
    _file(state_dir).unlink(missing_ok=True)


def _living_in(place: int) -> set[int]:
    """Processes of a user namespace. Its owner may look at them and end them, whatever their user."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if (entry / "ns/user").stat().st_ino == place:
                    found.add(int(entry.name))
    return found


def _end(pids: set[int], number: signal.Signals, timeout_s: float) -> None:
    """Sends a signal to all of them, then waits for all."""
    held = []
    for pid in pids:
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(pid)
            held.append(fd)
            signal.pidfd_send_signal(fd, number)
    for fd in held:
        select.select([fd], [], [], timeout_s)
        os.close(fd)


def _with_exit(found: Holder, state_dir: Path) -> Holder:
    """The holder with a way out, if there can be one; written down."""
    if not _is(found.exit, found.exit_began) and shutil.which("slirp4netns", path=PATH):
        ready, tell = os.pipe()
        words = ["--configure", "--mtu=1500", "--disable-host-loopback", f"--ready-fd={tell}", str(found.pid), "up0"]
        with (state_dir / "exit.log").open("wb") as log:
            begun = subprocess.Popen(
                ["slirp4netns", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_env(),
                pass_fds=[tell],
            )
        os.close(tell)
        if select.select([ready], [], [], START_S)[0] and os.read(ready, 1):
            found = msgspec.structs.replace(found, exit=begun.pid, exit_began=_began(begun.pid))
        else:
            begun.kill()
            begun.wait()
        os.close(ready)
    _file(state_dir).write_bytes(msgspec.json.encode(found))
    return found


def _is(pid: int, began: str) -> bool:
    """Does the process still run that had this number then?"""
    try:
        return pid > 0 and _began(pid) == began
    except OSError:
        return False


def _program(act: str) -> list[str]:
    return [sys.executable, "-I", "-S", str(Path(inside.__file__).resolve()), act]


def _kept(state_dir: Path) -> list[str]:
    """Folders below /run that must stay visible: the new /run would hide them."""
    wanted = [state_dir.resolve(), Path(os.environ.get("XDG_RUNTIME_DIR", "/nowhere"))]
    return [str(p) for p in dict.fromkeys(wanted) if p.is_relative_to("/run") and p.is_dir() and p != Path("/run")]


def _file(state_dir: Path) -> Path:
    return state_dir / "inside.json"


def _env() -> dict[str, str]:
    return {**os.environ, "PATH": PATH, "LC_ALL": "C.UTF-8"}


def _began(pid: int) -> str:
    """When a process started, in ticks since boot. Raises FileNotFoundError where there is none, or a dead one."""
    fields = _stat(pid)
    if fields[0] in "ZX":
        raise FileNotFoundError(pid)
    return fields[19]


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on (proc(5)): state, parent, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
