"""Identity and image as one process has them, on SQLite in a directory of the test's own; over HTTP where asked."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from kilonova.clients import Answer, Inside
from kilonova.companions import identity, image
from kilonova.kit.clock import Ids
from kilonova.kit.db import Db, meta
from kilonova.kit.http import Mount, Server, listen
from kilonova.model import options

ADMIN = "an admin's password"
QUICK = options.Identity(password_hash_cost=10)
IMAGE = options.Image()


class Hand:
    """A clock that stands still until somebody moves it."""

    def __init__(self, at: float = 1_800_000_000.0) -> None:
        self.at = at

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


@dataclass
class Embedded:
    directory: Path
    clock: Any = field(default_factory=Hand)
    identity_options: options.Identity = QUICK
    image_options: options.Image = IMAGE
    url: str = "http://cloud.test"

    def __post_init__(self) -> None:
        self.db = Db(f"sqlite:///{self.directory}/cloud.sqlite")
        meta.create_all(self.db.engine)
        ids = Ids()
        self.realm = identity.open_realm(self.db, self.clock, ids, self.identity_options, self.directory)
        self.first = identity.bootstrap(self.realm, self.directory, admin_password=ADMIN)
        self.images = image.open_store(self.db, self.clock, ids, self.image_options, self.directory / "images")
        self.identity = identity.service(self.realm)
        self.image = image.service(self.images, self.realm.gate)
        self.app = Mount({"/identity": self.identity, "/image": self.image}, root=self.identity)
        self.carrier = Inside(self.app, self.url)

    def carrier_of(self, prefix: str) -> Inside:
        """One of the services, as its neighbours ask it."""
        return Inside({"/identity": self.identity, "/image": self.image}[prefix], self.url + prefix)

    @contextmanager
    def served(self, threads: int = 4) -> Any:
        """On a port of 127.0.0.1; gives the base URL."""
        listener = listen("127.0.0.1", 0)
        server = Server(self.app, listener, threads=threads)
        server.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.stop()

    def ask(self, method: str, path: str, body: Any = None, token: str = "", **headers: str) -> Answer:
        """Without a server in between. `body`: bytes or an iterator of them as they are, anything else as JSON."""
        told = {k.replace("_", "-"): v for k, v in headers.items()}
        if token:
            told["X-Auth-Token"] = token
        if body is not None and not isinstance(body, bytes) and not hasattr(body, "__next__"):
            body = msgspec.json.encode(body)
            told.setdefault("Content-Type", "application/json")
        return self.carrier.send(method, path, told, body)

    def json(self, method: str, path: str, body: Any = None, token: str = "", *, ok: int = 200, **headers: str) -> Any:
        answer = self.ask(method, path, body, token, **headers)
        said = answer.read()
        assert answer.status == ok, (answer.status, said)
        return msgspec.json.decode(said) if said else None

    def refused(self, status: int, method: str, path: str, body: Any = None, token: str = "", **headers: str) -> str:
        """The sentence."""
        answer = self.ask(method, path, body, token, **headers)
        said = answer.read()
        assert answer.status == status, (answer.status, said)
        return said.decode()

    def log_in(self, user: str, password: str, scope: Any = None, *, ok: int = 201, domain: str = "Default") -> str:
        """The token's text, "" where it was refused as expected."""
        who = {"name": user, "domain": {"name": domain}, "password": password}
        auth: dict[str, Any] = {"identity": {"methods": ["password"], "password": {"user": who}}}
        if scope is not None:
            auth["scope"] = scope if not isinstance(scope, str) else project(scope)
        answer = self.ask("POST", "/identity/v3/auth/tokens", {"auth": auth})
        said = answer.read()
        assert answer.status == ok, (answer.status, said)
        return answer.headers.get("x-subject-token", "")

    def admin(self) -> str:
        return self.log_in("admin", ADMIN, "admin")

    def person(self, name: str, *roles: str, project_name: str | None = None) -> "Person":
        """A new user with these roles on a new project of his own (or on one that is there)."""
        admin = self.admin()
        made = {"name": name, "password": f"{name}'s"}
        user = self.json("POST", "/identity/v3/users", {"user": made}, admin, ok=201)["user"]
        wanted = project_name or f"of-{name}"
        found = self.json("GET", f"/identity/v3/projects?name={wanted}", token=admin)["projects"]
        place = found or [
            self.json("POST", "/identity/v3/projects", {"project": {"name": wanted}}, admin, ok=201)["project"]
        ]
        known = {r["name"]: r["id"] for r in self.json("GET", "/identity/v3/roles", token=admin)["roles"]}
        for role in roles:
            path = f"/identity/v3/projects/{place[0]['id']}/users/{user['id']}/roles/{known[role]}"
            self.json("PUT", path, token=admin, ok=204)
        token = self.log_in(name, f"{name}'s", wanted) if roles else ""
        return Person(user["id"], place[0]["id"], wanted, token)


@dataclass
class Person:
    id: str
    project_id: str
    project_name: str
    token: str


def project(name: str) -> dict[str, Any]:
    return {"project": {"name": name, "domain": {"name": "Default"}}}
