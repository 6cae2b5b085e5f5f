"""Waiting for the end of a run: until it is over, at most so long, and at once when somebody tells."""

import threading
import time

import pytest

from kilonova.kit import ends, journal
from kilonova.kit.clock import WallClock
from kilonova.kit.db import Db, meta


@pytest.fixture
def db(tmp_path):
    db = Db(f"sqlite:///{tmp_path}/ends.db")
    meta.create_all(db.engine)
    with db.tx() as tx:
        journal.opened(tx, "flow", b"null", id="r", subject="s", now=1.0, cause=None)
    yield db
    db.close()


def finish(db):
    with db.tx() as tx:
        tx.execute(journal.RUNS.update().values(state="failed"))


def test_not_in_time(db):
    began = time.monotonic()
    waiting = ends.Ends(db, WallClock())
    assert waiting.wait("r", 0.05) is False
    assert time.monotonic() - began < 5
    assert waiting.waiting == {}


def test_told(db, monkeypatch):
    monkeypatch.setattr(ends, "LOOK_S", 60.0)
    waiting, said = ends.Ends(db, WallClock()), []
    thread = threading.Thread(target=lambda: said.append(waiting.wait("r", 60.0)))
    thread.start()
    while not waiting.waiting:
        time.sleep(0.001)
    finish(db)
    waiting.told("another")
    waiting.told("r")
    thread.join(20)
    assert said == [True]


def test_found_though_nobody_told(db, monkeypatch):
    monkeypatch.setattr(ends, "LOOK_S", 0.01)
    timer = threading.Timer(0.05, finish, [db])
    timer.start()
    assert ends.Ends(db, WallClock()).wait("r", 20.0) is True
    timer.join()


def test_a_run_that_nobody_knows_is_not_waited_for(db):
    assert ends.Ends(db, WallClock()).wait("nobody", 60.0) is True
