"""Attachments (API 3.27): a volume is kept for a server, a host is told how to reach it, the server has it.

The status of a volume follows from its attachments: in-use where one is attached, else attaching, detaching or
reserved where one is, else available.
"""

from collections.abc import Iterable
from typing import Annotated as A
from typing import Any, Literal

import msgspec

from kilonova.companions.trust import trusted
from kilonova.companions.volume import frame
from kilonova.companions.volume.frame import Collection, R, View, invalid_volume
from kilonova.companions.volume.volumes import got_to_change
from kilonova.companions.volume.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.kit.versions import since
from kilonova.store import volumes as store
from kilonova.store.volumes import Attachment, Volume

SINCE = "3.27-"
STATUS = {"attached": "in-use", "attaching": "attaching", "detaching": "detaching", "reserved": "reserved"}


def missing(id: str) -> NotFound:
    return NotFound(f"Volume attachment could not be found with filter: attachment_id = {frame.plain(id)}.")


ATTACHMENTS = Collection(
    "attachments",
    Attachment,
    missing,
    columns={
        "id": "id",
        "attachment_id": "id",
        "status": "status",
        "attach_status": "status",
        "volume_id": "volume_id",
        "instance_id": "server_id",
        "instance_uuid": "server_id",
        "attached_host": "host",
        "attach_mode": "mode",
    },
)


def follows(attachments: Iterable[Attachment]) -> str:
    """The status of a volume with these attachments; pure."""
    there = {a.status for a in attachments}
    return next((status for kind, status in STATUS.items() if kind in there), "available")


def settle(tx: Tx, volume_id: str, now: float, **more: Any) -> None:
    """Let the volume's status follow from its attachments."""
    found = store.attachments_of(tx, [volume_id]).get(volume_id, [])
    store.change(tx, Volume, volume_id, status=follows(found), updated_at=now, **more)


# ---- views


def summary(a: Attachment) -> View:
    return {"id": a.id, "volume_id": a.volume_id, "instance": a.server_id, "status": a.status}


def view(a: Attachment) -> View:
    return summary(a) | {
        "attached_at": frame.moment(a.attached_at) or "",
        "detached_at": "",
        "attach_mode": a.mode,
        "connection_info": a.info or {},
    }


@R.get("/v3/attachments", versions=SINCE, policy="volume:get_all")
def index(call: Call) -> View:
    return frame.listing(call, ATTACHMENTS, lambda tx, w, found: [summary(a) for a in found])


@R.get("/v3/attachments/detail", versions=SINCE, policy="volume:get_all")
def detail(call: Call) -> View:
    return frame.listing(call, ATTACHMENTS, lambda tx, w, found: [view(a) for a in found])


