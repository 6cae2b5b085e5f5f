"""Bare metal nodes: this cloud has no service for them, and who wants to change one was always sent there."""

from collections.abc import Callable
from typing import Any

from kilonova.api.registry import R
from kilonova.kit.errors import Invalid, Unsupported
from kilonova.kit.routes import Call

PATH, UNTIL = "/v2.1/os-baremetal-nodes", "2.1-2.35"


@R.get(PATH, versions=UNTIL, policy="os_compute_api:os-baremetal-nodes:list")
def index(call: Call) -> None:
    raise Unsupported("The requested functionality is not supported.")


@R.get(PATH + "/{id}", versions=UNTIL, policy="os_compute_api:os-baremetal-nodes:show")
def show(call: Call, id: str) -> None:
    raise Unsupported("The requested functionality is not supported.")


# Method, path, action, and the command of the bare metal service's own client.
CHANGES = (
    ("POST", PATH, None, "node-create"),
    ("DELETE", PATH + "/{id}", None, "node-delete"),
    ("POST", PATH + "/{id}/action", "add_interface", "port-create"),
    ("POST", PATH + "/{id}/action", "remove_interface", "port-delete"),
)


def _sent_there(command: str) -> Callable[..., None]:
    def do(call: Call, **_: str) -> None:
        raise Invalid(f"Command Not supported. Please use Ironic command {command} to perform this action.")

    return do


for _method, _path, _action, _command in CHANGES:
    _body: Any = Any if _method == "POST" else None
    R.add(_method, _path, action=_action, versions=UNTIL, body=_body)(_sent_there(_command))
