"""A whole cloud in one process: who is made in which order, handed what, and ended in the other order.

Nothing here decides anything; it is the wiring of parts that know nothing of each other.
"""

import functools
import logging
import random
import socket
import threading
import urllib.parse
from collections.abc import Callable

import sqlalchemy as sa

from kilonova import placement
from kilonova.api import app as compute_api
from kilonova.api.host_book import HostBook
from kilonova.api.registry import World
from kilonova.cli.state import Secrets, StateDir
from kilonova.clients import Account, Carrier, Compute, Image, Inside, Login, Session, neighbours
from kilonova.companions import identity, image, network, volume
from kilonova.companions.wires import Wires, guestfwd
from kilonova.companions.wires.ground import Ground
from kilonova.compute.agent import ComputeHost, Images
from kilonova.compute.sims import SimHosts
from kilonova.conductor.app import Conductor
from kilonova.console.proxy import Proxy
from kilonova.console.watch import Tail
from kilonova.kit.ask import Asker
from kilonova.kit.bus import MemoryBus
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.db import Db, Tx
from kilonova.kit.ends import Ends
from kilonova.kit.errors import Refused
from kilonova.kit.health import Health, Metrics
from kilonova.kit.http import Mount, Server, Service, Wsgi
from kilonova.kit.reconcile import Reconcilers, reconciler
from kilonova.kit.structs import learn
from kilonova.kit.workflow import RUNS
from kilonova.metadata.app import service as metadata_service
from kilonova.metadata.drive import config_drive
from kilonova.model import options
from kilonova.model.flavor import Flavor
from kilonova.scheduler.select import Scheduler
from kilonova.store import catalog, evolve, hosts, servers
from kilonova.store.notices import Outbox
from kilonova.virt.driver import Driver

log = logging.getLogger(__name__)

# The flavors of a cloud that nobody has furnished yet: DevStack's names; the small ones fit our own guest.
FLAVORS = (
    Flavor("42", "m1.nano", 1, 128, 1),
    Flavor("84", "m1.micro", 1, 192, 1),
    Flavor("1", "m1.tiny", 1, 512, 1),
    Flavor("2", "m1.small", 1, 2048, 20),
    Flavor("3", "m1.medium", 2, 4096, 40),
    Flavor("4", "m1.large", 4, 8192, 80),
)


REOPEN_S = 10.0  # a host that did not come up is tried again


