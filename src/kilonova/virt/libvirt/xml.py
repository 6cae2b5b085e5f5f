"""A `Machine` in libvirt's words. Pure: what the host decides (paths, accelerator, slots) comes in a `Place`.

Nothing is left to a default that another libvirt may choose differently, and no format is left to be guessed: a disk
says its own format and the whole chain below it, so neither libvirt nor QEMU ever looks into a guest's bytes.

libvirt's words: https://libvirt.org/formatdomain.html
"""

import ipaddress
import re
from typing import Literal
from xml.etree import ElementTree

import msgspec

from kilonova.kit.errors import Refused
from kilonova.model.machine import Disk, Machine, Nic
from kilonova.virt.libvirt.elements import Element, element
from kilonova.virt.libvirt.seat import guest_cells, host_devices, seated

NAMESPACE = "urn:kilonova:server:1"
QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
ElementTree.register_namespace("kilonova", NAMESPACE)
ElementTree.register_namespace("qemu", QEMU)

CONFIG_DRIVE = "disk.config"
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

METADATA = "169.254.169.254"
METADATA_NETWORK = ["net=169.254.169.0/24", "host=169.254.169.2", "dhcpstart=169.254.169.15"]
FIRST_SLOT = 0x10  # of cards that libvirt does not know; it begins from the other end

DEVICE_OF = {"virtio": "vd", "scsi": "sd", "sata": "sd", "usb": "sd", "ide": "hd"}


class Layer(msgspec.Struct, frozen=True):
    """One file of a disk, in a format that we know because we made it or looked into it."""

    path: str
    format: Literal["raw", "qcow2"]


class Laid(msgspec.Struct, frozen=True):
    """Where a disk lies: the file the guest writes to first, those it stands on below.

    `shared`: other guests may have it at the same time. `block`: it is a block device.
    """

    layers: list[Layer]
    read_only: bool = False
    shared: bool = False
    block: bool = False


class Apart(msgspec.Struct, frozen=True):
    """What a host adds to cards that QEMU connects by itself (`vif_type` user)."""

    metadata: str = ""  # a command that carries one connection to the metadata service
    ssh_port: int = 0  # of the machine's loopback, leads to the guest's port 22
    outside: bool = False  # may the guest reach what this user reaches, the machine's loopback too?


class Place(msgspec.Struct, frozen=True):
    """What a host adds to a `Machine`: where its things are, and how guests run here."""

    emulator: str
    virt_type: Literal["kvm", "qemu"]
    disks: dict[str, Laid]  # by `Disk.device`
    console: str  # the file that keeps what the guest says on its serial line
    owner: str = ""  # the UUID of the host, so that two clouds on one libvirtd know their own
    config_drive: str = ""
    vnc: str = ""  # path of the socket; "": where libvirt likes
    serial: str = ""  # the same of the serial line; "": a terminal of the host that nobody is led to
    machine_type: str = "q35"
    cpu_mode: str = "maximum"  # host-model, host-passthrough, maximum, custom, none
    cpu_model: str = ""
    disk_cache: str = "writeback"
    spare_slots: int = 8  # for what is plugged in later
    tcg_cache_mb: int = 64
    taps: Literal["libvirt", "ready"] = "libvirt"  # who makes them; ready: they are there when it starts
    apart: Apart = Apart()
    sandbox: Literal["libvirt", "ours"] = "libvirt"  # who confines QEMU


