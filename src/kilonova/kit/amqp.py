"""The bus between machines: letters over RabbitMQ, by kombu. The same two verbs as in one process: `serve` and `send`.

The database is the truth and every letter is sent again until it is answered, so the broker may lose, double and
delay them: it makes us slow, never wrong.  Hence:

- `send` never waits for the broker: letters lie in a bounded box until the wire takes them; what is too old is dropped.
- A letter goes to its address's queue and to nobody where there is none; only who serves an address makes its queue.
- A letter is acknowledged after it was dealt with: one that a process died over is delivered again at once.
- Letters expire at their `until`: a host that returns does not find last week's commands.
- Confirms are off: what the broker lost, the run that waits for the answer sends again.

Addresses that last (hosts, conductors) have quorum queues, which survive the loss of a broker; those of askers, and of
questions, go with who made them.  An address that ends with `.alone` is one process's: who comes second waits for it.
"""

import contextlib
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import kombu
from amqp.exceptions import AMQPError, ResourceLocked
from kombu.exceptions import KombuError

from kilonova.kit.bus import opened
from kilonova.kit.clock import Clock
from kilonova.kit.splice import readable

log = logging.getLogger(__name__)

BROKEN = OSError, AMQPError, KombuError  # of the wire; what else is raised is an error of ours
MOST = 100_000  # letters that wait for the wire; more are lost, and come again
KEEP_S = 60.0  # a letter that says no other time is not worth more
IDLE_S = 1.0  # how long the wire is waited for at a time
LAST_S = 5.0  # … by a letter under work, when its service ends
AGAIN_S = 0.2  # until a broken wire is tried again; doubled each time, to
AGAIN_MOST_S = 5.0
FORGOTTEN_S = 7 * 86400.0  # a lasting queue that nobody serves for so long goes


