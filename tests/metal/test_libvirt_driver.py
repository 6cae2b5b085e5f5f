"""The hypervisor that is real: guests that boot, disks that somebody lies about, and daemons that die."""

import contextlib
import hashlib
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from websockets.sync.client import connect

import kilonova
from kilonova.console.proxy import Proxy
from kilonova.kit.clock import WallClock
from kilonova.kit.db import Db, meta
from kilonova.kit.errors import NotFound, Refused, Unavailable, Unsupported
from kilonova.kit.http import listen
from kilonova.model.flavor import Flavor
from kilonova.model.machine import BlankSource, Disk, ImageSource, Machine, Nic, VolumeSource
from kilonova.model.options import Compute, Console, Libvirt
from kilonova.model.server import Server
from kilonova.store import consoles, servers
from kilonova.virt.driver import Attends, Captures, Consoles, Driver, Held, Hotplugs, Rebuilds, Rescues, Resizes, can
from kilonova.virt.libvirt import host
from kilonova.virt.libvirt.daemon import Private
from kilonova.virt.libvirt.disks import ImageCache
from tests.metal.lab import AS_ROOT, BOOT_S, MARKS, MIB, NUMBERS, Lab, ip, processes, until

pytest.importorskip("libvirt", reason="libvirt's Python module is not installed")
pytestmark = MARKS

# ---- guests


def test_a_servers_life(lab: Lab) -> None:
    driver, said = lab.driver, list[str]()
    assert isinstance(driver, Driver)
    machine = lab.machine(config_drive=True, admin_password="hunter2")
    news: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    driver.listen(lambda id, power: news.put((id, power)))

    driver.spawn(machine, said.append)
    assert said[0].startswith("fetching image") and said[-2:] == ["making disks", "starting"]
    assert Held(machine.id, "running", 3, ports=[], volumes=[]) in driver.machines()
    at = lab.says(machine, "boot 1 kernel up")
    at = lab.says(machine, "login:", at)
    pid = processes(machine.id)
    driver.spawn(machine, said.append)  # the same once more
    assert processes(machine.id) == pid

    assert [m.admin_password for m in lab.drives] == ["hunter2"]
    assert b"hunter2" not in (lab.directory(machine) / "machine.json").read_bytes()
    assert {p.stat().st_mode & 0o777 for p in lab.directory(machine).glob("*.json")} == {0o600}

    for _ in range(2):
        driver.pause(machine.id)
        assert driver.power(machine.id) == "paused"
    for _ in range(2):
        driver.unpause(machine.id)
        assert driver.power(machine.id) == "running"

    for _ in range(2):
        driver.suspend(machine.id)
        assert driver.power(machine.id) == "suspended"
        assert not processes(machine.id)
    for _ in range(2):
        driver.resume(machine.id)
        assert driver.power(machine.id) == "running"
    time.sleep(0.5)
    while not news.empty():
        news.get()

    driver.reboot(machine.id, hard=False, timeout_s=BOOT_S)
    at = lab.says(machine, "power button", at)
    at = lab.says(machine, "boot 2 kernel up", at)
    at = lab.says(machine, "login:", at)
    assert news.empty()  # it never looked off

    driver.stop(machine.id, timeout_s=BOOT_S)
    assert "power button" in lab.console(machine)[at:]
    assert driver.power(machine.id) == "shutdown"
    driver.stop(machine.id, timeout_s=BOOT_S)
    for _ in range(2):
        driver.start(machine.id)
    at = lab.says(machine, "boot 3 kernel up", at)
    at = lab.says(machine, "login:", at)

    pid = processes(machine.id)
    driver.reboot(machine.id, hard=True, timeout_s=0)
    assert processes(machine.id) != pid
    lab.says(machine, "kernel up", at)  # which boot it counts depends on what it had written down
    assert len(lab.drives) == 1  # the drive with the password is made once

    for _ in range(2):
        driver.destroy(machine.id)
    with pytest.raises(NotFound):
        driver.power(machine.id)


