"""One name, one machine: who takes another's name is told so, gets nothing, and is not believed."""

import logging
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kilonova.compute.agent import ComputeHost
from kilonova.compute.known import Known
from kilonova.contracts.compute import Met
from kilonova.contracts.conductor import Greeting, Report, alone
from kilonova.kit.bus import Door, MemoryBus, letter
from kilonova.kit.clock import WallClock
from kilonova.kit.errors import Refused, Unavailable
from kilonova.model import options
from kilonova.store import hosts
from kilonova.virt.sim import SimDriver, SimState
from tests.stories import telling

ONE, OTHER = "1" * 36, "2" * 36


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Any]:
    """Its hosts say who they are."""
    with telling(tmp_path, hosts=2) as c:
        for host in c.hosts.hosts.values():
            host.identity = ONE
        c.report()
        c.tick()
        yield c


def told(cloud: Any, identity: str) -> list[Met]:
    """What a machine of this identity is told from now on."""
    heard: list[Met] = []
    door = Door()
    door.on(Met, heard.append)
    cloud.bus.serve(alone(identity), door.receive)
    return heard


def stranger(cloud: Any, name: str = "h0") -> ComputeHost:
    """Another machine of that name, with nothing on it."""
    driver = SimDriver(name, SimState(), clock=cloud.clock, dice=cloud.dice, options=cloud.sim)
    return ComputeHost(name, driver, cloud.bus, clock=cloud.clock, identity=OTHER)


