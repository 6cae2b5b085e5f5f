"""Cold moves (`virt.driver.Resizes`): a chapter of `driver.py`, about servers that have two machines on one host.

`instances/UUID` is the machine, `instances/UUID.beside` the older one that is kept, off: libvirt knows only the first.
What the files of a kept one say of paths is true when it is the machine again.  Which is which their epochs say, and the
two change names in one step, so there is no moment without a machine.  A directory beside that has no `machine.json` is
a machine in the making, of no use to anybody but its maker; that file is written last.

Disks are copied, not laid upon each other: each machine can go without asking the other, and no chain grows.  Where the
file system can share blocks (XFS, Btrfs) a copy takes a moment and no room.
"""

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kilonova.contracts.compute import Luggage
from kilonova.kit.errors import NotFound, Refused, Trouble, Unsupported
from kilonova.model.machine import BlankSource, Disk, ImageSource, Machine, VolumeSource
from kilonova.virt.driver import Power, Progress
from kilonova.virt.libvirt import console_log, disks, volumes, xml
from kilonova.virt.libvirt.records import SSH_PORT, laid_in, lay, machine_in, remember, written

if TYPE_CHECKING:
    from kilonova.virt.libvirt.driver import LibvirtDriver

logger = logging.getLogger(__name__)

BESIDE = ".beside"
PIECE_BYTES = 256 << 20  # of a disk, between two looks whether its copy is still wanted
RENAME_EXCHANGE, AT_FDCWD = 2, -100


# ---- acts; each may be done twice


def prepare(driver: "LibvirtDriver", machine: Machine) -> None:
    if driver._machine(machine.id) is None:
        raise Unsupported("This host cannot have the disks of a server on another host.")
    probed = driver.instances / f".{machine.id}.probe"
    try:
        for name in ("a", "b"):
            (probed / name).mkdir(parents=True)
        exchange(probed / "a", probed / "b")
    finally:
        shutil.rmtree(probed, ignore_errors=True)


def depart(driver: "LibvirtDriver", id: str, epoch: int, timeout_s: float) -> Luggage:
    driver._known(id)
    with contextlib.suppress(NotFound):  # libvirt may have forgotten it
        driver.stop(id, timeout_s)
    with driver._alone(id):
        driver._remember(msgspec.structs.replace(driver._known(id), epoch=epoch))
        in_order(driver._directory(id))
        driver._met(id)
    return Luggage(more={"owner": driver.owner})


def arrive(driver: "LibvirtDriver", machine: Machine, luggage: Luggage, start: bool, progress: Progress) -> None:
    id, directory = machine.id, driver._directory(machine.id)
    before = driver._machine(id)
    if before is None or before.epoch != machine.epoch:
        if before is None or luggage.more.get("owner") != driver.owner:
            raise Unsupported("This host cannot have the disks of a server on another host.")
        _made_beside(driver, machine, before, progress)
        with driver._alone(id):
            with contextlib.suppress(NotFound):
                driver._on(id, driver._turned_off)
            exchange(beside(directory), directory)
            driver._met(id)
    with driver._alone(id):
        driver._define(machine)
        if start:
            progress("starting")
            driver._run(machine)


def come_back(driver: "LibvirtDriver", machine: Machine, was: int, start: bool) -> None:
    id, directory = machine.id, driver._directory(machine.id)
    with driver._alone(id):
        in_order(directory)
        if driver._known(id).epoch != machine.epoch:
            with contextlib.suppress(NotFound):
                driver._on(id, driver._turned_off)
                driver._on(id, driver._forget_saved)
            place = next((p for p in (directory, beside(directory)) if epoch_in(p) == was), None)
            if place is None:
                raise NotFound(f"Nothing is kept of {id} on this host.")
            lay(place, _laid_again(machine, place))
            remember(place, machine)
            in_order(directory)
        driver._met(id)
        driver._define(machine)
        if start:
            driver._run(machine)


def stay(driver: "LibvirtDriver", id: str, power: Power) -> None:
    """It takes something back: what does not go is left to those who watch."""
    machine = driver._machine(id)
    if machine is None or power not in ("running", "paused") or driver.power(id) == power:
        return
    try:
        with driver._alone(id):
            driver._define(machine)
            driver._run(machine)
        if power == "paused":
            driver.pause(id)
    except Trouble as e:
        logger.warning("%s does not run again: %s", id, e.said)


def drop(driver: "LibvirtDriver", id: str, epoch: int) -> None:
    directory = driver._directory(id)
    other = beside(directory)
    with driver._alone(id):
        if epoch_in(other) in (None, epoch):
            remove(other)
        if epoch_in(directory) != epoch:
            return
        if not other.is_dir():
            driver.destroy(id)
            return
        with contextlib.suppress(NotFound):
            driver._on(id, driver._turned_off)
            driver._on(id, driver._forget_saved)
        gone = hidden(directory)
        directory.rename(gone)
        other.rename(directory)  # what a crash between the two leaves, `mended` puts right
        shutil.rmtree(gone, ignore_errors=True)
        driver._met(id)
        driver._define(driver._known(id))


# ---- two directories


def beside(directory: Path) -> Path:
    return directory.with_name(directory.name + BESIDE)


def kept(names: set[str], instances: Path) -> Iterator[Machine]:
    """The machines that are kept beside others, by the names of what is in `instances`."""
    for name in sorted(names):
        if name.endswith(BESIDE) and (machine := machine_in(instances / name)):
            yield machine