def test_a_guest_is_copied_rescued_and_made_anew(lab: Lab, tmp_path: Path) -> None:
    """Each guest counts its boots on its own disk: by that we know which disk it has."""
    driver = lab.driver
    assert all(can(driver, kind) for kind in (Captures, Rebuilds, Rescues, Attends, Resizes))
    with lab.spawned() as machine:
        at = lab.says(machine, "login:", lab.says(machine, "boot 1 kernel up"))
        for disk_format in ("raw", "qcow2"):
            for _ in range(2):
                driver.capture(machine.id, disk_format, disk_format, lambda said: None)
            assert driver.power(machine.id) == "running"
            with (tmp_path / disk_format).open("wb") as file:
                for chunk in driver.captured(machine.id, disk_format):
                    file.write(chunk)
        assert next(h for h in driver.machines() if h.id == machine.id).captures == ["qcow2", "raw"]
        for disk_format in ("raw", "qcow2"):
            driver.drop_capture(machine.id, disk_format)
        assert not list(lab.directory(machine).glob("*capture*"))
        lab.images["copy"] = tmp_path / "qcow2"
        source = lab.source("copy", "qcow2")
        with lab.spawned(disks=[Disk("vda", source, size_bytes=256 * MIB, boot_index=0)]) as twin:
            lab.says(twin, "boot 2 kernel up")

        stats = driver.stats(machine.id)
        assert (stats.state, [d.device for d in stats.disks]) == ("running", ["vda"])
        assert stats.disks[0].read_bytes and stats.cpus[0].time
        driver.crash_dump(machine.id)
        with pytest.raises(Unsupported):
            driver.set_password(machine.id, "hunter2")

        own = lab.source("guest", "raw")
        # Of two disks with the same label its kernel takes the first: the stable one is known by what QEMU was told.
        for disk, stable in ((Disk("vda", own, boot_index=0), False), (Disk("vdb", own, boot_index=0), True)):
            for _ in range(2):
                driver.rescue(machine.id, disk, stable, "hunter2", lambda said: None)
            at = lab.says(machine, "kernel up" if stable else "boot 1 kernel up", at)
            domain = ElementTree.parse(lab.directory(machine) / "domain.xml")
            orders = {d.find("target").get("dev"): d.find("boot") for d in domain.findall("devices/disk")}
            assert [name for name, order in orders.items() if order is not None] == [disk.device]
            assert [d.device for d in driver.stats(machine.id).disks] == ["vda", "vdb"]
            at = lab.says(machine, "login:", at)
            driver.stop(machine.id, timeout_s=0)
            for _ in range(2):
                driver.unrescue(machine.id)
            at = lab.says(machine, "kernel up", at)
            assert [d.device for d in driver.stats(machine.id).disks] == ["vda"]
            assert not (lab.directory(machine) / "rescue").exists()

        for _ in range(2):
            driver.rebuild(machine, lambda said: None)
        at = lab.says(machine, "boot 1 kernel up", at)


def test_nothing_is_left(lab: Lab) -> None:
    driver = lab.driver
    driver.host()  # libvirt has made its files
    before = {p for p in lab.state_dir.rglob("*") if "cache" not in p.parts}
    nics = []
    if AS_ROOT:
        nics = [Nic("p", "n", "fa:16:3e:00:00:07", "tap-metal", bridge="br-metal", mtu=1400)]
    disks = [
        Disk("vda", lab.source("guest", "raw"), boot_index=0),
        Disk("vdb", BlankSource("swap"), size_bytes=4 * MIB),
        Disk("vdc", BlankSource("ext4"), size_bytes=16 * MIB),
        Disk("vdd", BlankSource(), size_bytes=MIB),
    ]
    machine = lab.machine(nics=nics, disks=disks, config_drive=True)
    driver.spawn(machine, lambda said: None)
    if AS_ROOT:
        space = Path(lab.netns or "").name
        assert "master br-metal" in (tap := ip("-n", space, "link", "show", "tap-metal")) and "mtu 1400" in tap
        assert "tap-metal" not in {name for _, name in socket.if_nameindex()}
    assert (lab.directory(machine) / "disk.vdb").read_bytes()[4086:4096] == b"SWAPSPACE2"
    assert (lab.directory(machine) / "disk.vdc").read_bytes()[1080:1082] == b"\x53\xef"
    assert (lab.directory(machine) / "disk.vdd").stat().st_size == MIB
    assert len(processes(machine.id)) == 1

    driver.destroy(machine.id)
    assert not processes(machine.id)
    assert machine.id not in {held.id for held in driver.machines()}
    left = {p for p in lab.state_dir.rglob("*") if "cache" not in p.parts} - before
    assert not [p for p in left if p.is_file() or machine.id in p.name or machine.name in p.name]
    if AS_ROOT:
        assert "tap-metal" not in ip("-n", space, "link")


