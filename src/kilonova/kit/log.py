"""The log: said once, in one shape, with the request it belongs to and without secrets.

`setup` is called once by whoever starts the process; everybody else writes `logging.getLogger(__name__)` and
knows nothing of this file but `about`, which names what the lines inside are about:

    with log.about(request_id=call.request_id, server=server.id):
        ...

Secrets are kept out in two ways.  Values that we know (configuration) are registered with `hide` and never
printed, wherever they turn up.  Values that we do not know are recognised by their surroundings: a URL with a
password, a key called password, a token's header.  The second way is a net, not a licence: bodies and headers
are not logged at all.
"""

import logging
import logging.handlers
import re
import sys
import threading
from collections.abc import Mapping
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, TextIO
from urllib.parse import quote

import msgspec

HIDDEN = "***"
SHORTEST = 6  # a hidden word of three letters would make the log unreadable, and tell what it hides

_about: ContextVar[Mapping[str, str]] = ContextVar("about", default=MappingProxyType({}))


class about:
    """Inside, every line carries these names (`request_id`, `global_request_id`, `run`, `server`, `host`, …).

    Nests; an inner name wins; a name that is None or empty is left out.  Costs under a microsecond.
    """

    __slots__ = ("names", "token")

    def __init__(self, **names: str | None) -> None:
        self.names = {k: v for k, v in names.items() if v}

    def __enter__(self) -> None:
        self.token: Token[Mapping[str, str]] = _about.set({**_about.get(), **self.names})

    def __exit__(self, *_: object) -> None:
        _about.reset(self.token)


def named() -> Mapping[str, str]:
    """What the present line would be about. To hand over to another thread: `with about(**named()): …`"""
    return _about.get()


def request_id() -> str | None:
    return _about.get().get("request_id")


def setup(
    *,
    level: str = "info",
    format: str = "plain",
    file: Path | None = None,
    stream: TextIO | None = None,
    levels: Mapping[str, str] | None = None,
    access: bool = False,
) -> None:
    """Let the process log: to `file` (may be moved away by logrotate), else to `stream`, else to stderr.

    `level` is for our own lines; libraries are heard from `warning` up, so that no third party fills the log.
    `levels` names exceptions by logger (`{"keystoneauth": "debug"}`).  `access` adds a line for each request.
    Calling it again replaces what was set before.
    """
    handler: logging.Handler
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.WatchedFileHandler(file, encoding="utf-8")
    else:
        handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Json() if format == "json" else Plain())

    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h.formatter, Plain | Json)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)

    quiet = {"urllib3": "error", "stevedore": "error", "kilonova.access": "info" if access else "warning"}
    for name, at in {"": "warning", "kilonova": level, **quiet, **(levels or {})}.items():
        logging.getLogger(name).setLevel(at.upper())
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.captureWarnings(True)
    sys.excepthook = _died
    threading.excepthook = _thread_died


def hide(secret: str) -> None:
    """Never print this value. For the few that live as long as the process; others must not reach a log at all."""
    global _known
    if len(secret) >= SHORTEST:
        with _lock:
            _hidden.update({secret, quote(secret, safe="")})
            _known = re.compile("|".join(re.escape(s) for s in sorted(_hidden, key=len, reverse=True)))


def clean(text: str) -> str:
    """`text` without what looks like, or is known to be, a secret."""
    if _known:
        text = _known.sub(HIDDEN, text)
    low = text.lower()
    if any(mark in low for mark in MARKS):  # most lines have none, and are spared 40 µs
        for pattern, instead in NET:
            text = pattern.sub(instead, text)
    return text


# ---- what a line looks like


class Plain(logging.Formatter):
    """`12:00:00.123 INFO  conductor.create  spawned on host-3   request_id=req-… server=…`, for people."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        name = record.name.removeprefix("kilonova.")
        names = "".join(f" {k}={v}" for k, v in _names(record).items())
        line = f"{at} {record.levelname[:5]:5} {name:20} {visible(record.getMessage())}{'  ' + visible(names) if names else ''}"
        trace = _trace(self, record)
        return clean(line + "".join(f"\n    {x}" for x in trace.splitlines()))


class Json(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, the names of `about`, trace."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": clean(record.getMessage()),
            **{k: clean(v) for k, v in _names(record).items()},
        }
        if trace := _trace(self, record):
            line["trace"] = clean(trace)
        return msgspec.json.encode(line).decode()


def visible(text: str) -> str:
    """Control characters written out, so that a server's name can neither forge a line nor talk to a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _names(record: logging.LogRecord) -> Mapping[str, str]:
    """The names of `about`, and those that this one line was given: `log.info(…, extra={"about": {"port": id}})`."""
    own: Mapping[str, Any] | None = getattr(record, "about", None)
    return {**_about.get(), **{k: str(v) for k, v in own.items()}} if own else _about.get()


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)


def _died(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        logging.getLogger("kilonova").critical("ended by an error nobody expected", exc_info=(kind, error, trace))


def _thread_died(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit and args.exc_value is not None:
        name = args.thread.name if args.thread else "?"
        exc_info = (args.exc_type, args.exc_value, args.exc_traceback)
        logging.getLogger("kilonova").critical("thread %s ended by an error nobody expected", name, exc_info=exc_info)


_hidden: set[str] = set()
_known: re.Pattern[str] | None = None
_lock = threading.Lock()

# A key that *ends* in one of these words holds a secret (`adminPass`, `db_password`, `X-Auth-Token`);
# one that only contains it (`token_lifetime_s`) does not.
SECRET_WORDS = (
    r"(?:password|passwd|adminpass|admin_pass|passphrase|secret|token|private_key|secret_key|fernet_key|signature)"
)
SECRET_HEADERS = r"(?:x-(?:auth|subject|service|storage)-token|x-instance-id-signature|authorization|cookie|set-cookie)"
# Without one of these nothing of the NET can be found.
MARKS = (
    "://",
    "pass",
    "secret",
    "token",
    "_key",
    "signature",
    "authorization",
    "cookie",
    "gaaaa",
    "bearer ",
    "basic ",
    "private key",
)

# fmt: off
NET = [(re.compile(pattern, re.IGNORECASE | re.DOTALL), instead) for pattern, instead in (
    # scheme://user:password@host
    (r"(\b[a-z][a-z0-9+.-]*://[^\s/:@'\"]*:)[^\s/@'\"]+@",                            r"\1***@"),
    # X-Auth-Token: …, Authorization: …, up to the end of the line
    (rf"(\b{SECRET_HEADERS}:\s*)[^\r\n]+",                                             r"\1***"),
    # 'X-Auth-Token': '…', "adminPass": "…", 'Authorization': '…'
    (rf"(['\"](?:[\w-]*{SECRET_WORDS}|{SECRET_HEADERS})['\"]\s*:\s*b?)(?:\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[^\s,}}\]]+)",
                                                                                       r"\1'***'"),
    # password=…, ?token=…&
    (rf"(\b[\w-]*{SECRET_WORDS}=b?)(?:\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[^\s&,;)}}\]'\"]+)",
                                                                                       r"\1***"),
    # a Fernet token, wherever it is
    (r"\bgAAAA[A-Za-z0-9_-]{40,}={0,2}",                                               HIDDEN),
    (r"(\b(?:bearer|basic)\s+)[A-Za-z0-9+/._~-]{8,}=*",                                r"\1***"),
    (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----",         "*** private key ***"),
)]
# fmt: on
