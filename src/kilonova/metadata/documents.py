"""The trees a guest can read: OpenStack's and EC2's, in every version there was. Pure: all it needs is handed in.

A directory is a dict of what is in it, a file a `Document` or, where making one costs something or differs each
time, a function that gives one.  A path is walked from the root of its version; what is not there is None.
"""

import base64
import binascii
import ipaddress
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from kilonova.model.machine import BlankSource, Disk, FixedIp, Identity, Nic, VolumeSource

# fmt: off
OPENSTACK = ("2012-08-10", "2013-04-04", "2013-10-17", "2015-10-15", "2016-06-30", "2016-10-06", "2017-02-22",
             "2018-08-27", "2020-10-14", "2025-04-04")
EC2 = ("1.0", "2007-01-19", "2007-03-01", "2007-08-29", "2007-10-10", "2007-12-15", "2008-02-01", "2008-09-01",
       "2009-04-04")
# fmt: on
LATEST = "latest"
SEED_BYTES = 512
JSON, TEXT = "application/json", "text/plain; charset=UTF-8"
EXPOSED_VIF_TYPES = {"bridge", "dvs", "hw_veb", "hyperv", "ovs", "tap", "vhostuser", "vif"}
BUSES = {"virtio": "pci", "scsi": "scsi", "ide": "ide", "usb": "usb"}


class Document(NamedTuple):
    """A file of the tree."""

    content: bytes
    content_type: str = TEXT


