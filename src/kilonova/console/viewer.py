"""noVNC's own files, where they lie on this machine: the page that a browser opens a screen with.

Debian has them as the package `novnc`. They are nobody's secret; what leads to a console is the token in the address.
"""

import http
import mimetypes
import urllib.parse
from pathlib import Path
from typing import NamedTuple

MISSING = """<!DOCTYPE html>
<html lang="en"><head><title>No viewer</title></head><body>
<p>There is no noVNC on this machine (Debian: the package <code>novnc</code>). The console itself is there: a viewer
of your own speaks websocket to this address.</p>
</body></html>
"""
MOST = 1 << 24  # bytes of a file


class Page(NamedTuple):
    status: http.HTTPStatus
    type: str
    body: bytes


def page(directory: Path, address: str) -> Page:
    """What lies at the path of this address, and nothing outside of the directory."""
    if not directory.is_dir():
        return Page(http.HTTPStatus.SERVICE_UNAVAILABLE, "text/html; charset=utf-8", MISSING.encode())
    path = urllib.parse.unquote(urllib.parse.urlsplit(address).path)
    if "\x00" not in path and (file := _within(directory, path)) is not None:
        kind = "text/javascript" if file.suffix == ".js" else mimetypes.guess_type(file.name)[0]
        return Page(http.HTTPStatus.OK, kind or "application/octet-stream", file.read_bytes())
    return Page(http.HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"There is no such page.\n")


def _within(directory: Path, path: str) -> Path | None:
    root = directory.resolve()
    file = (root / path.lstrip("/")).resolve()  # Debian's package has links to other packages' files
    lexical = Path(path.lstrip("/"))
    if lexical.is_absolute() or ".." in lexical.parts or not file.is_file() or file.stat().st_size > MOST:
        return None
    return file
