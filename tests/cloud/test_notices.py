"""What other programs are told: each thing that happens, once at least, in the words that they know; nothing where nobody asked."""

import random
import re
from pathlib import Path

import msgspec
import pytest

from kilonova.kit.clock import Ids
from kilonova.kit.errors import Unavailable
from kilonova.kit.journal import Said, tell
from kilonova.model import notices as words
from kilonova.model import options
from kilonova.model.ask import ask
from kilonova.model.devices import Device
from kilonova.model.flavor import Flavor
from kilonova.model.options import Config
from kilonova.model.server import Server
from kilonova.model.shares import Sharing
from kilonova.store import hosts, notices
from kilonova.store.notices import Outbox
from tests.cloud import tables
from tests.stories import Cloud, telling

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPYvM5xQfZ0C0HjQ2TDFdGEsVYEg1N3bLrqIKVGFc3Wm me@home"


class Listener:
    """Who reads a topic, as a consumer of oslo.messaging does."""

    def __init__(self, cloud, topic="versioned_notifications", choices=False):
        """`choices`: also of places that were asked for, which is told of everything that goes somewhere."""
        self.cloud, self.heard, self.topic, self.choices = cloud, [], topic, choices
        cloud.bus.serve(topic, self.receive)

    def receive(self, raw):
        said = msgspec.json.decode(raw)
        assert said["oslo.version"] == "2.0"
        told = msgspec.json.decode(said["oslo.message"])
        if self.choices or not told["event_type"].startswith("scheduler."):
            self.heard.append(told)

    def types(self):
        self.cloud.conductor.reconcilers.run_once("notified")
        self.cloud.tick()
        found, self.heard[:] = [m["event_type"] for m in self.heard], []
        return found

    def all(self):
        self.cloud.conductor.reconcilers.run_once("notified")
        self.cloud.tick()
        return self.heard


def speaking(cloud):
    """As `up` does it."""
    outbox = Outbox(cloud.config.notifications, ids=Ids(random.Random(1)), me="here")
    cloud.db.listen(outbox.heard, closely=outbox.closely)
    object.__setattr__(cloud.api.world, "outbox", outbox)
    return cloud


@pytest.fixture
def cloud(tmp_path):
    with telling(tmp_path, config=Config(notifications=options.Notifications(format="both"))) as c:
        yield speaking(c)


def test_a_servers_life_is_told(cloud):
    listener = Listener(cloud)
    s = cloud.boot("one")
    assert listener.types() == ["instance.create.start", "instance.create.end"]
    for action, said, told in (("os-stop", None, "power_off"), ("os-start", None, "power_on"), ("pause", None, "pause"),
                               ("unpause", None, "unpause"), ("reboot", {"type": "HARD"}, "reboot")):  # fmt: skip
        s.act(action, said)
        assert listener.types() == [f"instance.{told}.start", f"instance.{told}.end"]
    s.act("lock")
    s.act("unlock")
    assert listener.types() == ["instance.lock", "instance.unlock"]
    cloud.json("PUT", f"/servers/{s.id}", {"server": {"name": "other"}})
    (update,) = listener.all()
    assert update["event_type"] == "instance.update"
    data = update["payload"]["nova_object.data"]
    assert (data["old_display_name"], data["display_name"]) == ("one", "other")
    listener.heard.clear()
    cloud.json("PUT", f"/servers/{s.id}/metadata/a", {"meta": {"a": "b"}})
    cloud.json("PUT", f"/servers/{s.id}/tags/t", ok=201)
    meta, tags = (m["payload"]["nova_object.data"] for m in listener.all())
    assert (meta["metadata"], tags["tags"]) == ({"a": "b"}, ["t"])
    listener.heard.clear()
    s.delete()
    assert listener.types() == [
        "instance.delete.start", "instance.shutdown.start", "instance.shutdown.end", "instance.delete.end",
    ]  # fmt: skip


def test_that_a_place_was_looked_for_is_told(cloud):
    listener = Listener(cloud, choices=True)
    s = cloud.boot("one")
    told = [m for m in listener.all() if m["event_type"].startswith("scheduler")]
    assert [m["event_type"] for m in told] == [f"scheduler.select_destinations.{p}" for p in ("start", "end")]
    data = told[0]["payload"]["nova_object.data"]
    assert (data["instance_uuid"], data["flavor"]["nova_object.data"]["flavorid"]) == (s.id, "small")


