"""Who gets which address: choosing is exact, fair, and never outside what a subnet has."""

import random
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilonova.companions import ipam
from kilonova.companions.ipam import Ground, Said, Slot
from kilonova.kit.errors import Conflict, Invalid

v4 = st.tuples(st.integers(0x0A000000, 0x0AFFFFFF), st.integers(8, 29)).map(
    lambda t: str(ip_network((t[0], t[1]), strict=False))
)
v6 = st.tuples(st.integers(0xFD << 120, (0xFE << 120) - 1), st.integers(48, 120)).map(
    lambda t: str(ip_network((t[0], t[1]), strict=False))
)
cidrs = st.one_of(v4, v6)


@given(cidrs, st.integers(0))
def test_an_address_is_of_the_pools_and_never_the_gateway(cidr: str, seed: int) -> None:
    gateway = ipam.first_address(cidr)
    pools = ipam.standard_pools(cidr, gateway)
    found = ipam.any_of(pools, random.Random(seed))
    assert found is not None and found != gateway
    n = ip_network(cidr)
    assert ip_address(found) in n and ip_address(found) != n.network_address
    if n.version == 4:
        assert ip_address(found) != n.broadcast_address


@given(st.sets(st.integers(2, 30)), st.integers(0))
def test_what_is_taken_is_not_given_again_and_the_last_one_is_found(taken: set[int], seed: int) -> None:
    pools = ipam.standard_pools("10.0.0.0/27", "10.0.0.1")
    gone = {f"10.0.0.{n}" for n in taken}
    found = ipam.any_of(pools, random.Random(seed), gone)
    if len(taken) == 29:
        assert found is None
    else:
        assert found is not None and found not in gone and ip_address(found) in ip_network("10.0.0.0/27")


def test_every_free_address_can_be_drawn() -> None:
    pools = [["10.0.0.2", "10.0.0.4"], ["10.0.0.8", "10.0.0.9"]]
    dice = random.Random(7)
    drawn = {ipam.any_of(pools, dice, {"10.0.0.3", "10.0.0.200"}) for _ in range(200)}
    assert drawn == {"10.0.0.2", "10.0.0.4", "10.0.0.8", "10.0.0.9"}


def test_taken_addresses_beside_the_pools_do_not_count() -> None:
    assert ipam.any_of([["10.0.0.9", "10.0.0.9"]], random.Random(1), {"10.0.0.1", "10.0.0.10"}) == "10.0.0.9"


@given(cidrs)
def test_standard_pools_hold_all_that_is_usable_but_the_gateway(cidr: str) -> None:
    whole = ipam.usable(ip_network(cidr))
    assert ipam.size(ipam.standard_pools(cidr, None)) == whole.last - whole.first + 1
    assert ipam.size(ipam.standard_pools(cidr, ipam.first_address(cidr))) == whole.last - whole.first


def test_a_gateway_in_the_middle_parts_the_pool() -> None:
    assert ipam.standard_pools("10.0.0.0/29", "10.0.0.3") == [("10.0.0.1", "10.0.0.2"), ("10.0.0.4", "10.0.0.6")]


@pytest.mark.parametrize(
    ("pools", "kind", "code"),
    [
        ([("10.0.0.9", "10.0.0.5")], Invalid, "InvalidAllocationPool"),
        ([("10.0.1.5", "10.0.1.9")], Invalid, "OutOfBoundsAllocationPool"),
        ([("fd00::1", "fd00::2")], Invalid, "InvalidAllocationPool"),
        ([("10.0.0.2", "10.0.0.9"), ("10.0.0.9", "10.0.0.12")], Conflict, "OverlappingAllocationPools"),
        ([("10.0.0.1", "10.0.0.9")], Conflict, "GatewayConflictWithAllocationPools"),
    ],
)
def test_pools_that_cannot_be_are_refused(pools: list[tuple[str, str]], kind: type[Exception], code: str) -> None:
    with pytest.raises(kind) as e:
        ipam.checked_pools("10.0.0.0/24", pools, "10.0.0.1")
    assert e.value.code == code  # type: ignore[attr-defined]


@given(st.text(max_size=40))
def test_junk_is_refused_with_a_sentence(text: str) -> None:
    for parse in (ipam.net, ipam.ip, ipam.prefix, ipam.checked_mac):
        try:
            parse(text)
        except Invalid as e:
            assert e.said and e.said.isprintable()


