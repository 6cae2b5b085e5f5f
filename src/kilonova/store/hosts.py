"""Services, hosts, aggregates: who does the work, what is it made of, and how is it grouped.

A service is a process somebody started (nova-compute on a host, nova-conductor, nova-scheduler); operators
disable it, force it down, delete it.  A node is the hypervisor behind a compute service; its UUID is also that
of its resource provider.  Moments are seconds since 1970.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.contracts.conductor import Report
from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.journal import Said, tell
from kilonova.kit.ready import MANY, Among, Shapes, ready
from kilonova.model import notices as words
from kilonova.model.host import HostFacts, Stock
from kilonova.store import placement, servers

COMPUTE, CONDUCTOR, SCHEDULER = "nova-compute", "nova-conductor", "nova-scheduler"
ZONE = "availability_zone"  # the key of an aggregate's metadata that makes it one
DISABLED = "COMPUTE_STATUS_DISABLED"
DAY_S = 86_400.0
SAME_S = 2  # hosts that were heard of within that were heard of at the same moment

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
SERVICES = sa.Table(
    "services",
    meta,
    sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
    sa.Column("uuid", sa.String(36), nullable=False, unique=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("binary", sa.String(64), nullable=False, quote=True),
    sa.Column("disabled", sa.Boolean, nullable=False),
    sa.Column("disabled_reason", sa.String(255)),
    sa.Column("forced_down", sa.Boolean, nullable=False),
    sa.Column("last_seen", sa.Double),
    sa.Column("born", sa.Double),  # when this life of it began, by its own clock
    sa.Column("version", sa.String(64), nullable=False),
    sa.Column("speaks", sa.Text, nullable=False),  # JSON: names of messages
    sa.Column("failures", sa.Integer, nullable=False),  # builds that failed there, one after another
    sa.Column("identity", sa.String(36), nullable=False, server_default=""),  # of the machine; "": not known
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double),
    sa.UniqueConstraint("host", "binary"),
)
NODES = sa.Table(
    "nodes",
    meta,
    sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
    sa.Column("uuid", sa.String(36), nullable=False, unique=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("node", sa.String(255), nullable=False),
    sa.Column("host_ip", sa.String(39), nullable=False),
    sa.Column("facts", sa.Text, nullable=False),  # HostFacts as JSON
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double),
    sa.UniqueConstraint("host", "node"),
)
AGGREGATES = sa.Table(
    "aggregates",
    meta,
    sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
    sa.Column("uuid", sa.String(36), nullable=False, unique=True),
    sa.Column("name", sa.String(255), nullable=False, unique=True),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double),
)
AGGREGATE_HOSTS = sa.Table(
    "aggregate_hosts",
    meta,
    sa.Column("aggregate", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("host", sa.String(255), primary_key=True),
    sa.Index("aggregate_hosts_host", "host"),
)
AGGREGATE_METADATA = sa.Table(
    "aggregate_metadata",
    meta,
    sa.Column("aggregate", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("value", sa.String(255), nullable=False),
)
MARKS = sa.Table(  # counters that say "something of this kind changed"; rare changes only, or they would be in the way
    "marks",
    meta,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("n", sa.BigInteger, nullable=False),
)


class Service(msgspec.Struct, frozen=True):
    """One process, as os-services shows it."""

    id: int
    uuid: str
    host: str
    binary: str
    disabled: bool
    disabled_reason: str | None
    forced_down: bool
    last_seen: float | None
    born: float | None
    version: str
    speaks: list[str]
    failures: int
    created_at: float
    updated_at: float | None

    def up(self, now: float, down_after_s: float) -> bool:
        """Does it work? Not when an operator said that it is down, nor when nothing was heard for so long."""
        return not self.forced_down and self.last_seen is not None and now - self.last_seen <= down_after_s


class Node(msgspec.Struct, frozen=True):
    """A hypervisor, as os-hypervisors shows it. `used` are claims by resource class; `stocks` what may be claimed."""

    id: int
    uuid: str
    host: str
    node: str
    host_ip: str
    facts: HostFacts
    service: Service
    stocks: dict[str, Stock]
    used: dict[str, int]
    running: int  # servers on it
    workload: int  # of those, busy
    created_at: float
    updated_at: float | None

    @property
    def memory_used_mb(self) -> int:
        """With what is kept for the host itself."""
        return self._used("MEMORY_MB")

    @property
    def disk_used_gb(self) -> int:
        return self._used("DISK_GB")

    @property
    def vcpus_used(self) -> int:
        return self.used.get("VCPU", 0) + self.used.get("PCPU", 0)

    def _used(self, name: str) -> int:
        return self.used.get(name, 0) + (self.stocks[name].reserved if name in self.stocks else 0)


class Statistics(msgspec.Struct, frozen=True):
    """All nodes whose service is enabled, summed up; the names of os-hypervisors/statistics."""

    count: int = 0
    vcpus: int = 0
    memory_mb: int = 0
    local_gb: int = 0
    vcpus_used: int = 0
    memory_mb_used: int = 0
    local_gb_used: int = 0
    free_ram_mb: int = 0
    free_disk_gb: int = 0
    current_workload: int = 0
    running_vms: int = 0
    disk_available_least: int = 0


class Aggregate(msgspec.Struct, frozen=True):
    """A group of hosts that somebody wrote something on."""

    id: int
    uuid: str
    name: str
    created_at: float
    updated_at: float | None
    hosts: list[str] = []
    metadata: dict[str, str] = {}

    @property
    def availability_zone(self) -> str | None:
        return self.metadata.get(ZONE)


class Heard(msgspec.Struct, frozen=True):
    """A compute host: when its life began, by its own clock, and when it was last heard of."""

    host: str
    born: float | None
    last_seen: float | None


# ---- services


def services(tx: Tx, *, host: str | None = None, binary: str | None = None, processes: bool = False) -> list[Service]:
    """By their number; with `processes` also those that only say that they live (`lives`)."""
    shape = host is not None, binary is not None
    found = tx.execute(PAGES.of(shape, lambda: _some(*shape)), {"host": host, "binary": binary})
    return [s for s in map(_service, found) if processes or "/" not in s.binary]


def _some(host: bool, binary: bool) -> sa.Select[Any]:
    where = [_s.host == _b("host")] * host + [_s.binary == _b("binary")] * binary
    return sa.select(SERVICES).where(*where).order_by(_s.id)


def service(tx: Tx, id: int | str) -> Service:
    """By its number (before 2.53) or UUID. Raises NotFound."""
    row = tx.execute(sa.select(SERVICES).where(_s.id == id if isinstance(id, int) else _s.uuid == id)).first()
    if row is None:
        raise NotFound(f"Service {id} could not be found.")
    return _service(row)


def service_of(tx: Tx, host: str, binary: str = COMPUTE) -> Service:
    """Raises NotFound, with the sentence that the field has for it."""
    row = tx.execute(SERVICE_OF, {"the_host": host, "the_binary": binary}).first()
    if row is None:
        raise NotFound(f"Could not find binary {binary} on host {host}.")
    return _service(row)


def exists(tx: Tx, host: str, node: str | None = None) -> bool:
    """Is there a compute host of that name (with that hypervisor)?"""
    query = sa.select(NODES.c.id).where(NODES.c.host == host)
    if node is not None:
        query = query.where(NODES.c.node == node)
    return tx.execute(query.limit(1)).first() is not None


def set_service(
    tx: Tx,
    id: int | str,
    now: float,
    *,
    disabled: bool | None = None,
    disabled_reason: str | None = None,
    forced_down: bool | None = None,
) -> Service:
    """What an operator decides. Enabling takes the reason away. Raises NotFound."""
    old = service(tx, id)
    values: dict[str, Any] = {"updated_at": now}
    if disabled is not None:
        values |= {"disabled": disabled, "disabled_reason": disabled_reason if disabled else None}
        if not disabled:
            values["failures"] = 0
    if forced_down is not None:
        values["forced_down"] = forced_down
    tx.execute(sa.update(SERVICES).where(_s.id == old.id).values(values))
    if disabled is not None and old.binary == COMPUTE:
        for uuid in tx.execute(sa.select(NODES.c.uuid).where(NODES.c.host == old.host)).scalars().all():
            _status_trait(tx, uuid, disabled, now)
    mark(tx)
    return service(tx, old.id)


def forget_service(tx: Tx, id: int | str) -> None:
    """Delete it with its nodes and providers. Raises NotFound; Conflict while servers are on it."""
    s = service(tx, id)
    if s.binary == COMPUTE:
        t = servers.T.c
        if tx.execute(sa.select(t.id).where(t.host == s.host, t.deleted_at.is_(None)).limit(1)).first():
            raise Conflict(f"Unable to delete compute service that is hosting instances. Service: {s.uuid}")
        for uuid in tx.execute(sa.select(NODES.c.uuid).where(NODES.c.host == s.host)).scalars().all():
            placement.withdraw(tx, uuid)
        tx.execute(sa.delete(NODES).where(NODES.c.host == s.host))
        tx.execute(sa.delete(AGGREGATE_HOSTS).where(AGGREGATE_HOSTS.c.host == s.host))
    tx.execute(sa.delete(SERVICES).where(_s.id == s.id))
    mark(tx)


def beat(tx: Tx, host: str, binary: str, *, uuid: Callable[[], str], now: float, born: float, version: str) -> None:
    """A service that is no host says that it lives."""
    said = {"the_host": host, "the_binary": binary, "now": now, "born": born, "version": version}
    if not tx.execute(BEAT, said).rowcount:
        _registered(tx, host, binary, uuid=uuid, now=now, born=born, version=version)


def lives(tx: Tx, host: str, role: str, *, uuid: Callable[[], str], now: float, born: float, version: str) -> None:
    """A role that nobody disables or evacuates says that it lives: an upgrade waits for it.

    One row a release and machine: processes of two releases beside each other are both seen.  Those of a release that
    is silent for a day go.
    """
    binary = f"kilonova-{role}/{version}"[:64]
    beat(tx, host, binary, uuid=uuid, now=now, born=born, version=version)
    tx.execute(
        sa.delete(SERVICES).where(_s.host == host, _s.binary.like(f"kilonova-{role}/%"), _s.last_seen < now - DAY_S)
    )


def seen(tx: Tx, beats: Mapping[str, float]) -> None:
    """These hosts were heard of, then: `last_seen` is never later than that, and at most SAME_S earlier.

    Many in a statement, as if they had been heard of at the same moment: a fleet that does nothing writes little else.
    """
    same: dict[int, list[str]] = {}
    for host in sorted(beats):  # in one order: others do the same just now
        same.setdefault(int(beats[host] // SAME_S), []).append(host)
    for names in same.values():
        for some in (names[i : i + MANY] for i in range(0, len(names), MANY)):
            tx.execute(*SEEN(some, at=min(beats[host] for host in some)))


def heard(tx: Tx, host: str) -> Any:
    """(last_seen, forced_down, born) of a compute host; None: there is none of that name."""
    return tx.execute(HEARD, {"the_host": host}).first()


def identities(tx: Tx, names: list[str]) -> dict[str, str]:
    """Which machines these compute hosts are, as far as there are such."""
    query = sa.select(_s.host, _s.identity).where(_s.binary == COMPUTE, _s.host.in_(names))
    return {row.host: row.identity for row in tx.execute(query)}


def all_heard(tx: Tx) -> list[Any]:
    """(host, last_seen, forced_down) of every compute host."""
    return list(tx.execute(ALL_HEARD))


def speakers(tx: Tx, message: str) -> list[Heard]:
    """Compute hosts that know this message; those that were there first at the head."""
    knows = _s.speaks.contains(f'"{message}"', autoescape=True)
    query = sa.select(_s.host, _s.born, _s.last_seen).where(_s.binary == COMPUTE, knows).order_by(_s.id)
    return [Heard(*row) for row in tx.execute(query)]


class _Kind(msgspec.Struct):
    """Of what a host says, its hypervisor's type."""

    hypervisor_type: str


