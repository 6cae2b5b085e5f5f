"""Interfaces come and go: a port is made or bound, its host plugs it in, the server shows it; and the way back.

Alone with the server: who moves it or rebuilds it plans its NICs from what is written, and must not miss one.
"""

from kilonova.conductor import ports
from kilonova.conductor.ports import Plugged
from kilonova.conductor.world import World
from kilonova.contracts.compute import AttachNic, DetachNic, Done
from kilonova.contracts.jobs import AttachInterface, DetachInterface
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, HostGone, NotFound
from kilonova.kit.workflow import FOREVER, Run, command, effect, first_try, record, workflow
from kilonova.model.machine import Nic
from kilonova.model.plan import modelled
from kilonova.model.server import Plug, Server
from kilonova.model.states import VERBS, Verb
from kilonova.store import hosts, servers

# ---- attach


@workflow
def attach_interface(run: Run, job: AttachInterface) -> None:
    run.when_alone()
    host = run(place, job)
    plugged = run(bind, job, host)
    run(plug_in, job.server, host, plugged.nics[0])
    run(attached, job.server.id, plugged.plugs[0], run.now)


@record
def place(tx: Tx, job: AttachInterface) -> str:
    """Where it is, now that nobody moves it. Raises Conflict where it cannot be plugged (any longer)."""
    server = _still(tx, job.server.id, VERBS["attach_interface"])
    if job.wanted.port_id in {p.port_id for p in server.plugs}:
        raise Conflict(f"Port {job.wanted.port_id} is still in use.")
    return server.host or ""


@effect
def bind(world: World, key: str, job: AttachInterface, host: str) -> Plugged:
    with world.db.read() as tx:
        zone = hosts.zones(tx).get(host, world.config.api.default_availability_zone)
    w = job.wanted
    if w.port_id is not None:
        port = ports.brought(world, job.server, w.port_id, host, zone)
    else:
        again = not first_try()
        if again:
            world.doubt(job.server.id)
        port = (ports.marked(world, job.server.id, key) if again else None) or ports.made(
            world, key, job.server, w, host, zone, []
        )
    return ports.described(world, job.server, [port], [w.tag])


@bind.undo
def _(world: World, key: str, job: AttachInterface, host: str) -> None:
    """This one port, and no other of the server's. A tenant may have deleted it, or given it away, meanwhile."""
    network = world.neighbours.network
    if job.wanted.port_id is None:
        if port := ports.marked(world, job.server.id, key):
            ports.let_go(world, port)
    elif any(p.device_id == job.server.id for p in network.ports(ids=[job.wanted.port_id])):
        network.unbind_port(job.wanted.port_id)


@command(patience_s=300, event="compute_attach_interface")
def plug_in(server: Server, host: str, nic: Nic) -> To[Done]:
    return To(host, AttachNic(server=server.id, nic=modelled(nic, server.image)))


@plug_in.undo
def _(server: Server, host: str, nic: Nic) -> To[Done]:
    return To(host, DetachNic(server=server.id, port_id=nic.port_id, timeout_s=0, anyway=True))


@record
def attached(tx: Tx, id: str, plug: Plug, now: float) -> Plug:
    server = servers.held(tx, id)
    servers.change(tx, id, now, plugs=[*(p for p in server.plugs if p.port_id != plug.port_id), plug])
    return plug


# ---- detach


@workflow
def detach_interface(run: Run, job: DetachInterface) -> None:
    """What is in a machine on a host that is gone is taken out when the host returns: see `watch`."""
    run.when_alone()
    host = run(plugged_at, job)
    try:
        run(unplug, job.server.id, host, job.port_id)
    except HostGone:
        pass
    run.no_return()
    run(let_go, job.server.id, job.port_id)
    run(detached, job.server.id, job.port_id, run.now)


@record
def plugged_at(tx: Tx, job: DetachInterface) -> str:
    server = _still(tx, job.server.id, VERBS["detach_interface"])
    if job.port_id not in {p.port_id for p in server.plugs}:
        raise NotFound(f"Port id {job.port_id} could not be found.")
    return server.host or ""


@command(patience_s=600, event="compute_detach_interface")
def unplug(id: str, host: str, port_id: str) -> To[Done]:
    return To(host, DetachNic(server=id, port_id=port_id))


@effect(patience_s=FOREVER)
def let_go(world: World, key: str, id: str, port_id: str) -> None:
    """Whose the port is by now is the network service's to know: only while it is this server's it is let go of."""
    for port in world.neighbours.network.ports(ids=[port_id]):
        if port.device_id == id:
            ports.let_go(world, port)


@record
def detached(tx: Tx, id: str, port_id: str, now: float) -> None:
    server = servers.held(tx, id)
    servers.change(tx, id, now, plugs=[p for p in server.plugs if p.port_id != port_id])


# ---- both


def _still(tx: Tx, id: str, verb: Verb) -> Server:
    """As it is now: while we waited to be alone another may have brought it where this cannot be done."""
    server = servers.get(tx, id)
    if server.deleted_at is not None or server.vm_state not in verb.start or server.host is None:
        raise servers.why_not(server, verb)
    return server
