"""What is done with a volume: extended, uploaded, retyped, marked; and the elder ways to attach one."""

import logging
from contextlib import suppress
from typing import Annotated as A
from typing import Any, Literal

import msgspec
from msgspec import Meta

from kilonova.companions.trust import serving
from kilonova.companions.volume import attachments, frame, quotas, types
from kilonova.companions.volume.attachments import settle
from kilonova.companions.volume.frame import Flag, Metadata, Name, R, View, invalid_volume
from kilonova.companions.volume.volumes import (
    bytes_of,
    described,
    fits,
    got,
    got_to_change,
    image_of,
    remove,
    whose,
)
from kilonova.companions.volume.world import World, act, begin, end
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Forbidden, Invalid, NotFound, OverQuota, Trouble, Unsupported
from kilonova.kit.routes import Call, Reply
from kilonova.kit.versions import since
from kilonova.model.machine import ImageSource
from kilonova.store import volumes as store
from kilonova.store.volumes import Act, Attachment, Snapshot, Volume

logger = logging.getLogger(__name__)

PATH = "/v3/volumes/{id}/action"
ACTIONS = "volume_extension:volume_actions"
ADMIN = "volume_extension:volume_admin_actions"


def rest(tx: Tx, world: World, id: str, *, over: str, **more: Any) -> bool:
    """What was done with it is over: its status follows from its attachments again."""
    found = store.attachments_of(tx, [id]).get(id, [])
    to = attachments.follows(found)
    return store.step(tx, Volume, id, world.clock.now(), to=to, over=(over,), **more)


def unchanged(tx: Tx, world: World, act: Act) -> tuple[str, str] | None:
    """What could not be done left the volume as it was."""
    rest(tx, world, act.subject, over=act.back)
    return whose(tx, act)


def spoilt(tx: Tx, world: World, act: Act) -> tuple[str, str] | None:
    """What could not be done may have left half of it."""
    store.step(tx, Volume, act.subject, world.clock.now(), to="error", over=(act.back,))
    return whose(tx, act)


# ---- larger


class Extend(msgspec.Struct):
    new_size: frame.Count


@R.post(PATH, action="os-extend", body=Extend, ok=202, policy="volume:extend", late=True)
def extend(call: Call, id: str) -> Reply:
    size_gb, world = frame.number(call.body.new_size), call.world
    with world.db.tx() as tx:
        v = got_to_change(call, tx, id, "volume:extend")
        if v.status == "in-use" and call.version >= 42:
            call.check({"project_id": v.project_id}, "volume:extend_attached_volume")
        elif v.status != "available":
            raise invalid_volume(f"Volume {id} status must be available to extend, current status: {v.status}.")
        if size_gb <= v.size_gb:
            raise Invalid(
                f"Invalid input received: New size for extend must be greater than current size. (current: {v.size_gb}, "
                f"extended: {size_gb})."
            )
        most = quotas.limits(tx, world, v.project_id)["per_volume_gigabytes"]
        if 0 <= most < size_gb:
            raise OverQuota(f"Requested volume size {size_gb} is larger than maximum allowed limit {most}.")
        quotas.charge(tx, world, v.project_id, gigabytes=size_gb - v.size_gb)
        store.change(tx, Volume, id, status="extending", updated_at=world.clock.now())
        made = begin(tx, world, extend_volume, id, request=call.request_id, back="extending", size_gb=size_gb)
    world.go(made)
    return Reply(None)


def _not_extended(tx: Tx, world: World, act: Act) -> tuple[str, str] | None:
    v = store.look(tx, Volume, act.subject)
    if v is None:
        return None
    quotas.discharge(tx, v.project_id, gigabytes=act.job["size_gb"] - v.size_gb)
    store.step(tx, Volume, v.id, world.clock.now(), to="error_extending", over=("extending",))
    return v.project_id, "VOLUME"


@act(_not_extended, quick=True)
def extend_volume(world: World, act: Act) -> None:
    world.bytes.extend(act.subject, act.job["size_gb"])
    with world.db.tx() as tx:
        if not end(tx, act):
            return
        store.change(tx, Volume, act.subject, size_gb=act.job["size_gb"])
        rest(tx, world, act.subject, over="extending")
        users = store.attachments_of(tx, [act.subject]).get(act.subject, [])
    servers = [a.server_id for a in users if a.server_id and a.status == "attached"]
    if servers and world.grown is not None:
        try:
            world.grown(act.subject, servers)
        except Trouble as e:  # it is larger all the same; a server sees it when it starts
            logger.warning("servers of volume %s do not know that it grew: %s", act.subject, e.why or e.said)


