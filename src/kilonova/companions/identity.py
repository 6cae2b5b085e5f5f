"""The Identity API v3: tokens, users, projects, domains, groups, roles and who has them.

`open_realm` gives the world, `bootstrap` the first rows, `service` the WSGI application.  The catalog and the
smaller things (application credentials, EC2 keys, limits) are in `catalog.py` and `accounts.py`.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

import kilonova.companions.accounts  # noqa: F401 — its routes are registered by being imported
from kilonova.companions import catalog
from kilonova.companions.login import EXPIRED_FOR_S, Auth, Door, Gate, Seen, described, issue, log_in
from kilonova.companions.realm import RULES, R, World, changing, flag, given, looking, page, self_link, wish
from kilonova.companions.tokens import REFUSED, Guesses, Keys, Passwords, kept_secret
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Forbidden, Invalid, NotFound, Unknown
from kilonova.kit.http import Dialect, Service
from kilonova.kit.policy import Policy
from kilonova.kit.routes import Call, Reply
from kilonova.model import options
from kilonova.store import identity as store
from kilonova.store.identity import Grant, Group, Project, Role, User

Name = Annotated[
    str, Meta(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]*[^\x00-\x20\x7f][^\x00-\x1f\x7f]*$")
]
Id = Annotated[str, Meta(min_length=1, max_length=64)]
Text = Annotated[str, Meta(max_length=16_384)]

SERVICE_USER = "kilonova"
# Who holds the first has the second as well.
ROLES = ("admin", "manager", "member", "reader")
TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    413: "Request Entity Too Large",
    415: "Unsupported Media Type",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}

DIALECT = Dialect(
    fault=lambda status, said, code: {
        "error": {"code": status, "message": said, "title": TITLES.get(status, "Bad Request")}
    },
    bad_body="Invalid input for field '{name}': {text}",
    bad_query="Invalid input for query parameter '{name}': {text}",
    unauthorized=REFUSED,
    unexpected="An unexpected error prevented the server from fulfilling your request.",
)


# ---- the whole


def open_realm(
    db: Db, clock: Clock, ids: Ids, config: options.Identity, directory: Path, base_url: str | None = None
) -> World:
    """`directory` keeps keys and the password of our own account. `base_url` is the public address of the cloud,
    without a slash at the end; None: each request's own."""
    keys = Keys(directory / "fernet-keys", clock, config.fernet_keys_max)
    door = Door(
        db,
        clock,
        ids,
        keys,
        Passwords(config.password_hash_cost),
        Guesses(clock, config.lockout_failures, config.lockout_s),
        config.token_lifetime_s,
    )
    gate = Gate(db, clock, keys, config.token_cache_s)
    return World(door, gate, Keys(directory / "credential-keys", clock), base_url)


def service(world: World, policy_file: Path | None = None, observe: Callable[..., None] | None = None) -> Service:
    return Service(
        R,
        DIALECT,
        world=world,
        authenticate=world.gate,
        policy=Policy(RULES, policy_file),
        ids=world.door.ids,
        observe=observe,
    )


class First(msgspec.Struct, frozen=True):
    """What `bootstrap` made or found."""

    admin_project_id: str
    service_project_id: str
    demo_project_id: str
    admin_user_id: str
    service_user_id: str
    service_password: str

    def __repr__(self) -> str:
        return f"First(admin project {self.admin_project_id})"


def bootstrap(
    world: World,
    directory: Path,
    *,
    admin_password: str,
    service_password: str = "",
    region: str = "RegionOne",
    services: Mapping[str, str] | None = None,
) -> First:
    """The rows without which nobody can come in; safe to do at every start.

    Admin's password becomes `admin_password` where it is another.  `service_password` is that of our own account,
    "": a random one that is kept in `directory`.  `services` are URLs by type (`catalog.BUILT_IN`).
    """
    door = world.door
    own = service_password or kept_secret(directory / "service-password", lambda: door.ids.password(32))
    with door.db.read() as tx:
        found = store.find(tx, User, name="admin", domain_id="default")
        ours = store.find(tx, User, name=SERVICE_USER, domain_id="default")
    secrets = {}
    if not found or not door.passwords.right(admin_password, found[0].secret):
        secrets["admin"] = door.passwords.hash(admin_password)
    if not ours or not door.passwords.right(own, ours[0].secret):
        secrets[SERVICE_USER] = door.passwords.hash(own)
    with door.db.tx() as tx:
        first = _first_rows(tx, door, secrets, own)
        catalog.fill(tx, region, catalog.BUILT_IN if services is None else services)
    world.gate.forget()
    return first


