"""What a server is told of itself, made of its row: the same for the metadata service and for its config drive."""

from collections.abc import Iterable, Sequence

from kilonova.model import numa
from kilonova.model.machine import Disk, FixedIp, Identity, Nic
from kilonova.model.server import Plug, Server


def identity_of(
    server: Server,
    *,
    zone: str = "",
    nics: Sequence[Nic] | None = None,
    disks: Sequence[Disk] = (),
    files: Iterable[tuple[str, str]] = (),
    shares: Iterable[tuple[str, str]] = (),
) -> Identity:
    """Pure. `zone` is that of the host; `files` are (path, base64) of the request that made it,
    `shares` (id, tag) of those that the machine has.

    Where `nics` are not at hand they are made of the row's plugs: names, addresses and tags, but no subnets.
    """
    image = server.image
    return Identity(
        uuid=server.id,
        name=server.name,
        hostname=server.hostname,
        project_id=server.project_id,
        availability_zone=zone or server.availability_zone or "",
        launch_index=server.launch_index,
        meta=server.metadata,
        keypair=server.keypair,
        user_data=server.user_data,
        reservation_id=server.reservation_id,
        instance_type=server.flavor.name,
        security_groups=list(dict.fromkeys(g for p in server.plugs for g in p.security_groups)),
        ec2_id=server.number,
        image_ec2_id=number_of(image.id),
        kernel_ec2_id=number_of(image.properties.get("kernel_id", "")),
        ramdisk_ec2_id=number_of(image.properties.get("ramdisk_id", "")),
        image_id=image.id,
        boot_roles=server.system_metadata.get("boot_roles", ""),
        files=list(files),
        nics=[nic_of(p) for p in server.plugs] if nics is None else list(nics),
        disks=list(disks),
        shares=list(shares),
        dedicated_cpus=numa.pinned(
            server.flavor.extra_specs, image.properties, server.flavor.vcpus, server.flavor.memory_mb
        ),
    )


def number_of(image_id: str) -> int:
    """The 32 bits an image is known by where EC2 wants a number: the first of its UUID, so nobody has to keep a list."""
    try:
        return int(image_id[:8], 16)
    except ValueError:
        return 0


def nic_of(plug: Plug) -> Nic:
    """A NIC as far as the row knows it. Floating addresses lead to the first fixed IPv4 one."""
    outer = [a.address for a in plug.addresses if a.floating]
    fixed = [a for a in plug.addresses if not a.floating]
    first = next((a for a in fixed if a.version == 4), None)
    return Nic(
        port_id=plug.port_id,
        network_id=plug.network_id,
        mac=plug.mac,
        device=f"tap{plug.port_id[:11]}",
        network_name=plug.label,
        ips=[
            FixedIp(a.address, version=6 if a.version == 6 else 4, floating=outer if a is first else []) for a in fixed
        ],
        tag=plug.tag or "",
    )
