"""What others are told of our doings, in the words that their programs know: versioned notifications, and the older flat ones.

Pure: rows in, JSON-able dicts out.  Which event types follow from what happened to a run is one table.  The words are
those of the Compute service's notifications (its documentation, "Versioned notification samples").
"""

import traceback
from typing import Any

import msgspec

from kilonova.kit.clock import iso
from kilonova.kit.errors import Fault
from kilonova.model.devices import Device
from kilonova.model.flavor import Flavor
from kilonova.model.server import Server
from kilonova.model.server_group import ServerGroup
from kilonova.model.shares import Sharing, status

API, COMPUTE, CONDUCTOR, SCHEDULER = "nova-api", "nova-compute", "nova-conductor", "nova-scheduler"
POWER = {0: "pending", 1: "running", 3: "paused", 4: "shutdown", 6: "crashed", 7: "suspended"}


class Notice(msgspec.Struct, frozen=True):
    """One notification. `publisher` is "binary:host"; `message_id` is the same each time it is sent."""

    topic: str
    event_type: str
    publisher: str
    priority: str
    message_id: str
    at: float
    payload: dict[str, Any]

    @property
    def routed(self) -> str:
        """The topic with the priority, by which it is read."""
        return f"{self.topic}.{self.priority.lower()}"

    def envelope(self) -> dict[str, Any]:
        return {
            "message_id": self.message_id,
            "publisher_id": self.publisher,
            "event_type": self.event_type,
            "priority": self.priority,
            "timestamp": iso_space(self.at),
            "payload": self.payload,
        }


class Tells(msgspec.Struct, frozen=True):
    """What a run's beginning, good end and bad end are called: event types without "instance." in front.

    `within`: what it is called that it came as far as its workflow says (`kit.journal.reached`).
    """

    start: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    error: tuple[str, ...] = ()
    within: dict[str, tuple[str, ...]] = {}

    def of(self, phase: str) -> tuple[str, ...]:
        match phase:
            case "start":
                return self.start
            case "end":
                return self.end
            case "error":
                return self.error
            case _:
                return self.within.get(phase, ())

    @property
    def all(self) -> tuple[str, ...]:
        """In the order in which they are told when all goes well; then the bad end."""
        return (*self.start, *(e for told in self.within.values() for e in told), *self.end, *self.error)


def _usual(name: str, *, error: bool = False) -> Tells:
    return Tells((f"{name}.start",), (f"{name}.end",), (f"{name}.error",) if error else ())


