"""Key pairs: a user's own, imported or made here. A private half made here is shown once and forgotten."""

import base64
import binascii
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Meta

from kilonova.api.allowance import allowance
from kilonova.api.notices import told
from kilonova.api.registry import R, next_link, page_limit
from kilonova.kit.clock import iso_us
from kilonova.kit.db import Tx
from kilonova.kit.errors import Invalid
from kilonova.kit.routes import Call
from kilonova.kit.versions import UNSET, UnsetType, required, since, was
from kilonova.model import notices as words
from kilonova.store import catalog, quotas
from kilonova.store.quotas import exceeded

OldName = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^(?!\s)[_\- a-zA-Z0-9]+(?<!\s)\Z")]
NewName = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^(?!\s)[_\-@. a-zA-Z0-9]+(?<!\s)\Z")]


class NewKey(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[NewName, was(OldName, until="2.91")]
    public_key: Annotated[str | UnsetType, required(since="2.92")] = UNSET
    type: Annotated[Literal["ssh", "x509"], since("2.2")] = "ssh"
    user_id: Annotated[str | None, since("2.10")] = None


class NewBody(msgspec.Struct, forbid_unknown_fields=True):
    keypair: NewKey


class User(msgspec.Struct):
    user_id: Annotated[list[str], since("2.10")] = []


class Query(msgspec.Struct):
    user_id: Annotated[list[str], since("2.10")] = []
    limit: Annotated[list[str], since("2.35")] = []
    marker: Annotated[list[str], since("2.35")] = []


@R.get("/v2.1/os-keypairs", query=Query, strict="2.75", policy="os_compute_api:os-keypairs:index", late=True)
def index(call: Call) -> dict[str, Any]:
    q: Query = call.query
    user = _whose(call, q.user_id)
    limit = page_limit(call, q.limit[-1] if q.limit else None)
    with call.world.db.read() as tx:
        found = catalog.keypairs(tx, user, limit=limit, marker=q.marker[-1] if q.marker else None)
    body: dict[str, Any] = {"keypairs": [{"keypair": _short(call, k)} for k in found]}
    if call.version >= 35 and found and len(found) == limit:
        body["keypairs_links"] = next_link(call, found[-1].name, "os-keypairs")
    return body


@R.get("/v2.1/os-keypairs/{id}", query=User, strict="2.75", policy="os_compute_api:os-keypairs:show", late=True)
def show(call: Call, id: str) -> dict[str, Any]:
    user = _whose(call, call.query.user_id)
    with call.world.db.read() as tx:
        k = catalog.stored_keypair(tx, user, id)
    rest = {
        "id": k.id,
        "user_id": k.user_id,
        "created_at": iso_us(k.created_at),
        "updated_at": None,
        "deleted": False,
        "deleted_at": None,
    }
    return {"keypair": _short(call, k) | rest}


@R.post(
    "/v2.1/os-keypairs",
    body=NewBody,
    ok=lambda v: 201 if v >= 2 else 200,
    policy="os_compute_api:os-keypairs:create",
    late=True,
)
def create(call: Call) -> dict[str, Any]:
    wish: NewKey = call.body.keypair
    user = _whose(call, [wish.user_id] if wish.user_id else [])
    if isinstance(wish.public_key, UnsetType):
        private, public = _made(wish.type, call.context.user_id, call.world.clock.now())
    else:
        private, public = None, wish.public_key
    print_ = fingerprint(public, wish.type)
    key = catalog.Stored(0, user, wish.name, wish.type, print_, public, call.world.clock.now())

    most = allowance(call)

    def record(tx: Tx) -> None:
        allowed = quotas.limits(tx, most, call.context.project_id or "", user)["key_pairs"]
        if 0 <= allowed <= (used := catalog.count_keypairs(tx, user)):
            raise exceeded(most, "key_pairs", 1, used, "Quota exceeded, too many key pairs.")
        catalog.add_keypair(tx, key)
        family = "create" if private else "import"
        of = lambda: words.keypair(user, key.name, key.type, key.fingerprint, key.public_key)
        told(call, tx, f"keypair.{family}.start", f"keypair.{family}.end", of=of)

    call.world.db.run(record)
    shown = _short(call, key) | {"user_id": user}
    return {"keypair": shown | ({"private_key": private} if private else {})}


@R.delete("/v2.1/os-keypairs/{id}", query=User, strict="2.75", ok=lambda v: 204 if v >= 2 else 202,
          policy="os_compute_api:os-keypairs:delete", late=True)  # fmt: skip
def delete(call: Call, id: str) -> None:
    user = _whose(call, call.query.user_id)

    def record(tx: Tx) -> None:
        key = catalog.stored_keypair(tx, user, id)
        catalog.remove_keypair(tx, user, id)
        of = lambda: words.keypair(user, key.name, key.type, key.fingerprint, key.public_key)
        told(call, tx, "keypair.delete.start", "keypair.delete.end", of=of)

    call.world.db.run(record)


def _whose(call: Call, said: list[str]) -> str:
    user = said[-1] if said else call.context.user_id
    call.check({"user_id": user})
    return user


def _short(call: Call, k: catalog.Stored) -> dict[str, Any]:
    shown = {"name": k.name, "public_key": k.public_key, "fingerprint": k.fingerprint}
    return shown | {"type": k.type} if call.version >= 2 else shown


def _made(kind: str, user: str, now: float) -> tuple[str, str]:
    """(private half, public half). RSA, 2048 bits, as clients expect of this call."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    ).decode()
    if kind == "x509":
        return private, _certificate(key, user, now)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    return private, f"{public} Generated-by-Kilonova"


def _certificate(key: rsa.RSAPrivateKey, user: str, now: float) -> str:
    """A certificate that its holder signed himself, for ten years: Windows guests (WinRM) let in who has its key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, user[:64])])
    utf8 = b"\x0c" + bytes([len(principal := f"{user[:64]}@localhost".encode())]) + principal  # DER: UTF8String
    begin = datetime.fromtimestamp(int(now), UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=3650))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.OtherName(USER_PRINCIPAL_NAME, utf8)]), critical=False)
    )
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


USER_PRINCIPAL_NAME = x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2.3")


def fingerprint(public: str, kind: str) -> str:
    """MD5 of an ssh key, as 16 pairs of hex digits (RFC 4716); SHA-1 of a certificate. Raises Invalid."""
    if kind == "x509":
        try:
            digest = x509.load_pem_x509_certificate(public.encode()).fingerprint(hashes.SHA1())  # noqa: S303
        except ValueError:
            raise Invalid("Keypair data is invalid: failed to generate fingerprint") from None
        return ":".join(f"{b:02x}" for b in digest)
    try:
        name, data = public.split(maxsplit=2)[:2]
        raw = base64.b64decode(data, validate=True)
        serialization.load_ssh_public_key(f"{name} {data}".encode())
    except (ValueError, binascii.Error, UnicodeEncodeError):
        raise Invalid("Keypair data is invalid: failed to generate fingerprint") from None
    except Exception:  # unknown algorithms (sk-ssh-ed25519@openssh.com) are still keys
        if not raw.startswith(len(name).to_bytes(4, "big") + name.encode()):
            raise Invalid("Keypair data is invalid: failed to generate fingerprint") from None
    if "\n" in public.strip():
        raise Invalid("Keypair data is invalid: failed to generate fingerprint")
    return ":".join(f"{b:02x}" for b in hashlib.md5(raw, usedforsecurity=False).digest())
