"""Ports: where a server's card meets a network. Its address, its MAC, the groups that guard it, the host it is on.

Binding is the moment a port becomes real: its host's wires know it before the answer goes out.
"""

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Annotated as A
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta

from kilonova.companions import ipam
from kilonova.companions.network import addresses, frame, networks, security
from kilonova.companions.network.frame import Flag, Project, R, Tag, Text, Unset, Uuid, View
from kilonova.companions.network.wiring import land, weave
from kilonova.companions.network.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Forbidden, Invalid
from kilonova.kit.routes import Call
from kilonova.store import networks as store
from kilonova.store.networks import Address

MOST_ADDRESSES, MOST_PAIRS, MOST_PROFILE_BYTES = 5, 10, 4095
PLUGGED = ("bridge", "user")  # vif types a host can make: on our wires, or by QEMU
SERVICE = ("network:router_interface", "network:router_gateway", "network:floatingip")  # are made by other resources

# ---- what is said

Ip = A[str, Meta(max_length=64)]
DnsName = A[str, Meta(max_length=255, pattern=r"\A([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.|\Z))*\Z")]
VnicType = Literal[
    "normal", "direct", "macvtap", "baremetal", "direct-physical", "virtio-forwarder", "smart-nic", "vdpa",
    "accelerator-direct", "accelerator-direct-physical", "remote-managed",
]  # fmt: skip


class FixedIp(msgspec.Struct, forbid_unknown_fields=True):
    subnet_id: Uuid | None = None
    ip_address: Ip | None = None


class Pair(msgspec.Struct, forbid_unknown_fields=True):
    ip_address: Ip
    mac_address: A[str, Meta(max_length=32)] | None = None


class PortChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of update."""

    name: Text | Unset = UNSET
    description: Text | Unset = UNSET
    admin_state_up: Flag | Unset = UNSET
    mac_address: A[str, Meta(max_length=32)] | Unset = UNSET
    fixed_ips: A[list[FixedIp], Meta(max_length=100)] | Unset = UNSET
    device_id: Text | None | Unset = UNSET
    device_owner: Text | None | Unset = UNSET
    security_groups: A[list[Uuid], Meta(max_length=100)] | None | Unset = UNSET
    allowed_address_pairs: A[list[Pair], Meta(max_length=100)] | None | Unset = UNSET
    port_security_enabled: Flag | Unset = UNSET
    dns_name: DnsName | Unset = UNSET
    dns_domain: Text | Unset = UNSET
    binding_host_id: Text | None | Unset = msgspec.field(name="binding:host_id", default=UNSET)
    binding_vnic_type: VnicType | Unset = msgspec.field(name="binding:vnic_type", default=UNSET)
    binding_profile: dict[str, Any] | None | Unset = msgspec.field(name="binding:profile", default=UNSET)


class PortWish(PortChange, kw_only=True):
    """Body of create."""

    project_id: Project | Unset = UNSET
    tenant_id: Project | Unset = UNSET
    network_id: Uuid
    tags: A[list[Tag], Meta(max_length=frame.MOST_TAGS)] | Unset = UNSET


class PortBody(msgspec.Struct, forbid_unknown_fields=True):
    port: PortWish | Unset = UNSET
    ports: list[PortWish] | Unset = UNSET


class PortChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    port: PortChange


# ---- what is shown


class Whole(NamedTuple):
    """A port with what hangs on it."""

    port: store.Port
    addresses: list[Address]
    groups: list[str]


def views(tx: Tx, world: World, ports: Sequence[store.Port]) -> list[View]:
    ids = [p.id for p in ports]
    held, groups = (store.addresses_of(tx, ids), store.groups_of(tx, ids)) if ids else ({}, {})
    return [view(world, Whole(p, held.get(p.id, []), groups.get(p.id, []))) for p in ports]


def view(world: World, whole: Whole) -> View:
    p = whole.port
    return {
        **frame.standard(p),
        "network_id": p.network_id,
        "mac_address": p.mac_address,
        "admin_state_up": p.admin_state_up,
        "status": p.status,
        "device_id": p.device_id,
        "device_owner": p.device_owner,
        "fixed_ips": [{"subnet_id": s, "ip_address": a} for s, a in whole.addresses],
        "security_groups": whole.groups,
        "allowed_address_pairs": [{"ip_address": a, "mac_address": m} for a, m in p.allowed_address_pairs],
        "port_security_enabled": p.port_security_enabled,
        "extra_dhcp_opts": [],
        "dns_name": p.dns_name,
        "dns_domain": p.dns_domain,
        "dns_assignment": [
            {"ip_address": a, "hostname": h, "fqdn": f"{h}.{p.dns_domain or world.config.dns_domain}."}
            for _, a in whole.addresses
            for h in [p.dns_name or hostname(a)]
        ],
        "binding:vnic_type": p.binding_vnic_type,
        "binding:host_id": p.binding_host_id,
        "binding:profile": p.binding_profile,
        "binding:vif_type": p.binding_vif_type,
        "binding:vif_details": details(world, p.network_id, p.binding_vif_type),
    }


def details(world: World, network_id: str, vif: str) -> dict[str, Any]:
    """How a host plugs it: which bridge, and that the wires filter and not the hypervisor's side."""
    if vif == "bridge":
        return {"bridge_name": world.bridge(network_id), "port_filter": True, "connectivity": "l2"}
    return {"port_filter": False, "connectivity": "l3"} if vif == "user" else {}


