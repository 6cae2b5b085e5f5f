"""What must be true of any cloud at rest, in one list: claims, machines, ports and runs are as the servers say.

Tests ask it after every story, the simulator after every storm, and an operator may ask it of a living cloud.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.clients.share import OURS, REASON
from kilonova.clients.volume import MADE_FOR, MADE_OF
from kilonova.companions.volume.attachments import follows
from kilonova.kit.db import Db, Tx
from kilonova.kit.journal import RUNS, STEPS, fault_of
from kilonova.model import numa
from kilonova.model.ask import amounts_of
from kilonova.model.capture import MARK, SHELVED_IMAGE
from kilonova.model.seat import Seat, rooms
from kilonova.model.server import Server
from kilonova.model.server_group import admits
from kilonova.model.states import VM
from kilonova.store import (
    block_devices,
    filesystems,
    hosts,
    images,
    migrations,
    networks,
    placement,
    seats,
    server_groups,
    servers,
    shares,
    volumes,
)
from kilonova.store.migrations import OVER, Status

RESTING = {
    VM.active,
    VM.stopped,
    VM.paused,
    VM.suspended,
    VM.error,
    VM.deleted,
    VM.rescued,
    VM.resized,
    VM.soft_deleted,
    VM.shelved,
    VM.shelved_offloaded,
}
POWER = {"nostate": 0, "running": 1, "paused": 3, "shutdown": 4, "crashed": 6, "suspended": 7}


def wrong(
    db: Db,
    holds: Mapping[str, Mapping[str, tuple[str, int]]],
    ports: Iterable[tuple[str, str, str]] | None = None,
    copies: Mapping[str, Iterable[tuple[str, str]]] | None = None,
    nics: Mapping[str, Mapping[str, list[str]]] | None = None,
    disks: Mapping[str, Mapping[str, list[str]]] | None = None,
    sat: Mapping[str, Mapping[str, Seat | None]] | None = None,
    trees: Mapping[str, Mapping[str, list[str]]] | None = None,
) -> list[str]:
    """What is not as it must be, in words; nothing: all is well.

    `holds`: of each host that works, what it has: {server: (power, epoch)}.  `ports`: (id, device, host) of all ports
    that belong to servers; None: they are looked up in our own network service.  `copies`: of each host that works, the
    (server, image) of disks that were copied for images and are still there: there must be none.  `nics`: of each host,
    the ports that its machines are plugged into; `disks`: the volumes that are disks of them; `sat`: where they sit; `trees`: the
    shared file systems that they have.
    """
    with db.read() as tx:
        all = [servers.of(r) for r in tx.execute(servers.SELECT)]
        said = _runs(tx)
        said += _claims(tx, all)
        said += _seats(tx, all, sat or {})
        said += _machines(all, holds, undecided(tx))
        said += _moves(tx, all)
        said += [f"port {b.port_id} could still come to {b.host}" for b in networks.find(tx, networks.Binding)]
        said += _nics(all, nics or {})
        said += _ports(all, _our_ports(tx) if ports is None else ports)
        said += _groups(tx, all)
        said += _images(tx, all)
        said += [line for s in all for line in _resting(tx, s)]
        said += _storage(tx)
        said += _devices(tx, all, disks or {})
        said += _shares(tx, all, trees or {})
    return said + [f"{h} has a copy of {s} for image {i}" for h, c in (copies or {}).items() for s, i in c]


def _runs(tx: Tx) -> list[str]:
    runs = tx.execute(sa.select(RUNS)).all()
    said = [f"run {r.workflow} of {r.subject} is {r.state}: {r.fault}" for r in runs if r.state in ("running", "stuck")]
    ended = sa.select(STEPS.c.step, STEPS.c.run).join(RUNS, RUNS.c.id == STEPS.c.run)
    loose = tx.execute(ended.where(STEPS.c.finished.is_(None), RUNS.c.state.in_(["done", "failed"]))).all()
    return said + [f"step {s.step} of run {s.run} never ended" for s in loose]


def _claims(tx: Tx, all: list[Server]) -> list[str]:
    said = []
    of = {n.uuid: n.host for n in tx.execute(sa.select(hosts.NODES))}
    p = placement.PROVIDERS.c
    of |= {uuid: of[root] for uuid, root in tx.execute(sa.select(p.uuid, p.root)) if root in of}
    sums: dict[tuple[str, str], int] = defaultdict(int)
    held: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    rows = tx.execute(sa.select(placement.ALLOCATIONS)).all()
    homes = _homes(tx, rows, of)
    for a in rows:
        sums[a.provider, a.resource_class] += a.amount
        of_host = held[a.consumer][homes.get((a.consumer, a.provider)) or of.get(a.provider, a.provider)]
        of_host[a.resource_class] = of_host.get(a.resource_class, 0) + a.amount
    for i in tx.execute(sa.select(placement.INVENTORIES)):
        have = sums.pop((i.provider, i.resource_class), 0)
        if i.used != have:
            said.append(f"{of.get(i.provider)}: {i.used} {i.resource_class} used, {have} claimed")
        # What gives out nothing any longer (its host's disks lie in a pool by now) keeps what was claimed of it before.
        if i.reserved < i.total and have > (i.total - i.reserved) * i.allocation_ratio:
            said.append(f"{of.get(i.provider)}: {have} {i.resource_class} claimed of {i.total}")
    said += [f"{n} {name} claimed of {provider}, which has none" for (provider, name), n in sums.items()]
    for s in all:
        expect = {s.host: amounts_of(s)} if s.host and s.deleted_at is None else {}
        found = {h: dict(c) for h, c in held.pop(s.id, {}).items()}
        if found != expect:
            said.append(f"{s.id} ({s.vm_state}) on {s.host} holds {found}")
    known = {s.id: s for s in all}
    for m in undecided(tx):
        found = {h: dict(c) for h, c in held.pop(m.uuid, {}).items()}
        s = known[m.server]
        if m.old_flavor is None or found != {m.source: amounts_of(msgspec.structs.replace(s, flavor=m.old_flavor))}:
            said.append(f"the {m.type} of {m.server} from {m.source} holds {found}")
    return said + [f"{consumer} is no server and holds {dict(h)}" for consumer, h in held.items()]


def _homes(tx: Tx, held: Iterable[Any], of: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """The host for which a consumer holds something of a pool: the one of which it holds the rest, if the pool shares with that."""
    shares: dict[str, set[str]] = defaultdict(set)
    for pool, provider in placement.shared(tx):
        if provider in of:
            shares[pool].add(of[provider])
    at: dict[str, set[str]] = defaultdict(set)
    for a in held:
        if a.provider not in shares:
            at[a.consumer].add(of.get(a.provider, a.provider))
    return {
        (a.consumer, a.provider): next(iter(mine))
        for a in held
        if len(mine := at[a.consumer] & shares.get(a.provider, set())) == 1
    }


def _seats(tx: Tx, all: list[Server], machines: Mapping[str, Mapping[str, Seat | None]]) -> list[str]:
    """No two sit on one CPU, one page or one device; who wants a seat has one, where its claim is, and nobody else."""
    said = []
    facts = {n.uuid: hosts.facts_of(n) for n in tx.execute(sa.select(hosts.NODES))}
    holds = {(a.consumer, a.provider) for a in tx.execute(sa.select(placement.ALLOCATIONS))}
    sat = seats.of_providers(tx)
    for provider, there in sat.items():
        cpus = Counter(cpu for s in there.values() for cpu in s.cpus)
        cpus.update(s for s in facts[provider].shared if s in cpus)
        things = Counter((t.provider, t.address) for s in there.values() for t in s.devices if t.kind == "pci")
        said += [f"{n} are on CPU {cpu} of {facts[provider].hypervisor_hostname}" for cpu, n in cpus.items() if n > 1]
        said += [f"{n} have {at} of {facts[provider].hypervisor_hostname}" for at, n in things.items() if n > 1]
        for room in rooms(facts[provider], there.values()):
            said += [
                f"{-n} pages of {kb} KiB too many are taken of {provider}" for kb, n in room.pages.items() if n < 0
            ]
        said += [f"{c} sits on {provider} and holds nothing of it" for c in there if (c, provider) not in holds]
    seated = {c: seat for there in sat.values() for c, seat in there.items()}
    for s in all:
        here = machines.get(s.host or "", {})
        if s.deleted_at is None and s.id in here and s.vm_state != VM.error and here[s.id] != seated.get(s.id):
            said.append(f"{s.id} ({s.vm_state}) sits as {here[s.id]} on {s.host}, written is {seated.get(s.id)}")
    for s in all:
        guest = numa.guest(s.flavor.extra_specs, s.image.properties, s.flavor.vcpus, s.flavor.memory_mb)
        wants_one = bool(s.host and s.deleted_at is None and (guest or s.flavor.aliases))
        if wants_one and s.id not in seated:
            said.append(f"{s.id} ({s.vm_state}) on {s.host} has no seat")
        if s.id in seated and not (s.host and s.deleted_at is None):
            said.append(f"{s.id} ({s.vm_state}) sits somewhere")
    return said


def undecided(tx: Tx) -> list[migrations.Migration]:
    """The moves that hold something of the host that they came from, at rest."""
    holding = [str(s) for s in (Status.finished, Status.done)]
    return [migrations.of(r) for r in tx.execute(migrations.SELECT.where(migrations.T.c.status.in_(holding)))]


def _moves(tx: Tx, all: list[Server]) -> list[str]:
    said = []
    of = {s.id: s for s in all}
    waiting = {m.server for m in undecided(tx) if m.status == Status.finished}
    said += [
        f"{s.id} is resized, and nothing is to be decided"
        for s in all
        if s.vm_state == VM.resized and s.id not in waiting
    ]
    for m in map(migrations.of, tx.execute(migrations.SELECT)):
        if m.status not in OVER and m.status != Status.finished:
            said.append(f"the {m.type} of {m.server} rests as {m.status}")
        if m.status == Status.finished and of[m.server].vm_state not in (VM.resized, VM.error):
            said.append(f"the {m.type} of {m.server}, which is {of[m.server].vm_state}, waits for a word")
    return said


def _machines(
    all: list[Server], holds: Mapping[str, Mapping[str, tuple[str, int]]], moves: list[migrations.Migration]
) -> list[str]:
    said = []
    here = {h: dict(machines) for h, machines in holds.items()}
    for m in moves:  # what is kept until its user decides
        lies = here.get(m.source or "")
        if m.status != Status.finished or lies is None:
            continue
        names = [n for n in (m.server, f"{m.server}.kept") if lies.get(n) == ("shutdown", m.source_epoch)]
        if not names:
            said.append(f"nothing is kept of {m.server} on {m.source}")
        for name in names:
            del lies[name]
    at: dict[str, dict[str, tuple[str, int]]] = defaultdict(dict)
    for host, machines in here.items():
        for id, how in machines.items():
            at[id][host] = how
    for s in all:
        found = at.pop(s.id, {})
        wanted = {s.host} if s.host in holds and s.deleted_at is None else set()
        if set(found) != wanted and not (s.vm_state == VM.error and not found):
            said.append(f"{s.id} ({s.vm_state}) on {s.host} has machines on {sorted(found)}")
        for host, (power, epoch) in found.items():
            if host in wanted and POWER[power] != s.power_state and s.vm_state != VM.error:
                said.append(f"{s.id} ({s.vm_state}) is {power} on {host}, written is {s.power_state}")
            if host in wanted and epoch != s.epoch:
                said.append(f"{s.id} on {host} is of epoch {epoch}, written is {s.epoch}")
    return said + [f"{id} is no server and has machines on {sorted(found)}" for id, found in at.items()]


def _groups(tx: Tx, all: list[Server]) -> list[str]:
    """Strict server groups are kept, and whoever is a member is so of a group that there is."""
    said = []
    known = {g.id: g for g in server_groups.page(tx, None, limit=10**6)}
    at: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for s in all:
        if s.group_id is not None and s.deleted_at is None:
            if s.group_id not in known:
                said.append(f"{s.id} is a member of {s.group_id}, which is no group")
            elif s.host is not None:
                at[s.group_id][s.host] += 1
    moved = set(tx.execute(sa.select(migrations.T.c.server)).scalars())
    strayed = {
        s.group_id for s in all if s.id in moved
    }  # who was put back does not ask where the others went meanwhile
    for id, hosts_ in at.items():
        g, total = known[id], sum(hosts_.values())
        if g.policy == "affinity" and id in strayed:
            continue
        if not _all_admitted(g.policy, g.max_per_host or 1, hosts_, total):
            said.append(f"{g.policy} group {id} has {dict(hosts_)}")
    return said


def _all_admitted(policy: str, most: int, at: Mapping[str, int], total: int) -> bool:
    """Had each been the last to come, would it have been let in?"""
    return all(admits(policy, most, n - 1, total - n) for n in at.values())


def _nics(all: list[Server], nics: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """In a machine are the NICs that its server shows, and no others."""
    said = []
    for s in all:
        has, shows = nics.get(s.host or "", {}).get(s.id), [p.port_id for p in s.plugs]
        if has is not None and s.deleted_at is None and sorted(has) != sorted(shows):
            said.append(f"{s.id} ({s.vm_state}) is plugged into {has} on {s.host}, written are {shows}")
    return said


def _our_ports(tx: Tx) -> list[tuple[str, str, str]]:
    p = networks.Port
    return [
        (x.id, x.device_id, x.binding_host_id)
        for x in networks.find(tx, p)
        if x.device_id and x.device_owner.startswith("compute:")
    ]


def _ports(all: list[Server], ports: Iterable[tuple[str, str, str]]) -> list[str]:
    said = []
    of: dict[str, dict[str, str]] = defaultdict(dict)
    for id, device, host in ports:
        of[device][id] = host
    for s in all:
        kept = s.deleted_at is None and (s.host or s.vm_state == VM.shelved_offloaded)
        wanted = {p.port_id: s.host or "" for p in s.plugs} if kept else {}
        if (found := of.pop(s.id, {})) != wanted:
            said.append(f"{s.id} ({s.vm_state}) on {s.host} has ports {found}, written are {wanted}")
    return said + [f"{device} is no server and has ports {sorted(found)}" for device, found in of.items()]


def _images(tx: Tx, all: list[Server]) -> list[str]:
    """An image of ours has its bytes, or its run is at it; what a failed run made is gone; a shelved server's is there."""
    said = []
    runs = {r.id: r for r in tx.execute(sa.select(RUNS.c.id, RUNS.c.workflow, RUNS.c.state))}
    shelved = {
        s.system_metadata[SHELVED_IMAGE]: s for s in all if SHELVED_IMAGE in s.system_metadata and not s.deleted_at
    }
    i, p = images.IMAGES.c, images.PROPERTIES.c
    known = {r.id: r.status for r in tx.execute(sa.select(i.id, i.status))}
    for id, run in tx.execute(sa.select(p.image_id, p.value).where(p.name == MARK)):
        r = runs.get(run)
        if known[id] != "active" and (r is None or r.state != "running"):
            said.append(f"image {id} is {known[id]}, and nobody brings its bytes")
        elif r is not None and r.state == "failed":
            said.append(f"image {id} is {known[id]}, and its run {r.workflow} failed")
        elif r is not None and r.workflow == "shelve" and id not in shelved:
            said.append(f"image {id} is of no shelved server")
    for id, s in shelved.items():
        if known.get(id) != "active" or s.vm_state not in (VM.shelved, VM.shelved_offloaded):
            said.append(f"{s.id} ({s.vm_state}) was shelved as image {id}, which is {known.get(id)}")
    return said


