"""A Placement service that is another's: a process with a database of its own, at `[placement] service_url`.

It is asked and told over HTTP by a whole fleet; hosts, the service itself and a conductor go away and come back. In the
end both say the same: who holds what is who lives where.
"""

import json
import shutil
import urllib.request
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from kilonova.kit.db import Db
from kilonova.model.ask import amounts_of
from kilonova.store import dues, hosts, placement, servers
from tests.engines import Postgres, free_port, served
from tests.engines import rabbit as broker_of
from tests.fleet.fleet import COMMON, Fleet, FleetClient

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("epmd") is None, reason="there is no RabbitMQ")]

THEIRS = "elsewhere-0"


class Beside(Fleet):
    """A fleet, and the other service."""

    def __init__(self, directory, database, broker, **more):
        self.port = free_port()
        said = f'\n[placement]\nservice_url = "http://127.0.0.1:{self.port}/placement"\n'
        super().__init__(directory, database, broker, common=COMMON + said, **more)
        self.theirs = database.replace("/postgres", "/elsewhere")
        engine = sa.create_engine(database, isolation_level="AUTOCOMMIT")
        with engine.connect() as c:
            c.execute(sa.text("CREATE DATABASE elsewhere"))
        engine.dispose()
        ours, theirs = self.controller.read_text(), directory / "elsewhere.toml"
        theirs.write_text(ours.replace(said, "").replace(database, self.theirs))
        self.roles[THEIRS] = "placement"
        self.configs = {THEIRS: theirs}

    def start(self, name, *more, strange=""):
        mine, self.controller = self.controller, self.configs.get(name, self.controller)
        try:
            super().start(name, *more, *(("--port", str(self.port)) if name == THEIRS else ()), strange=strange)
        finally:
            self.controller = mine


@contextmanager
def beside(directory):
    with served(Postgres, directory / "db") as database, broker_of(directory / "mq") as broker:
        one = Beside(directory / "fleet", database.url, broker.url)
        try:
            one.up()
            yield one
        finally:
            one.close()


def held(db):
    """(consumer, provider, class, amount)."""
    with db.read() as tx:
        return {tuple(r) for r in tx.execute(sa.select(placement.ALLOCATIONS))}


def wanted(db):
    """What the servers that there are must hold, each of its host."""
    with db.read() as tx:
        of = {n.host: n.uuid for n in tx.execute(sa.select(hosts.NODES))}
        all = [servers.of(r) for r in tx.execute(servers.SELECT.where(servers.T.c.deleted_at.is_(None)))]
    return {(s.id, of[s.host], c, n) for s in all if s.host for c, n in amounts_of(s).items()}


def agree(fleet, ours, theirs):
    """Nothing is owed, and servers, our claims and theirs are the same."""
    same = lambda: ours.look(dues.first, 1) == [] and held(theirs) == held(ours) == wanted(ours)
    fleet.wait(same, 60, "both say the same")


def test_a_fleet_beside_another_s_placement(tmp_path):
    with beside(tmp_path) as fleet:
        ours, theirs = Db(fleet.database, threads=2), Db(fleet.theirs, threads=2)
        client = fleet.client()
        image, network = client.furnish()
        ids = [client.boot(f"s{i}", image, network) for i in range(4)]
        for id in ids:
            client.until(id, "ACTIVE")
        assert held(theirs) == wanted(ours)  # told within the build, not afterwards

        a_resize(client, ids[0], ours, theirs, "confirmResize")
        a_resize(client, ids[1], ours, theirs, "revertResize")
        an_evacuation(fleet, client, ids[2])
        agree(fleet, ours, theirs)
        what_others_hold_counts(fleet, client, image, network, ours, theirs)

        fleet.kill(THEIRS)  # what is given back meanwhile, and who wants something
        del fleet.processes[THEIRS]
        client.delete(f"/compute/v2.1/servers/{ids[3]}")
        client.until(ids[3], "")
        late = client.boot("late", image, network)
        fleet.kill("conductor-0")
        fleet.start("conductor-0")
        fleet.start(THEIRS)
        client.until(late, "ACTIVE", 90)
        agree(fleet, ours, theirs)
        for id in [*ids[:3], late]:
            client.delete(f"/compute/v2.1/servers/{id}")
        for id in [*ids[:3], late]:
            client.until(id, "")
        assert fleet.settled(ours, 60)[1] == []
        agree(fleet, ours, theirs)
        assert held(theirs) == set()
        ours.close()
        theirs.close()


