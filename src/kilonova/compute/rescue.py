"""What a host does for a guest that is in need: another system for a while, a password, a dump; and how it is doing."""

from collections.abc import Callable
from typing import Any

from kilonova.compute.capture import able
from kilonova.compute.host import Host, power_of
from kilonova.contracts.compute import CrashDump, Diagnose, Done, Rescue, SetPassword, Stats, Unrescue
from kilonova.virt.driver import Attends, Rescues


def rescue(host: Host, m: Rescue) -> Done:
    driver: Rescues = able(host, Rescues, "rescue servers")  # type: ignore[type-abstract]
    with host.at_work(m.server, "rescue"):
        driver.rescue(m.server, m.disk, m.stable, m.admin_password, host.progress(m.server))
        return Done(power_of(host, m.server))


def unrescue(host: Host, m: Unrescue) -> Done:
    driver: Rescues = able(host, Rescues, "rescue servers")  # type: ignore[type-abstract]
    with host.at_work(m.server, "unrescue"):
        driver.unrescue(m.server)
        return Done(power_of(host, m.server))


def set_password(host: Host, m: SetPassword) -> Done:
    driver: Attends = able(host, Attends, "set passwords")  # type: ignore[type-abstract]
    driver.set_password(m.server, m.password)
    return Done(power_of(host, m.server))


def crash_dump(host: Host, m: CrashDump) -> Done:
    driver: Attends = able(host, Attends, "trigger crash dumps")  # type: ignore[type-abstract]
    driver.crash_dump(m.server)
    return Done(power_of(host, m.server))


def diagnose(host: Host, m: Diagnose) -> Stats:
    driver: Attends = able(host, Attends, "tell how a server is doing")  # type: ignore[type-abstract]
    return driver.stats(m.server)


HANDLERS: list[Callable[[Any, Any], Any]] = [rescue, unrescue, set_password, crash_dump]
QUESTIONS: list[Callable[[Any, Any], Any]] = [diagnose]
