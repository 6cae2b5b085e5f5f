"""What a host holds, for who examines the whole cloud."""

from collections.abc import Callable
from typing import Any

from kilonova.compute.host import Host
from kilonova.compute.report import held
from kilonova.contracts.compute import Holdings, TellHoldings


def tell_holdings(host: Host, m: TellHoldings) -> Holdings:
    """The machines are asked for after what is busy, so that nothing falls between the two."""
    busy = sorted(host.acts)
    return Holdings([held(machine, whole=True) for machine in host.driver.machines()], busy)


HANDLERS: list[Callable[[Any, Any], Any]] = [tell_holdings]
