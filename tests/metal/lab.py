"""A host with a real hypervisor for tests: one private libvirtd, in a network namespace of its own where we may make one,
under a directory whose name is too long for a socket and has what shells stumble over.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.errors import NotFound
from kilonova.model.machine import Disk, Identity, ImageSource, Machine
from kilonova.model.options import Compute, Libvirt
from kilonova.virt.libvirt.driver import LibvirtDriver
from kilonova.virt.libvirt.keeper import started

PATH = f"{os.environ.get('PATH')}:/usr/sbin:/sbin"
ABSENT = [p for p in ("libvirtd", "qemu-system-x86_64", "qemu-img") if not shutil.which(p, path=PATH)]
MARKS = [pytest.mark.metal, pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")]

AS_ROOT = os.geteuid() == 0
BOOT_S = 120.0  # idle it is 5
MIB = 1 << 20
NUMBERS = iter(range(1, 1000))


class Lab:
    """A host with its images, and what a test wants to know of it."""

    def __init__(
        self, state_dir: Path, images: dict[str, bytes | Path], netns: str | None, options: Libvirt | None = None
    ) -> None:
        self.state_dir, self.images, self.netns = state_dir, images, netns
        self.fetched: list[str] = []
        self.drives: list[Machine] = []
        self.driver = self.another(options)

    def another(self, options: Libvirt | None = None, compute: Compute | None = None) -> LibvirtDriver:
        """As a new life of Kilonova makes it."""
        return LibvirtDriver(
            self.state_dir,
            options,
            compute,
            clock=WallClock(),
            ids=Ids(),
            fetch=self.fetch,
            config_drive=self.drive,
            netns=self.netns,
            hostname="metal",
        )

    def fetch(self, image_id: str, write: Callable[[bytes], object]) -> None:
        self.fetched.append(image_id)
        if image_id not in self.images:
            raise NotFound(f"Image {image_id} could not be found.")
        image = self.images[image_id]
        content = image.read_bytes() if isinstance(image, Path) else image
        for at in range(0, len(content), 1 << 16):
            write(content[at : at + (1 << 16)])

    def drive(self, machine: Machine) -> bytes:
        self.drives.append(machine)
        return b"a config drive".ljust(4096, b"\0")

    def source(self, image_id: str, disk_format: str, **said: Any) -> ImageSource:
        image = self.images[image_id]
        size = image.stat().st_size if isinstance(image, Path) else len(image)
        return msgspec.convert(
            {"image_id": image_id, "disk_format": disk_format, "size_bytes": size, "type": "image", **said}, ImageSource
        )

    def machine(self, **changes: Any) -> Machine:
        number = next(NUMBERS)
        id = f"0b1c2d3e-{os.getpid() % 65536:04x}-4000-8000-{number:012x}"
        made = Machine(
            id=id,
            name=f"instance-{number:08x}",
            vcpus=1,
            memory_mb=128,
            disks=[Disk("vda", self.source("guest", "raw"), size_bytes=256 * MIB, boot_index=0)],
            nics=[],
            identity=Identity(uuid=id, name="one <&\"'>", hostname="one", project_id="p"),
            epoch=3,
        )
        return msgspec.structs.replace(made, **changes)

    @contextlib.contextmanager
    def spawned(self, **changes: Any) -> Iterator[Machine]:
        machine = self.machine(**changes)
        self.driver.spawn(machine, lambda said: None)
        try:
            yield machine
        finally:
            self.driver.destroy(machine.id)

    def console(self, machine: Machine) -> str:
        return self.driver.console_log(machine.id).decode(errors="replace")

    def says(self, machine: Machine, text: str, after: int = 0) -> int:
        """Waits until the guest says it; gives where it ends."""
        until(lambda: text in self.console(machine)[after:], BOOT_S, lambda: self.console(machine)[-2000:])
        return self.console(machine).index(text, after) + len(text)

    def directory(self, machine: Machine) -> Path:
        return self.state_dir / "instances" / machine.id


def until(true: Callable[[], bool], timeout_s: float = 20.0, why: Callable[[], object] = lambda: "") -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, why()
        time.sleep(0.02)


def processes(word: str) -> list[int]:
    """Those that live and were called with that word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes() and started(int(path.parent.name)):
                found.append(int(path.parent.name))
    return found


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=True, env={"PATH": PATH})
    return done.stdout


@contextlib.contextmanager
def made(guest: Path, state: Path, name: str = "metal") -> Iterator[Lab]:
    """A host under this directory; all of it is gone afterwards."""
    space = f"kilonova-{name}-{os.getpid()}" if AS_ROOT else ""
    if space:
        ip("netns", "add", space)
        ip("-n", space, "link", "add", "br-metal", "type", "bridge")
        ip("-n", space, "link", "set", "br-metal", "up")
    try:
        lab = Lab(state, {"guest": guest}, f"/run/netns/{space}" if space else None)
        yield lab
        for held in lab.driver.machines():
            lab.driver.destroy(held.id)
        lab.driver.close(stop_daemon=True)
        until(lambda: not processes(str(state)), 20, lambda: processes(str(state)))
    finally:
        if space:
            ip("netns", "delete", space)
