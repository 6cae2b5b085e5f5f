"""What a server wants of its host: made once of flavor, image and request, and asked of every host."""

from math import ceil

import msgspec

from kilonova.model.flavor import Flavor
from kilonova.model.server import Server
from kilonova.model.server_group import Company

VCPU, MEMORY_MB, DISK_GB = "VCPU", "MEMORY_MB", "DISK_GB"


class Ask(msgspec.Struct, frozen=True):
    """The whole question. `amounts` are by resource class (Placement API); traits as os-traits names them.

    `host`, `node`: there or nowhere; `forced`: and no rule but that of room is asked.  `avoid` are hosts that
    refused already.  `extra_specs` are the flavor's, for aggregates and capabilities.  `company` is what is known of the
    server group `group_id` when the question is put.
    """

    amounts: dict[str, int]
    required: list[str] = []
    forbidden: list[str] = []
    zone: str | None = None
    host: str | None = None
    node: str | None = None
    forced: bool = False
    avoid: list[str] = []
    project_id: str = ""
    flavor: str = ""
    extra_specs: dict[str, str] = {}
    properties: dict[str, str] = {}  # the image's
    image_id: str = ""
    group_id: str | None = None
    in_place: bool = False  # it is there already: may it run this image?
    company: Company | None = None


def amounts(flavor: Flavor, *, volume_backed: bool = False) -> dict[str, int]:
    """What a server of this flavor takes: scheduler.md section 5. `resources:CLASS=n` overrides, 0 takes a class out."""
    disk_gb = (0 if volume_backed else flavor.disk_gb) + flavor.ephemeral_gb + ceil(flavor.swap_mb / 1024)
    wanted = {VCPU: flavor.vcpus, MEMORY_MB: flavor.memory_mb, DISK_GB: disk_gb}
    for name, text in flavor.extra_specs.items():
        if name.startswith("resources:") and text.isdecimal():
            wanted[name.removeprefix("resources:")] = int(text)
    return {c: n for c, n in wanted.items() if n > 0}


def amounts_of(server: Server) -> dict[str, int]:
    """What this server takes of its host."""
    return amounts(server.flavor, volume_backed=server.volume_backed)


def ask(server: Server, *, host: str | None = None, node: str | None = None, forced: bool = False) -> Ask:
    """What this server wants, wherever it goes; `host`, `node` where the caller named one."""
    return Ask(
        amounts=amounts_of(server),
        required=sorted(_traits(server, "required")),
        forbidden=sorted(_traits(server, "forbidden")),
        zone=server.availability_zone,
        host=host,
        node=node,
        forced=forced,
        project_id=server.project_id,
        flavor=server.flavor.name,
        extra_specs=server.flavor.extra_specs,
        properties=server.image.properties,
        image_id=server.image.id,
        group_id=server.group_id,
    )


def _traits(server: Server, how: str) -> set[str]:
    """`trait:NAME=required` of flavor and image (an image can only require)."""
    told = dict(server.flavor.extra_specs)
    if how == "required":
        told |= {k: v for k, v in server.image.properties.items() if k.startswith("trait:")}
    return {k.removeprefix("trait:") for k, v in told.items() if k.startswith("trait:") and v == how}
