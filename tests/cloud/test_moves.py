"""What moves a server, as users and operators ask for it; and what each host holds meanwhile."""

import pytest

from kilonova.cli.cloud import alone
from kilonova.kit.bus import opened
from kilonova.kit.journal import RUNS, STEPS
from kilonova.model import options
from kilonova.model.flavor import Flavor
from kilonova.model.options import Config
from kilonova.store import catalog, hosts, migrations, placement
from tests.cloud.test_attach import attach
from tests.cloud.test_volume_boot import boot, made, of_volume, seen
from tests.stories import Crash, Edgy, telling


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path, hosts=2) as c:
        yield c


def moves(cloud, **filters):
    query = "&".join(f"{k}={v}" for k, v in filters.items())
    return cloud.json("GET", f"/os-migrations?{query}", token=cloud.admin)["migrations"]


def held(cloud, consumer):
    """{host: memory} of a consumer of claims."""
    with cloud.db.read() as tx:
        names = {p.uuid: p.name for p in tx.execute(placement.PROVIDERS.select())}
        return {names[p]: a["MEMORY_MB"] for p, a in placement.allocations_of(tx, consumer).items()}


def last_move(cloud, s):
    with cloud.db.read() as tx:
        return migrations.of(tx.execute(migrations.SELECT.where(migrations.T.c.server == s.id)).all()[-1])


def used(cloud):
    return cloud.json("GET", "/limits")["limits"]["absolute"]["totalRAMUsed"]


def swept(cloud):
    """What was found on hosts though it should not have been there, and was removed."""
    found = STEPS.select().join(RUNS, RUNS.c.id == STEPS.c.run).where(RUNS.c.workflow == "mend")
    with cloud.db.read() as tx:
        return [r.step for r in tx.execute(found) if r.step in ("destroy", "drop")]


def write(s, text):
    """As if the guest wrote it on its disk."""
    s.state.machines[s.id].disk = text


def read(s):
    return s.state.machines[s.id].disk


def act_as_admin(cloud, s, action, said=None, *, ok=202, settle=True, version="2.96"):
    answer = cloud.json("POST", f"/servers/{s.id}/action", {action: said}, ok=ok, token=cloud.admin, version=version)
    if settle:
        cloud.settle()
    return answer


# ---- resize


def test_a_resize_is_confirmed(cloud):
    s = cloud.boot()
    write(s, "mine")
    source, (address,) = s.row.host, s.show()["addresses"]["private"]
    s.act("resize", {"flavorRef": "large"})
    shown = s.show()
    assert (shown["status"], shown["OS-EXT-STS:vm_state"]) == ("VERIFY_RESIZE", "resized")
    assert (shown["flavor"]["original_name"], shown["addresses"]["private"]) == ("large", [address])
    target = s.row.host
    assert target != source
    assert read(s) == "mine"
    assert s.state.machines[s.id].machine.memory_mb == 4096
    m = last_move(cloud, s)
    assert (m.type, m.status, m.source, m.dest) == ("resize", "finished", source, target)
    assert (held(cloud, s.id), held(cloud, m.uuid)) == ({target: 4096}, {source: 512})
    assert cloud.states[source].machines[s.id].power == "shutdown"
    cloud.settle()
    assert cloud.check() == []  # the old machine is known, and not swept
    s.act("confirmResize", ok=204)
    assert (s.status, s.row.task_state, s.row.host) == ("ACTIVE", None, target)
    assert held(cloud, m.uuid) == {}
    assert s.id not in cloud.states[source].machines
    assert last_move(cloud, s).status == "confirmed"
    assert [e for e, _ in s.events()][1:] == [
        "conductor_migrate_server",
        "cold_migrate",
        "compute_prep_resize",
        "compute_resize_instance",
        "compute_finish_resize",
        "compute_confirm_resize",
    ]


def test_a_resize_is_reverted(cloud):
    s = cloud.boot()
    write(s, "before")
    source, epoch = s.row.host, s.row.epoch
    s.act("resize", {"flavorRef": "large"})
    target = s.row.host
    write(s, "after")
    s.act("revertResize")
    row = s.row
    assert (s.status, row.host, row.flavor.name, read(s)) == ("ACTIVE", source, "small", "before")
    assert row.epoch > epoch + 1
    assert s.id not in cloud.states[target].machines
    m = last_move(cloud, s)
    assert (m.status, held(cloud, m.uuid), held(cloud, s.id)) == ("reverted", {}, {source: 512})
    s.act("resize", {"flavorRef": "large"})  # and once more
    s.act("confirmResize", ok=204)
    assert s.row.host == target


def test_a_stopped_server_is_resized_and_stays_stopped(cloud):
    s = cloud.boot()
    s.act("os-stop")
    s.act("resize", {"flavorRef": "large"})
    assert (s.status, s.state.machines[s.id].power) == ("VERIFY_RESIZE", "shutdown")
    s.act("revertResize")
    assert s.status == "SHUTOFF"
    s.act("resize", {"flavorRef": "large"})
    s.act("confirmResize", ok=204)
    assert s.status == "SHUTOFF"


