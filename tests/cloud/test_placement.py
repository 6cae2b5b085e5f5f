"""Placement, as its users meet it: trees, what they give out, who holds it, and every way to be refused."""

import threading
from collections import Counter

import msgspec
import pytest
import sqlalchemy as sa

from kilonova import placement
from kilonova.kit.clock import Ids, WallClock
from kilonova.placement.frame import R
from kilonova.store.placement import ALLOCATIONS, CONSUMERS, INVENTORIES
from tests.cloud.embedded import ADMIN, Embedded
from tests.cloud.placements import Placement
from tests.stories import telling

C1, C2, C3 = (f"00000000-0000-4000-8000-00000000000{i}" for i in (1, 2, 3))
A1, A2 = (f"00000000-0000-4000-8000-0000000000a{i}" for i in (1, 2))
RACE = "placement.concurrent_update"
UNDEFINED = "placement.undefined_code"


@pytest.fixture
def p():
    made = Placement()
    yield made
    made.db.close()


def sums_hold(p):
    with p.db.read() as tx:
        a = ALLOCATIONS.c
        query = sa.select(a.provider, a.resource_class, sa.func.sum(a.amount)).group_by(a.provider, a.resource_class)
        held = {(x, c): n for x, c, n in tx.execute(query)}
        for i in tx.execute(sa.select(INVENTORIES)):
            assert i.used == held.pop((i.provider, i.resource_class), 0)
        assert not held
        owners = set(tx.execute(sa.select(CONSUMERS.c.uuid)).scalars())
        assert owners == set(tx.execute(sa.select(a.consumer)).scalars())


# ---- versions


def test_what_a_client_asks_first(p):
    (one,) = p.say("GET", "/", token="")["versions"]
    assert (one["id"], one["min_version"], one["max_version"], one["status"]) == ("v1.0", "1.0", "1.39", "CURRENT")


@pytest.mark.parametrize(
    ("said", "status", "meant"),
    [
        ("placement 1.7", 200, "1.7"),
        ("compute 2.1, placement 1.8", 200, "1.8"),
        ("compute 2.1", 200, "1.0"),
        ("", 200, "1.0"),
        ("placement latest", 200, "1.39"),
        ("placement one", 400, ""),
        ("placement 1.40", 406, ""),
        ("placement 2.0", 406, ""),
        ("placement 0.9", 400, ""),
    ],
)
def test_versions_are_asked_by_a_header(p, said, status, meant):
    answer = p.ask("GET", "/resource_providers", OpenStack_API_Version=said)
    body = msgspec.json.decode(answer.read())
    assert answer.status == status
    if meant:
        assert answer.headers["openstack-api-version"] == f"placement {meant}"
    if status == 406:
        assert (body["errors"][0]["min_version"], body["errors"][0]["max_version"]) == ("1.0", "1.39")


def test_methods_media_types_and_places_that_are_none(p):
    answer = p.ask("PATCH", "/resource_providers")
    assert answer.status == 405 and answer.headers["allow"] == "GET, POST"
    assert p.refused(404, "GET", "/nothing")["title"] == "Not Found"
    p.refused(415, "POST", "/resource_providers", b"name=x", Content_Type="text/plain")
    p.refused(415, "POST", "/resource_providers", b"name=x", Content_Type="application/x-www-form-urlencoded")
    p.refused(400, "POST", "/resource_providers", b"{", Content_Type="application/json")
    p.refused(406, "GET", "/resource_providers", Accept="text/html")
    for good in ("*/*", "application/json", "text/html, application/json;q=0.5"):
        assert p.ask("GET", "/resource_providers", Accept=good).status == 200


def test_codes_came_with_a_version(p):
    for v in (22, 23):
        error = p.refused(404, "GET", f"/resource_providers/{C1}", v=v)
        assert error.get("code") == (UNDEFINED if v == 23 else None)


# ---- providers


def test_a_provider_from_its_making_to_its_end(p):
    answer = p.ask("POST", "/resource_providers", {"name": "n"}, v=0)
    where = answer.headers["location"]
    assert answer.status == 201 and where.startswith("http://cloud.test/placement/resource_providers/")
    uuid = where.rsplit("/")[-1]
    shown = p.say("GET", f"/resource_providers/{uuid}")
    assert (shown["name"], shown["generation"], shown["parent_provider_uuid"]) == ("n", 0, None)
    assert shown["root_provider_uuid"] == uuid
    assert {x["rel"]: x["href"] for x in shown["links"]}["traits"] == f"/placement/resource_providers/{uuid}/traits"
    assert len(p.say("GET", f"/resource_providers/{uuid}", v=0)["links"]) == 3
    assert p.refused(409, "POST", "/resource_providers", {"name": "n"})["code"] == "placement.duplicate_name"
    taken = {"name": "m", "uuid": uuid}
    assert p.refused(409, "POST", "/resource_providers", taken)["code"] == "placement.duplicate_name"
    p.say("PUT", f"/resource_providers/{uuid}", {"name": "m"})
    other = p.provider("n")
    error = p.refused(409, "PUT", f"/resource_providers/{other}", {"name": "m"})
    assert error["code"] == "placement.duplicate_name"
    p.say("DELETE", f"/resource_providers/{uuid}", ok=204)
    for method, body in (("GET", None), ("DELETE", None), ("PUT", {"name": "x"})):
        p.refused(404, method, f"/resource_providers/{uuid}", body)
    p.refused(400, "POST", "/resource_providers", {"name": "x" * 201})
    p.refused(400, "POST", "/resource_providers", {"name": "x", "uuid": "junk"})


