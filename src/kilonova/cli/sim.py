"""`kilonova sim`: storms over a simulated cloud, on virtual time, from seeds. The same seed tells the same story."""

import argparse
import gc
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterable
from multiprocessing import get_context
from typing import NamedTuple


class Told(NamedTuple):
    """What a seed told."""

    seed: int
    wrong: list[str]
    virtual_s: float
    crashes: int
    boundaries: int
    history: str
    cpu_s: float


def main(words: list[str]) -> int:
    """0 only if every invariant held."""
    parser = argparse.ArgumentParser("kilonova sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (%(default)s)")
    parser.add_argument("--seeds", default="1", metavar="N|A-B", help="so many, or from A to B (%(default)s)")
    parser.add_argument("--forever", action="store_true", help="seed after seed until Ctrl-C, or until one is wrong")
    parser.add_argument("--jobs", "-j", type=int, default=1, metavar="N", help="so many at once (%(default)s)")
    parser.add_argument("--hours", type=float, metavar="H", help="virtual time of each; at least one storm")
    parser.add_argument("--verbose", "-v", action="store_true", help="tell what happens")
    chosen = parser.parse_args(words)
    seeds = _seeds(parser, chosen)
    if chosen.jobs < 1 or not (chosen.hours is None or 0 < chosen.hours < float("inf")):
        parser.error("there is at least one job, and hours are more than none")
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order in a set must not be the machine's dice
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "kilonova.main", "sim", *words])  # noqa: S606
    logging.disable()
    _prepare()
    asked = ((seed, chosen.hours or 0.0, chosen.verbose) for seed in seeds)
    began, told = time.monotonic(), list[Told]()
    try:
        if chosen.jobs == 1:
            _hear(map(_play, asked), told, chosen.forever)
        else:
            with get_context("fork").Pool(chosen.jobs) as pool:  # what is prepared is there in each
                _hear(pool.imap_unordered(_play, asked), told, chosen.forever)
    except KeyboardInterrupt:
        print()
    real, bad = time.monotonic() - began, [t.seed for t in told if t.wrong]
    virtual, cpu = sum(t.virtual_s for t in told), sum(t.cpu_s for t in told)
    print(
        f"{len(told)} seeds, {len(bad)} bad; {virtual / 3600:.1f} virtual hours in {real:.0f} s ({virtual / max(real, 1e-9):.0f} : 1;"
        f" {virtual / max(cpu, 1e-9):.0f} : 1 of CPU time), {sum(t.boundaries for t in told)} boundaries"
    )
    for seed in bad:
        print(f"again: {_again(seed, chosen.hours)}")
    return 1 if bad else 0


def _seeds(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> Iterable[int]:
    first, dash, last = chosen.seeds.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        parser.error(f"--seeds is a number, or two with a dash between: {chosen.seeds}")
    many = range(int(first), int(last) + 1) if dash else range(chosen.seed, chosen.seed + int(first))
    if chosen.seed < 0 or not many:
        parser.error("seeds are counted from 0, and there is at least one")
    return itertools.count(many[0]) if chosen.forever else many


def _prepare() -> None:
    """What all seeds have in common: the code, and a cloud in which nothing has happened yet."""
    from kilonova.sim.world import CALM, Sim

    Sim(0, CALM).close()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _play(asked: tuple[int, float, bool]) -> Told:
    from kilonova.sim.storms import play
    from kilonova.sim.world import BEGAN

    seed, hours, verbose = asked
    began = time.process_time()
    wrong, sim = play(seed, hours=hours, tell=print if verbose else None)
    took = time.process_time() - began
    return Told(seed, wrong, sim.now - BEGAN, sim.crashes, sim.boundaries, sim.history.hexdigest(), took)


def _hear(all: Iterable[Told], told: list[Told], forever: bool) -> None:
    for t in all:
        told.append(t)
        for line in t.wrong:
            print(f"seed {t.seed}: {line}")
        print(
            f"seed {t.seed}: {'WRONG' if t.wrong else 'well'}, {t.crashes} crashes, {t.boundaries} boundaries, story {t.history[:12]}",
            flush=True,
        )
        if t.wrong:
            print(f"again: {_again(t.seed, None)} --verbose", flush=True)
            if forever:
                return


def _again(seed: int, hours: float | None) -> str:
    return f"./kilonova sim --seed {seed}{f' --hours {hours:g}' if hours else ''}"
