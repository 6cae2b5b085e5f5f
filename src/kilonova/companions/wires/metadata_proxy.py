"""169.254.169.254: from a guest's question to the metadata service, with a signature that says who asks.

A guest is known by where it asks from: the network (or router) whose listener it reached, and its address there; or,
under QEMU's own networking, by the program that carries its connection (`guestfwd.py`).  What it says about itself is
thrown away.  The contract is the one of OpenStack's metadata proxies: X-Instance-ID, X-Tenant-ID, X-Forwarded-For and
X-Instance-ID-Signature, the HMAC-SHA256 of the instance id with the shared secret.

Guests are hostile: every connection has a deadline, a question a size, a guest few connections, the proxy few threads.
"""

import collections
import contextlib
import hashlib
import hmac
import http.client
import io
import logging
import os
import selectors
import socket
import ssl
import sys
import threading
import time
import wsgiref.headers
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import quote, urlsplit
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler

import msgspec

from kilonova.companions.wires import guestfwd

logger = logging.getLogger(__name__)

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

OURS = ("HTTP_X_INSTANCE_ID", "HTTP_X_TENANT_ID", "HTTP_X_FORWARDED_FOR", "HTTP_X_METADATA_PROVIDER")
HOP_BY_HOP = {"connection", "keep-alive", "te", "trailers", "transfer-encoding", "upgrade", "proxy-connection"}


class Asker(msgspec.Struct, frozen=True):
    """Whose guest it is."""

    server_id: str
    project_id: str


class Limits(msgspec.Struct, frozen=True):
    """Of a proxy: `connections` at once, of them `per_guest` from one; a connection ends after `deadline_s`."""

    threads: int = 32
    connections: int = 128
    per_guest: int = 4
    deadline_s: float = 30.0
    idle_s: float = 5.0
    body_bytes: int = 65_536
    answer_bytes: int = 16 * 2**20  # of a service that is asked over HTTP


