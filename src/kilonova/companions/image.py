"""The Image API v2: create, upload, download, list, show, update, delete, tags, members, staging and import.

`open_store` gives the world, `recover` mends what a crash left (at start-up), `service` the WSGI application.
An upload is three acts: claim (queued → saving), bytes, finish (saving → active); a crash at any of them leaves
an image that is queued and a file that `recover` removes.
"""

import html
import re
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kilonova.companions import image_schemas as schemas
from kilonova.companions import image_search
from kilonova.companions.blobs import Blobs, Draft, Taken, pieces
from kilonova.companions.witness import sender_gone
from kilonova.kit.clock import Clock, Ids, iso
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    OverQuota,
    Unavailable,
    Unsupported,
)
from kilonova.kit.http import Dialect, Ended, Service, read_body
from kilonova.kit.policy import Policy, Rule
from kilonova.kit.routes import Call, Context, Reply, Routes
from kilonova.model import options
from kilonova.store import images as store
from kilonova.store.images import Image, Member

R = Routes("image")

TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    410: "Gone",
    413: "Request Entity Too Large",
    415: "Unsupported Media Type",
    416: "Requested Range Not Satisfiable",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


def _page(status: int, said: str, code: str) -> bytes:
    """As image services say it: a page that programs strip of its tags."""
    title = f"{status} {TITLES.get(status, 'Bad Request')}"
    text = html.escape(said, quote=False)
    return (
        f"<html>\n <head>\n  <title>{title}</title>\n </head>\n <body>\n  <h1>{title}</h1>\n  {text}<br /><br />\n"
        " </body>\n</html>"
    ).encode()


DIALECT = Dialect(
    fault=_page,
    statuses={OverQuota: 413, Unsupported: 415},
    bad_body="Provided object does not match schema 'image': {text} ({name})",
    unauthorized="This server could not verify that you are authorized to access the document you requested.",
    unexpected="The server has either erred or is incapable of performing the requested operation.",
)

SHOWN = "'community':%(visibility)s or 'public':%(visibility)s or 'shared':%(visibility)s"
OWN = "role:admin or (role:member and project_id:%(project_id)s)"
# fmt: off
RULES = [Rule(name, check) for name, check in {
    "default":            "",
    "context_is_admin":   "role:admin",
    "add_image":          "role:admin or (role:member and project_id:%(project_id)s and project_id:%(owner)s)",
    "delete_image":       OWN,
    "get_image":          f"role:admin or (role:reader and (project_id:%(project_id)s or project_id:%(member_id)s or {SHOWN}))",
    "get_images":         "role:admin or (role:reader and project_id:%(project_id)s)",
    "modify_image":       OWN,
    "publicize_image":    "role:admin",
    "communitize_image":  OWN,
    "download_image":     f"role:admin or (role:member and (project_id:%(project_id)s or project_id:%(member_id)s or {SHOWN}))",
    "upload_image":       OWN,
    "add_member":         OWN,
    "delete_member":      OWN,
    "modify_member":      "role:admin or (role:member and project_id:%(member_id)s)",
    "get_member":         "role:admin or (role:reader and (project_id:%(project_id)s or project_id:%(member_id)s))",
    "get_members":        "role:admin or (role:reader and (project_id:%(project_id)s or project_id:%(member_id)s))",
    "deactivate":         OWN,
    "reactivate":         OWN,
    "tasks_api_access":   "role:admin",
    "get_metadef_namespaces":      "role:admin or role:reader",
    "list_metadef_resource_types": "role:admin or role:reader",
}.items()]
# fmt: on


# ---- the whole


@dataclass
class World:
    """`uploads` and `downloads` bound how many move bytes at the same time: each holds a thread that answers requests."""

    db: Db
    clock: Clock
    ids: Ids
    blobs: Blobs
    config: options.Image
    uploads: threading.BoundedSemaphore
    downloads: threading.BoundedSemaphore


def open_store(
    db: Db,
    clock: Clock,
    ids: Ids,
    config: options.Image,
    directory: Path,
    *,
    uploads_max: int = 4,
    downloads_max: int = 6,
) -> World:
    """`directory` keeps the bytes; it is made. Both bounds should leave the server threads for everything else."""
    blobs = Blobs(directory, config.max_size_bytes)
    room = threading.BoundedSemaphore
    return World(db, clock, ids, blobs, config, room(uploads_max), room(downloads_max))


