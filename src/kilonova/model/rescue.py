"""Another system for a broken server: which disk it comes on, and what the machine is meanwhile. Pure.

Two ways (states.md, section 9).  The old one: the rescue disk takes the place of the root disk, which comes second,
and nothing else is there.  The stable one, where the image says of what kind its disk is: all disks stay where they
are, the rescue disk comes last and is booted from.
"""

from typing import Literal

import msgspec

from kilonova.model import disks
from kilonova.model.machine import Bus, Disk, Machine
from kilonova.model.server import Image, Server

GIB = 1 << 30
KINDS: dict[str, tuple[Literal["disk", "cdrom"], Bus]] = {  # hw_rescue_device → what it is, and its usual bus
    "disk": ("disk", "virtio"),
    "cdrom": ("cdrom", "sata"),
}
MEANT = "hw_rescue_device", "hw_rescue_bus"


def is_stable(image: Image) -> bool:
    return any(name in image.properties for name in MEANT)


def trouble(image: Image) -> str:
    """Why this image cannot be rescued with; "": it can."""
    device, bus = (image.properties.get(name) for name in MEANT)
    if image.properties.get("img_block_device_mapping") or image.properties.get("block_device_mapping"):
        return "it is a mapping of volumes"
    if device is not None and device not in KINDS:
        return f"hw_rescue_device {device[:40]} is not one of {', '.join(KINDS)}"
    if bus is not None and bus not in disks.BUSES:
        return f"hw_rescue_bus {bus[:40]} is not one of {', '.join(disks.BUSES)}"
    return ""


def disk_of(server: Server, image: Image) -> tuple[Disk, bool]:
    """The rescue disk, and whether all others stay where they are."""
    ready = msgspec.structs.replace(server, image=image, devices=[])
    root = disks.disks(ready)[0]
    if not is_stable(image):
        return root, False
    kind, usual = KINDS[image.properties.get("hw_rescue_device", "disk")]
    bus = disks.BUSES.get(image.properties.get("hw_rescue_bus", ""), usual)
    name = disks.next_name(server, bus).removeprefix("/dev/")
    size = 0 if kind == "cdrom" else root.size_bytes
    return Disk(name, root.source, size, bus=bus, kind=kind, boot_index=0), True


def rescued(machine: Machine, disk: Disk, stable: bool, admin_password: str = "") -> tuple[Machine, dict[str, str]]:
    """The machine meanwhile; and for each of its disks (by device) which of its own that is, "": the rescue disk."""
    if stable:
        all = [*(msgspec.structs.replace(d, boot_index=None) for d in machine.disks), disk]
        of = {d.device: d.device for d in machine.disks} | {disk.device: ""}
    else:
        own = next((d for d in machine.disks if d.boot_index == 0), machine.disks[0] if machine.disks else None)
        prefix = disks.PREFIXES[disk.bus]
        first = msgspec.structs.replace(disk, device=f"{prefix}a")
        all, of = [first], {first.device: ""}
        if own is not None:
            second = msgspec.structs.replace(own, device=f"{disks.PREFIXES[own.bus]}b", boot_index=None)
            all.append(second)
            of[second.device] = own.device
    password = admin_password or machine.admin_password
    return msgspec.structs.replace(machine, disks=all, admin_password=password), of
