"""A cloud in one process, or the roles of it that this process has: who is made in which order, handed what, and ended.

Nothing here decides anything; it is the wiring of parts that know nothing of each other.
"""

import logging
import random
import socket
import urllib.parse
from collections.abc import Callable, Container

import msgspec
import sqlalchemy as sa

import kilonova
from kilonova import placement
from kilonova.api import app as compute_api
from kilonova.api import policies
from kilonova.api.host_book import HostBook
from kilonova.api.registry import World
from kilonova.cli import measures
from kilonova.cli.companions import Companions, Everybody
from kilonova.cli.compute import Hosts, ground_of, wires_of
from kilonova.cli.doors import Doors
from kilonova.cli.process import Process, carriers_of, identity_of, login_of, placement_of, topics_of, verify_of
from kilonova.cli.state import Secrets, StateDir
from kilonova.clients import Carrier, Compute, Inside, Outside, RemoteIdentity, Session, neighbours
from kilonova.companions import identity, network, volume
from kilonova.companions.wires import Wires
from kilonova.companions.wires.ground import Ground
from kilonova.conductor import addresses
from kilonova.conductor.app import Conductor
from kilonova.console.proxy import Proxy
from kilonova.console.watch import Tail
from kilonova.contracts.scheduler import Choose, Chosen
from kilonova.contracts.wires import Lay, at
from kilonova.kit.ask import Asker
from kilonova.kit.bus import Wake, letter
from kilonova.kit.clock import Clock, Ids, WallClock
from kilonova.kit.db import Db, Tx
from kilonova.kit.ends import Ends
from kilonova.kit.errors import Refused
from kilonova.kit.health import Check, Health
from kilonova.kit.http import Mount, Server, Wsgi
from kilonova.kit.journal import Said, tell
from kilonova.kit.policy import Policy
from kilonova.kit.reconcile import Reconcilers, reconciler
from kilonova.kit.structs import learn
from kilonova.metadata.app import service as metadata_service
from kilonova.model import notices as words
from kilonova.model import options
from kilonova.model.flavor import Flavor
from kilonova.model.notices import API
from kilonova.scheduler.app import SCHEDULERS, SchedulerRole
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


ROLES = {
    "api": "the Compute API",
    "placement": "the Placement API",
    "metadata": "what guests ask about themselves",
    "conductor": "carries runs, hears hosts, mends",
    "scheduler": "chooses hosts, where [scheduler] apart says so",
    "compute": "a host: runs servers; has no database",
    "console": "the proxy for screens and serial lines, and for what happens",
    "companions": "identity, images, networks, volumes and shares of our own; one process at a time",
}
ALL = frozenset(ROLES) - {"scheduler"}
UNSUNG = frozenset({"api", "placement", "metadata", "console", "companions"})  # who is no service of the compute API
ANSWER_S = 30.0  # so long a scheduler of its own may think


