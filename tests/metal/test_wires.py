"""The data plane, with real packets: guests are network namespaces on the ends of veth pairs, the machine is one, too.

Nothing touches the machine that runs the tests but names below /run/netns, and those are gone afterwards.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kilonova.companions.wires import Status, Wires, guestfwd
from kilonova.companions.wires.filters import link_local
from kilonova.companions.wires.forward import Forward
from kilonova.companions.wires.ground import CLOUD, MACHINE, NETNS, Ground
from kilonova.kit.clock import WallClock
from kilonova.kit.errors import Refused, Unsupported
from kilonova.model.wiring import FloatingWire, NetworkWire, PortWire, RouterWire, Rule, SubnetWire, Wiring

ABSENT = [p for p in ("ip", "nft", "dnsmasq") if not shutil.which(p, path=f"{os.environ.get('PATH')}:/usr/sbin:/sbin")]
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root"),
    pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}"),
]

SECRET = "a shared secret"
NO_S = 0.4  # how long silence must last to be believed
YES_S = 5.0  # how long an answer may take; a link that was just plugged passes nothing for up to a second

BLUE, RED, OUTSIDE = "b1ae0000-0000-4000", "4ed00000-0000-4000", "ec570000-0000-4000"
OPEN = [Rule("egress"), Rule("ingress", protocol="icmp"), Rule("ingress", protocol="tcp", port_min=22, port_max=22)]


# ---- the laboratory


class Guest:
    """A namespace with one network card, plugged under its port's device name."""

    def __init__(self, lab: "Lab", port: PortWire) -> None:
        self.lab, self.port, self.ground = lab, port, lab.ground
        self.space = f"{lab.name}-{port.device}"
        self.mac = bytes.fromhex(port.mac.replace(":", ""))
        lab.spaces.append(self.space)
        bridge = next((n.bridge for n in lab.wiring.networks if n.id == port.network_id), "")
        self.ground.make(self.space)
        self.ip(f"link add {port.device} type veth peer name eth0 address {port.mac} netns {self.space}", CLOUD)
        self.ip(f"link set {port.device} master {bridge} up", CLOUD)
        self.ip("link set eth0 up")
        self.address = port.addresses[0][1] if port.addresses else ""

    def ip(self, words: str, space: str | None = None) -> str:
        return self.ground.run(["ip", *words.split()], self.space if space is None else space)

    def still(self, address: str | None = None, gateway: str | None = "10.0.0.1") -> "Guest":
        """Configured by hand, with one address and a default route."""
        self.ip(f"address add {address or self.address}/24 dev eth0")
        if gateway:
            self.ip(f"route add default via {gateway}")
        return self

    def dhcp(self, timeout_s: float = YES_S) -> dict[int, bytes]:
        """Asks for an address and takes what it is told. Gives the options of the answer; none: {}."""
        offer, _ = self._bootp(b"\x35\x01\x01", timeout_s)
        if not offer:
            return {}
        address = offer[16:20]
        wanted = (
            b"\x35\x01\x03\x32\x04"
            + address
            + b"\x36\x04"
            + options_of(offer)[54]
            + b"\x37\x07\x01\x03\x06\x0c\x0f\x1a\x79"
        )
        ack, options = self._bootp(wanted, timeout_s)
        if not ack or options[53] != b"\x05":
            return {}
        self.address = socket.inet_ntoa(ack[16:20])
        prefix = bin(int.from_bytes(options[1], "big")).count("1")
        self.ip(f"address replace {self.address}/{prefix} dev eth0")
        for destination, hop in classless(options.get(121, b"")):
            self.ip(f"route replace {destination} via {hop}")
        return options

    def _bootp(self, options: bytes, timeout_s: float) -> tuple[bytes, dict[int, bytes]]:
        body = struct.pack("!BBBBIHH16x", 1, 1, 6, 0, 0x4B4E, 0, 0x8000) + self.mac + bytes(10 + 192)
        body += b"\x63\x82\x53\x63" + options + b"\xff"
        with self.ground.enter(self.space), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            wire.bind(("", 68))
            wire.settimeout(0.3)
            end = time.monotonic() + timeout_s
            while time.monotonic() < end:
                raw = ether(b"\xff" * 6, self.mac, 0x0800, udp("0.0.0.0", "255.255.255.255", 68, 67, body))
                self.send(raw)
                with contextlib.suppress(TimeoutError):
                    said = wire.recv(2000)
                    if said[28:34] == self.mac:
                        return said, options_of(said)
        return b"", {}

    def send(self, frame: bytes) -> None:
        """A frame as it is, whoever it claims to be from."""
        with self.ground.enter(self.space), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind(("eth0", 0))
            wire.send(frame)

    def hears(self, act: Callable[[], object], wanted: Callable[[bytes], bool]) -> bool:
        """Does a frame like that reach this guest when that happens?"""
        with self.ground.enter(self.space):
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            wire.bind(("eth0", 0))
        with wire:
            act()
            end = time.monotonic() + NO_S
            while (left := end - time.monotonic()) > 0:
                if select.select([wire], [], [], left)[0] and wanted(wire.recv(4000)):
                    return True
        return False

    def pings(self, address: str, within_s: float = YES_S) -> bool:
        return self.lab.pings(address, self.space, within_s)

    def listens(self, port: int) -> socket.socket:
        return self.ground.listener("0.0.0.0", port, self.space)

    def get(self, path: str, headers: str = "", address: str = "169.254.169.254") -> tuple[int, Any]:
        """Asks the metadata service. Status and decoded JSON."""
        with self.lab.reaches(address, 80, self.space) as wire:
            wire.settimeout(YES_S)
            wire.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
            answer = b""
            while said := wire.recv(65536):
                answer += said
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body) if b"json" in head else body


