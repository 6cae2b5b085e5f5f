"""What a hypervisor must be able to do, and what it may. Traits follow from the protocols a driver has.

Every act is safe to do twice: a host may be asked again after it died half-way.  Refusals are `Trouble`s:
`Refused` when this host cannot do it, `Unavailable` when it may be asked again (libvirtd is away),
`NotFound` when there is no such machine.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from kilonova.contracts.compute import Landing, Luggage, Stats
from kilonova.model.console import Kind, Where
from kilonova.model.host import HostFacts as HostFacts
from kilonova.model.machine import Disk, ImageSource, Machine, Nic, Share

Power = Literal["nostate", "running", "paused", "shutdown", "crashed", "suspended"]
POWER_NUMBERS: dict[str, int] = {"nostate": 0, "running": 1, "paused": 3, "shutdown": 4, "crashed": 6, "suspended": 7}


class Held(msgspec.Struct, frozen=True):
    """A machine that this host has, whoever made it."""

    id: str
    power: Power
    epoch: int = 0
    captures: list[str] = []  # what was copied of it for images, and is still here
    ports: list[str] | None = None  # of its NICs, as its Machine has them; None: not known
    volumes: list[str] | None = None  # the same of its disks
    shares: list[str] | None = None  # the same of its shared file systems


Progress = Callable[[str], None]
Telling = Callable[[dict[str, int]], None]  # how far a sending is: `contracts.conductor.Sending`, by its fields


@runtime_checkable
class Driver(Protocol):
    """What every hypervisor can do. Machines are named by their server's UUID."""

    def host(self) -> HostFacts: ...

    def machines(self) -> list[Held]:
        """All that this host holds, also leftovers on its disk: what an act may leave behind must be in here."""
        ...

    def power(self, id: str) -> Power:
        """Raises NotFound where there is no such machine."""
        ...

    def spawn(self, machine: Machine, progress: Progress) -> None:
        """Make disks, define and start it. Doing it again where it runs already changes nothing."""
        ...

    def destroy(self, id: str) -> None:
        """End it and remove all it had here. Nothing there: nothing to do."""
        ...

    def start(self, id: str) -> None: ...

    def stop(self, id: str, timeout_s: float, retry_s: float = 10) -> None:
        """Ask the guest, again every `retry_s`; after `timeout_s` (0: at once) turn it off."""
        ...

    def reboot(self, id: str, hard: bool, timeout_s: float) -> None:
        """Soft: with the guest's help, and hard when it does not help in time. Hard: made anew from its Machine."""
        ...

    def pause(self, id: str) -> None: ...

    def unpause(self, id: str) -> None: ...

    def suspend(self, id: str) -> None:
        """Memory to disk; takes no memory of the host afterwards."""
        ...

    def resume(self, id: str) -> None: ...

    def console_log(self, id: str) -> bytes:
        """The end of what the guest wrote on its serial console, bounded by the host's option."""
        ...

    def listen(self, changed: Callable[[str, Power], None]) -> None:
        """From now on say when a machine's power changed, asked or not. Called from the driver's own thread."""
        ...

    def close(self) -> None:
        """Let go of the hypervisor; machines go on."""
        ...


@runtime_checkable
class Resizes(Protocol):
    """Cold moves: a machine is turned off and kept, and another is made of its disks, here or elsewhere.

    Of one server a host may have two machines then: the newer is the one that is meant everywhere else, the older is
    kept beside it and off.  `Driver.machines` names both, the newer last; `Driver.destroy` removes both.
    """

    def prepare(self, machine: Machine) -> None:
        """Could it be here? Leaves nothing. Raises Refused, Unsupported."""
        ...

    def depart(self, id: str, epoch: int, timeout_s: float) -> Luggage:
        """Turn the newest one off, with the guest's help if it has time, and keep it as of `epoch`."""
        ...

    def arrive(self, machine: Machine, luggage: Luggage, start: bool, progress: Progress) -> None:
        """Make it of what the other has left; another that is here is kept beside it."""
        ...

    def come_back(self, machine: Machine, was: int, start: bool) -> None:
        """The one of epoch `was` (or of the machine's own: done before) is this machine from now on."""
        ...

    def stay(self, id: str, power: Power) -> None:
        """As if nobody had ever wanted it to go: the newest one is as it was."""
        ...

    def drop(self, id: str, epoch: int) -> None:
        """Remove the one of this epoch with all it had. Nothing there: nothing to do."""
        ...


@runtime_checkable
class Precaches(Protocol):
    """Images can be here before a machine needs them."""

    def precache(self, image: ImageSource) -> None:
        """Raises Refused where it is of no use here."""
        ...


@runtime_checkable
class Consoles(Protocol):
    """Somebody may look at its machines' screens, or sit down at their serial lines."""

    def console(self, id: str, kind: Kind) -> Where:
        """Raises NotFound where the machine is not running, Unsupported where it has no such console."""
        ...


