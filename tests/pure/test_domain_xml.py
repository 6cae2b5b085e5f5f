"""A `Machine` in libvirt's words: what must be in them whatever a machine is like."""

import ipaddress
import re
import string
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilonova.kit.errors import Refused
from kilonova.model.host import Cell
from kilonova.model.machine import Disk, FixedIp, Identity, ImageSource, Machine, Nic
from kilonova.model.seat import Seat, SeatCell, Taken
from kilonova.virt.libvirt import host
from kilonova.virt.libvirt.xml import NAMESPACE, QEMU, Apart, Laid, Layer, Place, domain_xml, epoch_of

ID = "0b1c2d3e-0000-4000-8000-00000000002a"
LAID = Laid([Layer("/srv/instances/x/disk.vda", "qcow2"), Layer("/srv/cache/image", "raw")])
PLACE = Place("/usr/bin/qemu-system-x86_64", "qemu", {"vda": LAID}, "/srv/instances/x/console.log", owner="host-uuid")
ROOT = Disk("vda", ImageSource("image", "raw", 1), size_bytes=1 << 30, boot_index=0)
NIC = Nic("port", "network", "fa:16:3e:00:00:01", "tap01234567-89", bridge="brq0123", mtu=1442)


def machine(**changes: object) -> Machine:
    made = Machine(
        id=ID,
        name="instance-0000002a",
        vcpus=2,
        memory_mb=512,
        disks=[ROOT],
        nics=[NIC],
        identity=Identity(uuid=ID, name="one", hostname="one", project_id="p"),
        epoch=7,
    )
    return msgspec.structs.replace(made, **changes)


def made(of: Machine, at: Place = PLACE) -> ElementTree.Element:
    return ElementTree.fromstring(domain_xml(of, at))


def at(**changes: object) -> Place:
    return msgspec.structs.replace(PLACE, **changes)


# What an XML document can hold; other control characters are refused long before.
words = st.text(st.characters(codec="utf-8", categories=("L", "M", "N", "P", "S", "Z"))).map(str.strip)


@given(name=words, flavor=words, path=st.text(string.printable.strip(), min_size=1))
def test_no_name_can_break_out(name: str, flavor: str, path: str) -> None:
    identity = Identity(uuid=ID, name=name, hostname="h", project_id="p")
    laid = Laid([Layer(path, "qcow2"), Layer("/b" + path, "raw")])
    root = made(machine(identity=identity, flavor_name=flavor), at(disks={"vda": laid}))
    assert [e.tag for e in root] == [e.tag for e in made(machine())]
    ours = root.find(f"metadata/{{{NAMESPACE}}}server")
    assert ours is not None
    assert (ours.findtext(f"{{{NAMESPACE}}}name") or "") == name
    assert (ours.findtext(f"{{{NAMESPACE}}}flavor") or "") == flavor
    assert [s.get("file") for s in root.iterfind("devices/disk[1]//source")] == [path, "/b" + path]


def test_our_mark_says_whose_and_how_old() -> None:
    mark = made(machine()).find(f"metadata/{{{NAMESPACE}}}server")
    assert mark is not None
    assert epoch_of(ElementTree.tostring(mark, encoding="unicode")) == ("host-uuid", 7)
    with pytest.raises(ValueError):
        epoch_of("<broken")


def test_every_format_is_said_down_to_the_last_file() -> None:
    """Nothing may be left to be guessed from bytes that a guest or an uploader wrote."""
    laid = {
        "vda": Laid([Layer("/top", "qcow2"), Layer("/middle", "qcow2"), Layer("/base", "raw")]),
        "vdb": Laid([Layer("/blank", "raw")]),
        "sda": Laid([Layer("/iso", "raw")], read_only=True),
    }
    cd = Disk("sda", ROOT.source, kind="cdrom", bus="sata")
    root = made(
        machine(disks=[ROOT, Disk("vdb", ROOT.source), cd], config_drive=True), at(disks=laid, config_drive="/c")
    )
    for disk in root.iterfind("devices/disk"):
        driver, backing = disk.find("driver"), disk.find("backingStore")
        assert driver is not None and driver.get("type") in ("raw", "qcow2")
        assert backing is not None
        while len(backing):
            assert backing.get("type") == "file" and backing.find("format") is not None
            inner = backing.find("backingStore")
            assert inner is not None
            backing = inner
    assert len(root.findall("devices/disk[1]//backingStore")) == 3
    assert [d.find("readonly") is not None for d in root.iterfind("devices/disk")] == [False, False, True, True]


def test_a_disk_that_lies_nowhere_is_refused() -> None:
    with pytest.raises(Refused, match="vda"):
        domain_xml(machine(), at(disks={}))


def test_slots_for_later() -> None:
    def ports(of: Machine, place: Place = PLACE) -> int:
        return len(made(of, place).findall("devices/controller[@model='pcie-root-port']"))

    assert ports(machine(nics=[])) + 1 == ports(machine())
    assert ports(machine()) - ports(machine(), at(spare_slots=0)) == PLACE.spare_slots
    assert ports(machine(machine_type="pc")) == 0


