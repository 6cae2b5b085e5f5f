"""POST /servers: gather what was named, decide, and record rows, quota and runs in one transaction.

What cannot be known now (a host, a port) is the run's business; what can be refused now is refused now.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, field

from kilonova.api import boot_image, notices
from kilonova.api.allowance import allowance, at_most
from kilonova.api.bodies import (
    Base64,
    Boolish,
    Count,
    DiskConfig,
    HostName,
    Metadata,
    Name,
    Tag,
    Text255,
    Uuid,
    address,
    dashed,
    decoded,
    truth,
)
from kilonova.api.boot_image import UUID
from kilonova.api.devices import DeviceWish, OldDeviceWish, asked, fitting, of_image, seen
from kilonova.api.registry import R, World, cause, link, links
from kilonova.api.reserved import reserved
from kilonova.api.server_groups import hinted
from kilonova.api.topology import made_of
from kilonova.contracts.jobs import Build
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Forbidden, Invalid, NotFound
from kilonova.kit.routes import Call, Reply
from kilonova.kit.versions import only, required, since, until, was
from kilonova.kit.workflow import start
from kilonova.model import disks
from kilonova.model import notices as words
from kilonova.model.devices import Device
from kilonova.model.flavor import Flavor
from kilonova.model.machine import Keypair
from kilonova.model.server import Image, Server, Wanted
from kilonova.model.server_group import ServerGroup
from kilonova.model.states import Task
from kilonova.model.wants import amounts
from kilonova.store import block_devices, catalog, quotas, server_groups, servers

MORE_NETWORKS = "Multiple possible networks found, use a Network ID to be more specific."


class NetworkWish(msgspec.Struct, forbid_unknown_fields=True):
    fixed_ip: str | None = None
    port: Uuid | None = None
    uuid: Annotated[Uuid | None, was(str | None, until="2.36")] = None
    tag: Annotated[Tag | None, only("2.32-2.36", "2.42-")] = None


class Group(msgspec.Struct, forbid_unknown_fields=True):
    name: Name


class File(msgspec.Struct, forbid_unknown_fields=True):
    path: str
    contents: str


OneName = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9-._]*$")]
ShortName = Annotated[str, Meta(min_length=2, max_length=63, pattern=r"^[a-zA-Z0-9]+[a-zA-Z0-9-]*[a-zA-Z0-9]+$")]


class Wish(msgspec.Struct, forbid_unknown_fields=True):
    """What a new server shall be."""

    name: Name
    flavor_ref: Annotated[str, Meta(min_length=1)] | int = field(name="flavorRef")
    image_ref: str | None = field(default=None, name="imageRef")
    admin_password: str | None = field(default=None, name="adminPass")
    metadata: Metadata = {}
    networks: Annotated[
        list[NetworkWish] | Literal["auto", "none"] | None,
        was(list[NetworkWish] | None, until="2.36"),
        required(since="2.37"),
    ] = None
    disk_config: DiskConfig | None = field(default=None, name="OS-DCF:diskConfig")
    access_v4: str | None = field(default=None, name="accessIPv4")
    access_v6: str | None = field(default=None, name="accessIPv6")
    personality: Annotated[list[File], until("2.56")] = []
    availability_zone: Name | None = None
    old_devices: list[OldDeviceWish] | None = field(default=None, name="block_device_mapping")
    devices: list[DeviceWish] | None = field(default=None, name="block_device_mapping_v2")
    config_drive: Boolish = False
    key_name: Name | None = None
    min_count: Count = 1
    max_count: Count | None = None
    return_reservation_id: Boolish = False
    security_groups: list[Group] | None = None
    user_data: Base64 | None = None
    description: Annotated[Text255 | None, since("2.19")] = None
    tags: Annotated[list[Tag], since("2.52")] = []
    trusted_image_certificates: Annotated[list[str] | None, since("2.63")] = None
    host: Annotated[HostName | None, since("2.74")] = None
    hypervisor_hostname: Annotated[HostName | None, since("2.74")] = None
    hostname: Annotated[OneName | None, was(ShortName | None, until="2.93"), since("2.90")] = None


class Body(msgspec.Struct, forbid_unknown_fields=True):
    server: Wish
    hints: dict[str, Any] | None = field(default=None, name="os:scheduler_hints")
    old_hints: dict[str, Any] | None = field(default=None, name="OS-SCH-HNT:scheduler_hints")


@dataclass(frozen=True)
class Found:
    """What the wish's names stand for."""

    flavor: Flavor
    image: Image
    keypair: Keypair | None
    networks: list[Wanted] | Literal["auto", "none", ""]
    groups: list[str]
    zone: str | None
    host: str | None
    node: str | None
    forced: bool
    company: ServerGroup | None
    devices: list[Device]  # without uuids


