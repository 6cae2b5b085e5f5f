"""What the Compute API is at each of its versions, for programs: OpenAPI 3.1, at /openapi/2.96.json and its like."""

import functools
import re
from typing import Any

from kilonova.api.registry import R
from kilonova.kit import openapi
from kilonova.kit.errors import NotFound
from kilonova.kit.routes import Call
from kilonova.kit.versions import minor

NEWEST = 104


@R.get("/openapi/{name}", open=True, strict="2.1000000")
def document(call: Call, name: str) -> dict[str, Any]:
    """Nobody need say who he is: it is the same for everybody."""
    found = re.fullmatch(r"(2\.[0-9]{1,4})\.json", name)
    version = minor(found[1]) if found else 0
    if not 1 <= version <= NEWEST:
        raise NotFound(f"There is a document for each of 2.1.json to 2.{NEWEST}.json.")
    return of_version(version) | {"servers": [{"url": call.url}]}


@functools.lru_cache(8)
def of_version(version: int) -> dict[str, Any]:
    routes = [r for r in R if r.path.startswith("/v2.1")]
    return openapi.document(routes, version, title="Compute", header="OpenStack-API-Version: compute")
