"""Images that a host has before a server needs them."""

from collections.abc import Callable
from typing import Any

from kilonova.compute.capture import able
from kilonova.compute.host import Host
from kilonova.contracts.compute import Done, Precache
from kilonova.virt.driver import Precaches


def precache(host: Host, m: Precache) -> Done:
    driver: Precaches = able(host, Precaches, "keep images")  # type: ignore[type-abstract]
    driver.precache(m.image)
    return Done()


HANDLERS: list[Callable[[Any, Any], Any]] = [precache]
