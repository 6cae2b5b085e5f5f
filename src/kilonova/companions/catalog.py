"""The catalog: which services there are, and where. Our own follow the address by which the caller reached us."""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kilonova.companions.realm import R, changing, flag, given, looking, page, self_link, wish
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.store import identity as store
from kilonova.store.identity import Endpoint, Listed, Region

BASE = "$(base_url)s"
# fmt: off
BUILT_IN = {
    "identity":      f"{BASE}/identity",
    "compute":       f"{BASE}/compute/v2.1",
    "image":         f"{BASE}/image",
    "network":       f"{BASE}/network",
    "placement":     f"{BASE}/placement",
    "block-storage": f"{BASE}/volume/v3",
    "volumev3":      f"{BASE}/volume/v3",
    "shared-file-system": f"{BASE}/share/v2",
    "sharev2":       f"{BASE}/share/v2",
}
NAMES = {
    "identity": "keystone", "compute": "nova", "image": "glance", "network": "neutron", "placement": "placement",
    "block-storage": "cinder", "volumev3": "cinderv3", "shared-file-system": "manila", "sharev2": "manilav2",
}
# fmt: on
INTERFACES = ("public", "internal", "admin")


def fill(tx: Tx, region: str, services: Mapping[str, str]) -> None:
    """Let the catalog name these services; what an earlier start wrote and is no more, goes. Others' rows stay."""
    if store.look(tx, Region, region) is None:
        store.keep(tx, Region(region))
    known = {s.id: s for s in store.find(tx, Listed)}
    for kind in {*BUILT_IN, *NAMES, *services}:
        id = _fixed(kind)
        if kind not in services:
            if id in known:
                store.drop_service(tx, id)
            continue
        if id not in known:
            store.keep(tx, Listed(id, kind, NAMES.get(kind, kind)))
        there = {e.id: e for e in store.find(tx, Endpoint, service_id=id)}
        for interface in INTERFACES:
            wanted = Endpoint(_fixed(f"{kind} {interface}"), id, interface, services[kind], region)
            if wanted.id not in there:
                store.keep(tx, wanted)
            elif (there[wanted.id].url, there[wanted.id].region_id) != (wanted.url, region):
                store.change(tx, Endpoint, wanted.id, {"url": wanted.url, "region_id": region})


def _fixed(name: str) -> str:
    """The same id at every start, so that a start finds what an earlier one wrote."""
    return hashlib.md5(f"kilonova {name}".encode(), usedforsecurity=False).hexdigest()


def of(call: Call, project_id: str | None) -> list[dict[str, Any]]:
    """The catalog as tokens carry it. An endpoint that needs a project is left out where there is none."""
    with looking(call) as tx:
        services = [s for s in store.find(tx, Listed) if s.enabled]
        endpoints = [e for e in store.find(tx, Endpoint) if e.enabled]
    words = {"base_url": base_url(call)}
    if project_id:
        words |= {"project_id": project_id, "tenant_id": project_id}
    ready: dict[str, list[dict[str, Any]]] = {}
    for e in endpoints:
        if (url := resolved(e.url, words)) is not None:
            about = {"id": e.id, "interface": e.interface, "region": e.region_id, "region_id": e.region_id, "url": url}
            ready.setdefault(e.service_id, []).append(about)
    return [{"id": s.id, "type": s.type, "name": s.name, "endpoints": ready.get(s.id, [])} for s in services]


def base_url(call: Call) -> str:
    """Of the whole cloud: what the operator said, else what stands before `/identity` in this request's address."""
    said = call.world.base_url
    return str(said) if said else call.url.removesuffix("/identity")


def resolved(url: str, words: Mapping[str, str]) -> str | None:
    for form in ("$({})s", "%({})s"):
        for name, value in words.items():
            url = url.replace(form.format(name), value)
    return None if "$(" in url or "%(" in url else url


# ---- services


class ServiceWish(msgspec.Struct, kw_only=True):
    type: Annotated[str, Meta(min_length=1, max_length=255)]
    name: Annotated[str, Meta(max_length=255)] | None = None
    enabled: bool = True
    description: str | None = None


class ServiceChange(msgspec.Struct, kw_only=True):
    type: Annotated[str, Meta(min_length=1, max_length=255)] | UnsetType = UNSET
    name: Annotated[str, Meta(max_length=255)] | None | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    description: str | None | UnsetType = UNSET


class ServiceBody(msgspec.Struct):
    service: dict[str, Any]


