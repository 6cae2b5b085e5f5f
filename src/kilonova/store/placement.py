"""What hosts have, and who holds it: Placement's model in SQL. The check and the claim are one statement.

A provider's generation moves with every change to what it has or holds: whoever keeps a copy (the scheduler's
columns) sees by it that the copy is old.  A claim does not ask for a generation but for room: two servers that
both fit need not quarrel.  `docs/decisions/the-claim-in-sql.md` says why a row is one class and not one provider.

The order of locks is always the provider's row (a root's before those under it, those that share with others last), its
inventories, then the consumer: two orders are a deadlock.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

import sqlalchemy as sa

from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import Conflict, NoCapacity, NotFound
from kilonova.kit.ready import Among, ready
from kilonova.model.ask import amounts_of
from kilonova.model.candidates import SHARES
from kilonova.model.host import Stock
from kilonova.model.server import Server
from kilonova.store import dues

Amounts = Mapping[str, int]
"""How much of each resource class."""

OURS = frozenset(
    {"VCPU", "PCPU", "MEMORY_MB", "DISK_GB"}
)  # what only a host itself can tell; the rest others may write

PROVIDERS = sa.Table(
    "resource_providers",
    meta,
    sa.Column("uuid", sa.String(36), primary_key=True),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("parent", sa.String(36)),
    sa.Column("root", sa.String(36), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("changed_at", sa.Double, nullable=False),  # with each generation: "what is new since then" is a range
    sa.Index("resource_providers_root", "root"),
    sa.Index("resource_providers_parent", "parent"),
    sa.Index("resource_providers_changed", "changed_at"),
)
INVENTORIES = sa.Table(
    "inventories",
    meta,
    sa.Column("provider", sa.String(36), primary_key=True),
    sa.Column("resource_class", sa.String(255), primary_key=True),
    sa.Column("total", sa.Integer, nullable=False),
    sa.Column("reserved", sa.Integer, nullable=False),
    sa.Column("min_unit", sa.Integer, nullable=False),
    sa.Column("max_unit", sa.Integer, nullable=False),
    sa.Column("step_size", sa.Integer, nullable=False),
    sa.Column("allocation_ratio", sa.Double, nullable=False),
    sa.Column("used", sa.BigInteger, nullable=False),  # the sum of the allocations, kept by the claim
)
ALLOCATIONS = sa.Table(
    "allocations",
    meta,
    sa.Column("consumer", sa.String(36), primary_key=True),
    sa.Column("provider", sa.String(36), primary_key=True),
    sa.Column("resource_class", sa.String(255), primary_key=True),
    sa.Column("amount", sa.Integer, nullable=False),
    sa.Index("allocations_of_provider", "provider", "resource_class"),
)
CONSUMERS = sa.Table(
    "consumers",
    meta,
    sa.Column("uuid", sa.String(36), primary_key=True),
    sa.Column("project_id", sa.String(255), nullable=False),
    sa.Column("user_id", sa.String(255), nullable=False),
    sa.Column("type", sa.String(255)),  # NULL: written before 1.38, "unknown"
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("changed_at", sa.Double, nullable=False),
    sa.Index("consumers_of_project", "project_id", "user_id"),
)
SEATS = sa.Table(  # what of a host is a consumer's alone (`store/seats.py`); goes with him
    "seats",
    meta,
    sa.Column("consumer", sa.String(36), sa.ForeignKey("consumers.uuid", ondelete="CASCADE"), primary_key=True),
    sa.Column("provider", sa.String(36), nullable=False),  # the host's own
    sa.Column("seat", sa.Text, nullable=False),  # JSON
    sa.Index("seats_of_provider", "provider"),
)
RESOURCE_CLASSES = sa.Table(  # CUSTOM_… only: the standard ones are a library's
    "resource_classes",
    meta,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("created_at", sa.Double, nullable=False),
)
TRAITS = sa.Table(  # the same
    "traits",
    meta,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("created_at", sa.Double, nullable=False),
)
PROVIDER_TRAITS = sa.Table(
    "resource_provider_traits",
    meta,
    sa.Column("provider", sa.String(36), primary_key=True),
    sa.Column("trait", sa.String(255), primary_key=True),
    sa.Index("resource_provider_traits_trait", "trait"),
)
PROVIDER_AGGREGATES = sa.Table(
    "resource_provider_aggregates",
    meta,
    sa.Column("provider", sa.String(36), primary_key=True),
    sa.Column("aggregate", sa.String(36), primary_key=True),
    sa.Index("resource_provider_aggregates_aggregate", "aggregate"),
)


# ---- claim and release


def claim(
    tx: Tx,
    consumer: str,
    provider: str,
    wanted: Amounts,
    *,
    now: float,
    project_id: str,
    user_id: str,
    type: str = "INSTANCE",
    new: bool = False,
) -> None:
    """Take `wanted` of a provider for a consumer, all or nothing. Raises NoCapacity, NotFound; roll back then.

    UPDATE inventories SET used = used + n WHERE provider = … AND resource_class = … AND it fits: one statement for
    all classes, and it must have changed a row for each.  What the consumer holds already stays his.
    `new`: the caller knows that the consumer holds nothing yet.
    """
    _moved(tx, provider, now)
    if wanted:
        told = {"at": provider} | _numbered(wanted)
        if tx.execute(_take(len(wanted)), told).rowcount != len(wanted):
            raise NoCapacity("There is no room left.", why=f"{provider} for {dict(wanted)}")
    who = {"project_id": project_id, "user_id": user_id, "type": type, "changed_at": now}
    if new:
        tx.execute(CONSUMER_NEW, {"uuid": consumer, "generation": 1, "created_at": now} | who)
    known = not new and _known(tx, consumer, who, now)
    if wanted:
        _written(tx, consumer, provider, wanted, known)
    dues.note(tx, "consumer", consumer)


def release(tx: Tx, consumer: str, provider: str | None = None, *, now: float) -> bool:
    """Give back what the consumer holds of `provider` and of those under it, or everywhere. False: it held nothing; that is no error.

    What others share with the provider goes along, unless the consumer holds something of another provider still.
    """
    held = set(_of_one(tx, consumer, provider))
    gave = False
    for at in in_order(tx, held):
        _moved(tx, at, now)
        # Who was before us has deleted the rows; what we read without a lock does not count.
        still = {"of": consumer, "at": at}
        rows = tx.execute(STILL_HELD, still).all()
        if not rows:
            continue
        given = {r.resource_class: r.amount for r in rows}
        tx.execute(_give(len(given)), {"at": at} | _numbered(given))
        tx.execute(GIVEN, still)
        gave = True
    if gave:
        dues.note(tx, "consumer", consumer)
        if not tx.execute(CONSUMER_GONE, {"the_uuid": consumer}).rowcount:
            tx.execute(CONSUMER_LESS, {"the_uuid": consumer, "changed_at": now})
            tx.execute(sa.delete(SEATS).where(SEATS.c.consumer == consumer, SEATS.c.provider.in_(held)))
    return gave


def _of_one(tx: Tx, consumer: str, provider: str | None) -> list[str]:
    """Of which providers the consumer holds something: of all, or of this one's tree and of who shares with it."""
    rows = tx.execute(HELD_WHERE, {"of": consumer}).all()
    if provider is None:
        return [r.provider for r in rows]
    others = any(r.root != provider and not r.shares for r in rows)
    return [r.provider for r in rows if r.root == provider or (r.shares and not others)]


