"""What a compute host may be asked, and what it says unasked. Fields may be added with a default; nothing else
may change.  A verb that older hosts do not know is a new message: ask `host.speaks(Message)`.
"""

from typing import Literal

import msgspec

from kilonova.contracts.conductor import HeldHere
from kilonova.kit.bus import Call, Contract
from kilonova.model.console import Kind, Where
from kilonova.model.machine import Disk, ImageSource, Machine, Nic, Share

compute = Contract("compute")


class Done(msgspec.Struct, frozen=True):
    """It is so; with the power state as the hypervisor sees it afterwards (numbers of the Compute API)."""

    power_state: int = 0


@compute
class Spawn(Call[Done], frozen=True):
    """Make this machine and let it run. Carries all that is needed; nobody asks back."""

    machine: Machine


@compute
class Destroy(Call[Done], frozen=True):
    """Remove it with all it had on this host. Nothing there: done.

    `epoch`: only what is not newer than this; a machine that has come back since is none of the sender's business.
    """

    server: str
    epoch: int | None = None


@compute
class Power(Call[Done], frozen=True):
    """One of the simple verbs. `timeout_s`: how long a guest may take to help; 0: at once, below: as the host has it."""

    server: str
    to: Literal["start", "stop", "reboot", "hard_reboot", "pause", "unpause", "suspend", "resume"]
    timeout_s: float = -1
    machine: Machine | None = None  # for start and hard reboot: what it should be, made anew


@compute
class Freeze(Call[Done], frozen=True):
    """Copy its root disk as it is now, to be uploaded as this image; the copy stays here until it is uploaded or discarded."""

    server: str
    image_id: str
    disk_format: Literal["raw", "qcow2"] = "qcow2"


@compute
class Upload(Call[Done], frozen=True):
    """Give the image service the bytes that were frozen for this image, and forget them."""

    server: str
    image_id: str


@compute
class Discard(Call[Done], frozen=True):
    """What was frozen for this image is not wanted. Nothing there: done."""

    server: str
    image_id: str


@compute
class Rebuild(Call[Done], frozen=True):
    """Make it anew in its place: disks of the host from nothing, its volumes stay. How to reach those the host knows."""

    machine: Machine


@compute
class Rescue(Call[Done], frozen=True):
    """Let it run another system, from this disk, to mend its own; `stable`: all else stays where it is."""

    server: str
    disk: Disk
    stable: bool = False
    admin_password: str = ""

    def __repr__(self) -> str:
        return f"Rescue({self.server})"


@compute
class Unrescue(Call[Done], frozen=True):
    """Let it run its own system again, and remove the other."""

    server: str


@compute
class SetPassword(Call[Done], frozen=True):
    """Let the guest change its administrator's password."""

    server: str
    password: str

    def __repr__(self) -> str:
        return f"SetPassword({self.server})"


@compute
class CrashDump(Call[Done], frozen=True):
    """Send it an interrupt that cannot be masked: a kernel that was told to do so writes down its memory then."""

    server: str


class CpuStats(msgspec.Struct, frozen=True):
    """`time` in nanoseconds since it was started."""

    id: int
    time: int | None = None
    utilisation: int | None = None  # percent


class DiskStats(msgspec.Struct, frozen=True):
    device: str  # vda
    read_bytes: int | None = None
    read_requests: int | None = None
    write_bytes: int | None = None
    write_requests: int | None = None
    errors_count: int | None = None


class NicStats(msgspec.Struct, frozen=True):
    device: str  # the tap's name
    mac_address: str
    rx_octets: int | None = None
    rx_errors: int | None = None
    rx_drop: int | None = None
    rx_packets: int | None = None
    rx_rate: int | None = None
    tx_octets: int | None = None
    tx_errors: int | None = None
    tx_drop: int | None = None
    tx_packets: int | None = None
    tx_rate: int | None = None


