"""Roles, what they imply, and who has which one where."""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from kilonova.companions.realm import (
    Filter,
    Id,
    Name,
    R,
    Text,
    changing,
    domain_there,
    flag,
    given,
    looking,
    merged,
    page,
    self_link,
    wish,
)
from kilonova.kit.db import Tx
from kilonova.kit.errors import Forbidden, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.store import identity as store
from kilonova.store.identity import Grant, Group, Project, Role, User

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
            domain_there(tx, role.domain_id)
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
        values["extra"] = merged(old.extra, extra)
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
