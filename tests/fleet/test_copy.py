"""A cloud's database moves from SQLite to PostgreSQL or MariaDB, and back: all of it is there, and it counts on."""

from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from kilonova.kit.db import Db
from kilonova.store import evolve, servers, transfer
from kilonova.store.evolve.upgrade import differences
from tests.engines import mariadb, postgres
from tests.stories import telling


@pytest.mark.parametrize("engine", [postgres, mariadb])
def test_a_cloud_moves_to(engine, tmp_path: Path) -> None:
    (tmp_path / "cloud").mkdir()
    with telling(tmp_path / "cloud") as cloud, engine(tmp_path / "db") as url:
        for name in ("one", "two ☃", "three"):
            cloud.boot(name)
        cloud.settle()
        evolve.ready(cloud.db)
        there, back = Db(url), Db(f"sqlite:///{tmp_path}/back.db")
        try:
            assert sum(sizes := transfer.copy(cloud.db, there).values()) > 100, sizes
            assert differences(there) == []
            with there.tx() as tx:
                found = tx.execute(servers.SELECT.order_by(servers.T.c.number)).all()
                like = servers.of(found[-1])
                assert [r.name for r in found] == ["one", "two ☃", "three"]
                servers.create(tx, [msgspec.structs.replace(like, id="00000000-0000-4000-8000-000000000000")])
                last = tx.execute(sa.select(sa.func.max(servers.T.c.number))).scalar()
                assert last == like.number + 1
            assert transfer.copy(there, back)["servers"] == 4
        finally:
            there.close()
            back.close()
