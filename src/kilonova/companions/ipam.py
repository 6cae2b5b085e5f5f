"""Which addresses a subnet has, which a port gets. Pure: the table of addresses decides who has one.

Addresses are texts at the rim and numbers inside.  A free address is chosen by lot, so that two who ask at once
seldom want the same, and an address that was given back is not at once another's.
"""

import itertools
import random
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal, NamedTuple

from kilonova.kit.errors import Conflict, Invalid

Net = IPv4Network | IPv6Network
Ip = IPv4Address | IPv6Address
Pair = tuple[str, str]

MAC_PREFIX = 0xFA163E << 24
AUTOMATIC = ("slaac", "dhcpv6-stateless")  # modes in which a guest makes its address of its MAC


class Pool(NamedTuple):
    """Addresses from `first` to `last`, both included, as numbers."""

    first: int
    last: int


@lru_cache(maxsize=4096)
def net(cidr: str) -> Net:
    """Raises Invalid where it is none, or has bits of a host in it."""
    try:
        whole = ip_network(cidr, strict=False)
    except ValueError:
        raise Invalid(f"Invalid input for cidr. Reason: '{_plain(cidr)}' is not a valid IP subnet.") from None
    if "/" not in cidr or ip_address(cidr.partition("/")[0]) != whole.network_address:
        raise Invalid(
            f"Invalid input for cidr. Reason: '{_plain(cidr)}' isn't a recognized IP subnet cidr, '{whole}' is recommended."
        )
    return whole


def ip(text: str, what: str = "ip_address") -> Ip:
    """Raises Invalid. Zones (`fe80::1%eth0`) mean nothing here."""
    try:
        found = ip_address(text)
    except ValueError:
        found = None
    if found is None or "%" in text:
        raise Invalid(f"Invalid input for {what}. Reason: '{_plain(text)}' is not a valid IP address.")
    return found


def prefix(text: str, what: str = "remote_ip_prefix") -> str:
    """An address or a CIDR as a CIDR, with the host's bits gone. Raises Invalid."""
    try:
        if "%" in text:
            raise ValueError
        return str(ip_network(text, strict=False))
    except ValueError:
        raise Invalid(f"Invalid input for {what}. Reason: '{_plain(text)}' is not a valid IP prefix.") from None


def mac(dice: random.Random) -> str:
    """One that belongs to no maker of cards, with the prefix that OpenStack is known by."""
    return _mac(MAC_PREFIX | dice.getrandbits(24))


_MAC = re.compile(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}")


def checked_mac(text: str) -> str:
    """In small letters with colons. Raises Invalid; a group's or nobody's address is no port's."""
    if not _MAC.fullmatch(text):
        raise Invalid(f"Invalid input for mac_address. Reason: '{_plain(text)}' is not a valid MAC address.")
    plain = text.lower().replace("-", ":")
    if plain == "00:00:00:00:00:00" or int(plain[:2], 16) & 1:
        raise Invalid(f"Invalid input for mac_address. Reason: '{plain}' cannot be the MAC address of one port.")
    return plain


def eui64(cidr: str, mac_address: str) -> str:
    """The address that a guest with this MAC gives itself (RFC 4291, appendix A)."""
    m = int(mac_address.replace(":", ""), 16)
    interface = ((m >> 24) << 40 | 0xFFFE << 24 | m & 0xFFFFFF) ^ (1 << 57)
    return str(IPv6Address(int(net(cidr).network_address) | interface))


def _mac(number: int) -> str:
    digits = f"{number:012x}"
    return ":".join(digits[i : i + 2] for i in range(0, 12, 2))


# ---- a subnet's own


def usable(n: Net) -> Pool:
    """Without the network's own address, and without broadcast where there is one (RFC 3021: two are both usable)."""
    first, last = int(n.network_address), int(n.broadcast_address)
    if n.prefixlen >= n.max_prefixlen - 1:
        return Pool(first, last)
    return Pool(first + 1, last - 1 if n.version == 4 else last)


def first_address(cidr: str) -> str:
    """Where a gateway usually is."""
    n = net(cidr)
    return str(_text(n, usable(n).first))