class Lab:
    """A machine (a namespace), its cloud's wires, and guests."""

    def __init__(self, folder: Path, name: str, want: str = "namespace", forward: bool = False) -> None:
        self.folder, self.name, self.want = folder, name, want
        self.spaces: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.wiring = Wiring()
        self.ground = Ground.choose(folder, want, forward=forward)
        self.wires = self.start()

    def start(self) -> Wires:
        return Wires(
            self.ground, metadata_app=self.metadata, metadata_secret=SECRET, clock=WallClock(), state_dir=self.folder
        )

    def restart(self) -> None:
        """Kilonova ended, somehow, and is here again."""
        self.wires.close()
        self.wires = self.start()

    def metadata(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        """A metadata service that says what it was asked."""
        said = {k.removeprefix("HTTP_"): v for k, v in environ.items() if k.startswith(("HTTP_", "PATH_INFO"))}
        self.calls.append(said)
        body = json.dumps(said).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    def apply(
        self, *networks: NetworkWire, ports: list[PortWire] | None = None, routers: list[RouterWire] | None = None
    ) -> None:
        self.wiring = Wiring(
            list(networks) or self.wiring.networks,
            self.wiring.ports if ports is None else ports,
            self.wiring.routers if routers is None else routers,
        )
        self.wires.apply(self.wiring)

    def again(self) -> None:
        self.wires.apply(self.wiring)

    def guest(self, port: PortWire) -> Guest:
        return Guest(self, port)

    def run(self, words: str, space: str = MACHINE) -> str:
        return self.ground.run(words.split(), space)

    def setting(self, path: str, value: str) -> None:
        with self.ground.enter(CLOUD):
            (Path("/proc/sys/net") / path).write_text(value)

    def pings6(self, address: str, space: str, within_s: float = YES_S) -> bool:
        with self.ground.enter(space), socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as wire:
            end = time.monotonic() + within_s
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    wire.sendto(struct.pack("!BBHHH", 128, 0, 0, 7, 7), (address, 0))
                while select.select([wire], [], [], 0.2)[0]:
                    said, (source, *_) = wire.recvfrom(2000)
                    if source == address and said[0] == 129:
                        return True
        return False

    def pings(self, address: str, space: str = MACHINE, within_s: float = YES_S) -> bool:
        """Does an address answer? Asks until it does or the time is over."""
        with self.ground.enter(space), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as wire:
            end, number = time.monotonic() + within_s, 0
            while time.monotonic() < end:
                number += 1
                head = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, number)
                with contextlib.suppress(OSError):
                    wire.sendto(head[:2] + checksum(head) + head[4:], (address, 0))
                until = min(end, time.monotonic() + 0.2)
                while (left := until - time.monotonic()) > 0:
                    if select.select([wire], [], [], left)[0]:
                        said, (source, _) = wire.recvfrom(2000)
                        if source == address and said[20] == 0 and said[24:26] == head[4:6]:
                            return True
        return False

    def reaches(self, address: str, port: int, space: str = MACHINE, within_s: float = YES_S) -> socket.socket:
        """A connection, tried until it is made. Raises TimeoutError."""
        end = time.monotonic() + within_s
        while True:
            try:
                with self.ground.enter(space):
                    return socket.create_connection((address, port), max(0.1, min(1.0, end - time.monotonic())))
            except OSError:
                if time.monotonic() >= end:
                    raise TimeoutError(f"{address}:{port}") from None

    def refused(self, address: str, port: int, space: str = MACHINE) -> bool:
        try:
            self.reaches(address, port, space, NO_S).close()
        except TimeoutError:
            return True
        return False

    def pid(self, key: str) -> int:
        return int((self.ground.runtime / key / "pid").read_text())

    def close(self) -> None:
        for space in self.spaces:
            self.ground.drop(space)
        self.wires.remove_all()
        self.wires.close()
        self.ground.close()


@pytest.fixture
def machine() -> Iterator[str]:
    """The calling thread is in a network namespace of its own, named so."""
    name = f"kilonova-test-{os.getpid()}"
    place = Ground("machine", Path("/nowhere"))
    place.make(name)
    try:
        with place.enter(name):
            yield name
    finally:
        place.drop(name)
        place.close()


@pytest.fixture
def lab(machine: str, tmp_path: Path) -> Iterator[Lab]:
    one = Lab(tmp_path / "state", machine)
    try:
        yield one
    finally:
        one.close()


# ---- what is declared


def network(id: str = BLUE, **more: Any) -> NetworkWire:
    subnet = SubnetWire(f"s-{id}", "10.0.0.0/24", gateway="10.0.0.1", dhcp_address="10.0.0.2", dns=["9.9.9.9"])
    return NetworkWire(id, f"kn{id[:11]}", **({"mtu": 1450, "subnets": [subnet]} | more))


def outside() -> NetworkWire:
    subnet = SubnetWire("s-out", "172.24.4.0/24", gateway="172.24.4.1", dhcp=False)
    return NetworkWire(OUTSIDE, f"kn{OUTSIDE[:11]}", external=True, subnets=[subnet])