def _resting(tx: Tx, s: Server) -> list[str]:
    said = []
    if s.task_state is not None or s.vm_state not in RESTING:
        said.append(f"{s.id} rests as {s.vm_state}, {s.task_state}")
    if s.vm_state == VM.error and (s.fault_run is None or fault_of(tx, s.fault_run) is None):
        said.append(f"{s.id} is in error, and nobody says why")
    if (s.vm_state == VM.deleted) != (s.deleted_at is not None):
        said.append(f"{s.id} is {s.vm_state}, deleted at {s.deleted_at}")
    return said


def _storage(tx: Tx) -> list[str]:
    """Nothing is promised any more, and each volume is as its attachments say."""
    said = [f"{a.kind} of {a.subject} was promised and is not done" for a in volumes.find(tx, volumes.Act)]
    all = volumes.find(tx, volumes.Volume)
    attached = volumes.attachments_of(tx, [v.id for v in all])
    for v in all:
        wanted = follows(attached.get(v.id, []))
        if v.status != wanted and not v.status.startswith("error"):
            said.append(f"volume {v.id} is {v.status}, and its attachments say {wanted}")
    known = {v.id for v in all}
    return said + [f"volume {id} is gone and has attachments" for id in attached if id not in known]


def _devices(tx: Tx, all: list[Server], disks: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """Each attachment is a device of a living server, and the other way round; and what machines have are those."""
    said = [f"volume device {p.device} of {p.server} is promised back, and was not" for p in block_devices.promised(tx)]
    made = [v.id for v in volumes.find(tx, volumes.Volume) if MADE_FOR in v.metadata]
    said += [f"volume {id} was made for a device that nobody came to have" for id in made]
    taken = [s.id for s in volumes.find(tx, volumes.Snapshot) if MADE_OF in s.metadata]
    said += [f"snapshot {id} was taken for an image that nobody came to have" for id in taken]
    there: dict[str, dict[str, volumes.Attachment]] = defaultdict(dict)
    for a in volumes.find(tx, volumes.Attachment):
        there[a.server_id or ""][a.id] = a
    for s in all:
        mine, alive = [d for d in s.devices if d.is_volume], s.deleted_at is None
        # Of a server on no host both are right: it came with it (reserved), or was attached there (in use).
        legal = ("attached",) if s.host else ("reserved", "attached")
        found = {
            a.volume_id: (a.id, "as it should" if a.status in legal else a.status, a.host)
            for a in there.pop(s.id, {}).values()
        }
        wanted = {d.volume_id: (d.attachment_id, "as it should", s.host) for d in mine if alive and d.attachment_id}
        if found != wanted:
            said.append(f"{s.id} ({s.vm_state}) has attachments {found}, written are {wanted}")
        said += [f"device {d.uuid} of {s.id} is {d.busy}" for d in mine if d.busy]
        has = disks.get(s.host or "", {}).get(s.id)
        if has is not None and alive and sorted(has) != sorted(d.volume_id or "" for d in mine):
            said.append(f"{s.id} ({s.vm_state}) has the volumes {has} on {s.host}, written are {wanted}")
    return said + [f"{id} is no server and has the attachments {sorted(a)}" for id, a in there.items()]


def _shares(tx: Tx, all: list[Server], trees: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """Machines have what is written; open to their hosts, and to nobody else, are the shares that somebody has."""
    said, rows, known = [], shares.all(tx), {s.id: s for s in all}
    mine: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.server not in known or known[row.server].deleted_at is not None:
            said.append(f"{row.server} is no server and has the share {row.share_id}")
        elif row.busy in ("attaching", "detaching"):
            said.append(f"the share {row.share_id} of {row.server} is {row.busy}")
        elif not row.busy:
            mine[row.server].add(row.share_id)
    for s in all:
        has = trees.get(s.host or "", {}).get(s.id)
        if has is not None and s.deleted_at is None and s.vm_state != VM.error and set(has) != mine[s.id]:
            said.append(f"{s.id} ({s.vm_state}) has the shares {has} on {s.host}, written are {sorted(mine[s.id])}")
    wanted = {(row.share_id, row.kind, row.who) for row in rows if row.who}
    there = {(r.share_id, r.kind, r.who) for r in filesystems.find(tx, filesystems.Access) if OURS in r.metadata}
    said += [f"share {id} is open to {who}, where nobody has it" for id, _, who in sorted(there - wanted)]
    said += [f"share {id} is closed to {who}" for id, _, who in sorted(wanted - there)]
    held = sorted(
        x.resource for x in filesystems.find(tx, filesystems.Lock) if x.kind == "share" and x.reason == REASON
    )
    if held != sorted({id for id, _, _ in wanted}):
        said.append(f"shares {held} are locked, in use are {sorted(wanted)}")
    rules = {r.id for r in filesystems.find(tx, filesystems.Access)}
    locks = [x for x in filesystems.find(tx, filesystems.Lock) if x.kind != "share" and x.resource not in rules]
    return said + [f"lock {x.id} is of a rule that is gone" for x in locks]
