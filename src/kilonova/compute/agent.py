"""A host: takes commands and questions off the bus, acts on its driver, says how it is.

What it has answered stands in its ledger, so a restart neither acts twice nor forgets what was taken back.  What
it holds is the driver's to know: a host that restarts finds its machines again.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

import kilonova
from kilonova.compute.machines import HANDLERS, QUESTIONS
from kilonova.compute.relay import Relay
from kilonova.compute.report import parted, report
from kilonova.contracts.compute import compute
from kilonova.contracts.conductor import HypervisorAway, PowerChanged, Report
from kilonova.kit.ask import Answerer, Bus, asked
from kilonova.kit.bus import Agent, Ledger, Remembers, letter
from kilonova.kit.clock import Clock
from kilonova.kit.errors import Refused, Unavailable
from kilonova.model.host import HostFacts
from kilonova.model.options import Compute
from kilonova.virt.driver import POWER_NUMBERS, Driver, Power

log = logging.getLogger(__name__)

FACTS_EVERY = 6  # reports
KEEP_ANSWERS_S = 7 * 86400.0  # longer than any sender's patience
FORGET_EVERY_S = 3600.0


class ComputeHost:
    """`name` is its address on the bus. `directory` holds the ledger; None keeps it in memory, for tests.

    Without `start` nothing happens by itself: a simulator calls `receive`, `answer` and `report` when it likes.
    """

    def __init__(
        self,
        name: str,
        driver: Driver,
        bus: Bus,
        *,
        clock: Clock,
        options: Compute | None = None,
        threads: int = 8,
        directory: Path | None = None,
        ledger: Remembers | None = None,
        host_ip: str = "",
        conductor: str = "conductor",
        images: "Images | None" = None,
        also_speaks: Iterable[str] = (),
        relay: Relay | None = None,
        identity: str = "",
    ) -> None:
        self.identity = identity  # of this machine, in its state directory
        self.relay = relay  # None: proxies are on this machine
        self.also_speaks = tuple(also_speaks)  # messages that another part of this process knows
        self.name, self.driver, self.bus, self.clock, self.images = name, driver, bus, clock, images
        self.options, self.threads = options or Compute(), threads
        self.host_ip, self.conductor = host_ip, conductor
        if ledger is None:
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True)
            ledger = Ledger(":memory:" if directory is None else str(directory / "ledger.db"))
        self.ledger = ledger
        self.born = clock.now()
        self.guard = threading.Lock()  # of the next two
        self.acts: dict[str, str] = {}  # what is being done, by server
        self.abandoned: set[str] = set()  # builds that nobody wants any longer
        self.epochs = {m.id: m.epoch for m in driver.machines()}
        self.builds = _Builds(self.options.max_concurrent_builds, clock)
        self.agent = Agent(compute, HANDLERS, self, bus.send, ledger, clock=clock)
        self.answerer = Answerer(compute, QUESTIONS, self, bus.send)
        self.receive, self.answer = self.agent.receive, self.answerer.receive
        self.reports, self.away = 0, False
        self.told: HostFacts | None = None  # what was last said of what lasts
        self.over = threading.Event()
        self.news = threading.Event()
        self.ends: list[Callable[[], None]] = []
        self.thread: threading.Thread | None = None
        driver.listen(self._changed)

    # -- in a real process

    def start(self) -> None:
        """Take commands, and say that we live."""
        self.ends.append(self.bus.serve(self.name, self.receive, self.threads))
        self.ends.append(self.bus.serve(asked(self.name), self.answer, 1))
        self.thread = threading.Thread(target=self._tell, name=f"{self.name}-reports", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Take no more commands; those under way have some seconds to end, and else are sent again. Machines go on."""
        self.over.set()
        self.news.set()
        for end in self.ends:
            end()
        if self.relay is not None:
            self.relay.close()
        if self.thread is not None:
            self.thread.join(5)
        self.driver.close()
        if isinstance(self.ledger, Ledger) and not self.acts:
            self.ledger.close()

    def _tell(self) -> None:
        forgotten = self.clock.now()
        while not self.bus.serves(self.name) and not self.over.wait(0.1):
            pass  # whoever hears of us writes to us: there must be a queue
        while not self.over.is_set():
            self.news.clear()
            try:
                self.tell()
                if isinstance(self.ledger, Ledger) and self.clock.now() - forgotten > FORGET_EVERY_S:
                    forgotten = self.clock.now()
                    self.ledger.forget(forgotten - KEEP_ANSWERS_S)
            except Exception:  # libvirtd is away, as a rule: a host that cannot work says nothing, and is down in time
                log.exception("%s could not say how it is", self.name)
            eager = self.reports < FACTS_EVERY  # a new host shall be known though the first letters may be lost
            self.news.wait(min(1.0, self.options.report_interval_s) if eager else self.options.report_interval_s)

    # -- what it says

    def tell(self) -> None:
        """How it is; or, the first time that nobody can know that, why."""
        try:
            told = self.report()
        except Unavailable as e:
            if not self.away:
                self.say(HypervisorAway(self.name, self.clock.now(), e.why or e.said, self.host_ip))
            self.away = True
            raise
        self.away = False
        self.say(told)

    def report(self) -> Report:
        """How it is now. The machines are asked for after what is busy, so that nothing falls between the two."""
        with self.guard:
            busy = sorted({*self.acts, *self.agent.lines})
        machines = self.driver.machines()
        epochs = {m.id: m.epoch for m in machines}
        with self.guard:
            self.epochs = epochs | {id: e for id, e in self.epochs.items() if id in self.acts}
        facts = parted(self.driver.host(), self.options)
        lasting = msgspec.structs.replace(facts, disk_free_gb=0, uptime="")
        tell = lasting != self.told or self.reports < FACTS_EVERY or self.reports % FACTS_EVERY == 0
        self.told = lasting
        self.reports += 1
        return report(
            self.name,
            at=self.clock.now(),
            born=self.born,
            machines=machines,
            busy=busy,
            speaks=sorted({*self.agent.speaks, *self.also_speaks}),
            facts=facts if tell else None,
            options=self.options,
            version=kilonova.__version__,
            host_ip=self.host_ip,
            identity=self.identity,
        )

    def report_now(self) -> None:
        """Do not wait for the next turn."""
        self.news.set()

    def _changed(self, id: str, power: Power) -> None:
        """The driver saw it. What we are doing ourselves will be answered for."""
        if id not in self.acts:
            told = PowerChanged(host=self.name, server=id, power_state=POWER_NUMBERS[power], at=self.clock.now())
            self.bus.send(self.conductor, letter(told))

    # -- for handlers

    def say(self, message: msgspec.Struct) -> None:
        """To the conductors, unasked."""
        self.bus.send(self.conductor, letter(message))

    @contextmanager
    def at_work(self, server: str, act: str) -> Iterator[None]:
        """While this is done to the server, its power is nobody's news."""
        with self.guard:
            self.acts[server] = act
        try:
            yield
        finally:
            with self.guard:
                self.acts.pop(server, None)
                self.abandoned.discard(server)

    def progress(self, server: str) -> Callable[[str], None]:
        """A driver calls it between the stages of a build, and may be told that nobody wants it any longer."""

        def stage(name: str) -> None:
            log.debug("%s: %s", server, name)
            if server in self.abandoned:
                raise Refused("It is not wanted any longer.")

        return stage


