"""Devices of this host that servers may have, out of libvirt's node devices; and those that are made for one. Pure.

What is offered an operator says as for Nova: `[pci] device_spec` names PCI devices, `[devices] enabled_mdev_types` kinds of
mediated devices (virtual GPUs).  Virtual functions are offered together, as one device: their physical one.
"""

import fnmatch
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import os_resource_classes
import os_traits

from kilonova.kit.errors import Invalid
from kilonova.model.host import HostDevice
from kilonova.model.machine import Machine
from kilonova.model.options import Devices
from kilonova.virt.libvirt.elements import element

OURS = uuid.UUID("0f6c2b9e-6a7c-4f0e-9d52-3e1b7a4c58d1")
KEYS = frozenset({"vendor_id", "product_id", "address", "resource_class", "traits", "physical_network", "managed"})
CLASSES, TRAITS = frozenset(os_resource_classes.STANDARDS), frozenset(os_traits.get_traits())


class Found(NamedTuple):
    """A PCI device. `above`: the physical function of a virtual one; `mdev`: kinds that can be made of it, and how many more."""

    address: str
    vendor: str
    product: str
    above: str | None
    cell: int | None
    mdev: dict[str, int]


class Made(NamedTuple):
    """A mediated device that there is."""

    uuid: str
    kind: str
    parent: str  # as libvirt names it


def offered(
    documents: Iterable[str], specs: Sequence[Mapping[str, str]], kinds: Devices | None = None
) -> list[HostDevice]:
    """What these node devices have that an operator gives away. Raises Invalid for a spec that makes no sense."""
    for said in specs:
        _sound(said)
    found, made = list[Found](), list[Made]()
    for document in documents:
        root = ElementTree.fromstring(document)  # noqa: S314  (libvirt's own output)
        if (pci := root.find("capability[@type='pci']")) is not None:
            found.append(_pci(pci))
        elif (one := mediated(root)) is not None:
            made.append(one)
    shared = [d for f in found if (d := _mediating(f, made, kinds or Devices())) is not None]
    taken = {d.address for d in shared}
    mine = [(f, spec) for f in found if f.address not in taken and (spec := _spec(f, specs)) is not None]
    parts: dict[str, list[tuple[Found, Mapping[str, str]]]] = {}
    for f, spec in mine:
        parts.setdefault(f.above or f.address, []).append((f, spec))
    return sorted((*shared, *(_device(at, of) for at, of in parts.items())), key=lambda d: d.address)


def mediated(root: ElementTree.Element) -> Made | None:
    """Of a node device's document."""
    kind, id = root.find("capability[@type='mdev']/type"), root.findtext("capability[@type='mdev']/uuid")
    return None if kind is None or id is None else Made(id, kind.get("id", ""), root.findtext("parent", ""))


def wanted(machine: Machine) -> list[tuple[str, str]]:
    """(uuid, document) of the mediated devices that are to be made for it: the same ones each time."""
    seat, n, found = machine.seat, 0, list[tuple[str, str]]()
    for t in seat.devices if seat else ():
        if t.kind == "mdev":
            id = mdev_uuid(machine.id, n)
            kind = element("capability", None, element("type", id=t.mdev_type), element("uuid", id), type="mdev")
            found.append(
                (
                    id,
                    ElementTree.tostring(
                        element("device", None, element("parent", node_name(t.address)), kind), "unicode"
                    ),
                )
            )
            n += 1
    return found


def mdev_uuid(server: str, n: int) -> str:
    return str(uuid.uuid5(OURS, f"{server} {n}"))


def node_name(address: str) -> str:
    """pci_0000_81_00_0"""
    return "pci_" + re.sub(r"[:.]", "_", address)


def _sound(spec: Mapping[str, str]) -> None:
    if unknown := sorted(spec.keys() - KEYS):
        raise Invalid(f"[pci] device_spec: nobody knows {', '.join(unknown)}.")
    if not spec.keys() & {"vendor_id", "product_id", "address"}:
        raise Invalid("[pci] device_spec: it names no device: vendor_id, product_id or address.")


def _pci(pci: ElementTree.Element) -> Found:
    above = pci.find("capability[@type='phys_function']/address")
    node = pci.find("numa")
    kinds = {
        t.get("id", ""): int(t.findtext("availableInstances", "0"))
        for t in pci.iterfind("capability[@type='mdev_types']/type")
    }
    return Found(
        _address({name: int(pci.findtext(name, "0"), 0) for name in ("domain", "bus", "slot", "function")}),
        _hex(pci.find("vendor")),
        _hex(pci.find("product")),
        None if above is None else _address({k: int(v, 0) for k, v in above.attrib.items()}),
        None if node is None else int(node.get("node", "0")),
        kinds,
    )


def _address(at: Mapping[str, int]) -> str:
    return f"{at['domain']:04x}:{at['bus']:02x}:{at['slot']:02x}.{at['function']:x}"


def _hex(e: ElementTree.Element | None) -> str:
    return "" if e is None else e.get("id", "").removeprefix("0x")


def _mediating(f: Found, made: Iterable[Made], said: Devices) -> HostDevice | None:
    """As many as there are and can be; None: nothing is to be made of it."""
    named = [k for k in said.enabled_mdev_types if f.address in said.device_addresses.get(k, ())]
    free = [k for k in said.enabled_mdev_types if k not in said.device_addresses]
    kind = next((k for k in (*named, *free) if k in f.mdev), None)
    if kind is None:
        return None
    there = sum(m.kind == kind and m.parent == node_name(f.address) for m in made)
    total = f.mdev[kind] + there
    return HostDevice(f.address, "VGPU", total, "mdev", [], kind, f.cell) if total else None


def _spec(f: Found, specs: Iterable[Mapping[str, str]]) -> Mapping[str, str] | None:
    for spec in specs:
        if (
            spec.get("vendor_id", f.vendor).lower() == f.vendor
            and spec.get("product_id", f.product).lower() == f.product
            and any(fnmatch.fnmatchcase(a, _pattern(spec.get("address", "*"))) for a in (f.address, f.above) if a)
        ):
            return spec
    return None


def _pattern(address: str) -> str:
    """Also `:81:00.*`, without a domain, as operators write it."""
    return f"*{address}".lower() if address.startswith(":") else address.lower()


def _device(address: str, of: Sequence[tuple[Found, Mapping[str, str]]]) -> HostDevice:
    """A device, or the virtual functions of one; where both were named, the functions."""
    functions = [(f, spec) for f, spec in of if f.above]
    f, spec = (functions or of)[0]
    traits = {_named(word, TRAITS) for word in spec.get("traits", "").split(",") if word.strip()}
    name = _named(spec.get("resource_class", f"PCI_{f.vendor}_{f.product}"), CLASSES)
    addresses = sorted(f.address for f, _ in functions)
    return HostDevice(address, name, max(1, len(addresses)), "pci", addresses, "", f.cell, sorted(traits))


def _named(said: str, known: frozenset[str]) -> str:
    """A class or trait: a standard one, or one of the operator's own."""
    name = re.sub(r"[^A-Z0-9_]", "_", said.strip().upper())
    return name if name in known or name.startswith("CUSTOM_") else f"CUSTOM_{name}"
