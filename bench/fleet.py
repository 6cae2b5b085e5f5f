"""A fleet under load: 1,000 simulated hosts as real agents over a real broker and a real database, all on one machine.

    python bench/fleet.py [--engine postgres|mariadb] [--hosts 1000] [--builds 1000] [--rate 0] [--fill 10000]

Roles are processes: companions, APIs, conductors, and hosts by the hundred in a process, each with its own queues and
ledger.  What hosts cost that do nothing; builds a second and how long each takes to ACTIVE, by the database's own
moments; statements, transactions and letters of a build; lists of many servers.  CPU time is told beside, because it is
the same on a busy machine.  Of one sitting only figures can be compared.
"""

import argparse
import contextlib
import os
import re
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import sqlalchemy as sa  # noqa: E402

from kilonova.kit.db import Db  # noqa: E402
from kilonova.store import servers  # noqa: E402
from tests.engines import MariaDb, Postgres, Rabbit, free_port, rabbit, served  # noqa: E402
from tests.fleet.fleet import COMMON, Fleet, FleetClient  # noqa: E402

TICKS = os.sysconf("SC_CLK_TCK")
CLIENTS = 8
SETTINGS = {
    "report_interval_s = 1": "report_interval_s = 10",
    "host_down_after_s = 8": "host_down_after_s = 60",
    "lease_s = 12\nthreads = 4": "lease_s = 30\nthreads = 2",  # two cores are everybody's
    "[sim]\n": "[sim]\nhosts = {each}\ncpus = 1000\nmemory_mb = 100000000\ndisk_gb = 10000000\n",
    "[network]\n": '[network]\nprivate_cidr = "10.0.0.0/16"\n',
}


