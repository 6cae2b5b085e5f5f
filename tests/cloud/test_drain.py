"""`kilonova hosts drain` and `balance`, as an operator uses them: on simulated hosts, through the public APIs."""

import msgspec
import pytest

from kilonova import main as commands
from kilonova.cli import drain
from kilonova.cli import hosts as command
from kilonova.kit.errors import NotFound, Refused
from kilonova.kit.http import Server, listen
from tests.cloud.embedded import ADMIN
from tests.stories import telling


class Operator:
    """`cli.client.Client`, towards the cloud of a story."""

    def __init__(self, cloud):
        self.cloud, self.asked = cloud, []

    def _ask(self, method, path, body=None):
        self.asked.append((method, path))
        told = {"OpenStack-API-Version": "compute latest"}
        answer = self.cloud.services.ask(method, path, body, self.cloud.admin, **told)
        said = answer.read()
        if answer.status >= 400:
            raise {404: NotFound}.get(answer.status, Refused)(said.decode())
        return msgspec.json.decode(said) if said else None

    def get(self, path):
        return self._ask("GET", path)

    def post(self, path, body):
        return self._ask("POST", path, body)

    def put(self, path, body):
        return self._ask("PUT", path, body)


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as cloud:
        yield cloud


def all_on_one(cloud, n):
    """So many servers on one host."""
    first = cloud.boot("s0")
    host = first.row.host
    zone = {"availability_zone": f"nova:{host}"}
    others = []
    for i in range(1, n):
        wish = {"name": f"s{i}", "flavorRef": "small", "imageRef": cloud.image_id, "networks": "auto", **zone}
        made = cloud.json("POST", "/servers", {"server": wish}, ok=202, token=cloud.admin)["server"]["id"]
        others.append(cloud.handle(made))
    cloud.settle()
    return host, [first, *others]


def drained(cloud, host, **how):
    said = []

    def pause(seconds):
        cloud.settle()

    do = drain.Drain(Operator(cloud), host, say=said.append, pause=how.pop("pause", pause), **how)
    return drain.drained(do), said


def test_a_host_is_drained(cloud):
    host, (one, two, three, four) = all_on_one(cloud, 4)
    cloud.json("POST", f"/servers/{two.id}/action", {"os-stop": None}, ok=202, token=cloud.admin)
    cloud.settle()
    ways = {m.name: m.way for m in drain.planned(drain.servers_on(Operator(cloud), host))}
    assert ways == {"s0": "live", "s1": "cold", "s2": "live", "s3": "live"}
    code, said = drained(cloud, host)
    assert (code, said[0], said[-1]) == (0, f"{host} is disabled: no new server comes.", f"{host} is empty.")
    assert {s.status for s in (one, three, four)} == {"ACTIVE"} and two.status == "SHUTOFF"
    assert all(s.row.host != host for s in (one, two, three, four))
    service = drain.service_of(Operator(cloud), host)
    assert (service["status"], service["disabled_reason"]) == ("disabled", drain.REASON)
    assert cloud.boot("late").row.host != host


def test_who_cannot_move_stays_with_a_reason(cloud):
    host, (one, two) = all_on_one(cloud, 2)
    for other in cloud.states.keys() - {host}:
        service = drain.service_of(Operator(cloud), other)
        cloud.json("PUT", f"/os-services/{service['id']}", {"status": "disabled"}, token=cloud.admin)
    code, said = drained(cloud, host, at_once=1)
    assert code == 1 and f"2 stay on {host}:" in said
    assert all("enabled turned away" in line for line in said[-2:])
    assert (one.status, two.status, one.row.host, two.row.host) == ("ACTIVE", "ACTIVE", host, host)


def test_a_drain_that_was_stopped_goes_on(cloud):
    """Ctrl-C while one moves: what is under way ends by itself, and the next drain does the rest and no more."""
    host, servers = all_on_one(cloud, 3)

    def stop(seconds):
        raise KeyboardInterrupt

    code, said = drained(cloud, host, at_once=1, pause=stop)
    assert code == 130 and said[-1].startswith("Stopped; under way are s0.")
    cloud.settle()
    assert [s.row.host != host for s in servers] == [True, False, False]
    code, said = drained(cloud, host)
    assert code == 0 and not any("s0" in line for line in said)
    assert all(s.status == "ACTIVE" and s.row.host != host for s in servers)


