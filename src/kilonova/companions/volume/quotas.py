"""Shares: how many volumes, snapshots and backups a project may have, and how many gigabytes."""

from typing import Annotated as A
from typing import Any

import msgspec
from msgspec import Meta

from kilonova.companions.volume import frame
from kilonova.companions.volume.frame import R, View
from kilonova.companions.volume.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Forbidden, Invalid, OverQuota
from kilonova.kit.routes import Call
from kilonova.store import volumes as store

COUNTED = ("volumes", "gigabytes", "snapshots", "backups", "backup_gigabytes")
NAMES = (*COUNTED, "per_volume_gigabytes", "groups")
CLASS = "default"  # of shares: what holds for who has none of his own; kept under a project's name that none has
OF_ALL = "%default"

# fmt: off
SAID = {
    "volumes":          "Maximum number of volumes allowed ({limit}) exceeded for quota 'volumes'.",
    "gigabytes":        "Requested volume or snapshot exceeds allowed gigabytes quota. Requested {n}G, quota is {limit}G and {used}G has been consumed.",
    "snapshots":        "Maximum number of snapshots allowed ({limit}) exceeded",
    "backups":          "Maximum number of backups allowed ({limit}) exceeded",
    "backup_gigabytes": "Requested backup exceeds allowed Backup gigabytes quota. Requested {n}G, quota is {limit}G and {used}G has been consumed.",
}
# fmt: on


def standard(tx: Tx, world: World) -> dict[str, int]:
    """Limits of a project that was given none."""
    c = world.config
    own = store.shares(tx, OF_ALL)
    configured = {
        "volumes": c.quota_volumes,
        "gigabytes": c.quota_gigabytes,
        "snapshots": c.quota_snapshots,
        "backups": c.quota_backups,
        "backup_gigabytes": c.quota_backup_gigabytes,
        "per_volume_gigabytes": c.quota_per_volume_gigabytes,
        "groups": 0,
    }
    return {r: n if r not in own or own[r].limit is None else int(own[r].limit or 0) for r, n in configured.items()}


def limits(tx: Tx, world: World, project: str) -> dict[str, int]:
    own = store.shares(tx, project)
    return {
        r: n if r not in own or own[r].limit is None else int(own[r].limit or 0) for r, n in standard(tx, world).items()
    }


def charge(tx: Tx, world: World, project: str, **wanted: int) -> None:
    """Take so much of the project's share. Raises OverQuota."""
    known = standard(tx, world)
    size = wanted.get("gigabytes", 0)
    most = limits(tx, world, project)["per_volume_gigabytes"]
    if "volumes" in wanted and 0 <= most < size:
        raise OverQuota(f"Requested volume size {size} is larger than maximum allowed limit {most}.")
    for resource, n in wanted.items():
        try:
            store.charge(tx, project, resource, n, known[resource])
        except OverQuota as e:
            now = store.shares(tx, project).get(resource)
            limit = limits(tx, world, project)[resource]
            said = SAID[resource].format(limit=limit, n=n, used=now.used if now else 0)
            raise OverQuota(said, code=e.code) from None


def discharge(tx: Tx, project: str, **given: int) -> None:
    for resource, n in given.items():
        store.discharge(tx, project, resource, n)


# ---- routes

Limit = A[int, Meta(ge=-1, le=2**31 - 1)]


class QuotaChange(msgspec.Struct, kw_only=True):
    volumes: Limit | None = None
    gigabytes: Limit | None = None
    snapshots: Limit | None = None
    backups: Limit | None = None
    backup_gigabytes: Limit | None = None
    per_volume_gigabytes: Limit | None = None
    groups: Limit | None = None


class QuotaBody(msgspec.Struct):
    quota_set: QuotaChange


class ClassBody(msgspec.Struct):
    quota_class_set: QuotaChange


def _mine(call: Call, project: str) -> str:
    """Everybody sees his own; an admin everyone's."""
    call.check({"project_id": project})
    if not 0 < len(project) <= 255 or "\x00" in project or project == OF_ALL:
        raise Invalid("Invalid input received: that is no project.")
    if project != call.context.project_id and not call.context.is_admin:
        raise Forbidden("Policy doesn't allow this to be shown of another project.")
    return project