class ServiceFilter(msgspec.Struct):
    name: str | None = None
    type: str | None = None


@R.get("/v3/services", query=ServiceFilter, policy="identity:list_services")
def list_services(call: Call) -> Any:
    with looking(call) as tx:
        found = store.find(tx, Listed, name=call.query.name, type=call.query.type)
    return page(call, "services", [_service(call, s) for s in found])


@R.post("/v3/services", body=ServiceBody, ok=201, policy="identity:create_service")
def create_service(call: Call) -> Any:
    known, extra = wish(call.body.service, ServiceWish)
    id = call.world.door.ids.hex()
    s = Listed(id, known.type, known.name or "", known.enabled, known.description or "", extra)
    with changing(call) as tx:
        store.keep(tx, s)
    return {"service": _service(call, s)}


@R.get("/v3/services/{id}", policy="identity:get_service")
def show_service(call: Call, id: str) -> Any:
    with looking(call) as tx:
        return {"service": _service(call, store.get(tx, Listed, id))}


@R.patch("/v3/services/{id}", body=ServiceBody, policy="identity:update_service")
def update_service(call: Call, id: str) -> Any:
    known, extra = wish(call.body.service, ServiceChange)
    values = given(known)
    for name in ("name", "description"):
        if name in values:
            values[name] = values[name] or ""
    with changing(call) as tx:
        values["extra"] = store.get(tx, Listed, id).extra | extra
        return {"service": _service(call, store.change(tx, Listed, id, values))}


@R.delete("/v3/services/{id}", ok=204, policy="identity:delete_service")
def delete_service(call: Call, id: str) -> None:
    with changing(call) as tx:
        store.drop_service(tx, id)


def _service(call: Call, s: Listed) -> dict[str, Any]:
    said = {**s.extra, "id": s.id, "type": s.type, "name": s.name, "enabled": s.enabled, "description": s.description}
    return said | self_link(call, "services", s.id)


# ---- endpoints


class EndpointWish(msgspec.Struct, kw_only=True):
    service_id: str
    interface: Literal["public", "internal", "admin"]
    url: Annotated[str, Meta(min_length=1, max_length=4096)]
    region_id: Annotated[str, Meta(max_length=64)] | None = None
    region: Annotated[str, Meta(max_length=64)] | None = None
    enabled: bool = True


class EndpointChange(msgspec.Struct, kw_only=True):
    service_id: str | UnsetType = UNSET
    interface: Literal["public", "internal", "admin"] | UnsetType = UNSET
    url: Annotated[str, Meta(min_length=1, max_length=4096)] | UnsetType = UNSET
    region_id: Annotated[str, Meta(max_length=64)] | None | UnsetType = UNSET
    region: Annotated[str, Meta(max_length=64)] | None | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class EndpointBody(msgspec.Struct):
    endpoint: dict[str, Any]


class EndpointFilter(msgspec.Struct):
    interface: str | None = None
    service_id: str | None = None
    region_id: str | None = None
    region: str | None = None
    enabled: str | None = None


@R.get("/v3/endpoints", query=EndpointFilter, policy="identity:list_endpoints")
def list_endpoints(call: Call) -> Any:
    q: EndpointFilter = call.query
    about = {"interface": q.interface, "service_id": q.service_id, "region_id": q.region_id or q.region}
    with looking(call) as tx:
        found = store.find(tx, Endpoint, enabled=flag(q.enabled), **about)
    return page(call, "endpoints", [_endpoint(call, e) for e in found])


@R.post("/v3/endpoints", body=EndpointBody, ok=201, policy="identity:create_endpoint")
def create_endpoint(call: Call) -> Any:
    known, extra = wish(call.body.endpoint, EndpointWish)
    _sensible(known.url)
    region = known.region_id or known.region
    id = call.world.door.ids.hex()
    e = Endpoint(id, known.service_id, known.interface, known.url, region, known.enabled, extra)
    with changing(call) as tx:
        _there(tx, e.service_id, region)
        store.keep(tx, e)
    return {"endpoint": _endpoint(call, e)}


@R.get("/v3/endpoints/{id}", policy="identity:get_endpoint")
def show_endpoint(call: Call, id: str) -> Any:
    with looking(call) as tx:
        return {"endpoint": _endpoint(call, store.get(tx, Endpoint, id))}


