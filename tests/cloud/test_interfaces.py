"""Interfaces that come and go: attach is answered when it is done, detach later; ports, plugs and machines agree."""

import pytest

from kilonova.model import options
from tests.cloud import tables
from tests.stories import telling


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def network(cloud):
    return cloud.neighbours.network


def private(cloud):
    return next(n for n in network(cloud).networks() if n.name == "private")


def attach(cloud, s, ok=200, version="2.96", token="", **wish):
    body = {"interfaceAttachment": wish}
    said = cloud.json("POST", f"/servers/{s.id}/os-interface", body, ok=ok, version=version, token=token)
    return said["interfaceAttachment"] if ok == 200 else next(iter(said.values()))["message"]


def detach(cloud, s, port_id, ok=202, settle=True):
    said = cloud.json("DELETE", f"/servers/{s.id}/os-interface/{port_id}", ok=ok)
    if settle:
        cloud.settle()
    return said and next(iter(said.values()))["message"]


def interfaces(cloud, s, version="2.96"):
    return cloud.json("GET", f"/servers/{s.id}/os-interface", version=version)["interfaceAttachments"]


def nics(s):
    return [n.port_id for n in s.state.machines[s.id].machine.nics]


# ---- attach


def test_a_network_is_attached(cloud):
    s = cloud.boot()
    made = attach(cloud, s, net_id=private(cloud).id, tag="second")
    assert (made["port_state"], made["tag"], made["net_id"]) == ("ACTIVE", "second", private(cloud).id)
    (address,) = made["fixed_ips"]
    assert address["ip_address"] in [a["addr"] for a in s.show()["addresses"]["private"]]
    assert nics(s) == [p.port_id for p in s.row.plugs] == [i["port_id"] for i in interfaces(cloud, s)]
    assert nics(s)[1] == made["port_id"]
    machine = s.state.machines[s.id].machine
    assert (machine.nics[1].mac, machine.nics[1].tag) == (made["mac_addr"], "second")
    assert machine.identity.nics == machine.nics
    assert s.events()[-1] == ("compute_attach_interface", "Success")
    path = f"/servers/{s.id}/os-interface/{made['port_id']}"
    assert cloud.json("GET", path)["interfaceAttachment"] == made
    assert "tag" not in cloud.json("GET", path, version="2.69")["interfaceAttachment"]


def test_it_is_there_after_a_hard_reboot_and_another_life_of_the_host(cloud):
    s = cloud.boot()
    made = attach(cloud, s, net_id=private(cloud).id)
    s.act("reboot", {"type": "HARD"})
    assert nics(s)[1] == made["port_id"]
    s.state.power_cut()
    cloud.start_hosts()
    cloud.settle()
    assert (s.status, nics(s)[1]) == ("ACTIVE", made["port_id"])


def test_without_a_word_it_is_the_only_network(cloud):
    s = cloud.boot(networks="none")
    assert interfaces(cloud, s) == []
    made = attach(cloud, s)
    assert [i["port_id"] for i in interfaces(cloud, s)] == nics(s) == [made["port_id"]]


def test_a_port_of_the_callers_is_bound_and_let_go_of(cloud):
    s = cloud.boot()
    mine = network(cloud).create_port(private(cloud).id, project_id=cloud.user.project_id)
    made = attach(cloud, s, port_id=mine.id)
    assert (made["port_id"], nics(s)[1]) == (mine.id, mine.id)
    assert network(cloud).port(mine.id).host == s.row.host
    assert attach(cloud, s, ok=409, port_id=mine.id) == f"Port {mine.id} is still in use."
    detach(cloud, s, mine.id)
    left = network(cloud).port(mine.id)
    assert (left.device_id, left.host, len(nics(s))) == ("", "", 1)
    assert s.events()[-1] == ("compute_detach_interface", "Success")
    network(cloud).delete_port(mine.id)


def test_an_address_may_be_wished_for(cloud):
    s = cloud.boot()
    made = attach(cloud, s, net_id=private(cloud).id, fixed_ips=[{"ip_address": "10.0.0.99"}])
    assert made["fixed_ips"][0]["ip_address"] == "10.0.0.99"
    said = attach(cloud, s, ok=409, net_id=private(cloud).id, fixed_ips=[{"ip_address": "10.0.0.99"}])
    assert "10.0.0.99" in said
    assert (len(nics(s)), len(interfaces(cloud, s))) == (2, 2)
    assert s.status == "ACTIVE"


