"""Volumes: made of nothing, of an image, a snapshot, another volume or a backup; shown, changed, deleted."""

from collections.abc import Sequence
from typing import Annotated as A
from typing import Any

import msgspec
import sqlalchemy as sa
from msgspec import UNSET, UnsetType

from kilonova.clients import ImageInfo
from kilonova.companions.volume import frame, quotas, types
from kilonova.companions.volume.bytes import GIB
from kilonova.companions.volume.frame import Collection, Flag, Metadata, Name, R, View, invalid_volume
from kilonova.companions.volume.world import World, act, begin, end
from kilonova.kit.db import Tx
from kilonova.kit.errors import Forbidden, Invalid, NotFound, Unavailable
from kilonova.kit.routes import Call
from kilonova.kit.versions import since
from kilonova.model.machine import ImageSource
from kilonova.store import volumes as store
from kilonova.store.volumes import Act, Attachment, Backup, Snapshot, Volume


def missing(id: str) -> NotFound:
    return NotFound(f"Volume {frame.plain(id)} could not be found.")


def _of_metadata(text: str, column: str = "metadata") -> Any:
    """`metadata={'a': 'b'}`, as Python writes it: that is the API. Raises Invalid."""
    try:
        said = msgspec.json.decode(text.replace("'", '"'), type=dict[str, str])
    except (msgspec.DecodeError, ValueError):
        raise Invalid(f"Invalid input received: {frame.plain(text)} is no filter for metadata.") from None
    return sa.and_(sa.true(), *(store.has_metadata(Volume, k, v, column) for k, v in said.items()))


def _of_type(text: str) -> Any:
    named = sa.select(store.TYPES.c.id).where(sa.or_(store.TYPES.c.id == text, store.TYPES.c.name == text))
    return store.VOLUMES.c.type_id.in_(named)


VOLUMES = Collection(
    "volumes",
    Volume,
    missing,
    columns={
        "id": "id",
        "name": "name",
        "display_name": "name",
        "description": "description",
        "status": "status",
        "size": "size_gb",
        "bootable": "bootable",
        "multiattach": "multiattach",
        "availability_zone": "zone",
        "user_id": "user_id",
        "snapshot_id": "snapshot_id",
        "source_volid": "source_id",
        "migration_status": "migration",
        "created_at": "created_at",
        "updated_at": "updated_at",
    },
    filters={
        "metadata": _of_metadata,
        "glance_metadata": lambda text: _of_metadata(text, "image"),
        "volume_type": _of_type,
        "volume_type_id": _of_type,
    },
)


# ---- views


class AttachedView(msgspec.Struct, kw_only=True):
    server_id: str | None
    attachment_id: str
    attached_at: str | None
    host_name: str | None
    volume_id: str
    device: str | None
    id: str


class VolumeView(msgspec.Struct, kw_only=True):
    id: str
    status: str
    size: int
    availability_zone: str
    created_at: str | None
    updated_at: str | None
    name: str | None
    description: str | None
    volume_type: str | None
    snapshot_id: str | None
    source_volid: str | None
    metadata: dict[str, str]
    links: list[View]
    user_id: str
    bootable: str
    encrypted: bool
    replication_status: str | None
    consistencygroup_id: str | None
    multiattach: bool
    attachments: list[AttachedView]
    migration_status: str | None
    group_id: A[str | None, since("3.13")]
    provider_id: A[str | None | UnsetType, since("3.21")]
    service_uuid: A[str | None, since("3.48")]
    shared_targets: A[bool | None, since("3.48")]
    cluster_name: A[str | None | UnsetType, since("3.61")]
    volume_type_id: A[str | None, since("3.63")]
    consumes_quota: A[bool, since("3.65")]
    tenant_id: str | UnsetType = msgspec.field(name="os-vol-tenant-attr:tenant_id", default=UNSET)
    migstat: str | None | UnsetType = msgspec.field(name="os-vol-mig-status-attr:migstat", default=UNSET)
    name_id: str | None | UnsetType = msgspec.field(name="os-vol-mig-status-attr:name_id", default=UNSET)
    host: str | UnsetType = msgspec.field(name="os-vol-host-attr:host", default=UNSET)
    image: dict[str, str] | UnsetType = msgspec.field(name="volume_image_metadata", default=UNSET)


