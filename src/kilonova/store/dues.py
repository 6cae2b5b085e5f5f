"""What another Placement service is owed: consumers and providers that are not what it was told of them.

Written by `store/placement.py` in the transaction that changes what is held, where there is such a service (`Db.owe`);
so whoever dies meanwhile, it will be told.  Who tells it reads the debt first, then what is so now, and pays what he read.
"""

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

import sqlalchemy as sa

from kilonova.kit.db import Tx, meta
from kilonova.kit.ready import ready

Kind = Literal["consumer", "provider"]

T = sa.Table(
    "placement_dues",
    meta,
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("n", sa.Integer, nullable=False),  # so often it changed since it was told
)


class Due(NamedTuple):
    """`n` tells whether it changed once more while it was told."""

    kind: str
    id: str
    n: int


def note(tx: Tx, kind: Kind, id: str) -> None:
    """It is not any more what the other service knows, if there is one."""
    if not getattr(tx.dialect, "owes", False):
        return
    if tx.execute(AGAIN, {"the_kind": kind, "the_id": id}).rowcount:
        return
    try:
        with tx.begin_nested():
            tx.execute(sa.insert(T), {"kind": kind, "id": id, "n": 1})
    except sa.exc.IntegrityError:  # another was faster
        tx.execute(AGAIN, {"the_kind": kind, "the_id": id})


def first(tx: Tx, limit: int) -> list[Due]:
    return [Due(*r) for r in tx.execute(sa.select(T).order_by(T.c.kind, T.c.id).limit(limit))]


def of(tx: Tx, consumers: Collection[str]) -> list[Due]:
    mine = T.c.kind == "consumer", T.c.id.in_(list(consumers))
    return [Due(*r) for r in tx.execute(sa.select(T).where(*mine))]


def paid(tx: Tx, dues: Iterable[Due]) -> None:
    for due in dues:
        tx.execute(sa.delete(T).where(T.c.kind == due.kind, T.c.id == due.id, T.c.n == due.n))


AGAIN = ready(
    sa.update(T).where(T.c.kind == sa.bindparam("the_kind"), T.c.id == sa.bindparam("the_id")).values(n=T.c.n + 1)
)
