"""The specification's field tables (schemas/*.yaml), read as trees: which bodies they accept, refuse, and describe.

A table is one of `request`, `query`, `response` of a route; `tree(table, version)` is what it says of one version.
"""

import base64
import functools
import ipaddress
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2].parent / "shared/spec/schemas"
NEWEST = 104
ANY = object()  # a value that nobody accepts stands for no type: see `wrong`


# ---- reading


@functools.cache
def group(name: str) -> list[dict[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load((FOLDER / f"{name}.yaml").read_text(), loader)["routes"]


def names() -> list[str]:
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def span(text: str) -> tuple[int, int]:
    """First and last minor version of "2.1-2.36", "2.37-", "2.5"."""
    first, dash, last = (p.strip().removeprefix("2.") for p in text.partition("-"))
    return int(first), int(last) if last else NEWEST if dash else int(first)


def routes() -> Iterator[tuple[str, dict[str, Any], tuple[int, int]]]:
    """(key, entry, versions) of all tables; `same_as` is looked up."""
    every = {(e["route"], e.get("versions", "none")): e for g in names() for e in group(g)}
    by_key: dict[str, dict[str, Any]] = {}
    for (key, _), e in every.items():
        by_key.setdefault(key, e)
    for (key, versions), e in every.items():
        if "gone" in e or versions == "none":
            continue
        yield key, {**by_key.get(e.get("same_as", ""), {}), **e}, span(versions)


@dataclass
class Node:
    """One place in a body: what may stand there, and what stands below it."""

    told: dict[str, Any] = field(default_factory=dict)
    members: dict[str, "Node"] = field(default_factory=dict)
    patterns: dict[str, "Node"] = field(default_factory=dict)  # by regular expression; "" is any other name
    item: "Node | None" = None
    places: dict[int, "Node"] = field(default_factory=dict)  # of an array whose elements differ

    @property
    def required(self) -> bool:
        return bool(self.told.get("required"))

    @property
    def closed(self) -> bool:
        return self.told.get("extra") == "no"

    @property
    def types(self) -> list[str]:
        """The alternatives, each with what is said in it: "string(uuid)", "string len 0..0"."""
        text = self.told.get("type")
        if text is None:
            return ["enum"] if "enum" in self.told else ["any"]
        either = re.sub(r"(\w+)\|null\((\w+)\)", r"\1(\2) | null", str(text))  # string|null(ipv4)
        return [
            t for part in either.split(" | ") for t in (part.split("|") if re.fullmatch(r"[\w|]+", part) else [part])
        ]


_STEP = re.compile(r"\{/.*?/\}|\{\*\}|\[\d*\]|[^.\[\]]+")


def tree(table: dict[str, Any] | None, version: int, *, second: bool = False) -> Node:
    """The table at one version; `second`: with the second shape in the places that have two."""
    root = Node()
    twins = {p[: p.index("~2")] for p in table or {} if "~2" in p}
    for path, rows in (table or {}).items():
        if not isinstance(rows, list | dict) or path == "_versions":
            continue
        other = any(path.startswith((f"{t}.", f"{t}[")) for t in twins)
        if ("~" in path and ("~2" not in path or not second)) or (second and other and "~" not in path):
            continue
        told = next((r for r in (rows if isinstance(rows, list) else [rows]) if _holds(r, version)), None)
        if told is None:
            continue
        node = root
        for step in [] if path == "(root)" else _STEP.findall(path.replace("~2", "")):
            node = _below(node, step)
        node.told = told
        if "of" in told and told["type"].startswith("array"):
            node.item = Node({"type": told["of"]})
    _prune(root)
    return root


def said(entry: dict[str, Any], what: str, version: int, *, second: bool = False) -> Node | None:
    """One of the tables of a route at one version; None: there is none then."""
    table = entry.get(what)
    if not isinstance(table, dict):
        return None
    first, last = span(table.get("_versions", "2.1-"))
    return tree(table, version, second=second) if first <= version <= last else None


def _holds(row: dict[str, Any], version: int) -> bool:
    return span(f"{row.get('since', '2.1')}-")[0] <= version <= span(row.get("until", f"2.{NEWEST}"))[0]


def _below(node: Node, step: str) -> Node:
    if step.startswith("{"):
        return node.patterns.setdefault("" if step == "{*}" else step[2:-2], Node())
    if step.startswith("[") and step != "[]":
        return node.places.setdefault(int(step[1:-1]), Node())
    if step.startswith("["):
        node.item = node.item or Node()
        return node.item
    return node.members.setdefault(step, Node())


def _prune(node: Node) -> None:
    """What has no row of this version is not there, whatever rows of it stand below."""
    node.members = {k: n for k, n in node.members.items() if n.told}
    node.patterns = {k: n for k, n in node.patterns.items() if n.told}
    inside = [*node.members.values(), *node.patterns.values(), *node.places.values()]
    for inner in [*inside, *([node.item] if node.item else [])]:
        _prune(inner)


def changes(table: dict[str, Any] | None, first: int, last: int) -> list[int]:
    """Versions where something begins or has just ended, with their neighbours and the ends of the route."""
    found = {first, last}
    for rows in (table or {}).values():
        for r in rows if isinstance(rows, list) else [rows] if isinstance(rows, dict) else []:
            since, until = (r.get(k) for k in ("since", "until"))
            found |= {span(f"{since}-")[0] - 1, span(f"{since}-")[0]} if since else set()
            found |= {span(until)[0], span(until)[0] + 1} if until else set()
    return sorted(v for v in found if first <= v <= last)


# ---- values that are accepted

FORMATS = {
    "uuid": "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6",
    "ipv4": "192.0.2.7",
    "ipv6": "2001:db8::7",
    "date-time": "2026-11-20T12:00:00Z",
    "uri": "http://192.0.2.7/",
    "url": "http://192.0.2.7/",
    "base64": "eA==",
    "mac-address": "fa:16:3e:00:00:01",
    "cidr": "192.0.2.0/24",
    "regex": "a",
    "name": "a",
    "az_name": "a",
    "name_with_leading_trailing_spaces": "a",
}
TRIES = ("a", "1", "ab", "/dev/vdb", "aa-1", "/24", "true", "", "-1", "A", "é")


def least(node: Node) -> Any:
    """The smallest value that it accepts."""
    return _least(node, node.types[0])


def whole(node: Node) -> Any:
    """A value with every member that it knows."""
    if node.types[0] == "object" or node.members:
        told = {k: whole(n) for k, n in node.members.items()}
        pattern = {_name(p): whole(n) for p, n in node.patterns.items()} if node.patterns and not told else {}
        return told | pattern
    if node.types[0] == "array" and node.item:
        return [whole(node.item)] * max(1, _bounds(node.told.get("items"))[0] or 0)
    return least(node)


def _least(node: Node, kind: str) -> Any:
    told = node.told
    if "enum" in told:
        return told["enum"][0]
    if found := re.match(r"(\w+) in\[(.*)\]", kind):
        return found[2].split(",")[0]
    word = kind.split("(")[0].split(" ")[0]
    if word == "string":
        return text(node, kind)
    if word in ("integer", "number"):
        return max(_bounds(told.get("range"))[0] or 0, 1) if (_bounds(told.get("range"))[1] or 1) >= 1 else 0
    if word == "boolean" or word == "boolish":
        return True
    if word == "array":
        return [least(node.item or Node())] * (_bounds(told.get("items"))[0] or 0)
    if word == "object":
        made = {k: least(n) for k, n in node.members.items() if n.required}
        for name in [*told.get("requires_anyOf", [])[:1], *told.get("requires_oneOf", [])[:1]]:
            made.setdefault(name, least(node.members[name]))
        if (_bounds(told.get("props"))[0] or 0) > len(made) and node.patterns:
            pattern, inner = next(iter(node.patterns.items()))
            made[_name(pattern)] = least(inner)
        return made
    return None


def text(node: Node, kind: str = "string") -> str:
    found = re.match(r"string\((.*?)\)", kind)
    form = found[1] if found else node.told.get("format")
    if form in FORMATS and "pattern" not in node.told:
        return FORMATS[form]
    least_, most = _bounds(_said(kind, "len") or node.told.get("len"))
    low, high = _bounds(_said(kind, "range") or node.told.get("range"))
    for one in TRIES:
        value = one if len(one) >= (least_ or 0) else one * (least_ or 0)
        fits = most is None or len(value) <= most
        if low is not None or high is not None:
            fits = fits and value.lstrip("-").isdigit() and (low is None or int(value) >= low)
        if fits and matches(_said(kind, "pattern") or node.told.get("pattern"), value):
            return value
    raise AssertionError(f"no text found for {node.told}")


def matches(pattern: str | None, value: str) -> bool:
    if pattern is None:
        return True
    return value.isprintable() if pattern == "PRINTABLE" else re.search(pattern, value) is not None


def _said(kind: str, what: str) -> str | None:
    """Of "string len 1..60 pattern ^[^,/]*$"."""
    found = re.search(rf"\b{what} (\S+)", kind)
    return found[1] if found else None


def _name(pattern: str) -> str:
    return next(n for n in ("a", "key", "1", "_a") if not pattern or re.search(pattern, n))


def _bounds(said: Any) -> tuple[Any, Any]:
    """Of "1..255", "0..", a single number."""
    if said is None:
        return None, None
    low, dots, high = str(said).partition("..")
    number = lambda text: int(text) if text.lstrip("-").isdigit() else float(text)
    return (number(low) if low else None), (number(high) if high else number(low) if not dots else None)


# ---- values that are refused


def wrong(node: Node, deep: bool = True) -> Iterator[tuple[str, Any]]:
    """(why, value): each is the whole value with one thing wrong in it."""
    good = least(node)
    yield from _wrong_here(node, good)
    if not isinstance(good, dict) or not deep:
        if isinstance(good, list) or node.types[0] == "array":
            yield from ((f"[] {why}", [value]) for why, value in wrong(node.item or Node()))
        return
    if node.closed:
        stranger = "nobody knows! this"
        assert not any(re.search(p, stranger) for p in node.patterns)
        yield "unknown member", good | {stranger: 1}
    for name, inner in node.members.items():
        if inner.required:
            yield f"without {name}", {k: v for k, v in good.items() if k != name}
        yield from ((f"{name}: {why}", good | {name: value}) for why, value in wrong(inner))
    for pattern, inner in node.patterns.items():
        yield from (
            (f"a member: {why}", {**good, _name(pattern): value}) for why, value in _wrong_here(inner, least(inner))
        )
        if node.closed and pattern and not re.search(pattern, "\x00"):
            yield "a name with a null", {**good, "\x00": least(inner)}


def _wrong_here(node: Node, good: Any) -> Iterator[tuple[str, Any]]:
    kinds = {k.split("(")[0].split(" ")[0] for k in node.types}
    if kinds & {"any", "links"}:
        return
    for kind, value in (
        ("object", {"x": 1}),
        ("array", [{"x": 1}]),
        ("integer", 5),
        ("null", None),
        ("boolean", True),
        ("number", 1.5),
    ):
        near = {"integer": {"integer", "number"}, "number": {"number"}, "boolean": {"boolean", "boolish"}}.get(
            kind, {kind}
        )
        if kinds & near or ("enum" in node.told and value in node.told["enum"]):
            continue
        yield f"{kind} for {'|'.join(sorted(kinds))}", value
    told = node.told
    if "enum" in told or "boolish" in kinds:
        yield "not one of them", "certainly none of them"
    if "string" in kinds and "enum" not in told and len(node.types) == 1:
        low, high = _bounds(told.get("len"))
        if high is not None and high < 70000:
            yield "too long", (good or "a")[:1] * (high + 1) if "format" not in told else "a" * (high + 1)
        if low and "range" not in told:
            yield "too short", ""
        if (p := told.get("pattern")) and (
            bad := next((b for b in ("\x00", "!/,:\x7f ", "a b\tc") if not matches(p, b)), None)
        ):
            yield "not of the pattern", bad
        if told.get("format") in ("uuid", "ipv4", "ipv6", "date-time", "base64", "mac-address", "cidr", "uri"):
            yield "not of the format", "~!~"
        if told.get("format") in ("name", "az_name"):
            yield "blank at the end", "a "
            yield "control character", "a\x00b"
    if kinds & {"integer", "number"}:
        low, high = _bounds(told.get("range"))
        if low is not None:
            yield "too small", low - 1
        if high is not None:
            yield "too large", high * 2 if isinstance(high, float) else high + 1
    if kinds & {"array"}:
        low, high = _bounds(told.get("items"))
        if low:
            yield "too few", []
        if high:
            yield "too many", [least(node.item or Node())] * (high + 1)


def absent(now: Node, then: Node) -> Iterator[tuple[str, Any]]:
    """(name, value): the least value of today's tree with one member that only the other version's tree has.

    Only where unknown members are refused.
    """
    good = least(now)
    if isinstance(good, dict) and now.closed:
        for name, other in then.members.items():
            if name not in now.members:
                yield name, good | {name: whole(other)}
    if isinstance(good, dict):
        for name, inner in now.members.items():
            if name in then.members:
                yield from ((f"{name}.{n}", good | {name: v}) for n, v in absent(inner, then.members[name]))
    elif isinstance(good, list) and now.item and then.item:
        yield from ((f"[].{n}", [v]) for n, v in absent(now.item, then.item))


# ---- does an answer agree?


def disagreements(node: Node, value: Any, where: str = "") -> list[str]:
    """Where `value` is not what a response table says; empty where it agrees."""
    found: list[str] = []
    if not any(_is(node, kind, value) for kind in node.types):
        return [f"{where or 'body'}: {value!r} is no {node.told}"]
    if node.types == ["array", "array"] and value == [{}]:
        return []  # the other of two arrays: one empty object, where there is nothing
    if isinstance(value, dict) and (node.members or node.patterns):
        for name, inner in node.members.items():
            if name in value:
                found += disagreements(inner, value[name], f"{where}.{name}")
            elif inner.required:
                found.append(f"{where}.{name} is not there")
        for name, inside in value.items():
            if name in node.members:
                continue
            inner = next((n for p, n in node.patterns.items() if not p or re.search(p, name)), None)
            if inner is not None:
                found += disagreements(inner, inside, f"{where}.{name}")
            elif node.told.get("extra") != "yes":
                found.append(f"{where}.{name} is nothing that there is in this version")
    for n, inside in enumerate(value) if isinstance(value, list) else ():
        if one := node.places.get(n, node.item):
            found += disagreements(one, inside, f"{where}[{n}]")
    return found


def _is(node: Node, kind: str, value: Any) -> bool:
    told = node.told
    if "enum" in told and value not in told["enum"] and kind in ("enum", "string", "integer"):
        return value is None and "null" in node.types
    if found := re.match(r"(\w+ )?in\[(.*)\]", kind):
        return value in [v.strip("'") for v in found[2].split(",")]
    word = kind.split("(")[0].split(" ")[0]
    if word in ("any", "enum"):
        return True
    if word.startswith("~"):
        return isinstance(value, dict)
    if word == "links":
        return isinstance(value, list) and all(isinstance(x, dict) and {"rel", "href"} <= x.keys() for x in value)
    if word == "string":
        form = re.match(r"string\((.*?)\)", kind)
        return (
            isinstance(value, str)
            and _of(form[1] if form else told.get("format"), value)
            and matches(told.get("pattern"), value)
        )
    if word == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    plain: dict[str, Any] = {"number": (int, float), "boolean": bool, "array": list, "object": dict, "null": type(None)}
    if word == "boolish":
        return isinstance(value, bool | str)
    return isinstance(value, plain[word])


def _of(form: str | None, value: str) -> bool:
    try:
        if form == "uuid":
            uuid.UUID(value)
        elif form in ("ipv4", "ipv6"):
            return ipaddress.ip_address(value).version == int(form[-1])
        elif form == "date-time":
            datetime.fromisoformat(value)
        elif form == "base64":
            base64.b64decode(value, validate=True)
    except ValueError:
        return False
    return True
