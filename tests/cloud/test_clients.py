"""How our services ask their neighbours: inside one process and over HTTP the same, and what a failure becomes."""

import random
import socket
import threading
import uuid

import msgspec
import pytest

from kilonova.clients import Account, Image, Inside, Login, Network, Outside, Session, Volumes, neighbours, plug
from kilonova.companions import network
from kilonova.companions.network import World
from kilonova.kit import log
from kilonova.kit.clock import Ids
from kilonova.kit.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    OverQuota,
    Unavailable,
    Unknown,
    Unsupported,
)
from kilonova.kit.http import Mount, Server, listen
from kilonova.model import options
from tests.cloud.embedded import Embedded


@pytest.fixture(params=["inside", "outside"])
def near(request, tmp_path):
    """All neighbours of a cloud, as its services have them."""
    cloud = Embedded(tmp_path)
    world = World(cloud.db, cloud.clock, Ids(random.Random(1)), options.Network(), wires=None)
    nets = network.make_service(world, cloud.realm.gate)
    network.bootstrap(world, cloud.first.admin_project_id)
    login = Login("kilonova", cloud.first.service_password)
    apps = {"/identity": cloud.identity, "/image": cloud.image, "/network": nets, "/volume": cloud.volume}
    if request.param == "inside":
        carriers = {p[1:]: Inside(app, f"http://cloud.test{p}") for p, app in apps.items()}
        yield cloud, neighbours(cloud.clock, login, **carriers)
        return
    listener = listen("127.0.0.1", 0)
    server = Server(Mount(apps, root=cloud.identity), listener, threads=2)
    server.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    versions = {"/identity": "/v3", "/image": "", "/network": "/v2.0/", "/volume": "/v3"}  # as operators write them
    carriers = {p[1:]: Outside(f"{url}{p}{versions[p]}", timeout_s=10) for p in apps}
    try:
        yield cloud, neighbours(cloud.clock, login, **carriers)
    finally:
        server.stop()


def test_a_port_from_its_making_to_its_end(near):
    cloud, n = near
    project = cloud.first.demo_project_id
    net = n.network.networks(name="private")[0]
    server = str(uuid.uuid4())
    assert n.network.ports(servers=[server]) == [] and n.network.ports(servers=[]) == []
    made = n.network.create_port(net.id, project_id=project, device_id=server, device_owner="compute:nova", name="p")
    assert made.device_id == server and made.project_id == project and made.mac
    assert [p.id for p in n.network.ports(servers=[server])] == [made.id]
    bound = n.network.bind_port(made.id, "host-1", device_id=server, device_owner="compute:nova")
    assert bound.host == "host-1" and bound.vif_type not in ("", "unbound", "binding_failed")
    subnets = n.network.subnets(networks=[net.id])
    nic = plug(bound, net, subnets, n.network.floating_ips(ports=[made.id]))
    assert nic.device == f"tap{made.id[:11]}" and nic.mac == made.mac and nic.network_name == "private"
    assert nic.ips[0].address == made.fixed_ips[0].ip_address and nic.ips[0].prefix == 24 and nic.ips[0].gateway
    n.network.unbind_port(made.id)
    assert n.network.port(made.id).device_id == ""
    assert n.network.security_groups(project_id=project)[0].name == "default"
    for _ in range(2):
        n.network.delete_port(made.id)
    with pytest.raises(NotFound) as e:
        n.network.port(made.id)
    assert e.value.code == "PortNotFound"
    with pytest.raises(NotFound):
        n.network.create_port(str(uuid.uuid4()), project_id=project)
    assert n.network.quota(project)["port"] > 0
    n.network.unbind_port(made.id)  # nothing there: done


def test_ports_of_a_thousand_servers_are_few_questions(near):
    cloud, n = near
    net = n.network.networks(name="private")[0]
    servers = [str(uuid.uuid4()) for _ in range(1000)]
    for s in (servers[0], servers[500], servers[999]):
        n.network.create_port(net.id, project_id=cloud.first.demo_project_id, device_id=s, device_owner="compute:nova")
    sent = []
    carrier = n.network.session.carrier
    send, carrier.send = carrier.send, lambda method, path, *rest: sent.append(path) or send(method, path, *rest)
    assert len(n.network.ports(servers=servers)) == 3
    assert len(sent) == 9 and max(map(len, sent)) < 8000


