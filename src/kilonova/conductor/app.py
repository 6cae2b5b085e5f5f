"""A conductor: carries runs, hears hosts, mends what nobody asked about. Any number of them share one database."""

import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from kilonova.clients import Neighbours
from kilonova.conductor import (
    addresses,
    attach,
    capture,
    capture_volumes,
    create,
    delete,
    deserted,
    evacuate,
    examine,
    interfaces,
    live_migrate,
    meet,
    notices,
    outside,
    precache,
    rebuild,
    rescue,
    resize,
    shares,
    shelve,
    verbs,
    volume_snapshots,
    volumes,
    watch,
)
from kilonova.conductor.reports import Reports
from kilonova.conductor.world import World
from kilonova.contracts.conductor import Greeting, HypervisorAway, PowerChanged, Report, Sending
from kilonova.contracts.scheduler import Choose, Chosen
from kilonova.kit.ask import Bus
from kilonova.kit.bus import Wake
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.db import Db
from kilonova.kit.reconcile import Reconcilers
from kilonova.kit.worker import Worker
from kilonova.kit.workflow import Engine, Workflow
from kilonova.model.options import Config

FLOWS: list[Workflow[Any]] = [
    create.build, create.build_bare, verbs.act, delete.delete, watch.mend, watch.heal, addresses.readdress, resize.resize, resize.confirm,
    resize.revert, capture.capture, capture_volumes.capture_volumes, interfaces.attach_interface, interfaces.detach_interface,
    live_migrate.live_migrate,
    evacuate.evacuate,
    watch.tidy,
    precache.precache,
    volume_snapshots.snapshot_volume, volume_snapshots.merge_volume,
    examine.examine, examine.examine_host,
    attach.attach_volume, attach.detach_volume, attach.extend_volume, attach.swap_volume,
    shares.attach_share, shares.detach_share,
    rebuild.rebuild, rescue.rescue, rescue.unrescue, rescue.change_password, rescue.crash_dump,
    shelve.shelve, shelve.offload, shelve.unshelve, delete.soft_delete, delete.restore,
]  # fmt: skip


class Conductor:
    """`choose` is a scheduler of this process, or asks one over the bus.

    Without `start` nothing happens by itself: a simulator calls `engine.receive`, `engine.sweep` and
    `reconcilers.turn` when it likes.
    """

    def __init__(
        self,
        me: str,
        db: Db,
        bus: Bus,
        neighbours: Neighbours,
        choose: Callable[[Choose], Chosen],
        *,
        clock: Clock,
        ids: Ids,
        dice: random.Random,
        config: Config | None = None,
        address: str = "conductor",
        watch_steps: Callable[[str, str], object] | None = None,
        listened: notices.Listened | None = None,
    ) -> None:
        """`listened`: where notifications go; None: to the bus."""
        self.bus, self.address = bus, address
        config = config or Config()
        self.world = World(
            db,
            bus.send,
            neighbours,
            choose,
            clock=clock,
            ids=ids,
            config=config,
            me=me,
            wake=self.wake,
            bus=bus,
            listened=listened if listened is not None else notices.OnBus(bus),
            among=outside.among,
        )
        self.engine = Engine(
            me,
            db,
            self.world,
            bus.send,
            clock=clock,
            dice=dice,
            gone=self.world.gone,
            lease_s=config.workers.lease_s,
            address=address,
            watch=watch_steps,
            turns=_turns(db, config),
        )
        self.engine.door.on(Greeting, lambda m: meet.greeted(self.world, m))
        self.engine.door.on(Report, lambda m: watch.reported(self.world, [m]))
        self.engine.door.on(Sending, lambda m: watch.sending(self.world, m))
        self.engine.door.on(HypervisorAway, lambda m: watch.hypervisor_away(self.world, m))
        self.engine.door.on(PowerChanged, lambda m: watch.power_changed(self.world, m))
        self.worker = Worker(self.engine, threads=config.workers.threads, sweep_s=config.workers.sweep_s)
        self.reconcilers = Reconcilers(
            self.world,
            [
                *watch.RECONCILERS,
                deserted.deserted,
                *volumes.RECONCILERS,
                *shares.RECONCILERS,
                notices.notified,
                notices.unwanted,
                outside.owed,
            ],
            clock=clock,
            dice=dice,
        )
        self.reports = Reports(self.world)
        self.ends: list[Callable[[], None]] = []

    def start(self) -> None:
        """Go on where an earlier life stopped, and listen."""
        workers = self.world.config.workers
        create.spawn.patience_s = evacuate.spawn.patience_s = workers.build_timeout_s
        for step in verbs.STEPS.values():
            step.patience_s = workers.command_timeout_s
        self.engine.door.on(Wake, lambda m: self.wake(m.run))  # answers and reports need not wait behind a build
        self.engine.door.on(Report, self.reports.take)
        self.reports.start()
        self.worker.start()
        self.ends.append(self.bus.serve(self.address, self.engine.receive, 2))
        self.reconcilers.start()

    def wake(self, run: str) -> None:
        """This run may have something to do. A hint, for after the commit."""
        self.worker.wake(run)

    def readdress(self, servers: set[str]) -> None:
        """The network service says that the addresses of these servers changed."""
        addresses.changed(self.world, servers)

    def close(self) -> None:
        """What is in hand is brought to where it waits; the next to start goes on."""
        self.reconcilers.close()
        for end in self.ends:
            end()
        self.reports.close()
        self.worker.close()
        self.world.listened.close()


def _turns(db: Db, config: Config) -> AbstractContextManager[Any] | None:
    """Where nothing is waited for, one thread carries at a time: threads would only take the interpreter from each other.

    Each SQL statement gives it away, so two busy threads change at every one of them: a build took 13 ms of CPU
    instead of 8.  With another database, or neighbours behind real HTTP, there is something to wait for.
    """
    inside = config.network.url is None and config.image.url is None
    return threading.Lock() if inside and db.engine.dialect.name == "sqlite" else None
