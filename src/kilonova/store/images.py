"""Images: what is known of them. Their bytes are in `companions/blobs.py`, and only an `active` image has some.

The road of an image is one statement a step: queued → saving → active, and back to queued where an upload fails.
"""

from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Tx, claim, meta
from kilonova.kit.errors import Conflict, NotFound
from kilonova.kit.ready import ready


class Image(msgspec.Struct, frozen=True):
    """Sizes in bytes, `min_disk` in GB, `min_ram` in MB; None where the API says null. Moments in seconds since 1970."""

    id: str
    owner: str
    created_at: float
    updated_at: float
    name: str | None = None
    status: str = "queued"
    visibility: str = "shared"
    disk_format: str | None = None
    container_format: str | None = None
    min_disk: int = 0
    min_ram: int = 0
    protected: bool = False
    hidden: bool = False
    size: int | None = None
    virtual_size: int | None = None
    checksum: str | None = None
    hash_algo: str | None = None
    hash_value: str | None = None
    tags: list[str] = []
    properties: dict[str, str] = {}


class Member(msgspec.Struct, frozen=True):
    """A project that an image is shared with. `status`: pending, accepted, rejected."""

    image_id: str
    member_id: str
    status: str
    created_at: float
    updated_at: float


# MySQL and MariaDB would take "A" and "a" for one name.
EXACT = sa.String(255).with_variant(sa.String(255, collation="utf8mb4_bin"), "mysql", "mariadb")

