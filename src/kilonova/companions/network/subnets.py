"""Subnets: the addresses of a network, and what its guests are told by DHCP."""

import itertools
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Annotated as A
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Meta

from kilonova.companions import ipam
from kilonova.companions.network import addresses, frame, networks
from kilonova.companions.network.frame import Flag, Project, R, Text, Unset, Uuid, View
from kilonova.companions.network.wiring import weave
from kilonova.companions.network.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.store import networks as store

MOST_DNS_SERVERS, MOST_ROUTES, MOST_POOLS = 5, 20, 50
DHCP = "network:dhcp"

Mode = Literal["slaac", "dhcpv6-stateful", "dhcpv6-stateless"]
Ip = A[str, Meta(max_length=64)]

# ---- what is said


class Pool(msgspec.Struct, forbid_unknown_fields=True):
    start: Ip
    end: Ip


class HostRoute(msgspec.Struct, forbid_unknown_fields=True):
    destination: Ip
    nexthop: Ip


class SubnetChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of update."""

    name: Text | Unset = UNSET
    description: Text | Unset = UNSET
    gateway_ip: Ip | None | Unset = UNSET
    allocation_pools: A[list[Pool], Meta(max_length=MOST_POOLS)] | None | Unset = UNSET
    dns_nameservers: list[Ip] | None | Unset = UNSET
    host_routes: list[HostRoute] | None | Unset = UNSET
    enable_dhcp: Flag | Unset = UNSET


class SubnetWish(SubnetChange, kw_only=True):
    """Body of create."""

    project_id: Project | Unset = UNSET
    tenant_id: Project | Unset = UNSET
    network_id: Uuid
    ip_version: Literal[4, 6, "4", "6"] | Unset = UNSET
    cidr: Ip | None | Unset = UNSET
    ipv6_ra_mode: Mode | None | Unset = UNSET
    ipv6_address_mode: Mode | None | Unset = UNSET
    subnetpool_id: Text | None | Unset = UNSET
    use_default_subnetpool: Flag | Unset = UNSET
    prefixlen: int | frame.Digits | None | Unset = UNSET


class SubnetBody(msgspec.Struct, forbid_unknown_fields=True):
    subnet: SubnetWish | Unset = UNSET
    subnets: list[SubnetWish] | Unset = UNSET


class SubnetChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    subnet: SubnetChange


# ---- what is shown


def views(tx: Tx, world: World, subnets: Sequence[store.Subnet]) -> list[View]:
    return [view(s) for s in subnets]


def view(s: store.Subnet) -> View:
    return {
        **frame.standard(s),
        "network_id": s.network_id,
        "ip_version": s.ip_version,
        "cidr": s.cidr,
        "gateway_ip": s.gateway_ip,
        "allocation_pools": [{"start": a, "end": b} for a, b in s.allocation_pools],
        "dns_nameservers": s.dns_nameservers,
        "host_routes": [{"destination": d, "nexthop": n} for d, n in s.host_routes],
        "enable_dhcp": s.enable_dhcp,
        "ipv6_ra_mode": s.ipv6_ra_mode,
        "ipv6_address_mode": s.ipv6_address_mode,
        "subnetpool_id": None,
    }


T, N = store.subnets.c, store.networks.c
_NETWORKS = store.networks.select().with_only_columns(N.id)


def _about(tx: Tx, subnet: store.Subnet) -> dict[str, Any]:
    return frame.target(subnet, store.get(tx, store.Network, subnet.network_id))


KIND: frame.Kind[store.Subnet] = frame.Kind(
    one="subnet",
    many="subnets",
    struct=store.Subnet,
    missing="SubnetNotFound",
    named="Subnet",
    views=views,
    scope=lambda project: (
        (T.project_id == project)
        | T.network_id.in_(
            _NETWORKS.where((N.project_id == project) | N.shared.is_(True) | N.router_external.is_(True))
        )
    ),
    filters={
        "shared": lambda values: T.network_id.in_(
            _NETWORKS.where(N.shared.in_([frame.flag("shared", v) for v in values]))
        ),
        "subnetpool_id": lambda values: T.id.is_(None),
    },
    target=_about,
)
frame.common(KIND)


# ---- what is done


@R.post("/v2.0/subnets", body=SubnetBody, ok=201, policy="create_subnet", late=True)
def create(call: Call) -> View:
    wishes: list[SubnetWish] = frame.several(call.body.subnet, call.body.subnets)

    def work(tx: Tx) -> list[View]:
        made = []
        for wish in wishes:
            project = frame.owner(call, wish)
            place = networks.place(tx, call, wish.network_id)
            about = {**frame.target(place.network, place.network), "project_id": project}
            call.check(about)
            made.append(view(new(tx, call.world, project, place, wish)))
        return made

    views = call.world.change(work)
    weave(call.world, networks=[v["network_id"] for v in views])
    return frame.answer(KIND, call, call.body.subnets is not UNSET, views)


def new(tx: Tx, world: World, project: str, place: store.Place, wish: SubnetWish) -> store.Subnet:
    """Raises Invalid, Conflict, OverQuota. With DHCP the network gets a DHCP port, or its port another address."""
    told = frame.said(wish)
    if told.get("subnetpool_id") or told.get("use_default_subnetpool"):
        raise NotFound(
            f"Subnet pool {frame.printable(str(told.get('subnetpool_id')))} could not be found.",
            code="SubnetPoolNotFound",
        )
    if not told.get("cidr"):
        raise Invalid(
            "Bad subnets request: a subnetpool must be specified in the absence of a cidr.", code="BadRequest"
        )
    subnet = decided(frame.made(world, project), place, told)
    store.charge(tx, project, "subnet", 1, world.config.quota_subnet)
    store.add(tx, subnet)
    if subnet.enable_dhcp:
        serve(tx, world, place.network, subnet)
    return subnet


def decided(made: dict[str, Any], place: store.Place, told: dict[str, Any]) -> store.Subnet:
    """The subnet as it will be; pure. Raises Invalid, Conflict."""
    n = ipam.net(told["cidr"])
    version = int(told.get("ip_version", n.version))
    if n.version != version:
        raise frame.bad(f"cidr {n} does not match the ip_version {version}")
    ipam.check_usable(str(n))
    ipam.check_mtu(place.network.mtu, [version])
    dhcp = told.get("enable_dhcp", True)
    if dhcp and n.prefixlen > n.max_prefixlen - 2:
        raise frame.bad("Subnet has a prefix length that is incompatible with DHCP service enabled")
    for other in place.subnets:
        if ipam.overlap(str(n), other.cidr):
            raise frame.bad(
                f"Requested subnet with cidr: {n} for network: {place.network.id} overlaps with another subnet"
            )
    ra, mode = told.get("ipv6_ra_mode"), told.get("ipv6_address_mode")
    ipam.check_modes(version, str(n), dhcp, ra, mode)
    gateway = told.get("gateway_ip", ipam.first_address(str(n)))
    gateway = None if gateway is None else ipam.checked_gateway(str(n), gateway)
    pools = told.get("allocation_pools")
    return store.Subnet(
        **made,
        name=told.get("name", ""),
        description=told.get("description", ""),
        network_id=place.network.id,
        ip_version=version,
        cidr=str(n),
        gateway_ip=gateway,
        enable_dhcp=dhcp,
        ipv6_ra_mode=ra,
        ipv6_address_mode=mode,
        allocation_pools=_pools(str(n), pools, gateway),
        dns_nameservers=_dns_servers(told.get("dns_nameservers")),
        host_routes=_routes(told.get("host_routes"), version),
    )


def _pools(cidr: str, said: list[Pool] | None, gateway: str | None) -> list[list[str]]:
    pools = (
        ipam.standard_pools(cidr, gateway)
        if said is None
        else ipam.checked_pools(cidr, [(p.start, p.end) for p in said], gateway)
    )
    return [list(p) for p in pools]


def _dns_servers(said: list[str] | None) -> list[str]:
    servers = [str(ipam.ip(s, "dns_nameservers")) for s in said or []]
    if len(servers) > MOST_DNS_SERVERS:
        raise Invalid(
            f"Unable to complete operation for subnet. The number of DNS nameservers exceeds the limit {MOST_DNS_SERVERS}.",
            code="DNSNameServersExhausted",
        )
    if len(set(servers)) < len(servers):
        raise frame.bad("Invalid input for dns_nameservers. Reason: Duplicate nameserver.", "HTTPBadRequest")
    return servers


def _routes(said: list[HostRoute] | None, version: int) -> list[list[str]]:
    routes = [[ipam.prefix(r.destination, "host_routes"), str(ipam.ip(r.nexthop, "host_routes"))] for r in said or []]
    if len(routes) > MOST_ROUTES:
        raise Invalid(
            f"Unable to complete operation for subnet. The number of host routes exceeds the limit {MOST_ROUTES}.",
            code="HostRoutesExhausted",
        )
    if any(ip_address(hop).version != version or ipam.net(to).version != version for to, hop in routes):
        raise frame.bad("Invalid input for host_routes. Reason: not of the subnet's IP version.", "HTTPBadRequest")
    if any(a == b for a, b in itertools.combinations(routes, 2)):
        raise frame.bad("Invalid input for host_routes. Reason: Duplicate hostroute.", "HTTPBadRequest")
    return routes


@R.put("/v2.0/subnets/{id}", body=SubnetChangeBody, policy="update_subnet", late=True)
def update(call: Call, id: str) -> View:
    def work(tx: Tx) -> View:
        subnet = KIND.get(tx, id)
        frame.allow(call, "update", KIND, _about(tx, subnet), id)
        frame.revised(KIND, call, subnet)
        told = frame.said(call.body.subnet)
        if "gateway_ip" in told and told["gateway_ip"] != subnet.gateway_ip:
            _check_gateway_free(tx, subnet)
        changes = _changes(subnet, told)
        changed = frame.kept(store.change(tx, subnet, call.world.clock.now(), **changes)) if changes else subnet
        if subnet.enable_dhcp and not changed.enable_dhcp:
            unserve(tx, changed)
        elif changed.enable_dhcp and not subnet.enable_dhcp:
            network = store.get(tx, store.Network, subnet.network_id)
            assert network is not None
            serve(tx, call.world, network, changed)
        return view(changed)

    after = call.world.change(work)
    weave(call.world, networks=[after["network_id"]])
    return frame.answer(KIND, call, False, [after])


def _changes(subnet: store.Subnet, told: dict[str, Any]) -> dict[str, Any]:
    """The columns that become others; pure. Raises Invalid, Conflict."""
    changes: dict[str, Any] = {n: told[n] for n in ("name", "description", "enable_dhcp") if n in told}
    if told.get("enable_dhcp") is False and (subnet.ipv6_ra_mode or subnet.ipv6_address_mode):
        raise frame.bad("ipv6_ra_mode or ipv6_address_mode cannot be set when enable_dhcp is set to False.")
    if told.get("enable_dhcp") and ipam.net(subnet.cidr).prefixlen > ipam.net(subnet.cidr).max_prefixlen - 2:
        raise frame.bad("Subnet has a prefix length that is incompatible with DHCP service enabled")
    gateway = subnet.gateway_ip
    if "gateway_ip" in told:
        gateway = None if told["gateway_ip"] is None else ipam.checked_gateway(subnet.cidr, told["gateway_ip"])
        changes["gateway_ip"] = gateway
    if told.get("allocation_pools") is not None:
        changes["allocation_pools"] = _pools(subnet.cidr, told["allocation_pools"], gateway)
    elif gateway is not None and "gateway_ip" in told:
        ipam.check_gateway_outside(subnet.cidr, subnet.allocation_pools, gateway)
    if "dns_nameservers" in told:
        changes["dns_nameservers"] = _dns_servers(told["dns_nameservers"])
    if "host_routes" in told:
        changes["host_routes"] = _routes(told["host_routes"], subnet.ip_version)
    return changes


def _check_gateway_free(tx: Tx, subnet: store.Subnet) -> None:
    """A router that has the gateway's address would go on having it."""
    for port_id, device_owner in store.owners_of_addresses(tx, subnet.id):
        held = store.addresses_of(tx, [port_id]).get(port_id, [])
        if device_owner == "network:router_interface" and any(a.address == subnet.gateway_ip for a in held):
            raise Conflict(
                f"Current gateway ip {subnet.gateway_ip} already in use by port {port_id}. Unable to update.",
                code="GatewayIpInUse",
            )