def test_a_deletion_that_can_be_taken_back_is_called_otherwise(tmp_path):
    config = Config(
        notifications=options.Notifications(format="versioned"), compute=options.Compute(reclaim_interval_s=600)
    )
    with telling(tmp_path, config=config) as cloud:
        listener = Listener(speaking(cloud))
        s = cloud.boot("one")
        listener.types()
        s.delete()
        assert listener.types() == ["instance.soft_delete.start", "instance.soft_delete.end"]
        s.act("restore")
        assert listener.types() == ["instance.restore.start", "instance.restore.end"]


def test_moves_and_images_are_told(cloud):
    listener = Listener(cloud)
    s = cloud.boot("one")
    listener.types()
    s.act("resize", {"flavorRef": "large"})
    _, prep, *_ = told = listener.all()
    assert prep["payload"]["nova_object.data"]["new_flavor"]["nova_object.data"]["flavorid"] == "large"
    assert [m["event_type"] for m in told] == [
        f"instance.{e}"
        for e in ("exists", "resize_prep.start", "resize_prep.end", "resize.start", "resize.end", "resize_finish.start", "resize_finish.end")
    ]  # fmt: skip
    assert [m["payload"]["nova_object.data"]["task_state"] for m in told] == [
        "resize_prep", "resize_prep", "resize_migrating", "resize_migrating", "resize_migrated", "resize_migrated", None,
    ]  # fmt: skip
    listener.heard.clear()
    s.act("confirmResize", ok=204)
    assert listener.types() == ["instance.resize_confirm.start", "instance.resize_confirm.end"]
    cloud.json("POST", f"/servers/{s.id}/action", {"createImage": {"name": "i"}}, ok=202, version="2.45")
    cloud.settle()
    start, end = listener.all()
    assert (start["event_type"], end["event_type"]) == ("instance.snapshot.start", "instance.snapshot.end")
    assert end["payload"]["nova_object.data"]["snapshot_image_id"]


def test_how_far_a_run_has_come_is_told(cloud):
    listener, s = Listener(cloud), cloud.boot("one")
    listener.types()
    body = {"os-migrateLive": {"host": None, "block_migration": "auto"}}
    cloud.json("POST", f"/servers/{s.id}/action", body, ok=202, token=cloud.admin)
    before = s.row.host
    cloud.settle()
    told = listener.all()
    assert [m["event_type"].removeprefix("instance.live_migration_") for m in told] == [
        "pre.start", "pre.end", "post.start", "post_dest.start", "post_dest.end", "post.end",
    ]  # fmt: skip
    assert [m["publisher_id"] == f"nova-compute:{before}" for m in told] == [True, True, False, False, False, False]
    listener.heard.clear()
    s.act("shelve")
    assert listener.types() == [f"instance.{e}" for e in ("exists", "shelve.start", "shelve.end", "shelve_offload.start", "shelve_offload.end")]  # fmt: skip
    s.act("unshelve")
    assert listener.types() == ["instance.unshelve.start", "instance.unshelve.end"]
    cloud.driver(s.row.host).options = options.Sim(failure_rate=1.0)
    cloud.json("POST", f"/servers/{s.id}/action", body, ok=202, token=cloud.admin)
    cloud.settle()
    cloud.driver(s.row.host).options = options.Sim()
    assert [t.removeprefix("instance.live_migration_") for t in listener.types()][:2] == ["pre.start", "pre.end"]


def test_volumes_that_come_and_go_are_told(cloud):
    listener, s = Listener(cloud), cloud.boot("one", networks="none")
    id = cloud.neighbours.volume.create(1, token=cloud.user.token).id
    listener.types()
    path = f"/servers/{s.id}/os-volume_attachments"
    cloud.json("POST", path, {"volumeAttachment": {"volumeId": id}})
    cloud.settle()
    cloud.json("DELETE", f"{path}/{id}", ok=202)
    cloud.settle()
    told = listener.all()
    families = ("volume_attach.start", "volume_attach.end", "volume_detach.start", "volume_detach.end")
    assert [m["event_type"] for m in told] == [f"instance.{e}" for e in families]
    assert {m["payload"]["nova_object.data"]["volume_id"] for m in told} == {id}


