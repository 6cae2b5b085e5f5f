"""What the Compute API forwarded once: images, networks, addresses, groups, volumes; each answer as it was then."""

import re

import pytest

from kilonova.model.server import Address
from tests.cloud import tables
from tests.stories import telling

GROUPS = (
    "images", "image-metadata", "os-networks", "os-tenant-networks", "os-floating-ips", "os-floating-ip-pools",
    "os-security-groups", "os-security-group-rules", "server-security-groups", "os-volumes", "os-snapshots",
)  # fmt: skip
NOBODY = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"
OLD = "2.35"


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path) as c:
        yield c


def old(cloud, method, path, body=None, ok=200, version=OLD, token=""):
    return cloud.json(method, path, body, ok=ok, version=version, token=token)


def sentence(said):
    return next(iter(said.values()))["message"]


def act(cloud, s, action, said, ok=202, version=OLD):
    answer = cloud.json("POST", f"/servers/{s.id}/action", {action: said}, ok=ok, version=version)
    cloud.settle()
    return answer and sentence(answer)


def private(cloud):
    return next(n for n in cloud.neighbours.network.networks() if n.name == "private")


def addresses(s):
    return [a.address for p in s.row.plugs for a in p.addresses]


# ---- floating addresses


def test_a_floating_address_is_taken_led_to_a_server_and_given_back(cloud):
    s = cloud.boot()
    (pool,) = old(cloud, "GET", "/os-floating-ip-pools")["floating_ip_pools"]
    made = old(cloud, "POST", "/os-floating-ips", {"pool": pool["name"]})["floating_ip"]
    assert (made["pool"], made["instance_id"], made["fixed_ip"]) == (pool["name"], None, None)
    inner = addresses(s)[0]
    assert act(cloud, s, "addFloatingIp", {"address": made["ip"]}) is None
    assert addresses(s) == [inner, made["ip"]]
    shown = old(cloud, "GET", f"/os-floating-ips/{made['id']}")["floating_ip"]
    assert (shown["instance_id"], shown["fixed_ip"]) == (s.id, inner)
    assert old(cloud, "GET", "/os-floating-ips")["floating_ips"] == [shown]

    two = cloud.boot("two")  # it may be led elsewhere without being let go of
    assert act(cloud, two, "addFloatingIp", {"address": made["ip"], "fixed_address": addresses(two)[0]}) is None
    assert (addresses(s), addresses(two)[1:]) == ([inner], [made["ip"]])
    assert "not associated" in act(cloud, s, "removeFloatingIp", {"address": made["ip"]}, ok=409)
    assert act(cloud, two, "removeFloatingIp", {"address": made["ip"]}) is None
    assert len(addresses(two)) == 1
    old(cloud, "DELETE", f"/os-floating-ips/{made['id']}", ok=202)
    old(cloud, "GET", f"/os-floating-ips/{made['id']}", ok=404)


def test_floating_addresses_that_make_no_sense(cloud):
    s = cloud.boot()
    old(cloud, "POST", "/os-floating-ips", {"pool": "nowhere"}, ok=404)
    made = old(cloud, "POST", "/os-floating-ips", None)["floating_ip"]
    assert act(cloud, s, "addFloatingIp", {"address": "192.0.2.1"}, ok=404) == "floating IP not found"
    assert "not assigned" in act(
        cloud, s, "addFloatingIp", {"address": made["ip"], "fixed_address": "10.9.9.9"}, ok=400
    )
    assert "ipv4" in act(cloud, s, "addFloatingIp", {"address": "one"}, ok=400)
    bare = cloud.boot("bare", networks="none")
    assert act(cloud, bare, "addFloatingIp", {"address": made["ip"]}, ok=400) == "No fixed IPs associated to instance"
    act(cloud, s, "addFloatingIp", {"address": made["ip"]}, ok=404, version="2.44")
    bob = cloud.services.person("bob", "member")
    assert old(cloud, "GET", "/os-floating-ips", token=bob.token)["floating_ips"] == []
    old(cloud, "GET", f"/os-floating-ips/{made['id']}", ok=404, token=bob.token)
    old(cloud, "DELETE", f"/os-floating-ips/{made['id']}", ok=404, token=bob.token)


# ---- fixed addresses


