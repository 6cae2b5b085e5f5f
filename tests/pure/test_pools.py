"""Providers that share with hosts through an aggregate: they are chosen, claimed and given back with their hosts."""

import uuid

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kilonova.compute.report import parted
from kilonova.contracts.conductor import Report
from kilonova.contracts.scheduler import Choose
from kilonova.kit.errors import NoCapacity
from kilonova.model.ask import ask, served
from kilonova.model.candidates import SHARES, within
from kilonova.model.flavor import Flavor
from kilonova.model.host import Stock
from kilonova.model.options import Compute
from kilonova.model.server import Server
from kilonova.store import hosts, placement, providers, seats
from kilonova.store.trees import Trees
from tests.pure.test_scheduler import FACTS, House

ASK = {"VCPU": 1, "MEMORY_MB": 512, "DISK_GB": 10}
AGGREGATES = [str(uuid.UUID(int=n, version=4)) for n in range(1, 4)]


def bare(house, name, **more):
    """A host without disks of its own."""
    facts = msgspec.structs.replace(FACTS, hypervisor_hostname=name, **more)
    own = [Stock("VCPU", 8), Stock("MEMORY_MB", 16_384)]
    r = Report(name, house.clock.now(), 1.0, [], facts=parted(facts, Compute()), stocks=own)
    house.tx(hosts.learn, r, uuid=house.ids.uuid, now=house.clock.now())
    return house


def provider_of(house, host):
    return next(n.uuid for n in house.tx(hosts.nodes) if n.host == host)


def pool(house, name, stocks, aggregates, traits=()):
    id = str(uuid.uuid5(uuid.NAMESPACE_DNS, name))
    house.tx(placement.offer, id, name, stocks, {SHARES, *traits}, now=house.clock.now())
    house.tx(providers.set_aggregates, id, aggregates)
    return id


def share(house, host, *aggregates):
    house.tx(providers.set_aggregates, provider_of(house, host), aggregates)


def held(house, consumer):
    return house.tx(placement.allocations_of, consumer)


def server(id="s", **specs):
    return Server(id, "p", "u", id, id, Flavor("1", "f", 1, 512, 10, extra_specs=specs))


def placed(house, s, most=9):
    return house.scheduler.choose(Choose(server=s.id, ask=ask(s), most=most, fresh=True))


def settled(house, s):
    """It is chosen and claimed, as a build does it. The host's name."""
    place = placed(house, s).places[0]
    house.tx(seats.claim, s, place.provider, now=house.clock.now(), new=True, shared=place.shared)
    return place.host


@pytest.fixture
def house():
    """a and b get their disks of a pool; c has its own; d has none at all."""
    h = House()
    for name in "abd":
        bare(h, name)
    h.host("c")
    h.pool = pool(h, "nfs", [Stock("DISK_GB", 25)], AGGREGATES[:1])
    for name in "ab":
        share(h, name, AGGREGATES[0])
    return h


def test_a_pool_is_chosen_claimed_counted_and_given_back(house):
    assert {p.host: p.shared for p in placed(house, server()).places} == {"a": True, "b": True, "c": False}
    for id in ("s1", "s2"):
        place = next(p for p in placed(house, server(id)).places if p.host == ("a" if id == "s1" else "b"))
        house.tx(seats.claim, server(id), place.provider, now=house.clock.now(), new=True, shared=place.shared)
        assert held(house, id) == {place.provider: {"VCPU": 1, "MEMORY_MB": 512}, house.pool: {"DISK_GB": 10}}
    chosen = placed(house, server("s3"))
    assert {p.host for p in chosen.places} == {"c"}
    assert house.choose(host="a", amounts=ASK).why == {"named": 3, "room": 1}
    with pytest.raises(NoCapacity):
        house.tx(seats.claim, server("s3"), provider_of(house, "a"), now=house.clock.now(), shared=True)
    house.tx(placement.release, "s1", provider_of(house, "a"), now=house.clock.now())
    assert held(house, "s1") == {}
    assert {p.host for p in placed(house, server("s3")).places} == {"a", "b", "c"}


def test_what_is_held_of_one_host_goes_and_the_pool_s_share_stays_with_the_other(house):
    a, c = provider_of(house, "a"), provider_of(house, "c")
    house.tx(seats.claim, server(), a, now=house.clock.now(), shared=True)
    house.tx(placement.claim, "s", c, {"VCPU": 1}, now=house.clock.now(), project_id="p", user_id="u")
    house.tx(placement.release, "s", c, now=house.clock.now())
    assert set(held(house, "s")) == {a, house.pool}
    house.tx(placement.release, "s", a, now=house.clock.now())
    assert held(house, "s") == {}


