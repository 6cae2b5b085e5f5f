"""Every sample of the specification goes round: what it asks is asked of a running cloud at its version, and what it was
answered with has the shape of what we answer. And all samples agree with the tables.
"""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cloud.prepared import Prepared

FOLDER = Path(__file__).parents[2].parent / "shared/spec/api_samples"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the specification is not beside this checkout")
NUMBERS = itertools.count(1)

# Where we differ, and why.
DIFFERS = {
    "os-keypairs/v2.92/keypairs-post-req.json": "it asks for a key to be made, which ended with 2.91: 400",
    "os-hypervisors/hypervisors-uptime-resp.json": "simulated hosts have no uptime: `test_spec_answers` has one that has",
    "os-hypervisors/v2.28/hypervisors-uptime-resp.json": "the same",
    "os-hypervisors/v2.53/hypervisors-uptime-resp.json": "the same",
    "os-services/v2.69/services-list-get-resp.json": "of a cell that is down; here there is one cell",
}
# What the sample calls something, and what is called so here; texts that must be new each time end in a number.
CALLED = {
    "fake_tenant": "{tenant}", "21549b2f665945baaa7101926a00143c": "h2", "bf1454b3d71145d49fca2101c56c728d": "h2",
    '"compute"': '"h2"', '"host1"': '"h2"', "70a599e0-31e7-49b7-b260-868f441e862b": "{image}", '"10"': '"{new}"',
    '"test_flavor"': '"{new}"', "keypair-ab9ff2e6-a6d7-4915-a241-044c369c07f9": "{new}",
    "keypair-d20a3d59-9433-4b79-8726-20b431d89c78": "{new}", '"user_id": "fake"': '"user_id": "{user}"',
    '"name": "name"': '"name": "{new}"', '"newname"': '"{new}"',
}  # fmt: skip
LOOSE = {"metadata", "extra_specs", "hosts", "cpu_info", "rules"}  # whose members are anybody's