def domain_xml(machine: Machine, at: Place) -> str:
    """The whole definition. Raises Refused when the machine asks for what cannot be said."""
    kind = machine.machine_type or at.machine_type
    domain = element("domain", type=at.virt_type)
    domain.extend(
        [
            element("name", machine.name),
            element("uuid", machine.id),
            _metadata(machine, at),
            element("memory", str(machine.memory_mb), unit="MiB"),
            element("vcpu", str(machine.vcpus), placement="static"),
            *seated(machine),
            _sysinfo(machine),
            _os(machine, kind),
            _features(machine, at),
            *_cpu(machine, at),
            _clock(machine),
            element("on_poweroff", "destroy"),
            element("on_reboot", "restart"),
            element("on_crash", "destroy"),
            _devices(machine, at, kind),
        ]
    )
    if arguments := [*_sandbox(machine, at), *_apart(machine, at, kind)]:
        line = element(f"{{{QEMU}}}commandline")
        line.extend([element(f"{{{QEMU}}}arg", value=word) for word in arguments])
        domain.append(line)
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode")


def nic_xml(nic: Nic, at: Place) -> str:
    """One NIC, for a guest that runs. Raises Refused where it could only be said before its start."""
    return ElementTree.tostring(_nic(nic, at), encoding="unicode")


def disk_xml(disk: Disk, at: Place) -> str:
    """One disk, for a guest that runs."""
    return ElementTree.tostring(_disk(disk, at), encoding="unicode")


def epoch_of(metadata: str) -> tuple[str, int]:
    """(owner, epoch) out of our metadata element, as libvirt gives it back. Raises ValueError."""
    try:
        root = ElementTree.fromstring(metadata)  # noqa: S314  (libvirt's own output)
    except ElementTree.ParseError as e:
        raise ValueError(str(e)) from None
    return root.get("owner", ""), int(root.get("epoch", "0"))


def socket_of(description: str, kind: str) -> str:
    """The socket file of a running domain's screen or serial line; "" where it has none."""
    devices = ElementTree.fromstring(description).find("devices")  # noqa: S314  (libvirt's own output)
    where = {"vnc": "graphics[@type='vnc']/listen[@type='socket']", "serial": "serial[@type='unix']/source"}[kind]
    found = None if devices is None else devices.find(where)
    return "" if found is None else found.get("socket") or found.get("path") or ""


# ---- what it is


def _metadata(machine: Machine, at: Place) -> Element:
    server = element(f"{{{NAMESPACE}}}server", epoch=str(machine.epoch), owner=at.owner)
    for tag, text in (
        ("id", machine.id),
        ("name", machine.identity.name),
        ("flavor", machine.flavor_name),
        ("project", machine.identity.project_id),
        ("owner", machine.owner_name),
    ):
        if text:
            server.append(element(f"{{{NAMESPACE}}}{tag}", text))
    return element("metadata", None, server)


def _sysinfo(machine: Machine) -> Element:
    """cloud-init knows by the product's name that it is in an OpenStack cloud, and else looks for no metadata."""
    entries = {
        "manufacturer": "Kilonova",
        "product": "OpenStack Compute",
        "serial": machine.id,
        "uuid": machine.id,
        "family": "Virtual Machine",
    }
    system = element("system", None, *(element("entry", text, name=name) for name, text in entries.items()))
    return element("sysinfo", None, system, type="smbios")


def _os(machine: Machine, kind: str) -> Element:
    made = element("os", None, element("type", "hvm", arch=machine.architecture, machine=kind))
    if machine.firmware == "uefi":
        made.set("firmware", "efi")
        secure = machine.properties.get("os_secure_boot") == "required"
        made.append(
            element("firmware", None, element("feature", enabled="yes" if secure else "no", name="secure-boot"))
        )
    made.append(element("smbios", mode="sysinfo"))
    return made


def _features(machine: Machine, at: Place) -> Element:
    made = element("features", None, element("acpi"), element("apic"))
    if at.virt_type == "qemu":
        made.append(element("tcg", None, element("tb-cache", str(at.tcg_cache_mb), unit="MiB")))
    if machine.firmware == "uefi" and machine.properties.get("os_secure_boot") == "required":
        made.append(element("smm", state="on"))
    return made