def port(number: int, net: str = BLUE, **more: Any) -> PortWire:
    """Number n has the address 10.0.0.n, whatever its network."""
    id = f"{net[:4]}{number:04x}-0000"
    given = {
        "addresses": [(f"s-{net}", f"10.0.0.{number}")],
        "hostname": f"guest-{number}",
        "server_id": f"server-{net[:4]}-{number}",
        "project_id": f"project-{net[:4]}",
        "rules": OPEN,
    }
    return PortWire(id, net, f"fa:16:3e:{net[:2]}:00:{number:02x}", f"tap{id[:11]}", **(given | more))


def router(net: str = BLUE, number: int = 10, **more: Any) -> RouterWire:
    id = f"{net[:4]}ffff-0000"
    mac = f"fa:16:3f:{net[:2]}:{number:02x}"
    given: dict[str, Any] = {
        "legs": [(net, "10.0.0.1/24", f"{mac}:01")],
        "outside": (OUTSIDE, f"172.24.4.{number}/24", f"{mac}:02"),
        "outside_gateway": "172.24.4.1",
    }
    return RouterWire(id, **(given | more))


# ---- packets by hand


def checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data if len(data) % 2 == 0 else data + b"\0"))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def ether(to: bytes, source: bytes, kind: int, body: bytes) -> bytes:
    return to + source + struct.pack("!H", kind) + body


def ipv4(source: str, to: str, protocol: int, body: bytes) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0)
    head += socket.inet_aton(source) + socket.inet_aton(to)
    return head[:10] + checksum(head) + head[12:] + body


def udp(source: str, to: str, sport: int, dport: int, body: bytes) -> bytes:
    return ipv4(source, to, 17, struct.pack("!HHHH", sport, dport, 8 + len(body), 0) + body)


def arp(mac: bytes, source: str, to: str) -> bytes:
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + mac + socket.inet_aton(source) + bytes(6) + socket.inet_aton(to)


def options_of(said: bytes) -> dict[int, bytes]:
    found, rest = {}, said[240:]
    while rest and rest[0] != 255:
        if rest[0] == 0:
            rest = rest[1:]
        else:
            found[rest[0]] = rest[2 : 2 + rest[1]]
            rest = rest[2 + rest[1] :]
    return found


def classless(text: bytes) -> list[tuple[str, str]]:
    """RFC 3442."""
    found = []
    while text:
        width, size = text[0], (text[0] + 7) // 8
        net = socket.inet_ntoa(text[1 : 1 + size].ljust(4, b"\0"))
        found.append((f"{net}/{width}", socket.inet_ntoa(text[1 + size : 5 + size])))
        text = text[5 + size :]
    return found


# ---- stories


def test_a_guest_gets_its_address_its_routes_and_its_metadata(lab: Lab) -> None:
    lab.apply(network(), ports=[port(5), port(6)], routers=[])
    five, six = lab.guest(port(5)), lab.guest(port(6))
    told = five.dhcp()
    assert five.address == "10.0.0.5" and six.dhcp() and six.address == "10.0.0.6"
    assert told[26] == struct.pack("!H", 1450)
    assert told[12] == b"guest-5" and told[15] == b"novalocal"
    assert told[6] == socket.inet_aton("9.9.9.9") and told[3] == socket.inet_aton("10.0.0.1")
    assert classless(told[121]) == [("169.254.169.254/32", "10.0.0.2"), ("0.0.0.0/0", "10.0.0.1")]
    status, said = five.get("/openstack/latest/meta_data.json", "X-Instance-ID: server-6\r\nX_Tenant_ID: evil\r\n")
    assert status == 200 and said["PATH_INFO"] == "/openstack/latest/meta_data.json"
    assert (said["X_INSTANCE_ID"], said["X_TENANT_ID"]) == ("server-b1ae-5", "project-b1ae")
    assert said["X_FORWARDED_FOR"] == "10.0.0.5" and len(said["X_INSTANCE_ID_SIGNATURE"]) == 64
    assert five.pings("10.0.0.6")


def test_a_stranger_gets_no_address_and_no_metadata(lab: Lab) -> None:
    unsecured = port(9, secured=False)
    lab.apply(network(), ports=[unsecured], routers=[])
    guest = lab.guest(unsecured)
    assert guest.pings("10.0.0.2", NO_S) is False  # it has no address yet
    guest.still("10.0.0.77")
    assert guest.pings("10.0.0.2")
    guest.ip("route add 169.254.169.254 via 10.0.0.2")
    assert guest.get("/")[0] == 404
    assert not lab.calls


def test_two_projects_use_the_same_addresses(lab: Lab) -> None:
    lab.apply(network(), network(RED), ports=[port(5), port(6), port(5, RED), port(6, RED)], routers=[])
    blue, red, other = lab.guest(port(5)), lab.guest(port(5, RED)), lab.guest(port(6))
    assert blue.dhcp() and red.dhcp() and other.dhcp()
    assert blue.address == red.address == "10.0.0.5"
    assert blue.get("/")[1]["X_INSTANCE_ID"] == "server-b1ae-5"
    assert red.get("/")[1]["X_INSTANCE_ID"] == "server-4ed0-5"
    with blue.listens(22) as listener, lab.reaches("10.0.0.5", 22, other.space):
        assert listener.accept()[1][0] == "10.0.0.6"
    assert blue.pings("10.0.0.6") and not red.pings("10.0.0.6", NO_S)  # red's six is not plugged


