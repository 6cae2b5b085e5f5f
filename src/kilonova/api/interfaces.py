"""A server's NICs: shown, attached, detached. To attach is answered when it is done, and says what came of it."""

from typing import Annotated

import msgspec
from msgspec import Meta

from kilonova.api.bodies import Tag, Uuid, address, dashed
from kilonova.api.registry import R, World, cause, the_server, unlocked
from kilonova.clients import Port
from kilonova.contracts.compute import AttachNic, DetachNic
from kilonova.contracts.jobs import AttachInterface, DetachInterface
from kilonova.kit import journal
from kilonova.kit.db import Tx
from kilonova.kit.errors import (
    Conflict,
    Fault,
    Forbidden,
    HostGone,
    Invalid,
    NotFound,
    Refused,
    Trouble,
    Unavailable,
    Unsupported,
)
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType, since
from kilonova.kit.workflow import signal, start
from kilonova.model.server import Plug, Server, Wanted
from kilonova.model.states import VERBS
from kilonova.store import servers

PATH = "/v2.1/servers/{server_id}/os-interface"
WAIT_S = 90.0  # longer than it takes to find that a host is gone


class FixedIp(msgspec.Struct):
    subnet_id: str
    ip_address: str


class Attachment(msgspec.Struct):
    """`tag` is what the caller called the device."""

    net_id: str
    port_id: str
    mac_addr: str
    port_state: str
    fixed_ips: list[FixedIp]
    tag: Annotated[str | None, since("2.70")] = None


class One(msgspec.Struct):
    attachment: Attachment = msgspec.field(name="interfaceAttachment")


class Many(msgspec.Struct):
    attachments: list[Attachment] = msgspec.field(name="interfaceAttachments")


@R.get(PATH, policy="os_compute_api:os-attach-interfaces:list", late=True)
def index(call: Call, server_id: str) -> Many:
    with call.world.db.read() as tx:
        server = the_server(call, tx, server_id)
    return Many(shown(call.world, server.plugs))


@R.get(PATH + "/{id}", policy="os_compute_api:os-attach-interfaces:show", late=True)
def show(call: Call, server_id: str, id: str) -> One:
    with call.world.db.read() as tx:
        server = the_server(call, tx, server_id)
    plug = _plug(server, id)
    found = shown(call.world, [plug] if plug else [])
    if not found:
        raise NotFound(f"Instance {server_id} does not have a port with id {id}")
    return One(found[0])


def shown(world: World, plugs: list[Plug]) -> list[Attachment]:
    """As the network service knows them just now. Which are the server's we know ourselves: anybody can write its id
    on a port."""
    if not plugs:
        return []
    ports = {p.id: p for p in world.neighbours.network.ports(ids=[p.port_id for p in plugs])}
    return [_attachment(ports[p.port_id], p.tag) for p in plugs if p.port_id in ports]


def _attachment(port: Port, tag: str | None) -> Attachment:
    return Attachment(
        net_id=port.network_id,
        port_id=port.id,
        mac_addr=port.mac,
        port_state=port.status or "",
        fixed_ips=[FixedIp(a.subnet_id, a.ip_address) for a in port.fixed_ips],
        tag=tag,
    )


def _plug(server: Server, port_id: str) -> Plug | None:
    return next((p for p in server.plugs if p.port_id == dashed(port_id)), None)


# ---- attach


class Address(msgspec.Struct, forbid_unknown_fields=True):
    ip_address: str


class Wish(msgspec.Struct, forbid_unknown_fields=True):
    net_id: Uuid | UnsetType = UNSET
    port_id: Uuid | UnsetType = UNSET
    fixed_ips: Annotated[list[Address], Meta(min_length=1, max_length=1)] | UnsetType = UNSET
    tag: Annotated[Tag | UnsetType, since("2.49")] = UNSET


class Body(msgspec.Struct, forbid_unknown_fields=True):
    attachment: Wish = msgspec.field(default_factory=Wish, name="interfaceAttachment")


@R.post(PATH, body=Body, policy="os_compute_api:os-attach-interfaces:create", late=True)
def create(call: Call, server_id: str) -> One:
    world: World = call.world
    wish: Wish = call.body.attachment
    _check(wish)
    with world.db.read() as tx:
        before = the_server(call, tx, server_id)
        unlocked(call, before)
        call.check(
            {"project_id": before.project_id, "user_id": before.user_id}, "os_compute_api:os-attach-interfaces:show"
        )
    servers.check(before, VERBS["attach_interface"])
    _reachable(world, before, AttachNic.__name__)
    wanted = _wanted(call, before, wish)

    def record(tx: Tx) -> str:
        unlocked(call, the_server(call, tx, server_id))
        now = world.clock.now()
        job = AttachInterface(servers.begin(tx, server_id, VERBS["attach_interface"], now), wanted)
        why = cause(call, "attach_interface")
        return start(tx, "attach_interface", job, id=world.ids.uuid(), subject=server_id, now=now, cause=why)

    run = world.db.run(record)
    world.wake(run)
    return One(_outcome(world, server_id, run))


