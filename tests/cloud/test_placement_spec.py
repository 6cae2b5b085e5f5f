"""The Placement API held against the specification: each route at each version, its bodies, its rules."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kilonova.placement.frame import R
from kilonova.placement.policies import RULES
from tests.cloud.placements import NEWEST, Placement

SPEC = Path(__file__).parents[2].parent / "shared/spec/placement-api.yaml"
pytestmark = pytest.mark.skipif(not SPEC.exists(), reason="the specification is not beside this checkout")

GHOST = "00000000-0000-4000-8000-000000000001"
CONSUMER, OTHER = "00000000-0000-4000-8000-000000000002", "00000000-0000-4000-8000-000000000003"


@functools.cache
def entries() -> dict[str, dict[str, Any]]:
    if not SPEC.exists():
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return {e["key"]: e for e in yaml.load(SPEC.read_text(), loader)["routes"]}


def minor(text: str) -> int:
    return int(text.split(".")[1])


def within(text: str, version: int) -> bool:
    """`all`, `1.0-1.19`, `1.20-`, and what is said in brackets behind."""
    if text == "all":
        return True
    span = re.match(r"1\.(\d+)(-(?:1\.(\d+))?)?", text)
    assert span, text
    first, last = int(span[1]), int(span[3]) if span[3] else NEWEST if span[2] else int(span[1])
    return first <= version <= last


class Room(Placement):
    """With one of everything: a provider that somebody holds of, and one of which nobody does."""

    def __init__(self) -> None:
        super().__init__()
        self.full = self.provider("full", VCPU=8, MEMORY_MB=1024, traits=("HW_CPU_X86_AVX",))
        self.free = self.provider("free", VCPU=8)
        self.say("PUT", "/resource_classes/CUSTOM_GOLD")
        self.say("PUT", "/traits/CUSTOM_FAST")
        self.allocate(CONSUMER, {self.full: {"VCPU": 2}})


def held(v: int, room: Room, generation: int | None = 1, amount: int = 1) -> dict[str, Any]:
    said = room.holding({room.full: {"VCPU": amount}}, generation)
    if v < 12:
        said["allocations"] = [{"resource_provider": {"uuid": room.full}, "resources": {"VCPU": amount}}]
    if v < 8:
        del said["project_id"], said["user_id"]
    if v < 28:
        del said["consumer_generation"]
    if v < 38:
        del said["consumer_type"]
    return said


def stocks(room: Room, **more: Any) -> dict[str, Any]:
    return {"resource_provider_generation": room.generation(room.free), **more}


BODIES = {
    "POST /resource_providers": lambda room, v: {"name": "new", "uuid": GHOST},
    "PUT /resource_providers/{uuid}": lambda room, v: {"name": "renamed"},
    "POST /resource_classes": lambda room, v: {"name": "CUSTOM_NEW"},
    "PUT /resource_classes/{name}": lambda room, v: {"name": "CUSTOM_NEW"} if v < 7 else None,
    "POST /resource_providers/{uuid}/inventories": lambda room, v: {"resource_class": "DISK_GB", "total": 5},
    "PUT /resource_providers/{uuid}/inventories": lambda room, v: stocks(room, inventories={"VCPU": {"total": 9}}),
    "PUT /resource_providers/{uuid}/inventories/{resource_class}": lambda room, v: stocks(room, total=9),
    "PUT /resource_providers/{uuid}/aggregates": lambda room, v: (
        [GHOST] if v < 19 else stocks(room, aggregates=[GHOST])
    ),
    "PUT /resource_providers/{uuid}/traits": lambda room, v: stocks(room, traits=["CUSTOM_FAST"]),
    "PUT /allocations/{consumer_uuid}": lambda room, v: held(v, room),
    "POST /allocations": lambda room, v: {OTHER: held(v, room, None), CONSUMER: held(v, room)},
    "POST /reshaper": lambda room, v: {
        "inventories": {room.free: stocks(room, inventories={"VCPU": {"total": 9}})},
        "allocations": {CONSUMER: held(v, room)},
    },
}
QUERIES = {
    "GET /allocation_candidates": "?resources=VCPU:1",
    "GET /usages": "?project_id=p",
}


def path_of(room: Room, entry: dict[str, Any]) -> str:
    name = "CUSTOM_GOLD" if "classes" in entry["path"] else "CUSTOM_FAST"
    path = entry["path"].replace("{uuid}", room.free).replace("{resource_class}", "VCPU").replace("{name}", name)
    return path.replace("{consumer_uuid}", CONSUMER) + QUERIES.get(entry["key"], "")


def body_of(room: Room, entry: dict[str, Any], v: int) -> Any:
    return BODIES[entry["key"]](room, v) if entry["key"] in BODIES else None


EXISTED = {"PUT /resource_classes/{name}", "PUT /traits/{name}"}  # of what is there already: 204


def expected(entry: dict[str, Any], v: int) -> set[int]:
    if v < minor(entry["versions"].rstrip("-").split("-")[0]):
        return {entry.get("before_min", 404)}
    fit = {status for status, when in entry["ok"].items() if within(when if "1." in when else "all", v)}
    if entry["key"] in EXISTED and 204 in fit:
        return {204}
    return fit


def keys() -> list[str]:
    return list(entries())


def test_all_routes_are_there_and_no_others():
    def place(method: str, path: str) -> tuple[str, str]:
        return method, re.sub(r"\{[^}]*\}", "{}", path)

    theirs = {place(e["method"], e["path"]) for e in entries().values()}
    assert {place(r.method, r.path) for r in R} == theirs


def test_rules_have_the_names_that_operators_know():
    theirs = {e["policy"] for e in entries().values() if e["policy"].startswith("placement:")}
    assert theirs == {r.name for r in RULES if r.name.startswith("placement:")}
    by_place = {(r.method, re.sub(r"\{[^}]*\}", "{}", r.path)): r.policy for r in R}
    for e in entries().values():
        mine = by_place[e["method"], re.sub(r"\{[^}]*\}", "{}", e["path"])]
        assert (mine or "(none, no token)") == e["policy"], e["key"]


@pytest.mark.parametrize("key", keys())
def test_each_version_has_its_status_and_its_answer(key):
    entry = entries()[key]
    for v in range(NEWEST + 1):
        room = Room()
        answer = room.ask(entry["method"], path_of(room, entry), body_of(room, entry, v), v)
        said = answer.read()
        assert answer.status in expected(entry, v), (v, answer.status, said)
        assert answer.headers["openstack-api-version"] == f"placement 1.{v}"
        assert "openstack-api-version" in answer.headers["vary"].lower()
        if answer.status == 405:
            assert "DELETE" not in answer.headers["allow"] and "GET" in answer.headers["allow"]
        if entry["method"] == "GET" and answer.status < 300:
            dated = "last-modified" in answer.headers and answer.headers.get("cache-control") == "no-cache"
            assert dated == (v >= 15)
        room.db.close()


@pytest.mark.parametrize("key", [k for k in keys() if "request" in entries()[k]])
def test_bodies_are_read_strictly(key):
    """At each version where something of the body changes: each field is needed or not, none is too many."""
    entry = entries()[key]
    fields = {n: [f] if isinstance(f, dict) else f for n, f in entry["request"].items()}
    moments = {minor(f[w]) + (w == "until") for fs in fields.values() for f in fs for w in ("since", "until") if w in f}
    first = minor(entry["versions"].rstrip("-").split("-")[0])
    for v in sorted({first, NEWEST} | {m for m in moments if first <= m <= NEWEST}):
        room = Room()
        good = body_of(room, entry, v)
        if not isinstance(good, dict):
            continue
        path = path_of(room, entry)
        there = {n: now[0] for n, fs in fields.items() if (now := [f for f in fs if _exists(f, v)])}
        for name, field in there.items():
            if "." in name or "[" in name or "{" in name or name == "(root)":
                continue
            if field.get("required"):
                room.refused(400, entry["method"], path, {k: x for k, x in good.items() if k != name}, v)
            room.refused(400, entry["method"], path, good | {name: [[1.5]]}, v)
        for name in fields.keys() - there.keys():
            if not re.search(r"[.\[{(]", name):
                room.refused(400, entry["method"], path, good | {name: "x"}, v)
        if there.get("(root)", {}).get("extra") == "no":
            room.refused(400, entry["method"], path, good | {"junk": 1}, v)
        for junk in ([], "x", 7, None):
            room.refused(400, entry["method"], path, b"null" if junk is None else junk, v)
        assert room.ask(entry["method"], path, good, v).status < 300
        room.db.close()


def _exists(field: dict[str, Any], v: int) -> bool:
    return minor(field.get("since", "1.0")) <= v <= minor(field.get("until", f"1.{NEWEST}"))


@pytest.mark.parametrize("key", keys())
def test_who_may(key):
    entry = entries()[key]
    room = Room()
    path, body = path_of(room, entry), body_of(room, entry, NEWEST)

    def status(token: str) -> int:
        return Room().ask(entry["method"], path, body, token=token).status

    if entry["path"] == "/":
        assert room.ask("GET", "/", token="").status == 200
        return
    answer = room.ask(entry["method"], path, body, token="")
    assert answer.status == 401 and answer.headers["www-authenticate"]
    assert room.ask(entry["method"], path, body, token="nobody's").status == 401
    room.refused(403, entry["method"], path.replace("project_id=p", "project_id=q"), body, token="reader")
    if key == "GET /usages":
        assert room.ask("GET", path, token="reader").status == 200
    if key == "POST /reshaper":
        room.refused(403, entry["method"], path, body, token="admin")
    else:
        assert room.ask(entry["method"], path, body, token="admin").status < 300


# ---- error codes

CODES = {
    "placement.concurrent_update": (409, "PUT", "/resource_providers/{free}/traits", {"resource_provider_generation": 99, "traits": []}),
    "placement.duplicate_name": (409, "POST", "/resource_providers", {"name": "full"}),
    "placement.inventory.inuse": (409, "DELETE", "/resource_providers/{full}/inventories", None),
    "placement.resource_provider.inuse": (409, "DELETE", "/resource_providers/{full}", None),
    "placement.resource_provider.cannot_delete_parent": (409, "DELETE", "/resource_providers/{parent}", None),
    "placement.resource_provider.not_found": (400, "POST", "/reshaper", {"inventories": {GHOST: {"resource_provider_generation": 0, "inventories": {}}}, "allocations": {}}),
    "placement.query.duplicate_key": (400, "GET", "/allocation_candidates?resources=VCPU:1&root_required=HW_CPU_X86_AVX&root_required=HW_CPU_X86_AVX2", None),
    "placement.query.bad_value": (400, "GET", "/allocation_candidates?resources=VCPU:1&same_subtree=_x", None),
    "placement.query.missing_value": (400, "GET", "/allocation_candidates?required=HW_CPU_X86_AVX", None),
    "placement.undefined_code": (404, "GET", f"/resource_providers/{GHOST}", None),
}  # fmt: skip


def test_every_error_code_is_one_of_these():
    said = "".join(SPEC.with_name(name).read_text() for name in ("placement.md", SPEC.name))
    assert set(re.findall(r"placement\.(?:[a-z_]+\.)?[a-z_]+", said)) - {"placement.md", "placement.query"} == set(
        CODES
    )


@pytest.mark.parametrize("code", CODES)
def test_error_codes(code):
    room = Room()
    parent = room.provider("parent")
    room.provider("child", parent)
    status, method, path, body = CODES[code]
    path = path.format(full=room.full, free=room.free, parent=parent)
    error = room.refused(status, method, path, body)
    assert error["code"] == code
    if "/allocation_candidates" not in path and "/reshaper" not in path:  # they came with codes
        assert "code" not in room.refused(status, method, path, body, v=22)
    room.db.close()