def checked_gateway(cidr: str, gateway: str) -> str:
    """Raises Invalid where no router could have it on this subnet. A link-local one is good for IPv6."""
    n, g = net(cidr), ip(gateway, "gateway_ip")
    if g.version != n.version:
        raise Invalid(f"Invalid input for gateway_ip. Reason: '{g}' is not of the subnet's IP version.")
    if g in n and not _within(int(g), [usable(n)]):
        raise Invalid(f"Invalid input for operation: Gateway is not valid on subnet: {g} is an address of {n} itself.")
    if g.is_multicast or g.is_unspecified or g.is_loopback:
        raise Invalid(f"Invalid input for operation: Gateway is not valid on subnet: {g}.")
    return str(g)


def standard_pools(cidr: str, gateway: str | None) -> list[Pair]:
    """All that is usable, but for the gateway."""
    n = net(cidr)
    whole = usable(n)
    at = int(ip_address(gateway)) if gateway and ip_address(gateway) in n else None
    parts = [whole] if at is None else [Pool(whole.first, at - 1), Pool(at + 1, whole.last)]
    return [_pair(n, p) for p in parts if p.first <= p.last]


def checked_pools(cidr: str, said: Iterable[Pair], gateway: str | None) -> list[Pair]:
    """The caller's pools in order. Raises Invalid or Conflict where they lie outside, overlap, or hold the gateway."""
    n, pools = net(cidr), []
    for first, last in said:
        a, b = ip(first, "allocation_pools"), ip(last, "allocation_pools")
        if a.version != n.version or b.version != n.version or int(a) > int(b):
            raise Invalid(f"The allocation pool {a}-{b} is not valid.", code="InvalidAllocationPool")
        if not (_within(int(a), [usable(n)]) and _within(int(b), [usable(n)])):
            raise Invalid(
                f"The allocation pool {a}-{b} spans beyond the subnet cidr {n}.", code="OutOfBoundsAllocationPool"
            )
        pools.append(Pool(int(a), int(b)))
    pools.sort()
    for one, next_one in itertools.pairwise(pools):
        if one.last >= next_one.first:
            raise Conflict(
                f"Found overlapping allocation pools for subnet {n}: {_said(n, one)}, {_said(n, next_one)}.",
                code="OverlappingAllocationPools",
            )
    check_gateway_outside(cidr, [_pair(n, p) for p in pools], gateway)
    return [_pair(n, p) for p in pools]


def check_gateway_outside(cidr: str, pools: Iterable[Sequence[str]], gateway: str | None) -> None:
    """Raises Conflict where a pool would give the gateway's address away."""
    if gateway is None:
        return
    n, g = net(cidr), ip_address(gateway)
    for p in (_pool(p) for p in pools):
        if g.version == n.version and p.first <= int(g) <= p.last:
            raise Conflict(
                f"Gateway ip {g} conflicts with allocation pool {_said(n, p)}.",
                code="GatewayConflictWithAllocationPools",
            )


# Where no guest can be: hosts, routers and the standards have these for themselves (RFC 6890).
NOBODYS = [
    ip_network(n) for n in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/8", "fe80::/9", "ff00::/8")
]
LEAST_MTU_6 = 1280  # RFC 8200, section 5


def check_usable(cidr: str) -> None:
    """Raises Invalid where no guest could use the subnet."""
    n = net(cidr)
    if n.prefixlen == 0:
        raise Invalid("Invalid input for operation: 0 is not allowed as CIDR prefix length", code="InvalidInput")
    if any(n.version == x.version and n.overlaps(x) for x in NOBODYS):
        raise Invalid(f"Invalid input for operation: {n} is not a network that guests can use", code="InvalidInput")


def check_mtu(mtu: int, versions: Iterable[int]) -> None:
    """Raises Invalid where IPv6 would not go through."""
    if mtu < LEAST_MTU_6 and 6 in versions:
        raise Invalid(
            f"Invalid input for operation: the MTU {mtu} is less than {LEAST_MTU_6}, which IPv6 needs.",
            code="InvalidInput",
        )


class Way(NamedTuple):
    """A route of a router's own."""

    destination: str
    hop: str


