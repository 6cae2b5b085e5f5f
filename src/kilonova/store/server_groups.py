"""Server groups. Who is a member stands in the servers' own rows, so whoever is deleted has left.

Two of a group that are placed at the same time must not both believe that they are the first: a claim for a member of
a strict group changes the group's row, so they queue there, and each counts what those before it have claimed.
"""

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import Invalid, NoCapacity, NotFound
from kilonova.kit.ready import each, ready
from kilonova.model.limits import Unified
from kilonova.model.server import Server
from kilonova.model.server_group import Company, ServerGroup, admits
from kilonova.store import migrations, placement, quotas, servers

T = sa.Table(
    "server_groups",
    meta,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(36), nullable=False, unique=True),
    sa.Column("project_id", sa.String(64), nullable=False),
    sa.Column("user_id", sa.String(64), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("policy", sa.String(24), nullable=False),
    sa.Column("max_per_host", sa.Integer),
    sa.Column("claims", sa.Integer, nullable=False),  # how often somebody held the row to be alone with the group
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Index("server_groups_of_project", "project_id", "number"),
)
VIOLATED = {
    "affinity": "Affinity instance group policy was violated.",
    "anti-affinity": "Anti-affinity instance group policy was violated.",
}


def create(tx: Tx, defaults: quotas.Most, group: ServerGroup, now: float) -> None:
    """Raises OverQuota where the project, or the user, has as many as it may."""
    quotas.lock(tx, group.project_id)
    for user in (None, group.user_id):
        if user is not None and not quotas.own_limits(tx, group.project_id, user):
            continue
        allowed = quotas.limits(tx, defaults, group.project_id, user)["server_groups"]
        if 0 <= allowed <= (used := count(tx, group.project_id, user)):
            raise quotas.exceeded(defaults, "server_groups", 1, used, "Quota exceeded, too many server groups.")
    row = {f: getattr(group, f) for f in ServerGroup.__struct_fields__ if f != "members"}
    tx.execute(sa.insert(T), row | {"claims": 0, "created_at": now})


def get(tx: Tx, id: str) -> ServerGroup:
    """Raises NotFound."""
    found = _groups(tx, tx.execute(SELECT.where(T.c.id == id)).all())
    if not found:
        raise NotFound(f"Instance group {id} could not be found.")
    return found[0]


def page(tx: Tx, project_id: str | None, *, limit: int, offset: int = 0) -> list[ServerGroup]:
    """Of a project, or of all (None), the oldest first: two queries, whatever there is."""
    query = SELECT.order_by(T.c.number).limit(limit).offset(offset)
    if project_id is not None:
        query = query.where(T.c.project_id == project_id)
    return _groups(tx, tx.execute(query).all())


def delete(tx: Tx, id: str) -> None:
    """Its servers stay, and are nobody's members. Raises NotFound."""
    if not tx.execute(sa.delete(T).where(T.c.id == id)).rowcount:
        raise NotFound(f"Instance group {id} could not be found.")
    tx.execute(sa.update(servers.T).where(servers.T.c.group_id == id).values(group_id=None))


def count(tx: Tx, project_id: str, user_id: str | None = None) -> int:
    query = sa.select(sa.func.count()).select_from(T).where(T.c.project_id == project_id)
    if user_id is not None:
        query = query.where(T.c.user_id == user_id)
    return int(tx.execute(query).scalar_one())


def join(tx: Tx, defaults: quotas.Most, group: ServerGroup, user_id: str, n: int) -> None:
    """`n` new servers of this user are to be members: is there room for them? Raises OverQuota, Invalid.

    Holds the group until the transaction ends.
    """
    if not tx.execute(HOLD, {"the_id": group.id}).rowcount:
        raise Invalid(f"Instance group {group.id} could not be found.")
    allowed = quotas.limits(tx, defaults, group.project_id, user_id)["server_group_members"]
    s = servers.T.c
    mine = sa.select(sa.func.count()).where(s.group_id == group.id, s.deleted_at.is_(None))
    if not isinstance(defaults, Unified):
        mine = mine.where(s.user_id == user_id)
    if 0 <= allowed < (used := int(tx.execute(mine).scalar_one())) + n:
        raise quotas.exceeded(defaults, "server_group_members", n, used, "Quota exceeded, too many servers in group")


