"""The formats a guest's disk is made of, written in Python: boot sector and plan, cpio archive, owners in ext4."""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from kilonova.kit.errors import Unsupported

SECTOR = 512
MIB = 1 << 20

# boot.S, assembled
BOOT_SECTOR = bytes.fromhex(
    """
    fa6631c08ed88ec08ed0bc007cfbfc8816fc7f40b91000bb0008e82001be0080668b04668b6c04668b7c0883c60c6685
    ed745466b97f0000006639cd73036689e96629cdbb0020e8f3006601c866c1e107566650fa0f0116987d0f20c2420f22
    c2bb18008edb8ec34a0f22c266be000002006766f3a531db8edb8ec3fb66585e6685ed75aeeb996689fda15004a30090
    6631dbbfd09266b820e8000066b91400000066ba50414d53cd15720c83c714fe06e8916685db75defab800108ec06631
    c031ffb9000c66f3ab2666c7060000031001002666c706001003200100bf0020b0832666890583c70866050000200081
    ff003072ed66b8000001000f22d86631c0b0200f22e066b9800000c00f3280cc010f300f0116987d0f20c0660d010000
    800f22c0ea297d1000b8180000008ed88ec08ed0be0090000089e8ffe0666066a3807d890e7a7d891e7e7db4428a16fc
    7fbe787dcd1366617201c3be6c7dacb40ebb0700cd1084c075f4faf46469736b206572726f7200901000000000000000
    0000000000000000ffff0000009aaf00ffff00000092cf001f00787d0000
    """
)

# What boot.S and disk.py agree on: the plan lies behind the boot sector and is read to one place in memory.
PLAN_SECTOR, PLAN_AT = 1, 0x8000
COMMAND_LINE_AT, COMMAND_LINE_SIZE = 0x8800, 2048
# where the kernel's own loader wants the part of bzImage behind its setup sectors, and its 64-bit entry
KERNEL_AT, ENTRY_64 = 0x100000, 0x200


