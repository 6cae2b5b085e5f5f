"""Delete: waits until nothing else is at work on the server, then takes everything back.

It may overtake anything; whoever asked for it has called "abort" to those who are at work.  What is on a host
that is gone is swept when the host returns.
"""

from contextlib import suppress
from typing import Any

import msgspec

from kilonova.conductor import ports, volumes
from kilonova.conductor.world import World
from kilonova.contracts.compute import Destroy, Done
from kilonova.contracts.jobs import Delete
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import HostGone, Trouble
from kilonova.kit.workflow import FOREVER, Run, command, effect, record, workflow
from kilonova.model.server import Server
from kilonova.model.states import VM
from kilonova.store import migrations, placement, servers
from kilonova.store.migrations import Kind, Status


@workflow
def delete(run: Run, job: Delete) -> None:
    server = job.server
    run.if_undone(undeleted, server, run.id, run.now)
    run.when_alone()
    found = run(standing, server.id)
    for host in [*([found.host] if found.host is not None else []), *found.kept]:
        try:
            run(destroy, server.id, host)
        except HostGone:
            pass
    run(unplug, server.id)
    if found.volumes:
        run(volumes.release, server.id)
        for id in found.doomed:
            with suppress(Trouble):  # it is the user's then, and he can see it
                run(volumes.erase, id)
    run(deleted, server, run.now)


class Standing(msgspec.Struct, frozen=True):
    """`doomed` are the volumes that are to go with it; `kept` other hosts where a machine of it lies, since a move that is not decided."""

    host: str | None
    volumes: bool = False
    doomed: list[str] = []
    kept: list[str] = []


@record
def standing(tx: Tx, id: str) -> Standing:
    """Where it is and what it has, now that nobody changes it."""
    s = servers.get(tx, id)
    doomed = [d.volume_id for d in s.devices if d.is_volume and d.volume_id and d.delete_on_termination]
    others = {m.source for m in migrations.holding(tx, id) if m.type != Kind.evacuation and m.source} - {s.host}
    return Standing(s.host, volumes.has_volumes(s), doomed, sorted(others))


@command(patience_s=FOREVER, event="compute_terminate_instance")
def destroy(id: str, host: str) -> To[Done]:
    return To(host, Destroy(server=id))


@effect(patience_s=FOREVER)
def unplug(world: World, key: str, id: str) -> None:
    ports.release(world, id)


@record
def deleted(tx: Tx, server: Server, now: float) -> None:
    placement.release(tx, server.id, now=now)
    for m in migrations.holding(tx, server.id):
        placement.release(tx, m.uuid, now=now)
        migrations.change(tx, m.uuid, now, ENDS.get(Status(m.status), Status.error))
    gone: dict[str, Any] = {"host": None, "node": None, "power_state": 0, "terminated_at": now, "deleted_at": now}
    gone |= {"devices": []} if server.devices else {}
    servers.finish(tx, server, VM.deleted, now, **gone)


# What becomes of a move whose server is deleted: one that waited for a word is as good as confirmed.
ENDS = {Status.finished: Status.confirmed, Status.done: Status.completed}


@record
def undeleted(tx: Tx, server: Server, run: str, now: float) -> None:
    """Something refuses to go: it can be deleted again."""
    servers.finish(tx, server, VM.error, now, fault_run=run)
