"""Volumes through the Block Storage API: real files, real images, real qemu-img; one process, nothing pretended."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kilonova.clients import Inside
from kilonova.companions import volume
from kilonova.companions.volume import bytes as kept
from kilonova.companions.volume.attachments import follows
from kilonova.companions.volume.world import carry, left
from kilonova.kit.clock import WallClock
from kilonova.kit.errors import Refused, Unavailable
from kilonova.model import options
from kilonova.store import volumes as store
from tests.cloud.embedded import ADMIN, NASTY_IDS, Embedded, driven_with_junk
from tests.stories import telling

GIB = 1 << 30
NEWEST = "3.71"


class Storage(Embedded):
    """A cloud, and a project's member in it who asks for volumes."""

    def __post_init__(self):
        super().__post_init__()
        self.joe = self.person("joe", "member")

    def api(self, method, path, body=None, *, ok=200, version=NEWEST, token=None):
        told = {"OpenStack_API_Version": f"volume {version}"}
        return self.json(method, f"/volume/v3{path}", body, token or self.joe.token, ok=ok, **told)

    def no(self, status, method, path, body=None, *, version=NEWEST, token=None):
        told = {"OpenStack_API_Version": f"volume {version}"}
        return self.refused(status, method, f"/volume/v3{path}", body, token or self.joe.token, **told)

    def make(self, size=1, **wish):
        return self.api("POST", "/volumes", {"volume": {"size": size, **wish}}, ok=202)["volume"]["id"]

    def look(self, id, what="volumes"):
        return self.api("GET", f"/{what}/{id}")[what[:-1]]

    def act(self, id, action, said=None, *, ok=202, **how):
        return self.api("POST", f"/volumes/{id}/action", {action: said}, ok=ok, **how)

    def file(self, id, room="volumes"):
        return self.volumes.bytes.path(room, id)

    def write(self, id, data, at=0):
        with self.file(id).open("r+b") as f:
            f.seek(at)
            f.write(data)

    def read(self, id, size, at=0, room="volumes"):
        with self.file(id, room).open("rb") as f:
            f.seek(at)
            return f.read(size)

    def picture(self, data, disk_format="raw", token=None, **wish):
        token = token or self.joe.token
        wish = {"name": "i", "disk_format": disk_format, "container_format": "bare", **wish}
        id = self.json("POST", "/image/v2/images", wish, token, ok=201)["id"]
        path = f"/image/v2/images/{id}/file"
        self.ask("PUT", path, data, token, Content_Type="application/octet-stream").read()
        assert self.json("GET", f"/image/v2/images/{id}", token=token)["status"] == "active"
        return id

    def attach(self, id, server="server-1", host="h1"):
        wish = {"attachment": {"volume_uuid": id, "instance_uuid": server, "connector": {"host": host}}}
        a = self.api("POST", "/attachments", wish)["attachment"]["id"]
        self.api("POST", f"/attachments/{a}/action", {"os-complete": None}, ok=204)
        return a

    def release(self, attachment):
        return self.api("DELETE", f"/attachments/{attachment}", token=self.admin())

    def reopened(self):
        """The same store, as a process finds it that starts after another died."""
        old = self.volumes
        images, host, gate = old.images, old.host, old.authenticate
        self.volumes = volume.open_store(
            self.db,
            self.clock,
            old.ids,
            old.config,
            self.directory / "volumes",
            images=images,
            host=host,
            authenticate=gate,
        )
        self.volume = volume.make_service(self.volumes)
        self.app.apps["/volume"] = self.volume
        return volume.recover(self.volumes)

    def orphans(self):
        with self.db.read() as tx:
            rows = {"volumes": store.Volume, "snapshots": store.Snapshot, "backups": store.Backup}
            known = {room: {t.id for t in store.find(tx, kind)} for room, kind in rows.items()}
            there = {room: {f.name for f in (self.directory / "volumes" / room).iterdir()} for room in known}
            with_bytes = {v.id for v in store.find(tx, store.Volume) if not v.status.startswith("error")}
        assert not list((self.directory / "volumes" / "parts").iterdir())
        return [(room, there[room] - known[room]) for room in known if there[room] - known[room]] + [
            ("no bytes", id) for id in with_bytes - there["volumes"]
        ]

    def used(self):
        said = self.api("GET", f"/os-quota-sets/{self.joe.project_id}?usage=True")["quota_set"]
        return {r: said[r]["in_use"] for r in ("volumes", "gigabytes", "snapshots", "backups", "backup_gigabytes")}


@pytest.fixture
def cloud(tmp_path):
    made = Storage(tmp_path)
    yield made
    assert left(made.volumes) == [] and made.orphans() == []
    made.db.close()


def qcow2(directory, data, size=None):
    """An image that qemu-img made of these bytes."""
    raw, made = directory / "of.raw", directory / "of.qcow2"
    raw.write_bytes(data)
    os.truncate(raw, size or len(data))
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(made)]
    subprocess.run(argv, check=True, capture_output=True)
    return made.read_bytes()


# ---- a volume's life


def test_a_blank_volume(cloud):
    made = cloud.api("POST", "/volumes", {"volume": {"size": "2", "name": "v", "metadata": {"a": "b"}}}, ok=202)[
        "volume"
    ]
    assert (made["status"], made["size"], made["bootable"], made["volume_type"]) == (
        "creating",
        2,
        "false",
        "__DEFAULT__",
    )
    assert made["links"][0]["href"] == f"http://cloud.test/volume/v3/volumes/{made['id']}"
    seen = cloud.look(made["id"])
    assert (seen["status"], seen["metadata"], seen["attachments"]) == ("available", {"a": "b"}, [])
    about = cloud.file(made["id"]).stat()
    assert about.st_size == 2 * GIB and about.st_blocks == 0 and about.st_mode & 0o777 == 0o600
    changed = cloud.api("PUT", f"/volumes/{made['id']}", {"volume": {"name": "w", "description": None}})["volume"]
    assert (changed["name"], changed["description"], changed["metadata"]) == ("w", None, {"a": "b"})
    assert cloud.used()["gigabytes"] == 2
    cloud.api("DELETE", f"/volumes/{made['id']}", ok=202)
    assert "could not be found" in cloud.no(404, "GET", f"/volumes/{made['id']}")
    assert set(cloud.used().values()) == {0}


def test_metadata_of_a_volume(cloud):
    path = f"/volumes/{cloud.make(metadata={'a': '1'})}/metadata"
    assert cloud.api("POST", path, {"metadata": {"b": "2"}})["metadata"] == {"a": "1", "b": "2"}
    assert cloud.api("PUT", f"{path}/c", {"meta": {"c": "3"}})["meta"] == {"c": "3"}
    cloud.no(400, "PUT", f"{path}/c", {"meta": {"d": "3"}})
    cloud.api("DELETE", f"{path}/a")
    cloud.no(404, "DELETE", f"{path}/a")
    assert cloud.api("GET", f"{path}/b")["meta"] == {"b": "2"}
    cloud.no(404, "GET", f"{path}/a")
    assert cloud.api("GET", path)["metadata"] == {"b": "2", "c": "3"}
    assert cloud.api("PUT", path, {"metadata": {}})["metadata"] == {}


