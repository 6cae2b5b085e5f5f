"""The formats of the guest's disk, and what the build does when things are missing, broken or done twice."""

import io
import json
import os
import shutil
import stat
import struct
import subprocess
import threading
from pathlib import Path

import msgspec
import pytest

from kilonova.companions.guest import debian, disk
from kilonova.companions.guest.build import HERE, alone, build, recipe
from kilonova.kit.errors import Unavailable, Unsupported

SCRIPTS = sorted(p for p in HERE.rglob("files/**/*") if p.is_file() and p.read_bytes().startswith(b"#!"))


# ---- formats


@pytest.mark.skipif(not (shutil.which("as") and shutil.which("ld")), reason="not installed: as, ld")
def test_boot_sector_is_its_source_assembled(tmp_path: Path) -> None:
    subprocess.run(["as", "--32", HERE / "boot.S", "-o", tmp_path / "boot.o"], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "boot.o", "-o", "boot.bin"]
    subprocess.run(link, cwd=tmp_path, check=True)
    assert (tmp_path / "boot.bin").read_bytes() == disk.BOOT_SECTOR
    assert len(disk.BOOT_SECTOR) <= 440


def kernel(body: bytes, *, protocol: int = 0x20F, entry_64: bool = True) -> bytes:
    """A bzImage as far as a boot loader looks: one setup sector behind the first, then the body."""
    head = bytearray(2 * 512)
    head[0x1F1] = 1
    head[0x200:0x206] = b"\xeb\x66HdrS"
    struct.pack_into("<H", head, 0x206, protocol)
    struct.pack_into("<H", head, 0x236, 1 if entry_64 else 0)
    struct.pack_into("<QI", head, 0x258, 16 << 20, 40 << 20)
    return bytes(head) + body


