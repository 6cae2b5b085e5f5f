"""Images for a cloud that has none: a file or URL of the user's, or the guest we build of Debian's packages."""

import contextlib
import os
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kilonova.cli.client import Client
from kilonova.cli.state import StateDir
from kilonova.kit.errors import Invalid, Refused, Trouble, Unavailable

Say = Callable[[str], None]
CHUNK = 1 << 20
# The first bytes of a format; what has none of them is raw. The image service looks closer.
MAGIC = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"<<< ": "vdi", b"vhdx": "vhdx"}


def checked(source: str) -> None:
    """Before anything is begun for it. Raises Invalid where it cannot be an image."""
    if "://" in source:
        if not source.startswith(("http://", "https://", "file://")):
            raise Invalid(f"An image comes from a file, or http and https: {source}")
        return
    file = Path(source)
    try:
        with file.open("rb") as f:
            if not f.read(1):
                raise Invalid(f"The image {source} is empty.")
    except OSError as e:
        raise Invalid(f"The image {source} cannot be read: {e.strerror}.") from None


def given(client: Client, source: str, state: StateDir, say: Say) -> str:
    """FILE or URL, put into the cloud under its own name; found again by name, size and source when it is there."""
    checked(source)
    file = _fetched(source, state, say) if "://" in source else Path(source)
    with file.open("rb") as f:
        head = f.read(4)
    return put(client, file.name, file, MAGIC.get(head, "raw"), {"kilonova_source": source[:255]}, say)


def guest(client: Client, say: Say) -> str:
    """Our own: small, and quick to boot."""
    from kilonova.companions.guest import build

    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    built = build(Path(home) / "kilonova" / "guest", progress=say)
    return put(client, "kilonova-guest", built.disk, "raw", {"kilonova_guest": built.version}, say)


def pretended(client: Client, say: Say) -> str:
    """Simulated hosts look at no bytes."""
    found = client.get("/image/v2/images?name=sim-image")["images"]
    if found:
        return str(found[0]["id"])
    return _put(client, "sim-image", iter([bytes(1024)]), 1024, "raw", {}, say)


def put(client: Client, name: str, file: Path, disk_format: str, properties: dict[str, str], say: Say) -> str:
    size = file.stat().st_size
    for found in client.get(f"/image/v2/images?name={name}&status=active")["images"]:
        if found.get("size") == size and all(found.get(k) == v for k, v in properties.items()):
            return str(found["id"])
    return _put(client, name, _chunks(file), size, disk_format, properties, say)


def _put(
    client: Client,
    name: str,
    chunks: Iterator[bytes],
    size: int,
    disk_format: str,
    properties: dict[str, str],
    say: Say,
) -> str:
    say(f"Image {name} ({size >> 20} MiB) goes into the cloud …")
    wish: dict[str, Any] = {
        "name": name,
        "disk_format": disk_format,
        "container_format": "bare",
        "visibility": "public",
        **properties,
    }
    image = client.post("/image/v2/images", wish)["id"]
    try:
        client.upload(f"/image/v2/images/{image}/file", chunks, size)
    except Trouble:
        with contextlib.suppress(Trouble):
            client.delete(f"/image/v2/images/{image}")
        raise
    return str(image)


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as f:
        while chunk := f.read(CHUNK):
            yield chunk


def _fetched(url: str, state: StateDir, say: Say) -> Path:
    """Into the state directory, once."""
    name = url.rstrip("/").rpartition("/")[2] or "image"
    file = state.path / "downloads" / name
    if file.exists():
        return file
    file.parent.mkdir(exist_ok=True)
    part = file.with_name(f".{name}.part")
    say(f"Fetching {url} …")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, part.open("wb") as f:  # noqa: S310 (the user named it)
            total, told, got = int(answer.headers.get("Content-Length") or 0), 0, 0
            while chunk := answer.read(CHUNK):
                f.write(chunk)
                got += len(chunk)
                if total and got * 10 // total > told:
                    told = got * 10 // total
                    say(f"  {told * 10} % of {total >> 20} MiB")
    except OSError as e:
        part.unlink(missing_ok=True)
        raise Unavailable(f"Could not fetch {url}: {e}") from None
    if total and got != total:
        part.unlink()
        raise Refused(f"{url} ended after {got} of {total} bytes.")
    part.rename(file)
    return file