def test_what_is_refused(cloud):
    for wish in ({"size": 0}, {"size": "x"}, {"size": -1}, {}, {"size": 1, "availability_zone": "moon"}):
        cloud.no(400, "POST", "/volumes", {"volume": wish})
    cloud.no(400, "POST", "/volumes", {"volume": {"size": 1, "imageRef": "x"}})
    for name in ("snapshot_id", "source_volid", "backup_id", "volume_type"):
        cloud.no(404, "POST", "/volumes", {"volume": {"size": 1, name: "x"}})
    cloud.no(400, "POST", "/volumes", {"volume": {"size": 1, "snapshot_id": "x", "source_volid": "y"}})
    id = cloud.make()
    for action in ({"os-nothing": None}, {}, {"os-extend": {"new_size": 1}}, {"os-extend": None}):
        cloud.no(400, "POST", f"/volumes/{id}/action", action)
    assert cloud.used() == {"volumes": 1, "gigabytes": 1, "snapshots": 0, "backups": 0, "backup_gigabytes": 0}


def test_lists_have_filters_orders_and_pages(cloud):
    ids = []
    for n in range(5):
        cloud.clock.sleep(1)
        ids.append(cloud.make(n + 1, name=f"v{n}", metadata={"parity": str(n % 2)}))

    def names(query):
        return [v["name"] for v in cloud.api("GET", f"/volumes/detail?{query}")["volumes"]]

    assert names("") == ["v4", "v3", "v2", "v1", "v0"]
    assert names("sort=size:asc&limit=2") == ["v0", "v1"]
    assert names("sort_key=name&sort_dir=asc&offset=3") == ["v3", "v4"]
    assert names("name=v2") == ["v2"] and names("status=error") == [] and names("size=3") == ["v2"]
    assert names("metadata={'parity':%20'1'}") == ["v3", "v1"]
    assert names("name~=v") == ["v4", "v3", "v2", "v1", "v0"] and names("name~=3") == ["v3"]
    assert names("bootable=true") == [] and len(names("volume_type=__DEFAULT__")) == 5
    page = cloud.api("GET", "/volumes?limit=2&sort=name:asc&with_count=true")
    assert page["count"] == 5 and [v["id"] for v in page["volumes"]] == ids[:2] and "status" not in page["volumes"][0]
    found = []
    path = f"/{cloud.joe.project_id}/volumes/detail?limit=2&sort=name:asc"
    while path:
        page = cloud.api("GET", path)
        found += [v["id"] for v in page["volumes"]]
        next = [link["href"] for link in page.get("volumes_links", [])]
        path = next[0].partition("/volume/v3")[2] if next else ""
    assert found == ids
    for query in ("limit=x", "sort=nothing", "sort=name:up", "marker=x", "created_at=gt:x", "metadata=x"):
        answer = cloud.ask("GET", f"/volume/v3/volumes?{query}", token=cloud.joe.token)
        assert answer.status in (400, 404), query
    summary = cloud.api("GET", "/volumes/summary")["volume-summary"]
    assert (summary["total_count"], summary["total_size"]) == (5, 15) and set(summary["metadata"]["parity"]) == {
        "0",
        "1",
    }


# ---- what it is made of


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_of_an_image(cloud, tmp_path, disk_format):
    content = b"boot me" + bytes(200_000) + b"the end" + bytes(506)
    content += bytes(-len(content) % 512)
    data = content if disk_format == "raw" else qcow2(tmp_path, content)
    image = cloud.picture(data, disk_format, hw_disk_bus="scsi", min_disk=1)
    id = cloud.make(1, imageRef=image)
    v = cloud.look(id)
    assert (v["status"], v["bootable"]) == ("available", "true")
    about = v["volume_image_metadata"]
    assert (about["image_id"], about["hw_disk_bus"], about["disk_format"]) == (image, "scsi", disk_format)
    assert cloud.read(id, len(content)) == content and cloud.file(id).stat().st_size == GIB
    assert cloud.file(id).stat().st_blocks * 512 < 2_000_000, "holes stay holes"
    assert cloud.make(1, imageRef=image) != id, "from the copy that is kept"


def test_an_image_that_does_not_fit(cloud, tmp_path):
    large = cloud.picture(qcow2(tmp_path, b"x", 2 * GIB), "qcow2")
    assert "larger than volume size 1GB" in cloud.no(
        400, "POST", "/volumes", {"volume": {"size": 1, "imageRef": large}}
    )
    picky = cloud.picture(bytes(512), min_disk=3)
    assert "minDisk" in cloud.no(400, "POST", "/volumes", {"volume": {"size": 2, "imageRef": picky}})
    hidden = cloud.picture(bytes(512), token=cloud.person("eve", "member").token, visibility="private")
    cloud.no(400, "POST", "/volumes", {"volume": {"size": 2, "imageRef": hidden}})
    assert cloud.used()["volumes"] == 0


def test_an_image_that_turns_out_bad_leaves_an_error_with_a_reason(cloud, tmp_path):
    """The image service may be another one, and may lie."""
    image = cloud.picture(qcow2(tmp_path, b"x" * 512), "qcow2")
    path = cloud.directory / "images" / "blobs" / image
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    id = cloud.make(1, imageRef=image)
    assert cloud.look(id)["status"] in ("error", "downloading")
    cloud.clock.sleep(1000)
    volume.resume(cloud.volumes)
    assert cloud.look(id)["status"] == "error"
    said = cloud.api("GET", f"/messages?resource_uuid={id}")["messages"]
    assert len(said) == 1 and "image" in said[0]["user_message"].lower() and said[0]["resource_type"] == "VOLUME"
    cloud.api("DELETE", f"/volumes/{id}", ok=202)
    cloud.api("DELETE", f"/messages/{said[0]['id']}", ok=204)
    assert cloud.used()["volumes"] == 0


