"""How the cost of placing grows: with hosts, with servers that are there, with aggregates. A table and a picture.

    python bench/growth.py [DIRECTORY [VENV]]    writes placement-cost.md and placement-cost.svg there (docs); with what
                                                 allocation candidates cost beside the reference in VENV (placement.py)

One thread chooses and claims on SQLite as `kilonova up` has it.  What is told is its own CPU time, and statements: a busy
machine does not change them much.
"""

import datetime
import multiprocessing
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import placement as bench
import sqlalchemy as sa

from kilonova.contracts.scheduler import Choose
from kilonova.kit.clock import WallClock
from kilonova.kit.db import Db
from kilonova.scheduler.select import Scheduler
from kilonova.store import hosts, placement

HOSTS = [100, 1000, 5000, 10_000, 20_000]
SERVERS = [0, 10_000, 50_000, 100_000]  # on 5,000 hosts
AGGREGATES = [4, 100, 500, 1000]  # of 50 of 5,000 hosts each
LEAST_S = 1.0


class Cost(NamedTuple):
    """Of one server: CPU time in ms, and statements."""

    n: int
    choose_ms: float
    claimed_ms: float
    statements: float
    first_s: float  # the first look, when all is read
    chosen: tuple[float, float]  # p50, p99
    claimed: tuple[float, float]


def measured(n: int, hosts_: int, servers: int, aggregates: int) -> Cost:
    with tempfile.TemporaryDirectory() as there:
        db = Db(f"sqlite:///{there}/cloud.db")
        providers = bench.furnish(db, hosts_)
        _peopled(db, providers, servers)
        _grouped(db, hosts_, aggregates)
        s = Scheduler(db, clock=WallClock(), dice=random.Random(1))
        began = time.thread_time()
        s.choose(Choose(server="s", ask=bench.ASK))
        first_s = time.thread_time() - began

        def claimed(i: int) -> None:
            place = s.choose(Choose(server=f"c{i}", ask=bench.ASK)).places[0]
            bench.claim(db, f"c{i}", place.provider)

        chosen = bench.timed(lambda i: s.choose(Choose(server=f"s{i}", ask=bench.ASK)), LEAST_S, time.thread_time)
        before, turns = db.statements, 0
        whole = bench.timed(claimed, LEAST_S, time.thread_time)
        with db.read() as tx:
            turns = tx.execute(sa.select(sa.func.count()).select_from(placement.CONSUMERS)).scalar() - servers
        statements = (db.statements - before) / max(1, turns)
        db.close()
        return Cost(n, 1e3 / chosen[0], 1e3 / whole[0], statements, first_s, chosen[1:], whole[1:])


