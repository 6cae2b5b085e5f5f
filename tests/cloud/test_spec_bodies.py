"""What the routes that exist accept and refuse, held against the specification's tables wherever a version changed them.

The things named in the paths do not exist, so a good body ends in 404 (or in a refusal that is not the schema's) and
changes nothing; a bad one must end in 400 before anybody looks for the thing.
"""

import re
import urllib.parse
from typing import Any

import pytest

from tests.cloud import tables
from tests.cloud.rooms import Rooms
from tests.cloud.tables import absent, changes, least, said, text, whole, wrong
from tests.cloud.test_spec_routes import ours, place

pytestmark = pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")

SCHEMA = re.compile(
    r"Invalid input for (field/attribute|query parameters)|Additional properties are not|'[^']*' is a required property"
    r"|Malformed request body|There is no such action|.* does not match any of the regexes"
)
NOBODY = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"

# Where we differ, and why. (route, what is wrong) → reason
ALLOWED = {
    (f"GET {path}", name): "a moment or its beginning, not any regular expression over moments"
    for path in ("/servers", "/servers/detail", "/os-volumes_boot", "/os-volumes_boot/detail")
    for name in ("created_at", "launched_at", "terminated_at")
}


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    rooms = Rooms(tmp_path_factory.mktemp("bodies"))
    rooms.token = rooms.admin()
    return rooms


def existing(what: str, *methods: str) -> list[Any]:
    if not tables.FOLDER.exists():
        return []
    found = []
    for key, entry, (first, last) in tables.routes():
        method, path, action = re.fullmatch(r"(\S+) ([^#\s]+)(?:#(\S+))?", key).groups()
        known = ours().get(place(method, path, action), [])
        if method in methods and known and not known[0].gone and isinstance(entry.get(what), dict):
            found.append(pytest.param(method, path, action, entry, first, last, id=f"{key} {entry['versions']}"))
    return found


def real(path: str, version: int) -> str:
    """The path with names of things that are not there."""
    if path.startswith("/os-services/"):
        return "/os-services/enable" if version < 53 else f"/os-services/{NOBODY}"
    if path.startswith("/os-hypervisors/") and version < 53:
        return path.replace("{id}", "77777")
    id = "77777" if path.startswith("/os-aggregates") else NOBODY
    return path.replace("{id}", "a" if "/{id}/" not in path and path.count("{") == 2 else id).replace("{server_id}", NOBODY).replace("{flavor_id}", NOBODY)  # fmt: skip


def refusal(said: Any) -> str:
    """The sentence, if it is a schema's; a server's fault is one in any case."""
    if said.status >= 500 and said.status != 501:
        return f"{said.status} {said.raw[:200]!r}"
    message = said.json[next(iter(said.json))].get("message", "") if said.status == 400 else ""
    return message if SCHEMA.match(message) else ""


# ---- bodies


@pytest.mark.parametrize(("method", "path", "action", "entry", "first", "last"), existing("request", "POST", "PUT"))
def test_good_bodies_are_let_in(api, method, path, action, entry, first, last):
    wrong = []
    for v in changes(entry["request"], first, last):
        table = said(entry, "request", v)
        for body in [] if table is None else [least(table), whole(table)]:
            if body is None and action:  # whatever it is, it is an action's
                body = {action: None}
            answer = api.call(method, real(path, v), body, api.token, v)
            if sentence := refusal(answer):
                wrong.append(f"2.{v} {body}: {sentence}")
    assert wrong == []


@pytest.mark.parametrize(("method", "path", "action", "entry", "first", "last"), existing("request", "POST", "PUT"))
def test_members_of_other_versions_are_refused(api, method, path, action, entry, first, last):
    wrong = []
    versions = changes(entry["request"], first, last)
    for v in versions:
        table = said(entry, "request", v)
        seen: set[str] = set()
        for other in versions:
            then = said(entry, "request", other)
            for name, body in [] if table is None or then is None else absent(table, then):
                if name in seen:
                    continue
                seen.add(name)
                answer = api.call(method, real(path, v), body, api.token, v)
                if answer.status != 400:
                    wrong.append(f"2.{v} {name}: {answer.status}")
    assert wrong == []


@pytest.mark.parametrize(("method", "path", "action", "entry", "first", "last"), existing("request", "POST", "PUT"))
def test_bad_bodies_are_refused(api, method, path, action, entry, first, last):
    failed = []
    key = f"{method} {path}" + (f"#{action}" if action else "")
    for v in {first, last}:
        table = said(entry, "request", v)
        for why, body in [] if table is None else wrong(table):
            if (key, why) in ALLOWED:
                continue
            answer = api.call(method, real(path, v), body, api.token, v)
            if answer.status != 400:
                failed.append(f"2.{v} {why}: {answer.status} for {str(body)[:200]}")
    assert failed == []


# ---- queries


@pytest.mark.parametrize(("method", "path", "action", "entry", "first", "last"), existing("query", "GET", "DELETE"))
def test_queries(api, method, path, action, entry, first, last):
    failed = []
    every = {n for v in changes(entry["query"], first, last) for n in said(entry, "query", v).members} | {
        "nobody_knows"
    }
    for v in changes(entry["query"], first, last):
        table = said(entry, "query", v)
        for name in sorted(every):
            node = table.members.get(name)
            value = query_value(node) if node else "x"
            answer = ask(api, method, path, v, [(name, value)])
            if answer.status >= 500 and answer.status != 501:
                failed.append(f"2.{v} {name}: {answer.status}")
            elif node is None and table.closed != bool(refusal(answer)):
                failed.append(f"2.{v} {name}, unknown then: {answer.status}")
            elif node is not None and (f"{method} {path}", name) not in ALLOWED and (sentence := refusal(answer)):
                failed.append(f"2.{v} {name}={value}: {sentence}")
            elif (
                node is not None
                and not node.told.get("multi")
                and ask(api, method, path, v, [(name, value)] * 2).status != 400
            ):
                failed.append(f"2.{v} {name} twice is let in")
    assert failed == []


def query_value(node: tables.Node) -> str:
    if "enum" in node.told:
        return str(node.told["enum"][0])
    return "true" if "boolish" in node.types else text(node)


def ask(api: Rooms, method: str, path: str, version: int, query: list[tuple[str, str]]) -> Any:
    return api.call(method, f"{real(path, version)}?{urllib.parse.urlencode(query)}", None, api.token, version)
