"""Snapshots that the volume service cannot make alone: a host goes on in another file, or brings two together.

What became of it is the status of the snapshot.  "creating" and "deleting" at 90 % say that our part is done; the rest is
the volume service's (Block Storage API, os-update_snapshot_status).
"""

import msgspec

from kilonova.conductor.world import World
from kilonova.contracts.compute import Done
from kilonova.contracts.compute import MergeVolume as Merge
from kilonova.contracts.compute import SnapshotVolume as Branch
from kilonova.contracts.jobs import MergeVolume, SnapshotVolume
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict
from kilonova.kit.workflow import FOREVER, Run, command, effect, record, workflow
from kilonova.store import block_devices, servers


@workflow
def snapshot_volume(run: Run, job: SnapshotVolume) -> None:
    run.if_undone(told, job.snapshot_id, "error")
    run.when_alone()
    at = run(place, job.server.id, job.volume_id)
    run(branch, job, at.host)
    run.no_return()
    run(told, job.snapshot_id, "creating")


@workflow
def merge_volume(run: Run, job: MergeVolume) -> None:
    run.if_undone(told, job.snapshot_id, "error_deleting")
    run.when_alone()
    at = run(place, job.server.id, job.volume_id)
    run(merge, job, at.host)
    run.no_return()
    run(told, job.snapshot_id, "deleting")


class At(msgspec.Struct, frozen=True):
    host: str


@record
def place(tx: Tx, id: str, volume: str) -> At:
    """Where it is, now that nobody moves it. Raises Conflict where it has no such volume on a host any longer."""
    s = servers.get(tx, id)
    if s.deleted_at is not None or s.host is None or block_devices.of_volume(s, volume) is None:
        raise Conflict(f"Instance {id} does not have the volume {volume} on a host any longer.")
    return At(s.host)


@command(patience_s=600)
def branch(job: SnapshotVolume, host: str) -> To[Done]:
    return To(host, Branch(server=job.server.id, volume_id=job.volume_id, new_file=job.new_file))


@command(patience_s=6 * 3600)
def merge(job: MergeVolume, host: str) -> To[Done]:
    return To(host, Merge(server=job.server.id, volume_id=job.volume_id, file=job.file, into=job.into))


@effect(patience_s=FOREVER)
def told(world: World, key: str, snapshot: str, status: str) -> None:
    """A snapshot that is no more need not be told of."""
    world.neighbours.volume.tell_snapshot(snapshot, status, "90%")
