"""Consoles: what there may be, and where one is."""

from typing import Literal

import msgspec

Kind = Literal["vnc", "spice", "serial"]

# Type of the Compute API → (its protocol, what a hypervisor must have for it; None: no hypervisor of ours has it)
TYPES: dict[str, tuple[str, Kind | None]] = {
    "novnc": ("vnc", "vnc"),
    "xvpvnc": ("vnc", None),
    "spice-html5": ("spice", "spice"),
    "spice-direct": ("spice", "spice"),
    "rdp-html5": ("rdp", None),
    "serial": ("serial", "serial"),
    "webmks": ("mks", None),
}


class Where(msgspec.Struct, frozen=True):
    """A socket file of the host itself, or an address that others reach as well; with a `key`, it is said first there."""

    path: str = ""
    host: str = ""
    port: int = 0
    tls_port: int | None = None
    key: str = ""
    tls: bool = False  # it speaks TLS before all else

    def __repr__(self) -> str:
        return f"Where({self.path or f'{self.host}:{self.port}'})"