class Error(msgspec.Struct):
    error: Flag = False


@R.post(
    PATH,
    action="os-extend_volume_completion",
    body=Error,
    versions="3.71-",
    ok=202,
    policy="volume:extend_completion",
    late=True,
)
def extended(call: Call, id: str) -> Reply:
    """Nobody is waited for here: a file is as long as it is, whether its server has noticed or not."""
    with call.world.db.read() as tx:
        v = got(call, tx, id, "volume:extend_completion")
    raise Invalid(f"Invalid volume: Volume {v.id} is not being extended.")


# ---- to an image


class Upload(msgspec.Struct, kw_only=True):
    image_name: A[str, Meta(min_length=1, max_length=255, pattern=r"\A[^\x00]*\Z")]
    force: Flag = False
    container_format: A[str, Meta(max_length=32)] | None = "bare"
    disk_format: Literal["raw", "qcow2", "vmdk", "vdi", "vhd", "vhdx"] | None = "raw"
    visibility: A[Literal["public", "private", "shared", "community"] | None, since("3.1")] = None
    protected: A[Flag | None, since("3.1")] = None


@R.post(PATH, action="os-volume_upload_image", body=Upload, ok=202, policy=f"{ACTIONS}:upload_image", late=True)
def upload(call: Call, id: str) -> View:
    """The image is made in the caller's name, so that it is his; the bytes follow in ours."""
    said, world = call.body, call.world
    disk_format = said.disk_format or "raw"
    with world.db.read() as tx:
        v = got(call, tx, id, f"{ACTIONS}:upload_image")
    _may_upload(v, frame.flag(said.force))
    wish: dict[str, Any] = {k: x for k, x in v.image.items() if k not in _OF_THE_FIRST}
    wish |= {"name": said.image_name, "disk_format": disk_format, "container_format": said.container_format or "bare"}
    wish |= {"min_disk": v.size_gb, "visibility": said.visibility} if said.visibility else {"min_disk": v.size_gb}
    if said.protected is not None:
        wish["protected"] = frame.flag(said.protected)
    image = world.images.create(token=call.context.token or None, **wish)
    try:
        with world.db.tx() as tx:
            v = got_to_change(call, tx, id, f"{ACTIONS}:upload_image")
            _may_upload(v, frame.flag(said.force))
            store.change(tx, Volume, id, status="uploading", updated_at=world.clock.now())
            job = {"image": image.id, "disk_format": disk_format}
            made = begin(tx, world, copy_volume_to_image, id, request=call.request_id, back="uploading", **job)
            kind = store.look(tx, store.Type, v.type_id)
    except BaseException:
        world.images.delete(image.id, call.context.token or None)
        raise
    world.go(made)
    shown = {
        "id": v.id,
        "updated_at": frame.moment(v.updated_at),
        "status": "uploading",
        "display_description": v.description,
        "size": v.size_gb,
        "volume_type": types.view(call, kind) if kind else None,
        "image_id": image.id,
        "container_format": image.container_format,
        "disk_format": image.disk_format,
        "image_name": said.image_name,
    }
    if call.version >= 1:
        shown |= {"visibility": image.visibility, "protected": image.protected}
    return {"os-volume_upload_image": shown}


_OF_THE_FIRST = {"image_id", "image_name", "checksum", "container_format", "disk_format", "min_disk", "min_ram", "size"}


def _may_upload(v: Volume, force: bool) -> None:
    if v.status != "available" and not (v.status == "in-use" and force):
        raise invalid_volume(f"Volume {v.id} status must be available or in-use with force, but it is {v.status}.")


def _not_uploaded(world: World, act: Act) -> None:
    """An image that somebody protected meanwhile stays, without bytes."""
    with suppress(Forbidden, Conflict):
        world.images.delete(act.job["image"])


@act(unchanged, undo=_not_uploaded)
def copy_volume_to_image(world: World, act: Act) -> None:
    """A crash in the middle leaves the image queued: its bytes are brought again."""
    image = world.images.show(act.job["image"])
    if image.status == "queued":
        world.bytes.export(
            act.subject, act.job["disk_format"], lambda chunks, length: world.images.upload(image.id, chunks)
        )
    with world.db.tx() as tx:
        if end(tx, act):
            rest(tx, world, act.subject, over="uploading")


