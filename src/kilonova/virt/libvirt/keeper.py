"""The parent of a private libvirtd: starts it, starts it again when it dies, and buries its dead.

    python -I -S keeper.py DIRECTORY NOTE COMMAND [ARGUMENT…]

`DIRECTORY/running.json` says what runs, and repeats NOTE (a JSON text).  Whoever holds the lock on
`DIRECTORY/keeper.lock` is the keeper; a second one ends at once.

QEMU leaves libvirtd's family so that guests outlive it.  Its last breath is then a matter of process 1, and libvirtd
waits until that has seen to it.  Where process 1 looks seldom (measured: every 2 s) each `destroy` takes that long,
and in a container whose process 1 is no init at all, libvirt gives up after 15 s.  So this process adopts them.

It imports as little as it can, because it stays: 9 MB resident, 5 of them its own.  Ends on SIGTERM, and libvirtd
with it; guests go on.
"""

# ruff: noqa: PTH105, PTH112, PTH123
# pathlib would double what this process imports.

import ctypes
import fcntl
import os
import signal
import sys
import time
from types import FrameType

PR_SET_CHILD_SUBREAPER = 36
PATIENCE_S = 5  # for libvirtd to end on SIGTERM
BRIEF_S = 1  # who lives shorter than this is not started again at once


def main(directory: str, note: str, command: list[str]) -> int:
    lock = os.open(f"{directory}/keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return 0
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ending = False
    child = 0

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ending
        _kill(child, signal.SIGKILL if ending else signal.SIGTERM)
        ending = True
        signal.alarm(PATIENCE_S)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGALRM, end)
    while not ending and os.path.isdir(directory):
        since = time.monotonic()
        child = os.posix_spawnp(command[0], command, os.environ, setsigdef=[signal.SIGTERM, signal.SIGALRM])
        _say(directory, note, child)
        _bury_until(child)
        if time.monotonic() - since < BRIEF_S and not ending:
            time.sleep(BRIEF_S)
    return 0


def _bury_until(child: int) -> None:
    """Waits for whoever dies, until it is the child."""
    while True:
        try:
            if os.wait()[0] == child:
                return
        except ChildProcessError:
            return


def _say(directory: str, note: str, child: int) -> None:
    me = os.getpid()
    text = f'{{"keeper": [{me}, "{started(me)}"], "libvirtd": [{child}, "{started(child)}"], "note": {note}}}'
    with open(f"{directory}/running.part", "w") as part:
        part.write(text)
    os.replace(f"{directory}/running.part", f"{directory}/running.json")


def started(pid: int) -> str:
    """When a living process was started, in the kernel's own count; "" when there is none, or only its corpse."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZXx" else fields[19]


def _kill(pid: int, how: signal.Signals) -> None:
    if pid:
        try:
            os.kill(pid, how)
        except ProcessLookupError:
            pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
