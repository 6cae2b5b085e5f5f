"""Messages are the interface: one Struct a question, its answer named in its base class.

A command is sent *at least once* and acted on *once*: its letter carries a key, and the host's ledger gives the
same answer to the same key.  There is no waiting call here.  The answer is a letter of its own, to whoever
carries the run by then, so nobody holds a thread, a socket or a temporary queue meanwhile.

Nothing in here needs a database server: a host imports this file and no other of the run engine's.
"""

import inspect
import logging
import sqlite3
import threading
import typing
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Protocol, TypeVar, cast

import msgspec

from kilonova.kit import log as logs
from kilonova.kit.clock import Clock
from kilonova.kit.errors import Fault, Refused, Trouble, Unavailable

log = logging.getLogger(__name__)

R = TypeVar("R")
M = TypeVar("M", bound=msgspec.Struct)

Send = Callable[[str, bytes], None]
"""`send(address, raw)`: hand a letter to the wire. It may get lost, doubled, late; nobody may count on it."""


class Call(msgspec.Struct, Generic[R], frozen=True, kw_only=True):
    """A question to a host; what comes back is an R."""


class To(msgspec.Struct, Generic[R], frozen=True):
    """Where a question goes. A step annotated `-> To[Spawned]` comes back with a Spawned."""

    host: str
    call: Call[R]


class Contract:
    """The messages that one kind of service understands. They may grow; nothing is renamed or removed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.messages: dict[str, type[msgspec.Struct]] = {}

    def __call__(self, cls: type[M]) -> type[M]:
        """As a decorator: this Struct is one of ours."""
        assert self.messages.setdefault(cls.__name__, cls) is cls, f"{self.name} has a {cls.__name__} already"
        return cls

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.messages)

    def shapes(self) -> dict[str, Any]:
        """Every message, and every answer, as JSON Schema: to be compared with those of the last release."""
        answers = [a for m in self.messages.values() if (a := answer_to(m)) is not None]
        return msgspec.json.schema_components([*self.messages.values(), *answers])[1]


def answer_to(message: type[msgspec.Struct]) -> Any:
    """The R of a `Call[R]`; None for a message that is told and not asked."""
    for base in getattr(message, "__orig_bases__", ()):
        if typing.get_origin(base) is Call:
            return typing.get_args(base)[0]
    return None


# ---- what crosses the wire


class Letter(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str  # which message
    body: msgspec.Raw  # the message itself
    key: str = ""  # the same key: the same act, not another
    reply: str = ""  # who wants the answer
    about: str = ""  # acts about the same subject are done one at a time, in the order of their letters
    undoes: str = ""  # this act takes back the one with that key, which from now on must never happen
    until: float = 0.0  # not to be begun later than this; the sender will think it dead
    names: dict[str, str] = {}  # whose request it was: what the receiver's log shall say, too


def letter(
    message: msgspec.Struct, *, key: str = "", reply: str = "", about: str = "", undoes: str = "", until: float = 0.0
) -> bytes:
    """A message in its envelope, as msgpack. It bears the names of the request that we are at (`log.about`)."""
    raw = msgspec.Raw(msgspec.msgpack.encode(message))
    names = {name: id for name, id in logs.named().items() if name in TRAVEL}
    return _PACK.encode(Letter(type(message).__name__, raw, key, reply, about, undoes, until, names))


def opened(raw: bytes) -> Letter | None:
    """The envelope. None, and a line in the log, for what is no letter: such bytes are no better the next time."""
    try:
        return _LETTER.decode(raw)
    except MALFORMED as e:
        log.warning("%d bytes that are no letter were dropped: %s", len(raw), e)
        return None


TRAVEL = frozenset({"request_id", "global_request_id", "run"})
MALFORMED = msgspec.MsgspecError, UnicodeDecodeError, RecursionError  # msgspec lets the others through
_PACK = msgspec.msgpack.Encoder()
_LETTER = msgspec.msgpack.Decoder(Letter)

runs = Contract("runs")


@runs
class Answered(msgspec.Struct, frozen=True):
    """What came of the command with this key. The answer is JSON: it goes into the journal as it came."""

    key: str
    answer: str | None = None
    fault: Fault | None = None


@runs
class Wake(msgspec.Struct, frozen=True):
    """A hint: this run may have something to do. Lost hints cost time, nothing else."""

    run: str


class Door:
    """What comes to one address, given to the function that is there for messages of that name."""

    def __init__(self) -> None:
        self.ways: dict[str, tuple[msgspec.msgpack.Decoder[Any], Callable[[Any], object]]] = {}

    def on(self, message: type[M], do: Callable[[M], object]) -> None:
        """From now on `do` is called with each letter that holds such a message. It may come twice."""
        self.ways[message.__name__] = msgspec.msgpack.Decoder(message), do

    def receive(self, raw: bytes) -> None:
        m = opened(raw)
        if m is None:
            return
        if m.name not in self.ways:  # of a newer release, as a rule
            log.info("a letter with a %s was dropped: nobody here knows it", m.name)
            return
        decoder, do = self.ways[m.name]
        try:
            message = decoder.decode(m.body)
        except MALFORMED as e:
            log.warning("a letter with a malformed %s was dropped: %s", m.name, e)
            return
        do(message)


# ---- the host's side


class Remembers(Protocol):
    """A ledger, to an agent. What was put stays, whatever becomes of the process; the first word counts."""

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, answer: bytes, at: float) -> None: ...


class Ledger:
    """What this host has answered, on its own disk: a restart must not forget that it acted.

    WAL with `synchronous = NORMAL`: a line outlives the process as soon as it is written, and the machine's loss
    of power but for the last moments.  Then its guests are gone as well, and what it holds is compared, not believed.
    """

    def __init__(self, path: str = ":memory:") -> None:
        self.lock = threading.Lock()
        self.db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "busy_timeout = 5000"):
            self.db.execute(f"PRAGMA {pragma}")
        self.db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer BLOB, at REAL) WITHOUT ROWID")
        self.db.execute("CREATE INDEX IF NOT EXISTS answers_at ON answers (at)")

    def get(self, key: str) -> bytes | None:
        with self.lock:
            row = self.db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def put(self, key: str, answer: bytes, at: float) -> None:
        """The first answer to a key is the answer; `at` (seconds since 1970) is for `forget`."""
        with self.lock:
            self.db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, answer, at))

    def forget(self, before: float) -> int:
        """Drop what is older than any sender's patience: nobody will ask again. How many lines went."""
        with self.lock:
            return self.db.execute("DELETE FROM answers WHERE at < ?", (before,)).rowcount

    def close(self) -> None:
        with self.lock:
            self.db.close()


