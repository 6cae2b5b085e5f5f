"""The door: `kilonova COMMAND`. Each command is imported when it is called, so that the others cost nothing."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import kilonova
from kilonova.kit.errors import Trouble

COMMANDS = {
    "up": "a cloud on this machine, in the foreground; Ctrl-C stops it, the next `up` goes on",
    "demo": "the same, with a first server that boots before your eyes",
    "serve": "some roles of a cloud of many machines, over a database and a broker",
    "down": "stop the cloud that `up` started",
    "status": "is it up, where, and how is it",
    "db": "its schema, step by step; a copy in another database; what is long dead goes",
    "doctor": "is all as it must be, in the tables, on the hosts, at the neighbours; --mend puts right what is not",
    "hosts": "what they have and use, why a server would not go there; drain and balance them",
    "sim": "a whole cloud in one thread, on virtual time, from a seed, with faults",
    "config": "what can be chosen, and what was",
    "test": "test everything, or a part",
}


def main() -> int:
    words = sys.argv[1:]
    if words in (["--version"], ["-V"]):
        print(f"kilonova {kilonova.__version__}")
        return 0
    if not words or words[0] in ("--help", "-h", "help"):
        _help()
        return 0
    command: Callable[[list[str]], int] | None = {
        "up": _up,
        "demo": _demo,
        "serve": _serve,
        "down": _down,
        "status": _status,
        "db": _db,
        "doctor": _doctor,
        "hosts": _hosts,
        "sim": _sim,
        "config": _config,
        "test": _test,
    }.get(words[0])
    if command is None:
        print(f"kilonova: there is no command {words[0]!r}; kilonova --help lists them", file=sys.stderr)
        return 2
    try:
        return command(words[1:])
    except Trouble as e:
        print(f"kilonova {words[0]}: {e.said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as e:
        what = f"{e.strerror or e}: {e.filename}" if e.filename else str(e.strerror or e)
        print(f"kilonova {words[0]}: {what}. {_kept(e)}", file=sys.stderr)
        return 1
    except Exception as e:
        print(f"kilonova {words[0]}: an error of ours ({type(e).__name__}). {_kept(e)}", file=sys.stderr)
        return 1


def _kept(e: Exception) -> str:
    """Where those who look for the error find it; a terminal is for sentences."""
    import tempfile
    import traceback

    try:
        with tempfile.NamedTemporaryFile("w", prefix="kilonova-error-", suffix=".txt", delete=False) as file:
            traceback.print_exception(e, file=file)
    except OSError:
        return ""
    return f"The whole story is in {file.name}"


def _help() -> None:
    print("usage: kilonova COMMAND [OPTION …]\n")
    for name, what in COMMANDS.items():
        print(f"  {name:8} {what}")
    print("\nkilonova COMMAND --help says more. Options can also stand in kilonova.toml: kilonova config sample.")


def _up(words: list[str]) -> int:
    from kilonova.cli import up

    return up.main(words, demo=False)


def _demo(words: list[str]) -> int:
    from kilonova.cli import up

    return up.main(words, demo=True)


def _serve(words: list[str]) -> int:
    from kilonova.cli import serve

    return serve.main(words)


def _parser(name: str) -> argparse.ArgumentParser:
    from kilonova.cli.state import usual

    parser = argparse.ArgumentParser(f"kilonova {name}", description=f"{name}: {COMMANDS[name]}")
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=usual(dict(os.environ)),
        metavar="DIR",
        help="where the cloud lives (%(default)s)",
    )
    return parser


def _down(words: list[str]) -> int:
    from kilonova.cli import down

    return down.main(_parser("down"), words)


def _status(words: list[str]) -> int:
    from kilonova.cli import status

    return status.main(_parser("status"), words)


def _db(words: list[str]) -> int:
    from kilonova.cli import db

    return db.main(_parser("db"), words)


def _doctor(words: list[str]) -> int:
    from kilonova.cli import doctor

    return doctor.main(_parser("doctor"), words)


def _hosts(words: list[str]) -> int:
    from kilonova.cli import hosts

    return hosts.main(_parser("hosts"), words)


def _sim(words: list[str]) -> int:
    from kilonova.cli import sim

    return sim.main(words)


def _config(words: list[str]) -> int:
    from kilonova.cli import config

    return config.main(words)


def _test(words: list[str]) -> int:
    from kilonova.cli import test

    sys.argv[1:] = words
    return test.main()


if __name__ == "__main__":
    sys.exit(main())
