"""What users write on their servers: metadata and tags; and what stands there to be read: addresses, the password."""

from types import NoneType
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from msgspec import Meta

from kilonova.api.allowance import allowance_of
from kilonova.api.bodies import Metadata, MetaKey, Tag
from kilonova.api.notices import updated
from kilonova.api.registry import R, World, known_server, link, the_server, unlocked
from kilonova.api.views import addresses_of
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call, Reply
from kilonova.model.server import Server
from kilonova.model.states import VM
from kilonova.store import guests, quotas, servers
from kilonova.store.quotas import exceeded

AT_REST = (VM.active, VM.paused, VM.suspended, VM.stopped)  # states.md, section 3: metadata and tags are written there
TAGS_MOST = 50
NEVER = "2.1000000"  # unknown names in the query are refused from then on


def writable(server: Server, doing: str) -> None:
    """Raises Conflict where the server is in no state to be written on."""
    if server.vm_state not in AT_REST:
        raise Conflict(f"Cannot '{doing}' instance {server.id} while it is in vm_state {server.vm_state}")


# ---- metadata

METADATA = "/v2.1/servers/{server_id}/metadata"


class MetadataBody(msgspec.Struct, forbid_unknown_fields=True):
    metadata: Metadata


class OneBody(msgspec.Struct, forbid_unknown_fields=True):
    meta: Annotated[dict[MetaKey, Annotated[str, Meta(max_length=255)]], Meta(min_length=1, max_length=1)]


