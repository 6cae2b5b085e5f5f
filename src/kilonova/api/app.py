"""The Compute API as a service: the registry of all groups, its dialect, its versions and its judge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kilonova.api import (
    actions,
    aggregates,
    attach,
    audit_log,
    capture,
    catalog,
    consoles,
    create,
    discovery,
    explain,
    extensions,
    external_events,
    gone,
    hosts,
    interfaces,
    keypairs,
    legacy,
    migrations,
    moves,
    notes,
    openapi,
    operators,
    quotas,
    rebuild,
    rescue,
    security,
    server_groups,
    servers,
    shares,
    shelve,
    topology,
    usage,
    verbs,
    volume_snapshots,
    volumes_boot,
)
from kilonova.api.policies import RULES
from kilonova.api.registry import R, World
from kilonova.kit.http import Dialect, Service, Versioned, compute_fault
from kilonova.kit.policy import Policy
from kilonova.kit.routes import Context, Route

GROUPS = (  # importing them fills R
    actions,
    aggregates,
    attach,
    audit_log,
    capture,
    catalog,
    consoles,
    create,
    discovery,
    explain,
    extensions,
    external_events,
    gone,
    hosts,
    interfaces,
    keypairs,
    *legacy.GROUPS,
    migrations,
    moves,
    notes,
    openapi,
    operators,
    quotas,
    rebuild,
    rescue,
    topology,
    security,
    server_groups,
    servers,
    shares,
    shelve,
    usage,
    verbs,
    volume_snapshots,
)
volumes_boot.mirror()
VERSIONS = Versioned("compute", newest=104, old_header="X-OpenStack-Nova-API-Version")
DIALECT = Dialect(
    compute_fault,
    no_method=404,
    plain_unknown=True,
    exact=True,
    strip_project=("/v2.1",),
    request_id_headers=("x-openstack-request-id", "x-compute-request-id"),
    media_types=("application/json", "application/vnd.openstack.compute+json"),
)


def service(
    world: World,
    authenticate: Callable[[str], Context],
    *,
    policy_file: Path | None = None,
    observe: Callable[[Route | None, int, float], None] | None = None,
) -> Service:
    """A WSGI application, to be mounted at `/compute`."""
    api = world.config.api
    more: dict[str, Any] = {"link_prefix": api.compute_link_prefix or ""}
    return Service(
        R,
        DIALECT,
        world=world,
        authenticate=authenticate,
        policy=Policy(RULES, policy_file),
        ids=world.ids,
        versions=VERSIONS,
        max_body_bytes=api.max_request_body_bytes,
        observe=observe,
        **more,
    )
