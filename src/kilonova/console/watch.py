"""Watching instead of asking again and again: what happens to a project's servers, as server-sent events.

    curl -N -H "X-Auth-Token: …" http://127.0.0.1:6080/watch

Each event has a cursor for its `id`; who comes again with the last one (`Last-Event-ID`, or `?since=`) misses nothing,
and may hear something twice.  https://html.spec.whatwg.org/multipage/server-sent-events.html

One look into the database serves all who watch; while nobody does, there is none.
"""

import asyncio
import logging
import urllib.parse
from collections.abc import Callable
from typing import Any

import msgspec
from websockets.asyncio.server import ServerConnection

from kilonova.kit.clock import Clock
from kilonova.kit.db import Db
from kilonova.kit.errors import Forbidden, Trouble, Unavailable, Unknown
from kilonova.kit.routes import Context
from kilonova.store import changes
from kilonova.store.changes import OVERLAP_S, Change

log = logging.getLogger(__name__)

LOOK_S = 0.5
QUIET_S = 15.0  # then a line without meaning shows that we are here
HEAD_S, HEAD_MAX = 10.0, 16_384  # how long, and how much, somebody may take to say what he wants
BEHIND = 1000  # events that wait for one watcher; then he is sent away, and comes again with his cursor
KEEP_S = 86_400.0  # a cursor older than that begins there
RULE, ALL = "os_compute_api:servers:index", "os_compute_api:servers:index:get_all_tenants"

REFUSED = {Unknown: "401 Unauthorized", Forbidden: "403 Forbidden", Unavailable: "503 Service Unavailable"}
Gate = Callable[[str], Context]
May = Callable[[Context, str, dict[str, Any]], bool]


class Watcher:
    """One who watches: one project's servers, or everybody's (None)."""

    def __init__(self, project_id: str | None) -> None:
        self.project_id = project_id
        self.events: asyncio.Queue[Change | None] = asyncio.Queue(BEHIND + 1)
        self.seen: dict[str, float] = {}

    def tell(self, all: list[Change]) -> None:
        for c in all:
            if self.project_id in (None, c.project_id) and c.id not in self.seen:
                self.seen[c.id] = c.at
                if self.events.qsize() < BEHIND:
                    self.events.put_nowait(c)
                elif not self.events.full():
                    self.events.put_nowait(None)

    def forget(self, before: float) -> None:
        self.seen = {id: at for id, at in self.seen.items() if at >= before}


