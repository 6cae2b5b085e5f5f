"""A `Session` asks one neighbour: in whose name, how often, and what its answer means where it is a trouble."""

import logging
import re
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from kilonova.clients.carriers import Answer, Body, Carrier
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

logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRIES_S = (0.2, 1.0)  # waits before a question that changes nothing is put again
RENEW_BEFORE_S = 300.0

Query = Mapping[str, str | int | Sequence[str] | None]


# ---- whose name is used


SERVICE_USER = "kilonova"  # our own account, where identity is our own


class Login(msgspec.Struct, frozen=True):
    """Our own account at identity. Domains by name. `system`: for the whole of it, and not for a project."""

    username: str
    password: str
    project_name: str = "service"
    user_domain: str = "Default"
    project_domain: str = "Default"
    system: bool = False

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
        scope: dict[str, Any] = {"project": {"name": login.project_name, "domain": {"name": login.project_domain}}}
        scope = {"system": {"all": True}} if login.system else scope
        wish = {"auth": {"identity": {"methods": ["password"], "password": {"user": user}}, "scope": scope}}
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        answer = self.identity.send("POST", "/v3/auth/tokens?nocatalog", headers, msgspec.json.encode(wish))
        body = answer.read()
        if answer.status != 201 or not (token := answer.headers.get("x-subject-token")):
            why = f"{answer.status} for {login.username}: {_sentence(answer, body)[0]}"
            raise Unavailable("The identity service does not let this service in.", why=why)
        now, ends = self.clock.now(), parsed(decoded("identity", body, TokenBody).token.expires_at)
        self.present, self.renew_at = token, ends - min(RENEW_BEFORE_S, max(0.0, ends - now) / 2)


class Session:
    """The way to ask one neighbour. `name` is its name in sentences: image, network, identity.

    `vouch`: our own token goes along with the user's, so that the neighbour knows that a service asks for him.
    """

    def __init__(
        self, name: str, carrier: Carrier, clock: Clock, account: Account | None = None, *, vouch: bool = False
    ) -> None:
        self.name, self.carrier, self.clock, self.account, self.vouch = name, carrier, clock, account, vouch

    def json(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        query: Query | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> T:
        """The answer's body as `kind`. Raises the kind of trouble that the neighbour's status means."""
        headers = _of_json(headers, body)
        encoded = None if body is None else msgspec.json.encode(body)
        return decoded(
            self.name, self.ask(method, path, query=query, body=encoded, headers=headers, token=token).read(), kind
        )

    def tell(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> None:
        """As `json`, where the answer's body does not matter."""
        headers = _of_json(headers, body)
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
        ours = self.account.token() if self.account and (self.vouch or not token) else ""
        answer = self._send(method, path, headers, body, token or ours, ours)
        if answer.status == 401 and ours and self.account and (body is None or isinstance(body, bytes)):
            answer.read()
            ours = self.account.token(refused=ours)
            answer = self._send(method, path, headers, body, token or ours, ours)
        if 200 <= answer.status < 300:
            return answer
        raise _trouble(self.name, answer, answer.read(), ours=not token)

    def _send(self, method: str, path: str, headers: Mapping[str, str], body: Body, token: str, ours: str) -> Answer:
        names = log.named()
        about = {"Accept": "application/json", **headers}
        if token:
            about["X-Auth-Token"] = token
        if ours and self.vouch:
            about["X-Service-Token"] = ours
        if rid := names.get("global_request_id") or names.get("request_id"):
            about["X-OpenStack-Request-ID"] = rid
        return self.carrier.send(method, path, about, body)


def part(id: str) -> str:
    """A piece of a path that cannot become two, nor none, nor climb."""
    return urllib.parse.quote(id, safe="").replace("..", "%2E%2E") or "-"


def _of_json(headers: Mapping[str, str] | None, body: Any) -> Mapping[str, str]:
    return headers or {} if body is None else {"Content-Type": "application/json", **(headers or {})}


def _query(query: Query) -> str:
    flat: list[tuple[str, str]] = []
    for name, value in query.items():
        if value is not None:
            values = [str(value)] if isinstance(value, str | int) else value
            flat += [(name, str(v)) for v in values]
    return urllib.parse.urlencode(flat)


def decoded(name: str, body: bytes, kind: type[T]) -> T:
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
    412: Conflict,
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
    if isinstance(said, dict) and isinstance(all := said.get("errors"), list) and all and isinstance(all[0], dict):
        return str(all[0].get("detail") or all[0].get("title") or ""), str(all[0].get("code") or "")
    if isinstance(said, dict):
        return str(said.get("message") or said.get("title") or ""), ""
    return str(said)[:1000], ""


# ---- what identity says of a token


class _Named(msgspec.Struct):
    id: str
    name: str = ""


class _Placed(msgspec.Struct):
    id: str
    name: str = ""
    domain: _Named = msgspec.field(default_factory=lambda: _Named("default"))


class TokenInfo(msgspec.Struct):
    expires_at: str
    user: _Placed
    roles: list[_Named] = []
    project: _Placed | None = None
    domain: _Named | None = None
    system: dict[str, bool] | None = None
    audit_ids: list[str] = []


class TokenBody(msgspec.Struct):
    token: TokenInfo
