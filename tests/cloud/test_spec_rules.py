"""Rules that are asked in some cases only, and rules that only add something to an answer: each is asked where the specification
says so, for what it is by default and for what an operator makes of it.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest

from kilonova.api.policies import RULES
from kilonova.cli.config import policies
from kilonova.kit.policy import Policy
from kilonova.model import options
from kilonova.model.options import Config
from tests.cloud import tables
from tests.cloud.prepared import NOBODY, Prepared
from tests.cloud.test_spec_routes import entries
from tests.stories import Cloud

pytestmark = pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")

ROOT = {"source_type": "image", "destination_type": "volume", "volume_size": 1, "boot_index": 0}


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    quota = options.Quota(instances=-1, cores=-1, ram=-1)
    c = Cloud(tmp_path_factory.mktemp("rules"), hosts=3, config=Config(quota=quota))
    flavor = {"name": "none", "id": "none", "vcpus": 1, "ram": 64, "disk": 0}
    c.json("POST", "/flavors", {"flavor": flavor}, token=c.admin)
    return c


@contextlib.contextmanager
def overridden(cloud, **checks: str) -> Iterator[None]:
    """As an operator's `policy.yaml` would have it."""
    before = cloud.api.policy
    cloud.api.policy = Policy([r._replace(check=checks.get(r.name, r.check)) for r in RULES])
    yield
    cloud.api.policy = before


def status(cloud, token: str, method: str, path: str, body: Any, version: str) -> int:
    cloud.clock.sleep(0.001)
    answer = cloud.services.ask(
        method, f"/compute/v2.1{path}", body, token, **{"OpenStack-API-Version": f"compute {version}"}
    )
    answer.read()
    return int(answer.status)


class Case(NamedTuple):
    """A request in which the rule is asked; {server}: one that is as `state` says. What it asks for need not be there."""

    method: str
    path: str
    body: Any = None
    version: str = "2.96"
    state: str = ""


def create(**more: Any) -> Case:
    wish = {"name": "n", "flavorRef": "small", "imageRef": "{image}", "networks": [{"uuid": NOBODY}], **more}
    return Case("POST", "/servers", {"server": wish})


def act(verb: str, said: Any, version: str = "2.96", state: str = "active") -> Case:
    return Case("POST", "/servers/{server}/action", {verb: said}, version, state)


ACTION = "/servers/{server}/os-instance-actions/{request}"
SWAP = {"volumeAttachment": {"volumeId": NOBODY}}
LIVE = {"host": None, "block_migration": "auto"}
# fmt: off
CASES = {
    "os_compute_api:limits:other_project": Case("GET", f"/limits?tenant_id={NOBODY}"),
    "os_compute_api:os-migrations:index:all_projects": Case("GET", "/os-migrations"),
    "os_compute_api:os-server-groups:index:all_projects": Case("GET", "/os-server-groups?all_projects=1"),
    "os_compute_api:servers:detail:get_all_tenants": Case("GET", "/servers/detail?all_tenants=1"),
    "os_compute_api:servers:index:get_all_tenants": Case("GET", "/servers?all_tenants=1"),
    "os_compute_api:servers:create:attach_volume": create(block_device_mapping_v2=[{"uuid": NOBODY, "boot_index": 0, "source_type": "volume", "destination_type": "volume"}]),
    "os_compute_api:servers:create:attach_network": create(),
    "os_compute_api:servers:create:trusted_certs": create(trusted_image_certificates=[NOBODY]),
    "os_compute_api:servers:create:forced_host": create(availability_zone="nova:h0"),
    "compute:servers:create:requested_destination": create(host="h0"),
    "os_compute_api:servers:rebuild:trusted_certs": act("rebuild", {"imageRef": NOBODY, "trusted_image_certificates": [NOBODY]}),
    "os_compute_api:servers:create_image:allow_volume_backed": act("createImage", {"name": "i"}, state="on a volume"),
    "os_compute_api:servers:create:zero_disk_flavor": create(flavorRef="none", networks="none"),
    "network:attach_external_network": create(networks=[{"uuid": "{public}"}]),
    "os_compute_api:os-lock-server:unlock:unlock_override": act("unlock", None, state="locked by the other"),
    "os_compute_api:os-migrate-server:migrate:host": act("migrate", {"host": "nowhere"}),
    "os_compute_api:os-migrate-server:migrate": act("migrate", None),
    "os_compute_api:os-migrate-server:migrate_live:host": act("os-migrateLive", LIVE | {"host": "nowhere"}),
    "os_compute_api:os-migrate-server:migrate_live": act("os-migrateLive", LIVE),
    "os_compute_api:os-shelve:unshelve_to_host": act("unshelve", {"host": "nowhere"}, "2.91"),
    "os_compute_api:os-volumes-attachments:swap": Case("PUT", f"/servers/{{server}}/os-volume_attachments/{NOBODY[:-1]}0", SWAP, "2.85", "active"),
    "os_compute_api:os-volumes-attachments:update": Case("PUT", f"/servers/{{server}}/os-volume_attachments/{NOBODY}", SWAP, "2.85", "active"),
}
# fmt: on
BASE = {
    "os_compute_api:os-migrations:index:all_projects": {"os_compute_api:os-migrations:index": "@"}
}  # else asked before
SILENT = {"os_compute_api:os-server-groups:index:all_projects"}  # who may not has what he may see


