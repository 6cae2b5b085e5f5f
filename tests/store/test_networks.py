"""Addresses, shares and revisions: what only one can have, only one gets."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from kilonova.companions import ipam
from kilonova.companions.network import first
from kilonova.companions.network.networks import NetworkWish
from kilonova.companions.network.networks import new as new_network
from kilonova.companions.network.ports import new as new_port
from kilonova.companions.network.subnets import SubnetWish
from kilonova.companions.network.subnets import new as new_subnet
from kilonova.companions.network.world import World
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.db import Db, Tx, meta
from kilonova.kit.errors import Conflict, OverQuota
from kilonova.model.options import Network
from kilonova.store import networks as store


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    db = Db(f"sqlite:///{tmp_path}/networks.db")
    meta.create_all(db.engine)
    yield World(db, WallClock(), Ids(random.Random(1)), Network(quota_port=1000))
    db.close()


def network(tx: Tx, world: World, cidr: str = "10.0.0.0/24", **more: object) -> store.Place:
    n = new_network(tx, world, "p", NetworkWish(name="n"))
    s = new_subnet(tx, world, "p", store.Place(n, [], None), SubnetWish(network_id=n.id, cidr=cidr, **more))  # type: ignore[arg-type]
    return store.Place(n, [s], None)


def test_many_at_once_get_every_address_once(world: World) -> None:
    """A /26 has 61 addresses beside the gateway, of which DHCP has one: 60 get one, and the others are told why not."""
    place = world.change(network, world, "10.0.0.0/26")
    got: list[str] = []
    refused: list[str] = []

    def ask() -> None:
        for _ in range(20):
            try:
                whole = world.change(new_port, world, "p", place, {"port_security_enabled": False})
                got.append(whole.addresses[0].address)
            except Conflict as e:
                refused.append(e.code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(got) == len(set(got)) == 60
    assert set(refused) == {"IpAddressGenerationFailure"} and len(refused) == 20


def test_an_address_is_taken_once(world: World) -> None:
    with world.db.tx() as tx:
        place = network(tx, world)
        a = new_port(tx, world, "p", place, {"port_security_enabled": False}).port
        assert store.take(tx, a.id, place.subnets[0].id, "10.0.0.250")
        assert not store.take(tx, a.id, place.subnets[0].id, "10.0.0.250")


def test_a_subnet_with_addresses_cannot_vanish_under_a_port(world: World) -> None:
    place = world.change(network, world)
    world.change(new_port, world, "p", place, {"port_security_enabled": False})
    with pytest.raises(sa.exc.IntegrityError), world.db.tx() as tx:
        store.remove(tx, store.Subnet, place.subnets[0].id)


def test_a_port_takes_what_hangs_on_it_along(world: World) -> None:
    place = world.change(network, world, enable_dhcp=False)
    port = world.change(new_port, world, "p", place, {}).port
    with world.db.tx() as tx:
        store.remove(tx, store.Port, port.id)
        assert not store.taken(tx, place.subnets[0].id)
        assert not store.groups_of(tx, [port.id])


def test_a_mac_drawn_twice_is_drawn_again(world: World) -> None:
    place = world.change(network, world)

    class Stuck(random.Random):
        """Draws the same MAC three times."""

        left = 3

        def getrandbits(self, k: int) -> int:
            if k == 24 and self.left:
                self.left -= 1
                return 5
            return super().getrandbits(k)

    world.ids = Ids(Stuck(3))
    macs = {
        world.change(new_port, world, "p", place, {"port_security_enabled": False}).port.mac_address for _ in range(2)
    }
    assert len(macs) == 2


def test_a_share_is_never_exceeded_and_given_back(world: World) -> None:
    with world.db.tx() as tx:
        store.charge(tx, "p", "port", 2, 3)
        with pytest.raises(OverQuota):
            store.charge(tx, "p", "port", 2, 3)
        store.charge(tx, "p", "port", 1, 3)
        store.discharge(tx, "p", "port", 3)
        assert store.shares(tx, "p")["port"] == store.Share(None, 0)


def test_a_limit_of_its_own_goes_before_the_standard_one(world: World) -> None:
    with world.db.tx() as tx:
        store.limit(tx, "p", "port", 1)
        store.charge(tx, "p", "port", 1, 100)
        with pytest.raises(OverQuota):
            store.charge(tx, "p", "port", 1, 100)
        store.limit(tx, "p", "port", -1)
        store.charge(tx, "p", "port", 1000, 1)
        assert store.limited(tx) == {"p": {"port": -1}}
        store.limit(tx, "p", "port", None)
        assert store.limited(tx) == {}


def test_nobody_has_no_share(world: World) -> None:
    with world.db.tx() as tx:
        store.charge(tx, "", "port", 5, 0)
        assert store.shares(tx, "") == {}


def test_a_wrong_counter_is_mended(world: World) -> None:
    place = world.change(network, world)
    world.change(new_port, world, "p", place, {})
    with world.db.tx() as tx:
        assert store.recount(tx) == []
        store.charge(tx, "p", "port", 7, -1)
        store.charge(tx, "q", "router", 1, -1)
        assert store.recount(tx) == [("p", "port", 8, 1), ("q", "router", 1, 0)]
        assert store.recount(tx) == []


def test_who_comes_too_late_is_told(world: World) -> None:
    with world.db.tx() as tx:
        n = new_network(tx, world, "p", NetworkWish(name="n"))
        again = store.change(tx, n, 5.0, name="m")
        assert again is not None and again.revision == n.revision + 1 and again.updated_at == 5.0
        assert store.change(tx, n, 6.0, name="o") is None
        assert store.get(tx, store.Network, n.id) == again


def test_case_matters_in_what_a_text_holds(world: World) -> None:
    with world.db.read() as tx:
        assert tx.scalar(sa.select(store.holds(sa.literal(",Red,"), sa.literal(",Red,"))))
        assert not tx.scalar(sa.select(store.holds(sa.literal(",Red,"), sa.literal(",red,"))))


def test_the_first_networks_are_made_once(world: World) -> None:
    assert first.bootstrap(world, "p")
    assert not first.bootstrap(world, "p")
    with world.db.read() as tx:
        assert {n.name: n.shared for n in store.find(tx, store.Network)} == {"public": False, "private": True}
        (router,) = store.find(tx, store.Router)
        held = store.addresses_of(tx, [p.id for p in store.find(tx, store.Port)])
        outside = held[str(router.gateway_port_id)][0].address
        assert ipam.holds("172.24.4.0/24", outside) and outside != "172.24.4.1"
        assert {a.address for several in held.values() for a in several} >= {"10.0.0.1", "10.0.0.2"}


def test_a_share_whose_row_another_made_between_two_looks(world: World) -> None:
    """READ COMMITTED shows it to the second look; "Quota exceeded" was said of the first thing of a project."""

    class Between:
        """A transaction that another's commit falls into."""

        def __init__(self, tx: Tx) -> None:
            self.tx, self.asked = tx, 0

        def execute(self, *args: object) -> object:
            self.asked += 1
            if self.asked == 2:
                self.tx.execute(sa.insert(store.quotas).values(project_id="p", resource="port", used=1))
            return self.tx.execute(*args)  # type: ignore[call-overload]

    with world.db.tx() as tx:
        store.charge(Between(tx), "p", "port", 1, 3)  # type: ignore[arg-type]
        assert store.shares(tx, "p")["port"].used == 2
