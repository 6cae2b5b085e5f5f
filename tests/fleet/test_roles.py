"""Roles as processes, on both databases: stories of the public API over a real broker, and hosts that come, go and come back."""

import http.client
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

import kilonova
from kilonova.cli.database import at_work
from kilonova.cli.status import asked
from kilonova.kit.db import Db
from kilonova.kit.errors import Forbidden, Trouble
from kilonova.model.options import Config
from tests.engines import MariaDb, Postgres, free_port
from tests.fleet.faults import Cloud, Storm, cloud_of, table, told
from tests.fleet.fleet import ROOT, Fleet, FleetClient

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[Postgres, MariaDb], ids=["postgres", "mariadb"])
def whole(request, tmp_path_factory):
    """Two APIs, two conductors, three hosts, and what they stand on; on PostgreSQL also two schedulers of their own."""
    with cloud_of(
        tmp_path_factory.mktemp("fleet"), request.param, schedulers=2 if request.param is Postgres else 0, access=True
    ) as one:
        yield one


@pytest.fixture
def cloud(whole: Cloud) -> Fleet:
    return whole.fleet


@pytest.fixture
def client(cloud: Fleet):
    return cloud.client()


@pytest.fixture(autouse=True)
def at_rest(cloud: Fleet):
    """After every story: nobody is at work, and nothing is left over."""
    yield
    db = Db(cloud.database, threads=2)
    try:
        _, said = cloud.settled(db, 30)
        assert said == []
    finally:
        db.close()


def test_a_server_s_life(client: FleetClient) -> None:
    image, network = client.furnish()
    port = client.post("/network/v2.0/ports", {"port": {"network_id": network}})["port"]["id"]
    wish = {"name": "one", "imageRef": image, "flavorRef": "42", "networks": [{"port": port}]}
    id = client.post("/compute/v2.1/servers", {"server": wish})["server"]["id"]
    first = client.until(id, "ACTIVE")
    host = first["OS-EXT-SRV-ATTR:host"]
    assert client.get(f"/network/v2.0/ports/{port}")["port"]["binding:host_id"] == host

    client.act(id, **{"os-stop": None})
    client.until(id, "SHUTOFF")
    client.act(id, **{"os-start": None})
    client.until(id, "ACTIVE")

    volume = client.post("/volume/v3/volumes", {"volume": {"size": 1, "name": "data"}})["volume"]["id"]
    _until_volume(client, volume, "available")
    client.post(f"/compute/v2.1/servers/{id}/os-volume_attachments", {"volumeAttachment": {"volumeId": volume}})
    _until_volume(client, volume, "in-use")
    client.until(id, "ACTIVE")

    client.act(id, **{"os-migrateLive": {"host": None, "block_migration": "auto"}})
    moved = _moved(client, id, host)
    assert client.get(f"/network/v2.0/ports/{port}")["port"]["binding:host_id"] == moved

    client.act(id, resize={"flavorRef": "84"})
    client.until(id, "VERIFY_RESIZE")
    client.act(id, confirmResize=None)
    client.until(id, "ACTIVE")

    assert "instance-id" in client.post(f"/compute/v2.1/servers/{id}/action", {"os-getConsoleOutput": {}})["output"]
    client.delete(f"/compute/v2.1/servers/{id}/os-volume_attachments/{volume}")
    _until_volume(client, volume, "available")
    client.delete(f"/volume/v3/volumes/{volume}")
    client.delete(f"/compute/v2.1/servers/{id}")
    client.until(id, "")
    client.delete(f"/network/v2.0/ports/{port}")


def _until_volume(client: FleetClient, id: str, status: str) -> None:
    until = time.monotonic() + 30
    while (seen := client.get(f"/volume/v3/volumes/{id}")["volume"]["status"]) != status:
        assert time.monotonic() < until, f"the volume is {seen}, and not {status}"
        time.sleep(0.05)


def _moved(client: FleetClient, id: str, old: str, status: str = "ACTIVE") -> str:
    until = time.monotonic() + 30
    while (seen := client.until(id, status))["OS-EXT-SRV-ATTR:host"] == old:
        assert time.monotonic() < until, f"it is still on {old}"
        time.sleep(0.05)
    return str(seen["OS-EXT-SRV-ATTR:host"])


