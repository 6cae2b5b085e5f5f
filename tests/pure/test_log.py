"""The log: each line knows what it is about, and no line holds a secret."""

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kilonova.kit import log


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    log.setup(stream=stream, level="debug")
    yield stream
    log.setup(level="warning")


def test_a_line_is_read_by_people(lines: io.StringIO) -> None:
    with log.about(request_id="req-1", server="s-1"):
        logging.getLogger("kilonova.conductor.create").info("spawned on %s", "host-3")
    line = lines.getvalue()
    assert line.endswith("INFO  conductor.create     spawned on host-3   request_id=req-1 server=s-1\n")


def test_json_is_an_object_a_line() -> None:
    stream = io.StringIO()
    log.setup(stream=stream, format="json")
    with log.about(request_id="req-1", run=None):
        logging.getLogger("kilonova.api").warning("two\nlines", extra={"about": {"port": 7}})
    (line,) = stream.getvalue().splitlines()
    assert {**json.loads(line), "time": ""} == {
        "time": "", "level": "warning", "logger": "kilonova.api", "message": "two\nlines", "request_id": "req-1", "port": "7",
    }  # fmt: skip


def test_names_nest_and_end() -> None:
    with log.about(request_id="a", server="s"):
        with log.about(request_id="b"):
            assert log.named() == {"request_id": "b", "server": "s"}
        assert log.request_id() == "a"
    assert log.named() == {}


def test_names_are_handed_to_a_thread_not_leaked() -> None:
    seen = []

    def work(names: dict[str, str]) -> None:
        seen.append(dict(log.named()))
        with log.about(**names):
            seen.append(dict(log.named()))

    with log.about(run="r"):
        thread = threading.Thread(target=work, args=(dict(log.named()),))
        thread.start()
        thread.join()
    assert seen == [{}, {"run": "r"}]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("postgresql://nova:pw123@db/nova", "postgresql://nova:***@db/nova"),
        ("amqp://:pw123@mq/", "amqp://:***@mq/"),
        ('{"adminPass": "pw123", "name": "a"}', '{"adminPass": \'***\', "name": "a"}'),
        ("{'password': 'pw123'}", "{'password': '***'}"),
        (r'{"db_password": "pw\"123", "x": 1}', '{"db_password": \'***\', "x": 1}'),
        ("{'X-Auth-Token': b'pw123'}", "{'X-Auth-Token': b'***'}"),
        ("X-Auth-Token: pw123 pw123", "X-Auth-Token: ***"),
        ("authorization: Basic pw123==", "authorization: ***"),
        ("GET /vnc?token=pw123&x=1", "GET /vnc?token=***&x=1"),
        ("User(name='a', password='pw123')", "User(name='a', password=***)"),
        ("sent Bearer pw123pw123", "sent Bearer ***"),
        (f"got gAAAAAB{'pw123' * 20}== from", "got *** from"),
        ("-----BEGIN RSA PRIVATE KEY-----\npw123\n-----END RSA PRIVATE KEY-----", "*** private key ***"),
        ("token_lifetime_s=3600 and tokens=5", "token_lifetime_s=3600 and tokens=5"),
        ("the token is too old: 5 s", "the token is too old: 5 s"),
        ("http://[::1]:8774/v2.1", "http://[::1]:8774/v2.1"),
        ("http://host:8774/a@b", "http://host:8774/a@b"),
    ],
)
def test_secrets_are_kept_out(text: str, kept: str) -> None:
    assert log.clean(text) == kept


def test_known_secrets_are_kept_out_everywhere(lines: io.StringIO) -> None:
    log.hide("s3cret/word")
    log.hide("abc")  # too short to be hidden without hiding the log
    try:
        raise ValueError("s3cret/word in a trace")
    except ValueError:
        logging.getLogger("kilonova").exception("s3cret/word and s3cret%%2Fword and abc %s", "s3cret/word")
    assert "s3cret" not in lines.getvalue()
    assert "abc" in lines.getvalue()
    assert "ValueError: *** in a trace" in lines.getvalue()


def test_a_name_forges_no_line(lines: io.StringIO) -> None:
    logging.getLogger("kilonova").info("server %s", "a\n12:00:00.000 INFO  admin said yes\x1b[2J")
    assert len(lines.getvalue().splitlines()) == 1
    assert "\x1b" not in lines.getvalue()


def test_libraries_are_heard_from_warning_up(lines: io.StringIO) -> None:
    logging.getLogger("sqlalchemy.engine").info("SELECT 1")
    logging.getLogger("urllib3.connectionpool").warning("retrying")
    logging.getLogger("kilonova.access").info("GET /")
    logging.getLogger("kilonova.api").debug("heard")
    assert len(lines.getvalue().splitlines()) == 1


def test_a_file_may_be_moved_away(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kilonova.log"
    log.setup(file=path)
    logger = logging.getLogger("kilonova.x")
    logger.info("one")
    path.rename(tmp_path / "old")
    logger.info("two")
    log.setup(level="warning")
    assert "two" in path.read_text()


def test_a_thread_that_dies_is_told_in_the_log(lines: io.StringIO) -> None:
    def work() -> None:
        raise RuntimeError("password=hunter22")

    thread = threading.Thread(target=work, name="sweeper")
    hook, threading.excepthook = threading.excepthook, log._thread_died
    try:
        thread.start()
        thread.join()
    finally:
        threading.excepthook = hook
    assert "thread sweeper ended" in lines.getvalue()
    assert "hunter22" not in lines.getvalue()
    assert sys.excepthook is log._died
