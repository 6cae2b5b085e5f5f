"""The stories of the store, told again on the databases that operators trust."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from kilonova.kit.db import Db, Tx, ill
from kilonova.kit.ready import ready
from tests.engines import mariadb, postgres

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("engine", [postgres, mariadb])
def test_the_store_is_the_same_on(engine, tmp_path):
    with engine(tmp_path / "db") as url:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-q", "-x", "tests/store", "--ignore=tests/store/test_evolve.py"],
            cwd=ROOT,
            env=os.environ | {"TEST_DB": url},
            capture_output=True,
            text=True,
            timeout=280,
            stdin=subprocess.DEVNULL,
        )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is None or int(passed[1]) > 100  # `-q -q` of the project's own options shows no count


T = sa.Table("things_of_a_test", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
ADD, LATER, ALL = ready(sa.insert(T)), ready(sa.insert(T), later=True), ready(sa.select(T.c.id).order_by(T.c.id))


def cut(tx: Tx) -> None:
    """As if its server were no more."""
    driver: Any = tx.connection.dbapi_connection
    line = driver.pgconn.socket if hasattr(driver, "pgconn") else driver._sock.fileno()
    with socket.socket(fileno=os.dup(line)) as same:
        same.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("engine", [postgres, mariadb])
def test_a_server_that_goes_in_the_middle_is_the_databases_trouble_and_nobodys_mistake(engine, tmp_path):
    """At a statement, at several in one message, at the end; and the next transaction finds another connection."""

    def at_a_statement(tx: Tx) -> None:
        tx.execute(ALL).all()
        cut(tx)
        tx.execute(ADD, {"id": 1})

    def at_several(tx: Tx) -> None:
        tx.execute(ALL).all()
        tx.execute(LATER, {"id": 2})
        cut(tx)
        tx.execute(ADD, {"id": 3})

    def at_the_end(tx: Tx) -> None:
        tx.execute(ADD, {"id": 4})
        cut(tx)

    with engine(tmp_path / "db") as url:
        db = Db(url, threads=2)
        T.metadata.create_all(db.engine)
        for work in (at_a_statement, at_several, at_the_end):
            with pytest.raises(sa.exc.DBAPIError) as e, db.tx() as tx:
                work(tx)
            assert ill(e.value) is not None, repr(e.value)
        db.run(lambda tx: tx.execute(ADD, {"id": 5}))
        with db.read() as tx:
            assert tx.execute(ALL).scalars() == [5]
        db.close()
