"""The outbox: a notification is written down in the transaction of what it tells, and sent when that is committed.

So nothing is told that did not happen, and nothing that happened is forgotten; somebody may be told twice.
Where notifications are off, nobody is asked anything: not one statement is sent.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.kit.clock import Ids
from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import Fault, NotFound
from kilonova.kit.journal import Happened, Moved, Said
from kilonova.kit.log import named
from kilonova.model import notices as words
from kilonova.model import options
from kilonova.model.notices import API, BY_API, BY_CONDUCTOR, COMPUTE, CONDUCTOR, TASKS, Notice, Who
from kilonova.model.server import Server
from kilonova.store import hosts, servers, shares

T = sa.Table(
    "notices",
    meta,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("topic", sa.String(255), nullable=False, server_default=""),  # with its priority; "": of an older release
    sa.Column("notice", sa.Text().with_variant(sa.dialects.mysql.MEDIUMTEXT(), "mysql", "mariadb"), nullable=False),
    sa.Index("notices_of_topic", "topic", "id"),
)


class Outbox:
    """Of one process, `me` by its host's name. `happened` is told by the journal what becomes of runs."""

    def __init__(self, said: options.Notifications, *, ids: Ids, me: str) -> None:
        self.said, self.ids, self.me = said, ids, me
        self.versioned = said.format in ("versioned", "both")
        self.flat = said.format in ("unversioned", "both")
        self.on = self.versioned or self.flat

    @property
    def closely(self) -> bool:
        """Is each change of a server's state told?"""
        return self.on and self.said.state_changes != "none"

    def heard(self, tx: Tx, told: Happened | Said | Moved) -> None:
        match told:
            case Happened():
                self.happened(tx, told)
            case Said(event=event, binary=binary, at=at, host=host):
                self.put(tx, event, binary, told.of(tx), at, host)
            case Moved():
                self.moved(tx, told.before, told.after, told.at)

    def moved(self, tx: Tx, before: Server | None, after: Server, at: float) -> None:
        """Its state is another; or, if that is wanted, what is being done to it."""
        states = [(s.vm_state, s.task_state if self.said.state_changes == "vm_and_task_state" else None)
                  for s in (before, after) if s is not None]  # fmt: skip
        if len(states) == 2 and states[0] == states[1]:
            return
        about = named()
        who = Who(
            after.user_id, after.project_id, about.get("request_id", ""), hosts.zones(tx).get(after.host or "", "")
        )
        self.updated(tx, before, after, who, at, COMPUTE if after.host else API)

    def happened(self, tx: Tx, h: Happened) -> None:
        """A run about a server began or ended: what others call that. What no server is about is nobody's business."""
        tells = words.ACTIONS.get(_called(h))
        types = tells.of(h.phase) if tells else ()
        if not types:
            return
        try:
            server = servers.get(tx, h.subject)
        except NotFound:
            return
        args = _decoded(h.args)
        if server.host is None and server.deleted_at is not None:  # where it was is in what its run was told
            server = msgspec.structs.replace(server, host=(args.get("server") or {}).get("host"))
        zone = hosts.zones(tx).get(server.host or "", "")
        who = Who(h.user_id, h.project_id, h.request_id, zone)
        for event in types:
            self._server(tx, server, event, who, h.fault, h.at, args)
        if h.fault is not None and h.action in TASKS:
            event = f"compute_task.{TASKS[h.action]}.error"
            self.put(tx, event, CONDUCTOR, words.task(server.id, str(server.vm_state), h.fault), h.at)

    def _server(
        self, tx: Tx, s: Server, event: str, who: Who, fault: Fault | None, at: float, args: dict[str, Any]
    ) -> None:
        family, _, phase = event.partition(".")
        fault = fault if phase == "error" else None
        binary = API if family in BY_API else CONDUCTOR if family in BY_CONDUCTOR else COMPUTE
        payload = self._filled(tx, s, words.action(family, s, who, fault, args, at))
        where = s.host if binary == COMPUTE else None
        self.put(tx, f"instance.{event}", binary, payload, at, where, flat=lambda: words.legacy(s, who, fault))

    def updated(self, tx: Tx, before: Server | None, server: Server, who: Who, at: float, binary: str = API) -> None:
        payload = self._filled(tx, server, words.update(server, who, before, at))
        flat = lambda: words.legacy(server, who, None) | {"old_state": str(before.vm_state) if before else None}
        self.put(tx, "instance.update", binary, payload, at, server.host if binary == COMPUTE else None, flat=flat)

    def _filled(self, tx: Tx, s: Server, payload: dict[str, Any]) -> dict[str, Any]:
        """With what only some want to hear of."""
        data = payload["nova_object.data"]
        if self.said.block_devices:
            data["block_devices"] = [words.block_device(d) for d in s.devices if d.is_volume]
        if self.said.shares:
            data["shares"] = [words.share(x, s) for x in shares.of(tx, s.id)]
        return payload

    def put(
        self,
        tx: Tx,
        event: str,
        binary: str,
        payload: dict[str, Any],
        at: float,
        host: str | None = None,
        *,
        flat: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        """Write it down, in each form that is wanted. Only servers have the older one."""
        priority, me = "ERROR" if event.endswith(".error") else "INFO", host or self.me
        rows = []
        if self.versioned:
            rows += [
                Notice(topic, event, f"{binary}:{me}", priority, self.ids.uuid(), at, payload)
                for topic in self.said.versioned_topics
            ]
        if self.flat and flat is not None:
            publisher, name = f"{binary.removeprefix('nova-')}.{me}", words.legacy_type(event)
            rows += [
                Notice(topic, name, publisher, priority, self.ids.uuid(), at, flat())
                for topic in self.said.unversioned_topics
            ]
        if rows:
            told = [{"at": at, "topic": r.routed, "notice": msgspec.json.encode(r).decode()} for r in rows]
            tx.execute(sa.insert(T), told)


def topics(said: options.Notifications) -> list[str]:
    """All that there may be notices of."""
    wanted = [*said.versioned_topics, *said.unversioned_topics]
    return ["", *(f"{topic}.{priority}" for topic in dict.fromkeys(wanted) for priority in ("info", "error"))]


def oldest(tx: Tx, topic: str | None = None, most: int = 100) -> list[tuple[int, Notice]]:
    """Of one topic, or of all (None)."""
    query = sa.select(T.c.id, T.c.notice).order_by(T.c.id).limit(most)
    rows = tx.execute(query if topic is None else query.where(T.c.topic == topic))
    return [(id, msgspec.json.decode(text, type=Notice)) for id, text in rows]


def sent(tx: Tx, ids: list[int]) -> None:
    tx.execute(sa.delete(T).where(T.c.id.in_(ids)))


def forget(tx: Tx, before: float) -> int:
    """Those that nobody wanted to hear for so long."""
    return tx.execute(sa.delete(T).where(T.c.at < before)).rowcount


def _called(h: Happened) -> str:
    """The row of the table. What the action's name does not tell, its run does."""
    if h.workflow == "soft_delete":
        return "softDelete"
    if h.action == "shelve" and _decoded(h.args).get("offload"):
        return "shelve, offload"
    return h.action


def _decoded(args: str) -> dict[str, Any]:
    said = msgspec.json.decode(args) if args else None
    return said if isinstance(said, dict) else {}
