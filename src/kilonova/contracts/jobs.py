"""What the API hands to a run: the whole intent, so that no conductor has to ask back. May only grow.

The names of the workflows are part of the contract: `start(tx, "build", Build(...))`.
"""

from typing import Literal

import msgspec

from kilonova.kit.bus import Contract
from kilonova.model.devices import Device
from kilonova.model.flavor import Flavor
from kilonova.model.machine import Disk, ImageSource
from kilonova.model.server import Image, Server, Wanted
from kilonova.model.shares import Sharing

jobs = Contract("jobs")


@jobs
class Build(msgspec.Struct, frozen=True):
    """ "build": choose a host, claim, make ports, spawn; "build_bare" the same where it has neither ports nor volumes.

    `server` as it was written, still building.  `networks`: "auto" and "none" as the API has them, "" for what a caller
    left to us (one network that he can see, else a conflict was answered), or what he listed.  `security_groups` are ids.
    """

    server: Server
    networks: list[Wanted] | Literal["auto", "none", ""] = ""
    security_groups: list[str] = []
    admin_password: str = ""
    host: str | None = None  # forced (az:host) or requested (2.74)
    node: str | None = None
    forced: bool = False  # no rule is asked
    files: list[tuple[str, str]] = []

    @property
    def flow(self) -> str:
        """The workflow that it is a job for."""
        return "build_bare" if self.networks == "none" and not self.server.has_volumes else "build"


@jobs
class Act(msgspec.Struct, frozen=True):
    """ "act": one of the simple verbs of `model/states.py`, already begun (the server is busy with it)."""

    server: Server
    verb: str
    was: str = ""  # vm_state before


@jobs
class AttachInterface(msgspec.Struct, frozen=True):
    """ "attach_interface": a port is made or bound, and plugged in where the server is by then."""

    server: Server
    wanted: Wanted


@jobs
class DetachInterface(msgspec.Struct, frozen=True):
    """ "detach_interface": the NIC of this port is unplugged, and the port deleted or let go of."""

    server: Server
    port_id: str


@jobs
class AttachVolume(msgspec.Struct, frozen=True):
    """ "attach_volume": the volume is reserved, and the device written; it is connected and plugged in."""

    server: Server
    device: Device


@jobs
class DetachVolume(msgspec.Struct, frozen=True):
    """ "detach_volume": the guest lets go of it, then we do."""

    server: Server
    device: Device


@jobs
class ExtendVolume(msgspec.Struct, frozen=True):
    """ "extend_volume": the volume service says that it is larger now; its guest is to see it."""

    server: Server
    device: Device


@jobs
class SwapVolume(msgspec.Struct, frozen=True):
    """ "swap_volume": another volume takes the device's place. `migrating`: the volume service waits to hear of it."""

    server: Server
    device: Device
    new_volume_id: str
    size_gb: int
    migrating: bool = True


@jobs
class AttachShare(msgspec.Struct, frozen=True):
    """ "attach_share": the share is written; its host is let in, and its machine has it."""

    server: Server
    share: Sharing


@jobs
class DetachShare(msgspec.Struct, frozen=True):
    """ "detach_share": the way back. `was`: what it was before."""

    server: Server
    share: Sharing
    was: str = ""


@jobs
class SnapshotVolume(msgspec.Struct, frozen=True):
    """ "snapshot_volume": the volume service asks that the server's host goes on in `new_file`."""

    server: Server
    volume_id: str
    snapshot_id: str
    new_file: str


@jobs
class MergeVolume(msgspec.Struct, frozen=True):
    """ "merge_volume": the volume service asks for two files to become one, as `contracts.compute.MergeVolume` has it."""

    server: Server
    volume_id: str
    snapshot_id: str
    file: str | None = None
    into: str | None = None


@jobs
class Precache(msgspec.Struct, frozen=True):
    """ "precache": a host is to have these images before a server needs them there.

    It is one of `of` hosts of an aggregate (its UUID) that were asked at once: their runs have one subject.
    """

    host: str
    images: list[ImageSource]
    aggregate: str = ""
    of: int = 0


@jobs
class Readdress(msgspec.Struct, frozen=True):
    """ "readdress": what the API shows of the server's ports is asked anew of the network service."""

    server: str


@jobs
class Delete(msgspec.Struct, frozen=True):
    """ "delete": waits until other runs have ended, then takes everything back."""

    server: Server


