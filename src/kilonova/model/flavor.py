"""A flavor: the size of a server. A server keeps the flavor it was made with, whatever becomes of the original."""

import msgspec


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
