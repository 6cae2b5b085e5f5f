"""What becomes of a fleet's servers when its parts fail under load: real processes, killed, stopped and cut off.

    python tests/fleet/faults.py --minutes 10 --engine mariadb

Clients build, stop, start, move and delete servers; in the middle something fails, and is there again some seconds
later.  Then the load ends, and all must come to rest by itself: what was promised is kept, nothing is stuck, nothing
is left over.  A row of the table is a fault.
"""

import argparse
import contextlib
import http.client
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from kilonova.kit.db import Db  # noqa: E402
from kilonova.kit.errors import Conflict, Forbidden, NotFound, Trouble, Unavailable  # noqa: E402
from tests.engines import MariaDb, Postgres, Rabbit, rabbit, served  # noqa: E402
from tests.fleet.fleet import Fleet, FleetClient, fleet  # noqa: E402

CLIENTS = 3
MOST = 18  # servers at the same time
REST_S = 90.0  # at the latest then all must be at rest
RESTING = {"ACTIVE", "SHUTOFF", "ERROR", "VERIFY_RESIZE"}


# ---- what fails


@dataclass
class Cloud:
    """A fleet, and what it stands on."""

    fleet: Fleet
    database: Postgres | MariaDb
    broker: Rabbit


Fault = Callable[[Cloud], None]


def killed(name: str, away_s: float = 1.0) -> Fault:
    def do(cloud: Cloud) -> None:
        cloud.fleet.kill(name)
        time.sleep(away_s)
        cloud.fleet.start(name)

    return do


def frozen(name: str, seconds: float) -> Fault:
    """As a machine that swaps, or whose network is gone: it does not know that it was away."""

    def do(cloud: Cloud) -> None:
        cloud.fleet.signal(name, signal.SIGSTOP)
        time.sleep(seconds)
        cloud.fleet.signal(name, signal.SIGCONT)

    return do


def no_broker(seconds: float) -> Fault:
    def do(cloud: Cloud) -> None:
        cloud.broker.stop(signal.SIGKILL)
        time.sleep(seconds)
        cloud.broker.start()

    return do


def no_database(seconds: float) -> Fault:
    def do(cloud: Cloud) -> None:
        cloud.database.stop()
        time.sleep(seconds)
        cloud.database.start()

    return do


def changed(names: list[str], strange: str, seconds: float) -> Fault:
    """These processes are other ones for a while."""

    def do(cloud: Cloud) -> None:
        for name in names:
            cloud.fleet.stop(name, 60)
            cloud.fleet.start(name, strange=strange)
        time.sleep(seconds)
        for name in names:
            assert cloud.fleet.stop(name, 60) == 0, f"{name} was not there: {cloud.fleet.tail(name)}"
            cloud.fleet.start(name)

    return do


def clock_off(seconds: float) -> str:
    return f"import time; true = time.time; time.time = lambda: true() + {seconds}"


# Every letter that such a process sends goes out twice.
TWICE = """import kombu
once = kombu.Producer.publish
def twice(*args, **more):
    once(*args, **more)
    return once(*args, **more)
kombu.Producer.publish = twice"""


def full(host: str, seconds: float) -> Fault:
    """Its disk (a file system of its own, `Cloud.small`) takes no byte more for a while."""

    def do(cloud: Cloud) -> None:
        filler = cloud.fleet.sim / host / "filler"
        with filler.open("wb", 0) as f:
            with contextlib.suppress(OSError):
                while f.write(bytes(1 << 16)):
                    pass
            time.sleep(seconds)
        filler.unlink()

    return do


SMALL = "host-1"  # whose disk can be full
PULLED = "host-2"  # who can be cut off

