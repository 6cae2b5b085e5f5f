"""Rules say no, tastes say how much. Each is a function of the columns and of what is asked.

A rule answers a mask of the rows that it lets through, or `...` when it has nothing to say about this ask; how
many each turned away is the answer to "why not?".  A taste answers a number a row, the more the better, or `...`; it
is scaled to 0…1 over the rows that are left, then weighed.
"""

from collections.abc import Callable
from itertools import islice
from types import EllipsisType
from typing import Any

import numpy as np
import os_traits

from kilonova.kit.errors import Invalid
from kilonova.model import fit, wants
from kilonova.model.ask import Ask, served
from kilonova.model.candidates import Query, within
from kilonova.model.numa import guest as numa_guest
from kilonova.model.options import Scheduler as Options
from kilonova.model.seat import near as seated_near
from kilonova.model.server_group import admits
from kilonova.scheduler.hosts import Bools, Floats, Hosts

Rule = Callable[[Hosts, Ask, "View"], Bools | EllipsisType]
Taste = Callable[[Hosts, Ask, "View"], Any]


class View:
    """What a rule must know besides: what time it is, how long a host may be silent, what the operator chose."""

    def __init__(self, now: float, down_after_s: float, options: Options) -> None:
        self.now, self.down_after_s, self.options = now, down_after_s, options


MOST_CANDIDATES = 64  # ways to serve it that are looked at on each host
STANDARD_TRAITS = frozenset(os_traits.get_traits())
RULES: dict[str, tuple[Rule, bool]] = {}
TASTES: dict[str, tuple[Taste, float]] = {}


MORE: dict[str, tuple[str, ...]] = {}  # the columns that a rule or taste needs, and that are kept for nobody else


def rule(*, standard: bool = True, needs: tuple[str, ...] = ()) -> Callable[[Rule], Rule]:
    """`standard`: asked where the configuration names no rules."""

    def declared(do: Rule) -> Rule:
        RULES[do.__name__], MORE[do.__name__] = (do, standard), needs
        return do

    return declared


def taste(weight: float, *, needs: tuple[str, ...] = ()) -> Callable[[Taste], Taste]:
    """`weight`: where the configuration names none."""

    def declared(do: Taste) -> Taste:
        TASTES[do.__name__] = do, weight
        MORE[do.__name__] = (*MORE.get(do.__name__, ()), *needs)
        return do

    return declared


# ---- rules, the cheap ones first


