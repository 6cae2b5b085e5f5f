"""The threads of a run engine in a real process: some that carry runs, and one that looks for what is due.

A wake-up is a run's id in a queue.  The same id twice in the queue is one look; a full queue drops it.  Both are
safe, because a wake-up is a hint: the sweeper finds every run whose time has come, wherever it was started.

What is new is on its way to somebody already, and the sweepers of all conductors see the same.  So that they do not
take it from under each other's hands, they leave it alone for a while, look for a few at a time, in no order, and
hardly at all while there is enough to do.
"""

import logging
import threading
from collections import deque

from kilonova.kit.workflow import Engine

log = logging.getLogger(__name__)

ROUND = 64  # runs that a look is for
AGAIN_S = 0.05  # until the next look, where there were as many
FRESH = 4  # looks long a run that nobody has had is left to who was told of it


class Worker:
    """`threads` that carry, and a sweeper that looks every `sweep_s` seconds. Ends with `close`."""

    MOST = 10_000  # ids in the queue

    def __init__(self, engine: Engine, *, threads: int = 2, sweep_s: float = 1.0) -> None:
        self.engine, self.sweep_s = engine, sweep_s
        self.news = threading.Condition()  # of the three below
        self.queue: deque[str] = deque()
        self.queued: set[str] = set()
        self.over = False
        self.ended = threading.Event()
        self.crew = [threading.Thread(target=self._work, name=f"{engine.me}-{i}", daemon=True) for i in range(threads)]
        self.crew.append(threading.Thread(target=self._sweep, name=f"{engine.me}-sweeper", daemon=True))

    def start(self) -> None:
        """Take over what an earlier life of this engine held, and begin.

        The recovery comes first: no run that this life takes can be given away by it.
        """
        try:
            self.engine.recover()
        except Exception:  # the leases of that life run out; until then others may carry on
            log.exception("what an earlier life held could not be taken over")
        for t in self.crew:
            t.start()

    def wake(self, run: str) -> None:
        """This run may have something to do. Call it after the commit."""
        with self.news:
            if run not in self.queued and len(self.queue) < self.MOST and not self.over:
                self.queued.add(run)
                self.queue.append(run)
                self.news.notify()

    def close(self, timeout_s: float = 10.0) -> None:
        """No more runs are taken; those in hand are brought to where they park. What is queued is due, and found later."""
        with self.news:
            self.over = True
            self.news.notify_all()
        self.ended.set()
        for t in self.crew:
            if t.ident is not None and t is not threading.current_thread():
                t.join(timeout_s)

    def _work(self) -> None:
        while (run := self._next()) is not None:
            try:
                self.engine.carry(run)
            except Exception:
                log.exception("run %s is left until it is looked at again", run)

    def _next(self) -> str | None:
        with self.news:
            while not self.queue and not self.over:
                self.news.wait()
            if self.over:
                return None
            run = self.queue.popleft()
            self.queued.discard(run)
            return run

    def _sweep(self) -> None:
        while not self.ended.is_set():
            found, busy = [], len(self.queue) >= len(self.crew)
            try:
                # Though there be enough to do: the oldest may be one that nobody was told of.
                found = self.engine.due(len(self.crew) if busy else ROUND, fresh_s=FRESH * self.sweep_s)
                self.engine.dice.shuffle(found)
                for run in found:
                    self.wake(run)
            except Exception:
                log.exception("the sweep failed; there will be another")
            self.ended.wait(AGAIN_S if len(found) == ROUND else self.sweep_s)
