"""Claims of all that a server wants of its host: amounts, of providers under it too, and what of the host is its alone.

A provider's row is locked by whoever claims of it (`store/placement.py`), so those who sit on one host are read and
written by one transaction at a time.  A seat goes with its consumer: who holds nothing any more sits nowhere.
"""

from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import Invalid, NoCapacity
from kilonova.model import numa, wants
from kilonova.model.ask import Ask, amounts_of, ask, served
from kilonova.model.candidates import Alone, Forest, Found, Inventory, Provider, within
from kilonova.model.host import HostDevice, HostFacts
from kilonova.model.seat import Seat, Taken, functions, near, seats
from kilonova.model.server import Server
from kilonova.store import placement
from kilonova.store.placement import INVENTORIES, OURS, PROVIDER_AGGREGATES, PROVIDER_TRAITS, PROVIDERS

T = placement.SEATS
MOST_CANDIDATES = 64  # ways to serve it that are tried until the devices are near enough


def claim(tx: Tx, server: Server, provider: str, *, now: float, new: bool = False, shared: bool = False) -> Seat | None:
    """Take all that this server wants, of this host; None: nothing of it is its alone. Raises NoCapacity, NotFound.

    `new`: the caller knows that it holds nothing yet.  `shared`: others share with the host what this server wants.
    """
    flavor, amounts = server.flavor, amounts_of(server)
    who: dict[str, Any] = {"now": now, "project_id": server.project_id, "user_id": server.user_id}
    guest = numa.guest(flavor.extra_specs, server.image.properties, flavor.vcpus, flavor.memory_mb)
    if guest is None and amounts.keys() <= OURS and not wants.parts(flavor) and not shared:
        placement.claim(tx, server.id, provider, amounts, new=new, **who)
        return None
    wanted = ask(server)
    placement.lock(tx, provider, now)
    facts, others = _facts(tx, provider), list(of_providers(tx, [provider], lock=True).get(provider, {}).values())
    policy = wants.numa_policy(flavor, wanted.properties)
    chosen, seat = _chosen(tx, wanted, provider, facts, others, guest, policy, shared)
    for at in sorted(chosen.allocations, key=lambda p: (p != provider, p)):
        placement.claim(tx, server.id, at, chosen.allocations[at], new=new and at == provider, **who)
    if seat.cells or seat.devices:
        tx.execute(sa.insert(T), {"consumer": server.id, "provider": provider, "seat": _text(seat)})
        return seat
    return None


def of(tx: Tx, consumer: str) -> Seat | None:
    text = tx.execute(sa.select(T.c.seat).where(T.c.consumer == consumer)).scalar()
    return None if text is None else _SEAT.decode(text)


def of_providers(tx: Tx, providers: Collection[str] | None = None, *, lock: bool = False) -> dict[str, dict[str, Seat]]:
    """All seats on these hosts (None: on any), by provider and consumer."""
    query = sa.select(T.c.provider, T.c.consumer, T.c.seat)
    if providers is not None:
        query = query.where(T.c.provider.in_(list(providers)))
    found: dict[str, dict[str, Seat]] = {}
    for provider, consumer, text in tx.execute(query.with_for_update() if lock else query):
        found.setdefault(provider, {})[consumer] = _SEAT.decode(text)
    return found


# ---- the choice


def _chosen(
    tx: Tx,
    wanted: Ask,
    provider: str,
    facts: HostFacts,
    others: list[Seat],
    guest: numa.Guest | None,
    policy: str,
    shared: bool,
) -> tuple[Found, Seat]:
    """Who serves what, and the seat that goes with it. Raises NoCapacity."""
    laid = [Seat()] if guest is None else list(islice(seats(guest, facts, others), MOST_CANDIDATES))
    if not laid:
        raise NoCapacity("There is no room left.", why=f"no cells of {provider} for {guest}")
    for candidate, devices in _served(tx, wanted, provider, facts, others, shared):
        for seat in laid:
            whole = msgspec.structs.replace(seat, devices=devices)
            if near({c.host for c in seat.cells}, [t.cell for t in devices], policy, facts.cells):
                return candidate, whole
    raise NoCapacity("There is no room left.", why=f"nothing under {provider} serves {wanted.parts or wanted.amounts}")


