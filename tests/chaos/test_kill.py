"""kill -9 of a whole cloud, as a process, in the middle of builds and deletes: what it promised holds after the restart.

At the boundaries themselves, one by one, `test_boundaries` kills; here it is a real process with real threads, a
database that is a file, and moments that nobody chose.
"""

import contextlib
import ctypes
import http.client
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kilonova.cli.client import Client
from kilonova.cli.state import StateDir
from kilonova.cli.status import asked
from kilonova.companions.wires.ground import Ground
from kilonova.kit.clock import Ids
from kilonova.kit.db import Db
from kilonova.kit.errors import NotFound, Trouble, Unavailable
from kilonova.sim.invariants import wrong
from kilonova.virt.libvirt.daemon import Private
from kilonova.virt.libvirt.xml import NAMESPACE, epoch_of
from kilonova.virt.sim import SimState, copy
from tests.real import Machine, RealCloud, guest_cache, processes_of

ROOT = Path(__file__).resolve().parents[2]
RESTING = {"ACTIVE", "SHUTOFF", "ERROR"}
REST_S = 10.0  # so soon after a restart all must be at rest
KILLS = 50
CLIENTS = 3
MOST = 16  # servers at the same time
CLONE_NEWNET = 0x40000000


class SimCloud:
    """`kilonova up --driver sim` with three hosts whose acts take their time and often fail."""

    def __init__(self, directory: Path, port: int) -> None:
        self.state, self.port, self.out = directory / "state", port, directory / "up.out"
        self.url = f"http://127.0.0.1:{port}"
        self.env = os.environ | {
            "PYTHONPATH": str(ROOT / "src"),
            "KILONOVA_SIM__LATENCY_S": "0.05",
            "KILONOVA_SIM__FAILURE_RATE": "0.2",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        words = ["up", "--driver", "sim", "--sim-hosts", "3", "--port", str(self.port), "--state-dir", str(self.state)]
        with self.out.open("ab") as out:
            argv = [sys.executable, "-m", "kilonova.main", *words]
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=self.env)
        until = time.monotonic() + 60
        while set(asked(self.url).values()) != {"ok"}:
            assert self.process.poll() is None and time.monotonic() < until, self.out.read_text()[-2000:]
            time.sleep(0.05)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def client(self) -> Client:
        made = Client(self.url, StateDir(self.state).secrets(Ids()).admin_password, timeout_s=20)
        try:
            made.login()
        except Unavailable as e:
            time.sleep(1)
            raise AssertionError(f"{e.said}; process: {self.process and self.process.poll()}; {asked(self.url)}") from e
        return made

    def holds(self) -> dict[str, dict[str, tuple[str, int]]]:
        return {d.parent.name: copy(SimState(d)) for d in sorted((self.state / "hosts").glob("*/machines"))}


