"""What operators had and still have: os-hosts, the audit log, images beforehand; and shares, which this cloud has none of."""

import pytest

from kilonova.clients import Absent
from kilonova.model.states import VM
from kilonova.store import servers
from tests.cloud import tables
from tests.cloud.tables import changes, disagreements, said
from tests.stories import telling

NOBODY = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def asked(cloud, method, path, body=None, ok=200, version="2.42", token=""):
    return cloud.json(method, path, body, ok=ok, version=version, token=token or cloud.admin)


# ---- answers, against the specification's tables


@pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")
def test_answers_are_those_of_the_specification(cloud):
    s = cloud.boot("one")
    group = asked(cloud, "POST", "/os-aggregates", {"aggregate": {"name": "a"}})["aggregate"]["id"]
    bodies = {
        "PUT /os-hosts/{id}": {"status": "Enable"},
        "POST /os-aggregates/{id}/images": {"cache": [{"id": cloud.image_id}]},
    }
    paths = {"/os-hosts/{id}": "/os-hosts/h0", "/os-aggregates/{id}/images": f"/os-aggregates/{group}/images",
             "/os-instance_usage_audit_log/{id}": "/os-instance_usage_audit_log/2026-11-20%2012:00:00",
             "/servers/{server_id}/shares": f"/servers/{s.id}/shares"}  # fmt: skip
    looked = 0
    for name in ("os-hosts", "os-instance-usage-audit-log", "os-aggregates", "server-shares"):
        for entry in tables.group(name):
            key, (first, last) = entry["route"], tables.span(entry["versions"])
            method, path = key.split(" ")
            if (name == "os-aggregates" and not path.endswith("images")) or (
                method in ("POST", "DELETE") and "share" in path
            ):
                continue
            if path.endswith(("reboot", "shutdown", "startup", "shares/{id}")):
                continue
            for v in changes(entry["response"] if entry["response"] != "none" else {}, first, last):
                status = 202 if path.endswith("images") else 200
                answer = asked(cloud, method, paths.get(path, path), bodies.get(key), status, f"2.{v}")
                if entry["response"] != "none":
                    wrong = disagreements(said(entry, "response", v), answer)
                    assert [w for w in wrong if "hosts_not_run[" not in w] == [], (key, v)  # our hosts have names
                looked += 1
    assert looked >= 12
    cloud.settle()


# ---- os-hosts


def test_hosts_and_what_they_hold(cloud):
    first, second = cloud.boot("one"), cloud.boot("two", flavor="large")
    shown = asked(cloud, "GET", "/os-hosts")["hosts"]
    assert {"host_name": "h0", "service": "compute", "zone": "nova"} in shown
    assert asked(cloud, "GET", "/os-hosts?zone=elsewhere")["hosts"] == []
    host = first.row.host
    rows = {r["resource"]["project"]: r["resource"] for r in asked(cloud, "GET", f"/os-hosts/{host}")["host"]}
    assert (rows["(total)"]["cpu"], rows["(total)"]["memory_mb"]) == (8, 16_384)
    here = [s for s in (first, second) if s.row.host == host]
    assert rows["(used_max)"]["cpu"] == sum(s.row.flavor.vcpus for s in here) == rows[cloud.user.project_id]["cpu"]
    asked(cloud, "GET", "/os-hosts/nobody", ok=404)
    asked(cloud, "GET", "/os-hosts", version="2.43", ok=404)
    asked(cloud, "GET", "/os-hosts", token=cloud.user.token, ok=403)


def test_a_host_is_disabled_and_enabled(cloud):
    assert asked(cloud, "PUT", "/os-hosts/h0", {"status": "disable"}) == {"host": "h0", "status": "disabled"}
    assert "h0" not in {h["host_name"] for h in asked(cloud, "GET", "/os-hosts")["hosts"]}
    assert cloud.boot("one").row.host != "h0"
    assert asked(cloud, "PUT", "/os-hosts/h0", {"status": "Enable"}) == {"host": "h0", "status": "enabled"}
    for bad in ({}, {"status": "on"}, {"status": "enable", "x": 1}):
        asked(cloud, "PUT", "/os-hosts/h0", bad, ok=400)
    asked(cloud, "PUT", "/os-hosts/h0", {"status": "disable", "maintenance_mode": "enable"}, ok=501)
    assert "h0" in {h["host_name"] for h in asked(cloud, "GET", "/os-hosts")["hosts"]}
    asked(cloud, "PUT", "/os-hosts/nobody", {"status": "enable"}, ok=404)
    for action in ("reboot", "startup", "shutdown"):
        asked(cloud, "GET", f"/os-hosts/h0/{action}", ok=501)
        asked(cloud, "GET", f"/os-hosts/nobody/{action}", ok=404)


