"""Snapshots: what a volume was at one moment, also of a volume that a server is writing."""

from collections.abc import Sequence
from typing import Annotated as A
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from kilonova.companions.volume import frame, quotas
from kilonova.companions.volume.frame import Collection, Flag, Metadata, Name, R, View, invalid_volume
from kilonova.companions.volume.volumes import doomed, got_to_change
from kilonova.companions.volume.world import World, act, begin, end
from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid, NotFound
from kilonova.kit.routes import Call, Reply
from kilonova.kit.versions import since
from kilonova.store import volumes as store
from kilonova.store.volumes import Act, Snapshot

PATH = "/v3/snapshots/{id}/action"


def missing(id: str) -> NotFound:
    return NotFound(f"Snapshot {frame.plain(id)} could not be found.")


SNAPSHOTS = Collection(
    "snapshots",
    Snapshot,
    missing,
    columns={
        "id": "id",
        "name": "name",
        "display_name": "name",
        "description": "description",
        "status": "status",
        "volume_id": "volume_id",
        "size": "size_gb",
        "volume_size": "size_gb",
        "user_id": "user_id",
        "created_at": "created_at",
        "updated_at": "updated_at",
    },
)


class SnapshotView(msgspec.Struct, kw_only=True):
    id: str
    name: str | None
    description: str | None
    volume_id: str
    status: str
    size: int
    created_at: str | None
    updated_at: str | None
    metadata: dict[str, str]
    group_snapshot_id: A[str | None, since("3.14")]
    user_id: A[str, since("3.41")]
    consumes_quota: A[bool, since("3.65")]
    progress: str | UnsetType = msgspec.field(name="os-extended-snapshot-attributes:progress", default=UNSET)
    project_id: str | UnsetType = msgspec.field(name="os-extended-snapshot-attributes:project_id", default=UNSET)


def view(s: Snapshot, *, whole: bool) -> SnapshotView:
    return SnapshotView(
        id=s.id,
        name=s.name,
        description=s.description,
        volume_id=s.volume_id,
        status=s.status,
        size=s.size_gb,
        created_at=frame.moment(s.created_at),
        updated_at=frame.moment(s.updated_at),
        metadata=s.metadata,
        group_snapshot_id=None,
        user_id=s.user_id,
        consumes_quota=True,
        progress=("100%" if s.status == "available" else "0%") if whole else UNSET,
        project_id=s.project_id if whole else UNSET,
    )


@R.get("/v3/snapshots", policy="volume:get_all_snapshots")
def index(call: Call) -> View:
    def shown(tx: Tx, world: World, found: Sequence[Snapshot]) -> list[Any]:
        return [view(s, whole=False) for s in found]

    return frame.listing(call, SNAPSHOTS, shown, counted=call.version >= 45)


@R.get("/v3/snapshots/detail", policy="volume:get_all_snapshots")
def detail(call: Call) -> View:
    def shown(tx: Tx, world: World, found: Sequence[Snapshot]) -> list[Any]:
        return [view(s, whole=True) for s in found]

    return frame.listing(call, SNAPSHOTS, shown, counted=call.version >= 45)


def got(call: Call, tx: Tx, id: str, rule: str) -> Snapshot:
    s = SNAPSHOTS.get(tx, id) if len(id) <= 36 else None
    if s is None:
        raise missing(id)
    frame.seen(call, s, missing(id), "volume:get_snapshot", rule)
    return s


