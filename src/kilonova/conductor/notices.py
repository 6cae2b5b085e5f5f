"""Notifications leave the outbox for the bus, in order, when somebody listens there. At least once."""

from typing import Protocol

import msgspec

from kilonova.conductor.world import World
from kilonova.kit.db import Tx
from kilonova.kit.reconcile import reconciler
from kilonova.model.notices import Notice
from kilonova.store import notices

PIECE = 100


class Listened(Protocol):
    """A bus, as far as it can say who listens."""

    def serves(self, address: str) -> bool: ...

    def send(self, to: str, raw: bytes) -> None: ...


@reconciler(every_s=1)
def notified(world: World) -> list[str]:
    """What happened is told; what nobody wanted to hear for long is forgotten."""
    said, bus = world.config.notifications, world.bus
    if said.format == "none" or bus is None:
        return []
    n = 0
    while found := world.db.look(notices.oldest, PIECE):
        heard = [(id, m) for id, m in found if bus.serves(m.topic)]
        for _, m in heard:
            bus.send(m.topic, wire(m))
        world.db.run(notices.sent, [id for id, _ in heard]) if heard else None
        n += len(heard)
        if len(heard) < PIECE:
            break
    world.db.run(_forget, world.clock.now() - said.keep_s)
    return [f"{n} notifications sent"] if n else []


def wire(m: Notice) -> bytes:
    """As listeners of oslo.messaging read it: the message is a text in an envelope."""
    inner = msgspec.json.encode(m.envelope() | {"_unique_id": m.message_id.replace("-", "")}).decode()
    return msgspec.json.encode({"oslo.version": "2.0", "oslo.message": inner})


def _forget(tx: Tx, before: float) -> None:
    notices.forget(tx, before)
