"""Sockets that are waited for together; two connections that become one.

`select` is no way to do that: it fails for files numbered above 1023, and a busy process has more.
"""

import contextlib
import select
import socket
from collections.abc import Iterable
from typing import TypeVar

CHUNK = 65536


S = TypeVar("S", int, socket.socket)


def readable(files: Iterable[S], most_s: float | None) -> list[S]:
    """Those with something to read, an end, or a fault; none when nothing came in that time. None: wait for ever."""
    by_number = {f if isinstance(f, int) else f.fileno(): f for f in files}
    if -1 in by_number:
        raise OSError("the socket is closed")
    poll = select.poll()
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[n] for n, _ in poll.poll(None if most_s is None else max(0, round(most_s * 1000)))]


def splice(one: socket.socket, other: socket.socket, idle_s: float) -> None:
    """Both directions until both have ended, one broke, or neither spoke for so long."""
    for end in (one, other):
        end.settimeout(idle_s)
    towards = {one: other, other: one}
    while towards:
        ready = readable(towards, idle_s)
        if not ready:
            return
        for source in ready:
            said = source.recv(CHUNK)  # more than a TLS record holds: none of it is left where nobody sees it
            if said:
                towards[source].sendall(said)
            else:
                with contextlib.suppress(OSError):
                    towards[source].shutdown(socket.SHUT_WR)
                del towards[source]