def test_many_at_once_share_the_hosts(cloud: Fleet, client: FleetClient) -> None:
    image, network = client.furnish()
    ids = [client.boot(f"many-{i}", image, network) for i in range(24)]
    at = {client.until(id, "ACTIVE", 60)["OS-EXT-SRV-ATTR:host"] for id in ids}
    assert len(at) == 3
    for id in ids:
        client.delete(f"/compute/v2.1/servers/{id}")
    for id in ids:
        client.until(id, "", 60)


def test_who_is_told_to_end_ends_well_and_loses_nothing(cloud: Fleet, client: FleetClient) -> None:
    """SIGTERM of each role in turn, with builds under way."""
    image, network = client.furnish()
    for name in ("conductor-0", "host-0", *(n for n in cloud.roles if n == "scheduler-0"), "api-0", "companions-0"):
        ids = [client.boot(f"{name}-{i}", image, network) for i in range(4)]
        assert cloud.stop(name) == 0, cloud.tail(name)
        cloud.start(name)
        cloud.wait(lambda: cloud.answers("companions"), 30, "they answer again")
        for id in ids:
            client.until(id, "ACTIVE", 60)
            client.delete(f"/compute/v2.1/servers/{id}")
        for id in ids:
            client.until(id, "", 60)
    cloud.wait(lambda: len(cloud.hosts_up()) == 3, 30, "all hosts are back")


def test_roles_that_only_answer_end_well_too(cloud: Fleet) -> None:
    """Metadata, Placement, consoles: whoever is connected is no reason to stay."""
    ports = {"metadata-0": cloud.ports["metadata"], "placement-0": free_port(), "console-0": cloud.ports["console"]}
    open = []
    for name, port in ports.items():
        cloud.roles[name] = name.partition("-")[0]
        cloud.start(name, *(["--port", str(port)] if name != "console-0" else []))
    try:
        for name, port in ports.items():
            cloud.wait(lambda port=port: _listens(port), 30, f"{name} listens")
            open.append(http.client.HTTPConnection("127.0.0.1", port, timeout=20))
            open[-1].request("GET", "/")
            open[-1].getresponse().read()
    finally:
        ends = {name: cloud.stop(name) for name in ports}
        for name in ports:
            del cloud.processes[name], cloud.roles[name]
    assert ends == dict.fromkeys(ports, 0)
    for line in open:
        line.close()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except OSError:
        return False
    return True


def test_one_request_is_found_in_every_process(cloud: Fleet, client: FleetClient) -> None:
    """By the id that its client gave it: in the API, a conductor, the host, the network service."""
    image, network = client.furnish()
    mine = "req-12345678-1234-4321-8765-1234567890ab"
    client.more["X-OpenStack-Request-ID"] = mine
    id = client.boot("followed", image, network)
    del client.more["X-OpenStack-Request-ID"]
    host = client.until(id, "ACTIVE")["OS-EXT-SRV-ATTR:host"]

    def told() -> set[str]:
        said = {n: (cloud.directory / f"{n}.out").read_text(errors="replace") for n in cloud.processes}
        lines = {n: [msgspec.json.decode(x) for x in t.splitlines() if mine in x] for n, t in said.items()}
        return {n for n, all in lines.items() if any(x.get("global_request_id") == mine for x in all)}

    cloud.wait(
        lambda: {n.partition("-")[0] for n in told()} >= {"api", "conductor", "host", "companions"}, 10, "all say so"
    )
    assert host in told() and not {n for n in told() if n.startswith("host")} - {host}
    _gone(client, [id])


def test_every_role_says_that_it_lives_and_who_is_of_another_release_is_named(cloud: Fleet, whole: Cloud) -> None:
    """So `kilonova db upgrade --finish` waits for it."""
    cloud.roles["metadata-0"] = "metadata"
    cloud.start("metadata-0", strange="import kilonova; kilonova.__version__ = '0.0.1'")
    db = Db(whole.database.url, threads=2)
    ours = {"api", "placement", "companions", "metadata"}
    expected = {f"kilonova-{role}" for role in ours} | {"nova-compute", "nova-conductor", "nova-scheduler"}
    try:
        cloud.wait(lambda: {who.partition(" ")[0] for who in at_work(db, Config())} >= expected, 30, "all say so")
        new = f"({kilonova.__version__})"
        old = cloud.wait(lambda: [who for who in at_work(db, Config()) if not who.endswith(new)], 30, "and the old one")
        assert [who.partition(" ")[0] for who in old] == ["kilonova-metadata"] and old[0].endswith("(0.0.1)")
    finally:
        db.close()
        assert cloud.stop("metadata-0") == 0
        del cloud.processes["metadata-0"], cloud.roles["metadata-0"]


