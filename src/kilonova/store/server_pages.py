"""Pages of servers: what a list asks for, as one statement with a keyset, so that page 1,000 costs what page 1 does.

Conditions are values: what they look like (`shape`), and what they compare with.  Lists of the same shapes are the same
statement (`kit/ready.py`).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from kilonova.kit.clock import parsed
from kilonova.kit.db import Tx, anywhere
from kilonova.kit.errors import Invalid
from kilonova.kit.ready import Condition, Shapes, given, written
from kilonova.model.server import Server
from kilonova.model.states import VM, states_of
from kilonova.store.servers import SELECT, T, of

# The API's names of sort keys and what they are here; other allowed names sort by nothing.
SORTS: dict[str, sa.ColumnElement[Any]] = {
    "access_ip_v4": T.c.access_ip_v4,
    "access_ip_v6": T.c.access_ip_v6,
    "auto_disk_config": T.c.disk_config,
    "availability_zone": T.c.availability_zone,
    "config_drive": T.c.config_drive,
    "created_at": T.c.created_at,
    "display_description": T.c.description,
    "display_name": T.c.name,
    "host": T.c.host,
    "hostname": T.c.hostname,
    "image_ref": T.c.image_id,
    "instance_type_id": T.c.flavor_id,
    "key_name": T.c.key_name,
    "launch_index": T.c.launch_index,
    "launched_at": T.c.launched_at,
    "locked": T.c.locked_by,
    "locked_by": T.c.locked_by,
    "node": T.c.node,
    "power_state": T.c.power_state,
    "progress": T.c.progress,
    "project_id": T.c.project_id,
    "root_device_name": T.c.root_device,
    "task_state": T.c.task_state,
    "terminated_at": T.c.terminated_at,
    "updated_at": T.c.updated_at,
    "user_id": T.c.user_id,
    "uuid": T.c.id,
    "vm_state": T.c.vm_state,
}
# Filters that mean what they say, and those that search.
EXACT: dict[str, sa.ColumnElement[Any]] = {
    "project_id": T.c.project_id,
    "user_id": T.c.user_id,
    "image_ref": T.c.image_id,
    "vm_state": T.c.vm_state,
    "flavor": T.c.flavor_id,
    "uuid": T.c.id,
    "host": T.c.host,
    "task_state": T.c.task_state,
}
SEARCHED: dict[str, sa.ColumnElement[Any]] = {
    "name": T.c.name,
    "display_name": T.c.name,
    "hostname": T.c.hostname,
    "key_name": T.c.key_name,
    "description": T.c.description,
    "display_description": T.c.description,
    "node": T.c.node,
    "availability_zone": T.c.availability_zone,
    "reservation_id": T.c.reservation_id,
    "root_device_name": T.c.root_device,
    "access_ip_v4": T.c.access_ip_v4,
    "access_ip_v6": T.c.access_ip_v6,
    "locked_by": T.c.locked_by,
    "launch_index": sa.cast(T.c.launch_index, sa.String(12)),
    "power_state": sa.cast(T.c.power_state, sa.String(12)),
    "progress": sa.cast(T.c.progress, sa.String(12)),
    "auto_disk_config": T.c.disk_config,
}
NEVER = T.c.updated_at.is_(None)
_PLAIN = re.compile(r"^[\w\s@:,/=-]*$")
_RUNAWAY = re.compile(r"[*+?}]\s*\)\s*[*+{]|\([^)]*\|[^)]*\)\s*[*+{]")  # a repeated repetition can take for ever


class Page(msgspec.Struct, frozen=True):
    """What a list asks for. `where` are conditions from this module; `sort` pairs of (key of SORTS, descending)."""

    where: list[Condition] = []
    sort: list[tuple[str, bool]] = []
    limit: int = 1000
    marker: str | None = None


class Short(NamedTuple):
    """A row of a list without details."""

    id: str
    name: str


SHORT = sa.select(T.c.id, T.c.name)
PAGES = Shapes()


def page(tx: Tx, p: Page) -> list[Server]:
    """SELECT … WHERE <conditions> AND <after the marker> ORDER BY <keys>, number DESC LIMIT n. Raises Invalid: no such marker."""
    return list(map(of, _rows(tx, SELECT, p)))


def short_page(tx: Tx, p: Page) -> list[Short]:
    """The same servers, with no more than is shown in a list of names."""
    return list(map(Short._make, _rows(tx, SHORT, p)))


def _rows(tx: Tx, select: sa.Select[Any], p: Page) -> Sequence[Any]:
    sort = tuple(p.sort) or (("created_at", True),)
    values: dict[str, Any] = {"page_limit": p.limit}
    if p.marker is not None:
        at = tx.execute(PAGES.of(("marker", sort), lambda: _place(sort)), {"page_marker": p.marker}).first()
        if at is None:
            raise Invalid(f"marker [{p.marker}] not found")
        values |= {f"page_at{i}": v for i, v in enumerate(at)}
    values |= given(p.where)
    shape = (select is SHORT, sort, p.marker is not None, *[c.shape for c in p.where])
    return tx.execute(PAGES.of(shape, lambda: _statement(select, p, sort)), values).all()


def _statement(select: sa.Select[Any], p: Page, sort: tuple[tuple[str, bool], ...]) -> sa.Select[Any]:
    keys = _keys(sort)
    where = written(p.where)
    if p.marker is not None:
        where.append(_after(keys, [sa.bindparam(f"page_at{i}", type_=c.type) for i, (c, _) in enumerate(keys)]))
    order = [c.desc() if desc else c.asc() for c, desc in keys]
    return select.where(*where).order_by(*order).limit(sa.bindparam("page_limit", type_=sa.Integer))


def _place(sort: tuple[tuple[str, bool], ...]) -> sa.Select[Any]:
    """Where a marker stands."""
    return sa.select(*[c for c, _ in _keys(sort)]).where(T.c.id == sa.bindparam("page_marker"))


def _keys(sort: tuple[tuple[str, bool], ...]) -> list[tuple[Any, bool]]:
    return [*[(_never_null(SORTS[name]), desc) for name, desc in sort], (T.c.number, True)]


def _never_null(column: Any) -> Any:
    """NULLs sort differently in every database."""
    if not getattr(column, "nullable", False):
        return column
    return sa.func.coalesce(column, 0 if isinstance(column.type, sa.Double | sa.Integer) else "")


def _after(keys: list[tuple[Any, bool]], at: list[Any]) -> sa.ColumnElement[bool]:
    """(a, b, c) beyond the marker's: a > x OR (a = x AND (b > y OR …))."""
    (column, desc), value = keys[0], at[0]
    beyond: sa.ColumnElement[bool] = column < value if desc else column > value
    return beyond if len(keys) == 1 else beyond | ((column == value) & _after(keys[1:], at[1:]))