class Cloud:
    """Some roles of a cloud, or all, in this process. `listener` is bound already, and `url` what clients call it;
    `inner` is the same address in a user namespace.  At `consoles` the screens of servers are looked at, if at all.

    Neighbours of this process are called inside it, all others over HTTP; hosts and conductors are on the bus anyhow.
    `start` returns when the API answers; what is still on its way stands at `/readyz`.
    """

    def __init__(
        self,
        config: options.Config,
        state: StateDir,
        secrets: Secrets,
        listener: socket.socket | None,
        url: str,
        inner: socket.socket | None = None,
        consoles: socket.socket | None = None,
        roles: frozenset[str] = ALL,
    ) -> None:
        config = alone(config) if roles >= ALL else config
        self.config, self.state, self.secrets, self.url, self.roles = config, state, secrets, url, roles
        self.process = p = Process(config, state)
        self.db = open_db(config, state)
        self.doors = Doors(p, self.db)
        self.clock, self.ids, self.metrics, self.bus, self.name = p.clock, p.ids, p.metrics, p.bus, p.name
        self.outbox = Outbox(config.notifications, ids=p.ids, me=p.name)
        if self.outbox.on:
            self.db.listen(self.outbox.heard, closely=self.outbox.closely)
        self.whole = roles >= ALL
        self.ground = ground_of(config, state) if "compute" in roles else None

        speaks = {"api", "conductor", *(["companions"] if p.on_wire else [])}
        self.asker = Asker(p.bus, clock=p.clock, ids=p.ids) if roles & speaks else None
        self.companions = self._companions() if "companions" in roles else None
        carriers = self.companions.carriers if self.companions else carriers_of(config)
        self.login = self.companions.login if self.companions else login_of(config, secrets.service_password)
        self.neighbours = neighbours(p.clock, self.login, **carriers, placement=placement_of(config))
        self.gate = (
            self.companions.realm.gate
            if self.companions
            else RemoteIdentity(self.neighbours.identity, p.clock, config.identity.token_cache_s)
        )
        if "placement" in roles:
            inventory = placement.World(self.db, p.clock, p.ids, config.placement)
            self.doors.open("placement", placement.make_service(inventory, self.gate, config.policy.file))
        self.metadata: Wsgi | None = None
        if "metadata" in roles:
            self.metadata = metadata_service(
                self.db, self.neighbours.network, config, clock=p.clock, ids=p.ids, secret=secrets.metadata_secret
            )
        self.wires = (
            _wires(self.ground, self.metadata, secrets, p.clock, state) if self.metadata and self.whole else None
        )
        if self.wires is not None and self.companions is not None and self.companions.networks.apart:
            self.wires.serve_programs(state.metadata, self._project_of)

        if roles & {"api", "companions", "conductor"}:
            self.db.run(_furnish, p.clock.now())
        self.scheduler: Scheduler | SchedulerRole | None = None
        self.conductor = self._conductor() if "conductor" in roles else None
        self.schedules = self._schedules() if "scheduler" in roles else None
        self.console_url = _console_url(config, url, consoles)
        if "api" in roles:
            self._api()
        if self.companions is not None:
            self._tell_of(self.companions)
        self.hosts = None
        if "compute" in roles:
            before = self._wired if self.companions is not None else lambda: None
            self.wired_here = None if self.whole else wires_of(p, self.ground, secrets, self.metadata)
            self.hosts = Hosts(
                p, self.neighbours.image, self.ground, before=before, alone=not self.whole, wires=self.wired_here
            )

        self.health = Health(p.metrics, alive=self._checks(alive=True), ready=self._checks(alive=False))
        apps: dict[str, Wsgi] = {f"/{name}": app for name, app in self.doors.services.items()}
        if self.metadata is not None:
            apps["/metadata"] = self.metadata
        door = Mount(apps, self.health)
        self.tls = identity_of(config)
        self.servers = []
        for way, threads in ((listener, config.api.threads), (inner, 2)):
            if way is not None:
                self.servers.append(Server(door, way, threads=threads, tls=self.tls))
        self.proxy = self._proxy(consoles) if "console" in roles and consoles is not None else None
        self.upkeep = Reconcilers(self, UPKEEP, clock=p.clock, dice=random.Random())
        measures.of(self)

    def start(self) -> None:
        learn()
        if self.companions is not None:
            self.companions.start()
        if self.conductor is not None:
            self.conductor.start()
        if self.schedules is not None:
            self.schedules.start()
        for server in self.servers:
            server.start()
        if self.proxy is not None:
            self.proxy.start()
        if self.hosts is not None:
            self.hosts.start()
        self.upkeep.start()

    def close(self) -> None:
        """Answers what was asked, finishes or parks what runs, lets machines go on."""
        for server in self.servers:
            server.stop()
        if self.proxy is not None:
            self.proxy.stop()
        self.upkeep.close()
        for part in (self.conductor, self.schedules, self.companions, self.hosts):
            if part is not None:
                part.close()
        if self.asker is not None:
            self.asker.close()
        if self.wires is not None:
            self.wires.close()
        self.bus.close()
        self.db.close()

    @property
    def driver(self) -> Driver | None:
        return self.hosts.driver if self.hosts is not None else None

    # ---- parts

    def _companions(self) -> Companions:
        services = None if self.whole else _services(self.config)
        wires, apart = self._wires_of_hosts()
        planes = None if self.whole else self._planes()
        return Companions(
            self.doors, self.secrets, self.url, services=services, wires=wires, apart=apart, planes=planes
        )

    def _planes(self) -> network.Planes | None:
        """The hosts that are machines of their own are told over the broker what networks they must make."""
        asker, p = self.asker, self.process
        if asker is None or self.config.network.plane == "none":
            return None
        patience_s = min(5.0, self.config.workers.lease_s / 6)  # who binds a port waits for it

        def tell(host: str, m: Lay) -> None:
            asker.ask(at(host), m, patience_s)

        return network.Planes(self.db, p.clock, tell, life=p.ids.hex(), gateway=self.config.network.gateway)

    def _wires_of_hosts(self) -> tuple[dict[str, Callable[..., None]] | None, Container[str]]:
        """On this machine there is one host, with a data plane or by QEMU alone; simulated ones have none.

        Hosts that are processes of their own are told over the bus (`_planes`), unless QEMU is all they are to have.
        """
        if not self.whole:
            return (None, Everybody()) if self.config.network.plane == "slirp" else (None, frozenset())
        if self.ground is None:
            return None, frozenset()
        if not self.ground.wired:
            return {}, frozenset({self.name} if self.ground.kind == "qemu" else ())
        return {self.name: lambda wiring: self.wires.apply(wiring) if self.wires else None}, frozenset()

    def _conductor(self) -> Conductor:
        p, config = self.process, self.config
        return Conductor(
            f"{self._called}-conductor",
            self.db,
            p.bus,
            self.neighbours,
            self._asked_over_the_bus if self._apart else self._own_scheduler().choose,
            clock=p.clock,
            ids=p.ids,
            dice=random.Random(),
            config=config,
            listened=topics_of(config),
        )

    @property
    def _apart(self) -> bool:
        """Are schedulers processes of their own?"""
        return self.config.scheduler.apart and self.process.on_wire

    @property
    def _called(self) -> str:
        return self.config.workers.name or self.name

    def _own_scheduler(self) -> Scheduler:
        p, config = self.process, self.config
        self.scheduler = Scheduler(
            self.db,
            clock=p.clock,
            dice=random.Random(),
            options=config.scheduler,
            down_after_s=config.compute.host_down_after_s,
            default_zone=config.api.default_availability_zone,
            build_failures_max=config.compute.build_failures_max,
        )
        return self.scheduler

    def _asked_over_the_bus(self, m: Choose) -> Chosen:
        assert self.asker is not None
        return self.asker.ask(SCHEDULERS, m, ANSWER_S)

    def _schedules(self) -> SchedulerRole:
        p = self.process
        return SchedulerRole(
            f"{self._called}-scheduler",
            self.db,
            p.bus,
            self._own_scheduler(),
            clock=p.clock,
            ids=p.ids,
            dice=random.Random(),
            threads=self.config.workers.threads,
        )

    def _api(self) -> None:
        p, config = self.process, self.config
        assert self.asker is not None
        ends = Ends(self.db, p.clock)
        if self.conductor is not None:
            self.conductor.engine.ended = ends.told
        world = World(
            self.db,
            p.clock,
            p.ids,
            config,
            self.neighbours,
            HostBook(self.db, p.clock, config),
            self._wake,
            self.asker.ask,
            ends.wait,
            outbox=self.outbox,
            console_url=self.console_url,
        )
        service = compute_api.service(world, self.gate, policy_file=config.policy.file)
        if self.outbox.on:
            service.failed = self._told_of
        self.doors.open("compute", service)

    def _told_of(self, e: Exception) -> None:
        """An error of ours, that nobody expected."""
        said = Said(event="compute.exception", binary=API, at=self.clock.now(), of=lambda tx: words.unexpected(e))
        self.db.run(tell, said)

    def _wake(self, run: str) -> None:
        """This run was begun, and is committed. A hint."""
        if self.conductor is not None:
            self.conductor.wake(run)
        else:
            self.bus.send("conductor", letter(Wake(run)))

    def _tell_of(self, companions: Companions) -> None:
        """Companions tell the Compute API of what became of volumes, and servers of what became of their addresses."""
        compute = self.doors.services.get("compute")
        carrier: Carrier = (
            Inside(compute, f"{self.url}/compute")
            if compute
            else Outside(_services(self.config)["compute"], verify=verify_of(self.config))
        )
        told = Session("compute", carrier, self.clock, companions.account)
        companions.volumes.grown = Compute(told).extended
        if self.conductor is not None:
            companions.networks.told = self.conductor.readdress
        else:
            companions.networks.told = lambda servers: addresses.changed(self, servers)

    def started(self, runs: list[str]) -> None:
        """These runs were begun here, and are committed."""
        for run in runs:
            self._wake(run)

    def _proxy(self, consoles: socket.socket) -> Proxy:
        p, config = self.process, self.config
        compute = self.doors.services.get("compute")
        policy = compute.policy if compute else Policy(policies.RULES, config.policy.file)
        tail = Tail(self.db, p.clock, self.gate, policy.allows, most=config.console.connections_max)
        context = self.tls.context() if self.tls else None
        return Proxy(
            self.db,
            consoles,
            clock=p.clock,
            options=config.console,
            tail=tail,
            tls=context,
            hosts_ca_file=config.companions.ca_file,
        )

    def _wired(self) -> None:
        if self.wires is not None and self.companions is not None:
            network.rewire(self.companions.networks)

    def _project_of(self, server: str) -> str | None:
        """Who asks for metadata through QEMU is a server that there is."""
        with self.db.read() as tx:
            found = servers.find(tx, [server])
        return found[server].project_id if server in found else None

    # ---- health

    def _checks(self, *, alive: bool) -> dict[str, Check]:
        found: dict[str, Check] = {"database": self._database}
        if not alive and self.process.on_wire and self.roles & {"api", "conductor", "scheduler"}:
            found["bus"] = self.process.broker_trouble
        if not alive and self.hosts is not None:
            found["hosts"] = self._hosts
        return found

    def _database(self) -> str:
        with self.db.read() as tx:
            tx.execute(sa.text("SELECT 1"))
        return ""

    def _hosts(self) -> str:
        """Ready when a server could be placed somewhere."""
        assert self.hosts is not None
        if self.hosts.failed:
            return self.hosts.failed
        now = self.clock.now()
        with self.db.read() as tx:
            found = hosts.services(tx, binary="nova-compute")
        up = any(
            s.up(now, self.config.compute.host_down_after_s) and s.last_seen and s.last_seen >= self.process.born
            for s in found
        )
        return "" if up else "No host has reported yet."


