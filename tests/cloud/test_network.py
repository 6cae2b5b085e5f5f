"""The Network API as its clients see it: stories of networks, ports, groups, routers, and of what is refused."""

import random
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kilonova.clients import Inside
from kilonova.companions import network
from kilonova.companions.network import World, rewire
from kilonova.companions.network.frame import R
from kilonova.companions.network.world import Loom
from kilonova.companions.wires.filters import checked
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.db import Db, meta
from kilonova.kit.errors import Refused as RefusedByHost
from kilonova.kit.errors import Unavailable, Unknown
from kilonova.kit.http import Server, listen
from kilonova.kit.routes import Context, Route
from kilonova.model.options import Network
from kilonova.model.wiring import Wiring

MEMBER = frozenset({"member", "reader"})
WHO = {
    "admin": Context(user_id="u-admin", project_id="admins", roles=MEMBER | {"admin"}),
    "demo": Context(user_id="u-demo", project_id="demos", roles=MEMBER),
    "other": Context(user_id="u-other", project_id="others", roles=MEMBER),
    "reader": Context(user_id="u-reader", project_id="demos", roles=frozenset({"reader"})),
    "service": Context(user_id="u-nova", project_id="service", roles=frozenset({"service"})),
    "nobody": Context(user_id="u-nobody", project_id="demos"),
}


def gate(token: str) -> Context:
    if token not in WHO:
        raise Unknown("The request you have made requires authentication.")
    return WHO[token]


class Refused(Exception):
    def __init__(self, status: int, type: str, message: str) -> None:
        super().__init__(f"{status} {type}: {message}")
        self.status, self.type, self.message = status, type, message


