"""What a host's network must look like, computed from the tables; and the moment its wires are told.

`wiring` is the whole of one host in a dozen statements, however many ports it has.  `weave` hands it over after a
commit; what goes wrong there is mended by `rewire`, a reconciler's work, and nothing is lost by it.
"""

import logging
from collections.abc import Iterable, Sequence
from ipaddress import ip_address

import msgspec
import sqlalchemy as sa

from kilonova.companions import ipam
from kilonova.companions.network.world import World
from kilonova.kit.db import Tx
from kilonova.model.wiring import FloatingWire, NetworkWire, PortWire, RouterWire, Rule, SubnetWire, Wiring
from kilonova.store import networks as store
from kilonova.store.networks import Address

logger = logging.getLogger(__name__)

P, N = store.ports.c, store.networks.c
LEG, GATE, DHCP = "network:router_interface", "network:router_gateway", "network:dhcp"
Leg = tuple[store.Subnet, tuple[str, str, str]]
ANYWHERE = {4: "0.0.0.0/0", 6: "::/0"}


def wiring(tx: Tx, world: World, host: str) -> Wiring:
    """All that `host` needs: its guests' ports, their networks, and at home every router that leads anywhere."""
    ports = _guests(tx, host)
    here = {p.network_id for p in ports}
    routers, beyond = _routers(tx, here) if host == world.home else ([], set())
    outer = {n.id: n for n in store.find(tx, store.Network, N.router_external.is_(True))} if host == world.home else {}
    networks = outer | {n.id: n for n in store.among(tx, store.Network, "id", (here | beyond) - outer.keys())}
    subnets = store.among(tx, store.Subnet, "network_id", networks)
    return Wiring(
        networks=_networks(tx, world, networks.values(), subnets),
        ports=_ports(tx, ports, networks),
        routers=routers,
        domain=world.config.dns_domain,
        lease_s=world.config.dhcp_lease_s,
    )


def _guests(tx: Tx, host: str) -> list[store.Port]:
    """Bound here, or waiting to come."""
    waiting = sa.select(store.port_bindings.c.port_id).where(store.port_bindings.c.host == host)
    here = (P.binding_host_id == host) & (P.binding_vif_type == "bridge")
    return store.find(tx, store.Port, here | P.id.in_(waiting), P.device_owner.not_like("network:%"))


# ---- networks


def _networks(
    tx: Tx, world: World, networks: Iterable[store.Network], subnets: Sequence[store.Subnet]
) -> list[NetworkWire]:
    known = list(networks)
    dhcp = {
        p.network_id: p.id
        for p in store.among(tx, store.Port, "network_id", (n.id for n in known), P.device_owner == DHCP)
    }
    held = store.addresses_of(tx, dhcp.values()) if dhcp else {}
    served = {a.subnet_id: a.address for several in held.values() for a in several}
    return [
        NetworkWire(
            id=n.id,
            bridge=world.bridge(n.id),
            mtu=n.mtu,
            external=n.router_external,
            subnets=[_subnet(world, s, served.get(s.id)) for s in subnets if s.network_id == n.id],
        )
        for n in sorted(known, key=lambda n: (n.created_at, n.id))
    ]


def _subnet(world: World, s: store.Subnet, dhcp_address: str | None) -> SubnetWire:
    return SubnetWire(
        id=s.id,
        cidr=s.cidr,
        version=6 if s.ip_version == 6 else 4,
        gateway=s.gateway_ip,
        dns=s.dns_nameservers or [a for a in world.config.dns_servers if ip_address(a).version == s.ip_version],
        routes=[(to, hop) for to, hop in s.host_routes],
        dhcp=s.enable_dhcp and dhcp_address is not None,
        dhcp_address=dhcp_address,
        ra_mode=s.ipv6_ra_mode or "",  # type: ignore[arg-type]
        address_mode=s.ipv6_address_mode or "",  # type: ignore[arg-type]
    )


# ---- guests' ports


def _ports(tx: Tx, ports: Sequence[store.Port], networks: dict[str, store.Network]) -> list[PortWire]:
    if not ports:
        return []
    ids = [p.id for p in ports]
    held, groups = store.addresses_of(tx, ids), store.groups_of(tx, ids)
    rules = _rules(tx, {g for several in groups.values() for g in several})
    return [_port(p, networks[p.network_id], held.get(p.id, []), groups.get(p.id, []), rules) for p in ports]


def _port(
    p: store.Port, network: store.Network, held: list[Address], groups: list[str], rules: dict[str, list[Rule]]
) -> PortWire:
    return PortWire(
        id=p.id,
        network_id=p.network_id,
        mac=p.mac_address,
        device=f"tap{p.id[:11]}",
        addresses=[(a.subnet_id, a.address) for a in held],
        hostname=p.dns_name or (f"host-{held[0].address.replace('.', '-').replace(':', '-')}" if held else ""),
        server_id=p.device_id,
        project_id=p.project_id,
        up=p.admin_state_up and network.admin_state_up,
        secured=p.port_security_enabled,
        allowed_pairs=[(mac, address) for address, mac in p.allowed_address_pairs],
        rules=[r for g in groups for r in rules.get(g, [])],
    )


