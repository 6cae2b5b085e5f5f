"""What the block-storage service works with, and how what was promised is done.

A promise is an `Act`: begun in the transaction that changes the status, carried here, ended in the transaction that
gives the thing its resting status.  Nobody needs to remember: whoever starts finds the acts that are left.
"""

import functools
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kilonova.clients import Image
from kilonova.companions.volume.bytes import Bytes
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import NoCapacity, Refused, Trouble, Unavailable
from kilonova.kit.routes import Context
from kilonova.model import options
from kilonova.store import volumes as store
from kilonova.store.volumes import Act

logger = logging.getLogger(__name__)

PATIENCE_S = 900.0  # with neighbours that are not there
BACKEND = "files"


@dataclass
class World:
    """`host` is where the bytes lie. `crew` does what takes long; without one, who asks waits.

    `grown(volume_id, server_ids)` tells whoever runs these servers that their volume is larger now.
    """

    db: Db
    clock: Clock
    ids: Ids
    config: options.Volume
    bytes: Bytes
    images: Image
    host: str
    authenticate: Callable[[str], Context]
    grown: Callable[[str, list[str]], object] | None = None
    crew: "Crew | None" = None
    held: bool = False  # nothing is carried: a test looks at what is under way

    @property
    def backend(self) -> str:
        return f"{self.host}@{BACKEND}#{BACKEND}"

    def go(self, act: Act) -> None:
        """After the commit that begun it."""
        if self.held:
            return
        if self.crew is not None and not KINDS[act.kind].quick:
            self.crew.add(act.id, functools.partial(carry, self, act.id))
        else:
            carry(self, act.id)


# ---- kinds of acts


Failed = Callable[[Tx, World, Act], tuple[str, str] | None]
Do = Callable[[World, Act], None]


@dataclass(frozen=True)
class Kind:
    """`do` the act, safe to do twice. When it cannot be done: `undo` what it did at neighbours, then
    `failed(tx, world, act)` leaves the thing where it can rest, and gives its project and its word for messages.
    `quick`: nobody need wait for it."""

    do: Do
    failed: Failed
    undo: Do | None
    quick: bool


KINDS: dict[str, Kind] = {}


def act(failed: Failed, *, undo: Do | None = None, quick: bool = False) -> Callable[[Do], Do]:
    """Declares a kind of act, named by its function."""

    def keep(do: Do) -> Do:
        KINDS[do.__name__] = Kind(do, failed, undo, quick)
        return do

    return keep


def begin(
    tx: Tx,
    world: World,
    do: Do,
    subject: str,
    *,
    request: str = "",
    back: str = "",
    **job: Any,
) -> Act:
    """Promise it, in the transaction that changes the subject's status. `World.go` after the commit."""
    made = Act(
        id=world.ids.uuid(),
        kind=do.__name__,
        subject=subject,
        created_at=world.clock.now(),
        request_id=request,
        back=back,
        job=job,
    )
    store.add(tx, made)
    return made


def end(tx: Tx, act: Act) -> bool:
    """In the transaction that brings its subject to rest. False: somebody else ended it."""
    return store.remove(tx, Act, act.id)


def carry(world: World, id: str) -> None:
    """Do what was promised, or say why it cannot be done. Safe beside others who try the same."""
    with world.bytes.holding(id) as ours:
        with world.db.read() as tx:
            act = store.look(tx, Act, id)
        if not ours or act is None:
            return
        try:
            KINDS[act.kind].do(world, act)
        except Exception as e:
            if isinstance(e, Unavailable) and world.clock.now() < act.created_at + PATIENCE_S:
                logger.info("%s of %s is tried again: %s (%s)", act.kind, act.subject, e.said, e.why)
                return
            if not isinstance(e, Trouble):
                logger.exception("%s of %s failed", act.kind, act.subject)
            else:
                logger.warning("%s of %s failed: %s (%s)", act.kind, act.subject, e.said, e.why)
            _failed(world, act, e)


def _undone(world: World, act: Act) -> bool:
    """Before the transaction: no neighbour is asked in one. Who does not answer now is asked with the next try."""
    undo = KINDS[act.kind].undo
    try:
        if undo is not None:
            undo(world, act)
    except Unavailable as e:
        logger.info("%s of %s is taken back later (%s)", act.kind, act.subject, e.why)
        return False
    return True


def _failed(world: World, act: Act, e: Exception) -> None:
    said = e.said if isinstance(e, Trouble) else "An unknown error occurred."
    if not _undone(world, act):
        return
    with world.db.tx() as tx:
        if not end(tx, act):
            return
        whose = KINDS[act.kind].failed(tx, world, act)
        if whose is None:
            return
        project, kind = whose
        store.add(
            tx,
            store.Message(
                id=world.ids.uuid(),
                project_id=project,
                request_id=act.request_id,
                kind=kind,
                subject=act.subject,
                event=f"{kind}_{act.kind.upper()}_{_code(e)}",
                said=f"{act.kind.replace('_', ' ')}: {said}",
                created_at=world.clock.now(),
            ),
        )


def _code(e: Exception) -> str:
    words: dict[type[Exception], str] = {NoCapacity: "NO_ROOM", Refused: "REFUSED", Unavailable: "UNAVAILABLE"}
    return words.get(type(e), "ERROR")


def left(world: World) -> list[str]:
    """Acts that were begun and not ended."""
    with world.db.read() as tx:
        return [a.id for a in store.find(tx, Act)]


def resume(world: World) -> int:
    """Carry all that is left; at start-up, and now and then for what had to wait. How many there were."""
    ids = left(world)
    for id in ids:
        if world.crew is not None:
            world.crew.add(id, functools.partial(carry, world, id))
        else:
            carry(world, id)
    return len(ids)


class Crew:
    """Threads that do what takes long. What is under way when the process ends is begun again by the next one."""

    def __init__(self, threads: int = 2) -> None:
        self.todo: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        self.lock, self.waiting = threading.Lock(), set[str]()
        self.threads = [threading.Thread(target=self._work, name=f"volumes-{n}", daemon=True) for n in range(threads)]

    def start(self) -> None:
        for t in self.threads:
            t.start()

    def add(self, name: str, work: Callable[[], None]) -> None:
        """Once, while it waits: who looks for what is left need not know what is queued."""
        with self.lock:
            if name in self.waiting:
                return
            self.waiting.add(name)
        self.todo.put((name, work))

    def close(self, timeout_s: float = 5.0) -> None:
        for _ in self.threads:
            self.todo.put(None)
        for t in self.threads:
            if t.ident is not None:
                t.join(timeout_s)

    def _work(self) -> None:
        while (next := self.todo.get()) is not None:
            name, work = next
            with self.lock:
                self.waiting.discard(name)
            try:
                work()
            except Exception:
                logger.exception("an act of the block-storage service is left until it is looked at again")


__all__ = ["KINDS", "Crew", "Kind", "World", "act", "begin", "carry", "end", "left", "resume"]