def test_trees_grow_move_and_are_cut(p):
    root, other = p.provider("root"), p.provider("other")
    child = p.provider("child", root)
    leaf = p.provider("leaf", child)

    def root_of(uuid):
        return p.say("GET", f"/resource_providers/{uuid}")["root_provider_uuid"]

    def put(uuid, parent, v=39, ok=True):
        body = {"name": p.say("GET", f"/resource_providers/{uuid}")["name"], "parent_provider_uuid": parent}
        return (
            p.say("PUT", f"/resource_providers/{uuid}", body, v=v)
            if ok
            else p.refused(400, "PUT", f"/resource_providers/{uuid}", body, v=v)
        )

    assert root_of(leaf) == root
    names = {x["uuid"] for x in p.say("GET", f"/resource_providers?in_tree={leaf}")["resource_providers"]}
    assert names == {root, child, leaf}
    error = p.refused(409, "DELETE", f"/resource_providers/{child}")
    assert error["code"] == "placement.resource_provider.cannot_delete_parent"
    put(child, other, v=36, ok=False)
    put(child, None, v=36, ok=False)
    put(child, root, v=36)  # as it is
    for loop in (child, leaf):
        put(child, loop, ok=False)
    put(child, C1, ok=False)
    put(child, other)
    assert root_of(leaf) == root_of(child) == other
    put(child, None)
    assert root_of(leaf) == root_of(child) == child
    put(child, root, v=14)  # before 1.37 from no parent to one
    assert root_of(leaf) == root
    p.refused(400, "POST", "/resource_providers", {"name": "x", "parent_provider_uuid": C1})
    p.refused(400, "POST", "/resource_providers", {"name": "x", "uuid": C1, "parent_provider_uuid": C1})


def test_lists_are_filtered(p):
    a = p.provider("a", VCPU=4, traits=("HW_CPU_X86_AVX",), aggregates=(A1,))
    p.provider("b", VCPU=2, traits=("HW_CPU_X86_AVX2",), aggregates=(A1, A2))
    c = p.provider("c", a, VGPU=1)
    p.allocate(C1, {a: {"VCPU": 3}})

    def names(query, v=39):
        return "".join(
            sorted(x["name"] for x in p.say("GET", f"/resource_providers?{query}", v=v)["resource_providers"])
        )

    assert names("") == "abc"
    assert (names("name=b"), names("name=x"), names(f"uuid={c}")) == ("b", "", "c")
    assert (names("resources=VCPU:2"), names("resources=VCPU:1"), names("resources=VCPU:1,VGPU:1")) == ("b", "ab", "")
    assert (names(f"member_of={A2}", 3), names(f"member_of=in:{A1},{A2}", 3)) == ("b", "ab")
    assert names(f"member_of={A1}&member_of={A2}", 24) == "b"
    p.refused(400, "GET", f"/resource_providers?member_of={A1}&member_of={A2}", v=23)
    assert (names(f"member_of=!{A2}", 32), names(f"member_of=!in:{A1},{A2}", 32)) == ("ac", "c")
    p.refused(400, "GET", f"/resource_providers?member_of=!{A2}", v=31)
    p.refused(400, "GET", f"/resource_providers?member_of={A1},{A2}")
    assert names("required=HW_CPU_X86_AVX", 18) == "a"
    assert names("required=!HW_CPU_X86_AVX", 22) == "bc"
    p.refused(400, "GET", "/resource_providers?required=!HW_CPU_X86_AVX", v=21)
    assert names("required=in:HW_CPU_X86_AVX,HW_CPU_X86_AVX2", 39) == "ab"
    p.refused(400, "GET", "/resource_providers?required=in:HW_CPU_X86_AVX,HW_CPU_X86_AVX2", v=38)
    assert names("required=HW_CPU_X86_AVX&required=HW_CPU_X86_AVX2", 39) == ""
    assert names("required=HW_CPU_X86_AVX&required=HW_CPU_X86_AVX2", 38) == "b"  # the last one counted
    assert names(f"in_tree={c}&resources=VGPU:1") == "c"
    assert names(f"in_tree={C3}") == ""
    for bad in (
        "resources=NOPE:1", "resources=VCPU", "resources=VCPU:0", "resources=VCPU:-1", "resources=", "resources=VCPU:x",
        "required=NOPE", "required=", "required=A,,B", "member_of=", "member_of=x", "uuid=x", "in_tree=x", "junk=1",
        "required=HW_CPU_X86_AVX,!HW_CPU_X86_AVX", "required=in:HW_CPU_X86_AVX,!HW_CPU_X86_AVX2",
    ):  # fmt: skip
        p.refused(400, "GET", f"/resource_providers?{bad}")


# ---- inventories


