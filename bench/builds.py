"""Durable builds a second, end to end: POST /servers until the server is ACTIVE. Say on what machine.

    python bench/builds.py [N] [URL]      N servers (1000) over HTTP; another database than SQLite, as SQLAlchemy writes it

A whole cloud in one process, as `kilonova up` has it, but for the hypervisors, which are simulated: identity, image
and network companions, API behind a real HTTP server, conductor, scheduler, hosts with their ledgers on disk.  The
clients are another process.  Also: what the parts cost alone, and how many SQL statements and commits a build takes.
"""

import http.client
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.api.app import service as compute_service
from kilonova.api.host_book import HostBook
from kilonova.api.registry import World as ApiWorld
from kilonova.clients import Inside, Login, neighbours
from kilonova.companions import identity, image, network
from kilonova.companions.identity import SERVICE_USER
from kilonova.compute.sims import SimHosts
from kilonova.conductor.app import Conductor
from kilonova.kit.ask import Asker
from kilonova.kit.bus import MemoryBus
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.db import Db, meta
from kilonova.kit.ends import Ends
from kilonova.kit.http import Mount, Server, listen
from kilonova.kit.journal import RUNS
from kilonova.model import options
from kilonova.model.options import Config
from kilonova.scheduler.select import Scheduler
from kilonova.store import hosts, servers

PASSWORD = "only for this bench"


class Bench:
    """The cloud. `n_hosts` simulated ones, large enough for everything."""

    def __init__(self, directory: Path, url: str | None, n_hosts: int = 20) -> None:
        quota = options.Quota(instances=-1, cores=-1, ram=-1)
        self.config = config = msgspec.structs.replace(Config(), quota=quota)
        clock, ids, dice = WallClock(), Ids(), random.Random(1)
        self.db = db = Db(url or f"sqlite:///{directory}/cloud.db")
        meta.drop_all(db.engine)
        meta.create_all(db.engine)
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        base = f"http://127.0.0.1:{self.port}"
        realm = identity.open_realm(db, clock, ids, config.identity, directory)
        first = identity.bootstrap(realm, directory, admin_password=PASSWORD)
        images = image.open_store(db, clock, ids, config.image, directory / "images")
        wide = msgspec.structs.replace(config.network, private_cidr="10.0.0.0/16")
        networks = network.World(db, clock, ids, wide)
        network.bootstrap(networks, first.admin_project_id)
        apps: dict[str, Any] = {
            "/identity": identity.service(realm),
            "/image": image.service(images, realm.gate),
            "/network": network.make_service(networks, realm.gate),
        }
        inside = {name.strip("/"): Inside(app, base + name) for name, app in apps.items()}
        near = neighbours(clock, Login(SERVICE_USER, first.service_password), **inside)
        self.bus = bus = MemoryBus()
        scheduler = Scheduler(db, clock=clock, dice=dice, options=config.scheduler)
        self.conductor = Conductor(
            "c0", db, bus, near, scheduler.choose, clock=clock, ids=ids, dice=dice, config=config
        )
        sim = options.Sim(hosts=n_hosts, cpus=10**3, memory_mb=10**8, disk_gb=10**7)
        self.hosts = SimHosts(bus, clock=clock, options=sim, compute=config.compute, directory=directory / "hosts")
        asker = Asker(bus, clock=clock, ids=ids)
        world = ApiWorld(
            db,
            clock,
            ids,
            config,
            near,
            HostBook(db, clock, config),
            self.conductor.wake,
            asker.ask,
            Ends(db, clock).wait,
        )
        apps["/compute"] = compute_service(world, realm.gate)
        self.app = Mount(apps, root=apps["/identity"])
        self.server = Server(self.app, self.listener, threads=config.api.threads)

    def start(self) -> None:
        self.conductor.start()
        self.hosts.start()
        self.server.start()

    def close(self) -> None:
        self.server.stop()
        self.conductor.close()
        self.hosts.close()
        self.bus.close()
        self.db.close()

    def ready(self) -> None:
        """All hosts are known."""
        while True:
            with self.db.read() as tx:
                if len(hosts.nodes(tx)) == len(self.hosts.hosts):
                    return
            time.sleep(0.05)

    def left(self) -> int:
        with self.db.read() as tx:
            query = sa.select(sa.func.count()).select_from(RUNS).where(RUNS.c.state == "running")
            return int(tx.execute(query).scalar() or 0)

    def settled(self) -> None:
        while self.left():
            time.sleep(0.01)

    def active(self) -> int:
        with self.db.read() as tx:
            query = sa.select(sa.func.count()).select_from(servers.T).where(servers.T.c.vm_state == "active")
            return int(tx.execute(query).scalar() or 0)


