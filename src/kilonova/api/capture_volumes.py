"""createImage where the root disk is a volume: snapshots of its volumes, and an image that tells of them.

Image and snapshots are made here, in the caller's name; they are whose he is, and count as his.  Each snapshot says of
which image it is until all is done: so whoever finds an image that nobody works at (`conductor.capture.unfinished`) finds
what was made for it.
"""

import msgspec

from kilonova.api.registry import World, cause, owner
from kilonova.clients.volume import MADE_OF, snapshots_dropped
from kilonova.contracts.jobs import CaptureVolumes
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, Trouble
from kilonova.kit.routes import Call
from kilonova.kit.workflow import start
from kilonova.model import capture
from kilonova.model.devices import Device
from kilonova.model.server import Server
from kilonova.model.states import VERBS, VM
from kilonova.store import servers

RULE = "os_compute_api:servers:create_image:allow_volume_backed"


def captured(call: Call, server: Server, run: str, image_id: str, name: str) -> None:
    """Begin it. Raises what the volume service says; then nothing of it is left."""
    world: World = call.world
    try:
        taken = {d.volume_id or "": _snapshot(call, d.volume_id or "", image_id, name) for d in volumes_of(server)}
        mapping = msgspec.json.encode(capture.mapping(server, taken)).decode()

        def record(tx: Tx) -> None:
            now = world.clock.now()
            mine = servers.begin(tx, server.id, VERBS["snapshot"], now)
            if {d.volume_id for d in volumes_of(mine)} != set(taken):
                raise Conflict(f"The volumes of instance {server.id} have changed meanwhile.")
            ids = [id for id, _ in taken.values()]
            job = CaptureVolumes(mine, image_id, ids, mapping)
            who = cause(call, VERBS["snapshot"].action)
            start(tx, "capture_volumes", job, id=run, subject=server.id, now=now, cause=who)

        world.db.run(record)
    except Exception:
        _drop(world, image_id)
        raise


def may(call: Call, server: Server) -> None:
    """Raises Forbidden; Invalid where its guest would have to hold still, which none of our hosts can ask of it."""
    call.check(owner(server), RULE)
    held_still(server)


def held_still(server: Server) -> None:
    """Raises Invalid for an image that must only be made of a guest that has written everything down."""
    if server.vm_state == VM.active and server.image.properties.get("os_require_quiesce", "").lower() in TRUE:
        raise Invalid(
            f"Quiescing is not supported in instance {server.id}: The hypervisor cannot ask its guest to write everything "
            "down. Stop it first."
        )


TRUE = frozenset({"1", "t", "true", "on", "y", "yes"})


def volumes_of(server: Server) -> list[Device]:
    return [d for d in server.devices if d.is_volume and d.busy != "detaching"]


def _snapshot(call: Call, volume: str, image_id: str, name: str) -> tuple[str, int]:
    made = call.world.neighbours.volume.create_snapshot(
        volume, name=f"snapshot for {name}"[:255], metadata={MADE_OF: image_id}, token=call.context.token
    )
    return made.id, made.size_gb


def _drop(world: World, image_id: str) -> None:
    """What cannot be dropped now is by a conductor: the image stays so long, and leads to it."""
    try:
        snapshots_dropped(world.neighbours.volume, image_id)
        world.neighbours.image.delete(image_id)
    except Trouble:
        pass
