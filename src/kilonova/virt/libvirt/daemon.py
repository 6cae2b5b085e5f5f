"""A libvirtd to talk to: one that runs, or a private one of our own; and a connection to it that heals itself.

A private one is a process like any other of ours, but it is not our child: it has a session of its own, so Ctrl-C at
our terminal does not reach it, and it goes on when we die.  The next life of Kilonova finds it by a lock that its
keeper holds (`keeper.py`), never by a pid alone.  Why a private one, and how it is shut off from the machine's:
`docs/decisions/libvirt-private-daemon.md`.

Every call ends.  A daemon that is gone is noticed by its socket, one that hangs by libvirt's keepalive, and a QEMU
that hangs (for which libvirtd itself would wait for ever) because nobody waits longer than `timeout_s` for a call.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from kilonova.kit.clock import Ids
from kilonova.kit.errors import Unavailable, Unsupported
from kilonova.virt.libvirt import keeper

logger = logging.getLogger(__name__)
T = TypeVar("T")

PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
SOCKET_PATH_MAX = 107  # of a Unix socket's name; sockaddr_un.sun_path, with its zero byte, is 108
SYSTEM_LONGEST = len("/run/00000000-0000-0000-0000-000000000000.vnc")
SESSION_LONGEST = len("/c/libvirt/qemu/channel/target/domain-999-instance-00000000/org.qemu.guest_agent.0")
STARTING_S = 10.0
LOG_MAX_BYTES = 1 << 20


class Daemon(Protocol):
    """Where libvirt answers."""

    uri: str

    def ensure(self) -> None:
        """See that it runs. Raises Unavailable, or Unsupported when it can never."""
        ...

    def stuck(self) -> None:
        """It takes connections and does not answer: do what can be done."""
        ...

    def stop(self) -> None:
        """End it, where it is ours; guests go on."""
        ...


class Running:
    """A libvirtd that somebody else takes care of."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def ensure(self) -> None: ...

    def stuck(self) -> None: ...

    def stop(self) -> None: ...


