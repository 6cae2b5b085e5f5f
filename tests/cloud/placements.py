"""The Placement service alone, on a database in memory, with words for its tests."""

import random
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova import placement
from kilonova.clients import Answer, Inside
from kilonova.kit.clock import Ids
from kilonova.kit.db import Db, meta
from kilonova.kit.errors import Unknown
from kilonova.kit.routes import Context
from kilonova.model import options
from tests.cloud.embedded import Hand

NEWEST = 39
PEOPLE = {
    "admin": Context(user_id="admin", project_id="admins", roles=frozenset({"admin"})),
    "service": Context(user_id="nova", project_id="service", roles=frozenset({"service"})),
    "reader": Context(user_id="joe", project_id="p", roles=frozenset({"reader"})),
}


def who(token: str) -> Context:
    if token not in PEOPLE:
        raise Unknown("Authentication required")
    return PEOPLE[token]


NAMES = ("resource_", "inventories", "allocations", "consumers", "traits", "marks", "seats")
TABLES = [t for t in meta.sorted_tables if t.name.startswith(NAMES)]
# Made once: a policy is slow to make. Whoever asks is answered out of his own world.
SERVICE: Any = placement.make_service(placement.World(None, None, Ids()), who)  # type: ignore[arg-type]


class Placement:
    """`file`: on disk, for tests with threads; `db`: one that has the tables already."""

    def __init__(self, file: Path | None = None, db: Db | None = None, **config: Any) -> None:
        if db is not None:
            self.db = db
        elif file is None:
            self.db = Db("sqlite://", poolclass=sa.StaticPool, connect_args={"check_same_thread": False})
        else:
            self.db = Db(f"sqlite:///{file}", threads=80)
        if db is None:
            meta.create_all(self.db.engine, tables=TABLES)
        self.clock, self.ids = Hand(), Ids(random.Random(1))
        self.world = placement.World(self.db, self.clock, self.ids, options.Placement(**config), random.Random(1))
        self.carrier = Inside(SERVICE, "http://cloud.test/placement")

    def ask(
        self, method: str, path: str, body: Any = None, v: int = NEWEST, token: str = "service", **more: str
    ) -> Answer:
        headers = {k.replace("_", "-"): value for k, value in more.items()}
        headers = {"X-Auth-Token": token, "OpenStack-API-Version": f"placement 1.{v}"} | headers
        if body is not None and not isinstance(body, bytes):
            body = msgspec.json.encode(body)
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        SERVICE.world = self.world
        return self.carrier.send(method, path, {k: x for k, x in headers.items() if x}, body)

    def say(
        self, method: str, path: str, body: Any = None, v: int = NEWEST, *, ok: int | None = None, **more: Any
    ) -> Any:
        """What was said; the status must be `ok`, or any good one."""
        answer = self.ask(method, path, body, v, **more)
        said = answer.read()
        assert answer.status == ok if ok else answer.status < 300, (method, path, answer.status, said)
        return msgspec.json.decode(said) if said else None

    def refused(self, status: int, method: str, path: str, body: Any = None, v: int = NEWEST, **more: Any) -> Any:
        """The error."""
        answer = self.ask(method, path, body, v, **more)
        said = answer.read()
        assert answer.status == status, (method, path, answer.status, said)
        (error,) = msgspec.json.decode(said)["errors"]
        assert error["status"] == status and error["request_id"].startswith("req-") and error["title"]
        return error

    # -- things that are there

    def provider(
        self,
        name: str,
        parent: str | None = None,
        *,
        traits: tuple[str, ...] = (),
        aggregates: tuple[str, ...] = (),
        **stocks: int | dict[str, Any],
    ) -> str:
        uuid = self.ids.uuid()
        wish = {"name": name, "uuid": uuid} | ({"parent_provider_uuid": parent} if parent else {})
        self.say("POST", "/resource_providers", wish)
        at = f"/resource_providers/{uuid}"
        if stocks:
            all = {c: s if isinstance(s, dict) else {"total": s} for c, s in stocks.items()}
            self.say("PUT", f"{at}/inventories", {"resource_provider_generation": 0, "inventories": all})
        if traits:
            for t in traits:
                if t.startswith("CUSTOM_"):
                    self.say("PUT", f"/traits/{t}")
            self.say("PUT", f"{at}/traits", {"resource_provider_generation": self.generation(uuid), "traits": traits})
        if aggregates:
            said = {"resource_provider_generation": self.generation(uuid), "aggregates": aggregates}
            self.say("PUT", f"{at}/aggregates", said)
        return uuid

    def generation(self, uuid: str) -> int:
        return int(self.say("GET", f"/resource_providers/{uuid}")["generation"])

    def allocate(self, consumer: str, held: dict[str, dict[str, int]], generation: int | None = None) -> None:
        self.say("PUT", f"/allocations/{consumer}", self.holding(held, generation))

    def holding(self, held: dict[str, dict[str, int]], generation: int | None = None) -> dict[str, Any]:
        return {
            "allocations": {p: {"resources": amounts} for p, amounts in held.items()},
            "project_id": "p",
            "user_id": "u",
            "consumer_generation": generation,
            "consumer_type": "INSTANCE",
        }

    def candidates(self, query: str, v: int = NEWEST) -> list[dict[str, dict[str, int]]]:
        """What is taken of whom, by name."""
        said = self.say("GET", f"/allocation_candidates?{query}", v=v)
        names = {p["uuid"]: p["name"] for p in self.say("GET", "/resource_providers")["resource_providers"]}
        found = []
        for request in said["allocation_requests"]:
            found.append({names[p]: of["resources"] for p, of in request["allocations"].items()})
            assert set(request["allocations"]) <= set(said["provider_summaries"])
        return sorted(found, key=lambda f: sorted(f.items(), key=str).__repr__())
