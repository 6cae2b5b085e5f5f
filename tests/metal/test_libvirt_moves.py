"""Cold moves of real machines: two of one server on a host, and a power cut between any two steps."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kilonova.contracts.compute import Luggage
from kilonova.kit.errors import NotFound, Refused, Unavailable, Unsupported
from kilonova.model.machine import BlankSource, Disk, Machine
from kilonova.virt.driver import Held
from kilonova.virt.libvirt import copies, disks, moves, records
from kilonova.virt.libvirt import luggage as luggages
from kilonova.virt.libvirt.driver import LibvirtDriver
from kilonova.virt.libvirt.luggage import served_again
from tests.metal.lab import BOOT_S, MARKS, MIB, Lab, made, processes, until

pytestmark = MARKS


def quiet(said: str) -> None:
    pass


def larger(machine: Machine, epoch: int, **changes: object) -> Machine:
    root = msgspec.structs.replace(machine.disks[0], size_bytes=320 * MIB)
    changes = {"disks": [root, *machine.disks[1:]], "memory_mb": 160, "vcpus": 2, "epoch": epoch} | changes
    return msgspec.structs.replace(machine, **changes)


def here(driver: LibvirtDriver, id: str) -> list[tuple[int, str]]:
    return [(h.epoch, h.power) for h in driver.machines() if h.id == id]


def virtual_size(path: Path) -> int:
    told = msgspec.json.decode(disks.qemu_img("info", "-U", "-f", "qcow2", "--output=json", str(path)))
    return int(told["virtual-size"])


def test_a_guest_is_resized_taken_back_and_resized(lab: Lab) -> None:
    """The guest counts its boots on its own disk: by that we know that it took it along."""
    driver = lab.driver
    swap, other = Disk("vdb", BlankSource("swap"), size_bytes=4 * MIB), Disk("vdc", BlankSource(), size_bytes=MIB)
    root = Disk("vda", lab.source("guest", "raw"), size_bytes=256 * MIB, boot_index=0)
    before = lab.machine(disks=[root, swap, other], config_drive=True, admin_password="hunter2")
    directory = lab.directory(before)
    driver.spawn(before, quiet)
    try:
        at = lab.says(before, "login:", lab.says(before, "boot 1 kernel up"))
        drives = len(lab.drives)
        after = larger(before, 5)
        after = msgspec.structs.replace(
            after,
            disks=[
                after.disks[0],
                Disk("vdb", BlankSource(), size_bytes=2 * MIB),
                Disk("vdc", BlankSource("swap"), size_bytes=8 * MIB),
            ],
        )
        driver.prepare(after)
        for _ in range(2):
            luggage = driver.depart(before.id, 3, BOOT_S)
        assert "power button" in lab.console(before)[at:]
        assert here(driver, before.id) == [(3, "shutdown")]
        for _ in range(2):
            driver.arrive(after, luggage, True, quiet)
        assert here(driver, before.id) == [(3, "shutdown"), (5, "running")]
        lab.says(before, "boot 2 kernel up")
        assert driver.stats(before.id).memory_maximum == 160
        assert driver._on(before.id, lambda domain: domain.blockInfo("vda"))[0] == 320 * MIB
        assert (directory / "disk.vdb").stat().st_size == 2 * MIB
        assert (directory / "disk.vdc").read_bytes()[4086:4096] == b"SWAPSPACE2"
        assert virtual_size(moves.beside(directory) / "disk.vda") == 256 * MIB
        assert len(lab.drives) == drives and (directory / "disk.config").exists()  # the one with the password
        assert "guest" not in driver.evict_images(max_age_s=0)

        driver.depart(before.id, 5, 0)
        back = msgspec.structs.replace(before, epoch=7)
        for _ in range(2):
            driver.come_back(back, 3, True)
        assert here(driver, before.id) == [(5, "shutdown"), (7, "running")]
        for _ in range(2):
            driver.drop(before.id, 5)
        assert here(driver, before.id) == [(7, "running")]
        assert driver._on(before.id, lambda domain: domain.blockInfo("vda"))[0] == 256 * MIB

        driver.depart(before.id, 7, 0)
        driver.arrive(larger(before, 9), luggage, True, quiet)
        for _ in range(2):
            driver.drop(before.id, 7)
        assert here(driver, before.id) == [(9, "running")] and not moves.beside(directory).exists()
    finally:
        driver.destroy(before.id)
    assert here(driver, before.id) == [] and not processes(before.id)
    assert not list(directory.parent.glob(f"*{before.id}*"))


def test_what_was_turned_off_for_a_move_stays_and_runs_again(lab: Lab) -> None:
    driver = lab.driver
    with lab.spawned() as machine:
        for power in ("running", "paused"):
            driver.depart(machine.id, 3, 0)
            for _ in range(2):
                driver.stay(machine.id, power)
            assert here(driver, machine.id) == [(3, power)]
        luggage = driver.depart(machine.id, 3, 0)
        heavy = larger(machine, 5, memory_mb=1 << 30)
        with pytest.raises(Refused):
            driver.arrive(heavy, luggage, True, quiet)
        driver.drop(machine.id, 5)
        driver.stay(machine.id, "running")
        assert here(driver, machine.id) == [(3, "running")]
        for epoch in (3, 5):  # destroyed, both go
            luggage = driver.depart(machine.id, epoch, 0)
            driver.arrive(larger(machine, epoch + 2), luggage, False, quiet)
        driver.destroy(machine.id)
        assert here(driver, machine.id) == []
    driver.stay(machine.id, "running")
    driver.drop(machine.id, 3)
    with pytest.raises(NotFound):
        driver.depart(machine.id, 3, 0)


def test_what_cannot_move_is_refused_and_nothing_is_left(lab: Lab) -> None:
    driver = lab.driver
    machine = off(lab)
    names = sorted(driver.instances.iterdir())
    with pytest.raises(Unsupported):
        driver.prepare(lab.machine())
    with pytest.raises(Refused):
        driver.arrive(larger(machine, 5), Luggage(more={"owner": "another"}), False, quiet)
    luggage = driver.depart(machine.id, 3, 0)
    small = msgspec.structs.replace(
        machine, epoch=5, disks=[msgspec.structs.replace(machine.disks[0], size_bytes=MIB), machine.disks[1]]
    )
    with pytest.raises(Refused, match="cannot shrink"):
        driver.arrive(small, luggage, False, quiet)

    def unwanted(said: str) -> None:
        raise Refused("It is not wanted any longer.")

    with pytest.raises(Refused, match="not wanted"):
        driver.arrive(larger(machine, 5), luggage, False, unwanted)
    with pytest.raises(NotFound):
        driver.come_back(larger(machine, 7), 1, False)
    assert here(driver, machine.id) == [(3, "shutdown")]
    driver.prepare(larger(machine, 5))
    assert sorted(driver.instances.iterdir()) == names
    driver.destroy(machine.id)


def test_a_copy_has_the_bytes_and_the_holes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for size, writes in (
        (0, {}),
        (3, {0: b"abc"}),
        (64 * MIB, {}),
        (64 * MIB + 1, {5 * MIB: b"x" * 9000, 64 * MIB: b"e"}),
    ):
        with one.open("wb") as file:
            file.truncate(size)
            for at, text in writes.items():
                file.seek(at)
                file.write(text)
        moves.copy(one, two)
        assert two.read_bytes() == one.read_bytes()
        assert two.stat().st_blocks <= one.stat().st_blocks + 16


# ---- from one host to another


@pytest.fixture
def there(lab: Lab, guest: Path, tmp_path: Path) -> Iterator[Lab]:
    """Another host, with another libvirtd and another directory; each says how it is reached."""
    before = lab.driver.options
    with made(guest, tmp_path, "there") as other:
        for one in (lab, other):
            one.driver.options = msgspec.structs.replace(before, migration_address="127.0.0.1", migration_port=0)
        yield other
    lab.driver.options = before


def mark(path: Path, *, look: bool = False) -> None:
    """A block of the disk, behind all that the image has on it."""
    word = f"{'read' if look else 'write'} -P 0x4b 200M 64k"
    done = subprocess.run(["qemu-io", "-f", "qcow2", "-c", word, str(path)], check=False, capture_output=True)
    assert not done.returncode and b"failed" not in done.stdout, f"{done.stdout!r} {done.stderr!r}"


def test_a_machine_goes_to_another_host(lab: Lab, there: Lab) -> None:
    """With what its guest wrote, whether or not the image is still to be had; and back again."""
    driver, other, machine = lab.driver, there.driver, off(lab)
    mark(lab.directory(machine) / "disk.vda")
    (lab.directory(machine) / "disk.config").write_bytes(b"secret".ljust(2048, b"\0"))
    machine = msgspec.structs.replace(machine, config_drive=True)
    driver._remember(machine)
    new = larger(machine, 5)
    other.prepare(new)
    luggage = driver.depart(machine.id, 3, 0)
    assert driver.depart(machine.id, 3, 0) == luggage and luggage.more["key"] not in repr(luggage)
    (server,) = processes(f"{machine.id}/serving")
    assert luggage.more["key"].encode() not in Path(f"/proc/{server}/cmdline").read_bytes()
    assert Path(f"/proc/{server}/cmdline").read_bytes().count(b"--export") == 4

    key = luggage.more | {"key": "00" * 32}
    with pytest.raises(Refused):
        other.arrive(new, msgspec.structs.replace(luggage, more=key), False, quiet)
    assert here(other, machine.id) == [] and not list(other.instances.glob(f"*{machine.id}*"))

    os.kill(server, signal.SIGKILL)  # the machine under it was off
    until(lambda: not processes(f"{machine.id}/serving"))
    with pytest.raises(Unavailable):
        other.arrive(new, luggage, False, quiet)
    again_served(driver)
    for at in range(0, 100, 3):  # power cuts, now and then
        with power_until(other, at) as power, contextlib.suppress(Cut):
            other.arrive(new, luggage, False, quiet)
        moves.mended(other.instances)
        other._sweep()
        other._met(machine.id)
        assert here(other, machine.id) in ([], [(5, "nostate")], [(5, "shutdown")])
        assert here(other, machine.id) or not list(other.instances.glob(f"*{machine.id}*"))
        if power.left >= 0:
            break
    mark(there.directory(machine) / "disk.vda", look=True)
    other.arrive(new, luggage, True, quiet)
    assert here(other, machine.id) == [(5, "running")] and here(driver, machine.id) == [(3, "shutdown")]
    there.says(machine, "kernel up")
    other.stop(machine.id, 0)
    assert virtual_size(there.directory(machine) / "disk.vda") == 320 * MIB
    assert content(there, machine) == b"old"
    assert (there.directory(machine) / "disk.config").read_bytes().startswith(b"secret")

    other.depart(machine.id, 5, 0)
    driver.come_back(msgspec.structs.replace(machine, epoch=7), 3, False)
    other.drop(machine.id, 5)
    assert (here(driver, machine.id), here(other, machine.id)) == ([(7, "shutdown")], [])
    assert not processes(f"{machine.id}/serving")

    luggage = driver.depart(machine.id, 7, 0)
    other.cache.evict((), -1)
    there.images = {}
    other.arrive(larger(machine, 9), luggage, False, quiet)
    driver.drop(machine.id, 7)
    assert (here(driver, machine.id), here(other, machine.id)) == ([], [(9, "shutdown")])
    mark(there.directory(machine) / "disk.vda", look=True)
    assert not processes(f"{machine.id}/serving") and not list(driver.instances.glob(f"*{machine.id}*"))
    luggage = other.depart(machine.id, 9, 0)  # what came along from there is part of it
    other.arrive(larger(machine, 11), luggage, False, quiet)
    other.drop(machine.id, 9)
    mark(there.directory(machine) / "disk.vda", look=True)
    other.destroy(machine.id)
    assert not processes(f"{machine.id}/serving")


def again_served(driver: LibvirtDriver) -> None:
    """As at the begin of a life."""
    served_again(driver.instances, driver._names())


# ---- a power cut between any two steps


class Cut(BaseException):
    """The host is without power."""


TOUCHES = {moves: "exchange remove copy lay remember", copies: "copy grow", luggages: "grow ended _fetched"}


class Power:
    """Fails at the n-th touch of the disk or of libvirt, and at all that come after it."""

    def __init__(self, at: int) -> None:
        self.left = at

    def touch(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Cut


@contextlib.contextmanager
def power_until(driver: LibvirtDriver, at: int) -> Iterator[Power]:
    power = Power(at)

    def through(act: Callable[..., Any]) -> Callable[..., Any]:
        def touched(*args: Any, **kwargs: Any) -> Any:
            power.touch()
            return act(*args, **kwargs)

        return touched

    with pytest.MonkeyPatch.context() as patch:
        for module, names in TOUCHES.items():
            for name in names.split():
                patch.setattr(module, name, through(getattr(module, name)))
        patch.setattr(records, "put", through(records.put))
        patch.setattr(Path, "rename", through(Path.rename))
        for name in ("_define", "_on"):
            patch.setattr(driver, name, through(getattr(driver, name)))
        yield power


def off(lab: Lab) -> Machine:
    """A machine that is off, as if it had been spawned and stopped; on its second disk stands where it comes from."""
    machine = lab.machine(disks=[Disk("vda", lab.source("guest", "raw"), size_bytes=256 * MIB, boot_index=0),
                                 Disk("vdb", BlankSource(), size_bytes=MIB)])  # fmt: skip
    directory = lab.directory(machine)
    directory.mkdir(mode=0o700)
    base = lab.driver.cache.base(machine.disks[0].source)  # type: ignore[arg-type]
    laid = {d.device: lab.driver.workshop.lay(d, n, directory, base) for n, d in enumerate(machine.disks)}
    records.lay(directory, laid)
    lab.driver._remember(machine)
    lab.driver._define(machine)
    write(directory, b"old")
    return machine


def write(directory: Path, text: bytes) -> None:
    with (directory / "disk.vdb").open("rb+") as file:
        file.write(text)


def cut_short(lab: Lab, machine: Machine, act: Callable[[], object], then: Callable[[], None]) -> int:
    """With a cut before each step of `act`: another life begins, `then` looks and leaves all as it was before."""
    steps = 0
    while True:
        with power_until(lab.driver, steps) as power, contextlib.suppress(Cut):
            act()
        whole = power.left >= 0
        with contextlib.suppress(NotFound):
            lab.driver._on(machine.id, lambda domain: domain.undefine())  # the power took libvirt's memory, say
        moves.mended(lab.driver.instances)
        lab.driver._sweep()
        lab.driver._met(machine.id)
        listed = here(lab.driver, machine.id)
        assert listed and listed == sorted(listed), f"after {steps} steps: {listed}"
        assert lab.driver.power(machine.id)
        then()
        if whole:
            return steps
        steps += 1


def epochs(lab: Lab, machine: Machine) -> list[int]:
    return [epoch for epoch, _ in here(lab.driver, machine.id)]


def content(lab: Lab, machine: Machine, kept: bool = False) -> bytes:
    """Of the disk that its definition names."""
    directory = lab.directory(machine)
    path = Path(records.laid_in(directory)["vdb"].layers[0].path)
    assert path.parent == directory
    return ((moves.beside(directory) if kept else directory) / path.name).read_bytes()[:3]


def test_a_resize_is_cut_short(lab: Lab) -> None:
    driver, machine = lab.driver, off(lab)
    new = larger(machine, 5)
    luggage = driver.depart(machine.id, 3, 0)

    def arrive() -> None:
        driver.arrive(new, luggage, False, quiet)

    def done_again() -> None:
        arrive()
        assert epochs(lab, machine) == [3, 5] and content(lab, machine) == content(lab, machine, True) == b"old"
        assert virtual_size(lab.directory(machine) / "disk.vda") == 320 * MIB
        undone()

    def undone() -> None:
        driver.drop(machine.id, 5)
        assert epochs(lab, machine) == [3] and content(lab, machine) == b"old"
        assert len(list(driver.instances.glob(f"*{machine.id}*"))) == 1
        assert virtual_size(lab.directory(machine) / "disk.vda") == 256 * MIB

    assert cut_short(lab, machine, arrive, done_again) > 8
    cut_short(lab, machine, arrive, undone)
    driver.destroy(machine.id)


def test_a_return_is_cut_short(lab: Lab) -> None:
    """And what takes it back: the machine that was kept is kept again."""
    driver, machine = lab.driver, off(lab)
    driver.arrive(larger(machine, 5), driver.depart(machine.id, 3, 0), False, quiet)
    write(lab.directory(machine), b"new")
    driver.depart(machine.id, 5, 0)
    back = msgspec.structs.replace(machine, epoch=7)

    def come_back() -> None:
        driver.come_back(back, 3, False)

    def done_again() -> None:
        come_back()
        assert epochs(lab, machine) == [5, 7]
        assert (content(lab, machine), content(lab, machine, True)) == (b"old", b"new")
        undone()

    def undone() -> None:
        if epochs(lab, machine)[-1] == 7:
            driver.depart(machine.id, 3, 0)
        assert epochs(lab, machine) == [3, 5]
        assert (content(lab, machine), content(lab, machine, True)) == (b"new", b"old")

    assert cut_short(lab, machine, come_back, done_again) > 3
    cut_short(lab, machine, come_back, undone)
    come_back()

    def depart() -> None:
        driver.depart(machine.id, 3, 0)

    def taken_back() -> None:
        depart() if epochs(lab, machine)[-1] == 7 else None
        undone()
        come_back()

    assert cut_short(lab, machine, depart, taken_back) > 3
    driver.destroy(machine.id)


@pytest.mark.parametrize("epoch", [3, 5])
def test_the_word_is_cut_short(lab: Lab, epoch: int) -> None:
    """Yes: the old one goes. No: the new one."""
    driver, machine = lab.driver, off(lab)
    machine_5 = larger(machine, 5)
    left = 8 - epoch

    def two() -> None:
        luggage = driver.depart(machine.id, 3, 0)
        write(lab.directory(machine), b"old")
        driver.arrive(machine_5, luggage, False, quiet)
        write(lab.directory(machine), b"new")

    def dropped() -> None:
        driver.drop(machine.id, epoch)
        assert epochs(lab, machine) == [left]
        assert content(lab, machine) == (b"old" if left == 3 else b"new")
        assert len(list(driver.instances.glob(f"*{machine.id}*"))) == 1
        two()

    two()
    assert cut_short(lab, machine, lambda: driver.drop(machine.id, epoch), dropped) > 1
    driver.destroy(machine.id)


def test_two_of_one_server_are_both_told_of(lab: Lab) -> None:
    driver, machine = lab.driver, off(lab)
    driver.arrive(larger(machine, 5), driver.depart(machine.id, 3, 0), False, quiet)
    other = lab.another()
    mine = [h for h in other.machines() if h.id == machine.id]
    assert mine == [Held(machine.id, "shutdown", 3), Held(machine.id, "shutdown", 5, ports=[], volumes=[])]
    other.close(stop_daemon=False)
    driver.destroy(machine.id)
