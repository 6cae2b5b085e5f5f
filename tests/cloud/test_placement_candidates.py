"""Allocation candidates: which combinations of providers serve a query, at each version, and what is wrong with a query."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilonova.model.candidates import SHARES, Forest, Group, Inventory, Provider, Query, candidates
from tests.cloud.placements import Placement

A1, A2, A3 = (f"00000000-0000-4000-8000-0000000000a{i}" for i in (1, 2, 3))
AVX, SSD = "HW_CPU_X86_AVX", "STORAGE_DISK_SSD"


@pytest.fixture
def p():
    """Two compute hosts (one with NUMA cells that have GPUs), and storage that both share."""
    p = Placement()
    p.one = p.provider("one", VCPU=8, DISK_GB=10, traits=(AVX,), aggregates=(A1,))
    p.two = p.provider("two", VCPU=4, aggregates=(A1, A2))
    p.cell0 = p.provider("cell0", p.two, MEMORY_MB=64, traits=("CUSTOM_CELL",))
    p.cell1 = p.provider("cell1", p.two, MEMORY_MB=64, traits=("CUSTOM_CELL", AVX))
    p.gpu0 = p.provider("gpu0", p.cell0, VGPU=2, traits=("CUSTOM_BLUE",))
    p.gpu1 = p.provider("gpu1", p.cell1, VGPU=2, traits=("CUSTOM_RED",), aggregates=(A3,))
    p.share = p.provider("share", DISK_GB=100, traits=(SHARES, SSD), aggregates=(A1,))
    yield p
    p.db.close()


def found(p, query, v=39):
    """Each as a text: `one:VCPU=1 share:DISK_GB=5`."""
    return {
        " ".join(f"{n}:{','.join(f'{c}={x}' for c, x in sorted(of.items()))}" for n, of in sorted(c.items()))
        for c in p.candidates(query, v)
    }


def test_one_provider_alone(p):
    assert found(p, "resources=VCPU:5") == {"one:VCPU=5"}
    assert found(p, "resources=VCPU:9") == set()
    assert found(p, "resources=VCPU:1,VGPU:1", v=28) == set()  # before 1.29 no children are mixed with their parents
    assert found(p, "resources=VCPU:1,VGPU:1") == {"gpu0:VGPU=1 two:VCPU=1", "gpu1:VGPU=1 two:VCPU=1"}
    assert found(p, "resources=VGPU:1", v=28) == {"gpu0:VGPU=1", "gpu1:VGPU=1"}


def test_who_shares_serves_the_trees_of_its_aggregate(p):
    on_share = {"one:VCPU=1 share:DISK_GB=5", "share:DISK_GB=5 two:VCPU=1"}
    assert found(p, "resources=VCPU:1,DISK_GB:5") == on_share | {"one:DISK_GB=5,VCPU=1"}
    assert found(p, "resources=VCPU:1,DISK_GB:5", v=12) == on_share | {"one:DISK_GB=5,VCPU=1"}
    assert found(p, "resources=DISK_GB:50") == {"share:DISK_GB=50"}
    assert found(p, f"resources=VCPU:1,DISK_GB:5&required={SSD}") == on_share
    assert found(p, f"resources=VCPU:1,DISK_GB:5&required=!{SSD}") == {"one:DISK_GB=5,VCPU=1"}
    assert found(p, f"resources=VCPU:1,DISK_GB:5&in_tree={p.one}") == {"one:DISK_GB=5,VCPU=1"}
    assert found(p, f"resources=VCPU:1&resources1=DISK_GB:5&in_tree1={p.share}") == on_share


def test_traits(p):
    assert found(p, f"resources=VCPU:1&required={AVX}") == {"one:VCPU=1"}
    assert found(p, f"resources=VCPU:1&required=!{AVX}") == {"two:VCPU=1"}
    p.refused(400, "GET", f"/allocation_candidates?resources=VCPU:1&required=!{AVX}", v=21)
    assert found(p, "resources=VGPU:1&required=in:CUSTOM_RED,CUSTOM_BLUE") == {"gpu0:VGPU=1", "gpu1:VGPU=1"}
    assert found(p, "resources=VGPU:1&required=in:CUSTOM_RED,CUSTOM_BLUE&required=CUSTOM_RED") == {"gpu1:VGPU=1"}
    assert found(p, "resources=VGPU:1&required=CUSTOM_BLUE&required=CUSTOM_RED", v=38) == {"gpu1:VGPU=1"}
    # The traits may be on any of the providers that are used.
    assert found(p, "resources=VCPU:1,VGPU:1&required=CUSTOM_RED") == {"gpu1:VGPU=1 two:VCPU=1"}


def test_aggregates(p):
    assert found(p, f"resources=VCPU:1&member_of={A2}", v=21) == {"two:VCPU=1"}
    assert found(p, f"resources=VCPU:1&member_of=in:{A1},{A2}") == {"one:VCPU=1", "two:VCPU=1"}
    assert found(p, f"resources=VCPU:1&member_of={A1}&member_of={A2}", v=24) == {"two:VCPU=1"}
    assert found(p, f"resources=VCPU:1&member_of=!{A2}", v=32) == {"one:VCPU=1"}
    assert found(p, f"resources=VCPU:1&member_of=!in:{A1},{A2}", v=32) == set()
    # What the root is a member of counts for its whole tree, where several providers serve; else it must be itself.
    assert found(p, f"resources=VGPU:1&member_of={A2}") == {"gpu0:VGPU=1", "gpu1:VGPU=1"}
    assert found(p, f"resources1=VGPU:1&member_of1={A2}") == set()
    assert found(p, f"resources1=VGPU:1&member_of1={A3}") == {"gpu1:VGPU=1"}
    assert found(p, f"resources=VGPU:1&member_of=!{A2}") == set()


def test_groups_are_served_by_one_each(p):
    two = "resources1=VGPU:1&resources2=VGPU:1&resources=VCPU:1&group_policy="
    together = {"gpu0:VGPU=2 two:VCPU=1", "gpu1:VGPU=2 two:VCPU=1"}
    apart = {"gpu0:VGPU=1 gpu1:VGPU=1 two:VCPU=1"}
    assert found(p, f"{two}none") == together | apart
    assert found(p, f"{two}isolate") == apart
    assert len(p.candidates(f"{two}isolate")) == 2  # who serves which
    assert found(p, "resources1=VGPU:2&resources2=VGPU:1&group_policy=none") == {
        "gpu0:VGPU=1 gpu1:VGPU=2",
        "gpu0:VGPU=2 gpu1:VGPU=1",
    }
    three = "&".join(f"resources{i}=VGPU:2" for i in (1, 2, 3))
    assert found(p, f"{three}&group_policy=none") == set()
    said = p.say("GET", "/allocation_candidates?resources_A=VGPU:1&required_A=CUSTOM_RED&resources=VCPU:1")
    (one,) = said["allocation_requests"]
    assert one["mappings"] == {"_A": [p.gpu1], "": [p.two]}
    assert "mappings" not in p.say("GET", "/allocation_candidates?resources=VCPU:1", v=33)["allocation_requests"][0]
    assert found(p, f"resources1=VGPU:1&in_tree1={p.cell0}&required1=!CUSTOM_BLUE") == {"gpu1:VGPU=1"}


def test_subtrees(p):
    near = "resources_G=VGPU:1&resources_M=MEMORY_MB:8&group_policy=none"
    apart = {"cell0:MEMORY_MB=8 gpu1:VGPU=1", "cell1:MEMORY_MB=8 gpu0:VGPU=1"}
    close = {"cell0:MEMORY_MB=8 gpu0:VGPU=1", "cell1:MEMORY_MB=8 gpu1:VGPU=1"}
    assert found(p, near) == apart | close
    assert found(p, f"{near}&same_subtree=_G,_M") == close
    # A group without resources stands between two others.
    both = "resources_1=VGPU:1&resources_2=VGPU:1&required_C=CUSTOM_CELL&group_policy=none"
    assert found(p, f"{both}&same_subtree=_1,_2,_C") == {"gpu0:VGPU=2", "gpu1:VGPU=2"}
    assert found(p, "resources_1=VGPU:1&required_C=HW_CPU_X86_AVX&group_policy=none&same_subtree=_1,_C") == {
        "gpu1:VGPU=1"
    }


def test_roots(p):
    assert found(p, f"resources=VCPU:1&root_required={AVX}") == {"one:VCPU=1"}
    assert found(p, f"resources=VCPU:1&root_required=!{AVX}") == {"two:VCPU=1"}
    assert found(p, f"resources=VGPU:1&root_required={AVX}") == set()


def test_what_is_used_counts_and_what_does_not_divide(p):
    p.say("PUT", "/resource_classes/CUSTOM_X")
    x = p.provider("x", CUSTOM_X={"total": 10, "reserved": 2, "min_unit": 2, "max_unit": 6, "step_size": 2})
    assert [n for n in range(1, 9) if found(p, f"resources=CUSTOM_X:{n}")] == [2, 4, 6]
    p.allocate(A1, {x: {"CUSTOM_X": 4}})
    assert [n for n in range(1, 9) if found(p, f"resources=CUSTOM_X:{n}")] == [2, 4]
    said = p.say("GET", "/allocation_candidates?resources=CUSTOM_X:2")
    assert said["provider_summaries"][x]["resources"] == {"CUSTOM_X": {"capacity": 8, "used": 4}}


def test_how_much_is_shown_grew(p):
    def said(v):
        return p.say("GET", "/allocation_candidates?resources=VCPU:1", v=v)

    assert said(11)["allocation_requests"][0]["allocations"] == [
        {"resource_provider": {"uuid": p.one}, "resources": {"VCPU": 1}}
    ]
    assert said(12)["allocation_requests"][0]["allocations"] == {p.one: {"resources": {"VCPU": 1}}}
    assert set(said(16)["provider_summaries"][p.one]) == {"resources"}
    assert said(17)["provider_summaries"][p.one]["traits"] == [AVX]
    assert set(said(26)["provider_summaries"][p.one]["resources"]) == {"VCPU"}
    assert set(said(27)["provider_summaries"][p.one]["resources"]) == {"VCPU", "DISK_GB"}
    assert set(said(28)["provider_summaries"]) == {p.one, p.two}
    tree = {p.one, p.two, p.cell0, p.cell1, p.gpu0, p.gpu1}
    assert set(said(29)["provider_summaries"]) == tree
    assert said(29)["provider_summaries"][p.gpu0]["parent_provider_uuid"] == p.cell0
    assert said(29)["provider_summaries"][p.gpu0]["root_provider_uuid"] == p.two


def test_what_is_found_can_be_allocated(p):
    said = p.say("GET", "/allocation_candidates?resources=VCPU:1,VGPU:1,DISK_GB:5&limit=1")
    (request,) = said["allocation_requests"]
    who = {"project_id": "p", "user_id": "u", "consumer_generation": None, "consumer_type": "INSTANCE"}
    p.say("PUT", f"/allocations/{A1}", request | who, ok=204)


def test_limits():
    for how in ({}, {"candidates_order": "breadth-first"}, {"randomize_candidates": True}):
        p = Placement(**how)
        roots = [p.provider(f"r{i}") for i in range(4)]
        for i, k in itertools.product(range(4), range(3)):
            p.provider(f"c{i}{k}", roots[i], VGPU=1)

        def tops(query, p=p):
            return [next(iter(c))[1] for c in p.candidates(query)]

        assert len(tops("resources=VGPU:1")) == 12
        assert len(tops("resources=VGPU:1&limit=4")) == 4
        assert (len(set(tops("resources=VGPU:1&limit=4"))) == 4) == (
            "candidates_order" in how
        ) or "randomize_candidates" in how
        assert p.candidates("resources=VGPU:2&limit=4") == []
        p.db.close()
    p = Placement(candidates_max=2)
    for i in range(5):
        p.provider(f"p{i}", VCPU=1)
    assert len(p.candidates("resources=VCPU:1")) == 2


@pytest.mark.parametrize(
    ("query", "v", "code"),
    [
        ("", 39, "placement.query.missing_value"),
        ("", 35, ""),
        ("", 24, ""),
        ("required=HW_CPU_X86_AVX", 39, "placement.query.missing_value"),
        ("resources=", 39, ""),
        ("resources=VCPU:0", 39, ""),
        ("resources=VCPU:x", 39, ""),
        ("resources=CUSTOM_NOPE:1", 39, ""),
        ("resources=VCPU:1&required=CUSTOM_NOPE", 39, ""),
        ("resources=VCPU:1&required=HW_CPU_X86_AVX,!HW_CPU_X86_AVX", 39, ""),
        ("resources=VCPU:1&required=in:HW_CPU_X86_AVX", 38, ""),
        ("resources=VCPU:1&required1=HW_CPU_X86_AVX", 39, "placement.query.bad_value"),
        ("resources=VCPU:1&required1=HW_CPU_X86_AVX", 35, ""),
        ("resources1=VCPU:1&required=HW_CPU_X86_AVX", 39, "placement.query.bad_value"),
        ("resources1=VCPU:1&resources2=VCPU:1", 39, ""),
        ("resources1=VCPU:1", 24, ""),
        ("resources_A=VCPU:1", 32, ""),
        ("resources01=VCPU:1", 32, ""),
        ("resources1=VCPU:1&group_policy=each", 39, ""),
        ("resources=VCPU:1&group_policy=none", 24, ""),
        ("resources=VCPU:1&limit=0", 39, ""),
        ("resources=VCPU:1&limit=x", 39, ""),
        ("resources=VCPU:1&limit=1", 15, ""),
        ("resources=VCPU:1&in_tree=x", 39, ""),
        (f"resources=VCPU:1&in_tree={A1}", 30, ""),
        ("resources=VCPU:1&member_of=x", 39, ""),
        (f"resources=VCPU:1&member_of={A1}", 20, ""),
        (f"resources=VCPU:1&member_of={A1}&member_of={A2}", 23, ""),
        (f"resources=VCPU:1&member_of={A1},{A2}", 39, ""),
        ("resources=VCPU:1&root_required=HW_CPU_X86_AVX&root_required=HW_CPU_X86_AVX2", 39, "placement.query.duplicate_key"),
        ("resources=VCPU:1&root_required=in:HW_CPU_X86_AVX,HW_CPU_X86_AVX2", 39, ""),
        ("resources=VCPU:1&root_required=HW_CPU_X86_AVX", 34, ""),
        ("resources1=VCPU:1&same_subtree=1,2", 39, "placement.query.bad_value"),
        ("resources1=VCPU:1&same_subtree=1,", 39, "placement.query.bad_value"),
        ("resources1=VCPU:1&same_subtree=1", 35, ""),
        ("resources=VCPU:1&junk=1", 39, ""),
    ],
)  # fmt: skip
def test_what_makes_no_sense(p, query, v, code):
    error = p.refused(400, "GET", f"/allocation_candidates?{query}", v=v)
    assert error.get("code", "") == (code or ("placement.undefined_code" if v >= 23 else "")), error


def test_groups_that_can_never_be_served_end_soon(p):
    """Eight GPUs wanted apart, of seven: no long search, and no candidate."""
    root = p.provider("wide")
    for i in range(7):
        p.provider(f"g{i}", root, FPGA=9)
    query = "&".join(f"resources{i}=FPGA:1" for i in range(1, 9))
    assert p.candidates(f"{query}&group_policy=isolate") == []


# ---- against a plain search

AMOUNTS = st.dictionaries(st.sampled_from(["A", "B", "C"]), st.integers(1, 3), min_size=1, max_size=2)
PROVIDERS = st.lists(
    st.tuples(
        st.integers(-1, 4), st.dictionaries(st.sampled_from(["A", "B", "C"]), st.integers(1, 4), max_size=3), st.booleans(), st.booleans()
    ),
    min_size=1,
    max_size=5,
)  # fmt: skip


def forest_of(rows):
    made = {}
    for i, (parent, stocks, marked, shares) in enumerate(rows):
        above = made.get(f"p{parent}") if parent < i else None
        traits = {t for t, yes in (("T", marked), (SHARES, shares and above is None)) if yes}
        made[f"p{i}"] = Provider(
            f"p{i}", f"p{i}", above and above.uuid, above.root if above else f"p{i}", 0, 0.0, 0.0,
            {c: Inventory(n, 0, 1, 99, 1, 1.0, 0) for c, n in stocks.items()}, frozenset(traits), frozenset({"agg"} if marked or shares else ()),
        )  # fmt: skip
    return Forest(made)


def plainly(forest, query):
    """Every way to give each part to somebody, looked at one by one."""
    parts = [("", {c: n}) for c, n in query.groups[""].resources.items()] if "" in query.groups else []
    parts += [(s, g.resources) for s, g in query.groups.items() if s]
    right = set()
    for root in forest.trees:
        for chosen in itertools.product(forest.near(root), repeat=len(parts)):
            want = {}
            for (_, amounts), p in zip(parts, chosen, strict=True):
                for c, n in amounts.items():
                    want[p.uuid, c] = want.get((p.uuid, c), 0) + n
            fits = all(
                c in forest.providers[p].inventories and n <= forest.providers[p].inventories[c].total
                for (p, c), n in want.items()
            )
            own = [p for (s, _), p in zip(parts, chosen, strict=True) if s]
            marked = all(
                any("T" in p.traits for (s, _), p in zip(parts, chosen, strict=True) if s == suffix)
                for suffix, g in query.groups.items()
                if g.required
            )
            if fits and marked and not (query.isolate and len(set(own)) < len(own)):
                right.add(tuple((s, p.uuid, *amounts) for (s, amounts), p in zip(parts, chosen, strict=True)))
    return right


@settings(max_examples=150)
@given(PROVIDERS, AMOUNTS, st.lists(AMOUNTS, max_size=2), st.booleans(), st.booleans(), st.booleans())
def test_as_a_plain_search_would(rows, free, groups, isolate, breadth_first, marked):
    forest = forest_of(rows)
    need = (frozenset({"T"}),) if marked else ()
    asked = {"": Group(free, required=need)} | {f"_{i}": Group(g, required=need) for i, g in enumerate(groups)}
    found = list(candidates(forest, Query(asked, isolate=isolate), breadth_first=breadth_first))
    expect = plainly(forest, Query(asked, isolate=isolate))
    assert len(found) == len(expect)
    for c in found:
        for suffix, group in asked.items():
            assert {n for p in c.mappings[suffix] for n in c.allocations[p]} >= set(group.resources)


@pytest.mark.parametrize("seed", range(6))
def test_no_answer_is_older_than_the_last_write(seed):
    """Whatever was written, and with whatever clock: who remembers much says the same as who has just begun."""
    dice, asker = random.Random(seed), Placement()
    providers, consumers, first = [], {}, asker.clock.at

    def some():
        return providers[dice.randrange(len(providers))]

    def write():
        at = f"/resource_providers/{some()}" if providers else ""
        what = dice.choice(
            ["provider", "allocate", "allocate", "release", "stocks", "traits", "aggregates", "rename", "gone"]
        )
        if not providers or (what == "provider" and len(providers) < 8):
            under = some() if providers and seed % 2 and dice.random() < 0.3 else None
            providers.append(asker.provider(f"p{dice.random()}", under, VCPU=dice.randint(2, 9)))
        elif what == "allocate":
            consumer = asker.ids.uuid()
            body = asker.holding({some(): {"VCPU": 1}})
            if asker.ask("PUT", f"/allocations/{consumer}", body).status == 204:
                consumers[consumer] = True
        elif what == "release" and consumers:
            asker.say("DELETE", f"/allocations/{consumers.popitem()[0]}")
        elif what == "stocks":
            stock = {"resource_provider_generation": asker.generation(at[20:]), "total": dice.randint(1, 9)}
            asker.ask("PUT", f"{at}/inventories/VCPU", stock)
        elif what == "traits":
            marks = dice.sample([AVX, SSD, SHARES] if seed % 3 == 0 else [AVX, SSD], 1)
            told = {"resource_provider_generation": asker.generation(at[20:]), "traits": marks}
            asker.say("PUT", f"{at}/traits", told)
        elif what == "aggregates":
            asker.say("PUT", f"{at}/aggregates", [dice.choice([A1, A2])], v=18)
        elif what == "rename":
            asker.say("PUT", at, {"name": f"n{dice.random()}"}, v=13)
        elif what == "gone" and asker.ask("DELETE", at).status == 204:
            providers.remove(at[20:])

    for _ in range(40):
        asker.clock.at = first + dice.choice([0, 0, 1, 3, 60, -2, -100])
        write()
        for query in ("resources=VCPU:1", f"resources=VCPU:1&required={AVX}", "resources=VCPU:2&limit=3"):
            for v in (17, 28, 33, 39):
                said = asker.say("GET", f"/allocation_candidates?{query}", v=v)
                assert said == Placement(db=asker.db).say("GET", f"/allocation_candidates?{query}", v=v)
    asker.db.close()
