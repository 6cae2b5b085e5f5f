"""Who may come in, and what becomes of it: the Identity API as its clients use it."""

import stat
import time
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from kilonova.clients import Account, Identity, Login, RemoteIdentity, Session
from kilonova.companions import identity as companion
from kilonova.kit.clock import WallClock
from kilonova.kit.errors import Unavailable, Unknown
from kilonova.model import options
from kilonova.store.identity import CREDENTIALS
from tests.cloud.embedded import ADMIN, Embedded, driven_with_junk, project

V3 = "/identity/v3"


@pytest.fixture
def cloud(tmp_path):
    return Embedded(tmp_path)


# ---- coming in


def test_discovery_is_what_keystoneauth_looks_for(cloud):
    root = cloud.ask("GET", "/identity/")
    assert root.status == 300
    links = [v["links"][0]["href"] for v in msgspec.json.decode(root.read())["versions"]["values"]]
    assert links == ["http://cloud.test/identity/v3/"]
    assert cloud.json("GET", "/identity/v3/")["version"]["id"].startswith("v3.")


def test_a_password_gives_a_token_with_roles_and_a_catalog_at_the_address_that_was_called(cloud):
    body = {"auth": {"identity": {"methods": ["password"], "password": {"user": {
        "name": "admin", "domain": {"id": "default"}, "password": ADMIN}}}, "scope": project("admin")}}  # fmt: skip
    answer = cloud.ask("POST", f"{V3}/auth/tokens", body)
    assert answer.status == 201 and len(answer.headers["x-subject-token"]) <= 255
    token = msgspec.json.decode(answer.read())["token"]
    assert [r["name"] for r in token["roles"]] == ["admin", "manager", "member", "reader"]
    assert token["project"]["id"] == cloud.first.admin_project_id
    assert token["methods"] == ["password"] and token["issued_at"].endswith("Z")
    urls = {s["type"]: s["endpoints"][0]["url"] for s in token["catalog"]}
    assert urls["compute"] == "http://cloud.test/compute/v2.1" and urls["image"] == "http://cloud.test/image"
    assert urls["block-storage"] == urls["volumev3"] == "http://cloud.test/volume/v3"
    assert "catalog" not in cloud.json("POST", f"{V3}/auth/tokens?nocatalog", body, ok=201)["token"]


@pytest.mark.parametrize(
    ("scope", "key"),
    [
        (None, None),
        ("unscoped", None),
        ({"system": {"all": True}}, "system"),
        ({"project": {"name": "demo", "domain": {"id": "default"}}}, "project"),
    ],
)
def test_scopes(cloud, scope, key):
    who = {"name": "admin", "domain": {"id": "default"}, "password": ADMIN}
    auth = {"identity": {"methods": ["password"], "password": {"user": who}}}
    token = cloud.json("POST", f"{V3}/auth/tokens", {"auth": auth | ({"scope": scope} if scope else {})}, ok=201)
    assert {"system", "project", "domain"} & token["token"].keys() == ({key} if key else set())
    assert ("roles" in token["token"]) == bool(key)


def test_every_way_to_be_refused_says_the_same(cloud):
    cloud.person("joe", "member")
    said = set()
    for user, password, scope in [
        ("joe", "wrong", "of-joe"),
        ("nobody", "x", "of-joe"),
        ("joe", "joe's", "admin"),
        ("joe", "joe's", "no-such-project"),
        ("joe", "joe's", {"system": {"all": True}}),
        ("joe", "joe's", {"domain": {"id": "default"}}),
    ]:
        body = {"auth": {"identity": {"methods": ["password"], "password": {"user": {
            "name": user, "domain": {"id": "default"}, "password": password}}},
            "scope": project(scope) if isinstance(scope, str) else scope}}  # fmt: skip
        said.add(cloud.refused(401, "POST", f"{V3}/auth/tokens", body))
    assert len(said) == 1
    assert msgspec.json.decode(said.pop())["error"]["title"] == "Unauthorized"