def test_inventories(p):
    a = p.provider("a")
    at = f"/resource_providers/{a}/inventories"
    made = p.say("POST", at, {"resource_class": "VCPU", "total": 4}, ok=201)
    assert made == {
        "total": 4, "reserved": 0, "min_unit": 1, "max_unit": 2147483647, "step_size": 1, "allocation_ratio": 1.0,
        "resource_provider_generation": 1,
    }  # fmt: skip
    assert p.refused(409, "POST", at, {"resource_class": "VCPU", "total": 4})["code"] == RACE
    p.refused(400, "POST", at, {"resource_class": "CUSTOM_NOPE", "total": 4})
    stale = {"resource_provider_generation": 0, "total": 5}
    assert p.refused(409, "PUT", f"{at}/VCPU", stale)["code"] == RACE
    assert p.say("PUT", f"{at}/VCPU", stale | {"resource_provider_generation": 1})["total"] == 5
    p.refused(400, "PUT", f"{at}/DISK_GB", stale | {"resource_provider_generation": 2})
    p.refused(404, "PUT", f"{at}/CUSTOM_NOPE", stale | {"resource_provider_generation": 2})
    p.allocate(C1, {a: {"VCPU": 3}})
    nothing = {"resource_provider_generation": 3, "inventories": {}}
    assert p.refused(409, "PUT", at, nothing)["code"] == "placement.inventory.inuse"
    assert p.refused(409, "DELETE", f"{at}/VCPU")["code"] == RACE
    assert p.refused(409, "DELETE", at)["code"] == "placement.inventory.inuse"
    less = {"resource_provider_generation": 3, "inventories": {"VCPU": {"total": 1}, "DISK_GB": {"total": 9}}}
    assert p.say("PUT", at, less)["inventories"]["VCPU"]["total"] == 1  # less than is held: allowed
    p.refused(404, "GET", f"{at}/VGPU")
    p.say("DELETE", f"{at}/DISK_GB", ok=204)
    p.refused(404, "DELETE", f"{at}/DISK_GB")
    p.say("DELETE", f"/allocations/{C1}", ok=204)
    p.say("DELETE", at, ok=204)
    assert p.say("GET", at)["inventories"] == {}
    ghost = f"/resource_providers/{C3}/inventories"
    for method, path, body in (
        ("GET", ghost, None), ("DELETE", ghost, None), ("PUT", ghost, nothing), ("GET", f"{ghost}/VCPU", None),
        ("POST", ghost, {"resource_class": "VCPU", "total": 4}), ("PUT", f"{ghost}/VCPU", stale),
    ):  # fmt: skip
        p.refused(404, method, path, body)
    sums_hold(p)


@pytest.mark.parametrize(
    ("said", "v", "status"),
    [
        ({"total": 4, "reserved": 4}, 25, 400),
        ({"total": 4, "reserved": 4}, 26, 201),
        ({"total": 4, "reserved": 5}, 39, 400),
        ({"total": 4, "allocation_ratio": 0}, 25, 400),
        ({"total": 4, "allocation_ratio": -1.0}, 39, 400),
        ({"total": 4, "allocation_ratio": 4e38}, 39, 400),
        ({"total": 0}, 39, 400),
        ({"total": 2**31}, 39, 400),
        ({"total": 4, "step_size": 0}, 39, 400),
        ({"total": 4, "min_unit": 0}, 39, 400),
        ({"total": 4, "max_unit": 0}, 39, 400),
        ({"total": 4, "reserved": -1}, 39, 400),
        ({"total": True}, 39, 400),
        ({"total": 4, "allocation_ratio": 1.5, "resource_provider_generation": 77}, 39, 201),
    ],
)
def test_what_can_be_given_out(p, said, v, status):
    at = f"/resource_providers/{p.provider('a')}/inventories"
    assert p.ask("POST", at, {"resource_class": "VCPU"} | said, v=v).status == status


# ---- names


def test_resource_classes(p):
    assert len(p.say("GET", "/resource_classes")["resource_classes"]) == 21
    p.say("POST", "/resource_classes", {"name": "CUSTOM_A"}, ok=201)
    p.refused(409, "POST", "/resource_classes", {"name": "CUSTOM_A"})
    p.refused(400, "POST", "/resource_classes", {"name": "VCPU"})
    p.refused(400, "POST", "/resource_classes", {"name": "CUSTOM_" + "A" * 255})
    assert p.ask("PUT", "/resource_classes/CUSTOM_B").status == 201
    assert p.ask("PUT", "/resource_classes/CUSTOM_B").status == 204
    p.refused(400, "PUT", "/resource_classes/CUSTOM_b")
    a = p.provider("a", CUSTOM_A=4)
    p.allocate(C1, {a: {"CUSTOM_A": 1}})
    p.refused(409, "DELETE", "/resource_classes/CUSTOM_A")
    p.refused(409, "PUT", "/resource_classes/CUSTOM_A", {"name": "CUSTOM_B"}, v=6)
    assert p.say("PUT", "/resource_classes/CUSTOM_A", {"name": "CUSTOM_C"}, v=6)["name"] == "CUSTOM_C"
    assert p.say("GET", f"/resource_providers/{a}/usages")["usages"] == {"CUSTOM_C": 1}
    for name, status in (("VCPU", 400), ("CUSTOM_NOPE", 404)):
        p.refused(status, "DELETE", f"/resource_classes/{name}")
        p.refused(status, "PUT", f"/resource_classes/{name}", {"name": "CUSTOM_D"}, v=6)
    p.say("DELETE", "/resource_classes/CUSTOM_B", ok=204)
    p.refused(404, "GET", "/resource_classes/CUSTOM_B")
    assert p.say("GET", "/resource_classes/VCPU")["links"][0]["href"] == "/placement/resource_classes/VCPU"