def speech(tx: Tx, host: str) -> tuple[list[str], str]:
    """The messages that a compute host knows, and the type of its hypervisor; nothing, "" of one that nobody knows."""
    row = tx.execute(SPEECH, {"the_host": host}).first()
    return ([], "") if row is None else (_NAMES.decode(row.speaks), _KIND.decode(row.facts).hypervisor_type)


def written(tx: Tx, hosts: Collection[str]) -> dict[str, float]:
    """When what lasts of these hosts was last written, as far as it is."""
    return {r.host: r.at for r in tx.execute(*WRITTEN(hosts))} if hosts else {}


def connector(tx: Tx, host: str) -> dict[str, Any]:
    """Who a host is to a volume service, as it said itself: its address, its initiator."""
    row = tx.execute(sa.select(NODES.c.host_ip, NODES.c.facts).where(NODES.c.host == host)).first()
    if row is None:
        return {}
    return ({"ip": row.host_ip} if row.host_ip else {}) | _FACTS.decode(row.facts).connector


def address(tx: Tx, host: str) -> str | None:
    """The IP address that the host told of itself."""
    found: str | None = tx.execute(sa.select(NODES.c.host_ip).where(NODES.c.host == host).limit(1)).scalar()
    return found


def failed(tx: Tx, host: str) -> None:
    """A build came to grief there: others are preferred for a while."""
    tx.execute(sa.update(SERVICES).where(_s.host == host, _s.binary == COMPUTE).values(failures=_s.failures + 1))
    mark(tx)


