"""os-volumes_boot, to 2.102: servers under another name, from the time when to boot from a volume was something special.

Read from the registry when everything else is in it.
"""

from dataclasses import replace

from kilonova.api.registry import R
from kilonova.kit.routes import Route
from kilonova.kit.versions import Span, span

SERVERS, BOOT = "/v2.1/servers", "/v2.1/os-volumes_boot"
PLACES = {("GET", ""), ("POST", ""), ("GET", "/detail"), ("GET", "/{id}"), ("PUT", "/{id}"), ("DELETE", "/{id}")}
ACTIONS = frozenset(
    "confirmResize revertResize reboot resize rebuild createImage os-start os-stop trigger_crash_dump".split()
)
LAST = span("2.1-2.102")


def mirror() -> None:
    """Once, after all groups are there."""
    if any(r.path.startswith(BOOT) for r in R):
        return
    R.all += [_under(r) for r in R.all if _is_one(r) and r.versions.first <= LAST.last]


def _is_one(r: Route) -> bool:
    if r.action is not None:
        return r.path == f"{SERVERS}/{{id}}/action" and r.action in ACTIONS
    return r.path.startswith(SERVERS) and (r.method, r.path.removeprefix(SERVERS)) in PLACES


def _under(r: Route) -> Route:
    versions = Span(r.versions.first, min(r.versions.last, LAST.last))
    return replace(r, path=BOOT + r.path.removeprefix(SERVERS), versions=versions)
