"""In versions where a route is not, a running API says so: 404, or 410 where it is gone for good."""

from typing import Any

import pytest

from tests.cloud import tables
from tests.cloud.rooms import Rooms
from tests.cloud.test_spec_bodies import real
from tests.cloud.test_spec_routes import NEWEST, span, theirs

pytestmark = pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    rooms = Rooms(tmp_path_factory.mktemp("outside"))
    rooms.token = rooms.admin()
    return rooms


def outside() -> list[Any]:
    """Each route with the versions beside its own, and what it answers there."""
    if not tables.FOLDER.exists():
        return []
    found = []
    for entry, _ in theirs():
        if "gone" in entry:
            found += [(entry, v, 410) for v in (1, NEWEST)]
            continue
        inside = span(entry["versions"])
        first, last = min(inside), max(inside)
        found += [(entry, first - 1, entry.get("before_min", 404))] if first > 1 else []
        found += [(entry, last + 1, entry.get("after_max", 404))] if last < NEWEST else []
    return found


def test_outside_its_versions(api):
    wrong, cases = [], outside()
    for entry, version, status in cases:
        body = {entry["action"]: None} if "action" in entry else {} if entry["method"] in ("POST", "PUT") else None
        answer = api.call(entry["method"], real(entry["path"], version), body, api.token, version)
        if answer.status != status:
            wrong.append(f"{entry['key']} 2.{version}: {answer.status}, not {status}")
    assert wrong == [] and len(cases) > 100
