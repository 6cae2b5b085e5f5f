"""Who there is, and where: users, projects, domains, groups."""

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kilonova.companions.login import Door
from kilonova.companions.realm import (
    Filter,
    Id,
    Name,
    R,
    Text,
    changing,
    domain_asked,
    domain_there,
    flag,
    given,
    looking,
    merged,
    no_move,
    own_domain,
    page,
    self_link,
    theirs,
    wish,
)
from kilonova.companions.tokens import REFUSED
from kilonova.kit.db import Tx
from kilonova.kit.errors import Forbidden, Invalid, NotFound, Unknown
from kilonova.kit.routes import Call
from kilonova.store import identity as store
from kilonova.store.identity import Group, Project, User

# ---- users


class UserWish(msgspec.Struct, kw_only=True):
    name: Name
    domain_id: Id | None = None
    password: str | None = None
    enabled: bool = True
    default_project_id: Id | None = None
    description: Text | None = None
    options: dict[str, Any] = {}


class UserChange(msgspec.Struct, kw_only=True):
    name: Name | UnsetType = UNSET
    domain_id: str | UnsetType = UNSET
    password: str | None | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    default_project_id: Id | None | UnsetType = UNSET
    description: Text | None | UnsetType = UNSET
    options: dict[str, Any] | UnsetType = UNSET
    original_password: str | UnsetType = UNSET


class UserBody(msgspec.Struct):
    user: dict[str, Any]


@R.get("/v3/users", query=Filter, policy="identity:list_users", late=True)
def list_users(call: Call) -> Any:
    domain = domain_asked(call)
    call.check({"target.domain_id": domain or "-"})
    with looking(call) as tx:
        found = store.find(tx, User, name=call.query.name, domain_id=domain, enabled=flag(call.query.enabled))
    return page(call, "users", [_user(call, u) for u in found])


@R.post("/v3/users", body=UserBody, ok=201, policy="identity:create_user", late=True)
def create_user(call: Call) -> Any:
    known, extra = wish(call.body.user, UserWish)
    domain = known.domain_id or own_domain(call)
    call.check({"target.user.domain_id": domain})
    user = User(
        id=call.world.door.ids.hex(),
        name=known.name,
        domain_id=domain,
        enabled=known.enabled,
        secret=call.world.door.passwords.hash(known.password) if known.password is not None else "",
        default_project_id=known.default_project_id,
        description=known.description or "",
        extra=extra,
    )
    with changing(call) as tx:
        domain_there(tx, domain)
        store.keep(tx, user)
    return {"user": _user(call, user)}


@R.get("/v3/users/{id}", policy="identity:get_user", late=True)
def show_user(call: Call, id: str) -> Any:
    return {"user": _user(call, theirs(call, User, "user", id))}


@R.patch("/v3/users/{id}", body=UserBody, policy="identity:update_user", late=True)
def update_user(call: Call, id: str) -> Any:
    old = theirs(call, User, "user", id)
    known, extra = wish(call.body.user, UserChange)
    no_move(known.domain_id, old.domain_id)
    values = {
        k: v for k, v in given(known).items() if k not in ("password", "options", "domain_id", "original_password")
    }
    if "description" in values:
        values["description"] = values["description"] or ""
    values["extra"] = merged(old.extra, extra)
    if isinstance(known.password, str):
        values["secret"] = call.world.door.passwords.hash(known.password)
    elif known.password is None:
        values["secret"] = ""
    if "secret" in values or known.enabled is False:
        values["valid_since"] = call.world.door.clock.now()
    with changing(call) as tx:
        return {"user": _user(call, store.change(tx, User, id, values))}


@R.delete("/v3/users/{id}", ok=204, policy="identity:delete_user", late=True)
def delete_user(call: Call, id: str) -> None:
    theirs(call, User, "user", id)
    with changing(call) as tx:
        store.drop_user(tx, id)


class PasswordChange(msgspec.Struct):
    original_password: str
    password: str


class PasswordBody(msgspec.Struct):
    user: PasswordChange


@R.post("/v3/users/{id}/password", body=PasswordBody, ok=204, open=True)
def change_password(call: Call, id: str) -> None:
    """The old password is the proof, so no token is needed; it is counted like any other try."""
    door: Door = call.world.door
    with looking(call) as tx:
        user = store.look(tx, User, id)
    said: PasswordChange = call.body.user
    if door.guesses.locked(id):
        raise Unknown(REFUSED, why=f"user {id}: too many wrong passwords")
    if not door.passwords.right(said.original_password, user.secret if user else None) or not user or not user.enabled:
        door.guesses.wrong(id)
        raise Unknown(REFUSED, why=f"user {id}: wrong password")
    door.guesses.right(id)
    secret = door.passwords.hash(said.password)
    with changing(call) as tx:
        store.change(tx, User, id, {"secret": secret, "valid_since": door.clock.now()})


