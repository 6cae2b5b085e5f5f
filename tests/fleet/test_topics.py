"""Notifications over a real broker, as programs that read them with oslo.messaging find them there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
import msgspec
import pytest

from kilonova.cli.process import topics_of
from kilonova.kit.config import Secret
from kilonova.kit.errors import Unavailable
from kilonova.model import options
from kilonova.model.options import Config
from kilonova.store import notices
from tests.cloud.test_notices import speaking
from tests.engines import Rabbit, rabbit
from tests.stories import telling


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rabbit]:
    with rabbit(tmp_path_factory.mktemp("rabbit")) as one:
        yield one


class Reader:
    """What oslo.messaging's listener of `versioned_notifications` makes, on an exchange of its own: durable or not."""

    def __init__(
        self, broker: Rabbit, exchange: str, *, durable: bool, priorities: tuple[str, ...] = ("info",)
    ) -> None:
        self.line = kombu.Connection(broker.url)
        self.messages: list[Any] = []
        self.consumers = []
        way = kombu.Exchange(exchange, type="topic", durable=durable, auto_delete=False)
        for p in priorities:
            topic = f"versioned_notifications.{p}"
            queue = kombu.Queue(
                f"{exchange}-{topic}", way, routing_key=topic, durable=durable, auto_delete=False, exclusive=False
            )
            consumer = self.line.Consumer(queue, callbacks=[self.came])
            consumer.consume()
            self.consumers.append(consumer)

    def came(self, body: Any, message: Any) -> None:
        assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
        assert body["oslo.version"] == "2.0"  # kombu reads JSON, as it does for oslo.messaging
        self.messages.append(msgspec.json.decode(body["oslo.message"]))
        message.ack()

    def read(self, n: int) -> list[Any]:
        while len(self.messages) < n:
            self.line.drain_events(timeout=10)
        return self.messages

    def close(self) -> None:
        self.line.release()


def config(broker: Rabbit, exchange: str) -> Config:
    said = options.Notifications(format="versioned", exchange=exchange)
    return Config(bus=options.Bus(url=Secret(broker.url)), notifications=said)


@pytest.mark.parametrize("durable", [True, False])
def test_a_server_s_life_is_read_from_a_broker(broker: Rabbit, tmp_path: Path, durable: bool) -> None:
    """Whatever the reader made its exchange like; and what happened before it came is told when it comes."""
    said = config(broker, f"nova-{durable}")
    with telling(tmp_path, config=said) as cloud:
        speaking(cloud)
        topics = topics_of(said)
        assert topics is not None
        cloud.conductor.world.listened = topics
        s = cloud.boot("one")
        cloud.conductor.reconcilers.run_once("notified")
        reader = Reader(broker, f"nova-{durable}", durable=durable)
        s.act("os-stop")
        cloud.conductor.reconcilers.run_once("notified")
        heard = [m for m in reader.read(6) if m["event_type"].startswith("instance.")]
        assert [m["event_type"] for m in heard] == [
            f"instance.{e}" for e in ("create.start", "create.end", "power_off.start", "power_off.end")
        ]
        first = heard[0]
        assert set(first) == {
            "message_id", "publisher_id", "event_type", "priority", "timestamp", "payload", "_unique_id",
        }  # fmt: skip
        assert first["priority"] == "INFO" and first["payload"]["nova_object.data"]["uuid"] == s.id
        with cloud.db.read() as tx:
            assert notices.oldest(tx) == [], "told is told"
        reader.close()
        topics.close()


def test_a_topic_that_nobody_reads_is_in_no_other_s_way(broker: Rabbit) -> None:
    topics = topics_of(config(broker, "some"))
    assert topics is not None
    assert not topics.put("versioned_notifications.info", b'{"oslo.version": "2.0", "oslo.message": "{}"}')
    reader = Reader(broker, "some", durable=False)
    for n in range(3):
        assert not topics.put("versioned_notifications.error", b"{}")
        inner = msgspec.json.encode({"n": n}).decode()
        assert topics.put(
            "versioned_notifications.info", msgspec.json.encode({"oslo.version": "2.0", "oslo.message": inner})
        )
    assert [m["n"] for m in reader.read(3)] == [0, 1, 2]
    reader.close()
    topics.close()


def test_a_broker_that_is_away_is_said_and_found_again(broker: Rabbit) -> None:
    topics, reader = topics_of(config(broker, "again")), Reader(broker, "again", durable=True)
    assert topics is not None and topics.put(
        "versioned_notifications.info", b'{"oslo.version":"2.0","oslo.message":"1"}'
    )
    reader.close()
    broker.stop()
    with pytest.raises(Unavailable):
        topics.put("versioned_notifications.info", b"{}")
    broker.start()
    assert topics.put("versioned_notifications.info", b'{"oslo.version":"2.0","oslo.message":"2"}')
    topics.close()


def test_without_a_broker_or_a_wish_there_are_none() -> None:
    assert topics_of(Config()) is None
    assert topics_of(Config(bus=options.Bus(url=Secret("amqp://x:y@127.0.0.1:1//")))) is None
    url = Secret("amqp://x:y@127.0.0.1:1//")
    assert topics_of(Config(notifications=options.Notifications(format="both", url=url))) is not None
