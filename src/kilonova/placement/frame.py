"""What all chapters of the Placement API have in common: its versions, its troubles, moments, what a query may say."""

import email.utils
import random
import re
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated as A
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import falcon
import msgspec
import sqlalchemy as sa
from msgspec import Meta

from kilonova.kit.clock import Clock, Ids
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Conflict, Invalid
from kilonova.kit.http import Dialect, Ended, Failure, Versioned
from kilonova.kit.routes import Call, Reply, Routes
from kilonova.model import options
from kilonova.placement.shown import Shown
from kilonova.store.providers import RACE
from kilonova.store.trees import Trees

P = ParamSpec("P")
T = TypeVar("T")

OLDEST, NEWEST_MINOR = 0, 39
VERSIONS = Versioned(header="placement", newest=NEWEST_MINOR, oldest=OLDEST, major=1, default=0)
R = Routes("placement")
MAX_BODY_BYTES = 8 << 20  # a reshaper rewrites whole trees
TRIES = 8

DUPLICATE_KEY, BAD_VALUE, MISSING_VALUE = (
    "placement.query.duplicate_key",
    "placement.query.bad_value",
    "placement.query.missing_value",
)

UUID = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
MAX_INT = 2**31 - 1
Uuid = A[str, Meta(pattern=rf"\A{UUID}\Z")]
ProviderKey = A[str, Meta(pattern=r"\A[0-9a-fA-F-]{36}\Z")]
ClassName = A[str, Meta(pattern=r"\A[A-Z0-9_]+\Z", max_length=255)]
CustomName = A[str, Meta(pattern=r"\ACUSTOM_[A-Z0-9_]+\Z", max_length=255)]
Amount = A[int, Meta(ge=1, le=MAX_INT)]


@dataclass
class World:
    """What the service works with."""

    db: Db
    clock: Clock
    ids: Ids
    config: options.Placement = field(default_factory=options.Placement)
    dice: random.Random = field(default_factory=random.Random)
    trees: Trees = field(default_factory=Trees)
    shown: Shown = field(default_factory=Shown)

    def change(self, work: Callable[Concatenate[Tx, P], T], *args: P.args, **more: P.kwargs) -> T:
        """`work(tx, …)` in a transaction; from the top again when another was first to write the same row.

        Raises Conflict when that happens all the time.
        """
        for _ in range(TRIES):
            try:
                return self.db.run(work, *args, **more)
            except sa.exc.IntegrityError as e:
                why = str(e)
        raise Conflict("Too many changes at once; try again.", code=RACE, why=why)


# ---- troubles


def errors(f: Failure) -> dict[str, Any]:
    """`{"errors": [{"status", "title", "detail", "request_id", "code"}]}`; the code since 1.23."""
    error: dict[str, Any] = {
        "status": f.status,
        "title": HTTPStatus(f.status).phrase,
        "detail": f.said,
        "request_id": f.request_id,
    }
    if f.version is None and f.status == 406:
        error |= {"min_version": f"1.{OLDEST}", "max_version": f"1.{NEWEST_MINOR}"}
    if f.version is not None and f.version >= 23:
        error["code"] = f.code or "placement.undefined_code"
    return {"errors": [error]}


def admit(req: falcon.Request) -> None:
    """JSON in, JSON out. Raises Ended."""
    if req.method in ("GET", "HEAD") and req.path != "/" and not req.client_accepts("application/json"):
        raise Ended(406, "Only application/json is provided")
    if req.method in ("PUT", "POST") and req.content_length:
        kind = (req.content_type or "").partition(";")[0].strip().lower()
        if not kind:
            raise Ended(400, "content-type header required when content-length > 0")
        if kind != "application/json":
            raise Ended(415, "The media type is not supported, use application/json")


DIALECT = Dialect(
    fault=lambda status, said, code: {},
    whole=errors,
    admit=admit,
    bad_body="JSON does not validate: {name}: {text}",
    bad_query="Invalid query string parameters: {name}: {text}",
    unauthorized="Authentication required",
    unexpected="The server has met an error and logged it under this request's id.",
)


# ---- answers


def shown(call: Call, body: Any, moments: Iterable[float | None] = (), **more: Any) -> Reply:
    """A body with its moment (since 1.15): the newest of those of what is shown, else now."""
    return Reply(body, headers={**more.pop("headers", {}), **dated(call, moments)}, **more)


def dated(call: Call, moments: Iterable[float | None] = ()) -> dict[str, str]:
    if call.version < 15:
        return {}
    at = max((m for m in moments if m is not None), default=call.world.clock.now())
    return {"Last-Modified": email.utils.formatdate(at, usegmt=True), "Cache-Control": "no-cache"}


def encoded(body: Any) -> dict[str, Any]:
    """For a `Reply` with a long body, which has no history: not looked through again."""
    return {"body": msgspec.json.encode(body), "content_type": "application/json"}


def base_path(call: Call) -> str:
    """Where the service is mounted, without the host: links in bodies begin with it."""
    return urllib.parse.urlsplit(call.url).path


