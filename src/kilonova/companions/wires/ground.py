"""Where the data plane lives: a network namespace of this cloud, the machine's own one, or nowhere.

Three spaces have a name here.  `MACHINE` is the namespace Kilonova's process was started in.  `CLOUD` holds bridges
and taps: a namespace of its own where we may make one, else the same as the machine's.  Every network with DHCP and
every router has an inner namespace, so that projects may use the same addresses.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from kilonova.kit.errors import Refused, Trouble, Unavailable, Unsupported

CLOUD = ""
MACHINE = "machine"
NETNS = Path("/run/netns")  # where iproute2 keeps the names of namespaces
INSIDE = "KILONOVA_INSIDE"  # set for a process that userns.py brought into a user namespace of ours

CLONE_NEWNET = 0x40000000
IP_FREEBIND = 15
PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"

Kind = Literal["namespace", "machine", "inside", "qemu", "none"]
# fmt: off
KINDS: dict[str, Kind | Literal["auto"]] = {
    "auto": "auto",
    "namespace": "namespace", "root": "namespace",
    "machine":   "machine",
    "user":      "inside",    "inside": "inside",
    "slirp":     "qemu",      "qemu": "qemu",
    "none":      "none",
}
# fmt: on

_libc = ctypes.CDLL(None, use_errno=True)


class Ground:
    """`kind` says which ground it is, `why` in a sentence why that one was taken.

    `tag` (6 hex digits of the state directory) tells the things of several clouds on one machine apart.
    `forward`: may Kilonova switch on forwarding of packets on the machine, so that guests get out?
    """

    def __init__(self, kind: Kind, state_dir: Path, *, why: str = "", forward: bool = False) -> None:
        self.kind, self.why, self.forward = kind, why, forward
        self.tag = hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:6]
        self.machine = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.runtime = Path(f"/run/kilonova-{self.tag}") if os.geteuid() == 0 else state_dir / "wires"

    @classmethod
    def choose(cls, state_dir: Path, want: str = "auto", *, forward: bool = False) -> "Ground":
        """The first ground that can be had, or the one wanted.

        `want` is auto, namespace (or root), machine, user, slirp or none.  Raises Refused, with the reason, where
        the wanted one cannot be had; auto always finds one, if need be `qemu`: its own user networking.
        """
        kind = KINDS.get(want)
        if kind is None:
            raise Refused(f"There is no ground called {want!r} for networks: {', '.join(KINDS)}.")
        if kind == "qemu":
            return cls(kind, state_dir, why="Networks by QEMU alone, as configured.", forward=forward)
        if kind == "none":
            return cls(kind, state_dir, why="No networks at all, as configured.")
        if kind == "auto" and os.environ.get(INSIDE):
            kind = "inside"
        if kind == "inside" and not os.environ.get(INSIDE):
            raise Refused("This process is not in a user namespace of Kilonova's own.")
        lacking = _lacking()
        if lacking and kind != "auto":
            raise Refused(f"Networks cannot be made here: {lacking}")
        if lacking:
            return cls("qemu", state_dir, why=f"Networks by QEMU alone: {lacking}", forward=forward)
        if kind == "inside":
            return cls(kind, state_dir, why="In a user namespace of our own.", forward=True)
        if kind == "machine":
            return cls(kind, state_dir, why="In the machine's own network namespace, as wanted.", forward=forward)
        return cls("namespace", state_dir, why="In a network namespace of this cloud's own.", forward=forward)

    @property
    def wired(self) -> bool:
        """Has it a data plane of ours? Else guests have QEMU's user networking, or nothing."""
        return self.kind not in ("qemu", "none")

    @property
    def own(self) -> bool:
        """Is the cloud's namespace another than the machine's?"""
        return self.kind == "namespace"

    @property
    def alone(self) -> bool:
        """Is everything in the cloud's namespace ours?"""
        return self.kind != "machine"

    @property
    def name(self) -> str:
        """The cloud's namespace, as `ip netns` lists it; inner ones begin with it and a dash."""
        return f"kilonova-{self.tag}"

    @property
    def alias(self) -> str:
        """What links of ours bear in a namespace that others use as well."""
        return f"kilonova:{self.tag}"

    @property
    def netns_path(self) -> str | None:
        """For a hypervisor's daemon: the namespace to start it in; None for the current one."""
        return str(NETNS / self.name) if self.own else None

    def inner(self, what: Literal["dhcp", "router"], id: str) -> str:
        return f"{self.name}-{what}-{id[:11]}"

    def prepare(self) -> None:
        """Makes the cloud's namespace, where it is to be one and is not there."""
        if self.wired:
            self.runtime.mkdir(mode=0o755, parents=True, exist_ok=True)
        if self.own:
            self.make(self.name)

    def make(self, name: str) -> bool:
        """A namespace with its loopback up. True when it was not there before."""
        if self.identity(name) is not None:
            return False
        for last in (False, True):
            (NETNS / name).unlink(missing_ok=True)  # left by `ip netns add` that died half-way
            try:
                self._host_run("ip", "netns", "add", name)
                break
            except Unavailable:  # two that make the machine's first namespace at once disturb each other
                if last:
                    raise
        self.run(["ip", "link", "set", "lo", "up"], name)
        return True

    def drop(self, name: str) -> None:
        """The namespace, and what still runs in it."""
        path = NETNS / name
        if not path.exists():
            return
        if self.identity(name) is not None:
            for pid in self._host_run("ip", "netns", "pids", name).split():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/comm").read_text().strip() == "dnsmasq":
                        os.kill(int(pid), 15)
            self._host_run("ip", "netns", "delete", name)
        path.unlink(missing_ok=True)

    def made(self) -> set[str]:
        """Names of all inner namespaces of this cloud, whoever made them."""
        return {p.name for p in NETNS.glob(f"{self.name}-*")}

    def identity(self, name: str) -> int | None:
        """A number that changes when a namespace is made anew under the same name; None where there is none."""
        try:
            found, nets = (NETNS / name).stat(), os.fstat(self.machine)
        except OSError:
            return None
        return found.st_ino if found.st_dev == nets.st_dev else None

    @contextlib.contextmanager
    def enter(self, space: str = CLOUD) -> Iterator[None]:
        """The calling thread is in that space meanwhile: its new sockets, its children, its /proc/sys/net."""
        if not self.wired:
            raise Unsupported("This host has no networks of its own.", why=self.why)
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._join(space)
            try:
                yield
            finally:
                _setns(here)
        finally:
            os.close(here)

    def run(self, argv: list[str], space: str = CLOUD, *, text: str | None = None, timeout_s: float = 30) -> str:
        """Runs a program there and gives what it said. Raises Unavailable when it failed; its words are in `why`."""
        with self.enter(space):
            return _run(argv, text, timeout_s)

    def popen(self, argv: list[str], space: str = CLOUD) -> "subprocess.Popen[bytes]":
        """Starts a program there that lives on; standard streams as ours."""
        with self.enter(space):
            return subprocess.Popen(argv, env={**os.environ, "PATH": PATH})

    def listener(self, address: str, port: int, space: str = CLOUD, *, backlog: int = 64) -> socket.socket:
        """A listening TCP socket whose other ends are in that space; use it from anywhere. Raises Unavailable."""
        version = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.enter(space):
            one = socket.socket(version, socket.SOCK_STREAM)
            try:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
                one.bind(socket.getaddrinfo(address, port, version, flags=socket.AI_NUMERICHOST)[0][4])
                one.listen(backlog)
            except OSError as e:
                one.close()
                raise Unavailable(f"Cannot listen on {address} port {port}: {e.strerror}.", why=f"in {space}") from None
            return one

    def connect(self, address: str, port: int, space: str = CLOUD, *, timeout_s: float = 10) -> socket.socket:
        """A TCP connection made from that space; use it from anywhere. Raises Unavailable."""
        with self.enter(space):
            try:
                return socket.create_connection((address, port), timeout_s)
            except OSError as e:
                raise Unavailable(f"Nobody answers at {address} port {port}: {e.strerror or e}.") from None

    def close(self) -> None:
        os.close(self.machine)

    def _join(self, space: str) -> None:
        if space == MACHINE or (space == CLOUD and not self.own):
            return _setns(self.machine)
        try:
            there = os.open(NETNS / (space or self.name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise Unavailable("A network of this host is gone.", why=f"namespace {space or self.name}: {e}") from None
        try:
            _setns(there)
        finally:
            os.close(there)

    def _host_run(self, *argv: str) -> str:
        return _run(list(argv), None, 30)


def _lacking() -> str:
    """What keeps this process from making networks, as a sentence; empty when nothing does."""
    if absent := [p for p in ("ip", "nft", "dnsmasq") if not shutil.which(p, path=PATH)]:
        return f"{', '.join(absent)} not installed."
    try:
        held = int(_status("CapEff"), 16)
    except (OSError, ValueError):
        return "/proc does not say what this process may do."
    if not (held >> 12 & 1 and held >> 21 & 1):
        return "this process may not change networks (it is neither root nor in a user namespace)."
    # Where root is confined (a container without privileges), only trying tells.
    probe = subprocess.run(["unshare", "-n", "true"], env={"PATH": PATH}, capture_output=True, text=True, check=False)
    return probe.stderr.strip() if probe.returncode else ""


def _status(key: str) -> str:
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return line.split()[1]
    raise ValueError(key)


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise Unavailable("This host's network namespaces cannot be entered.", why=os.strerror(number))


def _run(argv: list[str], text: str | None, timeout_s: float) -> str:
    try:
        done = subprocess.run(
            argv,
            input=text if text is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={"PATH": PATH, "LC_ALL": "C.UTF-8"},
        )
    except FileNotFoundError:
        raise Refused(f"{argv[0]} is not installed on this host.") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{argv[0]} did not end in {timeout_s:.0f} s.", why=" ".join(argv)) from None
    if done.returncode:
        raise Unavailable(
            f"This host's network could not be changed: {argv[0]} refused.",
            why=f"{' '.join(argv)}: {done.stderr.strip()[:2000]}",
        )
    return done.stdout


__all__ = ["CLOUD", "INSIDE", "MACHINE", "Ground", "Trouble"]
