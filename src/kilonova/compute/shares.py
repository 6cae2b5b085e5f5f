"""Shared file systems that a machine of this host is given, or loses."""

from collections.abc import Callable
from typing import Any

from kilonova.compute.capture import able
from kilonova.compute.host import Host, power_of
from kilonova.contracts.compute import AttachShare, DetachShare, Done
from kilonova.kit.errors import NotFound, Refused
from kilonova.virt.driver import Mounts


def attach_share(host: Host, m: AttachShare) -> Done:
    with host.at_work(m.server, "attach_share"):
        try:
            _mounts(host).attach_share(m.server, m.share)
        except (NotFound, Refused):
            if not m.anyway:
                raise
            return Done()
        return Done(power_of(host, m.server))


def detach_share(host: Host, m: DetachShare) -> Done:
    """Where there is no such machine (any longer) there is nothing to let go of."""
    with host.at_work(m.server, "detach_share"):
        _mounts(host).detach_share(m.server, m.share_id, m.anyway)
        try:
            return Done(power_of(host, m.server))
        except NotFound:
            return Done()


def _mounts(host: Host) -> Mounts:
    found: Mounts = able(host, Mounts, "have shared file systems")  # type: ignore[type-abstract]
    return found


HANDLERS: list[Callable[[Any, Any], Any]] = [attach_share, detach_share]
