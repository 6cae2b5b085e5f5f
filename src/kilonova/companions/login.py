"""Who may come in: proofs become tokens, and tokens become contexts.

`log_in` hears proofs (a password, a token, an application credential) and a scope, and gives a `Token`.
`Gate` is what all services of this process ask: `gate(token) → Context`, remembered until something changes.
What somebody may do is never written into a token; it is looked up, so that what is taken from him is gone at once.
"""

import hashlib
import threading
from dataclasses import dataclass
from typing import Any

import msgspec

from kilonova.companions.tokens import METHODS, REFUSED, Guesses, Keys, Passwords, Token, audit_id, pack, unpack
from kilonova.kit.clock import Clock, Ids, iso_us
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Forbidden, Invalid, Unknown
from kilonova.kit.routes import Context
from kilonova.store import identity as store
from kilonova.store.identity import ApplicationCredential, Project, Standing, User

EXPIRED_FOR_S = 172_800  # so long an ended token may still vouch for work that it began (allow_expired)


# ---- what is said to come in


class ByName(msgspec.Struct):
    """A domain or the like, by id or by name."""

    id: str | None = None
    name: str | None = None


class Owner(msgspec.Struct):
    id: str | None = None
    name: str | None = None
    domain: ByName | None = None
    password: str | None = None


class PasswordProof(msgspec.Struct):
    user: Owner


class TokenProof(msgspec.Struct):
    id: str


class CredentialProof(msgspec.Struct):
    secret: str
    id: str | None = None
    name: str | None = None
    user: Owner | None = None


class Proofs(msgspec.Struct):
    methods: list[str]
    password: PasswordProof | None = None
    token: TokenProof | None = None
    application_credential: CredentialProof | None = None


class ProjectScope(msgspec.Struct):
    id: str | None = None
    name: str | None = None
    domain: ByName | None = None


class Scope(msgspec.Struct):
    project: ProjectScope | None = None
    domain: ByName | None = None
    system: dict[str, bool] | None = None


class Wish(msgspec.Struct):
    identity: Proofs
    scope: Scope | str | None = None


class Auth(msgspec.Struct):
    auth: Wish


# ---- who is who


@dataclass(frozen=True)
class Proven:
    """What the proofs have shown."""

    user: User
    methods: tuple[str, ...]
    parent: Token | None = None
    credential: ApplicationCredential | None = None


@dataclass
class Door:
    """All that coming in needs. `lifetime_s` of a token."""

    db: Db
    clock: Clock
    ids: Ids
    keys: Keys
    passwords: Passwords
    guesses: Guesses
    lifetime_s: float = 3600


def log_in(door: Door, wish: Wish) -> Token:
    """Raises Unknown for every proof that does not hold, always with the same words; Invalid where it is no proof."""
    proven = prove(door, wish.identity)
    with door.db.read() as tx:
        target, target_id = _scope(tx, proven, wish.scope)
        standing = store.standing(tx, proven.user.id, target, target_id)
    now = door.clock.now()
    ends = now + door.lifetime_s
    audits: tuple[str, ...] = (audit_id(door.ids.hex()),)
    if proven.parent:
        ends = min(ends, proven.parent.expires_at)
        audits += (proven.parent.audit_ids[-1],)
    if proven.credential and proven.credential.expires_at:
        ends = min(ends, proven.credential.expires_at)
    token = Token(
        user_id=proven.user.id,
        methods=tuple(m for m in METHODS if m in proven.methods),
        issued_at=now,
        expires_at=ends,
        audit_ids=audits,
        target=target,
        target_id=target_id,
        application_credential_id=proven.credential.id if proven.credential else "",
    )
    judge(token, standing, now, proven.credential)
    return token


def prove(door: Door, proofs: Proofs) -> Proven:
    """Every proof must hold, and all must be of one person."""
    if not proofs.methods:
        raise Invalid("identity.methods must not be empty.")
    found: list[Proven] = []
    for method in dict.fromkeys(proofs.methods):
        if method == "password" and proofs.password:
            found.append(Proven(_by_password(door, proofs.password.user), ("password",)))
        elif method == "token" and proofs.token:
            found.append(_by_token(door, proofs.token.id))
        elif method == "application_credential" and proofs.application_credential:
            found.append(_by_credential(door, proofs.application_credential))
        elif method in METHODS:
            raise Invalid(f"identity.{method} is required by the method of this name.")
        else:
            raise Unknown("Attempted to authenticate with an unsupported method.")
    if len({p.user.id for p in found}) != 1:
        raise Unknown(REFUSED, why="proofs of several people")
    return Proven(
        found[0].user,
        tuple(m for p in found for m in p.methods),
        next((p.parent for p in found if p.parent), None),
        next((p.credential for p in found if p.credential), None),
    )


