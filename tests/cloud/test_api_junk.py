"""Every route of the Compute API, driven with junk: what is sent may be refused in any way, but it is never our fault."""

import json
import logging
import os
import urllib.parse
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kilonova.api import app as compute
from kilonova.kit.routes import Route
from kilonova.kit.versions import at
from kilonova.model.server import Image
from tests.cloud.rooms import Rooms

assert compute.GROUPS
ROUTES = [r for r in compute.R if not r.gone]


USUAL = 40
EXAMPLES = int(
    os.environ.get("KILONOVA_JUNK", USUAL)
)  # how often each route is tried; more of them are others each time

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "a" * 256, "a" * 70_000, "\x00", "\u2028", "é\u0301", "-1", "0", "1e999", "true", "null", "2026-11-20T12:00:00Z"]),
    st.sampled_from(["192.0.2.7", "fd00::7", "..", "a/b", "%s%s%n", "' OR 1=1 --", "{{7*7}}", "NaN", "9" * 40, "nova:h1:h1", "br-x"]),
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), TEXTS, st.integers(), st.sampled_from([2**31, 2**63, 2**64, -(2**70), 0, -1, 1.5, -0.0, 1e308])
)  # fmt: skip
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
BROKEN = st.sampled_from(
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 30_000, b"nul", b"\x00", b'"\\ud800"', b"1" * 20_000, b"{}" * 2, b" " * 200_000, b'{"a":1,"a":2}']
)  # fmt: skip


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    rooms = Rooms(tmp_path_factory.mktemp("junk"))
    rooms.token = rooms.admin()
    rooms.member = rooms.person("maria", "member")
    rooms.mine = rooms.server(
        rooms.member.project_id, user_id=rooms.member.id, image=Image(rooms.ids.uuid()), host="h1"
    )
    return rooms


