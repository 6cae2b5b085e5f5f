"""Watching: what happens to one's own servers comes by itself, in order, and nothing is missed by who comes again."""

import contextlib
import http.client
import socket
import time

import msgspec
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from kilonova.console.proxy import Proxy
from kilonova.console.watch import Tail
from kilonova.kit.http import listen
from kilonova.model import options
from kilonova.store import changes
from tests.cloud.test_consoles import read_until, token
from tests.stories import telling


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        c.listener = listen("127.0.0.1", 0)
        tail = Tail(c.db, c.clock, c.services.realm.gate, c.api.policy.allows, most=5)
        c.proxy = Proxy(c.db, c.listener, clock=c.clock, options=options.Console(), tail=tail)
        c.proxy.start()
        yield c
        c.proxy.stop()
        c.hosts.close()


class Stream:
    """One who watches."""

    def __init__(self, cloud, key, since=None, path="/watch"):
        host, port = cloud.listener.getsockname()[:2]
        self.http = http.client.HTTPConnection(host, port, timeout=20)
        headers = {"X-Auth-Token": key} | ({} if since is None else {"Last-Event-ID": since})
        self.http.request("GET", path, headers=headers)
        self.answer = self.http.getresponse()
        if self.answer.status == 200:
            assert self.answer.getheader("Content-Type") == "text/event-stream"
            self.line()
            self.line()

    def line(self):
        return self.answer.readline().decode().rstrip("\n")

    def next(self):
        """(cursor, kind, data)"""
        said = {}
        while line := self.line():
            if not line.startswith(":"):
                name, _, value = line.partition(": ")
                said[name] = value
        return (said["id"], said["event"], msgspec.json.decode(said["data"])) if said else self.next()

    def until(self, kind, **wanted):
        found = [self.next()]
        while not (found[-1][1] == kind and all(found[-1][2].get(k) == v for k, v in wanted.items())):
            found.append(self.next())
        return found

    def close(self):
        self.answer.close()
        self.http.close()


@contextlib.contextmanager
def watching(*args, **how):
    stream = Stream(*args, **how)
    try:
        yield stream
    finally:
        stream.close()


def test_what_happens_comes_by_itself(cloud):
    with watching(cloud, cloud.user.token) as mine:
        s = cloud.boot("one")
        told = mine.until("action", phase="end", action="create")
        assert ("action", "create", "start") in [(k, d.get("action"), d.get("phase")) for _, k, d in told]
        assert {d["server"] for _, _, d in told} == {s.id}
        s.act("os-stop")
        told = mine.until("action", phase="end", action="stop")
        assert "SHUTOFF" in [d.get("status") for _, k, d in told if k == "server"]
        cloud.boot("too-large", flavor="huge")
        (*_, last) = mine.until("action", phase="error")
        assert last[2]["message"].startswith("No valid host")


def test_others_see_theirs_only(cloud):
    sam = cloud.services.person("sam", "member").token
    with (
        watching(cloud, sam) as other,
        watching(cloud, cloud.admin, path="/watch?all_tenants=1") as all,
    ):
        s = cloud.boot("one")
        assert all.until("action", phase="end")[-1][2]["server"] == s.id
        wish = {"name": "sams", "flavorRef": "small", "imageRef": cloud.image_id, "networks": "none"}
        own = cloud.json("POST", "/servers", {"server": wish}, token=sam, ok=202)["server"]["id"]
        cloud.settle()
        assert {d["server"] for _, _, d in other.until("action", phase="end")} == {own}


def test_who_comes_again_misses_nothing(cloud):
    with watching(cloud, cloud.user.token) as mine:
        s = cloud.boot("one")
        cursor = mine.until("action", phase="end")[-1][0]
    s.act("pause")
    s.act("unpause")
    with watching(cloud, cloud.user.token, since=cursor) as again:
        told = [
            (d.get("action"), d.get("phase"))
            for _, k, d in again.until("action", action="unpause", phase="end")
            if k == "action"
        ]
    assert [t for t in told if t[0] != "create"] == [
        ("pause", "start"),
        ("pause", "end"),
        ("unpause", "start"),
        ("unpause", "end"),
    ]


def test_who_is_not_let_in(cloud):
    for key, path, status in (("", "/watch", 401), ("nonsense", "/watch", 401), (cloud.user.token, "/watch?all_tenants=1", 403),
                              (cloud.user.token, "/watch?since=yesterday", 400), (cloud.user.token, "/other", 404)):  # fmt: skip
        with watching(cloud, key, path=path) as stream:
            assert stream.answer.status == status, path
    crowd = [Stream(cloud, cloud.user.token) for _ in range(5)]
    with watching(cloud, cloud.user.token) as one_more:
        assert one_more.answer.status == 503
    for stream in crowd:
        stream.close()


