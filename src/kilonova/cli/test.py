"""`./kilonova test`: everything, from nothing. `./kilonova test FAST`: in seconds, what needs no cloud.

First the checks that read the code (style, types, directions of import), side by side; then the tests.  The last
line says how many passed, failed and were skipped, and why; the exit status is 0 only when nothing failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from kilonova.cli import prepare, setup
from kilonova.kit.errors import Trouble

FAST = [prepare.ROOT / "tests" / room for room in ("tidy", "pure", "store")]
FEATURES = ("libvirt", "network", "userns", "guest", "fleet", "test")

# fmt: off
CHECKS = {
    "style":   ("ruff", "check", "--quiet", "--output-format=concise"),
    "format":  ("ruff", "format", "--check", "--quiet"),
    "types":   ("mypy", "--no-error-summary"),
    "imports": ("lint-imports", "--no-logo"),
}
# fmt: on


class Outcome(NamedTuple):
    """What the tests came to; `reasons` of skips, with how often."""

    passed: int
    failed: list[str]
    skipped: int
    reasons: Counter[str]


def main() -> int:
    parser = argparse.ArgumentParser("kilonova test", description="Tests Kilonova, and installs what that needs.")
    parser.add_argument("part", nargs="*", help="FAST, or files and folders of tests; nothing is everything")
    parser.add_argument("--yes", action="store_true", help="install Debian packages without asking")
    own, more = _split(sys.argv[1:])
    chosen = parser.parse_args(own)
    parts = [p for part in chosen.part for p in (map(str, FAST) if part == "FAST" else (part,))]
    if absent := [p for p in parts if not Path(p.split("::")[0]).exists()]:
        parser.error(f"there is no {absent[0]}")
    begun = time.monotonic()
    try:
        if not parts or any(not _is_fast(part) for part in parts):
            setup.ensure(FEATURES, say=_say, ask=(lambda _: True) if chosen.yes else setup.agree)
        prepare.ready(Path(sys.prefix), "test")
    except (prepare.Failed, Trouble) as trouble:
        _say(f"kilonova test: not begun. {trouble}")
        return 1

    failed = _check() if not chosen.part or "FAST" in chosen.part else []
    outcome = _pytest(parts, more)
    failed += outcome.failed
    for reason, times in outcome.reasons.most_common():
        _say(f"skipped {times}: {reason}")
    for name in failed:
        _say(f"FAILED {name}")
    counts = f"{outcome.passed} passed, {len(failed)} failed, {outcome.skipped} skipped"
    _say(f"kilonova test: {'FAILED' if failed else 'ok'}: {counts}, {time.monotonic() - begun:.0f} s")
    return 1 if failed else 0


def _check() -> list[str]:
    """The names of the checks that failed; what they said is printed."""

    def run(name: str) -> tuple[str, subprocess.CompletedProcess[str], float]:
        begun = time.monotonic()
        program, *words = CHECKS[name]
        command = [str(Path(sys.prefix) / "bin" / program), *words]
        done = subprocess.run(command, cwd=prepare.ROOT, capture_output=True, text=True, check=False)
        return name, done, time.monotonic() - begun

    failed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, done, seconds in pool.map(run, CHECKS):
            _say(f"{name:8} {'FAILED' if done.returncode else 'ok'}, {seconds:.1f} s")
            if done.returncode:
                failed.append(name)
                _say(f"{done.stdout}{done.stderr}".rstrip())
    return failed


def _pytest(parts: list[str], more: list[str]) -> Outcome:
    """Runs them in a process of their own, as they may take it down, and reads its report."""
    with tempfile.TemporaryDirectory(prefix="kilonova-test-") as scratch:
        report = Path(scratch) / "report.xml"
        always = [f"--junitxml={report}", "-o", "junit_family=xunit1", "--durations=10", "--durations-min=5", "-ra"]
        command = [sys.executable, "-P", "-m", "pytest", *always, *more, *parts]
        code = subprocess.call(command, cwd=None if parts else prepare.ROOT, stdin=subprocess.DEVNULL)
        if not report.exists():
            return Outcome(0, [f"pytest (it ended with {code} and left no report)"], 0, Counter())
        outcome = _read(ET.parse(report))  # noqa: S314 - our own file
        if code and not outcome.failed:
            outcome.failed.append("pytest (nothing was collected)" if code == 5 else f"pytest (it ended with {code})")
        return outcome


def _read(report: "ET.ElementTree[ET.Element]") -> Outcome:
    cases = list(report.iter("testcase"))
    wrong = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skips = [s.get("message", "") for c in cases if (s := c.find("skipped")) is not None]
    names = [f"{c.get('file') or c.get('classname', '?')}::{c.get('name')}" for c in wrong]
    return Outcome(len(cases) - len(wrong) - len(skips), names, len(skips), Counter(skips))


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Ours, and after `--` pytest's."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _is_fast(part: str) -> bool:
    path = Path(part.split("::")[0]).resolve()
    return any(path.is_relative_to(room) for room in FAST)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
