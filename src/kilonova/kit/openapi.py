"""OpenAPI 3.1 of a service at one of its versions: a reading of the routes, so it cannot say what is not so.

https://spec.openapis.org/oas/v3.1.0
"""

import collections
import inspect
import re
import typing
from collections.abc import Iterable
from typing import Any

import msgspec

from kilonova.kit.routes import Reply, Route
from kilonova.kit.versions import NEWEST, at

AT = "#/components/schemas/"
_VERSION = re.compile(r"_[0-9]+_[0-9]+$")
_FIELD = re.compile(r"\{(\w+)(?=[:}])")


def document(routes: Iterable[Route], version: int, *, title: str, major: int = 2, header: str = "") -> dict[str, Any]:
    """`header` is that by which the version is asked for, with the service's name: "OpenStack-API-Version: compute"."""
    there = [r for r in routes if version in r.versions and not r.gone]
    schemas = _Schemas(version)
    for r in there:
        schemas.want(r.body, r.query, answer_of(r))
    schemas.make()
    paths: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    for r in there:
        path = places.setdefault(_FIELD.sub("{", r.path), _plain(r.path))
        here = paths.setdefault(path, {"parameters": _parameters(path)} if "{" in path else {})
        method = r.method.lower()
        if method in here:
            _joined(here[method], _operation(r, version, major, schemas, path))
        else:
            here[method] = _operation(r, version, major, schemas, path)
    name, _, service = header.partition(": ")
    said = {"description": f"`{service} {major}.{version}`"} if header else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": f"{major}.{version}", **({"x-openstack-version-header": name} | said if header else {})},
        "security": [{"token": []}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "securitySchemes": {"token": {"type": "apiKey", "in": "header", "name": "X-Auth-Token"}},
            "schemas": schemas.components | {"Fault": _FAULT},
            "responses": {
                "Fault": {"description": "A fault", "content": {"application/json": {"schema": _ref("Fault")}}}
            },
        },
    }  # fmt: skip


_FAULT = {
    "description": "One member, named after the kind of fault.",
    "type": "object",
    "minProperties": 1,
    "maxProperties": 1,
    "additionalProperties": {
        "type": "object",
        "required": ["code", "message"],
        "properties": {"code": {"type": "integer"}, "message": {"type": "string"}},
    },
}


def answer_of(r: Route) -> Any:
    """The type of what it answers with, as far as its function says; None: nothing; Any: something."""
    said = typing.get_type_hints(inspect.unwrap(r.do)).get("return", Any)
    if said in (Reply, Any) or "Reply" in str(said):
        return Any
    return None if said is type(None) else said


class _Schemas:
    """What all routes speak of, described once."""

    def __init__(self, version: int) -> None:
        self.version, self.types = version, dict[Any, None]()
        self.of: dict[Any, dict[str, Any]] = {}
        self.components: dict[str, Any] = {}

    def want(self, *types: Any) -> None:
        self.types |= {t: None for t in types if t is not None and t is not Any}

    def make(self) -> None:
        then = [at(t, self.version) for t in self.types]
        described, self.components = msgspec.json.schema_components(
            then, ref_template=AT + "{name}", schema_hook=lambda t: {}
        )
        names = _short(self.components)
        self.of = {t: _named(d, names) for t, d in zip(self.types, described, strict=True)}
        self.components = {names[n]: _titled(_named(s, names)) for n, s in self.components.items()}

    def __call__(self, type: Any) -> dict[str, Any]:
        if type is None or type is Any:
            return {}
        return self.of[type]

    def properties(self, type: Any) -> dict[str, Any]:
        """The members of a query's Struct."""
        said = self(type)
        while "$ref" in said:
            said = self.components[said["$ref"].rpartition("/")[2]]
        return dict(said.get("properties", {}))


def _short(names: Iterable[str]) -> dict[str, str]:
    """Without the package and the version that are the same for all, where that leaves them apart."""
    known = list(names)
    wanted = {n: _VERSION.sub("", ".".join(n.split(".")[-2:])) for n in known}
    once = collections.Counter(wanted.values())
    return {n: re.sub(r"[^A-Za-z0-9._-]+", "_", wanted[n] if once[wanted[n]] == 1 else n) for n in known}


def _named(schema: Any, names: dict[str, str]) -> Any:
    """With references to what the components are called."""
    if isinstance(schema, dict):
        return {k: f"{AT}{names[v.removeprefix(AT)]}" if k == "$ref" else _named(v, names) for k, v in schema.items()}
    return [_named(s, names) for s in schema] if isinstance(schema, list) else schema


def _titled(schema: dict[str, Any]) -> dict[str, Any]:
    """By what it is, and not at which version: what did not change since another version reads the same."""
    return schema | {"title": _VERSION.sub("", schema["title"])} if "title" in schema else schema


def _ref(name: str) -> dict[str, str]:
    return {"$ref": AT + name}


def _plain(path: str) -> str:
    """Without the converters of the framework: {id:path} is {id}."""
    return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", path)


def _parameters(path: str) -> list[dict[str, Any]]:
    return [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in _FIELD.findall(path)]


def _operation(r: Route, version: int, major: int, schemas: _Schemas, path: str) -> dict[str, Any]:
    doc = inspect.getdoc(r.do) or ""
    made: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{r.method.lower()} {path}").strip("_"),
        "responses": {
            str(r.status(version)): _response(r, schemas),
            "default": {"$ref": "#/components/responses/Fault"},
        },
    }
    if doc and r.action is None:
        made["summary"] = doc.partition("\n")[0]
    if r.policy:
        made["x-openstack-policy"] = r.policy
    first, last = r.versions
    made["x-openstack-versions"] = {
        "min": f"{major}.{max(1, first)}",
        "max": None if last == NEWEST else f"{major}.{last}",
    }
    if r.open:
        made["security"] = []
    if r.query is not None:
        made["parameters"] = [
            {"name": n, "in": "query", "required": False, "schema": s} for n, s in schemas.properties(r.query).items()
        ]
    if (body := _body(r, schemas)) is not None:
        made["requestBody"] = {"required": r.body is not None, "content": {"application/json": {"schema": body}}}
    return made


def _body(r: Route, schemas: _Schemas) -> dict[str, Any] | None:
    if r.raw:
        return None
    if r.action is not None:
        inner = schemas(r.body)
        return {
            "type": "object",
            "required": [r.action],
            "properties": {r.action: inner},
            "additionalProperties": False,
        }
    return None if r.body is None else schemas(r.body)


def _response(r: Route, schemas: _Schemas) -> dict[str, Any]:
    answer = answer_of(r)
    if answer is None:
        return {"description": "Done"}
    schema = schemas(answer)
    return {"description": "Done", "content": {"application/json": {"schema": schema}}}


def _joined(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The actions of one place are one operation: its body is one of theirs."""
    bodies = one["requestBody"]["content"]["application/json"]
    more = other["requestBody"]["content"]["application/json"]["schema"]
    bodies["schema"] = {"oneOf": [*bodies["schema"].get("oneOf", [bodies["schema"]]), more]}
    for status, response in other["responses"].items():
        known = one["responses"].setdefault(status, response)
        if known is not response and "content" in response and known != response:
            one["responses"][status] = {"description": "Done", "content": {"application/json": {"schema": {}}}}
    for extension in ("x-openstack-policy", "x-openstack-versions"):
        one.pop(extension, None)
