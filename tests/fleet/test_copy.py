"""A cloud's database moves from SQLite to PostgreSQL or MariaDB, and back: all of it is there, and it counts on.

What operators ask of it (doctor, figures, purge) is asked there, too.
"""

from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from kilonova.cli.db import purged
from kilonova.conductor.examine import examined
from kilonova.kit.db import Db
from kilonova.store import compare, evolve, figures, placement, purge, servers, transfer
from kilonova.store.evolve.upgrade import differences
from tests.engines import mariadb, postgres
from tests.stories import telling


@pytest.mark.parametrize("engine", [postgres, mariadb])
def test_a_cloud_moves_to(engine, tmp_path: Path) -> None:
    (tmp_path / "cloud").mkdir()
    with telling(tmp_path / "cloud") as cloud, engine(tmp_path / "db") as url:
        all = [cloud.boot(name) for name in ("one", "two ☃", "three", "gone", "last")]
        all[3].delete()
        later = cloud.clock.now() + 1
        evolve.ready(cloud.db)
        there, back = Db(url), Db(f"sqlite:///{tmp_path}/back.db")
        try:
            assert sum(sizes := transfer.copy(cloud.db, there).values()) > 100, sizes
            assert differences(there) == []
            assert examined(there, later) == []
            with there.read() as tx:
                assert figures.states(tx) == {("active", ""): 4} and figures.claims(tx)["VCPU"][0] == 4
                assert figures.open_runs(tx) == [] and len(figures.silences(tx, later)) == 3
                would = purge.count(tx, later)
            gone = purged(there, later, 10, rest_s=0)
            assert would["servers"] == 1 and {n: k for n, k in would.items() if k} == {
                n: k for n, k in gone.items() if k
            }
            with there.tx() as tx:
                inventory = placement.INVENTORIES
                tx.execute(sa.update(inventory).where(inventory.c.resource_class == "VCPU").values(used=7))
                odd = compare.miscounted(tx)
            assert len(odd) == 3 and len(examined(there, later)) == 3
            for provider, name, _, _ in odd:
                assert there.run(placement.recount, provider, name, now=later)
            assert examined(there, later) == []
            with there.tx() as tx:
                found = tx.execute(servers.SELECT.order_by(servers.T.c.number)).all()
                like = servers.of(found[-1])
                assert [r.name for r in found] == ["one", "two ☃", "three", "last"]
                servers.create(tx, [msgspec.structs.replace(like, id="00000000-0000-4000-8000-000000000000")])
                last = tx.execute(sa.select(sa.func.max(servers.T.c.number))).scalar()
                assert last == like.number + 1
            assert transfer.copy(there, back)["servers"] == 5
        finally:
            there.close()
            back.close()
