"""The metadata service as a guest's proxy asks it: who may ask, what is told, what is kept."""

import base64
import hashlib
import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kilonova.clients import Inside
from kilonova.companions.wires.metadata_proxy import Asker, MetadataProxy
from kilonova.kit.http import listen
from kilonova.metadata.app import KEPT, service
from kilonova.model import options
from kilonova.model.machine import Keypair
from kilonova.model.server import Address, Plug
from kilonova.model.shares import Sharing
from kilonova.store import hosts, servers, shares
from tests.cloud.rooms import SECRET, Rooms

PROJECT = "a" * 32


@pytest.fixture
def rooms(tmp_path):
    return Rooms(tmp_path)


def signed(id, project=PROJECT, secret=SECRET, **more):
    signature = hmac.new(secret.encode(), id.encode(), hashlib.sha256).hexdigest()
    return {"X-Instance-ID": id, "X-Instance-ID-Signature": signature, "X-Tenant-ID": project, **more}


def ask(rooms, path, headers, method="GET", body=None, app=None):
    answer = Inside(app or rooms.metadata, "http://169.254.169.254").send(method, path, headers, body)
    return answer.status, answer.read().decode("utf-8", "replace"), answer.headers


def told(rooms, server, path, **more):
    status, body, _ = ask(rooms, path, signed(server.id, server.project_id), **more)
    assert status == 200, (status, body)
    return body


def meta(rooms, server, **more):
    return json.loads(told(rooms, server, "/openstack/latest/meta_data.json", **more))


# ---- who may ask


def test_a_signed_question_is_answered(rooms):
    server = rooms.server(PROJECT, name="Web", hostname="web", metadata={"a": "b"}, keypair=Keypair("k", "ssh-rsa A"))
    shown = meta(rooms, server)
    assert (shown["uuid"], shown["name"], shown["hostname"], shown["meta"]) == (
        server.id,
        "Web",
        "web.novalocal",
        {"a": "b"},
    )
    assert told(rooms, server, "/latest/meta-data/instance-id") == f"i-{server.number:08x}"
    assert told(rooms, server, "/latest/meta-data/public-keys/0/openssh-key") == "ssh-rsa A"


def test_refusals_come_in_their_order(rooms):
    server = rooms.server(PROJECT)
    path, good = "/openstack/latest/meta_data.json", signed(server.id)
    without = lambda *names: {k: v for k, v in good.items() if k not in names}
    assert ask(rooms, path, {})[:2] == (400, "X-Instance-ID header is missing from request.")
    assert "Signature" in ask(rooms, path, without("X-Instance-ID-Signature", "X-Tenant-ID"))[1]
    assert ask(rooms, path, without("X-Instance-ID-Signature"))[0] == 400
    assert "Tenant" in ask(rooms, path, without("X-Tenant-ID"))[1]
    assert ask(rooms, path, without("X-Tenant-ID"))[0] == 400
    assert ask(rooms, path, good | {"X-Instance-ID": f"{server.id},{server.id}"})[0] == 400
    for wrong in ("", "0" * 64, good["X-Instance-ID-Signature"].upper(), "é"):
        assert ask(rooms, path, good | {"X-Instance-ID-Signature": wrong})[0] == 403
    assert ask(rooms, path, signed(server.id, secret="another"))[0] == 403
    assert ask(rooms, path, good | {"X-Instance-ID": rooms.ids.uuid()})[0] == 403
    assert ask(rooms, path, signed(rooms.ids.uuid()))[0] == 404
    assert ask(rooms, path, signed(server.id, "b" * 32))[0] == 404
    assert ask(rooms, path, good)[0] == 200


def test_the_first_list_is_for_everybody(rooms):
    status, body, _ = ask(rooms, "/", {})
    assert (status, body.split("\n")[0], body.split("\n")[-1]) == (200, "1.0", "latest")
    assert ask(rooms, "/openstack", {})[0] == 400