def test_plan_leads_to_kernel_and_initrd(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"\0" * disk.MIB + b"root" * (disk.MIB // 4))
    body, initrd = os.urandom(5000), os.urandom(777)
    out = io.BytesIO()
    disk.write_disk(out, kernel=kernel(body), initrd=initrd, command_line="quiet x=1", root=tmp_path / "root")
    whole = out.getvalue()

    plan = whole[512 : 512 + 16 * 512]
    extents = [struct.unpack_from("<III", plan, 12 * n) for n in range(3)]
    (k_first, k_count, k_at), (i_first, i_count, i_at), (_, end, entry) = extents
    assert (k_at, entry, end) == (0x100000, 0x100200, 0)
    assert whole[k_first * 512 :][: len(body)] == body and k_count == 10
    assert whole[i_first * 512 :][: len(initrd)] == initrd and i_count == 2
    assert i_at >= (16 << 20) + (40 << 20), "the kernel would unpack itself over its initrd"
    assert plan[2048:].startswith(b"quiet x=1\0")
    assert struct.unpack_from("<II", plan, 4096 + 0x218) == (i_at, len(initrd))
    assert struct.unpack_from("<I", plan, 4096 + 0x228) == (0x8800,)

    partitions = [struct.unpack_from("<B3xB3xII", whole, 446 + 16 * n) for n in range(2)]
    (active, kind, first, count), (_, root_kind, root_first, root_count) = partitions
    assert (active, kind, root_kind) == (0x80, 0xDA, 0x83)
    assert first <= k_first and i_first + i_count <= first + count <= root_first
    assert root_count * 512 == 2 * disk.MIB and len(whole) == (root_first + root_count) * 512
    assert whole[root_first * 512 :] == (tmp_path / "root").read_bytes()
    assert whole[510:512] == b"\x55\xaa"


@pytest.mark.parametrize("image", [kernel(b"", entry_64=False), kernel(b"", protocol=0x204), b"\0" * 4096])
def test_other_kernels_are_refused(image: bytes, tmp_path: Path) -> None:
    with pytest.raises(Unsupported):
        disk.write_disk(io.BytesIO(), kernel=image, initrd=b"", command_line="", root=tmp_path)


@pytest.mark.skipif(not shutil.which("cpio"), reason="not installed: cpio")
def test_cpio_can_be_read(tmp_path: Path) -> None:
    files = {
        "d": (stat.S_IFDIR | 0o755, b""),
        "d/program": (stat.S_IFREG | 0o755, b"x" * 4097),
        "d/link": (stat.S_IFLNK | 0o777, b"program"),
        "empty": (stat.S_IFREG | 0o600, b""),
    }
    subprocess.run(["cpio", "-id", "--quiet"], input=disk.cpio(files), cwd=tmp_path, check=True)
    assert (tmp_path / "d/link").read_bytes() == b"x" * 4097
    assert (tmp_path / "d/link").is_symlink() and os.access(tmp_path / "d/program", os.X_OK)
    assert (tmp_path / "empty").stat().st_size == 0


def test_modules_lose_their_signature_and_nothing_else() -> None:
    mark = b"~Module signature appended~\n"
    signed = b"ELF..." + b"s" * 300 + bytes(8) + struct.pack(">I", 300) + mark
    assert disk.unsigned(signed) == b"ELF..."
    assert disk.unsigned(b"ELF...") == b"ELF..."


# ---- what runs in the guest


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_shell(script: Path) -> None:
    subprocess.run(["sh", "-n", script], check=True)


def flat(text: str) -> dict[str, str]:
    words = ["awk", "-f", str(HERE / "files/root/lib/kilonova/json.awk")]
    out = subprocess.run(words, input=text.encode(), capture_output=True, check=True, timeout=10).stdout.decode()
    return dict(line.split("\t", 1) for line in out.splitlines())


@pytest.mark.skipif(not shutil.which("awk"), reason="not installed: awk")
def test_metadata_is_read_whatever_is_in_it() -> None:
    data = {
        "uuid": "u",
        "empty": {},
        "none": [],
        "keys": [{"name": 'a "quoted\\" one', "data": "ssh-rsa AAA= x\n"}, {"name": "b"}],
        "meta": {"note": "{not} [json], \\n", "tab": "a\tb", "slash": "a/b"},
        "deep": [[1, 2.5], [True, None]],
        "admin_pass": "p:'$(x)`\\",
    }
    for text in (json.dumps(data), json.dumps(data, indent=4), json.dumps(data, separators=(",", ":"))):
        got = flat(text)
        assert got["uuid"] == "u"
        assert got["keys.0.name"] == 'a "quoted\\" one' and got["keys.1.name"] == "b"
        assert got["keys.0.data"] == "ssh-rsa AAA= x\\n"  # a line feed stays \n: values are lines
        assert got["meta.note"] == "{not} [json], \\n" and got["meta.tab"] == "a b" and got["meta.slash"] == "a/b"
        assert (got["deep.0.1"], got["deep.1.0"], got["deep.1.1"]) == ("2.5", "true", "null")
        assert got["admin_pass"] == data["admin_pass"]


@pytest.mark.skipif(not shutil.which("awk"), reason="not installed: awk")
@pytest.mark.parametrize("text", ["", "{", '{"a"', '{"a": ', "[1,", '{"a": "b', "]", "nonsense", '{"a" 1}'])
def test_broken_metadata_ends(text: str) -> None:
    subprocess.run(
        ["awk", "-f", str(HERE / "files/root/lib/kilonova/json.awk")],
        input=text.encode(), capture_output=True, timeout=5, check=False,
    )  # fmt: skip


# ---- the build


def a_built_image(cache: Path) -> Path:
    """A directory that looks like what a build leaves."""
    home = cache / f"image-{recipe()}-abc"
    home.mkdir(parents=True)
    sizes = {}
    for name in ("kernel", "initrd", "disk"):
        (home / name).write_bytes(name.encode())
        sizes[name] = len(name)
    record = {"version": "v", "kernel_release": "6.1", "sizes": sizes, "sha256": {}}
    (home / "image.json").write_bytes(msgspec.json.encode(record))
    return home


def test_what_is_built_is_found_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = a_built_image(tmp_path)
    monkeypatch.setenv("PATH", "")
    image = build(tmp_path, progress=lambda s: pytest.fail(s))
    assert (image.disk, image.version) == (home / "disk", "v")


@pytest.mark.parametrize("harm", ["truncated", "no record", "half a record"])
def test_half_an_image_is_none(harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = a_built_image(tmp_path)
    match harm:
        case "truncated":
            (home / "disk").write_bytes(b"di")
        case "no record":
            (home / "image.json").unlink()
        case _:
            (home / "image.json").write_bytes(b'{"version": ')
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises((Unavailable, Unsupported)):
        build(tmp_path, progress=lambda s: None)


def test_a_machine_without_apt_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("refused for its processor first")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="apt-get, apt-cache, dpkg-deb"):
        build(tmp_path / "cache", progress=lambda s: None)


def programs(directory: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """A PATH on which apt and dpkg-deb are these shell scripts."""
    directory.mkdir()
    for name in ("apt-get", "apt-cache", "dpkg-deb"):
        (directory / name).write_text("#!/bin/sh\n" + scripts.get(name.replace("-", "_"), "exit 1\n"))
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="refused for its processor first")
def test_missing_package_lists_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path / "bin", monkeypatch, apt_cache="echo 'E: No packages found' >&2; exit 100\n")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match=r"No packages found.*apt-get update"):
        build(tmp_path / "cache", progress=lambda s: None)
    assert not list((tmp_path / "cache").glob("image-*"))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="refused for its processor first")
def test_root_refreshes_the_lists_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    apt_get = f'case "$*" in *update*) echo updated >> {log};; esac\n'
    programs(tmp_path / "bin", monkeypatch, apt_cache="exit 100\n", apt_get=apt_get)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    told: list[str] = []
    with pytest.raises(Unavailable):
        build(tmp_path / "cache", progress=told.append)
    assert log.read_text() == "updated\n" and any("refreshing" in s for s in told)


def test_a_package_that_came_half_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path / "bin", monkeypatch, apt_get="echo short > a_1_amd64.deb\n")
    with pytest.raises(Unavailable, match=r"a_1_amd64\.deb"):
        debian.fetched([debian.Package("a", "a_1_amd64.deb", 999, "")], tmp_path / "packages", lambda s: None)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="refused for its processor first")
def test_two_builds_at_once_are_one(tmp_path: Path) -> None:
    """The second waits for the first, and takes what it left."""
    told: list[str] = []
    waiting = threading.Event()

    def hear(sentence: str) -> None:
        told.append(sentence)
        waiting.set()

    with alone(tmp_path, told.append):
        second = threading.Thread(target=build, args=(tmp_path,), kwargs={"progress": hear})
        second.start()
        assert waiting.wait(10)
        a_built_image(tmp_path)
    second.join(10)
    assert not second.is_alive()
    assert told == ["waiting for another process that builds the guest image"]