def epoch_in(directory: Path) -> int | None:
    machine = machine_in(directory)
    return machine.epoch if machine else None


def in_order(directory: Path) -> None:
    """The one with the higher epoch is the machine."""
    older, newer = epoch_in(beside(directory)), epoch_in(directory)
    if older is not None and (newer is None or older > newer):
        exchange(beside(directory), directory)


def mended(instances: Path) -> None:
    """What an earlier life of ours left between two steps, before anybody looks."""
    for other in instances.glob(f"*{BESIDE}"):
        directory = other.with_name(other.name.removesuffix(BESIDE))
        if epoch_in(other) is None:
            remove(other)
        elif directory.is_dir():
            in_order(directory)
        else:
            other.rename(directory)


def remove(directory: Path) -> None:
    """Out of sight at once; then its files. Nothing there: nothing to do."""
    with contextlib.suppress(FileNotFoundError):
        gone = hidden(directory)
        directory.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def hidden(directory: Path) -> Path:
    """What has such a name is rubbish (`LibvirtDriver._sweep`)."""
    return directory.with_name(f".{directory.name}.{time.monotonic_ns()}")


def exchange(one: Path, other: Path) -> None:
    """They change names, in one step. Raises Refused where the file system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None or swap(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        why = os.strerror(ctypes.get_errno()) if swap else "no renameat2"
        raise Refused("The file system of this host cannot keep two machines of a server.", why=f"{one}: {why}")
    written(one.parent)


# ---- a machine of another's disks


def _made_beside(driver: "LibvirtDriver", machine: Machine, before: Machine, progress: Progress) -> None:
    """Whole, or nothing of it."""
    directory = driver._directory(machine.id)
    new = beside(directory)
    remove(new)
    new.mkdir(mode=0o711 if driver.shared else 0o700)
    try:
        with disks.room_for(new / "disk", what="another machine of the server"):
            laid = copied(driver.workshop, machine, before, directory, new, progress)
            for name in (SSH_PORT, *([xml.CONFIG_DRIVE] if machine.config_drive else [])):
                if (directory / name).exists():
                    copy(directory / name, new / name)
            (new / "console.log").write_bytes(console_log.tail(directory / "console.log", console_log.TAIL_BYTES))
            lay(new, laid)
            remember(new, machine)
            written(new / "disks.json", new / "machine.json", new)
    except BaseException:
        remove(new)
        raise


def copied(
    workshop: disks.Workshop, machine: Machine, before: Machine, of: Path, into: Path, progress: Progress
) -> dict[str, xml.Laid]:
    """Its disks, copies of those in `of`, where they will lie when `into` has the name of `of`. They grow, never shrink."""
    was, mates = laid_in(of), mates_of(machine, before)
    laid: dict[str, xml.Laid] = {}
    for number, disk in enumerate(machine.disks):
        progress("copying disks")
        mate = mates.get(disk.device)
        if isinstance(disk.source, VolumeSource):
            laid[disk.device] = volumes.laid(disk.source)
        elif mate is None:
            made = workshop.lay(disk, number, into, None) if isinstance(disk.source, BlankSource) else None
            if made is None:
                raise Refused("The disks of the server are missing on this host.")
            laid[disk.device] = _named(made, into, of)
        else:
            found = was[mate.device]
            top, *below = found.layers
            if not found.read_only:
                path = into / f"disk.{disk.device}"
                copy(of / Path(top.path).name, path, lambda: progress("copying disks"))
                grow(path, top.format, disk.size_bytes)
                top = msgspec.structs.replace(top, path=str(of / path.name))
            laid[disk.device] = msgspec.structs.replace(found, layers=[top, *below])
    return laid


def mates_of(machine: Machine, before: Machine) -> dict[str, Disk]:
    """By device of the one, the disk of the other that it was: the how manieth of its kind. Swap space has nothing to keep
    when it gets another size."""

    def places(m: Machine) -> dict[tuple[str, int], Disk]:
        found: dict[tuple[str, int], Disk] = {}
        for disk in m.disks:
            if not isinstance(disk.source, VolumeSource):
                kind = "image" if isinstance(disk.source, ImageSource) else "blank"
                if isinstance(disk.source, BlankSource) and disk.source.format == "swap":
                    kind = f"swap {disk.size_bytes}"
                found[kind, sum(k == kind for k, _ in found)] = disk
        return found

    old = places(before)
    return {disk.device: old[place] for place, disk in places(machine).items() if place in old}


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


def _laid_again(machine: Machine, place: Path) -> dict[str, xml.Laid]:
    """Where its disks lie: its own where they lay, volumes where this host finds them now."""
    was = laid_in(place)
    laid = {}
    for disk in machine.disks:
        if isinstance(disk.source, VolumeSource):
            laid[disk.device] = volumes.laid(disk.source)
        elif disk.device in was:
            laid[disk.device] = was[disk.device]
        else:
            raise Refused("The disks of the server are missing on this host.", why=disk.device)
    return laid


def _named(laid: xml.Laid, into: Path, of: Path) -> xml.Laid:
    """As it will be called."""
    layers = [
        msgspec.structs.replace(x, path=str(of / Path(x.path).name)) if Path(x.path).parent == into else x
        for x in laid.layers
    ]
    return msgspec.structs.replace(laid, layers=layers)
