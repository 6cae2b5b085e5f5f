"""A hypervisor that only exists in memory, behind the same protocol as a real one: for scale, tests and the simulator.

What would lie on a host's disk and run on its CPUs is a `SimState`; the driver is only a hand on it.  So a process
may die and another find its machines again (in a directory, if it was given one), and a test may pull the plug of the
host (`SimState.power_cut`).

Latencies and faults come from handed-in dice and pass on a handed-in clock: from a seed, the same each time.
"""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from kilonova.kit.clock import Clock
from kilonova.kit.errors import NotFound, Refused
from kilonova.model.host import HostFacts
from kilonova.model.machine import Machine
from kilonova.model.options import Sim
from kilonova.virt.driver import Held, Power, Progress

LOG_MAX = 16_384  # letters of a console log
TRAITS = [
    "COMPUTE_ARCH_X86_64",
    "COMPUTE_FIRMWARE_BIOS",
    "COMPUTE_FIRMWARE_UEFI",
    "COMPUTE_NODE",
    "HW_ARCH_X86_64",
    "OWNER_NOVA",
    *(f"COMPUTE_IMAGE_TYPE_{f}" for f in ("AKI", "AMI", "ARI", "ISO", "QCOW2", "RAW", "VDI", "VHD", "VHDX", "VMDK")),
]


class SimMachine:
    """One machine: what it is, how it is, since when, and what it wrote."""

    __slots__ = ("log", "machine", "power", "since")

    def __init__(self, machine: Machine, power: Power, since: float) -> None:
        self.machine, self.power, self.since = machine, power, since
        self.log = ""


class _Kept(msgspec.Struct):
    """A `SimMachine` in its file."""

    machine: Machine
    power: Power
    since: float
    log: str


class SimState:
    """What outlives a process: the host's disk, and the guests that run.

    With a `directory` it outlives even kill -9: each machine is a file there.  A power cut of the machine under all
    this may cost the last changes: simulated hosts are not worth a flush of the disk each time.

    `deaf` are guests that heed no button; a `broken` host refuses every act.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.machines: dict[str, SimMachine] = {}
        self.deaf: set[str] = set()
        self.broken = False
        self.lock = threading.Lock()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for file in sorted(directory.glob("*.machine")):
                kept = msgspec.msgpack.decode(file.read_bytes(), type=_Kept)
                self.machines[file.stem] = found = SimMachine(kept.machine, kept.power, kept.since)
                found.log = kept.log

    def keep(self, id: str) -> None:
        """Write down how this machine is now; before anybody is told of it."""
        if self.directory is None:
            return
        file = self.directory / f"{id}.machine"
        with self.lock:
            m = self.machines.get(id)
            if m is None:
                file.unlink(missing_ok=True)
                return
            new = file.with_suffix(".new")
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "wb") as f:
                f.write(msgspec.msgpack.encode(_Kept(m.machine, m.power, m.since, m.log)))
            new.rename(file)

    def power_cut(self) -> None:
        """The whole host restarts: nothing runs any more, disks stay."""
        with self.lock:
            for m in self.machines.values():
                m.power = "suspended" if m.power == "suspended" else "shutdown"
        for id in list(self.machines):
            self.keep(id)


class SimDriver:
    """See `virt.driver.Driver`. `name` is the hypervisor's; `pass_time` defaults to the clock's sleep."""

    def __init__(
        self,
        name: str,
        state: SimState | None = None,
        *,
        clock: Clock,
        dice: random.Random,
        options: Sim | None = None,
    ) -> None:
        self.name, self.clock, self.dice = name, clock, dice
        self.state = state or SimState()
        self.options = options or Sim()
        self.heard: list[Callable[[str, Power], None]] = []

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
            cpu_info={
                "arch": "x86_64",
                "model": "sim",
                "vendor": "none",
                "topology": {"cores": o.cpus, "threads": 1, "sockets": 1},
            },
            traits=TRAITS,
            virt_type="sim",
            virt_why="it only exists in memory",
        )

    def machines(self) -> list[Held]:
        with self.state.lock:
            return [Held(id, m.power, m.machine.epoch) for id, m in sorted(self.state.machines.items())]

    def power(self, id: str) -> Power:
        return self._there(id).power

    def close(self) -> None:
        self.heard.clear()

    def listen(self, changed: Callable[[str, Power], None]) -> None:
        self.heard.append(changed)

    # -- acts

    def spawn(self, machine: Machine, progress: Progress) -> None:
        if (old := self.state.machines.get(machine.id)) is not None and old.power == "running":
            return
        progress("disks")
        self._act("spawn")
        progress("start")
        with self.state.lock:
            there = self.state.machines.setdefault(machine.id, SimMachine(machine, "nostate", 0.0))
        there.machine = machine
        self._boot(machine.id, there)

    def destroy(self, id: str) -> None:
        if id in self.state.machines:
            self._act("destroy", may_fail=False)
            with self.state.lock:
                gone = self.state.machines.pop(id, None)
            self.state.keep(id)
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
        self._act("stop")
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

    def console_log(self, id: str) -> bytes:
        m = self._there(id)
        log = m.log
        if m.power == "running" and self.clock.now() >= m.since + self.options.boot_s:
            log += f"\n{m.machine.identity.hostname} login: "
        return log.encode()

    # -- what guests do by themselves (tests call it)

    def guest_shuts_down(self, id: str) -> None:
        self._turn(id, self._there(id), "shutdown")

    def guest_crashes(self, id: str) -> None:
        self._turn(id, self._there(id), "crashed")

    # -- one act

    def _there(self, id: str) -> SimMachine:
        m = self.state.machines.get(id)
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

    def _turn(self, id: str, m: SimMachine, power: Power) -> None:
        if m.power != power:
            m.power = power
            self.state.keep(id)
            self._say(id, power)

    def _say(self, id: str, power: Power) -> None:
        for changed in self.heard:
            changed(id, power)


BOOT = "[    0.000000] Linux version 0.0-sim ({name})\n[    0.100000] Run /init as init process\ninstance-id: {id}\naddresses: {addresses}\n"


def copy(state: SimState) -> dict[str, tuple[str, int]]:
    """{server: (power, epoch)}: what a test compares."""
    with state.lock:
        return {id: (m.power, m.machine.epoch) for id, m in state.machines.items()}


def options(**said: object) -> Sim:
    """Options of simulated hosts, the others as they are by default."""
    return msgspec.structs.replace(Sim(), **said)