class Net:
    """The service in this process, asked as a stranger would."""

    def __init__(
        self,
        directory: Path,
        wires: dict[str, Callable[[Wiring], None]] | None = None,
        apart: frozenset[str] = frozenset(),
        way_out: bool = True,
        **config: Any,
    ) -> None:
        self.db = Db(f"sqlite:///{directory}/network-{uuid.uuid4().hex}.db")
        meta.create_all(self.db.engine)
        self.world = World(self.db, WallClock(), Ids(random.Random(1)), Network(**config), wires, apart)
        self.service = network.make_service(self.world, gate)
        network.bootstrap(self.world, "admins", way_out=way_out)
        self.carrier = Inside(self.service, "http://cloud.test/network")
        self.public, self.private = (
            next((n["id"] for n in self.get(f"/networks?name={name}")["networks"]), "")
            for name in ("public", "private")
        )
        self.inner = self.get("/subnets?name=private")["subnets"][0]["id"]

    def raw(self, method: str, path: str, body: Any = None, token: str = "admin", **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else None if body is None else msgspec.json.encode(body)
        said = self.carrier.send(
            method, path, {"X-Auth-Token": token, "Content-Type": "application/json", **headers}, data
        )
        text = said.read()
        return said.status, msgspec.json.decode(text) if text else None

    def ask(self, method: str, path: str, body: Any = None, token: str = "admin", **headers: str) -> Any:
        status, answer = self.raw(method, f"/v2.0{path}", body, token, **headers)
        if status >= 400:
            e = answer.get("NeutronError", {})
            raise Refused(status, e.get("type", ""), e.get("message", ""))
        return answer

    def get(self, path: str, token: str = "admin") -> Any:
        return self.ask("GET", path, token=token)

    def make(self, kind: str, token: str = "admin", **wish: Any) -> Any:
        many = {"security_group": "security-groups", "security_group_rule": "security-group-rules"}.get(
            kind, f"{kind}s"
        )
        wish = {k.replace("__", ":"): v for k, v in wish.items()}
        return self.ask("POST", f"/{many}", {kind: wish}, token)[kind]

    def change(self, kind: str, id: str, token: str = "admin", **wish: Any) -> Any:
        wish = {k.replace("__", ":"): v for k, v in wish.items()}
        return self.ask("PUT", f"/{kind.replace('_', '-')}s/{id}", {kind: wish}, token)[kind]

    def network(self, token: str = "demo", cidr: str = "10.9.0.0/24", **wish: Any) -> tuple[str, str]:
        n = self.make("network", token, name="mine", **wish)["id"]
        return n, self.make("subnet", token, network_id=n, cidr=cidr)["id"]


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    net = Net(tmp_path)
    yield net
    net.db.close()


def refused(status: int, type: str, work: Callable[[], Any]) -> str:
    with pytest.raises(Refused) as e:
        work()
    assert (e.value.status, e.value.type) == (status, type), e.value.message
    return e.value.message


# ---- a first server's port


def test_a_newcomers_port_gets_an_address_on_the_network_that_is_there(net: Net) -> None:
    port = net.make("port", "demo", network_id=net.private)
    (address,) = port["fixed_ips"]
    assert address["subnet_id"] == net.inner and address["ip_address"].startswith("10.0.0.")
    assert port["mac_address"].startswith("fa:16:3e:") and port["status"] == "DOWN" and port["project_id"] == "demos"
    (group,) = net.get("/security-groups", "demo")["security_groups"]
    assert port["security_groups"] == [group["id"]] and group["name"] == "default"
    assert not [k for k in port if k.startswith("binding:") and k != "binding:vnic_type"]


def test_a_build_binds_a_port_and_takes_it_away(net: Net) -> None:
    wish = dict(network_id=net.private, project_id="demos", device_id="server-1", device_owner="compute:nova")
    port = net.make("port", "service", **wish)
    assert port["binding:vif_type"] == "unbound" and port["project_id"] == "demos"
    bound = net.change("port", port["id"], "service", binding__host_id="host-1")
    assert bound["status"] == "ACTIVE" and bound["binding:vif_type"] == "bridge"
    details = bound["binding:vif_details"]
    assert details == {"bridge_name": f"kn{net.private[:11]}", "port_filter": True, "connectivity": "l2"}
    assert [p["id"] for p in net.get("/ports?device_id=server-1", "service")["ports"]] == [port["id"]]
    gone = net.change("port", port["id"], "service", binding__host_id="", device_id="", device_owner="")
    assert gone["binding:vif_type"] == "unbound" and gone["status"] == "DOWN"
    net.ask("DELETE", f"/ports/{port['id']}", token="service")
    refused(404, "PortNotFound", lambda: net.get(f"/ports/{port['id']}"))


def test_a_ports_life_is_a_handful_of_statements(net: Net) -> None:
    """A build's speed is made here: no statement too many."""
    wish = dict(network_id=net.private, project_id="demos", device_id="d", device_owner="compute:nova")
    net.make("port", **wish)  # the default group is there from now on
    told = []
    for _ in range(2):
        at = net.db.statements
        port = net.make("port", **wish)
        made = net.db.statements
        net.change("port", port["id"], binding__host_id="h")
        bound = net.db.statements
        net.ask("DELETE", f"/ports/{port['id']}")
        told.append((made - at, bound - made, net.db.statements - bound))
    assert told[1] <= (6, 6, 6), told


def test_a_page_of_ports_is_three_statements(net: Net) -> None:
    for _ in range(30):
        net.make("port", network_id=net.private)
    at = net.db.statements
    assert len(net.get("/ports?device_owner=")["ports"]) == 30
    assert net.db.statements - at == 3


# ---- tenancy


def test_others_things_are_not_there(net: Net) -> None:
    n, s = net.network("demo")
    port = net.make("port", "demo", network_id=n)["id"]
    group = net.make("security_group", "demo", name="g")["id"]
    router = net.make("router", "demo", name="r")["id"]
    fip = net.make("floatingip", "demo", floating_network_id=net.public)["id"]
    for path, type in [
        (f"/networks/{n}", "NetworkNotFound"),
        (f"/subnets/{s}", "SubnetNotFound"),
        (f"/ports/{port}", "PortNotFound"),
        (f"/security-groups/{group}", "SecurityGroupNotFound"),
        (f"/routers/{router}", "RouterNotFound"),
        (f"/floatingips/{fip}", "FloatingIPNotFound"),
    ]:
        refused(404, type, lambda path=path: net.get(path, "other"))  # type: ignore[misc]
        refused(404, type, lambda path=path: net.ask("DELETE", path, token="other"))  # type: ignore[misc]
        one = {"networks": "network", "subnets": "subnet", "ports": "port", "security-groups": "security_group"}
        name = one.get(path.split("/")[1], path.split("/")[1][:-1])
        refused(
            404,
            type,
            lambda p=path, k=name: net.ask(
                "PUT", p, {k: {"name" if k != "floatingip" else "description": "x"}}, "other"
            ),
        )  # type: ignore[misc]
        plural = path.split("/")[1]
        listed = net.get(f"/{plural}?id={path.split('/')[2]}", "other")
        assert listed[plural.replace("-", "_")] == []
        assert net.get(path, "admin") and net.get(path, "demo") and net.get(path, "reader")
    refused(404, "NetworkNotFound", lambda: net.make("port", "other", network_id=n))
    refused(
        404, "SecurityGroupNotFound", lambda: net.make("port", "other", network_id=net.private, security_groups=[group])
    )


def test_a_shared_network_is_for_all_but_its_owners(net: Net) -> None:
    assert {n["name"] for n in net.get("/networks", "demo")["networks"]} == {"public", "private"}
    refused(403, "PolicyNotAuthorized", lambda: net.change("network", net.private, "demo", name="x"))
    refused(403, "PolicyNotAuthorized", lambda: net.ask("DELETE", f"/networks/{net.private}", token="demo"))
    refused(403, "PolicyNotAuthorized", lambda: net.make("subnet", "demo", network_id=net.private, cidr="10.7.0.0/24"))
    wish = dict(network_id=net.private)
    refused(403, "PolicyNotAuthorized", lambda: net.make("port", "demo", **wish, mac_address="fa:16:3e:00:00:01"))
    refused(403, "PolicyNotAuthorized", lambda: net.make("port", "demo", **wish, port_security_enabled=False))
    refused(403, "PolicyNotAuthorized", lambda: net.make("port", "demo", **wish, binding__host_id="h"))
    refused(
        403, "PolicyNotAuthorized", lambda: net.make("port", "demo", **wish, fixed_ips=[{"ip_address": "10.0.0.9"}])
    )
    refused(403, "PolicyNotAuthorized", lambda: net.make("port", "demo", **wish, device_owner="network:dhcp"))
    assert net.make("port", "demo", **wish, fixed_ips=[{"subnet_id": net.inner}])["fixed_ips"]
    refused(403, "PolicyNotAuthorized", lambda: net.make("port", "demo", network_id=net.public))


def test_only_the_administrator_shares_and_leads_out(net: Net) -> None:
    refused(403, "PolicyNotAuthorized", lambda: net.make("network", "demo", shared=True))
    refused(403, "PolicyNotAuthorized", lambda: net.make("network", "demo", router__external=True))
    refused(403, "PolicyNotAuthorized", lambda: net.make("network", "demo", provider__network_type="flat"))
    assert net.make("network", "demo", shared=False, router__external=False)
    refused(400, "AdminRequired", lambda: net.make("network", "demo", project_id="others"))
    refused(403, "PolicyNotAuthorized", lambda: net.make("network", "reader", name="x"))
    assert net.make("network", "admin", project_id="others")["tenant_id"] == "others"
    assert "provider:network_type" not in net.get(f"/networks/{net.private}", "demo")["network"]
    assert net.get(f"/networks/{net.public}")["network"]["provider:network_type"] == "flat"


def test_who_has_no_role_sees_nothing(net: Net) -> None:
    refused(403, "PolicyNotAuthorized", lambda: net.get("/networks", "nobody"))
    assert net.raw("GET", "/v2.0/networks", token="stranger")[0] == 401


def test_the_owner_of_a_network_sees_and_removes_others_ports_on_it(net: Net) -> None:
    n, _ = net.network("demo")
    port = net.make("port", "admin", network_id=n, project_id="others")["id"]
    assert port in [p["id"] for p in net.get("/ports", "demo")["ports"]]
    net.ask("DELETE", f"/ports/{port}", token="demo")


# ---- networks and subnets


def test_a_subnet_says_what_is_wrong_with_it(net: Net) -> None:
    n = net.make("network", "demo")["id"]

    def subnet(**wish: Any) -> Any:
        return net.make("subnet", "demo", network_id=n, **wish)

    refused(400, "HTTPBadRequest", lambda: subnet(cidr="10.9.0.1/24"))
    refused(400, "HTTPBadRequest", lambda: subnet(cidr="rubbish"))
    refused(400, "InvalidInput", lambda: subnet(cidr="10.9.0.0/24", ip_version=6))
    refused(400, "InvalidInput", lambda: subnet(cidr="0.0.0.0/0"))
    refused(400, "HTTPBadRequest", lambda: subnet(cidr="10.9.0.0/24", gateway_ip="10.9.0.255"))
    refused(
        409,
        "GatewayConflictWithAllocationPools",
        lambda: subnet(cidr="10.9.0.0/24", allocation_pools=[{"start": "10.9.0.1", "end": "10.9.0.5"}]),
    )
    refused(400, "InvalidInput", lambda: subnet(cidr="10.9.0.0/24", ipv6_ra_mode="slaac"))
    refused(400, "InvalidInput", lambda: subnet(cidr="fd00::/80", ip_version=6, ipv6_ra_mode="slaac"))
    refused(
        400,
        "DNSNameServersExhausted",
        lambda: subnet(cidr="10.9.0.0/24", dns_nameservers=[f"1.1.1.{i}" for i in range(6)]),
    )
    refused(404, "SubnetPoolNotFound", lambda: subnet(subnetpool_id=str(uuid.uuid4())))
    subnet(cidr="10.9.0.0/24")
    refused(400, "InvalidInput", lambda: subnet(cidr="10.9.0.128/25"))
    refused(404, "NetworkNotFound", lambda: net.make("subnet", network_id=str(uuid.uuid4()), cidr="10.9.0.0/24"))


def test_dhcp_has_a_port_while_a_subnet_wants_it(net: Net) -> None:
    n, s = net.network()
    (port,) = net.get(f"/ports?network_id={n}&device_owner=network:dhcp")["ports"]
    assert port["fixed_ips"] == [{"subnet_id": s, "ip_address": "10.9.0.2"}] and port["status"] == "ACTIVE"
    second = net.make("subnet", "demo", network_id=n, cidr="10.10.0.0/24")["id"]
    (port,) = net.get(f"/ports?network_id={n}&device_owner=network:dhcp")["ports"]
    assert [f["subnet_id"] for f in port["fixed_ips"]] == [s, second]
    net.change("subnet", s, "demo", enable_dhcp=False)
    net.ask("DELETE", f"/subnets/{second}", token="demo")
    assert net.get(f"/ports?network_id={n}")["ports"] == []
    net.change("subnet", s, "demo", enable_dhcp=True)
    net.ask("DELETE", f"/networks/{n}", token="demo")  # DHCP is nobody who could be in the way
    refused(404, "SubnetNotFound", lambda: net.get(f"/subnets/{s}"))


def test_what_is_in_use_stays(net: Net) -> None:
    n, s = net.network()
    port = net.make("port", "demo", network_id=n)["id"]
    refused(409, "NetworkInUse", lambda: net.ask("DELETE", f"/networks/{n}", token="demo"))
    refused(409, "SubnetInUse", lambda: net.ask("DELETE", f"/subnets/{s}", token="demo"))
    net.ask("DELETE", f"/ports/{port}", token="demo")
    net.ask("DELETE", f"/networks/{n}", token="demo")
    used = net.get("/quotas/demos/details")["quota"]
    assert (used["network"]["used"], used["subnet"]["used"], used["port"]["used"]) == (0, 0, 0)


def test_a_small_subnet_runs_out(net: Net) -> None:
    n, _ = net.network(cidr="10.9.0.0/29")  # .1 is the gateway, .2 DHCP's
    taken = {net.make("port", "demo", network_id=n)["fixed_ips"][0]["ip_address"] for _ in range(4)}
    assert taken == {f"10.9.0.{i}" for i in range(3, 7)}
    refused(409, "IpAddressGenerationFailure", lambda: net.make("port", "demo", network_id=n))
    assert net.get("/quotas/demos/details")["quota"]["port"]["used"] == 4
    net.make("subnet", "demo", network_id=n, cidr="10.10.0.0/29")
    assert net.make("port", "demo", network_id=n)["fixed_ips"][0]["ip_address"].startswith("10.10.0.")


def test_ipv6_beside_ipv4(net: Net) -> None:
    n, _ = net.network()
    slaac = net.make(
        "subnet",
        "demo",
        network_id=n,
        cidr="fd00:9::/64",
        ip_version=6,
        ipv6_ra_mode="slaac",
        ipv6_address_mode="slaac",
    )
    stateful = net.make(
        "subnet", "demo", network_id=n, cidr="fd00:a::/64", ip_version=6, ipv6_address_mode="dhcpv6-stateful"
    )
    port = net.make("port", "demo", network_id=n, mac_address="fa:16:3e:33:28:ad")
    by = {f["subnet_id"]: f["ip_address"] for f in port["fixed_ips"]}
    assert (
        len(by) == 3 and by[slaac["id"]] == "fd00:9::f816:3eff:fe33:28ad" and by[stateful["id"]].startswith("fd00:a::")
    )
    net.ask("DELETE", f"/subnets/{slaac['id']}", token="demo")
    assert len(net.get(f"/ports/{port['id']}", "demo")["port"]["fixed_ips"]) == 2


# ---- ports


def test_addresses_and_macs_that_are_in_use(net: Net) -> None:
    n, s = net.network()
    one = net.make(
        "port", "demo", network_id=n, fixed_ips=[{"ip_address": "10.9.0.77"}], mac_address="fa:16:3e:00:00:07"
    )
    refused(
        409,
        "IpAddressAlreadyAllocated",
        lambda: net.make("port", "demo", network_id=n, fixed_ips=[{"ip_address": "10.9.0.77"}]),
    )
    refused(409, "MacAddressInUse", lambda: net.make("port", "demo", network_id=n, mac_address="FA-16-3E-00-00-07"))
    refused(
        400,
        "InvalidIpForSubnet",
        lambda: net.make("port", "demo", network_id=n, fixed_ips=[{"subnet_id": s, "ip_address": "10.8.0.7"}]),
    )
    refused(
        400,
        "InvalidIpForNetwork",
        lambda: net.make("port", "demo", network_id=n, fixed_ips=[{"ip_address": "10.8.0.7"}]),
    )
    refused(400, "InvalidInput", lambda: net.make("port", "demo", network_id=n, fixed_ips=[{"subnet_id": net.inner}]))
    changed = net.change("port", one["id"], "demo", fixed_ips=[{"subnet_id": s}, {"ip_address": "10.9.0.78"}])
    assert [f["ip_address"] for f in changed["fixed_ips"]] == ["10.9.0.77", "10.9.0.78"]
    changed = net.change("port", one["id"], "demo", fixed_ips=[{"ip_address": "10.9.0.78"}])
    assert [f["ip_address"] for f in changed["fixed_ips"]] == ["10.9.0.78"]
    assert net.change("port", one["id"], "demo", fixed_ips=[])["fixed_ips"] == []


def test_many_ports_at_once_or_none(net: Net) -> None:
    n, _ = net.network()
    made = net.ask("POST", "/ports", {"ports": [{"network_id": n, "name": f"p{i}"} for i in range(5)]}, "demo")["ports"]
    assert [p["name"] for p in made] == [f"p{i}" for i in range(5)]
    bad = [{"network_id": n}, {"network_id": n, "mac_address": made[0]["mac_address"]}]
    refused(409, "MacAddressInUse", lambda: net.ask("POST", "/ports", {"ports": bad}, "demo"))
    assert len(net.get(f"/ports?network_id={n}&project_id=demos&device_owner=", "demo")["ports"]) == 5


def test_a_port_without_a_guard_has_no_groups(net: Net) -> None:
    n, _ = net.network()
    port = net.make("port", "demo", network_id=n, port_security_enabled=False)
    assert port["security_groups"] == []
    group = net.make("security_group", "demo", name="g")["id"]
    refused(
        400,
        "PortSecurityAndIPRequiredForSecurityGroups",
        lambda: net.change("port", port["id"], "demo", security_groups=[group]),
    )
    refused(
        409,
        "AddressPairAndPortSecurityRequired",
        lambda: net.change("port", port["id"], "demo", allowed_address_pairs=[{"ip_address": "10.9.0.5"}]),
    )
    guarded = net.make("port", "demo", network_id=n)["id"]
    refused(
        409,
        "PortSecurityPortHasSecurityGroup",
        lambda: net.change("port", guarded, "demo", port_security_enabled=False),
    )
    assert not net.change("port", guarded, "demo", port_security_enabled=False, security_groups=[])[
        "port_security_enabled"
    ]


def test_names_of_ports(net: Net) -> None:
    port = net.make("port", "demo", network_id=net.private, dns_name="web")
    assert port["dns_assignment"][0]["fqdn"] == "web.novalocal."
    refused(400, "HTTPBadRequest", lambda: net.make("port", "demo", network_id=net.private, dns_name="-no-"))


def test_shares_are_kept(net: Net) -> None:
    net.ask("PUT", "/quotas/demos", {"quota": {"port": 2, "network": 1}})
    for _ in range(2):
        net.make("port", "demo", network_id=net.private)
    message = refused(409, "OverQuota", lambda: net.make("port", "demo", network_id=net.private))
    assert message == "Quota exceeded for resources: ['port']."
    assert net.get("/quotas/demos", "demo")["quota"]["port"] == 2
    assert net.get("/quotas/demos/details.json", "demo")["quota"]["port"] == {"limit": 2, "used": 2, "reserved": 0}
    refused(404, "TenantQuotaNotFound", lambda: net.get("/quotas/demos", "other"))
    refused(403, "PolicyNotAuthorized", lambda: net.ask("PUT", "/quotas/demos", {"quota": {"port": 9}}, "demo"))
    refused(400, "HTTPBadRequest", lambda: net.ask("PUT", "/quotas/demos", {"quota": {"port": -2}}))
    low = {"quota": {"port": 1, "check_limit": True}}
    refused(400, "InvalidQuotaValue", lambda: net.ask("PUT", "/quotas/demos", low))
    net.ask("DELETE", "/quotas/demos")
    assert net.get("/quotas/demos")["quota"]["port"] == 500 and net.get("/quotas")["quotas"] == []
    assert net.get("/quotas/demos/default")["quota"]["network"] == 100


# ---- security groups


def test_a_group_and_its_rules(net: Net) -> None:
    group = net.make("security_group", "demo", name="web")
    assert sorted((r["direction"], r["ethertype"]) for r in group["security_group_rules"]) == [
        ("egress", "IPv4"),
        ("egress", "IPv6"),
    ]

    def rule(**wish: Any) -> Any:
        return net.make("security_group_rule", "demo", security_group_id=group["id"], direction="ingress", **wish)

    ssh = rule(protocol="tcp", port_range_min=22, port_range_max=22, remote_ip_prefix="10.0.0.0/8")
    assert ssh["ethertype"] == "IPv4" and ssh["normalized_cidr"] == "10.0.0.0/8"
    message = refused(
        409,
        "SecurityGroupRuleExists",
        lambda: rule(protocol="6", port_range_min="22", port_range_max="22", remote_ip_prefix="10.0.0.0/8"),
    )
    assert ssh["id"] in message
    for wish, type in [
        (dict(port_range_min=1, port_range_max=2), "SecurityGroupProtocolRequiredWithPorts"),
        (dict(protocol="tcp", port_range_min=9, port_range_max=2), "SecurityGroupInvalidPortRange"),
        (dict(protocol="tcp", port_range_min=9), "SecurityGroupInvalidPortRange"),
        (dict(protocol="tcp", port_range_min=0, port_range_max=2), "SecurityGroupInvalidPortValue"),
        (dict(protocol="gre", port_range_min=1, port_range_max=2), "SecurityGroupInvalidProtocolForPort"),
        (dict(protocol="icmp", port_range_max=2), "SecurityGroupMissingIcmpType"),
        (dict(protocol="icmp", port_range_min=256), "SecurityGroupInvalidIcmpValue"),
        (dict(protocol="nonsense"), "SecurityGroupRuleInvalidProtocol"),
        (dict(protocol="icmpv6", ethertype="IPv4"), "SecurityGroupEthertypeConflictWithProtocol"),
        (dict(ethertype="IPX"), "SecurityGroupRuleInvalidEtherType"),
        (dict(ethertype="IPv6", remote_ip_prefix="10.0.0.0/8"), "SecurityGroupRuleParameterConflict"),
        (dict(remote_ip_prefix="10.0.0.0/8", remote_group_id=group["id"]), "SecurityGroupRemoteGroupAndRemoteIpPrefix"),
    ]:
        refused(400, type, lambda wish=wish: rule(**wish))  # type: ignore[misc]
    rule(protocol="icmp", remote_group_id=group["id"])
    refused(404, "SecurityGroupNotFound", lambda: rule(remote_group_id=str(uuid.uuid4())))
    assert len(net.get(f"/security-group-rules?security_group_id={group['id']}", "demo")["security_group_rules"]) == 4
    net.ask("DELETE", f"/security-group-rules/{ssh['id']}", token="demo")
    port = net.make("port", "demo", network_id=net.private, security_groups=[group["id"]])
    refused(409, "SecurityGroupInUse", lambda: net.ask("DELETE", f"/security-groups/{group['id']}", token="demo"))
    net.change("port", port["id"], "demo", security_groups=[])
    net.ask("DELETE", f"/security-groups/{group['id']}", token="demo")


def test_the_default_group_is_there_and_stays(net: Net) -> None:
    (default,) = net.get("/security-groups", "demo")["security_groups"]
    assert default["name"] == "default" and len(default["security_group_rules"]) == 4
    refused(409, "SecurityGroupDefaultAlreadyExists", lambda: net.make("security_group", "demo", name="default"))
    refused(
        409, "SecurityGroupCannotUpdateDefault", lambda: net.change("security_group", default["id"], "demo", name="x")
    )
    refused(
        409,
        "SecurityGroupCannotRemoveDefault",
        lambda: net.ask("DELETE", f"/security-groups/{default['id']}", token="demo"),
    )


# ---- routers and floating IPs


def test_a_way_out_and_an_address_from_outside(net: Net) -> None:
    n, s = net.network()
    port = net.make("port", "demo", network_id=n)
    fip = net.make("floatingip", "demo", floating_network_id=net.public)
    assert fip["status"] == "DOWN" and fip["port_id"] is None

    def lead(**wish: Any) -> Any:
        return net.change("floatingip", fip["id"], "demo", **wish)

    refused(404, "ExternalGatewayForFloatingIPNotFound", lambda: lead(port_id=port["id"]))
    router = net.make("router", "demo", name="r", external_gateway_info={"network_id": net.public})
    path = f"/routers/{router['id']}"
    leg = net.ask("PUT", f"{path}/add_router_interface", {"subnet_id": s}, "demo")
    assert net.get(f"/ports/{leg['port_id']}")["port"]["fixed_ips"][0]["ip_address"] == "10.9.0.1"
    refused(400, "BadRequest", lambda: net.ask("PUT", f"{path}/add_router_interface", {"subnet_id": s}, "demo"))
    led = lead(port_id=port["id"])
    assert led["status"] == "ACTIVE" and led["router_id"] == router["id"]
    assert led["fixed_ip_address"] == port["fixed_ips"][0]["ip_address"] and led["port_details"]["network_id"] == n
    refused(
        409,
        "FloatingIPPortAlreadyAssociated",
        lambda: net.make("floatingip", "demo", floating_network_id=net.public, port_id=port["id"]),
    )
    refused(
        409,
        "RouterInterfaceInUseByFloatingIP",
        lambda: net.ask("PUT", f"{path}/remove_router_interface", {"subnet_id": s}, "demo"),
    )
    refused(
        409,
        "RouterExternalGatewayInUseByFloatingIp",
        lambda: net.change("router", router["id"], "demo", external_gateway_info=None),
    )
    refused(409, "RouterInUse", lambda: net.ask("DELETE", path, token="demo"))
    refused(409, "ServicePortInUse", lambda: net.ask("DELETE", f"/ports/{leg['port_id']}", token="demo"))
    net.ask("DELETE", f"/ports/{port['id']}", token="demo")
    lost = net.get(f"/floatingips/{fip['id']}", "demo")["floatingip"]
    assert lost["status"] == "DOWN" and lost["port_id"] is lost["fixed_ip_address"] is lost["router_id"] is None
    net.ask("PUT", f"{path}/remove_router_interface", {"port_id": leg["port_id"]}, "demo")
    net.ask("DELETE", path, token="demo")
    net.ask("DELETE", f"/floatingips/{fip['id']}", token="demo")
    net.ask("DELETE", f"/networks/{n}", token="demo")
    assert net.get("/ports?network_id=" + net.public + "&device_owner=network:floatingip")["ports"] == []


def test_routes_lead_to_neighbours(net: Net) -> None:
    _, s = net.network()
    router = net.make("router", "demo")["id"]
    net.ask("PUT", f"/routers/{router}/add_router_interface", {"subnet_id": s}, "demo")
    routes = [{"destination": "10.77.0.0/16", "nexthop": "10.9.0.9"}]
    refused(
        400,
        "InvalidRoutes",
        lambda: net.change("router", router, "demo", routes=[{"destination": "10.7.0.0/16", "nexthop": "1.1.1.1"}]),
    )
    assert net.change("router", router, "demo", routes=routes)["routes"] == routes
    refused(
        409,
        "RouterInterfaceInUseByRoute",
        lambda: net.ask("PUT", f"/routers/{router}/remove_router_interface", {"subnet_id": s}, "demo"),
    )
    more = {"router": {"routes": [{"destination": "10.78.0.0/16", "nexthop": "10.9.0.9"}]}}
    assert len(net.ask("PUT", f"/routers/{router}/add_extraroutes", more, "demo")["router"]["routes"]) == 2
    assert net.ask("PUT", f"/routers/{router}/remove_extraroutes", more, "demo")["router"]["routes"] == routes


def test_no_project_can_spoil_a_host_for_the_others(net: Net) -> None:
    """What the wires of a host could not make would stop all that came after it."""
    n, s = net.network(mtu=1000)
    wish = dict(network_id=n, cidr="fd00:9::/64", ip_version=6)
    refused(400, "InvalidInput", lambda: net.make("subnet", "demo", **wish))
    net.change("network", n, "demo", mtu=1280)
    six = net.make("subnet", "demo", **wish, gateway_ip="fe80::1")["id"]
    refused(400, "InvalidInput", lambda: net.change("network", n, "demo", mtu=1279))
    router = net.make("router", "demo")["id"]
    refused(
        400, "BadRequest", lambda: net.ask("PUT", f"/routers/{router}/add_router_interface", {"subnet_id": six}, "demo")
    )
    _, same = net.network(cidr="172.24.4.0/24")
    for subnet in (s, same):
        net.ask("PUT", f"/routers/{router}/add_router_interface", {"subnet_id": subnet}, "demo")
    gateway = {"network_id": net.public}
    refused(400, "BadRequest", lambda: net.change("router", router, "demo", external_gateway_info=gateway))


def test_a_route_that_the_gateway_overtakes_is_not_told_to_the_host(wired: tuple["Net", "Wires", "Wires"]) -> None:
    net, one, _ = wired
    n, s = net.network()
    router = net.make("router", "demo")["id"]
    net.ask("PUT", f"/routers/{router}/add_router_interface", {"subnet_id": s}, "demo")
    routes = [{"destination": d, "nexthop": "10.9.0.9"} for d in ("0.0.0.0/0", "10.77.0.0/16")]
    net.change("router", router, "demo", routes=routes)
    net.make("port", network_id=n, binding__host_id="host-1")
    assert [r.routes for r in one.now.routers if r.id == router] == [
        [("0.0.0.0/0", "10.9.0.9"), ("10.77.0.0/16", "10.9.0.9")]
    ]
    net.change("router", router, "demo", external_gateway_info={"network_id": net.public})
    assert [r.routes for r in one.now.routers if r.id == router] == [[("10.77.0.0/16", "10.9.0.9")]]


def test_the_administrators_router_and_others_subnets(net: Net) -> None:
    router = net.make("router", "demo")["id"]
    refused(
        400,
        "BadRequest",
        lambda: net.ask("PUT", f"/routers/{router}/add_router_interface", {"subnet_id": net.inner}, "demo"),
    )
    refused(
        403,
        "PolicyNotAuthorized",
        lambda: net.make("router", "demo", external_gateway_info={"network_id": net.public, "enable_snat": False}),
    )
    refused(400, "BadRequest", lambda: net.make("router", "demo", external_gateway_info={"network_id": net.private}))
    refused(400, "BadRequest", lambda: net.make("floatingip", "demo", floating_network_id=net.private))
    refused(
        403,
        "PolicyNotAuthorized",
        lambda: net.make("floatingip", "demo", floating_network_id=net.public, floating_ip_address="172.24.4.9"),
    )
    assert net.make("floatingip", floating_network_id=net.public, floating_ip_address="172.24.4.9")


def test_a_network_for_who_asks_for_any(net: Net) -> None:
    ready = net.get("/auto-allocated-topology/demos?fields=dry-run", "demo")["auto_allocated_topology"]
    assert ready["id"] == "dry-run=pass"
    made = net.get("/auto-allocated-topology/null", "demo")["auto_allocated_topology"]
    assert made == net.get("/auto-allocated-topology/demos", "demo")["auto_allocated_topology"]
    assert net.make("port", "demo", network_id=made["id"])["fixed_ips"][0]["ip_address"].startswith("10.1.0.")
    refused(403, "PolicyNotAuthorized", lambda: net.get("/auto-allocated-topology/demos", "other"))
    for p in net.get(f"/ports?network_id={made['id']}&device_owner=")["ports"]:
        net.ask("DELETE", f"/ports/{p['id']}")
    net.ask("DELETE", "/auto-allocated-topology/demos", token="demo")
    assert net.get("/routers", "demo")["routers"] == []


# ---- lists


def test_lists_filter_sort_and_page(net: Net) -> None:
    n, s = net.network()
    ids = [
        net.make("port", "demo", network_id=n, name=f"p{i % 3}", tags=["odd" if i % 2 else "even", "all"])["id"]
        for i in range(6)
    ]

    def listed(query: str) -> list[str]:
        return [p["id"] for p in net.get(f"/ports?network_id={n}&device_owner=&{query}", "demo")["ports"]]

    assert sorted(listed("")) == sorted(ids)
    assert sorted(listed("name=p0&name=p1")) == sorted(i for k, i in enumerate(ids) if k % 3 < 2)
    assert sorted(listed("tags=odd,all")) == sorted(ids[1::2])
    assert sorted(listed("not-tags=odd")) == sorted(ids[::2])
    assert len(listed("tags-any=odd,even")) == 6 and listed("not-tags-any=odd,even") == []
    assert len(listed("admin_state_up=True&mac_address=FA:16:3E:00:00:00")) == 0
    address = net.get(f"/ports/{ids[0]}")["port"]["fixed_ips"][0]["ip_address"]
    assert listed(f"fixed_ips=ip_address%3D{address}&fixed_ips=subnet_id%3D{s}") == [ids[0]]
    assert set(listed("fixed_ips=ip_address_substr%3D10.9")) == set(ids)
    assert listed("created_at=2001-01-01T00:00:00Z") == [] and len(listed("changed_since=2001-01-01T00:00:00Z")) == 6
    assert net.get(f"/ports?id={ids[0]}&fields=id&fields=name", "demo")["ports"] == [{"id": ids[0], "name": "p0"}]

    seen: list[str] = []
    path = f"/ports?network_id={n}&device_owner=&limit=4&sort_key=name&sort_dir=desc&sort_key=id&sort_dir=asc"
    while path:
        page = net.get(path, "demo")
        seen += [p["id"] for p in page["ports"]]
        links = {x["rel"]: x["href"] for x in page.get("ports_links", [])}
        path = links.get("next", "").removeprefix("http://cloud.test/network/v2.0")
    names = {i: f"p{k % 3}" for k, i in enumerate(ids)}
    assert seen == sorted(sorted(ids), key=lambda i: names[i], reverse=True)
    back = net.get(
        f"/ports?network_id={n}&device_owner=&sort_key=id&limit=2&marker={sorted(ids)[4]}&page_reverse=True", "demo"
    )
    assert [p["id"] for p in back["ports"]] == sorted(ids)[2:4]

    for query in (
        "colour=red",
        "sort_key=colour",
        "sort_key=name&sort_dir=up",
        "limit=x",
        "limit=-1",
        "admin_state_up=perhaps",
        "fixed_ips=x",
    ):
        refused(400, "HTTPBadRequest", lambda q=query: listed(q))  # type: ignore[misc]
    refused(404, "PortNotFound", lambda: listed("limit=1&marker=nowhere"))


def test_tags_are_a_resource_of_their_own(net: Net) -> None:
    path = f"/networks/{net.make('network', 'demo')['id']}/tags"
    assert net.ask("PUT", path, {"tags": ["b", "a", "b"]}, "demo") == {"tags": ["a", "b"]}
    assert net.raw("PUT", f"/v2.0{path}/c", token="demo")[0] == 201
    assert net.raw("GET", f"/v2.0{path}/c", token="demo")[0] == 204
    assert net.get(path, "demo") == {"tags": ["a", "b", "c"]}
    assert net.raw("DELETE", f"/v2.0{path}/c", token="demo")[0] == 204
    refused(404, "TagNotFound", lambda: net.get(f"{path}/c", "demo"))
    refused(404, "TagNotFound", lambda: net.ask("DELETE", f"{path}/c", token="demo"))
    refused(404, "NetworkNotFound", lambda: net.ask("PUT", f"{path}/c", token="other"))
    refused(400, "HTTPBadRequest", lambda: net.ask("PUT", path, {"tags": ["x" * 61]}, "demo"))
    net.ask("DELETE", path, token="demo")
    assert net.get(path, "demo") == {"tags": []}


def test_a_change_of_what_was_seen(net: Net) -> None:
    n = net.make("network", "demo")
    assert n["revision_number"] == 0
    assert net.change("network", n["id"], "demo", name="x")["revision_number"] == 1
    body = {"network": {"name": "y"}}
    refused(
        412,
        "RevisionNumberConstraintFailed",
        lambda: net.ask("PUT", f"/networks/{n['id']}", body, "demo", **{"If-Match": "revision_number=0"}),
    )
    net.ask("PUT", f"/networks/{n['id']}", body, "demo", **{"If-Match": "revision_number=1"})
    refused(400, "HTTPBadRequest", lambda: net.ask("PUT", f"/networks/{n['id']}", body, "demo", **{"If-Match": "yes"}))


def test_an_attribute_nobody_knows(net: Net) -> None:
    message = refused(400, "HTTPBadRequest", lambda: net.make("network", "demo", colour="red"))
    assert message == "Unrecognized attribute(s) 'colour'"
    refused(400, "HTTPBadRequest", lambda: net.ask("POST", "/networks", {"net": {}}, "demo"))
    refused(400, "HTTPBadRequest", lambda: net.ask("POST", "/networks", {}, "demo"))
    refused(400, "HTTPBadRequest", lambda: net.ask("POST", "/networks", None, "demo"))
    assert net.raw("POST", "/v2.0/networks", b"{", "demo")[0] == 400
    assert net.raw("PATCH", f"/v2.0/networks/{net.private}", b"{}")[0] == 405
    assert net.raw("GET", "/v2.0/nowhere")[0] == 404


def test_what_the_service_says_of_itself(net: Net) -> None:
    status, body = net.raw("GET", "/", token="")
    assert status == 200 and body["versions"][0]["links"][0]["href"] == "http://cloud.test/network/v2.0/"
    assert {"networks", "floatingips"} <= {r["collection"] for r in net.raw("GET", "/v2.0/")[1]["resources"]}
    aliases = {e["alias"] for e in net.get("/extensions", "demo")["extensions"]}
    assert {
        "security-group",
        "router",
        "external-net",
        "quotas",
        "binding",
        "binding-extended",
        "dns-integration",
    } <= aliases
    assert net.get("/extensions/router", "demo")["extension"]["alias"] == "router"
    refused(404, "ExtensionNotFound", lambda: net.get("/extensions/trunk", "demo"))
    assert [z["resource"] for z in net.get("/availability_zones", "demo")["availability_zones"]] == [
        "network",
        "router",
    ]
    full = net.get(f"/network-ip-availabilities/{net.private}")["network_ip_availability"]
    assert (full["total_ips"], full["used_ips"]) == (253, 2)


# ---- the wires


class Wires:
    """A host's data plane that remembers what it was told, and may be broken."""

    def __init__(self) -> None:
        self.told: list[Wiring] = []
        self.broken = False

    def __call__(self, wiring: Wiring) -> None:
        if self.broken:
            raise Unavailable("no wires today")
        self.told.append(wiring)

    @property
    def now(self) -> Wiring:
        return self.told[-1]


@pytest.fixture
def wired(tmp_path: Path) -> Iterator[tuple[Net, Wires, Wires]]:
    one, two = Wires(), Wires()
    net = Net(tmp_path, {"host-1": one, "host-2": two})
    yield net, one, two
    net.db.close()


def bound(net: Net, host: str = "host-1", **wish: Any) -> Any:
    return net.make(
        "port",
        network_id=net.private,
        project_id="demos",
        device_id="s",
        device_owner="compute:nova",
        binding__host_id=host,
        **wish,
    )


def test_the_wires_know_a_port_before_its_binding_is_answered(wired: tuple[Net, Wires, Wires]) -> None:
    net, one, two = wired
    port = bound(net, dns_name="web")
    assert port["status"] == "ACTIVE" and not two.told
    (wire,) = one.now.ports
    assert wire.id == port["id"] and wire.device == f"tap{port['id'][:11]}" and wire.mac == port["mac_address"]
    assert wire.addresses == [(net.inner, port["fixed_ips"][0]["ip_address"])]
    assert (wire.hostname, wire.server_id, wire.project_id) == ("web", "s", "demos") and wire.up and wire.secured
    by = {n.id: n for n in one.now.networks}
    assert by[net.public].external and by[net.private].bridge == port["binding:vif_details"]["bridge_name"]
    (subnet,) = by[net.private].subnets
    assert subnet.dhcp and subnet.dhcp_address == "10.0.0.2" and subnet.gateway == "10.0.0.1"
    (router,) = one.now.routers
    assert router.legs[0][:2] == (net.private, "10.0.0.1/24") and router.snat
    assert router.outside and router.outside[0] == net.public and router.outside_gateway == "172.24.4.1"
    net.ask("DELETE", f"/ports/{port['id']}")
    assert one.now.ports == []


def test_rules_reach_the_wires_with_their_remote_group_as_addresses(wired: tuple[Net, Wires, Wires]) -> None:
    net, one, _ = wired
    a, b = bound(net), bound(net)
    (default,) = net.get("/security-groups", "demo")["security_groups"]
    inside = [r for r in one.now.ports[0].rules if r.direction == "ingress" and r.version == 4]
    assert [sorted(r.remotes) for r in inside] == [sorted(f"{p['fixed_ips'][0]['ip_address']}/32" for p in (a, b))]
    told = len(one.told)
    rule = net.make(
        "security_group_rule",
        "demo",
        security_group_id=default["id"],
        direction="ingress",
        protocol="tcp",
        port_range_min=22,
        port_range_max=22,
    )
    assert len(one.told) == told + 1
    ssh = [r for r in one.now.ports[0].rules if r.protocol == "tcp"]
    assert [(r.port_min, r.port_max, r.remotes) for r in ssh] == [(22, 22, ["0.0.0.0/0"])]
    net.ask("DELETE", f"/security-group-rules/{rule['id']}", token="demo")
    assert not [r for r in one.now.ports[0].rules if r.protocol == "tcp"]
    net.make(
        "security_group_rule",
        "demo",
        security_group_id=net.make("security_group", "demo", name="x")["id"],
        direction="ingress",
    )
    assert len(one.told) == told + 2  # a group nobody has is nothing to the wires


def test_a_floating_ip_reaches_the_wires(wired: tuple[Net, Wires, Wires]) -> None:
    net, one, _ = wired
    port = bound(net)
    fip = net.make("floatingip", "demo", floating_network_id=net.public, port_id=port["id"])
    (floating,) = one.now.routers[0].floating
    assert (floating.address, floating.fixed) == (fip["floating_ip_address"], port["fixed_ips"][0]["ip_address"])
    net.change("floatingip", fip["id"], "demo", port_id=None)
    assert one.now.routers[0].floating == []


def test_a_host_without_wires_of_ours_cannot_be_bound(wired: tuple[Net, Wires, Wires]) -> None:
    net, _, _ = wired
    port = net.make("port", network_id=net.private, binding__host_id="elsewhere")
    assert (port["binding:vif_type"], port["status"], port["binding:vif_details"]) == ("binding_failed", "DOWN", {})


def test_a_host_that_makes_no_networks_leaves_it_to_qemu(tmp_path: Path) -> None:
    net = Net(tmp_path, {}, apart=frozenset({"laptop"}))
    port = bound(net, "laptop")
    assert (port["binding:vif_type"], port["status"]) == ("user", "ACTIVE")
    assert port["binding:vif_details"] == {"port_filter": False, "connectivity": "l3"}
    assert bound(net, "elsewhere")["binding:vif_type"] == "binding_failed"
    wish = {"floating_network_id": net.public, "port_id": port["id"]}
    said = refused(400, "BadRequest", lambda: net.ask("POST", "/floatingips", {"floatingip": wish}, "demo"))
    assert "QEMU" in said
    assert net.get("/floatingips")["floatingips"] == []
    net.db.close()


def test_without_a_way_out_there_is_no_public_network(tmp_path: Path) -> None:
    net = Net(tmp_path, {}, apart=frozenset({"laptop"}), way_out=False)
    assert [n["name"] for n in net.get("/networks")["networks"]] == ["private"]
    assert net.get("/routers")["routers"] == []
    net.db.close()


def test_wires_that_are_broken_fail_the_binding_and_are_mended_later(wired: tuple[Net, Wires, Wires]) -> None:
    net, one, _ = wired
    good = bound(net)
    one.broken = True
    bad = bound(net)
    assert (bad["binding:vif_type"], bad["status"]) == ("binding_failed", "DOWN")
    net.ask("DELETE", f"/ports/{good['id']}")  # the owner's wish counts; the wires learn of it later
    with pytest.raises(Unavailable):
        rewire(net.world)
    one.broken = False
    assert net.change("port", bad["id"], binding__host_id="host-1")["binding:vif_type"] == "bridge"
    assert [p.id for p in one.now.ports] == [bad["id"]]


def test_a_crash_between_binding_and_wires_is_mended(wired: tuple[Net, Wires, Wires]) -> None:
    net, _, _ = wired
    port = bound(net)
    with net.db.tx() as tx:
        tx.exec_driver_sql("UPDATE ports SET status = 'DOWN' WHERE id = ?", (port["id"],))
    assert rewire(net.world) == [f"port {port['id']} is on the wires of host-1 now"]
    assert net.get(f"/ports/{port['id']}")["port"]["status"] == "ACTIVE" and rewire(net.world) == []


def test_a_port_moves_with_its_guest(wired: tuple[Net, Wires, Wires]) -> None:
    net, one, two = wired
    port = bound(net)
    path = f"/ports/{port['id']}/bindings"
    made = net.ask("POST", path, {"binding": {"host": "host-2"}}, "service")["binding"]
    assert (made["status"], made["vif_type"]) == ("INACTIVE", "bridge") and [p.id for p in two.now.ports] == [
        port["id"]
    ]
    refused(409, "PortBindingAlreadyExists", lambda: net.ask("POST", path, {"binding": {"host": "host-2"}}))
    refused(409, "PortBindingError", lambda: net.ask("POST", path, {"binding": {"host": "host-3"}}))
    refused(403, "PolicyNotAuthorized", lambda: net.ask("POST", path, {"binding": {"host": "host-3"}}, "demo"))
    active = net.ask("PUT", f"{path}/host-2/activate", token="service")["binding"]
    assert active["status"] == "ACTIVE"
    assert {b["host"]: b["status"] for b in net.get(path)["bindings"]} == {"host-2": "ACTIVE", "host-1": "INACTIVE"}
    net.ask("DELETE", f"{path}/host-1", token="service")
    assert one.now.ports == [] and net.get(f"/ports/{port['id']}")["port"]["status"] == "ACTIVE"
    refused(404, "PortBindingNotFound", lambda: net.get(f"{path}/host-1"))


def test_agents_are_the_hosts_whose_wires_we_hold(wired: tuple[Net, Wires, Wires]) -> None:
    net, _, _ = wired
    assert [(a["host"], a["alive"]) for a in net.get("/agents")["agents"]] == [("host-1", True), ("host-2", True)]
    assert net.get("/agents?host=host-2")["agents"][0]["host"] == "host-2"
    refused(403, "PolicyNotAuthorized", lambda: net.get("/agents", "demo"))


def test_many_who_ask_at_once_are_told_together() -> None:
    """Whoever comes while the wires are busy waits for one more round, and that round is for all of them."""
    going, free, applied = threading.Event(), threading.Event(), []

    def apply(wiring: Wiring) -> None:
        applied.append(wiring)
        going.set()
        assert free.wait(10)

    loom = Loom(apply)
    threads = [threading.Thread(target=loom.weave, args=[Wiring]) for _ in range(9)]
    threads[0].start()
    assert going.wait(10)
    for t in threads[1:]:
        t.start()
    while loom.asked < 9:
        time.sleep(0.001)
    free.set()
    for t in threads:
        t.join(10)
    assert len(applied) == 2


# ---- junk

IPS = [
    "10.9.0.1",
    "10.9.0.5",
    "10.9.0.77",
    "10.9.0.255",
    "10.0.0.9",
    "172.24.4.50",
    "fd00::1",
    "fe80::1%eth0",
    "0.0.0.0",
]
CIDRS = [
    "10.9.0.0/24",
    "10.9.0.128/25",
    "10.77.0.0/30",
    "10.78.0.1/16",
    "fd00::/64",
    "fd00::/80",
    "224.0.0.0/8",
    "::/0",
]
# fmt: off
SAID: dict[str, list[Any]] = {
    **dict.fromkeys(("ip_address", "gateway_ip", "start", "end", "nexthop", "fixed_ip_address"), IPS),
    "floating_ip_address": IPS,
    **{name: [*CIDRS, *IPS] for name in ("cidr", "destination", "remote_ip_prefix")},
    "mac_address": ["fa:16:3e:00:00:01", "FA-16-3E-00-00-02", "00:00:00:00:00:00", "01:00:00:00:00:00"],
    "device_owner": ["compute:nova", "network:dhcp", "network:router_interface", ""],
    "protocol": ["tcp", "udp", "icmp", "icmpv6", "any", "0", "6", "255", "gre", "x"],
    "ethertype": ["IPv4", "IPv6", "ipv4"],
    "binding:host_id": ["host-1", ""], "host": ["host-1", "host-2"],
    "dns_name": ["web", "web.example.org.", ""],
}
# fmt: on
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["\x00", "x" * 300, "\ud7ff", "%s", "'; --"]),
    st.just([]),
    st.just({}),
    st.recursive(st.none(), lambda inner: st.lists(inner, min_size=1, max_size=1), max_leaves=3),
)


