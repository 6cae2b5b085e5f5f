"""Lists of very many servers: a page is a page, in length and in memory, however many there are behind it."""

import tracemalloc

import msgspec
import pytest
import sqlalchemy as sa

from kilonova.store.servers import T
from tests.cloud.rooms import Rooms

FEW, MANY = 1_200, 12_000


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    rooms = Rooms(tmp_path_factory.mktemp("large"))
    rooms.alice = rooms.person("alice", "member")
    rooms.server(rooms.alice.project_id, metadata={"a": "b" * 200}, tags=["t"])
    return rooms


def fill(rooms, first, last):
    """The one server, again and again."""
    facts = {c.name: f'"{c.name}"' for c in T.c if c.name != "number"}
    facts |= {"id": "printf('%08x-0000-4000-8000-000000000000', i)", "created_at": "created_at - i"}
    series = "WITH RECURSIVE s(i) AS (SELECT :first UNION ALL SELECT i + 1 FROM s WHERE i < :last) "
    names, values = ", ".join(f'"{c}"' for c in facts), ", ".join(facts.values())
    one = "(SELECT * FROM servers ORDER BY number LIMIT 1)"
    with rooms.db.tx() as tx:
        sent = sa.text(f"INSERT INTO servers ({names}) {series} SELECT {values} FROM s, {one}")
        tx.execute(sent, {"first": first, "last": last})


def peak(rooms, query):
    """(servers, links, MiB at the most while they are read, told and heard)"""
    rooms.call("GET", f"/servers/detail?{query}", token=rooms.alice.token, version=96)  # what is made once is made
    tracemalloc.start()
    raw = rooms.call("GET", f"/servers/detail?{query}", token=rooms.alice.token, version=96).raw
    taken = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    said = msgspec.json.decode(raw)
    return len(said["servers"]), said.get("servers_links", []), taken


def test_a_page_is_bounded_however_many_there_are(rooms):
    fill(rooms, 1, FEW)
    before = peak(rooms, "limit=100"), peak(rooms, "")
    fill(rooms, FEW + 1, MANY)
    after = peak(rooms, "limit=100"), peak(rooms, "")
    assert [n for n, _, _ in after] == [n for n, _, _ in before] == [100, 1000]  # of those who say no number, too
    assert all(links for _, links, _ in after)
    for (_, _, few), (_, _, many) in zip(before, after, strict=True):
        assert many < few * 1.2 + 0.2
    assert after[1][2] < 16


def test_who_asks_for_more_than_a_page_has_a_page(rooms):
    assert peak(rooms, "limit=1000000")[0] == 1000
