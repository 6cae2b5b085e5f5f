"""Which database a command works on, and who else does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from kilonova.cli.state import StateDir, is_home
from kilonova.kit.clock import WallClock
from kilonova.kit.db import Db
from kilonova.kit.errors import Conflict, Invalid, NotFound, Unavailable
from kilonova.model.options import Config
from kilonova.store import evolve, hosts

SILENT_S = 35.0  # roles say that they live every ten seconds: two of those may be lost


def opened(config: Config, directory: Path, threads: int = 2) -> Db:
    """What is configured, or SQLite in the state directory. Raises NotFound where no cloud was."""
    file = directory.absolute() / "kilonova.db"
    if not (url := config.database.url.reveal()) and not (is_home(directory) and file.exists()):
        raise NotFound(f"No cloud lives in {directory}.")
    return Db(url or f"sqlite:///{file}", threads=threads)


def named(said: str) -> str:
    """The URL that was meant: itself, or what stands in the file behind an `@`, for a password is nothing for a command line.

    Raises Invalid.
    """
    if said.startswith("@"):
        try:
            said = Path(said[1:]).read_text().strip()
        except OSError as e:
            raise Invalid(f"Cannot read {said[1:]}: {e.strerror}.") from None
        secret = False
    else:
        secret = True
    try:
        url = sa.make_url(said)
        sa.create_engine(url)
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError, ValueError):
        raise Invalid(
            "A database is named as sqlite:////PATH, postgresql+psycopg://…, mysql+pymysql://… or @FILE."
        ) from None
    if secret and url.password:
        raise Invalid("A command line is seen by others: put the URL with its password into a file, and name it @FILE.")
    return said


def at_work(db: Db, config: Config) -> list[str]:
    """Processes that work with it, as far as they say so in the database."""
    if evolve.standing(db).empty:
        return []
    now, down_after_s = WallClock().now(), max(config.compute.host_down_after_s, SILENT_S)
    with db.read() as tx:
        all = hosts.services(tx, processes=True)
    return [f"{s.binary.partition('/')[0]} on {s.host} ({s.version})" for s in all if s.up(now, down_after_s)]


@contextmanager
def alone(db: Db, config: Config) -> Iterator[None]:
    """Nobody else works with it meanwhile. Raises Conflict.

    A SQLite database is its directory's cloud's; of others their processes say in it that they live.
    """
    file = Path(db.engine.url.database or "") if db.sqlite else None
    if file is not None and is_home(file.parent):
        with StateDir(file.parent).held():
            yield
        return
    if file is None and (busy := at_work(db, config)):
        raise Conflict(f"Processes work with it: {', '.join(busy[:3])}. Stop them, and wait until they count as down.")
    yield


@contextmanager
def understood() -> Iterator[None]:
    """What a database says, as a sentence. Raises Unavailable."""
    try:
        yield
    except sa.exc.SQLAlchemyError as e:
        said = str(getattr(e, "orig", None) or e).strip().splitlines()[0]
        raise Unavailable(f"The database cannot be used: {said}.", why=str(e)) from None
