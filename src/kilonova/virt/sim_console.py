"""What a simulated guest has for a console: a real socket on loopback, with a login prompt or a small grey screen behind it."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable

from kilonova.model.console import Where

WIDTH, HEIGHT = 64, 48
GREY = b"\x80\x80\x80\x00"
IDLE_S = 3600.0


class Endpoint:
    """One console of one machine, until it is closed. `play` is told each who comes."""

    def __init__(self, play: "Callable[[_Line], None]") -> None:
        self.play = play
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.open: set[socket.socket] = set()
        self.where = Where(host="127.0.0.1", port=self.listener.getsockname()[1])
        threading.Thread(target=self._accept, name="sim console", daemon=True).start()

    def close(self) -> None:
        for s in (self.listener, *list(self.open)):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                who = self.listener.accept()[0]
                who.settimeout(IDLE_S)
                self.open.add(who)
                threading.Thread(target=self._serve, args=(who,), name="sim console", daemon=True).start()

    def _serve(self, who: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), who:
            self.play(_Line(who))
        self.open.discard(who)


class _Line:
    def __init__(self, who: socket.socket) -> None:
        self.who, self.send = who, who.sendall

    def take(self, n: int) -> bytes:
        """Raises EOFError."""
        taken = b""
        while len(taken) < n:
            piece = self.who.recv(n - len(taken))
            if not piece:
                raise EOFError
            taken += piece
        return taken


def serial(hostname: str) -> Callable[[_Line], None]:
    """Asks who is there, and lets nobody in."""
    prompt = f"\r\n{hostname} login: ".encode()

    def play(line: _Line) -> None:
        line.send(prompt)
        asked = False  # for a password, which is not echoed
        while True:
            letter = line.take(1)
            if letter in b"\r\n":
                line.send(b"\r\nLogin incorrect\r\n" + prompt if asked else b"\r\nPassword: ")
                asked = not asked
            elif not asked:
                line.send(letter)

    return play


def vnc(name: str) -> Callable[[_Line], None]:
    """RFB 3.8 (RFC 6143) without a password: one grey screen."""

    def play(line: _Line) -> None:
        line.send(b"RFB 003.008\n")
        line.take(12)
        line.send(b"\x01\x01")  # one kind of security: none
        line.take(1)
        line.send(bytes(4))
        line.take(1)
        form = struct.pack(">BBBBHHHBBB3x", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)
        line.send(struct.pack(">HH", WIDTH, HEIGHT) + form + struct.pack(">I", len(name)) + name.encode())
        while True:
            match line.take(1)[0]:
                case 0:  # pixel format
                    line.take(19)
                case 2:  # encodings
                    line.take(4 * struct.unpack(">xH", line.take(3))[0])
                case 3:  # show it again
                    line.take(9)
                    line.send(struct.pack(">BxHHHHHi", 0, 1, 0, 0, WIDTH, HEIGHT, 0) + GREY * (WIDTH * HEIGHT))
                case 4:  # a key
                    line.take(7)
                case 5:  # the pointer
                    line.take(5)
                case 6:  # text that was cut
                    line.take(struct.unpack(">3xI", line.take(7))[0])
                case _:
                    return

    return play