@runtime_checkable
class Migrates(Protocol):
    """Guests that move while they run."""

    def prepare_landing(self, machine: Machine) -> Landing: ...

    def send(self, id: str, landing: Landing, epoch: int, block: bool | None, tell: Telling) -> None:
        """Comes back when the guest runs there and not here. Raises Aborted when it was told to stop, in time."""
        ...

    def hurry(self, id: str) -> None: ...

    def stop_sending(self, id: str) -> None:
        """End a `send` that is under way, if it can still be ended."""
        ...

    def close_landing(self, id: str, epoch: int) -> bool:
        """True: the guest of this epoch has come, and is here. Else nothing of it is left here, and it cannot come."""
        ...

    def land(self, machine: Machine) -> None: ...


@runtime_checkable
class Hotplugs(Protocol):
    """Devices come and go, whether the machine runs or not; from then on its `Machine` is another."""

    def attach_nic(self, id: str, nic: Nic) -> None:
        """Raises NotFound where there is no such machine. There already: nothing to do."""
        ...

    def detach_nic(self, id: str, port_id: str, timeout_s: float, anyway: bool = False) -> None:
        """Raises Refused, with nothing changed, where the guest does not let go of it in time.

        `anyway`: what the guest holds on to is gone with its next start, and the rest of it now.
        No such machine, or no such NIC: nothing to do.
        """
        ...

    def attach_volume(self, id: str, disk: Disk) -> None:
        """Raises NotFound where there is no such machine, Refused where it cannot have it. There already: nothing to do."""
        ...

    def detach_volume(self, id: str, volume_id: str, timeout_s: float, anyway: bool = False) -> None:
        """As `detach_nic`; and the host lets go of the volume."""
        ...

    def extend_volume(self, id: str, volume_id: str, size_bytes: int) -> None:
        """The volume is so large by now, and the guest sees it. No such volume: nothing to do."""
        ...

    def swap_volume(self, id: str, volume_id: str, disk: Disk) -> None:
        """Copy what is on it to the new one, under the guest's hands, and go on there. Done already: nothing to do.

        Raises Refused, with nothing changed.
        """
        ...


@runtime_checkable
class Fetches(Protocol):
    """Where a driver gets an image's bytes: `compute/` hands it over, so that virt knows no service."""

    def fetch(self, image_id: str, write: Callable[[bytes], object]) -> None: ...


@runtime_checkable
class Sends(Protocol):
    """Where a host brings the bytes of an image that it made."""

    def send(self, image_id: str, chunks: Iterable[bytes]) -> None: ...


@runtime_checkable
class Captures(Protocol):
    """Copies root disks, for images. A copy is named by its image, and goes with its machine."""

    def capture(self, id: str, image_id: str, disk_format: str, progress: Progress) -> None:
        """The root disk as it is now, whole (nothing behind it), in this format. One that is there already is kept."""
        ...

    def captured(self, id: str, image_id: str) -> Iterator[bytes]:
        """The copy's bytes. Raises NotFound."""
        ...

    def drop_capture(self, id: str, image_id: str) -> None:
        """Nothing there: nothing to do."""
        ...


@runtime_checkable
class Branches(Protocol):
    """Volumes that are files which lie one behind the other, and are written to by nobody else."""

    def branch_volume(self, id: str, volume_id: str, new_file: str) -> None:
        """The guest goes on in a new file beside the one in use. It is there already: nothing to do.

        Raises NotFound, Refused where the volume is no file, or there is one of this name behind.
        """
        ...

    def merge_volume(self, id: str, volume_id: str, file: str | None, into: str | None) -> None:
        """`file` into `into` behind it; or (`into` None) what is behind the file in use, down to `file`, into that.

        `file` is not there: done already.  Raises NotFound, Refused where `into` is not behind it.
        """
        ...


@runtime_checkable
class Mounts(Protocol):
    """Shared file systems: mounted on the host before the machine starts, let go of when it ends; the guest has them by tag."""

    def attach_share(self, id: str, share: Share) -> None:
        """From its next start on. Raises NotFound; Refused where the machine runs, or the host cannot mount it.

        There already: nothing to do.
        """
        ...

    def detach_share(self, id: str, share_id: str, anyway: bool = False) -> None:
        """Raises Refused where the machine runs; `anyway`: then it is let go of when that ends. Not there: nothing to do."""
        ...


@runtime_checkable
class Rebuilds(Protocol):
    """Machines that are made anew in their place."""

    def rebuild(self, machine: Machine, progress: Progress) -> None:
        """As `destroy` and `spawn`; but its volumes stay, and how to reach them is what it was."""
        ...


@runtime_checkable
class Rescues(Protocol):
    """Machines that run another system for a while (`model.rescue`)."""

    def rescue(self, id: str, disk: Disk, stable: bool, admin_password: str, progress: Progress) -> None: ...

    def unrescue(self, id: str) -> None:
        """Its own system runs again. It is not rescued: nothing to do but to let it run."""
        ...


@runtime_checkable
class Attends(Protocol):
    """What else can be done to a guest, and asked about it."""

    def set_password(self, id: str, password: str) -> None:
        """Raises Unsupported where the guest has nobody to do it."""
        ...

    def crash_dump(self, id: str) -> None: ...

    def stats(self, id: str) -> Stats: ...


def can(driver: Any, kind: type[Any]) -> bool:
    """Has this driver what a capability protocol names? (A driver may stand behind another object.)"""
    return all(hasattr(driver, name) for name in vars(kind) if not name.startswith("_"))
