"""The reshaper: inventories of providers and allocations of consumers, written anew in one go.

So that what a provider had can become its child's while servers hold it.
"""

from typing import Annotated as A

import msgspec
from msgspec import Meta

from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.placement.allocations import OfConsumer, write
from kilonova.placement.frame import ProviderKey, R
from kilonova.placement.inventories import AllInventories, stock
from kilonova.store import allocations
from kilonova.store import providers as store


class Reshape(msgspec.Struct, forbid_unknown_fields=True):
    inventories: A[dict[ProviderKey, AllInventories], Meta(min_length=1)]
    allocations: dict[ProviderKey, OfConsumer]


@R.post("/reshaper", versions="1.30-", body=Reshape, ok=204, policy="placement:reshaper:reshape")
def reshape(call: Call) -> None:
    """Classes that go are kept until nobody holds any: the allocations come between."""
    body, now = call.body, call.world.clock.now()
    writes = [write(call, consumer, said) for consumer, said in body.allocations.items()]

    def work(tx: Tx) -> None:
        going = {}
        for uuid in sorted(body.inventories):
            try:
                store.moved(tx, uuid, body.inventories[uuid].resource_provider_generation, now)
            except NotFound as e:
                raise Invalid(e.said, code=store.UNKNOWN_PROVIDER) from None
        for uuid, of in sorted(body.inventories.items()):
            wanted = [stock(name, said, call.version) for name, said in of.inventories.items()]
            going[uuid] = store.set_stocks(tx, uuid, wanted, keep=True)
        if writes:
            allocations.replace(tx, writes, now, whole=True)
        for uuid, names in going.items():
            store.drop_stocks(tx, uuid, names)

    call.world.change(work)
