"""DHCP, router advertisements and names of a network, by dnsmasq: one for each network, in its inner namespace.

It answers declared ports only.  A change of ports or options is a file and a signal; only another range of addresses
starts it anew.  It outlives Kilonova, so leases are renewed meanwhile, and the next start adopts it.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import ipaddress
import os
import re
import shutil
import signal
import socket
import struct
from pathlib import Path

import msgspec

from kilonova.companions.wires.ground import Ground
from kilonova.companions.wires.links import Link, Space
from kilonova.companions.wires.routers import legs
from kilonova.kit.errors import Unavailable
from kilonova.kit.splice import readable
from kilonova.model.wiring import NetworkWire, PortWire, SubnetWire, Wiring

DEVICE = "dhcp0"
METADATA, METADATA6 = "169.254.169.254", "fe80::a9fe:a9fe"
LEASES = 65536
NOBODY = 65534
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17  # linux/sockios.h, linux/ethtool.h
END_S = 2.0  # dnsmasq ends within milliseconds of a SIGTERM


class Service(msgspec.Struct, frozen=True):
    """One dnsmasq: where it runs, and on which device it answers for which subnets.

    Version 4 and whatever has no router is answered in the network's own namespace; a version 6 subnet with a router
    in the router's, because only a router may advertise itself.
    """

    key: str
    space: str
    device: str
    network: NetworkWire
    subnets: list[SubnetWire]
    routes: bool  # advertise this namespace as the way out?


class Files(msgspec.Struct, frozen=True):
    """What dnsmasq reads. A change of `conf` starts it anew; the others are read again at a signal."""

    conf: str
    hosts: str
    options: str
    names: str
    leased: frozenset[tuple[str, str]]  # (MAC, address): leases of others are given back


def wanted(network: NetworkWire) -> bool:
    """Has the network a namespace of its own?"""
    return any(answered(s) for s in network.subnets)


def answered(subnet: SubnetWire) -> bool:
    return subnet.dhcp and bool(subnet.dhcp_address)


def near(network_id: str) -> str:
    """The name in the cloud's namespace of the veth that is DEVICE inside."""
    return f"kd{hashlib.sha256(network_id.encode()).hexdigest()[:11]}"


def mac(network_id: str) -> str:
    """Always the same, so that guests find DHCP and metadata again when the namespace was made anew."""
    return "fa:16:3d:" + ":".join(hashlib.sha256(network_id.encode()).hexdigest()[i : i + 2] for i in (0, 2, 4))


def space(network: NetworkWire, metadata: bool) -> Space:
    addresses = []
    for subnet in network.subnets:
        if answered(subnet):
            prefix = ipaddress.ip_network(subnet.cidr, strict=False).prefixlen
            addresses.append((DEVICE, f"{subnet.dhcp_address}/{prefix}"))
    six = any(answered(s) and s.version == 6 for s in network.subnets)
    if metadata:
        addresses.append((DEVICE, f"{METADATA}/32"))
        addresses += [(DEVICE, f"{METADATA6}/64")] if six else []
    links = [Link("lo", "loopback"), Link(DEVICE, "end", network.mtu, mac=mac(network.id))]
    settings = {
        "ipv4/conf/all/arp_ignore": "1",
        "ipv4/conf/all/rp_filter": "0",
        "ipv4/conf/default/rp_filter": "0",
        "ipv6/conf/all/accept_ra": "0",
        "ipv6/conf/default/accept_ra": "0",
    }
    return Space(links, addresses, [], settings)


