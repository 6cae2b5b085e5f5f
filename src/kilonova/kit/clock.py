"""Time, dice and ids, handed in. No component asks the machine for them, so a simulator can hold them all."""

import functools
import random
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What time is it, in seconds since 1970 (UTC), and let some of it pass."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class WallClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Ids:
    """Names nobody else has. From the machine's entropy, or from a seeded `random.Random`."""

    def __init__(self, dice: random.Random | None = None) -> None:
        self.dice = dice or random.SystemRandom()

    def uuid(self) -> str:
        """A random UUID (RFC 4122, version 4), with dashes."""
        n = self.dice.getrandbits(128) & ~_VERSION_BITS | _VERSION_4
        h = f"{n:032x}"  # what `uuid.UUID` says, in a fifth of its time: every request has one
        return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"

    def hex(self) -> str:
        """32 hex digits, the form of identity's ids."""
        return f"{self.dice.getrandbits(128):032x}"

    def request(self) -> str:
        return f"req-{self.uuid()}"

    def password(self, length: int = 12) -> str:
        """Without letters that look alike; at least one of each: capital, small, digit."""
        kinds = "23456789", "ABCDEFGHJKLMNPQRSTUVWXYZ", "abcdefghijkmnopqrstuvwxyz"
        letters = [self.dice.choice(k) for k in kinds]
        letters += [self.dice.choice("".join(kinds)) for _ in range(max(0, length - len(letters)))]
        self.dice.shuffle(letters)
        return "".join(letters)


_VERSION_BITS = 0xF000 << 64 | 0xC000 << 48
_VERSION_4 = 0x4000 << 64 | 0x8000 << 48


def iso(at: float | None) -> str | None:
    """`2026-11-20T12:00:00Z`, as the Compute API writes moments."""
    return None if at is None else f"{_second(int(at))}Z"


def iso_us(at: float | None) -> str | None:
    """`2026-11-20T12:00:00.000000`: where the Compute API keeps the fraction and no zone."""
    return None if at is None else f"{_second(int(at))}.{int(at % 1 * 1e6):06}"


@functools.lru_cache(4096)
def _second(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def parsed(text: str) -> float:
    """A moment in ISO 8601, as seconds since 1970; without a zone it is UTC. Raises ValueError."""
    at = datetime.fromisoformat(text)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