def hostname(address: str) -> str:
    return "host-" + address.replace(".", "-").replace(":", "-")


T, N = store.ports.c, store.networks.c


def _about(tx: Tx, port: store.Port) -> dict[str, Any]:
    return frame.target(port, store.get(tx, store.Network, port.network_id))


def _by_address(values: list[str]) -> Any:
    """`fixed_ips=ip_address=10.0.0.3`, `…=subnet_id=…`, `…=ip_address_substr=…`: several of a kind are any of them."""
    by: dict[str, list[str]] = {}
    for v in values:
        name, equals, wanted = v.partition("=")
        if not equals or name not in ("ip_address", "subnet_id", "ip_address_substr"):
            raise frame.bad(f"Invalid input for fixed_ips. Reason: '{frame.printable(v)}'.", "HTTPBadRequest")
        by.setdefault(name, []).append(wanted)
    a = store.addresses.c
    query = store.addresses.select().with_only_columns(a.port_id)
    if "ip_address" in by:
        query = query.where(a.address.in_([_plain_ip(x) for x in by["ip_address"]]))
    if "subnet_id" in by:
        query = query.where(a.subnet_id.in_(by["subnet_id"]))
    for part in by.get("ip_address_substr", []):
        query = query.where(store.holds(a.address, part))
    return T.id.in_(query)


