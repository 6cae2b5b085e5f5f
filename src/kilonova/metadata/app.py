"""The metadata service: a guest's proxy says which server asks, signed; the answer is a document of its tree.

A plain WSGI application: there is one resource, one way to be known and no token, so it needs no routes.  What is
known of a server is one query, kept for `metadata.cache_s`.  The network service is asked only for network_data.json,
and the answer is kept while the server's row stays the same; so all else is told while that service is away.
"""

import hashlib
import hmac
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from kilonova.clients import Network, plug
from kilonova.kit import log
from kilonova.kit.clock import Clock, Ids, iso
from kilonova.kit.db import Db
from kilonova.kit.errors import Conflict, NotFound, Trouble, Unavailable
from kilonova.kit.http import Ended, Environ, StartResponse, Wsgi, read_body
from kilonova.metadata import documents
from kilonova.metadata.documents import Document, Subject
from kilonova.metadata.vendor import Vendor
from kilonova.model import options
from kilonova.model.disks import disks
from kilonova.model.identity import identity_of
from kilonova.model.machine import Identity, Nic
from kilonova.model.server import Server
from kilonova.store import guests

logger = logging.getLogger(__name__)

KEPT = 4096  # servers remembered
NICS_S = 300.0  # how long what the network service said is kept, though nothing changed here
READING = ("GET", "HEAD")


def service(
    db: Db,
    network: Network,
    config: options.Config,
    *,
    clock: Clock,
    ids: Ids,
    secret: str,
    vendor: Vendor | None = None,
) -> Wsgi:
    """To be mounted at `/metadata`, and to be called by proxies of this process. `secret` is what they sign with."""
    account = network.session.account
    vendor = vendor or Vendor(config.metadata, token=account.token if account else None)
    return Metadata(db, network, config, clock, ids, secret, vendor)


@dataclass
class Known:
    """A server, as it was when we last looked, and what was gathered for it since."""

    server: Server
    zone: str
    shares: list[tuple[str, str]]
    read_at: float
    nics: list[Nic] | None = None
    nics_at: float = 0.0
    dynamic: dict[str, Any] | None = None
    dynamic_at: float = 0.0


