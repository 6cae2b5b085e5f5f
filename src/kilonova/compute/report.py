"""What a host says of itself: now, and from then on every few seconds."""

from math import ceil

import msgspec

from kilonova.contracts.conductor import HeldHere, Report
from kilonova.model.host import HostFacts, Stock
from kilonova.model.numa import cpu_set
from kilonova.model.options import Compute
from kilonova.model.seat import cpus_of
from kilonova.virt.driver import POWER_NUMBERS, Held


def stocks(facts: HostFacts, options: Compute) -> list[Stock]:
    """What may be given out of what there is. One server can have at most what is really there."""
    shared = len(facts.shared) if facts.shared or facts.dedicated else facts.vcpus
    ratios = {
        "VCPU": (shared, options.reserved_cpus, options.cpu_allocation_ratio),
        "PCPU": (len(facts.dedicated), 0, 1.0),
        "MEMORY_MB": (facts.memory_mb, options.reserved_memory_mb, options.memory_allocation_ratio),
        "DISK_GB": (facts.disk_gb, ceil(options.reserved_disk_mb / 1024), options.disk_allocation_ratio),
    }
    return [
        Stock(name, total, reserved=min(reserved, total), max_unit=total, allocation_ratio=ratio)
        for name, (total, reserved, ratio) in ratios.items()
        if total > 0
    ]


def parted(facts: HostFacts, options: Compute) -> HostFacts:
    """With its CPUs parted as the operator wants it: those for one server alone, and those that all others share."""
    if not (options.cpu_dedicated_set or options.cpu_shared_set):
        return facts
    there = {cpu for ids in cpus_of(facts.cells) for cpu in ids} or set(range(facts.vcpus))
    dedicated = cpu_set(options.cpu_dedicated_set) & there
    shared = (cpu_set(options.cpu_shared_set) & there if options.cpu_shared_set else there) - dedicated
    return msgspec.structs.replace(facts, dedicated=sorted(dedicated), shared=sorted(shared))


def report(
    host: str,
    *,
    at: float,
    born: float,
    machines: list[Held],
    busy: list[str],
    speaks: list[str],
    facts: HostFacts | None,
    options: Compute,
    version: str,
    host_ip: str,
    identity: str = "",
) -> Report:
    return Report(
        host=host,
        at=at,
        born=born,
        holds=[held(m, whole=facts is not None) for m in machines],
        busy=busy,
        speaks=speaks,
        facts=facts,
        stocks=[] if facts is None else stocks(facts, options),
        version=version,
        host_ip=host_ip,
        identity=identity,
    )


def held(m: Held, *, whole: bool) -> HeldHere:
    """`whole`: with what is plugged into it."""
    here = HeldHere(m.id, POWER_NUMBERS[m.power], m.epoch, m.captures)
    return msgspec.structs.replace(here, ports=m.ports, volumes=m.volumes, shares=m.shares) if whole else here
