"""What roles are made of: what a process has whatever its roles are, companions, hosts. `cloud.py` puts them together."""

import functools
import json
import logging
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Container, Mapping
from pathlib import Path

from kilonova.cli.state import Secrets, StateDir, private
from kilonova.clients import Account, Carrier, Image, Inside, Login, Outside, Session
from kilonova.companions import identity, image, network, volume
from kilonova.companions.wires import guestfwd
from kilonova.companions.wires.ground import Ground
from kilonova.compute.agent import ComputeHost, Images
from kilonova.compute.sims import SimHosts
from kilonova.kit import log as logs
from kilonova.kit.ask import WholeBus
from kilonova.kit.bus import MemoryBus
from kilonova.kit.clock import Clock, Ids, WallClock
from kilonova.kit.db import Db, ill
from kilonova.kit.errors import Invalid, Refused
from kilonova.kit.health import Metrics
from kilonova.kit.http import Service
from kilonova.kit.structs import learn
from kilonova.metadata.drive import config_drive
from kilonova.model import options
from kilonova.model.wiring import Wiring
from kilonova.virt.driver import Driver

log = logging.getLogger(__name__)

REOPEN_S = 10.0  # a host that did not come up is tried again
OURS = ("identity", "image", "network", "volume")  # what our own companions are, and where they are mounted


class Process:
    """What all roles of a process share. `db`: where its roles have one; hosts have none."""

    def __init__(self, config: options.Config, state: StateDir, open_db: Callable[[], Db] | None) -> None:
        self.config, self.state = config, state
        self.clock, self.ids, self.metrics = WallClock(), Ids(), Metrics()
        self.name = config.compute.host or socket.gethostname()
        self.bus = _bus(config.bus, self.clock)
        self.has_db = open_db is not None
        if open_db is not None:
            self.db = open_db()
        self.born = self.clock.now()
        self.doors: dict[str, Service] = {}
        self.turns = threading.RLock()

    def open(self, name: str, service: Service) -> Service:
        """From now on it is a service of this process, at `/name`."""
        service.observe, service.ill = self.metrics.observer(name), ill
        if self.db.sqlite:
            service.turns = self.turns
        self.doors[name] = service
        return service

    @property
    def on_wire(self) -> bool:
        """Is there a broker between us and others?"""
        return not isinstance(self.bus, MemoryBus)


