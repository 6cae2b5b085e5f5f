"""The shared file systems API v2, as far as servers need it: shares, rules of access, locks. Small, real, replaceable.

    world = open_store(db, clock, ids, config.share, directory, authenticate=…)
    service = make_service(world, config.policy.file)
    recover(world)

A share is a directory of this machine, exported as `ADDRESS:/directory/ID`; hosts of this machine find it there.  Its
size is what its project is charged for; nothing holds who writes more.  Types, networks, servers, snapshots and replicas
of shares are not there: their addresses answer with 404.
"""

import re
import shutil
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated as A
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
from msgspec import UNSET, Meta, UnsetType

from kilonova.companions.trust import trusted
from kilonova.kit.clock import Clock, Ids, iso_us
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Conflict, Forbidden, Invalid, NotFound, OverQuota
from kilonova.kit.http import Dialect, Service, Versioned, compute_fault
from kilonova.kit.policy import Policy, Rule
from kilonova.kit.routes import Call, Context, Routes
from kilonova.model import options
from kilonova.store import filesystems as store
from kilonova.store.filesystems import LOCKS, RULES, SHARES, Access, FileSystem, Lock
from kilonova.store.volumes import charge, discharge

View = dict[str, Any]
R = Routes("share")
VERSIONS = Versioned(
    "shared-file-system", newest=82, oldest=45, default=45, old_header="X-OpenStack-Manila-API-Version"
)
DIALECT = Dialect(
    fault=compute_fault,
    statuses={OverQuota: 413},
    request_id_headers=("x-compute-request-id", "x-openstack-request-id"),
    strip_project=("/v2",),
    unexpected="The server has either erred or is incapable of performing the requested operation.",
)
ADMIN, READER = (
    "role:admin or role:service",
    "role:admin or role:service or (role:reader and project_id:%(project_id)s)",
)
MEMBER = "role:admin or role:service or (role:member and project_id:%(project_id)s)"
POLICY = [
    Rule("context_is_admin", "role:admin"),
    *(Rule(f"share:{what}", READER) for what in ("get", "get_all", "access_get", "access_get_all")),
    *(Rule(f"share:{what}", MEMBER) for what in ("create", "update", "delete", "allow_access", "deny_access")),
    *(Rule(f"share_export_location:{what}", READER) for what in ("index", "show")),
    *(Rule(f"resource_lock:{what}", READER) for what in ("get", "get_all")),
    *(Rule(f"resource_lock:{what}", MEMBER) for what in ("create", "update", "delete")),
    Rule("resource_lock:bypass_locked_show_action", ADMIN),
]
HIDDEN = "******"
MOST = 1000  # of a page
Text = A[str, Meta(max_length=255, pattern=r"\A[^\x00]*\Z")]
Metadata = dict[A[str, Meta(min_length=1, max_length=255)], A[str, Meta(max_length=1023)]]


@dataclass
class World:
    """`address` is what exports begin with: where this machine is."""

    db: Db
    clock: Clock
    ids: Ids
    config: options.Share
    directory: Path
    authenticate: Callable[[str], Context]
    address: str = "127.0.0.1"


