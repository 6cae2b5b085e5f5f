"""A host as a process has it: threads, a ledger on disk, questions beside commands, reports."""

import random
import threading
import time

import msgspec
import pytest

from kilonova.compute.agent import ComputeHost
from kilonova.compute.sims import SimHosts
from kilonova.contracts.compute import Abandon, ConsoleLog, Destroy, Look, Power, Spawn
from kilonova.contracts.conductor import Report
from kilonova.kit.ask import Asker
from kilonova.kit.bus import Answered, MemoryBus, letter, opened
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.errors import NotFound, Unavailable
from kilonova.model import options
from kilonova.model.machine import Identity, Machine
from kilonova.virt.sim import SimDriver, SimState, copy


class Desk:
    """Where answers and reports come."""

    def __init__(self, bus):
        self.letters, self.news = [], threading.Condition()
        bus.serve("conductor", self.receive)

    def receive(self, raw):
        with self.news:
            self.letters.append(opened(raw))
            self.news.notify_all()

    def wait(self, name, n=1):
        with self.news:
            assert self.news.wait_for(lambda: sum(m.name == name for m in self.letters) >= n, 10)
            return [m for m in self.letters if m.name == name]

    def answers(self, n=1):
        return [msgspec.msgpack.decode(m.body, type=Answered) for m in self.wait("Answered", n)]


def machine(id, epoch=1):
    return Machine(id, id, 1, 64, [], [], Identity(id, id, id, "p"), epoch=epoch)


@pytest.fixture
def house(tmp_path):
    yield House(tmp_path)


class House:
    def __init__(self, directory):
        self.directory, self.bus, self.state = directory, MemoryBus(), SimState()
        self.desk = Desk(self.bus)
        self.host = self.start()

    def start(self, **more):
        self.driver = SimDriver("h", self.state, clock=WallClock(), dice=random.Random(1), options=options.Sim(**more))
        host = ComputeHost("h", self.driver, self.bus, clock=WallClock(), threads=2, directory=self.directory)
        host.start()
        return host

    def send(self, message, key, about="s", **more):
        self.bus.send("h", letter(message, key=key, reply="conductor", about=about, **more))


def test_it_says_how_it_is(house):
    first = msgspec.msgpack.decode(house.desk.wait("Report")[0].body, type=Report)
    assert (first.host, first.facts.hypervisor_type, {s.resource_class for s in first.stocks}) == (
        "h",
        "fake",
        {"VCPU", "MEMORY_MB", "DISK_GB"},
    )
    assert {"Spawn", "Destroy", "Power", "Look", "Abandon"} <= set(first.speaks)
    house.send(Spawn(machine=machine("s")), "r/1")
    house.desk.answers()
    house.host.report_now()
    held = msgspec.msgpack.decode(house.desk.wait("Report", 2)[-1].body, type=Report).holds
    assert [(h.server, h.power_state, h.epoch) for h in held] == [("s", 1, 1)]
    house.driver.guest_shuts_down("s")
    house.desk.wait("PowerChanged")
    house.host.close()


def test_a_restart_forgets_neither_machines_nor_answers(house):
    house.send(Spawn(machine=machine("s")), "r/1")
    house.desk.answers()
    house.host.close()
    house.state.machines["s"].power = "shutdown"
    house.host = house.start()
    house.send(Spawn(machine=machine("s")), "r/1")  # the same letter once more
    house.desk.answers(2)
    assert copy(house.state) == {"s": ("shutdown", 1)}
    house.send(Look(server="s"), "r/2")
    assert msgspec.json.decode(house.desk.answers(3)[-1].answer) == {
        "there": True,
        "power_state": 4,
        "epoch": 1,
        "kept": None,
        "captures": [],
        "ports": [],
        "volumes": [],
        "shares": [],
    }
    house.host.close()


def test_who_is_late_changes_nothing(house):
    house.send(Spawn(machine=machine("s", 5)), "r/1")
    house.send(Spawn(machine=machine("s", 4)), "q/1")
    house.send(Destroy(server="s", epoch=4), "q/2")
    answers = house.desk.answers(3)
    assert answers[1].fault.kind == "Refused"
    assert copy(house.state) == {"s": ("running", 5)}
    house.send(Destroy(server="s", epoch=5), "r/2")
    house.desk.answers(4)
    assert copy(house.state) == {}
    house.host.close()


def test_questions_need_not_wait_for_acts(house):
    house.host.close()
    house.host = house.start(latency_s=1.0)
    asker = Asker(house.bus, clock=WallClock(), ids=Ids())
    for i in range(4):
        house.send(Spawn(machine=machine(f"s{i}")), f"r{i}/1", about=f"s{i}")
    with pytest.raises(NotFound):
        asker.ask("h", ConsoleLog(server="nobody"), 5)
    house.desk.answers(4)
    text = asker.ask("h", ConsoleLog(server="s1"), 5).text
    assert text.endswith("s1 login: ")
    assert asker.ask("h", ConsoleLog(server="s1", lines=0), 5).text == ""
    with pytest.raises(Unavailable):
        asker.ask("elsewhere", ConsoleLog(server="s1"), 0.05)
    assert not asker.waiting
    asker.close()
    house.host.close()


def test_an_abandoned_stop_does_not_wait_for_the_guest(house):
    house.send(Spawn(machine=machine("s")), "r/1")
    house.desk.answers()
    house.state.deaf.add("s")
    began = time.monotonic()
    house.send(Power(server="s", to="stop", timeout_s=30), "r/2")
    while house.host.acts.get("s") != "stop":
        time.sleep(0.01)
    house.send(Abandon(server="s"), "r/2/abort", about="")
    deadline = time.monotonic() + 15
    while house.state.machines["s"].power != "shutdown" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert house.state.machines["s"].power == "shutdown"
    assert time.monotonic() - began < 15
    house.host.close()


def test_hundreds_of_hosts_share_their_threads(tmp_path):
    bus = MemoryBus()
    desk = Desk(bus)
    before = threading.active_count()
    many = SimHosts(bus, clock=WallClock(), options=options.Sim(hosts=300))
    many.start()
    assert threading.active_count() - before <= 6
    assert len({bytes(m.body) for m in desk.wait("Report", 300)}) >= 300
    for name in many.hosts:
        bus.send(name, letter(Spawn(machine=machine(f"on-{name}")), key=f"{name}/1", reply="conductor", about=name))
    desk.answers(300)
    assert all(list(copy(s)) == [f"on-{name}"] for name, s in many.states.items())
    many.close()
    bus.close()