def test_a_guest_that_does_not_help_is_turned_off(lab: Lab) -> None:
    with lab.spawned() as machine:  # its firmware does not know the button yet
        since = time.monotonic()
        lab.driver.stop(machine.id, timeout_s=0.6, retry_s=0.2)
        assert 0.5 < time.monotonic() - since < 20
        assert lab.driver.power(machine.id) == "shutdown"
        lab.driver.start(machine.id)
        pid = processes(machine.id)
        lab.driver.reboot(machine.id, hard=False, timeout_s=0.3)
        assert lab.driver.power(machine.id) == "running"
        assert processes(machine.id) != pid  # made anew


def test_nics_come_and_go(lab: Lab) -> None:
    if not AS_ROOT:
        pytest.skip("there is no bridge to plug into")
    driver, space = lab.driver, Path(lab.netns or "").name
    assert isinstance(driver, Hotplugs)
    port = "0a1b2c3d-4e5f-4000-8000-000000000007"
    nic = Nic(port, "n", "fa:16:3e:00:00:08", f"tap{port[:11]}", bridge="br-metal", mtu=1400)
    with lab.spawned() as machine:
        at = lab.says(machine, "login:")
        for _ in range(2):
            driver.attach_nic(machine.id, nic)
        assert "master br-metal" in ip("-n", space, "link", "show", nic.device)
        assert [h.ports for h in driver.machines() if h.id == machine.id] == [[port]]
        assert driver._known(machine.id).identity.nics == [nic]

        driver.reboot(machine.id, hard=True, timeout_s=0)  # it is part of the machine
        lab.says(machine, "login:", lab.says(machine, "kernel up", at))
        assert "master br-metal" in ip("-n", space, "link", "show", nic.device)

        for _ in range(2):
            driver.detach_nic(machine.id, port, 30)
        assert nic.device not in ip("-n", space, "link")
        assert [h.ports for h in driver.machines() if h.id == machine.id] == [[]]

        driver.stop(machine.id, 0)
        driver.attach_nic(machine.id, nic)  # a machine that is off has it from its next start on
        driver.start(machine.id)
        assert "master br-metal" in ip("-n", space, "link", "show", nic.device)
        driver.pause(machine.id)  # and so it cannot let go
        with pytest.raises(Refused):
            driver.detach_nic(machine.id, port, 0.5)
        assert [h.ports for h in driver.machines() if h.id == machine.id] == [[port]]
        driver.detach_nic(machine.id, port, 0, anyway=True)
        assert [h.ports for h in driver.machines() if h.id == machine.id] == [[]]
        driver.reboot(machine.id, hard=True, timeout_s=0)
        assert nic.device not in ip("-n", space, "link")

        driver.attach_nic(machine.id, nic)
        driver._remember(machine)  # as if it had died between the guest and the book
        driver.detach_nic(machine.id, port, 0, anyway=True)
    driver.detach_nic(machine.id, port, 0)
    with pytest.raises(NotFound):
        driver.attach_nic(machine.id, nic)


def volume(path: Path, content: bytes | Path, size_mb: int) -> VolumeSource:
    """As the volume service says it of one of its files."""
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content)
    os.truncate(path, size_mb * MIB)
    id = f"0a1b2c3d-4e5f-4000-9000-{next(NUMBERS):012x}"
    data = {"device_path": str(path), "format": "raw", "access_mode": "rw"}
    return VolumeSource(id, {"driver_volume_type": "local", "data": data})