def succeeded(tx: Tx, host: str) -> None:
    """A build did well there."""
    if tx.execute(SUCCEEDED, {"the_host": host}).rowcount:
        mark(tx)


def learn(tx: Tx, r: Report, *, uuid: Callable[[], str], now: float) -> bool:
    """Write down what a host says of itself: service, node, provider. True: something is new.

    A report without facts of a host that nobody knows teaches nothing; they come with one of the next.
    Raises Conflict when another machine is known by that name.
    """
    row = tx.execute(SERVICE_OF, {"the_host": r.host, "the_binary": COMPUTE}).first()
    if row is None and r.facts is None:
        return False
    if row is None:
        _registered(
            tx,
            r.host,
            COMPUTE,
            uuid=uuid,
            now=now,
            born=r.born,
            version=r.version,
            speaks=r.speaks,
            identity=r.identity,
        )
    else:
        told = {"born": r.born, "version": r.version, "speaks": _text(r.speaks), "last_seen": now}
        if r.identity and not tx.execute(NAMED, {"the_id": row.id, "ours": r.identity}).rowcount:
            raise Conflict(f"Another machine is known as {r.host}.")
        tx.execute(TOLD, told | {"the_id": row.id})
    new = row is None
    if r.facts is not None:
        new |= _learn_node(tx, r, r.facts, bool(row is not None and row.disabled), uuid, now)
    if new:
        mark(tx)
    return new


