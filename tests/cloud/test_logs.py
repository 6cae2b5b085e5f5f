"""What one request leads to is found in every role's log by its id; and the log has no secrets."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kilonova.kit import log
from tests.stories import telling

MINE = "req-12345678-1234-4321-8765-1234567890ab"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root, levels = logging.getLogger(), {n: logging.getLogger(n).level for n in ("", "kilonova", "kilonova.access")}
    stream = io.StringIO()
    log.setup(format="json", stream=stream, access=True)
    yield stream
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for handler in [h for h in root.handlers if isinstance(h.formatter, log.Json)]:
        root.removeHandler(handler)


def said(stream: io.StringIO) -> list[dict[str, str]]:
    return [msgspec.json.decode(line) for line in stream.getvalue().splitlines()]


@pytest.fixture
def cloud(tmp_path: Path) -> Any:
    with telling(tmp_path) as c:
        yield c


def post(cloud: Any, **headers: str) -> str:
    """Its own request id."""
    body = {
        "server": {
            "name": "n",
            "flavorRef": "small",
            "imageRef": cloud.image_id,
            "networks": "auto",
            "adminPass": "sesame77",
        }
    }
    told = {"OpenStack-API-Version": "compute 2.96"} | headers
    answer = cloud.services.ask("POST", "/compute/v2.1/servers", body, cloud.user.token, **told)
    assert answer.status == 202
    answer.read()
    return str({k.lower(): v for k, v in answer.headers.items()}["x-openstack-request-id"])


def test_one_request_is_followed_through_all_roles(cloud: Any, lines: io.StringIO) -> None:
    id = post(cloud, **{"X-OpenStack-Request-ID": MINE})
    cloud.settle()
    mine = [line for line in said(lines) if line.get("global_request_id") == MINE]
    by = {(line["logger"], line["message"].split()[0]) for line in mine if line.get("request_id") == id}
    assert ("kilonova.access", "POST") in by  # the Compute API
    assert ("kilonova.kit.workflow", "build:") in by  # a conductor
    assert ("kilonova.kit.bus", "Spawn") in by  # a host
    paths = {line["message"].split()[1] for line in mine if line["logger"] == "kilonova.access"}
    assert any(p.startswith("/network/v2.0/ports") for p in paths), (
        paths
    )  # the network service, under a request id of its own
    run = {line["run"] for line in mine if line["logger"] == "kilonova.kit.workflow"}
    assert run == {line["run"] for line in mine if line["logger"] == "kilonova.kit.bus"} and len(run) == 1


def test_without_a_global_id_its_own_is_it_for_neighbours(cloud: Any, lines: io.StringIO) -> None:
    id = post(cloud)
    cloud.settle()
    all = said(lines)
    assert {line["logger"] for line in all if line.get("request_id") == id} >= {
        "kilonova.kit.workflow",
        "kilonova.kit.bus",
    }
    ports = [line for line in all if line["logger"] == "kilonova.access" and "/network/v2.0/ports" in line["message"]]
    assert ports and all_bear(ports, id)


def all_bear(found: list[dict[str, str]], id: str) -> bool:
    return {line.get("global_request_id") for line in found} == {id}


@pytest.mark.parametrize("wrong", ["x", "req-", MINE + "\n", "req-" + "a" * 500, MINE.replace("-", "_")])
def test_what_is_no_id_is_not_taken_for_one(cloud: Any, lines: io.StringIO, wrong: str) -> None:
    post(cloud, **{"X-OpenStack-Request-ID": wrong.strip("\n") + "%"})
    cloud.settle()
    assert wrong.strip("\n") + "%" not in lines.getvalue()


def test_no_secret_is_logged(cloud: Any, lines: io.StringIO) -> None:
    logging.getLogger("kilonova").setLevel("DEBUG")
    post(cloud)
    cloud.settle()
    text = lines.getvalue()
    assert "sesame77" not in text and cloud.user.token not in text and cloud.admin not in text
