"""What the data plane decides before it touches the machine, and the metadata proxy on loopback."""

import contextlib
import hashlib
import hmac
import http.client
import ipaddress
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilonova.companions.wires import dhcp, filters, guestfwd, links, routers, rules
from kilonova.companions.wires.ground import Ground
from kilonova.companions.wires.links import Link, Seen, Sight, Space
from kilonova.companions.wires.metadata_proxy import Asker, Limits, MetadataProxy, forward_to
from kilonova.companions.wires.rules import Table
from kilonova.kit.errors import Refused, Unsupported
from kilonova.model.wiring import FloatingWire, NetworkWire, PortWire, RouterWire, Rule, SubnetWire, Wiring

A, B = "10.0.0.5", "10.0.0.6"


def a_port(**more: Any) -> PortWire:
    given = {"id": "p-1", "network_id": "n-1", "mac": "fa:16:3e:00:00:05", "device": "tap1", "addresses": [("s-1", A)]}
    return PortWire(**(given | more))


def lines_of(*wanted: Rule) -> list[str]:
    return list(filters.guarded(a_port(rules=list(wanted)), filters.Groups()).gets)[:-1]


# ---- transactions


class Kernel:
    """A table as nf_tables keeps it, with its laws: nothing is referred to that is not there, nothing in use goes."""

    def __init__(self) -> None:
        self.sets: dict[str, set[str]] = {}
        self.maps: dict[str, dict[str, str]] = {}
        self.chains: dict[str, list[str]] = {}

    def take(self, script: str) -> "Kernel":
        for line in script.splitlines():
            verb, what, _, _, *rest = line.split(" ")
            name, text = (rest[0] if rest else ""), " ".join(rest[1:])
            inner = [e for e in re.sub(r"^\{ (.*) \}$", r"\1", text).split(", ") if e]
            match (verb, what):
                case ("add", "table"):
                    pass
                case ("delete", "table"):
                    self.__init__()  # type: ignore[misc]
                case ("add", "set"):
                    self.sets.setdefault(name, set())
                case ("add", "map"):
                    self.maps.setdefault(name, {})
                case ("add", "chain"):
                    self.chains.setdefault(name, [text.removeprefix("{ ").removesuffix(" }")] if text else [])
                case ("flush", "chain"):
                    self.chains[name] = []
                case ("add", "rule"):
                    assert self.known(text), text
                    self.chains[name].append(text)
                case ("delete", "chain"):
                    assert not self.used(f"jump {name}"), name
                    assert not self.chains.pop(name)
                case ("delete", "set"):
                    assert not self.used(f"@{name}"), name
                    del self.sets[name]
                case ("delete", "map"):
                    assert not self.used(f"@{name}"), name
                    del self.maps[name]
                case ("add", "element") if name in self.sets:
                    assert not self.sets[name] & set(inner)
                    self.sets[name] |= set(inner)
                case ("delete", "element") if name in self.sets:
                    assert self.sets[name] >= set(inner)
                    self.sets[name] -= set(inner)
                case ("add", "element"):
                    for key, _, value in (e.partition(" : ") for e in inner):
                        assert key not in self.maps[name] and self.known(value)
                        self.maps[name][key] = value
                case ("delete", "element"):
                    for key in inner:
                        del self.maps[name][key]
                case _:
                    raise AssertionError(line)
        return self

    def known(self, text: str) -> bool:
        named = {n.removeprefix("@") for n in re.findall(r"@\w+", text)}
        return (
            named <= self.sets.keys() | self.maps.keys() and set(re.findall(r"jump (\w+)", text)) <= self.chains.keys()
        )

    def used(self, words: str) -> bool:
        texts = [r for rs in self.chains.values() for r in rs] + [v for m in self.maps.values() for v in m.values()]
        return any(re.search(rf"{words}\b", text) for text in texts)

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Kernel)
        same = self.sets == other.sets and self.maps == other.maps
        return same and {n: [r for r in rs if r] for n, rs in self.chains.items()} == other.chains


