"""An image of a server whose root disk is a volume: its snapshots are waited for, then the image tells of them.

It has no bytes of its own.  Whatever goes wrong, snapshots and image go.
"""

from kilonova.clients.volume import snapshots_dropped
from kilonova.conductor.capture import captured, drop_image, put_down
from kilonova.conductor.world import World
from kilonova.contracts.jobs import CaptureVolumes
from kilonova.kit.errors import Conflict, NotFound, Unavailable
from kilonova.kit.workflow import FOREVER, Run, effect, workflow

WAIT_S = 6 * 3600.0  # a volume service that copies takes its time


@workflow
def capture_volumes(run: Run, job: CaptureVolumes) -> None:
    was = job.server.vm_state
    run.if_undone(put_down, job.server, was, run.id, run.now)
    run.if_undone(drop_image, job.image_id)
    run(made, job.image_id)
    for id in job.snapshots:
        run(there, id)
    root = next((d.name for d in job.server.devices if d.boot_index == 0 and d.name), "/dev/vda")
    run(told, job.image_id, job.mapping, root)
    run.no_return()
    for id in job.snapshots:
        run(hand_over, id)
    run(captured, job.server, was, run.now)


@effect
def made(world: World, key: str, image_id: str) -> None:
    """They are, by the request; this is where that is undone."""


@made.undo
def _(world: World, key: str, image_id: str) -> None:
    snapshots_dropped(world.neighbours.volume, image_id)


@effect(patience_s=WAIT_S, event="api_snapshot_instance")
def there(world: World, key: str, snapshot: str) -> None:
    try:
        found = world.neighbours.volume.snapshot(snapshot)
    except NotFound:
        raise Conflict(f"Snapshot {snapshot} could not be found.") from None
    if found.status == "creating":
        raise Unavailable(f"Snapshot {snapshot} is still being made.")
    if found.status != "available":
        raise Conflict(f"Snapshot {snapshot} could not be made: it is in status {found.status}.")


@effect
def told(world: World, key: str, image_id: str, mapping: str, root: str) -> None:
    """The image says what it is made of; then it is active, though it is empty."""
    facts = {"block_device_mapping": mapping, "bdm_v2": "True", "root_device_name": root}
    try:
        if world.neighbours.image.show(image_id).status == "active":
            return
        world.neighbours.image.change(image_id, [{"op": "add", "path": f"/{k}", "value": v} for k, v in facts.items()])
        world.neighbours.image.upload(image_id, iter(()))
    except NotFound:
        raise Conflict(f"Image {image_id} could not be found.") from None


@effect(patience_s=FOREVER)
def hand_over(world: World, key: str, snapshot: str) -> None:
    """It is the user's like any other from now on: our mark goes."""
    world.neighbours.volume.unmark_snapshot(snapshot)
