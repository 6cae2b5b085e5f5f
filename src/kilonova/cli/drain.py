"""`kilonova hosts drain HOST`: its servers go elsewhere, while they run where they can; `balance`: which should, and why.

All through the public APIs, as an administrator.  What is done already is seen in the cloud itself: who stops this, or is
stopped, begins it again and goes on.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import quote

from kilonova.kit.errors import NotFound, Trouble

COMPUTE, PLACEMENT = "/compute/v2.1", "/placement"
REASON = "drained by kilonova hosts drain"
POLL_S = 1.0
MOST_MOVES = 10  # that a report on balance names
EVEN = 0.02  # so far from the others' mean a host may be

Way = Literal["live", "cold", "offload", "wait", "stay"]
WORDS: dict[Way, str] = {
    "live": "moves while it runs",
    "cold": "is off, and moves",
    "offload": "is shelved, and leaves",
    "wait": "is busy: waited for",
    "stay": "stays",
}


class Cloud(Protocol):
    """`cli.client.Client`, as far as this needs it."""

    def get(self, path: str) -> Any: ...

    def post(self, path: str, body: Any) -> Any: ...

    def put(self, path: str, body: Any) -> Any: ...


class Move(NamedTuple):
    """What can be done about one server. `why` where it stays."""

    id: str
    name: str
    way: Way
    why: str = ""


# ---- decide


def planned(servers: Iterable[Mapping[str, Any]]) -> list[Move]:
    """How each could leave its host, those that only need to be told first."""
    order: dict[Way, int] = {"offload": 0, "cold": 1, "live": 2, "wait": 3, "stay": 4}
    return sorted((way(s) for s in servers), key=lambda m: (order[m.way], m.name, m.id))


def way(server: Mapping[str, Any]) -> Move:
    """By its state, as the API shows it."""
    id, name, status = str(server["id"]), str(server["name"]), str(server["status"])
    if server.get("OS-EXT-STS:task_state"):
        return Move(id, name, "wait", f"{status}, {server['OS-EXT-STS:task_state']}")
    if status in ("ACTIVE", "PAUSED"):
        return Move(id, name, "live")
    if status == "SHUTOFF":
        return Move(id, name, "cold")
    if status == "SHELVED":
        return Move(id, name, "offload")
    if status == "VERIFY_RESIZE":
        return Move(id, name, "stay", "its user has a resize to confirm or revert")
    return Move(id, name, "stay", f"it is {status}")


# ---- gather


def service_of(cloud: Cloud, host: str) -> dict[str, Any]:
    """Raises NotFound."""
    found = cloud.get(f"{COMPUTE}/os-services?binary=nova-compute&host={quote(host)}")["services"]
    if not found:
        raise NotFound(f"There is no compute host {host}.")
    return dict(found[0])


def servers_on(cloud: Cloud, host: str) -> list[dict[str, Any]]:
    """All pages of them."""
    found: list[dict[str, Any]] = []
    marker = ""
    while True:
        path = f"{COMPUTE}/servers/detail?all_tenants=1&host={quote(host)}&limit=500{marker}"
        page = cloud.get(path)["servers"]
        found += page
        if len(page) < 500:
            return [s for s in found if s.get("OS-EXT-SRV-ATTR:host") == host]
        marker = f"&marker={page[-1]['id']}"


def unconfirmed(cloud: Cloud, host: str, since: str) -> list[str]:
    """Servers that were moved away cold since then, and wait for a word: an operator's move, so an operator's word."""
    path = f"{COMPUTE}/os-migrations?source_compute={quote(host)}&status=finished&migration_type=migration"
    found = cloud.get(path)["migrations"]
    return [str(m["instance_uuid"]) for m in found if str(m["created_at"]) >= since[:19]]


# ---- drain


class Drain:
    """One host. `say` is told each step; `pause` lets so many seconds pass; `over` says when to begin nothing more."""

    def __init__(
        self,
        cloud: Cloud,
        host: str,
        *,
        say: Callable[[str], None],
        pause: Callable[[float], None],
        over: Callable[[], bool] = lambda: False,
        at_once: int = 2,
        patience_s: float = 1800.0,
        cold: bool = True,
    ) -> None:
        self.cloud, self.host, self.say, self.pause, self.over = cloud, host, say, pause, over
        self.at_once, self.patience_s, self.cold = at_once, patience_s, cold
        self.under_way: dict[str, tuple[Move, float]] = {}  # by server: and how long it may still take
        self.left: dict[str, str] = {}  # servers that do not go, with the reason
        self.gone = 0

    def run(self) -> bool:
        """True: it is empty. Nothing is begun before no new server can come."""
        service = service_of(self.cloud, self.host)
        if service["status"] != "disabled":
            wish = {"status": "disabled", "disabled_reason": REASON}
            service = self.cloud.put(f"{COMPUTE}/os-services/{service['id']}", wish)["service"]
            self.say(f"{self.host} is disabled: no new server comes.")
        since = str(service.get("updated_at") or "")
        tried_cold: set[str] = set()
        while True:
            here = {m.id: m for m in planned(servers_on(self.cloud, self.host))}
            self._looked(here, tried_cold)
            self._confirmed(since)
            todo = [m for m in here.values() if m.id not in self.under_way and m.id not in self.left]
            if self.over():
                todo = []
            for m in todo:
                if len(self.under_way) < self.at_once and m.way != "wait":
                    self._begun(m, cold=m.id in tried_cold)
            if not self.under_way and not any(m.id not in self.left for m in todo):
                return not here
            self.pause(POLL_S)

    def _begun(self, m: Move, *, cold: bool) -> None:
        if m.way == "stay":
            self.left[m.id] = m.why
            self.say(f"{m.name} stays: {m.why}.")
            return
        wish: dict[str, Any] = {"os-migrateLive": {"host": None, "block_migration": "auto"}}
        if m.way == "cold" or cold:
            wish, m = {"migrate": None}, m._replace(way="cold")
        elif m.way == "offload":
            wish = {"shelveOffload": None}
        try:
            self.cloud.post(f"{COMPUTE}/servers/{m.id}/action", wish)
        except Trouble as e:
            self.left[m.id] = e.said
            self.say(f"{m.name} stays: {e.said}")
            return
        self.under_way[m.id] = m, self.patience_s
        self.say(f"{m.name} {WORDS[m.way]} …")

    def _looked(self, here: Mapping[str, Move], tried_cold: set[str]) -> None:
        """What has become of those under way."""
        for id, (m, patience_s) in list(self.under_way.items()):
            now = here.get(id)
            if now is None:
                del self.under_way[id]
                self.gone += 1
                self.say(f"{m.name} is gone to {self._where(id)} ({self.gone} gone, {len(here)} here).")
            elif now.way == "wait" and patience_s > 0:
                self.under_way[id] = m, patience_s - POLL_S
            elif now.way == "wait":
                del self.under_way[id]
                self.left[id] = f"it is {now.why} for too long"
                self.say(f"{m.name}: {self.left[id]}.")
            else:
                del self.under_way[id]
                self._failed(m, tried_cold)

    def _failed(self, m: Move, tried_cold: set[str]) -> None:
        why = self._why(m.id)
        if m.way == "live" and self.cold and m.id not in tried_cold:
            tried_cold.add(m.id)
            self.say(f"{m.name} could not move while it runs ({why}); it is turned off for the move.")
            return
        self.left[m.id] = why
        self.say(f"{m.name} stays: {why}")

    def _confirmed(self, since: str) -> None:
        for id in unconfirmed(self.cloud, self.host, since):
            try:
                self.cloud.post(f"{COMPUTE}/servers/{id}/action", {"confirmResize": None})
            except Trouble:
                continue  # it is being done already, or its user was first

    def _where(self, id: str) -> str:
        try:
            return str(self.cloud.get(f"{COMPUTE}/servers/{id}")["server"].get("OS-EXT-SRV-ATTR:host") or "no host")
        except NotFound:
            return "nowhere: it was deleted"

    def _why(self, id: str) -> str:
        """Of its last action, what an operator is told."""
        path = f"{COMPUTE}/servers/{id}/os-instance-actions"
        actions = self.cloud.get(path)["instanceActions"]
        if not actions:
            return "nobody says why"
        events = self.cloud.get(f"{path}/{actions[0]['request_id']}")["instanceAction"].get("events", [])
        said = [e["details"] for e in events if e.get("details")]
        return str(said[-1]) if said else "nobody says why"


def drained(drain: Drain) -> int:
    """The whole of it, with its last words. 0: the host is empty; 1: some stay; 130: it was stopped."""
    try:
        empty = drain.run()
    except KeyboardInterrupt:
        names = ", ".join(m.name for m, _ in drain.under_way.values())
        drain.say(f"Stopped; under way are {names or 'none'}. {drain.host} stays disabled; the same command goes on.")
        return 130
    if empty:
        drain.say(f"{drain.host} is empty.")
        return 0
    drain.say(f"{len(drain.left)} stay on {drain.host}:" if drain.left else f"{drain.host} is not empty; go on later.")
    for id, why in drain.left.items():
        drain.say(f"  {id}: {why}")
    return 1


# ---- balance


class Load(NamedTuple):
    """How full a host is, by class, as a part of what it can give."""

    host: str
    room: dict[str, float]
    used: dict[str, float]

    @property
    def full(self) -> float:
        return max((self.used.get(c, 0.0) / n for c, n in self.room.items() if n), default=0.0)


def foreseen(
    moves: Iterable[Move], servers: Iterable[Mapping[str, Any]], all: Iterable[Load], host: str
) -> dict[str, int]:
    """How many other hosts have room for each that moves, when those before it have gone to the emptiest of theirs.

    A foresight: who chooses knows more rules than room, and others build meanwhile.
    """
    of, known = {load.host: load for load in all if load.host != host}, {str(s["id"]): s for s in servers}
    found: dict[str, int] = {}
    for m in moves:
        if m.way not in ("live", "cold"):
            continue
        size = _size(known[m.id])
        fit = [load for load in of.values() if _shifted(load, size, 1).full <= 1]
        found[m.id] = len(fit)
        if fit:
            to = min(fit, key=lambda load: load.full)
            of[to.host] = _shifted(to, size, 1)
    return found


class Shift(NamedTuple):
    """One move that would help."""

    server: Move
    of: str
    to: str


def loads(cloud: Cloud) -> list[Load]:
    """Of all hosts that take servers now."""
    up = {
        s["host"]
        for s in cloud.get(f"{COMPUTE}/os-services?binary=nova-compute")["services"]
        if s["status"] == "enabled" and s["state"] == "up"
    }
    found = []
    for h in cloud.get(f"{COMPUTE}/os-hypervisors/detail")["hypervisors"]:
        host = h["service"]["host"]
        if host not in up:
            continue
        at = f"{PLACEMENT}/resource_providers/{h['id']}"
        stocks = cloud.get(f"{at}/inventories")["inventories"]
        room = {c: (i["total"] - i["reserved"]) * i["allocation_ratio"] for c, i in stocks.items()}
        usages = cloud.get(f"{at}/usages")["usages"]
        found.append(Load(host, {c: room[c] for c in ("VCPU", "MEMORY_MB") if c in room}, dict(usages)))
    return found


def evened(all: Iterable[Load], servers: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[Shift]:
    """From the fullest to the emptiest, as long as that brings them nearer; servers that can move while they run only."""
    of = {load.host: load for load in all}
    there = {h: [s for s in some if way(s).way == "live"] for h, some in servers.items()}
    found: list[Shift] = []
    while len(of) > 1 and len(found) < MOST_MOVES:
        high, low = max(of.values(), key=lambda x: x.full), min(of.values(), key=lambda x: x.full)
        if high.full - low.full <= 2 * EVEN:
            break
        best, least = None, high.full
        for s in there.get(high.host, ()):
            size = _size(s)
            after = max(_shifted(high, size, -1).full, _shifted(low, size, 1).full)
            if after < least - 1e-9 and _shifted(low, size, 1).full <= 1:
                best, least = (s, size), after
        if best is None:
            break
        s, size = best
        there[high.host].remove(s)
        of[high.host], of[low.host] = _shifted(high, size, -1), _shifted(low, size, 1)
        found.append(Shift(way(s), high.host, low.host))
    return found


def _size(server: Mapping[str, Any]) -> dict[str, float]:
    return {"VCPU": float(server["flavor"]["vcpus"]), "MEMORY_MB": float(server["flavor"]["ram"])}


def _shifted(load: Load, size: Mapping[str, float], sign: int) -> Load:
    return load._replace(used={c: load.used.get(c, 0.0) + sign * size.get(c, 0.0) for c in load.room})


def spread(all: Iterable[Load]) -> float:
    """How far the hosts are from their mean, as a standard deviation."""
    full = [load.full for load in all]
    mean = sum(full) / len(full) if full else 0.0
    return math.sqrt(sum((f - mean) ** 2 for f in full) / len(full)) if full else 0.0