def open_store(
    db: Db, clock: Clock, ids: Ids, config: options.Share, directory: Path, *, authenticate: Callable[[str], Context]
) -> World:
    """`directory` keeps the shares; it is made."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return World(db, clock, ids, config, directory.resolve(), authenticate)


def recover(world: World) -> list[str]:
    """At start-up, before anybody asks: directories without an owner go, and so do those of shares that are deleted."""
    with world.db.read() as tx:
        known = {s.id: s for s in store.find(tx, FileSystem)}
    loose = [d.name for d in world.directory.iterdir() if d.is_dir() and d.name not in known]
    for name in loose:
        shutil.rmtree(world.directory / name)
    for s in known.values():
        if s.status == "deleting":
            _gone(world, s)
        else:
            (world.directory / s.id).mkdir(exist_ok=True, mode=0o700)
    return loose


def make_service(world: World, policy_file: Path | None = None) -> Service:
    """The service as a WSGI application, to be mounted at `/share`."""
    policy = Policy(POLICY, policy_file)
    return Service(
        R, DIALECT, world=world, authenticate=world.authenticate, policy=policy, ids=world.ids, versions=VERSIONS
    )


# ---- versions


@R.get("/", open=True, ok=300)
def versions(call: Call) -> View:
    return {"versions": [_version(call)]}


@R.get("/v2", open=True)
def version(call: Call) -> View:
    return {"versions": [_version(call)]}


def _version(call: Call) -> View:
    return {
        "id": "v2.0",
        "status": "CURRENT",
        "version": f"2.{VERSIONS.newest}",
        "min_version": f"2.{VERSIONS.oldest}",
        "updated": "2024-05-02T00:00:00Z",
        "links": [{"rel": "self", "href": f"{call.url}/v2/"}],
        "media-types": [{"base": "application/json", "type": "application/vnd.openstack.share+json;version=1"}],
    }


# ---- shares


class Wish(msgspec.Struct):
    share_proto: A[str, Meta(pattern=r"\A(?i:nfs)\Z")]
    size: A[int, Meta(ge=1, le=1_000_000)]
    name: Text | None = None
    description: Text | None = None
    display_name: Text | None = None
    display_description: Text | None = None
    is_public: bool = False
    metadata: Metadata | None = None


class Body(msgspec.Struct):
    share: Wish


@R.post("/v2/shares", body=Body, policy="share:create")
def create(call: Call) -> View:
    """Its directory is made first: one without a share is found when the service starts, a share without one never is."""
    world, wish, now = call.world, call.body.share, call.world.clock.now()
    made = FileSystem(
        id=world.ids.uuid(),
        project_id=call.context.project_id or "",
        user_id=call.context.user_id,
        created_at=now,
        updated_at=now,
        size_gb=wish.size,
        proto=wish.share_proto.upper(),
        name=wish.name or wish.display_name,
        description=wish.description or wish.display_description,
        is_public=wish.is_public,
        metadata=wish.metadata or {},
    )
    (world.directory / made.id).mkdir(mode=0o700)
    try:
        with world.db.tx() as tx:
            charge(tx, made.project_id, "filesystems", 1, world.config.quota_shares)
            charge(tx, made.project_id, "filesystem_gigabytes", made.size_gb, world.config.quota_gigabytes)
            store.add(tx, made)
    except OverQuota as e:
        (world.directory / made.id).rmdir()
        what = "shares" if e.code == "filesystems" else "gigabytes"
        raise OverQuota(f"Requested share exceeds the allowed number of {what}.", code=e.code) from None
    return {"share": _view(call, made)}


@R.get("/v2/shares", policy="share:get_all")
def index(call: Call) -> View:
    return {"shares": [{"id": s.id, "name": s.name, "links": _links(call, s.id)} for s in _page(call)]}


@R.get("/v2/shares/detail", policy="share:get_all")
def detail(call: Call) -> View:
    return {"shares": [_view(call, s) for s in _page(call)]}


@R.get("/v2/shares/{id}", policy="share:get", late=True)
def show(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        return {"share": _view(call, _got(call, tx, id))}


class Change(msgspec.Struct):
    name: Text | None | UnsetType = UNSET
    description: Text | None | UnsetType = UNSET
    display_name: Text | None | UnsetType = UNSET
    display_description: Text | None | UnsetType = UNSET
    is_public: bool | UnsetType = UNSET


class ChangeBody(msgspec.Struct):
    share: Change


@R.put("/v2/shares/{id}", body=ChangeBody, policy="share:update", late=True)
def update(call: Call, id: str) -> View:
    said: Change = call.body.share
    wanted = [
        ("name", said.display_name),
        ("description", said.display_description),
        ("name", said.name),
        ("description", said.description),
        ("is_public", said.is_public),
    ]
    values = {name: value for name, value in wanted if value is not UNSET} | {"updated_at": call.world.clock.now()}
    with call.world.db.tx() as tx:
        share = _got(call, tx, id)
        store.change(tx, FileSystem, id, **values)
    return {"share": _view(call, msgspec.structs.replace(share, **values))}


@R.delete("/v2/shares/{id}", ok=202, policy="share:delete", late=True)
def delete(call: Call, id: str) -> None:
    world = call.world
    with world.db.tx() as tx:
        share = _got(call, tx, id)
        if locks := store.locks_of(tx, id, "delete"):
            said = ", ".join(x.id for x in locks)
            raise Conflict(f"Resource lock/s [{said}] prevent delete action.")
        store.change(tx, FileSystem, id, status="deleting", updated_at=world.clock.now())
    _gone(world, share)


def _gone(world: World, share: FileSystem) -> None:
    shutil.rmtree(world.directory / share.id, ignore_errors=True)
    with world.db.tx() as tx:
        if store.look(tx, FileSystem, share.id) is not None:
            store.remove(tx, FileSystem, SHARES.c.id == share.id)
            store.remove(tx, Access, RULES.c.share_id == share.id)
            discharge(tx, share.project_id, "filesystems")
            discharge(tx, share.project_id, "filesystem_gigabytes", share.size_gb)


def _got(call: Call, tx: Tx, id: str) -> FileSystem:
    """One that he may know of; policy is asked whether he may do this. What is public, all may see. Raises NotFound,
    Forbidden."""
    share = store.look(tx, FileSystem, id)
    about = {"project_id": share.project_id} if share else {}
    call.checked = True
    if share is None or not (share.is_public or call.may("share:get", about)):
        raise NotFound(f"Share {_plain(id)} could not be found.")
    if not (share.is_public and call.route.policy == "share:get"):
        call.check(about)
    return share


def _page(call: Call) -> list[FileSystem]:
    said, c = _asked(call), SHARES.c
    where: list[Any] = []
    if not (_true(said.get("all_tenants") or said.get("all_projects")) and trusted(call)):
        mine = c.project_id == (call.context.project_id or "-")
        where.append(mine | c.is_public if _true(said.get("is_public")) else mine)
    wanted = {"name": c.name, "status": c.status, "share_proto": c.proto, "project_id": c.project_id}
    where += [column == said[name] for name, column in wanted.items() if name in said]
    limit = min(MOST, _number(said, "limit", MOST))
    with call.world.db.read() as tx:
        return store.find(tx, FileSystem, *where, limit=limit, offset=_number(said, "offset", 0))


def _view(call: Call, s: FileSystem) -> View:
    return {
        "id": s.id,
        "size": s.size_gb,
        "availability_zone": "nova",
        "created_at": iso_us(s.created_at),
        "status": s.status,
        "name": s.name,
        "description": s.description,
        "project_id": s.project_id,
        "user_id": s.user_id,
        "snapshot_id": None,
        "share_network_id": None,
        "share_proto": s.proto,
        "metadata": s.metadata,
        "share_type": None,
        "share_type_name": None,
        "is_public": s.is_public,
        "task_state": None,
        "snapshot_support": False,
        "create_share_from_snapshot_support": False,
        "revert_to_snapshot_support": False,
        "mount_snapshot_support": False,
        "has_replicas": False,
        "replication_type": None,
        "share_group_id": None,
        "source_share_group_snapshot_member_id": None,
        "access_rules_status": "active",
        "progress": "100%",
        "is_soft_deleted": False,
        "scheduled_to_be_deleted_at": None,
        "links": _links(call, s.id),
    }


def _links(call: Call, id: str) -> list[View]:
    return [
        {"rel": "self", "href": f"{call.url}/v2/shares/{id}"},
        {"rel": "bookmark", "href": f"{call.url}/shares/{id}"},
    ]


# ---- where its bytes are


@R.get("/v2/shares/{id}/export_locations", policy="share_export_location:index", late=True)
def exports(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        return {"export_locations": [_export(call.world, _got(call, tx, id))]}


@R.get("/v2/shares/{id}/export_locations/{way}", policy="share_export_location:show", late=True)
def export(call: Call, id: str, way: str) -> View:
    with call.world.db.read() as tx:
        share = _got(call, tx, id)
    if way != share.id:
        raise NotFound(f"Export location '{_plain(way)}' could not be found.")
    return {"export_location": _export(call.world, share)}


def _export(world: World, s: FileSystem) -> View:
    """There is one, so it is called as its share."""
    path = f"{world.address}:{world.directory / s.id}"
    return {
        "id": s.id,
        "path": path,
        "preferred": True,
        "is_admin_only": False,
        "share_instance_id": s.id,
        "created_at": iso_us(s.created_at),
        "updated_at": None,
        "metadata": {},
    }


# ---- who may reach it


class Allow(msgspec.Struct):
    access_type: Literal["ip", "user", "cert", "cephx"]
    access_to: A[str, Meta(min_length=1, max_length=255, pattern=r"\A[^\x00]*\Z")]
    access_level: Literal["rw", "ro"] = "rw"
    metadata: Metadata | None = None
    lock_visibility: bool = False
    lock_deletion: bool = False
    lock_reason: A[str, Meta(max_length=1023)] | None = None


@R.post("/v2/shares/{id}/action", action="allow_access", body=Allow, policy="share:allow_access", late=True)
def allow(call: Call, id: str) -> View:
    wish: Allow = call.body
    world, now = call.world, call.world.clock.now()
    made = Access(
        id=world.ids.uuid(),
        share_id=id,
        created_at=now,
        kind=wish.access_type,
        who=wish.access_to,
        level=wish.access_level,
        metadata=wish.metadata or {},
    )
    held = [("show", wish.lock_visibility), ("delete", wish.lock_deletion)]
    try:
        with world.db.tx() as tx:
            _got(call, tx, id)
            store.add(tx, made)
            for action in (a for a, wanted in held if wanted):
                store.add(tx, _lock(call, made.id, "access_rule", action, wish.lock_reason))
            return {"access": _rule(call, tx, made)}
    except sa.exc.IntegrityError as e:
        raise Invalid(f"Share access {wish.access_type}:{_plain(wish.access_to)} exists.", why=str(e)) from None


class Deny(msgspec.Struct):
    access_id: str
    unrestrict: bool = False


@R.post("/v2/shares/{id}/action", action="deny_access", body=Deny, ok=202, policy="share:deny_access", late=True)
def deny(call: Call, id: str) -> None:
    """A rule that somebody locked goes only with his own word for it: `unrestrict`."""
    wish: Deny = call.body
    with call.world.db.tx() as tx:
        _got(call, tx, id)
        rule = store.look(tx, Access, wish.access_id)
        if rule is None or rule.share_id != id:
            raise NotFound(f"Share access {_plain(wish.access_id)} could not be found.")
        locks = store.locks_of(tx, rule.id, "delete")
        if locks and not (wish.unrestrict and all(_his(call, x) for x in locks)):
            raise Forbidden("The access rule is locked: it cannot be taken back.")
        store.remove(tx, Lock, LOCKS.c.resource == rule.id)
        store.remove(tx, Access, RULES.c.id == rule.id)


@R.get("/v2/share-access-rules", policy="share:access_get_all", late=True)
def rules(call: Call) -> View:
    id = _asked(call).get("share_id", "")
    with call.world.db.read() as tx:
        _got(call, tx, id)
        return {"access_list": [_rule(call, tx, r) for r in store.find(tx, Access, RULES.c.share_id == id)]}


@R.get("/v2/share-access-rules/{id}", policy="share:access_get", late=True)
def rule(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        found = store.look(tx, Access, id)
        if found is None:
            call.checked = True
            raise NotFound(f"Share access {_plain(id)} could not be found.")
        _got(call, tx, found.share_id)
        return {"access": _rule(call, tx, found)}


def _rule(call: Call, tx: Tx, r: Access) -> View:
    seen = all(_his(call, x) for x in store.locks_of(tx, r.id, "show"))
    return {
        "id": r.id,
        "share_id": r.share_id,
        "access_type": r.kind,
        "access_to": r.who if seen else HIDDEN,
        "access_level": r.level,
        "access_key": None,
        "state": "active",
        "metadata": r.metadata,
        "created_at": iso_us(r.created_at),
        "updated_at": None,
    }


# ---- what must not be done


class LockWish(msgspec.Struct):
    resource_id: A[str, Meta(min_length=1, max_length=36)]
    resource_type: Literal["share"] = "share"
    resource_action: Literal["delete"] = "delete"
    lock_reason: A[str, Meta(max_length=1023)] | None = None


class LockBody(msgspec.Struct):
    resource_lock: LockWish


@R.post("/v2/resource-locks", versions="2.81-", body=LockBody, policy="resource_lock:create", late=True)
def lock(call: Call) -> View:
    wish: LockWish = call.body.resource_lock
    with call.world.db.tx() as tx:
        _got(call, tx, wish.resource_id)
        made = _lock(call, wish.resource_id, "share", wish.resource_action, wish.lock_reason)
        store.add(tx, made)
    return {"resource_lock": _lock_view(made)}


@R.get("/v2/resource-locks", versions="2.81-", policy="resource_lock:get_all")
def locks(call: Call) -> View:
    said, c = _asked(call), LOCKS.c
    everybodys = _true(said.get("all_projects")) and trusted(call)
    where: list[Any] = [] if everybodys else [c.project_id == (call.context.project_id or "-")]
    wanted = {"resource_id": c.resource, "resource_type": c.kind, "resource_action": c.action, "lock_reason": c.reason}
    wanted |= {"lock_context": c.context, "user_id": c.user_id}
    where += [column == said[name] for name, column in wanted.items() if name in said]
    limit = min(MOST, _number(said, "limit", MOST))
    with call.world.db.read() as tx:
        found = store.find(tx, Lock, *where, limit=limit, offset=_number(said, "offset", 0))
    return {"resource_locks": [_lock_view(x) for x in found]}


@R.get("/v2/resource-locks/{id}", versions="2.81-", policy="resource_lock:get", late=True)
def show_lock(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        return {"resource_lock": _lock_view(_got_lock(call, tx, id))}


@R.delete("/v2/resource-locks/{id}", versions="2.81-", ok=204, policy="resource_lock:delete", late=True)
def unlock(call: Call, id: str) -> None:
    with call.world.db.tx() as tx:
        found = _got_lock(call, tx, id)
        if not _his(call, found):
            raise Forbidden(f"Resource lock {found.id} is not yours to remove.")
        store.remove(tx, Lock, LOCKS.c.id == id)


def _lock(call: Call, resource: str, kind: str, action: str, reason: str | None) -> Lock:
    return Lock(
        id=call.world.ids.uuid(),
        project_id=call.context.project_id or "",
        user_id=call.context.user_id,
        created_at=call.world.clock.now(),
        resource=resource,
        kind=kind,
        action=action,
        context="service" if "service" in call.context.roles else "admin" if call.context.is_admin else "user",
        reason=reason,
    )


def _got_lock(call: Call, tx: Tx, id: str) -> Lock:
    found = store.look(tx, Lock, id)
    about = {"project_id": found.project_id} if found else {}
    call.checked = True
    if found is None or not call.may("resource_lock:get", about):
        raise NotFound(f"Resource lock {_plain(id)} could not be found.")
    call.check(about)
    return found


def _his(call: Call, lock: Lock) -> bool:
    """May he see, or do, what this forbids to others? What a service locked is the services' matter, and the operator's."""
    return lock.user_id == call.context.user_id or trusted(call)


def _lock_view(x: Lock) -> View:
    return {
        "id": x.id,
        "user_id": x.user_id,
        "project_id": x.project_id,
        "lock_context": x.context,
        "resource_type": x.kind,
        "resource_id": x.resource,
        "resource_action": x.action,
        "lock_reason": x.reason,
        "created_at": iso_us(x.created_at),
        "updated_at": None,
        "links": [],
    }


# ---- what handlers share


def _asked(call: Call) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(call.raw_query, keep_blank_values=True))


def _true(said: str | None) -> bool:
    return (said or "").lower() in ("true", "1", "yes", "on", "t", "y")


def _number(said: dict[str, str], name: str, default: int) -> int:
    text = said.get(name) or str(default)
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Invalid(f"Invalid input received: {name} must be an integer.")
    return int(text)


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:255]


__all__ = ["World", "make_service", "open_store", "recover"]