@R.delete("/v2.0/subnets/{id}", ok=204, policy="delete_subnet", late=True)
def delete(call: Call, id: str) -> None:
    def work(tx: Tx) -> str:
        subnet = KIND.get(tx, id)
        frame.allow(call, "delete", KIND, _about(tx, subnet), id)
        frame.revised(KIND, call, subnet)
        drop(tx, subnet)
        return subnet.network_id

    network_id = call.world.change(work)
    weave(call.world, networks=[network_id])


def drop(tx: Tx, subnet: store.Subnet) -> None:
    """Raises Conflict where a port still has an address of it that it did not give itself."""
    automatic = subnet.ipv6_address_mode in ipam.AUTOMATIC
    for port_id, device_owner in store.owners_of_addresses(tx, subnet.id):
        if device_owner != DHCP and not (automatic and not device_owner.startswith("network:router")):
            raise Conflict(
                f"Unable to complete operation on subnet {subnet.id}: One or more ports have an IP allocation from this subnet.",
                code="SubnetInUse",
                why=f"port {port_id}",
            )
    unserve(tx, subnet)
    for port_id, _ in store.owners_of_addresses(tx, subnet.id):
        held = store.addresses_of(tx, [port_id])[port_id]
        store.release(tx, port_id, [a for a in held if a.subnet_id == subnet.id])
    store.remove(tx, store.Subnet, subnet.id)
    store.discharge(tx, subnet.project_id, "subnet")


