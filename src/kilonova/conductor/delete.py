"""Delete: waits until nothing else is at work on the server, then takes everything back.

It may overtake anything; whoever asked for it has called "abort" to those who are at work.  What is on a host
that is gone is swept when the host returns.
"""

import msgspec

from kilonova.conductor import ports
from kilonova.conductor.world import World
from kilonova.contracts.compute import Destroy, Done
from kilonova.contracts.jobs import Delete
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import HostGone
from kilonova.kit.workflow import FOREVER, Run, command, effect, record, workflow
from kilonova.model.server import Server
from kilonova.model.states import VM
from kilonova.store import placement, servers


@workflow
def delete(run: Run, job: Delete) -> None:
    server = job.server
    run.if_undone(undeleted, server, run.id, run.now)
    run.when_alone()
    host = run(standing, server.id).host
    if host is not None:
        try:
            run(destroy, server.id, host)
        except HostGone:
            pass
    run(unplug, server.id)
    run(deleted, server, run.now)


class Standing(msgspec.Struct, frozen=True):
    host: str | None


@record
def standing(tx: Tx, id: str) -> Standing:
    """Where it is, now that nobody moves it."""
    return Standing(servers.get(tx, id).host)


@command(patience_s=FOREVER, event="compute_terminate_instance")
def destroy(id: str, host: str) -> To[Done]:
    return To(host, Destroy(server=id))


@effect(patience_s=FOREVER)
def unplug(world: World, key: str, id: str) -> None:
    ports.release(world, id)


@record
def deleted(tx: Tx, server: Server, now: float) -> None:
    placement.release(tx, server.id, now=now)
    gone = {"host": None, "node": None, "power_state": 0, "terminated_at": now, "deleted_at": now}
    servers.finish(tx, server, VM.deleted, now, **gone)


@record
def undeleted(tx: Tx, server: Server, run: str, now: float) -> None:
    """Something refuses to go: it can be deleted again."""
    servers.finish(tx, server, VM.error, now, fault_run=run)