def services(wiring: Wiring, ground: Ground) -> list[Service]:
    """All that must run for this wiring."""
    found = []
    routed: dict[str, tuple[str, str, str]] = {}  # version 6 subnet → (router, namespace, device)
    for router in wiring.routers:
        for leg in legs(router):
            for network in wiring.networks:
                for subnet in network.subnets:
                    if network.id == leg.network_id and subnet.version == 6 and _among(subnet, leg.cidrs):
                        routed[subnet.id] = (router.id, ground.inner("router", router.id), leg.far)
    for network in wiring.networks:
        here = [s for s in network.subnets if answered(s) and s.id not in routed]
        if here:
            where = ground.inner("dhcp", network.id)
            found.append(Service(f"dhcp-{network.id[:11]}", where, DEVICE, network, here, False))
        by_leg: dict[tuple[str, str, str], list[SubnetWire]] = {}
        for subnet in network.subnets:
            if subnet.id in routed and (subnet.ra_mode or subnet.address_mode):
                by_leg.setdefault(routed[subnet.id], []).append(subnet)
        for (router_id, where, device), subnets in by_leg.items():
            key = f"ra-{router_id[:11]}-{network.id[:11]}"
            found.append(Service(key, where, device, network, subnets, True))
    return found


def files(
    service: Service, ports: list[PortWire], folder: Path, domain: str, lease_s: int, metadata: bool, user: str
) -> Files:
    """Pure. `ports` are those of the service's network; `user` runs dnsmasq ("" : who starts it)."""
    tags = {subnet.id: f"s{i}" for i, subnet in enumerate(service.subnets)}
    lines = [
        "no-hosts",
        "no-resolv",
        "no-ping",
        "no-negcache",
        f"log-facility={folder}/log",
        "quiet-dhcp",
        "quiet-dhcp6",
        "quiet-ra",
        "dhcp-authoritative",
        "bind-interfaces",
        f"interface={service.device}",
        "except-interface=lo",
        f"dhcp-lease-max={LEASES}",
        f"pid-file={folder}/pid",
        f"dhcp-hostsfile={folder}/hosts",
        f"dhcp-optsfile={folder}/options",
        f"addn-hosts={folder}/names",
        f"dhcp-leasefile={folder}/leases",
    ]
    if service.routes:
        lines.append("port=0")
    if domain:
        lines += [f"domain={_labels(domain)}", f"local=/{_labels(domain)}/"]
    if user:
        lines.append(f"user={user}")
    for subnet in service.subnets:
        lines += _range(subnet, tags[subnet.id], lease_s)
    if any(s.ra_mode for s in service.subnets):
        life = "" if service.routes else ",0"
        lines += ["enable-ra", f"ra-param={service.device},mtu:{service.network.mtu},60{life}"]
    hosts, names, leased = [], [], set()
    for port in ports:
        line, told = _host(port, tags, service)
        if line:
            hosts.append(line)
            leased |= {(port.mac.lower(), address) for address in told}
        for subnet_id, address in port.addresses:
            if subnet_id in tags:
                name = hostname(port.hostname, address)
                names.append(f"{address} {name}.{_labels(domain)} {name}" if domain else f"{address} {name}")
    options = [f"option:mtu,{service.network.mtu}"]
    for subnet in service.subnets:
        options += _options(subnet, tags[subnet.id], metadata)
    return Files(_text(lines), _text(hosts), _text(options), _text(names), frozenset(leased))


def hostname(said: str, address: str) -> str:
    """A DNS label of what the port is called, or one made of its address."""
    label = re.sub(r"[^a-z0-9-]+", "-", said.partition(".")[0].lower()).strip("-")[:63].strip("-")
    return label or "host-" + re.sub(r"[^0-9a-f]+", "-", address)