# The names that the API knows for a protocol (IANA, Assigned Internet Protocol Numbers) besides those rules are written with.
# fmt: off
NUMBERS = {
    "ah": 51, "dccp": 33, "egp": 8, "esp": 50, "gre": 47, "igmp": 2, "ipip": 4, "ipv6-encap": 41, "ipv6-frag": 44,
    "ipv6-nonxt": 59, "ipv6-opts": 60, "ipv6-route": 43, "ospf": 89, "pgm": 113, "rsvp": 46, "sctp": 132,
    "udplite": 136, "vrrp": 112,
}
PLAIN = {"1": "icmp", "6": "tcp", "17": "udp", "58": "icmpv6", "ipv6-icmp": "icmpv6", "any": None, "0": None}
# fmt: on


def protocol(said: str | None, version: int) -> str | None:
    """tcp, udp, icmp, icmpv6, a number as text, or None for any."""
    if said is None:
        return None
    plain = PLAIN.get(said, said)
    if plain == "icmp" and version == 6:
        return "icmpv6"
    return str(NUMBERS[plain]) if plain in NUMBERS else plain


def _rules(tx: Tx, groups: set[str]) -> dict[str, list[Rule]]:
    """By group, with remote groups turned into the addresses of their members."""
    by_group = store.rules_of(tx, groups)
    remote = {r.remote_group_id for several in by_group.values() for r in several if r.remote_group_id}
    members = store.members(tx, remote) if remote else {}
    return {g: [_rule(r, members) for r in several] for g, several in by_group.items()}


def _rule(r: store.Rule, members: dict[str, list[str]]) -> Rule:
    version = 6 if r.ethertype == "IPv6" else 4
    if r.remote_group_id:
        remotes = sorted({ipam.prefix(a) for a in members.get(r.remote_group_id, ()) if (":" in a) == (version == 6)})
    else:
        remotes = [ipam.prefix(r.remote_ip_prefix) if r.remote_ip_prefix else ANYWHERE[version]]
    return Rule(
        direction="ingress" if r.direction == "ingress" else "egress",
        version=6 if version == 6 else 4,
        protocol=protocol(r.protocol, version),
        port_min=r.port_range_min,
        port_max=r.port_range_max,
        remotes=remotes,
        remote_group=r.remote_group_id or "",
    )


# ---- routers


def _routers(tx: Tx, here: set[str]) -> tuple[list[RouterWire], set[str]]:
    """Routers with a way out or a leg where a guest is; and the networks they lead to."""
    known = store.find(tx, store.Router, store.routers.c.admin_state_up.is_(True))
    if not known:
        return [], set()
    ports = store.among(tx, store.Port, "device_id", (r.id for r in known), P.device_owner.in_([LEG, GATE]))
    held = store.addresses_of(tx, [p.id for p in ports]) if ports else {}
    networks = {p.network_id for p in ports}
    subnets = {s.id: s for s in store.among(tx, store.Subnet, "network_id", networks)}
    floating = store.find(tx, store.Floating, store.floating.c.router_id.is_not(None))
    wires = []
    for r in known:
        mine = [p for p in ports if p.device_id == r.id]
        if r.gateway_port_id or any(p.network_id in here for p in mine):
            wires.append(_router(r, mine, held, subnets, [f for f in floating if f.router_id == r.id]))
    return wires, {n for w in wires for n in [*(leg[0] for leg in w.legs), *([w.outside[0]] if w.outside else [])]}


def _router(
    r: store.Router,
    ports: Sequence[store.Port],
    held: dict[str, list[Address]],
    subnets: dict[str, store.Subnet],
    floating: Sequence[store.Floating],
) -> RouterWire:
    def legs(owner: str) -> list[Leg]:
        return [
            (s, (p.network_id, f"{a.address}/{ipam.net(s.cidr).prefixlen}", p.mac_address))
            for p in ports
            if p.device_owner == owner
            for a in held.get(p.id, [])
            for s in [subnets[a.subnet_id]]
        ]

    outside, inside = sorted(legs(GATE), key=lambda leg: leg[0].ip_version), legs(LEG)
    return RouterWire(
        id=r.id,
        legs=[leg for _, leg in inside],
        outside=outside[0][1] if outside else None,
        outside_gateway=outside[0][0].gateway_ip if outside else None,
        snat=r.enable_snat,
        floating=[FloatingWire(f.floating_ip_address, f.fixed_ip_address) for f in floating if f.fixed_ip_address],
        routes=[(w.destination, w.hop) for w in _ways(r, outside + inside)],
    )


