"""A user's other ways in, and his shares: application credentials, EC2 keys, credentials, unified limits."""

import hashlib
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kilonova.companions.login import Seen, moment, restricted
from kilonova.companions.realm import R, changing, given, looking, page, self_link, wish
from kilonova.kit.clock import parsed
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Forbidden, Invalid, NotFound, Unknown
from kilonova.kit.routes import Call
from kilonova.store import identity as store
from kilonova.store.identity import (
    ApplicationCredential,
    Credential,
    Limit,
    Listed,
    Project,
    RegisteredLimit,
    Role,
    User,
)

# ---- application credentials


class RoleRef(msgspec.Struct):
    id: str | None = None
    name: str | None = None


class CredentialWish(msgspec.Struct, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=255)]
    description: str | None = None
    secret: Annotated[str, Meta(min_length=1)] | None = None
    expires_at: str | None = None
    roles: list[RoleRef] = []
    unrestricted: bool = False
    access_rules: list[Any] | None = None


class CredentialBody(msgspec.Struct):
    application_credential: CredentialWish


class NameFilter(msgspec.Struct):
    name: str | None = None


PATH = "/v3/users/{id}/application_credentials"


@R.post(PATH, body=CredentialBody, ok=201, policy="identity:create_application_credential", late=True)
def create_application_credential(call: Call, id: str) -> Any:
    """The secret is shown here and never again. Its roles are some of those the caller's own token has."""
    call.check({"user_id": id})
    seen = _myself(call)
    said: CredentialWish = call.body.application_credential
    if not seen.context.project_id:
        raise Invalid("An application credential is made with a token of a project.")
    if said.access_rules:
        raise Invalid("Access rules are not supported: no service here would keep them.")
    door = call.world.door
    secret = said.secret or door.ids.password(64)
    wanted = ApplicationCredential(
        id=door.ids.hex(),
        name=said.name,
        user_id=id,
        project_id=seen.context.project_id,
        secret=door.passwords.hash(secret),
        roles=_roles(said.roles, seen.roles),
        description=said.description or "",
        unrestricted=said.unrestricted,
        expires_at=_later(said.expires_at, door.clock.now()),
    )
    with changing(call) as tx:
        store.keep(tx, wanted)
        view = _credential(call, tx, wanted)
    return {"application_credential": view | {"secret": secret}}


@R.get(PATH, query=NameFilter, policy="identity:list_application_credentials", late=True)
def list_application_credentials(call: Call, id: str) -> Any:
    call.check({"user_id": id})
    with looking(call) as tx:
        found = store.find(tx, ApplicationCredential, user_id=id, name=call.query.name)
        return page(call, "application_credentials", [_credential(call, tx, c) for c in found])


@R.get(PATH + "/{credential}", policy="identity:get_application_credential", late=True)
def show_application_credential(call: Call, id: str, credential: str) -> Any:
    call.check({"user_id": id})
    with looking(call) as tx:
        return {"application_credential": _credential(call, tx, _his(tx, id, credential))}


@R.delete(PATH + "/{credential}", ok=204, policy="identity:delete_application_credential", late=True)
def delete_application_credential(call: Call, id: str, credential: str) -> None:
    call.check({"user_id": id})
    _myself(call)
    with changing(call) as tx:
        _his(tx, id, credential)
        store.drop(tx, ApplicationCredential, credential)


def _myself(call: Call) -> Seen:
    """The caller's own token, looked into; no further ways in by a restricted credential."""
    seen: Seen = call.world.gate.seen(call.context.token)
    restricted(seen)
    return seen


def _his(tx: Tx, user_id: str, id: str) -> ApplicationCredential:
    found = store.get(tx, ApplicationCredential, id)
    if found.user_id != user_id:
        raise NotFound(f"Could not find application credential: {id}.")
    return found


def _roles(wanted: list[RoleRef], has: list[tuple[str, str]]) -> list[str]:
    if not wanted:
        return [i for i, _ in has]
    out = []
    for ref in wanted:
        fit = [i for i, n in has if (ref.id is None or ref.id == i) and (ref.name is None or ref.name == n)]
        if len(fit) != 1:
            raise Invalid("An application credential can only have roles that its maker's token has.")
        out += fit
    return sorted(set(out))


