"""Resource providers: what has something to give, alone or as a part of a tree; their aggregates, and who holds of them."""

from typing import Annotated as A
from typing import Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid
from kilonova.kit.routes import Call, Reply
from kilonova.kit.versions import since
from kilonova.model.candidates import Group, Provider, serves
from kilonova.placement.frame import (
    R,
    Uuid,
    asked,
    dated,
    encoded,
    is_uuid,
    link,
    location,
    members,
    plain,
    resources,
    shown,
    traits,
)
from kilonova.store import providers as store
from kilonova.store.providers import Row

ProviderName = A[str, Meta(max_length=200, pattern=r"\A[^\x00]*\Z")]
# What a provider's links lead to, and since when.
RELATED = {"": 0, "inventories": 0, "usages": 0, "aggregates": 1, "traits": 6, "allocations": 11}
SINCE = {"name": 0, "uuid": 0, "member_of": 3, "resources": 4, "in_tree": 14, "required": 18}


class NewProvider(msgspec.Struct, forbid_unknown_fields=True):
    name: ProviderName
    uuid: Uuid | UnsetType = UNSET
    parent_provider_uuid: A[Uuid | None | UnsetType, since("1.14")] = UNSET


class ProviderChange(msgspec.Struct, forbid_unknown_fields=True):
    name: ProviderName
    parent_provider_uuid: A[Uuid | None | UnsetType, since("1.14")] = UNSET


def view(call: Call, p: Row | Provider) -> dict[str, Any]:
    links = [
        {"rel": rel or "self", "href": link(call, "resource_providers", p.uuid, *([rel] if rel else []))}
        for rel, first in RELATED.items()
        if call.version >= first
    ]
    shown: dict[str, Any] = {"uuid": p.uuid, "name": p.name, "generation": p.generation, "links": links}
    if call.version >= 14:
        shown |= {"parent_provider_uuid": p.parent, "root_provider_uuid": p.root}
    return shown


@R.get("/resource_providers", policy="placement:resource_providers:list")
def list_(call: Call) -> Reply:
    said = asked(call, lambda name: call.version >= SINCE.get(name, 1000))
    group = _group(call, said)
    with call.world.db.read() as tx:
        store.known_classes(tx, group.resources)
        store.known_traits(tx, group.forbidden.union(*group.required))
        forest = call.world.trees.look(tx)
    found = list(forest.providers.values())
    if "uuid" in said:
        found = [p for p in found if p.uuid == said["uuid"][-1]]
    if "name" in said:
        found = [p for p in found if p.name == said["name"][-1]]
    if group.in_tree is not None:
        named = forest.providers.get(group.in_tree)
        found = [] if named is None else [p for p in found if p.root == named.root]
    found = [p for p in found if serves(p, group)]
    body = encoded({"resource_providers": [view(call, p) for p in found]})
    return Reply(**body, headers=dated(call, (p.changed_at for p in found)))


def _group(call: Call, said: dict[str, list[str]]) -> Group:
    for name in ("uuid", "in_tree"):
        if name in said and not is_uuid(said[name][-1]):
            raise Invalid(f"Invalid query string parameters: '{plain(said[name][-1])}' is not a 'uuid'")
    marks = traits(said["required"], call.version) if "required" in said else None
    of = members(said["member_of"], call.version) if "member_of" in said else None
    return Group(
        resources=resources(said["resources"][-1]) if "resources" in said else {},
        required=marks.required if marks else (),
        forbidden=marks.forbidden if marks else frozenset(),
        member_of=of.of if of else (),
        not_member_of=of.not_of if of else frozenset(),
        in_tree=said["in_tree"][-1] if "in_tree" in said else None,
    )


@R.post(
    "/resource_providers",
    body=NewProvider,
    ok=lambda v: 200 if v >= 20 else 201,
    policy="placement:resource_providers:create",
)
def create(call: Call) -> Reply:
    body, world = call.body, call.world
    uuid = world.ids.uuid() if body.uuid is UNSET else body.uuid
    parent = None if body.parent_provider_uuid is UNSET else body.parent_provider_uuid
    made = world.change(store.create, uuid, body.name, parent, world.clock.now())
    where = location(call, "resource_providers", uuid)
    if call.version < 20:
        return Reply(headers=where)
    return shown(call, view(call, made), [made.changed_at], headers=where)


