"""A hypervisor that only exists in memory, behind the same protocol as a real one: for scale, tests and the simulator.

What would lie on a host's disk and run on its CPUs is a `SimState`; the driver is only a hand on it.  So a process
may die and another find its machines again (in a directory, if it was given one), and a test may pull the plug of the
host (`SimState.power_cut`).

Latencies and faults come from handed-in dice and pass on a handed-in clock: from a seed, the same each time.
"""

import fcntl
import functools
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from kilonova.contracts.compute import CpuStats, DiskStats, Landing, Luggage, NicStats, Stats
from kilonova.kit.clock import Clock
from kilonova.kit.errors import Aborted, NotFound, Refused, Trouble, Unsupported
from kilonova.model.console import Kind, Where
from kilonova.model.disks import file_of, on_file
from kilonova.model.host import Cell, HostDevice, HostFacts
from kilonova.model.machine import (
    Disk,
    ImageSource,
    Machine,
    Nic,
    Share,
    volumes_of,
    with_nic,
    with_share,
    with_volume,
    without_nic,
    without_share,
    without_volume,
)
from kilonova.model.options import Sim
from kilonova.model.plan import connected_as
from kilonova.model.rescue import rescued
from kilonova.model.seat import Seat
from kilonova.virt import sim_console
from kilonova.virt.driver import Held, Power, Progress, Telling
from kilonova.virt.sim_disk import contents, qcow2

LOG_MAX = 16_384  # letters of a console log
PARTS = 4  # in which a guest's memory is sent
TRAITS = [
    "COMPUTE_ARCH_X86_64",
    "COMPUTE_FIRMWARE_BIOS",
    "COMPUTE_FIRMWARE_UEFI",
    "COMPUTE_MEM_BACKING_FILE",
    "COMPUTE_NET_ATTACH_INTERFACE",
    "COMPUTE_NET_ATTACH_INTERFACE_WITH_TAG",
    "COMPUTE_NODE",
    "COMPUTE_RESCUE_BFV",
    "COMPUTE_STORAGE_VIRTIO_FS",
    "COMPUTE_VOLUME_ATTACH",
    "COMPUTE_VOLUME_ATTACH_WITH_TAG",
    "COMPUTE_VOLUME_EXTEND",
    "COMPUTE_VOLUME_MULTI_ATTACH",
    "HW_ARCH_X86_64",
    "OWNER_NOVA",
    "COMPUTE_SOCKET_PCI_NUMA_AFFINITY",
    *(f"COMPUTE_IMAGE_TYPE_{f}" for f in ("AKI", "AMI", "ARI", "ISO", "QCOW2", "RAW", "VDI", "VHD", "VHDX", "VMDK")),
]


class SimMachine:
    """One machine: what it is, how it is, since when, and what it wrote: on its console, and on its disks.

    `landing`: a guest is expected, and has not come yet.  `rescue`: the disk of another system that it runs meanwhile.
    `password` and `dumps` are what the guest was told.  `behind`: of volumes that are files, those behind the one in use.
    """

    __slots__ = (
        "behind",
        "disk",
        "dumps",
        "landing",
        "log",
        "machine",
        "password",
        "power",
        "rescue",
        "since",
        "stable",
    )

    def __init__(self, machine: Machine, power: Power, since: float) -> None:
        self.machine, self.power, self.since = machine, power, since
        self.log = self.disk = ""
        self.landing = False
        self.rescue: Disk | None = None
        self.stable = False
        self.password, self.dumps = machine.admin_password, 0
        self.behind: dict[str, list[str]] = {}


class _Kept(msgspec.Struct):
    """A `SimMachine` in its file."""

    machine: Machine
    power: Power
    since: float
    log: str
    disk: str = ""
    landing: bool = False
    rescue: Disk | None = None
    stable: bool = False
    behind: dict[str, list[str]] = {}


