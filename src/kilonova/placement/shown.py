"""Providers as allocation candidates show them, in bytes that are made once: thousands are shown, and few of them move."""

from collections.abc import Sequence
from typing import Any

import msgspec

from kilonova.model.candidates import Provider

MOST = 100_000  # providers that are remembered
VERSIONS = (27, 29)  # what is shown grew with them; of older versions nothing is kept

Piece = tuple[bytes, bytes]
"""`"<uuid>"`, and `,"<uuid>": {…}`."""


class Shown:
    """Any number of threads may ask. A piece is of the very provider that it was made of: one that moved is another."""

    def __init__(self) -> None:
        self.pieces: dict[int, dict[Provider, Piece]] = {v: {} for v in VERSIONS}
        self.last: dict[int, dict[str, Provider]] = {v: {} for v in VERSIONS}  # the one whose piece is kept
        self.traits: dict[frozenset[str], msgspec.Raw] = {}  # thousands of hosts have few kinds of them

    def of(self, providers: Sequence[Provider], version: int) -> list[Piece]:
        """Of each, as of 1.27 and later."""
        since = 29 if version >= 29 else 27
        known = self.pieces[since]
        found = list(map(known.get, providers))
        if None in found:
            return [piece or self._made(p, since) for p, piece in zip(providers, found, strict=True)]
        return found  # type: ignore[return-value]  # none of them is None

    def _made(self, p: Provider, since: int) -> Piece:
        pieces, last = self.pieces[since], self.last[since]
        if len(pieces) >= MOST:
            pieces.clear()
            last.clear()
        name = msgspec.json.encode(p.uuid)
        piece = pieces[p] = name, b",%b:%b" % (name, msgspec.json.encode(self._summary(p, since)))
        before, last[p.uuid] = last.get(p.uuid), p
        if before is not None and before is not p:
            pieces.pop(before, None)
        return piece

    def _summary(self, p: Provider, since: int) -> dict[str, Any]:
        traits = self.traits.get(p.traits)
        if traits is None:
            if len(self.traits) >= MOST:
                self.traits.clear()
            traits = self.traits[p.traits] = msgspec.Raw(msgspec.json.encode(list(p.traits)))
        stocks = {name: {"capacity": i.capacity, "used": i.used} for name, i in p.inventories.items()}
        tree = {"parent_provider_uuid": p.parent, "root_provider_uuid": p.root} if since >= 29 else {}
        return {"resources": stocks, "traits": traits} | tree
