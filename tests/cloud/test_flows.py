"""Build, act, delete: what users ask for, on simulated hosts; and what becomes of it when something goes wrong."""

import msgspec
import pytest
import sqlalchemy as sa

from kilonova.contracts.compute import ConsoleLog
from kilonova.kit.bus import letter, opened
from kilonova.kit.clock import iso
from kilonova.kit.errors import Unavailable
from kilonova.model import options
from kilonova.model.options import Config
from kilonova.store import servers
from tests.stories import telling

NO_HOST = "No valid host was found. There are not enough hosts available."
BUILD = "compute__do_build_and_run_instance"


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def disable(cloud, *names):
    for s in cloud.json("GET", "/os-services?binary=nova-compute", token=cloud.admin)["services"]:
        if s["host"] in names:
            cloud.json("PUT", f"/os-services/{s['id']}", {"status": "disabled"}, token=cloud.admin)


# ---- build


def test_a_server_is_built(cloud):
    s = cloud.boot("one")
    shown = s.show()
    assert (shown["status"], shown["OS-EXT-STS:task_state"], shown["OS-EXT-STS:power_state"]) == ("ACTIVE", None, 1)
    assert shown["OS-EXT-SRV-ATTR:host"] in cloud.states
    assert shown["OS-EXT-SRV-ATTR:instance_name"] == f"instance-{s.row.number:08x}"
    (address,) = shown["addresses"]["private"]
    machine = s.state.machines[s.id].machine
    assert address["addr"] == machine.nics[0].ips[0].address
    assert machine.identity.security_groups == ["default"]
    assert s.events() == [(BUILD, "Success")]
    assert cloud.ask(s.row.host, ConsoleLog(server=s.id, lines=1)).text == "one login: "


def test_what_is_on_the_way_is_seen(cloud):
    """scheduling; networking while ports are made, as long as that takes; spawning while the host is at it."""
    carrier = cloud.neighbours.network.session.carrier.thing
    app = carrier.app
    s = cloud.boot(settle=False)
    assert s.row.task_state == "scheduling"
    carrier.app = lambda environ, start: start("503 Not Now", []) and [b""]
    cloud.tick()
    assert s.row.task_state == "networking"
    carrier.app = app
    while not cloud.bus.letters:
        cloud.clock.sleep(1)
        cloud.conductor.engine.sweep()
    assert s.row.task_state == "spawning"
    cloud.settle()
    assert (s.status, s.row.task_state) == ("ACTIVE", None)


def test_without_a_port_nothing_lies_between_the_claim_and_the_spawn(cloud):
    s = cloud.boot(settle=False, networks="none")
    cloud.conductor.engine.sweep()
    assert s.row.task_state == "spawning" and s.row.host and not s.row.plugs
    cloud.settle()
    assert (s.status, s.row.task_state, s.show()["addresses"]) == ("ACTIVE", None, {})
    assert s.events() == [(BUILD, "Success")]


def test_a_burst_spreads_over_the_hosts(cloud):
    many = [cloud.boot(f"s{i}", settle=False) for i in range(9)]
    cloud.settle()
    assert sorted(len(state.machines) for state in cloud.states.values()) == [3, 3, 3]
    assert {s.status for s in many} == {"ACTIVE"}


def test_nowhere_is_an_error_with_novas_sentence(cloud):
    s = cloud.boot(flavor="huge")
    shown = s.show()
    assert (shown["status"], shown["fault"]["message"], shown["fault"]["code"]) == ("ERROR", NO_HOST, 500)
    assert shown["addresses"] == {}
    with cloud.db.read() as tx:
        from kilonova.kit.journal import RUNS, STEPS

        text = tx.execute(STEPS.select().join(RUNS, RUNS.c.id == STEPS.c.run).where(STEPS.c.step == "choose")).one()
    assert msgspec.json.decode(text.answer)["why"] == {"room": 3}


