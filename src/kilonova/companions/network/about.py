"""What the service says of itself: versions, extensions, agents, zones, and how full the networks are."""

import uuid
from typing import Any

from kilonova.companions import ipam
from kilonova.companions.network import frame
from kilonova.companions.network.frame import R, View
from kilonova.kit.clock import iso
from kilonova.kit.errors import NotFound
from kilonova.kit.routes import Call
from kilonova.store import networks as store

# ---- versions


@R.get("/", open=True)
def versions(call: Call) -> View:
    return {"versions": [{"id": "v2.0", "status": "CURRENT", "links": [{"rel": "self", "href": f"{call.url}/v2.0/"}]}]}


@R.get("/v2.0", open=True)
def resources(call: Call) -> View:
    """Every collection, by the registry."""
    found = sorted({r.path.split("/")[2] for r in R if r.path.count("/") == 2 and r.method == "GET"})
    return {
        "resources": [
            {
                "name": name.removesuffix("ies") + "y" if name.endswith("ies") else name.removesuffix("s"),
                "collection": name.replace("-", "_"),
                "links": [{"rel": "self", "href": f"{call.url}/v2.0/{name}"}],
            }
            for name in found
        ]
    }


# ---- extensions

# Clients look here before they use a word; an alias stands for what is really there.
# fmt: off
EXTENSIONS: dict[str, tuple[str, str]] = {
    "agent":                          ("agent", "Who carries the networks on each host."),
    "allowed-address-pairs":          ("Allowed Address Pairs", "Addresses a port may use besides its own."),
    "auto-allocated-topology":        ("Auto Allocated Topology Services", "A network for who has none."),
    "availability_zone":              ("Availability Zone", "Zones, of which there is one."),
    "binding":                        ("Port Binding", "On which host a port is, and how it is plugged."),
    "binding-extended":               ("Port Bindings Extended", "A port on its way from host to host."),
    "dns-integration":                ("DNS Integration", "Names of ports."),
    "empty-string-filtering":         ("Empty String Filtering Extension", "Filters by what is empty."),
    "ext-gw-mode":                    ("Neutron L3 Configurable external gateway mode", "Routers that do not translate."),
    "external-net":                   ("Neutron external network", "Networks that lead out."),
    "extraroute":                     ("Neutron Extra Route", "Routes of a router's own."),
    "extraroute-atomic":              ("Atomically add/remove extra routes", "One route more or less."),
    "filter-validation":              ("Filter parameters validation", "A filter nobody knows is refused."),
    "fip-port-details":               ("Floating IP Port Details Extension", "What a floating IP leads to."),
    "ip-substring-filtering":         ("IP address substring filtering", "Ports by a part of their address."),
    "net-mtu":                        ("Network MTU", "The longest packet."),
    "net-mtu-writable":               ("Network MTU (writable)", "The longest packet, as the owner wants it."),
    "network_availability_zone":      ("Network Availability Zone", "Zones of networks."),
    "network-ip-availability":        ("Network IP Availability", "How full networks are."),
    "pagination":                     ("Pagination support", "Lists in pages."),
    "port-security":                  ("Port Security", "Ports without a guard."),
    "project-id":                     ("project_id field enabled", "project_id beside tenant_id."),
    "provider":                       ("Provider Network", "How a network is made real."),
    "quota_details":                  ("Quota details management support", "What is used of a share."),
    "quota-check-limit":              ("Quota engine limit check", "Limits that are not below what is used."),
    "quotas":                         ("Quota management support", "Shares of projects."),
    "revision-if-match":              ("If-Match constraints based on revision_number", "A change of what was seen."),
    "router":                         ("Neutron L3 Router", "Routers and floating IPs."),
    "router_availability_zone":       ("Router Availability Zone", "Zones of routers."),
    "security-group":                 ("security-group", "What may reach a port."),
    "security-groups-normalized-cidr": ("Normalized CIDR field for security group rules", "Prefixes as they are meant."),
    "sorting":                        ("Sorting support", "Lists in order."),
    "standard-attr-description":      ("standard-attr-description", "Words on everything."),
    "standard-attr-revisions":        ("Resource revision numbers", "How often a thing was changed."),
    "standard-attr-tag":              ("Tag support for resources with standard attribute", "Tags on everything."),
    "standard-attr-timestamp":        ("Resource timestamps", "When a thing was made and changed."),
    "tag-ports-during-bulk-creation": ("Tag Ports During Bulk Creation", "Ports born with tags."),
}
# fmt: on

SINCE = "2026-01-01T00:00:00-00:00"


def _extension(alias: str) -> View:
    name, description = EXTENSIONS[alias]
    return {"alias": alias, "name": name, "description": description, "updated": SINCE, "links": []}


@R.get("/v2.0/extensions", policy="get_extension", late=True)
def extensions(call: Call) -> View:
    call.checked = True
    return {"extensions": [_extension(a) for a in sorted(EXTENSIONS)]}


