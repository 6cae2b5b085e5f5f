"""Lists of servers are read from an index, in its order, however many there are: SQLite says so itself."""

import pytest
import sqlalchemy as sa

from kilonova.kit.db import Db, meta
from kilonova.store import server_pages as pages
from kilonova.store.server_pages import Page

MINE, ALIVE = pages.is_one_of("project_id", ["p"]), pages.alive()


@pytest.fixture
def sent(tmp_path):
    """(a database without servers, what is sent to it)"""
    db, said = Db(f"sqlite:///{tmp_path}/x.db"), []
    meta.create_all(db.engine)
    sa.event.listen(db.engine, "connect", lambda driver, _: driver.set_trace_callback(said.append))
    yield db, said
    db.close()


def plan(sent, page):
    db, said = sent
    with db.read() as tx:
        said.clear()
        pages.page(tx, page)
        (select,) = [s for s in said if s.startswith("SELECT")]
        return " ".join(str(r[3]) for r in tx.exec_driver_sql(f"EXPLAIN QUERY PLAN {select}").all())


@pytest.mark.parametrize(
    ("index", "where"),
    [
        ("servers_of_project", [MINE, ALIVE]),
        ("servers_of_project", [MINE, ALIVE, pages.not_soft_deleted(), pages.matches("name", "web")]),
        ("servers_of_project", [MINE, ALIVE, pages.has_status(["ERROR"])]),
        ("servers_of_project", [MINE, ALIVE, pages.tagged(["t"], any=False, negated=False)]),
        ("servers_newest", [ALIVE]),
        ("servers_on_host", [ALIVE, pages.is_one_of("host", ["h"])]),
    ],
)
def test_a_page_is_read_in_the_order_of_its_index(sent, index, where):
    told = plan(sent, Page(where=where, limit=100))
    assert f"USING INDEX {index}" in told
    assert "SCAN" not in told and "TEMP B-TREE" not in told


def test_what_changed_is_found_by_when(sent):
    told = plan(sent, Page(where=pages.updated(1.0, None), limit=100))
    assert told.count("USING INDEX servers_changed") == 2 and "SCAN" not in told
