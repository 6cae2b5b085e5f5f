"""Limits and quota sets: what a project may have, what it has, and an administrator's other word."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kilonova.api.allowance import allowance
from kilonova.api.bodies import Boolish, truth
from kilonova.api.registry import R
from kilonova.kit.db import Tx
from kilonova.kit.errors import Forbidden, Invalid, Unavailable
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType, until
from kilonova.model.limits import NAMES, Unified
from kilonova.store import catalog, quotas, server_groups
from kilonova.store.quotas import Most

MAX = 2**31 - 1
NETWORK = (
    "fixed_ips",
    "floating_ips",
    "security_group_rules",
    "security_groups",
)  # placeholders: the network service has them
FILES = ("injected_file_content_bytes", "injected_file_path_bytes", "injected_files")
OTHERS = ("cores", "instances", "key_pairs", "metadata_items", "ram", "server_group_members", "server_groups")
COUNTED = ("instances", "cores", "ram")
INNER = {"injected_file_path_bytes": "injected_file_path_length"}  # the configuration's word


def members(version: int) -> list[str]:
    """What a quota set holds at this version."""
    return [*OTHERS, *(NETWORK if version < 36 else ()), *(FILES if version < 57 else ())]


def shown(version: int, limits: dict[str, int]) -> dict[str, int]:
    return {m: limits.get(INNER.get(m, m), -1) for m in members(version)}


# ---- /limits


class Tenant(msgspec.Struct):
    tenant_id: list[str] = []


@R.get("/v2.1/limits", query=Tenant, strict="2.75", policy="os_compute_api:limits")
def limits(call: Call) -> dict[str, Any]:
    project = call.context.project_id or ""
    if call.query.tenant_id:
        project = call.query.tenant_id[-1]
        call.check(
            rule="os_compute_api:limits:other_project", target={"project_id": project, "user_id": call.context.user_id}
        )
    most = allowance(call, project)
    with call.world.db.read() as tx:
        allowed, used = _limits(tx, most, project), _counted(tx, most, project)
        groups = server_groups.count(tx, project)
    absolute = {
        "maxTotalInstances": allowed["instances"],
        "maxTotalCores": allowed["cores"],
        "maxTotalRAMSize": allowed["ram"],
        "maxTotalKeypairs": allowed["key_pairs"],
        "maxServerMeta": allowed["metadata_items"],
        "maxServerGroups": allowed["server_groups"],
        "maxServerGroupMembers": allowed["server_group_members"],
        "totalInstancesUsed": used["instances"],
        "totalCoresUsed": used["cores"],
        "totalRAMUsed": used["ram"],
        "totalServerGroupsUsed": groups,
    }
    if call.version < 36:
        absolute |= {"maxTotalFloatingIps": -1, "maxSecurityGroups": -1, "maxSecurityGroupRules": -1}
        absolute |= {"totalFloatingIpsUsed": 0, "totalSecurityGroupsUsed": 0}
    if call.version < 39:
        absolute["maxImageMeta"] = allowed["metadata_items"]
    if call.version < 57:
        absolute |= {
            "maxPersonality": allowed["injected_files"],
            "maxPersonalitySize": allowed["injected_file_content_bytes"],
        }
    return {"limits": {"rate": [], "absolute": absolute}}


# ---- /os-quota-sets


class User(msgspec.Struct):
    user_id: list[str] = []


Limit = Annotated[int, Meta(ge=-1, le=MAX)] | Annotated[str, Meta(pattern=r"^-?[0-9]+$", max_length=12)] | UnsetType
NetworkLimit = Annotated[Limit, until("2.35")]
FileLimit = Annotated[Limit, until("2.56")]


class Wish(msgspec.Struct, forbid_unknown_fields=True):
    instances: Limit = UNSET
    cores: Limit = UNSET
    ram: Limit = UNSET
    metadata_items: Limit = UNSET
    key_pairs: Limit = UNSET
    server_groups: Limit = UNSET
    server_group_members: Limit = UNSET
    floating_ips: NetworkLimit = UNSET
    fixed_ips: NetworkLimit = UNSET
    security_groups: NetworkLimit = UNSET
    security_group_rules: NetworkLimit = UNSET
    injected_files: FileLimit = UNSET
    injected_file_content_bytes: FileLimit = UNSET
    injected_file_path_bytes: FileLimit = UNSET
    force: Boolish = False


class Body(msgspec.Struct, forbid_unknown_fields=True):
    quota_set: Wish


@R.get("/v2.1/os-quota-sets/{id}", query=User, strict="2.75", policy="os_compute_api:os-quota-sets:show", late=True)
def show(call: Call, id: str) -> dict[str, Any]:
    call.check({"project_id": id})
    _known(call, id)
    most = allowance(call, id)
    with call.world.db.read() as tx:
        return {"quota_set": {"id": id} | shown(call.version, _limits(tx, most, id, _user(call)))}


@R.get(
    "/v2.1/os-quota-sets/{id}/detail",
    query=User,
    strict="2.75",
    policy="os_compute_api:os-quota-sets:detail",
    late=True,
)
def detail(call: Call, id: str) -> dict[str, Any]:
    call.check({"project_id": id})
    _known(call, id)
    user, most = _user(call), allowance(call, id)
    with call.world.db.read() as tx:
        allowed, used = shown(call.version, _limits(tx, most, id, user)), _used(tx, most, id, user)
    return {
        "quota_set": {"id": id} | {m: {"limit": n, "in_use": used.get(m, 0), "reserved": 0} for m, n in allowed.items()}
    }


@R.get(
    "/v2.1/os-quota-sets/{id}/defaults", strict="2.1000000", policy="os_compute_api:os-quota-sets:defaults", late=True
)
def defaults(call: Call, id: str) -> dict[str, Any]:
    call.check({"project_id": id})
    _known(call, id)
    most = allowance(call, "")
    with call.world.db.read() as tx:
        return {"quota_set": {"id": id} | shown(call.version, _limits(tx, most, ""))}


@R.put(
    "/v2.1/os-quota-sets/{id}",
    query=User,
    strict="2.75",
    body=Body,
    policy="os_compute_api:os-quota-sets:update",
    late=True,
)
def update(call: Call, id: str) -> dict[str, Any]:
    call.check({"project_id": id})
    _known(call, id)
    wanted, user, most = _wanted(call.body.quota_set), _user(call), allowance(call, id)

    def record(tx: Tx) -> dict[str, int]:
        if isinstance(most, Unified):
            return most.shown()  # it was heard, and is not what holds
        if not truth(call.body.quota_set.force):
            _at_least_what_is_used(tx, most, id, user, wanted)
        if user:
            _at_most_the_projects(tx, call, id, user, wanted)
        quotas.set_limits(tx, id, wanted, user or "")
        return quotas.limits(tx, call.world.config.quota, id, user)

    return {"quota_set": shown(call.version, call.world.db.run(record))}


@R.delete(
    "/v2.1/os-quota-sets/{id}",
    query=User,
    strict="2.75",
    ok=202,
    policy="os_compute_api:os-quota-sets:delete",
    late=True,
)
def delete(call: Call, id: str) -> None:
    call.check({"project_id": id})
    if not call.world.config.unified_limits.enabled:
        call.world.db.run(quotas.forget_limits, id, _user(call))


def _known(call: Call, project: str) -> None:
    try:
        known = call.world.neighbours.identity.project_exists(project)
    except (Unavailable, Forbidden):
        return  # a limit for a project that cannot be checked just now does no harm
    if not known:
        raise Invalid(f"Project ID {project[:80]} is not a valid project.")


def _user(call: Call) -> str | None:
    return call.query.user_id[-1] if call.query.user_id else None


def _limits(tx: Tx, most: Most, project: str, user: str | None = None) -> dict[str, int]:
    return most.shown() if isinstance(most, Unified) else quotas.limits(tx, most, project, user)


def _counted(tx: Tx, most: Most, project: str, user: str | None = None) -> dict[str, int]:
    if isinstance(most, Unified):
        used = quotas.held(tx, project)
        return {word: used.get(NAMES[word], 0) for word in COUNTED}
    return msgspec.structs.asdict(quotas.usage(tx, project, user))


def _used(tx: Tx, most: Most, project: str, user: str | None) -> dict[str, int]:
    used = _counted(tx, most, project, user)
    used["server_groups"] = server_groups.count(tx, project, user)
    return used | ({"key_pairs": catalog.count_keypairs(tx, user)} if user else {})


def _wanted(wish: msgspec.Struct) -> dict[str, int]:
    wanted = {}
    for m in (*OTHERS, *NETWORK, *FILES):
        said = getattr(wish, m, UNSET)
        if said is not UNSET:
            n = int(said)
            if not -1 <= n <= MAX:
                raise Invalid(f"Invalid input for field/attribute {m}. Value: {n}. {n} is not between -1 and {MAX}")
            wanted[INNER.get(m, m)] = n
    return wanted


def _at_least_what_is_used(tx: Tx, most: Most, project: str, user: str | None, wanted: dict[str, int]) -> None:
    used = _used(tx, most, project, user)
    given = _given_to_users(tx, project) if user is None else {}
    for m, n in wanted.items():
        least = max(used.get(m, 0), given.get(m, 0))
        if 0 <= n < least:
            raise Invalid(
                f"Quota limit {n} for {m} must be greater than or equal to already used and reserved {least}."
            )


def _at_most_the_projects(tx: Tx, call: Call, project: str, user: str, wanted: dict[str, int]) -> None:
    whole, given = quotas.limits(tx, call.world.config.quota, project), _given_to_users(tx, project)
    mine = quotas.own_limits(tx, project, user)
    for m, n in wanted.items():
        most = whole.get(m, -1)
        if most >= 0 and not 0 <= n <= most - given.get(m, 0) + max(0, mine.get(m, 0)):
            left = most - given.get(m, 0) + max(0, mine.get(m, 0))
            raise Invalid(f"Quota limit {n} for {m} must be less than or equal to {left}.")


def _given_to_users(tx: Tx, project: str) -> dict[str, int]:
    given: dict[str, int] = {}
    for _, resource, n in quotas.users_limits(tx, project):
        given[resource] = given.get(resource, 0) + max(0, n)
    return given


# ---- /os-quota-class-sets


class ClassWish(msgspec.Struct, forbid_unknown_fields=True):
    instances: Limit = UNSET
    cores: Limit = UNSET
    ram: Limit = UNSET
    metadata_items: Limit = UNSET
    key_pairs: Limit = UNSET
    server_groups: Limit = UNSET
    server_group_members: Limit = UNSET
    floating_ips: Annotated[Limit, until("2.49")] = UNSET
    fixed_ips: Annotated[Limit, until("2.49")] = UNSET
    security_groups: Annotated[Limit, until("2.49")] = UNSET
    security_group_rules: Annotated[Limit, until("2.49")] = UNSET
    injected_files: FileLimit = UNSET
    injected_file_content_bytes: FileLimit = UNSET
    injected_file_path_bytes: FileLimit = UNSET


class ClassBody(msgspec.Struct, forbid_unknown_fields=True):
    quota_class_set: ClassWish


@R.get("/v2.1/os-quota-class-sets/{id}", policy="os_compute_api:os-quota-class-sets:show")
def show_class(call: Call, id: str) -> dict[str, Any]:
    allowance(call, "")  # asked here, for within a transaction nobody is waited for
    with call.world.db.read() as tx:
        return {"quota_class_set": {"id": id} | _of_class(call, tx, id)}


@R.put("/v2.1/os-quota-class-sets/{id}", body=ClassBody, policy="os_compute_api:os-quota-class-sets:update")
def update_class(call: Call, id: str) -> dict[str, Any]:
    if len(id) > 58:
        raise Invalid("quota class names are at most 58 characters long")
    wanted, most = _wanted(call.body.quota_class_set), allowance(call, "")

    def record(tx: Tx) -> dict[str, int]:
        if not isinstance(most, Unified):
            quotas.set_limits(tx, f"class:{id}", wanted)
        return _of_class(call, tx, id)

    return {"quota_class_set": call.world.db.run(record)}


def _of_class(call: Call, tx: Tx, name: str) -> dict[str, int]:
    most = allowance(call, "")
    if isinstance(most, Unified):
        limits_ = most.shown()
    else:
        limits_ = msgspec.structs.asdict(most) | quotas.own_limits(tx, f"class:{name}")
    groups = ("server_groups", "server_group_members")
    hidden = groups if call.version < 50 else NETWORK
    names = [*OTHERS, *NETWORK, *(FILES if call.version < 57 else ())]
    return {m: limits_.get(INNER.get(m, m), -1) for m in names if m not in hidden}
