"""What projects used in a time: hours of servers, and what they took of hosts meanwhile."""

from typing import Annotated, Any

import msgspec
import sqlalchemy as sa
from msgspec import Meta

from kilonova.api.registry import R, next_link, page_limit
from kilonova.kit.clock import iso_us, parsed
from kilonova.kit.errors import Invalid
from kilonova.kit.routes import Call
from kilonova.kit.versions import since
from kilonova.model.flavor import Flavor
from kilonova.store import servers

PLACE = "os-simple-tenant-usage"
Limit = Annotated[str, Meta(pattern=r"^[0-9]+$", max_length=12)]


class Query(msgspec.Struct):
    start: list[str] = []
    end: list[str] = []
    limit: Annotated[list[Limit], since("2.40")] = []
    marker: Annotated[list[str], since("2.40")] = []


class ListQuery(Query):
    detailed: list[str] = []


class Lived(msgspec.Struct, frozen=True):
    """A server that ran in the time asked about. `end` None: it still does."""

    id: str
    name: str
    project_id: str
    flavor: Flavor
    state: str
    start: float
    end: float | None


@R.get(f"/v2.1/{PLACE}", query=ListQuery, strict="2.75", policy="os_compute_api:os-simple-tenant-usage:list")
def index(call: Call) -> dict[str, Any]:
    q: ListQuery = call.query
    found, more, span = _gathered(call, None)
    detailed = bool(q.detailed) and q.detailed[-1] == "1"
    of: dict[str, list[Lived]] = {}
    for s in found:
        of.setdefault(s.project_id, []).append(s)
    shown = [_project(call, id, lived, *span, detailed=detailed) for id, lived in of.items()]
    return {"tenant_usages": shown, **({"tenant_usages_links": more} if more else {})}


@R.get(
    f"/v2.1/{PLACE}/{{id}}",
    query=Query,
    strict="2.75",
    policy="os_compute_api:os-simple-tenant-usage:show",
    late=True,
)
def show(call: Call, id: str) -> dict[str, Any]:
    call.check({"project_id": id})
    found, more, span = _gathered(call, id)
    shown = _project(call, id, found, *span, detailed=True) if found else {}
    return {"tenant_usage": shown, **({"tenant_usage_links": more} if more else {})}


def _gathered(call: Call, project: str | None) -> tuple[list[Lived], list[dict[str, str]], tuple[float, float]]:
    """Servers that ran, the link to the next page, and from when to when was asked."""
    q: Query = call.query
    now = call.world.clock.now()
    begin, end = _moment(q.start, now), _moment(q.end, now)
    if begin > end or (begin == end and (q.start or q.end)):
        raise Invalid("Invalid start time. The start time cannot occur after the end time.")
    limit = page_limit(call, q.limit[-1] if q.limit else None) if call.version >= 40 else None
    found = _lived(call, begin, end, project, limit, q.marker[-1] if q.marker else None)
    path = (PLACE,) if project is None else (PLACE, project)
    more = next_link(call, found[-1].id, *path) if found and len(found) == limit else []
    return found, more, (begin, end)


def _lived(
    call: Call, begin: float, end: float, project: str | None, limit: int | None, marker: str | None
) -> list[Lived]:
    """In the order of their ids.

    SELECT … FROM servers WHERE launched_at < :end AND (ended IS NULL OR ended > :begin) AND id > :marker ORDER BY id
    """
    t = servers.T.c
    ended = sa.func.coalesce(t.terminated_at, t.deleted_at)
    query = (
        sa.select(t.id, t.name, t.project_id, t.flavor, t.vm_state, t.launched_at, ended).order_by(t.id).limit(limit)
    )
    query = query.where(t.launched_at < end, ended.is_(None) | (ended > begin))
    if project is not None:
        query = query.where(t.project_id == project)
    with call.world.db.read() as tx:
        if marker is not None:
            if tx.execute(sa.select(t.id).where(t.id == marker)).first() is None:
                raise Invalid(f"marker [{marker[:60]}] not found")
            query = query.where(t.id > marker)
        rows = tx.execute(query).all()
    return [
        Lived(id, name, of, _FLAVOR.decode(flavor), "terminated" if over is not None else state, launched, over)
        for id, name, of, flavor, state, launched, over in rows
    ]


def _project(call: Call, id: str, lived: list[Lived], begin: float, end: float, *, detailed: bool) -> dict[str, Any]:
    hours = [(min(end, s.end or end) - max(begin, s.start)) / 3600 for s in lived]
    used = list(zip(lived, hours, strict=True))
    shown: dict[str, Any] = {
        "tenant_id": id,
        "start": iso_us(begin),
        "stop": iso_us(end),
        "total_hours": sum(hours),
        "total_vcpus_usage": sum(s.flavor.vcpus * h for s, h in used),
        "total_memory_mb_usage": sum(s.flavor.memory_mb * h for s, h in used),
        "total_local_gb_usage": sum(_disk_gb(s) * h for s, h in used),
    }
    return shown | ({"server_usages": [_server(call, s, h) for s, h in used]} if detailed else {})


def _server(call: Call, s: Lived, hours: float) -> dict[str, Any]:
    return {
        "instance_id": s.id,
        "name": s.name,
        "tenant_id": s.project_id,
        "flavor": s.flavor.name,
        "hours": hours,
        "vcpus": s.flavor.vcpus,
        "memory_mb": s.flavor.memory_mb,
        "local_gb": _disk_gb(s),
        "started_at": iso_us(s.start),
        "ended_at": iso_us(s.end),
        "state": s.state,
        "uptime": max(0, int((s.end or call.world.clock.now()) - s.start)),
    }


def _disk_gb(s: Lived) -> int:
    return s.flavor.disk_gb + s.flavor.ephemeral_gb


def _moment(said: list[str], now: float) -> float:
    if not said:
        return now
    try:
        at = parsed(said[-1].replace(" ", "+") if "T" in said[-1] else said[-1])
    except (ValueError, OverflowError):
        raise Invalid("Datetime is in invalid format") from None
    return min(max(at, 0.0), 4e9)


_FLAVOR = msgspec.json.Decoder(Flavor)
