"""Consoles: an address with a token in it that opens one server's screen or serial line, for a while."""

from typing import Annotated, Any, Literal

import msgspec

from kilonova.api.registry import R, World, the_server
from kilonova.contracts.compute import FindConsole
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound, Unsupported
from kilonova.kit.routes import Call
from kilonova.kit.versions import was
from kilonova.model.console import TYPES, Where
from kilonova.model.server import Server
from kilonova.model.states import Task
from kilonova.store import consoles, servers

RULE = "os_compute_api:os-remote-consoles"
ACTION = "/v2.1/servers/{id}/action"
Protocol7 = Literal["rdp", "serial", "spice", "vnc"]
Type7 = Literal["novnc", "rdp-html5", "serial", "spice-html5", "xvpvnc"]
Type98 = Type7 | Literal["webmks"]


class Wish(msgspec.Struct, forbid_unknown_fields=True):
    protocol: Annotated[Protocol7 | Literal["mks"], was(Protocol7, until="2.7")]
    type: Annotated[Type98 | Literal["spice-direct"], was(Type7, until="2.7"), was(Type98, until="2.98")]


class Body(msgspec.Struct, forbid_unknown_fields=True):
    remote_console: Wish


@R.post("/v2.1/servers/{server_id}/remote-consoles", versions="2.6-", body=Body, policy=RULE, late=True)
def create(call: Call, server_id: str) -> dict[str, Any]:
    wish: Wish = call.body.remote_console
    if TYPES[wish.type][0] != wish.protocol:
        raise Invalid(f"Invalid console type {wish.type}")
    url = _opened(call, server_id, wish.type)
    return {"remote_console": {"protocol": wish.protocol, "type": wish.type, "url": url}}


# ---- until 2.5: an action for each kind


class Vnc(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["novnc", "xvpvnc"]


class Spice(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["spice-html5"]


class Serial(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["serial"]


def old(call: Call, id: str) -> dict[str, Any]:
    return {"console": {"type": call.body.type, "url": _opened(call, id, call.body.type)}}


for _action, _body in (("os-getVNCConsole", Vnc), ("os-getSPICEConsole", Spice), ("os-getSerialConsole", Serial)):
    R.post(ACTION, action=_action, versions="2.1-2.5", body=_body, policy=RULE, late=True)(old)


@R.post(ACTION, action="os-getRDPConsole", versions="2.1-2.5", body=Any)
def rdp(call: Call, id: str) -> None:
    raise Invalid("Unavailable console type rdp-html5.")


# ---- what a token is good for


@R.get("/v2.1/os-console-auth-tokens/{id}", strict="2.99", policy="os_compute_api:os-console-auth-tokens")
def token(call: Call, id: str) -> dict[str, Any]:
    """For proxies of other clouds' making. A console that is a socket file of its host has the port 0."""
    if call.version < 31:
        raise Invalid("Unable to retrieve the connection information of other consoles than rdp-html5.")
    with call.world.db.read() as tx:
        found = consoles.granted(tx, id, call.world.clock.now())
    if found.type == "spice-direct" and call.version < 99:
        raise Invalid("Tokens of spice-direct consoles are shown from 2.99 on.")
    shown: dict[str, Any] = {
        "instance_uuid": found.server,
        "host": found.at.host or found.host,
        "port": found.at.port,
        "internal_access_path": None,
    }
    return {"console": shown | {"tls_port": found.at.tls_port} if call.version >= 99 else shown}


def _opened(call: Call, id: str, type: str) -> str:
    """Ask the host where it is, and give a token for it. Raises Invalid where there is no such console."""
    world: World = call.world
    with world.db.read() as tx:
        server = the_server(call, tx, id)
    _ready(server)
    kind = TYPES[type][1]
    if kind is None or type not in world.config.console.types:
        raise Invalid(f"Unavailable console type {type}.")
    assert server.host is not None
    try:
        at: Where = world.ask(server.host, FindConsole(server=id, kind=kind), 15.0)
    except Unsupported:
        raise Invalid(f"Unavailable console type {type}.") from None
    except NotFound:
        raise Conflict(f"Instance {id} is not ready") from None
    key = world.ids.uuid()

    def record(tx: Tx) -> None:
        now = world.clock.now()
        if (there := servers.get(tx, id)).host != server.host or there.deleted_at is not None:
            raise Conflict(f"Instance {id} is not ready")  # it left while its host was asked
        consoles.grant(tx, key, there, type, at, now=now, lasts_s=world.config.console.token_lifetime_s)

    world.db.run(record)
    return address(call, type, key)


def _ready(server: Server) -> None:
    if server.task_state in (Task.deleting, Task.migrating):
        raise Conflict(f"Cannot 'get_console' instance {server.id} while it is in task_state {server.task_state}")
    if not server.host:
        raise Conflict(f"Instance {server.id} is not ready")


def address(call: Call, type: str, token: str) -> str:
    """As clients of each kind expect it: noVNC takes the websocket's path, with the token, from its own query."""
    said, proxy = call.world.config.console, call.world.console_url
    if type == "novnc":
        return f"{said.vnc_base_url or proxy + '/vnc_auto.html'}?path=%3Ftoken%3D{token}"
    if type == "serial":
        return f"{said.serial_base_url or 'ws' + proxy.removeprefix('http') + '/'}?token={token}"
    return f"{said.spice_base_url or proxy + '/spice_auto.html'}?token={token}"