def test_nobody_learns_from_the_time_it_takes_who_exists(tmp_path):
    cloud = Embedded(tmp_path, identity_options=options.Identity(password_hash_cost=14, lockout_failures=0))

    def spent(user: str) -> float:
        began = time.thread_time()
        cloud.log_in(user, "wrong", ok=401)
        return time.thread_time() - began

    known, unknown = (min(spent(u) for _ in range(5)) for u in ("admin", "nobody"))
    assert 0.5 < known / unknown < 2


@pytest.mark.parametrize("user", ["admin", "nobody"])
def test_a_pause_tells_nobody_who_exists(cloud, user):
    """Somebody has one count, however he is named; were it another for nobody, a quick refusal would tell."""
    domains = [{"id": "default"}, {"name": "Default"}]
    for n in range(options.Identity().lockout_failures):
        who = {"name": user, "domain": domains[n % 2], "password": "guess"}
        body = {"auth": {"identity": {"methods": ["password"], "password": {"user": who}}}}
        cloud.refused(401, "POST", f"{V3}/auth/tokens", body)
    ((who, _),) = cloud.realm.door.guesses.failed.items()
    assert cloud.realm.door.guesses.locked(who)


def test_guessing_is_made_slow(cloud):
    for _ in range(options.Identity().lockout_failures):
        cloud.log_in("admin", "guess", ok=401)
    cloud.log_in("admin", ADMIN, ok=401)
    cloud.clock.at += 16
    assert cloud.log_in("admin", ADMIN, "admin")


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        [],
        {"auth": None},
        {"auth": {"identity": {}}},
        {"auth": {"identity": {"methods": []}}},
        {"auth": {"identity": {"methods": ["password"]}}},
        {"auth": {"identity": {"methods": ["password"], "password": {"user": {"name": "admin", "password": "x"}}}}},
        {"auth": {"identity": {"methods": ["password"], "password": {"user": {"id": 7, "password": "x"}}}}},
        {"auth": {"identity": {"methods": "password"}}},
        {"auth": {"identity": {"methods": ["token"], "token": {"id": {}}}}},
    ],
)
def test_junk_is_told_so(cloud, body):
    cloud.refused(400, "POST", f"{V3}/auth/tokens", body)


def test_junk_tokens_are_refused(cloud):
    for token in ["x", "gAAAA", "é", "A" * 4000, "gAAAAABrAD3T" + "B" * 200]:
        cloud.refused(401, "GET", f"{V3}/users", token=token)
    cloud.refused(401, "GET", f"{V3}/users")
    cloud.refused(404, "GET", f"{V3}/auth/tokens", token=cloud.admin(), X_Subject_Token="junk")


# ---- what a token is good for, and for how long


def test_a_token_ends(cloud):
    token = cloud.admin()
    assert cloud.realm.gate(token).project_id == cloud.first.admin_project_id
    cloud.clock.at += 3601
    with pytest.raises(Unknown):
        cloud.realm.gate(token)


def test_a_token_made_from_another_ends_with_it(cloud):
    first = cloud.log_in("admin", ADMIN)
    cloud.clock.at += 1800
    auth = {"identity": {"methods": ["token"], "token": {"id": first}}, "scope": project("demo")}
    token = cloud.json("POST", f"{V3}/auth/tokens", {"auth": auth}, ok=201)["token"]
    seen = cloud.json("GET", f"{V3}/auth/tokens", token=first, X_Subject_Token=first)["token"]
    assert token["expires_at"] == seen["expires_at"]
    assert token["audit_ids"][1] == seen["audit_ids"][0]
    assert set(token["methods"]) == {"password", "token"}