@R.get("/v3/users/{id}/projects", policy="identity:list_user_projects", late=True)
def user_projects(call: Call, id: str) -> Any:
    theirs(call, User, "user", id)
    with looking(call) as tx:
        return page(call, "projects", [_project(call, p) for p in _places(tx, id, "project")])


@R.get("/v3/users/{id}/groups", policy="identity:list_groups_for_user", late=True)
def user_groups(call: Call, id: str) -> Any:
    theirs(call, User, "user", id)
    with looking(call) as tx:
        return page(call, "groups", [_group(call, g) for g in store.groups_of(tx, id)])


def _user(call: Call, u: User) -> dict[str, Any]:
    said = {
        **u.extra,
        "id": u.id,
        "name": u.name,
        "domain_id": u.domain_id,
        "enabled": u.enabled,
        "options": {},
        "password_expires_at": None,
    }
    if u.description:
        said["description"] = u.description
    if u.default_project_id:
        said["default_project_id"] = u.default_project_id
    return said | self_link(call, "users", u.id)


# ---- projects


class ProjectWish(msgspec.Struct, kw_only=True):
    name: Annotated[
        str, Meta(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]*[^\x00-\x20\x7f][^\x00-\x1f\x7f]*$")
    ]
    domain_id: Id | None = None
    parent_id: Id | None = None
    is_domain: bool = False
    enabled: bool = True
    description: Text | None = None
    tags: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[^,/]*$")]], Meta(max_length=80)
    ] = []
    options: dict[str, Any] = {}


class ProjectChange(msgspec.Struct, kw_only=True):
    name: Name | UnsetType = UNSET
    domain_id: str | None | UnsetType = UNSET
    parent_id: str | None | UnsetType = UNSET
    is_domain: bool | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    description: Text | None | UnsetType = UNSET
    tags: list[str] | UnsetType = UNSET
    options: dict[str, Any] | UnsetType = UNSET


class ProjectBody(msgspec.Struct):
    project: dict[str, Any]


@R.get("/v3/projects", query=Filter, policy="identity:list_projects", late=True)
def list_projects(call: Call) -> Any:
    domain = domain_asked(call)
    call.check({"target.domain_id": domain or "-"})
    q: Filter = call.query
    about = {"name": q.name, "domain_id": domain, "enabled": flag(q.enabled), "parent_id": q.parent_id}
    with looking(call) as tx:
        if flag(q.is_domain):
            return page(
                call, "projects", [_project(call, p) for p in store.find(tx, Project, is_domain=True, name=q.name)]
            )
        found = store.find(tx, Project, is_domain=False, **about)
    return page(call, "projects", [_project(call, p) for p in found])


@R.post("/v3/projects", body=ProjectBody, ok=201, policy="identity:create_project", late=True)
def create_project(call: Call) -> Any:
    known, extra = wish(call.body.project, ProjectWish)
    domain = known.domain_id or own_domain(call)
    call.check({"target.project.domain_id": domain, "target.project.id": "-"})
    if known.is_domain:
        raise Invalid("Projects that act as domains are made by POST /v3/domains.")
    project = Project(
        id=call.world.door.ids.hex(),
        name=known.name,
        domain_id=domain,
        parent_id=known.parent_id or domain,
        enabled=known.enabled,
        description=known.description or "",
        tags=sorted(set(known.tags)),
        extra=extra,
    )
    with changing(call) as tx:
        domain_there(tx, domain)
        if project.parent_id != domain:
            parent = store.look(tx, Project, project.parent_id)
            if parent is None or parent.domain_id != domain:
                raise NotFound(f"Could not find project: {project.parent_id}.")
        store.keep(tx, project)
    return {"project": _project(call, project)}


@R.get("/v3/projects/{id}", policy="identity:get_project", late=True)
def show_project(call: Call, id: str) -> Any:
    return {"project": _project(call, theirs(call, Project, "project", id))}


