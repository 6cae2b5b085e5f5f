"""A copy of all providers in memory, as one moment of the database has it.

A provider's generation and `changed_at` move with all that is shown of it.  So a look asks for their sums: where those
are the copy's, nothing moved.  Else it reads who changed since, and whole only those that moved; where the sums still are
not the copy's, who changed some seconds before, for clocks differ; and if that is not it (one is gone), the two numbers of
each.  What costs is what changed.  The copy that is handed out never changes.
"""

import math
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import sqlalchemy as sa

from kilonova.kit.db import Tx
from kilonova.kit.ready import among, ready
from kilonova.model.candidates import Forest, Inventory, Provider
from kilonova.store.placement import INVENTORIES, PROVIDER_AGGREGATES, PROVIDER_TRAITS, PROVIDERS

OVERLAP_S = 5.0  # so much the clocks of those who write may differ
NO_MOMENT_S = (
    0.01  # by so much sums of moments may differ that are the same: of thousands of numbers, added in any order
)
IN_ONE = 500  # providers named in one statement; of more, all are read


class Trees:
    """Any number of threads may look."""

    def __init__(self) -> None:
        self.lock, self.forest, self.sums = threading.Lock(), Forest({}), Sums()
        self.since: float | None = None  # moments are summed from then on: small sums tell small moments
        self.sets: dict[frozenset[str], frozenset[str]] = {}  # thousands of hosts have few kinds of traits

    def look(self, tx: Tx) -> Forest:
        """What there is, in this transaction's eyes."""
        with self.lock:
            forest, known = self.forest, self.sums
            if self.since is None:
                self.since = tx.execute(NEWEST).scalar()
            since = self.since
        # First: what moves between two of these statements is seen by the next look.
        sums = Sums(*tx.execute(SUMS, {"since": since}).one())
        if sums == known:
            return forest
        forest = (
            self._lately(tx, forest, known, sums, 0.0)
            or self._lately(tx, forest, known, sums, OVERLAP_S)
            or self._whole(tx, forest)
        )
        with self.lock:
            self.forest, self.sums = forest, sums
        return forest

    def _lately(self, tx: Tx, forest: Forest, known: "Sums", sums: "Sums", overlap_s: float) -> Forest | None:
        """The copy with those that changed since the newest change that it knows, or a little before; None: that does not tell all."""
        if sums.n != known.n or not known.n:
            return None
        moved = _moved(forest, tx.execute(STAMPS_SINCE, {"since": known.newest - overlap_s}))
        if len(moved) > IN_ONE:
            return None
        read = list(self._read_part(tx, moved)) if moved else []
        old = [forest.providers[p.uuid] for p in read if p.uuid in forest.providers]
        generations = known.generations + sum(p.generation for p in read) - sum(p.generation for p in old)
        moments = known.moments + math.fsum(p.changed_at for p in read) - math.fsum(p.changed_at for p in old)
        all = len(old) == len(read) and generations == sums.generations and abs(moments - sums.moments) < NO_MOMENT_S
        return forest.with_(read) if all else None

    def _whole(self, tx: Tx, forest: Forest) -> Forest:
        known, stamps = forest.providers, tx.execute(STAMPS).all()
        read = {p.uuid: p for p in self._read(tx, _moved(forest, stamps))}
        there = {uuid: read.get(uuid) or known.get(uuid) for uuid, _, _ in stamps}
        return Forest({uuid: p for uuid, p in there.items() if p is not None})

    def _read(self, tx: Tx, uuids: list[str]) -> Iterator[Provider]:
        if len(uuids) > 4 * IN_ONE:
            yield from self._read_part(tx, None)
            return
        for i in range(0, len(uuids), IN_ONE):
            yield from self._read_part(tx, uuids[i : i + IN_ONE])

    def _read_part(self, tx: Tx, uuids: list[str] | None) -> Iterator[Provider]:
        """The generation first: where something moves between two of these statements, the next look reads it again."""
        providers = _of(tx, "providers", PROVIDER, _p.uuid, uuids).all()
        inventories: dict[str, dict[str, Inventory]] = {}
        for provider, name, *numbers in _of(tx, "inventories", STOCKS, _i.provider, uuids):
            inventories.setdefault(provider, {})[name] = Inventory(*numbers)
        traits = _gathered(_of(tx, "traits", TRAITS, _t.provider, uuids))
        aggregates = _gathered(_of(tx, "aggregates", AGGREGATES, _g.provider, uuids))
        for r in providers:
            yield Provider(
                uuid=r.uuid,
                name=r.name,
                parent=r.parent,
                root=r.root,
                generation=r.generation,
                created_at=r.created_at,
                changed_at=r.changed_at,
                inventories=inventories.get(r.uuid, {}),
                traits=self._same(traits.get(r.uuid, ())),
                aggregates=self._same(aggregates.get(r.uuid, ())),
            )

    def _same(self, names: Iterable[str]) -> frozenset[str]:
        found = frozenset(names)
        if len(self.sets) > 10_000:
            self.sets.clear()
        return self.sets.setdefault(found, found)


class Sums(NamedTuple):
    """Of all providers: how many there are, their generations, and when they changed."""

    n: int = -1
    generations: int = 0
    newest: float = 0.0
    moments: float = 0.0


def _moved(forest: Forest, stamps: Iterable[Any]) -> list[str]:
    known = forest.providers
    return [
        uuid
        for uuid, generation, changed_at in stamps
        if (p := known.get(uuid)) is None or p.generation != generation or p.changed_at != changed_at
    ]


def _gathered(rows: Iterable[Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for provider, name in rows:
        found.setdefault(provider, []).append(name)
    return found


def _of(tx: Tx, name: str, query: Any, column: Any, uuids: list[str] | None) -> Any:
    return tx.execute(query) if uuids is None else among(tx, f"trees {name}", query, column, uuids)


_p, _i, _t, _g = PROVIDERS.c, INVENTORIES.c, PROVIDER_TRAITS.c, PROVIDER_AGGREGATES.c
STAMPS = ready(sa.select(_p.uuid, _p.generation, _p.changed_at))
STAMPS_SINCE = ready(sa.select(_p.uuid, _p.generation, _p.changed_at).where(_p.changed_at >= sa.bindparam("since")))
NEWEST = ready(sa.select(sa.func.coalesce(sa.func.max(_p.changed_at), 0.0)).select_from(PROVIDERS))
SUMS = ready(
    sa.select(
        sa.func.count(),
        sa.func.coalesce(sa.func.sum(_p.generation), 0),
        sa.func.coalesce(sa.func.max(_p.changed_at), 0.0),
        sa.func.coalesce(sa.func.sum(_p.changed_at - sa.bindparam("since", type_=sa.Double)), 0.0),
    ).select_from(PROVIDERS)
)
PROVIDER = sa.select(PROVIDERS)
STOCKS = sa.select(
    _i.provider,
    _i.resource_class,
    _i.total,
    _i.reserved,
    _i.min_unit,
    _i.max_unit,
    _i.step_size,
    _i.allocation_ratio,
    _i.used,
)
TRAITS = sa.select(_t.provider, _t.trait)
AGGREGATES = sa.select(_g.provider, _g.aggregate)
