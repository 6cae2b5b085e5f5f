"""What the API shows of a server's addresses, asked anew when the network service says that it changed."""

from typing import Protocol

from kilonova.conductor import ports
from kilonova.conductor.world import World
from kilonova.contracts.jobs import Readdress
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.db import Db, Tx
from kilonova.kit.workflow import Run, effect, record, start, workflow
from kilonova.model.server import Plug
from kilonova.store import servers


@workflow
def readdress(run: Run, job: Readdress) -> None:
    """Alone with the server: a build or a deletion writes its ports itself."""
    run.when_alone()
    plugs = run(seen, job.server)
    run(written, job.server, plugs, run.now)


@effect
def seen(world: World, key: str, server: str) -> list[Plug]:
    with world.db.read() as tx:
        s = servers.get(tx, server)
    known = {p.port_id: p for p in s.plugs}
    found = {p.id: p for p in world.neighbours.network.ports(servers=[server]) if p.id in known}
    order = [id for id in known if id in found]
    return ports.described(world, s, [found[id] for id in order], [known[id].tag for id in order], every=True).plugs


@record
def written(tx: Tx, server: str, plugs: list[Plug], now: float) -> None:
    """A server that is gone meanwhile needs no addresses."""
    if servers.get(tx, server).deleted_at is None:
        servers.change(tx, server, now, plugs=plugs)


class Starts(Protocol):
    """Who can begin runs: a conductor's world, or a process that has none."""

    @property
    def db(self) -> Db: ...

    @property
    def clock(self) -> Clock: ...

    @property
    def ids(self) -> Ids: ...

    def started(self, runs: list[str]) -> None: ...


def changed(world: Starts, ids: set[str]) -> None:
    """The addresses of these servers are others now; ids that are no servers of ours are nobody's concern."""

    def begin(tx: Tx) -> list[str]:
        now = world.clock.now()
        alive = [s for s in servers.find(tx, ids).values() if s.deleted_at is None and s.plugs]
        return [start(tx, readdress, Readdress(s.id), id=world.ids.uuid(), subject=s.id, now=now) for s in alive]

    world.started(world.db.run(begin))