# fmt: off
FAULTS: dict[str, Fault] = {
    "kill -9 of an API":                      killed("api-0"),
    "kill -9 of a conductor":                 killed("conductor-0"),
    "kill -9 of a scheduler":                 killed("scheduler-0"),
    "kill -9 of a host":                      killed("host-0"),
    "kill -9 of the companions":              killed("companions-0"),
    "a host stands still for 30 s":           frozen("host-0", 30),
    "a conductor stands still for 30 s":      frozen("conductor-1", 30),
    "an API stands still for 30 s":           frozen("api-1", 30),
    "a host is cut off for 30 s":             frozen("wire-0", 30),
    "no broker for 5 s":                      no_broker(5),
    "no broker for 2 minutes":                no_broker(120),
    "the database starts anew after 3 s":     no_database(3),
    "all letters come twice":                 changed(["conductor-0", "conductor-1", "host-0", "host-2"], TWICE, 8),
    "a host's clock is 5 minutes ahead":      changed(["host-0"], clock_off(300), 8),
    "a host's clock is 5 minutes behind":     changed(["host-0"], clock_off(-300), 8),
    "a conductor's clock is 5 s ahead":       changed(["conductor-0"], clock_off(5), 8),
    "a host's disk is full for 10 s":         full(SMALL, 10),
}
# fmt: on
SHORT = ("kill -9 of a conductor", "kill -9 of a host", "no broker for 5 s", "the database starts anew after 3 s")


# ---- the load


@dataclass
class Tally:
    """A row of the table. `answers` are those that nobody should ever get."""

    fault: str
    servers: int = 0
    before: int = 0  # accepted
    during: int = 0
    after: int = 0
    became: Counter[str] = field(default_factory=Counter)  # those of this round
    doubled: int = 0
    active: int = 0
    errors: int = 0
    gone: int = 0
    stuck: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    why: Counter[str] = field(default_factory=Counter)  # faults of servers in error
    rest_s: float = 0.0

    def well(self) -> bool:
        return not (self.stuck or self.leaked or self.answers or self.doubled)


