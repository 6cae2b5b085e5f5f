"""The bytes of volumes, snapshots and backups: a directory of raw files with holes.

A volume is raw and nothing else, so what a guest writes into it is never taken for a header; every copy is whole, so
things go in any order.  A copy shares blocks where the file system can (XFS, Btrfs), and skips holes elsewhere.  What
is being made lies beside its place until it is whole.
"""

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from kilonova.kit.clock import Clock
from kilonova.kit.errors import NoCapacity, NotFound, Refused
from kilonova.model.machine import ImageSource
from kilonova.virt.libvirt.disks import Fetch, ImageCache, qemu_img

GIB = 1 << 30
CHUNK_BYTES = 1 << 20
STRETCH_BYTES = 64 << 20  # copied by the kernel at once
FICLONE = 0x40049409  # linux/fs.h: share all blocks of another file
PASSES = 100  # of a copy, until its original holds still
CALM_NS = 20_000_000  # kernels write a file's time in steps of up to 10 ms
TICK = threading.Event()  # nobody sets it

# As the image service calls it: what qemu-img calls it.
FORMATS = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk", "vdi": "vdi", "vhd": "vpc", "vhdx": "vhdx"}

Room = Literal["volumes", "snapshots", "backups"]


class Bytes:
    """`directory` is made. `fetch(image_id, write)` brings an image's bytes."""

    def __init__(self, directory: Path, fetch: Fetch, *, clock: Clock) -> None:
        self.directory = directory
        for name in ("", "volumes", "snapshots", "backups", "parts", "locks"):
            (directory / name).mkdir(mode=0o711, parents=True, exist_ok=True)
        self.cache = ImageCache(directory / "images", fetch, clock=clock)

    def path(self, room: Room, id: str) -> Path:
        return self.directory / room / id

    def size(self, room: Room, id: str) -> int:
        """Raises NotFound."""
        try:
            return self.path(room, id).stat().st_size
        except FileNotFoundError:
            raise NotFound(f"The bytes of {id} are gone.") from None

    # -- making; each is safe to do twice, and what is there already stays

    def blank(self, id: str, size_gb: int) -> None:
        if not self.path("volumes", id).exists():
            with self._part(id) as part, part.open("wb") as file:
                file.truncate(size_gb * GIB)
                self._settle(part, "volumes", id)

    def of_image(self, id: str, size_gb: int, image: ImageSource) -> None:
        """Raises Refused where the image is not what it is said to be, or does not fit."""
        if self.path("volumes", id).exists():
            return
        base = self.cache.base(image)
        if base.virtual_size_bytes > size_gb * GIB:
            raise Refused(
                f"Size of specified image {-(-base.virtual_size_bytes // GIB)}GB is larger than volume size {size_gb}GB."
            )
        with self._part(id) as part:
            if base.format == "raw":
                copy(self.cache.path(base), part, still=True)
            else:
                convert(self.cache.path(base), base.format, part, "raw")
            os.truncate(part, size_gb * GIB)
            self._settle(part, "volumes", id)
        self.cache.evict((), 3600)

    def clone(self, source: tuple[Room, str], target: tuple[Room, str], size_gb: int) -> None:
        """A copy, of one moment; larger where `size_gb` says so. Raises NotFound, Refused (never at rest)."""
        if self.path(*target).exists():
            return
        with self._part(target[1]) as part:
            copy(self._there(*source), part, still=source[0] != "volumes")
            os.truncate(part, max(size_gb * GIB, part.stat().st_size))
            self._settle(part, *target)

    def write_over(self, source: tuple[Room, str], id: str) -> None:
        """The volume has these bytes from now on, and its own size. It is of no server: its file may be another one."""
        size = self.size("volumes", id)
        with self._part(id) as part:
            copy(self._there(*source), part, still=source[0] != "volumes")
            os.truncate(part, max(size, part.stat().st_size))
            self._settle(part, "volumes", id)

    def reimage(self, id: str, image: ImageSource) -> None:
        """An image over a volume, whose size stays. Raises Refused."""
        size_gb = self.size("volumes", id) // GIB
        scratch = f"{id}-anew"
        self.of_image(scratch, size_gb, image)
        self.path("volumes", scratch).replace(self.path("volumes", id))

    def extend(self, id: str, size_gb: int) -> None:
        """Never smaller."""
        path = self._there("volumes", id)
        if path.stat().st_size < size_gb * GIB:
            os.truncate(path, size_gb * GIB)

    def drop(self, room: Room, id: str) -> None:
        """Who has it open goes on with it."""
        self.path(room, id).unlink(missing_ok=True)

    # -- giving out

    def export(self, id: str, disk_format: str, work: Callable[[Iterator[bytes], int], None]) -> None:
        """`work(chunks, length)` is given the volume's bytes, of one moment, in this format."""
        with self._part(f"{id}-out") as part, self._part(f"{id}-as") as turned:
            copy(self._there("volumes", id), part)
            if disk_format != "raw":
                convert(part, "raw", turned, FORMATS[disk_format])
                part.unlink()
            with (part if disk_format == "raw" else turned).open("rb") as file:
                work(iter(lambda: file.read(CHUNK_BYTES), b""), os.fstat(file.fileno()).st_size)

    # -- who is at work

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[bool]:
        """Is it ours to do? Of all processes and threads one holds a name; who dies lets go."""
        path = self.directory / "locks" / name
        with path.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
            path.unlink(missing_ok=True)

    def sweep(self, known: Callable[[], dict[Room, set[str]]]) -> list[str]:
        """What nothing owns goes: only for a moment when nobody makes anything. Names of what went."""
        files = {room: list((self.directory / room).iterdir()) for room in ("volumes", "snapshots", "backups")}
        owned = known()
        orphans = [f for room, found in files.items() for f in found if f.name not in owned[room]]  # type: ignore[index]
        orphans += list((self.directory / "parts").iterdir())
        for f in orphans:
            f.unlink(missing_ok=True)
        return [f.name for f in orphans]

    # ----

    def _there(self, room: Room, id: str) -> Path:
        self.size(room, id)
        return self.path(room, id)

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[Path]:
        """A place to make something in. Raises NoCapacity where the disk is full; nothing of it is left."""
        part = self.directory / "parts" / name
        part.unlink(missing_ok=True)
        try:
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))
            yield part
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise NoCapacity("There is no room left for volumes on this cloud.", why=str(e)) from None
            raise
        finally:
            part.unlink(missing_ok=True)

    def _settle(self, part: Path, room: Room, id: str) -> None:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(self.path(room, id))


