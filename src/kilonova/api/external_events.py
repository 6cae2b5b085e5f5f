"""POST /os-server-external-events: what neighbours say has become of a server's ports, volumes and power."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kilonova.api.bodies import Uuid, dashed
from kilonova.api.registry import R, World, cause
from kilonova.api.verbs import begun
from kilonova.contracts.compute import DetachNic
from kilonova.contracts.jobs import DetachInterface, ExtendVolume, Readdress
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict
from kilonova.kit.routes import Call, Reply
from kilonova.kit.versions import UNSET, UnsetType, was
from kilonova.kit.workflow import noted, start
from kilonova.model.server import Server
from kilonova.model.states import VERBS
from kilonova.store import block_devices, servers

Name51 = Literal["network-changed", "network-vif-deleted", "network-vif-plugged", "network-vif-unplugged"]
Name76 = Name51 | Literal["volume-extended"]
Name82 = Name76 | Literal["power-update"]
Name93 = Name82 | Literal["accelerator-request-bound"]
Name = Name93 | Literal["volume-reimaged"]
TAGGED = ("volume-extended", "power-update", "accelerator-request-bound")  # these say nothing without a tag
ADDRESSES = ("network-changed", "network-vif-deleted")
POWER = {"POWER_ON": "start", "POWER_OFF": "stop"}


class Event(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[
        Name, was(Name51, until="2.50"), was(Name76, until="2.75"), was(Name82, until="2.81"), was(Name93, until="2.92")
    ]
    server_uuid: Uuid
    status: Literal["completed", "failed", "in-progress"] = "completed"
    tag: Annotated[str, Meta(max_length=255)] | UnsetType = UNSET


class Body(msgspec.Struct, forbid_unknown_fields=True):
    events: Annotated[list[Event], Meta(min_length=1)]


@R.post("/v2.1/os-server-external-events", body=Body, policy="os_compute_api:os-server-external-events:create")
def create(call: Call) -> Reply:
    """Each event has a code of its own: 207 where one could not be taken."""
    told: list[Event] = call.body.events
    world: World = call.world

    def record(tx: Tx) -> tuple[list[int], list[str]]:
        known = servers.find(tx, {dashed(e.server_uuid) for e in told})
        codes = [_code(e, known.get(dashed(e.server_uuid))) for e in told]
        taken = [(e, known[dashed(e.server_uuid)]) for e, code in zip(told, codes, strict=True) if code == 200]
        return codes, _heeded(call, tx, taken)

    codes, runs = world.db.run(record)
    for run in runs:
        world.wake(run)
    shown = [_shown(e, code) for e, code in zip(told, codes, strict=True)]
    return Reply({"events": shown}, status=200 if set(codes) == {200} else 207)


def _code(e: Event, server: Server | None) -> int:
    if (e.name in TAGGED and (e.tag is UNSET or not e.tag)) or (e.name == "power-update" and e.tag not in POWER):
        return 400
    if server is None or server.deleted_at is not None:
        return 404
    return 200 if server.host else 422


def _heeded(call: Call, tx: Tx, taken: list[tuple[Event, Server]]) -> list[str]:
    """What follows from them: the runs to be woken. Nobody waits for a port to be plugged or for an accelerator here."""
    world: World = call.world
    now = world.clock.now()
    gone = {(s.id, str(e.tag)): s for e, s in taken if e.name == "network-vif-deleted"}
    taken_out = {key: run for key, s in gone.items() if (run := _taken_out(call, tx, s, key[1], now)) is not None}
    told = ((e, s) for e, s in taken if e.name in ADDRESSES and (s.id, str(e.tag)) not in taken_out)
    changed = dict.fromkeys(s.id for e, s in told if s.plugs)
    runs = list(taken_out.values())
    runs += [start(tx, "readdress", Readdress(id), id=world.ids.uuid(), subject=id, now=now) for id in changed]
    for e, s in taken:
        if e.name == "volume-extended":
            device = block_devices.of_volume(s, dashed(str(e.tag)))
            if device is not None and world.hosts.speaks(s.host, ExtendVolume.__name__):
                job, why = ExtendVolume(s, device), cause(call, "extend_volume")
                runs.append(start(tx, "extend_volume", job, id=world.ids.uuid(), subject=s.id, now=now, cause=why))
                continue
            noted(tx, id=world.ids.uuid(), subject=s.id, now=now, cause=cause(call, "extend_volume"), host=s.host,
                  event="compute_extend_volume")  # fmt: skip
        elif e.name == "power-update":
            try:
                runs.append(begun(call, tx, s, POWER[str(e.tag)]))
            except Conflict:
                pass  # it is so already, or somebody is at it: who told us only saw that
    return runs


def _taken_out(call: Call, tx: Tx, s: Server, port_id: str, now: float) -> str | None:
    """The NIC of a port that is no more leaves the guest, too. None: it has none, or cannot lose one just now."""
    world: World = call.world
    if port_id not in {p.port_id for p in s.plugs} or not world.hosts.speaks(s.host, DetachNic.__name__):
        return None
    try:
        job = DetachInterface(servers.begin(tx, s.id, VERBS["detach_interface"], now), port_id)
    except Conflict:
        return None
    why = cause(call, "detach_interface")
    return start(tx, "detach_interface", job, id=world.ids.uuid(), subject=s.id, now=now, cause=why)


def _shown(e: Event, code: int) -> dict[str, Any]:
    shown = {
        "name": e.name,
        "server_uuid": e.server_uuid,
        "status": e.status if code == 200 else "failed",
        "code": code,
    }
    return shown if e.tag is UNSET else shown | {"tag": e.tag}
