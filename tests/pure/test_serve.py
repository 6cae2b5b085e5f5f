"""What `kilonova serve` must be told, and that a host stays who it is."""

from pathlib import Path

import pytest

from kilonova.cli.compute import same_host, sim_names
from kilonova.cli.serve import wanting
from kilonova.kit.clock import Ids
from kilonova.kit.config import load
from kilonova.kit.errors import Refused
from kilonova.model.options import Config

WHOLE = {
    "database.url": "postgresql+psycopg://k:secret-of-db@db/k",
    "bus.url": "amqp://k:secret-of-mq@mq//",
    "identity.password": "secret-of-us",
    "metadata.shared_secret": "secret-of-guests",
    "scheduler.apart": True,
}


def test_all_is_said() -> None:
    wanting(load([], {}, Config, WHOLE), frozenset({"api", "metadata", "conductor", "scheduler", "companions"}))


@pytest.mark.parametrize(
    ("role", "without", "said"),
    [
        ("api", "database.url", "[database] url"),
        ("conductor", "bus.url", "[bus] url"),
        ("compute", "bus.url", "[bus] url"),
        ("compute", "identity.password", "[identity] password"),
        ("metadata", "metadata.shared_secret", "[metadata] shared_secret"),
        ("scheduler", "scheduler.apart", "[scheduler] apart"),
    ],
)
def test_what_is_missing_is_named(role: str, without: str, said: str) -> None:
    config = load([], {}, Config, {name: value for name, value in WHOLE.items() if name != without})
    with pytest.raises(Refused) as e:
        wanting(config, frozenset({role}))
    assert said in e.value.said and "secret-of" not in e.value.said


def test_a_host_needs_no_database() -> None:
    wanting(load([], {}, Config, {n: v for n, v in WHOLE.items() if n != "database.url"}), frozenset({"compute"}))


def test_a_host_keeps_its_name(tmp_path: Path) -> None:
    same_host(tmp_path, "host-1", Ids())
    same_host(tmp_path, "host-1", Ids())
    with pytest.raises(Refused, match="This host is host-1"):
        same_host(tmp_path, "host-2", Ids())


def test_simulated_hosts_bear_the_name_of_their_process() -> None:
    assert sim_names("a", 1) == ["a"] and sim_names("a", 2) == ["a-0", "a-1"]
