"""Who there is and who may be what: domains, projects, users, groups, roles, and the catalog of services.

Most of it is nouns that are kept, found by equality, and removed with what hangs on them; `keep`, `get`, `find`,
`change` do that for all of them.  What is asked at every validation of a token, `standing`, has its own SQL.
A domain is a project of the kind `is_domain`, in no domain (""), as the Identity API has it.
"""

from typing import Any, NamedTuple, TypeVar

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import Conflict, NotFound
from kilonova.kit.ready import Among, Shapes, ready

SYSTEM = "system"  # the id of the only target of its kind


class Project(msgspec.Struct, frozen=True):
    id: str
    name: str
    domain_id: str = ""
    parent_id: str = ""
    is_domain: bool = False
    enabled: bool = True
    description: str = ""
    tags: list[str] = []
    extra: dict[str, Any] = {}


class User(msgspec.Struct, frozen=True):
    """`secret` is a hash of the password, "" for none. Tokens from before `valid_since` are no good any more."""

    id: str
    name: str
    domain_id: str
    enabled: bool = True
    secret: str = ""
    valid_since: float = 0
    default_project_id: str | None = None
    description: str = ""
    extra: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"User({self.id}, {self.name})"


class Group(msgspec.Struct, frozen=True):
    id: str
    name: str
    domain_id: str
    description: str = ""
    extra: dict[str, Any] = {}


class Role(msgspec.Struct, frozen=True):
    """`domain_id` "": of the whole cloud, the only kind that tokens carry."""

    id: str
    name: str
    domain_id: str = ""
    description: str = ""
    extra: dict[str, Any] = {}


class Region(msgspec.Struct, frozen=True):
    id: str
    description: str = ""
    parent_region_id: str | None = None
    extra: dict[str, Any] = {}


class Listed(msgspec.Struct, frozen=True):
    """A service of the catalog."""

    id: str
    type: str
    name: str = ""
    enabled: bool = True
    description: str = ""
    extra: dict[str, Any] = {}


class Endpoint(msgspec.Struct, frozen=True):
    """`url` may name `$(base_url)s` (this cloud, as the caller reached it) and `$(project_id)s`."""

    id: str
    service_id: str
    interface: str
    url: str
    region_id: str | None = None
    enabled: bool = True
    extra: dict[str, Any] = {}


class ApplicationCredential(msgspec.Struct, frozen=True):
    """A user's own second way in, for one project; `roles` are ids."""

    id: str
    name: str
    user_id: str
    project_id: str
    secret: str
    roles: list[str]
    description: str = ""
    unrestricted: bool = False
    expires_at: float | None = None

    def __repr__(self) -> str:
        return f"ApplicationCredential({self.id})"


class Credential(msgspec.Struct, frozen=True):
    """`blob` is encrypted. `access` is what an EC2 client names itself by."""

    id: str
    type: str
    user_id: str
    blob: str
    project_id: str | None = None
    access: str | None = None

    def __repr__(self) -> str:
        return f"Credential({self.id})"


class Limit(msgspec.Struct, frozen=True):
    """How much of a service's resource one project or domain may have (unified limits)."""

    id: str
    service_id: str
    resource_name: str
    resource_limit: int
    region_id: str | None = None
    project_id: str | None = None
    domain_id: str | None = None
    description: str | None = None


class RegisteredLimit(msgspec.Struct, frozen=True):
    """How much everybody may have of it who has no limit of his own."""

    id: str
    service_id: str
    resource_name: str
    default_limit: int
    region_id: str | None = None
    description: str | None = None


class Grant(msgspec.Struct, frozen=True):
    """Who is what, where. `actor`: user or group; `target`: project, domain or system."""

    actor: str
    actor_id: str
    target: str
    target_id: str
    role_id: str


def _table(name: str, *columns: Any, key: str = "id") -> sa.Table:
    return sa.Table(name, meta, sa.Column(key, sa.String(64), primary_key=True), *columns)


def _id(name: str, *, null: bool = False, index: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(64), nullable=null, index=index)


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False)


def _flag(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean, nullable=False)


