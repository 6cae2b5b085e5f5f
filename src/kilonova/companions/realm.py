"""What the identity companion works with: its registry, its world, its rules, and how its answers look."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta

from kilonova.companions.login import Door, Gate
from kilonova.companions.tokens import Keys
from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid, NotFound
from kilonova.kit.policy import Rule
from kilonova.kit.routes import Call, Routes
from kilonova.store import identity as store
from kilonova.store.identity import Project

R = Routes("identity")
T = TypeVar("T")


@dataclass
class World:
    """`vault` encrypts credentials that must be read again; `base_url` is the cloud's address, None: the request's own."""

    door: Door
    gate: Gate
    vault: Keys
    base_url: str | None = None


@contextmanager
def looking(call: Call) -> Iterator[Tx]:
    with call.world.door.db.read() as tx:
        yield tx


@contextmanager
def changing(call: Call) -> Iterator[Tx]:
    """One transaction, after which no token counts as looked at."""
    with call.world.door.db.tx() as tx:
        yield tx
        store.changed(tx)
    call.world.gate.forget()


def wish(said: dict[str, Any], kind: type[T]) -> tuple[T, dict[str, Any]]:
    """What is known of a body as a Struct, and the rest: this API lets callers add attributes of their own."""
    try:
        known = msgspec.convert(said, kind)
    except msgspec.ValidationError as e:
        raise Invalid(f"Invalid input: {str(e).replace('`', chr(39))}") from None
    names = {f.encode_name for f in msgspec.structs.fields(kind)}  # type: ignore[arg-type]
    extra = {k: v for k, v in said.items() if k not in names | {"id", "links"}}
    if len(msgspec.json.encode(extra)) > 16_384:
        raise Invalid("Too many attributes.")
    return known, extra


def given(known: Any) -> dict[str, Any]:
    """The fields that were said."""
    return {k: v for k, v in msgspec.structs.asdict(known).items() if v is not msgspec.UNSET}


def page(call: Call, name: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    query = f"?{call.raw_query}" if call.raw_query else ""
    return {name: items, "links": {"next": None, "self": f"{call.url}{call.path}{query}", "previous": None}}


def self_link(call: Call, *path: str) -> dict[str, Any]:
    return {"links": {"self": "/".join((f"{call.url}/v3", *path))}}


def flag(text: str | None) -> bool | None:
    """`?enabled`, `?enabled=1` and `?enabled=true` say yes."""
    return None if text is None else text.strip().lower() not in ("0", "false", "no", "off", "f", "n")


# ---- what bodies are made of

Name = Annotated[
    str, Meta(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]*[^\x00-\x20\x7f][^\x00-\x1f\x7f]*$")
]
Id = Annotated[str, Meta(min_length=1, max_length=64)]
Text = Annotated[str, Meta(max_length=16_384)]


class Filter(msgspec.Struct):
    name: str | None = None
    domain_id: str | None = None
    enabled: str | None = None
    parent_id: str | None = None
    is_domain: str | None = None


# ---- what handlers share


def theirs(call: Call, kind: type[Any], word: str, id: str) -> Any:
    """The thing, if policy lets the caller at it; where there is none, only who may look anywhere learns so."""
    with looking(call) as tx:
        thing = store.look(tx, kind, id)
    if kind is Project and thing is not None and thing.is_domain:
        thing = None
    call.check({f"target.{word}.id": id, f"target.{word}.domain_id": thing.domain_id if thing else "-"})
    if thing is None:
        raise NotFound(f"Could not find {word}: {id}.")
    return thing


def domain_asked(call: Call) -> str | None:
    """Which domain a list is of: the one asked for, else that of a domain's own token."""
    return call.query.domain_id or call.context.domain_id


def own_domain(call: Call) -> str:
    if call.context.domain_id:
        return str(call.context.domain_id)
    return str(call.context.project_domain_id) if call.context.project_id else "default"


def domain_there(tx: Tx, id: str) -> Project:
    domain = store.look(tx, Project, id)
    if domain is None or not domain.is_domain:
        raise NotFound(f"Could not find domain: {id}.")
    return domain


def no_move(said: Any, is_in: str) -> None:
    if said not in (UNSET, None, is_in):
        raise Invalid("The domain of a thing cannot be changed.")


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in {**old, **new}.items() if v is not None}


# ---- rules: the names and defaults of the Identity API's own

SYSTEM = "(role:reader and system_scope:all)"
ADMIN = "rule:admin_required"
READ = f"{ADMIN} or {SYSTEM}"


def _read(domain: str, extra: str = "") -> str:
    """Who looks: administrators, readers of the whole system, readers of the thing's domain."""
    return f"{READ} or (role:reader and domain_id:%({domain})s){' or ' + extra if extra else ''}"


def _write(domain: str) -> str:
    """Who changes: administrators, and the managers of the thing's domain."""
    return f"{ADMIN} or (role:manager and domain_id:%({domain})s)"


USER, PROJECT, GROUP = "target.user.domain_id", "target.project.domain_id", "target.group.domain_id"
SELF = "user_id:%(target.user.id)s"
GRANT_READ = f"{READ} or (role:reader and domain_id:%(target.grant.domain_id)s)"
GRANT_WRITE = (
    f"{ADMIN} or (role:manager and domain_id:%(target.grant.domain_id)s and domain_id:%(target.actor.domain_id)s "
    "and rule:domain_managed_target_role)"
)