@st.composite
def table(draw: st.DrawFn) -> Table:
    sets = {
        n: ("type ipv4_addr", frozenset(draw(st.sets(st.sampled_from("abcd")))))
        for n in draw(st.sets(st.sampled_from(["s1", "s2"])))
    }
    names = sorted(draw(st.sets(st.sampled_from(["c1", "c2", "c3"]))))
    rule = st.sampled_from([f"ip saddr @{s} return" for s in sets] + ["accept", "drop"])
    chains = {n: tuple(draw(st.lists(rule, max_size=3))) for n in names}
    keys = draw(st.sets(st.sampled_from(["0x1", "0x2", "0x3"])))
    verdicts = {k: draw(st.sampled_from([f"jump {n}" for n in names] + ["drop"])) for k in keys}
    base = ("type filter hook forward priority 0;", "meta mark vmap @m1")
    return Table("inet", "t", sets, {"m1": ("type mark : verdict", verdicts)}, {**chains, "base": base})


@given(table(), table())
def test_a_difference_makes_of_one_table_the_next(old: Table, new: Table) -> None:
    stepwise = Kernel().take(rules.whole(old)).take(rules.delta(old, new))
    at_once = Kernel().take(rules.whole(new))
    hooks = "type filter hook forward priority 0;"
    for one in (stepwise, at_once):
        one.chains = {n: [r for r in rs if r != hooks] for n, rs in one.chains.items()}
    assert stepwise == at_once
    assert rules.delta(new, new) == ""


def test_another_hook_makes_the_table_anew() -> None:
    one = Table("ip", "t", chains={"c": ("type filter hook input priority 0;", "drop")})
    two = Table("ip", "t", chains={"c": ("type filter hook input priority 5;", "drop")})
    assert rules.delta(one, two) == rules.whole(two)


# ---- security groups

# fmt: off
LINES = [
    (Rule("ingress"),                                                          "meta nfproto ipv4 return"),
    (Rule("ingress", protocol="tcp", port_min=22, port_max=22),                "meta nfproto ipv4 meta l4proto 6 th dport 22 return"),
    (Rule("ingress", protocol="TCP", port_min=1, port_max=65535),              "meta nfproto ipv4 meta l4proto 6 return"),
    (Rule("ingress", protocol="udp", port_min=5, port_max=9, remotes=["10.1.0.0/16"]),
                                                                               "ip saddr 10.1.0.0/16 meta l4proto 17 th dport 5-9 return"),
    (Rule("ingress", protocol="icmp"),                                         "meta nfproto ipv4 meta l4proto 1 return"),
    (Rule("ingress", protocol="icmp", port_min=8, port_max=0),                 "meta nfproto ipv4 meta l4proto 1 icmp type 8 icmp code 0 return"),
    (Rule("ingress", protocol="icmp", port_min=0),                             "meta nfproto ipv4 meta l4proto 1 icmp type 0 return"),
    (Rule("ingress", 6, "icmp"),                                               "meta nfproto ipv6 meta l4proto 58 return"),
    (Rule("ingress", 6, "ipv6-icmp", 128, remotes=["2001:db8::/32"]),          "ip6 saddr 2001:db8::/32 meta l4proto 58 icmpv6 type 128 return"),
    (Rule("ingress", protocol="50"),                                           "meta nfproto ipv4 meta l4proto 50 return"),
    (Rule("ingress", protocol="vrrp", remotes=[A, f"{A}/32", "10.0.0.4/31"]),  "ip saddr 10.0.0.4/31 meta l4proto 112 return"),
    (Rule("ingress", remotes=[A, "10.9.0.0/16"]),                              "ip saddr { 10.0.0.5, 10.9.0.0/16 } return"),
]
# fmt: on


@pytest.mark.parametrize(("rule", "line"), LINES)
def test_a_rule_is_one_line(rule: Rule, line: str) -> None:
    assert lines_of(rule) == [line]