def _learn_node(tx: Tx, r: Report, facts: HostFacts, disabled: bool, uuid: Callable[[], str], now: float) -> bool:
    old = tx.execute(NODE_OF, {"the_host": r.host, "the_node": facts.hypervisor_hostname}).first()
    values = {"host_ip": r.host_ip, "facts": _text(facts), "updated_at": now}
    if old is None:
        id = uuid()
        tx.execute(
            sa.insert(NODES),
            values | {"uuid": id, "host": r.host, "node": facts.hypervisor_hostname, "created_at": now},
        )
    else:
        id = old.uuid
        if old.facts != values["facts"] or old.host_ip != r.host_ip:
            tx.execute(FACTS, values | {"the_id": old.id})
    traits = {*facts.traits, *({DISABLED} if disabled else ())}
    before = set() if old is None else {*_FACTS.decode(old.facts).traits, DISABLED}
    stocks = r.stocks if old is None or not placement.pooled(tx, id, "DISK_GB") else _without(r.stocks, "DISK_GB")
    new = placement.offer(tx, id, facts.hypervisor_hostname, stocks, traits, now=now, before=before)
    new |= _learn_devices(tx, id, facts, uuid, now)
    return new or old is None or _lasting(_FACTS.decode(old.facts)) != _lasting(facts)


def _without(stocks: Iterable[Stock], resource_class: str) -> list[Stock]:
    """What a pool shares with a host is the pool's: its room would be counted once more for each host that it is mounted on."""
    return [s for s in stocks if s.resource_class != resource_class]


def _learn_devices(tx: Tx, node: str, facts: HostFacts, uuid: Callable[[], str], now: float) -> bool:
    """A provider for each device, under its host's. One that is gone goes, or gives out nothing while somebody holds it."""
    known = {r.name: r.uuid for r in tx.execute(DEVICES_OF, {"the_node": node})}
    new, prefix = False, f"{facts.hypervisor_hostname}_"
    for d in facts.devices:
        name = f"{prefix}{d.address}"
        traits = {*d.traits, "OWNER_NOVA", *(("COMPUTE_MANAGED_PCI_DEVICE",) if d.kind == "pci" else ())}
        stock = Stock(d.resource_class, d.total, max_unit=d.total)
        id = known.pop(name, None) or uuid()
        new |= placement.offer(tx, id, name, [stock], traits, now=now, parent=node)
    for name, id in known.items():
        if name.startswith(prefix) and placement.PCI_ADDRESS.fullmatch(name.removeprefix(prefix)):
            new |= placement.retire(tx, id, now)
    return new


