"""Who could serve a request together: Placement's allocation candidates, found in trees of providers.

Pure: a `Forest` is what is known at one moment, a `Query` what is asked of it.  For each tree the providers that could
serve each part of the query are listed (those of the tree, and those that share with it through an aggregate), and
the combinations walked depth first; a branch ends as soon as it asks more of a provider than it has.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SHARES = "MISC_SHARES_VIA_AGGREGATE"
MOST_STEPS = 2_000_000  # combinations looked at for one query; what was found until then is the answer


class Inventory(NamedTuple):
    """One resource class of one provider, and how much of it is held."""

    total: float
    reserved: int
    min_unit: int
    max_unit: int
    step_size: int
    allocation_ratio: float
    used: float

    @property
    def capacity(self) -> int:
        return int((self.total - self.reserved) * self.allocation_ratio)

    def fits(self, n: int) -> bool:
        return (
            self.used + n <= (self.total - self.reserved) * self.allocation_ratio
            and self.min_unit <= n <= self.max_unit
            and n % self.step_size == 0
        )

    def bears(self, n: int) -> bool:
        """Is there so much of it, in several portions that fit each?"""
        return self.used + n <= (self.total - self.reserved) * self.allocation_ratio and n <= self.max_unit


@dataclass(frozen=True, slots=True, eq=False)
class Provider:
    """`root` is its own uuid where it is nobody's child. Moments are seconds since 1970."""

    uuid: str
    name: str
    parent: str | None
    root: str
    generation: int
    created_at: float
    changed_at: float
    inventories: Mapping[str, Inventory] = field(default_factory=dict)
    traits: frozenset[str] = frozenset()
    aggregates: frozenset[str] = frozenset()


class Forest:
    """All providers at one moment, by tree. Nothing in it changes; `with_` is another one."""

    def __init__(self, providers: Mapping[str, Provider]) -> None:
        self.providers = dict(providers)
        self.trees: dict[str, list[Provider]] = {}
        self.sharing: dict[str, list[Provider]] = {}  # by aggregate
        self.row: dict[str, int] = {}  # of a tree in the columns
        self.columns: dict[str, Columns] = {}  # of classes that were asked for, where `flat`
        self.rows: npt.NDArray[np.object_] = np.zeros(0, object)  # the providers in that order
        for p in providers.values():
            self.trees.setdefault(p.root, []).append(p)
            self._sharing(p)

    def _sharing(self, p: Provider) -> None:
        if SHARES in p.traits:
            for aggregate in p.aggregates:
                self.sharing.setdefault(aggregate, []).append(p)

    @property
    def flat(self) -> bool:
        """Is each provider a tree of its own, that gets nothing of others?"""
        return len(self.trees) == len(self.providers) and not self.sharing

    def with_(self, moved: Iterable[Provider]) -> "Forest":
        """The same, but for these: costs what they are, and not what there is."""
        moved = list(moved)
        if any(self._grows(p) for p in moved):
            return Forest(self.providers | {p.uuid: p for p in moved})
        new = Forest({})
        new.providers, new.trees, new.sharing, new.row = dict(self.providers), dict(self.trees), self.sharing, self.row
        for p in moved:
            new.providers[p.uuid] = p
            new.trees[p.root] = [p if q.uuid == p.uuid else q for q in new.trees[p.root]]
        if new.row:
            rows = [(new.row[p.uuid], p) for p in moved]
            new.columns = {name: c.with_(name, rows) for name, c in self.columns.items()}
            new.rows = self.rows.copy()
            for row, p in rows:
                new.rows[row] = p
        return new

    def _grows(self, p: Provider) -> bool:
        """Is more of another shape with it than the tree that it is in?"""
        old = self.providers.get(p.uuid)
        return old is None or old.root != p.root or SHARES in p.traits or SHARES in old.traits

    def having(self, wants: Mapping[str, int], most: int | None = None) -> list[Provider]:
        """Those that have so much of each left, where `flat`; at most so many."""
        if not self.row:
            heads = [tree[0] for tree in self.trees.values()]
            self.rows = np.empty(len(heads), object)
            self.rows[:] = heads
            self.row = {root: i for i, root in enumerate(self.trees)}  # last: others look whether it is there
        fit = np.ones(len(self.rows), bool)
        for name, n in wants.items():
            if (c := self.columns.get(name)) is None:
                c = self.columns[name] = Columns.of(name, self.rows.tolist())
            fit &= c.fits(n)
        found: list[Provider] = self.rows[np.flatnonzero(fit)[:most]].tolist()
        return found

    def near(self, root: str) -> list[Provider]:
        """A tree's providers, and those of other trees that share with one of them."""
        tree = self.trees[root]
        if not self.sharing:
            return tree
        shared = {s for p in tree for a in p.aggregates for s in self.sharing.get(a, ()) if s.root != root}
        return [*tree, *sorted(shared, key=lambda s: s.uuid)] if shared else tree

    def ancestors(self, provider: str) -> Iterator[str]:
        """Itself, its parent, and so on to the root."""
        at: str | None = provider
        while at is not None:
            yield at
            found = self.providers.get(at)
            at = found.parent if found else None