# ---- back to what it was


class Revert(msgspec.Struct):
    snapshot_id: str


@R.post(PATH, action="revert", body=Revert, versions="3.40-", ok=202, policy="volume:revert_to_snapshot", late=True)
def revert(call: Call, id: str) -> Reply:
    world = call.world
    with world.db.tx() as tx:
        v = got_to_change(call, tx, id, "volume:revert_to_snapshot")
        s = store.look(tx, Snapshot, call.body.snapshot_id)
        if s is None or s.project_id != v.project_id:
            raise NotFound(f"Snapshot {frame.plain(call.body.snapshot_id)} could not be found.")
        latest = store.find(tx, Snapshot, store.SNAPSHOTS.c.volume_id == id)
        if s.volume_id != id or latest[-1].id != s.id:
            raise Invalid(f"Specified snapshot {s.id} is None or not the latest one of volume {id}.")
        if v.status != "available" or s.status != "available":
            raise Invalid(f"Volume {id} and snapshot {s.id} must be available to be reverted.")
        if s.size_gb != v.size_gb:
            raise Invalid(
                f"Can't revert volume {id} to its latest snapshot {s.id}. The volume size must be equal to it."
            )
        store.change(tx, Volume, id, status="reverting", updated_at=world.clock.now())
        made = begin(tx, world, revert_volume, id, request=call.request_id, back="reverting", id=s.id)
    world.go(made)
    return Reply(None)


@act(spoilt)
def revert_volume(world: World, act: Act) -> None:
    world.bytes.write_over(("snapshots", act.job["id"]), act.subject)
    with world.db.tx() as tx:
        if end(tx, act):
            rest(tx, world, act.subject, over="reverting")


class Reimage(msgspec.Struct):
    image_id: str
    reimage_reserved: Flag = False


@R.post(PATH, action="os-reimage", body=Reimage, versions="3.68-", ok=202, policy="volume:reimage", late=True)
def reimage(call: Call, id: str) -> Reply:
    said, world = call.body, call.world
    with world.db.read() as tx:
        got(call, tx, id, "volume:reimage")
    image = image_of(call, said.image_id)
    reserved = frame.flag(said.reimage_reserved)
    if reserved:
        call.check(None, "volume:reimage_reserved")
    with world.db.tx() as tx:
        v = got_to_change(call, tx, id, "volume:reimage")
        good = ("available", "error", "reserved") if reserved else ("available", "error")
        if v.status not in good:
            raise Invalid(f"Invalid volume: Volume {id} status must be {' or '.join(good)}, but it is {v.status}.")
        fits(image, v.size_gb)
        store.change(tx, Volume, id, status="downloading", updated_at=world.clock.now())
        job = {"image": msgspec.to_builtins(bytes_of(image)), "about": described(image)}
        made = begin(tx, world, reimage_volume, id, request=call.request_id, back="downloading", **job)
    world.go(made)
    return Reply(None)


@act(spoilt)
def reimage_volume(world: World, act: Act) -> None:
    world.bytes.reimage(act.subject, msgspec.convert(act.job["image"], ImageSource))
    with world.db.tx() as tx:
        if end(tx, act):
            rest(tx, world, act.subject, over="downloading", image=act.job["about"], bootable=True)


# ---- marks


class Bootable(msgspec.Struct):
    bootable: Flag


@R.post(PATH, action="os-set_bootable", body=Bootable, policy=f"{ACTIONS}:set_bootable", late=True)
def set_bootable(call: Call, id: str) -> Reply:
    with call.world.db.tx() as tx:
        got_to_change(call, tx, id, f"{ACTIONS}:set_bootable")
        store.change(tx, Volume, id, bootable=frame.flag(call.body.bootable), updated_at=call.world.clock.now())
    return Reply(None)


class Readonly(msgspec.Struct):
    readonly: Flag


@R.post(PATH, action="os-update_readonly_flag", body=Readonly, ok=202, policy="volume:update_readonly_flag", late=True)
def set_readonly(call: Call, id: str) -> Reply:
    with call.world.db.tx() as tx:
        v = got_to_change(call, tx, id, "volume:update_readonly_flag")
        if v.status != "available":
            raise invalid_volume(f"Volume {id} status must be available to update readonly flag, but it is {v.status}.")
        store.change(tx, Volume, id, readonly=frame.flag(call.body.readonly), updated_at=call.world.clock.now())
    return Reply(None)