def test_what_a_notification_says(cloud):
    listener = Listener(cloud)
    s = cloud.boot("one", adminPass="hunter2", tags=["t"])
    start, end = listener.all()
    assert start["payload"]["nova_object.data"]["state"] == "building"
    assert end.keys() >= {"message_id", "publisher_id", "event_type", "priority", "timestamp", "payload"}
    assert (end["publisher_id"], end["priority"]) == (f"nova-compute:{s.row.host}", "INFO")
    whole = end["payload"]
    assert (whole["nova_object.name"], whole["nova_object.version"]) == ("InstanceCreatePayload", "1.13")
    data = whole["nova_object.data"]
    assert (data["uuid"], data["state"], data["power_state"], data["tags"]) == (s.id, "active", "running", ["t"])
    assert data["action_initiator_user"] == cloud.user.id and data["request_id"].startswith("req-")
    assert data["ip_addresses"][0]["nova_object.data"]["address"] == s.row.plugs[0].addresses[0].address
    assert data["flavor"]["nova_object.data"]["flavorid"] == "small"
    assert "hunter2" not in str(listener.heard)
    assert len({m["message_id"] for m in listener.heard}) == 2


def test_what_went_wrong_is_told_as_such(cloud):
    listener = Listener(cloud)
    cloud.boot("one", flavor="huge")
    start, error, task = listener.all()
    assert [m["event_type"] for m in (start, error, task)] == ["instance.create.start", "instance.create.error", "compute_task.build_instances.error"]  # fmt: skip
    assert (error["priority"], task["priority"]) == ("ERROR", "ERROR")
    fault = error["payload"]["nova_object.data"]["fault"]["nova_object.data"]
    assert fault["exception_message"].startswith("No valid host")


def test_the_older_ones_are_flat(cloud):
    listener = Listener(cloud, "notifications")
    s = cloud.boot("one")
    start, end = listener.all()
    assert (start["event_type"], end["event_type"]) == ("compute.instance.create.start", "compute.instance.create.end")
    assert (end["publisher_id"], end["payload"]["instance_id"]) == (f"compute.{s.row.host}", s.id)
    assert end["payload"]["fixed_ips"][0]["address"] == s.row.plugs[0].addresses[0].address
    cloud.json("POST", "/os-keypairs", {"keypair": {"name": "k", "public_key": KEY, "type": "ssh"}}, ok=201)
    listener.heard.clear()
    assert listener.types() == []  # of key pairs there are new ones only


def test_other_things_are_told(cloud):
    listener, admin = Listener(cloud), cloud.admin
    cloud.json("POST", "/flavors", {"flavor": {"name": "f", "id": "f", "vcpus": 1, "ram": 1, "disk": 1}}, token=admin)
    cloud.json("POST", "/flavors/f/os-extra_specs", {"extra_specs": {"a:b": "c"}}, token=admin)
    cloud.json("DELETE", "/flavors/f", token=admin, ok=202)
    assert listener.types() == ["flavor.create", "flavor.update", "flavor.delete"]
    cloud.json("POST", "/os-keypairs", {"keypair": {"name": "k", "public_key": KEY, "type": "ssh"}}, ok=201)
    cloud.json("DELETE", "/os-keypairs/k", ok=204)
    assert listener.types() == [f"keypair.{e}" for e in ("import.start", "import.end", "delete.start", "delete.end")]
    group = cloud.json("POST", "/os-server-groups", {"server_group": {"name": "g", "policy": "affinity"}})[
        "server_group"
    ]["id"]
    wish = {"name": "n", "flavorRef": "small", "imageRef": cloud.image_id, "networks": "none"}
    cloud.json("POST", "/servers", {"server": wish, "os:scheduler_hints": {"group": group}}, ok=202)
    cloud.settle()
    cloud.json("DELETE", f"/os-server-groups/{group}", ok=204)
    told = [t for t in listener.types() if t.startswith("server_group")]
    assert told == ["server_group.create", "server_group.add_member", "server_group.delete"]
    a = cloud.json("POST", "/os-aggregates", {"aggregate": {"name": "a"}}, token=admin)["aggregate"]["id"]
    cloud.json("POST", f"/os-aggregates/{a}/action", {"add_host": {"host": "h0"}}, token=admin)
    assert listener.types() == ["aggregate.create.start", "aggregate.create.end", "aggregate.add_host.start", "aggregate.add_host.end"]  # fmt: skip
    (service,) = cloud.json("GET", "/os-services?host=h0", token=admin)["services"]
    cloud.json("PUT", f"/os-services/{service['id']}", {"status": "disabled"}, token=admin)
    (told,) = listener.all()
    assert (told["event_type"], told["publisher_id"]) == ("service.update", "nova-compute:h0")
    assert told["payload"]["nova_object.data"]["disabled"] is True


