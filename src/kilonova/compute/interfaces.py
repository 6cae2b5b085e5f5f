"""NICs that come and go while a machine is here."""

from collections.abc import Callable
from typing import Any

from kilonova.compute.host import Host, power_of
from kilonova.contracts.compute import AttachNic, DetachNic, Done
from kilonova.kit.errors import NotFound, Unsupported
from kilonova.virt.driver import Hotplugs


def attach_nic(host: Host, m: AttachNic) -> Done:
    with host.at_work(m.server, "attach_nic"):
        hotplugs(host).attach_nic(m.server, m.nic)
        return Done(power_of(host, m.server))


def detach_nic(host: Host, m: DetachNic) -> Done:
    """Where there is no such machine (any longer), or none can be plugged into, there is nothing to take out."""
    with host.at_work(m.server, "detach_nic"):
        timeout_s = m.timeout_s if m.timeout_s >= 0 else host.options.detach_timeout_s
        if not m.anyway or isinstance(host.driver, Hotplugs):
            hotplugs(host).detach_nic(m.server, m.port_id, timeout_s, m.anyway)
        try:
            return Done(power_of(host, m.server))
        except NotFound:
            return Done()


def hotplugs(host: Host) -> Hotplugs:
    """Its driver, if it can. Raises Unsupported."""
    if not isinstance(host.driver, Hotplugs):
        raise Unsupported("The requested functionality is not supported.")
    return host.driver


HANDLERS: list[Callable[[Any, Any], Any]] = [attach_nic, detach_nic]