def test_a_deleted_server_is_told_nothing(rooms):
    server = rooms.server(PROJECT)
    meta(rooms, server)
    with rooms.db.tx() as tx:
        servers.change(tx, server.id, rooms.clock.now(), deleted_at=rooms.clock.now())
    rooms.clock.sleep(16)
    assert ask(rooms, "/openstack", signed(server.id))[0] == 404


# ---- how it is asked


@pytest.mark.parametrize(
    "path", ["/openstack/latest/meta_data.json", "/latest/meta-data/", "/latest/meta-data/hostname"]
)
def test_methods(rooms, path):
    head = signed(rooms.server(PROJECT).id)
    status, body, headers = ask(rooms, path, head, "HEAD")
    assert (status, body) == (200, "") and int(headers["content-length"]) > 0
    for method in ("POST", "PUT", "DELETE", "PATCH", "JUNK"):
        status, _, headers = ask(rooms, path, head, method, b"x")
        assert (status, headers["allow"]) == (405, "GET, HEAD")
    assert ask(rooms, "/latest/api/token", head, "PUT")[0] == 404


def test_content_types(rooms):
    head = signed(rooms.server(PROJECT).id)
    kind = lambda path: ask(rooms, path, head)[2]["content-type"].partition(";")[0]
    for name in ("meta_data.json", "vendor_data.json", "vendor_data2.json"):
        assert kind(f"/openstack/latest/{name}") == "application/json"
    assert kind("/openstack/latest/network_data.json") == "text/plain"
    assert kind("/openstack") == "text/plain"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(max_size=60),
    st.sampled_from(["GET", "POST", "PUT", "HEAD", "DELETE"]),
    st.dictionaries(
        st.sampled_from(
            ["X-Instance-ID", "X-Instance-ID-Signature", "X-Tenant-ID", "X-Forwarded-For", "Content-Length"]
        ),
        st.text(st.characters(max_codepoint=255), max_size=40),
    ),
    st.binary(max_size=2000),
)
def test_junk_is_never_our_fault(rooms, path, method, junk, body):
    server = "6d1b4c5e-0000-4000-8000-000000000001"
    for headers in (junk, signed(server) | junk):
        status = ask(rooms, f"/{path}".encode().decode("latin-1"), headers, method, body)[0]
        assert status in (200, 400, 403, 404, 405), status


def test_shares_are_told_once_the_machine_has_them(rooms):
    """By the tag to mount them by, since the version that knows of them; in the one query that tells of all else."""
    server = rooms.server(PROJECT)
    with rooms.db.tx() as tx:
        for n, busy in enumerate(("", "attaching", "", "error")):
            shares.add(tx, Sharing(f"u{n}", server.id, f"share{n}", f"tag{n}", "/e", busy=busy, at=n))
    before = rooms.db.statements
    shown = [d for d in meta(rooms, server)["devices"] if d["type"] == "share"]
    assert rooms.db.statements - before == 1
    assert [(d["share_id"], d["tag"]) for d in shown] == [("share0", "tag0"), ("share2", "tag2")]
    elder = json.loads(told(rooms, server, "/openstack/2020-10-14/meta_data.json"))["devices"]
    assert [d for d in elder if d["type"] == "share"] == []


# ---- what is kept, and for how long


def test_a_server_is_one_query_and_kept_for_a_while(rooms):
    server = rooms.server(PROJECT)
    before = rooms.db.statements
    for _ in range(5):
        meta(rooms, server)
    assert rooms.db.statements - before == 1
    with rooms.db.tx() as tx:
        servers.change(tx, server.id, rooms.clock.now(), metadata={"new": "1"})
    assert "meta" not in meta(rooms, server)
    rooms.clock.sleep(15)
    assert meta(rooms, server)["meta"] == {"new": "1"}


