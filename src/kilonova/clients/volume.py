"""The block-storage service (Block Storage API v3), as a service asks it. Our own and a real Cinder alike.

Each question is put in the oldest microversion that knows it, so nothing is negotiated.  Addresses carry no project
(Cinder does without since its API 3.67): whose thing it is follows from the token, and what is made belongs to the
token's project.  So volumes and snapshots for a user are made with his token; everything else can be asked in our own
name, also about things that are his.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from kilonova.clients.carriers import Absent
from kilonova.clients.session import Query, Session, decoded, part
from kilonova.kit.clock import parsed
from kilonova.kit.errors import Invalid, NotFound, Unavailable

T = TypeVar("T")

COMMON = "3.48"  # the oldest that shows what we read; asked for where nothing newer is needed


class AttachedTo(msgspec.Struct, frozen=True):
    """What a volume says of one of its attachments. `server_id` "": to no server (reserved, or to a bare host)."""

    id: str = msgspec.field(name="attachment_id", default="")
    server_id: str | None = ""
    device: str | None = ""
    host: str | None = msgspec.field(name="host_name", default="")


class VolumeInfo(msgspec.Struct, frozen=True):
    """A volume. `status` as the API says it: creating, available, reserved, in-use, error, …

    `image_metadata` are the properties of the image it was made from (all texts); `metadata` the user's own.
    """

    id: str
    status: str
    size_gb: int = msgspec.field(name="size", default=0)
    name: str | None = ""
    description: str | None = ""
    bootable: str | bool = "false"
    multiattach: bool = False
    encrypted: bool = False
    volume_type: str | None = ""
    availability_zone: str | None = ""
    snapshot_id: str | None = None
    source_volume_id: str | None = msgspec.field(name="source_volid", default=None)
    user_id: str | None = ""
    project_id: str | None = msgspec.field(name="os-vol-tenant-attr:tenant_id", default="")
    host: str | None = msgspec.field(name="os-vol-host-attr:host", default="")
    created_at: str | None = ""
    attachments: list[AttachedTo] = []
    image_metadata: dict[str, str] = msgspec.field(name="volume_image_metadata", default_factory=dict)
    metadata: dict[str, str] = {}
    shared_targets: bool | None = False
    service_id: str | None = msgspec.field(name="service_uuid", default=None)
    replication_status: str | None = None
    migration: str | None = msgspec.field(name="migration_status", default=None)  # told to administrators

    @property
    def can_boot(self) -> bool:
        return str(self.bootable).lower() == "true"

    @property
    def readonly(self) -> bool:
        return self.metadata.get("readonly", "").lower() == "true"

    @property
    def born(self) -> float:
        """Seconds since 1970; 0: not said."""
        return parsed(self.created_at) if self.created_at else 0.0

    def attachment_of(self, server_id: str) -> AttachedTo | None:
        return next((a for a in self.attachments if a.server_id == server_id), None)


class SnapshotInfo(msgspec.Struct, frozen=True):
    """A snapshot of a volume: creating, available, deleting, error, …"""

    id: str
    status: str
    volume_id: str
    size_gb: int = msgspec.field(name="size", default=0)
    name: str | None = ""
    description: str | None = ""
    project_id: str | None = msgspec.field(name="os-extended-snapshot-attributes:project_id", default="")
    progress: str | None = msgspec.field(name="os-extended-snapshot-attributes:progress", default="")
    created_at: str | None = ""
    metadata: dict[str, str] = {}


class Attachment(msgspec.Struct, frozen=True):
    """One way from a volume to a server.

    `connection_info` is None until a host was named, then `{"driver_volume_type": …, "data": {…}, …}`, as hypervisors'
    drivers take it.  It may hold passwords: it is not for logs.
    """

    id: str
    volume_id: str
    status: str = ""  # reserved, attaching, attached, detached, error_attaching, …
    server_id: str | None = msgspec.field(name="instance", default=None)
    mode: str | None = msgspec.field(name="attach_mode", default=None)
    connection_info: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"Attachment({self.id} of {self.volume_id} to {self.server_id}, {self.status})"


class Volumes:
    """The block-storage service (Block Storage API v3)."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def there(self) -> bool:
        """Does this cloud have such a service at all?"""
        return not isinstance(self.session.carrier, Absent)

    # -- volumes

    def show(self, id: str, token: str | None = None) -> VolumeInfo:
        """Raises NotFound."""
        return self._json("GET", f"/volumes/{part(id)}", _OneVolume, token=token).volume

    def list(
        self,
        token: str | None = None,
        *,
        all_projects: bool = False,
        metadata: Mapping[str, str] | None = None,
        **filters: str | int | None,
    ) -> Iterator[VolumeInfo]:
        """All that fit, page after page; `filters` are the API's (`name=`, `status=`, `limit=`…)."""
        query: dict[str, str | int | None] = {**filters}
        if all_projects:
            query["all_tenants"] = 1
        if metadata:
            query["metadata"] = str(dict(metadata))
        yield from self._pages("volumes", VolumeInfo, query, token)

    def create(
        self,
        size_gb: int | None = None,
        *,
        name: str = "",
        description: str = "",
        image_id: str | None = None,
        snapshot_id: str | None = None,
        source_volume_id: str | None = None,
        volume_type: str | None = None,
        availability_zone: str | None = None,
        metadata: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> VolumeInfo:
        """A new volume, blank or from one of the three; `creating` at first. It belongs to the token's project.

        Raises Invalid, NotFound (what it is made from), OverQuota.
        """
        wish = {
            "size": size_gb,
            "name": name,
            "description": description,
            "imageRef": image_id,
            "snapshot_id": snapshot_id,
            "source_volid": source_volume_id,
            "volume_type": volume_type,
            "availability_zone": availability_zone,
            "metadata": dict(metadata or {}),
        }
        body = {"volume": {k: v for k, v in wish.items() if v is not None}}
        return self._json("POST", "/volumes", _OneVolume, body=body, token=token).volume

    def delete(self, id: str, token: str | None = None) -> None:
        """Also where there is none any more. Raises Invalid while it is in use."""
        with suppress(NotFound):
            self._tell("DELETE", f"/volumes/{part(id)}", token=token)

    def update(self, id: str, *, token: str | None = None, **wish: Any) -> VolumeInfo:
        """`name=`, `description=`, `metadata=`."""
        return self._json("PUT", f"/volumes/{part(id)}", _OneVolume, body={"volume": wish}, token=token).volume

    def unmark(self, id: str, token: str | None = None) -> None:
        """Take our mark out of its metadata. Nothing there: done."""
        with suppress(NotFound):
            self._tell("DELETE", f"/volumes/{part(id)}/metadata/{part(MADE_FOR)}", token=token)

    def begin_detaching(self, id: str, token: str | None = None) -> None:
        """in-use → detaching, so that two do not do it at once. Raises Invalid where it is not in use."""
        self._act(id, "os-begin_detaching", token=token)

    def roll_detaching(self, id: str, token: str | None = None) -> None:
        """Back to in-use. Nothing there: done."""
        with suppress(NotFound):
            self._act(id, "os-roll_detaching", token=token)

    def complete_migration(self, old: str, new: str, *, failed: bool = False, token: str | None = None) -> str:
        """A server was swapped from `old` to `new`: which of the ids goes on to be the user's volume."""
        said = {"new_volume": new, "error": failed}
        answer = self._json(
            "POST", f"/volumes/{part(old)}/action", _Saved, body={"os-migrate_volume_completion": said}, token=token
        )
        return answer.save_volume_id

    def complete_extension(self, id: str, *, failed: bool = False, token: str | None = None) -> None:
        """The server's host has seen the new size, or could not (API 3.71; asked of who asked us to look)."""
        self._act(id, "os-extend_volume_completion", {"error": failed}, version="3.71", token=token)

    def reimage(self, id: str, image_id: str, *, reserved: bool = False, token: str | None = None) -> None:
        """Write an image over it (API 3.68). `reserved`: also while a server holds it reserved."""
        said = {"image_id": image_id, "reimage_reserved": reserved}
        self._act(id, "os-reimage", said, version="3.68", token=token)

    def upload(self, id: str, name: str, *, disk_format: str = "raw", force: bool = False, token: str) -> str:
        """A new image of its bytes; the image's id. The image is the user's, so it is asked in his name."""
        said = {"image_name": name, "disk_format": disk_format, "container_format": "bare", "force": force}
        body = {"os-volume_upload_image": said}
        return str(
            self._json("POST", f"/volumes/{part(id)}/action", _Uploading, body=body, token=token).told["image_id"]
        )

    # -- attachments

    def reserve(
        self, volume_id: str, server_id: str, *, mode: str | None = None, token: str | None = None
    ) -> Attachment:
        """The volume is kept for this server, which no host needs to know yet.

        Raises Invalid where the volume is not free, NotFound. Each call makes one more: who may have asked before
        looks at `attachments` first.
        """
        wish: dict[str, Any] = {"volume_uuid": volume_id, "instance_uuid": server_id}
        if mode:
            wish["mode"] = mode
        version = "3.54" if mode else COMMON
        body = {"attachment": wish}
        return self._attachment("POST", "/attachments", body=body, version=version, token=token)

    def connect(
        self, id: str, connector: Mapping[str, Any], *, mode: str | None = None, token: str | None = None
    ) -> Attachment:
        """Tell which host will use it (`connector`: host, ip, initiator, mountpoint …); how, comes back.

        Safe to do twice. Raises NotFound, Invalid.
        """
        wish: dict[str, Any] = {"connector": dict(connector)} | ({"mode": mode} if mode else {})
        body, version = {"attachment": wish}, "3.54" if mode else COMMON
        return self._attachment("PUT", f"/attachments/{part(id)}", body=body, version=version, token=token)

    def complete(self, id: str, token: str | None = None) -> None:
        """The server has it: the volume is in-use. Safe to do twice."""
        self._tell("POST", f"/attachments/{part(id)}/action", body={"os-complete": None}, token=token)

    def release(self, id: str, token: str | None = None) -> None:
        """The end of an attachment; the last one leaves the volume available. Nothing there: done."""
        with suppress(NotFound):
            self._tell("DELETE", f"/attachments/{part(id)}", token=token)

    def attachment(self, id: str, token: str | None = None) -> Attachment:
        """Raises NotFound."""
        return self._attachment("GET", f"/attachments/{part(id)}", token=token)

    def attachments(
        self, *, server_id: str | None = None, volume_id: str | None = None, token: str | None = None
    ) -> Sequence[Attachment]:
        """Of a server, of a volume, or of both; in our own name those of every project."""
        query: dict[str, str | int | None] = {"instance_id": server_id, "volume_id": volume_id}
        if token is None:
            query["all_tenants"] = 1
        told = self._pages("attachments", dict[str, Any], query, token)
        return [msgspec.convert(nested(a), Attachment) for a in told]

    # -- snapshots

    def snapshot(self, id: str, token: str | None = None) -> SnapshotInfo:
        """Raises NotFound."""
        return self._json("GET", f"/snapshots/{part(id)}", _OneSnapshot, token=token).snapshot

    def snapshots(
        self, token: str | None = None, *, all_projects: bool = False, **filters: str | int | None
    ) -> Iterator[SnapshotInfo]:
        query: dict[str, str | int | None] = {**filters} | ({"all_tenants": 1} if all_projects else {})
        yield from self._pages("snapshots", SnapshotInfo, query, token)

    def create_snapshot(
        self,
        volume_id: str,
        *,
        name: str = "",
        description: str = "",
        metadata: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> SnapshotInfo:
        """Of a volume that may be in use; `creating` at first. Raises NotFound, Invalid, OverQuota."""
        wish = {"volume_id": volume_id, "force": True, "name": name, "description": description}
        body = {"snapshot": wish | {"metadata": dict(metadata or {})}}
        return self._json("POST", "/snapshots", _OneSnapshot, body=body, token=token).snapshot

    def delete_snapshot(self, id: str, token: str | None = None) -> None:
        """Also where there is none any more."""
        with suppress(NotFound):
            self._tell("DELETE", f"/snapshots/{part(id)}", token=token)

    def tell_snapshot(self, id: str, status: str, progress: str, token: str | None = None) -> None:
        """What became of a snapshot that a host of ours makes, or deletes. Nothing there: done."""
        body = {"os-update_snapshot_status": {"status": status, "progress": progress}}
        with suppress(NotFound):
            self._tell("POST", f"/snapshots/{part(id)}/action", body=body, token=token)

    def unmark_snapshot(self, id: str, token: str | None = None) -> None:
        """Take our mark out of its metadata. Nothing there: done."""
        with suppress(NotFound):
            self._tell("DELETE", f"/snapshots/{part(id)}/metadata/{part(MADE_OF)}", token=token)

    # -- about the service

    def zones(self, token: str | None = None) -> dict[str, bool]:
        """Availability zones, and whether they can be used."""
        said = self._json("GET", "/os-availability-zone", dict[str, list[dict[str, Any]]], token=token)
        return {
            z["zoneName"]: bool(z.get("zoneState", {}).get("available")) for z in said.get("availabilityZoneInfo", [])
        }

    def volume_type(self, name: str, token: str | None = None) -> dict[str, Any]:
        """By id or name; "default" is the one for who says none. Raises NotFound."""
        return dict(self._json("GET", f"/types/{part(name)}", dict[str, dict[str, Any]], token=token)["volume_type"])

    # -- how it is asked

    def _act(self, id: str, action: str, said: Any = None, *, version: str = COMMON, token: str | None = None) -> None:
        self._tell("POST", f"/volumes/{part(id)}/action", body={action: said}, version=version, token=token)

    def _attachment(self, method: str, path: str, **how: Any) -> Attachment:
        return msgspec.convert(nested(self._json(method, path, _OneAttachment, **how).attachment), Attachment)

    def _json(self, method: str, path: str, kind: type[T], *, version: str = COMMON, **how: Any) -> T:
        return self.session.json(method, f"/v3{path}", kind, headers=_asked_as(version), **how)

    def _tell(self, method: str, path: str, *, version: str = COMMON, **how: Any) -> None:
        self.session.tell(method, f"/v3{path}", headers=_asked_as(version), **how)

    def _pages(self, what: str, kind: type[T], query: Query, token: str | None) -> Iterator[T]:
        """By markers and not by the links that come with a page, which may name an address that is not ours."""
        said: dict[str, Any] = dict(query)
        while True:
            page = self._json("GET", f"/{what}/detail", dict[str, msgspec.Raw], query=said, token=token)
            raw = bytes(page.get(what, b"[]"))
            things: list[T] = []
            things += decoded(self.session.name, raw, list[kind])  # type: ignore[valid-type]
            yield from things
            if not things or f"{what}_links" not in page:
                return
            said["marker"] = decoded(self.session.name, raw, list[_Named])[-1].id


MADE_OF = "kilonova:image"  # in the metadata of a snapshot that is taken for an image of a server: the image's id
MADE_FOR = "kilonova:device"  # in the metadata of a volume that was made for a device of a server: the device's uuid


def given_back(
    volumes: Volumes, server_id: str, volume_id: str | None, device: str, others: Callable[[], bool] = lambda: False
) -> None:
    """What was reserved for this device of the server, or made for it, is so no longer. Nothing there: done.

    A volume that was made for it may have been free for a moment, and found by somebody: then it is theirs.  `others`:
    has the server this volume by another request?  It is asked when we have seen what there is, for what we saw was
    promised before.
    """
    if volume_id is not None:
        found = volumes.attachments(server_id=server_id, volume_id=volume_id)
        if found and not others():
            for a in found:
                volumes.release(a.id)
        return
    for v in volumes.list(all_projects=True, metadata={MADE_FOR: device}):
        if any(a.server_id != server_id for a in volumes.attachments(volume_id=v.id)):
            volumes.unmark(v.id)
        elif v.status not in ("deleting", "error_deleting"):
            erased(volumes, v)


def snapshots_dropped(volumes: Volumes, image_id: str) -> None:
    """Those that were taken for this image go. Raises Unavailable while one is on its way. Nothing there: done."""
    if not volumes.there:
        return
    for s in volumes.snapshots(all_projects=True, metadata=str({MADE_OF: image_id})):
        if s.status == "deleting" or s.metadata.get(MADE_OF) != image_id:
            continue
        try:
            volumes.delete_snapshot(s.id)
        except Invalid as e:
            raise Unavailable(f"Snapshot {s.id} is {s.status}.", why=e.said) from e


def erased(volumes: Volumes, volume: VolumeInfo) -> None:
    """Delete it. Raises Unavailable while it is on its way to a state in which it can be."""
    try:
        volumes.delete(volume.id)
    except Invalid as e:
        raise Unavailable(f"Volume {volume.id} is {volume.status}.", why=e.said) from e


def nested(attachment: dict[str, Any]) -> dict[str, Any]:
    """An attachment is told with the data of its connection spread out; drivers take them under `data`."""
    info = attachment.get("connection_info")
    if not info:
        return attachment | {"connection_info": None}
    data = {k: v for k, v in info.items() if k not in ("driver_volume_type", "attachment_id")}
    return attachment | {"connection_info": {"driver_volume_type": info.get("driver_volume_type"), "data": data}}


def _asked_as(version: str) -> dict[str, str]:
    return {"OpenStack-API-Version": f"volume {version}"}


class _Named(msgspec.Struct):
    id: str


class _OneVolume(msgspec.Struct):
    volume: VolumeInfo


class _OneSnapshot(msgspec.Struct):
    snapshot: SnapshotInfo


class _OneAttachment(msgspec.Struct):
    attachment: dict[str, Any]


class _Saved(msgspec.Struct):
    save_volume_id: str


class _Uploading(msgspec.Struct):
    told: dict[str, Any] = msgspec.field(name="os-volume_upload_image")