@jobs
class Resize(msgspec.Struct, frozen=True):
    """ "resize": to another host, with another flavor or (a cold migration) with the same.

    `server` as it was taken, with its old flavor; `was` its vm_state; `migration` the id of the record that was written
    with it.  `host`: there or nowhere.  `same_host`: where it is now is a choice like another.
    """

    server: Server
    was: str
    migration: str
    flavor: Flavor
    host: str | None = None
    same_host: bool = False


@jobs
class Settle(msgspec.Struct, frozen=True):
    """ "confirm" and "revert": what a resize left for its user to decide."""

    server: Server
    migration: str


@jobs
class LiveMigrate(msgspec.Struct, frozen=True):
    """ "live_migrate": to another host while it runs. `forced`: no rule is asked. `block`: its disks travel too; None: if they must.

    `most`: that may leave its host at the same time; 0: no limit.
    """

    server: Server
    migration: str
    host: str | None = None
    forced: bool = False
    block: bool | None = None
    most: int = 0


@jobs
class Evacuate(msgspec.Struct, frozen=True):
    """ "evacuate": its host is down; it is made anew on another. `stopped`: and does not run there."""

    server: Server
    was: str
    migration: str
    host: str | None = None
    forced: bool = False
    stopped: bool = False
    admin_password: str = ""


@jobs
class Capture(msgspec.Struct, frozen=True):
    """ "capture": an image of a server's disk; the image is there already, without bytes. `rotation`: of a backup, how
    many of its type are kept."""

    server: Server
    image_id: str
    disk_format: Literal["raw", "qcow2"]
    backup_type: str | None = None
    rotation: int = 0


@jobs
class CaptureVolumes(msgspec.Struct, frozen=True):
    """ "capture_volumes": an image of a server whose root disk is a volume. Image and snapshots are there already, the
    snapshots perhaps not yet whole; `mapping` is what the image is to say of them (JSON)."""

    server: Server
    image_id: str
    snapshots: list[str]
    mapping: str


@jobs
class Rebuild(msgspec.Struct, frozen=True):
    """ "rebuild": `server` as it shall be, already taken. `before` is the image that it was made of, where that is another.

    `image_id` is what was asked for; with `reimage` its root volume is written anew with it.
    """

    server: Server
    image_id: str
    before: Image | None = None
    admin_password: str = ""
    files: list[tuple[str, str]] = []
    reimage: bool = False


@jobs
class Rescue(msgspec.Struct, frozen=True):
    """ "rescue": let it run another system from this disk (`model.rescue`)."""

    server: Server
    disk: Disk
    stable: bool = False
    admin_password: str = ""


@jobs
class Unrescue(msgspec.Struct, frozen=True):
    """ "unrescue": its own system again."""

    server: Server


@jobs
class Password(msgspec.Struct, frozen=True):
    """ "change_password": of its administrator."""

    server: Server
    password: str

    def __repr__(self) -> str:
        return f"Password({self.server.id})"


@jobs
class CrashDump(msgspec.Struct, frozen=True):
    """ "crash_dump": the server is not taken for it."""

    server: Server


@jobs
class Shelve(msgspec.Struct, frozen=True):
    """ "shelve": `image_id` is there already, without bytes; None: its root disk is a volume. `offload`: at once."""

    server: Server
    image_id: str | None
    disk_format: Literal["raw", "qcow2"]
    offload: bool


@jobs
class Offload(msgspec.Struct, frozen=True):
    """ "offload": a shelved server leaves its host."""

    server: Server


@jobs
class Unshelve(msgspec.Struct, frozen=True):
    """ "unshelve": `server` with the zone where it shall be; `host`: there or nowhere."""

    server: Server
    host: str | None = None


@jobs
class SoftDelete(msgspec.Struct, frozen=True):
    """ "soft_delete": turned off, and deleted later if nobody restores it."""

    server: Server


@jobs
class Restore(msgspec.Struct, frozen=True):
    """ "restore": what was soft-deleted runs again."""

    server: Server


@jobs
class Examine(msgspec.Struct, frozen=True):
    """ "examine": what is written is held against itself and against what neighbours say; `mend`: and put right."""

    mend: bool = False


@jobs
class ExamineHost(msgspec.Struct, frozen=True):
    """ "examine_host": what is written is held against what the host holds. `since`: when the examination began."""

    host: str
    since: float
    mend: bool = False
