"""A server as the API shows it, today; its past in the margin."""

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from msgspec import field

from kilonova.api.registry import link, links
from kilonova.kit.clock import iso, iso_us
from kilonova.kit.errors import Fault
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType, since
from kilonova.model.server import Server, host_id
from kilonova.model.states import status
from kilonova.store.server_pages import Short

EXTENDED = "os_compute_api:os-extended-server-attributes"
HOST_STATUS = "os_compute_api:servers:show:host_status"
HOST_STATUS_UNKNOWN = "os_compute_api:servers:show:host_status:unknown-only"
FLAVOR_SPECS = "os_compute_api:servers:show:flavor-extra-specs"
FAULTY = frozenset({"ERROR", "DELETED"})
SHOWS_PROGRESS = frozenset({"ACTIVE", "BUILD", "REBUILD", "RESIZE", "VERIFY_RESIZE", "MIGRATING"})


class ServerView(msgspec.Struct, kw_only=True):
    """`flavor` is {id, links} until 2.46 and what it holds since; what the caller may not see is left out."""

    id: str
    name: str
    status: str
    tenant_id: str
    user_id: str
    metadata: dict[str, str]
    host_id: str = field(name="hostId")
    image: Any
    flavor: Any
    created: str | None
    updated: str | None
    addresses: dict[str, list[dict[str, Any]]]
    access_v4: str = field(name="accessIPv4")
    access_v6: str = field(name="accessIPv6")
    links: list[dict[str, str]]
    disk_config: str = field(name="OS-DCF:diskConfig")
    progress: int | UnsetType = UNSET
    fault: dict[str, Any] | UnsetType = UNSET
    zone: str | UnsetType = field(default=UNSET, name="OS-EXT-AZ:availability_zone")
    config_drive: str | UnsetType = UNSET
    key_name: str | None | UnsetType = UNSET
    launched_at: str | None | UnsetType = field(default=UNSET, name="OS-SRV-USG:launched_at")
    terminated_at: str | None | UnsetType = field(default=UNSET, name="OS-SRV-USG:terminated_at")
    security_groups: list[dict[str, str]] | UnsetType = UNSET
    host: str | None | UnsetType = field(default=UNSET, name="OS-EXT-SRV-ATTR:host")
    instance_name: str | UnsetType = field(default=UNSET, name="OS-EXT-SRV-ATTR:instance_name")
    node: str | None | UnsetType = field(default=UNSET, name="OS-EXT-SRV-ATTR:hypervisor_hostname")
    task_state: str | None | UnsetType = field(default=UNSET, name="OS-EXT-STS:task_state")
    vm_state: str | UnsetType = field(default=UNSET, name="OS-EXT-STS:vm_state")
    power_state: int | UnsetType = field(default=UNSET, name="OS-EXT-STS:power_state")
    volumes: list[dict[str, Any]] | UnsetType = field(default=UNSET, name="os-extended-volumes:volumes_attached")
    hostname: Annotated[str | UnsetType, since("2.3")] = field(default=UNSET, name="OS-EXT-SRV-ATTR:hostname")
    reservation_id: Annotated[str | UnsetType, since("2.3")] = field(
        default=UNSET, name="OS-EXT-SRV-ATTR:reservation_id"
    )
    launch_index: Annotated[int | UnsetType, since("2.3")] = field(default=UNSET, name="OS-EXT-SRV-ATTR:launch_index")
    kernel_id: Annotated[str | UnsetType, since("2.3")] = field(default=UNSET, name="OS-EXT-SRV-ATTR:kernel_id")
    ramdisk_id: Annotated[str | UnsetType, since("2.3")] = field(default=UNSET, name="OS-EXT-SRV-ATTR:ramdisk_id")
    root_device: Annotated[str | None | UnsetType, since("2.3")] = field(
        default=UNSET, name="OS-EXT-SRV-ATTR:root_device_name"
    )
    user_data: Annotated[str | None | UnsetType, since("2.3")] = field(default=UNSET, name="OS-EXT-SRV-ATTR:user_data")
    locked: Annotated[bool, since("2.9")] = False
    host_status: Annotated[str | UnsetType, since("2.16")] = UNSET
    description: Annotated[str | None, since("2.19")] = None
    tags: Annotated[list[str], since("2.26")] = []
    trusted_image_certificates: Annotated[list[str] | None, since("2.63")] = None
    server_groups: Annotated[list[str] | UnsetType, since("2.71")] = UNSET
    locked_reason: Annotated[str | None, since("2.73")] = None
    pinned_availability_zone: Annotated[str | None, since("2.96")] = None
    scheduler_hints: Annotated[dict[str, msgspec.Raw], since("2.100")] = {}


class Shown(msgspec.Struct, frozen=True):
    """What is known of a server beside its row."""

    zone: str = ""  # of the host it is on, or the one it asked for
    host_status: str = ""
    fault: Fault | None = None
    fault_at: float | None = None
    groups: list[str] = []


