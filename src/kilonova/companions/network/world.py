"""What the network service works with, and the wires it keeps true to its tables."""

import functools
import logging
import threading
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa

from kilonova.companions.network.planes import Planes
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Conflict
from kilonova.model import options
from kilonova.model.wiring import Wiring

P = ParamSpec("P")
R = TypeVar("R")
Apply = Callable[[Wiring], None]

logger = logging.getLogger(__name__)

TRIES = 8


class Again(Exception):
    """Somebody changed the thing between our look and our change: look again."""


@dataclass
class World:
    """`wires`: the hosts whose data plane we hold, and how each is told its whole `Wiring`. None: there is no data
    plane (a simulated cloud) and a port may be bound to any host. The first host carries the routers and DHCP.
    `apart`: hosts that can make no networks; QEMU gives each of their guests one of its own (vif_type `user`).
    `planes`: the hosts are other machines, and this is who knows what each of them can.
    """

    db: Db
    clock: Clock
    ids: Ids
    config: options.Network
    wires: Mapping[str, Apply] | None = None
    apart: Container[str] = frozenset()
    planes: Planes | None = None
    told: Callable[[set[str]], None] | None = None  # who wants to know which devices have other addresses now
    looms: dict[str, "Loom"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.looms |= {host: Loom(apply) for host, apply in (self.wires or {}).items()}

    @property
    def home(self) -> str:
        """The host that carries what belongs to no guest; "" without a data plane."""
        return self.planes.home if self.planes is not None else next(iter(self.looms), "")

    def weaves(self, host: str) -> bool:
        """Are this host's wires ours to tell?"""
        if self.planes is not None and host not in self.looms and self.planes.of(host) == "wired":
            self.looms.setdefault(host, Loom(functools.partial(self.planes.tell, host)))
        return host in self.looms

    def change(self, work: Callable[Concatenate[Tx, P], R], *args: P.args, **more: P.kwargs) -> R:
        """`work(tx, …)` in a transaction, from the top again when another took an address, a MAC or the revision.

        Raises Conflict when that happens all the time.
        """
        for _ in range(TRIES):
            try:
                return self.db.run(work, *args, **more)
            except (sa.exc.IntegrityError, Again) as e:
                trouble = e
        raise Conflict("The resource was changed by other requests at the same time.", why=str(trouble))

    def bridge(self, network_id: str) -> str:
        """The name of a network's bridge; 15 letters are what Linux allows."""
        return f"{self.config.namespace_prefix[:4]}{network_id[:11]}"


class Loom:
    """Hands one host its wiring: computed and applied under one lock, so an older one never follows a newer.

    Many may ask at once: whoever finds that a wiring, begun after he committed, was applied already, is done.
    """

    def __init__(self, apply: Apply) -> None:
        self.apply, self.lock, self.count = apply, threading.Lock(), threading.Lock()
        self.asked = self.done = 0

    def weave(self, compute: Callable[[], Wiring]) -> None:
        """Raises what the wires raise."""
        with self.count:
            self.asked += 1
            mine = self.asked
        with self.lock:
            if self.done >= mine:
                return
            with self.count:
                upto = self.asked
            self.apply(compute())
            self.done = upto
