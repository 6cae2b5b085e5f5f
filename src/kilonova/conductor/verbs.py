"""Act: a simple verb of `model/states.py`, already begun. One command to the host, and the server is put down again."""

from collections.abc import Callable

from kilonova.contracts.compute import Abandon, Done, Power
from kilonova.contracts.jobs import Act
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import Trouble
from kilonova.kit.workflow import Run, Step, command, record, workflow
from kilonova.model.server import Server
from kilonova.model.states import VERBS, VM
from kilonova.store import servers

REBOOTS = "reboot", "hard_reboot"


@workflow
def act(run: Run, job: Act) -> None:
    verb, was = VERBS[job.verb], VM(job.was) if job.was else job.server.vm_state
    assert job.server.host is not None
    try:
        done = run(STEPS[job.verb], job.server, job.server.host)
    except Trouble as e:
        # A machine that did not come up again is broken; any other act that failed has changed nothing.
        worse = job.verb in REBOOTS and e.code in ("shutdown", "crashed", "nostate")
        run.if_undone(put_down, job.server, VM.error if worse else was, run.id, run.now)
        raise
    run(acted, job.server, verb.end or was, done.power_state, run.now)


def timeout_s(server: Server) -> float:
    """How long a guest may take to end itself: `os_shutdown_timeout` of the image, or what its host has for it (-1)."""
    text = server.image.properties.get("os_shutdown_timeout", "")
    return float(text) if text.isdecimal() else -1


def _power(verb: str) -> Step[[Server, str], Done]:
    """The command of a verb; its name is the verb's, its event what users know."""
    message = VERBS[verb].message

    def tell(server: Server, host: str) -> To[Done]:
        told = Power(server=server.id, to=message, timeout_s=timeout_s(server))  # type: ignore[arg-type]
        return To(host, told)

    tell.__name__ = verb
    declare: Callable[[Callable[[Server, str], To[Done]]], Step[[Server, str], Done]]
    declare = command(patience_s=600, event=f"compute_{VERBS[verb].action}_instance")
    step = declare(tell)
    if verb in ("stop", "reboot"):

        @step.on("abort")
        def _(server: Server, host: str) -> To[Done]:
            return To(host, Abandon(server=server.id))

    return step


STEPS = {name: _power(name) for name, verb in VERBS.items() if verb.message}


@record
def acted(tx: Tx, server: Server, to: VM, power_state: int, now: float) -> None:
    servers.finish(tx, server, to, now, power_state=power_state)


@record
def put_down(tx: Tx, server: Server, to: VM, run: str, now: float) -> None:
    servers.finish(tx, server, to, now, fault_run=run)
