"""What every process of a cloud has, whatever its roles are: its time, its bus, and its way to neighbours.

No database: not every process has one (`doors.py`).
"""

import socket
import ssl
import urllib.parse
from typing import TYPE_CHECKING

import msgspec

from kilonova.cli.state import StateDir
from kilonova.clients import SERVICE_USER, Carrier, Login, Outside
from kilonova.kit import log as logs
from kilonova.kit.ask import WholeBus
from kilonova.kit.bus import MemoryBus
from kilonova.kit.clock import Clock, Ids, WallClock
from kilonova.kit.errors import Invalid, Refused
from kilonova.kit.health import Metrics
from kilonova.kit.tls import Identity
from kilonova.model import options

if TYPE_CHECKING:
    from kilonova.kit.topics import Topics

OURS = ("identity", "image", "network", "volume", "share")  # what our own companions are, and where they are mounted
SPARED = ("volume", "share")  # a cloud may be without them


class Process:
    """`name`: of the host that it is, or as its machine is called."""

    def __init__(self, config: options.Config, state: StateDir) -> None:
        self.config, self.state = config, state
        self.clock, self.ids, self.metrics = WallClock(), Ids(), Metrics()
        self.name = config.compute.host or socket.gethostname()
        self.bus = bus_of(config.bus, self.clock)
        self.born = self.clock.now()

    @property
    def on_wire(self) -> bool:
        """Is there a broker between us and others?"""
        return not isinstance(self.bus, MemoryBus)

    def broker_trouble(self) -> str:
        """Why no letters come and go, if they do not."""
        return "" if getattr(self.bus, "up", True) else "The broker cannot be reached."


def bus_of(config: options.Bus, clock: Clock) -> WholeBus:
    """A broker's, where one is configured; else this process's own."""
    urls = [part.strip() for part in config.url.reveal().split(";") if part.strip()]
    if not urls:
        return MemoryBus()
    from kilonova.kit.amqp import AmqpBus

    for url in urls:
        logs.hide(url)
        logs.hide(urllib.parse.unquote(urllib.parse.urlsplit(url).password or ""))
    if bad := [url for url in urls if not url.startswith(("amqp://", "amqps://"))]:
        scheme = bad[0].partition(":")[0]
        raise Invalid(f"[bus] url: a broker's address begins with amqp:// or amqps://, not with {scheme[:10]}.")
    tls: dict[str, object] | None = None
    if any(url.startswith("amqps:") for url in urls):
        files = {"ca_certs": config.ca_file, "certfile": config.cert_file, "keyfile": config.key_file}
        tls = {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": None}
        tls |= {name: str(file) for name, file in files.items() if file is not None}
    return AmqpBus(urls, clock=clock, ssl=tls, heartbeat_s=config.heartbeat_s, prefix=config.prefix)


def topics_of(config: options.Config) -> "Topics | None":
    """Where notifications are read: at a broker, if there is one."""
    said = config.notifications
    if said.format == "none" or not (url := said.url or config.bus.url):
        return None
    from kilonova.kit.amqp import AmqpBus
    from kilonova.kit.topics import Topics

    bus = bus_of(msgspec.structs.replace(config.bus, url=url), WallClock())
    assert isinstance(bus, AmqpBus)
    return Topics(bus.connection, said.exchange)


# ---- neighbours


def login_of(config: options.Config, service_password: str) -> Login:
    """Our own account: at our own identity service, or at a real one."""
    i = config.identity
    if i.url is None:
        return Login(SERVICE_USER, service_password)
    return Login(i.username, i.password.reveal(), i.project_name, i.domain_name, i.domain_name)


def identity_of(config: options.Config) -> Identity | None:
    """What listeners show of themselves. Raises Invalid where it is none: before anything listens."""
    said = config.tls
    if said.cert_file is None or said.key_file is None:
        if said.cert_file is not said.key_file:
            raise Invalid("[tls] needs both, cert_file and key_file.")
        return None
    found = Identity(said.cert_file, said.key_file)
    found.context()
    return found


def verify_of(config: options.Config) -> bool | str:
    """Whose certificates neighbours may have."""
    return str(config.companions.ca_file) if config.companions.ca_file else True


def carriers_of(config: options.Config) -> dict[str, Carrier]:
    """How neighbours of other processes are asked. Raises Refused where nobody says where they are."""
    urls = {name: getattr(config, name).url for name in OURS}
    if base := config.companions.url:
        urls = {name: url or f"{base.rstrip('/')}/{name}" for name, url in urls.items()}
    if missing := [name for name in OURS if urls[name] is None and name not in SPARED]:
        raise Refused(
            f"Nobody says where the {missing[0]} service is: set [companions] url to where `kilonova serve companions` "
            f"answers, or [{missing[0]}] url to a real one."
        )
    # An effect must be over within half a lease, whoever does not answer it (kit/workflow.py).
    patience_s, verify = min(10.0, config.workers.lease_s / 4), verify_of(config)
    return {name: Outside(url, timeout_s=patience_s, verify=verify) for name, url in urls.items() if url is not None}


def placement_of(config: options.Config) -> Carrier | None:
    """How a real Placement service is asked, where there is one."""
    patience_s, url = min(10.0, config.workers.lease_s / 4), config.placement.service_url
    return Outside(url, timeout_s=patience_s, verify=verify_of(config)) if url else None
