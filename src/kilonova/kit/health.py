"""Is this process alive, can it do its work, and how much did it do: `/healthz`, `/readyz`, `/metrics`.

A check is a function that gives "" when all is well, and else the reason in a sentence.  Metrics are Prometheus's,
in a registry of our own.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from kilonova.kit.errors import Trouble
from kilonova.kit.http import Environ, StartResponse
from kilonova.kit.routes import Route

log = logging.getLogger(__name__)
Check = Callable[[], str]
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Counters of one process. `gauge` registers a function that is asked when somebody looks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "kilonova_http_seconds", "Time in a handler", ["service"], buckets=BUCKETS, registry=self.registry
        )
        self.requests = Counter(
            "kilonova_http_requests", "Requests answered", ["service", "status"], registry=self.registry
        )

    def observer(self, service: str) -> Callable[[Route | None, int, float], None]:
        """For a `Service`: counts its answers."""
        seconds, by_status = self.seconds.labels(service), dict[int, Any]()

        def observe(_: Route | None, status: int, took_s: float) -> None:
            seconds.observe(took_s)
            if (counter := by_status.get(status)) is None:
                counter = by_status[status] = self.requests.labels(service, str(status))
            counter.inc()

        return observe

    def gauge(
        self, name: str, help: str, read: Callable[[], dict[tuple[str, ...], float]], labels: tuple[str, ...] = ()
    ) -> None:
        """`read()` gives a value for each tuple of label values; () where there are no labels."""
        self._asked(GaugeMetricFamily, name, help, read, labels)

    def count(
        self, name: str, help: str, read: Callable[[], dict[tuple[str, ...], float]], labels: tuple[str, ...] = ()
    ) -> None:
        """The same of what only grows; shown as `NAME_total`."""
        self._asked(CounterMetricFamily, name, help, read, labels)

    def _asked(self, kind: Any, name: str, help: str, read: Callable[[], Any], labels: tuple[str, ...]) -> None:
        class Collector:
            def describe(self) -> Iterable[Any]:
                return [kind(name, help, labels=labels)]  # asked when it registers: nothing is read then

            def collect(self) -> Iterable[Any]:
                family = kind(name, help, labels=labels)
                try:
                    for values, n in read().items():
                        family.add_metric(values, n)
                except Exception as e:  # the database is away, as a rule: the other figures are worth having
                    log.warning("%s could not be read: %s", name, type(e).__name__)
                yield family

        self.registry.register(Collector())

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Health:
    """The WSGI application of the three pages. `alive` are checks of the process itself, `ready` of what it needs."""

    def __init__(
        self, metrics: Metrics, *, alive: dict[str, Check] | None = None, ready: dict[str, Check] | None = None
    ) -> None:
        self.metrics, self.alive, self.ready = metrics, alive or {}, ready or {}
        self.pages: dict[str, Callable[[], tuple[str, str, bytes]]] = {
            "/healthz": lambda: _verdict(self.alive),
            "/readyz": lambda: _verdict(self.ready),
            "/metrics": lambda: ("200 OK", "text/plain; version=0.0.4; charset=utf-8", self.metrics.text()),
        }

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        page = self.pages.get(environ.get("PATH_INFO", ""))
        status, kind, body = page() if page else ("404 Not Found", "text/plain; charset=utf-8", b"Nothing is here.\n")
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [body]

    def reasons(self) -> dict[str, str]:
        """What keeps this process from its work; empty when nothing does."""
        return {name: why for name, check in self.ready.items() if (why := _asked(check))}


def _verdict(checks: dict[str, Check]) -> tuple[str, str, bytes]:
    found = {name: _asked(check) for name, check in checks.items()}
    bad = any(found.values())
    body = {"status": "unavailable" if bad else "ok", "checks": {n: why or "ok" for n, why in found.items()}}
    return "503 Service Unavailable" if bad else "200 OK", "application/json", msgspec.json.encode(body) + b"\n"


def _asked(check: Check) -> str:
    try:
        return check()
    except Trouble as e:
        return e.said
    except Exception as e:  # a page about health must not be ill itself
        return type(e).__name__
