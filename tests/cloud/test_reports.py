"""What many hosts say at once: compared by the questions of one, and what is wrong with one is no harm to the others."""

import msgspec
import pytest

from kilonova.conductor.reports import Reports
from kilonova.kit.errors import Invalid
from kilonova.model.host import Stock
from tests.stories import telling

HOSTS = 9


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path, hosts=HOSTS) as cloud:
        yield cloud


def said(cloud):
    """What each host says now: all that there is to say."""
    for h in cloud.hosts.hosts.values():
        h.reports = 0
    return [h.report() for h in cloud.hosts.hosts.values()]


def heard(cloud, reports):
    """They are taken all, and looked at. How many statements that took."""
    gathered = Reports(cloud.conductor.world)
    for r in reports:
        gathered.take(r)
    before = cloud.db.statements
    gathered.turn()
    return cloud.db.statements - before


def test_many_reports_cost_the_questions_of_one(cloud):
    servers = [cloud.boot(f"s{i}") for i in range(HOSTS)]
    assert len({s.row.host for s in servers}) > HOSTS / 2
    for _ in range(2):
        heard(cloud, said(cloud))  # by now they are known
    one, all = heard(cloud, said(cloud)[:1]), heard(cloud, said(cloud))
    assert 0 < all <= one


def test_what_is_wrong_on_several_hosts_is_found_in_one_look(cloud):
    servers = [cloud.boot(f"s{i}") for i in range(HOSTS)]
    heard(cloud, said(cloud))
    lost = servers[::3]
    for s in lost:
        cloud.states[s.row.host].machines[s.id].power = "shutdown"
    cloud.clock.sleep(5)
    heard(cloud, said(cloud))
    cloud.tick()
    assert [s for s in servers if s.status == "SHUTOFF"] == lost


def test_a_report_that_cannot_be_looked_at_is_no_harm_to_the_others(cloud):
    s = cloud.boot()
    others = [r for r in said(cloud) if r.host != s.row.host]
    cloud.states[s.row.host].machines[s.id].power = "shutdown"
    cloud.clock.sleep(5)
    mine = next(r for r in said(cloud) if r.host == s.row.host)
    strange = msgspec.structs.replace(others[0], stocks=[Stock("VCPU", 2**63)])  # more than a database can count
    with pytest.raises(Invalid):
        heard(cloud, [strange, *others[1:], mine])
    cloud.tick()
    assert s.status == "SHUTOFF"


def test_of_what_changed_after_it_was_said_a_report_knows_nothing(cloud):
    before = said(cloud)
    cloud.clock.sleep(0.2)
    s = cloud.boot()
    heard(cloud, before)
    assert not cloud.woken, "nobody looks for a machine that was not there yet"
    cloud.clock.sleep(5)
    heard(cloud, before)
    assert len(cloud.woken) == 1, "but a machine that is not there for long"
    cloud.tick()
    assert s.status == "ACTIVE"