@dataclass(frozen=True)
class Subject:
    """Whom the tree is about, and what it is made of.

    `today` ("2026-11-20"): versions after it do not exist yet.  `dice(n)` gives n random bytes.  `password` is
    what the guest itself left, encrypted.  `caller` is the address it asks from.  `static` is the operator's
    vendor data; `dynamic` asks the operator's services for more, and `nics` the network service: only when somebody
    reads of it.  `extra` goes into meta_data.json as it is: the config drive's admin_pass.
    """

    identity: Identity
    today: str
    dice: Callable[[int], bytes]
    domain: str = "novalocal"
    password: str = ""
    caller: str = ""
    static: Callable[[], Any] = dict
    dynamic: Callable[[], dict[str, Any]] = dict
    nics: Callable[[], list[Nic]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


File = Document | Callable[[], Document]
Tree = dict[str, Any]  # name → File | Tree | str | int | list[str]


def resolve(subject: Subject, path: str) -> Document | None:
    """What stands at `path`: a file, or the listing of a directory. None: nothing does.

    A path is EC2's where it does not begin with `openstack`; slashes may be doubled or stand at the end.
    """
    parts = [p for p in path.split("/") if p]
    if parts[:1] == ["openstack"]:
        return _openstack(subject, parts[1:])
    if parts[:1] == ["ec2"]:
        parts = parts[1:]
    if not parts:
        return _lines((*EC2, LATEST))
    if (version := _version(parts[0], EC2)) is None:
        return None
    return _walk(ec2(subject, version), parts[1:])


def is_password(subject: Subject, path: str) -> bool:
    """Is it the one file that guests may write?"""
    parts = [p for p in path.split("/") if p]
    version = _version(parts[1], _known(subject)) if len(parts) == 3 and parts[0] == "openstack" else None
    return version is not None and parts[2] == "password" and version >= "2013-04-04"


# ---- OpenStack


def _openstack(subject: Subject, parts: list[str]) -> Document | None:
    known = _known(subject)
    if not parts:
        return _lines((*known, LATEST))
    if parts[0] == "content":
        named = contents(subject.identity)
        return named.get(parts[1]) if len(parts) == 2 else None
    if (version := _version(parts[0], known)) is None:
        return None
    files = openstack(subject, version)
    if len(parts) == 1:
        return _lines(name for name in files if name != "network_data.json" or version >= "2015-10-15")
    found = files.get(parts[1]) if len(parts) == 2 else None
    return found() if callable(found) else found


def openstack(subject: Subject, version: str) -> dict[str, File]:
    """The files of one version, in the order of their listing. `network_data.json` is listed since 2015-10-15 only."""
    files: dict[str, File] = {"meta_data.json": lambda: _json(meta_data(subject, version))}
    if (data := user_data(subject.identity)) is not None:
        files["user_data"] = Document(data)
    if version >= "2013-04-04":
        files["password"] = Document(subject.password.encode())
    if version >= "2013-10-17":
        files["vendor_data.json"] = lambda: _json(subject.static())
    files["network_data.json"] = lambda: Document(msgspec.json.encode(network_data(_nics(subject))), TEXT)
    if version >= "2016-10-06":
        files["vendor_data2.json"] = lambda: _json({"static": subject.static(), **subject.dynamic()})
    return files


def meta_data(subject: Subject, version: str) -> dict[str, Any]:
    """The server in one document; members came with versions."""
    i = subject.identity
    shown: dict[str, Any] = {
        "uuid": i.uuid,
        "name": i.name,
        "hostname": hostname(subject),
        "launch_index": i.launch_index,
        "availability_zone": i.availability_zone,
    }
    if i.meta:
        shown["meta"] = i.meta
    if i.files:
        shown["files"] = [{"path": path, "content_path": f"/content/{n:04d}"} for n, (path, _) in enumerate(i.files)]
    if (key := i.keypair) is not None:
        shown["public_keys"] = {key.name: key.public_key}
        shown["keys"] = [{"name": key.name, "type": key.type, "data": key.public_key}]
    if version >= "2013-04-04":
        shown["random_seed"] = base64.b64encode(subject.dice(SEED_BYTES)).decode()
    if version >= "2015-10-15":
        shown["project_id"] = i.project_id
    if version >= "2016-06-30":
        shown["devices"] = devices(i, version)
    if version >= "2020-10-14":
        shown["dedicated_cpus"] = sorted(i.dedicated_cpus)
    return shown | subject.extra


def hostname(subject: Subject) -> str:
    name = subject.identity.hostname
    return f"{name}.{subject.domain}" if subject.domain else name


def devices(i: Identity, version: str) -> list[dict[str, Any]]:
    """NICs and disks by which a guest can find what was tagged. Where on its bus a thing is, nobody knows beforehand."""
    shown = []
    for nic in i.nics:
        about: dict[str, Any] = {"type": "nic", "mac": nic.mac, "bus": BUSES.get(nic.model, "none"), "address": "none"}
        if nic.tag:
            about["tags"] = [nic.tag]
        if version >= "2017-02-22" and (vlan := nic.details.get("vlan")) is not None:
            about["vlan"] = int(vlan)
        if version >= "2018-08-27":
            about["vf_trusted"] = bool(nic.details.get("trusted", False))
        if about.keys() & {"tags", "vlan", "vf_trusted"}:
            shown.append(about)
    shown += [
        {"type": "disk", "bus": BUSES.get(disk.bus, "none"), "address": "none", "tags": [disk.tag]}
        | {"serial": disk.serial, "path": f"/dev/{disk.device}"}
        for disk in i.disks
        if disk.tag
    ]
    if version >= "2025-04-04":
        shown += [
            {"type": "share", "bus": "none", "address": "none", "share_id": id, "tag": tag} for id, tag in i.shares
        ]
    return shown


def user_data(i: Identity) -> bytes | None:
    """As it was before it became base64; None: there is none."""
    if i.user_data is None:
        return None
    try:
        return base64.b64decode(i.user_data)
    except (binascii.Error, ValueError):
        return None


def contents(i: Identity) -> dict[str, Document]:
    """Injected files by their number."""
    return {
        f"{n:04d}": Document(base64.b64decode(data), "application/octet-stream") for n, (_, data) in enumerate(i.files)
    }


def network_data(nics: Iterable[Nic]) -> dict[str, Any]:
    """Links, the networks on them and the name servers. One IPv4 and one IPv6 network a link, of its first addresses."""
    links: list[dict[str, Any]] = []
    networks: list[dict[str, Any]] = []
    services: list[dict[str, str]] = []
    for nic in nics:
        firsts = [ip for v in (4, 6) if (ip := next((a for a in nic.ips if a.version == v), None))]
        if not firsts:
            continue
        link = nic.device or f"interface{len(links)}"
        links.append(
            {
                "id": link,
                "vif_id": nic.port_id,
                "type": nic.vif_type if nic.vif_type in EXPOSED_VIF_TYPES else "phy",
                "mtu": None if any(ip.dhcp for ip in nic.ips) else nic.mtu,
                "ethernet_mac_address": nic.mac,
            }
        )
        for ip in firsts:
            networks.append(_network(nic, ip, link, len(networks)))
            services += [s for s in _name_servers(ip) if s not in services]
    return {"links": links, "networks": networks, "services": services} if links else {}


def _network(nic: Nic, ip: FixedIp, link: str, n: int) -> dict[str, Any]:
    how = f"_{ip.mode}" if ip.mode else "_dhcp" if ip.dhcp else ""
    shown: dict[str, Any] = {
        "id": f"network{n}",
        "type": f"ipv{ip.version}{how}",
        "link": link,
        "network_id": nic.network_id,
    }
    if how:
        return shown
    routes = [("0.0.0.0/0" if ip.version == 4 else "::/0", ip.gateway)] if ip.gateway else []
    return shown | {
        "ip_address": ip.address,
        "netmask": str(ipaddress.ip_network((ip.address, ip.prefix), strict=False).netmask),
        "routes": [_route(to, via) for to, via in [*routes, *ip.routes]],
        "services": _name_servers(ip),
    }


def _route(to: str, via: str) -> dict[str, str]:
    net = ipaddress.ip_network(to, strict=False)
    return {"network": str(net.network_address), "netmask": str(net.netmask), "gateway": via}


def _name_servers(ip: FixedIp) -> list[dict[str, str]]:
    return [{"type": "dns", "address": a} for a in ip.dns]


# ---- EC2


def ec2(subject: Subject, version: str) -> Tree:
    """One version of the EC2 tree."""
    tree: Tree = {"meta-data": ec2_meta_data(subject, version)}
    if (data := user_data(subject.identity)) is not None:
        tree["user-data"] = Document(data)
    return tree


def ec2_meta_data(subject: Subject, version: str) -> Tree:
    """Names in any order; values are texts, numbers, lists of texts, directories."""
    i = subject.identity
    fixed = [ip for nic in i.nics for ip in nic.ips if ip.version == 4]
    host = hostname(subject)
    tree: Tree = {
        "ami-id": f"ami-{i.image_ec2_id:08x}",
        "instance-id": f"i-{i.ec2_id:08x}",
        "ami-launch-index": i.launch_index,
        "ami-manifest-path": "FIXME",
        "reservation-id": i.reservation_id,
        "security-groups": i.security_groups,
        "hostname": host,
        "local-ipv4": fixed[0].address if fixed else subject.caller,
    }
    if i.keypair is not None:
        tree["public-keys"] = {"0": Key(i.keypair.name, {"openssh-key": i.keypair.public_key})}
    if version >= "2007-01-19":
        floating = [a for ip in fixed for a in ip.floating]
        tree |= {"local-hostname": host, "public-hostname": host, "public-ipv4": floating[0] if floating else ""}
    if version >= "2007-08-29":
        tree["instance-type"] = i.instance_type
    if version >= "2007-12-15":
        tree["block-device-mapping"] = _block_devices(i.disks)
        tree |= {"kernel-id": f"aki-{i.kernel_ec2_id:08x}"} if i.kernel_ec2_id else {}
        tree |= {"ramdisk-id": f"ari-{i.ramdisk_ec2_id:08x}"} if i.ramdisk_ec2_id else {}
    if version >= "2008-02-01":
        tree["placement"] = {"availability-zone": i.availability_zone}
    if version >= "2008-09-01":
        tree["instance-action"] = "none"
    return tree


class Key(NamedTuple):
    """A public key is a directory whose name is told in its parent's listing: `0=name`."""

    name: str
    tree: Tree


def plain(tree: Tree) -> Tree:
    """As JSON has it, on a config drive: keys are mere directories."""
    return {
        name: plain(inner) if isinstance(inner := value.tree if isinstance(value, Key) else value, dict) else inner
        for name, value in tree.items()
    }


def _block_devices(disks: list[Disk]) -> Tree:
    if not disks:
        return {}
    root = min(disks, key=lambda d: 0 if d.boot_index == 0 else 1)
    shown: Tree = {"ami": root.device, "root": f"/dev/{root.device}"}
    others = [d for d in disks if d is not root and d.kind == "disk"]
    blank = [d for d in others if isinstance(d.source, BlankSource)]
    swap = [d for d in blank if isinstance(d.source, BlankSource) and d.source.format == "swap"]
    shown |= {f"ephemeral{n}": f"/dev/{d.device}" for n, d in enumerate(d for d in blank if d not in swap)}
    shown |= {"swap": f"/dev/{swap[0].device}"} if swap else {}
    volumes = [d for d in others if isinstance(d.source, VolumeSource)]
    return shown | {f"ebs{n}": f"/dev/{d.device}" for n, d in enumerate(volumes)}


# ---- walking


def _walk(tree: Any, parts: list[str]) -> Document | None:
    for part in parts:
        tree = tree.tree if isinstance(tree, Key) else tree
        tree = tree.get(part) if isinstance(tree, dict) else None
    if tree is None or isinstance(tree, Document):
        return tree
    tree = tree.tree if isinstance(tree, Key) else tree
    if isinstance(tree, dict):
        return _lines(_entry(name, tree[name]) for name in sorted(tree))
    return _lines(tree) if isinstance(tree, list) else Document(str(tree).encode())


def _entry(name: str, value: Any) -> str:
    if isinstance(value, Key):
        return f"{name}={value.name}"
    return f"{name}/" if isinstance(value, dict) else name


def _version(said: str, known: tuple[str, ...]) -> str | None:
    return known[-1] if said == LATEST else said if said in known else None


def _known(subject: Subject) -> tuple[str, ...]:
    return tuple(v for v in OPENSTACK if v <= subject.today) or OPENSTACK[:1]


def _nics(subject: Subject) -> list[Nic]:
    return subject.identity.nics if subject.nics is None else subject.nics()


def _lines(names: Iterable[str]) -> Document:
    return Document("\n".join(names).encode())


def _json(value: Any) -> Document:
    return Document(msgspec.json.encode(value), JSON)
