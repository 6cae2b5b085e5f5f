"""The block devices of a new server: what callers may say of them, and what is meant (Compute API, servers, create).

Judged in three steps: the words alone, then what they name (volumes, snapshots, images), then all against the flavor.
A device here has no uuid yet: of several servers that are made at once each gets its own.
"""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kilonova.api.bodies import Boolish, Digits, Tag, Uuid, dashed, truth
from kilonova.clients import ImageInfo, VolumeInfo
from kilonova.kit.errors import Forbidden, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.kit.versions import only, since
from kilonova.model.devices import Device
from kilonova.model.disks import BUSES, GIB, letters_of
from kilonova.model.flavor import Flavor
from kilonova.model.machine import Bus
from kilonova.model.server import Image

UUID = re.compile(r"(?i)[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}")
BAD = "Block Device Mapping is Invalid"
SEQUENCE = f"{BAD}: Boot sequence for the instance and image/block device mapping combination is not valid."
OLD_MULTIATTACH = "Volume multiattach is only supported starting with compute API version 2.60."

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)] | Digits
Word = Annotated[str, Meta(max_length=255)]


class OldDeviceWish(msgspec.Struct, forbid_unknown_fields=True):
    """block_device_mapping: volumes and snapshots, found by their names."""

    virtual_name: Word | None = None
    volume_id: Uuid | None = None
    snapshot_id: Uuid | None = None
    volume_size: Size | None = None
    device_name: str | None = None
    delete_on_termination: Boolish = False
    no_device: Any = None
    connection_info: str | None = None


class DeviceWish(msgspec.Struct, forbid_unknown_fields=True):
    """block_device_mapping_v2."""

    virtual_name: Word | None = None
    volume_id: Uuid | None = None
    snapshot_id: Uuid | None = None
    volume_size: Size | None = None
    device_name: Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9._/-]*$")] | None = None
    delete_on_termination: Boolish = False
    no_device: Any = None
    connection_info: str | None = None
    source_type: Literal["blank", "image", "snapshot", "volume"] | None = None
    uuid: Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9._-]*$")] | None = None
    image_id: Uuid | None = None
    destination_type: Literal["local", "volume"] | None = None
    guest_format: Word | None = None
    device_type: Word | None = None
    disk_bus: Word | None = None
    boot_index: int | Annotated[str, Meta(pattern=r"^-?[0-9]+$", max_length=12)] | None = None
    tag: Annotated[Tag | None, only("2.32", "2.42-")] = None
    volume_type: Annotated[Word | None, since("2.67")] = None


# ---- the words alone


def asked(new: list[DeviceWish] | None, old: list[OldDeviceWish] | None, image_ref: str | None) -> list[Device]:
    """What the caller described. Raises Invalid."""
    if new and old:
        raise Invalid("Using different block_device_mapping syntaxes is not allowed in the same request.")
    if old:
        return _asked_of_old([d for d in old if not truth(d.no_device)], image_ref)
    return [_asked(d, image_ref) for d in new or [] if not truth(d.no_device)]


def _asked(d: DeviceWish, image_ref: str | None) -> Device:
    source = d.source_type
    if source is None:
        raise _bad("Missing source_type.")
    named = {"volume": d.volume_id, "snapshot": d.snapshot_id, "image": d.image_id, "blank": None}[source]
    id = d.uuid or named
    if source == "blank" and id:
        raise _bad("Invalid device UUID.")
    if source != "blank" and not id:
        raise _bad("Missing device UUID.")
    destination = d.destination_type or ("volume" if source in ("volume", "snapshot") else "local")
    boot_index = None if d.boot_index is None else int(d.boot_index)
    if destination == "local":
        _check_local(d, source, bool(image_ref) and boot_index == 0, id, image_ref)
    size = None if d.volume_size is None else _size(int(d.volume_size))
    return _device(
        source,
        destination,
        id,
        name=d.device_name,
        size=size,
        boot_index=boot_index,
        volume_type=d.volume_type or None,
        format=d.guest_format,
        bus=_bus(d.disk_bus),
        kind=_kind(d.device_type),
        tag=d.tag,
        delete_on_termination=truth(d.delete_on_termination),
    )


