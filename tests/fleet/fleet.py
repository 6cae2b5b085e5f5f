"""A fleet for tests: roles as processes of their own on this machine, over a private database and a private broker.

Companions, APIs, conductors, hosts (one a process); each can be killed, stopped and started again by name.  Hosts are
simulated, or real ones under libvirt, each on a machine of its own (`site.py`), with its guests' networks.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kilonova.cli.client import Client
from kilonova.cli.status import asked
from kilonova.companions.wires.ground import Ground
from kilonova.kit.db import Db
from kilonova.kit.errors import NotFound, Trouble
from kilonova.sim.invariants import wrong
from kilonova.virt.sim import SimState, copy, plugged, used
from tests.engines import Rabbit, ended, free_port
from tests.fleet.site import HERE, Site

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "fleet-" + "x" * 20
COMMON = """
[bus]
url = "{broker}"
heartbeat_s = 6

[identity]
password = "{password}"
admin_password = "{password}"

[companions]
url = "http://{at}:{companions}"

[api]
port = {api}
share_port = true
public_url = "http://127.0.0.1:{api}"

[compute]
driver = "{driver}"
report_interval_s = 1
host_down_after_s = 8
resume_servers_on_start = true

[sim]
directory = "{sim}"
latency_s = {latency_s}
failure_rate = {failure_rate}

[workers]
lease_s = 12
threads = 4
command_timeout_s = 60
build_timeout_s = 90

[scheduler]
apart = {apart}

[quota]
instances = -1
cores = -1
ram = -1

[network]
quota_port = -1

[metadata]
url = "http://{at}:{metadata}/metadata"
shared_secret = "{password}"

[console]
port = {console}

