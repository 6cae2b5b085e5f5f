"""Write the next step: what the tables of the code have more, or less, than the steps make.

    python -m kilonova.store.evolve.draft before_servers_get_a_colour

Read what it wrote: it is a draft.  What is renamed looks to it like one thing gone and one come, and data it does not move.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from alembic.autogenerate import produce_migrations, render_python_code
from alembic.operations.ops import UpgradeOps

from kilonova.kit.db import Db
from kilonova.store.evolve import STEPS, everything, steps
from kilonova.store.evolve.upgrade import _context, _engine, upgrade
from kilonova.store.networks import Json


def draft(name: str, folder: Path = STEPS) -> Path | None:
    """The file that it wrote; None where there is nothing to be done."""
    line, _, rest = name.partition("_")
    if not re.fullmatch("before|after", line) or not re.fullmatch("[a-z0-9_]+", rest):
        raise SystemExit("usage: draft before_WHAT_IT_DOES | after_WHAT_IT_DOES")
    known = steps(folder)
    last = next((s.name for s in reversed(known) if s.line == line), None)
    code, imports = _code(folder)
    if code.strip() == "pass":
        return None
    full = f"{line}_{max((s.number for s in known), default=0) + 1:04}_{rest}"
    file = folder / f"{full[:32]}.py"
    head = f'"""{rest.replace("_", " ").capitalize()}: say what for."""\n\n'
    head += "import sqlalchemy as sa\nfrom alembic import op\n" + "".join(f"{i}\n" for i in sorted(imports))
    head += f"\nrevision, down_revision = {file.stem!r}, {last!r}\n\n\ndef upgrade() -> None:\n"
    file.write_text(head + code + "\n")
    return file


def _code(folder: Path) -> tuple[str, set[str]]:
    """What would make of a database with all steps one with today's tables."""
    tables, imports = everything(), set[str]()
    with tempfile.TemporaryDirectory() as scratch:
        db = Db(f"sqlite:///{scratch}/draft.db")
        upgrade(db, finish=True, folder=folder)
        engine = _engine(db)
        with engine.connect() as connection:
            context = _context(connection, folder, ours=set(tables.tables))
            found = produce_migrations(context, tables).upgrade_ops
            assert isinstance(found, UpgradeOps)
            code = render_python_code(found, render_item=_plainly, render_as_batch=True, migration_context=context)
        engine.dispose()
        db.close()
    if "mysql." in code:
        imports.add("from sqlalchemy.dialects import mysql")
    return "    " + re.sub(r" *# ### .*\n?", "", code).strip(), imports


def _plainly(kind: str, thing: Any, _: Any) -> str | Literal[False]:
    """Our own types as what they are in the database: a step knows nothing of the code of its day."""
    return "sa.Text()" if kind == "type" and isinstance(thing, Json) else False


if __name__ == "__main__":
    written = draft(sys.argv[1] if len(sys.argv) == 2 else "")
    sys.stdout.write(f"{written or 'Nothing differs.'}\n")
