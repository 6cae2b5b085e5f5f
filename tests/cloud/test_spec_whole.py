"""Every GET, at every version in which its answer changed, of a cloud that has one of everything: as the owner and the
administrator see it, held against the specification.
"""

from typing import Any

import msgspec
import pytest

from tests.cloud import tables
from tests.cloud.prepared import Prepared
from tests.cloud.tables import changes, disagreements, said

pytestmark = pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")

# What this cloud cannot answer, and why.
ABSENT = {
    "GET /os-baremetal-nodes": "there is no bare metal service: 501",
    "GET /os-baremetal-nodes/{id}": "there is no bare metal service: 501",
    "GET /servers/{server_id}/shares/{id}": "there is no service of shares",
    "GET /os-hosts/{id}/reboot": "hosts are not turned on and off from here: 501",
    "GET /os-hosts/{id}/shutdown": "hosts are not turned on and off from here: 501",
    "GET /os-hosts/{id}/startup": "hosts are not turned on and off from here: 501",
    "GET /os-hypervisors/{id}/uptime": "simulated hosts have none; `test_spec_answers` has one that has",
    "GET /os-instance_usage_audit_log": "the table wants hosts to be called by UUIDs, and they have names",
    "GET /os-instance_usage_audit_log/{id}": "the table wants hosts to be called by UUIDs, and they have names",
}
NOT_HIS = {("GET /os-keypairs/{id}", "admin")}  # keys are a user's own
SINCE = {"GET /os-console-auth-tokens/{id}": 31}  # before, tokens of RDP consoles alone were told of
QUERY = {
    "GET /os-simple-tenant-usage": "?start=2020-01-01T00:00:00&end=2100-01-01&detailed=1",
    "GET /os-simple-tenant-usage/{id}": "?start=2020-01-01T00:00:00&end=2100-01-01",
}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return Prepared(tmp_path_factory.mktemp("whole"))


def gets() -> list[Any]:
    if not tables.FOLDER.exists():
        return []
    found = []
    for name in tables.names():
        keys = {(e["route"], e.get("versions")) for e in tables.group(name)}
        for key, entry, (first, last) in tables.routes():
            if key.startswith("GET ") and (key, entry.get("versions")) in keys and key not in ABSENT:
                found.append(pytest.param(key, name, entry, first, last, id=f"{key} {entry['versions']}"))
    return found


@pytest.mark.parametrize(("key", "group", "entry", "first", "last"), gets())
def test_what_is_there_is_shown_as_specified(there, key, group, entry, first, last):
    wrong, seen = [], 0
    table = entry.get("response") if isinstance(entry.get("response"), dict) else None
    for v in changes(table, first, last):
        for who, token in (("alice", there.alice), ("admin", there.admin)):
            if (key, who) in NOT_HIS or v < SINCE.get(key, 0):
                continue
            path = there.path(key.removeprefix("GET "), group, v) + QUERY.get(key, "")
            status, raw = there.call("GET", path, token=token, version=v)
            if status == 403 and who == "alice":
                continue
            seen += 1
            if status >= 300:
                wrong.append(f"2.{v} {who} {path}: {status} {raw[:200]!r}")
            elif table is not None:
                shapes = [said(entry, "response", v, second=second) for second in (False, True)]
                answer = msgspec.json.decode(raw)
                best = min((disagreements(t, answer) for t in shapes if t is not None), key=len, default=[])
                wrong += [f"2.{v} {who} {d}" for d in best]
    assert wrong == [] and seen