class Stats(msgspec.Struct, frozen=True):
    """What a hypervisor can tell of a machine. Memory in MiB, `uptime` in seconds."""

    state: str
    hypervisor: str
    hypervisor_os: str = "linux"
    uptime: int | None = None
    memory_maximum: int | None = None
    memory_used: int | None = None
    config_drive: bool = False
    cpus: list[CpuStats] = []
    disks: list[DiskStats] = []
    nics: list[NicStats] = []


@compute
class Diagnose(Call[Stats], frozen=True):
    """A question: how is it doing?"""

    server: str


@compute
class Abandon(Call[Done], frozen=True):
    """What is being done for this server is no longer wanted: end it soon. Told beside the act, not behind it."""

    server: str


@compute
class AttachNic(Call[Done], frozen=True):
    """One NIC more, whose port is bound to this host already: now, if the machine runs, and from now on."""

    server: str
    nic: Nic


@compute
class DetachNic(Call[Done], frozen=True):
    """The NIC of this port goes. Not there: done. `timeout_s`: how long the guest may take; below 0: as the host has it.

    `anyway`: it is no part of the machine any longer, whatever the guest does; what it holds on to goes with its next start.
    """

    server: str
    port_id: str
    timeout_s: float = -1
    anyway: bool = False


@compute
class AttachVolume(Call[Done], frozen=True):
    """One disk more, a volume that this host is connected to: now, if the machine runs, and from now on."""

    server: str
    disk: Disk


@compute
class DetachVolume(Call[Done], frozen=True):
    """The disk of this volume goes. Not there: done. `timeout_s` and `anyway` as with `DetachNic`."""

    server: str
    volume_id: str
    timeout_s: float = -1
    anyway: bool = False


@compute
class SwapVolume(Call[Done], frozen=True):
    """`disk`, another volume, takes the place of the volume: with its bytes, and while the guest goes on."""

    server: str
    volume_id: str
    disk: Disk


@compute
class ExtendVolume(Call[Done], frozen=True):
    """The volume is so large now: its guest is to see it. Not there: done."""

    server: str
    volume_id: str
    size_bytes: int


@compute
class AttachShare(Call[Done], frozen=True):
    """One shared file system more, that this host may reach: mounted while the machine runs. It must not run now.

    `anyway`: it is had again, for its detach came to nothing; where that cannot be, it is found by comparing.
    """

    server: str
    share: Share
    anyway: bool = False


@compute
class DetachShare(Call[Done], frozen=True):
    """It goes. Not there: done. Refused while the machine runs, unless `anyway`: then it goes when that ends."""

    server: str
    share_id: str
    anyway: bool = False


@compute
class SnapshotVolume(Call[Done], frozen=True):
    """From now on what the guest writes goes to a new file beside the one in use, which stays as it is behind it."""

    server: str
    volume_id: str
    new_file: str


@compute
class MergeVolume(Call[Done], frozen=True):
    """`file` goes into `into`, the one behind it; `into` None: all that is behind the file in use, down to `file` (which
    stays; None: all), comes into the file in use."""

    server: str
    volume_id: str
    file: str | None = None
    into: str | None = None


class Seen(msgspec.Struct, frozen=True):
    """What a host has of a server, just now. `kept`: the epoch of an older machine beside it."""

    there: bool
    power_state: int = 0
    epoch: int = 0
    kept: int | None = None
    captures: list[str] = []  # images that were frozen and neither uploaded nor discarded
    ports: list[str] | None = None  # of its NICs; None: not known
    volumes: list[str] | None = None  # the same of its disks
    shares: list[str] | None = None  # the same of its shared file systems


@compute
class Look(Call[Seen], frozen=True):
    """Is it there, and how is it? Answered behind whatever is being done to it."""

    server: str


class Holdings(msgspec.Struct, frozen=True):
    """All that is on the host, with what is plugged into it. `busy`: what a handler is at work on just then."""

    holds: list[HeldHere]
    busy: list[str] = []


