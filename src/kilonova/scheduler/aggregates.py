"""Rules about what operators wrote on aggregates of hosts. Rows of one `group` are in the same aggregates."""

from types import EllipsisType

import numpy as np

from kilonova.model import fit
from kilonova.model.ask import Ask
from kilonova.scheduler.hosts import Bools, Hosts, Ints
from kilonova.scheduler.rules import View, groups, rule

Said = dict[str, set[str]]
"""All that a host's aggregates say: key → values."""


@rule()
def tenants(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Aggregates with `filter_tenant_id` admit their own projects only."""
    if not any(k.startswith("filter_tenant_id") for k in hosts.keys):
        return ...
    return groups(hosts, [fit.tenant_fits(ask.project_id, g) for g in hosts.groups])


@rule()
def own_aggregates(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """A project that has aggregates of its own uses their hosts; one without uses any, or none."""
    if not view.options.limit_tenants_to_aggregates:
        return ...
    mine = groups(hosts, [_names(g, ask.project_id) for g in hosts.groups])
    return mine if mine.any() or view.options.aggregate_required_for_tenants else ...


def _names(said: Said, project_id: str) -> bool:
    return any(k.startswith("filter_tenant_id") and project_id in values for k, values in said.items())


@rule()
def isolated_aggregates(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Aggregates with `trait:X = required` are for servers that require X."""
    if not view.options.isolate_aggregates:
        return ...
    required = set(ask.required)
    return groups(hosts, [_wanted(g) <= required for g in hosts.groups])


def _wanted(said: Said) -> set[str]:
    return {k.removeprefix("trait:") for k, values in said.items() if k.startswith("trait:") and "required" in values}


@rule()
def segments(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts that the server's routed networks reach: they are in an aggregate of one of the segments of each."""
    if not ask.member_of:
        return ...
    return groups(hosts, [all(not uuids.isdisjoint(one_of) for one_of in ask.member_of) for uuids in hosts.members])


@rule(standard=False)
def aggregate_extra_specs(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """The flavor's extra specs against what the host's aggregates say."""
    if not ask.extra_specs:
        return ...
    return groups(hosts, [fit.aggregate_fits(ask.extra_specs, g) for g in hosts.groups])


@rule(standard=False)
def aggregate_image(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """What an aggregate says of a property that the image has, must be what the image says."""
    start = view.options.aggregate_image_properties_namespace
    start += view.options.aggregate_image_properties_separator if start else ""

    def fits(said: Said) -> bool:
        return all(ask.properties[k] in v for k, v in said.items() if k.startswith(start) and k in ask.properties)

    return groups(hosts, [fits(g) for g in hosts.groups]) if ask.properties else ...


@rule(standard=False)
def aggregate_types(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Aggregates with `instance_type` take these flavors only."""
    return groups(hosts, [not g.get("instance_type") or ask.flavor in g["instance_type"] for g in hosts.groups])


@rule(standard=False, needs=("loads",))
def num_instances(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts with fewer servers than they may have at most (0: as many as they can)."""
    most = view.options.max_instances_per_host
    return np.asarray(hosts.servers + hosts.busy < most) if most else ...


@rule(standard=False, needs=("loads",))
def aggregate_num_instances(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """The same, by what their aggregates say."""
    most = _least(hosts, "max_instances_per_host", view.options.max_instances_per_host)
    return np.asarray((hosts.servers + hosts.busy < most) | (most == 0))


@rule(standard=False, needs=("loads",))
def io_ops_few(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts that are at fewer builds and the like than they may be."""
    return np.asarray(hosts.ops + hosts.busy < view.options.max_io_ops_per_host)


@rule(standard=False, needs=("loads",))
def aggregate_io_ops(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """The same, by what their aggregates say."""
    most = _least(hosts, "max_io_ops_per_host", view.options.max_io_ops_per_host)
    return np.asarray(hosts.ops + hosts.busy < most)


def _least(hosts: Hosts, key: str, otherwise: int) -> Ints:
    """Of the numbers that a host's aggregates say, the least."""
    return np.asarray([least(g, key, otherwise) for g in hosts.groups], np.int64)[hosts.group]


def least(said: Said, key: str, otherwise: float) -> float:
    """What is no number counts for nothing."""
    numbers = []
    for text in said.get(key, ()):
        try:
            numbers.append(float(text))
        except ValueError:
            continue
    return min(numbers, default=otherwise)