# fmt: off
RULES = [Rule(f"identity:{name}" if ":" not in name else name[1:], check) for name, check in {
    ":admin_required":                      "role:admin",
    ":context_is_admin":                    "role:admin",
    ":service_role":                        "role:service",
    ":service_or_admin":                    "rule:admin_required or rule:service_role",
    ":owner":                               "user_id:%(user_id)s",
    ":token_subject":                       "user_id:%(target.token.user_id)s",
    ":domain_managed_target_role":          "'manager':%(target.role.name)s or 'member':%(target.role.name)s or 'reader':%(target.role.name)s",

    "check_token":                          f"{READ} or rule:service_role or rule:token_subject",
    "validate_token":                       f"{READ} or rule:service_role or rule:token_subject",
    "revoke_token":                         f"{ADMIN} or rule:token_subject",

    "get_user":                             _read(USER, SELF),
    "list_users":                           _read("target.domain_id"),
    "create_user":                          _write(USER),
    "update_user":                          _write(USER),
    "delete_user":                          _write(USER),
    "list_user_projects":                   _read(USER, SELF),
    "list_groups_for_user":                 _read(USER, SELF),

    "get_project":                          _read(PROJECT, "project_id:%(target.project.id)s"),
    "list_projects":                        _read("target.domain_id"),
    "create_project":                       _write(PROJECT),
    "update_project":                       _write(PROJECT),
    "delete_project":                       _write(PROJECT),

    "get_domain":                           f"{READ} or domain_id:%(target.domain.id)s or project_domain_id:%(target.domain.id)s",
    "list_domains":                         f"{READ} or role:manager",
    "create_domain":                        ADMIN,
    "update_domain":                        ADMIN,
    "delete_domain":                        ADMIN,

    "get_group":                            _read(GROUP),
    "list_groups":                          _read("target.domain_id"),
    "create_group":                         _write(GROUP),
    "update_group":                         _write(GROUP),
    "delete_group":                         _write(GROUP),
    "list_users_in_group":                  _read(GROUP),
    "check_user_in_group":                  _read(GROUP),
    "add_user_to_group":                    f"{ADMIN} or (role:manager and domain_id:%({GROUP})s and domain_id:%({USER})s)",
    "remove_user_from_group":               f"{ADMIN} or (role:manager and domain_id:%({GROUP})s and domain_id:%({USER})s)",

    "get_role":                             f"{READ} or role:manager",
    "list_roles":                           f"{READ} or role:manager",
    "create_role":                          ADMIN,
    "update_role":                          ADMIN,
    "delete_role":                          ADMIN,
    "get_implied_role":                     READ,
    "list_implied_roles":                   READ,
    "check_implied_role":                   READ,
    "create_implied_role":                  ADMIN,
    "delete_implied_role":                  ADMIN,
    "list_role_inference_rules":            READ,

    "check_grant":                          GRANT_READ,
    "list_grants":                          GRANT_READ,
    "create_grant":                         GRANT_WRITE,
    "revoke_grant":                         GRANT_WRITE,
    "list_system_grants_for_user":          READ,
    "check_system_grant_for_user":          READ,
    "create_system_grant_for_user":         ADMIN,
    "revoke_system_grant_for_user":         ADMIN,
    "list_system_grants_for_group":         READ,
    "check_system_grant_for_group":         READ,
    "create_system_grant_for_group":        ADMIN,
    "revoke_system_grant_for_group":        ADMIN,
    "list_role_assignments":                _read("target.domain_id"),

    "get_service":                          READ,
    "list_services":                        READ,
    "create_service":                       ADMIN,
    "update_service":                       ADMIN,
    "delete_service":                       ADMIN,
    "get_endpoint":                         READ,
    "list_endpoints":                       READ,
    "create_endpoint":                      ADMIN,
    "update_endpoint":                      ADMIN,
    "delete_endpoint":                      ADMIN,
    "get_region":                           "",
    "list_regions":                         "",
    "create_region":                        ADMIN,
    "update_region":                        ADMIN,
    "delete_region":                        ADMIN,

    "get_application_credential":           f"{READ} or rule:owner",
    "list_application_credentials":         f"{READ} or rule:owner",
    "create_application_credential":        "rule:owner",
    "delete_application_credential":        f"{ADMIN} or rule:owner",

    "get_credential":                       f"{READ} or user_id:%(target.credential.user_id)s",
    "list_credentials":                     f"{READ} or user_id:%(target.credential.user_id)s",
    "create_credential":                    f"{ADMIN} or user_id:%(target.credential.user_id)s",
    "update_credential":                    f"{ADMIN} or user_id:%(target.credential.user_id)s",
    "delete_credential":                    f"{ADMIN} or user_id:%(target.credential.user_id)s",
    "ec2_get_credential":                   f"{READ} or user_id:%(target.credential.user_id)s",
    "ec2_list_credentials":                 f"{READ} or rule:owner",
    "ec2_create_credential":                f"{ADMIN} or rule:owner",
    "ec2_delete_credential":                f"{ADMIN} or user_id:%(target.credential.user_id)s",

    "get_limit_model":                      "",
    "get_registered_limit":                 "",
    "list_registered_limits":               "",
    "create_registered_limits":             ADMIN,
    "update_registered_limit":              ADMIN,
    "delete_registered_limit":              ADMIN,
    "get_limit":                            f"{READ} or domain_id:%(target.limit.domain_id)s or project_id:%(target.limit.project_id)s",
    "list_limits":                          "",
    "create_limits":                        ADMIN,
    "update_limit":                         ADMIN,
    "delete_limit":                         ADMIN,
}.items()]
# fmt: on
