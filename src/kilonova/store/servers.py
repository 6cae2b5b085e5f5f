"""Servers at rest. Every function takes the transaction first; each is one statement where it can be.

Columns that are only ever read whole are JSON texts; what is searched for has a column of its own.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import Conflict, NotFound
from kilonova.kit.journal import Moved, closely, tell
from kilonova.kit.ready import Shapes, each, ready
from kilonova.model.devices import Device
from kilonova.model.flavor import Flavor
from kilonova.model.machine import Keypair
from kilonova.model.server import Image, Plug, Server
from kilonova.model.states import VM, Task, Verb

T = sa.Table(
    "servers",
    meta,
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(36), nullable=False, unique=True),
    sa.Column("project_id", sa.String(64), nullable=False),
    sa.Column("user_id", sa.String(64), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("hostname", sa.String(255), nullable=False),
    sa.Column("flavor", sa.Text, nullable=False),
    sa.Column("flavor_id", sa.String(255), nullable=False),
    sa.Column("vcpus", sa.Integer, nullable=False),  # of the flavor: quotas are summed over them
    sa.Column("memory_mb", sa.Integer, nullable=False),
    sa.Column("vm_state", sa.String(24), nullable=False),
    sa.Column("task_state", sa.String(40)),
    sa.Column("power_state", sa.Integer, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("description", sa.String(255)),
    sa.Column("image", sa.Text, nullable=False),
    sa.Column("image_id", sa.String(36), nullable=False),
    sa.Column("host", sa.String(255)),
    sa.Column("node", sa.String(255)),
    sa.Column("availability_zone", sa.String(255)),
    sa.Column("plugs", sa.Text, nullable=False),
    sa.Column("devices", sa.Text),  # NULL: none
    sa.Column("tags", sa.Text, nullable=False),  # ",one,two," — a tag has no comma, so LIKE '%,one,%' finds it
    sa.Column("metadata", sa.Text, nullable=False),
    sa.Column("system_metadata", sa.Text, nullable=False),
    sa.Column("keypair", sa.Text),
    sa.Column("key_name", sa.String(255)),
    sa.Column("user_data", sa.Text),
    sa.Column("config_drive", sa.Boolean, nullable=False),
    sa.Column("access_ip_v4", sa.String(39), nullable=False),
    sa.Column("access_ip_v6", sa.String(39), nullable=False),
    sa.Column("locked_by", sa.String(8)),
    sa.Column("locked_reason", sa.String(255)),
    sa.Column("disk_config", sa.String(8), nullable=False),
    sa.Column("progress", sa.Integer, nullable=False),
    sa.Column("launch_index", sa.Integer, nullable=False),
    sa.Column("reservation_id", sa.String(32), nullable=False),
    sa.Column("root_device", sa.String(255), nullable=False),
    sa.Column("scheduler_hints", sa.Text, nullable=False),
    sa.Column("trusted_certs", sa.Text),
    sa.Column("group_id", sa.String(36)),
    sa.Column("fault_run", sa.String(64)),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double),
    sa.Column("launched_at", sa.Double),
    sa.Column("terminated_at", sa.Double),
    sa.Column("deleted_at", sa.Double),
    # In the order of lists (`server_pages`), so that a page is read and nothing is sorted: see bench/lists.py.
    sa.Index("servers_of_project", "project_id", "deleted_at", "created_at", "number"),
    sa.Index("servers_newest", "deleted_at", "created_at", "number"),
    sa.Index("servers_on_host", "host", "deleted_at", "created_at", "number"),
    sa.Index("servers_changed", "updated_at"),
    sa.Index("servers_of_group", "group_id"),
)


def row(server: Server) -> dict[str, Any]:
    """As a row to be inserted; the database gives the number."""
    values: dict[str, Any] = {f: getattr(server, f) for f in Server.__struct_fields__ if f != "number"}
    for name in _JSON:
        values[name] = _text(values[name])
    values["devices"] = _text(server.devices or None)
    values["tags"] = tags_text(server.tags)
    values["vm_state"] = str(server.vm_state)
    return values | {
        "flavor_id": server.flavor.id,
        "vcpus": server.flavor.vcpus,
        "memory_mb": server.flavor.memory_mb,
        "image_id": server.image.id,
        "key_name": server.keypair.name if server.keypair else None,
    }


def create(tx: Tx, servers: Iterable[Server]) -> None:
    made = list(servers)
    tx.execute(INSERT, [row(s) for s in made])
    if closely(tx):
        for s in made:
            tell(tx, Moved(before=None, after=s, at=s.created_at))


@contextmanager
def _moved(tx: Tx, id: str, now: float) -> Iterator[None]:
    """Around a statement that may change its state: told to who wants to hear of that; nothing else costs anything."""
    before = get(tx, id) if closely(tx) else None
    yield
    if before is not None and (after := get(tx, id)) != before:
        tell(tx, Moved(before=before, after=after, at=now))


def get(tx: Tx, id: str) -> Server:
    """Dead or alive. Raises NotFound."""
    found = tx.execute(GET, {"the_id": id}).first()
    if found is None:
        raise NotFound(f"Instance {id} could not be found.")
    return of(found)


def held(tx: Tx, id: str) -> Server:
    """As `get`; and until this transaction ends nobody else writes the row: for columns that change as a whole."""
    found = tx.execute(HELD, {"the_id": id}).first()
    if found is None:
        raise NotFound(f"Instance {id} could not be found.")
    return of(found)


def find(tx: Tx, ids: Iterable[str]) -> dict[str, Server]:
    """Those of them that there are."""
    wanted = list(ids)
    if len(wanted) == 1:
        return {s.id: s for s in map(of, tx.execute(GET, {"the_id": wanted[0]}))}
    return {s.id: s for s in map(of, tx.execute(SELECT.where(T.c.id.in_(wanted))))}


def on_host(tx: Tx, host: str) -> list[Server]:
    """Those that live there, the oldest first."""
    return [of(r) for r in tx.execute(SELECT.where(T.c.host == host, T.c.deleted_at.is_(None)).order_by(T.c.number))]


def hosts_of(tx: Tx, ids: Iterable[str]) -> dict[str, str]:
    """Where those of these servers are that live and are somewhere."""
    query = sa.select(T.c.id, T.c.host).where(T.c.id.in_(list(ids)), T.c.host.is_not(None), T.c.deleted_at.is_(None))
    return {r.id: r.host for r in tx.execute(query)}


def loads(tx: Tx) -> dict[str, tuple[int, int]]:
    """By host: how many servers it has, and at how many of them it is at work that costs it much."""
    ops = sa.func.sum(sa.case((T.c.vm_state == str(VM.building), 1), (T.c.task_state.in_(HEAVY), 1), else_=0))
    query = sa.select(T.c.host, sa.func.count(), ops).where(T.c.host.is_not(None), T.c.deleted_at.is_(None))
    return {host: (int(n), int(busy or 0)) for host, n, busy in tx.execute(query.group_by(T.c.host))}


def image_properties(tx: Tx) -> Iterable[tuple[str, dict[str, str]]]:
    """(host, properties of the image) of each server that is on a host."""
    query = sa.select(T.c.host, T.c.image).where(T.c.host.is_not(None), T.c.deleted_at.is_(None))
    for host, text in tx.execute(query):
        yield host, msgspec.json.decode(text, type=Image).properties


HEAVY = [
    str(t)
    for t in (
        Task.rebuilding,
        Task.rebuild_block_device_mapping,
        Task.rebuild_spawning,
        Task.resize_prep,
        Task.resize_migrating,
        Task.image_snapshot_pending,
        Task.image_snapshot,
        Task.image_backup,
        Task.rescuing,
        Task.unshelving,
    )
]


def begin(tx: Tx, id: str, verb: Verb, now: float) -> Server:
    """Claim the server for `verb`: the check and the claim are one statement.

    UPDATE servers SET task_state = :busy, generation = generation + 1, updated_at = :now
     WHERE id = :id AND vm_state IN (…) AND (task_state IS NULL OR task_state IN (…)) AND launched …

    A verb that shows no task only checks; that it is alone is its run's matter.
    """
    told = {"the_id": id, "now": now}
    with _moved(tx, id, now):
        taken = tx.execute(BEGIN.of(verb, lambda: _begin(verb)), told).rowcount
    if taken:
        return get(tx, id)
    raise why_not(get(tx, id), verb)


def _begin(verb: Verb) -> sa.Update:
    start = each(sorted(verb.start))
    where = [T.c.id == sa.bindparam("the_id"), T.c.vm_state.in_(start), T.c.deleted_at.is_(None)]
    if verb.over is not None:
        over = each(sorted(verb.over))
        where.append(T.c.task_state.is_(None) | T.c.task_state.in_(over) if over else T.c.task_state.is_(None))
    elif verb.busy:
        where.append(T.c.task_state.is_(None) | (T.c.task_state != str(verb.busy)))
    if verb.launched:
        where.append(T.c.launched_at.is_not(None))
    if verb.host:
        where.append(T.c.host.is_not(None))
    taken: dict[str, Any] = {"generation": T.c.generation + 1, "updated_at": sa.bindparam("now")}
    if verb.busy is not None:
        taken["task_state"] = str(verb.busy)
    return sa.update(T).where(*where).values(taken)


BEGIN = Shapes()


def check(s: Server, verb: Verb) -> None:
    """Raises what `begin` would raise now: for what must be refused before anything is made for it."""
    busy = s.task_state is not None and (
        s.task_state not in verb.over if verb.over is not None else s.task_state == verb.busy
    )
    if (
        s.deleted_at is not None
        or s.vm_state not in verb.start
        or busy
        or (verb.launched and s.launched_at is None)
        or (verb.host and s.host is None)
    ):
        raise why_not(s, verb)


def why_not(s: Server, verb: Verb) -> Conflict | NotFound:
    """The sentence of the 409 (states.md, section 3)."""
    op = verb.op or verb.name
    if s.deleted_at is not None:
        return NotFound(f"Instance {s.id} could not be found.")
    if s.vm_state not in verb.start:
        return Conflict(f"Cannot '{op}' instance {s.id} while it is in vm_state {s.vm_state}")
    if s.task_state is not None and (verb.over is None or s.task_state not in verb.over):
        return Conflict(f"Cannot '{op}' instance {s.id} while it is in task_state {s.task_state}")
    if verb.launched and s.launched_at is None:
        return Conflict(f"Instance {s.id} is in an invalid state for '{op}'")
    return Conflict(f"Instance {s.id} is not ready")


def step(tx: Tx, server: Server, task: str | None, now: float, **facts: Any) -> bool:
    """Show how far the work is; not when a later verb took the server meanwhile. Facts are written in any case."""
    facts = {k: _text(v) if k in _JSON else v for k, v in facts.items()}
    values = facts | {"task_state": task, "updated_at": now}
    with _moved(tx, server.id, now):
        ours = tx.execute(OURS, _told(server, values)).rowcount
    if ours:
        return True
    if facts:
        tx.execute(ANYBODYS, facts | {"updated_at": now, "the_id": server.id})
    return False


def settle(tx: Tx, server: Server, host: str, node: str, epoch: int, task: str, now: float) -> None:
    """From now on it belongs to this host, whoever owns it. `epoch` is higher than with any host before."""
    where = {"host": host, "node": node, "epoch": epoch, "updated_at": now}
    with _moved(tx, server.id, now):
        tx.execute(SETTLE, where | {"the_id": server.id, "ours": server.generation, "task": task})


def unsettle(tx: Tx, id: str, host: str, now: float, plugs: list[Plug] | None = None) -> None:
    """It is not on this host, and was not to be. `plugs`: the ports that it has all the same."""
    nowhere = {"host": None, "node": None, "plugs": _text(plugs or []), "updated_at": now}
    tx.execute(sa.update(T).where(T.c.id == id, T.c.host == host).values(nowhere))


def finish(tx: Tx, server: Server, to: VM, now: float, **facts: Any) -> bool:
    """Put the server down in state `to`, unless a later verb took it meanwhile.

    The facts (columns of T; host, node, epoch, plugs, power_state …) are written in any case: where a machine
    runs is true whoever owns the server now.  Not so `fault_run`: whose fault is shown is the owner's matter.
    """
    fault = {"fault_run": facts.pop("fault_run")} if "fault_run" in facts else {}
    facts = {k: _text(v) if k in _JSON else v for k, v in facts.items()}
    values = facts | fault | {"vm_state": str(to), "task_state": None, "updated_at": now}
    with _moved(tx, server.id, now):
        ours = tx.execute(OURS, _told(server, values)).rowcount
    if ours:
        return True
    if facts:
        tx.execute(ANYBODYS, facts | {"updated_at": now, "the_id": server.id})
    return False


def sized(flavor: Flavor, quota: Flavor | None = None) -> dict[str, Any]:
    """As facts for `finish`: it is as large as that. `quota`: and another that it may become counts as well, class by class."""
    other = quota or flavor
    return {
        "flavor": flavor,
        "flavor_id": flavor.id,
        "vcpus": max(flavor.vcpus, other.vcpus),
        "memory_mb": max(flavor.memory_mb, other.memory_mb),
    }


def change(tx: Tx, id: str, now: float | None, **facts: Any) -> None:
    """Write columns of a living server that no run owns: name, metadata, lock, tags. Raises NotFound."""
    if "tags" in facts:
        facts["tags"] = tags_text(facts["tags"])
    values = {k: _text(v) if k in _JSON else v for k, v in facts.items()}
    if now is not None:
        values["updated_at"] = now
    if not tx.execute(sa.update(T).where(T.c.id == id, T.c.deleted_at.is_(None)).values(values)).rowcount:
        raise NotFound(f"Instance {id} could not be found.")


def reset(tx: Tx, id: str, to: VM, now: float) -> None:
    """Declare the server idle in state `to`; the generation moves, so whoever was at it no longer owns it."""
    idle = {"vm_state": str(to), "task_state": None, "generation": T.c.generation + 1, "updated_at": now}
    with _moved(tx, id, now):
        done = tx.execute(sa.update(T).where(T.c.id == id, T.c.deleted_at.is_(None)).values(idle)).rowcount
    if not done:
        raise NotFound(f"Instance {id} could not be found.")


def of(found: Any) -> Server:
    """A row of `SELECT` as a Server."""
    values = list(found)
    for i, read in _READ:
        if values[i] is not None:
            values[i] = read(values[i])
    if values[_DEVICES] is None:
        values[_DEVICES] = []
    return Server(*values)


def _remembered(decode: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same text is the same thing: a page of servers has few flavors. What is made is never changed."""
    return functools.lru_cache(1024)(decode)


