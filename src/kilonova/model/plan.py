"""The machine is decided before a hypervisor is asked: what a server will be, from what is written of it. Pure."""

from collections.abc import Iterable

import msgspec

from kilonova.model.identity import identity_of
from kilonova.model.machine import BlankSource, Bus, Disk, ImageSource, Machine, Nic
from kilonova.model.server import Image, Server

GIB, MIB = 1 << 30, 1 << 20
PREFIXES: dict[str, str] = {"virtio": "vd", "scsi": "sd", "sata": "sd", "usb": "sd", "ide": "hd"}
BUSES: dict[str, Bus] = {"virtio": "virtio", "scsi": "scsi", "sata": "sata", "usb": "usb", "ide": "ide"}
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
) -> Machine:
    """The whole machine. `number` names it where UUIDs are too long; `epoch` rises with each host it is given to."""
    properties, specs = server.image.properties, server.flavor.extra_specs
    model = properties.get("hw_vif_model", "virtio")
    nics = [msgspec.structs.replace(n, model=model) for n in nics] if model in VIF_MODELS - {"virtio"} else nics
    drives = disks(server)
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
        epoch=epoch,
    )


def disks(server: Server) -> list[Disk]:
    """Root from the image (as large as the flavor says; 0: as the image), then ephemeral, then swap."""
    flavor, image = server.flavor, server.image
    bus: Bus = _bus(image.properties.get("hw_disk_bus"))
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    found = []
    if image.id:
        found.append(_root(server, bus, next(letters)))
    if flavor.ephemeral_gb:
        blank = BlankSource(image.properties.get("os_ephemeral_format", "ext4"))
        found.append(Disk(_named(bus, next(letters)), blank, flavor.ephemeral_gb * GIB, bus=bus))
    if flavor.swap_mb:
        found.append(Disk(_named(bus, next(letters)), BlankSource("swap"), flavor.swap_mb * MIB, bus=bus))
    return found


def _root(server: Server, bus: Bus, letter: str) -> Disk:
    image = server.image
    source = ImageSource(
        image_id=image.id,
        disk_format=image.disk_format,  # type: ignore[arg-type]  # the image service has no others
        size_bytes=image.size_bytes,
        hash_algo=image.hash_algo,
        hash_value=image.hash_value,
        virtual_size_bytes=image.virtual_size_bytes,
    )
    if image.disk_format == "iso":
        bus = _bus(image.properties.get("hw_cdrom_bus"), "sata")
        return Disk(_named(bus, letter), source, bus=bus, kind="cdrom", boot_index=0)
    return Disk(_named(bus, letter), source, server.flavor.disk_gb * GIB, bus=bus, boot_index=0)


def _bus(wanted: str | None, usual: Bus = "virtio") -> Bus:
    return BUSES.get(wanted or "", usual)


def _named(bus: str, letter: str) -> str:
    return PREFIXES[bus] + letter


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
