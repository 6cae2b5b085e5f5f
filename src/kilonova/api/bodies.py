"""The small types that requests are made of (formats of the Compute API's schemas)."""

import binascii
import ipaddress
import re
from base64 import b64decode
from typing import Annotated, Any, Literal

from msgspec import Meta

from kilonova.kit.errors import Invalid

# fmt: off
Yes = Literal["True", "TRUE", "true", "1", "ON", "On", "on", "YES", "Yes", "yes",
              "False", "FALSE", "false", "0", "OFF", "Off", "off", "NO", "No", "no"]
# fmt: on
Boolish = bool | Yes
_TRUE = {True, "True", "TRUE", "true", "1", "ON", "On", "on", "YES", "Yes", "yes"}

PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*$"
Text255 = Annotated[str, Meta(max_length=255, pattern=PRINTABLE)]
Name = Annotated[
    str, Meta(min_length=1, max_length=255, pattern=r"^(?!\s)[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+(?<!\s)$")
]
Uuid = Annotated[str, Meta(pattern=r"^(?i:[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12})$")]
Digits = Annotated[str, Meta(pattern=r"^[0-9]+$", max_length=20)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)] | Digits
Tag = Annotated[str, Meta(min_length=1, max_length=60, pattern=r"^[^,/]*$")]
HostName = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9-._]*$")]
MetaKey = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9-_:. ]{1,255}$")]
Metadata = dict[MetaKey, Annotated[str, Meta(max_length=255)]]
DiskConfig = Literal["AUTO", "MANUAL"]
Base64 = Annotated[str, Meta(max_length=65535)]


def truth(value: Any) -> bool:
    """Of a Boolish."""
    return value in _TRUE


def address(value: str, version: int | None, field: str) -> str:
    """An IP address, checked, in its canonical form (RFC 5952). Raises Invalid with the field's name."""
    try:
        ip = ipaddress.ip_address(value)
    except ValueError:
        ip = None
    if ip is None or (version and ip.version != version):
        kind = f"ipv{version}" if version else "ipv4' or 'ipv6"
        raise Invalid(
            f"Invalid input for field/attribute {field}. Value: {value[:60]!r}. '{value[:60]}' is not a '{kind}'"
        )
    return str(ip)


def decoded(value: str, field: str) -> bytes:
    """What base64 says. Raises Invalid with the field's name, without its value: user data can hold secrets."""
    try:
        return b64decode(re.sub(r"\s", "", value), validate=True)
    except (binascii.Error, ValueError):
        raise Invalid(f"Invalid input for field/attribute {field}. It is not 'base64'.") from None


def dashed(value: str) -> str:
    """A UUID as we write it, whatever way it was written."""
    flat = value.replace("-", "").lower()
    return f"{flat[:8]}-{flat[8:12]}-{flat[12:16]}-{flat[16:20]}-{flat[20:]}" if len(flat) == 32 else value
