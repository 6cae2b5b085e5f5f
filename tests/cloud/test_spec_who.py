"""Who may what: every route, asked by a stranger, a reader, a member and another project's member, on things that are
there; held against the roles of the specification.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cloud import tables
from tests.cloud.prepared import Prepared
from tests.cloud.tables import least, said
from tests.cloud.test_spec_routes import NEWEST, entries, ours, place, span
from tests.cloud.test_spec_whole import ABSENT, QUERY

pytestmark = pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")

OPEN = {"GET /", "GET /versions/{id}"}  # documents, which need no token
# What a project has, and another does not know of.
OWNED = (
    "/servers/{", "/os-volumes_boot/{", "/os-server-groups/{", "/os-floating-ips/{", "/os-security-groups/{",
    "/os-volumes/{", "/os-snapshots/{", "/images/{",
)  # fmt: skip
# Of these the Compute API says 403: it looks the server up for everybody, and then asks whose it is.
ASKED_ABOUT = ("/servers/{server_id}/tags", "/servers/{server_id}/shares")
BODIES = {"POST /servers/{server_id}/remote-consoles": {"remote_console": {"protocol": "vnc", "type": "novnc"}}}
NEVER = {"POST /servers/{id}/action#os-getRDPConsole"}  # 400 for everybody: there are none
READERS = ("project-reader|admin", "anyone", "key-owner-user|admin")
TOO_LITTLE = {  # role needed → who has less
    "admin": ("reader", "alice"),
    "service|admin": ("reader", "alice"),
    "project-manager|admin": ("reader", "alice"),
    "project-member|admin": ("reader",),
}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return Prepared(tmp_path_factory.mktemp("who"))


def needed(entry: dict[str, Any]) -> str:
    """The role without which nothing goes; "": none. Where rules stand for cases, that of the case that is asked here."""
    rules = [p for p in entry.get("policy", []) if "effect" not in p]
    always = [p["default"] for p in rules if "when" not in p]
    return (always or [p["default"] for p in rules if "adds" not in p["when"]] or [""])[0]


def body(key: str, version: int) -> Any:
    if key in BODIES:
        return BODIES[key]
    for route, entry, (first, last) in tables.routes():
        if route == key and first <= version <= last:
            table = said(entry, "request", version)
            if table is not None:
                return least(table)
    return {key.partition("#")[2]: None} if "#" in key else None


def cases() -> list[Any]:
    if not tables.FOLDER.exists():
        return []
    known = [e for e in entries() if "gone" not in e and e["path"] != "/"]
    return [pytest.param(e, id=e["key"]) for e in known if place(e["method"], e["path"], e.get("action")) in ours()]


def asked(there: Prepared, entry: dict[str, Any], version: int, token: str) -> int:
    path = there.path(entry["path"], entry["group"], version) + QUERY.get(entry["key"], "")
    wish = body(entry["key"], version) if entry["method"] in ("POST", "PUT") else None
    return there.call(entry["method"], path, wish, token=token, version=version)[0]


@pytest.mark.parametrize("entry", cases())
def test_who_may(there, entry):
    key, versions, wrong = entry["key"], span(entry["versions"]), []
    for v in {min(versions), min(max(versions), NEWEST)}:
        for who, token, wanted in expected(there, entry):
            status = asked(there, entry, v, token)
            if status not in wanted and not (wanted == GOOD and status < 300):
                wrong.append(f"2.{v} {who} (needs {needed(entry)}): {status}")
    assert wrong == [], key


GOOD = (200, 204)


def expected(there: Prepared, entry: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(who, token, what it is answered with)."""
    role, people = needed(entry), {"reader": there.reader, "alice": there.alice}
    if entry["key"] not in OPEN:
        yield "nobody", "", (401,)
    for who in TOO_LITTLE.get(role, ()):
        yield who, people[who], (403,)
    if entry["path"].startswith(OWNED) and entry["key"] not in NEVER:
        yield "another project's", there.bob, (403,) if entry["path"].startswith(ASKED_ABOUT) else (404,)
    if entry["method"] == "GET" and role in READERS and entry["key"] not in ABSENT:
        yield "reader", there.reader if role != "key-owner-user|admin" else there.alice, GOOD
