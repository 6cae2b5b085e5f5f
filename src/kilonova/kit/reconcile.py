"""Work that nobody asked for: compare what is with what should be, and mend the difference.

    @reconciler(every_s=60)
    def lost_hosts(world: World) -> list[str]:
        return [f"{host} is silent; …" for host in …]

A reconciler takes no input but the world, does the same work each time, and says what it mended.  So it does not
matter who runs it, how often, or whether the last one died half-way; what it depends on is the state it looks at
and nothing else.  Anything that must happen *because of something* is a run.
"""

import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from kilonova.kit.clock import Clock

log = logging.getLogger(__name__)


class Reconciler:
    """A function of the world that says in words what it mended, and how often it is called."""

    def __init__(self, do: Callable[[Any], list[str]], every_s: float, at_once: bool) -> None:
        self.do, self.every_s, self.at_once, self.name = do, every_s, at_once, do.__name__

    def __call__(self, world: Any) -> list[str]:
        return self.do(world)


def reconciler(*, every_s: float, at_once: bool = False) -> Callable[[Callable[[Any], list[str]]], Reconciler]:
    """Call it every so many seconds, give or take a tenth. `at_once`: first at start-up; else at some time in the first round."""
    assert every_s > 0
    return lambda do: Reconciler(do, every_s, at_once)


class Reconcilers:
    """Calls each reconciler when its time has come, one after the other.

    One that fails is logged and has its turn again; the others do not notice.  `mended` and `failed` count, by name,
    what was done since the start.  Without `start`, nothing happens but by `turn` and `run_once`.
    """

    def __init__(
        self,
        world: Any,
        reconcilers: Iterable[Reconciler],
        *,
        clock: Clock,
        dice: random.Random,
        longest_s: float = 5.0,
    ) -> None:
        self.world, self.clock, self.dice, self.longest_s = world, clock, dice, longest_s
        self.all = {r.name: r for r in reconcilers}
        now = clock.now()
        self.next = {
            name: now if r.at_once else now + dice.uniform(0, r.every_s) for name, r in sorted(self.all.items())
        }
        self.mended: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.over = threading.Event()
        self.thread: threading.Thread | None = None

    def due(self) -> list[str]:
        """Whose time has come, the longest waiting first."""
        now = self.clock.now()
        return sorted((name for name, at in self.next.items() if at <= now), key=lambda name: self.next[name])

    def turn(self) -> list[str]:
        """Call all that are due. What they mended."""
        said = []
        for name in self.due():
            if self.over.is_set():
                break
            try:
                said += self.run_once(name)
            except Exception:
                self.failed[name] += 1
                log.exception("the reconciler %s failed; it will have another turn", name)
            self.next[name] = self.clock.now() + self.all[name].every_s * self.dice.uniform(0.9, 1.1)
        return said

    def run_once(self, name: str) -> list[str]:
        """Call this one now, whatever the time. Raises what it raises."""
        said = self.all[name](self.world)
        for line in said:
            log.warning("%s: %s", name, line)
        self.mended[name] += len(said)
        return said

    def start(self) -> None:
        """Let a thread do it from now on."""
        assert self.thread is None
        self.thread = threading.Thread(target=self._work, name="reconcilers", daemon=True)
        self.thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """The one that is at work is waited for, and no other begins."""
        self.over.set()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout_s)

    def _work(self) -> None:
        while not self.over.is_set():
            self.turn()
            wait_s = min(self.next.values(), default=float("inf")) - self.clock.now()
            # Never for long: a clock that was set back must not put everything off.
            self.over.wait(max(0.05, min(wait_s, self.longest_s)))
