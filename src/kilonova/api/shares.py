"""Shares of servers (2.97). This cloud has no shared file system service: nothing can be attached, and nothing is."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kilonova.api.bodies import Uuid
from kilonova.api.registry import R, known_server
from kilonova.kit.errors import Conflict, Forbidden, NotFound
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType
from kilonova.model.server import Server
from kilonova.model.states import VM

PLACE, RULE = "/v2.1/servers/{server_id}/shares", "os_compute_api:os-server-shares"


class New(msgspec.Struct, forbid_unknown_fields=True):
    share_id: Uuid
    tag: Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9-]*$")] | UnsetType = UNSET


class Body(msgspec.Struct, forbid_unknown_fields=True):
    share: New


@R.get(PLACE, versions="2.97-", strict="2.97", policy=f"{RULE}:index", late=True)
def index(call: Call, server_id: str) -> dict[str, Any]:
    _server(call, server_id)
    return {"shares": []}


@R.get(PLACE + "/{id}", versions="2.97-", strict="2.97", policy=f"{RULE}:show", late=True)
def show(call: Call, server_id: str, id: str) -> None:
    _server(call, server_id)
    raise NotFound(f"Share {id[:60]} is not attached to instance {server_id}.")


@R.post(PLACE, versions="2.97-", body=Body, ok=201, policy=f"{RULE}:create", late=True)
def create(call: Call, server_id: str) -> None:
    _resting(_server(call, server_id), "attach_share", VM.stopped)
    raise Forbidden("This cloud has no shared file system service.")


@R.delete(PLACE + "/{id}", versions="2.97-", policy=f"{RULE}:delete", late=True)
def delete(call: Call, server_id: str, id: str) -> None:
    _resting(_server(call, server_id), "detach_share", VM.stopped, VM.error)
    raise NotFound(f"Share {id[:60]} is not attached to instance {server_id}.")


def _server(call: Call, id: str) -> Server:
    with call.world.db.read() as tx:
        return known_server(call, tx, id)


def _resting(server: Server, op: str, *states: VM) -> None:
    if server.vm_state not in states:
        raise Conflict(f"Cannot '{op}' instance {server.id} while it is in vm_state {server.vm_state}")