@R.post("/v2.1/servers", body=Body, ok=202, policy="os_compute_api:servers:create")
def create(call: Call) -> Reply:
    wish: Wish = call.body.server
    hints = _hints(call.body.hints or call.body.old_hints or {})
    least, most = _counts(wish)
    _plain_checks(call, wish, most)
    found = _gather(call, wish, hints, most)
    _decide(call, wish, found)
    password = wish.admin_password or call.world.ids.password(call.world.config.api.password_length)
    with reserved(call, _wanted(call, found, least, most)) as devices:
        made = call.world.db.run(_record, call, wish, found, hints, least, most, password, devices)
    for _, run in made:
        call.world.wake(run)
    return _reply(call, wish, made[0][0], password)


def _reply(call: Call, wish: Wish, first: Server, password: str) -> Reply:
    if truth(wish.return_reservation_id):
        return Reply({"reservation_id": first.reservation_id})
    shown: dict[str, Any] = {
        "id": first.id,
        "links": links(call, "servers", first.id),
        "OS-DCF:diskConfig": first.disk_config,
        "security_groups": [
            {"name": n} for n in dict.fromkeys(g.name for g in wish.security_groups or [Group("default")])
        ],
    }
    if call.world.config.api.enable_instance_password:
        shown["adminPass"] = password
    return Reply({"server": shown}, headers={"Location": link(call, "servers", first.id)})


# ---- what the body alone tells


def _hints(said: dict[str, Any]) -> dict[str, msgspec.Raw]:
    """Hints are kept as they came; the known ones must be what they ought to be."""
    try:
        known = msgspec.convert(said, _Hints)
    except msgspec.ValidationError as e:
        raise Invalid(f"Invalid input for field/attribute os:scheduler_hints. {e}") from None
    for name in ("group", "different_host", "same_host"):
        for one in ids if isinstance(ids := getattr(known, name), list) else [ids]:
            if one is not None and not re.fullmatch(UUID, one):
                raise Invalid(
                    f"Invalid input for field/attribute {name}. Value: {one[:60]}. '{one[:60]}' is not a 'uuid'"
                )
    return {k: msgspec.Raw(msgspec.json.encode(v)) for k, v in said.items()}


class _Hints(msgspec.Struct):
    """Not `Uuid | list[Uuid]`: msgspec 0.22 frees the pattern twice when such a type is collected."""

    group: str | list[str] | None = None
    different_host: str | list[str] | None = None
    same_host: str | list[str] | None = None
    query: str | dict[str, Any] | None = None
    target_cell: Name | None = None
    different_cell: str | list[str] | None = None
    build_near_host_ip: str | None = None
    cidr: Annotated[str, Meta(pattern=r"^/[0-9a-f.:]+$")] | None = None


def _counts(wish: Wish) -> tuple[int, int]:
    least = int(wish.min_count)
    most = least if wish.max_count is None else int(wish.max_count)
    for name, n in (("min_count", least), ("max_count", most)):
        if not 1 <= n < 2**31:
            raise Invalid(f"Invalid input for field/attribute {name}. Value: {n}. {n} is less than the minimum of 1")
    if least > most:
        raise Invalid("min_count must be <= max_count")
    return least, most


def _plain_checks(call: Call, wish: Wish, most: int) -> None:
    config = call.world.config
    if wish.access_v4:
        address(wish.access_v4, 4, "accessIPv4")
    if wish.access_v6:
        address(wish.access_v6, 6, "accessIPv6")
    if wish.user_data is not None:
        decoded(wish.user_data, "user_data")
    most_ = config.quota.metadata_items
    at_most(allowance(call), "metadata_items", len(wish.metadata), f"Maximum number of metadata items exceeds {most_}")
    if len(wish.tags) > 50:
        raise Invalid(
            f"Invalid input for field/attribute tags. Value: {len(wish.tags)} tags. The number of tags exceeded the per-server limit 50"
        )
    if wish.hostname and most > 1:
        raise Invalid("A hostname cannot be given for several servers: names must differ.")
    check_files(call, wish.personality)