@R.get("/resource_providers/{uuid}", policy="placement:resource_providers:show")
def show(call: Call, uuid: str) -> Reply:
    found = call.world.db.look(store.get, uuid)
    return shown(call, view(call, found), [found.changed_at])


@R.put("/resource_providers/{uuid}", body=ProviderChange, policy="placement:resource_providers:update")
def update(call: Call, uuid: str) -> Reply:
    body, world = call.body, call.world
    now, may_move = world.clock.now(), call.version >= 37
    row = world.change(store.update, uuid, body.name, body.parent_provider_uuid, now, may_move=may_move)
    return shown(call, view(call, row), [row.changed_at])


@R.delete("/resource_providers/{uuid}", ok=204, policy="placement:resource_providers:delete")
def delete(call: Call, uuid: str) -> None:
    call.world.change(store.delete, uuid)


# ---- aggregates


class Aggregates(msgspec.Struct, forbid_unknown_fields=True):
    aggregates: list[Uuid]
    resource_provider_generation: int


PATH = "/resource_providers/{uuid}/aggregates"


@R.get(PATH, versions="1.1-", policy="placement:resource_providers:aggregates:list")
def aggregates(call: Call, uuid: str) -> Reply:
    with call.world.db.read() as tx:
        row = store.get(tx, uuid)
        found = store.aggregates_of(tx, uuid)
    return _aggregates(call, row.generation, found, row.changed_at)


def _aggregates(call: Call, generation: int, found: list[str], at: float) -> Reply:
    body: dict[str, Any] = {"aggregates": found}
    if call.version >= 19:
        body["resource_provider_generation"] = generation
    return shown(call, body, [at])


@R.put(PATH, versions="1.1-1.18", body=list[Uuid], policy="placement:resource_providers:aggregates:update")
def set_aggregates_unseen(call: Call, uuid: str) -> Reply:
    """Nobody says which generation he saw, and it does not move."""

    def work(tx: Tx, wanted: list[str], now: float) -> tuple[Row, list[str]]:
        row = store.get(tx, uuid)
        store.set_aggregates(tx, uuid, wanted)
        store.touched(tx, row, now)
        return row, store.aggregates_of(tx, uuid)

    row, found = call.world.change(work, _different(call.body), call.world.clock.now())
    return _aggregates(call, row.generation, found, row.changed_at)


@R.put(PATH, versions="1.19-", body=Aggregates, policy="placement:resource_providers:aggregates:update")
def set_aggregates(call: Call, uuid: str) -> Reply:
    def work(tx: Tx, wanted: list[str], generation: int, now: float) -> list[str]:
        store.moved(tx, uuid, generation, now)
        store.set_aggregates(tx, uuid, wanted)
        return store.aggregates_of(tx, uuid)

    now, seen = call.world.clock.now(), call.body.resource_provider_generation
    found = call.world.change(work, _different(call.body.aggregates), seen, now)
    return _aggregates(call, seen + 1, found, now)


def _different(uuids: list[str]) -> list[str]:
    if len(set(uuids)) < len(uuids):
        raise Invalid("JSON does not validate: aggregates has non-unique elements")
    return uuids


# ---- who holds of it


@R.get("/resource_providers/{uuid}/allocations", policy="placement:resource_providers:allocations:list")
def allocations(call: Call, uuid: str) -> Reply:
    with call.world.db.read() as tx:
        row = store.get(tx, uuid)
        held, generations = store.held_of(tx, uuid)
    found: dict[str, dict[str, Any]] = {c: {"resources": amounts} for c, amounts in held.items()}
    if call.version >= 28:
        for consumer, said in found.items():
            said["consumer_generation"] = generations[consumer]
    body = {"allocations": found, "resource_provider_generation": row.generation}
    return shown(call, body, [row.changed_at])


@R.get("/resource_providers/{uuid}/usages", policy="placement:resource_providers:usages")
def usages(call: Call, uuid: str) -> Reply:
    with call.world.db.read() as tx:
        row = store.get(tx, uuid)
        used = store.used_of(tx, uuid)
    return shown(call, {"resource_provider_generation": row.generation, "usages": used}, [row.changed_at])
