"""Resource providers as Placement's users write them: trees, inventories, traits, aggregates, classes.

The tables, and what a claim does to them, are in `store/placement.py`; here is what is asked by uuid and generation.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import os_resource_classes
import os_traits
import sqlalchemy as sa
from msgspec import UNSET, UnsetType

from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.model.host import Stock
from kilonova.store import hosts
from kilonova.store.placement import (
    ALLOCATIONS,
    CONSUMERS,
    INVENTORIES,
    PROVIDER_AGGREGATES,
    PROVIDER_TRAITS,
    PROVIDERS,
    RESOURCE_CLASSES,
    TRAITS,
)

RACE, DUPLICATE, IN_USE = "placement.concurrent_update", "placement.duplicate_name", "placement.inventory.inuse"
PROVIDER_IN_USE, PARENT = "placement.resource_provider.inuse", "placement.resource_provider.cannot_delete_parent"
UNKNOWN_PROVIDER = "placement.resource_provider.not_found"

STANDARD_CLASSES = frozenset(os_resource_classes.STANDARDS)
STANDARD_TRAITS = frozenset(os_traits.get_traits())


class Row(NamedTuple):
    """A provider without what it has."""

    uuid: str
    name: str
    generation: int
    parent: str | None
    root: str
    created_at: float
    changed_at: float


# ---- one provider


def get(tx: Tx, uuid: str) -> Row:
    """Raises NotFound."""
    found = tx.execute(GET, {"the_uuid": uuid}).first()
    if found is None:
        raise gone(uuid)
    return Row(*found)


def gone(uuid: str) -> NotFound:
    return NotFound(f"No resource provider with uuid {uuid[:64]} found")


def create(tx: Tx, uuid: str, name: str, parent: str | None, now: float) -> Row:
    """Raises Conflict for a name or uuid that is taken, Invalid for a parent that is not there."""
    root = uuid if parent is None else _parent(tx, parent, uuid).root
    _free(tx, name, uuid)
    if tx.execute(GET, {"the_uuid": uuid}).first():
        raise Conflict(f"Conflicting resource provider uuid: {uuid} already exists.", code=DUPLICATE)
    row = Row(uuid, name, 0, parent, root, now, now)
    tx.execute(sa.insert(PROVIDERS), row._asdict())
    return row


def update(tx: Tx, uuid: str, name: str, parent: str | None | UnsetType, now: float, *, may_move: bool) -> Row:
    """Another name, and another place in a tree; without `may_move` (before 1.37) only from no parent to one.

    Raises NotFound; Conflict for a name that is taken; Invalid for a place where it cannot be.
    """
    old = get(tx, uuid)
    if parent is not UNSET and parent != old.parent:
        if old.parent is not None and not may_move:
            how = "un-parenting" if parent is None else "re-parenting"
            raise Invalid(f"Unable to save resource provider {uuid}: {how} a provider is not currently allowed.")
        _moved_to(tx, old, parent, now)
    _free(tx, name, uuid)
    values = {"name": name, "changed_at": later(now, old.changed_at)}
    tx.execute(sa.update(PROVIDERS).where(_p.uuid == uuid).values(values))
    return get(tx, uuid)


def _moved_to(tx: Tx, child: Row, parent: str | None, now: float) -> None:
    """The child with all below it becomes part of another tree, or a tree of its own."""
    above = None if parent is None else _parent(tx, parent, child.uuid)
    roots = {child.root} | ({above.root} if above else set())
    tree = tx.execute(sa.select(PROVIDERS).where(_p.root.in_(roots)).order_by(_p.uuid).with_for_update()).all()
    below = _below(child.uuid, {r.uuid: r.parent for r in tree})
    if parent in below:
        raise Invalid(
            f"Unable to save resource provider {child.uuid}: the parent may not be the provider itself or one below it."
        )
    root = child.uuid if above is None else above.root
    moment = later(now, *(r.changed_at for r in tree))
    tx.execute(sa.update(PROVIDERS).where(_p.uuid.in_(below)).values(root=root, changed_at=moment))
    tx.execute(sa.update(PROVIDERS).where(_p.uuid == child.uuid).values(parent=parent))


def _below(top: str, parent_of: Mapping[str, str | None]) -> set[str]:
    """It, and all that are under it."""
    children: dict[str | None, list[str]] = {}
    for uuid, parent in parent_of.items():
        children.setdefault(parent, []).append(uuid)
    found, todo = set[str](), [top]
    while todo:
        at = todo.pop()
        found.add(at)
        todo += children.get(at, ())
    return found


def delete(tx: Tx, uuid: str) -> None:
    """With what it offers. Raises NotFound; Conflict while it has children, or somebody holds something of it."""
    tx.execute(sa.select(_p.uuid).where(_p.uuid == uuid).with_for_update())
    get(tx, uuid)
    if tx.execute(sa.select(_p.uuid).where(_p.parent == uuid).limit(1)).first():
        raise Conflict(
            f"Unable to delete parent resource provider {uuid}: It has child resource providers.", code=PARENT
        )
    if tx.execute(sa.select(ALLOCATIONS.c.consumer).where(ALLOCATIONS.c.provider == uuid).limit(1)).first():
        raise Conflict(
            f"Unable to delete resource provider {uuid}: Resource provider has allocations.", code=PROVIDER_IN_USE
        )
    for table in (INVENTORIES, PROVIDER_TRAITS, PROVIDER_AGGREGATES):
        tx.execute(sa.delete(table).where(table.c.provider == uuid))
    tx.execute(sa.delete(PROVIDERS).where(_p.uuid == uuid))


def moved(tx: Tx, uuid: str, generation: int | None, now: float) -> Row:
    """Take the provider for a change of it: its generation moves. As it was before.

    UPDATE resource_providers SET generation = generation + 1 WHERE uuid = … AND generation = the one that was said.
    Raises NotFound; Conflict where it was another.
    """
    old = get(tx, uuid)
    told = {"the_uuid": uuid, "was": old.generation if generation is None else generation}
    if not tx.execute(NEXT, told | {"moment": later(now, old.changed_at)}).rowcount:
        raise Conflict(
            f"resource provider generation conflict: provider {uuid} has changed in the meantime.",
            code=RACE,
            why=f"generation {generation}, is {old.generation}",
        )
    return old


def touched(tx: Tx, row: Row, now: float) -> None:
    """Something of it changed that moves no generation."""
    moment = later(now, row.changed_at)
    tx.execute(sa.update(PROVIDERS).where(_p.uuid == row.uuid).values(changed_at=moment))


def later(now: float, *than: float) -> float:
    """A moment that nobody has seen yet: who keeps a copy compares moments."""
    return max(now, *(t + 1e-6 for t in than))


def _free(tx: Tx, name: str, but: str) -> None:
    if tx.execute(sa.select(_p.uuid).where(_p.name == name, _p.uuid != but)).first():
        raise Conflict(f"Conflicting resource provider name: {name} already exists.", code=DUPLICATE)


def _parent(tx: Tx, parent: str, child: str) -> Row:
    if parent == child:
        raise Invalid("parent provider UUID cannot be same as UUID.")
    found = tx.execute(GET, {"the_uuid": parent}).first()
    if found is None:
        raise Invalid("Unable to create or save resource provider: parent provider UUID does not exist.")
    return Row(*found)


# ---- inventories


def stocks(tx: Tx, uuid: str) -> dict[str, Stock]:
    """Of one provider, by class."""
    rows = tx.execute(sa.select(INVENTORIES).where(_i.provider == uuid).order_by(_i.resource_class))
    return {
        r.resource_class: Stock(
            r.resource_class, r.total, r.reserved, r.min_unit, r.max_unit, r.step_size, r.allocation_ratio
        )
        for r in rows
    }


def set_stocks(tx: Tx, uuid: str, wanted: Iterable[Stock], *, keep: bool = False) -> set[str]:
    """Let the provider have these; the others go, or (`keep`) are named. Its generation is the caller's to move.

    Raises Invalid for a class that is none; Conflict for one that goes though somebody holds some.
    """
    new = {s.resource_class: s for s in wanted}
    known_classes(tx, new)
    old = stocks(tx, uuid)
    for name, stock in new.items():
        row = {f: getattr(stock, f) for f in Stock.__struct_fields__}
        if name not in old:
            tx.execute(sa.insert(INVENTORIES), row | {"provider": uuid, "used": 0})
        elif old[name] != stock:
            tx.execute(sa.update(INVENTORIES).where(_i.provider == uuid, _i.resource_class == name).values(row))
    if keep:
        return old.keys() - new.keys()
    drop_stocks(tx, uuid, old.keys() - new.keys())
    return set()


def drop_stocks(tx: Tx, uuid: str, names: Iterable[str], *, code: str = IN_USE) -> None:
    """DELETE FROM inventories WHERE provider = … AND resource_class IN … AND used = 0. Raises Conflict."""
    if not (gone := sorted(names)):
        return
    mine = sa.and_(_i.provider == uuid, _i.resource_class.in_(gone))
    if tx.execute(sa.delete(INVENTORIES).where(mine, _i.used == 0)).rowcount != len(gone):
        held = tx.execute(sa.select(_i.resource_class).where(mine)).scalars().all()
        raise Conflict(
            f"update conflict: Inventory for '{', '.join(held)}' on resource provider '{uuid}' in use.", code=code
        )


# ---- traits and aggregates of a provider


def traits_of(tx: Tx, uuid: str) -> list[str]:
    return list(tx.execute(sa.select(_t.trait).where(_t.provider == uuid).order_by(_t.trait)).scalars())


def set_traits(tx: Tx, uuid: str, wanted: Iterable[str]) -> None:
    """Raises Invalid for a trait that nobody has declared."""
    _exchanged(tx, PROVIDER_TRAITS, "trait", uuid, known_traits(tx, wanted))
    hosts.mark(tx)  # a scheduler's columns are not by generation: traits are read whole


def used_traits(tx: Tx) -> set[str]:
    """Those that some provider has."""
    return set(tx.execute(sa.select(_t.trait).distinct()).scalars())


def aggregates_of(tx: Tx, uuid: str) -> list[str]:
    return list(tx.execute(sa.select(_g.aggregate).where(_g.provider == uuid).order_by(_g.aggregate)).scalars())


def set_aggregates(tx: Tx, uuid: str, wanted: Iterable[str]) -> None:
    _exchanged(tx, PROVIDER_AGGREGATES, "aggregate", uuid, set(wanted))
    hosts.mark(tx)  # and with whom somebody shares


def _exchanged(tx: Tx, table: sa.Table, name: str, uuid: str, wanted: set[str]) -> None:
    column = table.c[name]
    old = set(tx.execute(sa.select(column).where(table.c.provider == uuid)).scalars())
    if lost := old - wanted:
        tx.execute(sa.delete(table).where(table.c.provider == uuid, column.in_(lost)))
    if new := wanted - old:
        tx.execute(sa.insert(table), [{"provider": uuid, name: v} for v in sorted(new)])


# ---- names: classes and traits


class Names(NamedTuple):
    """Of one kind: those that the library has, those that were declared (with their moment), and who uses one."""

    what: str
    standard: frozenset[str]
    table: sa.Table
    used: Callable[[str], Any]


CLASS_NAMES = Names(
    "resource class", STANDARD_CLASSES, RESOURCE_CLASSES, lambda name: INVENTORIES.c.resource_class == name
)
TRAIT_NAMES = Names("trait", STANDARD_TRAITS, TRAITS, lambda name: PROVIDER_TRAITS.c.trait == name)


def names(tx: Tx, kind: Names) -> dict[str, float | None]:
    """All, with when they were declared (None: they always were)."""
    found: dict[str, float | None] = dict.fromkeys(sorted(kind.standard))
    return found | {r.name: r.created_at for r in tx.execute(sa.select(kind.table).order_by(kind.table.c.name))}


def declared(tx: Tx, kind: Names, name: str) -> float | None:
    """When. Raises NotFound."""
    if name in kind.standard:
        return None
    at = tx.execute(sa.select(kind.table.c.created_at).where(kind.table.c.name == name)).scalar()
    if at is None:
        raise NotFound(f"No such {kind.what}: {name[:255]}.")
    return float(at)


def declare(tx: Tx, kind: Names, name: str, now: float) -> bool:
    """False: it was there. Two who do it at once: one of them meets the database's own error, and looks again."""
    if name in kind.standard or tx.execute(sa.select(kind.table.c.name).where(kind.table.c.name == name)).first():
        return False
    tx.execute(sa.insert(kind.table), {"name": name, "created_at": now})
    return True