@R.get("/v3/attachments/{id}", versions=SINCE, policy="volume:get", late=True)
def show(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        a = ATTACHMENTS.get(tx, id)
    frame.seen(call, a, missing(id), "volume:get")
    return {"attachment": view(a)}


# ---- the road of an attachment


class Wish(msgspec.Struct, kw_only=True):
    volume_uuid: str
    instance_uuid: A[str, msgspec.Meta(min_length=1, max_length=64)] | None = None
    connector: dict[str, Any] | None = None
    mode: A[Literal["ro", "rw", "null"] | None, since("3.54")] = None


class Body(msgspec.Struct):
    attachment: Wish


@R.post("/v3/attachments", body=Body, versions=SINCE, policy="volume:attachment_create", late=True)
def create(call: Call) -> View:
    wish, world = call.body.attachment, call.world
    with world.db.tx() as tx:
        v = got_to_change(call, tx, wish.volume_uuid, "volume:attachment_create")
        others = store.attachments_of(tx, [v.id]).get(v.id, [])
        _free(call, v, others, wish.instance_uuid)
        now = world.clock.now()
        a = Attachment(
            id=world.ids.uuid(),
            volume_id=v.id,
            project_id=v.project_id,
            created_at=now,
            server_id=wish.instance_uuid,
            mode=None if wish.mode in (None, "null") else wish.mode,
        )
        store.add(tx, a)
        if wish.connector:
            a = _connected(tx, world, v, [*others, a], a, wish.connector, wish.mode)
        else:
            store.change(tx, Volume, v.id, status="reserved", updated_at=now)
    return {"attachment": view(a)}


def _free(call: Call, v: Volume, others: list[Attachment], server: str | None) -> None:
    """May it be kept for this server? A second time for the same one: it is on its way to another host. Raises Invalid."""
    if v.status == "in-use" and v.multiattach and v.bootable:
        call.check({"project_id": v.project_id}, "volume:multiattach_bootable_volume")
    good = ("available", "in-use", "reserved", "attaching") if v.multiattach else ("available",)
    if v.status in good or (server and any(a.server_id == server for a in others)):
        return
    raise invalid_volume(f"Volume {v.id} status must be {' or '.join(good[:2])}, but it is {v.status}.")


class ConnectWish(msgspec.Struct, kw_only=True):
    connector: dict[str, Any]
    mode: A[Literal["ro", "rw"] | None, since("3.54")] = None


class ConnectBody(msgspec.Struct):
    attachment: ConnectWish


@R.put("/v3/attachments/{id}", body=ConnectBody, versions=SINCE, policy="volume:attachment_update", late=True)
def update(call: Call, id: str) -> View:
    """Which host, or bare machine, will use it; how it reaches the bytes, comes back. Said again: the same again."""
    wish = call.body.attachment
    with call.world.db.tx() as tx:
        a, v = _mine(call, tx, id, "volume:attachment_update")
        if v.status == "error":
            raise Conflict("Volume attachments can not be updated if the volume is in an error state.")
        others = store.attachments_of(tx, [v.id]).get(v.id, [])
        a = _connected(tx, call.world, v, others, a, wish.connector, wish.mode)
    return {"attachment": view(a)}


def _mine(call: Call, tx: Tx, id: str, rule: str) -> tuple[Attachment, Volume]:
    found = store.look(tx, Attachment, id)
    if found is None or not call.may("volume:get", {"project_id": found.project_id}):
        call.checked = True
        raise missing(id)
    v = got_to_change(call, tx, found.volume_id, rule)
    again = store.look(tx, Attachment, id)  # now that nobody else changes it
    if again is None:
        raise missing(id)
    return again, v


def _connected(
    tx: Tx,
    world: World,
    v: Volume,
    all: list[Attachment],
    a: Attachment,
    connector: dict[str, Any],
    mode: str | None,
) -> Attachment:
    host = connector.get("host")
    if not isinstance(host, str) or not 0 < len(host) <= 255:
        raise Invalid("Invalid input received: the connector names no host.")
    if len(msgspec.json.encode(connector)) > 8192:
        raise Invalid("Invalid input received: the connector is too long.")
    elsewhere = [o for o in all if o.id != a.id and o.info is not None and o.server_id != a.server_id]
    if elsewhere and not v.multiattach:
        raise invalid_volume(f"duplicate connectors detected on volume {v.id}")
    device = connector.get("mountpoint")
    mode = "ro" if v.readonly else mode or a.mode or ("ro" if connector.get("mode") == "ro" else "rw")
    values: dict[str, Any] = {
        "connector": connector,
        "host": host,
        "mountpoint": device[:255] if isinstance(device, str) else a.mountpoint,
        "mode": mode,
        "status": "attached" if a.status == "attached" else "attaching",
    }
    a = msgspec.structs.replace(a, **values)
    a = msgspec.structs.replace(a, info=connection(world, v, a) | {"attachment_id": a.id})
    store.change(tx, Attachment, a.id, **values, info=a.info)
    settle(tx, v.id, world.clock.now())
    return a


def connection(world: World, v: Volume, a: Attachment) -> dict[str, Any]:
    """How a host reaches the bytes: `docs/decisions/block-storage.md`. The form is that of the attachments API, where
    the data of a connection stand beside its type."""
    return {
        "driver_volume_type": "local",
        "device_path": str(world.bytes.path("volumes", v.id)),
        "format": "raw",
        "volume_id": v.id,
        "size_bytes": v.size_gb << 30,
        "access_mode": a.mode or "rw",
        "encrypted": False,
        "discard": True,
        "cacheable": False,
        "qos_specs": None,
    }


@R.post(
    "/v3/attachments/{id}/action",
    action="os-complete",
    body=Any,
    versions="3.44-",
    ok=204,
    policy="volume:attachment_complete",
    late=True,
)
def complete(call: Call, id: str) -> None:
    """It is in use: by its server, that may be on no host for a while (shelved) and has it all the same."""
    with call.world.db.tx() as tx:
        a, v = _mine(call, tx, id, "volume:attachment_complete")
        now = call.world.clock.now()
        if a.status != "attached":
            store.change(tx, Attachment, a.id, status="attached", attached_at=now)
        settle(tx, v.id, now)


@R.delete("/v3/attachments/{id}", versions=SINCE, policy="volume:attachment_delete", late=True)
def delete(call: Call, id: str) -> View:
    """What is left is shown. A user cannot take from under a server what it uses: its compute service must ask."""
    with call.world.db.tx() as tx:
        a, v = _mine(call, tx, id, "volume:attachment_delete")
        if a.server_id and a.info is not None and not trusted(call):
            raise Conflict(f"Detach volume from instance {a.server_id} using the Compute API")
        left = drop(tx, call.world, v, a)
    return {"attachments": [view(o) for o in left]}


def drop(tx: Tx, world: World, v: Volume, a: Attachment) -> list[Attachment]:
    store.remove(tx, Attachment, a.id)
    if v.status in (*STATUS.values(), "available"):
        settle(tx, v.id, world.clock.now())
    return store.attachments_of(tx, [v.id]).get(v.id, [])