class Cloud:
    """`listener` is bound already, and `url` what clients call it; `inner` is the same address in a user namespace.
    At `consoles` the screens of servers are looked at, if at all.

    `start` returns when the API answers; what is still on its way stands at `/readyz`.
    """

    def __init__(
        self,
        config: options.Config,
        state: StateDir,
        secrets: Secrets,
        listener: socket.socket,
        url: str,
        inner: socket.socket | None = None,
        consoles: socket.socket | None = None,
    ) -> None:
        self.config, self.state, self.secrets, self.url = config, state, secrets, url
        self.clock, self.ids, self.dice = WallClock(), Ids(), random.Random()
        self.name = config.compute.host or socket.gethostname()
        self.metrics, self.bus, self.db = Metrics(), MemoryBus(), open_db(config, state)
        self.outbox = Outbox(config.notifications, ids=self.ids, me=self.name)
        if self.outbox.on:
            self.db.listen(self.outbox.happened)
        self.born = self.clock.now()
        self.failed = ""  # what keeps hosts from coming up, in a sentence

        self.realm = identity.open_realm(
            self.db, self.clock, self.ids, config.identity, state.path / "identity", config.api.public_url
        )
        self.first = identity.bootstrap(
            self.realm,
            state.path / "identity",
            admin_password=secrets.admin_password,
            service_password=secrets.service_password,
            region=config.identity.region,
        )
        self.images = image.open_store(
            self.db, self.clock, self.ids, config.image, config.image.directory or state.path / "images"
        )
        image.recover(self.images)

        self.ground = _ground(config, state)
        wires, apart = self._wires_of_hosts()
        self.networks = network.World(self.db, self.clock, self.ids, config.network, wires, apart)
        network.bootstrap(self.networks, self.first.admin_project_id, way_out=wires is None or bool(wires))
        self.doors: dict[str, Service] = {}
        self.turns = threading.RLock()
        self._open("identity", identity.service(self.realm, config.policy.file))
        self._open("image", image.service(self.images, self.realm.gate, config.policy.file))
        self._open("network", network.make_service(self.networks, self.realm.gate, config.policy.file))

        login = Login(identity.SERVICE_USER, self.first.service_password)
        inside: dict[str, Carrier] = {name: Inside(app, f"{url}/{name}") for name, app in self.doors.items()}
        self.volumes = self._volumes(inside, login)
        self._open("volume", volume.make_service(self.volumes, config.policy.file))
        inside["volume"] = Inside(self.doors["volume"], f"{url}/volume")
        self.neighbours = neighbours(self.clock, login, **inside)
        inventory = placement.World(self.db, self.clock, self.ids, config.placement)
        self._open("placement", placement.make_service(inventory, self.realm.gate, config.policy.file))
        self.metadata = metadata_service(
            self.db, self.neighbours.network, config, clock=self.clock, ids=self.ids, secret=secrets.metadata_secret
        )
        self.wires = _wires(self.ground, self.metadata, secrets, self.clock, state)
        if self.wires is not None and apart:
            self.wires.serve_programs(state.metadata, self._project_of)

        self.db.run(_furnish, self.clock.now())
        down_after_s = config.compute.host_down_after_s
        self.scheduler = Scheduler(
            self.db, clock=self.clock, dice=random.Random(), options=config.scheduler, down_after_s=down_after_s
        )
        self.conductor = Conductor(
            f"{self.name}-conductor",
            self.db,
            self.bus,
            self.neighbours,
            self.scheduler.choose,
            clock=self.clock,
            ids=self.ids,
            dice=random.Random(),
            config=config,
        )
        self.networks.told = self.conductor.readdress
        self.ends = Ends(self.db, self.clock)
        self.conductor.engine.ended = self.ends.told
        self.asker = Asker(self.bus, clock=self.clock, ids=self.ids)
        self.console_url = "" if consoles is None else _beside(url, consoles.getsockname()[1])
        world = World(
            self.db,
            self.clock,
            self.ids,
            config,
            self.neighbours,
            HostBook(self.db, self.clock, config),
            self.conductor.wake,
            self.asker.ask,
            self.ends.wait,
            outbox=self.outbox,
            console_url=self.console_url,
        )
        self._open("compute", compute_api.service(world, self.realm.gate, policy_file=config.policy.file))

        told = Session(
            "compute",
            Inside(self.doors["compute"], f"{url}/compute"),
            self.clock,
            Account(inside["identity"], login, self.clock),
        )
        self.volumes.grown = Compute(told).extended

        self.health = Health(
            self.metrics, alive={"database": self._database}, ready={"database": self._database, "hosts": self._hosts}
        )
        apps = {f"/{name}": app for name, app in self.doors.items()}
        whole = Mount({**apps, "/metadata": self.metadata}, self.health)
        self.servers = [Server(whole, listener, threads=config.api.threads)]
        if inner is not None:
            self.servers.append(Server(whole, inner, threads=2))
        self.proxy = None
        if consoles is not None:
            may, most = self.doors["compute"].policy.allows, config.console.connections_max
            tail = Tail(self.db, self.clock, self.realm.gate, may, most=most)
            self.proxy = Proxy(self.db, consoles, clock=self.clock, options=config.console, tail=tail)
        self.upkeep = Reconcilers(
            self,
            [rewired, keys_rotated, policies_read, bases_evicted, volumes_resumed],
            clock=self.clock,
            dice=random.Random(),
        )
        self.host: ComputeHost | SimHosts | None = None
        self.driver: Driver | None = None
        self.closing = threading.Event()
        self.opening = threading.Thread(target=self._open_hosts, name="hosts", daemon=True)
        _measure(self.metrics, self.db)

    def start(self) -> None:
        learn()
        if self.volumes.crew is not None:
            self.volumes.crew.start()
        volume.recover(self.volumes)
        self.conductor.start()
        for server in self.servers:
            server.start()
        if self.proxy is not None:
            self.proxy.start()
        self.opening.start()
        self.upkeep.start()

    def close(self) -> None:
        """Answers what was asked, finishes or parks what runs, lets machines go on."""
        for server in self.servers:
            server.stop()
        if self.proxy is not None:
            self.proxy.stop()
        self.closing.set()
        self.opening.join(30)
        self.upkeep.close()
        self.conductor.close()
        if self.volumes.crew is not None:
            self.volumes.crew.close()
        if self.host is not None:
            self.host.close()
        if self.driver is not None:
            self.driver.close()
        self.asker.close()
        if self.wires is not None:
            self.wires.close()
        self.bus.close()
        self.db.close()

    # ---- hosts

    def _open_hosts(self) -> None:
        """A hypervisor may take its time, and may not be there yet; the API answers meanwhile."""
        while not self.closing.is_set():
            if self._opened():
                return
            self.closing.wait(REOPEN_S)

    def _opened(self) -> bool:
        try:
            if self.wires is not None:
                network.rewire(self.networks)
            if self.config.compute.driver == "sim":
                self.host = SimHosts(
                    self.bus,
                    clock=self.clock,
                    options=self.config.sim,
                    compute=self.config.compute,
                    directory=self.state.path / "hosts",
                    images=Images(self.neighbours.image),
                )
            else:
                self.driver = self._libvirt()
                self.host = ComputeHost(
                    self.name,
                    self.driver,
                    self.bus,
                    clock=self.clock,
                    options=self.config.compute,
                    threads=self.config.workers.host_threads,
                    directory=self.state.path / "hosts" / self.name,
                    host_ip="127.0.0.1",
                    images=Images(self.neighbours.image),
                )
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

    def _libvirt(self) -> Driver:
        from kilonova.virt.libvirt.driver import LibvirtDriver

        learn()
        compute = self.config.compute
        drive = functools.partial(
            config_drive,
            clock=self.clock,
            ids=self.ids,
            options=self.config.metadata,
            format=compute.config_drive_format,
        )
        return LibvirtDriver(
            self.state.path / "hosts" / self.name,
            options=self.config.libvirt,
            compute=compute,
            clock=self.clock,
            ids=self.ids,
            fetch=Images(self.neighbours.image).fetch,
            config_drive=drive,
            netns=self.ground.netns_path if self.ground else None,
            carry=lambda id: guestfwd.command(id, str(self.state.metadata)),
            outside=self.config.network.forward,
        )

    # ---- parts

    def _open(self, name: str, service: Service) -> None:
        service.observe = self.metrics.observer(name)
        if self.db.engine.dialect.name == "sqlite":
            service.turns = self.turns
        self.doors[name] = service

    def _volumes(self, inside: dict[str, Carrier], login: Login) -> volume.World:
        config = self.config.volume
        account = Account(inside["identity"], login, self.clock)
        return volume.open_store(
            self.db,
            self.clock,
            self.ids,
            config,
            config.directory or self.state.path / "volumes",
            images=Image(Session("image", inside["image"], self.clock, account)),
            host=self.name,
            authenticate=self.realm.gate,
            crew=volume.Crew(config.threads),
        )

    def _wires_of_hosts(self) -> tuple[dict[str, Callable[..., None]] | None, frozenset[str]]:
        """On this machine there is one host, with a data plane or by QEMU alone; simulated ones have none."""
        if self.ground is None:
            return None, frozenset()
        if not self.ground.wired:
            return {}, frozenset({self.name} if self.ground.kind == "qemu" else ())
        return {self.name: lambda wiring: self.wires.apply(wiring) if self.wires else None}, frozenset()

    def _project_of(self, server: str) -> str | None:
        """Who asks for metadata through QEMU is a server that there is."""
        with self.db.read() as tx:
            found = servers.find(tx, [server])
        return found[server].project_id if server in found else None

    def _database(self) -> str:
        with self.db.read() as tx:
            tx.execute(sa.text("SELECT 1"))
        return ""

    def _hosts(self) -> str:
        """Ready when a server could be placed somewhere."""
        if self.failed:
            return self.failed
        now = self.clock.now()
        with self.db.read() as tx:
            found = hosts.services(tx, binary="nova-compute")
        up = any(
            s.up(now, self.config.compute.host_down_after_s) and s.last_seen and s.last_seen >= self.born for s in found
        )
        return "" if up else "No host has reported yet."


