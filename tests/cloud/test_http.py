"""Every way a request can be wrong, through the real server, in the Compute API's own words."""

import http.client
import json
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import pytest

from kilonova.kit.clock import Ids
from kilonova.kit.errors import Conflict, NotFound, Unknown
from kilonova.kit.http import Dialect, Server, Service, Versioned, compute_fault, listen
from kilonova.kit.policy import Policy, Rule
from kilonova.kit.routes import Call, Context, Reply, Routes
from kilonova.kit.versions import UNSET, UnsetType, since

R = Routes("compute", strict="2.102")


class Wish(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    admin_pass: str | UnsetType = msgspec.field(default=UNSET, name="adminPass")
    description: Annotated[str | None, since("2.19")] = None


class Body(msgspec.Struct, forbid_unknown_fields=True):
    server: Wish


class Query(msgspec.Struct):
    limit: int | None = None
    many: list[str] = []


@R.get("/v2.1/servers/{id}", policy="show")
def show(call: Call, id: str) -> dict[str, Any]:
    if id == "absent":
        raise NotFound(f"Instance {id} could not be found.", why="a secret reason")
    if id == "bug":
        raise RuntimeError("with a secret inside")
    return {"server": {"id": id, "url": call.url + call.project_in_url}}


@R.get("/v2.1/servers", policy="show", query=Query)
def index(call: Call) -> dict[str, Any]:
    return {"limit": call.query.limit, "many": call.query.many}


@R.post("/v2.1/servers", policy="make", body=Body, ok=202)
def create(call: Call) -> Reply:
    return Reply({"server": {"name": call.body.server.name}}, headers={"Location": "there"})


@R.post("/v2.1/servers/{id}/action", action="os-stop", ok=202, body=Any, policy="make")
def stop(call: Call, id: str) -> None:
    raise Conflict(f"Cannot 'stop' instance {id} while it is in vm_state stopped")


@R.post("/v2.1/servers/{id}/action", action="lock", versions="2.9-", ok=202, body=Any, policy="make")
def lock(call: Call, id: str) -> None: ...


@R.get("/v2.1/unchecked", policy="show", late=True)
def unchecked(call: Call) -> dict[str, Any]:
    return {}


@R.get("/v2.1/gone", gone=True, policy="show")
def gone(call: Call) -> None: ...


@R.get("/", open=True)
def root(call: Call) -> dict[str, Any]:
    return {"open": True}


PEOPLE = {
    "reader": Context(user_id="r", project_id="abc", roles=frozenset({"reader"})),
    "member": Context(user_id="m", project_id="abc", roles=frozenset({"reader", "member"})),
}


def authenticate(token: str) -> Context:
    if token not in PEOPLE:
        raise Unknown("The request you have made requires authentication.")
    return PEOPLE[token]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    rules = [
        Rule("show", "role:reader"),
        Rule("make", "role:member and project_id:%(project_id)s"),
        Rule("context_is_admin", "role:admin"),
    ]
    kinds = ("application/json", "application/vnd.openstack.compute+json")
    dialect = Dialect(compute_fault, no_method=404, plain_unknown=True, strip_project=("/v2.1",), media_types=kinds)
    versions = Versioned("compute", 104, old_header="X-OpenStack-Nova-API-Version")
    service = Service(
        R, dialect, world=None, authenticate=authenticate, policy=Policy(rules), ids=Ids(), versions=versions
    )
    listener = listen("127.0.0.1", 0)
    server = Server(service, listener, threads=2)
    server.start()
    yield listener.getsockname()[1]
    server.stop()


class Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def fault(self) -> tuple[str, str]:
        name, inner = next(iter(self.body.items()))
        assert inner["code"] == self.status
        return name, inner["message"]


@pytest.fixture
def ask(port: int) -> Any:
    def send(method: str, path: str, body: Any = None, token: str | None = "member", **headers: str) -> Answer:
        c = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        given = {k.replace("_", "-"): v for k, v in headers.items()} | ({"X-Auth-Token": token} if token else {})
        c.request(method, path, body if isinstance(body, str | bytes | None) else json.dumps(body), given)
        r = c.getresponse()
        raw = r.read()
        kind = r.getheader("content-type", "")
        c.close()
        return Answer(
            r.status,
            {k.lower(): v for k, v in r.getheaders()},
            json.loads(raw) if raw and "json" in kind else raw.decode(),
        )

    return send


def test_version_is_negotiated_and_told(ask: Any) -> None:
    a = ask("GET", "/v2.1/servers/x", OpenStack_API_Version="compute 2.9")
    assert a.headers["openstack-api-version"] == "compute 2.9"
    assert a.headers["x-openstack-nova-api-version"] == "2.9"
    assert "X-OpenStack-Nova-API-Version" in a.headers["vary"]
    assert a.headers["x-openstack-request-id"].startswith("req-")
    assert ask("GET", "/v2.1/servers/x").headers["openstack-api-version"] == "compute 2.1"
    assert (
        ask("GET", "/v2.1/servers/x", X_OpenStack_Nova_API_Version="latest").headers["openstack-api-version"]
        == "compute 2.104"
    )
    assert (
        ask("GET", "/v2.1/servers/x", OpenStack_API_Version="volume 3.1, compute 2.7").headers["openstack-api-version"]
        == "compute 2.7"
    )


@pytest.mark.parametrize("said", ["compute 2.105", "compute 3.1", "compute 2.0", "compute 1.1"])
def test_versions_out_of_range(ask: Any, said: str) -> None:
    a = ask("GET", "/v2.1/servers/x", OpenStack_API_Version=said)
    assert a.status == 406
    assert a.fault[0] == "computeFault"
    assert a.headers["openstack-api-version"] == said


@pytest.mark.parametrize("said", ["compute 2", "compute two", "compute 2.01", "compute 2.1.3", "compute -2.1"])
def test_versions_that_cannot_be_read(ask: Any, said: str) -> None:
    a = ask("GET", "/v2.1/servers/x", OpenStack_API_Version=said)
    assert a.status == 400
    assert "invalid format" in a.fault[1]
    assert "openstack-api-version" not in a.headers


def test_who_asks(ask: Any) -> None:
    a = ask("GET", "/v2.1/servers/x", token=None)
    assert a.status == 401
    assert a.headers["www-authenticate"].startswith("Keystone uri=")
    assert ask("GET", "/v2.1/servers/x", token="wrong").status == 401
    assert ask("GET", "/", token=None).body == {"open": True}
    a = ask("POST", "/v2.1/servers", {"server": {"name": "a"}}, token="reader")
    assert (a.status, a.fault) == (403, ("forbidden", "Policy doesn't allow make to be performed."))


def test_the_project_in_the_path(ask: Any) -> None:
    assert ask("GET", "/v2.1/abc/servers/x").body["server"]["url"].endswith("/abc")
    a = ask("GET", "/v2.1/abd/servers/x")
    assert (a.status, a.fault[1]) == (
        400,
        "Malformed request URL: URL's project_id 'abd' doesn't match Context's project_id 'abc'",
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "Malformed request body"),
        ("[" * 100_000, "Malformed request body"),
        (b"\xff\xfe", "Malformed request body"),
        ({"server": {"name": ""}}, "Invalid input for field/attribute name. Value: . "),
        ({"server": {"name": 1}}, "Invalid input for field/attribute name. Value: 1. "),
        ({"server": {"nme": "a"}}, "Additional properties are not allowed ('nme' was unexpected)"),
        ({"server": {}}, "Invalid input for field/attribute server. Value: {}. 'name' is a required property"),
        ({"servers": {}}, "Additional properties are not allowed ('servers' was unexpected)"),
        ({}, "'server' is a required property"),
        ("", "Expected"),
        ([], "Expected"),
        ({"server": {"name": "a", "description": "later"}}, "'description' was unexpected"),
        ({"server": {"name": "a", "adminPass": 123456}}, "Value: ***"),
        ({"server": {"a\u0007b": 1, "name": "x"}}, "('a?b' was unexpected)"),
    ],
)
def test_bad_bodies(ask: Any, body: Any, said: str) -> None:
    a = ask("POST", "/v2.1/servers", body, Content_Type="application/json")
    assert a.status == 400
    assert a.fault[0] == "badRequest"
    assert said in a.fault[1]


