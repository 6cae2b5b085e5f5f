"""Flavors, who may use them, and their extra specs."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, field

from kilonova.api.bodies import Boolish, Digits, Name, truth
from kilonova.api.notices import told
from kilonova.api.registry import R, links, next_link, page_limit
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType, since, until
from kilonova.model import notices as words
from kilonova.model.flavor import Flavor
from kilonova.store import catalog

SPECS = "os_compute_api:os-flavor-extra-specs:index"
MAX = 2**31 - 1
Size = Annotated[int, Meta(ge=0, le=MAX)] | Digits
SpecKey = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9-_:. ]{1,255}$")]
SpecValue = Annotated[str, Meta(max_length=255)] | int | float
FlavorId = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^(?! )[a-zA-Z0-9. _-]+(?<! )$")]
LongText = Annotated[str, Meta(max_length=65535, pattern=r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*$")]


class FlavorView(msgspec.Struct, kw_only=True):
    id: str
    name: str
    ram: int
    disk: int
    vcpus: int
    swap: int | str
    ephemeral: int = field(name="OS-FLV-EXT-DATA:ephemeral")
    is_public: bool = field(name="os-flavor-access:is_public")
    links: list[dict[str, str]]
    disabled: Annotated[bool, until("2.101")] = field(default=False, name="OS-FLV-DISABLED:disabled")
    rxtx_factor: Annotated[float, until("2.101")] = 1.0
    description: Annotated[str | None, since("2.55")] = None
    extra_specs: Annotated[dict[str, str] | UnsetType, since("2.61")] = UNSET


def view(call: Call, f: Flavor) -> FlavorView:
    shown = FlavorView(
        id=f.id,
        name=f.name,
        ram=f.memory_mb,
        disk=f.disk_gb,
        vcpus=f.vcpus,
        swap=f.swap_mb if f.swap_mb or call.version >= 75 else "",
        ephemeral=f.ephemeral_gb,
        is_public=f.is_public,
        disabled=f.disabled,
        rxtx_factor=f.rxtx_factor,
        description=f.description,
        links=links(call, "flavors", f.id),
    )
    if call.version >= 61 and call.may(SPECS):
        shown.extra_specs = f.extra_specs
    return shown


class Query(msgspec.Struct):
    limit: list[str] = []
    marker: list[str] = []
    is_public: list[str] = []
    min_ram: list[str] = field(default_factory=list, name="minRam")
    min_disk: list[str] = field(default_factory=list, name="minDisk")
    sort_key: list[str] = []
    sort_dir: list[str] = []
    name: Annotated[list[str], since("2.102")] = []


@R.get("/v2.1/flavors", query=Query, strict="2.75")
def index(call: Call) -> dict[str, Any]:
    found, more = _page(call, "flavors")
    return {
        "flavors": [
            {"id": f.id, "name": f.name, "links": links(call, "flavors", f.id), **_described(call, f)} for f in found
        ],
        **more,
    }


def _described(call: Call, f: Flavor) -> dict[str, Any]:
    return {"description": f.description} if call.version >= 55 else {}


@R.get("/v2.1/flavors/detail", query=Query, strict="2.75")
def detail(call: Call) -> dict[str, Any]:
    found, more = _page(call, "flavors", "detail")
    return {"flavors": [view(call, f) for f in found], **more}


@R.get("/v2.1/flavors/{id}")
def show(call: Call, id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        return {"flavor": view(call, visible(call, tx, id))}


def visible(call: Call, tx: Tx, id: str) -> Flavor:
    """A flavor that the caller may know of. Raises NotFound."""
    f = catalog.flavor(tx, id)
    if not f.is_public and not call.context.is_admin and call.context.project_id not in catalog.flavor_projects(tx, id):
        raise NotFound(f"Flavor {id} could not be found.")
    return f


def _page(call: Call, *path: str) -> tuple[list[Flavor], dict[str, Any]]:
    q: Query = call.query
    limit = page_limit(call, q.limit[-1] if q.limit else None)
    sort = q.sort_key[-1] if q.sort_key else "flavorid"
    gone = call.version >= 102 and sort in ("disabled", "rxtx_factor")
    if sort != "vcpu_weight" and (sort not in catalog.SORTS or gone):
        raise Invalid(
            f"Invalid input for query parameters sort_key. Value: {sort[:60]}. '{sort[:60]}' is not one of the keys that can be sorted by"
        )
    direction = q.sort_dir[-1] if q.sort_dir else "asc"
    if direction not in ("asc", "desc"):
        raise Invalid(
            f"Invalid input for query parameters sort_dir. Value: {direction[:60]}. '{direction[:60]}' is not one of ['asc', 'desc']"
        )
    admin = call.context.is_admin
    with call.world.db.read() as tx:
        found = catalog.flavors(
            tx,
            project_id=None if admin else call.context.project_id or "",
            public=_public(q) if admin else None,
            disabled=None if admin else False,
            min_memory_mb=_least(q.min_ram, "minRam"),
            min_disk_gb=_least(q.min_disk, "minDisk"),
            name=q.name[-1] if q.name else None,
            sort="flavorid" if sort == "vcpu_weight" else sort,
            desc=direction == "desc",
            limit=limit,
            marker=q.marker[-1] if q.marker else None,
        )
    return found, {"flavors_links": next_link(call, found[-1].id, *path)} if found and len(found) == limit else {}


def _public(q: Query) -> bool | None:
    """Administrators see public ones where nothing is said, and both with "none"."""
    said = q.is_public[-1].lower() if q.is_public else "true"
    if said in ("none", "null"):
        return None
    if said in ("true", "1", "yes", "on", "t", "y"):
        return True
    if said in ("false", "0", "no", "off", "f", "n"):
        return False
    raise Invalid(f"Invalid is_public filter [{said[:60]}]")


def _least(said: list[str], name: str) -> int:
    if not said:
        return 0
    if not said[-1].isdecimal() or len(said[-1]) > 18:
        raise Invalid(f"Invalid {name} filter [{said[-1][:60]}]")
    return int(said[-1])


# ---- operators


class NewFlavor(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    ram: Annotated[int, Meta(ge=1, le=MAX)] | Digits
    vcpus: Annotated[int, Meta(ge=1, le=MAX)] | Digits
    disk: Size
    id: FlavorId | int | None = None
    ephemeral: Size = field(default=0, name="OS-FLV-EXT-DATA:ephemeral")
    swap: Size = 0
    rxtx_factor: Annotated[
        float | Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?$", max_length=40)], until("2.101")
    ] = 1.0
    is_public: Boolish = field(default=True, name="os-flavor-access:is_public")
    description: Annotated[LongText | None, since("2.55")] = None


class NewBody(msgspec.Struct, forbid_unknown_fields=True):
    flavor: NewFlavor


@R.post("/v2.1/flavors", body=NewBody, policy="os_compute_api:os-flavor-manage:create")
def create(call: Call) -> dict[str, Any]:
    w: NewFlavor = call.body.flavor
    ram, vcpus = int(w.ram), int(w.vcpus)
    for name, n, least in (
        ("ram", ram, 1),
        ("vcpus", vcpus, 1),
        ("disk", int(w.disk), 0),
        ("ephemeral", int(w.ephemeral), 0),
        ("swap", int(w.swap), 0),
    ):
        if not least <= n <= MAX:
            raise Invalid(f"Invalid input for field/attribute {name}. Value: {n}. {n} is not between {least} and {MAX}")
    factor = float(w.rxtx_factor)
    if not 0 < factor <= 3.40282e38:
        raise Invalid("'rxtx_factor' argument must be a float between 0 and 3.40282e+38")
    flavor = Flavor(
        id=call.world.ids.uuid() if w.id is None else str(w.id),
        name=w.name,
        vcpus=vcpus,
        memory_mb=ram,
        disk_gb=int(w.disk),
        ephemeral_gb=int(w.ephemeral),
        swap_mb=int(w.swap),
        rxtx_factor=factor,
        is_public=truth(w.is_public),
        description=w.description,
    )

    def record(tx: Tx) -> None:
        catalog.add_flavor(tx, flavor, call.world.clock.now())
        told(call, tx, "flavor.create", of=lambda: words.flavor(flavor))

    call.world.db.run(record)  # who makes a private flavor may see it as an administrator; nobody has access yet
    return {"flavor": view(call, flavor)}


class Description(msgspec.Struct, forbid_unknown_fields=True):
    description: LongText | None


class DescriptionBody(msgspec.Struct, forbid_unknown_fields=True):
    flavor: Description


@R.put("/v2.1/flavors/{id}", versions="2.55-", body=DescriptionBody, policy="os_compute_api:os-flavor-manage:update")
def update(call: Call, id: str) -> dict[str, Any]:
    text = call.body.flavor.description
    return {"flavor": view(call, call.world.db.run(lambda tx: _changed(call, tx, id, description=text)))}


def _changed(call: Call, tx: Tx, id: str, **facts: Any) -> Flavor:
    flavor = catalog.change_flavor(tx, id, call.world.clock.now(), **facts)
    told(call, tx, "flavor.update", of=lambda: words.flavor(flavor))
    return flavor


@R.delete("/v2.1/flavors/{id}", ok=202, policy="os_compute_api:os-flavor-manage:delete")
def delete(call: Call, id: str) -> None:
    def record(tx: Tx) -> None:
        flavor = catalog.flavor(tx, id)
        catalog.remove_flavor(tx, id)
        told(call, tx, "flavor.delete", of=lambda: words.flavor(flavor))

    call.world.db.run(record)


class Tenant(msgspec.Struct, forbid_unknown_fields=True):
    tenant: Annotated[str, Meta(min_length=1, max_length=255)]


@R.post(
    "/v2.1/flavors/{id}/action",
    action="addTenantAccess",
    body=Tenant,
    policy="os_compute_api:os-flavor-access:add_tenant_access",
)
def allow(call: Call, id: str) -> dict[str, Any]:
    if not call.world.neighbours.identity.project_exists(call.body.tenant):
        raise Invalid(f"Project ID {call.body.tenant[:80]} is not a valid project.")

    def record(tx: Tx) -> dict[str, Any]:
        if catalog.flavor(tx, id).is_public and call.version >= 7:
            raise Conflict("Can not add access to a public flavor.")
        catalog.allow_flavor(tx, id, call.body.tenant)
        return _access(tx, id)

    shown: dict[str, Any] = call.world.db.run(record)
    return shown


@R.post(
    "/v2.1/flavors/{id}/action",
    action="removeTenantAccess",
    body=Tenant,
    policy="os_compute_api:os-flavor-access:remove_tenant_access",
)
def refuse(call: Call, id: str) -> dict[str, Any]:
    def record(tx: Tx) -> dict[str, Any]:
        catalog.flavor(tx, id)
        catalog.refuse_flavor(tx, id, call.body.tenant)
        return _access(tx, id)

    shown: dict[str, Any] = call.world.db.run(record)
    return shown


@R.get("/v2.1/flavors/{flavor_id}/os-flavor-access", policy="os_compute_api:os-flavor-access")
def access(call: Call, flavor_id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        if catalog.flavor(tx, flavor_id).is_public:
            raise NotFound("Access list not available for public flavors.")
        return _access(tx, flavor_id)


def _access(tx: Tx, id: str) -> dict[str, Any]:
    return {"flavor_access": [{"flavor_id": id, "tenant_id": p} for p in catalog.flavor_projects(tx, id)]}


# ---- extra specs


class SpecsBody(msgspec.Struct, forbid_unknown_fields=True):
    extra_specs: dict[SpecKey, SpecValue]


@R.get("/v2.1/flavors/{flavor_id}/os-extra_specs", policy=SPECS)
def specs(call: Call, flavor_id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        return {"extra_specs": visible(call, tx, flavor_id).extra_specs}


@R.post(
    "/v2.1/flavors/{flavor_id}/os-extra_specs", body=SpecsBody, policy="os_compute_api:os-flavor-extra-specs:create"
)
def add_specs(call: Call, flavor_id: str) -> dict[str, Any]:
    _write_specs(call, flavor_id, call.body.extra_specs)
    return {"extra_specs": call.body.extra_specs}


@R.get("/v2.1/flavors/{flavor_id}/os-extra_specs/{id}", policy="os_compute_api:os-flavor-extra-specs:show")
def spec(call: Call, flavor_id: str, id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        known = visible(call, tx, flavor_id).extra_specs
    if id not in known:
        raise NotFound(f"Flavor {flavor_id} has no extra specs with key {id}.")
    return {id: known[id]}


@R.put(
    "/v2.1/flavors/{flavor_id}/os-extra_specs/{id}",
    body=dict[SpecKey, SpecValue],
    policy="os_compute_api:os-flavor-extra-specs:update",
)
def set_spec(call: Call, flavor_id: str, id: str) -> dict[str, Any]:
    if len(call.body) != 1:
        raise Invalid("Request body must hold exactly one extra spec.")
    if id not in call.body:
        raise Invalid("Request body and URI mismatch")
    _write_specs(call, flavor_id, call.body)
    return dict(call.body)


@R.delete("/v2.1/flavors/{flavor_id}/os-extra_specs/{id}", policy="os_compute_api:os-flavor-extra-specs:delete")
def delete_spec(call: Call, flavor_id: str, id: str) -> None:
    def record(tx: Tx) -> None:
        known = dict(catalog.flavor(tx, flavor_id).extra_specs)
        if known.pop(id, None) is None:
            raise NotFound(f"Flavor {flavor_id} has no extra specs with key {id}.")
        _changed(call, tx, flavor_id, extra_specs=known)

    call.world.db.run(record)


def _write_specs(call: Call, id: str, wanted: dict[str, Any]) -> None:
    if len(wanted) > 1000 or any(len(str(v)) > 255 for v in wanted.values()):
        raise Invalid("Invalid input for field/attribute extra_specs. A value is too long.")

    def record(tx: Tx) -> None:
        known = catalog.flavor(tx, id).extra_specs
        _changed(call, tx, id, extra_specs=known | {k: str(v) for k, v in wanted.items()})

    call.world.db.run(record)