def test_copies_are_of_their_moment(cloud):
    """Snapshot, clone, backup: what is written afterwards is not in them, and each lives without the others."""
    id = cloud.make(1, name="first")
    cloud.write(id, b"then", at=500 << 20)
    s = cloud.api("POST", "/snapshots", {"snapshot": {"volume_id": id, "name": "s"}}, ok=202)["snapshot"]["id"]
    clone = cloud.make(2, source_volid=id)
    b = cloud.api("POST", "/backups", {"backup": {"volume_id": id, "name": "b"}}, ok=202)["backup"]["id"]
    cloud.write(id, b"now!", at=500 << 20)
    of_snapshot, of_backup = cloud.make(1, snapshot_id=s), cloud.make(1, backup_id=b)
    for one in (clone, of_snapshot, of_backup):
        assert cloud.look(one)["status"] == "available" and cloud.read(one, 4, 500 << 20) == b"then"
    assert cloud.look(clone)["size"] == 2 and cloud.file(clone).stat().st_size == 2 * GIB
    assert cloud.look(clone)["source_volid"] == id and cloud.look(of_snapshot)["snapshot_id"] == s
    assert cloud.file(s, "snapshots").stat().st_blocks * 512 < 1 << 20
    cloud.no(400, "POST", "/volumes", {"volume": {"size": 1, "source_volid": clone}})
    assert "dependent snapshots" in cloud.no(400, "DELETE", f"/volumes/{id}")
    cloud.act(id, "revert", {"snapshot_id": s})
    assert cloud.read(id, 4, 500 << 20) == b"then" and cloud.look(id)["status"] == "available"
    cloud.write(id, b"now!", at=500 << 20)
    told = cloud.api("POST", f"/backups/{b}/restore", {"restore": {"volume_id": clone}}, ok=202)["restore"]
    assert told["volume_id"] == clone and cloud.read(clone, 4, 500 << 20) == b"then"
    assert cloud.look(clone)["size"] == 2 and cloud.file(clone).stat().st_size == 2 * GIB
    cloud.api("DELETE", f"/volumes/{id}?cascade=true", ok=202)
    cloud.no(404, "GET", f"/snapshots/{s}")
    anew = cloud.api("POST", f"/backups/{b}/restore", {"restore": {"name": "anew"}}, ok=202)["restore"]["volume_id"]
    assert cloud.read(anew, 4, 500 << 20) == b"then" and cloud.look(b, "backups")["status"] == "available"
    for one in (clone, of_snapshot, of_backup, anew):
        cloud.api("DELETE", f"/volumes/{one}", ok=202)
    cloud.api("DELETE", f"/backups/{b}", ok=202)
    assert set(cloud.used().values()) == {0}


def test_a_copy_of_what_is_being_written_is_of_one_moment(cloud, tmp_path):
    """A guest writes two places one after the other: no copy has the later and not the earlier."""
    if _shares_blocks(tmp_path):
        pytest.skip("this file system copies in one act")
    id = cloud.make(1)
    over = threading.Event()

    def guest():
        with cloud.file(id).open("r+b", buffering=0) as f:
            for n in range(1, 10**9):
                if over.is_set():
                    return
                for at in (900 << 20, 0):  # against the direction in which a copy goes
                    os.pwrite(f.fileno(), n.to_bytes(8, "big") * 512, at)
                time.sleep(0.12 if n % 4 == 0 else 0)

    writer = threading.Thread(target=guest)
    writer.start()
    try:
        for _ in range(6):
            copy = tmp_path / "copy"
            copy.write_bytes(b"")
            kept.copy(cloud.file(id), copy)
            with copy.open("rb") as f:
                low = int.from_bytes(os.pread(f.fileno(), 8, 0), "big")
                high = int.from_bytes(os.pread(f.fileno(), 8, 900 << 20), "big")
            assert low <= high <= low + 1
    finally:
        over.set()
        writer.join()


def test_what_is_never_at_rest_is_not_copied(cloud, tmp_path, monkeypatch):
    if _shares_blocks(tmp_path):
        pytest.skip("this file system copies in one act")
    id = cloud.make(1)
    cloud.attach(id)
    moments = itertools.count()
    monkeypatch.setattr(kept, "_written", lambda file: (next(moments), GIB))
    monkeypatch.setattr(kept, "PASSES", 3)
    s = cloud.api("POST", "/snapshots", {"snapshot": {"volume_id": id}}, ok=202)["snapshot"]["id"]
    assert cloud.look(s, "snapshots")["status"] == "error"
    assert "Pause or stop" in cloud.api("GET", f"/messages?resource_uuid={s}")["messages"][0]["user_message"]
    cloud.api("DELETE", f"/snapshots/{s}", ok=202)


def _shares_blocks(directory):
    one, other = directory / "one", directory / "other"
    one.write_bytes(b"x" * 4096)
    other.write_bytes(b"")
    with one.open("rb") as a, other.open("r+b") as b:
        return kept._shared(a, b)


# ---- what is done with it


def test_larger(cloud):
    id = cloud.make(1)
    cloud.act(id, "os-extend", {"new_size": 3})
    assert cloud.look(id)["size"] == 3 and cloud.file(id).stat().st_size == 3 * GIB and cloud.used()["gigabytes"] == 3
    told = []
    cloud.volumes.grown = lambda volume, servers: told.append((volume, servers))
    cloud.attach(id)
    cloud.no(400, "POST", f"/volumes/{id}/action", {"os-extend": {"new_size": 4}}, version="3.41")
    cloud.act(id, "os-extend", {"new_size": 4})
    assert told == [(id, ["server-1"])] and cloud.look(id)["status"] == "in-use" and cloud.look(id)["size"] == 4
    cloud.no(400, "POST", f"/volumes/{id}/action", {"os-extend": {"new_size": 4}})
    cloud.no(413, "POST", f"/volumes/{id}/action", {"os-extend": {"new_size": 10_000}})
    assert cloud.used()["gigabytes"] == 4


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_to_an_image_and_back(cloud, disk_format, monkeypatch):
    for module in (kept, volume.volumes):
        monkeypatch.setattr(module, "GIB", 1 << 20)  # bytes of a gibibyte are as a mebibyte's, and there are fewer
    image = cloud.picture(bytes(512), hw_disk_bus="scsi")
    id = cloud.make(1, imageRef=image, name="v")
    cloud.write(id, b"mine", at=4096)
    said = {"image_name": "out", "disk_format": disk_format, "container_format": "bare"}
    told = cloud.act(id, "os-volume_upload_image", said)["os-volume_upload_image"]
    assert (told["status"], told["disk_format"], told["image_name"]) == ("uploading", disk_format, "out")
    made = cloud.json("GET", f"/image/v2/images/{told['image_id']}", token=cloud.joe.token)
    assert (made["status"], made["owner"], made["hw_disk_bus"]) == ("active", cloud.joe.project_id, "scsi")
    assert made["virtual_size"] == 1 << 20 and made["min_disk"] == 1
    assert (made["size"] == 1 << 20) == (disk_format == "raw")
    assert cloud.look(id)["status"] == "available"
    back = cloud.make(1, imageRef=told["image_id"])
    assert cloud.read(back, 4, 4096) == b"mine" and cloud.look(back)["volume_image_metadata"]["hw_disk_bus"] == "scsi"
    cloud.attach(id)
    cloud.no(400, "POST", f"/volumes/{id}/action", {"os-volume_upload_image": said})
    cloud.act(id, "os-volume_upload_image", {**said, "force": True})
    assert cloud.look(id)["status"] == "in-use"


