"""A small FAT16 file system with long names, written once and never changed: the other form of a config drive.

64 MiB as readers of config drives expect; the layout is that of Microsoft's "FAT: General Overview of On-Disk
Format".  Directories and files lie one after the other, in clusters of their own.
"""

import math
import struct
from collections.abc import Mapping

SECTOR, PER_CLUSTER = 512, 4
CLUSTER = SECTOR * PER_CLUSTER
SECTORS = 64 * 2**20 // SECTOR
RESERVED, FATS, ROOT_ENTRIES = 1, 2, 512
FAT_SECTORS = math.ceil((SECTORS // PER_CLUSTER + 2) * 2 / SECTOR)
ROOT_AT = (RESERVED + FATS * FAT_SECTORS) * SECTOR
DATA_AT = ROOT_AT + ROOT_ENTRIES * 32
CLUSTERS = (SECTORS * SECTOR - DATA_AT) // CLUSTER

READ_ONLY, VOLUME, DIRECTORY, LONG = 0x01, 0x08, 0x10, 0x0F
END, MEDIA = 0xFFFF, 0xF8
STAMP = struct.pack("<HH", 0, (2012 - 1980) << 9 | 1 << 5 | 1)  # a time and a date that say nothing

Folder = dict[str, "Folder | bytes"]


def vfat(files: Mapping[str, bytes], label: str) -> bytes:
    """The whole image. Raises ValueError where the files are too many or too long for it."""
    root: Folder = {}
    for path, content in files.items():
        *folders, name = path.split("/")
        here = root
        for folder in folders:
            inner = here.setdefault(folder, {})
            assert isinstance(inner, dict)
            here = inner
        here[name] = content
    disk = _Disk()
    entries = _entry(label.upper().ljust(11)[:11].encode("ascii"), VOLUME, 0, 0) + disk.entries(root)
    if len(entries) > ROOT_ENTRIES * 32:
        raise ValueError("too many names in the first folder of a vfat drive")
    image = bytearray(SECTORS * SECTOR)
    image[:SECTOR] = _boot_sector(label)
    for n in range(FATS):
        at = (RESERVED + n * FAT_SECTORS) * SECTOR
        image[at : at + len(disk.chain) * 2] = struct.pack(f"<{len(disk.chain)}H", *disk.chain)
    image[ROOT_AT : ROOT_AT + len(entries)] = entries
    image[DATA_AT : DATA_AT + len(disk.data)] = disk.data
    return bytes(image)


class _Disk:
    """Clusters, and which follows which; the first two numbers mean something else."""

    def __init__(self) -> None:
        self.chain: list[int] = [0xFF00 | MEDIA, END]
        self.data = bytearray()

    def entries(self, folder: Folder, own: int = 0, head: bytes = b"") -> bytes:
        """The entries of the folder that begins at cluster `own` (0: the first one), after storing what is in it."""
        shown = [head]
        for n, (name, inside) in enumerate(folder.items(), 1):
            short = f"KN{n:06d}   ".encode("ascii")
            if isinstance(inside, bytes):
                first, size, kind = self.store(inside), len(inside), READ_ONLY
            else:
                first, size, kind = self.folder(inside, own), 0, DIRECTORY
            shown += [_long_name(name, short), _entry(short, kind, first, size)]
        return b"".join(shown)

    def folder(self, inside: Folder, parent: int) -> int:
        """Its clusters are taken before those of what is in it, which must know where it begins."""
        names = sum(1 + math.ceil(len(name) / 13) for name in inside)
        first = self.take(math.ceil((2 + names) * 32 / CLUSTER))
        head = _entry(b".".ljust(11), DIRECTORY, first, 0) + _entry(b"..".ljust(11), DIRECTORY, parent, 0)
        self.write(first, self.entries(inside, first, head))
        return first

    def store(self, content: bytes) -> int:
        if not content:
            return 0
        first = self.take(math.ceil(len(content) / CLUSTER))
        self.write(first, content)
        return first

    def take(self, clusters: int) -> int:
        first = len(self.chain)
        if first + clusters > CLUSTERS + 2:
            raise ValueError("too much for a vfat drive")
        self.chain += [*range(first + 1, first + clusters), END]
        self.data += bytes(clusters * CLUSTER)
        return first

    def write(self, first: int, content: bytes) -> None:
        at = (first - 2) * CLUSTER
        self.data[at : at + len(content)] = content


def _entry(name: bytes, kind: int, first: int, size: int) -> bytes:
    """A directory entry: name of 11 bytes, first cluster, size in bytes."""
    return struct.pack("<11sBBB4s2sH4sHI", name, kind, 0, 0, STAMP, STAMP[2:], 0, STAMP, first, size)


def _long_name(name: str, short: bytes) -> bytes:
    """The entries before a short one: 13 letters each, the last of them first. Names here are of ASCII letters."""
    check = 0
    for byte in short:
        check = ((check >> 1) + (check << 7) + byte) & 0xFF
    parts = [name[n : n + 13] for n in range(0, len(name), 13)]
    shown = []
    for n, part in reversed(list(enumerate(parts, 1))):
        text = part.encode("utf-16-le")
        if len(part) < 13:
            text = (text + b"\0\0").ljust(26, b"\xff")
        order = n | (0x40 if n == len(parts) else 0)
        shown.append(struct.pack("<B10sBBB12sH4s", order, text[:10], LONG, 0, check, text[10:22], 0, text[22:]))
    return b"".join(shown)


def _boot_sector(label: str) -> bytes:
    geometry = struct.pack(
        "<HBHBHHBHHHII", SECTOR, PER_CLUSTER, RESERVED, FATS, ROOT_ENTRIES, 0, MEDIA, FAT_SECTORS, 32, 64, 0, SECTORS
    )
    serial = 0x4B4E4F56
    name = label.upper().ljust(11)[:11].encode("ascii")
    more = struct.pack("<BBBI11s8s", 0x80, 0, 0x29, serial, name, b"FAT16   ")
    return (b"\xeb\x3c\x90KILONOVA" + geometry + more).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"