@R.get("/v2.0/extensions/{alias}", policy="get_extension", late=True)
def extension(call: Call, alias: str) -> View:
    call.checked = True
    if alias not in EXTENSIONS:
        raise NotFound(f"Extension with alias {frame.printable(alias)} does not exist", code="ExtensionNotFound")
    return {"extension": _extension(alias)}


# ---- agents and zones

NAMESPACE = uuid.UUID("6b0bb8b5-5c1f-4c53-8f0c-0d6cf5a4a7f1")


def _agents(call: Call) -> list[View]:
    """One for each host whose wires we hold; they live in our own process, so they live when we do."""
    now = iso(call.world.clock.now()) or ""
    return [
        {
            "id": str(uuid.uuid5(NAMESPACE, host)),
            "agent_type": "Kilonova wires",
            "binary": "kilonova-wires",
            "host": host,
            "topic": "N/A",
            "availability_zone": "nova",
            "admin_state_up": True,
            "alive": True,
            "configurations": {},
            "resources_synced": None,
            "resource_versions": {},
            "description": None,
            "created_at": now[:19].replace("T", " "),
            "started_at": now[:19].replace("T", " "),
            "heartbeat_timestamp": now[:19].replace("T", " "),
        }
        for host in call.world.looms
    ]


def _matches(call: Call, things: list[View]) -> list[View]:
    wanted = {n: v for n, v in frame.asked(call).items() if n not in frame.CONTROL}
    return [t for t in things if all(str(t.get(n, "")).lower() in [x.lower() for x in v] for n, v in wanted.items())]


@R.get("/v2.0/agents", policy="get_agent", late=True)
def agents(call: Call) -> View:
    call.check(frame.STRANGER)
    return {"agents": _matches(call, _agents(call))}


@R.get("/v2.0/agents/{id}", policy="get_agent", late=True)
def agent(call: Call, id: str) -> View:
    call.check(frame.STRANGER)
    found = [a for a in _agents(call) if a["id"] == id]
    if not found:
        raise NotFound(f"Agent {frame.printable(id)} could not be found.", code="AgentNotFound")
    return {"agent": found[0]}


@R.get("/v2.0/availability_zones", policy="get_availability_zone", late=True)
def zones(call: Call) -> View:
    call.check(frame.STRANGER)
    both = [{"name": "nova", "resource": r, "state": "available"} for r in ("network", "router")]
    return {"availability_zones": _matches(call, both)}


# ---- what is not there, though clients look for it


@R.get("/v2.0/subnetpools", policy="get_subnetpool", late=True)
def subnetpools(call: Call) -> View:
    call.check(frame.STRANGER)
    return {"subnetpools": []}


@R.get("/v2.0/subnetpools/{id}", policy="get_subnetpool", late=True)
def subnetpool(call: Call, id: str) -> View:
    call.check(frame.STRANGER)
    raise NotFound(f"Subnet pool {frame.printable(id)} could not be found.", code="SubnetPoolNotFound")


# ---- how full


def _fullness(call: Call, id: str | None = None) -> list[View]:
    n, s = store.networks.c, store.subnets.c
    with call.world.db.read() as tx:
        networks = store.find(tx, store.Network, *([n.id == id] if id else []))
        subnets = store.find(tx, store.Subnet, *([s.network_id == id] if id else []))
        used = store.fullness(tx)
    views = []
    for network in networks:
        mine = [x for x in subnets if x.network_id == network.id]
        parts: list[dict[str, Any]] = [
            {
                "subnet_id": x.id,
                "subnet_name": x.name,
                "cidr": x.cidr,
                "ip_version": x.ip_version,
                "total_ips": ipam.size(x.allocation_pools),
                "used_ips": used.get(x.id, 0),
            }
            for x in mine
        ]
        views.append(
            {
                "network_id": network.id,
                "network_name": network.name,
                "project_id": network.project_id,
                "tenant_id": network.project_id,
                "subnet_ip_availability": parts,
                "total_ips": sum(p["total_ips"] for p in parts),
                "used_ips": sum(p["used_ips"] for p in parts),
            }
        )
    return views


@R.get("/v2.0/network-ip-availabilities", policy="get_network_ip_availability", late=True)
def availabilities(call: Call) -> View:
    call.check(frame.STRANGER)
    views = _fullness(call)
    version = (frame.asked(call).get("ip_version") or [""])[-1]
    if version:
        views = [v for v in views if any(str(p["ip_version"]) == version for p in v["subnet_ip_availability"])]
    wanted = {
        n: v for n, v in frame.asked(call).items() if n in ("network_id", "network_name", "project_id", "tenant_id")
    }
    return {"network_ip_availabilities": [v for v in views if all(v[n] in x for n, x in wanted.items())]}


@R.get("/v2.0/network-ip-availabilities/{id}", policy="get_network_ip_availability", late=True)
def availability(call: Call, id: str) -> View:
    call.check(frame.STRANGER)
    found = _fullness(call, id) if frame.is_uuid(id) else []
    if not found:
        raise NotFound(f"Network {frame.printable(id)} could not be found.", code="NetworkNotFound")
    return {"network_ip_availability": found[0]}
