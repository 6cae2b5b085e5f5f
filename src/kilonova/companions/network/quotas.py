"""Shares: how much of everything a project may have, and how much it has."""

from typing import Annotated as A
from typing import Any

import msgspec
from msgspec import UNSET, Meta

from kilonova.companions.network import frame
from kilonova.companions.network.frame import Flag, R, Unset, View
from kilonova.companions.network.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import NotFound
from kilonova.kit.routes import Call
from kilonova.store import networks as store

Limit = A[int, Meta(ge=-1, le=2**31 - 1)]


class QuotaChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Limits. With `check_limit` none may be below what is used already; `force` says that it may, as it may anyhow."""

    check_limit: Flag | Unset = UNSET
    force: Flag | Unset = UNSET
    network: Limit | Unset = UNSET
    subnet: Limit | Unset = UNSET
    port: Limit | Unset = UNSET
    router: Limit | Unset = UNSET
    floatingip: Limit | Unset = UNSET
    security_group: Limit | Unset = UNSET
    security_group_rule: Limit | Unset = UNSET
    subnetpool: Limit | Unset = UNSET
    rbac_policy: Limit | Unset = UNSET


class QuotaBody(msgspec.Struct, forbid_unknown_fields=True):
    quota: QuotaChange


def standard(world: World) -> dict[str, int]:
    """Limits of a project that was given none."""
    c = world.config
    return {
        "network": c.quota_network,
        "subnet": c.quota_subnet,
        "port": c.quota_port,
        "router": c.quota_router,
        "floatingip": c.quota_floatingip,
        "security_group": c.quota_security_group,
        "security_group_rule": c.quota_security_group_rule,
        "subnetpool": store.UNLIMITED,
        "rbac_policy": store.UNLIMITED,
    }


def _limits(tx: Tx, world: World, project: str) -> dict[str, int]:
    own = store.shares(tx, project)
    return {r: own[r].limit if r in own and own[r].limit is not None else n for r, n in standard(world).items()}  # type: ignore[misc]


def _may_see(call: Call, project: str) -> None:
    """Everybody his own; others' are not there."""
    call.check(frame.STRANGER, "get_quota")
    if len(project) > 255 or "\x00" in project:
        raise NotFound("The resource could not be found.", code="HTTPNotFound")
    if project != call.context.project_id and not frame.trusted(call):
        raise NotFound(f"Quota for tenant {frame.printable(project)} could not be found.", code="TenantQuotaNotFound")


@R.get("/v2.0/quotas", policy="list_quotas", late=True)
def list_(call: Call) -> View:
    call.check(frame.STRANGER)
    with call.world.db.read() as tx:
        own = store.limited(tx)
    return {"quotas": [{**standard(call.world), **q, "project_id": p, "tenant_id": p} for p, q in own.items()]}


@R.get("/v2.0/quotas/{project}", policy="get_quota", late=True)
def show(call: Call, project: str) -> View:
    _may_see(call, project)
    with call.world.db.read() as tx:
        return {"quota": _limits(tx, call.world, project)}


@R.get("/v2.0/quotas/{project}/default", policy="get_quota", late=True)
def default(call: Call, project: str) -> View:
    _may_see(call, project)
    return {"quota": standard(call.world)}


def _details(call: Call, project: str) -> View:
    _may_see(call, project)
    with call.world.db.read() as tx:
        limits, own = _limits(tx, call.world, project), store.shares(tx, project)
    return {
        "quota": {r: {"limit": n, "used": own[r].used if r in own else 0, "reserved": 0} for r, n in limits.items()}
    }


@R.get("/v2.0/quotas/{project}/details", policy="get_quota", late=True)
def details(call: Call, project: str) -> View:
    return _details(call, project)


@R.get("/v2.0/quotas/{project}/details.json", policy="get_quota", late=True)
def details_json(call: Call, project: str) -> View:
    """The name that the API's reference and its clients use."""
    return _details(call, project)


@R.put("/v2.0/quotas/{project}", body=QuotaBody, policy="update_quota", late=True)
def update(call: Call, project: str) -> View:
    call.check(frame.STRANGER)
    _may_see(call, project)
    told: dict[str, Any] = frame.said(call.body.quota)
    check, _ = told.pop("check_limit", False), told.pop("force", False)

    def work(tx: Tx) -> dict[str, int]:
        own = store.shares(tx, project) if check else {}
        for resource, limit in told.items():
            if resource in own and 0 <= limit < own[resource].used:
                raise frame.bad(
                    f"Invalid input for {resource}. Reason: {own[resource].used} are used already.", "InvalidQuotaValue"
                )
            store.limit(tx, project, resource, limit)
        return _limits(tx, call.world, project)

    return {"quota": call.world.change(work)}


@R.delete("/v2.0/quotas/{project}", ok=204, policy="delete_quota", late=True)
def delete(call: Call, project: str) -> None:
    """Back to what everybody has."""
    call.check(frame.STRANGER)
    _may_see(call, project)

    def work(tx: Tx) -> None:
        own = store.limited(tx).get(project, {})
        if not own:
            raise NotFound(
                f"Quota for tenant {frame.printable(project)} could not be found.", code="TenantQuotaNotFound"
            )
        for resource in own:
            store.limit(tx, project, resource, None)

    call.world.change(work)
