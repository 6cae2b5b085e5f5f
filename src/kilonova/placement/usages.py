"""What a project holds, all together or by type of consumer."""

from typing import Annotated as A
from typing import Any

import msgspec
from msgspec import UNSET, Meta

from kilonova.kit.routes import Call, Reply
from kilonova.kit.versions import since
from kilonova.placement.frame import R, shown
from kilonova.store import allocations as store

Owner = A[str, Meta(min_length=1, max_length=255)]


class Usage(msgspec.Struct):
    project_id: Owner
    user_id: Owner | None = None
    consumer_type: A[
        A[str, Meta(min_length=1, max_length=255, pattern=r"\A([A-Z0-9_]+|all|unknown)\Z")] | None, since("1.38")
    ] = None


@R.get("/usages", versions="1.9-", query=Usage, strict="1.0", policy="placement:usages", late=True)
def usages(call: Call) -> Reply:
    query = call.query
    call.check({"project_id": query.project_id})
    kind = {"unknown": None, "all": UNSET, None: UNSET}.get(query.consumer_type, query.consumer_type)
    found = call.world.db.look(store.usages, query.project_id, query.user_id, kind)
    if call.version < 38:
        return shown(call, {"usages": _without_count(_summed(found))})
    if query.consumer_type == "all":
        found = {"all": _summed(found)} if found else {}
    return shown(call, {"usages": {name or "unknown": sums for name, sums in found.items()}})


def _summed(found: dict[str | None, dict[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for of_type in found.values():
        for name, n in of_type.items():
            sums[name] = sums.get(name, 0) + n
    return sums


def _without_count(sums: dict[str, int]) -> dict[str, Any]:
    return {name: n for name, n in sums.items() if name != "consumer_count"}
