"""What `/metrics` of a process says: of each role that it has its own figures. docs/how/watch-a-cloud.md lists them."""

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from kilonova.cli.host_measures import of_bus, of_hosts
from kilonova.kit.clock import Clock
from kilonova.kit.db import Db, Tx
from kilonova.kit.health import Metrics
from kilonova.kit.journal import load
from kilonova.kit.reconcile import Reconcilers
from kilonova.model.options import Config
from kilonova.store import figures

if TYPE_CHECKING:
    from kilonova.cli.cloud import Cloud
    from kilonova.conductor.app import Conductor

R = TypeVar("R")
Values = dict[tuple[str, ...], float]
KEEP_S = 5.0  # what a scrape asked of the database is good for those of the same moment
QUANTILES = (0.5, 0.9, 0.99, 1.0)


def of(cloud: "Cloud") -> None:
    """Register what this process can tell of its roles."""
    m, p, db = cloud.metrics, cloud.process, cloud.db
    of_bus(m, p.bus)
    upkeep = [cloud.upkeep]
    _of_database(m, db)
    if cloud.conductor is not None:
        _of_conductor(m, db, p.clock, cloud.conductor, p.config)
        upkeep.append(cloud.conductor.reconcilers)
    if "placement" in cloud.roles:
        _of_placement(m, db, p.clock)
    if "api" in cloud.roles:
        states = _kept(db, p.clock, lambda tx: figures.states(tx))
        m.gauge(
            "kilonova_servers",
            "Living servers",
            lambda: {names: float(n) for names, n in states().items()},
            ("vm_state", "task_state"),
        )
    if cloud.hosts is not None:
        of_hosts(m, lambda: cloud.hosts.host if cloud.hosts is not None else None)
    _of_reconcilers(m, upkeep)


def _of_database(m: Metrics, db: Db) -> None:
    m.count("kilonova_sql_statements", "SQL statements sent", lambda: {(): float(db.statements)})
    m.count("kilonova_sql_commits", "Transactions committed", lambda: {(): float(db.commits)})


def _of_conductor(m: Metrics, db: Db, clock: Clock, conductor: "Conductor", config: Config) -> None:
    runs = _kept(db, clock, figures.open_runs)
    late = _kept(db, clock, lambda tx: load(tx, clock.now()).late_s)
    silent = _kept(db, clock, lambda tx: figures.silences(tx, clock.now()))
    worker, down_after_s = conductor.worker, config.compute.host_down_after_s
    m.gauge(
        "kilonova_runs",
        "Runs that are open",
        lambda: {(r.workflow, r.state): float(r.n) for r in runs()},
        ("workflow", "state"),
    )
    m.gauge(
        "kilonova_runs_oldest_seconds",
        "Age of the oldest of them",
        lambda: {(r.workflow, r.state): max(0.0, clock.now() - r.oldest) for r in runs()},
        ("workflow", "state"),
    )
    m.gauge("kilonova_runs_late_seconds", "By how much the longest waiting run is overdue", lambda: {(): late()})
    m.gauge(
        "kilonova_runs_queued", "Runs that wait for a thread of this process", lambda: {(): float(len(worker.queue))}
    )
    m.gauge("kilonova_hosts", "Hosts by how they are", lambda: _by_state(silent(), down_after_s), ("state",))
    m.gauge(
        "kilonova_host_silence_seconds",
        "For how long hosts have said nothing, of those that are not down: quantiles",
        lambda: _quantiles([s for s, forced, _ in silent() if s is not None and not forced and s <= down_after_s]),
        ("quantile",),
    )


def _of_placement(m: Metrics, db: Db, clock: Clock) -> None:
    claims = _kept(db, clock, figures.claims)
    one = ("resource_class",)
    m.gauge("kilonova_claimed", "What is held of all hosts", lambda: {(n,): c[0] for n, c in claims().items()}, one)
    m.gauge("kilonova_capacity", "What can be held of them", lambda: {(n,): c[1] for n, c in claims().items()}, one)


def _of_reconcilers(m: Metrics, all: list[Reconcilers]) -> None:
    def sums(of: Callable[[Reconcilers], Mapping[str, int]]) -> Callable[[], Values]:
        return lambda: {(name,): float(of(r)[name]) for r in all for name in r.all}

    one = ("reconciler",)
    m.count("kilonova_mended", "Things that reconcilers put right", sums(lambda r: r.mended), one)
    m.count("kilonova_reconciler_failures", "Turns of theirs that failed", sums(lambda r: r.failed), one)


def _by_state(silent: list[tuple[float | None, bool, bool]], down_after_s: float) -> Values:
    found: Values = {("up",): 0, ("down",): 0, ("disabled",): 0}
    for silence, forced, disabled in silent:
        up = silence is not None and silence <= down_after_s and not forced
        found["down" if not up else "disabled" if disabled else "up",] += 1
    return found


def _quantiles(values: list[float]) -> Values:
    values = sorted(values)
    return {(str(q),): values[min(len(values) - 1, int(q * len(values)))] for q in QUANTILES} if values else {}


def _kept(db: Db, clock: Clock, ask: Callable[[Tx], R]) -> Callable[[], R]:
    """Asked once for several figures, and for several who scrape."""
    guard, known = threading.Lock(), list[tuple[float, R]]()

    def read() -> R:
        with guard:
            if not known or not 0 <= clock.now() - known[0][0] < KEEP_S:
                with db.read() as tx:
                    known[:] = [(clock.now(), ask(tx))]
            return known[0][1]

    return read
