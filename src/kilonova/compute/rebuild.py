"""What a host does to make a machine anew in its place."""

from collections.abc import Callable
from typing import Any

from kilonova.compute.capture import able
from kilonova.compute.host import Host, power_of
from kilonova.contracts.compute import Done, Rebuild
from kilonova.kit.errors import Refused
from kilonova.virt.driver import Rebuilds


def rebuild(host: Host, m: Rebuild) -> Done:
    """A machine older than the one that is here comes from a sender whose time is over."""
    driver: Rebuilds = able(host, Rebuilds, "rebuild servers")  # type: ignore[type-abstract]
    machine = m.machine
    if host.epochs.get(machine.id, machine.epoch) > machine.epoch:
        raise Refused("This host has a newer machine of that server.", why=f"{machine.id}: {machine.epoch}")
    with host.at_work(machine.id, "rebuild"), host.builds:
        driver.rebuild(machine, host.progress(machine.id))
        host.epochs[machine.id] = machine.epoch
        return Done(power_of(host, machine.id))


HANDLERS: list[Callable[[Any, Any], Any]] = [rebuild]
