"""Networks at rest: layer-2 networks, subnets, ports and their addresses, groups, routers, floating IPs.

A port's address is a row of its own, unique in its subnet: who inserts it has it, and nobody else can.  A share
(quota) is a counter that is raised by the same statement that compares it with its limit.  `revision` rises with
every change, and a change names the revision it was made from: one that came too late is told so.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from kilonova.kit.db import Tx, meta
from kilonova.kit.errors import OverQuota
from kilonova.kit.ready import Condition, Shapes, given, ready, written

S = TypeVar("S", bound=msgspec.Struct)

IN_ONE_QUERY = 5000  # ids; databases have limits of their own
UNLIMITED = -1


class Json(sa.TypeDecorator[Any]):
    """A value that is only ever read whole."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else msgspec.json.encode(value).decode()

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else msgspec.json.decode(value)


def _standard(*, name: bool = True) -> list[sa.Column[Any]]:
    """What everything here has."""
    named = [sa.Column("name", sa.String(255), nullable=False, default="")] if name else []
    return [
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("project_id", sa.String(255), nullable=False, default="", index=True),
        *named,
        sa.Column("description", sa.String(255), nullable=False, default=""),
        sa.Column("tags", sa.Text, nullable=False, default=""),  # ",one,two,": a tag has no comma
        sa.Column("revision", sa.Integer, nullable=False, default=0),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
    ]


def _ref(name: str, to: str, *, nullable: bool = False, ondelete: str | None = None, index: bool = True) -> Any:
    return sa.Column(name, sa.String(36), sa.ForeignKey(to, ondelete=ondelete), nullable=nullable, index=index)


def _flag(name: str, default: bool) -> sa.Column[Any]:
    return sa.Column(name, sa.Boolean, nullable=False, default=default)


def _text(name: str, length: int = 255, default: str = "") -> sa.Column[Any]:
    return sa.Column(name, sa.String(length), nullable=False, default=default)


networks = sa.Table(
    "networks",
    meta,
    *_standard(),
    _flag("admin_state_up", True),
    _flag("shared", False),
    _flag("router_external", False),
    _flag("is_default", False),
    _flag("port_security_enabled", True),
    sa.Column("mtu", sa.Integer, nullable=False),
    _text("dns_domain"),
    _text("provider_network_type", 16, "local"),
    sa.Column("provider_physical_network", sa.String(64)),
    sa.Column("availability_zone_hints", Json, nullable=False, default=list),
    sa.Column("auto_of", sa.String(255), unique=True),  # the project whose automatic network this is
)

subnets = sa.Table(
    "subnets",
    meta,
    *_standard(),
    _ref("network_id", "networks.id"),
    sa.Column("ip_version", sa.Integer, nullable=False),
    sa.Column("cidr", sa.String(64), nullable=False),
    sa.Column("gateway_ip", sa.String(64)),
    _flag("enable_dhcp", True),
    sa.Column("ipv6_ra_mode", sa.String(16)),
    sa.Column("ipv6_address_mode", sa.String(16)),
    sa.Column("allocation_pools", Json, nullable=False),  # [[first, last], …]
    sa.Column("dns_nameservers", Json, nullable=False, default=list),
    sa.Column("host_routes", Json, nullable=False, default=list),  # [[destination, next hop], …]
)

ports = sa.Table(
    "ports",
    meta,
    *_standard(),
    _ref("network_id", "networks.id", index=False),
    sa.Column("mac_address", sa.String(17), nullable=False),
    _flag("admin_state_up", True),
    _text("status", 8, "DOWN"),
    _text("device_id"),
    _text("device_owner"),
    _flag("port_security_enabled", True),
    sa.Column("allowed_address_pairs", Json, nullable=False, default=list),  # [[address or CIDR, MAC], …]
    _text("dns_name"),
    _text("dns_domain"),
    _text("binding_host_id"),
    _text("binding_vif_type", 32, "unbound"),
    _text("binding_vnic_type", 32, "normal"),
    sa.Column("binding_profile", Json, nullable=False, default=dict),
    _flag("charged", False),  # counts against its project's share
    sa.UniqueConstraint("network_id", "mac_address"),
    sa.Index("ports_of_device", "device_id"),
    sa.Index("ports_on_host", "binding_host_id"),
)