@pytest.mark.parametrize("how", ["user disabled", "project disabled", "role taken", "password", "deleted", "revoked"])
def test_what_is_taken_away_is_gone_at_once(cloud, how):
    joe, admin = cloud.person("joe", "member"), cloud.admin()
    assert cloud.realm.gate(joe.token).roles == {"member", "reader"}
    roles = {r["name"]: r["id"] for r in cloud.json("GET", f"{V3}/roles", token=admin)["roles"]}
    if how == "user disabled":
        cloud.json("PATCH", f"{V3}/users/{joe.id}", {"user": {"enabled": False}}, admin)
    elif how == "project disabled":
        cloud.json("PATCH", f"{V3}/projects/{joe.project_id}", {"project": {"enabled": False}}, admin)
    elif how == "role taken":
        path = f"{V3}/projects/{joe.project_id}/users/{joe.id}/roles/{roles['member']}"
        cloud.json("DELETE", path, token=admin, ok=204)
    elif how == "password":
        cloud.json("PATCH", f"{V3}/users/{joe.id}", {"user": {"password": "another"}}, admin)
    elif how == "deleted":
        cloud.json("DELETE", f"{V3}/users/{joe.id}", token=admin, ok=204)
    else:
        cloud.json("DELETE", f"{V3}/auth/tokens", token=joe.token, ok=204, X_Subject_Token=joe.token)
    cloud.refused(401, "GET", f"{V3}/auth/projects", token=joe.token)
    if how == "user disabled":  # and stays so
        cloud.clock.at += 1
        cloud.json("PATCH", f"{V3}/users/{joe.id}", {"user": {"enabled": True}}, admin)
        cloud.refused(401, "GET", f"{V3}/auth/projects", token=joe.token)


def test_another_process_hears_of_it_within_seconds(cloud):
    joe, admin = cloud.person("joe", "member"), cloud.admin()
    other = companion.open_realm(cloud.db, cloud.clock, cloud.realm.door.ids, cloud.identity_options, cloud.directory)
    assert other.gate(joe.token).user_id == joe.id
    cloud.json("DELETE", f"{V3}/projects/{joe.project_id}", token=admin, ok=204)
    cloud.clock.at += 6
    with pytest.raises(Unknown):
        other.gate(joe.token)


def test_a_known_token_costs_microseconds_and_no_statement(cloud):
    token = cloud.admin()
    gate = cloud.realm.gate
    gate(token)
    before = cloud.db.statements
    best = min(_timed(lambda: [gate(token) for _ in range(1000)]) for _ in range(5)) / 1000
    assert cloud.db.statements == before
    assert best < 20e-6  # 2 µs on an idle machine
    assert len(gate.young) < 10


def test_the_memory_of_tokens_is_bounded(cloud):
    gate = cloud.realm.gate
    gate.most = 10
    tokens = [cloud.log_in("admin", ADMIN, "admin") for _ in range(40)]
    for t in tokens:
        gate(t)
    assert len(gate.young) + len(gate.old) <= 20


