"""Build the guest image from Debian's kernel, busybox and dropbear.

What the image does and why it is made so: docs/decisions/guest-image.md. What runs in it lies in files/.
"""

import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from kilonova.companions.guest import debian, disk
from kilonova.kit.errors import Unavailable

HERE = Path(__file__).parent
KERNEL = "linux-image-cloud-amd64"
USERLAND = ("busybox-static", "dropbear-bin", "e2fsprogs")
# The userland's packages draw in more than is used; these never reach the image and are large.
UNUSED = {"gcc-12-base", "gcc-14-base", "logsave", "libss2", "debconf", "cdebconf"}
PROGRAMS = {"dropbear": "usr/sbin", "dropbearkey": "usr/bin", "dbclient": "usr/bin", "resize2fs": "sbin"}

# By the time the disk's root is mounted; and after that.
EARLY_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_scsi", "sd_mod", "sr_mod", "ata_piix")
LATE_MODULES = (
    "virtio_console", "virtio_rng", "virtio_balloon", "virtio_mem", "button", "evdev",
    "isofs", "vfat", "nls_cp437", "nls_ascii", "nls_utf8", "8021q", "crc32c_intel",
)  # fmt: skip

# Each word is there because a measurement asked for it: docs/decisions/guest-image.md.
COMMAND_LINE = (
    "console=tty0 console=ttyS0,115200 net.ifnames=0 loglevel=6 nokaslr mitigations=off no_timer_check "
    "noreplace-smp cryptomgr.notests initcall_blacklist=crypto_kdf108_init,load_system_certificate_list,"
    "cubictcp_register,bpf_tcp_ca_kfunc_init,bpf_rstat_kfunc_init,kfunc_init,bpf_key_sig_kfuncs_init,"
    "bpf_prog_test_run_init,init_kprobe_trace,tracer_init_tracefs,trace_eval_init,trace_eval_sync,init_blk_tracer,"
    "event_trace_init"
)
ROOT_MIB = 24
MIN_RAM_MB = 80


class GuestImage(msgspec.Struct, frozen=True):
    """A built image. `disk` boots from any BIOS; kernel, initrd and `command_line` boot it without its boot sector.

    `sizes` are bytes and `sha256` hex digests, both by "kernel", "initrd" and "disk". `version` names recipe and
    packages: equal versions are equal guests.
    """

    version: str
    kernel: Path
    initrd: Path
    disk: Path
    sizes: dict[str, int]
    sha256: dict[str, str]
    kernel_release: str
    disk_format: str = "raw"
    min_ram_mb: int = MIN_RAM_MB
    command_line: str = COMMAND_LINE
    login: str = "kilonova"


class _Record(msgspec.Struct):
    """What is kept beside the files of a built image, written last: a directory without it is no image."""

    version: str
    kernel_release: str
    sizes: dict[str, int]
    sha256: dict[str, str]


def build(cache_dir: Path, *, progress: Callable[[str], None]) -> GuestImage:
    """The guest image of this recipe: from the cache in milliseconds, else built in some ten seconds.

    Needs no rights: packages are fetched as files and unpacked beside the image. Any number of processes may call it
    at once; one builds. `progress` is told, in sentences, what takes time. Newer Debian packages alone do not make a
    new image: remove `cache_dir` for that. Raises Unavailable, with what to do, when packages cannot be had, and
    Unsupported on a machine that is not x86_64.
    """
    if known := _known(cache_dir):
        return known
    debian.check_host()
    cache_dir.mkdir(parents=True, exist_ok=True)
    with alone(cache_dir, progress):
        if known := _known(cache_dir):  # somebody else built it while we waited
            return known
        try:
            packages = _packages(cache_dir, progress)
        except Unavailable:
            if not debian.refreshed(progress):
                raise
            packages = _packages(cache_dir, progress)
        work = Path(tempfile.mkdtemp(prefix=".build-", dir=cache_dir))
        try:
            version = _version(packages)
            _build(packages, version, work, progress)
            final = cache_dir / f"image-{version}"
            shutil.rmtree(final, ignore_errors=True)
            (work / "image").rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _tidy(cache_dir, final, {p.name for p in packages})
    built = _known(cache_dir)
    assert built is not None
    return built


# ---- what is known already