def _tags(text: str) -> list[str]:
    return text[1:-1].split(",") if text else []


def tags_text(tags: Iterable[str]) -> str:
    """The column's form of a list of tags: sorted, without doubles."""
    known = sorted(set(tags))
    return f",{','.join(known)}," if known else ""


def _told(server: Server, values: dict[str, Any]) -> dict[str, Any]:
    return values | {"the_id": server.id, "ours": server.generation}


def _text(value: Any) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


DEVICES = msgspec.json.Decoder(list[Device])
PLUGS = msgspec.json.Decoder(list[Plug])
_JSON: dict[str, msgspec.json.Decoder[Any]] = {
    "flavor": msgspec.json.Decoder(Flavor),
    "image": msgspec.json.Decoder(Image),
    "plugs": PLUGS,
    "devices": DEVICES,
    "metadata": msgspec.json.Decoder(dict[str, str]),
    "system_metadata": msgspec.json.Decoder(dict[str, str]),
    "keypair": msgspec.json.Decoder(Keypair),
    "scheduler_hints": msgspec.json.Decoder(dict[str, msgspec.Raw]),
    "trusted_certs": msgspec.json.Decoder(list[str]),
}
_SHARED = ("flavor", "image", "keypair")
_READ: list[tuple[int, Callable[[str], Any]]] = [
    (i, {"tags": _tags, "vm_state": VM}.get(f) or (_remembered(_JSON[f].decode) if f in _SHARED else _JSON[f].decode))
    for i, f in enumerate(Server.__struct_fields__)
    if f in _JSON or f in ("tags", "vm_state")
]

_DEVICES = Server.__struct_fields__.index("devices")

SELECT = sa.select(*[T.c[f] for f in Server.__struct_fields__])  # in the order of the Struct
GET = ready(SELECT.where(T.c.id == sa.bindparam("the_id")))
HELD = ready(GET.with_for_update())
INSERT = ready(sa.insert(T))
# The other parameters are what is SET.
ANYBODYS = ready(sa.update(T).where(T.c.id == sa.bindparam("the_id")))
SETTLE = ready(
    ANYBODYS.values(
        task_state=sa.case((T.c.generation == sa.bindparam("ours"), sa.bindparam("task")), else_=T.c.task_state),
        host=sa.bindparam("host"),
        node=sa.bindparam("node"),
        epoch=sa.bindparam("epoch"),
        updated_at=sa.bindparam("updated_at"),
    )
)
OURS = ready(sa.update(T).where(T.c.id == sa.bindparam("the_id"), T.c.generation == sa.bindparam("ours")))