def claim_anyhow(tx: Tx, server: Server, provider: str, *, now: float) -> bool:
    """Write down what a server uses already, whether there is room for it or not. False: there is no such provider.

    What its host does not have, one of those has that share with it.
    """
    if not tx.execute(MOVED, {"at": provider, "now": now}).rowcount:
        return False
    who = {"project_id": server.project_id, "user_id": server.user_id, "type": "INSTANCE", "changed_at": now}
    left, known = amounts_of(server), _known(tx, server.id, who, now)
    for at in [provider, *sharing_with(tx, provider)]:
        there = set(tx.execute(sa.select(_i.resource_class).where(_i.provider == at)).scalars())
        if not (wanted := {c: n for c, n in left.items() if c in there}):
            continue
        if at != provider:
            _moved(tx, at, now)
        tx.execute(_give(len(wanted)), {"at": at} | _numbered({c: -n for c, n in wanted.items()}))
        _written(tx, server.id, at, wanted, known)
        left = {c: n for c, n in left.items() if c not in there}
    dues.note(tx, "consumer", server.id)
    return True


def move(tx: Tx, consumer: str, to: str, provider: str | None = None, *, now: float, type: str = "MIGRATION") -> None:
    """Let another consumer hold what this one holds (of `provider`), and sit where it sits: sums stay, so nothing can be refused."""
    mine = ALLOCATIONS.c.consumer == consumer
    if provider is not None:
        mine &= ALLOCATIONS.c.provider == provider
    owner = tx.execute(sa.select(CONSUMERS).where(CONSUMERS.c.uuid == consumer)).first()
    if owner is None:
        return
    tx.execute(sa.update(ALLOCATIONS).where(mine).values(consumer=to))
    who = {"project_id": owner.project_id, "user_id": owner.user_id, "type": type, "changed_at": now}
    _known(tx, to, who, now)
    tx.execute(sa.update(SEATS).where(SEATS.c.consumer == consumer).values(consumer=to))
    left = sa.exists().where(ALLOCATIONS.c.consumer == consumer)
    tx.execute(sa.delete(CONSUMERS).where(CONSUMERS.c.uuid == consumer, ~left))
    for one in (consumer, to):
        dues.note(tx, "consumer", one)