def test_the_same_host_is_no_choice(tmp_path):
    with telling(tmp_path, hosts=1) as cloud:
        s = cloud.boot()
        s.act("resize", {"flavorRef": "large"})
        assert (s.status, s.row.flavor.name) == ("ACTIVE", "small")
        assert last_move(cloud, s).status == "error"
        (action, *_) = cloud.json("GET", f"/servers/{s.id}/os-instance-actions")["instanceActions"]
        assert (action["action"], action["message"]) == ("resize", "Error")


def test_the_same_host_where_the_operator_allows_it(tmp_path):
    config = Config(compute=options.Compute(allow_resize_to_same_host=True))
    with telling(tmp_path, hosts=1, config=config) as cloud:
        s = cloud.boot()
        write(s, "before")
        for word in ("revertResize", "confirmResize"):
            s.act("resize", {"flavorRef": "large"})
            assert s.status == "VERIFY_RESIZE"
            m = last_move(cloud, s)
            assert (held(cloud, s.id), held(cloud, m.uuid)) == ({"h0": 4096}, {"h0": 512})
            assert cloud.check() == []
            write(s, "after")
            s.act(word, ok=202 if word == "revertResize" else 204)
            assert (s.status, cloud.states["h0"].kept) == ("ACTIVE", {})
            assert read(s) == ("before" if word == "revertResize" else "after")


def test_a_cloud_of_one_host_is_one_where_it_is_allowed():
    def allowed(said: bool | None, driver: str = "libvirt", hosts: int = 1) -> bool | None:
        compute = options.Compute(allow_resize_to_same_host=said, driver=driver)
        return alone(Config(compute=compute, sim=options.Sim(hosts=hosts))).compute.allow_resize_to_same_host

    assert allowed(None) and allowed(None, "sim") and allowed(True, "sim", 2)
    assert not (allowed(False) or allowed(None, "sim", 2))


@pytest.mark.parametrize("at", ["prepare", "depart", "arrive", "start"])
def test_a_resize_that_fails_leaves_all_as_it_was(cloud, at):
    s = cloud.boot()
    write(s, "mine")
    before = s.row
    for name, state in cloud.states.items():
        if (name == before.host) == (at == "depart"):
            driver = cloud.driver(name)
            whole = driver._act
            driver._act = lambda what, may_fail=True, whole=whole: refuse(what, at, whole)
        del state
    s.act("resize", {"flavorRef": "large"})
    row = s.row
    assert (row.vm_state, row.host, row.epoch, row.flavor.name) == ("active", before.host, before.epoch, "small")
    assert (s.state.machines[s.id].power, read(s)) == ("running", "mine")
    assert last_move(cloud, s).status == "error"
    assert used(cloud) == 512


def refuse(what, at, whole):
    from kilonova.kit.errors import Refused

    if what == {"depart": "stop"}.get(at, at):
        raise Refused(f"It refused to {what}.")
    whole(what)


def test_a_revert_that_fails_can_be_asked_again(cloud):
    s = cloud.boot()
    source = s.row.host
    s.act("resize", {"flavorRef": "large"})
    target = s.row.host
    cloud.states[source].broken = True
    s.act("revertResize")
    assert (s.status, s.row.host, s.state.machines[s.id].power) == ("VERIFY_RESIZE", target, "running")
    assert cloud.check() == []
    cloud.states[source].broken = False
    s.act("revertResize")
    assert (s.status, s.row.host) == ("ACTIVE", source)


def test_what_is_kept_outlives_a_revert_in_which_its_host_was_lost(cloud):
    """The host had begun to bring it back when it went; nobody could tell it that nothing came of that."""
    s = cloud.boot()
    write(s, "before")
    source = s.row.host
    s.act("resize", {"flavorRef": "large"})
    driver = cloud.driver(source)
    whole = driver._newest

    def lost(*args):
        whole(*args)
        cloud.dead.add(source)
        raise Crash("host, in the middle of it")

    driver._newest = lost
    s.act("revertResize")
    assert s.status == "VERIFY_RESIZE"
    cloud.dead.clear()
    cloud.pass_time(30)
    assert cloud.check() == []
    s.act("revertResize")
    assert (s.status, s.row.host, read(s)) == ("ACTIVE", source, "before")


def test_what_cannot_be_a_new_flavor(cloud):
    s = cloud.boot()

    def flavor(name, **more):
        body = {"flavor": {"name": name, "id": name, "vcpus": 1, "ram": 512, "disk": 1} | more}
        cloud.json("POST", "/flavors", body, token=cloud.admin)

    flavor("hidden", **{"os-flavor-access:is_public": False})
    flavor("none", disk=0)
    with cloud.db.tx() as tx:
        catalog.add_flavor(tx, Flavor("off", "off", 1, 512, 1, disabled=True), cloud.clock.now())
    for ref in ("small", "nobody", "hidden", "none", "off"):
        s.act("resize", {"flavorRef": ref}, ok=400)
    s.act("resize", {"flavorRef": "large"})
    s.act("confirmResize", ok=204)
    s.act("resize", {"flavorRef": "small"}, ok=400)  # its disk cannot shrink
    assert s.row.task_state is None