def conditional() -> list[tuple[str, str]]:
    """(rule, default) of all that are asked in some cases."""
    told = [p for e in entries() for p in e.get("policy", []) if "when" in p and "effect" not in p]
    return sorted({(p["rule"], p["default"]) for p in told})


def test_each_has_its_case():
    assert {rule for rule, _ in conditional()} == CASES.keys()


def prepared(cloud, case: Case, owner: str) -> Case:
    """With a new server, where it is about one; `owner` locked it if it is locked."""
    server = ""
    if case.state == "on a volume":
        server = cloud.boot("v", networks="none", imageRef="", block_device_mapping_v2=[ROOT | {"uuid": cloud.image_id}]).id  # fmt: skip
    elif case.state:
        server = cloud.boot("s", networks="none").id
    if case.state.startswith("locked"):
        cloud.json("POST", f"/servers/{server}/action", {"lock": None}, ok=202, token=owner)
    public = next(n.id for n in cloud.neighbours.network.networks() if n.external)
    words = {"{server}": server, "{image}": cloud.image_id, "{public}": public}
    told = msgspec.json.encode([case.path, case.body]).decode()
    path, body = msgspec.json.decode(re.sub("|".join(map(re.escape, words)), lambda m: words[m[0]], told))
    return case._replace(path=path, body=body)


@pytest.mark.parametrize(("rule", "default"), conditional() if tables.FOLDER.exists() else [])
def test_a_rule_of_some_cases(cloud, rule, default):
    alice, admin = cloud.user.token, cloud.admin
    little = default in ("admin", "service|admin", "project-manager|admin")
    for who, check, owner, refused in (
        (alice, None, admin, little and rule not in SILENT),
        (alice, "@", admin, False),
        (admin, "!", alice, True),
        (admin, None, alice, False),
    ):
        method, path, body, version, _ = prepared(cloud, CASES[rule], owner)
        with overridden(cloud, **BASE.get(rule, {}), **({rule: check} if check else {})):
            got = status(cloud, who, method, path, body, version)
        cloud.settle()
        assert (got == 403) is refused, (check, got)
        assert got < 500
    for s in cloud.json("GET", "/servers")["servers"]:
        cloud.json("DELETE", f"/servers/{s['id']}", token=cloud.admin, ok=204)
    cloud.settle()


# ---- what is only added


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    there = Prepared(tmp_path_factory.mktemp("added"))
    there.manager = there.cloud.services.person("max", "manager", project_name="of-alice").token
    return there


