"""What the API itself tells others: of flavors, key pairs, aggregates, groups, services, and a server's new name."""

from collections.abc import Callable
from typing import Any

from kilonova.kit.db import Tx
from kilonova.kit.routes import Call
from kilonova.model import notices as words
from kilonova.model.notices import API, Who
from kilonova.model.server import Server
from kilonova.store import hosts
from kilonova.store.notices import Outbox

Payload = Callable[[], dict[str, Any]]


def told(call: Call, tx: Tx, *events: str, of: Payload, binary: str = API, host: str | None = None) -> None:
    """In the transaction of what is told; `of` is only asked where somebody wants to know."""
    outbox: Outbox | None = call.world.outbox
    if outbox is not None and outbox.on:
        for event in events:
            outbox.put(tx, event, binary, of(), call.world.clock.now(), host)


def updated(call: Call, tx: Tx, before: Server, server: Server) -> None:
    outbox: Outbox | None = call.world.outbox
    if outbox is not None and outbox.on:
        who = Who(call.context.user_id, call.context.project_id or "", call.request_id)
        outbox.updated(tx, before, server, who, call.world.clock.now())


def aggregate(a: hosts.Aggregate) -> dict[str, Any]:
    return words.aggregate(a.id, a.uuid, a.name, a.hosts, a.metadata)
