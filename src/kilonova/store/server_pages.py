"""Pages of servers: what a list asks for, as one statement with a keyset, so that page 1,000 costs what page 1 does."""

import re
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.kit.clock import parsed
from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid
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
_PLAIN = re.compile(r"^[\w\s@:,/=-]*$")
_RUNAWAY = re.compile(r"[*+?}]\s*\)\s*[*+{]|\([^)]*\|[^)]*\)\s*[*+{]")  # a repeated repetition can take for ever


class Page(msgspec.Struct, frozen=True):
    """What a list asks for. `where` are conditions from this module; `sort` pairs of (column, descending)."""

    where: list[Any] = []
    sort: list[tuple[Any, bool]] = []
    limit: int = 1000
    marker: str | None = None


def page(tx: Tx, p: Page) -> list[Server]:
    """SELECT … WHERE <conditions> AND <after the marker> ORDER BY <keys>, number DESC LIMIT n. Raises Invalid: no such marker."""
    keys = [*[(_never_null(c), desc) for c, desc in p.sort or [(T.c.created_at, True)]], (T.c.number, True)]
    query = SELECT.where(*p.where).order_by(*[c.desc() if desc else c.asc() for c, desc in keys]).limit(p.limit)
    if p.marker is not None:
        at = tx.execute(sa.select(*[c for c, _ in keys]).where(T.c.id == p.marker)).first()
        if at is None:
            raise Invalid(f"marker [{p.marker}] not found")
        query = query.where(_after(keys, tuple(at)))
    return list(map(of, tx.execute(query).all()))


def _never_null(column: Any) -> Any:
    """NULLs sort differently in every database."""
    if not getattr(column, "nullable", False):
        return column
    return sa.func.coalesce(column, 0 if isinstance(column.type, sa.Double | sa.Integer) else "")


def _after(keys: list[tuple[Any, bool]], at: tuple[Any, ...]) -> sa.ColumnElement[bool]:
    """(a, b, c) beyond the marker's: a > x OR (a = x AND (b > y OR …))."""
    (column, desc), value = keys[0], at[0]
    beyond: sa.ColumnElement[bool] = column < value if desc else column > value
    return beyond if len(keys) == 1 else beyond | ((column == value) & _after(keys[1:], at[1:]))


# ---- conditions


def alive() -> Any:
    return T.c.deleted_at.is_(None)


def dead() -> Any:
    return T.c.deleted_at.is_not(None)


def not_soft_deleted() -> Any:
    return T.c.vm_state != str(VM.soft_deleted)


def soft_deleted() -> Any:
    return T.c.vm_state == str(VM.soft_deleted)


def is_one_of(name: str, values: list[str]) -> Any:
    column = EXACT[name]
    return column == values[0] if len(values) == 1 else column.in_(values)


def matches(name: str, pattern: str) -> Any:
    """Raises Invalid for what no engine can search for, or one might search for for ever."""
    column = SEARCHED[name]
    if _PLAIN.match(pattern):
        return column.contains(pattern, autoescape=True)
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
    return column.regexp_match(pattern)


def has_status(statuses: list[str]) -> Any | None:
    """None: there is no such status."""
    some = []
    for status in statuses:
        for vm, tasks in states_of(status).items():
            here = T.c.vm_state == str(vm)
            some.append(here if tasks is None else here & T.c.task_state.in_([str(t) for t in tasks]))
    return sa.or_(*some) if some else None


def updated(since: float | None, before: float | None) -> list[Any]:
    at = sa.func.coalesce(T.c.updated_at, T.c.created_at)
    return ([at >= since] if since is not None else []) + ([at < before + 1] if before is not None else [])


def tagged(tags: list[str], *, any: bool, negated: bool) -> Any:
    each = [T.c.tags.contains(f",{t},", autoescape=True) for t in tags]
    some = sa.or_(*each) if any else sa.and_(*each)
    return sa.not_(some) if negated else some


def is_locked(locked: bool) -> Any:
    return T.c.locked_by.is_not(None) if locked else T.c.locked_by.is_(None)


def has_config_drive(yes: bool) -> Any:
    return T.c.config_drive == yes


def has_address(pattern: str, version: int) -> Any:
    """A plain piece of an address, searched in what is known of the NICs. Raises Invalid."""
    if not re.fullmatch(r"\^?[0-9a-fA-F.:]*\$?", pattern.replace("\\.", ".")):
        raise Invalid(f"Invalid input for query parameters ip. Value: {pattern[:60]}. It is no piece of an address.")
    text = pattern.replace("\\.", ".").strip("^$")
    return T.c.plugs.contains(f'"address":"{text}', autoescape=True)


def on_day(name: str, text: str) -> Any:
    """`created_at` and its like: the moment's beginning, as a prefix of its ISO form. Raises Invalid."""
    column = {"created_at": T.c.created_at, "launched_at": T.c.launched_at, "terminated_at": T.c.terminated_at}[name]
    try:
        at = parsed(text)
    except ValueError:
        raise Invalid(
            f"Invalid input for query parameters {name}. Value: {text[:60]}. It is no moment in ISO 8601."
        ) from None
    return (column >= at) & (column < at + (86400 if len(text) == 10 else 1))
