"""What a server wants of its host: made once of flavor, image and request, and asked of every host."""

from typing import Any

import msgspec

from kilonova.model import wants
from kilonova.model.candidates import Group, Query
from kilonova.model.server import Server
from kilonova.model.server_group import Company
from kilonova.model.wants import Part, amounts


class Ask(msgspec.Struct, frozen=True):
    """The whole question. `amounts` are by resource class (Placement API); traits as os-traits names them.

    `host`, `node`: there or nowhere; `forced`: and no rule but that of room is asked.  `avoid` are hosts that
    refused already.  `extra_specs` are the flavor's, for aggregates and capabilities.  `company` is what is known of the
    server group `group_id` when the question is put, `near` and `far` of the servers in the hints.
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
    image_format: str = ""  # "" for a server that boots from a volume
    vcpus: int = 0
    memory_mb: int = 0
    hints: dict[str, Any] = {}
    near: list[str] | None = None  # hosts of servers that it shall be with; None: of none
    far: list[str] = []  # hosts of servers that it shall not be with
    group_id: str | None = None
    in_place: bool = False  # it is there already: may it run this image?
    parts: list[Part] = []  # what one provider each must serve; counted in `amounts` too
    isolate: bool = False  # … each another one
    nearness: str = ""  # of devices to the guest's cells: a policy of `model.seat.near`
    member_of: list[list[str]] = []  # of each list, in one of these aggregates (Placement API)
    company: Company | None = None
    among: list[str] | None = None  # providers; of these only, says another Placement service


def amounts_of(server: Server) -> dict[str, int]:
    """What this server takes of its host."""
    return amounts(server.flavor, server.image.properties, volume_backed=server.volume_backed)


def ask(server: Server, *, host: str | None = None, node: str | None = None, forced: bool = False) -> Ask:
    """What this server wants, wherever it goes; `host`, `node` where the caller named one."""
    specs, properties = server.flavor.extra_specs, server.image.properties
    return Ask(
        amounts=amounts_of(server),
        required=sorted(wants.required(specs, properties)),
        forbidden=sorted(wants.forbidden(specs, properties)),
        zone=server.availability_zone,
        host=host,
        node=node,
        forced=forced,
        parts=wants.parts(server.flavor),
        isolate=wants.isolated(specs),
        nearness=wants.numa_policy(server.flavor, properties),
        project_id=server.project_id,
        flavor=server.flavor.name,
        extra_specs=specs,
        properties=properties,
        image_id=server.image.id,
        vcpus=server.flavor.vcpus,
        memory_mb=server.flavor.memory_mb,
        image_format="" if server.volume_backed else server.image.disk_format,
        hints={k: v for k, raw in server.scheduler_hints.items() if _can_travel(v := msgspec.json.decode(raw))},
        group_id=server.group_id,
    )


def served(ask: Ask) -> Query:
    """The question which providers of one host serve it. What has no suffix may be served by several together."""
    left = dict(ask.amounts)
    for part in ask.parts:
        for name, n in part.amounts.items():
            left[name] -= n
    required = tuple(frozenset({t}) for t in ask.required)
    groups = {"": Group({c: n for c, n in left.items() if n > 0}, required, frozenset(ask.forbidden))}
    for part in ask.parts:
        must = tuple(frozenset({t}) for t in part.required)
        groups[part.suffix] = Group(part.amounts, must, frozenset(part.forbidden))
    if not groups[""].resources:
        del groups[""]
    return Query(groups, isolate=ask.isolate)


def _can_travel(hint: Any) -> bool:
    """Numbers beyond 64 bits cannot be sent, and no rule asks for them."""
    try:
        msgspec.msgpack.encode(hint)
    except OverflowError:
        return False
    return True


__all__ = ["Ask", "Part", "amounts", "amounts_of", "ask", "served"]
