"""What the operator tells every guest: a file of his, and services of his that are asked about each server."""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from kilonova.kit.errors import Unavailable
from kilonova.model.machine import Identity
from kilonova.model.options import Metadata

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 20  # of one service's answer
AGENT = "openstack-nova-vendordata"  # what such services know their callers by


class Vendor:
    """`token`: gives one of our own account, where services shall be told who asks."""

    def __init__(self, options: Metadata, *, token: Callable[[], str] | None = None) -> None:
        self.options, self.token = options, token if options.vendordata_token else None
        self.lock, self.read, self.told = threading.Lock(), (0, 0), msgspec.Raw(b"{}")
        self.http: Any = None

    def static(self) -> Any:
        """The file's JSON; {} where there is no file, or none that can be read."""
        path = self.options.vendordata_file
        return {} if path is None else self._file(path)

    def _file(self, path: Path) -> Any:
        """Read again when it has changed."""
        try:
            seen = path.stat()
            with self.lock:
                if self.read != (seen.st_mtime_ns, seen.st_size):
                    self.told = msgspec.Raw(msgspec.json.encode(msgspec.json.decode(path.read_bytes())))
                    self.read = (seen.st_mtime_ns, seen.st_size)
                return self.told
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as e:
            log.warning("the vendor data file cannot be used: %s", e)
            return {}

    def dynamic(self, i: Identity, hostname: str) -> dict[str, Any]:
        """Name → what that service says; {} of one that fails, or Unavailable where that is to be an error."""
        return {
            name: self._ask(name, url, question(i, hostname)) for name, url in self.options.vendordata_targets.items()
        }

    def _ask(self, name: str, url: str, body: Mapping[str, Any]) -> Any:
        try:
            return self._post(url, msgspec.json.encode(body))
        except Exception as e:  # whatever a stranger's service, or the way to it, may do
            log.warning("vendor data service %s failed: %s", name, type(e).__name__, exc_info=log.isEnabledFor(10))
            if self.options.vendordata_failure_fatal:
                raise Unavailable("Vendor data is not available.", why=f"service {name}: {e}") from None
            return {}

    def _post(self, url: str, body: bytes) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.token is not None:
            headers["X-Auth-Token"] = self.token()
        answer = self._session().request(
            url, "POST", headers=headers, data=body, authenticated=False, stream=True, log=False, redirect=False
        )
        try:
            read = answer.raw.read(MOST_BYTES + 1, decode_content=True)
        finally:
            answer.close()
        if len(read) > MOST_BYTES:
            raise ValueError("too long an answer")
        if answer.status_code >= 300:
            raise ValueError(f"answered {answer.status_code}")
        return msgspec.json.decode(read) if read.strip() else {}

    def _session(self) -> Any:
        with self.lock:
            if self.http is None:
                from keystoneauth1 import session  # late: only who has such services pays for it

                ca = self.options.vendordata_ca_file
                self.http = session.Session(
                    verify=str(ca) if ca else True, timeout=self.options.vendordata_timeout_s, user_agent=AGENT
                )
            return self.http


def question(i: Identity, hostname: str) -> dict[str, Any]:
    """What such a service is told of the server it is asked about."""
    return {
        "project-id": i.project_id,
        "instance-id": i.uuid,
        "image-id": i.image_id,
        "user-data": i.user_data,
        "hostname": hostname,
        "metadata": i.meta,
        "boot-roles": i.boot_roles,
    }
