"""Routers: they join subnets, and lead out by an external network, where their project's addresses become one."""

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Annotated as A
from typing import Any

import msgspec
from msgspec import UNSET, Meta

from kilonova.companions import ipam
from kilonova.companions.network import addresses, frame, networks, ports
from kilonova.companions.network.frame import Flag, Project, R, Text, Unset, Uuid, View
from kilonova.companions.network.wiring import GATE, LEG, weave
from kilonova.companions.network.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.store import networks as store

MOST_ROUTES = 30

# ---- what is said


class ExternalIp(msgspec.Struct, forbid_unknown_fields=True):
    subnet_id: Uuid | None = None
    ip_address: A[str, Meta(max_length=64)] | None = None


class Gateway(msgspec.Struct, forbid_unknown_fields=True):
    """`external_gateway_info`; without a network there is no gateway."""

    network_id: Uuid | None = None
    enable_snat: Flag | None | Unset = UNSET
    external_fixed_ips: A[list[ExternalIp], Meta(max_length=100)] | Unset = UNSET


class Route(msgspec.Struct, forbid_unknown_fields=True):
    destination: A[str, Meta(max_length=64)]
    nexthop: A[str, Meta(max_length=64)]


class RouterChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: Text | Unset = UNSET
    description: Text | Unset = UNSET
    admin_state_up: Flag | Unset = UNSET
    external_gateway_info: Gateway | None | Unset = UNSET
    routes: list[Route] | None | Unset = UNSET


class RouterWish(RouterChange, kw_only=True):
    project_id: Project | Unset = UNSET
    tenant_id: Project | Unset = UNSET
    availability_zone_hints: A[list[Text], Meta(max_length=10)] | Unset = UNSET


class RouterBody(msgspec.Struct, forbid_unknown_fields=True):
    router: RouterWish | Unset = UNSET
    routers: list[RouterWish] | Unset = UNSET


class RouterChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    router: RouterChange


class Interface(msgspec.Struct, forbid_unknown_fields=True):
    subnet_id: Uuid | None = None
    port_id: Uuid | None = None


class Routes(msgspec.Struct, forbid_unknown_fields=True):
    routes: list[Route]


class RoutesBody(msgspec.Struct, forbid_unknown_fields=True):
    router: Routes


# ---- what is shown


def views(tx: Tx, world: World, routers: Sequence[store.Router]) -> list[View]:
    gates = [r.gateway_port_id for r in routers if r.gateway_port_id]
    held = store.addresses_of(tx, gates) if gates else {}
    return [view(r, held.get(r.gateway_port_id or "", [])) for r in routers]


def view(r: store.Router, outside: Sequence[store.Address]) -> View:
    return {
        **frame.standard(r),
        "admin_state_up": r.admin_state_up,
        "status": "ACTIVE",
        "external_gateway_info": {
            "network_id": r.gateway_network_id,
            "enable_snat": r.enable_snat,
            "external_fixed_ips": [{"subnet_id": s, "ip_address": a} for s, a in outside],
        }
        if r.gateway_network_id
        else None,
        "routes": _shown(r.routes),
        "availability_zones": ["nova"],
        "availability_zone_hints": r.availability_zone_hints,
    }


