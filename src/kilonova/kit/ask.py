"""A question that somebody waits for: what does this guest's console say? Where could this server live?

A command acts and is journaled; a question changes nothing, and is neither.  It goes to an address beside that of
commands (`asked`), so it need not queue behind what a host is at.  The answer comes to an address of who asked;
when nothing came in time there was nobody to answer.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import msgspec

from kilonova.kit.bus import Answered, Call, Contract, Door, Send, answer_to, letter, message_of, opened
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.errors import Fault, Refused, Trouble, Unavailable
from kilonova.kit.log import about

log = logging.getLogger(__name__)

R = TypeVar("R")


class Bus(Protocol):
    """What carries letters: `kit.bus.MemoryBus` in one process, a broker between several."""

    def serve(self, address: str, receive: Callable[[bytes], None], threads: int = 1) -> Callable[[], None]: ...

    def send(self, to: str, raw: bytes) -> None: ...

    def serves(self, address: str) -> bool:
        """Would somebody take it now, as far as this bus can know?"""
        ...


@runtime_checkable
class Breaks(Protocol):
    """A bus that can be away: is it `up`, and since when without a break?"""

    up: bool
    since: float


class WholeBus(Bus, Protocol):
    """All that a bus can do: it serves many addresses with one crew, knows who may listen, and ends."""

    def serve_many(self, receivers: Mapping[str, Callable[[bytes], None]], threads: int = 1) -> Callable[[], None]: ...

    def close(self) -> None: ...


def asked(address: str) -> str:
    """Where the questions go to who takes commands at `address`."""
    return f"{address}.asked"


class Asker:
    """Asks, and waits. Has an address of its own on the bus, where the answers come."""

    MOST = 1000  # questions waited for at the same time

    def __init__(self, bus: Bus, *, clock: Clock, ids: Ids) -> None:
        self.bus, self.clock, self.ids = bus, clock, ids
        self.address = f"asker-{ids.hex()[:12]}"
        self.guard = threading.Lock()
        self.waiting: dict[str, _Waiting] = {}
        door = Door()
        door.on(Answered, self._answered)
        self.close = bus.serve(self.address, door.receive, 1)

    def ask(self, host: str, call: Call[R], timeout_s: float = 10.0) -> R:
        """What `host` says to it. Raises the Trouble that it says; Unavailable when it says nothing in time."""
        key, mine = self.ids.hex(), _Waiting()
        with self.guard:
            if len(self.waiting) >= self.MOST:
                raise Unavailable("Too many questions are waited for.")
            self.waiting[key] = mine
        try:
            self.bus.send(asked(host), letter(call, key=key, reply=self.address, until=self.clock.now() + timeout_s))
            if not mine.news.wait(timeout_s) or mine.answer is None:
                raise Unavailable(f"{host} did not answer in time.", why=type(call).__name__)
        finally:
            with self.guard:
                self.waiting.pop(key, None)
        if mine.answer.fault is not None:
            raise mine.answer.fault.trouble()
        answer: R = msgspec.json.decode(mine.answer.answer or "null", type=answer_to(type(call)))
        return answer

    def _answered(self, m: Answered) -> None:
        with self.guard:
            mine = self.waiting.get(m.key)
        if mine is not None:
            mine.answer = m
            mine.news.set()


class _Waiting:
    def __init__(self) -> None:
        self.news = threading.Event()
        self.answer: Answered | None = None


class Answerer:
    """Answers questions at once, by whichever thread brings them. Handlers are `def choose(me, m: Choose) -> Chosen`."""

    def __init__(self, contract: Contract, handlers: Iterable[Callable[[Any, Any], Any]], me: Any, send: Send) -> None:
        self.me, self.send = me, send
        self.handlers: dict[str, tuple[msgspec.msgpack.Decoder[Any], Callable[[Any, Any], Any]]] = {}
        for h in handlers:
            message = message_of(h)
            assert contract.messages.get(message.__name__) is message, f"{h}: not in the contract {contract.name}"
            self.handlers[message.__name__] = msgspec.msgpack.Decoder(message), h

    def receive(self, raw: bytes) -> None:
        m = opened(raw)
        if m is not None and m.reply:
            with about(**m.names):
                self.send(m.reply, letter(self._answer(m.name, m.key, m.body)))

    def _answer(self, name: str, key: str, body: msgspec.Raw) -> Answered:
        try:
            decoder, handler = self.handlers[name]
            call = decoder.decode(body)
        except (KeyError, msgspec.MsgspecError):
            return Answered(key, fault=Fault("Unsupported", f"Nobody here understands {name}."))
        try:
            return Answered(key, answer=msgspec.json.encode(handler(self.me, call)).decode())
        except Trouble as e:
            return Answered(key, fault=Fault.of(e))
        except Exception as e:
            log.exception("%s could not be answered", name)
            return Answered(key, fault=Fault.of(Refused(f"The host failed ({type(e).__name__}).")))
