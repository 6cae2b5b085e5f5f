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

Element = ElementTree.Element

NAMESPACE = "urn:kilonova:server:1"
QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
ElementTree.register_namespace("kilonova", NAMESPACE)
ElementTree.register_namespace("qemu", QEMU)

CONFIG_DRIVE = "disk.config"
DEVICE_OF = {"virtio": "vd", "scsi": "sd", "sata": "sd", "usb": "sd", "ide": "hd"}


class Layer(msgspec.Struct, frozen=True):
    """One file of a disk, in a format that we know because we made it or looked into it."""

    path: str
    format: Literal["raw", "qcow2"]


class Laid(msgspec.Struct, frozen=True):
    """Where a disk lies: the file the guest writes to first, those it stands on below."""

    layers: list[Layer]
    read_only: bool = False


class Place(msgspec.Struct, frozen=True):
    """What a host adds to a `Machine`: where its things are, and how guests run here."""

    emulator: str
    virt_type: Literal["kvm", "qemu"]
    disks: dict[str, Laid]  # by `Disk.device`
    console: str  # the file that keeps what the guest says on its serial line
    owner: str = ""  # the UUID of the host, so that two clouds on one libvirtd know their own
    config_drive: str = ""
    vnc: str = ""  # path of the socket; "": where libvirt likes
    machine_type: str = "q35"
    cpu_mode: str = "maximum"  # host-model, host-passthrough, maximum, custom, none
    cpu_model: str = ""
    disk_cache: str = "writeback"
    spare_slots: int = 8  # for what is plugged in later
    tcg_cache_mb: int = 64
    taps: Literal["libvirt", "ready"] = "libvirt"  # who makes them; ready: they are there when it starts


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
    if arguments := [
        word for nic in machine.nics if nic.vif_type == "user" for word in _user_network(nic, machine, kind)
    ]:
        line = element(f"{{{QEMU}}}commandline")
        line.extend([element(f"{{{QEMU}}}arg", value=word) for word in arguments])
        domain.append(line)
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode")


def epoch_of(metadata: str) -> tuple[str, int]:
    """(owner, epoch) out of our metadata element, as libvirt gives it back. Raises ValueError."""
    try:
        root = ElementTree.fromstring(metadata)  # noqa: S314  (libvirt's own output)
    except ElementTree.ParseError as e:
        raise ValueError(str(e)) from None
    return root.get("owner", ""), int(root.get("epoch", "0"))


def element(tag: str, text: str | None = None, /, *children: Element, **attributes: str) -> Element:
    """Attributes that are "" are left out; a trailing underscore is for names that are Python's."""
    made = Element(tag, {k.rstrip("_"): v for k, v in attributes.items() if v})
    made.text = text
    made.extend(children)
    return made


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
    made.append(
        element("serial", None, element("log", file=at.console, append="on"), element("target", port="0"), type="pty")
    )
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
        taken = len(machine.disks) + len(machine.nics) + 4  # config drive, rng, balloon, agent
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
        element("source", file=top.path),
        _backing(laid.layers[1:]),
        element("target", dev=disk.device, bus=disk.bus),
        type="file",
        device=disk.kind,
    )
    if laid.read_only:
        made.append(element("readonly"))
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


def _screen(machine: Machine, at: Place) -> list[Element]:
    """A socket file, not a TCP port: who may open the server's directory may see its screen, nobody else."""
    if machine.video_model == "none":
        return [element("video", None, element("model", type="none"))]
    return [
        element("graphics", None, element("listen", type="socket", socket=at.vnc), type="vnc"),
        element("video", None, element("model", type=machine.video_model or "virtio")),
    ]


# ---- QEMU's own network, where the host can make none


def _user_network(nic: Nic, machine: Machine, kind: str) -> list[str]:
    """QEMU plays the router. libvirt has no words for most of it, so it is said on QEMU's command line.

    From `details`: `cidr`, `gateway`, `hostfwd` (`tcp:127.0.0.1:2222-:22`), `guestfwd` (`tcp:ADDRESS:PORT-cmd:…`),
    each one or several separated by newlines; unset, `cidr` and the guest's address are those of its first IPv4.
    """
    ip = next((ip for ip in nic.ips if ip.version == 4), None)
    cidr = str(nic.details.get("cidr") or (f"{ip.address}/{ip.prefix}" if ip else "10.0.2.0/24"))
    network = ipaddress.ip_interface(cidr).network
    words = ["user", f"id=user-{nic.device}", f"net={network}"]
    if gateway := nic.details.get("gateway") or (ip and ip.gateway):
        words.append(f"host={gateway}")
    if ip and ipaddress.ip_address(ip.address) in network:
        words.append(f"dhcpstart={ip.address}")
    words.append(f"hostname={machine.identity.hostname or machine.name}")
    for key in ("hostfwd", "guestfwd"):
        words.extend(f"{key}={rule}" for rule in str(nic.details.get(key, "")).splitlines() if rule)
    device = {"virtio": "virtio-net-pci"}.get(nic.model, nic.model)
    slot = 0x10 + machine.nics.index(nic)
    root = "pci.0" if kind == "pc" or "i440fx" in kind else "pcie.0"
    plug = [device, f"netdev=user-{nic.device}", f"mac={nic.mac}", "romfile=", f"bus={root}", f"addr=0x{slot:x}"]
    return ["-netdev", ",".join(map(_doubled, words)), "-device", ",".join(map(_doubled, plug))]


def _doubled(word: str) -> str:
    """QEMU separates by commas; one that is meant is written twice."""
    return word.replace(",", ",,")
