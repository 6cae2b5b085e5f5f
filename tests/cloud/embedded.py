"""Identity, image, volumes and shares as one process has them, on SQLite in a directory of the test's own; over HTTP where asked."""

import re
import urllib.parse
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from kilonova.clients import Account, Answer, Image, Inside, Login, Session
from kilonova.companions import identity, image, share, volume
from kilonova.kit.clock import Ids
from kilonova.kit.db import Db, meta
from kilonova.kit.http import Mount, Server, listen
from kilonova.model import options

ADMIN = "an admin's password"
QUICK = options.Identity(password_hash_cost=10)
IMAGE = options.Image()
VOLUME = options.Volume()


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
    volume_options: options.Volume = VOLUME
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
        login = Login(identity.SERVICE_USER, self.first.service_password)
        account = Account(self.carrier_of("/identity"), login, self.clock)
        self.volumes = volume.open_store(
            self.db,
            self.clock,
            ids,
            self.volume_options,
            self.directory / "volumes",
            images=Image(Session("image", self.carrier_of("/image"), self.clock, account)),
            host="cloud",
            authenticate=self.realm.gate,
        )
        self.volume = volume.make_service(self.volumes)
        shares = share.open_store(
            self.db, self.clock, ids, options.Share(), self.directory / "shares", authenticate=self.realm.gate
        )
        self.share = share.make_service(shares)
        apps = {"/identity": self.identity, "/image": self.image, "/volume": self.volume, "/share": self.share}
        self.app = Mount(apps, root=self.identity)
        self.carrier = Inside(self.app, self.url)

    def carrier_of(self, prefix: str) -> Inside:
        """One of the services, as its neighbours ask it."""
        return Inside(getattr(self, prefix[1:]), self.url + prefix)

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


# ---- junk

NASTY: list[Any] = [
    None, True, 0, -1, 7.5, 1 << 70, "", "x", "x" * 300, "a\x00b", "\ud7ff\u202e", "../../etc/passwd", "' OR 1=1 --", "{}",
    [], ["x"], [None], {}, {"id": "x"}, {"id": None}, {"name": []}, [{}], {"": ""}, {"all": True}, "2026-01-01T00:00:00",
    "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59",
]  # fmt: skip
NASTY_IDS = [
    "x",
    "default",
    "%00",
    "..%2f..",
    "a" * 300,
    "%ff",
    "0" * 32,
    "11111111-2222-4333-8444-555555555555",
    "%E2%80%AE",
]


def driven_with_junk(cloud: Embedded, routes: Any, prefix: str, token: str, words: list[str], real: list[str]) -> None:
    """Every route with ids, queries and bodies that make no sense: whatever is answered, it is not our fault."""
    bad: list[Any] = []

    def ask(method: str, path: str, body: Any = None, **headers: str) -> None:
        answer = cloud.ask(method, path, body, token, **headers)
        said = answer.read()
        if answer.status >= 500:
            bad.append((method, path, body, answer.status, said))

    for route in routes:
        if route.method == "DELETE":
            continue
        for id in [*NASTY_IDS, *real]:
            path = prefix + re.sub(r"\{[a-z_]+\}", id, route.path)
            ask(route.method, path)
            if id not in real:
                continue
            for value in NASTY:
                if route.body is not None or route.raw:
                    inner = dict.fromkeys(words, value)
                    fields = [f.encode_name for f in msgspec.structs.fields(route.body)] if _struct(route.body) else []
                    bodies = [
                        value,
                        dict.fromkeys(fields, value),
                        dict.fromkeys(fields, inner),
                        {f: [inner] for f in fields},
                    ]
                    if value in ("x", 7.5):  # one word at a time comes further than all at once
                        bodies += [{f: {w: value} for f in fields} for w in words]
                    for body in [*bodies, inner]:
                        ask(route.method, path, body)
                    for raw in (b"", b"{", b"[" * 3000, b"\xff", b'{"a": 1e999}'):
                        ask(route.method, path, raw, Content_Type="application/json")
                if route.method == "GET":
                    said = urllib.parse.urlencode({w: str(value) for w in words})
                    ask("GET", f"{path}?{said}")
    assert not bad, bad[:5]


def _struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
