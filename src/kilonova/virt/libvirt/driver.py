"""The hypervisor that is real: QEMU, with KVM where it is proved to work, through libvirt.

A server is a directory, `instances/UUID`, and a domain of the same UUID.  The directory is made first and removed
last, so whatever a crash leaves behind is listed by `machines()` (`records.py` reads them; of a server that has two
machines, see `moves.py`):

    machine.json   what it is (0600, without the admin password)
    disks.json     where its disks lie                disk.vda …    the disks
    domain.xml     what libvirt was told              disk.config   the config drive
    console.log    what the guest said on its serial line, the newest `console_log_max_bytes`
    ssh.port       under QEMU's user networking: the port of the machine's loopback that leads to its ssh
"""

import contextlib
import functools
import logging
import os
import queue
import shutil
import socket
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar
from xml.etree import ElementTree

import msgspec

from kilonova.contracts.compute import Luggage, Stats
from kilonova.kit.clock import Clock, Ids
from kilonova.kit.errors import NotFound, Refused, Trouble, Unavailable, Unsupported
from kilonova.model.console import Kind, Where
from kilonova.model.host import Cell, HostDevice, HostFacts
from kilonova.model.machine import (
    Disk,
    ImageSource,
    Machine,
    Nic,
    VolumeSource,
    volumes_of,
    with_nic,
    with_volume,
    without_nic,
    without_volume,
)
from kilonova.model.options import Compute, Devices, Libvirt, Pci
from kilonova.model.plan import connected_as
from kilonova.model.rescue import rescued
from kilonova.virt.driver import Held, Power, Progress
from kilonova.virt.libvirt import care, console_log, devices, disks, hotplug, luggage, moves, records, volumes, xml
from kilonova.virt.libvirt import host as machine_host
from kilonova.virt.libvirt.daemon import Link, Private, Running, library
from kilonova.virt.libvirt.records import UUID, put

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRIM_EVERY_S = 5.0
SAVE_BYTES_PER_S = 20 << 20  # what memory is written to disk with, at least
MOVE_S = 3600.0  # a volume from one place to another
LOOKS = 4  # at a domain that changes while we look

Told = Literal["stopped", "rebooted", "unplugged", "changed"]