IMAGES = sa.Table(
    "images",
    meta,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("owner", sa.String(255), nullable=False, index=True),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.Column("name", sa.String(255)),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("visibility", sa.String(16), nullable=False, index=True),
    sa.Column("disk_format", sa.String(20)),
    sa.Column("container_format", sa.String(20)),
    sa.Column("min_disk", sa.Integer, nullable=False),
    sa.Column("min_ram", sa.Integer, nullable=False),
    sa.Column("protected", sa.Boolean, nullable=False),
    sa.Column("hidden", sa.Boolean, nullable=False),
    sa.Column("size", sa.BigInteger),
    sa.Column("virtual_size", sa.BigInteger),
    sa.Column("checksum", sa.String(32)),
    sa.Column("hash_algo", sa.String(64)),
    sa.Column("hash_value", sa.String(128)),
    sa.Index("images_newest", "created_at", "id"),
)
PROPERTIES = sa.Table(
    "image_properties",
    meta,
    sa.Column("image_id", sa.String(36), primary_key=True),
    sa.Column("name", EXACT, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
TAGS = sa.Table(
    "image_tags",
    meta,
    sa.Column("image_id", sa.String(36), primary_key=True),
    sa.Column("tag", EXACT, primary_key=True),
)
MEMBERS = sa.Table(
    "image_members",
    meta,
    sa.Column("image_id", sa.String(36), primary_key=True),
    sa.Column("member_id", sa.String(255), primary_key=True, index=True),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
)
COLUMNS = [c.name for c in IMAGES.columns]
ONE = ready(sa.select(IMAGES).where(IMAGES.c.id == sa.bindparam("the_id")))
SAID_OF = ready(  # its properties and, without a value, its tags
    sa.union_all(
        sa.select(PROPERTIES.c.name, PROPERTIES.c.value).where(PROPERTIES.c.image_id == sa.bindparam("the_id")),
        sa.select(TAGS.c.tag, sa.null()).where(TAGS.c.image_id == sa.bindparam("the_id")),
    )
)


# ---- one


def create(tx: Tx, image: Image) -> None:
    """Raises Conflict where the id is taken."""
    try:
        tx.execute(sa.insert(IMAGES), {c: getattr(image, c) for c in COLUMNS})
    except sa.exc.IntegrityError as e:
        raise Conflict(f"Image ID {image.id} already exists!", why=str(e)) from None
    _properties(tx, image.id, image.properties)
    _tags(tx, image.id, image.tags)


def look(tx: Tx, id: str) -> Image | None:
    row = tx.execute(ONE, {"the_id": id}).first()
    if row is None:
        return None
    said = tx.execute(SAID_OF, {"the_id": id}).all()
    tags = sorted(r.name for r in said if r.value is None)
    return Image(**row._mapping, tags=tags, properties={r.name: r.value for r in said if r.value is not None})


def change(tx: Tx, image: Image) -> None:
    """What a user may change. Its status, size and sums go the roads below. Raises NotFound."""
    mine = ("updated_at", "owner", "name", "visibility", "min_disk", "min_ram", "protected", "hidden")
    values: dict[str, Any] = {c: getattr(image, c) for c in mine}
    if image.status == "queued":
        values |= {"disk_format": image.disk_format, "container_format": image.container_format}
    if not tx.execute(sa.update(IMAGES).where(IMAGES.c.id == image.id).values(values)).rowcount:
        raise NotFound(f"No image found with ID {image.id}")
    tx.execute(sa.delete(PROPERTIES).where(PROPERTIES.c.image_id == image.id))
    tx.execute(sa.delete(TAGS).where(TAGS.c.image_id == image.id))
    _properties(tx, image.id, image.properties)
    _tags(tx, image.id, image.tags)


def drop(tx: Tx, id: str) -> bool:
    """Unless it is protected: the check and the act are one statement."""
    if not tx.execute(sa.delete(IMAGES).where(IMAGES.c.id == id, IMAGES.c.protected.is_(False))).rowcount:
        return False
    for table in (PROPERTIES, TAGS, MEMBERS):
        tx.execute(sa.delete(table).where(table.c.image_id == id))
    return True


def step(tx: Tx, id: str, now: float, *, to: str, over: tuple[str, ...], **more: Any) -> bool:
    """UPDATE images SET status = :to … WHERE id = :id AND status IN (:over)"""
    where = (IMAGES.c.id == id) & IMAGES.c.status.in_(over)
    return claim(tx, sa.update(IMAGES).where(where).values(status=to, updated_at=now, **more))


def of_status(tx: Tx, *statuses: str) -> set[str]:
    """Ids."""
    return set(tx.scalars(sa.select(IMAGES.c.id).where(IMAGES.c.status.in_(statuses))))


def _properties(tx: Tx, id: str, properties: dict[str, str]) -> None:
    if properties:
        tx.execute(sa.insert(PROPERTIES), [{"image_id": id, "name": n, "value": v} for n, v in properties.items()])


def _tags(tx: Tx, id: str, tags: list[str]) -> None:
    if tags:
        tx.execute(sa.insert(TAGS), [{"image_id": id, "tag": t} for t in tags])


def _whole(tx: Tx, rows: list[Any]) -> list[Image]:
    """With what lies in the child tables: one query each."""
    ids = [r.id for r in rows]
    if not ids:
        return []
    tags: dict[str, list[str]] = {}
    for id, tag in tx.execute(sa.select(TAGS).where(TAGS.c.image_id.in_(ids)).order_by(TAGS.c.tag)):
        tags.setdefault(id, []).append(tag)
    properties: dict[str, dict[str, str]] = {}
    for id, name, value in tx.execute(sa.select(PROPERTIES).where(PROPERTIES.c.image_id.in_(ids))):
        properties.setdefault(id, {})[name] = value
    return [Image(**r._mapping, tags=tags.get(r.id, []), properties=properties.get(r.id, {})) for r in rows]


# ---- many


class Order(NamedTuple):
    key: str
    down: bool


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """What a list is of. `viewer` None sees all; `visibility` None is what is his, shown to all, or shared with him.

    `equal`: column → values, one of them; `least`, `most`, `below`: column → bound, `below` itself left out.
    """

    viewer: str | None
    visibility: str | None = None
    member_status: str = "accepted"
    hidden: bool = False
    equal: dict[str, list[Any]] = {}
    least: dict[str, float] = {}
    most: dict[str, float] = {}
    below: dict[str, float] = {}
    tags: list[str] = []
    properties: dict[str, str] = {}


# fmt: off
SORTED = (
    "name", "status", "container_format", "disk_format", "size", "id", "created_at", "updated_at", "owner",
    "visibility", "min_disk", "min_ram", "checksum",
)
# fmt: on
TEXTS = ("name", "container_format", "disk_format", "checksum")


def page(tx: Tx, search: Search, order: list[Order], *, limit: int, marker: Image | None) -> list[Image]:
    """`order` ends with something unique, so that the marker is one place. Three statements."""
    query = sa.select(IMAGES).where(*_conditions(search))
    if marker:
        query = query.where(_after(marker, order))
    query = query.order_by(*[_key(o.key).desc() if o.down else _key(o.key).asc() for o in order]).limit(limit)
    return _whole(tx, list(tx.execute(query)))


def _key(name: str) -> Any:
    """A column to sort by; NULL is the least of all, in every database."""
    column = IMAGES.c[name]
    if name in TEXTS:
        return sa.func.coalesce(column, "")
    return sa.func.coalesce(column, -1) if name == "size" else column


def _place(image: Image, name: str) -> Any:
    value = getattr(image, name)
    return value if value is not None else (-1 if name == "size" else "")


def _after(marker: Image, order: list[Order]) -> Any:
    """(a, b, c) > (:a, :b, :c), written out because the directions differ."""
    ways = []
    for n, o in enumerate(order):
        same = [_key(p.key) == _place(marker, p.key) for p in order[:n]]
        beyond = _key(o.key) < _place(marker, o.key) if o.down else _key(o.key) > _place(marker, o.key)
        ways.append(sa.and_(*same, beyond))
    return sa.or_(*ways)


def _conditions(s: Search) -> list[Any]:
    c = IMAGES.c
    where: list[Any] = [c.hidden.is_(s.hidden)]
    if s.viewer is not None:
        shared = sa.select(MEMBERS.c.image_id).where(MEMBERS.c.member_id == s.viewer)
        if s.member_status != "all":
            shared = shared.where(MEMBERS.c.status == s.member_status)
        seen = [c.owner == s.viewer, c.visibility == "public", (c.visibility == "shared") & c.id.in_(shared)]
        if s.visibility in ("community", "all"):
            seen.append(c.visibility == "community")
        where.append(sa.or_(*seen))
    if s.visibility not in (None, "all"):
        where.append(c.visibility == s.visibility)
    where += [c[name].in_(values) for name, values in s.equal.items()]
    where += [c[name] >= value for name, value in s.least.items()]
    where += [c[name] <= value for name, value in s.most.items()]
    where += [c[name] < value for name, value in s.below.items()]
    where += [c.id.in_(sa.select(TAGS.c.image_id).where(TAGS.c.tag == tag)) for tag in s.tags]
    for name, value in s.properties.items():
        fit = (PROPERTIES.c.name == name) & (PROPERTIES.c.value == value)
        where.append(c.id.in_(sa.select(PROPERTIES.c.image_id).where(fit)))
    return where


# ---- with whom


def members(tx: Tx, image_id: str) -> list[Member]:
    query = sa.select(MEMBERS).where(MEMBERS.c.image_id == image_id).order_by(MEMBERS.c.created_at, MEMBERS.c.member_id)
    return [Member(**r._mapping) for r in tx.execute(query)]


def member(tx: Tx, image_id: str, member_id: str) -> Member | None:
    where = (MEMBERS.c.image_id == image_id) & (MEMBERS.c.member_id == member_id)
    row = tx.execute(sa.select(MEMBERS).where(where)).first()
    return None if row is None else Member(**row._mapping)


def share(tx: Tx, m: Member) -> None:
    """Raises Conflict where he is one already."""
    try:
        tx.execute(sa.insert(MEMBERS), msgspec.structs.asdict(m))
    except sa.exc.IntegrityError as e:
        raise Conflict(f"Image member {m.member_id} already exists for image {m.image_id}.", why=str(e)) from None


def answer(tx: Tx, image_id: str, member_id: str, status: str, now: float) -> bool:
    where = (MEMBERS.c.image_id == image_id) & (MEMBERS.c.member_id == member_id)
    return claim(tx, sa.update(MEMBERS).where(where).values(status=status, updated_at=now))


def unshare(tx: Tx, image_id: str, member_id: str) -> bool:
    where = (MEMBERS.c.image_id == image_id) & (MEMBERS.c.member_id == member_id)
    return bool(tx.execute(sa.delete(MEMBERS).where(where)).rowcount)
