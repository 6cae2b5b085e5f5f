"""Where a guest sits on its host: which host CPUs are its own, on whose memory it lies, which devices it has.

A `Seat` is chosen in the transaction that claims (`store/seats.py`), of what the host has and what others sit on; the
guest is made just so (`Machine.seat`), and as long as it holds its claim nobody else is given the same.  Pure.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import permutations

import msgspec

from kilonova.model.host import Cell, HostDevice, HostFacts
from kilonova.model.numa import ANY, LARGE, SMALL_KB, Guest, GuestCell

MOST_TRIED = 5000  # ways to lay cells on cells that are looked at


class SeatCell(msgspec.Struct, frozen=True):
    """A cell of the guest on a cell of the host. `pins`: guest CPU → host CPU; `floats`: where its other CPUs run."""

    host: int
    cpus: list[int]
    memory_mb: int
    page_kb: int = 0  # 0: as the host likes
    pins: dict[int, int] = {}
    floats: list[int] = []


class Taken(msgspec.Struct, frozen=True):
    """A device of the host that the guest has. `address`: of the function; of a mediated device: what it is made of."""

    provider: str
    address: str
    resource_class: str
    kind: str = "pci"
    mdev_type: str = ""
    cell: int | None = None


class Seat(msgspec.Struct, frozen=True):
    """`emulator`: the host CPUs that its emulator runs on (`isolated`: its own); empty: where the guest's are."""

    cells: list[SeatCell] = []
    emulator: list[int] = []
    isolated: bool = False
    devices: list[Taken] = []
    realtime: list[int] = []  # of the guest's CPUs
    locked: bool = False  # its memory is never written out

    @property
    def cpus(self) -> set[int]:
        """Host CPUs that are this guest's alone."""
        own = {cpu for c in self.cells for cpu in c.pins.values()}
        return own | set(self.emulator) if self.isolated else own


class Room(msgspec.Struct):
    """What is left of one cell of a host. `cores`: of each core the CPUs that nobody has; `size` is that of a whole one."""

    number: int
    cores: list[list[int]]
    size: int
    floats: list[int]
    memory_mb: int
    pages: dict[int, int]

    @property
    def free(self) -> int:
        return sum(map(len, self.cores))

    @property
    def whole(self) -> int:
        """Those on cores that nobody has any of."""
        return sum(len(c) for c in self.cores if len(c) == self.size)


def cpus_of(cells: Sequence[Cell]) -> list[list[int]]:
    """The numbers of each cell's CPUs; a host that does not tell them has them one after the other."""
    found, at = [], 0
    for c in cells:
        found.append(c.ids or list(range(at, at + c.cpus)))
        at += c.cpus
    return found


def rooms(facts: HostFacts, others: Iterable[Seat]) -> list[Room]:
    """What others have left of each cell."""
    all = list(others)
    taken = {cpu for s in all for cpu in s.cpus}
    dedicated, shared = set(facts.dedicated), set(facts.shared)
    found = []
    for i, (cell, ids) in enumerate(zip(facts.cells, cpus_of(facts.cells), strict=True)):
        siblings = cell.siblings or [[cpu] for cpu in ids]
        cores = [[cpu for cpu in core if cpu in dedicated and cpu not in taken] for core in siblings]
        floats = [cpu for cpu in ids if (cpu in shared if shared else cpu not in dedicated)]
        pages = dict(cell.pages)
        for s in all:
            for c in s.cells:
                if c.host == i and c.page_kb in pages:
                    pages[c.page_kb] -= c.memory_mb * 1024 // c.page_kb
        size = max(map(len, siblings), default=1)
        found.append(Room(i, [c for c in cores if c], size, floats, cell.memory_mb, pages))
    return found


def page_for(room: Room, cell: GuestCell, page_kb: int) -> int | None:
    """The size of page that its memory can lie on here; None: of no size."""
    if page_kb in (0, SMALL_KB):
        return page_kb if cell.memory_mb <= room.memory_mb else None
    sizes = sorted(room.pages, reverse=True) if page_kb in (LARGE, ANY) else [page_kb]
    for kb in sizes:
        if kb > SMALL_KB and not cell.memory_mb * 1024 % kb and room.pages.get(kb, 0) * kb >= cell.memory_mb * 1024:
            return kb
    return SMALL_KB if page_kb == ANY and cell.memory_mb <= room.memory_mb else None


