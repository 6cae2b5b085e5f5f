"""Who may have how much. Usage is counted where it lies, in the rows themselves; nothing keeps a second book.

The claim: a row of the project is locked by one UPDATE (on SQLite the one writer does that), then the living
servers are counted and the new ones written in the same transaction; so two callers cannot both take the last.
"""

from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Tx, meta, one_writer
from kilonova.kit.errors import OverQuota
from kilonova.kit.ready import ready
from kilonova.model import options
from kilonova.model.ask import amounts_of
from kilonova.model.flavor import Flavor
from kilonova.model.limits import NAMES, SERVERS, Unified
from kilonova.model.server import Server
from kilonova.model.states import VM, Task
from kilonova.store import placement, servers

LIMITS = sa.Table(
    "quota_limits",
    meta,
    sa.Column("owner", sa.String(64), primary_key=True),  # project, or "class:NAME"
    sa.Column("user_id", sa.String(64), primary_key=True, server_default=""),  # "": the whole project
    sa.Column("resource", sa.String(64), primary_key=True),
    sa.Column("hard_limit", sa.Integer, nullable=False),
)
LOCKS = sa.Table(
    "quota_locks",
    meta,
    sa.Column("project_id", sa.String(64), primary_key=True),
    sa.Column("n", sa.Integer, nullable=False),
)
DEFAULT_CLASS = "class:default"
Most = options.Quota | Unified

_t, _b = servers.T.c, sa.bindparam
USED = ready(
    sa.select(sa.func.count(), sa.func.sum(_t.vcpus), sa.func.sum(_t.memory_mb)).where(
        _t.project_id == _b("the_project"),
        _t.deleted_at.is_(None),
        (_t.vm_state != str(VM.soft_deleted)) | (_t.task_state == str(Task.restoring)),  # there was room for it
    )
)
USED_BY = ready(USED.where(_t.user_id == _b("the_user")))
SAID = ready(sa.select(LIMITS).where(LIMITS.c.owner.in_([_b("default", DEFAULT_CLASS), _b("the_owner")])))
BUMP = ready(sa.update(LOCKS).where(LOCKS.c.project_id == _b("the_project")).values(n=LOCKS.c.n + 1))
OWN = ready(
    sa.select(LIMITS.c.resource, LIMITS.c.hard_limit).where(
        LIMITS.c.owner == _b("the_owner"), LIMITS.c.user_id == _b("the_user")
    )
)


class Usage(msgspec.Struct, frozen=True):
    """Of a project, or of one of its users. `ram` in MiB."""

    instances: int = 0
    cores: int = 0
    ram: int = 0


def usage(tx: Tx, project_id: str, user_id: str | None = None) -> Usage:
    """SELECT count(*), sum(vcpus), sum(memory_mb) FROM servers WHERE project_id = … AND deleted_at IS NULL AND …"""
    if user_id is None:
        n, cores, ram = tx.execute(USED, {"the_project": project_id}).one()
    else:
        n, cores, ram = tx.execute(USED_BY, {"the_project": project_id, "the_user": user_id}).one()
    return Usage(n, int(cores or 0), int(ram or 0))


def limits(tx: Tx, defaults: Most, project_id: str, user_id: str | None = None) -> dict[str, int]:
    """What holds: user's, else project's, else class default's, else the configuration's; or what the identity service
    says. -1 is no limit."""
    if isinstance(defaults, Unified):
        return defaults.quotas()
    return _holding(_said(tx, project_id), defaults, project_id, user_id)


def _said(tx: Tx, project_id: str) -> dict[tuple[str, str], dict[str, int]]:
    """What was set, by (owner, user)."""
    said: dict[tuple[str, str], dict[str, int]] = {}
    for r in tx.execute(SAID, {"the_owner": project_id}):
        said.setdefault((r.owner, r.user_id), {})[r.resource] = r.hard_limit
    return said


def _holding(
    said: dict[tuple[str, str], dict[str, int]], defaults: options.Quota, project_id: str, user_id: str | None
) -> dict[str, int]:
    owners = [(DEFAULT_CLASS, ""), (project_id, "")] + ([(project_id, user_id)] if user_id else [])
    found = {f: getattr(defaults, f) for f in options.Quota.__struct_fields__}
    for who in owners:
        found |= {k: v for k, v in said.get(who, {}).items() if k in found}
    return found


