"""The wires of a host that is a machine of its own: told over the bus what they must be, and kept so meanwhile.

The last wiring lies in a file: after a restart of the machine there are bridges again before anybody has said so, and
guests can be plugged into them.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from kilonova.companions.wires import Wires
from kilonova.contracts.wires import Laid, Lay, at, wires
from kilonova.kit.ask import Answerer, Bus, asked
from kilonova.model.wiring import Wiring

log = logging.getLogger(__name__)

MEND_S = 15.0  # so often it is looked whether the kernel still has what was told


class WiresAgent:
    """`file` keeps the last wiring."""

    speaks = (Lay.__name__,)

    def __init__(self, host: str, wires_here: Wires, bus: Bus, file: Path) -> None:
        self.host, self.wires, self.bus, self.file = host, wires_here, bus, file
        self.guard = threading.Lock()
        self.life, self.number = "", 0
        self.last: Wiring | None = None
        self.answerer = Answerer(wires, [lay], self, bus.send)
        self.over = threading.Event()
        self.ends: list[Callable[[], None]] = []
        self.thread = threading.Thread(target=self._keep, name="wires", daemon=True)

    def start(self) -> None:
        """The last wiring is there again; `listen` lets others change it."""
        self._remember()
        self.thread.start()

    def listen(self) -> None:
        if not self.ends:
            self.ends.append(self.bus.serve(asked(at(self.host)), self.answerer.receive, 1))

    def be_deaf(self) -> None:
        for end in self.ends:
            end()
        self.ends.clear()

    def close(self) -> None:
        """Guests keep their network."""
        self.over.set()
        self.be_deaf()
        if self.thread.ident is not None:
            self.thread.join(10)
        self.wires.close()

    def lay(self, m: Lay) -> Laid:
        """Raises what the wires raise."""
        with self.guard:
            if m.life == self.life and m.number < self.number:
                return Laid()  # a later one came first
            self.wires.apply(m.wiring)
            self.life, self.number = m.life, m.number
            if m.wiring != self.last:
                self.last = m.wiring
                new = self.file.with_suffix(".new")
                new.write_bytes(msgspec.json.encode(m.wiring))
                new.rename(self.file)
            return Laid(self.wires.status().problems)

    def _remember(self) -> None:
        try:
            self.last = msgspec.json.decode(self.file.read_bytes(), type=Wiring)
        except (OSError, msgspec.MsgspecError):
            return
        self._mend()

    def _keep(self) -> None:
        while not self.over.wait(MEND_S):
            self._mend()

    def _mend(self) -> None:
        with self.guard:
            try:
                if self.last is not None and not self.over.is_set():
                    self.wires.apply(self.last)
            except Exception:
                log.exception("the wires of this host are not what they should be; it is tried again")


def lay(agent: WiresAgent, m: Lay) -> Laid:
    return agent.lay(m)
