"""The bus: at least once on the wire, once at the host, in order for each subject, and nobody blocked by another."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kilonova.kit.bus import (
    Agent,
    Answered,
    Call,
    Contract,
    Door,
    Ledger,
    Letter,
    MemoryBus,
    Wake,
    answer_to,
    letter,
    runs,
)
from kilonova.kit.errors import Fault, NoCapacity, Unavailable


class Pong(msgspec.Struct, frozen=True):
    n: int


class Ping(Call[Pong], frozen=True):
    n: int


class Stop(Call[int], frozen=True):
    pass


class Told(msgspec.Struct, frozen=True):
    said: str


pings = Contract("pings")
pings(Ping)
pings(Stop)
pings(Told)


class StillClock:
    at = 1000.0

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


class House:
    """A host whose acts and answers are in our hands: `moods` are raised, `within` is called in the middle of an act."""

    def __init__(self, ledger: Any = None) -> None:
        self.clock, self.acts, self.out = StillClock(), list[int](), list[tuple[str, Answered]]()
        self.moods: list[Exception] = []
        self.within: list[Callable[[], object]] = []
        self.ledger = ledger or Ledger()
        self.agent = self.another_life()

    def another_life(self) -> Agent:
        return Agent(pings, [pinged, stopped], self, self.send, self.ledger, clock=self.clock)

    def send(self, to: str, raw: bytes) -> None:
        m = msgspec.msgpack.decode(raw, type=Letter)
        self.out.append((to, msgspec.msgpack.decode(m.body, type=Answered)))

    def get(self, n: int, key: str = "", **how: Any) -> None:
        self.agent.receive(letter(Ping(n=n), key=key or f"r/{n}", reply="c", **how))


def pinged(house: House, m: Ping) -> Pong:
    house.acts.append(m.n)
    if house.within:
        house.within.pop(0)()
    if house.moods:
        raise house.moods.pop(0)
    return Pong(m.n)


def stopped(house: House, question: Stop) -> int:
    return 7


def answered(n: int) -> tuple[str, Answered]:
    return "c", Answered(f"r/{n}", answer=f'{{"n":{n}}}')


# ---- acting once


def test_a_host_acts_once_a_key_and_gives_the_same_answer_again() -> None:
    house = House()
    house.get(1)
    house.get(1)
    assert house.acts == [1] and house.out == [answered(1)] * 2
    house.agent = house.another_life()
    house.get(1)
    assert house.acts == [1] and house.out == [answered(1)] * 3


def test_the_ledger_survives_the_process(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")
    ledger = Ledger(path)
    house = House(ledger)
    house.get(1)
    house.get(-2, undoes="r/2")
    again = House(Ledger(path))  # the first was killed: it is not closed
    again.get(1)
    again.get(2)
    assert again.acts == [] and again.out[0] == answered(1)
    assert again.out[1][1].fault == Fault("Refused", "It was taken back.")
    ledger.close()


def test_the_ledger_forgets_what_is_older_than_any_patience() -> None:
    house = House()
    house.get(1)
    house.clock.at += 100
    house.get(2)
    assert house.ledger.forget(1050) == 1
    house.get(1)
    house.get(2)
    assert house.acts == [1, 2, 1]


def test_an_act_that_arrives_after_its_undo_does_not_happen() -> None:
    house = House()
    house.get(-1, key="r/9", undoes="r/1")
    house.get(1)
    assert house.acts == [-1] and house.out[1][1].fault == Fault("Refused", "It was taken back.")


def test_an_act_under_way_is_not_begun_again_and_its_undo_comes_after_it() -> None:
    house = House()

    def more() -> None:
        house.get(1, about="s")
        house.get(-1, key="r/9", about="s", undoes="r/1")
        assert house.acts == [1]

    house.within = [more]
    house.get(1, about="s")
    assert house.acts == [1, -1]
    house.get(1, about="s")  # what it did answer stays its answer
    assert house.acts == [1, -1] and house.out[-1] == answered(1)


def test_a_letter_that_comes_too_late_is_not_begun() -> None:
    house = House()
    house.get(1, until=999.0)
    house.get(2, until=1001.0)
    assert house.acts == [2]


def test_too_late_is_judged_when_the_act_would_begin_and_a_newer_copy_has_more_time() -> None:
    house = House()

    def a_long_act() -> None:
        house.get(2, about="s", until=1005.0)
        house.get(3, about="s", until=1005.0)
        house.clock.at = 1010.0
        house.get(3, about="s", until=1020.0)

    house.within = [a_long_act]
    house.get(1, about="s")
    assert house.acts == [1, 3]


# ---- verdicts


def test_a_trouble_is_a_verdict_and_unavailable_is_none() -> None:
    house = House()
    house.moods = [NoCapacity("full", why="a secret"), Unavailable("later")]
    house.get(1)
    house.get(1)
    assert house.acts == [1] and [a.fault for _, a in house.out] == [Fault("NoCapacity", "full")] * 2
    house.get(2)
    assert len(house.out) == 2
    house.get(2)
    assert house.acts == [1, 2, 2] and house.out[2] == answered(2)


def test_other_errors_are_refusals_whose_words_stay_at_home(caplog: pytest.LogCaptureFixture) -> None:
    house = House()
    house.moods = [OSError("/var/lib/secret")]
    house.get(1)
    assert house.out[0][1].fault == Fault("Refused", "The host failed (OSError).") and "/var/lib/secret" in caplog.text


def test_what_a_host_does_not_understand_it_says_and_does_not_remember() -> None:
    house = House()
    assert house.agent.speaks == {"Ping", "Stop"}
    house.agent.receive(letter(Told("of a later release"), key="r/1", reply="c"))
    house.agent.receive(letter(Pong(3), key="r/1", reply="c"))
    assert [a.fault and a.fault.kind for _, a in house.out] == ["Unsupported"] * 2
    house.get(1)
    assert house.acts == [1]


def test_bytes_that_are_no_letter_hurt_nobody() -> None:
    house, dice = House(), random.Random(0)
    whole = letter(Ping(n=1), key="r/1", reply="c", about="s")
    for _ in range(300):
        cut = bytearray(whole[: dice.randrange(len(whole))])
        if cut:
            cut[dice.randrange(len(cut))] = dice.randrange(256)
        house.agent.receive(bytes(cut))
    house.get(5, about="s")
    assert 5 in house.acts and not house.agent.lines and not house.agent.acting


def test_a_ledger_that_fails_does_not_hold_up_the_line(caplog: pytest.LogCaptureFixture) -> None:
    house = House()
    house.within = [lambda: house.get(2, about="s"), house.ledger.close]
    house.get(1, about="s")
    assert house.acts == [1, 2] and not house.agent.lines and "could not be dealt with" in caplog.text


def test_handlers_must_be_in_the_contract() -> None:
    def stray(host: Any, m: Pong) -> int:
        return 1

    with pytest.raises(AssertionError):
        Agent(pings, [stray], None, lambda to, raw: None, Ledger(), clock=StillClock())


# ---- order


def test_acts_about_one_subject_are_done_one_at_a_time_in_order() -> None:
    dice, lock = random.Random(1), threading.Lock()
    at_work: set[str] = set()
    order: dict[str, list[int]] = {}
    overlaps: list[str] = []

    class Act(Call[int], frozen=True):
        subject: str
        n: int

    contract = Contract("acts")
    contract(Act)

    def act(host: None, m: Act) -> int:
        with lock:
            overlaps.extend([m.subject] * (m.subject in at_work))
            at_work.add(m.subject)
            pause = dice.uniform(0, 0.002)
        time.sleep(pause)
        with lock:
            at_work.discard(m.subject)
            order.setdefault(m.subject, []).append(m.n)
        return 1

    bus, done = MemoryBus(), threading.Semaphore(0)
    agent = Agent(contract, [act], None, lambda to, raw: done.release(), Ledger(), clock=StillClock())
    bus.serve("h", agent.receive, threads=1)
    for n in range(20):  # one taker: so the order of arrival is known
        for s in "abcd":
            bus.send("h", letter(Act(subject=s, n=n), key=f"{s}/{n}", about=s, reply="c"))
    for _ in range(80):
        assert done.acquire(timeout=10)
    bus.close()
    assert order == {s: list(range(20)) for s in "abcd"}

    order.clear()
    bus = MemoryBus()
    bus.serve("h", agent.receive, threads=6)
    for n in range(100, 120):
        for s in "abcd":
            bus.send("h", letter(Act(subject=s, n=n), key=f"{s}/{n}", about=s, reply="c"))
    for _ in range(80):
        assert done.acquire(timeout=10)
    bus.close()
    assert overlaps == [] and {s: sorted(ns) for s, ns in order.items()} == {s: list(range(100, 120)) for s in "abcd"}


def test_a_blocked_subject_holds_one_thread_and_others_go_on() -> None:
    blocked, free, done = threading.Event(), threading.Event(), threading.Event()

    def act(host: None, m: Ping) -> int:
        if m.n == 0:
            blocked.set()
            assert free.wait(10)
        elif m.n == 99:
            done.set()
        return 1

    bus = MemoryBus()
    agent = Agent(pings, [act], None, lambda to, raw: None, Ledger(), clock=StillClock())
    bus.serve("h", agent.receive, threads=2)
    for n in range(10):
        bus.send("h", letter(Ping(n=n), key=f"a/{n}", about="a"))
    assert blocked.wait(10)
    bus.send("h", letter(Ping(n=99), key="b/99", about="b"))
    assert done.wait(10) and not free.is_set()
    free.set()
    bus.close()


def test_a_line_has_an_end() -> None:
    house = House()

    def many() -> None:
        for n in range(2, 1000):
            house.get(n, about="s")

    house.within = [many]
    house.get(1, about="s")
    assert len(house.acts) == 1 + Agent.MOST


def test_what_is_about_nothing_does_not_queue() -> None:
    house = House()
    seen: list[int] = []

    def interrupt() -> None:
        house.agent.receive(letter(Stop(), key="r/1/abort", reply="c"))
        seen.append(len(house.out))

    house.within = [interrupt]
    house.get(1, about="s")
    assert seen == [1]


# ---- doors, contracts, and the memory bus


def test_a_door_gives_each_message_to_its_function_and_drops_the_rest() -> None:
    door, got = Door(), list[object]()
    door.on(Wake, got.append)
    door.receive(letter(Wake("r")))
    door.receive(letter(Pong(1)))
    door.receive(b"\x00 nothing")
    door.receive(msgspec.msgpack.encode(Letter("Wake", msgspec.Raw(msgspec.msgpack.encode({"run": 7})))))
    assert got == [Wake("r")]


def test_a_contract_shows_its_shapes_and_answers() -> None:
    assert answer_to(Ping) is Pong and answer_to(Told) is None
    assert set(pings.shapes()) == {"Ping", "Stop", "Told", "Pong"} and runs.names == {"Wake", "Answered"}
    with pytest.raises(AssertionError):
        pings(type("Ping", (msgspec.Struct,), {}))


def test_letters_cross_a_release_border_in_both_directions() -> None:
    """A field that is new is unknown to the old side, and absent from its letters."""
    grown = msgspec.defstruct("Wake", [("run", str), ("why", str, "")], frozen=True)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(grown(run="r", why="w")), type=Wake) == Wake("r")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Wake("r")), type=grown) == grown(run="r")


def test_a_letter_to_nobody_is_lost_and_an_error_kills_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    bus, got, done = MemoryBus(), list[bytes](), threading.Event()

    def receive(raw: bytes) -> None:
        got.append(raw)
        if raw == b"last":
            done.set()
        else:
            raise ValueError

    bus.send("h", b"lost")
    bus.serve("h", receive)
    bus.send("h", b"first")
    bus.send("h", b"last")
    assert done.wait(10) and got == [b"first", b"last"] and "it will come again" in caplog.text
    bus.close()


def test_one_service_ends_and_another_takes_its_place() -> None:
    bus, got = MemoryBus(), list[str]()
    seen = threading.Semaphore(0)

    def receiver(name: str) -> Callable[[bytes], None]:
        def receive(raw: bytes) -> None:
            got.append(name)
            seen.release()

        return receive

    end = bus.serve("h", receiver("old"), threads=3)
    bus.send("h", b"1")
    assert seen.acquire(timeout=10)
    end()
    bus.serve("h", receiver("new"))
    bus.send("h", b"2")
    assert seen.acquire(timeout=10) and got == ["old", "new"]
    bus.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("h-")]