@pytest.mark.parametrize(
    ("bus", "kind", "device", "target"),
    [
        ("virtio", "q35", "disk", ("virtio", "vdz")),
        ("virtio", "pc", "cdrom", ("ide", "hdd")),
        ("scsi", "q35", "cdrom", ("scsi", "sdz")),
        ("sata", "q35", "cdrom", ("sata", "sdz")),
        ("ide", "pc", "cdrom", ("ide", "hdd")),
    ],
)
def test_a_config_drive_is_where_the_guest_can_see_it(
    bus: str, kind: str, device: str, target: tuple[str, str]
) -> None:
    disk = msgspec.structs.replace(ROOT, bus=bus)
    root = made(machine(disks=[disk], machine_type=kind, config_drive=True), at(config_drive="/c"))
    drive = root.find("devices/disk[2]")
    assert drive is not None and drive.get("device") == device
    found = drive.find("target")
    assert found is not None and (found.get("bus"), found.get("dev")) == target


def test_nics() -> None:
    card = made(machine()).find("devices/interface")
    assert card is not None and card.get("type") == "bridge"
    said = {tag: card.find(tag) for tag in ("mac", "source", "target", "model", "mtu", "rom")}
    assert {tag: e.attrib for tag, e in said.items() if e is not None} == {
        "mac": {"address": NIC.mac},
        "source": {"bridge": NIC.bridge},
        "target": {"dev": NIC.device},
        "model": {"type": "virtio"},
        "mtu": {"size": "1442"},
        "rom": {"enabled": "no"},
    }
    ready = made(machine(), at(taps="ready")).find("devices/interface")
    assert ready is not None and ready.get("type") == "ethernet"
    with pytest.raises(Refused, match="unbound"):
        domain_xml(machine(nics=[msgspec.structs.replace(NIC, vif_type="unbound")]), PLACE)


def arguments(of: Machine, place: Place) -> list[str]:
    return [a.get("value", "") for a in made(of, place).iterfind(f"{{{QEMU}}}commandline/{{{QEMU}}}arg")]


def test_qemus_own_network() -> None:
    ip = FixedIp("10.0.0.5", prefix=24, gateway="10.0.0.1")
    nic = msgspec.structs.replace(NIC, vif_type="user", ips=[ip], details={"hostfwd": "tcp::22-:22"})
    place = at(apart=Apart("/bin/x a,b", 4022), sandbox="ours")
    root = made(machine(nics=[NIC, nic]), place)
    assert len(root.findall("devices/interface")) == 1
    line = arguments(machine(nics=[NIC, nic]), place)
    first, metadata = (re.split(r"(?<!,),(?!,)", word) for word in line if word.startswith("user,"))
    assert {"net=10.0.0.0/24", "host=10.0.0.1", "dns=10.0.0.254", "dhcpstart=10.0.0.5", "restrict=on"} <= set(first)
    assert [w for w in first if w.startswith("hostfwd")] == ["hostfwd=tcp:127.0.0.1:4022-10.0.0.5:22"]  # ours alone
    assert "guestfwd=tcp:169.254.169.254:80-cmd:/bin/x a,,b" in metadata  # a comma that is meant
    assert "restrict=on" in metadata
    cards = [word for word in line if word.startswith("virtio-net-pci")]
    assert [re.findall("addr=(.*)", c) for c in cards] == [["0x11"], ["0x12"]] and all("bus=pcie.0" in c for c in cards)
    assert len({re.findall("mac=([^,]*)", c)[0] for c in cards}) == 2
    open_ = arguments(machine(nics=[nic]), at(apart=Apart(outside=True)))
    assert "restrict=off" in open_[1] and "guestfwd" not in str(open_) and "hostfwd" not in str(open_)


def test_qemu_may_start_a_program_only_for_metadata() -> None:
    nic = msgspec.structs.replace(NIC, vif_type="user")
    place = at(apart=Apart("/bin/x"), sandbox="ours")
    assert "spawn=allow" in arguments(machine(nics=[nic]), place)[1]
    assert "spawn=deny" in arguments(machine(), place)[1]
    assert arguments(machine(), PLACE) == []  # libvirt confines it


@given(st.integers(1, 254), st.integers(24, 30), st.booleans())
def test_qemu_takes_no_address_that_is_the_guests(host: int, width: int, gateway: bool) -> None:
    net = ipaddress.ip_network(f"10.0.0.{host}/{width}", strict=False)
    hosts = [str(a) for a in net.hosts()]
    ip = FixedIp(hosts[host % len(hosts)], prefix=width, gateway=hosts[0] if gateway else None)
    line = arguments(machine(nics=[msgspec.structs.replace(NIC, vif_type="user", ips=[ip])]), PLACE)[1]
    own = re.findall(r"(?:host|dns)=(10[^,]*)", line)
    assert len(set(own)) == len(own) and (ip.address not in own or ip.address == ip.gateway)