def _plain_ip(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        return text


_IN_GROUP = store.port_groups.select().with_only_columns(store.port_groups.c.port_id)

KIND: frame.Kind[store.Port] = frame.Kind(
    one="port",
    many="ports",
    struct=store.Port,
    missing="PortNotFound",
    named="Port",
    views=views,
    scope=lambda project: (
        (T.project_id == project)
        | T.network_id.in_(store.networks.select().with_only_columns(N.id).where(N.project_id == project))
    ),
    filters={
        "fixed_ips": _by_address,
        "security_groups": lambda values: T.id.in_(_IN_GROUP.where(store.port_groups.c.group_id.in_(values))),
        "mac_address": lambda values: T.mac_address.in_([v.lower() for v in values]),
    },
    target=_about,
)
frame.common(KIND)


# ---- what is done: create


@R.post("/v2.0/ports", body=PortBody, ok=201, policy="create_port", late=True)
def create(call: Call) -> View:
    wishes: list[PortWish] = frame.several(call.body.port, call.body.ports)
    wholes: list[Whole] = call.world.change(lambda tx: [_create(tx, call, w) for w in wishes])
    wholes = settled(call.world, wholes)
    return frame.answer(KIND, call, call.body.ports is not UNSET, [view(call.world, w) for w in wholes])


def _create(tx: Tx, call: Call, wish: PortWish) -> Whole:
    project = frame.owner(call, wish)
    place = networks.place(tx, call, wish.network_id, project)
    about = {**frame.target(place.network, place.network), "project_id": project}
    call.check(about)
    told = frame.said(wish)
    _allow_said(call, "create_port", told, about)
    if place.network.router_external and not place.network.shared and not call.may("create_subnet", about):
        raise Forbidden(
            f"It is not allowed to create an interface on external network {place.network.id}",
            code="PolicyNotAuthorized",
        )
    return new(tx, call.world, project, place, told)


def _allow_said(call: Call, verb: str, told: dict[str, Any], about: dict[str, Any]) -> None:
    """Some attributes need a right of their own; addresses by what is said of each; an owner only if it is ours."""
    asked = {
        n: v for n, v in told.items() if n != "fixed_ips" and (n != "device_owner" or (v or "").startswith("network:"))
    }
    for entry in told.get("fixed_ips", []):
        asked |= {f"fixed_ips:{n}": v for n, v in frame.said(entry).items() if v is not None}
        if "fixed_ips:ip_address" in asked:
            asked.pop("fixed_ips:subnet_id", None)
    frame.allow_said(call, verb, asked, about)


def new(tx: Tx, world: World, project: str, place: store.Place, told: dict[str, Any]) -> Whole:
    """A port and its addresses. Raises Conflict (addresses, MAC), OverQuota, Invalid, NotFound (groups)."""
    network, owned = place.network, told.get("device_owner") or ""
    secured = told.get("port_security_enabled", network.port_security_enabled and not owned.startswith("network:"))
    mac = _mac(tx, world, network.id, told)
    bound = binding(world, None, told)
    port = store.Port(
        **{**frame.made(world, project), "tags": frame.join_tags(told.get("tags", []))},
        name=told.get("name", ""),
        description=told.get("description", ""),
        network_id=network.id,
        mac_address=mac,
        admin_state_up=told.get("admin_state_up", True),
        device_id=told.get("device_id") or "",
        device_owner=owned,
        port_security_enabled=secured,
        allowed_address_pairs=pairs(told.get("allowed_address_pairs"), mac),
        dns_name=told.get("dns_name", "").rstrip("."),
        dns_domain=told.get("dns_domain", ""),
        charged=bool(project),
        **bound,
    )
    groups = _groups(tx, world, project, told, secured, place.default_group)
    check_secured(port, groups)
    wanted = _wanted(place, told, mac)
    store.add(tx, port)
    held = addresses.grant(tx, world, network.id, place.subnets, (port.id, mac), wanted) if wanted else []
    store.group_port(tx, port.id, groups)
    store.charge(tx, project, "port", 1, world.config.quota_port)  # last: all ports of a project wait for this row
    return Whole(port, held, groups)


def _mac(tx: Tx, world: World, network_id: str, told: dict[str, Any]) -> str:
    if "mac_address" not in told:
        return ipam.mac(world.ids.dice)  # taken already: the unique key refuses it, and another is drawn
    mac = ipam.checked_mac(told["mac_address"])
    _check_mac_free(tx, network_id, mac)
    return mac


def _check_mac_free(tx: Tx, network_id: str, mac: str) -> None:
    if store.find(tx, store.Port, T.network_id == network_id, T.mac_address == mac):
        raise Conflict(
            f"Unable to complete operation for network {network_id}. The mac address {mac} is in use.",
            code="MacAddressInUse",
        )


def _wanted(place: store.Place, told: dict[str, Any], mac: str) -> list[list[ipam.Slot]]:
    grounds = addresses.grounds(place.subnets)
    if "fixed_ips" not in told:
        return ipam.standard_slots(grounds)
    slots = ipam.slots(place.network.id, grounds, _said_ips(told), mac, most=MOST_ADDRESSES)
    return [[s] for s in slots]


def _said_ips(told: dict[str, Any]) -> list[ipam.Said]:
    return [ipam.Said(f.subnet_id.lower() if f.subnet_id else None, f.ip_address) for f in told["fixed_ips"]]


def _groups(tx: Tx, world: World, project: str, told: dict[str, Any], secured: bool, standard: str | None) -> list[str]:
    """Ids of the groups that guard it: those said, else the project's default."""
    asked = told.get("security_groups")
    if asked is not None:
        wanted = sorted({g.lower() for g in asked})
        security.check_visible(tx, project, wanted)
        return wanted
    if not secured or not project:
        return []
    return [standard or security.default(tx, world, project)]


def check_secured(port: store.Port, groups: Sequence[str]) -> None:
    """Raises Conflict or Invalid where groups or pairs would have no effect."""
    if port.port_security_enabled:
        return
    if groups:
        raise Invalid(
            "Port security must be enabled and port must have an IP address in order to use security groups.",
            code="PortSecurityAndIPRequiredForSecurityGroups",
        )
    if port.allowed_address_pairs:
        raise Conflict(
            "Port Security must be enabled in order to have allowed address pairs on a port.",
            code="AddressPairAndPortSecurityRequired",
        )


def pairs(said: list[Pair] | None, mac: str) -> list[list[str]]:
    """Checked, with the port's own MAC where none is said. Raises Invalid."""
    found = [
        [_pair_ip(p.ip_address), ipam.checked_mac(p.mac_address) if p.mac_address is not None else mac]
        for p in said or []
    ]
    if len(found) > MOST_PAIRS:
        raise Invalid(
            f"The number of allowed address pair exceeds the maximum {MOST_PAIRS}.", code="AddressPairsExhausted"
        )
    for p in found:
        if found.count(p) > 1:
            raise Invalid(
                f"Request contains duplicate address pair: mac_address {p[1]} ip_address {p[0]}.",
                code="DuplicateAddressPairInRequest",
            )
    return found


def _pair_ip(text: str) -> str:
    whole = ipam.prefix(text, "allowed_address_pairs")
    return whole if "/" in text else whole.partition("/")[0]


# ---- binding


def binding(world: World, port: store.Port | None, told: dict[str, Any]) -> dict[str, Any]:
    """The columns of a binding as it will be, with the status that follows; `port` is what it was."""
    host = told.get("binding:host_id", port.binding_host_id if port else "") or ""
    vnic = told.get("binding:vnic_type", port.binding_vnic_type if port else "normal")
    profile = told.get("binding:profile", port.binding_profile if port else {}) or {}
    if len(msgspec.json.encode(profile)) > MOST_PROFILE_BYTES:
        raise Invalid("Invalid input for binding:profile. Reason: it is too long.", code="HTTPBadRequest")
    up = told.get("admin_state_up", port.admin_state_up if port else True)
    device_owner = told.get("device_owner", port.device_owner if port else "") or ""
    vif = vif_type(world, host, vnic)
    if (port and port.status == "N/A") or device_owner.startswith("network:"):
        status = port.status if port else "ACTIVE"
    elif vif not in PLUGGED or not up:
        status = "DOWN"
    elif vif == "user" or (world.wires is None and not world.weaves(host)):
        status = "ACTIVE"
    else:  # until the wires know it
        same = port is not None and port.binding_host_id == host and port.binding_vif_type == "bridge"
        status = port.status if port is not None and same else "DOWN"
    return {
        "binding_host_id": host,
        "binding_vif_type": vif,
        "binding_vnic_type": vnic,
        "binding_profile": profile,
        "status": status,
    }


def vif_type(world: World, host: str, vnic: str) -> str:
    """Ordinary cards only, on hosts whose wires we hold, or whose guests QEMU connects."""
    if not host:
        return "unbound"
    if vnic != "normal":
        return "binding_failed"
    if host in world.apart or (world.planes is not None and world.planes.of(host) == "user"):
        return "user"
    return "bridge" if world.wires is None or host in world.looms else "binding_failed"


def settled(world: World, wholes: list[Whole]) -> list[Whole]:
    """After the commit: the wires of the hosts learn of bound ports; the ports as they are then."""
    plugged = {w.port.binding_host_id for w in wholes if w.port.binding_vif_type == "bridge"}
    hosts = {h for h in plugged if world.weaves(h)}
    became = {h: land(world, h, [w.port for w in wholes if w.port.binding_host_id == h]) for h in hosts}
    return [
        w._replace(port=became[w.port.binding_host_id][w.port.id])
        if w.port.id in became.get(w.port.binding_host_id, {})
        else w
        for w in wholes
    ]


# ---- update


@R.put("/v2.0/ports/{id}", body=PortChangeBody, policy="update_port", late=True)
def update(call: Call, id: str) -> View:
    def work(tx: Tx) -> tuple[store.Port, Whole]:
        found = store.port(tx, id) if frame.is_uuid(id) else None
        if found is None:
            raise KIND.gone(id)
        port, network = found
        about = frame.target(port, network)
        frame.allow(call, "update", KIND, about, id)
        told = frame.said(call.body.port)
        _allow_said(call, "update_port", told, about)
        frame.revised(KIND, call, port)
        return port, _update(tx, call.world, port, told)

    before, after = call.world.change(work)
    (after,) = settled(call.world, [after])
    left = before.binding_host_id
    if left and left != after.port.binding_host_id:
        weave(call.world, hosts=[left])
    return frame.answer(KIND, call, False, [view(call.world, after)])


def _update(tx: Tx, world: World, port: store.Port, told: dict[str, Any]) -> Whole:
    _check_service(port, told)
    changes = _changes(tx, world, port, told)
    held = store.addresses_of(tx, [port.id]).get(port.id, [])
    groups = store.groups_of(tx, [port.id]).get(port.id, [])
    wanted = groups
    if "security_groups" in told:
        wanted = sorted({g.lower() for g in told["security_groups"] or []})
        security.check_visible(tx, port.project_id, wanted)
    after = msgspec.structs.replace(port, **changes)
    if not after.port_security_enabled and port.port_security_enabled and groups and "security_groups" not in told:
        raise Conflict(
            "Port has security group associated. Cannot disable port security or IP address until security group is removed.",
            code="PortSecurityPortHasSecurityGroup",
        )
    check_secured(after, wanted)
    if wanted != groups:
        store.group_port(tx, port.id, wanted, anew=True)
    if "fixed_ips" in told:
        held = _readdress(tx, world, after, told, held)
    changed = frame.kept(store.change(tx, port, world.clock.now(), **changes)) if told else port
    return Whole(changed, held, wanted)


def _check_service(port: store.Port, told: dict[str, Any]) -> None:
    """What a router or a floating IP made is changed there."""
    if port.device_owner not in SERVICE:
        return
    for name in ("device_id", "device_owner", "fixed_ips", "mac_address"):
        if name in told and (name == "fixed_ips" or told[name] != getattr(port, name)):
            raise Conflict(
                f"Port {port.id} cannot be changed directly via the port API: has device owner {port.device_owner}.",
                code="ServicePortInUse",
            )


def _changes(tx: Tx, world: World, port: store.Port, told: dict[str, Any]) -> dict[str, Any]:
    """The columns that become others."""
    plain = ("name", "description", "admin_state_up", "dns_domain", "port_security_enabled")
    changes: dict[str, Any] = {n: told[n] for n in plain if n in told}
    changes |= {n: told[n] or "" for n in ("device_id", "device_owner") if n in told}
    if "dns_name" in told:
        changes["dns_name"] = told["dns_name"].rstrip(".")
    if "mac_address" in told:
        mac = ipam.checked_mac(told["mac_address"])
        if mac != port.mac_address:
            if port.binding_host_id and port.binding_vif_type in PLUGGED:
                raise Conflict(
                    f"Unable to complete operation on port {port.id}, port is already bound, "
                    f"port type: {port.binding_vif_type}, "
                    f"old_mac {port.mac_address}, new_mac {mac}.",
                    code="PortBound",
                )
            _check_mac_free(tx, port.network_id, mac)
            changes["mac_address"] = mac
    if "allowed_address_pairs" in told:
        changes["allowed_address_pairs"] = pairs(
            told["allowed_address_pairs"], changes.get("mac_address", port.mac_address)
        )
    if "admin_state_up" in told or any(n.startswith("binding:") for n in told):
        changes |= binding(world, port, told)
    return changes


def _readdress(tx: Tx, world: World, port: store.Port, told: dict[str, Any], held: list[Address]) -> list[Address]:
    """The port's addresses as the caller says them: those it has and may keep, others given back, new ones taken."""
    place = store.place(tx, port.network_id)
    assert place is not None
    grounds = addresses.grounds(place.subnets)
    slots = ipam.slots(port.network_id, grounds, _said_ips(told), port.mac_address, most=MOST_ADDRESSES)
    keep = kept(slots, held)
    gone = [a for a in held if a not in keep]
    store.release(tx, port.id, gone)
    for f in store.find(tx, store.Floating, store.floating.c.port_id == port.id) if gone else []:
        if f.fixed_ip_address in {a.address for a in gone}:
            frame.kept(
                store.change(
                    tx, f, world.clock.now(), port_id=None, fixed_ip_address=None, router_id=None, status="DOWN"
                )
            )
    order = []
    for slot, old in zip(slots, keep, strict=True):
        mine = (port.id, port.mac_address)
        order += [old] if old else addresses.grant(tx, world, port.network_id, place.subnets, mine, [[slot]])
    if order != held:
        store.reorder(tx, port.id, order)
    return order


def kept(slots: Sequence[ipam.Slot], held: Sequence[Address]) -> list[Address | None]:
    """For each slot the address it can keep; pure. Very addresses first, then any of the same subnet."""
    left = list(held)
    found: list[Address | None] = [None] * len(slots)
    for exact in (True, False):
        for i, slot in enumerate(slots):
            if found[i] is None and (slot.address is not None) == exact:
                fit = next(
                    (a for a in left if a.subnet_id == slot.subnet_id and slot.address in (None, a.address)), None
                )
                if fit:
                    found[i] = fit
                    left.remove(fit)
    return found


# ---- delete


@R.delete("/v2.0/ports/{id}", ok=204, policy="delete_port", late=True)
def delete(call: Call, id: str) -> None:
    def work(tx: Tx) -> store.Port:
        found = store.port(tx, id) if frame.is_uuid(id) else None
        if found is None:
            raise KIND.gone(id)
        port, network = found
        frame.allow(call, "delete", KIND, frame.target(port, network), id)
        frame.revised(KIND, call, port)
        if port.device_owner in SERVICE:
            raise Conflict(
                f"Port {id} cannot be deleted directly via the port API: has device owner {port.device_owner}.",
                code="ServicePortInUse",
            )
        drop(tx, port, call.world.clock.now())
        return port

    port = call.world.change(work)
    if port.binding_host_id:
        weave(call.world, hosts=[port.binding_host_id])


def drop(tx: Tx, port: store.Port, now: float) -> None:
    """The port, its addresses and its bindings; floating IPs that led to it lead nowhere."""
    if not port.device_owner.startswith("network:"):
        store.lose_port(tx, port.id, now)
    store.remove(tx, store.Port, port.id)
    if port.charged:
        store.discharge(tx, port.project_id, "port")
