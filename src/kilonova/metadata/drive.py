"""The config drive: the same tree on a disk, for guests that come up without a network.

It is frozen when it is made: no password file, since nobody could write it, and the admin password, which the
service does not know.
"""

import functools
import io
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from kilonova.kit.clock import Clock, Ids, iso
from kilonova.metadata import documents
from kilonova.metadata.documents import LATEST, OPENSTACK, Subject
from kilonova.metadata.vendor import Vendor
from kilonova.metadata.vfat import vfat
from kilonova.model.machine import Machine
from kilonova.model.options import Metadata

LABEL = "config-2"
Format = Literal["iso9660", "vfat"]


def config_drive(
    machine: Machine,
    *,
    clock: Clock,
    ids: Ids,
    options: Metadata,
    format: Format = "iso9660",
    vendor: Vendor | None = None,
) -> bytes:
    """An image with the label `config-2`: ISO 9660 with Rock Ridge and Joliet names (some 200 KiB), or vfat (64 MiB).

    Raises Unavailable where a vendor data service fails and that is to be an error.
    """
    files = tree(machine, clock=clock, ids=ids, options=options, vendor=vendor or Vendor(options))
    return iso9660(files) if format == "iso9660" else vfat(files, LABEL)


def tree(machine: Machine, *, clock: Clock, ids: Ids, options: Metadata, vendor: Vendor) -> dict[str, bytes]:
    """Path → bytes of all that is on the drive."""
    i = machine.identity
    hostname = f"{i.hostname}.{options.dhcp_domain}" if options.dhcp_domain else i.hostname
    subject = Subject(
        identity=i,
        today=(iso(clock.now()) or "")[:10],
        dice=ids.dice.randbytes,
        domain=options.dhcp_domain,
        static=vendor.static,
        dynamic=functools.cache(lambda: vendor.dynamic(i, hostname)),
        extra={"admin_pass": machine.admin_password} if machine.admin_password else {},
    )
    return _openstack(subject) | _ec2(subject, (*options.config_drive_ec2_versions, LATEST))


def _openstack(subject: Subject) -> dict[str, bytes]:
    files = {f"openstack/content/{n}": d.content for n, d in documents.contents(subject.identity).items()}
    for version in (*OPENSTACK, LATEST):
        of = OPENSTACK[-1] if version == LATEST else version
        for name, file in documents.openstack(subject, of).items():
            if name == "password" or (name == "network_data.json" and of < "2015-10-15"):
                continue
            files[f"openstack/{version}/{name}"] = (file() if callable(file) else file).content
    return files


def _ec2(subject: Subject, versions: tuple[str, ...]) -> dict[str, bytes]:
    files = {}
    for version in versions:
        of = documents.EC2[-1] if version == LATEST else version
        shown = documents.plain(documents.ec2_meta_data(subject, of))
        files[f"ec2/{version}/meta-data.json"] = msgspec.json.encode(shown)
        if (data := documents.user_data(subject.identity)) is not None:
            files[f"ec2/{version}/user-data"] = data
    return files


def iso9660(files: Mapping[str, bytes], label: str = LABEL) -> bytes:
    """An image of these files, by path. Its ISO names are numbers; Rock Ridge and Joliet have the real ones."""
    import pycdlib  # late: a host that makes no drives does not pay for it

    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=label)
    short: dict[str, str] = {"": ""}
    for path in sorted(files):
        parent = ""
        for name in path.split("/")[:-1]:
            here = f"{parent}/{name}" if parent else name
            if here not in short:
                short[here] = f"{short[parent]}/{len(short):08d}"
                iso.add_directory(short[here], rr_name=name, joliet_path=f"/{here}")
            parent = here
        short[path] = f"{short[parent]}/{len(short):08d}"
        content: dict[str, Any] = {"rr_name": path.rpartition("/")[2], "joliet_path": f"/{path}", "file_mode": 0o100444}
        iso.add_fp(io.BytesIO(files[path]), len(files[path]), f"{short[path]}.;1", **content)
    image = io.BytesIO()
    iso.write_fp(image)
    iso.close()
    return image.getvalue()
