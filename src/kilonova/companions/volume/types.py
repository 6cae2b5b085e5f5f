"""Types of volumes: the operator's words for kinds of storage; here they differ in whether several servers may share one."""

import re
from typing import Annotated as A
from typing import Any

import msgspec
import sqlalchemy as sa
from msgspec import UNSET, Meta, UnsetType

from kilonova.companions.volume import frame
from kilonova.companions.volume.frame import Flag, Name, R, View
from kilonova.companions.volume.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call, Reply
from kilonova.store import volumes as store
from kilonova.store.volumes import Backup, Snapshot, Type, Volume

DEFAULT = "__DEFAULT__"
FIRST = {
    DEFAULT: ("Default Volume Type", {}),
    "multiattach": ("For several servers at once", {"multiattach": "<is> True"}),
}
Specs = dict[A[str, Meta(min_length=1, max_length=255, pattern=r"\A[\w.:\- ]+\Z")], A[str, Meta(max_length=255)]]


def missing(id: str) -> NotFound:
    return NotFound(f"Volume type {frame.plain(id)} could not be found.")


def furnish(tx: Tx, world: World) -> None:
    """The types of a cloud that has none yet."""
    if store.count(tx, Type):
        return
    for name, (said, specs) in FIRST.items():
        now = world.clock.now()
        store.add(tx, Type(id=world.ids.uuid(), name=name, created_at=now, description=said, extra_specs=specs))


def multiattach(kind: Type) -> bool:
    return kind.extra_specs.get("multiattach", "").lower() == "<is> true"


def chosen(call: Call, tx: Tx, said: str | None) -> Type:
    """By id or name, the default where none is said. Raises NotFound."""
    return named(call, tx, said) if said else default(tx)


def default(tx: Tx) -> Type:
    found = store.find(tx, Type, store.TYPES.c.name == DEFAULT) or store.find(tx, Type)
    if not found:
        raise NotFound("Default volume type can not be found.")
    return found[0]


def of_source(tx: Tx, source: Snapshot | Volume | Backup, otherwise: Type) -> Type:
    """What is made of a volume is of its type."""
    volume = source if isinstance(source, Volume) else store.look(tx, Volume, getattr(source, "volume_id", ""))
    return (volume and store.look(tx, Type, volume.type_id)) or otherwise


def named(call: Call, tx: Tx, said: str) -> Type:
    """Raises NotFound, also for one that is not his to use."""
    c = store.TYPES.c
    found = store.find(tx, Type, sa.or_(c.id == said, c.name == said))
    best = next((t for t in found if t.id == said), found[0] if found else None)
    if best is None or not _may_use(call, best):
        raise missing(said)
    return best


def _may_use(call: Call, t: Type) -> bool:
    return t.is_public or call.context.is_admin or call.context.project_id in t.projects


def view(call: Call, t: Type) -> View:
    shown: View = {
        "id": t.id,
        "name": t.name,
        "description": t.description,
        "is_public": t.is_public,
        "os-volume-type-access:is_public": t.is_public,
        "extra_specs": t.extra_specs if call.context.is_admin else _harmless(t.extra_specs),
    }
    if call.context.is_admin:
        shown["qos_specs_id"] = None
    return shown


def _harmless(specs: dict[str, str]) -> dict[str, str]:
    """What users may know (Block Storage API, user visible extra specs)."""
    return {k: v for k, v in specs.items() if k in ("multiattach", "RESKEY:availability_zones", "replication_enabled")}


@R.get("/v3/types", policy="volume_extension:type_get_all")
def index(call: Call) -> View:
    said = frame.asked(call)
    public = said.get("is_public", "true").lower()
    with call.world.db.read() as tx:
        found = [t for t in store.find(tx, Type) if _may_use(call, t)]
    if call.context.is_admin and public in ("false", "0", "f"):
        found = [t for t in found if not t.is_public]
    elif call.context.is_admin and public not in ("none",):
        found = [t for t in found if t.is_public]
    if "name" in said:
        found = [t for t in found if t.name == said["name"]]
    found.reverse()
    if marker := said.get("marker"):
        ids = [t.id for t in found]
        if marker not in ids:
            raise missing(marker)
        found = found[ids.index(marker) + 1 :]
    if re.fullmatch("[0-9]{1,9}", said.get("limit", "")):
        found = found[: int(said["limit"])]
    return {"volume_types": [view(call, t) for t in found]}


