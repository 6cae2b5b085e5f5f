"""What must be equal and is kept in two places: servers, runs, claims. Questions only; who asks mends.

Each is one query, and finds nothing in a healthy cloud.
"""

from collections.abc import Collection, Iterable
from typing import Any

import sqlalchemy as sa

from kilonova.kit.db import Tx
from kilonova.kit.ready import Among, each, ready
from kilonova.kit.workflow import RUNS
from kilonova.model.devices import Device
from kilonova.model.server import Server
from kilonova.model.states import VM
from kilonova.store import hosts, migrations, placement, servers
from kilonova.store import shares as sharing
from kilonova.store.migrations import Kind, Migration, Status


def on_host(tx: Tx, host: str) -> dict[str, Any]:
    """The servers that are on this host, by id: rows of (id, vm_state, task_state, power_state, generation, epoch, updated_at)."""
    return on_hosts(tx, [host])[host]


def on_hosts(tx: Tx, hosts: Collection[str]) -> dict[str, dict[str, Any]]:
    """The same of each of these hosts."""
    all: dict[str, dict[str, Any]] = {host: {} for host in hosts}
    for r in tx.execute(*ON_HOSTS(all)) if all else ():
        all[r.host][r.id] = r
    return all


def found(tx: Tx, ids: Iterable[str]) -> dict[str, Any]:
    """The same of these servers, wherever they are; also `host`, `deleted_at`."""
    wanted = list(ids)
    return {r.id: r for r in tx.execute(*FOUND(wanted))} if wanted else {}


def moved_away(tx: Tx, host: str, epochs: dict[str, int]) -> set[str]:
    """Those of these machines that a host has of a time before their server went to another host."""
    rows = found(tx, epochs)
    return {
        id for id, r in rows.items() if r.deleted_at is None and r.host not in (None, host) and r.epoch > epochs[id]
    }


def at_work(tx: Tx, subjects: Iterable[str]) -> set[str]:
    """Those of them that a run is at. Who wants to know what they have as well asks this first: a run that ends in between has written it."""
    wanted = list(subjects)
    if not wanted:
        return set()
    return set(tx.execute(*AT_WORK(wanted)).scalars())


def resting(tx: Tx, vm: VM, most: int = 100) -> list[Server]:
    """Living servers in this state that nobody is at work on, those first that have been so the longest."""
    return [servers.of(row) for row in tx.execute(RESTING, {"the_state": str(vm), "most": most})]


def running(tx: Tx, runs: Iterable[str]) -> set[str]:
    """Those of these runs that have not ended."""
    return set(tx.execute(sa.select(_r.id).where(_r.id.in_(list(runs)), _r.state == "running")).scalars())


def stuck(tx: Tx, before: float, most: int = 100) -> list[str]:
    """Servers that have been on their way since `before`, with nobody working on them: there must be none."""
    return list(tx.execute(STUCK, {"before": before, "most": most}).scalars())


def unowned(tx: Tx, most: int = 100) -> list[tuple[str, str]]:
    """(consumer, provider) of claims for servers that are dead, or elsewhere, and that no run is at; and of moves that are over."""
    return [(r.consumer, r.root) for q in (UNOWNED, OVER) for r in tx.execute(q, {"most": most})]


def unclaimed(tx: Tx, most: int = 100) -> list[tuple[str, str]]:
    """(server, provider) of servers that are on a host and hold nothing of it, and that no run is at."""
    return [(r.id, r.uuid) for r in tx.execute(UNCLAIMED, {"most": most})]


def miscounted(tx: Tx, most: int = 100) -> list[tuple[str, str, int, int]]:
    """(provider, class, used, held) where the count is not the sum of what is allocated."""
    return [tuple(r) for r in tx.execute(MISCOUNTED, {"most": most})]


def claimed(tx: Tx, ids: Iterable[str]) -> dict[str, dict[str, dict[str, int]]]:
    """What these consumers hold: {consumer: {host: {class: amount}}}; of what is no host of ours by its id.

    What is under a host is the host's; what others share with it, too, where the consumer holds something of one host only.
    """
    query = sa.select(_a.consumer, _n.host, _p.root, placement.PROVIDER_SHARES, _a.resource_class, _a.amount)
    query = query.join(placement.PROVIDERS, _p.uuid == _a.provider).outerjoin(hosts.NODES, _n.uuid == _p.root)
    rows = tx.execute(query.where(_a.consumer.in_(list(ids)))).all()
    at: dict[str, set[str]] = {}
    for consumer, host, root, shares, *_ in rows:
        if not shares:
            at.setdefault(consumer, set()).add(host or root)
    found: dict[str, dict[str, dict[str, int]]] = {}
    for consumer, host, root, shares, name, amount in rows:
        home = next(iter(at.get(consumer, ()))) if shares and len(at.get(consumer, ())) == 1 else host or root
        held = found.setdefault(consumer, {}).setdefault(home, {})
        held[name] = held.get(name, 0) + amount
    return found


