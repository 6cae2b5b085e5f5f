"""The Network API v2.0: networks, subnets, ports, security groups, routers, floating IPs. Small, real, replaceable.

    world = World(db, clock, ids, config.network, wires={host: wires.apply})
    service = make_service(world, authenticate, config.policy.file)
    bootstrap(world, admin_project_id)

A file is a resource; `frame` is what all have in common, `wiring` what hosts are told, `ipam` who gets which address.
"""

from collections.abc import Callable
from pathlib import Path

from kilonova.companions.network import (
    about,
    bindings,
    first,
    floating,
    networks,
    ports,
    quotas,
    routers,
    security,
    subnets,
)
from kilonova.companions.network.first import bootstrap
from kilonova.companions.network.frame import DIALECT, R
from kilonova.companions.network.planes import Planes
from kilonova.companions.network.rules import RULES
from kilonova.companions.network.wiring import meet, rewire, weave, wiring
from kilonova.companions.network.world import World
from kilonova.kit.http import Service
from kilonova.kit.policy import Policy
from kilonova.kit.routes import Context

CHAPTERS = (about, bindings, first, floating, networks, ports, quotas, routers, security, subnets)
MAX_BODY_BYTES = 1 << 20  # ports are made by the hundred


def make_service(world: World, authenticate: Callable[[str], Context], policy_file: Path | None = None) -> Service:
    """The service as a WSGI application, to be mounted at `/network`."""
    return Service(
        R,
        DIALECT,
        world=world,
        authenticate=authenticate,
        policy=Policy(RULES, policy_file),
        ids=world.ids,
        max_body_bytes=MAX_BODY_BYTES,
    )


__all__ = ["Planes", "World", "bootstrap", "make_service", "meet", "rewire", "weave", "wiring"]
