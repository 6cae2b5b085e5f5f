"""Waiting for the end of a run: for the few requests whose answer is what became of it.

The book of runs is asked; being told is a hint that only makes it quick.
"""

import threading
from collections import defaultdict

from kilonova.kit import journal
from kilonova.kit.clock import Clock
from kilonova.kit.db import Db

LOOK_S = 0.5  # where nobody tells us: the run is carried in another process


class Ends:
    """Of one process. `told` is called after the end of a run, by whoever knows of it."""

    def __init__(self, db: Db, clock: Clock) -> None:
        self.db, self.clock = db, clock
        self.guard = threading.Lock()
        self.waiting: dict[str, list[threading.Event]] = defaultdict(list)

    def wait(self, run: str, timeout_s: float) -> bool:
        """Until it is over, at most so long. Is it?"""
        end, mine = self.clock.now() + timeout_s, threading.Event()
        with self.guard:
            self.waiting[run].append(mine)
        try:
            while not self.db.look(journal.over, run):
                left = end - self.clock.now()
                if left <= 0:
                    return False
                mine.wait(min(left, LOOK_S))
                mine.clear()
            return True
        finally:
            with self.guard:
                self.waiting[run].remove(mine)
                if not self.waiting[run]:
                    del self.waiting[run]

    def told(self, run: str) -> None:
        with self.guard:
            for waiting in self.waiting.get(run, ()):
                waiting.set()
