"""By policy, and only where an operator set it: servers of a host that has been silent for long are evacuated by themselves.

Silence is not death: a host that only cannot be heard goes on running its guests, and what they share with others (a
volume, an address) is then used twice.  So it is off unless set, and whoever sets it has something that switches such
hosts off.  When many hosts are silent at once the fault is likelier between us and them, and nothing is done.
"""

import logging

from kilonova.conductor.world import World
from kilonova.contracts.jobs import Evacuate
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict
from kilonova.kit.journal import Cause
from kilonova.kit.reconcile import reconciler
from kilonova.kit.workflow import signal, start
from kilonova.model.states import VERBS, VM
from kilonova.store import compare, hosts, migrations, servers
from kilonova.store.migrations import Kind, Status

log = logging.getLogger(__name__)

AGAIN_S = 600.0  # a server that nobody had room for is tried again then
MOST = 50  # servers of a host in a turn: others build meanwhile
MOVABLE = frozenset({VM.active, VM.stopped})


@reconciler(every_s=15)
def deserted(world: World) -> list[str]:
    """What lay on a host that has been silent for so long is made anew elsewhere, as if an operator had asked for it."""
    policy = world.config.evacuation
    if not policy.after_s:
        return []
    now, said = world.clock.now(), list[str]()
    with world.db.read() as tx:
        all = hosts.services(tx, binary=hosts.COMPUTE)
        silent = [s for s in all if world.gone(tx, s.host)]
    if len(silent) > max(1, int(policy.share_max * len(all))):
        log.warning("%d of %d hosts are silent: too many to believe that they are dead", len(silent), len(all))
        return []
    for s in silent:
        if s.disabled or now - max(s.last_seen or 0.0, world.listening_since) <= policy.after_s:
            continue
        with world.db.read() as tx:
            lately = migrations.evacuated_since(tx, s.host, now - AGAIN_S)
            here = [
                id for id, row in compare.on_host(tx, s.host).items() if row.task_state is None and id not in lately
            ]
        for id in here[:MOST]:
            try:
                runs = world.db.run(_left_behind, world, id, s.host)
            except Conflict:  # somebody was quicker
                continue
            world.started(runs)
            said += [f"{id} leaves {s.host}, which has been silent for long"] * bool(runs)
    return said


def _left_behind(tx: Tx, world: World, id: str, host: str) -> list[str]:
    before, now = servers.get(tx, id), world.clock.now()
    if before.host != host or before.vm_state not in MOVABLE or not world.gone(tx, host):
        return []
    server = servers.begin(tx, id, VERBS["evacuate"], now)
    was = str(before.vm_state)
    uuid = migrations.begin(tx, server, Kind.evacuation, Status.accepted, uuid=world.ids.uuid(), now=now, was=was)
    password = world.ids.password(world.config.api.password_length)
    job = Evacuate(server, was, uuid, stopped=before.vm_state == VM.stopped, admin_password=password)
    why = Cause(action="evacuate", request_id=f"req-{world.ids.uuid()}", project_id=server.project_id)
    others = signal(tx, server.id, "abort")
    return [*others, start(tx, "evacuate", job, id=world.ids.uuid(), subject=id, now=now, cause=why)]