class _Builds:
    """So many at the same time; who does not get his turn in a while is asked again. 0: no limit."""

    PATIENCE_S = 60.0

    def __init__(self, most: int, clock: Clock) -> None:
        self.turns = threading.BoundedSemaphore(most) if most else None

    def __enter__(self) -> None:
        if self.turns is not None and not self.turns.acquire(timeout=self.PATIENCE_S):
            raise Unavailable("This host builds as many servers as it may.")

    def __exit__(self, *_: object) -> None:
        if self.turns is not None:
            self.turns.release()


class ImageService(Protocol):
    """The image service, as far as a host needs it (`clients.Image`)."""

    def download(self, id: str, write: Callable[[bytes], object]) -> Any: ...

    def show(self, id: str) -> Any: ...

    def upload(self, id: str, chunks: Iterable[bytes]) -> None: ...


class Images:
    """Where a driver gets an image's bytes (`virt.driver.Fetches`), and where a host brings those of a new one."""

    def __init__(self, service: ImageService) -> None:
        self.service = service

    def fetch(self, image_id: str, write: Callable[[bytes], object]) -> None:
        """Raises NotFound, Unavailable."""
        self.service.download(image_id, write)

    def send(self, image_id: str, chunks: Iterable[bytes]) -> None:
        """Its bytes; once is enough. Raises NotFound, Unavailable."""
        status = self.service.show(image_id).status
        if status == "saving":
            raise Unavailable("An earlier upload of this image has not ended yet.")
        if status != "active":
            self.service.upload(image_id, chunks)
