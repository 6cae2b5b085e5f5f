"""Security groups and anti-spoofing: who may say what to whom on a bridge, as nftables rules.

Two tables.  The one of family `bridge` sees every frame: it refuses forged senders, and puts the port's number on
the packet as its mark.  The one of family `inet` sees the same packets through br_netfilter, with their connections
(this is the only place where all kernels track connections on a bridge), finds the port's rules by that mark with one
look-up, and holds each packet against them.  How that was chosen: docs/decisions/data-plane.md.

A connection that was allowed stays allowed only as long as the rules say so: packets of its first direction are held
against the rules each time, and when one is refused the connection is marked, which stops its replies as well.
"""

import functools
import ipaddress
import re
from collections.abc import Iterable

import msgspec

from kilonova.companions.wires.rules import Table
from kilonova.kit.errors import Refused
from kilonova.model.wiring import NetworkWire, PortWire, Rule, SubnetWire, Wiring

CUT = "0x6b6e"  # the mark of a connection that is no longer allowed

# The network API's names of protocols → IP protocol numbers (IANA).
# fmt: off
PROTOCOLS = {
    "icmp": 1, "igmp": 2, "ipip": 4, "tcp": 6, "egp": 8, "udp": 17, "dccp": 33, "ipv6-encap": 41, "ipv6-route": 43,
    "ipv6-frag": 44, "rsvp": 46, "gre": 47, "esp": 50, "ah": 51, "icmpv6": 58, "ipv6-icmp": 58, "icmp6": 58,
    "ipv6-nonxt": 59, "ipv6-opts": 60, "ospf": 89, "vrrp": 112, "pgm": 113, "sctp": 132, "udplite": 136,
}
# fmt: on
WITH_PORTS = {6, 17, 33, 132, 136}
ICMP, ICMP6 = 1, 58
UNKNOWN = "0.0.0.0"  # noqa: S104  (who asks whether an address is free has none yet: RFC 5227)
EVERYBODY = {4: "0.0.0.0/0", 6: "::/0"}

DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
NAME = re.compile(r"[A-Za-z0-9-]{1,64}")

# Neighbour discovery and multicast listeners (RFC 4861, RFC 3810): IPv6 does not work without them.
ND_SENT = "{ 130, 131, 132, 133, 135, 136, 143 }"
ND_GOT = "{ 130, 131, 132, 134, 135, 136, 143 }"


class Guarded(msgspec.Struct, frozen=True):
    """A port's chains: against forged senders (bridge), for what it says and for what it gets (inet)."""

    forged: tuple[str, ...]
    says: tuple[str, ...]
    gets: tuple[str, ...]


class Groups:
    """Remote groups as named sets, shared by all rules that mean the same group."""

    def __init__(self) -> None:
        self.remotes: dict[str, list[str]] = {}
        self.sets: dict[str, tuple[str, frozenset[str]]] = {}

    def name(self, rule: Rule) -> str:
        """The set for this rule's remotes; empty where they must stand in the rule itself."""
        if not rule.remote_group or not NAME.fullmatch(rule.remote_group):
            return ""
        name = f"g{rule.version}_{rule.remote_group}"
        if name not in self.remotes:
            kind = f"type ipv{rule.version}_addr; flags interval"
            self.remotes[name] = rule.remotes
            self.sets[name] = kind, frozenset(collapsed(rule.remotes, rule.version))
        return name if self.remotes[name] == rule.remotes else ""


def guarded(port: PortWire, groups: Groups) -> Guarded:
    """Pure. Raises Refused where a port's words are none of a network's."""
    said, pairs = tuple(address for _, address in port.addresses), tuple((m.lower(), a) for m, a in port.allowed_pairs)
    forged = _forged(port.mac.lower(), said, pairs)
    return Guarded(forged, _direction(port, "egress", groups), _direction(port, "ingress", groups))


class Around(msgspec.Struct, frozen=True):
    """What is in the cloud's namespace besides guests' ports. Not `alone`: others have bridges there, too.

    `ours` are the devices of networks and routers, `strays` those in our bridges that nobody declared.
    """

    ours: list[str]
    strays: list[str] = []
    alone: bool = True


