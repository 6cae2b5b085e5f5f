"""The machine is decided before a hypervisor is asked: all that a host must know to make it, and nothing else.

A `Machine` travels whole from the conductor to the host and lies there beside its disks: a host that restarts
reads it again and needs nobody.  `virt/*/xml.py` turns it into its hypervisor's words, purely.
"""

from typing import Any, Literal

import msgspec

from kilonova.model.seat import Seat

Bus = Literal["virtio", "scsi", "ide", "sata", "usb"]


class ImageSource(msgspec.Struct, frozen=True, tag="image"):
    """The bytes of an image; the host keeps one shared copy and lays an overlay on it."""

    image_id: str
    disk_format: Literal["raw", "qcow2", "iso", "vmdk", "vhd", "vhdx", "vdi", "ploop", "ami", "ari", "aki"]
    size_bytes: int
    hash_algo: str = ""  # e.g. "sha512"; with hash_value what the bytes must have, "" where the service has none
    hash_value: str = ""
    virtual_size_bytes: int = 0


class BlankSource(msgspec.Struct, frozen=True, tag="blank"):
    """Nothing on it; `format` is a file system to be made there, or "swap", or ""."""

    format: str = ""


class VolumeSource(msgspec.Struct, frozen=True, tag="volume"):
    """A volume, as its service says how to connect (block storage API, attachments, connection_info)."""

    volume_id: str
    connection_info: dict[str, Any] | None = None


class Disk(msgspec.Struct, frozen=True):
    """`device` is the name in the guest's view (vda); `size_bytes` what the guest sees, 0: as the source."""

    device: str
    source: ImageSource | BlankSource | VolumeSource
    size_bytes: int = 0
    bus: Bus = "virtio"
    kind: Literal["disk", "cdrom"] = "disk"
    boot_index: int | None = None
    serial: str = ""
    tag: str = ""
    delete_on_termination: bool = True


class Share(msgspec.Struct, frozen=True):
    """A shared file system that the host mounts and hands on; the guest mounts it by its `tag`.

    `export` as its service says it: ADDRESS:/path.  `user` and `key` are CephFS's.
    """

    share_id: str
    tag: str
    export: str
    proto: str = "NFS"
    user: str = ""
    key: str = ""

    def __repr__(self) -> str:
        return f"Share({self.share_id} as {self.tag})"  # without its key


class FixedIp(msgspec.Struct, frozen=True):
    """An address with what a guest must know of its subnet, enough for network_data.json."""

    address: str
    version: Literal[4, 6] = 4
    prefix: int = 24
    gateway: str | None = None
    dns: list[str] = []
    dhcp: bool = True
    mode: str = ""  # how guests get an IPv6 address (Network API): slaac, dhcpv6-stateful, dhcpv6-stateless
    routes: list[tuple[str, str]] = []  # (destination CIDR, next hop)
    floating: list[str] = []


class Nic(msgspec.Struct, frozen=True):
    """A port of the network service, bound to this host: how to plug it, and what the guest is told.

    `vif_type` and `details` are the service's words (port binding); `device` is the tap's name on the host.
    """

    port_id: str
    network_id: str
    mac: str
    device: str
    vif_type: str = "bridge"  # bridge, ovs, tap, user, unbound
    bridge: str = ""
    details: dict[str, str | int | bool] = {}
    network_name: str = ""
    mtu: int = 1500
    model: str = "virtio"
    ips: list[FixedIp] = []
    tag: str = ""


class Keypair(msgspec.Struct, frozen=True):
    """As guests are told of it."""

    name: str
    public_key: str
    type: str = "ssh"


class Identity(msgspec.Struct, frozen=True):
    """What a server is told of itself, through the metadata service and on its config drive.

    `metadata/documents.py` makes the trees of it. `user_data` is base64, as the API was given it.
    """

    uuid: str
    name: str
    hostname: str
    project_id: str
    availability_zone: str = ""
    launch_index: int = 0
    meta: dict[str, str] = {}
    keypair: Keypair | None = None
    user_data: str | None = None
    reservation_id: str = ""
    instance_type: str = ""
    security_groups: list[str] = []
    ec2_id: int = 0  # i-xxxxxxxx
    image_ec2_id: int = 0  # ami-xxxxxxxx
    kernel_ec2_id: int = 0  # aki-xxxxxxxx; 0: none
    ramdisk_ec2_id: int = 0  # ari-xxxxxxxx; 0: none
    image_id: str = ""
    boot_roles: str = ""  # of who made it, with commas: told to the operator's vendor data services
    files: list[tuple[str, str]] = []  # (path, base64), to 2.56
    nics: list[Nic] = []
    disks: list[Disk] = []
    dedicated_cpus: list[int] = []
    shares: list[tuple[str, str]] = []  # (its id, its tag)


