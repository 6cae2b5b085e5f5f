"""Unified limits: the identity service says how much a project may have; quota sets show it, and change nothing."""

import msgspec
import pytest

from kilonova.kit.errors import Unavailable
from kilonova.model import options
from kilonova.model.limits import Unified
from tests.stories import telling

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPYvM5xQfZ0C0HjQ2TDFdGEsVYEg1N3bLrqIKVGFc3Wm me@home"
ON = options.Config(unified_limits=options.UnifiedLimits(enabled=True))
DEFAULTS = {
    "servers": 3, "class:VCPU": 100, "class:MEMORY_MB": 100_000, "class:DISK_GB": 100, "server_key_pairs": 1,
    "server_metadata_items": 2, "server_groups": 1, "server_group_members": 1,
}  # fmt: skip


class Limits:
    """An operator's, at the identity service."""

    def __init__(self, cloud):
        self.cloud, self.ids = cloud, {}
        services = self.ask("GET", "services?type=compute")["services"]
        self.service = services[0]["id"]

    def ask(self, method, path, body=None, ok=200):
        return self.cloud.services.json(method, f"/identity/v3/{path}", body, self.cloud.services.admin(), ok=ok)

    def register(self, **defaults):
        wish = [{"service_id": self.service, "resource_name": r, "default_limit": n} for r, n in defaults.items()]
        self.ask("POST", "registered_limits", {"registered_limits": wish}, ok=201)

    def set(self, resource, n, project=None, region=None):
        about = {"service_id": self.service, "resource_name": resource, "region_id": region}
        if (known := self.ids.get((resource, region))) is not None:
            self.ask("PATCH", f"limits/{known}", {"limit": {"resource_limit": n}})
            return
        wish = {**about, "resource_limit": n, "project_id": project or self.cloud.user.project_id}
        self.ids[resource, region] = self.ask("POST", "limits", {"limits": [wish]}, ok=201)["limits"][0]["id"]


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path, config=ON) as c:
        c.limits = Limits(c)
        c.limits.register(**DEFAULTS)
        yield c


def refused(cloud, method, path, body, **more):
    said = cloud.json(method, path, body, ok=403, **more)
    return said["forbidden"]["message"]


def wish(cloud, **more):
    return {"server": {"name": "n", "flavorRef": "small", "imageRef": cloud.image_id, "networks": "none", **more}}


def test_servers_are_counted_by_what_the_identity_service_says(cloud):
    for name in ("one", "two", "three"):
        cloud.boot(name)
    project = cloud.user.project_id
    assert refused(cloud, "POST", "/servers", wish(cloud)) == (
        f"Project {project} is over a limit for [Resource servers is over limit of 3 due to current usage 3 and delta 1]"
    )
    cloud.limits.set("servers", 5)
    cloud.boot("four")
    cloud.limits.set("class:VCPU", 4)
    assert "class:VCPU is over limit of 4 due to current usage 4 and delta 1" in refused(
        cloud, "POST", "/servers", wish(cloud)
    )
    cloud.limits.set("class:VCPU", 10)
    cloud.limits.set("class:DISK_GB", 4)
    assert "class:DISK_GB" in refused(cloud, "POST", "/servers", wish(cloud))


def test_of_many_as_many_are_made_as_there_is_room_for(cloud):
    made = cloud.json("POST", "/servers", wish(cloud, min_count=1, max_count=9, return_reservation_id=True), ok=202)
    cloud.settle()
    assert made["reservation_id"] and len(cloud.json("GET", "/servers")["servers"]) == 3


def test_builds_under_way_are_counted(cloud):
    """What has no host yet holds nothing of any, and will."""
    cloud.limits.set("class:VCPU", 2)
    for name in ("one", "two"):
        cloud.boot(name, settle=False)
    assert "class:VCPU is over limit of 2 due to current usage 2" in refused(cloud, "POST", "/servers", wish(cloud))
    cloud.settle()


def test_a_resize_needs_room_beside_what_is_there_and_an_unshelve_room(cloud):
    s = cloud.boot("one")
    cloud.limits.set("class:VCPU", 4)
    path = f"/servers/{s.id}/action"
    assert "delta 4" in refused(cloud, "POST", path, {"resize": {"flavorRef": "large"}})
    cloud.limits.set("class:VCPU", 5)
    s.act("resize", {"flavorRef": "large"})
    s.act("confirmResize", ok=204)
    s.act("shelve")
    used = cloud.json("GET", "/limits")["limits"]["absolute"]
    assert (used["totalInstancesUsed"], used["totalCoresUsed"], used["totalRAMUsed"]) == (1, 0, 0)
    cloud.limits.set("class:VCPU", 3)
    assert "current usage 0 and delta 4" in refused(cloud, "POST", path, {"unshelve": None})
    cloud.limits.set("class:VCPU", 4)
    s.act("unshelve")