def test_rules_that_match_nobody_and_rules_said_twice_are_left_out() -> None:
    nobody = [Rule("ingress", remotes=[]), Rule("ingress", remotes=["2001:db8::1"]), Rule("egress")]
    assert lines_of(*nobody) == []
    assert lines_of(Rule("ingress"), Rule("ingress", remotes=["0.0.0.0/0"])) == ["meta nfproto ipv4 return"]


@pytest.mark.parametrize("protocol", ["256", "-1", "tcp; drop", "banana"])
def test_a_protocol_that_is_none_is_refused(protocol: str) -> None:
    with pytest.raises(Refused, match="no protocol"):
        lines_of(Rule("ingress", protocol=protocol))


def test_rules_of_one_group_share_a_set_and_overlaps_are_folded() -> None:
    groups = filters.Groups()
    rule = Rule("ingress", remotes=[A, "10.0.0.0/24", B], remote_group="g-1")
    other = Rule("ingress", remotes=[A], remote_group="g-1")  # what should not be: the group has other members here
    made = filters.guarded(a_port(rules=[rule, other]), groups)
    assert made.gets == ("ip saddr @g4_g-1 return", "ip saddr 10.0.0.5 return", "goto refused")
    assert groups.sets == {"g4_g-1": ("type ipv4_addr; flags interval", frozenset({"10.0.0.0/24"}))}


def test_a_guest_speaks_under_its_own_addresses() -> None:
    pairs = [("00:00:5e:00:01:01", "10.0.0.200"), ("fa:16:3e:00:00:05", "0.0.0.0/0")]
    alone = filters.guarded(a_port(), filters.Groups()).forged
    wide = filters.guarded(a_port(allowed_pairs=pairs), filters.Groups()).forged
    assert alone[0] == "ether type != { ip, arp, ip6 } drop" and alone[-1] == "drop"
    assert "arp saddr ip { 0.0.0.0, 10.0.0.5 } accept" in alone and "ip saddr 10.0.0.5 accept" in alone
    assert "ip6 saddr fe80::f816:3eff:fe00:5 accept" in alone
    assert (
        "ether saddr != { 00:00:5e:00:01:01, fa:16:3e:00:00:05 } drop" in wide and "ip saddr 0.0.0.0/0 accept" in wide
    )


@given(st.sets(st.text("abcdef0123456789-", min_size=1, max_size=11), max_size=60))
def test_every_bridge_has_its_own_zone(names: set[str]) -> None:
    zones = filters.zones({f"kn{n}" for n in names})
    assert len(set(zones.values())) == len(names) and all(1 <= z <= 65535 for z in zones.values())


FOUL = 'x"; drop'
BAD = [
    Wiring([NetworkWire("n-1", FOUL)]),
    Wiring([NetworkWire("n-1", "a-name-that-is-too-long")]),
    Wiring([NetworkWire("n-1", "kn1", subnets=[SubnetWire("s", FOUL)])]),
    Wiring([NetworkWire("n-1", "kn1", subnets=[SubnetWire("s", "10.0.0.0/24", routes=[("10.1.0.0/16", FOUL)])])]),
    Wiring([NetworkWire("n-1", "kn1", subnets=[SubnetWire("s", "10.0.0.0/24", dns=["8.8.8.8\nuser=root"])])]),
    Wiring([], [a_port(device=FOUL)]),
    Wiring([], [a_port(mac=FOUL)]),
    Wiring([], [a_port(addresses=[("s-1", FOUL)])]),
    Wiring([], [a_port(allowed_pairs=[(FOUL, A)])]),
    Wiring([], [a_port(allowed_pairs=[("fa:16:3e:00:00:05", FOUL)])]),
    Wiring([], [a_port(rules=[Rule("ingress", remotes=[FOUL])])]),
    Wiring([NetworkWire("n-1", "kn1")], [], [RouterWire("r", [("n-1", FOUL, "fa:16:3e:00:00:05")])]),
    Wiring([NetworkWire("n-1", "kn1")], [], [RouterWire("r", [("n-1", "10.0.0.1/24", FOUL)])]),
    Wiring([NetworkWire("n-1", "kn1")], [], [RouterWire("r", floating=[FloatingWire(FOUL, A)])]),
]