def _check(wish: Wish) -> None:
    if wish.net_id and wish.port_id:
        raise Invalid("Must not input both network_id and port_id")
    if wish.fixed_ips:
        address(wish.fixed_ips[0].ip_address, None, "ip_address")
        if not wish.net_id:
            raise Invalid("Must input network_id when request IP address")


def _reachable(world: World, server: Server, message: str) -> None:
    """Nobody should wait for a host that is not there, or does not know what is meant."""
    if world.hosts.status(server.host) in ("DOWN", "UNKNOWN"):
        raise Conflict(f"The host of instance {server.id} does not answer.")
    if not world.hosts.speaks(server.host, message):
        raise Unsupported("The requested functionality is not supported.")


# ---- gather


def _wanted(call: Call, server: Server, wish: Wish) -> Wanted:
    """What the names stand for, as the caller may see them. Raises NotFound, Conflict, Invalid, Forbidden."""
    tag = wish.tag or None
    if wish.port_id:
        return Wanted(port_id=_port(call, server, dashed(wish.port_id)), tag=tag)
    fixed = wish.fixed_ips[0].ip_address if wish.fixed_ips else None
    network_id = _network(call, dashed(wish.net_id)) if wish.net_id else _only(call, server)
    return Wanted(network_id=network_id, fixed_ip=fixed, tag=tag)


def _port(call: Call, server: Server, id: str) -> str:
    found = call.world.neighbours.network.ports(ids=[id], token=call.context.token)
    if not found:
        raise NotFound(f"Port id {id} could not be found.")
    if found[0].device_id:
        raise Conflict(f"Port {id} is still in use.")
    if not found[0].fixed_ips:
        raise Invalid(f"Port {id} requires a FixedIP in order to be used.")
    return id


def _network(call: Call, id: str) -> str:
    found = call.world.neighbours.network.networks(ids=[id], token=call.context.token)
    if not found:
        raise NotFound(f"Network {id} could not be found.")
    if not found[0].subnets:
        raise Invalid(f"Network {id} requires a subnet in order to boot instances on.")
    if found[0].external and not found[0].shared and not call.may("network:attach_external_network"):
        raise Forbidden(f"It is not allowed to create an interface on external network {id}")
    return id


def _only(call: Call, server: Server) -> str:
    world: World = call.world
    seen = [n for n in world.neighbours.network.networks(token=call.context.token) if not n.external and n.subnets]
    mine = [n.id for n in seen if n.project_id == server.project_id or n.shared]
    if not mine:
        raise Invalid(f"No specific network was requested and none are available for project '{server.project_id}'.")
    if len(mine) > 1:
        raise Invalid("Multiple possible networks found, use a Network ID to be more specific.")
    return mine[0]


# ---- what came of it


def _outcome(world: World, server_id: str, run: str) -> Attachment:
    """Who waited long enough does not want it any longer: what is not plugged by then is taken back."""
    if not world.ended(run, WAIT_S):
        for other in world.db.run(_given_up, server_id, run):
            world.wake(other)
        raise Unavailable(f"The interface could not be attached to instance {server_id} in time.")
    with world.db.read() as tx:
        fault, answer = journal.fault_of(tx, run), journal.answer_of(tx, run, "attached")
    if fault is not None or answer is None:
        raise _said(fault, server_id)
    found = shown(world, [msgspec.json.decode(answer, type=Plug)])
    if not found:
        raise NotFound("The port was deleted meanwhile.")
    return found[0]


def _given_up(tx: Tx, server_id: str, run: str) -> list[str]:
    return signal(tx, server_id, "abort", run=run) if not journal.over(tx, run) else []


def _said(fault: Fault | None, server_id: str) -> Trouble:
    """A host's refusal is nobody's mistake: 500, as the Compute API has it. No address left is the caller's to change."""
    if fault is None:
        return Trouble(f"Failed to attach network adapter device to {server_id}")
    trouble = fault.trouble()
    if isinstance(trouble, HostGone):
        return Unavailable(f"The host of instance {server_id} does not answer.", why=trouble.said)
    if isinstance(trouble, Refused):
        return Trouble(f"Failed to attach network adapter device to {server_id}: {trouble.said}")
    if trouble.code == "IpAddressGenerationFailure":
        return Invalid(trouble.said)
    return trouble


# ---- detach


@R.delete(PATH + "/{id}", ok=202, policy="os_compute_api:os-attach-interfaces:delete", late=True)
def delete(call: Call, server_id: str, id: str) -> None:
    world: World = call.world

    def record(tx: Tx) -> str:
        server = the_server(call, tx, server_id)
        unlocked(call, server)
        servers.check(server, VERBS["detach_interface"])
        plug = _plug(server, id)
        if plug is None:
            raise NotFound(f"Port id {id} could not be found.")
        if not world.hosts.speaks(server.host, DetachNic.__name__):
            raise Unsupported("The requested functionality is not supported.")
        now = world.clock.now()
        job = DetachInterface(servers.begin(tx, server_id, VERBS["detach_interface"], now), plug.port_id)
        why = cause(call, "detach_interface")
        return start(tx, "detach_interface", job, id=world.ids.uuid(), subject=server_id, now=now, cause=why)

    world.wake(world.db.run(record))
