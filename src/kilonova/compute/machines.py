"""What a host does with machines when it is told: each handler is one act on the driver, safe to do twice."""

import logging
from collections.abc import Callable
from typing import Any

import msgspec

from kilonova.compute import (
    attach,
    capture,
    examine,
    interfaces,
    live_migrate,
    precache,
    rebuild,
    rescue,
    resize,
    shares,
    volume_snapshots,
)
from kilonova.compute.host import Host, power_of
from kilonova.contracts.compute import Abandon, ConsoleLog, Destroy, Done, FindConsole, Look, Power, Seen, Spawn, Text
from kilonova.kit.errors import NotFound, Refused, Trouble, Unsupported
from kilonova.model.console import Where
from kilonova.virt.driver import Consoles, Driver, Held, Migrates

log = logging.getLogger(__name__)


def spawn(host: Host, m: Spawn) -> Done:
    """A machine older than the one that is here comes from a sender whose time is over."""
    machine = m.machine
    if host.epochs.get(machine.id, machine.epoch) > machine.epoch:
        raise Refused("This host has a newer machine of that server.", why=f"{machine.id}: {machine.epoch}")
    with host.at_work(machine.id, "spawn"), host.builds:
        if host.epochs.get(machine.id, machine.epoch) < machine.epoch:
            host.driver.destroy(machine.id)  # of a time when it was here before, and nobody came to sweep it
        host.driver.spawn(machine, host.progress(machine.id))
        host.epochs[machine.id] = machine.epoch
        return Done(power_of(host, machine.id))


def destroy(host: Host, m: Destroy) -> Done:
    if m.epoch is not None and host.epochs.get(m.server, -1) > m.epoch:
        return Done()  # what he means is gone, and what is here is another's
    with host.at_work(m.server, "destroy"):
        host.driver.destroy(m.server)
        host.epochs.pop(m.server, None)
        return Done()


def power(host: Host, m: Power) -> Done:
    """A refusal says in its code how the machine is now: what a failed reboot means depends on that."""
    with host.at_work(m.server, m.to):
        try:
            ACTS[m.to](host.driver, m, m.timeout_s if m.timeout_s >= 0 else host.options.shutdown_timeout_s)
        except Trouble as e:
            raise type(e)(e.said, why=e.why, code=e.code or _how(host, m.server)) from e
        except Exception as e:
            log.exception("%s of %s failed", m.to, m.server)
            raise Refused(f"The host failed ({type(e).__name__}).", code=_how(host, m.server)) from e
        return Done(power_of(host, m.server))


# Acts that look between their stages whether they are wanted.
STAGED = frozenset({"spawn", "arrive", "rebuild", "rescue", "freeze", "upload"})
ACTS: dict[str, Callable[[Driver, Power, float], None]] = {
    "start": lambda d, m, _: d.start(m.server),
    "stop": lambda d, m, timeout_s: d.stop(m.server, timeout_s),
    "reboot": lambda d, m, timeout_s: d.reboot(m.server, False, timeout_s),
    "hard_reboot": lambda d, m, _: d.reboot(m.server, True, 0),
    "pause": lambda d, m, _: d.pause(m.server),
    "unpause": lambda d, m, _: d.unpause(m.server),
    "suspend": lambda d, m, _: d.suspend(m.server),
    "resume": lambda d, m, _: d.resume(m.server),
}


def look(host: Host, m: Look) -> Seen:
    try:
        held = [h for h in host.driver.machines() if h.id == m.server]
        kept = held[0].epoch if len(held) > 1 else None
        copies = [image for h in held for image in h.captures]
        seen = Seen(True, power_of(host, m.server), host.epochs.get(m.server, 0), kept, copies)
        return msgspec.structs.replace(seen, **_parts(held[-1])) if held else seen
    except NotFound:
        return Seen(False)


def _parts(m: Held) -> dict[str, Any]:
    return {"ports": m.ports, "volumes": m.volumes, "shares": m.shares}


def abandon(host: Host, m: Abandon) -> Done:
    """A build stops at its next stage; a guest that is asked to end itself is not waited for any longer, nor one that is sent."""
    act = host.acts.get(m.server)
    if act in STAGED:
        host.abandoned.add(m.server)
    elif act in ("stop", "reboot", "depart"):
        host.driver.stop(m.server, 0)
    elif act == "send" and isinstance(host.driver, Migrates):
        host.driver.stop_sending(m.server)
    return Done()


def console_log(host: Host, m: ConsoleLog) -> Text:
    """`lines`: so many of the last ones; None or negative: all that is kept."""
    try:
        text = host.driver.console_log(m.server).decode(errors="replace")
    except NotImplementedError:
        raise Unsupported("This host keeps no console log.") from None
    if m.lines is not None and m.lines >= 0:
        text = "\n".join(text.split("\n")[-m.lines :]) if m.lines else ""
    return Text(text)


def find_console(host: Host, m: FindConsole) -> Where:
    driver: Consoles = capture.able(host, Consoles, "show consoles")  # type: ignore[type-abstract]
    found = driver.console(m.server, m.kind)
    return host.relay.door(found) if host.relay is not None and found.path else found


HANDLERS: list[Callable[[Any, Any], Any]] = [
    spawn, destroy, power, look, abandon, *interfaces.HANDLERS, *resize.HANDLERS, *live_migrate.HANDLERS,
    *attach.HANDLERS, *capture.HANDLERS, *rebuild.HANDLERS, *rescue.HANDLERS, *precache.HANDLERS,
    *volume_snapshots.HANDLERS, *shares.HANDLERS,
    *examine.HANDLERS,
]  # fmt: skip
QUESTIONS: list[Callable[[Any, Any], Any]] = [console_log, find_console, *rescue.QUESTIONS]


def _how(host: Host, id: str) -> str:
    try:
        return host.driver.power(id)
    except Exception:
        return "nostate"
