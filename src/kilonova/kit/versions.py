"""History in the margin: a body or a view reads as today's API; its past stands in annotations.

    class ServerUpdate(msgspec.Struct, forbid_unknown_fields=True):
        name: Name | UnsetType = UNSET
        description: Annotated[str | None | UnsetType, since("2.19")] = UNSET
        block_migration: Annotated[bool | Literal["auto"], was(bool, until="2.24")] = False

`at(Model, minor)` is the strict Struct of that version, made once.  `lift` turns one of them into today's
Model (what did not exist has its default), `lower` turns today's Model into one of them (what does not exist
yet is left out).  Versions are the minor numbers of one major: 19 is 2.19.
"""

import functools
import operator
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, UNSET, UnsetType

__all__ = [
    "NEWEST",
    "UNSET",
    "Span",
    "UnsetType",
    "at",
    "lift",
    "lower",
    "minor",
    "only",
    "required",
    "since",
    "span",
    "until",
    "was",
]

NEWEST = 10**6  # a minor version later than any


class Span(NamedTuple):
    """From `first` to `last`, both included."""

    first: int
    last: int

    def __contains__(self, version: object) -> bool:
        return isinstance(version, int) and self.first <= version <= self.last


class Margin(NamedTuple):
    """When a field exists."""

    spans: tuple[Span, ...]


class Was(NamedTuple):
    """Until (and with) `last` the field had another type."""

    type: Any
    last: int


class Required(NamedTuple):
    """From `first` on the field may not be left out."""

    first: int


def minor(version: str) -> int:
    """19, of "2.19"."""
    return int(version.split(".")[1])


def span(text: str) -> Span:
    """Of "2.1-2.36", "2.37-" or "2.5"."""
    first, dash, last = text.partition("-")
    return Span(minor(first), minor(last) if last else NEWEST if dash else minor(first))


def since(version: str) -> Margin:
    return Margin((Span(minor(version), NEWEST),))


def until(version: str) -> Margin:
    return Margin((Span(0, minor(version)),))


def only(*spans: str) -> Margin:
    """In these spans: `only("2.32-2.36", "2.42-")`."""
    return Margin(tuple(map(span, spans)))


def was(type: Any, *, until: str) -> Was:
    return Was(type, minor(until))


def required(*, since: str) -> Required:
    return Required(minor(since))


@functools.cache
def at(model: Any, version: int) -> Any:
    """`model` as it was at this version; itself where it never changed since."""
    if _is_struct(model):
        return _struct_at(model, version)
    origin, args = get_origin(model), get_args(model)
    if origin is Annotated:
        inner, *notes = args
        for n in sorted((n for n in notes if isinstance(n, Was)), key=lambda n: n.last):
            if version <= n.last:
                inner = n.type
                notes = [m for m in notes if not isinstance(m, msgspec.Meta)]
                break
        kept = [n for n in notes if not isinstance(n, Margin | Was | Required)]
        inner = at(inner, version)
        return Annotated[(inner, *kept)] if kept else inner
    if not args or origin is typing.Literal:
        return model
    then = tuple(at(a, version) if a is not Ellipsis else a for a in args)
    if then == args:
        return model
    return functools.reduce(operator.or_, then) if origin in (typing.Union, types.UnionType) else origin[then]


def lift(value: Any, model: Any) -> Any:
    """An instance of `at(model, v)` as an instance of `model`."""
    if not _is_struct(model) or isinstance(value, model):
        return value
    source: Any = type(value)
    return _lifting(source, model)(value)


def lower(value: Any, version: int) -> Any:
    """An instance of a Model as an instance of `at(Model, version)`, to be encoded."""
    model: Any = type(value)
    return _lowering(model, version)(value)


def _is_struct(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, msgspec.Struct)


@functools.cache
def _hints(model: type) -> dict[str, Any]:
    return typing.get_type_hints(model, include_extras=True)