def server(call: Call, s: Server, more: Shown, *, listed: bool = False, whole: bool = True) -> ServerView:
    """`whole` is False for the answer to an update before 2.75, which shows less."""
    shown = status(s.vm_state, s.task_state)
    view = ServerView(
        id=s.id,
        name=s.name,
        status=shown,
        tenant_id=s.project_id,
        user_id=s.user_id,
        metadata=s.metadata,
        host_id=host_id(s.project_id, s.host),
        image=_image(call, s),
        flavor=_flavor(call, s),
        created=iso(s.created_at),
        updated=iso(s.updated_at or s.created_at),
        addresses=_addresses(call, s, whole),
        access_v4=s.access_ip_v4,
        access_v6=s.access_ip_v6,
        links=links(call, "servers", s.id),
        disk_config=s.disk_config,
        locked=s.locked,
        description=s.description,
        tags=s.tags,
        trusted_image_certificates=s.trusted_certs,
        locked_reason=s.locked_reason,
        pinned_availability_zone=s.availability_zone,
        scheduler_hints=s.scheduler_hints,
    )
    if shown in SHOWS_PROGRESS:
        view.progress = s.progress
    if more.fault and shown in FAULTY:
        view.fault = _fault(call, more)
    if not listed:
        view.server_groups = more.groups
    if whole:
        _rest(call, s, more, view)
    if call.version >= 16 and (whole or call.version >= 75):
        if _may(call, HOST_STATUS, s):
            view.host_status = more.host_status
        elif more.host_status == "UNKNOWN" and _may(call, HOST_STATUS_UNKNOWN, s):
            view.host_status = "UNKNOWN"
    return view


def _may(call: Call, rule: str, s: Server) -> bool:
    """May he see this of such a server? A page has a thousand of them, and few owners."""
    key = rule, s.project_id, s.user_id
    if (known := call.kept.get(key)) is None:
        known = call.kept[key] = call.may(rule, {"project_id": s.project_id, "user_id": s.user_id})
    return bool(known)


class ShortView(msgspec.Struct):
    id: str
    name: str
    links: list[dict[str, str]]


def short(call: Call, s: Short) -> ShortView:
    """A row of the list without details."""
    return ShortView(s.id, s.name, links(call, "servers", s.id))


def _rest(call: Call, s: Server, more: Shown, view: ServerView) -> None:
    view.zone = more.zone
    view.config_drive = "True" if s.config_drive else ""
    view.key_name = s.keypair.name if s.keypair else None
    view.launched_at = _bare(s.launched_at)
    view.terminated_at = _bare(s.terminated_at)
    view.task_state, view.vm_state, view.power_state = s.task_state, str(s.vm_state), s.power_state
    view.volumes = _volumes(call, s)
    if names := sorted({g for p in s.plugs for g in p.security_groups}):
        view.security_groups = [{"name": n} for n in names]
    admin = _may(call, EXTENDED, s)
    if admin:
        view.host, view.node, view.instance_name = s.host, s.node, s.instance_name
        view.reservation_id, view.launch_index = s.reservation_id, s.launch_index
        view.kernel_id = s.image.properties.get("kernel_id", "")
        view.ramdisk_id = s.image.properties.get("ramdisk_id", "")
        view.root_device, view.user_data = s.root_device, s.user_data
    if admin or call.version >= 90:
        view.hostname = s.hostname


def _volumes(call: Call, s: Server) -> list[dict[str, Any]]:
    made = [d for d in s.devices if d.is_volume and d.volume_id]
    if call.version < 3:
        return [{"id": d.volume_id} for d in made]
    return [{"id": d.volume_id, "delete_on_termination": d.delete_on_termination} for d in made]


def _bare(at: float | None) -> str | None:
    return None if at is None else iso_us(at)


def _image(call: Call, s: Server) -> Any:
    if not s.image.id:
        return ""
    bookmark = [{"rel": "bookmark", "href": link(call, "images", s.image.id, version=False)}]
    shown: dict[str, Any] = {"id": s.image.id, "links": bookmark}
    return shown | {"properties": s.image.properties} if call.version >= 98 else shown


def _flavor(call: Call, s: Server) -> dict[str, Any]:
    f = s.flavor
    if call.version < 47:
        return {"id": f.id, "links": [{"rel": "bookmark", "href": link(call, "flavors", f.id, version=False)}]}
    shown = {
        "vcpus": f.vcpus,
        "ram": f.memory_mb,
        "disk": f.disk_gb,
        "ephemeral": f.ephemeral_gb,
        "swap": f.swap_mb,
        "original_name": f.name,
    }
    if _may(call, FLAVOR_SPECS, s):
        shown["extra_specs"] = f.extra_specs
    return shown


def _addresses(call: Call, s: Server, whole: bool) -> dict[str, list[dict[str, Any]]]:
    if s.vm_state in call.world.config.api.hide_server_address_states:
        return {}
    shown: dict[str, list[dict[str, Any]]] = {}
    for p in s.plugs:
        rows = shown.setdefault(p.label, [])
        for a in p.addresses:
            one: dict[str, Any] = {"version": a.version, "addr": a.address}
            if whole or call.version >= 75:
                one |= {"OS-EXT-IPS:type": "floating" if a.floating else "fixed", "OS-EXT-IPS-MAC:mac_addr": p.mac}
            rows.append(one)
    return shown


def _fault(call: Call, more: Shown) -> dict[str, Any]:
    assert more.fault is not None
    return {"code": 500, "created": iso(more.fault_at or 0), "message": more.fault.said[:255]} | (
        {"details": more.fault.detail or more.fault.said} if call.context.is_admin else {}
    )


def addresses_of(call: Call, plugs: Iterable[Any]) -> dict[str, list[dict[str, Any]]]:
    """`GET /servers/{id}/ips`: label → [{version, addr}]."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for p in plugs:
        shown.setdefault(p.label, []).extend({"version": a.version, "addr": a.address} for a in p.addresses)
    return shown
