"""The data plane of one host: real bridges, DHCP, metadata, filters and routers, made as a `Wiring` declares them.

`Wires.apply` compares what is there with what should be and mends the difference, so that the first start, a change,
a restart after a crash and somebody's `ip link delete` are one act.  Each part (a namespace's links, a table of
rules, a dnsmasq) is looked at only when it should change or the kernel says that it did (watch.py): doing nothing
costs microseconds, one more port one transaction and one signal.
"""

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from kilonova.companions.wires import dhcp, filters, links, routers, rules
from kilonova.companions.wires.ground import CLOUD, MACHINE, Ground
from kilonova.companions.wires.links import Link, Sight, Space
from kilonova.companions.wires.metadata_proxy import Asker, MetadataProxy, Wsgi
from kilonova.companions.wires.rules import Table
from kilonova.companions.wires.watch import Watch
from kilonova.kit.clock import Clock, iso
from kilonova.kit.errors import Refused, Trouble, Unavailable, Unsupported
from kilonova.model.wiring import NetworkWire, PortWire, Wiring

logger = logging.getLogger(__name__)

ROUNDS = 4  # a mend may need a second look: the far end of a veth exists only after the near one
PROC = Path("/proc/sys/net")  # of the namespace that the thread is in
BRIDGE_CALLS = "bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables"


class Status(msgspec.Struct, frozen=True):
    """For `doctor` and health checks. `problems` are sentences; none: all is as it should be."""

    ground: str
    why: str
    namespace: str | None
    networks: int
    ports: int
    routers: int
    dhcp: int
    applied_at: str | None
    way_out: str
    problems: list[str]


