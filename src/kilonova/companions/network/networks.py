"""Networks: layer-2 segments, each a bridge on the hosts that need it."""

from collections.abc import Sequence
from typing import Annotated as A
from typing import Literal

import msgspec
from msgspec import UNSET, Meta

from kilonova.companions import ipam
from kilonova.companions.network import frame
from kilonova.companions.network.frame import Flag, Project, R, Text, Unset, View
from kilonova.companions.network.wiring import weave
from kilonova.companions.network.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict
from kilonova.kit.routes import Call
from kilonova.store import networks as store

# ---- what is said

Mtu = int | frame.Digits
LEAST_MTU, MOST_MTU = 68, 65535


class NetworkChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of update."""

    name: Text | Unset = UNSET
    description: Text | Unset = UNSET
    admin_state_up: Flag | Unset = UNSET
    shared: Flag | Unset = UNSET
    router_external: Flag | Unset = msgspec.field(name="router:external", default=UNSET)
    is_default: Flag | None | Unset = UNSET
    port_security_enabled: Flag | Unset = UNSET
    mtu: Mtu | Unset = UNSET
    dns_domain: Text | Unset = UNSET


class NetworkWish(NetworkChange, kw_only=True):
    """Body of create. Networks are local to a host, or flat where the administrator says so: nothing else is real."""

    project_id: Project | Unset = UNSET
    tenant_id: Project | Unset = UNSET
    provider_network_type: Literal["local", "flat"] | None | Unset = msgspec.field(
        name="provider:network_type", default=UNSET
    )
    provider_physical_network: A[str, Meta(max_length=64)] | None | Unset = msgspec.field(
        name="provider:physical_network", default=UNSET
    )
    provider_segmentation_id: None | Unset = msgspec.field(name="provider:segmentation_id", default=UNSET)
    availability_zone_hints: A[list[Text], Meta(max_length=10)] | Unset = UNSET


class NetworkBody(msgspec.Struct, forbid_unknown_fields=True):
    network: NetworkWish | Unset = UNSET
    networks: list[NetworkWish] | Unset = UNSET


class NetworkChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    network: NetworkChange


# ---- what is shown


def views(tx: Tx, world: World, networks: Sequence[store.Network]) -> list[View]:
    subnets = store.subnets_of(tx, [n.id for n in networks]) if networks else {}
    return [view(n, subnets.get(n.id, [])) for n in networks]


def view(n: store.Network, subnets: list[str]) -> View:
    return {
        **frame.standard(n),
        "admin_state_up": n.admin_state_up,
        "status": "ACTIVE",
        "subnets": subnets,
        "shared": n.shared,
        "router:external": n.router_external,
        **({"is_default": n.is_default} if n.router_external else {}),
        "port_security_enabled": n.port_security_enabled,
        "mtu": n.mtu,
        "dns_domain": n.dns_domain,
        "availability_zones": ["nova"] if subnets else [],
        "availability_zone_hints": n.availability_zone_hints,
        "ipv4_address_scope": None,
        "ipv6_address_scope": None,
        "provider:network_type": n.provider_network_type,
        "provider:physical_network": n.provider_physical_network,
        "provider:segmentation_id": None,
    }


T = store.networks.c
KIND: frame.Kind[store.Network] = frame.Kind(
    one="network",
    many="networks",
    struct=store.Network,
    missing="NetworkNotFound",
    named="Network",
    views=views,
    scope=lambda project: (T.project_id == project) | T.shared.is_(True) | T.router_external.is_(True),
    filters={
        "status": lambda values: T.id.is_not(None) if "ACTIVE" in values else T.id.is_(None),
        "subnets": lambda values: T.id.in_(
            store.subnets.select().with_only_columns(store.subnets.c.network_id).where(store.subnets.c.id.in_(values))
        ),
    },
)
frame.common(KIND)


# ---- what is done


@R.post("/v2.0/networks", body=NetworkBody, ok=201, policy="create_network", late=True)
def create(call: Call) -> View:
    wishes: list[NetworkWish] = frame.several(call.body.network, call.body.networks)

    def work(tx: Tx) -> list[View]:
        made = []
        for wish in wishes:
            project = frame.owner(call, wish)
            about = {**frame.STRANGER, "project_id": project, "network:project_id": project}
            call.check(about)
            frame.allow_said(call, "create_network", frame.said(wish), about)
            made.append(view(new(tx, call.world, project, wish), []))
        return made

    views = call.world.change(work)
    if any(v["router:external"] for v in views):
        weave(call.world)
    return frame.answer(KIND, call, call.body.networks is not UNSET, views)


def new(tx: Tx, world: World, project: str, wish: NetworkWish, auto_of: str | None = None) -> store.Network:
    """Raises OverQuota, Invalid."""
    told = frame.said(wish)
    kind = told.get("provider:network_type") or ("flat" if told.get("router:external") else "local")
    where = told.get("provider:physical_network") or None
    if kind == "local" and where is not None:
        raise frame.bad("provider:physical_network specified for local network")
    network = store.Network(
        **frame.made(world, project),
        name=told.get("name", ""),
        description=told.get("description", ""),
        admin_state_up=told.get("admin_state_up", True),
        shared=told.get("shared", False),
        router_external=told.get("router:external", False),
        is_default=bool(told.get("is_default")),
        port_security_enabled=told.get("port_security_enabled", True),
        mtu=frame.number("mtu", told.get("mtu", world.config.mtu), LEAST_MTU, MOST_MTU) or world.config.mtu,
        dns_domain=told.get("dns_domain", ""),
        provider_network_type=kind,
        provider_physical_network=(where or "public") if kind == "flat" else None,
        availability_zone_hints=told.get("availability_zone_hints", []),
        auto_of=auto_of,
    )
    _check_default(tx, network)
    store.charge(tx, project, "network", 1, world.config.quota_network)
    store.add(tx, network)
    return network


@R.put("/v2.0/networks/{id}", body=NetworkChangeBody, policy="update_network", late=True)
def update(call: Call, id: str) -> View:
    def work(tx: Tx) -> tuple[store.Network, View]:
        network = KIND.get(tx, id)
        about = frame.target(network)
        frame.allow(call, "update", KIND, about, id)
        told = frame.said(call.body.network)
        frame.allow_said(call, "update_network", told, about)
        frame.revised(KIND, call, network)
        changes = {n.replace(":", "_"): v for n, v in told.items()}
        if changes.get("is_default", ...) is None:
            changes["is_default"] = False
        if "mtu" in changes:
            changes["mtu"] = frame.number("mtu", changes["mtu"], LEAST_MTU, MOST_MTU)
            ipam.check_mtu(
                changes["mtu"],
                (s.ip_version for s in store.find(tx, store.Subnet, store.subnets.c.network_id == network.id)),
            )
        wanted = msgspec.structs.replace(network, **changes)
        _check_sharing(tx, network, wanted)
        _check_default(tx, wanted)
        changed = frame.kept(store.change(tx, network, call.world.clock.now(), **changes)) if changes else network
        (v,) = views(tx, call.world, [changed])
        return network, v

    before, after = call.world.change(work)
    if any(
        after[n] != v
        for n, v in (
            ("mtu", before.mtu),
            ("admin_state_up", before.admin_state_up),
            ("router:external", before.router_external),
        )
    ):
        weave(call.world)
    return frame.answer(KIND, call, False, [after])


def _check_sharing(tx: Tx, before: store.Network, after: store.Network) -> None:
    p, f = store.ports.c, store.floating.c
    if before.shared and not after.shared:
        foreign = p.network_id == before.id, p.project_id.not_in([before.project_id, ""])
        if store.find(tx, store.Port, *foreign):
            raise Conflict(
                f"Unable to reconfigure sharing settings for network {before.id}. Multiple tenants are using it.",
                code="InvalidSharedSetting",
            )
    if before.router_external and not after.router_external:
        gates = p.network_id == before.id, p.device_owner == "network:router_gateway"
        floating = store.find(tx, store.Floating, f.floating_network_id == before.id)
        led_out = store.find(tx, store.Port, *gates)
        if led_out or floating:
            raise Conflict(
                f"External network {before.id} cannot be updated to be made non-external, since it has existing gateway ports.",
                code="ExternalNetworkInUse",
            )


def _check_default(tx: Tx, network: store.Network) -> None:
    """Automatic networks lead out by the default external network: there can be one."""
    if not network.is_default:
        return
    if not network.router_external:
        raise frame.bad("A default network must be external.", "HTTPBadRequest")
    if store.find(tx, store.Network, T.is_default.is_(True), T.id != network.id):
        raise Conflict("A default external network already exists.", code="DefaultExternalNetworkExists")


@R.delete("/v2.0/networks/{id}", ok=204, policy="delete_network", late=True)
def delete(call: Call, id: str) -> None:
    def work(tx: Tx) -> store.Network:
        network = KIND.get(tx, id)
        frame.allow(call, "delete", KIND, frame.target(network), id)
        frame.revised(KIND, call, network)
        drop(tx, network)
        return network

    network = call.world.change(work)
    if network.router_external:
        weave(call.world)


def drop(tx: Tx, network: store.Network) -> None:
    """The network with its subnets and DHCP. Raises Conflict where somebody is on it."""
    ports = store.find(tx, store.Port, store.ports.c.network_id == network.id)
    if used := [p.id for p in ports if p.device_owner != "network:dhcp"]:
        raise Conflict(
            f"Unable to complete operation on network {network.id}. There are one or more ports still in use on the network, "
            f"id for these ports is: {','.join(used[:10])}.",
            code="NetworkInUse",
        )
    subnets = store.find(tx, store.Subnet, store.subnets.c.network_id == network.id)
    store.remove(tx, store.Port, *(p.id for p in ports))
    store.remove(tx, store.Subnet, *(s.id for s in subnets))
    store.remove(tx, store.Network, network.id)
    for s in subnets:
        store.discharge(tx, s.project_id, "subnet")
    store.discharge(tx, network.project_id, "network")


def place(tx: Tx, call: Call, id: str, project: str = "") -> store.Place:
    """The network with its subnets, if the caller may know of it. Raises NotFound."""
    found = store.place(tx, id.lower(), project)
    if found is None:
        raise KIND.gone(id)
    frame.seen(call, KIND, frame.target(found.network), id)
    return found