@R.get(METADATA, policy="os_compute_api:server-metadata:index", late=True)
def metadata(call: Call, server_id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        return {"metadata": the_server(call, tx, server_id).metadata}


@R.post(METADATA, body=MetadataBody, policy="os_compute_api:server-metadata:create", late=True)
def add_metadata(call: Call, server_id: str) -> dict[str, Any]:
    """What is there stays, unless it is named here."""
    return {"metadata": _write(call, server_id, lambda known: known | call.body.metadata)}


@R.put(METADATA, body=MetadataBody, policy="os_compute_api:server-metadata:update_all", late=True)
def replace_metadata(call: Call, server_id: str) -> dict[str, Any]:
    return {"metadata": _write(call, server_id, lambda known: call.body.metadata)}


@R.get(METADATA + "/{id}", policy="os_compute_api:server-metadata:show", late=True)
def one_metadata(call: Call, server_id: str, id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        known = the_server(call, tx, server_id).metadata
    return {"meta": {id: _item(known, id)}}


@R.put(METADATA + "/{id}", body=OneBody, policy="os_compute_api:server-metadata:update", late=True)
def set_metadata(call: Call, server_id: str, id: str) -> dict[str, Any]:
    if id not in call.body.meta:
        with call.world.db.read() as tx:
            the_server(call, tx, server_id)
        raise Invalid("Request body and URI mismatch")
    _write(call, server_id, lambda known: known | call.body.meta)
    return {"meta": call.body.meta}


@R.delete(METADATA + "/{id}", ok=204, policy="os_compute_api:server-metadata:delete", late=True)
def delete_metadata(call: Call, server_id: str, id: str) -> None:
    def without(known: dict[str, str]) -> dict[str, str]:
        _item(known, id)
        return {k: v for k, v in known.items() if k != id}

    _write(call, server_id, without, "delete metadata")


def _item(known: dict[str, str], key: str) -> str:
    if key not in known:
        raise NotFound("Metadata item was not found")
    return known[key]


def _write(call: Call, id: str, change: Any, doing: str = "update metadata") -> dict[str, str]:
    """`change` makes the new items of those there are; in one transaction that nobody else writes into."""
    world: World = call.world
    whole = allowance_of(call, id)

    def record(tx: Tx) -> dict[str, str]:
        servers.held(tx, id)
        server = the_server(call, tx, id)
        items: dict[str, str] = change(server.metadata)
        unlocked(call, server)
        if server.launched_at is None and server.vm_state in AT_REST:
            raise Conflict(f"Instance {id} is in an invalid state for '{doing}'")
        writable(server, doing)
        most = quotas.limits(tx, whole, server.project_id, server.user_id)["metadata_items"]
        if len(items) > most >= 0 and len(items) > len(server.metadata):
            raise exceeded(whole, "metadata_items", len(items), 0, f"Maximum number of metadata items exceeds {most}")
        servers.change(tx, id, world.clock.now(), metadata=items)
        updated(call, tx, server, msgspec.structs.replace(server, metadata=items))
        return items

    return world.db.run(record)


# ---- tags

TAGS = "/v2.1/servers/{server_id}/tags"
SINCE = "2.26-"


class TagsBody(msgspec.Struct, forbid_unknown_fields=True):
    tags: Annotated[list[Tag], Meta(max_length=TAGS_MOST)]


@R.get(TAGS, versions=SINCE, strict=NEVER, policy="os_compute_api:os-server-tags:index", late=True)
def tags(call: Call, server_id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        return {"tags": known_server(call, tx, server_id).tags}


@R.put(TAGS, versions=SINCE, body=TagsBody, policy="os_compute_api:os-server-tags:update_all", late=True)
def replace_tags(call: Call, server_id: str) -> dict[str, Any]:
    return {"tags": _mark(call, server_id, lambda known: set(call.body.tags), "update tags")}


@R.delete(TAGS, versions=SINCE, ok=204, policy="os_compute_api:os-server-tags:delete_all", late=True)
def delete_tags(call: Call, server_id: str) -> None:
    _mark(call, server_id, lambda known: set(), "delete tags")


@R.get(TAGS + "/{id}", versions=SINCE, strict=NEVER, ok=204, policy="os_compute_api:os-server-tags:show", late=True)
def has_tag(call: Call, server_id: str, id: str) -> None:
    with call.world.db.read() as tx:
        if id not in known_server(call, tx, server_id).tags:
            raise NotFound(f"Server {server_id} has no tag '{id}'")


@R.put(TAGS + "/{id}", versions=SINCE, ok=201, body=NoneType, policy="os_compute_api:os-server-tags:update", late=True)
def add_tag(call: Call, server_id: str, id: str) -> Reply:
    """201 with its place where it is new, 204 where it was there."""
    if not 1 <= len(id) <= 60 or "," in id:
        raise Invalid(f"Tag '{id[:61]}' is invalid. It must be a non empty string without characters '/' and ','.")
    was_there = False

    def added(known: set[str]) -> set[str]:
        nonlocal was_there
        was_there = id in known
        if not was_there and len(known) >= TAGS_MOST:
            raise Invalid(f"The number of tags exceeded the per-server limit {TAGS_MOST}")
        return known | {id}

    _mark(call, server_id, added, "update tag")
    if was_there:
        return Reply(status=204)
    return Reply(status=201, headers={"Location": link(call, "servers", server_id, "tags", quote(id, safe=""))})


@R.delete(TAGS + "/{id}", versions=SINCE, ok=204, policy="os_compute_api:os-server-tags:delete", late=True)
def delete_tag(call: Call, server_id: str, id: str) -> None:
    def without(known: set[str]) -> set[str]:
        if id not in known:
            raise NotFound(f"Server {server_id} has no tag '{id}'")
        return known - {id}

    _mark(call, server_id, without, "delete tag")


def _mark(call: Call, id: str, change: Any, doing: str) -> list[str]:
    def record(tx: Tx) -> list[str]:
        servers.held(tx, id)
        server = known_server(call, tx, id)
        writable(server, doing)
        wanted = sorted(change(set(server.tags)))
        if wanted != server.tags:
            servers.change(tx, id, None, tags=wanted)
            updated(call, tx, server, msgspec.structs.replace(server, tags=wanted))
        return wanted

    found: list[str] = call.world.db.run(record)
    return found


# ---- addresses


@R.get("/v2.1/servers/{server_id}/ips", policy="os_compute_api:ips:index", late=True)
def addresses(call: Call, server_id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        return {"addresses": addresses_of(call, the_server(call, tx, server_id).plugs)}


@R.get("/v2.1/servers/{server_id}/ips/{id}", policy="os_compute_api:ips:show", late=True)
def addresses_on(call: Call, server_id: str, id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        known = addresses_of(call, the_server(call, tx, server_id).plugs)
    if id not in known:
        raise NotFound("Instance is not a member of specified network")
    return {id: known[id]}


# ---- the password that the guest left with the metadata service, sealed with the server's key

PASSWORD = "/v2.1/servers/{server_id}/os-server-password"


@R.get(PASSWORD, policy="os_compute_api:os-server-password:show", late=True)
def password(call: Call, server_id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        return {"password": guests.password(the_server(call, tx, server_id))}


@R.delete(PASSWORD, ok=204, policy="os_compute_api:os-server-password:clear", late=True)
def clear_password(call: Call, server_id: str) -> None:
    def record(tx: Tx) -> None:
        the_server(call, tx, server_id)
        guests.clear_password(tx, server_id)

    call.world.db.run(record)