class Wide(Fleet):
    """As operators have it, and with room for everything. `each`: hosts of a process."""

    def __init__(self, directory: Path, database: str, broker: str, *, hosts: int, each: int, conductors: int) -> None:
        text = COMMON
        for old, new in SETTINGS.items():
            assert old in text, old
            text = text.replace(old, new.replace("{each}", str(each)))
        super().__init__(directory, database, broker, hosts=hosts // each, latency_s=0, common=text)
        self.many = hosts
        for i in range(conductors, 2):
            del self.roles[f"conductor-{i}"]
        self.doors = {name: free_port() for name, role in self.roles.items() if role in ("conductor", "compute")}

    def start(self, name: str, *more: str) -> None:
        super().start(name, *more, *(["--port", str(self.doors[name])] if name in self.doors else []))


# ---- what processes use


class Use:
    """CPU seconds and resident memory, by what a process is."""

    def __init__(self, of: dict[str, list[int]]) -> None:
        self.of = of

    def cpu(self) -> dict[str, float]:
        return {what: sum(map(_cpu, pids)) for what, pids in self.of.items()}

    def memory_mb(self) -> dict[str, float]:
        return {what: sum(_pss(p) for pid in pids for p in _family(pid)) / 1024 for what, pids in self.of.items()}


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _family(leader: int) -> list[int]:
    """A process and all that it started."""
    children: dict[int, list[int]] = {}
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children.setdefault(int(_stat(int(p.name))[1]), []).append(int(p.name))
    found = [leader]
    for pid in found:
        found += children.get(pid, [])
    return found


def _cpu(leader: int) -> float:
    """Of a family, with those of it that have ended."""
    total = 0
    for pid in _family(leader):
        with contextlib.suppress(OSError):
            total += sum(int(f) for f in _stat(pid)[11:15])
    return total / TICKS


def _pss(pid: int) -> float:
    """Memory that is its own, and its share of what it has together with others; in KiB."""
    with contextlib.suppress(OSError):
        said = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return float(said[1]) if said else 0.0
    return 0.0


class Counts:
    """Statements, transactions and letters of all processes, as they say themselves."""

    def __init__(self, fleet: Wide) -> None:
        self.ports = [fleet.ports["companions"], *fleet.doors.values(), fleet.ports["api"]]

    def now(self) -> tuple[float, float, float]:
        text = ""
        for port in self.ports:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                text += answer.read().decode() + "\n"
        names = ("kilonova_sql_statements_total", "kilonova_sql_commits_total", "kilonova_letters_sent_total")
        one, two, three = (sum(map(float, re.findall(rf"^{n} ([\d.e+]+)", text, re.MULTILINE))) for n in names)
        return one, two, three


def machine() -> str:
    """How much there is of it just now: cores are shared with who knows whom, and CPU time is longer or shorter for it."""
    took = []
    for _ in range(5):
        began = time.process_time()
        for i in range(1_000_000):
            _ = i * i % 7
        took.append(time.process_time() - began)
    return f"load {os.getloadavg()[0]:.1f}, a loop of a million takes {statistics.median(took) * 1000:.0f} ms of CPU"


# ---- the measures


def row(what: str, figure: str, aim: str = "") -> None:
    print(f"| {what} | {figure} | {aim} |", flush=True)


def idle(fleet: Wide, use: Use, counts: Counts, seconds: float) -> None:
    """What hosts cost that do nothing."""
    asked, before = counts.now(), use.cpu()
    time.sleep(seconds)
    after, sent = use.cpu(), counts.now()
    of = {what: (after[what] - before[what]) / seconds * 1000 / fleet.many * 100 for what in after}
    row("idle, conductors: of a core per 1,000 hosts", f"{of['conductors']:.1f} %", "≤ 5 %")
    row("idle, database / broker", f"{of['database']:.1f} % / {of['broker']:.1f} %")
    row("idle, the hosts themselves (1,000 agents)", f"{of['hosts']:.1f} %")
    row("idle, statements a second", f"{(sent[0] - asked[0]) / seconds:.0f}")
    memory = use.memory_mb()
    row(
        "memory: a conductor / an API / companions",
        " / ".join(f"{memory[what] / len(use.of[what]):.0f} MB" for what in ("conductors", "APIs", "companions")),
    )
    row("memory: agents, per 1,000 hosts", f"{memory['hosts'] * 1000 / fleet.many:.0f} MB")
    row("memory: database / broker", f"{memory['database']:.0f} / {memory['broker']:.0f} MB")


def builds(fleet: Wide, db: Db, use: Use, counts: Counts, image: str, networks: object, n: int, rate: float) -> None:
    """`rate`: so many are asked for in a second, whatever becomes of them; 0: each client asks when it was answered."""
    name, client = f"b{time.monotonic_ns()}", fleet.client()
    own = threading.local()

    def ask(i: int) -> None:
        if not hasattr(own, "client"):
            own.client = FleetClient(fleet)
            own.client.token = client.token
        if rate:
            time.sleep(max(0.0, began + i / rate - time.perf_counter()))
        wish = {"name": name, "imageRef": image, "flavorRef": "42", "networks": networks}
        own.client.post("/compute/v2.1/servers", {"server": wish})

    asked, before, began = counts.now(), use.cpu(), time.perf_counter()
    with ThreadPoolExecutor(CLIENTS if not rate else 4 * CLIENTS) as crew:
        list(crew.map(ask, range(n)))
    accepted = time.perf_counter() - began
    while (left := _building(db, name)) > 0:
        assert time.perf_counter() - began < 600, f"{left} are still being built"
        time.sleep(0.1)
    took = time.perf_counter() - began
    after, sent = use.cpu(), counts.now()
    waits = sorted(_waits(db, name))
    assert len(waits) == n, f"{n - len(waits)} are not ACTIVE"
    how = f"{rate:.0f}/s asked for" if rate else f"{CLIENTS} clients"
    with_port = "without a port" if networks == "none" else "with a port"
    row(f"builds {with_port}, {how}", f"{n / took:.0f}/s (accepted {n / accepted:.0f}/s)", "≥ 100/s")
    row(
        "to ACTIVE, p50 / p95 / p99",
        f"{statistics.median(waits):.2f} / {waits[int(n * 0.95)]:.2f} / {waits[int(n * 0.99)]:.2f} s",
        "p95 ≤ 2 s",
    )
    row(
        "statements, transactions, letters a build",
        " / ".join(f"{(b - a) / n:.1f}" for a, b in zip(asked, sent, strict=True)),
    )
    cpu = {what: (after[what] - before[what]) / n * 1000 for what in after}
    row(f"CPU of a build, all {sum(cpu.values()):.1f} ms", ", ".join(f"{what} {ms:.1f}" for what, ms in cpu.items()))


def looked_at(db: Db) -> None:
    """What PostgreSQL does by itself within a minute of the first servers: until then it plans for empty tables."""
    if db.engine.dialect.name == "postgresql":
        with db.read() as tx:
            tx.exec_driver_sql("ANALYZE")


def _building(db: Db, name: str) -> int:
    t = servers.T.c
    with db.read() as tx:
        query = sa.select(sa.func.count()).where(t.name == name, t.vm_state == "building")
        return int(tx.execute(query).scalar() or 0)


def _waits(db: Db, name: str) -> Iterator[float]:
    t = servers.T.c
    with db.read() as tx:
        rows = tx.execute(sa.select(t.created_at, t.launched_at).where(t.name == name, t.vm_state == "active")).all()
    return (r.launched_at - r.created_at for r in rows)


def filled(fleet: Wide, db: Db, image: str, n: int) -> None:
    """So many servers there are afterwards."""
    client, t = fleet.client(), servers.T.c
    with db.read() as tx:
        have = int(tx.execute(sa.select(sa.func.count()).where(t.deleted_at.is_(None))).scalar() or 0)
    name, began = "fill", time.perf_counter()
    while have < n:
        some = min(500, n - have)
        wish = {"name": name, "imageRef": image, "flavorRef": "42", "networks": "none", "min_count": some}
        client.post("/compute/v2.1/servers", {"server": wish})
        have += some
        while _building(db, name) + _starting(db) > 500:
            time.sleep(0.1)
    while _starting(db):
        time.sleep(0.1)
    row(f"{n} servers are there, by 500 in a request", f"{time.perf_counter() - began:.0f} s")


def _starting(db: Db) -> int:
    t = servers.T.c
    with db.read() as tx:
        return int(tx.execute(sa.select(sa.func.count()).where(t.vm_state == "building")).scalar() or 0)


def lists(fleet: Wide, counts: Counts, times: int = 10) -> None:
    client = fleet.client()
    newest = client.get("/compute/v2.1/servers/detail?limit=1")["servers"][0]
    host = newest["OS-EXT-SRV-ATTR:host"]
    for what, query in (
        ("a page of 1,000 in detail", "limit=1000"),
        ("a page of 100 in detail", "limit=100"),
        ("of one host", f"host={host}&all_tenants=1"),
        ("by name (a regular expression that one has)", f"name={newest['name'][:8]}.*x$"),
        ("by status, a page of 100", "status=ACTIVE&limit=100"),
        ("changed in the last minute", f"changes-since={_minute_ago()}&limit=1000"),
    ):
        path, took = f"/compute/v2.1/servers/detail?{query}", list[float]()
        found = client.get(path)["servers"]
        asked = counts.now()
        for _ in range(times):
            began = time.perf_counter()
            client.get(path)
            took.append(time.perf_counter() - began)
        sent = (counts.now()[0] - asked[0]) / times
        row(f"list: {what}", f"{statistics.median(took) * 1000:.0f} ms, {len(found)} servers, {sent:.0f} statements")


def _minute_ago() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 60))