class Storm:
    """Clients that do what users do, as fast as they are answered; and what they were promised."""

    def __init__(self, cloud: Cloud, seed: int, rest_s: float = REST_S) -> None:
        self.cloud, self.seed, self.round, self.rest_s = cloud, seed, 0, rest_s
        self.guard = threading.Lock()
        self.here: set[str] = set()  # accepted, and nobody has asked to delete it
        self.gone: set[str] = set()  # its delete was accepted
        self.all: set[str] = set()
        self.strange: list[str] = []
        self.names = iter(range(1_000_000))
        self.phase = "before"
        self.accepted: dict[str, set[str]] = {}  # of this round
        self.image, self.network = cloud.fleet.client().furnish()

    def blow(self, fault: Fault, before_s: float = 2.0, after_s: float = 1.0) -> None:
        over = threading.Event()
        self.round += 1
        self.phase, self.accepted = "before", {"before": set(), "during": set(), "after": set()}
        crew = [threading.Thread(target=self._one, args=(i, over)) for i in range(CLIENTS)]
        for t in crew:
            t.start()
        try:
            time.sleep(before_s)
            self.phase = "during"
            fault(self.cloud)
            self.phase = "after"
            time.sleep(after_s)
        finally:
            over.set()
            for t in crew:
                t.join(60)
        assert not any(t.is_alive() for t in crew), "a client still waits for an answer"

    def _one(self, i: int, over: threading.Event) -> None:
        client, dice = FleetClient(self.cloud.fleet), random.Random(f"{self.seed}/{self.round}/{i}")
        while not over.is_set():
            try:
                if not client.token:
                    client.login()
                self._act(client, dice)
                over.wait(0.05)
            except (Unavailable, NotFound, Conflict, Forbidden, http.client.HTTPException, OSError):
                over.wait(0.1)
            except Trouble as e:
                if ": 409 " not in e.said:  # it is busy, or not in a state for that
                    self.strange.append(e.said)
                over.wait(0.05)

    def _act(self, client: FleetClient, dice: random.Random) -> None:
        with self.guard:
            known, name = sorted(self.here), f"s{next(self.names)}"
            id = dice.choice(known) if known and dice.random() < len(known) / MOST else None
            what = dice.choice(["delete", "delete", "os-stop", "os-start", "os-migrateLive"]) if id else "build"
            if id is not None and what == "delete":
                self.here.discard(id)
        if id is None:
            id = client.boot(name, self.image, self.network)
            with self.guard:
                self.here.add(id)
                self.all.add(id)
                self.accepted[self.phase].add(id)
        elif what == "delete":
            client.delete(f"/compute/v2.1/servers/{id}")
            with self.guard:
                self.gone.add(id)
        else:
            said = {"host": None, "block_migration": "auto"} if what == "os-migrateLive" else None
            client.act(id, **{what: said})

    # -- what became of it

    def settled(self, db: Db, tally: Tally) -> None:
        """Waits until all rests, and says how it rests."""
        began, seen = time.monotonic(), dict[str, dict[str, Any]]()
        while True:
            try:
                seen = self._seen()
                tally.stuck = self._unrested(seen)
                tally.leaked = self.cloud.fleet.wrong(db) if not tally.stuck else []
            except Exception as e:  # what it asks is not there yet; a file was removed under its eyes
                tally.stuck = [f"{type(e).__name__}: {e}"]
            tally.rest_s = time.monotonic() - began
            if (not tally.stuck and not tally.leaked) or tally.rest_s > self.rest_s:
                break
            time.sleep(0.2)
        counts = Counter(s["status"] for s in seen.values())
        self.all |= set(seen)
        self.here |= set(seen) - self.gone  # with builds whose answers were lost, and deletes that were never heard
        tally.servers, tally.errors = len(self.all), counts["ERROR"]
        tally.active, tally.gone = sum(counts.values()) - counts["ERROR"], len(self.all) - len(seen)
        at = Counter(id for s in self.cloud.fleet.holds().values() for id in s.machines)
        tally.doubled = sum(n > 1 for n in at.values())
        for phase, ids in self.accepted.items():
            setattr(tally, phase, len(ids))
            tally.became += Counter(_end(seen.get(id)) for id in ids)
        tally.answers, self.strange = self.strange, []
        tally.why = Counter(s["fault"]["message"] for s in seen.values() if s["status"] == "ERROR")

    def _seen(self) -> dict[str, dict[str, Any]]:
        found = self.cloud.fleet.client().get("/compute/v2.1/servers/detail?all_tenants=1&limit=1000")["servers"]
        return {s["id"]: s for s in found}

    def _unrested(self, seen: dict[str, dict[str, Any]]) -> list[str]:
        said = [f"{id} {s['status']} {s['OS-EXT-STS:task_state']}" for id, s in seen.items() if not rests(s)]
        said += [f"{id} was promised and is not there" for id in self.here - set(seen)]
        return said + [f"{id} should be gone" for id in self.gone & set(seen)]

    def cleared(self, db: Db) -> list[str]:
        """All is deleted: what is left?"""
        client, tally = self.cloud.fleet.client(), Tally("all deleted")
        for id in self._seen():
            client.delete(f"/compute/v2.1/servers/{id}")
        self.gone, self.here = self.gone | self.here, set()
        self.settled(db, tally)
        held = [f"{h} still has {sorted(s.machines)}" for h, s in self.cloud.fleet.holds().items() if s.machines]
        return tally.stuck + tally.leaked + held


def _end(server: dict[str, Any] | None) -> str:
    return "gone" if server is None else "error" if server["status"] == "ERROR" else "there"


def rests(server: dict[str, Any]) -> bool:
    well = server["status"] in RESTING and server["OS-EXT-STS:task_state"] is None
    return well and (server["status"] != "ERROR" or bool(server.get("fault", {}).get("message")))


# ---- the whole


@contextmanager
def cloud_of(home: Path, engine: Callable[[Path], Postgres | MariaDb], **more: Any) -> Iterator[Cloud]:
    with (
        served(engine, home / "db") as database,
        rabbit(home / "mq") as broker,
        fleet(home / "fleet", database.url, broker, **more) as one,
    ):
        yield Cloud(one, database, broker)


