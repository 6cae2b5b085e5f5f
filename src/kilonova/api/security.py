"""The security groups of a server: those of its ports. And how the Compute API shows a group and its rules."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kilonova.api.addresses import readdressed
from kilonova.api.registry import R, World, the_server
from kilonova.clients import Port, SecurityGroup, SecurityRule
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.model.server import Server
from kilonova.store import servers

ACTION = "/v2.1/servers/{id}/action"


@R.get("/v2.1/servers/{server_id}/os-security-groups", policy="os_compute_api:os-security-groups:list", late=True)
def index(call: Call, server_id: str) -> dict[str, Any]:
    world: World = call.world
    with world.db.read() as tx:
        server = the_server(call, tx, server_id)
    ids = list(dict.fromkeys(g for p in _ports(world, server) for g in p.security_groups))
    found = {g.id: g for g in world.neighbours.network.security_groups(ids=ids)} if ids else {}
    return {"security_groups": views(call, [found[id] for id in ids if id in found])}


def _ports(world: World, server: Server) -> list[Port]:
    """In our own name: the server is the caller's, and which ports it has we know ourselves."""
    ids = [p.port_id for p in server.plugs]
    return world.neighbours.network.ports(ids=ids) if ids else []


# ---- what is added and removed


class Named(msgspec.Struct, forbid_unknown_fields=True):
    """A name or an id."""

    name: Annotated[str, Meta(min_length=1)]


@R.post(
    ACTION, action="addSecurityGroup", ok=202, body=Named, policy="os_compute_api:os-security-groups:add", late=True
)
def add(call: Call, id: str) -> None:
    """To all ports that have an address and are guarded at all."""
    world: World = call.world
    with world.db.read() as tx:
        server = the_server(call, tx, id)
    group = _group(call, call.body.name)
    ports = _ports(world, server)
    if not ports:
        raise NotFound(f"Instance {id} has no ports to which a security group could be added.")
    if not any(map(_guarded, ports)):
        raise Invalid("Network requires port_security_enabled and subnet associated in order to apply security groups.")
    for p in ports:
        if _guarded(p) and group.id not in p.security_groups:
            world.neighbours.network.update_port(p.id, security_groups=[*p.security_groups, group.id])
    _shown(call, id, {p.id for p in ports if _guarded(p)}, lambda names: [*names, group.name])
    readdressed(call, [id])


@R.post(ACTION, action="removeSecurityGroup", ok=202, body=Named,
        policy="os_compute_api:os-security-groups:remove", late=True)  # fmt: skip
def remove(call: Call, id: str) -> None:
    world: World = call.world
    with world.db.read() as tx:
        server = the_server(call, tx, id)
    group = _group(call, call.body.name)
    having = [p for p in _ports(world, server) if group.id in p.security_groups]
    if not having:
        raise NotFound(f"Security group {call.body.name} is not associated with the instance {id}")
    for p in having:
        left = [g for g in p.security_groups if g != group.id]
        world.neighbours.network.update_port(p.id, security_groups=left)
    _shown(call, id, {p.id for p in having}, lambda names: [n for n in names if n != group.name])
    readdressed(call, [id])


def _shown(call: Call, id: str, ports: set[str], names: Callable[[list[str]], list[str]]) -> None:
    """What the next look will say, at once; the network service is asked for it all behind whatever runs."""

    def record(tx: Tx) -> None:
        server = servers.held(tx, id)
        if server.deleted_at is None:
            groups = {
                p.port_id: list(dict.fromkeys(names(p.security_groups))) for p in server.plugs if p.port_id in ports
            }
            plugs = [
                msgspec.structs.replace(p, security_groups=groups.get(p.port_id, p.security_groups))
                for p in server.plugs
            ]
            servers.change(tx, id, call.world.clock.now(), plugs=plugs)

    call.world.db.run(record)


def _guarded(port: Port) -> bool:
    return bool(port.fixed_ips) and port.port_security_enabled is not False


def _group(call: Call, said: str) -> SecurityGroup:
    """One that the caller may see, by its id or, in his own project, by its name."""
    world: World = call.world
    project = call.context.project_id or ""
    mine = world.neighbours.network.security_groups(token=call.context.token, project_id=project)
    found = [g for g in mine if g.id == said] or [g for g in mine if g.name == said]
    if not found:
        raise NotFound(f"Security group {said} not found.")
    if len(found) > 1:
        raise Conflict(f"Multiple security groups found matching '{said}'. Use an ID to be more specific.")
    return found[0]


# ---- how they are shown


def views(call: Call, groups: Iterable[SecurityGroup]) -> list[dict[str, Any]]:
    """Groups with what they let in; what goes out was never the Compute API's to say."""
    known = list(groups)
    rules = {g.id: [r for r in g.rules if r.direction == "ingress"] for g in known}
    remote = remotes(call, [r for several in rules.values() for r in several])
    return [
        {
            "id": g.id,
            "name": g.name,
            "description": g.description,
            "tenant_id": g.project_id,
            "rules": [rule_view(r, remote) for r in rules[g.id]],
        }
        for g in known
    ]


def remotes(call: Call, rules: Iterable[SecurityRule]) -> dict[str, SecurityGroup]:
    """The groups that rules name."""
    world: World = call.world
    ids = sorted({r.remote_group_id for r in rules if r.remote_group_id})
    return {g.id: g for g in world.neighbours.network.security_groups(ids=ids)} if ids else {}


def rule_view(r: SecurityRule, remote: dict[str, SecurityGroup]) -> dict[str, Any]:
    """Who may come is either a group or a range. Ports that are not said are all that the protocol has."""
    group = remote.get(r.remote_group_id or "")
    low, high = r.port_range_min, r.port_range_max
    if r.protocol and low is None and high is None:
        low, high = (1, 65535) if r.protocol.lower() in ("tcp", "udp") else (-1, -1)
    everybody = "::/0" if r.ethertype == "IPv6" else "0.0.0.0/0"
    return {
        "id": r.id,
        "parent_group_id": r.security_group_id,
        "ip_protocol": r.protocol,
        "from_port": low,
        "to_port": high,
        "group": {"name": group.name, "tenant_id": group.project_id} if group else {},
        "ip_range": {} if r.remote_group_id else {"cidr": r.remote_ip_prefix or everybody},
    }