def in_order(tx: Tx, providers: Collection[str]) -> list[str]:
    """In the order in which everybody locks them: roots first, as a claim does that then sees what is under its root.

    Those that share with others are the last: who claims of a host sees only then which of them he needs.
    """
    if len(providers) < 2:
        return list(providers)
    found = tx.execute(
        sa.select(_p.uuid, _p.parent, PROVIDER_SHARES.label("shares")).where(_p.uuid.in_(list(providers)))
    ).all()
    roots, pools = {r.uuid for r in found if r.parent is None}, {r.uuid for r in found if r.shares}
    return sorted(providers, key=lambda at: (at in pools, at not in roots, at))


def lock(tx: Tx, provider: str, now: float) -> None:
    """From now on nobody else claims of it, until this transaction ends. Raises NotFound."""
    _moved(tx, provider, now)


def _moved(tx: Tx, provider: str, now: float) -> None:
    if not tx.execute(MOVED, {"at": provider, "now": now}).rowcount:
        raise NotFound(f"No resource provider with uuid {provider} found.")


def _known(tx: Tx, consumer: str, who: dict[str, Any], now: float) -> bool:
    """Write down who the consumer is. False: he was not known before, so he holds nothing."""
    if tx.execute(CONSUMER_AGAIN, {"the_uuid": consumer} | who).rowcount:
        return True
    tx.execute(CONSUMER_NEW, {"uuid": consumer, "generation": 1, "created_at": now} | who)
    return False


def _written(tx: Tx, consumer: str, provider: str, taken: Amounts, known: bool) -> None:
    """Rows of what was taken; what the consumer holds of a class already becomes more."""
    at = {"of": consumer, "at": provider}
    held = set(tx.execute(HELD, at).scalars()) if known else set()
    row = {"consumer": consumer, "provider": provider}
    if new := [row | {"resource_class": c, "amount": n} for c, n in taken.items() if c not in held]:
        tx.execute(ALLOCATE, new)
    for c in held & taken.keys():
        tx.execute(MORE, at | {"c": c, "n": taken[c]})