def tables(
    wiring: Wiring, tag: str, ports: dict[str, Guarded], numbers: dict[str, int], groups: Groups, around: Around
) -> tuple[Table, Table]:
    """The bridge table and the inet one, purely. `numbers` are marks by device, `ports` chains by port."""
    name = f"kilonova_{tag}"
    bridges = [n.bridge for n in wiring.networks]
    secured = [p for p in wiring.ports if p.secured and p.up]
    senders = {quoted(d): "accept" for d in around.ours} | {quoted(d): "drop" for d in around.strays}
    receivers = dict(senders)
    marks = dict.fromkeys(senders, "0x0")
    for port in wiring.ports:
        held = f"jump s_{port.device}" if port.secured else "accept"
        senders[quoted(port.device)] = held if port.up else "drop"
        receivers[quoted(port.device)] = "accept" if port.up else "drop"
        marks[quoted(port.device)] = f"{numbers[port.device]:#x}" if port.secured and port.up else "0x0"
    # Between a port's end here and the hypervisor's unplugging its tap is nobody's. Where no others have bridges,
    # whatever is unknown is silent; elsewhere the strays are.
    unknown = ("drop",) if around.alone else ()
    bridge = Table(
        "bridge",
        name,
        {"our_devices": ("type ifname", frozenset(senders))},
        {
            "mark_of": ("type ifname : mark", marks),
            "sent_by": ("type ifname : verdict", senders),
            "got_by": ("type ifname : verdict", receivers),
        },
        {
            **{f"s_{p.device}": ports[p.id].forged for p in secured},
            "on_prerouting": (
                "type filter hook prerouting priority -300;",
                "meta mark set iifname map @mark_of",
                "iifname vmap @sent_by",
                *unknown,
            ),
            "on_forward": (
                "type filter hook forward priority -200;",
                "meta mark set oifname map @mark_of",
                "oifname vmap @got_by",
                *unknown,
            ),
            # Nothing on a bridge is for the machine itself, or from it: it has its own end of the external network.
            "on_input": ("type filter hook input priority -200;", "iifname @our_devices drop"),
            "on_output": ("type filter hook output priority -200;", "oifname @our_devices drop"),
        },
    )
    zone = ", ".join(f"{quoted(b)} : {z}" for b, z in sorted(zones(bridges).items()))
    dhcp = "meta nfproto ipv4 udp sport {a} udp dport {b} accept"
    dhcp6 = "meta nfproto ipv6 udp sport {a} udp dport {b} accept"
    inet = Table(
        "inet",
        name,
        {"our_bridges": ("type ifname", frozenset(map(quoted, bridges))), **groups.sets},
        {
            "says_of": ("type mark : verdict", {f"{numbers[p.device]:#x}": f"jump e_{p.device}" for p in secured}),
            "gets_of": ("type mark : verdict", {f"{numbers[p.device]:#x}": f"jump i_{p.device}" for p in secured}),
        },
        {
            "refused": (f"ct state established ct mark set {CUT}", "drop"),
            **{f"e_{p.device}": ports[p.id].says for p in secured},
            **{f"i_{p.device}": ports[p.id].gets for p in secured},
            # Projects may use the same addresses: each bridge tracks its own connections.
            "zone_of": (
                "type filter hook prerouting priority -300;",
                *([f"ct zone set iifname map {{ {zone} }}"] if zone else []),
            ),
            "says_any": (
                "type filter hook prerouting priority -140;",
                "iifname != @our_bridges accept",
                "meta mark 0 accept",
                *_known_connections(),
                dhcp.format(a=68, b=67),
                dhcp6.format(a=546, b=547),
                f"icmpv6 type {ND_SENT} accept",
                "meta mark vmap @says_of",
                f"ct mark {CUT} ct mark set 0",
            ),
            "gets_any": (
                "type filter hook forward priority 0;",
                "iifname != @our_bridges accept",
                "meta mark 0 accept",
                *_known_connections(),
                dhcp.format(a=67, b=68),
                dhcp6.format(a=547, b=546),
                f"icmpv6 type {ND_GOT} accept",
                "meta mark vmap @gets_of",
                f"ct mark {CUT} ct mark set 0",
            ),
        },
    )
    return bridge, inet


