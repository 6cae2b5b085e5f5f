"""A flavor: the size of a server. A server keeps the flavor it was made with, whatever becomes of the original."""

import msgspec


class Alias(msgspec.Struct, frozen=True):
    """What an operator means by a name of PCI devices: so many of that class, one after the other, with these traits."""

    resource_class: str
    traits: list[str] = []
    numa_policy: str = ""


class Flavor(msgspec.Struct, frozen=True):
    """`id` is the API's flavorid. RAM in MiB, disks in GiB, swap in MiB (Compute API, flavors)."""

    id: str
    name: str
    vcpus: int
    memory_mb: int
    disk_gb: int
    ephemeral_gb: int = 0
    swap_mb: int = 0
    rxtx_factor: float = 1.0
    is_public: bool = True
    disabled: bool = False
    description: str | None = None
    extra_specs: dict[str, str] = {}
    aliases: dict[str, Alias] = {}  # what those in `pci_passthrough:alias` meant when the server was made
