"""A copy of all providers in memory, as one moment of the database has it.

A provider's generation and `changed_at` move with all that is shown of it.  So a look reads two numbers of each, and
only those that moved are read whole: what costs is what changed.  The copy that is handed out never changes.
"""

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy as sa

from kilonova.kit.db import Tx
from kilonova.model.candidates import Forest, Inventory, Provider
from kilonova.store.placement import INVENTORIES, PROVIDER_AGGREGATES, PROVIDER_TRAITS, PROVIDERS

IN_ONE = 500  # providers named in one statement; of more, all are read


class Trees:
    """Any number of threads may look."""

    def __init__(self) -> None:
        self.lock, self.forest = threading.Lock(), Forest({})
        self.sets: dict[frozenset[str], frozenset[str]] = {}  # thousands of hosts have few kinds of traits

    def look(self, tx: Tx) -> Forest:
        """What there is, in this transaction's eyes."""
        with self.lock:
            forest, known = self.forest, self.forest.providers
        stamps = tx.execute(STAMPS).all()
        moved = [
            uuid
            for uuid, generation, changed_at in stamps
            if (p := known.get(uuid)) is None or p.generation != generation or p.changed_at != changed_at
        ]
        if not moved and len(stamps) == len(known):
            return forest
        read = {p.uuid: p for p in self._read(tx, moved)}
        there = {uuid: read.get(uuid) or known.get(uuid) for uuid, _, _ in stamps}
        forest = Forest({uuid: p for uuid, p in there.items() if p is not None})
        with self.lock:
            self.forest = forest
        return forest

    def _read(self, tx: Tx, uuids: list[str]) -> Iterator[Provider]:
        if len(uuids) > 4 * IN_ONE:
            yield from self._read_part(tx, None)
            return
        for i in range(0, len(uuids), IN_ONE):
            yield from self._read_part(tx, uuids[i : i + IN_ONE])

    def _read_part(self, tx: Tx, uuids: list[str] | None) -> Iterator[Provider]:
        """The generation first: where something moves between two of these statements, the next look reads it again."""
        providers = tx.execute(_of(PROVIDER, _p.uuid, uuids)).all()
        inventories: dict[str, dict[str, Inventory]] = {}
        for provider, name, *numbers in tx.execute(_of(STOCKS, _i.provider, uuids)):
            inventories.setdefault(provider, {})[name] = Inventory(*numbers)
        traits = _gathered(tx.execute(_of(TRAITS, _t.provider, uuids)))
        aggregates = _gathered(tx.execute(_of(AGGREGATES, _g.provider, uuids)))
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


def _gathered(rows: Iterable[Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for provider, name in rows:
        found.setdefault(provider, []).append(name)
    return found


def _of(query: Any, column: Any, uuids: list[str] | None) -> Any:
    return query if uuids is None else query.where(column.in_(uuids))


_p, _i, _t, _g = PROVIDERS.c, INVENTORIES.c, PROVIDER_TRAITS.c, PROVIDER_AGGREGATES.c
STAMPS = sa.select(_p.uuid, _p.generation, _p.changed_at)
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
