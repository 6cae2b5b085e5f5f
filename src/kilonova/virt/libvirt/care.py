"""What is done with a server's disks and its guest beside the simple verbs: copies, another system, words to the guest.

Beside what `driver.py` lists, a server's directory may hold

    capture.IMAGE  a copy of its root disk, for an image         held      its guest is paused for a copy, and shall go on
    rescue/        the disk of another system, its config drive and what it is told of (`rescue.json`)
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec

from kilonova.contracts.compute import CpuStats, DiskStats, NicStats, Stats
from kilonova.kit.errors import NotFound, Refused
from kilonova.model.machine import Disk, Machine
from kilonova.virt.libvirt import disks, xml

CHUNK_BYTES = 1 << 20
HELD, RESCUE = "held", "rescue"


# ---- copies


def copy_of(directory: Path, image_id: str) -> Path:
    return directory / f"capture.{image_id}"


def copies(directory: Path) -> list[str]:
    """The images that its disk was copied for."""
    with contextlib.suppress(OSError):
        return sorted(f.name.partition(".")[2] for f in directory.iterdir() if f.name.startswith("capture."))
    return []


def copied(machine: Machine, laid: dict[str, xml.Laid], to: Path, disk_format: str, mode: int) -> None:
    """The root disk, whole: nothing lies behind the copy. Its own format is the one that we made it in."""
    root = next((d for d in machine.disks if d.boot_index == 0), None)
    found = laid.get(root.device) if root else None
    if found is None or found.block:
        raise Refused("The server has no root disk on this host.")
    layer = found.layers[0]
    part = to.with_name(f".{to.name}.part")
    with disks.room_for(part, what="a copy of its disk"):
        # -U: QEMU has it open, and writes nothing while its guest is paused.
        disks.qemu_img("convert", "-q", "-U", "-f", layer.format, "-O", disk_format, layer.path, str(part), cpu_s=3600)
        part.chmod(mode)
        part.replace(to)


def pieces(path: Path) -> Iterator[bytes]:
    """Raises NotFound."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise NotFound("There is no such copy on this host.") from None
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


# ---- another system


class Other(msgspec.Struct, frozen=True):
    """What it is rescued with."""

    disk: Disk
    stable: bool


def rescued_with(directory: Path) -> Other | None:
    try:
        return msgspec.json.decode((directory / RESCUE / "rescue.json").read_bytes(), type=Other)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def places(laid: dict[str, xml.Laid], other: xml.Laid, of: dict[str, str]) -> dict[str, xml.Laid]:
    """Where the disks of a rescued machine lie; `of` says which of its own each is (`model.rescue`)."""
    return {device: laid[own] if own else other for device, own in of.items()}


def forget_rescue(directory: Path) -> None:
    shutil.rmtree(directory / RESCUE, ignore_errors=True)


# ---- how it is doing


def stats(lib: Any, domain: Any, machine: Machine, state: str) -> Stats:
    """What libvirt counts; None where it does not. A guest that is off has counted nothing."""
    on = bool(domain.isActive())
    description = ElementTree.fromstring(domain.XMLDesc(0))  # noqa: S314  (libvirt's own output)
    return Stats(
        state=state,
        hypervisor=description.get("type", "qemu"),
        memory_maximum=machine.memory_mb,
        memory_used=_told(lib, lambda: domain.memoryStats().get("rss", 0) >> 10) if on else 0,
        config_drive=machine.config_drive,
        cpus=[CpuStats(n, time) for n, time in enumerate(_cpu_times(lib, domain, machine, on))],
        disks=[_disk(lib, domain, name, on) for name in _disks(description)],
        nics=[_nic(lib, domain, n.device, n.mac, on) for n in machine.nics],
    )


def _cpu_times(lib: Any, domain: Any, machine: Machine, on: bool) -> list[int | None]:
    if not on:
        return [None] * machine.vcpus
    times = _told(lib, lambda: [int(cpu[2]) for cpu in domain.vcpus()[0]])
    return list(times) if times else [None] * machine.vcpus


def _disks(description: ElementTree.Element) -> list[str]:
    found = description.findall("devices/disk/target")
    return [name for t in found if (name := t.get("dev"))]


def _disk(lib: Any, domain: Any, name: str, on: bool) -> DiskStats:
    told = _told(lib, lambda: domain.blockStats(name)) if on else None
    if told is None:
        return DiskStats(name)
    read_requests, read_bytes, write_requests, write_bytes, errors = told
    return DiskStats(name, read_bytes, read_requests, write_bytes, write_requests, max(0, errors))


def _nic(lib: Any, domain: Any, device: str, mac: str, on: bool) -> NicStats:
    told = _told(lib, lambda: domain.interfaceStats(device)) if on else None
    if told is None:
        return NicStats(device, mac)
    rx, rx_packets, rx_errors, rx_drop, tx, tx_packets, tx_errors, tx_drop = told
    return NicStats(device, mac, rx, rx_errors, rx_drop, rx_packets, None, tx, tx_errors, tx_drop, tx_packets, None)


def _told(lib: Any, ask: Callable[[], Any]) -> Any:
    """None: it does not count that."""
    try:
        return ask()
    except lib.libvirtError:
        return None
