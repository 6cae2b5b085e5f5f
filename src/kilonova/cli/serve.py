"""`kilonova serve ROLE…`: some roles of a cloud in this process; the others are elsewhere.

    kilonova serve api placement     # on a controller; any number of processes
    kilonova serve compute           # on each host

What they know of each other stands in one configuration: the database (not for hosts), the broker, where our own
companions or real neighbours are, the secrets that they share.
"""

import argparse
import logging
import os
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from kilonova.cli import config as configuration
from kilonova.cli.state import Secrets, StateDir, usual
from kilonova.kit import log as logs
from kilonova.kit.clock import Ids
from kilonova.kit.errors import Refused
from kilonova.kit.http import bound
from kilonova.kit.memory import built
from kilonova.model import options

if TYPE_CHECKING:
    from kilonova.cli.cloud import Cloud
    from kilonova.cli.compute import HostAlone

log = logging.getLogger(__name__)

# Also in cli/cloud.py, which is only imported when all that can be refused was.
ROLES = ("api", "placement", "metadata", "conductor", "scheduler", "compute", "console", "companions")
OVER_HTTP = frozenset({"api", "placement", "metadata", "companions"})
BY_LETTER = frozenset({"api", "conductor", "scheduler", "compute"})


def main(words: list[str]) -> int:
    """0 when it was told to end, and did."""
    chosen = _parser().parse_args(words)
    roles = frozenset(chosen.roles)
    config = _configured(chosen, roles)
    wanting(config, roles)
    logs.setup(
        level=config.log.level,
        format=config.log.format,
        file=config.log.file,
        levels=config.log.levels,
        access=config.log.access,
    )
    state = StateDir(config.state.directory or usual(dict(os.environ)))
    with state.joined(_only_once(config, roles)):
        return _serve(config, state, roles, asked=chosen.port is not None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("kilonova serve", description="some roles of a cloud, in the foreground")
    parser.add_argument("roles", nargs="+", choices=ROLES, metavar="ROLE", help=", ".join(ROLES))
    parser.add_argument("--config", type=Path, metavar="FILE", help="read this file instead of the usual ones")
    parser.add_argument(
        "--state-dir", type=Path, metavar="DIR", help="what it keeps on its disk (under your state home)"
    )
    parser.add_argument("--name", metavar="NAME", help="what it is called; unset, as its machine")
    parser.add_argument("--host", metavar="ADDRESS", help="listen there")
    parser.add_argument(
        "--port", type=int, metavar="N", help="listen there; roles without an API then show their health at it"
    )
    return parser


def _configured(chosen: argparse.Namespace, roles: frozenset[str]) -> options.Config:
    said = {
        "state.directory": chosen.state_dir,
        "api.host": chosen.host,
        "api.port": chosen.port,
        "workers.name": chosen.name,
        "compute.host": chosen.name if "compute" in roles else None,
    }
    return configuration.read(chosen.config, {name: value for name, value in said.items() if value is not None})


def wanting(config: options.Config, roles: frozenset[str]) -> None:
    """Is all said that these roles must know? Raises Refused, with what is missing."""
    url = config.database.url.reveal()
    if roles - {"compute"} and not url.startswith(("postgresql", "mysql", "mariadb")):
        raise Refused("Roles in processes of their own share a database: set [database] url (PostgreSQL or MariaDB).")
    if roles == {"compute"} and url:
        log.warning("[database] url: a host has no use for the database; take its password off this machine.")
    if roles & BY_LETTER and not config.bus.url:
        raise Refused("Roles in processes of their own write letters over a broker: set [bus] url.")
    if not config.identity.password:
        raise Refused("Roles ask each other in the name of one account: set [identity] password, the same everywhere.")
    if "metadata" in roles and not config.metadata.shared_secret:
        raise Refused("Proxies sign what guests ask: set [metadata] shared_secret, the same everywhere.")
    if "scheduler" in roles and not config.scheduler.apart:
        raise Refused("Nobody would ask this scheduler: each conductor has one in it, unless [scheduler] apart = true.")


def _only_once(config: options.Config, roles: frozenset[str]) -> list[str]:
    """Of what there may be one process in a state directory: a host, the companions, a conductor of one name."""
    name = config.workers.name or config.compute.host or socket.gethostname()
    words = {"compute": "compute", "companions": "companions"}
    words |= {role: f"{role} {name}".replace("/", "_") for role in ("conductor", "scheduler")}
    return [words[role] for role in ROLES if role in roles and role in words]


def _secrets(config: options.Config, state: StateDir, roles: frozenset[str]) -> Secrets:
    """All of it stands in the configuration, but for the first user's password: that may be a random one, kept here."""
    i = config.identity
    admin = i.admin_password.reveal()
    if "companions" in roles:
        admin = state.secrets(Ids(), admin).admin_password
        logs.hide(admin)
    return Secrets(admin, i.password.reveal(), config.metadata.shared_secret.reveal(), config.bus.prefix)


def _serve(config: options.Config, state: StateDir, roles: frozenset[str], *, asked: bool) -> int:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    listener = consoles = None
    if roles & OVER_HTTP or asked:
        listener = bound(config.api.host, config.api.port, shared=config.api.share_port)
    if "console" in roles:
        consoles = bound(config.api.host, config.console.port, shared=config.api.share_port)
    url = _url(config, listener)

    secrets = _secrets(config, state, roles)
    if "compute" in roles:
        from kilonova.cli.compute import same_host

        same_host(state.path, config.compute.host or socket.gethostname(), Ids())
    with built():
        cloud = _made(config, state, secrets, listener, url, consoles, roles)
    try:
        cloud.start()
        if "companions" in roles:
            from kilonova.cli.up import credentials

            credentials(state, secrets, (config.companions.url or url).rstrip("/"), config.tls.ca_file)
        where = f" at {url}" if listener is not None else ""
        _say(f"{', '.join(sorted(roles))}: {cloud.name}{where}")
        stop.wait()
    finally:
        _say("Stopping …")
        cloud.close()
    _say("Stopped.")
    return 0


def _made(
    config: options.Config,
    state: StateDir,
    secrets: Secrets,
    listener: socket.socket | None,
    url: str,
    consoles: socket.socket | None,
    roles: frozenset[str],
) -> "Cloud | HostAlone":
    """The house is imported when all that can be refused was; for a host alone, only its part of it."""
    if roles == {"compute"}:
        from kilonova.cli.compute import HostAlone

        return HostAlone(config, state, secrets, listener)
    from kilonova.cli.cloud import Cloud

    return Cloud(config, state, secrets, listener, url, None, consoles, roles)


def _url(config: options.Config, listener: socket.socket | None) -> str:
    """What this process calls itself, for itself."""
    if listener is None:
        return config.api.public_url or "http://127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.api.host, config.api.host)  # noqa: S104
    return f"{'https' if config.tls.cert_file else 'http'}://{host}:{listener.getsockname()[1]}"


def _say(line: str) -> None:
    print(line, flush=True)
