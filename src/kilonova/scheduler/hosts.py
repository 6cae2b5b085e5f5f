"""All hosts as columns: row i of each array is host i, a rule is one expression over them.

The columns are a copy, and may be old: the claim in SQL decides.  They are kept fresh by what the store says has
changed (`providers.changed_at`, the mark of `store/hosts.py`), so a look costs what changed and not what there is.
What was chosen and is not claimed yet is subtracted here, so that a burst does not fall on one host.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from kilonova.kit.db import Tx
from kilonova.kit.ready import ready
from kilonova.model.ask import Ask
from kilonova.model.candidates import SHARES, Forest, Inventory, Provider
from kilonova.model.host import HostFacts, Place
from kilonova.scheduler.cells import Cells
from kilonova.store import hosts as book
from kilonova.store import placement, servers

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

FRESH_S = 0.25  # so old may be what we know of claims
SEEN_S = 3.0  # … of who is alive
WHOLE_S = 60.0  # everything is read again: clocks of those who write may differ by more than OVERLAP_S
OVERLAP_S = 2.0  # a transaction's time, and what clocks of those who write differ by
IN_ONE = 500  # providers in one question
FEW = 60  # changes that are read anew rather than asked about first
PENDING_S = 10.0  # a choice that was not claimed by then never will be


class Hosts:
    """The columns. `n` rows; resource classes are columns of the two-dimensional arrays, in the order of `classes`."""

    def __init__(self, default_zone: str = "nova", failures_max: int = 10, more: Collection[str] = ()) -> None:
        """`more`: columns that cost something, and are only kept where a rule or taste needs them (`MORE`)."""
        self.default_zone, self.failures_max, self.more = default_zone, failures_max, frozenset(more)
        self.mark, self.looked, self.watched, self.read_at, self.cursor = -1, -1e18, -1e18, -1e18, 0.0
        self.lately = 0  # how much had changed when we last looked
        self.kinds: list[HostFacts] = []
        self.kind_of: dict[str, int] = {}
        self._shape([], [])

    def _shape(self, places: list[Place], classes: list[str]) -> None:
        n = len(places)
        self.places, self.n = places, n
        self.row = {p.provider: i for i, p in enumerate(places)}
        self.classes = {c: i for i, c in enumerate(classes)}
        shape = n, len(classes)  # a class lies in one piece: that is how it is read
        self.capacity: Floats = np.zeros(shape, order="F")
        self.used: Floats = np.zeros(shape, order="F")
        self.pending: Floats = np.zeros(shape, order="F")
        self.free: Floats = np.zeros(shape, order="F")  # capacity - used - pending
        self.min_unit: Ints = np.ones(shape, np.int64, order="F")
        self.max_unit: Ints = np.zeros(shape, np.int64, order="F")
        self.step: Ints = np.ones(shape, np.int64, order="F")
        self.odd: set[int] = set()  # classes that somebody does not give out one by one
        self.generation: Ints = np.full(n, -1, np.int64)
        self.disabled: Bools = np.zeros(n, bool)
        self.forced_down: Bools = np.zeros(n, bool)
        self.seen: Floats = np.full(n, -1e18)
        self.failures: Ints = np.zeros(n, np.int64)  # 0 as long as there are not too many
        self.busy: Ints = np.zeros(n, np.int64)  # chosen, and not claimed yet as far as we know
        self.servers: Ints = np.zeros(n, np.int64)  # `loads`: how many there are,
        self.ops: Ints = np.zeros(n, np.int64)  # … and at how many of them it is at work
        self.pictures: list[Counter[tuple[str, str]]] = []  # `pictures`: properties of the images of its servers
        self.metrics: list[dict[str, float]] = []  # `metrics`
        self.ips: list[str] = [""] * n
        self.version: Floats = np.zeros(n)
        self.zone: Ints = np.zeros(n, np.int64)
        self.zones: dict[str, int] = {}
        self.kind: Ints = np.zeros(n, np.int64)  # rows of one kind have the same facts
        self.group: Ints = np.zeros(n, np.int64)  # rows of one group are in the same aggregates
        self.groups: list[dict[str, set[str]]] = [{}]
        self.keys: frozenset[str] = frozenset()  # all that is said of any group
        self.members: list[frozenset[str]] = [frozenset()]  # of each group, by the uuids of the aggregates
        self.traits: npt.NDArray[np.uint64] = np.zeros((n, 1), np.uint64)
        self.trait_of: dict[str, int] = {}
        self.waits: dict[int, deque[tuple[float, Floats, list[Charge]]]] = {}
        self.children: dict[int, dict[str, Child]] = {}  # providers under a row's own
        self.marks: dict[str, set[str]] = {}  # their traits
        self.names: dict[str, str] = {}
        self.below: dict[int, Floats] = {}  # of classes that some of them have: what is left there, together
        self.pools: dict[str, Pool] = {}  # providers that share with rows
        self.sharers: dict[int, list[Pool]] = {}  # … by row
        self.pool_of: Ints = np.zeros((n, 0), np.int64)  # … by number; one beyond the last: nobody
        self.answers: dict[tuple[str, int, tuple[str, ...]], Bools] = {}  # of `fit_beside`, until a pool moves
        self.beside: dict[int, Floats] = {}  # of their classes: what is left of them for each row, together
        self.around: dict[str, Bools] = {}  # rows with a trait under or beside them
        self.cells = Cells(self)

    # -- as rules see them

    def column(self, name: str) -> int | None:
        """Of a resource class; None: nobody has any of it."""
        return self.classes.get(name)

    def free_of(self, name: str) -> Floats:
        i = self.classes.get(name)
        if i is None:
            return np.zeros(self.n)
        return np.asarray(self.free[:, i] + self.below.get(i, 0.0) + self.beside.get(i, 0.0))

    def fit_alone(self, i: int, n: int) -> Bools:
        """Rows whose own provider has so much left of this class."""
        fits = self.free[:, i] >= n
        fits &= self.max_unit[:, i] >= n
        if i in self.odd:
            fits &= (n >= self.min_unit[:, i]) & (n % self.step[:, i] == 0)
        return np.asarray(fits)

    def fit_beside(self, name: str, n: int, forbidden: Collection[str] = ()) -> Bools:
        """Rows with whom somebody shares so much of it, who has none of these traits."""
        asked = name, n, tuple(forbidden)
        if (found := self.answers.get(asked)) is None:
            fits = [b.fits(name, n) and self.marks[b.uuid].isdisjoint(forbidden) for b in self.pools.values()]
            each, found = np.asarray([*fits, False]), np.zeros(self.n, bool)
            for column in self.pool_of.T:
                found |= each[column]
            self.answers[asked] = found
        return found

    def nested(self, ask: Ask) -> bool:
        """Is it a question which providers serve this?"""
        return bool(ask.parts) or self.pooled(ask) or any(self.classes.get(name) in self.below for name in ask.amounts)

    def pooled(self, ask: Ask) -> bool:
        """Does anybody share something with hosts that is asked for?"""
        return bool(self.beside) and any(self.classes.get(name) in self.beside for name in ask.amounts)

    def shared(self, row: int, ask: Ask) -> bool:
        """… with this one?"""
        mine = self.sharers.get(row, ())
        return any(name in pool.inventories for pool in mine for name in ask.amounts)

    def tree(self, row: int, traits: Collection[str]) -> Forest:
        """A host's own provider with those under it and those that share with it, as far as these traits go."""
        p = self.places[row]
        own = {
            name: Inventory(
                float(self.capacity[row, c]), 0, self.min_unit[row, c], self.max_unit[row, c], self.step[row, c], 1.0,
                float(self.used[row, c] + self.pending[row, c]),
            )
            for name, c in self.classes.items() if self.max_unit[row, c]
        }  # fmt: skip
        bits = {t: self.trait_of[t] for t in traits if t in self.trait_of}
        mine = frozenset(t for t, bit in bits.items() if int(self.traits[row, bit // 64]) >> bit % 64 & 1)
        root = Provider(p.provider, p.node, None, p.provider, 0, 0.0, 0.0, own, mine, TOGETHER)
        under = {c.uuid: c.provider(p.provider, self.marks) for c in self._under(row)}
        beside = {b.uuid: b.provider(self.marks) for b in self.sharers.get(row, ()) if b.uuid not in under}
        return Forest({p.provider: root} | under | beside)

    def cell_of(self, row: int) -> Callable[[str], int | None]:
        """On which cell a device of this host is, by its provider; None: nobody knows."""
        at = {d.address: d.cell for d in self.kinds[self.kind[row]].devices}
        return lambda provider: at.get(self.names.get(provider, "").rpartition("_")[2])

    def is_device(self, provider: str) -> bool:
        return provider in self.names and provider not in self.row and provider not in self.pools

    def _under(self, row: int) -> Iterable["Child"]:
        return self.children.get(row, {}).values()

    def having(self, traits: Iterable[str]) -> Bools:
        """Which rows have all of these traits."""
        fit = np.ones(self.n, bool)
        for t in traits:
            fit &= self.with_trait(t)
        return fit

    def with_trait(self, trait: str) -> Bools:
        bit = self.trait_of.get(trait)
        if bit is None:
            return np.zeros(self.n, bool)
        return np.asarray((self.traits[:, bit // 64] >> np.uint64(bit % 64)) & np.uint64(1)).astype(bool)

    def somewhere(self, traits: Iterable[str]) -> Bools:
        """Rows with all of these traits, be it under or beside them."""
        fit = np.ones(self.n, bool)
        for t in traits:
            fit &= self.with_trait(t) | self.around.get(t, False)
        return fit

    # -- what was chosen

    def take(self, row: int, amounts: Floats, now: float) -> None:
        """It was given to somebody who will claim it."""
        charged = self._charged(row, amounts) if self.beside else []
        if charged:
            amounts = amounts.copy()
            amounts[[self.classes[name] for _, name, _ in charged]] = 0
        self._waits(row, amounts, charged, 1)
        self.waits.setdefault(row, deque()).append((now, amounts, charged))

    def _charged(self, row: int, amounts: Floats) -> "list[Charge]":
        """What will be claimed of somebody who shares with the row, for the row has not enough of it."""
        found: list[Charge] = []
        for name, i in self.classes.items():
            n = int(amounts[i])
            if not n or i not in self.beside or (self.free[row, i] >= n and self.max_unit[row, i] >= n):
                continue
            pool = next((b for b in self.sharers.get(row, ()) if b.fits(name, n)), None)
            if pool is not None:
                found.append((pool, name, n))
        return found

    def _claimed(self, row: int, times: int) -> None:
        """So many changes came in for this host: as many of what was chosen are among them."""
        waits = self.waits.get(row)
        while waits and times > 0:
            self._waits(row, *waits.popleft()[1:], -1)
            times -= 1

    def _waits(self, row: int, amounts: Floats, charged: "list[Charge]", times: int) -> None:
        self.pending[row] += times * amounts
        self.free[row] -= times * amounts
        self.busy[row] += times
        for pool, name, n in charged:
            pool.pending[name] = pool.pending.get(name, 0) + times * n
            self._summed_beside(self.classes[name], name)

    def _forgotten(self, now: float) -> None:
        for row, waits in list(self.waits.items()):
            while waits and waits[0][0] < now - PENDING_S:
                self._waits(row, *waits.popleft()[1:], -1)
            if not waits:
                del self.waits[row]

    # -- keeping fresh

    def refresh(self, tx: Tx, now: float, *, at_once: bool = False, seats: bool = False) -> None:
        """Read what may have changed since we last looked; claims a quarter of a second late, or `at_once`.

        `seats`: somebody asks for host CPUs or memory of cells.
        """
        self._refreshed(tx, now, at_once or seats)
        if seats:
            self.cells.refresh(tx)

    def _refreshed(self, tx: Tx, now: float, at_once: bool) -> None:
        if (mark := book.marked(tx)) != self.mark or now - self.read_at > WHOLE_S:
            self.load(tx, now, mark)
            return
        if at_once or now - self.looked >= FRESH_S:
            self._forgotten(now)
            self._more(tx)
            self._moved(tx, now)
        if now - self.watched >= SEEN_S:
            self._alive(tx, now)

    def load(self, tx: Tx, now: float, mark: int | None = None) -> None:
        """Read everything."""
        self.mark = book.marked(tx) if mark is None else mark
        rows = tx.execute(ROWS).all()
        stocks = list(placement.changes(tx))
        zones = book.zones(tx)
        places = [Place(r.host, r.node, r.uuid, zones.get(r.host, self.default_zone), r.failures) for r in rows]
        self._shape(places, sorted({s.resource_class for s in stocks if s.resource_class is not None}))
        for i, r in enumerate(rows):
            self.disabled[i], self.forced_down[i] = r.disabled, r.forced_down
            self.failures[i] = r.failures if r.failures >= self.failures_max > 0 else 0
            self.seen[i] = -1e18 if r.last_seen is None else r.last_seen
            self.kind[i] = self._kind(r.facts)
            self.ips[i] = r.host_ip
            self.version[i] = self.kinds[self.kind[i]].hypervisor_version
            self.zone[i] = self.zones.setdefault(places[i].zone, len(self.zones))
        if "metrics" in self.more:
            self.metrics = [msgspec.json.decode(r.facts, type=HostFacts).metrics for r in rows]
        self._more(tx)
        self._grouped(tx)
        self.marks = placement.traits(tx)
        self.names = placement.names_below(tx)
        self._traits(self.marks)
        self.pools = {uuid: Pool(uuid) for uuid, traits in self.marks.items() if SHARES in traits}
        self._stocked(stocks, now)
        self._shared(tx)
        self.watched = self.read_at = now

    def _kind(self, text: str) -> int:
        """Facts but for names and for what moves: thousands of hosts are of few kinds, and a slow rule asks each once."""
        if text not in self.kind_of:
            facts = msgspec.json.decode(text, type=HostFacts)
            facts = msgspec.structs.replace(facts, disk_free_gb=0, hypervisor_hostname="", uptime="", metrics={})
            if facts in self.kinds:
                self.kind_of[text] = self.kinds.index(facts)
            else:
                self.kind_of[text] = len(self.kinds)
                self.kinds.append(facts)
        return self.kind_of[text]

    def _grouped(self, tx: Tx) -> None:
        """What the aggregates of each host say, all together: key → values."""
        of: dict[str, list[int]] = {}
        said = {a.id: a for a in book.aggregates(tx)}
        for a in said.values():
            for host in a.hosts:
                of.setdefault(host, []).append(a.id)
        known: dict[tuple[int, ...], int] = {(): 0}
        for i, p in enumerate(self.places):
            ids = tuple(of.get(p.host, ()))
            if ids not in known:
                known[ids] = len(self.groups)
                merged: dict[str, set[str]] = {}
                for id in ids:
                    for k, v in said[id].metadata.items():
                        merged.setdefault(k, set()).update(part.strip() for part in v.split(","))
                self.groups.append(merged)
                self.members.append(frozenset(said[id].uuid for id in ids))
            self.group[i] = known[ids]
        self.keys = frozenset(key for group in self.groups for key in group)

    def _traits(self, of: dict[str, set[str]]) -> None:
        self.trait_of = {t: bit for bit, t in enumerate(sorted({t for traits in of.values() for t in traits}))}
        self.traits = np.zeros((self.n, len(self.trait_of) // 64 + 1), np.uint64)
        for provider, traits in of.items():
            if (i := self.row.get(provider)) is not None:
                for t in traits:
                    bit = self.trait_of[t]
                    self.traits[i, bit // 64] |= np.uint64(1 << (bit % 64))

    def _moved(self, tx: Tx, now: float) -> None:
        """What changed lately, in one question; where that was much, first who has another generation than we know."""
        since = max(self.cursor, self.looked) - OVERLAP_S
        if self.lately <= FEW:
            self._again(list(placement.changes(tx, since=since)), now)
            return
        moved, self.lately = [], 0
        for provider, generation, changed_at in placement.moved(tx, since):
            self.lately += 1
            if generation != self._known(provider):
                moved.append(provider)
            self.cursor = max(self.cursor, changed_at)
        for at in range(0, len(moved), IN_ONE):
            self._again(list(placement.changes(tx, moved[at : at + IN_ONE])), now, count=False)
        self.looked = now

    def _known(self, provider: str) -> int | None:
        """The generation that we know of it; of those under a host we keep no list, and they are read again."""
        if (i := self.row.get(provider)) is not None:
            return int(self.generation[i])
        pool = self.pools.get(provider)
        return None if pool is None else pool.generation

    def _again(self, stocks: list[Any], now: float, *, count: bool = True) -> None:
        """What is not said of a provider that moved is there no more."""
        if count:
            self.lately = len(stocks)
        moved = {i for s in stocks if (i := self.row.get(s[0])) is not None and s[1] != self.generation[i]}
        for s in stocks:
            if s[0] not in self.row and (row := self.row.get(s[11])) is not None:
                child = self.children.get(row, {}).get(s[0])
                if child is not None and child.generation != s[1]:
                    child.inventories.clear()
            if (pool := self.pools.get(s[0])) is not None and pool.generation != s[1]:
                pool.inventories.clear()
        lost = sorted(moved)
        self.capacity[lost] = self.used[lost] = self.max_unit[lost] = 0
        self.free[lost] = -self.pending[lost]
        self._stocked(stocks, now)

    def _stocked(self, stocks: Iterable[Any], now: float) -> None:
        under, of_pools = set[int](), bool(self.pools)
        sharing = False  # has one of those moved?
        for (
            provider, generation, changed_at, name, total, reserved, ratio, used, least, most, step, root, parent,
        ) in stocks:  # fmt: skip
            i, c = self.row.get(provider), self.classes.get(name)
            if of_pools and (pool := self.pools.get(provider)) is not None:
                self.cursor, pool.generation = max(self.cursor, changed_at), generation
                if name is not None:
                    pool.inventories[name] = Inventory(total, reserved, least, most, step, ratio, used)
                    self.mark = self.mark if c is not None else -1
                sharing = True
            if i is None:
                if (row := self.row.get(root)) is not None:
                    self.cursor = max(self.cursor, changed_at)
                    child = self.children.setdefault(row, {}).setdefault(provider, Child(provider, parent))
                    child.parent, child.generation = parent, generation
                    if name is not None:
                        child.inventories[name] = Inventory(total, reserved, least, most, step, ratio, used)
                        self.mark = self.mark if c is not None else -1
                    under.add(row)
                continue  # no host's own
            if generation != self.generation[i]:
                if self.generation[i] >= 0:
                    self._claimed(i, generation - int(self.generation[i]))
                self.generation[i] = generation
            self.cursor = max(self.cursor, changed_at)
            if c is None:
                if name is not None:
                    self.mark = -1  # something new: read it all the next time
                continue
            self.capacity[i, c], self.used[i, c] = (total - reserved) * ratio, used
            self.free[i, c] = self.capacity[i, c] - used - self.pending[i, c]
            self.min_unit[i, c], self.max_unit[i, c], self.step[i, c] = least, most, step
            if least > 1 or step > 1:
                self.odd.add(c)
        for row in under:
            self._summed(row)
        if sharing:
            for name, c in self.classes.items():
                self._summed_beside(c, name)
        self.looked = now

    def _shared(self, tx: Tx) -> None:
        """With whom those who share do so, and what is where around a host."""
        self.sharers = {}
        members: dict[str, set[int]] = {}
        if self.pools:
            of = self.row | {uuid: row for row, some in self.children.items() for uuid in some}
            for pool, provider in placement.shared(tx):
                row = of.get(provider)
                if row is not None and of.get(pool) != row:  # within its tree it is one of the tree
                    members.setdefault(pool, set()).add(row)
            self.pools = {uuid: self.pools[uuid] for uuid in sorted(members)}
            for uuid, rows in sorted(members.items()):
                for row in rows:
                    self.sharers.setdefault(row, []).append(self.pools[uuid])
        self.around, nobody = {}, len(self.pools)
        there = {uuid: sorted(rows) for uuid, rows in members.items()}
        self.pool_of = np.full((self.n, max(map(len, self.sharers.values()), default=0)), nobody, np.int64, order="F")
        number = {uuid: i for i, uuid in enumerate(self.pools)}
        for row, mine in self.sharers.items():
            self.pool_of[row, : len(mine)] = [number[b.uuid] for b in mine]
        there |= {uuid: [*there.get(uuid, ()), row] for row, some in self.children.items() for uuid in some}
        for uuid, rows_ in there.items():
            for t in self.marks.get(uuid, ()):
                self.around.setdefault(t, np.zeros(self.n, bool))[rows_] = True
        for name, i in self.classes.items():
            self._summed_beside(i, name)

    def _summed_beside(self, i: int, name: str) -> None:
        """What is left of a class with those who share it."""
        self.answers.clear()
        if any(name in b.inventories for b in self.pools.values()):
            each, left = np.asarray([*(b.left(name) for b in self.pools.values()), 0.0]), np.zeros(self.n)
            for column in self.pool_of.T:
                left += each[column]
            self.beside[i] = left
        else:
            self.beside.pop(i, None)

    def _summed(self, row: int) -> None:
        """What is left under this row."""
        for left in self.below.values():
            left[row] = 0
        for child in self._under(row):
            for name, i in child.inventories.items():
                if (c := self.classes.get(name)) is not None:
                    left = self.below.setdefault(c, np.zeros(self.n))
                    left[row] += max(0.0, (i.total - i.reserved) * i.allocation_ratio - i.used)

    def _more(self, tx: Tx) -> None:
        if "loads" in self.more:
            loads = servers.loads(tx)
            for i, p in enumerate(self.places):
                self.servers[i], self.ops[i] = loads.get(p.host, (0, 0))
        if "pictures" in self.more:
            of: dict[str, Counter[tuple[str, str]]] = {}
            for host, properties in servers.image_properties(tx):
                of.setdefault(host, Counter()).update(properties.items())
            self.pictures = [of.get(p.host, Counter()) for p in self.places]

    def _alive(self, tx: Tx, now: float) -> None:
        seen = {host: at for host, at in tx.execute(ALIVE) if at is not None}
        self.seen = np.fromiter((seen.get(p.host, -1e18) for p in self.places), float, self.n)
        self.watched = now


class Child:
    """A provider under a host's own, as it was read last."""

    __slots__ = ("generation", "inventories", "parent", "uuid")

    def __init__(self, uuid: str, parent: str | None) -> None:
        self.uuid, self.parent, self.generation = uuid, parent, -1
        self.inventories: dict[str, Inventory] = {}

    def provider(self, root: str, marks: Mapping[str, set[str]]) -> Provider:
        traits = frozenset(marks.get(self.uuid, ()))
        return Provider(self.uuid, "", self.parent, root, 0, 0.0, 0.0, self.inventories, traits)


class Pool:
    """A provider that shares with hosts, as it was read last. `pending`: what was chosen of it and is not claimed yet."""

    __slots__ = ("generation", "inventories", "pending", "uuid")

    def __init__(self, uuid: str) -> None:
        self.uuid, self.generation = uuid, -1
        self.inventories: dict[str, Inventory] = {}
        self.pending: dict[str, int] = {}

    def fits(self, name: str, n: int) -> bool:
        """As `Inventory.fits`, with what is pending."""
        i = self.inventories.get(name)
        return i is not None and self.left(name) >= n and i.min_unit <= n <= i.max_unit and n % i.step_size == 0

    def left(self, name: str) -> float:
        if (i := self.inventories.get(name)) is None:
            return 0.0
        return max(0.0, (i.total - i.reserved) * i.allocation_ratio - i.used - self.pending.get(name, 0))

    def provider(self, marks: Mapping[str, set[str]]) -> Provider:
        have = {c: i._replace(used=i.used + self.pending.get(c, 0)) for c, i in self.inventories.items()}
        return Provider(self.uuid, "", None, self.uuid, 0, 0.0, 0.0, have, frozenset(marks[self.uuid]), TOGETHER)


Charge = tuple[Pool, str, int]
"""So much of a class, of one that shares it."""

TOGETHER = frozenset({"together"})  # a host and those that share with it, where the aggregates are of no matter


_n, _s = book.NODES.c, book.SERVICES.c
# Deleted hosts have no rows.
ROWS = (
    sa.select(
        _n.uuid,
        _n.host,
        _n.node,
        _n.host_ip,
        _n.facts,
        _s.disabled,
        _s.forced_down,
        _s.last_seen,
        _s.failures,
        _s.updated_at,
    )
    .join(book.SERVICES, sa.and_(_s.host == _n.host, _s.binary == book.COMPUTE))
    .order_by(_n.id)
)
ALIVE = ready(sa.select(_s.host, _s.last_seen).where(_s.binary == book.COMPUTE))