class Agent:
    """Takes letters for a host: acts once a key, one act at a time a subject, and answers.

    Handlers are `def spawn(host, m: Spawn) -> Spawned`, found by the annotation of their second parameter.  A
    Trouble is a verdict and travels as a fault; `Unavailable` is none: nothing is answered, the letter will come
    again.  Any other exception is a refusal whose words stay in this host's log.

    Any number of threads may call `receive`.  A subject that is busy costs one thread: letters about it wait in
    its line, in memory, and whoever is in it goes on with them.  What is lost with the process is sent again.
    """

    MOST = 100  # letters in one line; more are dropped, and come again

    def __init__(
        self,
        contract: Contract,
        handlers: Iterable[Callable[[Any, Any], Any]],
        host: Any,
        send: Send,
        ledger: Remembers,
        *,
        clock: Clock,
    ) -> None:
        self.contract, self.host, self.send, self.ledger, self.clock = contract, host, send, ledger, clock
        self.handlers: dict[str, tuple[msgspec.msgpack.Decoder[Any], Callable[[Any, Any], Any]]] = {}
        for h in handlers:
            message = message_of(h)
            assert contract.messages.get(message.__name__) is message, f"{h}: not in the contract {contract.name}"
            self.handlers[message.__name__] = msgspec.msgpack.Decoder(message), h
        self.guard = threading.Lock()  # of the two below
        self.acting: set[str] = set()  # keys that somebody is at
        self.lines: dict[str, dict[str, Letter]] = {}  # of each busy subject: who waits, by key

    @property
    def speaks(self) -> frozenset[str]:
        """The names of the messages that this host understands."""
        return frozenset(self.handlers)

    def receive(self, raw: bytes) -> None:
        todo = opened(raw)
        if todo is not None and not self._begin(todo):
            todo = None
        while todo is not None:
            try:
                self._deal(todo)
            except Exception:  # a full disk under the ledger, a broken wire: the others in line must not wait for it
                log.exception("a %s could not be dealt with; it will come again", todo.name)
            todo = self._next(todo)

    def _begin(self, m: Letter) -> bool:
        """May this thread act on it now? If not, the letter is in line, or its act is under way already."""
        with self.guard:
            if m.key and m.key in self.acting:
                return False
            if m.about:
                if (line := self.lines.get(m.about)) is not None:
                    if m.key in line or len(line) < self.MOST:
                        line[m.key] = m  # a newer copy has more time left, and takes the older one's place
                    return False
                self.lines[m.about] = {}
            self.acting.add(m.key)
            return True

    def _next(self, m: Letter) -> Letter | None:
        with self.guard:
            self.acting.discard(m.key)
            if not m.about:
                return None
            line = self.lines[m.about]
            if not line:
                del self.lines[m.about]
                return None
            following = line.pop(next(iter(line)))
            self.acting.add(following.key)
            return following

    def _deal(self, m: Letter) -> None:
        if m.until and self.clock.now() > m.until:
            return  # too late to begin
        if m.undoes:  # the act itself may still be on its way: it will find this, and not happen
            taken_back = Answered(m.undoes, fault=Fault("Refused", "It was taken back."))
            self.ledger.put(m.undoes, letter(taken_back), self.clock.now())
        answer = self.ledger.get(m.key) if m.key else None
        if answer is None:
            with logs.about(**m.names, server=m.about):
                began = self.clock.now()
                answer = self._act(m)
                log.info("%s took %.1f s", m.name, self.clock.now() - began)
        if answer is not None and m.reply:
            self.send(m.reply, answer)

    def _act(self, m: Letter) -> bytes | None:
        try:
            decoder, handler = self.handlers[m.name]
            call = decoder.decode(m.body)
        except (KeyError, *MALFORMED):  # not remembered: after an update we may well understand it
            return letter(Answered(m.key, fault=Fault("Unsupported", f"This host does not understand {m.name}.")))
        try:
            done = Answered(m.key, answer=msgspec.json.encode(handler(self.host, call)).decode())
        except Unavailable as e:
            log.info("%s %s: not now: %s %s", m.name, m.key, e.said, e.why)
            return None
        except Trouble as e:
            log.info("%s %s: %s: %s %s", m.name, m.key, type(e).__name__, e.said, e.why)
            done = Answered(m.key, fault=Fault.of(e))
        except Exception as e:
            log.exception("%s %s failed", m.name, m.key)
            done = Answered(m.key, fault=Fault.of(Refused(f"The host failed ({type(e).__name__}).")))
        answer = letter(done)
        if m.key:
            self.ledger.put(m.key, answer, self.clock.now())
        return answer


