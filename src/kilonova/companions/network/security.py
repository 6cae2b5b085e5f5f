"""Security groups: what may reach a port, and what it may reach. Each project has one that holds where none is said."""

from collections.abc import Iterable, Sequence
from ipaddress import ip_network
from typing import Annotated as A
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Meta

from kilonova.companions import ipam
from kilonova.companions.network import frame
from kilonova.companions.network.frame import Project, R, Text, Unset, Uuid, View
from kilonova.companions.network.wiring import NUMBERS, protocol, weave
from kilonova.companions.network.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Forbidden, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.store import networks as store

# ---- what is said


class GroupChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: Text | Unset = UNSET
    description: Text | Unset = UNSET


class GroupWish(GroupChange, kw_only=True):
    project_id: Project | Unset = UNSET
    tenant_id: Project | Unset = UNSET


class GroupBody(msgspec.Struct, forbid_unknown_fields=True):
    security_group: GroupWish | Unset = UNSET
    security_groups: list[GroupWish] | Unset = UNSET


class GroupChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    security_group: GroupChange


class RuleWish(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Ports are TCP's and the like; for ICMP they are the type and the code."""

    project_id: Project | Unset = UNSET
    tenant_id: Project | Unset = UNSET
    security_group_id: Uuid
    direction: Literal["ingress", "egress"]
    ethertype: A[str, Meta(max_length=8)] | None | Unset = UNSET
    protocol: A[str, Meta(max_length=40)] | A[int, Meta(ge=0, le=255)] | None | Unset = UNSET
    port_range_min: int | frame.Digits | None | Unset = UNSET
    port_range_max: int | frame.Digits | None | Unset = UNSET
    remote_ip_prefix: A[str, Meta(max_length=64)] | None | Unset = UNSET
    remote_group_id: Uuid | None | Unset = UNSET
    remote_address_group_id: None | Unset = UNSET
    description: Text | Unset = UNSET


class RuleBody(msgspec.Struct, forbid_unknown_fields=True):
    security_group_rule: RuleWish | Unset = UNSET
    security_group_rules: list[RuleWish] | Unset = UNSET


# ---- what is shown


def views(tx: Tx, world: World, groups: Sequence[store.Group]) -> list[View]:
    rules = store.rules_of(tx, [g.id for g in groups])
    return [view(g, rules.get(g.id, [])) for g in groups]


def view(g: store.Group, rules: Sequence[store.Rule]) -> View:
    return {
        **frame.standard(g),
        "stateful": True,
        "shared": False,
        "security_group_rules": [rule_view(r) for r in rules],
    }


def rule_views(tx: Tx, world: World, rules: Sequence[store.Rule]) -> list[View]:
    return [rule_view(r) for r in rules]


def rule_view(r: store.Rule) -> View:
    return {
        **frame.standard(r),
        "security_group_id": r.security_group_id,
        "direction": r.direction,
        "ethertype": r.ethertype,
        "protocol": r.protocol,
        "port_range_min": r.port_range_min,
        "port_range_max": r.port_range_max,
        "remote_ip_prefix": r.remote_ip_prefix,
        "normalized_cidr": str(ip_network(r.remote_ip_prefix, strict=False)) if r.remote_ip_prefix else None,
        "remote_group_id": r.remote_group_id,
        "remote_address_group_id": None,
    }


T, RT = store.groups.c, store.rules.c

KIND: frame.Kind[store.Group] = frame.Kind(
    one="security_group",
    many="security_groups",
    struct=store.Group,
    missing="SecurityGroupNotFound",
    named="Security group",
    views=views,
    scope=lambda project: T.project_id == project,
    filters={
        "shared": lambda values: (
            T.id.is_not(None) if any(v.lower() in ("false", "0") for v in values) else T.id.is_(None)
        ),
        "stateful": lambda values: (
            T.id.is_not(None) if any(v.lower() in ("true", "1") for v in values) else T.id.is_(None)
        ),
    },
)
RULE: frame.Kind[store.Rule] = frame.Kind(
    one="security_group_rule",
    many="security_group_rules",
    struct=store.Rule,
    missing="SecurityGroupRuleNotFound",
    named="Security group rule",
    views=rule_views,
    # a rule that somebody else put into my group is mine to see
    scope=lambda project: (
        (RT.project_id == project)
        | RT.security_group_id.in_(store.groups.select().with_only_columns(T.id).where(T.project_id == project))
    ),
)


@R.get("/v2.0/security-groups", policy="get_security_group", late=True)
def list_(call: Call) -> View:
    """The project's default group is there as soon as somebody looks."""
    mine = call.context.project_id
    if mine and call.may("create_security_group"):
        with call.world.db.read() as tx:
            known = find_default(tx, mine)
        if known is None:
            call.world.change(default, call.world, mine)
    return frame.listing(call, KIND)


@R.get("/v2.0/security-groups/{id}", policy="get_security_group", late=True)
def show(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        group = KIND.get(tx, id)
        frame.seen(call, KIND, frame.target(group), id)
        found = views(tx, call.world, [group])
    return {"security_group": frame.trimmed(call, KIND, found)[0]}


frame.tagged(KIND)


@R.get("/v2.0/security-group-rules", policy="get_security_group_rule", late=True)
def list_rules(call: Call) -> View:
    return frame.listing(call, RULE)


@R.get("/v2.0/security-group-rules/{id}", policy="get_security_group_rule", late=True)
def show_rule(call: Call, id: str) -> View:
    with call.world.db.read() as tx:
        rule = RULE.get(tx, id)
        frame.seen(call, RULE, _about_rule(tx, rule), id)
    return {"security_group_rule": frame.trimmed(call, RULE, [rule_view(rule)])[0]}


def _about_rule(tx: Tx, rule: store.Rule) -> dict[str, Any]:
    """A rule is whose group it is in."""
    group = store.get(tx, store.Group, rule.security_group_id)
    return frame.target(group or rule)


# ---- groups


def find_default(tx: Tx, project: str) -> str | None:
    found = store.find(tx, store.Group, T.default_of == project)
    return found[0].id if found else None


def default(tx: Tx, world: World, project: str) -> str:
    """The id of the project's default group, made if there is none: out to all, in from each other."""
    if (known := find_default(tx, project)) is not None:
        return known
    group = store.Group(
        **frame.made(world, project), name="default", description="Default security group", default_of=project
    )
    _add(tx, world, group, standard=-1)
    inside = [
        _rule(
            world, project, dict(security_group_id=group.id, direction="ingress", ethertype=e, remote_group_id=group.id)
        )
        for e in ("IPv4", "IPv6")
    ]
    _add_rules(tx, project, inside, standard=-1)
    return group.id


def _add(tx: Tx, world: World, group: store.Group, standard: int) -> list[store.Rule]:
    """A group lets everything out, until its owner says otherwise."""
    store.charge(tx, group.project_id, "security_group", 1, standard)
    store.add(tx, group)
    out = [
        _rule(world, group.project_id, dict(security_group_id=group.id, direction="egress", ethertype=e))
        for e in ("IPv4", "IPv6")
    ]
    _add_rules(tx, group.project_id, out, standard=-1)
    return out


def _add_rules(tx: Tx, project: str, rules: Sequence[store.Rule], standard: int) -> None:
    store.charge(tx, project, "security_group_rule", len(rules), standard)
    store.add_all(tx, rules)


def check_visible(tx: Tx, project: str, ids: Sequence[str]) -> None:
    """Raises NotFound for groups that are not there, or are another project's than the port."""
    known = {g.id: g for g in store.among(tx, store.Group, "id", ids)}
    for id in ids:
        if id not in known or (project and known[id].project_id != project):
            raise KIND.gone(id)


@R.post("/v2.0/security-groups", body=GroupBody, ok=201, policy="create_security_group", late=True)
def create(call: Call) -> View:
    wishes: list[GroupWish] = frame.several(call.body.security_group, call.body.security_groups)

    def work(tx: Tx) -> list[View]:
        made = []
        for wish in wishes:
            project = frame.owner(call, wish)
            call.check({**frame.STRANGER, "project_id": project})
            told = frame.said(wish)
            if told.get("name") == "default":
                raise Conflict("Default security group already exists.", code="SecurityGroupDefaultAlreadyExists")
            if project:
                default(tx, call.world, project)
            group = store.Group(
                **frame.made(call.world, project),
                name=told.get("name", ""),
                description=told.get("description", ""),
                default_of=None,
            )
            made.append(view(group, _add(tx, call.world, group, call.world.config.quota_security_group)))
        return made

    return frame.answer(KIND, call, call.body.security_groups is not UNSET, call.world.change(work))


@R.put("/v2.0/security-groups/{id}", body=GroupChangeBody, policy="update_security_group", late=True)
def update(call: Call, id: str) -> View:
    def work(tx: Tx) -> View:
        group = KIND.get(tx, id)
        frame.allow(call, "update", KIND, frame.target(group), id)
        frame.revised(KIND, call, group)
        changes = frame.said(call.body.security_group)
        if group.default_of and changes.get("name", "default") != "default":
            raise Conflict("Updating default security group not allowed.", code="SecurityGroupCannotUpdateDefault")
        changed = frame.kept(store.change(tx, group, call.world.clock.now(), **changes)) if changes else group
        return views(tx, call.world, [changed])[0]

    return frame.answer(KIND, call, False, [call.world.change(work)])


@R.delete("/v2.0/security-groups/{id}", ok=204, policy="delete_security_group", late=True)
def delete(call: Call, id: str) -> None:
    """Nobody has it, so that no wire knows of it."""

    def work(tx: Tx) -> None:
        group = KIND.get(tx, id)
        frame.allow(call, "delete", KIND, frame.target(group), id)
        frame.revised(KIND, call, group)
        if group.default_of and not call.context.is_admin:
            raise Conflict(
                "Insufficient rights for removing default security group.", code="SecurityGroupCannotRemoveDefault"
            )
        if store.group_in_use(tx, id):
            raise Conflict(f"Security Group {id} in use.", code="SecurityGroupInUse")
        counts = store.forget_rules(tx, id)
        store.remove(tx, store.Group, id)
        for project, n in counts.items():
            store.discharge(tx, project, "security_group_rule", n)
        store.discharge(tx, group.project_id, "security_group")

    call.world.change(work)


# ---- rules


@R.post("/v2.0/security-group-rules", body=RuleBody, ok=201, policy="create_security_group_rule", late=True)
def create_rules(call: Call) -> View:
    wishes: list[RuleWish] = frame.several(call.body.security_group_rule, call.body.security_group_rules)

    def work(tx: Tx) -> list[store.Rule]:
        return [_create_rule(tx, call, wish) for wish in wishes]

    rules = call.world.change(work)
    _weave_groups(call.world, {r.security_group_id for r in rules})
    bulk = call.body.security_group_rules is not UNSET
    return frame.answer(RULE, call, bulk, [rule_view(r) for r in rules])


def _create_rule(tx: Tx, call: Call, wish: RuleWish) -> store.Rule:
    project = frame.owner(call, wish)
    call.check({**frame.STRANGER, "project_id": project})
    told = checked(frame.said(wish))
    group = KIND.get(tx, told["security_group_id"])
    frame.seen(call, KIND, frame.target(group), group.id)
    if not call.may("update_security_group", frame.target(group)):
        raise Forbidden("rule:update_security_group is disallowed by policy", code="PolicyNotAuthorized")
    if remote := told.get("remote_group_id"):
        frame.seen(call, KIND, frame.target(KIND.get(tx, remote)), remote)
    rule = _rule(call.world, project, told)
    same = store.find(tx, store.Rule, RT.security_group_id == group.id, RT.meaning == rule.meaning)
    if same:
        raise Conflict(f"Security group rule already exists. Rule id is {same[0].id}.", code="SecurityGroupRuleExists")
    _add_rules(tx, project, [rule], call.world.config.quota_security_group_rule)
    return rule


def _rule(world: World, project: str, told: dict[str, Any]) -> store.Rule:
    facts: dict[str, Any] = {
        n: told.get(n) for n in ("protocol", "port_range_min", "port_range_max", "remote_ip_prefix", "remote_group_id")
    }
    plain = {**facts, "protocol": protocol(facts["protocol"], 6 if told["ethertype"] == "IPv6" else 4)}
    meaning = [told["direction"], told["ethertype"], *("" if v is None else str(v) for v in plain.values())]
    return store.Rule(
        **frame.made(world, project),
        description=told.get("description", ""),
        security_group_id=told["security_group_id"],
        direction=told["direction"],
        ethertype=told["ethertype"],
        meaning="|".join(meaning),
        **facts,
    )


ETHERTYPES = {"ipv4": "IPv4", "ipv6": "IPv6"}
WITH_PORTS = {"tcp", "udp", "33", "132", "136"}  # DCCP, SCTP, UDP-Lite


def checked(told: dict[str, Any]) -> dict[str, Any]:
    """A rule as it is kept; pure. Raises Invalid where its parts do not fit each other."""
    told = {n: v for n, v in told.items() if v is not None}
    for name in ("port_range_min", "port_range_max"):
        if name in told:
            told[name] = frame.number(name, told[name], 0, 65535)
    for name in ("security_group_id", "remote_group_id"):
        if name in told:
            told[name] = told[name].lower()
    ether = ETHERTYPES.get(str(told.get("ethertype", "IPv4")).lower())
    if ether is None:
        raise _invalid(
            f"Security group rule for ethertype '{frame.printable(told['ethertype'])}' not supported. "
            "Allowed values are ['IPv4', 'IPv6'].",
            "SecurityGroupRuleInvalidEtherType",
        )
    told["ethertype"] = ether
    if "remote_ip_prefix" in told and "remote_group_id" in told:
        raise _invalid(
            "Only remote_ip_prefix or remote_group_id may be provided.", "SecurityGroupRemoteGroupAndRemoteIpPrefix"
        )
    if "remote_ip_prefix" in told:
        said = told["remote_ip_prefix"]
        whole = ipam.prefix(said)
        if (":" in whole) != (ether == "IPv6"):
            raise _invalid(
                f"Conflicting value ethertype {ether} for remote_ip_prefix {whole}.",
                "SecurityGroupRuleParameterConflict",
            )
        told["remote_ip_prefix"] = said if "/" in said else whole
    _check_protocol(told, ether)
    return told


def _check_protocol(told: dict[str, Any], ether: str) -> None:
    if "protocol" in told:
        name = str(told["protocol"]).lower()
        if not (name in NUMBERS or name in ("tcp", "udp", "icmp", "icmpv6", "ipv6-icmp", "any") or _is_number(name)):
            raise _invalid(
                f"Security group rule protocol {frame.printable(name)} not supported. Only protocol values of known names "
                "and integer representations [0 to 255] are supported.",
                "SecurityGroupRuleInvalidProtocol",
            )
        told["protocol"] = name
        if name == "any":
            del told["protocol"]
    low, high = told.get("port_range_min"), told.get("port_range_max")
    said = told.get("protocol")
    real = protocol(said, 6 if ether == "IPv6" else 4)
    if real == "icmpv6" and ether == "IPv4":
        raise _invalid(f"Invalid ethertype {ether} for protocol {said}.", "SecurityGroupEthertypeConflictWithProtocol")
    if low is None and high is None:
        return
    if real in ("icmp", "icmpv6"):
        _check_icmp(low, high)
    elif real is None:
        raise _invalid("Must also specify protocol if port range is given.", "SecurityGroupProtocolRequiredWithPorts")
    elif real not in WITH_PORTS:
        raise _invalid(
            f"Invalid protocol {said} for port range, only supported for TCP, UDP, UDPLITE, SCTP and DCCP.",
            "SecurityGroupInvalidProtocolForPort",
        )
    elif low is None or high is None or low > high:
        raise _invalid(
            "For TCP/UDP protocols, port_range_min must be <= port_range_max.", "SecurityGroupInvalidPortRange"
        )
    elif low == 0:
        raise _invalid("Invalid value for port 0", "SecurityGroupInvalidPortValue")


def _check_icmp(type_: int | None, code: int | None) -> None:
    if type_ is None:
        raise _invalid(
            f"ICMP code (port-range-max) {code} is provided but ICMP type (port-range-min) is missing.",
            "SecurityGroupMissingIcmpType",
        )
    for name, value in (("port-range-min", type_), ("port-range-max", code)):
        if value is not None and value > 255:
            raise _invalid(
                f"Invalid value for ICMP {name} {value}. It must be 0 to 255.", "SecurityGroupInvalidIcmpValue"
            )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 4 and int(text) <= 255


def _invalid(said: str, code: str) -> Invalid:
    return Invalid(said, code=code)


@R.delete("/v2.0/security-group-rules/{id}", ok=204, policy="delete_security_group_rule", late=True)
def delete_rule(call: Call, id: str) -> None:
    def work(tx: Tx) -> store.Rule:
        rule = RULE.get(tx, id)
        about = _about_rule(tx, rule)
        frame.allow(call, "delete", RULE, about, id)
        frame.revised(RULE, call, rule)
        if not store.remove(tx, store.Rule, id):
            raise NotFound(f"Security group rule {id} could not be found.", code="SecurityGroupRuleNotFound")
        store.discharge(tx, rule.project_id, "security_group_rule")
        return rule

    rule = call.world.change(work)
    _weave_groups(call.world, {rule.security_group_id})


def _weave_groups(world: World, groups: Iterable[str]) -> None:
    """A group nobody has is nothing to the wires."""
    if not world.looms:
        return
    with world.db.read() as tx:
        used = any(store.group_in_use(tx, g) for g in groups)
    if used:
        weave(world)