def test_a_cold_move_is_confirmed_also_by_the_next_drain(cloud):
    host, (one,) = all_on_one(cloud, 1)
    one.act("os-stop")
    turns = []

    def once(seconds):
        if turns:
            raise KeyboardInterrupt
        turns.append(1)

    assert drained(cloud, host, pause=once)[0] == 130
    cloud.settle()
    assert one.status == "VERIFY_RESIZE"
    assert drained(cloud, host)[0] == 0
    cloud.settle()
    assert one.status == "SHUTOFF" and one.row.host != host


def test_a_plan_says_whether_there_is_room(cloud):
    """As far as it goes: those before it have taken theirs, and the host that is drained does not count."""
    host, _ = all_on_one(cloud, 3)
    client = Operator(cloud)
    servers = drain.servers_on(client, host)
    moves, loads = drain.planned(servers), drain.loads(client)
    assert list(drain.foreseen(moves, servers, loads, host).values()) == [2, 2, 2]
    here = [drain.Load(h, {"VCPU": 2.0}, {"VCPU": used}) for h, used in ((host, 2.0), ("x", 1.0), ("y", 1.0))]
    assert list(drain.foreseen(moves, servers, here, host).values()) == [2, 1, 0]
    assert drain.foreseen([drain.Move("z", "z", "stay", "it is ERROR")], [], here, host) == {}


def test_what_is_the_user_s_to_decide_is_left(cloud):
    host, (one,) = all_on_one(cloud, 1)
    for other in cloud.states.keys() - {host}:
        service = drain.service_of(Operator(cloud), other)
        cloud.json("PUT", f"/os-services/{service['id']}", {"status": "disabled"}, token=cloud.admin)
    move = drain.way({"id": one.id, "name": "s0", "status": "VERIFY_RESIZE", "OS-EXT-STS:task_state": None})
    assert (move.way, move.why) == ("stay", "its user has a resize to confirm or revert")
    assert drain.way({"id": "x", "name": "x", "status": "ERROR"}).why == "it is ERROR"
    with pytest.raises(NotFound):
        drain.service_of(Operator(cloud), "nowhere")


def test_balance_names_moves_that_help(cloud):
    host, _ = all_on_one(cloud, 6)
    client = Operator(cloud)
    before = drain.loads(client)
    there = {load.host: drain.servers_on(client, load.host) for load in before}
    shifts = drain.evened(before, there)
    assert shifts and {s.of for s in shifts} == {host} and len({s.to for s in shifts}) == 2
    for s in shifts:
        wish = {"os-migrateLive": {"host": s.to, "block_migration": "auto"}}
        cloud.json("POST", f"/servers/{s.server.id}/action", wish, ok=202, token=cloud.admin)
        cloud.settle()
    after = drain.loads(client)
    assert drain.spread(after) < drain.spread(before) / 2
    assert drain.evened(after, {load.host: drain.servers_on(client, load.host) for load in after}) == []


def test_the_command_says_what_it_would_do(cloud, capsys, monkeypatch):
    """Over HTTP, as an operator types it; nothing happens before a yes, and with --plan nobody is asked."""
    host, servers = all_on_one(cloud, 2)
    listener = listen("127.0.0.1", 0)
    server = Server(cloud.services.carrier.app, listener, threads=1)
    server.start()
    monkeypatch.setenv("OS_PASSWORD", ADMIN)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def hosts(*words):
        return command.main(commands._parser("hosts"), [*words, "--url", url])

    try:
        assert hosts("drain", host, "--plan") == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{host} has 2 servers. It is disabled first, so that no other comes."
        assert [line.partition(") ")[2] for line in lines[1:]] == ["moves while it runs; 2 hosts have room for it"] * 2
        assert hosts("drain", host, "--plan", "--json") == 0
        assert [m["hosts_with_room"] for m in msgspec.json.decode(capsys.readouterr().out)] == [2, 2]
        monkeypatch.setattr("builtins.input", lambda text: "n")
        assert hosts("drain", host) == 1
        assert hosts("balance") == 0 and "full" in capsys.readouterr().out
        with pytest.raises(NotFound):
            hosts("drain", "nowhere", "--plan")
    finally:
        server.stop()
    assert all(s.row.host == host for s in servers)
    assert drain.service_of(Operator(cloud), host)["status"] == "enabled"
