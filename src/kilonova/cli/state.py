"""The directory where a cloud lives: its database, images, machines, keys, and who is at work in it.

Nothing in it is for another user's eyes: the directory is 0700, secrets are 0600.
"""

import fcntl
import hashlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from kilonova.kit.clock import Ids
from kilonova.kit.errors import Conflict, Refused, Unavailable


class Secrets(msgspec.Struct, forbid_unknown_fields=False):
    """Made once, kept in `secrets.json`."""

    admin_password: str
    service_password: str
    metadata_secret: str
    cloud: str  # a name for this cloud, in hex: namespaces and the like are called after it
    port: int = 0  # the one it took when it was made

    def __repr__(self) -> str:
        return "Secrets(***)"


class Running(msgspec.Struct):
    """Who holds the directory now: `running.json`. `began` is the kernel's start time of the process, in ticks."""

    pid: int
    began: str
    url: str = ""
    since: float = 0
    ca_file: str = ""  # whom its clients must trust; "": whom this machine does


MARK = "kilonova.lock"  # who is at work holds it; a directory that has none is no cloud's


def is_home(path: Path) -> bool:
    """Does a cloud live there? Nothing else is ever removed."""
    return (path / MARK).is_file()


class StateDir:
    """`path` is made where it is not there. Raises Unavailable where it cannot be, Conflict where it is something else's."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        try:
            if self.path.is_dir() and not is_home(self.path) and any(self.path.iterdir()):
                raise Conflict(f"{self.path} is not empty, and no cloud lives in it: name a directory of its own.")
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.chmod(0o700)
            if not is_home(self.path):
                (self.path / MARK).touch(0o600)
        except FileExistsError:
            raise Unavailable(f"Cannot keep a cloud in {self.path}: it is no directory.") from None
        except OSError as e:
            raise Unavailable(f"Cannot keep a cloud in {self.path}: {e.strerror}.") from None

    @property
    def clouds(self) -> Path:
        return self.path / "clouds.yaml"

    @property
    def openrc(self) -> Path:
        return self.path / "openrc"

    @property
    def metadata(self) -> Path:
        """The socket where guests under QEMU's user networking find the metadata service."""
        return self.path / "metadata"

    @property
    def log(self) -> Path:
        return self.path / "kilonova.log"

    @property
    def name(self) -> str:
        """Six hex digits of the path: what this cloud makes outside its directory bears them."""
        return hashlib.sha256(str(self.path).encode()).hexdigest()[:6]

    def secrets(self, ids: Ids, admin_password: str = "") -> Secrets:
        """What was made once; made now where there is nothing yet."""
        file = self.path / "secrets.json"
        if file.exists():
            try:
                known = msgspec.json.decode(file.read_bytes(), type=Secrets)
            except msgspec.MsgspecError as e:
                raise Refused(f"{file} cannot be understood: {e}.") from None
        else:
            known = Secrets(admin_password or ids.password(20), ids.password(32), ids.hex(), ids.hex()[:6])
            self.keep(known)
        if admin_password and known.admin_password != admin_password:
            known.admin_password = admin_password
            self.keep(known)
        return known

    def keep(self, secrets: Secrets) -> None:
        private(self.path / "secrets.json", msgspec.json.format(msgspec.json.encode(secrets)))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only one cloud at a time in a directory. Raises Conflict, saying who is in it."""
        with (self.path / MARK).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                now = self.running()
                who = f" (process {now.pid}, {now.url})" if now else ""
                raise Conflict(f"This cloud is up already{who}: {self.path}") from None
            try:
                yield
            finally:
                (self.path / "running.json").unlink(missing_ok=True)

    @contextmanager
    def joined(self, names: Iterable[str]) -> Iterator[None]:
        """Several processes may be in a directory, one of each of these names; none while a whole cloud is up in it.

        Raises Conflict, saying what is there already.
        """
        with ExitStack() as held:
            for name, how in [(MARK, fcntl.LOCK_SH), *((f"{n}.lock", fcntl.LOCK_EX) for n in names)]:
                file = held.enter_context((self.path / name).open("a+"))
                try:
                    fcntl.flock(file, how | fcntl.LOCK_NB)
                except OSError:
                    what = "A whole cloud" if name == MARK else f"A process that is {name.removesuffix('.lock')}"
                    raise Conflict(f"{what} is at work in {self.path} already.") from None
            yield

    def tell(self, running: Running) -> None:
        private(self.path / "running.json", msgspec.json.encode(running))

    def running(self) -> Running | None:
        """Who is at work here; None when nobody is, whatever the file says."""
        try:
            known = msgspec.json.decode((self.path / "running.json").read_bytes(), type=Running)
        except (OSError, msgspec.DecodeError):
            return None
        return known if started(known.pid) == known.began else None

    def end(self, timeout_s: float) -> bool:
        """Ask who is at work here to stop, and wait for it. False: it did not in time."""
        now = self.running()
        if now is None:
            return True
        os.kill(now.pid, signal.SIGTERM)
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if started(now.pid) != now.began:
                return True
            time.sleep(0.05)
        return False


def private(file: Path, text: bytes | str) -> None:
    """Write a file that only its owner can read; whole or not at all."""
    new = file.with_name(f".{file.name}.new")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as f:
            f.write(text.encode() if isinstance(text, str) else text)
            f.flush()
            os.fsync(f.fileno())
        new.rename(file)
    except OSError as e:
        raise Unavailable(f"Cannot write {file}: {e.strerror}.") from None


def started(pid: int) -> str:
    """When the kernel started this process, in ticks since boot; "" when there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def usual(env: dict[str, str]) -> Path:
    """Under the user's state home (XDG Base Directory Specification)."""
    home = env.get("XDG_STATE_HOME") or str(Path(env.get("HOME", "/")) / ".local/state")
    return Path(home) / "kilonova"
