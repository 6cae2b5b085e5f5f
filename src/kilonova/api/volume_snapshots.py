"""os-assisted-volume-snapshots: the volume service asks whoever writes to a volume's file to go on in another one.

Some volumes are files that only the hypervisor that has them open can make a snapshot of.  The answer comes at once;
what became of it is told to the volume service, as the status of its snapshot.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kilonova.api.bodies import dashed
from kilonova.api.registry import R, World
from kilonova.contracts.jobs import MergeVolume, SnapshotVolume
from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType
from kilonova.kit.workflow import start
from kilonova.model.server import Server
from kilonova.store import block_devices, servers

PATH, RULES = "/v2.1/os-assisted-volume-snapshots", "os_compute_api:os-assisted-volume-snapshots"
Text = Annotated[str, Meta(min_length=1)]


class CreateInfo(msgspec.Struct, forbid_unknown_fields=True):
    snapshot_id: Text
    type: Literal["qcow2"]
    new_file: Text
    id: Text | UnsetType = UNSET


class Wish(msgspec.Struct, forbid_unknown_fields=True):
    volume_id: Text
    create_info: CreateInfo


class Body(msgspec.Struct, forbid_unknown_fields=True):
    snapshot: Wish


@R.post(PATH, body=Body, policy=f"{RULES}:create")
def create(call: Call) -> dict[str, Any]:
    wish: Wish = call.body.snapshot
    told = wish.create_info
    _file_name(told.new_file, "new_file")
    server = _writer(call, wish.volume_id)
    job = SnapshotVolume(server, dashed(wish.volume_id), told.snapshot_id, told.new_file)
    _begin(call, server, "snapshot_volume", job)
    return {"snapshot": {"id": None if told.id is UNSET else told.id, "volumeId": dashed(wish.volume_id)}}


class Query(msgspec.Struct):
    delete_info: list[str] = []


class DeleteInfo(msgspec.Struct):
    """`file_to_merge` goes: into `merge_target_file` behind it; without one what is behind it comes into the file in use."""

    volume_id: Text
    type: str | None = None
    file_to_merge: str | None = None
    merge_target_file: str | None = None


@R.delete(PATH + "/{id}", query=Query, strict="2.75", ok=204, policy=f"{RULES}:delete")
def delete(call: Call, id: str) -> None:
    said = (call.query.delete_info or [""])[-1]
    try:
        info = msgspec.json.decode(said, type=DeleteInfo)
    except msgspec.MsgspecError:
        raise Invalid("delete_info must be a JSON document that says which volume_id it is about.") from None
    for name in ("file_to_merge", "merge_target_file"):
        if getattr(info, name) is not None:
            _file_name(getattr(info, name), name)
    server = _writer(call, info.volume_id)
    job = MergeVolume(server, dashed(info.volume_id), id, info.file_to_merge, info.merge_target_file)
    _begin(call, server, "merge_volume", job)


def _file_name(said: str, what: str) -> None:
    """A file beside the one in use, and nowhere else."""
    if "/" in said or "\0" in said or said in (".", "..") or len(said) > 255:
        raise Invalid(f"Invalid input for field/attribute {what}. It must be the name of a file, without a directory.")


def _writer(call: Call, volume_id: str) -> Server:
    """The server that has this volume. Raises Invalid where there is none, or more than one; NotFound: no such volume."""
    world: World = call.world
    try:
        volume = world.neighbours.volume.show(dashed(volume_id))
    except NotFound:
        raise Invalid(f"Volume {volume_id[:60]} could not be found.") from None
    ids = [a.server_id for a in volume.attachments if a.server_id]
    with world.db.read() as tx:
        known = servers.find(tx, ids) if ids else {}
    mine = [
        s
        for s in known.values()
        if s.deleted_at is None and block_devices.of_volume(s, dashed(volume_id)) is not None and s.host is not None
    ]
    if not mine:
        raise Invalid(f"No server on a host has the volume {volume_id[:60]}.")
    if len(mine) > 1 or volume.multiattach:
        raise Invalid(f"Block Device {volume_id[:60]} is multi-attached; its snapshots cannot be assisted.")
    return mine[0]


def _begin(call: Call, server: Server, flow: str, job: Any) -> None:
    """No user asked for it: it is not among the server's actions."""
    world: World = call.world

    def record(tx: Tx) -> str:
        return start(tx, flow, job, id=world.ids.uuid(), subject=server.id, now=world.clock.now())

    world.wake(world.db.run(record))
