"""Configuration: declared once as a tree of frozen Structs, read from TOML files and the environment.

A section is a Struct, an option is a field with a default; what it is for stands in the margin:

    class Api(msgspec.Struct, frozen=True):
        "The Compute API's door."

        port: Annotated[int, Meta(description="TCP port; 0 takes a free one.", ge=0, le=65535)] = 8774

`load` makes one value of the whole tree and refuses, by full name and all at once, what is misspelt or has the
wrong type.  `sample` and `reference` are readings of the same declarations.  Nothing here is global: whoever
needs an option is handed the tree, or the section.
"""

import difflib
import hmac
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import FieldInfo

from kilonova.kit import log
from kilonova.kit.errors import Invalid

__all__ = ["Meta", "Secret", "load", "reference", "sample", "written"]

PREFIX = "KILONOVA_"

T = TypeVar("T", bound=Struct)


class Secret:
    """A text that is only seen by who asks for it: `.reveal()`. Printed, logged or pickled it is `***`.

    In a file it is written as `"text"` or as `{file = "path"}` (read without its last newline).  Empty is false.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str = "") -> None:
        object.__setattr__(self, "_text", text)

    def reveal(self) -> str:
        text: str = object.__getattribute__(self, "_text")
        return text

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Secret does not change")

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Secret)
        return same and hmac.compare_digest(self.reveal().encode(), other.reveal().encode())  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((Secret, self.reveal()))

    def __bool__(self) -> bool:
        return bool(self.reveal())

    def __repr__(self) -> str:
        return log.HIDDEN

    __str__ = __repr__

    def __reduce__(self) -> tuple[Any, ...]:
        return Secret, (log.HIDDEN,)


def load(paths: Sequence[Path], env: Mapping[str, str], tree: type[T], given: Mapping[str, object] | None = None) -> T:
    """The whole configuration. Later wins: defaults, each file of `paths` in order, `env`, `given`.

    `env` holds `KILONOVA_SECTION__OPTION=text` among whatever else is there; `given` holds `section.option` by
    full name (from a command line, or a test).  A text from either is read as the option's type: lists are
    `a,b,c` or `[…]`, tables `{…}`, an empty text is "not set" where an option may be left out.  A relative path
    in a file begins where the file lies.  Raises Invalid with one sentence for each thing that is wrong.
    """
    found: dict[str, Found] = {}
    wrong: list[str] = []
    options = dict(_options(tree))
    for path in paths:
        table = _table(path, wrong)
        found |= _flat(table, tree, options, str(path), path.parent, wrong)
    found |= _from_env(env, options, wrong)
    for name, value in (given or {}).items():
        if name in options:
            found[name] = Found(value, "Given", Path(), isinstance(value, str))
        else:
            wrong.append(f"There is no option {name}{_near(name, options)}")

    values: dict[str, object] = {}
    for name, it in found.items():
        try:
            values[name] = _typed(it, options[name])
        except (msgspec.ValidationError, ValueError, OSError) as error:
            wrong.append(f"{it.where}: {name}: {_reason(error, it, options[name])}.")
    if wrong:
        raise Invalid("\n".join(wrong))
    for value in values.values():
        if isinstance(value, Secret):
            log.hide(value.reveal())
    return _build(tree, "", values, wrong)


def sample(tree: type[Struct]) -> str:
    """A TOML file in which every option stands, commented out, with its default and what it is for."""
    lines: list[str] = []
    for section, struct in _sections(tree):
        lines += ["", *(f"# {line}" for line in _doc(struct)), f"[{section}]", ""]
        for field in _leaves(struct):
            meta = _meta(field)
            lines += [f"# {line}" for line in _wrap(f"{meta.description or ''} ({spelled(field.type)})".strip())]
            default = _default(field)
            if default is None or default == Secret():
                example = meta.examples[0] if meta.examples else ""
                lines += [f"# not set unless you do:\n#{field.encode_name} = {toml(example)}", ""]
            else:
                lines += [f"#{field.encode_name} = {toml(default)}", ""]
    return "\n".join(lines).strip() + "\n"


def written(tree: Struct) -> str:
    """The choices of a tree as TOML, without those that are unset; secrets are `***`."""
    lines: list[str] = []
    for section, struct in _sections(type(tree)):
        values: Any = tree
        for part in section.split("."):
            values = getattr(values, part)
        lines += ["", f"[{section}]"]
        chosen = [(f.encode_name, getattr(values, f.name)) for f in _leaves(struct)]
        lines += [f"{name} = {toml(value)}" for name, value in chosen if value is not None and value != Secret()]
    return "\n".join(lines).strip() + "\n"


def reference(tree: type[Struct]) -> str:
    """The options as a page of Markdown: a table for each section."""
    lines = [
        "# Options",
        "",
        f"In a TOML file `[section]` and `option = value`; in the environment `{PREFIX}SECTION__OPTION=value`, which wins.",
        'A secret may lie in a file of its own: `option = {file = "path"}`, or `…__OPTION__FILE=path`.',
    ]
    for section, struct in _sections(tree):
        lines += [
            "",
            f"## [{section}]",
            "",
            *_doc(struct),
            "",
            "| option | type | default | what it is for |",
            "|---|---|---|---|",
        ]
        for field in _leaves(struct):
            default = _default(field)
            shown = "" if default is None or default == Secret() else f"`{toml(default)}`"
            said = (_meta(field).description or "").replace("\n", " ")
            cells = f"`{field.encode_name}`", spelled(field.type), shown, said
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


# ---- what was found, before it has a type


class Found(Struct, frozen=True):
    """A value as it was written, and where; `loose`: it is a text that stands for something of another type."""

    value: object
    where: str
    base: Path
    loose: bool = False


def _table(path: Path, wrong: list[str]) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        wrong.append(f"Cannot read {path}: {error.strerror}.")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        wrong.append(f"{path} is not TOML: {error}.")
    return {}


def _flat(
    table: Mapping[str, object],
    struct: type[Struct],
    options: Mapping[str, FieldInfo],
    where: str,
    base: Path,
    wrong: list[str],
    prefix: str = "",
) -> dict[str, Found]:
    """`{"api": {"port": 1}}` as `{"api.port": 1}`; what is not declared goes to `wrong`."""
    fields = {f.encode_name: f for f in msgspec.structs.fields(struct)}
    found: dict[str, Found] = {}
    for key, value in table.items():
        name = prefix + key
        if key not in fields:
            what = "section" if isinstance(value, dict) else "option"
            known = [n for n, _ in _sections_of(options)] if what == "section" else options
            wrong.append(f"{where}: there is no {what} {name}{_near(name, known)}")
        elif section := _struct(fields[key].type):
            if isinstance(value, dict):
                found |= _flat(value, section, options, where, base, wrong, f"{name}.")
            else:
                wrong.append(f"{where}: {name} is a section, write [{name}].")
        else:
            found[name] = Found(value, where, base)
    return found


def _from_env(env: Mapping[str, str], options: Mapping[str, FieldInfo], wrong: list[str]) -> dict[str, Found]:
    """Only names with two underscores are options. One that would be an option, had it two, is a typo."""
    names = {_env(name): name for name in options}
    single = {key.replace("__", "_"): key for key in names}
    found: dict[str, Found] = {}
    for key, text in env.items():
        if not key.startswith(PREFIX):
            continue
        secret = key.removesuffix("__FILE")
        if key in names:
            found[names[key]] = Found(text, f"Environment {key}", Path(), loose=True)
        elif secret in names and _is_secret(options[names[secret]]):
            found[names[secret]] = Found({"file": text}, f"Environment {key}", Path())
        elif key in single:
            wrong.append(f"Environment {key}: write {single[key]}.")
        elif "__" in key:
            near = difflib.get_close_matches(key, names, 1, 0.6)
            wrong.append(f"Environment: there is no option {key}" + (f"; did you mean {near[0]}?" if near else "."))
    return found


def _near(name: str, known: Mapping[str, object] | Sequence[str]) -> str:
    """`; did you mean api.port?`, or a full stop. A right word in a wrong section counts most."""
    section, _, word = name.rpartition(".")

    def likeness(other: str) -> float:
        there, _, that = other.rpartition(".")
        return difflib.SequenceMatcher(None, word, that).ratio() + 0.1 * (section == there)

    best = max(known, key=likeness, default=None)
    return f"; did you mean {best}?" if best and likeness(best) >= 0.7 else "."


# ---- giving it its type


def _typed(it: Found, field: FieldInfo) -> object:
    def custom(kind: type, value: object) -> object:
        if kind is Secret:
            return _secret(value, it.base)
        if kind is Path and isinstance(value, str | Path):
            path = Path(value).expanduser()
            return it.base / path if it.base != Path() else path
        raise ValueError("this is not what is expected here")

    value, kind = it.value, field.type
    if it.loose and isinstance(value, str):
        if value == "" and _optional(kind):
            return None
        value = _read(value, kind)
    if isinstance(value, Secret):
        value = value.reveal()
    return msgspec.convert(value, kind, strict=not it.loose, dec_hook=custom)


def _secret(value: object, base: Path) -> Secret:
    match value:
        case Secret():
            return value
        case str():
            return Secret(value)
        case {"file": str(name), **rest} if not rest:
            return Secret((base / Path(name).expanduser()).read_text("utf-8").removesuffix("\n"))
    raise ValueError("neither a text nor the name of a file")


def _read(text: str, kind: object) -> object:
    """A text from the environment, as TOML would have it for this type."""
    holds = {get_origin(k) or k for k in _alternatives(kind)}
    if holds & {list, tuple, set, frozenset, Sequence} and not text.startswith("["):
        return [part.strip() for part in text.split(",")] if text.strip() else []
    if holds & {list, tuple, set, frozenset, dict, Sequence, Mapping} and text[:1] in "[{":
        try:
            return tomllib.loads(f"it = {text}")["it"]
        except tomllib.TOMLDecodeError as error:
            raise ValueError(str(error)) from None
    return text


def _reason(error: Exception, it: Found, field: FieldInfo) -> str:
    """In the words of whoever wrote the file; a secret is not repeated."""
    if isinstance(error, OSError):
        return f"cannot read {error.filename}: {error.strerror}"
    said = f"must be {spelled(field.type)}"
    if _is_secret(field) or not isinstance(it.value, str | int | float):
        return said
    return f"{said}, not {toml(it.value)}"


def _build(struct: type[T], prefix: str, values: Mapping[str, object], wrong: list[str]) -> T:
    given: dict[str, object] = {}
    for field in msgspec.structs.fields(struct):
        name = prefix + field.encode_name
        if section := _struct(field.type):
            given[field.name] = _build(section, f"{name}.", values, wrong)
        elif name in values:
            given[field.name] = values[name]
    try:
        return struct(**given)
    except ValueError as error:  # from the Struct's own __post_init__: options that do not go together
        raise Invalid(f"[{prefix.rstrip('.')}] {error}") from None


# ---- reading the declarations


def _options(struct: type[Struct], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every option by its full name, `section.option`."""
    for field in msgspec.structs.fields(struct):
        if section := _struct(field.type):
            yield from _options(section, f"{prefix}{field.encode_name}.")
        else:
            yield prefix + field.encode_name, field