# ---- DHCP


def serve(tx: Tx, world: World, network: store.Network, subnet: store.Subnet) -> None:
    """Give the network's DHCP port an address of this subnet; make the port if there is none.

    Where no address is left there is no DHCP on it: guests may still have all addresses by hand.
    """
    old = _dhcp_port(tx, network.id)
    port = old or addresses.service_port(world, network, DHCP, f"dhcp-{network.id}", network.project_id)
    held = store.addresses_of(tx, [port.id]).get(port.id, []) if old else []
    if any(a.subnet_id == subnet.id for a in held):
        return
    if old is None:
        store.add(tx, port)
    automatic = (subnet.ipv6_address_mode or subnet.ipv6_ra_mode) in ipam.AUTOMATIC
    lowest = ipam.Slot(subnet.id, subnet.allocation_pools[0][0]) if subnet.allocation_pools and not automatic else None
    choices = [*([lowest] if lowest else []), ipam.Slot(subnet.id)]
    try:
        addresses.grant(tx, world, network.id, [subnet], (port.id, port.mac_address), [choices], first=len(held))
    except Conflict:
        if old is None:
            store.remove(tx, store.Port, port.id)


def unserve(tx: Tx, subnet: store.Subnet) -> None:
    """Take the subnet's address from the DHCP port, and the port if it was the last."""
    port = _dhcp_port(tx, subnet.network_id)
    if port is None:
        return
    held = store.addresses_of(tx, [port.id]).get(port.id, [])
    mine = [a for a in held if a.subnet_id == subnet.id]
    store.release(tx, port.id, mine)
    if len(mine) == len(held):
        store.remove(tx, store.Port, port.id)


def _dhcp_port(tx: Tx, network_id: str) -> store.Port | None:
    p = store.ports.c
    found = store.find(tx, store.Port, p.network_id == network_id, p.device_owner == DHCP)
    return found[0] if found else None