class Columns(NamedTuple):
    """Inventories of one class, a row for each tree: `Inventory.fits` of all of them is one expression."""

    capacity: npt.NDArray[np.float64]
    used: npt.NDArray[np.float64]
    units: npt.NDArray[np.int64]  # least, most, step
    odd: bool  # does anybody not give it out one by one?

    @classmethod
    def of(cls, name: str, providers: Sequence[Provider]) -> "Columns":
        n = len(providers)
        made = cls(np.zeros(n), np.zeros(n), np.zeros((3, n), np.int64), False)
        return made._written(name, enumerate(providers))

    def with_(self, name: str, rows: Iterable[tuple[int, Provider]]) -> "Columns":
        made = Columns(self.capacity.copy(), self.used.copy(), self.units.copy(), self.odd)
        return made._written(name, rows)

    def _written(self, name: str, rows: Iterable[tuple[int, Provider]]) -> "Columns":
        odd = self.odd
        for row, p in rows:
            i = p.inventories.get(name, NOTHING)
            self.capacity[row], self.used[row] = (i.total - i.reserved) * i.allocation_ratio, i.used
            self.units[:, row] = i.min_unit, i.max_unit, i.step_size
            odd |= i.min_unit > 1 or i.step_size > 1
        return self._replace(odd=odd)

    def fits(self, n: int) -> npt.NDArray[np.bool_]:
        """`n` of one or more."""
        if n >= 2**53:  # of which no inventory has so many
            return np.zeros(len(self.used), bool)
        least, most, step = self.units
        fit = self.used + n <= self.capacity
        fit &= n <= most
        if self.odd:
            fit &= (least <= n) & (n % step == 0)
        return np.asarray(fit)


NOTHING = Inventory(0, 0, 1, 0, 1, 1.0, 0)


class Group(NamedTuple):
    """A part of a query. `required`: of each set, one trait; `member_of`: of each set, one aggregate."""

    resources: Mapping[str, int] = {}
    required: tuple[frozenset[str], ...] = ()
    forbidden: frozenset[str] = frozenset()
    member_of: tuple[frozenset[str], ...] = ()
    not_member_of: frozenset[str] = frozenset()
    in_tree: str | None = None


class Query(NamedTuple):
    """`groups` by suffix: the one without ("") may be served by several providers, each other by one alone.

    `isolate`: groups with a suffix are served by different providers.  `same_subtree`: of the providers of these groups
    one is above all others.  `nested` False: never two providers of one tree (before 1.29).
    """

    groups: Mapping[str, Group]
    isolate: bool = False
    same_subtree: tuple[frozenset[str], ...] = ()
    root_required: frozenset[str] = frozenset()
    root_forbidden: frozenset[str] = frozenset()
    nested: bool = True


class Candidate(NamedTuple):
    """What is taken of which provider, and who serves which group."""

    allocations: dict[str, dict[str, int]]
    mappings: dict[str, list[str]]


class Alone(NamedTuple):
    """A candidate as most are: one provider that gives all. Made by the thousand, so it is hardly anything."""

    provider: str
    resources: Mapping[str, int]

    @property
    def allocations(self) -> dict[str, dict[str, int]]:
        return {self.provider: dict(self.resources)}

    @property
    def mappings(self) -> dict[str, list[str]]:
        return {"": [self.provider]}


Found = Candidate | Alone


class _Slot(NamedTuple):
    """A part that one provider serves, and who could."""

    suffix: str
    wants: Mapping[str, int]
    options: list[Provider]


