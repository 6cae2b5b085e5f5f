"""What one host's network must look like: the whole of it, declared. `companions/wires` makes it so.

The network companion computes a `Wiring` from its tables and hands it to the wires, which compare it with
what is there and mend the difference; so a restart, a crash half-way and a change are the same act.
"""

from typing import Literal

import msgspec


class SubnetWire(msgspec.Struct, frozen=True):
    """DHCP knows each port's addresses; no dynamic ranges are handed out. The modes are the network API's, version 6."""

    id: str
    cidr: str
    version: Literal[4, 6] = 4
    gateway: str | None = None
    dns: list[str] = []
    routes: list[tuple[str, str]] = []  # (destination CIDR, next hop)
    dhcp: bool = True
    dhcp_address: str | None = None  # where DHCP and metadata answer on this subnet
    ra_mode: Literal["", "slaac", "dhcpv6-stateless", "dhcpv6-stateful"] = ""
    address_mode: Literal["", "slaac", "dhcpv6-stateless", "dhcpv6-stateful"] = ""


class Rule(msgspec.Struct, frozen=True):
    """A security group's rule with its remote group already turned into addresses (CIDRs). No remotes: nobody.

    `remote_group` names where `remotes` came from. All rules of one group and version share one set in the kernel
    then, so that a new member costs one element and not one rule in each port of the group.
    """

    direction: Literal["ingress", "egress"]
    version: Literal[4, 6] = 4
    protocol: str | None = None  # tcp, udp, icmp, icmpv6, or a number as text; None: any
    port_min: int | None = None  # for icmp: the type
    port_max: int | None = None  # for icmp: the code
    remotes: list[str] = msgspec.field(
        default_factory=lambda: ["0.0.0.0/0"]
    )  # any of ::/0 and 0.0.0.0/0 is everybody of the rule's version
    remote_group: str = ""


class PortWire(msgspec.Struct, frozen=True):
    """A guest's port that is bound to this host. `device` is its tap. DHCP answers `mac` with the addresses."""

    id: str
    network_id: str
    mac: str
    device: str
    addresses: list[tuple[str, str]] = []  # (subnet id, address)
    hostname: str = ""
    server_id: str = ""
    project_id: str = ""
    up: bool = True
    secured: bool = True  # port_security_enabled: rules and anti-spoofing hold
    allowed_pairs: list[tuple[str, str]] = []  # (MAC, address or CIDR)
    rules: list[Rule] = []


class NetworkWire(msgspec.Struct, frozen=True):
    """A layer-2 network: a bridge on this host. An external one is the way out, through the host.

    On a bridge that is not external only declared ports may speak.
    """

    id: str
    bridge: str
    mtu: int = 1500
    external: bool = False
    subnets: list[SubnetWire] = []


class FloatingWire(msgspec.Struct, frozen=True):
    address: str
    fixed: str


class RouterWire(msgspec.Struct, frozen=True):
    """Legs are (network id, the router's address with prefix, MAC); with an outside leg it translates.

    `routes` are (destination CIDR, next hop). With `snat`, what comes from outside reaches floating addresses only.
    """

    id: str
    legs: list[tuple[str, str, str]] = []
    outside: tuple[str, str, str] | None = None
    outside_gateway: str | None = None
    snat: bool = True
    floating: list[FloatingWire] = []
    routes: list[tuple[str, str]] = []


class Wiring(msgspec.Struct, frozen=True):
    """All of one host. `domain` follows the host names that DHCP tells; `lease_s` is how long its answers hold."""

    networks: list[NetworkWire] = []
    ports: list[PortWire] = []
    routers: list[RouterWire] = []
    domain: str = "novalocal"
    lease_s: int = 86_400
