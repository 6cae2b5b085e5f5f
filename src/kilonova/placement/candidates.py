"""Allocation candidates: who could serve a request, ready to be allocated. What is asked, and how it is shown.

The search is `model/candidates.py`; here is the query of all versions, with what is wrong with it in words.
"""

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

import msgspec

from kilonova.kit.errors import Invalid
from kilonova.kit.routes import Call, Reply
from kilonova.model.candidates import Alone, Forest, Found, Group, Provider, Query, alone, candidates
from kilonova.placement.frame import (
    BAD_VALUE,
    DUPLICATE_KEY,
    MISSING_VALUE,
    R,
    asked,
    dated,
    is_uuid,
    members,
    plain,
    resources,
    traits,
)
from kilonova.placement.shown import Shown
from kilonova.store import providers as store

Said = dict[str, list[str]]


PARTS = {"resources": 10, "required": 17, "member_of": 21, "in_tree": 31}  # of a group, and since when
WHOLE = {"limit": 16, "group_policy": 25, "root_required": 35, "same_subtree": 36}
PLAIN = re.compile(r"(resources|required|member_of|in_tree)()")
NUMBERED = re.compile(r"(resources|required|member_of|in_tree)([1-9][0-9]*)?")
SUFFIXED = re.compile(r"(resources|required|member_of|in_tree)([a-zA-Z0-9_-]{1,64})?")


@R.get("/allocation_candidates", versions="1.10-", policy="placement:allocation_candidates:list")
def list_(call: Call) -> Reply:
    said = asked(call, lambda name: _known(name, call.version))
    limit = _limit(said)
    query = _query(said, call.version)
    named = frozenset[str]().union(query.root_required, query.root_forbidden)
    with call.world.db.read() as tx:
        store.known_classes(tx, {name for g in query.groups.values() for name in g.resources})
        store.known_traits(tx, named.union(*(g.forbidden.union(*g.required) for g in query.groups.values())))
        forest = call.world.trees.look(tx)
    some = _alone(call, forest, query, limit) if call.version >= 27 else None
    if some is not None:
        body = _view_alone(call.version, query, some, call.world.shown)
    else:
        body = _view(call.version, forest, query, _found(call, forest, query, limit), call.world.shown)
    return Reply(body, content_type="application/json", headers=dated(call))


def _alone(call: Call, forest: Forest, query: Query, limit: int | None) -> list[Provider] | None:
    """As most clouds are, and most questions: one provider serves all. None: it is not so simple."""
    config = call.world.config
    most = None if config.candidates_max < 0 else config.candidates_max
    if config.randomize_candidates:
        found = alone(forest, query, most)
        call.world.dice.shuffle(found or [])
        return found and found[:limit]
    return alone(forest, query, most if limit is None else limit if most is None else min(most, limit))


def _found(call: Call, forest: Forest, query: Query, limit: int | None) -> list[Found]:
    config = call.world.config
    most = None if config.candidates_max < 0 else config.candidates_max
    some = candidates(forest, query, breadth_first=config.candidates_order == "breadth-first")
    if limit is None or config.randomize_candidates:
        all = list(islice(some, most))
        if config.randomize_candidates:
            call.world.dice.shuffle(all)
        return all[:limit]
    return list(islice(some, limit if most is None else min(most, limit)))


# ---- what is asked


def _pattern(version: int) -> re.Pattern[str]:
    return PLAIN if version < 25 else NUMBERED if version < 33 else SUFFIXED


def _known(name: str, version: int) -> bool:
    if name in WHOLE:
        return version >= WHOLE[name]
    part = _pattern(version).fullmatch(name)
    return part is not None and version >= PARTS[part[1]]


def _limit(said: Said) -> int | None:
    if "limit" not in said:
        return None
    if not re.fullmatch(r"[1-9][0-9]*", text := said["limit"][-1], re.ASCII):
        raise Invalid(f"Invalid query string parameters: '{plain(text)}' does not match '^[1-9][0-9]*$'")
    return int(text[:18])