def _beside(url: str, port: int) -> str:
    """The same machine, another door."""
    at = urllib.parse.urlsplit(url)
    name = f"[{at.hostname}]" if ":" in (at.hostname or "") else at.hostname
    return f"http://{name}:{port}"


def open_db(config: options.Config, state: StateDir) -> Db:
    """The database that is configured, or SQLite in the state directory; with its tables."""
    url = config.database.url.reveal() or f"sqlite:///{state.path / 'kilonova.db'}"
    db = Db(url, threads=config.api.threads + config.workers.threads + config.volume.threads + 8)
    try:
        if db.sqlite:  # nobody else works with it: what a new release needs is done here and now
            now = evolve.standing(db)
            if now.have and now.pending and not now.unknown:
                from kilonova.store.evolve.upgrade import upgrade

                upgrade(db, finish=True, say=log.info)
        evolve.ready(db)
    except sa.exc.SQLAlchemyError as e:
        said = str(getattr(e, "orig", e)).splitlines()[0]
        raise Refused(f"The database cannot be used: {said}.", why=str(e)) from None
    return db


def purge(config: options.Config, state: StateDir) -> None:
    """All that a cloud has outside its directory: machines, their daemon, networks."""
    ground = _ground(config, state)
    for directory in sorted((state.path / "hosts").glob("*/instances")):
        from kilonova.virt.libvirt.driver import LibvirtDriver

        driver = LibvirtDriver(
            directory.parent,
            options=config.libvirt,
            compute=config.compute,
            clock=WallClock(),
            ids=Ids(),
            fetch=lambda *_: None,
            config_drive=lambda _: b"",
            netns=ground.netns_path if ground else None,
        )
        if any(directory.iterdir()):  # else there is nothing to ask a libvirtd for, which may be what does not work
            for held in driver.machines():
                driver.destroy(held.id)
        driver.close(stop_daemon=True)
    if ground is not None and ground.wired:
        Wires(
            ground, metadata_app=None, metadata_secret="", clock=WallClock(), state_dir=state.path / "wires"
        ).remove_all()


