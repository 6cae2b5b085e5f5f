"""Allocations: what a consumer holds, of whom. A write says all that it shall hold, of one consumer or of several."""

from typing import Annotated as A
from typing import Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kilonova.kit.errors import Invalid, NotFound
from kilonova.kit.routes import Call, Reply
from kilonova.kit.versions import required, since, was
from kilonova.placement.frame import Amount, ClassName, ProviderKey, R, Uuid, is_uuid, plain, shown
from kilonova.store import allocations as store
from kilonova.store import placement
from kilonova.store.allocations import Held, Write

Resources = A[dict[ClassName, Amount], Meta(min_length=1)]
Owner = A[str, Meta(min_length=1, max_length=255)]
ConsumerType = A[str, Meta(min_length=1, max_length=255, pattern=r"\A[A-Z0-9_]+\Z")]
Mappings = A[
    dict[A[str, Meta(pattern=r"\A[a-zA-Z0-9_-]{0,64}\Z")], A[list[Uuid], Meta(min_length=1)]], Meta(min_length=1)
]


class OfProvider(msgspec.Struct, forbid_unknown_fields=True):
    """`generation` is that of the provider, and not looked at."""

    resources: Resources
    generation: int | UnsetType = UNSET


class Named(msgspec.Struct, forbid_unknown_fields=True):
    uuid: Uuid


class InList(msgspec.Struct, forbid_unknown_fields=True):
    """As it was said before 1.12."""

    resource_provider: Named
    resources: Resources


ByProvider = dict[ProviderKey, OfProvider]


class Allocations(msgspec.Struct, forbid_unknown_fields=True):
    """Of one consumer, by PUT."""

    allocations: A[
        ByProvider,
        was(A[list[InList], Meta(min_length=1)], until="1.11"),
        was(A[ByProvider, Meta(min_length=1)], until="1.27"),
    ]
    project_id: A[Owner | UnsetType, since("1.8"), required(since="1.8")] = UNSET
    user_id: A[Owner | UnsetType, since("1.8"), required(since="1.8")] = UNSET
    consumer_generation: A[int | None | UnsetType, since("1.28"), required(since="1.28")] = UNSET
    mappings: A[Mappings | UnsetType, since("1.34")] = UNSET
    consumer_type: A[ConsumerType | UnsetType, since("1.38"), required(since="1.38")] = UNSET


class OfConsumer(msgspec.Struct, forbid_unknown_fields=True):
    """Of each consumer, by POST."""

    allocations: ByProvider
    project_id: Owner
    user_id: Owner
    consumer_generation: A[int | None | UnsetType, since("1.28"), required(since="1.28")] = UNSET
    mappings: A[Mappings | UnsetType, since("1.34")] = UNSET
    consumer_type: A[ConsumerType | UnsetType, since("1.38"), required(since="1.38")] = UNSET


Several = A[dict[ProviderKey, OfConsumer], Meta(min_length=1)]


@R.get("/allocations/{consumer}", policy="placement:allocations:list")
def show(call: Call, consumer: str) -> Reply:
    with call.world.db.read() as tx:
        held, generations = store.held_by(tx, consumer)
        who = store.consumers(tx, [consumer]).get(consumer)
    body: dict[str, Any] = {
        "allocations": {p: {"generation": generations[p], "resources": amounts} for p, amounts in held.items()}
    }
    if who is not None and held:
        if call.version >= 12:
            body |= {"project_id": who.project_id, "user_id": who.user_id}
        if call.version >= 28:
            body["consumer_generation"] = who.generation
        if call.version >= 38:
            body["consumer_type"] = who.type or "unknown"
    return shown(call, body, [who.changed_at if who else None])


@R.put("/allocations/{consumer}", body=Allocations, ok=204, policy="placement:allocations:update")
def put(call: Call, consumer: str) -> None:
    if not is_uuid(consumer):
        raise Invalid(f"Invalid uuid: {plain(consumer)}")
    world = call.world
    world.change(store.replace, [write(call, consumer, call.body)], world.clock.now())


@R.post("/allocations", versions="1.13-", body=Several, ok=204, policy="placement:allocations:manage")
def post(call: Call) -> None:
    writes = [write(call, consumer, said) for consumer, said in call.body.items()]
    call.world.change(store.replace, writes, call.world.clock.now())


@R.delete("/allocations/{consumer}", ok=204, policy="placement:allocations:delete")
def delete(call: Call, consumer: str) -> None:
    if not call.world.change(placement.release, consumer, now=call.world.clock.now()):
        raise NotFound(f"No allocations for consumer '{plain(consumer)}'")


def write(call: Call, consumer: str, said: Any) -> Write:
    """What a consumer shall hold, as this version says it."""
    config = call.world.config
    return Write(
        consumer,
        _held(said.allocations),
        _or(getattr(said, "project_id", UNSET), config.unknown_project_id),
        _or(getattr(said, "user_id", UNSET), config.unknown_user_id),
        _or(getattr(said, "consumer_type", UNSET), None),
        getattr(said, "consumer_generation", UNSET),
    )


def _held(said: Any) -> Held:
    if isinstance(said, dict):
        return {provider: of.resources for provider, of in said.items()}
    held: dict[str, dict[str, int]] = {}
    for one in said:
        mine = held.setdefault(one.resource_provider.uuid, {})
        mine |= one.resources
    return held


def _or(said: Any, otherwise: Any) -> Any:
    return otherwise if said is UNSET else said
