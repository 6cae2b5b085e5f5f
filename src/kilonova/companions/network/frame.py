"""What all resources of the Network API have in common: lists with their filters and pages, one thing, tags, troubles.

A `Kind` is a row of facts about one resource; `common` makes the routes that are alike for all out of it.
"""

import functools
import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated as A
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
import sqlalchemy as sa
from msgspec import UNSET, Meta, UnsetType

from kilonova.companions.network.rules import NAMES
from kilonova.companions.network.world import Again, World
from kilonova.kit.clock import iso, parsed
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound, OverQuota
from kilonova.kit.http import Dialect
from kilonova.kit.ready import Condition
from kilonova.kit.routes import Call, Context, Reply, Routes
from kilonova.store import networks as store

S = TypeVar("S", bound=msgspec.Struct)
View = dict[str, Any]
R = Routes("network")

Text = A[str, Meta(max_length=255, pattern=r"\A[^\x00]*\Z")]
Project = A[str, Meta(max_length=255, pattern=r"\A[^\x00]*\Z")]
UUID = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
Uuid = A[str, Meta(pattern=rf"\A{UUID}\Z")]
Flag = bool | Literal["true", "True", "TRUE", "false", "False", "FALSE", "0", "1", 0, 1]  # clients say it in all ways
Digits = A[str, Meta(pattern=r"\A-?[0-9]{1,9}\Z")]
Tag = A[str, Meta(min_length=1, max_length=60, pattern=r"\A[^,\x00]*\Z")]
Unset = UnsetType

MOST_TAGS = 50
MOST = 2**31 - 1  # in a column of numbers; more than any that is there


# ---- troubles


class Stale(Conflict):
    """The caller's If-Match names another revision (412)."""


_UNRECOGNIZED = re.compile(r"Additional properties are not allowed \('(.*)' was unexpected\)", re.DOTALL)
_TYPES = {401: "Unauthorized", 403: "PolicyNotAuthorized", 404: "HTTPNotFound", 409: "Conflict"}


def neutron_error(status: int, said: str, code: str) -> dict[str, Any]:
    """`{"NeutronError": {"type": …, "message": …, "detail": ""}}` (Network API, faults); 401 is identity's form."""
    if status == 401:
        return {"error": {"code": 401, "title": "Unauthorized", "message": said}}
    if unknown := _UNRECOGNIZED.search(said):
        said = f"Unrecognized attribute(s) '{unknown[1]}'"
    kind = code or _TYPES.get(status) or ("HTTPBadRequest" if status < 500 else "HTTPInternalServerError")
    return {"NeutronError": {"type": kind, "message": said, "detail": ""}}


DIALECT = Dialect(
    fault=neutron_error,
    statuses={OverQuota: 409, Stale: 412},
    bad_body="Invalid input for {name}. Reason: {text}",
    bad_query="Invalid input for {name}. Reason: {text}",
    unexpected="Request Failed: internal server error while processing your request.",
    any_media_type=True,
)


def bad(said: str, code: str = "InvalidInput") -> Invalid:
    return Invalid(f"Invalid input for operation: {said}" if code == "InvalidInput" else said, code=code)


# ---- kinds


@dataclass(frozen=True)
class Kind(Generic[S]):
    """One resource. `views(tx, world, things)` are their whole views, one page at a time.

    `scope(project)` is the SQL of what a project sees; `filters` are those that no column answers by itself.
    `target` is what policy is asked about; where it needs the network, `network_of` says whose it is.
    """

    one: str
    many: str
    struct: type[S]
    missing: str
    named: str
    views: Callable[[Tx, World, Sequence[S]], list[View]]
    scope: Callable[[str], Any]
    filters: Mapping[str, Callable[[list[str]], Any]] = field(default_factory=dict)
    target: Callable[[Tx, S], dict[str, Any]] = lambda tx, thing: target(thing)
    hidden: frozenset[str] = frozenset({"tags", "charged", "auto_of", "default_of", "meaning"})

    @property
    def path(self) -> str:
        return f"/v2.0/{self.many.replace('_', '-')}"

    @property
    def table(self) -> sa.Table:
        return store.TABLES[self.struct]

    def gone(self, id: str) -> NotFound:
        return NotFound(f"{self.named} {printable(id)} could not be found.", code=self.missing)

    def get(self, tx: Tx, id: str) -> S:
        """Raises NotFound."""
        found = store.get(tx, self.struct, id) if is_uuid(id) else None
        if found is None:
            raise self.gone(id)
        return found


