"""Routes on the wire: one `Service` binds a registry to Falcon, in the dialect its clients know.

The life of a request: name it → its version → who asks → the route of that version → query → body → policy →
the handler → the view, as it was in that version.  Errors of any of these leave by one door, `Dialect.fault`.
Granian carries the bytes (`Server`); in one process a neighbour is called as a WSGI application (`clients`).
"""

import functools
import itertools
import logging
import os
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import falcon
import msgspec

from kilonova.kit import errors
from kilonova.kit.clock import Ids
from kilonova.kit.errors import Invalid, NotFound, Trouble, Unknown
from kilonova.kit.log import about
from kilonova.kit.policy import Policy
from kilonova.kit.routes import Call, Context, Reply, Route, Routes
from kilonova.kit.tls import Identity
from kilonova.kit.versions import at, lift, lower

log = logging.getLogger(__name__)
access = logging.getLogger("kilonova.access")

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
Wsgi = Callable[[Environ, StartResponse], Iterable[bytes]]

MAX_BODY_BYTES = 114_688
BACKLOG = 1024
NOBODY = Context()
NO_METHOD = "The method is not allowed for this resource."


class Ended(Exception):
    """An answer that is decided before a handler is asked: status, text, and how it looks."""

    def __init__(
        self, status: int, said: str = "", *, fault: bool = True, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(said)
        self.status, self.said, self.fault, self.headers = status, said, fault, headers or {}


@dataclass(frozen=True)
class Versioned:
    """A service with microversions. `header` is its name in OpenStack-API-Version; `old_header` an elder one."""

    header: str
    newest: int
    oldest: int = 1
    major: int = 2
    default: int = 1
    old_header: str | None = None

    def asked(self, req: falcon.Request) -> int:
        """The minor version. Raises Ended: 400 where it cannot be read, 406 where there is none such."""
        new = req.get_header("OpenStack-API-Version")
        old = req.get_header(self.old_header) if self.old_header else None
        return self._minor(new, old) if new or old is not None else self.default

    @functools.lru_cache(1024)  # noqa: B019 - a service is for life, and hears the same few headers all day
    def _minor(self, new: str | None, old: str | None) -> int:
        said = None
        for part in (new or "").split(","):
            name, _, number = part.strip().partition(" ")
            if name.lower() == self.header and number:
                said = number.strip()
        if said is None:
            said = old
        if said is None:
            return self.default
        if said.lower() == "latest":
            return self.newest
        if not re.fullmatch(r"[1-9][0-9]*\.(0|[1-9][0-9]*)", said):
            raise Ended(
                400,
                f"API Version String {_plain(said)} is of invalid format. Must be of format MajorNum.MinorNum.",
                headers={"-": "-"},
            )
        major, minor = map(int, said.split("."))
        if major != self.major or not self.oldest <= minor <= self.newest:
            raise Ended(
                406,
                f"Version {said} is not supported by the API. Minimum is {self.major}.{self.oldest} and maximum is {self.major}.{self.newest}.",
                headers=self.told(said),
            )
        return minor

    @functools.lru_cache(1024)  # noqa: B019
    def headers(self, version: int) -> list[tuple[str, str]]:
        return list(self.told(f"{self.major}.{version}").items())

    def told(self, version: str) -> dict[str, str]:
        headers = {"OpenStack-API-Version": f"{self.header} {version}", "Vary": "OpenStack-API-Version"}
        if self.old_header:
            headers |= {self.old_header: version, "Vary": f"OpenStack-API-Version, {self.old_header}"}
        return headers


STATUS: dict[type[Trouble], int] = {
    errors.Invalid: 400,
    errors.Unknown: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.OverQuota: 403,
    errors.NoCapacity: 409,
    errors.Unsupported: 501,
    errors.Unavailable: 503,
    errors.Refused: 409,
    errors.HostGone: 409,
    errors.Aborted: 409,
}


class Failure(NamedTuple):
    """All that is known of what went wrong with a request; `version` is None where it could not be told."""

    status: int
    said: str
    code: str
    request_id: str
    version: int | None


@dataclass(frozen=True)
class Dialect:
    """How one API says that something went wrong. `fault(status, said, code)` is the body; `whole` where that is not enough.

    `admit(request)`: looks what else a request must have; raises Ended.

    `no_method`: what a path answers to a method that it does not have (the Compute API: 404, others: 405).
    `plain_unknown`: unknown paths are answered by the framework's own text and not by a fault.
    """

    fault: Callable[[int, str, str], Any]
    statuses: dict[type[Trouble], int] = field(default_factory=dict)
    no_method: int = 405
    plain_unknown: bool = False
    bad_query: str = "Invalid input for query parameters {name}. Value: {value}. {text}"
    bad_body: str = "Invalid input for field/attribute {name}. Value: {value}. {text}"
    request_id_headers: tuple[str, ...] = ("x-openstack-request-id",)
    unauthorized: str = "The request you have made requires authentication."
    keystone_uri: str = ""
    unexpected: str = "Unexpected API Error. The server has met an error and logged it under this request's id."
    media_types: tuple[str, ...] = ("application/json",)
    any_media_type: bool = False
    exact: bool = False  # a slash behind a path is another path, which nobody has; but behind a version's root
    strip_project: tuple[str, ...] = ()  # prefixes behind which a project id may stand
    whole: Callable[[Failure], Any] | None = None
    admit: Callable[[falcon.Request], None] | None = None

    def status(self, trouble: Trouble) -> int:
        for kind in type(trouble).__mro__:
            if (s := self.statuses.get(kind) or STATUS.get(kind)) is not None:
                return s
        return 500


class Service:
    """One API: a WSGI application. `authenticate(token)` gives a Context or raises Unknown or Unavailable.

    `world` is handed to every handler as `call.world`. `observe(route, status, seconds)` counts.
    """

    def __init__(
        self,
        routes: Routes,
        dialect: Dialect,
        *,
        world: Any,
        authenticate: Callable[[str], Context],
        policy: Policy,
        ids: Ids,
        versions: Versioned | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        link_prefix: str = "",
        observe: Callable[[Route | None, int, float], None] | None = None,
        stopwatch: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.routes, self.dialect, self.world = routes, dialect, world
        self.authenticate, self.policy, self.ids, self.versions = authenticate, policy, ids, versions
        self.max_body_bytes, self.link_prefix = max_body_bytes, link_prefix.rstrip("/")
        self.observe, self.stopwatch = observe, stopwatch
        # What somebody else's error means to a caller; None: that it is ours.
        self.ill: Callable[[Exception], Trouble | None] = lambda e: None
        self.failed: Callable[[Exception], None] | None = None  # told of what nobody expected
        self.turns: AbstractContextManager[Any] | None = (
            None  # for who reads; re-entrant: a service may ask its neighbour
        )
        self.project_prefix = [(p, re.compile(re.escape(p) + r"/([0-9a-f-]+)(?=/|$)")) for p in dialect.strip_project]
        self.falcon, self.places = _found(routes, len(routes.all))

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        environ[SERVICE] = self
        path = environ["PATH_INFO"]
        for prefix, pattern in self.project_prefix:
            if path.startswith(prefix) and (found := pattern.match(path)):
                environ["kilonova.project"] = found[1]
                environ["PATH_INFO"] = prefix + path[found.end() :]
                break
        return self.falcon(environ, start_response)

    # -- one request

    def serve(self, req: falcon.Request, resp: falcon.Response, routes: list[Route], names: dict[str, str]) -> None:
        """A request that found its place.

        Reads take turns, where `turns` is a lock: each SQL statement gives the interpreter away, and threads that
        are all busy would only take it from each other (8 of them showed a third as many servers as one)."""
        if self.dialect.exact and (path := req.env["PATH_INFO"]).endswith("/") and path.count("/") > 2:
            self._nowhere(req, resp)
        elif self.turns is not None and req.method == "GET" and not routes[0].raw:
            with self.turns:
                self._serve(req, resp, routes, names)
        else:
            self._serve(req, resp, routes, names)

    def _serve(self, req: falcon.Request, resp: falcon.Response, routes: list[Route], names: dict[str, str]) -> None:
        self._name(req, resp)
        with about(request_id=req.context.request_id, global_request_id=req.context.global_request_id):
            self._served(req, resp, routes, names)

    def _served(self, req: falcon.Request, resp: falcon.Response, routes: list[Route], names: dict[str, str]) -> None:
        began, route = self.stopwatch(), None
        try:
            if "\x00" in req.path:
                raise NotFound("The resource could not be found.")
            version = self._version(req, resp)
            if self.dialect.admit:
                self.dialect.admit(req)
            route, given, context = self._choose(req, routes, version)
            if route.gone:
                raise Ended(410, "This resource is no longer available. No forwarding address is given.")
            call = self._call(req, route, context, version)
            self._decode(call, req, given)
            if route.policy and not route.late:
                call.check()
            elif not route.policy:
                call.checked = True
            answer = route.do(call, **dict(zip(_names(route.path), names.values(), strict=True)))
            assert call.checked, f"{route.method} {route.path} did not ask its policy"
            self._answer(resp, answer, route, version)
        except (Trouble, Ended) as e:
            self._fault(req, resp, e)
        took_s = self.stopwatch() - began
        if self.observe:
            self.observe(route, resp.status_code, took_s)
        if access.isEnabledFor(logging.INFO):  # without the query: who knows what clients put into it
            where = req.env.get("SCRIPT_NAME", "") + req.path
            access.info("%s %s %d %.1f ms", req.method, where, resp.status_code, took_s * 1000)

    def _name(self, req: falcon.Request, resp: falcon.Response) -> None:
        req.context.request_id = request_id = self.ids.request()
        req.context.global_request_id = _global(req)
        for header in self.dialect.request_id_headers:
            resp.set_header(header, request_id)

    def _version(self, req: falcon.Request, resp: falcon.Response) -> int:
        if self.versions is None:
            return 0
        version = req.context.version = self.versions.asked(req)
        resp.set_headers(self.versions.headers(version))
        return version

    def _choose(self, req: falcon.Request, routes: list[Route], version: int) -> tuple[Route, Any, Context]:
        """The route for this method, version and action; with the body, where that was needed to tell."""
        if all(r.open for r in routes):
            context = NOBODY
        else:
            context = self._who(req)
            mine = req.env.get("kilonova.project")
            if mine is not None and mine != context.project_id and not self._elsewhere(context):
                raise Ended(
                    400,
                    f"Malformed request URL: URL's project_id '{mine}' doesn't match Context's project_id '{context.project_id}'",
                )
        self._media_type(req, routes)
        if routes[0].action is None:
            fit = next((r for r in routes if version in r.versions), None)
            if fit is None:
                raise self._outside(routes[0], version)
            return fit, ..., context
        body = self._json(req)
        if not isinstance(body, dict) or len(body) != 1:
            raise Ended(400, "Malformed request body")
        name = next(iter(body))
        named = [r for r in routes if r.action == name]
        if not named:
            raise Ended(400, f"There is no such action: {_plain(name)}")
        fit = next((r for r in named if version in r.versions), None)
        if fit is None:
            raise Ended(named[0].outside, "The resource could not be found.")
        return fit, body[name], context

    def _outside(self, route: Route, version: int) -> Ended:
        """There is no such thing in this version; or the thing is there, and the method is not."""
        if route.outside != 405:
            return Ended(route.outside, "The resource could not be found.")
        place = self.places[_by_place(route.path)]
        methods = sorted(m for m, routes in place.items() if any(version in r.versions for r in routes))
        return Ended(405, NO_METHOD, headers={"Allow": ", ".join(methods)})

    def _elsewhere(self, context: Context) -> bool:
        return context.system is not None

    def _who(self, req: falcon.Request) -> Context:
        token = req.get_header("X-Auth-Token")
        if not token:
            raise Unknown(self.dialect.unauthorized)
        context = self.authenticate(token)
        if self.policy.allows(context, "context_is_admin", {}):
            context = _admin(context)
        return context

    def _media_type(self, req: falcon.Request, routes: list[Route]) -> None:
        if self.dialect.any_media_type or routes[0].raw:
            return
        said = (req.content_type or "").partition(";")[0].strip().lower()
        if said and said != "text/plain" and said not in self.dialect.media_types:
            raise Ended(415, "Unsupported Content-Type")

    def _call(self, req: falcon.Request, route: Route, context: Context, version: int) -> Call:
        env = req.env
        prefix = (
            self.link_prefix
            or f"{env['wsgi.url_scheme']}://{env.get('HTTP_HOST') or env['SERVER_NAME']}{env.get('SCRIPT_NAME', '')}"
        )
        project = env.get("kilonova.project")
        return Call(
            route=route,
            context=context,
            world=self.world,
            version=version,
            body=None,
            query=None,
            request_id=req.context.request_id,
            url=prefix,
            path=req.path,
            headers=req.get_header,
            stream=env.get("wsgi.input"),
            allowed=lambda rule, target: self.policy.allows(context, rule, target),
            global_request_id=req.context.global_request_id,
            remote=env.get("REMOTE_ADDR", ""),
            project_in_url=f"/{project}" if project else "",
            content_length=req.content_length,
            raw_query=req.query_string,
        )

    def _decode(self, call: Call, req: falcon.Request, given: Any) -> None:
        route = call.route
        call.query = self._query(req, route, call.version)
        if route.raw or route.body is None:
            return
        if given is ...:
            given = self._json(req)
        model = at(route.body, call.version)
        try:
            decoded = msgspec.convert(given, model)
        except msgspec.ValidationError as e:
            raise Invalid(_explained(str(e), given, self.dialect.bad_body, route.action or "")) from None
        call.body = lift(decoded, route.body) if model is not route.body else decoded

    def _query(self, req: falcon.Request, route: Route, version: int) -> Any:
        try:
            text = urllib.parse.unquote_to_bytes(req.query_string.replace("+", " ")).decode()
        except UnicodeDecodeError:
            raise Invalid("Query string is not UTF-8 encoded") from None
        if "\x00" in text:
            raise Invalid("Query string has a null character")
        said: dict[str, list[str]] = {}
        for name, value in urllib.parse.parse_qsl(req.query_string, keep_blank_values=True):
            said.setdefault(name, []).append(value)
        if route.query is None:
            if said and version >= route.strict:
                raise Invalid(f"Additional properties are not allowed ('{_plain(next(iter(said)))}' was unexpected)")
            return None
        model = at(route.query, version)
        kinds = _kinds(model)
        if version >= route.strict and (unknown := said.keys() - kinds.keys()):
            raise Invalid(f"Additional properties are not allowed ('{_plain(min(unknown))}' was unexpected)")
        flat: dict[str, Any] = {}
        for name, values in said.items():
            if _is_list(kinds.get(name)):
                flat[name] = values
            elif len(values) > 1 and name in kinds:
                raise Invalid(
                    self.dialect.bad_query.format(
                        name=_plain(name), value=_shown(values, name), text=f"{values} is too long"
                    )
                )
            else:
                flat[name] = values[-1]
        try:
            decoded = msgspec.convert(flat, model, strict=False)
        except msgspec.ValidationError as e:
            raise Invalid(_explained(str(e), flat, self.dialect.bad_query, "")) from None
        return lift(decoded, route.query) if model is not route.query else decoded

    def _json(self, req: falcon.Request) -> Any:
        raw = read_body(req.env, self.max_body_bytes)
        if not raw.strip():
            return None
        try:
            body = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise Ended(400, "Malformed request body") from None
        if b"\\u0000" in raw and _has_null(body):
            raise Ended(400, "Malformed request body")  # PostgreSQL cannot keep it, and no client means it
        return body

    def _answer(self, resp: falcon.Response, answer: Any, route: Route, version: int) -> None:
        reply = answer if isinstance(answer, Reply) else Reply(answer)
        status = route.status(version) if reply.status is None else reply.status
        resp.status = status
        for name, value in reply.headers.items():
            resp.set_header(name, value)
        if reply.stream is not None:
            resp.content_type = reply.content_type or "application/octet-stream"
            if reply.length is not None:
                resp.set_stream(reply.stream, reply.length)
            else:
                resp.stream = reply.stream
        elif isinstance(reply.body, bytes | str):
            resp.data = reply.body.encode() if isinstance(reply.body, str) else reply.body
            resp.content_type = reply.content_type or (
                "text/plain; charset=UTF-8" if isinstance(reply.body, str) else "application/octet-stream"
            )
        elif reply.body is not None:
            resp.data = msgspec.json.encode(_lowered(reply.body, version) if self.versions else reply.body)
            resp.content_type = reply.content_type or "application/json"
        else:
            resp.data = b""
            resp.content_type = reply.content_type or "application/json"

    # -- the one door for errors

    def _fault(self, req: falcon.Request, resp: falcon.Response, e: Trouble | Ended) -> None:
        if isinstance(e, Ended):
            status, said, code, whole = e.status, e.said, "", e.fault
            for name, value in e.headers.items():
                if name != "-":
                    resp.set_header(name, value)
        else:
            status, said, code, whole = self.dialect.status(e), e.said, e.code, True
            if e.why:
                log.info("%s: %s (%s)", req.context.request_id, said, e.why)
        resp.status = status
        resp.stream = None
        if status == 401:
            resp.set_header("WWW-Authenticate", f'Keystone uri="{self.dialect.keystone_uri}"')
        if whole:
            if self.dialect.whole:
                version = getattr(req.context, "version", None)
                body = self.dialect.whole(Failure(status, said, code, req.context.request_id, version))
            else:
                body = self.dialect.fault(status, said, code)
            resp.data = body if isinstance(body, bytes) else msgspec.json.encode(body)
            resp.content_type = "text/html; charset=UTF-8" if isinstance(body, bytes) else "application/json"
        else:
            resp.data, resp.content_type = said.encode(), "text/plain; charset=UTF-8"

    def _failed(self, req: falcon.Request, resp: falcon.Response, e: Exception, _: Any) -> None:
        """Whatever nobody expected. The log knows; the caller is told nothing but the request's id."""
        if not hasattr(req.context, "request_id"):
            self._name(req, resp)
        if isinstance(e, falcon.HTTPError):
            self._fault(req, resp, Ended(int(str(e.status)[:3]), str(e.description or e.title or e.status)))
            return
        if isinstance(e, Trouble | Ended):
            self._fault(req, resp, e)
            return
        if (trouble := self.ill(e)) is not None:
            self._fault(req, resp, trouble)
            return
        place = req.uri_template or ""
        where = place if "token" in place else req.path  # a token may stand in the path itself
        log.exception("%s %s failed (%s)", req.method, where, req.context.request_id)
        if self.failed is not None:
            try:
                self.failed(e)
            except Exception:
                log.exception("nobody could be told of that")
        self._fault(req, resp, Ended(500, self.dialect.unexpected))

    def _nowhere(self, req: falcon.Request, resp: falcon.Response, **_: Any) -> None:
        self._name(req, resp)
        if self.dialect.plain_unknown:
            self._fault(req, resp, Ended(404, *_framework_404(req)))
            if (req.get_header("Accept") or "").startswith("application/json"):
                resp.data = msgspec.json.encode(
                    {"message": "The resource could not be found.", "code": "404 Not Found", "title": "Not Found"}
                )
                resp.content_type = "application/json"
            else:
                resp.data = b"404 Not Found\n\nThe resource could not be found.\n"
                resp.content_type = "text/plain; charset=UTF-8"
        else:
            self._fault(req, resp, NotFound("The resource could not be found."))
        if self.observe:
            self.observe(None, resp.status_code, 0.0)

    def no_method(self, req: falcon.Request, resp: falcon.Response, methods: list[str]) -> None:
        if self.dialect.no_method == 404:
            return self._nowhere(req, resp)
        self._name(req, resp)
        return self._fault(req, resp, Ended(405, NO_METHOD, headers={"Allow": ", ".join(methods)}))


class Mount:
    """Several applications on one port, by the first part of the path: `{"/compute": app}`; `root` for the rest."""

    def __init__(self, apps: dict[str, Wsgi], root: Wsgi) -> None:
        self.apps, self.root = apps, root

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        end = path.find("/", 1)
        first = path if end < 0 else path[:end]
        app = self.apps.get(first)
        if app is None:
            return self.root(environ, start_response)
        environ["SCRIPT_NAME"] = environ.get("SCRIPT_NAME", "") + first
        environ["PATH_INFO"] = path[len(first) :] or "/"
        return app(environ, start_response)


def read_body(environ: Environ, most: int) -> bytes:
    """The whole body, of a length said or not. Raises Ended 413 where it is longer than `most` bytes."""
    length, stream = environ.get("CONTENT_LENGTH"), environ.get("wsgi.input")
    if length in (None, "") and "chunked" not in environ.get("HTTP_TRANSFER_ENCODING", "").lower():
        return b""
    too_large = Ended(413, "Request is too large.", fault=False)
    if length not in (None, ""):
        if not length.isdigit():
            raise Ended(400, "Malformed request body")
        if int(length) > most:
            raise too_large
    read = bytearray()
    want = int(length) if length not in (None, "") else most + 1
    while stream is not None and len(read) < want and (chunk := stream.read(min(65536, want - len(read)))):
        read += chunk
    if len(read) > most:
        raise too_large
    return bytes(read)


# ---- readings of the registry


def _places(routes: Routes) -> dict[str, dict[str, list[Route]]]:
    places: dict[str, dict[str, list[Route]]] = {}
    for r in routes:
        places.setdefault(_by_place(r.path), {}).setdefault(r.method, []).append(r)
    return places


_FIELD = re.compile(r"\{(\w+)(?=[:}])")


def _by_place(path: str) -> str:
    """Falcon wants one name for the same place in all paths; ours are called after what they are."""
    count = itertools.count()
    return _FIELD.sub(lambda _: f"{{p{next(count)}", path.rstrip("/")) or "/"


@functools.cache
def _names(path: str) -> tuple[str, ...]:
    return tuple(_FIELD.findall(path))


SERVICE = "kilonova.service"  # in a request's environment: whose it is


@functools.lru_cache(32)
def _found(routes: Routes, _: int) -> tuple[falcon.App[Any, Any], dict[str, dict[str, list[Route]]]]:
    """Where each path leads: laid out once for all services of these routes, as many as there are of them by now."""
    app: Any = falcon.App(request_type=_Request)
    app.req_options.strip_url_path_trailing_slash = True
    app.req_options.auto_parse_form_urlencoded = False
    app.add_error_handler(Exception, lambda req, resp, e, names: req.env[SERVICE]._failed(req, resp, e, names))
    app.add_sink(lambda req, resp, **names: req.env[SERVICE]._nowhere(req, resp, **names), "/")
    places = _places(routes)
    for path, place in places.items():
        app.add_route(path, _resource(path, place))
    return app, places


def _resource(path: str, place: dict[str, list[Route]]) -> Any:
    methods = sorted(place)

    def responder(routes: list[Route]) -> Callable[..., None]:
        def respond(_: Any, req: falcon.Request, resp: falcon.Response, **names: str) -> None:
            req.env[SERVICE].serve(req, resp, routes, names)

        return respond

    def refuse(_: Any, req: falcon.Request, resp: falcon.Response, **names: str) -> None:
        req.env[SERVICE].no_method(req, resp, methods)

    every = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
    members = {f"on_{m.lower()}": responder(place[m]) if m in place else refuse for m in every}
    if "GET" in place and "HEAD" not in place:
        members["on_head"] = responder(place["GET"])
    return type(f"At {path}", (), members)()


_REQUEST_ID = re.compile(r"req-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def _global(req: falcon.Request) -> str | None:
    """What the one who asks calls all that he asks for the same reason; None where it is no id."""
    said = req.get_header("X-OpenStack-Request-ID")
    return said if said is not None and _REQUEST_ID.fullmatch(said) else None


class _Request(falcon.Request):
    """Falcon's, with nothing read before it is asked for."""


_ADMINS: dict[Context, Context] = {}


def _admin(context: Context) -> Context:
    if (same := _ADMINS.get(context)) is None:
        if len(_ADMINS) > 1000:
            _ADMINS.clear()
        same = _ADMINS[context] = msgspec.structs.replace(context, is_admin=True)
    return same


def _lowered(body: Any, version: int) -> Any:
    if isinstance(body, msgspec.Struct):
        return lower(body, version)
    if isinstance(body, dict):
        return {k: _lowered(v, version) for k, v in body.items()}
    if isinstance(body, list):
        return [_lowered(v, version) for v in body]
    return body


@functools.cache
def _kinds(model: Any) -> dict[str, Any]:
    """The types of its fields, by their names on the wire."""
    return {f.encode_name: f.type for f in msgspec.structs.fields(model)}


@functools.cache
def _is_list(kind: Any) -> bool:
    """Is this the type of a parameter that may be repeated?"""
    return isinstance(kind, msgspec.inspect.ListType) or "list[" in str(kind)


def _framework_404(req: falcon.Request) -> tuple[str]:
    return ("The resource could not be found.",)


def _has_null(body: Any) -> bool:
    """Is there a null character in any text of it?"""
    if isinstance(body, dict):
        return any("\x00" in k or _has_null(v) for k, v in body.items())
    return any(map(_has_null, body)) if isinstance(body, list) else isinstance(body, str) and "\x00" in body


# ---- what was wrong with a body

_WHERE = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")


def _explained(text: str, body: Any, form: str, root: str) -> str:
    """msgspec's words as the Compute API says them: which field, its value, and what is wrong with it."""
    found = _WHERE.match(text)
    what, path = (found["what"], found["path"] or "") if found else (text, "")
    steps = re.findall(r"\.([^.\[\]]+(?:\.[^.\[\]]+)*?)(?=\.|\[|$)|(\[[^\]]*\])", path)
    names = [n for n, _ in steps if n]
    if m := _UNKNOWN.match(what):
        what = f"Additional properties are not allowed ('{_plain(m[1])}' was unexpected)"
    elif m := _MISSING.match(what):
        what = f"'{m[1]}' is a required property"
    if not names and not root:
        return _plain(what.replace("`", "'"))
    value = body
    for n in names:
        value = value.get(n, value) if isinstance(value, dict) else value
    name = names[-1] if names else root
    return form.format(name=_plain(name), value=_shown(value, name), text=_plain(what.replace("`", "'")))


def _shown(value: Any, name: str) -> str:
    if "pass" in name.lower():
        return "***"
    return _plain(str(value))[:255]


def _plain(text: str) -> str:
    """Without control characters, so that no reader of an error is fooled."""
    return "".join(c if c.isprintable() else "?" for c in text)[:1000]


def compute_fault(status: int, said: str, code: str) -> dict[str, Any]:
    """`{"itemNotFound": {"code": 404, "message": …}}` (Compute API, faults)."""
    return {FAULT_NAMES.get(status, "computeFault"): {"code": status, "message": said}}


FAULT_NAMES = {
    400: "badRequest",
    401: "unauthorized",
    403: "forbidden",
    404: "itemNotFound",
    405: "badMethod",
    409: "conflictingRequest",
    413: "overLimit",
    415: "badMediaType",
    429: "overLimit",
    501: "notImplemented",
    503: "serviceUnavailable",
}


# ---- Granian


class Server:
    """Granian in this process: a thread of its own for the wire, and `threads` that call the application.

    Granian's usual worker is a process; `up` holds API, engine and companions together in one, so its threaded
    worker is used, which is meant for free-threaded Python and works as well with the GIL (see
    `docs/decisions/one-process.md`).  `listener` may be a socket that somebody else bound, in another network
    namespace perhaps.  `stop` returns when the last reply is out or the time is.
    """

    def __init__(self, app: Wsgi, listener: socket.socket, *, threads: int = 4, tls: Identity | None = None) -> None:
        self.app, self.listener, self.threads = app, listener, threads
        # A descriptor of its own: Granian closes what it is given, and a second close would hit who has that number by then.
        self.wire = _wire(os.dup(listener.fileno()), threads, tls)
        self.thread = threading.Thread(target=self._serve, name="granian", daemon=True)

    def start(self) -> None:
        """Raises Unavailable where another took the address since it was bound."""
        try:
            self.listener.listen(BACKLOG)  # it may only be bound, so that nobody waits in line for who is not ready
        except OSError as e:
            raise errors.Unavailable(f"Cannot listen on {self.listener.getsockname()}: {e.strerror}.") from None
        self.thread.start()

    def stop(self, timeout_s: float = 10) -> None:
        self.wire.main_loop_interrupt.set()
        self.thread.join(timeout_s)
        self.listener.close()

    def _serve(self) -> None:
        self.wire.serve(target_loader=lambda *_, **__: self.app, wrap_loader=False)


def listen(host: str, port: int, backlog: int = BACKLOG) -> socket.socket:
    """A bound, listening TCP socket; port 0 takes a free one. Raises Unavailable where the address is taken."""
    s = bound(host, port)
    s.listen(backlog)
    return s


def bound(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """The same, not listening yet: who comes before that is refused, and not kept in line for what may be too late then.

    `shared`: by processes of this user who want it so, too; the kernel gives each its part of who comes.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    # Connections inherit these. A side that is dead, or stopped to take what it asked for, does not hold a thread for ever.
    s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    patience = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 120_000}
    for option, value in patience.items():
        if hasattr(socket, option):
            s.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    try:
        s.bind((host, port))
    except OSError as e:
        s.close()
        raise errors.Unavailable(f"Cannot listen on {host}:{port}: {e.strerror}.") from None
    return s


def _wire(fd: int, threads: int, tls: Identity | None) -> Any:
    """Imported late: only who serves pays for it."""
    from granian._granian import SocketHolder
    from granian.constants import HTTPModes, Interfaces, SSLProtocols
    from granian.server.mt import MTServer

    class InProcess(MTServer):  # type: ignore[misc]
        """Without what belongs to a process of its own: signals, pid files, the check for a GIL."""

        def _serve(self, spawn_target: Any, target_loader: Any) -> None:
            self._ssp, self._shd = None, SocketHolder(fd, False, BACKLOG)  # type: ignore[call-arg]
            self._spawn_workers(spawn_target, target_loader())
            self.main_loop_interrupt.wait()
            self._stop_workers()

    return InProcess(
        "kilonova",
        interface=Interfaces.WSGI,
        workers=1,
        blocking_threads=threads,
        http=HTTPModes.http1,
        websockets=False,
        log_enabled=False,
        ssl_cert=tls and tls.cert_file,
        ssl_key=tls and tls.key_file,
        ssl_protocol_min=SSLProtocols.tls12,
    )