def test_cpus() -> None:
    cpu = made(machine(vcpus=4, cpu_cores=2, cpu_threads=2)).find("cpu/topology")
    assert cpu is not None and cpu.attrib == {"sockets": "1", "cores": "2", "threads": "2"}
    with pytest.raises(Refused, match="3 CPUs"):
        domain_xml(machine(vcpus=3, cpu_cores=2), PLACE)
    assert made(machine(), at(cpu_mode="none")).find("cpu") is None
    custom = made(machine(), at(cpu_mode="custom", cpu_model="Nehalem")).find("cpu")
    assert custom is not None and (custom.get("match"), custom.findtext("model")) == ("exact", "Nehalem")


def test_a_guest_is_made_where_it_sits() -> None:
    cells = [
        SeatCell(1, [0, 1, 3], 1024, 2048, {0: 9, 1: 8, 3: 12}),
        SeatCell(0, [2], 512, 4, floats=[0, 1, 2]),
    ]
    seat = Seat(cells, [15], True, [Taken("p", "0000:81:00.1", "CUSTOM_PCI_X")], [3], locked=True)
    root = made(machine(vcpus=4, memory_mb=1536, seat=seat))
    pins = {p.get("vcpu"): p.get("cpuset") for p in root.iterfind("cputune/vcpupin")}
    assert pins == {"0": "9", "1": "8", "3": "12", "2": "0-2"}
    assert [e.get("cpuset") for e in root.iterfind("cputune/emulatorpin")] == ["15"]
    assert [e.get("vcpus") for e in root.iterfind("cputune/vcpusched")] == ["3"]
    assert [e.get("nodeset") for e in root.iterfind("numatune/memory")] == ["0-1"]
    assert [(e.get("cellid"), e.get("nodeset")) for e in root.iterfind("numatune/memnode")] == [("0", "1"), ("1", "0")]
    assert [(e.get("cpus"), e.get("memory")) for e in root.iterfind("cpu/numa/cell")] == [
        ("0-1,3", str(1024 * 1024)),
        ("2", str(512 * 1024)),
    ]
    assert [(e.get("size"), e.get("nodeset")) for e in root.iterfind("memoryBacking/hugepages/page")] == [("2048", "0")]
    assert root.find("memoryBacking/locked") is not None
    (address,) = root.iterfind("devices/hostdev[@type='pci']/source/address")
    assert address.attrib == {"domain": "0x0000", "bus": "0x81", "slot": "0x00", "function": "0x1"}
    bare = made(machine(seat=Seat([SeatCell(0, [0, 1], 512, 0, {0: 4, 1: 6})])))
    assert [e.get("cpuset") for e in bare.iterfind("cputune/emulatorpin")] == ["4,6"]
    assert bare.find("memoryBacking") is None


def test_cells_of_a_host_as_libvirt_tells_them() -> None:
    def cpu(id: int, siblings: str) -> str:
        return f"<cpu id='{id}' socket_id='0' core_id='0' siblings='{siblings}'/>"

    def cell(id: int, *cpus: str) -> str:
        return (
            f"<cell id='{id}'><memory unit='KiB'>8388608</memory><pages unit='KiB' size='4'>2000000</pages>"
            f"<pages unit='KiB' size='2048'>512</pages><cpus num='{len(cpus)}'>{''.join(cpus)}</cpus></cell>"
        )

    first, second = cell(0, cpu(0, "0,2"), cpu(2, "0,2")), cell(1, cpu(1, "1,3"), cpu(3, "1,3"))
    text = f"<capabilities><host><topology><cells num='2'>{first}{second}</cells></topology></host></capabilities>"
    assert host.cells(text, {0, 1, 2}) == [
        Cell(2, 8192, {2048: 512}, [0, 2], [[0, 2]], 0),
        Cell(1, 8192, {2048: 512}, [1], [], 0),
    ]
    assert host.cells("<capabilities><host/></capabilities>", {0}) == []


def test_emulated_guests_are_told_a_bound_and_others_are_not() -> None:
    assert made(machine()).findtext("features/tcg/tb-cache") == "64"
    kvm = made(machine(), at(virt_type="kvm", cpu_mode="host-model"))
    assert kvm.get("type") == "kvm" and kvm.find("features/tcg") is None


def test_uefi_and_secure_boot() -> None:
    plain = made(machine(firmware="uefi")).find("os/firmware/feature")
    assert plain is not None and plain.get("enabled") == "no"
    secure = made(machine(firmware="uefi", properties={"os_secure_boot": "required"}))
    feature, smm = secure.find("os/firmware/feature"), secure.find("features/smm")
    assert feature is not None and feature.get("enabled") == "yes"
    assert smm is not None and smm.get("state") == "on"


def test_guests_find_out_that_they_are_in_an_openstack_cloud() -> None:
    assert made(machine()).findtext("sysinfo/system/entry[@name='product']") == "OpenStack Compute"


def test_the_password_is_nowhere() -> None:
    assert "hunter2" not in domain_xml(machine(admin_password="hunter2"), PLACE)