def message_of(handler: Callable[..., Any]) -> type[msgspec.Struct]:
    """The message a handler is for: the annotation of its second parameter. (The first may name what only a type
    checker imports.)"""
    second = list(inspect.signature(handler).parameters.values())[1].annotation
    found = eval(second, handler.__globals__) if isinstance(second, str) else second  # noqa: S307 (our own source)
    return cast("type[msgspec.Struct]", found)


# ---- one process


class MemoryBus:
    """The bus inside one process: a queue and some threads an address; the same bytes as on the wire."""

    MOST = 100_000  # letters in one queue; more are lost, and come again

    def __init__(self) -> None:
        self.boxes: dict[str, _Box] = {}
        self.guard = threading.Lock()
        self.services: list[Callable[[], None]] = []

    def serve(self, address: str, receive: Callable[[bytes], None], threads: int = 1) -> Callable[[], None]:
        """Let `threads` threads take the letters to `address`. Returned: what ends them again.

        An end waits for letters under work (five seconds), not for those in the queue.
        """
        return self.serve_many({address: receive}, threads)

    def serve_many(self, receivers: Mapping[str, Callable[[bytes], None]], threads: int = 1) -> Callable[[], None]:
        """The same for many addresses with one crew: thousands of simulated hosts need no thread each."""
        with self.guard:
            names = list(receivers)
            box = self.boxes.setdefault(names[0], _Box())
            for name in names[1:]:
                old, self.boxes[name] = self.boxes.get(name), box
                if old is not None and old is not box:
                    box.letters.extend(old.letters)
        over = threading.Event()
        crew = [
            threading.Thread(target=_work, args=(box, dict(receivers), over), name=f"{names[0]}-{i}", daemon=True)
            for i in range(threads)
        ]
        for t in crew:
            t.start()

        def end() -> None:
            over.set()
            with box.news:
                box.news.notify_all()
            for t in crew:
                if t is not threading.current_thread():
                    t.join(5)

        self.services.append(end)
        return end

    def serves(self, address: str) -> bool:
        """Is there somebody who would take a letter to this address?"""
        return address in self.boxes

    def send(self, to: str, raw: bytes) -> None:
        box = self.boxes.get(to)
        if box is not None:  # nobody lives there: lost, as on any wire, and sent again when due
            with box.news:
                if len(box.letters) < self.MOST:
                    box.letters.append((to, raw))
                    box.news.notify()

    def close(self) -> None:
        for end in self.services:
            end()


class _Box:
    def __init__(self) -> None:
        self.letters: deque[tuple[str, bytes]] = deque()
        self.news = threading.Condition()


def _work(box: _Box, receivers: dict[str, Callable[[bytes], None]], over: threading.Event) -> None:
    while True:
        with box.news:
            while not box.letters and not over.is_set():
                box.news.wait()
            if over.is_set():
                return
            to, raw = box.letters.popleft()
        try:
            receivers[to](raw)
        except Exception:
            log.exception("a letter could not be dealt with; it will come again")