def _binding(tx: Tx, defaults: options.Quota, project_id: str, user_id: str) -> list[tuple[str | None, dict[str, int]]]:
    """What holds of the whole project (None), and of the user, where something was said of him."""
    said = _said(tx, project_id)
    asked = [None, user_id] if said.get((project_id, user_id)) else [None]
    return [(who, _holding(said, defaults, project_id, who)) for who in asked]


def set_limits(tx: Tx, owner: str, wanted: dict[str, int], user_id: str = "") -> None:
    """`owner` is a project or "class:NAME"."""
    for resource, n in wanted.items():
        where = (LIMITS.c.owner == owner) & (LIMITS.c.user_id == user_id) & (LIMITS.c.resource == resource)
        if not tx.execute(sa.update(LIMITS).where(where).values(hard_limit=n)).rowcount:
            known = tx.execute(
                sa.select(LIMITS.c.hard_limit).where(where)
            ).first()  # MariaDB counts no row that was so already
            if known is None:
                tx.execute(
                    sa.insert(LIMITS), {"owner": owner, "user_id": user_id, "resource": resource, "hard_limit": n}
                )


def own_limits(tx: Tx, owner: str, user_id: str = "") -> dict[str, int]:
    """What was set for just this owner."""
    rows = tx.execute(OWN, {"the_owner": owner, "the_user": user_id})
    return {r.resource: r.hard_limit for r in rows}


def users_limits(tx: Tx, project_id: str) -> list[tuple[str, str, int]]:
    """(user, resource, limit) of all users of a project that have limits of their own."""
    rows = tx.execute(sa.select(LIMITS).where(LIMITS.c.owner == project_id, LIMITS.c.user_id != ""))
    return [(r.user_id, r.resource, r.hard_limit) for r in rows]


def forget_limits(tx: Tx, owner: str, user_id: str | None = None) -> None:
    """Back to what holds otherwise; of a project: its users' limits too."""
    where = [LIMITS.c.owner == owner] + ([LIMITS.c.user_id == user_id] if user_id is not None else [])
    tx.execute(sa.delete(LIMITS).where(*where))


class Size(msgspec.Struct, frozen=True):
    """Of one server, as quotas count it; `amounts`: all that it takes, by resource class."""

    cores: int
    ram_mb: int
    amounts: dict[str, int]


def size_of(server: Server) -> Size:
    return Size(server.flavor.vcpus, server.flavor.memory_mb, amounts_of(server))


def claim(tx: Tx, defaults: Most, project_id: str, user_id: str, size: Size, least: int, most: int) -> int:
    """How many servers of this size may be made now: at most `most`, at least `least`. Raises OverQuota.

    Holds the project's lock until the transaction ends; where nothing is limited nothing is counted, and nobody waits.
    """
    if isinstance(defaults, Unified):
        lock(tx, project_id)
        return _claim_unified(tx, defaults, {SERVERS: 1} | _by_class(size.amounts), least, most)
    binding = _binding(tx, defaults, project_id, user_id)
    if all(allowed[r] < 0 for _, allowed in binding for r in ("instances", "cores", "ram")):
        return most
    lock(tx, project_id)
    fits = most
    for who, allowed in binding:
        used = usage(tx, project_id, who)
        fits = min(fits, *_rooms(allowed, used, size.cores, size.ram_mb))
        if fits < least:
            raise _over(allowed, used, size.cores, size.ram_mb, most)
    return fits


def claim_again(tx: Tx, defaults: Most, server: Server) -> None:
    """A server that was not counted is to be counted again; what it holds of hosts it never gave back. Raises OverQuota."""
    size = size_of(server)
    if isinstance(defaults, Unified):
        size = msgspec.structs.replace(size, amounts={})
    claim(tx, defaults, server.project_id, server.user_id, size, 1, 1)


def claim_room(tx: Tx, defaults: Most, server: Server) -> None:
    """A server that is counted, and held nothing of any host, is to hold it again: only unified limits ask. Raises OverQuota."""
    if isinstance(defaults, Unified):
        lock(tx, server.project_id)
        _claim_unified(tx, defaults, _by_class(amounts_of(server)), 1, 1)