class ImageMetadata(msgspec.Struct):
    metadata: Metadata


@R.post(
    PATH,
    action="os-set_image_metadata",
    body=ImageMetadata,
    policy="volume_extension:volume_image_metadata:set",
    late=True,
)
def set_image_metadata(call: Call, id: str) -> View:
    with call.world.db.tx() as tx:
        v = got_to_change(call, tx, id, "volume_extension:volume_image_metadata:set")
        now = v.image | call.body.metadata
        frame.few_enough(now)
        store.change(tx, Volume, id, image=now, updated_at=call.world.clock.now())
    return {"metadata": now}


class ImageKey(msgspec.Struct):
    key: A[str, Meta(min_length=1, max_length=255)]


@R.post(
    PATH,
    action="os-unset_image_metadata",
    body=ImageKey,
    policy="volume_extension:volume_image_metadata:remove",
    late=True,
)
def unset_image_metadata(call: Call, id: str) -> Reply:
    with call.world.db.tx() as tx:
        v = got_to_change(call, tx, id, "volume_extension:volume_image_metadata:remove")
        if call.body.key not in v.image:
            raise NotFound("Metadata item was not found.")
        now = {k: x for k, x in v.image.items() if k != call.body.key}
        store.change(tx, Volume, id, image=now, updated_at=call.world.clock.now())
    return Reply(None)


