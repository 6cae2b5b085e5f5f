"""What a database says of its own tables, in a form that can be compared."""

from typing import Any

import sqlalchemy as sa

from kilonova.kit.db import Db


def fingerprint(db: Db) -> dict[str, Any]:
    """All that it can tell of each table, in one order."""
    found, there = {}, sa.inspect(db.engine)
    for table in there.get_table_names():
        found[table] = {
            "columns": sorted(_column(c) for c in there.get_columns(table)),
            "key": tuple(there.get_pk_constraint(table)["constrained_columns"]),
            "indexes": sorted((i["name"] or "", tuple(map(str, i["column_names"])), bool(i["unique"])) for i in there.get_indexes(table)),
            "unique": sorted(tuple(u["column_names"]) for u in there.get_unique_constraints(table)),
            "foreign": sorted(_foreign(f) for f in there.get_foreign_keys(table)),
            "checks": sorted(str(c["sqltext"]) for c in there.get_check_constraints(table)),
        }  # fmt: skip
    return found


def _column(c: Any) -> tuple[str, ...]:
    collation = getattr(c["type"], "collation", None)
    return (
        c["name"],
        repr(c["type"]),
        str(collation),
        str(c["nullable"]),
        str(c["default"]),
        str(c.get("autoincrement")),
    )


def _foreign(f: Any) -> tuple[str, ...]:
    return str(f["constrained_columns"]), f["referred_table"], str(f["referred_columns"]), str(f.get("options"))