def _lasting(facts: HostFacts) -> HostFacts:
    """But for what moves all the time."""
    return msgspec.structs.replace(facts, disk_free_gb=0, uptime="", metrics={})


def _registered(
    tx: Tx,
    host: str,
    binary: str,
    *,
    uuid: Callable[[], str],
    now: float,
    born: float,
    version: str,
    speaks: Iterable[str] = (),
    identity: str = "",
) -> None:
    row = {"uuid": uuid(), "host": host, "binary": binary, "disabled": False, "forced_down": False, "failures": 0}
    row |= {"identity": identity}
    told = {"last_seen": now, "born": born, "version": version, "speaks": _text(list(speaks)), "created_at": now}
    tx.execute(sa.insert(SERVICES), row | told)
    tell(tx, Said(event="service.create", binary=binary, at=now, host=host, of=lambda tx: _new(tx, host, binary)))


def _new(tx: Tx, host: str, binary: str) -> dict[str, Any]:
    (s,) = services(tx, host=host, binary=binary)
    return words.service(s, zones(tx).get(host, ""))


def _status_trait(tx: Tx, provider: str, disabled: bool, now: float) -> None:
    """The mark by which users of Placement leave out a host that takes no servers."""
    t = placement.PROVIDER_TRAITS.c
    tx.execute(sa.delete(placement.PROVIDER_TRAITS).where(t.provider == provider, t.trait == DISABLED))
    if disabled:
        tx.execute(sa.insert(placement.PROVIDER_TRAITS), {"provider": provider, "trait": DISABLED})
    tx.execute(placement.MOVED, {"at": provider, "now": now})


# ---- nodes


def nodes(
    tx: Tx,
    *,
    limit: int | None = None,
    marker: str | int | None = None,
    pattern: str | None = None,
    host: str | None = None,
) -> list[Node]:
    """Hypervisors by their number; `pattern` is part of the name, `marker` the id that the last page ended with.

    Three queries, however many there are.  Raises Invalid for a marker that is nobody's.
    """
    n = NODES.c
    query = NODE.order_by(n.id).limit(limit)
    if marker is not None:
        after = tx.execute(
            sa.select(n.id).where(n.id == marker if isinstance(marker, int) else n.uuid == marker)
        ).scalar()
        if after is None:
            raise Invalid(f"marker [{marker}] not found")
        query = query.where(n.id > after)
    if pattern is not None:
        query = query.where(n.node.contains(pattern, autoescape=True))
    if host is not None:
        query = query.where(n.host == host)
    return _nodes(tx, tx.execute(query).all())


def node(tx: Tx, id: str | int) -> Node:
    """By UUID, or number (before 2.53). Raises NotFound."""
    n = NODES.c
    found = tx.execute(NODE.where(n.id == id if isinstance(id, int) else n.uuid == id)).all()
    if not found:
        raise NotFound(f"Hypervisor with ID '{id}' could not be found.")
    return _nodes(tx, found)[0]


def statistics(tx: Tx) -> Statistics:
    """All that are enabled, summed up."""
    all = [x for x in nodes(tx) if not x.service.disabled]
    return Statistics(
        count=len(all),
        vcpus=sum(x.facts.vcpus for x in all),
        memory_mb=sum(x.facts.memory_mb for x in all),
        local_gb=sum(x.facts.disk_gb for x in all),
        vcpus_used=sum(x.vcpus_used for x in all),
        memory_mb_used=sum(x.memory_used_mb for x in all),
        local_gb_used=sum(x.disk_used_gb for x in all),
        free_ram_mb=sum(x.facts.memory_mb - x.memory_used_mb for x in all),
        free_disk_gb=sum(x.facts.disk_gb - x.disk_used_gb for x in all),
        current_workload=sum(x.workload for x in all),
        running_vms=sum(x.running for x in all),
        disk_available_least=sum(x.facts.disk_free_gb for x in all),
    )


