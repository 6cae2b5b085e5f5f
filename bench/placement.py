"""Placements a second, and allocation candidates over HTTP, by the number of hosts. Say on what machine.

    python bench/placement.py [N …]          numbers of hosts (100 1000 5000 10000 20000)
    python bench/placement.py api N [URL]    candidates of N hosts; URL: of another Placement that takes the token `admin`

One thread asks for one server after another ("alone", and "in a zone"), 32 threads ask at once ("together"), and one
claims what it was given, each in a transaction of its own on a SQLite file as `kilonova up` has it ("claimed").  Each
choice is a look at all hosts, with the standard rules and tastes.  What one thread does alone is counted in its own CPU
time, so that a busy machine does not change it much; all else by the clock on the wall.
"""

import http.client
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable
from typing import Any

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
    """One connection to a Placement service."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self.http, self.base = http.client.HTTPConnection(parts.hostname or "", parts.port), parts.path.rstrip("/")

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        told = {"X-Auth-Token": "admin", "OpenStack-API-Version": "placement 1.36", "Content-Type": "application/json"}
        self.http.request(method, self.base + path, None if body is None else json.dumps(body), told)
        answer = self.http.getresponse()
        said = answer.read()
        assert answer.status < 300, (method, path, answer.status, said)
        return json.loads(said) if said else None

    def furnish(self, n: int) -> None:
        dice = random.Random(1)
        marks = [dice.sample(TRAITS, 40) for _ in range(KINDS)]
        stocks = {s.resource_class: {"total": s.total, "allocation_ratio": s.allocation_ratio} for s in STOCKS}
        for i in range(n):
            made = self.ask("POST", "/resource_providers", {"name": f"h{i}"})["uuid"]
            at = f"/resource_providers/{made}"
            self.ask("PUT", f"{at}/inventories", {"resource_provider_generation": 0, "inventories": stocks})
            self.ask("PUT", f"{at}/traits", {"resource_provider_generation": 1, "traits": marks[i % KINDS]})


def candidates(n: int, url: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as there:
        server = None
        if url is None:
            db = Db(f"sqlite:///{there}/cloud.db")
            furnish(db, n)
            world = api.World(db, WallClock(), Ids())
            app = api.make_service(
                world, lambda token: Context(user_id="a", project_id="p", roles=frozenset({"admin"}))
            )
            listener = listen("127.0.0.1", 0)
            server = Server(app, listener, threads=4)
            server.start()
            client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}")
        else:
            client = Client(url)
            client.furnish(n)
        query = "/allocation_candidates?resources=VCPU:1,MEMORY_MB:512,DISK_GB:1"
        found = client.ask("GET", f"{query}&limit=1000")
        assert len(found["allocation_requests"]) == min(n, 1000)
        whole = timed(lambda i: client.ask("GET", f"{query}&limit=1000"), 5.0)
        few = timed(lambda i: client.ask("GET", f"{query}&limit=10"), 3.0)
        names = iter(range(10**9))

        def allocate(_: int) -> None:
            (one,) = client.ask("GET", f"{query}&limit=1")["allocation_requests"]
            body = {"allocations": one["allocations"], "project_id": "p", "user_id": "u", "consumer_generation": None}
            client.ask("PUT", f"/allocations/{uuid.UUID(int=next(names) + int(time.time()) * 2**64)}", body)

        claimed = timed(allocate, 3.0)
        print(
            f"{n:6} hosts, {url or 'our own'}: 1000 candidates {whole[0]:6.1f}/s, p50 {whole[1]:6.1f}, p99 {whole[2]:6.1f} ms; "
            f"10 of them {few[0]:6.1f}/s, p50 {few[1]:6.1f} ms; one found and allocated {claimed[0]:6.1f}/s, p50 {claimed[1]:6.1f} ms"
        )
        if server is not None:
            server.stop()


if __name__ == "__main__":
    if sys.argv[1:2] == ["api"]:
        candidates(int(sys.argv[2]), *sys.argv[3:4])
    else:
        for number in [int(a) for a in sys.argv[1:]] or [100, 1000, 5000, 10_000, 20_000]:
            alone = multiprocessing.get_context("spawn").Process(target=scheduler, args=(number,))  # for its memory
            alone.start()
            alone.join()