def test_who_is_another_is_told_so_and_not_believed(cloud: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = cloud.boot("one")
    host = server.row.host
    heard, before = told(cloud, OTHER), cloud.json("GET", "/os-services", token=cloud.admin)
    with caplog.at_level(logging.ERROR):
        cloud.bus.send("conductor", letter(stranger(cloud, host).report()))  # it holds nothing
        cloud.settle()
    assert [m.why.split(";")[0] for m in heard] == [f"Another machine is known as {host}"] and heard[0].life == ""
    assert f"a machine that is not {host}" in caplog.text
    assert server.status == "ACTIVE" and cloud.check() == []
    after = cloud.json("GET", "/os-services", token=cloud.admin)
    assert [s["state"] for s in after["services"]] == [s["state"] for s in before["services"]]


def test_its_silence_is_not_broken_by_another(cloud: Any) -> None:
    """What a stranger says does not keep a dead host alive."""
    cloud.boot("one")
    cloud.dead.add("h0")
    for _ in range(12):
        cloud.bus.send("conductor", letter(stranger(cloud).report()))
        cloud.pass_time(10)
    states = {s["host"]: s["state"] for s in cloud.json("GET", "/os-services", token=cloud.admin)["services"]}
    assert (states["h0"], states["h1"]) == ("down", "up")


def test_greetings(cloud: Any) -> None:
    mine, other = told(cloud, ONE), told(cloud, OTHER)
    cloud.bus.send("conductor", letter(Greeting(["h0", "h1"], ONE, "a")))
    cloud.bus.send("conductor", letter(Greeting(["new"], OTHER, "b")))
    cloud.bus.send("conductor", letter(Greeting(["new", "h1"], OTHER, "c")))
    cloud.tick()
    assert mine == [Met("a")] and other[0] == Met("b") and other[1].life == "c" and "known as h1" in other[1].why


def test_a_name_is_free_when_its_service_was_deleted(cloud: Any) -> None:
    services = cloud.json("GET", "/os-services?binary=nova-compute", token=cloud.admin)["services"]
    (id,) = [s["id"] for s in services if s["host"] == "h0"]
    cloud.dead.add("h0")
    cloud.json("DELETE", f"/os-services/{id}", ok=204, token=cloud.admin)
    heard = told(cloud, OTHER)
    cloud.bus.send("conductor", letter(Greeting(["h0"], OTHER, "b")))
    cloud.bus.send("conductor", letter(stranger(cloud).report()))
    cloud.settle()
    assert heard == [Met("b")]
    back = told(cloud, ONE)
    cloud.bus.send("conductor", letter(cloud.hosts.hosts["h0"].report()))  # the former one is the stranger now
    cloud.tick()
    assert len(back) == 1 and back[0].why


def test_who_comes_first_is_the_one_whatever_a_conductor_remembers(cloud: Any) -> None:
    """The service was deleted and another machine has the name; this conductor still knows the former one."""
    world, first, second = cloud.conductor.world, stranger(cloud, "new"), stranger(cloud, "new")
    second.identity = "3" * 36
    heard = told(cloud, second.identity)
    cloud.bus.send("conductor", letter(first.report()))
    cloud.tick()
    world.identities["new"] = second.identity
    cloud.bus.send("conductor", letter(second.report()))
    cloud.tick()
    assert len(heard) == 1 and "known as new" in heard[0].why
    with cloud.db.read() as tx:
        assert hosts.identities(tx, ["new"]) == {"new": OTHER}


# ---- the machine's side


class Desk:
    """A conductor that knows who is called what."""

    def __init__(self, bus: MemoryBus, why: str | None = "") -> None:
        self.bus, self.why = bus, why
        self.door = Door()
        self.door.on(Greeting, self.greeted)
        self.door.on(Report, lambda m: None)
        bus.serve("conductor", self.door.receive)

    def greeted(self, m: Greeting) -> None:
        if self.why is not None:
            self.bus.send(alone(m.identity), letter(Met(m.life, self.why)))


class Hurried(WallClock):
    """An hour a second."""

    def now(self) -> float:
        return super().now() * 3600


@pytest.fixture
def bus() -> Iterator[MemoryBus]:
    one = MemoryBus()
    yield one
    one.close()


def test_who_is_known_begins(bus: MemoryBus) -> None:
    Desk(bus)
    known = Known(["h"], ONE, bus, clock=WallClock(), life="a")
    known.meet()
    waiting = threading.Thread(target=lambda: said.append(known.turned_away()))
    said: list[str] = []
    waiting.start()
    bus.send(alone(ONE), letter(Met("", "Another machine is known as h.")))
    waiting.join(10)
    assert said == ["Another machine is known as h."]
    known.meet()
    known.close()
    assert known.turned_away() == ""


def test_who_is_not_says_why(bus: MemoryBus) -> None:
    Desk(bus, "Another machine is known as h.")
    with pytest.raises(Refused, match="known as h"):
        Known(["h"], ONE, bus, clock=WallClock(), life="a").meet()


def test_an_older_controller_says_nothing_and_a_copy_hears_nothing(bus: MemoryBus) -> None:
    Desk(bus, None)
    known = Known(["h"], ONE, bus, clock=Hurried(), life="a")
    known.meet()

    deaf = MemoryBus()  # the address is another's
    Desk(deaf)
    deaf.serve = lambda address, receive, threads=1: lambda: None  # type: ignore[method-assign,assignment]
    with pytest.raises(Unavailable, match="was its state directory copied"):
        Known(["h"], ONE, deaf, clock=Hurried(), life="b").meet()
    deaf.close()


def test_another_s_answer_is_not_taken(bus: MemoryBus) -> None:
    Desk(bus, None)
    known = Known(["h"], ONE, bus, clock=WallClock(), life="a")
    bus.send(alone(ONE), letter(Met("b", "")))
    bus.send(alone(ONE), letter(Met("a", "No.")))
    with pytest.raises(Refused, match="No"):
        known.meet()
    known.close()


def test_reports_say_which_machine_it_is(bus: MemoryBus) -> None:
    driver = SimDriver("h", SimState(), clock=WallClock(), dice=random.Random(1), options=options.Sim())
    raw = msgspec.msgpack.encode(ComputeHost("h", driver, bus, clock=WallClock(), identity=ONE).report())
    assert msgspec.msgpack.decode(raw, type=Report).identity == ONE
