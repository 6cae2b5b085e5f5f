"""The disks of a machine, from its server's flavor, image and devices; and what they are called. Pure.

Letters are given once for all buses: vda, vdb, sdc. What flavor and image tell of (root, ephemeral, swap) takes the
first that no device has; a device keeps its own.
"""

import itertools
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from kilonova.model.devices import ROLES, Device, Role
from kilonova.model.machine import BlankSource, Bus, Disk, ImageSource, VolumeSource
from kilonova.model.server import Image, Server

GIB, MIB = 1 << 30, 1 << 20
PREFIXES: dict[str, str] = {"virtio": "vd", "scsi": "sd", "sata": "sd", "usb": "sd", "ide": "hd"}
BUSES: dict[str, Bus] = {"virtio": "virtio", "scsi": "scsi", "sata": "sata", "usb": "usb", "ide": "ide"}

Connections = Mapping[str, dict[str, Any]]
"""How to connect to volumes, by volume id, as their service says (connection_info)."""


def disks(server: Server, connections: Connections | None = None) -> list[Disk]:
    """Root from the image (as large as the flavor says; 0: as the image) or a volume, ephemeral, swap, then the others.

    A volume that is yet to be made, or on its way to the guest, is no disk of it.
    """
    return [
        _told(server, role, letter) if d is None else disk(server, d, letter, connections)
        for role, d, letter in _slots(server)
        if d is None or not d.is_volume or (d.volume_id and d.busy != "attaching")
    ]


def disk(server: Server, d: Device, letter: str = "", connections: Connections | None = None) -> Disk:
    """One device as a disk. `letter` for one that has no name yet."""
    bus = bus_of(server, d)
    name = (d.name or PREFIXES[bus] + letter).removeprefix("/dev/")
    rest: dict[str, Any] = {"bus": bus, "kind": d.kind, "boot_index": d.boot_index, "tag": d.tag or ""}
    if d.is_volume:
        assert d.volume_id is not None
        source = VolumeSource(d.volume_id, (connections or {}).get(d.volume_id))
        kept: dict[str, Any] = {"serial": d.volume_id, "delete_on_termination": d.delete_on_termination}
        return Disk(name, source, (d.size or 0) * GIB, **rest, **kept)
    if d.role == "swap":
        return Disk(name, BlankSource("swap"), (d.size or 0) * MIB, **rest)
    if d.source == "blank":
        return Disk(name, BlankSource(d.format or _ephemeral_format(server)), (d.size or 0) * GIB, **rest)
    size = 0 if d.kind == "cdrom" else server.flavor.disk_gb * GIB
    return Disk(name, _image(server), size, **rest)


def named(server: Server) -> list[Device]:
    """Its devices, each with the name that its bus gives it; letters that were asked for are kept."""
    return [
        msgspec.structs.replace(d, name=f"/dev/{PREFIXES[bus_of(server, d)]}{letter}")
        for _, d, letter in _slots(server)
        if d is not None
    ]


def next_name(server: Server, bus: Bus) -> str:
    """For one more device."""
    taken = names(server)
    return f"/dev/{PREFIXES[bus]}{next(x for x in _letters() if x not in taken)}"


def has_name(server: Server, name: str) -> bool:
    """Is a disk called so, whatever its bus?"""
    return letters_of(name) in names(server)


def names(server: Server) -> list[str]:
    """The letters of all its disks."""
    return [letter for _, _, letter in _slots(server)]


def root_name(server: Server) -> str:
    """As the API shows it: /dev/vda."""
    for role, d, letter in _slots(server):
        if role == "root":
            return d.name if d and d.name else f"/dev/{PREFIXES[bus_of(server, d) if d else 'virtio']}{letter}"
    return "/dev/vda"


def bus_of(server: Server, d: Device) -> Bus:
    """As it was asked for; else as the image says for disks of its kind."""
    if d.bus is not None:
        return d.bus
    properties = server.image.properties
    if d.kind == "cdrom":
        return _bus(properties.get("hw_cdrom_bus"), "sata")
    return _bus(properties.get("hw_disk_bus"))