def check_files(call: Call, files: list[File]) -> None:
    if not files:
        return
    q, most = call.world.config.quota, allowance(call)
    path = f"Personality file path exceeds maximum {q.injected_file_path_length}"
    content = f"Personality file content exceeds maximum {q.injected_file_content_bytes}"
    at_most(most, "injected_files", len(files), "Personality file limit exceeded")
    for f in files:
        at_most(most, "injected_file_path_length", len(f.path), path)
        at_most(most, "injected_file_content_bytes", len(decoded(f.contents, "contents")), content)


# ---- gather: reads, changes nothing


def _gather(call: Call, wish: Wish, hints: dict[str, msgspec.Raw], most: int) -> Found:
    world: World = call.world
    zone, host, node, forced = _place(call, wish)
    devices = asked(wish.devices, wish.old_devices, wish.image_ref)
    if wish.devices or wish.old_devices:
        call.check(rule="os_compute_api:servers:create:attach_volume")
    if wish.trusted_image_certificates:
        call.check(rule="os_compute_api:servers:create:trusted_certs")
    with world.db.read() as tx:
        flavor = _flavor(call, tx, str(wish.flavor_ref))
        keypair = keypair_of(call, tx, wish.key_name)
        company = hinted(call, tx, msgspec.json.decode(hints["group"])) if "group" in hints else None
    if zone is not None and zone not in world.hosts.zones():
        raise Invalid("The requested availability zone is not available")
    if host is not None and host not in world.hosts:
        raise Invalid(f"Compute host {host} could not be found.")
    image, devices = _image(call, wish, devices)
    if devices:
        devices, image = seen(call, devices, image, most=most, zone=zone)
        devices = fitting(call, devices, flavor)
    flavor = made_of(world.config, flavor, image)
    networks = _networks(call, wish, most)
    groups = [] if networks == "none" else _groups(call, wish.security_groups or [])
    return Found(flavor, image, keypair, networks, groups, zone, host, node, forced, company, devices)


def _flavor(call: Call, tx: Tx, ref: str) -> Flavor:
    try:
        flavor = catalog.flavor(tx, ref)
    except NotFound as e:
        raise Invalid(e.said) from None
    if (
        not flavor.is_public
        and not call.context.is_admin
        and call.context.project_id not in catalog.flavor_projects(tx, ref)
    ):
        raise Invalid(f"Flavor {ref} could not be found.")
    if flavor.disabled:
        raise Invalid(f"Flavor {ref} could not be found.")
    return flavor


def keypair_of(call: Call, tx: Tx, name: str | None) -> Keypair | None:
    if name is None:
        return None
    try:
        return catalog.keypair(tx, call.context.user_id, name)
    except NotFound:
        raise Invalid("Invalid key_name provided.") from None


def _image(call: Call, wish: Wish, devices: list[Device]) -> tuple[Image, list[Device]]:
    """The image that was named, and the devices with those that it brings along."""
    ref = wish.image_ref
    if not ref and devices:
        return Image(), devices
    if not ref:
        raise Invalid("Invalid imageRef provided.")
    info = boot_image.shown(call, ref)
    return boot_image.image_of(info), of_image(info, devices)


def _place(call: Call, wish: Wish) -> tuple[str | None, str | None, str | None, bool]:
    """(zone, host, node, forced) of "zone:host:node" and of what 2.74 has for it."""
    zone, host, node, forced = wish.availability_zone, wish.host, wish.hypervisor_hostname, False
    if wish.availability_zone and ":" in wish.availability_zone:
        parts = wish.availability_zone.split(":")
        if len(parts) > 3:
            raise Invalid("Unable to parse availability_zone")
        if wish.host or wish.hypervisor_hostname:
            raise Invalid("Host or node cannot be given twice, by the availability zone and by name.")
        call.check(rule="os_compute_api:servers:create:forced_host")
        zone, host, node = (p or None for p in (*parts, "", "")[:3])
        forced = bool(host or node)
    elif host or node:
        call.check(rule="compute:servers:create:requested_destination")
    return zone or call.world.config.api.default_schedule_zone, host, node, forced


