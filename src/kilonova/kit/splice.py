"""Two connections become one: what comes in at either goes out at the other."""

import contextlib
import select
import socket

CHUNK = 65536


def splice(one: socket.socket, other: socket.socket, idle_s: float) -> None:
    """Both directions until both have ended, one broke, or neither spoke for so long."""
    for end in (one, other):
        end.settimeout(idle_s)
    towards = {one: other, other: one}
    while towards:
        ready, _, _ = select.select(list(towards), [], [], idle_s)
        if not ready:
            return
        for source in ready:
            said = source.recv(CHUNK)  # more than a TLS record holds: none of it is left where `select` cannot see it
            if said:
                towards[source].sendall(said)
            else:
                with contextlib.suppress(OSError):
                    towards[source].shutdown(socket.SHUT_WR)
                del towards[source]
