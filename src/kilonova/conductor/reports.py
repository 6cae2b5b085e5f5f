"""What hosts say of themselves, gathered for a moment: many reports at once are compared by the questions of one."""

import logging
import threading

from kilonova.conductor import watch
from kilonova.conductor.world import World
from kilonova.contracts.conductor import Report

log = logging.getLogger(__name__)

GATHER_S = 0.25  # so long what comes is gathered, after what came was looked at


class Reports:
    """One report alone is looked at when it comes. Without `start` nothing happens but by `turn`.

    What is gathered lies in memory: a host says the same again in a while.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.news = threading.Condition()  # of the next
        self.came: list[Report] = []
        self.over = threading.Event()
        self.thread: threading.Thread | None = None

    def take(self, r: Report) -> None:
        with self.news:
            self.came.append(r)
            if len(self.came) == 1:
                self.news.notify()

    def turn(self) -> None:
        """Look at all that came."""
        with self.news:
            came, self.came = self.came, []
        if came:
            watch.reported(self.world, came)

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