def test_images_and_tokens(near):
    cloud, n = near
    project = cloud.first.demo_project_id
    image = n.image.create(name="i", disk_format="raw", container_format="bare", owner=project, hw_disk_bus="scsi")
    n.image.upload(image.id, (b"x" * 700_000 for _ in range(3)))
    got = bytearray()
    assert n.image.download(image.id, got.extend) == 2_100_000 == len(got)
    assert n.image.show(image.id).properties == {"hw_disk_bus": "scsi"}
    joe = cloud.person("joe", "member")
    with pytest.raises(NotFound):
        n.image.show(image.id, joe.token)
    with pytest.raises(Unknown):
        n.image.show(image.id, "junk")
    context = n.identity.authenticate(joe.token)
    assert (context.user_id, context.project_id, context.roles) == (joe.id, joe.project_id, {"member", "reader"})
    assert n.identity.project_exists(project) and not n.identity.project_exists("nothing")


def test_a_volume_from_its_making_to_its_end(near):
    """As the compute service does it: made for a user, kept for his server, told to a host, given back."""
    cloud, n = near
    joe, server = cloud.person("joe", "member"), str(uuid.uuid4())
    made = n.volume.create(1, name="data", metadata={"for": server}, token=joe.token)
    assert made.status == "creating" and not made.can_boot
    assert n.volume.show(made.id).project_id == joe.project_id
    seen = n.volume.show(made.id)
    assert (seen.status, seen.size_gb, seen.name, seen.metadata) == ("available", 1, "data", {"for": server})
    assert [v.id for v in n.volume.list(all_projects=True, metadata={"for": server})] == [made.id]
    assert list(n.volume.list()) == [] and list(n.volume.list(all_projects=True, metadata={"for": "x"})) == []
    kept = n.volume.reserve(made.id, server)
    assert (kept.status, kept.server_id, kept.connection_info) == ("reserved", server, None)
    with pytest.raises(Invalid):
        n.volume.reserve(made.id, str(uuid.uuid4()))
    for _ in range(2):
        told = n.volume.connect(kept.id, {"host": "h1", "mountpoint": "/dev/vdb"})
        assert told.connection_info["driver_volume_type"] == "local"
        assert told.connection_info["data"]["format"] == "raw" and "/" not in repr(told)
    for _ in range(2):
        n.volume.complete(kept.id)
    seen = n.volume.show(made.id, joe.token)
    assert seen.status == "in-use" and seen.attachment_of(server).id == kept.id
    assert [a.id for a in n.volume.attachments(server_id=server, volume_id=made.id)] == [kept.id]
    assert list(n.volume.attachments(server_id=str(uuid.uuid4()))) == []
    n.volume.begin_detaching(made.id, joe.token)
    with pytest.raises(Invalid):
        n.volume.begin_detaching(made.id, joe.token)
    n.volume.roll_detaching(made.id)
    with pytest.raises(Invalid):
        n.volume.delete(made.id, joe.token)
    picture = n.volume.create_snapshot(made.id, name="then", token=joe.token)
    assert n.volume.snapshot(picture.id).status == "available"
    assert [s.id for s in n.volume.snapshots(joe.token, volume_id=made.id)] == [picture.id]
    for _ in range(2):
        n.volume.release(kept.id)
        n.volume.delete_snapshot(picture.id, joe.token)
    assert n.volume.show(made.id).status == "available"
    for _ in range(2):
        n.volume.delete(made.id)
    with pytest.raises(NotFound):
        n.volume.show(made.id)
    assert n.volume.zones() == {"nova": True} and n.volume.volume_type("default")["name"] == "__DEFAULT__"