def _later(text: str | None, now: float) -> float | None:
    if text is None:
        return None
    try:
        at = parsed(text)
    except (ValueError, OverflowError):
        raise Invalid("expires_at must be a moment in ISO 8601.") from None
    if at <= now:
        raise Invalid("expires_at must be in the future.")
    return at


def _credential(call: Call, tx: Tx, c: ApplicationCredential) -> dict[str, Any]:
    roles = store.find(tx, Role, id=c.roles) if c.roles else []
    return {
        "id": c.id,
        "name": c.name,
        "description": c.description or None,
        "project_id": c.project_id,
        "user_id": c.user_id,
        "roles": [{"id": r.id, "name": r.name, "domain_id": None} for r in roles],
        "unrestricted": c.unrestricted,
        "expires_at": (moment(c.expires_at) or "").removesuffix("Z") or None,
        "system": None,
    } | self_link(call, "users", c.user_id, "application_credentials", c.id)


# ---- EC2 keys, and credentials in general


class Ec2Wish(msgspec.Struct):
    tenant_id: str


EC2 = "/v3/users/{id}/credentials/OS-EC2"


@R.post(EC2, body=Ec2Wish, ok=201, policy="identity:ec2_create_credential", late=True)
def create_ec2(call: Call, id: str) -> Any:
    call.check({"user_id": id})
    _myself(call)
    ids = call.world.door.ids
    access, secret = ids.hex(), ids.hex()
    with changing(call) as tx:
        store.get(tx, User, id)
        if store.get(tx, Project, call.body.tenant_id).is_domain or not store.held(
            tx, id, "project", call.body.tenant_id
        ):
            raise Forbidden("The user has no role on that project.")
        kept = _sealed(call, "ec2", id, call.body.tenant_id, {"access": access, "secret": secret})
        store.keep(tx, kept)
    return {"credential": _ec2(call, kept)}


@R.get(EC2, policy="identity:ec2_list_credentials", late=True)
def list_ec2(call: Call, id: str) -> Any:
    call.check({"user_id": id})
    with looking(call) as tx:
        return page(call, "credentials", [_ec2(call, c) for c in store.find(tx, Credential, user_id=id, type="ec2")])


@R.get(EC2 + "/{access}", policy="identity:ec2_get_credential", late=True)
def show_ec2(call: Call, id: str, access: str) -> Any:
    call.check({"target.credential.user_id": id})
    with looking(call) as tx:
        return {"credential": _ec2(call, _ec2_of(tx, id, access))}


@R.delete(EC2 + "/{access}", ok=204, policy="identity:ec2_delete_credential", late=True)
def delete_ec2(call: Call, id: str, access: str) -> None:
    call.check({"target.credential.user_id": id})
    _myself(call)
    with changing(call) as tx:
        store.drop(tx, Credential, _ec2_of(tx, id, access).id)


def _ec2_of(tx: Tx, user_id: str, access: str) -> Credential:
    found = store.find(tx, Credential, user_id=user_id, type="ec2", access=access)
    if not found:
        raise NotFound(f"Could not find credential: {access}.")
    return found[0]


def _ec2(call: Call, c: Credential) -> dict[str, Any]:
    blob = _opened(call, c)
    about = {"access": blob["access"], "secret": blob["secret"], "user_id": c.user_id, "tenant_id": c.project_id}
    return about | {"trust_id": None} | self_link(call, "users", c.user_id, "credentials", "OS-EC2", blob["access"])


def _sealed(call: Call, type: str, user_id: str, project_id: str | None, blob: Any) -> Credential:
    world = call.world
    access = blob.get("access") if type == "ec2" and isinstance(blob, dict) else None
    if access is not None and (not isinstance(access, str) or not 0 < len(access) <= 64):
        raise Invalid("access must be a text of up to 64 letters.")
    id = hashlib.sha256(access.encode()).hexdigest() if access else world.door.ids.hex()
    sealed = world.vault.encrypt(msgspec.json.encode(blob), world.door.clock.now())
    return Credential(id, type, user_id, sealed, project_id, access)