def test_a_guest_cannot_speak_as_somebody_else(lab: Lab) -> None:
    lab.apply(network(), ports=[port(5), port(6), port(7, secured=False)], routers=[])
    liar, victim, free = (
        lab.guest(port(5)).still(),
        lab.guest(port(6)).still(),
        lab.guest(port(7, secured=False)).still(),
    )
    assert liar.pings("10.0.0.6") and free.pings("10.0.0.6")
    all, mac, odd = b"\xff" * 6, liar.mac, bytes.fromhex("0200000000ff")
    body = b"a lie of some length"
    lies = {
        "another MAC": ether(all, odd, 0x0800, udp("10.0.0.5", "10.0.0.6", 9, 9, body)),
        "another address": ether(all, mac, 0x0800, udp("10.0.0.66", "10.0.0.6", 9, 9, body)),
        "ARP for another address": ether(all, mac, 0x0806, arp(mac, "10.0.0.1", "10.0.0.6")),
        "ARP for another MAC": ether(all, mac, 0x0806, arp(odd, "10.0.0.5", "10.0.0.6")),
        "DHCP server": ether(all, mac, 0x0800, udp("10.0.0.5", "255.255.255.255", 67, 68, body)),
        "VLAN tag": ether(all, mac, 0x8100, b"\0\1\x08\0" + udp("10.0.0.5", "10.0.0.6", 9, 9, body)),
        "some other protocol": ether(all, mac, 0x88B5, body * 3),
        "router advertisement": ether(all, mac, 0x86DD, icmp6(link_local(liar.port.mac), bytes([134, 0]) + bytes(14))),
        "neighbour advertisement": ether(
            all, mac, 0x86DD, icmp6(link_local(liar.port.mac), bytes([136, 0]) + bytes(6) + b"\xfe\x80" + bytes(14))
        ),
    }
    heard: list[str] = []

    def notes(got: bytes) -> bool:
        heard.extend(lie for lie, frame in lies.items() if got[14:].startswith(frame[14:]))
        return False

    assert not victim.hears(lambda: [liar.send(frame) for frame in lies.values()], notes)
    assert heard == []
    truth = ether(all, mac, 0x0806, arp(mac, "10.0.0.5", "10.0.0.6"))
    assert victim.hears(lambda: liar.send(truth), lambda got: got[:42] == truth)
    honest = icmp6(
        link_local(liar.port.mac),
        bytes([136, 0]) + bytes(6) + socket.inet_pton(socket.AF_INET6, link_local(liar.port.mac)),
    )
    assert victim.hears(lambda: liar.send(ether(all, mac, 0x86DD, honest)), lambda got: honest in got)
    anyone = ether(all, free.mac, 0x88B5, body * 3)
    assert victim.hears(lambda: free.send(anyone), lambda got: got == anyone)  # its owner switched the guard off


def icmp6(source: str, body: bytes) -> bytes:
    """To all nodes; with its checksum, or connection tracking would drop it before any rule does."""
    to = socket.inet_pton(socket.AF_INET6, "ff02::1")
    origin = socket.inet_pton(socket.AF_INET6, source)
    pseudo = origin + to + struct.pack("!II", len(body), 58)
    body = body[:2] + checksum(pseudo + body[:2] + b"\0\0" + body[4:]) + body[4:]
    return struct.pack("!IHBB", 0x60000000, len(body), 58, 255) + origin + to + body


def test_allowed_pairs_let_a_guest_speak_for_more(lab: Lab) -> None:
    pairs = [("fa:16:3e:b1:00:05", "10.0.0.200"), ("00:00:5e:00:01:01", "10.0.0.128/25")]
    keepalived = port(5, allowed_pairs=pairs)
    lab.apply(network(), ports=[keepalived, port(6)], routers=[])
    five, six = lab.guest(keepalived).still(), lab.guest(port(6)).still()
    assert six.pings("10.0.0.5")
    five.ip("address add 10.0.0.200/32 dev eth0")
    assert six.pings("10.0.0.200")
    virtual = bytes.fromhex("00005e000101")
    claim = ether(b"\xff" * 6, virtual, 0x0806, arp(virtual, "10.0.0.130", "10.0.0.6"))
    assert six.hears(lambda: five.send(claim), lambda got: got[:42] == claim)
    five.ip("address add 10.0.0.99/32 dev eth0")
    assert not six.pings("10.0.0.99", NO_S)


def test_groups_open_and_close_what_is_going_on(lab: Lab) -> None:
    closed = port(5, rules=[Rule("egress")])
    lab.apply(network(), ports=[closed, port(6)], routers=[])
    five, six = lab.guest(closed).still(), lab.guest(port(6)).still()
    assert five.pings("10.0.0.6")  # replies come back
    assert not six.pings("10.0.0.5", NO_S)  # questions do not
    with five.listens(22) as ssh, five.listens(80) as web:
        assert lab.refused("10.0.0.5", 22, six.space)
        lab.apply(
            ports=[port(5, rules=[Rule("egress"), Rule("ingress", protocol="tcp", port_min=20, port_max=30)]), port(6)]
        )
        with lab.reaches("10.0.0.5", 22, six.space) as there, ssh.accept()[0] as here:
            assert spoken(there, here) and spoken(here, there)
            assert lab.refused("10.0.0.5", 80, six.space) and not six.pings("10.0.0.5", NO_S)
            lab.apply(ports=[closed, port(6)])
            assert not spoken(there, here) and not spoken(here, there)  # also what was open before
            lab.apply(ports=[port(5, rules=[Rule("egress"), Rule("ingress", remotes=["10.0.0.0/29"])]), port(6)])
            assert spoken(there, here) and spoken(here, there)  # and it goes on when it may again
        assert six.pings("10.0.0.5")
        lab.reaches("10.0.0.5", 80, six.space).close()
        web.accept()[0].close()
    lab.apply(ports=[port(5, rules=[]), port(6)])
    assert not five.pings("10.0.0.6", NO_S)  # no rule for egress: silence


