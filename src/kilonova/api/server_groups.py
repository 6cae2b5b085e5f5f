"""Server groups: what a user wants together or apart. Members come by the scheduler hint `group` of a new server."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kilonova.api.allowance import allowance
from kilonova.api.bodies import Digits, Name
from kilonova.api.notices import told
from kilonova.api.registry import R, World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType, required, since, until, was
from kilonova.model import notices as words
from kilonova.model.server_group import Hard, Policy, ServerGroup
from kilonova.store import server_groups

PLACE = "/v2.1/os-server-groups"
MAX = 2**31 - 1
ONE = Meta(min_length=1, max_length=1)


class Rules(msgspec.Struct, forbid_unknown_fields=True):
    max_server_per_host: Annotated[int, Meta(ge=1, le=MAX)] | Digits | UnsetType = UNSET


class New(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    policies: Annotated[
        Annotated[list[Policy], ONE] | UnsetType,
        was(Annotated[list[Hard], ONE] | UnsetType, until="2.14"),
        until("2.63"),
        required(since="2.1"),
    ] = UNSET
    policy: Annotated[Policy | UnsetType, since("2.64"), required(since="2.64")] = UNSET
    rules: Annotated[Rules | UnsetType, since("2.64")] = UNSET


class Body(msgspec.Struct, forbid_unknown_fields=True):
    server_group: New


class View(msgspec.Struct):
    id: str
    name: str
    members: list[str]
    policies: Annotated[list[str], until("2.63")]
    metadata: Annotated[dict[str, str], until("2.63")]
    project_id: Annotated[str, since("2.13")]
    user_id: Annotated[str, since("2.13")]
    policy: Annotated[str, since("2.64")]
    rules: Annotated[dict[str, int], since("2.64")]


class One(msgspec.Struct):
    server_group: View


class Many(msgspec.Struct):
    server_groups: list[View]


Number = Annotated[str, Meta(min_length=1, max_length=20, pattern=r"^[0-9]*$")]


class Query(msgspec.Struct):
    all_projects: list[str] = []
    limit: list[Number] = []
    offset: list[Number] = []


@R.get(PLACE, query=Query, strict="2.75", policy="os_compute_api:os-server-groups:index", late=True)
def index(call: Call) -> Many:
    call.check()
    project = call.context.project_id
    if call.query.all_projects and call.context.is_admin:
        call.check(rule="os_compute_api:os-server-groups:index:all_projects")
        project = None
    limit, offset = sliced(call, call.query.limit, call.query.offset)
    with call.world.db.read() as tx:
        found = server_groups.page(tx, project, limit=limit, offset=offset)
    return Many([_view(call, g) for g in found])


def sliced(call: Call, limit: list[str], offset: list[str]) -> tuple[int, int]:
    """Of lists without markers (errors.md, section 5): 0 is as much as there may be."""
    most: int = call.world.config.api.max_limit
    return min(int(limit[-1]) if limit else 0, most) or most, min(int(offset[-1]) if offset else 0, MAX)


@R.get(PLACE + "/{id}", policy="os_compute_api:os-server-groups:show", late=True)
def show(call: Call, id: str) -> One:
    with call.world.db.read() as tx:
        return One(_view(call, _the(call, tx, id)))


@R.post(PLACE, body=Body, policy="os_compute_api:os-server-groups:create", late=True)
def create(call: Call) -> One:
    call.check()
    wish, world = call.body.server_group, call.world
    group = ServerGroup(
        id=world.ids.uuid(),
        project_id=call.context.project_id or "",
        user_id=call.context.user_id,
        name=wish.name,
        policy=wish.policy if wish.policy is not UNSET else wish.policies[0],
        max_per_host=_most(wish),
    )

    most = allowance(call)

    def record(tx: Tx) -> None:
        server_groups.create(tx, most, group, world.clock.now())
        told(call, tx, "server_group.create", of=lambda: words.server_group(group))

    world.db.run(record)
    return One(_view(call, group))


def _most(wish: New) -> int | None:
    said = UNSET if isinstance(wish.rules, UnsetType) else wish.rules.max_server_per_host
    if isinstance(said, UnsetType):
        return None
    if not 1 <= (n := int(said)) <= MAX:
        raise Invalid(
            f"Invalid input for field/attribute max_server_per_host. Value: {n}. {n} is not between 1 and {MAX}"
        )
    if wish.policy != "anti-affinity":
        raise Invalid("Only anti-affinity policy supports rules.")
    return n


@R.delete(PLACE + "/{id}", ok=204, policy="os_compute_api:os-server-groups:delete", late=True)
def delete(call: Call, id: str) -> None:
    world: World = call.world

    def record(tx: Tx) -> None:
        group = _the(call, tx, id)
        server_groups.delete(tx, group.id)
        told(call, tx, "server_group.delete", of=lambda: words.server_group(group))

    world.db.run(record)


def _the(call: Call, tx: Tx, id: str) -> ServerGroup:
    """The group a path names, and policy asked about it. Another project's does not exist, but for admins."""
    group = server_groups.get(tx, id)
    if not (call.context.is_admin or group.project_id == call.context.project_id):
        raise NotFound(f"Instance group {id} could not be found.")
    call.check({"project_id": group.project_id, "user_id": group.user_id})
    return group


def _view(call: Call, g: ServerGroup) -> View:
    """The soft policies were no policies before 2.15."""
    known = call.version >= 15 or not g.policy.startswith("soft-")
    return View(
        id=g.id,
        name=g.name,
        members=g.members,
        policies=[g.policy] if known else [],
        metadata={},
        project_id=g.project_id,
        user_id=g.user_id,
        policy=g.policy,
        rules={} if g.max_per_host is None else {"max_server_per_host": g.max_per_host},
    )


def hinted(call: Call, tx: Tx, hint: Any) -> ServerGroup | None:
    """The group that a new server's hint names: one of the caller's project. Raises Invalid where there is none."""
    named = list(dict.fromkeys(hint if isinstance(hint, list) else [] if hint is None else [hint]))
    if not named:
        return None
    if len(named) > 1:
        raise Invalid("A server can be a member of one server group only.")
    try:
        group = server_groups.get(tx, named[0])
    except NotFound as e:
        raise Invalid(e.said) from None
    if group.project_id != call.context.project_id and not call.context.is_admin:
        raise Invalid(f"Instance group {named[0]} could not be found.")
    return group
