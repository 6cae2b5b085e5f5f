"""The Block Storage API v3: volumes, snapshots, backups, types, attachments. Small, real, replaceable.

    world = open_store(db, clock, ids, config.volume, directory, images=…, host=…, authenticate=…)
    service = make_service(world, config.policy.file)
    recover(world)

A file is a resource; `frame` is what all have in common, `bytes` where the bytes lie, `world` how long acts are
carried.  Groups, transfers, encryption and several back ends are not there: their addresses answer with 404.
"""

from collections.abc import Callable
from pathlib import Path

from kilonova.clients import Image
from kilonova.companions.volume import about, actions, attachments, backups, quotas, snapshots, types, volumes
from kilonova.companions.volume.bytes import Bytes, Room
from kilonova.companions.volume.frame import DIALECT, VERSIONS, R
from kilonova.companions.volume.rules import RULES
from kilonova.companions.volume.world import Crew, World, resume
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.db import Db
from kilonova.kit.http import Service
from kilonova.kit.policy import Policy
from kilonova.kit.routes import Context
from kilonova.model import options
from kilonova.store import volumes as store

CHAPTERS = (about, actions, attachments, backups, quotas, snapshots, types, volumes)


def open_store(
    db: Db,
    clock: Clock,
    ids: Ids,
    config: options.Volume,
    directory: Path,
    *,
    images: Image,
    host: str,
    authenticate: Callable[[str], Context],
    crew: Crew | None = None,
) -> World:
    """`directory` keeps the bytes; it is made. `images` is asked in our own name for what volumes are made of."""

    def fetch(id: str, write: Callable[[bytes], object]) -> None:
        images.download(id, write)

    kept = Bytes(directory, fetch, clock=clock)
    world = World(db, clock, ids, config, kept, images, host, authenticate, crew=crew)
    with db.tx() as tx:
        types.furnish(tx, world)
    return world


def recover(world: World) -> list[str]:
    """At start-up, before anybody asks: files without an owner go, and what was promised is gone on with."""

    def known() -> dict[Room, set[str]]:
        with world.db.read() as tx:
            return {
                "volumes": {v.id for v in store.find(tx, store.Volume)},
                "snapshots": {s.id for s in store.find(tx, store.Snapshot)},
                "backups": {b.id for b in store.find(tx, store.Backup)},
            }

    swept = world.bytes.sweep(known)
    resume(world)
    return swept


def make_service(world: World, policy_file: Path | None = None) -> Service:
    """The service as a WSGI application, to be mounted at `/volume`."""
    return Service(
        R,
        DIALECT,
        world=world,
        authenticate=world.authenticate,
        policy=Policy(RULES, policy_file),
        ids=world.ids,
        versions=VERSIONS,
    )


__all__ = ["Crew", "World", "make_service", "open_store", "recover", "resume"]
