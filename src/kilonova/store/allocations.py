"""What consumers hold, written anew: all of several consumers and providers at once, or nothing.

As with a claim (`store/placement.py`), check and change are one statement a provider.  What a consumer gives back is
counted first, so nobody is refused who takes no more than is held already, even where there is less than is given out.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from msgspec import UNSET, UnsetType

from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid
from kilonova.kit.ready import among, ready
from kilonova.model.candidates import Inventory
from kilonova.store.placement import (
    ALLOCATE,
    ALLOCATIONS,
    CONSUMER_NEW,
    CONSUMERS,
    INVENTORIES,
    MOVED,
    PROVIDERS,
    STOCK,
    in_order,
)
from kilonova.store.providers import RACE, UNKNOWN_PROVIDER, known_classes

Held = Mapping[str, Mapping[str, int]]
"""By provider and class."""


class Write(NamedTuple):
    """All that a consumer shall hold. `generation`: UNSET is not looked at, None means that there is no such consumer."""

    consumer: str
    allocations: Held
    project_id: str
    user_id: str
    type: str | None = None  # None: keep what is known of it
    generation: int | None | UnsetType = UNSET


class Consumer(NamedTuple):
    """Who holds something."""

    uuid: str
    project_id: str
    user_id: str
    type: str | None
    generation: int
    changed_at: float


def replace(tx: Tx, writes: Sequence[Write], now: float, *, whole: bool = False) -> None:
    """Let each consumer hold what is written, and nothing else.

    `whole`: also what is kept must fit into what there is now (the reshaper).  Raises Invalid for providers and classes
    that are none; Conflict where it does not fit, or somebody was faster.
    """
    names = [w.consumer for w in writes]
    wanted = {w.consumer: w.allocations for w in writes}
    known_classes(tx, {name for held in wanted.values() for amounts in held.values() for name in amounts})
    before = _held(tx, names)
    providers = {p for held in (*before.values(), *wanted.values()) for p in held}
    for provider in in_order(tx, providers):
        if not tx.execute(MOVED, {"at": provider, "now": now}).rowcount:
            raise Invalid(
                f"Allocation for resource provider '{provider}' that does not exist.",
                code=UNKNOWN_PROVIDER if whole else "",
            )
    held = _held(tx, names, lock=True)
    if not {p for h in held.values() for p in h} <= providers:
        raise Conflict("Allocations were changed in the meantime.", code=RACE)
    known = consumers(tx, names, lock=True)
    for w in writes:
        _same_generation(w, known.get(w.consumer))
    for provider in sorted(providers):
        new = [h[provider] for h in wanted.values() if provider in h]
        old = [h[provider] for h in held.values() if provider in h]
        _shifted(tx, provider, new, old, whole)
    among(tx, "allocations end", END, _a.consumer, names)
    rows = [
        {"consumer": c, "provider": p, "resource_class": name, "amount": n}
        for c, h in wanted.items()
        for p, amounts in h.items()
        for name, n in amounts.items()
    ]
    if rows:
        tx.execute(ALLOCATE, rows)
    for w in writes:
        _written(tx, w, w.consumer in known, now)


def _held(tx: Tx, names: Iterable[str], *, lock: bool = False) -> dict[str, dict[str, dict[str, int]]]:
    found: dict[str, dict[str, dict[str, int]]] = {}
    for r in among(tx, f"allocations {lock}", HELD_NOW[lock], _a.consumer, list(names)):
        found.setdefault(r.consumer, {}).setdefault(r.provider, {})[r.resource_class] = r.amount
    return found


def consumers(tx: Tx, names: Iterable[str], *, lock: bool = False) -> dict[str, Consumer]:
    """Those of them that are known."""
    return {r.uuid: Consumer(*r) for r in among(tx, f"consumers {lock}", WHO_NOW[lock], _c.uuid, sorted(names))}


def _same_generation(w: Write, known: Consumer | None) -> None:
    if w.generation is UNSET:
        return
    now = None if known is None else known.generation
    if now != w.generation:
        said, is_ = ("null" if g is None else g for g in (w.generation, now))
        raise Conflict(f"consumer generation conflict - expected {is_} but got {said}", code=RACE)


def _shifted(
    tx: Tx, provider: str, new: Sequence[Mapping[str, int]], old: Sequence[Mapping[str, int]], whole: bool
) -> None:
    """Count what is taken and given back. Raises Conflict, with the reason."""
    delta: dict[str, int] = defaultdict(int)
    for amounts in old:
        for name, n in amounts.items():
            delta[name] -= n
    there = inventories(tx, provider)
    for amounts in new:
        for name, n in amounts.items():
            delta[name] += n
            if name not in there:
                raise Conflict(f"Inventory for '{name}' on resource provider '{provider}' invalid.")
            if not (there[name].min_unit <= n <= there[name].max_unit and n % there[name].step_size == 0):
                raise Conflict(
                    f"Unable to create allocation for '{name}' on resource provider '{provider}'. The requested amount "
                    "would violate inventory constraints."
                )
    moves = sorted((name, n) for name, n in delta.items() if n)
    if moves:
        told: dict[str, Any] = {"at": provider}
        for i, (name, n) in enumerate(moves):
            told |= {f"c{i}": name, f"n{i}": n}
        if tx.execute(_shift(len(moves)), told).rowcount != len(moves):
            raise _full(provider, [name for name, n in moves if n > 0])
    if whole:
        now = inventories(tx, provider)
        taken = {name for amounts in new for name in amounts}
        if over := sorted(name for name in taken if now[name].used > now[name].capacity):
            raise _full(provider, over)


def _full(provider: str, names: Iterable[str]) -> Conflict:
    return Conflict(
        f"Unable to create allocation for '{', '.join(names)}' on resource provider '{provider}'. The requested amount "
        "would exceed the capacity."
    )


def inventories(tx: Tx, provider: str) -> dict[str, Inventory]:
    """Of one provider, by class."""
    found = tx.execute(STOCK, {"at": provider})
    return {r.resource_class: Inventory(*(getattr(r, f) for f in Inventory._fields)) for r in found}


def _written(tx: Tx, w: Write, known: bool, now: float) -> None:
    """The consumer's own row; who holds nothing has none."""
    if not w.allocations:
        tx.execute(sa.delete(CONSUMERS).where(_c.uuid == w.consumer))
        return
    who: dict[str, Any] = {"project_id": w.project_id, "user_id": w.user_id, "changed_at": now}
    if known:
        if w.type is not None:
            who["type"] = w.type
        tx.execute(sa.update(CONSUMERS).where(_c.uuid == w.consumer).values(generation=_c.generation + 1, **who))
    else:
        tx.execute(CONSUMER_NEW, who | {"uuid": w.consumer, "type": w.type, "generation": 1, "created_at": now})