def candidates(forest: Forest, query: Query, *, breadth_first: bool = False) -> Iterator[Found]:
    """All of them, tree by tree, or (`breadth_first`) one of each tree, then a second of each …"""
    if (some := alone(forest, query)) is not None:
        yield from (Alone(p.uuid, query.groups[""].resources) for p in some)
        return
    seen: set[object] | None = set() if forest.sharing else None
    steps = iter(range(MOST_STEPS))
    in_turn = [_of_tree(forest, query, root, seen, steps) for root in _roots(forest, query)]
    if not breadth_first:
        for tree in in_turn:
            yield from tree
        return
    while in_turn:
        found = [(tree, c) for tree in in_turn for c in islice(tree, 1)]
        yield from (c for _, c in found)
        in_turn = [tree for tree, _ in found]


def within(forest: Forest, query: Query, root: str) -> Iterator[Found]:
    """Those of one tree, and of who shares with it."""
    seen: set[object] | None = set() if forest.sharing else None
    return _of_tree(forest, query, root, seen, iter(range(MOST_STEPS)))


def serves(p: Provider, group: Group) -> bool:
    """Could this provider alone serve the whole group (but for its `in_tree`)?"""
    return (
        p.traits.isdisjoint(group.forbidden)
        and all(not p.traits.isdisjoint(any_of) for any_of in group.required)
        and p.aggregates.isdisjoint(group.not_member_of)
        and all(not p.aggregates.isdisjoint(any_of) for any_of in group.member_of)
        and _fits(p, group.resources)
    )


def _fits(p: Provider, wants: Mapping[str, int]) -> bool:
    for name, n in wants.items():
        inventory = p.inventories.get(name)
        if inventory is None or not inventory.fits(n):
            return False
    return True


def _roots(forest: Forest, query: Query) -> Iterable[str]:
    """The trees that may be looked at: all, or the one that was named."""
    for suffix, group in query.groups.items():
        if group.in_tree is not None:
            named = forest.providers.get(group.in_tree)
            if named is None:
                return []
            if not suffix:
                return [named.root] if _root_fits(forest, query, named.root) else []
    if not (query.root_required or query.root_forbidden):
        return forest.trees
    return [root for root in forest.trees if _root_fits(forest, query, root)]


def _root_fits(forest: Forest, query: Query, root: str) -> bool:
    traits = forest.providers[root].traits
    return query.root_required <= traits and traits.isdisjoint(query.root_forbidden)


def _of_tree(
    forest: Forest, query: Query, root: str, seen: set[object] | None, steps: Iterator[int]
) -> Iterator[Found]:
    if seen is None and len(query.groups) == 1 and "" in query.groups and len(tree := forest.trees[root]) == 1:
        group = query.groups[""]
        if next(steps, None) is not None and _fits(tree[0], group.resources) and _does_all(forest, tree[0], group):
            yield Alone(root, group.resources)
        return
    slots = _slots(forest, query, root)
    if slots is None:
        return
    for chosen in _walk(slots, query.isolate, steps):
        if not _right(forest, query, slots, chosen):
            continue
        found = _candidate(slots, chosen)
        if seen is not None:
            key = tuple(sorted((s.suffix, p.uuid, *s.wants) for s, p in zip(slots, chosen, strict=True)))
            if key in seen:
                continue
            seen.add(key)
        yield found


def alone(forest: Forest, query: Query, most: int | None = None) -> list[Provider] | None:
    """Who could serve it, at most so many, where nobody can but alone: all hosts are without parts, and asked for is one group.

    They are found in columns.  None: it is not so simple.
    """
    if not forest.flat or list(query.groups) != [""] or query.groups[""].in_tree is not None:
        return None
    group = query.groups[""]
    of_root = bool(query.root_required or query.root_forbidden)
    asks = group != Group(group.resources)
    if not (of_root or asks):
        return forest.having(group.resources, most)
    fit = (
        p
        for p in forest.having(group.resources)
        if (not of_root or _root_fits(forest, query, p.uuid)) and (not asks or _does_all(forest, p, group))
    )
    return list(islice(fit, most))


def _does_all(forest: Forest, p: Provider, group: Group) -> bool:
    """Of a host without parts, whom nobody shares anything with, and with room: it serves the group without a suffix, or nobody does."""
    return all(not p.traits.isdisjoint(any_of) for any_of in group.required) and _may_help(forest, p, group, p.root)


