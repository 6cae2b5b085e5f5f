"""Networks as projects saw them when the Compute API had them: a name, and much that is no longer known. To 2.35."""

from typing import Any

from kilonova.api.registry import R, World
from kilonova.clients import NetworkInfo
from kilonova.kit.errors import Invalid, NotFound
from kilonova.kit.routes import Call

UNTIL = "2.1-2.35"
UNKNOWN = ("cidr", "netmask", "gateway", "broadcast", "dns1", "dns2", "cidr_v6", "gateway_v6", "netmask_v6")
# fmt: off
ADMINS = (
    "created_at", "updated_at", "deleted_at", "deleted", "injected", "bridge", "vlan", "vpn_public_address",
    "vpn_public_port", "vpn_private_address", "dhcp_start", "project_id", "host", "bridge_interface", "multi_host",
    "priority", "rxtx_base", "mtu", "dhcp_server", "enable_dhcp", "share_address",
)
# fmt: on


def _view(call: Call, n: NetworkInfo) -> dict[str, Any]:
    empty = (*UNKNOWN, *ADMINS) if call.context.is_admin else UNKNOWN
    return {"id": n.id, "label": n.name or ""} | dict.fromkeys(empty)


def _small(n: NetworkInfo) -> dict[str, str]:
    """A network has several ranges or none: which one is not told, and the word for that is None."""
    return {"id": n.id, "label": n.name or "", "cidr": "None"}


def _all(call: Call) -> list[NetworkInfo]:
    world: World = call.world
    return world.neighbours.network.networks(token=call.context.token)


def _one(call: Call, id: str) -> NetworkInfo:
    world: World = call.world
    try:
        return world.neighbours.network.network(id, call.context.token)
    except (NotFound, Invalid):
        raise NotFound("Network not found") from None


@R.get("/v2.1/os-networks", versions=UNTIL, policy="os_compute_api:os-networks:list")
def index(call: Call) -> dict[str, Any]:
    return {"networks": [_view(call, n) for n in _all(call)]}


@R.get("/v2.1/os-networks/{id}", versions=UNTIL, policy="os_compute_api:os-networks:show")
def show(call: Call, id: str) -> dict[str, Any]:
    return {"network": _view(call, _one(call, id))}


@R.get("/v2.1/os-tenant-networks", versions=UNTIL, policy="os_compute_api:os-tenant-networks:list")
def tenant_index(call: Call) -> dict[str, Any]:
    return {"networks": [_small(n) for n in _all(call)]}


@R.get("/v2.1/os-tenant-networks/{id}", versions=UNTIL, policy="os_compute_api:os-tenant-networks:show")
def tenant_show(call: Call, id: str) -> dict[str, Any]:
    return {"network": _small(_one(call, id))}