[log]
format = "json"
access = {access}
"""
CONTROLLER = """
[database]
url = "{database}"
"""


class Fleet:
    """Not started yet. Roles are called conductor-0, api-1, host-2 …"""

    def __init__(
        self,
        directory: Path,
        database: str,
        broker: str,
        *,
        hosts: int = 3,
        metal: int = 0,
        schedulers: int = 0,
        latency_s: float = 0.02,
        failure_rate: float = 0.0,
        common: str = COMMON,
        pulled: str = "",
        access: bool = False,
    ) -> None:
        """`pulled`: the host that has a wire of its own to the broker, the role `wire-0`."""
        self.directory, self.database = directory, database
        directory.mkdir(parents=True, exist_ok=True)
        self.ports = {what: free_port() for what in ("companions", "api", "metadata", "console")}
        self.sim = directory / "sim"
        said = {
            "broker": broker, "password": PASSWORD, "sim": self.sim, "latency_s": latency_s,
            "failure_rate": failure_rate, "apart": "true" if schedulers else "false", "at": "127.0.0.1", "driver": "sim",
            "access": "true" if access else "false",
        }  # fmt: skip
        text = common.format(**said, **self.ports)
        self.controller, self.host = directory / "controller.toml", directory / "host.toml"
        self.controller.write_text(text + CONTROLLER.format(database=database))
        self.host.write_text(text)
        self.roles = {"companions-0": "companions"} | {f"api-{i}": "api placement" for i in range(2)}
        self.roles |= {f"conductor-{i}": "conductor" for i in range(2)}
        self.roles |= {f"scheduler-{i}": "scheduler" for i in range(schedulers)}
        self.roles |= {f"host-{i}": "compute" for i in range(hosts)}
        self.wire: tuple[str, ...] = ()
        self.pulled = pulled
        if pulled:
            there, here = urlsplit(broker).port or 0, free_port()
            self.wire = str(here), str(there)
            self.roles = {"wire-0": "relay"} | self.roles
            (directory / f"{pulled}.toml").write_text(text.replace(f":{there}", f":{here}"))
        self.site: Site | None = None
        if metal:
            names = [f"metal-{i}" for i in range(metal)]
            ports = [*self.ports.values(), *(urlsplit(url).port or 0 for url in (broker, database))]
            self.site = Site(Ground("machine", directory), [*names, "console-0"], ports)
            self.roles |= dict.fromkeys(names, "compute") | {"metadata-0": "metadata", "console-0": "console"}
            there = {"at": HERE, "driver": "libvirt", "broker": broker.replace("127.0.0.1", HERE)}
            text = common.format(**(said | there), **self.ports)
            self.metal, self.proxy = directory / "metal.toml", directory / "proxy.toml"
            self.metal.write_text(text)
            self.proxy.write_text(text + CONTROLLER.format(database=database.replace("127.0.0.1", HERE)))
        self.many = sum(role == "compute" for role in self.roles.values())  # hosts
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": ""}

    # -- processes

    def up(self, timeout_s: float = 90) -> float:
        """All of them, until hosts can take servers; the seconds that took."""
        began = time.monotonic()
        self.start("companions-0")
        self.wait(lambda: self.answers("companions"), timeout_s, "companions answer")
        for name in self.roles:
            if name != "companions-0":
                self.start(name)
        self.wait(lambda: self.answers("api"), timeout_s, "the API answers")
        self.wait(lambda: len(self.hosts_up()) == self.many, timeout_s, "all hosts are there")
        return time.monotonic() - began

    def start(self, name: str, *more: str, strange: str = "") -> None:
        """`strange`: what is done in that process before all else, as Python."""
        role, out = self.roles[name], self.directory / f"{name}.out"
        config = self.host if role == "compute" else self.controller
        machine = self.site.machines.get(name) if self.site is not None else None
        if name == self.pulled:
            config = self.directory / f"{name}.toml"
        if machine is not None:
            config = self.proxy if role == "console" else self.metal
        words = ["serve", *role.split(), "--config", str(config), "--state-dir", str(self.directory / name)]
        words += ["--name", name] if role in ("compute", "conductor", "scheduler") else []
        words += ["--port", str(self.ports[role])] if role in ("companions", "metadata") else []
        argv = [sys.executable, "-P", "-m", "kilonova.main", *words, *more]
        if strange:
            code = f"{strange}\nimport sys; from kilonova.main import main; sys.exit(main())"
            argv = [sys.executable, "-P", "-c", code, *words, *more]
        if role == "relay":
            argv = [sys.executable, str(Path(__file__).with_name("relay.py")), *self.wire]
        with out.open("ab") as log:
            self.processes[name] = subprocess.Popen(
                argv if machine is None else machine.within(argv),
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.env, start_new_session=True,
            )  # fmt: skip

    def signal(self, name: str, number: int) -> None:
        self.processes[name].send_signal(number)

    def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)
        self.processes[name].wait(30)

    def stop(self, name: str, timeout_s: float = 30) -> int:
        """Asked to end: what it ended with."""
        self.signal(name, signal.SIGTERM)
        return self.processes[name].wait(timeout_s)

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes.values():
            ended(process)
        if self.site is not None:
            purges = []
            for name, machine in self.site.machines.items():
                words = ["down", "--purge", "--config", str(self.metal), "--state-dir", str(self.directory / name)]
                argv = machine.within([sys.executable, "-P", "-m", "kilonova.main", *words])
                purges.append(
                    subprocess.Popen(argv, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                )
            for purge in purges:
                purge.wait(120)
            self.site.close()

    # -- asking

    def url(self, what: str) -> str:
        return f"http://127.0.0.1:{self.ports[what]}"

    def answers(self, what: str) -> bool:
        return set(asked(self.url(what)).values()) == {"ok"}

    def client(self) -> "FleetClient":
        made = FleetClient(self)
        made.login()
        return made

    def hosts_up(self) -> set[str]:
        try:
            found = self.client().get("/compute/v2.1/os-services?binary=nova-compute")["services"]
        except (Trouble, OSError):
            return set()
        return {s["host"] for s in found if s["state"] == "up"}

    def holds(self) -> dict[str, SimState]:
        """What lies on the hosts' disks, now."""
        return {d.parent.name: SimState(d) for d in sorted(self.sim.glob("*/machines"))}

    def wrong(self, db: Db) -> list[str]:
        """What is not as it must be at rest: in the database, on the hosts."""
        states = self.holds()
        return wrong(
            db,
            {h: copy(s) for h, s in states.items()},
            nics={h: plugged(s) for h, s in states.items()},
            disks={h: used(s) for h, s in states.items()},
        )

    def settled(self, db: Db, timeout_s: float = 60) -> tuple[float, list[str]]:
        """Waits until nothing is wrong: (seconds, what is still)."""
        began = time.monotonic()
        while True:
            try:
                said = self.wrong(db)
            except Exception as e:  # a file that was just removed, a database that has just restarted
                said = [f"{type(e).__name__}: {e}"]
            if not said or time.monotonic() - began > timeout_s:
                return time.monotonic() - began, said
            time.sleep(0.2)

    def wait(self, true: Callable[[], Any], timeout_s: float, what: str) -> Any:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            dead = [n for n, p in self.processes.items() if p.poll() is not None]
            assert not dead, f"{dead} ended: {self.tail(dead[0])}"
            if found := true():
                return found
            time.sleep(0.1)
        raise AssertionError(
            f"{what} within {timeout_s} s\n" + "\n".join(f"== {n}\n{self.tail(n)}" for n in self.roles)
        )

    def tail(self, name: str, most: int = 1500) -> str:
        out = self.directory / f"{name}.out"
        return out.read_text(errors="replace")[-most:] if out.exists() else ""


