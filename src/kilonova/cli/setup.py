"""What Kilonova needs of the machine, and how it comes there: Debian's packages, named by what they are for.

Whether a package is there is asked of the file system (does the program exist?), not of dpkg: that takes under a
millisecond, and something the operator installed by other means counts as well.

The lists are the shortest that do the work.  `libvirt-daemon-system` is not among them: it would add 40 packages,
systemd with them, and start a daemon; we start a private one.  libvirt's Python module is Debian's own, linked into
the virtual environment: with libvirt there, 0.1 MB, against 74 MB and a compiler for building it.
"""

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from kilonova.cli import prepare
from kilonova.kit.errors import Forbidden, Unavailable, Unsupported

LISTS = Path("/var/lib/apt/lists")
DEBIANS_PYTHON = Path("/usr/lib/python3/dist-packages")
DAY_S = 86_400


class Need(NamedTuple):
    """A Debian package, and what shows that it (or what it stands for) is there: a program, or a path with `*`."""

    package: str
    proof: str


QEMU = {"x86_64": "x86", "aarch64": "arm", "ppc64le": "ppc", "riscv64": "misc", "s390x": "misc"}
MACHINE = platform.machine()

# fmt: off
FEATURES: dict[str, tuple[Need, ...]] = {
    "libvirt": (
        Need(f"qemu-system-{QEMU.get(MACHINE, 'x86')}", f"qemu-system-{MACHINE}"),
        Need("qemu-utils",                               "qemu-img"),
        Need("libvirt-daemon",                           "libvirtd"),
        Need("libvirt-daemon-driver-qemu",               "/usr/lib/*/libvirt/connection-driver/libvirt_driver_qemu.so"),
    ),
    "network": (
        Need("dnsmasq-base",   "dnsmasq"),
        Need("nftables",       "nft"),
        Need("iproute2",       "ip"),
    ),
    "userns": (
        Need("uidmap",         "newuidmap"),
    ),
    "fleet": (  # private ones, for tests: an operator's run elsewhere
        Need("rabbitmq-server", "/usr/lib/rabbitmq/bin/rabbitmq-server"),
        Need("postgresql",      "/usr/lib/postgresql/*/bin/postgres"),
        Need("mariadb-server",  "mariadbd"),
    ),
    "test": (
        Need("openssh-client", "ssh"),
        Need("iputils-ping",   "ping"),
    ),
}
# fmt: on

BUILD = (Need("libvirt-dev", "/usr/include/libvirt/libvirt.h"), Need("gcc", "cc"), Need("pkg-config", "pkg-config"))


def ensure(
    features: Iterable[str], *, say: Callable[[str], None], ask: Callable[[str], bool] = lambda question: True
) -> None:
    """Afterwards the machine has what `features` (keys of FEATURES, and `guest`) need.

    Packages are named by `say` and installed after `ask` agreed.  Raises Forbidden with the one command to type when
    we may not install, Unsupported where there is no apt, Unavailable when apt fails.
    """
    features = set(features)
    if missing := needed(features):
        install(missing, say=say, ask=ask)
    if "libvirt" in features:
        libvirt_module()


def needed(features: Iterable[str]) -> list[str]:
    """The Debian packages that are missing here, sorted."""
    needs = {need for feature in features for need in _needs(feature)}
    return sorted(need.package for need in needs if not there(need.proof))


