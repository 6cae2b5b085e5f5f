"""After the network service changed something of a server: what we show of it is asked anew."""

from collections.abc import Iterable

from kilonova.api.registry import World
from kilonova.contracts.jobs import Readdress
from kilonova.kit.db import Tx
from kilonova.kit.routes import Call
from kilonova.kit.workflow import start
from kilonova.store import servers


def readdressed(call: Call, ids: Iterable[str]) -> None:
    """Of these servers; ids that are no living server of ours are nobody's concern."""
    world: World = call.world

    def record(tx: Tx) -> list[str]:
        alive = [s.id for s in servers.find(tx, set(ids)).values() if s.deleted_at is None]
        now = world.clock.now()
        return [start(tx, "readdress", Readdress(id), id=world.ids.uuid(), subject=id, now=now) for id in alive]

    for run in world.db.run(record):
        world.wake(run)
