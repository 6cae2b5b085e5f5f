"""The host of this machine, or simulated ones: as a part of a whole cloud, or as a process that is nothing else.

That process holds the broker's password and never the database's, and does not even load what speaks to databases.
"""

import functools
import json
import logging
import socket
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from kilonova.cli.host_measures import of_bus, of_hosts
from kilonova.cli.process import Process, carriers_of, identity_of, login_of
from kilonova.cli.state import Secrets, StateDir, private
from kilonova.clients import Image, neighbours
from kilonova.companions.wires import Wires, guestfwd
from kilonova.companions.wires.agent import WiresAgent
from kilonova.companions.wires.ground import Ground
from kilonova.companions.wires.metadata_proxy import forward_to
from kilonova.compute.agent import ComputeHost, Images
from kilonova.compute.known import Known
from kilonova.compute.relay import Relay
from kilonova.compute.sims import SimHosts
from kilonova.kit.clock import Ids
from kilonova.kit.errors import Refused, Trouble
from kilonova.kit.health import Health
from kilonova.kit.http import Mount, Server, Wsgi
from kilonova.kit.structs import learn
from kilonova.metadata.drive import config_drive
from kilonova.model import options
from kilonova.virt.driver import Driver

log = logging.getLogger(__name__)

REOPEN_S = 10.0  # a host that did not come up is tried again


class HostAlone:
    """A host, and no other role. `listener`: where its health is shown, if anywhere."""

    def __init__(
        self, config: options.Config, state: StateDir, secrets: Secrets, listener: socket.socket | None
    ) -> None:
        self.process = p = Process(config, state)
        found = neighbours(p.clock, login_of(config, secrets.service_password), **carriers_of(config))
        ground = ground_of(config, state)
        self.hosts = Hosts(p, found.image, ground, alone=True, wires=wires_of(p, ground, secrets))
        self.health = Health(p.metrics, ready={"bus": self._bus, "hosts": self._hosts})
        of_bus(p.metrics, p.bus)
        of_hosts(p.metrics, lambda: self.hosts.host)
        self.server = (
            None if listener is None else Server(Mount({}, self.health), listener, threads=1, tls=identity_of(config))
        )

    @property
    def name(self) -> str:
        return self.process.name

    def start(self) -> None:
        learn()
        if self.server is not None:
            self.server.start()
        self.hosts.start()

    def close(self) -> None:
        """What is under way has some seconds to end, and else is sent again. Machines go on."""
        if self.server is not None:
            self.server.stop()
        self.hosts.close()
        self.process.bus.close()

    def _bus(self) -> str:
        return self.process.broker_trouble()

    def _hosts(self) -> str:
        return self.hosts.failed or ("" if self.hosts.host is not None else "It is not there yet.")


