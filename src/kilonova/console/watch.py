"""Watching instead of asking again and again: what happens to a project's servers, as server-sent events or a websocket.

    curl -N -H "X-Auth-Token: …" http://127.0.0.1:6080/watch

Each event has a cursor for its `id`; who comes again with the last one (`Last-Event-ID`, or `?since=`) misses nothing,
and may hear something twice.  https://html.spec.whatwg.org/multipage/server-sent-events.html

A websocket to the same address is told the same, a message of JSON each: `{"id": …, "event": …, "data": {…}}`.  A page in a
browser can set no header: its first message may be `{"token": …, "since": …}` instead.  (In the address a token would be
written down by everybody on the way.)

One look into the database serves all who watch; while nobody does, there is none.
"""

import asyncio
import logging
import urllib.parse
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

import msgspec
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

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


class Sink(Protocol):
    """Where a watcher is told. It ends with an error where he does not listen any longer."""

    async def tell(self, c: Change) -> None: ...

    async def still_here(self) -> None: ...


class Lines:
    """Server-sent events."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer

    async def tell(self, c: Change) -> None:
        self.writer.write(event(c))
        await asyncio.wait_for(self.writer.drain(), QUIET_S * 4)

    async def still_here(self) -> None:
        self.writer.write(b": still here\n\n")
        await asyncio.wait_for(self.writer.drain(), QUIET_S * 4)


class Messages:
    """A websocket; that we are here its pings show."""

    def __init__(self, ws: ServerConnection) -> None:
        self.ws = ws

    async def tell(self, c: Change) -> None:
        await asyncio.wait_for(self.ws.send(message(c)), QUIET_S * 4)

    async def still_here(self) -> None: ...


class Wanted(msgspec.Struct, frozen=True):
    """Who watches, whose servers (None: everybody's), since when."""

    context: Context
    project_id: str | None
    since: float


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
                wanted = await asyncio.to_thread(self._asked, head)
            except Trouble as e:
                told = "Content-Type: text/plain\r\nConnection: close\r\n"
                writer.write(f"HTTP/1.1 {refusal(e)}\r\n{told}\r\n{e.said}\n".encode())
                await writer.drain()
                return
            headers = "Content-Type: text/event-stream\r\nCache-Control: no-store\r\nConnection: close\r\nX-Accel-Buffering: no\r\n"
            writer.write(f"HTTP/1.1 200 OK\r\n{headers}\r\n: welcome\n\n".encode())
            await _either(
                reader.read(1), self._stream(Lines(writer), wanted)
            )  # he has nothing to say; b"" is his leave
        except OSError:
            pass
        except Exception:
            log.exception("somebody could not watch")
        finally:
            writer.close()

    async def watch(self, ws: ServerConnection, wanted: Wanted | None, target: str) -> None:
        """The same over a websocket. None: who he is stands in his first message."""
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        try:
            if wanted is None:
                wanted = await self._introduced(ws, target)
            await _either(_unheard(ws), self._stream(Messages(ws), wanted))
            over = 0 < wanted.context.expires_at <= self.clock.now()
            await ws.close(1000 if over else 1013, "Come again.")
        except Trouble as e:
            await ws.close(1008, e.said[:120])
        except (OSError, ConnectionClosed, TimeoutError):
            await ws.close(1008, "")
        except Exception:
            log.exception("somebody could not watch")
            await ws.close(1011, "")
        finally:
            self.serving.discard(task)

    async def _introduced(self, ws: ServerConnection, target: str) -> Wanted:
        said = await asyncio.wait_for(ws.recv(), HEAD_S)
        try:
            me = msgspec.json.decode(said, type=Introduction)
        except (msgspec.MsgspecError, UnicodeError):
            raise Unknown("The request you have made requires authentication.") from None
        return await asyncio.to_thread(self.let_in, me.token, target, me.since)

    async def _stream(self, sink: Sink, wanted: Wanted) -> None:
        until = wanted.context.expires_at
        watcher = Watcher(wanted.project_id)
        self.watchers.add(watcher)  # before we look back: between the two nothing is missed, and twice is no harm
        if self.reading is None or self.reading.done():
            self.reading = asyncio.get_running_loop().create_task(self._read())
        try:
            await self._look_back(sink, watcher, wanted.since)
            while not until or self.clock.now() < until:
                try:
                    c = await asyncio.wait_for(watcher.events.get(), QUIET_S)
                except TimeoutError:
                    await sink.still_here()
                else:
                    if c is None:
                        return
                    await sink.tell(c)
        finally:
            self.watchers.discard(watcher)

    async def _look_back(self, sink: Sink, watcher: Watcher, since: float) -> None:
        """What he missed, page by page, up to what all are told."""
        at = since
        while True:
            page, more = await asyncio.to_thread(self._since, at, watcher.project_id, since)
            new = [c for c in page if c.id not in watcher.seen and c.at >= since]
            for c in new:
                watcher.seen[c.id] = c.at
                await sink.tell(c)
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

    def _asked(self, head: bytes) -> Wanted:
        line, headers = _head(head)
        return self.let_in(headers.get("x-auth-token", ""), line.split(" ")[1], headers.get("last-event-id", ""))

    def let_in(self, token: str, target: str, last: str) -> Wanted:
        """`target` is the path that was asked for, `last` his cursor, or "". Raises Unknown, Forbidden, Unavailable."""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(target).query)
        if len(self.serving) > self.most:
            raise Unavailable("Too many watch already.")
        context = self.authenticate(token) if token else None
        if context is None:
            raise Unknown("The request you have made requires authentication.")
        mine = {"project_id": context.project_id, "user_id": context.user_id}
        everybody = "all_tenants" in query
        rule = ALL if everybody else RULE
        if not self.may(context, rule, mine) or (not everybody and context.project_id is None):
            raise Forbidden(f"Policy doesn't allow {rule} to be performed.")
        said = last or query.get("since", [""])[0]
        now = self.clock.now()
        try:
            since = max(float(said) - OVERLAP_S, now - KEEP_S) if said else now
        except ValueError:
            raise Trouble("That is no cursor of ours.") from None
        return Wanted(context, None if everybody else context.project_id, since)