def _by_password(door: Door, owner: Owner) -> User:
    """As long for nobody as for somebody, and the same words for all that can be wrong."""
    if owner.password is None:
        raise Invalid("identity.password.user.password is required.")
    with door.db.read() as tx:
        user = _user(tx, owner)
        domain = store.look(tx, Project, user.domain_id) if user else None
        who = _counted(tx, owner, user)
    if door.guesses.locked(who):
        raise Unknown(REFUSED, why=f"user {who}: too many wrong passwords")
    if not door.passwords.right(owner.password, user.secret if user else None) or user is None or domain is None:
        door.guesses.wrong(who)
        raise Unknown(REFUSED, why=f"user {who}: wrong password, or no such user")
    door.guesses.right(who)
    if not (user.enabled and domain.enabled):
        raise Unknown(REFUSED, why=f"user {user.id} is disabled, or his domain is")
    return user


def _by_token(door: Door, text: str) -> Proven:
    token = unpack(door.keys.decrypt(text))
    with door.db.read() as tx:
        standing, credential = _standing(tx, token)
    judge(token, standing, door.clock.now(), credential)
    assert standing is not None
    return Proven(standing.user, (*token.methods, "token"), token, credential)


def _by_credential(door: Door, proof: CredentialProof) -> Proven:
    with door.db.read() as tx:
        credential, of = None, ""
        if proof.id is not None:
            credential = store.look(tx, ApplicationCredential, proof.id)
        elif proof.name is not None and proof.user:
            owner = _user(tx, proof.user)
            of = _counted(tx, proof.user, owner)
            found = store.find(tx, ApplicationCredential, user_id=owner.id, name=proof.name) if owner else []
            credential = found[0] if found else None
        else:
            raise Invalid("An application credential is named by id, or by name and user.")
        user = store.look(tx, User, credential.user_id) if credential else None
    who = f"application credential {credential.id if credential else (proof.id, of, proof.name)}"
    if door.guesses.locked(who):
        raise Unknown(REFUSED, why=f"{who}: too many wrong secrets")
    if not door.passwords.right(proof.secret, credential.secret if credential else None) or not credential or not user:
        door.guesses.wrong(who)
        raise Unknown(REFUSED, why=f"{who}: wrong secret, or there is none such")
    door.guesses.right(who)
    return Proven(user, ("application_credential",), None, credential)


def _user(tx: Tx, owner: Owner) -> User | None:
    if owner.id is not None:
        return store.look(tx, User, owner.id)
    if owner.name is None or owner.domain is None:
        raise Invalid("A user is named by id, or by name and domain.")
    domain_id = _domain_id(tx, owner.domain)
    found = store.find(tx, User, name=owner.name, domain_id=domain_id) if domain_id else []
    return found[0] if found else None


def _counted(tx: Tx, owner: Owner, user: User | None) -> str:
    """Whose wrong tries these are. However he is named, one count: also for nobody, or a pause would tell who exists."""
    if user is not None:
        return user.id
    if owner.id is not None or owner.domain is None:
        return repr(owner.id)
    return repr((owner.name, _domain_id(tx, owner.domain)))


def _domain_id(tx: Tx, said: ByName) -> str | None:
    if said.id is not None:
        return said.id or None
    if said.name is None:
        raise Invalid("A domain is named by id or by name.")
    found = store.find(tx, Project, name=said.name, domain_id="", is_domain=True)
    return found[0].id if found else None


def _scope(tx: Tx, proven: Proven, said: Scope | str | None) -> tuple[str | None, str]:
    """(kind, id) of what the token is to be for. Raises Unknown where there is no such thing."""
    if isinstance(said, str) and said != "unscoped":
        raise Invalid('scope must be an object, or "unscoped".')
    wanted = None if said is None or isinstance(said, str) else _wanted(tx, said)
    if proven.credential:
        own = ("project", proven.credential.project_id)
        if wanted not in (None, own):
            raise Unknown("Application credentials cannot request a scope.")
        return own
    if wanted:
        return wanted
    if said is None and proven.parent is None and proven.user.default_project_id:
        default = store.standing(tx, proven.user.id, "project", proven.user.default_project_id)
        if default and default.roles and default.scope and default.scope.enabled:
            return "project", proven.user.default_project_id
    return None, ""