def test_the_larger_flavor_counts_until_it_is_decided(cloud):
    """The old one may come back, so it counts as well."""
    s = cloud.boot()
    quota = {"quota_set": {"ram": 4096, "force": True}}
    cloud.json("PUT", f"/os-quota-sets/{cloud.user.project_id}", quota, token=cloud.admin)
    other = cloud.boot("two")
    s.act("resize", {"flavorRef": "large"}, ok=403)
    assert (s.status, s.row.task_state, used(cloud)) == ("ACTIVE", None, 1024)
    other.delete()
    s.act("resize", {"flavorRef": "large"}, settle=False)
    assert used(cloud) == 4096
    cloud.settle()
    assert used(cloud) == 4096
    s.act("revertResize")
    assert used(cloud) == 512


def test_two_at_once(cloud):
    s = cloud.boot()
    s.act("resize", {"flavorRef": "large"}, settle=False)
    s.act("resize", {"flavorRef": "large"}, settle=False, ok=409)
    act_as_admin(cloud, s, "migrate", settle=False, ok=409)
    s.act("os-stop", settle=False, ok=409)
    s.act("confirmResize", settle=False, ok=409)
    cloud.settle()
    s.act("confirmResize", settle=False, ok=204)
    s.act("revertResize", settle=False, ok=409)
    cloud.settle()
    assert s.status == "ACTIVE"


def test_a_host_that_is_down_lets_nobody_go(cloud):
    s = cloud.boot()
    source = s.row.host
    cloud.dead.add(source)
    cloud.pass_time(120)
    s.act("resize", {"flavorRef": "large"}, ok=409)
    cloud.dead.clear()
    cloud.pass_time(20)
    s.act("resize", {"flavorRef": "large"})
    cloud.dead.add(source)
    cloud.pass_time(120)
    s.act("confirmResize", ok=409)
    cloud.dead.clear()
    cloud.pass_time(20)
    s.act("confirmResize", ok=204)
    assert s.status == "ACTIVE"


@pytest.mark.parametrize("when", ["resizing", "resized", "confirming", "reverting"])
@pytest.mark.parametrize("steps", range(0, 16, 3))
def test_deleted_in_the_middle(cloud, when, steps):
    s = cloud.boot()
    s.act("resize", {"flavorRef": "large"}, settle=when != "resizing")
    if when in ("confirming", "reverting"):
        s.act(*{"confirming": ("confirmResize",), "reverting": ("revertResize",)}[when], settle=False, ok=204 if when == "confirming" else 202)  # fmt: skip
    for _ in range(steps):
        cloud.step()
    s.delete()
    assert s.row.vm_state == "deleted"
    assert last_move(cloud, s).status in ("confirmed", "reverted", "error")
    assert swept(cloud) == []
    assert not any(state.machines or state.kept for state in cloud.states.values())


def test_a_source_that_is_gone_at_the_end_is_swept_when_it_returns(cloud):
    s = cloud.boot()
    source = s.row.host
    s.act("resize", {"flavorRef": "large"})
    s.act("confirmResize", settle=False, ok=204)
    cloud.dead.add(source)
    cloud.settle()
    assert s.status == "ACTIVE"
    assert s.id in cloud.states[source].machines
    cloud.dead.clear()
    cloud.settle()
    assert s.id not in cloud.states[source].machines


# ---- cold migration


def test_a_cold_migration_goes_where_it_is_sent(tmp_path):
    with telling(tmp_path, hosts=3) as cloud:
        s = cloud.boot()
        source = s.row.host
        target = sorted({"h0", "h1", "h2"} - {source})[1]
        s.act("migrate", ok=403)
        act_as_admin(cloud, s, "migrate", {"host": source}, ok=400)
        act_as_admin(cloud, s, "migrate", {"host": "nobody"}, ok=400)
        act_as_admin(cloud, s, "migrate", {"host": target})
        assert (s.status, s.row.host) == ("VERIFY_RESIZE", target)
        s.act("confirmResize", ok=204)
        assert (s.status, last_move(cloud, s).type) == ("ACTIVE", "migration")
        act_as_admin(cloud, s, "migrate", {}, version="2.1")  # what was said there meant nothing yet
        assert s.row.host != target
        s.act("revertResize")
        assert s.row.host == target


def test_the_pinned_zone_holds_for_moves(cloud):
    group = cloud.json("POST", "/os-aggregates", {"aggregate": {"name": "z", "availability_zone": "z"}}, token=cloud.admin)["aggregate"]  # fmt: skip
    cloud.json("POST", f"/os-aggregates/{group['id']}/action", {"add_host": {"host": "h0"}}, token=cloud.admin)
    cloud.clock.sleep(2)
    s = cloud.boot(availability_zone="z")
    assert s.row.host == "h0"
    act_as_admin(cloud, s, "migrate")
    assert (s.status, s.row.host, last_move(cloud, s).status) == ("ACTIVE", "h0", "error")


# ---- while it runs


def live(cloud, s, host=None, *, version="2.96", settle=True, ok=202, **more):
    said = {"host": host, "block_migration": "auto"} | more
    return act_as_admin(cloud, s, "os-migrateLive", said, version=version, settle=settle, ok=ok)


