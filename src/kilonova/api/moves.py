"""What moves a server: resize and what follows it, cold and live migration, evacuation. One claim, one run, 202."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, field

from kilonova.api.allowance import allowance, allowance_of
from kilonova.api.bodies import Boolish, DiskConfig, HostName, Yes, truth
from kilonova.api.boot_image import GIB
from kilonova.api.registry import R, World, cause, the_server, unlocked
from kilonova.api.topology import made_of
from kilonova.contracts.jobs import Evacuate, LiveMigrate, Resize, Settle
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType, only, required, until, was
from kilonova.kit.workflow import signal, start
from kilonova.model.flavor import Flavor
from kilonova.model.server import Server
from kilonova.model.states import VERBS, VM, PowerState
from kilonova.store import catalog, migrations, quotas, servers, shares
from kilonova.store.migrations import Kind, Status

PATH = "/v2.1/servers/{id}/action"
DOWN = "Service is unavailable at this time."


# ---- resize and cold migration


class ResizeWish(msgspec.Struct, forbid_unknown_fields=True):
    flavor_ref: Annotated[str, Meta(min_length=1)] | int = field(name="flavorRef")
    disk_config: DiskConfig | UnsetType = field(default=UNSET, name="OS-DCF:diskConfig")


@R.post(PATH, action="resize", ok=202, body=ResizeWish, policy="os_compute_api:servers:resize", late=True)
def resize(call: Call, id: str) -> None:
    wish: ResizeWish = call.body
    allowance_of(call, id)  # to have been asked, for within a transaction nobody is waited for

    def record(tx: Tx) -> str:
        before = the_server(call, tx, id)
        server = _taken(call, tx, before, "resize")
        flavor = _new_flavor(call, tx, server, str(wish.flavor_ref))
        if not isinstance(wish.disk_config, UnsetType):
            servers.change(tx, id, call.world.clock.now(), disk_config=wish.disk_config)
        same = bool(call.world.config.compute.allow_resize_to_same_host)
        return _leave(call, tx, server, "resize", Kind.resize, flavor, same_host=same)

    call.world.wake(call.world.db.run(record))


def _new_flavor(call: Call, tx: Tx, server: Server, ref: str) -> Flavor:
    """One that this server may have. Raises Invalid."""
    old, image = server.flavor, server.image
    try:
        flavor = catalog.flavor(tx, ref)
    except NotFound:
        flavor = None
    hidden = flavor is None or flavor.disabled or not (flavor.is_public or _may_use(call, tx, flavor))
    if flavor is None or hidden:
        raise Invalid(f"Flavor {ref} could not be found.")
    if flavor.id == old.id:
        raise Invalid("When resizing, instances must change flavor!")
    local = not server.volume_backed
    if local and not flavor.disk_gb and old.disk_gb:
        raise Invalid("Invalid flavor: Resize to zero disk flavor is not allowed.")
    if (local and flavor.disk_gb < old.disk_gb) or flavor.ephemeral_gb < old.ephemeral_gb:
        raise Invalid("Flavor's disk is smaller than the disk of the server, which cannot shrink.")
    if image.min_ram_mb > flavor.memory_mb:
        raise Invalid("Flavor's memory is too small for requested image.")
    if local and flavor.disk_gb and image.min_disk_gb > flavor.disk_gb:
        raise Invalid(
            "Flavor's disk is smaller than the minimum size specified in image metadata. "
            f"Flavor disk is {flavor.disk_gb * GIB} bytes, minimum size is {image.min_disk_gb * GIB} bytes."
        )
    return made_of(call.world.config, flavor, image)


def _may_use(call: Call, tx: Tx, flavor: Flavor) -> bool:
    return call.context.is_admin or call.context.project_id in catalog.flavor_projects(tx, flavor.id)


class MigrateWish(msgspec.Struct, forbid_unknown_fields=True):
    host: HostName | None = None


@R.post(
    PATH,
    action="migrate",
    ok=202,
    body=Annotated[MigrateWish | None, was(Any, until="2.55")],
    policy="os_compute_api:os-migrate-server:migrate",
    late=True,
)
def migrate(call: Call, id: str) -> None:
    host = call.body.host if isinstance(call.body, MigrateWish) else None
    rule = "os_compute_api:os-migrate-server:migrate" + (":host" if host else "")

    def record(tx: Tx) -> str:
        before = the_server(call, tx, id, rule=rule)
        server = _taken(call, tx, before, "migrate")
        _known_and_other(call, server, host)
        return _leave(call, tx, server, "migrate", Kind.migration, server.flavor, host=host)

    call.world.wake(call.world.db.run(record))


def _taken(call: Call, tx: Tx, before: Server, verb: str) -> Server:
    """Lock, state, shares, and whether its host can let it go. Raises Conflict."""
    unlocked(call, before)
    server = servers.begin(tx, before.id, VERBS[verb], call.world.clock.now())
    shares.unshared(tx, server, VERBS[verb])
    if not call.world.hosts.up(server.host):
        raise Conflict(DOWN, why=f"{server.host} is down")
    return server


def _leave(
    call: Call,
    tx: Tx,
    server: Server,
    verb: str,
    kind: Kind,
    flavor: Flavor,
    *,
    host: str | None = None,
    same_host: bool = False,
) -> str:
    """Counted and begun in the transaction that took it. The larger of both flavors counts until it is decided."""
    world: World = call.world
    now, old = world.clock.now(), server.flavor
    more = flavor.vcpus - old.vcpus, flavor.memory_mb - old.memory_mb
    if flavor != old:
        quotas.claim_more(tx, allowance(call, server.project_id), server, flavor)
    if max(more) > 0:
        size = servers.sized(flavor, old)
        servers.change(tx, server.id, None, vcpus=size["vcpus"], memory_mb=size["memory_mb"])
    was = str(server.vm_state)  # as it was taken: what was read before may be old
    uuid = migrations.begin(
        tx, server, kind, Status.pre_migrating, uuid=world.ids.uuid(), now=now, was=was, flavor=flavor
    )
    job = Resize(server, was, uuid, flavor, host, same_host)
    return start(tx, "resize", job, id=world.ids.uuid(), subject=server.id, now=now, cause=cause(call, verb))


def _known_and_other(call: Call, server: Server, host: str | None) -> None:
    if host is None:
        return
    if host not in call.world.hosts:
        raise Invalid(f"Compute host {host} could not be found.")
    if host == server.host:
        raise Invalid(f"Unable to migrate instance ({server.id}) to current host ({host}).")


# ---- while it runs


class LiveWish(msgspec.Struct, forbid_unknown_fields=True):
    host: HostName | None
    block_migration: Annotated[bool | Literal["auto"] | Yes, was(Boolish, until="2.24")]
    disk_over_commit: Annotated[Boolish, until("2.24"), required(since="2.1")] = False
    force: Annotated[Boolish, only("2.30-2.67")] = False


@R.post(
    PATH,
    action="os-migrateLive",
    ok=202,
    body=LiveWish,
    policy="os_compute_api:os-migrate-server:migrate_live",
    late=True,
)
def migrate_live(call: Call, id: str) -> None:
    """Until 2.29 no rule is asked about a host that is named."""
    wish: LiveWish = call.body
    forced = truth(wish.force)
    if forced and not wish.host:
        raise Invalid("Can't force to a non-provided destination")
    rule = "os_compute_api:os-migrate-server:migrate_live" + (":host" if wish.host is not None else "")

    def record(tx: Tx) -> str:
        before = the_server(call, tx, id, rule=rule)
        unlocked(call, before)
        server = servers.begin(tx, id, VERBS["live_migrate"], call.world.clock.now())
        shares.unshared(tx, server, VERBS["live_migrate"])
        if server.power_state not in (PowerState.running, PowerState.paused):
            raise Conflict(f"Cannot 'os-migrateLive' instance {id} while it is in power_state {server.power_state}")
        _known_and_other(call, server, wish.host)
        if call.version < 34:
            for host in (server.host, wish.host):
                if host is not None and not call.world.hosts.up(host):
                    raise Invalid(f"Compute service of {host} is unavailable at this time.")
        return _go(call, tx, server, wish, forced or (bool(wish.host) and call.version < 30))

    call.world.wake(call.world.db.run(record))


def _go(call: Call, tx: Tx, server: Server, wish: LiveWish, forced: bool) -> str:
    world: World = call.world
    now, was_ = world.clock.now(), str(server.vm_state)
    uuid = migrations.begin(tx, server, Kind.live, Status.accepted, uuid=world.ids.uuid(), now=now, was=was_)
    block = None if wish.block_migration == "auto" else truth(wish.block_migration)
    most = world.config.compute.max_concurrent_live_migrations
    job = LiveMigrate(server, uuid, wish.host, forced, block, most)
    why = cause(call, VERBS["live_migrate"].action)
    return start(tx, "live_migrate", job, id=world.ids.uuid(), subject=server.id, now=now, cause=why)


# ---- from a host that is down


class EvacuateWish(msgspec.Struct, forbid_unknown_fields=True):
    host: HostName | UnsetType = UNSET
    shared: Annotated[Boolish, until("2.13"), required(since="2.1")] = field(default=False, name="onSharedStorage")
    admin_password: str | UnsetType = field(default=UNSET, name="adminPass")
    force: Annotated[Boolish, only("2.29-2.67")] = False


@R.post(PATH, action="evacuate", body=EvacuateWish, policy="os_compute_api:os-evacuate", late=True)
def evacuate(call: Call, id: str) -> Any:
    """It may overtake whatever runs, as a delete does: its host will not answer. Until 2.28 no rule is asked about a named host."""
    wish: EvacuateWish = call.body
    host = None if isinstance(wish.host, UnsetType) else wish.host
    if truth(wish.force) and host is None:
        raise Invalid("Can't force to a non-provided destination")
    password, shown = _password(call, wish)

    def record(tx: Tx) -> list[str]:
        before = the_server(call, tx, id)
        if host is not None and host not in call.world.hosts:
            raise NotFound(f"Compute host {host} could not be found.")
        if host is not None and host == before.host:
            raise Invalid("The target host can't be the same one.")
        server = servers.begin(tx, id, VERBS["evacuate"], call.world.clock.now())
        shares.unshared(tx, server, VERBS["evacuate"])
        if call.world.hosts.up(server.host):
            raise Invalid(f"Compute service of {server.host} is still in use.")
        forced = truth(wish.force) or (host is not None and call.version < 29)
        return _leave_behind(call, tx, server, host, forced, password)

    for run in call.world.db.run(record):
        call.world.wake(run)
    return shown


def _password(call: Call, wish: EvacuateWish) -> tuple[str, dict[str, str | None] | None]:
    """What it will be, and what the caller is told of it: from 2.14 on nothing."""
    given = None if isinstance(wish.admin_password, UnsetType) else wish.admin_password
    if truth(wish.shared) and given is not None:
        raise Invalid("admin password can't be changed on existing disk")
    api = call.world.config.api
    password = given or ("" if truth(wish.shared) else call.world.ids.password(api.password_length))
    tells = call.version < 14 and api.enable_instance_password
    return password, {"adminPass": password or None} if tells else None


def _leave_behind(call: Call, tx: Tx, server: Server, host: str | None, forced: bool, password: str) -> list[str]:
    world: World = call.world
    now, was_ = world.clock.now(), server.vm_state
    others = signal(tx, server.id, "abort")
    uuid = migrations.begin(tx, server, Kind.evacuation, Status.accepted, uuid=world.ids.uuid(), now=now, was=str(was_))
    stopped = was_ == VM.stopped or (call.version >= 95 and was_ != VM.error)
    job = Evacuate(server, str(was_), uuid, host, forced, stopped, password)
    why = cause(call, "evacuate")
    return [*others, start(tx, "evacuate", job, id=world.ids.uuid(), subject=server.id, now=now, cause=why)]


# ---- and the word that it waits for


def _settle(call: Call, id: str, verb: str, status: Status, check: Callable[[migrations.Migration], None]) -> None:
    world: World = call.world

    def record(tx: Tx) -> str:
        before = the_server(call, tx, id)
        unlocked(call, before)
        now = world.clock.now()
        server = servers.begin(tx, id, VERBS[verb], now)
        m = migrations.unfinished(tx, id)
        if m is None:
            raise Invalid("Instance has not been resized.")
        check(m)
        migrations.change(tx, m.uuid, now, status)
        job = Settle(server, m.uuid)
        return start(tx, verb, job, id=world.ids.uuid(), subject=id, now=now, cause=cause(call, VERBS[verb].action))

    world.wake(world.db.run(record))


@R.post(PATH, action="confirmResize", ok=204, body=Any, policy="os_compute_api:servers:confirm_resize", late=True)
def confirm(call: Call, id: str) -> None:
    def source_is_up(m: migrations.Migration) -> None:
        if not call.world.hosts.up(m.source):
            raise Conflict(DOWN, why=f"{m.source} is down")

    _settle(call, id, "confirm", Status.confirming, source_is_up)


@R.post(PATH, action="revertResize", ok=202, body=Any, policy="os_compute_api:servers:revert_resize", late=True)
def revert(call: Call, id: str) -> None:
    _settle(call, id, "revert", Status.reverting, lambda m: None)