@pytest.mark.parametrize("wiring", BAD)
def test_words_that_are_none_of_a_network_s_reach_no_command(wiring: Wiring) -> None:
    with pytest.raises(Refused):
        filters.checked(wiring)
        for port in wiring.ports:
            filters.guarded(port, filters.Groups())


# ---- links


def applied(lines: list[str], sight: Sight) -> Sight:
    """What `ip -batch` would make of it, as far as `mend` uses it."""
    there = dict(sight.links)
    hops = set(sight.routes)
    for line in lines:
        match line.split():
            case ["link", "delete", "dev", name]:
                del there[name]
            case ["link", "add", "name", name, "mtu", mtu, "type", kind, *_]:
                assert name not in there
                there[name] = Seen(kind, int(mtu), "", "02:00:00:00:00:01", False, "", frozenset())
            case ["link", "set", "dev", name, *words]:
                old = there[name]
                told = dict(zip(words[::2], words[1::2], strict=False))
                up = old.up or words[-1] == "up"
                there[name] = Seen(
                    old.kind,
                    int(told.get("mtu", old.mtu)),
                    told.get("master", old.master),
                    told.get("address", old.mac),
                    up,
                    told.get("alias", old.alias),
                    old.addresses,
                )
            case ["address", verb, cidr, "dev", name, *_]:
                old = there[name]
                kept = old.addresses | {cidr} if verb == "add" else old.addresses - {cidr}
                there[name] = Seen(old.kind, old.mtu, old.master, old.mac, old.up, old.alias, frozenset(kept))
            case ["route", "delete", to, "via", hop, *_]:
                hops.remove((to, hop))
            case ["route", "replace", to, "via", hop, *_]:
                hops = {h for h in hops if h[0] != to} | {(to, hop)}
            case _:
                raise AssertionError(line)
    return Sight(there, frozenset(hops))


@st.composite
def space(draw: st.DrawFn) -> Space:
    names = draw(st.sets(st.sampled_from(["b1", "b2", "b3"])))
    made = [Link(n, "bridge", draw(st.sampled_from([1400, 1500]))) for n in sorted(names)]
    for name in sorted(draw(st.sets(st.sampled_from(["v1", "v2", "v3"])))):
        master = draw(st.sampled_from(["", *sorted(names)]))
        mac = draw(st.sampled_from(["", "02:00:00:00:00:09"]))
        made.append(Link(name, "veth", 1500, master, mac, ("there", "far")))
    addresses = [
        (one.name, cidr)
        for one in made
        if one.kind == "veth"
        for cidr in draw(st.sets(st.sampled_from([f"{A}/24", f"{B}/32"])))
    ]
    hops = draw(
        st.dictionaries(st.sampled_from(["0.0.0.0/0", "10.9.0.0/16"]), st.sampled_from(["10.0.0.1", "10.0.0.2"]))
    )
    return Space(made, addresses, sorted(hops.items()), routed=True)


@given(space(), space())
def test_mending_arrives_and_then_does_nothing(before: Space, after: Space) -> None:
    sight = Sight(
        {
            "lo": Seen("loopback", 65536, "", "", True, "", frozenset()),
            "eth0": Seen("", 1500, "", "", True, "", frozenset()),
        }
    )
    for must in (before, after):
        sight = applied(links.mend(must, sight, "ours"), sight)
        assert links.mend(must, sight, "ours") == []
        assert sight.links.keys() == {"lo", "eth0"} | {one.name for one in must.links}


def test_a_pair_whose_far_end_is_lost_is_made_anew() -> None:
    must = Space([Link("v1", "veth", 1500, "", "", ("there", "far"))])
    sight = applied(links.mend(must, Sight({}), "ours"), Sight({}))
    assert links.mend(must, sight, "ours", ["v1"])[:2] == [
        "link delete dev v1",
        "link add name v1 mtu 1500 type veth peer name far mtu 1500 netns there",
    ]


