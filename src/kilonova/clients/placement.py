"""The Placement API, as a service asks it that has providers and consumers of its own there. Ours and a real one alike."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from kilonova.clients.session import Session, part
from kilonova.kit.errors import Conflict, NotFound
from kilonova.model.candidates import Group, Query
from kilonova.model.host import Stock

VERSION = "1.38"  # consumers have types
RACE = "placement.concurrent_update"
TRIES = 5


class Holding(msgspec.Struct, frozen=True):
    """What a consumer holds, or shall hold: by provider and class. `generation` None: nobody knows it."""

    consumer: str
    held: dict[str, dict[str, int]] = {}
    project_id: str = ""
    user_id: str = ""
    type: str = "INSTANCE"
    generation: int | None = None


class Offer(msgspec.Struct, frozen=True):
    """What a provider is, as its owner says it: inventories, traits, and the aggregates that it is in."""

    uuid: str
    name: str
    parent: str | None
    stocks: list[Stock]
    traits: frozenset[str]
    aggregates: frozenset[str]


class Placement:
    """The service."""

    def __init__(self, session: Session) -> None:
        self.session = session

    # -- what is held

    def holding(self, consumer: str) -> Holding:
        said = self._json("GET", f"/allocations/{part(consumer)}", _Allocations)
        held = {p: a.resources for p, a in said.allocations.items()}
        return Holding(
            consumer, held, said.project_id, said.user_id, said.consumer_type or "", said.consumer_generation
        )

    def hold(self, wanted: Iterable[Holding]) -> None:
        """Let each of these hold just that, all or none, if their generations are still so.

        Raises Conflict: with the code `RACE` it was changed meanwhile, else there is no room; Invalid for providers
        that are none.
        """
        body = {
            h.consumer: {
                "allocations": {p: {"resources": amounts} for p, amounts in h.held.items()},
                "project_id": h.project_id,
                "user_id": h.user_id,
                "consumer_type": h.type,
                "consumer_generation": h.generation,
            }
            for h in wanted
        }
        self._tell("POST", "/allocations", body)

    # -- where there is room

    def candidates(self, query: Query, limit: int) -> set[str]:
        """The roots of the trees that could serve this."""
        said = self._json("GET", "/allocation_candidates", _Candidates, query=asked(query) | {"limit": limit})
        used = {p for r in said.allocation_requests for p in r.allocations}
        return {said.provider_summaries[p].root_provider_uuid for p in used}

    # -- providers

    def offer(self, o: Offer, ours: frozenset[str], classes: frozenset[str]) -> None:
        """Make it be, and be so. `classes` and `ours` (aggregates) are what else the owner may have said before.

        What others wrote on it stays: inventories of other classes, traits of their own (CUSTOM_…), other aggregates.
        """
        at = f"/resource_providers/{part(o.uuid)}"
        try:
            there = self._json("GET", at, _Provider)
            if there.name != o.name or there.parent_provider_uuid != o.parent:
                self._tell("PUT", at, _named(o))
        except NotFound:
            self._tell("POST", "/resource_providers", {"uuid": o.uuid} | _named(o))
        for name in sorted(s.resource_class for s in o.stocks if s.resource_class.startswith("CUSTOM_")):
            self._tell("PUT", f"/resource_classes/{name}")
        for name in sorted(t for t in o.traits if t.startswith("CUSTOM_")):
            self._tell("PUT", f"/traits/{name}")
        _again(lambda: self._stocked(at, o, classes))
        _again(lambda: self._marked(at, o))
        _again(lambda: self._grouped(at, o, ours))

    def _stocked(self, at: str, o: Offer, classes: frozenset[str]) -> None:
        there = self._json("GET", f"{at}/inventories", _Inventories)
        mine = {s.resource_class: _stock(s) for s in o.stocks}
        wanted = {c: i for c, i in there.inventories.items() if c not in classes} | mine
        if wanted != there.inventories:
            said = {"resource_provider_generation": there.resource_provider_generation, "inventories": wanted}
            self._tell("PUT", f"{at}/inventories", said)

    def _marked(self, at: str, o: Offer) -> None:
        there = self._json("GET", f"{at}/traits", _Traits)
        wanted = o.traits | {t for t in there.traits if t.startswith("CUSTOM_")}
        if wanted != set(there.traits):
            said = {"resource_provider_generation": there.resource_provider_generation, "traits": sorted(wanted)}
            self._tell("PUT", f"{at}/traits", said)

    def _grouped(self, at: str, o: Offer, ours: frozenset[str]) -> None:
        there = self._json("GET", f"{at}/aggregates", _Aggregates)
        wanted = o.aggregates | (set(there.aggregates) - ours)
        if wanted != set(there.aggregates):
            said = {"resource_provider_generation": there.resource_provider_generation, "aggregates": sorted(wanted)}
            self._tell("PUT", f"{at}/aggregates", said)

    def withdraw(self, provider: str) -> None:
        """Let it not be any more. Raises Conflict while somebody holds something of it, or something is under it."""
        try:
            self._tell("DELETE", f"/resource_providers/{part(provider)}")
        except NotFound:
            pass

    def _json(self, method: str, path: str, kind: Any, **more: Any) -> Any:
        return self.session.json(method, path, kind, headers=HEADERS, **more)

    def _tell(self, method: str, path: str, body: Any = None) -> None:
        self.session.tell(method, path, body=body, headers=HEADERS)


HEADERS = {"OpenStack-API-Version": f"placement {VERSION}"}


def asked(query: Query) -> dict[str, str | list[str]]:
    """Of allocation candidates, in the words of an address."""
    said: dict[str, str | list[str]] = {}
    for suffix, group in query.groups.items():
        said |= {f"{name}{suffix}": value for name, value in _group(group).items() if value}
    if len([s for s in query.groups if s]) > 1:
        said["group_policy"] = "isolate" if query.isolate else "none"
    return said


def _group(g: Group) -> dict[str, str | list[str]]:
    required = [t for one_of in g.required for t in sorted(one_of)[:1]]  # each is a set of one
    return {
        "resources": ",".join(f"{name}:{n}" for name, n in sorted(g.resources.items())),
        "required": ",".join([*sorted(required), *sorted(f"!{t}" for t in g.forbidden)]),
        "member_of": [f"in:{','.join(sorted(one_of))}" for one_of in g.member_of],
        "in_tree": g.in_tree or "",
    }


def _named(o: Offer) -> dict[str, Any]:
    return {"name": o.name, "parent_provider_uuid": o.parent}


def _stock(s: Stock) -> dict[str, Any]:
    return {f: getattr(s, f) for f in Stock.__struct_fields__ if f != "resource_class"}


def _again(do: Any) -> None:
    """Until nobody writes the same provider at the same time."""
    for left in reversed(range(TRIES)):
        try:
            do()
            return
        except Conflict as e:
            if e.code != RACE or not left:
                raise


class _Of(msgspec.Struct):
    resources: dict[str, int]


class _Allocations(msgspec.Struct):
    allocations: dict[str, _Of]
    project_id: str = ""
    user_id: str = ""
    consumer_generation: int | None = None
    consumer_type: str | None = None


class _Request(msgspec.Struct):
    allocations: dict[str, _Of]


class _Summary(msgspec.Struct):
    root_provider_uuid: str


class _Candidates(msgspec.Struct):
    allocation_requests: list[_Request]
    provider_summaries: dict[str, _Summary]


class _Provider(msgspec.Struct):
    name: str
    parent_provider_uuid: str | None = None


class _Inventories(msgspec.Struct):
    resource_provider_generation: int
    inventories: dict[str, Mapping[str, Any]]


class _Traits(msgspec.Struct):
    resource_provider_generation: int
    traits: list[str]


class _Aggregates(msgspec.Struct):
    resource_provider_generation: int
    aggregates: list[str]