def ways(cloud, s):
    """{host: status} of its port's bindings."""
    (plug,) = s.row.plugs
    return {b.host: b.status for b in cloud.neighbours.network.bindings(plug.port_id)}


def test_a_running_server_moves(cloud):
    s = cloud.boot()
    write(s, "mine")
    source, before = s.row.host, s.row
    live(cloud, s)
    row = s.row
    assert (s.status, row.host != source, row.epoch > before.epoch, read(s)) == ("ACTIVE", True, True, "mine")
    assert row.launched_at == before.launched_at
    assert s.id not in cloud.states[source].machines
    assert ways(cloud, s) == {row.host: "ACTIVE"}
    m = last_move(cloud, s)
    assert (m.type, m.status, held(cloud, m.uuid), held(cloud, s.id)) == ("live-migration", "completed", {}, {row.host: 512})  # fmt: skip
    assert m.memory_total == m.memory_processed == 512 << 20
    assert [e for e, _ in s.events()][1:] == [
        "conductor_live_migrate_instance",
        "compute_pre_live_migration",
        "compute_live_migration",
        "compute_post_live_migration_at_destination",
    ]
    s.act("pause")
    live(cloud, s, source)
    assert (s.status, s.row.host) == ("PAUSED", source)


def test_who_may_be_named_as_target(cloud):
    s = cloud.boot()
    source = s.row.host
    (other,) = {"h0", "h1"} - {source}
    live(cloud, s, "nobody", ok=400)
    live(cloud, s, source, ok=400)
    live(cloud, s, force=True, version="2.67", ok=400)
    live(cloud, s, other, force=True, ok=400)  # from 2.68 on there is no such word
    act_as_admin(cloud, s, "os-migrateLive", {"host": other, "block_migration": "auto", "disk_over_commit": False}, version="2.24", ok=400)  # fmt: skip
    s.act("os-migrateLive", {"host": None, "block_migration": False}, ok=403)
    disabled = next(x for x in cloud.json("GET", "/os-services?binary=nova-compute", token=cloud.admin)["services"] if x["host"] == other)  # fmt: skip
    cloud.json("PUT", f"/os-services/{disabled['id']}", {"status": "disabled"}, token=cloud.admin)
    live(cloud, s, other)
    assert (s.row.host, last_move(cloud, s).status) == (source, "error")
    live(cloud, s, other, force=True, version="2.67")
    assert s.row.host == other
    s.act("os-stop")
    live(cloud, s, source, ok=409)


def test_progress_is_seen_and_it_can_be_called_off(cloud):
    s = cloud.boot()
    source = s.row.host
    driver = cloud.driver(source)
    seen, whole = [], driver._act

    def in_the_middle(what, may_fail=True):
        whole(what, may_fail)
        if what == "send" and not seen:
            seen.append(None)
            beside(cloud, lambda: seen.append(cloud.json("GET", f"/servers/{s.id}/migrations", token=cloud.admin)))
            number = last_move(cloud, s).id
            path = f"/servers/{s.id}/migrations/{number}"
            beside(cloud, lambda: cloud.json("DELETE", path, ok=202, token=cloud.admin))

    driver._act = in_the_middle
    live(cloud, s)
    (shown,) = seen[1]["migrations"]
    assert (shown["status"], shown["source_compute"]) == ("running", source)
    m = last_move(cloud, s)
    assert (m.status, s.status, s.row.host, s.state.machines[s.id].power) == ("cancelled", "ACTIVE", source, "running")
    assert (ways(cloud, s), held(cloud, s.id), held(cloud, m.uuid)) == ({source: "ACTIVE"}, {source: 512}, {})
    assert cloud.json("GET", f"/servers/{s.id}/migrations", token=cloud.admin)["migrations"] == []
    names = [a["action"] for a in cloud.json("GET", f"/servers/{s.id}/os-instance-actions")["instanceActions"]]
    assert names == ["live_migration_cancel", "live-migration", "create"]


def beside(cloud, do):
    """Somebody does something while a host is at work, and what follows reaches the host."""
    do()
    at_work, cloud.edges.at_work = cloud.edges.at_work, ""
    while cloud.woken:
        cloud.conductor.engine.carry(cloud.woken.popleft())
    letters = list(cloud.bus.letters)
    cloud.bus.letters.clear()
    for to, raw in letters:
        cloud.bus.doors[to](raw)
    cloud.edges.at_work = at_work


def test_it_can_be_hurried(cloud):
    s = cloud.boot()
    parts = []
    driver = cloud.driver(s.row.host)
    whole = driver._act

    def in_the_middle(what, may_fail=True):
        whole(what, may_fail)
        if what == "send":
            parts.append(what)
            if len(parts) == 2:
                path = f"/servers/{s.id}/migrations/{last_move(cloud, s).id}/action"
                beside(cloud, lambda: cloud.json("POST", path, {"force_complete": None}, ok=202, token=cloud.admin))

    driver._act = in_the_middle
    live(cloud, s)
    assert (len(parts), last_move(cloud, s).status) == (2, "completed")