def _opened(call: Call, c: Credential) -> Any:
    """Raises NotFound where its key is gone."""
    try:
        return msgspec.json.decode(call.world.vault.decrypt(c.blob, longest=1 << 20))
    except Unknown:
        raise NotFound(f"Could not find credential: {c.id}.", why="it was encrypted with a key that is gone") from None


class BlobWish(msgspec.Struct, kw_only=True):
    blob: Annotated[str, Meta(max_length=65_536)] | dict[str, Any]
    type: Annotated[str, Meta(min_length=1, max_length=255)]
    user_id: str | None = None
    project_id: str | None = None


class BlobChange(msgspec.Struct, kw_only=True):
    blob: Annotated[str, Meta(max_length=65_536)] | dict[str, Any] | UnsetType = UNSET
    project_id: str | None | UnsetType = UNSET


class BlobBody(msgspec.Struct):
    credential: dict[str, Any]


class BlobFilter(msgspec.Struct):
    user_id: str | None = None
    type: str | None = None


@R.post("/v3/credentials", body=BlobBody, ok=201, policy="identity:create_credential", late=True)
def create_credential(call: Call) -> Any:
    said, _ = wish(call.body.credential, BlobWish)
    user_id = said.user_id or call.context.user_id
    call.check({"target.credential.user_id": user_id})
    _myself(call)
    if said.type == "ec2" and not said.project_id:
        raise Invalid("An EC2 credential needs a project_id.")
    kept = _sealed(call, said.type, user_id, said.project_id, _blob(said.blob, said.type))
    with changing(call) as tx:
        store.get(tx, User, user_id)
        if said.project_id:
            store.get(tx, Project, said.project_id)
            if not call.context.is_admin and said.project_id != call.context.project_id:
                raise Forbidden("The project of a credential is that of the token it is made with.")
        store.keep(tx, kept)
    return {"credential": _blob_view(call, kept)}


@R.get("/v3/credentials", query=BlobFilter, policy="identity:list_credentials", late=True)
def list_credentials(call: Call) -> Any:
    mine = call.query.user_id or call.context.user_id
    call.check({"target.credential.user_id": mine})
    everybody = call.query.user_id is None and call.may("identity:list_credentials", {"target.credential.user_id": "-"})
    with looking(call) as tx:
        found = store.find(tx, Credential, user_id=None if everybody else mine, type=call.query.type)
    return page(call, "credentials", [_blob_view(call, c) for c in found])


@R.get("/v3/credentials/{id}", policy="identity:get_credential", late=True)
def show_credential(call: Call, id: str) -> Any:
    return {"credential": _blob_view(call, _credential_of(call, id))}


@R.patch("/v3/credentials/{id}", body=BlobBody, policy="identity:update_credential", late=True)
def update_credential(call: Call, id: str) -> Any:
    old = _credential_of(call, id)
    _myself(call)
    said, _ = wish(call.body.credential, BlobChange)
    values: dict[str, Any] = {}
    if said.blob is not UNSET:
        kept = _sealed(call, old.type, old.user_id, old.project_id, _blob(said.blob, old.type))
        if kept.access != old.access:
            raise Invalid("The access key of a credential stays as it is.")
        values["blob"] = kept.blob
    if said.project_id is not UNSET:
        if not call.context.is_admin and said.project_id != call.context.project_id:
            raise Forbidden("The project of a credential is that of the token it is made with.")
        values["project_id"] = said.project_id
    with changing(call) as tx:
        return {"credential": _blob_view(call, store.change(tx, Credential, id, values))}


@R.delete("/v3/credentials/{id}", ok=204, policy="identity:delete_credential", late=True)
def delete_credential(call: Call, id: str) -> None:
    _credential_of(call, id)
    _myself(call)
    with changing(call) as tx:
        store.drop(tx, Credential, id)


def _credential_of(call: Call, id: str) -> Credential:
    with looking(call) as tx:
        found = store.look(tx, Credential, id)
    call.check({"target.credential.user_id": found.user_id if found else "-"})
    if found is None:
        raise NotFound(f"Could not find credential: {id}.")
    return found


