"""Letters over a real broker: they come, come again when nobody acknowledged them, and outlast a broker that is away."""

import os
import resource
import threading
import time
from collections import Counter

import msgspec
import pytest

from kilonova.cli.certificates import own
from kilonova.cli.process import bus_of
from kilonova.kit.amqp import BROKEN, AmqpBus
from kilonova.kit.ask import Answerer, Asker, asked
from kilonova.kit.bus import Agent, Call, Contract, Ledger, letter
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.config import Secret
from kilonova.kit.errors import Unavailable
from kilonova.model import options
from tests.engines import rabbit, waited

pings = Contract("pings")


@pings
class Ping(Call[int], frozen=True):
    n: int


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with rabbit(tmp_path_factory.mktemp("rabbit")) as one:
        yield one


@pytest.fixture
def bus(broker):
    made: list[AmqpBus] = []

    def one() -> AmqpBus:
        made.append(
            AmqpBus([broker.url], clock=WallClock(), prefix=f"t{time.monotonic_ns()}" if not made else made[0].prefix)
        )
        return made[-1]

    yield one
    for b in made:
        b.close()


def test_letters_come_and_answers_go_back(bus):
    here, there = bus(), bus()
    there.serve("h0", Agent(pings, [answered], "h0", there.send, Ledger(), clock=WallClock()).receive, threads=3)
    heard, news = Counter(), threading.Event()

    def receive(raw: bytes) -> None:
        heard[raw] += 1
        if len(heard) == 200:
            news.set()

    here.serve("conductor", receive, threads=2)
    waited(lambda: here.up and there.up, 10, "both are connected")
    time.sleep(0.3)  # until the queues are there nobody lives at them
    for n in range(200):
        here.send("h0", letter(Ping(n=n), key=f"k{n}", reply="conductor"))
    assert news.wait(30), len(heard)


def answered(host: str, m: Ping) -> int:
    return m.n + 1


def test_a_question_is_answered_or_nobody_was_there(bus):
    here, there = bus(), bus()
    there.serve(asked("h1"), Answerer(pings, [answered], "h1", there.send).receive)
    asker = Asker(here, clock=WallClock(), ids=Ids())
    waited(lambda: there.up and here.up, 10, "both are connected")
    time.sleep(0.3)
    assert asker.ask("h1", Ping(n=41)) == 42
    with pytest.raises(Unavailable):
        asker.ask("nobody", Ping(n=1), timeout_s=0.5)


def test_what_a_process_died_over_is_delivered_again(bus):
    first, second, sender = bus(), bus(), bus()
    stuck, came, got = threading.Event(), threading.Event(), list[bytes]()

    def hang(raw: bytes) -> None:
        came.set()
        stuck.wait(30)

    first.serve("h2", hang)
    waited(lambda: first.up, 10, "connected")
    time.sleep(0.3)
    sender.send("h2", letter(Ping(n=7)))
    assert came.wait(10)
    for s in first.services:  # as kill -9 leaves it: the connection is gone, nothing was acknowledged
        s.over.set()
        s.under_work = 0
    second.serve("h2", got.append)
    waited(lambda: got, 20, "it came again")
    stuck.set()


def test_letters_wait_for_a_broker_that_is_away_and_old_ones_are_dropped(broker, bus):
    here, there = bus(), bus()
    got = list[bytes]()
    there.serve("h3", got.append)
    waited(lambda: there.up, 10, "connected")
    time.sleep(0.3)
    here.send("h3", letter(Ping(n=0)))
    waited(lambda: len(got) == 1, 10, "the first came")
    broker.stop()
    began = time.monotonic()
    old = letter(Ping(n=1), until=time.time() + 0.5)
    here.send("h3", old)
    for n in range(2, 12):
        here.send("h3", letter(Ping(n=n), until=time.time() + 120))
    assert time.monotonic() - began < 1, "nobody waits for a broker"
    time.sleep(0.6)
    broker.start()
    waited(lambda: len(got) >= 11, 60, "those that are still worth something came")
    time.sleep(0.2)
    assert old not in got and here.dropped == 1


def test_a_process_with_many_files_still_hears(bus):
    """A host of five hundred simulated ones was deaf: `select` knows no file above 1023."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("this machine lets no process have so many files")
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        here, got = bus(), list[bytes]()
        here.serve("h4", got.append)
        waited(lambda: here.up, 10, "connected")
        time.sleep(0.3)
        here.send("h4", letter(Ping(n=4)))
        waited(lambda: got, 10, "it came")
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_nobody_lives_there(bus):
    here = bus()
    here.send("never-served", letter(Ping(n=1)))
    waited(lambda: here.sent == 1, 10, "it went, and was lost")


def test_the_box_has_a_size(monkeypatch, bus):
    monkeypatch.setattr("kilonova.kit.amqp.MOST", 5)
    away = AmqpBus(["amqp://guest:guest@127.0.0.1:1//"], clock=WallClock())
    for n in range(9):
        away.send("x", msgspec.msgpack.encode(n))
    assert away.dropped == 4 and len(away.box) == 5
    away.over.set()


def test_brokers_are_held_to_their_certificates(tmp_path):
    """amqps, as a configuration says it: letters pass; a broker of another authority is none."""
    identity, ca = own(tmp_path / "tls", ["127.0.0.1"], time.time())
    _, other = own(tmp_path / "other", ["127.0.0.1"], time.time())
    with rabbit(tmp_path / "mq", (identity.cert_file, identity.key_file)) as broker:
        said = options.Bus(url=Secret(broker.url), ca_file=ca)
        here, got = bus_of(said, WallClock()), list[bytes]()
        try:
            here.serve("h5", got.append)
            waited(lambda: here.up, 10, "connected")
            time.sleep(0.3)
            here.send("h5", letter(Ping(n=5)))
            waited(lambda: got, 10, "it came")
        finally:
            here.close()
        wrong = options.Bus(url=Secret(broker.url), ca_file=other)
        with pytest.raises(BROKEN, match=r"(?i)certificate"):
            bus_of(wrong, WallClock()).connection().connect()
