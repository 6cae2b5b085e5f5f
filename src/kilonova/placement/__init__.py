"""The Placement API 1.0-1.39: what there is, who holds it, and who could serve a request.

    world = World(db, clock, ids, config.placement)
    service = make_service(world, authenticate, config.policy.file)

A file is a resource; `frame` is what all have in common.  The tables are those that the scheduler reads and builds
claim from: what is written here counts there, and the other way round.
"""

from collections.abc import Callable
from pathlib import Path

from kilonova.kit.http import Service
from kilonova.kit.policy import Policy
from kilonova.kit.routes import Context
from kilonova.placement import allocations, candidates, inventories, names, providers, reshaper, usages
from kilonova.placement.frame import DIALECT, MAX_BODY_BYTES, VERSIONS, R, World
from kilonova.placement.policies import RULES

CHAPTERS = (allocations, candidates, inventories, names, providers, reshaper, usages)


def make_service(world: World, authenticate: Callable[[str], Context], policy_file: Path | None = None) -> Service:
    """The service as a WSGI application, to be mounted at `/placement`."""
    return Service(
        R,
        DIALECT,
        world=world,
        authenticate=authenticate,
        policy=Policy(RULES, policy_file),
        ids=world.ids,
        versions=VERSIONS,
        max_body_bytes=MAX_BODY_BYTES,
    )


__all__ = ["World", "make_service"]