def own_cpus(room: Room, n: int, threads: str) -> list[int] | None:
    """So many host CPUs that nobody has, on as few cores as can be; None: there are not.

    `require`: of cores that nobody has any of. `isolate`: each of another core, of a host whose cores have one thread.
    """
    cores = sorted(room.cores, key=lambda c: (-len(c), c))
    if threads == "isolate":
        return [c[0] for c in cores[:n]] if len(cores) >= n and room.size == 1 else None
    if threads == "require":
        cores = [c for c in cores if len(c) == room.size > 1]
    found = [cpu for core in cores for cpu in core]
    return found[:n] if len(found) >= n else None


def seats(guest: Guest, facts: HostFacts, others: Iterable[Seat]) -> Iterator[Seat]:
    """Each way to lay its cells on cells of the host, one on one; the fullest first, so that large guests find room."""
    there = sorted(rooms(facts, others), key=lambda r: (r.free, r.number))
    if len(guest.cells) > len(there):
        return
    for tried, chosen in enumerate(permutations(there, len(guest.cells))):
        if tried >= MOST_TRIED:
            return
        if (found := _laid(guest, chosen, facts)) is not None:
            yield found


def _laid(guest: Guest, chosen: Sequence[Room], facts: HostFacts) -> Seat | None:
    cells, emulator = list[SeatCell](), list[int]()
    for i, (cell, room) in enumerate(zip(guest.cells, chosen, strict=True)):
        spare = 1 if not i and guest.emulator == "isolate" else 0
        own = own_cpus(room, len(cell.pinned) + spare, guest.threads) if cell.pinned or spare else []
        page_kb = page_for(room, cell, guest.page_kb)
        floating = len(cell.cpus) - len(cell.pinned)
        if own is None or page_kb is None or floating > len(room.floats):
            return None
        if spare:
            emulator.append(own.pop())
        pins = dict(zip(cell.pinned, own, strict=True))
        floats = room.floats if floating else []
        cells.append(SeatCell(room.number, cell.cpus, cell.memory_mb, page_kb, pins, floats))
    if guest.emulator == "share":
        emulator = sorted(facts.shared)
    return Seat(cells, emulator, guest.emulator == "isolate", realtime=guest.realtime, locked=guest.locked)


def functions(provider: str, device: HostDevice, n: int, others: Iterable[Seat]) -> list[Taken] | None:
    """So many of what this device gives out, that nobody has; None: there are not."""

    def taken(address: str) -> Taken:
        return Taken(provider, address, device.resource_class, device.kind, device.mdev_type, device.cell)

    if device.kind == "mdev":
        return [taken(device.address)] * n
    theirs = {t.address for s in others for t in s.devices if t.provider == provider}
    free = [a for a in device.functions or [device.address] if a not in theirs]
    return [taken(a) for a in free[:n]] if len(free) >= n else None


def near(mine: Collection[int], devices: Iterable[int | None], policy: str, cells: Sequence[Cell]) -> bool:
    """Do devices on these of the host's cells lie near a guest that sits on `mine`, as far as the policy wants it?

    `required`: on its cells; `socket`: on a socket of theirs; `legacy`: on its cells, or nobody knows where; `preferred`:
    anywhere.  A guest that sits nowhere is near to all.
    """
    if not mine or policy == "preferred":
        return True
    if policy == "socket":
        sockets = {_socket(cells, i) for i in mine}
        return all(d is not None and _socket(cells, d) in sockets for d in devices)
    return all(d in mine or (d is None and policy == "legacy") for d in devices)


def _socket(cells: Sequence[Cell], i: int) -> tuple[str, int]:
    """A host that does not tell of sockets has one for each cell."""
    socket = cells[i].socket if i < len(cells) else None
    return ("cell", i) if socket is None else ("socket", socket)
