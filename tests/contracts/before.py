"""A neighbour of an earlier release, as its shapes tell (`before.json`): it says, and sees, what they know and no more.

`before.json` are the shapes of a release before this one.  When a release is made: python tests/contracts/before.py keep
writes those that are frozen now.
"""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

import kilonova
from kilonova.kit import journal
from kilonova.kit.bus import Letter, answer_to, opened
from kilonova.kit.workflow import WORKFLOWS
from tests.contracts.test_shapes import CONTRACTS

FILE = Path(__file__).with_name("before.json")


class Before:
    """`shapes`: {contract: {name: JSON Schema}}."""

    def __init__(self, shapes: dict[str, dict[str, Any]]) -> None:
        self.shapes = shapes

    def knows(self, contract: str, name: str) -> bool:
        return name in self.shapes[contract]

    def said(self, contract: str, name: str, value: Any) -> Any:
        """What of a message it says, or sees: fields that it does not know are not there."""
        return self._said(self.shapes[contract], self.shapes[contract][name], value)

    def _said(self, defs: dict[str, Any], schema: dict[str, Any], value: Any) -> Any:
        if "$ref" in schema:
            return self._said(defs, defs[schema["$ref"].rpartition("/")[2]], value)
        if "anyOf" in schema:
            return self._said(defs, self._branch(defs, schema, value), value)
        if isinstance(value, dict) and "properties" in schema:
            known = schema["properties"]
            return {k: self._said(defs, known[k], v) for k, v in value.items() if k in known}
        if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
            return {k: self._said(defs, schema["additionalProperties"], v) for k, v in value.items()}
        if isinstance(value, list) and isinstance(schema.get("items"), dict):
            return [self._said(defs, schema["items"], v) for v in value]
        return value

    def _branch(self, defs: dict[str, Any], schema: dict[str, Any], value: Any) -> dict[str, Any]:
        """The one of several shapes that a value has."""
        if isinstance(value, dict) and "discriminator" in schema:
            said = schema["discriminator"]
            return {"$ref": said["mapping"][value[said["propertyName"]]]}
        kind = {dict: "object", list: "array", str: "string", type(None): "null"}.get(type(value), "number")
        for branch in schema["anyOf"]:
            whole = defs[branch["$ref"].rpartition("/")[2]] if "$ref" in branch else branch
            if whole.get("type") == kind:
                return dict(branch)
        return {}


def kept() -> Before:
    return Before(json.loads(FILE.read_text()))


class Wire:
    """A bus between releases: `old(host)` says which hosts are of the earlier one; the conductor is, if `conductor`.

    What crosses between two releases, or comes from the older one, is cut to what that one knows.
    """

    def __init__(self, before: Before, send: Any, hosts: set[str], *, old: set[str], conductor: bool = False) -> None:
        self.before, self.onward, self.hosts, self.old, self.conductor = before, send, hosts, old, conductor
        self.asked: dict[str, tuple[str, type[msgspec.Struct]]] = {}  # by key: whom, and what
        self.cut: set[str] = set()  # the messages that went through

    def send(self, to: str, raw: bytes) -> None:
        m = opened(raw)
        assert m is not None
        if to in self.hosts:
            self.asked[m.key] = to, CALLS[m.name]
            crosses, contract = to in self.old or self.conductor, "compute"
        else:
            crosses, contract = self.conductor or self._from(m) in self.old, "conductor"
        self.onward(to, self._cut(m, contract) if crosses else raw)

    def _from(self, m: Letter) -> str:
        if m.name == "Answered":
            key = msgspec.msgpack.decode(m.body)["key"]
            return self.asked[key][0] if key in self.asked else ""
        return str(msgspec.msgpack.decode(m.body).get("host", ""))

    def _cut(self, m: Letter, contract: str) -> bytes:
        body = msgspec.msgpack.decode(m.body)
        if m.name == "Answered":
            body = self._answer(body)
        elif m.name == "Wake":
            pass
        elif not self.before.knows(contract, m.name):
            assert contract == "compute" and not self.conductor, f"the earlier release has no {m.name}"
            m = msgspec.structs.replace(m, name=f"{m.name} of another time")  # as who does not know it answers
        else:
            self.cut.add(m.name)
            body = self.before.said(contract, m.name, body)
            if m.name == "Report":
                body["speaks"] = [name for name in body.get("speaks", []) if self.before.knows("compute", name)]
        return msgspec.msgpack.encode(
            msgspec.structs.replace(m, body=msgspec.Raw(msgspec.msgpack.encode(body)), names={})
        )

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Its type stands in the call."""
        if body.get("answer") is None or body["key"] not in self.asked:
            return body
        name = getattr(answer_to(self.asked[body["key"]][1]), "__name__", "")
        if self.before.knows("compute", name):
            text = json.loads(body["answer"])
            body["answer"] = json.dumps(self.before.said("compute", name, text))
        return body


CALLS: dict[str, type[msgspec.Struct]] = {m.__name__: m for c in CONTRACTS for m in c.messages.values()}


def jobs_of(before: Before, monkeypatch: Any) -> set[str]:
    """An API of the earlier release hands its jobs to conductors of this one. The workflows that were begun so."""
    begun: set[str] = set()
    whole = journal.opened

    def cut(tx: Any, workflow: str, args: bytes, **more: Any) -> None:
        flow = WORKFLOWS.get(workflow)
        if flow is not None:
            name = type(flow.job(args.decode())).__name__
            if before.knows("jobs", name):
                begun.add(workflow)
                args = json.dumps(before.said("jobs", name, json.loads(args))).encode()
        whole(tx, workflow, args, **more)

    monkeypatch.setattr(journal, "opened", cut)
    return begun


def _plain(schema: Any) -> Any:
    if isinstance(schema, dict):
        words = ("description", "title")
        return {k: _plain(v) for k, v in schema.items() if not (k in words and isinstance(v, str))}
    return [_plain(v) for v in schema] if isinstance(schema, list) else schema


if __name__ == "__main__" and sys.argv[1:] == ["keep"]:
    frozen = Path(kilonova.__file__).parent / "contracts" / "frozen"
    parts = []
    for c in sorted(CONTRACTS, key=lambda c: c.name):
        shapes = sorted(json.loads((frozen / f"{c.name}.json").read_text()).items())
        lines = [f" {json.dumps(n)}: {json.dumps(_plain(s), sort_keys=True)}" for n, s in shapes]
        parts.append(f"{json.dumps(c.name)}: {{\n" + ",\n".join(lines) + "\n}")
    FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")
