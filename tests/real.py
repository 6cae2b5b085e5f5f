"""A real cloud for tests: `kilonova up` as a process of its own, in a network namespace that plays the machine.

Nothing of it touches the machine's own network: API, bridges, DHCP and floating IPs are in the namespace, and so is
every client that the tests start (`cloud.run`).  It is ended by process id, and all it made is removed.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from kilonova.cli.state import started
from kilonova.companions.guest import build

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.prefix) / "bin"


class Machine:
    """A network namespace with a loopback of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)

    def within(self, argv: list[str]) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.name}", *argv]

    def close(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], check=False)


class RealCloud:
    """`options` are more words for `kilonova up`. Not started yet."""

    def __init__(self, directory: Path, machine: Machine, *options: str, env: dict[str, str] | None = None) -> None:
        self.directory, self.machine, self.options = directory, machine, options
        self.state = directory / "state"
        self.env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HOME": os.environ.get("HOME", "/root")} | (env or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.out = directory / "up.out"

    @property
    def clouds(self) -> Path:
        return self.state / "clouds.yaml"

    def up(self, timeout_s: float = 60) -> float:
        """Until it is ready; gives the seconds that took."""
        began = time.monotonic()
        with self.out.open("ab") as out:
            argv = [sys.executable, "-m", "kilonova.main", "up", "--yes", "--state-dir", str(self.state), *self.options]
            self.process = subprocess.Popen(
                self.machine.within(argv),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env=self.env,
                start_new_session=True,
            )
        self.wait(lambda: self.status()[0] == 0, timeout_s, "the cloud is not ready")
        return time.monotonic() - began

    def status(self) -> tuple[int, dict[str, Any]]:
        argv = [sys.executable, "-m", "kilonova.main", "status", "--json", "--state-dir", str(self.state)]
        done = subprocess.run(self.machine.within(argv), capture_output=True, env=self.env, timeout=60)
        return done.returncode, msgspec.json.decode(done.stdout) if done.stdout else {}

    def kill(self, number: int = signal.SIGKILL) -> None:
        """The process of the cloud; its guests and their daemon are others."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)

    def down(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def purge(self) -> None:
        """Machines, daemon, networks, files: nothing is left."""
        self.down()
        argv = [sys.executable, "-m", "kilonova.main", "down", "--purge", "--state-dir", str(self.state)]
        subprocess.run(self.machine.within(argv), env=self.env, timeout=120, check=False, capture_output=True)
        shutil.rmtree(self.state, ignore_errors=True)

    # ---- clients, in the machine

    def run(self, *argv: str, timeout_s: float = 120, check: bool = True, **env: str) -> str:
        """What a program of this machine printed. Raises AssertionError with its words when it failed."""
        more = {"OS_CLIENT_CONFIG_FILE": str(self.clouds), "OS_CLOUD": "kilonova"} | env
        done = subprocess.run(
            self.machine.within(list(argv)),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.env | more,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout if check else f"{done.returncode} {done.stdout}{done.stderr}"

    def openstack(self, words: str, *more: str, **how: Any) -> str:
        return self.run(str(BIN / "openstack"), *words.split(), *more, **how)

    def json(self, words: str, *more: str) -> Any:
        return msgspec.json.decode(self.openstack(words, *more, "-f", "json"))

    def nova(self, words: str, **how: Any) -> str:
        return self.run(str(BIN / "nova"), *words.split(), **self.openrc(), **how)

    def openrc(self) -> dict[str, str]:
        """The variables of the file that `up` wrote."""
        text = (self.state / "openrc").read_text()
        said = re.findall(r"^export (\w+)=(.*)$", text, re.MULTILINE)
        return {name: "".join(shlex.split(value)) for name, value in said} | {"OS_CLOUD": ""}

    def wait(self, true: Callable[[], Any], timeout_s: float, what: str) -> Any:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if self.process is not None and self.process.poll() is not None:
                break
            if found := true():
                return found
            time.sleep(0.1)
        log = self.state / "kilonova.log"
        tail = log.read_text()[-3000:] if log.exists() else ""
        raise AssertionError(f"{what} within {timeout_s} s\n{self.out.read_text()[-2000:]}\n{tail}")

    def console(self, server: str, marker: str, timeout_s: float = 120) -> str:
        """The console log, once it has `marker`."""

        def look() -> str:
            text = self.openstack(f"console log show {server}")
            return text if marker in text else ""

        return str(self.wait(look, timeout_s, f"{server} never said {marker!r}"))


def guest_cache() -> Path:
    """Built once for all tests, as `kilonova up` would, where the machine can still reach its packages."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    build(home / "kilonova/guest", progress=lambda _: None)
    return home


def processes_of(directory: Path) -> list[str]:
    """Command lines of living processes that name this directory."""
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            words = (p / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in words and started(int(p.name)):
            found.append(words)
    return found
