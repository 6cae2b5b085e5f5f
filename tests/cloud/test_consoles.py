"""From a token to a login prompt: the API gives the address, the proxy lets in who has it, and nobody else."""

import contextlib
import http.client
import socket
import ssl
import struct
import threading
import time
import urllib.parse

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from kilonova.cli.certificates import own
from kilonova.compute.relay import Relay
from kilonova.console.proxy import Proxy, token_of
from kilonova.kit.http import listen
from kilonova.model import options
from kilonova.model.console import Where
from kilonova.model.options import Config
from kilonova.store import consoles, servers
from kilonova.virt.sim_console import HEIGHT, WIDTH
from tests.cloud import tables
from tests.cloud.tables import disagreements, said
from tests.stories import telling


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c
        c.hosts.close()


@contextlib.contextmanager
def proxied(cloud, hosts_ca_file=None, **how):
    listener = listen("127.0.0.1", 0)
    said = options.Console(**how)
    proxy = Proxy(cloud.db, listener, clock=cloud.clock, options=said, hosts_ca_file=hosts_ca_file)
    proxy.start()
    try:
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        proxy.stop()


def opened(cloud, server, type="serial", protocol="", ok=200, version="2.99"):
    wish = {"protocol": protocol or {"novnc": "vnc", "serial": "serial"}[type], "type": type}
    path = f"/servers/{server.id}/remote-consoles"
    return cloud.json("POST", path, {"remote_console": wish}, ok=ok, version=version)


def token(cloud, server, type="serial"):
    return token_of(opened(cloud, server, type)["remote_console"]["url"])


def read_until(ws, wanted):
    text = b""
    while wanted not in text:
        text += ws.recv(timeout=10)
    return text


def refused(url, **how):
    with pytest.raises(InvalidStatus) as told, connect(url, **how):
        pass
    return told.value.response.status_code


# ---- the API


def test_addresses_are_those_that_clients_expect(cloud):
    s = cloud.boot("one")
    url = opened(cloud, s, "novnc")["remote_console"]["url"]
    assert url == f"http://127.0.0.1:6080/vnc_auto.html?path=%3Ftoken%3D{token_of(url)}"
    assert opened(cloud, s)["remote_console"]["url"].startswith("ws://127.0.0.1:6080/?token=")
    old = s.act("os-getVNCConsole", {"type": "novnc"}, ok=404)
    old = cloud.json("POST", f"/servers/{s.id}/action", {"os-getVNCConsole": {"type": "novnc"}}, version="2.1")
    assert old["console"]["type"] == "novnc" and token_of(old["console"]["url"])
    old = cloud.json("POST", f"/servers/{s.id}/action", {"os-getSerialConsole": {"type": "serial"}}, version="2.5")
    assert old["console"]["url"].startswith("ws://")


@pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")
def test_answers_are_those_of_the_specification(cloud):
    s = cloud.boot("one")
    (create,), (show,) = tables.group("remote-consoles"), tables.group("os-console-auth-tokens")
    for v in (6, 7, 8, 98, 99):
        answer = opened(cloud, s, "novnc", version=f"2.{v}")
        assert disagreements(said(create, "response", v), answer) == [], f"2.{v}"
        if v >= 31:
            path = f"/os-console-auth-tokens/{token_of(answer['remote_console']['url'])}"
            answer = cloud.json("GET", path, token=cloud.admin, version=f"2.{v}")
            assert disagreements(said(show, "response", v), answer) == [], f"2.{v}"
            assert answer["console"]["instance_uuid"] == s.id and answer["console"]["port"] > 0
            cloud.json("GET", path, ok=403)
            cloud.json("GET", path, token=cloud.admin, version="2.30", ok=400)
    cloud.json("GET", "/os-console-auth-tokens/nonsense", token=cloud.admin, ok=404)


