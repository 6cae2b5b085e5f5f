"""A door from the machine to an address that only the data plane knows: TCP, as `ssh -L` would do it.

The listening socket may have been made anywhere (before the process went into a namespace, say); connections to the
other side are made from `space`.
"""

import contextlib
import logging
import socket
import threading

from kilonova.companions.wires.ground import MACHINE, Ground
from kilonova.kit.errors import Trouble
from kilonova.kit.splice import readable, splice

logger = logging.getLogger(__name__)


class Forward:
    """Carries what comes in at `listener` to address:port, at most `connections` at once; `idle_s` silent ends one."""

    def __init__(
        self,
        listener: socket.socket,
        address: str,
        port: int,
        *,
        ground: Ground | None = None,
        space: str = MACHINE,
        connections: int = 32,
        idle_s: float = 3600,
    ) -> None:
        self.listener, self.address, self.port = listener, address, port
        self.ground, self.space, self.idle_s = ground, space, idle_s
        self.free = threading.BoundedSemaphore(connections)
        self.lock = threading.Lock()
        self.open: set[socket.socket] = set()
        self.closing = False
        self.bell = socket.socketpair()
        self.thread = threading.Thread(target=self._accept, name=f"forward to {address}:{port}", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Ends the door and whatever goes through it."""
        self.closing = True
        self.bell[0].send(b"!")
        self.thread.join(5)
        with self.lock:
            for one in self.open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for end in self.bell:
            end.close()

    def _accept(self) -> None:
        self.listener.setblocking(False)
        while not self.closing:
            ready = readable([self.listener, self.bell[1]], None)
            if self.bell[1] in ready:
                return
            with contextlib.suppress(OSError):
                outer, _ = self.listener.accept()
                if self.free.acquire(blocking=False):
                    threading.Thread(target=self._carry, args=(outer,), name="forward", daemon=True).start()
                else:
                    outer.close()

    def _carry(self, outer: socket.socket) -> None:
        try:
            with outer, self._connect() as inner:
                with self.lock:
                    self.open |= {outer, inner}
                try:
                    splice(outer, inner, self.idle_s)
                finally:
                    with self.lock:
                        self.open -= {outer, inner}
        except (Trouble, OSError) as e:
            logger.debug("forward to %s:%d: %s", self.address, self.port, e)
        finally:
            self.free.release()

    def _connect(self) -> socket.socket:
        if self.ground is None:
            return socket.create_connection((self.address, self.port), 10)
        return self.ground.connect(self.address, self.port, self.space)
