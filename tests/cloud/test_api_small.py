"""What users and operators write beside servers: metadata, tags, aggregates; addresses, the guest's password, extensions."""

import threading
import urllib.parse

import pytest

from kilonova.kit.clock import Ids, iso_us
from kilonova.model.server import Address, Plug
from kilonova.model.states import VM
from kilonova.store import guests, hosts, quotas, servers
from tests.cloud import tables
from tests.cloud.rooms import Rooms
from tests.cloud.tables import changes, disagreements, said

WRITABLE = (VM.active, VM.paused, VM.suspended, VM.stopped)


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    rooms = Rooms(tmp_path_factory.mktemp("small"))
    rooms.token = rooms.admin()
    rooms.member, rooms.reader = (
        rooms.person("maria", "member"),
        rooms.person("rita", "reader", project_name="of-maria"),
    )
    rooms.stranger = rooms.person("sam", "member")
    return rooms


def born(api, **facts):
    """A server of the member's."""
    return api.server(api.member.project_id, user_id=api.member.id, **facts)


def host(api, name):
    """A compute host, as one that reported itself."""
    now = api.clock.now()
    node = {"uuid": api.ids.uuid(), "host": name, "node": name, "host_ip": "", "facts": "{}", "created_at": now}
    with api.db.tx() as tx:
        if not hosts.exists(tx, name):
            tx.execute(hosts.NODES.insert(), node)
    return name


def ok(said, status=200):
    assert said.status == status, (said.status, said.raw)
    return said.json if said.raw else None


def refused(said, status, words=""):
    assert said.status == status, (said.status, said.raw)
    assert words in said.fault[1], said.fault
    return said.fault[1]


# ---- answers, against the specification's tables


def answers():
    """(key, entry, versions) of the groups in this file."""
    if not tables.FOLDER.exists():
        return []
    groups = ("os-aggregates", "server-ips", "server-metadata", "server-tags", "extensions", "os-server-password")
    keys = {e["route"] for g in groups for e in tables.group(g)} - {"POST /os-aggregates/{id}/images"}
    return [pytest.param(k, e, *v, id=f"{k} {e['versions']}") for k, e, v in tables.routes() if k in keys]


@pytest.mark.parametrize(("key", "entry", "first", "last"), answers())
def test_answers_are_those_of_the_specification(api, key, entry, first, last):
    """At every version where something changes: is it there, and is the answer all that it should be, and no more?"""
    plugs = [
        Plug(api.ids.uuid(), api.ids.uuid(), "net", "fa:16:3e:00:00:01", [Address("10.0.0.7"), Address("fd00::7", 6)])
    ]
    method, path = key.split(" ")
    path, _, action = path.partition("#")
    for v in sorted(
        {1, first - 1, *changes(entry.get("response") if entry.get("response") != "none" else {}, first, last)} - {0}
    ):
        server = born(api, plugs=plugs, metadata={"a": "b"}, tags=["a"])
        with api.db.tx() as tx:
            name = api.ids.hex()
            group = hosts.create_aggregate(tx, name, uuid=api.ids.uuid(), now=api.clock.now(), availability_zone="z")
        member = host(api, f"h-{name[:8]}")
        if action == "remove_host":
            api.db.run(hosts.add_host, group.id, member, api.clock.now())
        names = {"server_id": server.id, "id": {"server-ips": "net", "extensions": "OS-DCF"}.get(_group(key), "a")}
        if _group(key) == "os-aggregates":
            names["id"] = str(group.id)
        body = {
            "POST /os-aggregates": {"aggregate": {"name": f"new {name}"}},
            "PUT /os-aggregates/{id}": {"aggregate": {"name": f"changed {name}"}},
            "POST /servers/{server_id}/metadata": {"metadata": {"c": "d"}},
            "PUT /servers/{server_id}/metadata": {"metadata": {"c": "d"}},
            "PUT /servers/{server_id}/metadata/{id}": {"meta": {"a": "d"}},
            "PUT /servers/{server_id}/tags": {"tags": ["x"]},
        }.get(key, {action: {"host": member} if "host" in action else {"metadata": {"k": "v"}}} if action else None)
        answer = api.call(method, path.format(**names), body, api.token, v)
        if not first <= v <= last:
            assert answer.status == 404, f"2.{v}"
        elif entry["response"] == "none":
            assert answer.status < 300 and answer.raw == b"", f"2.{v}: {answer}"
        else:
            assert answer.status < 300, f"2.{v}: {answer}"
            assert disagreements(said(entry, "response", v), answer.json) == [], f"2.{v}"