def test_traits(p):
    a = p.provider("a", traits=("CUSTOM_A", "HW_CPU_X86_AVX"))
    assert p.ask("PUT", "/traits/CUSTOM_A").status == 204
    assert p.ask("PUT", "/traits/CUSTOM_B").status == 201
    p.refused(400, "PUT", "/traits/HW_CPU_X86_AVX")
    p.refused(404, "GET", "/traits/CUSTOM_NOPE")
    assert p.ask("GET", "/traits/HW_CPU_X86_AVX").status == 204
    assert len(p.say("GET", "/traits")["traits"]) > 370
    assert p.say("GET", "/traits?name=startswith:CUSTOM_")["traits"] == ["CUSTOM_A", "CUSTOM_B"]
    assert p.say("GET", "/traits?name=in:CUSTOM_B,NOPE,HW_NUMA_ROOT")["traits"] == ["HW_NUMA_ROOT", "CUSTOM_B"]
    assert p.say("GET", "/traits?associated=true")["traits"] == ["HW_CPU_X86_AVX", "CUSTOM_A"]
    assert p.say("GET", "/traits?associated=false&name=startswith:CUSTOM_")["traits"] == ["CUSTOM_B"]
    for bad in ("name=A", "associated=perhaps", "junk=1"):
        p.refused(400, "GET", f"/traits?{bad}")
    for name, status in (("HW_NUMA_ROOT", 400), ("CUSTOM_NOPE", 404), ("CUSTOM_A", 409)):
        p.refused(status, "DELETE", f"/traits/{name}")
    at = f"/resource_providers/{a}/traits"
    now = p.generation(a)
    same = {"traits": ["CUSTOM_A", "HW_CPU_X86_AVX"], "resource_provider_generation": now}
    assert p.say("PUT", at, same)["resource_provider_generation"] == now  # what changes nothing moves nothing
    p.refused(400, "PUT", at, {"traits": ["CUSTOM_NOPE"], "resource_provider_generation": now})
    stale = {"traits": ["CUSTOM_B"], "resource_provider_generation": now - 1}
    assert p.refused(409, "PUT", at, stale)["code"] == RACE
    p.say("DELETE", at, ok=204)
    assert p.say("GET", at) == {"traits": [], "resource_provider_generation": now + 1}
    p.say("DELETE", "/traits/CUSTOM_A", ok=204)


def test_aggregates(p):
    a = p.provider("a")
    at = f"/resource_providers/{a}/aggregates"
    assert p.say("PUT", at, [A1, A2], v=18) == {"aggregates": [A1, A2]}
    assert p.generation(a) == 0
    found = p.say("GET", f"/resource_providers?member_of={A1}")["resource_providers"]
    assert [x["name"] for x in found] == ["a"]
    said = {"aggregates": [A1], "resource_provider_generation": 0}
    assert p.say("PUT", at, said) == {"aggregates": [A1], "resource_provider_generation": 1}
    assert p.refused(409, "PUT", at, said)["code"] == RACE
    p.refused(400, "PUT", at, said | {"aggregates": [A1, A1]})
    p.refused(400, "PUT", at, [A1, A1], v=1)
    p.refused(400, "PUT", at, said | {"aggregates": ["x"]})
    p.refused(404, "PUT", f"/resource_providers/{C1}/aggregates", said)


# ---- allocations


def test_allocations_by_generation(p):
    a, b = p.provider("a", VCPU=4), p.provider("b", VCPU=4)
    p.allocate(C1, {a: {"VCPU": 2}, b: {"VCPU": 1}})
    shown = p.say("GET", f"/allocations/{C1}")
    assert shown["allocations"][a] == {"generation": p.generation(a), "resources": {"VCPU": 2}}
    who = {"project_id": "p", "user_id": "u", "consumer_generation": 1, "consumer_type": "INSTANCE"}
    assert {k: shown[k] for k in who} == who
    for wrong in (None, 2, 0):
        error = p.refused(409, "PUT", f"/allocations/{C1}", p.holding({a: {"VCPU": 1}}, wrong))
        assert error["code"] == RACE
    assert p.refused(409, "PUT", f"/allocations/{C2}", p.holding({a: {"VCPU": 1}}, 1))["code"] == RACE
    p.allocate(C1, {a: {"VCPU": 4}}, 1)  # all of it again: what it held does not stand in its way
    assert p.say("GET", f"/resource_providers/{b}/usages")["usages"] == {"VCPU": 0}
    of = p.say("GET", f"/resource_providers/{a}/allocations")
    assert of["allocations"] == {C1: {"resources": {"VCPU": 4}, "consumer_generation": 2}}
    assert of["resource_provider_generation"] == p.generation(a)
    p.allocate(C1, {}, 2)
    assert p.say("GET", f"/allocations/{C1}") == {"allocations": {}}
    p.refused(404, "DELETE", f"/allocations/{C1}")
    sums_hold(p)


