"""One name, one machine: hosts are known by the identity in their state directory; who takes another's name is told so."""

import logging

from kilonova.conductor.world import World
from kilonova.contracts.compute import Met
from kilonova.contracts.conductor import Greeting, Report, alone
from kilonova.kit.bus import letter
from kilonova.store import hosts

log = logging.getLogger(__name__)

TAKEN = (
    "Another machine is known as {name}; two cannot have one name. Give this one another ([compute] host). If it takes the "
    "other's place, or lost its state directory, evacuate that one's servers and delete its compute service: then it comes in."
)


def greeted(world: World, m: Greeting) -> None:
    """A host asks whether it is known. Nothing is written: with its first report it is."""
    with world.db.read() as tx:
        known = hosts.identities(tx, m.hosts)
    others = sorted(name for name, identity in known.items() if identity not in ("", m.identity))
    why = TAKEN.format(name=others[0]) if others else ""
    if why:
        log.error("a machine that is not %s says that it is: it gets no commands", others[0])
    world.send(alone(m.identity), letter(Met(m.life, why)))


def another(world: World, r: Report) -> bool:
    """Is it somebody else than who is known under that name? Then it is told so; what it says counts for nothing."""
    with world.guard:
        if not r.identity or world.identities.get(r.host) == r.identity:
            return False
    with world.db.read() as tx:
        known = hosts.identities(tx, [r.host]).get(r.host, "")
    if known in ("", r.identity):
        with world.guard:
            if known:
                world.identities[r.host] = known
        return False
    turn_away(world, r)
    return True


def turn_away(world: World, r: Report) -> None:
    log.error("a machine that is not %s says that it is: what it says is not believed", r.host)
    world.send(alone(r.identity), letter(Met("", TAKEN.format(name=r.host))))