def is_uuid(text: str) -> bool:
    return _IS_UUID.fullmatch(text) is not None


_IS_UUID = re.compile(UUID)


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:255]


def api_name(column: str) -> str:
    """`binding_host_id` → `binding:host_id`."""
    if column == "revision":
        return "revision_number"
    for prefix in ("binding", "provider", "router_external"):
        if column.startswith(prefix):
            return column.replace("_", ":", 1)
    return column


def columns(kind: Kind[Any]) -> dict[str, sa.Column[Any]]:
    """What can be asked for and sorted by, by the API's names."""
    if (known := _COLUMNS.get(kind.one)) is None:
        named = {api_name(c.name): c for c in kind.table.columns if c.name not in kind.hidden}
        known = {n: c for n, c in named.items() if not isinstance(c.type, store.Json)}
        known["tenant_id"] = kind.table.c.project_id
        _COLUMNS[kind.one] = known
    return known


_COLUMNS: dict[str, dict[str, sa.Column[Any]]] = {}


def standard(thing: Any) -> View:
    """What every view begins with."""
    view = {
        "id": thing.id,
        "project_id": thing.project_id,
        "tenant_id": thing.project_id,
        "description": thing.description,
        "tags": split_tags(thing.tags),
        "revision_number": thing.revision,
        "created_at": iso(thing.created_at),
        "updated_at": iso(thing.updated_at),
    }
    if hasattr(thing, "name"):
        view["name"] = thing.name
    return view


def made(call_or_world: World, project: str) -> dict[str, Any]:
    """The columns that every new thing has."""
    now = call_or_world.clock.now()
    return {
        "id": call_or_world.ids.uuid(),
        "project_id": project,
        "tags": "",
        "revision": 0,
        "created_at": now,
        "updated_at": now,
    }


def split_tags(text: str) -> list[str]:
    return text[1:-1].split(",") if text else []


def join_tags(tags: Iterable[str]) -> str:
    known = sorted(set(tags))
    return f",{','.join(known)}," if known else ""


# ---- who may


def target(thing: Any, network: store.Network | None = None) -> dict[str, Any]:
    """What policy knows of a thing; `network` is the one it is a part of."""
    owner = network.project_id if network else ""
    return {
        "project_id": thing.project_id,
        "network:project_id": owner,
        "network:tenant_id": owner,
        "shared": bool(getattr(network or thing, "shared", False)),
        "router:external": bool(getattr(network or thing, "router_external", False)),
    }


STRANGER = {
    "project_id": "-",
    "network:project_id": "-",
    "network:tenant_id": "-",
    "shared": False,
    "router:external": False,
}


def sees_all(call: Call, kind: Kind[Any]) -> bool:
    """May he see what is a stranger's? Then he sees everything."""
    return call.may(f"get_{kind.one}", STRANGER)


def allow(call: Call, verb: str, kind: Kind[Any], about: dict[str, Any], id: str) -> None:
    """Raises NotFound where he may not even know of it, Forbidden where he may not do this."""
    if not call.may(f"get_{kind.one}", about):
        call.checked = True
        raise kind.gone(id)
    call.check(about, f"{verb}_{kind.one}" if f"{verb}_{kind.one}" in NAMES else verb)


def allow_said(call: Call, verb: str, said: Mapping[str, Any], about: dict[str, Any]) -> None:
    """Attributes with a rule of their own. What is said as it would be anyhow needs no right in a new thing."""
    for name, value in said.items():
        rule = f"{verb}:{name}"
        if rule in NAMES and not (verb.startswith("create") and value in NOTHING and name in HARMLESS):
            call.check(about, rule)


