"""The machine is decided before a hypervisor is asked: what a server will be, from what is written of it. Pure."""

from collections.abc import Iterable

import msgspec

from kilonova.model.disks import Connections, disks, source_of
from kilonova.model.identity import identity_of
from kilonova.model.machine import Disk, ImageSource, Machine, Nic, VolumeSource
from kilonova.model.seat import Seat
from kilonova.model.server import Image, Server

VIF_MODELS = {"virtio", "e1000", "e1000e", "rtl8139", "ne2k_pci", "pcnet", "vmxnet3", "igb", "lan9118", "spapr-vlan"}
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


def plan(
    server: Server,
    *,
    nics: list[Nic],
    number: int,
    epoch: int,
    zone: str = "",
    admin_password: str = "",
    files: Iterable[tuple[str, str]] = (),
    owner: str = "",
    force_config_drive: bool = False,
    connections: Connections | None = None,
    seat: Seat | None = None,
) -> Machine:
    """The whole machine. `number` names it where UUIDs are too long; `epoch` rises with each host it is given to.

    `connections`: how this host reaches each of its volumes (`conductor.volumes.connect`).
    """
    properties, specs = server.image.properties, server.flavor.extra_specs
    nics = [modelled(n, server.image) for n in nics]
    drives = disks(server, connections)
    sockets, cores, threads = topology(server)
    return Machine(
        id=server.id,
        name=f"instance-{number:08x}",
        vcpus=server.flavor.vcpus,
        memory_mb=server.flavor.memory_mb,
        disks=drives,
        nics=nics,
        identity=identity_of(
            msgspec.structs.replace(server, number=number), zone=zone, nics=nics, disks=drives, files=files
        ),
        config_drive=server.config_drive or force_config_drive or properties.get("img_config_drive") == "mandatory",
        admin_password=admin_password,
        architecture=architecture(server.image),
        machine_type=properties.get("hw_machine_type", ""),
        firmware="uefi" if properties.get("hw_firmware_type") == "uefi" else "bios",
        cpu_sockets=sockets,
        cpu_cores=cores,
        cpu_threads=threads,
        video_model=properties.get("hw_video_model", "virtio"),
        rng=specs.get("hw_rng:allowed", "true").lower() in ("true", "1", "yes"),
        watchdog=specs.get("hw:watchdog_action") or properties.get("hw_watchdog_action", ""),
        properties={k: v for k, v in properties.items() if k.startswith(("hw_", "os_", "img_"))},
        extra_specs=specs,
        flavor_name=server.flavor.name,
        owner_name=owner,
        seat=seat,
        epoch=epoch,
    )


def modelled(nic: Nic, image: Image) -> Nic:
    """As the image wants its NICs to look."""
    model = image.properties.get("hw_vif_model", "virtio")
    return msgspec.structs.replace(nic, model=model) if model in VIF_MODELS - {"virtio"} else nic


def connected_as(machine: Machine, before: Machine) -> Machine:
    """Its volumes are reached as they were, where the new plan does not say how."""
    known = {d.source.volume_id: d.source for d in before.disks if isinstance(d.source, VolumeSource)}

    def told(d: Disk) -> Disk:
        if isinstance(d.source, VolumeSource) and d.source.connection_info is None:
            return msgspec.structs.replace(d, source=known.get(d.source.volume_id, d.source))
        return d

    return msgspec.structs.replace(machine, disks=[told(d) for d in machine.disks])


def from_image(machine: Machine, image: Image) -> Machine:
    """The same machine with other bytes on the root disk that was to be made of its image."""

    def sourced(d: Disk) -> Disk:
        root = d.boot_index == 0 and isinstance(d.source, ImageSource)
        return msgspec.structs.replace(d, source=source_of(image)) if root else d

    return msgspec.structs.replace(machine, disks=[sourced(d) for d in machine.disks])


def architecture(image: Image) -> str:
    """As QEMU calls it."""
    wanted = (image.properties.get("hw_architecture") or image.properties.get("architecture") or "x86_64").lower()
    return ARCHITECTURES.get(wanted, wanted)


def topology(server: Server) -> tuple[int, int, int]:
    """(sockets, cores, threads) that make up all CPUs, as flavor or image wish; (0, 0, 0): as the host likes."""
    specs, properties = server.flavor.extra_specs, server.image.properties
    wanted = [
        _number(specs.get(f"hw:cpu_{what}") or properties.get(f"hw_cpu_{what}"))
        for what in ("sockets", "cores", "threads")
    ]
    vcpus = server.flavor.vcpus
    if not any(wanted):
        return 0, 0, 0
    given = 1
    for n in wanted:
        given *= n or 1
    if vcpus % given:
        return 0, 0, 0  # it cannot be; the wish is a preference
    for i in range(3):
        if not wanted[i]:
            wanted[i], given = vcpus // given, vcpus
    return (wanted[0], wanted[1], wanted[2]) if wanted[0] * wanted[1] * wanted[2] == vcpus else (0, 0, 0)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