def test_images_that_are_fetched_beforehand_are_told(cloud):
    """Of each host when it is through, with what it has and what it has not; at the end of all, whoever was the last."""
    listener, admin = Listener(cloud), cloud.admin
    a = cloud.json("POST", "/os-aggregates", {"aggregate": {"name": "a"}}, token=admin)["aggregate"]["id"]
    path, body = f"/os-aggregates/{a}/images", {"cache": [{"id": cloud.image_id}]}
    cloud.json("POST", path, body, token=admin, ok=202)
    assert listener.types()[2:] == ["aggregate.cache_images.start", "aggregate.cache_images.end"]
    hosts_ = sorted(cloud.states)
    for host in hosts_:
        cloud.json("POST", f"/os-aggregates/{a}/action", {"add_host": {"host": host}}, token=admin)
    listener.types()
    cloud.states[hosts_[0]].broken = True
    cloud.json("POST", path, body, token=admin, ok=202)
    cloud.settle()
    cloud.states[hosts_[0]].broken = False
    start, *progress, end = listener.all()
    assert (start["event_type"], end["event_type"]) == ("aggregate.cache_images.start", "aggregate.cache_images.end")
    assert {m["event_type"] for m in progress} == {"aggregate.cache_images.progress"}
    assert {m["publisher_id"] for m in progress} == {"nova-conductor:here"}
    said = [m["payload"]["nova_object.data"] for m in progress]
    n = len(hosts_)
    assert [(d["index"], d["total"]) for d in said] == [(i + 1, n) for i in range(n)]
    assert sorted(d["host"] for d in said) == hosts_
    for d in said:
        bad = d["host"] == hosts_[0]
        assert (d["images_cached"], d["images_failed"]) == (([], [cloud.image_id]) if bad else ([cloud.image_id], []))
    listener.heard.clear()
    cloud.json("POST", path, body, token=admin, ok=202)
    for host in hosts_:
        cloud.json("POST", f"/os-aggregates/{a}/action", {"remove_host": {"host": host}}, token=admin)
    cloud.json("DELETE", f"/os-aggregates/{a}", token=admin)
    cloud.settle()  # nobody can be told of what is no more
    assert not [t for t in listener.types() if t.startswith("aggregate.cache_images.p")]


def test_a_hypervisor_that_is_away_is_told_once(cloud, monkeypatch):
    """A host says nothing of itself as long as nobody can know it; that is told when it begins, and when it begins again."""
    listener, host = Listener(cloud), cloud.hosts.hosts["h0"]

    def away():
        raise Unavailable("The hypervisor of this host cannot be reached.", why="connection refused")

    for _ in range(2):
        monkeypatch.setattr(cloud.driver("h0"), "machines", away)
        for _ in range(3):
            with pytest.raises(Unavailable):
                host.tell()
        cloud.tick()
        (told,) = listener.all()
        assert (told["event_type"], told["publisher_id"]) == ("libvirt.connect.error", "nova-compute:h0")
        assert (
            told["payload"]["nova_object.data"]["reason"]["nova_object.data"]["exception_message"]
            == "connection refused"
        )
        listener.heard.clear()
        monkeypatch.undo()
        host.tell()
        cloud.tick()
        assert listener.types() == []


def test_shares_are_told(cloud):
    listener = Listener(cloud)
    s = cloud.boot("one")
    s.act("os-stop")
    wish = {"share": {"share_proto": "NFS", "size": 1}}
    id = cloud.services.json("POST", "/share/v2/shares", wish, cloud.user.token)["share"]["id"]
    listener.types()
    cloud.json("POST", f"/servers/{s.id}/shares", {"share": {"share_id": id}}, ok=201, version="2.97")
    cloud.settle()
    told = listener.all()
    assert [m["event_type"] for m in told] == ["instance.share_attach.start", "instance.share_attach.end"]
    assert {m["payload"]["nova_object.data"]["share_id"] for m in told} == {id}
    assert {m["publisher_id"] for m in told} == {"nova-api:here"}
    listener.heard.clear()
    cloud.json("DELETE", f"/servers/{s.id}/shares/{id}", version="2.97")
    cloud.settle()
    assert listener.types() == ["instance.share_detach.start", "instance.share_detach.end"]