# fmt: off
_RESIZE = Tells(("exists", "resize_prep.start"), ("resize_finish.end",), ("resize.error",), {
    "prepared": ("resize_prep.end", "resize.start"),
    "departed": ("resize.end", "resize_finish.start"),
})
_LIVE = Tells(("live_migration_pre.start",), ("live_migration_post.end",),
              ("live_migration_rollback.start", "live_migration_rollback_dest.start", "live_migration_rollback_dest.end", "live_migration_rollback.end"), {
    "prepared": ("live_migration_pre.end",),
    "gone":     ("live_migration_post.start", "live_migration_post_dest.start"),
    "landed":   ("live_migration_post_dest.end",),
})
ACTIONS: dict[str, Tells] = {  # by the name of the instance action
    "create":              _usual("create", error=True),
    "delete":              Tells(("delete.start", "shutdown.start"), ("shutdown.end", "delete.end")),
    "start":               _usual("power_on"),
    "stop":                _usual("power_off"),
    "reboot":              _usual("reboot", error=True),
    "pause":               _usual("pause"),
    "unpause":             _usual("unpause"),
    "suspend":             _usual("suspend"),
    "resume":              _usual("resume"),
    "rebuild":             Tells(("rebuild_scheduled", "exists", "rebuild.start"), ("rebuild.end",), ("rebuild.error",)),
    "rescue":              Tells(("exists", "rescue.start"), ("rescue.end",)),
    "unrescue":            _usual("unrescue"),
    "restore":             _usual("restore"),
    "softDelete":          _usual("soft_delete"),
    "shelve":              Tells(("exists", "shelve.start"), ("shelve.end",)),
    "shelve, offload":     Tells(("exists", "shelve.start"), ("shelve_offload.end",), within={"shelved": ("shelve.end", "shelve_offload.start")}),
    "shelveOffload":       _usual("shelve_offload"),
    "unshelve":            _usual("unshelve"),
    "trigger_crash_dump":  _usual("trigger_crash_dump"),
    "createImage":         _usual("snapshot"),
    "createBackup":        _usual("snapshot"),
    "attach_interface":    _usual("interface_attach", error=True),
    "detach_interface":    _usual("interface_detach"),
    "attach_volume":       _usual("volume_attach", error=True),
    "detach_volume":       _usual("volume_detach"),
    "swap_volume":         _usual("volume_swap", error=True),
    "attach_share":        _usual("share_attach", error=True),
    "detach_share":        _usual("share_detach", error=True),
    "resize":              _RESIZE,
    "migrate":             _RESIZE,
    "confirmResize":       _usual("resize_confirm"),
    "revertResize":        _usual("resize_revert"),
    "live-migration":      _LIVE,
    "evacuate":            Tells(("evacuate", "rebuild.start"), ("rebuild.end",), ("rebuild.error",)),
    "live_migration_cancel":         _usual("live_migration_abort"),
    "live_migration_force_complete": _usual("live_migration_force_complete"),
    "lock":                Tells(end=("lock",)),
    "unlock":              Tells(end=("unlock",)),
}
BY_API = {"lock", "unlock", "evacuate", "share_attach", "share_detach"}
BY_CONDUCTOR = {"rebuild_scheduled"}
TASKS = {"create": "build_instances", "resize": "migrate_server", "migrate": "migrate_server", "live-migration": "migrate_server", "rebuild": "rebuild_server", "evacuate": "rebuild_server"}
LEGACY_NAMES = {"resize_prep": "resize.prep", "resize_confirm": "resize.confirm", "resize_revert": "resize.revert", "resize_finish": "finish_resize",
                "live_migration_pre": "live_migration.pre", "live_migration_post": "live_migration._post", "live_migration_post_dest": "live_migration.post.dest",
                "live_migration_rollback": "live_migration._rollback", "live_migration_rollback_dest": "live_migration.rollback.dest",
                "live_migration_abort": "live.migration.abort", "live_migration_force_complete": "live.migration.force.complete",
                "volume_attach": "volume.attach", "volume_detach": "volume.detach"}
PAYLOADS = {"create": ("InstanceCreatePayload", "1.13"), "rebuild": ("InstanceActionRebuildPayload", "1.10"), "rebuild_scheduled": ("InstanceActionRebuildPayload", "1.10"),
            "rescue": ("InstanceActionRescuePayload", "1.4"), "resize_prep": ("InstanceActionResizePrepPayload", "1.4"), "snapshot": ("InstanceActionSnapshotPayload", "1.10"),
            "volume_attach": ("InstanceActionVolumePayload", "1.7"), "volume_detach": ("InstanceActionVolumePayload", "1.7"), "volume_swap": ("InstanceActionVolumeSwapPayload", "1.9"),
            "share_attach": ("InstanceActionSharePayload", "1.0"), "share_detach": ("InstanceActionSharePayload", "1.0")}
# fmt: on


def wrapped(name: str, version: str, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "nova_object.name": name,
        "nova_object.namespace": "nova",
        "nova_object.version": version,
        "nova_object.data": data,
    }


# ---- servers


class Who(msgspec.Struct, frozen=True):
    """Who asked for it, and where the server is known to be."""

    user_id: str = ""
    project_id: str = ""
    request_id: str = ""
    zone: str = ""