def there(proof: str) -> bool:
    """A program is looked for beyond PATH too: an ordinary user's has no /usr/sbin."""
    if proof.startswith("/"):
        return any(True for _ in Path("/").glob(proof.lstrip("/")))
    return shutil.which(proof, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin:/usr/local/sbin") is not None


def install(packages: list[str], *, say: Callable[[str], None], ask: Callable[[str], bool]) -> None:
    """By apt-get, which asks nothing and waits for others who use it; its words go to a file that is shown on failure."""
    names = " ".join(packages)
    if not shutil.which("apt-get"):
        raise Unsupported(f"These Debian packages are missing, and there is no apt-get: {names}")
    command = f"apt-get install --no-install-recommends {names}"
    if os.geteuid() != 0:
        raise Forbidden(f"Some Debian packages are missing. Type once:\n  sudo {command}")
    say(f"Missing here, and installed from Debian: {names}")
    if not ask("Go on?"):
        raise Forbidden(f"Nothing was installed. To do it yourself:\n  {command}")

    descriptor, log = tempfile.mkstemp(prefix="kilonova-apt-", suffix=".log")
    with open(descriptor, "wb") as out, prepare.doing(f"Installing {prepare.count(len(packages), 'Debian package')}"):  # noqa: PTH123
        done = (_lists_are_fresh() or _apt("update", out=out)) and _apt("install", *packages, out=out)
        done = done or (
            _apt("update", out=out) and _apt("install", *packages, out=out)
        )  # the lists were older than we thought
        if not done or (left := [p for p in packages if not _is_installed(p)]):
            said = [line for line in Path(log).read_text(errors="replace").splitlines() if line.startswith("E:")]
            reason = "\n  ".join(said[-3:]) or (f"not installed: {' '.join(left)}" if done else "no reason given")
            raise Unavailable(f"Debian's packages could not be installed:\n  {reason}\nThe whole story is in {log}")
    Path(log).unlink()


def libvirt_module() -> None:
    """Lets `import libvirt` work in this virtual environment: Debian's own module, when it was made for this Python."""
    if importlib.util.find_spec("libvirt"):
        return
    site = Path(sysconfig.get_path("purelib"))
    module = DEBIANS_PYTHON / f"libvirtmod{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        if module.exists() and sys.prefix != sys.base_prefix:
            for file in DEBIANS_PYTHON.glob("libvirt*"):
                if file.suffix in (".py", ".so"):
                    link = site / file.name
                    link.unlink(missing_ok=True)
                    link.symlink_to(file)
        else:
            prepare.ready(Path(sys.prefix), "libvirt")
    except PermissionError:
        raise Forbidden(f"libvirt's Python module is missing in {sys.prefix}, which you may not write.") from None
    except prepare.Failed as failed:
        raise Unavailable(str(failed)) from None
    importlib.invalidate_caches()


def agree(question: str) -> bool:
    """Asks a person; where there is none, the answer is yes."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    print(f"{question} [Y/n] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("", "y", "yes")


def _needs(feature: str) -> tuple[Need, ...]:
    if feature == "guest":
        return _guest()
    if feature == "libvirt" and not importlib.util.find_spec("libvirt"):
        if sysconfig.get_config_var("EXT_SUFFIX") == _debians_suffix():
            return *FEATURES[feature], Need("python3-libvirt", f"{DEBIANS_PYTHON}/libvirtmod.*.so")
        return *FEATURES[feature], *BUILD
    return FEATURES[feature]


def _guest() -> tuple[Need, ...]:
    """What the builder of the guest image says it needs: names of packages, or package → proof."""
    try:
        wanted = importlib.import_module("kilonova.companions.guest").HOST_PACKAGES
    except (ImportError, AttributeError):
        return ()
    known = wanted if isinstance(wanted, Mapping) else {p: f"/var/lib/dpkg/info/{p}[.:]*list" for p in wanted}
    return tuple(Need(package, proof) for package, proof in known.items())


def _debians_suffix() -> str | None:
    """What Debian's own Python calls its extension modules; None when there is no such Python."""
    python = Path("/usr/bin/python3").resolve().name.removeprefix("python")  # 3.11
    if not python.startswith("3.") or not shutil.which("apt-get"):
        return None
    return f".cpython-{python.replace('.', '')}-{sysconfig.get_config_var('MULTIARCH') or MACHINE + '-linux-gnu'}.so"


def _lists_are_fresh() -> bool:
    newest = max((f.stat().st_mtime for f in LISTS.glob("*_Packages*")), default=0.0)
    stamp = Path("/var/lib/apt/periodic/update-success-stamp")
    newest = max(newest and LISTS.stat().st_mtime, stamp.stat().st_mtime if stamp.exists() else 0.0)
    return time.time() - newest < DAY_S


def _apt(*words: str, out: object) -> bool:
    quiet = "-q -y --no-install-recommends -o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-confold".split()
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    return subprocess.call(["apt-get", *quiet, *words], env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out) == 0  # type: ignore[arg-type]


def _is_installed(package: str) -> bool:
    asked = ["dpkg-query", "-W", "-f", "${db:Status-Status}", package]
    return "installed" in subprocess.run(asked, capture_output=True, text=True, check=False).stdout