def test_a_users_token_goes_with_ours(near):
    """What a server uses cannot be taken from under it by its owner, but by a service that asks for him."""
    cloud, n = near
    joe = cloud.person("joe", "member")
    made = n.volume.create(1, token=joe.token)
    kept = n.volume.connect(n.volume.reserve(made.id, str(uuid.uuid4()), token=joe.token).id, {"host": "h1"})
    alone = Volumes(Session("block-storage", n.volume.session.carrier, cloud.clock))
    with pytest.raises(Conflict):
        alone.release(kept.id, joe.token)
    n.volume.release(kept.id, joe.token)
    assert n.volume.show(made.id).status == "available"


def test_many_volumes_are_several_pages(near):
    cloud, n = near
    cloud.json(
        "PUT",
        f"/volume/v3/os-quota-sets/{(joe := cloud.person('joe', 'member')).project_id}",
        {"quota_set": {"volumes": -1}},
        cloud.admin(),
    )
    made = [n.volume.create(1, name=f"v{i}", token=joe.token).id for i in range(7)]
    assert [v.id for v in n.volume.list(joe.token, limit=3, sort="name:asc")] == made


def test_a_cloud_without_volumes_says_so(near):
    cloud, n = near
    carriers = {name: getattr(n, name).session.carrier for name in ("identity", "image", "network")}
    without = neighbours(cloud.clock, Login("kilonova", cloud.first.service_password), **carriers)
    with pytest.raises(Unavailable, match="no block-storage service"):
        without.volume.show("x")


def test_our_own_token_is_renewed_when_a_neighbour_refuses_it(near):
    cloud, n = near
    list(n.image.list())
    token = n.image.session.account.present
    cloud.json("DELETE", "/identity/v3/auth/tokens", token=cloud.admin(), ok=204, X_Subject_Token=token)
    assert list(n.image.list()) == []
    assert n.image.session.account.present != token


# ---- neighbours that fail


class Ill:
    """A neighbour with one answer for everything, and a note of what it was asked."""

    def __init__(self, status="200 OK", body=b"{}", kind="application/json", **headers):
        self.status, self.body, self.asked = status, body, []
        self.headers = [("Content-Type", kind), *headers.items()]

    def __call__(self, environ, start_response):
        self.asked.append(environ)
        start_response(self.status, self.headers)
        return [self.body]


class Hand:
    at = 0.0

    def now(self):
        return self.at

    def sleep(self, seconds):
        self.at += seconds


def session(app):
    return Session("image", Inside(app, "http://x/image"), Hand())


CASES = [
    ("400 Bad Request", b'{"badRequest": {"code": 400, "message": "no"}}', Invalid, "no", "badRequest"),
    ("403 Forbidden", b'{"error": {"code": 403, "message": "no", "title": "Forbidden"}}', Forbidden, "no", ""),
    ("404 Not Found", b"<html><head><title>404</title></head><body>gone &amp; away</body></html>", NotFound, None, ""),
    ("409 Conflict", b'{"NeutronError": {"type": "IpAddressInUse", "message": "no", "detail": ""}}', Conflict, "no", "IpAddressInUse"),
    ("409 Conflict", b'{"NeutronError": {"type": "OverQuota", "message": "full", "detail": ""}}', OverQuota, "full", "OverQuota"),
    ("413 Too Large", b'{"overLimit": {"message": "much"}}', OverQuota, "much", "overLimit"),
    ("415 Unsupported Media Type", b"", Invalid, None, ""),
    ("501 Not Implemented", b"", Unsupported, None, ""),
    ("500 Internal Server Error", b"Traceback", Unavailable, "The image service is not available.", ""),
    ("503 Service Unavailable", b"", Unavailable, "The image service is not available.", ""),
    ("429 Too Many Requests", b"", Unavailable, "The image service is not available.", ""),
    ("200 OK", b"not json", Unavailable, "The image service gave an answer that makes no sense.", ""),
    ("200 OK", b'{"id": 7}', Unavailable, "The image service gave an answer that makes no sense.", ""),
    ("302 Found", b"", Unavailable, "The image service is not available.", ""),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "kind", "said", "code"), CASES, ids=lambda x: str(x)[:30])