def _group(key):
    return next(g for g in tables.names() if any(e["route"] == key for e in tables.group(g)))


# ---- metadata


def test_metadata_are_merged_replaced_and_taken_away(api):
    server, token = born(api, metadata={"a": "1"}), api.member.token
    path = f"/servers/{server.id}/metadata"
    assert ok(api.call("POST", path, {"metadata": {"b": "2"}}, token)) == {"metadata": {"a": "1", "b": "2"}}
    assert ok(api.call("PUT", f"{path}/a", {"meta": {"a": "é"}}, token)) == {"meta": {"a": "é"}}
    assert ok(api.call("GET", f"{path}/a", token=token)) == {"meta": {"a": "é"}}
    assert ok(api.call("DELETE", f"{path}/a", token=token), 204) is None
    assert refused(api.call("DELETE", f"{path}/a", token=token), 404) == "Metadata item was not found"
    assert refused(api.call("GET", f"{path}/a", token=token), 404)
    assert ok(api.call("PUT", path, {"metadata": {"z": ""}}, token)) == {"metadata": {"z": ""}}
    assert (
        ok(api.call("GET", path, token=token))
        == {"metadata": {"z": ""}}
        == {"metadata": api.stored(server.id).metadata}
    )


@pytest.mark.parametrize(
    "body",
    [None, {}, [], {"metadata": None}, {"metadata": {"a": 1}}, {"metadata": {"a": None}}, {"metadata": {"": "x"}}, {"metadata": {"a" * 256: "x"}},
     {"metadata": {"a": "x" * 256}}, {"metadata": {"a/b": "x"}}, {"metadata": {}, "more": 1}],
)  # fmt: skip
def test_bad_metadata(api, body):
    server = born(api, metadata={"a": "1"})
    for method in ("POST", "PUT"):
        refused(api.call(method, f"/servers/{server.id}/metadata", body, api.member.token), 400)
    assert api.stored(server.id).metadata == {"a": "1"}


def test_one_item_must_be_the_one_in_the_path(api):
    path, token = f"/servers/{born(api).id}/metadata/a", api.member.token
    assert refused(api.call("PUT", path, {"meta": {"b": "1"}}, token), 400) == "Request body and URI mismatch"
    for meta in ({}, {"a": "1", "b": "2"}):
        refused(api.call("PUT", path, {"meta": meta}, token), 400)


def test_more_items_than_the_quota_are_refused(api):
    server, token = born(api), api.member.token
    path = f"/servers/{server.id}/metadata"
    many = {"metadata": {str(n): "x" for n in range(128)}}
    ok(api.call("POST", path, many, token))
    assert (
        refused(api.call("POST", path, {"metadata": {"one": "more"}}, token), 403)
        == "Maximum number of metadata items exceeds 128"
    )
    ok(api.call("POST", path, {"metadata": {"1": "other"}}, token))
    refused(api.call("PUT", f"{path}/one", {"meta": {"one": "more"}}, token), 403, "metadata items")
    api.db.run(quotas.set_limits, api.member.project_id, {"metadata_items": 2})
    refused(
        api.call("PUT", f"/servers/{born(api).id}/metadata", {"metadata": {"1": "", "2": "", "3": ""}}, token),
        403,
        "exceeds 2",
    )
    ok(api.call("DELETE", f"{path}/1", token=token), 204)
    api.db.run(quotas.forget_limits, api.member.project_id)