def test_what_makes_no_sense_is_refused_and_nothing_is_changed(cloud):
    s = cloud.boot()
    id, gone = private(cloud).id, "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"
    bare = network(cloud).session.json(
        "POST", "/v2.0/networks", dict, body={"network": {"name": "bare", "shared": True}}
    )
    assert "both" in attach(cloud, s, ok=400, net_id=id, port_id=gone)
    assert "network_id" in attach(cloud, s, ok=400, fixed_ips=[{"ip_address": "10.0.0.9"}])
    assert "ipv4" in attach(cloud, s, ok=400, net_id=id, fixed_ips=[{"ip_address": "ten"}])
    assert attach(cloud, s, ok=404, net_id=gone) == f"Network {gone} could not be found."
    assert attach(cloud, s, ok=404, port_id=gone) == f"Port id {gone} could not be found."
    assert "requires a subnet" in attach(cloud, s, ok=400, net_id=bare["network"]["id"])
    public = next(n for n in network(cloud).networks() if n.external)
    attach(cloud, s, ok=403, net_id=public.id)
    attach(cloud, s, ok=400, net_id=id, tag="x", version="2.48")
    assert "could not be found" in detach(cloud, s, gone, ok=404)
    cloud.json("GET", f"/servers/{s.id}/os-interface/{gone}", ok=404)
    assert [e for e, _ in s.events()] == ["compute__do_build_and_run_instance"]


def test_state_and_lock(cloud):
    s = cloud.boot()
    s.act("suspend")
    said = attach(cloud, s, ok=409, net_id=private(cloud).id)
    assert said == f"Cannot 'attach_interface' instance {s.id} while it is in vm_state suspended"
    assert "detach_interface" in detach(cloud, s, s.row.plugs[0].port_id, ok=409)
    s.act("resume")
    s.act("lock")
    assert attach(cloud, s, ok=409, net_id=private(cloud).id) == f"Instance {s.id} is locked"
    detach(cloud, s, s.row.plugs[0].port_id, ok=409)
    attach(cloud, s, net_id=private(cloud).id, token=cloud.admin)
    s.act("unlock")
    s.act("os-stop")
    made = attach(cloud, s, net_id=private(cloud).id)
    s.act("os-start")
    assert nics(s)[-1] == made["port_id"]


def test_a_host_that_refuses_leaves_nothing(cloud):
    s = cloud.boot()
    cloud.driver(s.row.host).options = options.Sim(failure_rate=1.0)
    said = attach(cloud, s, ok=500, net_id=private(cloud).id)
    assert said.startswith("Failed to attach network adapter device")
    assert s.events()[-1] == ("compute_attach_interface", "Error")
    assert (s.status, len(nics(s)), len(s.row.plugs)) == ("ACTIVE", 1, 1)
    assert len(network(cloud).ports(servers=[s.id])) == 1


def test_a_host_that_cannot_plug_refuses_and_has_nothing_to_take_back(cloud):
    """Its hypervisor has no word for it: 501, and the port is gone."""
    s = cloud.boot()
    host = cloud.hosts.hosts[s.row.host]

    class Plain:
        """Asked for what it can, it knows of no plugging in."""

        def __init__(self, driver):
            self.driver = driver

        def __getattr__(self, name):
            if name.startswith(("attach_", "detach_", "swap_")):
                raise AttributeError(name)
            return getattr(self.driver, name)

    whole, host.driver = host.driver, Plain(host.driver.thing)
    attach(cloud, s, ok=501, net_id=private(cloud).id)
    assert len(network(cloud).ports(servers=[s.id])) == 1
    host.driver = whole
    assert s.events()[-1] == ("compute_attach_interface", "Error")


def test_a_port_that_is_deleted_at_the_network_service_goes_from_the_machine(cloud):
    s = cloud.boot()
    gone = s.row.plugs[0].port_id
    network(cloud).delete_port(gone)
    event = {"name": "network-vif-deleted", "server_uuid": s.id, "tag": gone}
    cloud.json("POST", "/os-server-external-events", {"events": [event]}, token=cloud.admin)
    cloud.pass_time(130)
    assert (s.row.plugs, nics(s)) == ([], [])


def test_no_address_left(cloud):
    s = cloud.boot()
    session = network(cloud).session
    net = session.json("POST", "/v2.0/networks", dict, body={"network": {"name": "small", "shared": True}})["network"]
    subnet = {"network_id": net["id"], "cidr": "192.0.2.0/30", "ip_version": 4, "enable_dhcp": False}
    session.json("POST", "/v2.0/subnets", dict, body={"subnet": subnet})
    attach(cloud, s, net_id=net["id"])
    assert "No more IP addresses" in attach(cloud, s, ok=400, net_id=net["id"])