def bodies(model: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """Things that look like a body of this model, with junk in any place."""
    if model is None or depth > 4:
        return JSON
    info = model if isinstance(model, msgspec.inspect.Type) else msgspec.inspect.type_info(model)
    shapes = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    return st.one_of(JSON, *[_shaped(s, depth) for s in shapes], *[_shaped(s, depth) for s in shapes])


def _shaped(info: Any, depth: int) -> st.SearchStrategy[Any]:
    if isinstance(info, msgspec.inspect.StructType):
        fields = {f.encode_name: bodies(f.type, depth + 1) for f in info.fields}
        needed = {f.encode_name: fields.pop(f.encode_name) for f in info.fields if f.required}
        return st.fixed_dictionaries(needed, optional=fields)
    if isinstance(info, msgspec.inspect.ListType):
        return st.lists(bodies(info.item_type, depth + 1), max_size=3)
    if isinstance(info, msgspec.inspect.DictType):
        return st.dictionaries(TEXTS, bodies(info.value_type, depth + 1), max_size=3)
    if isinstance(info, msgspec.inspect.LiteralType):
        return st.sampled_from(list(info.values))
    if isinstance(info, msgspec.inspect.IntType):
        return st.integers(0, 5)
    if isinstance(info, msgspec.inspect.StrType):
        return st.sampled_from(["a", "1", "ab-1", "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6", "eA=="])
    return JSON


def queries(route: Route, version: int) -> st.SearchStrategy[str]:
    names = ["limit", "marker", "junk", "_x"]
    if route.query is not None:
        names += [f.encode_name for f in msgspec.structs.fields(at(route.query, version))]
    pairs = st.lists(st.tuples(st.sampled_from(names), TEXTS.filter(lambda t: len(t) < 1000)), max_size=3)
    return st.one_of(
        pairs.map(urllib.parse.urlencode), st.sampled_from(["%ff", "a=%00", "=&&=", "limit", "%", "a" * 3000])
    )


def encoded(body: Any) -> bytes:
    return json.dumps(body).encode()  # unlike msgspec's, it writes lone surrogates and numbers of any size


def versions(route: Route) -> st.SearchStrategy[int]:
    first, last = max(route.versions.first, 1), min(route.versions.last, 104)
    return st.sampled_from(sorted({first, last, (first + last) // 2})) | st.integers(1, 104)


def paths(route: Route, api: Rooms) -> st.SearchStrategy[str]:
    ids = TEXTS.filter(lambda t: len(t) < 300) | st.sampled_from([api.mine.id, "1", "mine", api.member.project_id])
    parts = [
        ids.map(lambda t: urllib.parse.quote(t.encode("utf-8", "replace"), safe=""))
        if p.startswith("{")
        else st.just(p)
        for p in route.path.split("/")
    ]
    return st.tuples(*parts).map("/".join)


def send(api: Rooms, route: Route, path: str, query: str, version: int, body: bytes, token: str, **headers: str) -> int:
    told = {"OpenStack-API-Version": f"compute 2.{version}", "Content-Type": "application/json", **headers}
    where = f"/compute{path}" + (f"?{query}" if query else "")
    answer = api.ask(route.method, where, body or None, token, **told)
    said = answer.read()
    assert answer.status != 500, (route.method, where[:300], body[:300], said)
    assert b"Traceback" not in said
    return answer.status


@pytest.mark.parametrize(
    "route", ROUTES, ids=lambda r: f"{r.method} {r.path}{'#' + r.action if r.action else ''} 2.{r.versions.first}"
)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == USUAL,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_junk(api, route, data):
    version = data.draw(versions(route), "version")
    body = b""
    if route.method in ("POST", "PUT"):
        kind = data.draw(st.integers(0, 5), "kind")
        if kind == 0:
            body = data.draw(BROKEN, "broken")
        else:
            drawn = data.draw(bodies(at(route.body, version) if route.body is not None else None), "body")
            body = encoded({route.action: drawn} if route.action else drawn)
    token = data.draw(
        st.sampled_from([api.token, api.token, api.member.token, "", "junk", "gAAAAA" + "x" * 200]), "token"
    )
    status = send(
        api,
        route,
        data.draw(paths(route, api), "path"),
        data.draw(queries(route, version), "query"),
        version,
        body,
        token,
    )
    if token not in (api.token, api.member.token):
        assert status in (200, 300, 400, 401, 404, 413), status
    assert status != 503 or route.action == "os-getConsoleOutput"


@pytest.mark.parametrize("header", ["OpenStack-API-Version", "X-OpenStack-Nova-API-Version", "X-Auth-Token", "Content-Type", "Accept", "X-OpenStack-Request-ID", "Host"])  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    value=st.text(st.characters(max_codepoint=255), max_size=40)
    | st.sampled_from(["compute 2.99999999999999999999", "compute latest", "compute 2.1, volume 3.1", "compute", "compute 2.-1", "2.1.1", "a" * 9000, "compute 2.1\x00"])
)  # fmt: skip
def test_junk_in_headers(api, header, value):
    for method, path in (("GET", "/v2.1/servers"), ("GET", "/"), ("GET", "/v2.1/servers/x"), ("POST", "/v2.1/servers")):
        answer = api.ask(method, f"/compute{path}", b"{}" if method == "POST" else None, api.token, **{header: value})
        answer.read()
        assert answer.status < 500, (header, value, answer.status)


@pytest.mark.parametrize(
    "method", ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "junk"]
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(path=st.text(max_size=30) | st.sampled_from(["/v2.1/servers//", "/v2.1/" + "a/" * 200, "/v2.1/servers/" + "a" * 5000, "/v2.1/%00", "/v2/servers", "/v2.1/servers/../flavors"]))  # fmt: skip
def test_junk_paths_and_methods(api, method, path):
    answer = api.ask(method, "/compute/" + urllib.parse.quote(path.encode("utf-8", "replace")), None, api.token)
    answer.read()
    assert answer.status < 500, (method, path, answer.status)


def test_null_characters_reach_no_database(api):
    """SQLite would keep them; PostgreSQL raises."""
    where = f"/compute/v2.1/servers/{api.mine.id}"
    told = {"OpenStack-API-Version": "compute 2.26", "Content-Type": "application/json"}
    for path, body in (
        ("tags", {"tags": ["a\x00b"]}),
        ("metadata", {"metadata": {"a": "\x00"}}),
        ("metadata", {"metadata": {"\x00": "a"}}),
    ):
        answer = api.ask("PUT", f"{where}/{path}", encoded(body), api.member.token, **told)
        assert answer.status == 400, answer.read()
    literal = api.ask("PUT", f"{where}/metadata", encoded({"metadata": {"a": "\\u0000"}}), api.member.token, **told)
    assert literal.status == 200 and json.loads(literal.read()) == {"metadata": {"a": "\\u0000"}}
    for path in ("%00", "x%00y", f"{api.mine.id}%00", f"{api.mine.id}/metadata/%00"):
        assert api.ask("GET", f"/compute/v2.1/servers/{path}", None, api.member.token).status == 404
    assert api.ask("GET", "/compute/v2.1/servers?name=%00", None, api.member.token).status == 400


def test_nothing_was_logged_as_our_failure(api, caplog):
    """What a trace is written for is our fault; run after the others, it sends some of the worst once more."""
    with caplog.at_level(logging.ERROR):
        for body in (
            b"[" * 100_000,
            b'{"server": {"name": "\\ud800"}}',
            b'{"server": {"name": "a", "flavorRef": 1e400}}',
            b'{"os-stop": 1e999}',
        ):
            for path in ("/v2.1/servers", f"/v2.1/servers/{api.mine.id}/action", "/v2.1/flavors"):
                answer = api.ask("POST", f"/compute{path}", body, api.token, Content_Type="application/json")
                assert answer.status == 400, (path, body[:50], answer.read())
    assert [r for r in caplog.records if r.exc_info] == []
