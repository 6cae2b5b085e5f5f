"""The simple verbs: one claim, one run, 202. What each may is a row of `model/states.py`."""

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from kilonova.api.registry import R, World, cause, the_server, unlocked
from kilonova.contracts.jobs import Act
from kilonova.kit.db import Tx
from kilonova.kit.routes import Call
from kilonova.kit.workflow import start
from kilonova.model.server import Server
from kilonova.model.states import VERBS
from kilonova.store import servers, shares


def act(call: Call, id: str, verb: str) -> None:
    """Lock, then state (states.md, section 3), then the claim and the run in one transaction."""
    world: World = call.world

    def record(tx: Tx) -> str:
        before = the_server(call, tx, id)
        unlocked(call, before)
        return begun(call, tx, before, verb)

    world.wake(world.db.run(record))


def begun(call: Call, tx: Tx, before: Server, verb: str) -> str:
    """The server is claimed for the verb and its run is started; to be woken after the commit. Raises Conflict."""
    world: World = call.world
    now = world.clock.now()
    server = servers.begin(tx, before.id, VERBS[verb], now)
    if verb == "suspend":
        shares.unshared(tx, server, VERBS[verb])
    job = Act(server, verb, was=str(server.vm_state))  # as it was taken: what was read before may be old
    return start(tx, "act", job, id=world.ids.uuid(), subject=before.id, now=now, cause=cause(call, VERBS[verb].action))


class Reboot(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["HARD", "Hard", "hard", "SOFT", "Soft", "soft"]


@R.post(
    "/v2.1/servers/{id}/action", action="reboot", ok=202, body=Reboot, policy="os_compute_api:servers:reboot", late=True
)
def reboot(call: Call, id: str) -> None:
    act(call, id, "hard_reboot" if call.body.type.upper() == "HARD" else "reboot")


# Action → (verb, policy): their bodies say nothing.
PLAIN = {
    "os-start": ("start", "os_compute_api:servers:start"),
    "os-stop": ("stop", "os_compute_api:servers:stop"),
    "pause": ("pause", "os_compute_api:os-pause-server:pause"),
    "unpause": ("unpause", "os_compute_api:os-pause-server:unpause"),
    "suspend": ("suspend", "os_compute_api:os-suspend-server:suspend"),
    "resume": ("resume", "os_compute_api:os-suspend-server:resume"),
}


def _plain(verb: str) -> Callable[..., None]:
    def do(call: Call, id: str) -> None:
        act(call, id, verb)

    return do


for _action, (_verb, _policy) in PLAIN.items():
    R.post("/v2.1/servers/{id}/action", action=_action, ok=202, body=Any, policy=_policy, late=True)(_plain(_verb))