def test_volumes_come_and_go(lab: Lab, guest: Path, tmp_path: Path) -> None:
    """A server that boots from one; another is put in, changed for a third under the guest's hands, and taken out."""
    driver = lab.driver

    def held(machine: Machine) -> list[str] | None:
        return next(h.volumes for h in driver.machines() if h.id == machine.id)

    root = volume(tmp_path / "root", guest, 256)
    one, two = volume(tmp_path / "one", b"mine", 64), volume(tmp_path / "two", b"", 64)
    disks = [Disk("vda", root, boot_index=0, serial=root.volume_id)]
    data = Disk("vdb", one, serial=one.volume_id)
    with lab.spawned(disks=disks) as machine:
        at = lab.says(machine, "login:")
        assert held(machine) == [root.volume_id]
        for _ in range(2):
            driver.attach_volume(machine.id, data)
        assert held(machine) == [root.volume_id, one.volume_id]
        os.truncate(tmp_path / "one", 128 * MIB)
        driver.extend_volume(machine.id, one.volume_id, 128 * MIB)
        os.truncate(tmp_path / "two", 128 * MIB)
        assert driver._on(machine.id, lambda domain: domain.blockInfo("vdb"))[0] == 128 * MIB
        for _ in range(2):
            driver.swap_volume(machine.id, one.volume_id, Disk("vdc", two, serial=two.volume_id))
        assert held(machine) == [root.volume_id, two.volume_id] and (tmp_path / "two").read_bytes()[:4] == b"mine"
        description = driver._on(machine.id, lambda domain: domain.XMLDesc(0))
        assert str(tmp_path / "two") in description and str(tmp_path / "one") not in description
        assert "<mirror" not in description

        driver.reboot(machine.id, hard=True, timeout_s=0)  # it is part of the machine
        lab.says(machine, "login:", lab.says(machine, "kernel up", at))
        for _ in range(2):
            driver.detach_volume(machine.id, two.volume_id, 30)
        assert held(machine) == [root.volume_id]
        assert str(tmp_path / "two") not in driver._on(machine.id, lambda domain: domain.XMLDesc(0))

        driver.stop(machine.id, 0)
        (tmp_path / "one").write_bytes(b"anew" + bytes(64 * MIB - 4))
        driver.attach_volume(machine.id, data)
        driver.swap_volume(machine.id, one.volume_id, Disk("vdb", two, serial=two.volume_id))
        assert (tmp_path / "two").read_bytes()[:4] == b"anew"
        driver.start(machine.id)
        driver.pause(machine.id)  # and so it cannot let go
        with pytest.raises(Refused):
            driver.detach_volume(machine.id, two.volume_id, 0.5)
        driver.detach_volume(machine.id, two.volume_id, 0, anyway=True)
        assert held(machine) == [root.volume_id]
        driver.stop(machine.id, 0)

        driver.attach_volume(machine.id, data)
        driver._remember(machine)  # as if it had died between the guest and the book
        driver.start(machine.id)
        driver.detach_volume(machine.id, one.volume_id, 0, anyway=True)
    for name in ("root", "one", "two"):
        assert (tmp_path / name).exists(), "a volume is not the host's to remove"
    driver.detach_volume(machine.id, one.volume_id, 0)
    with pytest.raises(NotFound):
        driver.attach_volume(machine.id, data)


def test_a_volume_that_cannot_be_reached_is_refused(lab: Lab, tmp_path: Path) -> None:
    good = volume(tmp_path / "v", b"", 1)
    assert good.connection_info
    for kind, data in (
        ("rbd", {"name": "pool/volume"}),
        ("local", {}),
        ("local", {"device_path": "here", "format": "raw"}),
        ("local", {"device_path": str(tmp_path / "v"), "format": "vmdk"}),
        ("local", {"device_path": str(tmp_path / "gone"), "format": "raw"}),
    ):
        bad = VolumeSource(good.volume_id, {"driver_volume_type": kind, "data": data})
        machine = lab.machine(disks=[Disk("vda", bad, boot_index=0)])
        with pytest.raises(Refused, match=good.volume_id):
            lab.driver.spawn(machine, lambda said: None)
        assert not lab.directory(machine).exists()
    with pytest.raises(Refused):
        lab.driver.spawn(lab.machine(disks=[Disk("vda", VolumeSource("v"), boot_index=0)]), lambda said: None)


def test_guests_outlive_libvirtd_and_us(lab: Lab) -> None:
    daemon = lab.driver.daemon
    assert isinstance(daemon, Private)
    with lab.spawned() as machine:
        pid = processes(machine.id)
        os.kill(daemon.pid() or 0, signal.SIGKILL)
        with contextlib.suppress(Unavailable):  # what is asked in this moment
            lab.driver.power(machine.id)
        assert lab.driver.power(machine.id) == "running"

        for who in processes(f"keeper.py\0{daemon.directory}"):
            os.kill(who, signal.SIGKILL)
        os.kill(daemon.pid() or 0, signal.SIGKILL)
        until(lambda: not lab.driver.link.ready(0) or daemon.pid() is None)
        with contextlib.suppress(Unavailable):
            lab.driver.power(machine.id)
        assert lab.driver.power(machine.id) == "running"
        assert processes(machine.id) == pid

        mine = daemon.pid()
        other = lab.another()
        assert Held(machine.id, "running", 3, ports=[], volumes=[]) in other.machines()
        assert isinstance(other.daemon, Private) and other.daemon.pid() == mine  # found, not made again
        news: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        other.listen(lambda id, power: news.put((id, power)))
        lab.driver.pause(machine.id)
        assert news.get(timeout=5) == (machine.id, "paused")
        os.kill(pid[0], signal.SIGKILL)
        assert news.get(timeout=5) == (machine.id, "crashed")
        assert lab.driver.power(machine.id) == "crashed"
        lab.driver.start(machine.id)
        assert news.get(timeout=5) == (machine.id, "running")
        other.close()


