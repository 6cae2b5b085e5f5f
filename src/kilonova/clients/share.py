"""The shared file systems service (Manila's API v2), as a service asks it. Our own and a real one alike.

All is asked in the one microversion that knows locks.  Whether a user may have a share at all is asked with his token;
who may reach it, and that nobody deletes it meanwhile, is our affair, in our own name.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from kilonova.clients.carriers import Absent
from kilonova.clients.session import Session, part

VERSION = {"X-OpenStack-Manila-API-Version": "2.82"}
REASON = "Used by servers of the compute service."
OURS = "kilonova"  # in the metadata of a rule: it is ours to take back


class ShareInfo(msgspec.Struct, frozen=True):
    """A share. `status` as the API says it: creating, available, deleting, error, …"""

    id: str
    status: str
    proto: str = msgspec.field(name="share_proto", default="")
    project_id: str | None = ""


class Export(msgspec.Struct, frozen=True):
    """A way to its bytes: 192.0.2.7:/shares/1, or of Ceph 192.0.2.7:6789:/volumes/1."""

    path: str
    preferred: bool = False
    is_admin_only: bool = False


class Rule(msgspec.Struct, frozen=True):
    """Who may reach it. `state` goes queued_to_apply, applying, active; queued_to_deny, denying; error."""

    id: str
    access_type: str
    access_to: str
    state: str = "active"
    access_key: str | None = None
    metadata: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Rule({self.access_type} {self.access_to}, {self.state})"  # without its key

    @property
    def ours(self) -> bool:
        return OURS in self.metadata

    @property
    def going(self) -> bool:
        return self.state.endswith(("deny", "denying"))


class Lock(msgspec.Struct, frozen=True):
    """That a share must not be deleted."""

    id: str
    resource_id: str
    lock_reason: str | None = None


class Shares:
    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def there(self) -> bool:
        """Does this cloud have such a service at all?"""
        return not isinstance(self.session.carrier, Absent)

    def show(self, id: str, token: str | None = None) -> ShareInfo:
        """Raises NotFound."""
        return self.session.json("GET", _of(id), _One, headers=VERSION, token=token).share

    def export(self, id: str) -> str | None:
        """How hosts reach it: the way that its service prefers, else the first."""
        found = self.session.json("GET", f"{_of(id)}/export_locations", _Exports, headers=VERSION).export_locations
        best = sorted((e for e in found if e.path), key=lambda e: (e.is_admin_only, not e.preferred))
        return best[0].path if best else None

    # -- who may reach it

    def rules(self, id: str) -> Sequence[Rule]:
        query = {"share_id": id}
        return self.session.json("GET", "/v2/share-access-rules", _Rules, query=query, headers=VERSION).access_list

    def allow(self, id: str, kind: str, who: str) -> None:
        """Raises Invalid where there is such a rule already. Nobody but us may see it or take it back."""
        said = {"access_type": kind, "access_to": who, "access_level": "rw", "metadata": {OURS: "1"}}
        said |= {"lock_visibility": True, "lock_deletion": True, "lock_reason": REASON}  # type: ignore[dict-item]
        self._act(id, {"allow_access": said})

    def deny(self, id: str, rule: str) -> None:
        """Raises NotFound."""
        self._act(id, {"deny_access": {"access_id": rule, "unrestrict": True}})

    def _act(self, id: str, body: Any) -> None:
        self.session.tell("POST", f"{_of(id)}/action", body=body, headers=VERSION)

    # -- that it stays

    def locks(self, id: str | None = None) -> Sequence[Lock]:
        """Ours, on this share, or on all."""
        query = {"resource_type": "share", "resource_action": "delete", "all_projects": "true"}
        query |= {"resource_id": id} if id else {}
        found = self.session.json("GET", "/v2/resource-locks", _Locks, query=query, headers=VERSION).resource_locks
        return [x for x in found if x.lock_reason == REASON]

    def lock(self, id: str) -> None:
        said = {"resource_id": id, "resource_type": "share", "resource_action": "delete", "lock_reason": REASON}
        self.session.tell("POST", "/v2/resource-locks", body={"resource_lock": said}, headers=VERSION)

    def unlock(self, lock: str) -> None:
        """Raises NotFound."""
        self.session.tell("DELETE", f"/v2/resource-locks/{part(lock)}", headers=VERSION)


def _of(id: str) -> str:
    return f"/v2/shares/{part(id)}"


class _One(msgspec.Struct):
    share: ShareInfo


class _Exports(msgspec.Struct):
    export_locations: list[Export]


class _Rules(msgspec.Struct):
    access_list: list[Rule]


class _Locks(msgspec.Struct):
    resource_locks: list[Lock]