def _first_rows(tx: Tx, door: Door, secrets: dict[str, str], own: str) -> First:
    if store.look(tx, Project, "default") is None:
        store.keep(tx, Project("default", "Default", is_domain=True, description="The default domain"))
    role = {name: _there(tx, door, Role, name, domain_id="") for name in (*ROLES, "service")}
    for prior, implied in pairwise(ROLES):
        store.imply(tx, role[prior], role[implied])
    about = {"parent_id": "default"}
    project = {n: _there(tx, door, Project, n, domain_id="default", **about) for n in ("admin", "service", "demo")}
    user = {}
    for name in ("admin", SERVICE_USER):
        old = bool(store.find(tx, User, name=name, domain_id="default"))
        user[name] = _there(tx, door, User, name, domain_id="default")
        if name in secrets:
            values = {"secret": secrets[name], "valid_since": door.clock.now() if old else 0.0}
            store.change(tx, User, user[name], values)
    grants = [
        ("admin", "project", project["admin"], "admin"),
        ("admin", "project", project["demo"], "admin"),
        ("admin", "system", store.SYSTEM, "admin"),
        (SERVICE_USER, "project", project["service"], "admin"),
        (SERVICE_USER, "project", project["service"], "service"),
    ]
    for who, target, where, what in grants:
        store.grant(tx, Grant("user", user[who], target, where, role[what]))
    return First(project["admin"], project["service"], project["demo"], user["admin"], user[SERVICE_USER], own)


def _there(tx: Tx, door: Door, kind: type[Any], name: str, **where: Any) -> str:
    found = store.find(tx, kind, name=name, domain_id=where["domain_id"])
    if found:
        return str(found[0].id)
    thing = kind(id=door.ids.hex(), name=name, **where)
    store.keep(tx, thing)
    return str(thing.id)


def rotate_when_due(world: World, config: options.Identity) -> bool:
    """For a reconciler: give tokens a new key when the present one is old enough."""
    if world.door.clock.now() - world.door.keys.rotated_at() < config.fernet_rotation_s:
        return False
    world.door.keys.rotate()
    return True


# ---- discovery


def _version(call: Call) -> dict[str, Any]:
    return {
        "id": "v3.14",
        "status": "stable",
        "updated": "2020-04-07T00:00:00Z",
        "links": [{"rel": "self", "href": f"{call.url}/v3/"}],
        "media-types": [{"base": "application/json", "type": "application/vnd.openstack.identity-v3+json"}],
    }


@R.get("/", open=True, ok=300)
def versions(call: Call) -> Any:
    return {"versions": {"values": [_version(call)]}}


@R.get("/v3", open=True)
def version(call: Call) -> Any:
    return {"version": _version(call)}


# ---- tokens


@R.post("/v3/auth/tokens", body=Auth, ok=201, open=True)
def authenticate(call: Call) -> Reply:
    door: Door = call.world.door
    text = issue(door, log_in(door, call.body.auth))
    seen: Seen = call.world.gate.seen(text)
    headers = {"X-Subject-Token": text, "Vary": "X-Auth-Token"}
    return Reply({"token": _token(call, seen)}, headers=headers)


@R.get("/v3/auth/tokens", policy="identity:validate_token", late=True)
def validate(call: Call) -> Reply:
    text = call.headers("X-Subject-Token")
    seen = _subject(call, text, late=True)
    call.check({"target.token.user_id": seen.token.user_id})
    return Reply({"token": _token(call, seen)}, headers={"X-Subject-Token": text or "", "Vary": "X-Auth-Token"})


@R.delete("/v3/auth/tokens", ok=204, policy="identity:revoke_token", late=True)
def revoke(call: Call) -> None:
    seen = _subject(call, call.headers("X-Subject-Token"))
    call.check({"target.token.user_id": seen.token.user_id})
    with changing(call) as tx:
        store.revoke_token(tx, seen.token.audit_ids[0], seen.token.expires_at, call.world.door.clock.now())


