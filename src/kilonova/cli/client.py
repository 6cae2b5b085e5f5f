"""A few lines of HTTP towards a cloud's public APIs, for the demo and the command line. Nothing that openstacksdk is."""

import http.client
import re
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from kilonova.kit.errors import Forbidden, NotFound, Refused, Trouble, Unavailable, Unknown
from kilonova.kit.tls import trusting

TROUBLES: dict[int, type[Trouble]] = {401: Unknown, 403: Forbidden, 404: NotFound, 503: Unavailable}


class Client:
    """`url` is a cloud's one address. Speaks as `user` in `project`, at the newest microversion."""

    def __init__(
        self,
        url: str,
        password: str,
        *,
        user: str = "admin",
        project: str = "admin",
        timeout_s: float = 60,
        ca_file: Path | None = None,
    ) -> None:
        self.url, self.timeout_s, self.ca_file = url, timeout_s, ca_file
        self.user, self.password, self.project = user, password, project
        self.token = self.project_id = ""

    def login(self) -> None:
        """Raises Unknown."""
        domain = {"id": "default"}
        who = {"user": {"name": self.user, "domain": domain, "password": self.password}}
        scope = {"project": {"name": self.project, "domain": domain}}
        wish = {"auth": {"identity": {"methods": ["password"], "password": who}, "scope": scope}}
        body, headers = self._send("POST", "/identity/v3/auth/tokens", msgspec.json.encode(wish), {})
        self.token, self.project_id = headers["x-subject-token"], body["token"]["project"]["id"]

    def get(self, path: str) -> Any:
        return self._send("GET", path, None, {})[0]

    def post(self, path: str, body: Any) -> Any:
        return self._send("POST", path, msgspec.json.encode(body), {})[0]

    def put(self, path: str, body: Any) -> Any:
        return self._send("PUT", path, msgspec.json.encode(body), {})[0]

    def delete(self, path: str) -> None:
        self._send("DELETE", path, None, {})

    def started(self, path: str, body: Any) -> tuple[Any, str]:
        """As `post`; with the request's id, which is the name of the instance action."""
        answer, headers = self._send("POST", path, msgspec.json.encode(body), {})
        return answer, headers.get("x-compute-request-id", "")

    def upload(self, path: str, chunks: Iterable[bytes], length: int) -> None:
        """PUT bytes, streamed."""
        self._send("PUT", path, chunks, {"Content-Type": "application/octet-stream", "Content-Length": str(length)})

    def _send(self, method: str, path: str, body: Any, more: dict[str, str]) -> tuple[Any, dict[str, str]]:
        headers = {"Content-Type": "application/json", "OpenStack-API-Version": "compute latest"} | more
        if self.token:
            headers["X-Auth-Token"] = self.token
        line = line_to(self.url, self.timeout_s, self.ca_file)
        try:
            line.request(method, path, body, headers)
            answer = line.getresponse()
            raw = answer.read()
        except OSError as e:
            raise Unavailable(f"Nobody answers at {line.host}:{line.port}: {e}") from None
        finally:
            line.close()
        found = {k.lower(): v for k, v in answer.getheaders()}
        value = msgspec.json.decode(raw) if raw and "json" in found.get("content-type", "") else raw
        if answer.status >= 400:
            raise TROUBLES.get(answer.status, Refused)(f"{method} {path}: {answer.status} {_said(value)}")
        return value, found


def line_to(url: str, timeout_s: float, ca_file: Path | None = None) -> http.client.HTTPConnection:
    """A connection to a cloud's address; with https, to whom `ca_file`, or else this machine, trusts."""
    at = urllib.parse.urlsplit(url)
    name = at.hostname or "127.0.0.1"
    if at.scheme == "https":
        return http.client.HTTPSConnection(name, at.port or 443, timeout=timeout_s, context=trusting(ca_file))
    return http.client.HTTPConnection(name, at.port or 80, timeout=timeout_s)


def _said(body: Any) -> str:
    if isinstance(body, dict) and body:
        inner = next(iter(body.values()))
        return str(inner.get("message", inner)) if isinstance(inner, dict) else str(inner)
    text = bytes(body).decode(errors="replace") if isinstance(body, bytes) else str(body)
    return " ".join(re.sub(r"<title>.*?</title>|<[^>]*>", " ", text).split())[:300]  # some errors are pages