class Machine(msgspec.Struct, frozen=True):
    """One server as a host must make it. Sizes in the units of their names."""

    id: str  # the server's UUID
    name: str  # the hypervisor's name for it: instance-0000002a
    vcpus: int
    memory_mb: int
    disks: list[Disk]
    nics: list[Nic]
    identity: Identity
    config_drive: bool = False
    admin_password: str = ""  # shown on the config drive only; never logged
    architecture: str = "x86_64"
    machine_type: str = ""  # q35, pc; "": the host's usual one
    firmware: Literal["bios", "uefi"] = "bios"
    cpu_sockets: int = 0  # 0: as the host likes
    cpu_cores: int = 0
    cpu_threads: int = 0
    video_model: str = "virtio"
    rng: bool = True
    watchdog: str = ""
    properties: dict[str, str] = {}  # the image's hw_* and os_*, for drivers that know more
    extra_specs: dict[str, str] = {}  # the flavor's
    flavor_name: str = ""
    owner_name: str = ""
    seat: Seat | None = None  # what of its host is this machine's alone; None: it has no wish
    epoch: int = 0  # rises when the server moves: a host with an older one is no longer its owner
    shares: list[Share] = []


def with_nic(machine: Machine, nic: Nic) -> Machine:
    """The same with one NIC more, or with this one in the place of what its port was before."""
    if any(n.port_id == nic.port_id for n in machine.nics):
        return _with_nics(machine, [nic if n.port_id == nic.port_id else n for n in machine.nics])
    return _with_nics(machine, [*machine.nics, nic])


def without_nic(machine: Machine, port_id: str) -> Machine:
    return _with_nics(machine, [n for n in machine.nics if n.port_id != port_id])


def _with_nics(machine: Machine, nics: list[Nic]) -> Machine:
    identity = msgspec.structs.replace(machine.identity, nics=nics)
    return msgspec.structs.replace(machine, nics=nics, identity=identity)


def with_volume(machine: Machine, disk: Disk, place: str | None = None) -> Machine:
    """The same with one disk more; or with this one in the place of the volume `place`, or of what it was before."""
    assert isinstance(disk.source, VolumeSource)
    old = place or disk.source.volume_id
    if old in volumes_of(machine):
        return _with_disks(machine, [disk if _is_volume(d, old) else d for d in machine.disks])
    return _with_disks(machine, [*machine.disks, disk])


def without_volume(machine: Machine, volume_id: str) -> Machine:
    return _with_disks(machine, [d for d in machine.disks if not _is_volume(d, volume_id)])


def with_share(machine: Machine, share: Share) -> Machine:
    """The same with this one, and nothing else of its id."""
    return _with_shares(machine, [*without_share(machine, share.share_id).shares, share])


def without_share(machine: Machine, share_id: str) -> Machine:
    return _with_shares(machine, [s for s in machine.shares if s.share_id != share_id])


def _with_shares(machine: Machine, shares: list[Share]) -> Machine:
    identity = msgspec.structs.replace(machine.identity, shares=[(s.share_id, s.tag) for s in shares])
    return msgspec.structs.replace(machine, shares=shares, identity=identity)


def volumes_of(machine: Machine) -> list[str]:
    """By their ids."""
    return [d.source.volume_id for d in machine.disks if isinstance(d.source, VolumeSource)]


def _is_volume(disk: Disk, volume_id: str) -> bool:
    return isinstance(disk.source, VolumeSource) and disk.source.volume_id == volume_id


def _with_disks(machine: Machine, disks: list[Disk]) -> Machine:
    identity = msgspec.structs.replace(machine.identity, disks=disks)
    return msgspec.structs.replace(machine, disks=disks, identity=identity)