@compute
class TellHoldings(Call[Holdings], frozen=True):
    """What it holds, for who examines the cloud. About no server; it waits for nobody."""


class Text(msgspec.Struct, frozen=True):
    """Bytes a guest wrote, decoded with replacement characters."""

    text: str


@compute
class Precache(Call[Done], frozen=True):
    """Have this image here, so that a server need not wait for it. About no server."""

    image: ImageSource


@compute
class FindConsole(Call[Where], frozen=True):
    """A question: where is its screen, or its serial line? NotFound where it is not running, Unsupported where it has none."""

    server: str
    kind: Kind


@compute
class ConsoleLog(Call[Text], frozen=True):
    """A question, not an act: answered to who asks, never journaled."""

    server: str
    lines: int | None = None


# ---- who it is (told, not asked)


@compute
class Met(msgspec.Struct, frozen=True):
    """An answer to `Greeting`, or what is said to who is another. `why` it gets no commands; "": it is known."""

    life: str
    why: str = ""


@compute
class Echo(msgspec.Struct, frozen=True):
    """A process writes it to itself: who hears it is the only one with that address."""

    life: str


# ---- moves


class Luggage(msgspec.Struct, frozen=True):
    """How a machine's disks reach another host: where to fetch them, in the driver's own words."""

    uri: str = ""
    more: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Luggage({self.uri!r})"  # a key may be among it


@compute
class Prepare(Call[Done], frozen=True):
    """Could this machine be moved here? Nothing is left of the question. Raises Refused, Unsupported."""

    machine: Machine


@compute
class Depart(Call[Luggage], frozen=True):
    """Turn it off and keep it, as of `epoch`: it may come back, or be dropped. Others may fetch its disks meanwhile.

    `timeout_s`: as of Power.
    """

    server: str
    epoch: int
    timeout_s: float = -1


@compute
class Arrive(Call[Done], frozen=True):
    """Make this machine of what another of the same server has left, here or elsewhere.

    `beside`: the epoch of one that is kept on this very host, and stays.
    """

    machine: Machine
    luggage: Luggage
    start: bool = True
    beside: int | None = None


@compute
class Return(Call[Done], frozen=True):
    """What was kept as of epoch `was` is this machine again; one that is here too is kept in its turn."""

    machine: Machine
    was: int
    start: bool = True


@compute
class Drop(Call[Done], frozen=True):
    """Remove the machine of just this epoch, whether it is kept or not. What is beside it stays."""

    server: str
    epoch: int


class Landing(msgspec.Struct, frozen=True):
    """Where a running guest can be sent to, in the driver's own words."""

    uri: str = ""
    more: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Landing({self.uri!r})"


@compute
class PrepareLanding(Call[Landing], frozen=True):
    """Make all that this guest needs here, and wait for it."""

    machine: Machine


@compute
class SendAway(Call[Done], frozen=True):
    """Send the running guest there. Done: it runs there and not here. Aborted: it was told not to, in time.

    `block`: its disks too; None: those that must.
    """

    server: str
    landing: Landing
    epoch: int  # of the machine it becomes
    block: bool | None = None


@compute
class Hurry(Call[Done], frozen=True):
    """The guest that is being sent away shall be there soon, though it has to stand still for it. Told beside the act."""

    server: str


@compute
class Stay(Call[Done], frozen=True):
    """It does not go after all: what that has changed here is as it was. Nothing there, or it does not start again: done."""

    server: str
    power_state: int = 1


class Landed(msgspec.Struct, frozen=True):
    """Whether the guest has come."""

    there: bool
    power_state: int = 0


@compute
class CloseLanding(Call[Landed], frozen=True):
    """No guest may come any more, and what waited for it is removed; unless it has come. The target decides."""

    server: str
    epoch: int


@compute
class Land(Call[Done], frozen=True):
    """It has come: this is its machine from now on, also after a restart."""

    machine: Machine
