"""The service for shared file systems: what it keeps, whom it lets in, what it refuses."""

import pytest

from kilonova.companions import share
from kilonova.kit.clock import WallClock
from kilonova.model import options
from tests.cloud.embedded import Embedded, driven_with_junk

VERSION = {"X-OpenStack-Manila-API-Version": "2.82"}
NFS = {"share_proto": "NFS", "size": 1}


@pytest.fixture
def cloud(tmp_path):
    c = Embedded(tmp_path)
    yield c
    c.db.close()


@pytest.fixture
def alice(cloud):
    return cloud.person("alice", "member")


def made(cloud, who, **more):
    return cloud.json("POST", "/share/v2/shares", {"share": NFS | more}, who.token)["share"]


def test_a_share_is_a_directory_of_its_project(cloud, alice):
    s = made(cloud, alice, name="data", metadata={"a": "b"})
    path = f"/share/v2/shares/{s['id']}"
    assert (s["status"], s["project_id"], s["metadata"]) == ("available", alice.project_id, {"a": "b"})
    (way,) = cloud.json("GET", f"{path}/export_locations", token=alice.token)["export_locations"]
    directory = cloud.directory / "shares" / s["id"]
    assert way["path"] == f"127.0.0.1:{directory}" and directory.is_dir()
    bob = cloud.person("bob", "member")
    for method in ("GET", "DELETE"):
        cloud.refused(404, method, path, None, bob.token)
    cloud.refused(404, "POST", f"{path}/action", {"allow_access": {"access_type": "ip", "access_to": "::1"}}, bob.token)
    assert cloud.json("GET", "/share/v2/shares/detail", token=bob.token) == {"shares": []}
    reader = cloud.person("carol", "reader", project_name=alice.project_name)
    cloud.refused(403, "DELETE", path, None, reader.token)
    changed = cloud.json("PUT", path, {"share": {"display_name": "other", "is_public": True}}, alice.token)["share"]
    assert changed["name"] == "other"
    assert cloud.json("GET", path, token=bob.token)["share"]["id"] == s["id"]
    cloud.refused(403, "PUT", path, {"share": {"name": "mine"}}, bob.token)
    (directory / "file").write_text("x")
    cloud.json("DELETE", path, token=alice.token, ok=202)
    cloud.refused(404, "GET", path, None, alice.token)
    assert not directory.exists()


def test_what_a_service_locked_is_not_its_users_to_open(cloud, alice):
    id, service = made(cloud, alice)["id"], cloud.log_in("kilonova", cloud.first.service_password, "service")
    path = f"/share/v2/shares/{id}"
    rule = {"access_type": "ip", "access_to": "192.0.2.7", "lock_visibility": True, "lock_deletion": True}
    allowed = cloud.json("POST", f"{path}/action", {"allow_access": rule}, service)["access"]
    cloud.refused(400, "POST", f"{path}/action", {"allow_access": rule}, service)
    seen = cloud.json("GET", f"/share/v2/share-access-rules?share_id={id}", token=alice.token)["access_list"]
    assert [r["access_to"] for r in seen] == ["******"]
    deny = {"deny_access": {"access_id": allowed["id"], "unrestrict": True}}
    cloud.refused(403, "POST", f"{path}/action", deny, alice.token)
    wish = {"resource_lock": {"resource_id": id, "resource_type": "share", "resource_action": "delete"}}
    lock = cloud.json("POST", "/share/v2/resource-locks", wish, service, **VERSION)["resource_lock"]
    assert lock["lock_context"] == "service"
    cloud.refused(409, "DELETE", path, None, alice.token)
    cloud.refused(404, "DELETE", f"/share/v2/resource-locks/{lock['id']}", None, alice.token, **VERSION)
    cloud.json("DELETE", f"/share/v2/resource-locks/{lock['id']}", token=service, ok=204, **VERSION)
    cloud.json("POST", f"{path}/action", deny, service, ok=202)
    assert cloud.json("GET", f"/share/v2/share-access-rules?share_id={id}", token=service) == {"access_list": []}
    cloud.json("DELETE", path, token=alice.token, ok=202)


def test_a_project_has_its_quota(tmp_path):
    cloud = Embedded(tmp_path)
    cloud.share.world.config = options.Share(quota_shares=2, quota_gigabytes=10)
    alice = cloud.person("alice", "member")
    one = made(cloud, alice, size=6)
    cloud.refused(413, "POST", "/share/v2/shares", {"share": NFS | {"size": 5}}, alice.token)
    made(cloud, alice, size=4)
    cloud.refused(413, "POST", "/share/v2/shares", {"share": NFS}, alice.token)
    cloud.json("DELETE", f"/share/v2/shares/{one['id']}", token=alice.token, ok=202)
    made(cloud, alice)
    assert len(list((tmp_path / "shares").iterdir())) == 2
    cloud.db.close()


def test_what_is_left_of_a_crash_goes_when_it_starts(cloud, alice):
    s, world = made(cloud, alice), cloud.share.world
    (world.directory / "of-nobody").mkdir()
    assert share.recover(world) == ["of-nobody"]
    assert [d.name for d in world.directory.iterdir()] == [s["id"]]


def test_junk_is_never_our_fault(cloud, alice):
    id = made(cloud, alice)["id"]
    words = ["name", "size", "share_proto", "metadata", "access_id", "access_type", "access_to", "resource_id", "limit"]
    for token in (alice.token, cloud.admin()):
        driven_with_junk(cloud, share.R, "/share", token, [*words, "all_projects", "share_id", "offset"], [id])


@pytest.mark.clients
def test_the_sdk_finds_its_way(tmp_path):
    openstack = pytest.importorskip("openstack")
    cloud = Embedded(tmp_path, clock=WallClock())
    alice = cloud.person("alice", "member")
    with cloud.served() as url:
        sdk = openstack.connect(
            auth_url=f"{url}/identity/v3", username="alice", password="alice's", project_name=alice.project_name,
            user_domain_name="Default", project_domain_name="Default", region_name="RegionOne", app_name="test",
        )  # fmt: skip
        kept = sdk.shared_file_system
        s = kept.create_share(name="one", size=1, share_protocol="NFS")
        assert [x.id for x in kept.shares()] == [s.id]
        assert [x.path for x in kept.export_locations(s.id)] == [f"127.0.0.1:{cloud.directory}/shares/{s.id}"]
        rule = kept.create_access_rule(s.id, access_type="ip", access_to="::1", access_level="rw")
        assert [r.access_to for r in kept.access_rules(s.id)] == ["::1"]
        kept.delete_access_rule(rule.id, s.id)
        kept.delete_share(s.id)
        assert list(kept.shares()) == []
        sdk.close()
    cloud.db.close()