NOTHING: tuple[Any, ...] = (False, None, "", [], {})
HARMLESS = frozenset(
    {"shared", "router:external", "is_default", "binding:host_id", "binding:profile", "device_owner"}
    | {"allowed_address_pairs", "fixed_ips", "external_gateway_info"}
    | {f"provider:{p}" for p in ("network_type", "physical_network", "segmentation_id")}
)


def owner(call: Call, wish: Any) -> str:
    """The project a new thing is to belong to. Raises Invalid where the caller may not give it to another."""
    told = [p for p in (wish.project_id, wish.tenant_id) if p is not UNSET]
    mine = call.context.project_id
    if not told:
        if mine is None and not call.context.is_admin:
            raise Invalid("Running without keystone AuthN requires that tenant_id is specified", code="HTTPBadRequest")
        return mine or ""
    if len(set(told)) > 1:
        raise Invalid("'project_id' and 'tenant_id' are both set and differ.", code="HTTPBadRequest")
    if told[0] != mine and not trusted(call):
        raise Invalid(
            "Specifying 'project_id' or 'tenant_id' other than the authenticated project in request requires admin privileges",
            code="AdminRequired",
        )
    return str(told[0])


def trusted(call: Call) -> bool:
    return call.context.is_admin or call.may("service", {})


FLAGS = frozenset(
    {"admin_state_up", "shared", "router:external", "is_default", "port_security_enabled", "enable_dhcp", "enable_snat"}
    | {"check_limit", "force"}
)


def said(wish: msgspec.Struct) -> dict[str, Any]:
    """What the caller said, by the API's names."""
    both = zip(type(wish).__struct_encode_fields__, msgspec.structs.astuple(wish), strict=True)
    return {f: _meant(f, v) for f, v in both if v is not UNSET}


def _meant(name: str, value: Any) -> Any:
    if name in FLAGS and value is not None and not isinstance(value, bool):
        return str(value).lower() in ("true", "1")
    return value


def number(name: str, value: int | str | None, low: int, high: int) -> int | None:
    """Some clients say numbers as texts. Raises Invalid."""
    if value is None:
        return None
    if not low <= (n := int(value)) <= high:
        raise bad(f"Invalid input for {name}. Reason: '{n}' is not in valid range {low} to {high}.", "HTTPBadRequest")
    return n


def several(one: Any, many: Any) -> list[Any]:
    """A body names one thing or a list of them. Raises Invalid."""
    if (one is UNSET) == (many is UNSET):
        raise Invalid("Unable to find the resource in the request body", code="HTTPBadRequest")
    wishes = [one] if many is UNSET else many
    if not wishes:
        raise Invalid("Resources required", code="HTTPBadRequest")
    return list(wishes)


def answer(kind: Kind[Any], call: Call, bulk: bool, views: list[View]) -> View:
    shown = trimmed(call, kind, views)
    return {kind.many: shown} if bulk else {kind.one: shown[0]}


def revised(kind: Kind[S], call: Call, thing: S) -> None:
    """Raises Stale where If-Match names another revision of it."""
    match = call.headers("If-Match")
    if not match:
        return
    found = re.fullmatch(r"revision_number=(\d{1,9})", match.strip())
    if not found:
        raise Invalid("Invalid If-Match header: it must be of the form revision_number=N.", code="HTTPBadRequest")
    if int(found[1]) != thing.revision:  # type: ignore[attr-defined]
        raise Stale(
            f"Constrained to {found[1]}, but current revision is {thing.revision}",  # type: ignore[attr-defined]
            code="RevisionNumberConstraintFailed",
        )


def kept(thing: S | None) -> S:
    """What `store.change` gave; somebody else was faster: look again."""
    if thing is None:
        raise Again
    return thing


# ---- lists


class Page(NamedTuple):
    where: list[Condition]
    order: list[tuple[str, Any, bool]]  # its name, the column, downwards
    limit: int | None
    marker: str | None
    reverse: bool


CONTROL = {"fields", "sort_key", "sort_dir", "limit", "marker", "page_reverse"}


def asked(call: Call) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in urllib.parse.parse_qsl(call.raw_query, keep_blank_values=True):
        found.setdefault(name, []).append(value)
    return found