def alone(config: options.Config) -> options.Config:
    """Where there is one host, a resize that may not stay there would find none."""
    c = config.compute
    if c.allow_resize_to_same_host is not None:
        return config
    one = c.driver != "sim" or config.sim.hosts == 1
    return msgspec.structs.replace(config, compute=msgspec.structs.replace(c, allow_resize_to_same_host=one))


def _services(config: options.Config) -> dict[str, str]:
    """The catalog of a cloud whose roles are processes of their own. Raises Refused for what nobody said."""
    api, own = (config.api.public_url or "").rstrip("/"), (config.companions.url or "").rstrip("/")
    for name, said in (("[api] public_url", api), ("[companions] url", own)):
        if not said:
            raise Refused(f"Nobody says what clients call this cloud: set {name}.")
    ours = {
        "identity": f"{own}/identity",
        "image": f"{own}/image",
        "network": f"{own}/network",
        "block-storage": f"{own}/volume/v3",
        "volumev3": f"{own}/volume/v3",
        "shared-file-system": f"{own}/share/v2",
        "sharev2": f"{own}/share/v2",
    }
    placed = (config.placement.service_url or config.placement.url or f"{api}/placement").rstrip("/")
    return ours | {"compute": f"{api}/compute/v2.1", "placement": placed}