def recover(world: World) -> int:
    """What a crash left: images half uploaded are queued again, files without an image go. How many there were.

    Safe beside other processes that are at work on the same store.
    """
    with world.db.read() as tx:
        stuck = store.of_status(tx, "saving", "importing")
    dead = [id for id in stuck if not world.blobs.uploading(id)]
    with world.db.tx() as tx:
        now = world.clock.now()
        mended = sum(store.step(tx, id, now, to="queued", over=("saving", "importing")) for id in dead)

    def known() -> tuple[set[str], set[str]]:
        with world.db.read() as tx:
            return store.of_status(tx, "active", "deactivated"), store.of_status(tx, "uploading")

    return mended + world.blobs.sweep(known)


def service(
    world: World,
    authenticate: Callable[[str], Context],
    policy_file: Path | None = None,
    observe: Callable[..., None] | None = None,
) -> Service:
    return Service(
        R,
        DIALECT,
        world=world,
        authenticate=authenticate,
        policy=Policy(RULES, policy_file),
        ids=world.ids,
        observe=observe,
    )


# ---- discovery


def _versions(call: Call) -> dict[str, Any]:
    links = [{"rel": "self", "href": f"{call.url}/v2/"}]
    known = [("v2.9", "CURRENT"), *((f"v2.{n}", "SUPPORTED") for n in (7, 6, 5, 4, 3, 2, 1, 0))]
    return {"versions": [{"id": id, "status": status, "links": links} for id, status in known]}


@R.get("/", open=True, ok=300)
def root(call: Call) -> Any:
    return _versions(call)


@R.get("/versions", open=True)
def versions(call: Call) -> Any:
    return _versions(call)


@R.get("/v2", open=True, ok=300)
def v2(call: Call) -> Any:
    return _versions(call)


# ---- what may be said of an image

# fmt: off
READ_ONLY = {
    "id", "status", "size", "virtual_size", "checksum", "os_hash_algo", "os_hash_value", "created_at", "updated_at",
    "self", "file", "schema", "direct_url", "stores",
}
RESERVED = {"locations", "deleted", "deleted_at", "is_public", "properties", "members", "metadata", "store"}
CONTAINERS = ("ami", "ari", "aki", "bare", "ovf", "ova", "docker", "compressed")
# fmt: on
PROPERTIES_MAX = TAGS_MAX = MEMBERS_MAX = 128