def test_what_is_refused_changes_nothing(p):
    odd = {"total": 10, "min_unit": 2, "max_unit": 6, "step_size": 2}
    a, b = p.provider("a", VCPU=4, DISK_GB=odd), p.provider("b")
    p.allocate(C1, {a: {"VCPU": 2}})
    cases = [
        (409, UNDEFINED, {a: {"VCPU": 5}}),
        (409, UNDEFINED, {a: {"DISK_GB": 1}}),
        (409, UNDEFINED, {a: {"DISK_GB": 3}}),
        (409, UNDEFINED, {a: {"DISK_GB": 8}}),
        (409, UNDEFINED, {a: {"VGPU": 1}}),
        (409, UNDEFINED, {a: {"VCPU": 1}, b: {"VCPU": 1}}),
        (400, UNDEFINED, {C3: {"VCPU": 1}}),
        (400, UNDEFINED, {a: {"CUSTOM_NOPE": 1}}),
        (400, UNDEFINED, {a: {"VCPU": 0}}),
        (400, UNDEFINED, {a: {}}),
    ]
    for status, code, held in cases:
        assert p.refused(status, "PUT", f"/allocations/{C1}", p.holding(held, 1))["code"] == code, held
    p.refused(400, "PUT", "/allocations/junk", p.holding({a: {"VCPU": 1}}))
    p.refused(400, "PUT", f"/allocations/{C2}", p.holding({}) | {"consumer_type": "small"})
    p.refused(400, "PUT", f"/allocations/{C2}", {"allocations": {}, "project_id": "p", "user_id": "u"}, v=27)
    assert p.say("GET", f"/allocations/{C1}")["allocations"][a]["resources"] == {"VCPU": 2}
    sums_hold(p)


def test_who_takes_no_more_is_not_refused_where_there_is_less_than_is_held(p):
    a = p.provider("a", VCPU=4)
    p.allocate(C1, {a: {"VCPU": 3}})
    at = f"/resource_providers/{a}/inventories"
    p.say("PUT", at, {"resource_provider_generation": p.generation(a), "inventories": {"VCPU": {"total": 2}}})
    move = {C1: p.holding({}, 1), C2: p.holding({a: {"VCPU": 3}}) | {"consumer_type": "MIGRATION"}}
    p.say("POST", "/allocations", move, ok=204)
    p.refused(409, "PUT", f"/allocations/{C1}", p.holding({a: {"VCPU": 1}}))
    p.allocate(C2, {a: {"VCPU": 2}}, 1)
    sums_hold(p)


def test_several_consumers_at_once_or_none(p):
    a = p.provider("a", VCPU=4)
    p.allocate(C1, {a: {"VCPU": 4}})
    both = {C1: p.holding({a: {"VCPU": 1}}, 1), C2: p.holding({a: {"VCPU": 3}}), C3: p.holding({})}
    p.say("POST", "/allocations", both, ok=204)
    assert p.say("GET", f"/resource_providers/{a}/usages")["usages"] == {"VCPU": 4}
    again = {C1: p.holding({a: {"VCPU": 2}}, 2), C2: p.holding({a: {"VCPU": 3}}, 1)}
    p.refused(409, "POST", "/allocations", again)
    assert p.refused(409, "POST", "/allocations", {C1: p.holding({}, 1), C2: p.holding({}, 1)})["code"] == RACE
    assert len(p.say("GET", f"/resource_providers/{a}/allocations")["allocations"]) == 2
    sums_hold(p)


def test_mappings_are_taken_and_not_kept(p):
    a = p.provider("a", VCPU=4)
    p.say("PUT", f"/allocations/{C1}", p.holding({a: {"VCPU": 1}}) | {"mappings": {"": [a], "_X": [a]}})
    p.refused(400, "PUT", f"/allocations/{C2}", p.holding({a: {"VCPU": 1}}) | {"mappings": {}})
    said = {k: x for k, x in p.holding({a: {"VCPU": 1}}).items() if k != "consumer_type"}
    p.refused(400, "PUT", f"/allocations/{C2}", said | {"mappings": {"": [a]}}, v=33)


def test_the_oldest_form_of_an_allocation(p):
    a = p.provider("a", VCPU=4)
    listed = {"allocations": [{"resource_provider": {"uuid": a}, "resources": {"VCPU": 1}}]}
    p.say("PUT", f"/allocations/{C1}", listed, v=0, ok=204)
    assert set(p.say("GET", f"/allocations/{C1}", v=0)) == {"allocations"}
    shown = p.say("GET", f"/allocations/{C1}")
    nobody = "00000000-0000-0000-0000-000000000000"
    assert (shown["project_id"], shown["user_id"], shown["consumer_type"]) == (nobody, nobody, "unknown")


def test_usages(p):
    a = p.provider("a", VCPU=9, DISK_GB=9)
    p.allocate(C1, {a: {"VCPU": 2, "DISK_GB": 1}})
    p.say("PUT", f"/allocations/{C2}", p.holding({a: {"VCPU": 1}}) | {"consumer_type": "MIGRATION"})
    old = {k: x for k, x in p.holding({a: {"VCPU": 3}}).items() if k != "consumer_type"}
    p.say("PUT", f"/allocations/{C3}", old | {"user_id": "w"}, v=28)

    def of(query, v=39):
        return p.say("GET", f"/usages?project_id=p{query}", v=v)["usages"]

    assert of("", 37) == {"VCPU": 6, "DISK_GB": 1}
    assert of("&user_id=w", 37) == {"VCPU": 3}
    instances = {"VCPU": 2, "DISK_GB": 1, "consumer_count": 1}
    rest = {"MIGRATION": {"VCPU": 1, "consumer_count": 1}, "unknown": {"VCPU": 3, "consumer_count": 1}}
    assert of("") == {"INSTANCE": instances} | rest
    assert of("&consumer_type=all") == {"all": {"VCPU": 6, "DISK_GB": 1, "consumer_count": 3}}
    assert of("&consumer_type=INSTANCE") == {"INSTANCE": instances}
    assert of("&consumer_type=unknown") == {"unknown": rest["unknown"]}
    assert p.say("GET", "/usages?project_id=nobody")["usages"] == {}
    for bad in ("?user_id=u", "?project_id=p&consumer_type=x", "?project_id=p&junk=1", "?project_id="):
        p.refused(400, "GET", f"/usages{bad}")


