"""The bytes of images: a directory, and a customs office in front of it.

Bytes arrive once: while they go to the disk they are hashed and looked into.  What they really are is decided by
the hardened inspector of oslo.utils alone, from the bytes, and must be what was declared: a guest or an uploader
may lie, and a program that guesses formats (qemu-img) would open files of the host for him.

A draft is locked (flock) from before its image is `saving` until after it is `active`, so whoever sweeps can tell
an upload that is under way, in whatever process, from one that died.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec
from oslo_utils.imageutils import format_inspector

from kilonova.kit.errors import Invalid, NotFound, OverQuota, Trouble, Unsupported

CHUNK_BYTES = 1 << 20
DRAIN_BYTES = 1 << 30  # of a body that is refused: so much is read on, that its sender hears why

# What the bytes may be for what was declared. A partition table (gpt: GPT or MBR) is still a raw disk; a bootable
# ISO has one as well. Boot sectors and kernels end like an MBR.
# fmt: off
FITS: dict[str, set[frozenset[str]]] = {
    "raw":   {frozenset({"raw"}), frozenset({"gpt"})},
    "ami":   {frozenset({"raw"}), frozenset({"gpt"})},
    "ari":   {frozenset({"raw"}), frozenset({"gpt"})},
    "aki":   {frozenset({"raw"}), frozenset({"gpt"})},
    "gpt":   {frozenset({"gpt"})},
    "iso":   {frozenset({"iso"}), frozenset({"iso", "gpt"})},
    "qcow2": {frozenset({"qcow2"})},
    "vmdk":  {frozenset({"vmdk"})},
    "vdi":   {frozenset({"vdi"})},
    "vhd":   {frozenset({"vhd"})},
    "vhdx":  {frozenset({"vhdx"})},
}
# fmt: on


class Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Taken(msgspec.Struct, frozen=True):
    """What arrived: bytes, MD5, SHA-512 (hex), and how large a guest sees it."""

    size: int
    md5: str
    sha512: str
    virtual_size: int


class Blobs:
    """`directory` is made; blobs of images that are no more, and drafts that nobody writes, go by `sweep`."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.blobs, self.drafts, self.staged = directory / "blobs", directory / "drafts", directory / "staged"
        self.max_bytes = max_bytes
        self.beside = ThreadPoolExecutor(thread_name_prefix="md5")
        for d in (self.blobs, self.drafts, self.staged):
            d.mkdir(parents=True, exist_ok=True, mode=0o700)

    def draft(self, image_id: str, upload_id: str) -> "Draft":
        return Draft(self, self.drafts / f"{image_id}.{upload_id}", image_id)

    def open(self, image_id: str) -> BinaryIO:
        """For reading; what is deleted meanwhile can be read to its end. Raises NotFound."""
        try:
            return (self.blobs / image_id).open("rb")
        except FileNotFoundError:
            raise NotFound(f"No image data could be found for {image_id}.") from None

    def drop(self, image_id: str) -> None:
        for d in (self.blobs, self.staged):
            (d / image_id).unlink(missing_ok=True)

    def uploading(self, image_id: str) -> bool:
        """Is somebody, here or in another process, bringing its bytes?"""
        files = [*self.drafts.glob(f"{image_id}.*"), self.blobs / image_id]
        return any(_locked(f) for f in files)

    def sweep(self, known: Callable[[], tuple[set[str], set[str]]]) -> int:
        """Remove what no image owns; how many files. `known()`: ids of images with bytes, and of those with staged ones.

        Who is asked when matters: a file that is not locked now belongs to an image whose state is committed.
        """
        files = [f for d in (self.blobs, self.staged, self.drafts) for f in d.iterdir() if not _locked(f)]
        kept, staged = known()
        owned = {self.blobs: kept, self.staged: staged, self.drafts: set[str]()}
        orphans = [f for f in files if f.name not in owned[f.parent]]
        for f in orphans:
            f.unlink(missing_ok=True)
        return len(orphans)


