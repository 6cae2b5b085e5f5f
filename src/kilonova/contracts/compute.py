"""What a compute host may be asked, and what it says unasked. Fields may be added with a default; nothing else
may change.  A verb that older hosts do not know is a new message: ask `host.speaks(Message)`.
"""

from typing import Literal

import msgspec

from kilonova.kit.bus import Call, Contract
from kilonova.model.machine import Machine

compute = Contract("compute")


class Done(msgspec.Struct, frozen=True):
    """It is so; with the power state as the hypervisor sees it afterwards (numbers of the Compute API)."""

    power_state: int = 0


@compute
class Spawn(Call[Done], frozen=True):
    """Make this machine and let it run. Carries all that is needed; nobody asks back."""

    machine: Machine


@compute
class Destroy(Call[Done], frozen=True):
    """Remove it with all it had on this host. Nothing there: done.

    `epoch`: only what is not newer than this; a machine that has come back since is none of the sender's business.
    """

    server: str
    epoch: int | None = None


@compute
class Power(Call[Done], frozen=True):
    """One of the simple verbs. `timeout_s`: how long a guest may take to help; 0: at once, below: as the host has it."""

    server: str
    to: Literal["start", "stop", "reboot", "hard_reboot", "pause", "unpause", "suspend", "resume"]
    timeout_s: float = -1
    machine: Machine | None = None  # for start and hard reboot: what it should be, made anew


@compute
class Abandon(Call[Done], frozen=True):
    """What is being done for this server is no longer wanted: end it soon. Told beside the act, not behind it."""

    server: str


class Seen(msgspec.Struct, frozen=True):
    """What a host has of a server, just now."""

    there: bool
    power_state: int = 0
    epoch: int = 0


@compute
class Look(Call[Seen], frozen=True):
    """Is it there, and how is it? Answered behind whatever is being done to it."""

    server: str


class Text(msgspec.Struct, frozen=True):
    """Bytes a guest wrote, decoded with replacement characters."""

    text: str


@compute
class ConsoleLog(Call[Text], frozen=True):
    """A question, not an act: answered to who asks, never journaled."""

    server: str
    lines: int | None = None
