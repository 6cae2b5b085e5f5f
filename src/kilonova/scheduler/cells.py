"""NUMA cells of all hosts as columns: what is left of their CPUs and pages. Kept only once somebody asks for a part of it.

Row i is host i, as in `scheduler/hosts.py`; column j is its cell j. What servers sit on is read of those hosts alone that
have another generation than when it was read last.
"""

from collections.abc import Callable, Iterator
from itertools import islice, permutations
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kilonova.kit.db import Tx
from kilonova.model.host import HostFacts
from kilonova.model.numa import ANY, LARGE, SMALL_KB, Guest, GuestCell
from kilonova.model.seat import Room, Seat, rooms
from kilonova.store import seats

if TYPE_CHECKING:
    from kilonova.scheduler.hosts import Hosts

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
IN_ONE = 500  # hosts in one question
MOST_WAYS = 200  # to lay cells on cells; with more of them it is only looked whether each has one


class Cells:
    """The columns. They are empty until `refresh`."""

    def __init__(self, hosts: "Hosts") -> None:
        self.hosts = hosts
        self.width = 0
        self.read: Ints = np.zeros(0, np.int64)  # the generation of each host at which its seats were read
        self.pages: dict[int, Ints] = {}

    def refresh(self, tx: Tx) -> None:
        """As it is now, for all hosts that have cells."""
        hosts = self.hosts
        if not self.width:
            self._shape()
        there = np.asarray([bool(k.cells) for k in hosts.kinds], bool)[hosts.kind] if hosts.n else np.zeros(0, bool)
        old = np.flatnonzero(there & (self.read != hosts.generation))
        if not len(old):
            return
        of = [hosts.places[i].provider for i in old]
        if len(of) > IN_ONE:
            sat = seats.of_providers(tx)
        else:
            sat = seats.of_providers(tx, of)
        bare: dict[int, list[int]] = {}
        for i, provider in zip(old.tolist(), of, strict=True):
            if provider in sat:
                self._write([i], rooms(hosts.kinds[hosts.kind[i]], sat[provider].values()))
            else:
                bare.setdefault(int(hosts.kind[i]), []).append(i)
        for kind, rows in bare.items():
            self._write(rows, rooms(hosts.kinds[kind], ()))
        self.read[old] = hosts.generation[old]

    def _shape(self) -> None:
        kinds = self.hosts.kinds
        self.width = max((len(k.cells) for k in kinds), default=0)
        shape = self.hosts.n, self.width
        self.read = np.full(self.hosts.n, -2, np.int64)
        self.free: Ints = np.zeros(shape, np.int64)  # CPUs for one server alone
        self.whole: Ints = np.zeros(shape, np.int64)  # … on cores of which nobody has any
        self.threads: Ints = np.zeros(shape, np.int64)  # of each core
        self.floats: Ints = np.zeros(shape, np.int64)  # CPUs for everybody
        self.memory: Ints = np.zeros(shape, np.int64)
        self.pages = {kb: np.zeros(shape, np.int64) for k in kinds for c in k.cells for kb in c.pages}

    def _write(self, rows: list[int], left: list[Room]) -> None:
        for j, room in enumerate(left):
            self.free[rows, j], self.whole[rows, j], self.threads[rows, j] = room.free, room.whole, room.size
            self.floats[rows, j], self.memory[rows, j] = len(room.floats), room.memory_mb
            for kb, n in room.pages.items():
                self.pages[kb][rows, j] = n

    def fit(self, guest: Guest) -> Bools:
        """Hosts that have a cell of their own for each of the guest's."""
        hosts, k = self.hosts, len(guest.cells)
        if not hosts.n or k > self.width:
            return np.zeros(hosts.n, bool)
        extra = _spare(guest)
        asked = [
            (len(c.pinned) + more, len(c.cpus) - len(c.pinned), c.memory_mb)
            for c, more in zip(guest.cells, extra, strict=True)
        ]
        holds = [self._holds(guest, c, more) for c, more in zip(guest.cells, extra, strict=True)]
        if len(set(asked)) == 1:
            return np.asarray(holds[0].sum(axis=1) >= k)
        ways = list(permutations(range(self.width), k)) if self.width**k <= MOST_WAYS * k else []
        if not ways:
            return np.asarray(np.all([h.any(axis=1) for h in holds], axis=0))
        return np.asarray(
            np.any([np.all([h[:, j] for h, j in zip(holds, way, strict=True)], axis=0) for way in ways], axis=0)
        )

    def ways(self, guest: Guest) -> Callable[[int], Iterator[tuple[int, ...]]]:
        """On which cells of a row's host it could lie: cell by cell, each way."""
        holds = [self._holds(guest, c, more) for c, more in zip(guest.cells, _spare(guest), strict=True)]

        def of(row: int) -> Iterator[tuple[int, ...]]:
            for way in islice(permutations(range(self.width), len(holds)), MOST_WAYS):
                if all(h[row, j] for h, j in zip(holds, way, strict=True)):
                    yield way

        return of

    def _holds(self, guest: Guest, cell: GuestCell, extra: int) -> Bools:
        """Cells of hosts that could hold this one."""
        own, floating = len(cell.pinned) + extra, len(cell.cpus) - len(cell.pinned)
        fit = self.memory > 0
        if own:
            free = self.free
            if guest.threads == "require":
                free = np.where(self.threads > 1, self.whole, 0)
            elif guest.threads == "isolate":
                free = np.where(self.threads == 1, self.free, 0)
            fit &= free >= own
        if floating:
            fit &= self.floats >= floating
        return np.asarray(fit & self._bears(cell.memory_mb, guest.page_kb))

    def _bears(self, memory_mb: int, page_kb: int) -> Bools:
        small = self.memory >= memory_mb
        if page_kb in (0, SMALL_KB):
            return np.asarray(small)
        sizes = (
            self.pages if page_kb in (LARGE, ANY) else {page_kb: self.pages[page_kb]} if page_kb in self.pages else {}
        )
        fit = small if page_kb == ANY else np.zeros(small.shape, bool)
        for kb, n in sizes.items():
            if not memory_mb * 1024 % kb:
                fit = fit | (n * kb >= memory_mb * 1024)
        return np.asarray(fit)


def _spare(guest: Guest) -> list[int]:
    """CPUs beside the guest's own that each of its cells needs."""
    return [1 if not i and guest.emulator == "isolate" else 0 for i in range(len(guest.cells))]


__all__ = ["Cells", "HostFacts", "Seat"]
