"""Images: bytes go in whole or not at all, come out as they went in, and are what they were declared to be."""

import hashlib
import io
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time

import msgspec
import pytest

from kilonova.clients import Account, Image, Login, Session
from kilonova.companions import image as companion
from kilonova.kit.clock import WallClock
from kilonova.kit.errors import NotFound
from kilonova.model import options
from tests.cloud.embedded import ADMIN, Embedded, driven_with_junk

V2 = "/image/v2"
OCTETS = {"Content_Type": "application/octet-stream"}
PATCH = {"Content_Type": "application/openstack-images-v2.1-json-patch"}


@pytest.fixture
def cloud(tmp_path):
    return Embedded(tmp_path)


@pytest.fixture
def joe(cloud):
    return cloud.person("joe", "member")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """One cloud for many small questions, each about an image of its own."""
    return Embedded(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def jill(shop):
    return shop.person("jill", "member")


def created(cloud, token, **wish):
    wish = {"name": "x", "disk_format": "raw", "container_format": "bare", **wish}
    return cloud.json("POST", f"{V2}/images", wish, token, ok=201)


def uploaded(cloud, token, data, **wish):
    image = created(cloud, token, **wish)
    cloud.json("PUT", f"{V2}/images/{image['id']}/file", data, token, ok=204, **OCTETS)
    return cloud.json("GET", f"{V2}/images/{image['id']}", token=token)


def files(cloud, id=""):
    return sorted(f.name for f in (cloud.directory / "images").rglob(f"{id}*") if f.is_file())


# ---- in and out


def test_discovery(cloud):
    root = cloud.ask("GET", "/image/")
    assert root.status == 300
    newest = msgspec.json.decode(root.read())["versions"][0]
    assert newest["status"] == "CURRENT" and newest["links"][0]["href"] == "http://cloud.test/image/v2/"


def test_what_goes_in_comes_out(cloud, joe):
    data = os.urandom(3_000_001)
    image = created(cloud, joe.token, name="three megabytes", hw_disk_bus="virtio", tags=["b", "a", "a"])
    assert image["status"] == "queued" and image["size"] is None and image["tags"] == ["a", "b"]
    assert image["hw_disk_bus"] == "virtio" and image["owner"] == joe.project_id and image["visibility"] == "shared"
    path = f"{V2}/images/{image['id']}"
    assert cloud.ask("GET", f"{path}/file", token=joe.token).status == 204
    chunks = (data[n : n + 100_000] for n in range(0, len(data), 100_000))
    cloud.json("PUT", f"{path}/file", chunks, joe.token, ok=204, **OCTETS)
    image = cloud.json("GET", path, token=joe.token)
    assert image["status"] == "active" and image["size"] == image["virtual_size"] == len(data)
    assert image["checksum"] == hashlib.md5(data).hexdigest()
    assert (image["os_hash_algo"], image["os_hash_value"]) == ("sha512", hashlib.sha512(data).hexdigest())
    answer = cloud.ask("GET", f"{path}/file", token=joe.token)
    assert answer.headers["content-md5"] == image["checksum"]
    assert answer.headers["content-length"] == str(len(data))
    assert answer.read() == data
    cloud.refused(409, "PUT", f"{path}/file", b"again", joe.token, **OCTETS)
    cloud.json("DELETE", path, token=joe.token, ok=204)
    cloud.refused(404, "GET", path, token=joe.token)
    assert files(cloud) == []


@pytest.mark.parametrize(
    ("asked", "status", "first", "last"),
    [
        ("bytes=0-9", 206, 0, 9),
        ("bytes=990-", 206, 990, 999),
        ("bytes=-10", 206, 990, 999),
        ("bytes=5-100000", 206, 5, 999),
        ("bytes=1000-", 416, 0, 0),
        ("bytes=9-2", 416, 0, 0),
        ("bytes=-", 416, 0, 0),
        ("lines=1-2", 416, 0, 0),
    ],
)
def test_a_part_of_it(shop, jill, asked, status, first, last):
    data = os.urandom(1000)
    image = uploaded(shop, jill.token, data)
    answer = shop.ask("GET", image["file"].replace("/v2", V2), token=jill.token, Range=asked)
    assert answer.status == status
    if status == 206:
        assert answer.headers["content-range"] == f"bytes {first}-{last}/1000"
        assert answer.read() == data[first : last + 1]


def test_who_reads_it_reads_it_to_the_end_though_it_is_deleted(cloud, joe):
    data = os.urandom(3 << 20)
    image = uploaded(cloud, joe.token, data)
    answer = cloud.ask("GET", f"{V2}/images/{image['id']}/file", token=joe.token)
    got = next(answer.chunks)
    cloud.json("DELETE", f"{V2}/images/{image['id']}", token=joe.token, ok=204)
    assert got + answer.read() == data
    assert files(cloud) == []


def test_it_is_deleted_while_it_comes(cloud, joe):
    image = created(cloud, joe.token)

    def chunks():
        yield b"a" * 100_000
        assert cloud.json("GET", f"{V2}/images/{image['id']}", token=joe.token)["status"] == "saving"
        cloud.json("DELETE", f"{V2}/images/{image['id']}", token=joe.token, ok=204)
        yield b"b" * 100_000

    cloud.refused(410, "PUT", f"{V2}/images/{image['id']}/file", chunks(), joe.token, **OCTETS)
    assert files(cloud) == []


def test_two_bring_bytes_for_one_image(cloud, joe):
    image = created(cloud, joe.token)
    path = f"{V2}/images/{image['id']}/file"

    def chunks():
        yield b"a" * 1000
        cloud.refused(409, "PUT", path, b"other", joe.token, **OCTETS)
        yield b"b" * 1000

    cloud.json("PUT", path, chunks(), joe.token, ok=204, **OCTETS)
    assert cloud.ask("GET", path, token=joe.token).read() == b"a" * 1000 + b"b" * 1000


def test_staged_and_then_imported(cloud, joe):
    data = os.urandom(200_000)
    image = created(cloud, joe.token)
    path = f"{V2}/images/{image['id']}"
    wish = {"method": {"name": "glance-direct"}}
    cloud.refused(409, "POST", f"{path}/import", wish, joe.token)
    cloud.json("PUT", f"{path}/stage", data, joe.token, ok=204, **OCTETS)
    assert cloud.json("GET", path, token=joe.token)["status"] == "uploading"
    assert cloud.ask("GET", f"{path}/file", token=joe.token).status == 204
    cloud.refused(400, "POST", f"{path}/import", {"method": {"name": "web-download"}}, joe.token)
    cloud.json("POST", f"{path}/import", wish, joe.token, ok=202)
    assert cloud.json("GET", path, token=joe.token)["checksum"] == hashlib.md5(data).hexdigest()
    assert files(cloud) == [image["id"]]


# ---- bytes that lie


def qcow2(backing=0, features=0, size=1 << 26, version=3):
    """A header of 4 KiB (QEMU, docs/interop/qcow2.txt)."""
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, backing, 9 * bool(backing), 16, size, 0, 1, 0x30000, 0x10000, 1, 0, 0)  # fmt: skip
    return (head + struct.pack(">QQQII", features, 0, 0, 4, 104)).ljust(512, b"\0") + b"/etc/host".ljust(3584, b"\0")


