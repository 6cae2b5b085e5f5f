"""Tests that find nothing may be blind. Here each safety is taken out, one at a time, and the watchers are asked.

    python tests/chaos/mutants.py            each mutant, and the first watcher that notices it
    python tests/chaos/mutants.py NAME…      only those whose name contains one of these words
    python tests/chaos/mutants.py --sim …    ask the simulator alone
    python tests/chaos/mutants.py --seeds …  ask its seeds alone
    python tests/chaos/mutants.py --tests …  ask the quick tests alone

No part of the test run: what it says is written down in `docs/decisions/what-the-simulator-sees.md`.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS_S, SEEDS_S, CRASHES_S = 100, 100, 100  # of CPU time: what others do on this machine is no verdict
SEEDS = int(os.environ.get("SEEDS", "40"))

BUS, ENGINE, FLOWS = "tests/pure/test_bus.py", "tests/store/test_workflow.py", "tests/cloud/test_flows.py"
LATE = "tests/store/test_workflow_faults.py::test_a_commit_that_is_carried_out_late_lets_nobody_in"
PLACES, OWNERS, HOST = "tests/store/test_placement.py", "tests/cloud/test_ownership.py", "tests/pure/test_fences.py"
TURNS = "tests/chaos/test_read_committed.py"
GROUPS, CONSOLES = "tests/cloud/test_server_groups.py", "tests/cloud/test_consoles.py"

MOVES, SHELVES, VOLUMES = "tests/cloud/test_moves.py", "tests/cloud/test_shelve.py", "tests/cloud/test_attach.py"


@dataclass(frozen=True)
class Mutant:
    """`cuts`: (file, text, what stands there instead); each text is there once. `tests`: who should know first.

    `story`: of `kilonova.sim.storms.STORIES`, to be told with a crash at every boundary, and with slow reconcilers from each on.
    """

    cuts: list[tuple[str, str, str]]
    tests: list[str]
    story: str = "build, delete"


# fmt: off
MUTANTS = {
    # hosts
    "a host forgets what was taken back": Mutant([
        ("kit/bus.py", "if m.undoes:", "if False:")], [BUS]),
    "a host acts again on a repeated key": Mutant([
        ("kit/bus.py", "answer = self.ledger.get(m.key) if m.key else None", "answer = None")], [BUS]),
    "acts about one server may overlap": Mutant([
        ("kit/bus.py", "return _LETTER.decode(raw)", 'return msgspec.structs.replace(_LETTER.decode(raw), about="")')],
        [BUS], "delete overtakes stop"),
    "letters are never too late": Mutant([
        ("kit/bus.py", "if m.until and self.clock.now() > m.until:", "if False:")], [BUS]),
    "a host builds for whose time is over": Mutant([
        ("compute/machines.py", "if host.epochs.get(machine.id, machine.epoch) > machine.epoch:", "if False:")], [HOST]),
    "a late undo destroys another's machine": Mutant([
        ("compute/machines.py", "if m.epoch is not None and host.epochs.get(m.server, -1) > m.epoch:", "if False:")],
        [HOST]),

    # runs
    "letters are not sent again": Mutant([
        ("kit/workflow.py", "elif now >= past.due or news:", "elif not past.stored or news:")], [ENGINE]),
    "parking ignores what came meanwhile": Mutant([
        ("kit/workflow.py", 'PARK = ready(HOLD.where(_r.wakes == _b("seen"))', 'PARK = ready(HOLD.where(_b("seen") >= 0)')], [ENGINE]),
    "a late owner may still write": Mutant([
        ("kit/workflow.py", '& (_r.epoch == _b("ours")) & (_r.state', '& (_b("ours") >= 0) & (_r.state')], [ENGINE]),
    "a commit may be done twice": Mutant([
        ("kit/workflow.py", "HOLD = ready(sa.update(RUNS).where(_ours).values(epoch=_r.epoch + 1))",
                            "HOLD = ready(sa.update(RUNS).where(_ours).values(epoch=_r.epoch))"),
        ("kit/workflow.py", "self.epoch += 1", "pass"),
        ("kit/workflow.py", "values(lease=_b(\"till\"), epoch=_r.epoch + 1)", "values(lease=_b(\"till\"), epoch=_r.epoch)")],
        [LATE, ENGINE]),
    "a lost run is taken from one's own house": Mutant([
        ("kit/workflow.py", '_left = (_r.id == _b("the_id")) & (_r.owner == _b("ours"))',
                            '_left = (_r.id == _b("the_id")) & (_b("ours") != "")')], [ENGINE]),
    "an aborted effect is not undone": Mutant([
        ("kit/workflow.py", 'step.kind == "effect"  # it', '(step.kind == "effect" and past.fault is None)  # it')], [ENGINE]),
    "a refused command is not undone": Mutant([
        ("kit/workflow.py", '"command" and past.host is not None)', '"command" and past.host is not None and not past.fault)')],
        [ENGINE]),
    "a judgement overwrites an answer": Mutant([
        ("kit/workflow.py", '& (_s.n == _b("the_n")) & _s.finished.is_(None)', '& (_s.n == _b("the_n"))')], [ENGINE]),
    "an effect may rest on what is not journaled": Mutant([
        ("kit/workflow.py", "(not looks and (self.dirty or self.unit.tx))", "(not looks and self.unit.tx)")], [ENGINE]),
    "every effect only looks": Mutant([
        ("kit/workflow.py", "looks = step.looks is not None and", "looks = step.looks is None or")], [ENGINE]),
    "a bare build forgets whose it is": Mutant([
        ("conductor/create.py", "    placed(run, job, spawn_on, Task.spawning)\n", "    placed(run, job, spawn_on, Task.networking)\n")],
        [FLOWS], "build bare, delete"),
    "an abort tries the next host": Mutant([
        ("kit/workflow.py", "except Aborted:\n            raise", "except ZeroDivisionError:\n            raise")],
        [ENGINE], "delete overtakes build"),

    # flows
    "delete does not wait for others": Mutant([
        ("conductor/delete.py", "run.when_alone()\n    found = run(standing, server.id)\n    for", "found = run(standing, server.id)\n    for")],
        [OWNERS, FLOWS], "delete overtakes build"),
    "delete forgets ports": Mutant([
        ("conductor/delete.py", "run(unplug, server.id)", "pass")], [FLOWS]),
    "a claim does not ask the server group": Mutant([
        ("conductor/create.py", "server_groups.admit(tx, server, place.host, place.provider)", "pass")], [GROUPS]),
    "a console's token outlives its server's move": Mutant([
        ("store/consoles.py", ", s.epoch == T.c.epoch", "")], [CONSOLES]),
    "the undo of a claim gives nothing back": Mutant([
        ("conductor/create.py", "placement.release(tx, server.id, place.provider, now=now)", "pass")], [FLOWS]),
    "the undo of a port takes another try's": Mutant([
        ("conductor/ports.py", "(p.profile or {}).get(MARK) == key or", "ours(p) or")], [OWNERS, FLOWS]),
    "a suspicion is believed though the server moved": Mutant([
        ("conductor/watch.py", "row.generation != job.generation or row.task_state is not None or row.vm_state",
                               "row.vm_state")], [OWNERS, FLOWS]),
    "nobody compares what hosts hold": Mutant([
        ("conductor/watch.py", "dict.fromkeys(odd[r.host] + [id", "dict.fromkeys([id")], [f"{FLOWS}::test_an_orphan_is_swept"]),
    "nobody compares ports": Mutant([
        ("conductor/watch.py", "    return _let_go(world, stray_ports(world))\n", "    return []\n")], [f"{FLOWS}::test_ports_claims_and_servers_that_nobody_owns_are_mended"]),

    "ports are known before it is asked who is at work": Mutant([
        ("conductor/watch.py", "        at_work = compare.at_work(tx, servers)\n        known = compare.plugs(tx, servers)\n",
                               "        known = compare.plugs(tx, servers)\n        at_work = compare.at_work(tx, servers)\n")],
        [], "attach, detach"),
    "attachments are known before it is asked who is at work": Mutant([
        ("conductor/volumes.py", "        at_work = compare.at_work(tx, ids)\n        known = servers.find(tx, ids)\n",
                                 "        known = servers.find(tx, ids)\n        at_work = compare.at_work(tx, ids)\n")],
        [], "attach, swap volume"),

    # moves
    "the source is believed": Mutant([
        ("conductor/live_migrate.py", "if not there(run, s, goal):\n            raise", "raise")],
        [f"{MOVES}::test_when_the_source_does_not_answer_the_target_decides"], "live migrate"),
    "a landing is not closed": Mutant([
        ("conductor/live_migrate.py", "return To(goal.place.host, Drop(server=job.server.id, epoch=goal.epoch))",
                                      "return To(goal.place.host, Drop(server=job.server.id, epoch=-1))")],
        [f"{MOVES}::test_deleted_while_it_moves"], "live migrate, abort"),
    "what is kept is an orphan": Mutant([
        ("conductor/watch.py", "for h in loose if kept.get(h.server) != h.epoch]", "for h in loose]"),
        ("conductor/watch.py", "seen.there and seen.epoch != kept else", "seen.there else")],
        [f"{MOVES}::test_a_resize_is_confirmed"], "resize, revert"),
    "a deletion forgets what is kept": Mutant([
        ("conductor/delete.py", "found.host is not None else []), *found.kept]", "found.host is not None else [])]")],
        [f"{MOVES}::test_deleted_in_the_middle"], "delete overtakes revert"),
    "a move that is undone keeps its claim": Mutant([
        ("conductor/moves.py", "    placement.release(tx, server.id, now=now)\n    placement.move(tx, migration", "    placement.move(tx, migration")],
        [f"{MOVES}::test_a_resize_that_fails_leaves_all_as_it_was"], "delete overtakes resize"),
    "an evacuated host never hears of it": Mutant([
        ("conductor/watch.py", "    for m in migrations.evacuated(tx, r.host):\n", "    for m in []:\n")],
        [f"{MOVES}::test_a_server_of_a_dead_host_lives_on"], "evacuate"),
    "who is back is evacuated all the same": Mutant([
        ("conductor/evacuate.py", "    if up:\n", "    if False:\n")], [f"{MOVES}::test_who_is_back_in_time_keeps_his_servers"], "evacuate"),
    "an epoch is given out twice": Mutant([
        ("store/migrations.py", "max(server.epoch, int(highest or 0)) + 1", "server.epoch + 1")], ["tests/store/test_migrations.py"]),

    "an evacuation that is undone leaves its machine": Mutant([
        ("conductor/evacuate.py", "return To(goal.place.host, Destroy(server=server.id, epoch=goal.epoch))",
                                  "return To(goal.place.host, Destroy(server=server.id, epoch=-1))")],
        [f"{MOVES}::test_deleted_while_it_is_made_anew", f"{MOVES}::test_what_was_made_anew_and_cannot_have_its_volume_is_destroyed"], "delete overtakes evacuate"),
    "a shelved server keeps its place": Mutant([
        ("conductor/shelve.py", "    placement.release(tx, server.id, now=now)\n    facts", "    facts")],
        [f"{SHELVES}::test_it_leaves_its_host_and_comes_back"], "shelve, unshelve"),
    "the image of a shelved server stays": Mutant([
        ("conductor/delete.py", "    if found.image is not None:\n        run(forget_image, found.image)\n    run(deleted,", "    run(deleted,")],
        [f"{SHELVES}::test_nothing_is_left_of_a_deleted_one"], "delete overtakes shelve"),
    "delete forgets volumes": Mutant([
        ("conductor/delete.py", "    if found.volumes:\n", "    if False:\n")],
        [f"{VOLUMES}::test_one_goes_with_its_server"], "build with volume, delete"),
    "an attachment that failed stays in the machine": Mutant([
        ("conductor/attach.py", 'volume_id=device.volume_id or "", timeout_s=0, anyway=True)',
                                'volume_id="", timeout_s=0, anyway=True)')],
        [f"{VOLUMES}::test_one_that_was_lost_while_it_was_plugged_in_is_taken_out_again"],
        "delete overtakes attach volume"),
    "a volume that could not be attached stays reserved": Mutant([
        ("conductor/attach.py", "        world.neighbours.volume.release(a.id)\n\n\nclass Place", "        pass\n\n\nclass Place")],
        [f"{VOLUMES}::test_a_host_that_refuses_leaves_nothing"], "attach, detach volume"),

    # look first, take then: what READ COMMITTED lets others do in between
    "a server is looked at and then taken": Mutant([
        ("store/servers.py", "        taken = tx.execute(BEGIN.of(verb",
                             "        check(get(tx, id), verb)\n        taken = tx.execute(BEGIN.of(verb"),
        ("store/servers.py", "return sa.update(T).where(*where).values(taken)",
                             "return sa.update(T).where(where[0]).values(taken)")], [OWNERS, FLOWS], "delete overtakes stop"),
    "room is looked at and then taken": Mutant([
        ("store/placement.py", "    _moved(tx, provider, now)\n    if wanted:\n        told = ",
         "    for r in tx.execute(sa.select(INVENTORIES).where(_i.provider == provider)):\n"
         "        if r.used + wanted.get(r.resource_class, 0) > (r.total - r.reserved) * r.allocation_ratio:\n"
         "            raise NoCapacity('There is no room left.')\n"
         "    _moved(tx, provider, now)\n    if wanted:\n        told = "),
        ("store/placement.py", "        .where(_i.used + n <= (_i.total - _i.reserved) * _i.allocation_ratio)\n", "")], [PLACES, TURNS]),
    "a group is counted without being held": Mutant([
        ("store/server_groups.py", 'if server.group_id is None or not tx.execute(HOLD_STRICT, {"the_id": server.group_id}).rowcount:',
                                   "if server.group_id is None:"),
        ("store/server_groups.py", 'group = tx.execute(ONE, {"the_id": server.group_id}).one()\n',
         'group = tx.execute(ONE, {"the_id": server.group_id}).one()\n    if group.policy not in VIOLATED:\n        return\n')],
        [GROUPS]),
    "a quota is counted without being held": Mutant([
        ("store/quotas.py", "    if one_writer(tx):\n", "    if True:\n")], [OWNERS]),
    "who was alone last is not compared": Mutant([
        ("kit/workflow.py", 'ALONE.c.run == _b("seen")', '_b("seen") != ""')], [ENGINE], "delete overtakes stop"),
    "a volume is read without its lock": Mutant([
        ("store/volumes.py", '.where(VOLUMES.c.id == sa.bindparam("the_id")).with_for_update())',
                             '.where(VOLUMES.c.id == sa.bindparam("the_id")))')], [TURNS]),
    "a run is looked at and then taken": Mutant([
        ("kit/workflow.py", "        row = _taken(unit.opened(), TAKE, self._terms(id))",
         '        now, r = self.clock.now(), unit.opened().execute(RUN, {"the_id": id}).first()\n'
         '        if r is None or r.state != "running" or r.due > now or r.lease > now:\n            return None\n'
         "        row = _taken(unit.opened(), TAKE, self._terms(id))"),
        ("kit/workflow.py", 'TAKE = _taking(sa.update(RUNS).where(_r.id == _b("the_id"), _free)',
                            'TAKE = _taking(sa.update(RUNS).where(_r.id == _b("the_id"), _b("now") > 0)')], [ENGINE]),

    # the store
    "where it runs is not told to a later verb": Mutant([
        ("store/servers.py", '"task_state": None, "updated_at": now}\n    with _moved(tx, server.id, now):\n        ours = tx.execute(OURS, _told(server, values)).rowcount\n'
                             "    if ours:\n        return True\n    if facts:",
                             '"task_state": None, "updated_at": now}\n    with _moved(tx, server.id, now):\n        ours = tx.execute(OURS, _told(server, values)).rowcount\n'
                             "    if ours:\n        return True\n    if False:")], [OWNERS, FLOWS], "delete overtakes build"),
    "who no longer owns a server puts it down": Mutant([
        ("store/servers.py", 'sa.bindparam("the_id"), T.c.generation == sa.bindparam("ours")))', 'sa.bindparam("the_id")))')],
        [OWNERS, FLOWS], "delete overtakes stop"),
    "a claim does not ask for room": Mutant([
        ("store/placement.py", "        .where(_i.used + n <= (_i.total - _i.reserved) * _i.allocation_ratio)\n", "")], [PLACES]),
    "a quota does not count what there is": Mutant([
        ("store/quotas.py", "        used = usage(tx, project_id, who)\n        fits", "        used = Usage()\n        fits")], [OWNERS]),
}
# fmt: on

CRASH = """
import logging, sys
logging.disable()
from kilonova.sim.storms import STORIES, crash_everywhere
for n, found in crash_everywhere(STORIES[sys.argv[1]]):
    if found:
        sys.exit(print(f"crash at {n}: {found[0]}"))
