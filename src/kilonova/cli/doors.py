"""The services that a process answers with, and the database behind them."""

import threading

from kilonova.cli.process import Process
from kilonova.kit.db import Db, ill
from kilonova.kit.http import Service


class Doors:
    """`services` by the first part of their path."""

    def __init__(self, process: Process, db: Db) -> None:
        self.process, self.db = process, db
        self.services: dict[str, Service] = {}
        self.turns = threading.RLock()

    def open(self, name: str, service: Service) -> Service:
        """From now on it is a service of this process, at `/name`."""
        service.observe, service.ill = self.process.metrics.observer(name), ill
        if self.db.sqlite:
            service.turns = self.turns
        self.services[name] = service
        return service