class Tail:
    """What all watchers are told. `authenticate` and `may` are the API's."""

    def __init__(self, db: Db, clock: Clock, authenticate: Gate, may: May, *, most: int) -> None:
        self.db, self.clock, self.authenticate, self.may, self.most = db, clock, authenticate, may, most
        self.watchers: set[Watcher] = set()
        self.reading: asyncio.Task[None] | None = None
        self.serving: set[asyncio.Task[None]] = set()

    def take(self, transport: asyncio.Transport, head: bytes) -> None:
        """This connection is ours from now on."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        task = loop.create_task(self._serve(reader, writer, head))
        self.serving.add(task)
        task.add_done_callback(self.serving.discard)

    async def close(self) -> None:
        for task in [*self.serving, *([self.reading] if self.reading else [])]:
            task.cancel()
        await asyncio.gather(*self.serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        try:
            try:
                context, project, since = await asyncio.to_thread(self._asked, head)
            except Trouble as e:
                status = next((s for kind, s in REFUSED.items() if isinstance(e, kind)), "400 Bad Request")
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n{e.said}\n".encode()
                )
                await writer.drain()
                return
            gone = asyncio.ensure_future(reader.read(1))  # he has nothing more to say; b"" is his leave
            watching = asyncio.ensure_future(self._stream(writer, project, since, context.expires_at))
            try:
                await asyncio.wait([gone, watching], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (gone, watching):
                    task.cancel()
                await asyncio.gather(gone, watching, return_exceptions=True)
        except OSError:
            pass
        except Exception:
            log.exception("somebody could not watch")
        finally:
            writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, project: str | None, since: float, until: float) -> None:
        headers = "Content-Type: text/event-stream\r\nCache-Control: no-store\r\nConnection: close\r\nX-Accel-Buffering: no\r\n"
        writer.write(f"HTTP/1.1 200 OK\r\n{headers}\r\n: welcome\n\n".encode())
        watcher = Watcher(project)
        self.watchers.add(watcher)  # before we look back: between the two nothing is missed, and twice is no harm
        if self.reading is None or self.reading.done():
            self.reading = asyncio.get_running_loop().create_task(self._read())
        try:
            await self._look_back(writer, watcher, since)
            while not until or self.clock.now() < until:
                try:
                    c = await asyncio.wait_for(watcher.events.get(), QUIET_S)
                except TimeoutError:
                    writer.write(b": still here\n\n")
                else:
                    if c is None:
                        return
                    writer.write(event(c))
                await asyncio.wait_for(writer.drain(), QUIET_S * 4)
        finally:
            self.watchers.discard(watcher)

    async def _look_back(self, writer: asyncio.StreamWriter, watcher: Watcher, since: float) -> None:
        """What he missed, page by page, up to what all are told."""
        at = since
        while True:
            page, more = await asyncio.to_thread(self._since, at, watcher.project_id, since)
            new = [c for c in page if c.id not in watcher.seen and c.at >= since]
            for c in new:
                watcher.seen[c.id] = c.at
                writer.write(event(c))
            await asyncio.wait_for(writer.drain(), QUIET_S * 4)
            if not more or not new:
                return
            at = page[-1].at

    async def _read(self) -> None:
        """As long as somebody watches."""
        at = self.clock.now()
        while self.watchers:
            await asyncio.sleep(LOOK_S)
            try:
                now = self.clock.now()
                found, more = await asyncio.to_thread(self._since, at - OVERLAP_S, None)
                at = max(at, found[-1].at + OVERLAP_S / 2) if more else now
            except Exception:
                log.exception("what changed could not be read")
                await asyncio.sleep(LOOK_S * 10)
                continue
            for watcher in list(self.watchers):
                watcher.tell(found)
                watcher.forget(at - 3 * OVERLAP_S)

    def _since(self, at: float, project: str | None, begun: float | None = None) -> tuple[list[Change], bool]:
        return self.db.look(changes.since, at, project, begun=begun)

    # -- who comes

    def _asked(self, head: bytes) -> tuple[Context, str | None, float]:
        """(who, whose servers, since when). Raises Unknown, Forbidden, Unavailable."""
        line, headers = _head(head)
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(line.split(" ")[1]).query)
        if len(self.serving) > self.most:
            raise Unavailable("Too many watch already.")
        context = self.authenticate(headers.get("x-auth-token", "")) if headers.get("x-auth-token") else None
        if context is None:
            raise Unknown("The request you have made requires authentication.")
        mine = {"project_id": context.project_id, "user_id": context.user_id}
        everybody = "all_tenants" in query
        rule = ALL if everybody else RULE
        if not self.may(context, rule, mine) or (not everybody and context.project_id is None):
            raise Forbidden(f"Policy doesn't allow {rule} to be performed.")
        said = headers.get("last-event-id") or query.get("since", [""])[0]
        now = self.clock.now()
        try:
            since = max(float(said) - OVERLAP_S, now - KEEP_S) if said else now
        except ValueError:
            raise Trouble("That is no cursor of ours.") from None
        return context, None if everybody else context.project_id, since


def event(c: Change) -> bytes:
    """Its cursor, its kind, and one line of JSON."""
    return f"id: {c.at:.6f}\nevent: {c.event}\ndata: {msgspec.json.encode(c.data).decode()}\n\n".encode()


def door(tail: Tail | None) -> type[ServerConnection]:
    """A connection that finds out what is wanted of it: `GET /watch` goes to the tail, all else is for websockets."""

    class Door(ServerConnection):
        head: bytes | None = b""
        way: asyncio.Transport
        late: asyncio.TimerHandle

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.way = transport  # type: ignore[assignment]
            self.late = self.loop.call_later(HEAD_S, self.way.abort)

        def data_received(self, data: bytes) -> None:
            if self.head is None:
                super().data_received(data)
                return
            self.head += data
            if b"\r\n\r\n" not in self.head and len(self.head) <= HEAD_MAX:
                return
            head, self.head = self.head, None
            self.late.cancel()
            if tail is not None and watches(head):
                tail.take(self.way, head)
                return
            super().connection_made(self.way)
            super().data_received(head)

        def eof_received(self) -> None:
            if self.head is None:
                super().eof_received()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.head is None:
                super().connection_lost(exc)
            self.late.cancel()

    return Door


def watches(head: bytes) -> bool:
    return head.startswith((b"GET /watch ", b"GET /watch?")) and b"\r\n\r\n" in head


def _head(head: bytes) -> tuple[str, dict[str, str]]:
    lines = head.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    said = (line.partition(":") for line in lines[1:])
    return lines[0], {name.strip().lower(): value.strip() for name, _, value in said}