def _console_url(config: options.Config, url: str, consoles: socket.socket | None) -> str:
    if config.console.public_url is not None:
        return config.console.public_url.rstrip("/")
    if consoles is not None:
        return _beside(url, consoles.getsockname()[1])
    return _beside(url, config.console.port)


def _beside(url: str, port: int) -> str:
    """The same machine, another door."""
    at = urllib.parse.urlsplit(url)
    name = f"[{at.hostname}]" if ":" in (at.hostname or "") else at.hostname
    return f"{at.scheme}://{name}:{port}"


def open_db(config: options.Config, state: StateDir) -> Db:
    """The database that is configured, or SQLite in the state directory; with its tables."""
    url = config.database.url.reveal() or f"sqlite:///{state.path / 'kilonova.db'}"
    db = Db(url, threads=config.api.threads + config.workers.threads + config.volume.threads + 8)
    if config.placement.service_url:
        db.owe()
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
    ground = ground_of(config, state)
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


def _wires(ground: Ground | None, app: Wsgi, secrets: Secrets, clock: Clock, state: StateDir) -> Wires | None:
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


# ---- upkeep


@reconciler(every_s=10, at_once=True)
def present(cloud: Cloud) -> list[str]:
    """Roles that are no services of the compute API say that they live, for `kilonova db upgrade --finish`."""
    if not cloud.whole:
        now, born = cloud.clock.now(), cloud.process.born
        with cloud.db.tx() as tx:
            for role in sorted(cloud.roles & UNSUNG):
                hosts.lives(tx, cloud.name, role, uuid=cloud.ids.uuid, now=now, born=born, version=kilonova.__version__)
    return []


