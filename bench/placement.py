"""Placements a second, and allocation candidates over HTTP, by the number of hosts. Say on what machine.

    python bench/placement.py [N …]          numbers of hosts (100 1000 5000 10000 20000)
    python bench/placement.py api N [VENV]   candidates of N hosts over HTTP; beside the reference, where VENV has
                                             `openstack-placement` and `uwsgi` of PyPI: SQLite and one worker, as ours

One thread asks for one server after another ("alone", and "in a zone"), 32 threads ask at once ("together"), and one
claims what it was given, each in a transaction of its own on a SQLite file as `kilonova up` has it ("claimed").  Each
choice is a look at all hosts, with the standard rules and tastes.  What one thread does alone is counted in its own CPU
time, so that a busy machine does not change it much; all else by the clock on the wall.
"""

import http.client
import json
import multiprocessing
import os
import random
import resource
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import os_traits
import sqlalchemy as sa

from kilonova import placement as api
from kilonova.contracts.scheduler import Choose
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.db import Db, meta
from kilonova.kit.http import Server, listen
from kilonova.kit.routes import Context
from kilonova.model.ask import Ask
from kilonova.model.host import HostFacts, Stock
from kilonova.scheduler.select import Scheduler
from kilonova.store import hosts, placement

Clock = Callable[[], float]

KINDS, ZONES = 4, 4
SMALL = {"VCPU": 1, "MEMORY_MB": 512, "DISK_GB": 1}
STOCKS = [Stock("VCPU", 64, max_unit=64, allocation_ratio=4.0), Stock("MEMORY_MB", 262_144), Stock("DISK_GB", 4096)]
TRAITS = sorted(t for t in os_traits.get_traits() if t.startswith(("HW_CPU_X86_", "COMPUTE_")))
ASK = Ask(amounts=SMALL, project_id="p")


def furnish(db: Db, n: int) -> list[str]:
    """So many hosts, as they would have reported: of four kinds with 40 traits each, in four zones. Their providers."""
    meta.create_all(db.engine)
    now, dice = time.time() - 3600, random.Random(1)
    marks = [dice.sample(TRAITS, 40) for _ in range(KINDS)]
    ids = [str(uuid.UUID(int=dice.getrandbits(128), version=4)) for _ in range(n)]
    facts = [msgspec.json.encode(kind(marks[k], f"model-{k}")).decode() for k in range(KINDS)]
    # fmt: off
    service = {"binary": "nova-compute", "disabled": False, "forced_down": False, "failures": 0, "last_seen": now + 7200,
               "born": 1.0, "version": "1", "speaks": "[]", "created_at": now}
    node = {"host_ip": "192.0.2.1", "created_at": now}
    provider = {"generation": 1, "created_at": now, "changed_at": now}
    stocks = [msgspec.structs.asdict(s) | {"used": 0} for s in STOCKS]
    with db.tx() as tx:
        tx.execute(sa.insert(hosts.SERVICES), [service | {"uuid": f"s{i}", "host": f"h{i}"} for i in range(n)])
        tx.execute(sa.insert(hosts.NODES), [node | {"uuid": u, "host": f"h{i}", "node": f"h{i}", "facts": facts[i % KINDS]} for i, u in enumerate(ids)])
        tx.execute(sa.insert(placement.PROVIDERS), [provider | {"uuid": u, "root": u, "name": f"h{i}"} for i, u in enumerate(ids)])
        tx.execute(sa.insert(placement.INVENTORIES), [s | {"provider": u} for u in ids for s in stocks])
        tx.execute(sa.insert(placement.PROVIDER_TRAITS), [{"provider": u, "trait": t} for i, u in enumerate(ids) for t in marks[i % KINDS]])
        for z in range(ZONES):
            zone = hosts.create_aggregate(tx, f"zone-{z}", uuid=f"z{z}", now=now, availability_zone=f"zone-{z}")
            tx.execute(sa.insert(hosts.AGGREGATE_HOSTS), [{"aggregate": zone.id, "host": f"h{i}"} for i in range(z, n, ZONES)])
        hosts.mark(tx)
    # fmt: on
    return ids