def test_libvirtd_ends_with_us_when_it_has_nothing_to_do(guest: Path, tmp_path: Path) -> None:
    lab = Lab(tmp_path, {"guest": guest}, None)
    assert lab.driver.machines() == [] and processes(str(tmp_path))
    lab.driver.close()
    until(lambda: not processes(str(tmp_path)))


def test_libvirtd_that_hangs_does_not_hang_us(lab: Lab) -> None:
    hasty = lab.another(Libvirt(call_timeout_s=0.5))
    assert isinstance(hasty.daemon, Private)
    hasty.machines()
    pid = hasty.daemon.pid() or 0
    os.kill(pid, signal.SIGSTOP)
    try:
        since = time.monotonic()
        with pytest.raises(Unavailable):
            hasty.machines()
        assert time.monotonic() - since < 5
    finally:
        os.kill(pid, signal.SIGCONT)
    assert isinstance(hasty.machines(), list)
    hasty.close(stop_daemon=False)


def test_what_a_crash_leaves_is_found(lab: Lab) -> None:
    driver = lab.driver
    machine = lab.machine()
    lab.directory(machine).mkdir()  # died after the first step of a spawn
    assert Held(machine.id, "nostate", 0, ports=[], volumes=[]) in driver.machines()
    assert driver.power(machine.id) == "nostate"
    driver.spawn(machine, lambda said: None)  # asked again
    assert driver.power(machine.id) == "running"

    lab.directory(machine).rename(moved := lab.directory(machine).with_name("." + machine.id))  # died in a destroy
    (lab.state_dir / "instances" / "lost+found").mkdir()
    assert Held(machine.id, "running", 3) in driver.machines()  # it bears our mark
    assert not moved.exists()
    assert "lost+found" not in {held.id for held in driver.machines()}
    driver.destroy(machine.id)
    assert machine.id not in {held.id for held in driver.machines()}

    with lab.spawned() as machine:  # libvirt forgot it
        driver.stop(machine.id, 0)
        driver.link.call(lambda conn: conn.lookupByUUIDString(machine.id).undefine())
        driver.start(machine.id)
        assert driver.power(machine.id) == "running"


def test_others_machines_are_not_ours(lab: Lab) -> None:
    other = "<domain type='qemu'><name>other</name><memory>65536</memory><os><type>hvm</type></os></domain>"
    domain = lab.driver.link.call(lambda conn: conn.defineXML(other))
    try:
        assert domain.UUIDString() not in {held.id for held in lab.driver.machines()}
    finally:
        lab.driver.link.call(lambda conn: domain.undefine())


ORDINARY = """
import json, os, sys, time
from pathlib import Path
from kilonova.kit.clock import Ids, WallClock
from kilonova.model.machine import Disk, FixedIp, Identity, ImageSource, Machine, Nic
from kilonova.virt.libvirt.driver import LibvirtDriver

guest, state = map(Path, sys.argv[1:])
driver = LibvirtDriver(
    state, clock=WallClock(), ids=Ids(), fetch=lambda id, write: write(guest.read_bytes()), config_drive=lambda m: b""
)
id = "0b1c2d3e-0000-4000-8000-00000000aaaa"
nic = Nic("p", "n", "fa:16:3e:00:00:01", "tap0", "user", ips=[FixedIp("10.0.0.5", gateway="10.0.0.1")])
disk = Disk("vda", ImageSource("guest", "raw", guest.stat().st_size), boot_index=0)
identity = Identity(uuid=id, name="one", hostname="one", project_id="p")
driver.spawn(Machine(id, "instance-0000aaaa", 1, 128, [disk], [nic], identity), lambda said: None)
try:
    end = time.monotonic() + 60
    while b"Linux version" not in driver.console_log(id) and time.monotonic() < end:
        time.sleep(0.05)
    said = [driver.power(id), b"Linux version" in driver.console_log(id), os.geteuid(), driver.daemon.system]
finally:
    driver.destroy(id)
    driver.close(stop_daemon=True)
print(json.dumps([*said, os.listdir(state / "instances"), driver.daemon.short.exists()]))
"""