def test_consoles_that_there_are_not(cloud):
    s = cloud.boot("one")
    for type, protocol in (("spice-html5", "spice"), ("spice-direct", "spice"), ("rdp-html5", "rdp"), ("webmks", "mks"),
                           ("xvpvnc", "vnc"), ("novnc", "serial"), ("serial", "vnc")):  # fmt: skip
        opened(cloud, s, type, protocol, ok=400)
    cloud.json("POST", f"/servers/{s.id}/action", {"os-getRDPConsole": {"type": "rdp-html5"}}, version="2.1", ok=400)
    cloud.json(
        "POST", f"/servers/{s.id}/action", {"os-getSPICEConsole": {"type": "spice-html5"}}, version="2.1", ok=400
    )
    cloud.json("POST", f"/servers/{s.id}/action", {"os-getVNCConsole": {"type": "xvpvnc"}}, version="2.1", ok=400)
    stranger = cloud.services.person("sam", "member").token
    path, body = f"/servers/{s.id}/remote-consoles", {"remote_console": {"protocol": "vnc", "type": "novnc"}}
    cloud.json("POST", path, body, token=stranger, ok=404)
    s.act("os-stop")
    opened(cloud, s, ok=409)
    building = cloud.boot("two", settle=False)
    opened(cloud, building, ok=409)


def test_an_operator_may_have_his_own_addresses_and_kinds(tmp_path):
    said = options.Console(types=("novnc",), vnc_base_url="https://c.example.org/novnc/vnc.html")
    with telling(tmp_path, config=Config(console=said)) as cloud:
        s = cloud.boot("one")
        opened(cloud, s, "serial", ok=400)
        assert opened(cloud, s, "novnc")["remote_console"]["url"].startswith(
            "https://c.example.org/novnc/vnc.html?path=%3F"
        )
        cloud.hosts.close()


def test_a_token_is_kept_as_its_hash_and_not_for_ever(cloud):
    s = cloud.boot("one")
    key = token(cloud, s)
    with cloud.db.read() as tx:
        rows = [str(tuple(r)) for r in tx.execute(consoles.T.select())]
    assert len(rows) == 1 and key not in rows[0]
    cloud.clock.sleep(601)
    with pytest.raises(consoles.NotFound), cloud.db.read() as tx:
        consoles.granted(tx, key, cloud.clock.now())
    token(cloud, s)
    with cloud.db.read() as tx:
        assert len(tx.execute(consoles.T.select()).all()) == 1  # the old one is forgotten


def test_a_token_ends_with_its_server_and_with_its_move(cloud):
    s = cloud.boot("one")
    key = token(cloud, s)
    granted = lambda: cloud.db.look(consoles.granted, key, cloud.clock.now())
    assert granted().server == s.id
    with cloud.db.tx() as tx:
        servers.change(tx, s.id, None, epoch=s.row.epoch + 1)
    with pytest.raises(consoles.NotFound):
        granted()
    with cloud.db.tx() as tx:
        servers.change(tx, s.id, None, epoch=s.row.epoch - 1)
    assert granted()
    s.delete()
    with pytest.raises(consoles.NotFound):
        granted()


def test_a_token_in_a_path_is_in_no_log(cloud, caplog, monkeypatch):
    s = cloud.boot("one")
    key = token(cloud, s)
    monkeypatch.setattr(consoles, "granted", lambda *_: 1 / 0)  # whatever nobody expects
    cloud.json("GET", f"/os-console-auth-tokens/{key}", token=cloud.admin, ok=500)
    assert "failed" in caplog.text and key not in caplog.text


# ---- the proxy


def test_from_a_token_to_a_login_prompt(cloud):
    s = cloud.boot("one")
    with proxied(cloud) as url, connect(f"{url}/?token={token(cloud, s)}") as ws:
        assert b"one login: " in read_until(ws, b"login: ")
        ws.send("root\r")
        assert b"root\r\nPassword: " in read_until(ws, b"Password: ")
        ws.send(b"guess\r")
        read_until(ws, b"Login incorrect")
        s.act("os-stop")  # the line is cut
        with pytest.raises(ConnectionClosed):
            while True:
                ws.recv(timeout=10)