class Quarry:
    """A network with one of everything, and the ids of it by the words that name them.

    Its wires make nothing, but say what they could not make: whatever the API takes, a host must be able to have.
    """

    def __init__(self, directory: Path) -> None:
        self.impossible: list[str] = []
        self.net = net = Net(directory, {"host-1": self.look, "host-2": self.look})
        n, s = net.network("demo")
        port = net.make("port", network_id=n, project_id="demos", binding__host_id="host-1")["id"]
        router = net.make("router", "demo", external_gateway_info={"network_id": net.public})["id"]
        net.ask("PUT", f"/routers/{router}/add_router_interface", {"subnet_id": s}, "demo")
        group = net.make("security_group", "demo", name="g")
        rule = net.make("security_group_rule", "demo", security_group_id=group["id"], direction="ingress")["id"]
        fip = net.make("floatingip", "demo", floating_network_id=net.public)["id"]
        net.ask("POST", f"/ports/{port}/bindings", {"binding": {"host": "host-2"}})
        stranger = str(uuid.UUID(int=7))
        self.ids = {
            "network": [n, n, net.private, net.public, stranger],
            "subnet": [s, s, net.inner, stranger],
            "port": [port, port, stranger],
            "router": [router, stranger],
            "group": [group["id"], stranger],
            "security_group": [group["id"], stranger],
            "security_group_rule": [rule, stranger],
            "floatingip": [fip, stranger],
        }

    def look(self, wiring: Wiring) -> None:
        try:
            checked(wiring)
        except RefusedByHost as e:
            self.impossible.append(e.said)

    def named(self, name: str) -> list[str]:
        """Ids that fit a field or a collection of this name."""
        word = name.replace("-", "_").removesuffix("s").removesuffix("_id")
        return next((v for k, v in self.ids.items() if word.endswith(k)), ["demos", "null", "router", "host-2", "red"])

    def fitting(self, kind: Any, name: str = "") -> st.SearchStrategy[Any]:
        """Something of this type that the service might well take."""
        if hasattr(kind, "__metadata__"):
            return self.fitting(kind.__origin__, name)
        origin, args = get_origin(kind), get_args(kind)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self.struct(kind)
        if origin is list:
            return st.lists(self.fitting(args[0], name), max_size=2)
        if origin is Literal:
            return st.sampled_from(list(args))
        if args and origin is not dict:
            several = [a for a in args if a not in (msgspec.UnsetType, type(None))]
            return st.one_of([self.fitting(a, name) for a in several] + [st.none()] * (type(None) in args))
        if kind is str:
            ids = name.endswith("_id") and name not in ("project_id", "tenant_id", "device_id")
            if ids or name == "security_groups":
                return st.sampled_from(self.named(name))
            return st.sampled_from(SAID.get(name, ["demos", "a", "", "7"]))
        return {bool: st.booleans(), int: st.sampled_from([0, 1, 22, 255, 1400, 65535])}.get(kind, st.just({}))

    def struct(self, kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
        fields = {f.encode_name: f for f in msgspec.structs.fields(kind)}
        if kind.__name__.endswith("Body"):
            return st.sampled_from(sorted(fields)).flatmap(
                lambda n: st.fixed_dictionaries({n: self.fitting(fields[n].type, n)})
            )
        fit = {n: self.fitting(f.type, n) for n, f in fields.items()}
        needed = {n: fit[n] for n, f in fields.items() if f.required or n == "cidr"}
        some = st.lists(
            st.sampled_from(sorted(fit.keys() - needed.keys() - {"project_id", "tenant_id"}) or sorted(fit)),
            max_size=3,
            unique=True,
        )
        return some.flatmap(lambda names: st.fixed_dictionaries(needed | {n: fit[n] for n in names}))

    def body(self, route: Route) -> st.SearchStrategy[Any]:
        if not route.body:
            return st.none() | JUNK
        good = self.struct(route.body)
        return st.one_of(good, good, good, st.tuples(good, st.integers(0, 30), JUNK).map(_spoiled), JUNK)


def _spoiled(parts: tuple[Any, int, Any]) -> Any:
    """One place of a good body holds junk, or has it beside it."""
    body, at, junk = parts
    places: list[tuple[Any, Any]] = []

    def walk(x: Any) -> None:
        for k, v in list(x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else []):
            places.append((x, k))
            walk(v)

    walk(body)
    if places:
        container, key = places[at % len(places)]
        container[key] = junk
    return body


@pytest.fixture
def quarry(tmp_path: Path) -> Iterator[Quarry]:
    quarry = Quarry(tmp_path)
    yield quarry
    quarry.net.db.close()


QUERY = ["id", "name", "limit", "marker", "sort_key", "sort_dir", "fields", "tags", "not-tags-any", "mtu", "shared",
         "fixed_ips", "page_reverse", "created_at", "changed_since", "revision_number", "device_id", "binding:host_id", "x"]  # fmt: skip
ASKED = [
    "1",
    "-1",
    "true",
    "name",
    "id",
    "asc",
    "",
    "9" * 25,
    "9" * 400,
    "%00",
    "%ff",
    "ip_address%3D1",
    "demos",
    "2026-01-01",
]


@pytest.mark.parametrize("route", list(R), ids=lambda r: f"{r.method} {r.path}")
def test_junk_is_the_callers_fault(quarry: Quarry, route: Route) -> None:
    collection = route.path.split("/")[2] if route.path.count("/") > 2 else ""
    names = st.sampled_from(quarry.named(collection)) | st.text(min_size=1, max_size=12)
    parts = st.sampled_from(["demos", "null", "red", "router", "host-2"]) | st.text(min_size=1, max_size=12)
    query = st.dictionaries(st.sampled_from(QUERY), st.sampled_from(ASKED), max_size=3)

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(names, parts, query, quarry.body(route), st.sampled_from(["admin", "demo", "demo", "service"]))
    def throw(id: str, part: str, query: dict[str, str], body: Any, token: str) -> None:
        where = route.path.replace("{id}", urllib.parse.quote(id, safe=""))
        for name in ("{tag}", "{host}", "{alias}", "{project}"):
            where = where.replace(name, urllib.parse.quote(part, safe=""))
        asked = "&".join(f"{k}={v}" for k, v in query.items())
        status, answer = quarry.net.raw(route.method, f"{where}?{asked}" if asked else where, body, token)
        assert status < 500, (status, answer)
        if status >= 400:
            assert answer["NeutronError"]["message"] and answer["NeutronError"]["type"]

    throw()
    rewire(quarry.net.world)
    assert not quarry.impossible


# ---- a real client


@pytest.mark.filterwarnings("ignore")  # of what the client itself will change
def test_openstacksdk_walks_through_it(net: Net) -> None:
    """openstacksdk over HTTP, unmodified."""
    openstack = pytest.importorskip("openstack")
    listener = listen("127.0.0.1", 0)
    server = Server(net.service, listener)
    server.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        cloud = openstack.connect(
            load_yaml_config=False, load_envvars=False, auth_type="admin_token", auth=dict(endpoint=url, token="admin")
        )
        n = cloud.network.create_network(name="sdk", mtu=1400)
        s = cloud.network.create_subnet(network_id=n.id, ip_version=4, cidr="10.5.0.0/24", name="sdk")
        cloud.network.set_tags(n, ["a", "b"])
        assert cloud.network.find_network("sdk").tags == ["a", "b"] and cloud.network.get_network(n).mtu == 1400
        router = cloud.network.create_router(name="sdk", external_gateway_info={"network_id": net.public})
        cloud.network.add_interface_to_router(router, subnet=s.id)
        port = cloud.network.create_port(network_id=n.id, fixed_ips=[{"subnet_id": s.id}], device_id="x")
        assert [p.id for p in cloud.network.ports(device_id="x")] == [port.id]
        fip = cloud.network.create_ip(floating_network_id=net.public, port_id=port.id)
        assert fip.status == "ACTIVE" and fip.fixed_ip_address == port.fixed_ips[0]["ip_address"]
        group = cloud.network.create_security_group(name="sdk")
        cloud.network.create_security_group_rule(
            security_group_id=group.id, direction="ingress", protocol="tcp", port_range_min=80, port_range_max=80
        )
        assert len(list(cloud.network.security_group_rules(security_group_id=group.id))) == 3
        assert len(list(cloud.network.ports(limit=2))) == len(list(cloud.network.ports()))
        cloud.network.update_port(port, name="named", security_groups=[group.id])
        assert cloud.network.find_port("named").security_group_ids == [group.id]
        assert cloud.network.find_extension("router") and cloud.network.find_extension("nothing") is None
        with pytest.raises(openstack.exceptions.ConflictException, match="still in use"):
            cloud.network.delete_network(n)
        cloud.network.delete_ip(fip)
        cloud.network.delete_port(port)
        cloud.network.remove_interface_from_router(router, subnet=s.id)
        cloud.network.delete_router(router)
        cloud.network.delete_security_group(group)
        cloud.network.delete_network(n)
        with pytest.raises(openstack.exceptions.NotFoundException):
            cloud.network.get_network(n.id)
    finally:
        server.stop(3)
