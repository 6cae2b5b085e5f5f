"""A machine's disks, made of those that another machine of the same server had.

Disks are copied, not laid upon each other: each machine can go without asking the other, and no chain grows.  Where the
file system can share blocks (XFS, Btrfs) a copy takes a moment and no room.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from kilonova.kit.errors import Refused
from kilonova.model.machine import BlankSource, Disk, ImageSource, Machine, VolumeSource
from kilonova.virt.driver import Progress
from kilonova.virt.libvirt import disks, volumes, xml
from kilonova.virt.libvirt.records import laid_in

PIECE_BYTES = 256 << 20  # of a disk, between two looks whether its copy is still wanted


def copied(
    workshop: disks.Workshop, machine: Machine, before: list[Disk], of: Path, into: Path, progress: Progress
) -> dict[str, xml.Laid]:
    """Its disks, copies of those in `of`, where they will lie when `into` has the name of `of`. They grow, never shrink."""
    was, mates = laid_in(of), mates_of(machine.disks, before)
    laid: dict[str, xml.Laid] = {}
    for number, disk in enumerate(machine.disks):
        progress("copying disks")
        mate = mates.get(disk.device)
        if isinstance(disk.source, VolumeSource):
            laid[disk.device] = volumes.laid(disk.source)
        elif mate is None:
            laid[disk.device] = new(workshop, disk, number, into, of)
        else:
            found = was[mate.device]
            if not found.read_only:
                top, *below = found.layers
                path = into / f"disk.{disk.device}"
                copy(of / Path(top.path).name, path, lambda: progress("copying disks"))
                grow(path, top.format, disk.size_bytes)
                for layer in below:  # an image's in the cache, or what came along from another host
                    if (name := Path(layer.path)).parent == of:
                        copy(of / name.name, into / name.name, lambda: progress("copying disks"))
                top = msgspec.structs.replace(top, path=str(of / path.name))
                found = msgspec.structs.replace(found, layers=[top, *below])
            laid[disk.device] = found
    return laid


def new(workshop: disks.Workshop, disk: Disk, number: int, into: Path, of: Path) -> xml.Laid:
    """One that it did not have. Raises Refused where it should have had it."""
    if not isinstance(disk.source, BlankSource):
        raise Refused("The disks of the server are missing on this host.", why=disk.device)
    made = workshop.lay(disk, number, into, None)
    layers = [msgspec.structs.replace(x, path=str(of / Path(x.path).name)) for x in made.layers]
    return msgspec.structs.replace(made, layers=layers)


def mates_of(now: list[Disk], before: list[Disk]) -> dict[str, Disk]:
    """By device of the one, the disk of the other that it was: the how manieth of its kind. Swap space has nothing to keep
    when it gets another size."""

    def places(of: list[Disk]) -> dict[tuple[str, int], Disk]:
        found: dict[tuple[str, int], Disk] = {}
        for disk in of:
            if not isinstance(disk.source, VolumeSource):
                kind = "image" if isinstance(disk.source, ImageSource) else "blank"
                if isinstance(disk.source, BlankSource) and disk.source.format == "swap":
                    kind = f"swap {disk.size_bytes}"
                found[kind, sum(k == kind for k, _ in found)] = disk
        return found

    old = places(before)
    return {disk.device: old[place] for place, disk in places(now).items() if place in old}


def grow(path: Path, format: str, size_bytes: int) -> None:
    """What is on it the guest spreads by itself. Raises Refused for one that would have to shrink."""
    if format == "raw":
        now = path.stat().st_size
    else:
        info: dict[str, Any] = msgspec.json.decode(disks.qemu_img("info", "-f", format, "--output=json", str(path)))
        now = int(info["virtual-size"])
    if size_bytes and size_bytes < now:
        raise Refused("A disk of a server cannot shrink.", why=f"{path.name}: {now} to {size_bytes} bytes")
    if size_bytes > now:
        disks.qemu_img("resize", "-q", "-f", format, str(path), str(size_bytes))


def copy(source: Path, to: Path, between: Callable[[], object] = lambda: None) -> None:
    """Its bytes, with its holes, and safe from a power cut. `between` two pieces somebody may raise."""
    with source.open("rb") as a, to.open("wb") as b:
        os.fchmod(b.fileno(), source.stat().st_mode & 0o777)
        size, at = os.fstat(a.fileno()).st_size, 0
        b.truncate(size)
        while at < size:
            between()
            try:
                at = os.lseek(a.fileno(), at, os.SEEK_DATA)
            except OSError as e:
                if e.errno == errno.ENXIO:  # nothing but a hole
                    break
                raise
            end = min(os.lseek(a.fileno(), at, os.SEEK_HOLE), at + PIECE_BYTES)
            at += _piece(a.fileno(), b.fileno(), at, end - at)
        os.fsync(b.fileno())


def _piece(a: int, b: int, at: int, count: int) -> int:
    """How many bytes were copied; the kernel shares them where it can."""
    try:
        done = os.copy_file_range(a, b, count, at, at)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        done = os.pwrite(b, os.pread(a, min(count, 1 << 20), at), at)
    if not done:
        raise Refused("A disk of the server changed while it was copied.")
    return done