addresses = sa.Table(
    "port_addresses",
    meta,
    sa.Column("subnet_id", sa.String(36), sa.ForeignKey("subnets.id"), primary_key=True),
    sa.Column("address", sa.String(45), primary_key=True),
    _ref("port_id", "ports.id", ondelete="CASCADE"),
    sa.Column("position", sa.Integer, nullable=False, default=0),
)

port_groups = sa.Table(
    "port_groups",
    meta,
    sa.Column("port_id", sa.String(36), sa.ForeignKey("ports.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("group_id", sa.String(36), sa.ForeignKey("security_groups.id"), primary_key=True, index=True),
)

port_bindings = sa.Table(  # those that wait; the active one stands in `ports`
    "port_bindings",
    meta,
    sa.Column("port_id", sa.String(36), sa.ForeignKey("ports.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("host", sa.String(255), primary_key=True, index=True),
    _text("vnic_type", 32, "normal"),
    _text("vif_type", 32, "bridge"),
    sa.Column("profile", Json, nullable=False, default=dict),
)

groups = sa.Table(
    "security_groups",
    meta,
    *_standard(),
    sa.Column("default_of", sa.String(255), unique=True),  # the project whose default group this is
)

rules = sa.Table(
    "security_rules",
    meta,
    *_standard(name=False),
    _ref("security_group_id", "security_groups.id", index=False),
    _text("direction", 8),
    _text("ethertype", 4),
    sa.Column("protocol", sa.String(40)),
    sa.Column("port_range_min", sa.Integer),
    sa.Column("port_range_max", sa.Integer),
    sa.Column("remote_ip_prefix", sa.String(64)),
    _ref("remote_group_id", "security_groups.id", nullable=True),
    _text("meaning"),  # all of the above as one word, so that no rule is there twice
    sa.UniqueConstraint("security_group_id", "meaning"),
)

routers = sa.Table(
    "routers",
    meta,
    *_standard(),
    _flag("admin_state_up", True),
    _ref("gateway_network_id", "networks.id", nullable=True),
    _ref("gateway_port_id", "ports.id", nullable=True),
    _flag("enable_snat", True),
    sa.Column("routes", Json, nullable=False, default=list),  # [[destination, next hop], …]
    sa.Column("availability_zone_hints", Json, nullable=False, default=list),
)

floating = sa.Table(
    "floating_ips",
    meta,
    *_standard(name=False),
    _ref("floating_network_id", "networks.id"),
    sa.Column("floating_ip_address", sa.String(45), nullable=False, index=True),
    _ref("floating_port_id", "ports.id"),
    sa.Column("port_id", sa.String(36), sa.ForeignKey("ports.id"), index=True),
    sa.Column("fixed_ip_address", sa.String(45)),
    _ref("router_id", "routers.id", nullable=True),
    _text("status", 8, "DOWN"),
    _text("dns_name"),
    _text("dns_domain"),
    sa.UniqueConstraint("floating_network_id", "port_id", "fixed_ip_address"),
)

quotas = sa.Table(
    "network_quotas",
    meta,
    sa.Column("project_id", sa.String(255), primary_key=True),
    sa.Column("resource", sa.String(32), primary_key=True),
    sa.Column("hard_limit", sa.Integer),  # None: the configuration's; -1: none
    sa.Column("used", sa.Integer, nullable=False, default=0),
)


# ---- what comes out


class Network(msgspec.Struct, frozen=True):
    id: str
    project_id: str
    name: str
    description: str
    tags: str
    revision: int
    created_at: float
    updated_at: float
    admin_state_up: bool
    shared: bool
    router_external: bool
    is_default: bool
    port_security_enabled: bool
    mtu: int
    dns_domain: str
    provider_network_type: str
    provider_physical_network: str | None
    availability_zone_hints: list[str]
    auto_of: str | None


class Subnet(msgspec.Struct, frozen=True):
    """`allocation_pools` and `host_routes` are pairs of texts."""

    id: str
    project_id: str
    name: str
    description: str
    tags: str
    revision: int
    created_at: float
    updated_at: float
    network_id: str
    ip_version: int
    cidr: str
    gateway_ip: str | None
    enable_dhcp: bool
    ipv6_ra_mode: str | None
    ipv6_address_mode: str | None
    allocation_pools: list[list[str]]
    dns_nameservers: list[str]
    host_routes: list[list[str]]


class Port(msgspec.Struct, frozen=True):
    """A port without its addresses and groups."""

    id: str
    project_id: str
    name: str
    description: str
    tags: str
    revision: int
    created_at: float
    updated_at: float
    network_id: str
    mac_address: str
    admin_state_up: bool
    status: str
    device_id: str
    device_owner: str
    port_security_enabled: bool
    allowed_address_pairs: list[list[str]]
    dns_name: str
    dns_domain: str
    binding_host_id: str
    binding_vif_type: str
    binding_vnic_type: str
    binding_profile: dict[str, Any]
    charged: bool


class Binding(msgspec.Struct, frozen=True):
    """Of a port to a host where it is not active."""

    port_id: str
    host: str
    vnic_type: str
    vif_type: str
    profile: dict[str, Any]


class Group(msgspec.Struct, frozen=True):
    id: str
    project_id: str
    name: str
    description: str
    tags: str
    revision: int
    created_at: float
    updated_at: float
    default_of: str | None


class Rule(msgspec.Struct, frozen=True):
    id: str
    project_id: str
    description: str
    tags: str
    revision: int
    created_at: float
    updated_at: float
    security_group_id: str
    direction: str
    ethertype: str
    protocol: str | None
    port_range_min: int | None
    port_range_max: int | None
    remote_ip_prefix: str | None
    remote_group_id: str | None
    meaning: str


class Router(msgspec.Struct, frozen=True):
    id: str
    project_id: str
    name: str
    description: str
    tags: str
    revision: int
    created_at: float
    updated_at: float
    admin_state_up: bool
    gateway_network_id: str | None
    gateway_port_id: str | None
    enable_snat: bool
    routes: list[list[str]]
    availability_zone_hints: list[str]


class Floating(msgspec.Struct, frozen=True):
    id: str
    project_id: str
    description: str
    tags: str
    revision: int
    created_at: float
    updated_at: float
    floating_network_id: str
    floating_ip_address: str
    floating_port_id: str
    port_id: str | None
    fixed_ip_address: str | None
    router_id: str | None
    status: str
    dns_name: str
    dns_domain: str


class Address(NamedTuple):
    subnet_id: str
    address: str


TABLES: dict[type[msgspec.Struct], sa.Table] = {
    Network: networks,
    Subnet: subnets,
    Port: ports,
    Binding: port_bindings,
    Group: groups,
    Rule: rules,
    Router: routers,
    Floating: floating,
}


def _columns(kind: type[msgspec.Struct]) -> list[sa.Column[Any]]:
    return [TABLES[kind].c[f] for f in kind.__struct_fields__]


_ALL: dict[type[msgspec.Struct], sa.Select[Any]] = {k: sa.select(*_columns(k)) for k in TABLES}
_ONE: dict[type[msgspec.Struct], sa.Select[Any]] = {
    k: s.where(TABLES[k].c.id == sa.bindparam("the_id")) for k, s in _ALL.items() if "id" in TABLES[k].c
}


# ---- for all kinds alike


def get(tx: Tx, kind: type[S], id: str) -> S | None:
    found = tx.execute(_ONE[kind], {"the_id": id}).first()
    return None if found is None else kind(*found)


def find(tx: Tx, kind: type[S], *where: Any) -> list[S]:
    """All that fit, in the order they were made."""
    table = TABLES[kind]
    order = [table.c[n] for n in ("created_at", "id") if n in table.c]
    return [kind(*row) for row in tx.execute(_ALL[kind].where(*where).order_by(*order))]


def among(tx: Tx, kind: type[S], column: str, values: Iterable[str], *where: Any) -> list[S]:
    """All whose `column` is one of `values`, however many these are."""
    return [s for part in _parts(values) for s in find(tx, kind, TABLES[kind].c[column].in_(part), *where)]


def page(
    tx: Tx, kind: type[S], where: Sequence[Condition], order: Sequence[tuple[str, Any, bool]], limit: int | None
) -> list[S]:
    """One page in one query, in the order of these columns; each with its name, and whether downwards."""

    def write() -> Any:
        query = _ALL[kind].where(*written(where)).order_by(*[c.desc() if down else c.asc() for _, c, down in order])
        return query if limit is None else query.limit(sa.bindparam("most", type_=sa.Integer))

    values = given(where) | ({} if limit is None else {"most": limit})
    if any(c.shape is None or len(c.values) > 3 for c in where):
        return [kind(*row) for row in tx.execute(write(), values)]
    shape = (kind, *[c.shape for c in where], *[(name, down) for name, _, down in order], limit is None)
    return [kind(*row) for row in tx.execute(_PAGES.of(shape, write), values)]


_PAGES = Shapes()


def add(tx: Tx, thing: msgspec.Struct) -> None:
    """Insert. Raises IntegrityError where something unique is there already, or what it hangs on is gone."""
    tx.execute(_INSERT[type(thing)], msgspec.structs.asdict(thing))


def add_all(tx: Tx, things: Sequence[msgspec.Struct]) -> None:
    if things:
        tx.execute(_INSERT[type(things[0])], [msgspec.structs.asdict(t) for t in things])


def change(tx: Tx, thing: S, now: float | None, **values: Any) -> S | None:
    """The thing with these columns changed and its revision raised; None: somebody else was faster.

    `now` None leaves `updated_at`: what the service itself did is no news to the owner.
    """
    table, old = TABLES[type(thing)], thing.revision  # type: ignore[attr-defined]
    values["revision"] = old + 1
    if now is not None:
        values["updated_at"] = now
    ours = table.c.id == thing.id, table.c.revision == old  # type: ignore[attr-defined]
    if not tx.execute(sa.update(table).where(*ours).values(**values)).rowcount:
        return None
    return msgspec.structs.replace(thing, **values)


def remove(tx: Tx, kind: type[msgspec.Struct], *ids: str) -> int:
    """Delete by id; how many there were. What hangs on them and has no meaning alone goes with them."""
    if not ids:
        return 0
    if len(ids) == 1:
        return tx.execute(_DELETE[kind], {"the_id": ids[0]}).rowcount
    return sum(tx.execute(sa.delete(TABLES[kind]).where(TABLES[kind].c.id.in_(part))).rowcount for part in _parts(ids))


_INSERT = {k: ready(sa.insert(t)) for k, t in TABLES.items()}
_DELETE = {k: sa.delete(t).where(t.c.id == sa.bindparam("the_id")) for k, t in TABLES.items() if "id" in t.c}


def _parts(ids: Iterable[str]) -> Iterable[list[str]]:
    known = list(dict.fromkeys(ids))
    return (known[i : i + IN_ONE_QUERY] for i in range(0, len(known), IN_ONE_QUERY))


class By:
    """A query that gives (id, what…), for those ids; few ones are its daily bread."""

    FEW = 8

    def __init__(self, query: sa.Select[Any], id: Any) -> None:
        self.query, self.id, self.shapes = query, id, Shapes()

    def of(self, tx: Tx, ids: Iterable[str]) -> list[Any]:
        several = list(ids)
        if 0 < len(several) <= self.FEW:
            names = [f"id{i}" for i in range(len(several))]
            query = self.shapes.of(len(names), lambda: self.query.where(self.id.in_([sa.bindparam(n) for n in names])))
            return list(tx.execute(query, dict(zip(names, several, strict=True))))
        return [row for part in _parts(several) for row in tx.execute(self.query.where(self.id.in_(part)))]


def _pairs(tx: Tx, query: sa.Select[Any]) -> list[tuple[str, int]]:
    return [(row[0], row[1]) for row in tx.execute(query)]


class holds(FunctionElement[bool]):
    """Is the second text a part of the first? LIKE is no answer: some databases do not tell A from a in it."""

    inherit_cache = True
    type = sa.Boolean()


@compiles(holds)
def _instr(element: Any, compiler: Any, **kw: Any) -> str:
    return f"instr({compiler.process(element.clauses, **kw)}) > 0"


@compiles(holds, "postgresql")
def _strpos(element: Any, compiler: Any, **kw: Any) -> str:
    return f"strpos({compiler.process(element.clauses, **kw)}) > 0"


# ---- ports and addresses


class Place(NamedTuple):
    """Where a port is to be: the network, its subnets in the order they were made, the project's default group."""

    network: Network
    subnets: list[Subnet]
    default_group: str | None


_PLACE = ready(
    sa.select(*_columns(Network), groups.c.id, *_columns(Subnet))
    .select_from(
        networks.outerjoin(groups, groups.c.default_of == sa.bindparam("project")).outerjoin(
            subnets, subnets.c.network_id == networks.c.id
        )
    )
    .where(networks.c.id == sa.bindparam("the_id"))
    .order_by(subnets.c.created_at, subnets.c.id)
)
_N = len(Network.__struct_fields__)


def place(tx: Tx, network_id: str, project: str = "") -> Place | None:
    """All that a new port must know, in one query."""
    rows = tx.execute(_PLACE, {"the_id": network_id, "project": project}).all()
    if not rows:
        return None
    return Place(Network(*rows[0][:_N]), [Subnet(*r[_N + 1 :]) for r in rows if r[_N + 1] is not None], rows[0][_N])


_PORT = ready(
    sa.select(*_columns(Port), *_columns(Network))
    .select_from(ports.join(networks, networks.c.id == ports.c.network_id))
    .where(ports.c.id == sa.bindparam("the_id"))
)
_P = len(Port.__struct_fields__)


def port(tx: Tx, id: str) -> tuple[Port, Network] | None:
    found = tx.execute(_PORT, {"the_id": id}).first()
    return None if found is None else (Port(*found[:_P]), Network(*found[_P:]))


# INSERT INTO port_addresses SELECT … WHERE NOT EXISTS (the same address): the look and the taking are one statement.
_TAKE = ready(
    sa.insert(addresses)
    .from_select(
        ["subnet_id", "address", "port_id", "position"],
        sa.select(
            sa.bindparam("subnet", type_=sa.String),
            sa.bindparam("the_address", type_=sa.String),
            sa.bindparam("port", type_=sa.String),
            sa.bindparam("place", type_=sa.Integer),
        ).where(
            ~sa.exists().where(
                addresses.c.subnet_id == sa.bindparam("subnet", type_=sa.String),
                addresses.c.address == sa.bindparam("the_address", type_=sa.String),
            )
        ),
        include_defaults=False,
    )
    .execution_options(preserve_rowcount=True)
)  # of an INSERT it is not kept unasked


def take(tx: Tx, port_id: str, subnet_id: str, address: str, position: int = 0) -> bool:
    """Did this port get the address? Raises IntegrityError where another transaction was faster by an inch."""
    told = {"subnet": subnet_id, "the_address": address, "port": port_id, "place": position}
    return tx.execute(_TAKE, told).rowcount > 0


def taken(tx: Tx, subnet_id: str) -> set[str]:
    return set(tx.scalars(sa.select(addresses.c.address).where(addresses.c.subnet_id == subnet_id)))


def release(tx: Tx, port_id: str, gone: Iterable[Address]) -> None:
    for a in gone:
        tx.execute(
            sa.delete(addresses).where(
                addresses.c.port_id == port_id, addresses.c.subnet_id == a.subnet_id, addresses.c.address == a.address
            )
        )


def reorder(tx: Tx, port_id: str, order: Sequence[Address]) -> None:
    for position, a in enumerate(order):
        tx.execute(
            sa.update(addresses)
            .where(
                addresses.c.port_id == port_id, addresses.c.subnet_id == a.subnet_id, addresses.c.address == a.address
            )
            .values(position=position)
        )


_ADDRESSES = By(
    sa.select(addresses.c.port_id, addresses.c.subnet_id, addresses.c.address).order_by(addresses.c.position),
    addresses.c.port_id,
)


def addresses_of(tx: Tx, port_ids: Iterable[str]) -> dict[str, list[Address]]:
    """By port, in the port's own order."""
    found: dict[str, list[Address]] = {}
    for id, subnet, address in _ADDRESSES.of(tx, port_ids):
        found.setdefault(id, []).append(Address(subnet, address))
    return found


_GROUPS = By(
    sa.select(port_groups.c.port_id, port_groups.c.group_id).order_by(port_groups.c.group_id), port_groups.c.port_id
)


def groups_of(tx: Tx, port_ids: Iterable[str]) -> dict[str, list[str]]:
    """Ids of security groups by port."""
    found: dict[str, list[str]] = {}
    for id, group in _GROUPS.of(tx, port_ids):
        found.setdefault(id, []).append(group)
    return found


_GROUP_PORT = ready(sa.insert(port_groups))


def group_port(tx: Tx, port_id: str, group_ids: Iterable[str], *, anew: bool = False) -> None:
    """The port is of these groups; `anew`: and of no others."""
    if anew:
        tx.execute(sa.delete(port_groups).where(port_groups.c.port_id == port_id))
    if told := [{"port_id": port_id, "group_id": g} for g in group_ids]:
        tx.execute(_GROUP_PORT, told)


def owners_of_addresses(tx: Tx, subnet_id: str) -> list[tuple[str, str]]:
    """(port id, its device owner) for each address of a subnet."""
    query = sa.select(ports.c.id, ports.c.device_owner).join_from(addresses, ports, ports.c.id == addresses.c.port_id)
    return [(id, owner) for id, owner in tx.execute(query.where(addresses.c.subnet_id == subnet_id).distinct())]


def fullness(tx: Tx) -> dict[str, int]:
    """How many addresses of each subnet are taken."""
    query = sa.select(addresses.c.subnet_id, sa.func.count()).group_by(addresses.c.subnet_id)
    return dict(_pairs(tx, query))


_SUBNETS = By(
    sa.select(subnets.c.network_id, subnets.c.id).order_by(subnets.c.created_at, subnets.c.id), subnets.c.network_id
)


def subnets_of(tx: Tx, network_ids: Iterable[str]) -> dict[str, list[str]]:
    """Ids of subnets by network."""
    found: dict[str, list[str]] = {}
    for network, id in _SUBNETS.of(tx, network_ids):
        found.setdefault(network, []).append(id)
    return found


def rules_of(tx: Tx, group_ids: Iterable[str]) -> dict[str, list[Rule]]:
    found: dict[str, list[Rule]] = {}
    for rule in among(tx, Rule, "security_group_id", group_ids):
        found.setdefault(rule.security_group_id, []).append(rule)
    return found


_MEMBERS = By(
    sa.select(port_groups.c.group_id, addresses.c.address).join_from(
        port_groups, addresses, addresses.c.port_id == port_groups.c.port_id
    ),
    port_groups.c.group_id,
)
_ALLOWED = By(
    sa.select(port_groups.c.group_id, ports.c.allowed_address_pairs)
    .join_from(port_groups, ports, ports.c.id == port_groups.c.port_id)
    .where(ports.c.allowed_address_pairs != []),
    port_groups.c.group_id,
)


def members(tx: Tx, group_ids: Iterable[str]) -> dict[str, list[str]]:
    """The addresses of all ports of a group, by group; with those that its ports may use besides."""
    found: dict[str, list[str]] = {}
    wanted = list(group_ids)
    if not wanted:
        return found
    for group, address in _MEMBERS.of(tx, wanted):
        found.setdefault(group, []).append(address)
    for group, allowed in _ALLOWED.of(tx, wanted):
        found.setdefault(group, []).extend(address for address, _ in allowed)
    return found


def group_in_use(tx: Tx, group_id: str) -> bool:
    return (
        tx.execute(sa.select(port_groups.c.port_id).where(port_groups.c.group_id == group_id).limit(1)).first()
        is not None
    )


def forget_rules(tx: Tx, group_id: str) -> dict[str, int]:
    """Delete a group's rules and those of others that speak of it; how many went, by project."""
    where = sa.or_(rules.c.security_group_id == group_id, rules.c.remote_group_id == group_id)
    counts = dict(_pairs(tx, sa.select(rules.c.project_id, sa.func.count()).where(where).group_by(rules.c.project_id)))
    tx.execute(sa.delete(rules).where(where))
    return counts


def set_status(tx: Tx, port_ids: Iterable[str], host: str, values: dict[str, Any]) -> int:
    """Of ports that are still bound to `host`. What the wires say is no change of their owners'."""
    return sum(
        tx.execute(
            sa.update(ports).where(ports.c.id.in_(part), ports.c.binding_host_id == host).values(**values)
        ).rowcount
        for part in _parts(port_ids)
    )


_LOSE_PORT = ready(
    sa.update(floating)
    .where(floating.c.port_id == sa.bindparam("lost"))
    .values(
        port_id=None,
        fixed_ip_address=None,
        router_id=None,
        status="DOWN",
        revision=floating.c.revision + 1,
        updated_at=sa.bindparam("now"),
    )
)


def lose_port(tx: Tx, port_id: str, now: float) -> int:
    """Floating IPs of a port that goes lead nowhere; how many there were."""
    return tx.execute(_LOSE_PORT, {"lost": port_id, "now": now}).rowcount


# ---- shares


# UPDATE network_quotas SET used = used + n WHERE … AND (no limit OR used + n <= the limit)
_LIMIT = sa.func.coalesce(quotas.c.hard_limit, sa.bindparam("standard", type_=sa.Integer))
_CHARGE = ready(
    sa.update(quotas)
    .where(
        quotas.c.project_id == sa.bindparam("project"),
        quotas.c.resource == sa.bindparam("what"),
        sa.or_(_LIMIT < 0, quotas.c.used + sa.bindparam("n", type_=sa.Integer) <= _LIMIT),
    )
    .values(used=quotas.c.used + sa.bindparam("n", type_=sa.Integer))
)
_RELEASE = ready(
    sa.update(quotas)
    .where(quotas.c.project_id == sa.bindparam("project"), quotas.c.resource == sa.bindparam("what"))
    .values(used=quotas.c.used - sa.bindparam("n", type_=sa.Integer))
)


def charge(tx: Tx, project: str, resource: str, n: int, standard: int) -> None:
    """Take `n` of the project's share; `standard` is the limit where it has none of its own, -1: none.

    Raises OverQuota.
    """
    told = {"project": project, "what": resource, "n": n, "standard": standard}
    if not project or tx.execute(_CHARGE, told).rowcount:
        return
    here = quotas.c.project_id == project, quotas.c.resource == resource
    if tx.execute(sa.select(quotas.c.used).where(*here)).first() is None:
        tx.execute(sa.insert(quotas).values(project_id=project, resource=resource, used=0))
    if tx.execute(_CHARGE, told).rowcount:  # also where somebody made the row between our two looks
        return
    raise OverQuota(f"Quota exceeded for resources: ['{resource}'].", code="OverQuota")


def discharge(tx: Tx, project: str, resource: str, n: int = 1) -> None:
    if project and n:
        tx.execute(_RELEASE, {"project": project, "what": resource, "n": n})


class Share(NamedTuple):
    limit: int | None
    used: int


def shares(tx: Tx, project: str) -> dict[str, Share]:
    """Of one project, by resource; only those it ever used or was given."""
    query = sa.select(quotas.c.resource, quotas.c.hard_limit, quotas.c.used).where(quotas.c.project_id == project)
    return {resource: Share(limit, used) for resource, limit, used in tx.execute(query)}


def limited(tx: Tx) -> dict[str, dict[str, int]]:
    """Limits of projects that have some of their own."""
    query = sa.select(quotas.c.project_id, quotas.c.resource, quotas.c.hard_limit)
    found: dict[str, dict[str, int]] = {}
    for project, resource, limit in tx.execute(
        query.where(quotas.c.hard_limit.is_not(None)).order_by(quotas.c.project_id)
    ):
        found.setdefault(project, {})[resource] = limit
    return found


def limit(tx: Tx, project: str, resource: str, hard_limit: int | None) -> None:
    """Give a project a limit of its own; None takes it back."""
    here = quotas.c.project_id == project, quotas.c.resource == resource
    if not tx.execute(sa.update(quotas).where(*here).values(hard_limit=hard_limit)).rowcount:
        tx.execute(sa.insert(quotas).values(project_id=project, resource=resource, hard_limit=hard_limit, used=0))


COUNTED: dict[str, tuple[sa.Table, Callable[[], Any]]] = {
    "network": (networks, lambda: sa.true()),
    "subnet": (subnets, lambda: sa.true()),
    "port": (ports, lambda: ports.c.charged.is_(True)),
    "router": (routers, lambda: sa.true()),
    "floatingip": (floating, lambda: sa.true()),
    "security_group": (groups, lambda: sa.true()),
    "security_group_rule": (rules, lambda: sa.true()),
}


def recount(tx: Tx) -> list[tuple[str, str, int, int]]:
    """Set every counter to what is really there; those that were wrong as (project, resource, was, is)."""
    wrong = []
    for resource, (table, which) in COUNTED.items():
        there = sa.select(table.c.project_id, sa.func.count()).where(which(), table.c.project_id != "")
        real = dict(_pairs(tx, there.group_by(table.c.project_id)))
        known = dict(_pairs(tx, sa.select(quotas.c.project_id, quotas.c.used).where(quotas.c.resource == resource)))
        for project in sorted(real.keys() | known.keys()):
            was, n = known.get(project), real.get(project, 0)
            if was is None:
                tx.execute(sa.insert(quotas).values(project_id=project, resource=resource, used=n))
            elif was != n:
                tx.execute(
                    sa.update(quotas)
                    .where(quotas.c.project_id == project, quotas.c.resource == resource)
                    .values(used=n)
                )
            if (was or 0) != n:
                wrong.append((project, resource, was or 0, n))
    return wrong