def write_disk(out: BinaryIO, *, kernel: bytes, initrd: bytes, command_line: str, root: Path) -> None:
    """A disk that a BIOS boots: MBR, plan, partition 1 with kernel and initrd as they are, partition 2 = `root`.

    `kernel` is a bzImage with a 64-bit entry (any x86-64 Linux since 3.8); Unsupported is raised for another.
    `root` is the image of a file system, of whole MiB. The root partition comes last so that it can grow.
    """
    protocol, xloadflags = struct.unpack_from("<H", kernel, 0x206)[0], struct.unpack_from("<H", kernel, 0x236)[0]
    if kernel[0x202:0x206] != b"HdrS" or protocol < 0x20C or not xloadflags & 1:
        raise Unsupported("the guest's kernel is no bzImage with a 64-bit entry")
    loaded = kernel[(kernel[0x1F1] + 1) * SECTOR :]
    # Unpacking, the kernel uses init_size bytes from its preferred address on: the initrd goes behind them.
    preferred, init_size = struct.unpack_from("<QI", kernel, 0x258)
    initrd_at = _up(preferred + init_size, MIB)

    first = MIB // SECTOR
    extents, plan, sector = [], b"", first
    for data, address in ((loaded, KERNEL_AT), (initrd, initrd_at)):
        extents.append((sector, data))
        plan += struct.pack("<III", sector, _up(len(data), SECTOR) // SECTOR, address)
        sector = _up(sector + _up(len(data), SECTOR) // SECTOR, 8)
    plan += struct.pack("<III", 0, 0, KERNEL_AT + ENTRY_64)
    line = command_line.encode()
    assert len(line) < COMMAND_LINE_SIZE
    plan = plan.ljust(COMMAND_LINE_AT - PLAN_AT, b"\0") + line.ljust(COMMAND_LINE_SIZE, b"\0")
    plan += _boot_params(kernel, initrd_at, len(initrd))

    root_first = _up(sector, MIB // SECTOR)
    root_sectors = root.stat().st_size // SECTOR
    out.write(_mbr((0xDA, first, root_first - first), (0x83, root_first, root_sectors)))
    out.seek(PLAN_SECTOR * SECTOR)
    out.write(plan)
    for sector, data in extents:
        out.seek(sector * SECTOR)
        out.write(data)
    with root.open("rb") as source:
        position = root_first * SECTOR
        while piece := source.read(MIB):
            if piece.count(0) != len(piece):  # holes stay holes
                out.seek(position)
                out.write(piece)
            position += len(piece)
    out.truncate(position)


def _boot_params(kernel: bytes, initrd_at: int, initrd_size: int) -> bytes:
    """The "zero page" (Linux: x86/zero-page): the kernel's own header, filled in, and a text screen of 80 by 25."""
    page = bytearray(4096)
    page[0x06], page[0x07], page[0x0E], page[0x0F], page[0x10] = 3, 80, 25, 1, 16
    header = slice(0x1F1, 0x202 + kernel[0x201])
    page[header] = kernel[header]
    page[0x210] = 0xFF  # type_of_loader: none of those with a number
    page[0x211] = 0x01  # loadflags: loaded high, all else is ours to say
    struct.pack_into("<II", page, 0x218, initrd_at, initrd_size)
    struct.pack_into("<I", page, 0x228, COMMAND_LINE_AT)
    return bytes(page)


def _mbr(*partitions: tuple[int, int, int]) -> bytes:
    """The first sector, with (type, first sector, sectors) of each partition; the first one is active."""
    sector = bytearray(BOOT_SECTOR.ljust(440, b"\0") + b"KNva" + bytes(68))
    for n, (kind, first, sectors) in enumerate(partitions):
        beyond_chs = b"\xfe\xff\xff"
        entry = bytes([0x80 if n == 0 else 0]) + beyond_chs + bytes([kind]) + beyond_chs
        sector[446 + 16 * n : 462 + 16 * n] = entry + struct.pack("<II", first, sectors)
    sector[510:512] = b"\x55\xaa"
    assert len(BOOT_SECTOR) <= 440 and len(sector) == SECTOR
    return bytes(sector)


def cpio(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """An archive "newc", as the kernel takes it for an initial file system. Keys are paths without leading slash.

    A value is (st_mode, content): the content of a file, the target of a symbolic link, nothing for a directory.
    Directories must come before what is in them. All belongs to root.
    """
    out = bytearray()
    for number, (path, (mode, content)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], 1):
        name = path.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out)


def owned_by_root(image: Path) -> None:
    """Give every inode of an ext4 image to root, as mke2fs -d keeps the owners of the files it was shown.

    The image must have 32-byte group descriptors and no checksums (mke2fs -O ^64bit,^metadata_csum).
    """
    data = bytearray(image.read_bytes())
    superblock = 1024
    block_size = 1024 << struct.unpack_from("<I", data, superblock + 24)[0]
    per_group = struct.unpack_from("<I", data, superblock + 40)[0]
    inodes = struct.unpack_from("<I", data, superblock)[0]
    inode_size = struct.unpack_from("<H", data, superblock + 88)[0]
    descriptors = block_size * (2 if block_size == 1024 else 1)
    for group in range(_up(inodes, per_group) // per_group):
        table = struct.unpack_from("<I", data, descriptors + 32 * group + 8)[0] * block_size
        for inode in range(table, table + per_group * inode_size, inode_size):
            for field in (2, 24, 120, 122):  # uid, gid, and their upper halves
                data[inode + field : inode + field + 2] = b"\0\0"
    image.write_bytes(data)


def modules(kernel_tree: Path, wanted: Iterable[str]) -> tuple[dict[str, bytes], str, str]:
    """(name -> module, modules.dep, modules.alias) of the wanted kernel modules and all they depend on.

    Modules the kernel has built in are passed over. Signatures are cut off: to check one costs the emulated guest
    10 ms, and this guest trusts its own disk.
    """
    paths = {p.name.split(".ko")[0].replace("-", "_"): p for p in kernel_tree.rglob("*.ko*")}
    found: dict[str, bytes] = {}
    needs: dict[str, list[str]] = {}
    aliases: list[str] = []

    def take(name: str) -> None:
        if name in found or name not in paths:
            return
        module = untyped(unsigned(unpacked(paths[name])))
        info = modinfo(module)
        found[name] = module
        needs[name] = [n.replace("-", "_") for field in info.get("depends", []) for n in field.split(",") if n]
        aliases.extend(f"alias {alias} {name}\n" for alias in info.get("alias", []))
        for other in needs[name]:
            take(other)

    def closure(name: str) -> list[str]:
        """All that must be there before `name`, what comes first last, as modules.dep has it."""
        out: list[str] = []
        for other in needs.get(name, []):
            for each in (other, *closure(other)):
                if each in out:
                    out.remove(each)
                out.append(each)
        return out

    for name in wanted:
        take(name.replace("-", "_"))
    dep = "".join(f"{name}.ko:{''.join(f' {n}.ko' for n in closure(name))}\n" for name in found)
    return found, dep, "".join(aliases)


def unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        import lzma

        return lzma.decompress(data)
    return data


def unsigned(module: bytes) -> bytes:
    """A kernel module without its signature (Linux: struct module_signature, 12 bytes before the mark)."""
    mark = b"~Module signature appended~\n"
    if not module.endswith(mark):
        return module
    end = len(module) - len(mark)
    (length,) = struct.unpack_from(">I", module, end - 4)
    return module[: end - 12 - length]


def untyped(module: bytes) -> bytes:
    """A kernel module whose BTF is not found: to read the first one, the kernel parses its own, some 60 ms."""
    return module.replace(b"\0.BTF\0", b"\0.btf\0")


def modinfo(module: bytes) -> dict[str, list[str]]:
    """What an ELF kernel module says of itself in .modinfo."""
    (table,) = struct.unpack_from("<Q", module, 40)
    size, count, names_index = struct.unpack_from("<HHH", module, 58)
    headers = [struct.unpack_from("<IIQQQQ", module, table + size * n) for n in range(count)]
    names = headers[names_index][4]
    for name, _, _, _, offset, length in headers:
        if module[names + name :].startswith(b".modinfo\0"):
            out: dict[str, list[str]] = {}
            for field in module[offset : offset + length].split(b"\0"):
                key, _, value = field.decode().partition("=")
                out.setdefault(key, []).append(value)
            return out
    return {}


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