def test_reshaping_moves_what_servers_hold(p):
    root = p.provider("root", VCPU=8, VGPU=4)
    child = p.provider("child", root)
    p.allocate(C1, {root: {"VCPU": 1, "VGPU": 2}})

    def shape(vgpus=4, held=2, generation=1, root_generation=2):
        return {
            "inventories": {
                root: {"resource_provider_generation": root_generation, "inventories": {"VCPU": {"total": 8}}},
                child: {"resource_provider_generation": 0, "inventories": {"VGPU": {"total": vgpus}}},
            },
            "allocations": {C1: p.holding({root: {"VCPU": 1}, child: {"VGPU": held}}, generation)},
        }

    assert p.refused(409, "POST", "/reshaper", shape(generation=7))["code"] == RACE
    assert p.refused(409, "POST", "/reshaper", shape(root_generation=7))["code"] == RACE
    assert p.refused(409, "POST", "/reshaper", shape(vgpus=1))["code"] == UNDEFINED
    unmoved = shape() | {"allocations": {}}
    assert p.refused(409, "POST", "/reshaper", unmoved)["code"] == "placement.inventory.inuse"
    nowhere = shape()
    nowhere["inventories"][C3] = nowhere["inventories"].pop(child)
    assert p.refused(400, "POST", "/reshaper", nowhere)["code"] == "placement.resource_provider.not_found"
    p.say("POST", "/reshaper", shape(), ok=204)
    held = p.say("GET", f"/allocations/{C1}")["allocations"]
    assert {x: of["resources"] for x, of in held.items()} == {root: {"VCPU": 1}, child: {"VGPU": 2}}
    assert set(p.say("GET", f"/resource_providers/{root}/inventories")["inventories"]) == {"VCPU"}
    # What is kept must fit, too: a consumer that is listed again does not hide behind what it held.
    smaller = shape(vgpus=1, generation=2, root_generation=p.generation(root))
    smaller["inventories"][child]["resource_provider_generation"] = p.generation(child)
    p.refused(409, "POST", "/reshaper", smaller)
    sums_hold(p)


# ---- many at once


def crowd(n, work):
    wrong = []

    def one(i):
        try:
            work(i)
        except Exception as e:
            wrong.append(e)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong, wrong[:3]


def test_many_who_allocate_never_get_more_than_there_is(tmp_path):
    p = Placement(tmp_path / "p.sqlite")
    a, b = p.provider("a", VCPU=9), p.provider("b", VCPU=9)
    told = Counter()

    def work(i):
        for k in range(6):
            consumer = p.ids.uuid()
            held = {a: {"VCPU": 1 + k % 2}, b: {"VCPU": 1}} if i % 2 else {b: {"VCPU": 1}, a: {"VCPU": 2}}
            status = p.ask("PUT", f"/allocations/{consumer}", p.holding(held)).status
            told[status] += 1
            if status == 204 and k % 3 == 0:
                assert p.ask("DELETE", f"/allocations/{consumer}").status == 204

    crowd(12, work)
    assert set(told) == {204, 409}
    used = p.say("GET", f"/resource_providers/{a}/usages")["usages"]["VCPU"]
    assert 0 < used <= 9
    sums_hold(p)
    p.db.close()


def test_of_those_who_saw_the_same_generation_one_writes(tmp_path):
    p = Placement(tmp_path / "p.sqlite")
    a = p.provider("a", VCPU=9)
    p.allocate(C1, {a: {"VCPU": 1}})
    now, told = p.generation(a), {"inventory": Counter(), "consumer": Counter(), "new": Counter(), "name": Counter()}

    def work(i):
        said = {"resource_provider_generation": now, "inventories": {"VCPU": {"total": 10 + i}}}
        told["consumer"][p.ask("PUT", f"/allocations/{C1}", p.holding({a: {"VCPU": 2}}, 1)).status] += 1
        told["new"][p.ask("PUT", f"/allocations/{C2}", p.holding({a: {"VCPU": 2}})).status] += 1
        told["name"][p.ask("POST", "/resource_providers", {"name": "same"}).status] += 1
        told["inventory"][p.ask("PUT", f"/resource_providers/{a}/inventories", said).status] += 1

    crowd(8, work)
    assert told["consumer"] == told["new"] == {204: 1, 409: 7}
    assert told["name"] == {200: 1, 409: 7}
    assert told["inventory"][200] <= 1 and told["inventory"][409] >= 7
    sums_hold(p)
    p.db.close()


# ---- junk


JUNK = (None, True, 0, -1, 1.5, 2**70, "", "x" * 300, "\x00", "é", [], [[]], {}, {"a": {}}, ["\x00"])


