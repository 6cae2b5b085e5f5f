"""Security groups and their rules as the Compute API had them, to 2.35."""

import ipaddress
import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kilonova.api.bodies import Uuid, dashed
from kilonova.api.registry import R, World, page_limit
from kilonova.api.security import remotes, rule_view, views
from kilonova.clients import SecurityGroup
from kilonova.kit.errors import Conflict, Invalid, NotFound, OverQuota
from kilonova.kit.routes import Call

GROUPS, RULES, UNTIL = "/v2.1/os-security-groups", "/v2.1/os-security-group-rules", "2.1-2.35"
UUID = re.compile(r"(?i)[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}")
Number = Annotated[int, Meta(ge=0)]


class Query(msgspec.Struct):
    limit: list[Number] = []
    offset: list[Number] = []
    all_tenants: list[str] = []


class Wish(msgspec.Struct):
    name: Annotated[str, Meta(max_length=255)]
    description: Annotated[str, Meta(max_length=255)]


class Body(msgspec.Struct):
    security_group: Wish


@R.get(GROUPS, query=Query, versions=UNTIL, policy="os_compute_api:os-security-groups:get")
def index(call: Call) -> dict[str, Any]:
    """By project and name. `all_tenants`: of all that the caller may see."""
    world: World = call.world
    q: Query = call.query
    whose = {} if q.all_tenants else {"project_id": call.context.project_id or ""}
    found = world.neighbours.network.security_groups(token=call.context.token, **whose)
    found.sort(key=lambda g: (g.project_id or "", g.name))
    first = q.offset[-1] if q.offset else 0
    most = page_limit(call, q.limit[-1] if q.limit and q.limit[-1] else None)
    return {"security_groups": views(call, found[first : first + most])}


@R.get(GROUPS + "/{id}", versions=UNTIL, policy="os_compute_api:os-security-groups:show")
def show(call: Call, id: str) -> dict[str, Any]:
    return {"security_group": views(call, [_group(call, id)])[0]}


@R.post(GROUPS, body=Body, versions=UNTIL, policy="os_compute_api:os-security-groups:create")
def create(call: Call) -> dict[str, Any]:
    name, description = _said(call)
    try:
        made = call.world.neighbours.network.create_security_group(name, description, call.context.token)
    except Conflict as e:
        raise Invalid(e.said) from None
    except OverQuota:
        raise OverQuota("Quota exceeded, too many security groups.") from None
    return {"security_group": views(call, [made])[0]}


@R.put(GROUPS + "/{id}", body=Body, versions=UNTIL, policy="os_compute_api:os-security-groups:update")
def update(call: Call, id: str) -> dict[str, Any]:
    name, description = _said(call)
    group = _group(call, id)
    if group.name == "default":
        raise Invalid("Unable to update system group 'default'")
    try:
        made = call.world.neighbours.network.update_security_group(group.id, name, description, call.context.token)
    except Conflict as e:
        raise Invalid(e.said) from None
    return {"security_group": views(call, [made])[0]}


@R.delete(GROUPS + "/{id}", ok=202, versions=UNTIL, policy="os_compute_api:os-security-groups:delete")
def delete(call: Call, id: str) -> None:
    group = _group(call, id)
    try:
        call.world.neighbours.network.delete_security_group(group.id, call.context.token)
    except Conflict as e:
        raise Invalid(e.said) from None


def _said(call: Call) -> tuple[str, str]:
    """A name there must be, of more than blanks; it is kept as it was said."""
    wish: Wish = call.body.security_group
    if not wish.name.strip():
        raise Invalid("Security group name cannot be empty.")
    return wish.name, wish.description


def _group(call: Call, id: str) -> SecurityGroup:
    if not UUID.fullmatch(id):
        raise Invalid("Security group id should be uuid")
    world: World = call.world
    try:
        return world.neighbours.network.security_group(dashed(id), call.context.token)
    except NotFound:
        raise NotFound(f"Security group {id} not found.") from None


# ---- rules