def test_a_burst_does_not_promise_a_pool_twice(house):
    """Nobody has claimed yet, and all the same the third asks in vain for what the first two were promised."""
    wish = {"amounts": ASK | {"DISK_GB": 12}, "avoid": ["c"], "most": 1}
    assert {house.choose(**wish).places[0].host for _ in range(2)} == {"a", "b"}
    assert house.scheduler.hosts.beside[house.scheduler.hosts.classes["DISK_GB"]].max() == 1
    house.clock.at += 11  # nobody claimed what was chosen
    assert house.choose(**wish).places


def test_changes_of_a_pool_and_of_its_aggregates_are_seen(house):
    assert house.names(amounts=ASK) == {"a", "b", "c"}
    share(house, "d", AGGREGATES[0])
    share(house, "b", AGGREGATES[1])
    assert house.names(amounts=ASK) == {"a", "c", "d"}
    house.clock.at += 1
    house.tx(providers.set_stocks, house.pool, [Stock("DISK_GB", 5)], keep=False)
    house.tx(placement.lock, house.pool, house.clock.at)
    assert house.names(amounts=ASK, fresh=True) == {"c"}
    house.clock.at += 1
    house.tx(providers.set_stocks, house.pool, [], keep=False)
    house.tx(placement.lock, house.pool, house.clock.at)
    assert house.names(amounts=ASK | {"DISK_GB": 1}, fresh=True) == {"c"}
    house.clock.at += 1
    house.tx(providers.set_stocks, house.pool, [Stock("DISK_GB", 50)], keep=False)
    house.tx(placement.lock, house.pool, house.clock.at)
    assert house.names(amounts=ASK, fresh=True) == {"a", "c", "d"}


@pytest.mark.parametrize(
    ("specs", "who"),
    [
        ({"trait:CUSTOM_FAST": "required"}, {"a", "b"}),
        ({"trait:CUSTOM_FAST": "forbidden"}, {"c"}),
        ({"trait:CUSTOM_SLOW": "required"}, set()),
        ({"trait:CUSTOM_FAST": "required", "trait:HW_CPU_X86_AVX2": "required"}, {"a"}),
        ({"resources:DISK_GB": "0", "resources1:DISK_GB": "10", "trait1:CUSTOM_FAST": "required"}, {"a", "b"}),
        ({"resources1:DISK_GB": "10", "resources2:DISK_GB": "10", "group_policy": "isolate"}, set()),
        ({"resources1:DISK_GB": "10", "resources2:DISK_GB": "10", "group_policy": "none"}, {"a", "b", "c"}),
    ],
)
def test_traits_may_be_the_pool_s(specs, who):
    h = bare(bare(House(), "a"), "b", traits=[]).host("c")
    pool(h, "nfs", [Stock("DISK_GB", 25)], AGGREGATES[:1], ["CUSTOM_FAST"])
    for name in "ab":
        share(h, name, AGGREGATES[0])
    s = server(**specs)
    places = placed(h, s).places
    assert {p.host for p in places} == who
    for p in places:
        mine = msgspec.structs.replace(s, id=p.host)
        h.tx(seats.claim, mine, p.provider, now=h.clock.now(), shared=p.shared)
        h.tx(placement.release, p.host, now=h.clock.now())


def test_a_host_with_a_pool_does_not_count_the_pool_as_its_own(house):
    """It is mounted on each of its hosts, which all see the same free space."""
    c = provider_of(house, "c")
    house.claim("c", {"DISK_GB": 3}, "old")
    share(house, "c", AGGREGATES[0])
    house.clock.at += 1
    house.host("c")
    stock, used = house.tx(placement.stocks, [c])[c]["DISK_GB"]
    assert (stock.total - stock.reserved, used) == (0, 3)  # until who is there has gone
    house.tx(placement.release, "old", now=house.clock.now())
    house.host("c")
    assert "DISK_GB" not in house.tx(placement.stocks, [c])[c]
    assert {p.host for p in placed(house, server()).places if p.shared} == {"a", "b", "c"}
    share(house, "c")
    house.host("c")
    assert "DISK_GB" in house.tx(placement.stocks, [c])[c]


def test_what_is_used_already_is_written_down_with_the_pool(house):
    """Its claim was lost: host and pool are claimed anew, also where there is no room."""
    house.claim("a", {"VCPU": 8}, "other")
    a = provider_of(house, "a")
    assert house.tx(seats.claim_anyhow, server(), a, now=house.clock.now())
    assert held(house, "s") == {a: {"VCPU": 1, "MEMORY_MB": 512}, house.pool: {"DISK_GB": 10}}
    used = {p: {c: used for c, (_, used) in of.items()} for p, of in house.tx(placement.stocks).items()}
    assert used[a] == {"VCPU": 9, "MEMORY_MB": 512} and used[house.pool] == {"DISK_GB": 10}


