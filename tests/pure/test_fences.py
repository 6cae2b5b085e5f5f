"""A host and the time of those who write to it: what an older sender means must not touch what is newer."""

import random

import msgspec
import pytest

from kilonova.compute.agent import ComputeHost
from kilonova.contracts.compute import Destroy, Done, Look, Seen, Spawn
from kilonova.kit.bus import Answered, Call, MemoryBus, letter, opened
from kilonova.model.machine import Identity, Machine
from kilonova.virt.sim import SimDriver, SimState

ID = "0b1c2d3e-0000-4000-8000-00000000002a"


class StillClock:
    def now(self) -> float:
        return 1000.0

    def sleep(self, seconds: float) -> None: ...


class Wire(MemoryBus):
    """Keeps what is answered."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[Answered] = []

    def send(self, to: str, raw: bytes) -> None:
        m = opened(raw)
        if m is not None and m.name == "Answered":
            self.said.append(msgspec.msgpack.decode(m.body, type=Answered))


class House:
    """One simulated host, and what it answers."""

    def __init__(self) -> None:
        self.wire, self.state, self.keys = Wire(), SimState(), iter(range(1000))
        self.live()

    def live(self) -> None:
        driver = SimDriver("h", self.state, clock=StillClock(), dice=random.Random(1))
        self.host = ComputeHost("h", driver, self.wire, clock=StillClock())

    def ask(self, m: Call[Done] | Call[Seen]) -> Answered:
        self.host.receive(letter(m, key=f"run/{next(self.keys)}", reply="conductor", about=ID))
        return self.wire.said[-1]

    def seen(self) -> Seen:
        return msgspec.json.decode(self.ask(Look(server=ID)).answer or "", type=Seen)


def machine(epoch: int) -> Machine:
    identity = Identity(uuid=ID, name="one", hostname="one", project_id="p")
    return Machine(ID, "instance-0000002a", 1, 64, [], [], identity, epoch=epoch)


@pytest.fixture(params=["the same life", "another life"])
def house(request: pytest.FixtureRequest) -> House:
    """It has a machine of epoch 2; and knows that though it may have been restarted."""
    house = House()
    assert house.ask(Spawn(machine(2))).fault is None
    if request.param == "another life":
        house.live()
    return house


def test_who_is_late_builds_nothing_over_what_is_newer(house: House) -> None:
    house.state.machines[ID].power = "shutdown"
    fault = house.ask(Spawn(machine(1))).fault
    assert fault is not None
    assert fault.kind == "Refused"
    assert (house.seen().epoch, house.state.machines[ID].machine.epoch) == (2, 2)


def test_who_is_late_takes_nothing_back_but_his_own(house: House) -> None:
    assert house.ask(Destroy(server=ID, epoch=1)).fault is None
    assert house.seen().there
    assert house.ask(Destroy(server=ID, epoch=2)).fault is None
    assert not house.seen().there


def test_a_delete_takes_whatever_there_is(house: House) -> None:
    assert house.ask(Destroy(server=ID)).fault is None
    assert not house.seen().there
