"""What all resources of the Block Storage API have in common: troubles, lists with their filters and pages, who sees what."""

import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated as A
from typing import Any, Generic, TypeVar

import msgspec
import sqlalchemy as sa
from msgspec import UNSET, Meta

from kilonova.companions.volume.world import World
from kilonova.kit.clock import iso_us, parsed
from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid, NotFound, OverQuota
from kilonova.kit.http import Dialect, Versioned, compute_fault
from kilonova.kit.routes import Call, Routes
from kilonova.store import volumes as store
from kilonova.store.networks import holds

S = TypeVar("S", bound=msgspec.Struct)
View = dict[str, Any]
R = Routes("volume")

VERSIONS = Versioned("volume", newest=71, oldest=0, major=3, default=0)
DIALECT = Dialect(
    fault=compute_fault,
    statuses={OverQuota: 413},
    request_id_headers=("x-compute-request-id", "x-openstack-request-id"),
    strip_project=("/v3",),
    unexpected="The server has either erred or is incapable of performing the requested operation.",
)

# fmt: off
Name = A[str, Meta(max_length=255, pattern=r"\A[^\x00]*\Z")]
Metadata = dict[A[str, Meta(min_length=1, max_length=255)], A[str, Meta(max_length=255)]]
Flag = bool | A[str, Meta(pattern=r"\A(?i:true|false|1|0|yes|no|on|off|t|f|y|n)\Z")]
Count = A[int, Meta(ge=1, le=2_147_483_647)] | A[str, Meta(pattern=r"\A[0-9]{1,9}\Z")]
# fmt: on


def flag(said: bool | str) -> bool:
    return said if isinstance(said, bool) else said.lower() in ("true", "1", "yes", "on", "t", "y")


def number(said: int | str) -> int:
    """Raises Invalid: nothing is made of no gigabytes."""
    n = int(said)
    if n < 1:
        raise Invalid("Invalid input received: The size must be an integer greater than 0.")
    return n


def invalid_volume(reason: str) -> Invalid:
    return Invalid(f"Invalid volume: {reason}")


def moment(at: float | None) -> str | None:
    return iso_us(at)


def plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:255]


# ---- who may


def seen(call: Call, thing: Any, missing: NotFound, read: str, rule: str | None = None) -> None:
    """Raises NotFound where he may not even know of it, Forbidden where he may not do this (`rule`: the route's)."""
    call.checked = True
    about = {"project_id": thing.project_id}
    if not call.may(read, about):
        raise missing
    call.check(about, rule)


# ---- lists


@dataclass(frozen=True)
class Collection(Generic[S]):
    """One resource. `filters`: names of the query that no column answers by itself."""

    many: str
    struct: type[S]
    missing: Callable[[str], NotFound]
    columns: Mapping[str, str]  # what can be asked for: the API's name → the column's
    filters: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)

    def get(self, tx: Tx, id: str) -> S:
        """Raises NotFound."""
        found = store.look(tx, self.struct, id)
        if found is None:
            raise self.missing(id)
        return found


SORTS = {
    "id": "id",
    "name": "name",
    "display_name": "name",
    "status": "status",
    "size": "size_gb",
    "created_at": "created_at",
    "updated_at": "updated_at",
    "bootable": "bootable",
    "availability_zone": "zone",
    "volume_id": "volume_id",
    "data_timestamp": "data_at",
    "resource_type": "kind",
    "event_id": "event",
}
LIMIT_MAX = 1000


def asked(call: Call) -> dict[str, str]:
    """The query; the last word of each name."""
    return dict(urllib.parse.parse_qsl(call.raw_query, keep_blank_values=True))


def all_projects(call: Call) -> bool:
    """Does he want everybody's, and may he?"""
    said = asked(call).get("all_tenants", "0")
    return flag(said) if re.fullmatch(r"(?i)true|1|yes|on|t|y", said) and call.context.is_admin else False