class LibvirtDriver:
    """See the module. `Driver`, for QEMU and KVM.

    `fetch(image_id, write)` gives an image's bytes; `config_drive(machine)` the content of a config drive; `netns` is
    the path of the network namespace in which guests are plugged.  `carry(id)` is the command with which QEMU's user
    networking reaches the metadata service in that server's name, `outside` whether its guests get out.  Everything it
    has lies under `state_dir`.
    """

    def __init__(
        self,
        state_dir: Path,
        options: Libvirt | None = None,
        compute: Compute | None = None,
        *,
        clock: Clock,
        ids: Ids,
        fetch: disks.Fetch,
        config_drive: Callable[[Machine], bytes],
        netns: str | None = None,
        carry: Callable[[str], str] | None = None,
        outside: bool = False,
        hostname: str = "",
        boots_max: int = 0,
        pci: Pci | None = None,
        made: Devices | None = None,
    ) -> None:
        """Returns at once; the first call waits until libvirt is there. Raises Unsupported where QEMU or it is missing."""
        self.options, self.compute = options or Libvirt(), compute or Compute()
        self.pci, self.made = pci or Pci(), made or Devices()
        self.state_dir, self.clock, self.config_drive = state_dir.absolute(), clock, config_drive
        self.carry, self.outside = carry, outside
        self.hostname = hostname or self.compute.host or socket.gethostname()
        self.emulator = machine_host.emulator()
        self.shared = self.options.uri is not None  # with a libvirtd that runs guests as another user
        self.mode = 0o644 if self.shared else 0o600

        self.instances = self.state_dir / "instances"
        self.instances.mkdir(mode=0o711 if self.shared else 0o700, parents=True, exist_ok=True)
        self.cache = disks.ImageCache(self.state_dir / "cache", fetch, clock=clock, mode=self.mode)
        self.workshop = disks.Workshop(self.cache, self.mode)

        self.boots = threading.BoundedSemaphore(boots_max or 2 * machine_host.cpus())
        self.lock = threading.Lock()
        self.locks: weakref.WeakValueDictionary[str, _Own] = weakref.WeakValueDictionary()
        self.watchers: dict[str, list[queue.SimpleQueue[Told]]] = {}
        self.listeners: list[Callable[[str, Power], None]] = []
        self.known: dict[str, Power] = {}
        self.epochs: dict[str, int] = {}
        self.devices: dict[str, tuple[list[str], list[str]]] = {}  # by server: ids of ports, of volumes
        self.news: queue.SimpleQueue[tuple[str, Power] | None] = queue.SimpleQueue()
        self.abilities: machine_host.Abilities | None = None
        self.cells: list[Cell] = []
        self.given: list[HostDevice] = []  # devices of this host that servers may have
        self.version = 0
        self.closing = threading.Event()
        moves.mended(self.instances)
        luggage.served_again(self.instances, self._names())
        self._sweep()

        self.daemon: Running | Private
        if self.options.uri:
            self.daemon = Running(self.options.uri)
        else:
            qemu = "seccomp_sandbox = 0\n" if carry else ""  # see xml.py, _sandbox
            self.daemon = Private(self.state_dir / "libvirt", ids=ids, netns=netns, hostname=self.hostname, qemu=qemu)
        self.owner = self._owner(ids)
        self.lib = library()
        self.link = Link(self.daemon, call_timeout_s=self.options.call_timeout_s, connected=self._connected)
        self.proof = self._proof()  # while libvirtd starts
        for work, name in ((self._tell, "libvirt news"), (self._trim, "console logs")):
            threading.Thread(target=work, name=name, daemon=True).start()

    # ---- the host

    def host(self) -> HostFacts:
        """Waits for the first connection. Raises Unavailable."""
        if self.abilities is None:
            self.link.call(self._learn, timeout_s=max(30.0, self.options.call_timeout_s))
        assert self.abilities is not None
        size, free = machine_host.disk_gb(self.state_dir)
        return HostFacts(
            vcpus=machine_host.cpus(),
            memory_mb=machine_host.memory_mb(),
            disk_gb=size,
            disk_free_gb=free,
            hypervisor_type="QEMU",
            hypervisor_version=self.version,
            hypervisor_hostname=self.hostname,
            cpu_info=self.abilities.cpu_info,
            traits=self.abilities.traits,
            cells=self.cells,
            devices=self.given,
            virt_type=self.virt_type,
            virt_why=self.proof.why,
        )

    @property
    def virt_type(self) -> Literal["kvm", "qemu"]:
        return "kvm" if self.proof.works else "qemu"

    def _proof(self) -> machine_host.Proof:
        if self.options.virt_type == "kvm":
            return machine_host.Proof(True, "KVM, as configured.")
        if self.options.virt_type == "qemu":
            return machine_host.Proof(False, "Guests are emulated, as configured.")
        proof = machine_host.prove_kvm(self.emulator, self.state_dir / "kvm.json", self.clock)
        logger.info("%s", proof.why)
        return proof

    def _learn(self, conn: Any) -> None:
        """What guests can have here. The first time on a host QEMU is examined for it, which takes a while."""
        machine = self.options.machine_type
        text = conn.getDomainCapabilities(self.emulator, None, machine, self.virt_type)
        features: list[str] = []
        with contextlib.suppress(self.lib.libvirtError):
            features = self._features(conn, text)
        self.version = machine_host.version(self.emulator)
        self.cells = machine_host.cells(conn.getCapabilities(), machine_host.own_cpus())
        self.given = self._given(conn)
        self.abilities = machine_host.abilities(text, features)

    def _given(self, conn: Any) -> list[HostDevice]:
        """Nobody is asked where nothing is given away."""
        if not (self.pci.device_spec or self.made.enabled_mdev_types):
            return []
        lib = self.lib
        kinds = lib.VIR_CONNECT_LIST_NODE_DEVICES_CAP_PCI_DEV | lib.VIR_CONNECT_LIST_NODE_DEVICES_CAP_MDEV
        documents = [d.XMLDesc() for d in conn.listAllDevices(kinds)]
        found = devices.offered(documents, self.pci.device_spec, self.made)
        logger.info("devices for servers: %s", ", ".join(f"{d.address} {d.resource_class}" for d in found) or "none")
        return found

    def _make_devices(self, machine: Machine) -> None:
        """Its mediated devices, which do not outlive the host's boot."""
        for id, document in devices.wanted(machine):
            try:
                self.link.call(functools.partial(self._make_device, id=id, document=document))
            except self.lib.libvirtError as e:
                raise self._trouble(machine.id, e) from None

    def _make_device(self, conn: Any, id: str, document: str) -> None:
        if self._made_device(conn, id) is None:
            conn.nodeDeviceCreateXML(document)

    def _made_device(self, conn: Any, id: str) -> Any:
        for d in conn.listAllDevices(self.lib.VIR_CONNECT_LIST_NODE_DEVICES_CAP_MDEV):
            one = devices.mediated(ElementTree.fromstring(d.XMLDesc()))  # noqa: S314  (libvirt's own output)
            if one is not None and one.uuid == id:
                return d
        return None

    def _remove_devices(self, machine: Machine) -> None:
        for id, _ in devices.wanted(machine):
            with contextlib.suppress(self.lib.libvirtError):
                self.link.call(functools.partial(self._unmake_device, id=id))

    def _unmake_device(self, conn: Any, id: str) -> None:
        if (there := self._made_device(conn, id)) is not None:
            there.destroy()

    def _features(self, conn: Any, capabilities: str) -> list[str]:
        """All that the CPU of a guest can do: what libvirt calls the host's model, written out."""
        model = machine_host.host_model(capabilities)
        if not model:
            return []
        flag = self.lib.VIR_CONNECT_BASELINE_CPU_EXPAND_FEATURES
        kind = self.options.machine_type
        whole = conn.baselineHypervisorCPU(self.emulator, None, kind, self.virt_type, [model], flag)
        return machine_host.features(whole)

    # ---- what is here

    def machines(self) -> list[Held]:
        """Ours: domains that bear our mark or have a directory here, and directories without a domain."""
        self._sweep()
        names = self._names()
        directories = {name for name in names if UUID.fullmatch(name)}
        domains = self.link.call(lambda conn: self._domains(conn, directories))
        older = [Held(m.id, "shutdown", m.epoch) for m in moves.kept(names, self.instances)]
        held = [self._held(id, power) if id in directories else Held(id, power, epoch) for id, power, epoch in domains]
        here = {h.id for h in held}
        bare = sorted(id for id in directories - here if (self.instances / id).is_dir())  # still
        held += [self._held(id, "nostate") for id in bare]
        return older + held

    def _held(self, id: str, power: Power) -> Held:
        ports, volumes = self._devices(id)
        copies = care.copies(self.instances / id)
        return Held(id, power, self._epoch(id), captures=copies, ports=ports, volumes=volumes)

    def power(self, id: str) -> Power:
        """Raises NotFound where there is neither a domain nor a directory."""
        try:
            return self._on(id, self._power_of)
        except NotFound:
            if self._directory(id).is_dir():
                return "nostate"
            raise

    def _domains(self, conn: Any, directories: set[str]) -> list[tuple[str, Power, int]]:
        found = []
        for domain in conn.listAllDomains():
            with contextlib.suppress(self.lib.libvirtError):  # gone meanwhile
                id, epoch = domain.UUIDString(), 0
                if id not in directories:
                    mark = self._mark(domain)
                    if mark is None or mark[0] != self.owner:
                        continue
                    epoch = mark[1]
                found.append((id, self._power_of(domain), epoch))
        return found

    def _mark(self, domain: Any) -> tuple[str, int] | None:
        """(owner, epoch), as our own definition says; None for somebody else's domain."""
        try:
            text = domain.metadata(self.lib.VIR_DOMAIN_METADATA_ELEMENT, xml.NAMESPACE, 0)
            return xml.epoch_of(text)
        except (self.lib.libvirtError, ValueError):
            return None

    def _power_of(self, domain: Any) -> Power:
        lib = self.lib
        state, reason = domain.state()
        if state in (lib.VIR_DOMAIN_RUNNING, lib.VIR_DOMAIN_BLOCKED, lib.VIR_DOMAIN_SHUTDOWN):
            return "running"
        if state == lib.VIR_DOMAIN_PAUSED:
            return "paused"
        if state == lib.VIR_DOMAIN_PMSUSPENDED:
            return "suspended"
        if state == lib.VIR_DOMAIN_SHUTOFF:
            if domain.hasManagedSaveImage():
                return "suspended"
            return "crashed" if reason == lib.VIR_DOMAIN_SHUTOFF_CRASHED else "shutdown"
        return "crashed" if state == lib.VIR_DOMAIN_CRASHED else "nostate"

    # ---- making and removing

    def spawn(self, machine: Machine, progress: Progress) -> None:
        id = machine.id
        directory = self._directory(id)
        with self._alone(id):
            was_here = directory.is_dir()
            if was_here and self.power(id) == "running":
                return
            directory.mkdir(mode=0o711 if self.shared else 0o700, exist_ok=True)
            self._remember(machine)
        try:
            bases = {
                disk.device: self.cache.base(disk.source, progress)
                for disk in machine.disks
                if isinstance(disk.source, ImageSource)
            }
            with self._alone(id):
                if not (directory / "machine.json").exists():
                    raise Refused("The server was deleted while it was built.")
                progress("making disks")
                laid = {
                    disk.device: self.workshop.lay(disk, number, directory, bases.get(disk.device))
                    for number, disk in enumerate(machine.disks)
                }
                records.lay(directory, laid)
                if machine.config_drive:
                    disks.config_drive(directory / xml.CONFIG_DRIVE, lambda: self.config_drive(machine), self.mode)
                progress("starting")
                self._define(machine)
                self._run(machine)
        except Trouble as trouble:
            if not was_here and not isinstance(trouble, Unavailable):
                with contextlib.suppress(Trouble):
                    self.destroy(id)
            raise

    def destroy(self, id: str) -> None:
        with self._alone(id):
            machine = self._machine(id)
            with contextlib.suppress(NotFound):
                self._on(id, self._turned_off)
                self._on(id, self._undefined)
            if machine:
                self._remove_taps(machine)
                self._remove_devices(machine)
                for kind in ("vnc", "tty"):
                    with contextlib.suppress(OSError):
                        self._socket(id, kind).unlink()
                if isinstance(self.daemon, Private):
                    (self.daemon.logs / "qemu" / Path(f"{machine.name}.log").name).unlink(missing_ok=True)
            moves.remove(moves.beside(self._directory(id)))
            moves.remove(self._directory(id))
            self.known.pop(id, None)
            self._met(id)

    def remember(self, machine: Machine) -> None:
        """From its next start or hard reboot on it is this. Raises NotFound when it is not here."""
        with self._alone(machine.id):
            if not self._directory(machine.id).is_dir():
                raise NotFound(f"Instance {machine.id} could not be found.")
            self._remember(machine)

    def evict_images(self, max_age_s: float | None = None) -> list[str]:
        """Removes images nobody needs; gives their ids. For a reconciler; -1 (or less) keeps them for ever."""
        age = self.compute.image_cache_max_age_s if max_age_s is None else max_age_s
        if age < 0:
            return []
        used: set[str] = set()
        for name in self._names():
            if machine := records.machine_in(self.instances / name):
                used |= {d.source.image_id for d in machine.disks if isinstance(d.source, ImageSource)}
            if (other := care.rescued_with(self.instances / name)) and isinstance(other.disk.source, ImageSource):
                used.add(other.disk.source.image_id)
        return self.cache.evict(used, age)

    # ---- the simple verbs

    def start(self, id: str) -> None:
        """From a saved state where there is one; defined anew where libvirt has forgotten it."""
        with self._alone(id):
            machine = self._known(id)
            if self.power(id) in ("shutdown", "crashed", "nostate"):
                self._define(machine)
            self._run(machine)

    def stop(self, id: str, timeout_s: float, retry_s: float = 10) -> None:
        end = self.clock.now() + timeout_s
        with self._watch(id) as told:
            while self._on(id, self._power_of) in ("running", "paused"):
                left = end - self.clock.now()
                if left <= 0:
                    break
                self._on(id, self._asked_to_end)
                self._hear(told, "stopped", min(left, max(0.1, retry_s)))
        with self._alone(id):
            self._on(id, self._turned_off)
            self._on(id, self._forget_saved)

    def reboot(self, id: str, hard: bool, timeout_s: float) -> None:
        if hard or not self._rebooted(id, timeout_s):
            with self._alone(id):
                machine = self._known(id)
                with contextlib.suppress(NotFound):
                    self._on(id, self._turned_off)
                    self._on(id, self._forget_saved)
                self._define(machine)
                self._run(machine)

    def pause(self, id: str) -> None:
        def act(domain: Any) -> None:
            power = self._power_of(domain)
            if power == "running":
                domain.suspend()
            elif power != "paused":
                raise Refused(f"The server cannot be paused: it is {power}.")

        self._on(id, act)

    def unpause(self, id: str) -> None:
        def act(domain: Any) -> None:
            power = self._power_of(domain)
            if power == "paused":
                domain.resume()
            elif power != "running":
                raise Refused(f"The server cannot be unpaused: it is {power}.")

        self._on(id, act)

    def suspend(self, id: str) -> None:
        """Libvirt's managed save: its file is libvirt's, so a start restores from it whoever asks."""

        def act(domain: Any) -> None:
            power = self._power_of(domain)
            if power in ("running", "paused"):
                domain.managedSave(0)
            elif power != "suspended":
                raise Refused(f"The server cannot be suspended: it is {power}.")

        machine = self._known(id)
        with self._alone(id):
            self._on(id, act, timeout_s=self._long(machine))

    def resume(self, id: str) -> None:
        with self._alone(id):
            power = self._on(id, self._power_of)
            if power in ("shutdown", "crashed"):
                raise Refused("The server cannot be resumed: its memory was not kept.")
            self._run(self._known(id))

    def precache(self, image: ImageSource) -> None:
        self.cache.base(image)

    # ---- devices that come and go

    def attach_nic(self, id: str, nic: Nic) -> None:
        """First into the guest, then into the machine: what was not plugged in is not part of it."""
        with self._alone(id):
            machine = with_nic(self._known(id), nic)
            if nic.vif_type == "user" and self.power(id) in ("running", "paused"):
                raise Unsupported("The requested functionality is not supported.", why="QEMU's own network")
            self._make_taps(msgspec.structs.replace(machine, nics=[nic]))
            if self._on(id, lambda domain: domain.isActive()):
                text = xml.nic_xml(nic, self._place(machine))
                self._on(id, lambda domain: hotplug.plug(self.lib, domain, hotplug.nic(nic.device), text))
            self._remember(machine)
            self._define(machine)

    def detach_nic(self, id: str, port_id: str, timeout_s: float, anyway: bool = False) -> None:
        machine = self._machine(id)
        nic = next((n for n in machine.nics if n.port_id == port_id), None) if machine else None
        device = nic.device if nic else f"tap{port_id[:11]}"  # an attach may have come half-way
        refusals = (Refused,) if anyway else ()  # the machine is without it all the same, and its next start says so
        gone = False
        try:
            with contextlib.suppress(*refusals):
                gone = self._let_go(id, hotplug.nic(device), timeout_s)
        except NotFound:
            gone = True
        if not gone and not anyway:
            raise Refused("The guest does not let go of the interface.")
        with self._alone(id), contextlib.suppress(*refusals):
            machine = self._machine(id)
            if machine is not None and any(n.port_id == port_id for n in machine.nics):
                machine = without_nic(machine, port_id)
                self._remember(machine)
                self._define(machine)
        if gone and os.geteuid() and _is_link(device):
            _ip("link", "delete", device)

    def attach_volume(self, id: str, disk: Disk) -> None:
        """The same way: into the guest, then into the machine. It stays where it is; nothing of it is copied."""
        assert isinstance(disk.source, VolumeSource)
        found = volumes.laid(disk.source)
        with self._alone(id):
            machine, laid = self._known(id), self._laid(id)
            if disk.source.volume_id in volumes_of(machine):
                return
            place = msgspec.structs.replace(self._place(machine), disks=laid | {disk.device: found})
            find, text = hotplug.disk(disk.device, disk.serial), xml.disk_xml(disk, place)
            self._on(id, lambda domain: hotplug.plug(self.lib, domain, find, text))
            self._lay(id, place.disks)
            machine = with_volume(machine, disk)
            self._remember(machine)
            self._define(machine)

    def detach_volume(self, id: str, volume_id: str, timeout_s: float, anyway: bool = False) -> None:
        machine = self._machine(id)
        disk = _disk_of(machine, volume_id)
        find = hotplug.disk(disk.device if disk else "", volume_id)  # an attach may have come half-way
        try:
            gone = self._let_go(id, find, timeout_s)
        except NotFound:
            gone = True
        if not gone and not anyway:
            raise Refused("The guest does not let go of the volume.")
        with self._alone(id):
            machine = self._machine(id)
            if (disk := _disk_of(machine, volume_id)) and machine is not None:
                machine = without_volume(machine, volume_id)
                self._remember(machine)
                self._define(machine)
                self._lay(id, {name: laid for name, laid in self._laid(id).items() if name != disk.device})

    def extend_volume(self, id: str, volume_id: str, size_bytes: int) -> None:
        with self._alone(id):
            machine = self._known(id)
            disk = _disk_of(machine, volume_id)
            if disk is None:
                return
            flags = self.lib.VIR_DOMAIN_BLOCK_RESIZE_BYTES
            if self._on(id, lambda domain: domain.isActive()):
                self._on(id, lambda domain: domain.blockResize(disk.device, size_bytes, flags))
            self._remember(with_volume(machine, msgspec.structs.replace(disk, size_bytes=size_bytes)))

    def swap_volume(self, id: str, volume_id: str, disk: Disk) -> None:
        """QEMU copies, and goes on with the copy when both are alike; off, the bytes are copied as they lie."""
        assert isinstance(disk.source, VolumeSource)
        with self._alone(id):
            machine = self._known(id)
            old = _disk_of(machine, volume_id)
            if old is None:
                if disk.source.volume_id in volumes_of(machine):
                    return
                raise Refused(f"The machine does not have the volume {volume_id}.")
            new = msgspec.structs.replace(disk, device=old.device)
            found = volumes.laid(disk.source)
            place = msgspec.structs.replace(self._place(machine), disks=self._laid(id) | {old.device: found})
            if self._on(id, lambda domain: domain.isActive()):
                self._move(id, old.device, found.layers[0].path, xml.disk_xml(new, place))
            else:
                was, now = self._laid(id)[old.device].layers[0], found.layers[0]
                disks.qemu_img("convert", "-n", "-f", was.format, "-O", now.format, was.path, now.path, cpu_s=1800)
            self._lay(id, place.disks)
            machine = with_volume(machine, new, volume_id)
            self._remember(machine)
            self._define(machine)

    def _move(self, id: str, device: str, path: str, text: str) -> None:
        """Raises Refused where it could not be done in time; the disk is then where it was."""
        end = self.clock.now() + MOVE_S
        try:
            while not self._on(id, lambda domain: hotplug.mirrored(self.lib, domain, device, path, text)):
                if self.clock.now() > end:
                    raise Refused("The volume could not be copied in time.")
                self.clock.sleep(0.1)
        except Refused:
            self._on(id, lambda domain: hotplug.unmirror(self.lib, domain, device))
            raise

    def _let_go(self, id: str, find: hotplug.Find, timeout_s: float) -> bool:
        """Has the guest let go of it in time? Asked again now and then: while it boots it may not have heard."""
        end = self.clock.now() + timeout_s
        with self._watch(id) as told:
            while not self._on(id, lambda domain: hotplug.ask_back(self.lib, domain, find)):
                left = end - self.clock.now()
                if left <= 0:
                    return False
                self._hear(told, "unplugged", min(left, hotplug.RETRY_S))
        return True

    # ---- cold moves

    def prepare(self, machine: Machine) -> None:
        moves.prepare(self, machine)

    def depart(self, id: str, epoch: int, timeout_s: float) -> Luggage:
        return moves.depart(self, id, epoch, timeout_s)

    def arrive(self, machine: Machine, luggage: Luggage, start: bool, progress: Progress) -> None:
        moves.arrive(self, machine, luggage, start, progress)

    def come_back(self, machine: Machine, was: int, start: bool) -> None:
        moves.come_back(self, machine, was, start)

    def stay(self, id: str, power: Power) -> None:
        moves.stay(self, id, power)

    def drop(self, id: str, epoch: int) -> None:
        moves.drop(self, id, epoch)

    # ---- made anew

    def rebuild(self, machine: Machine, progress: Progress) -> None:
        """What it shall be is written down before its disks go, so that whoever does it again knows its volumes."""
        id = machine.id
        directory = self._directory(id)
        before = self._machine(id)
        if before is not None:
            machine = connected_as(machine, before)
            with self._alone(id):
                with contextlib.suppress(NotFound):
                    self._on(id, self._turned_off)
                    self._on(id, self._forget_saved)
                self._remember(machine)
                care.forget_rescue(directory)
                for file in directory.glob("disk.*"):
                    file.unlink(missing_ok=True)
        self.spawn(machine, progress)

    # ---- another system for a while

    def rescue(self, id: str, disk: Disk, stable: bool, admin_password: str, progress: Progress) -> None:
        assert isinstance(disk.source, ImageSource)
        machine, directory = self._known(id), self._directory(id)
        other = care.Other(disk, stable)
        if care.rescued_with(directory) == other and self.power(id) == "running":
            return
        base = self.cache.base(disk.source, progress)
        progress("making disks")
        meanwhile, of = rescued(machine, disk, stable, admin_password)
        with self._alone(id):
            with contextlib.suppress(NotFound):
                self._on(id, self._turned_off)
                self._on(id, self._forget_saved)
            care.forget_rescue(directory)
            apart = directory / care.RESCUE
            apart.mkdir(mode=0o711 if self.shared else 0o700)
            laid = care.places(self._laid(id), self.workshop.lay(disk, 0, apart, base), of)
            place = msgspec.structs.replace(self._place(machine), disks=laid)
            if machine.config_drive:
                drive = apart / xml.CONFIG_DRIVE
                disks.config_drive(drive, lambda: self.config_drive(meanwhile), self.mode)
                place = msgspec.structs.replace(place, config_drive=str(drive))
            self._define(meanwhile, place)
            put(apart / "rescue.json", msgspec.json.encode(other))
            self._run(meanwhile)

    def unrescue(self, id: str) -> None:
        machine, directory = self._known(id), self._directory(id)
        with self._alone(id):
            if (directory / care.RESCUE).is_dir():
                with contextlib.suppress(NotFound):
                    self._on(id, self._turned_off)
                    self._on(id, self._forget_saved)
                self._define(machine)
                care.forget_rescue(directory)
            self._run(machine)

    # ---- images of its disk

    def capture(self, id: str, image_id: str, disk_format: str, progress: Progress) -> None:
        """A guest that runs is paused meanwhile: then QEMU has written down all that it knows of the disk."""
        machine, directory = self._known(id), self._directory(id)
        copy, held = care.copy_of(directory, image_id), directory / care.HELD
        if not copy.exists():
            progress("copying its disk")
            if self.power(id) == "running":
                held.touch()
                self._on(id, lambda domain: domain.suspend())
            try:
                care.copied(machine, self._laid(id), copy, disk_format, 0o600)
            finally:
                self._go_on(id)
        self._go_on(id)

    def captured(self, id: str, image_id: str) -> Iterator[bytes]:
        return care.pieces(care.copy_of(self._directory(id), image_id))

    def drop_capture(self, id: str, image_id: str) -> None:
        care.copy_of(self._directory(id), image_id).unlink(missing_ok=True)
        with contextlib.suppress(NotFound):
            self._go_on(id)

    def _go_on(self, id: str) -> None:
        """A guest that we paused ourselves runs again, whatever became of who did it."""
        held = self._directory(id) / care.HELD
        if held.exists():
            self._on(id, lambda domain: domain.resume() if self._power_of(domain) == "paused" else None)
            held.unlink(missing_ok=True)

    # ---- what else a guest can be told

    def set_password(self, id: str, password: str) -> None:
        """By the agent in the guest. Raises Unsupported where it is to have none."""
        properties = self._known(id).properties
        if properties.get("hw_qemu_guest_agent", "").lower() not in ("yes", "true", "1", "on"):
            raise Unsupported("The image of the server does not say that its guest has an agent (hw_qemu_guest_agent).")
        user = properties.get("os_admin_user") or (
            "Administrator" if properties.get("os_type") == "windows" else "root"
        )
        try:
            self._on(id, lambda domain: domain.setUserPassword(user, password, 0))
        except Unavailable:
            raise Refused("The agent of the guest does not answer.") from None

    def crash_dump(self, id: str) -> None:
        self._on(id, lambda domain: domain.injectNMI(0))

    def stats(self, id: str) -> Stats:
        machine = self._known(id)
        return self._on(id, lambda domain: care.stats(self.lib, domain, machine, self._power_of(domain)))

    # ---- the console, and news

    def console_log(self, id: str) -> bytes:
        """Raises NotFound where there is no such machine; b"" while it said nothing."""
        directory = self._directory(id)
        if not directory.is_dir():
            raise NotFound(f"Instance {id} could not be found.")
        return console_log.said(directory, min(console_log.TAIL_BYTES, self.compute.console_log_max_bytes))

    def console(self, id: str, kind: Kind) -> Where:
        """As the running machine has it: it may have been made by an earlier release."""
        if kind == "spice":
            raise Unsupported("Machines have no SPICE here.")
        if self.power(id) not in ("running", "paused"):
            raise NotFound(f"Instance {id} is not running.")
        path = xml.socket_of(self._on(id, lambda domain: str(domain.XMLDesc())), kind)
        if not path:
            raise Unsupported(f"The machine has no {kind} console that can be reached.")
        return Where(path=path)

    def listen(self, changed: Callable[[str, Power], None]) -> None:
        self.listeners.append(changed)

    def close(self, stop_daemon: bool | None = None) -> None:
        """Guests go on in any case. `stop_daemon`: end a private libvirtd as well; None: when no guest needs it."""
        if stop_daemon is None:
            stop_daemon = False
            with contextlib.suppress(Trouble, self.lib.libvirtError):
                # One that cannot be talked to serves no guest either, and would be started again and again.
                stop_daemon = not self.link.ready(0) or self.link.call(
                    lambda conn: not conn.numOfDomains(), timeout_s=2
                )
        self.closing.set()
        self.news.put(None)
        self.link.close()
        if stop_daemon:
            self.daemon.stop()

    # ---- acts on a domain; each may be done twice

    def _on(self, id: str, act: Callable[[Any], T], timeout_s: float | None = None) -> T:
        """`act(domain)`. Raises NotFound where there is none, Refused with few words when libvirt would not.

        An act first looks how the domain is.  What an earlier life of ours asked for may come to its end between the
        look and the deed, which libvirt then calls invalid: so it may look again.
        """
        self._directory(id)
        for looks_left in reversed(range(LOOKS)):
            try:
                return self.link.call(lambda conn: act(conn.lookupByUUIDString(id)), timeout_s)
            except self.lib.libvirtError as e:
                if e.get_error_code() != self.lib.VIR_ERR_OPERATION_INVALID or not looks_left:
                    raise self._trouble(id, e) from None
                self.clock.sleep(0.1)
        raise AssertionError

    def _trouble(self, id: str, error: Any) -> Trouble:
        lib, why = self.lib, str(error)
        if error.get_error_code() == lib.VIR_ERR_NO_DOMAIN:
            return NotFound(f"Instance {id} could not be found.", why=why)
        if error.get_error_code() in (lib.VIR_ERR_OPERATION_TIMEOUT, lib.VIR_ERR_AGENT_UNRESPONSIVE):
            return Unavailable("The hypervisor of this host is busy with the server.", why=why)
        for mark, said in REASONS.items():
            if mark.lower() in why.lower():
                return Refused(said, why=why)
        return Refused("The hypervisor of this host could not do it.", why=why)

    def _define(self, machine: Machine, at: xml.Place | None = None) -> None:
        """Tells libvirt; the same again is no harm."""
        text = xml.domain_xml(machine, at or self._place(machine))
        put(self._directory(machine.id) / "domain.xml", text.encode())
        try:
            self.link.call(lambda conn: conn.defineXML(text))
        except self.lib.libvirtError as e:
            raise self._trouble(machine.id, e) from None

    def _run(self, machine: Machine) -> None:
        """Until it runs: from off, from saved, from paused."""

        def act(domain: Any) -> None:
            if domain.state()[0] == self.lib.VIR_DOMAIN_PMSUSPENDED:
                domain.pMWakeup()
            elif not domain.isActive():
                domain.create()
            if domain.state()[0] == self.lib.VIR_DOMAIN_PAUSED:  # now, or when it was saved
                domain.resume()

        self._make_taps(machine)
        self._make_devices(machine)
        with self.boots:
            self._on(machine.id, act, timeout_s=self._long(machine))

    def _turned_off(self, domain: Any) -> None:
        if domain.isActive():
            try:
                domain.destroy()
            except self.lib.libvirtError:
                if domain.isActive():
                    raise

    def _undefined(self, domain: Any) -> None:
        lib = self.lib
        if domain.isPersistent():
            flags = lib.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | lib.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            flags |= lib.VIR_DOMAIN_UNDEFINE_NVRAM | lib.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            domain.undefineFlags(flags)

    def _forget_saved(self, domain: Any) -> None:
        if domain.hasManagedSaveImage():
            domain.managedSaveRemove(0)

    def _asked_to_end(self, domain: Any) -> None:
        """By the power button. A guest that is paused would not notice it."""
        with contextlib.suppress(self.lib.libvirtError):  # it may just have ended
            if domain.state()[0] == self.lib.VIR_DOMAIN_PAUSED:
                domain.resume()
            domain.shutdownFlags(self.lib.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)

    def _rebooted(self, id: str, timeout_s: float) -> bool:
        """With the guest's help. libvirt turns the power-off that comes of it into a reset, so the machine never
        looks off meanwhile, and the reboot comes to its end also when we do not."""

        def act(domain: Any) -> bool:
            if domain.state()[0] != self.lib.VIR_DOMAIN_RUNNING:
                return False
            domain.reboot(self.lib.VIR_DOMAIN_REBOOT_ACPI_POWER_BTN)
            return True

        end = self.clock.now() + timeout_s
        with self._watch(id) as told:
            while (left := end - self.clock.now()) > 0:
                try:
                    if not self._on(id, act):
                        return False
                except NotFound:
                    return False
                if self._hear(told, "rebooted", min(left, 10.0)):
                    return True
        return False

    def _long(self, machine: Machine) -> float:
        """How long a call may take that moves all of a guest's memory."""
        return self.options.call_timeout_s + (machine.memory_mb << 20) / SAVE_BYTES_PER_S

    # ---- taps, where libvirt may not make them

    def _taps(self, machine: Machine) -> list[tuple[str, str, int]]:
        """(name, bridge, MTU) of those that are ours to make."""
        if os.geteuid() == 0:
            return []
        return [(nic.device, nic.bridge, nic.mtu) for nic in machine.nics if nic.vif_type == "bridge"]

    def _make_taps(self, machine: Machine) -> None:
        for name, bridge, mtu in self._taps(machine):
            if not _is_link(name):
                _ip("tuntap", "add", name, "mode", "tap", "user", str(os.geteuid()), "vnet_hdr")
            _ip("link", "set", name, "mtu", str(mtu), "master", bridge, "up")

    def _remove_taps(self, machine: Machine) -> None:
        for name, _, _ in self._taps(machine):
            if _is_link(name):
                _ip("link", "delete", name)

    # ---- a server's directory

    def _directory(self, id: str) -> Path:
        if not UUID.fullmatch(id):
            raise NotFound(f"Instance {id} could not be found.")
        return self.instances / id

    def _directories(self) -> set[str]:
        return {name for name in self._names() if UUID.fullmatch(name)}

    def _names(self) -> set[str]:
        """Of the servers' directories, and of those with the machines that are kept."""
        return {p.name for p in self.instances.iterdir() if UUID.fullmatch(p.name.removesuffix(moves.BESIDE))}

    def _remember(self, machine: Machine) -> None:
        records.remember(self._directory(machine.id), machine)
        self.epochs[machine.id] = machine.epoch
        self.devices[machine.id] = _devices_of(machine)

    def _met(self, id: str) -> None:
        """Another machine may have this name by now."""
        self.epochs.pop(id, None)
        self.devices.pop(id, None)

    def _machine(self, id: str) -> Machine | None:
        return records.machine_in(self._directory(id))

    def _known(self, id: str) -> Machine:
        if machine := self._machine(id):
            return machine
        raise NotFound(f"Instance {id} could not be found.")

    def _epoch(self, id: str) -> int:
        if id not in self.epochs:
            machine = self._machine(id)
            self.epochs[id] = machine.epoch if machine else 0
        return self.epochs[id]

    def _devices(self, id: str) -> tuple[list[str], list[str]]:
        """Its ports and its volumes."""
        if id not in self.devices:
            machine = self._machine(id)
            self.devices[id] = _devices_of(machine) if machine else ([], [])
        return self.devices[id]

    def _place(self, machine: Machine) -> xml.Place:
        directory, options = self._directory(machine.id), self.options
        laid = self._laid(machine.id)
        drive = directory / xml.CONFIG_DRIVE
        if machine.config_drive and not drive.exists():
            disks.config_drive(drive, lambda: self.config_drive(machine), self.mode)
        mode = options.cpu_mode
        if mode == "auto":
            mode = "host-model" if self.virt_type == "kvm" else "maximum"
        return xml.Place(
            emulator=self.emulator,
            virt_type=self.virt_type,
            disks=laid,
            console=str(directory / "console.log"),
            owner=self.owner,
            config_drive=str(drive) if machine.config_drive else "",
            vnc="" if self.shared else str(self._socket(machine.id, "vnc")),
            serial="" if self.shared else str(self._socket(machine.id, "tty")),
            machine_type=options.machine_type,
            cpu_mode=mode,
            cpu_model=self._cpu_model(),
            disk_cache=options.disk_cache,
            spare_slots=options.hotplug_slots,
            tcg_cache_mb=options.tcg_cache_mb,
            taps="libvirt" if os.geteuid() == 0 else "ready",
            apart=self._apart(machine),
            sandbox="ours" if self.carry else "libvirt",
        )

    def _laid(self, id: str) -> dict[str, xml.Laid]:
        return records.laid_in(self._directory(id))

    def _lay(self, id: str, laid: dict[str, xml.Laid]) -> None:
        records.lay(self._directory(id), laid)

    def _apart(self, machine: Machine) -> xml.Apart:
        if all(nic.vif_type != "user" for nic in machine.nics):
            return xml.Apart()
        metadata = self.carry(machine.id) if self.carry else ""
        return xml.Apart(metadata, self._ssh_port(machine.id), self.outside)

    def _ssh_port(self, id: str) -> int:
        """A free port of the machine's loopback: the one it had, as long as nobody else took it."""
        file, found = self._directory(id) / records.SSH_PORT, 0
        for port in (records.ssh_port(file.parent), 0):
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as tried:
                found = tried.getsockname()[1]
                break
        put(file, str(found).encode())
        return found

    def _cpu_model(self) -> str:
        if self.options.cpu_mode != "custom" or not self.options.cpu_models:
            return ""
        can = self.abilities.cpu_models if self.abilities else []
        return next((m for m in self.options.cpu_models if m in can), self.options.cpu_models[0])

    def _socket(self, id: str, kind: Literal["vnc", "tty"]) -> Path:
        """In the directory for sockets, whose name is short enough."""
        where = self.daemon.run if isinstance(self.daemon, Private) else self.state_dir
        return where / f"{id}.{kind}"

    def _owner(self, ids: Ids) -> str:
        if isinstance(self.daemon, Private):
            return self.daemon.host_uuid
        kept = self.state_dir / "host_uuid"
        if not kept.exists():
            put(kept, ids.uuid().encode())
        return kept.read_text().strip()

    def _sweep(self) -> None:
        """What a destroy did not come to."""
        for gone in self.instances.glob(".*-*-*-*-*"):
            shutil.rmtree(gone, ignore_errors=True)

    @contextlib.contextmanager
    def _alone(self, id: str) -> Iterator[None]:
        """One act at a time changes what a server has here. Held for moments, never while a guest is waited for."""
        with self.lock:
            own = self.locks.get(id) or _Own()
            self.locks[id] = own
        with own.lock:
            yield

    # ---- what libvirt says unasked

    def _connected(self, conn: Any) -> None:
        """With each new connection: hear what happens from now on, and find out what happened meanwhile."""
        lib = self.lib
        conn.domainEventRegisterAny(None, lib.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None)
        conn.domainEventRegisterAny(None, lib.VIR_DOMAIN_EVENT_ID_REBOOT, self._reset, None)
        conn.domainEventRegisterAny(None, lib.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, self._removed, None)
        for id, power, _ in self._domains(conn, self._directories()):
            self._saw(id, power)
        with self.lock:
            for watchers in self.watchers.values():
                for told in watchers:
                    told.put("changed")

    def _lifecycle(self, conn: Any, domain: Any, event: int, detail: int, opaque: object) -> None:
        id, lib = domain.UUIDString(), self.lib
        if not (self.instances / id).is_dir():
            return
        power: Power | None = None
        if event in (lib.VIR_DOMAIN_EVENT_STARTED, lib.VIR_DOMAIN_EVENT_RESUMED):
            power = "running"
        elif event == lib.VIR_DOMAIN_EVENT_SUSPENDED:
            power = "paused"
        elif event == lib.VIR_DOMAIN_EVENT_PMSUSPENDED:
            power = "suspended"
        elif event == lib.VIR_DOMAIN_EVENT_CRASHED:
            power = "crashed"
        elif event == lib.VIR_DOMAIN_EVENT_STOPPED:
            failed = (lib.VIR_DOMAIN_EVENT_STOPPED_CRASHED, lib.VIR_DOMAIN_EVENT_STOPPED_FAILED)
            saved = detail == lib.VIR_DOMAIN_EVENT_STOPPED_SAVED
            power = "suspended" if saved else "crashed" if detail in failed else "shutdown"
            self._notify(id, "stopped")
        if power:
            self._saw(id, power)

    def _reset(self, conn: Any, domain: Any, opaque: object) -> None:
        self._notify(domain.UUIDString(), "rebooted")

    def _removed(self, conn: Any, domain: Any, device: str, opaque: object) -> None:
        self._notify(domain.UUIDString(), "unplugged")

    def _saw(self, id: str, power: Power) -> None:
        before = self.known.get(id)
        self.known[id] = power
        if before not in (None, power):
            self.news.put((id, power))

    def _notify(self, id: str, told: Told) -> None:
        with self.lock:
            for watcher in self.watchers.get(id, ()):
                watcher.put(told)

    @contextlib.contextmanager
    def _watch(self, id: str) -> Iterator["queue.SimpleQueue[Told]"]:
        """What is told of a machine from now on."""
        told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        with self.lock:
            self.watchers.setdefault(id, []).append(told)
        try:
            yield told
        finally:
            with self.lock:
                self.watchers[id].remove(told)
                if not self.watchers[id]:
                    del self.watchers[id]

    def _hear(self, told: "queue.SimpleQueue[Told]", what: Told, timeout_s: float) -> bool:
        """Waits until it is told. False when it was not, or when something may have been missed meanwhile."""
        end = self.clock.now() + timeout_s
        while (left := end - self.clock.now()) > 0:
            try:
                heard = told.get(timeout=left)
            except queue.Empty:
                return False
            if heard in (what, "changed"):
                return heard == what
        return False

    def _tell(self) -> None:
        """A thread of its own: who listens may call us, and may take his time."""
        while news := self.news.get():
            for listener in self.listeners:
                try:
                    listener(*news)
                except Exception:
                    logger.exception("somebody who was told of %s stumbled", news[0])

    def _trim(self) -> None:
        while not self.closing.wait(TRIM_EVERY_S):
            self.trim_console_logs()

    def trim_console_logs(self) -> None:
        """Keeps each at most a quarter longer than the option says."""
        for path in self.instances.glob("[!.]*/console.log"):
            with contextlib.suppress(FileNotFoundError):
                console_log.trim(path, self.compute.console_log_max_bytes)