def _numbered(wanted: Amounts) -> dict[str, Any]:
    """{"c0": class, "n0": amount, …}, classes in order: rows are locked in the same order by everybody."""
    told: dict[str, Any] = {}
    for i, (c, n) in enumerate(sorted(wanted.items())):
        told |= {f"c{i}": c, f"n{i}": n}
    return told


def _by_provider(rows: Iterable[Any]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for r in rows:
        found.setdefault(r.provider, {})[r.resource_class] = r.amount
    return found


# ---- providers


def offer(
    tx: Tx,
    provider: str,
    name: str,
    stocks: Iterable[Stock],
    traits: Iterable[str],
    *,
    now: float,
    before: Iterable[str] = (),
    parent: str | None = None,
) -> bool:
    """Make the provider be, under its parent, with these inventories and traits; what is held of them stays. True: something changed.

    A class that is no longer offered goes when nobody holds any of it, and else has nothing left to give.  What others
    wrote on it stays: traits that were not offered (`before` are those of the last time), and classes that no host of ours tells of.
    """
    # The row is locked before its inventories, as by who claims; a report that says nothing new moves no generation.
    there = tx.execute(NAME_HELD, {"at": provider}).scalar()
    if there is None:
        row = {"uuid": provider, "name": name, "generation": 0, "parent": parent, "root": parent or provider}
        tx.execute(sa.insert(PROVIDERS), row | {"created_at": now, "changed_at": now})
    changed = _stocked(tx, provider, {s.resource_class: s for s in stocks})
    changed |= _marked(tx, provider, set(traits), set(before))
    if there is not None and (changed or there != name):
        _moved(tx, provider, now)
        tx.execute(sa.update(PROVIDERS).where(PROVIDERS.c.uuid == provider).values(name=name))
    return changed or there is None


def _stocked(tx: Tx, provider: str, wanted: dict[str, Stock]) -> bool:
    old = {r.resource_class: r for r in tx.execute(STOCK, {"at": provider})}
    changed = False
    for c, stock in wanted.items():
        row = {f: getattr(stock, f) for f in Stock.__struct_fields__}
        if c not in old:
            tx.execute(sa.insert(INVENTORIES), row | {"provider": provider, "used": 0})
        elif all(getattr(old[c], f) == v for f, v in row.items()):
            continue
        else:
            tx.execute(sa.update(INVENTORIES).where(_i.provider == provider, _i.resource_class == c).values(row))
        changed = True
    for c in old.keys() - wanted.keys():
        if c not in OURS:
            continue
        here = sa.and_(_i.provider == provider, _i.resource_class == c)
        if not tx.execute(sa.delete(INVENTORIES).where(here, _i.used == 0)).rowcount:
            if old[c].reserved == old[c].total:
                continue
            tx.execute(sa.update(INVENTORIES).where(here).values(reserved=_i.total))
        changed = True
    return changed


def _marked(tx: Tx, provider: str, wanted: set[str], before: set[str]) -> bool:
    t = PROVIDER_TRAITS.c
    old = set(tx.execute(TRAITS_OF, {"at": provider}).scalars())
    if gone := old & (before - wanted):
        tx.execute(sa.delete(PROVIDER_TRAITS).where(t.provider == provider, t.trait.in_(gone)))
    if new := wanted - old:
        tx.execute(sa.insert(PROVIDER_TRAITS), [{"provider": provider, "trait": name} for name in sorted(new)])
    return bool(gone or new)


def recount(tx: Tx, provider: str, resource_class: str, *, now: float) -> bool:
    """What is held of it is the sum of what is allocated. False: it was so already.

    The provider's row is locked first, as by who claims: nobody is between his count and his allocation when we look.
    """
    _moved(tx, provider, now)
    here = ALLOCATIONS.c.provider == provider, ALLOCATIONS.c.resource_class == resource_class
    held = int(tx.execute(sa.select(sa.func.coalesce(sa.func.sum(ALLOCATIONS.c.amount), 0)).where(*here)).scalar() or 0)
    mine = _i.provider == provider, _i.resource_class == resource_class, _i.used != held
    return bool(tx.execute(sa.update(INVENTORIES).where(*mine).values(used=held)).rowcount)


def withdraw(tx: Tx, provider: str) -> None:
    """Remove a host's provider with all it offers, and its children. Raises Conflict while somebody holds something."""
    p = PROVIDERS.c
    mine = sa.select(p.uuid).where((p.uuid == provider) | (p.root == provider)).order_by(p.uuid).with_for_update()
    all = list(tx.execute(mine).scalars())
    if tx.execute(sa.select(ALLOCATIONS.c.consumer).where(ALLOCATIONS.c.provider.in_(all)).limit(1)).first():
        raise Conflict(f"Resource provider {provider} has allocations.", code="placement.resource_provider.inuse")
    for table in (INVENTORIES, PROVIDER_TRAITS, PROVIDER_AGGREGATES):
        tx.execute(sa.delete(table).where(table.c.provider.in_(all)))
    tx.execute(sa.delete(PROVIDERS).where(p.uuid.in_(all)))
    for one in all:
        dues.note(tx, "provider", one)


PCI_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


def retire(tx: Tx, provider: str, now: float) -> bool:
    """Remove a device that is gone; while somebody holds it, it gives out no more. True: something changed."""
    try:
        withdraw(tx, provider)
        return True
    except Conflict:
        rest = _i.provider == provider, _i.reserved != _i.total
        if not tx.execute(sa.update(INVENTORIES).where(*rest).values(reserved=_i.total)).rowcount:
            return False
        _moved(tx, provider, now)
        return True


# ---- views


def allocations_of(tx: Tx, consumer: str) -> dict[str, dict[str, int]]:
    """By provider and class."""
    return _by_provider(tx.execute(sa.select(ALLOCATIONS).where(ALLOCATIONS.c.consumer == consumer)))


def usage(tx: Tx, project_id: str, user_id: str | None = None) -> dict[str, int]:
    """What a project (or one user in it) holds, by class."""
    a, c = ALLOCATIONS.c, CONSUMERS.c
    query = (
        sa.select(a.resource_class, sa.func.sum(a.amount))
        .join(CONSUMERS, c.uuid == a.consumer)
        .where(c.project_id == project_id)
        .group_by(a.resource_class)
    )
    if user_id is not None:
        query = query.where(c.user_id == user_id)
    return {name: int(n) for name, n in tx.execute(query)}


def stocks(
    tx: Tx, providers: Iterable[str] | None = None, *, since: float | None = None
) -> dict[str, dict[str, tuple[Stock, int]]]:
    """What providers have and how much of it is held: {provider: {class: (stock, used)}}.

    All of them, or these, or those that changed at `since` or later: one query.
    """
    query = sa.select(INVENTORIES)
    if providers is not None:
        query = query.where(_i.provider.in_(list(providers)))
    if since is not None:
        query = query.join(PROVIDERS, _p.uuid == _i.provider).where(_p.changed_at >= since)
    found: dict[str, dict[str, tuple[Stock, int]]] = {}
    for r in tx.execute(query):
        stock = Stock(r.resource_class, r.total, r.reserved, r.min_unit, r.max_unit, r.step_size, r.allocation_ratio)
        found.setdefault(r.provider, {})[r.resource_class] = (stock, r.used)
    return found


def moved(tx: Tx, since: float) -> Iterable[Any]:
    """For who keeps columns: (provider, generation, changed_at) of those that changed at `since` or later."""
    return tx.execute(MOVED_SINCE, {"since": since})


def changes(tx: Tx, providers: Collection[str] | None = None, *, since: float | None = None) -> Iterable[Any]:
    """For who keeps columns: a row for each inventory of these providers, or of those that changed since (else all).

    A provider that has nothing has a row with nothing.

    (provider, generation, changed_at, resource_class, total, reserved, allocation_ratio, used, min_unit, max_unit,
    step_size, root, parent)
    """
    if since is not None:
        return tx.execute(CHANGES_SINCE, {"since": since})
    if providers is None:
        return tx.execute(CHANGES)
    return tx.execute(*CHANGES_OF(providers)) if providers else ()


def bears(tx: Tx, provider: str, trait: str) -> bool:
    """Has the provider this trait?"""
    t = PROVIDER_TRAITS.c
    return tx.execute(sa.select(t.trait).where(t.provider == provider, t.trait == trait)).first() is not None


def aggregates_of(tx: Tx, providers: Collection[str]) -> set[str]:
    """All in which one of these is."""
    t = PROVIDER_AGGREGATES.c
    return set(tx.execute(sa.select(t.aggregate).where(t.provider.in_(list(providers)))).scalars())


def sharing_with(tx: Tx, provider: str) -> list[str]:
    """Those that share with this provider's tree through an aggregate, and are not in it."""
    return list(tx.execute(SHARING_WITH, {"at": provider}).scalars())


def shared(tx: Tx) -> Iterable[Any]:
    """(who shares, with whom) of all providers that are in one aggregate."""
    return tx.execute(SHARED)


def pooled(tx: Tx, provider: str, resource_class: str) -> bool:
    """Does somebody share this class with the provider's tree?"""
    return tx.execute(POOLED, {"at": provider, "c": resource_class}).first() is not None


def traits(tx: Tx) -> dict[str, set[str]]:
    """By provider."""
    found: dict[str, set[str]] = {}
    for provider, trait in tx.execute(sa.select(PROVIDER_TRAITS)):
        found.setdefault(provider, set()).add(trait)
    return found


def names(tx: Tx, providers: Iterable[str]) -> dict[str, str]:
    return {r.uuid: r.name for r in tx.execute(sa.select(_p.uuid, _p.name).where(_p.uuid.in_(list(providers))))}


def names_below(tx: Tx) -> dict[str, str]:
    """Of all providers that are under another."""
    return {r.uuid: r.name for r in tx.execute(sa.select(_p.uuid, _p.name).where(_p.parent.is_not(None)))}


# ---- the SQL, once


@cache
def _take(classes: int) -> sa.Update:
    """UPDATE inventories SET used = used + CASE resource_class WHEN :c0 THEN :n0 … END
    WHERE provider = :at AND resource_class IN (:c0, …) AND used + CASE … <= (total - reserved) * allocation_ratio
      AND CASE … BETWEEN min_unit AND max_unit AND CASE … % step_size = 0"""
    n = _amount(classes)
    return ready(
        sa.update(INVENTORIES)
        .where(_i.provider == _b("at"), _i.resource_class.in_([_b(f"c{i}", type_=sa.String) for i in range(classes)]))
        .where(_i.used + n <= (_i.total - _i.reserved) * _i.allocation_ratio)
        .where(n >= _i.min_unit, n <= _i.max_unit, n % _i.step_size == 0)
        .values(used=_i.used + n)
    )


@cache
def _give(classes: int) -> sa.Update:
    named = _i.resource_class.in_([_b(f"c{i}", type_=sa.String) for i in range(classes)])
    return ready(sa.update(INVENTORIES).where(_i.provider == _b("at"), named).values(used=_i.used - _amount(classes)))


def _amount(classes: int) -> Any:
    """What is asked of the row's own class."""
    whens = {_b(f"c{i}", type_=sa.String): _b(f"n{i}", type_=sa.Integer) for i in range(classes)}
    return sa.case(*((_i.resource_class == c, n) for c, n in whens.items()), else_=0)


_i, _b = INVENTORIES.c, sa.bindparam
_p, _c, _a = PROVIDERS.c, CONSUMERS.c, ALLOCATIONS.c

_g, _s = PROVIDER_AGGREGATES.alias("mine").c, PROVIDER_AGGREGATES.alias("theirs").c
_mark = PROVIDER_TRAITS.alias("mark").c
PROVIDER_SHARES = sa.exists().where(_mark.provider == _p.uuid, _mark.trait == SHARES)
# What shares an aggregate with what; one of the two sides has the trait that says that it gives to the other.
_beside = (
    sa.join(_g.provider.table, _s.provider.table, _s.aggregate == _g.aggregate)
    .join(PROVIDERS, _p.uuid == _g.provider)
    .join(_mark.provider.table, sa.and_(_mark.provider == _s.provider, _mark.trait == SHARES))
)
_others = _s.provider.not_in(sa.select(_own := PROVIDERS.alias("own").c.uuid).where(_own.table.c.root == _b("at")))
SHARING_WITH = ready(
    sa.select(_s.provider).distinct().select_from(_beside).where(_p.root == _b("at"), _others).order_by(_s.provider)
)
SHARED = ready(sa.select(_s.provider, _g.provider).distinct().select_from(_beside).order_by(_s.provider))
POOLED = ready(
    sa.select(_s.provider)
    .select_from(_beside.join(INVENTORIES, sa.and_(_i.provider == _s.provider, _i.resource_class == _b("c"))))
    .where(_p.root == _b("at"), _others)
    .limit(1)
)
HELD_WHERE = ready(
    sa.select(_a.provider, _p.root, PROVIDER_SHARES.label("shares"))
    .distinct()
    .join(PROVIDERS, _p.uuid == _a.provider)
    .where(_a.consumer == _b("of"))
)
NAME_HELD = ready(sa.select(_p.name).where(_p.uuid == _b("at")).with_for_update())
STOCK = ready(sa.select(INVENTORIES).where(_i.provider == _b("at")))
TRAITS_OF = ready(sa.select(PROVIDER_TRAITS.c.trait).where(PROVIDER_TRAITS.c.provider == _b("at")))
MOVED = ready(
    sa.update(PROVIDERS).where(_p.uuid == _b("at")).values(generation=_p.generation + 1, changed_at=_b("now"))
)
CONSUMER_AGAIN = ready(
    sa.update(CONSUMERS)
    .where(_c.uuid == _b("the_uuid"))
    .values(
        generation=_c.generation + 1,
        project_id=_b("project_id"),
        user_id=_b("user_id"),
        type=_b("type"),
        changed_at=_b("changed_at"),
    )
)
CONSUMER_NEW = ready(sa.insert(CONSUMERS))
MOVED_SINCE = ready(sa.select(_p.uuid, _p.generation, _p.changed_at).where(_p.changed_at >= _b("since")))
CHANGES = sa.select(
    _p.uuid,
    _p.generation,
    _p.changed_at,
    _i.resource_class,
    _i.total,
    _i.reserved,
    _i.allocation_ratio,
    _i.used,
    _i.min_unit,
    _i.max_unit,
    _i.step_size,
    _p.root,
    _p.parent,
).outerjoin(INVENTORIES, _i.provider == _p.uuid)
CHANGES_OF = Among(lambda some: CHANGES.where(_p.uuid.in_(some)))
CHANGES_SINCE = ready(CHANGES.where(_p.changed_at >= _b("since")))
ALLOCATE = ready(sa.insert(ALLOCATIONS))
HELD = ready(sa.select(_a.resource_class).where(_a.consumer == _b("of"), _a.provider == _b("at")))
_still = _a.consumer == _b("of"), _a.provider == _b("at")
STILL_HELD = ready(sa.select(ALLOCATIONS).where(*_still).with_for_update())
GIVEN = ready(sa.delete(ALLOCATIONS).where(*_still))
CONSUMER_GONE = ready(
    sa.delete(CONSUMERS).where(_c.uuid == _b("the_uuid"), ~sa.exists().where(_a.consumer == _b("the_uuid")))
)
CONSUMER_LESS = ready(sa.update(CONSUMERS).where(_c.uuid == _b("the_uuid")).values(generation=_c.generation + 1))
MORE = ready(
    sa.update(ALLOCATIONS)
    .where(_a.consumer == _b("of"), _a.provider == _b("at"), _a.resource_class == _b("c"))
    .values(amount=_a.amount + _b("n"))
)