def _nodes(tx: Tx, rows: Iterable[Any]) -> list[Node]:
    rows = list(rows)
    stocks = placement.stocks(tx, [r.node_uuid for r in rows])
    t = servers.T.c
    busy = sa.func.sum(sa.case((t.task_state.is_(None), 0), else_=1))
    count = sa.select(t.host, sa.func.count(), busy).where(t.deleted_at.is_(None)).group_by(t.host)
    on = {h: (n, int(b or 0)) for h, n, b in tx.execute(count.where(t.host.in_({r.host for r in rows})))}
    return [
        Node(
            id=r.node_id,
            uuid=r.node_uuid,
            host=r.host,
            node=r.node,
            host_ip=r.host_ip,
            facts=_FACTS.decode(r.facts),
            service=_service(r),
            stocks={c: s for c, (s, _) in stocks.get(r.node_uuid, {}).items()},
            used={c: used for c, (_, used) in stocks.get(r.node_uuid, {}).items()},
            running=on.get(r.host, (0, 0))[0],
            workload=on.get(r.host, (0, 0))[1],
            created_at=r.node_created_at,
            updated_at=r.node_updated_at,
        )
        for r in rows
    ]


# ---- aggregates and zones


def zones(tx: Tx) -> dict[str, str]:
    """The availability zone of each host that is in one; the others are in the default zone."""
    return {r.host: r.value for r in tx.execute(ZONES)}


def aggregates(tx: Tx, *, id: int | None = None, uuid: str | None = None) -> list[Aggregate]:
    """By their number, with hosts and metadata: three queries."""
    query = sa.select(AGGREGATES).order_by(_g.id)
    if id is not None:
        query = query.where(_g.id == id)
    if uuid is not None:
        query = query.where(_g.uuid == uuid)
    rows = tx.execute(query).all()
    ids = [r.id for r in rows]
    hosts: dict[int, list[str]] = {}
    notes: dict[int, dict[str, str]] = {}
    h, m = AGGREGATE_HOSTS.c, AGGREGATE_METADATA.c
    for a, host in tx.execute(sa.select(h.aggregate, h.host).where(h.aggregate.in_(ids)).order_by(h.host)):
        hosts.setdefault(a, []).append(host)
    for a, key, value in tx.execute(sa.select(m.aggregate, m.key, m.value).where(m.aggregate.in_(ids))):
        notes.setdefault(a, {})[key] = value
    return [
        Aggregate(
            id=r.id,
            uuid=r.uuid,
            name=r.name,
            created_at=r.created_at,
            updated_at=r.updated_at,
            hosts=hosts.get(r.id, []),
            metadata=notes.get(r.id, {}),
        )
        for r in rows
    ]


def aggregate(tx: Tx, id: int | str, *, lock: bool = False) -> Aggregate:
    """By its number or UUID; `lock`: nobody else has it so until the transaction ends. Raises NotFound."""
    if lock:
        tx.execute(
            sa.select(_g.id).where(_g.id == id if isinstance(id, int) else _g.uuid == id).with_for_update()
        ).all()
    found = aggregates(tx, id=id) if isinstance(id, int) else aggregates(tx, uuid=id)
    if not found:
        raise NotFound(f"Aggregate {id} could not be found.")
    return found[0]


def create_aggregate(tx: Tx, name: str, *, uuid: str, now: float, availability_zone: str | None = None) -> Aggregate:
    """Raises Conflict when the name is taken."""
    _free_name(tx, name, None)
    tx.execute(sa.insert(AGGREGATES), {"uuid": uuid, "name": name, "created_at": now})
    made = aggregate(tx, uuid)
    if availability_zone is not None:
        _noted(tx, made.id, {ZONE: availability_zone})
    mark(tx)
    return aggregate(tx, made.id)


def rename_aggregate(tx: Tx, id: int, name: str, now: float) -> None:
    """Raises NotFound; Conflict when the name is taken."""
    _free_name(tx, name, id)
    _touched(tx, id, now, name=name)


def delete_aggregate(tx: Tx, id: int) -> None:
    """Raises NotFound; Conflict while hosts are in it."""
    a = aggregate(tx, id)
    if a.hosts:
        raise Conflict(f"Cannot remove aggregate {id}: Host aggregate is not empty")
    tx.execute(sa.delete(AGGREGATE_METADATA).where(AGGREGATE_METADATA.c.aggregate == id))
    tx.execute(sa.delete(AGGREGATES).where(_g.id == id))
    mark(tx)


