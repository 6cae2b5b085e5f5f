"""Which rules and tastes an operator wants: by our names, by Nova's, and out of a file of his own."""

import importlib.util
import threading
from pathlib import Path
from typing import TypeVar

from kilonova.kit.errors import Invalid
from kilonova.model.options import Scheduler as Options
from kilonova.scheduler import aggregates, hints, loads, rules
from kilonova.scheduler.rules import MORE, RULES, TASTES, Rule, Taste

CHAPTERS = (rules, aggregates, hints, loads)

ALWAYS = (
    "enabled",
    "ours",
    "named",
    "elsewhere_too",
    "not_avoided",
    "zone",
    "room",
    "traits",
    "image_type",
    "image_devices",
    "own_aggregates",
    "isolated_aggregates",
    "segments",
    "devices",
    "numa",
    "near",
)
"""What Placement and its pre-filters see to in Nova, whatever filters are enabled."""

# fmt: off
FILTERS: dict[str, tuple[str, ...]] = {
    "AllHostsFilter": (),                     "ComputeFilter": ("enabled", "up"),
    "ComputeCapabilitiesFilter": ("capabilities",),         "ImagePropertiesFilter": ("image",),
    "ServerGroupAntiAffinityFilter": ("anti_affinity",),    "ServerGroupAffinityFilter": ("affinity",),
    "SameHostFilter": ("same_host",),                       "DifferentHostFilter": ("different_host",),
    "SimpleCIDRAffinityFilter": ("near_ip",),               "JsonFilter": ("json_query",),
    "IsolatedHostsFilter": ("isolated",),                   "MetricsFilter": ("measured",),
    "AggregateInstanceExtraSpecsFilter": ("aggregate_extra_specs",),
    "AggregateImagePropertiesIsolation": ("aggregate_image",),
    "AggregateMultiTenancyIsolation": ("tenants",),         "AggregateTypeAffinityFilter": ("aggregate_types",),
    "NumInstancesFilter": ("num_instances",),               "AggregateNumInstancesFilter": ("aggregate_num_instances",),
    "IoOpsFilter": ("io_ops_few",),                         "AggregateIoOpsFilter": ("aggregate_io_ops",),
    "NUMATopologyFilter": ("numa",),                        "PciPassthroughFilter": ("devices", "near"),
    # Gone from Nova, and still in many a nova.conf: `room` and `zone` see to it.
    "RetryFilter": (), "RamFilter": (), "CoreFilter": (), "DiskFilter": (), "AvailabilityZoneFilter": (),
    "AggregateRamFilter": (), "AggregateCoreFilter": (), "AggregateDiskFilter": (), "ExactRamFilter": (), "ExactCoreFilter": (), "ExactDiskFilter": (),
}

WEIGHERS: dict[str, str] = {
    "ram": "ram_weight_multiplier",                      "cpu": "cpu_weight_multiplier",
    "disk": "disk_weight_multiplier",                    "io_ops": "io_ops_weight_multiplier",
    "instances": "num_instances_weight_multiplier",      "pci": "pci_weight_multiplier",
    "soft_affinity": "soft_affinity_weight_multiplier",  "soft_anti_affinity": "soft_anti_affinity_weight_multiplier",
    "build_failures": "build_failure_weight_multiplier", "hypervisor_version": "hypervisor_version_weight_multiplier",
    "image_properties": "image_props_weight_multiplier", "metrics": "metrics_weight_multiplier",
}
"""The key by which an aggregate says how much a taste weighs on its hosts; also a name of the taste in the options."""
# fmt: on
NEGATIVE = {"build_failures"}  # whose multiplier Nova writes without its sign

T = TypeVar("T")
loading = threading.Lock()


class Choice:
    """`rules` by name, in the order in which they are asked; `tastes` with their names and weights.

    Raises Invalid for names that nobody knows.
    """

    def __init__(self, options: Options) -> None:
        known_rules, known_tastes, more = _with_file(options.file)
        self.rules = _rules(options, known_rules)
        self.tastes = [] if options.driver == "chance" else _tastes(options, known_tastes)
        self.more = {column for name in (*self.rules, *(n for n, _, _ in self.tastes)) for column in more.get(name, ())}
        if not options.metrics:
            self.more.discard("metrics")


Known = tuple[dict[str, tuple[Rule, bool]], dict[str, tuple[Taste, float]], dict[str, tuple[str, ...]]]


def _with_file(file: Path | None) -> Known:
    """Ours, and those that the operator's file declares; they stay this scheduler's own."""
    with loading:
        before: Known = dict(RULES), dict(TASTES), dict(MORE)
        if file is None:
            return before
        try:
            spec = importlib.util.spec_from_file_location("kilonova_own_rules", file)
            assert spec is not None and spec.loader is not None
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            return dict(RULES), dict(TASTES), dict(MORE)
        except Exception as e:
            raise Invalid(f"scheduler.file: {file} cannot be used: {type(e).__name__}: {e}") from e
        finally:
            _again(RULES, before[0])
            _again(TASTES, before[1])
            _again(MORE, before[2])


def _again(table: dict[str, T], as_before: dict[str, T]) -> None:
    table.clear()
    table.update(as_before)


def _rules(options: Options, known: dict[str, tuple[Rule, bool]]) -> dict[str, Rule]:
    own = [name for name, (_, standard) in known.items() if name not in RULES and standard]
    if options.rules is None:
        wanted = [name for name, (_, standard) in known.items() if standard]
    elif any(name in FILTERS for name in options.rules):
        wanted = [*ALWAYS, *(mine for name in options.rules for mine in FILTERS.get(name, (name,))), *own]
    else:
        wanted = [*options.rules, *own]
    if unknown := [name for name in wanted if name not in known]:
        names = ", ".join((*known, *FILTERS))
        raise Invalid(f"scheduler.rules: there is no rule {', '.join(unknown)}; there are {names}.")
    return {name: known[name][0] for name in dict.fromkeys(wanted)}


def _tastes(options: Options, known: dict[str, tuple[Taste, float]]) -> list[tuple[str, Taste, float]]:
    ours = {theirs: mine for mine, theirs in WEIGHERS.items()}
    said = {}
    for name, weight in options.tastes.items():
        mine = ours.get(name, name)
        said[mine] = -abs(weight) if name in ours and mine in NEGATIVE else weight
    if unknown := [name for name in said if name not in known]:
        raise Invalid(f"scheduler.tastes: there is no taste {', '.join(unknown)}; there are {', '.join(known)}.")
    weighed = [(name, do, said.get(name, weight)) for name, (do, weight) in known.items()]
    return [(name, do, weight) for name, do, weight in weighed if weight]