def _query(said: Said, version: int) -> Query:
    """Raises Invalid."""
    groups, suffixes = _groups(said, version), _suffixes(said, version)
    granular = [s for s in groups if s]
    subtrees = _subtrees(said, groups)
    policy = said["group_policy"][-1] if "group_policy" in said else None
    if policy not in (None, "none", "isolate"):
        raise Invalid(f"Invalid query string parameters: '{plain(policy)}' is not one of ['none', 'isolate']")
    _has_resources(groups, suffixes, subtrees, version)
    if len(granular) > 1 and policy is None:
        raise Invalid(
            'The "group_policy" parameter is required when specifying more than one "resources{N}" parameter.'
        )
    if "root_required" in said and len(said["root_required"]) > 1:
        raise Invalid("Query parameter 'root_required' may be specified only once.", code=DUPLICATE_KEY)
    root = traits(said["root_required"], version, "root_required", any_of=False) if "root_required" in said else None
    return Query(
        groups,
        isolate=policy == "isolate",
        same_subtree=subtrees,
        root_required=frozenset[str]().union(*root.required) if root else frozenset(),
        root_forbidden=root.forbidden if root else frozenset(),
        nested=version >= 29,
    )


def _suffixes(said: Said, version: int) -> list[str]:
    parts = (_pattern(version).fullmatch(name) for name in said if name not in WHOLE)
    return list(dict.fromkeys(p[2] or "" for p in parts if p))


def _groups(said: Said, version: int) -> dict[str, Group]:
    return {suffix: _group(said, suffix, version) for suffix in _suffixes(said, version)}


def _group(said: Said, suffix: str, version: int) -> Group:
    def values(part: str) -> list[str]:
        return said.get(f"{part}{suffix}", [])

    tree = values("in_tree")[-1] if values("in_tree") else None
    if tree is not None and not is_uuid(tree):
        raise Invalid(
            f"Invalid query string parameters: Expected 'in_tree{suffix}' parameter to be a format of uuid. Got: {plain(tree)}"
        )
    marks = traits(values("required"), version, f"required{suffix}") if values("required") else None
    of = members(values("member_of"), version, f"member_of{suffix}") if values("member_of") else None
    return Group(
        resources=resources(values("resources")[-1], f"resources{suffix}") if values("resources") else {},
        required=marks.required if marks else (),
        forbidden=marks.forbidden if marks else frozenset(),
        member_of=of.of if of else (),
        not_member_of=of.not_of if of else frozenset(),
        in_tree=tree,
    )


def _subtrees(said: Said, groups: dict[str, Group]) -> tuple[frozenset[str], ...]:
    found = []
    for text in said.get("same_subtree", ()):
        suffixes = frozenset(text.split(","))
        if "" in suffixes:
            raise Invalid("Empty string (unsuffixed group) can not be specified in 'same_subtree'.", code=BAD_VALUE)
        if unknown := sorted(suffixes - groups.keys()):
            raise Invalid(
                f"Real suffixes should be specified in 'same_subtree'. {plain(', '.join(unknown))} not found in query.",
                code=BAD_VALUE,
            )
        found.append(suffixes)
    return tuple(found)


def _has_resources(
    groups: dict[str, Group], suffixes: list[str], subtrees: Iterable[frozenset[str]], version: int
) -> None:
    """Raises Invalid: a group must ask for something; from 1.36 on it may only stand between others in a tree."""
    if not any(g.resources for g in groups.values()):
        raise Invalid(
            "There must be at least one resources or resources[$S] parameter.",
            code=MISSING_VALUE if version >= 36 else "",
        )
    named = frozenset[str]().union(*subtrees)
    if bare := [s for s in suffixes if not groups[s].resources and s not in named]:
        raise Invalid(
            f"All traits, member_of and in_tree parameters must be associated with resources: {plain(', '.join(bare))!r}",
            code=BAD_VALUE if version >= 36 else "",
        )


# ---- what is shown


