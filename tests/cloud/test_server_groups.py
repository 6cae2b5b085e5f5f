"""Server groups: what a user may say of them, who is a member, and where members are put, also when two come at once."""

from collections import Counter

import msgspec
import pytest

from kilonova.model import options
from kilonova.model.options import Config
from tests.cloud import tables
from tests.cloud.rooms import Rooms
from tests.cloud.tables import changes, disagreements, said
from tests.stories import telling

PLACE = "/os-server-groups"
NOBODY = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    rooms = Rooms(tmp_path_factory.mktemp("groups"))
    rooms.token = rooms.admin()
    rooms.member, rooms.stranger = rooms.person("maria", "member"), rooms.person("sam", "member")
    return rooms


def group(api, policy="anti-affinity", token="", version=64, name="g", **more):
    wish = {"name": name, "policies": [policy]} if version < 64 else {"name": name, "policy": policy, **more}
    return api.call("POST", PLACE, {"server_group": wish}, token or api.member.token, version)


def specified():
    if not tables.FOLDER.exists():
        return []
    keys = {e["route"] for e in tables.group("os-server-groups")}
    return [pytest.param(k, e, *v, id=k) for k, e, v in tables.routes() if k in keys]


@pytest.mark.parametrize(("key", "entry", "first", "last"), specified())
def test_answers_are_those_of_the_specification(api, key, entry, first, last):
    method = key.split(" ")[0]
    for v in changes(entry["response"] if entry["response"] != "none" else {}, first, last):
        made = group(api, token=api.token, version=v)
        id = made.json["server_group"]["id"]
        api.server(api.first.admin_project_id, group_id=id)
        answer = made if method == "POST" else api.call(method, key.split(" ")[1].format(id=id), None, api.token, v)
        assert answer.status == (204 if method == "DELETE" else 200), answer
        if method != "DELETE":
            assert disagreements(said(entry, "response", v), answer.json) == [], f"2.{v}"
            api.call("DELETE", f"{PLACE}/{id}", None, api.token)


def test_a_group_is_shown_as_its_version_knows_it(api):
    id = group(api, rules={"max_server_per_host": "3"}).json["server_group"]["id"]
    show = lambda v: api.call("GET", f"{PLACE}/{id}", None, api.member.token, v).json["server_group"]
    assert show(1) == {"id": id, "name": "g", "policies": ["anti-affinity"], "members": [], "metadata": {}}
    assert show(13).keys() - show(12).keys() == {"project_id", "user_id"}
    assert (show(64)["policy"], show(64)["rules"], "policies" in show(64)) == (
        "anti-affinity",
        {"max_server_per_host": 3},
        False,
    )
    soft = group(api, "soft-affinity", version=15).json["server_group"]["id"]
    assert api.call("GET", f"{PLACE}/{soft}", None, api.member.token, 14).json["server_group"]["policies"] == []
    for each in (id, soft):
        assert api.call("DELETE", f"{PLACE}/{each}", None, api.member.token).status == 204
        assert api.call("GET", f"{PLACE}/{each}", None, api.member.token).status == 404


@pytest.mark.parametrize(
    ("wish", "version"),
    [
        ({"name": "g", "policies": ["soft-affinity"]}, 14),
        ({"name": "g", "policies": ["affinity", "anti-affinity"]}, 20),
        ({"name": "g", "policies": []}, 20),
        ({"name": "g"}, 1),
        ({"name": "g"}, 64),
        ({"name": "g", "policy": "affinity"}, 63),
        ({"name": "g", "policies": ["affinity"]}, 64),
        ({"name": "g", "policy": "affinity", "rules": {"max_server_per_host": 2}}, 64),
        ({"name": "g", "policy": "anti-affinity", "rules": {"max_server_per_host": 0}}, 64),
        ({"name": "g", "policy": "anti-affinity", "rules": {"max_server_per_host": "0"}}, 64),
        ({"name": "g", "policy": "anti-affinity", "rules": {"max_server_per_host": 10**12}}, 64),
        ({"name": "g", "policy": "anti-affinity", "rules": {"most": 1}}, 64),
        ({"name": " g", "policy": "affinity"}, 64),
    ],
)
def test_what_makes_no_sense_is_refused(api, wish, version):
    before = api.call("GET", PLACE, None, api.member.token).json
    assert api.call("POST", PLACE, {"server_group": wish}, api.member.token, version).status == 400
    assert api.call("GET", PLACE, None, api.member.token).json == before


