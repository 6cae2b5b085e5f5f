"""Our neighbours, through their standard HTTP APIs: identity v3, image v2, network v2.0.

One path for all: a `Session` puts a token and the request's id on a question and reads a trouble out of an
answer.  What carries it is either `Inside`, a WSGI application of this very process (an embedded companion is
no mock: it is asked as a stranger would ask it), or `Outside`, real HTTP.  Frozen Structs come out.

Where `token` is None a neighbour is asked in our own name (`Account`), else in the user's.
"""

import hashlib
import io
import logging
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from kilonova.kit import log
from kilonova.kit.clock import Clock, parsed
from kilonova.kit.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    OverQuota,
    Trouble,
    Unavailable,
    Unknown,
    Unsupported,
)
from kilonova.kit.routes import Context
from kilonova.model.machine import FixedIp, Nic

logger = logging.getLogger(__name__)
T = TypeVar("T")

CHUNK_BYTES = 1 << 20
IDS_IN_A_QUERY = 120  # 47 letters each: below the 8 KB that proxies allow a request line
RETRIES_S = (0.2, 1.0)  # waits before a question that changes nothing is put again
RENEW_BEFORE_S = 300.0
CONTEXTS = 10_000  # tokens remembered
CONTEXT_S = 300.0

Query = Mapping[str, str | int | Sequence[str] | None]
Body = bytes | Iterable[bytes] | None


# ---- how a question travels


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
    """Real HTTP to `url`, kept-alive connections, by keystoneauth1. `timeout_s` is for each wait, not for a whole body."""

    def __init__(self, url: str, *, timeout_s: float = 10, verify: bool | str = True) -> None:
        from keystoneauth1 import session  # late: only who talks to real neighbours pays for it

        self.url = re.sub(r"/v[\d.]+/?$", "", url).rstrip("/")
        self.http = session.Session(verify=verify, timeout=timeout_s, user_agent="kilonova")

    def send(self, method: str, path: str, headers: Mapping[str, str], body: Body) -> Answer:
        from keystoneauth1.exceptions import ClientException
        from requests import RequestException

        try:
            r = self.http.request(
                self.url + path,
                method,
                headers=dict(headers),
                data=body,
                raise_exc=False,
                authenticated=False,
                stream=True,
                log=False,
            )
        except (ClientException, RequestException) as e:
            raise Unavailable("A neighbouring service cannot be reached.", why=f"{self.url}: {e}") from None
        return Answer(r.status_code, {k.lower(): v for k, v in r.headers.items()}, _heard(r, self.url), r.close)


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
    from requests import RequestException

    try:
        yield from response.iter_content(CHUNK_BYTES)
    except RequestException as e:
        raise Unavailable("A neighbouring service broke off in the middle.", why=f"{url}: {e}") from None


# ---- whose name is used


class Login(msgspec.Struct, frozen=True):
    """Our own account at identity. Domains by name."""

    username: str
    password: str
    project_name: str = "service"
    user_domain: str = "Default"
    project_domain: str = "Default"

    def __repr__(self) -> str:
        return f"Login({self.username})"


class Account:
    """A token of our own: by password, anew before it ends or when a neighbour refuses it."""

    def __init__(self, identity: Carrier, login: Login, clock: Clock) -> None:
        self.identity, self.login, self.clock = identity, login, clock
        self.lock = threading.Lock()
        self.present, self.renew_at = "", 0.0

    def token(self, refused: str = "") -> str:
        """One that is good, and not the `refused` one. Raises Unavailable: to be without identity is our trouble."""
        with self.lock:
            if not self.present or self.present == refused or self.clock.now() >= self.renew_at:
                self._renew()
            return self.present

    def _renew(self) -> None:
        login = self.login
        user = {"name": login.username, "domain": {"name": login.user_domain}, "password": login.password}
        scope = {"project": {"name": login.project_name, "domain": {"name": login.project_domain}}}
        wish = {"auth": {"identity": {"methods": ["password"], "password": {"user": user}}, "scope": scope}}
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        answer = self.identity.send("POST", "/v3/auth/tokens?nocatalog", headers, msgspec.json.encode(wish))
        body = answer.read()
        if answer.status != 201 or not (token := answer.headers.get("x-subject-token")):
            why = f"{answer.status} for {login.username}: {_sentence(answer, body)[0]}"
            raise Unavailable("The identity service does not let this service in.", why=why)
        now, ends = self.clock.now(), parsed(_decoded("identity", body, _TokenBody).token.expires_at)
        self.present, self.renew_at = token, ends - min(RENEW_BEFORE_S, max(0.0, ends - now) / 2)


