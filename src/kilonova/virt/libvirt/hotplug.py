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


def _at(element: Element, tag: str, name: str) -> str | None:
    inner = element.find(tag)
    return None if inner is None else inner.get(name)
