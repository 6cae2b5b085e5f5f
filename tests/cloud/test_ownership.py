"""Who may put a server down: its last owner alone. But where it is and how it runs is true whoever says it."""

import pytest

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