@pytest.mark.parametrize("vm", list(VM))
def test_states_in_which_may_be_written(api, vm):
    """states.md, section 3: metadata and tags, whatever is being done to the server."""
    if vm is VM.deleted:
        return
    server, token = born(api, vm_state=vm, task_state="rebooting", metadata={"a": "1"}, tags=["a"]), api.member.token
    path = f"/servers/{server.id}"
    for method, where, body, doing in (
        ("POST", "metadata", {"metadata": {"b": "2"}}, "update metadata"),
        ("DELETE", "metadata/b", None, "delete metadata"),
        ("PUT", "tags", {"tags": ["a", "b"]}, "update tags"),
        ("PUT", "tags/c", None, "update tag"),
        ("DELETE", "tags/c", None, "delete tag"),
        ("DELETE", "tags", None, "delete tags"),
    ):
        answer = api.call(method, f"{path}/{where}", body, token, 26)
        if vm in WRITABLE:
            assert answer.status < 300, (where, answer)
        elif where not in ("metadata/b", "tags/c"):
            assert refused(answer, 409) == f"Cannot '{doing}' instance {server.id} while it is in vm_state {vm}"


def test_locked_and_never_launched(api):
    body, token = {"metadata": {"b": "2"}}, api.member.token
    server = born(api, locked_by="owner")
    assert (
        refused(api.call("POST", f"/servers/{server.id}/metadata", body, token), 409)
        == f"Instance {server.id} is locked"
    )
    ok(api.call("POST", f"/servers/{server.id}/metadata", body, api.token))
    ok(api.call("PUT", f"/servers/{server.id}/tags", {"tags": ["x"]}, token, 26))
    server = born(api)
    with api.db.tx() as tx:
        servers.change(tx, server.id, None, launched_at=None)
    refused(api.call("POST", f"/servers/{server.id}/metadata", body, token), 409, "is in an invalid state for")
    ok(api.call("PUT", f"/servers/{server.id}/tags", {"tags": ["x"]}, token, 26))


