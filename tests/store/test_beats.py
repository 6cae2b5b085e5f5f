"""Hosts that were heard of are written down many at a time, each no later than it was."""

import os
import random

import pytest
import sqlalchemy as sa

from kilonova.kit.db import Db, meta
from kilonova.store import hosts

MANY = 150


@pytest.fixture
def db(tmp_path):
    db = Db(os.environ.get("TEST_DB") or f"sqlite:///{tmp_path}/cloud.db")
    meta.drop_all(db.engine, tables=[hosts.SERVICES])
    meta.create_all(db.engine, tables=[hosts.SERVICES])
    with db.tx() as tx:
        tx.execute(sa.insert(hosts.SERVICES), [row(i) for i in range(MANY)])
    yield db
    db.close()


def row(i):
    return {
        "uuid": f"u{i}", "host": f"h{i}", "binary": hosts.COMPUTE, "disabled": False, "forced_down": False,
        "last_seen": 1.0, "born": 1.0, "version": "1", "speaks": "[]", "failures": 0, "created_at": 1.0, "identity": "",
    }  # fmt: skip


def test_many_in_a_statement_and_none_later_than_it_was(db):
    dice = random.Random(3)
    heard = {f"h{i}": dice.uniform(1000, 1003) for i in range(0, MANY, 2)}
    before = db.statements
    db.run(hosts.seen, heard)
    assert db.statements - before <= 4
    with db.read() as tx:
        written = {r.host: r.last_seen for r in tx.execute(sa.select(hosts.SERVICES))}
    assert all(0 <= at - written[host] <= hosts.SAME_S for host, at in heard.items())
    assert {written[f"h{i}"] for i in range(1, MANY, 2)} == {1.0}
    db.run(hosts.seen, {})