Visibility = Literal["public", "private", "shared", "community"]
Line = Annotated[str, Meta(max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$")]
Number = Annotated[int, Meta(ge=0, le=2_147_483_647)]


class Wish(msgspec.Struct, kw_only=True):
    """The attributes that a user may set, under the API's names; `os_hidden` is `hidden` elsewhere."""

    name: Line | None = None
    visibility: Visibility = "shared"
    disk_format: str | None = None
    container_format: str | None = None
    min_disk: Number = 0
    min_ram: Number = 0
    protected: bool = False
    os_hidden: bool = False
    owner: Annotated[str, Meta(min_length=1, max_length=255)] = ""
    tags: Annotated[list[Line], Meta(max_length=TAGS_MAX)] = []


NAMES = tuple(f.name for f in msgspec.structs.fields(Wish))


def _wish(said: dict[str, Any], config: options.Image) -> tuple[Wish, dict[str, str]]:
    """Attributes and the caller's own properties. Raises Invalid, Forbidden, OverQuota."""
    for name in said:
        if name in READ_ONLY:
            raise Forbidden(f"Attribute '{name}' is read-only.")
        if name in RESERVED or name.startswith("os_glance"):
            raise Forbidden(f"Attribute '{name}' is reserved.")
    try:
        wish = msgspec.convert({k: v for k, v in said.items() if k in NAMES}, Wish)
    except msgspec.ValidationError as e:
        text = str(e).replace("`", "'").replace("$.", "")
        raise Invalid(f"Provided object does not match schema 'image': {text}") from None
    if wish.disk_format is not None and wish.disk_format not in config.formats:
        raise Invalid(f"Invalid disk format '{wish.disk_format[:50]}' for image.")
    if wish.container_format is not None and wish.container_format not in CONTAINERS:
        raise Invalid(f"Invalid container format '{wish.container_format[:50]}' for image.")
    properties = {k: v for k, v in said.items() if k not in NAMES}
    if len(properties) > PROPERTIES_MAX:
        raise OverQuota(f"The limit has been exceeded on the number of allowed image properties: {PROPERTIES_MAX}.")
    for name, value in properties.items():
        if not isinstance(value, str) or len(value) > 65_535 or "\x00" in value:
            raise Invalid(f"Provided object does not match schema 'image': property '{name[:255]}' must be a text.")
        if not 0 < len(name) <= 255 or not name.isprintable():
            raise Invalid("Provided object does not match schema 'image': a property has no good name.")
    return wish, properties


def _said(image: Image) -> dict[str, Any]:
    """What `_wish` reads, of an image that is there."""
    own = {"os_hidden": image.hidden, **{n: getattr(image, n) for n in NAMES if n != "os_hidden"}}
    return own | image.properties


# ---- create, show, list


@R.post("/v2/images", body=dict[str, Any], ok=201, policy="add_image", late=True)
def create(call: Call) -> Reply:
    said = dict(call.body)
    id = said.pop("id", None)
    if id is not None:
        id = _uuid(id)
    wish, properties = _wish(said, call.world.config)
    owner = wish.owner or call.context.project_id or ""
    if not owner:
        raise Forbidden("An image is a project's: a token of a project, or an owner, is needed.")
    call.check({"project_id": owner, "owner": owner})
    now = call.world.clock.now()
    image = Image(
        id=id or call.world.ids.uuid(),
        owner=owner,
        created_at=now,
        updated_at=now,
        name=wish.name,
        visibility=wish.visibility,
        disk_format=wish.disk_format,
        container_format=wish.container_format,
        min_disk=wish.min_disk,
        min_ram=wish.min_ram,
        protected=wish.protected,
        hidden=wish.os_hidden,
        tags=sorted(set(wish.tags)),
        properties=properties,
    )
    _may_show(call, image)
    with call.world.db.tx() as tx:
        store.create(tx, image)
    headers = {
        "Location": f"{call.url}/v2/images/{image.id}",
        "OpenStack-image-import-methods": "glance-direct",
    }
    return Reply(view(image), headers=headers)


def _uuid(text: Any) -> str:
    try:
        if isinstance(text, str) and len(text) == 36:
            return str(uuid.UUID(text))
    except ValueError:
        pass
    raise Invalid("Provided object does not match schema 'image': 'id' must be a UUID.")


def _may_show(call: Call, image: Image) -> None:
    if image.visibility == "public":
        call.check(_target(image), "publicize_image")
    if image.visibility == "community":
        call.check(_target(image), "communitize_image")


@R.get("/v2/images/{id}", policy="get_image", late=True)
def show(call: Call, id: str) -> Any:
    return view(_seen(call, id))


def view(image: Image) -> dict[str, Any]:
    return {
        **image.properties,
        "id": image.id,
        "name": image.name,
        "status": image.status,
        "visibility": image.visibility,
        "protected": image.protected,
        "os_hidden": image.hidden,
        "checksum": image.checksum,
        "owner": image.owner,
        "size": image.size,
        "virtual_size": image.virtual_size,
        "min_disk": image.min_disk,
        "min_ram": image.min_ram,
        "disk_format": image.disk_format,
        "container_format": image.container_format,
        "os_hash_algo": image.hash_algo,
        "os_hash_value": image.hash_value,
        "created_at": iso(image.created_at),
        "updated_at": iso(image.updated_at),
        "tags": image.tags,
        "self": f"/v2/images/{image.id}",
        "file": f"/v2/images/{image.id}/file",
        "schema": "/v2/schemas/image",
    }


def _find(tx: Tx, call: Call, id: str) -> tuple[Image, Member | None]:
    """The image, if the caller may know of it, and his share of it. Raises NotFound."""
    image = store.look(tx, id)
    mine = call.context.project_id
    member = None
    if image and mine and image.owner != mine and image.visibility == "shared":
        member = store.member(tx, id, mine)
    seen = image and (
        call.context.is_admin
        or call.context.system is not None
        or image.owner == mine
        or image.visibility in ("public", "community")
        or member is not None
    )
    if not image or not seen:
        call.checked = True
        raise NotFound(f"No image found with ID {id[:64]}")
    return image, member


def _target(image: Image, member: Member | None = None) -> dict[str, Any]:
    return {
        "project_id": image.owner,
        "owner": image.owner,
        "member_id": member.member_id if member else "-",
        "visibility": image.visibility if image.visibility != "shared" or member else "-",
    }


def _seen(call: Call, id: str) -> Image:
    """The image, if the route's rule lets the caller."""
    with call.world.db.read() as tx:
        image, member = _find(tx, call, id)
    call.check(_target(image, member))
    return image


LIMIT, LIMIT_MAX = 25, 1000


@R.get("/v2/images", policy="get_images")
def listing(call: Call) -> Any:
    said = urllib.parse.parse_qsl(call.raw_query, keep_blank_values=True)
    one = dict(said)
    limit = min(image_search.number(one.get("limit", str(LIMIT)), "limit"), LIMIT_MAX)
    viewer = None if call.context.is_admin or call.context.system else call.context.project_id or "-"
    asked, order = image_search.search(viewer, said), image_search.order(said)
    with call.world.db.read() as tx:
        marker = None
        if one.get("marker"):
            marker, _ = _find(tx, call, one["marker"])
        found = store.page(tx, asked, order, limit=limit + 1, marker=marker) if limit else []
    kept = [(k, v) for k, v in said if k != "marker"]

    def link(more: list[tuple[str, str]]) -> str:
        query = urllib.parse.urlencode(kept + more)
        return f"/v2/images?{query}" if query else "/v2/images"

    body: dict[str, Any] = {
        "images": [view(i) for i in found[:limit]],
        "first": link([]),
        "schema": "/v2/schemas/images",
    }
    if len(found) > limit:
        body["next"] = link([("marker", found[limit - 1].id)])
    return body


# ---- update


class Step(msgspec.Struct, frozen=True):
    op: str
    name: str
    value: Any = None


@R.patch("/v2/images/{id}", raw=True, policy="modify_image", late=True)
def update(call: Call, id: str) -> Any:
    steps = _steps(call)
    with call.world.db.tx() as tx:
        image, member = _find(tx, call, id)
        call.check(_target(image, member))
        changed = _patched(call, image, steps)
        store.change(tx, changed)
    return view(changed)


def _steps(call: Call) -> list[Step]:
    """A JSON patch (RFC 6902) with paths of one step; in the API's newer form or its older one."""
    kind = (call.headers("Content-Type") or "").partition(";")[0].strip().lower()
    if kind not in ("application/openstack-images-v2.1-json-patch", "application/openstack-images-v2.0-json-patch"):
        raise Unsupported(f"Expected a body of application/openstack-images-v2.1-json-patch, not of {kind[:64]}.")
    raw = read_body(_environ(call), 114_688)
    try:
        said = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Invalid("Malformed request body") from None
    if not isinstance(said, list) or not all(isinstance(s, dict) for s in said):
        raise Invalid("Request body must be a JSON array of operation objects.")
    return [_step(s, old="v2.0" in kind) for s in said[:1000]]


def _environ(call: Call) -> dict[str, Any]:
    return {
        "wsgi.input": call.stream,
        "CONTENT_LENGTH": "" if call.content_length is None else str(call.content_length),
        "HTTP_TRANSFER_ENCODING": call.headers("Transfer-Encoding") or "",
    }


def _step(said: dict[str, Any], *, old: bool) -> Step:
    op = next((o for o in ("add", "replace", "remove") if o in said), None) if old else said.get("op")
    path = said.get(op or "") if old else said.get("path")
    if op not in ("add", "replace", "remove") or not isinstance(path, str):
        raise Invalid("Operations must be add, replace or remove, with a path.")
    if op != "remove" and "value" not in said:
        raise Invalid(f'Operation "{op}" requires a member named "value".')
    if not path.startswith("/") or path.endswith("/") or re.search(r"//|~(?![01])", path):
        raise Invalid(f"Pointer `{path[:255]}` is not a good one.")
    if "/" in path[1:] and not path.startswith("/locations"):
        raise Invalid(f"Invalid JSON pointer for this resource: {path[:255]}")
    name = path[1:].partition("/")[0].replace("~1", "/").replace("~0", "~")
    return Step(op, name, said.get("value"))


def _patched(call: Call, image: Image, steps: list[Step]) -> Image:
    """The image as it shall be. Raises Conflict for what cannot be done, Forbidden for what may not."""
    said = _said(image)
    for s in steps:
        if s.name in READ_ONLY:
            raise Forbidden(f"Attribute '{s.name}' is read-only.")
        if s.name in RESERVED or s.name.startswith("os_glance"):
            raise Forbidden(f"Attribute '{s.name}' is reserved.")
        if s.op == "remove":
            if s.name in NAMES:
                raise Forbidden(f"Property {s.name} may not be removed.")
            if s.name not in said:
                raise Conflict(f"Property {s.name[:255]} does not exist.")
            del said[s.name]
        elif s.op == "replace" and s.name not in said:
            raise Conflict(f"Property {s.name[:255]} does not exist.")
        else:
            said[s.name] = s.value
    wish, properties = _wish(said, call.world.config)
    if (wish.disk_format, wish.container_format) != (
        image.disk_format,
        image.container_format,
    ) and image.status != "queued":
        raise Forbidden("Attributes disk_format and container_format can be changed only for a queued image.")
    if wish.owner != image.owner and not call.context.is_admin:
        raise Forbidden("You are not permitted to modify 'owner' on this image.")
    changed = msgspec.structs.replace(
        image,
        updated_at=call.world.clock.now(),
        owner=wish.owner,
        name=wish.name,
        visibility=wish.visibility,
        disk_format=wish.disk_format,
        container_format=wish.container_format,
        min_disk=wish.min_disk,
        min_ram=wish.min_ram,
        protected=wish.protected,
        hidden=wish.os_hidden,
        tags=sorted(set(wish.tags)),
        properties=properties,
    )
    if changed.visibility != image.visibility:
        _may_show(call, changed)
    return changed


# ---- delete


@R.delete("/v2/images/{id}", ok=204, policy="delete_image", late=True)
def delete(call: Call, id: str) -> None:
    """Who is reading its bytes reads them to their end."""
    image = _seen(call, id)
    with call.world.db.tx() as tx:
        if not store.drop(tx, id) and store.look(tx, id) is not None:
            raise Forbidden(f"Image {id} is protected and cannot be deleted.")
    call.world.blobs.drop(image.id)


# ---- bytes in


@R.put("/v2/images/{id}/file", raw=True, ok=204, policy="upload_image", late=True)
def upload(call: Call, id: str) -> None:
    image = _seen(call, id)
    _octets(call)
    with _room(call.world), _claimed(call, image, "saving") as draft:
        taken = _taken(call, draft, image.disk_format)
        draft.keep()
        _finish(call, id, taken, over="saving")


@R.put("/v2/images/{id}/stage", raw=True, ok=204, policy="modify_image", late=True)
def stage(call: Call, id: str) -> None:
    """Bytes for a later import; they are looked into then."""
    image = _seen(call, id)
    _octets(call)
    with _room(call.world), _claimed(call, image, "saving") as draft:
        taken = _taken(call, draft, None)
        draft.put_aside()
        with call.world.db.tx() as tx:
            now = call.world.clock.now()
            if not store.step(tx, id, now, to="uploading", over=("saving",), size=taken.size):
                raise Ended(410, f"Image {id} was deleted while its data were on their way.")


class Method(msgspec.Struct):
    name: str


class ImportWish(msgspec.Struct):
    method: Method


@R.post("/v2/images/{id}/import", body=ImportWish, ok=202, policy="modify_image", late=True)
def take_in(call: Call, id: str) -> None:
    """`glance-direct`: make an image of what was staged. Done when it is answered."""
    image = _seen(call, id)
    if call.body.method.name != "glance-direct":
        raise Invalid(f"Import method '{call.body.method.name[:64]}' is not available: glance-direct is.")
    if image.status != "uploading":
        raise Conflict("For the import method glance-direct the image must be staged before.")
    _formats(image)
    try:
        staged = (call.world.blobs.staged / image.id).open("rb")
    except FileNotFoundError:
        raise Conflict("There is nothing staged for this image.") from None
    with staged, _room(call.world), _claimed(call, image, "importing") as draft:
        taken = draft.take(staged, None, image.disk_format)
        draft.keep()
        _finish(call, id, taken, over="importing")
        (call.world.blobs.staged / image.id).unlink(missing_ok=True)


@contextmanager
def _room(world: World) -> Iterator[None]:
    if not world.uploads.acquire(blocking=False):
        raise Unavailable("Too many images are being uploaded just now; try again soon.")
    try:
        yield
    finally:
        world.uploads.release()


@contextmanager
def _claimed(call: Call, image: Image, status: str) -> Iterator[Draft]:
    """Nobody else brings bytes for it meanwhile. Whatever goes wrong, it is as it was before, and nothing is left."""
    world: World = call.world
    _formats(image)
    before = "uploading" if status == "importing" else "queued"
    draft = world.blobs.draft(image.id, world.ids.hex())
    done = False
    try:
        with world.db.tx() as tx:
            if not store.step(tx, image.id, world.clock.now(), to=status, over=(before,)):
                now = store.look(tx, image.id)
                if now is None:
                    raise NotFound(f"No image found with ID {image.id}")
                raise Conflict(f"Image status transition from {now.status} to {status} is not allowed")
        try:
            yield draft
            done = True
        except BaseException:
            draft.close(drop=True)  # first: where the disk is full, the database finds room again
            with world.db.tx() as tx:
                store.step(tx, image.id, world.clock.now(), to=before, over=(status,))
            raise
    finally:
        draft.close(drop=not done)


def _finish(call: Call, id: str, taken: Taken, *, over: str) -> None:
    sums = {"checksum": taken.md5, "hash_algo": "sha512", "hash_value": taken.sha512}
    sizes = {"size": taken.size, "virtual_size": taken.virtual_size}
    with call.world.db.tx() as tx:
        if not store.step(tx, id, call.world.clock.now(), to="active", over=(over,), **sizes, **sums):
            raise Ended(410, f"Image {id} could not be found after upload. It may have been deleted during the upload.")


def _formats(image: Image) -> None:
    missing = [n for n in ("disk_format", "container_format") if getattr(image, n) is None]
    if missing:
        raise Invalid(f"Properties {', '.join(missing)} must be set prior to saving data.")


def _octets(call: Call) -> None:
    kind = (call.headers("Content-Type") or "").partition(";")[0].strip().lower()
    if kind != "application/octet-stream":
        raise Unsupported(f"Image data must come as application/octet-stream, not as {kind[:64] or 'nothing'}.")


def _taken(call: Call, draft: Draft, disk_format: str | None) -> Taken:
    """The whole body. Raises Invalid where it broke off."""
    if call.stream is None:
        raise Invalid("There is no body.")
    chunked = "chunked" in (call.headers("Transfer-Encoding") or "").lower()
    taken = draft.take(call.stream, None if chunked else (call.content_length or 0), disk_format)
    if chunked and _served(call) and sender_gone(taken.size):
        raise Invalid("The upload broke off.")
    return taken


def _served(call: Call) -> bool:
    """Does this call hold a thread of the server? (In one process neighbours ask with threads of their own.)"""
    return type(call.stream).__module__.startswith("granian")


@R.get("/v2/images/{id}/tasks", policy="get_image", late=True)
def image_tasks(call: Call, id: str) -> dict[str, Any]:
    """What is being done with it in the background: bytes are taken in while they come, so there is never any."""
    _seen(call, id)
    return {"tasks": []}


# ---- bytes out


@R.get("/v2/images/{id}/file", policy="download_image", late=True)
def download(call: Call, id: str) -> Reply:
    image = _seen(call, id)
    if image.status == "deactivated" and not call.context.is_admin:
        raise Forbidden("The requested image has been deactivated. Image data download is forbidden.")
    if image.status not in ("active", "deactivated"):
        return Reply(None, status=204)
    size = image.size or 0
    asked = call.headers("Range")
    if not size:
        return Reply(None, status=204)
    first, last = _range(asked, size) if asked else (0, size - 1)
    headers = {"Accept-Ranges": "bytes"}
    if asked:
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    elif image.checksum:
        headers["Content-MD5"] = image.checksum
    length = last - first + 1
    file = call.world.blobs.open(id)
    if not _served(call):
        stream = pieces(file, first, length)
    elif call.world.downloads.acquire(blocking=False):
        stream = pieces(file, first, length, done=call.world.downloads.release)
    else:
        file.close()
        raise Unavailable("Too many images are being downloaded just now; try again soon.")
    return Reply(stream=stream, status=206 if asked else 200, headers=headers, length=length)


def _range(text: str, size: int) -> tuple[int, int]:
    """One range of bytes (RFC 9110, 14.1). Raises Ended 416."""
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", text.strip())
    if found and (found[1] or found[2]):
        first = int(found[1]) if found[1] else max(0, size - int(found[2]))
        last = min(int(found[2]), size - 1) if found[1] and found[2] else size - 1
        if first <= last:
            return first, last
    raise Ended(416, "The range cannot be had.", headers={"Content-Range": f"bytes */{size}"})


# ---- tags, actions


@R.put("/v2/images/{id}/tags/{tag}", ok=204, policy="modify_image", late=True)
def tag(call: Call, id: str, tag: str) -> None:
    _retag(call, id, lambda tags: tags | {tag})


@R.delete("/v2/images/{id}/tags/{tag}", ok=204, policy="modify_image", late=True)
def untag(call: Call, id: str, tag: str) -> None:
    def without(tags: set[str]) -> set[str]:
        if tag not in tags:
            raise NotFound(f"Could not find tag {tag[:64]} of image {id}.")
        return tags - {tag}

    _retag(call, id, without)


def _retag(call: Call, id: str, change: Callable[[set[str]], set[str]]) -> None:
    with call.world.db.tx() as tx:
        image, member = _find(tx, call, id)
        call.check(_target(image, member))
        tags = change(set(image.tags))
        if len(tags) > TAGS_MAX:
            raise OverQuota(f"The limit has been exceeded on the number of allowed image tags: {TAGS_MAX}.")
        if any(not 0 < len(t) <= 255 or not t.isprintable() for t in tags):
            raise Invalid("A tag has up to 255 printable letters.")
        now = call.world.clock.now()
        store.change(tx, msgspec.structs.replace(image, tags=sorted(tags), updated_at=now))


@R.post("/v2/images/{id}/actions/deactivate", raw=True, ok=204, policy="deactivate", late=True)
def deactivate(call: Call, id: str) -> None:
    _switch(call, id, to="deactivated", over="active")


@R.post("/v2/images/{id}/actions/reactivate", raw=True, ok=204, policy="reactivate", late=True)
def reactivate(call: Call, id: str) -> None:
    _switch(call, id, to="active", over="deactivated")


def _switch(call: Call, id: str, *, to: str, over: str) -> None:
    image = _seen(call, id)
    with call.world.db.tx() as tx:
        if image.status != to and not store.step(tx, id, call.world.clock.now(), to=to, over=(over,)):
            raise Forbidden(f"Not allowed to change image {id} from status '{image.status}' to '{to}'.")


# ---- members


class MemberWish(msgspec.Struct):
    member: Annotated[str, Meta(min_length=1, max_length=255)]


class MemberAnswer(msgspec.Struct):
    status: Literal["pending", "accepted", "rejected"]


@R.post("/v2/images/{id}/members", body=MemberWish, policy="add_member", late=True)
def add_member(call: Call, id: str) -> Any:
    image = _shared(call, id)
    now = call.world.clock.now()
    m = Member(image.id, call.body.member, "pending", now, now)
    with call.world.db.tx() as tx:
        if len(store.members(tx, id)) >= MEMBERS_MAX:
            raise OverQuota(f"The limit has been exceeded on the number of allowed image members: {MEMBERS_MAX}.")
        store.share(tx, m)
    return _member(m)


@R.get("/v2/images/{id}/members", policy="get_members", late=True)
def list_members(call: Call, id: str) -> Any:
    """Its owner sees all, a member himself."""
    image = _shared(call, id)
    with call.world.db.read() as tx:
        found = store.members(tx, id)
    if not call.context.is_admin and image.owner != call.context.project_id:
        found = [m for m in found if m.member_id == call.context.project_id]
    return {"members": [_member(m) for m in found], "schema": "/v2/schemas/members"}


@R.get("/v2/images/{id}/members/{member}", policy="get_member", late=True)
def show_member(call: Call, id: str, member: str) -> Any:
    image = _shared(call, id)
    with call.world.db.read() as tx:
        found = store.member(tx, id, member)
    if found is None or not (call.context.is_admin or call.context.project_id in (image.owner, member)):
        raise NotFound(f"Could not find member {member[:64]} of image {id}.")
    return _member(found)


@R.put("/v2/images/{id}/members/{member}", body=MemberAnswer, policy="modify_member", late=True)
def answer_member(call: Call, id: str, member: str) -> Any:
    """It is the member who accepts or rejects; not the owner for him."""
    with call.world.db.tx() as tx:
        image, _ = _find(tx, call, id)
        call.check({**_target(image), "member_id": member})
        if not store.answer(tx, image.id, member, call.body.status, call.world.clock.now()):
            raise NotFound(f"Could not find member {member[:64]} of image {id}.")
        found = store.member(tx, id, member)
    assert found
    return _member(found)


@R.delete("/v2/images/{id}/members/{member}", ok=204, policy="delete_member", late=True)
def drop_member(call: Call, id: str, member: str) -> None:
    _shared(call, id)
    with call.world.db.tx() as tx:
        if not store.unshare(tx, id, member):
            raise NotFound(f"Could not find member {member[:64]} of image {id}.")


def _shared(call: Call, id: str) -> Image:
    with call.world.db.read() as tx:
        image, member = _find(tx, call, id)
    call.check(_target(image, member))
    if image.visibility != "shared":
        raise Forbidden("Only shared images have members.")
    return image


def _member(m: Member) -> dict[str, Any]:
    return {
        "image_id": m.image_id,
        "member_id": m.member_id,
        "status": m.status,
        "created_at": iso(m.created_at),
        "updated_at": iso(m.updated_at),
        "schema": "/v2/schemas/member",
    }


# ---- what clients ask about the service


@R.get("/v2/info/import")
def import_methods(call: Call) -> Any:
    about = {"description": "Import methods available.", "type": "array", "value": ["glance-direct"]}
    return {"import-methods": about}


@R.get("/v2/info/stores")
def stores(call: Call) -> Any:
    raise NotFound("Multi backend is not supported at this site.")


@R.get("/v2/info/usage")
def usage(call: Call) -> Any:
    return {"usage": {}}


@R.get("/v2/tasks", policy="tasks_api_access")
def tasks(call: Call) -> Any:
    """There are none: an import is done when it is answered."""
    return {"tasks": [], "first": "/v2/tasks", "schema": "/v2/schemas/tasks"}


@R.get("/v2/metadefs/namespaces", policy="get_metadef_namespaces")
def namespaces(call: Call) -> Any:
    """No catalog of definitions is kept; dashboards ask all the same."""
    return {"namespaces": [], "first": "/v2/metadefs/namespaces", "schema": "/v2/schemas/metadefs/namespaces"}


@R.get("/v2/metadefs/resource_types", policy="list_metadef_resource_types")
def resource_types(call: Call) -> Any:
    return {"resource_types": []}


@R.get("/v2/schemas/image")
def image_schema(call: Call) -> Any:
    return schemas.image(call.world.config, CONTAINERS)


@R.get("/v2/schemas/images")
def images_schema(call: Call) -> Any:
    return schemas.many("images", schemas.image(call.world.config, CONTAINERS))


@R.get("/v2/schemas/member")
def member_schema(call: Call) -> Any:
    return schemas.MEMBER


@R.get("/v2/schemas/members")
def members_schema(call: Call) -> Any:
    return {
        "name": "members",
        "properties": {"members": {"type": "array", "items": schemas.MEMBER}, "schema": {"type": "string"}},
        "links": [{"rel": "describedby", "href": "{schema}"}],
    }
