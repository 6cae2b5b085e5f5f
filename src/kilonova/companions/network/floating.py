"""Floating IPs: addresses of an external network that lead to a port while their owner wants it."""

from collections.abc import Sequence
from typing import Annotated as A
from typing import Any

import msgspec
from msgspec import UNSET, Meta

from kilonova.companions import ipam
from kilonova.companions.network import addresses, frame, networks, ports
from kilonova.companions.network.frame import Project, R, Text, Unset, Uuid, View
from kilonova.companions.network.wiring import LEG, weave
from kilonova.companions.network.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.store import networks as store

OWNER = "network:floatingip"

# ---- what is said

Ip = A[str, Meta(max_length=64)]


class FloatingChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A port that is not said stays; null takes it away."""

    description: Text | Unset = UNSET
    port_id: Uuid | None | Unset = UNSET
    fixed_ip_address: Ip | None | Unset = UNSET


class FloatingWish(FloatingChange, kw_only=True):
    project_id: Project | Unset = UNSET
    tenant_id: Project | Unset = UNSET
    floating_network_id: Uuid
    subnet_id: Uuid | None | Unset = UNSET
    floating_ip_address: Ip | None | Unset = UNSET
    dns_name: ports.DnsName | Unset = UNSET
    dns_domain: Text | Unset = UNSET


class FloatingBody(msgspec.Struct, forbid_unknown_fields=True):
    floatingip: FloatingWish


class FloatingChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    floatingip: FloatingChange


# ---- what is shown


def views(tx: Tx, world: World, found: Sequence[store.Floating]) -> list[View]:
    known = {p.id: p for p in store.among(tx, store.Port, "id", (f.port_id for f in found if f.port_id))}
    return [view(f, known.get(f.port_id or "")) for f in found]


def view(f: store.Floating, port: store.Port | None) -> View:
    return {
        **frame.standard(f),
        "floating_network_id": f.floating_network_id,
        "floating_ip_address": f.floating_ip_address,
        "port_id": f.port_id,
        "fixed_ip_address": f.fixed_ip_address,
        "router_id": f.router_id,
        "status": f.status,
        "dns_name": f.dns_name,
        "dns_domain": f.dns_domain,
        "port_details": {
            "name": port.name,
            "network_id": port.network_id,
            "mac_address": port.mac_address,
            "admin_state_up": port.admin_state_up,
            "status": port.status,
            "device_id": port.device_id,
            "device_owner": port.device_owner,
        }
        if port
        else None,
    }


T = store.floating.c

KIND: frame.Kind[store.Floating] = frame.Kind(
    one="floatingip",
    many="floatingips",
    struct=store.Floating,
    missing="FloatingIPNotFound",
    named="Floating IP",
    views=views,
    scope=lambda project: T.project_id == project,
    hidden=frozenset({"tags", "floating_port_id"}),
)
frame.common(KIND)


# ---- what is done


@R.post("/v2.0/floatingips", body=FloatingBody, ok=201, policy="create_floatingip", late=True)
def create(call: Call) -> View:
    wish: FloatingWish = call.body.floatingip

    def work(tx: Tx) -> View:
        project = frame.owner(call, wish)
        about = {**frame.STRANGER, "project_id": project}
        call.check(about)
        told = frame.said(wish)
        if told.get("floating_ip_address") is not None:
            call.check(about, "create_floatingip:floating_ip_address")
        place = networks.place(tx, call, wish.floating_network_id)
        floating = new(tx, call.world, project, place, told)
        if told.get("port_id"):
            floating = _lead(tx, call, floating, told["port_id"].lower(), told.get("fixed_ip_address"))
        elif told.get("fixed_ip_address"):
            raise Invalid(
                "Bad floatingip request: fixed_ip_address cannot be specified without a port_id", code="BadRequest"
            )
        return views(tx, call.world, [floating])[0]

    shown = call.world.change(work)
    if shown["port_id"]:
        weave(call.world)
        _tell(call.world, {shown["port_id"]})
    return frame.answer(KIND, call, False, [shown])


def new(tx: Tx, world: World, project: str, place: store.Place, told: dict[str, Any]) -> store.Floating:
    """An address of the external network, and the port that holds it there. Raises Invalid, Conflict, OverQuota."""
    if not place.network.router_external:
        raise Invalid(
            f"Bad floatingip request: Network {place.network.id} is not a valid external network.", code="BadRequest"
        )
    store.charge(tx, project, "floatingip", 1, world.config.quota_floatingip)
    made = frame.made(world, project)
    port = addresses.service_port(world, place.network, OWNER, made["id"], "")
    store.add(tx, port)
    subnet = told.get("subnet_id") or None
    held = addresses.grant(
        tx,
        world,
        place.network.id,
        place.subnets,
        (port.id, port.mac_address),
        [_slots(place, subnet and subnet.lower(), told.get("floating_ip_address") or None, port.mac_address)],
    )
    floating = store.Floating(
        **made,
        description=told.get("description", ""),
        floating_network_id=place.network.id,
        floating_ip_address=held[0].address,
        floating_port_id=port.id,
        port_id=None,
        fixed_ip_address=None,
        router_id=None,
        status="DOWN",
        dns_name=told.get("dns_name", "").rstrip("."),
        dns_domain=told.get("dns_domain", ""),
    )
    store.add(tx, floating)
    return floating


def _slots(place: store.Place, subnet: str | None, address: str | None, mac: str) -> list[ipam.Slot]:
    """IPv4 only: nothing is translated in IPv6."""
    grounds = [g for g in addresses.grounds(place.subnets) if g.version == 4]
    if not grounds:
        raise Invalid(
            f"Bad floatingip request: Network {place.network.id} does not contain any IPv4 subnet.", code="BadRequest"
        )
    if subnet is None and address is None:
        return [ipam.Slot(g.id) for g in grounds]
    return ipam.slots(place.network.id, grounds, [ipam.Said(subnet, address)], mac, most=1)


def _lead(tx: Tx, call: Call, floating: store.Floating, port_id: str, fixed: str | None) -> store.Floating:
    """To this port. Raises NotFound, Invalid, Conflict."""
    found = store.port(tx, port_id)
    if found is None:
        raise ports.KIND.gone(port_id)
    port, network = found
    frame.seen(call, ports.KIND, frame.target(port, network), port_id)
    if port.project_id != floating.project_id and not call.context.is_admin:
        raise Invalid(
            f"Bad floatingip request: Port {port_id} is associated with a different tenant than Floating IP {floating.id} "
            "and therefore cannot be bound.",
            code="BadRequest",
        )
    if port.binding_vif_type == "user":
        raise Invalid(
            f"Bad floatingip request: Port {port_id} is on a host without networks of its own (QEMU's user networking), "
            "where no floating IP leads.",
            code="BadRequest",
        )
    at = _fixed(store.addresses_of(tx, [port_id]).get(port_id, []), port_id, fixed)
    router_id = _way(tx, floating, at)
    same = T.port_id == port_id, T.fixed_ip_address == at.address, T.floating_network_id == floating.floating_network_id
    for other in store.find(tx, store.Floating, *same, T.id != floating.id):
        raise Conflict(
            f"Cannot associate floating IP {floating.floating_ip_address} ({floating.id}) with port {port_id} using fixed IP "
            f"{at.address}, as that fixed IP already has a floating IP on external network {other.floating_network_id}.",
            code="FloatingIPPortAlreadyAssociated",
        )
    changes = dict(port_id=port_id, fixed_ip_address=at.address, router_id=router_id, status="ACTIVE")
    return frame.kept(store.change(tx, floating, call.world.clock.now(), **changes))


def _fixed(held: Sequence[store.Address], port_id: str, said: str | None) -> store.Address:
    v4 = [a for a in held if ":" not in a.address]
    if said is not None:
        wanted = str(ipam.ip(said, "fixed_ip_address"))
        found = next((a for a in v4 if a.address == wanted), None)
        if found is None:
            raise Invalid(f"Bad floatingip request: Port {port_id} does not have fixed ip {wanted}.", code="BadRequest")
        return found
    if not v4:
        raise Invalid(
            f"Bad floatingip request: Cannot add floating IP to port {port_id} that has no fixed IPv4 addresses.",
            code="BadRequest",
        )
    if len(v4) > 1:
        raise Invalid(
            f"Bad floatingip request: Port {port_id} has multiple fixed IPv4 addresses. Must provide a specific IPv4 "
            "address when assigning a floating IP.",
            code="BadRequest",
        )
    return v4[0]


def _way(tx: Tx, floating: store.Floating, at: store.Address) -> str:
    """The router between the two networks. Raises NotFound."""
    p, a = store.ports.c, store.addresses.c
    on_subnet = p.id.in_(store.addresses.select().with_only_columns(a.port_id).where(a.subnet_id == at.subnet_id))
    legs = store.find(tx, store.Port, p.device_owner == LEG, on_subnet)
    for router in store.among(tx, store.Router, "id", (leg.device_id for leg in legs)):
        if router.gateway_network_id == floating.floating_network_id:
            return router.id
    raise NotFound(
        f"External network {floating.floating_network_id} is not reachable from subnet {at.subnet_id}. Therefore, cannot "
        f"associate Port with a Floating IP.",
        code="ExternalGatewayForFloatingIPNotFound",
    )


@R.put("/v2.0/floatingips/{id}", body=FloatingChangeBody, policy="update_floatingip", late=True)
def update(call: Call, id: str) -> View:
    touched: set[str | None] = set()

    def work(tx: Tx) -> View:
        floating = KIND.get(tx, id)
        touched.add(floating.port_id)
        frame.allow(call, "update", KIND, frame.target(floating), id)
        frame.revised(KIND, call, floating)
        told = frame.said(call.body.floatingip)
        now = call.world.clock.now()
        if "description" in told:
            floating = frame.kept(store.change(tx, floating, now, description=told["description"]))
        port_id = told.get("port_id", floating.port_id)
        if port_id is None and told.get("fixed_ip_address"):
            raise Invalid(
                "Bad floatingip request: fixed_ip_address cannot be specified without a port_id", code="BadRequest"
            )
        if "port_id" in told or "fixed_ip_address" in told:
            if port_id is None:
                floating = frame.kept(
                    store.change(tx, floating, now, port_id=None, fixed_ip_address=None, router_id=None, status="DOWN")
                )
            else:
                floating = _lead(tx, call, floating, port_id.lower(), told.get("fixed_ip_address"))
        return views(tx, call.world, [floating])[0]

    shown = call.world.change(work)
    weave(call.world)
    _tell(call.world, touched | {shown["port_id"]})
    return frame.answer(KIND, call, False, [shown])


@R.delete("/v2.0/floatingips/{id}", ok=204, policy="delete_floatingip", late=True)
def delete(call: Call, id: str) -> None:
    def work(tx: Tx) -> str | None:
        floating = KIND.get(tx, id)
        frame.allow(call, "delete", KIND, frame.target(floating), id)
        frame.revised(KIND, call, floating)
        store.remove(tx, store.Floating, floating.id)
        store.remove(tx, store.Port, floating.floating_port_id)
        store.discharge(tx, floating.project_id, "floatingip")
        return floating.port_id

    if port := call.world.change(work):
        weave(call.world)
        _tell(call.world, {port})


def _tell(world: World, ports: set[str | None]) -> None:
    """Whose ports these are has other addresses now."""
    if world.told is None:
        return
    with world.db.read() as tx:
        found = store.find(tx, store.Port, store.ports.c.id.in_([p for p in ports if p]))
    if devices := {p.device_id for p in found if p.device_id and p.device_owner.startswith("compute:")}:
        world.told(devices)
