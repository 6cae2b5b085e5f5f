"""What a cloud on simulated hosts does, through its public API, in one table. One process, loopback; SQLite, or another.

    python bench/figures.py [--servers 1000] [--seconds 5] [--pin] [--db postgres|mariadb]

`--pin` keeps the cloud on one core and this program on another.  A busy machine gives worse figures; compare only
what was measured in one sitting.  Counts (statements, bytes) do not depend on the machine.
"""

import argparse
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from kilonova.cli.client import Client

ROOT = Path(__file__).resolve().parents[1]


class Cloud:
    """`kilonova up` on simulated hosts, in a directory that goes away."""

    def __init__(self, hosts: int, pin: bool, database: str = "") -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="kilonova-bench-")
        state = Path(self.directory.name) / "state"
        argv = [
            str(ROOT / "kilonova"),
            "up",
            "--driver",
            "sim",
            "--sim-hosts",
            str(hosts),
            "--state-dir",
            str(state),
            "--port",
            "0",
        ]
        env = os.environ | {
            "KILONOVA_SIM__CPUS": "1000",
            "KILONOVA_SIM__MEMORY_MB": "100000000",
        }
        env |= {"KILONOVA_DATABASE__URL": database} if database else {}
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [*(["taskset", "-c", "0"] if pin else []), *argv], stdout=subprocess.DEVNULL, env=env
        )
        while not (state / "running.json").exists():
            time.sleep(0.01)
        self.url = msgspec.json.decode((state / "running.json").read_bytes())["url"]
        self.password = msgspec.json.decode((state / "secrets.json").read_bytes())["admin_password"]
        parts = urllib.parse.urlsplit(self.url)
        self.where = parts.hostname or "", parts.port or 80
        self.client = Client(self.url, self.password)
        self.client.login()
        while b'"hosts":"ok"' not in self.raw("/readyz"):
            time.sleep(0.01)
        self.ready_s = time.perf_counter() - began

    def raw(self, path: str) -> bytes:
        with socket.create_connection(self.where) as s:
            s.sendall(f"GET {path} HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n".encode())
            return b"".join(iter(lambda: s.recv(1 << 20), b""))

    def statements(self) -> float:
        return float(re.findall(rb"^kilonova_sql_statements_total ([\d.e+]+)", self.raw("/metrics"), re.MULTILINE)[0])

    def rss_mb(self) -> float:
        pid = self.process.pid
        return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) / 1024

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.directory.cleanup()


class Load:
    """`width` kept connections, each asks again when it was answered; no thread, no parsing beyond the length."""

    def __init__(self, cloud: Cloud, path: str, width: int) -> None:
        head = (
            f"GET {path} HTTP/1.1\r\nHost: {cloud.where[0]}:{cloud.where[1]}\r\nX-Auth-Token: {cloud.client.token}\r\n"
        )
        self.question = f"{head}OpenStack-API-Version: compute 2.96\r\n\r\n".encode()
        self.where, self.width = cloud.where, width

    def run(self, seconds: float) -> tuple[float, list[float], int]:
        """(requests a second, latencies in s, bytes of one answer). An answer that is not 200 ends it."""
        ready, took, size = selectors.DefaultSelector(), list[float](), 0
        for _ in range(self.width):
            s = socket.create_connection(self.where)
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ready.register(s, selectors.EVENT_READ, [bytearray(), time.perf_counter(), -1])
            s.sendall(self.question)
        began = now = time.perf_counter()
        while now - began < seconds:
            for key, _ in ready.select(1):
                s, state = key.fileobj, key.data
                state[0] += s.recv(1 << 20)
                if state[2] < 0 and (end := state[0].find(b"\r\n\r\n")) >= 0:
                    assert state[0].startswith(b"HTTP/1.1 200"), bytes(state[0][:300])
                    state[2] = end + 4 + int(re.search(rb"content-length: (\d+)", state[0][:end].lower())[1])
                if 0 <= state[2] <= len(state[0]):
                    now = time.perf_counter()
                    took.append(now - state[1])
                    size = state[2]
                    state[0].clear()
                    state[1], state[2] = now, -1
                    s.sendall(self.question)
        for key in list(ready.get_map().values()):
            key.fileobj.close()
        return len(took) / (now - began), took, size


def p99(took: list[float]) -> float:
    return sorted(took)[int(len(took) * 0.99)] * 1000