def spoken(one: socket.socket, other: socket.socket) -> bool:
    """Does what one says reach the other? Silence may last as long as TCP needs to say it again."""
    word = os.urandom(8)
    one.sendall(word)
    heard, end = b"", time.monotonic() + 1.5
    while (left := end - time.monotonic()) > 0 and not heard.endswith(word):
        if select.select([other], [], [], left)[0]:
            heard += other.recv(1000)
    return heard.endswith(word)


def test_a_remote_group_grows_and_shrinks(lab: Lab) -> None:
    def members(*addresses: str) -> list[PortWire]:
        friends = [Rule("egress"), Rule("ingress", remotes=list(addresses), remote_group="a-group")]
        return [port(n, rules=friends) for n in (5, 6, 7)]

    lab.apply(network(), ports=members("10.0.0.5", "10.0.0.6"), routers=[])
    five, six, seven = (lab.guest(p).still() for p in members())
    assert five.pings("10.0.0.6") and six.pings("10.0.0.5")
    assert not seven.pings("10.0.0.5", NO_S)
    lab.apply(ports=members("10.0.0.5", "10.0.0.6", "10.0.0.7"))
    assert seven.pings("10.0.0.5")
    lab.apply(ports=members("10.0.0.5"))
    assert not seven.pings("10.0.0.5", NO_S) and not six.pings("10.0.0.5", NO_S) and five.pings("10.0.0.6")
    assert len(lab.run("nft list sets inet", CLOUD).split("a-group")) == 2  # one set, however many ports


def test_a_port_that_is_down_or_unknown_is_silent(lab: Lab) -> None:
    lab.apply(network(), ports=[port(5), port(6)], routers=[])
    five, six = lab.guest(port(5)).still(), lab.guest(port(6)).still()
    assert five.pings("10.0.0.6")
    lab.apply(ports=[port(5, up=False), port(6)])
    assert not five.pings("10.0.0.6", NO_S)
    lab.apply(ports=[port(6)])  # unbound, and its tap is still there
    assert not five.pings("10.0.0.6", NO_S)
    called = ether(b"\xff" * 6, six.mac, 0x0806, arp(six.mac, "10.0.0.6", "10.0.0.5"))
    assert not five.hears(lambda: six.send(called), lambda got: got[6:12] == six.mac)
    lab.apply(ports=[port(5), port(6)])
    assert five.pings("10.0.0.6")


def test_routers_lead_out_and_floating_addresses_in(lab: Lab) -> None:
    blue = router(floating=[FloatingWire("172.24.4.50", "10.0.0.5")])
    red = router(RED, 11, floating=[FloatingWire("172.24.4.60", "10.0.0.5")])
    lab.apply(outside(), network(), network(RED), ports=[port(5), port(6), port(5, RED)], routers=[blue, red])
    five, six, other = lab.guest(port(5)), lab.guest(port(6)), lab.guest(port(5, RED))
    for guest in (five, six, other):
        assert guest.dhcp()
    assert five.pings("10.0.0.1") and five.pings("172.24.4.1") and six.pings("172.24.4.1")
    assert lab.pings("172.24.4.10") and lab.pings("172.24.4.50") and lab.pings("172.24.4.60")

    with five.listens(22) as ssh:
        lab.reaches("172.24.4.50", 22).close()
        assert ssh.accept()[1][0] == "172.24.4.1"  # who comes from outside keeps his address
        lab.reaches("172.24.4.50", 22, six.space).close()
        assert ssh.accept()[1][0] == "172.24.4.10"  # a neighbour behind the same router
        lab.reaches("172.24.4.50", 22, five.space).close()
        assert ssh.accept()[1][0] == "172.24.4.50"  # the guest itself
        lab.reaches("172.24.4.50", 22, other.space).close()
        assert ssh.accept()[1][0] == "172.24.4.60"  # another project, under its own floating address
    with lab.ground.listener("172.24.4.1", 8080, MACHINE) as web:
        lab.reaches("172.24.4.1", 8080, five.space).close()
        assert web.accept()[1][0] == "172.24.4.50"
        lab.reaches("172.24.4.1", 8080, six.space).close()
        assert web.accept()[1][0] == "172.24.4.10"

    # A private network is not reachable by a route to its router, not even from where routers are.
    lab.run("ip route add 10.0.0.0/24 via 172.24.4.10")
    assert not lab.pings("10.0.0.6", within_s=NO_S)
    lab.run("ip route delete 10.0.0.0/24")

    # The address moves to the other project's guest: nobody asks the old router any more.
    assert lab.pings("172.24.4.50")
    lab.apply(
        routers=[
            msgspec.structs.replace(blue, floating=[]),
            msgspec.structs.replace(red, floating=[FloatingWire("172.24.4.50", "10.0.0.5")]),
        ]
    )
    with other.listens(22) as ssh:
        lab.reaches("172.24.4.50", 22, within_s=2).close()
        assert ssh.accept()
    assert not lab.pings("172.24.4.60", within_s=NO_S)


