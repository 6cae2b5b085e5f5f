"""os-instance_usage_audit_log: how far the audit of a period has come, host by host.

Nobody audits here: what `compute.instance.exists` would tell can be asked of os-simple-tenant-usage at any time, and
of the notifications.  So the period is told, and that no host has been through it.
"""

from datetime import UTC, datetime
from typing import Any

from kilonova.api.registry import R
from kilonova.kit.clock import iso_us
from kilonova.kit.errors import Invalid
from kilonova.kit.routes import Call
from kilonova.store import hosts

PLACE, RULE = "/v2.1/os-instance_usage_audit_log", "os_compute_api:os-instance-usage-audit-log"


@R.get(PLACE, policy=f"{RULE}:list")
def index(call: Call) -> dict[str, Any]:
    return {"instance_usage_audit_logs": _log(call, call.world.clock.now())}


@R.get(PLACE + "/{id}", policy=f"{RULE}:show")
def show(call: Call, id: str) -> dict[str, Any]:
    """`id`: "2026-11-20 12:00:00", with a fraction perhaps."""
    for form in ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M:%S.%f"):
        try:
            at = datetime.strptime(id, form).replace(tzinfo=UTC).timestamp()
        except (ValueError, OverflowError):
            continue
        if at > 0:
            return {"instance_usage_audit_log": _log(call, at)}
    raise Invalid(f"Invalid timestamp for date {id[:60]}")


def _log(call: Call, before: float) -> dict[str, Any]:
    begin, end = last_month(before)
    with call.world.db.read() as tx:
        names = [s.host for s in hosts.services(tx, binary=hosts.COMPUTE)]
    return {
        "period_beginning": iso_us(begin),
        "period_ending": iso_us(end),
        "num_hosts": len(names),
        "num_hosts_done": 0,
        "num_hosts_running": 0,
        "num_hosts_not_run": len(names),
        "hosts_not_run": sorted(names),
        "total_instances": 0,
        "total_errors": 0,
        "overall_status": f"0 of {len(names)} hosts done. 0 errors.",
        "log": {},
    }


def last_month(before: float) -> tuple[float, float]:
    """The last whole month that had ended by then."""
    at = datetime.fromtimestamp(before, UTC)
    end = datetime(at.year, at.month, 1, tzinfo=UTC)
    year, month = (end.year, end.month - 1) if end.month > 1 else (end.year - 1, 12)
    return datetime(year, month, 1, tzinfo=UTC).timestamp(), end.timestamp()
