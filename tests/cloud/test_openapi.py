"""The API's description of itself: good OpenAPI by a public validator's word, and the same as what the specification says."""

import functools
import re

import jsonschema
import msgspec
import pytest
from openapi_spec_validator import validate

from kilonova.api.openapi import NEWEST, of_version
from kilonova.api.registry import R
from kilonova.kit.openapi import AT
from tests.cloud import tables
from tests.cloud.rooms import Rooms
from tests.cloud.tables import least, said, whole
from tests.cloud.test_spec_bodies import existing

SOME = (1, 60, NEWEST)


@functools.cache
def document(version):
    return msgspec.json.decode(msgspec.json.encode(of_version(version)))


def test_it_is_openapi():
    validate(document(NEWEST))


def test_it_is_openapi_at_each_version():
    """Of each version the operations and schemas that no earlier one had; of those looked at before only the names."""
    seen = set[bytes]()

    def new(*told):
        there = (key := msgspec.json.encode(told)) in seen
        seen.add(key)
        return not there

    for version in range(1, NEWEST + 1):
        told = of_version(version)
        schemas = told["components"]["schemas"]
        assert spoken_of(told) <= schemas.keys(), version
        news = {p: {m: o for m, o in item.items() if new(p, m, o)} for p, item in told["paths"].items()}
        paths = {p: {"parameters": told["paths"][p].get("parameters", [])} | item for p, item in news.items() if item}
        fresh = {name: schema for name, schema in schemas.items() if new(name, schema)}
        if paths or fresh:
            known: dict[str, dict] = {name: {} for name in spoken_of([paths, fresh]) | {"Fault"}}
            components = told["components"] | {"schemas": known | fresh}
            validate(msgspec.json.decode(msgspec.json.encode(told | {"paths": paths, "components": components})))
    assert len(seen) > 400


def spoken_of(thing):
    return set(re.findall(rf'"{AT}([^"]+)"', msgspec.json.encode(thing).decode()))


@pytest.mark.parametrize("version", [1, 19, 42, 43, 96, NEWEST])
def test_each_route_of_a_version_is_there_and_no_other(version):
    flat = lambda path: re.sub(r"\{[^}]*\}", "{}", path)
    ours = {
        (r.method.lower(), flat(r.path))
        for r in R
        if r.path.startswith("/v2.1") and version in r.versions and not r.gone
    }
    told = {(m, flat(p)) for p, here in document(version)["paths"].items() for m in here if m != "parameters"}
    assert ours == told
    names = [
        o["operationId"] for here in document(version)["paths"].values() for m, o in here.items() if m != "parameters"
    ]
    assert len(names) == len(set(names))


def body_of(version, method, path, action):
    flat = lambda path: re.sub(r"\{[^}]*\}", "{}", path)
    here = next(h for p, h in document(version)["paths"].items() if flat(p) == flat(f"/v2.1{path}"))
    schema = here[method.lower()]["requestBody"]["content"]["application/json"]["schema"]
    return next((s for s in schema.get("oneOf", [schema]) if action in (None, *s.get("required", []))), schema)


@pytest.mark.parametrize(("method", "path", "action", "entry", "first", "last"), existing("request", "POST", "PUT"))
def test_good_bodies_fit(method, path, action, entry, first, last):
    """What the specification calls a good body is one by our schemas, too; a member that nobody knows is not."""
    for v in {v for v in SOME if first <= v <= last}:
        table = said(entry, "request", v)
        if table is None:
            continue
        schema = body_of(v, method, path, action) | {"components": document(v)["components"]}
        judge = jsonschema.Draft202012Validator(schema)
        for body in (least(table), whole(table)):
            assert [e.message for e in judge.iter_errors({action: None} if body is None and action else body)] == [], (
                f"2.{v}"
            )
        if table.closed:
            assert not judge.is_valid(least(table) | {"nobody knows! this": 1}), f"2.{v}"


@pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")
def test_who_may_read_it(tmp_path):
    rooms = Rooms(tmp_path)
    answer = rooms.ask("GET", "/compute/openapi/2.96.json", None, "")
    said_ = msgspec.json.decode(answer.read())
    assert (answer.status, said_["openapi"], said_["info"]["version"]) == (200, "3.1.0", "2.96")
    assert said_["servers"] == [{"url": f"{rooms.url}/compute"}]
    for bad in ("2.0", "2.105", "2.96.yaml", "latest", "3.1.json", "2.999999.json"):
        assert rooms.ask("GET", f"/compute/openapi/{bad}", None, "").status == 404