def test_one_at_a_time_leaves_a_host_and_who_waits_can_be_called_off(cloud):
    one, two = (cloud.boot(n, host="h0") for n in ("one", "two"))
    live(cloud, one, settle=False)
    live(cloud, two, settle=False)
    while cloud.woken:
        cloud.conductor.engine.carry(cloud.woken.popleft())
    assert (last_move(cloud, one).status, last_move(cloud, two).status) == ("preparing", "queued")
    path = f"/servers/{two.id}/migrations/{last_move(cloud, two).id}"
    cloud.json("DELETE", path, ok=400, token=cloud.admin, version="2.64")
    cloud.json("POST", f"{path}/action", {"force_complete": None}, ok=400, token=cloud.admin)
    assert cloud.json("GET", path, token=cloud.admin)["migration"]["status"] == "queued"
    cloud.json("DELETE", path, ok=202, token=cloud.admin)
    cloud.settle()
    assert (last_move(cloud, one).status, last_move(cloud, two).status) == ("completed", "cancelled")
    assert (two.status, two.row.host) == ("ACTIVE", "h0")
    cloud.json("DELETE", path, ok=409, token=cloud.admin)


@pytest.mark.parametrize("at", ["prepare a landing", "send"])
def test_what_fails_before_it_has_gone_leaves_it_where_it_was(cloud, at):
    s = cloud.boot()
    source = s.row.host
    for name in cloud.states:
        whole = cloud.driver(name)._act
        cloud.driver(name)._act = lambda what, may_fail=True, whole=whole: refuse(what, at, whole)
    live(cloud, s)
    m = last_move(cloud, s)
    assert (m.status, s.row.host, s.state.machines[s.id].power) == ({"send": "failed"}.get(at, "error"), source, "running")  # fmt: skip
    assert ways(cloud, s) == {source: "ACTIVE"}
    assert swept(cloud) == []


@pytest.mark.parametrize("gone", [False, True])
def test_when_the_source_does_not_answer_the_target_decides(cloud, gone):
    s = cloud.boot()
    source = s.row.host
    driver = cloud.driver(source)
    whole = driver._switched

    def then_it_dies(*args):
        done = whole(*args) if gone else True
        cloud.dead.add(source)
        cloud.bus.lose = lambda to, raw: to == "conductor" and opened(raw).name == "Answered"
        return done

    driver._switched = then_it_dies
    live(cloud, s, settle=False)
    cloud.tick()
    cloud.bus.lose = lambda to, raw: False
    cloud.settle()
    assert (s.row.host == source, s.status) == (not gone, "ACTIVE")
    assert last_move(cloud, s).status == ("completed" if gone else "failed")
    driver._switched = whole
    cloud.dead.clear()
    cloud.settle()
    assert (s.id in cloud.states[source].machines) == (not gone)


@pytest.mark.parametrize("steps", range(0, 14, 2))
def test_deleted_while_it_moves(cloud, steps):
    s = cloud.boot()
    live(cloud, s, settle=False)
    for _ in range(steps):
        cloud.step()
    s.delete()
    assert s.row.vm_state == "deleted"
    assert swept(cloud) == []
    assert not any(state.machines for state in cloud.states.values())


# ---- the list


def test_the_list_of_moves(cloud):
    a, b = cloud.boot("a"), cloud.boot("b")
    a.act("resize", {"flavorRef": "large"})
    a.act("confirmResize", ok=204)
    live(cloud, b)
    both = moves(cloud)
    assert [(m["instance_uuid"], m["migration_type"], m["status"]) for m in both] == [
        (b.id, "live-migration", "completed"),
        (a.id, "resize", "confirmed"),
    ]
    assert both[1]["old_instance_type_id"] != both[1]["new_instance_type_id"]
    assert [m["id"] for m in moves(cloud, status="confirmed")] == [both[1]["id"]]
    assert [m["id"] for m in moves(cloud, instance_uuid=b.id)] == [both[0]["id"]]
    first = cloud.json("GET", "/os-migrations?limit=1", token=cloud.admin)
    assert [m["id"] for m in first["migrations"]] == [both[0]["id"]]
    rest = first["migrations_links"][0]["href"].split("/v2.1")[1]
    assert [m["id"] for m in cloud.json("GET", rest, token=cloud.admin)["migrations"]] == [both[1]["id"]]
    cloud.json("GET", "/os-migrations?marker=nobody", token=cloud.admin, ok=400)
    cloud.json("GET", "/os-migrations", ok=403)
    old = cloud.json("GET", "/os-migrations", token=cloud.admin, version="2.1")["migrations"]
    assert [m["id"] for m in old] == [m["id"] for m in reversed(both)]
    assert "uuid" not in old[0]
    later = both[0]["updated_at"] + "Z"
    assert [m["id"] for m in moves(cloud, **{"changes-since": later})] == [both[0]["id"]]


# ---- from a host that is down


def fail(cloud, host):
    """It says nothing for two minutes."""
    cloud.dead.add(host)
    cloud.pass_time(120)


def evacuate(cloud, s, *, ok=200, version="2.96", settle=True, **said):
    return act_as_admin(cloud, s, "evacuate", said, ok=ok, version=version, settle=settle)


