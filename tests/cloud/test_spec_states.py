"""Every state × every action, against the table of states.md (section 3): who may begin, and what the others are told."""

import re

import msgspec
import pytest

from kilonova.model.devices import Device
from kilonova.model.states import _LIVING, VM, Task
from kilonova.store import servers
from tests.cloud import tables
from tests.stories import Cloud

pytestmark = pytest.mark.skipif(not tables.FOLDER.exists(), reason="the specification is not beside this checkout")

NOBODY = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"
VOLUME = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f7"
ADMINS = {"migrate", "os-migrateLive", "evacuate", "trigger_crash_dump", "shelveOffload", "swap volume"}


def action(name, said=None):
    return "POST", "/action", {name: said}


# Row of the table → what is asked. What is named is nobody's where it may be, so that nothing but the state is in the way.
ASKED = {
    "delete": ("DELETE", "", None),
    "forceDelete": action("forceDelete"),
    "restore": action("restore"),
    "os-start": action("os-start"),
    "os-stop": action("os-stop"),
    "reboot SOFT": action("reboot", {"type": "SOFT"}),
    "reboot HARD": action("reboot", {"type": "HARD"}),
    "rebuild": action("rebuild", {"imageRef": "IMAGE"}),
    "resize": action("resize", {"flavorRef": "large"}),
    "migrate (cold)": action("migrate"),
    "confirmResize": action("confirmResize"),
    "revertResize": action("revertResize"),
    "os-migrateLive": action("os-migrateLive", {"host": None, "block_migration": "auto"}),
    "evacuate": action("evacuate", {}),
    "pause": action("pause"),
    "unpause": action("unpause"),
    "suspend": action("suspend"),
    "resume": action("resume"),
    "rescue": action("rescue"),
    "unrescue": action("unrescue"),
    "changePassword": action("changePassword", {"adminPass": "x"}),
    "shelve": action("shelve"),
    "shelveOffload": action("shelveOffload"),
    "unshelve": action("unshelve"),
    "createImage": action("createImage", {"name": "i"}),
    "createBackup": action("createBackup", {"name": "b", "backup_type": "daily", "rotation": 1}),
    "trigger_crash_dump": action("trigger_crash_dump"),
    "attach volume": ("POST", "/os-volume_attachments", {"volumeAttachment": {"volumeId": NOBODY}}),
    "detach volume": ("DELETE", f"/os-volume_attachments/{VOLUME}", None),
    "swap volume": ("PUT", f"/os-volume_attachments/{VOLUME}", {"volumeAttachment": {"volumeId": NOBODY}}),
    "attach interface": ("POST", "/os-interface", {"interfaceAttachment": {"port_id": NOBODY}}),
    "detach interface": ("DELETE", f"/os-interface/{NOBODY}", None),
    "metadata create": ("POST", "/metadata", {"metadata": {"a": "b"}}),
    "tags write": ("PUT", "/tags", {"tags": ["t"]}),
    "share attach": ("POST", "/shares", {"share": {"share_id": NOBODY}}),
    "share detach": ("DELETE", f"/shares/{NOBODY}", None),
}
# Two operations in one row, and rows that say more than a name.
SPLIT = {
    "pause / unpause": ("pause", "unpause"),
    "suspend / resume": ("suspend", "resume"),
    "attach / detach interface": ("attach interface", "detach interface"),
    "metadata create/update/delete": ("metadata create",),
}
SAID = re.compile(rf"Cannot '[\w -]+' instance {'[0-9a-f-]{36}'} while it is in (vm_state|task_state) ([\w-]+)")


def rows():
    """(operation, states, tasks that may run: None any, by the lock, by the first launch)."""
    text = (tables.FOLDER.parent / "states.md").read_text()
    table = text.split("| operation | vm_state |", 1)[1].split("\n\n", 1)[0]
    found = []
    for line in table.splitlines()[2:]:
        name, states, task, lock, launched, _ = [c.strip() for c in line.strip("|").split("|")]
        names = SPLIT.get(name, (name,))
        if not set(names) & set(ASKED):
            continue
        each = states.split(" / ") if len(names) > 1 and "/" in states else [states] * len(names)
        for one, of in zip(names, each, strict=True):
            found.append(pytest.param(one, of, task, lock == "yes", launched == "yes", id=one))
    return found