def test_a_fixed_address_more_and_less(cloud):
    s = cloud.boot()
    first = addresses(s)
    assert act(cloud, s, "addFixedIp", {"networkId": private(cloud).id}) is None
    more = addresses(s)
    assert len(more) == 2 and more[0] == first[0]
    assert act(cloud, s, "removeFixedIp", {"address": first[0]}) is None
    assert addresses(s) == more[1:]
    assert "not associated" in act(cloud, s, "removeFixedIp", {"address": "10.9.9.9"}, ok=400)
    assert "could not be found" in act(cloud, s, "addFixedIp", {"networkId": NOBODY}, ok=400)
    s.act("lock")
    assert "locked" in act(cloud, s, "addFixedIp", {"networkId": private(cloud).id}, ok=409)
    act(cloud, s, "addFixedIp", {"networkId": private(cloud).id}, ok=404, version="2.44")


# ---- security groups


def test_groups_and_rules(cloud):
    wish = {"security_group": {"name": " web ", "description": "what is served"}}
    made = old(cloud, "POST", "/os-security-groups", wish)["security_group"]
    assert (made["name"], made["description"], made["rules"]) == (" web ", "what is served", [])
    rule = {"parent_group_id": made["id"], "ip_protocol": "tcp", "from_port": 80, "to_port": "81", "cidr": "10.0.0.0/8"}
    one = old(cloud, "POST", "/os-security-group-rules", {"security_group_rule": rule})["security_group_rule"]
    assert (one["from_port"], one["to_port"], one["ip_range"], one["group"]) == (80, 81, {"cidr": "10.0.0.0/8"}, {})
    between = {"parent_group_id": made["id"], "group_id": made["id"]}
    two = old(cloud, "POST", "/os-security-group-rules", {"security_group_rule": between})["security_group_rule"]
    assert (two["ip_protocol"], two["group"]["name"], two["ip_range"]) == (None, " web ", {})
    again = old(cloud, "POST", "/os-security-group-rules", {"security_group_rule": rule}, ok=400)
    assert sentence(again) == "This rule already exists in group"
    names = [g["name"] for g in old(cloud, "GET", "/os-security-groups")["security_groups"]]
    assert names == [" web ", "default"]
    assert len(old(cloud, "GET", "/os-security-groups?limit=1&offset=0")["security_groups"][0]["rules"]) == 2
    other = {"security_group": {"name": "www", "description": ""}}
    assert old(cloud, "PUT", f"/os-security-groups/{made['id']}", other)["security_group"]["name"] == "www"
    old(cloud, "DELETE", f"/os-security-group-rules/{one['id']}", ok=202)
    assert len(old(cloud, "GET", f"/os-security-groups/{made['id']}")["security_group"]["rules"]) == 1
    old(cloud, "DELETE", f"/os-security-groups/{made['id']}", ok=202)
    old(cloud, "GET", f"/os-security-groups/{made['id']}", ok=404)


BAD_RULES = [
    {"ip_protocol": "tcp"},
    {"ip_protocol": "tcp", "from_port": 2, "to_port": 1},
    {"ip_protocol": "tcp", "from_port": 0, "to_port": 70000},
    {"ip_protocol": "icmp", "from_port": 300, "to_port": 0},
    {"ip_protocol": "carrier pigeon", "from_port": 1, "to_port": 1},
    {"ip_protocol": "udp", "from_port": "a", "to_port": True},
    {"ip_protocol": "udp", "from_port": 1, "to_port": 1, "cidr": "everywhere"},
    {"ip_protocol": "udp", "from_port": 1, "to_port": 1, "cidr": 5},
    {},
]