# ---- conditions


def alive() -> Condition:
    return Condition(("alive",), lambda: T.c.deleted_at.is_(None))


def dead_or_soft_deleted() -> Condition:
    return Condition(("gone",), lambda: T.c.deleted_at.is_not(None) | (T.c.vm_state == str(VM.soft_deleted)))


def not_soft_deleted() -> Condition:
    return Condition(("not soft-deleted",), lambda: T.c.vm_state != str(VM.soft_deleted))


def is_one_of(name: str, values: list[str]) -> Condition:
    column = EXACT[name]
    if len(values) == 1:
        return Condition(("is", name), lambda value: column == value, (values[0],))
    return Condition(("is one of", name, len(values)), lambda *each: column.in_(each), tuple(values))


def matches(name: str, pattern: str) -> Condition:
    """Raises Invalid for what no engine can search for, or one might search for for ever."""
    column = SEARCHED[name]
    if _PLAIN.match(pattern):
        return Condition(("contains", name), lambda value: column.like(value, escape="/"), (anywhere(pattern),))
    try:
        re.compile(pattern)
    except re.error:
        raise Invalid(
            f"Invalid input for query parameters {name}. Value: {pattern[:80]}. '{pattern[:80]}' is not a 'regex'"
        ) from None
    if len(pattern) > 255 or _RUNAWAY.search(pattern):
        raise Invalid(
            f"Invalid input for query parameters {name}. The pattern repeats a repetition; it cannot be searched for."
        )
    return Condition(("matches", name), column.regexp_match, (pattern,))


def has_status(statuses: list[str]) -> Condition | None:
    """None: there is no such status."""
    states = [state for s in statuses for state in states_of(s).items()]

    def here(vm: VM, tasks: Any) -> Any:
        found = T.c.vm_state == str(vm)
        return found if tasks is None else found & T.c.task_state.in_([sa.literal_column(f"'{t}'") for t in tasks])

    return Condition(("status", *statuses), lambda: sa.or_(*[here(*s) for s in states])) if states else None


def updated(since: float | None, before: float | None) -> list[Condition]:
    """Since and before which moment. Who was never changed was made then; said so that an index finds both kinds."""
    found = []
    if since is not None:
        found.append(Condition(("since",), lambda t: (T.c.updated_at >= t) | (NEVER & (T.c.created_at >= t)), (since,)))
    if before is not None:
        t = (before + 1,)
        found.append(Condition(("before",), lambda t: (T.c.updated_at < t) | (NEVER & (T.c.created_at < t)), t))
    return found


def tagged(tags: list[str], *, any: bool, negated: bool) -> Condition:
    def write(*each: Any) -> Any:
        has = [T.c.tags.like(tag, escape="/") for tag in each]
        some = sa.or_(*has) if any else sa.and_(*has)
        return sa.not_(some) if negated else some

    return Condition(("tags", len(tags), any, negated), write, tuple(anywhere(f",{t},") for t in tags))


def is_locked(locked: bool) -> Condition:
    column = T.c.locked_by
    return Condition(("locked", locked), lambda: column.is_not(None) if locked else column.is_(None))


def has_config_drive(yes: bool) -> Condition:
    return Condition(("config drive",), lambda value: T.c.config_drive == value, (yes,))


def has_address(pattern: str, version: int) -> Condition:
    """A plain piece of an address, searched in what is known of the NICs. Raises Invalid."""
    if not re.fullmatch(r"\^?[0-9a-fA-F.:]*\$?", pattern.replace("\\.", ".")):
        raise Invalid(f"Invalid input for query parameters ip. Value: {pattern[:60]}. It is no piece of an address.")
    text = pattern.replace("\\.", ".").strip("^$")
    return Condition(("address",), lambda value: T.c.plugs.like(value, escape="/"), (anywhere(f'"address":"{text}'),))


def on_day(name: str, text: str) -> Condition:
    """`created_at` and its like: the moment's beginning, as a prefix of its ISO form. Raises Invalid."""
    column = {"created_at": T.c.created_at, "launched_at": T.c.launched_at, "terminated_at": T.c.terminated_at}[name]
    try:
        at = parsed(text)
    except ValueError:
        raise Invalid(
            f"Invalid input for query parameters {name}. Value: {text[:60]}. It is no moment in ISO 8601."
        ) from None
    until = at + (86400 if len(text) == 10 else 1)
    return Condition(("on day", name), lambda first, last: (column >= first) & (column < last), (at, until))