def test_a_host_joins_with_one_file_and_keeps_its_name(cloud: Fleet, client: FleetClient) -> None:
    image, network = client.furnish()
    cloud.roles["host-new"] = "compute"
    cloud.start("host-new")
    cloud.wait(lambda: "host-new" in cloud.hosts_up(), 30, "it came up")
    assert "database" not in cloud.host.read_text()
    services = {s["host"]: s for s in client.get("/compute/v2.1/os-services")["services"]}
    assert services["host-new"]["status"] == "enabled"
    id = client.boot("there", image, network, availability_zone="nova:host-new")
    assert client.until(id, "ACTIVE")["OS-EXT-SRV-ATTR:host"] == "host-new"
    client.delete(f"/compute/v2.1/servers/{id}")
    client.until(id, "")

    assert cloud.stop("host-new") == 0
    words = ["serve", "compute", "--config", str(cloud.host), "--state-dir", str(cloud.directory / "host-new")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "kilonova.main", *words, "--name", "another"],
        capture_output=True, text=True, timeout=60, env=cloud.env, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1 and "This host is host-new" in done.stderr
    del cloud.processes["host-new"], cloud.roles["host-new"]
    client.delete(f"/compute/v2.1/os-services/{services['host-new']['id']}")
    assert "host-new" not in {s["host"] for s in client.get("/compute/v2.1/os-services")["services"]}


@pytest.mark.parametrize("how", ["another machine", "a copy of it"])
def test_two_machines_are_not_one_host(cloud: Fleet, client: FleetClient, how: str) -> None:
    """The second of a name gets no letters, says why, and the first notices nothing."""
    image, network = client.furnish()
    cloud.roles["twin"], port = "compute", free_port()
    if how == "a copy of it":
        (cloud.directory / "twin").mkdir(mode=0o700, exist_ok=True)
        for name in ("kilonova.lock", "host.json"):
            shutil.copy(cloud.directory / "host-0" / name, cloud.directory / "twin" / name)
    cloud.start("twin", "--name", "host-0", "--port", str(port))
    why = "another process has this address" if how == "a copy of it" else "Another machine is known as host-0"
    try:
        cloud.wait(lambda: why in cloud.tail("twin"), 30, "it says why")
        ids = [client.boot(f"twin-{i}", image, network, availability_zone="nova:host-0") for i in range(4)]
        for id in ids:
            client.until(id, "ACTIVE")
        assert asked(f"http://127.0.0.1:{port}")["hosts"] not in ("", "ok")
    finally:
        assert cloud.stop("twin") == 0
        del cloud.processes["twin"], cloud.roles["twin"]
        shutil.rmtree(cloud.directory / "twin")
    _gone(client, ids)


def test_disabled_and_forced_down_hold_in_every_process(cloud: Fleet, client: FleetClient) -> None:
    image, network = client.furnish()
    of = {s["host"]: s["id"] for s in client.get("/compute/v2.1/os-services?binary=nova-compute")["services"]}
    for host in ("host-0", "host-1"):
        client.put(f"/compute/v2.1/os-services/{of[host]}", {"status": "disabled"})
    ids = [client.boot(f"third-{i}", image, network) for i in range(4)]
    assert {client.until(id, "ACTIVE")["OS-EXT-SRV-ATTR:host"] for id in ids} == {"host-2"}
    client.put(f"/compute/v2.1/os-services/{of['host-0']}", {"status": "enabled"})
    client.put(f"/compute/v2.1/os-services/{of['host-2']}", {"forced_down": True})
    try:
        cloud.wait(lambda: cloud.hosts_up() == {"host-0", "host-1"}, 15, "it counts as down")
        id = client.boot("first", image, network)
        assert client.until(id, "ACTIVE")["OS-EXT-SRV-ATTR:host"] == "host-0"
    finally:
        client.put(f"/compute/v2.1/os-services/{of['host-2']}", {"forced_down": False})
        client.put(f"/compute/v2.1/os-services/{of['host-1']}", {"status": "enabled"})
    cloud.wait(lambda: len(cloud.hosts_up()) == 3, 30, "all hosts count again")
    for one in [*ids, id]:
        client.delete(f"/compute/v2.1/servers/{one}")
        client.until(one, "")