def test_an_upload_that_fails_leaves_the_volume_as_it_was(cloud, monkeypatch):
    def fails(*_):
        raise Refused("The disk is full.")

    id = cloud.make(1)
    monkeypatch.setattr(kept, "convert", fails)
    told = cloud.act(id, "os-volume_upload_image", {"image_name": "out", "disk_format": "qcow2"})
    cloud.refused(404, "GET", f"/image/v2/images/{told['os-volume_upload_image']['image_id']}", token=cloud.joe.token)
    assert cloud.look(id)["status"] == "available"
    assert "The disk is full." in cloud.api("GET", "/messages")["messages"][0]["user_message"]


def test_another_image_over_it(cloud):
    one, two = cloud.picture(b"one" + bytes(509)), cloud.picture(b"two" + bytes(509), os_distro="x")
    id = cloud.make(2, imageRef=one)
    a = cloud.api("POST", "/attachments", {"attachment": {"volume_uuid": id, "instance_uuid": "s"}})["attachment"]["id"]
    cloud.no(400, "POST", f"/volumes/{id}/action", {"os-reimage": {"image_id": two}})
    cloud.act(id, "os-reimage", {"image_id": two, "reimage_reserved": True})
    v = cloud.look(id)
    assert (v["status"], v["volume_image_metadata"]["image_id"]) == ("reserved", two)
    assert cloud.read(id, 3) == b"two" and cloud.file(id).stat().st_size == 2 * GIB
    cloud.release(a)


def test_marks(cloud):
    id = cloud.make(1)
    cloud.act(id, "os-set_bootable", {"bootable": "true"}, ok=200)
    cloud.act(id, "os-update_readonly_flag", {"readonly": True})
    v = cloud.look(id)
    assert (v["bootable"], v["metadata"]["readonly"]) == ("true", "True")
    cloud.act(id, "os-set_image_metadata", {"metadata": {"hw_vif_model": "e1000"}}, ok=200)
    assert cloud.act(id, "os-show_image_metadata", ok=200)["metadata"] == {"hw_vif_model": "e1000"}
    cloud.act(id, "os-unset_image_metadata", {"key": "hw_vif_model"}, ok=200)
    cloud.no(404, "POST", f"/volumes/{id}/action", {"os-unset_image_metadata": {"key": "hw_vif_model"}})
    cloud.act(id, "os-retype", {"new_type": "multiattach"})
    assert cloud.look(id)["multiattach"] and cloud.look(id)["volume_type"] == "multiattach"
    a = cloud.attach(id)
    assert cloud.api("GET", f"/attachments/{a}")["attachment"]["attach_mode"] == "ro"
    cloud.no(400, "POST", f"/volumes/{id}/action", {"os-retype": {"new_type": "__DEFAULT__"}})
    cloud.no(403, "POST", f"/volumes/{id}/action", {"os-reset_status": {"status": "error"}})
    cloud.act(id, "os-reset_status", {"status": "error"}, token=cloud.admin())
    assert cloud.look(id)["status"] == "error"
    cloud.no(400, "DELETE", f"/volumes/{id}")
    cloud.act(id, "os-reset_status", {"status": "available", "attach_status": "detached"}, token=cloud.admin())
    cloud.no(403, "POST", f"/volumes/{id}/action", {"os-force_delete": None})
    cloud.act(id, "os-force_delete", token=cloud.admin())
    cloud.no(404, "GET", f"/volumes/{id}")


# ---- attachments


def test_the_road_of_an_attachment(cloud):
    id = cloud.make(1)
    wish = {"attachment": {"volume_uuid": id, "instance_uuid": "server-1", "mode": "ro"}}
    a = cloud.api("POST", "/attachments", wish)["attachment"]
    assert (a["status"], a["instance"], a["connection_info"]) == ("reserved", "server-1", {})
    assert cloud.look(id)["status"] == "reserved"
    cloud.no(400, "POST", "/attachments", {"attachment": {"volume_uuid": id, "instance_uuid": "server-2"}})
    cloud.no(400, "PUT", f"/attachments/{a['id']}", {"attachment": {"connector": {}}})
    connector = {"host": "h1", "ip": "10.0.0.1", "mountpoint": "/dev/vdb"}
    a = cloud.api("PUT", f"/attachments/{a['id']}", {"attachment": {"connector": connector}})["attachment"]
    info = a["connection_info"]
    assert (a["status"], a["attach_mode"], info["access_mode"]) == ("attaching", "ro", "ro")
    assert (info["driver_volume_type"], info["format"], info["size_bytes"]) == ("local", "raw", GIB)
    assert Path(info["device_path"]).stat().st_size == GIB
    assert cloud.look(id)["status"] == "attaching"
    cloud.api("POST", f"/attachments/{a['id']}/action", {"os-complete": a["id"]}, ok=204)
    v = cloud.look(id)
    assert v["status"] == "in-use"
    assert [(x["server_id"], x["device"], x["host_name"]) for x in v["attachments"]] == [("server-1", "/dev/vdb", None)]
    for path in ("DELETE", f"/volumes/{id}"), ("DELETE", f"/volumes/{id}?force=true"):
        assert cloud.ask(path[0], f"/volume/v3{path[1]}", token=cloud.joe.token).status in (400, 403)
    assert "Compute API" in cloud.no(409, "DELETE", f"/attachments/{a['id']}")
    for what in (
        {"os-detach": {}},
        {"os-terminate_connection": {"connector": {}}},
        {"os-force_detach": {"attachment_id": a["id"]}},
    ):
        for mine in (cloud.joe.token, cloud.admin()):  # who only says that he is a service is none
            told = cloud.ask("POST", f"/volume/v3/volumes/{id}/action", what, mine, X_Service_Token=mine)
            assert told.status in ((403, 409) if "os-force_detach" in what and mine == cloud.joe.token else (409,)), (
                what
            )
    assert [x["id"] for x in cloud.api("GET", "/attachments?instance_id=server-1")["attachments"]] == [a["id"]]
    assert "connection_info" in cloud.api("GET", f"/attachments/detail?volume_id={id}")["attachments"][0]
    assert cloud.release(a["id"]) == {"attachments": []}
    assert cloud.look(id)["status"] == "available"
    cloud.no(404, "GET", f"/attachments/{a['id']}")


def test_one_server_on_its_way_to_another_host(cloud):
    """A migration: the same server has two attachments, on two hosts, for a while."""
    id = cloud.make(1)
    first = cloud.attach(id, "server-1", "h1")
    wish = {"attachment": {"volume_uuid": id, "instance_uuid": "server-1", "connector": {"host": "h2"}}}
    second = cloud.api("POST", "/attachments", wish)["attachment"]["id"]
    assert cloud.look(id)["status"] == "in-use"
    cloud.api("POST", f"/attachments/{second}/action", {"os-complete": None}, ok=204)
    assert [a["id"] for a in cloud.release(first)["attachments"]] == [second]
    assert cloud.look(id)["status"] == "in-use" and len(cloud.look(id)["attachments"]) == 1
    cloud.release(second)