def test_without_a_cache_changes_are_told_at_once(tmp_path):
    rooms = Rooms(tmp_path, config=options.Config(metadata=options.Metadata(cache_s=0)))
    server = rooms.server(PROJECT)
    meta(rooms, server)
    with rooms.db.tx() as tx:
        servers.change(tx, server.id, rooms.clock.now(), metadata={"new": "1"})
    assert meta(rooms, server)["meta"] == {"new": "1"}


def test_no_more_than_so_many_are_remembered(rooms):
    some = [rooms.server(PROJECT) for _ in range(3)]
    for n in range(KEPT):
        rooms.metadata.known[str(n)] = None
    for server in some:
        meta(rooms, server)
    assert len(rooms.metadata.known) == KEPT and some[-1].id in rooms.metadata.known


def test_the_zone_is_that_of_the_host(rooms):
    with rooms.db.tx() as tx:
        group = hosts.create_aggregate(
            tx, "east", uuid=rooms.ids.uuid(), now=rooms.clock.now(), availability_zone="east-1"
        )
        tx.execute(hosts.AGGREGATE_HOSTS.insert(), {"aggregate": group.id, "host": "h1"})
    assert meta(rooms, rooms.server(PROJECT, host="h1"))["availability_zone"] == "east-1"
    assert meta(rooms, rooms.server(PROJECT, host="h2"))["availability_zone"] == "nova"
    assert meta(rooms, rooms.server(PROJECT, availability_zone="asked"))["availability_zone"] == "asked"


# ---- the network


def plugged(rooms, *, dhcp=True):
    """A server with a port on a network of its project."""
    admin, api = rooms.admin(), "/network/v2.0"
    wish = {"name": "net", "tenant_id": rooms.first.admin_project_id}
    net = rooms.json("POST", f"{api}/networks", {"network": wish}, admin, ok=201)["network"]
    wish = {
        "network_id": net["id"],
        "cidr": "10.7.0.0/24",
        "ip_version": 4,
        "enable_dhcp": dhcp,
        "dns_nameservers": ["9.9.9.9"],
    }
    rooms.json("POST", f"{api}/subnets", {"subnet": wish}, admin, ok=201)
    server = rooms.server(rooms.first.admin_project_id)
    port = rooms.neighbours.network.create_port(
        net["id"], project_id=server.project_id, device_id=server.id, device_owner="compute:nova"
    )
    addresses = [Address(a.ip_address) for a in port.fixed_ips]
    with rooms.db.tx() as tx:
        plugs = [Plug(port.id, net["id"], "net", port.mac, addresses, ["default"], "blue")]
        servers.finish(tx, server, server.vm_state, rooms.clock.now(), plugs=plugs)
    return server, port


def network_data(rooms, server):
    return json.loads(told(rooms, server, "/openstack/latest/network_data.json"))


def test_network_data_come_from_the_network_service(rooms):
    server, port = plugged(rooms, dhcp=False)
    shown = network_data(rooms, server)
    (link,), (net,) = shown["links"], shown["networks"]
    assert (link["vif_id"], link["ethernet_mac_address"]) == (port.id, port.mac)
    assert (net["type"], net["ip_address"], net["netmask"]) == ("ipv4", port.fixed_ips[0].ip_address, "255.255.255.0")
    assert net["routes"][0] == {"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.7.0.1"}
    assert shown["services"] == [{"type": "dns", "address": "9.9.9.9"}]
    assert meta(rooms, server)["devices"][0]["tags"] == ["blue"]
    assert told(rooms, server, "/latest/meta-data/local-ipv4") == port.fixed_ips[0].ip_address


def test_dhcp_is_said_and_a_server_without_ports_has_no_network(rooms):
    server, _ = plugged(rooms)
    assert network_data(rooms, server)["networks"][0]["type"] == "ipv4_dhcp"
    assert network_data(rooms, rooms.server(PROJECT)) == {}


