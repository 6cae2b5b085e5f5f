"""Volumes that come and go while a machine is here."""

from collections.abc import Callable
from typing import Any

from kilonova.compute.host import Host, power_of
from kilonova.compute.interfaces import hotplugs
from kilonova.contracts.compute import AttachVolume, DetachVolume, Done, ExtendVolume, SwapVolume
from kilonova.kit.errors import NotFound


def attach_volume(host: Host, m: AttachVolume) -> Done:
    with host.at_work(m.server, "attach_volume"):
        hotplugs(host).attach_volume(m.server, m.disk)
        return Done(power_of(host, m.server))


def detach_volume(host: Host, m: DetachVolume) -> Done:
    """Where there is no such machine (any longer) there is nothing to take out."""
    with host.at_work(m.server, "detach_volume"):
        timeout_s = m.timeout_s if m.timeout_s >= 0 else host.options.detach_timeout_s
        hotplugs(host).detach_volume(m.server, m.volume_id, timeout_s, m.anyway)
        try:
            return Done(power_of(host, m.server))
        except NotFound:
            return Done()


def extend_volume(host: Host, m: ExtendVolume) -> Done:
    with host.at_work(m.server, "extend_volume"):
        hotplugs(host).extend_volume(m.server, m.volume_id, m.size_bytes)
        return Done(power_of(host, m.server))


def swap_volume(host: Host, m: SwapVolume) -> Done:
    with host.at_work(m.server, "swap_volume"):
        hotplugs(host).swap_volume(m.server, m.volume_id, m.disk)
        return Done(power_of(host, m.server))


HANDLERS: list[Callable[[Any, Any], Any]] = [attach_volume, detach_volume, extend_volume, swap_volume]