class Introduction(msgspec.Struct, frozen=True):
    token: str
    since: str = ""


async def _either(leave: Awaitable[Any], watching: Coroutine[Any, Any, None]) -> None:
    """Until one of them ends. Raises what watching raised."""
    gone, told = asyncio.ensure_future(leave), asyncio.ensure_future(watching)
    try:
        await asyncio.wait([gone, told], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (gone, told):
            task.cancel()
        await asyncio.gather(gone, told, return_exceptions=True)
    if told.done() and not told.cancelled() and (trouble := told.exception()) is not None:
        raise trouble


async def _unheard(ws: ServerConnection) -> None:
    """Until he leaves: whatever he says meanwhile is of no interest."""
    async for _ in ws:
        pass


def refusal(e: Trouble) -> str:
    """The status of HTTP."""
    return next((s for kind, s in REFUSED.items() if isinstance(e, kind)), "400 Bad Request")


def message(c: Change) -> str:
    """The same as `event`, as one text of JSON."""
    return msgspec.json.encode({"id": f"{c.at:.6f}", "event": c.event, "data": c.data}).decode()


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
    """With server-sent events; a websocket is the proxy's to open."""
    if not head.startswith((b"GET /watch ", b"GET /watch?")) or b"\r\n\r\n" not in head:
        return False
    return _head(head)[1].get("upgrade", "").lower() != "websocket"


def _head(head: bytes) -> tuple[str, dict[str, str]]:
    lines = head.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    said = (line.partition(":") for line in lines[1:])
    return lines[0], {name.strip().lower(): value.strip() for name, _, value in said}
