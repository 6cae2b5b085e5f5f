"""What a scheduler may be asked: where could this server live? A question, never journaled by who answers it."""

import msgspec

from kilonova.kit.bus import Call, Contract
from kilonova.model.ask import Ask
from kilonova.model.host import Place

scheduler = Contract("scheduler")


class Chosen(msgspec.Struct, frozen=True):
    """The best first, then alternates; empty: nowhere. `why` says how many hosts each rule turned away.

    `weights`: of each place, what each taste gave it; a taste that is not named there liked all alike.
    """

    places: list[Place] = []
    why: dict[str, int] = {}
    hosts: int = 0  # how many there are to choose from
    outside: bool = False  # another Placement service was asked, and will be told
    weights: list[dict[str, float | None]] = []

    def explained(self) -> str:
        """For operators: why there was none."""
        if not self.hosts:
            return "There are no hosts."
        told = ", ".join(f"{name} turned away {n}" for name, n in self.why.items())
        return f"Of {self.hosts} host{'s' * (self.hosts > 1)}: {told or 'nothing turned away any; none had it all'}."


@scheduler
class Choose(Call[Chosen], frozen=True):
    """Where could it live? At most so many places. `fresh`: what was said a moment ago was wrong, look at all claims."""

    server: str
    ask: Ask
    most: int = 3
    fresh: bool = False