# rule → (path, since which version, whose token, what stands there only for those who may)
ADDED = {
    "os_compute_api:os-extended-server-attributes": ("/servers/{server}", 1, "alice", '"OS-EXT-SRV-ATTR:host"'),
    "os_compute_api:servers:show:host_status": ("/servers/{server}", 16, "alice", '"host_status"'),
    "os_compute_api:servers:show:flavor-extra-specs": ("/servers/{server}", 47, "reader", '"extra_specs"'),
    "os_compute_api:os-flavor-extra-specs:index": ("/flavors/small", 61, "reader", '"extra_specs"'),
    "os_compute_api:os-migrations:index:host": ("/os-migrations?project_id={project}", 80, "manager", '"source_compute":"h'),
    "os_compute_api:servers:migrations:index:host": ("/servers/{moving}/migrations", 23, "manager", '"source_compute":"h'),
    "os_compute_api:os-instance-actions:events": (ACTION, 1, "alice", '"traceback"'),
    "os_compute_api:os-instance-actions:events:details": (ACTION, 84, "alice", '"details"'),
    "os_compute_api:servers:allow_all_filters": ("/servers?host=elsewhere", 1, "alice", r'"servers":\[\]'),
}  # fmt: skip
UNSEEN = {
    "compute:servers:resize:cross_cell": "there is one cell",
    "compute:server:topology:host:index": "`test_seats.py` has a server that sits somewhere",
    "os_compute_api:servers:show:host_status:unknown-only": "it has a test of its own",
}


def additions() -> list[tuple[str, str]]:
    told = [p for e in entries() for p in e.get("policy", []) if "effect" in p]
    return sorted({(p["rule"], p["default"]) for p in told if p["rule"] not in UNSEEN})


def test_each_addition_has_its_place():
    told = {p["rule"] for e in entries() for p in e.get("policy", []) if "effect" in p}
    assert told == ADDED.keys() | UNSEEN.keys()


@pytest.mark.parametrize(("rule", "default"), additions() if tables.FOLDER.exists() else [])
def test_a_rule_that_adds(there, rule, default):
    path, since, who, mark = ADDED[rule]
    words = {"server": there.server, "moving": there.moving, "project": there.cloud.user.project_id}
    path = path.format(**words, request=there.names["os-instance-actions"])
    for version in {since, 104}:
        for check, seen in ((None, default != "admin"), ("@", True), ("!", False)):
            with overridden(there.cloud, **({rule: check} if check else {})):
                status, raw = there.call("GET", path, token=getattr(there, who), version=version)
            assert status == 200
            assert bool(re.search(mark, raw.decode())) is seen, (version, check)
    if since > 1:
        status, raw = there.call("GET", path, token=there.admin, version=since - 1)
        assert status == 404 or not re.search(mark, raw.decode())


def test_that_nobody_hears_of_its_host_may_be_told_alone(there):
    """`host_status` only where it is UNKNOWN, to those who may see no more."""
    only = {"os_compute_api:servers:show:host_status:unknown-only": "@"}
    seen = lambda: msgspec.json.decode(there.call("GET", f"/servers/{there.server}", token=there.alice)[1])["server"]
    with overridden(there.cloud, **only):
        assert "host_status" not in seen()
        there.cloud.clock.sleep(600)
        assert seen()["host_status"] == "UNKNOWN"
    assert "host_status" not in seen()


# ---- the reference


def test_the_reference_says_what_holds_and_where_it_is_asked(tmp_path):
    """An operator's file may begin with it: as it stands it changes nothing, and uncommented neither."""
    text = policies()
    told = dict(re.findall(r'^#"(.+?)": "(.*)"$', text, re.MULTILINE))
    assert {r.name for r in RULES} <= told.keys() and len(told) > 500
    stops = text[: text.index('#"os_compute_api:servers:stop"')].rpartition("\n\n")[2].splitlines()
    assert stops == [
        "# POST /v2.1/os-volumes_boot/{id}/action (os-stop)  until 2.102",
        "# POST /v2.1/servers/{id}/action (os-stop)",
        "# Scope: project",
    ]
    compute = text[: text.index("# ---- Placement")].strip().split("\n\n")[1:]
    assert [one for one in compute if not one.startswith("# ")] == []  # each says where it is asked, or what it is for
    file = tmp_path / "policy.yaml"
    file.write_text(re.sub(r'^#(")', r"\1", text[: text.index("# ---- Placement")], flags=re.MULTILINE))
    judge, born = Policy(RULES, file), Policy(RULES)
    for r in RULES:
        assert str(judge.enforcer.rules[r.name]) == str(born.enforcer.rules[r.name])