@rule()
def enabled(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    some = "COMPUTE_STATUS_DISABLED" in hosts.trait_of
    return ~(hosts.disabled | hosts.with_trait("COMPUTE_STATUS_DISABLED")) if some else ~hosts.disabled


@rule()
def ours(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Providers that are for servers; asked as soon as every host knows to say so."""
    if not hosts.kinds or any(wants.OURS not in facts.traits for facts in hosts.kinds):
        return ...
    return hosts.with_trait(wants.OURS)


@rule()
def up(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    return ~hosts.forced_down & (hosts.seen >= view.now - view.down_after_s)


@rule()
def named(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """The host, or the hypervisor, that somebody asked for."""
    if ask.host is None and ask.node is None:
        return ...
    return rows(hosts, lambda p: ask.host in (None, p.host) and ask.node in (None, p.node))


@rule()
def elsewhere_too(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts that could serve it says another Placement service, where one keeps what there is for others, too."""
    if ask.among is None:
        return ...
    among = set(ask.among)
    return rows(hosts, lambda p: p.provider in among)


@rule()
def not_avoided(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    if not ask.avoid:
        return ...
    avoid = set(ask.avoid)
    return rows(hosts, lambda p: p.host not in avoid)


@rule()
def zone(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    if ask.zone is None:
        return ...
    return np.asarray(hosts.zone == hosts.zones.get(ask.zone, -1))


@rule()
def room(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    return _room(hosts, ask)


def _room(hosts: Hosts, ask: Ask) -> Bools:
    fits = np.ones(hosts.n, bool)
    for name, n in ask.amounts.items():
        i = hosts.column(name)
        if i is None:
            return np.zeros(hosts.n, bool)
        below, beside = hosts.below.get(i), hosts.beside.get(i)
        if below is not None or (ask.parts and beside is not None):  # `devices` says whose it can be
            fits &= hosts.free_of(name) >= n
        elif beside is not None:
            fits &= hosts.fit_alone(i, n) | hosts.fit_beside(name, n, ask.forbidden)
        else:
            fits &= hosts.fit_alone(i, n)
    return fits


@rule()
def traits(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    if not (ask.required or ask.forbidden):
        return ...
    fits = hosts.somewhere(ask.required) if hosts.nested(ask) else hosts.having(ask.required)
    for t in ask.forbidden:
        fits &= ~hosts.with_trait(t)
    return fits


@rule()
def image(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Architecture, hypervisor type and the like, as the image wants them."""
    if not any(k in ask.properties for k in IMAGE_WANTS):
        return ...
    return kinds(hosts, [fit.runs(facts, ask.properties) for facts in hosts.kinds])


@rule()
def capabilities(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """`capabilities:path` of the flavor against what the hypervisor says of itself."""
    wanted = {
        k.removeprefix("capabilities:").split(":")[0]: v
        for k, v in ask.extra_specs.items()
        if k.startswith("capabilities:")
    }
    if not wanted:
        return ...
    said = [{f: getattr(facts, f) for f in facts.__struct_fields__} | facts.cpu_info for facts in hosts.kinds]
    return kinds(hosts, [all(k in s and fit.matches(str(s[k]), v) for k, v in wanted.items()) for s in said])


@rule()
def devices(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts whose devices, and what else is under them or shared with them in Placement, can serve each part of this.

    Asked where there is room, and where the columns do not tell: one host after the other is slow.
    """
    if not hosts.nested(ask):
        return ...
    query = served(ask)
    fits = hosts.somewhere(ask.required)
    for row in np.flatnonzero(fits & _room(hosts, ask) & ~_plain(hosts, ask)).tolist():
        fits[row] = (
            next(within(hosts.tree(row, _traits_of(query)), query, hosts.places[row].provider), None) is not None
        )
    return fits


def _plain(hosts: Hosts, ask: Ask) -> Bools:
    """Rows that serve it for sure: all traits are the host's, and each class is its own or shared with it, not all of them shared."""
    if ask.parts:
        return np.zeros(hosts.n, bool)
    whole, some = hosts.having(ask.required), np.zeros(hosts.n, bool)
    for name, n in ask.amounts.items():
        i = hosts.column(name)
        if i is None:
            return np.zeros(hosts.n, bool)
        alone = hosts.fit_alone(i, n)
        some |= alone
        whole &= alone | hosts.fit_beside(name, n, ask.forbidden) if i in hosts.beside else alone
    return np.asarray(whole & some)


def _traits_of(query: Query) -> set[str]:
    return {t for g in query.groups.values() for t in (*g.forbidden, *(t for one_of in g.required for t in one_of))}


@rule()
def numa(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts with CPUs and pages left for each of the guest's cells; a host that does not tell of its cells has none."""
    try:
        guest = numa_guest(ask.extra_specs, ask.properties, ask.vcpus, ask.memory_mb)
    except Invalid:
        return np.zeros(hosts.n, bool)
    return ... if guest is None else hosts.cells.fit(guest)


@rule()
def near(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts where devices that could serve this lie as near to cells that could hold the guest as its policy wants."""
    if ask.nearness in ("", "preferred") or not hosts.nested(ask):
        return ...
    try:
        guest = numa_guest(ask.extra_specs, ask.properties, ask.vcpus, ask.memory_mb)
    except Invalid:
        return np.zeros(hosts.n, bool)
    if guest is None:
        return ...
    query, ways = served(ask), hosts.cells.ways(guest)
    fits, there = np.zeros(hosts.n, bool), _room(hosts, ask) & hosts.cells.fit(guest)
    for row in np.flatnonzero(there).tolist():
        cell_of, cells = hosts.cell_of(row), hosts.kinds[hosts.kind[row]].cells
        tree = hosts.tree(row, _traits_of(query))
        found = islice(within(tree, query, hosts.places[row].provider), MOST_CANDIDATES)
        devices = {tuple(cell_of(p) for p in c.allocations if hosts.is_device(p)) for c in found}
        fits[row] = any(seated_near(way, at, ask.nearness, cells) for way in ways(row) for at in devices)
    return fits


@rule()
def image_type(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts that use an image of this format as it is."""
    if not (view.options.require_image_type and ask.image_format):
        return ...
    return hosts.with_trait(f"COMPUTE_IMAGE_TYPE_{ask.image_format.upper()}")


@rule()
def image_devices(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts that have the disks' bus, the cards, the screen that the image asks for."""
    if not view.options.image_devices_as_traits:
        return ...
    return hosts.having(wants.of_image(ask.properties, STANDARD_TRAITS))


@rule()
def isolated(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Some hosts are for some images; unless `restrict_isolated_hosts` is off, for no others."""
    o = view.options
    if not (o.isolated_hosts or o.isolated_images):
        return ...
    ours = rows(hosts, lambda p: p.host in o.isolated_hosts)
    if ask.image_id in o.isolated_images:
        return ours
    return ~ours if o.restrict_isolated_hosts else ...


@rule()
def anti_affinity(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts that have as many of the group as they may. A hint as all is: the claim decides."""
    return _company(hosts, ask, "anti-affinity")


@rule()
def affinity(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Where the others are; anywhere as long as there are none."""
    return _company(hosts, ask, "affinity")


FORCED = frozenset(
    {"named", "elsewhere_too", "not_avoided", "room", "devices", "numa", "near"}
)  # all that is asked for a forced host
IN_PLACE = frozenset(
    {"named", "image", "isolated", "aggregate_image"}
)  # of a server that is rebuilt where it is (scheduler.md, "rebuild")
IMAGE_WANTS = ("hw_architecture", "architecture", "img_hv_type", "hypervisor_type", "hw_vm_mode", "vm_mode")


# ---- tastes


@taste(1.0)
def ram(hosts: Hosts, ask: Ask, view: View) -> Floats:
    return hosts.free_of("MEMORY_MB")


@taste(1.0)
def cpu(hosts: Hosts, ask: Ask, view: View) -> Floats:
    return hosts.free_of("VCPU")


@taste(1.0)
def disk(hosts: Hosts, ask: Ask, view: View) -> Floats:
    return hosts.free_of("DISK_GB")


@taste(-1.0)
def io_ops(hosts: Hosts, ask: Ask, view: View) -> Any:
    """Builds under way: as far as this scheduler chose them, and where they are counted, all that is heavy work."""
    return hosts.busy + hosts.ops if hosts.waits or "loads" in hosts.more else ...


@taste(1.0)
def hypervisor_version(hosts: Hosts, ask: Ask, view: View) -> Any:
    return hosts.version if len(hosts.kinds) > 1 else ...


@taste(-1_000_000.0)
def build_failures(hosts: Hosts, ask: Ask, view: View) -> Any:
    return hosts.failures if hosts.failures.any() else ...


@taste(10.0)
def soft_affinity(hosts: Hosts, ask: Ask, view: View) -> Any:
    """Weighs more than what is true of any server: at 1.0 a burst is spread by `io_ops` against its user's word."""
    return _others(hosts, ask, "soft-affinity")


@taste(10.0)
def soft_anti_affinity(hosts: Hosts, ask: Ask, view: View) -> Any:
    others = _others(hosts, ask, "soft-anti-affinity")
    return others if isinstance(others, EllipsisType) else -others


NEEDED = {p: p.replace("-", "_") for p in ("affinity", "anti-affinity", "soft-affinity", "soft-anti-affinity")}
"""Which rule or taste a server group's policy rests on: where it is not asked, the policy cannot be kept."""


# ---- how rules look at less than each row


def _company(hosts: Hosts, ask: Ask, policy: str) -> Bools | EllipsisType:
    if (c := ask.company) is None or c.policy != policy:
        return ...
    all = sum(c.at.values())
    return rows(hosts, lambda p: admits(policy, c.most, here := c.at.get(p.host, 0), all - here))


def _others(hosts: Hosts, ask: Ask, policy: str) -> Any:
    if (c := ask.company) is None or c.policy != policy:
        return ...
    return np.fromiter((c.at.get(p.host, 0) for p in hosts.places), float, hosts.n)


def rows(hosts: Hosts, lets: Callable[[Any], bool]) -> Bools:
    return np.fromiter((lets(p) for p in hosts.places), bool, hosts.n)


def kinds(hosts: Hosts, lets: list[bool]) -> Bools:
    return np.asarray(lets, bool)[hosts.kind] if lets else np.zeros(hosts.n, bool)


def groups(hosts: Hosts, lets: list[bool]) -> Bools:
    return np.asarray(lets, bool)[hosts.group]
