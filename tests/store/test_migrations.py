"""Records of moves: epochs are given out once, pages are in order, and what a host keeps is known. `TEST_DB` names another database."""

import os

import msgspec
import pytest

from kilonova.kit.db import Db
from kilonova.kit.errors import NotFound
from kilonova.model.flavor import Flavor
from kilonova.model.server import Server
from kilonova.store import migrations
from kilonova.store.migrations import Kind, Status, Wanted

SMALL, LARGE = Flavor("s", "s", 1, 512, 1), Flavor("l", "l", 2, 1024, 1)
ONE = Server("one", "p", "u", "one", "one", SMALL, host="h0", node="n0", epoch=3)
TWO = msgspec.structs.replace(ONE, id="two", project_id="q", host="h1")


@pytest.fixture
def db(tmp_path):
    db = Db(os.environ.get("TEST_DB") or f"sqlite:///{tmp_path}/cloud.db")
    migrations.T.drop(db.engine, checkfirst=True)
    migrations.T.create(db.engine)
    yield db
    db.close()


def begin(tx, uuid, server=ONE, kind=Kind.resize, status=Status.pre_migrating, now=1.0):
    return migrations.begin(tx, server, kind, status, uuid=uuid, now=now, was="active", flavor=LARGE)


def test_an_epoch_is_given_out_once(db):
    """Also when nothing came of a move, and the server's row never heard of it."""
    with db.tx() as tx:
        begin(tx, "a")
        assert [migrations.next_epoch(tx, ONE, "a") for _ in range(2)] == [4, 5]
        begin(tx, "b")
        assert migrations.next_epoch(tx, ONE, "b") == 6
        assert migrations.next_epoch(tx, msgspec.structs.replace(ONE, epoch=9), "b") == 10
        begin(tx, "c", TWO)
        assert migrations.next_epoch(tx, TWO, "c") == 4


def test_what_is_kept_is_known_until_it_is_decided(db):
    with db.tx() as tx:
        begin(tx, "a")
        assert migrations.kept(tx, "h0") == {}
        for status in (Status.finished, Status.reverting, Status.finished, Status.confirming):
            migrations.change(tx, "a", 2.0, status)
            assert (migrations.kept(tx, "h0"), migrations.kept(tx, "h1")) == ({"one": 3}, {})
        migrations.change(tx, "a", 2.0, Status.finished)
        found = migrations.unfinished(tx, "one")
        assert (found.uuid, found.old_flavor, found.new_flavor, found.was) == ("a", SMALL, LARGE, "active")
        migrations.change(tx, "a", 3.0, Status.confirmed)
        assert migrations.kept(tx, "h0") == {} and migrations.unfinished(tx, "one") is None


def test_pages(db):
    with db.tx() as tx:
        for n, uuid in enumerate("abcde"):
            begin(tx, uuid, TWO if n % 2 else ONE, now=float(n // 2))
        migrations.change(tx, "a", 50.0, Status.error, dest="h7")

        def named(newest=True, limit=None, marker=None, **wanted):
            return "".join(m.uuid for m in migrations.page(tx, Wanted(**wanted), newest=newest, limit=limit, marker=marker))  # fmt: skip

        assert (named(), named(newest=False)) == ("edcba", "abcde")
        assert (named(limit=2), named(limit=2, marker="d"), named(limit=0)) == ("ed", "cb", "")
        assert (named(server=["two"]), named(project_id="q"), named(user_id="nobody")) == ("db", "db", "")
        assert (named(host=["h7"]), named(host=["h1", "h7"]), named(source=["h1"])) == ("a", "dba", "db")
        assert (named(status=["error"]), named(kind=["resize"]), named(since=2.0), named(before=1.0)) == ("a", "edcba", "ea", "dcb")  # fmt: skip
        with pytest.raises(NotFound):
            named(marker="nobody")


def test_progress_is_of_what_runs_now(db):
    with db.tx() as tx:
        begin(tx, "a", kind=Kind.live, status=Status.queued)
        assert not migrations.progress(tx, "one", "h0", 2.0, {"memory_total": 7})
        migrations.change(tx, "a", 2.0, Status.running)
        assert migrations.progress(tx, "one", "h0", 3.0, {"memory_total": 7})
        assert not migrations.progress(tx, "one", "h9", 3.0, {"memory_total": 8})
        (m,) = migrations.live(tx, "one")
        assert (m.memory_total, migrations.sending(tx, "h0"), migrations.in_progress(tx, "h0")) == (7, 1, True)
        assert migrations.one_of(tx, "one", str(m.id)) == m
        for id in ("0", "x", "9" * 30, str(m.id + 1)):
            with pytest.raises(NotFound):
                migrations.one_of(tx, "one", id)
        migrations.change(tx, "a", 4.0, Status.completed)
        assert (migrations.live(tx, "one"), migrations.sending(tx, "h0"), migrations.in_progress(tx, "h0")) == ([], 0, False)  # fmt: skip