def link(call: Call, *steps: str) -> str:
    return "/".join((base_path(call), *(urllib.parse.quote(s) for s in steps)))


def location(call: Call, *steps: str) -> dict[str, str]:
    return {"Location": "/".join((call.url, *(urllib.parse.quote(s) for s in steps)))}


# ---- queries


def asked(call: Call, allowed: Callable[[str], bool]) -> dict[str, list[str]]:
    """The query, each name with all its values. Raises Invalid for names that are not allowed."""
    found: dict[str, list[str]] = {}
    for name, value in urllib.parse.parse_qsl(call.raw_query, keep_blank_values=True):
        found.setdefault(name, []).append(value)
    for name in found:
        if not allowed(name):
            raise Invalid(
                "Invalid query string parameters: Additional properties are not allowed "
                f"('{plain(name)}' was unexpected)"
            )
    return found


def plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:255]


_UUID = re.compile(UUID)
_CLASS = re.compile(r"[A-Z0-9_]{1,255}")


def is_uuid(text: str) -> bool:
    return _UUID.fullmatch(text) is not None


def resources(text: str, name: str = "resources") -> dict[str, int]:
    """Of `VCPU:2,MEMORY_MB:512`. Raises Invalid."""
    found = {}
    for part in text.split(","):
        kind, _, amount = part.partition(":")
        if not _CLASS.fullmatch(kind) or not re.fullmatch(r"[0-9]{1,18}", amount, re.ASCII):
            raise Invalid(
                f"Badly formed {plain(name)} parameter. Expected {plain(name)} query string parameter in form: "
                f"?resources=VCPU:2,MEMORY_MB:1024. Got: {plain(text)}."
            )
        if int(amount) < 1:
            raise Invalid(f"Requested resource {kind} requires amount >= 1.")
        found[kind] = int(amount)
    return found


class Traits(NamedTuple):
    """`required`: of each set, one."""

    required: tuple[frozenset[str], ...]
    forbidden: frozenset[str]

    @property
    def all(self) -> frozenset[str]:
        return self.forbidden.union(*self.required)


def traits(values: list[str], version: int, name: str = "required", *, any_of: bool = True) -> Traits:
    """Of `T1,!T2` (1.22) and `in:T1,T2` (1.39; repeatable from then on, before the last value counts). Raises Invalid."""
    required, forbidden = list[frozenset[str]](), set[str]()
    for text in values if version >= 39 and any_of else values[-1:]:
        alternatives = version >= 39 and any_of and text.startswith("in:")
        words = text.removeprefix("in:").split(",") if alternatives else text.split(",")
        bad = [w for w in words if not _CLASS.fullmatch(w.removeprefix("!") if version >= 22 else w)]
        if bad or (alternatives and any(w.startswith("!") for w in words)):
            form = "HW_CPU_X86_VMX,CUSTOM_MAGIC" if version < 22 else "HW_CPU_X86_VMX,!CUSTOM_MAGIC"
            raise Invalid(
                f"Invalid query string parameters: Expected '{plain(name)}' parameter value of the form: {form}. "
                f"Got: {plain(text)}"
            )
        if alternatives:
            required.append(frozenset(words))
        else:
            required += [frozenset((w,)) for w in words if not w.startswith("!")]
            forbidden |= {w[1:] for w in words if w.startswith("!")}
    if both := sorted({t for any_of_these in required if any_of_these <= forbidden for t in any_of_these}):
        raise Invalid(
            f"Conflicting required and forbidden traits found in the following traits keys: {plain(name)}: "
            f"({', '.join(both)})"
        )
    return Traits(tuple(required), frozenset(forbidden))


class Members(NamedTuple):
    """`of`: of each set, one aggregate; `not_of`: none of these."""

    of: tuple[frozenset[str], ...] = ()
    not_of: frozenset[str] = frozenset()


def members(values: list[str], version: int, name: str = "member_of") -> Members:
    """Of `U`, `in:U1,U2` and (1.32) `!U`, `!in:U1,U2`; several are all meant (1.24). Raises Invalid."""
    if len(values) > 1 and version < 24:
        raise Invalid(f"Multiple {plain(name)} parameters are not supported")
    of, not_of = list[frozenset[str]](), set[str]()
    for text in values:
        rest, negative = (text[1:], True) if version >= 32 and text.startswith("!") else (text, False)
        words = rest.removeprefix("in:").split(",") if rest.startswith("in:") else [rest]
        if not all(map(is_uuid, words)):
            raise Invalid(
                f"Invalid query string parameters: Expected '{plain(name)}' parameter to contain valid UUID(s). "
                f"Got: {plain(text)}"
            )
        if negative:
            not_of |= set(words)
        else:
            of.append(frozenset(words))
    return Members(tuple(of), frozenset(not_of))


# ---- the first thing that a client asks


@R.get("/", open=True)
def versions(call: Call) -> Reply:
    about = {
        "id": "v1.0",
        "max_version": f"1.{NEWEST_MINOR}",
        "min_version": f"1.{OLDEST}",
        "status": "CURRENT",
        "links": [{"rel": "self", "href": ""}],
    }
    return shown(call, {"versions": [about]})
