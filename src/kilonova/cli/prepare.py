"""The virtual environment: made when there is none that fits, with the packages of `pyproject.toml`.

Run by whatever Python the launcher found, before a single package is there: the standard library is all it has.
`./kilonova test` calls `ready` once more, for what only tests need.

pip does the work, not uv: uv is faster (2 s against 9 s, measured on two cores), but does not read the machine's
pip configuration, where mirrors and certificates stand.  Instead the environment is made without a pip of its own
(2 s less), and files are not compiled beforehand (2 s less); what is used is compiled when it is first imported.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

CODE = Path(__file__).resolve().parents[2]
ROOT = CODE.parent
LOCK = ROOT / "requirements.lock"


class Failed(Exception):
    """A sentence for whoever typed the command."""


def main() -> None:
    if sys.argv[1:] == ["--freeze"]:
        print(freeze())
        return
    try:
        ready(Path(sys.argv[1]))
    except Failed as failed:
        print(f"kilonova: {failed}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def ready(venv: Path, extra: str = "") -> None:
    """Afterwards `venv` holds what `pyproject.toml` asks for: what runs Kilonova, or besides an `extra` of it.

    May be called by many at once, and is finished by the next call when a call was killed.  Raises Failed.
    """
    with _alone(venv):
        stamp = venv / f"kilonova{'-' * bool(extra)}{extra}.stamp"
        digest = _digest(extra)
        if not (stamp.is_file() and stamp.read_text() == digest and os.access(venv / "bin/python", os.X_OK)):
            if not extra:
                _create(venv)
            _install(venv, _requirements(extra), f"{' for ' * bool(extra)}{extra}")
            stamp.write_text(digest)
        with contextlib.suppress(PermissionError):  # somebody else's: it fits, only the launcher's short way is lost
            os.utime(stamp)


def freeze() -> str:
    """What this environment holds, as a lock: `.venv/bin/python src/kilonova/cli/prepare.py --freeze > requirements.lock`."""
    import importlib.metadata

    found = {f"{d.name.lower().replace('_', '-')}=={d.version}" for d in importlib.metadata.distributions()}
    return "\n".join(sorted(found))


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Tells what takes long before it begins, and how long it took: `Installing 12 packages … 9.1 s`."""
    begun = time.monotonic()
    print(f"{what} … ", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print("failed", file=sys.stderr, flush=True)
        raise
    print(f"{time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)


def count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


# ---- what is asked for


def _requirements(extra: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements: list[str] = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return requirements


def _digest(extra: str) -> str:
    lock = LOCK.read_text() if LOCK.exists() else ""
    made_from = [_requirements(extra), lock, sysconfig.get_python_version(), str(CODE)]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


# ---- making it


@contextlib.contextmanager
def _alone(venv: Path) -> Iterator[None]:
    """One process at a time: the others wait, and find the work done."""
    try:
        venv.mkdir(parents=True, exist_ok=True)
        lock = (venv / "kilonova.lock").open("a")
    except PermissionError:  # somebody else's environment, which we may only use
        yield
        return
    except OSError as error:
        raise Failed(f"cannot make a virtual environment in {venv}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another kilonova is preparing {venv}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _create(venv: Path) -> None:
    """From nothing: what an older Python or a killed call left there would only be half right."""
    version = sysconfig.get_python_version()
    if os.access(venv / "bin/python", os.X_OK) and (venv / "lib" / f"python{version}").is_dir():
        return
    with doing(f"Making a virtual environment with Python {version} in {venv}"):
        for old in venv.iterdir():
            if old.name != "kilonova.lock":
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        try:
            import venv as maker
        except ImportError:
            raise Failed(f"Python's venv is missing; type: {_apt('python3-venv')}") from None
        maker.EnvBuilder(symlinks=True, with_pip=False).create(venv)
        # By its full name: should Debian's python3 become another one day, this link breaks and all is made anew.
        (venv / "bin/python").unlink()
        (venv / "bin/python").symlink_to(Path(sys.executable).resolve())
        site = venv / "lib" / f"python{version}" / "site-packages"
        inside = venv.parent == ROOT  # then the checkout may be moved as a whole
        (site / "kilonova.pth").write_text(f"{os.path.relpath(CODE, site) if inside else CODE}\n")


def _install(venv: Path, requirements: list[str], why: str) -> None:
    """By pip, wheels only (libvirt has none), in the versions of the lock. Where these cannot be had, in those that can."""
    pip = _pip(venv)
    always = "install --quiet --no-input --no-compile --disable-pip-version-check --no-warn-script-location".split()
    locked = [
        "--only-binary",
        ":all:",
        "--no-binary",
        "libvirt-python",
        *(["--constraint", str(LOCK)] if LOCK.exists() else []),
    ]
    log = venv / "kilonova-pip.log"
    with doing(f"Installing {count(len(requirements), 'Python package')}{why}"):
        for how in locked, ["--prefer-binary"]:
            with log.open("w") as out:
                command = [*pip, *always, *how, *requirements]
                if not subprocess.call(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=_env()):
                    return
            if "No matching distribution" not in log.read_text():
                break
        errors = [line for line in log.read_text().splitlines() if line.startswith("ERROR")]
        said = "\n  ".join(errors[-3:]) or "no reason given"
        raise Failed(f"the Python packages could not be installed:\n  {said}\nThe whole story is in {log}.")


def _pip(venv: Path) -> list[str]:
    """A way to call some pip upon `venv`: Python carries one as a wheel, Debian in a package of its own."""
    python = str(venv / "bin/python")
    if wheel := _bundled():
        return [python, f"{wheel}/pip"]
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
        return [sys.executable, "-m", "pip", "--python", python]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        with doing("Installing Debian's python3-pip-whl"):
            env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            install = (
                "apt-get install -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 python3-pip-whl".split()
            )
            for command in install, ["apt-get", "update", "-qq"], install:
                done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
                if done.returncode == 0 and command is install:
                    break
        if wheel := _bundled():
            return [python, f"{wheel}/pip"]
    raise Failed(f"Python has no pip here; type: {_apt('python3-venv')}")


def _bundled() -> Path | None:
    places = sysconfig.get_config_var("WHEEL_PKG_DIR"), f"{sysconfig.get_path('stdlib')}/ensurepip/_bundled"
    return max((w for place in places if place for w in Path(place).glob("pip-*.whl")), default=None)


def _env() -> Mapping[str, str]:
    """The machine's pip configuration counts, but not where it would install to."""
    gone = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIRE_VIRTUALENV"}
    return {k: v for k, v in os.environ.items() if k not in gone} | {"PIP_USER": "0", "PIP_ROOT_USER_ACTION": "ignore"}


def _apt(package: str) -> str:
    return f"{'' if os.geteuid() == 0 else 'sudo '}apt-get install {package}"


if __name__ == "__main__":
    main()
