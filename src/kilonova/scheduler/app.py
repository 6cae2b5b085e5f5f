"""A scheduler of its own: answers who asks over the bus, and says that it lives. Any number of them share one database."""

import random
from collections.abc import Callable

import kilonova
from kilonova.kit.ask import Bus
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.db import Db
from kilonova.kit.reconcile import Reconcilers, reconciler
from kilonova.scheduler.select import Scheduler
from kilonova.store import hosts

SCHEDULERS = "scheduler"  # their address on the bus: whoever is free answers


class SchedulerRole:
    """`me` is its name among services."""

    def __init__(
        self,
        me: str,
        db: Db,
        bus: Bus,
        scheduler: Scheduler,
        *,
        clock: Clock,
        ids: Ids,
        dice: random.Random,
        threads: int = 4,
    ) -> None:
        self.me, self.db, self.bus, self.scheduler, self.clock, self.ids = me, db, bus, scheduler, clock, ids
        self.threads, self.born = threads, clock.now()
        self.reconcilers = Reconcilers(self, [present], clock=clock, dice=dice)
        self.ends: list[Callable[[], None]] = []

    def start(self) -> None:
        self.ends.append(self.scheduler.serve(self.bus, SCHEDULERS, self.threads))
        self.reconcilers.start()

    def close(self) -> None:
        """What is asked meanwhile is another's; those who got no answer ask again."""
        self.reconcilers.close()
        for end in self.ends:
            end()


@reconciler(every_s=10, at_once=True)
def present(role: SchedulerRole) -> list[str]:
    """Say that we live."""
    now = role.clock.now()
    with role.db.tx() as tx:
        hosts.beat(
            tx, role.me, hosts.SCHEDULER, uuid=role.ids.uuid, now=now, born=role.born, version=kilonova.__version__
        )
    return []