def test_metadata_answers_through_a_router_where_dhcp_says_nothing(lab: Lab) -> None:
    quiet = network(subnets=[SubnetWire(f"s-{BLUE}", "10.0.0.0/24", gateway="10.0.0.1", dhcp=False)])
    lab.apply(outside(), quiet, ports=[port(5)], routers=[router()])
    five = lab.guest(port(5)).still()
    assert five.get("/latest")[1]["X_INSTANCE_ID"] == "server-b1ae-5"
    assert five.pings("172.24.4.1")
    assert not [n for n in lab.ground.made() if "dhcp" in n]


def test_guests_get_out_where_the_machine_forwards(machine: str, tmp_path: Path) -> None:
    lab = Lab(tmp_path / "state", machine, forward=True)
    world = f"{machine}-world"
    try:
        lab.spaces.append(world)
        lab.ground.make(world)
        lab.run(f"ip link add up0 type veth peer name eth0 netns {world}")
        lab.run("ip address add 198.51.100.2/24 dev up0")
        lab.run("ip link set up0 up")
        lab.run("ip route add default via 198.51.100.1")
        lab.run("ip address add 198.51.100.1/24 dev eth0", world)
        lab.run("ip link set eth0 up", world)
        lab.apply(outside(), network(), ports=[port(5)], routers=[router()])
        five = lab.guest(port(5)).still()
        assert five.pings("198.51.100.1")
        with lab.ground.listener("0.0.0.0", 80, world) as web:
            lab.reaches("198.51.100.1", 80, five.space).close()
            assert web.accept()[1][0] == "198.51.100.2"
        assert lab.wires.status().way_out == "by NAT"
    finally:
        lab.close()


def test_the_machine_is_not_made_to_forward_unasked(lab: Lab) -> None:
    lab.apply(outside(), network(), ports=[], routers=[router()])
    with lab.ground.enter(MACHINE):
        assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "0\n"
    assert lab.wires.status().way_out.startswith("none")


def test_addresses_of_the_outside_that_are_taken_are_left_alone(lab: Lab) -> None:
    lab.run("ip link add other type bridge")
    lab.run("ip address add 172.24.4.99/24 dev other")
    lab.run("ip link set other up")
    lab.apply(outside(), network(), ports=[port(5)], routers=[router()])
    status = lab.wires.status()
    assert "172.24.4.0/24 is in use on this machine already (other)" in status.problems[0]
    lab.run("ip link delete other")
    lab.again()
    assert not lab.wires.status().problems and lab.pings("172.24.4.10")


DAMAGES: dict[str, Callable[[Lab], object]] = {
    "a bridge is deleted": lambda lab: lab.run(f"ip link delete {network().bridge}", CLOUD),
    "a bridge is down": lambda lab: lab.run(f"ip link set {network().bridge} down", CLOUD),
    "a tap is taken out": lambda lab: lab.run(f"ip link set {port(5).device} nomaster", CLOUD),
    "rules are flushed": lambda lab: lab.run("nft flush ruleset", CLOUD),
    "a router's rules are flushed": lambda lab: lab.run("nft flush ruleset", lab.ground.inner("router", router().id)),
    "a router is deleted": lambda lab: lab.run(f"ip netns delete {lab.ground.inner('router', router().id)}"),
    "a router's address is deleted": lambda lab: lab.run(
        "ip address flush dev out0", lab.ground.inner("router", router().id)
    ),
    "DHCP's namespace is deleted": lambda lab: lab.run(f"ip netns delete {lab.ground.inner('dhcp', BLUE)}"),
    "DHCP is killed": lambda lab: killed(lab.pid(f"dhcp-{BLUE[:11]}")),
    "bridges are not filtered": lambda lab: lab.setting("bridge/bridge-nf-call-iptables", "0"),
    "the machine's end is deleted": lambda lab: lab.run(f"ip link delete kx{lab.ground.tag}{OUTSIDE[:6]}"),
}


def killed(pid: int) -> None:
    process = os.pidfd_open(pid)
    signal.pidfd_send_signal(process, signal.SIGKILL)
    select.select([process], [], [], 5)
    os.close(process)


def test_whatever_is_broken_is_mended(lab: Lab) -> None:
    lab.apply(
        outside(),
        network(),
        ports=[port(5), port(6, rules=[Rule("egress")])],
        routers=[router(floating=[FloatingWire("172.24.4.50", "10.0.0.5")])],
    )
    five, six = lab.guest(port(5)), lab.guest(port(6))
    for damage, act in DAMAGES.items():
        act(lab)
        lab.again()
        assert five.dhcp() and six.dhcp(), damage
        assert five.pings("10.0.0.1") and six.pings("10.0.0.5") and lab.pings("172.24.4.50"), damage
        assert not five.pings("10.0.0.6", NO_S), damage
        assert five.get("/")[0] == 200, damage
        assert not lab.wires.status().problems, damage


def test_a_restart_changes_nothing_that_is_right(lab: Lab) -> None:
    lab.apply(network(), ports=[port(5), port(6)], routers=[])
    five, six = lab.guest(port(5)), lab.guest(port(6))
    assert five.dhcp() and six.dhcp()
    lab.again()  # the taps have the network's MTU now
    pid, links = lab.pid(f"dhcp-{BLUE[:11]}"), lab.run("ip -o link", CLOUD)
    with five.listens(22) as ssh, lab.reaches("10.0.0.5", 22, six.space) as there, ssh.accept()[0] as here:
        lab.restart()
        assert spoken(there, here)
        lab.again()
        assert spoken(there, here) and spoken(here, there)
    assert lab.pid(f"dhcp-{BLUE[:11]}") == pid and lab.run("ip -o link", CLOUD) == links
    assert five.get("/")[0] == 200


