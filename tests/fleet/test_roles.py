"""Roles as processes, on both databases: stories of the public API over a real broker, and hosts that come, go and come back."""

import signal
import subprocess
import sys
import time

import pytest

from kilonova.kit.db import Db
from tests.engines import MariaDb, Postgres
from tests.fleet.faults import Cloud, Storm, cloud_of, table, told
from tests.fleet.fleet import ROOT, Fleet, FleetClient

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[Postgres, MariaDb], ids=["postgres", "mariadb"])
def whole(request, tmp_path_factory):
    """Two APIs, two conductors, three hosts, and what they stand on; on PostgreSQL also two schedulers of their own."""
    with cloud_of(
        tmp_path_factory.mktemp("fleet"), request.param, schedulers=2 if request.param is Postgres else 0
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
    for name in ("conductor-0", "host-0", *(n for n in cloud.roles if n == "scheduler-0"), "api-0"):
        ids = [client.boot(f"{name}-{i}", image, network) for i in range(4)]
        assert cloud.stop(name) == 0, cloud.tail(name)
        cloud.start(name)
        for id in ids:
            client.until(id, "ACTIVE", 60)
            client.delete(f"/compute/v2.1/servers/{id}")
        for id in ids:
            client.until(id, "", 60)
    cloud.wait(lambda: len(cloud.hosts_up()) == 3, 30, "all hosts are back")


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