@R.patch("/v3/projects/{id}", body=ProjectBody, policy="identity:update_project", late=True)
def update_project(call: Call, id: str) -> Any:
    old = theirs(call, Project, "project", id)
    known, extra = wish(call.body.project, ProjectChange)
    no_move(known.domain_id, old.domain_id)
    if known.parent_id not in (UNSET, old.parent_id) or known.is_domain not in (UNSET, False):
        raise Forbidden("A project stays where it is.")
    values = {k: v for k, v in given(known).items() if k in ("name", "enabled", "description", "tags")}
    if "description" in values:
        values["description"] = values["description"] or ""
    values["extra"] = merged(old.extra, extra)
    with changing(call) as tx:
        return {"project": _project(call, store.change(tx, Project, id, values))}


@R.delete("/v3/projects/{id}", ok=204, policy="identity:delete_project", late=True)
def delete_project(call: Call, id: str) -> None:
    theirs(call, Project, "project", id)
    with changing(call) as tx:
        if store.find(tx, Project, parent_id=id):
            raise Forbidden(f"Cannot delete the project {id} since it is not a leaf in the hierarchy.")
        store.drop_project(tx, id)


def _project(call: Call, p: Project) -> dict[str, Any]:
    return {
        **p.extra,
        "id": p.id,
        "name": p.name,
        "domain_id": p.domain_id or None,
        "parent_id": p.parent_id or None,
        "is_domain": p.is_domain,
        "enabled": p.enabled,
        "description": p.description,
        "tags": p.tags,
        "options": {},
    } | self_link(call, "projects", p.id)


# ---- domains


class DomainBody(msgspec.Struct):
    domain: dict[str, Any]


@R.get("/v3/domains", query=Filter, policy="identity:list_domains")
def list_domains(call: Call) -> Any:
    with looking(call) as tx:
        found = store.find(tx, Project, is_domain=True, name=call.query.name, enabled=flag(call.query.enabled))
    return page(call, "domains", [_domain(call, d) for d in found])


@R.post("/v3/domains", body=DomainBody, ok=201, policy="identity:create_domain")
def create_domain(call: Call) -> Any:
    known, extra = wish(call.body.domain, ProjectWish)
    domain = Project(
        id=call.world.door.ids.hex(),
        name=known.name,
        is_domain=True,
        enabled=known.enabled,
        description=known.description or "",
        tags=sorted(set(known.tags)),
        extra=extra,
    )
    with changing(call) as tx:
        store.keep(tx, domain)
    return {"domain": _domain(call, domain)}


@R.get("/v3/domains/{id}", policy="identity:get_domain", late=True)
def show_domain(call: Call, id: str) -> Any:
    call.check({"target.domain.id": id})
    with looking(call) as tx:
        return {"domain": _domain(call, domain_there(tx, id))}


@R.patch("/v3/domains/{id}", body=DomainBody, policy="identity:update_domain")
def update_domain(call: Call, id: str) -> Any:
    known, extra = wish(call.body.domain, ProjectChange)
    values = {k: v for k, v in given(known).items() if k in ("name", "enabled", "description", "tags")}
    if "description" in values:
        values["description"] = values["description"] or ""
    with changing(call) as tx:
        old = domain_there(tx, id)
        values["extra"] = merged(old.extra, extra)
        return {"domain": _domain(call, store.change(tx, Project, id, values))}


@R.delete("/v3/domains/{id}", ok=204, policy="identity:delete_domain")
def delete_domain(call: Call, id: str) -> None:
    with changing(call) as tx:
        domain = domain_there(tx, id)
        if id == "default":
            raise Forbidden("The default domain cannot be deleted.")
        if domain.enabled:
            raise Forbidden("Cannot delete a domain that is enabled, please disable it first.")
        store.drop_domain(tx, id)


def _domain(call: Call, d: Project) -> dict[str, Any]:
    return {
        **d.extra,
        "id": d.id,
        "name": d.name,
        "enabled": d.enabled,
        "description": d.description,
        "tags": d.tags,
        "options": {},
    } | self_link(call, "domains", d.id)


# ---- groups


class GroupWish(msgspec.Struct, kw_only=True):
    name: Name
    domain_id: Id | None = None
    description: Text | None = None


class GroupChange(msgspec.Struct, kw_only=True):
    name: Name | UnsetType = UNSET
    domain_id: str | UnsetType = UNSET
    description: Text | None | UnsetType = UNSET


class GroupBody(msgspec.Struct):
    group: dict[str, Any]


@R.get("/v3/groups", query=Filter, policy="identity:list_groups", late=True)
def list_groups(call: Call) -> Any:
    domain = domain_asked(call)
    call.check({"target.domain_id": domain or "-"})
    with looking(call) as tx:
        found = store.find(tx, Group, name=call.query.name, domain_id=domain)
    return page(call, "groups", [_group(call, g) for g in found])


