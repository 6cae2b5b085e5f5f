"""A shared file system that a server has, as the store keeps it."""

from typing import Literal

import msgspec

from kilonova.model.machine import Share
from kilonova.model.server import Server
from kilonova.model.states import PowerState

Busy = Literal["", "attaching", "detaching", "error"]
PROTOCOLS = ("NFS", "CEPHFS")


class Sharing(msgspec.Struct, frozen=True):
    """`kind` and `who` are the rule by which its host may reach it: an address ("ip"), or a name ("cephx").

    `busy` "": the machine has it.  Whether a guest uses it follows from that and from the machine's power.
    """

    uuid: str
    server: str
    share_id: str
    tag: str  # what the guest mounts it by
    export: str
    proto: str = "NFS"
    kind: str = ""
    who: str = ""
    busy: Busy = "attaching"
    at: float = 0


def status(s: Sharing, server: Server) -> str:
    """As the API has it: attaching, detaching, error; active while a machine runs with it, else inactive."""
    if s.busy:
        return s.busy
    return "active" if server.power_state in (PowerState.running, PowerState.paused) else "inactive"


def of_machine(s: Sharing, key: str = "") -> Share:
    """As a host is told of it."""
    user = s.who if s.kind == "cephx" else ""
    return Share(share_id=s.share_id, tag=s.tag, export=s.export, proto=s.proto, user=user, key=key)