class MetadataProxy:
    """One thread waits on all listeners; a few answer. `app` is the metadata service, in this process or behind `url`."""

    def __init__(self, app: Wsgi, secret: str, limits: Limits | None = None) -> None:
        self.app, self.secret, self.limits = app, secret.encode(), limits or Limits()
        self.askers: Mapping[tuple[Hashable, str], Asker] = {}
        self.lock = threading.Lock()
        self.listeners: dict[Hashable, socket.socket] = {}
        self.open: dict[socket.socket, tuple[float, Hashable]] = {}
        self.counts: collections.Counter[Hashable] = collections.Counter()
        self.waiting = selectors.DefaultSelector()
        self.pool = ThreadPoolExecutor(self.limits.threads, thread_name_prefix="metadata")
        self.bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.waiting.register(self.bell[0], selectors.EVENT_READ)
        self.whose: Callable[[str], Asker | None] = lambda server_id: None
        self.closing = False
        self.thread = threading.Thread(target=self._wait, name="metadata", daemon=True)
        self.thread.start()

    def know(self, askers: Mapping[tuple[Hashable, str], Asker]) -> None:
        """From now on these are the guests: (listener's key, source address) → whose it is."""
        self.askers = askers

    def serve(self, key: Hashable, listener: socket.socket) -> None:
        """Takes over a listening socket. The one that had this key is closed."""
        self.stop(key)
        listener.setblocking(False)
        with self.lock:
            self.listeners[key] = listener
            self.waiting.register(listener, selectors.EVENT_READ, key)
        self._ring()

    def serve_programs(self, path: Path, whose: Callable[[str], Asker | None]) -> None:
        """A unix socket for `guestfwd.py`: who may open it may speak for every server, so its folder must be private."""
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        with guestfwd.near(str(path)) as name:
            listener.bind(name)
        path.chmod(0o600)
        listener.listen(64)
        self.whose = whose
        self.serve(("programs", str(path)), listener)

    def stop(self, key: Hashable) -> None:
        with self.lock:
            listener = self.listeners.pop(key, None)
            if listener is not None:
                self.waiting.unregister(listener)
                listener.close()

    def held(self) -> set[Hashable]:
        """Keys of the listeners."""
        with self.lock:
            return set(self.listeners)

    def close(self) -> None:
        """No listener, no connection, no thread stays."""
        self.closing = True
        self._ring()
        self.thread.join(5)
        for key in self.held():
            self.stop(key)
        self._end_older(float("inf"))
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.waiting.close()
        for end in self.bell:
            os.close(end)

    def _wait(self) -> None:
        while not self.closing:
            with contextlib.suppress(OSError, ValueError):  # a listener that was closed while we waited for it
                for key, _ in self.waiting.select(1.0 if self.open else None):
                    if key.fileobj == self.bell[0]:
                        with contextlib.suppress(BlockingIOError):
                            os.read(self.bell[0], 4096)
                    else:
                        self._accept(key.fileobj, key.data)  # type: ignore[arg-type]
            self._end_older(time.monotonic() - self.limits.deadline_s)

    def _accept(self, listener: socket.socket, key: Hashable) -> None:
        try:
            connection, source = listener.accept()
        except OSError:
            return
        address = source[0].partition("%")[0] if isinstance(source, tuple) else ""
        guest = (key, address)
        with self.lock:
            full = len(self.open) >= self.limits.connections or (
                address != "" and self.counts[guest] >= self.limits.per_guest
            )
            if not full:
                self.open[connection] = time.monotonic(), guest
                self.counts[guest] += 1
        if full:
            connection.close()
            return
        self.pool.submit(self._answer, connection, key, address)

    def _answer(self, connection: socket.socket, key: Hashable, address: str) -> None:
        try:
            connection.settimeout(self.limits.idle_s)
            if address:
                asker = self.askers.get((key, address))
            else:
                asker, address = self.whose(guestfwd.greeting(connection)), "127.0.0.1"
            _Question(connection, address, self, asker)
        except (OSError, ValueError):
            logger.debug("a guest's question broke off", exc_info=True)
        except Exception:
            logger.exception("the metadata proxy failed")
        finally:
            with self.lock:
                _, guest = self.open.pop(connection, (0.0, None))
                self.counts[guest] -= 1
                if self.counts[guest] <= 0:
                    del self.counts[guest]
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _end_older(self, than: float) -> None:
        with self.lock:
            late = [one for one, (since, _) in self.open.items() if since < than]
        for one in late:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self.bell[1], b"!")

    def signature(self, server_id: str) -> str:
        return hmac.new(self.secret, server_id.encode(), hashlib.sha256).hexdigest()


class _Question(WSGIRequestHandler):
    """One request on one connection: read, made clean, signed, answered."""

    def __init__(self, connection: socket.socket, address: str, proxy: MetadataProxy, asker: Asker | None) -> None:
        self.proxy, self.asker = proxy, asker
        super().__init__(connection, (address, 0), self)  # type: ignore[arg-type]

    # What WSGIRequestHandler asks of its server.
    base_environ = {
        "SERVER_NAME": "169.254.169.254",
        "SERVER_PORT": "80",
        "GATEWAY_INTERFACE": "CGI/1.1",
        "REMOTE_HOST": "",
        "CONTENT_LENGTH": "",
        "SCRIPT_NAME": "",
    }
    server_name, server_port, server_version = "169.254.169.254", 80, "Kilonova"

    def version_string(self) -> str:
        return "Kilonova"

    def handle(self) -> None:
        self.raw_requestline = self.rfile.readline(8193)
        if len(self.raw_requestline) > 8192:
            self.requestline = self.request_version = self.command = ""
            self.send_error(414)
            return
        if not self.raw_requestline or not self.parse_request():
            return
        length = self.headers.get("Content-Length", "0")
        if self.headers.get("Transfer-Encoding"):
            self.send_error(501, "Bodies must have a Content-Length.")
        elif not length.isdecimal():
            self.send_error(400)
        elif int(length) > self.proxy.limits.body_bytes:
            self.send_error(413)
        elif self.asker is None:
            self.send_error(404, "No server has this address.")
        else:
            self._pass_on(self.rfile.read(int(length)))

    def _pass_on(self, body: bytes) -> None:
        assert self.asker is not None
        environ = self.get_environ()
        # By the names WSGI gives them: `X_Instance_ID` would arrive under the same one as `X-Instance-ID`.
        for name in [n for n in environ if n.startswith(OURS)]:
            del environ[name]
        environ |= {
            "HTTP_X_INSTANCE_ID": self.asker.server_id,
            "HTTP_X_TENANT_ID": self.asker.project_id,
            "HTTP_X_FORWARDED_FOR": self.client_address[0],
            "HTTP_X_INSTANCE_ID_SIGNATURE": self.proxy.signature(self.asker.server_id),
            "REMOTE_ADDR": self.client_address[0],
            "CONTENT_LENGTH": str(len(body)),
        }
        answer = _Answer(io.BytesIO(body), cast(IO[bytes], self.wfile), io.StringIO(), environ, multithread=True)
        answer.request_handler = self  # type: ignore[attr-defined]
        answer.run(self.proxy.app)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("guest %s: " + format, self.client_address[0], *args)


