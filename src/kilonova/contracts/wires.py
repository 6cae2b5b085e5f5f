"""What a host's wires are told by our own network service, where the two are processes of different machines."""

import msgspec

from kilonova.kit.bus import Call, Contract
from kilonova.model.wiring import Wiring

wires = Contract("wires")


class Laid(msgspec.Struct, frozen=True):
    """It is so. `problems` are sentences for operators."""

    problems: list[str] = []


@wires
class Lay(Call[Laid], frozen=True):
    """The whole of a host's network, as it must be from now on. Of one `life` of who tells, a lower `number` is void."""

    wiring: Wiring
    life: str = ""
    number: int = 0


def at(host: str) -> str:
    """The address of a host's wires."""
    return f"{host}.wires"
