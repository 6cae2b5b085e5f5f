"""A whole cloud in one thread, for stories: `cloud.boot(…)`, `server.act("stop")`, `cloud.settle()`, `cloud.check()`.

API, conductor, scheduler, hosts, identity, images and networks are the real ones, on SQLite in a directory of the
test's own; hypervisors are simulated.  Letters lie in a list until `settle` brings them, and time passes when
nothing else can be done.  What must be true of it at rest is `sim.invariants.wrong`, for the simulator the same.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova import placement as placement_api
from kilonova.api.app import service as compute_service
from kilonova.api.host_book import HostBook
from kilonova.api.registry import World as ApiWorld
from kilonova.clients import Compute, Inside, Login, Neighbours, Session, neighbours
from kilonova.companions import network
from kilonova.companions.identity import SERVICE_USER
from kilonova.compute.agent import Images
from kilonova.compute.sims import SimHosts
from kilonova.conductor.app import Conductor
from kilonova.kit.ask import asked
from kilonova.kit.bus import Answered, answer_to, letter, opened
from kilonova.kit.clock import Ids
from kilonova.kit.db import Db, meta
from kilonova.kit.errors import Unavailable
from kilonova.kit.http import Mount
from kilonova.kit.journal import RUNS, over
from kilonova.model import options
from kilonova.model.options import Config
from kilonova.model.server import Server
from kilonova.scheduler.select import Scheduler
from kilonova.sim.invariants import wrong
from kilonova.store import servers
from kilonova.virt.sim import SimDriver, SimState, copies, copy, plugged, seated, shared, used
from tests.cloud.embedded import Embedded, Person

# What a host's process may die before or after.
ACTS = (
    *("spawn", "destroy", "start", "stop", "reboot", "pause", "rebuild", "rescue", "unrescue"),
    *("capture", "captured", "drop_capture"),
    *("attach_share", "detach_share"),
    *("attach_nic", "detach_nic", "attach_volume", "detach_volume", "extend_volume", "swap_volume"),
)


class StoryBus:
    """Letters in one list; who serves an address is called when somebody pumps."""

    def __init__(self) -> None:
        self.doors: dict[str, Callable[[bytes], None]] = {}
        self.letters: deque[tuple[str, bytes]] = deque()
        self.lose: Callable[[str, bytes], bool] = lambda to, raw: False

    def serve(self, address: str, receive: Callable[[bytes], None], threads: int = 1) -> Callable[[], None]:
        self.doors[address] = receive
        return lambda: self.doors.pop(address, None) and None

    def serve_many(self, receivers: Mapping[str, Callable[[bytes], None]], threads: int = 1) -> Callable[[], None]:
        self.doors |= receivers
        return lambda: [self.doors.pop(a, None) for a in receivers] and None

    def serves(self, address: str) -> bool:
        return address in self.doors

    def send(self, to: str, raw: bytes) -> None:
        if not self.lose(to, raw):
            self.letters.append((to, raw))


class Crash(BaseException):
    """The process is no more."""


class Edges:
    """Before and after each commit, letter, request and act: there a process can die. `crash_at`: at the how-manieth."""

    def __init__(self) -> None:
        self.at_work, self.count, self.crash_at = "", 0, 0
        self.kinds: set[str] = set()

    def __call__(self, what: str) -> None:
        if self.at_work:
            self.count += 1
            self.kinds.add(f"{self.at_work}: {what}")
            if self.count == self.crash_at:
                raise Crash(f"{self.at_work}, {what}")

    @contextmanager
    def around(self, what: str) -> Any:
        self(f"before {what}")
        yield
        self(f"after {what}")


class EdgyDb(Db):
    """The database as a conductor has it."""

    def __init__(self, db: Db, edges: Edges) -> None:
        self.__dict__ |= db.__dict__
        self.edges = edges

    @contextmanager
    def tx(self) -> Any:
        with self.edges.around("a commit"), super().tx() as tx:
            yield tx


class Edgy:
    """Anything else: each call of these names has a before and an after."""

    def __init__(self, thing: Any, edges: Edges, *names: str) -> None:
        self.thing, self.edges, self.names = thing, edges, names

    @property
    def __class__(self) -> Any:
        """It can what the thing can: drivers are asked for their protocols."""
        return type(self.thing)

    def __getattr__(self, name: str) -> Any:
        do = getattr(self.thing, name)
        if name not in self.names:
            return do

        def edgy(*args: Any, **more: Any) -> Any:
            with self.edges.around(name):
                return do(*args, **more)

        return edgy


class Cloud:
    """`hosts` simulated ones. Everything is called by whoever tells the story; nothing runs by itself."""

    def __init__(
        self,
        directory: Path,
        *,
        hosts: int = 3,
        config: Config | None = None,
        sim: options.Sim | None = None,
        seed: int = 1,
        down: Iterable[str] = (),
        outside: bool = False,
    ) -> None:
        """`outside`: another Placement service, with a database of its own, is told and asked."""
        self.config = config or Config()
        self.dice = random.Random(seed)
        self.ids = Ids(random.Random(seed))
        self.services = Embedded(directory)
        self.clock, self.db = self.services.clock, self.services.db
        self.bus, self.woken, self.edges = StoryBus(), deque[str](), Edges()
        self.sim = msgspec.structs.replace(sim or options.Sim(cpus=8, memory_mb=16_384, disk_gb=100), hosts=hosts)
        self.states: dict[str, SimState] = {}
        self.ledgers: dict[str, Any] = {}
        self.dead: set[str] = set(down)
        gate = self.services.realm.gate
        self.networks = network.World(self.db, self.clock, self.ids, self.config.network)
        self.network = network.make_service(self.networks, gate)
        url = self.services.url
        first = self.services.first
        login = Login(SERVICE_USER, first.service_password)
        self.outside = self._outside(directory) if outside else None
        self.neighbours: Neighbours = neighbours(
            self.clock,
            login,
            identity=self.services.carrier_of("/identity"),
            image=Edgy(self.services.carrier_of("/image"), self.edges, "send"),
            network=Edgy(Inside(self.network, url + "/network"), self.edges, "send"),
            volume=Edgy(self.services.carrier_of("/volume"), self.edges, "send"),
            share=Edgy(self.services.carrier_of("/share"), self.edges, "send"),
            placement=self.outside,
        )
        self.book = HostBook(self.db, self.clock, self.config)
        self.start_conductor()
        api = ApiWorld(
            self.db,
            self.clock,
            self.ids,
            self.config,
            self.neighbours,
            self.book,
            self.woken.append,
            self.ask,
            self.ended,
        )
        self.api = compute_service(api, gate)
        about = Session(
            "compute", Inside(self.api, url + "/compute"), self.clock, self.neighbours.volume.session.account
        )
        self.services.volumes.grown = Compute(about).extended
        inventory = placement_api.World(self.db, self.clock, self.ids)
        whole = {"/compute": self.api, "/network": self.network}
        whole |= {f"/{name}": getattr(self.services, name) for name in ("identity", "image", "volume", "share")}
        whole |= {"/placement": placement_api.make_service(inventory, gate)}
        self.services.carrier = Inside(Mount(whole, root=self.services.identity), url)
        self.start_hosts()
        self.user = self.services.person("alice", "member")
        self.admin = self.services.admin()
        network.bootstrap(self.networks, first.admin_project_id)
        self.make_flavors()
        self.image_id = self.make_image()
        self.tick()

    def _outside(self, directory: Path) -> Any:
        self.elsewhere = Db(f"sqlite:///{directory}/outside.sqlite")
        meta.create_all(self.elsewhere.engine)
        self.db.owe()
        theirs = placement_api.World(self.elsewhere, self.clock, self.ids)
        self.other = placement_api.make_service(theirs, self.services.realm.gate)
        return Edgy(Inside(self.other, "http://placement.test"), self.edges, "send")

    # -- processes

    def start_conductor(self) -> None:
        """As after a crash: what was in memory is gone."""
        self.scheduler = Scheduler(
            self.db, clock=self.clock, dice=random.Random(self.dice.random()), options=self.config.scheduler
        )
        self.conductor = Conductor(
            "c0",
            EdgyDb(self.db, self.edges),
            Edgy(self.bus, self.edges, "send"),
            self.neighbours,
            self.scheduler.choose,
            clock=self.clock,
            ids=self.ids,
            dice=random.Random(self.dice.random()),
            config=self.config,
        )
        self.conductor.world.wake = self.woken.append
        self.conductor.engine.recover()
        self.bus.serve("conductor", self.conductor.engine.receive)

    def start_hosts(self) -> None:
        """The same: machines are still there."""
        self.clock.sleep(0.001)  # another life begins at another moment
        self.hosts = SimHosts(
            Edgy(self.bus, self.edges, "send"),  # type: ignore[arg-type]
            clock=self.clock,
            options=self.sim,
            compute=self.config.compute,
            states=self.states,
            ledgers=self.ledgers,
            prefix="h",
            images=Images(self.neighbours.image),
        )
        for name, host in self.hosts.hosts.items():
            host.driver = Edgy(host.driver, self.edges, *ACTS)  # type: ignore[assignment]
            host.agent.ledger = Edgy(host.ledger, self.edges, "put")  # type: ignore[assignment]
            self.bus.serve(name, host.receive)
            self.bus.serve(asked(name), host.answer)
        self.report()

    def driver(self, host: str) -> SimDriver:
        """The hypervisor of a host, without edges."""
        driver: SimDriver = self.hosts.hosts[host].driver.thing  # type: ignore[attr-defined]
        return driver

    def report(self) -> None:
        for name, h in self.hosts.hosts.items():
            if name not in self.dead:
                self.bus.send("conductor", letter(h.report()))

    # -- time

    def tick(self) -> None:
        """All letters and wake-ups, until there are none."""
        while self.bus.letters or self.woken:
            while self.bus.letters:
                self.clock.sleep(0.001)
                to, raw = self.bus.letters.popleft()
                if to not in self.dead and (door := self.bus.doors.get(to)):
                    self.at_work(to, door, raw)
            while self.woken:
                self.at_work("conductor", self.conductor.engine.carry, self.woken.popleft())

    def step(self) -> None:
        """One letter, or one wake-up."""
        if self.bus.letters:
            to, raw = self.bus.letters.popleft()
            if to not in self.dead and (door := self.bus.doors.get(to)):
                self.at_work(to, door, raw)
        elif self.woken:
            self.at_work("conductor", self.conductor.engine.carry, self.woken.popleft())

    def at_work(self, who: str, do: Callable[[Any], Any], told: Any) -> None:
        """One thread of one process; if it dies, another life of it begins with what lasts."""
        self.edges.at_work = who if who == "conductor" else "host"
        try:
            do(told)
        except Crash:
            self.edges.at_work = ""
            if who == "conductor":
                self.woken.clear()
                self.start_conductor()
            else:
                self.start_hosts()
        finally:
            self.edges.at_work = ""

    def settle(self, limit_s: float = 4000.0) -> None:
        """Until nobody is at work, and what hosts say was heard once more."""
        until, told = self.clock.now() + limit_s, self.clock.now()
        for _ in range(2):
            self.tick()
            while (due := self.next_due()) is not None and self.clock.now() < until:
                self.clock.at = max(self.clock.at, min(due, told + 10.0))
                if self.clock.now() >= told + 10.0:
                    told = self.clock.now()
                    self.report()
                    self.mend("beats")
                self.at_work("conductor", self.conductor.engine.sweep, 1000)
                self.tick()
            self.report()
            self.tick()
            self.mend("beats")

    def pass_time(self, seconds: float) -> None:
        """Hosts go on to report, reconcilers have their turns."""
        until = self.clock.now() + seconds
        while self.clock.now() < until:
            self.clock.at = min(until, self.clock.now() + 10.0)
            self.report()
            self.tick()
            self.conductor.reconcilers.turn()
            self.conductor.engine.sweep(1000)
            self.tick()

    def go_on(self, seconds: float) -> None:
        """What was begun is carried on, and no host says what it has: what is left then was not swept away."""
        until = self.clock.now() + seconds
        while self.clock.now() < until:
            self.clock.sleep(5.0)
            self.at_work("conductor", self.conductor.engine.sweep, 1000)
            self.tick()

    def next_due(self) -> float | None:
        with self.db.read() as tx:
            at: float | None = tx.execute(sa.select(sa.func.min(RUNS.c.due)).where(RUNS.c.state == "running")).scalar()
            return at

    def crashed(self, at: int) -> "Handle":
        """A server is built, and resized where it came to be; at that boundary its process dies. Some time later."""
        self.edges.count, self.edges.crash_at = 0, at
        s = self.boot(f"s{at}")
        if s.status == "ACTIVE":
            s.act("resize", {"flavorRef": "large"})
        self.edges.crash_at = 0
        self.pass_time(60)
        self.settle()
        return s

    def mend(self, name: str) -> list[str]:
        return self.conductor.reconcilers.run_once(name)

    # -- asking

    def json(
        self, method: str, path: str, body: Any = None, *, ok: int = 200, token: str = "", version: str = "2.96"
    ) -> Any:
        """Of the Compute API, as alice."""
        self.clock.sleep(0.001)
        told = {"OpenStack-API-Version": f"compute {version}"}
        answer = self.services.ask(method, f"/compute/v2.1{path}", body, token or self.user.token, **told)
        said = answer.read()
        assert answer.status == ok, (answer.status, said)
        return msgspec.json.decode(said) if said else None

    def ask(self, host: str, call: Any, timeout_s: float = 10.0) -> Any:
        """A question to a host, answered at once."""
        found: list[Answered] = []
        back = "asker-story"
        self.bus.serve(back, lambda raw: found.append(msgspec.msgpack.decode(opened(raw).body, type=Answered)))  # type: ignore[union-attr]
        self.bus.send(asked(host), letter(call, key="q", reply=back))
        self.tick()
        if not found:
            raise Unavailable(f"{host} did not answer in time.")
        if found[0].fault:
            raise found[0].fault.trouble()
        return msgspec.json.decode(found[0].answer or "null", type=answer_to(type(call)))

    def ended(self, run: str, timeout_s: float) -> bool:
        """Who waits lets the others work meanwhile."""
        self.settle(timeout_s)
        return self.db.look(over, run)

    def make_flavors(self) -> None:
        sizes = {"small": (1, 512, 1), "large": (4, 4096, 20), "huge": (8, 40_000, 20)}
        for name, (vcpus, ram, disk) in sizes.items():
            body = {"flavor": {"name": name, "id": name, "vcpus": vcpus, "ram": ram, "disk": disk}}
            self.json("POST", "/flavors", body, token=self.admin)

    def make_image(self) -> str:
        wish = {"name": "tiny", "disk_format": "raw", "container_format": "bare", "visibility": "public"}
        made = self.services.json("POST", "/image/v2/images", wish, self.admin, ok=201)
        path = f"/image/v2/images/{made['id']}/file"
        self.services.ask("PUT", path, b"\0" * 512, self.admin, Content_Type="application/octet-stream").read()
        id: str = made["id"]
        return id

    def boot(
        self,
        name: str = "one",
        *,
        flavor: str = "small",
        settle: bool = True,
        networks: Any = "auto",
        ok: int = 202,
        hints: dict[str, Any] | None = None,
        **more: Any,
    ) -> "Handle":
        wish = {"name": name, "flavorRef": flavor, "imageRef": self.image_id, "networks": networks, **more}
        body = {"server": wish} | ({"os:scheduler_hints": hints} if hints else {})
        said = self.json("POST", "/servers", body, ok=ok, token=self.admin if "host" in more else "")
        made = Handle(self, said["server"]["id"])
        if settle:
            self.settle()
        return made

    def handle(self, id: str) -> "Handle":
        """A server that somebody has asked for."""
        return Handle(self, id)

    # -- judging

    def check(self) -> list[str]:
        holds = {name: copy(state) for name, state in self.states.items() if name not in self.dead}
        left = {name: copies(state) for name, state in self.states.items() if name not in self.dead}
        nics = {name: plugged(state) for name, state in self.states.items() if name not in self.dead}
        disks = {name: used(state) for name, state in self.states.items() if name not in self.dead}
        sat = {name: seated(state) for name, state in self.states.items() if name not in self.dead}
        trees = {name: shared(state) for name, state in self.states.items() if name not in self.dead}
        return wrong(self.db, holds, copies=left, nics=nics, disks=disks, sat=sat, trees=trees)


class Handle:
    """A server, by its id."""

    def __init__(self, cloud: Cloud, id: str) -> None:
        self.cloud, self.id = cloud, id

    def show(self) -> Any:
        return self.cloud.json("GET", f"/servers/{self.id}", token=self.cloud.admin)["server"]

    @property
    def status(self) -> str:
        text: str = self.show()["status"]
        return text

    @property
    def row(self) -> Server:
        with self.cloud.db.read() as tx:
            return servers.get(tx, self.id)

    def act(self, action: str, said: Any = None, *, settle: bool = True, ok: int = 202) -> Any:
        """ "os-stop", "pause", "reboot" with {"type": "HARD"}, …"""
        answer = self.cloud.json("POST", f"/servers/{self.id}/action", {action: said}, ok=ok)
        if settle:
            self.cloud.settle()
        return answer

    def moves(self) -> Iterator[None]:
        """Live, then at rest and confirmed; told of after each."""
        for told in ({"os-migrateLive": {"host": None, "block_migration": "auto"}}, {"migrate": None}):
            before = self.row.host
            self.cloud.json("POST", f"/servers/{self.id}/action", told, ok=202, token=self.cloud.admin)
            self.cloud.settle()
            if "migrate" in told:
                self.act("confirmResize", ok=204)
            assert self.row.host != before
            yield

    def delete(self, *, settle: bool = True, ok: int = 204) -> None:
        self.cloud.json("DELETE", f"/servers/{self.id}", ok=ok)
        if settle:
            self.cloud.settle()

    def events(self) -> list[tuple[str, str | None]]:
        """(event, result) of all actions, the oldest first."""
        path = f"/servers/{self.id}/os-instance-actions"
        shown = []
        for a in reversed(self.cloud.json("GET", path, token=self.cloud.admin)["instanceActions"]):
            one = self.cloud.json("GET", f"{path}/{a['request_id']}", token=self.cloud.admin)["instanceAction"]
            shown += [(e["event"], e["result"]) for e in one["events"]]
        return shown

    @property
    def state(self) -> SimState:
        host = self.row.host
        assert host is not None
        return self.cloud.states[host]


@contextmanager
def telling(directory: Path, **how: Any) -> Any:
    """A cloud that is well at the end of the story."""
    cloud = Cloud(directory, **how)
    yield cloud
    cloud.settle()
    assert cloud.check() == []
    cloud.db.close()


__all__ = ["Cloud", "Handle", "Person", "StoryBus", "telling", "wrong"]
