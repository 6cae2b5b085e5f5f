"""What a server's networks want of its host (scheduler.md, 4): asked of the network service when a host is chosen."""

from collections.abc import Sequence

import msgspec

from kilonova.clients import Port
from kilonova.conductor.world import World
from kilonova.kit.errors import NoCapacity
from kilonova.model.ask import Ask
from kilonova.model.server import Server, Wanted
from kilonova.store import placement

REMOTE_MANAGED = "COMPUTE_REMOTE_MANAGED_PORTS"


def of_new(world: World, ask: Ask, networks: Sequence[Wanted]) -> Ask:
    """Of a server that is to have these. Raises NoCapacity where a routed network leads nowhere."""
    ids = [w.port_id for w in networks if w.port_id]
    ports = world.neighbours.network.ports(ids=ids) if ids else []
    return _with(world, ask, ports, [w.network_id for w in networks if w.network_id and not w.port_id])


def asks(world: World, networks: Sequence[Wanted]) -> bool:
    """Is the network service asked about these?"""
    return world.config.scheduler.routed_networks or any(w.port_id for w in networks)


def of_living(world: World, ask: Ask, server: Server) -> Ask:
    """Of one that has its ports."""
    ports = world.neighbours.network.ports(servers=[server.id]) if server.plugs else []
    return _with(world, ask, ports, [])


def _with(world: World, ask: Ask, ports: Sequence[Port], networks: Sequence[str]) -> Ask:
    required = {*ask.required, *(REMOTE_MANAGED for p in ports if p.vnic_type == "remote-managed")}
    segments = [_segments(world, p) for p in ports] + [_all_segments(world, n) for n in networks]
    reached = [_hosts(world, s) for s in segments if s] if world.config.scheduler.routed_networks else []
    return msgspec.structs.replace(ask, required=sorted(required), member_of=[*ask.member_of, *reached])


def _segments(world: World, port: Port) -> list[str]:
    """Those of its addresses; where it has none yet, any of its network."""
    if not world.config.scheduler.routed_networks:
        return []
    if not port.fixed_ips:
        return _all_segments(world, port.network_id)
    found = world.neighbours.network.subnets(ids=[ip.subnet_id for ip in port.fixed_ips])
    return [s.segment_id for s in found if s.segment_id]


def _all_segments(world: World, network_id: str) -> list[str]:
    if not world.config.scheduler.routed_networks:
        return []
    return [s.id for s in world.neighbours.network.segments(network_id)]


def _hosts(world: World, segments: Sequence[str]) -> list[str]:
    with world.db.read() as tx:
        found = sorted(placement.aggregates_of(tx, segments))
    if not found:
        raise NoCapacity(
            "No valid host was found. A routed network of the server reaches no hosts.",
            why=f"no aggregates of segments {', '.join(segments)}",
        )
    return found