def test_groups_and_rules_that_make_no_sense(cloud):
    (default,) = old(cloud, "GET", "/os-security-groups")["security_groups"]
    for bad in BAD_RULES:
        body = {"security_group_rule": {"parent_group_id": default["id"], **bad}}
        old(cloud, "POST", "/os-security-group-rules", body, ok=400)
    body = {"security_group_rule": {"parent_group_id": NOBODY, "group_id": default["id"]}}
    old(cloud, "POST", "/os-security-group-rules", body, ok=404)
    wish = {"security_group": {"name": "a", "description": "b"}}
    old(cloud, "PUT", f"/os-security-groups/{default['id']}", wish, ok=400)
    old(cloud, "POST", "/os-security-groups", {"security_group": {"name": " ", "description": ""}}, ok=400)
    for method, path, ok in (
        ("GET", "/os-security-groups/x", 400),
        ("DELETE", f"/os-security-groups/{NOBODY}", 404),
        ("DELETE", "/os-security-group-rules/x", 400),
        ("DELETE", f"/os-security-group-rules/{NOBODY}", 404),
    ):
        old(cloud, method, path, ok=ok)
    used = old(cloud, "POST", "/os-security-groups", {"security_group": {"name": "used", "description": ""}})
    act(cloud, cloud.boot(), "addSecurityGroup", {"name": "used"})
    said = old(cloud, "DELETE", f"/os-security-groups/{used['security_group']['id']}", ok=400)
    assert "in use" in sentence(said)


def test_a_servers_groups(cloud):
    """In all versions: they are the ports' own."""
    s = cloud.boot()
    made = old(cloud, "POST", "/os-security-groups", {"security_group": {"name": "web", "description": ""}})
    assert act(cloud, s, "addSecurityGroup", {"name": "web"}, version="2.96") is None
    assert act(cloud, s, "addSecurityGroup", {"name": made["security_group"]["id"]}, version="2.96") is None
    assert [g["name"] for g in s.show()["security_groups"]] == ["default", "web"]
    shown = cloud.json("GET", f"/servers/{s.id}/os-security-groups")["security_groups"]
    assert sorted(g["name"] for g in shown) == ["default", "web"]
    assert {r["group"].get("name") for g in shown if g["name"] == "default" for r in g["rules"]} == {"default"}
    assert act(cloud, s, "removeSecurityGroup", {"name": "web"}) is None
    assert "not associated" in act(cloud, s, "removeSecurityGroup", {"name": "web"}, ok=404)
    assert "not found" in act(cloud, s, "addSecurityGroup", {"name": "nobody"}, ok=404)
    bare = cloud.boot("bare", networks="none")
    act(cloud, bare, "addSecurityGroup", {"name": "web"}, ok=404)
    assert cloud.json("GET", f"/servers/{bare.id}/os-security-groups") == {"security_groups": []}


# ---- networks


def test_networks_are_names(cloud):
    for path in ("/os-networks", "/os-tenant-networks"):
        labels = {n["label"]: n["id"] for n in old(cloud, "GET", path)["networks"]}
        assert "private" in labels
        one = old(cloud, "GET", f"{path}/{labels['private']}")["network"]
        assert (one["label"], one["id"]) == ("private", labels["private"])
        old(cloud, "GET", f"{path}/{NOBODY}", ok=404)
        old(cloud, "GET", path, ok=404, version="2.36")
    mine, admins = (old(cloud, "GET", "/os-networks", token=t)["networks"][0] for t in ("", cloud.admin))
    assert len(mine) == 11 and len(admins) == 32 and admins["mtu"] is None


# ---- images


def test_images(cloud):
    session = cloud.services
    wish = {"name": "mine", "disk_format": "raw", "container_format": "bare", "min_ram": 64, "auto_disk_config": "true"}
    mine = session.json("POST", "/image/v2/images", wish | {"instance_uuid": NOBODY}, cloud.user.token, ok=201)["id"]
    shown = old(cloud, "GET", f"/images/{mine}")["image"]
    assert (shown["status"], shown["progress"], shown["minRam"], shown["OS-DCF:diskConfig"]) == (
        "SAVING",
        25,
        64,
        "AUTO",
    )
    assert shown["server"]["id"] == NOBODY and shown["links"][2]["href"].endswith(f"/image/images/{mine}")
    assert old(cloud, "GET", f"/images/{cloud.image_id}")["image"]["status"] == "ACTIVE"

    def names(query):
        return [i["name"] for i in old(cloud, "GET", f"/images?{query}")["images"]]

    assert sorted(names("")) == ["mine", "tiny"]
    assert names("status=ACTIVE") == names("name=tiny") == names("limit=1&marker=" + mine) == ["tiny"]
    assert names(f"server=http://x/servers/{NOBODY}") == names("minRam=64") == names("property-auto_disk_config=true")
    page = old(cloud, "GET", "/images/detail?limit=1")
    assert (len(page["images"]), page["images_links"][0]["rel"]) == (1, "next")
    old(cloud, "GET", "/images?limit=0", ok=400)
    old(cloud, "GET", "/images?limit=-1", ok=400)
    old(cloud, "DELETE", f"/images/{cloud.image_id}", ok=403)
    old(cloud, "DELETE", f"/images/{mine}", ok=204)
    old(cloud, "DELETE", f"/images/{mine}", ok=404)
    old(cloud, "GET", "/images/x", ok=404)
    old(cloud, "GET", "/images", ok=404, version="2.36")


