"""What is answered, as an administrator and as a user see it, held against the specification wherever a version changed it."""

import re

import msgspec
import pytest

from kilonova.contracts.conductor import Report
from kilonova.kit.errors import Conflict
from kilonova.kit.workflow import Cause, noted
from kilonova.model.host import HostFacts, Stock
from kilonova.model.machine import Keypair
from kilonova.model.server import Address, Image, Plug
from kilonova.model.states import VM
from kilonova.store import catalog, hosts, migrations, servers
from kilonova.store.migrations import Kind, Status
from tests.cloud import tables
from tests.cloud.rooms import FLAVOR, Rooms
from tests.cloud.tables import changes, disagreements, said
from tests.cloud.test_api_small import answers as small
from tests.cloud.test_legacy import GROUPS as LEGACY
from tests.cloud.test_spec_routes import ours, place

pytestmark = pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPYvM5xQfZ0C0HjQ2TDFdGEsVYEg1N3bLrqIKVGFc3Wm me@home"
FACTS = HostFacts(
    8, 16384, 100, 90, "QEMU", 7002022, "h1", {"arch": "x86_64", "topology": {"cores": 4}}, uptime="up 1 day"
)


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """One of everything that can be shown."""
    rooms = Rooms(tmp_path_factory.mktemp("answers"))
    rooms.token = rooms.admin()
    now = rooms.clock.now()
    with rooms.db.tx() as tx:
        stocks = [Stock("VCPU", 8), Stock("MEMORY_MB", 16384), Stock("DISK_GB", 100)]
        hosts.learn(
            tx,
            Report("h1", now, now, [], facts=FACTS, stocks=stocks, host_ip="192.0.2.1"),
            uuid=rooms.ids.uuid,
            now=now,
        )
        catalog.add_flavor(tx, msgspec.structs.replace(FLAVOR, id="2", name="two", extra_specs={"hw:x": "y"}), now)
        catalog.add_flavor(tx, msgspec.structs.replace(FLAVOR, id="3", name="three", is_public=False), now)
        catalog.allow_flavor(tx, "3", "p" * 32)
        node = hosts.nodes(tx)[0]
    rooms.call("POST", "/os-keypairs", {"keypair": {"name": "mine", "public_key": KEY}}, rooms.token)
    plugs = [
        Plug(
            rooms.ids.uuid(),
            rooms.ids.uuid(),
            "net",
            "fa:16:3e:00:00:01",
            [Address("10.0.0.7"), Address("172.24.4.9", 4, True)],
            ["default"],
        )
    ]
    image = Image(rooms.ids.uuid(), "img", properties={"a": "b"})
    project = rooms.first.admin_project_id
    rooms.one = rooms.server(project, plugs=plugs, image=image, keypair=Keypair("mine", KEY), host="h1", node="h1", tags=["a"], metadata={"a": "b"},
                             user_data="eA==", locked_by="owner", locked_reason="why", availability_zone="nova")  # fmt: skip
    with rooms.db.tx() as tx:
        run = noted(tx, id=rooms.ids.uuid(), subject=rooms.one.id, now=now, cause=Cause(action="lock", request_id=rooms.ids.request(), user_id="u", project_id=project), event="api_lock")  # fmt: skip
        moving = migrations.begin(
            tx, rooms.one, Kind.live, Status.running, uuid=rooms.ids.uuid(), now=now, was="active"
        )
        migrations.begin(tx, rooms.one, Kind.resize, Status.finished, uuid=rooms.ids.uuid(), now=now, was="active", flavor=FLAVOR)  # fmt: skip
        rooms.moving = migrations.get(tx, moving).id
    rooms.server(project, vm_state=VM.error, name="broken", fault_run=run)
    rooms.names = {
        "/os-hypervisors/{id}": (str(node.id), node.uuid),
        "/os-hypervisors/{id}/uptime": (str(node.id), node.uuid),
        "/os-hypervisors/{id}/search": ("h1", ""),
        "/os-hypervisors/{id}/servers": ("h1", ""),
        "/os-services/{id}": ("enable", node.service.uuid),
    }
    rooms.image_id = _image(rooms)
    return rooms


def _image(rooms):
    wish = {"name": "i", "disk_format": "raw", "container_format": "bare"}
    id = rooms.json("POST", "/image/v2/images", wish, rooms.token, ok=201)["id"]
    rooms.json(
        "PUT", f"/image/v2/images/{id}/file", b"\0" * 512, rooms.token, ok=204, Content_Type="application/octet-stream"
    )
    return id


# Groups whose own tests hold their answers against the specification.
ELSEWHERE = (
    *LEGACY,
    "os-assisted-volume-snapshots",
    "os-baremetal-nodes",
    "os-console-auth-tokens",
    "os-hosts",
    "os-instance-usage-audit-log",
    "os-interface",
    "os-server-external-events",
    "os-server-groups",
    "os-volume_attachments",
    "os-volumes_boot",  # servers under an older name
    "remote-consoles",
    "server-shares",
)


ASK_HOSTS = {
    "POST /servers/{id}/action#os-getConsoleOutput",
    "GET /servers/{server_id}/diagnostics",
}  # there are none here


