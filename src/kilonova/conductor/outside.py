"""A real Placement service that other services use, too: it is asked where there is room, and told of hosts and claims.

Our own tables stay what builds claim of: they know seats, and are changed in the transaction that gives a server its
host.  After that the other service is told, in the same attempt; where it refuses, the claim is undone and another host
tried.  What is given back it hears of within seconds: that may be late, but never forgotten (`store/dues.py`).
`docs/decisions/placement-outside.md`.
"""

import logging
from collections.abc import Iterable

import msgspec
import sqlalchemy as sa

from kilonova.clients.placement import RACE, Holding, Offer, Placement
from kilonova.conductor.world import World
from kilonova.contracts.scheduler import Chosen
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NoCapacity, Trouble, Unavailable
from kilonova.kit.reconcile import reconciler
from kilonova.kit.workflow import Run, effect
from kilonova.model.ask import Ask, served
from kilonova.model.candidates import Provider
from kilonova.model.host import Stock
from kilonova.store import allocations, dues, hosts, placement
from kilonova.store.dues import Due

log = logging.getLogger(__name__)
TRIES = 5
WAIT_S = 0.3  # between two of them, where another may be at the same
IN_ONE_TURN = 200  # debts


def among(world: World, ask: Ask) -> list[str] | None:
    """The hosts that the other service would give it. Where those are none, perhaps it has not heard of all of ours yet."""
    service = world.neighbours.placement
    assert service is not None
    query = served(ask)
    if not query.groups:
        return None
    tree = None
    if ask.host or ask.node:
        with world.db.read() as tx:
            found = [n.uuid for n in hosts.nodes(tx, host=ask.host) if ask.node in (None, n.node)]
        if not found:
            return []
        tree = found[0]
    of = tuple(frozenset(one_of) for one_of in ask.member_of)
    first, most = next(iter(query.groups)), world.config.placement.most_candidates
    groups = {s: g._replace(in_tree=tree, member_of=of if s == first else ()) for s, g in query.groups.items()}
    query, before = query._replace(groups=groups), dict(world.met)
    there = service.candidates(query, most)
    for _ in range(TRIES):
        if there:
            break
        wrong = meet(world, service)
        there = service.candidates(query, most) if wrong or world.met != before else there
        if there or not wrong:
            break
        world.clock.sleep(WAIT_S)  # as a rule another conductor is telling it just the same
    return sorted(there)


def agreed(run: Run, chosen: Chosen, *consumers: str) -> None:
    """The other service has room for what was claimed, too, where there is one. Raises NoCapacity."""
    if chosen.outside:
        run(told, list(consumers))


@effect
def told(world: World, key: str, consumers: list[str]) -> None:
    if (service := world.neighbours.placement) is not None:
        tell(world, service, consumers)


def tell(world: World, service: Placement, consumers: list[str]) -> None:
    """Let these hold there what they hold here, all at once. Raises NoCapacity where there is no room, Unavailable."""
    met = False
    for _ in range(TRIES):
        there = {c: service.holding(c) for c in consumers}  # first: so what we write is no older than what it replaces
        owed, here = world.db.look(_so_now, consumers)
        changes = [
            msgspec.structs.replace(h, generation=there[h.consumer].generation, **_owner(h, there[h.consumer]))
            for h in here
            if h.held != there[h.consumer].held
        ]
        try:
            if changes:
                service.hold(changes)
        except Conflict as e:
            if e.code == RACE:
                continue
            raise NoCapacity("There is no room left.", why=f"the placement service says: {e.said}") from e
        except Invalid as e:
            if met:
                raise NoCapacity("There is no room left.", why=f"the placement service says: {e.said}") from e
            meet(world, service, {p for h in here for p in h.held})  # hosts that it was not told of yet
            met = True
            continue
        if owed:
            world.db.run(dues.paid, owed)
        return
    raise Unavailable("Allocations are changed all the time.", why=f"of {consumers}")


def _owner(here: Holding, there: Holding) -> dict[str, str]:
    """Who holds nothing any more is still somebody's."""
    if here.project_id:
        return {}
    return {"project_id": there.project_id, "user_id": there.user_id, "type": there.type or "INSTANCE"}


def _so_now(tx: Tx, consumers: list[str]) -> tuple[list[Due], list[Holding]]:
    owed, who = dues.of(tx, consumers), allocations.consumers(tx, consumers)
    found = []
    for c in consumers:
        held, one = placement.allocations_of(tx, c), who.get(c)
        found.append(Holding(c, held, one.project_id, one.user_id, one.type or "INSTANCE") if one else Holding(c, held))
    return owed, found


# ---- hosts


def meet(world: World, service: Placement, wanted: Iterable[str] | None = None) -> list[str]:
    """Tell of hosts, their devices, and who shares with them: these, or all that are not what was told of them last.

    What went wrong.
    """
    with world.db.read() as tx:
        forest = world.trees.look(tx)
        ours = frozenset(a.uuid for a in hosts.aggregates(tx))
        mine = set(tx.execute(sa.select(hosts.NODES.c.uuid)).scalars())
        mine |= {forest.providers[pool].root for pool, of in placement.shared(tx) if forest.providers[of].root in mine}
    of = list(forest.providers.values()) if wanted is None else [forest.providers[p] for p in wanted]
    wrong = []
    for p in sorted(of, key=lambda p: p.parent is not None):
        if p.root not in mine or world.met.get(p.uuid) == (what := _offer(p)):
            continue
        try:
            service.offer(what, ours, placement.OURS | p.inventories.keys())
            world.met[p.uuid] = what
        except Unavailable:
            raise
        except Trouble as e:
            wrong.append(f"{p.name} is not what the placement service was told: {e.said}")
    return wrong


def _offer(p: Provider) -> Offer:
    stocks = [
        Stock(c, int(i.total), i.reserved, i.min_unit, i.max_unit, i.step_size, i.allocation_ratio)
        for c, i in sorted(p.inventories.items())
    ]
    return Offer(p.uuid, p.name, p.parent, stocks, p.traits, p.aggregates)


@reconciler(every_s=10, at_once=True)
def owed(world: World) -> list[str]:
    """What the placement service does not know yet: hosts as they are, and who holds what. What it refuses is said."""
    if (service := world.neighbours.placement) is None:
        return []
    try:
        wrong = meet(world, service)
        for due in world.db.look(dues.first, IN_ONE_TURN):
            try:
                if due.kind == "consumer":
                    tell(world, service, [due.id])
                else:
                    service.withdraw(due.id)
                    world.met.pop(due.id, None)
                    world.db.run(dues.paid, [due])
            except (Conflict, NoCapacity) as e:
                wrong.append(f"{due.kind} {due.id}: {e.said} ({e.why or 'it is still used there'})")
    except Unavailable as e:
        log.warning("the placement service was not told: %s (%s)", e.said, e.why)
        return []
    return wrong


__all__ = ["agreed", "among", "meet", "owed", "tell"]