def _check_local(d: DeviceWish, source: str, root: bool, id: str | None, image_ref: str | None) -> None:
    if source == "image" and not root:
        raise _bad("Mapping image to local is not supported.")
    if source == "image" and dashed(id or "") != dashed(image_ref or ""):
        raise Invalid(SEQUENCE)
    if source in ("volume", "snapshot"):
        raise _bad(f"Mapping {source} to local is not supported.")
    if d.volume_type:
        raise _bad("Specifying a volume_type with destination_type=local is not supported.")


def _device(source: Any, destination: Any, id: str | None, *, name: str | None, **facts: Any) -> Device:
    if id is not None and not UUID.fullmatch(id):
        raise _lost(source, id)
    of: dict[str, Any] = {} if id is None else {f"{source}_id": dashed(id)}
    return Device("", _named(name), source, destination, **of, **facts)


def _asked_of_old(old: list[OldDeviceWish], image_ref: str | None) -> list[Device]:
    """Older words know no order of booting: without an image it is the one named as the root, else the first."""
    found = [_of_old(d) for d in old]
    volumes = [i for i, d in enumerate(found) if d.is_volume]
    if image_ref:
        id = dashed(image_ref) if UUID.fullmatch(image_ref) else image_ref
        return [Device("", None, "image", "local", boot_index=0, image_id=id), *found]
    if volumes:
        root = next((i for i in volumes if letters_of(found[i].name or "") == "a"), volumes[0])
        found[root] = msgspec.structs.replace(found[root], boot_index=0)
    return found


def _of_old(d: OldDeviceWish) -> Device:
    size = None if d.volume_size is None else _size(int(d.volume_size))
    rest: dict[str, Any] = {"name": d.device_name, "delete_on_termination": truth(d.delete_on_termination)}
    if d.volume_id:
        return _device("volume", "volume", d.volume_id, **rest)
    if d.snapshot_id:
        return _device("snapshot", "volume", d.snapshot_id, size=size, **rest)
    if d.virtual_name == "swap" or (d.virtual_name or "").startswith("ephemeral"):
        format = "swap" if d.virtual_name == "swap" else None
        return _device("blank", "local", None, size=size, format=format, **rest)
    raise _bad("Unrecognized legacy format.")


def _named(said: str | None) -> str | None:
    """A name that a disk can have here; None: we choose one. Its prefix is its bus's, whatever was said."""
    if said is None:
        return None
    if not said.strip() or " " in said:
        raise _bad("Device name contains spaces." if said.strip() else "Device name empty or too long.")
    return f"/dev/{said.removeprefix('/dev/')}" if letters_of(said) else None


def _size(n: int) -> int:
    if not 1 <= n < 2**31:
        raise Invalid(
            f"Invalid input for field/attribute volume_size. Value: {n}. {n} is not between 1 and {2**31 - 1}"
        )
    return n


def _bus(said: str | None) -> Bus | None:
    if said and said not in BUSES:
        raise _bad(f"{said} is not a disk_bus that servers can have here.")
    return BUSES.get(said or "")


def _kind(said: str | None) -> Literal["disk", "cdrom"]:
    if said not in (None, "", "disk", "cdrom"):
        raise _bad(f"{said} is not a device_type that servers can have here.")
    return "cdrom" if said == "cdrom" else "disk"


def _bad(why: str) -> Invalid:
    return Invalid(f"{BAD}: {why}")


# ---- what they name


class _Mapping(msgspec.Struct):
    """One of `block_device_mapping` in the properties of an image that was taken of a volume-backed server."""

    source_type: str = "volume"
    destination_type: str | None = None
    snapshot_id: str | None = None
    volume_id: str | None = None
    image_id: str | None = None
    device_name: str | None = None
    volume_size: int | None = None
    boot_index: int | None = None
    delete_on_termination: bool | None = False
    guest_format: str | None = None
    disk_bus: str | None = None
    device_type: str | None = None
    no_device: bool | None = None
    volume_type: str | None = None
    tag: str | None = None