def test_no_more_than_there_is_room_for(cloud):
    """Three hosts of 8 CPUs, four times over: 24 servers of 4 CPUs; memory is what ends first: 3 a host."""
    config = cloud.json("GET", "/os-hypervisors/detail", token=cloud.admin, version="2.87")["hypervisors"][0]
    assert config["memory_mb"] == 16_384
    project = cloud.user.project_id
    quota = {"quota_set": {"instances": -1, "cores": -1, "ram": -1, "force": True}}
    cloud.json("PUT", f"/os-quota-sets/{project}", quota, token=cloud.admin)
    many = [cloud.boot(f"s{i}", flavor="large", settle=False) for i in range(12)]
    cloud.settle()
    assert sorted(s.status for s in many) == ["ACTIVE"] * 9 + ["ERROR"] * 3
    for s in [s for s in many if s.status == "ACTIVE"][:3]:
        s.delete()
    again = [cloud.boot(f"t{i}", flavor="large") for i in range(4)]
    assert sorted(s.status for s in again) == ["ACTIVE"] * 3 + ["ERROR"]


def test_a_host_that_refuses_is_followed_by_the_next(cloud):
    for name in ("h0", "h1"):
        cloud.driver(name).options = options.Sim(failure_rate=1.0)
    s = cloud.boot()
    assert (s.status, s.row.host) == ("ACTIVE", "h2")
    assert s.events()[-1] == (BUILD, "Success")


def test_hosts_that_all_refuse_say_why(cloud):
    for name in cloud.states:
        cloud.driver(name).options = options.Sim(failure_rate=1.0)
    s = cloud.boot()
    assert s.status == "ERROR"
    fault = s.show()["fault"]["message"]
    assert fault.startswith("Exceeded maximum number of retries.")
    assert "refused to spawn" in fault
    assert s.events() == [(BUILD, "Error")] * 3


def test_a_build_that_gets_no_answer_goes_to_another_host(cloud):
    """The host is silent, so it is gone after a minute; when it returns, what it made is swept."""
    s = cloud.boot(settle=False)
    cloud.bus.lose = lambda to, raw: to == "conductor" and opened(raw).name == "Answered"
    cloud.tick()
    first = s.row.host
    assert s.id in cloud.states[first].machines
    cloud.dead.add(first)
    cloud.bus.lose = lambda to, raw: False
    cloud.settle()
    assert (s.status, s.row.host != first) == ("ACTIVE", True)
    assert s.id in cloud.states[first].machines
    cloud.dead.clear()
    cloud.settle()
    assert s.id not in cloud.states[first].machines


def test_disabled_hosts_take_no_servers(cloud):
    disable(cloud, "h0", "h1")
    assert cloud.boot().row.host == "h2"
    disable(cloud, "h2")
    assert cloud.boot("two").show()["fault"]["message"] == NO_HOST


def test_an_administrator_says_where(cloud):
    s = cloud.boot(host="h1")
    assert s.row.host == "h1"


def test_two_ports_of_the_callers_and_one_of_ours(cloud):
    network = cloud.neighbours.network
    private = next(n for n in network.networks() if n.name == "private")
    mine = network.create_port(private.id, project_id=cloud.user.project_id)
    s = cloud.boot(networks=[{"port": mine.id}, {"uuid": private.id}])
    assert [p.ours for p in s.row.plugs] == [False, True]
    assert len(s.show()["addresses"]["private"]) == 2
    s.delete()
    left = network.port(mine.id)
    assert (left.device_id, left.host) == ("", "")
    network.delete_port(mine.id)


def test_an_address_that_is_taken_is_said_at_once(cloud):
    private = next(n for n in cloud.neighbours.network.networks() if n.name == "private")
    one = cloud.boot(networks=[{"uuid": private.id, "fixed_ip": "10.0.0.77"}])
    assert one.show()["addresses"]["private"][0]["addr"] == "10.0.0.77"
    two = cloud.boot("two", networks=[{"uuid": private.id, "fixed_ip": "10.0.0.77"}])
    assert two.status == "ERROR"
    assert "10.0.0.77" in two.show()["fault"]["message"]
    assert two.events() == []


