"""What servers are made of: flavors and who may use them, and users' key pairs."""

from collections.abc import Iterable
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Tx, anywhere, meta
from kilonova.kit.errors import Conflict, Invalid, NotFound
from kilonova.kit.ready import Shapes, ready
from kilonova.model.flavor import Flavor
from kilonova.model.machine import Keypair

FLAVORS = sa.Table(
    "flavors",
    meta,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(255), nullable=False, unique=True),
    sa.Column("name", sa.String(255), nullable=False, unique=True),
    sa.Column("vcpus", sa.Integer, nullable=False),
    sa.Column("memory_mb", sa.Integer, nullable=False),
    sa.Column("disk_gb", sa.Integer, nullable=False),
    sa.Column("ephemeral_gb", sa.Integer, nullable=False),
    sa.Column("swap_mb", sa.Integer, nullable=False),
    sa.Column("rxtx_factor", sa.Double, nullable=False),
    sa.Column("is_public", sa.Boolean, nullable=False),
    sa.Column("disabled", sa.Boolean, nullable=False),
    sa.Column("description", sa.Text),
    sa.Column("extra_specs", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double),
)
ACCESS = sa.Table(
    "flavor_projects",
    meta,
    sa.Column("flavor", sa.String(255), primary_key=True),
    sa.Column("project_id", sa.String(255), primary_key=True),
)
KEYPAIRS = sa.Table(
    "keypairs",
    meta,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("user_id", sa.String(64), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("type", sa.String(8), nullable=False),
    sa.Column("fingerprint", sa.String(255), nullable=False),
    sa.Column("public_key", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.UniqueConstraint("user_id", "name", name="one_keypair_of_a_name"),
)


# ---- flavors


def add_flavor(tx: Tx, flavor: Flavor, now: float) -> None:
    """Raises Conflict where the id or the name is taken."""
    taken = tx.execute(
        sa.select(FLAVORS.c.id, FLAVORS.c.name).where((FLAVORS.c.id == flavor.id) | (FLAVORS.c.name == flavor.name))
    ).first()
    if taken is not None:
        said = (
            f"Flavor with ID {flavor.id} already exists."
            if taken.id == flavor.id
            else f"Flavor with name {flavor.name} already exists."
        )
        raise Conflict(said)
    values = msgspec.structs.asdict(flavor) | {"extra_specs": _text(flavor.extra_specs), "created_at": now}
    del values["aliases"]
    tx.execute(sa.insert(FLAVORS), values)


FLAVOR = ready(sa.select(FLAVORS).where(FLAVORS.c.id == sa.bindparam("the_id")))


def flavor(tx: Tx, id: str) -> Flavor:
    """Raises NotFound."""
    row = tx.execute(FLAVOR, {"the_id": id}).first()
    if row is None:
        raise NotFound(f"Flavor {id} could not be found.")
    return _flavor(row)


def flavor_numbers(tx: Tx, ids: Iterable[str]) -> dict[str, int]:
    """What flavors are called where numbers are shown; those that there still are."""
    rows = tx.execute(sa.select(FLAVORS.c.id, FLAVORS.c.number).where(FLAVORS.c.id.in_(list(ids))))
    return {r.id: r.number for r in rows}


SORTS = {
    "created_at": FLAVORS.c.created_at,
    "description": FLAVORS.c.description,
    "ephemeral_gb": FLAVORS.c.ephemeral_gb,
    "flavorid": FLAVORS.c.id,
    "id": FLAVORS.c.number,
    "is_public": FLAVORS.c.is_public,
    "memory_mb": FLAVORS.c.memory_mb,
    "name": FLAVORS.c.name,
    "root_gb": FLAVORS.c.disk_gb,
    "swap": FLAVORS.c.swap_mb,
    "updated_at": FLAVORS.c.updated_at,
    "vcpus": FLAVORS.c.vcpus,
    "rxtx_factor": FLAVORS.c.rxtx_factor,
    "disabled": FLAVORS.c.disabled,
}


def flavors(
    tx: Tx,
    *,
    project_id: str | None,
    public: bool | None = None,
    disabled: bool | None = None,
    min_memory_mb: int = 0,
    min_disk_gb: int = 0,
    name: str | None = None,
    sort: str = "flavorid",
    desc: bool = False,
    limit: int = 1000,
    marker: str | None = None,
) -> list[Flavor]:
    """A page. `project_id` sees public flavors and those it was given; None sees all. Raises Invalid: no such marker."""
    values: dict[str, Any] = {"mine": project_id, "off": disabled, "memory": min_memory_mb, "disk": min_disk_gb}
    values |= {"piece": anywhere(name or ""), "most": limit}
    if marker is not None:
        at = tx.execute(PAGES.of(("marker", sort), lambda: _place(sort)), {"marker": marker}).first()
        if at is None:
            raise Invalid(f"marker [{marker}] not found")
        values |= {"at": at[0], "number": at[1]}
    shape = (project_id is not None, public, disabled is not None, name is not None, sort, desc, marker is not None)
    return [_flavor(r) for r in tx.execute(PAGES.of(shape, lambda: _page(*shape)), values)]


PAGES = Shapes()


def _page(
    mine: bool, public: bool | None, disabled: bool, name: bool, sort: str, desc: bool, marker: bool
) -> sa.Select[Any]:
    """A list of flavors as it is asked for."""
    f, given = FLAVORS.c, sa.bindparam
    where: list[sa.ColumnElement[bool]] = [f.memory_mb >= given("memory"), f.disk_gb >= given("disk")]
    if mine:
        allowed = f.id.in_(sa.select(ACCESS.c.flavor).where(ACCESS.c.project_id == given("mine")))
        where.append(f.is_public if public else ~f.is_public & allowed if public is False else f.is_public | allowed)
    elif public is not None:
        where.append(f.is_public == public)
    if disabled:
        where.append(f.disabled == given("off"))
    if name:
        where.append(f.name.like(given("piece"), escape="/"))
    key = _key(sort)
    if marker:
        at = given("at", type_=key.type)
        where.append((key < at if desc else key > at) | ((key == at) & (f.number > given("number"))))
    query = sa.select(FLAVORS).where(*where).order_by(key.desc() if desc else key.asc(), f.number)
    return query.limit(given("most", type_=sa.Integer))


def _place(sort: str) -> sa.Select[Any]:
    """Where a marker stands."""
    return sa.select(_key(sort), FLAVORS.c.number).where(FLAVORS.c.id == sa.bindparam("marker"))


def _key(sort: str) -> Any:
    column = SORTS[sort]
    return sa.func.coalesce(column, 0 if sort == "updated_at" else "") if column.nullable else column


def change_flavor(tx: Tx, id: str, now: float, **facts: Any) -> Flavor:
    """`description`, `extra_specs`. Raises NotFound."""
    if "extra_specs" in facts:
        facts["extra_specs"] = _text(facts["extra_specs"])
    if not tx.execute(sa.update(FLAVORS).where(FLAVORS.c.id == id).values(**facts, updated_at=now)).rowcount:
        raise NotFound(f"Flavor {id} could not be found.")
    return flavor(tx, id)


def remove_flavor(tx: Tx, id: str) -> None:
    """Raises NotFound. Servers keep the flavor they were made with."""
    if not tx.execute(sa.delete(FLAVORS).where(FLAVORS.c.id == id)).rowcount:
        raise NotFound(f"Flavor {id} could not be found.")
    tx.execute(sa.delete(ACCESS).where(ACCESS.c.flavor == id))


def flavor_projects(tx: Tx, id: str) -> list[str]:
    return list(
        tx.execute(sa.select(ACCESS.c.project_id).where(ACCESS.c.flavor == id).order_by(ACCESS.c.project_id)).scalars()
    )


def allow_flavor(tx: Tx, id: str, project_id: str) -> None:
    """Raises Conflict where it was allowed already."""
    if project_id in flavor_projects(tx, id):
        raise Conflict(f"Flavor access already exists for flavor {id} and project {project_id} combination.")
    tx.execute(sa.insert(ACCESS), {"flavor": id, "project_id": project_id})


def refuse_flavor(tx: Tx, id: str, project_id: str) -> None:
    """Raises NotFound where it was not allowed."""
    gone = sa.delete(ACCESS).where(ACCESS.c.flavor == id, ACCESS.c.project_id == project_id)
    if not tx.execute(gone).rowcount:
        raise NotFound(f"Flavor access not found for {id} / {project_id} combination.")


def _flavor(row: Any) -> Flavor:
    m = row._mapping
    values = {f: m[f] for f in Flavor.__struct_fields__ if f not in ("extra_specs", "aliases")}
    return Flavor(**values, extra_specs=msgspec.json.decode(m["extra_specs"]))


def _text(specs: dict[str, str]) -> str:
    return msgspec.json.encode(specs).decode()


# ---- key pairs


class Stored(msgspec.Struct, frozen=True):
    """A key pair as the API shows it. The private half is never kept."""

    id: int
    user_id: str
    name: str
    type: str
    fingerprint: str
    public_key: str
    created_at: float


def keypair(tx: Tx, user_id: str, name: str) -> Keypair:
    """As a server is given it. Raises NotFound."""
    k = stored_keypair(tx, user_id, name)
    return Keypair(k.name, k.public_key, k.type)


def stored_keypair(tx: Tx, user_id: str, name: str) -> Stored:
    row = tx.execute(sa.select(KEYPAIRS).where(KEYPAIRS.c.user_id == user_id, KEYPAIRS.c.name == name)).first()
    if row is None:
        raise NotFound(f"Keypair {name} not found for user {user_id}")
    return Stored(**row._mapping)


def keypairs(tx: Tx, user_id: str, *, limit: int = 1000, marker: str | None = None) -> list[Stored]:
    """By name. Raises Invalid: no such marker."""
    where = [KEYPAIRS.c.user_id == user_id]
    if marker is not None:
        if tx.execute(sa.select(KEYPAIRS.c.id).where(*where, KEYPAIRS.c.name == marker)).first() is None:
            raise Invalid(f"marker [{marker}] not found")
        where.append(KEYPAIRS.c.name > marker)
    query = sa.select(KEYPAIRS).where(*where).order_by(KEYPAIRS.c.name).limit(limit)
    return [Stored(**r._mapping) for r in tx.execute(query)]


def count_keypairs(tx: Tx, user_id: str) -> int:
    return tx.execute(sa.select(sa.func.count()).where(KEYPAIRS.c.user_id == user_id)).scalar_one()


def add_keypair(tx: Tx, key: Stored) -> None:
    """`key.id` is given by the database. Raises Conflict where the user has one of this name."""
    try:
        with tx.begin_nested():
            tx.execute(sa.insert(KEYPAIRS), {k: v for k, v in msgspec.structs.asdict(key).items() if k != "id"})
    except sa.exc.IntegrityError:
        raise Conflict(f"Key pair '{key.name}' already exists.") from None


def remove_keypair(tx: Tx, user_id: str, name: str) -> None:
    """Raises NotFound."""
    if not tx.execute(sa.delete(KEYPAIRS).where(KEYPAIRS.c.user_id == user_id, KEYPAIRS.c.name == name)).rowcount:
        raise NotFound(f"Keypair {name} not found for user {user_id}")
