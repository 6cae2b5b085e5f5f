"""Tokens and passwords: what proves who somebody is, without anybody having to be asked.

A token is a Fernet message (symmetric, authenticated; github.com/fernet/spec) around a few bytes of msgpack: who,
where, how he proved it, from when to when.  Nothing of it lies in a database, so a thousand of them cost nothing.
Passwords and secrets are kept as scrypt hashes (RFC 7914).
"""

import base64
import hashlib
import hmac
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from kilonova.kit.clock import Clock
from kilonova.kit.errors import Invalid, Unknown

METHODS = ("password", "token", "application_credential")
REFUSED = "The request you have made requires authentication."
LONGEST_PASSWORD = 4096
LONGEST_TOKEN = 1024


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """What a token says. `target`: None, "project", "domain", "system". Moments in seconds since 1970.

    `audit_ids`: its own, and that of the first token it was made from.  A token never outlives that one.
    """

    user_id: str
    methods: tuple[str, ...]
    issued_at: float
    expires_at: float
    audit_ids: tuple[str, ...]
    target: str | None = None
    target_id: str = ""
    application_credential_id: str = ""


class _Packed(msgspec.Struct, array_like=True):
    """As short as can be: it must fit into 255 letters once it is encrypted."""

    form: int
    user: bytes
    methods: int
    target: int
    scope: bytes
    issued_at: float
    expires_at: float
    audit: list[bytes]
    credential: bytes = b""


FORM = 1
TARGETS = (None, "project", "domain", "system")
_decoder = msgspec.msgpack.Decoder(_Packed)


def pack(token: Token) -> bytes:
    return msgspec.msgpack.encode(
        _Packed(
            FORM,
            _short(token.user_id),
            sum(1 << METHODS.index(m) for m in token.methods),
            TARGETS.index(token.target),
            _short(token.target_id),
            token.issued_at,
            token.expires_at,
            [_bytes(a) for a in token.audit_ids],
            _short(token.application_credential_id),
        )
    )


def unpack(raw: bytes) -> Token:
    """Raises Unknown for what we have not made."""
    try:
        p = _decoder.decode(raw)
        if p.form != FORM:
            raise Unknown(REFUSED, why=f"a token of form {p.form}")
        return Token(
            user_id=_long(p.user),
            methods=tuple(m for i, m in enumerate(METHODS) if p.methods >> i & 1),
            target=TARGETS[p.target],
            target_id=_long(p.scope),
            issued_at=p.issued_at,
            expires_at=p.expires_at,
            audit_ids=tuple(_letters(a) for a in p.audit),
            application_credential_id=_long(p.credential),
        )
    except (msgspec.MsgspecError, IndexError, UnicodeDecodeError):
        raise Unknown(REFUSED, why="a token whose inside makes no sense") from None


def audit_id(hex: str) -> str:
    """22 letters that name a token without being one."""
    return _letters(bytes.fromhex(hex))


def _short(id: str) -> bytes:
    """A 32-digit hex id is 16 bytes; others (`default`) are text behind a mark, and never 16 bytes long."""
    if len(id) == 32 and all(c in "0123456789abcdef" for c in id):
        return bytes.fromhex(id)
    text = b"=" + id.encode() if id else b""
    return b"=" + text if len(text) == 16 else text


def _long(id: bytes) -> str:
    return id.hex() if len(id) == 16 else id.lstrip(b"=").decode()


