"""A rolling upgrade: processes of two releases at the same time, and servers live as if there were one."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kilonova.contracts.scheduler import Choose, Chosen
from kilonova.kit.errors import Unsupported
from tests.contracts.before import Wire, jobs_of, kept
from tests.contracts.test_shapes import CONTRACTS, broken
from tests.stories import telling

BEFORE = kept()


@pytest.mark.parametrize("contract", [c for c in CONTRACTS if c.name in BEFORE.shapes], ids=lambda c: c.name)
def test_nothing_was_taken_from_the_earlier_release(contract: Any) -> None:
    old = BEFORE.shapes[contract.name]
    assert old and broken(old, contract.shapes()) == []


def test_it_is_another_release() -> None:
    """Else the stories below would tell nothing."""
    now = {name for c in CONTRACTS for name in c.shapes()}
    then = {name for shapes in BEFORE.shapes.values() for name in shapes}
    assert then < now
    assert BEFORE.said("compute", "Look", {"server": "s", "new": 1}) == {"server": "s"}


@pytest.fixture(params=["one host is older", "all hosts are older", "the controller is older"])
def cloud(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with telling(tmp_path, hosts=2) as c:
        names = set(c.hosts.hosts)
        old = {"one host is older": {"h0"}, "all hosts are older": names}.get(request.param, set())
        c.wire = Wire(BEFORE, c.bus.send, names, old=old, conductor=not old)
        c.bus.send = c.wire.send
        c.start_conductor()  # who is there already writes by the old wire
        c.start_hosts()
        c.begun = jobs_of(BEFORE, monkeypatch) if not old else None
        if not old:
            ask = c.conductor.world.ask_scheduler

            def choose(m: Choose) -> Chosen:
                told = msgspec.convert(BEFORE.said("scheduler", "Choose", msgspec.to_builtins(m)), Choose)
                answer = msgspec.to_builtins(ask(told))
                return msgspec.convert(BEFORE.said("scheduler", "Chosen", answer), Chosen)

            c.conductor.world.ask_scheduler = choose
        c.pass_time(120)  # hosts say what they speak
        yield c


def test_servers_live_between_two_releases(cloud: Any) -> None:
    one, two = cloud.boot("one"), cloud.boot("two")
    assert {one.row.host, two.row.host} == {"h0", "h1"}
    for s in (one, two):
        for action, said, status in (
            ("os-stop", None, "SHUTOFF"),
            ("os-start", None, "ACTIVE"),
            ("reboot", {"type": "HARD"}, "ACTIVE"),
            ("pause", None, "PAUSED"),
            ("unpause", None, "ACTIVE"),
            ("rebuild", {"imageRef": cloud.image_id}, "ACTIVE"),
            ("resize", {"flavorRef": "large"}, "VERIFY_RESIZE"),
            ("confirmResize", None, "ACTIVE"),
        ):
            s.act(action, said, ok=204 if action == "confirmResize" else 202)
            assert s.status == status, (action, s.show())
    was = two.row.host
    wish = {"os-migrateLive": {"host": None, "block_migration": "auto"}}
    cloud.json("POST", f"/servers/{two.id}/action", wish, ok=202, token=cloud.admin)
    cloud.settle()
    assert two.status == "ACTIVE" and two.row.host != was
    one.delete()
    assert cloud.wire.cut >= {"Report", "Spawn", "Power", "Destroy"}
    if cloud.begun is not None:
        assert cloud.begun >= {"build", "act", "delete", "rebuild", "resize", "confirm", "live_migrate"}
    assert two.status == "ACTIVE"
    assert cloud.check() == []


def test_what_an_older_host_does_not_speak_it_is_not_asked(cloud: Any) -> None:
    """The doctor, say: its question is of this release."""
    from tests.cloud.test_doctor import asked

    if cloud.begun is not None:
        pytest.skip("an older controller has no doctor")
    cloud.mend("present")
    unseen = asked(cloud).unseen
    assert unseen == [f"host {h} is of a release that cannot tell" for h in sorted(cloud.wire.old)]


def test_who_is_asked_what_he_does_not_know_says_so(cloud: Any) -> None:
    from kilonova.contracts.compute import TellHoldings
    from kilonova.kit.bus import letter

    if not cloud.wire.old:
        pytest.skip("hosts are of today")
    heard: list[bytes] = []
    cloud.bus.serve("me", heard.append)
    cloud.bus.send("h0", letter(TellHoldings(), key="k", reply="me"))
    cloud.tick()
    answer = msgspec.msgpack.decode(msgspec.msgpack.decode(heard[0], type=dict[str, msgspec.Raw])["body"])
    assert answer["fault"]["kind"] == Unsupported.__name__ and json.dumps(answer)
