"""Debian packages, fetched and unpacked by an ordinary user: apt checks their signatures, nothing is installed."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from kilonova.kit.errors import Unavailable, Unsupported

FETCH_TIMEOUT_S = 900


class Package(msgspec.Struct, frozen=True):
    """A package file as the archive has it. `digest` is "SHA256:hex" or what else apt knows it by."""

    name: str
    file: str
    size: int
    digest: str


def check_host() -> None:
    """Raise Unavailable or Unsupported if this machine cannot fetch or run such packages at all."""
    if os.uname().machine != "x86_64":
        raise Unsupported(f"the guest image is built on x86_64 only, and this machine is {os.uname().machine}")
    missing = [p for p in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(p) is None]
    if missing:
        raise Unavailable(
            f"the guest image is made from Debian packages, and {', '.join(missing)} cannot be found: "
            "give an image of your own instead"
        )


def dependency(meta: str, prefix: str) -> str:
    """The package starting with `prefix` on which the package `meta` depends, as on the kernel of today."""
    for line in _apt("apt-cache", "depends", meta).splitlines():
        kind, _, name = line.strip().partition(": ")
        if kind == "Depends" and name.startswith(prefix):
            return name
    raise Unavailable(f"Debian's package {meta} leads to no {prefix}… here", why=meta)


def closure(names: Iterable[str]) -> list[str]:
    """The packages and all they depend on, without recommendations."""
    sparing = [f"--no-{w}" for w in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    out = _apt("apt-cache", "depends", "--recurse", *sparing, *names)
    return [line for line in out.splitlines() if line and line[0] not in " <|"]


def located(names: Sequence[str]) -> list[Package]:
    """Where the archive has these packages, as the machine's package lists say; asks no network."""
    out = []
    for line in _apt("apt-get", "download", "--print-uris", *names).splitlines():
        _uri, file, size, *digest = line.rsplit(" ", 3) if line.count(" ") >= 3 else (line, "", "0", "")
        out.append(Package(file.partition("_")[0], file, int(size), digest[0] if digest else ""))
    return out


def fetched(packages: Sequence[Package], into: Path, progress: Callable[[str], None]) -> list[Path]:
    """The package files in the directory `into`; those that are missing there are fetched."""
    into.mkdir(parents=True, exist_ok=True)
    missing = [p for p in packages if not _whole(into, p)]
    if missing:
        progress(f"fetching {len(missing)} Debian packages, {sum(p.size for p in missing) / 1e6:.0f} MB")
        _apt("apt-get", "download", "-q", *(p.name for p in missing), cwd=into)
        if lost := [p.file for p in missing if not _whole(into, p)]:
            raise Unavailable(f"Debian packages did not arrive whole: {', '.join(lost)}")
    return [into / p.file for p in packages]


def unpacked(packages: Iterable[Path], into: Path) -> None:
    for package in packages:
        done = subprocess.run(["dpkg-deb", "-x", package, into], capture_output=True, text=True, check=False)
        if done.returncode:
            package.unlink(missing_ok=True)
            raise Unavailable(f"the Debian package {package.name} is damaged; it will be fetched anew", why=done.stderr)


def refreshed(progress: Callable[[str], None]) -> bool:
    """Bring the machine's package lists up to date, if we may. False if not."""
    if os.geteuid() != 0:
        return False
    progress("refreshing Debian's package lists")
    _apt("apt-get", "update", "-q")
    return True


def _whole(directory: Path, package: Package) -> bool:
    path = directory / package.file
    return path.is_file() and path.stat().st_size == package.size


def _apt(*command: str, cwd: Path | None = None) -> str:
    options = ["-o", "APT::Sandbox::User=root"] if command[0] == "apt-get" and os.geteuid() == 0 else []
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            [command[0], *options, *command[1:]],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unavailable(f"'{' '.join(command[:2])}' gave no answer for {FETCH_TIMEOUT_S} s") from None
    if done.returncode:
        errors = [line[3:] for line in done.stderr.splitlines() if line.startswith("E: ")]
        raise Unavailable(
            f"Debian's archive could not be read ({errors[0] if errors else 'no reason given'}). "
            "Check the network, and run 'apt-get update' as root",
            why=done.stderr,
        )
    return done.stdout