def _letters(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _bytes(letters: str) -> bytes:
    return base64.urlsafe_b64decode(letters + "=" * (-len(letters) % 4))


# ---- keys


class Keys:
    """Fernet keys in a directory of files named by numbers, 0600: the highest writes, all read.

    0 is the next one: it is already known everywhere when it begins to write (`rotate`), so processes that share
    the directory never meet a token they cannot read.
    """

    def __init__(self, directory: Path, clock: Clock, most: int = 3) -> None:
        self.directory, self.clock, self.most = directory, clock, most
        self.lock = threading.Lock()
        self.looked = -1e9
        if not self._files():
            self._first()
        self._load()

    def encrypt(self, raw: bytes, now: float) -> str:
        return self.fernet.encrypt_at_time(raw, int(now)).rstrip(b"=").decode()

    def decrypt(self, text: str, longest: int = LONGEST_TOKEN) -> bytes:
        """Raises Unknown. A token of a key we do not know yet lets us look into the directory, once a second."""
        if len(text) > longest or not text.isascii():
            raise Unknown(REFUSED, why="no token of ours")
        raw = text.encode() + b"=" * (-len(text) % 4)
        try:
            return self.fernet.decrypt(raw)
        except InvalidToken:
            pass
        if self._changed():
            try:
                return self.fernet.decrypt(raw)
            except InvalidToken:
                pass
        raise Unknown(REFUSED, why="no token of ours")

    def rotate(self) -> None:
        """The next key begins to write, a new next one is made, and the oldest beyond `most` are forgotten."""
        with self.lock:
            files = self._files()
            newest = max(files) + 1
            files[0].rename(self.directory / str(newest))
            _secret(self.directory / "0", Fernet.generate_key())
            for number in sorted(n for n in files if n)[: max(0, len(files) + 1 - self.most)]:
                files[number].unlink(missing_ok=True)
        self._load()

    def rotated_at(self) -> float:
        """When the present key began to be the next one, in seconds since 1970 (as the file system says)."""
        return max(f.stat().st_mtime for f in self._files().values())

    def _changed(self) -> bool:
        with self.lock:
            now = self.clock.now()
            if now - self.looked < 1:
                return False
            self.looked = now
            before = self.names
        self._load()
        return self.names != before

    def _load(self) -> None:
        files = self._files()
        order = sorted((n for n in files if n), reverse=True) + [n for n in files if n == 0]
        keys = [files[n].read_bytes().strip() for n in order]
        self.fernet, self.names = MultiFernet([Fernet(k) for k in keys]), frozenset(keys)

    def _files(self) -> dict[int, Path]:
        if not self.directory.is_dir():
            return {}
        return {int(f.name): f for f in self.directory.iterdir() if f.name.isdigit()}

    def _first(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("0", "1"):
            _secret(self.directory / name, Fernet.generate_key())


def _secret(path: Path, content: bytes) -> None:
    """Readable by its owner from its first moment on, and whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    draft.rename(path)


def kept_secret(path: Path, make: Any) -> str:
    """What the file holds; made by `make()` and written 0600 where there is none."""
    if path.exists():
        return path.read_text().strip()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret = str(make())
    _secret(path, secret.encode())
    return secret


# ---- passwords


class Passwords:
    """scrypt with N = 2^cost, r = 8, p = 1: at 14 it takes 16 MB and some 40 ms, and says so in its text."""

    def __init__(self, cost: int = 14) -> None:
        self.cost = cost
        self.nobody = f"$scrypt$ln={cost},r=8,p=1${_b64(os.urandom(16))}${_b64(os.urandom(64))}"

    def hash(self, password: str) -> str:
        """`$scrypt$ln=14,r=8,p=1$salt$hash`. Raises Invalid."""
        if not 0 < len(password) <= LONGEST_PASSWORD:
            raise Invalid(f"A password must have between 1 and {LONGEST_PASSWORD} characters.")
        salt = os.urandom(16)
        return f"$scrypt$ln={self.cost},r=8,p=1${_b64(salt)}${_b64(_scrypt(password, salt, self.cost, 8, 1))}"

    def right(self, password: str, kept: str | None) -> bool:
        """Is it? For nobody (None, "") it takes as long, and is not."""
        form = kept or self.nobody
        try:
            _, name, cost, salt, digest = form.split("$")
            n, r, p = (int(x.partition("=")[2]) for x in cost.split(","))
            assert name == "scrypt" and n <= 20 and r <= 16 and p <= 4
        except (ValueError, AssertionError):
            form, (_, name, cost, salt, digest) = "", self.nobody.split("$")
            n, r, p = self.cost, 8, 1
        made = _scrypt(password[:LONGEST_PASSWORD], _unb64(salt), n, r, p)
        return hmac.compare_digest(made, _unb64(digest)) and bool(kept) and bool(form)


def _scrypt(password: str, salt: bytes, ln: int, r: int, p: int) -> bytes:
    room = 128 * r * (1 << ln) + (1 << 21)
    return hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=salt, n=1 << ln, r=r, p=p, maxmem=room)


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).rstrip(b"=").decode()


def _unb64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4))


class Guesses:
    """Failed tries by whom: after `most` in a row, further ones are refused unheard for `pause_s`.

    In memory and per process: it shall make guessing slow, not be a record, and a restart forgets no more than the
    seconds of one pause.  Who does not exist is counted as
    who does, so that a refusal tells nothing.
    """

    def __init__(self, clock: Clock, most: int = 8, pause_s: float = 15, remembered: int = 10_000) -> None:
        self.clock, self.most, self.pause_s, self.remembered = clock, most, pause_s, remembered
        self.failed: dict[str, tuple[int, float]] = {}
        self.lock = threading.Lock()

    def locked(self, who: str) -> bool:
        count, at = self.failed.get(who, (0, 0.0))
        return bool(self.most) and count >= self.most and self.clock.now() < at + self.pause_s

    def wrong(self, who: str) -> None:
        now = self.clock.now()
        with self.lock:
            count, at = self.failed.pop(who, (0, now))
            if now >= at + self.pause_s:
                count = 0
            if len(self.failed) >= self.remembered:
                self.failed.pop(next(iter(self.failed)))
            self.failed[who] = (count + 1, now)

    def right(self, who: str) -> None:
        with self.lock:
            self.failed.pop(who, None)