@reconciler(every_s=15)
def rewired(cloud: Cloud) -> list[str]:
    """The host's networks are what the tables say."""
    return network.rewire(cloud.companions.networks) if cloud.wires is not None and cloud.companions is not None else []


@reconciler(every_s=5)
def hosts_met(cloud: Cloud) -> list[str]:
    """The networks of hosts that are machines of their own are what the tables say."""
    if cloud.companions is None:
        return []
    return network.meet(cloud.companions.networks, cloud.config.compute.host_down_after_s)


@reconciler(every_s=300)
def keys_rotated(cloud: Cloud) -> list[str]:
    """Tokens get a new key now and then."""
    if cloud.companions is None or not identity.rotate_when_due(cloud.companions.realm, cloud.config.identity):
        return []
    return ["tokens have a new key"]


@reconciler(every_s=5)
def policies_read(cloud: Cloud) -> list[str]:
    """An operator's change of `policy.yaml` holds without a restart."""
    for service in cloud.doors.services.values():
        service.policy.refresh()
    return []


@reconciler(every_s=10)
def volumes_resumed(cloud: Cloud) -> list[str]:
    """What had to wait for a neighbour, or was left by who failed, is gone on with."""
    if cloud.companions is not None:
        volume.resume(cloud.companions.volumes)
    return []


@reconciler(every_s=3600)
def bases_evicted(cloud: Cloud) -> list[str]:
    """Copies of images that no server has used for long make room."""
    if cloud.driver is None:
        return []
    from kilonova.virt.libvirt.driver import LibvirtDriver

    return cloud.driver.evict_images() if isinstance(cloud.driver, LibvirtDriver) else []


UPKEEP = [present, rewired, hosts_met, keys_rotated, policies_read, bases_evicted, volumes_resumed]