def test_names_of_devices_fit_and_differ() -> None:
    router = RouterWire(
        "11111111-1111-4111-8111-111111111111",
        [(f"{n:08x}-1111-4111-8111-111111111111", "10.0.0.1/24", "fa:16:3e:00:00:01") for n in range(50)],
        ("00000000-1111-4111-8111-111111111111", "172.24.4.9/24", "fa:16:3e:00:00:02"),
    )
    legs = routers.legs(router)
    near = [leg.near for leg in legs] + [dhcp.near(leg.network_id) for leg in legs[1:]]
    assert len(set(near)) == 101 and len({leg.far for leg in legs}) == 51
    assert max(map(len, near + [leg.far for leg in legs])) <= 15
    assert legs[0].far == routers.OUT


def test_two_subnets_of_a_network_share_a_leg() -> None:
    mac = "FA:16:3E:00:00:01"
    (leg,) = routers.legs(RouterWire("r", [("n", "10.0.0.1/24", mac), ("n", "10.0.1.1/24", "fa:16:3e:00:00:02")]))
    assert leg.cidrs == ["10.0.0.1/24", "10.0.1.1/24"] and leg.mac == mac.lower()


# ---- DHCP


def told(network: NetworkWire, *ports: PortWire, tmp: Path = Path("/x")) -> dhcp.Files:
    service = dhcp.Service("k", "space", dhcp.DEVICE, network, network.subnets, False)
    return dhcp.files(service, list(ports), tmp, "novalocal", 600, True, "nobody")


def a_network(**more: Any) -> NetworkWire:
    given = {"gateway": "10.0.0.1", "dhcp_address": "10.0.0.2"}
    return NetworkWire("n-1", "kn1", 1450, subnets=[SubnetWire("s-1", "10.0.0.0/24", **(given | more))])


def test_what_dhcp_is_told() -> None:
    files = told(a_network(routes=[("10.9.0.0/16", "10.0.0.9")]), a_port(hostname="Web_1.example.org"))
    assert "dhcp-range=set:s0,10.0.0.0,static,255.255.255.0,600s\n" in files.conf and "no-ping\n" in files.conf
    assert files.hosts == "fa:16:3e:00:00:05,web-1,10.0.0.5\n"
    assert files.names == "10.0.0.5 web-1.novalocal web-1\n"
    assert (
        "tag:s0,option:classless-static-route,10.9.0.0/16,10.0.0.9,169.254.169.254/32,10.0.0.2,0.0.0.0/0,10.0.0.1\n"
        in files.options
    )
    assert "option:mtu,1450\n" in files.options
    assert "tag:s0,option:router\n" in told(a_network(gateway=None)).options  # and not dnsmasq itself


@given(st.text(max_size=80))
def test_a_host_name_is_always_a_label(said: str) -> None:
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", dhcp.hostname(said, A))


def test_leases_of_ports_that_are_gone_are_forgotten() -> None:
    lines = [
        "9 fa:16:3e:00:00:05 10.0.0.5 a *",
        "9 fa:16:3e:00:00:06 10.0.0.6 b *",
        "duid 00:01",
        "9 77 2001:db8::5 c 00",
    ]
    kept = dhcp._kept(lines, frozenset({("fa:16:3e:00:00:05", "10.0.0.5")}))
    assert kept.splitlines() == [lines[0], *lines[2:]]


def test_router_advertisements_come_from_the_router(tmp_path: Path) -> None:
    six = SubnetWire(
        "s-6", "2001:db8::/64", 6, "2001:db8::1", dhcp_address="2001:db8::2", ra_mode="slaac", address_mode="slaac"
    )
    four = a_network().subnets[0]
    network = NetworkWire("n-1", "kn1", subnets=[four, six])
    router = RouterWire(
        "r-1", [("n-1", "10.0.0.1/24", "fa:16:3e:00:00:01"), ("n-1", "2001:db8::1/64", "fa:16:3e:00:00:01")]
    )
    ground = Ground("none", tmp_path)
    with_router = dhcp.services(Wiring([network], [], [router]), ground)
    assert [(s.space.split("-")[2], [x.id for x in s.subnets], s.routes) for s in with_router] == [
        ("dhcp", ["s-1"], False),
        ("router", ["s-6"], True),
    ]
    (alone,) = dhcp.services(Wiring([network]), ground)
    conf = dhcp.files(alone, [], tmp_path, "", 600, True, "").conf
    assert "dhcp-range=set:s1,2001:db8::,ra-only,64\n" in conf and "ra-param=dhcp0,mtu:1500,60,0\n" in conf
    ground.close()


