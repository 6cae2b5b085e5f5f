"""The block devices of a server, one a device: what was said of its disks beside flavor and image."""

from typing import Literal

import msgspec

from kilonova.model.machine import Bus

Role = Literal["root", "ephemeral", "swap", "other"]
ROLES: tuple[Role, ...] = ("root", "ephemeral", "swap", "other")  # in the order in which a guest sees them


class Device(msgspec.Struct, frozen=True):
    """A volume, or a local disk that somebody described. A disk that flavor or image already tell of is none of these.

    `name` is the API's ("/dev/vdb"), and stays while the device does.  `size` in GiB, of a swap disk in MiB.
    How to connect is not here: the volume service knows it for each `attachment_id`, and the host that has it.
    """

    uuid: str
    name: str | None = None
    source: Literal["blank", "image", "snapshot", "volume"] = "volume"
    destination: Literal["local", "volume"] = "volume"
    boot_index: int | None = None  # 0: it boots from this one; negative or None: never
    volume_id: str | None = None  # None: it is yet to be made
    attachment_id: str | None = None
    snapshot_id: str | None = None
    image_id: str | None = None
    size: int | None = None
    volume_type: str | None = None
    format: str | None = None  # of a blank disk: a file system, swap
    bus: Bus | None = None
    kind: Literal["disk", "cdrom"] = "disk"
    tag: str | None = None
    delete_on_termination: bool = False
    multiattach: bool = False
    busy: Literal["", "attaching", "detaching", "swapping"] = ""

    @property
    def role(self) -> Role:
        if self.boot_index == 0:
            return "root"
        if self.destination == "local" and self.source == "blank":
            return "swap" if self.format == "swap" else "ephemeral"
        return "other"

    @property
    def is_volume(self) -> bool:
        return self.destination == "volume"