def test_bodies_that_are_too_long_or_of_another_kind(ask: Any) -> None:
    a = ask("POST", "/v2.1/servers", json.dumps({"server": {"name": "a" * 200_000}}))
    assert a.status == 413
    assert ask("POST", "/v2.1/servers", "<server/>", Content_Type="application/xml").status == 415
    assert ask("POST", "/v2.1/servers", {"server": {"name": "a"}}, Content_Type="text/plain").status == 202
    assert (
        ask(
            "POST", "/v2.1/servers", {"server": {"name": "a"}}, Content_Type="application/vnd.openstack.compute+json"
        ).status
        == 202
    )


def test_actions(ask: Any) -> None:
    a = ask("POST", "/v2.1/servers/x/action", {"os-stop": None})
    assert (a.status, a.fault[0]) == (409, "conflictingRequest")
    assert ask("POST", "/v2.1/servers/x/action", {"os-jump": None}).fault[1] == "There is no such action: os-jump"
    assert ask("POST", "/v2.1/servers/x/action", {"lock": None}).status == 404
    assert ask("POST", "/v2.1/servers/x/action", {"lock": None}, OpenStack_API_Version="compute 2.9").status == 202
    for junk in ({}, {"lock": None, "os-stop": None}, [], "x", None, 7):
        assert ask("POST", "/v2.1/servers/x/action", json.dumps(junk)).fault == ("badRequest", "Malformed request body")


