"""Inventories: how much of each resource class a provider has, and how it may be given out."""

from typing import Annotated as A
from typing import Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.routes import Call, Reply
from kilonova.model.host import Stock
from kilonova.placement.frame import MAX_INT, ClassName, R, location, plain, shown
from kilonova.store import providers as store
from kilonova.store.providers import CLASS_NAMES, RACE

Count = A[int, Meta(ge=1, le=MAX_INT)]
Reserved = A[int, Meta(ge=0, le=MAX_INT)]
Ratio = A[float, Meta(le=3.40282e38)]


class Amounts(msgspec.Struct, forbid_unknown_fields=True):
    """As it stands among others; a generation is said with all of them."""

    total: Count
    reserved: Reserved = 0
    min_unit: Count = 1
    max_unit: Count = MAX_INT
    step_size: Count = 1
    allocation_ratio: Ratio = 1.0
    resource_provider_generation: int | UnsetType = UNSET


class OneInventory(msgspec.Struct, forbid_unknown_fields=True):
    resource_provider_generation: int
    total: Count
    reserved: Reserved = 0
    min_unit: Count = 1
    max_unit: Count = MAX_INT
    step_size: Count = 1
    allocation_ratio: Ratio = 1.0


class NewInventory(msgspec.Struct, forbid_unknown_fields=True):
    resource_class: ClassName
    total: Count
    reserved: Reserved = 0
    min_unit: Count = 1
    max_unit: Count = MAX_INT
    step_size: Count = 1
    allocation_ratio: Ratio = 1.0
    resource_provider_generation: int | UnsetType = UNSET


class AllInventories(msgspec.Struct, forbid_unknown_fields=True):
    resource_provider_generation: int
    inventories: dict[ClassName, Amounts]


def stock(name: str, said: Any, version: int) -> Stock:
    """Raises Invalid where nothing could ever be given out; from 1.26 on all may be reserved."""
    made = Stock(
        name, said.total, said.reserved, said.min_unit, said.max_unit, said.step_size, float(said.allocation_ratio)
    )
    capacity = (made.total - made.reserved) * made.allocation_ratio
    if made.reserved > made.total or capacity < 0 or (version < 26 and int(capacity) <= 0):
        raise Invalid(
            f"Unable to update inventory for resource provider: Invalid inventory for '{plain(name)}'. "
            "The reserved value is greater than or equal to total."
        )
    return made


def view(s: Stock) -> dict[str, Any]:
    return {
        "total": s.total,
        "reserved": s.reserved,
        "min_unit": s.min_unit,
        "max_unit": s.max_unit,
        "step_size": s.step_size,
        "allocation_ratio": s.allocation_ratio,
    }


def _all(call: Call, generation: int, stocks: dict[str, Stock], at: float) -> Reply:
    body = {
        "resource_provider_generation": generation,
        "inventories": {name: view(s) for name, s in sorted(stocks.items())},
    }
    return shown(call, body, [at])


ALL, ONE = "/resource_providers/{uuid}/inventories", "/resource_providers/{uuid}/inventories/{resource_class}"
RULE = "placement:resource_providers:inventories:"


@R.get(ALL, policy=f"{RULE}list")
def list_(call: Call, uuid: str) -> Reply:
    with call.world.db.read() as tx:
        row = store.get(tx, uuid)
        found = store.stocks(tx, uuid)
    return _all(call, row.generation, found, row.changed_at)


@R.put(ALL, body=AllInventories, policy=f"{RULE}update")
def replace(call: Call, uuid: str) -> Reply:
    seen, now = call.body.resource_provider_generation, call.world.clock.now()

    def work(tx: Tx) -> dict[str, Stock]:
        store.moved(tx, uuid, seen, now)
        wanted = {name: stock(name, said, call.version) for name, said in call.body.inventories.items()}
        store.set_stocks(tx, uuid, wanted.values())
        return wanted

    return _all(call, seen + 1, call.world.change(work), now)


@R.post(ALL, body=NewInventory, ok=201, policy=f"{RULE}create")
def create(call: Call, uuid: str) -> Reply:
    name, now = call.body.resource_class, call.world.clock.now()

    def work(tx: Tx) -> tuple[Stock, int]:
        row = store.moved(tx, uuid, None, now)
        new = stock(name, call.body, call.version)
        store.known_classes(tx, [name])
        if name in store.stocks(tx, uuid):
            raise Conflict(f"Update conflict: Inventory for '{name}' on resource provider '{uuid}' exists.", code=RACE)
        store.set_stocks(tx, uuid, [new], keep=True)
        return new, row.generation + 1

    new, generation = call.world.change(work)
    where = location(call, "resource_providers", uuid, "inventories", name)
    return shown(call, view(new) | {"resource_provider_generation": generation}, [now], headers=where)


@R.delete(ALL, versions="1.5-", ok=204, outside=405, policy=f"{RULE}delete")
def delete_all(call: Call, uuid: str) -> None:
    now = call.world.clock.now()

    def work(tx: Tx) -> None:
        store.moved(tx, uuid, None, now)
        store.set_stocks(tx, uuid, [])

    call.world.change(work)


@R.get(ONE, policy=f"{RULE}show")
def show(call: Call, uuid: str, resource_class: str) -> Reply:
    with call.world.db.read() as tx:
        row = store.get(tx, uuid)
        found = store.stocks(tx, uuid).get(resource_class)
    if found is None:
        raise _none(uuid, resource_class)
    return shown(call, view(found) | {"resource_provider_generation": row.generation}, [row.changed_at])


def _none(uuid: str, name: str) -> NotFound:
    return NotFound(f"No inventory of class {plain(name)} for {uuid}")


@R.put(ONE, body=OneInventory, policy=f"{RULE}update")
def update(call: Call, uuid: str, resource_class: str) -> Reply:
    seen, now = call.body.resource_provider_generation, call.world.clock.now()

    def work(tx: Tx) -> Stock:
        store.moved(tx, uuid, seen, now)
        store.declared(tx, CLASS_NAMES, resource_class)
        new = stock(resource_class, call.body, call.version)
        if resource_class not in store.stocks(tx, uuid):
            raise Invalid(f"No inventory record with resource class: {plain(resource_class)}.")
        store.set_stocks(tx, uuid, [new], keep=True)
        return new

    new = call.world.change(work)
    return shown(call, view(new) | {"resource_provider_generation": seen + 1}, [now])


@R.delete(ONE, ok=204, policy=f"{RULE}delete")
def delete(call: Call, uuid: str, resource_class: str) -> None:
    now = call.world.clock.now()

    def work(tx: Tx) -> None:
        store.moved(tx, uuid, None, now)
        if resource_class not in store.stocks(tx, uuid):
            raise _none(uuid, resource_class)
        store.drop_stocks(tx, uuid, [resource_class], code=RACE)

    call.world.change(work)