@R.patch("/v3/endpoints/{id}", body=EndpointBody, policy="identity:update_endpoint")
def update_endpoint(call: Call, id: str) -> Any:
    known, extra = wish(call.body.endpoint, EndpointChange)
    values = given(known)
    if (region := values.pop("region", UNSET)) is not UNSET:
        values.setdefault("region_id", region)
    if "url" in values:
        _sensible(values["url"])
    with changing(call) as tx:
        old = store.get(tx, Endpoint, id)
        values["extra"] = old.extra | extra
        _there(tx, values.get("service_id", old.service_id), values.get("region_id"))
        return {"endpoint": _endpoint(call, store.change(tx, Endpoint, id, values))}


@R.delete("/v3/endpoints/{id}", ok=204, policy="identity:delete_endpoint")
def delete_endpoint(call: Call, id: str) -> None:
    with changing(call) as tx:
        store.drop(tx, Endpoint, id)


def _sensible(url: str) -> None:
    words = {"base_url": "http://x", "project_id": "p", "tenant_id": "p", "user_id": "u"}
    if (resolved(url, words) or "").partition("://")[0] not in ("http", "https"):
        raise Invalid(f"Malformed endpoint URL ({url}).")


def _there(tx: Tx, service_id: str, region: str | None) -> None:
    store.get(tx, Listed, service_id)
    if region and store.look(tx, Region, region) is None:
        store.keep(tx, Region(region))  # as the Identity API does with a region it is told of here


def _endpoint(call: Call, e: Endpoint) -> dict[str, Any]:
    return {
        **e.extra,
        "id": e.id,
        "service_id": e.service_id,
        "interface": e.interface,
        "region": e.region_id,
        "region_id": e.region_id,
        "url": resolved(e.url, {"base_url": base_url(call)}) or e.url,
        "enabled": e.enabled,
    } | self_link(call, "endpoints", e.id)


# ---- regions


class RegionWish(msgspec.Struct, kw_only=True):
    id: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    description: str | None = None
    parent_region_id: str | None = None


class RegionChange(msgspec.Struct, kw_only=True):
    description: str | None | UnsetType = UNSET
    parent_region_id: str | None | UnsetType = UNSET


class RegionBody(msgspec.Struct):
    region: dict[str, Any]


class RegionFilter(msgspec.Struct):
    parent_region_id: str | None = None


@R.get("/v3/regions", query=RegionFilter, policy="identity:list_regions")
def list_regions(call: Call) -> Any:
    with looking(call) as tx:
        found = store.find(tx, Region, parent_region_id=call.query.parent_region_id)
    return page(call, "regions", [_region(call, r) for r in found])


@R.post("/v3/regions", body=RegionBody, ok=201, policy="identity:create_region")
def create_region(call: Call) -> Any:
    known, extra = wish(call.body.region, RegionWish)
    r = Region(known.id or call.world.door.ids.hex(), known.description or "", known.parent_region_id, extra)
    with changing(call) as tx:
        if r.parent_region_id:
            store.get(tx, Region, r.parent_region_id)
        store.keep(tx, r)
    return {"region": _region(call, r)}


@R.get("/v3/regions/{id}", policy="identity:get_region")
def show_region(call: Call, id: str) -> Any:
    with looking(call) as tx:
        return {"region": _region(call, store.get(tx, Region, id))}


@R.patch("/v3/regions/{id}", body=RegionBody, policy="identity:update_region")
def update_region(call: Call, id: str) -> Any:
    known, extra = wish(call.body.region, RegionChange)
    values = given(known)
    if "description" in values:
        values["description"] = values["description"] or ""
    with changing(call) as tx:
        values["extra"] = store.get(tx, Region, id).extra | extra
        parent = values.get("parent_region_id")
        if parent == id or (parent and store.look(tx, Region, parent) is None):
            raise NotFound(f"Could not find region: {parent}.")
        return {"region": _region(call, store.change(tx, Region, id, values))}


@R.delete("/v3/regions/{id}", ok=204, policy="identity:delete_region")
def delete_region(call: Call, id: str) -> None:
    with changing(call) as tx:
        inside = bool(store.find(tx, Endpoint, region_id=id)) or bool(store.find(tx, Region, parent_region_id=id))
        if inside:
            raise Conflict(f"Unable to delete region {id} because it or its child regions have associated endpoints.")
        store.drop(tx, Region, id)


def _region(call: Call, r: Region) -> dict[str, Any]:
    said = {**r.extra, "id": r.id, "description": r.description, "parent_region_id": r.parent_region_id}
    return said | self_link(call, "regions", r.id)