class Wires:
    """One host's data plane.

    `metadata_app` is the metadata service as a WSGI application (None: guests find none); `metadata_secret` signs
    what guests ask it.  Only one `Wires` may act for a state directory at a time.
    """

    def __init__(
        self, ground: Ground, *, metadata_app: Wsgi | None, metadata_secret: str, clock: Clock, state_dir: Path
    ) -> None:
        self.ground, self.clock, self.state_dir = ground, clock, state_dir
        self.lock = threading.RLock()
        self.proxy = MetadataProxy(metadata_app, metadata_secret) if metadata_app else None
        self.wiring: Wiring | None = None  # the last one that was made, whole
        self.applied_at: float | None = None
        self.failed = self.refused = ""
        self.clashes: dict[str, str] = {}  # addresses of the outside → why the machine has none of them
        self.watches: dict[str, Watch] = {}
        self.spaces: dict[str, Space] = {}
        self.tables: dict[tuple[str, str], Table] = {}
        self.servers: dict[str, dhcp.Dnsmasq] = {}
        self.heard: dict[str, int] = {}  # listener's namespace → its identity when the listener was made
        self.announced: dict[str, frozenset[str]] = {}
        self.numbers: dict[str, int] = {}
        self.sight = Sight({})  # the cloud's namespace, when we last looked
        self.strays: set[str] = set()
        self.next_number = 1

    # ---- what others call

    def apply(self, wiring: Wiring) -> None:
        """Makes it so. Raises Refused for a wiring that cannot be, Unavailable where the machine did not obey.

        Safe from several threads, and to repeat; after an error the same call goes on where it stopped.
        """
        with self.lock:
            if not self.ground.wired:
                if wiring.networks:
                    raise Unsupported(
                        "This host has no networks of its own: its guests use QEMU's.", why=self.ground.why
                    )
                return
            if self._quiet() and self.wiring == wiring:
                return
            self.wiring = None
            try:
                filters.checked(wiring)
                self._apply(wiring)
            except Trouble as trouble:
                self.failed = trouble.said
                logger.warning("%s (%s)", trouble.said, trouble.why)
                raise
            except OSError as e:
                self.failed = "This host's network could not be changed."
                raise Unavailable(self.failed, why=str(e)) from e
            self.wiring, self.applied_at, self.failed = wiring, self.clock.now(), ""

    def remove_all(self) -> None:
        """As if there had never been a data plane of this cloud here. Guests' taps lose their bridge."""
        with self.lock:
            if not self.ground.wired:
                return
            self.wiring = None
            if self.proxy:
                for listener in self.proxy.held():
                    self.proxy.stop(listener)
            self.heard.clear()
            for server in self._servers_left():
                server.remove()
            self.servers.clear()
            for name in self.ground.made():
                self.ground.drop(name)
            self._forget(set(self.watches))
            if self.ground.own:
                self.ground.drop(self.ground.name)
            for space in self._outer():
                empty = [Table(f, self._table) for f in ("bridge", "inet", "ip")]
                self.ground.run(["nft", "-f", "-"], space, text="".join(map(rules.remove, empty)))
                sight = links.seen(lambda argv, s=space: self.ground.run(argv, s), False)  # type: ignore[misc]
                lines = links.mend(Space(), sight, self.ground.alias)
                self._batch(space, lines)
            shutil.rmtree(self.ground.runtime, ignore_errors=True)

    def status(self) -> Status:
        with self.lock:
            wiring = self.wiring or Wiring()
            dead = [s.service.network.id for s in self.servers.values() if not s.alive()]
            problems = [f for f in (self.failed, *self.clashes.values()) if f]
            problems += [f"DHCP of network {id} does not run." for id in dead]
            return Status(
                ground=self.ground.kind,
                why=self.ground.why,
                namespace=self.ground.name if self.ground.own else None,
                networks=len(wiring.networks),
                ports=len(wiring.ports),
                routers=len(wiring.routers),
                dhcp=len(self.servers) - len(dead),
                applied_at=iso(self.applied_at),
                way_out=self._way_out(),
                problems=problems,
            )

    def serve_programs(self, path: Path, project_of: Callable[[str], str | None]) -> None:
        """Metadata for guests under QEMU's own networking, over a unix socket in a private folder.

        `guestfwd.command(server_id, path)` is what QEMU runs; `project_of` a server is its project's id, None for a
        server that is unknown.
        """

        def whose(server_id: str) -> Asker | None:
            project = project_of(server_id)
            return None if project is None else Asker(server_id, project)

        if self.proxy:
            self.proxy.serve_programs(path, whose)

    def close(self) -> None:
        """Lets go: no thread, listener or socket of ours stays. Guests keep network and DHCP, but not metadata."""
        with self.lock:
            if self.proxy:
                self.proxy.close()
            for server in self.servers.values():
                server.close()
            self._forget(set(self.watches))
            self.wiring = None

    # ---- is it still so?

    def _quiet(self) -> bool:
        """Nobody changed anything since the last apply."""
        return (
            self._bridges_are_filtered()
            and all(self._stands(name) for name in self.watches)
            and all(w.links_quiet() for w in self.watches.values())
            and all(self.watches[space].rules_quiet() for space in {s for s, _ in self.tables})
            and all(server.alive() for server in self.servers.values())
        )

    def _bridges_are_filtered(self) -> bool:
        """The kernel tells nobody when a setting changes, and this one is what security groups stand on."""
        if CLOUD not in self.spaces:
            return False
        with contextlib.suppress(OSError, Trouble), self.ground.enter(CLOUD):
            if all((PROC / call).read_text() == "1\n" for call in BRIDGE_CALLS):
                return True
        del self.spaces[CLOUD]
        return False

    def _stands(self, space: str) -> bool:
        """Is the namespace the one we watch, or one that was made anew under its name?"""
        if space == MACHINE or (space == CLOUD and not self.ground.own):
            return True
        return self.ground.identity(space or self.ground.name) == self.watches[space].identity

    # ---- making it so

    def _apply(self, wiring: Wiring) -> None:
        self.ground.prepare()
        spaces = self._spaces(wiring)
        self._namespaces(spaces)
        self._rules(wiring, spaces)  # before what they hold for
        self._links(spaces)
        if not self.ground.alone and self._stray(wiring, spaces) != self.strays:
            self.strays = self._stray(wiring, spaces)
            self._rules(wiring, spaces)
        self._serve_dhcp(wiring)
        self._serve_metadata(wiring)
        self._announce(wiring)

    def _spaces(self, wiring: Wiring) -> dict[str, Space]:
        """What every namespace must hold. Pure, but for a look at who else uses the addresses of the outside."""
        g, found = self.ground, {}
        metadata = self.proxy is not None
        mtus = {n.id: n.mtu for n in wiring.networks}
        bridges = {n.id: n.bridge for n in wiring.networks}
        cloud = [Link(n.bridge, "bridge", n.mtu) for n in wiring.networks]
        machine, machine_addresses = [], []
        outer = {s.cidr for n in wiring.networks if n.external for s in n.subnets}
        self.clashes = {cidr: why for cidr, why in self.clashes.items() if cidr in outer}
        for network in wiring.networks:
            if dhcp.wanted(network):
                name = g.inner("dhcp", network.id)
                found[name] = dhcp.space(network, metadata)
                near = dhcp.near(network.id)
                cloud.append(Link(near, "veth", network.mtu, network.bridge, far=(name, dhcp.DEVICE)))
            if network.external:
                near, far = self._host_end(network)
                # Made from the machine's side: its namespace may have no name to call it by.
                machine.append(Link(near, "veth", network.mtu, far=(g.name if g.own else "", far)))
                machine_addresses += [(near, cidr) for cidr in self._gateways(network)]
                cloud.append(Link(far, "end", network.mtu, network.bridge))
        for router in wiring.routers:
            name = g.inner("router", router.id)
            found[name] = routers.space(router, mtus, metadata)
            for leg in routers.legs(router):
                bridge, mtu = bridges[leg.network_id], mtus[leg.network_id]
                cloud.append(Link(leg.near, "veth", mtu, bridge, far=(name, leg.far)))
        cloud += [
            Link(p.device, "tap", mtus[p.network_id], bridges[p.network_id])
            for p in wiring.ports
            if p.network_id in mtus
        ]
        settings = dict.fromkeys(BRIDGE_CALLS, "1")
        if g.own:
            settings |= {"ipv6/conf/default/disable_ipv6": "1"}  # nobody speaks here; guests' own IPv6 only passes
            found[CLOUD] = Space([Link("lo", "loopback"), *cloud], [], [], settings)
            found[MACHINE] = Space(machine, machine_addresses, [], self._forwarding(wiring))
        else:
            settings |= self._forwarding(wiring)
            found[CLOUD] = Space([*machine, *cloud], machine_addresses, [], settings)
        return found

    def _namespaces(self, spaces: dict[str, Space]) -> None:
        """Makes inner namespaces that are missing, and ends those that nobody wants."""
        inner = {n for n in spaces if n not in (CLOUD, MACHINE)}
        for name in self.ground.made() - inner:
            for key, server in list(self.servers.items()):
                if server.service.space == name:
                    self.servers.pop(key).remove()
            if self.proxy:
                self.proxy.stop(name)
            self.heard.pop(name, None)
            self.ground.drop(name)
        self._forget({n for n in self.watches if n not in spaces})
        for name in inner:
            self.ground.make(name)
        for name in spaces:
            if name in self.watches and not self._stands(name):
                self._forget({name})
            if name not in self.watches:
                self.watches[name] = Watch(self.ground, name)

    def _links(self, spaces: dict[str, Space]) -> None:
        """Links, addresses and routes of all namespaces, until a look finds nothing to mend."""
        order = sorted(spaces, key=lambda n: (n not in (CLOUD, MACHINE), n != MACHINE, n))  # near ends before far ones
        for _ in range(ROUNDS):
            sights: dict[str, Sight] = {}
            for name in order:
                if self.spaces.get(name) != spaces[name] or not self.watches[name].links_quiet():
                    self._settings(name, spaces[name])
                    sights[name] = self._look(name, spaces[name])
            self.sight = sights.get(CLOUD, self.sight)
            torn = self._torn(spaces, sights)
            for name in {n for n, which in torn.items() if which and n not in sights}:
                sights[name] = self._look(name, spaces[name])
            busy = False
            for name in (n for n in order if n in sights):
                lines = links.mend(spaces[name], sights[name], self.ground.alias, torn.get(name, ()))
                if lines:
                    busy = True
                    self.spaces.pop(name, None)
                    self._batch(name, lines)
                elif not links.missing_ends(spaces[name], sights[name]):
                    self.spaces[name] = spaces[name]
            if not busy and not any(torn.values()):
                return
        raise Unavailable("This host's network does not become what it should be.", why=self.refused)

    def _look(self, name: str, space: Space) -> Sight:
        self.watches[name].links_seen()
        return links.seen(lambda argv: self.ground.run(argv, name), space.routed)

    def _torn(self, spaces: dict[str, Space], sights: dict[str, Sight]) -> dict[str, set[str]]:
        """Near ends whose far end is not where it should be, by namespace. Such a pair is made anew."""
        torn: dict[str, set[str]] = {}
        missing = {(n, end) for n, sight in sights.items() for end in links.missing_ends(spaces[n], sight)}
        for name in (CLOUD, MACHINE):
            for link in spaces[name].links if name in spaces else ():
                if link.far:
                    far_space = link.far[0] if link.far[0] in spaces else CLOUD
                    if (far_space, link.far[1]) in missing:
                        torn.setdefault(name, set()).add(link.name)
        return torn

    def _settings(self, name: str, space: Space) -> None:
        if not space.settings:
            return
        with self.ground.enter(name):
            for path, value in space.settings.items():
                file = PROC / path
                try:
                    if file.read_text().strip() != value:
                        file.write_text(value)
                except OSError:
                    if path in BRIDGE_CALLS:
                        self._want_bridge_filter(file, value)
                    elif path.startswith("ipv4/"):
                        raise

    def _want_bridge_filter(self, file: Path, value: str) -> None:
        """br_netfilter is a module on most systems. Without it guests would be open: better no network than that."""
        for argv in (["modprobe", "br_netfilter"], ["iptables", "-m", "physdev", "--help"]):
            with contextlib.suppress(Trouble):
                self.ground.run(argv)
        try:
            file.write_text(value)
        except OSError as e:
            raise Refused(
                "Security groups cannot be kept on this host: its kernel does not filter bridges. "
                "Load the module br_netfilter (as root: modprobe br_netfilter) and try again.",
                why=str(e),
            ) from None

    def _batch(self, space: str, lines: list[str]) -> None:
        if lines:
            logger.debug("in %s: %s", space or "the cloud's namespace", "; ".join(lines))
            # A guest's tap may go meanwhile: with -force the other lines still count, and a second look tells.
            try:
                self.ground.run(["ip", "-force", "-batch", "-"], space, text="\n".join(lines) + "\n")
                self.refused = ""
            except Unavailable as e:
                self.refused = e.why

    # ---- rules

    def _rules(self, wiring: Wiring, spaces: dict[str, Space]) -> None:
        """All tables of all namespaces; each namespace in one transaction."""
        groups = filters.Groups()
        guarded = {p.id: filters.guarded(p, groups) for p in wiring.ports if p.secured and p.up}
        for port in wiring.ports:
            if port.device not in self.numbers:
                self.numbers[port.device] = self.next_number
                self.next_number += 1
        for device in self.numbers.keys() - {p.device for p in wiring.ports}:
            del self.numbers[device]
        ours = [one.name for one in spaces[CLOUD].links if one.kind in ("veth", "end") and one.master]
        around = filters.Around(ours, sorted(self.strays), self.ground.alone)
        wanted = {CLOUD: list(filters.tables(wiring, self.ground.tag, guarded, self.numbers, groups, around))}
        for router in wiring.routers:
            wanted[self.ground.inner("router", router.id)] = [routers.nat(router, self.ground.tag)]
        if any(n.external for n in wiring.networks):
            wanted.setdefault(MACHINE if self.ground.own else CLOUD, []).append(self._masquerade(wiring))
        for space in spaces:
            self._load(space, {t.called: t for t in wanted.get(space, ())})

    def _load(self, space: str, wanted: dict[str, Table]) -> None:
        """One transaction for a namespace: nothing where all is there, differences where we know what is there."""
        watch = self.watches[space]
        had = {called: t for (s, called), t in self.tables.items() if s == space}
        if had == wanted and (not wanted or watch.rules_quiet()):
            return
        known = had if watch.rules_quiet() else {}
        text = "".join(rules.delta(known[c], t) if c in known else rules.whole(t) for c, t in wanted.items())
        text += "".join(rules.remove(t) for c, t in had.items() if c not in wanted)
        for called in had:
            del self.tables[space, called]
        before = watch.current()
        try:
            self.ground.run(["nft", "-f", "-"], space, text=text)
        except Unavailable as e:
            raise Unavailable("This host's packet filter could not be changed.", why=e.why) from None
        watch.rules_made(before)
        self.tables |= {(space, called): table for called, table in wanted.items()}

    @property
    def _table(self) -> str:
        return f"kilonova_{self.ground.tag}"

    def _stray(self, wiring: Wiring, spaces: dict[str, Space]) -> set[str]:
        """Devices in bridges of ours that nobody declared; on an external one that is its owner's business."""
        closed = {n.bridge for n in wiring.networks if not n.external}
        known = {one.name for one in spaces[CLOUD].links}
        return {n for n, one in self.sight.links.items() if one.master in closed and n not in known}

    # ---- the outside

    def _host_end(self, network: NetworkWire) -> tuple[str, str]:
        """Names of the machine's own end of an external network, and of the end in its bridge."""
        return f"kx{self.ground.tag}{network.id[:6]}", f"kp{self.ground.tag}{network.id[:6]}"

    def _gateways(self, network: NetworkWire) -> list[str]:
        """The machine's own addresses in an external network: the gateways, where nobody else here uses them."""
        free = [s for s in network.subnets if s.gateway and not self._used_elsewhere(s.cidr, network)]
        return [f"{subnet.gateway}/{subnet.cidr.partition('/')[2]}" for subnet in free]

    def _used_elsewhere(self, cidr: str, network: NetworkWire) -> bool:
        """Has the machine another route for these addresses? Asked again only when its links or routes changed."""
        watch = self.watches.get(MACHINE if self.ground.own else CLOUD)
        if watch is None or not watch.links_quiet() or cidr not in self.clashes:
            version = "-6" if ":" in cidr else "-4"
            asked = self.ground.run(["ip", version, "-j", "route", "show", "root", cidr], MACHINE)
            ours = self._host_end(network)[0]
            routes: list[dict[str, Any]] = msgspec.json.decode(asked or "[]")
            other = next((str(r.get("dev", "?")) for r in routes if r.get("dev") != ours), "")
            said = (
                f"{cidr} is in use on this machine already ({other}): floating IPs do not answer here. Choose others."
            )
            self.clashes[cidr] = said if other else ""
        return bool(self.clashes[cidr])

    def _forwarding(self, wiring: Wiring) -> dict[str, str]:
        """Our own namespace forwards; the machine's only when its owner allowed us to switch that on."""
        external = any(n.external for n in wiring.networks)
        return {"ipv4/ip_forward": "1"} if external and self.ground.forward else {}

    def _masquerade(self, wiring: Wiring) -> Table:
        """Guests get out under the machine's address, where it forwards.

        What only passes a bridge is not on its way out, though the kernel shows it here as well (br_netfilter).
        """
        bridges = [] if self.ground.own else [n.bridge for n in wiring.networks]
        lines = ["type nat hook postrouting priority 100;"]
        for network in wiring.networks:
            for subnet in network.subnets:
                if network.external and subnet.version == 4 and subnet.gateway:
                    inside = ", ".join(map(filters.quoted, [self._host_end(network)[0], *bridges]))
                    lines.append(
                        f"ip saddr {subnet.cidr} ip daddr != {subnet.cidr} oifname != {{ {inside} }} masquerade"
                    )
        return Table("ip", self._table, chains={"outwards": tuple(lines)})

    def _way_out(self) -> str:
        if not self.ground.wired:
            return "by QEMU" if self.ground.forward else "none: QEMU lets guests out where network.forward is set"
        with self.ground.enter(MACHINE):
            forwards = Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1"
            default = any(
                line.split()[1] == "00000000"
                for line in Path("/proc/thread-self/net/route").read_text().splitlines()[1:]
            )
        if not default:
            return "none: this namespace has no default route"
        return "by NAT" if forwards else "none: net.ipv4.ip_forward is 0 on this machine"

    # ---- DHCP, metadata, announcements

    def _serve_dhcp(self, wiring: Wiring) -> None:
        by_network: dict[str, list[PortWire]] = {}
        for port in wiring.ports:
            by_network.setdefault(port.network_id, []).append(port)
        who, metadata = dhcp.user(), self.proxy is not None
        services = {service.key: service for service in dhcp.services(wiring, self.ground)}
        for key in self.servers.keys() - services.keys():
            self.servers.pop(key).remove()
        for key, service in services.items():
            folder = self.ground.runtime / key
            server = self.servers.get(key)
            if server is None or server.service.space != service.space:
                server = self.servers[key] = dhcp.Dnsmasq(self.ground, service, folder)
                server.adopt()
            server.service = service
            ports = by_network.get(service.network.id, [])
            files = dhcp.files(service, ports, folder, wiring.domain, wiring.lease_s, metadata, who)
            if server.place not in (None, self.watches[service.space].identity):
                server.stop()  # it runs on in a namespace that is gone
            if not server.quiet(files):
                server.make(files)
        for stray in self._servers_left():  # of an earlier process
            if stray.service.key not in services:
                stray.remove()

    def _servers_left(self) -> list[dhcp.Dnsmasq]:
        """Every dnsmasq of this cloud, also those of an earlier process, by their folders."""
        nowhere = dhcp.Service("", CLOUD, "", NetworkWire("", ""), [], False)
        left = dict(self.servers)
        for folder in self.ground.runtime.glob("*/conf"):
            key = folder.parent.name
            if key not in left:
                left[key] = dhcp.Dnsmasq(self.ground, msgspec.structs.replace(nowhere, key=key), folder.parent)
        return list(left.values())

    def _serve_metadata(self, wiring: Wiring) -> None:
        if not self.proxy:
            return
        askers: dict[tuple[Any, str], Asker] = {}
        by_network: dict[str, list[tuple[str, Asker]]] = {}
        for port in wiring.ports:
            if port.server_id:
                asker = Asker(port.server_id, port.project_id)
                said = [address for _, address in port.addresses] + [filters.link_local(port.mac)]
                by_network.setdefault(port.network_id, []).extend((address, asker) for address in said)
        wanted: dict[str, list[tuple[str, str]]] = {}
        for network in wiring.networks:
            if dhcp.wanted(network):
                name = self.ground.inner("dhcp", network.id)
                wanted[name] = [(name, dhcp.METADATA)]
                if any(dhcp.answered(s) and s.version == 6 for s in network.subnets):
                    wanted[name].append((f"{name} 6", f"{dhcp.METADATA6}%{dhcp.DEVICE}"))
                for key, _ in wanted[name]:
                    askers |= {(key, address): asker for address, asker in by_network.get(network.id, ())}
        for router in wiring.routers:
            name = self.ground.inner("router", router.id)
            wanted[name] = [(name, dhcp.METADATA)]
            for network_id, _, _ in router.legs:
                askers |= {
                    (name, address): asker for address, asker in by_network.get(network_id, ()) if "." in address
                }
        self.proxy.know(askers)
        held = self.proxy.held()
        for name, addresses in wanted.items():
            identity = self.watches[name].identity
            for key, address in addresses:
                if self.heard.get(key) != identity or key not in held:
                    self.proxy.serve(key, self.ground.listener(address, 80, name))
                    self.heard[key] = identity
        for old in self.heard.keys() - {key for addresses in wanted.values() for key, _ in addresses}:
            self.proxy.stop(old)
            del self.heard[old]

    def _announce(self, wiring: Wiring) -> None:
        """A floating address that moved: neighbours would ask the old router for minutes."""
        now: dict[str, frozenset[str]] = {}
        for router in wiring.routers:
            name = self.ground.inner("router", router.id)
            for leg in routers.legs(router):
                key = f"{leg.near} {self.watches[name].identity}"
                now[key] = frozenset(cidr.partition("/")[0] for cidr in leg.cidrs)
                if fresh := sorted(now[key] - self.announced.get(key, frozenset())):
                    with contextlib.suppress(OSError), self.ground.enter(name):
                        routers.announce(leg.far, leg.mac, fresh)
        self.announced = now

    # ---- letting go

    def _outer(self) -> list[str]:
        return [MACHINE] if self.ground.own else [CLOUD]

    def _forget(self, names: set[str]) -> None:
        """What we know of namespaces that are gone, or no longer ours to know."""
        for name in names:
            if watch := self.watches.pop(name, None):
                watch.close()
            self.spaces.pop(name, None)
            for key in [k for k in self.tables if k[0] == name]:
                del self.tables[key]


__all__ = ["Ground", "Status", "Wires"]