def test_a_silent_host_is_not_waited_for(cloud):
    s = cloud.boot()
    host = s.row.host
    cloud.dead.add(host)
    assert "does not answer" in attach(cloud, s, ok=503, net_id=private(cloud).id)
    assert "does not answer" in attach(cloud, s, ok=409, net_id=private(cloud).id)
    assert len(network(cloud).ports(servers=[s.id])) == 1
    cloud.dead.clear()


def test_what_a_gone_host_has_plugged_in_is_taken_out_when_it_returns(cloud):
    s = cloud.boot()
    host = s.row.host
    cloud.bus.lose = lambda to, raw: to == "conductor"
    attach(cloud, s, ok=503, net_id=private(cloud).id)
    cloud.bus.lose = lambda to, raw: False
    assert (len(nics(s)), len(s.row.plugs)) == (2, 1)
    cloud.pass_time(130)
    assert (len(nics(s)), s.status, s.row.host) == (1, "ACTIVE", host)


# ---- detach


def test_an_interface_is_detached(cloud):
    s = cloud.boot()
    (plug,) = s.row.plugs
    detach(cloud, s, plug.port_id)
    assert (nics(s), s.row.plugs, interfaces(cloud, s), s.show()["addresses"]) == ([], [], [], {})
    assert network(cloud).ports(ids=[plug.port_id]) == []
    assert s.events()[-1] == ("compute_detach_interface", "Success")
    assert "could not be found" in detach(cloud, s, plug.port_id, ok=404)


def test_a_guest_that_holds_on_keeps_it(cloud):
    s = cloud.boot()
    s.state.deaf.add(s.id)
    (plug,) = s.row.plugs
    detach(cloud, s, plug.port_id)
    assert s.events()[-1] == ("compute_detach_interface", "Error")
    assert (nics(s), s.row.plugs, s.status) == ([plug.port_id], [plug], "ACTIVE")


def test_detach_where_the_host_is_gone(cloud):
    s = cloud.boot()
    (plug,) = s.row.plugs
    cloud.dead.add(s.row.host)
    detach(cloud, s, plug.port_id)
    assert s.row.plugs == []
    assert nics(s) == [plug.port_id]
    cloud.dead.clear()
    cloud.pass_time(130)
    assert nics(s) == []


def test_many_at_once(cloud):
    """Each is alone with the server in its turn; twice the same comes to the same."""
    s = cloud.boot()
    mine = [network(cloud).create_port(private(cloud).id, project_id=cloud.user.project_id) for _ in range(3)]
    for p in mine:
        attach(cloud, s, port_id=p.id)
    for p in mine:
        detach(cloud, s, p.id, settle=False)
        detach(cloud, s, p.id, settle=False)
    cloud.settle()
    assert len(s.row.plugs) == len(nics(s)) == 1
    results = [r for e, r in s.events() if e == "compute_detach_interface"]
    assert results == ["Success"] * 3  # who came second found nothing to be unplugged
    for p in mine:
        network(cloud).delete_port(p.id)


def test_delete_overtakes_both(cloud):
    s = cloud.boot()
    detach(cloud, s, s.row.plugs[0].port_id, settle=False)
    s.delete()
    assert (s.row.vm_state, network(cloud).ports(servers=[s.id])) == ("deleted", [])


@pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")
def test_what_is_answered_is_as_specified(cloud):
    s = cloud.boot()
    for key, entry, (first, last) in tables.routes():
        if "os-interface" not in key or not isinstance(entry.get("response"), dict):
            continue
        for v in tables.changes(entry["response"], first, last):
            method, path = key.replace("{server_id}", s.id).replace("{id}", s.row.plugs[0].port_id).split()
            body = {"interfaceAttachment": {}} if method == "POST" else None
            said = cloud.json(method, path, body, version=f"2.{v}")
            assert tables.disagreements(tables.said(entry, "response", v), said) == [], (key, v)


# ---- whose


def test_another_tenants_port_is_not_shown_and_cannot_be_had(cloud):
    s = cloud.boot()
    bob = cloud.services.person("bob", "member")
    forged = network(cloud).create_port(private(cloud).id, project_id=bob.project_id, device_id=s.id)
    assert forged.id not in [i["port_id"] for i in interfaces(cloud, s)]
    cloud.json("GET", f"/servers/{s.id}/os-interface/{forged.id}", ok=404)
    assert "could not be found" in attach(cloud, s, ok=404, port_id=forged.id)
    detach(cloud, s, forged.id, ok=404)
    for method, path, body in (
        ("GET", "", None),
        ("GET", f"/{forged.id}", None),
        ("POST", "", {"interfaceAttachment": {}}),
        ("DELETE", f"/{s.row.plugs[0].port_id}", None),
    ):
        cloud.json(method, f"/servers/{s.id}/os-interface{path}", body, ok=404, token=bob.token)
    network(cloud).delete_port(forged.id)