def _subject(call: Call, text: str | None, *, late: bool = False) -> Seen:
    """The token asked about. Raises NotFound where it is not good; who asks must be known before."""
    gate: Gate = call.world.gate
    try:
        if text and late and _asked(call, "allow_expired") and "service" in call.context.roles:
            return gate.look(text, ended_since_s=EXPIRED_FOR_S)
        return gate.seen(text or "")
    except Unknown as e:
        call.checked = True
        raise NotFound("Could not find token.", why=e.why) from None


def _token(call: Call, seen: Seen) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if seen.credential:
        c = seen.credential
        more["application_credential"] = {"id": c.id, "name": c.name, "restricted": not c.unrestricted}
    if seen.token.target and not _asked(call, "nocatalog"):
        more["catalog"] = catalog.of(call, seen.context.project_id)
    return described(seen.token, seen.standing, seen.roles, more)


def _asked(call: Call, name: str) -> bool:
    return any(part.partition("=")[0] == name and flag(part.partition("=")[2]) for part in call.raw_query.split("&"))


@R.get("/v3/auth/catalog")
def my_catalog(call: Call) -> Any:
    if not (call.context.project_id or call.context.domain_id or call.context.system):
        raise Forbidden("A catalog cannot be had with an unscoped token.")
    return {"catalog": catalog.of(call, call.context.project_id)} | self_link(call, "auth", "catalog")


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


class Filter(msgspec.Struct):
    name: str | None = None
    domain_id: str | None = None
    enabled: str | None = None
    parent_id: str | None = None
    is_domain: str | None = None


@R.get("/v3/users", query=Filter, policy="identity:list_users", late=True)
def list_users(call: Call) -> Any:
    domain = _domain_asked(call)
    call.check({"target.domain_id": domain or "-"})
    with looking(call) as tx:
        found = store.find(tx, User, name=call.query.name, domain_id=domain, enabled=flag(call.query.enabled))
    return page(call, "users", [_user(call, u) for u in found])


@R.post("/v3/users", body=UserBody, ok=201, policy="identity:create_user", late=True)
def create_user(call: Call) -> Any:
    known, extra = wish(call.body.user, UserWish)
    domain = known.domain_id or _own_domain(call)
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
        _domain_there(tx, domain)
        store.keep(tx, user)
    return {"user": _user(call, user)}


@R.get("/v3/users/{id}", policy="identity:get_user", late=True)
def show_user(call: Call, id: str) -> Any:
    return {"user": _user(call, _theirs(call, User, "user", id))}


@R.patch("/v3/users/{id}", body=UserBody, policy="identity:update_user", late=True)
def update_user(call: Call, id: str) -> Any:
    old = _theirs(call, User, "user", id)
    known, extra = wish(call.body.user, UserChange)
    _no_move(known.domain_id, old.domain_id)
    values = {
        k: v for k, v in given(known).items() if k not in ("password", "options", "domain_id", "original_password")
    }
    if "description" in values:
        values["description"] = values["description"] or ""
    values["extra"] = _merged(old.extra, extra)
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
    _theirs(call, User, "user", id)
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
    _theirs(call, User, "user", id)
    with looking(call) as tx:
        return page(call, "projects", [_project(call, p) for p in _places(tx, id, "project")])


@R.get("/v3/users/{id}/groups", policy="identity:list_groups_for_user", late=True)
def user_groups(call: Call, id: str) -> Any:
    _theirs(call, User, "user", id)
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
    domain = _domain_asked(call)
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
    domain = known.domain_id or _own_domain(call)
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
        _domain_there(tx, domain)
        if project.parent_id != domain:
            parent = store.look(tx, Project, project.parent_id)
            if parent is None or parent.domain_id != domain:
                raise NotFound(f"Could not find project: {project.parent_id}.")
        store.keep(tx, project)
    return {"project": _project(call, project)}


@R.get("/v3/projects/{id}", policy="identity:get_project", late=True)
def show_project(call: Call, id: str) -> Any:
    return {"project": _project(call, _theirs(call, Project, "project", id))}


@R.patch("/v3/projects/{id}", body=ProjectBody, policy="identity:update_project", late=True)
def update_project(call: Call, id: str) -> Any:
    old = _theirs(call, Project, "project", id)
    known, extra = wish(call.body.project, ProjectChange)
    _no_move(known.domain_id, old.domain_id)
    if known.parent_id not in (UNSET, old.parent_id) or known.is_domain not in (UNSET, False):
        raise Forbidden("A project stays where it is.")
    values = {k: v for k, v in given(known).items() if k in ("name", "enabled", "description", "tags")}
    if "description" in values:
        values["description"] = values["description"] or ""
    values["extra"] = _merged(old.extra, extra)
    with changing(call) as tx:
        return {"project": _project(call, store.change(tx, Project, id, values))}


