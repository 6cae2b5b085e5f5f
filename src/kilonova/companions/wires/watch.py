"""What changed in a namespace behind our back? Asked in microseconds, so that doing nothing costs nothing.

The kernel tells: rtnetlink sends a message for each change of a link, an address or a route, and nf_tables counts its
transactions (generation id).  A quiet watch is proof that what was made is still there; only a watch that is not
quiet makes somebody list and compare.
"""

import errno
import socket
import struct
from pathlib import Path

from kilonova.companions.wires.ground import Ground
from kilonova.kit.errors import Unavailable

# linux/rtnetlink.h: RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE
GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
GET_GENERATION = 10 << 8 | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN (linux/netfilter/nf_tables.h)
NFTA_GEN_ID = 1


class Watch:
    """One namespace under watch. It begins not quiet: what is there has to be looked at once."""

    def __init__(self, ground: Ground, space: str) -> None:
        with ground.enter(space):
            self.identity = Path("/proc/thread-self/ns/net").stat().st_ino
            self.route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_ROUTE)
            self.rules = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self.route.bind((0, GROUPS))
        self.rules.settimeout(5)
        self.links_known = False
        self.generation: int | None = None  # what it must be, so that our rules are there

    def links_quiet(self) -> bool:
        """Nothing happened to links, addresses and routes since `links_seen`."""
        if self.links_known and self._drained():
            self.links_known = False
        return self.links_known

    def links_seen(self) -> None:
        """Call it before listing: what happens from now on is news."""
        self._drained()
        self.links_known = True

    def rules_quiet(self) -> bool:
        return self.generation is not None and self.generation == self.current()

    def rules_made(self, before: int) -> None:
        """Call it after one transaction; somebody else's in between leaves the watch not quiet."""
        now = self.current()
        self.generation = now if now == before + 1 else None

    def current(self) -> int:
        """The generation id of the namespace's rules."""
        self.rules.send(struct.pack("=IHHIIBBH", 20, GET_GENERATION, 1, 1, 0, 0, 0, 0))
        got = self.rules.recv(4096)
        at, end = 20, struct.unpack_from("=I", got)[0]
        while at + 4 <= end:
            size, kind = struct.unpack_from("=HH", got, at)
            if kind & 0x3FFF == NFTA_GEN_ID:
                return int(struct.unpack_from("!I", got, at + 4)[0])
            at += max(4, size + 3 & ~3)
        raise Unavailable("This host's kernel has no nf_tables.", why=got.hex())

    def close(self) -> None:
        self.route.close()
        self.rules.close()

    def _drained(self) -> bool:
        """Was there anything to read?"""
        anything = False
        while True:
            try:
                self.route.recv(65536)
            except BlockingIOError:
                return anything
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise
            anything = True