class Draft:
    """Bytes on their way in. `take` them, `keep` them (or `put_aside`), and `close` whatever happened."""

    def __init__(self, blobs: Blobs, path: Path, image_id: str) -> None:
        self.blobs, self.path, self.image_id = blobs, path, image_id
        self.kept, locked = False, False
        while not locked:  # who sweeps in the moment between the two would have removed it
            try:
                self.file = path.open("wb", buffering=0)
            except OSError as e:
                raise _no_room(e) from None
            fcntl.flock(self.file, fcntl.LOCK_EX)
            locked = path.exists()

    def take(self, source: Source, length: int | None, disk_format: str | None) -> Taken:
        """All that `source` has, `length` bytes where that was said; looked into where `disk_format` is given.

        Raises OverQuota (too long, or no room here), Invalid (it broke off), Unsupported (not what was declared).
        """
        if length is not None and length > self.blobs.max_bytes:
            raise OverQuota(f"The image exceeds the maximum size of {self.blobs.max_bytes} bytes.")
        size, md5, sha512 = 0, hashlib.md5(usedforsecurity=False), hashlib.sha512()
        beside: Future[None] | None = None
        counted = _Counted(source)
        inspected: Any = counted
        if disk_format is not None:
            inspected = format_inspector.InspectWrapper(counted, expected_format=_expected(disk_format))
        try:
            while chunk := _next(inspected, disk_format, length, size):
                size += len(chunk)
                if size > self.blobs.max_bytes:
                    raise OverQuota(f"The image exceeds the maximum size of {self.blobs.max_bytes} bytes.")
                if beside:
                    beside.result()
                beside = self.blobs.beside.submit(md5.update, chunk)  # on another core, while this one does the rest
                sha512.update(chunk)
                self._write(chunk)
            if beside:
                beside.result()
            self._end(size)
        except Trouble:
            _drain(source)
            raise
        if length is not None and size != length:
            raise Invalid(f"The upload broke off: {size} of {length} bytes arrived.")
        virtual_size = size
        if disk_format is not None and size:
            virtual_size = judged(inspected, disk_format, size)
        return Taken(size, md5.hexdigest(), sha512.hexdigest(), virtual_size)

    def keep(self) -> None:
        """On the disk for good, under its image's name."""
        self._settle(self.blobs.blobs / self.image_id)

    def put_aside(self) -> None:
        """As `keep`, but only staged: nobody can download it."""
        self._settle(self.blobs.staged / self.image_id)

    def close(self, *, drop: bool = False) -> None:
        """Let go of the lock; what was not kept, or is to be dropped, is gone."""
        if drop or not self.kept:
            self.path.unlink(missing_ok=True)
        self.file.close()

    def _settle(self, place: Path) -> None:
        try:
            os.fsync(self.file.fileno())
            self.path.rename(place)
            directory = os.open(place.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
        except OSError as e:
            raise _no_room(e) from None
        self.path, self.kept = place, True

    def _end(self, size: int) -> None:
        """It may end with a hole."""
        try:
            self.file.truncate(size)
        except OSError as e:
            raise _no_room(e) from None

    def _write(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        try:
            if chunk.count(0) == len(chunk):  # a hole: disks of guests are mostly holes
                self.file.seek(len(chunk), os.SEEK_CUR)
                return
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as e:
            raise _no_room(e) from None


def judged(inspected: Any, disk_format: str, size: int) -> int:
    """The virtual size, if the bytes are what was declared and harmless. Raises Unsupported."""
    inspected.close()
    try:
        found = inspected.formats or []
        names = frozenset(str(i) for i in found)
        if names not in FITS.get(disk_format, {frozenset({disk_format})}):
            seen = " and ".join(sorted(names)) or "nothing known"
            raise Unsupported(f"The image was declared to be {disk_format}, but its content is {seen}.")
        main = next((i for i in found if str(i) == disk_format), found[0])
        if str(main) not in ("raw", "gpt", "iso"):
            main.safety_check()
        virtual = int(main.virtual_size)
    except format_inspector.SafetyCheckFailed as e:
        bad = ", ".join(sorted(e.failures))
        raise Unsupported(f"The {disk_format} image is refused as unsafe: {bad}.", why=str(e)) from None
    except Trouble:
        raise
    except Exception as e:  # the inspector reads bytes of strangers: whatever it meets in them is their fault
        raise Unsupported(f"The image is no valid {disk_format}.", why=repr(e)) from None
    return virtual if str(main) not in ("raw", "gpt") else size


def _next(inspected: Any, disk_format: str | None, length: int | None, size: int) -> bytes:
    want = CHUNK_BYTES if length is None else min(CHUNK_BYTES, length - size)
    if want <= 0:
        return b""
    try:
        return bytes(inspected.read(want))
    except (format_inspector.ImageFormatError, format_inspector.SafetyViolation) as e:
        raise Unsupported(f"The image was declared to be {disk_format}, but its content is not.", why=str(e)) from None
    except (OSError, EOFError) as e:
        raise Invalid("The upload broke off.", why=repr(e)) from None
    except Trouble:
        raise
    except Exception as e:
        raise Unsupported(f"The image is no valid {disk_format}.", why=repr(e)) from None


class _Counted:
    """Reads whole chunks from a source that may give less: inspectors and disks like them large."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def read(self, size: int) -> bytes:
        chunk = self.source.read(size)
        if not chunk or len(chunk) == size:
            return chunk
        parts, have = [chunk], len(chunk)
        while have < size and (chunk := self.source.read(size - have)):
            parts.append(chunk)
            have += len(chunk)
        return b"".join(parts)


def _expected(disk_format: str) -> str | None:
    """What the inspector may break off for: where only one thing is right."""
    return disk_format if disk_format in ("qcow2", "vmdk", "vdi", "vhd", "vhdx") else None


def _drain(source: Source) -> None:
    left = DRAIN_BYTES
    try:
        while left > 0 and (chunk := source.read(min(CHUNK_BYTES, left))):
            left -= len(chunk)
    except Exception:
        return


def _no_room(e: OSError) -> Trouble:
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OverQuota("There is no room left for images on this cloud.", why=str(e))
    raise e


def _locked(path: Path) -> bool:
    try:
        with path.open("rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class pieces:
    """`length` bytes from `first` on, in chunks. The file is closed, and `done` called once, at the end or when
    nobody listens any more: even if nobody ever began to, which a generator could not promise."""

    def __init__(self, file: BinaryIO, first: int, length: int, done: Callable[[], object] = lambda: None) -> None:
        self.file, self.left, self.done = file, length, done
        file.seek(first)

    def __iter__(self) -> "pieces":
        return self

    def __next__(self) -> bytes:
        chunk = b"" if self.file.closed else self.file.read(min(CHUNK_BYTES, self.left))
        if not chunk:
            self.close()
            raise StopIteration
        self.left -= len(chunk)
        return chunk

    def close(self) -> None:
        if not self.file.closed:
            self.file.close()
            self.done()

    def __del__(self) -> None:
        self.close()
