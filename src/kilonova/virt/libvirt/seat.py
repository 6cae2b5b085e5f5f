"""Where a guest sits on its host, in libvirt's words: CPUs, NUMA cells, huge pages, devices of the host. Pure."""

from collections.abc import Iterable

from kilonova.model.machine import Machine
from kilonova.model.numa import SMALL_KB
from kilonova.model.seat import Seat, Taken
from kilonova.virt.libvirt.devices import wanted
from kilonova.virt.libvirt.elements import Element, element


def seated(machine: Machine) -> list[Element]:
    """`<memoryBacking>`, `<cputune>` and `<numatune>`; nothing for a guest without a wish."""
    seat = machine.seat
    if seat is None or not seat.cells:
        return []
    return [*_memory(seat), _cpus(seat), _nodes(seat)]


def guest_cells(machine: Machine) -> list[Element]:
    """`<numa>` within `<cpu>`: the cells that the guest sees."""
    if machine.seat is None or not machine.seat.cells:
        return []
    made = element("numa")
    for i, c in enumerate(machine.seat.cells):
        made.append(element("cell", id=str(i), cpus=_set(c.cpus), memory=str(c.memory_mb * 1024), unit="KiB"))
    return [made]


def host_devices(machine: Machine) -> list[Element]:
    """`<hostdev>` of each; mediated ones have been made by then (`devices.wanted`)."""
    taken = machine.seat.devices if machine.seat else []
    made = [_made(id) for id, _ in wanted(machine)]
    return [*(_device(t) for t in taken if t.kind == "pci"), *made]


def _memory(seat: Seat) -> list[Element]:
    pages = [
        element("page", size=str(c.page_kb), unit="KiB", nodeset=str(i))
        for i, c in enumerate(seat.cells)
        if c.page_kb > SMALL_KB
    ]
    told = [element("hugepages", None, *pages)] if pages else []
    if seat.locked:
        told.append(element("locked"))
    return [element("memoryBacking", None, *told)] if told else []


def _cpus(seat: Seat) -> Element:
    made = element("cputune")
    for c in seat.cells:
        for cpu in c.cpus:
            where = [c.pins[cpu]] if cpu in c.pins else c.floats
            if where:
                made.append(element("vcpupin", vcpu=str(cpu), cpuset=_set(where)))
    everywhere = {cpu for c in seat.cells for cpu in (*c.pins.values(), *c.floats)}
    if around := seat.emulator or sorted(everywhere):
        made.append(element("emulatorpin", cpuset=_set(around)))
    if seat.realtime:
        made.append(element("vcpusched", vcpus=_set(seat.realtime), scheduler="fifo", priority="1"))
    return made


def _nodes(seat: Seat) -> Element:
    made = element("numatune", None, element("memory", mode="strict", nodeset=_set(c.host for c in seat.cells)))
    for i, c in enumerate(seat.cells):
        made.append(element("memnode", cellid=str(i), mode="strict", nodeset=str(c.host)))
    return made


def _made(id: str) -> Element:
    source = element("source", None, element("address", uuid=id))
    return element("hostdev", None, source, mode="subsystem", type="mdev", model="vfio-pci", managed="no")


def _device(t: Taken) -> Element:
    domain, bus, rest = t.address.split(":")
    slot, function = rest.split(".")
    at = {"domain": domain, "bus": bus, "slot": slot, "function": function}
    address = element("address", **{name: f"0x{value}" for name, value in at.items()})
    return element("hostdev", None, element("source", None, address), mode="subsystem", type="pci", managed="yes")


def _set(cpus: Iterable[int]) -> str:
    """0-3,6"""
    parts: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if parts and parts[-1][-1] == cpu - 1:
            parts[-1].append(cpu)
        else:
            parts.append([cpu])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