def test_paths_and_methods_that_are_not(ask: Any) -> None:
    assert ask("GET", "/v2.1/nowhere").status == 404
    assert ask("DELETE", "/v2.1/servers/x").status == 404, "the Compute API says 404 where others say 405"
    assert ask("PATCH", "/v2.1/servers").status == 404
    a = ask("GET", "/v2.1/gone")
    assert (a.status, a.fault) == (
        410,
        ("computeFault", "This resource is no longer available. No forwarding address is given."),
    )


def test_queries(ask: Any) -> None:
    assert ask("GET", "/v2.1/servers?limit=3&many=a&many=b&other=1").body == {"limit": 3, "many": ["a", "b"]}
    assert (
        ask("GET", "/v2.1/servers?limit=x").fault[1].startswith("Invalid input for query parameters limit. Value: x. ")
    )
    assert ask("GET", "/v2.1/servers?limit=1&limit=2").status == 400
    assert ask("GET", "/v2.1/servers?%ff=1").fault[1] == "Query string is not UTF-8 encoded"
    a = ask("GET", "/v2.1/servers?other=1", OpenStack_API_Version="compute 2.102")
    assert (a.status, a.fault[1]) == (400, "Additional properties are not allowed ('other' was unexpected)")
    assert ask("GET", "/v2.1/servers/x?other=1", OpenStack_API_Version="compute 2.102").status == 400
    assert ask("GET", "/v2.1/servers/x?other=1", OpenStack_API_Version="compute 2.101").status == 200


def test_what_only_the_log_may_know(ask: Any) -> None:
    a = ask("GET", "/v2.1/servers/absent")
    assert a.fault == ("itemNotFound", "Instance absent could not be found.")
    a = ask("GET", "/v2.1/servers/bug")
    assert a.status == 500
    assert "secret" not in json.dumps(a.body)


def test_a_handler_that_forgot_its_policy_answers_nobody(ask: Any) -> None:
    assert ask("GET", "/v2.1/unchecked").status == 500