def listing(
    call: Call,
    what: Collection[S],
    views: Callable[[Tx, World, Sequence[S]], list[View]],
    *where: Any,
    counted: bool = False,
) -> View:
    """A page, with a link to the next where there may be one."""
    said, c = asked(call), store.TABLES[what.struct].c
    conditions = [*where, *_conditions(call, what, said)]
    order = _order(what, said)
    limit, offset = _number(said, "limit", LIMIT_MAX), _number(said, "offset", 0)
    with call.world.db.read() as tx:
        if marker := said.get("marker"):
            conditions.append(_after(tx, what, order, marker))
        ordered = [_sortable(c[name]).desc() if down else _sortable(c[name]).asc() for name, down in order]
        limit = min(limit, LIMIT_MAX)
        things = store.page(tx, what.struct, conditions, ordered, limit, offset) if limit else []
        body: View = {what.many: views(tx, call.world, things)}
        if counted and said.get("with_count", "").lower() in ("true", "1"):
            body["count"] = store.count(tx, what.struct, *where, *_conditions(call, what, said))
    if things and len(things) == limit:
        rest = [(k, v) for k, v in urllib.parse.parse_qsl(call.raw_query, keep_blank_values=True) if k != "marker"]
        query = urllib.parse.urlencode([*rest, ("marker", things[-1].id)])  # type: ignore[attr-defined]
        href = f"{call.url}{_path(call)}?{query}"
        body[f"{what.many}_links"] = [{"rel": "next", "href": href}]
    return body


def _path(call: Call) -> str:
    """With the project where it was written into the address."""
    return call.path.replace("/v3", f"/v3{call.project_in_url}", 1)


def link(call: Call, many: str, id: str) -> list[View]:
    own = f"{call.url}/v3{call.project_in_url}/{many}/{id}"
    old = f"{call.url}{call.project_in_url}/{many}/{id}"
    return [{"rel": "self", "href": own}, {"rel": "bookmark", "href": old}]


def _conditions(call: Call, what: Collection[Any], said: dict[str, str]) -> list[Any]:
    c = store.TABLES[what.struct].c
    where: list[Any] = []
    if all_projects(call):
        if project := said.get("project_id") or said.get("tenant_id"):
            where.append(c.project_id == project)
    else:
        where.append(c.project_id == (call.context.project_id or "-"))
    for name, value in said.items():
        if name in what.filters:
            where.append(what.filters[name](value))
        elif name in what.columns:
            where.append(_fits(c[what.columns[name]], name, value))
        elif name.endswith("~") and what.columns.get(name[:-1]) in ("name", "description") and call.version >= 31:
            where.append(holds(c[what.columns[name[:-1]]], value))
    return where


def _fits(column: Any, name: str, value: str) -> Any:
    if isinstance(column.type, sa.Boolean):
        return column.is_(flag(value))
    if isinstance(column.type, sa.Integer):
        return column == int(value) if re.fullmatch(r"[0-9]{1,9}", value) else sa.false()
    if isinstance(column.type, sa.Double):
        return _moments(column, name, value)
    return column == value


def _moments(column: Any, name: str, value: str) -> Any:
    """`gt:2026-01-01T00:00:00,lt:…` (API 3.60). Raises Invalid."""
    where = []
    for part in value.split(","):
        way, colon, text = part.partition(":")
        compare = {"gt": column > 0, "gte": column >= 0, "lt": column < 0, "lte": column <= 0, "eq": column == 0}
        if way not in compare or not colon:
            way, text = "eq", part
        try:
            at = parsed(text)
        except (ValueError, OverflowError):
            raise Invalid(f"Invalid input received: filters '{plain(name)}' has no good time: {plain(text)}") from None
        how = {"gt": column > at, "gte": column >= at, "lt": column < at, "lte": column <= at}
        where.append(how.get(way, column == at))
    return sa.and_(*where)


def _order(what: Collection[Any], said: dict[str, str]) -> list[tuple[str, bool]]:
    """`sort=name:asc,size`, or the elder sort_key and sort_dir; what is newest first where nothing is said."""
    c = store.TABLES[what.struct].c
    if "sort" in said:
        parts = [p.strip().partition(":") for p in said["sort"].split(",") if p.strip()]
        wanted = [(key, way or "desc") for key, _, way in parts]
    else:
        wanted = [(said["sort_key"], said.get("sort_dir", "desc"))] if said.get("sort_key") else []
    order = []
    for key, way in wanted:
        column = SORTS.get(key, "")
        if column not in c:
            raise Invalid(f"Invalid input received: '{plain(key)}' is no key to sort by.")
        if way not in ("asc", "desc"):
            raise Invalid("Invalid input received: Sort direction must be one of 'asc' or 'desc'.")
        order.append((column, way == "desc"))
    down = order[0][1] if order else True
    return [*order, *((n, down) for n in ("created_at", "id") if n not in dict(order))]