def main() -> None:
    parser = argparse.ArgumentParser(
        "fleet.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=["postgres", "mariadb"], default="postgres")
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--each", type=int, default=500, help="hosts of a process (%(default)s)")
    parser.add_argument("--conductors", type=int, choices=[1, 2], default=2)
    parser.add_argument("--builds", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0, help="so many a second are asked for, besides")
    parser.add_argument("--fill", type=int, default=10_000, help="servers that are listed; 0: none")
    parser.add_argument("--settle", type=float, default=60, metavar="S", help="so long hosts that are new say more")
    parser.add_argument("--idle", type=float, default=60, metavar="S")
    parser.add_argument("--keep", type=Path, metavar="DIR")
    chosen = parser.parse_args()
    engine = {"postgres": Postgres, "mariadb": MariaDb}[chosen.engine]
    home = chosen.keep or Path(tempfile.mkdtemp(prefix="kn-fleet-"))
    with served(engine, home / "db") as database, rabbit(home / "mq") as broker:
        fleet = Wide(
            home / "fleet", database.url, broker.url, hosts=chosen.hosts, each=chosen.each, conductors=chosen.conductors
        )
        try:
            measured(fleet, database, broker, chosen)
        finally:
            fleet.close()


def measured(fleet: Wide, database: Postgres | MariaDb, broker: Rabbit, chosen: Any) -> None:
    print(f"{chosen.engine}, before it: {machine()}\n\n| what | figure | aim |\n|---|--:|--:|")
    row(f"{chosen.hosts} hosts are there after", f"{fleet.up(timeout_s=300):.0f} s")
    client = fleet.client()
    client.put(f"/network/v2.0/quotas/{client.project_id}", {"quota": {"port": -1}})
    image, network = client.furnish()
    assert database.process is not None and broker.process is not None
    groups: dict[str, list[int]] = {"conductors": [], "APIs": [], "companions": [], "hosts": []}
    kinds = {"conductor": "conductors", "api": "APIs", "companions": "companions", "host": "hosts"}
    for name, process in fleet.processes.items():
        groups[kinds[name.partition("-")[0]]].append(process.pid)
    use = Use(groups | {"database": [database.process.pid], "broker": [broker.process.pid]})
    counts, db = Counts(fleet), Db(database.url, threads=2)
    time.sleep(chosen.settle)  # hosts that are new say more
    idle(fleet, use, counts, chosen.idle)
    for networks in ("none", [{"uuid": network}]):
        builds(fleet, db, use, counts, image, networks, 100, 0)
    looked_at(db)
    for networks in ("none", [{"uuid": network}]):
        for rate in [chosen.rate, 0] if chosen.rate else [0]:
            builds(fleet, db, use, counts, image, networks, chosen.builds, rate)
    if chosen.fill:
        filled(fleet, db, image, chosen.fill)
        lists(fleet, counts)
    print(f"\nafter it: {machine()}")
    db.close()


if __name__ == "__main__":
    main()