def vmdk(extent='RW 2048 SPARSE "disk.vmdk"'):
    """A sparse header and its descriptor (Virtual Disk Format 5.0)."""
    head = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, 2048, 128, 1, 20, 512, 21, 26, 128)
    text = f'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicSparse"\n{extent}\n'
    return head.ljust(512, b"\0") + text.encode().ljust(512 * 20, b"\0") + b"\0" * 65536


def iso():
    return (b"\0" * 0x8000 + b"\x01CD001\x01" + b"\0" * 2041 + b"\xffCD001\x01").ljust(100_000, b"\0")


def mbr():
    entry = struct.pack("<B3sB3sII", 0x80, b"\0\2\0", 0x83, b"\0\0\0", 2048, 4096)
    return b"\0" * 446 + entry + b"\0" * 48 + b"\x55\xaa" + b"\0" * 10_000


HONEST = [
    ("raw", os.urandom(5000), 5000),
    ("raw", mbr(), len(mbr())),
    ("raw", b"", 0),
    ("qcow2", qcow2(), 1 << 26),
    ("iso", iso(), None),
    ("aki", mbr(), len(mbr())),
    ("vmdk", vmdk(), 2048 * 512),
]
LIES = [
    ("raw", qcow2()),
    ("raw", vmdk()),
    ("raw", iso()),
    ("qcow2", os.urandom(5000)),
    ("qcow2", mbr()),
    ("qcow2", qcow2()[:80]),
    ("qcow2", qcow2(backing=512)),
    ("qcow2", qcow2(features=1 << 2)),  # an external data file
    ("qcow2", qcow2(features=1 << 40)),  # nobody knows what
    ("vmdk", vmdk('RW 2048 FLAT "/etc/passwd" 0')),
    ("vmdk", qcow2()),
    ("iso", os.urandom(100_000)),
    ("iso", qcow2()),
    ("vhd", os.urandom(5000)),
    ("vhdx", os.urandom(5000)),
    ("vdi", os.urandom(5000)),
    ("ami", qcow2()),
]