def test_who_sees_which(api):
    mine, theirs = (group(api, token=who.token).json["server_group"]["id"] for who in (api.member, api.stranger))
    ids = lambda path, token: {g["id"] for g in api.call("GET", path, None, token, 64).json["server_groups"]}
    assert mine in ids(PLACE, api.member.token) and theirs not in ids(PLACE, api.member.token)
    assert theirs not in ids(f"{PLACE}?all_projects=1", api.member.token)
    assert {mine, theirs} <= ids(f"{PLACE}?all_projects=1", api.token)
    assert not {mine, theirs} & ids(PLACE, api.token)
    for method in ("GET", "DELETE"):
        assert api.call(method, f"{PLACE}/{mine}", None, api.stranger.token).status == 404
    assert api.call("DELETE", f"{PLACE}/{mine}", None, api.token).status == 204
    assert api.call("DELETE", f"{PLACE}/{theirs}", None, api.stranger.token).status == 204


def test_lists_are_sliced(api):
    made = [group(api, name=f"n{i}").json["server_group"]["id"] for i in range(4)]
    ids = lambda query: [
        g["id"] for g in api.call("GET", f"{PLACE}{query}", None, api.member.token).json["server_groups"]
    ]
    assert ids("") == made
    assert ids("?limit=2") == made[:2]
    assert ids("?limit=2&offset=1") == made[1:3]
    assert ids("?limit=0&offset=3") == made[3:]
    assert ids("?offset=99999999999999999999") == []
    for bad in ("limit=-1", "limit=x", "offset=", "limit=1.5"):
        assert api.call("GET", f"{PLACE}?{bad}", None, api.member.token).status == 400
    before = api.db.statements
    ids("")
    assert api.db.statements - before <= 4  # a page costs the same, whatever is in it
    for id in made:
        api.call("DELETE", f"{PLACE}/{id}", None, api.member.token)


def test_a_project_may_have_so_many_groups(api):
    path = f"/os-quota-sets/{api.member.project_id}"
    api.call("PUT", path, {"quota_set": {"server_groups": 2, "force": True}}, api.token)
    made = [group(api).json["server_group"]["id"] for _ in range(2)]
    assert group(api).fault == ("forbidden", "Quota exceeded, too many server groups.")
    absolute = api.call("GET", "/limits", None, api.member.token).json["limits"]["absolute"]
    assert (absolute["maxServerGroups"], absolute["totalServerGroupsUsed"]) == (2, 2)
    assert api.call("GET", f"{path}/detail", None, api.token, 57).json["quota_set"]["server_groups"]["in_use"] == 2
    assert api.call("PUT", path, {"quota_set": {"server_groups": 1}}, api.token).status == 400
    for id in made:
        api.call("DELETE", f"{PLACE}/{id}", None, api.member.token)


# ---- members, on hosts


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def made(cloud, policy, **rules):
    wish = {"name": policy, "policy": policy} | ({"rules": rules} if rules else {})
    return cloud.json("POST", PLACE, {"server_group": wish})["server_group"]["id"]


def boot(cloud, group, name="one", n=1, settle=True, ok=202, **more):
    wish = {"name": name, "flavorRef": "small", "imageRef": cloud.image_id, "networks": "auto", "max_count": n, **more}
    cloud.json(
        "POST",
        "/servers",
        {"server": wish, "os:scheduler_hints": {"group": group}},
        ok=ok,
        token=cloud.admin if "host" in more else "",
    )
    if settle:
        cloud.settle()


def members(cloud, group):
    return cloud.json("GET", f"{PLACE}/{group}")["server_group"]["members"]


def rows(cloud):
    shown = cloud.json("GET", "/servers/detail?all_tenants=1", token=cloud.admin)["servers"]
    return {s["name"]: (s["status"], s["OS-EXT-SRV-ATTR:host"]) for s in shown}


def test_members_come_and_go(cloud):
    g = made(cloud, "anti-affinity")
    boot(cloud, [g])
    (id,) = members(cloud, g)
    path = f"/servers/{id}"
    assert cloud.json("GET", path)["server"]["server_groups"] == [g]
    assert "server_groups" not in cloud.json("GET", path, version="2.70")["server"]
    cloud.json("DELETE", path, ok=204)
    cloud.settle()
    assert members(cloud, g) == []


def test_a_group_that_goes_leaves_its_servers(cloud):
    g = made(cloud, "affinity")
    boot(cloud, g)
    (id,) = members(cloud, g)
    cloud.json("DELETE", f"{PLACE}/{g}", ok=204)
    shown = cloud.json("GET", f"/servers/{id}")["server"]
    assert (shown["status"], shown["server_groups"]) == ("ACTIVE", [])


def test_hints_that_name_no_group_of_the_callers(cloud):
    theirs = cloud.json("POST", PLACE, {"server_group": {"name": "x", "policy": "affinity"}}, token=cloud.admin)
    for hint in (NOBODY, "x", theirs["server_group"]["id"], [NOBODY, theirs["server_group"]["id"]], 7):
        boot(cloud, hint, ok=400)
    assert rows(cloud) == {}