def add_host(tx: Tx, id: int, host: str, now: float) -> Aggregate:
    """Raises NotFound for either; Conflict when it is in already, or would be in two availability zones."""
    a = aggregate(tx, id)
    if not exists(tx, host):
        raise NotFound(f"Compute host {host} could not be found.")
    if host in a.hosts:
        raise Conflict(f"Aggregate {id} already has host {host}.")
    _one_zone(tx, a.availability_zone, [host], id)
    tx.execute(sa.insert(AGGREGATE_HOSTS), {"aggregate": id, "host": host})
    _touched(tx, id, now)
    _mirrored(tx, a.uuid, host, True, now)
    return aggregate(tx, id)


def remove_host(tx: Tx, id: int, host: str, now: float) -> Aggregate:
    """Raises NotFound for the aggregate, and for a host that is not in it."""
    a = aggregate(tx, id)
    h = AGGREGATE_HOSTS.c
    if not tx.execute(sa.delete(AGGREGATE_HOSTS).where(h.aggregate == id, h.host == host)).rowcount:
        raise NotFound(f"Aggregate {id} has no host {host}.")
    _touched(tx, id, now)
    _mirrored(tx, a.uuid, host, False, now)
    return aggregate(tx, id)


def set_metadata(tx: Tx, id: int, values: Mapping[str, str | None], now: float) -> Aggregate:
    """None takes a key away. Raises NotFound; Conflict when hosts would be in two availability zones."""
    a = aggregate(tx, id)
    if ZONE in values and values[ZONE] is not None:
        _one_zone(tx, values[ZONE], a.hosts, id)
    _noted(tx, id, values)
    _touched(tx, id, now)
    return aggregate(tx, id)


def _one_zone(tx: Tx, zone: str | None, hosts: Iterable[str], but: int) -> None:
    if zone is None:
        return
    for other in aggregates(tx):
        taken = sorted(set(hosts) & set(other.hosts))
        if other.id != but and taken and other.availability_zone not in (None, zone):
            raise Conflict(
                f"One or more hosts already in availability zone(s) ['{other.availability_zone}']",
                why=f"{taken} in aggregate {other.id}",
            )


def _free_name(tx: Tx, name: str, but: int | None) -> None:
    if tx.execute(sa.select(_g.id).where(_g.name == name, _g.id != (but or 0))).first():
        raise Conflict(f"Aggregate {name} already exists.")


def _noted(tx: Tx, id: int, values: Mapping[str, str | None]) -> None:
    m = AGGREGATE_METADATA.c
    for key, value in values.items():
        tx.execute(sa.delete(AGGREGATE_METADATA).where(m.aggregate == id, m.key == key))
        if value is not None:
            tx.execute(sa.insert(AGGREGATE_METADATA), {"aggregate": id, "key": key, "value": value})


def _touched(tx: Tx, id: int, now: float, **values: Any) -> None:
    if not tx.execute(sa.update(AGGREGATES).where(_g.id == id).values(updated_at=now, **values)).rowcount:
        raise NotFound(f"Aggregate {id} could not be found.")
    mark(tx)


def _mirrored(tx: Tx, aggregate: str, host: str, there: bool, now: float) -> None:
    """The same group in Placement's words."""
    t = placement.PROVIDER_AGGREGATES.c
    for uuid in tx.execute(sa.select(NODES.c.uuid).where(NODES.c.host == host)).scalars().all():
        tx.execute(sa.delete(placement.PROVIDER_AGGREGATES).where(t.provider == uuid, t.aggregate == aggregate))
        if there:
            tx.execute(sa.insert(placement.PROVIDER_AGGREGATES), {"provider": uuid, "aggregate": aggregate})
        tx.execute(placement.MOVED, {"at": uuid, "now": now})


# ---- for who keeps copies


def mark(tx: Tx) -> None:
    """Hosts, services or aggregates are not what they were: who keeps a copy reads it again."""
    if not tx.execute(MARK).rowcount:
        try:
            with tx.begin_nested():
                tx.execute(sa.insert(MARKS), {"name": "hosts", "n": 1})
        except sa.exc.IntegrityError:  # the first time, and another was first
            tx.execute(MARK)


