"""`kilonova config`: what can be chosen, and what was. And where every command reads it from."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from kilonova.kit.config import load, reference, sample, written
from kilonova.model.options import Config


def read(file: Path | None = None, given: Mapping[str, object] | None = None) -> Config:
    """The configuration of this process: `file`, or the files of `places` that exist; environment; `given` by full name.

    Raises Invalid, with a sentence for each mistake.
    """
    paths = [file] if file else [p for p in places(os.environ) if p.exists()]
    return load(paths, os.environ, Config, given)


def places(env: Mapping[str, str]) -> list[Path]:
    """Where an operator writes, and where a user does; the user's wins."""
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/")) / ".config")
    return [Path("/etc/kilonova/kilonova.toml"), home / "kilonova/kilonova.toml"]


def main(words: list[str]) -> int:
    """`sample`, `reference`, or `show`: the choices that hold now, secrets as `***`."""
    parser = argparse.ArgumentParser("kilonova config", description=__doc__)
    parser.add_argument(
        "what", choices=["sample", "reference", "show"], help="a file to begin with, a page, or what holds now"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="read this file instead of the usual ones")
    chosen = parser.parse_args(words)
    match chosen.what:
        case "sample":
            print(sample(Config), end="")
        case "reference":
            print(reference(Config), end="")
        case "show":
            print(written(read(chosen.config)), end="")
    return 0