@R.delete("/v3/projects/{id}", ok=204, policy="identity:delete_project", late=True)
def delete_project(call: Call, id: str) -> None:
    _theirs(call, Project, "project", id)
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
        return {"domain": _domain(call, _domain_there(tx, id))}


@R.patch("/v3/domains/{id}", body=DomainBody, policy="identity:update_domain")
def update_domain(call: Call, id: str) -> Any:
    known, extra = wish(call.body.domain, ProjectChange)
    values = {k: v for k, v in given(known).items() if k in ("name", "enabled", "description", "tags")}
    if "description" in values:
        values["description"] = values["description"] or ""
    with changing(call) as tx:
        old = _domain_there(tx, id)
        values["extra"] = _merged(old.extra, extra)
        return {"domain": _domain(call, store.change(tx, Project, id, values))}


@R.delete("/v3/domains/{id}", ok=204, policy="identity:delete_domain")
def delete_domain(call: Call, id: str) -> None:
    with changing(call) as tx:
        domain = _domain_there(tx, id)
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
    domain = _domain_asked(call)
    call.check({"target.domain_id": domain or "-"})
    with looking(call) as tx:
        found = store.find(tx, Group, name=call.query.name, domain_id=domain)
    return page(call, "groups", [_group(call, g) for g in found])


@R.post("/v3/groups", body=GroupBody, ok=201, policy="identity:create_group", late=True)
def create_group(call: Call) -> Any:
    known, extra = wish(call.body.group, GroupWish)
    domain = known.domain_id or _own_domain(call)
    call.check({"target.group.domain_id": domain})
    group = Group(call.world.door.ids.hex(), known.name, domain, known.description or "", extra)
    with changing(call) as tx:
        _domain_there(tx, domain)
        store.keep(tx, group)
    return {"group": _group(call, group)}


@R.get("/v3/groups/{id}", policy="identity:get_group", late=True)
def show_group(call: Call, id: str) -> Any:
    return {"group": _group(call, _theirs(call, Group, "group", id))}


@R.patch("/v3/groups/{id}", body=GroupBody, policy="identity:update_group", late=True)
def update_group(call: Call, id: str) -> Any:
    old = _theirs(call, Group, "group", id)
    known, extra = wish(call.body.group, GroupChange)
    _no_move(known.domain_id, old.domain_id)
    values = {k: v or "" for k, v in given(known).items() if k in ("name", "description")}
    values["extra"] = _merged(old.extra, extra)
    with changing(call) as tx:
        return {"group": _group(call, store.change(tx, Group, id, values))}


@R.delete("/v3/groups/{id}", ok=204, policy="identity:delete_group", late=True)
def delete_group(call: Call, id: str) -> None:
    _theirs(call, Group, "group", id)
    with changing(call) as tx:
        store.drop_group(tx, id)


@R.get("/v3/groups/{id}/users", policy="identity:list_users_in_group", late=True)
def group_users(call: Call, id: str) -> Any:
    _theirs(call, Group, "group", id)
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


# ---- roles


class RoleWish(msgspec.Struct, kw_only=True):
    name: Name
    domain_id: Id | None = None
    description: Text | None = None
    options: dict[str, Any] = {}


class RoleChange(msgspec.Struct, kw_only=True):
    name: Name | UnsetType = UNSET
    description: Text | None | UnsetType = UNSET
    options: dict[str, Any] | UnsetType = UNSET


class RoleBody(msgspec.Struct):
    role: dict[str, Any]


@R.get("/v3/roles", query=Filter, policy="identity:list_roles")
def list_roles(call: Call) -> Any:
    with looking(call) as tx:
        found = store.find(tx, Role, name=call.query.name, domain_id=call.query.domain_id or "")
    return page(call, "roles", [_role(call, r) for r in found])


