"""Rebuild: the server keeps its id, host, ports and volumes; its disks come anew from an image, the same or another."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, field

from kilonova.api import boot_image, views
from kilonova.api.allowance import allowance_of, at_most
from kilonova.api.bodies import Base64, Boolish, DiskConfig, Metadata, Name, Text255, Uuid, address, dashed, decoded
from kilonova.api.create import File, OneName, ShortName, check_files, hostname_of, keypair_of
from kilonova.api.refusals import without_tpm
from kilonova.api.registry import R, World, cause, link, owner, the_server, unlocked
from kilonova.api.servers import about
from kilonova.api.topology import same_topology
from kilonova.contracts.jobs import Rebuild
from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid
from kilonova.kit.routes import Call, Reply
from kilonova.kit.versions import UNSET, UnsetType, since, until, was
from kilonova.kit.workflow import start
from kilonova.model.server import Server
from kilonova.model.states import VERBS
from kilonova.store import servers, shares

Certificates = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=50)]
KeyName = Annotated[str, Meta(min_length=1, max_length=255)]


class Wish(msgspec.Struct, forbid_unknown_fields=True):
    """What is not said stays as it is; null, where it may be said, takes it away."""

    image_ref: Uuid = field(name="imageRef")
    name: Name | UnsetType = UNSET
    admin_password: str | UnsetType = field(default=UNSET, name="adminPass")
    metadata: Metadata | UnsetType = UNSET
    preserve_ephemeral: Boolish = False  # bare metal alone could
    disk_config: DiskConfig | UnsetType = field(default=UNSET, name="OS-DCF:diskConfig")
    access_v4: str | UnsetType = field(default=UNSET, name="accessIPv4")
    access_v6: str | UnsetType = field(default=UNSET, name="accessIPv6")
    personality: Annotated[list[File], until("2.56")] = []
    description: Annotated[Text255 | None | UnsetType, since("2.19")] = UNSET
    key_name: Annotated[KeyName | None | UnsetType, since("2.54")] = UNSET
    user_data: Annotated[Base64 | None | UnsetType, since("2.57")] = UNSET
    certificates: Annotated[Certificates | None | UnsetType, since("2.63")] = field(
        default=UNSET, name="trusted_image_certificates"
    )
    hostname: Annotated[OneName | UnsetType, was(ShortName | UnsetType, until="2.93"), since("2.90")] = UNSET


class Rebuilt(views.ServerView, kw_only=True):
    """A server as its rebuild is answered."""

    admin_password: str | UnsetType = field(default=UNSET, name="adminPass")
    plain_user_data: Annotated[str | None, since("2.57")] = field(default=None, name="user_data")


class Body(msgspec.Struct):
    server: Rebuilt


@R.post("/v2.1/servers/{id}/action", action="rebuild", ok=202, body=Wish,
        policy="os_compute_api:servers:rebuild", late=True)  # fmt: skip
def rebuild(call: Call, id: str) -> Reply:
    world: World = call.world
    wish: Wish = call.body
    facts = _facts(call, wish, id)
    with world.db.read() as tx:
        before = the_server(call, tx, id)
        shares.unshared(tx, before, VERBS["rebuild"], refusal=Invalid)
        if not isinstance(wish.key_name, UnsetType):
            keypair = keypair_of(call, tx, wish.key_name)
            facts |= {"keypair": keypair, "key_name": keypair.name if keypair else None}
    without_tpm(before, "rebuild")
    unlocked(call, before)
    servers.check(before, VERBS["rebuild"])
    _may(call, before, wish)
    image = boot_image.image_of(boot_image.shown(call, wish.image_ref))
    boot_image.fits(call, before.flavor, image, volume_backed=before.volume_backed)
    same_topology(before.flavor, before.image, image)
    other = image.id != before.image.id and not before.volume_backed
    if not before.volume_backed:
        facts |= {"image": image, "image_id": image.id}
    generated = world.ids.password(world.config.api.password_length)
    password = generated if isinstance(wish.admin_password, UnsetType) else wish.admin_password

    def record(tx: Tx) -> tuple[Server, views.Shown, str]:
        now = world.clock.now()
        taken = servers.begin(tx, id, VERBS["rebuild"], now)
        shares.unshared(tx, taken, VERBS["rebuild"], refusal=Invalid)  # somebody may have given it one meanwhile
        servers.change(tx, id, now, **facts)
        server = servers.get(tx, id)
        job = Rebuild(
            server=server,
            before=taken.image if other else None,
            image_id=image.id,
            admin_password=password,
            files=[(f.path, f.contents) for f in wish.personality],
            reimage=server.volume_backed and call.version >= 93,
        )
        run = start(tx, "rebuild", job, id=world.ids.uuid(), subject=id, now=now, cause=cause(call, "rebuild"))
        return server, about(call, tx, [server])[id], run

    server, more, run = world.db.run(record)
    world.wake(run)
    shown = views.server(call, server, more, whole=call.version >= 75)
    answer = Rebuilt(**{f: getattr(shown, f) for f in views.ServerView.__struct_fields__})
    answer.user_data, answer.plain_user_data = UNSET, server.user_data
    if call.version >= 54:
        answer.key_name = server.keypair.name if server.keypair else None
    if world.config.api.enable_instance_password:
        answer.admin_password = password
    return Reply(Body(answer), headers={"Location": link(call, "servers", id)})


def _facts(call: Call, wish: Wish, id: str) -> dict[str, Any]:
    """Columns of the row as they shall be, as far as the body alone tells. Raises Invalid, OverQuota."""
    check_files(call, wish.personality)
    plain = {"name": wish.name, "description": wish.description, "disk_config": wish.disk_config,
             "metadata": wish.metadata, "user_data": wish.user_data, "trusted_certs": wish.certificates}  # fmt: skip
    facts: dict[str, Any] = {name: value for name, value in plain.items() if value is not UNSET}
    if not isinstance(wish.metadata, UnsetType):
        sentence = f"Maximum number of metadata items exceeds {call.world.config.quota.metadata_items}"
        at_most(allowance_of(call, id), "metadata_items", len(wish.metadata), sentence)
    if isinstance(wish.user_data, str):
        decoded(wish.user_data, "user_data")
    if isinstance(wish.certificates, list) and len(set(wish.certificates)) < len(wish.certificates):
        raise Invalid("Invalid input for field/attribute trusted_image_certificates. It has non-unique elements.")
    for name, version, said in (("access_ip_v4", 4, wish.access_v4), ("access_ip_v6", 6, wish.access_v6)):
        if not isinstance(said, UnsetType):
            facts[name] = address(said, version, f"accessIPv{version}")
    if not isinstance(wish.hostname, UnsetType):
        facts["hostname"] = hostname_of(wish.hostname, id)
    return facts


def _may(call: Call, server: Server, wish: Wish) -> None:
    """What depends on what the server is. Raises Forbidden, Invalid."""
    if not isinstance(wish.certificates, UnsetType):
        call.check(owner(server), "os_compute_api:servers:rebuild:trusted_certs")
        if server.volume_backed:
            raise Invalid("Image certificate validation is not supported for volume-backed instances.")
    if server.volume_backed and call.version < 93 and dashed(wish.image_ref) != _image_of_root(call, server):
        raise Invalid("Unable to rebuild with a different image for a volume-backed server.")


def _image_of_root(call: Call, server: Server) -> str:
    """The image that its root volume was made of; "": of none."""
    root = next((d.volume_id for d in server.devices if d.boot_index == 0 and d.is_volume), None)
    if root is None:
        return ""
    told: dict[str, str] = call.world.neighbours.volume.show(root).image_metadata
    return told.get("image_id", "")