class _Answer(ServerHandler):
    """The service's answer, on a connection that ends with it."""

    headers: wsgiref.headers.Headers | None
    http_version = "1.1"
    server_software = "Kilonova"

    def cleanup_headers(self) -> None:
        super().cleanup_headers()
        if self.headers is not None:
            self.headers["Connection"] = "close"

    def log_exception(self, exc_info: Any) -> None:
        logger.error("the metadata service failed", exc_info=exc_info)


def forward_to(
    url: str, timeout_s: float = 10, most: int = Limits().answer_bytes, *, ca_file: Path | None = None
) -> Wsgi:
    """A metadata service somewhere else, as an application: passes the question on over HTTP."""
    there = urlsplit(url)
    tls = ssl.create_default_context(cafile=ca_file) if there.scheme == "https" else None

    def connected() -> http.client.HTTPConnection:
        if tls is None:
            return http.client.HTTPConnection(there.hostname or "", there.port, timeout=timeout_s)
        return http.client.HTTPSConnection(there.hostname or "", there.port, timeout=timeout_s, context=tls)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        headers = {
            key[5:].replace("_", "-").title(): value
            for key, value in environ.items()
            if key.startswith("HTTP_") and key[5:].replace("_", "-").lower() not in HOP_BY_HOP | {"host"}
        }
        if environ.get("CONTENT_TYPE"):
            headers["Content-Type"] = environ["CONTENT_TYPE"]
        path = there.path.rstrip("/") + environ.get("PATH_INFO", "/")
        path = path.encode("latin-1").decode("utf-8", "replace")
        query = environ.get("QUERY_STRING")
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        connection = connected()
        try:
            target = quote(path) + (f"?{query}" if query else "")
            connection.request(environ["REQUEST_METHOD"], target, body or None, headers)
            answer = connection.getresponse()
            content = answer.read(most + 1)
        except (OSError, http.client.HTTPException):
            logger.warning("the metadata service does not answer", exc_info=True)
            return _said(start_response, "503 Service Unavailable")
        finally:
            connection.close()
        if len(content) > most:
            return _said(start_response, "502 Bad Gateway")
        told = [
            (k, v) for k, v in answer.getheaders() if k.lower() not in HOP_BY_HOP | {"content-length", "server", "date"}
        ]
        start_response(f"{answer.status} {answer.reason}", [*told, ("Content-Length", str(len(content)))])
        return [content]

    return app


def _said(start_response: Callable[..., Any], status: str) -> Iterable[bytes]:
    text = f"{status}\n".encode()
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
    return [text]


if __name__ == "__main__":
    sys.exit(guestfwd.main(sys.argv[1:]))