def _struct_at(model: type[msgspec.Struct], version: int) -> type[msgspec.Struct]:
    hints, fields, same = _hints(model), [], True
    for f in msgspec.structs.fields(model):
        hint = hints[f.name]
        notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if any(isinstance(n, Margin) and not any(version in s for s in n.spans) for n in notes):
            same = False
            continue
        then = at(hint, version)
        default = f.default if f.default is not NODEFAULT else NODEFAULT
        factory = f.default_factory
        if any(isinstance(n, Required) and version >= n.first for n in notes):
            default = factory = NODEFAULT
        same = same and (then == hint or then == _bare(hint)) and default == f.default and factory == f.default_factory
        rename = msgspec.field(name=f.encode_name, **_default(default, factory))
        fields.append((f.name, then, rename))
    if same:
        return model
    c = model.__struct_config__
    made = msgspec.defstruct(
        f"{model.__name__}_2_{version}",
        fields,
        kw_only=True,
        forbid_unknown_fields=c.forbid_unknown_fields,
        omit_defaults=c.omit_defaults,
        tag=c.tag,
        tag_field=c.tag_field,
        module=model.__module__,
    )
    msgspec.json.Decoder(made)  # learnt here, by one thread, before another can see it: why is in `kit/structs.py`
    return made


def _default(default: Any, factory: Any) -> dict[str, Any]:
    if default is not NODEFAULT:
        return {"default": default}
    return {"default_factory": factory} if factory is not NODEFAULT else {}


def _bare(hint: Any) -> Any:
    """Without our own margins."""
    if get_origin(hint) is not Annotated:
        return hint
    inner, *notes = get_args(hint)
    kept = [n for n in notes if not isinstance(n, Margin | Was | Required)]
    return Annotated[(inner, *kept)] if kept else inner


def _structs_in(hint: Any) -> list[type]:
    if _is_struct(hint):
        return [hint]
    if get_origin(hint) is typing.Literal:
        return []
    return [s for a in get_args(hint) for s in _structs_in(a)]


@functools.cache
def _lifting(source: type[msgspec.Struct], model: type[msgspec.Struct]) -> Callable[[Any], Any]:
    names = [f.name for f in msgspec.structs.fields(source)]
    read: Callable[[Any], Any] = (
        operator.attrgetter(*names) if len(names) > 1 else lambda value: tuple(getattr(value, n) for n in names)
    )
    hints = _hints(model)
    nested = {n: {m.__name__: m for m in found} for n in names if (found := _structs_in(hints[n]))}

    def lifted(value: Any) -> Any:
        parts = dict(zip(names, read(value), strict=True))
        for name, models in nested.items():
            parts[name] = _lift_in(parts[name], models)
        return model(**parts)

    return lifted


def _lift_in(value: Any, models: dict[str, Any]) -> Any:
    if isinstance(value, msgspec.Struct):
        said = set(type(value).__struct_fields__)
        model = models.get(type(value).__name__.split("_2_")[0])
        model = model or next((m for m in models.values() if said <= set(m.__struct_fields__)), None)
        return value if model is None else lift(value, model)  # None: a type that was, and has no successor
    if isinstance(value, list):
        return [_lift_in(v, models) for v in value]
    if isinstance(value, dict):
        return {k: _lift_in(v, models) for k, v in value.items()}
    return value


@functools.cache
def _lowering(model: type, version: int) -> Callable[[Any], Any]:
    """A view is made of values, never of defaults: so its Struct of that version is filled by position, in C."""
    if at(model, version) is model:
        return lambda value: value
    hints = _hints(model)
    fields = msgspec.structs.fields(at(model, version))
    names = [f.name for f in fields]
    shape = msgspec.defstruct(
        f"{model.__name__}_2_{version}",
        [(f.name, Any, msgspec.field(name=f.encode_name)) for f in fields],
        module=model.__module__,
    )
    read: Callable[[Any], Any] = (
        operator.attrgetter(*names) if len(names) > 1 else lambda value: tuple(getattr(value, n) for n in names)
    )
    nested = [i for i, n in enumerate(names) if _structs_in(hints[n])]
    if not nested:
        return lambda value: shape(*read(value))

    def lowered(value: Any) -> Any:
        parts = list(read(value))
        for i in nested:
            parts[i] = _lower_in(parts[i], version)
        return shape(*parts)

    return lowered


def _lower_in(value: Any, version: int) -> Any:
    if isinstance(value, msgspec.Struct):
        return lower(value, version)
    if isinstance(value, list):
        return [_lower_in(v, version) for v in value]
    if isinstance(value, dict):
        return {k: _lower_in(v, version) for k, v in value.items()}
    return value


assert UNSET is not None  # re-exported: what a caller did not say, and what an answer leaves out