class _Own:
    """A server's lock; it goes when nobody holds or wants it."""

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.lock = threading.RLock()


# What libvirt says, and what a user is told of it.
REASONS = {
    "Cannot allocate memory": "There is not enough memory on this host for the server.",
    "cannot set up guest memory": "There is not enough memory on this host for the server.",
    "No space left on device": "There is not enough disk space on this host.",
    "already exists with uuid": "This host already has a machine of this name.",
    "Cannot get interface MTU": "A network of the server is missing on this host.",
    "Unable to add bridge": "A network of the server is missing on this host.",
    "No such device": "A network of the server is missing on this host.",
    "host forwarding rule": "The port of this machine that leads to the server is taken by another program.",
    "find any firmware": "This host has no firmware of the kind the server asks for.",
    "does not support": "The hypervisor of this host does not support what the server asks for.",
    "unsupported configuration": "The hypervisor of this host does not support what the server asks for.",
}


def _devices_of(machine: Machine) -> tuple[list[str], list[str]]:
    return [nic.port_id for nic in machine.nics], volumes_of(machine)


def _disk_of(machine: Machine | None, volume_id: str) -> Disk | None:
    found = (d for d in machine.disks if isinstance(d.source, VolumeSource)) if machine else ()
    return next((d for d in found if d.source.volume_id == volume_id), None)  # type: ignore[union-attr]


def _is_link(name: str) -> bool:
    """In our network namespace; /sys may be another's."""
    try:
        return socket.if_nametoindex(name) > 0
    except OSError:
        return False


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise Refused("A network of the server is missing on this host.", why=done.stderr.strip())