def impassable(way: Way, near: Collection[str], addresses: Collection[str], led_out: bool) -> str:
    """Why a router cannot have this route; "" if it can. Pure.

    `near` are the CIDRs it has a leg in, `addresses` its own, `led_out`: it has a gateway.
    """
    to, hop = net(way.destination), ip_address(way.hop)
    here = next((n for n in map(net, near) if hop in n), None)
    if here is None or hop.version != to.version:
        return "the nexthop is not connected with router"
    if str(hop) in addresses or not _within(int(hop), [usable(here)]):
        return "the nexthop is no neighbour of the router"
    if any(to == net(c) for c in near):
        return "the destination is connected with router"
    if led_out and to.prefixlen == 0:
        return "the router has a gateway already"
    return ""


def overlap(one: str, other: str) -> bool:
    a, b = net(one), net(other)
    return a.version == b.version and a.overlaps(b)


def holds(cidr: str, address: str) -> bool:
    return ip_address(address) in net(cidr)


def size(pools: Iterable[Sequence[str]]) -> int:
    """How many addresses."""
    return sum(p.last - p.first + 1 for p in map(_pool, pools))


def _pool(pair: Sequence[str]) -> Pool:
    return Pool(int(ip_address(pair[0])), int(ip_address(pair[1])))


def _within(number: int, pools: Iterable[Pool]) -> bool:
    return any(p.first <= number <= p.last for p in pools)


def _text(n: Net, number: int) -> Ip:
    return IPv4Address(number) if n.version == 4 else IPv6Address(number)


def _pair(n: Net, p: Pool) -> Pair:
    return str(_text(n, p.first)), str(_text(n, p.last))


def _said(n: Net, p: Pool) -> str:
    return "-".join(_pair(n, p))


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:100]


# ---- a port's


class Slot(NamedTuple):
    """One address a port is to get: this very one, or any of the subnet's where `address` is None."""

    subnet_id: str
    address: str | None = None


class Ground(NamedTuple):
    """What choosing must know of a subnet. `mode` is the IPv6 address mode."""

    id: str
    cidr: str
    version: int
    pools: list[list[str]]
    mode: str | None = None

    @property
    def automatic(self) -> bool:
        return self.mode in AUTOMATIC


def any_of(pools: Iterable[Sequence[str]], dice: random.Random, taken: Collection[str] | None = None) -> str | None:
    """A free address by lot; with `taken` None, one that might be free. None: there is none.

    With `taken` it is exact in one pass over what is taken, however large the pools are: the lot is drawn among
    the free ones by number, and then moved past the taken ones below it.
    """
    wide = [_pool(p) for p in pools]
    if not wide:
        return None
    version = ip_address(next(iter(pools))[0]).version
    text: Callable[[int], Ip] = IPv4Address if version == 4 else IPv6Address
    total = sum(p.last - p.first + 1 for p in wide)
    if taken is None:
        return str(text(_nth(wide, _draw(dice, total))))
    gone = sorted(n for n in {int(ip_address(t)) for t in taken} if _within(n, wide))
    if len(gone) >= total:
        return None
    places = [_place(wide, n) for n in gone]
    at = _draw(dice, total - len(gone))
    for p in places:
        if p > at:
            break
        at += 1
    return str(text(_nth(wide, at)))


def _draw(dice: random.Random, n: int) -> int:
    """Below n, evenly; n may have 128 bits."""
    return dice.randrange(n)


def _nth(pools: Sequence[Pool], at: int) -> int:
    for p in pools:
        width = p.last - p.first + 1
        if at < width:
            return p.first + at
        at -= width
    raise AssertionError("beyond the pools")


def _place(pools: Sequence[Pool], number: int) -> int:
    """The inverse of `_nth`."""
    before = 0
    for p in pools:
        if p.first <= number <= p.last:
            return before + number - p.first
        before += p.last - p.first + 1
    raise AssertionError("not in the pools")


def standard_slots(grounds: Sequence[Ground]) -> list[list[Slot]]:
    """Where a port goes that does not care: an IPv4 subnet, an IPv6 one, and every one whose guests number themselves.

    Each inner list is tried from the left until one has room.
    """
    v4 = [Slot(g.id) for g in grounds if g.version == 4]
    v6 = [Slot(g.id) for g in grounds if g.version == 6 and not g.automatic]
    return [s for s in (v4, v6) if s] + [[Slot(g.id)] for g in grounds if g.automatic]