def test_each_change_of_state_is_told_to_who_wants_it(tmp_path):
    for wanted, states in (
        ("vm_and_task_state", [
            (None, "building", None, "scheduling"), ("building", "building", "scheduling", "networking"),
            ("building", "building", "networking", "spawning"), ("building", "active", "spawning", None),
            ("active", "active", None, "powering-off"), ("active", "stopped", "powering-off", None),
        ]),
        ("vm_state", [
            (None, "building", None, "scheduling"), ("building", "active", "spawning", None),
            ("active", "stopped", "powering-off", None),
        ]),
    ):  # fmt: skip
        (tmp_path / wanted).mkdir()
        said = options.Notifications(format="versioned", state_changes=wanted)
        with telling(tmp_path / wanted, config=Config(notifications=said)) as cloud:
            listener = Listener(speaking(cloud))
            cloud.boot("one").act("os-stop")
            updates = [m for m in listener.all() if m["event_type"] == "instance.update"]
            of = [m["payload"]["nova_object.data"]["state_update"]["nova_object.data"] for m in updates]
            names = ("old_state", "state", "old_task_state", "new_task_state")
            assert [tuple(u[n] for n in names) for u in of] == states
            assert updates[0]["publisher_id"].startswith("nova-api:") and updates[-1]["publisher_id"].startswith(
                "nova-compute:h"
            )


def test_payloads_name_volumes_and_shares_where_that_is_wanted(tmp_path):
    said = options.Notifications(format="versioned", block_devices=True, shares=True)
    with telling(tmp_path, config=Config(notifications=said)) as cloud:
        listener = Listener(speaking(cloud))
        s = cloud.boot("one")
        volume = cloud.neighbours.volume.create(1, token=cloud.user.token).id
        path = f"/servers/{s.id}/os-volume_attachments"
        cloud.json("POST", path, {"volumeAttachment": {"volumeId": volume}})
        cloud.settle()
        s.act("os-stop")
        wish = {"share": {"share_proto": "NFS", "size": 1}}
        id = cloud.services.json("POST", "/share/v2/shares", wish, cloud.user.token)["share"]["id"]
        cloud.json("POST", f"/servers/{s.id}/shares", {"share": {"share_id": id}}, ok=201, version="2.97")
        cloud.settle()
        listener.types()
        s.act("os-start")
        data = listener.all()[-1]["payload"]["nova_object.data"]
        assert [d["nova_object.data"]["volume_id"] for d in data["block_devices"]] == [volume]
        (share,) = (d["nova_object.data"] for d in data["shares"])
        assert (share["share_id"], share["tag"], share["status"]) == (id, id, "active")


def test_what_a_server_was_is_told_before_it_becomes_another(cloud):
    listener = Listener(cloud)
    s = cloud.boot("one")
    listener.types()
    s.act("rebuild", {"imageRef": cloud.image_id})
    told = listener.all()
    assert [m["event_type"].split(".", 1)[1] for m in told] == [
        "rebuild_scheduled",
        "exists",
        "rebuild.start",
        "rebuild.end",
    ]
    exists = told[1]["payload"]
    assert exists["nova_object.name"] == "InstanceExistsPayload"
    period = exists["nova_object.data"]["audit_period"]["nova_object.data"]
    assert period["audit_period_beginning"].endswith("-01T00:00:00Z") and period["audit_period_ending"]
    listener.heard.clear()
    for action, said, name in (("rescue", None, "rescue"), ("unrescue", None, None), ("shelve", None, "shelve")):
        cloud.json("POST", f"/servers/{s.id}/action", {action: said}, ok=200 if action == "rescue" else 202)
        cloud.settle()
        assert ("instance.exists" in listener.types()) == (name is not None)


def test_errors_of_ours_are_told_without_what_was_in_them(cloud):
    listener = Listener(cloud)
    cloud.api.failed = lambda e: cloud.db.run(
        tell, Said(event="compute.exception", binary="nova-api", at=1.0, of=lambda tx: words.unexpected(e))
    )
    cloud.api.world.neighbours.image.show = lambda *_, **__: {}["a secret"]
    cloud.json(
        "POST",
        "/servers",
        {"server": {"name": "x", "flavorRef": "small", "imageRef": cloud.image_id, "networks": "none"}},
        ok=500,
    )
    (told,) = listener.all()
    assert told["event_type"] == "compute.exception"
    data = told["payload"]["nova_object.data"]
    assert data["exception"] == "KeyError" and data["function_name"] and "secret" not in str(told)


