"""Snapshots of volumes that only a host can make: the guest goes on in another file, and the volume service is told."""

import msgspec
import pytest

from kilonova.model import disks, options
from tests.cloud import tables
from tests.cloud.test_attach import attach, detach
from tests.cloud.test_volume_boot import made
from tests.stories import telling

NOBODY = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"
PATH = "/os-assisted-volume-snapshots"


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


@pytest.fixture
def story(cloud):
    """A server with a volume of which a snapshot is being made."""
    s, id = cloud.boot(networks="none"), made(cloud)
    attach(cloud, s, id)
    body = {"snapshot": {"volume_id": id, "force": True}}
    snapshot = cloud.services.json("POST", "/volume/v3/snapshots", body, cloud.user.token, ok=202)["snapshot"]["id"]
    return s, id, snapshot


def create(cloud, volume, snapshot, file="new", ok=200, token="", **more):
    info = {"snapshot_id": snapshot, "type": "qcow2", "new_file": file, **more}
    body = {"snapshot": {"volume_id": volume, "create_info": info}}
    said = cloud.json("POST", PATH, body, ok=ok, token=token or cloud.admin)
    cloud.settle()
    return said["snapshot"] if ok == 200 else next(iter(said.values()))["message"]


def delete(cloud, id, ok=204, token="", query=None, version="2.96", **info):
    query = f"?delete_info={msgspec.json.encode(info).decode()}" if query is None else query
    said = cloud.json("DELETE", f"{PATH}/{id}{query}", ok=ok, token=token or cloud.admin, version=version)
    cloud.settle()
    return said and next(iter(said.values()))["message"]


def files(s, volume):
    """From the oldest to the one in use."""
    m = s.state.machines[s.id]
    return [*m.behind.get(volume, []), next(disks.file_of(d) for d in m.machine.disks if d.serial == volume)]


def told(cloud, id):
    return cloud.services.json("GET", f"/volume/v3/snapshots/{id}", token=cloud.admin)["snapshot"]["status"]


def test_the_guest_goes_on_in_another_file(cloud, story):
    s, volume, snapshot = story
    (first,) = files(s, volume)
    answer = create(cloud, volume, snapshot, "second", id=snapshot)
    assert answer == {"id": snapshot, "volumeId": volume}
    if tables.FOLDER.exists():
        (entry,) = [e for e in tables.group("os-assisted-volume-snapshots") if e["route"].startswith("POST")]
        assert tables.disagreements(tables.said(entry, "response", 1), {"snapshot": answer}) == []
    assert (files(s, volume), told(cloud, snapshot)) == ([first, "second"], "creating")
    assert create(cloud, volume, snapshot, "third") == {"id": None, "volumeId": volume}
    s.act("reboot", {"type": "HARD"})
    cloud.start_hosts()
    assert files(s, volume) == [first, "second", "third"]
    s.act("os-migrateLive", {"host": None, "block_migration": "auto"}, ok=403)
    assert len(s.events()) == 3  # build, attach, reboot: nobody asked for this


def test_files_become_one_again(cloud, story):
    s, volume, snapshot = story
    (first,) = files(s, volume)
    for name in ("second", "third", "fourth"):
        create(cloud, volume, snapshot, name)
    delete(cloud, snapshot, volume_id=volume, type="qcow2", file_to_merge="third", merge_target_file="second")
    assert (files(s, volume), told(cloud, snapshot)) == ([first, "second", "fourth"], "deleting")
    delete(cloud, snapshot, volume_id=volume, file_to_merge="fourth", merge_target_file="second")
    assert files(s, volume) == [first, "second"]
    delete(cloud, snapshot, volume_id=volume)
    assert files(s, volume) == ["second"]
    delete(cloud, snapshot, volume_id=volume, file_to_merge="second", merge_target_file="nowhere")
    assert (files(s, volume), told(cloud, snapshot)) == (["second"], "error_deleting")


def test_a_host_that_refuses_is_told_of(cloud, story):
    s, volume, snapshot = story
    before = files(s, volume)
    cloud.driver(s.row.host).options = options.Sim(failure_rate=1.0)
    create(cloud, volume, snapshot)
    cloud.driver(s.row.host).options = options.Sim()
    assert (files(s, volume), told(cloud, snapshot)) == (before, "error")
    assert s.status == "ACTIVE"


def test_a_snapshot_that_nobody_knows_is_made_all_the_same(cloud, story):
    """The volume service may have forgotten it meanwhile."""
    s, volume, _ = story
    create(cloud, volume, NOBODY, "second")
    assert files(s, volume)[1:] == ["second"]


def test_what_makes_no_sense(cloud, story):
    s, volume, snapshot = story
    for file in ("a/b", "..", "/etc/passwd"):
        assert "name of a file" in create(cloud, volume, snapshot, file, ok=400)
        assert "name of a file" in delete(cloud, snapshot, ok=400, volume_id=volume, file_to_merge=file)
    create(cloud, volume, snapshot, ok=400, type="raw")
    create(cloud, NOBODY, snapshot, ok=400)
    create(cloud, "x" * 300, snapshot, ok=400)
    create(cloud, made(cloud), snapshot, ok=400)
    delete(cloud, snapshot, ok=400, query="")
    delete(cloud, snapshot, ok=400, query="?delete_info=nonsense")
    delete(cloud, snapshot, ok=400, query="?delete_info={}")
    delete(cloud, snapshot, ok=400, volume_id=NOBODY)
    delete(cloud, snapshot, ok=400, query=f'?delete_info={{"volume_id":"{volume}"}}&more=1')
    create(cloud, volume, snapshot, ok=403, token=cloud.user.token)
    delete(cloud, snapshot, ok=403, token=cloud.user.token, volume_id=volume)
    assert len(files(s, volume)) == 1
    detach(cloud, s, volume)
    create(cloud, volume, snapshot, ok=400)