def test_a_screen_is_seen(cloud):
    """RFB, as noVNC speaks it; the path is what noVNC makes of the address that it was given."""
    s = cloud.boot("one")
    page = urllib.parse.urlsplit(opened(cloud, s, "novnc")["remote_console"]["url"])
    path = urllib.parse.parse_qs(page.query)["path"][0]
    with proxied(cloud) as url, connect(f"{url}/{path}", subprotocols=["binary"]) as ws:
        assert ws.subprotocol == "binary"
        assert ws.recv(timeout=10) == b"RFB 003.008\n"
        ws.send(b"RFB 003.008\n")
        assert read_until(ws, b"\x01\x01") == b"\x01\x01"
        ws.send(b"\x01")
        read_until(ws, bytes(4))
        ws.send(b"\x01")
        assert struct.unpack(">HH", read_until(ws, b"one")[:4]) == (WIDTH, HEIGHT)
        ws.send(struct.pack(">BBHHHH", 3, 0, 0, 0, WIDTH, HEIGHT))
        seen = b""
        while len(seen) < 16 + 4 * WIDTH * HEIGHT:
            seen += ws.recv(timeout=10)


def test_a_browser_is_given_the_viewer_and_nothing_else(cloud, tmp_path):
    (tmp_path / "novnc").mkdir()
    (tmp_path / "novnc/vnc_auto.html").write_text("<html>noVNC</html>")
    (tmp_path / "novnc/app.js").write_text("let a")
    (tmp_path / "secret").write_text("not for you")
    with proxied(cloud, viewer=tmp_path / "novnc") as url:

        def asked(path):
            plain = http.client.HTTPConnection(url.removeprefix("ws://"))
            plain.request("GET", path)
            answer = plain.getresponse()
            return answer.status, answer.headers["Content-Type"], answer.read()

        assert asked("/vnc_auto.html?path=%3Ftoken%3Dx") == (200, "text/html", b"<html>noVNC</html>")
        assert asked("/app.js")[:2] == (200, "text/javascript")
        for bad in ("/", "/nothing", "/../secret", "/%2e%2e/secret", "/app.js/x", "/%00", "//etc/passwd"):
            assert asked(bad)[0] == 404


def test_who_is_not_let_in(cloud, tmp_path):
    s = cloud.boot("one")
    key = token(cloud, s)
    with proxied(cloud, connections_max=1, viewer=tmp_path / "none") as url:
        for bad in ("", "?token=", "?token=nonsense", f"?key={key}", "?token=%00", "?path=%3Ftoken%3Dx"):
            assert refused(f"{url}/{bad}") == 403
        assert refused(f"{url}/?token={key}", origin="https://elsewhere.example.org") == 403
        with connect(f"{url}/?token={key}", origin="http://127.0.0.1:9999") as ws:
            read_until(ws, b"login: ")
            assert refused(f"{url}/?token={key}") == 503
        plain = http.client.HTTPConnection(url.removeprefix("ws://"))
        plain.request("GET", f"/vnc_auto.html?token={key}")
        answer = plain.getresponse()
        assert answer.status == 503 and b"novnc" in answer.read()
        plain.close()
        cloud.clock.sleep(601)
        assert refused(f"{url}/?token={key}") == 403
    with (
        proxied(cloud, allowed_origins=("elsewhere.example.org",)) as url,
        connect(f"{url}/?token={token(cloud, s)}", origin="https://elsewhere.example.org") as ws,
    ):
        read_until(ws, b"login: ")


def test_a_console_that_does_not_answer(cloud):
    s = cloud.boot("one")
    key = token(cloud, s)
    cloud.hosts.close()
    with proxied(cloud) as url, connect(f"{url}/?token={key}") as ws, pytest.raises(ConnectionClosed) as told:
        ws.recv(timeout=20)
    assert told.value.rcvd.code == 1014


