"""What the API must know of every host to show a server: its zone and its health. Read again when a second old.

One owner, one way to be wrong: what it says may be that second late.
"""

import threading

import msgspec

from kilonova.kit.clock import Clock
from kilonova.kit.db import Db
from kilonova.model import options
from kilonova.store import hosts

KEEP_S = 1.0


class Entry(msgspec.Struct, frozen=True):
    zone: str
    disabled: bool
    forced_down: bool
    last_seen: float | None
    speaks: frozenset[str] = frozenset()


class HostBook:
    """Hosts by name. Safe to be asked from any thread."""

    def __init__(self, db: Db, clock: Clock, config: options.Config) -> None:
        self.db, self.clock, self.config = db, clock, config
        self.lock, self.read_at, self.entries = threading.Lock(), -KEEP_S, dict[str, Entry]()

    def zone(self, host: str | None) -> str:
        entry = self._all().get(host or "")
        return entry.zone if entry else ""

    def status(self, host: str | None) -> str:
        """host_status: UP, DOWN (forced), MAINTENANCE (disabled), UNKNOWN (silent), "" (no host)."""
        entry = self._all().get(host or "")
        if entry is None:
            return ""
        if entry.forced_down:
            return "DOWN"
        if entry.disabled:
            return "MAINTENANCE"
        return "UNKNOWN" if self._silent(entry) else "UP"

    def up(self, host: str | None) -> bool:
        """It is there and speaks, whether new servers may come to it or not."""
        entry = self._all().get(host or "")
        return entry is not None and not entry.forced_down and not self._silent(entry)

    def _silent(self, entry: Entry) -> bool:
        return entry.last_seen is None or self.clock.now() - entry.last_seen > self.config.compute.host_down_after_s

    def speaks(self, host: str | None, message: str) -> bool:
        """Does it know this message? A host of an older release may not."""
        entry = self._all().get(host or "")
        return entry is not None and message in entry.speaks

    def zones(self) -> set[str]:
        """The zones a server may ask for: those of hosts."""
        return {e.zone for e in self._all().values()}

    def __contains__(self, host: str) -> bool:
        return host in self._all()

    def _all(self) -> dict[str, Entry]:
        now = self.clock.now()
        if abs(now - self.read_at) >= KEEP_S:
            with self.lock:
                if abs(now - self.read_at) >= KEEP_S:
                    self.entries, self.read_at = self._read(), now
        return self.entries

    def _read(self) -> dict[str, Entry]:
        default = self.config.api.default_availability_zone
        with self.db.read() as tx:
            named = hosts.zones(tx)
            known = hosts.services(tx, binary="nova-compute")
        return {
            s.host: Entry(named.get(s.host, default), s.disabled, s.forced_down, s.last_seen, frozenset(s.speaks))
            for s in known
        }