def _served(
    tx: Tx, wanted: Ask, provider: str, facts: HostFacts, others: list[Seat], shared: bool
) -> Iterable[tuple[Found, list[Taken]]]:
    if not wanted.parts and wanted.amounts.keys() <= OURS and not shared:
        yield Alone(provider, wanted.amounts), []
        return
    forest = _forest(tx, provider)
    there = {f"{facts.hypervisor_hostname}_{d.address}": d for d in facts.devices}
    of = {p.uuid: there[p.name] for p in forest.providers.values() if p.name in there}
    for candidate in islice(within(forest, served(wanted), provider), MOST_CANDIDATES):
        if (devices := _devices(candidate, of, others)) is not None:
            yield candidate, devices


def _devices(candidate: Found, of: dict[str, HostDevice], others: list[Seat]) -> list[Taken] | None:
    """Which functions of which devices; None: of one of them nobody knows which are left."""
    found: list[Taken] = []
    for provider, amounts in candidate.allocations.items():
        device = of.get(provider)
        if device is None or not (n := amounts.get(device.resource_class, 0)):
            continue
        some = functions(provider, device, n, others)
        if some is None:
            return None
        found += some
    return found


def _facts(tx: Tx, provider: str) -> HostFacts:
    """Raises NoCapacity for a provider that is no host's."""
    nodes = meta.tables["nodes"].c
    text = tx.execute(sa.select(nodes.facts).where(nodes.uuid == provider)).scalar()
    if text is None:
        raise NoCapacity("There is no room left.", why=f"{provider} is no host of ours")
    return _FACTS.decode(text)


def _forest(tx: Tx, root: str) -> Forest:
    """The host's tree, and who shares with it."""
    p, i, t, g = PROVIDERS.c, INVENTORIES.c, PROVIDER_TRAITS.c, PROVIDER_AGGREGATES.c
    rows = list(tx.execute(sa.select(PROVIDERS).where(p.root == root).order_by(p.uuid).with_for_update()))
    if pools := placement.sharing_with(tx, root):
        rows += tx.execute(sa.select(PROVIDERS).where(p.uuid.in_(pools)).order_by(p.uuid).with_for_update())
    uuids = [r.uuid for r in rows]
    stocks: dict[str, dict[str, Inventory]] = {}
    for r in tx.execute(sa.select(INVENTORIES).where(i.provider.in_(uuids))):
        stocks.setdefault(r.provider, {})[r.resource_class] = Inventory(*(getattr(r, f) for f in Inventory._fields))
    traits: dict[str, set[str]] = {}
    for at, trait in tx.execute(sa.select(t.provider, t.trait).where(t.provider.in_(uuids))):
        traits.setdefault(at, set()).add(trait)
    groups: dict[str, set[str]] = {}
    for at, aggregate in tx.execute(sa.select(g.provider, g.aggregate).where(g.provider.in_(uuids if pools else ()))):
        groups.setdefault(at, set()).add(aggregate)
    return Forest(
        {
            r.uuid: Provider(
                r.uuid, r.name, r.parent, r.root, r.generation, r.created_at, r.changed_at, stocks.get(r.uuid, {}),
                frozenset(traits.get(r.uuid, ())), frozenset(groups.get(r.uuid, ())),
            )
            for r in rows
        }
    )  # fmt: skip


def claim_anyhow(tx: Tx, server: Server, provider: str, *, now: float) -> bool:
    """Write down what a server uses already: a seat of its own if there is one, and else what its host counts."""
    try:
        with tx.begin_nested():
            claim(tx, server, provider, now=now, shared=True)
        return True
    except (NoCapacity, Invalid):
        return placement.claim_anyhow(tx, server, provider, now=now)


def _text(seat: Seat) -> str:
    return msgspec.json.encode(seat).decode()


_SEAT, _FACTS = msgspec.json.Decoder(Seat), msgspec.json.Decoder(HostFacts)