def _sections(struct: type[Struct], prefix: str = "") -> Iterator[tuple[str, type[Struct]]]:
    """Every section that has options of its own, by its full name, in the order of declaration."""
    for field in msgspec.structs.fields(struct):
        if section := _struct(field.type):
            if any(True for _ in _leaves(section)):
                yield prefix + field.encode_name, section
            yield from _sections(section, f"{prefix}{field.encode_name}.")


def _sections_of(options: Mapping[str, FieldInfo]) -> list[tuple[str, None]]:
    return [(name, None) for name in dict.fromkeys(o.rpartition(".")[0] for o in options)]


def _leaves(struct: type[Struct]) -> Iterator[FieldInfo]:
    return (f for f in msgspec.structs.fields(struct) if not _struct(f.type))


def _struct(kind: object) -> type[Struct] | None:
    kind = _bare(kind)
    return kind if isinstance(kind, type) and issubclass(kind, Struct) else None


def _bare(kind: object) -> Any:
    return _bare(get_args(kind)[0]) if get_origin(kind) is Annotated else kind


def _alternatives(kind: object) -> list[Any]:
    kind = _bare(kind)
    return [_bare(a) for a in get_args(kind)] if get_origin(kind) in (Union, UnionType) else [kind]


def _optional(kind: object) -> bool:
    return NoneType in _alternatives(kind)


