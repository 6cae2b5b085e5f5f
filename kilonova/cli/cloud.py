"""A whole cloud in one process: who is made in which order, handed what, and ended in the other order.

Nothing here decides anything; it is the wiring of parts that know nothing of each other.
"""

import logging
import random
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from kilonova.api import app as compute_api
from kilonova.api.host_book import HostBook
from kilonova.api.registry import World
from kilonova.cli.state import Secrets, StateDir
from kilonova.clients import Inside, Login, Neighbours, neighbours
from kilonova.companions import identity, image, network
from kilonova.companions.wires import Ground, Wires
from kilonova.compute.agent import ComputeHost
from kilonova.compute.machines import Images
from kilonova.conductor.app import Conductor
from kilonova.kit.ask import Asker
from kilonova.kit.bus import MemoryBus
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.db import Db, meta
from kilonova.kit.health import Health, Metrics
from kilonova.kit.http import Mount, Server
from kilonova.kit.workflow import RUNS
from kilonova.metadata import app as metadata
from kilonova.metadata.drive import config_drive
from kilonova.model import options
from kilonova.model.flavor import Flavor
from kilonova.scheduler.select import Scheduler
from kilonova.store import catalog, hosts
from kilonova.virt.driver import Driver
from kilonova.virt.sim import SimHosts

log = logging.getLogger(__name__)

# The flavors of a cloud that nobody has furnished yet: DevStack's names, and one that fits our own guest.
FLAVORS = (
    Flavor("1", "m1.tiny", 1, 512, 1),
    Flavor("2", "m1.small", 1, 2048, 20),
    Flavor("3", "m1.medium", 2, 4096, 40),
    Flavor("4", "m1.large", 4, 8192, 80),
    Flavor("42", "m1.nano", 1, 128, 1),
    Flavor("84", "m1.micro", 1, 192, 1),
)


class Cloud:
    """`listener` is bound already. `start` returns when the API answers; what is still on its way says `/readyz`."""

    def __init__(
        self, config: options.Config, state: StateDir, secrets: Secrets, listener: socket.socket, url: str
    ) -> None:
        self.config, self.state, self.secrets, self.url = config, state, secrets, url
        self.clock, self.ids, self.dice = WallClock(), Ids(), random.Random()
        self.metrics = Metrics()
        self.db = open_db(config, state)
        self.bus = MemoryBus()
        self.ground: Ground | None = None
        self.wires: Wires | None = None
        self.name = config.compute.host or socket.gethostname()
        self._identity()
        self._network_and_metadata_later()
        self.image = image.service(self._image_world(), self.realm.gate, observe=self.metrics.observer("image"))
        self.neighbours = self._neighbours()
        self.book = HostBook(self.db, self.clock, config)
        self.scheduler = Scheduler(
            self.db,
            clock=self.clock,
            dice=self.dice,
            options=config.scheduler,
            down_after_s=config.compute.host_down_after_s,
        )
        self.conductor = Conductor(
            "conductor",
            self.db,
            self.bus,
            self.neighbours,
            self.scheduler.choose,
            clock=self.clock,
            ids=self.ids,
            dice=self.dice,
            config=config,
        )
        self.asker = Asker(self.bus, clock=self.clock, ids=self.ids)
        self.compute = self._compute_api()
        self.health = Health(
            self.metrics, alive={"database": self._database}, ready={"database": self._database, "hosts": self._hosts}
        )
        self.server = Server(self._mount(), listener, threads=config.api.threads)
        self.host: ComputeHost | SimHosts | None = None
        self.driver: Driver | None = None
        _measure(self.metrics, self.db)