@R.post("/v3/roles", body=RoleBody, ok=201, policy="identity:create_role")
def create_role(call: Call) -> Any:
    known, extra = wish(call.body.role, RoleWish)
    role = Role(call.world.door.ids.hex(), known.name, known.domain_id or "", known.description or "", extra)
    with changing(call) as tx:
        if role.domain_id:
            _domain_there(tx, role.domain_id)
        store.keep(tx, role)
    return {"role": _role(call, role)}


@R.get("/v3/roles/{id}", policy="identity:get_role")
def show_role(call: Call, id: str) -> Any:
    with looking(call) as tx:
        return {"role": _role(call, store.get(tx, Role, id))}


@R.patch("/v3/roles/{id}", body=RoleBody, policy="identity:update_role")
def update_role(call: Call, id: str) -> Any:
    known, extra = wish(call.body.role, RoleChange)
    values = {k: v or "" for k, v in given(known).items() if k in ("name", "description")}
    with changing(call) as tx:
        old = store.get(tx, Role, id)
        if old.name == "admin" and values.get("name", "admin") != "admin":
            raise Forbidden("The role admin keeps its name: rules depend on it.")
        values["extra"] = _merged(old.extra, extra)
        return {"role": _role(call, store.change(tx, Role, id, values))}


@R.delete("/v3/roles/{id}", ok=204, policy="identity:delete_role")
def delete_role(call: Call, id: str) -> None:
    with changing(call) as tx:
        if store.get(tx, Role, id).name == "admin":
            raise Forbidden("The role admin cannot be deleted: nobody could undo it.")
        store.drop_role(tx, id)


@R.get("/v3/roles/{id}/implies", policy="identity:list_implied_roles")
def list_implied(call: Call, id: str) -> Any:
    with looking(call) as tx:
        prior = store.get(tx, Role, id)
        ids = {b for a, b in store.implied(tx) if a == id}
        found = store.find(tx, Role, id=ids) if ids else []
    return {"role_inference": _inference(call, prior, found)} | self_link(call, "roles", id, "implies")


@R.get("/v3/roles/{id}/implies/{implied}", policy="identity:get_implied_role")
def show_implied(call: Call, id: str, implied: str) -> Any:
    with looking(call) as tx:
        prior, then = store.get(tx, Role, id), store.get(tx, Role, implied)
        if (id, implied) not in store.implied(tx):
            raise NotFound(f"{id} does not imply {implied}.")
    return {"role_inference": {"prior_role": _brief(call, prior), "implies": _brief(call, then)}}


@R.put("/v3/roles/{id}/implies/{implied}", ok=201, policy="identity:create_implied_role")
def create_implied(call: Call, id: str, implied: str) -> Any:
    with changing(call) as tx:
        prior, then = store.get(tx, Role, id), store.get(tx, Role, implied)
        if then.name == "admin":
            raise Forbidden("No role implies admin.")
        store.imply(tx, id, implied)
    return {"role_inference": {"prior_role": _brief(call, prior), "implies": _brief(call, then)}}


@R.delete("/v3/roles/{id}/implies/{implied}", ok=204, policy="identity:delete_implied_role")
def delete_implied(call: Call, id: str, implied: str) -> None:
    with changing(call) as tx:
        if not store.imply_not(tx, id, implied):
            raise NotFound(f"{id} does not imply {implied}.")


@R.get("/v3/role_inferences", policy="identity:list_role_inference_rules")
def inferences(call: Call) -> Any:
    with looking(call) as tx:
        pairs = store.implied(tx)
        roles = {r.id: r for r in store.find(tx, Role)}
    rules = [
        _inference(call, roles[a], [roles[b] for x, b in sorted(pairs) if x == a and b in roles])
        for a in sorted({a for a, _ in pairs if a in roles})
    ]
    return {"role_inferences": rules} | self_link(call, "role_inferences")


def _inference(call: Call, prior: Role, implied: list[Role]) -> dict[str, Any]:
    return {"prior_role": _brief(call, prior), "implies": [_brief(call, r) for r in implied]}


def _brief(call: Call, r: Role) -> dict[str, Any]:
    return {"id": r.id, "name": r.name} | self_link(call, "roles", r.id)


def _role(call: Call, r: Role) -> dict[str, Any]:
    return {
        **r.extra,
        "id": r.id,
        "name": r.name,
        "domain_id": r.domain_id or None,
        "description": r.description or None,
        "options": {},
    } | self_link(call, "roles", r.id)


# ---- who has which role, where: the same four questions of two kinds of actors and three kinds of targets