def _ground(config: options.Config, state: StateDir) -> Ground | None:
    """Where networks are made; None where all hosts are simulated."""
    if config.compute.driver == "sim":
        return None
    want = "machine" if config.libvirt.uri else config.network.plane
    ground = Ground.choose(state.path, want, forward=config.network.forward)
    ground.prepare()
    log.info("networks: %s", ground.why)
    return ground


def _wires(ground: Ground | None, app: Wsgi, secrets: Secrets, clock: WallClock, state: StateDir) -> Wires | None:
    if ground is None:
        return None
    return Wires(
        ground, metadata_app=app, metadata_secret=secrets.metadata_secret, clock=clock, state_dir=state.path / "wires"
    )


def _furnish(tx: Tx, now: float) -> None:
    """Flavors, where there are none."""
    if not catalog.flavors(tx, project_id=None, limit=1):
        for flavor in FLAVORS:
            catalog.add_flavor(tx, flavor, now)


def _measure(metrics: Metrics, db: Db) -> None:
    def runs() -> dict[tuple[str, ...], float]:
        with db.read() as tx:
            rows = tx.execute(
                sa.select(RUNS.c.workflow, RUNS.c.state, sa.func.count()).group_by(RUNS.c.workflow, RUNS.c.state)
            )
            return {(workflow, state): float(n) for workflow, state, n in rows}

    metrics.gauge("kilonova_runs", "Runs by workflow and state", runs, ("workflow", "state"))
    metrics.gauge("kilonova_sql_statements", "SQL statements sent", lambda: {(): float(db.statements)})


# ---- upkeep


@reconciler(every_s=15)
def rewired(cloud: Cloud) -> list[str]:
    """The host's networks are what the tables say."""
    return network.rewire(cloud.networks) if cloud.wires is not None else []


@reconciler(every_s=300)
def keys_rotated(cloud: Cloud) -> list[str]:
    """Tokens get a new key now and then."""
    return ["tokens have a new key"] if identity.rotate_when_due(cloud.realm, cloud.config.identity) else []


@reconciler(every_s=5)
def policies_read(cloud: Cloud) -> list[str]:
    """An operator's change of `policy.yaml` holds without a restart."""
    for service in cloud.doors.values():
        service.policy.refresh()
    return []


@reconciler(every_s=10)
def volumes_resumed(cloud: Cloud) -> list[str]:
    """What had to wait for a neighbour, or was left by who failed, is gone on with."""
    volume.resume(cloud.volumes)
    return []


@reconciler(every_s=3600)
def bases_evicted(cloud: Cloud) -> list[str]:
    """Copies of images that no server has used for long make room."""
    from kilonova.virt.libvirt.driver import LibvirtDriver

    return cloud.driver.evict_images() if isinstance(cloud.driver, LibvirtDriver) else []
