"""Images, as the Compute API showed them; to 2.35, their metadata to 2.38."""

import urllib.parse
from typing import Annotated, Any

import msgspec
from msgspec import Meta, field

from kilonova.api.allowance import allowance, at_most
from kilonova.api.bodies import Metadata, MetaKey
from kilonova.api.registry import R, link, links, next_link
from kilonova.clients import ImageInfo
from kilonova.clients.image import NAMED
from kilonova.kit.clock import iso
from kilonova.kit.errors import Forbidden, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType

PATH, UNTIL, META_UNTIL = "/v2.1/images", "2.1-2.35", "2.1-2.38"

STATUS = {
    "active": "ACTIVE", "queued": "SAVING", "saving": "SAVING", "deleted": "DELETED", "pending_delete": "DELETED",
    "killed": "ERROR",
}  # fmt: skip
PROGRESS = {"queued": 25, "saving": 50, "active": 100}


class View(msgspec.Struct, kw_only=True):
    """`server`: what it was made of, where it is a snapshot."""

    id: str
    name: str | None
    links: list[dict[str, str]]
    min_disk: int = field(name="minDisk")
    min_ram: int = field(name="minRam")
    metadata: dict[str, str]
    created: str | None
    updated: str | None
    status: str
    progress: int
    size: int = field(name="OS-EXT-IMG-SIZE:size")
    disk_config: str | UnsetType = field(default=UNSET, name="OS-DCF:diskConfig")
    server: dict[str, Any] | UnsetType = UNSET


def _view(call: Call, i: ImageInfo) -> View:
    auto, made_of = i.properties.get("auto_disk_config"), i.properties.get("instance_uuid")
    return View(
        id=i.id,
        name=i.name,
        links=_links(call, i),
        min_disk=i.min_disk_gb,
        min_ram=i.min_ram_mb,
        metadata=i.properties,
        created=iso(i.created_at),
        updated=iso(i.updated_at),
        status=STATUS.get(i.status, "UNKNOWN"),
        progress=PROGRESS.get(i.status, 0),
        size=i.size,
        disk_config=UNSET if auto is None else "AUTO" if auto.lower() in ("true", "1", "yes", "on", "t") else "MANUAL",
        server=UNSET if made_of is None else {"id": made_of, "links": links(call, "servers", made_of)},
    )


def _links(call: Call, i: ImageInfo) -> list[dict[str, str]]:
    """`alternate` is its address at the image service."""
    config = call.world.config
    base = config.api.image_link_prefix or config.image.url or f"{call.url.removesuffix('/compute')}/image"
    there = {"rel": "alternate", "type": "application/vnd.openstack.image", "href": f"{base}/images/{i.id}"}
    bookmark = {"rel": "bookmark", "href": link(call, "images", i.id, version=False)}
    return [{"rel": "self", "href": link(call, "images", i.id)}, bookmark, there]


# ---- lists

Number = Annotated[int, Meta(ge=1)]


class Query(msgspec.Struct):
    """Also `property-NAME=…`. `page_size` and `offset` mean nothing to the image service."""

    name: str | None = None
    status: str | None = None
    changes_since: str | None = field(default=None, name="changes-since")
    server: str | None = None
    type: str | None = None
    min_ram: str | None = field(default=None, name="minRam")
    min_disk: str | None = field(default=None, name="minDisk")
    limit: list[Number] = []
    page_size: list[Number] = []
    marker: str | None = None
    offset: list[Number] = []


@R.get(PATH, query=Query, versions=UNTIL)
def index(call: Call) -> dict[str, Any]:
    found, more = _found(call, "images")
    return {"images": [{"id": i.id, "name": i.name, "links": _links(call, i)} for i in found]} | more


@R.get(PATH + "/detail", query=Query, versions=UNTIL)
def detail(call: Call) -> dict[str, Any]:
    found, more = _found(call, "images", "detail")
    return {"images": [_view(call, i) for i in found]} | more


