"""Guests that move while they run: the target waits, the source sends, and if they disagree the target decides."""

from collections.abc import Callable
from typing import Any

from kilonova.compute.host import Host, met_again, power_of
from kilonova.contracts.compute import (
    CloseLanding,
    Done,
    Hurry,
    Land,
    Landed,
    Landing,
    PrepareLanding,
    SendAway,
)
from kilonova.contracts.conductor import Sending
from kilonova.kit.errors import Refused, Unsupported
from kilonova.virt.driver import Migrates


def prepare_landing(host: Host, m: PrepareLanding) -> Landing:
    machine = m.machine
    here = host.epochs.get(machine.id, machine.epoch)
    if here > machine.epoch:
        raise Refused("This host has a newer machine of that server.", why=f"{machine.id}: {machine.epoch}")
    with host.at_work(machine.id, "prepare"):
        if here < machine.epoch:
            host.driver.destroy(machine.id)
        landing = _able(host).prepare_landing(machine)
        met_again(host, machine.id)
        return landing


def send_away(host: Host, m: SendAway) -> Done:
    def tell(how_far: dict[str, int]) -> None:
        host.say(Sending(host.name, m.server, host.clock.now(), **how_far))

    with host.at_work(m.server, "send"):
        _able(host).send(m.server, m.landing, m.epoch, m.block, tell)
        return Done()


def hurry(host: Host, m: Hurry) -> Done:
    if host.acts.get(m.server) == "send":
        _able(host).hurry(m.server)
    return Done()


def close_landing(host: Host, m: CloseLanding) -> Landed:
    with host.at_work(m.server, "close"):
        there = _able(host).close_landing(m.server, m.epoch)
        met_again(host, m.server)
        return Landed(there, power_of(host, m.server) if there else 0)


def land(host: Host, m: Land) -> Done:
    with host.at_work(m.machine.id, "land"):
        _able(host).land(m.machine)
        met_again(host, m.machine.id)
        return Done(power_of(host, m.machine.id))


def _able(host: Host) -> Migrates:
    if not isinstance(host.driver, Migrates):
        raise Unsupported("The hypervisor of this host cannot move a running server.")
    return host.driver


HANDLERS: list[Callable[[Any, Any], Any]] = [prepare_landing, send_away, hurry, close_landing, land]