# ---- views


def held_by(tx: Tx, consumer: str) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """By provider and class; and the generations of these providers."""
    query = sa.select(_a.provider, _a.resource_class, _a.amount, _p.generation).join(PROVIDERS, _p.uuid == _a.provider)
    held: dict[str, dict[str, int]] = {}
    generations = {}
    for provider, name, n, generation in tx.execute(query.where(_a.consumer == consumer).order_by(_a.provider)):
        held.setdefault(provider, {})[name] = n
        generations[provider] = generation
    return held, generations


def usages(
    tx: Tx, project_id: str, user_id: str | None = None, type: str | None | UnsetType = UNSET
) -> dict[str | None, dict[str, int]]:
    """What a project (or one user in it) holds, by consumer type (or of one) and class; with `consumer_count`."""
    mine = [_c.project_id == project_id]
    if user_id is not None:
        mine.append(_c.user_id == user_id)
    if type is not UNSET:
        mine.append(_c.type.is_(None) if type is None else _c.type == type)
    sums = sa.select(_c.type, _a.resource_class, sa.func.sum(_a.amount)).join(CONSUMERS, _c.uuid == _a.consumer)
    found: dict[str | None, dict[str, int]] = {}
    for kind, name, n in tx.execute(sums.where(*mine).group_by(_c.type, _a.resource_class)):
        found.setdefault(kind, {})[name] = int(n)
    count = sa.select(_c.type, sa.func.count()).where(*mine).group_by(_c.type)
    for kind, n in tx.execute(count):
        found.setdefault(kind, {})["consumer_count"] = int(n)
    return found


# ---- the SQL


@cache
def _shift(classes: int) -> sa.Update:
    """UPDATE inventories SET used = used + CASE resource_class WHEN :c0 THEN :n0 … END
    WHERE provider = :at AND resource_class IN (:c0, …)
      AND (CASE … END <= 0 OR used + CASE … END <= (total - reserved) * allocation_ratio)"""
    names = [sa.bindparam(f"c{i}", type_=sa.String) for i in range(classes)]
    n = sa.case(
        *((_i.resource_class == name, sa.bindparam(f"n{i}", type_=sa.Integer)) for i, name in enumerate(names)), else_=0
    )
    return ready(
        sa.update(INVENTORIES)
        .where(_i.provider == sa.bindparam("at"), _i.resource_class.in_(names))
        .where((n <= 0) | (_i.used + n <= (_i.total - _i.reserved) * _i.allocation_ratio))
        .values(used=_i.used + n)
    )


_p, _i, _a, _c = PROVIDERS.c, INVENTORIES.c, ALLOCATIONS.c, CONSUMERS.c
END = sa.delete(ALLOCATIONS)
HELD_NOW = {
    lock: sa.select(ALLOCATIONS).with_for_update() if lock else sa.select(ALLOCATIONS) for lock in (False, True)
}
_who = sa.select(_c.uuid, _c.project_id, _c.user_id, _c.type, _c.generation, _c.changed_at).order_by(_c.uuid)
WHO_NOW = {False: _who, True: _who.with_for_update()}
