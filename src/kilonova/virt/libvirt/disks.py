"""Disks of servers: images fetched once and shared, and for each server overlays of its own upon them.

An image's bytes come from somebody else, and so does what he says of their format.  So: the format that the image
service names is compared with what a hardened inspector finds while the bytes stream in; what refers to other files
is refused; and qemu-img is always told the format, works under limits and never looks at the content to guess it.

qcow2 stays qcow2 and is not turned into raw: the first server on a host starts at once, and a compressed image keeps
its size.  The price is a look into the image's own tables where a server reads what it never wrote.  Other container
formats (vmdk, vdi, vhd, vhdx) are converted, once, to qcow2.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from oslo_utils.imageutils import format_inspector

from kilonova.kit.clock import Clock
from kilonova.kit.errors import Refused, Trouble
from kilonova.model.machine import BlankSource, Disk, ImageSource
from kilonova.virt.libvirt import volumes
from kilonova.virt.libvirt.xml import Laid, Layer

logger = logging.getLogger(__name__)

Fetch = Callable[[str, Callable[[bytes], object]], None]
Progress = Callable[[str], None]
PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"

# As the image service calls it: (what the inspector may find, QEMU's name, kept as)
# fmt: off
FORMATS: dict[str, tuple[frozenset[str], str, Literal["raw", "qcow2"]]] = {
    "raw":   (frozenset({"raw", "gpt", "iso"}), "raw",   "raw"),
    "ami":   (frozenset({"raw", "gpt"}),        "raw",   "raw"),
    "iso":   (frozenset({"iso", "gpt"}),        "raw",   "raw"),
    "qcow2": (frozenset({"qcow2"}),             "qcow2", "qcow2"),
    "vmdk":  (frozenset({"vmdk"}),              "vmdk",  "qcow2"),
    "vdi":   (frozenset({"vdi"}),               "vdi",   "qcow2"),
    "vhd":   (frozenset({"vhd"}),               "vpc",   "qcow2"),
    "vhdx":  (frozenset({"vhdx"}),              "vhdx",  "qcow2"),
}
# fmt: on


class Base(msgspec.Struct, frozen=True):
    """An image on this host, fit to stand under overlays."""

    image_id: str
    file: str  # its name in the cache
    format: Literal["raw", "qcow2"]
    virtual_size_bytes: int


class ImageCache:
    """The images of a host, one copy each, under `directory`: `KEY` with its `KEY.json`; `*.part` are beginnings.

    An image is there when its `.json` is: it is written last, and removed first.
    """

    def __init__(self, directory: Path, fetch: Fetch, *, clock: Clock, mode: int = 0o600) -> None:
        self.directory, self.fetch, self.clock, self.mode = directory, fetch, clock, mode
        directory.mkdir(mode=0o700 if mode == 0o600 else 0o711, parents=True, exist_ok=True)
        for part in directory.glob("*.part*"):
            part.unlink()  # nobody goes on with what an earlier life began
        self.lock = threading.Lock()
        self.locks: dict[str, threading.Lock] = {}

    def base(self, source: ImageSource, progress: Progress = lambda said: None) -> Base:
        """The image, fetched if need be; who comes meanwhile for the same one waits.

        Raises Refused when it is not what it is said to be or does not fit here, and what `fetch` raises.
        """
        key = self._key(source)
        with self._only_one(key):
            if base := self._kept(key):
                os.utime(self._record(key), (self.clock.now(),) * 2)
                return base
            base = self._fetched(key, source, progress)
            part = self._record(key).with_suffix(".part")
            part.write_bytes(msgspec.json.encode(base))
            part.replace(self._record(key))
            return base

    def path(self, base: Base) -> Path:
        return self.directory / base.file

    def evict(self, used: Collection[str], max_age_s: float) -> list[str]:
        """Removes images that no server (`used`: image ids) stands on and nobody asked for since; gives their ids."""
        gone, now = [], self.clock.now()
        for record in self.directory.glob("*.json"):
            with self._only_one(record.stem):
                base = self._kept(record.stem)
                if base and base.image_id in used:
                    os.utime(record, (now, now))
                elif now - record.stat().st_mtime >= max_age_s:
                    record.unlink()
                    (self.directory / record.stem).unlink(missing_ok=True)
                    gone.append(base.image_id if base else record.stem)
        for orphan in self.directory.iterdir():
            if orphan.suffix not in (".json", ".part") and now - orphan.stat().st_mtime >= max_age_s:
                with self._only_one(orphan.name):
                    if not self._record(orphan.name).exists():
                        orphan.unlink(missing_ok=True)
        return gone

    # ----

    @staticmethod
    def _key(source: ImageSource) -> str:
        """Image and content: bytes that changed under the same id must not slide under overlays of the old ones."""
        name = source.image_id
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            name = hashlib.sha256(name.encode()).hexdigest()
        return f"{name}-{source.hash_value[:16]}" if re.fullmatch(r"[0-9a-fA-F]{16,}", source.hash_value) else name

    def _record(self, key: str) -> Path:
        return self.directory / f"{key}.json"

    def _kept(self, key: str) -> Base | None:
        try:
            base = msgspec.json.decode(self._record(key).read_bytes(), type=Base)
        except (OSError, msgspec.MsgspecError):
            return None
        return base if self.path(base).exists() else None

    @contextlib.contextmanager
    def _only_one(self, key: str) -> Iterator[None]:
        with self.lock:
            own = self.locks.setdefault(key, threading.Lock())
        with own:
            yield

    def _fetched(self, key: str, source: ImageSource, progress: Progress) -> Base:
        known = FORMATS.get(source.disk_format)
        if known is None:
            raise Refused(f"Image {source.image_id} is unacceptable: this host has no use for {source.disk_format!r}.")
        _, qemu_name, kept_as = known
        part, turned = self.directory / f"{key}.part", self.directory / f"{key}.part2"
        with room_for(part, turned, what=f"image {source.image_id}", needed=source.size_bytes):
            size = self._stream(part, source, progress)
            size = self._measure(part, qemu_name, source.image_id) if qemu_name != "raw" else size
            if qemu_name != kept_as:
                progress(f"converting image {source.image_id}")
                qemu_img("convert", "-f", qemu_name, "-O", kept_as, str(part), str(turned), cpu_s=1800)
                part.unlink()
                turned.replace(part)
            with part.open("rb") as done:
                os.fsync(done.fileno())
            part.chmod(self.mode)
            part.replace(self.directory / key)
        return Base(source.image_id, key, kept_as, size)

    def _stream(self, part: Path, source: ImageSource, progress: Progress) -> int:
        """Its length in bytes. The bytes are hashed and inspected on their way; the wrong ones are not fetched on."""
        said = f"fetching image {source.image_id}"
        progress(said)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", 0) as file:
            tap = _Tap(source, file, lambda percent: progress(f"{said}: {percent} %"))
            self.fetch(source.image_id, tap.write)
            file.truncate(tap.length)
        tap.check()
        return tap.length

    def _measure(self, part: Path, qemu_name: str, image_id: str) -> int:
        """QEMU's view of a container that the inspector let pass: a second pair of eyes, and the size it will show."""
        info = msgspec.json.decode(qemu_img("info", "-f", qemu_name, "--output=json", str(part)), type=dict[str, Any])
        specific = info.get("format-specific", {}).get("data", {})
        if info.get("backing-filename") or info.get("full-backing-filename") or specific.get("data-file"):
            raise Refused(f"Image {image_id} is unacceptable: it refers to another file.")
        if info.get("encrypted"):
            raise Refused(f"Image {image_id} is unacceptable: it is encrypted.")
        return int(info["virtual-size"])


