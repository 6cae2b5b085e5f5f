"""What all moves of a server have in common: a place, a share of it in exchange for the old one, and ports that follow.

The new place is claimed in the transaction that writes it down; what the server held until then is held by the
migration from there on, so that both hosts know what they owe until it is decided where the server stays.
"""

from typing import Any

import msgspec

from kilonova.conductor import ports
from kilonova.conductor.ports import Plugged
from kilonova.conductor.world import World
from kilonova.contracts.scheduler import Choose, Chosen
from kilonova.kit.db import Tx
from kilonova.kit.errors import NoCapacity, Trouble
from kilonova.kit.workflow import effect
from kilonova.model.ask import amounts, ask
from kilonova.model.flavor import Flavor
from kilonova.model.host import Place
from kilonova.model.machine import Machine
from kilonova.model.plan import plan
from kilonova.model.server import Server
from kilonova.store import hosts, migrations, placement, server_groups
from kilonova.store.migrations import Status

TURNS = 10  # that places are asked for: claims may be lost to others
NO_HOST = "No valid host was found. There are not enough hosts available."


class Goal(msgspec.Struct, frozen=True):
    """Where it goes. `epoch` is that of its machine there."""

    place: Place
    epoch: int


@effect
def home(world: World, key: str, host: str, node: str | None) -> Place:
    """The place of a host that we know by name: where it is, or was."""
    with world.db.read() as tx:
        zone = hosts.zones(tx).get(host, world.config.api.default_availability_zone)
        found = [n for n in hosts.nodes(tx, host=host) if node in (None, n.node)]
        return Place(host, found[0].node if found else node or host, found[0].uuid if found else "", zone)


def choice(
    world: World, server: Server, flavor: Flavor, *, avoid: list[str], host: str | None, forced: bool, fresh: bool
) -> Chosen:
    """Where could it go, with this flavor? What it was asked to be, and near to whom, holds as on its first day."""
    wanted = ask(msgspec.structs.replace(server, flavor=flavor), host=host, forced=forced)
    wanted = msgspec.structs.replace(wanted, avoid=avoid)
    return world.choose(Choose(server=server.id, ask=wanted, most=world.config.scheduler.attempts, fresh=fresh))


def claimed(
    tx: Tx, server: Server, migration: str, place: Place, flavor: Flavor, now: float, status: Status, **facts: Any
) -> int:
    """A share of this place is the server's; what it held is its migration's. The epoch it will have there. Raises NoCapacity."""
    server_groups.admit(tx, server, place.host, place.provider)
    placement.move(tx, server.id, migration, now=now)
    placement.claim(
        tx,
        server.id,
        place.provider,
        amounts(flavor, volume_backed=server.volume_backed),
        now=now,
        project_id=server.project_id,
        user_id=server.user_id,
    )
    epoch = migrations.next_epoch(tx, server, migration)
    told = {"dest": place.host, "dest_node": place.node, "dest_ip": hosts.address(tx, place.host)} | facts
    migrations.change(tx, migration, now, status, **told)
    return epoch


def given_back(tx: Tx, server: Server, migration: str, now: float) -> None:
    """It stays where it was, and holds what it held there."""
    placement.release(tx, server.id, now=now)
    placement.move(tx, migration, server.id, now=now, type="INSTANCE")


def machine(server: Server, goal: Goal, plugged: Plugged, **more: Any) -> Machine:
    """The whole machine as it shall be there."""
    there = msgspec.structs.replace(server, plugs=plugged.plugs)
    return plan(there, nics=plugged.nics, number=server.number, epoch=goal.epoch, zone=goal.place.zone, **more)


@effect
def rebind(world: World, key: str, server: Server, to: Place, back: Place) -> Plugged:
    """Its ports are there."""
    return ports.rebind(world, server, to)


@rebind.undo
def _(world: World, key: str, server: Server, to: Place, back: Place) -> None:
    ports.rebind(world, server, back)


def nowhere(last: Trouble | None, tried: list[str]) -> Trouble:
    """What the user is told when no place was found; if just one was asked, what that one said."""
    return last if last is not None and len(tried) == 1 else NoCapacity(NO_HOST)
