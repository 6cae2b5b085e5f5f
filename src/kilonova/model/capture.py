"""The record of an image that is made of a server: what it inherits, and what is said of where it comes from. Pure."""

from collections.abc import Mapping
from typing import Any, Literal

from kilonova.model.server import Server

MARK = (
    "kilonova_run"  # a property: the run that brings the bytes, by which we know an image that nobody is at any longer
)
# In the system metadata of a shelved server.
SHELVED_IMAGE, SHELVED_AT, SHELVED_HOST = SHELVED = "shelved_image_id", "shelved_at", "shelved_host"
# Image properties that are true of one image only (extra-specs.md, the last section).
NOT_INHERITED = frozenset(
    {
        "cache_in_nova",
        "bittorrent",
        "img_cache_in_nova",
        "img_bittorrent",
        "cinder_encryption_key_id",
        "cinder_encryption_key_deletion_policy",
        "img_signature",
        "img_signature_hash_method",
        "img_signature_key_type",
        "img_signature_certificate_uuid",
        "backup_type",
    }
)
# Not even kept with a server that is made of the image.
NOT_OF_SERVERS = frozenset({"mappings", "block_device_mapping", "img_mappings", "img_block_device_mapping", MARK})
KEPT_OF_OWNER = ("boot_roles", "owner_project_name", "owner_user_name")  # system metadata since its creation


def disk_format(server: Server) -> Literal["raw", "qcow2"]:
    """Of a copy of its root disk: its image's own, where that is one a disk can be written in."""
    return "raw" if server.image.disk_format == "raw" else "qcow2"


def mapping(server: Server, snapshots: Mapping[str, tuple[str, int]]) -> list[dict[str, Any]]:
    """What an image says of the disks of a server made of it (the Image API's `block_device_mapping`).

    `snapshots`: of each volume the id of its snapshot, and how large it is.
    """
    told = []
    for d in server.devices:
        about: dict[str, Any] = {"device_name": d.name, "boot_index": d.boot_index, "guest_format": d.format}
        about |= {"delete_on_termination": d.delete_on_termination, "disk_bus": d.bus, "device_type": d.kind}
        about |= {"tag": d.tag, "destination_type": d.destination, "source_type": d.source, "image_id": d.image_id}
        if not d.is_volume:
            about["volume_size"] = d.size
        elif d.volume_id is not None and d.volume_id in snapshots:
            id, size = snapshots[d.volume_id]
            about |= {"source_type": "snapshot", "snapshot_id": id, "volume_size": size, "image_id": None}
        else:
            continue  # it is about to leave
        told.append({k: v for k, v in about.items() if v is not None})
    return told


def record(
    server: Server,
    name: str,
    *,
    run: str,
    user_id: str,
    project_id: str,
    kind: Literal["snapshot", "backup"] = "snapshot",
    said: dict[str, str] | None = None,
    more: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The image's attributes and properties, as the Image API wants them. `said` is the caller's metadata.

    An image that somebody of another project asked for is that project's, and `shared`.
    """
    image, ours = server.image, server.system_metadata
    lost = NOT_INHERITED | NOT_OF_SERVERS
    inherited = {k: v for k, v in image.properties.items() if k not in lost and not k.startswith("os_glance")}
    about = {k: ours[k] for k in KEPT_OF_OWNER if k in ours}
    about |= {
        "base_image_ref": image.properties.get("base_image_ref") or image.id or "",
        "image_location": "snapshot",
        "image_state": "available",
        "image_type": kind,
        "instance_uuid": server.id,
        "owner_id": server.project_id,
        "user_id": user_id,
    }
    return {
        **inherited,
        **about,
        **(more or {}),
        **(said or {}),
        MARK: run,
        "name": name,
        "owner": project_id,
        "visibility": "private" if project_id == server.project_id else "shared",
        "disk_format": disk_format(server),
        "container_format": "bare",
        "min_disk": max(image.min_disk_gb, server.flavor.disk_gb),
        "min_ram": image.min_ram_mb,
    }