@R.get("/v3/snapshots/{id}", policy="volume:get_snapshot", late=True)
def show(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        return {"snapshot": view(got(call, tx, id, "volume:get_snapshot"), whole=True)}


frame.with_metadata(
    SNAPSHOTS, "volume:get_snapshot_metadata", "volume:update_snapshot_metadata", "volume:delete_snapshot_metadata"
)


class SnapshotWish(msgspec.Struct, kw_only=True):
    volume_id: str
    name: Name | None = None
    display_name: Name | None = None
    description: Name | None = None
    display_description: Name | None = None
    force: Flag | None = None
    metadata: Metadata | None = None


class SnapshotBody(msgspec.Struct):
    snapshot: SnapshotWish


@R.post("/v3/snapshots", body=SnapshotBody, ok=202, policy="volume:create_snapshot", late=True)
def create(call: Call) -> View:
    """From 3.66 on a volume in use needs no force, and to say that there shall be none makes no sense.

    Who says nothing in 3.65 has meant 3.66: `openstack` looks whether we know it, and its SDK then asks in 3.65.
    """
    wish, world = call.body.snapshot, call.world
    forced = frame.flag(wish.force) if wish.force is not None else call.version >= 65
    if call.version >= 66:
        if wish.force is not None and not forced:
            raise Invalid("Invalid value 'False' for 'force': it is always true from version 3.66 on.")
        forced = True
    frame.few_enough(wish.metadata or {})
    with world.db.tx() as tx:
        v = got_to_change(call, tx, wish.volume_id, "volume:create_snapshot")
        if v.status != "available" and not (forced and v.status == "in-use"):
            raise invalid_volume(
                f"Volume {v.id} status must be available{' or in-use' if forced else ''}, but current status is: {v.status}."
            )
        quotas.charge(tx, world, v.project_id, snapshots=1, gigabytes=v.size_gb)
        now = world.clock.now()
        s = Snapshot(
            id=world.ids.uuid(),
            project_id=v.project_id,
            user_id=call.context.user_id,
            volume_id=v.id,
            created_at=now,
            updated_at=now,
            size_gb=v.size_gb,
            name=wish.name if wish.name is not None else wish.display_name,
            description=wish.description if wish.description is not None else wish.display_description,
            metadata=wish.metadata or {},
        )
        store.add(tx, s)
        made = begin(tx, world, create_snapshot, s.id, request=call.request_id, id=v.id)
    world.go(made)
    return {"snapshot": view(s, whole=False)}


def _in_error(tx: Tx, world: World, act: Act) -> tuple[str, str] | None:
    store.step(tx, Snapshot, act.subject, world.clock.now(), to="error", over=("creating",))
    s = store.look(tx, Snapshot, act.subject)
    return None if s is None else (s.project_id, "VOLUME_SNAPSHOT")


@act(_in_error)
def create_snapshot(world: World, act: Act) -> None:
    with world.db.read() as tx:
        s = store.look(tx, Snapshot, act.subject)
    if s is not None:
        world.bytes.clone(("volumes", s.volume_id), ("snapshots", s.id), s.size_gb)
    with world.db.tx() as tx:
        end(tx, act)
        if store.look(tx, Snapshot, act.subject) is None:
            world.bytes.drop("snapshots", act.subject)
        else:
            store.step(tx, Snapshot, act.subject, world.clock.now(), to="available", over=("creating",))


class SnapshotChange(msgspec.Struct, kw_only=True):
    name: Name | None | UnsetType = UNSET
    description: Name | None | UnsetType = UNSET
    display_name: Name | None | UnsetType = UNSET
    display_description: Name | None | UnsetType = UNSET


class ChangeBody(msgspec.Struct):
    snapshot: SnapshotChange


@R.put("/v3/snapshots/{id}", body=ChangeBody, policy="volume:update_snapshot", late=True)
def update(call: Call, id: str) -> View:
    said = call.body.snapshot
    values = frame.named(said)
    with call.world.db.tx() as tx:
        got(call, tx, id, "volume:update_snapshot")
        store.change(tx, Snapshot, id, updated_at=call.world.clock.now(), **values)
        return {"snapshot": view(SNAPSHOTS.get(tx, id), whole=False)}


@R.delete("/v3/snapshots/{id}", ok=202, policy="volume:delete_snapshot", late=True)
def delete(call: Call, id: str) -> None:
    _remove(call, id, "volume:delete_snapshot", force=False)


@R.post(
    PATH,
    action="os-force_delete",
    body=Any,
    ok=202,
    policy="volume_extension:snapshot_admin_actions:force_delete",
    late=True,
)
def force_delete(call: Call, id: str) -> Reply:
    _remove(call, id, "volume_extension:snapshot_admin_actions:force_delete", force=True)
    return Reply(None)


def _remove(call: Call, id: str, rule: str, *, force: bool) -> None:
    world: World = call.world
    with world.db.tx() as tx:
        s = got(call, tx, id, rule)
        if not force and s.status not in ("available", "error", "error_deleting"):
            raise Invalid("Invalid snapshot: Snapshot status must be available or error.")
        if store.is_read(tx, id):
            raise Invalid(f"Invalid snapshot: Snapshot {id} is being copied.")
        made = doomed(tx, world, s, call.request_id)
    world.go(made)


class Reset(msgspec.Struct):
    status: Literal["available", "creating", "deleting", "error", "error_deleting"]


@R.post(
    PATH,
    action="os-reset_status",
    body=Reset,
    ok=202,
    policy="volume_extension:snapshot_admin_actions:reset_status",
    late=True,
)
def reset_status(call: Call, id: str) -> Reply:
    return _reset(call, id, "volume_extension:snapshot_admin_actions:reset_status", call.body.status)


class Told(msgspec.Struct):
    status: Literal["creating", "available", "deleting", "error_deleting", "error"]
    progress: str | None = None


@R.post(
    PATH,
    action="os-update_snapshot_status",
    body=Told,
    ok=202,
    policy="volume_extension:snapshot_actions:update_snapshot_status",
    late=True,
)
def told(call: Call, id: str) -> Reply:
    """What a compute service says of a snapshot that it makes; ours are made here."""
    return _reset(call, id, "volume_extension:snapshot_actions:update_snapshot_status", call.body.status)


def _reset(call: Call, id: str, rule: str, status: str) -> Reply:
    with call.world.db.tx() as tx:
        got(call, tx, id, rule)
        store.change(tx, Snapshot, id, status=status, updated_at=call.world.clock.now())
    return Reply(None)