@pytest.mark.skipif(not AS_ROOT, reason="all others are then run by an ordinary user, too")
def test_an_ordinary_user_has_it_as_well(guest: Path) -> None:
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "env", "HOME=/nonexistent"]
    nobody += [f"PYTHONPATH={Path(kilonova.__file__).parents[1]}", "PYTHONDONTWRITEBYTECODE=1"]
    with tempfile.TemporaryDirectory(prefix="kilonova-nobody-") as home:
        shutil.copy(guest, home)
        (state := Path(home) / ("a blank " + "x" * 90)).mkdir()
        for path in (Path(home), state, Path(home) / guest.name):
            os.chown(path, 65534, 65534)
        import_ = subprocess.run(
            [*nobody, sys.executable, "-c", "import kilonova, libvirt"],
            capture_output=True,
            check=False,
        )
        if import_.returncode:
            pytest.skip(f"another user cannot run {sys.executable}")
        done = subprocess.run(
            [*nobody, sys.executable, "-c", ORDINARY, f"{home}/{guest.name}", str(state)],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert msgspec.json.decode(done.stdout) == ["running", True, 65534, False, [], False]
        until(lambda: not processes(str(state)))


def test_two_clouds_on_one_libvirtd(lab: Lab, tmp_path: Path) -> None:
    """As with `[libvirt] uri`: somebody else's daemon, and each cloud sees its own."""
    assert lab.netns is None or AS_ROOT
    theirs = Lab(tmp_path, lab.images, None, Libvirt(uri=lab.driver.daemon.uri))
    with lab.spawned() as mine, theirs.spawned(name="instance-theirs") as other:
        assert {held.id for held in theirs.driver.machines()} == {other.id}
        ours = {held.id for held in lab.driver.machines()}
        assert mine.id in ours and other.id not in ours
        with pytest.raises(Refused, match="a machine of this name"):
            theirs.driver.spawn(theirs.machine(name=mine.name), lambda said: None)
        assert theirs.driver.host().virt_type == lab.driver.host().virt_type
    theirs.driver.close(stop_daemon=True)
    assert lab.driver.machines() is not None  # it was not theirs to stop


def test_a_refused_spawn_leaves_nothing(lab: Lab) -> None:
    nic = Nic("p", "n", "fa:16:3e:00:00:08", "tap-none", bridge="br-missing")
    machine = lab.machine(nics=[nic])
    with pytest.raises(Refused, match="network"):
        lab.driver.spawn(machine, lambda said: None)
    assert not lab.directory(machine).exists()
    with pytest.raises(NotFound):
        lab.driver.power(machine.id)


def test_what_cannot_be_done_is_refused(lab: Lab) -> None:
    driver = lab.driver
    with lab.spawned() as machine:
        driver.stop(machine.id, 0)
        for act in (driver.pause, driver.unpause, driver.suspend, driver.resume):
            with pytest.raises(Refused, match=r"cannot be|was not kept"):
                act(machine.id)
    for act in (driver.pause, driver.unpause, driver.suspend, driver.resume, driver.start, driver.console_log):
        with pytest.raises(NotFound):
            act(machine.id)
    with pytest.raises(NotFound):
        driver.power("../../etc")


def test_the_console_is_bounded_while_it_is_written(lab: Lab) -> None:
    small = lab.another(compute=Compute(console_log_max_bytes=16384))
    machine = lab.machine()
    lab.directory(machine).mkdir()
    log = lab.directory(machine) / "console.log"
    assert small.console_log(machine.id) == b""
    with log.open("ab", 0) as guest:
        for line in range(20000):
            guest.write(b"line %07d\n" % line)
            if line % 2500 == 0:
                small.trim_console_logs()
        small.trim_console_logs()
        guest.write(b"the end\n")
    assert log.stat().st_blocks * 512 <= 16384 + 2 * 4096
    said = small.console_log(machine.id)
    assert len(said) <= 16384 and said.endswith(b"line 0019999\nthe end\n") and b"\0" not in said
    small.close(stop_daemon=False)
    lab.driver.destroy(machine.id)


def test_somebody_sits_down_at_a_guests_console(lab: Lab, tmp_path: Path) -> None:
    """A browser's way: websocket, proxy, QEMU's socket; the log is kept all the same."""
    db, listener = Db(f"sqlite:///{tmp_path}/cloud.db"), listen("127.0.0.1", 0)
    meta.create_all(db.engine)
    proxy = Proxy(db, listener, clock=WallClock(), options=Console())
    proxy.start()
    url = f"ws://127.0.0.1:{listener.getsockname()[1]}"
    assert isinstance(lab.driver, Consoles)
    with lab.spawned() as machine:
        with db.tx() as tx:
            servers.create(
                tx, [Server(machine.id, "p", "u", "one", "one", Flavor("f", "f", 1, 1, 1), host="h", epoch=3)]
            )
            for kind in ("vnc", "serial"):
                at = lab.driver.console(machine.id, kind)
                consoles.grant(tx, kind, servers.get(tx, machine.id), kind, at, now=time.time(), lasts_s=600)
        with connect(f"{url}/?token=vnc") as screen:
            assert screen.recv(timeout=BOOT_S) == b"RFB 003.008\n"
        with connect(f"{url}/?token=serial") as line:
            told = b""
            while b"login:" not in told:
                told += line.recv(timeout=BOOT_S)
            line.send("nobody\r")
            while b"Password:" not in told.rpartition(b"login:")[2]:
                told += line.recv(timeout=BOOT_S)
        assert "nobody" in lab.console(machine)
        lab.driver.stop(machine.id, 0)
        with pytest.raises(NotFound):
            lab.driver.console(machine.id, "serial")
        with pytest.raises(Unsupported):
            lab.driver.console(machine.id, "spice")
    proxy.stop()
    db.close()


# ---- the host


def test_the_host_says_what_is_true(lab: Lab) -> None:
    facts = lab.driver.host()
    assert facts.memory_mb == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB
    assert facts.hypervisor_type == "QEMU" and facts.hypervisor_version > 5_000_000
    assert facts.virt_type in ("kvm", "qemu") and facts.virt_why.endswith(".")
    assert {"COMPUTE_IMAGE_TYPE_QCOW2", "COMPUTE_STORAGE_BUS_VIRTIO", "HW_CPU_X86_SSE2"} <= set(facts.traits)


def test_kvm_is_believed_when_a_guest_ran(tmp_path: Path) -> None:
    qemu = host.emulator()
    assert host.probe(qemu, "tcg", timeout_s=30) == ""  # the probe itself is sound
    since = time.monotonic()
    proof = host.prove_kvm(qemu, tmp_path / "kvm.json", WallClock())
    assert time.monotonic() - since < 10
    assert proof.works == (
        host.KVM.exists() and os.access(host.KVM, os.R_OK | os.W_OK) and host.probe(qemu, "kvm") == ""
    )
    if (tmp_path / "kvm.json").exists():
        assert host.prove_kvm("/bin/sh", tmp_path / "kvm.json", WallClock()).works is False  # another QEMU, asked anew


# ---- disks


def image(path: Path, *words: str) -> bytes:
    subprocess.run(["qemu-img", "create", "-q", *words[:-1], str(path), words[-1]], check=True)
    return path.read_bytes()


def test_who_lies_about_an_image_is_refused(lab: Lab, tmp_path: Path) -> None:
    image(tmp_path / "base", "-f", "raw", "1M")
    plain = image(tmp_path / "plain", "-f", "qcow2", "1M")
    backed = image(tmp_path / "backed", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd", "1M")
    split = image(tmp_path / "split", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", "1M")
    flat = image(tmp_path / "flat.vmdk", "-f", "vmdk", "-o", "subformat=monolithicFlat", "1M")
    noise = os.urandom(100_000)
    boot = noise[:510] + b"\x55\xaa" + noise[512:]
    cases: list[tuple[str, bytes, str, dict[str, Any], str]] = [
        ("raw that is qcow2", plain, "raw", {}, "its content is qcow2"),
        ("qcow2 that is noise", noise, "qcow2", {}, "said to be qcow2"),
        ("iso that is not", noise, "iso", {}, "said to be iso"),
        ("upon another file", backed, "qcow2", {}, "backing file"),
        ("with its data elsewhere", split, "qcow2", {}, "data_file"),
        ("vmdk of two files", flat, "vmdk", {}, "unacceptable"),
        ("nothing we know", noise, "ploop", {}, "no use for 'ploop'"),
        ("too long", noise, "raw", {"size_bytes": 99_999}, "longer than the 99999 bytes"),
        ("too short", noise, "raw", {"size_bytes": 100_001}, "100000 bytes came"),
        ("another hash", noise, "raw", {"hash_algo": "sha256", "hash_value": "0" * 64}, "its sha256"),
        ("qcow2 in raw's middle", boot[:512] + plain, "qcow2", {}, "said to be qcow2"),
    ]
    before = sorted((lab.state_dir / "cache").iterdir())
    for name, content, disk_format, said, reason in cases:
        lab.images[name] = content
        machine = lab.machine(disks=[Disk("vda", lab.source(name, disk_format, **said), boot_index=0)])
        with pytest.raises(Refused, match=reason):
            lab.driver.spawn(machine, lambda said: None)
        assert not lab.directory(machine).exists(), name
    assert sorted((lab.state_dir / "cache").iterdir()) == before


def test_a_disk_is_as_large_as_asked(lab: Lab, tmp_path: Path) -> None:
    lab.images["q"] = image(tmp_path / "q", "-f", "qcow2", "8M")
    source = lab.source("q", "qcow2")
    with pytest.raises(Refused, match=r"^Flavor's disk is too small for requested image\."):
        lab.driver.spawn(lab.machine(disks=[Disk("vda", source, size_bytes=4 * MIB)]), lambda said: None)
    disks = [
        Disk("vda", source),
        Disk("vdb", source, size_bytes=16 * MIB),
        Disk("sda", source, bus="sata", kind="cdrom"),
    ]
    with lab.spawned(disks=disks) as machine:

        def size(name: str) -> int:
            (told,) = struct.unpack_from(">Q", (lab.directory(machine) / name).read_bytes(), 24)  # qcow2's header
            return int(told)

        assert size("disk.vda") == 8 * MIB and size("disk.vdb") == 16 * MIB
        assert not (lab.directory(machine) / "disk.sda").exists()  # a CD needs no copy of its own


@pytest.mark.parametrize(("disk_format", "name"), [("vmdk", "vmdk"), ("vdi", "vdi"), ("vhd", "vpc"), ("vhdx", "vhdx")])
def test_other_formats_are_converted_once(lab: Lab, tmp_path: Path, disk_format: str, name: str) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"\x42" * MIB + bytes(MIB))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", name, str(raw), str(tmp_path / "x")], check=True)
    lab.images["x"] = tmp_path / "x"
    cache = ImageCache(tmp_path / "cache", lab.fetch, clock=WallClock())
    base = cache.base(lab.source("x", disk_format))
    assert base.format == "qcow2" and cache.base(lab.source("x", disk_format)) == base
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(cache.path(base)), str(tmp_path / "back")], check=True
    )
    assert (tmp_path / "back").read_bytes()[: 2 * MIB] == raw.read_bytes()