@R.post(
    PATH,
    action="os-show_image_metadata",
    body=Any,
    policy="volume_extension:volume_image_metadata:show",
    late=True,
)
def show_image_metadata(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        return {"metadata": got(call, tx, id, "volume_extension:volume_image_metadata:show").image}


class Retype(msgspec.Struct):
    new_type: Name
    migration_policy: Literal["never", "on-demand"] | None = "never"


@R.post(PATH, action="os-retype", body=Retype, ok=202, policy="volume:retype", late=True)
def retype(call: Call, id: str) -> Reply:
    """All types lie in the same place, so another name is all there is to it."""
    with call.world.db.tx() as tx:
        v = got_to_change(call, tx, id, "volume:retype")
        new = types.named(call, tx, call.body.new_type)
        if v.status not in ("available", "in-use"):
            raise invalid_volume(f"Volume {id} status must be available or in-use to be retyped, but it is {v.status}.")
        if new.id == v.type_id:
            raise Invalid("Invalid input received: New volume_type same as original.")
        shared = types.multiattach(new)
        if v.status == "in-use" and shared != v.multiattach:
            raise Invalid(
                f"Invalid input received: Retype of volume {id}, which is in use, would change its multiattach."
            )
        store.change(tx, Volume, id, type_id=new.id, multiattach=shared, updated_at=call.world.clock.now())
    return Reply(None)


# ---- what admins do

# fmt: off
STATUSES = ("creating", "available", "deleting", "error", "error_deleting", "error_managing", "error_extending",
            "error_restoring", "attaching", "in-use", "detaching", "maintenance", "reserved")
# fmt: on


class Reset(msgspec.Struct, kw_only=True):
    status: A[str, Meta(max_length=32)] | None = None
    attach_status: Literal["detached", "attached"] | None = None
    migration_status: A[str, Meta(max_length=64)] | None = None


@R.post(PATH, action="os-reset_status", body=Reset, ok=202, policy=f"{ADMIN}:reset_status", late=True)
def reset_status(call: Call, id: str) -> Reply:
    """`attach_status` follows from attachments here: `detached` ends those that there are."""
    said = call.body
    if said.status is None and said.attach_status is None and said.migration_status is None:
        raise Invalid("Invalid input received: there is nothing to reset.")
    if said.status is not None and said.status not in STATUSES:
        raise Invalid(f"Invalid input received: '{frame.plain(said.status)}' is no status to reset a volume to.")
    with call.world.db.tx() as tx:
        got_to_change(call, tx, id, f"{ADMIN}:reset_status")
        values: dict[str, Any] = {"updated_at": call.world.clock.now()}
        if said.status is not None:
            values["status"] = said.status
        if said.migration_status is not None:
            values["migration"] = None if said.migration_status.lower() == "none" else said.migration_status
        if said.attach_status == "detached":
            for a in store.attachments_of(tx, [id]).get(id, []):
                store.remove(tx, Attachment, a.id)
        store.change(tx, Volume, id, **values)
    return Reply(None)


@R.post(PATH, action="os-force_delete", body=Any, ok=202, policy=f"{ADMIN}:force_delete", late=True)
def force_delete(call: Call, id: str) -> Reply:
    remove(call, id, f"{ADMIN}:force_delete", force=True, cascade=False)
    return Reply(None)


class Migrate(msgspec.Struct):
    host: Name | None = None
    cluster: Name | None = None
    force_host_copy: Flag = False
    lock_volume: Flag = False


@R.post(PATH, action="os-migrate_volume", body=Migrate, ok=202, policy=f"{ADMIN}:migrate_volume", late=True)
def migrate(call: Call, id: str) -> Reply:
    with call.world.db.read() as tx:
        got(call, tx, id, f"{ADMIN}:migrate_volume")
    raise Invalid(f"Invalid input received: No available service named '{frame.plain(call.body.host or '')}'.")


class Completion(msgspec.Struct):
    new_volume: str
    error: Flag = False


@R.post(
    PATH,
    action="os-migrate_volume_completion",
    body=Completion,
    policy=f"{ADMIN}:migrate_volume_completion",
    late=True,
)
def complete_migration(call: Call, id: str) -> View:
    """A server was swapped from this volume to the new one, which from now on is the user's.

    Attachments of the elder kind are moved along; those of the attachments API are their compute service's affair.
    """
    new = call.body.new_volume
    with call.world.db.tx() as tx:
        old = got_to_change(call, tx, id, f"{ADMIN}:migrate_volume_completion")
        target = got_to_change(call, tx, new, f"{ADMIN}:migrate_volume_completion")
        if old.project_id != target.project_id:
            raise Invalid("Invalid volume: both must be of one project.")
    return {"save_volume_id": new}


# ---- the elder ways to attach (before API 3.27); each changes the status, or is refused


def _turn(call: Call, id: str, rule: str, *, over: str, to: str, what: str) -> Reply:
    with call.world.db.tx() as tx:
        v = got_to_change(call, tx, id, f"{ACTIONS}:{rule}")
        if not store.step(tx, Volume, id, call.world.clock.now(), to=to, over=(over,)):
            raise invalid_volume(f"Volume {id} status must be {over} to {what}, but it is {v.status}.")
    return Reply(None)


@R.post(PATH, action="os-reserve", body=Any, ok=202, policy=f"{ACTIONS}:reserve", late=True)
def reserve(call: Call, id: str) -> Reply:
    return _turn(call, id, "reserve", over="available", to="attaching", what="reserve it")


@R.post(PATH, action="os-unreserve", body=Any, ok=202, policy=f"{ACTIONS}:unreserve", late=True)
def unreserve(call: Call, id: str) -> Reply:
    with call.world.db.tx() as tx:
        v = got_to_change(call, tx, id, f"{ACTIONS}:unreserve")
        if v.status == "attaching":
            settle(tx, id, call.world.clock.now())
    return Reply(None)


@R.post(PATH, action="os-begin_detaching", body=Any, ok=202, policy=f"{ACTIONS}:begin_detaching", late=True)
def begin_detaching(call: Call, id: str) -> Reply:
    """Also of a volume of several servers: until that attachment has ended none of the others ends."""
    with call.world.db.tx() as tx:
        v = got_to_change(call, tx, id, f"{ACTIONS}:begin_detaching")
        if v.status != "in-use":
            raise invalid_volume(f"Volume {id} status must be in-use to detach it, but it is {v.status}.")
        store.change(tx, Volume, id, status="detaching", updated_at=call.world.clock.now())
    return Reply(None)


@R.post(PATH, action="os-roll_detaching", body=Any, ok=202, policy=f"{ACTIONS}:roll_detaching", late=True)
def roll_detaching(call: Call, id: str) -> Reply:
    with call.world.db.tx() as tx:
        v = got_to_change(call, tx, id, f"{ACTIONS}:roll_detaching")
        if v.status == "detaching":
            settle(tx, id, call.world.clock.now())
    return Reply(None)


class Attach(msgspec.Struct, kw_only=True):
    instance_uuid: A[str, Meta(min_length=1, max_length=64)] | None = None
    host_name: A[str, Meta(min_length=1, max_length=255)] | None = None
    mountpoint: A[str, Meta(min_length=1, max_length=255)]
    mode: Literal["rw", "ro"] | None = None


@R.post(PATH, action="os-attach", body=Attach, ok=202, policy=f"{ACTIONS}:attach", late=True)
def attach(call: Call, id: str) -> Reply:
    said, world = call.body, call.world
    if (said.instance_uuid is None) == (said.host_name is None):
        raise Invalid("Invalid request to attach volume to an instance and/or host: name one of them.")
    with world.db.tx() as tx:
        v = got_to_change(call, tx, id, f"{ACTIONS}:attach")
        if said.mode == "rw" and v.readonly:
            raise Invalid(f"Invalid volume: mode rw: volume {id} is read-only.")
        good = ("available", "attaching", "in-use") if v.multiattach else ("available", "attaching")
        if v.status not in good:
            raise invalid_volume(f"Volume {id} status must be available or attaching, but it is {v.status}.")
        now = world.clock.now()
        a = Attachment(
            id=world.ids.uuid(),
            volume_id=id,
            project_id=v.project_id,
            created_at=now,
            attached_at=now,
            status="attached",
            server_id=said.instance_uuid,
            host=said.host_name,
            mountpoint=said.mountpoint,
            mode="ro" if v.readonly else said.mode or "rw",
        )
        store.add(tx, a)
        settle(tx, id, now)
    return Reply(None)


class Detach(msgspec.Struct, kw_only=True):
    attachment_id: A[str, Meta(max_length=64)] | None = None
    connector: dict[str, Any] | None = None


@R.post(PATH, action="os-detach", body=Detach | None, ok=202, policy=f"{ACTIONS}:detach", late=True)
def detach(call: Call, id: str) -> Reply:
    return _detached(call, id, f"{ACTIONS}:detach")


@R.post(PATH, action="os-force_detach", body=Detach | None, ok=202, policy=f"{ADMIN}:force_detach", late=True)
def force_detach(call: Call, id: str) -> Reply:
    return _detached(call, id, f"{ADMIN}:force_detach")


def _detached(call: Call, id: str, rule: str) -> Reply:
    wanted = call.body.attachment_id if call.body else None
    with call.world.db.tx() as tx:
        v = got_to_change(call, tx, id, rule)
        there = store.attachments_of(tx, [id]).get(id, [])
        if wanted:
            there = [a for a in there if a.id == wanted]
            if not there:
                raise Invalid(f"Invalid input received: volume {id} has no attachment {wanted}.")
        if len(there) > 1:
            raise invalid_volume(f"Detach volume {id}: it is attached more than once, name the attachment.")
        _not_of_a_server(call, there)
        for a in there:
            attachments.drop(tx, call.world, v, a)
        if not there:
            settle(tx, id, call.world.clock.now())
    return Reply(None)


class Connector(msgspec.Struct):
    connector: dict[str, Any]


@R.post(PATH, action="os-initialize_connection", body=Connector, policy=f"{ACTIONS}:initialize_connection", late=True)
def initialize(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        v = got(call, tx, id, f"{ACTIONS}:initialize_connection")
    if v.status in ("creating", "downloading", "error", "deleting"):
        raise invalid_volume(f"Volume {id} is {v.status}: nobody can connect to it.")
    about = Attachment(id="", volume_id=id, project_id=v.project_id, created_at=0, mode="ro" if v.readonly else "rw")
    data = attachments.connection(call.world, v, about)
    return {"connection_info": {"driver_volume_type": data.pop("driver_volume_type"), "data": data}}


@R.post(
    PATH,
    action="os-terminate_connection",
    body=Connector,
    ok=202,
    policy=f"{ACTIONS}:terminate_connection",
    late=True,
)
def terminate(call: Call, id: str) -> Reply:
    """Nothing was made for the connection, so nothing ends."""
    with call.world.db.read() as tx:
        got(call, tx, id, f"{ACTIONS}:terminate_connection")
        _not_of_a_server(call, store.attachments_of(tx, [id]).get(id, []))
    return Reply(None)


def _not_of_a_server(call: Call, there: list[Attachment]) -> None:
    """What a server writes to is let go by the Compute service alone, or two may write. Raises Conflict."""
    held = next((a for a in there if a.server_id and a.info is not None), None)
    if held is not None and not serving(call):
        raise Conflict(f"Detach the volume from server {held.server_id} by the Compute API.")


@R.post(PATH, action="os-unmanage", body=Any, ok=202, policy=f"{ADMIN}:force_delete", late=True)
def unmanage(call: Call, id: str) -> Reply:
    with call.world.db.read() as tx:
        got(call, tx, id, f"{ADMIN}:force_delete")
    raise Unsupported("Volumes of this service cannot be taken out of its care.")