def checked(wiring: Wiring) -> None:
    """What will stand in commands and files must be what it says it is; `guarded` looks at the rules. Raises Refused."""
    for network in wiring.networks:
        if not DEVICE.fullmatch(network.bridge) or not NAME.fullmatch(network.id) or not 68 <= network.mtu <= 65535:
            raise Refused(f"Network {network.id!r} has no sensible bridge or MTU.")
        for subnet in network.subnets:
            _checked_subnet(subnet)
    for port in wiring.ports:
        if not DEVICE.fullmatch(port.device) or not MAC.fullmatch(port.mac.lower()):
            raise Refused(f"Port {port.id!r} has no sensible device or MAC address.")
        for _, address in port.addresses:
            _address(address)
    for router in wiring.routers:
        legs = [*router.legs, *([router.outside] if router.outside else [])]
        known = {n.id for n in wiring.networks}
        for network_id, address, mac in legs:
            if network_id not in known:
                raise Refused(f"Router {router.id} has a leg in network {network_id}, of which this host was not told.")
            if not MAC.fullmatch(mac.lower()):
                raise Refused(f"Router {router.id} has no sensible MAC address.")
            _address(address.partition("/")[0])
            _network(address)
        for floating in router.floating:
            _address(floating.address)
            _address(floating.fixed)
        for destination, hop in router.routes:
            _network(destination)
            _address(hop)
        if not NAME.fullmatch(router.id):
            raise Refused(f"{router.id!r} is no id of a router.")
        if router.outside_gateway:
            _address(router.outside_gateway)


def collapsed(remotes: Iterable[str], version: int) -> list[str]:
    """As an interval set takes them: of one version, without overlaps."""
    nets = [net for text in remotes if (net := _network(text)).version == version]
    return [_shown(net) for net in ipaddress.collapse_addresses(nets)]  # type: ignore[type-var]


@functools.lru_cache(4096)
def link_local(mac: str) -> str:
    """A guest's first IPv6 address (RFC 4291, appendix A)."""
    b = bytes.fromhex(mac.replace(":", ""))
    return str(
        ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + bytes([b[0] ^ 2, b[1], b[2], 0xFF, 0xFE, b[3], b[4], b[5]]))
    )


def zones(bridges: Iterable[str]) -> dict[str, int]:
    """A connection zone for each bridge. The same one after a restart: live connections keep theirs."""
    taken: dict[int, str] = {}
    for bridge in sorted(bridges):
        zone = int.from_bytes(bridge.encode(), "big") % 65521 + 1
        while zone in taken:
            zone = zone % 65535 + 1
        taken[zone] = bridge
    return {bridge: zone for zone, bridge in taken.items()}


def quoted(device: str) -> str:
    return f'"{device}"'


def _known_connections() -> tuple[str, ...]:
    return (
        "ct state invalid drop",
        f"ct direction reply ct mark {CUT} drop",
        "ct state related accept",
        "ct direction reply ct state established accept",
    )