def test_writers_at_the_same_time_lose_nothing(api):
    server = born(api)
    write = lambda n: ok(
        api.call("POST", f"/servers/{server.id}/metadata", {"metadata": {str(n): "x"}}, api.member.token)
    )
    threads = [threading.Thread(target=write, args=(n,)) for n in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(api.stored(server.id).metadata) == 12


# ---- tags


def test_tags(api):
    server, token = born(api), api.member.token
    path = f"/servers/{server.id}/tags"
    ask = lambda method, where="", body=None: api.call(method, path + where, body, token, 26)
    assert ok(ask("GET")) == {"tags": []}
    made = ask("PUT", "/blue")
    assert made.status == 201 and made.raw == b""
    assert made.headers["location"] == f"http://cloud.test/compute/v2.1/servers/{server.id}/tags/blue"
    again = ask("PUT", "/blue")
    assert again.status == 204 and "location" not in again.headers
    assert ask("GET", "/blue").status == 204 and ask("GET", "/red").status == 404
    assert ok(ask("PUT", "", {"tags": ["b", "a", "b"]})) == {"tags": ["a", "b"]}
    assert ask("DELETE", "/a").status == 204 and ask("DELETE", "/a").status == 404
    assert ask("DELETE").status == 204 and ok(ask("GET")) == {"tags": []}
    assert api.stored(server.id).updated_at == server.updated_at


def test_bad_tags(api):
    server, token = born(api), api.member.token
    path = f"/servers/{server.id}/tags"
    for body in (
        None,
        {},
        {"tags": "a"},
        {"tags": [""]},
        {"tags": ["a,b"]},
        {"tags": ["a/b"]},
        {"tags": ["x" * 61]},
        {"tags": [1]},
        {"tags": [str(n) for n in range(51)]},
    ):
        refused(api.call("PUT", path, body, token, 26), 400)
    for tag in ("x" * 61, "a,b"):
        refused(api.call("PUT", f"{path}/{tag}", None, token, 26), 400, "Tag")
    refused(api.call("PUT", f"{path}/a", {"tag": "a"}, token, 26), 400)
    ok(api.call("PUT", path, {"tags": [str(n) for n in range(50)]}, token, 26))
    assert api.call("PUT", f"{path}/7", None, token, 26).status == 204
    refused(api.call("PUT", f"{path}/new", None, token, 26), 400, "limit 50")
    assert api.call("GET", path, token=token, version=25).status == 404


# ---- who may


def test_other_projects_and_readers(api):
    server = born(api, metadata={"a": "1"}, tags=["a"])
    path = f"/servers/{server.id}"
    for where in ("metadata", "metadata/a", "ips", "os-server-password"):
        assert api.call("GET", f"{path}/{where}", token=api.reader.token).status == 200
        assert api.call("GET", f"{path}/{where}", token=api.stranger.token).status == 404
        assert api.call("GET", f"{path}/{where}", token=api.token).status == 200
    assert api.call("GET", f"{path}/tags", token=api.reader.token, version=26).status == 200
    assert api.call("GET", f"{path}/tags", token=api.stranger.token, version=26).status == 403
    for method, where, body in (
        ("POST", "metadata", {"metadata": {"x": "y"}}),
        ("PUT", "metadata/x", {"meta": {"x": "y"}}),
        ("DELETE", "metadata/a", None),
        ("PUT", "tags", {"tags": []}),
        ("PUT", "tags/x", None),
        ("DELETE", "tags/a", None),
        ("DELETE", "os-server-password", None),
    ):
        assert api.call(method, f"{path}/{where}", body, api.reader.token, 26).status == 403, where
        assert api.call(method, f"{path}/{where}", body, api.stranger.token, 26).status in (403, 404), where
        assert api.call(method, f"{path}/{where}", body, "", 26).status == 401
    assert (api.stored(server.id).metadata, api.stored(server.id).tags) == ({"a": "1"}, ["a"])
    for method, where in (("GET", ""), ("POST", ""), ("GET", "/1"), ("DELETE", "/1")):
        body = {"aggregate": {"name": "a"}} if method == "POST" else None
        assert api.call(method, f"/os-aggregates{where}", body, api.member.token).status == 403


@pytest.mark.parametrize("where", ["metadata", "metadata/a", "ips", "ips/a", "os-server-password", "tags", "tags/a"])
def test_servers_that_are_not_there(api, where):
    gone = born(api)
    with api.db.tx() as tx:
        servers.change(tx, gone.id, None, deleted_at=1.0)
    for id in (gone.id, Ids().uuid(), "junk", "%00"):
        assert api.call("GET", f"/servers/{id}/{where}", token=api.token, version=26).status == 404


# ---- addresses, the password, extensions


def test_addresses(api):
    plugs = [
        Plug(
            api.ids.uuid(),
            "n1",
            "red",
            "fa:16:3e:00:00:01",
            [Address("10.0.0.7"), Address("172.24.4.9", floating=True)],
        ),
        Plug(api.ids.uuid(), "n2", "blue", "fa:16:3e:00:00:02", [Address("fd00::7", 6)]),
        Plug(api.ids.uuid(), "n1", "red", "fa:16:3e:00:00:03", [Address("10.0.0.8")]),
    ]
    path, token = f"/servers/{born(api, plugs=plugs).id}/ips", api.member.token
    red = [{"version": 4, "addr": a} for a in ("10.0.0.7", "172.24.4.9", "10.0.0.8")]
    assert ok(api.call("GET", path, token=token)) == {
        "addresses": {"red": red, "blue": [{"version": 6, "addr": "fd00::7"}]}
    }
    assert ok(api.call("GET", f"{path}/red", token=token)) == {"red": red}
    assert (
        refused(api.call("GET", f"{path}/green", token=token), 404) == "Instance is not a member of specified network"
    )


def test_the_guests_password(api):
    server, token = born(api), api.member.token
    path = f"/servers/{server.id}/os-server-password"
    assert ok(api.call("GET", path, token=token)) == {"password": ""}
    api.db.run(guests.keep_password, server.id, "x" * 1020)
    assert ok(api.call("GET", path, token=token)) == {"password": "x" * 1020}
    assert api.call("DELETE", path, token=token).status == 204
    assert ok(api.call("GET", path, token=token)) == {"password": ""}


def test_extensions(api):
    every = ok(api.call("GET", "/extensions", token=api.member.token))["extensions"]
    assert len(every) > 90 and [e["alias"] for e in every] == sorted(e["alias"] for e in every)
    names = {e["alias"]: e["name"] for e in every}
    assert (
        names["os-keypairs"] == "Keypairs"
        and names["OS-DCF"] == "DiskConfig"
        and names["os-server-groups"] == "ServerGroups"
    )
    assert ok(api.call("GET", "/extensions/os-keypairs", token=api.member.token))["extension"] in every
    refused(api.call("GET", "/extensions/os-junk", token=api.member.token), 404)


@pytest.mark.parametrize("path", ["/os-agents", "/os-cells/capacities", "/os-fping", "/servers/x/consoles"])
def test_what_was_removed_says_so(api, path):
    refused(api.call("GET", path, token=api.member.token), 410, "no longer available")
    assert api.call("GET", path).status == 401


# ---- usage

DAY = 86_400.0


@pytest.fixture
def used(api):
    """A project with a server that ran from the first to the third of four days, and one that runs since the second."""
    project, at = api.ids.hex(), api.clock.now()
    one, two, _ = (api.server(project, name=n) for n in ("one", "two", "never"))
    with api.db.tx() as tx:
        servers.change(tx, one.id, None, launched_at=at - 4 * DAY, terminated_at=at - 2 * DAY, deleted_at=at - 2 * DAY)
        servers.change(tx, two.id, None, launched_at=at - 3 * DAY)
        tx.execute(servers.T.update().where(servers.T.c.name == "never").values(launched_at=None))
    return project, one, two


def asked(api, used, path, *, version=39, **query):
    return api.call(
        "GET", f"/os-simple-tenant-usage{path}?{urllib.parse.urlencode(query)}", token=api.token, version=version
    )


def test_usage_of_a_project(api, used):
    project, one, two = used
    at = api.clock.now()
    shown = ok(asked(api, used, f"/{project}", start=iso_us(at - 5 * DAY), end=iso_us(at)))["tenant_usage"]
    assert shown["total_hours"] == pytest.approx(5 * 24) and shown["total_vcpus_usage"] == pytest.approx(5 * 24)
    assert shown["total_memory_mb_usage"] == pytest.approx(512 * 5 * 24)
    rows = {r["instance_id"]: r for r in shown["server_usages"]}
    assert {id: (r["state"], r["hours"], r["uptime"]) for id, r in rows.items()} == {
        one.id: ("terminated", pytest.approx(48), 2 * DAY),
        two.id: ("active", pytest.approx(72), 3 * DAY),
    }
    only = ok(asked(api, used, f"/{project}", start=iso_us(at - DAY), end=iso_us(at)))["tenant_usage"]
    assert only["total_hours"] == pytest.approx(24) and [r["instance_id"] for r in only["server_usages"]] == [two.id]
    assert ok(asked(api, used, f"/{project}", start="2020-01-01T00:00:00", end="2020-01-02")) == {"tenant_usage": {}}


def test_usage_of_all_projects(api, used):
    project, at = used[0], api.clock.now()
    span = {"start": iso_us(at - 5 * DAY), "end": iso_us(at)}
    rows = {r["tenant_id"]: r for r in ok(asked(api, used, "", **span))["tenant_usages"]}
    assert rows[project]["total_hours"] == pytest.approx(5 * 24) and "server_usages" not in rows[project]
    rows = {r["tenant_id"]: r for r in ok(asked(api, used, "", detailed=1, **span))["tenant_usages"]}
    assert len(rows[project]["server_usages"]) == 2


def test_pages_of_usage(api, used):
    project, one, two = used
    span = {"start": iso_us(api.clock.now() - 5 * DAY), "end": iso_us(api.clock.now())}
    first = ok(asked(api, used, f"/{project}", version=40, limit=1, **span))
    (link,) = first["tenant_usage_links"]
    path = link["href"].split("/v2.1")[1]
    second = ok(api.call("GET", path, token=api.token, version=40))
    found = [r["instance_id"] for page in (first, second) for r in page["tenant_usage"]["server_usages"]]
    assert found == sorted([one.id, two.id])
    last = ok(api.call("GET", second["tenant_usage_links"][0]["href"].split("/v2.1")[1], token=api.token, version=40))
    assert last == {"tenant_usage": {}}
    refused(asked(api, used, f"/{project}", version=40, marker="nobody", **span), 400, "marker [nobody] not found")


@pytest.mark.parametrize(
    "query",
    [
        {"start": "junk"},
        {"end": "junk"},
        {"start": "2026-01-02", "end": "2026-01-01"},
        {"start": "99999-01-01"},
        {"start": ""},
    ],
)
def test_bad_spans(api, used, query):
    for path in ("", f"/{used[0]}"):
        refused(asked(api, used, path, **query), 400)


def test_who_may_see_usage(api, used):
    path = "/os-simple-tenant-usage"
    assert api.call("GET", f"{path}/{api.member.project_id}", token=api.member.token).status == 200
    assert api.call("GET", f"{path}/{used[0]}", token=api.member.token).status == 403
    assert api.call("GET", path, token=api.member.token).status == 403


# ---- aggregates


@pytest.fixture
def group(api):
    return ok(
        api.call(
            "POST", "/os-aggregates", {"aggregate": {"name": api.ids.hex(), "availability_zone": None}}, api.token, 41
        )
    )["aggregate"]


def act(api, group, action, body, version=41):
    return api.call("POST", f"/os-aggregates/{group['id']}/action", {action: body}, api.token, version)


def test_an_aggregate_from_birth_to_end(api, group):
    path, name = f"/os-aggregates/{group['id']}", host(api, "agg-1")
    assert ok(act(api, group, "add_host", {"host": name}))["aggregate"]["hosts"] == [name]
    assert refused(act(api, group, "add_host", {"host": name}), 409)
    shown = ok(act(api, group, "set_metadata", {"metadata": {"ssd": "true", "availability_zone": "east"}}))["aggregate"]
    assert (shown["metadata"], shown["availability_zone"]) == ({"ssd": "true", "availability_zone": "east"}, "east")
    assert ok(act(api, group, "set_metadata", {"metadata": {"ssd": None}}))["aggregate"]["metadata"] == {
        "availability_zone": "east"
    }
    shown = ok(
        api.call("PUT", path, {"aggregate": {"name": f"  {group['name']}-2 ", "availability_zone": None}}, api.token)
    )["aggregate"]
    assert (shown["name"], shown["availability_zone"], shown["metadata"]) == (f"{group['name']}-2", None, {})
    assert refused(api.call("DELETE", path, token=api.token), 400)
    assert ok(act(api, group, "remove_host", {"host": name}))["aggregate"]["hosts"] == []
    assert refused(act(api, group, "remove_host", {"host": name}), 404)
    answer = api.call("DELETE", path, token=api.token)
    assert (answer.status, answer.raw) == (200, b"")
    assert refused(api.call("GET", path, token=api.token), 404)


def test_bad_aggregates(api, group):
    for body in (
        {},
        {"name": ""},
        {"name": " a"},
        {"name": "a" * 256},
        {"name": "a\x00"},
        {"name": "a", "availability_zone": "a:b"},
        {"name": "a", "availability_zone": ""},
        {"name": "a", "hosts": []},
    ):
        refused(api.call("POST", "/os-aggregates", {"aggregate": body}, api.token), 400)
    refused(api.call("POST", "/os-aggregates", {"aggregate": {"name": group["name"]}}, api.token), 409)
    for body in ({}, {"name": " "}, {"availability_zone": "a:b"}, {"uuid": "x"}):
        refused(api.call("PUT", f"/os-aggregates/{group['id']}", {"aggregate": body}, api.token), 400)
    for id, status in (
        ("x", 400),
        ("1.5", 400),
        (group["uuid"], 400),
        ("-1", 404),
        ("99999999999999999999999", 404),
        ("0", 404),
    ):
        assert api.call("GET", f"/os-aggregates/{id}", token=api.token).status == status, id
    refused(
        act(api, group, "set_metadata", {"metadata": {"availability_zone": ""}}), 400, "empty named availability zone"
    )
    refused(act(api, group, "set_metadata", {"metadata": {"a": 1}}), 400)
    refused(act(api, group, "add_host", {"host": "nowhere"}), 404, "could not be found")
    refused(act(api, group, "remove_host", {"host": "nowhere"}), 404)
    refused(act(api, {"id": 999}, "add_host", {"host": host(api, "agg-1")}), 404)


def test_a_host_is_in_one_zone(api, group):
    name = host(api, "agg-2")
    other = ok(
        api.call(
            "POST", "/os-aggregates", {"aggregate": {"name": api.ids.hex(), "availability_zone": "west"}}, api.token
        )
    )["aggregate"]
    ok(act(api, other, "add_host", {"host": name}))
    ok(act(api, group, "add_host", {"host": name}))
    refused(
        act(api, group, "set_metadata", {"metadata": {"availability_zone": "east"}}),
        400,
        "already in availability zone",
    )
    refused(
        api.call("PUT", f"/os-aggregates/{group['id']}", {"aggregate": {"availability_zone": "east"}}, api.token), 400
    )
    third = ok(
        api.call(
            "POST", "/os-aggregates", {"aggregate": {"name": api.ids.hex(), "availability_zone": "north"}}, api.token
        )
    )["aggregate"]
    refused(act(api, third, "add_host", {"host": name}), 409)
    assert (
        ok(api.call("GET", f"/os-aggregates/{group['id']}", token=api.token))["aggregate"]["availability_zone"] is None
    )


def test_servers_are_not_moved_to_another_zone(api, group):
    name = host(api, "agg-3")
    born(api, host=name)
    zoned = ok(
        api.call(
            "POST", "/os-aggregates", {"aggregate": {"name": api.ids.hex(), "availability_zone": "south"}}, api.token
        )
    )["aggregate"]
    refused(act(api, zoned, "add_host", {"host": name}), 409, "contain instances")
    ok(act(api, group, "add_host", {"host": name}))
    refused(act(api, group, "set_metadata", {"metadata": {"availability_zone": "south"}}), 400, "contain instances")
    refused(
        api.call("PUT", f"/os-aggregates/{group['id']}", {"aggregate": {"availability_zone": "south"}}, api.token), 400
    )
    ok(act(api, group, "set_metadata", {"metadata": {"availability_zone": "nova", "a": "b"}}))
    refused(act(api, group, "set_metadata", {"metadata": {"availability_zone": "south"}}), 400)
    ok(act(api, group, "remove_host", {"host": name}))
    assert ok(api.call("GET", f"/os-aggregates/{zoned['id']}", token=api.token))["aggregate"]["hosts"] == []


def test_the_list(api, group):
    rows = ok(api.call("GET", "/os-aggregates", token=api.token, version=41))["aggregates"]
    assert [r["id"] for r in rows] == sorted(r["id"] for r in rows) and group["uuid"] in {r["uuid"] for r in rows}
    assert "uuid" not in ok(api.call("GET", "/os-aggregates", token=api.token, version=40))["aggregates"][0]
