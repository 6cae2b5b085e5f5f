"""The identity service (Identity API v3), as a service asks it."""

import hashlib
import logging

import msgspec

from kilonova.clients.session import Session, TokenBody, decoded, part
from kilonova.kit.clock import Clock, parsed
from kilonova.kit.errors import Forbidden, Invalid, NotFound, Unavailable, Unknown
from kilonova.kit.routes import Context

logger = logging.getLogger(__name__)

CONTEXTS = 10_000  # tokens remembered
CONTEXT_S = 300.0


class Identity:
    """The identity service (Identity API v3), as a service asks it."""

    def __init__(self, session: Session, system: Session | None = None) -> None:
        """`system`: in whose name limits are read; projects see their own only."""
        self.session, self.system = session, system or session

    def authenticate(self, token: str) -> Context:
        """Who has this token. Raises Unknown where it is not good (any more), Unavailable."""
        headers = {"X-Subject-Token": token}
        try:
            answer = self.session.ask("GET", "/v3/auth/tokens", query={"nocatalog": "1"}, headers=headers)
        except (NotFound, Invalid):
            raise Unknown("The request you have made requires authentication.") from None
        said = decoded("identity", answer.read(), TokenBody).token
        return Context(
            user_id=said.user.id,
            user_name=said.user.name,
            user_domain_id=said.user.domain.id,
            project_id=said.project.id if said.project else None,
            project_name=said.project.name if said.project else "",
            project_domain_id=said.project.domain.id if said.project else "default",
            domain_id=said.domain.id if said.domain else None,
            system="all" if said.system and said.system.get("all") else None,
            roles=frozenset(r.name for r in said.roles),
            expires_at=parsed(said.expires_at),
            token=token,
        )

    def project_exists(self, id: str, token: str | None = None) -> bool:
        """May this id be used for a project? Where we may not look, it may: the same as real services do."""
        try:
            self.session.tell("GET", f"/v3/projects/{part(id)}", token=token)
        except NotFound:
            return False
        except (Forbidden, Unavailable) as e:
            logger.info("whether project %s exists cannot be told (%s)", id, e.why or e.said)
        return True

    def limits(self, service_type: str, region: str, project_id: str = "") -> tuple[dict[str, int], dict[str, int]]:
        """What holds for every project, and for this one instead, of the resources of a service. Raises Unavailable.

        Limits of other regions are others'.
        """
        services = self.system.json("GET", "/v3/services", _Services, query={"type": service_type}).services
        if not services:
            return {}, {}
        about = {"service_id": services[0].id}
        every = self.system.json("GET", "/v3/registered_limits", _Registered, query=about).registered_limits
        own: list[_Limit] = []
        if project_id:
            about |= {"project_id": project_id}
            own = self.system.json("GET", "/v3/limits", _Limits, query=about).limits
        return (
            {x.resource_name: x.default_limit for x in _here(every, region)},
            {x.resource_name: x.resource_limit for x in _here(own, region) if x.project_id == project_id},
        )


class _Service(msgspec.Struct):
    id: str


class _Services(msgspec.Struct):
    services: list[_Service]


class _Limit(msgspec.Struct):
    resource_name: str
    region_id: str | None = None
    project_id: str | None = None
    default_limit: int = -1
    resource_limit: int = -1


class _Registered(msgspec.Struct):
    registered_limits: list[_Limit]


class _Limits(msgspec.Struct):
    limits: list[_Limit]


def _here(limits: list[_Limit], region: str) -> list[_Limit]:
    """Those of no region, and then those of ours, which say otherwise."""
    return sorted((x for x in limits if x.region_id in (None, region)), key=lambda x: x.region_id is not None)


class RemoteIdentity:
    """`authenticate` for services beside a real Keystone: asks it, and remembers for at most `keep_s`."""

    def __init__(self, identity: Identity, clock: Clock, keep_s: float = CONTEXT_S) -> None:
        self.identity, self.clock, self.keep_s = identity, clock, min(keep_s, CONTEXT_S)
        self.known: dict[bytes, tuple[float, Context]] = {}

    def __call__(self, token: str) -> Context:
        """Raises Unknown, Unavailable."""
        key, now = hashlib.blake2b(token.encode("utf-8", "replace"), digest_size=16).digest(), self.clock.now()
        found = self.known.get(key)
        if found and now < found[0]:
            return found[1]
        context = self.identity.authenticate(token)
        if context.expires_at <= now:
            raise Unknown("The request you have made requires authentication.")
        if len(self.known) >= CONTEXTS:
            self.known.clear()
        self.known[key] = (min(now + self.keep_s, context.expires_at), context)
        return context