def a_resize(client: FleetClient, id: str, ours: Db, theirs: Db, word: str) -> None:
    client.act(id, resize={"flavorRef": "84"})
    client.until(id, "VERIFY_RESIZE")
    assert {c for c, *_ in held(ours)} > {id} and held(ours) <= held(theirs)  # its migration holds what it held
    client.act(id, **{word: None})
    client.until(id, "ACTIVE")


def an_evacuation(fleet: Fleet, client: FleetClient, id: str) -> None:
    old = client.server(id)["OS-EXT-SRV-ATTR:host"]
    fleet.kill(old)
    del fleet.processes[old]
    fleet.wait(lambda: old not in fleet.hosts_up(), 40, "it counts as down")
    client.act(id, evacuate={})
    client.until(id, "SHUTOFF", 60)
    assert client.server(id)["OS-EXT-SRV-ATTR:host"] != old
    fleet.start(old)
    fleet.wait(lambda: id not in fleet.holds()[old].machines and len(fleet.hosts_up()) == 3, 60, "it is back")


def what_others_hold_counts(fleet: Fleet, client: FleetClient, image: str, network: str, ours: Db, theirs: Db) -> None:
    """Of two hosts another service has all memory: the next server goes to the third, and operators read why the last cannot."""
    with ours.read() as tx:
        nodes = {n.host: n.uuid for n in tx.execute(sa.select(hosts.NODES))}
    full, left = sorted(nodes)[:2], sorted(nodes)[2]
    taken = {host: filled(client, fleet, nodes[host], n) for n, host in enumerate(full)}
    id = client.boot("squeezed", image, network)
    assert client.until(id, "ACTIVE")["OS-EXT-SRV-ATTR:host"] == left
    taken[left] = filled(client, fleet, nodes[left], 2)
    lost = client.boot("lost", image, network)
    fault = client.until(lost, "ERROR")["fault"]
    assert "elsewhere_too turned away 3" in fault["details"], fault
    for consumer in taken.values():
        elsewhere(client, fleet, "DELETE", f"/allocations/{consumer}")
    for one in (id, lost):
        client.delete(f"/compute/v2.1/servers/{one}")
        client.until(one, "")


def filled(client: FleetClient, fleet: Fleet, provider: str, n: int) -> str:
    """Somebody else takes what is left of its memory."""
    stock = elsewhere(client, fleet, "GET", f"/resource_providers/{provider}/inventories")["inventories"]["MEMORY_MB"]
    used = elsewhere(client, fleet, "GET", f"/resource_providers/{provider}/usages")["usages"]["MEMORY_MB"]
    room = int((stock["total"] - stock["reserved"]) * stock["allocation_ratio"]) - used
    consumer = f"00000000-0000-4000-8000-00000000000{n}"
    body = {"allocations": {provider: {"resources": {"MEMORY_MB": room}}}, "project_id": "p", "user_id": "u"}
    elsewhere(client, fleet, "PUT", f"/allocations/{consumer}", body | {"consumer_generation": None})
    return consumer


def elsewhere(client: FleetClient, fleet: Fleet, method: str, path: str, body=None):
    """Asked of the other service, with our administrator's token: both ask the same identity service."""
    headers = {
        "X-Auth-Token": client.token,
        "OpenStack-API-Version": "placement 1.28",
        "Content-Type": "application/json",
    }
    data = None if body is None else json.dumps(body).encode()
    url = f"http://127.0.0.1:{fleet.port}/placement{path}"
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=20) as answer:
        said = answer.read()
    return json.loads(said) if said else None
