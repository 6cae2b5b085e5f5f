"""Shared file systems of servers: how they come and go, who is let in meanwhile, and what cannot be done to who has one."""

import msgspec
import pytest

from kilonova.contracts.jobs import AttachShare
from kilonova.kit.workflow import start
from kilonova.model.shares import Sharing
from kilonova.store import shares
from kilonova.virt.sim import shared
from tests.stories import Cloud, telling

V = "2.97"


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def share(cloud, size=1, **more):
    """Of alice."""
    wish = {"share": {"share_proto": "NFS", "size": size, **more}}
    return cloud.services.json("POST", "/share/v2/shares", wish, cloud.user.token)["share"]["id"]


def stopped(cloud, name="one"):
    s = cloud.boot(name)
    s.act("os-stop")
    return s


def attach(cloud, s, id, ok=201, settle=True, **more):
    said = cloud.json("POST", f"/servers/{s.id}/shares", {"share": {"share_id": id, **more}}, ok=ok, version=V)
    if settle:
        cloud.settle()
    return said


def detach(cloud, s, id, ok=200, settle=True):
    cloud.json("DELETE", f"/servers/{s.id}/shares/{id}", ok=ok, version=V)
    if settle:
        cloud.settle()


def shown(cloud, s):
    return {x["share_id"]: x["status"] for x in cloud.json("GET", f"/servers/{s.id}/shares", version=V)["shares"]}


def rules(cloud, id, token=None):
    """Who is let in."""
    path = f"/share/v2/share-access-rules?share_id={id}"
    token = token or cloud.admin
    return [r["access_to"] for r in cloud.services.json("GET", path, token=token)["access_list"]]


def locks(cloud, id, token=None):
    path = f"/share/v2/resource-locks?all_projects=1&resource_id={id}"
    told = {"X-OpenStack-Manila-API-Version": "2.82"}
    return cloud.services.json("GET", path, token=token or cloud.admin, **told)["resource_locks"]


def test_a_share_comes_and_goes(cloud):
    s, id = stopped(cloud), share(cloud)
    said = attach(cloud, s, id, tag="here", settle=False)["share"]
    assert said == {"share_id": id, "status": "attaching", "tag": "here"}
    cloud.settle()
    assert shown(cloud, s) == {id: "inactive"}
    assert shared(s.state)[s.id] == [id]
    assert rules(cloud, id) == ["127.0.0.1"] and len(locks(cloud, id)) == 1
    assert rules(cloud, id, cloud.user.token) == ["******"]  # where servers are is not for tenants
    cloud.services.refused(409, "DELETE", f"/share/v2/shares/{id}", None, cloud.user.token)
    s.act("os-start")
    assert shown(cloud, s) == {id: "active"}
    one = cloud.json("GET", f"/servers/{s.id}/shares/{id}", version=V)["share"]
    assert set(one) == {"share_id", "status", "tag"}
    one = cloud.json("GET", f"/servers/{s.id}/shares/{id}", version=V, token=cloud.admin)["share"]
    assert one["export_location"].endswith(f"/shares/{id}") and one["uuid"]
    detach(cloud, s, id, ok=409)
    s.act("reboot", {"type": "HARD"})
    assert shown(cloud, s) == {id: "active"}
    s.act("os-stop")
    detach(cloud, s, id)
    assert shown(cloud, s) == {} and shared(s.state)[s.id] == [] and rules(cloud, id) == [] and locks(cloud, id) == []
    assert s.events()[-2:] == [("compute_stop_instance", "Success"), ("compute_deny_share", "Success")]
    assert ("compute_allow_share", "Success") in s.events()
    cloud.services.ask("DELETE", f"/share/v2/shares/{id}", None, cloud.user.token).read()
    cloud.json("GET", f"/servers/{s.id}/shares/{id}", version=V, ok=404)


def test_what_is_no_share_for_it(cloud):
    s, id, other = stopped(cloud), share(cloud), share(cloud)
    bob = cloud.services.person("bob", "member")
    path = f"/servers/{s.id}/shares"
    nobody = "00000000-0000-0000-0000-000000000000"
    attach(cloud, s, nobody, ok=404)
    wish = {"share": {"share_proto": "NFS", "size": 1}}
    his = cloud.services.json("POST", "/share/v2/shares", wish, bob.token)["share"]["id"]
    attach(cloud, s, his, ok=404)
    for junk in (
        {"share_id": "x"},
        {},
        {"share_id": id, "tag": "a b"},
        {"share_id": id, "tag": ""},
        {"share_id": id, "x": 1},
    ):
        cloud.json("POST", path, {"share": junk}, ok=400, version=V)
    attach(cloud, s, id, tag="t")
    attach(cloud, s, id, ok=409)
    attach(cloud, s, other, tag="t", ok=409)
    cloud.json("POST", path, {"share": {"share_id": other}}, ok=404, version="2.96")
    cloud.json("GET", path, ok=403, version=V, token=bob.token)
    running = cloud.boot("two")
    attach(cloud, running, other, ok=409)
    detach(cloud, s, other, ok=404)