def rename_class(tx: Tx, name: str, to: str) -> None:
    """Raises NotFound, Invalid for a standard one, Conflict where the other is there."""
    _custom(tx, CLASS_NAMES, name)
    if to != name and (to in STANDARD_CLASSES or tx.execute(sa.select(_c.name).where(_c.name == to)).first()):
        raise Conflict(f"Resource class already exists: {to}")
    tx.execute(sa.update(RESOURCE_CLASSES).where(_c.name == name).values(name=to))
    for table in (INVENTORIES, ALLOCATIONS):
        tx.execute(sa.update(table).where(table.c.resource_class == name).values(resource_class=to))


def undeclare(tx: Tx, kind: Names, name: str) -> None:
    """Raises NotFound, Invalid for a standard one, Conflict while a provider has it."""
    _custom(tx, kind, name)
    if tx.execute(sa.select(sa.literal(1)).where(sa.exists().where(kind.used(name)))).first():
        raise Conflict(f"Cannot delete {kind.what} {name}: it is in use by resource providers.")
    tx.execute(sa.delete(kind.table).where(kind.table.c.name == name))


def _custom(tx: Tx, kind: Names, name: str) -> None:
    if name in kind.standard:
        raise Invalid(f"Cannot change or delete standard {kind.what} {name}.")
    declared(tx, kind, name)


