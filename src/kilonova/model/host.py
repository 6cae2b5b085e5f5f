"""A host, as it describes itself: what it has, and what of it may be given out."""

from typing import Any, Literal

import msgspec


class Cell(msgspec.Struct, frozen=True):
    """A NUMA node of a host. `pages`: how many huge pages of each size in KiB it has; `siblings`: its cores, by their CPUs."""

    cpus: int
    memory_mb: int
    pages: dict[int, int] = {}
    ids: list[int] = []
    siblings: list[list[int]] = []
    socket: int | None = None  # None: it does not tell


class HostDevice(msgspec.Struct, frozen=True):
    """A device that can be given to servers, or several functions of one. In Placement it is a provider under its host.

    `functions`: their addresses; empty: just the device itself, or (mdev) devices that are made of it when they are wanted.
    """

    address: str  # 0000:81:00.0
    resource_class: str  # CUSTOM_PCI_10DE_1EB8, VGPU
    total: int = 1
    kind: Literal["pci", "mdev"] = "pci"
    functions: list[str] = []
    mdev_type: str = ""
    cell: int | None = None
    traits: list[str] = []


class HostFacts(msgspec.Struct, frozen=True):
    """What a host has, before anything is reserved. `cpu_info` as the hypervisors API shows it."""

    vcpus: int
    memory_mb: int
    disk_gb: int
    disk_free_gb: int
    hypervisor_type: str  # QEMU, KVM, fake
    hypervisor_version: int  # 7002022 is 7.2.22
    hypervisor_hostname: str
    cpu_info: dict[str, Any] = {}
    traits: list[str] = []
    virt_type: str = ""  # kvm, qemu; with the reason in `virt_why`
    virt_why: str = ""
    cells: list[Cell] = []  # empty: it does not tell
    metrics: dict[str, float] = {}  # what it measures of itself, by name
    connector: dict[str, Any] = {}  # who it is to a volume service: initiator, nqn …
    shared: list[int] = []  # CPUs that servers without CPUs of their own share; empty: all that are not `dedicated`
    dedicated: list[int] = []  # CPUs that are given to one server each
    devices: list[HostDevice] = []
    uptime: str = ""  # as `uptime` prints it; "": not known


class Stock(msgspec.Struct, frozen=True):
    """An inventory of one resource class (Placement API): (total - reserved) * allocation_ratio can be claimed."""

    resource_class: str
    total: int
    reserved: int = 0
    min_unit: int = 1
    max_unit: int = 2**31 - 1
    step_size: int = 1
    allocation_ratio: float = 1.0


class Place(msgspec.Struct, frozen=True):
    """Where a server can be: a host of the compute service, its hypervisor, and the provider to claim from."""

    host: str
    node: str
    provider: str
    zone: str = ""
    failures: int = 0  # builds that failed there, one after another
    shared: bool = False  # others share with it what is asked for: who claims looks at them, too
