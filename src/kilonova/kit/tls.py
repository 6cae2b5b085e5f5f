"""TLS on our own listeners, and towards them."""

import ssl
from pathlib import Path

import msgspec

from kilonova.kit.errors import Invalid


class Identity(msgspec.Struct, frozen=True):
    """Who we are to those who connect: a chain of certificates, the own one first, and its key. PEM."""

    cert_file: Path
    key_file: Path

    def context(self) -> ssl.SSLContext:
        """For a listener. Raises Invalid, with a sentence that says which file it is about."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            made.load_cert_chain(self.cert_file, self.key_file, password=_no_password)
        except ssl.SSLError as e:
            raise Invalid(
                f"{self.cert_file} and {self.key_file} are no certificate with its key: {e.reason}."
            ) from None
        except OSError as e:
            raise Invalid(
                f"The certificate and its key cannot be read: {self.cert_file}, {self.key_file}: {e.strerror}."
            ) from None
        return made


def _no_password() -> str:
    """Who asks for one would ask on the terminal of a process that has none."""
    raise Invalid("The key of the certificate must not be behind a password.")


def trusting(ca_file: Path | None) -> ssl.SSLContext:
    """For who connects: certificates of these authorities, or of those that this machine trusts. Raises Invalid."""
    try:
        return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except OSError as e:
        raise Invalid(f"{ca_file} holds no certificates that can be read: {e.strerror or e}.") from None