def known_classes(tx: Tx, wanted: Iterable[str]) -> None:
    """Raises Invalid for those that are none."""
    if unknown := _unknown(tx, CLASS_NAMES, set(wanted)):
        raise Invalid(f"Unknown resource class in inventory or request: {', '.join(unknown)}")


def known_traits(tx: Tx, wanted: Iterable[str]) -> set[str]:
    """Raises Invalid for those that are none."""
    all = set(wanted)
    if unknown := _unknown(tx, TRAIT_NAMES, all):
        raise Invalid(f"No such trait(s): {', '.join(unknown)}.")
    return all


def _unknown(tx: Tx, kind: Names, wanted: set[str]) -> list[str]:
    if not (custom := wanted - kind.standard):
        return []
    found = tx.execute(sa.select(kind.table.c.name).where(kind.table.c.name.in_(custom))).scalars()
    return sorted(custom - set(found))


# ---- what is held


def held_of(tx: Tx, uuid: str) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """What each consumer holds of the provider, and the generations of these consumers."""
    a, c = ALLOCATIONS.c, CONSUMERS.c
    query = sa.select(a.consumer, a.resource_class, a.amount, c.generation).join(CONSUMERS, c.uuid == a.consumer)
    found: dict[str, dict[str, int]] = {}
    generations = {}
    for consumer, name, n, generation in tx.execute(query.where(a.provider == uuid)):
        found.setdefault(consumer, {})[name] = n
        generations[consumer] = generation
    return found, generations


def used_of(tx: Tx, uuid: str) -> dict[str, int]:
    """By class, with those of which nobody holds any."""
    query = sa.select(_i.resource_class, _i.used).where(_i.provider == uuid).order_by(_i.resource_class)
    return {name: int(n) for name, n in tx.execute(query)}


_p, _i, _t, _g = PROVIDERS.c, INVENTORIES.c, PROVIDER_TRAITS.c, PROVIDER_AGGREGATES.c
_c = RESOURCE_CLASSES.c
GET = sa.select(_p.uuid, _p.name, _p.generation, _p.parent, _p.root, _p.created_at, _p.changed_at).where(
    _p.uuid == sa.bindparam("the_uuid")
)
NEXT = (
    sa.update(PROVIDERS)
    .where(_p.uuid == sa.bindparam("the_uuid"), _p.generation == sa.bindparam("was"))
    .values(generation=_p.generation + 1, changed_at=sa.bindparam("moment"))
)
