"""Capture: the host freezes a copy of the disk and uploads it; the image's record was made by who asked.

Whatever goes wrong, the image goes as well and the server is as it was.  A copy on a host that is gone is found by its
next report (`watch.py`), an image whose run is over and that has no bytes by `unfinished`.
"""

import logging
from collections.abc import Iterator

from kilonova.clients import ImageInfo
from kilonova.clients.volume import snapshots_dropped
from kilonova.conductor.world import World
from kilonova.contracts.compute import Abandon, Discard, Done, Freeze, Upload
from kilonova.contracts.jobs import Capture
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import Forbidden, Trouble, Unavailable
from kilonova.kit.reconcile import reconciler
from kilonova.kit.workflow import Run, Step, command, effect, record, workflow
from kilonova.model.capture import MARK
from kilonova.model.server import Server
from kilonova.model.states import VM, Task
from kilonova.store import compare, servers

log = logging.getLogger(__name__)
UNFINISHED_S = 120.0  # so long an image may be there before its run is


@workflow
def capture(run: Run, job: Capture) -> None:
    server, was = job.server, job.server.vm_state
    assert server.host is not None
    backup = job.backup_type is not None
    run.if_undone(put_down, server, was, run.id, run.now)
    run.if_undone(drop_image, job.image_id)
    if not backup:
        run(on_its_way, server, Task.image_snapshot, run.now)
    run(freeze_of(backup), server, server.host, job.image_id, job.disk_format)
    run(on_its_way, server, Task.image_pending_upload, run.now)
    run(on_its_way, server, Task.image_uploading, run.now)
    run(upload_of(backup), server, server.host, job.image_id)
    run.no_return()
    if backup:
        run(rotate, server, job.backup_type or "", job.rotation)
    run(captured, server, was, run.now)


@record
def put_down(tx: Tx, server: Server, to: VM, run: str, now: float) -> None:
    servers.finish(tx, server, to, now, fault_run=run)


@record
def on_its_way(tx: Tx, server: Server, task: Task, now: float) -> None:
    servers.step(tx, server, str(task), now)


@record
def captured(tx: Tx, server: Server, was: VM, now: float) -> None:
    servers.finish(tx, server, was, now)


# ---- on the host


def _steps(event: str) -> tuple[Step[[Server, str, str, str], Done], Step[[Server, str, str], Done]]:
    """The two commands; what users call them depends on what they are for."""

    @command(event=event)
    def freeze(server: Server, host: str, image_id: str, disk_format: str) -> To[Done]:
        return To(host, Freeze(server=server.id, image_id=image_id, disk_format=disk_format))  # type: ignore[arg-type]

    @freeze.undo
    def _(server: Server, host: str, image_id: str, disk_format: str) -> To[Done]:
        return To(host, Discard(server=server.id, image_id=image_id))

    @freeze.on("abort")
    def _(server: Server, host: str, image_id: str, disk_format: str) -> To[Done]:
        return To(host, Abandon(server=server.id))

    @command(patience_s=6 * 3600, event=event)
    def upload(server: Server, host: str, image_id: str) -> To[Done]:
        return To(host, Upload(server=server.id, image_id=image_id))

    @upload.on("abort")
    def _(server: Server, host: str, image_id: str) -> To[Done]:
        return To(host, Abandon(server=server.id))

    return freeze, upload


STEPS = {kind: _steps(f"compute_{kind}_instance") for kind in ("snapshot", "backup", "shelve")}


def freeze_of(backup: bool) -> Step[[Server, str, str, str], Done]:
    return STEPS["backup" if backup else "snapshot"][0]


def upload_of(backup: bool) -> Step[[Server, str, str], Done]:
    return STEPS["backup" if backup else "snapshot"][1]


# ---- in the image service


@effect
def drop_image(world: World, key: str, image_id: str) -> None:
    """Nothing there: done. What its owner protected meanwhile stays."""
    try:
        world.neighbours.image.delete(image_id)
    except Unavailable:
        raise
    except Trouble as e:
        log.warning("image %s cannot be deleted: %s", image_id, e.said)


@effect
def rotate(world: World, key: str, server: Server, backup_type: str, rotation: int) -> None:
    """Of the backups of this type the newest so many stay. A backup that will not go does not spoil the new one."""
    for old in list(_backups(world, server, backup_type))[rotation:]:
        try:
            world.neighbours.image.delete(old.id)
        except Unavailable:
            raise
        except Trouble as e:
            log.warning("backup %s of %s cannot be deleted: %s", old.id, server.id, e.said)


def _backups(world: World, server: Server, backup_type: str) -> Iterator[ImageInfo]:
    """The newest first, as the service sorts them: it tells moments by the second only.

    Anybody may say anything in an image's properties: only those of the server's project are taken for its backups.
    """
    about = {"image_type": "backup", "backup_type": backup_type, "instance_uuid": server.id}
    found = world.neighbours.image.list(sort="created_at:desc", status="active", owner=server.project_id, **about)
    return (i for i in found if i.owner == server.project_id)


@reconciler(every_s=120)
def unfinished(world: World) -> list[str]:
    """Images of ours without bytes, and nobody brings them: who asked died before its run began, or answered too late."""
    said = []
    for image in without_bytes(world):
        try:
            snapshots_dropped(world.neighbours.volume, image.id)
            world.neighbours.image.delete(image.id)
        except Unavailable as e:
            log.info("image %s stays for now: %s", image.id, e.said)
            continue
        except Forbidden as e:
            log.info("image %s stays: %s", image.id, e.said)
            continue
        said.append(f"image {image.id} had no bytes, and nobody was bringing them")
    return said


def without_bytes(world: World) -> list[ImageInfo]:
    """Those of `unfinished`."""
    before = world.clock.now() - UNFINISHED_S
    made = [
        image
        for status in ("queued", "saving")
        for kind in ("snapshot", "backup")
        for image in world.neighbours.image.list(status=status, image_type=kind)
        if image.created_at < before and MARK in image.properties
    ]
    if not made:
        return []
    with world.db.read() as tx:
        known = compare.running(tx, {i.properties[MARK] for i in made})
    return [image for image in made if image.properties[MARK] not in known]
