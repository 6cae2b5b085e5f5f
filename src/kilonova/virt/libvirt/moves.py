"""Cold moves (`virt.driver.Resizes`): a chapter of `driver.py`, about servers that have two machines on one host.

`instances/UUID` is the machine, `instances/UUID.beside` the older one that is kept, off: libvirt knows only the first.
What the files of a kept one say of paths is true when it is the machine again.  Which is which their epochs say, and the
two change names in one step, so there is no moment without a machine.  A directory beside that has no `machine.json` is
a machine in the making, of no use to anybody but its maker; that file is written last.
"""

import contextlib
import ctypes
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kilonova.contracts.compute import Luggage
from kilonova.kit.errors import NotFound, Refused, Trouble, Unsupported
from kilonova.model.machine import Machine, VolumeSource
from kilonova.virt.driver import Power, Progress
from kilonova.virt.libvirt import console_log, disks, luggage, volumes, xml
from kilonova.virt.libvirt.copies import copied, copy
from kilonova.virt.libvirt.records import SSH_PORT, laid_in, lay, machine_in, remember, written

if TYPE_CHECKING:
    from kilonova.virt.libvirt.driver import LibvirtDriver

logger = logging.getLogger(__name__)

BESIDE = ".beside"
RENAME_EXCHANGE, AT_FDCWD = 2, -100
NOT_HERE = (
    "Servers cannot be moved to this host: its configuration names no address for that ([libvirt] migration_address)."
)


# ---- acts; each may be done twice


def prepare(driver: "LibvirtDriver", machine: Machine) -> None:
    if driver._machine(machine.id) is None and not driver.options.migration_address:
        raise Unsupported(NOT_HERE)
    probed = driver.instances / f".{machine.id}.probe"
    try:
        for name in ("a", "b"):
            (probed / name).mkdir(parents=True)
        exchange(probed / "a", probed / "b")
    finally:
        shutil.rmtree(probed, ignore_errors=True)


def depart(driver: "LibvirtDriver", id: str, epoch: int, timeout_s: float) -> Luggage:
    driver._known(id)
    directory = driver._directory(id)
    with contextlib.suppress(NotFound):  # libvirt may have forgotten it
        driver.stop(id, timeout_s)
    with driver._alone(id):
        driver._remember(msgspec.structs.replace(driver._known(id), epoch=epoch))
        driver._remove_devices(driver._known(id))  # another machine may have others under the same names
        in_order(directory)
        driver._met(id)
    options = driver.options
    return luggage.packed(directory, driver.owner, options.migration_address or "", options.migration_port)


def arrive(driver: "LibvirtDriver", machine: Machine, left: Luggage, start: bool, progress: Progress) -> None:
    id, directory = machine.id, driver._directory(machine.id)
    before = driver._machine(id)
    if before is None or before.epoch != machine.epoch:
        _made_beside(driver, machine, before, left, progress)
        with driver._alone(id):
            with contextlib.suppress(NotFound):
                driver._on(id, driver._turned_off)
            if before is None:
                beside(directory).rename(directory)
            else:
                luggage.ended(directory)  # it has not gone far
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
            luggage.ended(place)
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
    luggage.ended(driver._directory(id))
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
        driver._remove_devices(driver._known(id))
        luggage.ended(directory)
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
    luggage.ended(directory)
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


def _made_beside(
    driver: "LibvirtDriver", machine: Machine, before: Machine | None, left: Luggage, progress: Progress
) -> None:
    """Whole, or nothing of it."""
    directory = driver._directory(machine.id)
    new = beside(directory)
    remove(new)
    new.mkdir(mode=0o711 if driver.shared else 0o700)
    try:
        with disks.room_for(new / "disk", what="another machine of the server"):
            if left.more.get("owner") != driver.owner:
                laid = luggage.unpacked(driver.workshop, machine, left, new, directory, progress)
            elif before is None:
                raise Refused("The disks of the server are missing on this host.")
            else:
                laid = copied(driver.workshop, machine, before.disks, directory, new, progress)
            for name in (SSH_PORT, *([xml.CONFIG_DRIVE] if machine.config_drive else [])):
                if before is not None and (directory / name).exists():
                    copy(directory / name, new / name)
            (new / "console.log").write_bytes(console_log.tail(directory / "console.log", console_log.TAIL_BYTES))
            lay(new, laid)
            remember(new, machine)
            written(new / "disks.json", new / "machine.json", new)
    except BaseException:
        remove(new)
        raise


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