# Sample → how it is asked; what stands in braces is made for it. A reply's file may have another name than its question's.
# fmt: off
ASKED = {
    "flavor-access-add-tenant":     "POST /flavors/{private}/action",
    "flavor-access-remove-tenant":  "POST /flavors/{granted}/action",
    "flavor-access-list":           "GET /flavors/{granted}/os-flavor-access",
    "flavor-create":                "POST /flavors",
    "flavor-create-post":           "POST /flavors",
    "flavor-update":                "PUT /flavors/{private}",
    "flavor-extra-specs-create":    "POST /flavors/{private}/os-extra_specs",
    "flavor-extra-specs-get":       "GET /flavors/{specified}/os-extra_specs/hw:numa_nodes",
    "flavor-extra-specs-list":      "GET /flavors/{specified}/os-extra_specs",
    "flavor-extra-specs-update":    "PUT /flavors/{specified}/os-extra_specs/hw:numa_nodes",
    "flavor-get":                   "GET /flavors/{specified}",
    "flavors-detail":               "GET /flavors/detail",
    "flavors-list":                 "GET /flavors",
    "limit-get":                    "GET /limits",
    "aggregate-add-host-post":      "POST /os-aggregates/{empty}/action",
    "aggregate-remove-host-post":   "POST /os-aggregates/{full}/action",
    "aggregate-metadata-post":      "POST /os-aggregates/{full}/action",
    "aggregate-images-post":        "POST /os-aggregates/{full}/images",
    "aggregate-post":               "POST /os-aggregates",
    "aggregate-update-post":        "PUT /os-aggregates/{empty}",
    "aggregates-get":               "GET /os-aggregates/{full}",
    "aggregates-list-get":          "GET /os-aggregates",
    "availability-zone-list":       "GET /os-availability-zone",
    "availability-zone-detail":     "GET /os-availability-zone/detail",
    "hypervisors-list":             "GET /os-hypervisors",
    "hypervisors-detail":           "GET /os-hypervisors/detail",
    "hypervisors-show":             "GET /os-hypervisors/{hypervisor}",
    "hypervisors-uptime":           "GET /os-hypervisors/{hypervisor}/uptime",
    "hypervisors-statistics":       "GET /os-hypervisors/statistics",
    "hypervisors-detail-with-servers": "GET /os-hypervisors/detail?with_servers=1&hypervisor_hostname_pattern={busy}",
    "hypervisors-show-with-servers":   "GET /os-hypervisors/{hypervisor}?with_servers=1",
    "hypervisors-search":           "GET /os-hypervisors/h/search | GET /os-hypervisors?hypervisor_hostname_pattern=h",
    "hypervisors-with-servers":     "GET /os-hypervisors/{busy}/servers | GET /os-hypervisors?with_servers=true&hypervisor_hostname_pattern={busy}",
    "hypervisors-without-servers":  "GET /os-hypervisors/{idle}/servers | GET /os-hypervisors?with_servers=true&hypervisor_hostname_pattern={idle}",
    "keypairs-get":                 "GET /os-keypairs/mine",
    "keypairs-import-post":         "POST /os-keypairs",
    "keypairs-list":                "GET /os-keypairs",
    "keypairs-list-user1":          "GET /os-keypairs?user_id={alice}",
    "keypairs-list-user2":          "GET /os-keypairs?user_id={alice}",
    "keypairs-post":                "POST /os-keypairs",
    "quotas-show-defaults-get":     "GET /os-quota-sets/{project}/defaults",
    "quotas-show-detail-get":       "GET /os-quota-sets/{project}/detail",
    "quotas-show-get":              "GET /os-quota-sets/{project}",
    "quotas-update-post":           "PUT /os-quota-sets/{project}",
    "quotas-update-force-post":     "PUT /os-quota-sets/{project}",
    "user-quotas-show-get":         "GET /os-quota-sets/{project}?user_id={user}",
    "user-quotas-update-post":      "PUT /os-quota-sets/{project}?user_id={user}",
    "server-groups-get":            "GET /os-server-groups/{group}",
    "server-groups-list":           "GET /os-server-groups",
    "server-groups-post":           "POST /os-server-groups",
    "service-disable-log-put":      "PUT /os-services/disable-log-reason | PUT /os-services/{service}",
    "service-disable-put":          "PUT /os-services/disable | PUT /os-services/{service}",
    "service-enable-put":           "PUT /os-services/enable | PUT /os-services/{service}",
    "service-force-down-put":       "PUT /os-services/force-down | PUT /os-services/{service}",
    "services-list-get":            "GET /os-services",
    "v2-version-get":               "GET /../v2/",
    "v21-version-get":              "GET /../v2.1/",
    "versions-get":                 "GET /../",
}
# fmt: on
REPLIES = {"aggregate-add-host-post", "aggregate-remove-host-post", "aggregate-metadata-post"}  # aggregates-… answers


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return Prepared(tmp_path_factory.mktemp("samples"))


def samples() -> list[Any]:
    """One for each thing that is asked: its name, its version, the question and the answer where there are such."""
    if not FOLDER.exists():
        return []
    known: dict[tuple[str, int, str], dict[str, Path]] = {}
    for file in sorted(FOLDER.rglob("*.json")):
        group, *between = file.relative_to(FOLDER).parts[:-1]
        version = int(between[0].removeprefix("v2.")) if between else 1
        stem, kind = file.stem.rsplit("-", 1)
        if (one := stem.replace("aggregates-", "aggregate-")) in REPLIES:
            stem = one
        known.setdefault((group, version, stem), {})[kind] = file
    return [pytest.param(*key, files, id=f"{key[0]} 2.{key[1]} {key[2]}") for key, files in known.items()]


@pytest.mark.parametrize(("group", "version", "stem", "files"), samples())
def test_it_goes_round(there, group, version, stem, files):
    told = {k: json.loads(f.read_text()) for k, f in files.items()}
    names = {str(f.relative_to(FOLDER)) for f in files.values()}
    if names & DIFFERS.keys():
        assert names <= DIFFERS.keys() | {n for n in names if n.endswith("-req.json")}
        return
    made = Made(there, version)
    method, path = made.filled(_of(ASKED[stem], version)).split(" ")
    wish = json.loads(made.filled(_called(files["req"].read_text()))) if "req" in files else None
    answer = told.get("resp")
    if method == "GET" and isinstance(answer, dict) and any(k.endswith("_links") for k in answer):
        path += ("&" if "?" in path else "?") + "limit=1"
    token = there.alice if "keypair" in stem and "user" not in stem and "user_id" not in str(wish) else there.admin
    if path.startswith("/../"):  # beside the API's own root
        answered = there.cloud.services.ask(method, f"/compute/{path[4:]}")
        status, raw = answered.status, answered.read()
    else:
        status, raw = there.call(method, path, wish, token=token, version=version)
    assert status < 300, (method, path, wish, raw)
    if answer is not None and raw:
        assert differences(answer, msgspec.json.decode(raw)) == []


