"""What all moves of a server have in common: a place, a share of it in exchange for the old one, and ports that follow.

The new place is claimed in the transaction that writes it down; what the server held until then is held by the
migration from there on, so that both hosts know what they owe until it is decided where the server stays.
"""

import logging
from typing import Any

import msgspec

from kilonova.conductor import ports, volumes, wishes
from kilonova.conductor.ports import Plugged
from kilonova.conductor.volumes import Connected
from kilonova.conductor.world import World
from kilonova.contracts.scheduler import Choose, Chosen
from kilonova.kit.db import Tx
from kilonova.kit.errors import NoCapacity, Trouble, Unavailable, Unsupported
from kilonova.kit.workflow import Run, effect, record
from kilonova.model.ask import ask
from kilonova.model.devices import Device
from kilonova.model.flavor import Flavor
from kilonova.model.host import Place
from kilonova.model.machine import Machine
from kilonova.model.plan import plan
from kilonova.model.seat import Seat
from kilonova.model.server import Plug, Server
from kilonova.store import hosts, migrations, placement, seats, server_groups, servers
from kilonova.store.migrations import Status

log = logging.getLogger(__name__)
TURNS = 10  # that places are asked for: claims may be lost to others
NO_HOST = "No valid host was found. There are not enough hosts available."


class Own(msgspec.Struct, frozen=True):
    """What comes along."""

    plugs: list[Plug]
    devices: list[Device]


def alone(run: Run, server: Server) -> Server:
    """The server as it is once nobody plugs or unplugs anything any more: its machine is planned of that."""
    run.when_alone()
    o = run(own, server.id)
    return msgspec.structs.replace(server, plugs=o.plugs, devices=o.devices)


@record
def own(tx: Tx, id: str) -> Own:
    s = servers.get(tx, id)
    return Own(s.plugs, s.devices)


class Goal(msgspec.Struct, frozen=True):
    """Where it goes. `epoch` is that of its machine there."""

    place: Place
    epoch: int
    seat: Seat | None = None


@effect
def home(world: World, key: str, host: str, node: str | None) -> Place:
    """The place of a host that we know by name: where it is, or was."""
    with world.db.read() as tx:
        zone = hosts.zones(tx).get(host, world.config.api.default_availability_zone)
        found = [n for n in hosts.nodes(tx, host=host) if node in (None, n.node)]
        return Place(host, found[0].node if found else node or host, found[0].uuid if found else "", zone)


@effect
def able(world: World, key: str, host: str, *messages: str) -> None:
    """It knows what it will be told, also to take something back. Raises Unsupported for a host of an older release."""
    with world.db.read() as tx:
        speaks = set(hosts.service_of(tx, host).speaks)
    if missing := set(messages) - speaks:
        raise Unsupported(f"The release of host {host} is too old for this.", why=f"no {', '.join(sorted(missing))}")


def choice(
    world: World, server: Server, flavor: Flavor, *, avoid: list[str], host: str | None, forced: bool, fresh: bool
) -> Chosen:
    """Where could it go, with this flavor? What it was asked to be, and near to whom, holds as on its first day."""
    wanted = ask(msgspec.structs.replace(server, flavor=flavor), host=host, forced=forced)
    wanted = wishes.of_living(world, msgspec.structs.replace(wanted, avoid=avoid), server)
    return world.choose(Choose(server=server.id, ask=wanted, most=world.config.scheduler.attempts, fresh=fresh))


def claimed(
    tx: Tx, server: Server, migration: str, place: Place, flavor: Flavor, now: float, status: Status, **facts: Any
) -> Goal:
    """A share of this place is the server's; what it held is its migration's. Raises NoCapacity."""
    server_groups.admit(tx, server, place.host, place.provider)
    placement.move(tx, server.id, migration, now=now)
    seat = seats.claim(tx, msgspec.structs.replace(server, flavor=flavor), place.provider, now=now, shared=place.shared)
    epoch = migrations.next_epoch(tx, server, migration)
    told = {"dest": place.host, "dest_node": place.node, "dest_ip": hosts.address(tx, place.host)} | facts
    migrations.change(tx, migration, now, status, **told)
    return Goal(place, epoch, seat)


def given_back(tx: Tx, server: Server, migration: str, now: float) -> None:
    """It stays where it was, and holds what it held there."""
    placement.release(tx, server.id, now=now)
    placement.move(tx, migration, server.id, now=now, type="INSTANCE")


class Joined(msgspec.Struct, frozen=True):
    """What leads into the machine from outside: its ports and its volumes, as they are on one host."""

    plugged: Plugged = Plugged()
    connected: Connected | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """As the server's row has them."""
        return {"plugs": self.plugged.plugs} | ({"devices": self.connected.devices} if self.connected else {})


def machine(server: Server, goal: Goal, joined: Joined, **more: Any) -> Machine:
    """The whole machine as it shall be there."""
    there, plugged, connected = server, joined.plugged, joined.connected
    there = msgspec.structs.replace(there, plugs=plugged.plugs)
    if connected:
        there = msgspec.structs.replace(there, devices=connected.devices)
        more["connections"] = connected.connections
    return plan(
        there, nics=plugged.nics, number=server.number, epoch=goal.epoch, seat=goal.seat, zone=goal.place.zone, **more
    )


def carry(run: Run, server: Server, to: Place) -> Connected | None:
    """Its volumes can be used there as well."""
    return run(volumes.carry, server, to.host) if server.has_volumes else None


def carried(run: Run, joined: Joined) -> None:
    if joined.connected:
        run(volumes.complete, volumes.attachments_of(joined.connected.devices))


def carried_at_last(run: Run, joined: Joined) -> None:
    """The same, after the point of no return."""
    try:
        carried(run, joined)
    except Trouble:
        pass


def left(run: Run, server: Server, joined: Joined) -> None:
    """The ways of its volumes to where it was; after the point of no return. What is left is found by comparing."""
    if joined.connected:
        try:
            run(volumes.leave, volumes.attachments_of(server.devices))
        except Trouble:
            pass


@effect
def rebind(world: World, key: str, server: Server, to: Place, back: Place) -> Plugged:
    """Its ports are there."""
    return ports.rebind(world, server, to)


@rebind.undo
def _(world: World, key: str, server: Server, to: Place, back: Place) -> None:
    """A network service may have no wires on a host that is down: its ports are looked at again (`watch.strays`)."""
    try:
        ports.rebind(world, server, back)
    except Unavailable:
        raise
    except Trouble as e:
        log.warning("ports of %s are not back on %s: %s", server.id, back.host, e.said)


def nowhere(last: Trouble | None, tried: list[str], chosen: Chosen) -> Trouble:
    """What the user is told when no place was found; if just one was asked, what that one said. Operators hear why."""
    if last is not None and len(tried) == 1:
        return last
    said = f" Last trouble: {last.said}" if last is not None else ""
    return NoCapacity(NO_HOST, detail=f"{NO_HOST} {chosen.explained()}{said}")
