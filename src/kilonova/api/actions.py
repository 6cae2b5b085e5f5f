"""Instance actions and their events: views of the journal."""

from typing import Annotated, Any

import msgspec
from msgspec import field

from kilonova.api.bodies import Digits
from kilonova.api.registry import R, next_link, page_limit, the_server
from kilonova.kit import workflow
from kilonova.kit.clock import iso_us, parsed
from kilonova.kit.errors import Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.kit.versions import since
from kilonova.model.server import Server, host_id

EVENTS = "os_compute_api:os-instance-actions:events"
DETAILS = "os_compute_api:os-instance-actions:events:details"


class Query(msgspec.Struct):
    limit: Annotated[Digits | None, since("2.58")] = None
    marker: Annotated[str | None, since("2.58")] = None
    changes_since: Annotated[str | None, since("2.58")] = field(default=None, name="changes-since")
    changes_before: Annotated[str | None, since("2.66")] = field(default=None, name="changes-before")


@R.get("/v2.1/servers/{server_id}/os-instance-actions", query=Query, strict="2.58",
       policy="os_compute_api:os-instance-actions:list", late=True)  # fmt: skip
def index(call: Call, server_id: str) -> dict[str, Any]:
    q: Query = call.query
    limit = page_limit(call, q.limit)
    since_, before = _moment(q.changes_since, "changes-since"), _moment(q.changes_before, "changes-before")
    if since_ is not None and before is not None and since_ > before:
        raise Invalid("The value of changes-since must be less than or equal to changes-before.")
    with call.world.db.read() as tx:
        server = the_server(call, tx, server_id, dead=call.version >= 21)
        try:
            found = workflow.actions(
                tx, server_id, limit=limit if call.version >= 58 else None, marker=q.marker, since=since_, before=before
            )
        except NotFound:
            raise Invalid(f"marker [{q.marker}] not found") from None
    body: dict[str, Any] = {"instanceActions": [_action(call, server, a) for a in found]}
    if call.version >= 58 and found and len(found) == limit:
        body["links"] = next_link(call, found[-1].request_id, "servers", server_id, "os-instance-actions")
    return body


@R.get(
    "/v2.1/servers/{server_id}/os-instance-actions/{id}", policy="os_compute_api:os-instance-actions:show", late=True
)
def show(call: Call, server_id: str, id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        server = the_server(call, tx, server_id, dead=call.version >= 21)
        try:
            action = workflow.action(tx, server_id, id)
        except NotFound:
            raise NotFound(f"Action for request_id {id} on instance {server_id} not found") from None
        events = workflow.events(tx, action.run)
    target = {"project_id": server.project_id, "user_id": server.user_id}
    whole = call.may(EVENTS, target)
    shown = _action(call, server, action)
    if whole or call.version >= 51:
        shown["events"] = [
            _event(call, server, e, whole, call.version >= 84 and call.may(DETAILS, target)) for e in events
        ]
    return {"instanceAction": shown}


def _action(call: Call, server: Server, a: workflow.Action) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "action": a.action,
        "instance_uuid": server.id,
        "request_id": a.request_id,
        "user_id": a.user_id or None,
        "project_id": a.project_id or None,
        "start_time": iso_us(a.started),
        "message": "Error" if a.result == "Error" else None,
    }
    if call.version >= 58:
        shown["updated_at"] = iso_us(a.updated)
    return shown


def _event(call: Call, server: Server, e: workflow.Event, whole: bool, details: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "event": e.event,
        "start_time": iso_us(e.started),
        "finish_time": iso_us(e.finished),
        "result": e.result,
    }
    if whole:
        shown["traceback"] = None  # there is none: a fault is a sentence, and the log has the rest
    if call.version >= 62:
        shown["hostId"] = host_id(server.project_id, e.host)
        if whole:
            shown["host"] = e.host or ""
    if details:
        shown["details"] = (e.fault.detail or e.fault.said) if e.fault else None
    return shown


def _moment(text: str | None, name: str) -> float | None:
    try:
        return None if text is None else parsed(text.replace(" ", "+"))
    except ValueError:
        raise Invalid(
            f"Invalid input for query parameters {name}. Value: {text}. {text!r} is not a 'date-time'"
        ) from None