def test_the_ground_says_why(tmp_path: Path) -> None:
    ground = Ground.choose(tmp_path, "slirp")
    assert ground.kind == "qemu" and not ground.wired and ground.netns_path is None and ground.why
    with pytest.raises(Unsupported):
        ground.run(["true"])
    with pytest.raises(Refused, match="no ground called"):
        Ground.choose(tmp_path, "moon")
    with pytest.raises(Refused, match="not in a user namespace"):
        Ground.choose(tmp_path, "user")
    ground.close()


# ---- metadata

WHO = Asker("server-1", "project-1")


def echo(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    told = {
        k: v
        for k, v in environ.items()
        if k.startswith("HTTP_X") or k in ("PATH_INFO", "REQUEST_METHOD", "QUERY_STRING", "REMOTE_ADDR")
    }
    body = json.dumps(told | {"body": environ["wsgi.input"].read().decode()}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


@pytest.fixture
def proxy() -> Iterator[MetadataProxy]:
    one = MetadataProxy(echo, "secret", Limits(per_guest=2, deadline_s=1, idle_s=0.5, body_bytes=100))
    one.serve("net", socket.create_server(("127.0.0.1", 0)))
    one.know({("net", "127.0.0.1"): WHO})
    yield one
    one.close()


def asked(
    proxy: MetadataProxy, method: str = "GET", path: str = "/a", body: str | None = None, **headers: str
) -> tuple[int, Any]:
    wire = http.client.HTTPConnection(*proxy.listeners["net"].getsockname(), timeout=5)
    wire.request(method, path, body, headers)
    answer = wire.getresponse()
    content = answer.read()
    wire.close()
    return answer.status, json.loads(content) if answer.status == 200 else content


def test_a_guest_is_known_by_where_it_asks_from(proxy: MetadataProxy) -> None:
    lies = {"X-Instance-ID": "other", "X_Instance_ID": "other", "X-Tenant-Id": "other", "X-Forwarded-For": "1.1.1.1"}
    status, said = asked(
        proxy,
        path="/openstack/latest/meta_data.json?a=b",
        **lies,
        **{"X-Instance-ID-Signature": "0", "X-Metadata-Token": "t"},
    )
    assert status == 200 and said["PATH_INFO"] == "/openstack/latest/meta_data.json" and said["QUERY_STRING"] == "a=b"
    assert {k: v for k, v in said.items() if k.startswith("HTTP_X")} == {
        "HTTP_X_INSTANCE_ID": "server-1",
        "HTTP_X_TENANT_ID": "project-1",
        "HTTP_X_FORWARDED_FOR": "127.0.0.1",
        "HTTP_X_INSTANCE_ID_SIGNATURE": hmac.new(b"secret", b"server-1", hashlib.sha256).hexdigest(),
        "HTTP_X_METADATA_TOKEN": "t",
    }
    assert asked(proxy, "POST", "/pw", "a password")[1]["body"] == "a password"


def test_strangers_and_questions_out_of_measure_are_turned_away(proxy: MetadataProxy) -> None:
    assert asked(proxy, "POST", "/a", "x" * 101)[0] == 413
    assert asked(proxy, path="/" + "a" * 9000)[0] == 414
    assert asked(proxy, "POST", "/a", **{"Transfer-Encoding": "chunked"})[0] == 501
    assert asked(proxy, "POST", "/a", **{"Content-Length": "-5"})[0] == 400
    proxy.know({})
    assert asked(proxy)[0] == 404


def test_a_guest_that_only_holds_on_is_let_go(proxy: MetadataProxy) -> None:
    where = proxy.listeners["net"].getsockname()
    idle = [socket.create_connection(where) for _ in range(5)]
    assert all(one.recv(10) == b"" for one in idle)  # two wait in vain, three are more than one guest may have
    slow = socket.create_connection(where)
    with pytest.raises(OSError):  # a byte now and then does not keep it open
        for _ in range(40):
            slow.send(b"G")
            slow.settimeout(0.1)
            try:
                if not slow.recv(1):
                    raise OSError("closed")
            except TimeoutError:
                pass
    for one in (*idle, slow):
        one.close()
    assert asked(proxy)[0] == 200


def test_a_service_that_fails_is_an_error_and_not_a_trace() -> None:
    def fails(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        raise RuntimeError("internal words")

    one = MetadataProxy(fails, "secret")
    one.serve("net", socket.create_server(("127.0.0.1", 0)))
    one.know({("net", "127.0.0.1"): WHO})
    status, said = asked(one)
    one.close()
    assert status == 500 and b"internal words" not in said


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_service_somewhere_else_is_asked_over_http() -> None:
    def drained(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        return echo(
            environ | {"wsgi.input": __import__("io").BytesIO(environ["wsgi.input"].read(length))}, start_response
        )

    there = make_server("127.0.0.1", 0, drained, handler_class=Quiet)
    thread = threading.Thread(target=there.serve_forever)
    thread.start()
    one = MetadataProxy(forward_to(f"http://127.0.0.1:{there.server_port}/base"), "secret")
    one.serve("net", socket.create_server(("127.0.0.1", 0)))
    one.know({("net", "127.0.0.1"): WHO})
    status, said = asked(one, "POST", "/a%20b?q=1", "hello")
    there.shutdown()
    thread.join()
    there.server_close()
    assert status == 200 and (said["PATH_INFO"], said["QUERY_STRING"], said["body"]) == ("/base/a b", "q=1", "hello")
    assert said["HTTP_X_INSTANCE_ID"] == "server-1"
    assert asked(one)[0] == 503  # it is gone now
    one.close()


def test_under_qemus_own_network_a_program_carries_the_question(proxy: MetadataProxy, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120) / "metadata.sock"  # no socket's name is so long
    path.parent.mkdir()
    proxy.serve_programs(path, lambda id: WHO if id == "server-1" else None)
    assert path.stat().st_mode & 0o777 == 0o600

    def carried(id: str) -> bytes:
        command = guestfwd.command(id, str(path))
        question = b"GET /a HTTP/1.1\r\nHost: x\r\nX-Instance-ID: other\r\n\r\n"
        return subprocess.run(command, shell=True, input=question, capture_output=True, check=True, timeout=20).stdout

    said = carried("server-1")
    assert said.startswith(b"HTTP/1.1 200 OK\r\n") and b'"HTTP_X_INSTANCE_ID": "server-1"' in said
    assert carried("server-2").startswith(b"HTTP/1.0 404")
    with socket.socket(socket.AF_UNIX) as liar:
        with guestfwd.near(str(path)) as name:
            liar.connect(name)
        liar.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert liar.recv(100) == b""


def test_the_program_starts_quickly_and_alone() -> None:
    """It runs once a connection: neither our package nor its dependencies may be loaded."""
    code = f"import sys, runpy; runpy.run_path({guestfwd.__file__!r}); print(any(m.startswith(('kilonova', 'msgspec')) for m in sys.modules))"
    assert subprocess.check_output([sys.executable, "-I", "-S", "-c", code], text=True) == "False\n"


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(8, 32)), max_size=20))
def test_folded_remotes_mean_the_same_and_do_not_overlap(nets: list[tuple[int, int]]) -> None:
    said = [str(ipaddress.ip_network((n, width), strict=False)) for n, width in nets]
    folded = [ipaddress.ip_network(x) for x in filters.collapsed(said, 4)]
    assert not [1 for a in folded for b in folded if a is not b and a.overlaps(b)]
    assert all(any(ipaddress.ip_network(x).subnet_of(f) for f in folded) for x in said)  # type: ignore[arg-type]