def _blob(said: Any, type: str) -> Any:
    if type != "ec2":
        return said
    try:
        blob = msgspec.json.decode(said) if isinstance(said, str) else said
    except (msgspec.DecodeError, UnicodeDecodeError):
        blob = None
    if not isinstance(blob, dict) or not isinstance(blob.get("access"), str) or not isinstance(blob.get("secret"), str):
        raise Invalid("The blob of an EC2 credential is a JSON object with access and secret.")
    return blob


def _blob_view(call: Call, c: Credential) -> dict[str, Any]:
    blob = _opened(call, c)
    said = blob if isinstance(blob, str) else msgspec.json.encode(blob).decode()
    about = {"id": c.id, "type": c.type, "user_id": c.user_id, "project_id": c.project_id, "blob": said}
    return about | self_link(call, "credentials", c.id)


# ---- unified limits


Number = Annotated[int, Meta(ge=-1, le=2_147_483_647)]
Resource = Annotated[str, Meta(min_length=1, max_length=255)]


class RegisteredWish(msgspec.Struct, kw_only=True):
    service_id: str
    resource_name: Resource
    default_limit: Number
    region_id: str | None = None
    description: str | None = None


class RegisteredChange(msgspec.Struct, kw_only=True):
    service_id: str | UnsetType = UNSET
    resource_name: Resource | UnsetType = UNSET
    default_limit: Number | UnsetType = UNSET
    region_id: str | None | UnsetType = UNSET
    description: str | None | UnsetType = UNSET


class RegisteredMany(msgspec.Struct):
    registered_limits: list[RegisteredWish]


class RegisteredOne(msgspec.Struct):
    registered_limit: RegisteredChange


class LimitWish(msgspec.Struct, kw_only=True):
    service_id: str
    resource_name: Resource
    resource_limit: Number
    region_id: str | None = None
    project_id: str | None = None
    domain_id: str | None = None
    description: str | None = None


class LimitChange(msgspec.Struct, kw_only=True):
    resource_limit: Number | UnsetType = UNSET
    description: str | None | UnsetType = UNSET


class LimitMany(msgspec.Struct):
    limits: list[LimitWish]


class LimitOne(msgspec.Struct):
    limit: LimitChange


class LimitFilter(msgspec.Struct):
    service_id: str | None = None
    resource_name: str | None = None
    region_id: str | None = None
    project_id: str | None = None
    domain_id: str | None = None


@R.get("/v3/limits/model", policy="identity:get_limit_model")
def limit_model(call: Call) -> Any:
    return {"model": {"name": "flat", "description": "Limits of projects are independent of one another."}}


@R.get("/v3/registered_limits", query=LimitFilter, policy="identity:list_registered_limits")
def list_registered(call: Call) -> Any:
    q = call.query
    with looking(call) as tx:
        about = {"service_id": q.service_id, "resource_name": q.resource_name, "region_id": q.region_id}
        found = store.find(tx, RegisteredLimit, **about)
    return page(call, "registered_limits", [_limit(call, "registered_limits", x) for x in found])


@R.post("/v3/registered_limits", body=RegisteredMany, ok=201, policy="identity:create_registered_limits")
def create_registered(call: Call) -> Any:
    made = [RegisteredLimit(call.world.door.ids.hex(), **given(w)) for w in call.body.registered_limits]
    with changing(call) as tx:
        for x in made:
            store.get(tx, Listed, x.service_id)
            _alone(tx, RegisteredLimit, service_id=x.service_id, resource_name=x.resource_name, region_id=x.region_id)
            store.keep(tx, x)
    return {"registered_limits": [_limit(call, "registered_limits", x) for x in made]}


@R.get("/v3/registered_limits/{id}", policy="identity:get_registered_limit")
def show_registered(call: Call, id: str) -> Any:
    with looking(call) as tx:
        return {"registered_limit": _limit(call, "registered_limits", store.get(tx, RegisteredLimit, id))}