@pytest.mark.parametrize(
    "route", [r for r in R if r.method in ("PUT", "POST")], ids=lambda r: f"{r.method} {r.path} {r.versions.first}"
)
def test_junk_is_refused_and_never_our_fault(p, route):
    path = route.path.replace("{uuid}", p.provider("a", VCPU=1)).replace("{resource_class}", "VCPU")
    path = path.replace("{name}", "CUSTOM_X").replace("{consumer}", C1)
    v = min(route.versions.last, 39)
    names = [
        "name",
        "uuid",
        "inventories",
        "traits",
        "aggregates",
        "allocations",
        "resource_provider_generation",
        C1,
        "total",
    ]
    bodies = [*JUNK, *({n: j} for n in names for j in JUNK), *({n: {C1: {n: j}}} for n in names[2:6] for j in JUNK)]
    for body in bodies:
        for whole in (
            body,
            {"name": "n", "resource_provider_generation": 0, "total": 1} | body if isinstance(body, dict) else body,
        ):
            assert p.ask(route.method, path, msgspec.json.encode(whole), v=v).status < 500, whole
    for raw in (b"{", b"[" * 5000, b"\xff", b'{"total": 1e999}', b'{"a":1,"a":2}'):
        assert p.ask(route.method, path, raw, v=v).status < 500


@pytest.mark.parametrize("path", ["/resource_providers", "/traits", "/allocation_candidates", "/usages"])
def test_junk_in_queries(p, path):
    p.provider("a", VCPU=1)
    names = [
        "resources",
        "required",
        "member_of",
        "in_tree",
        "limit",
        "group_policy",
        "same_subtree",
        "root_required",
        "name",
        "uuid",
        "project_id",
        "associated",
        "resources1",
        "required_A",
        "consumer_type",
    ]
    values = [
        "",
        "x",
        "VCPU:1",
        "VCPU:99999999999999999999",
        "VCPU:1,VCPU:1",
        "in:",
        "!",
        "!in:",
        "in:!A",
        ",",
        "%00",
        "%ff",
        "é",
        "-1",
        "0",
        "1e9",
        "A" * 2000,
        C1,
    ]
    for name in names:
        for value in values:
            for v in (10, 25, 39):
                for query in (f"{name}={value}", f"resources=VCPU:1&{name}={value}", f"{name}={value}&{name}={value}"):
                    assert p.ask("GET", f"{path}?{query}", v=v).status < 500, query


# ---- with the rest of the cloud


def test_what_kilonova_claims_is_seen_and_what_others_write_counts(tmp_path):
    with telling(tmp_path) as cloud:
        headers = {"OpenStack-API-Version": "placement 1.39"}

        def say(method, path, body=None, ok=200):
            return cloud.services.json(method, f"/placement{path}", body, cloud.admin, ok=ok, **headers)

        s = cloud.boot("one")
        providers = {p["name"]: p["uuid"] for p in say("GET", "/resource_providers")["resource_providers"]}
        assert set(providers) == set(cloud.states)
        held = say("GET", f"/allocations/{s.id}")
        assert list(held["allocations"]) == [providers[s.row.host]]
        who = (held["project_id"], held["user_id"], held["consumer_type"], held["consumer_generation"])
        assert who == (cloud.user.project_id, cloud.user.id, "INSTANCE", 1)
        usage = say("GET", f"/usages?project_id={cloud.user.project_id}")["usages"]["INSTANCE"]
        assert usage["consumer_count"] == 1 and usage["VCPU"] == s.row.flavor.vcpus
        # A trait that an operator writes is looked at, and stays when the host reports the next time.
        other = next(name for name in cloud.states if name != s.row.host)
        say("PUT", "/traits/CUSTOM_QUIET", ok=201)
        at = f"/resource_providers/{providers[other]}"
        said = say("GET", f"{at}/traits")
        said["traits"].append("CUSTOM_QUIET")
        say("PUT", f"{at}/traits", said)
        cloud.report()
        cloud.tick()
        assert "CUSTOM_QUIET" in say("GET", f"{at}/traits")["traits"]
        quiet = {"name": "quiet", "vcpus": 1, "ram": 512, "disk": 1}
        id = cloud.json("POST", "/flavors", {"flavor": quiet}, token=cloud.admin)["flavor"]["id"]
        spec = {"extra_specs": {"trait:CUSTOM_QUIET": "required"}}
        cloud.json("POST", f"/flavors/{id}/os-extra_specs", spec, token=cloud.admin)
        cloud.pass_time(1)
        for name in ("a", "b", "c"):
            assert cloud.boot(name, flavor=id).row.host == other
        # What others hold of a host is not given out a second time.
        free = say("GET", f"/allocation_candidates?resources=VCPU:1,MEMORY_MB:512&in_tree={providers[other]}")
        stock = free["provider_summaries"][providers[other]]["resources"]["MEMORY_MB"]
        taken = {"allocations": {providers[other]: {"resources": {"MEMORY_MB": stock["capacity"] - stock["used"]}}}}
        foreign = taken | {"project_id": "p", "user_id": "u", "consumer_generation": None, "consumer_type": "OTHER"}
        say("PUT", f"/allocations/{C1}", foreign, ok=204)
        assert cloud.boot("d", flavor=id).status == "ERROR"
        say("DELETE", f"/allocations/{C1}", ok=204)
        cloud.pass_time(1)
        assert cloud.boot("e", flavor=id).row.host == other
        s.delete()
        cloud.settle()
        assert say("GET", f"/allocations/{s.id}") == {"allocations": {}}
        cloud.check()


