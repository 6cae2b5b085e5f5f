"""What a simulated machine's disk holds, as bytes that an image service takes for what they are said to be."""

import struct
from math import ceil

import msgspec

from kilonova.model.machine import ImageSource, Machine

CLUSTER = 512
ENTRIES = CLUSTER // 8  # of a table
COPIED = 1 << 63  # this cluster is nobody else's


class Facts(msgspec.Struct):
    """All that there is to be known of it: a test reads it back."""

    server: str
    name: str
    image: str
    epoch: int
    written: str  # by the guest


def contents(machine: Machine, log: str) -> bytes:
    """Whole sectors of its facts; at most as many as `qcow2` can hold."""
    root = next((d.source.image_id for d in machine.disks if isinstance(d.source, ImageSource)), "")
    said = msgspec.json.encode(Facts(machine.id, machine.name, root, machine.epoch, log[-8192:]))
    return said.ljust(ceil(len(said) / CLUSTER) * CLUSTER, b"\0")


def qcow2(data: bytes) -> bytes:
    """The smallest image of this format that holds these sectors (QEMU, docs/interop/qcow2): clusters of 512 bytes,
    one table on each level, so 32 KiB at most."""
    used = len(data) // CLUSTER
    assert used <= ENTRIES, "that is more than one table can hold"
    refcounts, block, l1, l2, first = 1, 2, 3, 4, 5
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb", 3, 0, 0, 9, len(data), 0, 1, l1 * CLUSTER, refcounts * CLUSTER, 1, 0, 0, 0, 0, 0, 4, 104,
    )  # fmt: skip
    tables = [
        header,
        struct.pack(">Q", block * CLUSTER),
        struct.pack(f">{first + used}H", *[1] * (first + used)),
        struct.pack(">Q", l2 * CLUSTER | COPIED),
        b"".join(struct.pack(">Q", (first + i) * CLUSTER | COPIED) for i in range(used)),
    ]
    return b"".join(t.ljust(CLUSTER, b"\0") for t in tables) + data


def facts(disk: bytes) -> Facts:
    """Of `contents`, as it is or in a `qcow2` of ours."""
    data = disk[5 * CLUSTER :] if disk.startswith(b"QFI\xfb") else disk
    return msgspec.json.decode(data.rstrip(b"\0"), type=Facts)