def _is_secret(field: FieldInfo) -> bool:
    return Secret in _alternatives(field.type)


def _meta(field: FieldInfo) -> Meta:
    """The note in the margin that says what the option is for."""
    notes = get_args(field.type)[1:] if get_origin(field.type) is Annotated else ()
    return next((n for n in notes if isinstance(n, Meta) and n.description), Meta())


def _default(field: FieldInfo) -> object:
    if field.default is not msgspec.NODEFAULT:
        return field.default
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return None


def _doc(struct: type[Struct]) -> list[str]:
    return _wrap(" ".join((struct.__doc__ or "").split()))


def _wrap(text: str, width: int = 100) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _env(name: str) -> str:
    return PREFIX + name.upper().replace(".", "__")


def spelled(kind: object) -> str:
    """A type in the words of people: `integer 0–65535`, `plain | json`, `list of text`."""
    if get_origin(kind) is Annotated:
        inner, *notes = get_args(kind)
        limits = [n for n in notes if isinstance(n, Meta)]
        return spelled(inner) + "".join(_limits(n) for n in limits)
    alternatives = _alternatives(kind)
    if len(alternatives) > 1:
        some = [spelled(a) for a in get_args(_bare(kind)) if a is not NoneType]
        return " or ".join(some) + (", or unset" if NoneType in alternatives else "")
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (list, tuple, set, frozenset, Sequence):
        return f"list of {spelled(args[0])}" if args else "list"
    if origin in (dict, Mapping):
        return f"table of {spelled(args[1])}" if args else "table"
    words: dict[Any, str] = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true | false",
        Path: "path",
        Secret: 'text or {file = "path"}',
    }
    return words.get(origin) or str(getattr(origin, "__name__", origin))


def _limits(meta: Meta) -> str:
    low = meta.ge if meta.ge is not None else meta.gt
    high = meta.le if meta.le is not None else meta.lt
    match low, high:
        case None, None:
            return ""
        case low, None:
            return f" ≥ {low}" if meta.ge is not None else f" > {low}"
        case None, high:
            return f" ≤ {high}" if meta.le is not None else f" < {high}"
    return f" {low}–{high}"


def toml(value: object) -> str:
    """A value as TOML writes it."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case Secret():
            return '"***"'
        case str() | Path():
            return msgspec.json.encode(str(value)).decode().replace("\x7f", "\\u007f")  # TOML's only other taboo
        case Mapping():
            return "{" + ", ".join(f"{toml(k)} = {toml(v)}" for k, v in value.items()) + "}"
        case Sequence() | set() | frozenset():
            return "[" + ", ".join(toml(v) for v in value) + "]"
    raise TypeError(f"TOML has no {type(value).__name__}")
