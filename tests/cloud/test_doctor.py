"""The doctor: in a healthy cloud it finds nothing, whatever goes on; what was broken it names, and with `mend` it is well again."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from kilonova.cli.doctor import ILL, UNSEEN, WELL, Diagnosis, diagnosed
from kilonova.compute.examine import tell_holdings
from kilonova.conductor.examine import against, examined
from kilonova.contracts.compute import TellHoldings
from kilonova.kit.journal import RUNS
from kilonova.store import compare, hosts, networks, placement, servers
from tests.cloud.test_attach import attach
from tests.cloud.test_attach import made as volume
from tests.stories import telling


@pytest.fixture
def cloud(tmp_path: Path) -> Any:
    with telling(tmp_path) as c:
        c.mend("present")
        yield c


def asked(cloud: Any, **how: Any) -> Diagnosis:
    def settled(db: Any, runs: Any) -> set[str]:
        """Hosts say nothing of their own meanwhile: what they report would be mended without a doctor."""
        for _ in range(5):
            cloud.conductor.engine.sweep(1000)
            cloud.tick()
            cloud.clock.sleep(1)
        with cloud.db.read() as tx:
            return compare.running(tx, runs)

    return diagnosed(cloud.db, cloud.config, cloud.clock, wait=settled, **how)


def said(found: Diagnosis) -> set[tuple[str, str]]:
    return {(f.kind, f.subject) for f in found.findings}


def test_a_healthy_cloud(cloud: Any) -> None:
    for name in ("one", "two"):
        cloud.boot(name)
    found = asked(cloud)
    assert found == Diagnosis([], [], []) and found.status == WELL
    assert asked(cloud, mend=True) == Diagnosis([], [], [])


def test_whatever_goes_on_is_no_finding(cloud: Any) -> None:
    """At each boundary of builds, reboots, resizes and deletes: what is under way is not wrong."""
    began = cloud.clock.now()

    def look() -> None:
        found = examined(cloud.db, cloud.clock.now())
        for name, host in cloud.hosts.hosts.items():
            told = tell_holdings(host, TellHoldings())
            with cloud.db.read() as tx:
                found += against(tx, name, told, began)
        assert found == []

    one, two = cloud.boot("one", settle=False), cloud.boot("two", settle=False)
    walked(cloud, look)
    one.act("reboot", {"type": "HARD"}, settle=False)
    two.act("os-stop", settle=False)
    walked(cloud, look)
    one.delete(settle=False)
    walked(cloud, look)


def walked(cloud: Any, look: Any) -> None:
    n = 0
    while cloud.bus.letters or cloud.woken:
        cloud.step()
        look()
        n += 1
    assert n >= 3
    cloud.settle()
    look()


def test_what_was_broken_is_named_and_mended(cloud: Any) -> None:
    bare, gone, stuck, loose = (cloud.boot(name) for name in ("bare", "gone", "stuck", "loose"))
    at = loose.row.host
    with cloud.db.tx() as tx:
        tx.execute(sa.delete(placement.ALLOCATIONS).where(placement.ALLOCATIONS.c.consumer == bare.id))
        old = {"task_state": "rebooting", "updated_at": cloud.clock.now() - 1000}
        tx.execute(sa.update(servers.T).where(servers.T.c.id == stuck.id).values(old))
    del cloud.driver(gone.row.host).state.machines[gone.id]
    machine = cloud.driver(at).state.machines[loose.id]
    orphan = "00000000-0000-4000-8000-00000000dead"
    cloud.driver(at).spawn(msgspec.structs.replace(machine.machine, id=orphan, nics=[]), lambda _: None)
    given(cloud, loose, orphan)

    found = asked(cloud)
    assert found.status == ILL and found.mended == found.unseen == []
    assert said(found) >= {("claim", bare.id), ("server", stuck.id), ("machine", gone.id), ("machine", orphan)}
    kinds = {f.kind for f in found.findings}
    assert {"claim", "server", "machine", "port"} <= kinds
    assert {f.said for f in found.findings if f.subject == bare.id} == {
        f"is on {_provider(cloud, bare)} and holds nothing of it"
    }
    given(cloud, loose, loose.id)

    after = asked(cloud, mend=True)
    assert after.status == WELL, after
    assert any("looked into" in line for line in after.mended) and len(after.mended) >= 4
    assert gone.status == "ERROR" and stuck.status == "ERROR" and bare.status == "ACTIVE"
    assert orphan not in cloud.driver(at).state.machines


def given(cloud: Any, handle: Any, device: str) -> None:
    """Its port says that it is of this one."""
    with cloud.db.tx() as tx:
        port = networks.get(tx, networks.Port, handle.row.plugs[0].port_id)
        assert port is not None
        networks.change(tx, port, None, device_id=device)


def _provider(cloud: Any, handle: Any) -> str:
    with cloud.db.read() as tx:
        return next(n.uuid for n in hosts.nodes(tx) if n.host == handle.row.host)


def test_a_run_that_is_stuck_gets_another_try(cloud: Any) -> None:
    one = cloud.boot("one")
    with cloud.db.tx() as tx:
        tx.execute(sa.update(RUNS).where(RUNS.c.subject == one.id).values(state="stuck"))
    found = asked(cloud)
    assert [(f.kind, f.mends) for f in found.findings] == [("run", "another try")]
    assert asked(cloud, mend=True).status == WELL and one.status == "ACTIVE"


def test_what_cannot_be_seen_is_said(cloud: Any) -> None:
    assert asked(cloud, only=["nowhere"]).unseen == ["there is no host nowhere"]
    cloud.clock.sleep(3600)
    found = asked(cloud)
    assert found.status == UNSEEN and found.unseen == [
        "no conductor works: neither hosts nor neighbours could be asked"
    ]
    cloud.mend("present")
    assert sorted(asked(cloud).unseen) == [f"host h{i} is down" for i in range(3)]
    cloud.report()


def test_a_port_of_nobody(cloud: Any) -> None:
    one = cloud.boot("one")
    with cloud.db.tx() as tx:
        like = networks.get(tx, networks.Port, one.row.plugs[0].port_id)
        networks.add(
            tx,
            msgspec.structs.replace(like, id="00000000-0000-4000-8000-0000000000aa", mac_address="fa:16:3e:00:00:01"),
        )
    assert said(asked(cloud)) == {("port", "00000000-0000-4000-8000-0000000000aa")}
    assert asked(cloud, mend=True).status == WELL


def test_a_conductor_that_is_away_is_waited_for_and_done_without(cloud: Any) -> None:
    one = cloud.boot("one")
    with cloud.db.tx() as tx:
        tx.execute(sa.update(RUNS).where(RUNS.c.subject == one.id).values(state="stuck"))
    found = diagnosed(cloud.db, cloud.config, cloud.clock, wait=lambda _, runs: set(runs))
    assert found.status == ILL and [f.kind for f in found.findings] == ["run"]
    assert found.unseen[0] == "no conductor answered in time: neighbours could not be asked" and len(found.unseen) == 4
    assert asked(cloud, mend=True).status == WELL


def test_a_volume_that_its_machine_lost_is_put_back(cloud: Any) -> None:
    s, id = cloud.boot("one", networks="none"), volume(cloud)
    attach(cloud, s, id)
    cloud.driver(s.row.host).detach_volume(s.id, id, 0, anyway=True)
    found = asked(cloud)
    assert [(f.kind, f.subject, f.mends) for f in found.findings] == [("machine", s.id, "look, then plug")]
    assert asked(cloud, mend=True).status == WELL
    assert [d.serial for d in s.state.machines[s.id].machine.disks if d.serial] == [id] and s.row.devices[
        0
    ].volume_id == id