class Hosts:
    """The host that this process is, or the simulated ones. A hypervisor may take its time, and may not be there yet.

    `before` is done before each try.  `alone`: this process is a host and no more (`kilonova serve compute`).
    `wires`: its networks, where we make them and are told which over the bus.
    """

    def __init__(
        self,
        process: Process,
        images: Image,
        ground: Ground | None,
        *,
        before: Callable[[], object] = lambda: None,
        alone: bool = False,
        wires: WiresAgent | None = None,
    ) -> None:
        self.wires = wires
        self.process, self.images, self.ground = process, Images(images), ground
        self.before, self.alone = before, alone
        self.directory = process.config.sim.directory or process.state.path / "hosts"
        self.host: ComputeHost | SimHosts | None = None
        self.driver: Driver | None = None
        self.failed = ""  # what keeps it from coming up, in a sentence
        self.identity = identity_of_host(process.state.path) if alone and process.on_wire else ""
        self.known: Known | None = None  # where another machine could have our name
        self.closing = threading.Event()
        self.opening = threading.Thread(target=self._open, name="hosts", daemon=True)

    def start(self) -> None:
        if self.wires is not None:
            self.wires.start()
        self.opening.start()

    def close(self) -> None:
        self.closing.set()
        if self.known is not None:
            self.known.close()
        if self.opening.ident is not None:
            self.opening.join(30)
        self._shut()
        if self.wires is not None:
            self.wires.close()

    def _open(self) -> None:
        if self.identity:
            p = self.process
            self.known = Known(self.names, self.identity, p.bus, clock=p.clock, life=p.ids.hex())
        while not self.closing.is_set():
            if not self._opened():
                self.closing.wait(REOPEN_S)
            elif self.known is None:
                return
            elif why := self.known.turned_away():
                self.failed = why
                log.error("this host takes no more commands: %s", why)
                self._shut()
                if self.wires is not None:
                    self.wires.be_deaf()

    def _shut(self) -> None:
        """Machines go on."""
        host, self.host = self.host, None
        if host is not None:
            host.close()
        driver, self.driver = self.driver, None
        if driver is not None:
            driver.close()

    def _opened(self) -> bool:
        try:
            if self.known is not None:
                self.known.meet()
            if self.wires is not None:
                self.wires.listen()
            self.before()
            self.host = self._simulated() if self.process.config.compute.driver == "sim" else self._real()
            self.host.start()
        except Exception as e:
            self.failed = str(e) or type(e).__name__
            log.error("no host came up; it is tried again: %s", self.failed, exc_info=not isinstance(e, Trouble))
            if self.driver is not None:
                self.driver.close()
                self.driver = None
            return False
        self.failed = ""
        return True

    @property
    def names(self) -> list[str]:
        p = self.process
        return sim_names(p.name, p.config.sim.hosts) if p.config.compute.driver == "sim" else [p.name]

    def _simulated(self) -> SimHosts:
        p, sim = self.process, self.process.config.sim
        return SimHosts(
            p.bus,
            clock=p.clock,
            options=sim,
            compute=p.config.compute,
            threads=p.config.workers.host_threads if self.alone else 4,
            directory=self.directory,
            images=self.images,
            names=self.names if self.alone else None,
            host_ip=self.address,
            identity=self.identity,
        )

    def _real(self) -> ComputeHost:
        p = self.process
        self.driver = self._libvirt()
        return ComputeHost(
            p.name,
            self.driver,
            p.bus,
            clock=p.clock,
            options=p.config.compute,
            threads=p.config.workers.host_threads,
            directory=p.state.path / "hosts" / p.name,
            host_ip=self.address,
            images=self.images,
            also_speaks=self.wires.speaks if self.wires is not None else (),
            relay=self._relay() if self.alone else None,
            identity=self.identity,
        )

    def _relay(self) -> Relay:
        """Raises OSError where the address is none of this machine's."""
        p, config = self.process, self.process.config
        tls = identity_of(config)
        return Relay(
            self.address,
            config.compute.console_port,
            clock=p.clock,
            ids=p.ids,
            lasts_s=config.console.token_lifetime_s,
            tls=tls.context() if tls else None,
        )

    @property
    def address(self) -> str:
        """By which other hosts reach this one: said, or the one that a letter to the broker would bear."""
        config = self.process.config
        if config.compute.address is not None:
            return config.compute.address
        broker = urllib.parse.urlsplit(config.bus.url.reveal().partition(";")[0])
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                s.connect((broker.hostname or "127.0.0.1", broker.port or 5672))  # nothing is sent
                return str(s.getsockname()[0])
        except OSError:
            return "127.0.0.1"

    def _libvirt(self) -> Driver:
        from kilonova.virt.libvirt.driver import LibvirtDriver

        learn()
        p, compute = self.process, self.process.config.compute
        drive = functools.partial(
            config_drive,
            clock=p.clock,
            ids=p.ids,
            options=p.config.metadata,
            format=compute.config_drive_format,
        )
        return LibvirtDriver(
            p.state.path / "hosts" / p.name,
            options=p.config.libvirt,
            compute=compute,
            clock=p.clock,
            ids=p.ids,
            fetch=self.images.fetch,
            config_drive=drive,
            netns=self.ground.netns_path if self.ground else None,
            carry=lambda id: guestfwd.command(id, str(p.state.metadata)),
            outside=p.config.network.forward,
            pci=p.config.pci,
            made=p.config.devices,
        )


def sim_names(name: str, n: int) -> list[str]:
    """The hosts of a process that simulates several bear its name and a number."""
    return [name] if n == 1 else [f"{name}-{i}" for i in range(n)]


def same_host(state: Path, name: str, ids: Ids) -> None:
    """The name under which this state directory's machines are known, for ever. Raises Refused for another one.

    A host that came back under a new name would leave its servers behind, and hold their machines as a stranger's.
    """
    file = state / "host.json"
    if not file.exists():
        private(file, json.dumps({"name": name, "id": ids.uuid()}))
        return
    try:
        known = str(json.loads(file.read_text())["name"])
    except (ValueError, KeyError, TypeError):
        raise Refused(f"{file} cannot be understood.") from None
    if known != name:
        raise Refused(
            f"This host is {known}, and its servers are known to be there; it cannot become {name}. Set [compute] host to "
            f"{known}; to make another host of this machine, delete its servers and its compute service, and give it an "
            "empty state directory."
        )


def identity_of_host(state: Path) -> str:
    """Which machine this is, for ever; "" where `same_host` was not called."""
    try:
        return str(json.loads((state / "host.json").read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def wires_of(p: Process, ground: Ground | None, secrets: Secrets, metadata: Wsgi | None = None) -> WiresAgent | None:
    """Of a host that is a machine of a fleet whose networks are ours; None where they are not, or QEMU makes them.

    `metadata`: who answers guests, if that is in this process; else they are led to where the configuration says.
    """
    config = p.config
    if ground is None or not ground.wired or not p.on_wire or config.network.url is not None:
        return None
    if metadata is None and config.metadata.url:
        metadata = forward_to(config.metadata.url, ca_file=config.companions.ca_file)
    made = Wires(
        ground,
        metadata_app=metadata if secrets.metadata_secret else None,
        metadata_secret=secrets.metadata_secret,
        clock=p.clock,
        state_dir=p.state.path / "wires",
    )
    return WiresAgent(p.name, made, p.bus, p.state.path / "wiring.json")


def ground_of(config: options.Config, state: StateDir) -> Ground | None:
    """Where networks are made; None where all hosts are simulated."""
    if config.compute.driver == "sim":
        return None
    want = "machine" if config.libvirt.uri else config.network.plane
    ground = Ground.choose(state.path, want, forward=config.network.forward)
    ground.prepare()
    log.info("networks: %s", ground.why)
    return ground
