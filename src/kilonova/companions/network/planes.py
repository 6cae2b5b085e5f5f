"""The hosts of a fleet, as our own network service sees them: who makes networks, how, and how each is told.

What a host can do it says to the conductors: a host with wires speaks `Lay`.  One that does not has guests which QEMU
connects, or is simulated and connects nobody.
"""

import itertools
import threading
from collections.abc import Callable
from typing import Literal

from kilonova.contracts.wires import Lay
from kilonova.kit.clock import Clock
from kilonova.kit.db import Db
from kilonova.model.wiring import Wiring
from kilonova.store import hosts

Plane = Literal["wired", "user", "none"]

KNOWN_S = 10.0  # so long what a host said is taken for true
SIMULATED = "fake"


class Planes:
    """`tell` hands a host its wiring, and returns when it is so; `life` is a name that no other process has.

    `gateway`: who carries the routers; unset, the wired host that was there first.
    """

    def __init__(
        self, db: Db, clock: Clock, tell: Callable[[str, Lay], None], *, life: str, gateway: str | None = None
    ) -> None:
        self.db, self.clock, self.ask, self.life, self.gateway = db, clock, tell, life, gateway
        self.guard = threading.Lock()
        self.known: dict[str, tuple[float, Plane]] = {}
        self.numbers = itertools.count(1)
        self.met: dict[str, tuple[float | None, float]] = {}  # host → its life when it was last told all, and when
        self.silent: set[str] = set()  # nobody waits for them
        self.home_known = (float("-inf"), "")

    def of(self, host: str) -> Plane:
        """How `host` makes networks."""
        now = self.clock.now()
        with self.guard:
            at, plane = self.known.get(host, (float("-inf"), "none"))
        if now - at > KNOWN_S:
            plane = self._asked(host)
            with self.guard:
                self.known[host] = now, plane
        return plane

    def _asked(self, host: str) -> Plane:
        with self.db.read() as tx:
            speaks, kind = hosts.speech(tx, host)
        if Lay.__name__ in speaks:
            return "wired"
        return "none" if kind in ("", SIMULATED) else "user"

    def wired(self) -> list[hosts.Heard]:
        """All that can be told, those that were there first at the head."""
        with self.db.read() as tx:
            return hosts.speakers(tx, Lay.__name__)

    @property
    def home(self) -> str:
        """The host that carries what belongs to no guest; "" where there is none yet."""
        if self.gateway:
            return self.gateway
        at, host = self.home_known
        if self.clock.now() - at > KNOWN_S:
            host = next((h.host for h in self.wired()), "")
            self.home_known = self.clock.now(), host
        return host

    def tell(self, host: str, wiring: Wiring) -> None:
        """Raises what the host raises; Unavailable when it says nothing."""
        self.ask(host, Lay(wiring=wiring, life=self.life, number=next(self.numbers)))
