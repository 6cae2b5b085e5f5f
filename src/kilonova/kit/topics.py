"""Messages for whoever wants to hear them, as programs of OpenStack do: a topic exchange of a broker.

A queue belongs to who reads it, and so does the exchange: a reader makes both (oslo.messaging's listeners do), in the way
it likes.  We make neither.  So nothing is lost in a queue that nobody reads, no declaration contradicts another, and a
message that no queue took is known at once: it stays where it was, and is offered again.
"""

from collections.abc import Callable
from typing import Any

import kombu
from amqp.exceptions import NotFound

from kilonova.kit.amqp import BROKEN
from kilonova.kit.errors import Unavailable

CONFIRM_S = 10.0  # so long a broker may take to say that it has it


class Topics:
    """`connection` makes one that is not open yet. For one thread."""

    def __init__(self, connection: Callable[[], kombu.Connection], exchange: str) -> None:
        self.connection, self.exchange = connection, exchange
        self.line: kombu.Connection | None = None
        self.channel: Any = None
        self.returned = False  # the last one: no queue is bound to its topic

    def put(self, topic: str, raw: bytes) -> bool:
        """Is it in somebody's queue, and safe there? Raises Unavailable where there is no broker."""
        try:
            if self.channel is None:
                self._open()
            self.returned = False
            kombu.Producer(self.channel).publish(
                raw,
                exchange=self.exchange,
                routing_key=topic,
                content_type="application/json",
                content_encoding="utf-8",
                mandatory=True,
                timeout=CONFIRM_S,
                confirm_timeout=CONFIRM_S,
            )
            return not self.returned
        except NotFound:  # nobody has made the exchange: nobody reads
            self.close()
            return False
        except BROKEN as e:
            self.close()
            raise Unavailable("The broker of notifications cannot be reached.", why=type(e).__name__) from None

    def close(self) -> None:
        line, self.line, self.channel = self.line, None, None
        if line is not None:
            line.release()

    def _open(self) -> None:
        self.line = self.connection()
        self.line.transport_options = {**(self.line.transport_options or {}), "confirm_publish": True}
        self.line.ensure_connection(max_retries=1)
        self.channel = self.line.channel()
        self.channel.events["basic_return"].add(self._came_back)

    def _came_back(self, *_: Any) -> None:
        self.returned = True