def test_the_machine_is_what_flavor_and_image_say(cloud):
    body = {
        "flavor": {
            "name": "f",
            "id": "f",
            "vcpus": 4,
            "ram": 512,
            "disk": 2,
            "swap": 64,
            "OS-FLV-EXT-DATA:ephemeral": 1,
        }
    }
    cloud.json("POST", "/flavors", body, token=cloud.admin)
    specs = {"extra_specs": {"hw:cpu_sockets": "2"}}
    cloud.json("POST", "/flavors/f/os-extra_specs", specs, token=cloud.admin)
    s = cloud.boot(flavor="f", metadata={"a": "b"}, config_drive=True)
    m = s.state.machines[s.id].machine
    assert [(d.device, d.size_bytes, type(d.source).__name__) for d in m.disks] == [
        ("vda", 2 << 30, "ImageSource"),
        ("vdb", 1 << 30, "BlankSource"),
        ("vdc", 64 << 20, "BlankSource"),
    ]
    assert (m.vcpus, m.cpu_sockets, m.cpu_cores, m.cpu_threads) == (4, 2, 2, 1)
    assert (m.config_drive, m.identity.meta, m.identity.availability_zone) == (True, {"a": "b"}, "nova")


# ---- act


VERBS = [
    ("os-stop", None, "SHUTOFF", 4, "stop"),
    ("os-start", None, "ACTIVE", 1, "start"),
    ("pause", None, "PAUSED", 3, "pause"),
    ("unpause", None, "ACTIVE", 1, "unpause"),
    ("suspend", None, "SUSPENDED", 7, "suspend"),
    ("resume", None, "ACTIVE", 1, "resume"),
    ("reboot", {"type": "SOFT"}, "ACTIVE", 1, "reboot"),
    ("reboot", {"type": "HARD"}, "ACTIVE", 1, "reboot"),
]


def test_every_simple_verb(cloud):
    s = cloud.boot()
    for action, said, status, power, name in VERBS:
        s.act(action, said)
        shown = s.show()
        assert (shown["status"], shown["OS-EXT-STS:power_state"], shown["OS-EXT-STS:task_state"]) == (
            status,
            power,
            None,
        )
        assert s.events()[-1] == (f"compute_{name}_instance", "Success")
        assert cloud.check() == []


def test_a_deaf_guest_is_switched_off_in_the_end(cloud):
    s = cloud.boot()
    s.state.deaf.add(s.id)
    began = cloud.clock.now()
    s.act("os-stop")
    assert s.status == "SHUTOFF"
    assert 60 <= cloud.clock.now() - began < 100
    s.act("os-start")
    began = cloud.clock.now()
    s.act("os-stop", settle=False)
    s.delete()  # nobody waits for it any longer
    assert s.row.vm_state == "deleted"


def test_an_act_that_fails_changes_nothing(cloud):
    s = cloud.boot()
    driver = cloud.driver(s.row.host)
    driver.options = options.Sim(failure_rate=1.0)
    s.act("pause")
    assert (s.status, s.events()[-1]) == ("ACTIVE", ("compute_pause_instance", "Error"))
    s.act("reboot", {"type": "SOFT"})
    assert s.status == "ACTIVE"


def test_a_reboot_that_leaves_nothing_running_is_an_error(cloud):
    s = cloud.boot()
    driver = cloud.driver(s.row.host)

    def reboot(id, hard, timeout_s):
        driver.state.machines[id].power = "shutdown"
        raise RuntimeError("the disk is gone")

    driver.reboot = reboot
    s.act("reboot", {"type": "HARD"})
    assert s.status == "ERROR"
    assert s.show()["fault"]["message"] == "The host failed (RuntimeError)."
    del driver.reboot
    s.act("reboot", {"type": "HARD"})
    assert s.status == "ACTIVE"


def test_an_act_on_a_silent_host_ends(cloud):
    s = cloud.boot()
    cloud.dead.add(s.row.host)
    s.act("pause")
    assert (s.status, s.row.task_state) == ("ACTIVE", None)
    cloud.dead.clear()


def test_a_busy_server_refuses(cloud):
    s = cloud.boot()
    s.act("os-stop", settle=False)
    s.act("pause", ok=409, settle=False)
    cloud.settle()
    assert s.status == "SHUTOFF"


# ---- delete


def test_nothing_is_left_of_a_deleted_server(cloud):
    s = cloud.boot()
    s.delete()
    row = s.row
    assert (row.vm_state, row.host, row.deleted_at is not None) == ("deleted", None, True)
    assert [len(state.machines) for state in cloud.states.values()] == [0, 0, 0]
    assert s.events()[-1] == ("compute_terminate_instance", "Success")


