"""`kilonova sim`: storms over a simulated cloud, on virtual time, from seeds. The same seed tells the same story."""

import argparse
import logging
import os
import sys
import time


def main(words: list[str]) -> int:
    """0 only if every invariant held."""
    parser = argparse.ArgumentParser("kilonova sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="so many, one after the other (%(default)s)")
    parser.add_argument("--hours", type=float, metavar="H", help="virtual time of each; at least one storm")
    parser.add_argument("--verbose", "-v", action="store_true", help="tell what happens")
    chosen = parser.parse_args(words)
    if chosen.seed < 0 or chosen.seeds < 1 or not (chosen.hours is None or 0 < chosen.hours < float("inf")):
        parser.error("seeds are counted from 0, there is at least one, and hours are more than none")
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order in a set must not be the machine's dice
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "kilonova.main", "sim", *words])  # noqa: S606
    logging.disable()

    from kilonova.sim.storms import play

    began, virtual, boundaries, bad = time.monotonic(), 0.0, 0, 0
    for seed in range(chosen.seed, chosen.seed + chosen.seeds):
        found, sim = play(seed, hours=chosen.hours or 0, tell=print if chosen.verbose else None)
        virtual += sim.now - 1_800_000_000
        boundaries += sim.boundaries
        bad += bool(found)
        for line in found:
            print(f"seed {seed}: {line}")
        print(
            f"seed {seed}: {'WRONG' if found else 'well'}, {sim.crashes} crashes, {sim.boundaries} boundaries, story {sim.history.hexdigest()[:12]}",
            flush=True,
        )
    real = time.monotonic() - began
    print(
        f"{chosen.seeds} seeds, {bad} bad; {virtual / 3600:.1f} virtual hours in {real:.0f} s ({virtual / real:.0f} : 1), {boundaries} boundaries"
    )
    return 1 if bad else 0