# ---- against a plain chooser


GROUPS = st.sampled_from([{0}, {0}, {0, 1}, {1}, set()])
CLOUD = st.tuples(
    # of each host: VCPU, DISK_GB of its own, its aggregates, has it AVX2?
    st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from([0, 0, 8, 20]), GROUPS, st.booleans()),
        min_size=1,
        max_size=4,
    ),
    # of each pool: DISK_GB, CUSTOM_GOLD, step, its aggregates, is it fast?
    st.lists(
        st.tuples(
            st.sampled_from([6, 25, 40]),
            st.sampled_from([0, 2]),
            st.sampled_from([1, 5, 5]),
            GROUPS,
            st.booleans(),
        ),
        min_size=1,
        max_size=2,
    ),
)
WISH = st.tuples(
    st.integers(1, 3),
    st.sampled_from([5, 11, 16]),
    st.sampled_from([0, 0, 1]),
    st.sampled_from(["", "HW_CPU_X86_AVX2", "CUSTOM_FAST"]),
    st.sampled_from(["", "CUSTOM_FAST"]),
    st.sampled_from(["", "", "none", "isolate"]),
)


@example(([(2, 0, {0}, True)], [(40, 0, 5, {0}, False)]), (1, 11, 0, "", "", ""))  # the pool gives by fives
@example(
    ([(2, 20, {0}, True)], [(40, 2, 1, {0}, True)]), (1, 11, 1, "", "CUSTOM_FAST", "")
)  # gold is where it must not be
@settings(max_examples=40)
@given(CLOUD, WISH)
def test_as_the_placement_api_would_and_as_the_claim_does(cloud, wish):
    """The same hosts by columns, by a walk over all providers as the API shows them, and by the claim itself."""
    house = House()
    rows, pools = cloud
    for i, (vcpus, disk_gb, groups, has) in enumerate(rows):
        bare(house, f"h{i}", traits=["HW_CPU_X86_AVX2"] if has else [])
        own = [Stock("VCPU", vcpus), Stock("MEMORY_MB", 4096)] + ([Stock("DISK_GB", disk_gb)] if disk_gb else [])
        house.tx(providers.set_stocks, provider_of(house, f"h{i}"), own, keep=False)
        share(house, f"h{i}", *(AGGREGATES[g] for g in groups))
    for i, (disk_gb, gold, step, groups, fast) in enumerate(pools):
        some = [Stock("DISK_GB", disk_gb, step_size=step)] if disk_gb else []
        some += [Stock("CUSTOM_GOLD", gold)] if gold else []
        pool(house, f"p{i}", some, [AGGREGATES[g] for g in groups], ["CUSTOM_FAST"] if fast else [])
    vcpus, disk_gb, gold, required, forbidden, how = wish
    specs = {"resources:CUSTOM_GOLD": str(gold)} if gold else {}
    specs |= {f"trait:{required}": "required"} if required else {}
    specs |= {f"trait:{forbidden}": "forbidden"} if forbidden and forbidden != required else {}
    if how:
        specs |= {
            "resources1:DISK_GB": "5",
            "resources2:VCPU": "1",
            "group_policy": "isolate" if how == "isolate" else "none",
        }
    s = Server("s", "p", "u", "s", "s", Flavor("1", "f", vcpus, 512, disk_gb, extra_specs=specs))
    house.tx(hosts.mark)
    asked = ask(s)
    with house.db.read() as tx:
        forest = Trees().look(tx)
    expect = {
        n.host
        for n in house.tx(hosts.nodes)
        if any(n.uuid in c.allocations for c in within(forest, served(asked), n.uuid))
        and forest.providers[n.uuid].traits.isdisjoint(asked.forbidden)
    }
    places = placed(house, s).places
    assert {p.host for p in places} == expect
    for n in house.tx(hosts.nodes):
        mine, told = msgspec.structs.replace(s, id=n.host), {p.host: p for p in places}
        if n.host in told:
            house.tx(seats.claim, mine, n.uuid, now=house.clock.now(), shared=told[n.host].shared)
            got = held(house, n.host)
            assert sum(sum(of.values()) for of in got.values()) == sum(asked.amounts.values())
            house.tx(placement.release, n.host, n.uuid, now=house.clock.now())
        else:
            with pytest.raises(NoCapacity):
                house.tx(seats.claim, mine, n.uuid, now=house.clock.now(), shared=True)
        assert held(house, n.host) == {}
    assert not house.tx(
        lambda tx: tx.execute(sa.select(placement.INVENTORIES).where(placement.INVENTORIES.c.used != 0)).all()
    )
    house.db.close()
