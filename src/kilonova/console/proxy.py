"""A websocket on one side, a server's console on the other: VNC, SPICE or a serial line, byte for byte.

Who comes brings a token (`?token=…`, or in the path that noVNC was given), and is let through to the one console that
it was given for; or watches what happens (`watch.py`).  Nothing of what passes is looked at: RFB and its like are between the browser and the hypervisor.
"""

import asyncio
import contextlib
import functools
import http
import logging
import socket
import ssl
import threading
import urllib.parse
from pathlib import Path
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from kilonova.console.viewer import page
from kilonova.console.watch import Tail, door, refusal
from kilonova.kit.clock import Clock
from kilonova.kit.db import Db
from kilonova.kit.errors import Trouble
from kilonova.kit.tls import trusting
from kilonova.model import options
from kilonova.model.console import Where
from kilonova.store import consoles

log = logging.getLogger(__name__)
wire = logging.getLogger("kilonova.console.wire")
wire.setLevel(logging.CRITICAL)  # it would write down request lines, and tokens are in them

REACH_S = 10.0  # how long a console may take to answer
PIECE = 1 << 16
MESSAGE_MAX = 1 << 20


class Proxy:
    """Serves on a socket that somebody bound, from a thread of its own. `tail` is for those who watch (`watch.py`)."""

    def __init__(
        self,
        db: Db,
        listener: socket.socket,
        *,
        clock: Clock,
        options: options.Console,
        tail: Tail | None = None,
        tls: ssl.SSLContext | None = None,
        hosts_ca_file: Path | None = None,
    ) -> None:
        self.tls, self.hosts_tls = tls, trusting(hosts_ca_file)
        self.hosts_tls.check_hostname = False
        self.db, self.listener, self.clock, self.options, self.tail = db, listener, clock, options, tail
        self.open: set[ServerConnection] = set()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.over: asyncio.Event | None = None
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="consoles", daemon=True)

    def start(self) -> None:
        self.thread.start()
        self.ready.wait(10)

    def stop(self) -> None:
        if self.loop is not None and self.over is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self.loop.call_soon_threadsafe(self.over.set)
            self.thread.join(10)

    async def _serve(self) -> None:
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        async with serve(
            self._splice,
            sock=self.listener,
            ssl=self.tls,
            process_request=self._asked,
            create_connection=door(self.tail),
            subprotocols=[Subprotocol("binary")],
            select_subprotocol=_binary,
            compression=None,  # screens are compressed already
            max_size=MESSAGE_MAX,
            ping_interval=30,
            server_header=None,
            logger=wire,
        ):
            self.ready.set()
            await self.over.wait()
            if self.tail is not None:
                await self.tail.close()

    # -- who comes

    async def _asked(self, connection: ServerConnection, request: Request) -> Response | None:
        """None: let in. Everything else is answered in HTTP, before there is a websocket."""
        headers = request.headers
        if headers.get("Upgrade", "").lower() != "websocket":
            found = await asyncio.to_thread(page, self.options.viewer, request.path)
            told = Headers({"Content-Type": found.type, "Content-Length": str(len(found.body)), "Connection": "close"})
            return Response(found.status, found.status.phrase, told, found.body)
        if not self._same_origin(headers.get("Origin"), headers.get("Host", "")):
            return connection.respond(http.HTTPStatus.FORBIDDEN, "This page is of another origin.\n")
        if self.tail is not None and request.path.partition("?")[0] == "/watch":
            return await self._watched(self.tail, connection, request)
        if len(self.open) >= self.options.connections_max:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "Too many consoles are open.\n")
        try:
            grant = await asyncio.to_thread(self._granted, token_of(request.path))
        except Trouble:
            return connection.respond(http.HTTPStatus.FORBIDDEN, "")  # no word: some take it for the console's
        except Exception:
            log.exception("a console's token could not be looked up")
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "The database does not answer.\n")
        connection.grant = grant  # type: ignore[attr-defined]
        return None

    async def _watched(self, tail: Tail, connection: ServerConnection, request: Request) -> Response | None:
        """Who says who he is must be somebody; who does not may say it in his first message."""
        token, last = request.headers.get("X-Auth-Token", ""), request.headers.get("Last-Event-ID", "")
        wanted = None
        if len(tail.serving) >= tail.most:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "Too many watch already.\n")
        if token:
            try:
                wanted = await asyncio.to_thread(tail.let_in, token, request.path, last)
            except Trouble as e:
                return connection.respond(http.HTTPStatus(int(refusal(e)[:3])), e.said + "\n")
        connection.watching = functools.partial(tail.watch, wanted=wanted, target=request.path)  # type: ignore[attr-defined]
        return None

    def _granted(self, token: str) -> consoles.Grant:
        with self.db.read() as tx:
            return consoles.granted(tx, token, self.clock.now())

    def _same_origin(self, origin: str | None, host: str) -> bool:
        """A page of somebody else must not use what its visitor may see; what is no browser says no origin."""
        if origin is None:
            return True
        name = urllib.parse.urlsplit(origin).hostname
        mine = urllib.parse.urlsplit(f"//{host}").hostname
        return name is not None and (name == mine or name in self.options.allowed_origins)

    # -- what passes

    async def _reached(self, at: Where) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises OSError. Hosts are known by their authority, not by their addresses."""
        if at.path:
            return await asyncio.open_unix_connection(at.path)
        reader, writer = await asyncio.open_connection(at.host, at.port, ssl=self.hosts_tls if at.tls else None)
        if at.key:
            writer.write(at.key.encode() + b"\n")
        return reader, writer

    async def _splice(self, ws: ServerConnection) -> None:
        if (watching := getattr(ws, "watching", None)) is not None:
            await watching(ws)
            return
        grant: consoles.Grant = ws.grant  # type: ignore[attr-defined]
        self.open.add(ws)
        try:
            async with asyncio.timeout(REACH_S):
                reader, writer = await self._reached(grant.at)
        except (OSError, TimeoutError):
            self.open.discard(ws)
            await ws.close(1014, "The console does not answer.")
            return
        log.info("the %s console of %s is looked at", grant.type, grant.server)
        ways = [asyncio.ensure_future(w) for w in (_up(ws, writer), _down(reader, ws))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self.open.discard(ws)
            writer.close()
            await ws.close()


def token_of(path: str) -> str:
    """Of `/?token=T`, or of `/vnc_auto.html?path=%3Ftoken%3DT`; "" where there is none."""
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)
    if "token" in query:
        return query["token"][0]
    inner = query.get("path", [""])[0]
    return urllib.parse.parse_qs(inner.partition("?")[2]).get("token", [""])[0]


def _binary(connection: ServerConnection, offered: Any) -> Subprotocol | None:
    """Old viewers insist on it, new ones name none."""
    return Subprotocol("binary") if "binary" in offered else None


async def _up(ws: ServerConnection, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionClosed, OSError):
        async for piece in ws:
            writer.write(piece.encode() if isinstance(piece, str) else piece)
            await writer.drain()


async def _down(reader: asyncio.StreamReader, ws: ServerConnection) -> None:
    with contextlib.suppress(ConnectionClosed, OSError):
        while piece := await reader.read(PIECE):
            await ws.send(piece)