def claim_more(tx: Tx, defaults: Most, server: Server, flavor: Flavor) -> None:
    """May a server have this flavor? What becomes less, or stays, is not asked about; by unified limits, there must be room
    for all of it beside what it has. Raises OverQuota.

    Holds the project's lock until the transaction ends.
    """
    project_id, old = server.project_id, server.flavor
    if isinstance(defaults, Unified):
        lock(tx, project_id)
        _claim_unified(tx, defaults, _by_class(amounts_of(msgspec.structs.replace(server, flavor=flavor))), 1, 1)
        return
    cores, ram_mb = max(flavor.vcpus - old.vcpus, 0), max(flavor.memory_mb - old.memory_mb, 0)
    if not (cores or ram_mb):
        return
    lock(tx, project_id)
    for who, allowed in _binding(tx, defaults, project_id, server.user_id):
        used = usage(tx, project_id, who)
        over = {"cores": cores > 0 and 0 <= allowed["cores"] < used.cores + cores}
        over["ram"] = ram_mb > 0 and 0 <= allowed["ram"] < used.ram + ram_mb
        if any(over.values()):
            raise _exceeded([r for r, is_ in over.items() if is_], {"cores": cores, "ram": ram_mb}, used, allowed)


def exceeded(most: Most, word: str, wanted: int, used: int, said: str) -> OverQuota:
    """Too much of one thing, by the word of quota sets: in their words, or as unified limits say it."""
    if isinstance(most, Unified):
        name = NAMES[word]
        return OverQuota(most.said([name], {name: used}, {name: wanted}))
    return OverQuota(said)


def _claim_unified(tx: Tx, most_: Unified, each: dict[str, int], least: int, most: int) -> int:
    """How many times `each` there is room for."""
    used, fits = held(tx, most_.project_id), most
    for resource, n in each.items():
        if n > 0 and (limit := most_.most(resource)) >= 0:
            fits = min(fits, max(0, limit - used.get(resource, 0)) // n)
    if fits < least:
        wanted = {r: n * least for r, n in each.items()}
        raise OverQuota(most_.said(most_.over(used, wanted), used, wanted))
    return fits


def held(tx: Tx, project_id: str) -> dict[str, int]:
    """As unified limits count: servers; what the project holds of all hosts, and what builds will that have no host yet."""
    found = _by_class(placement.usage(tx, project_id))
    for row in tx.execute(BUILDING, {"the_project": project_id}).all():
        for name, n in _by_class(amounts_of(servers.of(row))).items():
            found[name] = found.get(name, 0) + n
    return found | {SERVERS: usage(tx, project_id).instances}


def _by_class(amounts: dict[str, int]) -> dict[str, int]:
    return {f"class:{name}": n for name, n in amounts.items()}


BUILDING = servers.SELECT.where(
    _t.project_id == _b("the_project"),
    _t.deleted_at.is_(None),
    _t.vm_state == str(VM.building),
    ~sa.exists().where(placement.CONSUMERS.c.uuid == _t.id),
)


def _rooms(allowed: dict[str, int], used: Usage, cores: int, ram_mb: int) -> list[int]:
    rooms = []
    for resource, each in (("instances", 1), ("cores", cores), ("ram", ram_mb)):
        if allowed[resource] >= 0 and each:
            rooms.append(max(0, (allowed[resource] - getattr(used, resource)) // each))
    return rooms or [10**9]


def _over(allowed: dict[str, int], used: Usage, cores: int, ram_mb: int, n: int) -> OverQuota:
    wanted = {"cores": cores * n, "instances": n, "ram": ram_mb * n}
    over = [r for r, w in wanted.items() if 0 <= allowed[r] < getattr(used, r) + w]
    return _exceeded(over, wanted, used, allowed)


def _exceeded(over: list[str], wanted: dict[str, int], used: Usage, allowed: dict[str, int]) -> OverQuota:
    join: Any = lambda f: ", ".join(str(f(r)) for r in over)
    return OverQuota(
        f"Quota exceeded for {join(str)}: Requested {join(wanted.get)}, but already used {join(lambda r: getattr(used, r))} of {join(allowed.get)} {join(str)}"
    )


def lock(tx: Tx, project_id: str) -> None:
    """UPDATE quota_locks SET n = n + 1 WHERE project_id = … : whoever comes second waits for the first's end."""
    if one_writer(tx):
        return
    who = {"the_project": project_id}
    if not tx.execute(BUMP, who).rowcount:
        try:
            with tx.begin_nested():
                tx.execute(sa.insert(LOCKS), {"project_id": project_id, "n": 0})
        except sa.exc.IntegrityError:
            tx.execute(BUMP, who)