def action(
    family: str, s: Server, who: Who, fault: Fault | None, args: dict[str, Any], at: float = 0.0
) -> dict[str, Any]:
    """The payload of `instance.<family>`. `args` are those of its run."""
    if family == "exists":
        return wrapped("InstanceExistsPayload", "2.1", instance(s, who) | {"audit_period": month(at)})
    name, version = PAYLOADS.get(family, ("InstanceActionPayload", "1.9"))
    data = instance(s, who) | {"fault": None if fault is None else exception(fault)}
    if name == "InstanceCreatePayload":
        data |= {
            "instance_name": s.instance_name if s.number else None,
            "keypairs": [] if s.keypair is None else [_keypair_of(s)],
            "tags": s.tags,
            "trusted_image_certificates": s.trusted_certs,
        }
    if name == "InstanceActionRebuildPayload":
        data["trusted_image_certificates"] = s.trusted_certs
    if name == "InstanceActionRescuePayload":
        data["rescue_image_ref"] = _within(args, "disk", "source", "image_id")
    if name == "InstanceActionResizePrepPayload":
        new = args.get("flavor")
        data["new_flavor"] = None if not isinstance(new, dict) else flavor(msgspec.convert(new, Flavor))
    if name == "InstanceActionSnapshotPayload":
        data["snapshot_image_id"] = args.get("image_id")
    if name == "InstanceActionVolumePayload":
        data["volume_id"] = _within(args, "device", "volume_id")
    if name == "InstanceActionVolumeSwapPayload":
        data |= {"old_volume_id": _within(args, "device", "volume_id"), "new_volume_id": args.get("new_volume_id")}
    if name == "InstanceActionSharePayload":
        data["share_id"] = _within(args, "share", "share_id")
    return wrapped(name, version, data)


def month(now: float) -> dict[str, Any]:
    """The period of audits as it is by default: what is gone of this month (UTC)."""
    end = iso(now) or ""
    period = {"audit_period_beginning": f"{end[:7]}-01T00:00:00Z", "audit_period_ending": end}
    return wrapped("AuditPeriodPayload", "1.0", period)


def update(s: Server, who: Who, before: Server | None, at: float = 0.0) -> dict[str, Any]:
    """Of `instance.update`: a name, metadata or tags were written, or its state changed; `before` None: it is new."""
    change: dict[str, str | None] = {"old_state": str(before.vm_state) if before else None, "state": str(s.vm_state)}
    change |= {"old_task_state": before.task_state if before else None, "new_task_state": s.task_state}
    data = instance(s, who) | {
        "audit_period": month(at),
        "old_display_name": before.name if before and before.name != s.name else None,
        "state_update": wrapped("InstanceStateUpdatePayload", "1.0", change),
        "tags": s.tags,
    }
    return wrapped("InstanceUpdatePayload", "2.1", data)


def instance(s: Server, who: Who) -> dict[str, Any]:
    properties = s.image.properties
    return {
        "action_initiator_project": who.project_id,
        "action_initiator_user": who.user_id,
        "architecture": properties.get("hw_architecture") or properties.get("architecture"),
        "auto_disk_config": s.disk_config,
        "availability_zone": who.zone or s.availability_zone,
        "block_devices": [],
        "created_at": iso(s.created_at),
        "deleted_at": iso(s.deleted_at),
        "display_description": s.description,
        "display_name": s.name,
        "flavor": flavor(s.flavor),
        "host": s.host,
        "host_name": s.hostname,
        "image_uuid": s.image.id,
        "ip_addresses": [wrapped("IpPayload", "1.0", ip) for ip in _addresses(s)],
        "kernel_id": properties.get("kernel_id", ""),
        "key_name": s.keypair.name if s.keypair else None,
        "launched_at": iso(s.launched_at),
        "locked": s.locked,
        "locked_reason": s.locked_reason,
        "metadata": s.metadata,
        "node": s.node,
        "os_type": properties.get("os_type"),
        "power_state": POWER.get(s.power_state, "pending"),
        "progress": s.progress,
        "ramdisk_id": properties.get("ramdisk_id", ""),
        "request_id": who.request_id,
        "reservation_id": s.reservation_id,
        "shares": [],
        "state": str(s.vm_state),
        "task_state": s.task_state,
        "tenant_id": s.project_id,
        "terminated_at": iso(s.terminated_at),
        "updated_at": iso(s.updated_at),
        "user_id": s.user_id,
        "uuid": s.id,
    }


def _addresses(s: Server) -> list[dict[str, Any]]:
    return [
        {
            "address": a.address,
            "device_name": f"tap{p.port_id[:11]}",
            "label": p.label,
            "mac": p.mac,
            "meta": {},
            "port_uuid": p.port_id,
            "version": a.version,
        }
        for p in s.plugs
        for a in p.addresses
        if not a.floating
    ]