class AmqpBus:
    """`urls`: brokers, in the order in which they are tried (amqp://user:password@host:port/vhost, amqps:// for TLS).

    `ssl`: what Python's `ssl` is told (ca_certs, certfile, keyfile), None: no TLS.  Threads are begun by the first
    `serve` or `send`.  A broker that is away is waited for, whoever calls.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        clock: Clock,
        ssl: Mapping[str, Any] | None = None,
        heartbeat_s: float = 15.0,
        prefix: str = "kilonova",
    ) -> None:
        self.urls, self.clock, self.ssl, self.heartbeat_s, self.prefix = list(urls), clock, ssl, heartbeat_s, prefix
        self.over = threading.Event()
        self.news = threading.Condition()  # of the box
        self.box: deque[tuple[str, bytes]] = deque()
        self.sent = self.dropped = 0
        self.up = False  # did the last look at the wire find a broker?
        self.since = float("inf")  # when it was found again after it was away
        self.sender: threading.Thread | None = None
        self.turn = -1  # which broker was asked last
        self.guard = threading.Lock()
        self.services: list[_Service] = []

    def serve(self, address: str, receive: Callable[[bytes], None], threads: int = 1) -> Callable[[], None]:
        """Let `threads` threads take the letters to `address`. Returned: what ends them again.

        An end waits for letters under work (five seconds); those that were not acknowledged are another's, or come again.
        """
        return self.serve_many({address: receive}, threads)

    def serve_many(self, receivers: Mapping[str, Callable[[bytes], None]], threads: int = 1) -> Callable[[], None]:
        """The same for many addresses, with one connection and one crew."""
        service = _Service(self, dict(receivers), threads)
        with self.guard:
            self.services.append(service)
        service.start()
        return service.end

    def send(self, to: str, raw: bytes) -> None:
        with self.news:
            if len(self.box) >= MOST:
                self.dropped += 1
                return
            self.box.append((to, raw))
            if self.sender is None:
                self.sender = threading.Thread(target=self._send_all, name="amqp-sender", daemon=True)
                self.sender.start()
            self.news.notify()

    def serves(self, address: str) -> bool:
        """Would somebody take it? Of what we serve ourselves: has the broker a queue for it yet? Of others only the
        broker knows, and a letter to nobody is lost there."""
        with self.guard:
            ours = [s for s in self.services if address in s.receivers]
        return not ours or any(address in s.heard for s in ours)

    def close(self) -> None:
        """What lies in the box has a moment to leave."""
        with self.guard:
            services, self.services = self.services, []
        for s in services:
            s.end()
        self.over.set()
        with self.news:
            self.news.notify_all()
        if self.sender is not None:
            self.sender.join(5)

    def found(self, up: bool) -> None:
        """There is a broker, or there is none."""
        if up and not self.up:
            self.since = self.clock.now()
        self.up = up

    def connection(self) -> kombu.Connection:
        """A new one, not open yet; it knows all brokers. With TLS it knows one, the next each time: to whose name its
        certificate is held must be clear."""
        urls = self.urls
        if self.ssl is not None and len(urls) > 1:
            self.turn += 1
            urls = [urls[self.turn % len(urls)]]
        return kombu.Connection(
            urls,
            failover_strategy="round-robin",
            heartbeat=self.heartbeat_s,
            connect_timeout=5,
            ssl=dict(self.ssl) if self.ssl is not None else False,
            transport_options={"read_timeout": 30, "write_timeout": 30, "client_properties": {"product": "kilonova"}},
        )

    def queue(self, address: str) -> kombu.Queue:
        """Who serves it says what it is; all who serve it say the same."""
        name = f"{self.prefix}.{address}"
        if address.endswith(".alone"):
            return kombu.Queue(name, durable=False, exclusive=True)
        if address.startswith("asker-") or address.endswith(".asked"):
            return kombu.Queue(name, durable=False, auto_delete=False, queue_arguments={"x-expires": 60_000})
        kind = {"x-queue-type": "quorum", "x-expires": int(FORGOTTEN_S * 1000)}
        return kombu.Queue(name, durable=True, queue_arguments=kind)

    # -- out

    def _send_all(self) -> None:
        """One thread, one connection; a letter leaves the box when the wire has taken it."""
        wait_s = AGAIN_S
        while not self.over.is_set():
            try:
                with self.connection() as line:
                    line.ensure_connection(max_retries=1)
                    producer = kombu.Producer(line)
                    self.found(True)
                    wait_s = AGAIN_S
                    self._send_while(line, producer)
            except BROKEN as e:
                self.found(False)
                log.warning("the broker cannot be reached; %d letters wait (%s)", len(self.box), type(e).__name__)
                self.over.wait(wait_s)
                wait_s = min(wait_s * 2, AGAIN_MOST_S)

    def _send_while(self, line: kombu.Connection, producer: kombu.Producer) -> None:
        while True:
            with self.news:
                if not self.box and not self.over.is_set():
                    self.news.wait(self.heartbeat_s / 3)
                if not self.box and self.over.is_set():
                    return
                first = self.box[0] if self.box else None
            if first is None:
                line.heartbeat_check()  # who only sends must hear as well
                _look(line)
                continue
            self._put(producer, *first)
            with self.news:
                self.box.popleft()

    def _put(self, producer: kombu.Producer, to: str, raw: bytes) -> None:
        m = opened(raw)
        left_s = m.until - self.clock.now() if m is not None and m.until else KEEP_S
        if left_s <= 0:
            self.dropped += 1
            return
        producer.publish(
            raw,
            exchange="",
            routing_key=f"{self.prefix}.{to}",
            content_type="application/msgpack",
            content_encoding="binary",
            delivery_mode=2 if not to.startswith("asker-") else 1,
            expiration=left_s,
        )
        self.sent += 1


class _Service:
    """Who serves some addresses: one thread at the wire, a crew at work. Only the one at the wire touches it."""

    def __init__(self, bus: AmqpBus, receivers: dict[str, Callable[[bytes], None]], threads: int) -> None:
        self.bus, self.receivers, self.threads = bus, receivers, threads
        self.ahead = max(4 * threads, 8)  # letters that the broker sends before it is told of one that was dealt with
        self.over = threading.Event()
        self.news = threading.Condition()  # of the next
        self.todo: deque[tuple[Callable[[bytes], None], bytes, Any, int]] = deque()
        self.done: deque[tuple[Any, int]] = deque()
        self.under_work = 0
        self.heard: set[str] = set()  # addresses whose queues are there, and listened to
        self.life = 0  # of the connection: what came by another cannot be acknowledged by this one
        self.beat = bus.clock.now()
        self.ear, self.mouth = socket.socketpair()  # the crew wakes who waits at the wire
        self.ear.setblocking(False)
        self.mouth.setblocking(False)
        name = next(iter(receivers))
        self.wire = threading.Thread(target=self._listen, name=f"{name}-wire", daemon=True)
        self.crew = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(threads)]

    def start(self) -> None:
        self.wire.start()
        for t in self.crew:
            t.start()

    def end(self) -> None:
        self.over.set()
        with self.news:
            self.news.notify_all()
        with contextlib.suppress(BlockingIOError):
            self.mouth.send(b".")
        for t in [*self.crew, self.wire]:
            if t is not threading.current_thread():
                t.join(LAST_S + 1)

    # -- the crew

    def _work(self) -> None:
        while True:
            with self.news:
                while not self.todo and not self.over.is_set():
                    self.news.wait()
                if self.over.is_set():
                    return
                receive, raw, message, life = self.todo.popleft()
                self.under_work += 1
            try:
                receive(raw)
            except Exception:
                log.exception("a letter could not be dealt with; it will come again")
            finally:
                with self.news:
                    self.under_work -= 1
                    self.done.append((message, life))
                    enough = len(self.done) >= self.ahead // 2 or self.over.is_set()
                # Fewer are acknowledged when the wire wakes for something else, in a second at the latest.
                if enough:
                    with contextlib.suppress(BlockingIOError):  # he has enough to wake up for
                        self.mouth.send(b".")

    # -- the wire

    def _listen(self) -> None:
        wait_s = AGAIN_S
        while not self.over.is_set():
            try:
                with self.bus.connection() as line:
                    line.ensure_connection(max_retries=1)
                    self.life += 1
                    with self.news:
                        self.todo.clear()  # the broker will deliver them again
                        self.done.clear()
                    with kombu.Consumer(
                        line.channel(),
                        [],
                        accept=["application/msgpack"],
                        prefetch_count=self.ahead,
                    ) as consumer:
                        self._ask_for_all(consumer)
                        self.bus.found(True)
                        wait_s = AGAIN_S
                        self._drain(line)
            except ResourceLocked:
                log.error("%s: another process has this address", next(iter(self.receivers)))
            except BROKEN as e:
                self.bus.found(False)
                log.warning("%s: the broker cannot be reached (%s)", next(iter(self.receivers)), type(e).__name__)
            except Exception:  # a process that is deaf, and says that it lives, would be worse than one that is slow
                self.bus.found(False)
                log.exception("%s: letters cannot be taken; it is tried again", next(iter(self.receivers)))
            else:
                continue
            self.over.wait(wait_s)
            wait_s = min(wait_s * 2, AGAIN_MOST_S)

    def _ask_for_all(self, consumer: kombu.Consumer) -> None:
        names = {self.bus.queue(address).name: receive for address, receive in self.receivers.items()}

        def came(message: Any) -> None:
            receive = names[message.delivery_info["routing_key"]]
            with self.news:
                self.todo.append((receive, bytes(message.body), message, self.life))
                self.news.notify()

        consumer.on_message = came
        for address in self.receivers:
            consumer.add_queue(self.bus.queue(address))
            consumer.consume()  # of those that are not consumed yet
            self.heard.add(address)

    def _drain(self, line: kombu.Connection) -> None:
        """Until the end, or until the wire breaks."""
        while not self.over.is_set():
            self._wait(line, IDLE_S)
        until = self.bus.clock.now() + LAST_S
        while self.under_work and self.bus.clock.now() < until:  # a letter under work has its moment
            self._wait(line, 0.1)
        self._acknowledge()

    def _wait(self, line: kombu.Connection, most_s: float) -> None:
        """For the wire, or for one of the crew; then a look at both."""
        ready = readable([line.connection.sock, self.ear], most_s)
        if self.ear in ready:
            self.ear.recv(4096)
        _look(line)
        self._acknowledge()
        now = self.bus.clock.now()
        if now - self.beat > self.bus.heartbeat_s / 3:
            self.beat = now
            line.heartbeat_check()

    def _acknowledge(self) -> None:
        while self.done:
            message, life = self.done.popleft()
            if life == self.life:
                message.ack()


def _look(line: kombu.Connection) -> None:
    """Take what has come; the wire may have read more than it gave."""
    try:
        while True:
            line.drain_events(timeout=0.0005)
    except TimeoutError:
        pass
