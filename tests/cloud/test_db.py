"""What operators do to a cloud's database: old things go and the rest stays whole; all of it moves into another one."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from kilonova.cli.database import named
from kilonova.cli.db import moment, purged
from kilonova.cli.state import StateDir
from kilonova.kit.db import Db
from kilonova.kit.errors import Conflict, Invalid
from kilonova.kit.journal import RUNS, STEPS
from kilonova.main import main
from kilonova.store import evolve, purge, servers, transfer
from tests.stories import telling

DAY_S = 86_400.0


@pytest.fixture
def cloud(tmp_path: Path) -> Any:
    with telling(tmp_path) as c:
        yield c


def rows(db: Db, table: sa.Table) -> int:
    with db.read() as tx:
        return int(tx.execute(sa.select(sa.func.count()).select_from(table)).scalar() or 0)


def test_what_is_dead_for_long_goes_and_the_rest_stays(cloud: Any, tmp_path: Path) -> None:
    kept = cloud.boot("kept")
    old = [cloud.boot(f"old-{i}") for i in range(3)]
    cloud.settle()
    for s in old:
        s.delete()
    cloud.settle()
    cloud.pass_time(30)
    before = cloud.clock.now()
    cloud.clock.sleep(600)
    late = cloud.boot("late")
    cloud.settle()
    late.delete()
    cloud.settle()
    with cloud.db.read() as tx:
        would = purge.count(tx, before)
    assert would["servers"] == 3 and would["runs"] >= 6 and would["steps"] > 10
    archive = tmp_path / "archive"
    with archive.open("wb") as file:
        gone = purged(cloud.db, before, 2, file, rest_s=0)
    assert {name: n for name, n in would.items() if n} == {name: n for name, n in gone.items() if n}
    told = [msgspec.json.decode(line) for line in archive.read_bytes().splitlines()]
    assert {r["id"] for r in told if r["table"] == "servers"} == {s.id for s in old}
    assert len(told) == sum(would.values())
    with cloud.db.read() as tx:
        assert sum(purge.count(tx, before).values()) == 0
        assert {r.id for r in tx.execute(sa.select(servers.T.c.id))} == {kept.id, late.id}
        assert tx.execute(sa.select(STEPS.c.run).where(~sa.exists().where(RUNS.c.id == STEPS.c.run))).first() is None
    assert kept.status == "ACTIVE" and kept.events()
    shown = cloud.json("GET", "/servers?deleted=true&all_tenants=1", token=cloud.admin)["servers"]
    assert {s["id"] for s in shown} == {late.id}
    another = cloud.boot("another")
    cloud.settle()
    assert another.status == "ACTIVE"


def test_the_newest_keeps_its_number(cloud: Any) -> None:
    """SQLite would give it to the next server, and hosts call machines by it."""
    one = cloud.boot("one")
    cloud.settle()
    one.delete()
    cloud.settle()
    purged(cloud.db, cloud.clock.now() + DAY_S, 10, rest_s=0)
    two = cloud.boot("two")
    cloud.settle()
    with cloud.db.read() as tx:
        numbers = [r.number for r in tx.execute(sa.select(servers.T.c.number).order_by(servers.T.c.number))]
    assert numbers == [1, 2], two.id


def test_all_of_it_moves_into_another_database(cloud: Any, tmp_path: Path) -> None:
    cloud.boot("one")
    cloud.settle()
    evolve.ready(cloud.db)
    target, told = Db(f"sqlite:///{tmp_path}/target.db"), list[tuple[str, int, int]]()
    sizes = transfer.copy(cloud.db, target, lambda *said: told.append(said))
    assert sizes["servers"] == 1 and sizes["steps"] > 5 and ("servers", 1, 1) in told
    assert {t.name: rows(target, t) for t in evolve.everything().sorted_tables} == sizes
    with pytest.raises(Conflict, match="not empty"):
        transfer.copy(cloud.db, target)
    target.close()


def test_what_arrives_otherwise_is_not_kept(cloud: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.boot("one")
    cloud.settle()
    evolve.ready(cloud.db)
    target = Db(f"sqlite:///{tmp_path}/target.db")
    evolve.ready(target)
    with target.tx() as tx:
        tx.execute(sa.text("CREATE TRIGGER liar AFTER INSERT ON servers BEGIN UPDATE servers SET name = 'other'; END"))
    with pytest.raises(Exception, match="not what was sent: servers"):
        transfer.copy(cloud.db, target)
    assert rows(target, servers.T) == rows(target, RUNS) == 0
    target.close()


def test_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str, status: int = 0) -> list[str]:
        monkeypatch.setattr("sys.argv", ["kilonova", *words])
        assert main() == status
        said = capsys.readouterr()
        return (said.out + said.err).strip().splitlines()

    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    state = StateDir(tmp_path / "state")
    db = ("db", "--state-dir", "state")
    assert run(*db, "status", status=1)[-1] == f"kilonova db: No cloud lives in {Path('state')}."
    (state.path / "kilonova.db").touch()
    assert run(*db, "check", status=1)[-1].startswith("The database is empty")
    assert run(*db, "upgrade")[-1] == "The tables are there, as this release has them."
    assert run(*db, "upgrade")[-1] == "Nothing is to be done."
    assert run(*db, "check")[-1] == "This release can work with it."
    assert "before_0001_first" in run(*db, "status")[2]
    assert run(*db, "purge", "--dry-run", "--before", "90d")[-1].split() == ["servers", "0"]
    assert "--before x" in run(*db, "purge", "--before", "x", status=1)[-1]
    here, there = f"sqlite:///{state.path}/kilonova.db", f"sqlite:///{tmp_path}/new.db"
    assert "0 rows in 0 tables" in run(*db, "copy", here, there)[-2]
    assert "the same" in run(*db, "copy", here, here, status=1)[-1]
    assert "seen by others" in run(*db, "copy", here, "mysql+pymysql://a:b@127.0.0.1/c", status=1)[-1]
    assert "There is no" in run(*db, "copy", "sqlite:////nowhere/x.db", there, status=1)[-1]
    with state.held():
        assert "is up already" in run(*db, "copy", here, there, status=1)[-1]


def test_moments() -> None:
    now = 2_000_000_000.0
    assert moment(None, now, 5) == now - 5
    assert moment("3d", now, 0) == now - 3 * DAY_S
    assert moment("2026-01-31", now, 0) == 1_769_817_600
    assert moment("2026-01-31T00:00:01Z", now, 0) == 1_769_817_601
    for wrong in ("", "3", "2100-01-01", "tomorrow", "-3d"):
        with pytest.raises(Invalid):
            moment(wrong, now, 0)


def test_a_password_comes_by_a_file(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("mysql+pymysql://a:secret@127.0.0.1/c\n")
    assert named(f"@{file}") == "mysql+pymysql://a:secret@127.0.0.1/c"
    for wrong in (f"@{tmp_path}/none", "nonsense", "oracle://x"):
        with pytest.raises(Invalid):
            named(wrong)
