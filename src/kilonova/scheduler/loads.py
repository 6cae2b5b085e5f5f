"""Tastes about what hosts are at already: how many servers, which images, which devices, what they measure."""

from types import EllipsisType
from typing import Any

import numpy as np

from kilonova.model.ask import Ask
from kilonova.scheduler.hosts import Bools, Floats, Hosts
from kilonova.scheduler.rules import View, rule, taste

DEVICES = ("PCI_DEVICE", "SRIOV_NET_VF", "VGPU", "PGPU", "FPGA")


@taste(0.0, needs=("loads",))
def instances(hosts: Hosts, ask: Ask, view: View) -> Any:
    """How many servers it has."""
    return hosts.servers + hosts.busy


@taste(1.0)
def pci(hosts: Hosts, ask: Ask, view: View) -> Floats | EllipsisType:
    """Hosts with few free devices or none: others are kept for who asks for devices."""
    devices = [name for name in hosts.classes if name in DEVICES or name.startswith("CUSTOM_PCI_")]
    if not devices:
        return ...
    free = np.sum([hosts.free_of(name) for name in devices], axis=0)
    return np.asarray(100 - np.minimum(free, 99))


@taste(0.0, needs=("pictures",))
def image_properties(hosts: Hosts, ask: Ask, view: View) -> Floats:
    """Servers there whose images have properties that this one has."""
    weights = view.options.image_properties_weights
    wanted = [(pair, weights.get(pair[0], 0.0 if weights else 1.0)) for pair in ask.properties.items()]
    return np.fromiter((sum(w * of[pair] for pair, w in wanted) for of in hosts.pictures), float, hosts.n)


@taste(1.0, needs=("metrics",))
def metrics(hosts: Hosts, ask: Ask, view: View) -> Floats | EllipsisType:
    """What it measures, weighed as the operator says."""
    o = view.options

    def weighed(measured: dict[str, float]) -> float:
        if not o.metrics.keys() <= measured.keys():
            return o.metrics_unavailable
        return sum(measured[name] * weight for name, weight in o.metrics.items())

    return np.fromiter(map(weighed, hosts.metrics), float, hosts.n) if o.metrics else ...


@rule(needs=("metrics",))
def measured(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts that measure all that is weighed."""
    wanted = view.options.metrics.keys()
    if not (wanted and view.options.metrics_required):
        return ...
    return np.fromiter((wanted <= m.keys() for m in hosts.metrics), bool, hosts.n)
