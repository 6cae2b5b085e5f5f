"""`kilonova status`: is the cloud up, where, and what keeps it from its work."""

import argparse
import http.client
import socket
from pathlib import Path
from typing import Any

import msgspec

from kilonova.cli.client import line_to
from kilonova.cli.state import StateDir, is_home
from kilonova.virt.libvirt.records import doors


def main(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """0: up and ready; 1: up, but not ready; 3: not up (as service scripts say it)."""
    parser.add_argument("--json", action="store_true", help="for programs")
    chosen = parser.parse_args(words)
    now = StateDir(chosen.state_dir).running() if is_home(chosen.state_dir) else None
    if now is None:
        print('{"up": false}' if chosen.json else "It is not up.")
        return 3
    checks = asked(now.url, Path(now.ca_file) if now.ca_file else None)
    laid = {id: port for host in (chosen.state_dir / "hosts").glob("*/") for id, port in doors(host).items()}
    ways = {id: port for id, port in laid.items() if opens(port)}
    bad = {n: why for n, why in checks.items() if why != "ok"}
    if chosen.json:
        shown = {"up": True, "ready": not bad, "pid": now.pid, "url": now.url, "checks": checks, "ssh_ports": ways}
        print(msgspec.json.encode(shown).decode())
    else:
        print(f"It is up at {now.url} (process {now.pid}) and {'not ready' if bad else 'ready'}.")
        for name, why in bad.items():
            print(f"  {name}: {why}")
        for id, port in ways.items():
            print(f"  server {id}: ssh -p {port} USER@127.0.0.1")
    return 1 if bad else 0


def opens(port: int) -> bool:
    """Does somebody listen at this port of the machine's loopback? Not while the server is off."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def asked(url: str, ca_file: Path | None = None) -> dict[str, str]:
    """The checks of `/readyz`, by name: "ok" or the reason."""
    line = line_to(url, 10, ca_file)
    try:
        line.request("GET", "/readyz")
        body: dict[str, Any] = msgspec.json.decode(line.getresponse().read())
    except (OSError, http.client.HTTPException, msgspec.DecodeError) as e:
        return {"api": f"does not answer: {e}"}
    finally:
        line.close()
    return dict(body["checks"])