def _networks(call: Call, wish: Wish, most: int) -> list[Wanted] | Literal["auto", "none", ""]:
    asked = wish.networks
    network = call.world.neighbours.network
    if asked == "none":
        return "none"
    if asked:
        call.check(rule="os_compute_api:servers:create:attach_network")
    if asked == "auto" or not asked:
        visible = network.networks(token=call.context.token)
        mine = [n for n in visible if (n.project_id == call.context.project_id or n.shared) and not n.external]
        if len(mine) > 1:
            raise Conflict(MORE_NETWORKS)
        if mine:
            return [Wanted(network_id=mine[0].id)]
        return "auto" if asked == "auto" else "none"
    assert isinstance(asked, list)
    return _listed(call, asked, most)


def _listed(call: Call, asked: list[NetworkWish], most: int) -> list[Wanted]:
    network, token = call.world.neighbours.network, call.context.token
    _check_listed(asked, most)
    ports = (
        {p.id: p for p in network.ports(ids=[dashed(w.port) for w in asked if w.port], token=token)}
        if any(w.port for w in asked)
        else {}
    )
    wanted = []
    for w in asked:
        if w.port:
            port = ports.get(dashed(w.port))
            if port is None:
                raise Invalid(f"Port id {w.port} could not be found.")
            if port.device_id:
                raise Conflict(f"Port {port.id} is still in use.")
            wanted.append(Wanted(network_id=port.network_id, port_id=port.id, tag=w.tag))
        else:
            wanted.append(Wanted(network_id=_network_id(w.uuid), fixed_ip=w.fixed_ip, tag=w.tag))
    ids = {w.network_id for w in wanted if w.network_id and not w.port_id}
    known = {n.id: n for n in network.networks(ids=sorted(ids), token=token)} if ids else {}
    for id in ids:
        if id not in known:
            raise Invalid(f"Network {id} could not be found.")
        if not known[id].subnets and any(w.network_id == id and not w.port_id for w in wanted):
            raise Invalid(f"Network {id} requires a subnet in order to boot instances on.")
        if known[id].external and not known[id].shared and not call.may("network:attach_external_network"):
            raise Forbidden(f"It is not allowed to create an interface on external network {id}")
    return wanted


def _network_id(said: str | None) -> str:
    """Before 2.37 a network could be written as br-UUID."""
    if said is None:
        raise Invalid("Bad network format: missing 'uuid'")
    id = said.removeprefix("br-")
    if not re.fullmatch(UUID, id):
        raise Invalid(f"Bad networks format: network uuid is not in proper format ({said[:80]})")
    return dashed(id)


def _check_listed(asked: list[NetworkWish], most: int) -> None:
    seen: set[str] = set()
    for w in asked:
        if w.fixed_ip:
            address(w.fixed_ip, None, "fixed_ip")
            if most > 1:
                raise Invalid("max_count cannot be greater than 1 if an fixed_ip is specified.")
        if w.port:
            if w.fixed_ip:
                raise Invalid(
                    f"Specified Fixed IP '{w.fixed_ip}' cannot be used with port '{w.port}': the two cannot be specified together."
                )
            if most > 1:
                raise Invalid(
                    "Unable to launch multiple instances with a single configured port ID. Please launch your instance one by one with different ports."
                )
            if dashed(w.port) in seen:
                raise Invalid(f"Duplicate ports specified: {w.port}")
            seen.add(dashed(w.port))


def _groups(call: Call, asked: list[Group]) -> list[str]:
    """Names or ids of security groups → ids; "default" is what the network service gives anyhow."""
    named = list(dict.fromkeys(g.name for g in asked))
    if not named or named == ["default"]:
        return []
    known = call.world.neighbours.network.security_groups(project_id=call.context.project_id or "")
    found = []
    for name in named:
        same = [g.id for g in known if g.id == name] or [g.id for g in known if g.name == name]
        if not same:
            raise Invalid(f"Security group {name} not found for project {call.context.project_id}.")
        if len(same) > 1:
            raise Conflict(f"Multiple security groups found matching '{name}'. Use an ID to be more specific.")
        found.append(same[0])
    return found


# ---- decide


def _decide(call: Call, wish: Wish, found: Found) -> None:
    boot_image.fits(call, found.flavor, found.image, volume_backed=not found.image.id)


def hostname_of(name: str, id: str) -> str:
    """A name for the guest: letters, digits, dashes and dots of the server's name; else `Server-<id>`."""
    text = re.sub(r"[ _]", "-", name)
    text = re.sub(r"[^a-zA-Z0-9.-]+", "", text).strip(".-").lower()[:63].rstrip(".-")
    return text or f"Server-{id}"


# ---- record