def test_a_volume_of_several_servers(cloud):
    id = cloud.make(1, volume_type="multiattach")
    assert cloud.look(id)["multiattach"]
    one, two = cloud.attach(id, "server-1", "h1"), cloud.attach(id, "server-2", "h2")
    assert {a["server_id"] for a in cloud.look(id)["attachments"]} == {"server-1", "server-2"}
    cloud.act(id, "os-begin_detaching")
    assert cloud.look(id)["status"] == "detaching"
    cloud.no(400, "POST", f"/volumes/{id}/action", {"os-begin_detaching": None})  # one after the other
    cloud.release(one)
    assert cloud.look(id)["status"] == "in-use"
    cloud.release(two)
    assert cloud.look(id)["status"] == "available"


def test_the_elder_way(cloud):
    id, other = cloud.make(1), cloud.make(1)
    cloud.act(id, "os-reserve")
    cloud.no(400, "POST", f"/volumes/{id}/action", {"os-reserve": None})
    assert cloud.look(id)["status"] == "attaching"
    cloud.act(id, "os-unreserve")
    assert cloud.look(id)["status"] == "available"
    cloud.act(id, "os-reserve")
    told = cloud.act(id, "os-initialize_connection", {"connector": {"host": "h1"}}, ok=200)["connection_info"]
    assert told["driver_volume_type"] == "local" and told["data"]["format"] == "raw"
    cloud.act(id, "os-attach", {"instance_uuid": "server-1", "mountpoint": "/dev/vdb", "mode": "rw"})
    assert cloud.look(id)["status"] == "in-use" and cloud.look(id)["metadata"] == {"attached_mode": "rw"}
    cloud.act(id, "os-begin_detaching")
    cloud.no(400, "POST", f"/volumes/{id}/action", {"os-begin_detaching": None})
    cloud.act(id, "os-roll_detaching")
    cloud.act(id, "os-begin_detaching")
    cloud.act(id, "os-terminate_connection", {"connector": {"host": "h1"}})
    cloud.no(400, "POST", f"/volumes/{id}/action", {"os-detach": {"attachment_id": "x"}})
    cloud.act(id, "os-detach", {"attachment_id": cloud.look(id)["attachments"][0]["attachment_id"]})
    assert cloud.look(id)["status"] == "available"
    said = {"new_volume": other, "error": False}
    cloud.no(403, "POST", f"/volumes/{id}/action", {"os-migrate_volume_completion": said})
    done = cloud.act(id, "os-migrate_volume_completion", said, ok=200, token=cloud.admin())
    assert done == {"save_volume_id": other}


def test_the_status_follows_from_the_attachments():
    def of(*statuses):
        return follows(
            [store.Attachment(id="a", volume_id="v", project_id="p", created_at=0, status=s) for s in statuses]
        )

    assert of() == "available" and of("reserved", "attached") == "in-use" and of("reserved", "attaching") == "attaching"


def test_a_server_is_told_that_its_volume_grew(tmp_path):
    """Through both services: attached by the one, extended by the other, in the server's history of the first."""
    with telling(tmp_path) as story:
        server = story.boot()
        joe = story.user
        made = story.services.json("POST", "/volume/v3/volumes", {"volume": {"size": 1}}, joe.token, ok=202)["volume"][
            "id"
        ]
        wish = {"volumeAttachment": {"volumeId": made}}
        story.json("POST", f"/servers/{server.id}/os-volume_attachments", wish)
        story.settle()
        asked = {"OpenStack_API_Version": "volume 3.42"}
        path = f"/volume/v3/volumes/{made}/action"
        story.services.ask("POST", path, {"os-extend": {"new_size": 2}}, joe.token, **asked).read()
        volume = story.services.json("GET", f"/volume/v3/volumes/{made}", token=joe.token)["volume"]
        assert (volume["status"], volume["size"]) == ("in-use", 2)
        assert volume["attachments"][0]["server_id"] == server.id
        story.settle()
        assert ("compute_extend_volume", "Success") in server.events()
        server.delete()
        assert (
            story.services.json("GET", f"/volume/v3/volumes/{made}", token=joe.token)["volume"]["status"] == "available"
        )


# ---- shares, types, the service


def test_shares_are_kept(cloud):
    path = f"/os-quota-sets/{cloud.joe.project_id}"
    cloud.no(403, "PUT", path, {"quota_set": {"volumes": 2}})
    admin = cloud.admin()
    cloud.api("PUT", path, {"quota_set": {"volumes": 2, "gigabytes": 5, "snapshots": 1, "backups": 1}}, token=admin)
    one, two = cloud.make(1), cloud.make(1)
    assert "Maximum number of volumes allowed (2)" in cloud.no(413, "POST", "/volumes", {"volume": {"size": 1}})
    assert "overLimit" in cloud.no(413, "POST", f"/volumes/{one}/action", {"os-extend": {"new_size": 9}})
    s = cloud.api("POST", "/snapshots", {"snapshot": {"volume_id": one}}, ok=202)["snapshot"]["id"]
    cloud.no(413, "POST", "/snapshots", {"snapshot": {"volume_id": one}})
    cloud.api("POST", "/backups", {"backup": {"volume_id": one}}, ok=202)
    cloud.no(413, "POST", "/backups", {"backup": {"volume_id": one}})
    assert cloud.used() == {"volumes": 2, "gigabytes": 3, "snapshots": 1, "backups": 1, "backup_gigabytes": 1}
    absolute = cloud.api("GET", "/limits")["limits"]["absolute"]
    assert (absolute["maxTotalVolumes"], absolute["totalVolumesUsed"], absolute["totalGigabytesUsed"]) == (2, 2, 3)
    cloud.api("DELETE", f"/snapshots/{s}", ok=202)
    cloud.api("DELETE", f"/volumes/{two}", ok=202)
    assert cloud.used()["gigabytes"] == 1
    cloud.api("PUT", path, {"quota_set": {"per_volume_gigabytes": 2}}, token=admin)
    cloud.no(413, "POST", "/volumes", {"volume": {"size": 3}})
    cloud.api("DELETE", path, token=admin)
    assert cloud.api("GET", path)["quota_set"]["volumes"] == 10
    cloud.api("PUT", "/os-quota-class-sets/default", {"quota_class_set": {"volumes": 7}}, token=admin)
    assert cloud.api("GET", f"{path}/defaults")["quota_set"]["volumes"] == 7
    cloud.no(403, "GET", f"/os-quota-sets/{cloud.person('eve', 'member').project_id}")