def test_an_image_is_fetched_once_for_all_who_wait(tmp_path: Path) -> None:
    content, begun = b"\1" * MIB + bytes(4 * MIB) + b"\2" * MIB, []
    go = threading.Event()

    def fetch(image_id: str, write: Callable[[bytes], object]) -> None:
        begun.append(image_id)
        go.wait(10)
        for at in range(0, len(content), 1 << 16):
            write(content[at : at + (1 << 16)])

    clock = Hands()
    cache = ImageCache(tmp_path / "cache", fetch, clock=clock)
    digest = hashlib.sha512(content).hexdigest()
    source = ImageSource("i", "raw", len(content), "sha512", digest)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(cache.base(source))) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: bool(begun))
    go.set()
    for thread in threads:
        thread.join(20)
    base = cache.base(source)
    assert begun == ["i"] and found == [base] * 8
    file = cache.path(base)
    assert file.read_bytes() == content and file.stat().st_blocks * 512 < 3 * MIB  # its holes stayed holes

    clock.at += 100
    assert cache.evict({"i"}, 50) == [] and cache.evict(set(), 50) == []  # in use until now
    clock.at += 100
    assert cache.evict(set(), 50) == ["i"]
    assert list((tmp_path / "cache").iterdir()) == []
    assert cache.base(source) == base and begun == ["i", "i"]


class Hands:
    """A clock that is set by hand."""

    at = 1e9

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


@pytest.mark.skipif(not AS_ROOT, reason="mounting a small file system needs root")
def test_a_full_disk_is_said_in_plain_words(lab: Lab, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], check=True)
    try:
        lab.images["big"] = os.urandom(3 * MIB)
        cache = ImageCache(small / "cache", lab.fetch, clock=WallClock())
        with pytest.raises(Refused, match=r"not enough disk space on this host for image big: it needs 3 MiB"):
            cache.base(lab.source("big", "raw"))
        with pytest.raises(Refused, match=r"^There is not enough disk space on this host for image big\.$"):
            cache.base(lab.source("big", "raw", size_bytes=0))
        assert list((small / "cache").iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
