"""Bridges, veth pairs, addresses and routes: what a namespace must hold, what it holds, and the lines between.

`Space` says what must be; `seen` reads what is; `mend` is pure and gives the lines for `ip -batch` that make one of
the other.  What is not ours is left alone.
"""

import ipaddress
import json
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec


# fmt: off
class Link(msgspec.Struct, frozen=True):
    """A device. A veth's `far` end is (namespace, name there); a tap is somebody else's, and mended where it is.

    Its master "" means: whatever it has.
    """

    name: str
    kind: Literal["bridge", "veth", "tap", "end", "loopback"]  # end: the far end of a veth made elsewhere
    mtu: int = 0  # 0: as it is
    master: str = ""
    mac: str = ""
    far: tuple[str, str] | None = None


class Space(msgspec.Struct, frozen=True):
    """All that one namespace must hold. Addresses are (device, CIDR), routes (destination, next hop)."""

    links: list[Link] = []
    addresses: list[tuple[str, str]] = []
    routes: list[tuple[str, str]] = []
    settings: dict[str, str] = {}  # below /proc/sys/net: made before links
    routed: bool = False  # its routes are ours, too
# fmt: on


class Seen(msgspec.Struct, frozen=True):
    """A device as the kernel has it."""

    kind: str
    mtu: int
    master: str
    mac: str
    up: bool
    alias: str
    addresses: frozenset[str]


class Sight(msgspec.Struct, frozen=True):
    """A namespace as it is. Routes are those that somebody set, as (destination, next hop)."""

    links: dict[str, Seen]
    routes: frozenset[tuple[str, str]] = frozenset()


def seen(run: Callable[[list[str]], str], routes: bool) -> Sight:
    """Reads a namespace by iproute2; `run` runs a program in it."""
    listed: list[dict[str, Any]] = json.loads(run(["ip", "-j", "-d", "addr", "show"]) or "[]")
    links = {
        one["ifname"]: Seen(
            kind=one.get("linkinfo", {}).get("info_kind", one.get("link_type", "")),
            mtu=one["mtu"],
            master=one.get("master", ""),
            mac=one.get("address", ""),
            up="UP" in one["flags"],
            alias=one.get("ifalias", ""),
            addresses=frozenset(
                f"{a['local']}/{a['prefixlen']}"
                for a in one.get("addr_info", ())
                if "local" in a and not _by_kernel(one["ifname"], a)
            ),
        )
        for one in listed
        if "ifname" in one
    }
    if not routes:
        return Sight(links)
    hops = set()
    for version in ("-4", "-6"):
        set_by_us = json.loads(run(["ip", version, "-j", "route", "show", "proto", "static"]) or "[]")
        hops |= {(_destination(r["dst"], version), r["gateway"]) for r in set_by_us if "gateway" in r}
    return Sight(links, frozenset(hops))


def mend(must: Space, sight: Sight, alias: str, torn: Iterable[str] = ()) -> list[str]:
    """Lines for `ip -batch` that turn what is seen into what must be; none when it is so.

    `torn` are veths whose far end is not where it must be: they are made anew.
    """
    wanted = {one.name: one for one in must.links}
    torn = set(torn)
    lines = [f"link delete dev {name}" for name in sight.links if name not in wanted and _ours(sight, name, alias)]
    lines += [f"link delete dev {name}" for name in sorted(torn) if name in sight.links]
    there = {name: one for name, one in sight.links.items() if name not in torn}
    for link in must.links:
        lines += _link(link, there, alias)
    for link in must.links:
        lines += _addresses(link, there.get(link.name), [cidr for name, cidr in must.addresses if name == link.name])
    # A new next hop for a destination replaces the old one; only destinations that are gone are deleted.
    kept = {destination for destination, _ in must.routes}
    lines += [
        f"route delete {there_to} via {hop} proto static"
        for there_to, hop in sorted(sight.routes)
        if there_to not in kept
    ]
    lines += [
        f"route replace {route[0]} via {route[1]} proto static" for route in must.routes if route not in sight.routes
    ]
    return lines


def missing_ends(must: Space, sight: Sight) -> set[str]:
    """Names of far ends that must be in this namespace and are not."""
    return {one.name for one in must.links if one.kind == "end" and one.name not in sight.links}


def _link(link: Link, there: dict[str, Seen], alias: str) -> list[str]:
    lines, old = [], there.get(link.name)
    if old is None:
        if link.kind == "bridge":
            # Without snooping: nobody asks for memberships here, and IPv6's neighbour discovery would starve.
            lines.append(
                f"link add name {link.name} mtu {link.mtu} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
            )
        elif link.kind == "veth" and link.far:
            space, far = link.far
            to = f" netns {space}" if space else ""
            lines.append(f"link add name {link.name} mtu {link.mtu} type veth peer name {far} mtu {link.mtu}{to}")
        else:
            return []  # a tap that is not plugged yet, or an end whose pair is made in another space
    words = []
    if link.kind in ("bridge", "veth") and (old is None or old.alias != alias):
        words.append(f"alias {alias}")
    if link.mac and (old is None or old.mac != link.mac):
        words.append(f"address {link.mac}")
    if link.mtu and old is not None and old.mtu != link.mtu:
        words.append(f"mtu {link.mtu}")
    if link.master and (old is None or old.master != link.master):
        words.append(f"master {link.master}")
    if old is None or not old.up:
        words.append("up")
    if words:
        lines.append(f"link set dev {link.name} {' '.join(words)}")
    return lines


def _addresses(link: Link, old: Seen | None, must: list[str]) -> list[str]:
    """Wider prefixes first: the kernel takes the first of a subnet as the one to speak with."""
    if link.kind in ("tap", "bridge") or (old is None and link.kind == "end"):
        return []
    has = old.addresses if old else frozenset()
    wanted = sorted(set(must), key=lambda cidr: (int(cidr.rpartition("/")[2]), cidr))
    lines = [f"address delete {cidr} dev {link.name}" for cidr in sorted(has - set(wanted))]
    fresh = [cidr for cidr in wanted if cidr not in has]
    return lines + [f"address add {cidr} dev {link.name}{' nodad' if ':' in cidr else ''}" for cidr in fresh]


def _ours(sight: Sight, name: str, alias: str) -> bool:
    return sight.links[name].alias == alias


def _by_kernel(device: str, address: dict[str, Any]) -> bool:
    """Addresses that nobody set: loopback's, and IPv6's link-local ones."""
    ip = ipaddress.ip_address(address["local"])
    return (device == "lo" and ip.is_loopback) or (ip.version == 6 and ip.is_link_local and not _metadata6(ip))


def _metadata6(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return str(ip) == "fe80::a9fe:a9fe"


def _destination(text: str, version: str) -> str:
    if text == "default":
        return "0.0.0.0/0" if version == "-4" else "::/0"
    return text if "/" in text else f"{text}/{32 if version == '-4' else 128}"