def _of(how: str, version: int) -> str:
    """Until 2.52, and since."""
    old, _, new = how.partition(" | ")
    return new if new and version >= 53 else old


def _called(text: str) -> str:
    for theirs, our in CALLED.items():
        text = text.replace(theirs, our)
    return text


class Made:
    """What a question names, made when it is named."""

    def __init__(self, there: Prepared, version: int) -> None:
        self.there, self.version, self.cloud, self.tenant = there, version, there.cloud, ""

    def filled(self, text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda m: str(getattr(self, f"_{m[1]}", lambda: m[0])()), text)

    def _new(self) -> str:
        return f"new{next(NUMBERS)}"

    def _tenant(self) -> str:
        """The same, however often it is named in one question."""
        self.tenant = self.tenant or str(self.cloud.services.person(self._new(), "member").project_id)
        return self.tenant

    def _project(self) -> str:
        return str(self.cloud.user.project_id)

    def _user(self) -> str:
        return self.there.rita.id

    def _alice(self) -> str:
        return str(self.there.row().user_id)

    def _image(self) -> str:
        return self.cloud.image_id

    def _private(self) -> str:
        return self._flavor(False)

    def _specified(self) -> str:
        id = self._flavor(True)
        self._ask("POST", f"/flavors/{id}/os-extra_specs", {"extra_specs": {"hw:numa_nodes": "1"}})
        return id

    def _granted(self) -> str:
        id = self._flavor(False)
        self._ask("POST", f"/flavors/{id}/action", {"addTenantAccess": {"tenant": self._tenant()}})
        return id

    def _flavor(self, public: bool) -> str:
        id = self._new()
        size = {"vcpus": 1, "ram": 64, "disk": 1, "os-flavor-access:is_public": public}
        self._ask("POST", "/flavors", {"flavor": {"name": id, "id": id, **size}})
        return id

    def _empty(self) -> str:
        for a in self._ask("GET", "/os-aggregates")["aggregates"]:  # a host may be in one zone at most
            for host in a["hosts"]:
                self._ask("POST", f"/os-aggregates/{a['id']}/action", {"remove_host": {"host": host}})
        return str(self._ask("POST", "/os-aggregates", {"aggregate": {"name": self._new()}})["aggregate"]["id"])

    def _full(self) -> str:
        id = self._empty()
        self._ask("POST", f"/os-aggregates/{id}/action", {"add_host": {"host": "h2"}})
        return id

    def _hypervisor(self) -> str:
        found = self._ask("GET", "/os-hypervisors", version=self.version)["hypervisors"]
        return str(next(h["id"] for h in found if h["hypervisor_hostname"] == self._busy()))

    def _busy(self) -> str:
        return str(self.there.row().host)

    def _idle(self) -> str:
        return next(h for h, state in self.cloud.states.items() if not state.machines)

    def _service(self) -> str:
        found = self._ask("GET", "/os-services?host=h2", version=self.version)["services"]
        return str(found[0]["id"])

    def _group(self) -> str:
        return self.there.group

    def _ask(self, method: str, path: str, body: Any = None, version: int = 60) -> Any:
        status, said = self.there.json(method, path, body, token=self.there.admin, version=version)
        assert status < 300, (method, path, said)
        return said


def differences(theirs: Any, ours: Any, where: str = "") -> list[str]:
    """Members that one has and the other has not, and values of another kind. An empty list and null say nothing."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if where.rpartition(".")[2] in LOOSE:
            return []
        found = [f"{where}.{k} is not there" for k in theirs.keys() - ours.keys()]
        found += [f"{where}.{k} is new" for k in ours.keys() - theirs.keys()]
        return found + [d for k in theirs.keys() & ours.keys() for d in differences(theirs[k], ours[k], f"{where}.{k}")]
    if isinstance(theirs, list) and isinstance(ours, list):
        return differences(theirs[0], ours[0], f"{where}[]") if theirs and ours else []
    kinds: Callable[[Any], str] = lambda v: "number" if isinstance(v, int | float) and not isinstance(v, bool) else type(v).__name__  # fmt: skip
    if theirs is None or ours is None or kinds(theirs) == kinds(ours):
        return []
    return [f"{where} is {ours!r}, not like {theirs!r}"]
