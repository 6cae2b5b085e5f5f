"""Which versions there are; the list of extensions that the API froze with. No token is asked for the former."""

from typing import Any

from kilonova.api.registry import R
from kilonova.kit.errors import NotFound
from kilonova.kit.routes import Call, Reply

DOCS = {"rel": "describedby", "type": "text/html", "href": "http://docs.openstack.org/"}
UPDATED = {"v2.0": "2025-07-04T12:00:00Z", "v2.1": "2013-07-23T11:33:21Z"}


def _summary(call: Call, which: str) -> dict[str, Any]:
    current = which == "v2.1"
    return {
        "id": which,
        "status": "CURRENT" if current else "DEPRECATED",
        "version": "2.104" if current else "",
        "min_version": "2.1" if current else "",
        "updated": UPDATED[which],
        "links": [{"rel": "self", "href": f"{call.url}/{'v2.1' if current else 'v2'}/"}],
    }


def _document(call: Call, which: str) -> dict[str, Any]:
    shown = _summary(call, which)
    number = "2.1" if which == "v2.1" else "2"
    media = {"base": "application/json", "type": f"application/vnd.openstack.compute+json;version={number}"}
    return {"version": shown | {"links": [*shown["links"], DOCS], "media-types": [media]}}


@R.get("/", open=True, strict="2.1000000")
def versions(call: Call) -> dict[str, Any]:
    return {"versions": [_summary(call, "v2.0"), _summary(call, "v2.1")]}


@R.get("/v2.1", open=True, strict="2.1000000")
def current(call: Call) -> dict[str, Any]:
    return _document(call, "v2.1")


@R.get("/v2", open=True, strict="2.1000000")
def old(call: Call) -> dict[str, Any]:
    return _document(call, "v2.0")


@R.get("/v2.1/versions/{id}", strict="2.1000000")
def one(call: Call, id: str) -> dict[str, Any]:
    if id not in UPDATED:
        raise NotFound("The resource could not be found.")
    return _document(call, id)


def choices(call: Call) -> Reply:
    """For what is under neither of them."""
    shown = []
    for which in ("v2.0", "v2.1"):
        document = _document(call, which)["version"]
        shown.append({k: document[k] for k in ("id", "status", "media-types")} | {"links": document["links"][:1]})
    return Reply({"choices": shown}, status=300)