@pytest.mark.parametrize("how", ["killed", "stopped in its tracks"])
def test_a_host_that_comes_back_finds_that_its_servers_live_elsewhere(
    cloud: Fleet, client: FleetClient, how: str
) -> None:
    """Evacuated while it was away; with what it has of them it does nothing but remove it."""
    image, network = client.furnish()
    id = client.boot("evacuated", image, network)
    old = client.until(id, "ACTIVE")["OS-EXT-SRV-ATTR:host"]
    if how == "killed":
        cloud.kill(old)
        del cloud.processes[old]
    else:
        cloud.signal(old, signal.SIGSTOP)
    cloud.wait(lambda: old not in cloud.hosts_up(), 40, "it counts as down")
    client.act(id, evacuate={})
    new = _moved(client, id, old, "SHUTOFF")
    client.act(id, **{"os-start": None})
    client.until(id, "ACTIVE")
    assert id in cloud.holds()[old].machines and id in cloud.holds()[new].machines
    if how == "killed":
        cloud.start(old)
    else:
        cloud.signal(old, signal.SIGCONT)
    cloud.wait(lambda: id not in cloud.holds()[old].machines, 40, "what it had of it is gone")
    assert cloud.holds()[new].machines[id].power == "running"
    seen = client.server(id)
    assert (seen["status"], seen["OS-EXT-SRV-ATTR:host"]) == ("ACTIVE", new)
    client.delete(f"/compute/v2.1/servers/{id}")
    client.until(id, "")
    cloud.wait(lambda: len(cloud.hosts_up()) == 3, 30, "all hosts are back")


# ---- at the same time, through two APIs


def _at_once(cloud: Fleet, what: list[Callable[[FleetClient], Any]]) -> list[Any]:
    """All of it at the same moment, each by a client of its own: what they were answered, or the trouble."""
    clients = [cloud.client() for _ in what]
    ready, said = threading.Barrier(len(what)), [None] * len(what)

    def one(i: int) -> None:
        ready.wait(30)
        try:
            said[i] = what[i](clients[i])
        except Trouble as e:
            said[i] = e

    crew = [threading.Thread(target=one, args=(i,)) for i in range(len(what))]
    for t in crew:
        t.start()
    for t in crew:
        t.join(60)
    return said


def _gone(client: FleetClient, ids: list[str]) -> None:
    for id in ids:
        client.delete(f"/compute/v2.1/servers/{id}")
    for id in ids:
        client.until(id, "", 60)


def test_a_quota_is_kept_by_all_apis_together(cloud: Fleet, client: FleetClient) -> None:
    image, network = client.furnish()
    quota = f"/compute/v2.1/os-quota-sets/{client.project_id}"
    client.put(quota, {"quota_set": {"instances": 5}})
    try:
        said = _at_once(cloud, [lambda c, i=i: c.boot(f"quota-{i}", image, network) for i in range(12)])
    finally:
        client.put(quota, {"quota_set": {"instances": -1}})
    built = [id for id in said if isinstance(id, str)]
    assert len(built) == 5 and all(isinstance(e, Forbidden) for e in said if not isinstance(e, str)), said
    for id in built:
        client.until(id, "ACTIVE", 60)
    _gone(client, built)


def test_a_host_is_not_given_twice(cloud: Fleet, client: FleetClient) -> None:
    """Two such servers fit on a host; twelve are asked for at once, of two conductors and their schedulers."""
    image, network = client.furnish()
    wish = {"name": "half", "ram": 120_000, "vcpus": 1, "disk": 1, "id": "half"}
    client.post("/compute/v2.1/flavors", {"flavor": wish})
    said = _at_once(cloud, [lambda c, i=i: c.boot(f"half-{i}", image, network, flavorRef="half") for i in range(12)])
    ends = {id: _end(client, id) for id in said}
    at = Counter(s["OS-EXT-SRV-ATTR:host"] for s in ends.values() if s["status"] == "ACTIVE")
    assert sorted(at.values()) == [2, 2, 2], {id: s.get("fault") for id, s in ends.items()}
    assert all("No valid host" in s["fault"]["message"] for s in ends.values() if s["status"] == "ERROR")
    _gone(client, said)
    client.delete("/compute/v2.1/flavors/half")


def _end(client: FleetClient, id: str) -> dict[str, Any]:
    until = time.monotonic() + 60
    while (seen := client.server(id))["status"] == "BUILD":
        assert time.monotonic() < until, f"{id} is still being built"
        time.sleep(0.1)
    return seen


