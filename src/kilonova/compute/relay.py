"""A door to this host's consoles for proxies on other machines.

Consoles are socket files of the host.  Whoever says a key, in the first line, is led to the one that it was given for;
keys are handed out with the answer to `FindConsole`, go from the database to the proxy, and never to a user.
"""

import contextlib
import logging
import socket
import ssl
import threading

import msgspec

from kilonova.kit.clock import Clock, Ids
from kilonova.kit.splice import splice
from kilonova.model.console import Where

log = logging.getLogger(__name__)

MOST = 256  # connections at the same time
GREETING_S = 5.0
IDLE_S = 3600.0
KEY_BYTES = 128


class Relay:
    """Listens at `address` and `port` (0: a free one) from the start. A key is good for `lasts_s`."""

    def __init__(
        self,
        address: str,
        port: int = 0,
        *,
        clock: Clock,
        ids: Ids,
        lasts_s: float,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.clock, self.ids, self.lasts_s, self.tls = clock, ids, lasts_s, tls
        self.guard = threading.Lock()
        self.doors: dict[str, tuple[str, float]] = {}  # key → path, and when it is over
        self.free = threading.BoundedSemaphore(MOST)
        self.listener = socket.create_server(
            (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        )
        self.address, self.port = address, int(self.listener.getsockname()[1])
        self.thread = threading.Thread(target=self._accept, name="consoles", daemon=True)
        self.thread.start()

    def door(self, at: Where) -> Where:
        """Where others find what is a socket file here."""
        key, now = self.ids.hex() + self.ids.hex(), self.clock.now()
        with self.guard:
            self.doors = {k: d for k, d in self.doors.items() if d[1] > now}
            self.doors[key] = at.path, now + self.lasts_s
        return msgspec.structs.replace(
            at, path="", host=self.address, port=self.port, key=key, tls=self.tls is not None
        )

    def close(self) -> None:
        """Who is connected is cut off with the process."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                came, _ = self.listener.accept()
            except OSError:
                return
            if self.free.acquire(blocking=False):
                threading.Thread(target=self._carry, args=(came,), name="a console", daemon=True).start()
            else:
                came.close()

    def _carry(self, came: socket.socket) -> None:
        try:
            came.settimeout(GREETING_S)
            with self.tls.wrap_socket(came, server_side=True) if self.tls else came as outer:
                path = self._meant(greeting(outer))
                if not path:
                    return
                with socket.socket(socket.AF_UNIX) as inner:
                    inner.settimeout(GREETING_S)
                    inner.connect(path)
                    splice(outer, inner, IDLE_S)
        except OSError as e:
            log.debug("a console's connection ended: %s", e)
        finally:
            self.free.release()
            came.close()

    def _meant(self, key: str) -> str:
        with self.guard:
            path, until = self.doors.get(key, ("", 0.0))
        return path if until > self.clock.now() else ""


def greeting(outer: socket.socket) -> str:
    """The first line, byte by byte: what follows is the console's."""
    said = b""
    while len(said) <= KEY_BYTES:
        if (one := outer.recv(1)) in (b"", b"\n"):
            break
        said += one
    return said.decode("ascii", "replace")
