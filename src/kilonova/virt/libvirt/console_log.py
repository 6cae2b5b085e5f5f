"""A console's file: QEMU writes at its end, and its head is taken off from behind.

It is written by QEMU alone, so a guest never waits for us and nothing is lost while we are away.  It is kept short by
FALLOC_FL_PUNCH_HOLE: no byte is copied, none is lost between a copy and a cut, and QEMU need not know.
"""

import ctypes
import os
from pathlib import Path

TAIL_BYTES = 100 * 1024  # that a caller is shown
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
BLOCK = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def trim(path: Path, most: int) -> None:
    """Keeps it at most a quarter longer than so many bytes. Raises FileNotFoundError."""
    if path.stat().st_blocks * 512 > most + max(most // 4, 2 * BLOCK):
        behead(path, most)


def behead(path: Path, keep_bytes: int) -> None:
    """Gives back the disk space of all but the end. Who writes to it notices nothing.

    Where the file system cannot (it is old, or over a network), the end is copied aside and the file emptied; what
    is written between the two is lost.
    """
    with path.open("rb+") as file:
        size = os.fstat(file.fileno()).st_size
        head = (size - keep_bytes) // BLOCK * BLOCK
        if head <= 0:
            return
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        if _libc.fallocate(file.fileno(), mode, 0, head) == 0:
            return
        path.with_name(path.name + ".0").write_bytes(tail(path, keep_bytes))
        file.truncate(0)


def said(directory: Path, most: int) -> bytes:
    """The end of what a server with this directory said. Another libvirtd's virtlogd turns files over: console.log.0 is
    the one before."""
    text = b""
    for name in ("console.log", "console.log.0", "console.log.1", "console.log.2"):
        if len(text) < most:
            text = tail(directory / name, most - len(text)) + text
    return text


def tail(path: Path, most: int) -> bytes:
    """The end of it, from where there is something; b"" where it is not."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = os.lseek(file.fileno(), max(0, size - most), os.SEEK_DATA)
            file.seek(start)
            return file.read(most)
    except OSError:  # not there, or nothing but a hole
        return b""