class Session:
    """The way to ask one neighbour. `name` is its name in sentences: image, network, identity."""

    def __init__(self, name: str, carrier: Carrier, clock: Clock, account: Account | None = None) -> None:
        self.name, self.carrier, self.clock, self.account = name, carrier, clock, account

    def json(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        query: Query | None = None,
        body: Any = None,
        token: str | None = None,
    ) -> T:
        """The answer's body as `kind`. Raises the kind of trouble that the neighbour's status means."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        encoded = None if body is None else msgspec.json.encode(body)
        return _decoded(
            self.name, self.ask(method, path, query=query, body=encoded, headers=headers, token=token).read(), kind
        )

    def tell(
        self, method: str, path: str, *, query: Query | None = None, body: Any = None, token: str | None = None
    ) -> None:
        """As `json`, where the answer's body does not matter."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        encoded = None if body is None else msgspec.json.encode(body)
        self.ask(method, path, query=query, body=encoded, headers=headers, token=token).read()

    def ask(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Body = None,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> Answer:
        """An answer of the 200s, not read yet. Only GETs are put again when nobody answers."""
        where = path + ("?" + _query(query) if query else "")
        waits = RETRIES_S if method == "GET" else ()
        for wait_s in (*waits, None):
            try:
                return self._once(method, where, headers or {}, body, token)
            except Unavailable as e:
                if wait_s is None:
                    raise
                logger.info("%s service: %s %s again in %.1f s (%s)", self.name, method, path, wait_s, e.why)
                self.clock.sleep(wait_s)
        raise AssertionError("not reached")

    def _once(self, method: str, path: str, headers: Mapping[str, str], body: Body, token: str | None) -> Answer:
        mine = token or (self.account.token() if self.account else "")
        answer = self._send(method, path, headers, body, mine)
        if answer.status == 401 and not token and self.account and (body is None or isinstance(body, bytes)):
            answer.read()
            answer = self._send(method, path, headers, body, self.account.token(refused=mine))
        if 200 <= answer.status < 300:
            return answer
        raise _trouble(self.name, answer, answer.read(), ours=not token)

    def _send(self, method: str, path: str, headers: Mapping[str, str], body: Body, token: str) -> Answer:
        names = log.named()
        about = {"Accept": "application/json", **headers}
        if token:
            about["X-Auth-Token"] = token
        if rid := names.get("global_request_id") or names.get("request_id"):
            about["X-OpenStack-Request-ID"] = rid
        return self.carrier.send(method, path, about, body)


def _query(query: Query) -> str:
    flat: list[tuple[str, str]] = []
    for name, value in query.items():
        if value is not None:
            values = [str(value)] if isinstance(value, str | int) else value
            flat += [(name, str(v)) for v in values]
    return urllib.parse.urlencode(flat)


def _decoded(name: str, body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise Unavailable(f"The {name} service gave an answer that makes no sense.", why=str(e)) from None


# ---- what went wrong

KINDS: dict[int, type[Trouble]] = {
    400: Invalid,
    401: Unknown,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: NotFound,
    413: OverQuota,
    429: Unavailable,
    501: Unsupported,
}
OVER_QUOTA = {"OverQuota", "QuotaExceeded", "overLimit", "OverLimit"}


def _trouble(name: str, answer: Answer, body: bytes, *, ours: bool) -> Trouble:
    status = answer.status
    said, code = _sentence(answer, body)
    kind = OverQuota if code in OVER_QUOTA else KINDS.get(status, Invalid if 400 <= status < 500 else Unavailable)
    why = f"{name} service: {status} {code} {said}"
    if kind is Unavailable or (ours and kind is Unknown):
        return Unavailable(f"The {name} service is not available.", why=why)
    return kind(said or f"The {name} service refused ({status}).", code=code)


def _sentence(answer: Answer, body: bytes) -> tuple[str, str]:
    """The neighbour's own words and its name for the case, out of the shapes that OpenStack's services use."""
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = re.sub(rb"(?s)<head>.*?</head>|<[^>]*>", b" ", body).decode("utf-8", "replace")
        return " ".join(re.sub(r"^\s*\d{3} [A-Z][\w -]*?\n", "", text).split())[:1000], ""
    if isinstance(said, dict) and len(said) == 1 and isinstance(inner := next(iter(said.values())), dict):
        name = next(iter(said))
        code = inner.get("type") or ("" if name in ("error", "NeutronError") else name)
        return str(inner.get("message") or ""), str(code)
    if isinstance(said, dict):
        return str(said.get("message") or said.get("title") or ""), ""
    return str(said)[:1000], ""


# ---- image


class ImageInfo(msgspec.Struct, frozen=True):
    """An image (Image API v2, show). Moments in seconds since 1970; `properties` are those the API has no name for."""

    id: str
    name: str
    status: str
    size: int  # bytes; 0 where there is none yet
    virtual_size: int  # bytes a guest sees; 0: unknown
    disk_format: str
    container_format: str
    min_disk_gb: int
    min_ram_mb: int
    checksum: str
    hash_algo: str
    hash_value: str
    owner: str
    visibility: str
    protected: bool = False
    hidden: bool = False
    created_at: float = 0
    updated_at: float = 0
    tags: list[str] = []
    properties: dict[str, str] = {}


class Image:
    """The image service (Image API v2)."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def show(self, id: str, token: str | None = None) -> ImageInfo:
        """Raises NotFound."""
        return _image(self.session.json("GET", f"/v2/images/{_part(id)}", dict[str, Any], token=token))

    def list(self, token: str | None = None, **filters: str | int | Sequence[str] | None) -> Iterator[ImageInfo]:
        """All that fit, page after page; `filters` are the API's (`name=`, `status=`, `visibility=`, `sort=`…)."""
        path: str | None = "/v2/images"
        query: Query | None = filters
        while path:
            page = self.session.json("GET", path, _ImagePage, query=query, token=token)
            yield from map(_image, page.images)
            path, query = page.next, None

    def download(self, id: str, write: Callable[[bytes], object], token: str | None = None) -> int:
        """All its bytes into `write`, in pieces of up to 1 MiB; how many. Checked against what the service says.

        Raises NotFound; Unavailable where it broke off or where the bytes are not those it promised (MD5).
        """
        answer = self.session.ask("GET", f"/v2/images/{_part(id)}/file", headers={"Accept": "*/*"}, token=token)
        if answer.status == 204:
            answer.read()
            return 0
        size, digest = 0, hashlib.md5(usedforsecurity=False)
        try:
            for chunk in answer.chunks:
                digest.update(chunk)
                size += len(chunk)
                write(chunk)
        finally:
            answer.close()
        said = answer.headers.get("content-length")
        if said is not None and int(said) != size:
            raise Unavailable("The image service broke off in the middle.", why=f"image {id}: {size} of {said} bytes")
        promised = answer.headers.get("content-md5")
        if promised and promised != digest.hexdigest():
            raise Unavailable("The image arrived damaged.", why=f"image {id}: MD5 {digest.hexdigest()} for {promised}")
        return size

    def create(self, token: str | None = None, **wish: Any) -> ImageInfo:
        """A new image without bytes; `wish` are the API's names (`name=`, `disk_format=`, `owner=`, properties…)."""
        return _image(self.session.json("POST", "/v2/images", dict[str, Any], body=wish, token=token))

    def upload(self, id: str, chunks: Iterable[bytes], token: str | None = None) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        self.session.ask("PUT", f"/v2/images/{_part(id)}/file", body=iter(chunks), headers=headers, token=token).read()

    def delete(self, id: str, token: str | None = None) -> None:
        """Also where there is none any more."""
        with suppress(NotFound):
            self.session.tell("DELETE", f"/v2/images/{_part(id)}", token=token)


class _ImagePage(msgspec.Struct):
    images: list[dict[str, Any]]
    next: str | None = None


# fmt: off
NAMED = {
    "id", "name", "status", "size", "virtual_size", "disk_format", "container_format", "min_disk", "min_ram",
    "checksum", "os_hash_algo", "os_hash_value", "os_hidden", "owner", "visibility", "protected", "created_at",
    "updated_at", "tags", "self", "file", "schema", "locations", "direct_url", "stores", "members",
}
# fmt: on


def _image(said: dict[str, Any]) -> ImageInfo:
    try:
        return msgspec.convert(
            {
                "id": said["id"],
                "name": said.get("name") or "",
                "status": said["status"],
                "size": said.get("size") or 0,
                "virtual_size": said.get("virtual_size") or 0,
                "disk_format": said.get("disk_format") or "",
                "container_format": said.get("container_format") or "",
                "min_disk_gb": said.get("min_disk") or 0,
                "min_ram_mb": said.get("min_ram") or 0,
                "checksum": said.get("checksum") or "",
                "hash_algo": said.get("os_hash_algo") or "",
                "hash_value": said.get("os_hash_value") or "",
                "owner": said.get("owner") or "",
                "visibility": said.get("visibility") or "private",
                "protected": said.get("protected") or False,
                "hidden": said.get("os_hidden") or False,
                "created_at": parsed(said["created_at"]) if said.get("created_at") else 0.0,
                "updated_at": parsed(said["updated_at"]) if said.get("updated_at") else 0.0,
                "tags": said.get("tags") or [],
                "properties": {k: str(v) for k, v in said.items() if k not in NAMED and v is not None},
            },
            ImageInfo,
        )
    except (KeyError, ValueError) as e:
        raise Unavailable("The image service gave an answer that makes no sense.", why=str(e)) from None


# ---- network


class Address(msgspec.Struct, frozen=True):
    """One fixed address of a port."""

    subnet_id: str
    ip_address: str = ""


class Port(msgspec.Struct, frozen=True):
    """A port (Network API v2.0). `vif_type` "" and "unbound": on no host; "binding_failed": its host cannot have it."""

    id: str
    network_id: str
    mac: str = msgspec.field(name="mac_address")
    fixed_ips: list[Address] = []
    name: str | None = ""
    status: str | None = ""
    admin_state_up: bool | None = True
    device_id: str | None = ""
    device_owner: str | None = ""
    project_id: str | None = ""
    host: str | None = msgspec.field(name="binding:host_id", default="")
    vif_type: str | None = msgspec.field(name="binding:vif_type", default="")
    vif_details: dict[str, Any] | None = msgspec.field(name="binding:vif_details", default_factory=dict)
    vnic_type: str | None = msgspec.field(name="binding:vnic_type", default="normal")
    profile: dict[str, Any] | None = msgspec.field(name="binding:profile", default_factory=dict)
    security_groups: list[str] = []
    port_security_enabled: bool | None = True
    dns_name: str | None = ""
    tags: list[str] = []
    resource_request: dict[str, Any] | None = None


class NetworkInfo(msgspec.Struct, frozen=True):
    """A network. `mtu` 0: not said."""

    id: str
    name: str | None = ""
    project_id: str | None = ""
    status: str | None = ""
    admin_state_up: bool | None = True
    shared: bool | None = False
    external: bool | None = msgspec.field(name="router:external", default=False)
    mtu: int | None = 0
    subnets: list[str] = []
    port_security_enabled: bool | None = True
    physical_network: str | None = msgspec.field(name="provider:physical_network", default=None)
    network_type: str | None = msgspec.field(name="provider:network_type", default=None)
    tags: list[str] = []


class HostRoute(msgspec.Struct, frozen=True):
    destination: str
    nexthop: str


class Subnet(msgspec.Struct, frozen=True):
    """A subnet: `cidr`, whether guests get their address by DHCP, and what they are told."""

    id: str
    network_id: str
    cidr: str
    ip_version: int = 4
    gateway_ip: str | None = None
    enable_dhcp: bool | None = True
    dns_nameservers: list[str] = []
    host_routes: list[HostRoute] = []
    name: str | None = ""
    project_id: str | None = ""
    ipv6_address_mode: str | None = None


class SecurityGroup(msgspec.Struct, frozen=True):
    id: str
    name: str
    project_id: str | None = ""
    description: str | None = ""


class FloatingIp(msgspec.Struct, frozen=True):
    id: str
    floating_ip_address: str
    fixed_ip_address: str | None = None
    port_id: str | None = None
    project_id: str | None = ""
    floating_network_id: str | None = ""
    status: str | None = ""


class Network:
    """The network service (Network API v2.0)."""

    def __init__(self, session: Session) -> None:
        self.session = session

    # -- ports

    def ports(
        self,
        *,
        servers: Iterable[str] = (),
        ids: Iterable[str] = (),
        token: str | None = None,
        **filters: str | Sequence[str] | None,
    ) -> list[Port]:
        """All ports that fit, of all `servers` (`device_id`) or with these `ids`: one request for each 120 of them.

        Nothing said finds nothing: an empty list of servers has no ports.
        `filters` are the API's: `network_id=`, `project_id=`, `name=`, `device_owner=`, `**{"binding:host_id": h}`.
        """
        for name, wanted in (("device_id", servers), ("id", ids)):
            if several := list(wanted):
                return self._several("ports", name, several, Port, filters, token)
        return [] if not filters else self._list("ports", Port, filters, token)

    def port(self, id: str, token: str | None = None) -> Port:
        """Raises NotFound."""
        return self.session.json("GET", f"/v2.0/ports/{_part(id)}", _OnePort, token=token).port

    def create_port(self, network_id: str, *, token: str | None = None, **wish: Any) -> Port:
        """A new port on a network. `wish` are the API's names, `binding:host_id` and so on by `**{…}`:

        `project_id=` (needed when asked in our own name), `device_id=`, `device_owner="compute:nova"`, `name=`,
        `fixed_ips=[{"ip_address": …}]`, `security_groups=[ids]`, `mac_address=`, `dns_name=`, `tags=`.
        Raises NotFound (network), OverQuota, Conflict (address taken, none left: see `code`), Invalid.
        """
        body = {"port": {"network_id": network_id, "admin_state_up": True, **wish}}
        return self.session.json("POST", "/v2.0/ports", _OnePort, body=body, token=token).port

    def update_port(self, id: str, *, token: str | None = None, **wish: Any) -> Port:
        """Raises NotFound, Conflict, Invalid."""
        path = f"/v2.0/ports/{_part(id)}"
        return self.session.json("PUT", path, _OnePort, body={"port": wish}, token=token).port

    def bind_port(self, id: str, host: str, *, device_id: str, device_owner: str, **wish: Any) -> Port:
        """Make it a server's, on this host; in our own name, since hosts are no user's business. Safe to do twice.

        Raises Conflict where the network service cannot have the port on this host (`code` PortBindingFailed).
        """
        wish |= {"binding:host_id": host, "device_id": device_id, "device_owner": device_owner}
        port = self.update_port(id, **wish)
        if port.vif_type == "binding_failed":
            raise Conflict(f"Binding failed for port {id}.", why=f"on host {host}", code="PortBindingFailed")
        return port

    def unbind_port(self, id: str, **wish: Any) -> None:
        """Let go of a port that was not ours: it belongs to no server and no host again. Nothing there: done."""
        with suppress(NotFound):
            self.update_port(
                id, **{"device_id": "", "device_owner": "", "binding:host_id": "", "binding:profile": {}, **wish}
            )

    def delete_port(self, id: str, token: str | None = None) -> None:
        """Also where there is none any more."""
        with suppress(NotFound):
            self.session.tell("DELETE", f"/v2.0/ports/{_part(id)}", token=token)

    # -- what they hang on

    def networks(
        self, *, ids: Iterable[str] = (), token: str | None = None, **filters: str | Sequence[str] | None
    ) -> list[NetworkInfo]:
        """Those with these ids, or all that fit `filters` (`project_id=`, `shared="true"`, `name=`, …)."""
        if several := list(ids):
            return self._several("networks", "id", several, NetworkInfo, filters, token)
        return self._list("networks", NetworkInfo, filters, token)

    def subnets(
        self,
        *,
        ids: Iterable[str] = (),
        networks: Iterable[str] = (),
        token: str | None = None,
        **filters: str | Sequence[str] | None,
    ) -> list[Subnet]:
        for name, wanted in (("id", ids), ("network_id", networks)):
            if several := list(wanted):
                return self._several("subnets", name, several, Subnet, filters, token)
        return self._list("subnets", Subnet, filters, token) if filters else []

    def security_groups(
        self, *, token: str | None = None, ids: Iterable[str] = (), **filters: str | Sequence[str] | None
    ) -> list[SecurityGroup]:
        """`filters`: `project_id=`, `name=` (repeatable)."""
        if several := list(ids):
            return self._several("security_groups", "id", several, SecurityGroup, filters, token)
        return self._list("security_groups", SecurityGroup, filters, token)

    def floating_ips(
        self, *, ports: Iterable[str] = (), token: str | None = None, **filters: str | Sequence[str] | None
    ) -> list[FloatingIp]:
        """Of these ports; or all that fit `filters` (`project_id=`, `floating_ip_address=`)."""
        if several := list(ports):
            return self._several("floatingips", "port_id", several, FloatingIp, filters, token)
        return self._list("floatingips", FloatingIp, filters, token) if filters else []

    def auto_network(self, project_id: str) -> str:
        """The id of the project's automatic network, made when it has none. Raises NotFound, Conflict."""
        path = f"/v2.0/auto-allocated-topology/{_part(project_id)}"
        return str(self.session.json("GET", path, _OneTopology).auto_allocated_topology["id"])

    def quota(self, project_id: str) -> dict[str, int]:
        """Limits by the API's names: `port`, `floatingip`, `security_group`, … -1: none."""
        return self.session.json("GET", f"/v2.0/quotas/{_part(project_id)}", _OneQuota).quota

    def _several(
        self, what: str, by: str, ids: Sequence[str], kind: type[T], filters: Query, token: str | None
    ) -> list[T]:
        return [
            item
            for first in range(0, len(ids), IDS_IN_A_QUERY)
            for item in self._list(what, kind, {**filters, by: ids[first : first + IDS_IN_A_QUERY]}, token)
        ]

    def _list(self, what: str, kind: type[T], query: Query | None, token: str | None) -> list[T]:
        """All pages: the service may cut a list though it was not asked to."""
        items: list[T] = []
        path = f"/v2.0/{what.replace('_', '-')}"
        while True:
            page = self.session.json("GET", path, dict[str, msgspec.Raw], query=query, token=token)
            items += _decoded("network", bytes(page.get(what, b"[]")), list[kind])  # type: ignore[valid-type]
            links = _decoded("network", bytes(page.get(f"{what}_links", b"[]")), list[dict[str, str]])
            more = next((link["href"] for link in links if link.get("rel") == "next"), None)
            if more is None:
                return items
            path, query = f"{path.partition('?')[0]}?{urllib.parse.urlsplit(more).query}", None


class _OnePort(msgspec.Struct):
    port: Port


class _OneTopology(msgspec.Struct):
    auto_allocated_topology: dict[str, Any]


class _OneQuota(msgspec.Struct):
    quota: dict[str, int]


def plug(
    port: Port, network: NetworkInfo, subnets: Iterable[Subnet], floating: Iterable[FloatingIp] = (), tag: str = ""
) -> Nic:
    """A bound port as a host and its guest must know it; pure. Addresses stand in the port's own order."""
    of = {s.id: s for s in subnets}
    details = port.vif_details or {}
    outer: dict[str, list[str]] = {}
    for f in floating:
        if f.port_id == port.id and f.fixed_ip_address:
            outer.setdefault(f.fixed_ip_address, []).append(f.floating_ip_address)
    return Nic(
        port_id=port.id,
        network_id=port.network_id,
        mac=port.mac,
        device=f"tap{port.id[:11]}",
        vif_type=port.vif_type or "unbound",
        bridge=str(details.get("bridge_name") or ""),
        details={k: v for k, v in details.items() if isinstance(v, str | int | bool)},
        network_name=network.name or "",
        mtu=network.mtu or 1500,
        ips=[_ip(a, of[a.subnet_id], outer.get(a.ip_address, [])) for a in port.fixed_ips if a.subnet_id in of],
        tag=tag,
    )


def _ip(address: Address, subnet: Subnet, floating: list[str]) -> FixedIp:
    return FixedIp(
        address=address.ip_address,
        version=6 if subnet.ip_version == 6 else 4,
        prefix=int(subnet.cidr.partition("/")[2]),
        gateway=subnet.gateway_ip,
        dns=subnet.dns_nameservers,
        dhcp=bool(subnet.enable_dhcp),
        mode=(subnet.ipv6_address_mode or "") if subnet.ip_version == 6 else "",
        routes=[(r.destination, r.nexthop) for r in subnet.host_routes],
        floating=floating,
    )


# ---- identity


class _Named(msgspec.Struct):
    id: str
    name: str = ""


class _Placed(msgspec.Struct):
    id: str
    name: str = ""
    domain: _Named = msgspec.field(default_factory=lambda: _Named("default"))


class _TokenInfo(msgspec.Struct):
    expires_at: str
    user: _Placed
    roles: list[_Named] = []
    project: _Placed | None = None
    domain: _Named | None = None
    system: dict[str, bool] | None = None
    audit_ids: list[str] = []


class _TokenBody(msgspec.Struct):
    token: _TokenInfo


class Identity:
    """The identity service (Identity API v3), as a service asks it."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def authenticate(self, token: str) -> Context:
        """Who has this token. Raises Unknown where it is not good (any more), Unavailable."""
        headers = {"X-Subject-Token": token}
        try:
            answer = self.session.ask("GET", "/v3/auth/tokens", query={"nocatalog": "1"}, headers=headers)
        except (NotFound, Invalid):
            raise Unknown("The request you have made requires authentication.") from None
        said = _decoded("identity", answer.read(), _TokenBody).token
        return Context(
            user_id=said.user.id,
            user_name=said.user.name,
            user_domain_id=said.user.domain.id,
            project_id=said.project.id if said.project else None,
            project_name=said.project.name if said.project else "",
            project_domain_id=said.project.domain.id if said.project else "default",
            domain_id=said.domain.id if said.domain else None,
            system="all" if said.system and said.system.get("all") else None,
            roles=frozenset(r.name for r in said.roles),
            expires_at=parsed(said.expires_at),
            token=token,
        )

    def project_exists(self, id: str, token: str | None = None) -> bool:
        """May this id be used for a project? Where we may not look, it may: the same as real services do."""
        try:
            self.session.tell("GET", f"/v3/projects/{_part(id)}", token=token)
        except NotFound:
            return False
        except (Forbidden, Unavailable) as e:
            logger.info("whether project %s exists cannot be told (%s)", id, e.why or e.said)
        return True


class RemoteIdentity:
    """`authenticate` for services beside a real Keystone: asks it, and remembers for at most `keep_s`."""

    def __init__(self, identity: Identity, clock: Clock, keep_s: float = CONTEXT_S) -> None:
        self.identity, self.clock, self.keep_s = identity, clock, min(keep_s, CONTEXT_S)
        self.known: dict[bytes, tuple[float, Context]] = {}

    def __call__(self, token: str) -> Context:
        """Raises Unknown, Unavailable."""
        key, now = hashlib.blake2b(token.encode("utf-8", "replace"), digest_size=16).digest(), self.clock.now()
        found = self.known.get(key)
        if found and now < found[0]:
            return found[1]
        context = self.identity.authenticate(token)
        if context.expires_at <= now:
            raise Unknown("The request you have made requires authentication.")
        if len(self.known) >= CONTEXTS:
            self.known.clear()
        self.known[key] = (min(now + self.keep_s, context.expires_at), context)
        return context


# ---- all of them


@dataclass(frozen=True)
class Neighbours:
    """Whom a role can ask."""

    identity: Identity
    image: Image
    network: Network


def neighbours(clock: Clock, login: Login, *, identity: Carrier, image: Carrier, network: Carrier) -> Neighbours:
    """All neighbours, with one account of our own for them."""
    account = Account(identity, login, clock)

    def session(name: str, carrier: Carrier) -> Session:
        return Session(name, carrier, clock, account)

    return Neighbours(
        Identity(session("identity", identity)), Image(session("image", image)), Network(session("network", network))
    )


def _part(id: str) -> str:
    """A piece of a path that cannot become two, nor none, nor climb."""
    return urllib.parse.quote(id, safe="").replace("..", "%2E%2E") or "-"