class Storm:
    """Clients who build and delete as fast as they can, until the cloud is gone; and what it promised them."""

    def __init__(self, cloud: SimCloud, seed: int) -> None:
        self.cloud, self.seed = cloud, seed
        self.guard = threading.Lock()
        self.here: set[str] = set()  # a build was accepted, and nobody has asked to delete it
        self.gone: set[str] = set()  # its delete was accepted
        self.all: set[str] = set()
        self.failures: list[str] = []  # answers that nobody should ever get
        self.names = iter(range(1_000_000))
        self.counts: Counter[str] = Counter()
        self.errors: set[str] = set()  # rested in error once, with a fault

    def blow(self, client: Client, round: int, seconds: float) -> None:
        """For so long, and then the power goes."""
        over = threading.Event()
        wishes = self.wishes(client)
        crew = [
            threading.Thread(target=self._one, args=(client, wishes, random.Random(f"{self.seed}/{round}/{i}"), over))
            for i in range(CLIENTS)
        ]
        for t in crew:
            t.start()
        time.sleep(seconds)
        self.cloud.kill()
        over.set()
        for t in crew:
            t.join(30)
            assert not t.is_alive()

    def wishes(self, client: Client) -> dict[str, Any]:
        image = client.get("/image/v2/images?name=sim-image&status=active")["images"][0]["id"]
        nets = client.get("/network/v2.0/networks?name=private")["networks"]
        return {"imageRef": image, "flavorRef": "42", "networks": [{"uuid": nets[0]["id"]}]}

    def _one(self, client: Client, wishes: dict[str, Any], dice: random.Random, over: threading.Event) -> None:
        while not over.is_set():
            try:
                self._build_or_delete(client, wishes, dice)
                over.wait(0.03)
            except (Unavailable, NotFound, http.client.HTTPException, OSError):
                over.wait(0.02)
            except Trouble as e:
                self.failures.append(e.said)

    def _build_or_delete(self, client: Client, wishes: dict[str, Any], dice: random.Random) -> None:
        with self.guard:
            known, name = sorted(self.here), f"s{next(self.names)}"
            victim = dice.choice(known) if known and dice.random() < len(known) / MOST else None
            if victim is not None:
                self.here.discard(victim)
        if victim is None:
            id = client.post("/compute/v2.1/servers", {"server": wishes | {"name": name}})["server"]["id"]
            with self.guard:
                self.here.add(id)
                self.all.add(id)
        else:
            client.delete(f"/compute/v2.1/servers/{victim}")
            with self.guard:
                self.gone.add(victim)

    def unsettled(self, client: Client, db: Db) -> list[str]:
        """What is not yet, or never will be, as users were told."""
        seen = {s["id"]: s for s in client.get("/compute/v2.1/servers/detail?all_tenants=1&limit=1000")["servers"]}
        said = [f"{id} {s['status']} {s['OS-EXT-STS:task_state']}" for id, s in seen.items() if not rests(s)]
        said += [f"{id} is promised and not there" for id in self.here - set(seen)]
        said += [f"{id} should be gone" for id in self.gone & set(seen)]
        if not said:
            said = wrong(db, self.cloud.holds())
        self.all |= set(seen)
        if not said:
            self.errors |= {id for id, s in seen.items() if s["status"] == "ERROR"}
            self.here |= set(seen)  # with builds whose answers were lost, and those whose delete was never heard
        self.counts = Counter(s["status"] for s in seen.values())
        return said


def rests(server: dict[str, Any]) -> bool:
    well = server["status"] in RESTING and server["OS-EXT-STS:task_state"] is None
    return well and (server["status"] != "ERROR" or bool(server.get("fault", {}).get("message")))


def settled(look: Callable[..., list[str]], *at: Any) -> tuple[float, list[str]]:
    """(Seconds it took, what is wrong in the end)."""
    began = time.monotonic()
    while (said := look(*at)) and time.monotonic() - began < REST_S:
        time.sleep(0.2)
    return time.monotonic() - began, said