def _shown(routes: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    return [{"destination": to, "nexthop": hop} for to, hop in routes]


T, P = store.routers.c, store.ports.c

KIND: frame.Kind[store.Router] = frame.Kind(
    one="router",
    many="routers",
    struct=store.Router,
    missing="RouterNotFound",
    named="Router",
    views=views,
    scope=lambda project: T.project_id == project,
    filters={"status": lambda values: T.id.is_not(None) if "ACTIVE" in values else T.id.is_(None)},
    hidden=frozenset({"tags", "gateway_network_id", "gateway_port_id", "enable_snat"}),
)
frame.common(KIND)


# ---- what is done


@R.post("/v2.0/routers", body=RouterBody, ok=201, policy="create_router", late=True)
def create(call: Call) -> View:
    wishes: list[RouterWish] = frame.several(call.body.router, call.body.routers)

    def work(tx: Tx) -> list[View]:
        made = []
        for wish in wishes:
            project = frame.owner(call, wish)
            about = {**frame.STRANGER, "project_id": project}
            call.check(about)
            told = frame.said(wish)
            _allow_gateway(tx, call, "create_router", told, about)
            made.append(new(tx, call.world, project, told))
        return views(tx, call.world, made)

    shown = call.world.change(work)
    if any(v["external_gateway_info"] for v in shown):
        weave(call.world)
    return frame.answer(KIND, call, call.body.routers is not UNSET, shown)


def _allow_gateway(tx: Tx, call: Call, verb: str, told: dict[str, Any], about: dict[str, Any]) -> None:
    gateway = told.get("external_gateway_info")
    if gateway is None:
        return
    parts = frame.said(gateway)
    asked = {f"external_gateway_info:{n}": v for n, v in parts.items() if n != "network_id" and v is not None}
    if parts.get("enable_snat") is True and verb == "create_router":
        del asked["external_gateway_info:enable_snat"]  # as it would be anyhow
    frame.allow_said(call, verb, asked, about)
    if gateway.network_id:
        networks.place(tx, call, gateway.network_id)


def new(tx: Tx, world: World, project: str, told: dict[str, Any]) -> store.Router:
    router = store.Router(
        **frame.made(world, project),
        name=told.get("name", ""),
        description=told.get("description", ""),
        admin_state_up=told.get("admin_state_up", True),
        gateway_network_id=None,
        gateway_port_id=None,
        enable_snat=True,
        routes=[],
        availability_zone_hints=told.get("availability_zone_hints", []),
    )
    store.charge(tx, project, "router", 1, world.config.quota_router)
    store.add(tx, router)
    if gateway := told.get("external_gateway_info"):
        router = lead_out(tx, world, router, gateway)
    if told.get("routes"):
        router = _change(tx, world, router, routes=_checked_routes(tx, router, told["routes"]))
    return router


def _change(tx: Tx, world: World, router: store.Router, **values: Any) -> store.Router:
    return frame.kept(store.change(tx, router, world.clock.now(), **values))


@R.put("/v2.0/routers/{id}", body=RouterChangeBody, policy="update_router", late=True)
def update(call: Call, id: str) -> View:
    def work(tx: Tx) -> View:
        router = KIND.get(tx, id)
        about = frame.target(router)
        frame.allow(call, "update", KIND, about, id)
        frame.revised(KIND, call, router)
        told = frame.said(call.body.router)
        _allow_gateway(tx, call, "update_router", told, about)
        if "external_gateway_info" in told:
            router = lead_out(tx, call.world, router, told["external_gateway_info"] or Gateway())
        changes: dict[str, Any] = {n: told[n] for n in ("name", "description", "admin_state_up") if n in told}
        if "routes" in told:
            changes["routes"] = _checked_routes(tx, router, told["routes"] or [])
        if changes:
            router = _change(tx, call.world, router, **changes)
        return views(tx, call.world, [router])[0]

    shown = call.world.change(work)
    weave(call.world)
    return frame.answer(KIND, call, False, [shown])


@R.delete("/v2.0/routers/{id}", ok=204, policy="delete_router", late=True)
def delete(call: Call, id: str) -> None:
    def work(tx: Tx) -> None:
        router = KIND.get(tx, id)
        frame.allow(call, "delete", KIND, frame.target(router), id)
        frame.revised(KIND, call, router)
        drop(tx, call.world, router)

    call.world.change(work)
    weave(call.world)


def drop(tx: Tx, world: World, router: store.Router) -> None:
    """Raises Conflict while it has legs."""
    if legs := legs_of(tx, router.id):
        raise Conflict(f"Router {router.id} still has ports", code="RouterInUse", why=f"port {legs[0].id}")
    lead_out(tx, world, router, Gateway())
    store.remove(tx, store.Router, router.id)
    store.discharge(tx, router.project_id, "router")


def legs_of(tx: Tx, router_id: str) -> list[store.Port]:
    return store.find(tx, store.Port, P.device_id == router_id, P.device_owner == LEG)


# ---- the way out


def lead_out(tx: Tx, world: World, router: store.Router, gateway: Gateway) -> store.Router:
    """Set, change or take away the gateway. Raises Conflict, Invalid, NotFound."""
    snat = frame.said(gateway).get("enable_snat") is not False
    same = gateway.network_id is not None and gateway.network_id.lower() == router.gateway_network_id
    if same and gateway.external_fixed_ips is UNSET:
        return router if snat == router.enable_snat else _change(tx, world, router, enable_snat=snat)
    if router.gateway_port_id:
        router = _lead_nowhere(tx, world, router, moving=same)
    if gateway.network_id is None:
        return router
    place = store.place(tx, gateway.network_id.lower())
    if place is None:
        raise networks.KIND.gone(gateway.network_id)
    if not place.network.router_external:
        raise Invalid(f"Bad router request: Network {place.network.id} is not an external network.", code="BadRequest")
    for s in _near(tx, router):
        if any(ipam.overlap(s.cidr, o.cidr) for o in place.subnets):
            raise Invalid(
                f"Bad router request: Cidr {s.cidr} of subnet {s.id} overlaps with a subnet of the external network "
                f"{place.network.id}",
                code="BadRequest",
            )
    port = addresses.service_port(world, place.network, GATE, router.id, "")
    said = [] if gateway.external_fixed_ips is UNSET else gateway.external_fixed_ips
    wanted = outer_slots(place, [ipam.Said(e.subnet_id and e.subnet_id.lower(), e.ip_address) for e in said], port)
    store.add(tx, port)
    addresses.grant(tx, world, place.network.id, place.subnets, (port.id, port.mac_address), wanted)
    return _change(tx, world, router, gateway_network_id=place.network.id, gateway_port_id=port.id, enable_snat=snat)


def outer_slots(place: store.Place, said: Sequence[ipam.Said], port: store.Port) -> list[list[ipam.Slot]]:
    """Where on the external network; by lot where nothing is said. Raises Invalid where it has no subnet."""
    grounds = addresses.grounds(place.subnets)
    if said:
        slots = ipam.slots(place.network.id, grounds, said, port.mac_address, most=ports.MOST_ADDRESSES)
        return [[s] for s in slots]
    return ipam.standard_slots(grounds)


def _lead_nowhere(tx: Tx, world: World, router: store.Router, *, moving: bool) -> store.Router:
    """`moving`: to another address of the same network, which floating IPs do not mind."""
    if not moving and store.find(tx, store.Floating, store.floating.c.router_id == router.id):
        raise Conflict(
            f"Gateway cannot be updated for router {router.id}, since a gateway to external network "
            f"{router.gateway_network_id} is required by one or more floating IPs.",
            code="RouterExternalGatewayInUseByFloatingIp",
        )
    old = router.gateway_port_id
    router = _change(tx, world, router, gateway_network_id=None, gateway_port_id=None)
    if old:
        store.remove(tx, store.Port, old)
    return router


# ---- routes of its own


def _checked_routes(tx: Tx, router: store.Router, said: Sequence[Route]) -> list[list[str]]:
    """Raises Invalid where the next hop is nobody's neighbour."""
    routes = [[ipam.prefix(r.destination, "routes"), str(ipam.ip(r.nexthop, "routes"))] for r in said]
    if len(routes) > MOST_ROUTES:
        raise Invalid(
            f"Unable to complete operation for {router.id}. The number of routes exceeds the maximum {MOST_ROUTES}.",
            code="RoutesExhausted",
        )
    if len({tuple(r) for r in routes}) < len(routes):
        raise frame.bad("Invalid input for routes. Reason: Duplicate route.", "HTTPBadRequest")
    near = [s.cidr for s in _near(tx, router)]
    own = {a.address for a in _held(tx, router)}
    known: set[str] = set()
    for to, hop in routes:
        why = ipam.impassable(ipam.Way(to, hop), near, own, router.gateway_port_id is not None)
        if why or to in known:
            why = why or "the destination has another route already"
            raise Invalid(
                f"Invalid format for routes: [{{'destination': '{to}', 'nexthop': '{hop}'}}], {why}",
                code="InvalidRoutes",
            )
        known.add(to)
    return routes


def _near(tx: Tx, router: store.Router) -> list[store.Subnet]:
    """The subnets it has an address in."""
    return store.among(tx, store.Subnet, "id", {a.subnet_id for a in _held(tx, router)})


def _held(tx: Tx, router: store.Router) -> list[store.Address]:
    """Its addresses, inside and outside."""
    mine = [p.id for p in legs_of(tx, router.id)] + ([router.gateway_port_id] if router.gateway_port_id else [])
    held = store.addresses_of(tx, mine) if mine else {}
    return [a for several in held.values() for a in several]


def _reroute(call: Call, id: str, become: Any, rule: str) -> View:
    def work(tx: Tx) -> View:
        router = KIND.get(tx, id)
        about = frame.target(router)
        frame.allow(call, rule, KIND, about, id)
        now = [Route(to, hop) for to, hop in router.routes]
        said = [
            Route(ipam.prefix(r.destination, "routes"), str(ipam.ip(r.nexthop, "routes")))
            for r in call.body.router.routes
        ]
        wanted = _checked_routes(tx, router, become(now, said))
        if wanted != router.routes:
            router = _change(tx, call.world, router, routes=wanted)
        return views(tx, call.world, [router])[0]

    shown = call.world.change(work)
    weave(call.world)
    return {"router": shown}


@R.put("/v2.0/routers/{id}/add_extraroutes", body=RoutesBody, policy="add_extraroutes", late=True)
def add_extraroutes(call: Call, id: str) -> View:
    return _reroute(call, id, lambda now, said: [*now, *(r for r in said if r not in now)], "add_extraroutes")


@R.put("/v2.0/routers/{id}/remove_extraroutes", body=RoutesBody, policy="remove_extraroutes", late=True)
def remove_extraroutes(call: Call, id: str) -> View:
    return _reroute(call, id, lambda now, said: [r for r in now if r not in said], "remove_extraroutes")


# ---- legs


@R.put("/v2.0/routers/{id}/add_router_interface", body=Interface, policy="add_router_interface", late=True)
def add_router_interface(call: Call, id: str) -> View:
    wish: Interface = call.body

    def work(tx: Tx) -> View:
        router = KIND.get(tx, id)
        frame.allow(call, "add_router_interface", KIND, frame.target(router), id)
        if (wish.subnet_id is None) == (wish.port_id is None):
            raise Invalid(
                "Bad router request: Either subnet_id or port_id must be specified, and not both.", code="BadRequest"
            )
        if wish.subnet_id is not None:
            return _leg_by_subnet(tx, call, router, wish.subnet_id.lower())
        return _leg_by_port(tx, call, router, str(wish.port_id).lower())

    shown: View = call.world.change(work)
    weave(call.world)
    return shown


def _leg_by_subnet(tx: Tx, call: Call, router: store.Router, subnet_id: str) -> View:
    subnet = store.get(tx, store.Subnet, subnet_id)
    if subnet is None:
        raise NotFound(f"Subnet {subnet_id} could not be found.", code="SubnetNotFound")
    network = store.get(tx, store.Network, subnet.network_id)
    assert network is not None
    frame.seen(call, networks.KIND, frame.target(network), network.id)
    if not call.may("create_port:fixed_ips:ip_address", frame.target(network, network)):
        raise Invalid(
            f"Bad router request: Cannot add interface to router because subnet {subnet_id} is not owned by project "
            "making the request",
            code="BadRequest",
        )
    return leg(tx, call.world, router, network, subnet)


def leg(tx: Tx, world: World, router: store.Router, network: store.Network, subnet: store.Subnet) -> View:
    """The router takes the subnet's gateway address. Raises Invalid, Conflict."""
    if subnet.gateway_ip is None:
        raise Invalid("Bad router request: Subnet for router interface must have a gateway IP", code="BadRequest")
    if ip_address(subnet.gateway_ip) not in ipam.net(subnet.cidr):
        raise Invalid("Bad router request: The subnet's gateway is not an address of the subnet", code="BadRequest")
    _check_new(tx, router, [subnet])
    port = addresses.service_port(world, network, LEG, router.id, router.project_id)
    store.add(tx, port)
    slot = ipam.Slot(subnet.id, subnet.gateway_ip)
    addresses.grant(tx, world, network.id, [subnet], (port.id, port.mac_address), [[slot]])
    return _interface(router, port, [subnet.id])


def _leg_by_port(tx: Tx, call: Call, router: store.Router, port_id: str) -> View:
    found = store.port(tx, port_id)
    if found is None:
        raise ports.KIND.gone(port_id)
    port, network = found
    frame.allow(call, "update", ports.KIND, frame.target(port, network), port_id)
    if port.device_id:
        raise Conflict(
            f"Unable to complete operation on port {port_id} for network {network.id}. Port already has an attached "
            f"device {frame.printable(port.device_id)}.",
            code="PortInUse",
        )
    held = store.addresses_of(tx, [port_id]).get(port_id, [])
    if not held:
        raise Invalid("Bad router request: Router port must have at least one fixed IP", code="BadRequest")
    subnets = store.among(tx, store.Subnet, "id", {a.subnet_id for a in held})
    _check_new(tx, router, subnets)
    store.group_port(tx, port_id, [], anew=True)
    port = frame.kept(
        store.change(
            tx,
            port,
            call.world.clock.now(),
            device_id=router.id,
            device_owner=LEG,
            status="ACTIVE",
            port_security_enabled=False,
            allowed_address_pairs=[],
            binding_host_id=call.world.home,
            binding_vif_type="bridge" if call.world.home else "unbound",
        )
    )
    return _interface(router, port, [s.id for s in subnets])


def _check_new(tx: Tx, router: store.Router, subnets: Sequence[store.Subnet]) -> None:
    """Raises Invalid where the router is there already, or would not know where an address is."""
    for new in subnets:
        for known in _near(tx, router):
            if known.id == new.id:
                raise Invalid(f"Bad router request: Router already has a port on subnet {new.id}", code="BadRequest")
            if ipam.overlap(known.cidr, new.cidr):
                raise Invalid(
                    f"Bad router request: Cidr {new.cidr} of subnet {new.id} overlaps with cidr {known.cidr} of subnet {known.id}",
                    code="BadRequest",
                )


def _interface(router: store.Router, port: store.Port, subnets: list[str]) -> View:
    return {
        "id": router.id,
        "project_id": router.project_id,
        "tenant_id": router.project_id,
        "port_id": port.id,
        "network_id": port.network_id,
        "subnet_id": subnets[0] if subnets else None,
        "subnet_ids": subnets,
    }


@R.put("/v2.0/routers/{id}/remove_router_interface", body=Interface, policy="remove_router_interface", late=True)
def remove_router_interface(call: Call, id: str) -> View:
    wish: Interface = call.body

    def work(tx: Tx) -> View:
        router = KIND.get(tx, id)
        frame.allow(call, "remove_router_interface", KIND, frame.target(router), id)
        if wish.subnet_id is None and wish.port_id is None:
            raise Invalid("Bad router request: Either subnet_id or port_id must be specified.", code="BadRequest")
        port, subnets = _leg_meant(tx, router, wish)
        _check_leaves(tx, router, subnets)
        store.remove(tx, store.Port, port.id)
        return _interface(router, port, [s.id for s in subnets])

    shown: View = call.world.change(work)
    weave(call.world)
    return shown


def _leg_meant(tx: Tx, router: store.Router, wish: Interface) -> tuple[store.Port, list[store.Subnet]]:
    legs = legs_of(tx, router.id)
    held = store.addresses_of(tx, [p.id for p in legs]) if legs else {}
    for port in legs:
        ids = {a.subnet_id for a in held.get(port.id, [])}
        by_port = wish.port_id is None or wish.port_id.lower() == port.id
        if by_port and (wish.subnet_id is None or wish.subnet_id.lower() in ids):
            return port, store.among(tx, store.Subnet, "id", ids)
    if wish.port_id is not None and any(p.id == wish.port_id.lower() for p in legs):
        raise Conflict(
            f"Router interface on port {wish.port_id} is not on subnet {wish.subnet_id}.", code="SubnetMismatchForPort"
        )
    if wish.port_id is not None:
        raise NotFound(
            f"Router {router.id} does not have an interface with id {wish.port_id}", code="RouterInterfaceNotFound"
        )
    raise NotFound(
        f"Router {router.id} has no interface on subnet {wish.subnet_id}", code="RouterInterfaceNotFoundForSubnet"
    )


def _check_leaves(tx: Tx, router: store.Router, subnets: Sequence[store.Subnet]) -> None:
    """Raises Conflict while a floating IP or a route goes this way."""
    for s in subnets:
        for f in store.find(tx, store.Floating, store.floating.c.router_id == router.id):
            if f.fixed_ip_address and ipam.holds(s.cidr, f.fixed_ip_address):
                raise Conflict(
                    f"Router interface for subnet {s.id} on router {router.id} cannot be deleted, as it is required by "
                    "one or more floating IPs.",
                    code="RouterInterfaceInUseByFloatingIP",
                )
        if any(ipam.holds(s.cidr, hop) for _, hop in router.routes):
            raise Conflict(
                f"Router interface for subnet {s.id} on router {router.id} cannot be deleted, as it is required by one or "
                "more routes.",
                code="RouterInterfaceInUseByRoute",
            )