def listing(call: Call, kind: Kind[S], *extra: Condition) -> View:
    """`{"networks": […], "networks_links": […]}` as the query asks for it."""
    context: Context = call.context
    everything = sees_all(call, kind)
    call.check({**STRANGER, "project_id": context.project_id}, f"get_{kind.one}")
    wanted = asked(call)
    page = _page(kind, wanted)
    where = [*page.where, *extra]
    if not everything:
        where.append(Condition("mine", kind.scope, (context.project_id or "-",)))
    with call.world.db.read() as tx:
        if page.marker is not None:
            beyond = _after(tx, kind, page)
            where.append(Condition(None, lambda: beyond))
        order = [(name, column, down != page.reverse) for name, column, down in page.order]
        things = store.page(tx, kind.struct, where, order, page.limit)
        if page.reverse:
            things.reverse()
        views = kind.views(tx, call.world, things)
    body: View = {kind.many: trimmed(call, kind, views)}
    if page.limit is not None and things:
        body[f"{kind.many}_links"] = _links(call, kind, page, things)
    return body


def trimmed(call: Call, kind: Kind[Any], views: list[View]) -> list[View]:
    """Without what the caller may not see or did not ask for."""
    if rules := _hiding(kind.one):
        judged: dict[str, list[str]] = {}
        for v in views:
            if (hide := judged.get(v["project_id"])) is None:
                about = {**STRANGER, "project_id": v["project_id"]}
                hide = judged[v["project_id"]] = [n for n, r in rules if not call.may(r, about)]
            for n in hide:
                del v[n]
    fields = asked(call).get("fields") if "fields" in call.raw_query else None
    wanted = {f for text in fields or () for f in text.split(",")} - {""}
    return [{n: x for n, x in v.items() if n in wanted} for v in views] if wanted else views


@functools.cache
def _hiding(one: str) -> list[tuple[str, str]]:
    """(attribute, rule) of what not everybody may see of this kind."""
    return [(r[len(f"get_{one}:") :], r) for r in NAMES if r.startswith(f"get_{one}:")]


def _page(kind: Kind[Any], wanted: dict[str, list[str]]) -> Page:
    known = columns(kind)
    keys, ways = wanted.get("sort_key", []), wanted.get("sort_dir", [])
    if ways and len(ways) != len(keys):
        raise bad("The number of sort_keys and sort_dirs must be same", "HTTPBadRequest")
    order = []
    for key, way in zip(keys, ways or ["asc"] * len(keys), strict=True):
        if key not in known:
            raise bad(f"'{printable(key)}' is invalid attribute for sort_key", "HTTPBadRequest")
        if way not in ("asc", "desc"):
            raise bad(
                f"'{printable(way)}' is invalid value for sort_dirs, valid value is 'asc' and 'desc'", "HTTPBadRequest"
            )
        order.append((key, _sortable(known[key]), way == "desc"))
    order.append(("id", kind.table.c.id, bool(order) and order[-1][2]))
    return Page(
        where=[_filter(kind, known, name, values) for name, values in wanted.items() if name not in CONTROL],
        order=order,
        limit=_limit(wanted.get("limit", [])),
        marker=(wanted.get("marker") or [""])[-1] or None,
        reverse=(wanted.get("page_reverse") or ["false"])[-1].lower() == "true",
    )


def _limit(said: list[str]) -> int | None:
    if not said or said[-1] in ("", "0"):
        return None
    if not re.fullmatch(r"[0-9]{1,30}", said[-1]):
        raise bad(
            f"Bad limit request: Limit must be an integer 0 or greater and not '{printable(said[-1])}'",
            "HTTPBadRequest",
        )
    return min(int(said[-1]), MOST) or None


def _sortable(column: Any) -> Any:
    """Without NULL, which databases sort differently and which no comparison finds again."""
    if not column.nullable:
        return column
    return sa.func.coalesce(column, "" if isinstance(column.type, sa.String) else -1)