@contextmanager
def small(directory: Path) -> Iterator[None]:
    """A file system of a few megabytes there; only root can have one."""
    directory.mkdir(parents=True, exist_ok=True)
    if os.geteuid():
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=False)


def told(storm: Storm, db: Db, names: list[str]) -> list[Tally]:
    """One fault after the other; ends with the first after which something is not as it must be."""
    tallies = []
    for name in names:
        before = len(storm.all)
        tally = Tally(name)
        storm.blow(FAULTS[name])
        storm.settled(db, tally)
        tally.servers -= before
        tallies.append(tally)
        if not tally.well():
            break
    return tallies


def table(tallies: list[Tally]) -> str:
    lines = [
        "| fault, under load | accepted before / during / after | of them active or stopped / error / deleted | stuck | leaked | doubled | at rest after |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for t in tallies:
        b = t.became
        cells = [t.fault, f"{t.before} / {t.during} / {t.after}", f"{b['there']} / {b['error']} / {b['gone']}"]
        cells += [str(n) for n in (len(t.stuck), len(t.leaked), t.doubled)] + [f"{t.rest_s:.1f} s"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def summed(tallies: list[Tally]) -> list[Tally]:
    """One row a fault: sums, and the longest time."""
    rows: dict[str, Tally] = {}
    for t in tallies:
        r = rows.setdefault(t.fault, Tally(t.fault))
        r.servers, r.rest_s, r.active, r.errors = r.servers + t.servers, max(r.rest_s, t.rest_s), t.active, t.errors
        r.before, r.during, r.after = r.before + t.before, r.during + t.during, r.after + t.after
        r.became, r.doubled = r.became + t.became, r.doubled + t.doubled
        r.stuck += t.stuck
        r.leaked += t.leaked
        r.answers += t.answers
    return list(rows.values())


def main() -> int:
    parser = argparse.ArgumentParser("faults.py", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="so long (%(default)s)")
    parser.add_argument("--engine", choices=["postgres", "mariadb"], default="postgres")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--failure-rate", type=float, default=0.05, help="so many acts of hosts fail anyhow")
    parser.add_argument(
        "--rest", type=float, default=330, help="seconds until all must be at rest; some reconcilers take five minutes"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave everything there, for who looks why")
    parser.add_argument("--only", action="append", metavar="WORD", help="faults in whose name it is")
    chosen = parser.parse_args()
    names = [n for n in FAULTS if not chosen.only or any(w in n for w in chosen.only)]
    names = [n for n in names if os.geteuid() == 0 or "disk" not in n]
    engine = {"postgres": Postgres, "mariadb": MariaDb}[chosen.engine]
    home, tallies = chosen.keep or Path(tempfile.mkdtemp(prefix="kn-faults-")), list[Tally]()
    end = time.monotonic() + 60 * chosen.minutes
    with (
        small(home / "fleet/sim" / SMALL),
        cloud_of(home, engine, schedulers=2, failure_rate=chosen.failure_rate, pulled=PULLED) as cloud,
    ):
        db, storm = Db(cloud.database.url, threads=2), Storm(cloud, chosen.seed, chosen.rest)
        while not tallies or (time.monotonic() < end and tallies[-1].well()):
            for name in names:
                tallies += told(storm, db, [name])
                print(table(tallies[-1:]).splitlines()[-1], flush=True)
                if not tallies[-1].well():
                    break
        left = storm.cleared(db) if tallies[-1].well() else []
        db.close()
    print(
        f"\n{len(tallies)} faults, {sum(t.servers for t in tallies)} servers, {chosen.engine}\n\n{table(summed(tallies))}\n"
    )
    for t in tallies:
        for line in t.stuck + t.leaked + t.answers:
            print(f"{t.fault}: {line}")
    for message, n in sum((t.why for t in tallies), Counter[str]()).most_common(10):
        print(f"{n} times in error: {message}")
    for line in left:
        print(f"when all was deleted: {line}")
    return 0 if all(t.well() for t in tallies) and not left else 1


if __name__ == "__main__":
    sys.exit(main())