def views(call: Call, tx: Tx, volumes: Sequence[Volume]) -> list[VolumeView]:
    """Whole; two queries for a page."""
    attached = store.attachments_of(tx, [v.id for v in volumes])
    named = {t.id: t.name for t in store.find(tx, store.Type)}
    return [_view(call, v, attached.get(v.id, []), named.get(v.type_id)) for v in volumes]


def _view(call: Call, v: Volume, attachments: list[Attachment], type: str | None) -> VolumeView:
    about = {"project_id": v.project_id}
    admin = call.may("volume_extension:volume_host_attribute", about)
    shown = [a for a in attachments if a.status in ("attached", "attaching", "detaching")]
    own = dict(v.metadata)
    if v.readonly is not None:
        own["readonly"] = str(v.readonly)
    if modes := [a.mode for a in shown if a.mode]:
        own["attached_mode"] = modes[0]
    return VolumeView(
        id=v.id,
        status=v.status,
        size=v.size_gb,
        availability_zone=v.zone,
        created_at=frame.moment(v.created_at),
        updated_at=frame.moment(v.updated_at),
        name=v.name,
        description=v.description,
        volume_type=type,
        snapshot_id=v.snapshot_id,
        source_volid=v.source_id,
        metadata=own,
        links=frame.link(call, "volumes", v.id),
        user_id=v.user_id,
        bootable=str(v.bootable).lower(),
        encrypted=False,
        replication_status=None,
        consistencygroup_id=None,
        multiattach=v.multiattach,
        attachments=[_attached(a, admin) for a in shown if a.status == "attached"],
        migration_status=v.migration,
        group_id=None,
        provider_id=None if admin else UNSET,
        service_uuid=call.world.config.service_id,
        shared_targets=False,
        cluster_name=None if admin else UNSET,
        volume_type_id=v.type_id,
        consumes_quota=True,
        tenant_id=v.project_id if call.may("volume_extension:volume_tenant_attribute", about) else UNSET,
        migstat=v.migration if admin else UNSET,
        name_id=None if admin else UNSET,
        host=call.world.backend if admin else UNSET,
        image=v.image or UNSET,
    )


def _attached(a: Attachment, admin: bool) -> AttachedView:
    return AttachedView(
        server_id=a.server_id,
        attachment_id=a.id,
        attached_at=frame.moment(a.attached_at),
        host_name=a.host if admin else None,
        volume_id=a.volume_id,
        device=a.mountpoint,
        id=a.volume_id,
    )


def told(view: VolumeView) -> VolumeView:
    """As the answer to who makes or changes it: without what other services know of it."""
    view.tenant_id = view.migstat = view.name_id = view.host = view.image = UNSET
    return view


def summary(call: Call, v: Volume) -> View:
    return {"id": v.id, "name": v.name, "links": frame.link(call, "volumes", v.id)}


# ---- show, list


def got(call: Call, tx: Tx, id: str, rule: str | None = None) -> Volume:
    """The volume, if he may see it and do this with it. Raises NotFound, Forbidden."""
    volume = VOLUMES.get(tx, id)
    frame.seen(call, volume, missing(id), "volume:get", rule)
    return volume


def got_to_change(call: Call, tx: Tx, id: str, rule: str | None = None) -> Volume:
    """The same, and nobody else changes it before this transaction ends."""
    volume = store.lock(tx, id)
    if volume is None:
        call.checked = True
        raise missing(id)
    frame.seen(call, volume, missing(id), "volume:get", rule)
    return volume


@R.get("/v3/volumes", policy="volume:get_all")
def index(call: Call) -> View:
    return frame.listing(
        call, VOLUMES, lambda tx, w, found: [summary(call, v) for v in found], counted=call.version >= 45
    )


@R.get("/v3/volumes/detail", policy="volume:get_all")
def detail(call: Call) -> View:
    def shown(tx: Tx, world: World, found: Sequence[Volume]) -> list[Any]:
        return views(call, tx, found)

    return frame.listing(call, VOLUMES, shown, counted=call.version >= 45)


