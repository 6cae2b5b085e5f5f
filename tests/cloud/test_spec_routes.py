"""The registry held against the specification: every route, its versions, its status, its rule; and what is still missing."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kilonova.api import app  # noqa: F401  importing it fills the registry
from kilonova.api.policies import RULES
from kilonova.api.registry import R
from kilonova.kit.routes import Route

SPEC = Path(__file__).parents[2].parent / "shared/spec/compute-api.yaml"
MISSING = Path(__file__).with_name("missing_routes.txt")
NEWEST = 104
Place = tuple[str, str, str | None]  # method, path without the names of its parts, action
OWN: set[Place] = {("GET", "/servers/{}/explain", None)}  # Kilonova's own, of which no client of Nova's knows

pytestmark = pytest.mark.skipif(not SPEC.exists(), reason="the specification is not beside this checkout")


@functools.cache
def entries() -> list[dict[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(SPEC.read_text(), loader)["routes"]


def place(method: str, path: str, action: str | None) -> Place:
    return method, re.sub(r"\{[^}]*\}", "{}", path.rstrip("/")), action


@functools.cache
def ours() -> dict[Place, list[Route]]:
    found: dict[Place, list[Route]] = {}
    for r in R:
        if r.path.startswith("/v2.1") and r.path.rstrip("/") != "/v2.1":
            found.setdefault(place(r.method, r.path.removeprefix("/v2.1"), r.action), []).append(r)
    return found


def theirs() -> list[tuple[dict[str, Any], Place]]:
    return [(e, place(e["method"], e["path"], e.get("action"))) for e in entries() if e["path"] != "/"]


def span(text: str) -> set[int]:
    """ "2.1-2.36", "2.37-", "2.5" as the minor versions in it."""
    first, dash, last = (p.strip().removeprefix("2.") for p in text.partition("-"))
    return set(range(int(first), (int(last) if last else NEWEST if dash else int(first)) + 1))


def existing() -> list[Any]:
    if not SPEC.exists():
        return []
    return [pytest.param(e, ours()[p], id=e["key"]) for e, p in theirs() if p in ours()]


def test_what_is_missing_is_written_down():
    """A route that comes is taken out of the list, so that the list shrinks where everybody sees it."""
    missing = sorted(e["key"] for e, p in theirs() if p not in ours())
    assert missing == MISSING.read_text().split("\n")[:-1], f"{MISSING.name} does not say what is missing"


def test_there_is_nothing_that_nobody_specified():
    known = {p for _, p in theirs()} | OWN
    assert sorted(str(p) for p in ours() if p not in known) == []


@pytest.mark.parametrize(("entry", "routes"), existing())
def test_versions(entry, routes):
    """In a version where it does not exist it answers what the specification says; a route may be gone (410)."""
    if "gone" in entry:
        assert all(r.gone for r in routes) and {
            v for r in routes for v in range(1, NEWEST + 1) if v in r.versions
        } == span("2.1-")
        return
    wanted = span(entry["versions"])
    have = {v for r in routes if not r.gone for v in range(1, NEWEST + 1) if v in r.versions}
    assert have == wanted
    outside = {entry.get("before_min", 404), entry.get("after_max", 404)} if len(wanted) < NEWEST else set()
    if len(outside) == 1:
        assert {r.outside for r in routes} == outside


@pytest.mark.parametrize(("entry", "routes"), existing())
def test_success(entry, routes):
    for v in sorted(span(entry["versions"]) if "gone" not in entry else ()):
        route = next((r for r in routes if v in r.versions), None)
        if route is None or route.gone:
            continue
        ok = entry.get("ok", {}).items()
        allowed = {s for s, when in ok if not when.startswith("2.") or v in span(when.split(" ")[0])}
        assert route.status(v) in allowed, f"2.{v}"


@pytest.mark.parametrize(("entry", "routes"), existing())
def test_policy(entry, routes):
    rules = {p["rule"] for p in entry.get("policy", []) if not p.get("when")} or {
        p["rule"] for p in entry.get("policy", []) if "effect" not in p
    }
    for r in routes:
        if r.gone:
            continue
        assert (r.policy in rules) if rules else (r.policy is None), r.policy


def test_every_rule_has_its_default():
    words = {
        "admin": "rule:context_is_admin",
        "project-manager|admin": "rule:project_manager_or_admin",
        "project-member|admin": "rule:project_member_or_admin",
        "project-reader|admin": "rule:project_reader_or_admin",
        "service|admin": "rule:service_or_admin",
        "anyone": "@",
        "nobody": "!",
    }
    declared = {r.name: r.check for r in RULES}
    wrong = {
        (p["rule"], p["default"], declared.get(p["rule"]))
        for e in entries()
        for p in e.get("policy", [])
        if p["default"] in words and declared.get(p["rule"]) != words[p["default"]]
    }
    assert wrong == set()
    assert {p["rule"] for e in entries() for p in e.get("policy", [])} <= declared.keys()