def _wanted(call: Call, found: Found, least: int, most: int) -> dict[str, list[Device]]:
    """The devices of each server that is to be made, by its id; {}: they need none."""
    if not found.devices:
        return {}
    world: World = call.world
    c = call.context
    n = world.db.run(
        quotas.claim, allowance(call), c.project_id or "", c.user_id, _size(found), least, most
    )  # of how many there is a chance: it is claimed with what is recorded
    return {
        world.ids.uuid(): [msgspec.structs.replace(d, uuid=world.ids.uuid()) for d in found.devices] for _ in range(n)
    }


def _size(found: Found) -> quotas.Size:
    flavor, properties = found.flavor, found.image.properties
    on_volume = any(d.is_volume and d.boot_index == 0 for d in found.devices)
    return quotas.Size(flavor.vcpus, flavor.memory_mb, amounts(flavor, properties, volume_backed=on_volume))


def _record(
    tx: Tx,
    call: Call,
    wish: Wish,
    found: Found,
    hints: dict[str, msgspec.Raw],
    least: int,
    most: int,
    password: str,
    devices: dict[str, list[Device]],
) -> list[tuple[Server, str]]:
    world: World = call.world
    now = world.clock.now()
    n = quotas.claim(
        tx,
        allowance(call),
        call.context.project_id or "",
        call.context.user_id,
        _size(found),
        least,
        min(most, len(devices)) if devices else most,
    )
    if found.company is not None:
        server_groups.join(tx, allowance(call), found.company, call.context.user_id, n)
    ready = list(devices.items())[:n] if devices else [(world.ids.uuid(), []) for _ in range(n)]
    block_devices.keep(tx, [d.uuid for _, own in ready for d in own if d.is_volume])
    reservation = f"r-{world.ids.hex()[:8]}"
    made = [_server(call, wish, found, hints, i, n, most, reservation, now, *each) for i, each in enumerate(ready)]
    servers.create(tx, made)
    known = servers.find(tx, [s.id for s in made])
    runs = []
    files = [(f.path, f.contents) for f in wish.personality]
    if (company := found.company) is not None:
        notices.told(
            call, tx, "server_group.add_member", of=lambda: words.server_group(server_groups.get(tx, company.id))
        )
    for s in made:
        job = Build(
            server=known[s.id],
            networks=found.networks,
            security_groups=found.groups,
            admin_password=password,
            host=found.host,
            node=found.node,
            forced=found.forced,
            files=files,
        )
        runs.append(
            (
                known[s.id],
                start(tx, job.flow, job, id=world.ids.uuid(), subject=s.id, now=now, cause=cause(call, "create")),
            )
        )
    return runs


def _server(
    call: Call,
    wish: Wish,
    found: Found,
    hints: dict[str, msgspec.Raw],
    i: int,
    n: int,
    most: int,
    reservation: str,
    now: float,
    id: str,
    devices: list[Device],
) -> Server:
    name = f"{wish.name}-{i + 1}" if n > 1 or most > 1 else wish.name
    server = Server(
        id=id,
        project_id=call.context.project_id or "",
        user_id=call.context.user_id,
        name=name,
        hostname=hostname_of(wish.hostname or name, id),
        flavor=found.flavor,
        task_state=Task.scheduling,
        description=wish.description if call.version >= 19 else name,
        image=found.image,
        devices=devices,
        availability_zone=found.zone,
        tags=wish.tags,
        metadata=wish.metadata,
        system_metadata={
            "boot_roles": ",".join(sorted(call.context.roles)),
            "owner_project_name": call.context.project_name,
            "owner_user_name": call.context.user_name,
        },
        keypair=found.keypair,
        user_data=wish.user_data,
        config_drive=truth(wish.config_drive),
        access_ip_v4=address(wish.access_v4, 4, "accessIPv4") if wish.access_v4 else "",
        access_ip_v6=address(wish.access_v6, 6, "accessIPv6") if wish.access_v6 else "",
        disk_config=wish.disk_config
        or ("AUTO" if found.image.properties.get("auto_disk_config", "").lower() == "true" else "MANUAL"),
        launch_index=i,
        reservation_id=reservation,
        scheduler_hints=hints,
        trusted_certs=wish.trusted_image_certificates,
        group_id=found.company.id if found.company else None,
        created_at=now,
    )
    return (
        msgspec.structs.replace(server, devices=disks.named(server), root_device=disks.root_name(server))
        if devices
        else server
    )