class _Tap:
    """Where an image's bytes flow through: into the file, the hash and the inspector."""

    def __init__(self, source: ImageSource, file: Any, percent: Callable[[int], None]) -> None:
        self.source, self.file, self.percent = source, file, percent
        self.length = 0
        self.told = 0
        self.hash = hashlib.new(source.hash_algo) if _is_known_hash(source) else None
        self.chunk = b""
        self.inspector = format_inspector.InspectWrapper(self)

    def write(self, chunk: bytes) -> int:
        size = self.source.size_bytes
        if size and self.length + len(chunk) > size:
            raise Refused(
                f"Image {self.source.image_id} is unacceptable: it is longer than the {size} bytes announced."
            )
        if self.hash:
            self.hash.update(chunk)
        self.chunk = chunk
        self.inspector.read(len(chunk))
        if chunk.count(0) == len(chunk):
            self.file.seek(len(chunk), os.SEEK_CUR)  # a hole
        else:
            rest = memoryview(chunk)
            while rest:
                rest = rest[self.file.write(rest) :]
        self.length += len(chunk)
        if size and (now := self.length * 10 // size * 10) > self.told:
            self.told = now
            self.percent(now)
        return len(chunk)

    def read(self, size: int) -> bytes:
        """For the inspector, which looks at what is read through it."""
        return self.chunk

    def check(self) -> None:
        """Raises Refused unless it is all there and is what it was said to be."""
        source, image = self.source, f"Image {self.source.image_id} is unacceptable:"
        if source.size_bytes and self.length != source.size_bytes:
            raise Refused(f"{image} {self.length} bytes came, {source.size_bytes} were announced.")
        if self.hash and self.hash.hexdigest() != source.hash_value.lower():
            raise Refused(f"{image} its {source.hash_algo} is not the one that the image service names.")
        self.inspector.close()
        found = self.inspector.formats or []
        names = {str(f) for f in found}
        allowed = FORMATS[source.disk_format][0]
        if not names or not names <= allowed or (source.disk_format == "iso" and "iso" not in names):
            what = " and ".join(sorted(names)) or "nothing known"
            raise Refused(f"{image} it is said to be {source.disk_format}, and its content is {what}.")
        for one in found:
            if str(one) == "gpt":
                continue  # what a guest boots with is its own affair
            try:
                one.safety_check()
            except (format_inspector.SafetyCheckFailed, format_inspector.SafetyViolation) as e:
                failures = getattr(e, "failures", {})
                reasons = "; ".join(str(f).rstrip(".") for f in failures.values()) or str(e)
                raise Refused(f"{image} {reasons}.", why=str(e)) from None


def _is_known_hash(source: ImageSource) -> bool:
    return bool(source.hash_value) and source.hash_algo in hashlib.algorithms_available


# ---- a server's own


class Workshop:
    """Makes a server's disks in its directory. Each is there whole or not at all, and is not made twice."""

    def __init__(self, cache: ImageCache, mode: int = 0o600) -> None:
        self.cache, self.mode = cache, mode

    def lay(self, disk: Disk, number: int, directory: Path, base: Base | None) -> Laid:
        """`number`: the how manieth of the server's disks. Raises Refused."""
        if not re.fullmatch(r"(vd|sd|hd|xvd)[a-z]{1,3}", disk.device):
            raise Refused(f"No disk of a server can be called {disk.device!r}.")
        if isinstance(disk.source, ImageSource):
            assert base is not None
            return self._overlay(disk, directory, base)
        if isinstance(disk.source, BlankSource):
            return self._blank(disk, number, directory, disk.source.format)
        return volumes.laid(disk.source)

    def _overlay(self, disk: Disk, directory: Path, base: Base) -> Laid:
        below = Layer(str(self.cache.path(base)), base.format)
        if disk.kind == "cdrom":
            return Laid([below], read_only=True)
        size = disk.size_bytes or base.virtual_size_bytes
        if base.virtual_size_bytes > size:
            raise Refused(
                f"Flavor's disk is too small for requested image. Flavor disk is {size} bytes, "
                f"image is {base.virtual_size_bytes} bytes."
            )
        path = directory / f"disk.{disk.device}"
        if not path.exists():
            part = path.with_name(path.name + ".part")
            with room_for(part, what=f"the disk {disk.device}"):
                # -u: the header is written without opening what lies below; we know it.
                qemu_img(
                    "create", "-q", "-u", "-f", "qcow2", "-F", below.format, "-b", below.path, str(part), str(size)
                )
                part.chmod(self.mode)
                part.replace(path)
        return Laid([Layer(str(path), "qcow2"), below])

    def _blank(self, disk: Disk, number: int, directory: Path, system: str) -> Laid:
        """A file with holes, made a file system by the host's own tools (`swap`, `ext4`, `xfs`, `vfat`, …)."""
        path = directory / f"disk.{disk.device}"
        if not path.exists():
            part = path.with_name(path.name + ".part")
            with room_for(part, what=f"the disk {disk.device}"):
                with part.open("wb") as file:
                    file.truncate(disk.size_bytes)
                part.chmod(self.mode)
                if system:
                    make_file_system(system, part, f"ephemeral{max(0, number - 1)}")
                part.replace(path)
        return Laid([Layer(str(path), "raw")])


def config_drive(path: Path, content: Callable[[], bytes], mode: int) -> None:
    """The config drive's image, unless it is there: only the first has the admin password on it."""
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    with room_for(part, what="the config drive"):
        part.write_bytes(content())
        part.chmod(mode)
        part.replace(path)


# fmt: off
MAKERS: dict[str, tuple[str, ...]] = {
    "swap": ("mkswap", "-q", "-L", "LABEL"),
    "ext2": ("mkfs.ext2", "-q", "-F", "-L", "LABEL"),
    "ext3": ("mkfs.ext3", "-q", "-F", "-L", "LABEL"),
    "ext4": ("mkfs.ext4", "-q", "-F", "-L", "LABEL"),
    "xfs":  ("mkfs.xfs", "-q", "-f", "-L", "LABEL"),
    "vfat": ("mkfs.vfat", "-I", "-n", "LABEL"),
}
# fmt: on


def make_file_system(system: str, path: Path, label: str) -> None:
    """Raises Refused."""
    maker = MAKERS.get(system)
    program = maker and shutil.which(maker[0], path=PATH)
    if not maker or not program:
        raise Refused(f"This host cannot make a file system of the kind {system!r}.")
    label = "swap" if system == "swap" else label
    _run([program, *(label[:11] if word == "LABEL" else word for word in maker[1:]), str(path)], timeout_s=120)


def qemu_img(*arguments: str, cpu_s: int = 30, memory_mb: int = 1024) -> bytes:
    """What qemu-img says, kept from eating the host: an image can be made to ask for days and terabytes.

    Raises Refused.
    """
    program = shutil.which("qemu-img", path=PATH)
    if not program:
        raise Refused("There is no qemu-img on this host.")
    command = [program, *arguments]
    if limits := shutil.which("prlimit", path=PATH):
        command = [limits, f"--cpu={cpu_s}", f"--as={memory_mb << 20}", "--core=0", "--", *command]
    return _run(command, timeout_s=cpu_s * 4)


def _run(command: list[str], timeout_s: float) -> bytes:
    """Raises OSError(ENOSPC) where the disk is full, Refused when the program failed otherwise."""
    name = next(Path(word).name for word in command if "prlimit" not in word and not word.startswith("--"))
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            # One arena: each thread's own would count as 64 MiB of address space.
            env={"PATH": PATH, "LC_ALL": "C", "MALLOC_ARENA_MAX": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Refused("A disk could not be prepared in time.", why=f"{name}: more than {timeout_s:g} s") from None
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.decode(errors="replace").strip()
    if "No space left on device" in said or "Disk quota exceeded" in said:
        raise OSError(28, "No space left on device")
    why = f"{name} ended with {done.returncode}: {said}"
    logger.warning("%s", why)
    raise Refused("A disk could not be prepared.", why=why)


@contextlib.contextmanager
def room_for(*parts: Path, what: str, needed: int = 0) -> Iterator[None]:
    """Inside, `parts` are being made; when that fails nothing is left of them. Full disks are said in plain words."""
    found = os.statvfs(parts[0].parent)
    free = found.f_bavail * found.f_frsize
    try:
        if needed > free:
            raise OSError(28, f"{needed} bytes are needed, {free} are free")
        yield
    except BaseException as e:
        for part in parts:
            part.unlink(missing_ok=True)
        if isinstance(e, Trouble) or not isinstance(e, OSError):
            raise
        if e.errno in (28, 122):
            mib = f": it needs {needed >> 20} MiB, {free >> 20} MiB are free" if needed > free else ""
            raise Refused(f"There is not enough disk space on this host for {what}{mib}.", why=str(e)) from None
        raise Refused(f"This host could not store {what}.", why=str(e)) from None
