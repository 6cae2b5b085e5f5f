"""A server, as the store keeps it and everybody hands it on. Moments are seconds since 1970."""

import functools
import hashlib

import msgspec

from kilonova.model.devices import Device
from kilonova.model.flavor import Flavor
from kilonova.model.machine import Keypair
from kilonova.model.states import VM


class Address(msgspec.Struct, frozen=True):
    """One address of a server's NIC; `floating` ones lead to it from outside."""

    address: str
    version: int = 4
    floating: bool = False


class Plug(msgspec.Struct, frozen=True):
    """A server's NIC as the API shows it: what the network service last said of its port.

    `ours`: we made the port and remove it with the server; else the caller brought it.
    """

    port_id: str
    network_id: str
    label: str  # the network's name, the key of `addresses`
    mac: str
    addresses: list[Address] = []
    security_groups: list[str] = []  # names
    tag: str | None = None
    ours: bool = True


class Wanted(msgspec.Struct, frozen=True):
    """A NIC somebody asked for."""

    network_id: str | None = None
    port_id: str | None = None
    fixed_ip: str | None = None
    tag: str | None = None


class Image(msgspec.Struct, frozen=True):
    """What a server was made of, as it was then. `id` "" for a server that boots from a volume."""

    id: str = ""
    name: str = ""
    disk_format: str = "raw"
    size_bytes: int = 0
    virtual_size_bytes: int = 0
    min_disk_gb: int = 0
    min_ram_mb: int = 0
    hash_algo: str = ""
    hash_value: str = ""
    properties: dict[str, str] = {}


class Server(msgspec.Struct, frozen=True):
    """One row. `generation` moves with every claim, `epoch` with every host: late tellers are known by them.

    `number` names it where UUIDs are too long: instance-0000002a, i-0000002a.
    """

    id: str
    project_id: str
    user_id: str
    name: str
    hostname: str
    flavor: Flavor
    vm_state: VM = VM.building
    task_state: str | None = None
    power_state: int = 0
    number: int = 0
    generation: int = 0
    epoch: int = 0
    description: str | None = None
    image: Image = Image()
    host: str | None = None
    node: str | None = None
    availability_zone: str | None = None  # asked for and pinned; None: anywhere
    plugs: list[Plug] = []
    devices: list[Device] = []  # volumes, and disks that flavor and image do not tell of
    tags: list[str] = []
    metadata: dict[str, str] = {}
    system_metadata: dict[str, str] = {}
    keypair: Keypair | None = None
    user_data: str | None = None
    config_drive: bool = False
    access_ip_v4: str = ""
    access_ip_v6: str = ""
    locked_by: str | None = None  # owner, admin
    locked_reason: str | None = None
    disk_config: str = "MANUAL"
    progress: int = 0
    launch_index: int = 0
    reservation_id: str = ""
    root_device: str = "/dev/vda"
    scheduler_hints: dict[str, msgspec.Raw] = {}
    trusted_certs: list[str] | None = None
    group_id: str | None = None  # the server group that it is a member of
    fault_run: str | None = None  # the run whose fault it shows
    created_at: float = 0
    updated_at: float | None = None
    launched_at: float | None = None
    terminated_at: float | None = None
    deleted_at: float | None = None

    @property
    def instance_name(self) -> str:
        return f"instance-{self.number:08x}"

    @property
    def volume_backed(self) -> bool:
        """Its root disk is a volume."""
        return any(d.boot_index == 0 and d.is_volume for d in self.devices)

    @property
    def has_volumes(self) -> bool:
        return any(d.is_volume for d in self.devices)

    @property
    def locked(self) -> bool:
        return self.locked_by is not None


@functools.lru_cache(10_000)
def host_id(project_id: str, host: str | None) -> str:
    """A host's name as tenants may see it: two servers on one host show the same, two projects do not."""
    return hashlib.sha224((project_id + host).encode()).hexdigest() if host else ""