def test_members_of_a_group_keep_apart_though_they_come_at_once(cloud: Fleet, client: FleetClient) -> None:
    image, network = client.furnish()
    group = client.post(
        "/compute/v2.1/os-server-groups", {"server_group": {"name": "apart", "policy": "anti-affinity"}}
    )
    hint = {"group": group["server_group"]["id"]}

    def boot(c: FleetClient) -> str:
        wish = {"name": "apart", "imageRef": image, "flavorRef": "42", "networks": [{"uuid": network}]}
        body = {"server": wish, "os:scheduler_hints": hint}
        return str(c.post("/compute/v2.1/servers", body)["server"]["id"])

    said = _at_once(cloud, [boot] * 6)
    ends = [_end(client, id) for id in said]
    at = [s["OS-EXT-SRV-ATTR:host"] for s in ends if s["status"] == "ACTIVE"]
    assert sorted(at) == ["host-0", "host-1", "host-2"], [s.get("fault") for s in ends]
    _gone(client, said)
    client.delete(f"/compute/v2.1/os-server-groups/{hint['group']}")


def test_one_port_and_one_volume_are_one_server_s(cloud: Fleet, client: FleetClient) -> None:
    image, network = client.furnish()
    port = client.post("/network/v2.0/ports", {"port": {"network_id": network}})["port"]["id"]
    said = _at_once(
        cloud, [lambda c, i=i: c.boot(f"port-{i}", image, network, networks=[{"port": port}]) for i in range(4)]
    )
    ends = {id: _end(client, id) for id in said if isinstance(id, str)}
    mine = [id for id, s in ends.items() if s["status"] == "ACTIVE"]
    assert len(mine) == 1, [s.get("fault") for s in ends.values()]
    assert client.get(f"/network/v2.0/ports/{port}")["port"]["device_id"] == mine[0]
    _gone(client, [id for id in ends if id != mine[0]])
    assert client.get(f"/network/v2.0/ports/{port}")["port"]["device_id"] == mine[0]

    two = [*mine, *(client.boot(f"volume-{i}", image, network) for i in range(3))]
    for id in two:
        client.until(id, "ACTIVE", 60)
    volume = client.post("/volume/v3/volumes", {"volume": {"size": 1}})["volume"]["id"]
    _until_volume(client, volume, "available")
    wish = {"volumeAttachment": {"volumeId": volume}}
    said = _at_once(
        cloud, [lambda c, id=id: c.post(f"/compute/v2.1/servers/{id}/os-volume_attachments", wish) for id in two]
    )
    _until_volume(client, volume, "in-use")
    for id in two:
        client.until(id, "ACTIVE")
    has = [id for id in two if client.get(f"/compute/v2.1/servers/{id}/os-volume_attachments")["volumeAttachments"]]
    assert len(has) == 1 and sum(not isinstance(s, Trouble) for s in said) >= 1, said
    _gone(client, two)
    _until_volume(client, volume, "available")
    client.delete(f"/volume/v3/volumes/{volume}")
    client.delete(f"/network/v2.0/ports/{port}")


def test_of_two_wishes_for_one_server_one_comes_first(cloud: Fleet, client: FleetClient) -> None:
    image, network = client.furnish()
    id = client.boot("torn", image, network)
    client.until(id, "ACTIVE")
    for _ in range(3):
        said = _at_once(cloud, [lambda c: c.act(id, **{"os-stop": None})] * 4)
        assert sum(e is None for e in said) == 1, said
        client.until(id, "SHUTOFF")
        said = _at_once(cloud, [lambda c: c.act(id, **{"os-start": None})] * 4)
        assert sum(e is None for e in said) == 1, said
        client.until(id, "ACTIVE")
    _gone(client, [id])


# ---- what breaks

# Each costs some ten seconds; all of them, for as long as you like, are `python tests/fleet/faults.py`.
FEW = {
    Postgres: ["kill -9 of a conductor", "no broker for 5 s"],
    MariaDb: ["kill -9 of a host", "the database starts anew after 3 s"],
}


def test_what_breaks_under_load_leaves_nothing_stuck_and_nothing_behind(
    whole: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    db, storm = Db(whole.database.url, threads=2), Storm(whole, seed=1)
    try:
        tallies = told(storm, db, FEW[type(whole.database)])
        with capsys.disabled():
            print(f"\n{table(tallies)}")
        assert [line for t in tallies for line in t.stuck + t.leaked + t.answers] == []
        assert storm.cleared(db) == []
    finally:
        db.close()