def states_of(said, of=""):
    if said == "same as attach":
        said = "active, paused, stopped, resized, soft-delete, shelved, shelved_offloaded"
    return set(VM) - {VM.deleted} if said == "any" else {VM(s.strip()) for s in said.split(",")}


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """Nobody works here: what is begun stays begun."""
    c = Cloud(tmp_path_factory.mktemp("states"), hosts=1)
    object.__setattr__(c.api.world, "ended", lambda run, timeout_s: True)
    c.one = c.boot("one")
    c.row_ = c.one.row
    yield c
    c.db.close()


def asked(cloud, name, vm, task=None, **facts):
    """(status, sentence), of a server that is put into this state."""
    s = cloud.row_
    device = Device("d", "/dev/vdb", volume_id=VOLUME, attachment_id=NOBODY, busy="detaching")
    facts = {"locked_by": None, "launched_at": s.launched_at, "host": s.host, "devices": [device]} | facts
    if vm in (VM.shelved_offloaded,):
        facts["host"] = None
    with cloud.db.tx() as tx:
        values = facts | {"vm_state": str(vm), "task_state": task and str(task), "power_state": 1, "deleted_at": None}
        servers.change(tx, s.id, 1.0, **values)
    method, path, body = ASKED[name]
    if body and "rebuild" in body:
        body = {"rebuild": {"imageRef": cloud.image_id}}
    admin = name in ADMINS or name.split()[0] in ADMINS
    token = cloud.admin if admin and not facts["locked_by"] else cloud.user.token
    told = {"OpenStack-API-Version": "compute 2.97"}
    answer = cloud.services.ask(method, f"/compute/v2.1/servers/{s.id}{path}", body, token, **told)
    said = answer.read()
    assert answer.status < 500, (name, vm, task, said)
    found = next(iter(msgspec.json.decode(said).values())) if answer.status >= 400 else {}
    return answer.status, found.get("message", "") if isinstance(found, dict) else ""


@pytest.mark.parametrize(("name", "states", "task", "lock", "launched"), rows())
def test_states(cloud, name, states, task, lock, launched):
    good, wrong = states_of(states), []
    over = set(Task) if task == "any" else {Task(t.strip()) for t in task.split(",") if t.strip() != "null"}
    for vm in set(VM) - {VM.deleted}:
        status, said = asked(cloud, name, vm)
        told = SAID.match(said)
        refused = status == 409 and told is not None and told.groups() == ("vm_state", str(vm))
        if refused != (vm not in good):
            wrong.append(f"{vm}: {status} {said}")
    some = sorted(good)[0] if VM.active not in good else VM.active
    for busy in Task:
        status, said = asked(cloud, name, some, busy)
        told = SAID.match(said)
        refused = status == 409 and told is not None and told.groups() == ("task_state", str(busy))
        if busy not in ELSEWHERE.get(name, ()) and refused != (busy not in over):
            wrong.append(f"{some}, {busy}: {status} {said}")
    if name not in ADMINS and name.split()[0] not in ADMINS:
        status, said = asked(cloud, name, some, locked_by="admin")
        if (status == 409 and said.endswith("is locked")) != lock and name not in GENERIC:
            wrong.append(f"locked: {status} {said}")
    status, said = asked(cloud, name, some, launched_at=None)
    if (status == 409 and "is in an invalid state for" in said) != launched:
        wrong.append(f"never launched: {status} {said}")
    assert wrong == []


# What is decided otherwise here, and why (`model.states._LIVING`): what takes a server off its host, or to its end, ends by
# itself where the host is gone, and is not overtaken by an evacuation; nor is what does the same already.
ELSEWHERE = {
    "evacuate": set(Task) - _LIVING,
    "delete": {Task.deleting},
    "forceDelete": {Task.deleting},
}
GENERIC = {"restore", "changePassword"}  # these report a lock with the sentence for an invalid state


def test_all_operations_are_asked():
    assert {p.id for p in rows()} == set(ASKED)


@pytest.mark.parametrize("name", [n for n in ASKED if n not in ("tags write", "metadata create")])
def test_of_two_at_once_one_is_told_to_wait(cloud, name):
    """The second comes before anybody has worked for the first."""
    for vm in VM:
        if vm == VM.deleted or asked(cloud, name, vm)[0] >= 300:
            continue
        with cloud.db.read() as tx:
            busy = servers.get(tx, cloud.row_.id).task_state
        if busy is None or name in OVERTAKING:
            continue
        status, said = asked(cloud, name, vm, busy)
        assert status == 409 and SAID.match(said).groups() == ("task_state", busy), (vm, status, said)


OVERTAKING = {"delete", "forceDelete", "evacuate", "reboot HARD"}  # these may interrupt themselves, or what runs