@pytest.mark.parametrize(("disk_format", "data", "virtual"), HONEST, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_as_it_was_declared_is_taken(shop, jill, disk_format, data, virtual):
    image = uploaded(shop, jill.token, data, disk_format=disk_format)
    assert image["status"] == "active" and image["size"] == len(data)
    assert virtual is None or image["virtual_size"] == virtual


@pytest.mark.parametrize(("disk_format", "data"), LIES, ids=lambda x: x if isinstance(x, str) else "")
def test_lies_are_refused_and_leave_nothing(shop, jill, disk_format, data):
    image = created(shop, jill.token, disk_format=disk_format)
    path = f"{V2}/images/{image['id']}"
    said = shop.refused(415, "PUT", f"{path}/file", data, jill.token, **OCTETS)
    assert disk_format in said and "Traceback" not in said
    assert shop.json("GET", path, token=jill.token)["status"] == "queued"
    assert files(shop, image["id"]) == []


def test_lies_are_refused_at_the_import_too(cloud, joe):
    image = created(cloud, joe.token)
    path = f"{V2}/images/{image['id']}"
    cloud.json("PUT", f"{path}/stage", qcow2(), joe.token, ok=204, **OCTETS)
    cloud.refused(415, "POST", f"{path}/import", {"method": {"name": "glance-direct"}}, joe.token)
    assert cloud.json("GET", path, token=joe.token)["status"] == "uploading"


def test_bytes_of_no_kind_and_images_of_no_format(cloud, joe):
    image = created(cloud, joe.token, disk_format=None)
    path = f"{V2}/images/{image['id']}/file"
    cloud.refused(400, "PUT", path, b"x", joe.token, **OCTETS)
    image = created(cloud, joe.token)
    cloud.refused(415, "PUT", f"{V2}/images/{image['id']}/file", b"x", joe.token, Content_Type="text/plain")
    assert files(cloud) == []


# ---- too much


def test_more_than_may_be(tmp_path):
    cloud = Embedded(tmp_path, image_options=options.Image(max_size_bytes=100_000))
    joe = cloud.person("joe", "member")
    image = created(cloud, joe.token)
    path = f"{V2}/images/{image['id']}"
    cloud.refused(413, "PUT", f"{path}/file", b"x" * 100_001, joe.token, **OCTETS)
    cloud.refused(413, "PUT", f"{path}/file", iter([b"x" * 60_000] * 2), joe.token, **OCTETS)
    assert cloud.json("GET", path, token=joe.token)["status"] == "queued"
    assert files(cloud) == []
    cloud.json("PUT", f"{path}/file", b"x" * 100_000, joe.token, ok=204, **OCTETS)


def test_the_disk_is_full(cloud, joe):
    image = created(cloud, joe.token)
    path = f"{V2}/images/{image['id']}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, hard))
    try:
        said = cloud.refused(413, "PUT", f"{path}/file", iter([b"x" * (1 << 20)] * 8), joe.token, **OCTETS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no room" in said
    assert cloud.json("GET", path, token=joe.token)["status"] == "queued"
    assert files(cloud) == []
    cloud.json("PUT", f"{path}/file", b"x", joe.token, ok=204, **OCTETS)


def test_uploads_do_not_take_every_thread(tmp_path):
    cloud = Embedded(tmp_path)
    joe = cloud.person("joe", "member")
    images = [created(cloud, joe.token) for _ in range(5)]

    def nested(n):
        yield b"x"
        path = f"{V2}/images/{images[n]['id']}/file"
        if n < 4:
            cloud.json("PUT", path, nested(n + 1), joe.token, ok=204, **OCTETS)
        else:
            cloud.refused(503, "PUT", path, b"x", joe.token, **OCTETS)

    cloud.json("PUT", f"{V2}/images/{images[0]['id']}/file", nested(1), joe.token, ok=204, **OCTETS)


# ---- crashes


SERVE = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from kilonova.kit.clock import WallClock
    from tests.cloud.embedded import Embedded
    cloud = Embedded(Path(sys.argv[1]), clock=WallClock())
    with cloud.served() as url:
        print(url, flush=True)
        time.sleep(120)
""")


def test_killed_in_the_middle_of_an_upload(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ".:src"},
    )
    try:
        url = process.stdout.readline().strip()
        cloud = Embedded(tmp_path, clock=WallClock())
        token = cloud.admin()
        image = created(cloud, token)
        path = f"{V2}/images/{image['id']}"
        host, port = url.removeprefix("http://").split(":")
        s = socket.create_connection((host, int(port)))
        head = f"PUT {path}/file HTTP/1.1\r\nHost: x\r\nX-Auth-Token: {token}\r\nContent-Type: application/octet-stream\r\n"
        s.sendall(f"{head}Content-Length: 10000000\r\n\r\n".encode() + b"x" * 5_000_000)
        _until(lambda: cloud.json("GET", path, token=token)["status"] == "saving")
        _until(lambda: files(cloud))
        assert companion.recover(cloud.images) == 0  # another process is at work on it: hands off
        assert cloud.json("GET", path, token=token)["status"] == "saving"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    s.close()
    assert companion.recover(cloud.images) == 2  # the image and its file
    assert cloud.json("GET", path, token=token)["status"] == "queued"
    assert files(cloud) == []
    cloud.json("PUT", f"{path}/file", b"whole", token, ok=204, **OCTETS)


def test_the_sender_goes_away_in_the_middle(tmp_path):
    cloud = Embedded(tmp_path, clock=WallClock())
    token = cloud.admin()
    with cloud.served() as url:
        host, port = url.removeprefix("http://").split(":")
        for how in ("Content-Length: 10000000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n4c4b40\r\n"):
            image = created(cloud, token)
            path = f"{V2}/images/{image['id']}"
            with socket.create_connection((host, int(port))) as s:
                head = f"PUT {path}/file HTTP/1.1\r\nHost: x\r\nX-Auth-Token: {token}\r\n"
                s.sendall(f"{head}Content-Type: application/octet-stream\r\n{how}".encode() + b"x" * 3_000_000)
                _until(lambda: cloud.json("GET", path, token=token)["status"] == "saving")  # noqa: B023
            _until(lambda: cloud.json("GET", path, token=token)["status"] == "queued")  # noqa: B023
            _until(lambda: files(cloud) == [])


def test_a_crash_at_every_step_leaves_all_or_nothing(cloud, joe):
    """Between its acts an upload can die after: the claim, the bytes, the rename."""
    for died_after in ("claim", "bytes", "rename"):
        image = created(cloud, joe.token)
        draft = cloud.images.blobs.draft(image["id"], "dead")
        with cloud.db.tx() as tx:
            assert companion.store.step(tx, image["id"], 0, to="saving", over=("queued",))
        if died_after != "claim":
            draft.take(io.BytesIO(b"bytes"), None, None)
        if died_after == "rename":
            draft.keep()
        assert companion.recover(cloud.images) == 0
        draft.file.close()  # what a death does to a lock
        assert companion.recover(cloud.images) == 2
        assert cloud.json("GET", f"{V2}/images/{image['id']}", token=joe.token)["status"] == "queued"
        assert files(cloud) == []
    kept = uploaded(cloud, joe.token, b"kept")
    assert companion.recover(cloud.images) == 0
    assert files(cloud) == [kept["id"]]


def _until(fact, seconds=10):
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- who sees what


def test_an_image_is_its_projects_own(cloud, joe):
    jane, admin = cloud.person("jane", "member"), cloud.admin()
    mine = uploaded(cloud, joe.token, b"mine", name="mine")
    path = f"{V2}/images/{mine['id']}"
    for method, where, body, more in [
        ("GET", path, None, {}),
        ("GET", f"{path}/file", None, {}),
        ("DELETE", path, None, {}),
        ("PATCH", path, b'[{"op": "replace", "path": "/name", "value": "y"}]', PATCH),
        ("PUT", f"{path}/file", b"x", OCTETS),
        ("PUT", f"{path}/tags/x", None, {}),
        ("POST", f"{path}/members", {"member": jane.project_id}, {}),
        ("POST", f"{path}/actions/deactivate", None, {}),
    ]:
        cloud.refused(404, method, where, body, jane.token, **more)
    assert cloud.json("GET", f"{V2}/images", token=jane.token)["images"] == []
    cloud.refused(
        403, "PATCH", path, b'[{"op": "replace", "path": "/visibility", "value": "public"}]', joe.token, **PATCH
    )
    cloud.json("PATCH", path, b'[{"op": "replace", "path": "/visibility", "value": "public"}]', admin, **PATCH)
    assert [i["id"] for i in cloud.json("GET", f"{V2}/images", token=jane.token)["images"]] == [mine["id"]]
    assert cloud.ask("GET", f"{path}/file", token=jane.token).read() == b"mine"
    cloud.refused(403, "DELETE", path, None, jane.token)
    cloud.refused(403, "POST", f"{V2}/images", {"name": "x", "visibility": "public"}, joe.token)
    cloud.refused(403, "POST", f"{V2}/images", {"name": "x", "owner": jane.project_id}, joe.token)


def test_sharing_is_offered_and_accepted(cloud, joe):
    jane, jack = cloud.person("jane", "member"), cloud.person("jack", "member")
    image = uploaded(cloud, joe.token, b"shared")
    path = f"{V2}/images/{image['id']}"
    made = cloud.json("POST", f"{path}/members", {"member": jane.project_id}, joe.token)
    assert made["status"] == "pending" and made["member_id"] == jane.project_id
    cloud.refused(409, "POST", f"{path}/members", {"member": jane.project_id}, joe.token)
    assert cloud.json("GET", path, token=jane.token)["id"] == image["id"]  # known by its id, but not listed
    assert cloud.json("GET", f"{V2}/images", token=jane.token)["images"] == []
    assert (
        len(cloud.json("GET", f"{V2}/images?visibility=shared&member_status=pending", token=jane.token)["images"]) == 1
    )
    mine = f"{path}/members/{jane.project_id}"
    cloud.refused(403, "PUT", mine, {"status": "accepted"}, joe.token)
    cloud.refused(404, "PUT", mine, {"status": "accepted"}, jack.token)
    cloud.refused(400, "PUT", mine, {"status": "perhaps"}, jane.token)
    assert cloud.json("PUT", mine, {"status": "accepted"}, jane.token)["status"] == "accepted"
    assert len(cloud.json("GET", f"{V2}/images", token=jane.token)["images"]) == 1
    assert cloud.ask("GET", f"{path}/file", token=jane.token).read() == b"shared"
    cloud.refused(403, "DELETE", path, None, jane.token)
    cloud.refused(403, "POST", f"{path}/members", {"member": jack.project_id}, jane.token)
    cloud.json("POST", f"{path}/members", {"member": jack.project_id}, joe.token)
    assert len(cloud.json("GET", f"{path}/members", token=joe.token)["members"]) == 2
    assert len(cloud.json("GET", f"{path}/members", token=jane.token)["members"]) == 1
    cloud.json("DELETE", mine, token=joe.token, ok=204)
    cloud.refused(404, "GET", path, token=jane.token)
    cloud.json("PATCH", path, b'[{"op": "replace", "path": "/visibility", "value": "private"}]', joe.token, **PATCH)
    cloud.refused(404, "GET", path, token=jack.token)
    cloud.refused(403, "GET", f"{path}/members", token=joe.token)


def test_community_images_are_found_by_who_asks_for_them(cloud, joe):
    jane = cloud.person("jane", "member")
    image = created(cloud, joe.token, visibility="community")
    assert cloud.json("GET", f"{V2}/images", token=jane.token)["images"] == []
    for asked in ("community", "all"):
        found = cloud.json("GET", f"{V2}/images?visibility={asked}", token=jane.token)["images"]
        assert [i["id"] for i in found] == [image["id"]]
    assert cloud.json("GET", f"{V2}/images/{image['id']}", token=jane.token)


def test_readers_look_and_do_not_touch(cloud):
    rita = cloud.person("rita", "reader")
    cloud.refused(403, "POST", f"{V2}/images", {"name": "x"}, rita.token)
    assert cloud.json("GET", f"{V2}/images", token=rita.token)["images"] == []


def test_a_deactivated_image_is_not_given_out(cloud, joe):
    image = uploaded(cloud, joe.token, b"data")
    path = f"{V2}/images/{image['id']}"
    cloud.json("POST", f"{path}/actions/deactivate", token=joe.token, ok=204)
    cloud.refused(403, "GET", f"{path}/file", token=joe.token)
    assert cloud.ask("GET", f"{path}/file", token=cloud.admin()).read() == b"data"
    cloud.json("POST", f"{path}/actions/reactivate", token=joe.token, ok=204)
    assert cloud.ask("GET", f"{path}/file", token=joe.token).read() == b"data"
    queued = created(cloud, joe.token)
    cloud.refused(403, "POST", f"{V2}/images/{queued['id']}/actions/deactivate", None, joe.token)


# ---- lists


def test_lists_are_paged_sorted_and_filtered(cloud, joe):
    for n in range(12):
        cloud.clock.at += 1
        created(
            cloud, joe.token, name=f"i{n % 4}", min_ram=n, tags=["even"] if n % 2 == 0 else [], os_distro=f"d{n % 3}"
        )
    ask = lambda query: cloud.json("GET", f"{V2}/images?{query}", token=joe.token)
    assert [i["min_ram"] for i in ask("limit=3")["images"]] == [11, 10, 9]
    for sort in (
        "sort=name:asc,min_ram:desc",
        "sort_key=name&sort_key=min_ram&sort_dir=asc&sort_dir=desc",
        "sort=size",
    ):
        seen, path = [], f"/v2/images?limit=5&{sort}"
        while path:
            page = cloud.json("GET", "/image" + path, token=joe.token)
            seen += [(i["name"], i["min_ram"]) for i in page["images"]]
            path = page.get("next")
        assert len(seen) == 12
        if "name" in sort:
            assert seen == sorted(seen, key=lambda x: (x[0], -x[1]))
    assert {i["min_ram"] for i in ask("tag=even&name=i0")["images"]} == {0, 4, 8}
    assert {i["name"] for i in ask("name=in:i1,i2")["images"]} == {"i1", "i2"}
    assert {i["min_ram"] for i in ask("os_distro=d1")["images"]} == {1, 4, 7, 10}
    assert ask("status=active")["images"] == [] and len(ask("status=queued")["images"]) == 12
    after = ask("name=i3&sort=created_at:asc")["images"][1]["created_at"]
    assert len(ask(f"created_at=gt:{after}")["images"]) == 4
    assert len(ask(f"created_at=gte:{after}")["images"]) == 5
    assert len(ask(f"created_at={after}")["images"]) == 1
    hidden = created(cloud, joe.token, name="hidden", os_hidden=True)
    assert [i["id"] for i in ask("os_hidden=true")["images"]] == [hidden["id"]]
    assert len(ask("limit=1000")["images"]) == 12
    assert ask("size_min=1")["images"] == []


def test_a_list_costs_the_same_for_few_and_many(cloud, joe):
    def statements():
        before = cloud.db.statements
        cloud.json("GET", f"{V2}/images?limit=1000", token=joe.token)
        return cloud.db.statements - before

    created(cloud, joe.token, tags=["a"], p="q")
    statements()
    few = statements()
    for n in range(20):
        created(cloud, joe.token, tags=["a"], p=str(n))
    statements()
    assert statements() == few <= 4


BAD_QUERIES = [
    "limit=-1", "limit=x", "marker=none", "sort=nothing", "sort=name:sideways", "sort_key=x", "visibility=secret",
    "member_status=x", "os_hidden=perhaps", "size_min=x", "created_at=yesterday", "sort=name&sort_key=id",
    "protected=maybe", "min_ram=x", "created_at=neq:2020-01-01", "%00=x", "name=%ff",
]  # fmt: skip


@pytest.mark.parametrize("query", BAD_QUERIES)
def test_bad_queries_are_told_so(shop, jill, query):
    status = 404 if query.startswith("marker") else 400
    shop.refused(status, "GET", f"{V2}/images?{query}", token=jill.token)


# ---- changes


def test_changes_by_patch(cloud, joe):
    image = created(cloud, joe.token, colour="red")
    path = f"{V2}/images/{image['id']}"

    def patched(*steps):
        return cloud.json("PATCH", path, msgspec.json.encode(list(steps)), joe.token, **PATCH)

    changed = patched(
        {"op": "replace", "path": "/name", "value": "new"},
        {"op": "add", "path": "/a~1b", "value": "c"},
        {"op": "replace", "path": "/colour", "value": "blue"},
        {"op": "add", "path": "/tags", "value": ["z"]},
        {"op": "replace", "path": "/min_disk", "value": 3},
        {"op": "replace", "path": "/protected", "value": True},
    )
    assert (changed["name"], changed["a/b"], changed["colour"], changed["tags"]) == ("new", "c", "blue", ["z"])
    assert cloud.json("GET", path, token=joe.token) == changed
    assert "colour" not in patched({"op": "remove", "path": "/colour"})
    cloud.refused(403, "DELETE", path, token=joe.token)
    old = {"Content_Type": "application/openstack-images-v2.0-json-patch"}
    cloud.json("PATCH", path, b'[{"replace": "/protected", "value": false}]', joe.token, **old)
    cloud.json("PUT", f"{path}/tags/one", token=joe.token, ok=204)
    assert cloud.json("GET", path, token=joe.token)["tags"] == ["one", "z"]
    cloud.json("DELETE", f"{path}/tags/one", token=joe.token, ok=204)
    cloud.refused(404, "DELETE", f"{path}/tags/one", token=joe.token)
    cloud.json("DELETE", path, token=joe.token, ok=204)


BAD_PATCHES = [
    (400, b"junk"), (400, b"{}"), (400, b"[1]"), (400, b'[{"op": "move", "path": "/x"}]'),
    (400, b'[{"op": "add", "path": "x", "value": "1"}]'), (400, b'[{"op": "add", "path": "/x"}]'),
    (400, b'[{"op": "add", "path": "/x", "value": 7}]'), (400, b'[{"op": "add", "path": "/x/y", "value": "1"}]'),
    (400, b'[{"op": "replace", "path": "/name", "value": {}}]'), (400, b'[{"op": "add", "path": "/~x", "value": "1"}]'),
    (400, b'[{"op": "replace", "path": "/disk_format", "value": "dvd"}]'),
    (400, b'[{"op": "replace", "path": "/name", "value": "a\\nb"}]'),
    (403, b'[{"op": "replace", "path": "/status", "value": "active"}]'),
    (403, b'[{"op": "replace", "path": "/id", "value": "x"}]'), (403, b'[{"op": "remove", "path": "/name"}]'),
    (403, b'[{"op": "add", "path": "/locations/-", "value": {"url": "file:///etc/passwd", "metadata": {}}}]'),
    (403, b'[{"op": "add", "path": "/os_glance_x", "value": "1"}]'),
    (403, b'[{"op": "replace", "path": "/owner", "value": "other"}]'),
    (409, b'[{"op": "replace", "path": "/nothing", "value": "1"}]'), (409, b'[{"op": "remove", "path": "/nothing"}]'),
    (413, b"[" + b" " * 200_000 + b"]"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body"), BAD_PATCHES, ids=lambda x: str(x)[:60])
def test_bad_changes_change_nothing(shop, jill, status, body):
    image = uploaded(shop, jill.token, b"x")
    path = f"{V2}/images/{image['id']}"
    shop.refused(status, "PATCH", path, body, jill.token, **PATCH)
    shop.refused(415, "PATCH", path, b"[]", jill.token, Content_Type="application/json")
    assert shop.json("GET", path, token=jill.token) == image


BAD_WISHES = [
    (400, None), (400, []), (400, {"name": 7}), (400, {"name": "x" * 256}), (400, {"name": "a\0b"}), (400, {"id": "x"}),
    (400, {"disk_format": "dvd"}), (400, {"container_format": "box"}), (400, {"min_disk": -1}), (400, {"min_ram": "2"}),
    (400, {"visibility": "secret"}), (400, {"protected": "yes"}), (400, {"tags": "a"}), (400, {"hw_x": 1}),
    (400, {"": "x"}), (403, {"status": "active"}), (403, {"locations": []}), (403, {"checksum": "x"}),
    (413, {f"p{n}": "x" for n in range(129)}), (400, {"min_disk": 1 << 40}),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body"), BAD_WISHES, ids=lambda x: str(x)[:40])
def test_bad_wishes_make_nothing(shop, jill, status, body):
    before = shop.json("GET", f"{V2}/images", token=jill.token)["images"]
    shop.refused(status, "POST", f"{V2}/images", body, jill.token)
    assert shop.json("GET", f"{V2}/images", token=jill.token)["images"] == before


def test_an_id_can_be_chosen_once(cloud, joe):
    id = "11111111-2222-4333-8444-555555555555"
    assert created(cloud, joe.token, id=id)["id"] == id
    cloud.refused(409, "POST", f"{V2}/images", {"id": id}, joe.token)


def test_errors_are_pages_that_cannot_be_scripted(cloud, joe):
    said = cloud.refused(400, "POST", f"{V2}/images", {"disk_format": "<script>"}, joe.token)
    assert said.startswith("<html>") and "<script>" not in said


def test_junk_is_never_our_fault(cloud, joe):
    words = ["name", "disk_format", "visibility", "min_disk", "protected", "tags", "id", "owner", "os_hidden", "member",
             "status", "method", "limit", "marker", "sort", "sort_key", "sort_dir", "created_at", "size_min",
             "member_status", "hw_disk_bus", "tag", "changes-since"]  # fmt: skip
    real = [uploaded(cloud, joe.token, b"x")["id"], created(cloud, joe.token)["id"]]
    driven_with_junk(cloud, companion.R, "/image", joe.token, words, real)


# ---- how other services ask


def test_the_client_reads_and_checks(cloud, joe):
    account = Account(cloud.carrier_of("/identity"), Login("kilonova", cloud.first.service_password), cloud.clock)
    images = Image(Session("image", cloud.carrier_of("/image"), cloud.clock, account))
    data = os.urandom(2_500_000)
    image = uploaded(cloud, joe.token, data, name="mine", min_ram=64, hw_disk_bus="scsi")
    info = images.show(image["id"])
    assert (info.name, info.size, info.min_ram_mb, info.status) == ("mine", len(data), 64, "active")
    assert info.properties == {"hw_disk_bus": "scsi"} and info.hash_algo == "sha512"
    got = bytearray()
    assert images.download(image["id"], got.extend) == len(data)
    assert got == data
    with pytest.raises(NotFound) as e:
        images.show("nothing")
    assert e.value.said == "No image found with ID nothing"
    made = images.create(name="snap", disk_format="raw", container_format="bare", owner=joe.project_id)
    images.upload(made.id, [b"a" * 10, b"b" * 10])
    assert cloud.ask("GET", f"{V2}/images/{made.id}/file", token=joe.token).read() == b"a" * 10 + b"b" * 10
    assert {i.id for i in images.list(owner=joe.project_id)} == {image["id"], made.id}
    for _ in range(2):
        images.delete(made.id)


@pytest.mark.clients
def test_the_sdk_brings_and_takes_images(tmp_path):
    openstack = pytest.importorskip("openstack")
    cloud = Embedded(tmp_path, clock=WallClock())
    data = os.urandom(2_000_000)
    (tmp_path / "a.raw").write_bytes(data)
    (tmp_path / "b.raw").write_bytes(qcow2())
    with cloud.served() as url:
        sdk = openstack.connect(
            auth_url=f"{url}/identity",
            username="admin",
            password=ADMIN,
            project_name="admin",
            user_domain_name="Default",
            project_domain_name="Default",
            region_name="RegionOne",
        )
        try:
            image = sdk.image.create_image(
                "a", filename=str(tmp_path / "a.raw"), disk_format="raw", container_format="bare", visibility="public"
            )
            assert sdk.image.get_image(image).checksum == hashlib.md5(data).hexdigest()
            assert sdk.image.download_image(image).content == data
            with pytest.raises(openstack.exceptions.SDKException, match="its content is qcow2"):
                sdk.image.create_image(
                    "b", filename=str(tmp_path / "b.raw"), disk_format="raw", container_format="bare"
                )
            image = sdk.image.update_image(image, name="c", hw_disk_bus="virtio")
            assert image.hw_disk_bus == "virtio"
            image = sdk.image.create_image(
                "d", filename=str(tmp_path / "a.raw"), disk_format="raw", container_format="bare", use_import=True
            )
            assert {i.name for i in sdk.image.images()} == {"c", "d"}
            sdk.image.delete_image(image, ignore_missing=False)
        finally:
            sdk.close()


@pytest.mark.clients
def test_large_uploads_leave_room_for_others(tmp_path):
    """While 200 MB come in, small questions are still answered within a moment."""
    import requests

    cloud = Embedded(tmp_path, clock=WallClock())
    with cloud.served() as url:
        token = cloud.admin()
        image = created(cloud, token)
        chunk = os.urandom(1 << 20)
        target = f"{url}/image/v2/images/{image['id']}/file"
        headers = {"X-Auth-Token": token, "Content-Type": "application/octet-stream"}
        thread = threading.Thread(
            target=lambda: requests.put(target, data=iter([chunk] * 200), headers=headers, timeout=60)
        )
        thread.start()
        slowest = 0.0
        with requests.Session() as session:
            while thread.is_alive():
                began = time.monotonic()
                assert session.get(f"{url}/image/v2/images", headers={"X-Auth-Token": token}, timeout=10).ok
                slowest = max(slowest, time.monotonic() - began)
                time.sleep(0.01)
        thread.join()
        assert cloud.json("GET", f"{V2}/images/{image['id']}", token=token)["size"] == 200 << 20
        assert slowest < 1