"""
LOOK = CRASH.replace("crash_everywhere", "look_everywhere").replace("crash at", "looked at from")
STORM = """
import logging, sys
logging.disable()
from kilonova.sim.storms import play
for seed in range(1, int(sys.argv[1]) + 1):
    if found := play(seed)[0]:
        sys.exit(print(f"seed {seed}: {found[0]}"))
"""


def main(words: list[str]) -> int:
    """0 if every chosen mutant was noticed."""
    names = [w for w in words if not w.startswith("--")]
    watchers = [tests, seeds, crashes, looks]
    for word, only in (("--sim", [seeds, crashes, looks]), ("--seeds", [seeds]), ("--tests", [tests])):
        watchers = only if word in words else watchers
    unseen = 0
    for name, mutant in MUTANTS.items():
        if names and not any(w in name for w in names):
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="kilonova-mutant-") as there:
            planted(Path(there), mutant, name)
            said = next((s for watch in watchers if (s := watch(Path(there), mutant))), None)
        unseen += said is None
        print(f"| {name} | {said or 'NOBODY'} | {time.monotonic() - began:.0f} s |", flush=True)
    return 1 if unseen else 0


def planted(there: Path, mutant: Mutant, name: str) -> None:
    """A copy of the house, in which one safety is missing."""
    for part in ("src", "tests"):
        shutil.copytree(ROOT / part, there / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", there)
    for file, old, new in mutant.cuts:
        path = there / "src/kilonova" / file
        text = path.read_text()
        assert text.count(old) == 1, f"{name}: {file} has {text.count(old)} times: {old}"
        path.write_text(text.replace(old, new))


def tests(there: Path, mutant: Mutant) -> str | None:
    """The first test that fails, or hangs."""
    for file in mutant.tests:
        text = asked(there, TESTS_S, "-m", "pytest", "-x", "-m", "not slow", "-o", "timeout=60", "-v", file)
        if found := re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py)::(\S+)", text, re.MULTILINE):
            return f"{found[1]}: {found[2]}"
        if "Timeout" in text or text.endswith(OUT_OF_TIME):
            begun = re.findall(r"(\w+\.py)::(\w+)", text)
            return f"{begun[-1][0]}: {begun[-1][1]}, which hangs" if begun else None
        if not re.search(r"\d+ passed", text):
            return f"{file} does not run: {text.strip().splitlines()[-1][:100]}"
    return None


def seeds(there: Path, mutant: Mutant) -> str | None:
    """The first storm that ends badly."""
    return _heard("simulator", asked(there, SEEDS_S, "-c", STORM, str(SEEDS)))


def crashes(there: Path, mutant: Mutant) -> str | None:
    """The first boundary at which nobody may die."""
    return _heard(f"story “{mutant.story}”", asked(there, CRASHES_S, "-c", CRASH, mutant.story))


def looks(there: Path, mutant: Mutant) -> str | None:
    """The first boundary from which on nobody may look slowly."""
    return _heard(f"story “{mutant.story}”", asked(there, CRASHES_S, "-c", LOOK, mutant.story))


OUT_OF_TIME = "(out of time)"


def _heard(who: str, text: str) -> str | None:
    lines = [line for line in text.strip().splitlines() if line != OUT_OF_TIME]
    return f"{who}, {_plain(lines[-1])}" if lines else None


def _plain(line: str) -> str:
    return re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "a server", line)[:110].replace("|", "/")


def asked(there: Path, patience_s: float, *argv: str) -> str:
    env = os.environ | {"PYTHONPATH": str(there / "src"), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    with (there / "said").open("w+") as said:
        try:
            done = subprocess.run(
                [sys.executable, *argv],
                cwd=there,
                env=env,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=patience_s * 10,
                # softly: what the tests start may set limits of its own
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (int(patience_s), resource.RLIM_INFINITY)),
            )
            late = f"\n{OUT_OF_TIME}" if done.returncode == -signal.SIGXCPU else ""
        except subprocess.TimeoutExpired:
            late = f"\n{OUT_OF_TIME}"
        said.seek(0)
        return said.read() + late


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