def test_what_a_failure_becomes(status, body, kind, said, code):
    with pytest.raises(kind) as e:
        Image(session(Ill(status, body))).show("x", "token")
    assert type(e.value) is kind and e.value.code == code
    assert said is None or e.value.said == said
    assert "Traceback" not in e.value.said


def test_only_questions_are_repeated():
    ill = Ill("503 Service Unavailable")
    s = session(ill)
    with pytest.raises(Unavailable):
        Image(s).show("x", "token")
    assert len(ill.asked) == 3 and s.clock.at == pytest.approx(1.2)
    ill.asked.clear()
    with pytest.raises(Unavailable):
        Image(s).create("token", name="x")
    assert len(ill.asked) == 1


def test_a_request_keeps_its_name_on_its_way():
    ill = Ill(body=b'{"images": []}')
    with log.about(request_id="req-1"):
        list(Image(session(ill)).list("token", name=["a", "b"], limit=None))
    assert ill.asked[0]["HTTP_X_OPENSTACK_REQUEST_ID"] == "req-1"
    assert ill.asked[0]["QUERY_STRING"] == "name=a&name=b"
    with log.about(request_id="req-1", global_request_id="req-2"):
        list(Image(session(ill)).list("token"))
    assert ill.asked[1]["HTTP_X_OPENSTACK_REQUEST_ID"] == "req-2"


@pytest.mark.parametrize("id", ["../../v3/users", "a/b", "a?b=c", "a#b", "%2e%2e", "..", ""])
def test_an_id_cannot_become_a_path(id):
    ill = Ill("404 Not Found")
    with pytest.raises(NotFound):
        Network(session(ill)).port(id, "token")
    assert ill.asked[0]["PATH_INFO"] == f"/v2.0/ports/{id or '-'}" and ill.asked[0]["QUERY_STRING"] == ""


def test_bytes_that_arrive_damaged_or_cut_are_noticed():
    for ill in (
        Ill(body=b"abc", **{"Content-MD5": "0" * 32}),
        Ill(body=b"abc", **{"Content-Length": "5"}),
    ):
        with pytest.raises(Unavailable):
            Image(session(ill)).download("x", lambda chunk: None, "token")


def test_pages_are_followed():
    pages = {
        "device_id=s": {"ports": [port("a")], "ports_links": [{"rel": "next", "href": "http://y/v2.0/ports?marker=a"}]},
        "marker=a": {"ports": [port("b")]},
    }

    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", "application/json")])
        return [msgspec.json.encode(pages[environ["QUERY_STRING"]])]

    assert [p.id for p in Network(session(app)).ports(servers=["s"], token="t")] == ["a", "b"]


def port(id):
    return {"id": id, "network_id": "n", "mac_address": "m", "binding:vif_details": None, "dns_name": None, "new": 1}


def test_nobody_is_there():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
        nobody = Session("image", Outside(url, timeout_s=1), Hand())
        with pytest.raises(Unavailable):
            Image(nobody).show("x", "token")
    with pytest.raises(Unavailable):
        Account(Outside(url, timeout_s=1), Login("u", "p"), Hand()).token()


def test_who_does_not_answer_in_time_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as s:
        silent = Session("image", Outside(f"http://127.0.0.1:{s.getsockname()[1]}", timeout_s=0.2), Hand())
        with pytest.raises(Unavailable):
            Image(silent).show("x", "token")


def test_who_breaks_off_in_the_middle():
    with socket.create_server(("127.0.0.1", 0)) as s:

        def answer():
            c, _ = s.accept()
            with c:
                c.recv(65536)
                c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")

        thread = threading.Thread(target=answer)
        thread.start()
        images = Image(Session("image", Outside(f"http://127.0.0.1:{s.getsockname()[1]}", timeout_s=5), Hand()))
        with pytest.raises(Unavailable):
            images.download("x", lambda chunk: None, "token")
        thread.join()
