"""The Identity API v3, whole, and its tokens.

`open_realm` gives the world, `bootstrap` the first rows, `service` the WSGI application.  What there is besides
tokens has files of its own: `people.py`, `roles.py`, `catalog.py`, and `accounts.py` for users' other ways in.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

import kilonova.companions.accounts  # its routes are registered by being imported; so with the next two
import kilonova.companions.people
import kilonova.companions.roles  # noqa: F401
from kilonova.clients import SERVICE_USER
from kilonova.companions import catalog
from kilonova.companions.login import EXPIRED_FOR_S, Auth, Door, Gate, Seen, described, issue, log_in
from kilonova.companions.realm import RULES, R, World, changing, flag, self_link
from kilonova.companions.tokens import REFUSED, Guesses, Keys, Passwords, kept_secret
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Forbidden, NotFound, Unknown
from kilonova.kit.http import Dialect, Service
from kilonova.kit.policy import Policy
from kilonova.kit.routes import Call, Reply
from kilonova.model import options
from kilonova.store import identity as store
from kilonova.store.identity import Grant, Project, Role, User

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
        store.changed(tx)
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
        (SERVICE_USER, "system", store.SYSTEM, "reader"),  # who reads limits of all projects
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