class Metadata:
    """The application; safe to be called from any thread."""

    def __init__(
        self, db: Db, network: Network, config: options.Config, clock: Clock, ids: Ids, secret: str, vendor: Vendor
    ) -> None:
        self.db, self.network, self.clock, self.ids, self.vendor = db, network, clock, ids, vendor
        self.options, self.zone = config.metadata, config.api.default_availability_zone
        self.secret = secret.encode()
        self.lock, self.known = threading.Lock(), OrderedDict[str, Known]()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        request_id = self.ids.request()
        with log.about(request_id=request_id):
            status, found, headers = self._safely(environ)
        shown = [
            ("Content-Type", found.content_type),
            ("Content-Length", str(len(found.content))),
            ("X-OpenStack-Request-ID", request_id),
            *headers,
        ]
        start_response(f"{status} {HTTPStatus(status).phrase}", shown)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else found.content]

    def _safely(self, environ: Environ) -> tuple[int, Document, list[tuple[str, str]]]:
        try:
            return 200, self._answer(environ), []
        except Ended as e:
            return e.status, Document(e.said.encode()), list(e.headers.items())
        except Unavailable as e:
            logger.warning("metadata cannot be told now: %s", e.why or e.said)
            return 503, Document(b"The metadata service is not available now."), []
        except Exception:
            logger.exception("metadata could not be told")
            return 500, Document(b"An unknown error has occurred. Please try your request again."), []

    # -- one question

    def _answer(self, environ: Environ) -> Document:
        path = _path(environ)
        if not path.strip("/"):
            _read_only(environ)
            return documents.resolve(_NOBODY, "/") or Document(b"")
        known = self._asker(environ)
        subject = self._subject(known, _caller(environ))
        if documents.is_password(subject, path):
            return self._password(environ, known)
        found = documents.resolve(subject, path)
        if found is None:
            raise Ended(404, "Not Found")
        _read_only(environ)
        return found

    def _asker(self, environ: Environ) -> Known:
        """Who the proxy says it is, in the order of metadata.md, section 1."""
        id = environ.get("HTTP_X_INSTANCE_ID")
        signature = environ.get("HTTP_X_INSTANCE_ID_SIGNATURE")
        project = environ.get("HTTP_X_TENANT_ID")
        for name, value in (("Instance-ID", id), ("Instance-ID-Signature", signature), ("Tenant-ID", project)):
            if value is None:
                raise Ended(400, f"X-{name} header is missing from request.")
            if "," in value:
                raise Ended(400, f"Multiple X-{name} headers found within request.")
        assert id is not None and signature is not None
        if not hmac.compare_digest(self._signature(id), signature.encode("latin-1", "replace")):
            logger.warning("a question about server %.36r came with a wrong signature", id)
            raise Ended(403, "Invalid proxy request signature.")
        try:
            known = self._look(id)
        except NotFound:
            raise Ended(404, "Not Found") from None
        if known.server.project_id != project:
            logger.warning("a question about server %s named another project", id)
            raise Ended(404, "Not Found")
        return known

    def _signature(self, id: str) -> bytes:
        return hmac.new(self.secret, id.encode("latin-1", "replace"), hashlib.sha256).hexdigest().encode()

    def _look(self, id: str) -> Known:
        """The server, not older than `cache_s`. Raises NotFound, also for a server that was deleted."""
        now = self.clock.now()
        with self.lock:
            before = self.known.get(id)
            if before is not None and 0 <= now - before.read_at < self.options.cache_s:
                self.known.move_to_end(id)
                return before
        try:
            server, zone, shares = self.db.look(guests.guest, id)
        except NotFound:
            self._forget(id)
            raise
        known = Known(server, zone or (self.zone if server.host else ""), shares, now)
        if before is not None and _same(before.server, server):
            known.nics, known.nics_at = before.nics, before.nics_at
        with self.lock:
            self.known[id] = known
            self.known.move_to_end(id)
            while len(self.known) > KEPT:
                self.known.popitem(last=False)
        return known

    def _forget(self, id: str) -> None:
        with self.lock:
            self.known.pop(id, None)

    # -- what the tree is made of

    def _subject(self, known: Known, caller: str) -> Subject:
        identity = identity_of(known.server, zone=known.zone, disks=disks(known.server), shares=known.shares)
        domain = self.options.dhcp_domain
        subject = Subject(
            identity=identity,
            today=(iso(self.clock.now()) or "")[:10],
            dice=lambda n: self.ids.dice.randbytes(n),
            domain=domain,
            password=guests.password(known.server),
            caller=caller,
            static=self.vendor.static,
            dynamic=lambda: self._dynamic(known, identity, documents.hostname(subject)),
            nics=lambda: self._nics(known),
        )
        return subject

    def _dynamic(self, known: Known, identity: Identity, hostname: str) -> dict[str, Any]:
        """Kept as long as all else, or a guest that asks in a loop would have us ask strangers in a loop."""
        now = self.clock.now()
        if known.dynamic is None or not 0 <= now - known.dynamic_at < self.options.cache_s:
            known.dynamic, known.dynamic_at = self.vendor.dynamic(identity, hostname), now
        return known.dynamic

    def _nics(self, known: Known) -> list[Nic]:
        """Of the network service. What it said before is told where it does not answer now; else Unavailable."""
        now = self.clock.now()
        if known.nics is not None and 0 <= now - known.nics_at < NICS_S:
            return known.nics
        try:
            known.nics, known.nics_at = nics_of(self.network, known.server), now
        except Trouble as e:
            if known.nics is None:
                raise Unavailable("The network service is not available.", why=e.why or e.said) from None
            logger.warning("what was known of the NICs of server %s is told: %s", known.server.id, e.why or e.said)
        return known.nics

    # -- the one thing a guest may write

    def _password(self, environ: Environ, known: Known) -> Document:
        method = environ["REQUEST_METHOD"]
        if method in READING:
            return Document(guests.password(known.server).encode())
        if method != "POST":
            raise Ended(400, "Only GET and POST are allowed for the password.")
        try:
            text = read_body(environ, guests.PASSWORD_BYTES).decode()
        except (Ended, UnicodeDecodeError):
            raise Ended(400, f"A password is text of at most {guests.PASSWORD_BYTES} bytes.") from None
        if "\x00" in text:
            raise Ended(400, "A password has no null characters.")
        id = known.server.id
        try:
            self.db.run(guests.keep_password, id, text)
        except Conflict as e:
            raise Ended(409, e.said) from None
        except NotFound:
            raise Ended(404, "Not Found") from None
        finally:
            self._forget(id)
        return Document(b"")


def nics_of(network: Network, server: Server) -> list[Nic]:
    """A server's NICs as the network service has them now, in the order of its row: three questions."""
    ports = network.ports(servers=[server.id])
    ids = sorted({p.network_id for p in ports})
    if not ids:
        return []
    networks = {n.id: n for n in network.networks(ids=ids)}
    subnets = network.subnets(networks=ids)
    order = {p.port_id: n for n, p in enumerate(server.plugs)}
    tags = {p.port_id: p.tag or "" for p in server.plugs}
    ports.sort(key=lambda p: order.get(p.id, len(order)))
    return [plug(p, networks[p.network_id], subnets, tag=tags.get(p.id, "")) for p in ports if p.network_id in networks]


def _same(one: Server, other: Server) -> bool:
    """Can what was gathered for the one be told of the other?"""
    return (one.generation, one.updated_at, one.plugs) == (other.generation, other.updated_at, other.plugs)


def _path(environ: Environ) -> str:
    try:
        return str(environ.get("PATH_INFO") or "/").encode("latin-1").decode()
    except UnicodeError:
        raise Ended(404, "Not Found") from None


def _caller(environ: Environ) -> str:
    forwarded = str(environ.get("HTTP_X_FORWARDED_FOR") or environ.get("REMOTE_ADDR") or "")
    return forwarded.split(",")[0].strip()[:45]


def _read_only(environ: Environ) -> None:
    if environ["REQUEST_METHOD"] not in READING:
        raise Ended(405, "Method Not Allowed", headers={"Allow": ", ".join(READING)})


_NOBODY = Subject(Identity("", "", "", ""), "", bytes)