def kind(traits: list[str], model: str) -> HostFacts:
    return HostFacts(
        vcpus=64,
        memory_mb=262_144,
        disk_gb=4096,
        disk_free_gb=4096,
        hypervisor_type="QEMU",
        hypervisor_version=7_002_022,
        hypervisor_hostname="",
        cpu_info={"arch": "x86_64", "model": model},
        traits=traits,
    )


def timed(
    do: Callable[[int], object], least_s: float = 2.0, clock: Clock = time.perf_counter
) -> tuple[float, float, float]:
    """(a second, p50 in ms, p99 in ms), by this clock: `time.thread_time` is that of a core of its own."""
    took: list[float] = []
    until, began = time.perf_counter() + least_s, clock()
    while len(took) < 20 or time.perf_counter() < until:
        at = clock()
        do(len(took))
        took.append(clock() - at)
    whole = clock() - began
    took.sort()
    return len(took) / whole, took[len(took) // 2] * 1e3, took[int(len(took) * 0.99)] * 1e3


def crowd(do: Callable[[int], object], threads: int = 32, each: int = 20) -> float:
    """A second, when so many ask at once."""
    crew = [threading.Thread(target=lambda: [do(i) for i in range(each)]) for _ in range(threads)]
    began = time.perf_counter()
    for t in crew:
        t.start()
    for t in crew:
        t.join()
    return threads * each / (time.perf_counter() - began)


def size_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def scheduler(n: int) -> None:
    with tempfile.TemporaryDirectory() as there:
        url = f"sqlite:///{there}/cloud.db"
        filler = multiprocessing.get_context("spawn").Process(target=filled, args=(url, n))
        filler.start()
        filler.join()
        db = Db(url, threads=40)
        before = size_mb()
        s = Scheduler(db, clock=WallClock(), dice=random.Random(1))
        began = time.perf_counter()
        s.choose(Choose(server="s", ask=ASK))
        loaded, memory_mb = time.perf_counter() - began, size_mb() - before

        def claimed(i: int) -> None:
            place = s.choose(Choose(server=f"c{i}", ask=ASK)).places[0]
            claim(db, f"c{i}", place.provider)

        alone = timed(lambda i: s.choose(Choose(server=f"s{i}", ask=ASK)), clock=time.thread_time)
        zoned = [Ask(amounts=SMALL, zone=f"zone-{z}") for z in range(ZONES)]
        zone = timed(lambda i: s.choose(Choose(server=f"z{i}", ask=zoned[i % ZONES])), clock=time.thread_time)
        together = crowd(lambda i: s.choose(Choose(server=f"t{i}", ask=ASK)))
        durable = timed(claimed)
        providers = [p.provider for p in s.hosts.places]
        claims = timed(lambda i: claim(db, f"d{i}", providers[i % n]))
        db.close()
    print(
        f"{n:6} hosts: alone {alone[0]:6.0f}/s, p50 {alone[1]:5.2f}, p99 {alone[2]:5.2f} ms; in a zone {zone[0]:6.0f}/s; "
        f"together {together:6.0f}/s; claimed {durable[0]:5.0f}/s, p50 {durable[1]:5.2f}, p99 {durable[2]:5.2f} ms; "
        f"claims alone {claims[0]:5.0f}/s; first look {loaded:4.2f} s, {memory_mb:4.0f} MB more, {size_mb():4.0f} MB in all",
        flush=True,
    )


def filled(url: str, n: int) -> None:
    db = Db(url)
    furnish(db, n)
    db.close()


def claim(db: Db, consumer: str, provider: str) -> None:
    db.run(placement.claim, consumer, provider, SMALL, now=time.time(), project_id="p", user_id="u", new=True)


# ---- the API


class Client:
    """One connection to a Placement service that takes the token `admin`."""

    def __init__(self, url: str, pid: int) -> None:
        self.pid = pid  # of who answers
        parts = urllib.parse.urlsplit(url)
        self.http, self.base = http.client.HTTPConnection(parts.hostname or "", parts.port), parts.path.rstrip("/")

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        said = self.bytes(method, path, body)
        return json.loads(said) if said else None

    def bytes(self, method: str, path: str, body: Any = None) -> bytes:
        """Until the last byte is here: what a client makes of it is not the service's."""
        told = {"X-Auth-Token": "admin", "OpenStack-API-Version": "placement 1.36", "Content-Type": "application/json"}
        self.http.request(method, self.base + path, None if body is None else json.dumps(body), told)
        answer = self.http.getresponse()
        said = answer.read()
        assert answer.status < 300, (method, path, answer.status, said)
        return said

    def furnish(self, n: int) -> None:
        dice = random.Random(1)
        marks = [dice.sample(TRAITS, 40) for _ in range(KINDS)]
        stocks = {s.resource_class: {"total": s.total, "allocation_ratio": s.allocation_ratio} for s in STOCKS}
        for i in range(n):
            made = self.ask("POST", "/resource_providers", {"name": f"h{i}"})["uuid"]
            at = f"/resource_providers/{made}"
            self.ask("PUT", f"{at}/inventories", {"resource_provider_generation": 0, "inventories": stocks})
            self.ask("PUT", f"{at}/traits", {"resource_provider_generation": 1, "traits": marks[i % KINDS]})


class Request(msgspec.Struct):
    allocations: dict[str, Any]


class Few(msgspec.Struct):
    """Of candidates what a client needs to take one: the rest is not the service's work to read."""

    allocation_requests: list[Request]


QUERY = "/allocation_candidates?resources=VCPU:1,MEMORY_MB:512,DISK_GB:1"


def cpu_s(pid: int) -> float:
    """Of a process and its children, so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            who, rest = stat.read_text().rsplit(")", 1)
            words = rest.split()
            if pid in (int(who.split()[0]), int(words[1])):
                ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Took(NamedTuple):
    """Of one request: what a client waits for, and how long the service worked at it, in ms."""

    p50: float
    cpu: float


def took(client: Client, do: Callable[[int], object], least_s: float) -> Took:
    do(-1)
    before, times = cpu_s(client.pid), 0

    def counted(i: int) -> None:
        nonlocal times
        times += 1
        do(i)

    p50 = timed(counted, least_s)[1]
    return Took(p50, (cpu_s(client.pid) - before) * 1e3 / times)


def candidates(n: int, client: Client, least_s: float = 5.0) -> dict[str, Took]:
    found = client.ask("GET", f"{QUERY}&limit=1000")
    assert min(n, 1000) >= len(found["allocation_requests"]) == len(found["provider_summaries"]) > min(n, 1000) * 0.95
    whole = took(client, lambda i: client.bytes("GET", f"{QUERY}&limit=1000"), least_s)
    few = took(client, lambda i: client.bytes("GET", f"{QUERY}&limit=10"), least_s)
    names = iter(range(10**9))

    def allocate(_: int, limit: int = 1) -> None:
        said = client.bytes("GET", f"{QUERY}&limit={limit}")
        one = msgspec.json.decode(said, type=Few).allocation_requests[0]
        body = {"allocations": one.allocations, "project_id": "p", "user_id": "u", "consumer_generation": None}
        client.ask("PUT", f"/allocations/{uuid.UUID(int=next(names) + int(time.time()) * 2**64)}", body)

    claimed = took(client, allocate, least_s)
    of_all = took(client, lambda i: allocate(i, 1000), least_s)
    return {
        "all of up to 1,000 candidates": whole,
        "10 candidates": few,
        "one found and allocated": claimed,
        "all found, and one allocated": of_all,
    }


def served(n: int, port: Connection) -> None:
    """Our own service, until we are ended."""
    with tempfile.TemporaryDirectory() as there:
        db = Db(f"sqlite:///{there}/cloud.db")
        furnish(db, n)
        admin = Context(user_id="a", project_id="p", roles=frozenset({"admin"}))
        listener = listen("127.0.0.1", 0)
        server = Server(api.make_service(api.World(db, WallClock(), Ids()), lambda token: admin), listener, threads=4)
        server.start()
        port.send(listener.getsockname()[1])
        with suppress(EOFError):
            port.recv()
        server.stop()


@contextmanager
def own(n: int) -> Iterator[Client]:
    """In a process of its own."""
    mine, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=served, args=(n, its))
    process.start()
    try:
        yield Client(f"http://127.0.0.1:{mine.recv()}", process.pid or 0)
    finally:
        mine.send(None)
        process.join()


@contextmanager
def another(n: int, venv: Path) -> Iterator[Client]:
    """The reference: `pip install openstack-placement uwsgi` in a virtual environment; SQLite, one worker."""
    with tempfile.TemporaryDirectory() as there, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        conf = Path(there, "placement.conf")
        conf.write_text(
            f"[api]\nauth_strategy = noauth2\n[placement_database]\nconnection = sqlite:///{there}/placement.db\n"
        )
        env = {"PATH": f"{venv}/bin:/usr/bin:/bin", "OS_PLACEMENT_CONFIG_DIR": there}
        subprocess.run([venv / "bin/placement-manage", "--config-dir", there, "db", "sync"], env=env, check=True)
        words = ["--master", "--processes", "1", "--threads", "1", "--need-app", "--disable-logging", "--die-on-term"]
        words += [
            "--add-header",
            "Connection: close",
            "--venv",
            str(venv),
            "--module",
            "placement.wsgi.api:application",
        ]
        with Path(there, "log").open("wb") as log:
            words = [str(venv / "bin/uwsgi"), "--http-socket", f"127.0.0.1:{port}", *words]
            process = subprocess.Popen(words, env=env, stdout=log, stderr=log)
        try:
            client = Client(f"http://127.0.0.1:{port}", process.pid)
            until = time.monotonic() + 60
            while True:
                try:
                    client.ask("GET", "/")
                    break
                except OSError:
                    client.http.close()
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.2)
            client.furnish(min(n, KINDS))
            _cloned(f"{there}/placement.db", n)
            yield client
        finally:
            process.terminate()
            process.wait()


def _cloned(path: str, n: int) -> None:
    """More hosts like those that were made over HTTP, one of each kind: so much faster than asking for each."""
    with closing(sqlite3.connect(path)) as db, db:
        first = [row[0] for row in db.execute("SELECT id FROM resource_providers ORDER BY id")]
        for i in range(len(first), n):
            like, id = first[i % len(first)], first[-1] + i
            said = {"id": id, "like": like, "uuid": str(uuid.uuid4()), "name": f"h{i}"}
            for table, own in (
                ("resource_providers", {"id": ":id", "uuid": ":uuid", "name": ":name", "root_provider_id": ":id"}),
                ("inventories", {"id": "NULL", "resource_provider_id": ":id"}),
                ("resource_provider_traits", {"resource_provider_id": ":id"}),
            ):
                columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
                key = "id" if table == "resource_providers" else "resource_provider_id"
                what = ", ".join(own.get(c, c) for c in columns)
                db.execute(f"INSERT INTO {table} SELECT {what} FROM {table} WHERE {key} = :like", said)


def beside(n: int, venv: Path | None) -> None:
    """A table, as in docs/placement-cost.md."""
    theirs = dict[str, Took]()
    with own(n) as mine:
        ours = candidates(n, mine)
        if venv is not None:
            with another(n, venv) as reference:
                theirs = candidates(n, reference)
                mine.http.close()  # it was silent for too long
                again = candidates(n, mine)  # before and after: others are at work on this machine
            ours = {what: Took(min(t.p50, again[what].p50), (t.cpu + again[what].cpu) / 2) for what, t in ours.items()}
    print(f"| {n:,} hosts, over HTTP | Kilonova: CPU ms | p50 ms | the reference: CPU ms | p50 ms | times: CPU | p50 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for what, t in ours.items():
        r = theirs.get(what)
        more = f"{r.cpu:.0f} | {r.p50:.0f} | {r.cpu / t.cpu:.0f} | {r.p50 / t.p50:.0f}" if r else " | | |"
        print(f"| {what} | {t.cpu:.1f} | {t.p50:.1f} | {more} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["api"]:
        beside(int(sys.argv[2]), *map(Path, sys.argv[3:4]), *(() if sys.argv[3:] else (None,)))
    else:
        for number in [int(a) for a in sys.argv[1:]] or [100, 1000, 5000, 10_000, 20_000]:
            alone = multiprocessing.get_context("spawn").Process(target=scheduler, args=(number,))  # for its memory
            alone.start()
            alone.join()
