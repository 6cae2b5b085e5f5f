"""How a question travels to a neighbour: `Inside` this process, as WSGI, or `Outside`, by real HTTP."""

import io
import re
import socket
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kilonova.kit.errors import Unavailable

CHUNK_BYTES = 1 << 20
# A peer that went without a word is noticed after two minutes, though we only wait.
KEPT_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)

Body = bytes | Iterable[bytes] | None


@dataclass
class Answer:
    """What came back; header names in small letters. The bytes are in `chunks`, once; `read` joins them."""

    status: int
    headers: dict[str, str]
    chunks: Iterator[bytes]
    close: Callable[[], None] = lambda: None

    def read(self) -> bytes:
        try:
            return b"".join(self.chunks)
        finally:
            self.close()


class Carrier(Protocol):
    """Carries one question to a neighbour. Raises Unavailable where there is nobody to be asked.

    `path` begins with a slash and the API's version, and may have a query.  A body of unknown length is an
    iterable of chunks.
    """

    def send(self, method: str, path: str, headers: Mapping[str, str], body: Body) -> Answer: ...


class Inside:
    """A WSGI application in this process, at `url` in the world (`http://127.0.0.1:8774/image`)."""

    def __init__(self, app: Callable[..., Iterable[bytes]], url: str) -> None:
        self.app = app
        parts = urllib.parse.urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        self.fixed: dict[str, Any] = {
            "SCRIPT_NAME": parts.path.rstrip("/"),
            "SERVER_NAME": parts.hostname or "localhost",
            "SERVER_PORT": str(port),
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "HTTP_HOST": parts.netloc,
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": parts.scheme,
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }

    def send(self, method: str, path: str, headers: Mapping[str, str], body: Body) -> Answer:
        where, _, query = path.partition("?")
        environ: dict[str, Any] = {
            **self.fixed,
            "REQUEST_METHOD": method,
            "PATH_INFO": urllib.parse.unquote(where, "latin-1"),
            "QUERY_STRING": query,
            **{_cgi(k): v for k, v in headers.items()},
        }
        if body is None or isinstance(body, bytes):
            environ["wsgi.input"] = io.BytesIO(body or b"")
            environ["CONTENT_LENGTH"] = str(len(body or b""))
        else:
            environ["wsgi.input"] = Chunks(body)
            environ["HTTP_TRANSFER_ENCODING"] = "chunked"
        told: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], _: Any = None) -> Callable[[bytes], None]:
            told[:] = [int(status[:3]), {k.lower(): v for k, v in headers}]
            return lambda data: None

        said = self.app(environ, start_response)
        chunks = iter(said)
        first = [] if told else [next(chunks, b"")]  # an application may begin to speak with its first chunk
        return Answer(told[0], told[1], _joined(first, chunks), getattr(said, "close", lambda: None))


class Outside:
    """Real HTTP to `url`, kept-alive connections, by urllib3. `timeout_s` is for each wait, not for a whole body.

    urllib3 itself, because what `requests` and keystoneauth1 put around it was half of all that an API process does
    for a new server, and a neighbour's answers are judged by our own `Session` anyhow.
    """

    def __init__(self, url: str, *, timeout_s: float = 10, verify: bool | str = True) -> None:
        import requests  # late: only who talks to neighbours elsewhere pays for it
        import urllib3

        self.url = re.sub(r"/v[\d.]+/?$", "", url).rstrip("/")
        # What the environment says of proxies and authorities is asked once, and as everybody reads it.
        around = requests.Session().merge_environment_settings(self.url, {}, False, verify, None)
        verify, proxy = around["verify"], requests.utils.select_proxy(self.url, around["proxies"])
        how: dict[str, Any] = {
            "maxsize": 64,  # connections that are kept; more are opened and closed again
            "timeout": timeout_s,
            "socket_options": [*urllib3.connection.HTTPConnection.default_socket_options, *KEPT_ALIVE],
            # Who was led elsewhere goes there; nothing is said twice unless `Session` does so.
            "retries": urllib3.Retry(total=5, connect=0, read=False, redirect=5, status=0, other=0),
            "cert_reqs": "CERT_REQUIRED" if verify else "CERT_NONE",
        }
        if verify and self.url.startswith("https:"):
            authorities = requests.utils.DEFAULT_CA_BUNDLE_PATH if verify is True else str(verify)
            how["ca_cert_dir" if Path(authorities).is_dir() else "ca_certs"] = authorities
        if proxy:
            to, known = urllib3.util.parse_url(proxy), {}
            if to.auth:
                known = urllib3.make_headers(proxy_basic_auth=urllib.parse.unquote(to.auth))
            self.http: Any = urllib3.ProxyManager(to._replace(auth=None).url, proxy_headers=known, **how)
            self.straight: Any = None
        else:
            self.http = urllib3.PoolManager(**how)
            self.straight = self.http.connection_from_url(self.url)
        self.under = urllib.parse.urlsplit(self.url).path

    def send(self, method: str, path: str, headers: Mapping[str, str], body: Body) -> Answer:
        from urllib3.exceptions import HTTPError

        if body is None and method in ("POST", "PUT", "PATCH"):
            body = b""  # so that its length is said
        about = {"User-Agent": "kilonova", **headers}
        try:
            r = self._put(method, path, headers=about, body=body, preload_content=False)
        except (HTTPError, OSError, ValueError) as e:
            raise Unavailable("A neighbouring service cannot be reached.", why=f"{self.url}: {e}") from None
        return Answer(r.status, {k.lower(): v for k, v in r.headers.items()}, _heard(r, self.url), r.close)

    def _put(self, method: str, path: str, **more: Any) -> Any:
        """To the one that we know, without looking at the address again; unless he leads us elsewhere."""
        if self.straight is not None:
            r = self.straight.urlopen(method, self.under + path, redirect=False, assert_same_host=False, **more)
            if method not in ("GET", "HEAD") or not r.get_redirect_location():
                return r
            r.drain_conn()
        return self.http.urlopen(method, self.url + path, **more)


class Absent:
    """There is no such neighbour in this cloud."""

    def __init__(self, name: str) -> None:
        self.name = name

    def send(self, method: str, path: str, headers: Mapping[str, str], body: Body) -> Answer:
        raise Unavailable(f"This cloud has no {self.name} service.")


class Chunks:
    """An iterable of bytes, readable as WSGI's input is."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks, self.rest = iter(chunks), b""

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            whole, self.rest = self.rest + b"".join(self.chunks), b""
            return whole
        while not self.rest:
            try:
                self.rest = next(self.chunks)
            except StopIteration:
                return b""
        part, self.rest = self.rest[:size], self.rest[size:]
        return part


def _cgi(header: str) -> str:
    name = header.upper().replace("-", "_")
    return name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}"


def _joined(first: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    yield from first
    yield from rest


def _heard(response: Any, url: str) -> Iterator[bytes]:
    from urllib3.exceptions import HTTPError

    try:
        yield from response.stream(CHUNK_BYTES, decode_content=True)
    except (HTTPError, OSError) as e:
        raise Unavailable("A neighbouring service broke off in the middle.", why=f"{url}: {e}") from None