def _after(tx: Tx, kind: Kind[Any], page: Page) -> Any:
    """The SQL of what follows the marker: greater in the first column, or the same there and greater in the next …"""
    assert page.marker is not None
    ends = [c for _, c, _ in page.order]
    found = tx.execute(sa.select(*ends).where(kind.table.c.id == page.marker)).first() if is_uuid(page.marker) else None
    if found is None:
        raise kind.gone(page.marker)
    steps = []
    for i, (_, column, down) in enumerate(page.order):
        beyond = column < found[i] if down != page.reverse else column > found[i]
        steps.append(sa.and_(*(c == found[j] for j, c in enumerate(ends[:i])), beyond))
    return sa.or_(*steps)


def _links(call: Call, kind: Kind[Any], page: Page, things: Sequence[Any]) -> list[dict[str, str]]:
    full = len(things) >= (page.limit or 0)
    links = []
    if full or page.reverse:
        links.append({"rel": "next", "href": _href(call, things[-1].id, False)})
    if full or not page.reverse:
        links.append({"rel": "previous", "href": _href(call, things[0].id, True)})
    return links


def _href(call: Call, marker: str, reverse: bool) -> str:
    query = urllib.parse.parse_qsl(call.raw_query, keep_blank_values=True)
    rest = [(n, v) for n, v in query if n not in ("marker", "page_reverse")]
    whole = [*rest, ("marker", marker), *([("page_reverse", "True")] if reverse else [])]
    return f"{call.url}{call.path}?{urllib.parse.urlencode(whole)}"


def _filter(kind: Kind[Any], known: dict[str, Any], name: str, values: list[str]) -> Condition:
    """One attribute is any of these values. Raises Invalid: a filter nobody knows would find too much."""
    if name in kind.filters:
        return Condition(None, lambda: kind.filters[name](values))
    if name in _TAG_FILTERS:
        tags = [t for v in values for t in v.split(",")]
        return Condition(None, lambda: _TAG_FILTERS[name](kind.table.c.tags, tags))
    if name == "changed_since":
        try:
            return Condition(name, lambda at: kind.table.c.updated_at >= at, (parsed(values[-1]),))
        except (ValueError, OverflowError):
            raise bad(f"Bad changed_since value: {printable(values[-1])}", "HTTPBadRequest") from None
    if name not in known:
        raise bad(f"['{printable(name)}'] is invalid attribute for filtering", "HTTPBadRequest")
    column = known[name]
    if column.name in ("created_at", "updated_at"):
        return Condition(None, lambda: sa.or_(*(_moment(column, v) for v in values)))
    absent = column.nullable and "" in values
    wanted = tuple(_value(name, column, v) for v in values)

    def write(*each: Any) -> Any:
        fits = column.in_(each) if len(each) > 1 else column == each[0]
        return sa.or_(fits, column.is_(None)) if absent else fits

    return Condition((name, len(wanted), absent), write, wanted)


def _value(name: str, column: Any, text: str) -> Any:
    if isinstance(column.type, sa.Boolean):
        return flag(name, text)
    if isinstance(column.type, sa.Integer):
        if not re.fullmatch(r"-?[0-9]{1,30}", text):
            raise bad(f"Invalid input for {name}. Reason: '{printable(text)}' is not an integer.", "HTTPBadRequest")
        return max(-MOST, min(MOST, int(text)))
    return text


def flag(name: str, text: str) -> bool:
    """Raises Invalid."""
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise bad(
        f"Invalid input for {name}. Reason: '{printable(text)}' cannot be converted to boolean.", "HTTPBadRequest"
    )


def _moment(column: Any, text: str) -> Any:
    """Moments are shown in whole seconds: all of that second fit."""
    try:
        at = int(parsed(text))
    except (ValueError, OverflowError):
        return sa.false()
    return sa.and_(column >= at, column < at + 1)


def _tagged(column: Any, tag: str) -> Any:
    return store.holds(column, f",{tag},")


