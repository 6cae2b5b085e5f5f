"""What hosts say of themselves, gathered for a moment: many reports at once are compared by the questions of one."""

import logging
import threading

from kilonova.conductor import watch
from kilonova.conductor.world import World
from kilonova.contracts.conductor import Report
from kilonova.kit.db import ill

log = logging.getLogger(__name__)

GATHER_S = 0.25  # so long what comes is gathered, after what came was looked at


class Reports:
    """One report alone is looked at when it comes. Without `start` nothing happens but by `turn`.

    What is gathered lies in memory: a host says the same again in a while.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.news = threading.Condition()  # of the next
        self.came: dict[tuple[str, bool], Report] = {}  # the last of each host that tells what it is, and that does not
        self.over = threading.Event()
        self.thread: threading.Thread | None = None

    def take(self, r: Report) -> None:
        with self.news:
            self.came.pop(said := (r.host, r.facts is not None), None)
            self.came[said] = r
            if len(self.came) == 1:
                self.news.notify()

    def turn(self) -> None:
        """Look at all that came. What cannot be looked at is no harm to the others; it is raised at the end."""
        with self.news:
            came, self.came = list(self.came.values()), {}
        try:
            if came:
                watch.reported(self.world, came)
        except Exception as e:
            if len(came) < 2 or ill(e):
                raise
            self._one_by_one(came)

    def _one_by_one(self, came: list[Report]) -> None:
        trouble = None
        for r in came:
            try:
                watch.reported(self.world, [r])
            except Exception as e:
                trouble = e
        if trouble is not None:
            raise trouble

    def start(self) -> None:
        """Let a thread do it from now on."""
        self.thread = threading.Thread(target=self._work, name="reports", daemon=True)
        self.thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        self.over.set()
        with self.news:
            self.news.notify_all()
        if self.thread is not None:
            self.thread.join(timeout_s)

    def _work(self) -> None:
        while not self.over.is_set():
            with self.news:
                while not self.came and not self.over.is_set():
                    self.news.wait()
            try:
                self.turn()
            except Exception:
                log.exception("what hosts said could not be looked at; they will say it again")
            self.over.wait(GATHER_S)
