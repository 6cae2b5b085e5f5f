"""What hosts say to conductors, unasked. (Answers and wake-ups are the bus's own: `kit/bus.py`.)"""

import msgspec

from kilonova.kit.bus import Contract
from kilonova.model.host import HostFacts, Stock

conductor = Contract("conductor")


class HeldHere(msgspec.Struct, frozen=True):
    """A machine on the host: its power in the Compute API's numbers, and the epoch it was made with.

    `captures`: images that were frozen of it and are still here.  `ports`: of its NICs, `volumes`: of its disks, `shares`: file systems; None
    where they are not said, which is in most reports.
    """

    server: str
    power_state: int
    epoch: int = 0
    captures: list[str] = []
    ports: list[str] | None = None
    volumes: list[str] | None = None
    shares: list[str] | None = None


@conductor
class Report(msgspec.Struct, frozen=True):
    """What a host says of itself every few seconds: that it lives, and all that it holds.

    All: an undo is not sent to a host that is gone, so whatever an act can leave behind must be in here.
    `born` tells one life of its process from the next; `speaks` are the messages it knows.
    """

    host: str
    at: float
    born: float
    holds: list[HeldHere]
    busy: list[str] = []  # servers that a handler is at work on just now: what is held of them may change
    speaks: list[str] = []
    facts: HostFacts | None = None  # with the first reports, when they change, and now and then: letters get lost
    stocks: list[Stock] = []  # with the facts: what of them may be given out
    version: str = ""
    host_ip: str = ""
    identity: str = ""  # of the machine, as its state directory has it; "": of a release that has none


@conductor
class Greeting(msgspec.Struct, frozen=True):
    """A host that begins: is it known under its name? `Met` comes to `alone(identity)`, and bears the `life` again."""

    hosts: list[str]
    identity: str
    life: str


def alone(identity: str) -> str:
    """Where a machine is told who it is: only one process at a time can have that address."""
    return f"{identity}.alone"


@conductor
class PowerChanged(msgspec.Struct, frozen=True):
    """A guest turned itself off, crashed, or was touched behind our back."""

    host: str
    server: str
    power_state: int
    at: float


@conductor
class HypervisorAway(msgspec.Struct, frozen=True):
    """The host lives, and cannot say how it is: its hypervisor is not reached. Once, until it was reached again."""

    host: str
    at: float
    why: str
    host_ip: str = ""


@conductor
class Sending(msgspec.Struct, frozen=True):
    """How far a live migration is. Bytes; None: not known."""

    host: str
    server: str
    at: float
    memory_total: int | None = None
    memory_remaining: int | None = None
    memory_processed: int | None = None
    disk_total: int | None = None
    disk_remaining: int | None = None
    disk_processed: int | None = None