# ---- over a websocket


def address(cloud, path="/watch"):
    host, port = cloud.listener.getsockname()[:2]
    return f"ws://{host}:{port}{path}"


def until(ws, kind, **wanted):
    found = []
    while not (found and found[-1]["event"] == kind and wanted.items() <= found[-1]["data"].items()):
        found.append(msgspec.json.decode(ws.recv(timeout=20)))
    return found


def test_a_websocket_is_told_the_same(cloud):
    with (
        connect(address(cloud), additional_headers={"X-Auth-Token": cloud.user.token}) as ws,
        watching(cloud, cloud.user.token) as mine,
    ):
        s = cloud.boot("one")
        told = until(ws, "action", phase="end", action="create")
        assert [(m["id"], m["event"], m["data"]) for m in told] == mine.until("action", phase="end", action="create")
        assert {m["data"]["server"] for m in told} == {s.id}
        cursor = told[-1]["id"]
    s.act("pause")
    with connect(address(cloud)) as again:
        again.send(msgspec.json.encode({"token": cloud.user.token, "since": cursor}).decode())
        told = until(again, "action", action="pause", phase="end")
        again.send("what he says later is of no interest")
        s.act("unpause")
        until(again, "action", action="unpause", phase="end")
    assert ("pause", "start") in [(m["data"].get("action"), m["data"].get("phase")) for m in told]


def test_who_may_not_watch_has_no_websocket(cloud):
    for key, path, status in ((b"nonsense", "/watch", 401), (cloud.user.token, "/watch?all_tenants=1", 403),
                              (cloud.user.token, "/watch?since=yesterday", 400)):  # fmt: skip
        key = key.decode() if isinstance(key, bytes) else key
        with (
            pytest.raises(InvalidStatus) as told,
            connect(address(cloud, path), additional_headers={"X-Auth-Token": key}),
        ):
            pass
        assert told.value.response.status_code == status
    with pytest.raises(InvalidStatus), connect(address(cloud), origin="http://elsewhere.example"):
        pass
    for said in ("nonsense", '{"token": "nonsense"}', '{"token": ""}', b"\xff", '{"token": 1}'):
        with connect(address(cloud)) as ws:
            ws.send(said)
            with pytest.raises(ConnectionClosed) as end:
                ws.recv(timeout=20)
        assert end.value.rcvd.code == 1008
    key = {"X-Auth-Token": cloud.user.token}
    with contextlib.ExitStack() as crowd:
        for _ in range(5):
            crowd.enter_context(connect(address(cloud), additional_headers=key))
        with pytest.raises(InvalidStatus) as told, connect(address(cloud), additional_headers=key):
            pass
    assert told.value.response.status_code == 503


def test_consoles_are_at_the_same_door(cloud):
    s = cloud.boot("one")
    host, port = cloud.listener.getsockname()[:2]
    with connect(f"ws://{host}:{port}/?token={token(cloud, s)}") as ws:
        read_until(ws, b"login: ")
    for rubbish in (b"GET /watch HTTP/1.1\r\nX-Auth", b"\x00" * 20_000, b""):
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5) as raw:
            raw.sendall(rubbish)


def test_long_absence_is_read_page_by_page(cloud, monkeypatch):
    monkeypatch.setattr(changes, "MOST", 3)
    cursor = f"{cloud.clock.now():.6f}"
    for name in "abcd":
        cloud.boot(name)
    with watching(cloud, cloud.user.token, since=cursor) as mine:
        ends = [
            d["server"] for n in range(4) for _, k, d in mine.until("action", phase="end") if d.get("phase") == "end"
        ]
    assert len(set(ends)) == 4


def test_nobody_reads_while_nobody_watches(cloud):
    with watching(cloud, cloud.user.token):
        pass
    end = time.monotonic() + 60
    tail = cloud.proxy.tail  # he may be welcomed, and gone, before anybody began to read
    while tail.reading is None or not tail.reading.done() or tail.serving:
        assert time.monotonic() < end
        time.sleep(0.05)
    before = cloud.db.statements
    time.sleep(1.2)
    assert cloud.db.statements == before


def test_pages_are_looked_into_by_indexes(cloud):
    """However many servers there are: what changed since a moment is a range of an index."""
    cloud.boot("one")
    with cloud.db.read() as tx:
        before = cloud.db.statements
        found, more = changes.since(tx, 0.0, cloud.user.project_id)
        assert found and not more
        assert cloud.db.statements - before == 3
        plan = str(
            tx.exec_driver_sql(
                "EXPLAIN QUERY PLAN SELECT id FROM servers WHERE updated_at >= 1 ORDER BY updated_at"
            ).all()
        )
        assert "servers_changed" in plan