def _grant_routes(target: str, actor: str) -> None:
    system = target == "system"
    path = f"/v3/system/{actor}s/{{actor_id}}/roles" if system else f"/v3/{target}s/{{id}}/{actor}s/{{actor_id}}/roles"

    def rule(verb: str) -> str:
        return f"identity:{verb}_system_grant_for_{actor}" if system else f"identity:{verb}_grant"

    listing = f"identity:list_system_grants_for_{actor}" if system else "identity:list_grants"

    def wanted(call: Call, actor_id: str, id: str, role_id: str | None) -> Grant:
        with looking(call) as tx:
            kind: type[User | Group] = User if actor == "user" else Group
            who = store.look(tx, kind, actor_id)
            where = None if system else store.look(tx, Project, id)
            what = store.look(tx, Role, role_id) if role_id else None
        outer = "-" if where is None else (where.id if target == "domain" else where.domain_id)
        call.check(
            {
                "target.grant.domain_id": outer,
                "target.actor.domain_id": who.domain_id if who else "-",
                "target.role.name": what.name if what else "-",
            }
        )
        if who is None and call.route.method != "DELETE":
            raise NotFound(f"Could not find {actor}: {actor_id}.")
        if not system and (where is None or where.is_domain != (target == "domain")):
            raise NotFound(f"Could not find {target}: {id}.")
        if role_id and what is None:
            raise NotFound(f"Could not find role: {role_id}.")
        return Grant(actor, actor_id, target, store.SYSTEM if system else id, role_id or "")

    @R.get(path, policy=listing, late=True)
    def all_of(call: Call, actor_id: str, id: str = "") -> Any:
        g = wanted(call, actor_id, id, None)
        with looking(call) as tx:
            ids = {
                x.role_id
                for x in store.grants(tx, actor=actor, actor_id=actor_id, target=g.target, target_id=g.target_id)
            }
            return page(call, "roles", [_role(call, r) for r in store.find(tx, Role, id=ids)] if ids else [])

    @R.put(path + "/{role_id}", ok=204, policy=rule("create"), late=True)
    def put(call: Call, actor_id: str, role_id: str, id: str = "") -> None:
        g = wanted(call, actor_id, id, role_id)
        with changing(call) as tx:
            store.grant(tx, g)

    @R.head(path + "/{role_id}", ok=204, policy=rule("check"), late=True)
    @R.get(path + "/{role_id}", ok=204, policy=rule("check"), late=True)
    def check(call: Call, actor_id: str, role_id: str, id: str = "") -> None:
        g = wanted(call, actor_id, id, role_id)
        with looking(call) as tx:
            if not store.granted(tx, g):
                raise NotFound(f"Could not find role assignment with role: {role_id}, {actor}: {actor_id}.")

    @R.delete(path + "/{role_id}", ok=204, policy=rule("revoke"), late=True)
    def take(call: Call, actor_id: str, role_id: str, id: str = "") -> None:
        g = wanted(call, actor_id, id, role_id)
        with changing(call) as tx:
            if not store.revoke(tx, g):
                raise NotFound(f"Could not find role assignment with role: {role_id}, {actor}: {actor_id}.")


for _target in ("project", "domain", "system"):
    for _actor in ("user", "group"):
        _grant_routes(_target, _actor)


class AssignmentFilter(msgspec.Struct):
    user: str | None = msgspec.field(name="user.id", default=None)
    group: str | None = msgspec.field(name="group.id", default=None)
    role: str | None = msgspec.field(name="role.id", default=None)
    project: str | None = msgspec.field(name="scope.project.id", default=None)
    domain: str | None = msgspec.field(name="scope.domain.id", default=None)
    system: str | None = msgspec.field(name="scope.system", default=None)
    effective: str | None = None
    include_names: str | None = None


