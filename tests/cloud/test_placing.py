"""Where servers come to be, as users and operators see it: hints, forced places, and why there was none."""

import json

import pytest

from kilonova import main as commands
from kilonova.cli import hosts as command
from kilonova.cli.state import StateDir
from kilonova.compute.report import stocks
from kilonova.contracts.conductor import Report
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.db import Db, meta
from kilonova.kit.errors import Invalid, NotFound
from kilonova.model import options
from kilonova.model.flavor import Flavor
from kilonova.model.host import HostFacts
from kilonova.model.options import Compute
from kilonova.store import catalog, hosts, placement, servers
from tests.stories import telling


def test_operators_see_which_rule_turned_away_how_many(tmp_path):
    with telling(tmp_path) as cloud:
        s = cloud.boot(flavor="huge")
        said = "No valid host was found. There are not enough hosts available."
        theirs = cloud.json("GET", f"/servers/{s.id}", token=cloud.admin)["server"]["fault"]
        assert (theirs["message"], theirs["details"]) == (said, f"{said} Of 3 hosts: room turned away 3.")
        mine = cloud.json("GET", f"/servers/{s.id}")["server"]["fault"]
        assert mine["message"] == said and "details" not in mine


def test_operators_see_why_a_server_could_not_move(tmp_path):
    """Of moves and rebuilds as of builds; a user hears of no rule."""
    with telling(tmp_path) as cloud:
        s = cloud.boot()
        away = sorted(cloud.states.keys() - {s.row.host})
        with cloud.db.tx() as tx:
            for host in away:
                hosts.set_service(tx, hosts.service_of(tx, host).uuid, cloud.clock.now(), disabled=True)
        for told in ({"migrate": None}, {"os-migrateLive": {"host": None, "block_migration": "auto"}}):
            cloud.json("POST", f"/servers/{s.id}/action", told, ok=202, token=cloud.admin)
            cloud.settle()
            (last, *_) = cloud.json("GET", f"/servers/{s.id}/os-instance-actions", token=cloud.admin)["instanceActions"]
            path = f"/servers/{s.id}/os-instance-actions/{last['request_id']}"
            event = cloud.json("GET", path, token=cloud.admin)["instanceAction"]["events"][-1]
            assert event["result"] == "Error"
            assert event["details"].endswith("Of 3 hosts: enabled turned away 2, not_avoided turned away 1.")
            (theirs,) = {str(e.get("details")) for e in cloud.json("GET", path)["instanceAction"]["events"]}
            assert theirs == "None"
        cloud.check()


def test_servers_go_to_others_or_away_from_them(tmp_path):
    with telling(tmp_path) as cloud:
        one = cloud.boot("one")

        def boot(name, **hints):
            wish = {"name": name, "flavorRef": "small", "imageRef": cloud.image_id, "networks": "auto"}
            made = cloud.json("POST", "/servers", {"server": wish, "os:scheduler_hints": hints}, ok=202)["server"]["id"]
            cloud.settle()
            with cloud.db.read() as tx:
                return servers.get(tx, made)

        for i in range(3):
            assert boot(f"near{i}", same_host=one.id).host == one.row.host
        far = boot("far", different_host=[one.id])
        assert far.host not in (None, one.row.host)
        third = boot("third", different_host=[one.id, far.id])
        assert third.host not in (None, one.row.host, far.host)
        assert boot("nowhere", different_host=[one.id, far.id, third.id]).vm_state == "error"
        assert boot("near-nobody", same_host="00000000-0000-4000-8000-000000000009").vm_state == "error"
        cloud.check()


# ---- kilonova hosts


@pytest.fixture
def place(tmp_path):
    """A cloud's directory, with three hosts, and some of the first in use."""
    StateDir(tmp_path)
    db, now, ids = Db(f"sqlite:///{tmp_path}/kilonova.db"), WallClock().now(), Ids()
    meta.create_all(db.engine)
    with db.tx() as tx:
        for i, name in enumerate("abc"):
            traits = ["HW_CPU_X86_AVX2"] if i else []
            facts = HostFacts(8, 4096 << i, 100, 90, "QEMU", 7_002_022, name, {"arch": "x86_64"}, traits)
            report = Report(name, now, 1.0, [], facts=facts, stocks=stocks(facts, Compute(reserved_memory_mb=0)))
            hosts.learn(tx, report, uuid=ids.uuid, now=now)
        node = hosts.nodes(tx, host="a")[0]
        placement.claim(tx, "s", node.uuid, {"VCPU": 2, "MEMORY_MB": 512}, now=now, project_id="p", user_id="u")
        hosts.set_service(tx, hosts.service_of(tx, "c").uuid, now, disabled=True)
        catalog.add_flavor(tx, Flavor("7", "big", 4, 8192, 10, extra_specs={"trait:HW_CPU_X86_AVX2": "required"}), now)
        catalog.add_flavor(tx, Flavor("8", "bigger", 4, 80_000, 10), now)
    db.close()

    def say(*words):
        return command.main(commands._parser("hosts"), ["--state-dir", str(tmp_path), *words])

    return say


def test_hosts_are_listed(place, capsys):
    assert place() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "2/32 (30)" in lines[2] and "up, disabled" in lines[4]
    assert place("--json") == 0
    (a, b, _) = json.loads(capsys.readouterr().out)
    assert (a["host"], a["zone"], a["state"], a["servers"]) == ("a", "nova", "up", 0)
    assert a["resources"]["VCPU"] == {"total": 8, "reserved": 0, "capacity": 32, "used": 2, "free": 30}
    assert b["resources"]["MEMORY_MB"]["free"] == 8192


