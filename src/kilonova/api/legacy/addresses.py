"""Floating addresses as the Compute API had them, to 2.35; and a server's addresses by its actions, to 2.43."""

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kilonova.api.addresses import readdressed
from kilonova.api.bodies import address
from kilonova.api.registry import R, World, the_server, unlocked
from kilonova.clients import FloatingIp, Port
from kilonova.kit.errors import Conflict, Forbidden, Invalid, NotFound, OverQuota
from kilonova.kit.routes import Call
from kilonova.model.server import Server

UNTIL, ACTIONS_UNTIL = "2.1-2.35", "2.1-2.43"
ACTION = "/v2.1/servers/{id}/action"


# ---- floating addresses


@R.get("/v2.1/os-floating-ip-pools", versions=UNTIL, policy="os_compute_api:os-floating-ip-pools")
def pools(call: Call) -> dict[str, Any]:
    return {"floating_ip_pools": [{"name": name} for name in _pools(call).values()]}


def _pools(call: Call) -> dict[str, str]:
    """External networks: id → what they are called."""
    world: World = call.world
    found = world.neighbours.network.networks(token=call.context.token, **{"router:external": "true"})
    return {n.id: n.name or n.id for n in found}


@R.get("/v2.1/os-floating-ips", versions=UNTIL, policy="os_compute_api:os-floating-ips:list")
def index(call: Call) -> dict[str, Any]:
    world: World = call.world
    mine = world.neighbours.network.floating_ips(token=call.context.token, project_id=call.context.project_id or "")
    return {"floating_ips": _views(call, mine)}


@R.get("/v2.1/os-floating-ips/{id}", versions=UNTIL, policy="os_compute_api:os-floating-ips:show")
def show(call: Call, id: str) -> dict[str, Any]:
    return {"floating_ip": _views(call, [_floating(call, id)])[0]}


class PoolBody(msgspec.Struct):
    pool: str | None = None


@R.post("/v2.1/os-floating-ips", body=PoolBody | None, versions=UNTIL, policy="os_compute_api:os-floating-ips:create")
def create(call: Call) -> dict[str, Any]:
    """Of a pool that is named, or of the only one."""
    name, known = call.body.pool if call.body else None, _pools(call)
    ids = [id for id, called in known.items() if name in (id, called)] if name else list(known)
    if not ids:
        raise NotFound(f"Floating IP pool {name} not found." if name else "Floating IP pool not found.")
    if len(ids) > 1:
        raise Invalid("There is more than one floating IP pool: name one.")
    try:
        made = call.world.neighbours.network.create_floating_ip(ids[0], call.context.token)
    except OverQuota:
        raise OverQuota("IP allocation over quota.") from None
    except Conflict as e:
        raise NotFound("No more floating IPs available.", why=e.said) from None
    return {"floating_ip": _views(call, [made])[0]}


@R.delete("/v2.1/os-floating-ips/{id}", ok=202, versions=UNTIL, policy="os_compute_api:os-floating-ips:delete")
def delete(call: Call, id: str) -> None:
    f = _floating(call, id)
    call.world.neighbours.network.delete_floating_ip(f.id, call.context.token)
    readdressed(call, _servers_of(call, [f]).values())


def _floating(call: Call, id: str) -> FloatingIp:
    world: World = call.world
    try:
        return world.neighbours.network.floating_ip(id, call.context.token)
    except (NotFound, Invalid):
        raise NotFound(f"Floating IP not found for ID {id}") from None


def _views(call: Call, found: list[FloatingIp]) -> list[dict[str, Any]]:
    names, servers = _pools(call), _servers_of(call, found)
    return [
        {
            "id": f.id,
            "ip": f.floating_ip_address,
            "pool": names.get(f.floating_network_id or "", f.floating_network_id or ""),
            "fixed_ip": f.fixed_ip_address,
            "instance_id": servers.get(f.port_id or ""),
        }
        for f in found
    ]


def _servers_of(call: Call, found: list[FloatingIp]) -> dict[str, str]:
    """Port → the server it is of, as the caller may see it."""
    world: World = call.world
    ports = world.neighbours.network.ports(ids=[f.port_id for f in found if f.port_id], token=call.context.token)
    return {p.id: p.device_id for p in ports if p.device_id and (p.device_owner or "").startswith("compute:")}


# ---- a server's floating addresses


class AddFloating(msgspec.Struct, forbid_unknown_fields=True):
    address: str
    fixed_address: str | UnsetType = UNSET


class ByAddress(msgspec.Struct, forbid_unknown_fields=True):
    address: str


@R.post(ACTION, action="addFloatingIp", ok=202, body=AddFloating, versions=ACTIONS_UNTIL,
        policy="os_compute_api:os-floating-ips:add", late=True)  # fmt: skip