def _peopled(db: Db, providers: Sequence[str], n: int) -> None:
    """So many servers, evenly."""
    rows = [{"consumer": f"old{i}", "provider": providers[i % len(providers)]} for i in range(n)]
    who = {"project_id": "p", "user_id": "u", "type": "INSTANCE", "generation": 1, "created_at": 1.0, "changed_at": 1.0}
    with db.tx() as tx:
        if rows:
            tx.execute(sa.insert(placement.CONSUMERS), [who | {"uuid": r["consumer"]} for r in rows])
            for name, amount in bench.SMALL.items():
                tx.execute(
                    sa.insert(placement.ALLOCATIONS), [r | {"resource_class": name, "amount": amount} for r in rows]
                )
                used = placement.INVENTORIES.c
                each = amount * (n // len(providers))
                tx.execute(sa.update(placement.INVENTORIES).where(used.resource_class == name).values(used=each))


def _grouped(db: Db, hosts_: int, n: int) -> None:
    """So many aggregates more than zones, which say something that no rule asks."""
    dice = random.Random(2)
    with db.tx() as tx:
        for i in range(max(0, n - bench.ZONES)):
            made = hosts.create_aggregate(tx, f"more-{i}", uuid=f"more-{i}", now=1.0)
            members = dice.sample(range(hosts_), 50)
            tx.execute(sa.insert(hosts.AGGREGATE_HOSTS), [{"aggregate": made.id, "host": f"h{h}"} for h in members])
            tx.execute(sa.insert(hosts.AGGREGATE_METADATA), {"aggregate": made.id, "key": "rack", "value": str(i)})
        hosts.mark(tx)


# ---- what is shown


def table(what: str, costs: Sequence[Cost]) -> str:
    head = (
        f"| {what} | chosen: CPU ms | p50 | p99 | chosen and claimed: CPU ms | p50 | p99 | a second of CPU | statements "
        "| first look, CPU s |\n"
    )
    rows = [
        f"| {c.n:,} | {c.choose_ms:.2f} | {c.chosen[0]:.2f} | {c.chosen[1]:.2f} "
        f"| {c.claimed_ms:.2f} | {c.claimed[0]:.2f} | {c.claimed[1]:.2f} | {1e3 / c.claimed_ms:,.0f} | {c.statements:.1f} | {c.first_s:.2f} |"
        for c in costs
    ]
    return head + "|---:" * 10 + "|\n" + "\n".join(rows) + "\n"


def picture(series: dict[str, Sequence[Cost]]) -> str:
    """One panel a series: both costs over the number."""
    wide, high, gap = 260, 200, 60
    most = max(c.claimed_ms for costs in series.values() for c in costs) * 1.1
    parts = []
    for k, (what, costs) in enumerate(series.items()):
        left, last = gap + k * (wide + gap), max(c.n for c in costs)

        def at(n: float, ms: float, left: int = left, last: int = last) -> str:
            return f"{left + wide * n / last:.1f},{20 + high * (1 - ms / most):.1f}"

        parts.append(f'<rect x="{left}" y="20" width="{wide}" height="{high}" fill="none" stroke="#999"/>')
        for i in range(5):
            ms = most * i / 4
            y = 20 + high * (1 - i / 4)
            parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{ms:.1f}</text>')
        for colour, field in (("#0072b2", "choose_ms"), ("#d55e00", "claimed_ms")):
            line = " ".join(at(c.n, getattr(c, field)) for c in costs)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for c in costs:
            if 0 < c.n < last / 40:
                continue  # no room for its name
            x = left + wide * c.n / last
            parts.append(f'<text x="{x:.0f}" y="{high + 36}" text-anchor="middle">{c.n:,}</text>')
        parts.append(f'<text x="{left + wide / 2:.0f}" y="{high + 54}" text-anchor="middle">{what}</text>')
    parts.append(f'<text x="{gap}" y="14" fill="#0072b2">chosen</text>')
    parts.append(f'<text x="{gap + 60}" y="14" fill="#d55e00">chosen and claimed; CPU ms of one server</text>')
    width = gap + len(series) * (wide + gap)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {high + 64}" font-family="sans-serif" font-size="11">'
        + "".join(parts)
        + "</svg>\n"
    )


def said(*words: str) -> str:
    """What `placement.py` prints."""
    program = [sys.executable, str(Path(__file__).with_name("placement.py")), *words]
    return subprocess.run(program, check=True, capture_output=True, text=True).stdout


def main(directory: Path, venv: str = "") -> None:
    wanted = {
        "hosts": [(n, n, 0, 4) for n in HOSTS],
        "servers on 5,000 hosts": [(n, 5000, n, 4) for n in SERVERS],
        "aggregates of 5,000 hosts": [(n, 5000, 0, n) for n in AGGREGATES],
    }
    series: dict[str, Sequence[Cost]] = {}
    for what, all in wanted.items():
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            series[what] = pool.starmap(measured, all)
        print(what, table(what, series[what]), sep="\n", flush=True)
    today = datetime.datetime.now(datetime.UTC).date()
    text = f"""# What it costs to place a server

`python bench/growth.py`, {today}, Python {platform.python_version()}, SQLite, one thread, in its own CPU time: what one server
costs, chosen among all hosts by the standard rules and tastes, and then claimed in a transaction of its own.

![CPU time over hosts, servers, aggregates](placement-cost.svg)

"""
    tables = "\n".join(table(w, c) for w, c in series.items())
    http = said("api", "1000", *[venv] * bool(venv))
    most = said(*map(str, HOSTS))
    text += f"""{tables}
## Over HTTP, beside the reference

`python bench/placement.py api 1000{" VENV" * bool(venv)}`:

{http}
## Placements a second

`python bench/placement.py`: alone and in a zone by the CPU time of the one thread, all else by the clock on the wall:

    {most.strip().replace(chr(10), chr(10) + "    ")}
"""
    (directory / "placement-cost.md").write_text(text)
    (directory / "placement-cost.svg").write_text(picture(series))


if __name__ == "__main__":
    main(Path(*sys.argv[1:2]) if sys.argv[1:] else Path(__file__).parents[1] / "docs", *sys.argv[2:3])