def test_why_a_server_would_not_go_there(place, capsys):
    assert place("why", "big") == 0
    text = capsys.readouterr().out
    assert text.startswith("big could live on 1 of 3 hosts.") and "enabled turns away 1" in text
    assert place("why", "7", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fit"] == ["b"]
    assert said["against"] == {"a": ["room", "traits"], "b": [], "c": ["enabled"]}
    assert said["counts"] == {"room": 1, "traits": 1, "enabled": 1}
    assert place("why", "bigger") == 1
    assert "could live on 0 of 3 hosts" in capsys.readouterr().out
    assert (
        place("why", "big", "--zone", "elsewhere", "--host", "a", "--property", "hw_architecture=aarch64", "--json")
        == 1
    )
    assert set(json.loads(capsys.readouterr().out)["counts"]) == {"enabled", "named", "zone", "room", "traits", "image"}
    with pytest.raises(NotFound):
        place("why", "none")
    with pytest.raises(Invalid):
        place("why", "big", "--property", "x")
    for wrong in (("why",), ("list", "big")):
        with pytest.raises(SystemExit):
            place(*wrong)


def test_why_knows_of_cells_and_devices(place, capsys, tmp_path):
    """Hosts that tell of no cells and have no devices; and an alias that nobody has defined."""
    db = Db(f"sqlite:///{tmp_path}/kilonova.db")
    with db.tx() as tx:
        for i, specs in enumerate(
            (
                {"hw:numa_nodes": "1"},
                {"resources1:VCPU": "1", "trait1:CUSTOM_X": "required"},
                {"pci_passthrough:alias": "x:1"},
            )
        ):
            catalog.add_flavor(tx, Flavor(f"n{i}", f"n{i}", 1, 512, 1, extra_specs=specs), 1.0)
    db.close()
    for name, rule in (("n0", "numa"), ("n1", "devices")):
        assert place("why", name, "--json") == 1
        told = json.loads(capsys.readouterr().out)
        assert all(rule in rules for rules in told["against"].values()), told
    with pytest.raises(Invalid, match="not defined"):
        place("why", "n2")


def test_no_cloud_no_hosts(tmp_path):
    with pytest.raises(NotFound):
        command.main(commands._parser("hosts"), ["--state-dir", str(tmp_path)])


# ---- GET /servers/{id}/explain


def explained(cloud, s, token="", ok=200):
    said = cloud.json("GET", f"/servers/{s.id}/explain", token=token or cloud.admin, ok=ok)
    return said["explain"] if ok == 200 else said


def test_why_it_is_there_or_nowhere(tmp_path, capsys):
    """As an administrator reads it, also when the server is gone; nobody else, unless a policy says so."""
    with telling(tmp_path) as cloud:
        full, s = cloud.boot("full"), cloud.boot("s")
        said = explained(cloud, s)
        assert (said["server"], said["host"]) == (s.id, s.row.host)
        (c,) = said["choices"]
        assert (c["action"], c["hosts"], c["turned_away"], c["fault"]) == ("create", 3, {}, None)
        assert c["places"][0]["host"] == s.row.host and len({p["host"] for p in c["places"]}) == 3
        assert full.row.host == min(c["places"], key=lambda p: p["weight"])["host"]
        assert all(p["weight"] == pytest.approx(sum(p["weights"].values()), abs=1e-3) for p in c["places"])
        assert c["places"][0]["weights"].keys() >= {"ram", "cpu", "disk"}
        cloud.json("POST", f"/servers/{s.id}/action", {"migrate": None}, ok=202, token=cloud.admin)
        cloud.settle()
        s.act("confirmResize", ok=204)
        newest, _ = explained(cloud, s)["choices"]
        assert (newest["action"], newest["turned_away"]) == ("migrate", {"not_avoided": 1})
        assert newest["places"][0]["host"] == s.row.host

        lost = cloud.boot("lost", flavor="huge")
        said = explained(cloud, lost)
        assert said["host"] is None and said["choices"][0]["turned_away"] == {"room": 3}
        assert said["choices"][0]["fault"].startswith("No valid host was found.") and not said["choices"][0]["places"]
        explained(cloud, lost, token=cloud.user.token, ok=403)
        bob = cloud.services.person("bob", "member")
        cloud.json("GET", f"/servers/{lost.id}/explain", token=bob.token, ok=404)
        cloud.json("GET", "/servers/00000000-0000-4000-8000-00000000000a/explain", token=cloud.admin, ok=404)
        s.delete()
        assert explained(cloud, s)["host"] is None


def test_why_says_what_hosts_refused(tmp_path):
    with telling(tmp_path) as cloud:
        for host in cloud.states:
            cloud.driver(host).options = options.Sim(failure_rate=1.0)
        s = cloud.boot("s")
        assert s.status == "ERROR"
        (c,) = explained(cloud, s)["choices"]
        assert len(c["places"]) == 3 and all("refused to spawn" in p["refused"] for p in c["places"])


def test_the_command_line_tells_the_same(tmp_path, capsys):
    with telling(tmp_path) as cloud:
        s = cloud.boot("s")
        url = str(cloud.db.engine.url)
        config = tmp_path / "k.toml"
        config.write_text(f'[database]\nurl = "{url}"\n')

        def why(*words):
            return command.main(commands._parser("hosts"), ["why", "--server", s.id, "--config", str(config), *words])

        assert why() == 0
        text = capsys.readouterr().out
        assert text.startswith(f"s ({s.id}) is on {s.row.host}.") and f"  {s.row.host} weighs" in text
        assert why("--json") == 0
        assert json.loads(capsys.readouterr().out)["choices"] == explained(cloud, s)["choices"]