def add_floating(call: Call, id: str) -> None:
    wanted = address(call.body.address, None, "address")
    fixed = address(call.body.fixed_address, None, "fixed_address") if call.body.fixed_address else None
    with call.world.db.read() as tx:
        server = the_server(call, tx, id)
    port_id, fixed = _target(server, wanted, fixed)
    f = _by_address(call, wanted)
    before = _servers_of(call, [f])
    try:
        call.world.neighbours.network.point_floating_ip(f.id, port_id, fixed, call.context.token)
    except Conflict as e:
        raise Invalid("floating IP is already associated", why=e.said) from None
    except NotFound as e:
        raise Invalid(
            f"Unable to associate floating IP {wanted} to fixed IP {fixed} for instance {id}. {e.said}"
        ) from None
    readdressed(call, [id, *before.values()])


def _target(server: Server, wanted: str, fixed: str | None) -> tuple[str, str]:
    """(port, fixed address) that it shall lead to: the one that was named, or the server's first of IPv4."""
    have = [(p.port_id, a) for p in server.plugs for a in p.addresses if not a.floating]
    if not have:
        raise Invalid("No fixed IPs associated to instance")
    if fixed is not None:
        port = next((port for port, a in have if a.address == fixed), None)
        if port is None:
            raise Invalid("Specified fixed address not assigned to instance")
        return port, fixed
    first = next(((port, a.address) for port, a in have if a.version == 4), None)
    if first is None:
        raise Invalid(
            f"Unable to associate floating IP {wanted} to any fixed IPs for instance {server.id}. "
            "Instance has no fixed IPv4 addresses to associate."
        )
    return first


@R.post(ACTION, action="removeFloatingIp", ok=202, body=ByAddress, versions=ACTIONS_UNTIL,
        policy="os_compute_api:os-floating-ips:remove", late=True)  # fmt: skip
def remove_floating(call: Call, id: str) -> None:
    wanted = address(call.body.address, None, "address")
    with call.world.db.read() as tx:
        server = the_server(call, tx, id)
    f = _by_address(call, wanted)
    if f.port_id not in {p.port_id for p in server.plugs}:
        raise Conflict(f"Floating IP {wanted} is not associated with instance {id}.")
    call.world.neighbours.network.point_floating_ip(f.id, None, None, call.context.token)
    readdressed(call, [id])


def _by_address(call: Call, wanted: str) -> FloatingIp:
    world: World = call.world
    found = world.neighbours.network.floating_ips(token=call.context.token, floating_ip_address=wanted)
    if not found:
        raise NotFound("floating IP not found")
    if not call.context.is_admin and found[0].project_id != call.context.project_id:
        raise Forbidden("This floating IP is another project's.")
    return found[0]


# ---- a server's fixed addresses


class AddFixed(msgspec.Struct, forbid_unknown_fields=True):
    network_id: Annotated[str, Meta(min_length=1, max_length=36)] | int | float = msgspec.field(name="networkId")


@R.post(ACTION, action="addFixedIp", ok=202, body=AddFixed, versions=ACTIONS_UNTIL,
        policy="os_compute_api:os-multinic:add", late=True)  # fmt: skip
def add_fixed(call: Call, id: str) -> None:
    """One address more for the server's first port on that network."""
    network_id = str(call.body.network_id)
    port = next(iter(p for p in _ports(call, id) if p.network_id == network_id), None)
    if port is None:
        raise Invalid(f"Network could not be found for instance {id}.")
    subnets = call.world.neighbours.network.subnets(networks=[network_id])
    if not subnets:
        raise Invalid(f"Network {network_id} has no subnet to take an address of.")
    held = [{"subnet_id": a.subnet_id, "ip_address": a.ip_address} for a in port.fixed_ips]
    trouble: Conflict | Invalid | None = None
    for s in subnets:
        try:
            call.world.neighbours.network.update_port(port.id, fixed_ips=[*held, {"subnet_id": s.id}])
        except (Conflict, Invalid) as e:
            trouble = e
        else:
            readdressed(call, [id])
            return
    assert trouble is not None
    raise Invalid(trouble.said)


@R.post(ACTION, action="removeFixedIp", ok=202, body=ByAddress, versions=ACTIONS_UNTIL,
        policy="os_compute_api:os-multinic:remove", late=True)  # fmt: skip
def remove_fixed(call: Call, id: str) -> None:
    gone = address(call.body.address, None, "address")
    for port in _ports(call, id):
        left = [{"subnet_id": a.subnet_id, "ip_address": a.ip_address} for a in port.fixed_ips if a.ip_address != gone]
        if len(left) < len(port.fixed_ips):
            call.world.neighbours.network.update_port(port.id, fixed_ips=left)
            readdressed(call, [id])
            return
    raise Invalid(f"Fixed IP {gone} is not associated with instance {id}.")


def _ports(call: Call, id: str) -> Iterable[Port]:
    """The server's, in its order: in our own name, for the server is the caller's and he may act on it."""
    world: World = call.world
    with world.db.read() as tx:
        server = the_server(call, tx, id)
        unlocked(call, server)
    found = {p.id: p for p in world.neighbours.network.ports(ids=[p.port_id for p in server.plugs])}
    return [found[p.port_id] for p in server.plugs if p.port_id in found]