def test_a_server_of_a_dead_host_lives_on(cloud):
    s = cloud.boot()
    write(s, "lost")
    source, epoch, plugs = s.row.host, s.row.epoch, s.row.plugs
    evacuate(cloud, s, ok=400)  # its host is well
    s.act("evacuate", {}, ok=403)
    fail(cloud, source)
    answer = evacuate(cloud, s, version="2.13", onSharedStorage=False, adminPass="secret")
    assert answer == {"adminPass": "secret"}
    row = s.row
    assert (s.status, row.host != source, row.epoch > epoch, read(s)) == ("ACTIVE", True, True, "")
    assert [p.port_id for p in row.plugs] == [p.port_id for p in plugs]
    assert s.state.machines[s.id].machine.admin_password == "secret"
    m = last_move(cloud, s)
    assert (m.type, m.status, held(cloud, m.uuid)) == ("evacuation", "done", {source: 512})
    assert s.id in cloud.states[source].machines
    cloud.dead.clear()
    cloud.pass_time(200)
    assert s.id not in cloud.states[source].machines
    m = last_move(cloud, s)
    assert (m.status, held(cloud, m.uuid)) == ("completed", {})
    assert (s.status, s.row.host) == ("ACTIVE", row.host)


def test_by_policy_servers_of_a_dead_host_move_by_themselves(tmp_path):
    """Only where it is set, only when few are silent, and not from a host that is being looked after."""
    policy = Config(evacuation=options.Evacuation(after_s=300))
    with telling(tmp_path, hosts=4, config=policy) as cloud:
        one, two = cloud.boot(), cloud.boot()
        while two.row.host == one.row.host:
            two = cloud.boot()
        source, kept = one.row.host, two.row.host
        two.act("os-stop")
        act = cloud.json("GET", f"/os-services?host={kept}&binary=nova-compute", token=cloud.admin)["services"][0]["id"]
        cloud.dead.add(source)
        cloud.pass_time(200)
        cloud.settle()
        assert one.row.host == source  # silent, but not for long enough
        cloud.pass_time(200)
        cloud.settle()
        assert (one.row.host != source, one.status, last_move(cloud, one).type) == (True, "ACTIVE", "evacuation")
        assert cloud.mend("deserted") == []
        cloud.dead.clear()
        cloud.pass_time(200)
        assert one.id not in cloud.states[source].machines

        cloud.json("PUT", f"/os-services/{act}", {"status": "disabled"}, token=cloud.admin)
        cloud.dead.add(kept)
        cloud.pass_time(600)
        cloud.settle()
        assert two.row.host == kept
        cloud.dead.add(next(h for h in cloud.states if h != kept))
        cloud.pass_time(120)
        cloud.json("PUT", f"/os-services/{act}", {"status": "enabled"}, token=cloud.admin)
        cloud.pass_time(600)
        assert two.row.host == kept  # half of all hosts: that is more likely us
        cloud.dead = {kept}
        cloud.pass_time(600)
        cloud.settle()
        assert (two.row.host != kept, two.status) == (True, "SHUTOFF")
        cloud.dead.clear()
        cloud.pass_time(200)


@pytest.mark.parametrize(("version", "was", "ends"), [("2.94", "active", "ACTIVE"), ("2.95", "active", "SHUTOFF"), ("2.14", "stopped", "SHUTOFF"), ("2.95", "error", "ACTIVE")])  # fmt: skip
def test_how_it_ends_there(cloud, version, was, ends):
    s = cloud.boot()
    if was == "stopped":
        s.act("os-stop")
    if was == "error":
        cloud.dead.add(s.row.host)
        s.act("reboot", {"type": "SOFT"})
        act_as_admin(cloud, s, "os-resetState", {"state": "error"})
    fail(cloud, s.row.host)
    assert evacuate(cloud, s, version=version) is None
    assert (s.status, s.state.machines[s.id].power) == (ends, "running" if ends == "ACTIVE" else "shutdown")


def test_where_it_may_go(cloud):
    s = cloud.boot()
    source = s.row.host
    (other,) = {"h0", "h1"} - {source}
    fail(cloud, source)
    evacuate(cloud, s, host="nobody", ok=404)
    evacuate(cloud, s, host=source, ok=400)
    evacuate(cloud, s, host=other, force=True, version="2.68", ok=400)
    evacuate(cloud, s, force=True, version="2.67", ok=400)
    evacuate(cloud, s, onSharedStorage=True, adminPass="x", version="2.1", ok=400)
    evacuate(cloud, s, version="2.13", ok=400)
    evacuate(cloud, s, host=other)
    assert s.row.host == other


def test_who_is_back_in_time_keeps_his_servers(cloud):
    s = cloud.boot()
    source = s.row.host
    fail(cloud, source)
    evacuate(cloud, s, settle=False)
    cloud.dead.clear()
    woken = list(cloud.woken)
    cloud.woken.clear()
    cloud.report()
    cloud.tick()
    cloud.mend("beats")
    cloud.woken.extend(woken)
    cloud.settle()
    assert (s.status, s.row.host, last_move(cloud, s).status) == ("ACTIVE", source, "error")