def _slots(forest: Forest, query: Query, root: str) -> list[_Slot] | None:
    """What is to be served, and who could; None: something, by nobody."""
    near, slots = forest.near(root), []
    for suffix, group in query.groups.items():
        if suffix:
            at = None if group.in_tree is None else forest.providers[group.in_tree].root
            options = [p for p in near if (at is None or p.root == at) and serves(p, group)]
            if not options:
                return None
            slots.append(_Slot(suffix, group.resources, options))
            continue
        mine = [p for p in near if _may_help(forest, p, group, root)]
        if group.required and not _covered(mine, group):
            return None
        for name, n in group.resources.items():
            wants = {name: n}
            options = [p for p in mine if _fits(p, wants)]
            if not options:
                return None
            slots.append(_Slot("", wants, options))
    return slots


def _may_help(forest: Forest, p: Provider, group: Group, root: str) -> bool:
    """To serve the group without a suffix, with others. What is a member at the root is one in the whole tree."""
    if group.in_tree is not None and p.root != root:
        return False
    if not p.traits.isdisjoint(group.forbidden):
        return False
    if not (group.member_of or group.not_member_of):
        return True
    its_root = forest.providers[p.root].aggregates
    if not (p.aggregates.isdisjoint(group.not_member_of) and its_root.isdisjoint(group.not_member_of)):
        return False
    own = all(not p.aggregates.isdisjoint(any_of) for any_of in group.member_of)
    return own or all(not its_root.isdisjoint(any_of) for any_of in group.member_of)


def _covered(providers: Iterable[Provider], group: Group) -> bool:
    traits = frozenset[str]().union(*(p.traits for p in providers))
    return all(not traits.isdisjoint(any_of) for any_of in group.required)


def _walk(slots: list[_Slot], isolate: bool, steps: Iterator[int]) -> Iterator[list[Provider]]:
    """Each way to choose a provider for every slot that does not ask too much of anybody."""
    chosen: list[Provider] = []
    at = [iter(slots[0].options)]
    while at:
        del chosen[len(at) - 1 :]
        provider = next(at[-1], None)
        if provider is None:
            at.pop()
            continue
        if next(steps, None) is None:
            return
        chosen.append(provider)
        if not _bears(slots, chosen, isolate):
            continue
        if len(chosen) == len(slots):
            yield list(chosen)
        else:
            at.append(iter(slots[len(chosen)].options))


def _bears(slots: list[_Slot], chosen: list[Provider], isolate: bool) -> bool:
    """Can the last of them bear what it serves already and this?"""
    p, mine = chosen[-1], slots[len(chosen) - 1]
    other = [slot for slot, q in zip(slots, chosen[:-1], strict=False) if q is p]
    if not other:
        return True
    if isolate and mine.suffix and any(slot.suffix for slot in other):
        return False
    return all(
        p.inventories[name].bears(n + sum(slot.wants.get(name, 0) for slot in other)) for name, n in mine.wants.items()
    )


def _right(forest: Forest, query: Query, slots: list[_Slot], chosen: list[Provider]) -> bool:
    """What can only be told of the whole."""
    free = query.groups.get("")
    if (
        free is not None
        and free.required
        and not _covered((p for s, p in zip(slots, chosen, strict=True) if not s.suffix), free)
    ):
        return False
    if not query.nested:
        used = {p.uuid: p.root for p in chosen}
        if len(set(used.values())) < len(used):
            return False
    for suffixes in query.same_subtree:
        providers = {p.uuid for s, p in zip(slots, chosen, strict=True) if s.suffix in suffixes}
        if len(providers) > 1:
            above: Callable[[str], set[str]] = lambda uuid: set(forest.ancestors(uuid))
            if not set.intersection(*map(above, providers)) & providers:
                return False
    return True


def _candidate(slots: list[_Slot], chosen: list[Provider]) -> Candidate:
    allocations: dict[str, dict[str, int]] = {}
    mappings: dict[str, list[str]] = {}
    for slot, p in zip(slots, chosen, strict=True):
        served = mappings.setdefault(slot.suffix, [])
        if p.uuid not in served:
            served.append(p.uuid)
        if not slot.wants:
            continue
        taken = allocations.setdefault(p.uuid, {})
        for name, n in slot.wants.items():
            taken[name] = taken.get(name, 0) + n
    return Candidate(allocations, mappings)