@pytest.mark.clients
def test_the_client_from_pypi(tmp_path, capsys, monkeypatch):
    """`openstack resource …`, the plugin osc-placement, as it comes: each of its commands."""
    from importlib.metadata import entry_points

    from openstackclient import shell

    pytest.importorskip("osc_placement")
    monkeypatch.setenv("OS_PLACEMENT_API_VERSION", "1.39")
    cloud = Embedded(tmp_path, clock=WallClock())
    world = placement.World(cloud.db, cloud.clock, Ids())
    cloud.app.apps["/placement"] = placement.make_service(world, cloud.realm.gate)
    with cloud.served() as url:
        auth = [
            "--os-auth-url", f"{url}/identity/v3", "--os-username", "admin", "--os-password", ADMIN, "--os-project-name", "admin",
            "--os-user-domain-name", "Default", "--os-project-domain-name", "Default", "--os-region-name", "RegionOne",
        ]  # fmt: skip

        app = shell.OpenStackShell()  # as its interactive mode does it: it takes a second to begin
        app.initialized = False
        left = {e.name.replace("_", " ") for e in entry_points(group="openstack.placement.v1")}

        def openstack(line, json=True):
            left.difference_update(
                [max((c for c in left if line.startswith(f"{c} ") or line == c), key=len, default="")]
            )
            capsys.readouterr()
            words = [*line.split(), *(["-f", "json"] if json else [])]
            status = app.run_subcommand(words) if app.initialized else app.run([*auth, *words])
            app.initialized = True
            out, err = capsys.readouterr()
            assert status == 0, (line, err)
            return msgspec.json.decode(out) if json else out

        root = openstack("resource provider create host")["uuid"]
        child = openstack(f"resource provider create gpu --parent-provider {root}")["uuid"]
        assert len(openstack("resource provider list")) == 2
        openstack(
            f"resource provider inventory set {root} --resource VCPU=8 --resource MEMORY_MB=1024 --resource VCPU:allocation_ratio=2.0"
        )
        openstack(f"resource provider inventory set {child} --resource VGPU=2")
        shown = {x["resource_class"]: x for x in openstack(f"resource provider inventory list {root}")}
        assert shown["VCPU"]["allocation_ratio"] == 2.0
        openstack("trait create CUSTOM_BLUE", json=False)
        openstack(f"resource provider trait set {child} --trait CUSTOM_BLUE")
        assert [x["name"] for x in openstack(f"resource provider trait list {child}")] == ["CUSTOM_BLUE"]
        openstack(f"resource provider aggregate set {root} --aggregate {A1} --generation 1")
        openstack("resource class create CUSTOM_GOLD", json=False)
        found = openstack("allocation candidate list --resource VCPU=10 --resource VGPU=1 --required CUSTOM_BLUE")
        assert {x["resource provider"] for x in found} == {root, child}
        project = cloud.first.admin_project_id
        openstack(
            f"resource provider allocation set {C1} --allocation rp={root},VCPU=10 --allocation rp={child},VGPU=1 "
            f"--project-id {project} --user-id u --consumer-type INSTANCE"
        )
        assert {x["resource_provider"] for x in openstack(f"resource provider allocation show {C1}")} == {root, child}
        assert openstack(f"resource usage show {project}")
        usage = {x["resource_class"]: x["usage"] for x in openstack(f"resource provider usage show {root}")}
        assert usage == {"VCPU": 10, "MEMORY_MB": 0}
        openstack(f"resource provider allocation unset {C1} --provider {child}")
        assert {x["resource_provider"] for x in openstack(f"resource provider allocation show {C1}")} == {root}
        openstack(f"resource provider allocation delete {C1}", json=False)
        assert openstack(f"resource provider inventory show {root} VCPU")["total"] == 8
        openstack(f"resource provider inventory class set {root} VCPU --total 9")
        assert openstack(f"resource provider inventory show {root} VCPU")["total"] == 9
        openstack(f"resource provider inventory delete {root} --resource-class VCPU", json=False)
        assert [x["resource_class"] for x in openstack(f"resource provider inventory list {root}")] == ["MEMORY_MB"]
        assert [x["uuid"] for x in openstack(f"resource provider aggregate list {root}")] == [A1]
        assert openstack(f"resource provider set {root} --name other")["name"] == "other"
        assert openstack(f"resource provider show {root}")["name"] == "other"
        openstack(f"resource provider trait delete {child}", json=False)
        assert openstack(f"resource provider trait list {child}") == []
        assert {"name": "CUSTOM_BLUE"} in openstack("trait list") and openstack("trait show CUSTOM_BLUE")
        openstack("trait delete CUSTOM_BLUE", json=False)
        openstack("resource class set CUSTOM_SILVER", json=False)
        assert openstack("resource class show CUSTOM_SILVER") == {"name": "CUSTOM_SILVER"}
        openstack("resource class delete CUSTOM_SILVER", json=False)
        assert {"name": "CUSTOM_GOLD"} in openstack("resource class list")
        openstack(f"resource provider delete {child}", json=False)
        openstack(f"resource provider delete {root}", json=False)
        assert openstack("resource provider list") == []
        assert left == set()
