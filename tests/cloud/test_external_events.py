"""What neighbours tell: each event has its own answer, and what it means for the server is done."""

import pytest

from tests.cloud import tables
from tests.cloud.rooms import Rooms
from tests.cloud.tables import changes, disagreements, said
from tests.stories import telling

PLACE = "/os-server-external-events"
NOBODY = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"
TAGS = {"power-update": "POWER_OFF", "volume-extended": NOBODY, "accelerator-request-bound": "x"}


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    rooms = Rooms(tmp_path_factory.mktemp("events"))
    rooms.token, rooms.member = rooms.admin(), rooms.person("maria", "member")
    return rooms


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def tell(cloud, *events, ok=200):
    answer = cloud.json("POST", PLACE, {"events": list(events)}, token=cloud.admin, ok=ok)
    cloud.settle()
    return [e["code"] for e in answer["events"]]


def event(name, server, **more):
    return {"name": name, "server_uuid": getattr(server, "id", server), **more}


@pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")
def test_answers_are_those_of_the_specification(api):
    (entry,) = tables.group("os-server-external-events")
    server = api.server(api.member.project_id, host="h1")
    for v in changes(entry["response"], 1, 104):
        names = said(entry, "request", v).members["events"].item.members["name"].told["enum"]
        events = [event(n, server, status="completed", **({"tag": TAGS[n]} if n in TAGS else {})) for n in names]
        answer = api.call("POST", PLACE, {"events": [*events, event("network-changed", NOBODY)]}, api.token, v)
        assert (answer.status, [e["code"] for e in answer.json["events"]]) == (207, [200] * len(names) + [404])
        assert disagreements(said(entry, "response", v), answer.json) == [], f"2.{v}"


def test_each_event_has_its_own_answer(api):
    here, nowhere = api.server(api.member.project_id, host="h1"), api.server(api.member.project_id)
    told = [event("network-vif-plugged", here, tag="p"), event("network-changed", NOBODY, status="failed"),
            event("network-changed", nowhere), event("volume-extended", here), event("power-update", here, tag="ON")]  # fmt: skip
    answer = api.call("POST", PLACE, {"events": told}, api.token, 76)
    assert answer.status == 207
    assert [(e["code"], e["status"]) for e in answer.json["events"]] == [
        (200, "completed"), (404, "failed"), (422, "failed"), (400, "failed"), (400, "failed"),
    ]  # fmt: skip
    assert answer.json["events"][0]["tag"] == "p" and "tag" not in answer.json["events"][1]
    assert api.call("POST", PLACE, {"events": told[:1]}, api.token).status == 200


def test_who_may_tell(api):
    told = {"events": [event("network-changed", api.server(api.member.project_id, host="h1"))]}
    assert api.call("POST", PLACE, told, api.member.token).status == 403
    for bad in ({"events": []}, {}, {"events": [event("rain", NOBODY)]}, {"events": [event("network-changed", "x")]}):
        assert api.call("POST", PLACE, bad, api.token).status == 400
    assert (
        api.call("POST", PLACE, {"events": [event("power-update", NOBODY, tag="POWER_ON")]}, api.token, 75).status
        == 400
    )


def test_power_update_turns_the_server_as_it_was_told(cloud):
    s = cloud.boot("one")
    assert tell(cloud, event("power-update", s, tag="POWER_ON")) == [200]  # it is on already
    assert tell(cloud, event("power-update", s, tag="POWER_OFF"), event("power-update", s, tag="POWER_OFF")) == [
        200,
        200,
    ]
    assert (s.status, s.state.machines[s.id].power) == ("SHUTOFF", "shutdown")
    assert tell(cloud, event("power-update", s, tag="POWER_ON")) == [200]
    assert (s.status, s.state.machines[s.id].power) == ("ACTIVE", "running")
    path = f"/servers/{s.id}/os-instance-actions"
    actions = [a["action"] for a in cloud.json("GET", path, token=cloud.admin)["instanceActions"]]
    assert actions == ["start", "stop", "create"]


def test_network_changed_shows_the_new_addresses(cloud):
    s = cloud.boot("one")
    (port,) = s.row.plugs
    before = port.addresses[0].address
    other = before.rsplit(".", 1)[0] + ".77"
    path, body = f"/network/v2.0/ports/{port.port_id}", {"port": {"fixed_ips": [{"ip_address": other}]}}
    cloud.services.json("PUT", path, body, cloud.admin)
    assert tell(cloud, event("network-changed", s, tag=port.port_id), event("network-changed", s)) == [200, 200]
    assert [a["addr"] for a in s.show()["addresses"]["private"]] == [other]


def test_the_nic_of_a_port_that_is_gone_leaves_the_guest(cloud):
    s = cloud.boot("one")
    (plug,) = s.row.plugs
    cloud.services.json("DELETE", f"/network/v2.0/ports/{plug.port_id}", None, cloud.admin, ok=204)
    assert tell(cloud, event("network-vif-deleted", s, tag=plug.port_id)) == [200]
    assert s.row.plugs == [] and s.state.machines[s.id].machine.nics == []
    assert ("compute_detach_interface", "Success") in s.events()
    assert tell(cloud, event("network-vif-deleted", s, tag=plug.port_id)) == [200]  # told twice


def test_an_extended_volume_is_in_the_history(cloud):
    s = cloud.boot("one")
    assert tell(cloud, event("volume-extended", s, tag=NOBODY)) == [200]
    assert ("compute_extend_volume", "Success") in s.events()