@R.get("/v3/types/{id}", policy="volume_extension:type_get")
def show(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        return {"volume_type": view(call, default(tx) if id == "default" else named(call, tx, id))}


class TypeWish(msgspec.Struct, kw_only=True):
    name: A[str, Meta(min_length=1, max_length=255, pattern=r"\A[^\x00]*\S[^\x00]*\Z")]
    description: Name | None = None
    extra_specs: Specs | None = None
    public: Flag = msgspec.field(name="os-volume-type-access:is_public", default=True)
    is_public: Flag | None = None


class TypeBody(msgspec.Struct):
    volume_type: TypeWish


@R.post("/v3/types", body=TypeBody, policy="volume_extension:type_create")
def create(call: Call) -> View:
    wish, world = call.body.volume_type, call.world
    public = wish.is_public if wish.is_public is not None else wish.public
    made = Type(
        id=world.ids.uuid(),
        name=wish.name,
        created_at=world.clock.now(),
        description=wish.description,
        is_public=frame.flag(public),
        extra_specs=wish.extra_specs or {},
    )
    try:
        with world.db.tx() as tx:
            store.add(tx, made)
    except sa.exc.IntegrityError as e:
        raise Conflict(f"Volume Type {frame.plain(wish.name)} already exists.", why=str(e)) from None
    shown = view(call, made)
    shown.pop("qos_specs_id", None)  # of a new one the API does not say it
    return {"volume_type": shown}


class TypeChange(msgspec.Struct, kw_only=True):
    name: A[str, Meta(max_length=255)] | None | UnsetType = UNSET
    description: Name | None | UnsetType = UNSET
    is_public: Flag | None | UnsetType = UNSET


class ChangeBody(msgspec.Struct):
    volume_type: TypeChange


@R.put("/v3/types/{id}", body=ChangeBody, policy="volume_extension:type_update")
def update(call: Call, id: str) -> View:
    said = call.body.volume_type
    values: dict[str, Any] = {}
    if isinstance(said.name, str):
        if not said.name.strip() or "\x00" in said.name:
            raise Invalid("Invalid input received: Volume type name can not be empty.")
        values["name"] = said.name
    if said.description is not UNSET:
        values["description"] = said.description
    if said.is_public is not UNSET and said.is_public is not None:
        values["is_public"] = frame.flag(said.is_public)
    if not values:
        raise Invalid("Specify volume type name, description, is_public or a combination thereof.")
    try:
        with call.world.db.tx() as tx:
            found = named(call, tx, id)
            store.change(tx, Type, found.id, **values)
            return {"volume_type": view(call, msgspec.structs.replace(found, **values))}
    except sa.exc.IntegrityError as e:
        raise Conflict(f"Volume Type {frame.plain(said.name or '')} already exists.", why=str(e)) from None


@R.delete("/v3/types/{id}", ok=202, policy="volume_extension:type_delete")
def delete(call: Call, id: str) -> None:
    with call.world.db.tx() as tx:
        found = named(call, tx, id)
        if store.count(tx, Volume, store.VOLUMES.c.type_id == found.id):
            raise Invalid(f"Volume Type {found.id} deletion is not allowed with volumes present with the type.")
        if found.name == DEFAULT:
            raise Invalid(f"Volume type {found.id} is the default one and cannot be deleted.")
        store.remove(tx, Type, found.id)


# ---- extra specs


class SpecsBody(msgspec.Struct):
    extra_specs: Specs


def _specs(call: Call, id: str, become: Any = None) -> dict[str, str]:
    with call.world.db.tx() as tx:
        found = named(call, tx, id)
        if become is None:
            return found.extra_specs if call.context.is_admin else _harmless(found.extra_specs)
        now: dict[str, str] = become(found.extra_specs)
        used = store.count(tx, Volume, store.VOLUMES.c.type_id == found.id)
        if used and now.get("multiattach") != found.extra_specs.get("multiattach"):
            raise Invalid(f"Volume Type is currently in use: {found.id}.")
        store.change(tx, Type, found.id, extra_specs=now)
    return now


@R.get("/v3/types/{id}/extra_specs", policy="volume_extension:types_extra_specs:index")
def list_specs(call: Call, id: str) -> View:
    return {"extra_specs": _specs(call, id)}


@R.post("/v3/types/{id}/extra_specs", body=SpecsBody, policy="volume_extension:types_extra_specs:create")
def add_specs(call: Call, id: str) -> View:
    said = call.body.extra_specs
    _specs(call, id, lambda specs: specs | said)
    return {"extra_specs": said}


@R.get("/v3/types/{id}/extra_specs/{key}", policy="volume_extension:types_extra_specs:show")
def show_spec(call: Call, id: str, key: str) -> View:
    found = _specs(call, id)
    if key not in found:
        raise NotFound(f"Volume Type {frame.plain(id)} has no extra specs with key {frame.plain(key)}.")
    return {key: found[key]}


@R.put("/v3/types/{id}/extra_specs/{key}", body=Specs, policy="volume_extension:types_extra_specs:update")
def put_spec(call: Call, id: str, key: str) -> View:
    said: dict[str, str] = call.body
    if list(said) != [key]:
        raise Invalid("Request body and URI mismatch" if key not in said else "Request body contains too many items")
    _specs(call, id, lambda specs: specs | said)
    return said


@R.delete("/v3/types/{id}/extra_specs/{key}", ok=202, policy="volume_extension:types_extra_specs:delete")
def drop_spec(call: Call, id: str, key: str) -> None:
    def without(specs: dict[str, str]) -> dict[str, str]:
        if key not in specs:
            raise NotFound(f"Volume Type {frame.plain(id)} has no extra specs with key {frame.plain(key)}.")
        return {k: v for k, v in specs.items() if k != key}

    _specs(call, id, without)


# ---- who may use one that is not public


@R.get("/v3/types/{id}/os-volume-type-access", policy="volume_extension:volume_type_access:get_all_for_type")
def access(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        found = named(call, tx, id)
    if found.is_public:
        raise NotFound("Access list not available for public volume types.")
    return {"volume_type_access": [{"volume_type_id": found.id, "project_id": p} for p in found.projects]}


class AccessBody(msgspec.Struct):
    project: A[str, Meta(min_length=1, max_length=255, pattern=r"\A[^\x00]*\Z")]


@R.post(
    "/v3/types/{id}/action",
    action="addProjectAccess",
    body=AccessBody,
    ok=202,
    policy="volume_extension:volume_type_access:addProjectAccess",
)
def add_access(call: Call, id: str) -> Reply:
    with call.world.db.tx() as tx:
        found = _private(call, tx, id)
        if call.body.project in found.projects:
            raise Conflict(
                f"Volume type access for {found.id} / {frame.plain(call.body.project)} combination already exists."
            )
        store.change(tx, Type, found.id, projects=[*found.projects, call.body.project])
    return Reply(None)


@R.post(
    "/v3/types/{id}/action",
    action="removeProjectAccess",
    body=AccessBody,
    ok=202,
    policy="volume_extension:volume_type_access:removeProjectAccess",
)
def remove_access(call: Call, id: str) -> Reply:
    with call.world.db.tx() as tx:
        found = _private(call, tx, id)
        if call.body.project not in found.projects:
            raise NotFound(
                f"Volume type access not found for {found.id} / {frame.plain(call.body.project)} combination."
            )
        store.change(tx, Type, found.id, projects=[p for p in found.projects if p != call.body.project])
    return Reply(None)


def _private(call: Call, tx: Tx, id: str) -> Type:
    found = named(call, tx, id)
    if found.is_public:
        raise Conflict("Type access modification is not applicable to public volume type.")
    return found


# ---- encryption: volumes of this service are not encrypted


@R.get("/v3/types/{id}/encryption", policy="volume_extension:volume_type_encryption:get")
def encryption(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        named(call, tx, id)
    return {}