class Private:
    """A libvirtd of our own, with its files under `directory`.

    As root (also one inside a user namespace): a whole one, in a mount and UTS namespace of its own, in which the
    directories that are compiled into libvirt are ours; if `netns` (a path) is given, in that network namespace.  As
    an ordinary user: a session daemon with private XDG directories.  `qemu` are lines added to qemu.conf.
    """

    def __init__(
        self, directory: Path, *, ids: Ids, netns: str | None = None, hostname: str = "", qemu: str = ""
    ) -> None:
        self.directory, self.netns, self.hostname = directory.absolute(), netns, hostname
        self.system = os.geteuid() == 0
        self.lock = threading.Lock()
        found = shutil.which("libvirtd", path=PATH)
        if not found:
            raise Unsupported("There is no libvirtd on this host (Debian: libvirt-daemon-driver-qemu).")
        self.libvirtd = found

        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        identity = self.directory / "host_uuid"
        if not identity.exists():
            _put(identity, ids.uuid())
        self.host_uuid = identity.read_text().strip()
        self.short = self._short()
        self.run = self.short / ("run" if self.system else "r/libvirt")
        self.socket = self.run / "libvirt-sock"
        self.uri = f"qemu+unix:///{'system' if self.system else 'session'}?socket={self.socket}"
        self.logs = self.directory / ("log" if self.system else "k/libvirt")
        self.qemu = qemu

    def ensure(self) -> None:
        with self.lock:
            note = self._configure()
            if self._kept() and self._running().get("note") == note:
                return
            self._end()
            self._forget_earlier_boots()
            self._start(note)

    def stuck(self) -> None:
        """The keeper starts another one."""
        with self.lock:
            logger.warning("libvirtd takes connections and does not answer: it is killed")
            self._signal("libvirtd", signal.SIGKILL)

    def stop(self) -> None:
        with self.lock:
            self._end()
            if self.short != self.directory:
                shutil.rmtree(self.short, ignore_errors=True)

    def pid(self) -> int | None:
        """Of the libvirtd that runs."""
        pid, since = self._running().get("libvirtd", (0, ""))
        return pid if since and keeper.started(pid) == since else None

    # ---- starting and ending

    def _start(self, note: dict[str, str]) -> None:
        log = self.logs / "libvirtd.log"
        if log.exists() and log.stat().st_size > LOG_MAX_BYTES:
            log.replace(log.with_suffix(".log.0"))
        # Not seeing D-Bus it asks no machined for cgroups, where two clouds' machines of one name would meet.
        environment = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": os.environ.get("HOME", "/")}
        environment["DBUS_SYSTEM_BUS_ADDRESS"] = "unix:path=/nonexistent"
        if self.system:
            script = self.directory / "inside.sh"
            _put(script, INSIDE)
            command = ["unshare", "-m", "-u", "--propagation", "private", "sh", "-eu", str(script)]
            command += [str(self.directory), str(self.run), self.hostname, self.libvirtd]
            if self.netns:
                # Not `ip netns exec`: that mounts another /sys, and libvirt would find no cgroups.
                command = ["nsenter", f"--net={self.netns}", *command]
        else:
            command = [self.libvirtd]
            for name, letter in XDG.items():
                environment[name] = str(self.short / letter)
        (self.directory / "running.json").unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)
        words = [msgspec.json.encode(note).decode(), *command]
        with (self.directory / "keeper.log").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, str(self.directory), *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd="/",
                env=environment,
            )
        threading.Thread(target=process.wait, name="libvirtd's keeper", daemon=True).start()
        end = time.monotonic() + STARTING_S
        while not self.socket.exists():  # libvirtd has no way to call us
            if process.poll() is not None or time.monotonic() > end:
                said = (self.directory / "keeper.log").read_text(errors="replace").strip().splitlines()
                raise Unavailable("libvirtd does not start on this host.", why="; ".join(said[-3:]) or f"see {log}")
            time.sleep(0.005)

    def _end(self) -> None:
        """The keeper, and libvirtd with it; also a libvirtd that lost its keeper."""
        self._signal("keeper", signal.SIGTERM)
        self._signal("libvirtd", signal.SIGTERM)
        end = time.monotonic() + 2 * keeper.PATIENCE_S
        while any(self._lives(who) for who in ("keeper", "libvirtd")) and time.monotonic() < end:
            time.sleep(0.01)
        self._signal("keeper", signal.SIGKILL)
        self._signal("libvirtd", signal.SIGKILL)

    def _kept(self) -> bool:
        """Is there a keeper? It may be just starting: then its word is waited for."""
        try:
            lock = os.open(self.directory / "keeper.lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            end = time.monotonic() + STARTING_S
            while not (there := self._answers()) and time.monotonic() < end:
                time.sleep(0.005)
            return there
        else:
            return False
        finally:
            os.close(lock)

    def _answers(self) -> bool:
        return self._lives("keeper") and self._lives("libvirtd") and self.socket.exists()

    def _running(self) -> dict[str, Any]:
        try:
            return msgspec.json.decode((self.directory / "running.json").read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.MsgspecError):
            return {}

    def _lives(self, who: str) -> bool:
        pid, since = self._running().get(who, (0, ""))
        return bool(since) and keeper.started(pid) == since

    def _signal(self, who: str, how: signal.Signals) -> None:
        if self._lives(who):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._running()[who][0], how)

    # ---- its files

    def _configure(self) -> dict[str, str]:
        """Writes what it is to read, and gives what a running one must agree with to be taken over."""
        self._make_directories()
        daemon = DAEMON_CONF.format(host_uuid=self.host_uuid)
        qemu = QEMU_CONF + self.qemu
        where = self.directory / ("etc" if self.system else "c/libvirt")
        if self.system:
            daemon += DAEMON_SYSTEM_CONF
            qemu += QEMU_SYSTEM_CONF + ("" if _cgroups() else "cgroup_controllers = []\n")
        else:
            # By its short name, which has no blank: libvirt would begin a second output behind one.
            daemon += f'log_outputs = "3:file:{self.short}/k/libvirt/libvirtd.log"\n'
        for name, text in (("libvirtd.conf", daemon), ("qemu.conf", qemu)):
            if not (where / name).exists() or (where / name).read_text() != text:
                _put(where / name, text)
        return {
            "configuration": hashlib.sha256((daemon + qemu + INSIDE + str(self.run)).encode()).hexdigest(),
            "networks": str(_inode(self.netns or "/proc/self/ns/net")),
            "users": str(_inode("/proc/self/ns/user")),
        }

    def _forget_earlier_boots(self) -> None:
        """What libvirt keeps in `run` tells of processes; those of another boot of the machine must not be believed."""
        kept, boot = self.directory / "boot_id", Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        if not kept.exists() or kept.read_text() != boot:
            shutil.rmtree(self.directory / "run", ignore_errors=True)
            self._make_directories()
            _put(kept, boot)

    def _make_directories(self) -> None:
        names = ("etc", "lib", "cache", "log", "run") if self.system else ("c/libvirt", "k/libvirt", "d", "run")
        for name in names:
            (self.directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.short != self.directory:
            self.short.mkdir(mode=0o700, exist_ok=True)
            links = {"run": "run"} if self.system else {"c": "c", "k": "k", "d": "d", "r": "run"}
            for here, there in links.items():
                link = self.short / here
                if not link.is_symlink() or link.readlink() != self.directory / there:
                    link.unlink(missing_ok=True)
                    link.symlink_to(self.directory / there)
        self.run.mkdir(mode=0o700, exist_ok=True)

    def _short(self) -> Path:
        """Where sockets get names that are short enough: our directory itself, or a private one of links into it.

        A session daemon's longest is `c/libvirt/qemu/channel/target/domain-…`: it always needs one.
        """
        if self.system and len(str(self.directory)) <= SOCKET_PATH_MAX - SYSTEM_LONGEST:
            return self.directory
        name = hashlib.sha256(str(self.directory).encode()).hexdigest()[:6]
        runtime = Path("/run" if self.system else os.environ.get("XDG_RUNTIME_DIR", "/"))
        short = runtime / f"kn-{name}"
        if len(str(short)) > SOCKET_PATH_MAX - SESSION_LONGEST or not os.access(runtime, os.W_OK):
            short = Path(tempfile.gettempdir()) / f"kn-{os.geteuid()}-{name}"
        short.mkdir(mode=0o700, exist_ok=True)
        found = short.lstat()
        if short.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise Unsupported(f"{short} belongs to somebody else.")
        return short


# Runs as root of the namespaces made for it. $1 our directory, $2 the one for sockets, $3 the host's name, $4 libvirtd.
# A directory that is missing and cannot be made (an ordinary user's namespace, on a machine where no libvirt ever ran)
# is made in an overlay upon its parent, which only this process tree sees.
# The user libvirt-qemu is made by a package of Debian's that we do not need (libvirt-daemon-system). We do not run as it,
# but libvirtd ends when it has no number, whatever qemu.conf says; so in here it has the one that Debian keeps for it.
INSIDE = """
at() {
    if ! mkdir -p "$2" 2>/dev/null; then
        parent=$(dirname "$2")
        case "$base/" in "$parent"/*) echo "cannot make $2" >&2; exit 1;; esac
        over="$base/over/$(basename "$parent")"
        mkdir -p "$over/upper" "$over/work"
        mount -t overlay overlay -o "lowerdir=$parent,upperdir=$over/upper,workdir=$over/work" "$parent"
        mkdir -p "$2"
    fi
    mount --bind "$1" "$2"
}
named() {
    if ! getent "$1" libvirt-qemu >/dev/null; then
        { cat "/etc/$1"; echo "$2"; } >"$base/$1"
        mount --bind "$base/$1" "/etc/$1"
    fi
}
base=$1; run=$2; name=$3; libvirtd=$4
if [ -n "$name" ]; then hostname "$name" 2>/dev/null || true; fi
if ! mkdir -p /run/libvirt 2>/dev/null; then mount -t tmpfs tmpfs /run; fi
at "$base/etc" /etc/libvirt
at "$base/lib" /var/lib/libvirt
at "$base/cache" /var/cache/libvirt
at "$base/log" /var/log/libvirt
at "$run" /run/libvirt
rm -f /run/libvirt/libvirt-sock*
named passwd libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin
named group libvirt-qemu:x:64055:
exec "$libvirtd" -f /etc/libvirt/libvirtd.conf -p /run/libvirt/libvirtd.pid
"""

XDG = {"XDG_CONFIG_HOME": "c", "XDG_CACHE_HOME": "k", "XDG_DATA_HOME": "d", "XDG_RUNTIME_DIR": "r"}

DAEMON_CONF = """\
host_uuid = "{host_uuid}"
auth_unix_rw = "none"
auth_unix_ro = "none"
max_client_requests = 64
max_workers = 64
"""

DAEMON_SYSTEM_CONF = """\
unix_sock_dir = "/run/libvirt"
unix_sock_rw_perms = "0700"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""

# Without virtlogd: QEMU writes its logs itself.
QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
max_core = 0
"""

QEMU_SYSTEM_CONF = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
swtpm_user = "root"
swtpm_group = "root"
"""


def _cgroups() -> bool:
    """May we make cgroups? Not in a user namespace, and not where a container shows them read-only."""
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        return False
    here = next((p for p in ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup") if Path(p).is_dir()), None)
    return here is not None and os.access(here, os.W_OK)


def _inode(path: str) -> int:
    try:
        return Path(path).stat().st_ino
    except OSError as e:
        raise Unavailable("The network of this host is not ready.", why=f"{path}: {e.strerror}") from None


def _put(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)
    part.replace(path)


# ---- the connection


class Link:
    """One connection that is made anew whenever it breaks, for many threads.

    `connected` is called with each new connection, before anybody else sees it, on the healing thread.
    """

    def __init__(self, daemon: Daemon, *, call_timeout_s: float, connected: Callable[[Any], None]) -> None:
        self.daemon, self.call_timeout_s, self.connected = daemon, call_timeout_s, connected
        self.lib = library()
        self.conn: Any = None
        self.why = ""
        self.attempts = 0
        self.closed = False
        self.changed = threading.Condition()
        self.places = threading.BoundedSemaphore(CALLS_MAX)
        self.healer = threading.Thread(target=self._heal, name="libvirt connection", daemon=True)
        self.healer.start()

    def call(self, act: Callable[[Any], T], timeout_s: float | None = None) -> T:
        """What `act(connection)` gives. libvirt's own errors pass through; raises Unavailable when it is away."""
        conn = self._connection()
        call = _Call(act, conn)
        limit = self.call_timeout_s if timeout_s is None else timeout_s
        if not self.places.acquire(timeout=limit):
            raise Unavailable("The hypervisor of this host is too busy.", why=f"{CALLS_MAX} calls do not come back")
        threading.Thread(target=self._carry, args=(call,), name="libvirt call", daemon=True).start()
        if not call.done.wait(limit):
            raise Unavailable("The hypervisor of this host does not answer.", why=f"a call took more than {limit:g} s")
        if call.error is None:
            return call.result  # type: ignore[no-any-return]
        if isinstance(call.error, self.lib.libvirtError) and self._is_lost(conn, call.error):
            raise Unavailable("The hypervisor of this host went away.", why=str(call.error)) from None
        raise call.error

    def ready(self, timeout_s: float) -> bool:
        """Waits for a connection."""
        with self.changed:
            return self.changed.wait_for(lambda: self.conn is not None, timeout_s)

    def close(self) -> None:
        with self.changed:
            self.closed, conn, self.conn = True, self.conn, None
            self.changed.notify_all()
        if conn is not None:
            with contextlib.suppress(self.lib.libvirtError):
                conn.unregisterCloseCallback()
            with contextlib.suppress(self.lib.libvirtError):
                conn.close()
        self.healer.join(timeout=STARTING_S)

    def _carry(self, call: "_Call") -> None:
        try:
            call.run()
        finally:
            self.places.release()

    def _connection(self) -> Any:
        """The one there is, or the next one. Where somebody else cares for libvirtd, one attempt is enough to know."""
        with self.changed:
            enough = self.attempts + (1 if isinstance(self.daemon, Running) else 1000)
            self.changed.wait_for(lambda: self.conn or self.closed or self.attempts > enough, CONNECTING_S)
            if self.conn is None:
                raise Unavailable("The hypervisor of this host cannot be reached.", why=self.why)
            return self.conn

    def _is_lost(self, conn: Any, error: Any) -> bool:
        """Was it the connection that failed, and not what was asked?"""
        gone = (self.lib.VIR_ERR_RPC, self.lib.VIR_ERR_INVALID_CONN, self.lib.VIR_ERR_NO_CONNECT)
        alive = False
        with contextlib.suppress(self.lib.libvirtError):
            alive = conn.isAlive() == 1
        if alive and error.get_error_code() not in gone and error.get_error_domain() != self.lib.VIR_FROM_RPC:
            return False
        self._lose(conn, str(error))
        return True

    def _lose(self, conn: Any, why: str) -> None:
        with self.changed:
            if self.conn is conn:
                self.conn, self.why = None, why
                self.changed.notify_all()
                if not self.closed:
                    logger.warning("the connection to libvirt is lost: %s", why)

    def _heal(self) -> None:
        wait_s = 0.0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.conn is None)
                if wait_s:
                    self.changed.wait_for(lambda: self.closed, wait_s)
                if self.closed:
                    return
            conn, why = None, ""
            try:
                self.daemon.ensure()
                conn = self._open()
                self.connected(conn)
            except Exception as e:  # whatever it was, it is tried again
                conn, why = None, getattr(e, "why", "") or str(e)
                if why != self.why:
                    logger.warning("no connection to libvirt: %s", why)
            with self.changed:
                self.conn, self.why, self.attempts = conn, why, self.attempts + 1
                self.changed.notify_all()
            wait_s = 0.0 if conn is not None else min(5.0, wait_s * 2 or 0.1)

    def _open(self) -> Any:
        """A socket's file is there a moment before somebody listens: so more than one try.

        And some time after he died: so not many, and then the daemon is looked after again.
        """
        end = time.monotonic() + LISTENING_S
        while True:
            call = _Call(self.lib.open, self.daemon.uri)
            threading.Thread(target=call.run, name="libvirt open", daemon=True).start()
            if not call.done.wait(CONNECTING_S):
                self.daemon.stuck()
                raise Unavailable("libvirtd takes the connection and does not answer")
            if call.error is None:
                break
            if time.monotonic() > end or self.closed or isinstance(self.daemon, Running):
                raise call.error
            time.sleep(0.01)
        conn: Any = call.result
        conn.setKeepAlive(5, 3)
        conn.registerCloseCallback(lambda conn, reason, _: self._lose(conn, f"closed ({reason})"), None)
        return conn


CALLS_MAX = 64
CONNECTING_S = 10.0
LISTENING_S = 0.5


class _Call:
    """One call, carried by a thread that may be left behind."""

    def __init__(self, act: Callable[[Any], Any], subject: Any) -> None:
        self.act, self.subject = act, subject
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.act(self.subject)
        except BaseException as e:
            self.error = e
        self.done.set()


_library_lock = threading.Lock()
_library: Any = None


def library() -> Any:
    """libvirt's module, with its event loop running on a thread of its own. Raises Unsupported where it is missing."""
    global _library
    with _library_lock:
        if _library is None:
            try:
                import libvirt
            except ImportError as e:
                raise Unsupported("Python's libvirt module is missing on this host.", why=str(e)) from None
            libvirt.registerErrorHandler(lambda context, error: None, None)  # it would print to stderr
            libvirt.virEventRegisterDefaultImpl()
            threading.Thread(target=_turn, args=(libvirt,), name="libvirt events", daemon=True).start()
            _library = libvirt
        return _library


def _turn(libvirt: Any) -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as e:
            logger.error("libvirt's event loop stumbled: %s", e)
            time.sleep(0.1)
