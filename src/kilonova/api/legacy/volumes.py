"""Volumes and snapshots as the Compute API had them, to 2.35."""

from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from kilonova.api.bodies import Boolish, truth
from kilonova.api.registry import R, World, link, page_limit
from kilonova.clients import SnapshotInfo, VolumeInfo
from kilonova.kit.clock import iso_us, parsed
from kilonova.kit.errors import Invalid, NotFound
from kilonova.kit.routes import Call, Reply

VOLUMES, SNAPSHOTS, UNTIL = "/v2.1/os-volumes", "/v2.1/os-snapshots", "2.1-2.35"
T = TypeVar("T")
Number = Annotated[int, Meta(ge=0)]


class Query(msgspec.Struct):
    limit: list[Number] = []
    offset: list[Number] = []


def _page(call: Call, all: Iterator[T]) -> list[T]:
    """A slice: these lists have an offset, and no links."""
    q: Query = call.query
    first = q.offset[-1] if q.offset else 0
    most = page_limit(call, q.limit[-1] if q.limit and q.limit[-1] else None)
    return list(islice(all, first, first + most))


def _moment(said: str | None) -> str | None:
    return iso_us(parsed(said)) if said else None


# ---- volumes


class Size(msgspec.Struct, forbid_unknown_fields=True):
    size: Annotated[int, Meta(ge=1)] | Annotated[str, Meta(pattern=r"^0*[1-9][0-9]*$", max_length=12)]
    volume_type: str | UnsetType = UNSET
    metadata: dict[str, Any] | UnsetType = UNSET
    snapshot_id: str | UnsetType = UNSET
    availability_zone: str | UnsetType = UNSET
    display_name: str | UnsetType = UNSET
    display_description: str | UnsetType = UNSET


class VolumeBody(msgspec.Struct, forbid_unknown_fields=True):
    volume: Size


@R.get(VOLUMES, query=Query, versions=UNTIL, policy="os_compute_api:os-volumes:list")
def index(call: Call) -> dict[str, Any]:
    return _volumes(call)


@R.get(VOLUMES + "/detail", query=Query, versions=UNTIL, policy="os_compute_api:os-volumes:detail")
def detail(call: Call) -> dict[str, Any]:
    return _volumes(call)


def _volumes(call: Call) -> dict[str, Any]:
    world: World = call.world
    return {"volumes": [_volume(v) for v in _page(call, world.neighbours.volume.list(call.context.token))]}


@R.get(VOLUMES + "/{id}", versions=UNTIL, policy="os_compute_api:os-volumes:show")
def show(call: Call, id: str) -> dict[str, Any]:
    return {"volume": _volume(_the_volume(call, id))}


@R.post(VOLUMES, body=VolumeBody, versions=UNTIL, policy="os_compute_api:os-volumes:create")
def create(call: Call) -> Reply:
    world: World = call.world
    wish: Size = call.body.volume
    made = world.neighbours.volume.create(
        int(wish.size),
        name=wish.display_name or "",
        description=wish.display_description or "",
        snapshot_id=wish.snapshot_id or None,
        volume_type=wish.volume_type or None,
        availability_zone=wish.availability_zone or None,
        metadata={k: str(v) for k, v in (wish.metadata or {}).items()},
        token=call.context.token,
    )
    return Reply({"volume": _volume(made)}, headers={"Location": link(call, "os-volumes", made.id)})


@R.delete(VOLUMES + "/{id}", ok=202, versions=UNTIL, policy="os_compute_api:os-volumes:delete")
def delete(call: Call, id: str) -> None:
    _the_volume(call, id)
    call.world.neighbours.volume.delete(id, call.context.token)


def _the_volume(call: Call, id: str) -> VolumeInfo:
    world: World = call.world
    try:
        return world.neighbours.volume.show(id, call.context.token)
    except (NotFound, Invalid):
        raise NotFound(f"Volume {id} could not be found.") from None


def _volume(v: VolumeInfo) -> dict[str, Any]:
    """An empty attachment stands for none, as it always did here."""
    at = [
        {"id": v.id, "volumeId": v.id, "serverId": a.server_id} | ({"device": a.device} if a.device else {})
        for a in v.attachments
        if a.server_id
    ]
    return {
        "id": v.id,
        "status": v.status,
        "size": v.size_gb,
        "availabilityZone": v.availability_zone,
        "createdAt": _moment(v.created_at),
        "attachments": at or [{}],
        "displayName": v.name,
        "displayDescription": v.description,
        "volumeType": v.volume_type or None,
        "snapshotId": v.snapshot_id,
        "metadata": v.metadata,
    }


# ---- snapshots


class Snapshot(msgspec.Struct, forbid_unknown_fields=True):
    volume_id: str
    force: Boolish = False
    display_name: str | UnsetType = UNSET
    display_description: str | UnsetType = UNSET


class SnapshotBody(msgspec.Struct, forbid_unknown_fields=True):
    snapshot: Snapshot = field()


@R.get(SNAPSHOTS, query=Query, versions=UNTIL, policy="os_compute_api:os-volumes:snapshots:list")
def snapshots(call: Call) -> dict[str, Any]:
    return _snapshots(call)


@R.get(SNAPSHOTS + "/detail", query=Query, versions=UNTIL, policy="os_compute_api:os-volumes:snapshots:detail")
def snapshots_detail(call: Call) -> dict[str, Any]:
    return _snapshots(call)


def _snapshots(call: Call) -> dict[str, Any]:
    world: World = call.world
    return {"snapshots": [_snapshot(s) for s in _page(call, world.neighbours.volume.snapshots(call.context.token))]}


@R.get(SNAPSHOTS + "/{id}", versions=UNTIL, policy="os_compute_api:os-volumes:snapshots:show")
def show_snapshot(call: Call, id: str) -> dict[str, Any]:
    return {"snapshot": _snapshot(_the_snapshot(call, id))}


@R.post(SNAPSHOTS, body=SnapshotBody, versions=UNTIL, policy="os_compute_api:os-volumes:snapshots:create")
def create_snapshot(call: Call) -> dict[str, Any]:
    """Of a volume in use only when it is forced."""
    wish: Snapshot = call.body.snapshot
    try:
        volume = _the_volume(call, wish.volume_id)
    except NotFound as e:
        raise Invalid(e.said) from None
    if volume.status != "available" and not truth(wish.force):
        raise Invalid(
            f"Invalid volume: Volume {volume.id} status must be available, but current status is: {volume.status}."
        )
    made = call.world.neighbours.volume.create_snapshot(
        volume.id,
        name=wish.display_name or "",
        description=wish.display_description or "",
        token=call.context.token,
    )
    return {"snapshot": _snapshot(made)}


@R.delete(SNAPSHOTS + "/{id}", ok=202, versions=UNTIL, policy="os_compute_api:os-volumes:snapshots:delete")
def delete_snapshot(call: Call, id: str) -> None:
    _the_snapshot(call, id)
    call.world.neighbours.volume.delete_snapshot(id, call.context.token)


def _the_snapshot(call: Call, id: str) -> SnapshotInfo:
    world: World = call.world
    try:
        return world.neighbours.volume.snapshot(id, call.context.token)
    except (NotFound, Invalid):
        raise NotFound(f"Snapshot {id} could not be found.") from None


def _snapshot(s: SnapshotInfo) -> dict[str, Any]:
    return {
        "id": s.id,
        "status": s.status,
        "size": s.size_gb,
        "createdAt": _moment(s.created_at),
        "displayName": s.name,
        "displayDescription": s.description,
        "volumeId": s.volume_id,
    }
