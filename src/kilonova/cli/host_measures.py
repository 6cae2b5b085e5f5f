"""What `/metrics` says of hosts, and of the bus: also in a process that has no database."""

from collections.abc import Callable
from typing import Any

from kilonova.compute.agent import ComputeHost
from kilonova.compute.sims import SimHosts
from kilonova.kit.bus import MemoryBus
from kilonova.kit.health import Metrics

Values = dict[tuple[str, ...], float]


def of_bus(m: Metrics, bus: Any) -> None:
    m.count("kilonova_letters_sent", "Letters sent over the broker", lambda: {(): float(getattr(bus, "sent", 0))})
    m.gauge(
        "kilonova_letters_waiting", "Letters that nobody took yet, or no broker", lambda: {(): float(_waiting(bus))}
    )


def _waiting(bus: Any) -> int:
    if isinstance(bus, MemoryBus):
        return sum(len(box.letters) for box in {id(b): b for b in list(bus.boxes.values())}.values())
    return len(getattr(bus, "box", ()))


def of_hosts(m: Metrics, host: Callable[[], ComputeHost | SimHosts | None]) -> None:
    def all() -> list[ComputeHost]:
        here = host()
        return [] if here is None else list(here.hosts.values()) if isinstance(here, SimHosts) else [here]

    def each(of: Callable[[ComputeHost], float]) -> Callable[[], Values]:
        return lambda: {(h.name,): of(h) for h in all()}

    m.gauge(
        "kilonova_host_machines", "Machines that a host of this process has", each(lambda h: len(h.epochs)), ("host",)
    )
    m.gauge("kilonova_host_acts", "What it is at just now", each(lambda h: len(h.acts)), ("host",))
    waiting = each(lambda h: sum(len(line) for line in list(h.agent.lines.values())))
    m.gauge("kilonova_host_acts_waiting", "Acts that wait for others on the same server", waiting, ("host",))
    m.count("kilonova_host_reports", "How often it said how it is", each(lambda h: h.reports), ("host",))