def _ways(r: store.Router, legs: list[Leg]) -> list[ipam.Way]:
    """Its routes; without those that became impassable when a leg or the gateway came later than they."""
    near = [s.cidr for s, _ in legs]
    own = {address.partition("/")[0] for _, (_, address, _) in legs}
    ways = [ipam.Way(to, hop) for to, hop in r.routes]
    return [w for w in ways if not ipam.impassable(w, near, own, r.gateway_port_id is not None)]


# ---- telling the hosts


def weave(
    world: World, *, hosts: Iterable[str] | None = None, networks: Sequence[str] | None = None, must: bool = False
) -> None:
    """Tell the wires of these hosts, or of all; with `networks`, only if one of them is in use.

    What the wires cannot do now is logged and done by `rewire`; with `must` it is raised.
    """
    wanted = list(world.looms) if hosts is None else [h for h in hosts if world.weaves(h)]
    if world.planes is not None and not must:
        wanted = [h for h in wanted if h not in world.planes.silent]  # `meet` tells them when they are back
    if not wanted or (networks is not None and not world.db.look(_in_use, networks)):
        return
    for host in wanted:
        try:
            _weave(world, host)
        except Exception:
            if must:
                raise
            logger.exception("the wires of host %s could not be told; it is tried again", host)


def _weave(world: World, host: str) -> None:
    world.looms[host].weave(lambda: world.db.look(wiring, world, host))


def _in_use(tx: Tx, networks: Sequence[str]) -> bool:
    guests = (P.binding_host_id != "") & (P.device_owner != DHCP)
    used = sa.select(P.id).where(P.network_id.in_(networks), guests | P.device_owner.in_([LEG, GATE])).limit(1)
    outer = sa.select(N.id).where(N.id.in_(networks), N.router_external.is_(True)).limit(1)
    return tx.execute(used).first() is not None or tx.execute(outer).first() is not None


def land(world: World, host: str, ports: Sequence[store.Port]) -> dict[str, store.Port]:
    """Ports that were just bound: ACTIVE when the host's wires know them, `binding_failed` where they cannot."""
    fresh = [p for p in ports if p.status == "DOWN" and p.admin_state_up]
    became = {"status": "ACTIVE", "binding_vif_type": "bridge"}
    try:
        _weave(world, host)
    except Exception:
        logger.exception("the wires of host %s could not take ports", host)
        became = {"status": "DOWN", "binding_vif_type": "binding_failed"}
    if fresh:
        world.change(store.set_status, [p.id for p in fresh], host, became)
    return {p.id: msgspec.structs.replace(p, **became) for p in fresh}


def rewire(world: World) -> list[str]:
    """Tell every host everything again, and show ports ACTIVE that a crash left DOWN. Says which it mended.

    Raises what the wires raise, after all hosts were tried.
    """
    return _rewired(world, list(world.looms))


MEET_S = 120.0  # what a host was told may have been lost by it


def meet(world: World, down_after_s: float) -> list[str]:
    """The same for the machines of a fleet: for those that came, came back, or were told nothing for long."""
    planes = world.planes
    if planes is None:
        return []
    now, mended = world.clock.now(), list[str]()
    there = planes.wired()
    for gone in world.looms.keys() - {h.host for h in there}:
        world.looms.pop(gone, None)
    for h in there:
        world.weaves(h.host)
        life, at = planes.met.get(h.host, (None, float("-inf")))
        if h.last_seen is None or now - h.last_seen > down_after_s:
            planes.silent.add(h.host)
            planes.met.pop(h.host, None)
            continue
        planes.silent.discard(h.host)
        if h.host not in world.looms or (life == h.born and now - at < MEET_S):
            continue
        try:
            mended += _rewired(world, [h.host])
        except Exception:
            logger.exception("the wires of host %s could not be told; it is tried again", h.host)
        else:
            planes.met[h.host] = h.born, now
    return mended


def _rewired(world: World, hosts: list[str]) -> list[str]:
    mended: list[str] = []
    trouble = None
    for host in hosts:
        try:
            _weave(world, host)
        except Exception as e:
            trouble = e
            continue
        mended += world.change(_wake, host)
    if trouble:
        raise trouble
    return mended


def _wake(tx: Tx, host: str) -> list[str]:
    asleep = (
        (P.binding_host_id == host)
        & (P.binding_vif_type == "bridge")
        & (P.status == "DOWN")
        & P.admin_state_up.is_(True)
        & P.device_owner.not_like("network:%")
    )
    found = [p.id for p in store.find(tx, store.Port, asleep)]
    store.set_status(tx, found, host, {"status": "ACTIVE"})
    return [f"port {id} is on the wires of {host} now" for id in found]