def test_types(cloud):
    admin = cloud.admin()
    assert {t["name"] for t in cloud.api("GET", "/types")["volume_types"]} == {"__DEFAULT__", "multiattach"}
    assert cloud.api("GET", "/types/default")["volume_type"]["name"] == "__DEFAULT__"
    cloud.no(403, "POST", "/types", {"volume_type": {"name": "fast"}})
    wish = {"name": "fast", "os-volume-type-access:is_public": False, "extra_specs": {"disks": "fast"}}
    t = cloud.api("POST", "/types", {"volume_type": wish}, token=admin)["volume_type"]["id"]
    cloud.no(409, "POST", "/types", {"volume_type": {"name": "fast"}}, token=admin)
    cloud.no(404, "GET", f"/types/{t}")
    cloud.no(404, "POST", "/volumes", {"volume": {"size": 1, "volume_type": "fast"}})
    cloud.api(
        "POST", f"/types/{t}/action", {"addProjectAccess": {"project": cloud.joe.project_id}}, ok=202, token=admin
    )
    assert cloud.api("GET", f"/types/{t}")["volume_type"]["extra_specs"] == {}, (
        "what the operator means is his own affair"
    )
    id = cloud.make(1, volume_type="fast")
    assert cloud.look(id)["volume_type"] == "fast"
    cloud.no(400, "DELETE", f"/types/{t}", token=admin)
    cloud.api("DELETE", f"/volumes/{id}", ok=202)
    assert cloud.api("PUT", f"/types/{t}/extra_specs/a", {"a": "b"}, token=admin) == {"a": "b"}
    assert cloud.api("GET", f"/types/{t}/extra_specs", token=admin)["extra_specs"] == {"disks": "fast", "a": "b"}
    cloud.api("DELETE", f"/types/{t}/extra_specs/a", ok=202, token=admin)
    cloud.no(404, "GET", f"/types/{t}/extra_specs/a", token=admin)
    cloud.api(
        "POST", f"/types/{t}/action", {"removeProjectAccess": {"project": cloud.joe.project_id}}, ok=202, token=admin
    )
    assert (
        cloud.api("PUT", f"/types/{t}", {"volume_type": {"name": "slow"}}, token=admin)["volume_type"]["name"] == "slow"
    )
    cloud.api("DELETE", f"/types/{t}", ok=202, token=admin)
    assert cloud.api("GET", "/types/multiattach")["volume_type"]["extra_specs"] == {"multiattach": "<is> True"}


def test_the_service_says_what_it_is(cloud):
    for path, status in (("/volume/", 300), ("/volume/v3/", 200)):
        said = cloud.json("GET", path, ok=status)["versions"][0]
        assert (said["id"], said["version"], said["min_version"]) == ("v3.0", "3.71", "3.0")
        assert said["links"][1]["href"] == "http://cloud.test/volume/v3/"
    cloud.no(403, "GET", "/os-services")
    services = cloud.api("GET", "/os-services", token=cloud.admin())["services"]
    assert {(s["binary"], s["state"]) for s in services} == {
        (f"cinder-{x}", "up") for x in ("scheduler", "volume", "backup")
    }
    pool = cloud.api("GET", "/scheduler-stats/get_pools?detail=true", token=cloud.admin())["pools"][0]
    assert pool["name"] == "cloud@files#files" and pool["capabilities"]["free_capacity_gb"] > 0
    zones = cloud.api("GET", "/os-availability-zone")["availabilityZoneInfo"]
    assert zones == [{"zoneName": "nova", "zoneState": {"available": True}}]
    for absent in (
        "/groups",
        "/volume-transfers",
        "/os-volume-transfer",
        "/consistencygroups",
        "/qos-specs",
        "/clusters",
    ):
        cloud.no(404, "GET", absent)


def test_microversions(cloud):
    id = cloud.make(1)
    fields = {"3.13": "group_id", "3.48": "shared_targets", "3.63": "volume_type_id", "3.65": "consumes_quota"}
    for version, name in fields.items():
        before = f"3.{int(version[2:]) - 1}"
        assert name in cloud.api("GET", f"/volumes/{id}", version=version)["volume"]
        assert name not in cloud.api("GET", f"/volumes/{id}", version=before)["volume"]
    answer = cloud.ask("GET", "/volume/v3/volumes", token=cloud.joe.token, OpenStack_API_Version="volume 3.27")
    assert (
        answer.headers["openstack-api-version"] == "volume 3.27" and answer.headers["vary"] == "OpenStack-API-Version"
    )
    answer = cloud.ask("GET", "/volume/v3/volumes", token=cloud.joe.token, OpenStack_API_Version="compute 2.90")
    assert answer.headers["openstack-api-version"] == "volume 3.0"
    cloud.no(406, "GET", "/volumes", version="3.72")
    cloud.no(406, "GET", "/volumes", version="2.1")
    cloud.no(400, "GET", "/volumes", version="three")
    cloud.no(404, "GET", "/attachments", version="3.26")
    cloud.no(404, "GET", "/messages", version="3.2")
    a = cloud.api("POST", "/attachments", {"attachment": {"volume_uuid": id}}, version="3.27")["attachment"]["id"]
    cloud.no(404, "POST", f"/attachments/{a}/action", {"os-complete": None}, version="3.43")
    cloud.api("DELETE", f"/attachments/{a}", version="3.27")
    cloud.attach(id)
    snap = {"snapshot": {"volume_id": id}}
    cloud.no(400, "POST", "/snapshots", snap, version="3.64")
    cloud.no(400, "POST", "/snapshots", {"snapshot": {"volume_id": id, "force": False}}, version="3.65")
    s = cloud.api("POST", "/snapshots", snap, ok=202, version="3.65")["snapshot"]
    cloud.api("DELETE", f"/snapshots/{s['id']}", ok=202)
    cloud.no(400, "POST", "/snapshots", {"snapshot": {"volume_id": id, "force": False}}, version="3.66")
    s = cloud.api("POST", "/snapshots", snap, ok=202, version="3.66")["snapshot"]
    assert "user_id" in s and "user_id" not in cloud.api("GET", f"/snapshots/{s['id']}", version="3.40")["snapshot"]


# ---- who may