def _view(version: int, forest: Forest, query: Query, found: list[Found], shown: Shown) -> bytes:
    """The body, put together of pieces: most of it was shown before, or is the same for each."""
    pieces = [b'{"allocation_requests":[']
    _requests(pieces, version, query, found)
    pieces.append(b'],"provider_summaries":{')
    _summaries(pieces, version, forest, query, found, shown)
    return b"".join((*pieces, b"}}"))


def _view_alone(version: int, query: Query, providers: list[Provider], shown: Shown) -> bytes:
    """The same, of thousands: nothing is made but a list of pieces, and of that the body."""
    known, resources = shown.of(providers, version), msgspec.json.encode(query.groups[""].resources)
    if not known:
        return b'{"allocation_requests":[],"provider_summaries":{}}'
    names = [name for name, _ in known]
    head, middle = b'{"allocations":{', b':{"resources":%b}}' % resources
    if version >= 34:
        between: list[bytes] = [b""] * (4 * len(names))
        between[0::4] = between[2::4] = names
        between[1::4] = [middle + b',"mappings":{"":['] * len(names)
        between[3::4] = [b"]}}," + head] * len(names)
        between[-1] = b"]}}"
        requests = b"".join(between)
    else:
        requests = (middle + b"}," + head).join(names) + middle + b"}"
    pieces = [summary for _, summary in known]
    pieces[0] = b'{"allocation_requests":[%b%b],"provider_summaries":{%b' % (head, requests, pieces[0][1:])
    pieces.append(b"}}")
    return b"".join(pieces)


def _requests(pieces: list[bytes], version: int, query: Query, found: list[Found]) -> None:
    """Where one provider gives all, requests differ by its name only."""
    resources = msgspec.json.encode(query.groups[""].resources) if "" in query.groups else b"{}"
    head, middle = b'{"allocations":{', b':{"resources":%b}}' % resources
    mapped, tail = (b',"mappings":{"":[', b"]}}") if version >= 34 else (b"}", b"")
    encode, comma, more = msgspec.json.encode, b"", b","
    for c in found:
        if isinstance(c, Alone) and version >= 12:
            uuid = encode(c.provider)
            pieces += (comma, head, uuid, middle, mapped, uuid if tail else b"", tail)
        else:
            pieces += (comma, encode(_request(version, c)))
        comma = more


def _request(version: int, c: Found) -> dict[str, Any]:
    if version < 12:
        listed = [{"resource_provider": {"uuid": p}, "resources": amounts} for p, amounts in c.allocations.items()]
        return {"allocations": listed}
    request: dict[str, Any] = {"allocations": {p: {"resources": amounts} for p, amounts in c.allocations.items()}}
    if version >= 34:
        request["mappings"] = c.mappings
    return request


def _summaries(
    pieces: list[bytes], version: int, forest: Forest, query: Query, found: list[Found], shown: Shown
) -> None:
    """Of all providers of the trees in question; before 1.29 of those that are asked for something."""
    used: dict[str, None] = {}
    for c in found:
        if isinstance(c, Alone):
            used[c.provider] = None
        else:
            used |= dict.fromkeys(c.allocations)
    providers = [forest.providers[p] for p in used]
    if version >= 29 and not forest.flat:
        providers = [p for root in dict.fromkeys([p.root for p in providers]) for p in forest.trees[root]]
    names = {name for g in query.groups.values() for name in g.resources}
    comma = b""
    if version >= 27:
        for _, summary in shown.of(providers, version):
            pieces.append(summary if comma else summary[1:])
            comma = b","
        return
    for p in providers:
        pieces += (comma, msgspec.json.encode(p.uuid), b":", msgspec.json.encode(_summary(version, p, names)))
        comma = b","


def _summary(version: int, p: Provider, names: set[str]) -> dict[str, Any]:
    """Before 1.27: only of what was asked for."""
    stocks = {name: {"capacity": i.capacity, "used": i.used} for name, i in p.inventories.items() if name in names}
    return {"resources": stocks} | ({"traits": list(p.traits)} if version >= 17 else {})