def test_while_the_network_service_is_away_the_rest_is_told(rooms):
    class Gone:
        def send(self, *_):
            from kilonova.kit.errors import Unavailable

            raise Unavailable("nobody there")

    server, _ = plugged(rooms)
    other = rooms.server(PROJECT)
    known = network_data(rooms, server)
    rooms.neighbours.network.session.carrier = Gone()
    rooms.clock.sleep(400)
    assert network_data(rooms, server) == known
    assert ask(rooms, "/openstack/latest/network_data.json", signed(other.id))[0] == 503
    assert meta(rooms, other)["uuid"] == other.id


# ---- the password


PASSWORD = "/openstack/latest/password"


def test_a_password_is_kept_once(rooms):
    server = rooms.server(PROJECT, system_metadata={"boot_roles": "member"})
    head = signed(server.id)
    assert ask(rooms, PASSWORD, head)[:2] == (200, "")
    text = base64.b64encode(bytes(range(256)) * 2).decode()[:600]
    assert ask(rooms, PASSWORD, head, "POST", text.encode())[0] == 200
    assert ask(rooms, PASSWORD, head)[:2] == (200, text)
    assert ask(rooms, PASSWORD, head, "POST", b"again")[0] == 409
    kept = rooms.stored(server.id).system_metadata
    assert kept == {
        "boot_roles": "member", "password_0": text[:255], "password_1": text[255:510], "password_2": text[510:], "password_3": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "body", "status"),
    [("POST", b"x" * 1020, 200), ("POST", b"x" * 1021, 400), ("POST", b"\xff", 400), ("POST", b"\0", 400), ("PUT", b"x", 400), ("DELETE", None, 400), ("HEAD", None, 200)],
)  # fmt: skip
def test_what_a_password_may_be(rooms, method, body, status):
    assert ask(rooms, PASSWORD, signed(rooms.server(PROJECT).id), method, body)[0] == status


def test_the_first_version_has_no_password(rooms):
    head = signed(rooms.server(PROJECT).id)
    assert ask(rooms, "/openstack/2012-08-10/password", head, "POST", b"x")[0] == 404
    assert ask(rooms, "/openstack/2013-04-04/password", head, "POST", b"x")[0] == 200


def test_two_guests_threads_cannot_both_set_it(rooms):
    head, found = signed(rooms.server(PROJECT).id), []
    post = lambda n: found.append(ask(rooms, PASSWORD, head, "POST", b"p%d" % n)[0])
    threads = [threading.Thread(target=post, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(found) == [200] + [409] * 7


# ---- vendor data


class Cmdb(BaseHTTPRequestHandler):
    """An operator's service."""

    seen: list = []
    says = b'{"rack": 7}'
    status = 200

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((dict(self.headers), json.loads(body)))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.says)))
        self.end_headers()
        self.wfile.write(self.says)

    def log_message(self, *_): ...