def test_what_is_anothers_is_not_there(cloud):
    id = cloud.make(1)
    s = cloud.api("POST", "/snapshots", {"snapshot": {"volume_id": id}}, ok=202)["snapshot"]["id"]
    b = cloud.api("POST", "/backups", {"backup": {"volume_id": id}}, ok=202)["backup"]["id"]
    a = cloud.attach(id)
    eve = cloud.person("eve", "member").token
    real = {"volumes": id, "snapshots": s, "backups": b, "attachments": a}
    for route in volume.R:
        what = route.path.split("/")[2] if route.path.count("/") > 2 else ""
        if what not in real or "{id}" not in route.path:
            continue
        path = route.path.replace("{id}", real[what]).replace("{key}", "k")
        bodies = {
            "/action": {
                route.action: {"new_size": 9, "connector": {"host": "h"}, "mountpoint": "/x", "image_name": "n"}
            },
            "/restore": {"restore": {"name": "x"}},
            "/metadata": {"metadata": {"a": "b"}},
        }
        body = next((x for end, x in bodies.items() if path.endswith(end)), {what[:-1]: {"connector": {"host": "h"}}})
        body = {"meta": {"k": "v"}} if path.endswith("/k") else body
        answer = cloud.ask(
            route.method, f"/volume{path}", body if route.body else None, eve, OpenStack_API_Version=f"volume {NEWEST}"
        )
        assert answer.status in (404, 400), (route.method, path, route.action, answer.status, answer.read())
        assert answer.status == 404 or route.action, (route.method, path)
    for wish in ({"snapshot_id": s}, {"source_volid": id}, {"backup_id": b}):
        cloud.no(404, "POST", "/volumes", {"volume": {"size": 1, **wish}}, token=eve)
    for what, body in (("snapshots", {"snapshot": {"volume_id": id}}), ("backups", {"backup": {"volume_id": id}})):
        cloud.no(404, "POST", f"/{what}", body, token=eve)
    cloud.no(404, "POST", "/attachments", {"attachment": {"volume_uuid": id, "instance_uuid": "x"}}, token=eve)
    for what in real:
        assert cloud.api("GET", f"/{what}?all_tenants=1", token=eve)[what] == []
        assert len(cloud.api("GET", f"/{what}?all_tenants=1", token=cloud.admin())[what]) == 1
    assert "doesn't match" in cloud.no(400, "GET", f"/{cloud.joe.project_id}/volumes", token=eve)
    assert cloud.look(id)["status"] == "in-use"
    cloud.release(a)


def test_readers_read(cloud):
    id = cloud.make(1)
    reader = cloud.person("rita", "reader", project_name=cloud.joe.project_name).token
    assert cloud.api("GET", f"/volumes/{id}", token=reader)["volume"]["id"] == id
    cloud.no(403, "POST", "/volumes", {"volume": {"size": 1}}, token=reader)
    cloud.no(403, "DELETE", f"/volumes/{id}", token=reader)
    cloud.no(403, "PUT", f"/volumes/{id}", {"volume": {"name": "x"}}, token=reader)
    cloud.no(403, "POST", f"/volumes/{id}/action", {"os-extend": {"new_size": 2}}, token=reader)
    cloud.no(403, "POST", "/attachments", {"attachment": {"volume_uuid": id}}, token=reader)
    cloud.no(403, "POST", "/snapshots", {"snapshot": {"volume_id": id}}, token=reader)
    cloud.refused(401, "GET", "/volume/v3/volumes")


# ---- after a crash


def test_what_was_promised_is_done_by_the_next_life(cloud):
    """Each kind of act is begun, and nobody is left to do it; whoever starts next does it, and sweeps the floor."""
    image = cloud.picture(b"boot" + bytes(508))
    a, b, c, d = (cloud.make(1, name=n) for n in "abcd")
    s = cloud.api("POST", "/snapshots", {"snapshot": {"volume_id": d}}, ok=202)["snapshot"]["id"]
    cloud.write(a, b"mine")
    cloud.volumes.held = True
    of_image, blank, clone = cloud.make(1, imageRef=image), cloud.make(1), cloud.make(1, source_volid=a)
    snap = cloud.api("POST", "/snapshots", {"snapshot": {"volume_id": a}}, ok=202)["snapshot"]["id"]
    backup = cloud.api("POST", "/backups", {"backup": {"volume_id": a}}, ok=202)["backup"]["id"]
    cloud.api("DELETE", f"/volumes/{b}", ok=202)
    cloud.act(c, "os-extend", {"new_size": 2})
    out = cloud.act(d, "os-volume_upload_image", {"image_name": "out", "disk_format": "qcow2"})[
        "os-volume_upload_image"
    ]["image_id"]
    cloud.api("DELETE", f"/snapshots/{s}", ok=202)
    statuses = {v["id"]: v["status"] for v in cloud.api("GET", "/volumes/detail")["volumes"]}
    assert statuses == {
        a: "backing-up",
        b: "deleting",
        c: "extending",
        d: "uploading",
        of_image: "downloading",
        blank: "creating",
        clone: "creating",
    }
    assert len(left(cloud.volumes)) == 9
    for debris in ("volumes/nobodys", f"volumes/{of_image}-anew", f"parts/{clone}", "snapshots/nobodys"):
        (cloud.directory / "volumes" / debris).write_bytes(b"half")
    assert len(cloud.reopened()) == 4
    statuses = {v["id"]: v["status"] for v in cloud.api("GET", "/volumes/detail")["volumes"]}
    assert statuses == dict.fromkeys((a, c, d, of_image, blank, clone), "available")
    assert cloud.read(of_image, 4) == b"boot" and cloud.read(clone, 4) == b"mine" and cloud.look(c)["size"] == 2
    assert cloud.look(snap, "snapshots")["status"] == cloud.look(backup, "backups")["status"] == "available"
    assert cloud.json("GET", f"/image/v2/images/{out}", token=cloud.joe.token)["status"] == "active"
    assert cloud.used() == {"volumes": 6, "gigabytes": 8, "snapshots": 1, "backups": 1, "backup_gigabytes": 1}


@pytest.mark.parametrize("after", ["the bytes", "the transaction"])
def test_a_crash_at_the_end_of_an_act(cloud, monkeypatch, after):
    """Whatever was done already is not done twice, and nothing is lost."""

    class Crash(BaseException):
        pass

    a = cloud.make(1)
    cloud.write(a, b"mine")
    real = cloud.volumes.db.tx
    cloud.volumes.held = True
    clone = cloud.make(1, source_volid=a)
    (id,) = [x for x in left(cloud.volumes) if _subject(cloud, x) == clone]

    def dies():
        raise Crash

    if after == "the bytes":
        monkeypatch.setattr(cloud.volumes.db, "tx", dies)
        with pytest.raises(Crash):
            carry(cloud.volumes, id)
        monkeypatch.setattr(cloud.volumes.db, "tx", real)
        assert cloud.file(clone).exists() and cloud.look(clone)["status"] == "creating"
    else:
        carry(cloud.volumes, id)
        carry(cloud.volumes, id)
    cloud.write(a, b"late")
    cloud.reopened()
    assert cloud.look(clone)["status"] == "available" and cloud.read(clone, 4) == b"mine"


def _subject(cloud, act):
    with cloud.db.read() as tx:
        return store.look(tx, store.Act, act).subject