def since(tx: Tx, subjects: Iterable[str], at: float) -> set[str]:
    """Those of them that a run was at since that moment, or is."""
    mine = _r.subject.in_(list(subjects)), sa.or_(_r.state == "running", _r.finished > at)
    return set(tx.execute(sa.select(_r.subject).where(*mine)).scalars())


def overdue(tx: Tx, before: float, most: int = 100) -> list[Any]:
    """Runs that somebody should have looked at long ago: rows of (id, workflow, subject, due)."""
    late = _r.state == "running", _r.due < before, _r.lease < before, _r.started < before
    return list(tx.execute(sa.select(_r.id, _r.workflow, _r.subject, _r.due).where(*late).limit(most)))


def left_under_way(tx: Tx, before: float, most: int = 100) -> list[Migration]:
    """Moves that are neither over nor wait for a word, and that no run is at."""
    over = [str(s) for s in (*migrations.OVER, Status.finished, Status.done)]
    open_ = _m.status.not_in(over), sa.func.coalesce(_m.updated_at, _m.created_at) < before
    busy = sa.exists().where(_r.subject == _m.server, _r.state == "running")
    return [migrations.of(r) for r in tx.execute(migrations.SELECT.where(*open_, ~busy).limit(most))]


def undecided(tx: Tx, before: float, most: int = 100) -> list[Migration]:
    """Resizes that have waited for a word since that moment."""
    return [migrations.of(r) for r in tx.execute(UNDECIDED, {"before": before, "most": most})]


def abandoned(tx: Tx, most: int = 100) -> list[Migration]:
    """Resizes that wait for a word, and whose server is neither that which they left nor in error."""
    return [migrations.of(r) for r in tx.execute(ABANDONED, {"most": most})]


def lately_moved(tx: Tx, since: float) -> set[str]:
    """Servers that were moved while they ran, or nearly."""
    live = _m.type == str(Kind.live), sa.func.coalesce(_m.updated_at, _m.created_at) >= since
    return set(tx.execute(sa.select(_m.server).where(*live)).scalars())


def plugs(tx: Tx, ids: Iterable[str]) -> dict[str, set[str]]:
    """The ports of those of these servers that live."""
    wanted = list(ids)
    found = tx.execute(*PLUGS(wanted)) if wanted else ()
    return {id: {p.port_id for p in servers.PLUGS.decode(text)} for id, text in found}


def volumes(tx: Tx, ids: Iterable[str]) -> dict[str, set[str]]:
    """The same of their volumes, also of those on their way."""
    wanted = list(ids)
    rows = tx.execute(*DEVICES(wanted)) if wanted else ()
    found = {id: servers.DEVICES.decode(text or "[]") for id, text in rows}
    return {id: {d.volume_id for d in devices if d.volume_id} for id, devices in found.items()}


def shares(tx: Tx, ids: Iterable[str], *, settled: bool = False) -> dict[str, set[str]]:
    """The same of their shared file systems; `settled`: only of those that neither come nor go."""
    found: dict[str, set[str]] = {id: set() for id in ids}
    if found:
        for server, share in tx.execute(*(SETTLED_SHARES if settled else SHARES)(found)):
            found[server].add(share)
    return found


def at_rest(tx: Tx, ids: Iterable[str]) -> dict[str, Server]:
    """Those of these servers that live and that nobody is at work on: asked at once, for a run may end between two questions."""
    wanted = list(ids)
    rows = tx.execute(*AT_REST(wanted)) if wanted else ()
    return {s.id: s for s in map(servers.of, rows)}


def settled(tx: Tx, ids: Iterable[str]) -> dict[str, list[Device]]:
    """Devices with volumes that neither come nor go, of those of these servers whose machines are whole."""
    wanted = list(ids)
    rows = tx.execute(*SETTLED(wanted)) if wanted else ()
    found = {r.id: servers.DEVICES.decode(r.devices or "[]") for r in rows}
    return {id: [d for d in devices if d.volume_id and d.attachment_id and not d.busy] for id, devices in found.items()}


HOLD = [str(s) for s in (Status.finished, Status.done)]
_m = migrations.T.c
_t, _r, _a, _n, _b = servers.T.c, RUNS.c, placement.ALLOCATIONS.c, hosts.NODES.c, sa.bindparam
_columns = _t.id, _t.vm_state, _t.task_state, _t.power_state, _t.generation, _t.epoch, _t.updated_at
_busy = sa.exists().where(_r.subject == _t.id, _r.state == "running")

