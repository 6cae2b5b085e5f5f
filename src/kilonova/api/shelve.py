"""Shelve, offload, unshelve: a server that nobody needs for a while takes no room, and comes back where there is some."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, field

from kilonova.api.allowance import allowance_of
from kilonova.api.bodies import Name
from kilonova.api.capture import begun, new_image
from kilonova.api.refusals import without_tpm
from kilonova.api.registry import R, World, cause, owner, the_server, unlocked
from kilonova.contracts.jobs import Offload, Shelve, Unshelve
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType, lift, since, was
from kilonova.kit.workflow import start
from kilonova.model import capture
from kilonova.model.server import Server
from kilonova.model.states import VERBS, VM
from kilonova.store import quotas, servers, shares

PATH = "/v2.1/servers/{id}/action"


@R.post(PATH, action="shelve", ok=202, body=Any, policy="os_compute_api:os-shelve:shelve", late=True)
def shelve(call: Call, id: str) -> None:
    """Where its root disk is a volume there is nothing to copy, and nothing to keep a place for."""
    world: World = call.world
    with world.db.read() as tx:
        before = the_server(call, tx, id)
        shares.unshared(tx, before, VERBS["shelve"])
    without_tpm(before, "shelve")
    unlocked(call, before)
    servers.check(before, VERBS["shelve"])
    run = world.ids.uuid()
    image_id = None if before.volume_backed else new_image(call, before, f"{before.name[:247]}-shelved", run=run)

    def record(tx: Tx) -> None:
        now = world.clock.now()
        server = servers.begin(tx, id, VERBS["shelve"], now)
        shares.unshared(tx, server, VERBS["shelve"])  # somebody may have given it one meanwhile
        at_once = image_id is None or world.config.compute.shelved_offload_time_s == 0
        job = Shelve(server, image_id, capture.disk_format(server), at_once)
        start(tx, "shelve", job, id=run, subject=id, now=now, cause=cause(call, "shelve"))

    begun(call, image_id, record)
    world.wake(run)


@R.post(PATH, action="shelveOffload", ok=202, body=Any, policy="os_compute_api:os-shelve:shelve_offload", late=True)
def offload(call: Call, id: str) -> None:
    world: World = call.world

    def record(tx: Tx) -> str:
        unlocked(call, the_server(call, tx, id))
        now = world.clock.now()
        job = Offload(servers.begin(tx, id, VERBS["offload"], now))
        return start(tx, "offload", job, id=world.ids.uuid(), subject=id, now=now, cause=cause(call, "shelveOffload"))

    world.wake(world.db.run(record))


Zone = Annotated[str, Meta(max_length=255)]


class UnshelveWish(msgspec.Struct, forbid_unknown_fields=True):
    """A zone that is not said: the one that it is pinned to, if any. null: it is pinned to none from now on."""

    zone: Annotated[Zone | None | UnsetType, was(Name | UnsetType, until="2.90")] = field(
        default=UNSET, name="availability_zone"
    )
    host: Annotated[str | UnsetType, since("2.91")] = UNSET


@R.post(PATH, action="unshelve", ok=202, body=Annotated[UnshelveWish | None, was(Any, until="2.76")],
        policy="os_compute_api:os-shelve:unshelve", late=True)  # fmt: skip
def unshelve(call: Call, id: str) -> None:
    world: World = call.world
    said = isinstance(call.body, msgspec.Struct)  # until 2.76 anything may be there, and says nothing
    wish: UnshelveWish = lift(call.body, UnshelveWish) if said else UnshelveWish()
    if said and call.version <= 90 and wish.zone is UNSET:
        raise Invalid(
            "Invalid input for field/attribute unshelve. Value: {}. 'availability_zone' is a required property"
        )
    host = None if isinstance(wish.host, UnsetType) else wish.host
    most = allowance_of(call, id)

    def record(tx: Tx) -> str:
        before = the_server(call, tx, id)
        if host is not None:
            call.check(owner(before), "os_compute_api:os-shelve:unshelve_to_host")
        unlocked(call, before)
        now = world.clock.now()
        server = servers.begin(tx, id, VERBS["unshelve"], now)
        if server.host is None:
            quotas.claim_room(tx, most, server)
        zone = _zone(call, before, wish, host)
        if zone != server.availability_zone:
            servers.change(tx, id, now, availability_zone=zone)
            server = msgspec.structs.replace(server, availability_zone=zone)
        job = Unshelve(server, host)
        return start(tx, "unshelve", job, id=world.ids.uuid(), subject=id, now=now, cause=cause(call, "unshelve"))

    world.wake(world.db.run(record))


def _zone(call: Call, server: Server, wish: UnshelveWish, host: str | None) -> str | None:
    """What it is pinned to from now on. Raises Conflict where nothing may be said or host and zone disagree, Invalid
    where there is no such host or zone."""
    zone = server.availability_zone if isinstance(wish.zone, UnsetType) else wish.zone
    if (host is not None or wish.zone is not UNSET) and server.vm_state != VM.shelved_offloaded:
        raise Conflict(
            f"Specifying an availability zone or a host when unshelving server '{server.id}' with status "
            f"'{server.vm_state}' is not supported. The server status must be SHELVED_OFFLOADED."
        )
    if wish.zone is not UNSET and zone is not None and zone not in call.world.hosts.zones():
        raise Invalid(f"The requested availability zone is not available: {zone[:80]}")
    if host is not None:
        if host not in call.world.hosts:
            raise Invalid(f"Compute host {host[:80]} could not be found.")
        if zone is not None and call.world.hosts.zone(host) != zone:
            raise Conflict(f'Host "{host}" is not in the availability zone "{zone}".')
    return zone
