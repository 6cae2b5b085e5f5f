"""The network service (Network API v2.0), as a service asks it."""

import urllib.parse
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from kilonova.clients.session import Query, Session, decoded, part
from kilonova.kit.errors import Conflict, NotFound
from kilonova.model.machine import FixedIp, Nic

T = TypeVar("T")

STALE = "RevisionNumberConstraintFailed"  # code of a Conflict: somebody has changed it meanwhile
IDS_IN_A_QUERY = 120  # 47 letters each: below the 8 KB that proxies allow a request line


class Address(msgspec.Struct, frozen=True):
    """One fixed address of a port."""

    subnet_id: str
    ip_address: str = ""


class Port(msgspec.Struct, frozen=True):
    """A port (Network API v2.0). `vif_type` "" and "unbound": on no host; "binding_failed": its host cannot have it."""

    id: str
    network_id: str
    mac: str = msgspec.field(name="mac_address")
    fixed_ips: list[Address] = []
    name: str | None = ""
    status: str | None = ""
    admin_state_up: bool | None = True
    device_id: str | None = ""
    device_owner: str | None = ""
    project_id: str | None = ""
    host: str | None = msgspec.field(name="binding:host_id", default="")
    vif_type: str | None = msgspec.field(name="binding:vif_type", default="")
    vif_details: dict[str, Any] | None = msgspec.field(name="binding:vif_details", default_factory=dict)
    vnic_type: str | None = msgspec.field(name="binding:vnic_type", default="normal")
    profile: dict[str, Any] | None = msgspec.field(name="binding:profile", default_factory=dict)
    security_groups: list[str] = []
    port_security_enabled: bool | None = True
    dns_name: str | None = ""
    tags: list[str] = []
    resource_request: dict[str, Any] | None = None
    revision: int | None = msgspec.field(name="revision_number", default=None)  # None: the service does not count

    @property
    def seen(self) -> str | None:
        """By which a change can be made conditional on what was seen (If-Match)."""
        return None if self.revision is None else f"revision_number={self.revision}"


class Binding(msgspec.Struct, frozen=True):
    """One of a port's hosts: where it is (ACTIVE), or could be next (INACTIVE)."""

    host: str
    status: str = "ACTIVE"
    vif_type: str | None = ""
    vif_details: dict[str, Any] | None = {}
    vnic_type: str | None = "normal"
    profile: dict[str, Any] | None = {}


class NetworkInfo(msgspec.Struct, frozen=True):
    """A network. `mtu` 0: not said."""

    id: str
    name: str | None = ""
    project_id: str | None = ""
    status: str | None = ""
    admin_state_up: bool | None = True
    shared: bool | None = False
    external: bool | None = msgspec.field(name="router:external", default=False)
    mtu: int | None = 0
    subnets: list[str] = []
    port_security_enabled: bool | None = True
    physical_network: str | None = msgspec.field(name="provider:physical_network", default=None)
    network_type: str | None = msgspec.field(name="provider:network_type", default=None)
    tags: list[str] = []


class HostRoute(msgspec.Struct, frozen=True):
    destination: str
    nexthop: str


class Subnet(msgspec.Struct, frozen=True):
    """A subnet: `cidr`, whether guests get their address by DHCP, and what they are told."""

    id: str
    network_id: str
    cidr: str
    ip_version: int = 4
    gateway_ip: str | None = None
    enable_dhcp: bool | None = True
    dns_nameservers: list[str] = []
    host_routes: list[HostRoute] = []
    name: str | None = ""
    project_id: str | None = ""
    ipv6_address_mode: str | None = None
    segment_id: str | None = None


class Segment(msgspec.Struct, frozen=True):
    """A part of a routed network; in Placement a provider of the same id, with the aggregate of the hosts that it reaches."""

    id: str
    network_id: str


class SecurityRule(msgspec.Struct, frozen=True):
    """What a group lets pass. `port_range_…` None: any; for ICMP they are type and code."""

    id: str
    security_group_id: str
    direction: str = "ingress"
    ethertype: str | None = "IPv4"
    protocol: str | None = None
    port_range_min: int | None = None
    port_range_max: int | None = None
    remote_ip_prefix: str | None = None
    remote_group_id: str | None = None


class SecurityGroup(msgspec.Struct, frozen=True):
    id: str
    name: str
    project_id: str | None = ""
    description: str | None = ""
    rules: list[SecurityRule] = msgspec.field(name="security_group_rules", default_factory=list)


class FloatingIp(msgspec.Struct, frozen=True):
    id: str
    floating_ip_address: str
    fixed_ip_address: str | None = None
    port_id: str | None = None
    project_id: str | None = ""
    floating_network_id: str | None = ""
    status: str | None = ""


