"""Cold moves, as a host sees them: one is turned off and kept, another made of its disks; and back, or dropped."""

from collections.abc import Callable
from typing import Any

from kilonova.compute.host import Host, met_again, power_of
from kilonova.contracts.compute import Arrive, Depart, Done, Drop, Luggage, Prepare, Return, Stay
from kilonova.kit.errors import Refused, Unsupported
from kilonova.virt.driver import POWER_NUMBERS, Power, Resizes

POWERS: dict[int, Power] = {n: name for name, n in POWER_NUMBERS.items()}  # type: ignore[misc]


def prepare(host: Host, m: Prepare) -> Done:
    _able(host).prepare(m.machine)
    return Done()


def depart(host: Host, m: Depart) -> Luggage:
    with host.at_work(m.server, "depart"):
        patience_s = m.timeout_s if m.timeout_s >= 0 else host.options.shutdown_timeout_s
        luggage = _able(host).depart(m.server, m.epoch, patience_s)
        met_again(host, m.server)
        return luggage


def arrive(host: Host, m: Arrive) -> Done:
    """A newer machine means that the sender's time is over; an older one that is not kept is of no use to anybody."""
    machine = m.machine
    here = host.epochs.get(machine.id, machine.epoch)
    if here > machine.epoch:
        raise Refused("This host has a newer machine of that server.", why=f"{machine.id}: {machine.epoch}")
    with host.at_work(machine.id, "arrive"), host.builds:
        if here not in (machine.epoch, m.beside):
            host.driver.destroy(machine.id)
        _able(host).arrive(machine, m.luggage, m.start, host.progress(machine.id))
        met_again(host, machine.id)
        return Done(power_of(host, machine.id))


def come_back(host: Host, m: Return) -> Done:
    with host.at_work(m.machine.id, "return"):
        _able(host).come_back(m.machine, m.was, m.start)
        met_again(host, m.machine.id)
        return Done(power_of(host, m.machine.id))


def stay(host: Host, m: Stay) -> Done:
    """Takes something back, so it never refuses; where nothing can go, everything stays."""
    if isinstance(host.driver, Resizes):
        with host.at_work(m.server, "stay"):
            host.driver.stay(m.server, POWERS[m.power_state])
    return Done()


def drop(host: Host, m: Drop) -> Done:
    if isinstance(host.driver, Resizes):
        with host.at_work(m.server, "drop"):
            host.driver.drop(m.server, m.epoch)
            met_again(host, m.server)
    return Done()


def _able(host: Host) -> Resizes:
    if not isinstance(host.driver, Resizes):
        raise Unsupported("The hypervisor of this host cannot move a server.")
    return host.driver


HANDLERS: list[Callable[[Any, Any], Any]] = [prepare, depart, arrive, come_back, stay, drop]
