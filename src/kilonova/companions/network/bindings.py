"""Bindings of one port to several hosts, of which one is active: how a port moves with a live migration."""

from typing import Any

import msgspec
from msgspec import UNSET

from kilonova.companions.network import frame, ports
from kilonova.companions.network.frame import R, Text, Unset, View
from kilonova.companions.network.wiring import weave
from kilonova.companions.network.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, NotFound
from kilonova.kit.routes import Call
from kilonova.store import networks as store


class BindingChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    vnic_type: ports.VnicType | Unset = UNSET
    profile: dict[str, Any] | None | Unset = UNSET


class BindingWish(BindingChange, kw_only=True):
    host: Text


class BindingBody(msgspec.Struct, forbid_unknown_fields=True):
    binding: BindingWish


class BindingChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    binding: BindingChange


PATH = "/v2.0/ports/{id}/bindings"
T = store.port_bindings.c


def view(world: World, port: store.Port, b: store.Binding, status: str) -> View:
    return {
        "host": b.host,
        "vnic_type": b.vnic_type,
        "profile": b.profile,
        "status": status,
        "vif_type": b.vif_type,
        "vif_details": ports.details(world, port.network_id, b.vif_type),
        "project_id": port.project_id,
    }


def active(port: store.Port) -> store.Binding | None:
    if not port.binding_host_id:
        return None
    return store.Binding(
        port.id, port.binding_host_id, port.binding_vnic_type, port.binding_vif_type, port.binding_profile
    )


def _port(tx: Tx, call: Call, id: str, rule: str) -> store.Port:
    found = store.port(tx, id) if frame.is_uuid(id) else None
    if found is None:
        raise ports.KIND.gone(id)
    about = frame.target(*found)
    frame.seen(call, ports.KIND, about, id)
    call.check(about, rule)
    return found[0]


def _waiting(tx: Tx, id: str, host: str | None = None) -> list[store.Binding]:
    return store.find(tx, store.Binding, T.port_id == id, *([T.host == host] if host is not None else []))


def _gone(id: str, host: str) -> NotFound:
    return NotFound(
        f"Binding for port {id} for host {frame.printable(host)} could not be found.", code="PortBindingNotFound"
    )


def _all(tx: Tx, world: World, port: store.Port) -> list[View]:
    first = active(port)
    return [
        *([view(world, port, first, "ACTIVE")] if first else []),
        *(view(world, port, b, "INACTIVE") for b in _waiting(tx, port.id)),
    ]


@R.get(PATH, policy="get_port_binding", late=True)
def list_(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        bindings = _all(tx, call.world, _port(tx, call, id, "get_port_binding"))
    wanted = frame.asked(call)
    for name in ("host", "status", "vif_type", "vnic_type"):
        if name in wanted:
            bindings = [b for b in bindings if b[name] in wanted[name]]
    return {"bindings": bindings}


@R.get(PATH + "/{host}", policy="get_port_binding", late=True)
def show(call: Call, id: str, host: str) -> View:
    with call.world.db.read() as tx:
        bindings = _all(tx, call.world, _port(tx, call, id, "get_port_binding"))
    found = [b for b in bindings if b["host"] == host]
    if not found:
        raise _gone(id, host)
    return {"binding": found[0]}


@R.post(PATH, body=BindingBody, ok=201, policy="create_port_binding", late=True)
def create(call: Call, id: str) -> View:
    wish: BindingWish = call.body.binding

    def work(tx: Tx) -> tuple[store.Port, store.Binding]:
        port = _port(tx, call, id, "create_port_binding")
        if not wish.host:
            raise frame.bad("Invalid input for host. Reason: it is empty.", "HTTPBadRequest")
        if port.binding_host_id == wish.host or _waiting(tx, id, wish.host):
            raise Conflict(
                f"Binding for port {id} on host {wish.host} already exists.", code="PortBindingAlreadyExists"
            )
        told = frame.said(wish)
        vnic = told.get("vnic_type", "normal")
        vif = ports.vif_type(call.world, wish.host, vnic)
        if vif not in ports.PLUGGED:
            raise _failed(id, wish.host)
        b = store.Binding(id, wish.host, vnic, vif, told.get("profile") or {})
        store.add(tx, b)
        return port, b

    port, b = call.world.change(work)
    try:
        weave(call.world, hosts=[b.host], must=True)
    except Exception as e:
        call.world.change(_forget, id, b.host)
        raise _failed(id, b.host, str(e)) from e
    return {"binding": view(call.world, port, b, "INACTIVE")}


def _failed(id: str, host: str, why: str = "") -> Conflict:
    return Conflict(
        f"Binding for port {id} on host {frame.printable(host)} could not be created.", why=why, code="PortBindingError"
    )


def _forget(tx: Tx, id: str, host: str) -> int:
    return tx.execute(store.port_bindings.delete().where(T.port_id == id, T.host == host)).rowcount


@R.put(PATH + "/{host}", body=BindingChangeBody, policy="create_port_binding", late=True)
def update(call: Call, id: str, host: str) -> View:
    def work(tx: Tx) -> View:
        port = _port(tx, call, id, "create_port_binding")
        waiting = _waiting(tx, id, host)
        if not waiting:
            raise _gone(id, host)
        told = frame.said(call.body.binding)
        values = {n: (v if v is not None else {}) for n, v in told.items()}
        if values:
            tx.execute(store.port_bindings.update().where(T.port_id == id, T.host == host).values(**values))
        return view(call.world, port, msgspec.structs.replace(waiting[0], **values), "INACTIVE")

    return {"binding": call.world.change(work)}


@R.put(PATH + "/{host}/activate", policy="activate", late=True)
def activate(call: Call, id: str, host: str) -> View:
    """The port is on that host from now on; where it was before it waits to be deleted."""

    def work(tx: Tx) -> tuple[store.Port, str]:
        port = _port(tx, call, id, "activate")
        if port.binding_host_id == host:
            raise Conflict(f"Binding for port {id} on host {host} is already active.", code="PortBindingAlreadyActive")
        waiting = _waiting(tx, id, host)
        if not waiting:
            raise _gone(id, host)
        old, b = active(port), waiting[0]
        _forget(tx, id, host)
        if old:
            store.add(tx, old)
        told = {"binding:host_id": host, "binding:vnic_type": b.vnic_type, "binding:profile": b.profile}
        changes = ports.binding(call.world, port, told)
        return frame.kept(store.change(tx, port, call.world.clock.now(), **changes)), port.binding_host_id

    port, left = call.world.change(work)
    (whole,) = ports.settled(call.world, [ports.Whole(port, [], [])])
    if left:
        weave(call.world, hosts=[left])
    now = active(whole.port)
    assert now is not None
    return {"binding": view(call.world, whole.port, now, "ACTIVE")}


@R.delete(PATH + "/{host}", ok=204, policy="delete_port_binding", late=True)
def delete(call: Call, id: str, host: str) -> None:
    def work(tx: Tx) -> None:
        port = _port(tx, call, id, "delete_port_binding")
        if host and port.binding_host_id == host:
            changes = ports.binding(call.world, port, {"binding:host_id": "", "binding:profile": {}})
            frame.kept(store.change(tx, port, call.world.clock.now(), **changes))
        elif not _forget(tx, id, host):
            raise _gone(id, host)

    call.world.change(work)
    weave(call.world, hosts=[host])
