"""Certificates for a cloud that has none (`kilonova up --tls`): an authority of its own that signs once, and is trusted by name."""

import datetime
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kilonova.kit.tls import Identity

DAYS = 3650
DAY = datetime.timedelta(days=1)


def own(directory: Path, names: Iterable[str], now: float) -> tuple[Identity, Path]:
    """An identity for these names and addresses, and the authority to be trusted; made where it is not there yet, or does not fit."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    ca, cert, key = directory / "ca.pem", directory / "cert.pem", directory / "key.pem"
    wanted = sorted(set(names))
    if not (ca.exists() and key.exists() and cert.exists() and _fits(cert.read_bytes(), wanted, now)):
        _make(ca, cert, key, wanted, now)
    return Identity(cert, key), ca


def _fits(pem: bytes, wanted: list[str], now: float) -> bool:
    known = x509.load_pem_x509_certificate(pem)
    has = known.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    all = {str(n.value) for n in has}
    at = datetime.datetime.fromtimestamp(now, datetime.UTC)
    return set(wanted) <= all and known.not_valid_after_utc - at > 30 * DAY


def _make(ca: Path, cert: Path, key: Path, names: list[str], now: float) -> None:
    """The authority's key is forgotten: nobody else can be given a certificate of it."""
    authority, mine = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = _certificate("Kilonova, a cloud of its own", None, authority.public_key(), authority, now, [])
    leaf = _certificate("kilonova", root.subject, mine.public_key(), authority, now, names)
    text = mine.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(key, text, 0o600)
    _write(cert, leaf.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(ca, root.public_bytes(serialization.Encoding.PEM), 0o644)


def _certificate(
    name: str,
    issuer: x509.Name | None,
    of: ec.EllipticCurvePublicKey,
    by: ec.EllipticCurvePrivateKey,
    now: float,
    names: list[str],
) -> x509.Certificate:
    """RFC 5280. Without an issuer: an authority, for itself."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    at = datetime.datetime.fromtimestamp(now, datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(of)
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - DAY)
        .not_valid_after(at + DAYS * DAY)
        .add_extension(
            x509.BasicConstraints(ca=issuer is None, path_length=0 if issuer is None else None), critical=True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(of), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
        .add_extension(_usage(authority=issuer is None), critical=True)
    )
    if names:
        made = made.add_extension(x509.SubjectAlternativeName([_general(n) for n in names]), critical=False)
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return made.sign(by, hashes.SHA256())


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(file: Path, text: bytes, mode: int) -> None:
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as f:
        f.write(text)