@pytest.mark.parametrize("letters", range(8))
def test_delete_overtakes_a_build(cloud, letters):
    s = cloud.boot(settle=False)
    carried = 0
    while cloud.woken and carried < letters:
        cloud.conductor.engine.carry(cloud.woken.popleft())
        carried += 1
    for _ in range(letters):
        if cloud.bus.letters:
            to, raw = cloud.bus.letters.popleft()
            cloud.bus.doors[to](raw)
    s.delete()
    assert s.row.vm_state == "deleted"


def test_delete_overtakes_a_stop(cloud):
    s = cloud.boot()
    s.act("os-stop", settle=False)
    s.delete()
    assert s.row.vm_state == "deleted"


def test_delete_where_the_host_is_gone(cloud):
    s = cloud.boot()
    host = s.row.host
    cloud.dead.add(host)
    s.delete()
    assert s.row.vm_state == "deleted"
    assert s.id in cloud.states[host].machines
    cloud.dead.clear()
    cloud.settle()
    assert cloud.states[host].machines == {}


def test_a_server_in_error_can_be_deleted(cloud):
    s = cloud.boot(flavor="huge")
    s.delete()
    assert s.row.vm_state == "deleted"
    assert s.events() == []


# ---- what nobody asked for


def test_a_guest_that_ends_itself_is_shut_off(cloud):
    s = cloud.boot()
    driver = cloud.driver(s.row.host)
    driver.guest_shuts_down(s.id)
    cloud.settle()
    assert s.status == "SHUTOFF"
    assert s.events()[-1] == ("compute_stop_instance", "Success")
    s.act("os-start")
    assert s.status == "ACTIVE"


def test_a_lost_event_is_found_by_the_next_report(cloud):
    s = cloud.boot()
    cloud.bus.lose = lambda to, raw: opened(raw).name == "PowerChanged"
    cloud.driver(s.row.host).guest_crashes(s.id)
    cloud.pass_time(20)
    assert (s.status, s.row.power_state) == ("SHUTOFF", 4)


def test_a_stopped_server_that_runs_is_stopped_again(cloud):
    s = cloud.boot()
    s.act("os-stop")
    driver = cloud.driver(s.row.host)
    driver.start(s.id)  # behind our back
    cloud.settle()
    assert (s.status, s.state.machines[s.id].power) == ("SHUTOFF", "shutdown")


def test_an_orphan_is_swept(cloud):
    s = cloud.boot()
    driver = cloud.driver("h0")
    machine = msgspec.structs.replace(s.state.machines[s.id].machine, id="00000000-0000-4000-8000-000000000000")
    driver.spawn(machine, lambda stage: None)
    cloud.settle()
    assert machine.id not in cloud.states["h0"].machines
    assert s.status == "ACTIVE"


def test_what_a_host_says_again_in_the_same_words_is_compared_with_each_whole_report_only(cloud):
    s = cloud.boot()
    h = cloud.hosts.hosts[s.row.host]

    def says(*, whole: bool) -> int:
        """How many statements that was."""
        while ((told := h.report()).facts is not None) is not whole:
            pass
        before = cloud.db.statements
        cloud.bus.send("conductor", letter(told))
        cloud.tick()
        return cloud.db.statements - before

    says(whole=True)
    assert says(whole=False) > 0 and says(whole=False) == 0
    with cloud.db.tx() as tx:
        tx.execute(sa.update(servers.T).where(servers.T.c.id == s.id).values(power_state=4))
    assert says(whole=False) == 0
    says(whole=True)
    assert s.show()["OS-EXT-STS:power_state"] == 1
    s.state.machines.clear()
    assert says(whole=False) > 0
    assert s.status == "ERROR"


def test_a_machine_that_vanished_is_an_error(cloud):
    s = cloud.boot()
    s.state.machines.clear()
    cloud.settle()
    assert s.status == "ERROR"
    assert "no longer on its host" in s.show()["fault"]["message"]


def test_what_ran_runs_again_after_the_machine_was_restarted(cloud):
    one, two, three = (cloud.boot(n) for n in ("one", "two", "three"))
    two.act("os-stop")
    three.act("suspend")
    for state in cloud.states.values():
        state.power_cut()
    cloud.start_conductor()
    cloud.start_hosts()
    cloud.settle()
    assert [s.status for s in (one, two, three)] == ["ACTIVE", "SHUTOFF", "SUSPENDED"]
    assert one.state.machines[one.id].power == "running"
    assert one.events()[-1] == (BUILD, "Success")  # nobody asked for it


