"""What a handler is given of the host that was told."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from kilonova.compute.relay import Relay
from kilonova.kit.clock import Clock
from kilonova.model.options import Compute
from kilonova.virt.driver import POWER_NUMBERS, Driver, Sends


class Host(Protocol):
    """Who is told: `compute.agent.ComputeHost`. `epochs` are those of its machines, `acts` what is being done, by server."""

    name: str
    driver: Driver
    clock: Clock
    options: Compute
    images: Sends | None
    epochs: dict[str, int]
    acts: dict[str, str]
    abandoned: set[str]
    relay: Relay | None

    @property
    def builds(self) -> AbstractContextManager[None]: ...

    def at_work(self, server: str, act: str) -> AbstractContextManager[None]: ...

    def progress(self, server: str) -> Callable[[str], None]: ...

    def say(self, message: msgspec.Struct) -> None:
        """To the conductors, unasked."""
        ...


def power_of(host: Host, id: str) -> int:
    """In the Compute API's numbers. Raises NotFound."""
    return POWER_NUMBERS[host.driver.power(id)]


def met_again(host: Host, id: str) -> None:
    """Which epoch is here after an act that may have brought, kept or removed one."""
    newest = [m.epoch for m in host.driver.machines() if m.id == id]
    if newest:
        host.epochs[id] = newest[-1]
    else:
        host.epochs.pop(id, None)