class SimState:
    """What outlives a process: the host's disk, and the guests that run.

    With a `directory` it outlives even kill -9: each machine is a file there.  A power cut of the machine under all
    this may cost the last changes: simulated hosts are not worth a flush of the disk each time.

    `deaf` are guests that heed no button; a `broken` host refuses every act.  `kept` are older machines of servers that
    have a newer one here.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.machines: dict[str, SimMachine] = {}
        self.kept: dict[str, SimMachine] = {}
        self.captures: dict[tuple[str, str], bytes] = {}  # by server and image
        self.images: set[str] = set()  # that are here before a machine needs them
        self.deaf: set[str] = set()
        self.broken = False
        self.lock = threading.Lock()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for which, suffix in ((self.machines, "machine"), (self.kept, "kept")):
                for file in sorted(directory.glob(f"*.{suffix}")):
                    which[file.stem] = _read(file)
            for file in sorted(directory.glob("*.capture")):
                server, _, image = file.stem.partition(".")
                self.captures[server, image] = file.read_bytes()

    @contextmanager
    def moment(self, id: str) -> Iterator[SimMachine | None]:
        """This machine as it is, while nobody else changes it: not even who sends it here from another process."""
        with self.lock:
            if self.directory is None:
                yield self.machines.get(id)
                return
            with (self.directory / "moment").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._hear(id)
                yield self.machines.get(id)

    def heard(self, id: str) -> SimMachine | None:
        """The same without keeping anybody from it. A guest that is waited for may have come from another process."""
        m = self.machines.get(id)
        if m is not None and m.landing and self.directory is not None:
            self._hear(id)
        return m

    def waits(self, id: str, epoch: int) -> bool:
        """In its moment: is a guest of that epoch still waited for? Where the host is another process, its files say so."""
        m = self.machines.get(id)
        if self.directory is not None:
            file = self.directory / f"{id}.machine"
            m = _read(file) if file.exists() else None
        return m is not None and m.landing and m.machine.epoch == epoch

    def _hear(self, id: str) -> None:
        m, file = self.machines.get(id), Path(self.directory or "") / f"{id}.machine"
        if m is not None and m.landing and file.exists():
            told = _read(file)
            if not told.landing and told.machine.epoch == m.machine.epoch:
                m.power, m.since, m.log, m.disk, m.landing = told.power, told.since, told.log, told.disk, False

    def keep(self, id: str) -> None:
        """Write down how this machine is now; before anybody is told of it."""
        if self.directory is not None:
            with self.moment(id):
                self.put(id)

    def put(self, id: str) -> None:
        """The same, for who has its moment."""
        directory = self.directory
        if directory is None:
            return
        for which, suffix in ((self.kept, "kept"), (self.machines, "machine")):
            file, m = directory / f"{id}.{suffix}", which.get(id)
            if m is None:
                file.unlink(missing_ok=True)
                continue
            kept = _Kept(m.machine, m.power, m.since, m.log, m.disk, m.landing, m.rescue, m.stable, m.behind)
            _write(file, msgspec.msgpack.encode(kept))

    def keep_capture(self, id: str, image_id: str) -> None:
        """The same of a copy of its disk."""
        if self.directory is None:
            return
        file = self.directory / f"{id}.{image_id}.capture"
        with self.lock:
            copied = self.captures.get((id, image_id))
            if copied is None:
                file.unlink(missing_ok=True)
            else:
                _write(file, copied)

    def power_cut(self) -> None:
        """The whole host restarts: nothing runs any more, disks stay."""
        with self.lock:
            for m in self.machines.values():
                m.power = "suspended" if m.power == "suspended" else "shutdown"
        for id in list(self.machines):
            self.keep(id)


class Peers(Mapping[str, SimState]):
    """Where guests can be sent: hosts of this process (`own`), and those of others, by what lies in `directory`."""

    def __init__(self, directory: Path, own: Mapping[str, SimState]) -> None:
        self.directory, self.own = directory, own

    def __getitem__(self, name: str) -> SimState:
        if name in self.own:
            return self.own[name]
        where = self.directory / name / "machines"
        if not where.is_dir():
            raise KeyError(name)
        return SimState(where)

    def __iter__(self) -> Iterator[str]:
        return iter(d.name for d in self.directory.iterdir())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _read(file: Path) -> SimMachine:
    kept = msgspec.msgpack.decode(file.read_bytes(), type=_Kept)
    found = SimMachine(kept.machine, kept.power, kept.since)
    found.log, found.disk, found.landing = kept.log, kept.disk, kept.landing
    found.rescue, found.stable, found.behind = kept.rescue, kept.stable, kept.behind
    return found


def _write(file: Path, data: bytes) -> None:
    """All of it or nothing."""
    new = file.with_suffix(".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as f:
        f.write(data)
    new.rename(file)


def _uptime(up_s: float) -> str:
    """As `uptime` says it, of a host that nobody troubles."""
    days, minutes = int(up_s // 86400), int(up_s // 60)
    return f"up {days} days, {minutes // 60 % 24:2d}:{minutes % 60:02d},  0 users,  load average: 0.00, 0.00, 0.00"


@functools.lru_cache(64)  # a host tells of them with each report
def _cells(cpus: int, cells: int, threads: int, memory_mb: int, pages: tuple[tuple[str, int], ...]) -> tuple[Cell, ...]:
    """As many CPUs in each as can be, the rest in the last; threads of a core are neighbours."""
    each, found = max(1, cpus // cells), list[Cell]()
    sizes = {int(kb): n for kb, n in pages if kb.isdecimal()}
    for i in range(cells):
        ids = list(range(i * each, cpus if i == cells - 1 else (i + 1) * each))
        cores = [ids[at : at + threads] for at in range(0, len(ids), threads)] if threads > 1 else []
        found.append(Cell(len(ids), memory_mb // cells, sizes, ids, cores))
    return tuple(found)


def _devices(o: Sim) -> list[HostDevice]:
    """`CLASS`, `CLASS=n`, with `@cell` behind it."""
    found = []
    for slot, text in enumerate(o.devices, 1):
        word, _, cell = text.partition("@")
        name, _, n = word.partition("=")
        address, total = f"0000:{slot:02x}:00.0", int(n or 1)
        mdev = name.startswith("VGPU")
        functions = (
            [f"0000:{slot:02x}:{1 + i // 8:02x}.{i % 8}" for i in range(total)] if total > 1 and not mdev else []
        )
        found.append(
            HostDevice(
                address, name, total, "mdev" if mdev else "pci", functions, "sim-1" if mdev else "",
                int(cell) if cell else None,
            )
        )  # fmt: skip
    return found


class SimDriver:
    """See `virt.driver`: all that a hypervisor can do. `name` is the hypervisor's; `peers` are those that its guests can be sent to."""

    def __init__(
        self,
        name: str,
        state: SimState | None = None,
        *,
        clock: Clock,
        dice: random.Random,
        options: Sim | None = None,
        peers: Mapping[str, SimState] | None = None,
    ) -> None:
        self.name, self.clock, self.dice, self.born = name, clock, dice, clock.now()
        self.state = state or SimState()
        self.options = options or Sim()
        self.peers = peers if peers is not None else {}
        self.going: dict[str, set[str]] = {}  # guests that are being sent away, and what was called out to that
        self.heard: list[Callable[[str, Power], None]] = []
        self.consoles: dict[tuple[str, Kind], sim_console.Endpoint] = {}

    # -- the host

    def host(self) -> HostFacts:
        o = self.options
        return HostFacts(
            vcpus=o.cpus,
            memory_mb=o.memory_mb,
            disk_gb=o.disk_gb,
            disk_free_gb=o.disk_gb,
            hypervisor_type="fake",
            hypervisor_version=1000,
            hypervisor_hostname=self.name,
            uptime=_uptime(self.clock.now() - self.born),
            cpu_info={
                "arch": "x86_64",
                "model": "sim",
                "vendor": "none",
                "topology": {"cores": o.cpus // o.threads, "threads": o.threads, "sockets": 1},
            },
            traits=[*TRAITS, "HW_CPU_HYPERTHREADING"] if o.threads > 1 else TRAITS,
            cells=list(_cells(o.cpus, o.cells, o.threads, o.memory_mb, tuple(o.pages.items()))),
            devices=_devices(o),
            virt_type="sim",
            virt_why="it only exists in memory",
        )

    def machines(self) -> list[Held]:
        for id in list(self.state.machines):
            self.state.heard(id)
        with self.state.lock:
            copies: dict[str, list[str]] = {}
            for id, image_id in sorted(self.state.captures):
                copies.setdefault(id, []).append(image_id)
            older = [Held(id, m.power, m.machine.epoch) for id, m in sorted(self.state.kept.items())]
            here = sorted(self.state.machines.items())
            newest = [
                Held(
                    id,
                    m.power,
                    m.machine.epoch,
                    copies.pop(id, []),
                    _ports(m.machine),
                    volumes_of(m.machine),
                    _shares(m.machine),
                )
                for id, m in here
            ]
            return older + newest + [Held(id, "nostate", 0, images) for id, images in copies.items()]

    def power(self, id: str) -> Power:
        return self._there(id).power

    def close(self) -> None:
        self.heard.clear()
        for id, kind in list(self.consoles):
            self.consoles.pop((id, kind)).close()

    def listen(self, changed: Callable[[str, Power], None]) -> None:
        self.heard.append(changed)

    # -- acts

    def spawn(self, machine: Machine, progress: Progress) -> None:
        old = self.state.machines.get(machine.id)
        if old is not None and old.power == "running" and old.machine.epoch == machine.epoch:
            return
        progress("disks")
        self._act("spawn")
        progress("start")
        with self.state.lock:
            there = self.state.machines.setdefault(machine.id, SimMachine(machine, "nostate", 0.0))
        there.machine = machine
        self._boot(machine.id, there)

    def destroy(self, id: str) -> None:
        self._drop_captures(id)
        if id in self.state.machines or id in self.state.kept:
            self._act("destroy", may_fail=False)
            with self.state.moment(id) as gone:
                self.state.machines.pop(id, None)
                self.state.kept.pop(id, None)
                self.state.put(id)
            self.state.deaf.discard(id)
            if gone is not None and gone.power != "shutdown":
                self._say(id, "shutdown")

    def start(self, id: str) -> None:
        m = self._there(id)
        if m.power != "running":
            self._act("start")
            self._boot(id, m)

    def stop(self, id: str, timeout_s: float, retry_s: float = 10) -> None:
        m = self._there(id)
        if m.power in ("shutdown", "crashed"):
            self._turn(id, m, "shutdown")
            return
        if id in self.state.deaf and timeout_s:
            until = self.clock.now() + timeout_s
            while self.clock.now() < until and m.power == "running":
                self.clock.sleep(min(retry_s, timeout_s))
        self._act("stop", may_fail=timeout_s > 0)  # to turn it off at once is how others' acts are taken back
        self._turn(id, m, "shutdown")

    def reboot(self, id: str, hard: bool, timeout_s: float) -> None:
        m = self._there(id)
        self._act("reboot")
        self._turn(id, m, "shutdown")
        self._boot(id, m)

    def pause(self, id: str) -> None:
        self._between(id, "pause", {"running"}, "paused")

    def unpause(self, id: str) -> None:
        self._between(id, "unpause", {"paused"}, "running")

    def suspend(self, id: str) -> None:
        self._between(id, "suspend", {"running", "paused"}, "suspended")

    def resume(self, id: str) -> None:
        self._between(id, "resume", {"suspended", "shutdown"}, "running")

    def attach_nic(self, id: str, nic: Nic) -> None:
        m = self._there(id)
        if nic not in m.machine.nics:
            self._act("attach_nic")
            self._become(id, m, with_nic(m.machine, nic))

    def detach_nic(self, id: str, port_id: str, timeout_s: float, anyway: bool = False) -> None:
        m = self.state.machines.get(id)
        if m is None or all(n.port_id != port_id for n in m.machine.nics):
            return
        if id in self.state.deaf and m.power in ("running", "paused") and not anyway:
            self.clock.sleep(timeout_s)
            raise Refused("The guest does not let go of it.")
        self._act("detach_nic", may_fail=not anyway)
        self._become(id, m, without_nic(m.machine, port_id))

    def attach_volume(self, id: str, disk: Disk) -> None:
        m = self._there(id)
        if disk not in m.machine.disks:
            self._act("attach_volume")
            self._become(id, m, with_volume(m.machine, disk))

    def detach_volume(self, id: str, volume_id: str, timeout_s: float, anyway: bool = False) -> None:
        m = self.state.machines.get(id)
        if m is None or volume_id not in volumes_of(m.machine):
            return
        if id in self.state.deaf and m.power in ("running", "paused") and not anyway:
            self.clock.sleep(timeout_s)
            raise Refused("The guest does not let go of it.")
        self._act("detach_volume", may_fail=not anyway)
        self._become(id, m, without_volume(m.machine, volume_id))

    def extend_volume(self, id: str, volume_id: str, size_bytes: int) -> None:
        m = self._there(id)
        for disk in m.machine.disks:
            if disk.serial == volume_id and disk.size_bytes != size_bytes:
                self._act("extend_volume")
                self._become(id, m, with_volume(m.machine, msgspec.structs.replace(disk, size_bytes=size_bytes)))

    def swap_volume(self, id: str, volume_id: str, disk: Disk) -> None:
        m = self._there(id)
        if disk in m.machine.disks:
            return
        if volume_id not in volumes_of(m.machine):
            raise Refused(f"The machine does not have the volume {volume_id}.")
        self._act("swap_volume")
        self._become(id, m, with_volume(m.machine, disk, volume_id))

    # -- shared file systems (`virt.driver.Mounts`)

    def attach_share(self, id: str, share: Share) -> None:
        m = self._there(id)
        if share not in m.machine.shares:
            if m.power != "shutdown":
                raise Refused(f"The machine is {m.power}: it must be off to be given a share.")
            self._act("attach_share")
            self._become(id, m, with_share(m.machine, share))

    def detach_share(self, id: str, share_id: str, anyway: bool = False) -> None:
        m = self.state.machines.get(id)
        if m is None or all(s.share_id != share_id for s in m.machine.shares):
            return
        if m.power != "shutdown" and not anyway:
            raise Refused(f"The machine is {m.power}: it must be off to lose a share.")
        self._act("detach_share", may_fail=not anyway)
        self._become(id, m, without_share(m.machine, share_id))

    # -- files of volumes (`virt.driver.Branches`)

    def branch_volume(self, id: str, volume_id: str, new_file: str) -> None:
        m = self._there(id)
        disk, now = _file(m.machine, volume_id)
        if now == new_file:
            return
        behind = m.behind.get(volume_id, [])
        if new_file in behind:
            raise Refused(f"There is a file {new_file} behind the volume {volume_id} already.")
        self._act("branch_volume")
        m.behind[volume_id] = [*behind, now]
        self._become(id, m, with_volume(m.machine, on_file(disk, new_file)))

    def merge_volume(self, id: str, volume_id: str, file: str | None, into: str | None) -> None:
        m = self._there(id)
        disk, now = _file(m.machine, volume_id)
        chain = [*m.behind.get(volume_id, []), now]
        if into is None:
            left = [*chain[: chain.index(file) + 1], now] if file in chain[:-1] else [now]
        elif file not in chain:
            return
        elif into not in chain[: chain.index(file)]:
            raise Refused(f"The file {into} is not behind {file}.")
        else:
            left = chain[: chain.index(into) + 1] + chain[chain.index(file) + 1 :]
        self._act("merge_volume")
        m.behind[volume_id] = left[:-1]
        self._become(id, m, with_volume(m.machine, on_file(disk, left[-1])))

    def console_log(self, id: str) -> bytes:
        m = self._there(id)
        log = m.log
        if m.power == "running" and self.clock.now() >= m.since + self.options.boot_s:
            log += f"\n{m.machine.identity.hostname} login: "
        return log.encode()

    # -- cold moves (`virt.driver.Resizes`)

    def prepare(self, machine: Machine) -> None:
        self._act("prepare")

    def depart(self, id: str, epoch: int, timeout_s: float) -> Luggage:
        m = self._there(id)
        if m.power != "shutdown":
            self.stop(id, timeout_s)
        self._newest(id, msgspec.structs.replace(m.machine, epoch=epoch))
        more = {"disk": m.disk, "log": m.log}
        if m.behind:
            more["behind"] = msgspec.json.encode(m.behind).decode()
        return Luggage(more=more)

    def arrive(self, machine: Machine, luggage: Luggage, start: bool, progress: Progress) -> None:
        there = self.state.machines.get(machine.id)
        if there is None or there.machine.epoch != machine.epoch:
            progress("disks")
            self._act("arrive")
            new = SimMachine(machine, "shutdown", 0.0)
            new.disk, new.log = luggage.more.get("disk", ""), luggage.more.get("log", "")
            new.behind = msgspec.json.decode(luggage.more.get("behind", "{}"), type=dict[str, list[str]])
            with self.state.lock:
                if (old := self.state.machines.get(machine.id)) is not None:
                    self.state.kept[machine.id] = old
                self.state.machines[machine.id] = there = new
            self.state.keep(machine.id)
        if start and there.power != "running":
            progress("start")
            self._act("start")
            self._boot(machine.id, there)

    def come_back(self, machine: Machine, was: int, start: bool) -> None:
        id, now = machine.id, self._there(machine.id)
        if now.machine.epoch != machine.epoch:
            kept = self.state.kept.get(id)
            mine = next((m for m in (now, kept) if m is not None and m.machine.epoch == was), None)
            if mine is None:
                raise NotFound(f"Nothing is kept of {id} on this host.")
            self._act("come back")
            self._newest(id, machine, mine)
        m = self._there(id)
        if start and m.power != "running":
            self._act("start")
            self._boot(id, m)

    def stay(self, id: str, power: Power) -> None:
        m = self.state.machines.get(id)
        if m is None or m.power == power or power not in ("running", "paused"):
            return
        try:
            self._act("stay")
        except Trouble:
            return
        self._boot(id, m)
        if power == "paused":
            self._turn(id, m, "paused")

    def drop(self, id: str, epoch: int) -> None:
        for which in (self.state.kept, self.state.machines):
            m = which.get(id)
            if m is not None and m.machine.epoch == epoch:
                self._act("drop", may_fail=False)
                with self.state.lock:
                    which.pop(id, None)
                    if id not in self.state.machines and id in self.state.kept:
                        self.state.machines[id] = self.state.kept.pop(id)
                self.state.keep(id)

    def _newest(self, id: str, machine: Machine, of: SimMachine | None = None) -> None:
        """This is what it is from now on; the one with the higher epoch is the one that is meant."""
        with self.state.lock:
            m = of or self.state.machines[id]
            m.machine = machine
            both = [x for x in (self.state.machines.get(id), self.state.kept.pop(id, None)) if x is not None]
            both.sort(key=lambda x: x.machine.epoch)
            self.state.machines[id] = both[-1]
            if len(both) > 1:
                self.state.kept[id] = both[0]
        self.state.keep(id)

    # -- moves of what runs (`virt.driver.Migrates`)

    def prepare_landing(self, machine: Machine) -> Landing:
        there = self.state.machines.get(machine.id)
        if there is None or there.machine.epoch != machine.epoch:
            self._act("prepare a landing")
            new = SimMachine(machine, "nostate", 0.0)
            new.landing = True
            with self.state.lock:
                self.state.machines[machine.id] = new
            self.state.keep(machine.id)
        return Landing(uri=f"sim:{self.name}")

    def send(self, id: str, landing: Landing, epoch: int, block: bool | None, tell: Telling) -> None:
        m, target = self._there(id), self.peers.get(landing.uri.removeprefix("sim:"))
        there = None if target is None else target.machines.get(id)
        if target is None or there is None or there.machine.epoch != epoch:
            raise Refused("Nobody waits for the guest there.")
        if there.landing:
            if m.power not in ("running", "paused"):
                raise Refused(f"The machine cannot be sent away: it is {m.power}.")
            self._sent(id, m, tell)
            if not self._switched(id, m, there, target):
                raise Refused("Nobody waits for the guest there any more.")
        self._turn(id, m, "shutdown")

    def _sent(self, id: str, m: SimMachine, tell: Telling) -> None:
        wishes = self.going[id] = set()
        total = m.machine.memory_mb << 20
        try:
            for part in range(1, 1 + PARTS):
                self._act("send")
                if "stop" in wishes:
                    raise Aborted("The live migration was cancelled.")
                done = total * part // PARTS
                tell({"memory_total": total, "memory_processed": done, "memory_remaining": total - done})
                if "hurry" in wishes:
                    return
        finally:
            self.going.pop(id, None)

    def _switched(self, id: str, m: SimMachine, there: SimMachine, target: SimState) -> bool:
        """One moment: it runs there and not here. Not, if the landing was closed meanwhile."""
        with target.moment(id) as now:
            if now is not there or not target.waits(id, there.machine.epoch):
                return False
            there.power, there.since, there.log, there.disk = m.power, m.since, m.log, m.disk
            there.behind = m.behind
            there.landing, m.power = False, "shutdown"
            target.put(id)
        self.state.keep(id)
        return True

    def hurry(self, id: str) -> None:
        self.going.get(id, set()).add("hurry")

    def stop_sending(self, id: str) -> None:
        self.going.get(id, set()).add("stop")

    def close_landing(self, id: str, epoch: int) -> bool:
        with self.state.moment(id) as m:
            if m is None or m.machine.epoch != epoch:
                return False
            if not m.landing:
                return True
            self.state.machines.pop(id)
            self.state.put(id)
        return False

    def land(self, machine: Machine) -> None:
        self._act("land", may_fail=False)
        self._newest(machine.id, machine, self._there(machine.id))

    # -- made anew (`virt.driver.Rebuilds`)

    def rebuild(self, machine: Machine, progress: Progress) -> None:
        """Its directory goes and comes back; between the two it has no disk that anything could be learnt of."""
        there = self.state.machines.get(machine.id)
        if there is not None:
            machine = connected_as(machine, there.machine)
        progress("disks")
        self._act("rebuild")
        with self.state.lock:
            self.state.machines[machine.id] = new = SimMachine(machine, "nostate", 0.0)
        self.state.keep(machine.id)
        progress("start")
        self._boot(machine.id, new)

    # -- another system for a while (`virt.driver.Rescues`)

    def rescue(self, id: str, disk: Disk, stable: bool, admin_password: str, progress: Progress) -> None:
        m = self._there(id)
        if m.rescue == disk and m.power == "running":
            return
        progress("disks")
        self._act("rescue")
        self._turn(id, m, "shutdown")
        m.rescue, m.stable = disk, stable
        m.password = admin_password or m.password
        self._boot(id, m)

    def unrescue(self, id: str) -> None:
        m = self._there(id)
        if m.rescue is None and m.power == "running":
            return
        self._act("unrescue")
        self._turn(id, m, "shutdown")
        m.rescue = None
        self._boot(id, m)

    def running(self, id: str) -> Machine:
        """What the guest is just now: itself, or what it was rescued with."""
        m = self._there(id)
        return m.machine if m.rescue is None else rescued(m.machine, m.rescue, m.stable, m.password)[0]

    # -- what else a guest can be told (`virt.driver.Attends`)

    def set_password(self, id: str, password: str) -> None:
        m = self._there(id)
        if id in self.state.deaf:
            raise Refused("The guest does not answer.")
        self._act("set the password of")
        m.password = password

    def crash_dump(self, id: str) -> None:
        m = self._there(id)
        if m.power != "running":
            raise Refused(f"The machine cannot be interrupted: it is {m.power}.")
        self._act("interrupt")
        m.dumps += 1

    def stats(self, id: str) -> Stats:
        m, now = self._there(id), self.clock.now()
        machine, on = self.running(id), m.power == "running"
        up = int(now - m.since) if on else 0
        return Stats(
            state=m.power,
            hypervisor="fake",
            uptime=up,
            memory_maximum=machine.memory_mb,
            memory_used=machine.memory_mb if on else 0,
            config_drive=machine.config_drive,
            cpus=[CpuStats(n, up * 1_000_000_000, 100 if on else 0) for n in range(machine.vcpus)],
            disks=[DiskStats(d.device, 0, 0, 0, 0, 0) for d in machine.disks],
            nics=[NicStats(n.device, n.mac, *[0] * 10) for n in machine.nics],
        )

    # -- images of its disk (`virt.driver.Captures`)

    def capture(self, id: str, image_id: str, disk_format: str, progress: Progress) -> None:
        m = self._there(id)
        if (id, image_id) not in self.state.captures:
            progress("copying its disk")
            self._act("capture")
            data = contents(m.machine, m.log)
            self.state.captures[id, image_id] = qcow2(data) if disk_format == "qcow2" else data
            self.state.keep_capture(id, image_id)

    def captured(self, id: str, image_id: str) -> Iterator[bytes]:
        copied = self.state.captures.get((id, image_id))
        if copied is None:
            raise NotFound(f"There is no copy of {id} for image {image_id} on this host.")
        return (copied[at : at + 4096] for at in range(0, len(copied), 4096))

    def drop_capture(self, id: str, image_id: str) -> None:
        self.state.captures.pop((id, image_id), None)
        self.state.keep_capture(id, image_id)

    def _drop_captures(self, id: str) -> None:
        for server, image_id in list(self.state.captures):
            if server == id:
                self.drop_capture(id, image_id)

    def precache(self, image: ImageSource) -> None:
        self._act("fetch an image for")
        self.state.images.add(image.image_id)

    # -- its screen and its serial line (`virt.driver.Consoles`)

    def console(self, id: str, kind: Kind) -> Where:
        """A socket that is opened when it is first asked for, and closed when the machine ends."""
        m = self._there(id)
        if m.power not in ("running", "paused"):
            raise NotFound(f"The machine of {id} is {m.power}.")
        if kind == "spice":
            raise Unsupported("Simulated machines have no SPICE.")
        with self.state.lock:
            if (id, kind) not in self.consoles:
                name = m.machine.identity.hostname
                play = sim_console.serial(name) if kind == "serial" else sim_console.vnc(name)
                self.consoles[id, kind] = sim_console.Endpoint(play)
            return self.consoles[id, kind].where

    # -- what guests do by themselves (tests call it)

    def guest_shuts_down(self, id: str) -> None:
        self._turn(id, self._there(id), "shutdown")

    def guest_crashes(self, id: str) -> None:
        self._turn(id, self._there(id), "crashed")

    # -- one act

    def _there(self, id: str) -> SimMachine:
        m = self.state.heard(id)
        if m is None:
            raise NotFound(f"There is no machine of {id} on this host.")
        return m

    def _act(self, what: str, may_fail: bool = True) -> None:
        """It takes its time, and may go wrong."""
        o = self.options
        if o.latency_s:
            self.clock.sleep(self.dice.expovariate(1 / o.latency_s))
        if may_fail and (self.state.broken or (o.failure_rate and self.dice.random() < o.failure_rate)):
            raise Refused(f"The hypervisor refused to {what} the machine.")

    def _between(self, id: str, what: str, start: set[Power], end: Power) -> None:
        m = self._there(id)
        if m.power == end:
            return
        if m.power not in start:
            raise Refused(f"The machine cannot {what}: it is {m.power}.")
        self._act(what)
        self._turn(id, m, end)

    def _boot(self, id: str, m: SimMachine) -> None:
        i, now = m.machine.identity, self.clock.now()
        m.since = now
        addresses = " ".join(a.address for nic in m.machine.nics for a in nic.ips)
        m.log = (m.log + BOOT.format(name=m.machine.name, id=i.uuid, addresses=addresses))[-LOG_MAX:]
        self._turn(id, m, "running")

    def _become(self, id: str, m: SimMachine, machine: Machine) -> None:
        m.machine = machine
        self.state.keep(id)

    def _turn(self, id: str, m: SimMachine, power: Power) -> None:
        if m.power != power:
            m.power = power
            self.state.keep(id)
            self._say(id, power)

    def _say(self, id: str, power: Power) -> None:
        if power not in ("running", "paused"):
            for of, kind in [k for k in self.consoles if k[0] == id]:
                self.consoles.pop((of, kind)).close()
        for changed in self.heard:
            changed(id, power)


BOOT = "[    0.000000] Linux version 0.0-sim ({name})\n[    0.100000] Run /init as init process\ninstance-id: {id}\naddresses: {addresses}\n"


def copy(state: SimState) -> dict[str, tuple[str, int]]:
    """{server: (power, epoch)}: what a test compares. What is kept beside a newer machine has ".kept" behind its name."""
    with state.lock:
        kept = {f"{id}.kept": m for id, m in state.kept.items()}
        return {id: (m.power, m.machine.epoch) for id, m in (state.machines | kept).items()}


def _file(machine: Machine, volume_id: str) -> tuple[Disk, str]:
    """The disk that is this volume, and the file it is in. Raises NotFound, Refused."""
    disk = next((d for d in machine.disks if d.serial == volume_id), None)
    if disk is None:
        raise NotFound(f"The machine does not have the volume {volume_id}.")
    name = file_of(disk)
    if name is None:
        raise Refused(f"The volume {volume_id} is no file.")
    return disk, name


def copies(state: SimState) -> list[tuple[str, str]]:
    """(server, image) of what was copied for images and is still there."""
    return sorted(state.captures)


def _ports(machine: Machine) -> list[str]:
    return [n.port_id for n in machine.nics]


def _shares(machine: Machine) -> list[str]:
    return [s.share_id for s in machine.shares]


def plugged(state: SimState) -> dict[str, list[str]]:
    """{server: the ports of its NICs}: the same."""
    with state.lock:
        return {id: _ports(m.machine) for id, m in state.machines.items()}


def used(state: SimState) -> dict[str, list[str]]:
    """{server: the volumes that are its disks}: the same."""
    with state.lock:
        return {id: volumes_of(m.machine) for id, m in state.machines.items()}


def shared(state: SimState) -> dict[str, list[str]]:
    """{server: the shared file systems that it has}: the same."""
    with state.lock:
        return {id: _shares(m.machine) for id, m in state.machines.items()}


def seated(state: SimState) -> dict[str, Seat | None]:
    """{server: what of the host is its alone}: the same."""
    with state.lock:
        return {id: m.machine.seat for id, m in state.machines.items()}


def options(**said: object) -> Sim:
    """Options of simulated hosts, the others as they are by default."""
    return msgspec.structs.replace(Sim(), **said)
