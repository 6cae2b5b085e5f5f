"""A wire that can be pulled: a process that carries TCP from one port of the loopback to another.

    python tests/fleet/relay.py FROM TO

While it is stopped (SIGSTOP) nothing passes and nobody is told so; what was under way comes later.
"""

import signal
import socket
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "src")]

from kilonova.companions.wires.forward import Forward  # noqa: E402

if __name__ == "__main__":
    here, there = map(int, sys.argv[1:])
    Forward(socket.create_server(("127.0.0.1", here)), "127.0.0.1", there, connections=256)
    signal.sigwait({signal.SIGTERM})