class RuleWish(msgspec.Struct):
    """Who may come is a group or a range of addresses (`cidr`; neither: everybody)."""

    parent_group_id: Uuid
    group_id: Uuid | None = None
    ip_protocol: Any = None
    from_port: Any = None
    to_port: Any = None
    cidr: Any = None


class RuleBody(msgspec.Struct):
    security_group_rule: RuleWish


@R.post(RULES, body=RuleBody, versions=UNTIL, policy="os_compute_api:os-security-groups:rule:create")
def create_rule(call: Call) -> dict[str, Any]:
    wish: RuleWish = call.body.security_group_rule
    told = rule_of(wish)
    parent = _group(call, wish.parent_group_id)
    if wish.group_id:
        _group(call, wish.group_id)
    try:
        made = call.world.neighbours.network.create_security_rule(parent.id, call.context.token, **told)
    except Conflict:
        raise Invalid("This rule already exists in group") from None
    except OverQuota:
        raise OverQuota("Quota exceeded, too many security group rules.") from None
    return {"security_group_rule": rule_view(made, remotes(call, [made]))}


@R.delete(RULES + "/{id}", ok=202, versions=UNTIL, policy="os_compute_api:os-security-groups:rule:delete")
def delete_rule(call: Call, id: str) -> None:
    if not UUID.fullmatch(id):
        raise Invalid("Security group rule id should be uuid")
    try:
        call.world.neighbours.network.delete_security_rule(dashed(id), call.context.token)
    except NotFound:
        raise NotFound(f"Rule ({id}) not found") from None


def rule_of(wish: RuleWish) -> dict[str, Any]:
    """In the network service's words. Raises Invalid."""
    protocol, low, high = _what(wish)
    told: dict[str, Any] = {"direction": "ingress", "protocol": protocol, "ethertype": "IPv4"}
    told |= {"port_range_min": low, "port_range_max": high}
    if wish.group_id:
        return told | {"remote_group_id": dashed(wish.group_id)}
    try:
        network = ipaddress.ip_network(wish.cidr or "0.0.0.0/0", strict=False)
        if not isinstance(wish.cidr, str | None):
            raise ValueError
    except ValueError:
        raise Invalid(f"Invalid cidr {str(wish.cidr)[:60]}.") from None
    said = str(wish.cidr) if "/" in str(wish.cidr) else str(network)  # as it was said: 10.2.3.124/24 stays that
    return told | {"remote_ip_prefix": said, "ethertype": f"IPv{network.version}"}


def _what(wish: RuleWish) -> tuple[str | None, int | None, int | None]:
    """(protocol, first port, last port); for ICMP type and code. Nothing said: all; -1: all there are."""
    said = wish.ip_protocol, wish.from_port, wish.to_port
    if all(x in (None, "") for x in said):
        if not wish.group_id:
            raise Invalid("Not enough parameters to build a valid rule.")
        return None, None, None
    if any(x in (None, "") for x in said):
        raise Invalid("Not enough parameters to build a valid rule.")
    protocol = str(wish.ip_protocol).lower()
    if protocol not in ("tcp", "udp", "icmp"):
        raise Invalid(f"Invalid IP protocol {protocol[:60]}.")
    low, high = _port(wish.from_port), _port(wish.to_port)
    if protocol == "icmp":
        if not (-1 <= low <= 255 and -1 <= high <= 255):
            raise Invalid(f"Invalid port range {low}:{high}. Valid ICMP types and codes are -1 to 255")
    elif low > high:
        raise Invalid(f"Invalid port range {low}:{high}. Former value cannot be greater than the later")
    elif not (low >= 1 and high <= 65535) and (low, high) != (-1, -1):
        raise Invalid(f"Invalid port range {low}:{high}. Valid {protocol.upper()} ports should be between 1-65535")
    return protocol, None if low == -1 else low, None if high == -1 else high


def _port(said: Any) -> int:
    if isinstance(said, bool) or not isinstance(said, int | str) or not re.fullmatch(r"-?[0-9]{1,6}", str(said)):
        raise Invalid(f"Invalid input for from_port and to_port: {str(said)[:60]}. They must be integers.")
    return int(said)
