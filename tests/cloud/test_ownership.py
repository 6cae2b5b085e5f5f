"""Who may put a server down: its last owner alone. But where it is and how it runs is true whoever says it."""

import pytest

from kilonova.conductor import ports, watch
from kilonova.contracts.compute import Seen
from kilonova.kit.bus import opened
from kilonova.kit.journal import open_runs
from kilonova.model.states import VERBS, VM
from kilonova.store import servers
from tests.stories import telling


class Enough(Exception):
    """So that nothing of it is committed."""


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as cloud:
        yield cloud


def test_an_owner_who_was_overtaken_tells_facts_and_decides_nothing(cloud):
    s = cloud.boot()
    with pytest.raises(Enough), cloud.db.tx() as tx:
        early = servers.begin(tx, s.id, VERBS["stop"], 10.0)
        later = servers.begin(tx, s.id, VERBS["delete"], 11.0)
        assert later.generation > early.generation
        assert not servers.finish(tx, early, VM.stopped, 12.0, power_state=4, fault_run="nobody's")
        now = servers.get(tx, s.id)
        assert (now.vm_state, now.task_state, now.fault_run) == (VM.active, later.task_state, None)
        assert now.power_state == 4
        assert servers.finish(tx, later, VM.error, 13.0)
        raise Enough


def test_an_owner_who_was_overtaken_shows_no_progress(cloud):
    s = cloud.boot()
    with pytest.raises(Enough), cloud.db.tx() as tx:
        early = servers.begin(tx, s.id, VERBS["stop"], 10.0)
        later = servers.begin(tx, s.id, VERBS["delete"], 11.0)
        assert not servers.step(tx, early, "spawning", 12.0, node="elsewhere")
        now = servers.get(tx, s.id)
        assert (now.task_state, now.node) == (later.task_state, "elsewhere")
        raise Enough


def test_the_last_of_a_quota_is_given_once(cloud):
    quota = {"quota_set": {"instances": 1, "force": True}}
    cloud.json("PUT", f"/os-quota-sets/{cloud.user.project_id}", quota, token=cloud.admin)
    s = cloud.boot()
    with pytest.raises(AssertionError, match="403"):
        cloud.boot("second")
    s.delete()
    cloud.boot("third")


def test_nothing_is_destroyed_while_another_is_at_work_on_it(cloud):
    s = cloud.boot()
    s.act("os-stop", settle=False)
    cloud.conductor.engine.carry(cloud.woken.popleft())  # its letter is on the way, so no abort comes before it
    cloud.json("DELETE", f"/servers/{s.id}", ok=204)
    while cloud.woken:
        cloud.conductor.engine.carry(cloud.woken.popleft())
    with cloud.db.read() as tx:
        assert len(open_runs(tx, s.id)) == 2
    told = {m.name for _, raw in cloud.bus.letters if (m := opened(raw)) and m.about == s.id}
    assert told == {"Power"}
    cloud.settle()
    assert s.row.vm_state == "deleted"


def test_an_old_suspicion_is_none(cloud):
    s = cloud.boot()
    gone, row = Seen(False), s.row
    with pytest.raises(Enough), cloud.db.tx() as tx:

        def verdict(generation):
            return watch.judged.do(tx, watch.Mend(s.id, row.host, generation), gone, "a-run", 20.0).do

        assert verdict(row.generation - 1) == "nothing"
        assert verdict(row.generation) == "lost"
        later = servers.begin(tx, s.id, VERBS["stop"], 21.0)
        assert (verdict(row.generation), verdict(later.generation)) == ("nothing", "nothing")
        raise Enough


def test_who_takes_ports_back_takes_his_own(cloud):
    s = cloud.boot()
    network = cloud.neighbours.network
    private = next(n for n in network.networks() if n.name == "private")
    mine = network.create_port(
        private.id,
        project_id=cloud.user.project_id,
        device_id=s.id,
        device_owner="compute:nova",
        **{"binding:host_id": s.row.host, "binding:profile": {ports.MARK: "late/1"}},
    )
    ports.take_back(cloud.conductor.world, s.id, "late/1", s.row.host)
    left = [p.id for p in network.ports(servers=[s.id])]
    assert mine.id not in left
    assert left == [p.port_id for p in s.row.plugs] != []
