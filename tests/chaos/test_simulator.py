"""The whole cloud on virtual time: from seeds, and every story with a crash at every boundary.

Each part is a process of its own, for two reasons: sets must have the same order each time (PYTHONHASHSEED), and
there are two cores.  A failing seed is printed with the command that tells it again.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 200
EACH = 25  # a process
STORIES = [
    "build",
    "build, delete",
    "delete overtakes build",
    "build bare, delete",
    "delete overtakes bare build",
    "reboot",
    "hard reboot",
    "stop, start",
    "attach, detach",
    "delete overtakes attach",
    "delete overtakes stop",
    "build with volume",
    "attach, detach volume",
    "attach, swap volume",
    "attach, extend volume",
    "attach, branch volume",
    "readdress",
    "delete overtakes readdress",
    "precache",
    "attach, detach share",
    "delete overtakes attach share",
    "snapshot",
    "delete overtakes snapshot",
    "shelve, unshelve",
    "delete overtakes shelve",
    "rebuild",
    "rescue, unrescue",
    "build on volume, rebuild",
    "build on volume, shelve, unshelve",
    "soft delete, restore",
    "soft delete overtakes shelve",
    "resize, confirm",
    "resize, revert",
    "delete overtakes resize",
    "delete overtakes revert",
    "live migrate",
    "live migrate, abort",
    "delete overtakes live migrate",
    "evacuate",
    "delete overtakes evacuate",
]
# Long stories are told with a crash at every fifth boundary, the longest at every ninth: no run of the tests should last an hour.
EVERY = {
    name: "5"
    for name in STORIES
    if any(
        word in name
        for word in (
            "swap",
            "extend",
            "branch",
            "readdress",
            "precache",
            "share",
            "resize",
            "revert",
            "migrate",
            "evacuate",
            "shelve",
            "snapshot",
            "rescue",
        )
    )
} | {name: "9" for name in STORIES if "on volume" in name or "soft" in name}
CRASH = """
import logging, sys
logging.disable()
from kilonova.sim.storms import STORIES, crash_everywhere
n = 0
for n, found in crash_everywhere(STORIES[sys.argv[1]], step=int(sys.argv[2])):
    for line in found:
        print(f"{sys.argv[1]}, crash at {n}: {line}")
print(f"boundaries: {n - 1}")
"""


LOOK = CRASH.replace("crash_everywhere", "look_everywhere").replace("crash at", "looked at from")


def python(*argv: str, timeout_s: float = 900) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONHASHSEED": "0"}
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env, timeout=timeout_s)
    return done.stdout + done.stderr


def sim(*words: str) -> str:
    return python("-m", "kilonova.main", "sim", *words)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_seeds() -> None:
    starts = range(1, SEEDS + 1, EACH)
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        said = list(pool.map(lambda first: sim("--seed", str(first), "--seeds", str(EACH)), starts))
    lines = "\n".join(said).splitlines()
    told = [line for line in lines if re.match(r"seed \d+: well", line)]
    bad = [line for line in lines if re.match(r"seed \d+: ", line) and line not in told]
    assert not bad, "\n".join([*bad, "again: ./kilonova sim --verbose --seed N"])
    assert len(told) == SEEDS, lines[-20:]


def test_the_same_seed_tells_the_same_story() -> None:
    one, two = (re.findall(r"story (\w+)", sim("--seed", "7")) for _ in range(2))
    assert one == two != []


def test_other_seeds_tell_other_stories() -> None:
    assert len(set(re.findall(r"story (\w+)", sim("--seed", "1", "--seeds", "3")))) == 3


DOCTOR = """
import logging
logging.disable()
from kilonova.sim.storms import play
for seed in (1, 2, 3, 101):
    found, _ = play(seed, judge=lambda sim: sim.check() or [str(f) for f in sim.examined()])
    print(f"seed {seed}: {found}")
"""


def test_a_doctor_finds_nothing_when_a_storm_is_over() -> None:
    assert python("-c", DOCTOR).splitlines() == [f"seed {seed}: []" for seed in (1, 2, 3, 101)]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_crash_at_every_boundary_of_every_story() -> None:
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        said = dict(
            zip(STORIES, pool.map(lambda name: python("-c", CRASH, name, EVERY.get(name, "1")), STORIES), strict=True)
        )
    assert not [line for text in said.values() for line in text.splitlines() if not line.startswith("boundaries: ")]
    counts = {name: int(re.findall(r"boundaries: (\d+)", text)[0]) for name, text in said.items()}
    assert all(n >= 15 for n in counts.values()), f"stories became too short to mean anything: {counts}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_reconcilers_that_look_slowly_in_the_midst_of_every_story() -> None:
    """At every thirteenth boundary; a run that ends between two of a reconciler's questions is what it must not misjudge."""
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        said = list(pool.map(lambda name: python("-c", LOOK, name, "13"), STORIES))
    lines = "".join(said).splitlines()
    assert not [line for line in lines if not line.startswith("boundaries: ")]
    assert sum(line.startswith("boundaries: ") for line in lines) == len(STORIES)


def test_a_seed_tells_the_same_alone_and_after_others_and_beside_others() -> None:
    alone = dict(re.findall(r"seed (\d+): .*story (\w+)", sim("--seed", "3")))
    after = dict(re.findall(r"seed (\d+): .*story (\w+)", sim("--seeds", "1-3")))
    beside = dict(re.findall(r"seed (\d+): .*story (\w+)", sim("--seeds", "2-3", "--jobs", "2")))
    assert alone["3"] == after["3"] == beside["3"]
    assert after["2"] == beside["2"]
