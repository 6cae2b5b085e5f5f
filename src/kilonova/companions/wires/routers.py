"""A router: a namespace with a leg in each of its networks, and NAT towards the outside. Pure, but for `announce`.

Addresses of the outside are translated in the router and nowhere else: floating ones one to one, both ways, also for
guests behind the same router (who reach each other's floating addresses, and their own); everything else by the
router's own address.
"""

import hashlib
import ipaddress
import socket
import struct

import msgspec

from kilonova.companions.wires.links import Link, Space
from kilonova.companions.wires.rules import Table
from kilonova.model.wiring import RouterWire

OUT = "out0"
METADATA = "169.254.169.254"
HAIRPIN = "0x1"
ETH_P_ARP = 0x0806


class Leg(msgspec.Struct, frozen=True):
    """One pair of veths: `near` is in the network's bridge, `far` in the router's namespace."""

    network_id: str
    near: str
    far: str
    mac: str
    cidrs: list[str]


def legs(router: RouterWire) -> list[Leg]:
    """The outside one, if there is one, comes first. Two subnets of one network share a leg."""
    found: dict[str, Leg] = {}
    for network_id, cidr, mac in router.legs:
        held = found.get(network_id)
        cidrs = [*(held.cidrs if held else []), cidr]
        far = f"in{_short(network_id)}"
        found[network_id] = Leg(
            network_id, near(router.id, network_id), far, (held or Leg("", "", "", mac, [])).mac, cidrs
        )
    inside = [_lower(leg) for leg in found.values()]
    if not router.outside:
        return inside
    network_id, cidr, mac = router.outside
    floating = [f"{one.address}/{128 if ':' in one.address else 32}" for one in router.floating]
    own = cidr.partition("/")[0]
    cidrs = [cidr, *(f for f in floating if f.partition("/")[0] != own)]
    return [_lower(Leg(network_id, near(router.id, network_id, "o"), OUT, mac, cidrs)), *inside]


def near(router_id: str, network_id: str, which: str = "i") -> str:
    """The name in the cloud's namespace; no two routers or networks share one."""
    return f"kr{which}{_short(router_id + network_id)}"


def space(router: RouterWire, mtus: dict[str, int], metadata: bool) -> Space:
    """What its namespace holds. `mtus` by network."""
    links = [Link("lo", "loopback")]
    addresses = [("lo", f"{METADATA}/32")] if metadata else []
    for leg in legs(router):
        links.append(Link(leg.far, "end", mtus[leg.network_id], mac=leg.mac))
        addresses += [(leg.far, cidr) for cidr in leg.cidrs]
    routes = list(router.routes)
    if router.outside and router.outside_gateway:
        everything = "::/0" if ":" in router.outside_gateway else "0.0.0.0/0"
        routes.append((everything, router.outside_gateway))
    settings = {
        "ipv4/ip_forward": "1",
        "ipv6/conf/all/forwarding": "1",
        "ipv6/conf/all/accept_ra": "0",
        # An address is answered for on its own leg only, or the same one in two networks would be confused.
        "ipv4/conf/all/arp_ignore": "1",
        "ipv4/conf/all/arp_announce": "2",
        "ipv4/conf/all/rp_filter": "0",
        "ipv4/conf/default/rp_filter": "0",
    }
    return Space(links, addresses, routes, settings, routed=True)


def nat(router: RouterWire, tag: str) -> Table:
    """IPv4 only: IPv6 is routed as it is."""
    floats = {one.address: one.fixed for one in router.floating if ":" not in one.address}
    fixed = {one.fixed: one.address for one in router.floating if ":" not in one.address}
    prerouting = ["type nat hook prerouting priority -100;"]
    postrouting = ["type nat hook postrouting priority 100;"]
    forward = ["type filter hook forward priority 0;"]
    coming = ["type filter hook input priority 0;"]
    if router.outside:
        own = router.outside[1].partition("/")[0]
        prerouting += [
            f'iifname != "{OUT}" ip daddr @floating_ips meta mark set {HAIRPIN}',
            "dnat to ip daddr map @to_fixed",
        ]
        postrouting += [
            f'oifname "{OUT}" snat to ip saddr map @to_floating',
            f"meta mark {HAIRPIN} snat to ip saddr map @to_floating",
            f"meta mark {HAIRPIN} snat to {own}",
        ]
        # A connection ends with the floating address it was made by, and with the guest it was made to.
        forward += [
            "ct status dnat ct original ip daddr . ct reply ip saddr != @floating_to drop",
            f"ct status snat ct reply ip daddr != {own} ct reply ip daddr . ct original ip saddr != @floating_to drop",
        ]
        coming += [f'iifname "{OUT}" ip daddr {METADATA} drop']
        if router.snat:
            postrouting.append(f'oifname "{OUT}" snat to {own}')
            # Who sets a route to a private network over this router's outside address gets nowhere.
            forward += [f'iifname "{OUT}" ct status dnat accept', f'iifname "{OUT}" ct state new drop']
    return Table(
        "ip",
        f"kilonova_{tag}",
        {
            "floating_ips": ("type ipv4_addr", frozenset(floats)),
            "floating_to": ("type ipv4_addr . ipv4_addr", frozenset(f"{a} . {b}" for a, b in floats.items())),
        },
        {"to_fixed": ("type ipv4_addr : ipv4_addr", floats), "to_floating": ("type ipv4_addr : ipv4_addr", fixed)},
        {
            "on_prerouting": tuple(prerouting),
            "on_postrouting": tuple(postrouting),
            "on_forward": tuple(forward),
            "on_input": tuple(coming),
        },
    )


def announce(device: str, mac: str, addresses: list[str]) -> None:
    """Tells the neighbours where IPv4 addresses are now (gratuitous ARP). In the namespace the thread is in."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as wire:
        wire.bind((device, 0))
        hw = bytes.fromhex(mac.replace(":", ""))
        for address in addresses:
            ip = ipaddress.ip_address(address)
            if ip.version == 4:
                body = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, hw, ip.packed, b"\xff" * 6, ip.packed)
                wire.send(b"\xff" * 6 + hw + struct.pack("!H", ETH_P_ARP) + body)


def _lower(leg: Leg) -> Leg:
    return Leg(leg.network_id, leg.near, leg.far, leg.mac.lower(), leg.cidrs)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:11]