def of_image(info: ImageInfo, devices: list[Device]) -> list[Device]:
    """With those that the image brings along: its root instead of the image itself, others unless their name is taken."""
    text = info.properties.get("img_block_device_mapping") or info.properties.get("block_device_mapping")
    if not text:
        return devices
    try:
        told = msgspec.json.decode(text, type=list[_Mapping])
    except msgspec.MsgspecError:
        return devices  # anybody can write properties; such an image is a plain one
    mine = {letters_of(d.name) for d in devices if d.name}
    found = [_of_mapping(m) for m in told if not m.no_device]
    brought = [d for d in found if not d.name or letters_of(d.name) not in mine]
    if any(d.boot_index == 0 for d in brought):
        devices = [d for d in devices if not (d.boot_index == 0 and d.source == "image" and not d.is_volume)]
    return [*brought, *devices]


def _of_mapping(m: _Mapping) -> Device:
    wish = DeviceWish(
        source_type=m.source_type if m.source_type in ("blank", "image", "snapshot", "volume") else None,  # type: ignore[arg-type]
        destination_type="local" if m.destination_type == "local" else "volume",
        snapshot_id=m.snapshot_id,
        volume_id=m.volume_id,
        image_id=m.image_id,
        device_name=m.device_name,
        volume_size=m.volume_size,
        boot_index=m.boot_index,
        delete_on_termination=bool(m.delete_on_termination),
        guest_format=m.guest_format,
        disk_bus=m.disk_bus,
        device_type=m.device_type,
        volume_type=m.volume_type,
        tag=m.tag,
    )
    return _asked(wish, None)


def seen(call: Call, devices: list[Device], image: Image, *, most: int, zone: str | None) -> tuple[list[Device], Image]:
    """With the sizes of what they name, and what the server will be an image of. Raises Invalid."""
    _check_order(devices)
    if most > 1 and any(d.source == "volume" for d in devices):
        raise Invalid("Cannot attach one or more volumes to multiple instances")
    found = []
    for d in devices:
        told, of = _seen(call, d, image, zone)
        found.append(told)
        image = of if d.boot_index == 0 else image
    return found, image


def _check_order(devices: list[Device]) -> None:
    """Each bootable one has an index of its own, from 0 on, and there is at least one."""
    order = sorted(d.boot_index for d in devices if d.boot_index is not None and d.boot_index >= 0)
    if not order or order != list(range(len(order))):
        raise Invalid(SEQUENCE)
    names = [letters_of(d.name) for d in devices if d.name]
    if len(set(names)) != len(names):
        raise _bad("Two devices have the same name.")
    ids = [d.volume_id for d in devices if d.volume_id]
    if len(set(ids)) != len(ids):
        raise _bad("A volume is mapped twice.")


def _seen(call: Call, d: Device, image: Image, zone: str | None) -> tuple[Device, Image]:
    """One device, and the image that a server has of it if it boots from it."""
    if not d.is_volume:
        return d, image if d.source == "image" else Image()
    match d.source:
        case "volume":
            volume = _volume(call, d.volume_id or "")
            free(call, volume)
            same_zone(call, volume, zone)
            if d.boot_index == 0 and not volume.can_boot:
                raise Invalid(f"Block Device {volume.id} is not bootable.")
            told = msgspec.structs.replace(d, size=volume.size_gb, multiattach=volume.multiattach)
            return told, _image_of(volume)
        case "snapshot":
            return _of_snapshot(call, d)
        case "image":
            if not d.size:
                raise Invalid("Images with destination_type 'volume' need to have a non-zero size specified")
            return d, image_for(call, d.image_id or "", d)
        case _:
            if not d.size:
                raise Invalid("Blank volumes (source: 'blank', dest: 'volume') need to have non-zero size")
            return d, Image()


def _of_snapshot(call: Call, d: Device) -> tuple[Device, Image]:
    try:
        snapshot = call.world.neighbours.volume.snapshot(d.snapshot_id or "", call.context.token)
    except (NotFound, Forbidden):
        raise _lost("snapshot", d.snapshot_id or "") from None
    if d.size is not None and d.size < snapshot.size_gb:
        raise _bad(f"a volume of {d.size} GB cannot hold the snapshot {snapshot.id} of {snapshot.size_gb} GB.")
    told = msgspec.structs.replace(d, size=d.size or snapshot.size_gb)
    return told, _image_of(_volume(call, snapshot.volume_id)) if d.boot_index == 0 else Image()