@pytest.fixture
def door(cloud, tmp_path):
    """A host's door to a console that says again what it hears, behind TLS; and whom proxies must trust."""
    identity, ca = own(tmp_path / "tls", ["127.0.0.1"], time.time())
    inner = socket.socket(socket.AF_UNIX)
    inner.bind(str(tmp_path / "console"))
    inner.listen()

    def again():
        with contextlib.suppress(OSError):
            while True:
                came, _ = inner.accept()
                with came:
                    while piece := came.recv(100):
                        came.sendall(piece)

    threading.Thread(target=again, daemon=True).start()
    relay = Relay("127.0.0.1", clock=cloud.clock, ids=cloud.ids, lasts_s=600, tls=identity.context())
    yield relay, Where(path=str(tmp_path / "console")), ca
    relay.close()
    inner.shutdown(socket.SHUT_RDWR)
    inner.close()


def test_the_door_of_a_host_is_behind_tls(cloud, door, tmp_path):
    relay, console, ca = door
    _, other = own(tmp_path / "other", ["127.0.0.1"], time.time())
    s, at = cloud.boot("one"), relay.door(console)
    assert (at.tls, at.path, at.port) == (True, "", relay.port)
    with cloud.db.tx() as tx:
        consoles.grant(tx, "a-token", s.row, "serial", at, now=cloud.clock.now(), lasts_s=600)
    with proxied(cloud, ca) as url, connect(f"{url}/?token=a-token") as ws:
        ws.send(b"hello")
        assert read_until(ws, b"hello") == b"hello"
    with proxied(cloud, other) as url, connect(f"{url}/?token=a-token") as ws, pytest.raises(ConnectionClosed) as told:
        ws.recv(timeout=20)
    assert told.value.rcvd.code == 1014, "a host of another authority is none"
    with socket.create_connection((at.host, at.port), 10) as plain:
        plain.sendall(at.key.encode() + b"\nhello")
        with contextlib.suppress(ConnectionResetError):
            assert b"hello" not in plain.recv(100)
    trusting = ssl.create_default_context(cafile=str(ca))
    for key in (b"x" * 64, b"\xff" * 4000):
        raw = socket.create_connection((at.host, at.port), 10)
        with trusting.wrap_socket(raw, server_hostname="127.0.0.1") as wrong, contextlib.suppress(OSError):
            wrong.sendall(key + b"\nhello")
            assert wrong.recv(100) == b""


def test_who_looks_on_is_told_that_the_proxy_ends_and_comes_again(cloud):
    key = token(cloud, cloud.boot("one"))
    with proxied(cloud) as url:
        ws = connect(f"{url}/?token={key}", legacy=True)
        read_until(ws, b"login: ")
    with pytest.raises(ConnectionClosed) as told:
        while True:
            ws.recv(timeout=10)
    assert told.value.rcvd.code == 1001, "it goes away; the console does not"
    with proxied(cloud) as url, connect(f"{url}/?token={key}") as ws:
        read_until(ws, b"login: ")


def test_rubbish_does_not_end_the_proxy(cloud, caplog):
    s = cloud.boot("one")
    with proxied(cloud) as url:
        at = url.removeprefix("ws://").split(":")
        for rubbish in (b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n", b"A" * 100_000 + b"\r\n\r\n", b""):
            with contextlib.suppress(OSError), socket.create_connection((at[0], int(at[1])), timeout=5) as raw:
                raw.sendall(rubbish)
                raw.recv(100)
        key = token(cloud, s)
        with connect(f"{url}/?token={key}") as ws:
            read_until(ws, b"login: ")
    assert key not in caplog.text


def test_a_serial_line_answers_where_its_server_has_gone(cloud):
    """What is typed comes back, before a live migration and after it, beside another server on the host that it goes to."""
    one = cloud.boot("one")
    two = next(s for s in (cloud.boot(f"two{n}") for n in range(4)) if s.row.host != one.row.host)
    there = two.row.host
    move = {"os-migrateLive": {"host": there, "block_migration": "auto"}}
    for moved in (False, True):
        if moved:
            cloud.json("POST", f"/servers/{one.id}/action", move, ok=202, token=cloud.admin)
            cloud.settle()
            assert one.row.host == there
        for s in (one, two):
            with proxied(cloud) as url, connect(f"{url}/?token={token(cloud, s)}") as ws:
                read_until(ws, b"login: ")
                ws.send(b"hello")
                read_until(ws, b"hello")