class Network:
    """The network service (Network API v2.0)."""

    def __init__(self, session: Session) -> None:
        self.session = session

    # -- ports

    def ports(
        self,
        *,
        servers: Iterable[str] = (),
        ids: Iterable[str] = (),
        token: str | None = None,
        **filters: str | Sequence[str] | None,
    ) -> list[Port]:
        """All ports that fit, of all `servers` (`device_id`) or with these `ids`: one request for each 120 of them.

        Nothing said finds nothing: an empty list of servers has no ports.
        `filters` are the API's: `network_id=`, `project_id=`, `name=`, `device_owner=`, `**{"binding:host_id": h}`.
        """
        for name, wanted in (("device_id", servers), ("id", ids)):
            if several := list(wanted):
                return self._several("ports", name, several, Port, filters, token)
        return [] if not filters else self._list("ports", Port, filters, token)

    def port(self, id: str, token: str | None = None) -> Port:
        """Raises NotFound."""
        return self.session.json("GET", f"/v2.0/ports/{part(id)}", _OnePort, token=token).port

    def create_port(self, network_id: str, *, token: str | None = None, **wish: Any) -> Port:
        """A new port on a network. `wish` are the API's names, `binding:host_id` and so on by `**{…}`:

        `project_id=` (needed when asked in our own name), `device_id=`, `device_owner="compute:nova"`, `name=`,
        `fixed_ips=[{"ip_address": …}]`, `security_groups=[ids]`, `mac_address=`, `dns_name=`, `tags=`.
        Raises NotFound (network), OverQuota, Conflict (address taken, none left: see `code`), Invalid.
        """
        body = {"port": {"network_id": network_id, "admin_state_up": True, **wish}}
        return self.session.json("POST", "/v2.0/ports", _OnePort, body=body, token=token).port

    def update_port(self, id: str, *, token: str | None = None, seen: str | None = None, **wish: Any) -> Port:
        """`seen`: only if it is still as it was then (`Port.seen`). Raises NotFound, Conflict (`code` STALE: it is not), Invalid."""
        path, headers = f"/v2.0/ports/{part(id)}", {} if seen is None else {"If-Match": seen}
        return self.session.json("PUT", path, _OnePort, body={"port": wish}, headers=headers, token=token).port

    def bind_port(
        self, id: str, host: str, *, device_id: str, device_owner: str, seen: str | None = None, **wish: Any
    ) -> Port:
        """Make it a server's, on this host; in our own name, since hosts are no user's business. Safe to do twice.

        Raises Conflict where the network service cannot have the port on this host (`code` PortBindingFailed), or where
        it is another than was `seen` (STALE).
        """
        wish |= {"binding:host_id": host, "device_id": device_id, "device_owner": device_owner}
        port = self.update_port(id, seen=seen, **wish)
        if port.vif_type == "binding_failed":
            raise Conflict(f"Binding failed for port {id}.", why=f"on host {host}", code="PortBindingFailed")
        return port

    def unbind_port(self, id: str, **wish: Any) -> None:
        """Let go of a port that was not ours: it belongs to no server and no host again. Nothing there: done."""
        with suppress(NotFound):
            self.update_port(
                id, **{"device_id": "", "device_owner": "", "binding:host_id": "", "binding:profile": {}, **wish}
            )

    def delete_port(self, id: str, token: str | None = None) -> None:
        """Also where there is none any more."""
        with suppress(NotFound):
            self.session.tell("DELETE", f"/v2.0/ports/{part(id)}", token=token)

    # -- a port on its way from host to host

    def bindings(self, port: str) -> list[Binding]:
        """Raises NotFound where there is no such port."""
        return self.session.json("GET", f"/v2.0/ports/{part(port)}/bindings", _Bindings).bindings

    def expect_port(self, port: Port, host: str) -> Binding:
        """Let it be able to come to this host, beside where it is; with the profile that it has. Safe to do twice.

        Raises Conflict where the network service cannot have it there.
        """
        wish = {"host": host, "vnic_type": port.vnic_type or "normal", "profile": port.profile or {}}
        path = f"/v2.0/ports/{part(port.id)}/bindings"
        try:
            return self.session.json("POST", path, _OneBinding, body={"binding": wish}).binding
        except Conflict:
            if there := [b for b in self.bindings(port.id) if b.host == host]:
                return there[0]
            raise

    def switch_port(self, port: str, host: str) -> None:
        """It is on that host from now on, and could be where it was before. Safe to do twice. Raises NotFound."""
        path = f"/v2.0/ports/{part(port)}/bindings/{part(host)}/activate"
        try:
            self.session.tell("PUT", path)
        except Conflict:
            if not any(b.host == host and b.status == "ACTIVE" for b in self.bindings(port)):
                raise

    def forget_binding(self, port: str, host: str) -> None:
        """It does not come to, or come back to, this host. Nothing there: done."""
        with suppress(NotFound):
            self.session.tell("DELETE", f"/v2.0/ports/{part(port)}/bindings/{part(host)}")

    # -- what they hang on

    def networks(
        self, *, ids: Iterable[str] = (), token: str | None = None, **filters: str | Sequence[str] | None
    ) -> list[NetworkInfo]:
        """Those with these ids, or all that fit `filters` (`project_id=`, `shared="true"`, `name=`, …)."""
        if several := list(ids):
            return self._several("networks", "id", several, NetworkInfo, filters, token)
        return self._list("networks", NetworkInfo, filters, token)

    def subnets(
        self,
        *,
        ids: Iterable[str] = (),
        networks: Iterable[str] = (),
        token: str | None = None,
        **filters: str | Sequence[str] | None,
    ) -> list[Subnet]:
        for name, wanted in (("id", ids), ("network_id", networks)):
            if several := list(wanted):
                return self._several("subnets", name, several, Subnet, filters, token)
        return self._list("subnets", Subnet, filters, token) if filters else []

    def segments(self, network_id: str) -> list[Segment]:
        """Of this network; none where the service knows of no segments."""
        try:
            return self._list("segments", Segment, {"network_id": network_id}, None)
        except NotFound:
            return []

    def security_groups(
        self, *, token: str | None = None, ids: Iterable[str] = (), **filters: str | Sequence[str] | None
    ) -> list[SecurityGroup]:
        """`filters`: `project_id=`, `name=` (repeatable)."""
        if several := list(ids):
            return self._several("security_groups", "id", several, SecurityGroup, filters, token)
        return self._list("security_groups", SecurityGroup, filters, token)

    def floating_ips(
        self, *, ports: Iterable[str] = (), token: str | None = None, **filters: str | Sequence[str] | None
    ) -> list[FloatingIp]:
        """Of these ports; or all that fit `filters` (`project_id=`, `floating_ip_address=`)."""
        if several := list(ports):
            return self._several("floatingips", "port_id", several, FloatingIp, filters, token)
        return self._list("floatingips", FloatingIp, filters, token) if filters else []

    # -- what users change through us

    def network(self, id: str, token: str | None = None) -> NetworkInfo:
        """Raises NotFound."""
        return self.session.json("GET", f"/v2.0/networks/{part(id)}", _OneNetwork, token=token).network

    def floating_ip(self, id: str, token: str | None = None) -> FloatingIp:
        """Raises NotFound."""
        return self.session.json("GET", f"/v2.0/floatingips/{part(id)}", _OneFloating, token=token).floatingip

    def create_floating_ip(self, network_id: str, token: str | None = None) -> FloatingIp:
        """One of this external network. Raises OverQuota, Conflict (none left), NotFound, Forbidden."""
        body = {"floatingip": {"floating_network_id": network_id}}
        return self.session.json("POST", "/v2.0/floatingips", _OneFloating, body=body, token=token).floatingip

    def point_floating_ip(
        self, id: str, port_id: str | None, fixed: str | None = None, token: str | None = None
    ) -> FloatingIp:
        """Let it lead to this address of this port, or nowhere. Raises NotFound, Conflict, Invalid."""
        body = {"floatingip": {"port_id": port_id} | ({"fixed_ip_address": fixed} if fixed else {})}
        path = f"/v2.0/floatingips/{part(id)}"
        return self.session.json("PUT", path, _OneFloating, body=body, token=token).floatingip

    def delete_floating_ip(self, id: str, token: str | None = None) -> None:
        """Raises NotFound."""
        self.session.tell("DELETE", f"/v2.0/floatingips/{part(id)}", token=token)

    def security_group(self, id: str, token: str | None = None) -> SecurityGroup:
        """Raises NotFound."""
        return self.session.json("GET", f"/v2.0/security-groups/{part(id)}", _OneGroup, token=token).security_group

    def create_security_group(self, name: str, description: str, token: str | None = None) -> SecurityGroup:
        """Raises OverQuota, Conflict, Invalid."""
        body = {"security_group": {"name": name, "description": description}}
        return self.session.json("POST", "/v2.0/security-groups", _OneGroup, body=body, token=token).security_group

    def update_security_group(self, id: str, name: str, description: str, token: str | None = None) -> SecurityGroup:
        """Raises NotFound, Conflict, Invalid."""
        body = {"security_group": {"name": name, "description": description}}
        path = f"/v2.0/security-groups/{part(id)}"
        return self.session.json("PUT", path, _OneGroup, body=body, token=token).security_group

    def delete_security_group(self, id: str, token: str | None = None) -> None:
        """Raises NotFound; Conflict where a port has it."""
        self.session.tell("DELETE", f"/v2.0/security-groups/{part(id)}", token=token)

    def create_security_rule(self, group_id: str, token: str | None = None, **wish: Any) -> SecurityRule:
        """`direction=`, `ethertype=`, `protocol=`, `port_range_min=`, … Raises NotFound, Conflict, OverQuota, Invalid."""
        body = {"security_group_rule": {"security_group_id": group_id, **wish}}
        path = "/v2.0/security-group-rules"
        return self.session.json("POST", path, _OneRule, body=body, token=token).security_group_rule

    def delete_security_rule(self, id: str, token: str | None = None) -> None:
        """Raises NotFound."""
        self.session.tell("DELETE", f"/v2.0/security-group-rules/{part(id)}", token=token)

    def auto_network(self, project_id: str) -> str:
        """The id of the project's automatic network, made when it has none. Raises NotFound, Conflict."""
        path = f"/v2.0/auto-allocated-topology/{part(project_id)}"
        return str(self.session.json("GET", path, _OneTopology).auto_allocated_topology["id"])

    def quota(self, project_id: str) -> dict[str, int]:
        """Limits by the API's names: `port`, `floatingip`, `security_group`, … -1: none."""
        return self.session.json("GET", f"/v2.0/quotas/{part(project_id)}", _OneQuota).quota

    def _several(
        self, what: str, by: str, ids: Sequence[str], kind: type[T], filters: Query, token: str | None
    ) -> list[T]:
        return [
            item
            for first in range(0, len(ids), IDS_IN_A_QUERY)
            for item in self._list(what, kind, {**filters, by: ids[first : first + IDS_IN_A_QUERY]}, token)
        ]

    def _list(self, what: str, kind: type[T], query: Query | None, token: str | None) -> list[T]:
        """All pages: the service may cut a list though it was not asked to."""
        items: list[T] = []
        path = f"/v2.0/{what.replace('_', '-')}"
        while True:
            page = self.session.json("GET", path, dict[str, msgspec.Raw], query=query, token=token)
            items += decoded("network", bytes(page.get(what, b"[]")), list[kind])  # type: ignore[valid-type]
            links = decoded("network", bytes(page.get(f"{what}_links", b"[]")), list[dict[str, str]])
            more = next((link["href"] for link in links if link.get("rel") == "next"), None)
            if more is None:
                return items
            path, query = f"{path.partition('?')[0]}?{urllib.parse.urlsplit(more).query}", None