def _keypair_of(s: Server) -> dict[str, Any]:
    assert s.keypair is not None
    return keypair(s.user_id, s.keypair.name, s.keypair.type, None, s.keypair.public_key)


def exception(fault: Fault) -> dict[str, Any]:
    said = {"exception": fault.kind, "exception_message": fault.said}
    return wrapped("ExceptionPayload", "1.1", said | {"function_name": "", "module_name": "", "traceback": ""})


def unexpected(e: BaseException) -> dict[str, Any]:
    """Of `compute.exception`. Where it came from, and not what was in it: that may be anything, and is in the log."""
    frames = traceback.extract_tb(e.__traceback__)
    last = frames[-1] if frames else None
    data = {
        "exception": type(e).__name__,
        "exception_message": "An error that nobody expected; the log says more.",
        "function_name": last.name if last else "",
        "module_name": last.filename.rsplit("/", 1)[-1].removesuffix(".py") if last else "",
        "traceback": "".join(f"{f.filename}:{f.lineno} {f.name}\n" for f in frames),
    }
    return wrapped("ExceptionPayload", "1.1", data)


def unreached(ip: str, why: str) -> dict[str, Any]:
    """Of `libvirt.connect.error`: a host whose hypervisor is away."""
    return wrapped("LibvirtErrorPayload", "1.0", {"ip": ip, "reason": exception(Fault("Unavailable", why))})


def task(server: str, state: str, fault: Fault) -> dict[str, Any]:
    """Of `compute_task.*.error`: what a conductor could not do."""
    data = {"instance_uuid": server, "reason": exception(fault), "request_spec": None, "state": state}
    return wrapped("ComputeTaskPayload", "1.0", data)


def _within(args: Any, *path: str) -> Any:
    for step in path:
        args = args.get(step) if isinstance(args, dict) else None
    return args


def wanted(server: str, s: Server | None, ask: Any) -> dict[str, Any]:
    """Of `scheduler.select_destinations`: what was asked for (`model.ask.Ask`)."""
    data: dict[str, Any] = {
        "availability_zone": ask.zone,
        "flavor": flavor(s.flavor) if s else None,
        "force_hosts": [ask.host] if ask.forced and ask.host else None,
        "force_nodes": [ask.node] if ask.forced and ask.node else None,
        "ignore_hosts": ask.avoid or None,
        "image": None,
        "image_meta": None,
        "instance_group": None,
        "instance_uuid": server,
        "num_instances": 1,
        "numa_topology": None,
        "pci_requests": None,
        "project_id": ask.project_id,
        "requested_destination": None,
        "retry": None,
        "scheduler_hints": ask.hints,
        "security_groups": sorted({g for p in s.plugs for g in p.security_groups}) if s else [],
        "user_id": s.user_id if s else "",
    }
    if ask.host and not ask.forced:
        there = {"aggregates": None, "cell": None, "host": ask.host, "node": ask.node}
        data["requested_destination"] = wrapped("DestinationPayload", "1.0", there)
    return wrapped("RequestSpecPayload", "1.1", data)


def block_device(d: Device) -> dict[str, Any]:
    data = {
        "boot_index": d.boot_index,
        "delete_on_termination": d.delete_on_termination,
        "device_name": d.name,
        "tag": d.tag,
        "volume_id": d.volume_id,
    }
    return wrapped("BlockDevicePayload", "1.0", data)


def share(s: Sharing, server: Server) -> dict[str, Any]:
    data = {"share_id": s.share_id, "share_mapping_uuid": s.uuid, "status": status(s, server), "tag": s.tag}
    return wrapped("SharePayload", "1.0", data)


# ---- other things


def flavor(f: Flavor) -> dict[str, Any]:
    data = {
        "description": f.description,
        "disabled": f.disabled,
        "ephemeral_gb": f.ephemeral_gb,
        "extra_specs": f.extra_specs,
        "flavorid": f.id,
        "is_public": f.is_public,
        "memory_mb": f.memory_mb,
        "name": f.name,
        "projects": None,
        "root_gb": f.disk_gb,
        "rxtx_factor": f.rxtx_factor,
        "swap": f.swap_mb,
        "vcpu_weight": 0,
        "vcpus": f.vcpus,
    }
    return wrapped("FlavorPayload", "1.4", data)


