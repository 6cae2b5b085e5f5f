"""Devices of a guest that runs: found in libvirt's words, put in, and asked for back.

Each is an act on a live domain that may be done twice: it looks first.
"""

from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

Element = ElementTree.Element
Find = Callable[[Element], Element | None]  # a device, in the definition of a domain

RETRY_S = 5.0  # a guest that was still booting did not hear the first time


def nic(device: str) -> Find:
    """The NIC at this tap."""

    def find(domain: Element) -> Element | None:
        return next((e for e in domain.iter("interface") if _at(e, "target", "dev") == device), None)

    return find


def disk(device: str, serial: str) -> Find:
    """The disk of that name in the guest's view; or with that serial, where the name is not known."""

    def find(domain: Element) -> Element | None:
        if device:
            return next((e for e in domain.iter("disk") if _at(e, "target", "dev") == device), None)
        return next((e for e in domain.iter("disk") if e.findtext("serial") == serial), None)

    return find


def here(domain: Any, find: Find) -> Element | None:
    """As the guest has it now; None where it does not run or has no such device."""
    if not domain.isActive():
        return None
    return find(ElementTree.fromstring(domain.XMLDesc(0)))  # noqa: S314  (libvirt's own output)


def plug(lib: Any, domain: Any, find: Find, text: str) -> None:
    """Put it in, if the guest runs and does not have it."""
    if domain.isActive() and here(domain, find) is None:
        domain.attachDeviceFlags(text, lib.VIR_DOMAIN_AFFECT_LIVE)


def ask_back(lib: Any, domain: Any, find: Find) -> bool:
    """Ask the guest to let go of it; libvirt waits some seconds itself. Is it gone?"""
    device = here(domain, find)
    if device is None:
        return True
    try:
        domain.detachDeviceFlags(ElementTree.tostring(device, encoding="unicode"), lib.VIR_DOMAIN_AFFECT_LIVE)
    except lib.libvirtError as e:
        # It may have gone between the look and the deed, or libvirt may still wait for the guest's word.
        if e.get_error_code() not in (lib.VIR_ERR_DEVICE_MISSING, lib.VIR_ERR_OPERATION_FAILED):
            raise
    return here(domain, find) is None


def mirrored(lib: Any, domain: Any, device: str, path: str, text: str) -> bool:
    """One step of moving a disk to another place (`text`) under the guest's hands. True: it is there."""
    found = here(domain, disk(device, ""))
    if found is None or path in (_at(found, "source", "file"), _at(found, "source", "dev")):
        return True
    mirror = found.find("mirror")
    if mirror is None:
        flags = lib.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT | lib.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        domain.blockCopy(device, text, {}, flags)
    elif mirror.get("ready") == "yes":
        domain.blockJobAbort(device, lib.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    return False


def unmirror(lib: Any, domain: Any, device: str) -> None:
    """Give the move up; the disk stays where it was."""
    found = here(domain, disk(device, ""))
    if found is not None and found.find("mirror") is not None:
        domain.blockJobAbort(device, 0)


def _at(element: Element, tag: str, name: str) -> str | None:
    inner = element.find(tag)
    return None if inner is None else inner.get(name)