ON_HOSTS = Among(lambda some: sa.select(*_columns, _t.host).where(_t.host.in_(some), _t.deleted_at.is_(None)))
FOUND = Among(lambda some: sa.select(*_columns, _t.host, _t.deleted_at).where(_t.id.in_(some)))
AT_WORK = Among(lambda some: sa.select(_r.subject).where(_r.subject.in_(some), _r.state == "running"))
AT_REST = Among(lambda some: servers.SELECT.where(_t.id.in_(some), _t.deleted_at.is_(None), ~_busy))
PLUGS = Among(lambda some: sa.select(_t.id, _t.plugs).where(_t.id.in_(some), _t.deleted_at.is_(None)))
DEVICES = Among(lambda some: sa.select(_t.id, _t.devices).where(_t.id.in_(some), _t.deleted_at.is_(None)))
_f = sharing.T.c
SHARES = Among(lambda some: sa.select(_f.server, _f.share_id).where(_f.server.in_(some), _f.busy != _b("but", "error")))
SETTLED_SHARES = Among(
    lambda some: sa.select(_f.server, _f.share_id).where(_f.server.in_(some), _f.busy == _b("busy", ""))
)
_whole = each([VM.active, VM.stopped, VM.paused, VM.resized])
SETTLED = Among(
    lambda some: sa.select(_t.id, _t.devices).where(
        _t.id.in_(some), _t.deleted_at.is_(None), _t.vm_state.in_(_whole), _t.task_state.is_(None)
    )
)
RESTING = ready(
    servers.SELECT.where(_t.deleted_at.is_(None), _t.vm_state == _b("the_state"), _t.task_state.is_(None))
    .order_by(_t.updated_at)
    .limit(_b("most", type_=sa.Integer))
)
_waiting = migrations.SELECT.join(servers.T, _t.id == _m.server).where(
    _m.status == str(Status.finished), _t.deleted_at.is_(None)
)
UNDECIDED = ready(
    _waiting.where(_m.updated_at < _b("before"), _t.vm_state == str(VM.resized), ~_busy).limit(
        _b("most", type_=sa.Integer)
    )
)
ABANDONED = ready(
    _waiting.where(_t.vm_state != str(VM.resized), _t.vm_state != str(VM.error), _t.task_state.is_(None)).limit(
        _b("most", type_=sa.Integer)
    )
)
STUCK = ready(
    sa.select(_t.id)
    .where(
        _t.deleted_at.is_(None),
        sa.or_(_t.task_state.is_not(None), _t.vm_state == str(VM.building)),
        sa.func.coalesce(_t.updated_at, _t.created_at) < _b("before"),
        ~_busy,
    )
    .limit(_b("most"))
)
_held = (
    sa.select(_a.provider, _a.resource_class, sa.func.sum(_a.amount).label("held"))
    .group_by(_a.provider, _a.resource_class)
    .subquery()
)
_i = placement.INVENTORIES.c
_sum = sa.cast(sa.func.coalesce(_held.c.held, 0), sa.BigInteger)
MISCOUNTED = (
    sa.select(_i.provider, _i.resource_class, _i.used, _sum)
    .outerjoin(_held, sa.and_(_held.c.provider == _i.provider, _held.c.resource_class == _i.resource_class))
    .where(_i.used != _sum)
    .limit(_b("most"))
)
# Other services' consumers are theirs to care for.
_instances = placement.CONSUMERS.c.type == "INSTANCE"
_p = placement.PROVIDERS.c  # what is held of a provider under a host's is held of that host
UNOWNED = ready(
    sa.select(_a.consumer, _p.root)
    .join(placement.CONSUMERS, placement.CONSUMERS.c.uuid == _a.consumer)
    .join(placement.PROVIDERS, _p.uuid == _a.provider)
    .outerjoin(_n.uuid.table, _n.uuid == _p.root)
    .outerjoin(servers.T, sa.and_(_t.id == _a.consumer, _t.deleted_at.is_(None)))
    .where(
        _instances,
        # What others share with its host is of no host, or of another.
        sa.or_(_t.id.is_(None), _t.host.is_(None), sa.and_(_t.host != _n.host, ~placement.PROVIDER_SHARES)),
        ~sa.exists().where(_r.subject == _a.consumer, _r.state == "running"),
    )
    .distinct()
    .limit(_b("most"))
)
# A migration holds something of its source only while its user may decide, or that host must hear of an evacuation.
OVER = (
    sa.select(_a.consumer, _p.root)
    .join(placement.CONSUMERS, placement.CONSUMERS.c.uuid == _a.consumer)
    .join(placement.PROVIDERS, _p.uuid == _a.provider)
    .outerjoin(migrations.T, _m.uuid == _a.consumer)
    .where(
        placement.CONSUMERS.c.type == "MIGRATION",
        sa.or_(_m.uuid.is_(None), _m.status.not_in(HOLD)),
        ~sa.exists().where(_r.subject == _m.server, _r.state == "running"),
    )
    .distinct()
    .limit(_b("most"))
)
UNCLAIMED = ready(
    sa.select(_t.id, _n.uuid)
    .join(_n.uuid.table, sa.and_(_n.host == _t.host, _n.node == _t.node))
    .where(
        _t.deleted_at.is_(None),
        ~sa.exists().where(
            _a.consumer == _t.id, _p.uuid == _a.provider, sa.or_(_p.root == _n.uuid, placement.PROVIDER_SHARES)
        ),
        ~_busy,
    )
    .limit(_b("most"))
)
