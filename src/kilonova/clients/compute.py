"""The compute service (Compute API v2.1), as its neighbours tell it what has become of a server's things."""

from collections.abc import Iterable

import msgspec

from kilonova.clients.session import Session

EVENTS = {"OpenStack-API-Version": "compute 2.51"}  # the oldest that knows of volumes that grow


class Compute:
    """Told in our own name: events are services' business."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def extended(self, volume_id: str, server_ids: Iterable[str]) -> list[int]:
        """A volume of these servers is larger now. What became of each event, as an HTTP status.

        A server that is gone or has no host is no trouble: it will see the new size when it starts.
        """
        events = [{"name": "volume-extended", "server_uuid": s, "tag": volume_id} for s in server_ids]
        path, body = "/v2.1/os-server-external-events", {"events": events}
        return [e.code for e in self.session.json("POST", path, _Told, body=body, headers=EVENTS).events]


class _Code(msgspec.Struct):
    code: int = 200


class _Told(msgspec.Struct):
    events: list[_Code] = []