@functools.lru_cache(4096)
def _forged(mac: str, addresses: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Ends in accept or drop. Anything but ARP, IPv4 and IPv6 is dropped, VLAN tags too: no rule would see in them."""
    if odd := [m for m, _ in pairs if not MAC.fullmatch(m)]:
        raise Refused(f"{odd[0]!r} is no MAC address.")
    macs = sorted({mac, *(m for m, _ in pairs)})
    said = [*addresses, *(address for _, address in pairs)]
    v4, v6 = collapsed(said, 4), collapsed([*said, *map(link_local, macs)], 6)
    lines = ["ether type != { ip, arp, ip6 } drop", f"ether saddr != {_either(macs)} drop"]
    lines += [f"arp saddr ether != {_either(macs)} drop"]
    lines += [f"arp saddr ip {_either(sorted({*v4, UNKNOWN}) if EVERYBODY[4] not in v4 else v4)} accept"]
    lines += ["ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept", "udp sport 67 udp dport 68 drop"]
    lines += [f"ip saddr {_either(v4)} accept"] if v4 else []
    lines += ["icmpv6 type { 134, 137 } drop", "udp sport 547 udp dport 546 drop"]
    if EVERYBODY[6] not in v6:
        for address in v6:  # a neighbour advertisement must be about an address of its own
            lines.append(f"icmpv6 type 136 {_target(address)} accept")
        lines.append("icmpv6 type 136 drop")
    lines += ["ip6 saddr :: icmpv6 type { 131, 132, 133, 135, 143 } accept"]
    lines += [f"ip6 saddr {_either(v6)} accept", "drop"]
    return tuple(lines)


def _target(cidr: str) -> str:
    """Matches the target in a neighbour advertisement: 16 bytes at byte 8 of the message, as far as the prefix goes."""
    net = ipaddress.IPv6Network(cidr)
    bits = net.prefixlen or 1
    return f"@th,64,{bits} {int(net.network_address) >> 128 - bits:#x}"


def _direction(port: PortWire, way: str, groups: Groups) -> tuple[str, ...]:
    lines = [_rule(rule, groups) for rule in port.rules if rule.direction == way]
    return (*dict.fromkeys(line for line in lines if line), "goto refused")


def _rule(rule: Rule, groups: Groups) -> str:
    """One line that ends in return; empty for a rule that can match nobody."""
    if not rule.remotes:
        return ""
    everybody = any(remote in EVERYBODY.values() for remote in rule.remotes)
    named = "" if everybody else groups.name(rule)
    remotes = () if everybody or named else tuple(rule.remotes)
    if remotes and not collapsed(remotes, rule.version):
        return ""
    return _line(rule.direction, rule.version, rule.protocol or "", rule.port_min, rule.port_max, named, remotes)


@functools.lru_cache(4096)
def _line(
    direction: str, version: int, protocol: str, low: int | None, high: int | None, named: str, remotes: tuple[str, ...]
) -> str:
    """Neither a set's name nor remotes: everybody."""
    if named or remotes:
        end = "saddr" if direction == "ingress" else "daddr"
        words = ["ip" if version == 4 else "ip6", end, f"@{named}" if named else _either(collapsed(remotes, version))]
    else:
        words = [f"meta nfproto ipv{version}"]
    if protocol.lower() not in ("", "any", "0"):
        words += _protocol(protocol.lower(), version, low, high)
    return " ".join([*words, "return"])


def _protocol(text: str, version: int, low: int | None, high: int | None) -> list[str]:
    number = PROTOCOLS.get(text, int(text) if text.isdecimal() else -1)
    if not 0 <= number <= 255:
        raise Refused(f"{text!r} is no protocol that this host can filter.")
    if number in (ICMP, ICMP6):
        number, what = (ICMP, "icmp") if version == 4 else (ICMP6, "icmpv6")
        words = [f"meta l4proto {number}"]
        if low is not None:
            words += [f"{what} type {int(low)}"] + ([f"{what} code {int(high)}"] if high is not None else [])
        return words
    words = [f"meta l4proto {number}"]
    first, last = low if low is not None else high, high if high is not None else low
    if number in WITH_PORTS and first is not None and last is not None and (first, last) != (1, 65535):
        words.append(f"th dport {int(first)}" + (f"-{int(last)}" if last != first else ""))
    return words


def _either(values: list[str]) -> str:
    return values[0] if len(values) == 1 else "{ " + ", ".join(values) + " }"


def _shown(net: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str:
    return str(net.network_address) if net.prefixlen == net.max_prefixlen else str(net)


@functools.lru_cache(16384)
def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise Refused(f"{text!r} is neither an address nor a CIDR.") from None


@functools.lru_cache(16384)
def _address(text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise Refused(f"{text!r} is no IP address.") from None


def _checked_subnet(subnet: SubnetWire) -> None:
    _network(subnet.cidr)
    for address in [subnet.gateway, subnet.dhcp_address, *subnet.dns]:
        if address:
            _address(address)
    for destination, hop in subnet.routes:
        _network(destination)
        _address(hop)


__all__ = ["CUT", "Groups", "Guarded", "NetworkWire", "checked", "guarded", "link_local", "tables"]
