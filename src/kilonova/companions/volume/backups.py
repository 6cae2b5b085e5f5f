"""Backups: whole copies of volumes in a room of their own, which outlive what they were made of."""

from collections.abc import Sequence
from typing import Annotated as A
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from kilonova.companions.volume import actions, frame, quotas, types
from kilonova.companions.volume.frame import Collection, Flag, Metadata, Name, R, View, invalid_volume
from kilonova.companions.volume.volumes import got_to_change
from kilonova.companions.volume.volumes import missing as no_volume
from kilonova.companions.volume.world import World, act, begin, end
from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid, NotFound
from kilonova.kit.routes import Call, Reply
from kilonova.kit.versions import since
from kilonova.store import volumes as store
from kilonova.store.volumes import Act, Backup, Snapshot, Volume

PATH = "/v3/backups/{id}/action"


def missing(id: str) -> NotFound:
    return NotFound(f"Backup {frame.plain(id)} could not be found.")


BACKUPS = Collection(
    "backups",
    Backup,
    missing,
    columns={
        "id": "id",
        "name": "name",
        "status": "status",
        "volume_id": "volume_id",
        "snapshot_id": "snapshot_id",
        "size": "size_gb",
        "user_id": "user_id",
        "created_at": "created_at",
    },
)


class BackupView(msgspec.Struct, kw_only=True):
    id: str
    name: str | None
    description: str | None
    volume_id: str
    snapshot_id: str | None
    status: str
    size: int
    object_count: int
    container: str | None
    availability_zone: str | None
    created_at: str | None
    updated_at: str | None
    data_timestamp: str | None
    fail_reason: str | None
    is_incremental: bool
    has_dependent_backups: bool
    links: list[View]
    metadata: A[dict[str, str], since("3.43")]
    user_id: A[str, since("3.56")]
    encryption_key_id: A[str | None | UnsetType, since("3.64")] = UNSET
    project_id: A[str | UnsetType, since("3.18")] = msgspec.field(
        name="os-backup-project-attr:project_id", default=UNSET
    )


def view(call: Call, b: Backup) -> BackupView:
    shown = call.may("backup:backup_project_attribute", {"project_id": b.project_id})
    return BackupView(
        id=b.id,
        name=b.name,
        description=b.description,
        volume_id=b.volume_id,
        snapshot_id=b.snapshot_id,
        status=b.status,
        size=b.size_gb,
        object_count=1 if b.status == "available" else 0,
        container=b.container,
        availability_zone=b.zone,
        created_at=frame.moment(b.created_at),
        updated_at=frame.moment(b.updated_at),
        data_timestamp=frame.moment(b.data_at),
        fail_reason=b.failed,
        is_incremental=False,
        has_dependent_backups=False,
        links=frame.link(call, "backups", b.id),
        metadata=b.metadata,
        user_id=b.user_id,
        project_id=b.project_id if shown else UNSET,
    )


def brief(call: Call, b: Backup) -> View:
    return {"id": b.id, "name": b.name, "links": frame.link(call, "backups", b.id)}


@R.get("/v3/backups", policy="backup:get_all")
def index(call: Call) -> View:
    return frame.listing(
        call, BACKUPS, lambda tx, w, found: [brief(call, b) for b in found], counted=call.version >= 45
    )


@R.get("/v3/backups/detail", policy="backup:get_all")
def detail(call: Call) -> View:
    def shown(tx: Tx, world: World, found: Sequence[Backup]) -> list[Any]:
        return [view(call, b) for b in found]

    return frame.listing(call, BACKUPS, shown, counted=call.version >= 45)


def got(call: Call, tx: Tx, id: str, rule: str) -> Backup:
    b = store.look(tx, Backup, id)
    if b is None:
        call.checked = True
        raise missing(id)
    frame.seen(call, b, missing(id), "backup:get", rule)
    return b


