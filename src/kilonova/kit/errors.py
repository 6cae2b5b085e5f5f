"""Every way to fail, by meaning. Nothing here knows HTTP, SQL or a hypervisor.

A kind is a class; the sentence is the argument.  A new class is made when code must tell two cases apart, not
when sentences differ.  Kinds travel: over the bus and in the journal a trouble is a `Fault`.  How a kind looks
to a caller (status, fault name) is a table of the dialect that speaks to him: see `kit/http.py`.
"""

import msgspec


class Trouble(Exception):
    """`said` is for the caller; `why` is for the log and never leaves the process; `detail` is for operators only.

    `code` is a stable name for programs, where a dialect has such names (Neutron's type, Placement's code).
    """

    def __init__(self, said: str, *, why: str = "", code: str = "", detail: str = "") -> None:
        super().__init__(said)
        self.said, self.why, self.code, self.detail = said, why, code, detail


# ---- what a caller can meet


class Invalid(Trouble):
    """The request makes no sense."""


class Unknown(Trouble):
    """We do not know who asks."""


class Forbidden(Trouble):
    """We know who asks, and he may not."""


class NotFound(Trouble):
    """There is no such thing; or the caller may not know that there is."""


class Conflict(Trouble):
    """Makes sense, but not now."""


class OverQuota(Trouble):
    """Would be more than the caller's share."""


class NoCapacity(Trouble):
    """There is no room."""


class Unsupported(Trouble):
    """This cloud, host or driver cannot do that."""


class Unavailable(Trouble):
    """Try again; the only kind that a step retries."""


# ---- what a run can meet besides


class Refused(Trouble):
    """A host was asked, and said no."""


class HostGone(Trouble):
    """A host was asked, and is no more; what it held is swept when it returns."""


class Aborted(Trouble):
    """Somebody changed his mind."""


_kinds: list[type[Trouble]] = [Trouble, *Trouble.__subclasses__()]
KINDS: dict[str, type[Trouble]] = {c.__name__: c for c in _kinds}


class Fault(msgspec.Struct, frozen=True):
    """A trouble, written down."""

    kind: str
    said: str
    code: str = ""
    detail: str = ""

    @classmethod
    def of(cls, trouble: Trouble) -> "Fault":
        return cls(type(trouble).__name__, trouble.said, trouble.code, trouble.detail)

    def trouble(self) -> Trouble:
        return KINDS.get(self.kind, Trouble)(self.said, code=self.code, detail=self.detail)