class FleetClient(Client):
    """Finds each service where the catalog says that it is."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet.url("api"), PASSWORD, timeout_s=30)
        self.fleet, self.more = fleet, dict[str, str]()  # headers

    def _send(self, method: str, path: str, body: Any, more: dict[str, str]) -> tuple[Any, dict[str, str]]:
        ours = path.split("/")[1] in ("identity", "image", "network", "volume")
        self.url = self.fleet.url("companions" if ours else "api")
        return super()._send(method, path, body, self.more | more)

    # -- the words of stories

    def furnish(self) -> tuple[str, str]:
        """An image that servers can be made of, and the network that is for everybody."""
        found = self.get("/image/v2/images")["images"]
        if not found:
            wish = {"name": "pretended", "disk_format": "raw", "container_format": "bare", "visibility": "public"}
            image = self.post("/image/v2/images", wish)["id"]
            self.upload(f"/image/v2/images/{image}/file", [b"\0" * 1024], 1024)
            found = [self.get(f"/image/v2/images/{image}")]
        network = self.get("/network/v2.0/networks?name=private")["networks"][0]["id"]
        return found[0]["id"], network

    def boot(self, name: str, image: str, network: str, **more: Any) -> str:
        wish = {"name": name, "imageRef": image, "flavorRef": "42", "networks": [{"uuid": network}], **more}
        return str(self.post("/compute/v2.1/servers", {"server": wish})["server"]["id"])

    def act(self, id: str, **action: Any) -> None:
        self.post(f"/compute/v2.1/servers/{id}/action", action)

    def server(self, id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/compute/v2.1/servers/{id}")["server"]
        return found

    def until(self, id: str, status: str, timeout_s: float = 40) -> dict[str, Any]:
        """Wait for it, and for nobody being at work on it; "": until it is gone."""
        end, seen = time.monotonic() + timeout_s, dict[str, Any]()
        while time.monotonic() < end:
            try:
                seen = self.server(id)
            except NotFound:
                if not status:
                    return {}
                raise
            if seen["status"] == status and seen["OS-EXT-STS:task_state"] is None:
                return seen
            assert status in ("ERROR", "") or seen["status"] != "ERROR", seen.get("fault")
            time.sleep(0.05)
        raise AssertionError(f"{id} is {seen.get('status')}, {seen.get('OS-EXT-STS:task_state')}, and not {status}")


@contextmanager
def fleet(directory: Path, database: str, broker: Rabbit, **more: Any) -> Iterator[Fleet]:
    one = Fleet(directory, database, broker.url, **more)
    try:
        one.up()
        yield one
    finally:
        one.close()