@pytest.fixture
def cmdb():
    class Ours(Cmdb):
        seen = []

    there = HTTPServer(("127.0.0.1", 0), Ours)
    thread = threading.Thread(target=there.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield Ours, f"http://127.0.0.1:{there.server_port}/ask"
    there.shutdown()
    there.server_close()
    thread.join()


def vendored(rooms, **wishes):
    config = options.Config(metadata=options.Metadata(**wishes))
    more = {"clock": rooms.clock, "ids": rooms.ids, "secret": SECRET}
    return service(rooms.db, rooms.neighbours.network, config, **more)


def test_services_of_the_operator_are_asked(rooms, cmdb):
    Ours, url = cmdb
    app = vendored(rooms, vendordata_targets={"cmdb": url})
    server = rooms.server(
        PROJECT, metadata={"a": "b"}, user_data="eA==", system_metadata={"boot_roles": "member,reader"}
    )
    for _ in range(3):
        shown = json.loads(told(rooms, server, "/openstack/latest/vendor_data2.json", app=app))
        assert shown == {"static": {}, "cmdb": {"rack": 7}}
    ((headers, body),) = Ours.seen
    assert body == {
        "project-id": PROJECT, "instance-id": server.id, "image-id": "", "user-data": "eA==", "hostname": "one.novalocal",
        "metadata": {"a": "b"}, "boot-roles": "member,reader",
    }  # fmt: skip
    assert headers["User-Agent"].startswith("openstack-nova-vendordata") and "X-Auth-Token" not in headers
    assert headers["Content-Type"] == headers["Accept"] == "application/json"


def test_they_may_be_told_who_asks(rooms, cmdb):
    Ours, url = cmdb
    told(rooms, rooms.server(PROJECT), "/openstack/latest/vendor_data2.json", app=vendored(rooms, vendordata_targets={"cmdb": url}, vendordata_token=True))  # fmt: skip
    assert rooms.realm.gate(Ours.seen[0][0]["X-Auth-Token"]).user_name == "kilonova"


@pytest.mark.parametrize(
    ("status", "says"), [(500, b"{}"), (200, b"not json"), (200, b"1" * (1 << 20) + b"1"), (302, b"{}")]
)
def test_what_fails_there_is_empty_here(rooms, cmdb, status, says):
    Ours, url = cmdb
    Ours.status, Ours.says = status, says
    server, path = rooms.server(PROJECT), "/openstack/latest/vendor_data2.json"
    assert json.loads(told(rooms, server, path, app=vendored(rooms, vendordata_targets={"cmdb": url}))) == {"static": {}, "cmdb": {}}  # fmt: skip
    strict = vendored(rooms, vendordata_targets={"cmdb": url}, vendordata_failure_fatal=True)
    assert ask(rooms, path, signed(server.id), app=strict)[0] == 503


def test_the_operators_file_is_read_again_when_it_changes(rooms, tmp_path):
    file = tmp_path / "vendor.json"
    app = vendored(rooms, vendordata_file=file)
    server, path = rooms.server(PROJECT), "/openstack/latest/vendor_data.json"
    assert told(rooms, server, path, app=app) == "{}"
    file.write_text('{"cloud": "ours"}')
    assert json.loads(told(rooms, server, path, app=app)) == {"cloud": "ours"}
    file.write_text("{ broken")
    assert told(rooms, server, path, app=app) == "{}"


# ---- in company


def test_a_password_is_shown_and_cleared_by_the_compute_api(rooms):
    admin = rooms.admin()
    server = rooms.server(rooms.first.admin_project_id)
    path = f"/servers/{server.id}/os-server-password"
    head = signed(server.id, server.project_id)
    assert rooms.call("GET", path, token=admin).json == {"password": ""}
    assert ask(rooms, PASSWORD, head, "POST", b"sealed")[0] == 200
    assert rooms.call("GET", path, token=admin).json == {"password": "sealed"}
    assert rooms.call("DELETE", path, token=admin).status == 204
    assert rooms.call("GET", path, token=admin).json == {"password": ""}
    assert ask(rooms, PASSWORD, head, "POST", b"another")[0] == 200


def test_a_guest_is_told_through_the_proxy(rooms):
    """The network companion's proxy knows the guest by its address, and what the guest says of itself does not count."""
    server, other = rooms.server(PROJECT), rooms.server(PROJECT)
    proxy = MetadataProxy(rooms.metadata, SECRET)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    proxy.know({("net", "127.0.0.1"): Asker(server.id, server.project_id)})
    proxy.serve("net", listener)
    try:
        pretended = signed(other.id, secret="guessed")
        request = Request(f"http://127.0.0.1:{port}/openstack/latest/meta_data.json", headers=pretended)
        assert json.load(urlopen(request))["uuid"] == server.id
        sealed = Request(f"http://127.0.0.1:{port}{PASSWORD}", b"sealed", method="POST")
        assert urlopen(sealed).status == 200
        assert told(rooms, server, PASSWORD) == "sealed"
        with pytest.raises(HTTPError, match="409"):
            urlopen(sealed)
    finally:
        proxy.close()