def company(tx: Tx, server: Server | str, group_id: str) -> Company | None:
    """What a scheduler is told; may be old by the time it looks. None: there is no such group any longer."""
    group = tx.execute(ONE, {"the_id": group_id}).first()
    if group is None:
        return None
    me = server if isinstance(server, str) else server.id
    s = servers.T.c
    where = s.group_id == group_id, s.id != me, s.deleted_at.is_(None), s.host.is_not(None)
    rows = tx.execute(sa.select(s.host, sa.func.count()).where(*where).group_by(s.host))
    return Company(group.policy, group.max_per_host or 1, {r[0]: int(r[1]) for r in rows})


def admit(tx: Tx, server: Server, host: str, provider: str) -> None:
    """To be asked in the transaction that claims for a member, before the claim. Raises NoCapacity; roll back then.

    A member is where its row says and where it holds something: in the middle of a move it is in two places.  Where it
    may be put back (what it had there, its migration holds), no other can be that must be apart from it.
    UPDATE server_groups SET claims = claims + 1 WHERE id = … AND policy IN ('affinity', 'anti-affinity'), then count.
    """
    if server.group_id is None or not tx.execute(HOLD_STRICT, {"the_id": server.group_id}).rowcount:
        return
    group = tx.execute(ONE, {"the_id": server.group_id}).one()
    told = {"the_id": server.group_id, "me": server.id, "the_host": host, "at": provider}
    here, back, elsewhere = (int(n or 0) for n in tx.execute(AROUND, told).one())
    if group.policy == "anti-affinity":
        here += back
    if not admits(group.policy, group.max_per_host or 1, here, elsewhere):
        raise NoCapacity(VIOLATED[group.policy], why=f"{server.id} of {server.group_id} on {host}")


def _groups(tx: Tx, rows: Iterable[Any]) -> list[ServerGroup]:
    rows = list(rows)
    members: dict[str, list[str]] = {r.id: [] for r in rows}
    s = servers.T.c
    if rows:
        living = sa.select(s.group_id, s.id).where(s.group_id.in_(list(members)), s.deleted_at.is_(None))
        for group, id in tx.execute(living.order_by(s.number)):
            members[group].append(id)
    return [ServerGroup(r.id, r.project_id, r.user_id, r.name, r.policy, r.max_per_host, members[r.id]) for r in rows]


# ---- the SQL, once

SELECT = sa.select(*[T.c[f] for f in ServerGroup.__struct_fields__ if f != "members"])
ONE = ready(SELECT.where(T.c.id == sa.bindparam("the_id")))
HOLD = ready(sa.update(T).where(T.c.id == sa.bindparam("the_id")).values(claims=T.c.claims + 1))
HOLD_STRICT = ready(HOLD.where(T.c.policy.in_(each(VIOLATED))))
_s, _a = servers.T.c, placement.ALLOCATIONS.c
_m = migrations.T.c
_its = sa.select(_m.uuid).where(_m.server == _s.id).correlate(servers.T)
_held = sa.exists().where(_a.consumer == _s.id, _a.provider == sa.bindparam("at"))
_kept = sa.exists().where(_a.consumer.in_(_its), _a.provider == sa.bindparam("at"))
_here = sa.func.coalesce(_s.host == sa.bindparam("the_host"), sa.false()) | _held
_others = (_s.group_id == sa.bindparam("the_id")) & (_s.id != sa.bindparam("me")) & _s.deleted_at.is_(None)
# SELECT sum(here), sum(may come back here), sum(placed, and not here) FROM servers WHERE they are the other members
AROUND = sa.select(
    sa.func.sum(sa.case((_here, 1), else_=0)),
    sa.func.sum(sa.case((~_here & _kept, 1), else_=0)),
    sa.func.sum(sa.case((~_here & _s.host.is_not(None), 1), else_=0)),
).where(_others)