def test_a_restart_ends_what_is_no_longer_wanted(lab: Lab) -> None:
    lab.apply(outside(), network(), network(RED), ports=[port(5, RED)], routers=[router(RED)])
    pid = lab.pid(f"dhcp-{RED[:11]}")
    lab.restart()
    lab.apply(network(), ports=[], routers=[])
    assert gone(pid)
    assert lab.ground.made() == {lab.ground.inner("dhcp", BLUE)}
    links = json.loads(lab.run("ip -j link", CLOUD))
    assert {one["ifname"] for one in links if one["ifname"].startswith("kn")} == {network().bridge}


def gone(pid: int) -> bool:
    """Ended; a dead one that nobody has taken away yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_an_address_passes_from_one_guest_to_the_next(lab: Lab) -> None:
    lab.apply(network(), ports=[port(5)], routers=[])
    assert lab.guest(port(5)).dhcp()
    heir = port(8, addresses=[(f"s-{BLUE}", "10.0.0.5")])
    lab.apply(ports=[heir])
    guest = lab.guest(heir)
    assert guest.dhcp() and guest.address == "10.0.0.5"


def test_six(lab: Lab) -> None:
    """IPv6: by router advertisement, by DHCPv6's absence, through the router, and guarded."""
    subnet = SubnetWire(
        "s-6",
        "2001:db8::/64",
        6,
        gateway="2001:db8::1",
        dhcp_address="2001:db8::2",
        ra_mode="slaac",
        address_mode="slaac",
    )
    dual = network(subnets=[*network().subnets, subnet])
    open6 = [*OPEN, Rule("ingress", 6, "icmpv6", remotes=["::/0"]), Rule("egress", 6, remotes=["::/0"])]
    mine = [
        port(n, addresses=[(f"s-{BLUE}", f"10.0.0.{n}"), ("s-6", f"2001:db8::f816:3eff:feb1:{n:x}")], rules=open6)
        for n in (5, 6)
    ]
    legs = [(BLUE, "10.0.0.1/24", "fa:16:3f:00:00:01"), (BLUE, "2001:db8::1/64", "fa:16:3f:00:00:01")]
    lab.apply(outside(), dual, ports=mine, routers=[router(legs=legs)])
    five, six = lab.guest(mine[0]), lab.guest(mine[1])
    end = time.monotonic() + 15
    while "2001:db8::f816:3eff:feb1:5/64" not in (told := five.ip("-6 -o addr show dev eth0")) or "tentative" in told:
        assert time.monotonic() < end, told
        select.select([], [], [], 0.1)
    assert "default via fe80::f816:3fff:fe00:1" in five.ip("-6 route")
    while "tentative" in six.ip("-6 -o addr show dev eth0"):
        select.select([], [], [], 0.1)
    assert lab.pings6("2001:db8::f816:3eff:feb1:6", five.space) and lab.pings6("2001:db8::1", five.space)
    with five.ground.enter(five.space):
        wire = socket.create_connection(("fe80::a9fe:a9fe%eth0", 80), 3)
    with wire:
        wire.sendall(b"GET /six HTTP/1.1\r\n\r\n")
        answer = b""
        while said := wire.recv(4000):
            answer += said
    assert b'"X_INSTANCE_ID": "server-b1ae-5"' in answer


def test_six_by_dhcp(lab: Lab) -> None:
    """A declared port is offered its address, without a router in the network; RFC 8415, section 18.2.1."""
    mode = "dhcpv6-stateful"
    subnet = SubnetWire("s-6", "2001:db8::/64", 6, dhcp_address="2001:db8::2", ra_mode=mode, address_mode=mode)
    mine = port(5, addresses=[("s-6", "2001:db8::5")], rules=[Rule("egress", 6, remotes=["::/0"])])
    lab.apply(network(subnets=[subnet]), ports=[mine], routers=[])
    five = lab.guest(mine)
    end = time.monotonic() + 15
    while "fe80" not in (told := five.ip("-6 -o addr show dev eth0")) or "tentative" in told:
        assert time.monotonic() < end, told
        select.select([], [], [], 0.1)
    duid = struct.pack("!HHHH", 1, 10, 3, 1) + five.mac
    solicit = b"\x01abc" + duid + struct.pack("!HHIII", 3, 12, 1, 0, 0) + struct.pack("!HHH", 8, 2, 0)
    with five.ground.enter(five.space):
        wire = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        wire.bind(("::", 546))
        there = socket.getaddrinfo("ff02::1:2%eth0", 547, type=socket.SOCK_DGRAM)[0][4]
    with wire:
        answer = b""
        while socket.inet_pton(socket.AF_INET6, "2001:db8::5") not in answer:
            assert time.monotonic() < end
            wire.sendto(solicit, there)
            if select.select([wire], [], [], 0.3)[0]:
                answer = wire.recv(2000)
    assert answer[0] == 2


