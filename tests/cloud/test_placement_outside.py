"""A real Placement service beside our own tables: it is asked, told, and may say no; in the end both say the same."""

import msgspec
import pytest
import sqlalchemy as sa

from kilonova.clients import Absent, Outside
from kilonova.kit.http import Server, listen
from kilonova.store import dues, hosts, placement
from tests.stories import Cloud, telling


def tables(db):
    """What is held of whom, by whom; and what is offered."""
    a, i, t, g = placement.ALLOCATIONS, placement.INVENTORIES, placement.PROVIDER_TRAITS, placement.PROVIDER_AGGREGATES
    with db.read() as tx:
        return [{tuple(r) for r in tx.execute(sa.select(x))} for x in (a, i, t, g)]


def agree(cloud):
    """Once it was told of what was given back."""
    assert cloud.mend("owed") == []
    assert cloud.db.look(dues.first, 10) == []
    assert tables(cloud.db) == tables(cloud.elsewhere)


def filled(cloud, host, consumer="00000000-0000-4000-8000-00000000000a"):
    """Somebody else takes all of a host's memory."""
    with cloud.db.read() as tx:
        provider = hosts.nodes(tx, host=host)[0].uuid
    with cloud.elsewhere.tx() as tx:
        n = tx.execute(
            sa.select(placement.INVENTORIES).where(
                placement.INVENTORIES.c.provider == provider, placement.INVENTORIES.c.resource_class == "MEMORY_MB"
            )
        ).one()
        left = {"MEMORY_MB": int((n.total - n.reserved) * n.allocation_ratio) - n.used}
        placement.claim(tx, consumer, provider, left, now=1.0, project_id="theirs", user_id="theirs", type="OTHER")


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path, outside=True) as c:
        c.mend("owed")
        yield c


def test_it_is_told_of_hosts_and_of_what_servers_hold(cloud):
    agree(cloud)
    s = cloud.boot()
    held = tables(cloud.elsewhere)[0]
    assert {r[0] for r in held} == {s.id} and held == tables(cloud.db)[0]  # before the reconciler had its turn
    for last in ("revertResize", "confirmResize"):
        s.act("resize", {"flavorRef": "large"})
        assert s.status == "VERIFY_RESIZE"
        assert (
            len({r[0] for r in tables(cloud.elsewhere)[0]}) == 2 and tables(cloud.db)[0] == tables(cloud.elsewhere)[0]
        )
        s.act(last, ok=202 if last == "revertResize" else 204)
        agree(cloud)
    s.act("shelve")
    agree(cloud)
    assert tables(cloud.elsewhere)[0] == set()
    s.act("unshelve")
    assert s.status == "ACTIVE" and tables(cloud.elsewhere)[0] == tables(cloud.db)[0] != set()
    move = {"os-migrateLive": {"host": None, "block_migration": "auto"}}
    cloud.json("POST", f"/servers/{s.id}/action", move, ok=202, token=cloud.admin)
    cloud.settle()
    agree(cloud)
    s.delete()
    agree(cloud)


def test_what_others_hold_there_counts(cloud):
    for host in ("h0", "h2"):
        filled(cloud, host, f"00000000-0000-4000-8000-00000000000{host[1]}")
    assert cloud.boot().row.host == "h1"
    filled(cloud, "h1")
    s = cloud.boot("two")
    fault = s.show()["fault"]
    assert fault["message"] == "No valid host was found. There are not enough hosts available."
    assert "elsewhere_too turned away 3" in fault["details"]


def test_who_was_faster_there_has_it(cloud):
    """There was room when we asked and none when we told: the claim is undone, and the next host tried."""
    theirs, taken = cloud.outside.thing, []

    class Faster:
        def send(self, method, path, headers, body):
            if method == "POST" and path == "/allocations" and not taken:
                (wish,) = msgspec.json.decode(body).values()
                (provider,) = wish["allocations"]
                with cloud.db.read() as tx:
                    taken.append(next(n.host for n in hosts.nodes(tx) if n.uuid == provider))
                filled(cloud, taken[0])
            return theirs.send(method, path, headers, body)

    cloud.outside.thing = Faster()
    s = cloud.boot()
    assert s.status == "ACTIVE" and s.row.host not in taken and len(taken) == 1
    cloud.mend("owed")
    assert {r for r in tables(cloud.elsewhere)[0] if r[0] == s.id} == tables(cloud.db)[0]


def test_a_service_that_is_gone_for_a_while_hears_of_all(cloud):
    s, theirs = cloud.boot(), cloud.outside.thing
    cloud.outside.thing = Absent("placement")
    s.delete()
    assert s.id in {r[0] for r in tables(cloud.elsewhere)[0]}
    cloud.mend("owed")
    cloud.outside.thing = theirs
    agree(cloud)


def test_hosts_that_go_and_what_others_say_of_them(cloud):
    """Traits and classes of others stay; a disabled host is one there, too; one that is deleted is no more."""
    with cloud.db.read() as tx:
        node = hosts.nodes(tx, host="h0")[0]
    with cloud.elsewhere.tx() as tx:
        tx.execute(sa.insert(placement.TRAITS), {"name": "CUSTOM_THEIRS", "created_at": 1.0})
        tx.execute(sa.insert(placement.PROVIDER_TRAITS), {"provider": node.uuid, "trait": "CUSTOM_THEIRS"})
    service = cloud.json("GET", "/os-services?host=h0&binary=nova-compute", token=cloud.admin)["services"][0]["id"]
    cloud.json("PUT", f"/os-services/{service}", {"status": "disabled"}, token=cloud.admin)
    cloud.mend("owed")
    with cloud.elsewhere.read() as tx:
        assert {"CUSTOM_THEIRS", "COMPUTE_STATUS_DISABLED"} <= placement.traits(tx)[node.uuid]
    cloud.dead.add("h0")
    cloud.json("DELETE", f"/os-services/{service}", ok=204, token=cloud.admin)
    agree(cloud)
    with cloud.elsewhere.read() as tx:
        assert node.uuid not in placement.stocks(tx)


def test_over_real_http(tmp_path):
    """As `[placement] service_url` says it."""
    with telling(tmp_path, outside=True) as cloud:
        listener = listen("127.0.0.1", 0)
        server = Server(cloud.other, listener)
        server.start()
        try:
            cloud.outside.thing = Outside(f"http://127.0.0.1:{listener.getsockname()[1]}")
            s = cloud.boot()  # hosts are told of when the first claim is
            agree(cloud)
            s.delete()
            agree(cloud)
        finally:
            server.stop()


def test_a_crash_anywhere_and_both_agree(tmp_path):
    """Of the steps of a build and a resize, each eleventh; the others in the next rounds."""
    cloud = Cloud(tmp_path, outside=True)
    cloud.mend("owed")
    for crash_at in range(0, 80, 13):
        s = cloud.crashed(crash_at)
        agree(cloud)
        s.delete()
    cloud.settle()
    assert cloud.check() == []
    agree(cloud)
    cloud.db.close()
