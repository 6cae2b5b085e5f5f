"""Images of servers: createImage, createBackup. The record is made here, with the caller's own right; a run brings the bytes."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kilonova.api import capture_volumes
from kilonova.api.allowance import allowance, at_most
from kilonova.api.bodies import Digits, Metadata, Name
from kilonova.api.registry import R, World, cause, the_server
from kilonova.contracts.jobs import Capture
from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid
from kilonova.kit.routes import Call, Reply
from kilonova.kit.workflow import start
from kilonova.model import capture
from kilonova.model.server import Server
from kilonova.model.states import VERBS, Verb
from kilonova.store import servers


class Snapshot(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    metadata: Metadata = {}


@R.post("/v2.1/servers/{id}/action", action="createImage", ok=202, body=Snapshot,
        policy="os_compute_api:servers:create_image", late=True)  # fmt: skip
def create_image(call: Call, id: str) -> Reply:
    return _answer(call, _captured(call, id, call.body.name, call.body.metadata, VERBS["snapshot"], "snapshot"))


class Backup(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    backup_type: str
    rotation: Annotated[int, Meta(ge=0, le=2**31 - 1)] | Digits
    metadata: Metadata = {}


@R.post("/v2.1/servers/{id}/action", action="createBackup", ok=202, body=Backup,
        policy="os_compute_api:os-create-backup", late=True)  # fmt: skip
def create_backup(call: Call, id: str) -> Reply:
    """Of the backups of one type the newest `rotation` are kept; with 0 not even this one."""
    wish: Backup = call.body
    kind, rotation = wish.backup_type, int(wish.rotation)
    image_id = _captured(call, id, wish.name, wish.metadata, VERBS["backup"], "backup", kind, rotation)
    return _answer(call, image_id, shown=rotation > 0)


def _answer(call: Call, image_id: str, *, shown: bool = True) -> Reply:
    """Until 2.44 the image's address, since then its id."""
    if call.version >= 45:
        return Reply({"image_id": image_id})
    prefix = call.world.config.api.image_link_prefix or f"{call.url.removesuffix('/compute')}/image"
    return Reply(headers={"Location": f"{prefix.rstrip('/')}/images/{image_id}"} if shown else {})


def _captured(
    call: Call,
    id: str,
    name: str,
    metadata: dict[str, str],
    verb: Verb,
    kind: Literal["snapshot", "backup"],
    backup_type: str | None = None,
    rotation: int = 0,
) -> str:
    """State first, so that a refusal leaves no image; then the record; then the claim and its run in one transaction."""
    world: World = call.world
    check_metadata(call, metadata)
    with world.db.read() as tx:
        server = the_server(call, tx, id)
    if server.volume_backed and kind == "backup":
        raise Invalid("Backup is not supported for volume-backed instances.")
    servers.check(server, verb)
    if server.volume_backed:
        capture_volumes.may(call, server)
    else:
        capture_volumes.held_still(server)
    run = world.ids.uuid()
    more = {} if backup_type is None else {"backup_type": backup_type}
    image_id = new_image(call, server, name, run=run, kind=kind, said=metadata, more=more)
    if server.volume_backed:
        capture_volumes.captured(call, server, run, image_id, name)
        world.wake(run)
        return image_id

    def record(tx: Tx) -> None:
        now = world.clock.now()
        taken = servers.begin(tx, id, verb, now)
        job = Capture(
            server=taken,
            image_id=image_id,
            disk_format=capture.disk_format(taken),
            backup_type=backup_type,
            rotation=rotation,
        )
        start(tx, "capture", job, id=run, subject=id, now=now, cause=cause(call, verb.action))

    begun(call, image_id, record)
    world.wake(run)
    return image_id


def check_metadata(call: Call, metadata: dict[str, str]) -> None:
    """Raises OverQuota; since 2.39 that is the image service's business."""
    if call.version < 39:
        said = f"Maximum number of metadata items exceeds {call.world.config.quota.metadata_items}"
        at_most(allowance(call), "metadata_items", len(metadata), said)


def new_image(call: Call, server: Server, name: str, **about: Any) -> str:
    """A record without bytes, made with the caller's right to make images. Raises what the image service says."""
    user, project = call.context.user_id, call.context.project_id or ""
    wish = capture.record(server, name, user_id=user, project_id=project, **about)
    made: str = call.world.neighbours.image.create(call.context.token, **wish).id
    return made


def begun(call: Call, image_id: str | None, record: Any) -> None:
    """The transaction; where it is refused, the image goes again. (Where we die meanwhile, a reconciler finds it.)"""
    try:
        call.world.db.run(record)
    except Exception:
        if image_id is not None:
            call.world.neighbours.image.delete(image_id)
        raise
