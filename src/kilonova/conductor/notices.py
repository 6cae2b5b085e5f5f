"""Notifications leave the outbox for whoever listens, in order. At least once."""

from typing import Any, Protocol

import msgspec

from kilonova.conductor.world import World
from kilonova.kit.db import Tx
from kilonova.kit.reconcile import reconciler
from kilonova.model.notices import Notice
from kilonova.store import hosts, notices

PIECE = 100
LATE_S = 15.0  # who waits for so long is told by whoever comes by


class Listened(Protocol):
    """Where listeners are: `kit.topics.Topics`, a broker."""

    def put(self, topic: str, raw: bytes) -> bool:
        """Has somebody taken it? Raises Unavailable."""
        ...

    def close(self) -> None: ...


class OnBus:
    """The bus of this process, where there is no broker: a topic is an address."""

    def __init__(self, bus: Any) -> None:
        self.bus = bus

    def put(self, topic: str, raw: bytes) -> bool:
        address = topic.rpartition(".")[0]
        if taken := bool(self.bus.serves(address)):
            self.bus.send(address, raw)
        return taken

    def close(self) -> None: ...


@reconciler(every_s=1)
def notified(world: World) -> list[str]:
    """What happened is told, each topic by itself: one that nobody reads is in no other's way."""
    said, listened = world.config.notifications, world.listened
    if said.format == "none" or listened is None:
        return []
    for topic in notices.topics(said):
        while found := world.db.look(notices.oldest, topic, PIECE):
            if found[0][1].at > world.clock.now() - LATE_S and not world.db.look(_mine, world):
                break
            taken = _offered(listened, found)
            if taken:
                world.db.run(notices.sent, taken)
            if len(taken) < PIECE:
                break
    return []  # nothing was wrong


def _mine(tx: Tx, world: World) -> bool:
    """One tells, so that what is told is in order: the first of the conductors that work."""
    now, patience_s = world.clock.now(), world.config.compute.host_down_after_s
    up = [s.host for s in hosts.services(tx, binary=hosts.CONDUCTOR) if s.up(now, patience_s)]
    return world.me not in up or up[0] == world.me


def _offered(listened: Listened, found: list[tuple[int, Notice]]) -> list[int]:
    """Those that somebody took: the first that nobody takes is the last."""
    taken = []
    for id, m in found:
        if not listened.put(m.routed, wire(m)):
            break
        taken.append(id)
    return taken


def wire(m: Notice) -> bytes:
    """As listeners of oslo.messaging read it: the message is a text in an envelope."""
    inner = msgspec.json.encode(m.envelope() | {"_unique_id": m.message_id.replace("-", "")}).decode()
    return msgspec.json.encode({"oslo.version": "2.0", "oslo.message": inner})


@reconciler(every_s=60)
def unwanted(world: World) -> list[str]:
    """What nobody wanted to hear for long is forgotten."""
    if world.config.notifications.format == "none":
        return []
    n = world.db.run(notices.forget, world.clock.now() - world.config.notifications.keep_s)
    return [f"{n} notifications that nobody took were forgotten"] if n else []
