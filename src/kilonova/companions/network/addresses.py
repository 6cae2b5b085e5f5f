"""Giving addresses to ports: `ipam` chooses, the table says who has one."""

from collections.abc import Iterable, Sequence

from kilonova.companions import ipam
from kilonova.companions.network import frame
from kilonova.companions.network.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict
from kilonova.store import networks as store
from kilonova.store.networks import Address

LOTS = 2  # drawn blindly before the taken addresses are read


def grounds(subnets: Iterable[store.Subnet]) -> list[ipam.Ground]:
    return [
        ipam.Ground(s.id, s.cidr, s.ip_version, s.allocation_pools, s.ipv6_address_mode or s.ipv6_ra_mode)
        for s in subnets
    ]


def grant(
    tx: Tx,
    world: World,
    network_id: str,
    subnets: Iterable[store.Subnet],
    port: tuple[str, str],
    wanted: Sequence[Sequence[ipam.Slot]],
    first: int = 0,
) -> list[Address]:
    """An address for each slot; `port` is (id, MAC), `first` the place of the first address in the port's order.

    A slot is a list of choices, tried from the left. Raises Conflict where the very address is taken, or none is
    left; NoCapacity is not said, for the API has no such word.
    """
    known = {g.id: g for g in grounds(subnets)}
    got: list[Address] = []
    for place, choices in enumerate(wanted, first):
        found = None
        for slot in choices:
            found = _one(tx, world, known[slot.subnet_id], slot, port, place)
            if found is not None:
                got.append(Address(slot.subnet_id, found))
                break
        if found is None:
            _none(network_id, choices)
    return got


def _one(tx: Tx, world: World, ground: ipam.Ground, slot: ipam.Slot, port: tuple[str, str], place: int) -> str | None:
    id, mac = port
    only = ipam.eui64(ground.cidr, mac) if ground.automatic and slot.address is None else slot.address
    if only is not None:
        return only if store.take(tx, id, ground.id, only, place) else None
    for _ in range(LOTS):
        lot = ipam.any_of(ground.pools, world.ids.dice)
        if lot is not None and store.take(tx, id, ground.id, lot, place):
            return lot
    free = ipam.any_of(ground.pools, world.ids.dice, store.taken(tx, ground.id))
    return free if free is not None and store.take(tx, id, ground.id, free, place) else None


def _none(network_id: str, choices: Sequence[ipam.Slot]) -> None:
    asked = choices[0].address
    if asked is not None:
        raise Conflict(
            f"IP address {asked} already allocated in subnet {choices[0].subnet_id}", code="IpAddressAlreadyAllocated"
        )
    raise Conflict(f"No more IP addresses available on network {network_id}.", code="IpAddressGenerationFailure")


def service_port(
    world: World, network: store.Network, device_owner: str, device_id: str, project: str, name: str = ""
) -> store.Port:
    """A port of our own: DHCP's, a router's, a floating IP's. It counts against nobody's share."""
    home = world.home if device_owner != "network:floatingip" else ""
    return store.Port(
        **frame.made(world, project),
        name=name,
        description="",
        network_id=network.id,
        mac_address=ipam.mac(world.ids.dice),
        admin_state_up=True,
        status="N/A" if device_owner == "network:floatingip" else "ACTIVE",
        device_id=device_id,
        device_owner=device_owner,
        port_security_enabled=False,
        allowed_address_pairs=[],
        dns_name="",
        dns_domain="",
        binding_host_id=home,
        binding_vif_type="bridge" if home else "unbound",
        binding_vnic_type="normal",
        binding_profile={},
        charged=False,
    )
