"""Delete: waits until nothing else is at work on the server, then takes everything back.

It may overtake anything; whoever asked for it has called "abort" to those who are at work.  What is on a host
that is gone is swept when the host returns.
"""

import logging
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec

from kilonova.conductor import ports, shares, volumes
from kilonova.conductor.capture import put_down
from kilonova.conductor.world import World
from kilonova.contracts.compute import Destroy, Done, Power, Unrescue
from kilonova.contracts.jobs import Delete, Restore, SoftDelete
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, HostGone, Trouble, Unavailable
from kilonova.kit.reconcile import reconciler
from kilonova.kit.workflow import FOREVER, Run, command, effect, record, start, workflow
from kilonova.model.capture import SHELVED, SHELVED_IMAGE
from kilonova.model.server import Server
from kilonova.model.shares import Sharing
from kilonova.model.states import VERBS, VM, PowerState
from kilonova.store import compare, migrations, placement, servers
from kilonova.store import shares as shared
from kilonova.store.migrations import Kind, Status

log = logging.getLogger(__name__)


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
    for share in found.shares:
        run(shares.let_out, share)
    if found.image is not None:
        run(forget_image, found.image)
    run(deleted, server, run.now)


class Standing(msgspec.Struct, frozen=True):
    """`doomed` are the volumes that are to go with it; `kept` other hosts where a machine of it lies, since a move that is not decided; `image` is what it was shelved as."""

    host: str | None
    volumes: bool = False
    doomed: list[str] = []
    kept: list[str] = []
    image: str | None = None
    shares: list[Sharing] = []


@record
def standing(tx: Tx, id: str) -> Standing:
    """Where it is and what it has, now that nobody changes it."""
    s = servers.get(tx, id)
    doomed = [d.volume_id for d in s.devices if d.is_volume and d.volume_id and d.delete_on_termination]
    others = {m.source for m in migrations.holding(tx, id) if m.type != Kind.evacuation and m.source} - {s.host}
    image = s.system_metadata.get(SHELVED_IMAGE)
    return Standing(s.host, s.has_volumes, doomed, sorted(others), image, shared.of(tx, id))


@command(patience_s=FOREVER, event="compute_terminate_instance")
def destroy(id: str, host: str) -> To[Done]:
    return To(host, Destroy(server=id))


@effect(patience_s=FOREVER)
def unplug(world: World, key: str, id: str) -> None:
    ports.release(world, id)


@effect(patience_s=FOREVER)
def forget_image(world: World, key: str, image_id: str) -> None:
    """What it was shelved as. One that somebody protected stays."""
    try:
        world.neighbours.image.delete(image_id)
    except Unavailable:
        raise
    except Trouble as e:
        log.warning("image %s cannot be deleted: %s", image_id, e.said)


@record
def deleted(tx: Tx, server: Server, now: float) -> None:
    placement.release(tx, server.id, now=now)
    for m in migrations.holding(tx, server.id):
        placement.release(tx, m.uuid, now=now)
        migrations.change(tx, m.uuid, now, ENDS.get(Status(m.status), Status.error))
    for share in shared.of(tx, server.id):
        shared.remove(tx, share.uuid)
    gone: dict[str, Any] = {"host": None, "node": None, "power_state": 0, "terminated_at": now, "deleted_at": now}
    gone |= {"devices": []} if server.devices else {}
    servers.finish(tx, server, VM.deleted, now, **gone)


# What becomes of a move whose server is deleted: one that waited for a word is as good as confirmed.
ENDS = {Status.finished: Status.confirmed, Status.done: Status.completed}


@record
def undeleted(tx: Tx, server: Server, run: str, now: float) -> None:
    """Something refuses to go: it can be deleted again."""
    servers.finish(tx, server, VM.error, now, fault_run=run)


# ---- where deleted servers can be restored


@workflow
def soft_delete(run: Run, job: SoftDelete) -> None:
    """Off, and out of sight. A guest that is rescued is itself again first: what is restored runs its own system."""
    server = job.server
    run.if_undone(undeleted, server, run.id, run.now)
    run.when_alone()
    found = run(standing, server.id)
    if found.host is not None:
        try:
            if server.vm_state == VM.rescued:
                run(unrescue, server.id, found.host)
            run(turn_off, server.id, found.host)
        except HostGone:
            pass  # it is compared when it returns
    if found.image is not None:
        run(forget_image, found.image)
    run(soft_deleted, server, run.now)


@command(patience_s=600)
def unrescue(id: str, host: str) -> To[Done]:
    return To(host, Unrescue(server=id))


@command(patience_s=600, event="compute_soft_delete_instance")
def turn_off(id: str, host: str) -> To[Done]:
    return To(host, Power(server=id, to="stop", timeout_s=0))


@record
def soft_deleted(tx: Tx, server: Server, now: float) -> None:
    told = servers.held(tx, server.id).system_metadata
    left = {k: v for k, v in told.items() if k not in SHELVED}
    facts: dict[str, Any] = {"power_state": int(PowerState.shutdown), "terminated_at": now, "system_metadata": left}
    servers.finish(tx, server, VM.soft_deleted, now, **facts)


@workflow
def restore(run: Run, job: Restore) -> None:
    s = job.server
    run.if_undone(put_down, s, VM.soft_deleted, run.id, run.now)
    done = run(turn_on, s.id, s.host or "")
    run(restored, s, done.power_state, run.now)


@command(patience_s=600, event="compute_restore_instance")
def turn_on(id: str, host: str) -> To[Done]:
    return To(host, Power(server=id, to="start"))


@record
def restored(tx: Tx, server: Server, power_state: int, now: float) -> None:
    servers.finish(tx, server, VM.active, now, power_state=power_state, terminated_at=None)


@reconciler(every_s=60)
def reclaimed(world: World) -> list[str]:
    """Servers that were soft-deleted so long ago that nobody will restore them."""
    after_s = world.config.compute.reclaim_interval_s
    if not after_s:
        return []
    now = world.clock.now()
    with world.db.read() as tx:
        found = [s for s in compare.resting(tx, VM.soft_deleted) if (s.terminated_at or 0) < now - after_s]
    said = []
    for s in found:
        try:
            world.started([world.db.run(_begun, world, s, now)])
        except Conflict:
            continue  # somebody was at it first
        said.append(f"{s.id} was deleted {after_s} s ago, and is gone for good")
    return said


def _begun(tx: Tx, world: World, server: Server, now: float) -> str:
    """In the state in which it was found: who restores it at the same time is first or second."""
    verb = replace(VERBS["delete"], start=frozenset({VM.soft_deleted}), over=frozenset())
    job = Delete(servers.begin(tx, server.id, verb, now))
    return start(tx, delete, job, id=world.ids.uuid(), subject=server.id, now=now)