_TAG_FILTERS: dict[str, Callable[[Any, list[str]], Any]] = {
    "tags": lambda c, tags: sa.and_(*(_tagged(c, t) for t in tags)),
    "tags-any": lambda c, tags: sa.or_(*(_tagged(c, t) for t in tags)),
    "not-tags": lambda c, tags: sa.not_(sa.and_(*(_tagged(c, t) for t in tags))),
    "not-tags-any": lambda c, tags: sa.not_(sa.or_(*(_tagged(c, t) for t in tags))),
}


# ---- routes that are alike


class TagsBody(msgspec.Struct, forbid_unknown_fields=True):
    tags: A[list[Tag], Meta(max_length=MOST_TAGS)]


def common(kind: Kind[Any]) -> None:
    """List, show and tags of a kind."""
    rule = f"get_{kind.one}"

    @R.get(kind.path, policy=rule, late=True)
    def list_(call: Call) -> View:
        return listing(call, kind)

    @R.get(kind.path + "/{id}", policy=rule, late=True)
    def show(call: Call, id: str) -> View:
        with call.world.db.read() as tx:
            thing = kind.get(tx, id)
            seen(call, kind, kind.target(tx, thing), id)
            (view,) = kind.views(tx, call.world, [thing])
        return {kind.one: trimmed(call, kind, [view])[0]}

    tagged(kind)


def seen(call: Call, kind: Kind[Any], about: dict[str, Any], id: str) -> None:
    """Raises NotFound where the caller may not see it."""
    call.checked = True
    if not call.may(f"get_{kind.one}", about):
        raise kind.gone(id)


def tagged(kind: Kind[Any]) -> None:
    """The tags of one thing, as a resource of their own."""
    path, rule = kind.path + "/{id}/tags", f"update_{kind.one}"

    def mark(call: Call, id: str, become: Callable[[list[str]], Iterable[str]]) -> list[str]:
        def work(tx: Tx) -> list[str]:
            thing = kind.get(tx, id)
            allow(call, "update", kind, kind.target(tx, thing), id)
            now = list(become(split_tags(thing.tags)))
            if len(set(now)) > MOST_TAGS:
                raise bad(f"Invalid input for tags. Reason: more than {MOST_TAGS} tags.", "HTTPBadRequest")
            text = join_tags(now)
            if text != thing.tags:
                kept(store.change(tx, thing, call.world.clock.now(), tags=text))
            return split_tags(text)

        tags: list[str] = call.world.change(work)
        return tags

    def read(call: Call, id: str) -> list[str]:
        with call.world.db.read() as tx:
            thing = kind.get(tx, id)
            seen(call, kind, kind.target(tx, thing), id)
        return split_tags(thing.tags)

    @R.get(path, policy=f"get_{kind.one}", late=True)
    def list_tags(call: Call, id: str) -> View:
        return {"tags": read(call, id)}

    @R.put(path, body=TagsBody, policy=rule, late=True)
    def set_tags(call: Call, id: str) -> View:
        return {"tags": mark(call, id, lambda _: call.body.tags)}

    @R.delete(path, ok=204, policy=rule, late=True)
    def clear_tags(call: Call, id: str) -> None:
        mark(call, id, lambda _: [])

    @R.get(path + "/{tag}", ok=204, policy=f"get_{kind.one}", late=True)
    def has_tag(call: Call, id: str, tag: str) -> None:
        if tag not in read(call, id):
            raise NotFound(f"Tag {printable(tag)} could not be found.", code="TagNotFound")

    @R.put(path + "/{tag}", ok=201, policy=rule, late=True)
    def add_tag(call: Call, id: str, tag: str) -> Reply:
        if not re.fullmatch(r"[^,\x00]{1,60}", tag):
            call.checked = True
            raise bad(f"Invalid input for tag. Reason: '{printable(tag)}' is no tag.", "HTTPBadRequest")
        mark(call, id, lambda tags: [*tags, tag])
        return Reply(None)

    @R.delete(path + "/{tag}", ok=204, policy=rule, late=True)
    def remove_tag(call: Call, id: str, tag: str) -> None:
        if tag not in read(call, id):
            raise NotFound(f"Tag {printable(tag)} could not be found.", code="TagNotFound")
        mark(call, id, lambda tags: [t for t in tags if t != tag])