def marked(tx: Tx) -> int:
    """Moves with every change but those of `last_seen` and of claims."""
    return tx.execute(MARKED).scalar() or 0


def _service(r: Any) -> Service:
    m = r._mapping
    values = {f: m[f] for f in Service.__struct_fields__ if f != "speaks"}
    return Service(**values, speaks=_NAMES.decode(m["speaks"]))


def facts_of(row: Any) -> HostFacts:
    """Of a row of `NODES`."""
    return _FACTS.decode(row.facts)


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


_FACTS = msgspec.json.Decoder(HostFacts)
_NAMES = msgspec.json.Decoder(list[str])
_KIND = msgspec.json.Decoder(_Kind)
_s, _g, _b = SERVICES.c, AGGREGATES.c, sa.bindparam

NODE = sa.select(
    SERVICES,
    NODES.c.id.label("node_id"),
    NODES.c.uuid.label("node_uuid"),
    NODES.c.node,
    NODES.c.host_ip,
    NODES.c.facts,
    NODES.c.created_at.label("node_created_at"),
    NODES.c.updated_at.label("node_updated_at"),
).join(SERVICES, sa.and_(_s.host == NODES.c.host, _s.binary == COMPUTE))
SERVICE_OF = ready(sa.select(SERVICES).where(_s.host == _b("the_host"), _s.binary == _b("the_binary")))
_compute = (_s.host == _b("the_host")) & (_s.binary == COMPUTE)
TOLD = ready(
    sa.update(SERVICES)
    .where(_s.id == _b("the_id"))
    .values({name: _b(name) for name in ("born", "version", "speaks", "last_seen")})
)
# One identity a name: who comes first is the one.
NAMED = ready(
    sa.update(SERVICES)
    .where(_s.id == _b("the_id"), sa.or_(_s.identity == "", _s.identity == _b("ours")))
    .values(identity=_b("ours"))
)
_p = placement.PROVIDERS.c
DEVICES_OF = ready(
    sa.select(_p.name, _p.uuid).where(_p.root == sa.bindparam("the_node"), _p.parent == sa.bindparam("the_node"))
)
NODE_OF = ready(sa.select(NODES).where(NODES.c.host == _b("the_host"), NODES.c.node == _b("the_node")))
FACTS = ready(
    sa.update(NODES)
    .where(NODES.c.id == _b("the_id"))
    .values({name: _b(name) for name in ("host_ip", "facts", "updated_at")})
)
PAGES = Shapes()
ALL_HEARD = ready(sa.select(_s.host, _s.last_seen, _s.forced_down).where(_s.binary == sa.bindparam("compute", COMPUTE)))
HEARD = ready(sa.select(_s.last_seen, _s.forced_down, _s.born).where(_compute))
SPEECH = ready(
    sa.select(_s.speaks, NODES.c.facts)
    .select_from(SERVICES.join(NODES, NODES.c.host == _s.host))
    .where(_s.host == _b("the_host"), _s.binary == COMPUTE)
    .limit(1)
)
WRITTEN = Among(
    lambda some: (
        sa.select(NODES.c.host, sa.func.max(sa.func.coalesce(NODES.c.updated_at, NODES.c.created_at)).label("at"))
        .where(NODES.c.host.in_(some))
        .group_by(NODES.c.host)
    )
)
SEEN = Among(lambda some: sa.update(SERVICES).where(_s.host.in_(some), _s.binary == COMPUTE).values(last_seen=_b("at")))
SUCCEEDED = ready(sa.update(SERVICES).where(_compute, _s.failures > 0).values(failures=0))
BEAT = ready(
    sa.update(SERVICES)
    .where(_s.host == _b("the_host"), _s.binary == _b("the_binary"))
    .values(last_seen=_b("now"), born=_b("born"), version=_b("version"))
)
ZONES = ready(
    sa.select(AGGREGATE_HOSTS.c.host, AGGREGATE_METADATA.c.value)
    .join(AGGREGATE_METADATA, AGGREGATE_METADATA.c.aggregate == AGGREGATE_HOSTS.c.aggregate)
    .where(AGGREGATE_METADATA.c.key == ZONE)
)
MARK = ready(sa.update(MARKS).where(MARKS.c.name == "hosts").values(n=MARKS.c.n + 1))
MARKED = ready(sa.select(MARKS.c.n).where(MARKS.c.name == "hosts"))