@R.get("/v3/volumes/summary", versions="3.12-", policy="volume:get_all")
def total(call: Call) -> View:
    where = [] if frame.all_projects(call) else [store.VOLUMES.c.project_id == (call.context.project_id or "-")]
    with call.world.db.read() as tx:
        found = store.find(tx, Volume, *where)
    said: View = {"total_count": len(found), "total_size": sum(v.size_gb for v in found)}
    if call.version >= 36:
        metadata: dict[str, list[str]] = {}
        for v in found:
            for name, value in v.metadata.items():
                if value not in metadata.setdefault(name, []):
                    metadata[name].append(value)
        said["metadata"] = metadata
    return {"volume-summary": said}


@R.get("/v3/volumes/{id}", policy="volume:get", late=True)
def show(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        return {"volume": views(call, tx, [got(call, tx, id)])[0]}


frame.with_metadata(
    VOLUMES, "volume:get_volume_metadata", "volume:update_volume_metadata", "volume:delete_volume_metadata"
)


# ---- create


class VolumeWish(msgspec.Struct, kw_only=True):
    size: frame.Count | None = None
    name: Name | None = None
    display_name: Name | None = None
    description: Name | None = None
    display_description: Name | None = None
    imageRef: str | None = None
    image_id: str | None = None
    snapshot_id: str | None = None
    source_volid: str | None = None
    backup_id: A[str | None, since("3.47")] = None
    volume_type: str | None = None
    availability_zone: str | None = None
    metadata: Metadata | None = None
    multiattach: Flag | None = None
    consistencygroup_id: str | None = None
    group_id: str | None = None


class VolumeBody(msgspec.Struct):
    volume: VolumeWish


@R.post("/v3/volumes", body=VolumeBody, ok=202, policy="volume:create")
def create(call: Call) -> View:
    wish, world = call.body.volume, call.world
    project = call.context.project_id
    if project is None:
        raise Forbidden("A volume is a project's: a token of a project is needed.")
    image_id = wish.imageRef or wish.image_id
    given = [x for x in (image_id, wish.snapshot_id, wish.source_volid, wish.backup_id) if x]
    if len(given) > 1:
        raise Invalid(
            "Invalid input received: A volume is made of one thing: an image, a snapshot, a volume or a backup."
        )
    if wish.consistencygroup_id or wish.group_id:
        raise NotFound(f"Group {frame.plain(wish.consistencygroup_id or wish.group_id)} could not be found.")
    frame.few_enough(wish.metadata or {})
    image = _image(call, image_id) if image_id else None
    with world.db.tx() as tx:
        kind = types.chosen(call, tx, wish.volume_type)
        source = _source(call, tx, wish)
        if source and not wish.volume_type and not isinstance(source, Backup):
            kind = types.of_source(tx, source, kind)
        size_gb = _size(wish, source, image)
        now = world.clock.now()
        volume = Volume(
            id=world.ids.uuid(),
            project_id=project,
            user_id=call.context.user_id,
            created_at=now,
            updated_at=now,
            size_gb=size_gb,
            type_id=kind.id,
            zone=_zone(call, wish.availability_zone),
            name=wish.name if wish.name is not None else wish.display_name,
            description=wish.description if wish.description is not None else wish.display_description,
            multiattach=types.multiattach(kind) or (call.version < 50 and frame.flag(wish.multiattach or False)),
            snapshot_id=source.id if isinstance(source, Snapshot) else None,
            source_id=source.id if isinstance(source, Volume) else None,
            metadata=wish.metadata or {},
            status="downloading" if image else "creating",
            bootable=_bootable(tx, source),
            image=described(image) if image else _inherited(tx, source),
        )
        if volume.multiattach:
            call.check({"project_id": project}, "volume:multiattach")
        quotas.charge(tx, world, project, volumes=1, gigabytes=size_gb)
        store.add(tx, volume)
        made = promised(tx, world, volume, source, image, call.request_id)
        view = told(views(call, tx, [volume])[0])
    if view.status == "downloading":
        view = msgspec.structs.replace(view, status="creating")
    world.go(made)
    return {"volume": view}


def _source(call: Call, tx: Tx, wish: VolumeWish) -> Snapshot | Volume | Backup | None:
    """What it is made of, if he may see it and it is at rest."""
    if wish.snapshot_id:
        snapshot = store.look(tx, Snapshot, wish.snapshot_id)
        if snapshot is None or not call.may("volume:get_snapshot", {"project_id": snapshot.project_id}):
            raise NotFound(f"Snapshot {frame.plain(wish.snapshot_id)} could not be found.")
        if snapshot.status != "available":
            raise Invalid("Invalid snapshot: Originating snapshot status must be one of 'available' values")
        return snapshot
    if wish.source_volid:
        volume = got(call, tx, wish.source_volid, "volume:get")
        if volume.status not in ("available", "in-use"):
            raise invalid_volume(f"Source volume {volume.id} must be available or in-use, but it is {volume.status}.")
        return volume
    if wish.backup_id:
        backup = store.look(tx, Backup, wish.backup_id)
        if backup is None or not call.may("backup:get", {"project_id": backup.project_id}):
            raise NotFound(f"Backup {frame.plain(wish.backup_id)} could not be found.")
        if backup.status != "available":
            raise Invalid("Invalid backup: Backup status must be available")
        return backup
    return None


def _size(wish: VolumeWish, source: Snapshot | Volume | Backup | None, image: ImageInfo | None) -> int:
    """In GiB. Raises Invalid where it is not said, or too small for what goes in."""
    if wish.size is None:
        if source is None:
            raise Invalid("Invalid input received: Volume size must be specified: it is made of nothing that has one.")
        return int(source.size_gb)
    size_gb = frame.number(wish.size)
    if source is not None and size_gb < source.size_gb:
        what = {Snapshot: "snapshot", Volume: "source volume", Backup: "backup"}[type(source)]
        raise Invalid(
            f"Invalid input received: Volume size '{size_gb}'GB cannot be smaller than the {what} size "
            f"{source.size_gb}GB. They must be >= original {what} size."
        )
    if image is not None:
        fits(image, size_gb)
    return size_gb


def fits(image: ImageInfo, size_gb: int) -> None:
    """Raises Invalid where a volume of this size cannot hold the image."""
    needed_gb = -(-max(image.size if image.disk_format == "raw" else 0, image.virtual_size) // GIB)
    if needed_gb > size_gb:
        raise Invalid(
            f"Invalid input received: Size of specified image {needed_gb}GB is larger than volume size {size_gb}GB."
        )
    if image.min_disk_gb > size_gb:
        raise Invalid(
            f"Invalid input received: Volume size {size_gb}GB cannot be smaller than the image minDisk size "
            f"{image.min_disk_gb}GB."
        )


def _zone(call: Call, said: str | None) -> str:
    zone = call.world.config.availability_zone
    if said not in (None, "", zone):
        raise Invalid(f"Invalid input received: Availability zone '{frame.plain(said or '')}' is invalid.")
    return str(zone)


def _bootable(tx: Tx, source: Snapshot | Volume | Backup | None) -> bool:
    if isinstance(source, Volume):
        return source.bootable
    if source is None:
        return False
    origin = store.look(tx, Volume, source.volume_id)
    return origin is not None and origin.bootable


def _inherited(tx: Tx, source: Snapshot | Volume | Backup | None) -> dict[str, str]:
    """What it was made of was made of an image, perhaps."""
    origin = source if source is None or isinstance(source, Volume) else store.look(tx, Volume, source.volume_id)
    return dict(origin.image) if origin is not None else {}


# ---- images


def _image(call: Call, id: str) -> ImageInfo:
    """The image, if the caller may see it and it can be put on a volume. Raises Invalid."""
    image = image_of(call, id)
    if image.disk_format not in ("raw", "ami", "iso", "qcow2", "vmdk", "vdi", "vhd", "vhdx"):
        raise Invalid(f"Image {image.id} is unacceptable: a volume cannot be made of {image.disk_format!r}.")
    return image


def image_of(call: Call, id: str) -> ImageInfo:
    world: World = call.world
    call.check(None, "volume:create_from_image")
    try:
        image = world.images.show(id, token=call.context.token or None)
    except (NotFound, Forbidden):
        raise Invalid("Invalid image identifier or unable to access requested image.") from None
    if image.status != "active":
        raise Invalid(f"Image {image.id} is not active.")
    return image


def described(image: ImageInfo) -> dict[str, str]:
    """What a volume remembers of its image: servers that boot from it are told of it."""
    return {
        **image.properties,
        "image_id": image.id,
        "image_name": image.name,
        "checksum": image.checksum,
        "container_format": image.container_format,
        "disk_format": image.disk_format,
        "min_disk": str(image.min_disk_gb),
        "min_ram": str(image.min_ram_mb),
        "size": str(image.size),
    }


def bytes_of(image: ImageInfo) -> ImageSource:
    return ImageSource(
        image_id=image.id,
        disk_format=image.disk_format,  # type: ignore[arg-type]
        size_bytes=image.size,
        hash_algo=image.hash_algo,
        hash_value=image.hash_value,
        virtual_size_bytes=image.virtual_size,
    )


# ---- the acts of making


def promised(
    tx: Tx, world: World, v: Volume, source: Snapshot | Volume | Backup | None, image: ImageInfo | None, request: str
) -> Act:
    if image is not None:
        return begin(
            tx, world, create_volume_from_image, v.id, request=request, image=msgspec.to_builtins(bytes_of(image))
        )
    if source is None:
        return begin(tx, world, create_volume, v.id, request=request)
    room = {Snapshot: "snapshots", Volume: "volumes", Backup: "backups"}[type(source)]
    return begin(tx, world, create_volume_from_another, v.id, request=request, room=room, id=source.id)


def _in_error(tx: Tx, world: World, act: Act) -> tuple[str, str] | None:
    store.step(tx, Volume, act.subject, world.clock.now(), to="error", over=ON_THE_WAY)
    return whose(tx, act)


def whose(tx: Tx, act: Act) -> tuple[str, str] | None:
    v = store.look(tx, Volume, act.subject)
    return None if v is None else (v.project_id, "VOLUME")


ON_THE_WAY = ("creating", "downloading")


@act(_in_error, quick=True)
def create_volume(world: World, act: Act) -> None:
    with world.db.read() as tx:
        v = store.look(tx, Volume, act.subject)
    if v is not None:
        world.bytes.blank(v.id, v.size_gb)
    _made(world, act)


@act(_in_error)
def create_volume_from_image(world: World, act: Act) -> None:
    with world.db.read() as tx:
        v = store.look(tx, Volume, act.subject)
    if v is not None:
        world.bytes.of_image(v.id, v.size_gb, msgspec.convert(act.job["image"], ImageSource))
    _made(world, act, bootable=True)


@act(_in_error)
def create_volume_from_another(world: World, act: Act) -> None:
    with world.db.read() as tx:
        v = store.look(tx, Volume, act.subject)
    if v is not None:
        world.bytes.clone((act.job["room"], act.job["id"]), ("volumes", v.id), v.size_gb)
    _made(world, act)


def _made(world: World, act: Act, **facts: Any) -> None:
    """It can be used; or it was taken from us meanwhile (a status that somebody reset, a volume that is gone)."""
    with world.db.tx() as tx:
        end(tx, act)
        v = store.lock(tx, act.subject)
        if v is None:
            world.bytes.drop("volumes", act.subject)
            return
        if not store.step(tx, Volume, v.id, world.clock.now(), to="available", over=ON_THE_WAY, **facts) and facts:
            store.change(tx, Volume, v.id, **facts)


# ---- update


class VolumeChange(msgspec.Struct, kw_only=True):
    name: Name | None | UnsetType = UNSET
    description: Name | None | UnsetType = UNSET
    display_name: Name | None | UnsetType = UNSET
    display_description: Name | None | UnsetType = UNSET
    metadata: Metadata | None | UnsetType = UNSET


class ChangeBody(msgspec.Struct):
    volume: VolumeChange


@R.put("/v3/volumes/{id}", body=ChangeBody, policy="volume:update", late=True)
def update(call: Call, id: str) -> View:
    said = call.body.volume
    values = frame.named(said)
    if said.metadata is not UNSET:
        frame.few_enough(said.metadata or {})
        values["metadata"] = said.metadata or {}
    with call.world.db.tx() as tx:
        got_to_change(call, tx, id, "volume:update")
        store.change(tx, Volume, id, updated_at=call.world.clock.now(), **values)
        return {"volume": told(views(call, tx, [VOLUMES.get(tx, id)])[0])}


# ---- delete

DELETABLE = ("available", "error", "error_restoring", "error_extending", "error_managing", "error_deleting")


class DeleteQuery(msgspec.Struct):
    cascade: Flag = False
    force: A[Flag, since("3.23")] = False


@R.delete("/v3/volumes/{id}", query=DeleteQuery, ok=202, policy="volume:delete", late=True)
def delete(call: Call, id: str) -> None:
    force = frame.flag(call.query.force)
    remove(call, id, "volume:force_delete" if force else "volume:delete", force, frame.flag(call.query.cascade))


def remove(call: Call, id: str, rule: str, force: bool, cascade: bool) -> None:
    """Promise its end. Raises Invalid where it is used, or something hangs on it."""
    world: World = call.world
    with world.db.tx() as tx:
        v = got_to_change(call, tx, id, rule)
        attached = store.attachments_of(tx, [id]).get(id, [])
        if attached or (not force and v.status not in DELETABLE) or v.migration:
            raise invalid_volume(
                "Volume status must be available or error or error_restoring or error_extending or error_managing and "
                "must not be migrating, attached, belong to a group, have snapshots, awaiting a transfer, or be "
                "disassociated from snapshots after volume transfer."
            )
        if store.is_read(tx, id):
            raise invalid_volume(f"Volume {id} is being copied.")
        snapshots = store.find(tx, Snapshot, store.SNAPSHOTS.c.volume_id == id)
        if snapshots and not cascade:
            raise invalid_volume(f"Volume {id} still has {len(snapshots)} dependent snapshots.")
        if any(s.status not in ("available", "error", "error_deleting", "deleting") for s in snapshots):
            raise invalid_volume("Failed to update snapshot: one of them is not at rest.")
        acts = [doomed(tx, world, s, call.request_id) for s in snapshots if s.status != "deleting"]
        store.change(tx, Volume, id, status="deleting", updated_at=world.clock.now())
        acts.append(begin(tx, world, delete_volume, id, request=call.request_id))
    for a in acts:
        world.go(a)


def doomed(tx: Tx, world: World, s: Snapshot, request: str) -> Act:
    store.change(tx, Snapshot, s.id, status="deleting", updated_at=world.clock.now())
    return begin(tx, world, delete_snapshot, s.id, request=request)


def _not_deleted(tx: Tx, world: World, act: Act) -> tuple[str, str] | None:
    store.step(tx, Volume, act.subject, world.clock.now(), to="error_deleting", over=("deleting",))
    return whose(tx, act)


@act(_not_deleted, quick=True)
def delete_volume(world: World, act: Act) -> None:
    """First the bytes: a row without bytes is found again, bytes without a row are not."""
    with world.db.read() as tx:
        others = store.find(tx, Act, store.ACTS.c.subject == act.subject, store.ACTS.c.id != act.id)
    if any(a.kind != delete_volume.__name__ for a in others):
        raise Unavailable("Something is being done with it.")
    world.bytes.drop("volumes", act.subject)
    with world.db.tx() as tx:
        end(tx, act)
        v = store.look(tx, Volume, act.subject)
        if v is not None and store.remove(tx, Volume, v.id):
            quotas.discharge(tx, v.project_id, volumes=1, gigabytes=v.size_gb)


def _snapshot_not_deleted(tx: Tx, world: World, act: Act) -> tuple[str, str] | None:
    store.step(tx, Snapshot, act.subject, world.clock.now(), to="error_deleting", over=("deleting",))
    s = store.look(tx, Snapshot, act.subject)
    return None if s is None else (s.project_id, "VOLUME_SNAPSHOT")


@act(_snapshot_not_deleted, quick=True)
def delete_snapshot(world: World, act: Act) -> None:
    world.bytes.drop("snapshots", act.subject)
    with world.db.tx() as tx:
        end(tx, act)
        s = store.look(tx, Snapshot, act.subject)
        if s is not None and store.remove(tx, Snapshot, s.id):
            quotas.discharge(tx, s.project_id, snapshots=1, gigabytes=s.size_gb)