def _cpu(machine: Machine, at: Place) -> list[Element]:
    topology = []
    if machine.cpu_sockets or machine.cpu_cores or machine.cpu_threads:
        cores, threads = machine.cpu_cores or 1, machine.cpu_threads or 1
        sockets = machine.cpu_sockets or machine.vcpus // (cores * threads)
        if sockets * cores * threads != machine.vcpus:
            raise Refused(f"{machine.vcpus} CPUs cannot be {sockets} sockets of {cores} cores of {threads} threads.")
        topology = [element("topology", sockets=str(sockets), cores=str(cores), threads=str(threads))]
    topology += guest_cells(machine)
    if at.cpu_mode == "none":
        return [element("cpu", None, *topology)] if topology else []
    if at.cpu_mode == "custom":
        model = element("model", at.cpu_model, fallback="allow")
        return [element("cpu", None, model, *topology, mode="custom", match="exact")]
    return [element("cpu", None, *topology, mode=at.cpu_mode)]


def _clock(machine: Machine) -> Element:
    made = element("clock", offset="localtime" if machine.properties.get("os_type") == "windows" else "utc")
    if machine.architecture in ("x86_64", "i686"):
        made.append(element("timer", name="pit", tickpolicy="delay"))
        made.append(element("timer", name="rtc", tickpolicy="catchup"))
        made.append(element("timer", name="hpet", present="no"))
    return made


# ---- what is in it


def _devices(machine: Machine, at: Place, kind: str) -> Element:
    made = element("devices", None, element("emulator", at.emulator))
    made.extend(_controllers(machine, at, kind))
    made.extend([_disk(disk, at) for disk in machine.disks])
    if at.config_drive:
        made.append(_config_drive(machine, at, kind))
    made.extend([_nic(nic, at) for nic in machine.nics if nic.vif_type != "user"])
    made.extend(host_devices(machine))
    made.append(_serial(at))
    if machine.properties.get("hw_qemu_guest_agent", "").lower() in ("yes", "true", "1", "on"):
        made.append(
            element("channel", None, element("target", type="virtio", name="org.qemu.guest_agent.0"), type="unix")
        )
    made.extend(_screen(machine, at))
    if machine.properties.get("hw_pointer_model") == "usbtablet":
        made.append(element("input", type="tablet", bus="usb"))
    if machine.rng:
        made.append(element("rng", None, element("backend", "/dev/urandom", model="random"), model="virtio"))
    if machine.watchdog and machine.watchdog != "disabled":
        made.append(element("watchdog", model="i6300esb", action=machine.watchdog))
    made.append(element("memballoon", None, element("stats", period="10"), model="virtio"))
    return made


def _controllers(machine: Machine, at: Place, kind: str) -> list[Element]:
    """On a PCIe machine a slot for later must be there from the start; measured, 16 of them cost a boot nothing."""
    made = []
    if "q35" in kind or kind == "virt" or kind.startswith("virt-"):
        devices = len(machine.seat.devices) if machine.seat else 0
        taken = len(machine.disks) + len(machine.nics) + devices + 4  # config drive, rng, balloon, agent
        made.append(element("controller", type="pci", index="0", model="pcie-root"))
        made.extend(element("controller", type="pci", model="pcie-root-port") for _ in range(taken + at.spare_slots))
    buses = {disk.bus for disk in machine.disks}
    usb = "usb" in buses or machine.properties.get("hw_pointer_model") == "usbtablet"
    made.append(element("controller", type="usb", model="qemu-xhci" if usb else "none"))
    if "scsi" in buses:
        made.append(element("controller", type="scsi", index="0", model="virtio-scsi"))
    return made