HOLDER = """
import fcntl, sys, time
f = open(sys.argv[1], "wb")
fcntl.flock(f, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_who_is_killed_lets_go(cloud):
    """An act that another process is at is left alone; kill -9, and it is ours."""
    cloud.volumes.held = True
    id = cloud.make(1)
    (act,) = left(cloud.volumes)
    path = cloud.directory / "volumes" / "locks" / act
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    carry(cloud.volumes, act)
    assert cloud.look(id)["status"] == "creating"
    other.send_signal(signal.SIGKILL)
    other.wait(10)
    other.stdout.close()
    carry(cloud.volumes, act)
    assert cloud.look(id)["status"] == "available" and not path.exists()


def test_a_neighbour_that_is_away_is_waited_for(cloud, monkeypatch):
    image = cloud.picture(bytes(512))
    download = cloud.volumes.images.download

    def away(*_, **__):
        raise Unavailable("Nobody there.")

    monkeypatch.setattr(cloud.volumes.images, "download", away)
    first, second = cloud.make(1, imageRef=image), cloud.make(1, imageRef=image)
    assert cloud.look(first)["status"] == "downloading"
    cloud.api("DELETE", f"/volumes/{second}?force=true", ok=202, token=cloud.admin())
    assert cloud.look(second)["status"] == "deleting", "first what is under way has to end"
    monkeypatch.setattr(cloud.volumes.images, "download", download)
    for _ in range(2):
        volume.resume(cloud.volumes)
    assert cloud.look(first)["status"] == "available"
    cloud.no(404, "GET", f"/volumes/{second}")
    monkeypatch.setattr(cloud.volumes.images, "download", away)
    other = cloud.make(1, imageRef=cloud.picture(b"\1" * 512))
    cloud.clock.sleep(1000)
    volume.resume(cloud.volumes)
    assert cloud.look(other)["status"] == "error", "patience has an end"


def test_a_crew_does_what_takes_long(tmp_path):
    cloud = Storage(tmp_path)
    crew = cloud.volumes.crew = volume.Crew(2)
    crew.start()
    image = cloud.picture(b"boot" + bytes(508))
    ids = [cloud.make(1, imageRef=image) for _ in range(6)]
    until = time.monotonic() + 30
    while any(cloud.look(i)["status"] != "available" for i in ids) and time.monotonic() < until:
        time.sleep(0.02)
    assert [cloud.read(i, 4) for i in ids] == [b"boot"] * 6
    crew.close()
    assert not any(t.is_alive() for t in crew.threads)
    cloud.db.close()


# ---- clients


@pytest.mark.clients
def test_the_sdk_has_its_way(tmp_path):
    openstack = pytest.importorskip("openstack")
    cloud = Storage(tmp_path, clock=WallClock())
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
        storage = sdk.block_storage
        try:
            v = storage.wait_for_status(storage.create_volume(size=1, name="v", metadata={"a": "b"}), "available")
            assert (v.is_bootable, v.metadata, v.volume_type) == (False, {"a": "b"}, "__DEFAULT__")
            storage.extend_volume(v, 2)
            storage.set_volume_metadata(v, c="d")
            storage.delete_volume_metadata(v.id, ["a"])
            storage.set_volume_bootable_status(v, True)
            storage.set_volume_readonly(v, True)
            v = storage.find_volume("v", ignore_missing=False)
            assert (v.size, v.metadata, v.is_bootable) == (2, {"c": "d", "readonly": "True"}, True)
            s = storage.create_snapshot(volume_id=v.id, name="s", force=True)
            s = storage.wait_for_status(s, "available")
            b = storage.wait_for_status(storage.create_backup(volume_id=v.id, name="b"), "available")
            clone = storage.wait_for_status(storage.create_volume(name="c", snapshot_id=s.id), "available")
            a = storage.create_attachment(clone.id, instance="server-1", connector={"host": "h1"}, mode="ro")
            assert a.connection_info["driver_volume_type"] == "local" and a.status == "attaching"
            storage.complete_attachment(a)
            assert storage.get_volume(clone).attachments[0]["server_id"] == "server-1"
            storage.delete_attachment(a)
            storage.restore_backup(b, volume_id=clone.id)
            assert storage.wait_for_status(storage.get_volume(clone), "available").size == 2
            storage.upload_volume_to_image(clone, "out", disk_format="qcow2", visibility="private")
            assert next(sdk.image.images(name="out")).status == "active"
            assert {x.name for x in storage.volumes()} == {"v", "c"} and [x.id for x in storage.snapshots()] == [s.id]
            t = storage.create_type(name="t", extra_specs={"a": "b"})
            storage.update_type_extra_specs(t, c="d")
            assert storage.find_type("t").extra_specs == {"a": "b", "c": "d"}
            storage.delete_type(t)
            storage.update_quota_set(sdk.current_project_id, volumes=3)
            assert storage.get_quota_set(sdk.current_project_id, usage=True).usage["volumes"] == 2
            assert storage.get_limits().absolute.max_total_volumes == 3
            assert {x.state for x in storage.services()} == {"up"}
            assert storage.summary(False).total_size == 4
            storage.reset_volume_status(clone, status="error")
            storage.delete_volume(clone, force=True)
            storage.delete_backup(b)
            storage.delete_snapshot(s)
            storage.delete_volume(v)
            assert not [*storage.volumes(), *storage.snapshots(), *storage.backups()]
        finally:
            sdk.close()
    assert left(cloud.volumes) == [] and cloud.orphans() == []
    cloud.db.close()


# ---- junk


def test_junk_is_nobodys_fault_but_its_senders(tmp_path):
    cloud = Storage(tmp_path, volume_options=options.Volume(quota_volumes=-1, quota_gigabytes=-1))
    id = cloud.make(1)
    cloud.api("POST", "/snapshots", {"snapshot": {"volume_id": id}}, ok=202)
    carrier = cloud.carrier

    class Newest(Inside):
        def send(self, method, path, headers, body):
            return carrier.send(method, path, {**headers, "OpenStack-API-Version": f"volume {NEWEST}"}, body)

    cloud.carrier = Newest(cloud.app, cloud.url)
    words = ["size", "name", "metadata", "volume_id", "connector", "volume_uuid", "status", "limit", "sort", "marker"]
    for token in (cloud.joe.token, cloud.admin()):
        driven_with_junk(cloud, [r for r in volume.R if not r.action], "/volume", token, words, [id])
        for route in (r for r in volume.R if r.action and "volumes" in r.path):
            for value in (None, "x", 7, [], {}, {"x": 1}, {"new_size": {}}, {"connector": {}}, {"metadata": {"a": []}}):
                answer = cloud.ask("POST", f"/volume/v3/volumes/{id}/action", {route.action: value}, token)
                assert answer.status < 500 or answer.status == 501, (route.action, value, answer.read())
    for strange in NASTY_IDS:
        assert cloud.ask("GET", f"/volume/v3/volumes/{strange}", token=cloud.joe.token).status in (400, 404)
    cloud.db.close()