def image_for(call: Call, id: str, d: Device) -> Image:
    """The image that a new volume is made of: the server knows its properties, not its id."""
    try:
        info: ImageInfo = call.world.neighbours.image.show(id, call.context.token)
    except (NotFound, Forbidden):
        raise _lost("image", id) from None
    if info.status != "active":
        raise Invalid(f"Image {info.id} is not active.")
    size = max(info.size or 0, info.virtual_size or 0, info.min_disk_gb * GIB)
    if (d.size or 0) * GIB < size:
        raise Invalid(
            "Volume is smaller than the minimum size specified in image metadata. Volume size is "
            f"{(d.size or 0) * GIB} bytes, minimum size is {size} bytes."
        )
    return Image(name=info.name or "", min_ram_mb=info.min_ram_mb, properties=info.properties)


def _volume(call: Call, id: str) -> VolumeInfo:
    try:
        volume: VolumeInfo = call.world.neighbours.volume.show(id, call.context.token)
    except (NotFound, Forbidden):
        raise _lost("volume", id) from None
    return volume


def free(call: Call, volume: VolumeInfo) -> None:
    """Raises Invalid where a server cannot have it now."""
    if volume.multiattach and call.version < 60:
        raise Invalid(OLD_MULTIATTACH)
    if volume.status != "available" and not (volume.multiattach and volume.status == "in-use"):
        raise Invalid(
            f"Invalid volume: volume '{volume.id}' status must be 'available'. Currently in '{volume.status}'"
        )


def same_zone(call: Call, volume: VolumeInfo, zone: str | None) -> None:
    """Where volumes may not be of another zone than their server."""
    if call.world.config.volume.cross_zone_attach or zone is None or volume.availability_zone == zone:
        return
    raise Invalid(
        "The availability zone between the server and its attached volumes do not match: "
        f"Server is in {zone}, volume {volume.id} is in {volume.availability_zone}."
    )


_OF_IMAGES = {"image_id", "image_name", "checksum", "container_format", "disk_format", "min_disk", "min_ram", "size"}


def _image_of(volume: VolumeInfo) -> Image:
    """What the volume remembers of the image that it was made of."""
    told = volume.image_metadata
    ram = told.get("min_ram", "")
    properties = {k: v for k, v in told.items() if k not in _OF_IMAGES}
    return Image(min_ram_mb=int(ram) if ram.isdecimal() else 0, properties=properties)


def _lost(what: str, id: str) -> Invalid:
    return Invalid(f"{BAD}: failed to get {what} {id[:80]}.")


# ---- against the flavor


def fitting(call: Call, devices: list[Device], flavor: Flavor) -> list[Device]:
    """With the flavor's sizes where none were said. Raises Invalid where they are more than it has."""
    devices = [_sized(d, flavor) for d in devices]
    ephemeral = [d.size or 0 for d in devices if d.role == "ephemeral"]
    if sum(ephemeral) > flavor.ephemeral_gb:
        raise Invalid(
            "Ephemeral disks requested are larger than the instance type allows. If no size is given in one block "
            "device mapping, flavor ephemeral size will be used."
        )
    swap = [d.size or 0 for d in devices if d.role == "swap"]
    if len(swap) > 1:
        raise _bad("More than one swap drive requested.")
    if sum(swap) > flavor.swap_mb:
        raise Invalid("Swap drive requested is larger than instance type allows.")
    local = sum(not d.is_volume for d in devices)
    local += bool(flavor.ephemeral_gb and not ephemeral) + bool(flavor.swap_mb and not swap)
    if local > call.world.config.compute.local_disks_max >= 0:
        raise _bad("You specified more local devices than the limit allows")
    return [d for d in devices if not _says_nothing(d)]


def _says_nothing(d: Device) -> bool:
    """Clients describe the image's own disk among others, because they must."""
    return d.role == "root" and not d.is_volume and not (d.name or d.bus or d.tag or d.kind != "disk")


def _sized(d: Device, flavor: Flavor) -> Device:
    if d.is_volume or d.source != "blank" or d.size is not None:
        return d
    return msgspec.structs.replace(d, size=flavor.swap_mb if d.role == "swap" else flavor.ephemeral_gb)