PROJECTS = _table(
    "identity_projects",
    sa.Column("name", sa.String(255), nullable=False),
    _id("domain_id"),
    _id("parent_id", index=True),
    _flag("is_domain"),
    _flag("enabled"),
    _text("description"),
    _text("tags"),
    _text("extra"),
    sa.UniqueConstraint("domain_id", "name", name="identity_project_names"),
)
USERS = _table(
    "identity_users",
    sa.Column("name", sa.String(255), nullable=False),
    _id("domain_id"),
    _flag("enabled"),
    _text("secret"),
    sa.Column("valid_since", sa.Double, nullable=False),
    _id("default_project_id", null=True),
    _text("description"),
    _text("extra"),
    sa.UniqueConstraint("domain_id", "name", name="identity_user_names"),
)
GROUPS = _table(
    "identity_groups",
    sa.Column("name", sa.String(255), nullable=False),
    _id("domain_id"),
    _text("description"),
    _text("extra"),
    sa.UniqueConstraint("domain_id", "name", name="identity_group_names"),
)
MEMBERS = sa.Table(
    "identity_members",
    meta,
    sa.Column("group_id", sa.String(64), primary_key=True),
    sa.Column("user_id", sa.String(64), primary_key=True, index=True),
)
ROLES = _table(
    "identity_roles",
    sa.Column("name", sa.String(255), nullable=False),
    _id("domain_id"),
    _text("description"),
    _text("extra"),
    sa.UniqueConstraint("domain_id", "name", name="identity_role_names"),
)
IMPLIED = sa.Table(
    "identity_implied_roles",
    meta,
    sa.Column("prior_id", sa.String(64), primary_key=True),
    sa.Column("implied_id", sa.String(64), primary_key=True),
)
GRANTS = sa.Table(
    "identity_grants",
    meta,
    sa.Column("actor", sa.String(8), primary_key=True),
    sa.Column("actor_id", sa.String(64), primary_key=True),
    sa.Column("target", sa.String(8), primary_key=True),
    sa.Column("target_id", sa.String(64), primary_key=True),
    sa.Column("role_id", sa.String(64), primary_key=True),
    sa.Index("identity_grants_on", "target", "target_id"),
)
REGIONS = _table("identity_regions", _text("description"), _id("parent_region_id", null=True), _text("extra"))
SERVICES = _table(
    "identity_services",
    sa.Column("type", sa.String(255), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    _flag("enabled"),
    _text("description"),
    _text("extra"),
)
ENDPOINTS = _table(
    "identity_endpoints",
    _id("service_id", index=True),
    sa.Column("interface", sa.String(8), nullable=False),
    _text("url"),
    _id("region_id", null=True),
    _flag("enabled"),
    _text("extra"),
)
APPLICATION_CREDENTIALS = _table(
    "identity_application_credentials",
    sa.Column("name", sa.String(255), nullable=False),
    _id("user_id"),
    _id("project_id", index=True),
    _text("secret"),
    _text("roles"),
    _text("description"),
    _flag("unrestricted"),
    sa.Column("expires_at", sa.Double),
    sa.UniqueConstraint("user_id", "name", name="identity_application_credential_names"),
)
CREDENTIALS = _table(
    "identity_credentials",
    sa.Column("type", sa.String(255), nullable=False),
    _id("user_id", index=True),
    _text("blob"),
    _id("project_id", null=True, index=True),
    sa.Column("access", sa.String(64), unique=True),
)
REGISTERED_LIMITS = _table(
    "identity_registered_limits",
    _id("service_id"),
    sa.Column("resource_name", sa.String(255), nullable=False),
    sa.Column("default_limit", sa.Integer, nullable=False),
    _id("region_id", null=True),
    sa.Column("description", sa.Text),
)
LIMITS = _table(
    "identity_limits",
    _id("service_id"),
    sa.Column("resource_name", sa.String(255), nullable=False),
    sa.Column("resource_limit", sa.Integer, nullable=False),
    _id("region_id", null=True),
    _id("project_id", null=True, index=True),
    _id("domain_id", null=True),
    sa.Column("description", sa.Text),
)
REVOKED = sa.Table(
    "identity_revoked",
    meta,
    sa.Column("audit_id", sa.String(32), primary_key=True),
    sa.Column("expires_at", sa.Double, nullable=False, index=True),
)
GENERATION = sa.Table(
    "identity_generation",
    meta,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("number", sa.BigInteger, nullable=False),
)


class Noun(NamedTuple):
    table: sa.Table
    word: str


# fmt: off
NOUNS: dict[type[msgspec.Struct], Noun] = {
    Project:               Noun(PROJECTS,                "project"),
    User:                  Noun(USERS,                   "user"),
    Group:                 Noun(GROUPS,                  "group"),
    Role:                  Noun(ROLES,                   "role"),
    Region:                Noun(REGIONS,                 "region"),
    Listed:                Noun(SERVICES,                "service"),
    Endpoint:              Noun(ENDPOINTS,               "endpoint"),
    ApplicationCredential: Noun(APPLICATION_CREDENTIALS, "application credential"),
    Credential:            Noun(CREDENTIALS,             "credential"),
    RegisteredLimit:       Noun(REGISTERED_LIMITS,       "registered limit"),
    Limit:                 Noun(LIMITS,                  "limit"),
}
# fmt: on
JSON = ("tags", "extra", "roles")
T = TypeVar("T", bound=msgspec.Struct)


# ---- nouns


def keep(tx: Tx, thing: msgspec.Struct) -> None:
    """Write it down. Raises Conflict where its name (or id) is taken."""
    noun = NOUNS[type(thing)]
    try:
        tx.execute(sa.insert(noun.table), _row(msgspec.structs.asdict(thing)))
    except sa.exc.IntegrityError as e:
        name = getattr(thing, "name", getattr(thing, "id", ""))
        raise Conflict(
            f"Conflict occurred attempting to store {noun.word} - Duplicate entry found with name {name}.", why=str(e)
        ) from None


def get(tx: Tx, kind: type[T], id: str) -> T:
    """Raises NotFound."""
    if (found := look(tx, kind, id)) is None:
        raise NotFound(f"Could not find {NOUNS[kind].word}: {id}.")
    return found


def look(tx: Tx, kind: type[T], id: str) -> T | None:
    row = tx.execute(_ONE[kind], {"the_id": id}).first()
    return None if row is None else _of(kind, row)


def find(tx: Tx, kind: type[T], **equal: Any) -> list[T]:
    """All whose columns are equal to these; None is not asked for, a list or set means one of them."""
    table = NOUNS[kind].table
    one = {name: value for name, value in equal.items() if value is not None and not isinstance(value, _SEVERAL)}
    several = {name: list(value) for name, value in equal.items() if isinstance(value, _SEVERAL)}

    def write() -> sa.Select[Any]:
        order = [table.c[n] for n in ("name", "id") if n in table.c]
        return sa.select(table).where(*[table.c[n] == sa.bindparam(f"the_{n}") for n in one]).order_by(*order)

    query = write().where(*[table.c[n].in_(v) for n, v in several.items()]) if several else None
    found = tx.execute(
        _EQUAL.of((kind, *one), write) if query is None else query, {f"the_{n}": v for n, v in one.items()}
    )
    return [_of(kind, row) for row in found]


def change(tx: Tx, kind: type[T], id: str, values: dict[str, Any]) -> T:
    """As it is afterwards. Raises NotFound; Conflict where the new name is taken."""
    noun = NOUNS[kind]
    if values:
        try:
            tx.execute(sa.update(noun.table).where(noun.table.c.id == id).values(_row(values)))
        except sa.exc.IntegrityError as e:
            raise Conflict(
                f"Conflict occurred attempting to store {noun.word} - Duplicate entry found with name {values.get('name')}.",
                why=str(e),
            ) from None
    return get(tx, kind, id)


def drop(tx: Tx, kind: type[msgspec.Struct], id: str) -> None:
    """This alone. Raises NotFound."""
    noun = NOUNS[kind]
    if not tx.execute(sa.delete(noun.table).where(noun.table.c.id == id)).rowcount:
        raise NotFound(f"Could not find {noun.word}: {id}.")


def _row(values: dict[str, Any]) -> dict[str, Any]:
    return {k: msgspec.json.encode(v).decode() if k in JSON else v for k, v in values.items()}


def _of(kind: type[T], row: Any) -> T:
    values = dict(row._mapping)
    for name in JSON:
        if name in values:
            values[name] = msgspec.json.decode(values[name])
    return kind(**values)


# ---- what goes with them


def drop_user(tx: Tx, id: str) -> None:
    drop(tx, User, id)
    tx.execute(sa.delete(MEMBERS).where(MEMBERS.c.user_id == id))
    tx.execute(sa.delete(GRANTS).where(GRANTS.c.actor == "user", GRANTS.c.actor_id == id))
    for table in (APPLICATION_CREDENTIALS, CREDENTIALS):
        tx.execute(sa.delete(table).where(table.c.user_id == id))


def drop_group(tx: Tx, id: str) -> None:
    drop(tx, Group, id)
    tx.execute(sa.delete(MEMBERS).where(MEMBERS.c.group_id == id))
    tx.execute(sa.delete(GRANTS).where(GRANTS.c.actor == "group", GRANTS.c.actor_id == id))


def drop_project(tx: Tx, id: str) -> None:
    drop(tx, Project, id)
    tx.execute(sa.delete(GRANTS).where(GRANTS.c.target == "project", GRANTS.c.target_id == id))
    for table in (APPLICATION_CREDENTIALS, CREDENTIALS, LIMITS):
        tx.execute(sa.delete(table).where(table.c.project_id == id))


def drop_domain(tx: Tx, id: str) -> None:
    """With all that is in it."""
    for project in find(tx, Project, domain_id=id):
        drop_project(tx, project.id)
    for user in find(tx, User, domain_id=id):
        drop_user(tx, user.id)
    for group in find(tx, Group, domain_id=id):
        drop_group(tx, group.id)
    for role in find(tx, Role, domain_id=id):
        drop_role(tx, role.id)
    tx.execute(sa.delete(GRANTS).where(GRANTS.c.target == "domain", GRANTS.c.target_id == id))
    tx.execute(sa.delete(LIMITS).where(LIMITS.c.domain_id == id))
    drop(tx, Project, id)


def drop_role(tx: Tx, id: str) -> None:
    drop(tx, Role, id)
    tx.execute(sa.delete(GRANTS).where(GRANTS.c.role_id == id))
    tx.execute(sa.delete(IMPLIED).where((IMPLIED.c.prior_id == id) | (IMPLIED.c.implied_id == id)))


def drop_service(tx: Tx, id: str) -> None:
    drop(tx, Listed, id)
    for table in (ENDPOINTS, LIMITS, REGISTERED_LIMITS):
        tx.execute(sa.delete(table).where(table.c.service_id == id))


# ---- groups and roles


def join(tx: Tx, group_id: str, user_id: str) -> None:
    """Twice is once."""
    if not joined(tx, group_id, user_id):
        tx.execute(sa.insert(MEMBERS), {"group_id": group_id, "user_id": user_id})


def joined(tx: Tx, group_id: str, user_id: str) -> bool:
    where = (MEMBERS.c.group_id == group_id) & (MEMBERS.c.user_id == user_id)
    return tx.execute(sa.select(MEMBERS.c.user_id).where(where)).first() is not None


def leave(tx: Tx, group_id: str, user_id: str) -> bool:
    where = (MEMBERS.c.group_id == group_id) & (MEMBERS.c.user_id == user_id)
    return bool(tx.execute(sa.delete(MEMBERS).where(where)).rowcount)


def members(tx: Tx, group_id: str) -> list[User]:
    query = sa.select(USERS).join(MEMBERS, MEMBERS.c.user_id == USERS.c.id).where(MEMBERS.c.group_id == group_id)
    return [_of(User, row) for row in tx.execute(query.order_by(USERS.c.name))]


def groups_of(tx: Tx, user_id: str) -> list[Group]:
    query = sa.select(GROUPS).join(MEMBERS, MEMBERS.c.group_id == GROUPS.c.id).where(MEMBERS.c.user_id == user_id)
    return [_of(Group, row) for row in tx.execute(query.order_by(GROUPS.c.name))]


def imply(tx: Tx, prior_id: str, implied_id: str) -> None:
    """Twice is once."""
    if (prior_id, implied_id) not in implied(tx):
        tx.execute(sa.insert(IMPLIED), {"prior_id": prior_id, "implied_id": implied_id})


def imply_not(tx: Tx, prior_id: str, implied_id: str) -> bool:
    where = (IMPLIED.c.prior_id == prior_id) & (IMPLIED.c.implied_id == implied_id)
    return bool(tx.execute(sa.delete(IMPLIED).where(where)).rowcount)


def implied(tx: Tx) -> set[tuple[str, str]]:
    """All pairs of who holds the first role has the second as well."""
    return {(a, b) for a, b in tx.execute(_IMPLIED)}


def closure(ids: set[str], pairs: set[tuple[str, str]]) -> set[str]:
    """`ids` and all roles they lead to; pure."""
    while more := {b for a, b in pairs if a in ids and b not in ids}:
        ids = ids | more
    return ids


# ---- grants


def grant(tx: Tx, g: Grant) -> None:
    """Twice is once."""
    if not granted(tx, g):
        tx.execute(sa.insert(GRANTS), msgspec.structs.asdict(g))


def granted(tx: Tx, g: Grant) -> bool:
    return bool(grants(tx, **msgspec.structs.asdict(g)))


def revoke(tx: Tx, g: Grant) -> bool:
    where = [GRANTS.c[name] == value for name, value in msgspec.structs.asdict(g).items()]
    return bool(tx.execute(sa.delete(GRANTS).where(*where)).rowcount)


def grants(tx: Tx, **equal: Any) -> list[Grant]:
    query = sa.select(GRANTS)
    for name, value in equal.items():
        if isinstance(value, list | set | tuple):
            query = query.where(GRANTS.c[name].in_(list(value)))
        elif value is not None:
            query = query.where(GRANTS.c[name] == value)
    return [Grant(**row._mapping) for row in tx.execute(query.order_by(*GRANTS.primary_key))]


def held(tx: Tx, user_id: str, target: str | None = None, target_id: str | None = None) -> list[Grant]:
    """What a user is, himself and through his groups."""

    def write() -> sa.Select[Any]:
        who: Any = sa.bindparam("who")
        mine = sa.select(MEMBERS.c.group_id).where(MEMBERS.c.user_id == who)
        query = sa.select(GRANTS).where(
            ((GRANTS.c.actor == "user") & (GRANTS.c.actor_id == who))
            | ((GRANTS.c.actor == "group") & GRANTS.c.actor_id.in_(mine))
        )
        return query.where(*[GRANTS.c[n] == sa.bindparam(f"the_{n}") for n in where])

    where = {n: v for n, v in (("target", target), ("target_id", target_id)) if v is not None}
    values = {"who": user_id} | {f"the_{n}": v for n, v in where.items()}
    return [Grant(**row._mapping) for row in tx.execute(_EQUAL.of((Grant, *where), write), values)]


# ---- what a token's owner may be, now


class Standing(msgspec.Struct, frozen=True):
    """A user in a scope as it is at this moment. `roles` are (id, name), with those they imply, by name."""

    user: User
    domain: Project  # the user's
    scope: Project | None = None  # the project or domain
    scope_domain: Project | None = None
    roles: list[tuple[str, str]] = []
    revoked: bool = False


def standing(tx: Tx, user_id: str, target: str | None, target_id: str, audit_id: str = "") -> Standing | None:
    """None where user or scope is no more. Five short statements at most; callers remember it."""
    user = look(tx, User, user_id)
    domain = look(tx, Project, user.domain_id) if user else None
    if user is None or domain is None:
        return None
    revoked = bool(audit_id) and is_revoked(tx, audit_id)
    if target is None:
        return Standing(user, domain, revoked=revoked)
    scope = scope_domain = None
    if target != "system":
        scope = look(tx, Project, target_id)
        if scope is None or scope.is_domain != (target == "domain"):
            return None
        if target == "project":
            scope_domain = domain if scope.domain_id == domain.id else look(tx, Project, scope.domain_id)
            if scope_domain is None:
                return None
    direct = {g.role_id for g in held(tx, user_id, target, target_id)}
    return Standing(user, domain, scope, scope_domain, named(tx, closure(direct, implied(tx))), revoked)


def named(tx: Tx, role_ids: set[str]) -> list[tuple[str, str]]:
    """(id, name) of those that are roles of the whole cloud, by name."""
    return [(i, n) for i, n in tx.execute(*_NAMED(role_ids))] if role_ids else []


def revoke_token(tx: Tx, audit_id: str, expires_at: float, now: float) -> None:
    """No good from now on. Those that have ended by themselves are forgotten."""
    tx.execute(sa.delete(REVOKED).where(REVOKED.c.expires_at < now))
    if not is_revoked(tx, audit_id):
        tx.execute(sa.insert(REVOKED), {"audit_id": audit_id, "expires_at": expires_at})


def is_revoked(tx: Tx, audit_id: str) -> bool:
    return tx.execute(sa.select(REVOKED.c.audit_id).where(REVOKED.c.audit_id == audit_id)).first() is not None


# ---- since when


_SEVERAL = (list, set, tuple)
_ONE = {k: ready(sa.select(n.table).where(n.table.c.id == sa.bindparam("the_id"))) for k, n in NOUNS.items()}
_EQUAL = Shapes()
_IMPLIED = ready(sa.select(IMPLIED.c.prior_id, IMPLIED.c.implied_id))
_NAMED = Among(
    lambda some: (
        sa.select(ROLES.c.id, ROLES.c.name).where(ROLES.c.id.in_(some), ROLES.c.domain_id == "").order_by(ROLES.c.name)
    )
)
NUMBER = ready(sa.select(GENERATION.c.number))


def generation(tx: Tx) -> int:
    """Rises with every change of identity: what was looked up at one number holds as long as it stays."""
    return tx.execute(NUMBER).scalar() or 0


def changed(tx: Tx) -> None:
    if not tx.execute(sa.update(GENERATION).values(number=GENERATION.c.number + 1)).rowcount:
        tx.execute(sa.insert(GENERATION), {"id": 1, "number": 1})
