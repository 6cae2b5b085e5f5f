"""Volumes as disks of this host: what their service says of how to connect, as files or devices that are here.

`local` is the one kind so far: the volume is a file or a block device of this machine (docs/decisions/block-storage.md).
"""

import stat
from pathlib import Path
from typing import Any

from kilonova.kit.errors import Refused
from kilonova.model.machine import VolumeSource
from kilonova.virt.libvirt.xml import Laid, Layer


def laid(source: VolumeSource) -> Laid:
    """Where it lies. Raises Refused where this host cannot reach it, or nobody says in which format it is."""
    info: dict[str, Any] = source.connection_info or {}
    data: dict[str, Any] = info.get("data") or {}
    volume, kind = f"Volume {source.volume_id}", info.get("driver_volume_type")
    if kind != "local":
        raise Refused(f"{volume} cannot be connected: this host knows no {str(kind)[:32]!r} volumes.")
    path, format = data.get("device_path"), data.get("format", "raw")  # a device of a real Cinder is raw
    if not isinstance(path, str) or not path.startswith("/") or format not in ("raw", "qcow2"):
        raise Refused(f"{volume} cannot be connected: how is not said.", why=f"path {path!r}, format {format!r}")
    try:
        mode = Path(path).stat().st_mode
    except OSError as e:
        raise Refused(f"{volume} is not on this host.", why=str(e)) from None
    return Laid(
        [Layer(path, format)],
        read_only=data.get("access_mode") == "ro",
        shared=bool(info.get("multiattach")),
        block=stat.S_ISBLK(mode),
    )
