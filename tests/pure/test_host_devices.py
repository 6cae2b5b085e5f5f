"""What a libvirt host offers of its devices, out of node devices as libvirt describes them; and what is made of them."""

from xml.etree import ElementTree

import msgspec
import pytest

from kilonova.kit.errors import Invalid
from kilonova.model.host import HostDevice
from kilonova.model.options import Devices
from kilonova.model.seat import Seat, Taken
from kilonova.virt.libvirt import devices
from kilonova.virt.libvirt.seat import host_devices
from tests.pure.test_domain_xml import machine


def pci(bus, slot, function, vendor, product, *more, node=None):
    name = f"pci_0000_{bus:02x}_{slot:02x}_{function}"
    numa = "" if node is None else f"<numa node='{node}'/>"
    return f"""<device>
  <name>{name}</name>
  <path>/sys/devices/pci0000:80/0000:{bus:02x}:{slot:02x}.{function}</path>
  <parent>pci_0000_80_00_0</parent>
  <driver><name>vfio-pci</name></driver>
  <capability type='pci'>
    <class>0x030200</class>
    <domain>0</domain><bus>{bus}</bus><slot>{slot}</slot><function>{function}</function>
    <product id='0x{product}'>A card</product>
    <vendor id='0x{vendor}'>A maker</vendor>
    {"".join(more)}
    <iommuGroup number='1'><address domain='0x0000' bus='0x{bus:02x}' slot='0x{slot:02x}' function='0x{function}'/></iommuGroup>
    {numa}
    <pci-express><link validity='cap' port='0' speed='16' width='16'/></pci-express>
  </capability>
</device>"""


def virtual(bus, function):
    return f"""<capability type='phys_function'><address domain='0x0000' bus='0x{bus:02x}' slot='0x00' function='0x0'/></capability>"""


MDEV = """<capability type='mdev_types'>
  <type id='nvidia-35'><name>GRID 1Q</name><deviceAPI>vfio-pci</deviceAPI><availableInstances>3</availableInstances></type>
  <type id='nvidia-36'><name>GRID 2Q</name><deviceAPI>vfio-pci</deviceAPI><availableInstances>1</availableInstances></type>
</capability>"""
MADE = """<device>
  <name>mdev_4b20d080_1b54_4048_85b3_a6a62d165c01_0000_84_00_0</name>
  <parent>pci_0000_84_00_0</parent>
  <capability type='mdev'><type id='nvidia-35'/><uuid>4b20d080-1b54-4048-85b3-a6a62d165c01</uuid></capability>
</device>"""
HOST = [
    pci(0x81, 0, 0, "10de", "1eb8", node=1),
    pci(0x82, 0, 0, "8086", "1572", "<capability type='virt_functions' maxCount='64'/>", node=0),
    pci(0x82, 2, 0, "8086", "154c", virtual(0x82, 0), node=0),
    pci(0x82, 2, 1, "8086", "154c", virtual(0x82, 0), node=0),
    pci(0x84, 0, 0, "10de", "2235", MDEV),
    pci(0x00, 1, 0, "1af4", "1000"),
    MADE,
    "<device><name>computer</name><capability type='system'/></device>",
]
GPU = HostDevice("0000:81:00.0", "CUSTOM_PCI_10DE_1EB8", 1, "pci", [], "", 1)
NIC = HostDevice("0000:82:00.0", "CUSTOM_PCI_8086_154C", 2, "pci", ["0000:82:02.0", "0000:82:02.1"], "", 0)


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ({"vendor_id": "10de", "product_id": "1eb8"}, [GPU]),
        ({"vendor_id": "8086", "product_id": "154c"}, [NIC]),
        ({"address": "0000:82:00.0"}, [NIC]),  # the functions of a device that is named
        ({"address": "0000:82:02.1"}, [msgspec.structs.replace(NIC, total=1, functions=["0000:82:02.1"])]),
        ({"address": ":81:*"}, [GPU]),
        ({"vendor_id": "8086", "product_id": "1572"}, [HostDevice("0000:82:00.0", "CUSTOM_PCI_8086_1572", 1, "pci", [], "", 0)]),
        (
            {"address": "0000:81:00.0", "resource_class": "gold gpu", "traits": "HW_GPU_API_VULKAN,fast"},
            [msgspec.structs.replace(GPU, resource_class="CUSTOM_GOLD_GPU", traits=["CUSTOM_FAST", "HW_GPU_API_VULKAN"])],
        ),
        ({"address": "0000:81:00.0", "resource_class": "PGPU"}, [msgspec.structs.replace(GPU, resource_class="PGPU")]),
        ({"vendor_id": "beef"}, []),
    ],
)  # fmt: skip
def test_pci_devices(spec, found):
    assert devices.offered(HOST, [spec]) == found


@pytest.mark.parametrize("spec", [{"vendor": "10de"}, {}, {"resource_class": "PGPU"}, {"vendor_id": "1", "x": "y"}])
def test_specs_that_make_no_sense(spec):
    with pytest.raises(Invalid):
        devices.offered(HOST, [spec])


@pytest.mark.parametrize(
    ("kinds", "kind", "total"),
    [
        (Devices(("nvidia-35",)), "nvidia-35", 4),  # three more, and one that there is
        (Devices(("nvidia-36", "nvidia-35")), "nvidia-36", 1),
        (Devices(("nvidia-36", "nvidia-35"), {"nvidia-35": ("0000:84:00.0",)}), "nvidia-35", 4),
        (Devices(("nvidia-35",), {"nvidia-35": ("0000:99:00.0",)}), None, 0),
        (Devices(("nvidia-99",)), None, 0),
        (Devices(), None, 0),
    ],
)
def test_virtual_gpus(kinds, kind, total):
    """A card of which parts are made is not given away whole."""
    spec = [{"vendor_id": "10de"}]
    found = {d.address: d for d in devices.offered(HOST, spec, kinds)}
    assert found["0000:81:00.0"] == GPU
    card = found["0000:84:00.0"]
    assert (card.mdev_type, card.total, card.resource_class) == (
        (kind, total, "VGPU") if kind else ("", 1, "CUSTOM_PCI_10DE_2235")
    )


def test_what_is_made_for_a_server_and_plugged_into_it():
    gpu = Taken("p", "0000:84:00.0", "VGPU", "mdev", "nvidia-35")
    card = Taken("q", "0000:81:00.0", "CUSTOM_PCI_10DE_1EB8")
    m = machine(seat=Seat(devices=[gpu, card, gpu]))
    (one, document), (two, _) = devices.wanted(m)
    assert devices.wanted(m)[0][0] == one != two  # twice the same is no harm
    made = ElementTree.fromstring(document)
    assert made.findtext("parent") == "pci_0000_84_00_0"
    said = devices.mediated(made)
    assert said is not None and (said.uuid, said.kind, said.parent) == (one, "nvidia-35", "pci_0000_84_00_0")
    whole, *parts = host_devices(m)
    assert whole.get("type") == "pci" and whole.find("source/address").get("bus") == "0x81"
    assert [(p.get("type"), p.get("model"), p.find("source/address").get("uuid")) for p in parts] == [
        ("mdev", "vfio-pci", one),
        ("mdev", "vfio-pci", two),
    ]
    assert devices.wanted(machine()) == []