def others():
    """The routes whose answers no other file looks at."""
    if not tables.FOLDER.exists():
        return []
    done = {e["route"] for g in ELSEWHERE for e in tables.group(g)}
    done |= {f"POST /servers/{{id}}/action#os-get{k}Console" for k in ("VNC", "SPICE", "Serial", "RDP")}
    done |= {p.values[0] for p in small()} | {"POST /servers/{id}/action#os-getConsoleOutput"}
    done |= {p.values[0] for p in small()} | ASK_HOSTS
    found = []
    for key, entry, (first, last) in tables.routes():
        method, path, action = re.fullmatch(r"(\S+) ([^#\s]+)(?:#(\S+))?", key).groups()
        known = ours().get(place(method, path, action), [])
        if key not in done and known and not known[0].gone and isinstance(entry.get("response"), dict):
            found.append(pytest.param(key, entry, first, last, id=f"{key} {entry['versions']}"))
    return found


def path_of(api, key, version):
    path, _, action = key.split(" ")[1].partition("#")
    if action == "evacuate":
        return f"/servers/{api.server(api.first.admin_project_id, host='down', node='down').id}/action"
    if path in api.names:
        return path.replace("{id}", api.names[path][version >= 53])
    with api.db.read() as tx:
        run = tx.execute(servers.sa.text("select request_id from runs where subject = :s"), {"s": api.one.id}).scalar()
    id = {
        "/flavors/{id}": "2", "/flavors/{id}/action": "3", "/flavors/{flavor_id}/os-extra_specs/{id}": "hw:x",
        "/os-keypairs/{id}": "mine", "/servers/{id}": api.one.id, "/servers/{id}/action": api.one.id, "/servers/{server_id}/os-instance-actions/{id}": run,
        "/servers/{server_id}/migrations/{id}": str(api.moving), "/os-quota-class-sets/{id}": "default", "/versions/{id}": "v2.1",
    }.get(path, api.first.admin_project_id)  # fmt: skip
    if "tenant-usage" in path:
        path += "?start=2020-01-01T00:00:00&end=2100-01-01" + ("" if "{id}" in path else "&detailed=1")
    flavor = "3" if path.endswith("access") else "2"
    return path.replace("{id}", id).replace("{server_id}", api.one.id).replace("{flavor_id}", flavor)


def body_of(api, key, version):
    n = api.ids.hex()[:12]
    nets = {"networks": "none"} if version >= 37 else {}
    service = {"status": "enabled"} if version >= 53 else {"host": "h1", "binary": "nova-compute"}
    return {
        "POST /flavors": {"flavor": {"name": n, "ram": 64, "vcpus": 1, "disk": 1}},
        "PUT /flavors/{id}": {"flavor": {"description": n}},
        "POST /flavors/{id}/action#addTenantAccess": {"addTenantAccess": {"tenant": api.person(n).project_id}},
        "POST /flavors/{id}/action#removeTenantAccess": {"removeTenantAccess": {"tenant": "p" * 32}},
        "POST /flavors/{flavor_id}/os-extra_specs": {"extra_specs": {"hw:x": "z"}},
        "PUT /flavors/{flavor_id}/os-extra_specs/{id}": {"hw:x": "z"},
        "POST /os-keypairs": {"keypair": {"name": n, **({"public_key": KEY} if version >= 92 else {})}},
        "PUT /os-quota-class-sets/{id}": {"quota_class_set": {"cores": 20}},
        "PUT /os-quota-sets/{id}": {"quota_set": {"cores": 20}},
        "PUT /os-services/{id}": service,
        "POST /servers/{id}/action#evacuate": {"evacuate": {} if version >= 14 else {"onSharedStorage": False}},
        "POST /servers": {"server": {"name": n, "flavorRef": "2", "imageRef": api.image_id, **nets}},
        "PUT /servers/{id}": {"server": {"name": n}},
        "POST /servers/{id}/action#createImage": {"createImage": {"name": n}},
        "POST /servers/{id}/action#createBackup": {"createBackup": {"name": n, "backup_type": "d", "rotation": 1}},
        "POST /servers/{id}/action#rebuild": {"rebuild": {"imageRef": api.image_id}},
        "POST /servers/{id}/action#rescue": {"rescue": {"rescue_image_ref": api.image_id}},
    }.get(key)


def rested(api):
    """Nobody carries runs here: what the last action began is over."""
    with api.db.tx() as tx:
        tx.execute(servers.T.update().where(servers.T.c.id == api.one.id).values(task_state=None))


@pytest.mark.parametrize(("key", "entry", "first", "last"), others())
def test_answers(api, key, entry, first, last):
    wrong = []
    method, token = key.split(" ")[0], api.token
    for v in changes(entry["response"], first, last):
        if "removeTenant" in key:
            with api.db.tx() as tx:
                try:
                    catalog.allow_flavor(tx, "3", "p" * 32)
                except Conflict:
                    pass
        if key == "POST /servers":
            with api.db.tx() as tx:
                tx.execute(servers.T.update().where(servers.T.c.vm_state == "building").values(deleted_at=1.0))
        rested(api)
        answer = api.call(method, path_of(api, key, v), body_of(api, key, v), token, v)
        shapes = [said(entry, "response", v, second=second) for second in (False, True)]
        if answer.status >= 300:
            wrong.append(f"2.{v}: {answer.status} {answer.raw[:200]!r}")
        elif shapes[0] is not None:
            wrong += [
                f"2.{v} {d}"
                for d in min((disagreements(t, answer.json if answer.raw else None) for t in shapes), key=len)
            ]
    assert wrong == []
