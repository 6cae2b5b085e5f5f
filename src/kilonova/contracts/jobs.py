"""What the API hands to a run: the whole intent, so that no conductor has to ask back. May only grow.

The names of the workflows are part of the contract: `start(tx, "build", Build(...))`.
"""

from typing import Literal

import msgspec

from kilonova.kit.bus import Contract
from kilonova.model.server import Server, Wanted

jobs = Contract("jobs")


@jobs
class Build(msgspec.Struct, frozen=True):
    """ "build": choose a host, claim, make ports, spawn. `server` as it was written, still building.

    `networks`: "auto" and "none" as the API has them, "" for what a caller left to us (one network that he can
    see, else a conflict was answered), or what he listed.  `security_groups` are ids.
    """

    server: Server
    networks: list[Wanted] | Literal["auto", "none", ""] = ""
    security_groups: list[str] = []
    admin_password: str = ""
    host: str | None = None  # forced (az:host) or requested (2.74)
    node: str | None = None
    forced: bool = False  # no rule is asked
    files: list[tuple[str, str]] = []


@jobs
class Act(msgspec.Struct, frozen=True):
    """ "act": one of the simple verbs of `model/states.py`, already begun (the server is busy with it)."""

    server: Server
    verb: str
    was: str = ""  # vm_state before


@jobs
class Delete(msgspec.Struct, frozen=True):
    """ "delete": waits until other runs have ended, then takes everything back."""

    server: Server