def _disk(disk: Disk, at: Place) -> Element:
    laid = at.disks.get(disk.device)
    if laid is None:
        raise Refused(f"This host does not know where the disk {disk.device} is.")
    top = laid.layers[0]
    discard = "" if laid.read_only else "unmap"
    made = element(
        "disk",
        None,
        element("driver", name="qemu", type=top.format, cache=at.disk_cache, discard=discard),
        element("source", dev=top.path) if laid.block else element("source", file=top.path),
        _backing(laid.layers[1:]),
        element("target", dev=disk.device, bus=disk.bus),
        type="block" if laid.block else "file",
        device=disk.kind,
    )
    if laid.read_only:
        made.append(element("readonly"))
    if laid.shared:
        made.append(element("shareable"))
    if disk.serial:
        made.append(element("serial", re.sub(r"[^A-Za-z0-9_-]", "-", disk.serial)))
    if disk.boot_index is not None and disk.boot_index >= 0:
        made.append(element("boot", order=str(disk.boot_index + 1)))
    return made


def _backing(layers: list[Layer]) -> Element:
    """Empty where there is no more: it says so, instead of leaving libvirt to look."""
    if not layers:
        return element("backingStore")
    first, *rest = layers
    return element(
        "backingStore",
        None,
        element("format", type=first.format),
        element("source", file=first.path),
        _backing(rest),
        type="file",
    )


def _config_drive(machine: Machine, at: Place, kind: str) -> Element:
    """On the bus that the guest is known to have a driver for, since it boots from it.

    A CD on `pc`'s IDE is what guests know longest.  q35 has no IDE, and small kernels have no SATA: a read-only
    virtio disk there.
    """
    root = min(machine.disks, key=lambda d: 99 if d.boot_index is None else d.boot_index, default=None)
    bus = root.bus if root else "virtio"
    if bus in ("virtio", "ide") and "q35" not in kind:
        bus, cd = "ide", True
    else:
        cd = bus in ("scsi", "sata", "ide")
        bus = "sata" if bus == "ide" else bus
    taken = {disk.device for disk in machine.disks}
    letters = "dcba" if bus == "ide" else "zyxwvu"
    device = next(d for letter in letters if (d := DEVICE_OF[bus] + letter) not in taken)
    return element(
        "disk",
        None,
        element("driver", name="qemu", type="raw", cache=at.disk_cache),
        element("source", file=at.config_drive),
        element("backingStore"),
        element("target", dev=device, bus=bus),
        element("readonly"),
        type="file",
        device="cdrom" if cd else "disk",
    )


def _nic(nic: Nic, at: Place) -> Element:
    """Without its option ROM: nothing boots from the network here, and a ROM costs a boot 0.1 s each."""
    tail = [element("model", type=nic.model), element("mtu", size=str(nic.mtu)), element("rom", enabled="no")]
    mac = element("mac", address=nic.mac)
    if nic.vif_type == "tap" or at.taps == "ready":
        return element("interface", None, mac, element("target", dev=nic.device, managed="no"), *tail, type="ethernet")
    if nic.vif_type in ("bridge", "ovs") and nic.bridge:
        made = element("interface", None, mac, element("source", bridge=nic.bridge), type="bridge")
        if nic.vif_type == "ovs":
            made.append(
                element("virtualport", None, element("parameters", interfaceid=nic.port_id), type="openvswitch")
            )
        made.append(element("target", dev=nic.device))
        made.extend(tail)
        return made
    raise Refused(f"This host cannot plug the port {nic.port_id}: it is bound as {nic.vif_type!r}.")


def _serial(at: Place) -> Element:
    """All that the guest says is kept; who sits at the line hears it as well, one at a time."""
    log, target = element("log", file=at.console, append="on"), element("target", port="0")
    if not at.serial:
        return element("serial", None, log, target, type="pty")
    return element("serial", None, element("source", mode="bind", path=at.serial), log, target, type="unix")


def _screen(machine: Machine, at: Place) -> list[Element]:
    """A socket file, not a TCP port: who may open the server's directory may see its screen, nobody else."""
    if machine.video_model == "none":
        return [element("video", None, element("model", type="none"))]
    return [
        element("graphics", None, element("listen", type="socket", socket=at.vnc), type="vnc"),
        element("video", None, element("model", type=machine.video_model or "virtio")),
    ]


# ---- QEMU's own network, where the host can make none