def _wanted(tx: Tx, said: Scope) -> tuple[str, str]:
    kinds = [k for k in ("project", "domain", "system") if getattr(said, k) is not None]
    if len(kinds) != 1:
        raise Invalid("scope must be one of project, domain and system.")
    if said.system is not None:
        if said.system != {"all": True}:
            raise Invalid('scope.system must be {"all": true}.')
        return "system", store.SYSTEM
    if said.domain is not None:
        return "domain", _domain_id(tx, said.domain) or "-"
    assert said.project is not None
    if said.project.id is not None:
        return "project", said.project.id
    if said.project.name is None or said.project.domain is None:
        raise Invalid("scope.project is named by id, or by name and domain.")
    domain_id = _domain_id(tx, said.project.domain)
    found = store.find(tx, Project, name=said.project.name, domain_id=domain_id, is_domain=False) if domain_id else []
    return "project", found[0].id if found else "-"


# ---- is it good?


def judge(token: Token, standing: Standing | None, now: float, credential: ApplicationCredential | None) -> None:
    """Pure. Raises Unknown, with the reason for the log, where this token is not good (any more)."""
    bad = ""
    if now >= token.expires_at:
        bad = "ended"
    elif standing is None:
        bad = "its user or its scope is no more"
    elif standing.revoked:
        bad = "revoked"
    elif not (standing.user.enabled and standing.domain.enabled):
        bad = "its user or his domain is disabled"
    elif token.issued_at <= standing.user.valid_since:
        bad = "from before its user's password changed"
    elif standing.scope and not standing.scope.enabled:
        bad = "its scope is disabled"
    elif standing.scope_domain and not standing.scope_domain.enabled:
        bad = "the domain of its scope is disabled"
    elif token.target and not standing.roles:
        bad = "its user has no role there"
    elif token.application_credential_id and not credential:
        bad = "its application credential is no more"
    elif credential and credential.expires_at and now >= credential.expires_at:
        bad = "its application credential has ended"
    elif credential and not _roles(standing, credential):
        bad = "its application credential has no role left"
    if bad:
        raise Unknown(REFUSED, why=f"token of user {token.user_id}: {bad}")


def _roles(standing: Standing, credential: ApplicationCredential | None) -> list[tuple[str, str]]:
    """Of an application credential: those it was given that its owner still has."""
    if credential is None:
        return standing.roles
    return [r for r in standing.roles if r[0] in credential.roles]


def _standing(tx: Tx, token: Token) -> tuple[Standing | None, ApplicationCredential | None]:
    standing = store.standing(tx, token.user_id, token.target, token.target_id, token.audit_ids[0])
    credential = None
    if token.application_credential_id:
        credential = store.look(tx, ApplicationCredential, token.application_credential_id)
    return standing, credential


class Seen(msgspec.Struct, frozen=True):
    """A token that was looked at, and all that its answers need. `context` without the token's text."""

    token: Token
    standing: Standing
    credential: ApplicationCredential | None
    roles: list[tuple[str, str]]
    context: Context


