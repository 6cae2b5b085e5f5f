"""Places where there was something once. Who knocks is told that it is no more, in every version: 410."""

from kilonova.api.registry import R
from kilonova.kit.routes import Call

# Methods, path, and the actions where there were some.
# fmt: off
GONE = (
    ("GET POST",       "/os-agents"),
    ("PUT DELETE",     "/os-agents/{id}"),
    ("GET POST",       "/os-cells"),
    ("GET",            "/os-cells/capacities"),
    ("GET",            "/os-cells/detail"),
    ("GET",            "/os-cells/info"),
    ("POST",           "/os-cells/sync_instances"),
    ("GET PUT DELETE", "/os-cells/{id}"),
    ("GET",            "/os-cells/{id}/capacities"),
    ("POST",           "/os-certificates"),
    ("GET",            "/os-certificates/{id}"),
    ("GET POST",       "/os-cloudpipe"),
    ("PUT",            "/os-cloudpipe/{id}"),
    ("GET",            "/os-fixed-ips/{id}"),
    ("POST",           "/os-fixed-ips/{id}/action", "reserve", "unreserve"),
    ("GET",            "/os-floating-ip-dns"),
    ("PUT DELETE",     "/os-floating-ip-dns/{id}"),
    ("GET PUT DELETE", "/os-floating-ip-dns/{domain_id}/entries/{id}"),
    ("GET POST",       "/os-floating-ips-bulk"),
    ("GET PUT",        "/os-floating-ips-bulk/{id}"),
    ("GET",            "/os-fping"),
    ("GET",            "/os-fping/{id}"),
    ("POST",           "/os-networks"),
    ("POST",           "/os-networks/add"),
    ("DELETE",         "/os-networks/{id}"),
    ("POST",           "/os-networks/{id}/action", "disassociate", "disassociate_host", "disassociate_project", "associate_host"),
    ("GET POST",       "/os-security-group-default-rules"),
    ("GET DELETE",     "/os-security-group-default-rules/{id}"),
    ("POST",           "/os-tenant-networks"),
    ("DELETE",         "/os-tenant-networks/{id}"),
    ("POST",           "/servers/{id}/action", "resetNetwork"),
    ("GET POST",       "/servers/{server_id}/consoles"),
    ("GET DELETE",     "/servers/{server_id}/consoles/{id}"),
    ("GET",            "/servers/{server_id}/os-virtual-interfaces"),
)
# fmt: on


def _nothing(call: Call, **_: str) -> None:
    raise AssertionError("a route that is gone was asked")


for methods, path, *actions in GONE:
    for method in methods.split():
        for action in actions or (None,):
            R.add(method, f"/v2.1{path}", action=action, gone=True)(_nothing)