def keypair(user_id: str, name: str, type: str, fingerprint: str | None, public_key: str | None) -> dict[str, Any]:
    data = {"user_id": user_id, "name": name, "type": type, "fingerprint": fingerprint, "public_key": public_key}
    return wrapped("KeypairPayload", "1.0", data)


def aggregate(id: int, uuid: str, name: str, hosts: list[str], metadata: dict[str, str]) -> dict[str, Any]:
    data = {"id": id, "uuid": uuid, "name": name, "hosts": hosts, "metadata": metadata}
    return wrapped("AggregatePayload", "1.1", data)


def cached(
    id: int, uuid: str, name: str, host: str, there: list[str], missing: list[str], n: int, of: int
) -> dict[str, Any]:
    """Of `aggregate.cache_images.progress`: what the n-th host has by now."""
    data = {"id": id, "uuid": uuid, "name": name, "host": host, "images_cached": there, "images_failed": missing}
    return wrapped("AggregateCachePayload", "1.0", data | {"index": n, "total": of})


def server_group(g: ServerGroup) -> dict[str, Any]:
    data = {
        "uuid": g.id,
        "name": g.name,
        "user_id": g.user_id,
        "project_id": g.project_id,
        "policy": g.policy,
        "policies": [g.policy],
        "rules": {} if g.max_per_host is None else {"max_server_per_host": str(g.max_per_host)},
        "members": g.members,
        "hosts": None,
    }
    return wrapped("ServerGroupPayload", "1.1", data)


def service(s: Any, zone: str) -> dict[str, Any]:
    """`s` is a row of hosts' services."""
    data = {
        "uuid": s.uuid,
        "host": s.host,
        "binary": s.binary,
        "topic": s.binary.removeprefix("nova-"),
        "report_count": 0,
        "disabled": s.disabled,
        "disabled_reason": s.disabled_reason,
        "availability_zone": zone,
        "last_seen_up": iso(s.last_seen),
        "forced_down": s.forced_down,
        "version": 0,
    }
    return wrapped("ServiceStatusPayload", "1.1", data)


# ---- the older ones: a flat dictionary


def legacy_type(event_type: str) -> str:
    """compute.instance.power_off.start, of instance.power_off.start."""
    family, dot, phase = event_type.removeprefix("instance.").partition(".")
    return f"compute.instance.{LEGACY_NAMES.get(family, family)}{dot}{phase}"


def legacy(s: Server, who: Who, fault: Fault | None) -> dict[str, Any]:
    f = s.flavor
    said = {
        "tenant_id": s.project_id,
        "user_id": s.user_id,
        "instance_id": s.id,
        "display_name": s.name,
        "hostname": s.hostname,
        "host": s.host,
        "node": s.node,
        "availability_zone": who.zone or s.availability_zone,
        "reservation_id": s.reservation_id,
        "state": str(s.vm_state),
        "state_description": s.task_state or "",
        "progress": s.progress,
        "instance_type": f.name,
        "instance_flavor_id": f.id,
        "vcpus": f.vcpus,
        "memory_mb": f.memory_mb,
        "disk_gb": f.disk_gb + f.ephemeral_gb,
        "root_gb": f.disk_gb,
        "ephemeral_gb": f.ephemeral_gb,
        "image_ref_url": s.image.id,
        "image_meta": s.image.properties,
        "metadata": s.metadata,
        "access_ip_v4": s.access_ip_v4 or None,
        "access_ip_v6": s.access_ip_v6 or None,
        "created_at": iso_space(s.created_at),
        "launched_at": iso_space(s.launched_at),
        "terminated_at": iso_space(s.terminated_at),
        "deleted_at": iso_space(s.deleted_at),
        "fixed_ips": [
            {"address": a["address"], "version": a["version"], "label": a["label"], "vif_mac": a["mac"]}
            for a in _addresses(s)
        ],
    }
    return said | ({} if fault is None else {"message": fault.said, "exception": fault.kind})


def iso_space(at: float | None) -> str:
    """2026-11-20 12:00:00; "" for never."""
    text = iso(at)
    return "" if text is None else text.removesuffix("Z").replace("T", " ")