class _OnePort(msgspec.Struct):
    port: Port


class _OneBinding(msgspec.Struct):
    binding: Binding


class _Bindings(msgspec.Struct):
    bindings: list[Binding]


class _OneNetwork(msgspec.Struct):
    network: NetworkInfo


class _OneFloating(msgspec.Struct):
    floatingip: FloatingIp


class _OneGroup(msgspec.Struct):
    security_group: SecurityGroup


class _OneRule(msgspec.Struct):
    security_group_rule: SecurityRule


class _OneTopology(msgspec.Struct):
    auto_allocated_topology: dict[str, Any]


class _OneQuota(msgspec.Struct):
    quota: dict[str, int]


def plug(
    port: Port, network: NetworkInfo, subnets: Iterable[Subnet], floating: Iterable[FloatingIp] = (), tag: str = ""
) -> Nic:
    """A bound port as a host and its guest must know it; pure. Addresses stand in the port's own order."""
    of = {s.id: s for s in subnets}
    details = port.vif_details or {}
    outer: dict[str, list[str]] = {}
    for f in floating:
        if f.port_id == port.id and f.fixed_ip_address:
            outer.setdefault(f.fixed_ip_address, []).append(f.floating_ip_address)
    return Nic(
        port_id=port.id,
        network_id=port.network_id,
        mac=port.mac,
        device=f"tap{port.id[:11]}",
        vif_type=port.vif_type or "unbound",
        bridge=str(details.get("bridge_name") or ""),
        details={k: v for k, v in details.items() if isinstance(v, str | int | bool)},
        network_name=network.name or "",
        mtu=network.mtu or 1500,
        ips=[_ip(a, of[a.subnet_id], outer.get(a.ip_address, [])) for a in port.fixed_ips if a.subnet_id in of],
        tag=tag,
    )


def _ip(address: Address, subnet: Subnet, floating: list[str]) -> FixedIp:
    return FixedIp(
        address=address.ip_address,
        version=6 if subnet.ip_version == 6 else 4,
        prefix=int(subnet.cidr.partition("/")[2]),
        gateway=subnet.gateway_ip,
        dns=subnet.dns_nameservers,
        dhcp=bool(subnet.enable_dhcp),
        mode=(subnet.ipv6_address_mode or "") if subnet.ip_version == 6 else "",
        routes=[(r.destination, r.nexthop) for r in subnet.host_routes],
        floating=floating,
    )