def _bus(config: options.Bus, clock: Clock) -> WholeBus:
    """A broker's, where one is configured; else this process's own."""
    urls = [part.strip() for part in config.url.reveal().split(";") if part.strip()]
    if not urls:
        return MemoryBus()
    from kilonova.kit.amqp import AmqpBus

    for url in urls:
        logs.hide(url)
        logs.hide(urllib.parse.unquote(urllib.parse.urlsplit(url).password or ""))
    if bad := [url for url in urls if not url.startswith(("amqp://", "amqps://"))]:
        scheme = bad[0].partition(":")[0]
        raise Invalid(f"[bus] url: a broker's address begins with amqp:// or amqps://, not with {scheme[:10]}.")
    tls: dict[str, object] | None = None
    if any(url.startswith("amqps:") for url in urls):
        files = {"ca_certs": config.ca_file, "certfile": config.cert_file, "keyfile": config.key_file}
        tls = {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": None}
        tls |= {name: str(file) for name, file in files.items() if file is not None}
    return AmqpBus(urls, clock=clock, ssl=tls, heartbeat_s=config.heartbeat_s, prefix=config.prefix)


# ---- neighbours


def login_of(config: options.Config, service_password: str) -> Login:
    """Our own account: at our own identity service, or at a real one."""
    i = config.identity
    if i.url is None:
        return Login(identity.SERVICE_USER, service_password)
    return Login(i.username, i.password.reveal(), i.project_name, i.domain_name, i.domain_name)


def carriers_of(config: options.Config) -> dict[str, Carrier]:
    """How neighbours of other processes are asked. Raises Refused where nobody says where they are."""
    urls = {name: getattr(config, name).url for name in OURS}
    if base := config.companions.url:
        urls = {name: url or f"{base.rstrip('/')}/{name}" for name, url in urls.items()}
    if missing := [name for name in OURS if urls[name] is None and name != "volume"]:
        raise Refused(
            f"Nobody says where the {missing[0]} service is: set [companions] url to where `kilonova serve companions` "
            f"answers, or [{missing[0]}] url to a real one."
        )
    verify: bool | str = str(config.companions.ca_file) if config.companions.ca_file else True
    return {name: Outside(url, verify=verify) for name, url in urls.items() if url is not None}


class Everybody:
    """As a set of hosts: all there are and will be."""

    def __contains__(self, host: object) -> bool:
        return True


# ---- companions


class Companions:
    """Identity, images, networks and volumes of our own. `services`: what the catalog says; None: that all are here.

    `wires`: the hosts whose data plane is here; None where there is none.  `apart`: hosts that make no networks.
    """

    def __init__(
        self,
        process: Process,
        secrets: Secrets,
        url: str,
        *,
        services: Mapping[str, str] | None,
        wires: Mapping[str, Callable[[Wiring], None]] | None,
        apart: Container[str],
    ) -> None:
        p, config, state = process, process.config, process.state
        self.process = p
        home = state.path / "identity"
        self.realm = identity.open_realm(p.db, p.clock, p.ids, config.identity, home, config.api.public_url)
        self.first = identity.bootstrap(
            self.realm,
            home,
            admin_password=secrets.admin_password,
            service_password=secrets.service_password,
            region=config.identity.region,
            services=services,
        )
        images = config.image.directory or state.path / "images"
        self.images = image.open_store(p.db, p.clock, p.ids, config.image, images)
        image.recover(self.images)
        self.networks = network.World(p.db, p.clock, p.ids, config.network, wires, apart)
        network.bootstrap(self.networks, self.first.admin_project_id, way_out=wires is None or bool(wires))
        p.open("identity", identity.service(self.realm, config.policy.file))
        p.open("image", image.service(self.images, self.realm.gate, config.policy.file))
        p.open("network", network.make_service(self.networks, self.realm.gate, config.policy.file))
        self.login = Login(identity.SERVICE_USER, self.first.service_password)
        self.carriers: dict[str, Carrier] = {
            name: Inside(p.doors[name], f"{url}/{name}") for name in ("identity", "image", "network")
        }
        self.volumes = volume.open_store(
            p.db,
            p.clock,
            p.ids,
            config.volume,
            config.volume.directory or state.path / "volumes",
            images=Image(Session("image", self.carriers["image"], p.clock, self.account)),
            host=p.name,
            authenticate=self.realm.gate,
            crew=volume.Crew(config.volume.threads),
        )
        p.open("volume", volume.make_service(self.volumes, config.policy.file))
        self.carriers["volume"] = Inside(p.doors["volume"], f"{url}/volume")

    @property
    def account(self) -> Account:
        return Account(self.carriers["identity"], self.login, self.process.clock)

    def start(self) -> None:
        if self.volumes.crew is not None:
            self.volumes.crew.start()
        volume.recover(self.volumes)

    def close(self) -> None:
        if self.volumes.crew is not None:
            self.volumes.crew.close()


# ---- hosts


class Hosts:
    """The host that this process is, or the simulated ones. A hypervisor may take its time, and may not be there yet.

    `before` is done before each try.  `alone`: this process is a host and no more (`kilonova serve compute`).
    """

    def __init__(
        self,
        process: Process,
        images: Image,
        ground: Ground | None,
        *,
        before: Callable[[], object] = lambda: None,
        alone: bool = False,
    ) -> None:
        self.process, self.images, self.ground = process, Images(images), ground
        self.before, self.alone = before, alone
        self.directory = process.config.sim.directory or process.state.path / "hosts"
        self.host: ComputeHost | SimHosts | None = None
        self.driver: Driver | None = None
        self.failed = ""  # what keeps it from coming up, in a sentence
        self.closing = threading.Event()
        self.opening = threading.Thread(target=self._open, name="hosts", daemon=True)

    def start(self) -> None:
        self.opening.start()

    def close(self) -> None:
        self.closing.set()
        if self.opening.ident is not None:
            self.opening.join(30)
        if self.host is not None:
            self.host.close()
        if self.driver is not None:
            self.driver.close()

    def _open(self) -> None:
        while not self.closing.is_set():
            if self._opened():
                return
            self.closing.wait(REOPEN_S)

    def _opened(self) -> bool:
        try:
            self.before()
            self.host = self._simulated() if self.process.config.compute.driver == "sim" else self._real()
            self.host.start()
        except Exception as e:
            self.failed = str(e) or type(e).__name__
            log.exception("no host came up; it is tried again")
            if self.driver is not None:
                self.driver.close()
                self.driver = None
            return False
        self.failed = ""
        return True

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
            names=sim_names(p.name, sim.hosts) if self.alone else None,
            host_ip=self.address,
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
