"""Host aggregates: hosts that an operator puts together and writes something on. One with a zone is an availability zone."""

import re
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
import sqlalchemy as sa
from msgspec import Meta

from kilonova.api import boot_image
from kilonova.api.bodies import HostName, MetaKey, Name, Uuid, dashed
from kilonova.api.notices import aggregate, told
from kilonova.api.registry import R, World
from kilonova.contracts.jobs import Precache
from kilonova.kit.clock import iso_us
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType
from kilonova.kit.workflow import start
from kilonova.model.disks import source_of
from kilonova.store import hosts, servers

PLACE = "/v2.1/os-aggregates"
Zone = Annotated[
    str,
    Meta(min_length=1, max_length=255, pattern=r"^(?!\s)[^:\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+(?<!\s)$"),
]
LooseName = Annotated[
    str, Meta(min_length=1, max_length=255, pattern=r"^\s*[^\s\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f\u2028\u2029]*$")
]


class New(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    availability_zone: Zone | None = None


class NewBody(msgspec.Struct, forbid_unknown_fields=True):
    aggregate: New


class Change(msgspec.Struct, forbid_unknown_fields=True):
    name: LooseName | UnsetType = UNSET
    availability_zone: Zone | None | UnsetType = UNSET


class ChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    aggregate: Change


class Member(msgspec.Struct, forbid_unknown_fields=True):
    host: HostName


class Notes(msgspec.Struct, forbid_unknown_fields=True):
    metadata: dict[MetaKey, Annotated[str, Meta(max_length=255)] | None]


@R.get(PLACE, policy="os_compute_api:os-aggregates:index")
def index(call: Call) -> dict[str, Any]:
    with call.world.db.read() as tx:
        return {"aggregates": [_view(call, a) for a in hosts.aggregates(tx)]}


@R.get(PLACE + "/{id}", policy="os_compute_api:os-aggregates:show")
def show(call: Call, id: str) -> dict[str, Any]:
    with call.world.db.read() as tx:
        return {"aggregate": _view(call, _the(tx, id))}


@R.post(PLACE, body=NewBody, policy="os_compute_api:os-aggregates:create")
def create(call: Call) -> dict[str, Any]:
    wish: New = call.body.aggregate
    world: World = call.world
    zone = wish.availability_zone

    def record(tx: Tx) -> hosts.Aggregate:
        now, uuid = world.clock.now(), world.ids.uuid()
        made = hosts.create_aggregate(tx, wish.name, uuid=uuid, now=now, availability_zone=zone)
        return _told(call, tx, "create", made)

    made = world.db.run(record)
    shown = _view(call, made)
    return {"aggregate": {k: v for k, v in shown.items() if k not in ("hosts", "metadata")}}


@R.put(PLACE + "/{id}", body=ChangeBody, policy="os_compute_api:os-aggregates:update")
def update(call: Call, id: str) -> dict[str, Any]:
    wish: Change = call.body.aggregate
    if wish.name is UNSET and wish.availability_zone is UNSET:
        raise Invalid("Invalid input for field/attribute aggregate. Value: {}. Give a name or an availability zone.")

    def record(tx: Tx) -> hosts.Aggregate:
        a, now = _the(tx, id), call.world.clock.now()
        if not isinstance(wish.name, UnsetType) and wish.name.strip() != a.name:
            hosts.rename_aggregate(tx, a.id, wish.name.strip(), now)
        if not isinstance(wish.availability_zone, UnsetType):
            _noted(call, tx, a, {hosts.ZONE: wish.availability_zone})
        return _told(call, tx, "update_prop", hosts.aggregate(tx, a.id))

    return {"aggregate": _view(call, call.world.db.run(record))}


@R.delete(PLACE + "/{id}", policy="os_compute_api:os-aggregates:delete")
def delete(call: Call, id: str) -> None:
    def record(tx: Tx) -> None:
        try:
            a = _the(tx, id)
            hosts.delete_aggregate(tx, a.id)
            _told(call, tx, "delete", a)
        except Conflict as e:
            raise Invalid(e.said) from None

    call.world.db.run(record)


@R.post(PLACE + "/{id}/action", action="add_host", body=Member, policy="os_compute_api:os-aggregates:add_host")
def add_host(call: Call, id: str) -> dict[str, Any]:
    def record(tx: Tx) -> hosts.Aggregate:
        a, host = _the(tx, id), call.body.host
        before = hosts.zones(tx)
        after = hosts.add_host(tx, a.id, host, call.world.clock.now())
        _stay(call, tx, before, [host])
        return _told(call, tx, "add_host", after)

    return {"aggregate": _view(call, call.world.db.run(record))}


@R.post(PLACE + "/{id}/action", action="remove_host", body=Member, policy="os_compute_api:os-aggregates:remove_host")
def remove_host(call: Call, id: str) -> dict[str, Any]:
    def record(tx: Tx) -> hosts.Aggregate:
        a, host = _the(tx, id), call.body.host
        if not hosts.exists(tx, host):
            raise NotFound(f"Compute host {host} could not be found.")
        before = hosts.zones(tx)
        after = hosts.remove_host(tx, a.id, host, call.world.clock.now())
        _stay(call, tx, before, [host])
        return _told(call, tx, "remove_host", after)

    return {"aggregate": _view(call, call.world.db.run(record))}


@R.post(PLACE + "/{id}/action", action="set_metadata", body=Notes, policy="os_compute_api:os-aggregates:set_metadata")
def set_metadata(call: Call, id: str) -> dict[str, Any]:
    def record(tx: Tx) -> hosts.Aggregate:
        return _told(call, tx, "update_metadata", _noted(call, tx, _the(tx, id), call.body.metadata))

    return {"aggregate": _view(call, call.world.db.run(record))}


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    id: Uuid


class Cache(msgspec.Struct, forbid_unknown_fields=True):
    cache: Annotated[list[Wanted], Meta(min_length=1)]


@R.post(PLACE + "/{id}/images", versions="2.81-", body=Cache, ok=202, policy="compute:aggregates:images")
def precache(call: Call, id: str) -> None:
    """Each host of it that works is to fetch these images; nobody waits for it."""
    world: World = call.world
    ids = [dashed(w.id) for w in call.body.cache]
    if len(set(ids)) < len(ids):
        raise Invalid("Duplicate images in request")
    with world.db.read() as tx:
        _the(tx, id)
    images = [source_of(boot_image.image_of(boot_image.shown(call, ref))) for ref in ids]

    def record(tx: Tx) -> list[str]:
        now, a, batch = world.clock.now(), _the(tx, id), world.ids.uuid()
        able = [h for h in a.hosts if world.hosts.speaks(h, "Precache") and world.hosts.up(h)]
        told(
            call,
            tx,
            *(f"aggregate.cache_images.{p}" for p in ("start", *([] if able else ["end"]))),
            of=lambda: aggregate(a),
        )
        jobs = [Precache(host, images, a.uuid, len(able)) for host in able]
        return [start(tx, "precache", j, id=world.ids.uuid(), subject=batch, now=now) for j in jobs]

    for run in world.db.run(record):
        world.wake(run)


def _told(call: Call, tx: Tx, what: str, a: hosts.Aggregate) -> hosts.Aggregate:
    told(call, tx, f"aggregate.{what}.start", f"aggregate.{what}.end", of=lambda: aggregate(a))
    return a


def _the(tx: Tx, id: str) -> hosts.Aggregate:
    """The aggregate a path names. Raises Invalid where that is no number, NotFound."""
    if not re.fullmatch(r"[+-]?[0-9]+", id):
        raise Invalid(f"Invalid id '{id[:60]}': an aggregate has a number.")
    number = int(id) if len(id) < 10 else -1
    if number <= 0:
        raise NotFound(f"Aggregate {id[:60]} could not be found.")
    return hosts.aggregate(tx, number)


def _noted(call: Call, tx: Tx, a: hosts.Aggregate, values: dict[str, str | None]) -> hosts.Aggregate:
    """Another zone under the servers of its hosts is refused, and a host in two zones: both are the caller's mistake."""
    if values.get(hosts.ZONE) == "":
        raise Invalid(f"Aggregate {a.id} does not support empty named availability zone")
    try:
        before = hosts.zones(tx)
        after = hosts.set_metadata(tx, a.id, values, call.world.clock.now())
        if hosts.ZONE in values:
            _stay(call, tx, before, a.hosts)
    except Conflict as e:
        raise Invalid(e.said) from None
    return after


def _stay(call: Call, tx: Tx, before: dict[str, str], changed: Iterable[str]) -> None:
    """Raises Conflict where servers would find themselves in another zone than they were put in."""
    default = call.world.config.api.default_availability_zone
    now = hosts.zones(tx)
    moved = [h for h in changed if before.get(h, default) != now.get(h, default)]
    t = servers.T.c
    if moved and tx.execute(sa.select(t.id).where(t.host.in_(moved), t.deleted_at.is_(None)).limit(1)).first():
        raise Conflict("One or more hosts contain instances in this zone, which would have to change it.")


def _view(call: Call, a: hosts.Aggregate) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": a.id,
        "name": a.name,
        "availability_zone": a.availability_zone,
        "hosts": a.hosts,
        "metadata": a.metadata,
        "created_at": iso_us(a.created_at),
        "updated_at": iso_us(a.updated_at),
        "deleted": False,
        "deleted_at": None,
    }
    return shown | {"uuid": a.uuid} if call.version >= 41 else shown