# ---- the audit log


def test_the_audit_log_says_that_nobody_audits(cloud):
    log = asked(cloud, "GET", "/os-instance_usage_audit_log")["instance_usage_audit_logs"]
    assert (log["num_hosts"], log["hosts_not_run"], log["overall_status"]) == (
        3,
        ["h0", "h1", "h2"],
        "0 of 3 hosts done. 0 errors.",
    )
    path = "/os-instance_usage_audit_log/2026-01-20%2012:00:00.5"
    log = asked(cloud, "GET", path)["instance_usage_audit_log"]
    assert (log["period_beginning"], log["period_ending"]) == (
        "2025-12-01T00:00:00.000000",
        "2026-01-01T00:00:00.000000",
    )
    for bad in ("yesterday", "2026-13-01%2000:00:00", "2026-01-01", "0001-01-15%2000:00:00"):
        asked(cloud, "GET", f"/os-instance_usage_audit_log/{bad}", ok=400)


# ---- images beforehand


def test_hosts_of_an_aggregate_have_images_beforehand(cloud):
    group = asked(cloud, "POST", "/os-aggregates", {"aggregate": {"name": "a"}})["aggregate"]["id"]
    for host in ("h0", "h1"):
        asked(cloud, "POST", f"/os-aggregates/{group}/action", {"add_host": {"host": host}})
    path, one = f"/os-aggregates/{group}/images", {"id": cloud.image_id}
    cloud.states["h0"].broken = True
    asked(cloud, "POST", path, {"cache": [one]}, 202, "2.81")
    cloud.settle()
    cloud.states["h0"].broken = False
    assert {h for h, s in cloud.states.items() if cloud.image_id in s.images} == {"h1"}
    asked(cloud, "POST", path, {"cache": [one]}, 202, "2.81")
    cloud.settle()
    assert {h for h, s in cloud.states.items() if cloud.image_id in s.images} == {"h0", "h1"}
    for bad in ({"cache": []}, {"cache": [one, one]}, {"cache": [{"id": NOBODY}]}, {"cache": [{"id": "x"}]}, {}):
        asked(cloud, "POST", path, bad, 400, "2.81")
    asked(cloud, "POST", path, {"cache": [one]}, 404, "2.80")
    asked(cloud, "POST", "/os-aggregates/777/images", {"cache": [one]}, 404, "2.81")
    asked(cloud, "POST", path, {"cache": [one]}, 403, "2.81", token=cloud.user.token)


# ---- shares


def test_shares_that_are_nobodys(cloud):
    s = cloud.boot("one")
    path, wish = f"/servers/{s.id}/shares", {"share": {"share_id": NOBODY, "tag": "mine"}}
    mine = lambda method, path, body=None, ok=200, version="2.97": cloud.json(
        method, path, body, ok=ok, version=version
    )
    assert mine("GET", path) == {"shares": []}
    mine("GET", path, version="2.96", ok=404)
    mine("GET", f"{path}/{NOBODY}", ok=404)
    mine("POST", path, wish, ok=409)  # it runs
    mine("DELETE", f"{path}/{NOBODY}", ok=409)
    s.act("os-stop")
    mine("POST", path, wish, ok=404)
    service, cloud.neighbours.share.session.carrier = cloud.neighbours.share.session.carrier, Absent("shares")
    mine("POST", path, wish, ok=403)  # a cloud may be without them
    cloud.neighbours.share.session.carrier = service
    mine("DELETE", f"{path}/{NOBODY}", ok=404)
    for bad in ({"share": {}}, {"share": {"share_id": "x"}}, {"share": {"share_id": NOBODY, "tag": "a b"}}):
        mine("POST", path, bad, ok=400)
    stranger = cloud.services.person("sam", "member").token
    cloud.json("GET", path, token=stranger, version="2.97", ok=403)
    with cloud.db.read() as tx:
        assert servers.get(tx, s.id).vm_state == VM.stopped
