"""A model's past, told by its margins."""

from typing import Annotated, Literal

import msgspec
import pytest

from kilonova.kit.versions import UNSET, UnsetType, at, lift, lower, only, required, since, span, until, was


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    uuid: str | None = None
    tag: Annotated[str | None, only("2.32-2.36", "2.42-")] = None


class Wish(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    mode: Annotated[bool | Literal["auto"], was(bool, until="2.24")] = False
    networks: Annotated[
        list[Inner] | Literal["none"] | None, was(list[Inner] | None, until="2.36"), required(since="2.37")
    ] = None
    description: Annotated[str | None | UnsetType, since("2.19")] = UNSET
    personality: Annotated[list[str], until("2.56")] = []
    color: str = msgspec.field(default="red", name="OS-X:color")


def read(text: str, version: int) -> Wish:
    return lift(msgspec.json.decode(text, type=at(Wish, version)), Wish)


def test_a_field_is_there_only_in_its_versions() -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field `description`"):
        read('{"name": "a", "description": "x"}', 18)
    assert read('{"name": "a", "description": "x"}', 19).description == "x"
    assert read('{"name": "a"}', 19).description is UNSET
    assert read('{"name": "a", "personality": ["p"]}', 36).personality == ["p"]
    with pytest.raises(msgspec.ValidationError, match="personality"):
        read('{"name": "a", "networks": "none", "personality": []}', 57)


def test_a_field_that_came_went_and_came_again() -> None:
    one = '{"name": "a", "networks": [{"tag": "t"}]}'
    for version, there in ((31, False), (32, True), (36, True), (37, False), (41, False), (42, True), (104, True)):
        if there:
            networks = read(one, version).networks
            assert isinstance(networks, list)
            assert isinstance(networks[0], Inner)
            assert networks[0].tag == "t"
        else:
            with pytest.raises(msgspec.ValidationError, match="tag"):
                read(one, version)


def test_a_type_that_changed() -> None:
    assert read('{"name": "a", "mode": "auto"}', 25).mode == "auto"
    with pytest.raises(msgspec.ValidationError):
        read('{"name": "a", "mode": "auto"}', 24)
    assert read('{"name": "a", "mode": true}', 24).mode is True


def test_a_field_that_became_required() -> None:
    assert read('{"name": "a"}', 36).networks is None
    with pytest.raises(msgspec.ValidationError, match="missing required field `networks`"):
        read('{"name": "a"}', 37)


def test_names_on_the_wire_survive() -> None:
    assert read('{"name": "a", "OS-X:color": "blue"}', 1).color == "blue"


class Row(msgspec.Struct):
    id: int
    locked: Annotated[bool, since("2.9")] = False


class View(msgspec.Struct):
    id: str
    rows: list[Row]
    status: str = msgspec.field(default="", name="OS:status")
    host: Annotated[str | UnsetType, since("2.3")] = UNSET


def test_a_view_shows_what_its_version_had() -> None:
    view = View("a", [Row(1, True)], "up", "h")
    assert msgspec.to_builtins(lower(view, 1)) == {"id": "a", "rows": [{"id": 1}], "OS:status": "up"}
    assert msgspec.to_builtins(lower(view, 3)) == {"id": "a", "rows": [{"id": 1}], "OS:status": "up", "host": "h"}
    assert lower(view, 9) is view, "today's shape needs no copy"


def test_what_never_changed_is_itself() -> None:
    class Plain(msgspec.Struct):
        a: int

    assert at(Plain, 1) is Plain
    assert at(Wish, 24) is at(Wish, 24), "made once"


def test_spans_as_the_spec_writes_them() -> None:
    assert 36 in span("2.1-2.36")
    assert 37 not in span("2.1-2.36")
    assert 104 in span("2.37-")
    assert 5 in span("2.5")
    assert 6 not in span("2.5")
