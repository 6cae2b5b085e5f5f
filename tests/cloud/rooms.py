"""The APIs of one process without hosts: identity, image, network, compute and metadata, on SQLite in a test's directory.

Servers are rows that a test writes; what the API starts for them is written too, and nobody carries it on.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from kilonova.api import app as compute
from kilonova.api.host_book import HostBook
from kilonova.api.registry import World
from kilonova.clients import Answer, Inside, Login, neighbours
from kilonova.companions import network
from kilonova.companions.identity import SERVICE_USER
from kilonova.kit.clock import Ids
from kilonova.kit.errors import Unavailable
from kilonova.kit.http import Mount
from kilonova.metadata.app import service as metadata_service
from kilonova.model import options
from kilonova.model.flavor import Flavor
from kilonova.model.server import Server
from kilonova.model.states import VM
from kilonova.store import catalog, servers
from tests.cloud.embedded import Embedded

SECRET = "the proxies' secret"
FLAVOR = Flavor("1", "m1.tiny", 1, 512, 1)


@dataclass
class Rooms(Embedded):
    config: options.Config = field(default_factory=options.Config)
    woken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ids = Ids()
        self.networks = network.World(self.db, self.clock, self.ids, self.config.network)
        network.bootstrap(self.networks, self.first.admin_project_id)
        self.network = network.make_service(self.networks, self.realm.gate)
        inside = {
            "identity": Inside(self.identity, f"{self.url}/identity"),
            "image": Inside(self.image, f"{self.url}/image"),
            "network": Inside(self.network, f"{self.url}/network"),
            "volume": Inside(self.volume, f"{self.url}/volume"),
        }
        self.neighbours = neighbours(self.clock, Login(SERVICE_USER, self.first.service_password), **inside)
        self.metadata = metadata_service(
            self.db, self.neighbours.network, self.config, clock=self.clock, ids=self.ids, secret=SECRET
        )
        book = HostBook(self.db, self.clock, self.config)
        self.world = World(
            self.db,
            self.clock,
            self.ids,
            self.config,
            self.neighbours,
            book,
            self.woken.append,
            self._nobody,
            lambda run, timeout_s: False,
        )
        self.compute = compute.service(self.world, self.realm.gate)
        self.db.run(catalog.add_flavor, FLAVOR, self.clock.now())
        apps = {
            "/identity": self.identity,
            "/image": self.image,
            "/network": self.network,
            "/volume": self.volume,
            "/compute": self.compute,
            "/metadata": self.metadata,
        }
        self.app = Mount(apps, root=self.identity)
        self.carrier = Inside(self.app, self.url)

    def _nobody(self, host: str, question: Any, timeout_s: float) -> Any:
        raise Unavailable("There are no hosts here.")

    def server(self, project_id: str, **facts: Any) -> Server:
        """A row, at rest as an active server of the smallest flavor."""
        known = Server(
            id=self.ids.uuid(),
            project_id=project_id,
            user_id=facts.pop("user_id", "u" * 32),
            name=facts.pop("name", "one"),
            hostname=facts.pop("hostname", "one"),
            flavor=FLAVOR,
            vm_state=facts.pop("vm_state", VM.active),
            created_at=self.clock.now(),
            launched_at=self.clock.now(),
            **facts,
        )
        with self.db.tx() as tx:
            servers.create(tx, [known])
            return servers.get(tx, known.id)

    def stored(self, id: str) -> Server:
        with self.db.read() as tx:
            return servers.get(tx, id)

    def call(
        self, method: str, path: str, body: Any = None, token: str = "", version: str | int = "2.1", **headers: str
    ) -> "Said":
        """One request of the Compute API, path after /v2.1; `version` is a minor number or a text."""
        asked = f"compute 2.{version}" if isinstance(version, int) else f"compute {version}"
        answer: Answer = self.ask(
            method, f"/compute/v2.1{path}", body, token, **{"OpenStack-API-Version": asked}, **headers
        )
        return Said(answer.status, answer.headers, answer.read())


@dataclass
class Said:
    """An answer, read."""

    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.raw)

    @property
    def fault(self) -> tuple[str, str]:
        """Its name and its sentence."""
        name, inner = next(iter(self.json.items()))
        assert inner["code"] == self.status
        return name, inner["message"]