@R.post("/v3/groups", body=GroupBody, ok=201, policy="identity:create_group", late=True)
def create_group(call: Call) -> Any:
    known, extra = wish(call.body.group, GroupWish)
    domain = known.domain_id or own_domain(call)
    call.check({"target.group.domain_id": domain})
    group = Group(call.world.door.ids.hex(), known.name, domain, known.description or "", extra)
    with changing(call) as tx:
        domain_there(tx, domain)
        store.keep(tx, group)
    return {"group": _group(call, group)}


@R.get("/v3/groups/{id}", policy="identity:get_group", late=True)
def show_group(call: Call, id: str) -> Any:
    return {"group": _group(call, theirs(call, Group, "group", id))}


@R.patch("/v3/groups/{id}", body=GroupBody, policy="identity:update_group", late=True)
def update_group(call: Call, id: str) -> Any:
    old = theirs(call, Group, "group", id)
    known, extra = wish(call.body.group, GroupChange)
    no_move(known.domain_id, old.domain_id)
    values = {k: v or "" for k, v in given(known).items() if k in ("name", "description")}
    values["extra"] = merged(old.extra, extra)
    with changing(call) as tx:
        return {"group": _group(call, store.change(tx, Group, id, values))}


@R.delete("/v3/groups/{id}", ok=204, policy="identity:delete_group", late=True)
def delete_group(call: Call, id: str) -> None:
    theirs(call, Group, "group", id)
    with changing(call) as tx:
        store.drop_group(tx, id)


@R.get("/v3/groups/{id}/users", policy="identity:list_users_in_group", late=True)
def group_users(call: Call, id: str) -> Any:
    theirs(call, Group, "group", id)
    with looking(call) as tx:
        return page(call, "users", [_user(call, u) for u in store.members(tx, id)])


@R.put("/v3/groups/{id}/users/{user}", ok=204, policy="identity:add_user_to_group", late=True)
def join_group(call: Call, id: str, user: str) -> None:
    _group_and_user(call, id, user)
    with changing(call) as tx:
        store.join(tx, id, user)


@R.head("/v3/groups/{id}/users/{user}", ok=204, policy="identity:check_user_in_group", late=True)
def in_group(call: Call, id: str, user: str) -> None:
    _group_and_user(call, id, user)
    with looking(call) as tx:
        if not store.joined(tx, id, user):
            raise NotFound(f"User {user} not found in group {id}.")


@R.delete("/v3/groups/{id}/users/{user}", ok=204, policy="identity:remove_user_from_group", late=True)
def leave_group(call: Call, id: str, user: str) -> None:
    _group_and_user(call, id, user)
    with changing(call) as tx:
        if not store.leave(tx, id, user):
            raise NotFound(f"User {user} not found in group {id}.")


def _group_and_user(call: Call, group_id: str, user_id: str) -> None:
    with looking(call) as tx:
        group, user = store.look(tx, Group, group_id), store.look(tx, User, user_id)
    target = {
        "target.group.domain_id": group.domain_id if group else "-",
        "target.user.domain_id": user.domain_id if user else "-",
        "target.user.id": user_id,
    }
    call.check(target)
    if group is None:
        raise NotFound(f"Could not find group: {group_id}.")
    if user is None:
        raise NotFound(f"Could not find user: {user_id}.")


def _group(call: Call, g: Group) -> dict[str, Any]:
    said = {**g.extra, "id": g.id, "name": g.name, "domain_id": g.domain_id, "description": g.description}
    return said | self_link(call, "groups", g.id)


# ---- where the caller himself may go


@R.get("/v3/auth/projects")
def my_projects(call: Call) -> Any:
    with looking(call) as tx:
        return page(call, "projects", [_project(call, p) for p in _places(tx, call.context.user_id, "project")])


@R.get("/v3/auth/domains")
def my_domains(call: Call) -> Any:
    with looking(call) as tx:
        return page(call, "domains", [_domain(call, d) for d in _places(tx, call.context.user_id, "domain")])


@R.get("/v3/auth/system")
def my_system(call: Call) -> Any:
    with looking(call) as tx:
        mine = store.held(tx, call.context.user_id, "system")
    return {"system": [{"all": True}] if mine else []} | self_link(call, "auth", "system")


def _places(tx: Tx, user_id: str, kind: str) -> list[Project]:
    ids = {g.target_id for g in store.held(tx, user_id, kind)}
    return [p for p in store.find(tx, Project, id=ids) if p.enabled] if ids else []
