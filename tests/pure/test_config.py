"""Configuration: what was written arrives typed, and what was written wrong is told by its full name."""

import pickle
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilonova.kit import log
from kilonova.kit.config import Meta, Secret, load, reference, sample, spelled, toml, written
from kilonova.kit.errors import Invalid
from kilonova.model.options import Config


class Door(msgspec.Struct, frozen=True):
    """A door."""

    port: Annotated[int, Meta(description="The number.", ge=0, le=65535)] = 80
    names: Annotated[tuple[str, ...], Meta(description="Also called.")] = ()
    kind: Annotated[Literal["wood", "steel"] | None, Meta(description="Made of.", examples=["steel"])] = None
    open: Annotated[bool, Meta(description="Is it?")] = False
    width_m: Annotated[float, Meta(description="How wide.", gt=0)] = 1.0
    key: Annotated[Secret, Meta(description="Fits.")] = Secret()
    bell: Annotated[Path | None, Meta(description="A sound.")] = None
    weights: Annotated[dict[str, float], Meta(description="By part.")] = {}


class Yard(msgspec.Struct, frozen=True):
    """Behind."""

    gate: Door = Door()
    width_m: Annotated[float, Meta(description="How wide.")] = 10.0


class House(msgspec.Struct, frozen=True):
    """All of it."""

    door: Door = Door()
    yard: Yard = Yard()


def lay(directory: Path, text: str, name: str = "house.toml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def refusal(paths: list[Path] | None = None, env: dict[str, str] | None = None, **more: object) -> str:
    with pytest.raises(Invalid) as error:
        load(paths or [], env or {}, House, more)
    return error.value.said


def test_nothing_written_is_the_defaults() -> None:
    assert load([], {}, House) == House()
    assert load([], {}, Config) == Config()


def test_later_wins_option_by_option(tmp_path: Path) -> None:
    one = lay(tmp_path, '[door]\nport = 1\nnames = ["a", "b"]\nkind = "wood"\n', "one.toml")
    two = lay(tmp_path, "[door]\nport = 2\nwidth_m = 3\n[yard.gate]\nopen = true\n", "two.toml")
    house = load([one, two], {"KILONOVA_YARD__WIDTH_M": "2.5", "HOME": "/"}, House, {"door.kind": "steel"})
    assert house == House(
        door=Door(port=2, names=("a", "b"), kind="steel", width_m=3.0),
        yard=Yard(gate=Door(open=True), width_m=2.5),
    )


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("DOOR__PORT", "8080", {"port": 8080}),
        ("DOOR__OPEN", "true", {"open": True}),
        ("DOOR__OPEN", "0", {"open": False}),
        ("DOOR__NAMES", "a, b", {"names": ("a", "b")}),
        ("DOOR__NAMES", '["a,b"]', {"names": ("a,b",)}),
        ("DOOR__NAMES", "", {"names": ()}),
        ("DOOR__KIND", "", {"kind": None}),
        ("DOOR__WEIGHTS", "{wing = 2}", {"weights": {"wing": 2.0}}),
        ("DOOR__BELL", "/b", {"bell": Path("/b")}),
    ],
)
def test_the_environment_is_typed(name: str, text: str, value: dict[str, object]) -> None:
    assert load([], {f"KILONOVA_{name}": text}, House).door == msgspec.structs.replace(Door(), **value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[door]\nprot = 1", "there is no option door.prot; did you mean door.port?"),
        ("[dor]\nport = 1", "there is no section dor; did you mean door?"),
        ("[yard]\nport = 1", "there is no option yard.port; did you mean "),
        ("[door]\nquux = 1", "there is no option door.quux."),
        ("[door]\nport = 'x'", 'door.port: must be integer 0–65535, not "x".'),
        ("[door]\nport = '1'", 'door.port: must be integer 0–65535, not "1".'),
        ("[door]\nport = 70000", "door.port: must be integer 0–65535, not 70000."),
        ("[door]\nkind = 'glass'", 'door.kind: must be wood | steel, or unset, not "glass".'),
        ("[door]\nnames = 'a'", 'door.names: must be list of text, not "a".'),
        ("[yard.gate]\nwidth_m = 0", "yard.gate.width_m: must be number > 0, not 0."),
        ("door = 1", "door is a section, write [door]."),
        ("[door\n", "is not TOML"),
    ],
)
def test_a_mistake_in_a_file_is_told_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = lay(tmp_path, text)
    assert said in refusal([path])
    assert str(path) in refusal([path])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert refusal([tmp_path / "no.toml"]) == f"Cannot read {tmp_path / 'no.toml'}: No such file or directory."


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("KILONOVA_DOOR__PROT", "there is no option KILONOVA_DOOR__PROT; did you mean KILONOVA_DOOR__PORT?"),
        ("KILONOVA_DOOR_PORT", "Environment KILONOVA_DOOR_PORT: write KILONOVA_DOOR__PORT."),
        ("KILONOVA_DOOR__PORT", "Environment KILONOVA_DOOR__PORT: door.port: must be integer 0–65535, not"),
    ],
)
def test_a_mistake_in_the_environment_is_told_by_name(key: str, said: str) -> None:
    assert said in refusal(env={key: "x"})