def _set(tx: Tx, world: World, project: str, usage: bool) -> dict[str, Any]:
    most, own = limits(tx, world, project), store.shares(tx, project)
    kinds = [t.name for t in store.find(tx, store.Type)]
    shown: dict[str, Any] = most | {
        f"{r}_{k}": store.UNLIMITED for k in kinds for r in ("volumes", "gigabytes", "snapshots")
    }
    if not usage:
        return shown
    used = {r: own[r].used if r in own else 0 for r in COUNTED}
    return {r: {"limit": n, "in_use": used.get(r, 0), "reserved": 0} for r, n in shown.items()}


@R.get("/v3/os-quota-sets/{project}", policy="volume_extension:quotas:show", late=True)
def show(call: Call, project: str) -> View:
    id = _mine(call, project)
    usage = frame.asked(call).get("usage", "").lower() in ("true", "1")
    with call.world.db.read() as tx:
        return {"quota_set": {"id": id, **_set(tx, call.world, id, usage)}}


@R.get("/v3/os-quota-sets/{project}/defaults", policy="volume_extension:quotas:show", late=True)
def defaults(call: Call, project: str) -> View:
    id = _mine(call, project)
    with call.world.db.read() as tx:
        return {"quota_set": {"id": id, **standard(tx, call.world)}}


@R.put("/v3/os-quota-sets/{project}", body=QuotaBody, policy="volume_extension:quotas:update", late=True)
def update(call: Call, project: str) -> View:
    id = _mine(call, project)
    told = {k: v for k, v in msgspec.structs.asdict(call.body.quota_set).items() if v is not None}
    with call.world.db.tx() as tx:
        for resource, limit in told.items():
            store.limit(tx, id, resource, limit)
        return {"quota_set": _set(tx, call.world, id, False)}


@R.delete("/v3/os-quota-sets/{project}", policy="volume_extension:quotas:delete", late=True)
def delete(call: Call, project: str) -> None:
    """Back to what everybody has."""
    id = _mine(call, project)
    with call.world.db.tx() as tx:
        store.unlimit(tx, id)


@R.get("/v3/os-quota-class-sets/{name}", policy="volume_extension:quota_classes:get")
def show_class(call: Call, name: str) -> View:
    with call.world.db.read() as tx:
        return {"quota_class_set": {"id": frame.plain(name), **standard(tx, call.world)}}


@R.put("/v3/os-quota-class-sets/{name}", body=ClassBody, policy="volume_extension:quota_classes:get")
def update_class(call: Call, name: str) -> View:
    if name != CLASS:
        raise Invalid(f"Invalid input received: the one class of shares is '{CLASS}'.")
    told = {k: v for k, v in msgspec.structs.asdict(call.body.quota_class_set).items() if v is not None}
    with call.world.db.tx() as tx:
        for resource, limit in told.items():
            store.limit(tx, OF_ALL, resource, limit)
        return {"quota_class_set": standard(tx, call.world)}


@R.get("/v3/limits", policy="limits_extension:used_limits", late=True)
def shown_limits(call: Call) -> View:
    wanted = frame.asked(call).get("project_id") or frame.asked(call).get("tenant_id")
    project = wanted if wanted and call.version >= 39 and call.context.is_admin else call.context.project_id or ""
    call.check({"project_id": project})
    with call.world.db.read() as tx:
        most, own = limits(tx, call.world, project), store.shares(tx, project)
    used = {r: own[r].used if r in own else 0 for r in COUNTED}
    absolute = {
        "maxTotalVolumes": most["volumes"],
        "maxTotalVolumeGigabytes": most["gigabytes"],
        "maxTotalSnapshots": most["snapshots"],
        "maxTotalBackups": most["backups"],
        "maxTotalBackupGigabytes": most["backup_gigabytes"],
        "totalVolumesUsed": used["volumes"],
        "totalGigabytesUsed": used["gigabytes"],
        "totalSnapshotsUsed": used["snapshots"],
        "totalBackupsUsed": used["backups"],
        "totalBackupGigabytesUsed": used["backup_gigabytes"],
    }
    return {"limits": {"rate": [], "absolute": absolute}}
