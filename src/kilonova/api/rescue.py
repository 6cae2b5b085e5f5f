"""For a guest in need: rescue and unrescue, a new password, a crash dump, network facts; how it is doing, how it is laid out."""

from typing import Any

import msgspec
from msgspec import field

from kilonova.api import boot_image
from kilonova.api.bodies import Uuid
from kilonova.api.refusals import without_tpm
from kilonova.api.registry import R, World, cause, the_server, unlocked
from kilonova.contracts.compute import Diagnose, Stats
from kilonova.contracts.jobs import CrashDump, Password, Readdress, Rescue, Unrescue
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound, Unsupported
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType
from kilonova.kit.workflow import start
from kilonova.model import rescue as model
from kilonova.model.server import Image, Server
from kilonova.model.states import VERBS
from kilonova.store import hosts, placement, servers

PATH = "/v2.1/servers/{id}/action"
WITH_VOLUMES = "COMPUTE_RESCUE_BFV"


# ---- rescue


class RescueWish(msgspec.Struct, forbid_unknown_fields=True):
    admin_password: str | UnsetType = field(default=UNSET, name="adminPass")
    image_ref: Uuid | UnsetType = field(default=UNSET, name="rescue_image_ref")


@R.post(PATH, action="rescue", body=RescueWish | None, policy="os_compute_api:os-rescue", late=True)
def rescue(call: Call, id: str) -> dict[str, str]:
    world: World = call.world
    wish: RescueWish = call.body or RescueWish()
    with world.db.read() as tx:
        before = the_server(call, tx, id)
        able = before.volume_backed and _bears(tx, before, WITH_VOLUMES)
    without_tpm(before, "rescue")
    unlocked(call, before)
    servers.check(before, VERBS["rescue"])
    image = _image(call, before, None if isinstance(wish.image_ref, UnsetType) else wish.image_ref)
    if before.volume_backed:
        _with_volumes(call, before, image, able)
    generated = world.ids.password(world.config.api.password_length)
    password = generated if isinstance(wish.admin_password, UnsetType) else wish.admin_password

    def record(tx: Tx) -> str:
        now = world.clock.now()
        server = servers.begin(tx, id, VERBS["rescue"], now)
        disk, stable = model.disk_of(server, image)
        job = Rescue(server, disk, stable, password)
        return start(tx, "rescue", job, id=world.ids.uuid(), subject=id, now=now, cause=cause(call, "rescue"))

    world.wake(world.db.run(record))
    return {"adminPass": password} if world.config.api.enable_instance_password else {}


def _image(call: Call, server: Server, ref: str | None) -> Image:
    """The one that was named, or is configured, or that it was first made of, or that it is made of. Raises Invalid."""
    first = server.image.properties.get("base_image_ref")
    last: Invalid | None = None
    usual = (call.world.config.compute.rescue_image, first, server.image.id)
    for one in (ref,) if ref else usual:
        if one:
            try:
                image = boot_image.image_of(info := boot_image.shown(call, one))
            except Invalid as e:
                last = e
                continue
            asked = msgspec.structs.replace(image, properties=info.properties)
            if why := model.trouble(asked):
                raise Invalid(f"Requested rescue image '{one}' is not supported: {why}.")
            return image
    raise Invalid(f"Requested rescue image '{ref or server.image.id}' is not supported.", why=last.said if last else "")


def _with_volumes(call: Call, server: Server, image: Image, able: bool) -> None:
    """A root volume cannot be put second: only where all disks stay in their places. Raises Invalid."""
    said = f"Instance {server.id} cannot be rescued: "
    if call.version < 87:
        raise Invalid(said + "Cannot rescue a volume-backed instance")
    if not all(name in image.properties for name in model.MEANT):
        raise Invalid(
            said + "Cannot rescue a volume-backed instance without an image that has hw_rescue_bus and hw_rescue_device"
        )
    if not able:
        raise Invalid(said + f"Host {server.host} does not support rescuing a volume-backed instance")  # fmt: skip


def _bears(tx: Tx, server: Server, trait: str) -> bool:
    return any(placement.bears(tx, n.uuid, trait) for n in hosts.nodes(tx, host=server.host))


@R.post(PATH, action="unrescue", ok=202, body=Any, policy="os_compute_api:os-unrescue", late=True)
def unrescue(call: Call, id: str) -> None:
    world: World = call.world

    def record(tx: Tx) -> str:
        unlocked(call, the_server(call, tx, id))
        now = world.clock.now()
        job = Unrescue(servers.begin(tx, id, VERBS["unrescue"], now))
        return start(tx, "unrescue", job, id=world.ids.uuid(), subject=id, now=now, cause=cause(call, "unrescue"))

    world.wake(world.db.run(record))


# ---- what a running guest is told


class PasswordWish(msgspec.Struct, forbid_unknown_fields=True):
    admin_password: str = field(name="adminPass")