def test_a_service_that_was_never_there_is_told_of(tmp_path):
    cloud = Cloud(tmp_path, config=Config(notifications=options.Notifications(format="versioned")), hosts=1)
    listener = Listener(speaking(cloud))
    with cloud.db.tx() as tx:
        hosts.beat(tx, "c9", "nova-conductor", uuid=cloud.ids.uuid, now=1.0, born=1.0, version="1")
        hosts.beat(tx, "c9", "nova-conductor", uuid=cloud.ids.uuid, now=2.0, born=1.0, version="1")
    (told,) = listener.all()
    assert (told["event_type"], told["publisher_id"]) == ("service.create", "nova-conductor:c9")
    assert told["payload"]["nova_object.data"]["host"] == "c9"
    cloud.db.close()


def test_nothing_is_lost_while_nobody_listens(cloud):
    s = cloud.boot("one")
    cloud.conductor.reconcilers.run_once("notified")
    s.act("os-stop")
    listener = Listener(cloud)
    assert listener.types() == [
        f"instance.{e}" for e in ("create.start", "create.end", "power_off.start", "power_off.end")
    ]
    cloud.clock.sleep(cloud.config.notifications.keep_s + 1)
    cloud.conductor.reconcilers.run_once("unwanted")
    with cloud.db.read() as tx:
        assert notices.oldest(tx) == []  # nobody wanted the older ones


def test_one_of_several_conductors_tells_unless_it_is_late(cloud):
    """Else they would come in any order, and twice."""
    listener, first = Listener(cloud), "a"
    with cloud.db.tx() as tx:
        now = cloud.clock.now()
        for name in (first, cloud.conductor.world.me):
            hosts.beat(tx, name, "nova-conductor", uuid=cloud.ids.uuid, now=now, born=1.0, version="1")
    cloud.boot("one")
    assert listener.types() == []
    cloud.clock.sleep(20)
    assert "instance.create.end" in listener.types(), "somebody tells"
    cloud.clock.sleep(60)  # the first is no more
    with cloud.db.tx() as tx:
        hosts.beat(
            tx,
            cloud.conductor.world.me,
            "nova-conductor",
            uuid=cloud.ids.uuid,
            now=cloud.clock.now(),
            born=1,
            version="1",
        )
    cloud.boot("two")
    assert listener.types()[:1] == ["instance.create.start"]


def test_what_is_refused_is_not_told(cloud):
    listener = Listener(cloud)
    s = cloud.boot("one")
    listener.types()
    s.act("os-start", ok=409)
    cloud.json(
        "POST", "/flavors", {"flavor": {"name": "small", "vcpus": 1, "ram": 1, "disk": 1}}, token=cloud.admin, ok=409
    )
    assert listener.types() == []


def test_switched_off_it_costs_nothing(tmp_path):
    for name in ("on", "off"):
        (tmp_path / name).mkdir()
    with telling(tmp_path / "off") as plain:
        plain.boot("warm")
        before = plain.db.statements
        plain.boot("one")
        cost = plain.db.statements - before
        with plain.db.read() as tx:
            assert notices.oldest(tx) == []
    with telling(tmp_path / "on", config=Config(notifications=options.Notifications(format="versioned"))) as loud:
        speaking(loud).boot("warm")
        before = loud.db.statements
        loud.boot("one")
        more = loud.db.statements - before
    assert cost < more <= cost + 11


def test_a_crash_at_any_boundary_loses_no_notification(tmp_path):
    cloud = speaking(Cloud(tmp_path, hosts=2, config=Config(notifications=options.Notifications(format="versioned"))))
    listener = Listener(cloud)
    for k in range(1, 60, 3):
        cloud.edges.count, cloud.edges.crash_at = 0, k
        s = cloud.boot(f"s{k}")
        crashed, cloud.edges.crash_at = cloud.edges.count >= k, 0
        cloud.settle()
        told = [m["event_type"] for m in listener.all() if m["payload"]["nova_object.data"].get("uuid") == s.id]
        assert set(told) == {"instance.create.start", "instance.create.end"}, f"after a crash at {k}"
        s.delete()
        if not crashed:
            break
    assert cloud.check() == []
    cloud.db.close()


@pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")
def test_the_words_are_those_of_the_specification():
    """Event families, and the fields of the payloads, out of the tables of notifications.md."""
    text = (tables.FOLDER.parent / "notifications.md").read_text()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    events = {r[0] for r in rows if len(r) == 4 and "." in r[0]}
    fields = {r[0]: set(r[2].split(", ")) for r in rows if len(r) == 3 and r[0].endswith("Payload")}
    for tells in words.ACTIONS.values():
        for event in tells.all:
            family = event.removesuffix(".start").removesuffix(".end").removesuffix(".error")
            assert f"instance.{family}" in events, event
    instance = fields["InstancePayload"]
    s = Server("i", "p", "u", "n", "n", Flavor("f", "f", 1, 1, 1))
    assert set(words.instance(s, words.Who())) == instance
    for family, (name, _) in words.PAYLOADS.items():
        data = words.action(family, s, words.Who(), None, {})["nova_object.data"]
        extra = {f.removeprefix("InstanceActionPayload + ") for f in fields[name]}
        assert set(data) == instance | {"fault"} | extra, name
    assert set(words.update(s, words.Who(), s)["nova_object.data"]) == instance | {
        f.removeprefix("InstancePayload + ") for f in fields["InstanceUpdatePayload"]
    }
    assert set(words.wanted("i", s, ask(s))["nova_object.data"]) == fields["RequestSpecPayload"]
    assert set(words.action("exists", s, words.Who(), None, {})["nova_object.data"]) == instance | {"audit_period"}
    assert set(words.unexpected(KeyError())["nova_object.data"]) == fields["ExceptionPayload"]
    assert set(words.block_device(Device("d"))["nova_object.data"]) == fields["BlockDevicePayload"]
    sharing = Sharing("u", "i", "s", "t", "e")
    assert set(words.share(sharing, s)["nova_object.data"]) == fields["SharePayload"]
    assert set(words.month(1.0)["nova_object.data"]) == fields["AuditPeriodPayload"]
    assert set(words.unreached("ip", "why")["nova_object.data"]) == fields["LibvirtErrorPayload"]
    assert set(words.cached(1, "u", "n", "h", [], [], 1, 1)["nova_object.data"]) == fields["AggregateCachePayload"]
    assert set(words.flavor(s.flavor)["nova_object.data"]) == fields["FlavorPayload"]


# What consumers know and never hear of us, and why.
NEVER = {
    "metrics.update": "hosts have no monitors",
    "volume.usage": "nobody polls for it: a server's diagnostics say it when they are asked",
}


@pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")
def test_what_is_never_told_is_known():
    """Each event type of the specification is in the table of actions or in a handler's words, or stands above with its reason."""
    text = (tables.FOLDER.parent / "notifications.md").read_text()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    known = set()
    for family, phases, *_ in (r for r in rows if len(r) == 4 and "." in r[0]):
        known |= {family} if phases == "–" else {f"{family}.{phase}" for phase in phases.split(", ")}
    assert len(known) == 132
    told = {f"instance.{event}" for tells in words.ACTIONS.values() for event in tells.all} | {"instance.update"}
    told |= {f"compute_task.{task}.error" for task in words.TASKS.values()}
    told |= {f"aggregate.{what}.{phase}" for what in said_by("aggregates") for phase in ("start", "end")}
    told |= {f"keypair.{what}.{phase}" for what in ("create", "import", "delete") for phase in ("start", "end")}
    told |= {f"service.{what}" for what in said_by("operators")}
    told |= {f"flavor.{what}" for what in ("create", "update", "delete")}
    told |= {"compute.exception", "scheduler.select_destinations.start", "scheduler.select_destinations.end"}
    told |= {
        "service.create",
        "libvirt.connect.error",
        *(f"aggregate.cache_images.{phase}" for phase in ("start", "progress", "end")),
    }
    told |= {f"server_group.{what}" for what in ("create", "add_member", "delete")}
    assert known - told == set(NEVER)
    assert told - known == set()


def said_by(module):
    """What a module of the API tells of: the words of its `_told(call, tx, "…", …)`."""
    source = Path(notices.__file__).parents[1] / "api" / f"{module}.py"
    return set(re.findall(r'_told\(call, tx, "(\w+)"', source.read_text()))
