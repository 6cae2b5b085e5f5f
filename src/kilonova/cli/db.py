"""`kilonova db`: the schema by steps, a database into another one, and what is dead for long goes."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from kilonova.cli import config as configuration
from kilonova.cli import database
from kilonova.cli.hosts import table
from kilonova.kit.clock import WallClock
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.model.options import Config
from kilonova.store import evolve, purge, transfer

STAMPS = ("%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def main(parser: argparse.ArgumentParser, words: list[str]) -> int:
    parser.add_argument("--config", type=Path, metavar="FILE", help="read this file instead of the usual ones")
    what = parser.add_subparsers(dest="what", required=True, metavar="upgrade|check|status|copy|purge")
    one = what.add_parser(
        "upgrade", help="make the tables, or take the steps that this release needs; old processes may run"
    )
    one.add_argument("--finish", action="store_true", help="also what only a cloud without old processes bears")
    one = what.add_parser("check", help="can this release work with it, and are its tables as they should be? 0: yes")
    one = what.add_parser("status", help="which steps are done, and which are not")
    one.add_argument("--json", action="store_true", help="for programs")
    one = what.add_parser("copy", help="everything of a database into an empty one")
    for name in ("FROM", "TO"):
        one.add_argument(
            name.lower(),
            metavar=name,
            help="sqlite:////PATH, postgresql+psycopg://…, mysql+pymysql://…, or @FILE with it",
        )
    one = what.add_parser(
        "purge", help="remove servers that were deleted long ago, and journals that nobody will ask for"
    )
    one.add_argument(
        "--before", metavar="WHEN", help="2026-01-31[T12:00:00] in UTC, or an age: 90d, 12h (workers.keep_runs_s)"
    )
    one.add_argument("--dry-run", action="store_true", help="only count")
    one.add_argument("--archive", type=Path, metavar="FILE", help="append what goes to this file, a JSON object a row")
    one.add_argument("--batch", type=int, default=100, metavar="N", help="so many servers at a time (%(default)s)")
    chosen = parser.parse_args(words)
    config = configuration.read(chosen.config, {})
    with database.understood():
        if chosen.what == "copy":
            return _copy(config, chosen)
        db = database.opened(config, chosen.state_dir)
        try:
            return COMMANDS[chosen.what](db, config, chosen)
        finally:
            db.close()


# ---- steps


def _upgrade(db: Db, config: Config, chosen: argparse.Namespace) -> int:
    from kilonova.store.evolve.upgrade import upgrade

    now = evolve.standing(db)
    if now.empty or not now.have:
        evolve.ready(db)
        print(
            "The tables are there, as this release has them."
            if now.empty
            else "Stamped: it has what this release needs."
        )
        return 0
    if chosen.finish:
        undisturbed(db, config)
    if db.sqlite:
        with database.alone(db, config):
            done = upgrade(db, finish=True, say=print)
    else:
        done = upgrade(db, finish=chosen.finish, say=print)
    left = evolve.standing(db).pending
    if not done:
        print("Nothing is to be done.")
    if left:
        print(
            f"{', '.join(s.name for s in left)}: when no process of the old release is left, kilonova db upgrade --finish."
        )
    return 0


def undisturbed(db: Db, config: Config, folder: Path = evolve.STEPS) -> None:
    """Before the steps are taken that no process of another release bears: raises Conflict while one works."""
    import kilonova

    if any(s.line == "after" for s in evolve.standing(db, folder).pending):
        old = [who for who in database.at_work(db, config) if not who.endswith(f"({kilonova.__version__})")]
        if old:
            raise Conflict(
                f"Processes of another release work: {', '.join(old[:3])}. Without --finish they are not disturbed."
            )


def _check(db: Db, config: Config, chosen: argparse.Namespace) -> int:
    from kilonova.store.evolve.upgrade import differences

    now = evolve.standing(db)
    if why := evolve.trouble(now):
        print(why)
        return 1
    if now.unknown or now.pending:
        print("This release can work with it. It is between two releases: kilonova db status.")
        return 0
    found = differences(db)
    for line in found:
        print(line)
    print("This release can work with it." if not found else "It is not what the steps make of it.")
    return 1 if found else 0


def _status(db: Db, config: Config, chosen: argparse.Namespace) -> int:
    now = evolve.standing(db)
    rows = [(s.name, "to be done" if s in now.pending else "done") for s in evolve.steps()]
    rows += [(name, "done, by a newer release") for name in now.unknown]
    if chosen.json:
        shown = {"empty": now.empty, "steps": dict(rows), "trouble": evolve.trouble(now)}
        print(msgspec.json.encode(shown).decode())
    else:
        print(table([("step", "is"), *rows]))
        if now.empty or not now.have:
            print(
                "The database is empty." if now.empty else "It was made before there were steps: kilonova db upgrade."
            )
    return 0


# ---- copying


def _copy(config: Config, chosen: argparse.Namespace) -> int:
    urls = [database.named(said) for said in (chosen.__dict__["from"], chosen.to)]
    if urls[0] == urls[1]:
        raise Invalid("FROM and TO are the same.")
    source, target = (Db(url, threads=2) for url in urls)
    try:
        file = Path(source.engine.url.database or "") if source.sqlite else None
        if file is not None and not file.is_file():
            raise NotFound(f"There is no {file}.")
        with database.alone(source, config), database.alone(target, config):
            sizes = transfer.copy(source, target, _progress(sys.stdout.isatty()))
    finally:
        source.close()
        target.close()
    print(f"{sum(sizes.values())} rows in {sum(n > 0 for n in sizes.values())} tables are there, and are the same.")
    print("Name the new database in kilonova.toml ([database] url) and start the cloud; its files stay where they are.")
    return 0


def _progress(live: bool) -> Callable[[str, int, int], None]:
    """A line for each table that has rows; where somebody looks on, it moves."""

    def told(name: str, done: int, of: int) -> None:
        if done == of and of:
            print(f"{chr(13) if live else ''}{name:32} {done:9} rows", flush=True)
        elif live and of:
            print(f"\r{name:32} {done:9} of {of}", end="", flush=True)

    return told


# ---- purging


def _purge(db: Db, config: Config, chosen: argparse.Namespace) -> int:
    if chosen.batch < 1:
        raise Invalid("--batch is at least 1.")
    before = moment(chosen.before, WallClock().now(), config.workers.keep_runs_s)
    said = datetime.fromtimestamp(before, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if chosen.dry_run:
        with db.read() as tx:
            found = purge.count(tx, before)
        print(f"What was over before {said}, and would go:")
        print(table([("table", "rows"), *((name, str(n)) for name, n in found.items())]))
        return 0
    archive = _archive(chosen.archive)
    try:
        gone = purged(db, before, chosen.batch, archive)
    finally:
        if archive is not None:
            archive.close()
    print(f"What was over before {said}, and is gone:")
    print(table([("table", "rows"), *((name, str(n)) for name, n in sorted(gone.items()))]))
    return 0


def purged(db: Db, before: float, batch: int, archive: BinaryIO | None = None, rest_s: float = 0.01) -> Counter[str]:
    """Batch after batch; between them others come to write. What is in the archive twice was seen, and then was not removed."""
    gone: Counter[str] = Counter()
    for find, of in ((purge.dead, purge.of_servers), (purge.loose, purge.of_runs)):
        while went := db.run(_batch, find, of, before, batch, archive):
            gone.update(went)
            time.sleep(rest_s)
    return gone


def _batch(
    tx: Tx,
    find: Callable[[Tx, float, int], list[str]],
    of: Callable[[Tx, list[str]], dict[Any, list[Any]]],
    before: float,
    most: int,
    archive: BinaryIO | None,
) -> dict[str, int]:
    ids = find(tx, before, most)
    if not ids:
        return {}
    rows = of(tx, ids)
    if archive is not None:
        for table_, all in rows.items():
            for row in purge.plain(all, table_):
                archive.write(msgspec.json.encode(row) + b"\n")
        archive.flush()
        os.fsync(archive.fileno())
    return purge.remove(tx, rows)


def _archive(file: Path | None) -> BinaryIO | None:
    """For its owner's eyes: it has what servers were told, secrets with it."""
    if file is None:
        return None
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def moment(said: str | None, now: float, keep_s: float) -> float:
    """Raises Invalid."""
    if said is None:
        return now - keep_s
    if said[-1:] in UNITS and said[:-1].isdecimal():
        return now - int(said[:-1]) * UNITS[said[-1]]
    for stamp in STAMPS:
        try:
            at = datetime.strptime(said, stamp).replace(tzinfo=UTC).timestamp()
        except ValueError:
            continue
        if at > now:
            raise Invalid("--before is in the future.")
        return at
    raise Invalid(f"--before {said}: it must be a day, a moment in UTC, or an age such as 90d.")


COMMANDS = {"upgrade": _upgrade, "check": _check, "status": _status, "purge": _purge}
