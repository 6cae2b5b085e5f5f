"""Shared file systems of servers (2.97): what they have of them, and how that comes and goes.

To attach is answered when the share is written down; the rest is a run.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kilonova.api.attach import reachable
from kilonova.api.bodies import Uuid, dashed
from kilonova.api.registry import R, World, cause, known_server
from kilonova.contracts.compute import AttachShare, DetachShare
from kilonova.contracts.jobs import AttachShare as AttachJob
from kilonova.contracts.jobs import DetachShare as DetachJob
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Forbidden, Invalid, NotFound, Unsupported
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType
from kilonova.kit.workflow import start
from kilonova.model.server import Server
from kilonova.model.shares import PROTOCOLS, Sharing, status
from kilonova.model.states import VERBS
from kilonova.store import hosts, servers, shares

PLACE, RULE = "/v2.1/servers/{server_id}/shares", "os_compute_api:os-server-shares"
VIRTIO_FS, SHARED_MEMORY = "COMPUTE_STORAGE_VIRTIO_FS", "COMPUTE_MEM_BACKING_FILE"


class New(msgspec.Struct, forbid_unknown_fields=True):
    share_id: Uuid
    tag: Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9-]*$")] | UnsetType = UNSET


class Body(msgspec.Struct, forbid_unknown_fields=True):
    share: New


@R.get(PLACE, versions="2.97-", strict="2.97", policy=f"{RULE}:index", late=True)
def index(call: Call, server_id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        server = known_server(call, tx, server_id)
        return {"shares": [_shown(s, server) for s in shares.of(tx, server_id)]}


@R.get(PLACE + "/{id}", versions="2.97-", strict="2.97", policy=f"{RULE}:show", late=True)
def show(call: Call, server_id: str, id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        server = known_server(call, tx, server_id)
        return {"share": _whole(call, _the_share(tx, server_id, id), server)}


def _the_share(tx: Tx, server_id: str, id: str) -> Sharing:
    found = next((s for s in shares.of(tx, server_id) if s.share_id == dashed(id)), None)
    if found is None:
        raise NotFound(f"Share {id[:60]} is not attached to instance {server_id}.")
    return found


def _shown(s: Sharing, server: Server) -> dict[str, Any]:
    return {"share_id": s.share_id, "status": status(s, server), "tag": s.tag}


def _whole(call: Call, s: Sharing, server: Server) -> dict[str, Any]:
    """Where its bytes are is the operator's to know."""
    more = {"uuid": s.uuid, "export_location": s.export} if call.context.is_admin else {}
    return _shown(s, server) | more


# ---- attach


@R.post(PLACE, versions="2.97-", body=Body, ok=201, policy=f"{RULE}:create", late=True)
def create(call: Call, server_id: str) -> dict[str, Any]:
    world: World = call.world
    wish: New = call.body.share
    with world.db.read() as tx:
        server = known_server(call, tx, server_id)
        servers.check(server, VERBS["attach_share"])
        _able(world, tx, server)
        known = shares.of(tx, server_id)
    share = _wanted(call, server, wish, known)

    def record(tx: Tx) -> str:
        now = world.clock.now()
        server = _free(tx, server_id, "attach_share")
        shares.add(tx, share)
        why = cause(call, "attach_share")
        job = AttachJob(server, share)
        return start(tx, "attach_share", job, id=world.ids.uuid(), subject=server_id, now=now, cause=why)

    world.wake(world.db.run(record))
    return {"share": _whole(call, share, server)}


def _free(tx: Tx, id: str, verb: str) -> Server:
    """The server, if it is in a state for this, and nobody moves it meanwhile. Raises Conflict.

    It is not claimed: whatever is being done to it goes on, and who does it is its owner.
    """
    server = servers.held(tx, id)
    servers.check(server, VERBS[verb])
    return server


def _able(world: World, tx: Tx, server: Server) -> None:
    """Can its host, and can the server's memory be seen by who serves the files? Raises Forbidden, Conflict."""
    try:
        reachable(world, server, AttachShare.__name__)
    except Unsupported:
        raise Forbidden("Feature not supported until computes have been upgraded.") from None
    found = hosts.nodes(tx, host=server.host)
    traits = set(found[0].facts.traits) if found else set()
    if VIRTIO_FS not in traits:
        raise Forbidden("Feature not supported: the host of this server cannot hand on shared file systems.")
    if SHARED_MEMORY not in traits and not server.flavor.extra_specs.get("hw:mem_page_size"):
        raise Forbidden("Feature not supported: the server needs memory of huge pages, or its host memory of files.")


def _wanted(call: Call, server: Server, wish: New, known: list[Sharing]) -> Sharing:
    """What is to be attached. Raises NotFound, Conflict, Unavailable."""
    world: World = call.world
    service, id = world.neighbours.share, dashed(wish.share_id)
    if not service.there:
        raise Forbidden("This cloud has no shared file system service.")
    tag = id if isinstance(wish.tag, UnsetType) else wish.tag
    shares.other(server.id, known, id, tag)
    try:
        found = service.show(id, call.context.token)
        export = service.export(id) if found.status == "available" else None
    except (NotFound, Invalid):
        raise NotFound(f"Share {id} could not be found.") from None
    if found.status != "available":
        raise Conflict(f"Share {id} is {found.status}: it must be available to be attached.")
    if export is None:
        raise Conflict(f"Share {id} has no export location.")
    if (proto := found.proto.upper()) not in PROTOCOLS:
        raise Conflict(f"Share protocol {found.proto[:20]} is not supported.")
    who = ("cephx", world.config.share.ceph_user) if proto == "CEPHFS" else ("", "")
    now = world.clock.now()
    return Sharing(world.ids.uuid(), server.id, id, tag, export, proto, *who, at=now)


# ---- detach


@R.delete(PLACE + "/{id}", versions="2.97-", policy=f"{RULE}:delete", late=True)
def delete(call: Call, server_id: str, id: str) -> None:
    world: World = call.world

    def record(tx: Tx) -> str:
        now = world.clock.now()
        known_server(call, tx, server_id)
        server = _free(tx, server_id, "detach_share")
        share = _the_share(tx, server_id, id)
        reachable(world, server, DetachShare.__name__)
        was = shares.leave(tx, share.uuid)
        if was is None:
            raise Conflict(f"Share {share.share_id} is {status(share, server)}: it cannot be detached now.")
        job, why = DetachJob(server, share, was=was), cause(call, "detach_share")
        return start(tx, "detach_share", job, id=world.ids.uuid(), subject=server_id, now=now, cause=why)

    world.wake(world.db.run(record))