@R.patch("/v3/registered_limits/{id}", body=RegisteredOne, policy="identity:update_registered_limit")
def update_registered(call: Call, id: str) -> Any:
    with changing(call) as tx:
        changed = store.change(tx, RegisteredLimit, id, given(call.body.registered_limit))
        store.get(tx, Listed, changed.service_id)
    return {"registered_limit": _limit(call, "registered_limits", changed)}


@R.delete("/v3/registered_limits/{id}", ok=204, policy="identity:delete_registered_limit")
def delete_registered(call: Call, id: str) -> None:
    with changing(call) as tx:
        old = store.get(tx, RegisteredLimit, id)
        if store.find(tx, Limit, service_id=old.service_id, resource_name=old.resource_name):
            raise Forbidden(f"Unable to update or delete registered limit {id}: there are limits of projects under it.")
        store.drop(tx, RegisteredLimit, id)


@R.get("/v3/limits", query=LimitFilter, policy="identity:list_limits")
def list_limits(call: Call) -> Any:
    """Whoever may not look anywhere sees those of his own project or domain."""
    q: LimitFilter = call.query
    about = msgspec.structs.asdict(q)
    if not call.may("identity:get_limit", _limit_target(None, None)):
        about |= {"project_id": call.context.project_id, "domain_id": call.context.domain_id}
        if not (call.context.project_id or call.context.domain_id):
            return page(call, "limits", [])
    with looking(call) as tx:
        found = store.find(tx, Limit, **about)
    return page(call, "limits", [_limit(call, "limits", x) for x in found])


@R.post("/v3/limits", body=LimitMany, ok=201, policy="identity:create_limits")
def create_limits(call: Call) -> Any:
    made = [Limit(call.world.door.ids.hex(), **given(w)) for w in call.body.limits]
    with changing(call) as tx:
        for x in made:
            if (x.project_id is None) == (x.domain_id is None):
                raise Invalid("A limit is of a project or of a domain.")
            store.get(tx, Project, x.project_id or x.domain_id or "")
            if not store.find(tx, RegisteredLimit, service_id=x.service_id, resource_name=x.resource_name):
                raise Forbidden(
                    f"Unable to create a limit that has no corresponding registered limit ({x.resource_name})."
                )
            about = {"service_id": x.service_id, "resource_name": x.resource_name, "region_id": x.region_id}
            _alone(tx, Limit, project_id=x.project_id, domain_id=x.domain_id, **about)
            store.keep(tx, x)
    return {"limits": [_limit(call, "limits", x) for x in made]}


@R.get("/v3/limits/{id}", policy="identity:get_limit", late=True)
def show_limit(call: Call, id: str) -> Any:
    with looking(call) as tx:
        found = store.look(tx, Limit, id)
    call.check(_limit_target(found.project_id if found else None, found.domain_id if found else None))
    if found is None:
        raise NotFound(f"Could not find limit: {id}.")
    return {"limit": _limit(call, "limits", found)}


@R.patch("/v3/limits/{id}", body=LimitOne, policy="identity:update_limit")
def update_limit(call: Call, id: str) -> Any:
    with changing(call) as tx:
        return {"limit": _limit(call, "limits", store.change(tx, Limit, id, given(call.body.limit)))}


@R.delete("/v3/limits/{id}", ok=204, policy="identity:delete_limit")
def delete_limit(call: Call, id: str) -> None:
    with changing(call) as tx:
        store.drop(tx, Limit, id)


def _limit_target(project_id: str | None, domain_id: str | None) -> dict[str, str]:
    return {"target.limit.project_id": project_id or "-", "target.limit.domain_id": domain_id or "-"}


def _alone(tx: Tx, kind: type[Any], **about: Any) -> None:
    """No unique index: a region that is NULL would be none to a database."""
    for x in store.find(tx, kind, **about):
        if all(getattr(x, k) == v for k, v in about.items()):
            raise Conflict(f"Conflict occurred attempting to store limit - there is one for {about['resource_name']}.")


def _limit(call: Call, path: str, x: Limit | RegisteredLimit) -> dict[str, Any]:
    return msgspec.structs.asdict(x) | self_link(call, path, x.id)