def test_nowhere_to_go_leaves_it_as_it_was(cloud):
    s = cloud.boot()
    before = s.row
    fail(cloud, "h0")
    fail(cloud, "h1")
    evacuate(cloud, s)
    row = s.row
    assert (row.vm_state, row.host, row.epoch) == (before.vm_state, before.host, before.epoch)
    assert last_move(cloud, s).status == "error"
    cloud.dead.clear()
    cloud.pass_time(30)


def test_what_waits_for_the_dead_is_overtaken(cloud):
    s = cloud.boot()
    source = s.row.host
    fail(cloud, source)
    s.act("reboot", {"type": "SOFT"}, settle=False)
    evacuate(cloud, s, version="2.94", settle=False)
    evacuate(cloud, s, settle=False, ok=409)
    cloud.settle()
    assert (s.status, s.row.host != source) == ("ACTIVE", True)


@pytest.mark.parametrize("steps", range(0, 10, 2))
def test_deleted_while_it_is_made_anew(cloud, steps):
    s = cloud.boot()
    fail(cloud, s.row.host)
    evacuate(cloud, s, settle=False)
    for _ in range(steps):
        cloud.step()
    s.delete()
    assert s.row.vm_state == "deleted"
    cloud.dead.clear()
    cloud.settle()
    assert not any(state.machines for state in cloud.states.values())


def test_what_was_made_anew_and_cannot_have_its_volume_is_destroyed(cloud):
    """By the run that had it made; that it would be swept away one day is another matter."""
    s, id = cloud.boot(), made(cloud)
    attach(cloud, s, id)
    source = s.row.host
    before = {a.id for a in cloud.neighbours.volume.attachments(server_id=s.id)}
    fail(cloud, source)
    cloud.bus.lose = lambda to, raw: to == "conductor" and opened(raw).name == "Answered"
    evacuate(cloud, s, settle=False)
    cloud.tick()
    (target,) = [host for host, state in cloud.states.items() if s.id in state.machines and host != source]
    for a in cloud.neighbours.volume.attachments(server_id=s.id):
        if a.id not in before:
            cloud.neighbours.volume.release(a.id)
    cloud.bus.lose = lambda to, raw: False
    cloud.go_on(120)
    assert s.id not in cloud.states[target].machines
    assert (s.row.host, last_move(cloud, s).status) == (source, "error")
    cloud.dead.clear()


def test_a_host_that_keeps_what_nobody_owns_is_swept_all_the_same_when_the_server_has_moved(tmp_path):
    config = Config(compute=options.Compute(lost_server="log"))
    with telling(tmp_path, hosts=2, config=config) as cloud:
        s = cloud.boot()
        source = s.row.host
        fail(cloud, source)
        evacuate(cloud, s)
        cloud.dead.clear()
        cloud.pass_time(200)
        assert s.id not in cloud.states[source].machines


def service(cloud, host):
    listed = cloud.json("GET", f"/os-services?host={host}&binary=nova-compute", token=cloud.admin)["services"]
    return f"/os-services/{listed[0]['id']}"


def test_a_host_that_is_said_to_be_down_and_speaks_does_not_run_what_lives_elsewhere(cloud):
    s = cloud.boot()
    source = s.row.host
    path = service(cloud, source)
    cloud.json("PUT", path, {"forced_down": True}, token=cloud.admin)
    cloud.clock.sleep(2)
    evacuate(cloud, s, version="2.94")
    assert (s.status, s.row.host != source) == ("ACTIVE", True)
    cloud.json("DELETE", service(cloud, s.row.host), token=cloud.admin, ok=409)
    if last_move(cloud, s).status == "done":
        cloud.json("PUT", path, {"forced_down": False}, token=cloud.admin, ok=400)
    cloud.pass_time(150)
    assert s.id not in cloud.states[source].machines
    assert last_move(cloud, s).status == "completed"
    cloud.json("PUT", path, {"forced_down": False}, token=cloud.admin)


def test_a_host_that_never_comes_back_is_struck_off(cloud):
    s = cloud.boot()
    source = s.row.host
    fail(cloud, source)
    evacuate(cloud, s)
    cloud.json("PUT", service(cloud, source), {"forced_down": True}, token=cloud.admin)
    cloud.json("PUT", service(cloud, source), {"forced_down": False}, token=cloud.admin, ok=400)
    cloud.json("DELETE", service(cloud, source), token=cloud.admin, ok=204)
    assert (last_move(cloud, s).status, held(cloud, last_move(cloud, s).uuid)) == ("completed", {})


def test_a_host_that_keeps_something_is_not_struck_off(cloud):
    s = cloud.boot()
    source = s.row.host
    s.act("resize", {"flavorRef": "large"})
    cloud.json("DELETE", service(cloud, source), token=cloud.admin, ok=409)


# ---- what nobody asked for


def test_a_resize_is_confirmed_when_nobody_says_anything(tmp_path):
    config = Config(compute=options.Compute(resize_confirm_window_s=600))
    with telling(tmp_path, hosts=2, config=config) as cloud:
        s = cloud.boot()
        s.act("resize", {"flavorRef": "large"})
        assert cloud.mend("undecided") == []
        cloud.pass_time(700)
        assert (s.status, last_move(cloud, s).status) == ("ACTIVE", "confirmed")
        names = [a["action"] for a in cloud.json("GET", f"/servers/{s.id}/os-instance-actions")["instanceActions"]]
        assert names[0] == "confirmResize"