def test_a_restored_server_counts_again(tmp_path):
    config = msgspec.structs.replace(ON, compute=options.Compute(reclaim_interval_s=600))
    with telling(tmp_path, config=config) as cloud:
        Limits(cloud).register(servers=1)
        s = cloud.boot("one")
        s.delete()
        cloud.boot("two")
        assert "Resource servers" in refused(cloud, "POST", f"/servers/{s.id}/action", {"restore": None})


def test_what_else_is_counted(cloud):
    key = lambda name: {"keypair": {"name": name, "public_key": KEY, "type": "ssh"}}
    cloud.json("POST", "/os-keypairs", key("a"), ok=201)
    assert "server_key_pairs is over limit of 1" in refused(cloud, "POST", "/os-keypairs", key("b"))
    group = {"server_group": {"name": "g", "policy": "soft-affinity"}}
    id = cloud.json("POST", "/os-server-groups", group)["server_group"]["id"]
    assert "server_groups is over limit of 1" in refused(cloud, "POST", "/os-server-groups", group)
    cloud.boot("one", hints={"group": id})
    body = wish(cloud) | {"os:scheduler_hints": {"group": id}}
    assert "server_group_members is over limit of 1" in refused(cloud, "POST", "/servers", body)
    three = {str(i): "x" for i in range(3)}
    assert "server_metadata_items" in refused(cloud, "POST", "/servers", wish(cloud, metadata=three))
    s = cloud.boot("two")
    path = f"/servers/{s.id}/metadata"
    assert "server_metadata_items" in refused(cloud, "POST", path, {"metadata": three})
    rebuild = {"rebuild": {"imageRef": cloud.image_id, "metadata": three}}
    assert "server_metadata_items" in refused(cloud, "POST", f"/servers/{s.id}/action", rebuild)


def test_quota_sets_show_it_and_change_nothing(cloud):
    project = cloud.user.project_id
    cloud.limits.set("servers", 7)
    path = f"/os-quota-sets/{project}"
    before = cloud.json("GET", path, token=cloud.admin)["quota_set"]
    assert (before["instances"], before["cores"], before["ram"], before["key_pairs"]) == (7, 100, 100_000, 1)
    said = cloud.json("PUT", path, {"quota_set": {"instances": 2, "cores": -1}}, token=cloud.admin)["quota_set"]
    assert said["instances"] == 7
    assert cloud.json("GET", path, token=cloud.admin)["quota_set"] == before
    cloud.json("DELETE", path, token=cloud.admin, ok=202)
    detail = cloud.json("GET", f"{path}/detail", token=cloud.admin)["quota_set"]
    assert detail["instances"] == {"limit": 7, "in_use": 0, "reserved": 0}
    assert cloud.json("GET", f"{path}/defaults", token=cloud.admin)["quota_set"]["instances"] == 3
    of_class = "/os-quota-class-sets/default"
    wished = {"quota_class_set": {"instances": 50}}
    assert cloud.json("PUT", of_class, wished, token=cloud.admin)["quota_class_set"]["instances"] == 3
    assert cloud.json("GET", of_class, token=cloud.admin)["quota_class_set"]["instances"] == 3
    old = cloud.json("GET", path, token=cloud.admin, version="2.1")["quota_set"]
    assert old["injected_files"] == 0  # nobody registered it, and it is not looked at


def test_limits_of_other_regions_are_others(cloud):
    about = {"service_id": cloud.limits.service, "resource_name": "servers", "default_limit": 0}
    for region in ("RegionOne", "Elsewhere"):
        if region == "Elsewhere":
            cloud.limits.ask("POST", "regions", {"region": {"id": region}}, ok=201)
        n = {"RegionOne": 1, "Elsewhere": 0}[region]
        wish_ = {"registered_limits": [about | {"region_id": region, "default_limit": n}]}
        cloud.limits.ask("POST", "registered_limits", wish_, ok=201)
    cloud.boot("one")  # one, of our own region, in place of the three of none
    assert "over limit of 1" in refused(cloud, "POST", "/servers", wish(cloud))


def test_what_nobody_registered():
    """Named resources are required, or spared; of all others the opposite is true."""
    some = Unified("p", {"class:VCPU": 5}, {"class:VCPU": 2}, frozenset({"servers"}))
    assert (some.most("class:VCPU"), some.most("servers"), some.most("class:MEMORY_MB")) == (2, 0, -1)
    spared = msgspec.structs.replace(some, spared=True)
    assert (spared.most("class:VCPU"), spared.most("servers"), spared.most("class:MEMORY_MB")) == (2, -1, 0)
    assert some.quotas()["cores"] == some.shown()["cores"] == 2
    assert (some.quotas()["ram"], some.shown()["ram"]) == (-1, 0)


def test_nothing_is_made_while_the_identity_service_cannot_say(cloud, monkeypatch):
    def away(*args, **more):
        raise Unavailable("The identity service is not available.")

    monkeypatch.setattr(cloud.neighbours.identity.system, "json", away)
    cloud.json("POST", "/servers", wish(cloud), ok=503)