def test_in_the_machines_own_namespace_others_are_left_alone(machine: str, tmp_path: Path) -> None:
    lab = Lab(tmp_path / "state", machine, "machine")
    try:
        lab.run("ip link add virbr0 type bridge")
        lab.run("ip link set virbr0 up")
        before = lab.run("ip -o link show virbr0")
        lab.run("nft add table inet theirs")
        lab.apply(
            outside(),
            network(),
            ports=[port(5), port(6)],
            routers=[router(floating=[FloatingWire("172.24.4.50", "10.0.0.5")])],
        )
        assert lab.ground.netns_path is None
        five, six = lab.guest(port(5)), lab.guest(port(6))
        assert five.dhcp() and six.dhcp() and five.pings("10.0.0.6") and lab.pings("172.24.4.50")
        assert five.pings("172.24.4.50") and six.pings("172.24.4.50")
        lab.apply(ports=[port(6)])
        lab.again()
        assert not five.pings("10.0.0.6", NO_S)  # unbound, and its tap is still there
        lab.wires.remove_all()
        assert lab.run("ip -o link show virbr0") == before
        assert lab.run("nft list tables") == "table inet theirs\n"
    finally:
        lab.close()


def test_nothing_is_left(lab: Lab) -> None:
    def all_there_is() -> tuple[object, ...]:
        return (
            lab.run("ip -o link"),
            lab.run("nft list ruleset"),
            sorted(p.name for p in NETNS.glob(f"*{lab.ground.tag}*")),
            lab.ground.runtime.exists() and sorted(lab.ground.runtime.iterdir()),
        )

    lab.run("nft list ruleset", MACHINE)
    before = all_there_is()
    lab.apply(outside(), network(), network(RED), ports=[port(5)], routers=[router(), router(RED, 11)])
    pids = [lab.pid(f"dhcp-{net[:11]}") for net in (BLUE, RED)]
    lab.wires.remove_all()
    assert all_there_is() == before
    assert all(map(gone, pids))
    lab.again()
    assert lab.pings("172.24.4.10")


def test_threads_may_apply_at_once(lab: Lab) -> None:
    steps = [Wiring([network()], [port(n) for n in range(5, 5 + count)]) for count in range(8)]
    troubles: list[BaseException] = []

    def work(wiring: Wiring) -> None:
        try:
            lab.wires.apply(wiring)
        except BaseException as e:
            troubles.append(e)

    threads = [threading.Thread(target=work, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not troubles
    lab.apply(network(), ports=[port(5)])
    assert lab.guest(port(5)).dhcp()


def test_it_is_quick(lab: Lab) -> None:
    """Generous by a factor of five and more: others use the machine, too. `pytest -rP` shows the figures."""
    friends = [f"10.0.0.{n}" for n in range(5, 105)]

    def ports(count: int) -> list[PortWire]:
        group = [*OPEN, Rule("ingress", remotes=friends[:count], remote_group="default")]
        return [port(n, rules=group) for n in range(5, 5 + count)]

    def taken(count: int) -> float:
        wiring = Wiring([network()], ports(count))
        begun = time.perf_counter()
        lab.wires.apply(wiring)
        return time.perf_counter() - begun

    first = taken(99)
    taken(99)
    nothing = min(taken(99) for _ in range(5))
    more = min(taken(n) for n in (100, 99, 100, 99))
    print(f"99 ports: {first * 1e3:.0f} ms; nothing new: {nothing * 1e3:.2f} ms; one more or less: {more * 1e3:.0f} ms")
    assert nothing < 0.025 and more < 0.25


def test_a_wiring_that_cannot_be_is_refused_in_words(lab: Lab) -> None:
    with pytest.raises(Refused, match="has a leg in network"):
        lab.apply(network(), ports=[], routers=[router()])
    with pytest.raises(Refused, match="no sensible device or MAC"):
        lab.apply(
            network(),
            ports=[msgspec.structs.replace(port(5), mac="x drop")],
            routers=[],
        )
    assert lab.wires.status().problems
    lab.apply(network(), ports=[port(5)], routers=[])
    assert not lab.wires.status().problems


def answers(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


def test_without_ground_networks_are_refused(tmp_path: Path) -> None:
    ground = Ground.choose(tmp_path, "slirp")
    wires = Wires(ground, metadata_app=answers, metadata_secret="", clock=WallClock(), state_dir=tmp_path)
    wires.apply(Wiring())
    wires.serve_programs(tmp_path / "metadata", {"server-1": "project-1"}.get)
    for server, status in {"server-1": b"200", "server-2": b"404"}.items():
        command = guestfwd.command(server, str(tmp_path / "metadata"))
        said = subprocess.run(
            command, shell=True, input=b"GET / HTTP/1.1\r\n\r\n", capture_output=True, timeout=30, check=True
        )
        assert said.stdout.split()[1] == status
    with pytest.raises(Unsupported, match="QEMU"):
        wires.apply(Wiring([network()]))
    status: Status = wires.status()
    assert status.ground == "qemu" and "network.forward" in status.way_out
    wires.remove_all()
    wires.close()
    ground.close()


def test_a_door_from_the_machine_to_a_guest(lab: Lab) -> None:
    lab.apply(network(), ports=[port(5)], routers=[])
    five = lab.guest(port(5)).still()
    door = Forward(socket.create_server(("127.0.0.1", 0)), "127.0.0.1", 22, ground=lab.ground, space=five.space)
    ssh = five.listens(22)
    with ssh, socket.create_connection(door.listener.getsockname()) as there, ssh.accept()[0] as here:
        assert spoken(there, here) and spoken(here, there)
        here.shutdown(socket.SHUT_WR)
        assert there.recv(10) == b""
    door.close()