def convert(source: Path, its_format: str, target: Path, target_format: str) -> None:
    """Raises Refused."""
    qemu_img("convert", "-f", its_format, "-O", target_format, str(source), str(target), cpu_s=1800, memory_mb=2048)


# ---- copies


def copy(source: Path, target: Path, *, still: bool = False) -> None:
    """`target` becomes what `source` was at one moment, though somebody may be writing it (`still`: nobody is).

    Where blocks can be shared the kernel does that in one act.  Elsewhere what was copied is compared and mended until
    nothing was written during a whole pass.  Raises Refused where that never happens.
    """
    with source.open("rb") as reader, target.open("r+b") as writer:
        if _shared(reader, writer):
            return
        writer.truncate(0)
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        seen = _written(reader)
        for first, last in stretches(reader, size):
            _copied(reader, writer, first, last)
        if still:
            return
        for _ in range(PASSES):
            if _written(reader) == seen and _past(seen[0], writer):
                return
            TICK.wait(CALM_NS / 1e9)  # for the kernel's clock of files to move, or a write would not show
            seen = _written(reader)
            _mend(reader, writer)
    raise Refused("The volume is being written all the time: there is no moment to copy. Pause or stop its server.")


def _past(written_ns: int, writer: BinaryIO) -> bool:
    """Was that before what a file's time can tell from now?"""
    os.utime(writer.fileno())
    return written_ns < os.fstat(writer.fileno()).st_mtime_ns - CALM_NS


def _shared(reader: BinaryIO, writer: BinaryIO) -> bool:
    try:
        fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
    except OSError:
        return False
    return True


def _written(file: BinaryIO) -> tuple[int, int]:
    """When somebody last wrote, and how long it is now."""
    about = os.fstat(file.fileno())
    return about.st_mtime_ns, about.st_size


def stretches(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Where there is something: (first, behind the last)."""
    at = 0
    while at < size:
        try:
            at = os.lseek(file.fileno(), at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return
            raise
        end = min(size, os.lseek(file.fileno(), at, os.SEEK_HOLE))
        yield at, end
        at = end


def _copied(reader: BinaryIO, writer: BinaryIO, first: int, last: int) -> None:
    while first < last:
        done = os.copy_file_range(reader.fileno(), writer.fileno(), min(last - first, STRETCH_BYTES), first, first)
        if not done:
            return  # it became shorter meanwhile
        first += done


def _mend(reader: BinaryIO, writer: BinaryIO) -> None:
    """Whatever differs is copied again."""
    size = os.fstat(reader.fileno()).st_size
    writer.truncate(size)
    places = sorted({c for f in (reader, writer) for a, b in stretches(f, size) for c in range(a >> 20, -(-b >> 20))})
    for place in places:
        at = place << 20
        data = os.pread(reader.fileno(), CHUNK_BYTES, at)
        if data != os.pread(writer.fileno(), CHUNK_BYTES, at):
            os.pwrite(writer.fileno(), data, at)