class Said(NamedTuple):
    """One entry of a request's `fixed_ips`."""

    subnet_id: str | None = None
    address: str | None = None


def slots(network: str, grounds: Sequence[Ground], said: Sequence[Said], mac_address: str, *, most: int) -> list[Slot]:
    """What the caller wants, by subnet. Raises Invalid where it cannot be on this network.

    An address without a subnet is of the subnet that holds it; a subnet whose guests number themselves gives no
    other address than the one that follows from the MAC.
    """
    if len(said) > most:
        raise Invalid(
            f"Invalid input for operation: Exceeded maximum amount of fixed ips per port: {most}.", code="InvalidInput"
        )
    by_id, wanted = {g.id: g for g in grounds}, []
    for s in said:
        if s.subnet_id is None and s.address is None:
            raise Invalid(
                "Invalid input for operation: IP allocation requires subnet_id or ip_address.", code="InvalidInput"
            )
        address = None if s.address is None else str(ip(s.address))
        ground = by_id.get(s.subnet_id) if s.subnet_id is not None else None
        if s.subnet_id is not None and ground is None:
            raise Invalid(
                f"Invalid input for operation: Failed to create port on network {network}, "
                f"because fixed_ips included invalid subnet {s.subnet_id}.",
                code="InvalidInput",
            )
        if ground is None:
            ground = next((g for g in grounds if address and holds(g.cidr, address)), None)
            if ground is None:
                raise Invalid(
                    f"IP address {address} is not a valid IP for any of the subnets on the specified network.",
                    code="InvalidIpForNetwork",
                )
        if address is not None:
            _check_fits(ground, address)
            if ground.automatic and address != eui64(ground.cidr, mac_address):
                raise Invalid(
                    f"Invalid input for operation: IPv6 address {address} can not be directly assigned to a port on "
                    f"subnet {ground.id} as the subnet is configured for automatic addresses.",
                    code="AllocationOnAutoAddressSubnet",
                )
        wanted.append(Slot(ground.id, address))
    twice = [w for w in wanted if w.address is not None and wanted.count(w) > 1]
    if twice:
        raise Invalid(
            f"Invalid input for fixed_ips. Reason: Duplicate IP address '{twice[0].address}'.", code="HTTPBadRequest"
        )
    return wanted


def _check_fits(ground: Ground, address: str) -> None:
    n, a = net(ground.cidr), ip_address(address)
    if a not in n or not _within(int(a), [usable(n)]):
        raise Invalid(f"IP address {address} is not a valid IP for the specified subnet.", code="InvalidIpForSubnet")


# ---- a new subnet's modes


Mode = Literal["slaac", "dhcpv6-stateful", "dhcpv6-stateless"] | None


def check_modes(version: int, cidr: str, dhcp: bool, ra: Mode, address: Mode) -> None:
    """Raises Invalid where IPv6 modes are said of IPv4, contradict each other, or the prefix is too long for them."""
    if ra is None and address is None:
        return
    if version == 4:
        raise Invalid(
            "Invalid input for operation: ipv6_ra_mode or ipv6_address_mode cannot be set with IPv4.",
            code="InvalidInput",
        )
    if not dhcp:
        raise Invalid(
            "Invalid input for operation: ipv6_ra_mode or ipv6_address_mode cannot be set when enable_dhcp is set to False.",
            code="InvalidInput",
        )
    if ra is not None and address is not None and ra != address:
        raise Invalid(
            f"Invalid input for operation: ipv6_ra_mode set to '{ra}' with ipv6_address_mode set to '{address}' is not valid. "
            "If both attributes are set, they must be the same value.",
            code="InvalidInput",
        )
    if (ra in AUTOMATIC or address in AUTOMATIC) and net(cidr).prefixlen != 64:
        raise Invalid(
            f"Invalid input for operation: Invalid CIDR {cidr} for IPv6 address mode. OpenStack uses the EUI-64 address "
            "format, which requires the prefix to be /64.",
            code="InvalidInput",
        )
