"""Our neighbours, through their standard HTTP APIs: identity v3, image v2, network v2.0, block storage v3,
shared file systems v2, Placement.

One path for all: a `Session` puts a token and the request's id on a question and reads a trouble out of an
answer.  What carries it is either `Inside`, a WSGI application of this very process (an embedded companion is
no mock: it is asked as a stranger would ask it), or `Outside`, real HTTP.  Frozen Structs come out.

Where `token` is None a neighbour is asked in our own name (`Account`), else in the user's.
`Compute` is for the other way round.  A file is a neighbour; `carriers` and `session` are what all have in common.
"""

from dataclasses import dataclass

import msgspec

from kilonova.clients.carriers import Absent, Answer, Carrier, Chunks, Inside, Outside
from kilonova.clients.compute import Compute
from kilonova.clients.identity import Identity, RemoteIdentity
from kilonova.clients.image import Image, ImageInfo
from kilonova.clients.network import (
    STALE,
    Address,
    FloatingIp,
    HostRoute,
    Network,
    NetworkInfo,
    Port,
    SecurityGroup,
    SecurityRule,
    Subnet,
    plug,
)
from kilonova.clients.placement import Placement
from kilonova.clients.session import SERVICE_USER, Account, Login, Session
from kilonova.clients.share import Shares
from kilonova.clients.volume import AttachedTo, Attachment, SnapshotInfo, VolumeInfo, Volumes
from kilonova.kit.clock import Clock


@dataclass(frozen=True)
class Neighbours:
    """Whom a role can ask."""

    identity: Identity
    image: Image
    network: Network
    volume: Volumes
    share: Shares
    placement: Placement | None = None  # a real one, beside our own tables


def neighbours(
    clock: Clock,
    login: Login,
    *,
    identity: Carrier,
    image: Carrier,
    network: Carrier,
    volume: Carrier | None = None,
    share: Carrier | None = None,
    placement: Carrier | None = None,
) -> Neighbours:
    """All neighbours, with one account of our own for them. A cloud may be without volumes and shares."""
    account = Account(identity, login, clock)
    system = Account(identity, msgspec.structs.replace(login, system=True), clock)

    def session(name: str, carrier: Carrier, *, vouch: bool = False) -> Session:
        return Session(name, carrier, clock, account, vouch=vouch)

    return Neighbours(
        Identity(session("identity", identity), Session("identity", identity, clock, system)),
        Image(session("image", image)),
        Network(session("network", network)),
        Volumes(session("block-storage", volume or Absent("block-storage"), vouch=True)),
        Shares(session("shared-file-system", share or Absent("shared file systems"), vouch=True)),
        Placement(session("placement", placement)) if placement else None,
    )


__all__ = [
    "SERVICE_USER",
    "STALE",
    "Absent",
    "Account",
    "Address",
    "Answer",
    "AttachedTo",
    "Attachment",
    "Carrier",
    "Chunks",
    "Compute",
    "FloatingIp",
    "HostRoute",
    "Identity",
    "Image",
    "ImageInfo",
    "Inside",
    "Login",
    "Neighbours",
    "Network",
    "NetworkInfo",
    "Outside",
    "Placement",
    "Port",
    "RemoteIdentity",
    "SecurityGroup",
    "SecurityRule",
    "Session",
    "Shares",
    "SnapshotInfo",
    "Subnet",
    "VolumeInfo",
    "Volumes",
    "neighbours",
    "plug",
]
