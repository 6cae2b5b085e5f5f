"""One name, one machine: a host takes no commands until it is known to be the one that is called so.

Two machines of one name would share its letters, and each would count as the other without its servers.  So each has an
identity, made once and kept in its state directory.  It asks the conductors whether it is known under its name (or
nobody is); who is not is told why, and stays outside.  What it is told comes to an address that only one process at a
time can have: another that is told the same identity (a copy of the directory) hears nothing, and stays outside too.
"""

import logging
import threading
from collections.abc import Callable, Sequence

from kilonova.contracts.compute import Echo, Met
from kilonova.contracts.conductor import Greeting, alone
from kilonova.kit.ask import WholeBus
from kilonova.kit.bus import Door, letter
from kilonova.kit.clock import Clock
from kilonova.kit.errors import Refused, Unavailable

log = logging.getLogger(__name__)

AGAIN_S = 1.0  # until it greets again
HEARD_S = 20.0  # so long it is waited for the broker, and for who was here before; then it is said that it takes long
SILENT_S = 60.0  # conductors that say nothing for so long are of a release that does not know the question


class Known:
    """`names`: of the hosts of this process. `life` tells it from another process of the same identity."""

    def __init__(
        self,
        names: Sequence[str],
        identity: str,
        bus: WholeBus,
        *,
        conductor: str = "conductor",
        clock: Clock,
        life: str,
    ) -> None:
        self.names, self.identity, self.bus, self.clock = list(names), identity, bus, clock
        self.conductor, self.life = conductor, life
        self.news = threading.Condition()  # of the next
        self.alone = False  # is the address ours?
        self.said: str | None = None  # "" when it is known; else why not
        self.over = False
        door = Door()
        door.on(Echo, self._echo)
        door.on(Met, self._met)
        self.end: Callable[[], None] = bus.serve(alone(identity), door.receive, 1)

    def meet(self) -> None:
        """Returns when it may take commands. Raises Refused with the reason, Unavailable when nobody can be heard."""
        began = self.clock.now()
        with self.news:
            self.said, self.alone, since = None, False, None
        while True:
            self.bus.send(alone(self.identity), letter(Echo(self.life)))
            self.bus.send(self.conductor, letter(Greeting(self.names, self.identity, self.life)))
            with self.news:
                self.news.wait_for(lambda: self.said is not None or self.over, AGAIN_S)
                now, said, mine, over = self.clock.now(), self.said, self.alone, self.over
            since = since or (now if mine else None)
            if over:
                raise Unavailable("It ends.")
            if said:
                raise Refused(said)
            if said is not None:
                return
            if since is None and now - began > HEARD_S:
                raise Unavailable(
                    "The broker cannot be reached, or another process with this host's identity is at work: was its state "
                    "directory copied?"
                )
            if since is not None and now - since > SILENT_S:
                log.warning("no conductor says whether this host is known under its name; it begins")
                return

    def turned_away(self) -> str:
        """Waits until it is said that another has this name, and returns the reason; "" when `close` was called."""
        with self.news:
            self.news.wait_for(lambda: self.over or bool(self.said))
            return "" if self.over else self.said or ""

    def close(self) -> None:
        with self.news:
            self.over = True
            self.news.notify_all()
        self.end()

    def _echo(self, m: Echo) -> None:
        if m.life != self.life:
            log.error("another process says that it is this host: was its state directory copied?")
            return
        with self.news:
            self.alone = True
            self.news.notify_all()

    def _met(self, m: Met) -> None:
        """An answer to somebody else's greeting is none to ours; what is said unasked is for whoever is here."""
        if m.life in ("", self.life):
            with self.news:
                self.said = m.why
                self.news.notify_all()