@R.get("/v3/backups/{id}", policy="backup:get", late=True)
def show(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        return {"backup": view(call, got(call, tx, id, "backup:get"))}


class BackupWish(msgspec.Struct, kw_only=True):
    volume_id: str
    name: Name | None = None
    description: Name | None = None
    container: Name | None = None
    snapshot_id: str | None = None
    incremental: Flag = False
    force: Flag = False
    metadata: A[Metadata | None, since("3.43")] = None
    availability_zone: A[Name | None, since("3.51")] = None


class BackupBody(msgspec.Struct):
    backup: BackupWish


@R.post("/v3/backups", body=BackupBody, ok=202, policy="backup:create", late=True)
def create(call: Call) -> View:
    """Each is whole: to ask for an incremental one where there is none yet is refused, as it is elsewhere."""
    wish, world = call.body.backup, call.world
    frame.few_enough(wish.metadata or {})
    with world.db.tx() as tx:
        v = got_to_change(call, tx, wish.volume_id, "backup:create")
        if frame.flag(wish.incremental):
            raise Invalid("Invalid backup: No backups available to do an incremental backup: they are all full here.")
        source = _moment(tx, v, wish.snapshot_id)
        if source is None and v.status != "available" and not (v.status == "in-use" and frame.flag(wish.force)):
            raise invalid_volume(f"Volume {v.id} status must be available, or in-use with force, but it is {v.status}.")
        quotas.charge(tx, world, v.project_id, backups=1, backup_gigabytes=v.size_gb)
        now = world.clock.now()
        b = Backup(
            id=world.ids.uuid(),
            project_id=v.project_id,
            user_id=call.context.user_id,
            volume_id=v.id,
            created_at=now,
            updated_at=now,
            data_at=source.created_at if source else now,
            size_gb=v.size_gb,
            name=wish.name,
            description=wish.description,
            container=wish.container,
            zone=wish.availability_zone or v.zone,
            snapshot_id=source.id if source else None,
            metadata=wish.metadata or {},
        )
        store.add(tx, b)
        if source is None:
            store.change(tx, Volume, v.id, status="backing-up", updated_at=now)
        job = {"room": "snapshots", "id": source.id} if source else {"room": "volumes", "id": v.id}
        made = begin(tx, world, create_backup, b.id, request=call.request_id, back="backing-up", volume=v.id, **job)
    world.go(made)
    return {"backup": brief(call, b)}


def _moment(tx: Tx, v: Volume, snapshot_id: str | None) -> Snapshot | None:
    if not snapshot_id:
        return None
    s = store.look(tx, Snapshot, snapshot_id)
    if s is None or s.project_id != v.project_id:
        raise NotFound(f"Snapshot {frame.plain(snapshot_id)} could not be found.")
    if s.volume_id != v.id or s.status != "available":
        raise Invalid(f"Invalid snapshot: {s.id} is no available snapshot of volume {v.id}.")
    return s


def _in_error(tx: Tx, world: World, act: Act) -> tuple[str, str] | None:
    store.step(
        tx, Backup, act.subject, world.clock.now(), to="error", over=("creating",), failed="It could not be made."
    )
    actions.rest(tx, world, act.job["volume"], over="backing-up")
    return _whose(tx, act)


def _whose(tx: Tx, act: Act) -> tuple[str, str] | None:
    b = store.look(tx, Backup, act.subject)
    return None if b is None else (b.project_id, "VOLUME_BACKUP")


@act(_in_error)
def create_backup(world: World, act: Act) -> None:
    with world.db.read() as tx:
        b = store.look(tx, Backup, act.subject)
    if b is not None:
        world.bytes.clone((act.job["room"], act.job["id"]), ("backups", b.id), b.size_gb)
    with world.db.tx() as tx:
        if not end(tx, act):
            return
        store.step(tx, Backup, act.subject, world.clock.now(), to="available", over=("creating",))
        actions.rest(tx, world, act.job["volume"], over="backing-up")


class BackupChange(msgspec.Struct, kw_only=True):
    name: Name | None | UnsetType = UNSET
    description: Name | None | UnsetType = UNSET
    metadata: A[Metadata | UnsetType, since("3.43")] = UNSET


class ChangeBody(msgspec.Struct):
    backup: BackupChange


@R.put("/v3/backups/{id}", body=ChangeBody, versions="3.9-", policy="backup:update", late=True)
def update(call: Call, id: str) -> View:
    said = {k: x for k, x in msgspec.structs.asdict(call.body.backup).items() if x is not UNSET}
    frame.few_enough(said.get("metadata", {}))
    with call.world.db.tx() as tx:
        got(call, tx, id, "backup:update")
        store.change(tx, Backup, id, updated_at=call.world.clock.now(), **said)
        return {"backup": brief(call, BACKUPS.get(tx, id))}


# ---- back onto a volume


class RestoreWish(msgspec.Struct, kw_only=True):
    volume_id: str | None = None
    name: Name | None = None


class RestoreBody(msgspec.Struct):
    restore: RestoreWish


@R.post("/v3/backups/{id}/restore", body=RestoreBody, ok=202, policy="backup:restore", late=True)
def restore(call: Call, id: str) -> View:
    wish, world = call.body.restore, call.world
    with world.db.tx() as tx:
        b = got(call, tx, id, "backup:restore")
        if b.status != "available":
            raise Invalid("Invalid backup: Backup status must be available")
        v = _target(call, tx, b, wish)
        store.change(tx, Backup, id, status="restoring", updated_at=world.clock.now())
        how = {"request": call.request_id, "back": "restoring-backup", "room": "backups", "id": b.id}
        made = begin(tx, world, restore_backup, v.id, **how)
    world.go(made)
    return {"restore": {"backup_id": id, "volume_id": v.id, "volume_name": v.name}}


def _target(call: Call, tx: Tx, b: Backup, wish: RestoreWish) -> Volume:
    """The volume that is named, or a new one."""
    world: World = call.world
    now = world.clock.now()
    if wish.volume_id:
        v = store.lock(tx, wish.volume_id)
        if v is None or not call.may("volume:get", {"project_id": v.project_id}):
            raise no_volume(wish.volume_id)
        if v.project_id != b.project_id:
            raise Invalid("Invalid volume: a backup is restored to a volume of its own project.")
        if v.status != "available":
            raise invalid_volume("Volume to be restored to must be available")
        if v.size_gb < b.size_gb:
            raise invalid_volume(f"volume size {v.size_gb} is too small to restore backup of size {b.size_gb}.")
        store.change(tx, Volume, v.id, status="restoring-backup", updated_at=now)
        return v
    quotas.charge(tx, world, b.project_id, volumes=1, gigabytes=b.size_gb)
    kind = types.of_source(tx, b, types.default(tx))
    origin = store.look(tx, Volume, b.volume_id)
    v = Volume(
        id=world.ids.uuid(),
        project_id=b.project_id,
        user_id=call.context.user_id,
        created_at=now,
        updated_at=now,
        size_gb=b.size_gb,
        type_id=kind.id,
        zone=world.config.availability_zone,
        status="restoring-backup",
        name=wish.name or f"restore_backup_{b.id}",
        multiattach=types.multiattach(kind),
        bootable=origin is not None and origin.bootable,
        image=dict(origin.image) if origin else {},
    )
    store.add(tx, v)
    return v


def _not_restored(tx: Tx, world: World, act: Act) -> tuple[str, str] | None:
    now = world.clock.now()
    store.step(tx, Backup, act.job["id"], now, to="available", over=("restoring",))
    store.step(tx, Volume, act.subject, now, to="error_restoring", over=("restoring-backup",))
    v = store.look(tx, Volume, act.subject)
    return None if v is None else (v.project_id, "VOLUME")


@act(_not_restored)
def restore_backup(world: World, act: Act) -> None:
    with world.db.read() as tx:
        v = store.look(tx, Volume, act.subject)
    if v is not None:
        world.bytes.blank(v.id, v.size_gb)
        world.bytes.write_over(("backups", act.job["id"]), v.id)
    with world.db.tx() as tx:
        if not end(tx, act):
            return
        now = world.clock.now()
        store.step(tx, Backup, act.job["id"], now, to="available", over=("restoring",))
        actions.rest(tx, world, act.subject, over="restoring-backup")


# ---- the end


@R.delete("/v3/backups/{id}", ok=202, policy="backup:delete", late=True)
def delete(call: Call, id: str) -> None:
    _remove(call, id, "backup:delete", force=False)


@R.post(
    PATH,
    action="os-force_delete",
    body=Any,
    ok=202,
    policy="volume_extension:backup_admin_actions:force_delete",
    late=True,
)
def force_delete(call: Call, id: str) -> Reply:
    _remove(call, id, "volume_extension:backup_admin_actions:force_delete", force=True)
    return Reply(None)


def _remove(call: Call, id: str, rule: str, *, force: bool) -> None:
    world: World = call.world
    with world.db.tx() as tx:
        b = got(call, tx, id, rule)
        if (not force and b.status not in ("available", "error", "error_deleting")) or store.is_read(tx, id):
            raise Invalid("Invalid backup: Backup status must be available or error")
        store.change(tx, Backup, id, status="deleting", updated_at=world.clock.now())
        made = begin(tx, world, delete_backup, id, request=call.request_id)
    world.go(made)


def _not_deleted(tx: Tx, world: World, act: Act) -> tuple[str, str] | None:
    store.step(tx, Backup, act.subject, world.clock.now(), to="error_deleting", over=("deleting",))
    return _whose(tx, act)


@act(_not_deleted, quick=True)
def delete_backup(world: World, act: Act) -> None:
    world.bytes.drop("backups", act.subject)
    with world.db.tx() as tx:
        end(tx, act)
        b = store.look(tx, Backup, act.subject)
        if b is not None and store.remove(tx, Backup, b.id):
            quotas.discharge(tx, b.project_id, backups=1, backup_gigabytes=b.size_gb)


class Reset(msgspec.Struct):
    status: Literal["available", "error"]


@R.post(
    PATH,
    action="os-reset_status",
    body=Reset,
    ok=202,
    policy="volume_extension:backup_admin_actions:reset_status",
    late=True,
)
def reset_status(call: Call, id: str) -> Reply:
    with call.world.db.tx() as tx:
        got(call, tx, id, "volume_extension:backup_admin_actions:reset_status")
        store.change(tx, Backup, id, status=call.body.status, updated_at=call.world.clock.now())
    return Reply(None)