def row(what: str, figure: str, aim: str = "") -> None:
    print(f"| {what} | {figure} | {aim} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--builds", type=int, default=400)
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--db", choices=["sqlite", "postgres", "mariadb"], default="sqlite")
    chosen = parser.parse_args()
    if chosen.db == "sqlite":
        return measured(chosen, "")
    sys.path[:0] = [str(ROOT)]
    from tests.engines import MariaDb, Postgres, served

    engine = {"postgres": Postgres, "mariadb": MariaDb}[chosen.db]
    with tempfile.TemporaryDirectory(prefix="kilonova-bench-db-") as home, served(engine, Path(home)) as database:
        return measured(chosen, database.url)


def measured(chosen: argparse.Namespace, database: str) -> None:
    if chosen.pin:
        os.sched_setaffinity(0, {1})
    cloud = Cloud(10, chosen.pin, database)
    c = cloud.client
    print("| what | figure | aim |\n|---|--:|--:|")
    row("`up` to ready", f"{cloud.ready_s:.1f} s", "≤ 2 s")
    row("resident memory, idle", f"{cloud.rss_mb():.0f} MB", "≤ 150 MB")
    try:
        for path, name, body in (
            (f"/compute/v2.1/os-quota-sets/{c.project_id}", "quota_set", {"instances": -1, "cores": -1, "ram": -1}),
            (f"/network/v2.0/quotas/{c.project_id}", "quota", {"port": -1}),
        ):
            c.put(path, {name: body})
        while not (images := c.get("/image/v2/images")["images"]):
            time.sleep(0.05)
        private = next(n["id"] for n in c.get("/network/v2.0/networks")["networks"] if n["name"] == "private")
        for networks, said in (("none", "without a port"), ([{"uuid": private}], "with a port")):
            measured_builds(
                cloud, images[0]["id"], networks, said, chosen.builds if networks == "none" else min(chosen.builds, 200)
            )
        have = len(c.get("/compute/v2.1/servers?limit=1000")["servers"])
        more = chosen.servers - have
        if more > 0:
            wish = {
                "name": "fill",
                "imageRef": images[0]["id"],
                "flavorRef": "42",
                "networks": "none",
                "min_count": more,
            }
            c.post("/compute/v2.1/servers", {"server": wish})
            settled(cloud, chosen.servers)
        measured_reads(cloud, chosen.seconds)
        row("resident memory, afterwards", f"{cloud.rss_mb():.0f} MB")
    finally:
        cloud.close()


def settled(cloud: Cloud, n: int) -> None:
    while True:
        active = cloud.client.get("/compute/v2.1/servers?limit=1000&status=ACTIVE")["servers"]
        if len(active) >= min(n, 1000):
            return
        time.sleep(0.02)


def measured_builds(cloud: Cloud, image: str, networks: object, said: str, n: int) -> None:
    """Eight clients, one request a server; until the last one is ACTIVE."""
    c = cloud.client
    before = len(c.get("/compute/v2.1/servers?limit=1000")["servers"])
    asked, began = cloud.statements(), time.perf_counter()

    def ask(i: int) -> None:
        wish = {"name": f"b{i}", "imageRef": image, "flavorRef": "42", "networks": networks}
        c.post("/compute/v2.1/servers", {"server": wish})

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(ask, range(n)))
    accepted = time.perf_counter() - began
    settled(cloud, before + n)
    took = time.perf_counter() - began
    row(f"durable builds through the API, {said}", f"{n / took:.0f}/s (accepted {n / accepted:.0f}/s)", "≥ 200/s")
    row(f"SQL statements a build, {said}", f"{(cloud.statements() - asked) / n:.0f}")


def measured_reads(cloud: Cloud, seconds: float) -> None:
    id = cloud.client.get("/compute/v2.1/servers?limit=1")["servers"][0]["id"]
    for path, what, aim, width in (
        (f"/compute/v2.1/servers/{id}", "show", "≥ 5,000/s", 8),
        ("/compute/v2.1/servers/detail?limit=1000", "list of 1,000 in detail", "≤ 40 ms", 1),
    ):
        load = Load(cloud, path, width)
        load.run(0.5)
        asked = cloud.statements()
        each, took, size = load.run(seconds)
        sent = (cloud.statements() - asked) / len(took)
        if what == "show":
            row(what, f"{each:.0f}/s, p99 {p99(took):.1f} ms", aim)
        else:
            row(what, f"{statistics.median(took) * 1000:.0f} ms, {size >> 10} KiB", aim)
        row(f"SQL statements, {what}", f"{sent:.1f}")


if __name__ == "__main__":
    main()
