"""One connection of a guest under QEMU's own networking, from standard input and output to the metadata proxy.

QEMU starts this program for each connection (`-netdev user,…,guestfwd=tcp:169.254.169.254:80-cmd:…`), so the server is
known by who asked.  It is run by its path, with nothing but the standard library, because it starts so often:

    python -I -S guestfwd.py --server ID --socket PATH
"""

import argparse
import contextlib
import os
import select
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

HELLO = "kilonova-server "


def command(server_id: str, path: str) -> str:
    """What to write behind `cmd:` for this server; `path` is the proxy's socket. For `-netdev`, double its commas."""
    words = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), "--server", server_id, "--socket", path]
    return shlex.join(words)


def greeting(connection: socket.socket) -> str:
    """The server's id that this program said first. Raises ValueError where it said something else."""
    line = b""
    while not line.endswith(b"\n"):
        if len(line) > 200 or not (byte := connection.recv(1)):
            raise ValueError("no greeting")
        line += byte
    text = line.decode("ascii").strip()
    if not text.startswith(HELLO):
        raise ValueError("no greeting")
    return text.removeprefix(HELLO)


@contextlib.contextmanager
def near(path: str) -> Iterator[str]:
    """Another name of a socket, for who binds or connects it: the kernel takes 107 bytes, and folders are deep."""
    folder, _, name = path.rpartition("/")
    fd = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("guestfwd", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--server", required=True, help="id of the server whose guest asks")
    parser.add_argument("--socket", required=True, help="path of the metadata proxy's socket")
    chosen = parser.parse_args(argv)
    with socket.socket(socket.AF_UNIX) as proxy:
        try:
            with near(chosen.socket) as name:
                proxy.connect(name)
            proxy.sendall(f"{HELLO}{chosen.server}\n".encode("ascii"))
            splice(proxy)
        except OSError as e:
            sys.stderr.write(f"guestfwd: {e}\n")
            return 1
    return 0


def splice(proxy: socket.socket, silent_s: float = 60) -> None:
    """Both directions, until the proxy has said all; the guest may have ended its own part before."""
    guest: list[socket.socket | int] = [0]
    while True:
        ready, _, _ = select.select([proxy, *guest], [], [], silent_s)
        if not ready:
            return
        if proxy in ready:
            said = proxy.recv(65536)
            if not said:
                return
            while said:
                said = said[os.write(1, said) :]
        if 0 in ready:
            asked = os.read(0, 65536)
            if asked:
                proxy.sendall(asked)
            else:
                guest.clear()
                with contextlib.suppress(OSError):
                    proxy.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
