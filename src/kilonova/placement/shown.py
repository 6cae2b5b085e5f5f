"""Providers as allocation candidates show them, in bytes that are made once: thousands are shown, and few of them move."""

from typing import Any

import msgspec

from kilonova.model.candidates import Provider

MOST = 100_000  # providers that are remembered
VERSIONS = (27, 29)  # what is shown grew with them; of older versions nothing is kept


class Shown:
    """One for each version that shows something else. A piece is right as long as its provider is the very same."""

    def __init__(self) -> None:
        self.pieces: dict[int, dict[str, tuple[Provider, bytes]]] = {v: {} for v in VERSIONS}
        self.traits: dict[frozenset[str], msgspec.Raw] = {}  # thousands of hosts have few kinds of them

    def summary(self, p: Provider, version: int) -> bytes:
        """`"<uuid>": {…}`, as of 1.27 and later."""
        pieces = self.pieces[29 if version >= 29 else 27]
        known = pieces.get(p.uuid)
        if known is not None and known[0] is p:
            return known[1]
        made = msgspec.json.encode(p.uuid) + b":" + msgspec.json.encode(self._summary(p, version))
        if len(pieces) >= MOST:
            pieces.clear()
        pieces[p.uuid] = p, made
        return made

    def _summary(self, p: Provider, version: int) -> dict[str, Any]:
        traits = self.traits.get(p.traits)
        if traits is None:
            if len(self.traits) >= MOST:
                self.traits.clear()
            traits = self.traits[p.traits] = msgspec.Raw(msgspec.json.encode(list(p.traits)))
        stocks = {name: {"capacity": i.capacity, "used": i.used} for name, i in p.inventories.items()}
        tree = {"parent_provider_uuid": p.parent, "root_provider_uuid": p.root} if version >= 29 else {}
        return {"resources": stocks, "traits": traits} | tree