def _slots(server: Server) -> Iterator[tuple[Role, Device | None, str]]:
    """(role, device, letters), in order; no device where flavor or image tell of the disk."""
    if not server.devices:
        yield from zip((r for r in ROLES if _tell_of(server, r)), itertools.repeat(None), string.ascii_lowercase)
        return
    taken = {letters_of(d.name) for d in server.devices if d.name}
    free = (x for x in _letters() if x not in taken)
    for role in ROLES:
        mine = [d for d in server.devices if d.role == role]
        if not mine and _tell_of(server, role):
            yield role, None, next(free)
        for d in mine:
            yield role, d, letters_of(d.name) if d.name else next(free)


def _tell_of(server: Server, role: Role) -> bool:
    """Do flavor and image tell of such a disk?"""
    match role:
        case "root":
            return bool(server.image.id)
        case "ephemeral":
            return server.flavor.ephemeral_gb > 0
        case "swap":
            return server.flavor.swap_mb > 0
        case _:
            return False


def _told(server: Server, role: Role, letter: str) -> Disk:
    """A disk of the flavor or the image."""
    bus = _bus(server.image.properties.get("hw_disk_bus"))
    match role:
        case "root":
            return _root(server, bus, letter)
        case "ephemeral":
            blank, size = BlankSource(_ephemeral_format(server)), server.flavor.ephemeral_gb * GIB
        case _:
            blank, size = BlankSource("swap"), server.flavor.swap_mb * MIB
    return Disk(PREFIXES[bus] + letter, blank, size, bus=bus)


def _root(server: Server, bus: Bus, letter: str) -> Disk:
    image = server.image
    if image.disk_format == "iso":
        bus = _bus(image.properties.get("hw_cdrom_bus"), "sata")
        return Disk(PREFIXES[bus] + letter, _image(server), bus=bus, kind="cdrom", boot_index=0)
    return Disk(PREFIXES[bus] + letter, _image(server), server.flavor.disk_gb * GIB, bus=bus, boot_index=0)


def _image(server: Server) -> ImageSource:
    return source_of(server.image)


def source_of(image: Image) -> ImageSource:
    """The bytes of an image, as a host needs them."""
    return ImageSource(
        image_id=image.id,
        disk_format=image.disk_format,  # type: ignore[arg-type]  # the image service has no others
        size_bytes=image.size_bytes,
        hash_algo=image.hash_algo,
        hash_value=image.hash_value,
        virtual_size_bytes=image.virtual_size_bytes,
    )


def _ephemeral_format(server: Server) -> str:
    return server.image.properties.get("os_ephemeral_format", "ext4")


def _bus(wanted: str | None, usual: Bus = "virtio") -> Bus:
    return BUSES.get(wanted or "", usual)


def file_of(disk: Disk) -> str | None:
    """The name of the file that this volume is, as its host reaches it; None: it is no file."""
    info = getattr(disk.source, "connection_info", None) or {}
    data = info.get("data") or {}
    if info.get("driver_volume_type") in FILES:
        path: str = data.get("name") or data.get("device_path") or ""
        return path.rpartition("/")[2] or None
    return None


def on_file(disk: Disk, name: str) -> Disk:
    """The same volume, whose newest bytes are in this file beside the one that it was."""
    assert isinstance(disk.source, VolumeSource) and disk.source.connection_info is not None
    data = dict(disk.source.connection_info["data"])
    for key in ("name", "device_path"):
        if key in data:
            directory, slash, _ = data[key].rpartition("/")
            data[key] = f"{directory}{slash}{name}"
    source = msgspec.structs.replace(disk.source, connection_info=disk.source.connection_info | {"data": data})
    return msgspec.structs.replace(disk, source=source)


FILES = frozenset({"local", "nfs", "smbfs", "glusterfs", "quobyte", "vzstorage"})  # kinds of connections to files


def _letters() -> Iterator[str]:
    """a … z, aa … zz."""
    yield from string.ascii_lowercase
    yield from map("".join, itertools.product(string.ascii_lowercase, repeat=2))


def letters_of(name: str) -> str:
    """/dev/vdb → b; /dev/xvdc, sdc → c; "" for what is no name of a disk."""
    found = re.fullmatch(r"(?:/dev/)?(?:x?vd|sd|hd)([a-z]{1,2})[0-9]*", name)
    return found[1] if found else ""
