"""Did the sender of a chunked body go away in the middle?

Where a body's length was said, counting tells.  A chunked body only ends, and the server (Granian 2.8 over hyper)
gives an application the same end of file whether its last chunk came or its sender died: half an image would
count as a whole one.  But hyper holds on to such a connection until it has the answer, so the kernel can be
asked: among the connections that this process accepted, is there one whose other side is gone and that brought
at least as much as was read?  That it could be another's, who gave up at the same moment, costs one repeated
upload; that it could be nobody's would cost an image.
"""

import os
import socket
import struct
from pathlib import Path

# Linux, include/net/tcp_states.h and struct tcp_info in include/uapi/linux/tcp.h
CLOSE, CLOSE_WAIT, LISTEN = 7, 8, 10
BYTES_RECEIVED_AT = 128
INFO_BYTES = 192


def sender_gone(received: int) -> bool:
    """Has this process a connection, accepted by itself, that brought `received` bytes and is only half there?"""
    found = [seen for fd in Path("/proc/self/fd").iterdir() if (seen := _look(fd)) is not None]
    ours = {port for port, state, _ in found if state == LISTEN}
    return any(port in ours and state in (CLOSE, CLOSE_WAIT) and n >= received for port, state, n in found)


def _look(fd: Path) -> tuple[int, int, int] | None:
    """Local port, TCP state and bytes received of what is a TCP socket."""
    try:
        if not str(fd.readlink()).startswith("socket:"):
            return None
        with socket.socket(fileno=os.dup(int(fd.name))) as s:
            if s.family not in (socket.AF_INET, socket.AF_INET6) or s.type != socket.SOCK_STREAM:
                return None
            info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_BYTES)
            received = struct.unpack_from("Q", info, BYTES_RECEIVED_AT)[0]
            return s.getsockname()[1], info[0], received
    except (OSError, struct.error):
        return None  # closed meanwhile, or no such question on this kernel