def test_or_not_if_the_operator_says_so(tmp_path):
    config = msgspec.structs.replace(Config(), compute=options.Compute(resume_servers_on_start=False))
    with telling(tmp_path, config=config) as cloud:
        s = cloud.boot()
        s.state.power_cut()
        cloud.start_hosts()
        cloud.settle()
        assert s.status == "SHUTOFF"


def test_ports_claims_and_servers_that_nobody_owns_are_mended(cloud):
    s = cloud.boot()
    network = cloud.neighbours.network
    private = next(n for n in network.networks() if n.name == "private")
    stray = network.create_port(
        private.id,
        project_id=cloud.user.project_id,
        device_id=s.id,
        device_owner="compute:nova",
        **{"binding:host_id": s.row.host, "binding:profile": {"kilonova": "x/1"}},
    )
    assert cloud.check()
    assert cloud.mend("strays") == [f"port {stray.id} was left of {s.id}"]
    from kilonova.store import placement, servers

    with cloud.db.tx() as tx:
        provider = next(iter(placement.allocations_of(tx, s.id)))
        placement.release(tx, s.id, now=1.0)
        placement.claim(tx, "gone", provider, {"VCPU": 1}, now=1.0, project_id="p", user_id="u")
        tx.execute(servers.T.update().values(task_state="pausing"))
    assert len(cloud.mend("claims")) == 2
    cloud.pass_time(200)
    assert s.status == "ERROR"
    assert s.row.task_state is None


class Late:
    """A way to a service on which one request takes longer than anybody waits for it."""

    def __init__(self, carrier):
        self.carrier, self.kept = carrier, []

    def send(self, method, path, headers, body):
        if method == "POST" and path.endswith("/ports") and not self.kept:
            self.kept.append((method, path, dict(headers), body))
            raise Unavailable("It did not answer in time.")
        return self.carrier.send(method, path, headers, body)


def test_a_port_that_was_made_after_nobody_waited_for_it_is_let_go_of_soon(cloud):
    """Once it was found by the great comparison only, which comes every five minutes."""
    session = cloud.neighbours.network.session
    late = session.carrier = Late(session.carrier)
    s = cloud.boot()
    assert s.status == "ACTIVE" and cloud.check() == []
    late.carrier.send(*late.kept[0])
    assert cloud.check()
    assert cloud.mend("doubtful") == [], "it may still come"
    cloud.clock.sleep(20)
    (said,) = cloud.mend("doubtful")
    assert s.id in said and cloud.check() == []
    late.carrier.send(*late.kept[0])  # later still
    cloud.clock.sleep(60)
    assert len(cloud.mend("doubtful")) == 1 and cloud.check() == []
    assert cloud.conductor.world.doubts == {}


def test_both_sides_may_die_at_any_time(cloud):
    """The whole cloud is restarted after each letter of a build and a delete."""
    for n in range(12):
        s = cloud.boot(f"s{n}", settle=False)
        for _ in range(n):
            if cloud.bus.letters:
                to, raw = cloud.bus.letters.popleft()
                cloud.bus.doors[to](raw)
            elif cloud.woken:
                cloud.conductor.engine.carry(cloud.woken.popleft())
        cloud.bus.letters.clear()
        cloud.woken.clear()
        cloud.start_conductor()
        cloud.start_hosts()
        cloud.settle()
        assert s.status == "ACTIVE"
        assert cloud.check() == []
        s.delete()


def test_what_changed_since_and_before(tmp_path):
    """Also of one that is still on its way, and of one that is gone."""
    with telling(tmp_path) as cloud:
        old = cloud.boot("old")
        cloud.clock.sleep(100)
        between = iso(cloud.clock.now())
        cloud.clock.sleep(100)
        gone, new = cloud.boot("gone"), cloud.boot("new", settle=False)
        gone.delete(settle=False)

        def names(query):
            return {s["name"] for s in cloud.json("GET", f"/servers/detail?{query}")["servers"]}

        assert names(f"changes-since={between}") == {"gone", "new"}
        assert names(f"changes-before={between}") == {"old"}
        old.act("lock")
        assert names(f"changes-since={between}") == {"old", "gone", "new"}
        cloud.settle()
        assert names(f"changes-since={between}") == {"old", "gone", "new"}
        assert new.status == "ACTIVE"
