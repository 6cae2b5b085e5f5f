"""What a list of images is asked for, out of its query: pure. Whatever is wrong with it is Invalid."""

import re
from typing import Any

from kilonova.kit.clock import parsed
from kilonova.kit.errors import Invalid
from kilonova.store import images as store

EXACT = (
    "id",
    "name",
    "status",
    "owner",
    "disk_format",
    "container_format",
    "checksum",
    "os_hash_algo",
    "os_hash_value",
)
WHOLE = ("min_disk", "min_ram", "size")
FILTERS_MAX = 128


def search(viewer: str | None, said: list[tuple[str, str]]) -> store.Search:
    """The query's filters; a name we do not know is a property of the image."""
    equal: dict[str, list[Any]] = {}
    least: dict[str, float] = {}
    most: dict[str, float] = {}
    below: dict[str, float] = {}
    properties: dict[str, str] = {}
    tags: list[str] = []
    visibility, member_status, hidden = None, "accepted", False
    for name, value in said:
        if name in ("limit", "marker", "sort", "sort_key", "sort_dir"):
            continue
        if name == "visibility":
            visibility = _one_of(value, name, ("public", "private", "shared", "community", "all"))
        elif name == "member_status":
            member_status = _one_of(value, name, ("accepted", "pending", "rejected", "all"))
        elif name == "os_hidden":
            hidden = _truth(value, name)
        elif name == "protected":
            equal["protected"] = [_truth(value, name)]
        elif name == "tag":
            tags.append(value)
        elif name in ("size_min", "size_max"):
            (least if name == "size_min" else most)["size"] = number(value, name)
        elif name in WHOLE:
            equal[name] = [number(value, name)]
        elif name in ("created_at", "updated_at"):
            _moments(name, value, least, below)
        elif name in EXACT:
            column = {"os_hash_algo": "hash_algo", "os_hash_value": "hash_value"}.get(name, name)
            equal[column] = _several(value) if value.startswith("in:") else [value]
        elif name in ("virtual_size", "deleted", "is_public", "changes-since"):
            raise Invalid(f"Invalid filter: {name}")
        else:
            properties[name] = value
    if any(len(v) > 1000 for v in equal.values()) or len(properties) > FILTERS_MAX or len(tags) > FILTERS_MAX:
        raise Invalid("Too many filters.")
    return store.Search(
        viewer=viewer,
        visibility=visibility,
        member_status=member_status,
        hidden=hidden,
        equal=equal,
        least=least,
        most=most,
        below=below,
        tags=tags,
        properties=properties,
    )


def order(said: list[tuple[str, str]]) -> list[store.Order]:
    """`sort=name:asc,size` or `sort_key=name&sort_dir=asc`; newest first where nothing is said."""
    keys = [v for k, v in said if k == "sort_key"]
    dirs = [v for k, v in said if k == "sort_dir"]
    sort = [v for k, v in said if k == "sort"]
    if sort and (keys or dirs):
        raise Invalid("Old and new sorting syntax cannot be combined")
    if sort:
        parts = [p.strip().partition(":") for p in sort[-1].split(",") if p.strip()]
        pairs = [(key, direction or "desc") for key, _, direction in parts]
    else:
        if len(dirs) > 1 and len(dirs) != len(keys or ["created_at"]):
            raise Invalid("Number of sort dirs does not match the number of sort keys")
        keys = keys or ["created_at"]
        pairs = list(zip(keys, dirs if len(dirs) == len(keys) else (dirs or ["desc"]) * len(keys), strict=True))
    by: dict[str, store.Order] = {}
    for key, direction in [*pairs, ("created_at", pairs[-1][1]), ("id", pairs[-1][1])]:
        if key not in store.SORTED:
            raise Invalid(f"Invalid sort key: {key[:64]}. It must be one of: {', '.join(store.SORTED)}.")
        if direction not in ("asc", "desc"):
            raise Invalid(f"Invalid sort direction: {direction[:64]}")
        by.setdefault(key, store.Order(key, direction == "desc"))
    return list(by.values())


def _moments(
    name: str,
    value: str,
    least: dict[str, float],
    below: dict[str, float],
) -> None:
    """`gt:2026-11-20T12:00:00Z` and so on; moments are shown without their fraction, and so they are compared."""
    operator, colon, rest = value.partition(":")
    if not colon or operator not in ("gt", "gte", "lt", "lte", "eq", "neq"):
        operator, rest = "eq", value
    try:
        at = parsed(rest)
    except (ValueError, OverflowError):
        raise Invalid(f'Bad "{name}" query filter format. Use ISO 8601 DateTime notation.') from None
    if operator == "gt":
        least[name] = at + 1
    elif operator == "gte":
        least[name] = at
    elif operator == "lt":
        below[name] = at
    elif operator == "lte":
        below[name] = at + 1
    elif operator == "eq":
        least[name], below[name] = at, at + 1
    else:
        raise Invalid(f"The operator {operator} is not supported for {name}.")


def _one_of(value: str, name: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise Invalid(f"Invalid {name} value: {value[:64]}. It must be one of: {', '.join(known)}.")
    return value


def _truth(value: str, name: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise Invalid(f"Invalid value for {name}: it must be true or false.")
    return value.lower() == "true"


def number(value: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", value):
        raise Invalid(f"Invalid value for {name}: it must be a whole number that is not negative.")
    return int(value)


def _several(value: str) -> list[str]:
    """`in:a,b` and `in:"a,b",c`."""
    return [q or p for q, p in re.findall(r'"([^"]*)"|([^,"]+)', value.removeprefix("in:"))] or [""]