class Dnsmasq:
    """One dnsmasq process and its files. It may have been started by an earlier Kilonova."""

    def __init__(self, ground: Ground, service: Service, folder: Path) -> None:
        self.ground, self.service, self.folder = ground, service, folder
        self.made: Files | None = None
        self.place: int | None = None  # which namespace it was started in
        self.process: int | None = None  # a pidfd

    def quiet(self, files: Files) -> bool:
        """Is it what it should be? Costs one system call."""
        return self.made == files and self.alive()

    def alive(self) -> bool:
        return self.process is not None and not readable([self.process], 0)

    def make(self, files: Files) -> None:
        """Brings process and files to what is wanted."""
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        changed = [_write(self.folder / n, t) for n, t in _reread(files).items()]
        if not self.alive() or self._read("conf") != files.conf:
            self.stop()
            self._start(files)
        elif any(changed) or self.made is None:
            assert self.process is not None
            signal.pidfd_send_signal(self.process, signal.SIGHUP)
            self._give_back(files)
        self.made = files

    def remove(self) -> None:
        """Ends it and leaves no file."""
        if not self.alive():
            self.adopt()
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Lets go of it; it goes on."""
        if self.process is not None:
            os.close(self.process)
        self.process = None

    def _start(self, files: Files) -> None:
        conf = self.folder / "conf"
        (self.folder / "leases").write_text(_kept(self._leases(), files.leased))
        (self.folder / "pid").unlink(missing_ok=True)
        _write(conf, files.conf)
        with self.ground.enter(self.service.space):
            whole_checksums(self.service.device)
        # It becomes a daemon by itself: when the program returns, it answers.
        self.ground.run(["dnsmasq", f"--conf-file={conf}"], self.service.space)
        self.adopt()
        if not self.alive():
            raise Unavailable("DHCP of a network did not start.", why=f"dnsmasq in {self.service.space}")

    def adopt(self) -> None:
        """Finds the process that reads our files, by the pid it wrote."""
        self.close()
        with contextlib.suppress(OSError, ValueError):
            pid = int(self._read("pid") or "")
            found = os.pidfd_open(pid)
            if f"--conf-file={self.folder}/conf".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                self.process = found
                self.place = Path(f"/proc/{pid}/ns/net").stat().st_ino
            else:
                os.close(found)

    def stop(self) -> None:
        """Ends the process. Its files stay."""
        if self.process is None:
            return
        for number, wait_s in ((signal.SIGTERM, END_S), (signal.SIGKILL, END_S)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.process, number)
            if readable([self.process], wait_s):
                break
        self.close()

    def _give_back(self, files: Files) -> None:
        """A new port may have an address that an old one was leased: dnsmasq keeps it for the old one unless told.

        Its file may be some milliseconds behind its answers, so what we told it before counts as well.
        """
        known = {(words[1].lower(), words[2]) for line in self._leases() if len(words := line.split()) >= 4}
        known |= self.made.leased if self.made else frozenset()
        for mac, address in sorted(known - files.leased):
            server = next((s.dhcp_address for s in self.service.subnets if _in(address, s.cidr)), None)
            if server and "." in address:
                self._release(mac, address, server)

    def _leases(self) -> list[str]:
        return (self._read("leases") or "").splitlines()

    def _release(self, mac: str, address: str, server: str) -> None:
        """Says DHCPRELEASE (RFC 2131, section 4.4.6) in the guest's name."""
        zero = bytes(4)
        head = struct.pack("!BBBBIHH", 1, 1, 6, 0, 1, 0, 0) + socket.inet_aton(address) + zero + zero + zero
        chaddr = bytes.fromhex(mac.replace(":", "")).ljust(16, b"\0")
        options = b"\x63\x82\x53\x63\x35\x01\x07\x36\x04" + socket.inet_aton(server) + b"\xff"
        packet = (head + chaddr + bytes(192) + options).ljust(300, b"\0")
        with self.ground.enter(self.service.space), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
            wire.sendto(packet, (server, 67))

    def _read(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text()
        except OSError:
            return None


def whole_checksums(device: str) -> None:
    """Old DHCP clients read raw packets and refuse those whose checksum was left to hardware that is not there."""
    value = ctypes.create_string_buffer(struct.pack("=II", ETHTOOL_STXCSUM, 0))
    request = struct.pack("16sP", device.encode(), ctypes.addressof(value)).ljust(40, b"\0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, contextlib.suppress(OSError):
        fcntl.ioctl(any_socket, SIOCETHTOOL, request)


def user() -> str:
    """Whom dnsmasq becomes once it is ready: nobody, if we are root and there is one."""
    if os.geteuid() != 0:
        return ""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= NOBODY < first + count:
            return "nobody"
    return "root"


def _range(subnet: SubnetWire, tag: str, lease_s: int) -> list[str]:
    net = ipaddress.ip_network(subnet.cidr, strict=False)
    if subnet.version == 4:
        return [f"dhcp-range=set:{tag},{net.network_address},static,{net.netmask},{lease_s}s"]
    mode = subnet.address_mode or subnet.ra_mode
    if mode == "slaac":
        return [f"dhcp-range=set:{tag},{net.network_address},ra-only,{net.prefixlen}"]
    if mode == "dhcpv6-stateless":
        return [f"dhcp-range=set:{tag},{net.network_address},ra-stateless,{net.prefixlen}"]
    return [f"dhcp-range=set:{tag},{net.network_address},static,{net.prefixlen},{lease_s}s"]


def _host(port: PortWire, tags: dict[str, str], service: Service) -> tuple[str, list[str]]:
    """dnsmasq's line for a port, and the addresses it is told there: one of each version, as DHCP can."""
    stateful = {s.id for s in service.subnets if s.version == 4 or (s.address_mode or s.ra_mode) != "slaac"}
    told: dict[int, str] = {}
    for subnet_id, address in port.addresses:
        if subnet_id in tags and subnet_id in stateful:
            told.setdefault(6 if ":" in address else 4, address)
    if not told:
        return "", []
    name = hostname(port.hostname, told.get(4) or told[6])
    words = [port.mac.lower(), name, *(f"[{a}]" if v == 6 else a for v, a in told.items())]
    return ",".join(words), list(told.values())


def _options(subnet: SubnetWire, tag: str, metadata: bool) -> list[str]:
    if subnet.version == 6:
        servers = ",".join(f"[{d}]" for d in subnet.dns if ":" in d)
        return [f"tag:{tag},option6:dns-server,{servers}"] if servers else []
    routes = [f"{destination},{hop}" for destination, hop in subnet.routes if ":" not in destination]
    if metadata:
        routes.append(f"{METADATA}/32,{subnet.dhcp_address}")
    if subnet.gateway:
        routes.append(f"0.0.0.0/0,{subnet.gateway}")
    lines = [f"tag:{tag},option:router" + (f",{subnet.gateway}" if subnet.gateway else "")]
    if servers := ",".join(d for d in subnet.dns if ":" not in d):
        lines.append(f"tag:{tag},option:dns-server,{servers}")
    if routes:  # RFC 3442: who understands it ignores the router option; 249 is what Windows calls it
        lines += [f"tag:{tag},option:classless-static-route,{','.join(routes)}", f"tag:{tag},249,{','.join(routes)}"]
    return lines


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _labels(domain: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "", domain).strip(".")


def _kept(leases: list[str], leased: frozenset[tuple[str, str]]) -> str:
    """Lines of a lease file (expiry, MAC, address, name, client id) without those of version 4 that nobody has now."""
    lines = []
    for line in leases:
        words = line.split()
        if len(words) < 4 or "." not in words[2] or (words[1].lower(), words[2]) in leased:
            lines.append(line + "\n")
    return "".join(lines)


def _reread(files: Files) -> dict[str, str]:
    return {"hosts": files.hosts, "options": files.options, "names": files.names}


def _write(path: Path, text: str) -> bool:
    """Whole or not at all. False when it said so already."""
    with contextlib.suppress(OSError):
        if path.read_text() == text:
            return False
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.chmod(0o644)
    beside.replace(path)
    return True


def _among(subnet: SubnetWire, cidrs: list[str]) -> bool:
    return any(_in(cidr.partition("/")[0], subnet.cidr) for cidr in cidrs)


def _in(address: str, cidr: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(cidr, strict=False)