def test_anti_affinity_is_kept_and_said(cloud):
    g = made(cloud, "anti-affinity")
    boot(cloud, g, "s", n=4)
    states = Counter(status for status, _ in rows(cloud).values())
    assert states == {"ACTIVE": 3, "ERROR": 1}
    (broken,) = [s for s in cloud.json("GET", "/servers/detail")["servers"] if s["status"] == "ERROR"]
    assert broken["fault"]["message"].startswith("No valid host was found")
    assert len({host for status, host in rows(cloud).values() if status == "ACTIVE"}) == 3
    assert len(members(cloud, g)) == 4


def test_so_many_on_a_host(cloud):
    g = made(cloud, "anti-affinity", max_server_per_host=2)
    boot(cloud, g, "s", n=7)
    at = Counter(host for status, host in rows(cloud).values() if status == "ACTIVE")
    assert sorted(at.values()) == [2, 2, 2]


def test_affinity_is_kept(cloud):
    g = made(cloud, "affinity")
    boot(cloud, g, "s", n=3)
    boot(cloud, g, "t")
    assert len(set(rows(cloud).values())) == 1
    boot(cloud, g, "too-large", flavorRef="huge")  # no host has so much: not one elsewhere, either
    assert rows(cloud)["too-large"][0] == "ERROR"


@pytest.mark.parametrize(("policy", "hosts"), [("soft-affinity", 1), ("soft-anti-affinity", 3)])
def test_soft_policies_are_tastes(cloud, policy, hosts):
    g = made(cloud, policy)
    for name in "abc":
        boot(cloud, g, name)
    assert len({host for _, host in rows(cloud).values()}) == hosts
    boot(cloud, g, "s", n=3)
    assert {status for status, _ in rows(cloud).values()} == {"ACTIVE"}


@pytest.mark.parametrize(("policy", "hosts"), [("affinity", 1), ("anti-affinity", 3)])
def test_what_a_scheduler_did_not_know_the_claim_does(cloud, policy, hosts):
    """Two that are chosen at the same time are told the same: whoever claims second is sent on."""
    g = made(cloud, policy)
    ask, told = cloud.conductor.world.ask_scheduler, []

    def old(m):
        chosen = ask(m if m.fresh else msgspec.structs.replace(m, ask=msgspec.structs.replace(m.ask, company=None)))
        places = sorted(chosen.places, key=lambda p: p.host)
        if not m.fresh and policy == "affinity":
            places = places[len(told) % 3 :] + places[: len(told) % 3]
        told.append(m.fresh)
        return msgspec.structs.replace(chosen, places=places)

    cloud.conductor.world.ask_scheduler = old
    boot(cloud, g, "s", n=3)
    assert {status for status, _ in rows(cloud).values()} == {"ACTIVE"}
    assert len({host for _, host in rows(cloud).values()}) == hosts


def test_a_forced_host_does_not_break_a_group(cloud):
    g = cloud.json("POST", PLACE, {"server_group": {"name": "a", "policy": "anti-affinity"}}, token=cloud.admin)[
        "server_group"
    ]["id"]
    for name in ("a", "b"):
        boot(cloud, g, name, host="h1")
    assert rows(cloud) == {"a": ("ACTIVE", "h1"), "b": ("ERROR", None)}


def test_a_policy_that_is_switched_off_is_refused(tmp_path):
    config = Config(scheduler=options.Scheduler(rules=["enabled", "up", "room"], tastes={"soft_affinity": 0.0}))
    with telling(tmp_path, config=config) as cloud:
        for policy in ("affinity", "anti-affinity", "soft-affinity", "soft-anti-affinity"):
            boot(cloud, made(cloud, policy), policy)
        assert {n: s for n, (s, _) in rows(cloud).items()} == {
            "affinity": "ERROR", "anti-affinity": "ERROR", "soft-affinity": "ERROR", "soft-anti-affinity": "ACTIVE",
        }  # fmt: skip


def test_a_group_has_so_many_members(cloud):
    path = f"/os-quota-sets/{cloud.user.project_id}"
    cloud.json("PUT", path, {"quota_set": {"server_group_members": 2}}, token=cloud.admin)
    g = made(cloud, "soft-affinity")
    boot(cloud, g, "s", n=2)
    boot(cloud, g, "one-more", ok=403)
    assert set(rows(cloud)) == {"s-1", "s-2"}
    cloud.json("DELETE", f"/servers/{members(cloud, g)[0]}", ok=204)
    cloud.settle()
    boot(cloud, g, "one-more")
    assert rows(cloud)["one-more"][0] == "ACTIVE"