@R.get("/v3/role_assignments", query=AssignmentFilter, policy="identity:list_role_assignments", late=True)
def assignments(call: Call) -> Any:
    q: AssignmentFilter = call.query
    call.check({"target.domain_id": q.domain or call.context.domain_id or "-"})
    if sum(x is not None for x in (q.project, q.domain, q.system)) > 1 or (q.user and q.group):
        raise Invalid(
            "Only one of scope.project.id, scope.domain.id and scope.system, and one of user.id and group.id."
        )
    if flag(q.effective) and q.group:
        raise Invalid("Combining effective and group filter will always result in an empty list.")
    where = {"target": "project", "target_id": q.project} if q.project else {}
    where |= {"target": "domain", "target_id": q.domain} if q.domain else {}
    where |= {"target": "system"} if q.system else {}
    with looking(call) as tx:
        found = store.grants(tx, **where)
        if flag(q.effective):
            found = _effective(tx, found)
        wanted = [
            g
            for g in found
            if (q.user is None or (g.actor, g.actor_id) == ("user", q.user))
            and (q.group is None or (g.actor, g.actor_id) == ("group", q.group))
            and (q.role is None or g.role_id == q.role)
        ]
        if call.context.domain_id and not call.context.is_admin:
            inside = {p.id for p in store.find(tx, Project, domain_id=call.context.domain_id)} | {
                call.context.domain_id
            }
            wanted = [g for g in wanted if g.target_id in inside]
        names = _names(tx, wanted) if flag(q.include_names) else {}
    return page(call, "role_assignments", [_assignment(call, g, names) for g in wanted])


def _effective(tx: Tx, found: list[Grant]) -> list[Grant]:
    """What users really are: groups become their members, and roles those they imply as well."""
    pairs, people = store.implied(tx), {}
    for group_id in {g.actor_id for g in found if g.actor == "group"}:
        people[group_id] = [u.id for u in store.members(tx, group_id)]
    out: dict[Grant, None] = {}
    for g in found:
        for user_id in [g.actor_id] if g.actor == "user" else people[g.actor_id]:
            for role_id in sorted(store.closure({g.role_id}, pairs)):
                out[Grant("user", user_id, g.target, g.target_id, role_id)] = None
    return list(out)


def _names(tx: Tx, found: list[Grant]) -> dict[str, dict[str, Any]]:
    """By id: name, and domain where it has one."""
    things: list[Any] = []
    wanted = {x for g in found for x in (g.actor_id, g.target_id, g.role_id)}
    if wanted:
        for kind in (User, Group, Project, Role):
            things += store.find(tx, kind, id=wanted)
    domains = {d.id: d.name for d in store.find(tx, Project, is_domain=True)}
    return {
        t.id: {"name": t.name}
        | ({"domain": {"id": t.domain_id, "name": domains.get(t.domain_id, "")}} if t.domain_id else {})
        for t in things
    }


def _assignment(call: Call, g: Grant, names: dict[str, dict[str, Any]]) -> dict[str, Any]:
    def ref(id: str) -> dict[str, Any]:
        return {"id": id, **names.get(id, {})}

    scope: dict[str, Any] = {"system": {"all": True}} if g.target == "system" else {g.target: ref(g.target_id)}
    where = "system" if g.target == "system" else f"{g.target}s/{g.target_id}"
    return {
        "role": ref(g.role_id),
        g.actor: ref(g.actor_id),
        "scope": scope,
        "links": {"assignment": f"{call.url}/v3/{where}/{g.actor}s/{g.actor_id}/roles/{g.role_id}"},
    }


# ---- what handlers share


def _theirs(call: Call, kind: type[Any], word: str, id: str) -> Any:
    """The thing, if policy lets the caller at it; where there is none, only who may look anywhere learns so."""
    with looking(call) as tx:
        thing = store.look(tx, kind, id)
    if kind is Project and thing is not None and thing.is_domain:
        thing = None
    call.check({f"target.{word}.id": id, f"target.{word}.domain_id": thing.domain_id if thing else "-"})
    if thing is None:
        raise NotFound(f"Could not find {word}: {id}.")
    return thing


def _domain_asked(call: Call) -> str | None:
    """Which domain a list is of: the one asked for, else that of a domain's own token."""
    return call.query.domain_id or call.context.domain_id


def _own_domain(call: Call) -> str:
    if call.context.domain_id:
        return str(call.context.domain_id)
    return str(call.context.project_domain_id) if call.context.project_id else "default"


def _domain_there(tx: Tx, id: str) -> Project:
    domain = store.look(tx, Project, id)
    if domain is None or not domain.is_domain:
        raise NotFound(f"Could not find domain: {id}.")
    return domain


def _no_move(said: Any, is_in: str) -> None:
    if said not in (UNSET, None, is_in):
        raise Invalid("The domain of a thing cannot be changed.")


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in {**old, **new}.items() if v is not None}