def recipe() -> str:
    """A digest of all that decides how the image comes out, but the packages."""
    digest = hashlib.sha256()
    for path in sorted(p for p in HERE.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        digest.update(str(path.relative_to(HERE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(packages: list[Path]) -> str:
    names = "\n".join(sorted(p.name for p in packages))
    return f"{recipe()}-{hashlib.sha256(names.encode()).hexdigest()[:12]}"


def _known(cache_dir: Path) -> GuestImage | None:
    for directory in sorted(cache_dir.glob(f"image-{recipe()}-*")):
        try:
            record = msgspec.json.decode((directory / "image.json").read_bytes(), type=_Record)
            files = {name: directory / name for name in ("kernel", "initrd", "disk")}
            if all(path.stat().st_size == record.sizes[name] for name, path in files.items()):
                return GuestImage(
                    version=record.version, kernel_release=record.kernel_release, sizes=record.sizes,
                    sha256=record.sha256, kernel=files["kernel"], initrd=files["initrd"], disk=files["disk"],
                )  # fmt: skip
        except (OSError, msgspec.MsgspecError):
            continue  # half an image is none
    return None


@contextmanager
def alone(cache_dir: Path, progress: Callable[[str], None]) -> Iterator[None]:
    with (cache_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that builds the guest image")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tidy(cache_dir: Path, keep: Path, packages: set[str]) -> None:
    """One image and its packages stay. Builds that a crash left behind go: nobody else builds, we hold the lock."""
    for path in (*cache_dir.glob("image-*"), *cache_dir.glob(".build-*")):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
    for path in (cache_dir / "packages").glob("*.deb"):
        if path.name not in packages:
            path.unlink(missing_ok=True)


# ---- the build


def _packages(cache_dir: Path, progress: Callable[[str], None]) -> list[Path]:
    names = [debian.dependency(KERNEL, "linux-image-"), *debian.closure(USERLAND)]
    return debian.fetched(debian.located([n for n in names if n not in UNUSED]), cache_dir / "packages", progress)


def _build(packages: list[Path], version: str, work: Path, progress: Callable[[str], None]) -> None:
    progress("unpacking the guest's kernel and programs")
    kernel_packages = [p for p in packages if p.name.startswith("linux-image-")]
    linux, userland, image = work / "linux", work / "userland", work / "image"
    debian.unpacked(kernel_packages, linux)
    debian.unpacked([p for p in packages if p not in kernel_packages], userland)

    progress("building the guest image")
    (tree,) = next(p for p in (linux / "lib/modules", linux / "usr/lib/modules") if p.is_dir()).iterdir()
    release = tree.name
    image.mkdir()
    kernel = (linux / f"boot/vmlinuz-{release}").read_bytes()
    initrd = _initrd(_find(userland, "bin/busybox"), tree)
    root = work / "root.img"
    _root_partition(userland, tree, work / "root", root)
    (image / "kernel").write_bytes(kernel)
    (image / "initrd").write_bytes(initrd)
    with (image / "disk").open("wb") as out:
        disk.write_disk(out, kernel=kernel, initrd=initrd, command_line=COMMAND_LINE, root=root)
    files = [image / name for name in ("kernel", "initrd", "disk")]
    record = _Record(version, release, {f.name: f.stat().st_size for f in files}, {f.name: _sha256(f) for f in files})
    (image / "image.json").write_bytes(msgspec.json.encode(record))


def _initrd(busybox: Path, tree: Path) -> bytes:
    """busybox, the modules a root disk needs, and files/initrd. Not compressed: to read it costs less than to unpack."""
    found, dep, alias = disk.modules(tree, EARLY_MODULES)
    home = f"lib/modules/{tree.name}"
    files: dict[str, tuple[int, bytes]] = {}
    for directory in ("bin", "dev", "proc", "sys", "root", "lib", "lib/modules", home):
        files[directory] = stat.S_IFDIR | 0o755, b""
    files["bin/busybox"] = stat.S_IFREG | 0o755, busybox.read_bytes()
    files["init"] = stat.S_IFREG | 0o755, (HERE / "files/initrd/init").read_bytes()
    for name, content in {"modules.dep": dep.encode(), "modules.alias": alias.encode()}.items():
        files[f"{home}/{name}"] = stat.S_IFREG | 0o644, content
    for name, content in found.items():
        files[f"{home}/{name}.ko"] = stat.S_IFREG | 0o644, content
    return disk.cpio(files)


def _root_partition(userland: Path, tree: Path, root: Path, out: Path) -> None:
    """The root file system: files/root, busybox and its names, dropbear with its libraries, the kernel's modules."""
    _skeleton(root)
    busybox = root / "bin/busybox"
    shutil.copy(_find(userland, "bin/busybox"), busybox)
    for name in subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split():
        if not (root / "bin" / name).exists():
            (root / "bin" / name).symlink_to("busybox")
    for name, directory in PROGRAMS.items():
        shutil.copy(_find(userland, f"{directory}/{name}"), root / "bin" / name)
    (root / "bin/ssh").symlink_to("dbclient")
    _libraries(userland, root)

    found, dep, aliases = disk.modules(tree, (*EARLY_MODULES, *LATE_MODULES))
    home = root / "lib/modules" / tree.name
    home.mkdir(parents=True)
    (home / "modules.dep").write_text(dep)
    (home / "modules.alias").write_text(aliases)
    for name, content in found.items():
        (home / f"{name}.ko").write_bytes(content)
    _file_system(userland, root, out)


def _skeleton(root: Path) -> None:
    """files/root with the directories, links and modes that a wheel does not carry."""
    shutil.copytree(HERE / "files/root", root)
    for directory in ("bin", "dev", "proc", "sys", "run", "mnt", "tmp", "root/.ssh", "home/kilonova", "etc/dropbear",
                      "var/lib/kilonova", "var/log", "lib64"):  # fmt: skip
        (root / directory).mkdir(parents=True, exist_ok=True)
    (root / "etc/dropbear/options").write_text("-s\n")
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.read_bytes()[:2] == b"#!" else 0o644)
    modes = {"etc/shadow": 0o600, "root": 0o700, "root/.ssh": 0o700, "home/kilonova": 0o700, "tmp": 0o1777}
    for name, mode in modes.items():
        (root / name).chmod(mode)
    links = {"sbin": "bin", "usr": ".", "etc/mtab": "../proc/mounts", "var/run": "../run",
             "home/kilonova/.ssh": "/root/.ssh"}  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)


def _file_system(userland: Path, root: Path, out: Path) -> None:
    features = "^64bit,^metadata_csum,^orphan_file"
    options = ["-q", "-t", "ext4", "-L", "kilonova", "-O", features, "-b", "4096", "-I", "256", "-N", "2048",
               "-J", "size=4", "-m", "0", "-E", "root_owner=0:0,lazy_itable_init=0"]  # fmt: skip
    mke2fs: list[str | Path] = [*_run_from(userland), _find(userland, "sbin/mke2fs"), *options]
    environment = {**os.environ, "MKE2FS_CONFIG": str(userland / "etc/mke2fs.conf"), "LC_ALL": "C"}
    done = subprocess.run(
        [*mke2fs, "-d", root, out, f"{ROOT_MIB}M"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip() or f"mke2fs ended with {done.returncode}"
        raise Unavailable(f"the guest's root file system could not be made: {reason}")
    disk.owned_by_root(out)


def _libraries(userland: Path, root: Path) -> None:
    """The shared libraries of PROGRAMS, found as the guest will find them: by the packages' own loader."""
    run_from = _run_from(userland)
    home = root / "lib/x86_64-linux-gnu"
    home.mkdir(parents=True)
    shutil.copy(run_from[0], root / "lib64/ld-linux-x86-64.so.2")
    for name in PROGRAMS:
        command = [*run_from, "--list", root / "bin" / name]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            library, _, path = line.strip().partition(" => ")
            if path and not (home / library).exists():
                shutil.copy(path.split(" (")[0], home / library)


def _run_from(userland: Path) -> list[str | Path]:
    """The words before a program of unpacked packages that run it with their loader and libraries, not the host's."""
    paths = [p for p in (userland / "lib/x86_64-linux-gnu", userland / "usr/lib/x86_64-linux-gnu") if p.is_dir()]
    for path in paths:
        if (path / "ld-linux-x86-64.so.2").exists():
            return [path / "ld-linux-x86-64.so.2", "--library-path", ":".join(str(p) for p in paths)]
    raise Unavailable("Debian's packages hold no dynamic loader here", why=str(userland))


def _find(tree: Path, path: str) -> Path:
    """A program in an unpacked package, wherever this Debian has it: /bin and /usr/bin have become one."""
    for candidate in (tree / path, tree / "usr" / path):
        if candidate.is_file():
            return candidate
    raise Unavailable(f"Debian's packages hold no {path} here", why=str(tree))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
