"""Where deleted servers can be restored: what is kept of them, who sees them, and when they go for good."""

import msgspec
import pytest

from kilonova.model import options
from tests.cloud.test_captures import images
from tests.stories import telling

KEEP_S = 600


@pytest.fixture
def cloud(tmp_path):
    config = msgspec.structs.replace(options.Config(), compute=options.Compute(reclaim_interval_s=KEEP_S))
    with telling(tmp_path, config=config) as c:
        yield c


def listed(cloud, query="", token=""):
    return [s["id"] for s in cloud.json("GET", f"/servers?{query}", token=token)["servers"]]


def test_it_can_be_restored(cloud):
    s = cloud.boot()
    before = s.row
    s.delete(settle=False)
    assert s.row.task_state == "soft-deleting"
    cloud.settle()
    row = s.row
    assert (s.status, row.power_state, row.host, row.deleted_at) == ("SOFT_DELETED", 4, before.host, None)
    assert s.state.machines[s.id].power == "shutdown"
    assert s.events()[-1] == ("compute_soft_delete_instance", "Success")
    s.delete()
    assert s.status == "SOFT_DELETED"
    for action in ("os-start", "pause", "shelve"):
        s.act(action, ok=409, settle=False)
    s.act("restore")
    assert (s.status, s.row.power_state, s.row.plugs) == ("ACTIVE", 1, before.plugs)
    assert s.events()[-1] == ("compute_restore_instance", "Success")
    s.act("restore", ok=409)


def test_who_sees_it(cloud):
    s, other = cloud.boot(), cloud.boot("two")
    s.delete()
    assert listed(cloud) == [other.id]
    assert listed(cloud, "status=SOFT_DELETED") == []
    assert listed(cloud, "all_tenants=1&soft_deleted=1", cloud.admin) == [other.id, s.id]
    assert listed(cloud, "all_tenants=1&deleted=1", cloud.admin) == [s.id]
    assert cloud.json("GET", f"/servers/{s.id}")["server"]["status"] == "SOFT_DELETED"


def test_it_goes_for_good_in_time(cloud):
    s = cloud.boot()
    s.delete()
    cloud.pass_time(KEEP_S - 100)
    assert s.status == "SOFT_DELETED"
    cloud.pass_time(200)
    cloud.settle()
    assert s.row.vm_state == "deleted"
    assert [len(state.machines) for state in cloud.states.values()] == [0, 0, 0]


def test_or_by_force(cloud):
    for first in (None, "delete"):
        s = cloud.boot()
        if first:
            s.delete()
        s.act("forceDelete")
        assert s.row.vm_state == "deleted"
    cloud.json("POST", f"/servers/{s.id}/action", {"forceDelete": None}, ok=404)


def test_force_needs_no_interval(tmp_path):
    with telling(tmp_path) as cloud:
        s = cloud.boot()
        s.act("forceDelete", settle=False)
        assert s.row.task_state == "deleting"
        cloud.settle()
        assert s.row.vm_state == "deleted"
        two = cloud.boot("two")
        two.act("restore", ok=409)
        two.delete()
        assert two.row.vm_state == "deleted"


def test_what_never_ran_is_deleted_at_once(cloud):
    s = cloud.boot(flavor="huge")
    s.delete()
    assert s.row.vm_state == "deleted"
    s = cloud.boot(settle=False)
    s.delete()
    assert s.row.vm_state == "deleted"


def test_it_does_not_count_until_it_is_restored(cloud):
    quota = {"quota_set": {"instances": 2, "force": True}}
    cloud.json("PUT", f"/os-quota-sets/{cloud.user.project_id}", quota, token=cloud.admin)
    s, _ = cloud.boot("one"), cloud.boot("two")
    s.delete()
    three = cloud.boot("three")
    s.act("restore", ok=403)
    assert (s.status, s.row.task_state) == ("SOFT_DELETED", None)
    three.delete()
    s.act("restore", settle=False)
    assert quota_used(cloud) == 2  # from when it was promised, though it is not there yet
    cloud.settle()
    assert s.status == "ACTIVE" and quota_used(cloud) == 2


def quota_used(cloud):
    return cloud.json("GET", "/limits")["limits"]["absolute"]["totalInstancesUsed"]


def test_locked_ones_stay(cloud):
    s = cloud.boot()
    cloud.json("POST", f"/servers/{s.id}/action", {"lock": None}, ok=202, token=cloud.admin)
    s.delete(ok=409)
    s.act("forceDelete", ok=409)
    cloud.json("DELETE", f"/servers/{s.id}", ok=204, token=cloud.admin)
    cloud.settle()
    s.act("restore", ok=409)
    assert s.status == "SOFT_DELETED"


def test_a_rescued_one_is_itself_again(cloud):
    s = cloud.boot()
    cloud.json("POST", f"/servers/{s.id}/action", {"rescue": None})
    cloud.settle()
    s.delete()
    s.act("restore")
    assert (s.status, s.state.machines[s.id].rescue) == ("ACTIVE", None)


def test_a_shelved_one(tmp_path):
    compute = options.Compute(reclaim_interval_s=KEEP_S, shelved_offload_time_s=-1)
    with telling(tmp_path, config=msgspec.structs.replace(options.Config(), compute=compute)) as cloud:
        s = cloud.boot()
        s.act("shelve")
        s.delete()
        assert s.status == "SOFT_DELETED"
        assert images(cloud, image_type="snapshot") == []
        s.act("restore")
        assert s.status == "ACTIVE"
        s.act("shelve")
        cloud.json("POST", f"/servers/{s.id}/action", {"shelveOffload": None}, ok=202, token=cloud.admin)
        cloud.settle()
        s.delete()  # there is nothing that could run again
        assert s.row.vm_state == "deleted"
        assert images(cloud, image_type="snapshot") == []


def test_where_its_host_is_gone(cloud):
    s = cloud.boot()
    state = s.state
    cloud.dead.add(s.row.host)
    s.delete()
    assert s.status == "SOFT_DELETED"
    cloud.dead.clear()
    cloud.settle()
    assert (s.status, state.machines[s.id].power) == ("SOFT_DELETED", "shutdown")


def test_a_host_that_does_not_start_it_again(cloud):
    s = cloud.boot()
    s.delete()
    cloud.driver(s.row.host).options = options.Sim(failure_rate=1.0)
    s.act("restore")
    assert (s.status, s.row.task_state) == ("SOFT_DELETED", None)
    cloud.driver(s.row.host).options = options.Sim()
    s.act("restore")
    assert s.status == "ACTIVE"


def test_it_overtakes(cloud):
    s = cloud.boot()
    s.act("createImage", {"name": "x"}, settle=False)
    cloud.step()
    s.delete()
    assert s.status == "SOFT_DELETED"
    assert images(cloud, image_type="snapshot") == []