class Gate:
    """`gate(token) → Context` for every service of this process. Raises Unknown.

    What was found about a token holds as long as nobody changes anything in identity.  Every change raises a number
    in the database: this process forgets at once when it was its own (`forget`), and looks at the number every
    `keep_s`, which is how late it hears of others'.  Two dictionaries stand for "least recently used": when the
    young one is full it becomes the old one.
    """

    def __init__(self, db: Db, clock: Clock, keys: Keys, keep_s: float = 5.0, most: int = 5_000) -> None:
        self.db, self.clock, self.keys, self.keep_s, self.most = db, clock, keys, keep_s, most
        self.generation, self.look_again_at = (0, 0), 0.0
        self.young: dict[bytes, tuple[tuple[int, int], float, Seen]] = {}
        self.old: dict[bytes, tuple[tuple[int, int], float, Seen]] = {}
        self.lock = threading.Lock()

    def __call__(self, text: str) -> Context:
        return self.seen(text).context

    def seen(self, text: str) -> Seen:
        now = self.clock.now()
        if now >= self.look_again_at:
            self._heed(now)
        key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
        found = self.young.get(key)
        if found is None and (found := self.old.get(key)) is not None:
            self._remember(key, found)
        if found is not None and found[0] == self.generation and now < found[1]:
            return found[2]
        generation = self.generation  # before the look, so that a change meanwhile counts
        seen = self.look(text)
        ends = [seen.token.expires_at, seen.credential.expires_at if seen.credential else None]
        self._remember(key, (generation, min(e for e in ends if e is not None), seen))
        return seen

    def look(self, text: str, *, ended_since_s: float = 0) -> Seen:
        """Without memory; a token that ended up to `ended_since_s` ago counts as good."""
        token, now = unpack(self.keys.decrypt(text)), self.clock.now()
        at = min(now, token.expires_at - 1) if now < token.expires_at + ended_since_s else now
        with self.db.read() as tx:
            standing, credential = _standing(tx, token)
        judge(token, standing, at, credential)
        assert standing is not None
        roles = _roles(standing, credential)
        return Seen(token, standing, credential, roles, _context(token, standing, roles, text))

    def forget(self) -> None:
        """This process changed something: nothing that was found before counts any more."""
        with self.lock:
            self.generation = (self.generation[0], self.generation[1] + 1)

    def _heed(self, now: float) -> None:
        """Did another process change something? One thread looks; the others go on with what is known."""
        if self.lock.acquire(blocking=False):
            try:
                with self.db.read() as tx:
                    self.generation = (store.generation(tx), self.generation[1])
                self.look_again_at = now + self.keep_s
            finally:
                self.lock.release()

    def _remember(self, key: bytes, entry: tuple[tuple[int, int], float, Seen]) -> None:
        with self.lock:
            if len(self.young) >= self.most:
                self.old, self.young = self.young, {}
            self.young[key] = entry


def _context(token: Token, standing: Standing, roles: list[tuple[str, str]], text: str) -> Context:
    project = standing.scope if token.target == "project" else None
    return Context(
        user_id=standing.user.id,
        user_name=standing.user.name,
        user_domain_id=standing.user.domain_id,
        project_id=project.id if project else None,
        project_name=project.name if project else "",
        project_domain_id=project.domain_id if project else "default",
        domain_id=token.target_id if token.target == "domain" else None,
        system="all" if token.target == "system" else None,
        roles=frozenset(name for _, name in roles),
        expires_at=token.expires_at,
        token=text,
    )


def issue(door: Door, token: Token) -> str:
    """Its text: at most 255 letters."""
    return door.keys.encrypt(pack(token), token.issued_at)


def described(token: Token, standing: Standing, roles: list[tuple[str, str]], more: dict[str, Any]) -> dict[str, Any]:
    """The body that the Identity API shows of a token; `more` is the catalog, and the credential it was made with."""
    domain = {"id": standing.domain.id, "name": standing.domain.name}
    said: dict[str, Any] = {
        "methods": list(token.methods),
        "user": {
            "id": standing.user.id,
            "name": standing.user.name,
            "domain": domain,
            "password_expires_at": None,
        },
        "audit_ids": list(token.audit_ids),
        "expires_at": moment(token.expires_at),
        "issued_at": moment(token.issued_at),
    }
    scope = standing.scope
    if token.target == "project" and scope and standing.scope_domain:
        outer = {"id": standing.scope_domain.id, "name": standing.scope_domain.name}
        said["project"] = {"id": scope.id, "name": scope.name, "domain": outer}
        said["is_domain"] = False
    elif token.target == "domain" and scope:
        said["domain"] = {"id": scope.id, "name": scope.name}
    elif token.target == "system":
        said["system"] = {"all": True}
    if token.target:
        said["roles"] = [{"id": i, "name": n} for i, n in roles]
    return said | more


def moment(at: float | None) -> str | None:
    """`2026-11-20T12:00:00.000000Z`, as the Identity API writes moments."""
    return None if at is None else f"{iso_us(at)}Z"


def restricted(seen: Seen) -> None:
    """Raises Forbidden: with a restricted application credential nobody makes himself another way in."""
    if seen.credential and not seen.credential.unrestricted:
        raise Forbidden("Using method 'application_credential' is not allowed for managing trusts or credentials.")
