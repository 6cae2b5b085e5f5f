"""The one registry of the Compute API, what its handlers work with, and the few things they all ask."""

import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from kilonova.api.host_book import HostBook
from kilonova.clients import Neighbours
from kilonova.kit.bus import Call as Question
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call, Routes
from kilonova.kit.workflow import Cause
from kilonova.model import options
from kilonova.model.server import Server
from kilonova.store import servers
from kilonova.store.notices import Outbox

R = Routes("compute", strict="2.102")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class World:
    """What the API works with. `wake(run)` hurries a run that was committed; `ask` puts a question to a host
    and waits for its answer (`Unavailable` when none comes in `timeout_s`).  `ended(run, timeout_s)` waits until a run
    is over: is it?"""

    db: Db
    clock: Clock
    ids: Ids
    config: options.Config
    neighbours: Neighbours
    hosts: HostBook
    wake: Callable[[str], None]
    ask: Callable[[str, Question[Any], float], Any]
    ended: Callable[[str, float], bool]
    outbox: Outbox | None = None
    console_url: str = "http://127.0.0.1:6080"  # of the proxy for consoles


def cause(call: Call, action: str) -> Cause:
    """Who asked for a run, and what he calls it: the instance action."""
    c = call.context
    return Cause(action=action, request_id=call.request_id, user_id=c.user_id, project_id=c.project_id or "")


def owner(server: Server) -> dict[str, Any]:
    """Policy's target."""
    return {"project_id": server.project_id, "user_id": server.user_id}


def the_server(call: Call, tx: Tx, id: str, *, dead: bool = False, rule: str | None = None) -> Server:
    """The server a path names, and policy asked about it. Another project's does not exist, but for admins."""
    server = servers.get(tx, id)
    if (server.deleted_at is not None and not dead) or not (
        call.context.is_admin or server.project_id == call.context.project_id
    ):
        raise NotFound(f"Instance {id} could not be found.")
    call.check(owner(server), rule)
    return server


def known_server(call: Call, tx: Tx, id: str) -> Server:
    """For tags and shares another project's server is forbidden, not absent (errors.md, section 9)."""
    server = servers.get(tx, id)
    if server.deleted_at is not None:
        raise NotFound(f"Instance {id} could not be found.")
    call.check(owner(server))
    return server


def unlocked(call: Call, server: Server) -> None:
    """Raises Conflict where the server is locked, and not for an administrator."""
    if server.locked and not call.context.is_admin:
        raise Conflict(f"Instance {server.id} is locked")


# ---- links and pages


def link(call: Call, *path: str, version: bool = True) -> str:
    """A resource's own address: `/v2.1/servers/ID`, with the project where the caller wrote it."""
    return "/".join([f"{call.url}{'/v2.1' if version else ''}{call.project_in_url}", *path])


def links(call: Call, *path: str) -> list[dict[str, str]]:
    rest = f"{call.project_in_url}/{'/'.join(path)}"
    return [
        {"rel": "self", "href": f"{call.url}/v2.1{rest}"},
        {"rel": "bookmark", "href": f"{call.url}{rest}"},
    ]


def page_limit(call: Call, said: int | str | None) -> int:
    """How many rows a page has, by the caller's word and the operator's limit. Raises Invalid."""
    most: int = call.world.config.api.max_limit
    if said is None or said == "":
        return most
    try:
        limit = int(said)
    except ValueError:
        raise Invalid("limit param must be an integer") from None
    if limit < 0:
        raise Invalid("limit param must be positive")
    return min(limit, most)


def next_link(call: Call, marker: str, *path: str) -> list[dict[str, str]]:
    """The page after this one: the same query, in order of names, with another marker."""
    query = [(k, v) for k, v in urllib.parse.parse_qsl(call.raw_query, keep_blank_values=True) if k != "marker"]
    text = urllib.parse.urlencode(sorted([*query, ("marker", marker)]))
    return [{"rel": "next", "href": f"{link(call, *path)}?{text}"}]
