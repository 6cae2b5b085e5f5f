"""A route is a value: validation, documents, the policy reference and the tests are readings of it.

    servers = Routes("compute")

    @servers.post("/servers/{id}/action", action="os-stop", ok=202, policy="os_compute_api:servers:stop", late=True)
    def stop(call: Call, id: str) -> None: ...

A handler takes the call and what the path names, and gives back a view (a Struct, a dict, a list: JSON), a
`Reply` where more than a body is to be said, or None for an empty body.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec

from kilonova.kit.errors import Forbidden
from kilonova.kit.versions import NEWEST, Span, minor, span

EVER = Span(0, NEWEST)


class Context(msgspec.Struct, frozen=True):
    """Who asks, as identity vouched for him. Ids are identity's; `system` is "all" for a system-scoped token."""

    user_id: str = ""
    project_id: str | None = None
    roles: frozenset[str] = frozenset()
    user_name: str = ""
    project_name: str = ""
    user_domain_id: str = "default"
    project_domain_id: str = "default"
    domain_id: str | None = None
    system: str | None = None
    expires_at: float = 0
    token: str = msgspec.field(default="", name="-")  # to speak to neighbours in his name; never logged
    is_admin: bool = False  # by the policy's context_is_admin

    @property
    def scope(self) -> str:
        """What the token is good for, as policies call it; a token for nothing passes as one for a project that is not said."""
        return "system" if self.system else "domain" if self.domain_id else "project"

    def __repr__(self) -> str:
        return f"Context(user {self.user_id}, project {self.project_id}, roles {sorted(self.roles)})"


@dataclass(slots=True)
class Call:
    """One request, decoded and checked. `version` is the minor number (19: 2.19), 0 where a service has none."""

    route: "Route"
    context: Context
    world: Any  # what this service works with: its clock, ids, database, neighbours
    version: int
    body: Any
    query: Any
    request_id: str
    url: str  # the service's own public address, with what stood before the path, no slash at the end
    path: str
    headers: Callable[[str], str | None]
    stream: BinaryIO | None
    allowed: Callable[[str, dict[str, Any]], bool]
    global_request_id: str | None = None
    remote: str = ""
    checked: bool = False
    project_in_url: str = ""  # with the slash before it, where the caller wrote it into the path
    content_length: int | None = None
    raw_query: str = ""
    kept: dict[Any, Any] = field(default_factory=dict)  # what was found out for this answer and is needed again

    def may(self, rule: str, target: dict[str, Any] | None = None) -> bool:
        """Would policy let him? The target is his own project where none is said."""
        mine = {"project_id": self.context.project_id, "user_id": self.context.user_id}
        return self.allowed(rule, mine if target is None else target)

    def check(self, target: dict[str, Any] | None = None, rule: str | None = None) -> None:
        """Let policy judge this call, by the route's rule or another. Raises Forbidden."""
        self.checked = True
        which = rule or self.route.policy or ""
        if not self.may(which, target):
            raise Forbidden(f"Policy doesn't allow {which} to be performed.", code="PolicyNotAuthorized")


@dataclass(frozen=True)
class Reply:
    """An answer with more than a body. `body`: Struct, dict, list → JSON; str, bytes as they are; `stream`: chunks."""

    body: Any = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    stream: Iterable[bytes] | None = None
    content_type: str | None = None
    length: int | None = None


@dataclass(frozen=True)
class Route:
    """What is asked for, in which versions, by whom, with what, and who answers.

    `body` is the Struct of the request body (its history in the margin), None: no body is read.
    `query` is a Struct of the query; its fields are str, list[str] (repeatable) or what msgspec makes of text.
    `policy` None means open to all who are known; `open` that even a token is not asked for.
    `late`: the handler calls `call.check(target)` itself, when it knows whose thing it is.
    `raw`: the body is a stream of bytes, not JSON.  `gone`: nothing but 410 is left of it.
    """

    method: str
    path: str
    do: Callable[..., Any]
    action: str | None = None
    versions: Span = EVER
    body: Any = None
    query: Any = None
    ok: int | Callable[[int], int] = 200
    policy: str | None = None
    open: bool = False
    late: bool = False
    raw: bool = False
    gone: bool = False
    outside: int = 404  # what is answered in other versions
    strict: int = NEWEST  # from this version on, unknown names in the query are refused

    def status(self, version: int) -> int:
        return self.ok if isinstance(self.ok, int) else self.ok(version)


class Routes:
    """The registry of one service. Order does not matter; two routes of one place may share it by version."""

    def __init__(self, service: str, *, strict: str | None = None) -> None:
        """`strict`: the version from which GETs refuse unknown names in the query, where a route says no other."""
        self.service, self.strict = service, NEWEST if strict is None else minor(strict)
        self.all: list[Route] = []

    def __iter__(self) -> Iterator[Route]:
        return iter(self.all)

    def add(self, method: str, path: str, **how: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """As `get`, `post` and so on; `versions` is written "2.1-2.36"; several spans are several routes."""
        spans, strict = how.pop("versions", None), how.pop("strict", None)
        how["strict"] = minor(strict) if strict else self.strict if method == "GET" else NEWEST

        def keep(do: Callable[..., Any]) -> Callable[..., Any]:
            for s in [spans] if spans is None or isinstance(spans, str) else spans:
                versions = EVER if s is None else span(s)
                self.all.append(Route(method, path, do, versions=versions, **how))
            return do

        return keep

    def get(self, path: str, **how: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return self.add("GET", path, **how)

    def post(self, path: str, **how: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return self.add("POST", path, **how)

    def put(self, path: str, **how: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return self.add("PUT", path, **how)

    def patch(self, path: str, **how: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return self.add("PATCH", path, **how)

    def delete(self, path: str, **how: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return self.add("DELETE", path, **how)

    def head(self, path: str, **how: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return self.add("HEAD", path, **how)