def test_who_has_a_share_stays_where_he_is(cloud):
    s, id = stopped(cloud), share(cloud)
    attach(cloud, s, id)
    for action, said, ok in (
        ("resize", {"flavorRef": "large"}, 409), ("shelve", None, 409), ("rebuild", {"imageRef": cloud.image_id}, 400),
    ):  # fmt: skip
        s.act(action, said, ok=ok)
    s.act("os-start")
    s.act("suspend", ok=409)
    for action, said in (
        ("migrate", None),
        ("os-migrateLive", {"host": None, "block_migration": "auto"}),
        ("evacuate", {}),
    ):
        cloud.json("POST", f"/servers/{s.id}/action", {action: said}, ok=409, token=cloud.admin)
    s.delete()
    assert rules(cloud, id) == [] and locks(cloud, id) == []


def test_who_is_being_deleted_is_not_kept_from_it(cloud):
    """Whatever runs, a share may be asked for or given back; who is at work stays the owner."""
    s, id, other = stopped(cloud), share(cloud), share(cloud)
    attach(cloud, s, id)
    s.delete(settle=False)
    detach(cloud, s, id, settle=False)
    attach(cloud, s, other, settle=False)
    cloud.settle()
    assert s.row.vm_state == "deleted" and s.row.task_state is None
    assert [rules(cloud, x) for x in (id, other)] == [[], []]


def test_one_that_is_asked_for_while_its_server_goes_goes_along(cloud):
    """Who deletes the server has looked at its shares by then."""
    s, id = stopped(cloud), share(cloud)
    row = s.row
    s.delete()
    with cloud.db.tx() as tx:  # the request had seen it alive
        wanted = Sharing(cloud.ids.uuid(), s.id, id, tag="late", export="127.0.0.1:/late")
        shares.add(tx, wanted)
        job = AttachShare(row, wanted)
        run = start(tx, "attach_share", job, id=cloud.ids.uuid(), subject=s.id, now=cloud.clock.now())
    cloud.conductor.wake(run)
    cloud.settle()
    with cloud.db.read() as tx:
        assert shares.all(tx) == []


def test_two_servers_of_one_host_have_the_same_share(tmp_path):
    with telling(tmp_path, hosts=1) as cloud:
        one, two, id = stopped(cloud), stopped(cloud, "two"), share(cloud)
        attach(cloud, one, id)
        attach(cloud, two, id)
        assert rules(cloud, id) == ["127.0.0.1"] and len(locks(cloud, id)) == 1
        detach(cloud, one, id, settle=False)
        two.delete(settle=False)
        attach(cloud, one, id, ok=409)
        cloud.settle()
        assert rules(cloud, id) == [] == locks(cloud, id)
        attach(cloud, one, id)
        assert shown(cloud, one) == {id: "inactive"}


def test_a_host_that_refuses_leaves_nobody_let_in(cloud):
    s, id = stopped(cloud), share(cloud)
    s.state.broken = True
    attach(cloud, s, id)
    assert shown(cloud, s) == {id: "error"} and rules(cloud, id) == [] == locks(cloud, id)
    s.state.broken = False
    s.act("os-start")
    assert s.status == "ACTIVE"
    s.act("os-stop")
    detach(cloud, s, id)
    attach(cloud, s, id)
    assert shown(cloud, s) == {id: "inactive"}


def test_who_is_started_meanwhile_is_not_given_it(cloud):
    s, id = stopped(cloud), share(cloud)
    attach(cloud, s, id, settle=False)
    s.act("os-start")
    assert s.status == "ACTIVE" and shown(cloud, s)[id] in ("active", "error")


def test_what_a_host_lost_or_kept_is_found(cloud):
    s, id = stopped(cloud), share(cloud)
    attach(cloud, s, id)
    m = s.state.machines[s.id]
    m.machine = msgspec.structs.replace(m.machine, shares=[])
    cloud.start_hosts()
    cloud.settle()
    assert shown(cloud, s) == {id: "error"}
    cloud.pass_time(700)
    assert rules(cloud, id) == [] == locks(cloud, id)


def test_a_crash_at_any_boundary(tmp_path):
    cloud = Cloud(tmp_path, hosts=1)
    s, id = stopped(cloud), share(cloud)
    for k in range(1, 200):
        cloud.edges.count, cloud.edges.crash_at = 0, k
        attach(cloud, s, id)
        detach(cloud, s, id)
        crashed, cloud.edges.crash_at = cloud.edges.count >= k, 0
        cloud.settle()
        assert cloud.check() == [], f"after a crash at {k}"
        for left in shown(cloud, s):
            detach(cloud, s, left)
        if not crashed:
            break
    assert not crashed
    cloud.db.close()
