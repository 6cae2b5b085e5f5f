"""The program at the door of a user namespace: `hold` keeps one alive, `enter` runs a program in it.

It is run by its path with nothing but the standard library: entering a user namespace needs a process of one thread,
and the holder should stay small.  `userns.py` is who calls it.

    unshare -U … -n -m -u  python -I -S inside.py hold NAME [KEPT …]
    python -I -S inside.py enter PID PROGRAM [ARGUMENT …]
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x10000000, 0x20000, 0x4000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_NAME, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 15, 47, 2
LINUX_CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def main(argv: list[str]) -> int:
    if argv[:1] == ["hold"]:
        return hold(argv[1], argv[2:])
    if argv[:1] == ["enter"]:
        return enter(int(argv[1]), argv[2:])
    sys.stderr.write("inside.py: hold NAME [KEPT …] | enter PID PROGRAM [ARGUMENT …]\n")
    return 2


def hold(name: str, kept: list[str]) -> int:
    """The first process of the namespaces. Says `ready` on standard output; ends at SIGTERM.

    `kept` are folders below /run that stay what they are; the rest of /run is new and empty.
    """
    checked(libc.prctl(PR_SET_NAME, b"kilonova-inside", 0, 0, 0))
    checked(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    old = os.open("/run", os.O_PATH | os.O_DIRECTORY)
    checked(libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, b"mode=755"))
    for folder in kept:
        Path(folder).mkdir(parents=True, exist_ok=True)
        source = f"/proc/self/fd/{old}/{Path(folder).relative_to('/run')}"
        checked(libc.mount(source.encode(), folder.encode(), None, MS_BIND | MS_REC, None))
    os.close(old)
    with contextlib.suppress(OSError):
        socket.sethostname(name)
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    subprocess.run(["ip", "link", "set", "lo", "up"], env={"PATH": path}, check=True)
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    os.write(1, b"ready\n")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    signal.sigwait(ends)
    return 0


def enter(pid: int, argv: list[str]) -> int:
    """Becomes a program in the namespaces of `pid`, as their root or with all capabilities."""
    wanted = [("user", CLONE_NEWUSER), ("mnt", CLONE_NEWNS), ("uts", CLONE_NEWUTS), ("net", CLONE_NEWNET)]
    held = [(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), kind) for name, kind in wanted]
    here = Path.cwd()
    for fd, kind in held:
        checked(libc.setns(fd, kind))
    with contextlib.suppress(OSError):
        os.chdir(here)
    raise_capabilities()
    try:
        os.execvp(argv[0], argv)  # noqa: S606  (no shell is the point)
    except OSError as e:
        sys.stderr.write(f"{argv[0]}: {e.strerror}\n")
        return 127


def raise_capabilities() -> None:
    """Keeps all capabilities over exec also where our user id is not 0 in here."""
    if os.getuid() == 0:
        return
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    checked(libc.capget(header, data))
    data[2], data[5] = data[1], data[4]  # inheritable := permitted
    checked(libc.capset(header, data))
    for capability in range(64):
        if (data[1] | data[4] << 32) >> capability & 1:
            libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0)


def checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