def _timed(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# ---- users, projects, roles


def test_an_admin_makes_people_and_places(cloud):
    admin = cloud.admin()
    made = {"name": "jane", "password": "x", "email": "jane@example.org", "description": "of the night"}
    jane = cloud.json("POST", f"{V3}/users", {"user": made}, admin, ok=201)["user"]
    assert jane["email"] == "jane@example.org" and "password" not in jane and jane["enabled"] is True
    cloud.refused(409, "POST", f"{V3}/users", {"user": made}, admin)
    assert [u["id"] for u in cloud.json("GET", f"{V3}/users?name=jane", token=admin)["users"]] == [jane["id"]]
    changed = {"user": {"name": "janet", "email": None}}
    assert "email" not in cloud.json("PATCH", f"{V3}/users/{jane['id']}", changed, admin)["user"]
    place = {"project": {"name": "lab", "tags": ["b", "a"], "colour": "red"}}
    lab = cloud.json("POST", f"{V3}/projects", place, admin, ok=201)["project"]
    assert lab["tags"] == ["a", "b"] and lab["colour"] == "red" and lab["parent_id"] == lab["domain_id"] == "default"
    assert cloud.json("GET", f"{V3}/projects?enabled=0", token=admin)["projects"] == []
    cloud.json("DELETE", f"{V3}/projects/{lab['id']}", token=admin, ok=204)
    cloud.refused(404, "GET", f"{V3}/projects/{lab['id']}", token=admin)


def test_a_user_changes_his_own_password_with_the_old_one(cloud):
    joe = cloud.person("joe", "member")
    path = f"{V3}/users/{joe.id}/password"
    cloud.refused(401, "POST", path, {"user": {"original_password": "no", "password": "new"}})
    cloud.json("POST", path, {"user": {"original_password": "joe's", "password": "new"}}, ok=204)
    cloud.clock.at += 1
    cloud.log_in("joe", "joe's", ok=401)
    assert cloud.log_in("joe", "new", "of-joe")
    cloud.refused(401, "GET", f"{V3}/auth/projects", token=joe.token)


def test_groups_give_their_roles_to_who_is_in_them(cloud):
    joe, admin = cloud.person("joe"), cloud.admin()
    group = cloud.json("POST", f"{V3}/groups", {"group": {"name": "night shift"}}, admin, ok=201)["group"]
    role = cloud.json("GET", f"{V3}/roles?name=reader", token=admin)["roles"][0]
    grant = f"{V3}/projects/{joe.project_id}/groups/{group['id']}/roles/{role['id']}"
    cloud.json("PUT", grant, token=admin, ok=204)
    cloud.log_in("joe", "joe's", "of-joe", ok=401)
    cloud.json("PUT", f"{V3}/groups/{group['id']}/users/{joe.id}", token=admin, ok=204)
    token = cloud.log_in("joe", "joe's", "of-joe")
    assert cloud.realm.gate(token).roles == {"reader"}
    assert cloud.ask("HEAD", grant, token=admin).status == 204
    found = cloud.json("GET", f"{V3}/role_assignments?effective&user.id={joe.id}&include_names", token=admin)
    assert [(a["role"]["name"], a["scope"]["project"]["name"]) for a in found["role_assignments"]] == [
        ("reader", "of-joe")
    ]
    cloud.json("DELETE", f"{V3}/groups/{group['id']}/users/{joe.id}", token=admin, ok=204)
    cloud.refused(401, "GET", f"{V3}/auth/projects", token=token)


def test_roles_imply_others(cloud):
    admin = cloud.admin()
    rules = cloud.json("GET", f"{V3}/role_inferences", token=admin)["role_inferences"]
    pairs = {(r["prior_role"]["name"], i["name"]) for r in rules for i in r["implies"]}
    assert pairs == {("admin", "manager"), ("manager", "member"), ("member", "reader")}


def test_a_domain_has_its_own_people_and_its_own_admin(cloud):
    admin = cloud.admin()
    domain = cloud.json("POST", f"{V3}/domains", {"domain": {"name": "acme"}}, admin, ok=201)["domain"]
    boss = {"name": "boss", "domain_id": domain["id"], "password": "x"}
    boss = cloud.json("POST", f"{V3}/users", {"user": boss}, admin, ok=201)["user"]
    manager = cloud.json("GET", f"{V3}/roles?name=manager", token=admin)["roles"][0]["id"]
    cloud.json("PUT", f"{V3}/domains/{domain['id']}/users/{boss['id']}/roles/{manager}", token=admin, ok=204)
    token = cloud.log_in("boss", "x", {"domain": {"id": domain["id"]}}, domain="acme")
    mine = cloud.json("POST", f"{V3}/projects", {"project": {"name": "rockets"}}, token, ok=201)["project"]
    assert mine["domain_id"] == domain["id"]
    assert [p["name"] for p in cloud.json("GET", f"{V3}/projects", token=token)["projects"]] == ["rockets"]
    roles = {r["name"]: r["id"] for r in cloud.json("GET", f"{V3}/roles", token=token)["roles"]}
    grant = f"{V3}/projects/{mine['id']}/users/{boss['id']}/roles"
    cloud.json("PUT", f"{grant}/{roles['member']}", token=token, ok=204)
    cloud.refused(403, "PUT", f"{grant}/{roles['admin']}", token=token)
    other = f"{V3}/projects/{cloud.first.demo_project_id}/users/{boss['id']}/roles/{roles['member']}"
    cloud.refused(403, "PUT", other, token=token)
    cloud.refused(403, "PUT", f"{V3}/system/users/{boss['id']}/roles/{roles['member']}", token=token)
    cloud.refused(403, "POST", f"{V3}/users", {"user": {"name": "spy", "domain_id": "default"}}, token)
    cloud.refused(403, "GET", f"{V3}/users?domain_id=default", token=token)
    cloud.refused(403, "DELETE", f"{V3}/domains/{domain['id']}", token=admin)  # enabled
    cloud.json("PATCH", f"{V3}/domains/{domain['id']}", {"domain": {"enabled": False}}, admin)
    cloud.json("DELETE", f"{V3}/domains/{domain['id']}", token=admin, ok=204)
    cloud.refused(401, "GET", f"{V3}/projects", token=token)
    cloud.refused(404, "GET", f"{V3}/users/{boss['id']}", token=admin)


MEMBERS_MAY_NOT = [
    ("GET", "/users", None),
    ("POST", "/users", {"user": {"name": "x"}}),
    ("PATCH", "/users/{admin}", {"user": {"password": "mine"}}),
    ("DELETE", "/users/{admin}", None),
    ("GET", "/projects", None),
    ("POST", "/projects", {"project": {"name": "x"}}),
    ("DELETE", "/projects/{project}", None),
    ("POST", "/roles", {"role": {"name": "x"}}),
    ("PUT", "/projects/{project}/users/{me}/roles/{role}", None),
    ("PUT", "/system/users/{me}/roles/{role}", None),
    ("GET", "/role_assignments", None),
    ("POST", "/services", {"service": {"type": "x"}}),
    ("GET", "/endpoints", None),
    ("POST", "/domains", {"domain": {"name": "x"}}),
    ("GET", "/users/{admin}/application_credentials", None),
    ("POST", "/users/{admin}/application_credentials", {"application_credential": {"name": "x"}}),
    ("GET", "/users/{admin}/credentials/OS-EC2", None),
    ("POST", "/users/{admin}/credentials/OS-EC2", {"tenant_id": "{project}"}),
    ("POST", "/registered_limits", {"registered_limits": []}),
    ("GET", "/groups", None),
]


@pytest.mark.parametrize("role", ["member", "reader"])
def test_members_and_readers_change_nothing_here(cloud, role):
    joe, admin = cloud.person("joe", role), cloud.admin()
    ids = {
        "admin": cloud.first.admin_user_id,
        "project": cloud.first.admin_project_id,
        "me": joe.id,
        "role": cloud.json("GET", f"{V3}/roles?name=admin", token=admin)["roles"][0]["id"],
    }
    for method, path, body in MEMBERS_MAY_NOT:
        cloud.refused(403, method, V3 + path.format(**ids), body, joe.token)
    assert cloud.json("GET", f"{V3}/users/{joe.id}", token=joe.token)["user"]["name"] == "joe"
    assert [p["name"] for p in cloud.json("GET", f"{V3}/auth/projects", token=joe.token)["projects"]] == ["of-joe"]
    assert cloud.json("GET", f"{V3}/projects/{joe.project_id}", token=joe.token)["project"]["name"] == "of-joe"


def test_admin_stays_admin(cloud):
    admin = cloud.admin()
    role = cloud.json("GET", f"{V3}/roles?name=admin", token=admin)["roles"][0]["id"]
    reader = cloud.json("GET", f"{V3}/roles?name=reader", token=admin)["roles"][0]["id"]
    cloud.refused(403, "DELETE", f"{V3}/roles/{role}", token=admin)
    cloud.refused(403, "PUT", f"{V3}/roles/{reader}/implies/{role}", token=admin)
    cloud.refused(403, "DELETE", f"{V3}/domains/default", token=admin)


# ---- other ways in


def test_an_application_credential_is_a_smaller_self(cloud):
    joe, admin = cloud.person("joe", "member"), cloud.admin()
    path = f"{V3}/users/{joe.id}/application_credentials"
    wish = {"application_credential": {"name": "ci", "roles": [{"name": "reader"}]}}
    made = cloud.json("POST", path, wish, joe.token, ok=201)["application_credential"]
    cloud.refused(409, "POST", path, wish, joe.token)
    proof = {
        "methods": ["application_credential"],
        "application_credential": {"id": made["id"], "secret": made["secret"]},
    }
    answer = cloud.ask("POST", f"{V3}/auth/tokens", {"auth": {"identity": proof}})
    assert answer.status == 201
    token = answer.headers["x-subject-token"]
    body = msgspec.json.decode(answer.read())["token"]
    assert [r["name"] for r in body["roles"]] == ["reader"]
    assert body["application_credential"] == {"id": made["id"], "name": "ci", "restricted": True}
    again = cloud.json("GET", path, token=joe.token)["application_credentials"]
    assert "secret" not in again[0] and again[0]["roles"][0]["name"] == "reader"
    # It makes no further ways in, and takes no other scope.
    cloud.refused(403, "POST", path, {"application_credential": {"name": "more"}}, token)
    cloud.refused(403, "POST", f"{V3}/users/{joe.id}/credentials/OS-EC2", {"tenant_id": joe.project_id}, token)
    cloud.refused(403, "DELETE", f"{path}/{made['id']}", token=token)
    cloud.refused(401, "POST", f"{V3}/auth/tokens", {"auth": {"identity": proof, "scope": project("admin")}})
    wrong = {**proof, "application_credential": {"id": made["id"], "secret": "no"}}
    cloud.refused(401, "POST", f"{V3}/auth/tokens", {"auth": {"identity": wrong}})
    # By name; it goes with what its owner loses.
    by_name = {"name": "ci", "secret": made["secret"], "user": {"id": joe.id}}
    by_name = {"auth": {"identity": {**proof, "application_credential": by_name}}}
    cloud.json("POST", f"{V3}/auth/tokens", by_name, ok=201)
    role = cloud.json("GET", f"{V3}/roles?name=member", token=admin)["roles"][0]["id"]
    cloud.json("DELETE", f"{V3}/projects/{joe.project_id}/users/{joe.id}/roles/{role}", token=admin, ok=204)
    cloud.refused(401, "GET", f"{V3}/auth/projects", token=token)


def test_an_application_credential_cannot_be_more_than_its_maker(cloud):
    joe = cloud.person("joe", "reader")
    wish = {"application_credential": {"name": "big", "roles": [{"name": "admin"}]}}
    cloud.refused(400, "POST", f"{V3}/users/{joe.id}/application_credentials", wish, joe.token)
    wish = {"application_credential": {"name": "old", "expires_at": "2020-01-01T00:00:00"}}
    cloud.refused(400, "POST", f"{V3}/users/{joe.id}/application_credentials", wish, joe.token)


def test_ec2_keys_are_kept_encrypted_and_are_their_owners(cloud):
    joe, jane = cloud.person("joe", "member"), cloud.person("jane", "member")
    path = f"{V3}/users/{joe.id}/credentials/OS-EC2"
    made = cloud.json("POST", path, {"tenant_id": joe.project_id}, joe.token, ok=201)["credential"]
    cloud.refused(403, "POST", path, {"tenant_id": jane.project_id}, joe.token)
    assert cloud.json("GET", f"{path}/{made['access']}", token=joe.token)["credential"]["secret"] == made["secret"]
    cloud.refused(403, "GET", f"{path}/{made['access']}", token=jane.token)
    with cloud.db.read() as tx:
        blob = tx.execute(sa.select(CREDENTIALS.c.blob)).scalar()
    assert made["secret"] not in blob
    cloud.json("DELETE", f"{path}/{made['access']}", token=joe.token, ok=204)
    assert cloud.json("GET", path, token=joe.token)["credentials"] == []


def test_unified_limits(cloud):
    joe, admin = cloud.person("joe", "member"), cloud.admin()
    compute = cloud.json("GET", f"{V3}/services?type=compute", token=admin)["services"][0]["id"]
    wish = {"registered_limits": [{"service_id": compute, "resource_name": "servers", "default_limit": 10}]}
    registered = cloud.json("POST", f"{V3}/registered_limits", wish, admin, ok=201)["registered_limits"][0]
    cloud.refused(409, "POST", f"{V3}/registered_limits", wish, admin)
    mine = {"service_id": compute, "resource_name": "servers", "resource_limit": 3, "project_id": joe.project_id}
    cloud.json("POST", f"{V3}/limits", {"limits": [mine]}, admin, ok=201)
    other = {**mine, "project_id": cloud.first.demo_project_id}
    cloud.json("POST", f"{V3}/limits", {"limits": [other]}, admin, ok=201)
    assert [x["resource_limit"] for x in cloud.json("GET", f"{V3}/limits", token=joe.token)["limits"]] == [3]
    assert len(cloud.json("GET", f"{V3}/limits", token=admin)["limits"]) == 2
    cloud.refused(403, "DELETE", f"{V3}/registered_limits/{registered['id']}", token=admin)


# ---- the catalog


def test_an_operator_adds_a_service_of_his_own(cloud):
    admin = cloud.admin()
    service = cloud.json("POST", f"{V3}/services", {"service": {"type": "dns", "name": "d"}}, admin, ok=201)["service"]
    url = "https://dns.example.org/v2/$(project_id)s"
    wish = {"endpoint": {"service_id": service["id"], "interface": "public", "url": url, "region": "Elsewhere"}}
    cloud.json("POST", f"{V3}/endpoints", wish, admin, ok=201)
    wish["endpoint"]["url"] = "javascript:alert(1)"
    cloud.refused(400, "POST", f"{V3}/endpoints", wish, admin)
    catalog = cloud.json("GET", f"{V3}/auth/catalog", token=admin)["catalog"]
    dns = next(s for s in catalog if s["type"] == "dns")["endpoints"][0]
    assert dns["url"] == f"https://dns.example.org/v2/{cloud.first.admin_project_id}"
    assert dns["region_id"] == "Elsewhere"
    cloud.refused(409, "DELETE", f"{V3}/regions/Elsewhere", token=admin)
    cloud.json("DELETE", f"{V3}/services/{service['id']}", token=admin, ok=204)
    assert "dns" not in {s["type"] for s in cloud.json("GET", f"{V3}/auth/catalog", token=admin)["catalog"]}


def test_a_start_changes_nothing_but_what_was_asked(cloud):
    admin = cloud.admin()
    before = cloud.json("GET", f"{V3}/endpoints", token=admin)["endpoints"]
    again = companion.bootstrap(cloud.realm, cloud.directory, admin_password=ADMIN)
    assert again == cloud.first
    assert cloud.json("GET", f"{V3}/endpoints", token=admin)["endpoints"] == before
    services = {"identity": "$(base_url)s/identity", "image": "https://glance.example.org"}
    companion.bootstrap(cloud.realm, cloud.directory, admin_password="another", services=services)
    cloud.clock.at += 1
    cloud.log_in("admin", ADMIN, ok=401)
    token = cloud.log_in("admin", "another", "admin")
    catalog = cloud.json("GET", f"{V3}/auth/catalog", token=token)["catalog"]
    assert {s["type"]: s["endpoints"][0]["url"] for s in catalog} == {
        "identity": "http://cloud.test/identity",
        "image": "https://glance.example.org",
    }
    assert stat.S_IMODE((cloud.directory / "service-password").stat().st_mode) == 0o600


def test_no_secret_lies_in_the_database(cloud):
    cloud.person("joe", "member")
    raw = b"".join(f.read_bytes() for f in Path(cloud.directory).glob("cloud.sqlite*"))
    assert ADMIN.encode() not in raw and b"joe's" not in raw
    assert (cloud.directory / "service-password").read_bytes() not in raw


def test_junk_is_never_our_fault(cloud):
    words = ["name", "password", "domain_id", "enabled", "description", "id", "roles", "expires_at", "type", "url", "blob",
             "service_id", "interface", "region_id", "tags", "options", "user", "methods", "identity", "scope",
             "project_id", "resource_limit", "default_limit", "tenant_id", "effective", "user.id", "whatever"]  # fmt: skip
    real = [cloud.first.demo_project_id, cloud.first.service_user_id]
    driven_with_junk(cloud, companion.R, "/identity", cloud.admin(), words, real)


# ---- how other services ask


def test_a_service_logs_in_once_and_again_when_it_must(cloud):
    account = Account(cloud.carrier_of("/identity"), Login("kilonova", cloud.first.service_password), cloud.clock)
    token = account.token()
    assert account.token() == token
    assert cloud.realm.gate(token).roles >= {"admin", "service"}
    cloud.clock.at += 3400  # soon over
    assert account.token() != token
    with pytest.raises(Unavailable):
        Account(cloud.carrier_of("/identity"), Login("kilonova", "wrong"), cloud.clock).token()


def test_tokens_are_looked_at_over_the_api_as_beside_a_real_keystone(cloud):
    carrier = cloud.carrier_of("/identity")
    account = Account(carrier, Login("kilonova", cloud.first.service_password), cloud.clock)
    remote = RemoteIdentity(Identity(Session("identity", carrier, cloud.clock, account)), cloud.clock)
    joe = cloud.person("joe", "member")
    assert remote(joe.token) == cloud.realm.gate(joe.token)
    before = cloud.db.statements
    assert remote(joe.token).project_id == joe.project_id
    assert cloud.db.statements == before
    with pytest.raises(Unknown):
        remote("junk")
    cloud.json("DELETE", f"{V3}/users/{joe.id}", token=cloud.admin(), ok=204)
    cloud.clock.at += 301
    with pytest.raises(Unknown):
        remote(joe.token)


def test_a_token_that_ended_can_still_vouch_for_work_it_began(cloud):
    joe = cloud.person("joe", "member")
    cloud.clock.at += 3700
    ours = cloud.log_in("kilonova", cloud.first.service_password, "service")
    ask = f"{V3}/auth/tokens"
    cloud.refused(404, "GET", ask, token=ours, X_Subject_Token=joe.token)
    cloud.json("GET", f"{ask}?allow_expired=1", token=ours, X_Subject_Token=joe.token)
    cloud.refused(404, "GET", f"{ask}?allow_expired=1", token=cloud.admin(), X_Subject_Token=joe.token)


# ---- unmodified clients


@pytest.mark.clients
def test_keystoneauth_and_the_sdk_find_their_way(tmp_path):
    openstack = pytest.importorskip("openstack")
    cloud = Embedded(tmp_path, clock=WallClock())
    with cloud.served() as url:
        sdk = openstack.connect(
            auth_url=f"{url}/identity",
            username="admin",
            password=ADMIN,
            project_name="admin",
            user_domain_name="Default",
            project_domain_name="Default",
            region_name="RegionOne",
            app_name="test",
        )
        try:
            assert {p.name for p in sdk.identity.projects()} == {"admin", "service", "demo"}
            joe = sdk.identity.create_user(name="joe", password="x", email="j@example.org")
            lab = sdk.identity.create_project(name="lab", domain_id="default")
            role = sdk.identity.find_role("member")
            sdk.identity.assign_project_role_to_user(lab, joe, role)
            assert [a.role["id"] for a in sdk.identity.role_assignments(user_id=joe.id)] == [role.id]
            made = sdk.identity.create_application_credential(sdk.current_user_id, "ci")
            small = openstack.connect(
                auth_type="v3applicationcredential",
                auth_url=f"{url}/identity/v3",
                application_credential_id=made.id,
                application_credential_secret=made.secret,
                region_name="RegionOne",
            )
            assert small.current_project_id == sdk.current_project_id
            small.close()
            assert sdk.session.get_endpoint(service_type="compute") == f"{url}/compute/v2.1"
            sdk.identity.delete_user(joe)
            assert sdk.identity.find_user("joe") is None
        finally:
            sdk.close()
