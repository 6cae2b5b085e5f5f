"""What crosses the bus may only grow: the shapes of the last release can still be read, and its readers read ours.

python tests/contracts/test_shapes.py freeze      write the shapes down, when a release is made
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import kilonova
from kilonova.contracts.compute import compute
from kilonova.contracts.conductor import conductor
from kilonova.contracts.jobs import jobs
from kilonova.contracts.scheduler import scheduler
from kilonova.contracts.wires import wires
from kilonova.kit.bus import Contract, runs

CONTRACTS = [compute, conductor, jobs, scheduler, runs, wires]
FROZEN = Path(kilonova.__file__).parent / "contracts" / "frozen"


def broken(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a neighbour of the last release would stumble over."""
    said = []
    for name, before in old.items():
        now = new.get(name)
        if now is None:
            said.append(f"{name} is gone")
            continue
        said += [
            f"{name}: {field} is gone"
            for field in before.get("properties", {})
            if field not in now.get("properties", {})
        ]
        said += [
            f"{name}: {field} must be there, which older senders do not say"
            for field in now.get("required", [])
            if field not in before.get("required", [])
        ]
        for field, was in before.get("properties", {}).items():
            is_ = now.get("properties", {}).get(field)
            if is_ is not None and _kind(is_) != _kind(was) and not _wider(was, is_):
                said.append(f"{name}: {field} was {_kind(was)}, is {_kind(is_)}")
    return said


def _kind(schema: dict[str, Any]) -> Any:
    """Without what readers do not look at."""
    return {k: v for k, v in schema.items() if k not in ("default", "description", "title")}


def _wider(was: dict[str, Any], is_: dict[str, Any]) -> bool:
    """More may be said than before; what was said before may be said still."""
    if "enum" in was and "enum" in is_:
        return set(map(str, was["enum"])) <= set(map(str, is_["enum"]))
    before, now = was.get("anyOf", [_kind(was)]), is_.get("anyOf", [_kind(is_)])
    return all(_kind(b) in [_kind(n) for n in now] for b in before)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: c.name)
def test_contracts_only_grow(contract: Contract) -> None:
    old = json.loads((FROZEN / f"{contract.name}.json").read_text())
    assert broken(old, contract.shapes()) == []


OLD = {"Spawn": {"properties": {"machine": {"type": "string"}, "mode": {"enum": ["a", "b"]}}, "required": ["machine"]}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("Spawn"), "Spawn is gone"),
        (lambda s: s["Spawn"]["properties"].pop("mode"), "Spawn: mode is gone"),
        (lambda s: s["Spawn"]["properties"].update(machine={"type": "integer"}), "Spawn: machine was"),
        (lambda s: s["Spawn"]["required"].append("mode"), "Spawn: mode must be there"),
        (lambda s: s["Spawn"]["properties"].update(mode={"enum": ["a"]}), "Spawn: mode was"),
        (lambda s: s["Spawn"]["properties"].update(mode={"enum": ["a", "b", "c"]}), None),
        (lambda s: s["Spawn"]["properties"].update(machine={"anyOf": [{"type": "string"}, {"type": "null"}]}), None),
        (lambda s: s["Spawn"]["properties"].update(more={"type": "integer", "default": 1}), None),
        (lambda s: s.update(New={"properties": {}}), None),
    ],
)
def test_what_breaks_is_noticed(change: Any, says: str | None) -> None:
    new = json.loads(json.dumps(OLD))
    change(new)
    said = broken(OLD, new)
    assert said == [] if says is None else (said and said[0].startswith(says))


def test_every_message_travels() -> None:
    """A default for all that is not required, so that an older sender's letter can be read."""
    for contract in CONTRACTS:
        for name, shape in contract.shapes().items():
            for field, schema in shape.get("properties", {}).items():
                said = (
                    "default" in schema or "anyOf" in schema or schema.get("type") == "array"
                )  # one that is made each time
                assert field in shape.get("required", []) or said, (name, field)


if __name__ == "__main__" and sys.argv[1:] == ["freeze"]:
    FROZEN.mkdir(exist_ok=True)
    for c in CONTRACTS:
        (FROZEN / f"{c.name}.json").write_text(json.dumps(c.shapes(), indent=1, sort_keys=True) + "\n")