def _found(call: Call, *path: str) -> tuple[list[ImageInfo], dict[str, Any]]:
    q: Query = call.query
    most: int = call.world.config.api.max_limit
    limit = min(q.limit[-1] if q.limit else most, most)
    filters: dict[str, str | int | None] = {
        "name": q.name,
        "status": q.status.lower() if q.status else None,
        "updated_at": f"gte:{q.changes_since}" if q.changes_since else None,
        "min_ram": q.min_ram,
        "min_disk": q.min_disk,
        "instance_uuid": q.server.rpartition("/")[2] if q.server else None,
        "image_type": q.type,
        "marker": q.marker,
        "limit": limit,
    }
    for name, value in urllib.parse.parse_qsl(call.raw_query, keep_blank_values=True):
        if name.startswith("property-") and name != "property-":
            filters.setdefault(name.removeprefix("property-"), value)
    found = []
    for i in call.world.neighbours.image.list(call.context.token, **filters):
        found.append(i)
        if len(found) == limit:
            return found, {"images_links": next_link(call, i.id, *path)}
    return found, {}


# ---- one


@R.get(PATH + "/{id}", versions=UNTIL)
def show(call: Call, id: str) -> dict[str, View]:
    return {"image": _view(call, _image(call, id))}


@R.delete(PATH + "/{id}", ok=204, versions=UNTIL)
def delete(call: Call, id: str) -> None:
    _image(call, id)
    try:
        call.world.neighbours.image.delete(id, call.context.token)
    except Forbidden as e:
        raise Forbidden("You are not allowed to delete the image.", why=e.said) from None


def _image(call: Call, id: str) -> ImageInfo:
    try:
        info: ImageInfo = call.world.neighbours.image.show(id, call.context.token)
    except (NotFound, Invalid):
        raise NotFound("Image not found.") from None
    return info


# ---- its metadata

METADATA = PATH + "/{image_id}/metadata"


class MetadataBody(msgspec.Struct, forbid_unknown_fields=True):
    metadata: Metadata


class OneBody(msgspec.Struct, forbid_unknown_fields=True):
    meta: Annotated[dict[MetaKey, Annotated[str, Meta(max_length=255)]], Meta(min_length=1, max_length=1)]


@R.get(METADATA, versions=META_UNTIL)
def metadata(call: Call, image_id: str) -> dict[str, Any]:
    return {"metadata": _image(call, image_id).properties}


@R.get(METADATA + "/{id}", versions=META_UNTIL)
def one_metadata(call: Call, image_id: str, id: str) -> dict[str, Any]:
    known = _image(call, image_id).properties
    if id not in known:
        raise NotFound("Metadata item was not found")
    return {"meta": {id: known[id]}}


@R.post(METADATA, body=MetadataBody, versions=META_UNTIL)
def add_metadata(call: Call, image_id: str) -> dict[str, Any]:
    """What is there stays, unless it is named here."""
    known = _image(call, image_id)
    return {"metadata": _write(call, known, known.properties | call.body.metadata)}


@R.put(METADATA, body=MetadataBody, versions=META_UNTIL)
def replace_metadata(call: Call, image_id: str) -> dict[str, Any]:
    return {"metadata": _write(call, _image(call, image_id), call.body.metadata)}


@R.put(METADATA + "/{id}", body=OneBody, versions=META_UNTIL)
def put_metadata(call: Call, image_id: str, id: str) -> dict[str, Any]:
    if id not in call.body.meta:
        raise Invalid("Request body and URI mismatch")
    known = _image(call, image_id)
    _write(call, known, known.properties | call.body.meta)
    return {"meta": call.body.meta}


@R.delete(METADATA + "/{id}", ok=204, versions=META_UNTIL)
def delete_metadata(call: Call, image_id: str, id: str) -> None:
    known = _image(call, image_id)
    if id not in known.properties:
        raise NotFound("Invalid metadata key")
    _write(call, known, {k: v for k, v in known.properties.items() if k != id})


def _write(call: Call, image: ImageInfo, wanted: dict[str, str]) -> dict[str, str]:
    """Make its properties these, by as few changes as it takes. What has a name of its own at the image service is none."""
    at_most(allowance(call), "metadata_items", len(wanted), "Image metadata limit exceeded")
    if named := sorted(k for k in wanted if k in NAMED):
        raise Invalid(f"{named[0]} is no property of an image that may be set here.")
    patch: list[dict[str, Any]] = [
        {"op": "add", "path": f"/{_pointer(k)}", "value": v} for k, v in wanted.items() if image.properties.get(k) != v
    ]
    patch += [{"op": "remove", "path": f"/{_pointer(k)}"} for k in image.properties if k not in wanted]
    if not patch:
        return image.properties
    changed: ImageInfo = call.world.neighbours.image.change(image.id, patch, call.context.token)
    return changed.properties


def _pointer(key: str) -> str:
    """RFC 6901."""
    return key.replace("~", "~0").replace("/", "~1")
