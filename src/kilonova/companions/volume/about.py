"""What the service says of itself: versions, extensions, services, zones, pools; and what went wrong, in messages."""

import shutil
from collections.abc import Sequence

from kilonova.companions.volume import frame
from kilonova.companions.volume.frame import Collection, R, View
from kilonova.companions.volume.world import BACKEND, World
from kilonova.kit.clock import iso_us
from kilonova.kit.db import Tx
from kilonova.kit.errors import NotFound
from kilonova.kit.routes import Call
from kilonova.store import volumes as store
from kilonova.store.volumes import Message

# ---- versions

UPDATED = "2023-08-31T00:00:00Z"


def _version(call: Call) -> View:
    newest = f"{frame.VERSIONS.major}.{frame.VERSIONS.newest}"
    return {
        "id": "v3.0",
        "status": "CURRENT",
        "version": newest,
        "min_version": f"{frame.VERSIONS.major}.{frame.VERSIONS.oldest}",
        "updated": UPDATED,
        "links": [
            {"rel": "describedby", "type": "text/html", "href": "https://docs.openstack.org/"},
            {"rel": "self", "href": f"{call.url}/v3/"},
        ],
        "media-types": [{"base": "application/json", "type": "application/vnd.openstack.volume+json;version=3"}],
    }


@R.get("/", open=True, ok=300)
def versions(call: Call) -> View:
    return {"versions": [_version(call)]}


@R.get("/v3", open=True)
def version(call: Call) -> View:
    return {"versions": [_version(call)]}


@R.get("/v3/extensions")
def extensions(call: Call) -> View:
    return {"extensions": []}


# ---- services


def _services(world: World) -> list[View]:
    """They live in our own process, so they live when we do."""
    now = iso_us(world.clock.now())
    shown = [
        ("cinder-scheduler", world.host),
        ("cinder-volume", f"{world.host}@{BACKEND}"),
        ("cinder-backup", world.host),
    ]
    return [
        {
            "binary": binary,
            "host": host,
            "zone": world.config.availability_zone,
            "status": "enabled",
            "state": "up",
            "updated_at": now,
        }
        for binary, host in shown
    ]


@R.get("/v3/os-services", policy="volume_extension:services:index")
def services(call: Call) -> View:
    said = frame.asked(call)
    found = [
        s
        for s in _services(call.world)
        if said.get("binary", s["binary"]) == s["binary"] and said.get("host", s["host"]) == s["host"]
    ]
    for s in found:
        if s["binary"] == "cinder-volume":
            s |= {"replication_status": "disabled", "active_backend_id": None, "frozen": False}
        if call.version >= 7:
            s["cluster"] = None
        if call.version >= 49 and s["binary"] == "cinder-volume":
            s["backend_state"] = "up"
        s["disabled_reason"] = None
    return {"services": found}


@R.get("/v3/os-hosts", policy="volume_extension:hosts")
def hosts(call: Call) -> View:
    return {
        "hosts": [
            {
                "service-status": "available",
                "service": s["binary"],
                "zone": s["zone"],
                "service-state": "enabled",
                "host_name": s["host"],
                "last-update": s["updated_at"],
            }
            for s in _services(call.world)
        ]
    }


@R.get("/v3/os-availability-zone")
def zones(call: Call) -> View:
    zone = call.world.config.availability_zone
    return {"availabilityZoneInfo": [{"zoneName": zone, "zoneState": {"available": True}}]}


def _capacity(world: World) -> View:
    disk = shutil.disk_usage(world.bytes.directory)
    return {
        "volume_backend_name": BACKEND,
        "vendor_name": "Kilonova",
        "driver_version": "1.0",
        "storage_protocol": "local",
        "total_capacity_gb": disk.total >> 30,
        "free_capacity_gb": disk.free >> 30,
        "reserved_percentage": 0,
        "thin_provisioning_support": True,
        "multiattach": True,
        "QoS_support": False,
    }


@R.get("/v3/scheduler-stats/get_pools", policy="scheduler_extension:scheduler_stats:get_pools")
def pools(call: Call) -> View:
    pool: View = {"name": call.world.backend}
    if frame.asked(call).get("detail", "").lower() in ("true", "1"):
        pool["capabilities"] = _capacity(call.world)
    return {"pools": [pool]}


@R.get("/v3/capabilities/{host}", policy="volume_extension:capabilities")
def capabilities(call: Call, host: str) -> View:
    world = call.world
    if host not in (world.backend, world.host, f"{world.host}@{BACKEND}"):
        raise NotFound(f"Host {frame.plain(host)} could not be found.")
    about = _capacity(world)
    return {
        "namespace": f"OS::Storage::Capabilities::{world.host}@{BACKEND}",
        "vendor_name": about["vendor_name"],
        "volume_backend_name": BACKEND,
        "pool_name": BACKEND,
        "driver_version": about["driver_version"],
        "storage_protocol": about["storage_protocol"],
        "display_name": None,
        "description": None,
        "visibility": None,
        "replication_targets": [],
        "properties": {},
    }


@R.get("/v3/resource_filters", versions="3.33-")
def resource_filters(call: Call) -> View:
    wanted = frame.asked(call).get("resource")
    known = {
        "volume": ["name", "status", "metadata", "bootable", "migration_status", "availability_zone", "created_at"]
    }
    known |= {"snapshot": ["name", "status", "volume_id", "metadata"], "backup": ["name", "status", "volume_id"]}
    known |= {"attachment": ["volume_id", "instance_id", "status"], "message": ["resource_uuid", "resource_type"]}
    return {"resource_filters": [{"resource": r, "filters": f} for r, f in known.items() if wanted in (None, r)]}


# ---- messages: what went wrong, for whoever it happened to


def _missing(id: str) -> NotFound:
    return NotFound(f"Message {frame.plain(id)} could not be found.")


MESSAGES = Collection(
    "messages",
    Message,
    _missing,
    columns={
        "id": "id",
        "resource_uuid": "subject",
        "resource_type": "kind",
        "event_id": "event",
        "request_id": "request_id",
    },
)
KEPT_S = 30 * 86_400


def _message(call: Call, m: Message) -> View:
    return {
        "id": m.id,
        "request_id": m.request_id,
        "resource_type": m.kind,
        "resource_uuid": m.subject,
        "event_id": m.event,
        "message_level": "ERROR",
        "user_message": m.said,
        "created_at": iso_us(m.created_at),
        "guaranteed_until": iso_us(m.created_at + KEPT_S),
        "links": frame.link(call, "messages", m.id),
    }


@R.get("/v3/messages", versions="3.3-", policy="message:get_all")
def messages(call: Call) -> View:
    def shown(tx: Tx, world: World, found: Sequence[Message]) -> list[View]:
        return [_message(call, m) for m in found]

    return frame.listing(call, MESSAGES, shown)


@R.get("/v3/messages/{id}", versions="3.3-", policy="message:get", late=True)
def message(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        return {"message": _message(call, _got(call, tx, id, "message:get"))}


@R.delete("/v3/messages/{id}", versions="3.3-", ok=204, policy="message:delete", late=True)
def forget(call: Call, id: str) -> None:
    with call.world.db.tx() as tx:
        _got(call, tx, id, "message:delete")
        store.remove(tx, Message, id)


def _got(call: Call, tx: Tx, id: str, rule: str) -> Message:
    m = store.look(tx, Message, id)
    if m is None:
        call.checked = True
        raise _missing(id)
    frame.seen(call, m, _missing(id), "message:get", rule)
    return m
