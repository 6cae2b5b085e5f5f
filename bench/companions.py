"""How fast identity and image are: tokens issued and looked at, bytes in and out. Prints a table.

python bench/companions.py [MB]
"""

import os
import socket
import sys
import tempfile
import time
from pathlib import Path

from kilonova.companions import identity, image
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.db import Db, meta
from kilonova.kit.http import Mount, Server, listen
from kilonova.model import options

PASSWORD = "bench"


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        db = Db(f"sqlite:///{directory}/bench.sqlite")
        meta.create_all(db.engine)
        realm = identity.open_realm(db, WallClock(), Ids(), options.Identity(), directory)
        first = identity.bootstrap(realm, directory, admin_password=PASSWORD)
        shop = image.open_store(db, WallClock(), Ids(), options.Image(), directory / "images")
        apps = {"/identity": identity.service(realm), "/image": image.service(shop, realm.gate)}
        listener = listen("127.0.0.1", 0)
        server = Server(Mount(apps, root=apps["/identity"]), listener, threads=4)
        server.start()
        try:
            measure(listener.getsockname()[1], realm, first, megabytes)
        finally:
            server.stop()


def measure(port: int, realm: identity.World, first: identity.First, megabytes: int) -> None:
    import requests

    session, url = requests.Session(), f"http://127.0.0.1:{port}"
    who = {"name": "admin", "domain": {"id": "default"}, "password": PASSWORD}
    auth = {"identity": {"methods": ["password"], "password": {"user": who}}}
    body = {"auth": {**auth, "scope": {"project": {"id": first.admin_project_id}}}}
    began = time.perf_counter()
    for _ in range(20):
        token = session.post(f"{url}/identity/v3/auth/tokens", json=body).headers["X-Subject-Token"]
    row("tokens issued (scrypt 2^14)", 20 / (time.perf_counter() - began), "/s")

    began = time.perf_counter()
    for _ in range(20_000):
        realm.gate(token)
    row("a known token looked at", (time.perf_counter() - began) / 20_000 * 1e6, "µs")
    began = time.perf_counter()
    for _ in range(200):
        realm.gate.look(token)
    row("an unknown token looked at", (time.perf_counter() - began) / 200 * 1e6, "µs")

    session.headers["X-Auth-Token"] = token
    wish = {"name": "bench", "disk_format": "raw", "container_format": "bare"}
    made = session.post(f"{url}/image/v2/images", json=wish).json()["id"]
    began = time.perf_counter()
    upload(port, f"/image/v2/images/{made}/file", token, megabytes)
    row(f"upload of {megabytes} MB", megabytes / (time.perf_counter() - began), "MB/s")
    began, size = time.perf_counter(), 0
    with session.get(f"{url}/image/v2/images/{made}/file", stream=True) as r:
        for chunk in r.iter_content(1 << 20):
            size += len(chunk)
    row(f"download of {size // 1_000_000} MB", size / 1e6 / (time.perf_counter() - began), "MB/s")


def upload(port: int, path: str, token: str, megabytes: int) -> None:
    """By a bare socket: a client of Python would be measured with it."""
    chunk = os.urandom(1_000_000)
    head = f"PUT {path} HTTP/1.1\r\nHost: bench\r\nX-Auth-Token: {token}\r\nContent-Type: application/octet-stream\r\n"
    with socket.create_connection(("127.0.0.1", port)) as s:
        s.sendall(f"{head}Content-Length: {megabytes * len(chunk)}\r\n\r\n".encode())
        for _ in range(megabytes):
            s.sendall(chunk)
        answer = s.recv(4096)
    assert b" 204 " in answer, answer


def row(what: str, figure: float, unit: str) -> None:
    print(f"{what:32}{figure:10.1f} {unit}")


if __name__ == "__main__":
    main()
