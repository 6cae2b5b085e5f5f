"""`kilonova down`: stop the cloud that lives in a directory; with `--purge`, for ever."""

import argparse
import shutil
from pathlib import Path

from kilonova.cli.state import StateDir, is_home
from kilonova.companions.wires import userns
from kilonova.kit.errors import NotFound, Unavailable


def main(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Servers' machines go on or are stopped as the configuration says; the next `up` finds them."""
    parser.add_argument(
        "--timeout", type=float, default=60, metavar="S", help="how long to wait for it (%(default)s s)"
    )
    parser.add_argument("--purge", action="store_true", help="and remove its servers, networks, images: everything")
    parser.add_argument("--config", type=Path, metavar="FILE", help="read this file instead of the usual ones")
    chosen = parser.parse_args(words)
    if not is_home(chosen.state_dir):
        raise NotFound(f"No cloud lives in {chosen.state_dir}.")
    state = StateDir(chosen.state_dir)
    now = state.running()
    if now is None and not chosen.purge:
        print("It is not up.")
        return 0
    if now is not None:
        print(f"Stopping process {now.pid} …", flush=True)
        if not state.end(chosen.timeout):
            raise Unavailable(f"Process {now.pid} did not end within {chosen.timeout:.0f} s.")
    if chosen.purge:
        from kilonova.cli.cloud import purge
        from kilonova.cli.config import read

        with state.held():
            if userns.holder(state.path):
                userns.close(state.path)  # with all that lives in there
            else:
                purge(read(chosen.config), state)
        shutil.rmtree(state.path)
        print(f"{state.path} is gone, and all that was in it.")
    else:
        print("It is down. `kilonova up` goes on where it stopped.")
    return 0