def _number(said: dict[str, str], name: str, default: int) -> int:
    text = said.get(name) or str(default)
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Invalid(f"Invalid input received: {name} must be an integer")
    return int(text)


def _sortable(column: Any) -> Any:
    """Without NULL, which no comparison finds again."""
    return sa.func.coalesce(column, "") if column.nullable and isinstance(column.type, sa.String) else column


def _after(tx: Tx, what: Collection[Any], order: list[tuple[str, bool]], marker: str) -> Any:
    """(a, b, c) > (:a, :b, :c), written out because the directions differ. Raises NotFound."""
    c = store.TABLES[what.struct].c
    keys = [_sortable(c[name]) for name, _ in order]
    found = tx.execute(sa.select(*keys).where(c.id == marker)).first()
    if found is None:
        raise what.missing(marker)
    ways = []
    for n, (_, down) in enumerate(order):
        beyond = keys[n] < found[n] if down else keys[n] > found[n]
        ways.append(sa.and_(*(keys[m] == found[m] for m in range(n)), beyond))
    return sa.or_(*ways)


# ---- metadata of anything


class MetadataBody(msgspec.Struct):
    metadata: Metadata


class MetaBody(msgspec.Struct):
    meta: Metadata


def with_metadata(what: Collection[Any], read: str, write: str, drop: str) -> None:
    """The routes of a thing's metadata, as a resource of its own."""
    path = f"/v3/{what.many}/{{id}}/metadata"

    def looked(call: Call, id: str, rule: str) -> dict[str, str]:
        with call.world.db.read() as tx:
            thing = what.get(tx, id)
        seen(call, thing, what.missing(id), read, rule)
        return dict(thing.metadata)

    def kept(call: Call, id: str, rule: str, become: Callable[[dict[str, str]], dict[str, str]]) -> dict[str, str]:
        with call.world.db.tx() as tx:
            thing = what.get(tx, id)
            seen(call, thing, what.missing(id), read, rule)
            now = become(dict(thing.metadata))
            few_enough(now)
            store.change(tx, what.struct, id, metadata=now, updated_at=call.world.clock.now())
        return now

    @R.get(path, policy=read, late=True)
    def index(call: Call, id: str) -> View:
        return {"metadata": looked(call, id, read)}

    @R.post(path, body=MetadataBody, policy=write, late=True)
    def add(call: Call, id: str) -> View:
        return {"metadata": kept(call, id, write, lambda m: m | call.body.metadata)}

    @R.put(path, body=MetadataBody, policy=write, late=True)
    def replace(call: Call, id: str) -> View:
        return {"metadata": kept(call, id, write, lambda m: call.body.metadata)}

    @R.get(path + "/{key}", policy=read, late=True)
    def show(call: Call, id: str, key: str) -> View:
        found = looked(call, id, read)
        if key not in found:
            raise NotFound("Metadata item was not found")
        return {"meta": {key: found[key]}}

    @R.put(path + "/{key}", body=MetaBody, policy=write, late=True)
    def put(call: Call, id: str, key: str) -> View:
        said = call.body.meta
        if list(said) != [key]:
            looked(call, id, write)
            raise Invalid(
                "Request body and URI mismatch" if key not in said else "Request body contains too many items"
            )
        kept(call, id, write, lambda m: m | said)
        return {"meta": said}

    @R.delete(path + "/{key}", policy=drop, late=True)
    def remove(call: Call, id: str, key: str) -> None:
        def without(m: dict[str, str]) -> dict[str, str]:
            if key not in m:
                raise NotFound("Metadata item was not found")
            return {k: v for k, v in m.items() if k != key}

        kept(call, id, drop, without)


METADATA_MAX = 128


def few_enough(metadata: Mapping[str, str]) -> None:
    if len(metadata) > METADATA_MAX:
        raise Invalid(f"Invalid input received: more than {METADATA_MAX} items of metadata.")


def named(said: Any) -> dict[str, Any]:
    """What a change says of name and description, by today's words or their elder ones."""
    values: dict[str, Any] = {}
    for name, elder in (("name", "display_name"), ("description", "display_description")):
        value = getattr(said, name) if getattr(said, name) is not UNSET else getattr(said, elder)
        if value is not UNSET:
            values[name] = value
    return values
