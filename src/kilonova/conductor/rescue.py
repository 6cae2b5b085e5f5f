"""Rescue, unrescue, a password, a crash dump: each is one command to the host, and the server is put down again."""

from kilonova.conductor.capture import put_down
from kilonova.contracts.compute import Abandon, Done, SetPassword
from kilonova.contracts.compute import CrashDump as Interrupt
from kilonova.contracts.compute import Rescue as Boot
from kilonova.contracts.compute import Unrescue as Back
from kilonova.contracts.jobs import CrashDump, Password, Rescue, Unrescue
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.workflow import Run, command, record, workflow
from kilonova.model.server import Server
from kilonova.model.states import VM
from kilonova.store import servers


@workflow
def rescue(run: Run, job: Rescue) -> None:
    """What comes to grief half-way is neither: it can be rescued again, or rebuilt."""
    run.if_undone(put_down, job.server, VM.error, run.id, run.now)
    run.when_alone()  # what somebody plugs in is in its own system, not in that which looks after it
    done = run(boot, job, job.server.host or "")
    run(settled, job.server, VM.rescued, done.power_state, run.now)


@command(patience_s=1800, event="compute_rescue_instance")
def boot(job: Rescue, host: str) -> To[Done]:
    told = Boot(server=job.server.id, disk=job.disk, stable=job.stable, admin_password=job.admin_password)
    return To(host, told)


@boot.on("abort")
def _(job: Rescue, host: str) -> To[Done]:
    return To(host, Abandon(server=job.server.id))


@workflow
def unrescue(run: Run, job: Unrescue) -> None:
    run.if_undone(put_down, job.server, VM.error, run.id, run.now)
    run.when_alone()
    done = run(back, job.server.id, job.server.host or "")
    run(settled, job.server, VM.active, done.power_state, run.now)


@command(patience_s=600, event="compute_unrescue_instance")
def back(server: str, host: str) -> To[Done]:
    return To(host, Back(server=server))


@record
def settled(tx: Tx, server: Server, to: VM, power_state: int, now: float) -> None:
    servers.finish(tx, server, to, now, power_state=power_state)


@workflow
def change_password(run: Run, job: Password) -> None:
    was = job.server.vm_state
    run.if_undone(put_down, job.server, was, run.id, run.now)
    done = run(tell, job, job.server.host or "")
    run(settled, job.server, was, done.power_state, run.now)


@command(patience_s=120, event="compute_set_admin_password")
def tell(job: Password, host: str) -> To[Done]:
    return To(host, SetPassword(server=job.server.id, password=job.password))


@workflow
def crash_dump(run: Run, job: CrashDump) -> None:
    run(interrupt, job.server.id, job.server.host or "")


@command(patience_s=120, event="compute_trigger_crash_dump")
def interrupt(server: str, host: str) -> To[Done]:
    return To(host, Interrupt(server=server))
