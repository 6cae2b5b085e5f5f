"""Who may what: every route, at every version where something of it differs, asked by a stranger, a reader, a member, another
project's member and those whose tokens are of something else than a project; on things that are there; held against the roles
of the specification.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cloud import tables
from tests.cloud.prepared import Prepared
from tests.cloud.tables import changes, least, said
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
GOOD = (200, 204)


class There(Prepared):
    """With people whose tokens are of the whole system, and of a domain: administrators there."""

    def __init__(self, directory: Any) -> None:
        super().__init__(directory)
        services, admin = self.cloud.services, self.admin
        dora = services.person("dora")
        (role,) = services.json("GET", "/identity/v3/roles?name=admin", token=admin)["roles"]
        for place_ in ("system", "domains/default"):
            path = f"/identity/v3/{place_}/users/{dora.id}/roles/{role['id']}"
            services.json("PUT", path, token=admin, ok=204)
        self.system = services.log_in("dora", "dora's", {"system": {"all": True}})
        self.domain = services.log_in("dora", "dora's", {"domain": {"id": "default"}})


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return There(tmp_path_factory.mktemp("who"))


# ---- a loop over every route


def needed(entry: dict[str, Any]) -> str:
    """The role without which nothing goes; "": none. Where rules stand for cases, that of the case that is asked here."""
    rules = [p for p in entry.get("policy", []) if "effect" not in p]
    always = [p["default"] for p in rules if "when" not in p]
    return (always or [p["default"] for p in rules if "adds" not in p["when"]] or [""])[0]


def differs(entry: dict[str, Any]) -> list[int]:
    """The versions of a route in which anything that the specification says of it begins or ends, and those just before."""
    inside = span(entry["versions"])
    first, last = min(inside), min(max(inside), NEWEST)
    found = {first, last}
    told = [*entry.get("ok", {}).values(), *(entry.get("query") or {}).values()]
    told += [p["when"] for p in entry.get("policy", []) if "when" in p]
    for v in re.findall(r"\b2\.(\d+)", " ".join(map(str, told))):
        found |= {int(v) - 1, int(v), int(v) + 1}
    for key, table, (since, until) in tables.routes():
        if key == entry["key"]:
            found |= {since, until}
            for what in ("request", "query", "response"):
                found |= set(changes(table.get(what) if isinstance(table.get(what), dict) else None, since, until))
    return sorted(v for v in found if v in inside)


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
    wrong = []
    for v in differs(entry):
        for who, token, wanted in expected(there, entry):
            status = asked(there, entry, v, token)
            if status not in wanted and not (wanted == GOOD and status < 300):
                wrong.append(f"2.{v} {who} (needs {needed(entry)}): {status}")
    assert wrong == [], entry["key"]


def expected(there: There, entry: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(who, token, what it is answered with)."""
    role, people = needed(entry), {"reader": there.reader, "alice": there.alice}
    if entry["key"] not in OPEN:
        yield "nobody", "", (401,)
        yield "nobody that there is", "gAAAAnonsense", (401,)
    if role and entry["key"] not in NEVER:
        yield "the system's administrator", there.system, (403,)
        yield "a domain's administrator", there.domain, (403,)
    for who in TOO_LITTLE.get(role, ()):
        yield who, people[who], (403,)
    if entry["path"].startswith(OWNED) and entry["key"] not in NEVER:
        yield "another project's", there.bob, (403,) if entry["path"].startswith(ASKED_ABOUT) else (404,)
    if entry["method"] == "GET" and role in READERS and entry["key"] not in ABSENT:
        yield "reader", there.reader if role != "key-owner-user|admin" else there.alice, GOOD


def test_every_version_is_asked_where_something_differs():
    """The loop is as wide as the specification: versions that it names of policy, fields, query or status are among those asked."""
    of = {e["key"]: differs(e) for e in entries() if "gone" not in e}
    assert {46, 47, 62, 63, 95, 96, 104} <= set(of["GET /servers/{id}"])
    assert {1, 2, 9, 10, 91, 92, 104} <= set(of["POST /os-keypairs"])
    assert {76, 77, 90, 91} <= set(of["POST /servers/{id}/action#unshelve"])
    assert len(of) == 212 and sum(map(len, of.values())) > 1000
