"""`kilonova doctor`: is all as it must be, in the tables, on the hosts, at the neighbours; and what would put it right.

It asks as everybody asks in this house: by a run in the database.  A conductor of the cloud carries it, asks the hosts over
whatever bus there is, and the answers are read from the journal.  Where no conductor works, what is written is all there is.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from kilonova.cli import config as configuration
from kilonova.cli import database
from kilonova.cli.hosts import table
from kilonova.conductor import examine
from kilonova.conductor.examine import Finding, Found
from kilonova.contracts.compute import TellHoldings
from kilonova.contracts.jobs import Examine, ExamineHost
from kilonova.kit.clock import Clock, Ids, WallClock
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Refused
from kilonova.kit.journal import answer_of, fault_of, over
from kilonova.kit.workflow import start
from kilonova.model.options import Config
from kilonova.store import evolve, hosts

WELL, ILL, UNSEEN = 0, 1, 3
LOOK_EVERY_S = 0.1
CONDUCTOR = "the conductor"
STEPS = ("written", "mended", "compared")


class Diagnosis(NamedTuple):
    """`unseen`: what could not be looked at, and why."""

    findings: list[Finding]
    mended: list[str]
    unseen: list[str]

    @property
    def status(self) -> int:
        return ILL if self.findings else UNSEEN if self.unseen else WELL


def main(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """0: all is well, or was put right; 1: something is not; 3: nothing is wrong in what could be seen, which was not all."""
    parser.add_argument("--mend", action="store_true", help="put right what can be")
    parser.add_argument("--host", action="append", metavar="HOST", help="ask only this one; may be repeated")
    parser.add_argument(
        "--timeout", type=float, default=60, metavar="S", help="how long to wait for answers (%(default)s s)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--config", type=Path, metavar="FILE", help="read this file instead of the usual ones")
    chosen = parser.parse_args(words)
    config = configuration.read(chosen.config, {})
    with database.understood():
        db = database.opened(config, chosen.state_dir)
        try:
            if why := evolve.trouble(evolve.standing(db)):
                raise Refused(why)
            wait = functools.partial(waited, timeout_s=chosen.timeout)
            said = diagnosed(db, config, WallClock(), wait=wait, mend=chosen.mend, only=chosen.host)
        finally:
            db.close()
    _show(said, chosen.json)
    return said.status


def _show(said: Diagnosis, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode({"status": said.status} | said._asdict()).decode())
        return
    for line in said.mended:
        print(f"mended: {line}")
    for line in said.unseen:
        print(f"not seen: {line}")
    if said.findings:
        rows = [(f.kind, f.subject, f.said, f.mends or "a person") for f in said.findings]
        print(table([("kind", "of", "what", "mended by"), *rows]))
    else:
        print("All is as it must be." if not said.unseen else "Nothing is wrong in what could be seen.")


Wait = Callable[[Db, Iterable[str]], set[str]]


def diagnosed(
    db: Db, config: Config, clock: Clock, *, wait: Wait, mend: bool = False, only: Iterable[str] | None = None
) -> Diagnosis:
    """What is found; with `mend`, what is left of it when everything was tried. `wait` says which runs it did not see end."""
    asked, unseen = _whom(db, config, clock, only)
    if asked is None:
        return Diagnosis(examine.examined(db, clock.now()), [], unseen)
    if not mend:
        found, silent = _round(db, clock, asked, False, wait)
        return Diagnosis(found.findings, [], unseen + silent)
    first, _ = _round(db, clock, asked, True, wait)
    wait(db, first.runs)
    left, silent = _round(db, clock, asked, False, wait)
    return Diagnosis(left.findings, first.mended, unseen + silent)


def _whom(db: Db, config: Config, clock: Clock, only: Iterable[str] | None) -> tuple[list[str] | None, list[str]]:
    """The hosts that can be asked, or None where nobody is there who could ask them; and who cannot be."""
    now, down_after_s = clock.now(), config.compute.host_down_after_s
    with db.read() as tx:
        all = hosts.services(tx)
    if not any(s.binary == hosts.CONDUCTOR and s.up(now, down_after_s) for s in all):
        return None, ["no conductor works: neither hosts nor neighbours could be asked"]
    wanted = None if only is None else set(only)
    mine = [s for s in all if s.binary == hosts.COMPUTE and (wanted is None or s.host in wanted)]
    unseen = [f"host {s.host} is down" for s in mine if not s.up(now, down_after_s)]
    up = [s for s in mine if s.up(now, down_after_s)]
    unseen += [f"host {s.host} is of a release that cannot tell" for s in up if TellHoldings.__name__ not in s.speaks]
    unseen += [f"there is no host {name}" for name in sorted((wanted or set()) - {s.host for s in mine})]
    return [s.host for s in up if TellHoldings.__name__ in s.speaks], unseen


def _round(db: Db, clock: Clock, asked: list[str], mend: bool, wait: Wait) -> tuple[Found, list[str]]:
    """One examination, waited for: what was found, and who did not answer."""
    runs = db.run(_begun, Ids(), clock.now(), asked, mend)
    late = wait(db, runs)
    found, silent = Found(), list[str]()
    for id, who in runs.items():
        with db.read() as tx:
            answers = [msgspec.json.decode(raw, type=Found) for step in STEPS if (raw := answer_of(tx, id, step))]
            fault = fault_of(tx, id)
        found = Found(
            found.findings + [f for a in answers for f in a.findings],
            found.mended + [line for a in answers for line in a.mended],
            found.runs + [run for a in answers for run in a.runs],
        )
        if id in late and who == CONDUCTOR:
            silent.append("no conductor answered in time: neighbours could not be asked")
            found = msgspec.structs.replace(found, findings=found.findings + examine.examined(db, clock.now()))
        elif id in late:
            silent.append(f"{who} did not answer in time")
        elif fault is not None:
            silent.append(f"{who}: {fault.said}")
    return found, silent


def _begun(tx: Tx, ids: Ids, now: float, asked: list[str], mend: bool) -> dict[str, str]:
    """Who is examined, by the run that does it."""
    whole = start(tx, examine.examine, Examine(mend), id=ids.uuid(), subject=ids.uuid(), now=now)
    runs = {whole: CONDUCTOR}
    for host in asked:
        job = ExamineHost(host, now, mend)
        runs[start(tx, examine.examine_host, job, id=ids.uuid(), subject=ids.uuid(), now=now)] = f"host {host}"
    return runs


def waited(db: Db, runs: Iterable[str], *, timeout_s: float) -> set[str]:
    """Until they are over. Those that are not by then."""
    left, until = set(runs), time.monotonic() + timeout_s
    while left and time.monotonic() < until:
        with db.read() as tx:
            left -= {id for id in left if over(tx, id)}
        if left:
            time.sleep(LOOK_EVERY_S)
    return left
