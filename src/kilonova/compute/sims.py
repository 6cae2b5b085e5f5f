"""Many simulated hosts in one process: each as real as a host can be without a machine under it."""

import random
import threading
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from kilonova.compute.agent import ComputeHost, Images
from kilonova.kit.ask import WholeBus, asked
from kilonova.kit.bus import Remembers
from kilonova.kit.clock import Clock
from kilonova.model.options import Compute, Sim
from kilonova.virt.sim import Peers, SimDriver, SimState


class Slate:
    """A ledger in memory, for hosts that are memory themselves. Keeps the last answers."""

    MOST = 10_000

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        return self.answers.get(key)

    def put(self, key: str, answer: bytes, at: float) -> None:
        self.answers.setdefault(key, answer)
        while len(self.answers) > self.MOST:
            self.answers.pop(next(iter(self.answers)), None)


class SimHosts:
    """`options.hosts` of them, named `prefix`0, `prefix`1, … (or `names`), with one crew of threads for all.

    `states` and `ledgers` are what lies on disks: the next `SimHosts` on the same ones finds machines and answers again.
    `directory`: both are files there, and outlive the process; and guests can be sent to all hosts that lie there.
    """

    def __init__(
        self,
        bus: WholeBus,
        *,
        clock: Clock,
        options: Sim | None = None,
        compute: Compute | None = None,
        threads: int = 4,
        directory: Path | None = None,
        states: dict[str, SimState] | None = None,
        ledgers: dict[str, Remembers] | None = None,
        prefix: str = "sim-",
        images: Images | None = None,
        names: Sequence[str] | None = None,
        host_ip: str = "127.0.0.1",
        identity: str = "",
    ) -> None:
        self.bus, self.clock, self.threads = bus, clock, threads
        options, self.compute = options or Sim(), compute or Compute()
        self.states = states if states is not None else {}
        self.ledgers: dict[str, Remembers] = ledgers if ledgers is not None else {}
        self.hosts: dict[str, ComputeHost] = {}
        peers = self.states if directory is None else Peers(directory, self.states)
        for name in names or [f"{prefix}{i}" for i in range(options.hosts)]:
            if name not in self.states:
                self.states[name] = SimState(None if directory is None else directory / name / "machines")
            state = self.states[name]
            dice = random.Random(f"{options.seed}/{name}")
            driver = SimDriver(name, state, clock=clock, dice=dice, options=options, peers=peers)
            ledger = None if directory is not None else self.ledgers.setdefault(name, Slate())
            self.hosts[name] = ComputeHost(
                name,
                driver,
                bus,
                clock=clock,
                options=self.compute,
                directory=None if directory is None else directory / name,
                ledger=ledger,
                host_ip=host_ip,
                images=images,
                identity=identity,
            )
        self.ends: list[Callable[[], None]] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._tell, name=f"{prefix}reports", daemon=True)

    def start(self) -> None:
        self.ends.append(self.bus.serve_many({n: h.receive for n, h in self.hosts.items()}, self.threads))
        self.ends.append(self.bus.serve_many({asked(n): h.answer for n, h in self.hosts.items()}))
        self.thread.start()

    def close(self) -> None:
        self.over.set()
        for end in self.ends:
            end()
        if self.thread.ident is not None:
            self.thread.join(5)
        for h in self.hosts.values():
            h.close()

    def report(self) -> None:
        """Let all say now how they are whose queues are there."""
        for h in self.hosts.values():
            if self.bus.serves(h.name):
                h.tell()

    def _tell(self) -> None:
        for turn in count():
            self.report()
            if self.over.wait(min(1.0, self.compute.report_interval_s) if turn < 3 else self.compute.report_interval_s):
                return