def test_the_metadata_of_images(cloud):
    wish = {"name": "mine", "disk_format": "raw", "container_format": "bare", "a": "b"}
    mine = cloud.services.json("POST", "/image/v2/images", wish, cloud.user.token, ok=201)["id"]
    path = f"/images/{mine}/metadata"

    def meta(method, path, body=None, ok=200):
        return old(cloud, method, path, body, ok=ok, version="2.38")

    assert meta("GET", path) == {"metadata": {"a": "b"}}
    assert meta("POST", path, {"metadata": {"c.d": "e", "a": "B"}}) == {"metadata": {"a": "B", "c.d": "e"}}
    assert meta("PUT", path, {"metadata": {"x": "y"}}) == {"metadata": {"x": "y"}}
    assert meta("PUT", f"{path}/k", {"meta": {"k": "v"}}) == {"meta": {"k": "v"}}
    assert meta("GET", f"{path}/k") == {"meta": {"k": "v"}}
    meta("DELETE", f"{path}/k", ok=204)
    meta("DELETE", f"{path}/k", ok=404)
    meta("GET", f"{path}/k", ok=404)
    meta("PUT", f"{path}/k", {"meta": {"other": "v"}}, ok=400)
    meta("POST", path, {"metadata": {"owner": "me"}}, ok=400)
    meta("POST", path, {"metadata": {str(i): "" for i in range(129)}}, ok=403)
    meta("POST", f"/images/{cloud.image_id}/metadata", {"metadata": {"a": "b"}}, ok=403)
    meta("GET", f"/images/{NOBODY}/metadata", ok=404)
    old(cloud, "GET", path, ok=404, version="2.39")


# ---- volumes


def test_volumes_and_snapshots(cloud):
    wish = {"volume": {"size": "1", "display_name": "v", "display_description": "d", "metadata": {"a": "b"}}}
    made = old(cloud, "POST", "/os-volumes", wish)["volume"]
    assert (made["displayName"], made["size"], made["metadata"], made["attachments"]) == ("v", 1, {"a": "b"}, [{}])
    cloud.settle()
    shown = old(cloud, "GET", f"/os-volumes/{made['id']}")["volume"]
    assert [v["id"] for v in old(cloud, "GET", "/os-volumes/detail?limit=1")["volumes"]] == [made["id"]]
    assert old(cloud, "GET", "/os-volumes?offset=1")["volumes"] == []
    snap = {"snapshot": {"volume_id": made["id"], "display_name": "s", "force": True}}
    taken = old(cloud, "POST", "/os-snapshots", snap)["snapshot"]
    assert (taken["volumeId"], taken["size"], taken["displayName"]) == (shown["id"], 1, "s")
    assert old(cloud, "GET", f"/os-snapshots/{taken['id']}")["snapshot"]["id"] == taken["id"]
    assert len(old(cloud, "GET", "/os-snapshots")["snapshots"]) == 1
    bob = cloud.services.person("bob", "member")
    for path in (f"/os-volumes/{made['id']}", f"/os-snapshots/{taken['id']}"):
        old(cloud, "GET", path, ok=404, token=bob.token)
        old(cloud, "DELETE", path, ok=404, token=bob.token)
    cloud.settle()
    old(cloud, "DELETE", f"/os-snapshots/{taken['id']}", ok=202)
    cloud.settle()
    old(cloud, "DELETE", f"/os-volumes/{made['id']}", ok=202)
    cloud.settle()
    old(cloud, "GET", f"/os-volumes/{NOBODY}", ok=404)
    old(cloud, "POST", "/os-snapshots", {"snapshot": {"volume_id": NOBODY}}, ok=400)
    old(cloud, "POST", "/os-volumes", {"volume": {"size": 0}}, ok=400)
    old(cloud, "GET", "/os-volumes", ok=404, version="2.36")


