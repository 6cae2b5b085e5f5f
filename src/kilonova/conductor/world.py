"""What a conductor's steps have around them: neighbours, hosts, time. Handed to effects and reconcilers."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from kilonova.clients import Neighbours, NetworkInfo, SecurityGroup, Subnet
from kilonova.clients.placement import Offer
from kilonova.contracts.scheduler import Choose, Chosen
from kilonova.kit.ask import Breaks
from kilonova.kit.bus import Send
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Unavailable
from kilonova.kit.journal import Said, tell
from kilonova.model import notices as words
from kilonova.model.ask import Ask
from kilonova.model.options import Config
from kilonova.store import hosts, server_groups, servers
from kilonova.store.trees import Trees

T = TypeVar("T")
KEEP_S = 5.0  # what the network service says of networks and groups is not asked for again within that time
DOUBTS_S = (15.0, 60.0)  # a request whose answer was not waited for any longer may be done so much later
HEARD_S = 1.0  # the same of a host's health
SETTLE_S = 10.0  # until all that were heard of are known to schedulers; and hosts find a broker again


class World:
    """One conductor's. `born` is when it began to listen: what was silent before, it could not hear."""

    def __init__(
        self,
        db: Db,
        send: Send,
        neighbours: Neighbours,
        choose: Callable[[Choose], Chosen],
        *,
        clock: Clock,
        ids: Ids,
        config: Config,
        me: str,
        wake: Callable[[str], None] = lambda run: None,
        bus: Any = None,
        listened: Any = None,
        among: "Callable[[World, Ask], list[str] | None]" = lambda world, ask: None,
    ) -> None:
        self.db, self.send, self.neighbours, self.ask_scheduler = db, send, neighbours, choose
        self.clock, self.ids, self.config, self.me, self.wake = clock, ids, config, me, wake
        self.among = among  # the hosts that another Placement service would give (`conductor/outside.py`); None: any
        self.listened = listened  # by whom notifications are, as `conductor/notices.py` sees it
        self.breaks = bus if isinstance(bus, Breaks) else None
        self.born = clock.now()
        self.guard = threading.Lock()  # of the next seven
        self.beats: dict[str, float] = {}  # when each host was last heard of, and it is not written down yet
        self.lives: dict[str, float] = {}  # which life of each host we have met
        self.learned: dict[
            str, tuple[bytes, float, float | None]
        ] = {}  # facts of each, when we wrote them, their moment
        self.well: dict[str, float] = {}  # when we last made sure that a host is not gone
        self.fits: dict[str, bytes] = {}  # what each host said last of what it holds, where that is as it should be
        self.identities: dict[str, str] = {}  # which machine each host is
        self.doubts: dict[str, list[float]] = {}  # when to look again what ports a server has
        self.forced_down: frozenset[str] = frozenset()  # hosts, as a reconciler saw them last
        self.trees, self.met = Trees(), dict[str, Offer]()  # what another Placement service was told of providers
        self.networks = Kept[NetworkInfo](self)
        self.subnets = Kept[list[Subnet]](self)
        self.groups = Kept[SecurityGroup](self)

    def doubt(self, server: str) -> None:
        """Nobody knows whether a port was made for it: the answer did not come. It may still be made, a while from now."""
        now = self.clock.now()
        with self.guard:
            self.doubts[server] = [now + s for s in DOUBTS_S]

    def choose(self, m: Choose) -> Chosen:
        """As `_chosen`; and others are told that it was asked, and that it was answered."""
        if getattr(self.db.engine.dialect, "heard", None) is None:
            return self._chosen(m)
        self.db.run(self._told, m, "start")
        chosen = self._chosen(m)
        self.db.run(self._told, m, "end")
        return chosen

    @property
    def chooses_at_once(self) -> bool:
        """Is nobody asked but our own database, and nobody told?"""
        told = getattr(self.db.engine.dialect, "heard", None) is not None
        return not told and not self.config.scheduler.apart and self.neighbours.placement is None

    def _told(self, tx: Tx, m: Choose, phase: str) -> None:
        def of(tx: Tx) -> dict[str, Any]:
            return words.wanted(m.server, servers.find(tx, [m.server]).get(m.server), m.ask)

        event = f"scheduler.select_destinations.{phase}"
        tell(tx, Said(event=event, binary=words.SCHEDULER, at=self.clock.now(), of=of))

    def _chosen(self, m: Choose) -> Chosen:
        """Places for a server; the scheduler is told where others are that it shall be with or not. Raises Unsupported.

        Who is silent because there was no broker is not dead: Unavailable, until they had time to be heard.
        """
        ask = m.ask
        if ask.group_id is not None:
            with self.db.read() as tx:
                company = server_groups.company(tx, m.server, ask.group_id)
            ask = msgspec.structs.replace(ask, company=company)
        same, other = _named(ask.hints, "same_host"), _named(ask.hints, "different_host")
        if same or other:
            with self.db.read() as tx:
                at = servers.hosts_of(tx, {*same, *other})
            near = sorted({at[id] for id in same if id in at}) if same else None
            ask = msgspec.structs.replace(ask, near=near, far=sorted({at[id] for id in other if id in at}))
        outside = self.neighbours.placement is not None and not ask.in_place
        if outside:
            ask = msgspec.structs.replace(ask, among=self.among(self, ask))
        chosen = self.ask_scheduler(m if ask is m.ask else msgspec.structs.replace(m, ask=ask))
        if outside:
            chosen = msgspec.structs.replace(chosen, outside=True)
        if not chosen.places and chosen.why.get("up") and self._hard_of_hearing():
            raise Unavailable("Hosts could not be heard until now.", why=chosen.explained())
        return chosen

    @property
    def listening_since(self) -> float:
        """When we began to hear hosts, without a break; now, while there is no broker."""
        if self.breaks is None:
            return self.born
        return max(self.born, self.breaks.since if self.breaks.up else self.clock.now())

    def _hard_of_hearing(self) -> bool:
        """Is there no broker, or has it not been back for long enough to hear of all hosts that live?"""
        patience_s = 2 * self.config.compute.report_interval_s + SETTLE_S
        return self.breaks is not None and self.clock.now() - self.listening_since < patience_s

    def gone(self, tx: Tx, host: str) -> bool:
        """Nobody should wait for it: it is forced down, nobody knows it, or it was silent for too long while we listened."""
        if self.clock.now() - self.well.get(host, -1e18) < HEARD_S:
            return False
        return self.silent(host, hosts.heard(tx, host))

    def silent(self, host: str, row: Any) -> bool:
        """The same, of what is written of when it was heard: `last_seen` and `forced_down`; None: nothing is."""
        now = self.clock.now()
        if row is None or row.forced_down:
            return True
        heard = max(row.last_seen or 0.0, self.beats.get(host, 0.0), self.listening_since)
        if now - heard > self.config.compute.host_down_after_s:
            return True
        self.well[host] = now
        return False

    def started(self, runs: list[str]) -> None:
        """These runs have something to do; after the commit that says so."""
        for id in runs:
            self.wake(id)


class Kept(dict[str, tuple[float, T]]):
    """What was said a moment ago, by id."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def of(self, ids: list[str], ask: Callable[[list[str]], dict[str, T]], *, fresh: bool = False) -> dict[str, T]:
        """Of these ids; `ask` is called for those that we do not know well enough. Some may be missing."""
        now = self.world.clock.now()
        if len(self) > 10_000:
            self.clear()
        old = [id for id in ids if fresh or (known := self.get(id)) is None or now - known[0] > KEEP_S]
        if old:
            for id, said in ask(old).items():
                self[id] = now, said
        return {id: self[id][1] for id in ids if id in self}


def _named(hints: dict[str, Any], name: str) -> list[str]:
    """The servers that a hint names: one, or several."""
    said = hints.get(name) or []
    return [said] if isinstance(said, str) else list(said)
