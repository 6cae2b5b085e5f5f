"""msgspec learns a Struct when it first decodes one, and two threads must not be there at the same time.

While one thread learns it, another finds it half learnt, and the process dies of a NULL pointer (msgspec 0.22, with
the GIL as well).  So a process learns all its Structs before it has threads.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec


def learn() -> int:
    """All Structs that are imported now; how many. Cheap for those that are known already."""
    kinds = list(_below(msgspec.Struct))
    for kind in kinds:
        with contextlib.suppress(TypeError, NameError):  # some are only ever encoded, and cannot be decoded
            msgspec.json.Decoder(kind)
    return len(kinds)


def _below(kind: type[Any]) -> Iterator[type[Any]]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)