def test_there_is_no_bare_metal(cloud):
    cloud.json("GET", "/os-baremetal-nodes", ok=501, version=OLD, token=cloud.admin)
    cloud.json("GET", "/os-baremetal-nodes", ok=403, version=OLD)
    for method, path, body in (
        ("POST", "", {"node": {}}),
        ("DELETE", "/x", None),
        ("POST", "/x/action", {"add_interface": {}}),
        ("POST", "/x/action", {"remove_interface": {}}),
    ):
        said = cloud.json(method, f"/os-baremetal-nodes{path}", body, ok=400, version=OLD)
        assert "Ironic command" in sentence(said)


# ---- as specified


def body_of(cloud, key, ids):
    return {
        "POST /os-floating-ips": {"pool": None},
        "POST /os-security-groups": {"security_group": {"name": "n", "description": ""}},
        "PUT /os-security-groups/{id}": {"security_group": {"name": "m", "description": ""}},
        "POST /os-security-group-rules": {
            "security_group_rule": {
                "parent_group_id": ids["group"],
                "ip_protocol": "icmp",
                "from_port": -1,
                "to_port": -1,
            }
        },
        "POST /images/{image_id}/metadata": {"metadata": {"c": "d"}},
        "PUT /images/{image_id}/metadata": {"metadata": {"a": "b"}},
        "PUT /images/{image_id}/metadata/{id}": {"meta": {"a": "b"}},
        "POST /os-volumes": {"volume": {"size": 1}},
        "POST /os-snapshots": {"snapshot": {"volume_id": ids["volume"], "force": True}},
    }.get(key)


@pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")
def test_what_is_answered_is_as_specified(cloud):
    s = cloud.boot()
    network = cloud.neighbours.network
    wish = {"name": "mine", "disk_format": "raw", "container_format": "bare", "a": "b", "instance_uuid": s.id}
    volume = old(cloud, "POST", "/os-volumes", {"volume": {"size": 1, "display_name": "v"}})["volume"]["id"]
    cloud.settle()
    snap = old(cloud, "POST", "/os-snapshots", {"snapshot": {"volume_id": volume, "force": True}})["snapshot"]["id"]
    pool = next(n for n in network.networks() if n.external)
    floating = network.create_floating_ip(pool.id, cloud.user.token)
    network.point_floating_ip(floating.id, s.row.plugs[0].port_id, token=cloud.user.token)
    group = old(cloud, "POST", "/os-security-groups", {"security_group": {"name": "g", "description": ""}})
    ids = {
        "image": cloud.services.json("POST", "/image/v2/images", wish, cloud.user.token, ok=201)["id"],
        "group": group["security_group"]["id"],
        "volume": volume,
    }
    rule = {"security_group_rule": {"parent_group_id": ids["group"], "group_id": ids["group"]}}
    old(cloud, "POST", "/os-security-group-rules", rule)
    of = {
        "images": ids["image"], "os-networks": private(cloud).id, "os-tenant-networks": private(cloud).id,
        "os-floating-ips": floating.id, "os-security-groups": ids["group"], "os-volumes": volume, "os-snapshots": snap,
        "image-metadata": "a",
    }  # fmt: skip
    wrong, seen = [], 0
    for key, entry, (first, last) in tables.routes():
        group_name = next((g for g in GROUPS if any(e["route"] == key for e in tables.group(g))), None)
        if group_name is None or not isinstance(entry.get("response"), dict):
            continue
        method, path = key.split()
        path = path.replace("{id}", of.get(group_name, "")).replace("{image_id}", ids["image"])
        path = path.replace("{server_id}", s.id)
        for v in {first, last}:
            for token in ("", cloud.admin) if method == "GET" and "image" not in key else ("",):
                said = old(cloud, method, path, body_of(cloud, key, ids), version=f"2.{v}", token=token)
                wrong += [f"{key} 2.{v}: {d}" for d in tables.disagreements(tables.said(entry, "response", v), said)]
                seen += 1
            if method == "POST" and "security" in key:
                made = next(iter(said.values()))["id"]
                old(cloud, "DELETE", f"{re.sub('/action.*', '', path)}/{made}", ok=202)
    assert wrong == [] and seen > 40
    assert isinstance(s.row.plugs[0].addresses[0], Address)
    cloud.settle()