@pytest.mark.slow
@pytest.mark.timeout(600)  # 50 starts of a cloud: two minutes on an idle machine
def test_fifty_kills_of_a_cloud_of_simulated_hosts(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud, dice = SimCloud(tmp_path, free_port), random.Random(2)
    storm = Storm(cloud, 2)
    cloud.up()
    db = Db(f"sqlite:///{cloud.state / 'kilonova.db'}", threads=2)
    try:
        client = cloud.client()
        settled(lambda: [] if client.get("/image/v2/images?name=sim-image&status=active")["images"] else ["image"])
        more = dict.fromkeys(("instances", "cores", "ram"), -1)
        client.put(f"/compute/v2.1/os-quota-sets/{client.project_id}", {"quota_set": more})
        slowest, caught, stuck = 0.0, 0, []
        for round in range(KILLS):
            storm.blow(client, round, dice.uniform(0.05, 0.8))
            with db.read() as tx:
                caught += tx.exec_driver_sql("SELECT count(*) FROM runs WHERE state = 'running'").scalar_one()
            cloud.up()
            client = cloud.client()
            took, said = settled(storm.unsettled, client, db)
            slowest = max(slowest, took)
            if said:
                stuck += [f"after kill {round}: {line}" for line in said]
                break
        kept = storm.counts
        for id in storm.here:
            client.delete(f"/compute/v2.1/servers/{id}")
        storm.gone, storm.here = storm.gone | storm.here, set()
        _, left = settled(lambda: storm.unsettled(client, db) + [h for h, held in cloud.holds().items() if held])
        with capsys.disabled():
            print(
                f"\n{KILLS} kills, {caught} runs under way at them, {len(storm.all)} servers, {len(storm.errors)} of them once in error: {dict(kept)},"
                f" gone {len(storm.all) - sum(kept.values())}, stuck {len(stuck)}, leaked {len(left)};"
                f" at rest at the latest {slowest:.1f} s after the restart"
            )
        assert stuck == [] and left == [] and storm.failures == []
        assert caught >= KILLS / 2
    finally:
        if cloud.process is not None and cloud.process.poll() is None:
            cloud.process.send_signal(signal.SIGTERM)
            try:
                cloud.process.wait(30)
            except subprocess.TimeoutExpired:
                cloud.process.kill()
        db.close()


# ---- real machines


@contextlib.contextmanager
def inside(machine: Machine) -> Iterator[None]:
    """This thread's sockets are the machine's."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as home, Path(f"/run/netns/{machine.name}").open() as there:
        assert libc.setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


class Metal:
    """What a real cloud has outside its database, asked of the machine itself."""

    def __init__(self, cloud: RealCloud) -> None:
        self.cloud, self.machine = cloud, cloud.machine
        self.host = next((cloud.state / "hosts").iterdir())

    def client(self) -> Client:
        made = Client(self.cloud.status()[1]["url"], StateDir(self.cloud.state).secrets(Ids()).admin_password)
        with inside(self.machine):
            made.login()
        return made

    def processes(self) -> dict[str, int]:
        """{server: the process id of its QEMU}."""
        found = {}
        for d in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (d / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if "qemu-system" in words[0] and "-uuid" in words and any(str(self.cloud.state) in w for w in words):
                    found[words[words.index("-uuid") + 1]] = int(d.name)
        return found

    def domains(self) -> dict[str, tuple[str, int]]:
        """{server: (power, epoch)}, of libvirt."""
        import libvirt

        socket = Private(self.host / "libvirt", ids=Ids()).socket
        line = libvirt.open(f"qemu+unix:///system?socket={socket}")
        try:
            return {
                d.UUIDString(): (
                    "running" if d.isActive() else "shutdown",
                    epoch_of(d.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE, 0))[1],
                )
                for d in line.listAllDomains()
            }
        finally:
            line.close()

    def directories(self) -> set[str]:
        return {d.name for d in (self.host / "instances").iterdir()}

    def taps(self) -> set[str]:
        names = self.cloud.run("ip", "-n", Ground.choose(self.cloud.state).name, "-o", "link").splitlines()
        return {n for line in names if (n := line.split(": ")[1].split("@")[0]).startswith("tap")}


def leftovers(metal: Metal, client: Client, db: Db) -> list[str]:
    """What is not as users see it: on the host, in the network service, in the database."""
    import libvirt

    with inside(metal.machine):
        seen = {s["id"]: s for s in client.get("/compute/v2.1/servers/detail?all_tenants=1")["servers"]}
        ports = client.get("/network/v2.0/ports")["ports"]
    said = [f"{id} {s['status']} {s['OS-EXT-STS:task_state']}" for id, s in seen.items() if not rests(s)]
    if said:
        return said
    active = {id for id, s in seen.items() if s["status"] == "ACTIVE"}
    try:
        domains, processes = metal.domains(), metal.processes()
    except libvirt.libvirtError as e:
        return [f"libvirt: {e}"]
    plugged = {p["id"] for p in ports if p["device_owner"].startswith("compute:")}
    of = {p["id"] for p in ports if p["device_id"] in seen}
    said += [f"domain {id}" for id in domains.keys() - seen.keys()]
    said += [f"process {id}" for id in processes.keys() - seen.keys()]
    said += [f"directory {id}" for id in metal.directories() - seen.keys()]
    said += [f"port {id}" for id in plugged - of]
    said += [f"{id} is ACTIVE without a machine" for id in active if id not in domains or id not in processes]
    said += [f"tap {n}" for n in metal.taps() ^ {f"tap{id[:11]}" for id in plugged}]
    return said + wrong(
        db,
        {metal.host.name: domains},
        [(p["id"], p["device_id"], p["binding:host_id"]) for p in ports if p["device_owner"].startswith("compute:")],
    )


ABSENT = [
    n
    for n in ("libvirtd", "qemu-system-x86_64", "nft", "dnsmasq")
    if not shutil.which(n, path="/usr/sbin:/usr/bin:/sbin:/bin")
]


@pytest.mark.metal
@pytest.mark.skipif(os.geteuid() != 0 or bool(ABSENT), reason=f"needs root, and: {', '.join(ABSENT)}")
def test_five_kills_of_a_cloud_of_real_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guests go on without their cloud, and what it was about to make or remove is made or removed by the next one."""
    guest_cache()
    machine, dice = Machine(f"kn-kill-{os.getpid()}"), random.Random(5)
    cloud = RealCloud(tmp_path, machine)
    db: Db | None = None
    try:
        cloud.up()
        cloud.wait(lambda: (cloud.state / "hosts").is_dir() and any((cloud.state / "hosts").iterdir()), 30, "no host")
        db, metal = Db(f"sqlite:///{cloud.state / 'kilonova.db'}", threads=2), Metal(cloud)
        kept: dict[str, int] = {}  # as `Metal.processes`
        client, made, survived, slowest = metal.client(), 0, 0, 0.0
        cloud.wait(lambda: _image(machine, client), 60, "no image")
        for round in range(5):
            with inside(machine):
                wish = {"imageRef": _image(machine, client), "flavorRef": "42", "networks": _network(client)}
                if round % 2 == 0:  # killed in the builds; else in the deletes
                    for i in range(3):
                        client.post("/compute/v2.1/servers", {"server": wish | {"name": f"k{round}-{i}"}})
                        made += 1
                else:
                    for s in client.get("/compute/v2.1/servers")["servers"][:2]:
                        client.delete(f"/compute/v2.1/servers/{s['id']}")
                        kept.pop(s["id"], None)
            time.sleep(dice.uniform(0.0, 1.5))
            cloud.kill()
            assert {id: pid for id, pid in metal.processes().items() if id in kept} == kept
            cloud.up()
            client = metal.client()
            took, said = settled(leftovers, metal, client, db)
            slowest = max(slowest, took)
            assert said == [], f"after kill {round}"
            now = metal.processes()
            assert {id: pid for id, pid in now.items() if id in kept} == kept, "a guest was started anew"
            survived, kept = survived + len(kept), now
        with inside(machine):
            all = client.get("/compute/v2.1/servers/detail")["servers"]
            counts = Counter(s["status"] for s in all)
            faults = Counter(s["fault"]["message"] for s in all if s["status"] == "ERROR")
            for s in all:
                client.delete(f"/compute/v2.1/servers/{s['id']}")
        _, left = settled(lambda: leftovers(metal, client, db) + sorted(metal.directories()) + sorted(metal.taps()))
        with capsys.disabled():
            print(
                f"\n5 kills, {made} servers: {dict(counts)} {dict(faults)}, gone {made - len(all)}, stuck 0, leaked {len(left)};"
                f" {survived} times a guest survived with its process; at rest at the latest {slowest:.1f} s after"
            )
        assert left == [] and faults == {}
        assert survived >= 5
    finally:
        if db is not None:
            db.close()
        cloud.purge()
        machine.close()
    assert processes_of(cloud.state) == []


def _image(machine: Machine, client: Client) -> str:
    with inside(machine):
        found = client.get("/image/v2/images?name=kilonova-guest&status=active")["images"]
    return found[0]["id"] if found else ""


def _network(client: Client) -> list[dict[str, str]]:
    return [{"uuid": client.get("/network/v2.0/networks?name=private")["networks"][0]["id"]}]