def test_what_an_administrator_made_of_it_leaves_nothing(cloud):
    s = cloud.boot()
    source = s.row.host
    s.act("resize", {"flavorRef": "large"})
    act_as_admin(cloud, s, "os-resetState", {"state": "active"})
    cloud.mend("undecided")
    cloud.settle()
    assert s.id not in cloud.states[source].machines
    assert last_move(cloud, s).status == "confirmed"


def test_ports_on_a_wrong_host_are_brought_back(cloud):
    s = cloud.boot()
    (plug,) = s.row.plugs
    (other,) = {"h0", "h1"} - {s.row.host}
    network = cloud.neighbours.network
    network.bind_port(plug.port_id, other, device_id=s.id, device_owner="compute:nova")
    assert len(cloud.mend("misplaced")) == 1
    assert network.port(plug.port_id).host == s.row.host
    live(cloud, s)
    network.expect_port(network.port(plug.port_id), "h0" if s.row.host == "h1" else "h1")
    assert len(cloud.mend("misplaced")) == 1
    assert cloud.mend("misplaced") == []


# ---- volumes come along


def at(cloud, volume):
    """(host of its one attachment, its id)."""
    (a,) = seen(cloud, volume)["attachments"]
    return a["host_name"], a["attachment_id"]


def moved_by(cloud, s, how):
    if how in ("confirmResize", "revertResize"):
        s.act("resize", {"flavorRef": "large"})
        s.act(how, ok=204 if how == "confirmResize" else 202)
    elif how == "live":
        live(cloud, s)
    else:
        fail(cloud, s.row.host)
        evacuate(cloud, s, version="2.94")


@pytest.mark.parametrize("how", ["confirmResize", "revertResize", "live", "evacuate"])
def test_volumes_come_along(cloud, how):
    root, data = made(cloud, bootable=True), made(cloud)
    cloud.services.json("POST", f"/volume/v3/volumes/{root}/action", {"os-set_bootable": {"bootable": True}}, token=cloud.admin)  # fmt: skip
    s = boot(cloud, of_volume(root))
    attach(cloud, s, data)
    before, first = s.row.host, at(cloud, data)
    moved_by(cloud, s, how)
    assert s.status == "ACTIVE"
    assert (s.row.host == before) == (how == "revertResize")
    for v in (root, data):
        host, attachment = at(cloud, v)
        assert (host, attachment != first[1], seen(cloud, v)["status"]) == (s.row.host, True, "in-use")
    assert [d.serial for d in s.state.machines[s.id].machine.disks] == [root, data]


def test_volumes_stay_when_nothing_comes_of_it(cloud):
    data = made(cloud)
    s = cloud.boot()
    attach(cloud, s, data)
    before = at(cloud, data)
    for name in cloud.states:
        whole = cloud.driver(name)._act
        cloud.driver(name)._act = lambda what, may_fail=True, whole=whole: refuse(what, "send" if may_fail else "", whole)  # fmt: skip
    live(cloud, s)
    assert at(cloud, data) == before
    for name in cloud.states:
        whole = cloud.driver(name)._act
        cloud.driver(name)._act = lambda what, may_fail=True, whole=whole: refuse(what, "arrive", whole)
    s.act("resize", {"flavorRef": "large"})
    assert (s.status, at(cloud, data)) == ("ACTIVE", before)


def test_a_volume_that_came_while_it_waited_for_a_word_comes_back_as_well(cloud):
    s = cloud.boot()
    source = s.row.host
    s.act("resize", {"flavorRef": "large"})
    data = made(cloud)
    attach(cloud, s, data)
    assert at(cloud, data)[0] == s.row.host
    s.act("revertResize")
    assert (s.status, at(cloud, data)[0]) == ("ACTIVE", source)


def test_a_host_of_an_older_release_is_not_asked_what_it_does_not_know(cloud):
    s = cloud.boot()
    before = s.row
    for ask in (lambda: s.act("resize", {"flavorRef": "large"}), lambda: live(cloud, s)):
        with cloud.db.tx() as tx:
            tx.execute(hosts.SERVICES.update().values(speaks='["Spawn","Destroy","Power","Look"]'))
        ask()
        row = s.row
        assert (s.status, row.host, row.epoch, last_move(cloud, s).status) == ("ACTIVE", before.host, before.epoch, "error")  # fmt: skip


class Poor(Edgy):
    """A hypervisor that cannot move anything."""

    def __getattr__(self, name):
        if name in ("prepare", "prepare_landing"):
            raise AttributeError(name)
        return super().__getattr__(name)


def test_a_hypervisor_that_can_move_nothing_says_so_before_the_guest_notices(cloud):
    s = cloud.boot()
    for h in cloud.hosts.hosts.values():
        h.driver = Poor(h.driver, cloud.edges)
    since = s.state.machines[s.id].since
    s.act("resize", {"flavorRef": "large"})
    assert last_move(cloud, s).status == "error"
    live(cloud, s)
    assert (s.status, last_move(cloud, s).status, s.state.machines[s.id].since) == ("ACTIVE", "error", since)