def _apart(machine: Machine, at: Place, kind: str) -> list[str]:
    """QEMU plays switch, DHCP and router of each card. libvirt has no words for most of it: said on QEMU's command line.

    The metadata service has to be in the network that leads to it, so it gets a card of its own, the last one.
    """
    nics = [nic for nic in machine.nics if nic.vif_type == "user"]
    words = [word for nic in nics for word in _user_network(nic, nic is nics[0], machine, at, kind)]
    if nics and at.apart.metadata:
        there = f"guestfwd=tcp:{METADATA}:80-cmd:{at.apart.metadata}"
        network = [*METADATA_NETWORK, "ipv6=off", "restrict=on", there]
        mac = f"{int(nics[0].mac[:2], 16) ^ 4:02x}{nics[0].mac[2:]}"
        words += _plugged("user-metadata", network, "virtio", mac, FIRST_SLOT + len(machine.nics), kind)
    return words


def _sandbox(machine: Machine, at: Place) -> list[str]:
    """As libvirt would say it, but where QEMU itself starts the program that carries a guest's questions.

    libvirt's own, which lets nothing be started, would be laid upon ours; so there it is told to lay none.
    """
    if at.sandbox == "libvirt":
        return []
    starts = at.apart.metadata and any(nic.vif_type == "user" for nic in machine.nics)
    # What raises privileges is denied with setsid, by which QEMU makes the program the leader of its own session. None
    # are gained by executing something: seccomp itself sets no_new_privs.
    may = "elevateprivileges=allow,spawn=allow" if starts else "elevateprivileges=deny,spawn=deny"
    return ["-sandbox", f"on,obsolete=deny,{may},resourcecontrol=deny"]


def _user_network(nic: Nic, first: bool, machine: Machine, at: Place, kind: str) -> list[str]:
    ip = next((ip for ip in nic.ips if ip.version == 4), None)
    network = ipaddress.ip_interface(f"{ip.address}/{ip.prefix}" if ip else "10.0.2.0/24").network
    gateway = (ip and ip.gateway) or _unused(network, {ip.address} if ip else set())
    resolver = _unused(network, {gateway, ip.address if ip else ""})
    words = [f"net={network}", "ipv6=off", f"restrict={'off' if at.apart.outside else 'on'}"]
    words += [f"host={gateway}"] * bool(gateway) + [f"dns={resolver}"] * bool(resolver)
    words += [f"dhcpstart={ip.address}"] if ip else []
    words.append(f"hostname={machine.identity.hostname or machine.name}")
    if first and at.apart.ssh_port:
        words.append(f"hostfwd=tcp:127.0.0.1:{at.apart.ssh_port}-{ip.address if ip else ''}:22")
    return _plugged(f"user-{nic.device}", words, nic.model, nic.mac, FIRST_SLOT + machine.nics.index(nic), kind)


def _unused(network: IPNetwork, taken: set[str]) -> str:
    """An address for QEMU itself, from the end, where DHCP comes last; "" where the network is too small."""
    last = int(network.broadcast_address)
    found = (str(ipaddress.ip_address(n)) for n in range(last - 1, max(int(network.network_address), last - 8), -1))
    return next((address for address in found if address not in taken), "")


def _plugged(id: str, network: list[str], model: str, mac: str, slot: int, kind: str) -> list[str]:
    device = {"virtio": "virtio-net-pci"}.get(model, model)
    root = "pci.0" if kind == "pc" or "i440fx" in kind else "pcie.0"
    plug = [device, f"netdev={id}", f"mac={mac}", "romfile=", f"bus={root}", f"addr=0x{slot:x}"]
    return [
        "-netdev",
        ",".join(map(_doubled, ["user", f"id={id}", *network])),
        "-device",
        ",".join(map(_doubled, plug)),
    ]


def _doubled(word: str) -> str:
    """QEMU separates by commas; one that is meant is written twice."""
    return word.replace(",", ",,")