def test_an_address_made_of_the_mac() -> None:
    """RFC 4291, appendix A."""
    assert ipam.eui64("fd00:9::/64", "fa:16:3e:33:28:ad") == "fd00:9::f816:3eff:fe33:28ad"
    assert ipam.eui64("2001:db8::/64", "34:56:78:9a:bc:de") == "2001:db8::3656:78ff:fe9a:bcde"


@given(st.integers(0))
def test_a_mac_is_ours_and_one_ports(seed: int) -> None:
    made = ipam.mac(random.Random(seed))
    assert made.startswith("fa:16:3e:") and ipam.checked_mac(made.upper()) == made


FOUR = Ground("four", "10.0.0.0/24", 4, [["10.0.0.2", "10.0.0.254"]])
OTHER = Ground("other", "10.0.1.0/24", 4, [["10.0.1.2", "10.0.1.254"]])
SIX = Ground("six", "fd00::/64", 6, [["fd00::2", "fd00::ffff"]])
SLAAC = Ground("slaac", "fd01::/64", 6, [["fd01::2", "fd01::ffff"]], "slaac")
MAC = "fa:16:3e:00:00:01"


def test_who_does_not_care_gets_one_of_each_kind_and_all_that_number_themselves() -> None:
    assert ipam.standard_slots([FOUR, OTHER, SIX, SLAAC]) == [
        [Slot("four"), Slot("other")],
        [Slot("six")],
        [Slot("slaac")],
    ]
    assert ipam.standard_slots([]) == []


def test_an_address_finds_its_subnet() -> None:
    assert ipam.slots("n", [FOUR, OTHER], [Said(None, "10.0.1.7")], MAC, most=5) == [Slot("other", "10.0.1.7")]
    assert ipam.slots("n", [SLAAC], [Said(None, ipam.eui64("fd01::/64", MAC))], MAC, most=5)[0].subnet_id == "slaac"


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (Said(None, "192.168.0.1"), "InvalidIpForNetwork"),
        (Said("four", "10.0.1.1"), "InvalidIpForSubnet"),
        (Said("four", "10.0.0.0"), "InvalidIpForSubnet"),
        (Said("four", "10.0.0.255"), "InvalidIpForSubnet"),
        (Said("elsewhere"), "InvalidInput"),
        (Said(), "InvalidInput"),
        (Said("slaac", "fd01::5"), "AllocationOnAutoAddressSubnet"),
    ],
)
def test_what_cannot_be_on_a_network_is_refused(said: Said, code: str) -> None:
    with pytest.raises(Invalid) as e:
        ipam.slots("n", [FOUR, OTHER, SLAAC], [said], MAC, most=5)
    assert e.value.code == code


def test_the_same_address_twice_is_refused() -> None:
    with pytest.raises(Invalid):
        ipam.slots("n", [FOUR], [Said("four", "10.0.0.5"), Said(None, "10.0.0.5")], MAC, most=5)


@pytest.mark.parametrize(
    "cidr", ["0.0.0.0/0", "127.0.0.0/24", "169.254.0.0/16", "240.0.0.0/8", "::ffff:0:0/96", "fe80::/64"]
)
def test_no_guest_is_where_nobody_can_be(cidr: str) -> None:
    """A host that was told of one of these could not make any other network either."""
    with pytest.raises(Invalid):
        ipam.check_usable(cidr)


def test_ipv6_needs_its_mtu() -> None:
    ipam.check_mtu(68, [4])
    ipam.check_mtu(1280, [4, 6])
    with pytest.raises(Invalid):
        ipam.check_mtu(1279, [4, 6])


@pytest.mark.parametrize(
    ("to", "hop", "passable"),
    [
        ("10.77.0.0/16", "10.9.0.9", True),
        ("0.0.0.0/0", "10.9.0.9", False),  # the gateway is its way out
        ("10.9.0.0/24", "10.9.0.9", False),
        ("10.9.0.7/32", "10.9.0.9", True),
        ("10.77.0.0/16", "10.9.0.1", False),
        ("10.77.0.0/16", "10.9.0.255", False),
        ("10.77.0.0/16", "10.8.0.9", False),
        ("fd00::/64", "10.9.0.9", False),
    ],
)
def test_a_router_goes_only_where_it_can(to: str, hop: str, passable: bool) -> None:
    why = ipam.impassable(ipam.Way(to, hop), ["10.9.0.0/24"], ["10.9.0.1"], led_out=True)
    assert (why == "") == passable