class Client:
    """One connection, one token."""

    def __init__(self, port: int) -> None:
        self.http = http.client.HTTPConnection("127.0.0.1", port)
        self.token = ""
        user = {"name": "admin", "domain": {"name": "Default"}, "password": PASSWORD}
        scope = {"project": {"name": "admin", "domain": {"name": "Default"}}}
        auth = {"identity": {"methods": ["password"], "password": {"user": user}}, "scope": scope}
        said, headers = self.ask("POST", "/identity/v3/auth/tokens", {"auth": auth})
        self.token, self.project = headers["X-Subject-Token"], said["token"]["project"]["id"]

    def ask(self, method: str, path: str, body: Any = None) -> tuple[Any, Any]:
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        told = {"X-Auth-Token": self.token, "Content-Type": kind, "OpenStack-API-Version": "compute 2.96"}
        self.http.request(method, path, raw, {k: v for k, v in told.items() if v})
        answer = self.http.getresponse()
        said = answer.read()
        assert answer.status < 300, (method, path, answer.status, said)
        return (json.loads(said) if said else None), answer.headers

    def prepare(self) -> str:
        self.ask("PUT", f"/network/v2.0/quotas/{self.project}", {"quota": {"port": -1}})
        flavor = {"name": "small", "id": "small", "vcpus": 1, "ram": 512, "disk": 1}
        self.ask("POST", "/compute/v2.1/flavors", {"flavor": flavor})
        wish = {"name": "tiny", "disk_format": "raw", "container_format": "bare", "visibility": "public"}
        id: str = self.ask("POST", "/image/v2/images", wish)[0]["id"]
        self.ask("PUT", f"/image/v2/images/{id}/file", b"\0" * 512)
        return id

    def boot(self, image: str, name: str) -> None:
        wish = {"name": name, "flavorRef": "small", "imageRef": image, "networks": "auto"}
        self.ask("POST", "/compute/v2.1/servers", {"server": wish})


def crowd(port: int, image: str, n: int, threads: int) -> None:
    """Another process: several users at once."""

    def one(part: int) -> None:
        client = Client(port)
        for i in range(part, n, threads):
            client.boot(image, f"s{i}")

    users = [threading.Thread(target=one, args=(p,)) for p in range(threads)]
    for u in users:
        u.start()
    for u in users:
        u.join()


def main(n: int = 1000, url: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as there:
        bench = Bench(Path(there), url)
        bench.start()
        client = Client(bench.port)
        picture = client.prepare()
        bench.ready()
        for i in range(20):
            client.boot(picture, f"w{i}")
        bench.settled()
        time.sleep(4)  # hosts that are new report every second
        began, cpu = time.perf_counter(), time.process_time()
        process = multiprocessing.get_context("spawn").Process(target=crowd, args=(bench.port, picture, n, 4))
        process.start()
        process.join()
        accepted = time.perf_counter() - began
        bench.settled()
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        assert bench.active() == n + 20, bench.active()
        client.http.close()  # it was idle for long
        one = count(bench, lambda: client.boot(picture, "alone"))
        bench.close()
    print(
        f"{n} servers on {bench.db.engine.dialect.name}: {n / took:.0f} built/s end to end, {n / accepted:.0f} accepted/s"
    )
    print(f"one build: {one[0]} statements, {one[1]} transactions, {cpu / n * 1e3:.1f} ms of CPU")


def count(bench: Bench, do: Callable[[], object]) -> tuple[int, int]:
    """SQL statements, and transactions, of one build alone; what hosts report meanwhile is not told apart."""
    commits, asked = bench.db.commits, bench.db.statements
    do()
    time.sleep(0.5)
    return bench.db.statements - asked, bench.db.commits - commits


if __name__ == "__main__":
    main(*[int(a) if a.isdecimal() else a for a in sys.argv[1:]])  # type: ignore[arg-type]
