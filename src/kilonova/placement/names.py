"""Names that providers are described with: resource classes and traits, standard ones and operators' own."""

import re
from collections.abc import Iterable
from typing import Annotated as A
from typing import Any

import msgspec
from msgspec import Meta

from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid
from kilonova.kit.routes import Call, Reply
from kilonova.placement.frame import CustomName, R, asked, dated, link, location, plain, shown
from kilonova.store import providers as store
from kilonova.store.providers import CLASS_NAMES, TRAIT_NAMES

CUSTOM = re.compile(r"CUSTOM_[A-Z0-9_]+")


class ClassBody(msgspec.Struct, forbid_unknown_fields=True):
    name: CustomName


def custom(name: str) -> str:
    """Raises Invalid for a name that is not an operator's own."""
    if not CUSTOM.fullmatch(name) or len(name) > 255:
        raise Invalid(
            f"The name is invalid: '{plain(name)}'. It must be at most 255 characters, and match CUSTOM_[A-Z0-9_]+."
        )
    return name


# ---- resource classes


def _class(call: Call, name: str) -> dict[str, Any]:
    return {"name": name, "links": [{"rel": "self", "href": link(call, "resource_classes", name)}]}


@R.get("/resource_classes", versions="1.2-", policy="placement:resource_classes:list")
def classes(call: Call) -> Reply:
    found = call.world.db.look(store.names, CLASS_NAMES)
    return shown(call, {"resource_classes": [_class(call, name) for name in found]}, _moments(found.values()))


@R.post("/resource_classes", versions="1.2-", body=ClassBody, ok=201, policy="placement:resource_classes:create")
def create_class(call: Call) -> Reply:
    def work(tx: Tx, name: str, now: float) -> None:
        if not store.declare(tx, CLASS_NAMES, name, now):
            raise Conflict(f"Conflicting resource class already exists: {name}")

    call.world.change(work, call.body.name, call.world.clock.now())
    return Reply(headers=location(call, "resource_classes", call.body.name))


@R.get("/resource_classes/{name}", versions="1.2-", policy="placement:resource_classes:show")
def show_class(call: Call, name: str) -> Reply:
    at = call.world.db.look(store.declared, CLASS_NAMES, name)
    return shown(call, _class(call, name), _moments([at]))


@R.put("/resource_classes/{name}", versions="1.2-1.6", body=ClassBody, policy="placement:resource_classes:update")
def rename_class(call: Call, name: str) -> Reply:
    call.world.change(store.rename_class, name, call.body.name)
    return Reply(_class(call, call.body.name))


@R.put("/resource_classes/{name}", versions="1.7-", policy="placement:resource_classes:update")
def ensure_class(call: Call, name: str) -> Reply:
    new = call.world.change(store.declare, CLASS_NAMES, custom(name), call.world.clock.now())
    return Reply(status=201 if new else 204, headers=location(call, "resource_classes", name))


@R.delete("/resource_classes/{name}", versions="1.2-", ok=204, policy="placement:resource_classes:delete")
def delete_class(call: Call, name: str) -> None:
    call.world.change(store.undeclare, CLASS_NAMES, name)


# ---- traits


@R.get("/traits", versions="1.6-", policy="placement:traits:list")
def traits(call: Call) -> Reply:
    said = asked(call, lambda name: name in ("name", "associated"))
    wanted = _wanted(said["name"][-1] if "name" in said else None)
    associated = (said.get("associated") or [""])[-1].lower()
    if "associated" in said and associated not in ("true", "false"):
        raise Invalid('The query parameter "associated" only accepts "true" or "false"')
    with call.world.db.read() as tx:
        found = store.names(tx, TRAIT_NAMES)
        used = store.used_traits(tx) if associated else set()
    kept = {
        name: at
        for name, at in found.items()
        if wanted(name) and (not associated or (name in used) == (associated == "true"))
    }
    return shown(call, {"traits": list(kept)}, _moments(kept.values()))


def _wanted(said: str | None) -> Any:
    """`in:A,B` or `startswith:PREFIX`. Raises Invalid."""
    if said is None:
        return lambda name: True
    operator, colon, value = said.partition(":")
    if colon and operator == "in":
        among = set(value.split(","))
        return lambda name: name in among
    if colon and operator == "startswith":
        return lambda name: name.startswith(value)
    raise Invalid(
        "Badly formatted name parameter. Expected name query string parameter in form: "
        f'?name=[in|startswith]:[name1,name2|prefix]. Got: "{plain(said)}"'
    )


@R.get("/traits/{name}", versions="1.6-", ok=204, policy="placement:traits:show")
def show_trait(call: Call, name: str) -> Reply:
    at = call.world.db.look(store.declared, TRAIT_NAMES, name)
    return Reply(headers=dated(call, _moments([at])))


@R.put("/traits/{name}", versions="1.6-", policy="placement:traits:update")
def ensure_trait(call: Call, name: str) -> Reply:
    new = call.world.change(store.declare, TRAIT_NAMES, custom(name), call.world.clock.now())
    return Reply(status=201 if new else 204, headers=location(call, "traits", name) | dated(call))


@R.delete("/traits/{name}", versions="1.6-", ok=204, policy="placement:traits:delete")
def delete_trait(call: Call, name: str) -> None:
    call.world.change(store.undeclare, TRAIT_NAMES, name)


def _moments(at: Iterable[float | None]) -> list[float]:
    return [m for m in at if m is not None]


# ---- traits of a provider


class ProviderTraits(msgspec.Struct, forbid_unknown_fields=True):
    traits: list[A[str, Meta(min_length=1, max_length=255)]]
    resource_provider_generation: int


PATH = "/resource_providers/{uuid}/traits"


@R.get(PATH, versions="1.6-", policy="placement:resource_providers:traits:list")
def of_provider(call: Call, uuid: str) -> Reply:
    with call.world.db.read() as tx:
        row = store.get(tx, uuid)
        found = store.traits_of(tx, uuid)
    return shown(call, {"traits": found, "resource_provider_generation": row.generation}, [row.changed_at])


@R.put(PATH, versions="1.6-", body=ProviderTraits, policy="placement:resource_providers:traits:update")
def set_of_provider(call: Call, uuid: str) -> Reply:
    wanted = set(call.body.traits)
    seen: int = call.body.resource_provider_generation
    now = call.world.clock.now()

    def work(tx: Tx) -> int:
        """What changes nothing moves no generation."""
        row = store.get(tx, uuid)
        if row.generation != seen:
            store.moved(tx, uuid, seen, now)
        if wanted == set(store.traits_of(tx, uuid)):
            return seen
        store.set_traits(tx, uuid, wanted)
        store.moved(tx, uuid, seen, now)
        return seen + 1

    generation = call.world.change(work)
    return shown(call, {"traits": sorted(wanted), "resource_provider_generation": generation}, [now])


@R.delete(PATH, versions="1.6-", ok=204, policy="placement:resource_providers:traits:delete")
def clear_of_provider(call: Call, uuid: str) -> None:
    now = call.world.clock.now()

    def work(tx: Tx) -> None:
        row = store.get(tx, uuid)
        if store.traits_of(tx, uuid):
            store.moved(tx, uuid, row.generation, now)
            store.set_traits(tx, uuid, [])

    call.world.change(work)