@R.post(PATH, action="changePassword", ok=202, body=PasswordWish, policy="os_compute_api:os-admin-password", late=True)
def change_password(call: Call, id: str) -> None:
    world: World = call.world

    def record(tx: Tx) -> str:
        before = the_server(call, tx, id)
        if before.locked and not call.context.is_admin:
            raise Conflict(f"Instance {id} is in an invalid state for 'changePassword'")
        now = world.clock.now()
        job = Password(servers.begin(tx, id, VERBS["password"], now), call.body.admin_password)
        who = cause(call, "changePassword")
        return start(tx, "change_password", job, id=world.ids.uuid(), subject=id, now=now, cause=who)

    world.wake(world.db.run(record))


@R.post(PATH, action="trigger_crash_dump", ok=202, body=type(None), versions="2.17-",
        policy="os_compute_api:servers:trigger_crash_dump", late=True)  # fmt: skip
def trigger_crash_dump(call: Call, id: str) -> None:
    """The server is not busy with it: to its guest it comes like any other accident."""
    world: World = call.world

    def record(tx: Tx) -> str:
        server = the_server(call, tx, id)
        unlocked(call, server)
        servers.check(server, VERBS["crash_dump"])
        now, who = world.clock.now(), cause(call, "trigger_crash_dump")
        return start(tx, "crash_dump", CrashDump(server), id=world.ids.uuid(), subject=id, now=now, cause=who)

    world.wake(world.db.run(record))


@R.post(PATH, action="injectNetworkInfo", ok=202, body=Any,
        policy="os_compute_api:os-admin-actions:inject_network_info", late=True)  # fmt: skip
def inject_network_info(call: Call, id: str) -> None:
    """What the guest can ask of its network is asked of the network service anew. No user's action, as it never was."""
    world: World = call.world

    def record(tx: Tx) -> str:
        unlocked(call, the_server(call, tx, id))
        now = world.clock.now()
        return start(tx, "readdress", Readdress(id), id=world.ids.uuid(), subject=id, now=now)

    world.wake(world.db.run(record))


# ---- how it is doing

STATES = {"nostate": "pending"}  # the others are called alike


@R.get("/v2.1/servers/{server_id}/diagnostics", policy="os_compute_api:os-server-diagnostics", late=True)
def diagnostics(call: Call, server_id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        server = the_server(call, tx, server_id)
    if not server.host:
        raise Conflict(f"Instance {server_id} is not ready")
    try:
        stats: Stats = call.world.ask(server.host, Diagnose(server=server_id), 15.0)
    except NotFound:
        raise Conflict(f"Instance {server_id} is not ready") from None
    except Unsupported as e:
        raise Invalid(e.said) from None
    return _standard(stats) if call.version >= 48 else _free(stats)


def _standard(s: Stats) -> dict[str, Any]:
    return {
        "state": STATES.get(s.state, s.state),
        "driver": "libvirt",  # the name by which clients know hypervisors of our kind
        "hypervisor": s.hypervisor,
        "hypervisor_os": s.hypervisor_os,
        "uptime": s.uptime,
        "config_drive": s.config_drive,
        "num_cpus": len(s.cpus),
        "num_nics": len(s.nics),
        "num_disks": len(s.disks),
        "memory_details": {"maximum": s.memory_maximum, "used": s.memory_used},
        "cpu_details": [msgspec.to_builtins(c) for c in s.cpus],
        "disk_details": [_without_device(d) for d in s.disks],
        "nic_details": [_without_device(n) for n in s.nics],
    }


def _without_device(told: msgspec.Struct) -> dict[str, Any]:
    return {k: v for k, v in msgspec.to_builtins(told).items() if k != "device"}


def _free(s: Stats) -> dict[str, Any]:
    """As it was before there was a standard: a number a line."""
    mib = {"memory": s.memory_maximum, "memory-actual": s.memory_maximum, "memory-rss": s.memory_used}
    shown: dict[str, Any] = {name: None if n is None else n * 1024 for name, n in mib.items()}
    shown |= {f"cpu{c.id}_time": c.time for c in s.cpus}
    for d in s.disks:
        counts = {"read": d.read_bytes, "read_req": d.read_requests, "write": d.write_bytes,
                  "write_req": d.write_requests, "errors": d.errors_count}  # fmt: skip
        shown |= {f"{d.device}_{name}": n for name, n in counts.items()}
    for nic in s.nics:
        counts = {"rx": nic.rx_octets, "rx_packets": nic.rx_packets, "rx_errors": nic.rx_errors, "rx_drop": nic.rx_drop,
                  "tx": nic.tx_octets, "tx_packets": nic.tx_packets, "tx_errors": nic.tx_errors, "tx_drop": nic.tx_drop}  # fmt: skip
        shown |= {f"{nic.device}_{name}": n for name, n in counts.items()}
    return shown