def test_other_variables_of_ours_are_left_alone() -> None:
    assert load([], {"KILONOVA_VENV": "/v", "KILONOVAX__Y": "1"}, House) == House()


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = lay(tmp_path, "[door]\nprot = 1\nopen = 7\n")
    assert len(refusal([path], {"KILONOVA_DOOR__PORT": "x"}, **{"door.ketchup": 1}).splitlines()) == 4


def test_a_secret_is_not_seen(tmp_path: Path) -> None:
    path = lay(tmp_path, '[door]\nkey = "opensesame"')
    house = load([path], {}, House)
    assert house.door.key.reveal() == "opensesame"
    assert "opensesame" not in f"{house} {house!r} {house.door.key} {pickle.dumps(house.door.key)!r}"
    assert log.clean("it is opensesame, you know") == "it is ***, you know"
    assert house.door.key == Secret("opensesame") != Secret("other")
    assert not Secret()
    with pytest.raises(AttributeError):
        house.door.key._text = "changed"


def test_a_secret_may_lie_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from a file\n")
    path = lay(tmp_path, '[door]\nkey = {file = "key"}')
    assert load([path], {}, House).door.key.reveal() == "from a file"
    assert load([], {"KILONOVA_DOOR__KEY__FILE": str(tmp_path / "key")}, House).door.key.reveal() == "from a file"
    gone = lay(tmp_path, '[door]\nkey = {file = "gone"}')
    assert refusal([gone]).endswith(f"door.key: cannot read {tmp_path / 'gone'}: No such file or directory.")


def test_a_wrong_secret_is_not_repeated(tmp_path: Path) -> None:
    path = lay(tmp_path, '[door]\nkey = ["opensesame"]')
    assert refusal([path]).endswith('door.key: must be text or {file = "path"}.')


def test_a_relative_path_begins_at_its_file(tmp_path: Path) -> None:
    path = lay(tmp_path, '[door]\nbell = "ring.wav"')
    assert load([path], {}, House).door.bell == tmp_path / "ring.wav"
    assert load([path], {"KILONOVA_DOOR__BELL": "ring.wav"}, House).door.bell == Path("ring.wav")


def test_options_that_do_not_go_together_are_told_by_section() -> None:
    class Pair(msgspec.Struct, frozen=True):
        low: int = 1
        high: int = 2

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("low is above high")

    class Tree(msgspec.Struct, frozen=True):
        pair: Pair = Pair()

    with pytest.raises(Invalid, match=re.escape("[pair] low is above high")):
        load([], {"KILONOVA_PAIR__LOW": "3"}, Tree)


def test_the_sample_uncommented_is_the_defaults(tmp_path: Path) -> None:
    for tree in House, Config:
        kept, skip = [], False
        for line in sample(tree).splitlines():
            option = re.fullmatch(r"#(\w+ = .*)", line)
            kept += [option[1] if option else line] if not (option and skip) else []
            skip = line == "# not set unless you do:"
        path = lay(tmp_path, "\n".join(kept))
        assert load([path], {}, tree) == tree()


def test_the_sample_as_it_stands_is_the_defaults_too(tmp_path: Path) -> None:
    assert load([lay(tmp_path, sample(Config))], {}, Config) == Config()


def test_what_holds_now_is_written_as_it_would_be_read(tmp_path: Path) -> None:
    config = load([], {}, Config, {"api.port": 0, "network.dns_servers": "9.9.9.9", "identity.password": "opensesame"})
    text = written(config)
    assert "port = 0" in text
    assert 'password = "***"' in text
    assert load([lay(tmp_path, text)], {}, Config, {"identity.password": "opensesame"}) == config


def test_every_option_says_what_it_is_for() -> None:
    """A blank cell in the reference is an option nobody explained."""
    rows = [r for r in reference(Config).splitlines() if r.startswith("| `")]
    assert len(rows) > 80
    assert not [r for r in rows if not r.rstrip(" |").endswith((".", "`", ")"))]
    sections = [msgspec.structs.fields(Config)]
    assert all(f.type.__doc__ for fields in sections for f in fields)


@given(st.recursive(st.booleans() | st.integers(-(2**60), 2**60) | st.text(), lambda x: st.lists(x)))
def test_what_we_write_as_toml_is_read_back(value: object) -> None:
    assert tomllib.loads(f"it = {toml(value)}")["it"] == value


def test_types_are_spelled_for_people() -> None:
    assert spelled(Annotated[int, Meta(ge=1)]) == "integer ≥ 1"
    assert spelled(tuple[str, ...] | None) == "list of text, or unset"
    assert spelled(dict[str, float]) == "table of number"
