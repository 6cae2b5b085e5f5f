"""The list of extensions, as it was when there were any: clients of old look names up in it. Nothing is switched by it."""

from typing import Any

from kilonova.api.registry import R
from kilonova.kit.errors import NotFound
from kilonova.kit.routes import Call

POLICY = "os_compute_api:extensions"
NAMESPACE = "http://docs.openstack.org/compute/ext/fake_namespace/api/v2"
UPDATED = "2014-12-03T00:00:00Z"

# Aliases, with the name where it does not follow from the alias.
ALIASES = """
NMN=Multinic OS-DCF=DiskConfig OS-EXT-AZ=ExtendedAvailabilityZone OS-EXT-IMG-SIZE=ImageSize OS-EXT-IPS=ExtendedIps
OS-EXT-IPS-MAC=ExtendedIpsMac OS-EXT-SRV-ATTR=ExtendedServerAttributes OS-EXT-STS=ExtendedStatus
OS-FLV-DISABLED=FlavorDisabled OS-FLV-EXT-DATA=FlavorExtraData OS-SCH-HNT=SchedulerHints OS-SRV-USG=ServerUsage
os-access-ips=AccessIPs os-admin-actions os-admin-password os-agents os-aggregates os-assisted-volume-snapshots
os-attach-interfaces os-availability-zone os-baremetal-ext-status os-baremetal-nodes os-block-device-mapping
os-block-device-mapping-v2-boot os-cell-capacities os-cells os-certificates os-cloudpipe os-cloudpipe-update
os-config-drive os-console-auth-tokens os-console-output os-consoles os-create-backup os-create-server-ext
os-deferred-delete os-evacuate os-extended-evacuate-find-host os-extended-floating-ips os-extended-hypervisors
os-extended-networks os-extended-quotas os-extended-rescue-with-image os-extended-services os-extended-services-delete
os-extended-status os-extended-volumes os-fixed-ips os-flavor-access os-flavor-extra-specs os-flavor-manage
os-flavor-rxtx os-flavor-swap os-floating-ip-dns os-floating-ip-pools os-floating-ips os-floating-ips-bulk os-fping
os-hide-server-addresses os-hosts os-hypervisor-status os-hypervisors os-instance-actions
os-instance_usage_audit_log=OSInstanceUsageAuditLog os-keypairs os-lock-server os-migrate-server os-migrations
os-multiple-create os-networks os-networks-associate os-pause-server os-personality os-preserve-ephemeral-rebuild
os-quota-class-sets os-quota-sets os-remote-consoles os-rescue os-security-group-default-rules os-security-groups
os-server-diagnostics os-server-external-events os-server-group-quotas os-server-groups os-server-list-multi-status
os-server-password os-server-sort-keys os-server-start-stop os-services os-shelve os-simple-tenant-usage
os-suspend-server os-tenant-networks os-used-limits os-used-limits-for-admin os-user-data os-user-quotas
os-virtual-interfaces os-volume-attachment-update os-volumes
"""


def _one(alias: str, _: str, name: str) -> dict[str, Any]:
    words = alias.removeprefix("os-").replace("_", "-").split("-")
    return {
        "alias": alias,
        "name": name or "".join(w[:1].upper() + w[1:] for w in words),
        "description": "Part of the Compute API since 2.1.",
        "links": [],
        "namespace": NAMESPACE,
        "updated": UPDATED,
    }


EXTENSIONS = {alias: _one(alias, eq, name) for alias, eq, name in (a.partition("=") for a in ALIASES.split())}


@R.get("/v2.1/extensions", policy=POLICY)
def index(call: Call) -> dict[str, Any]:
    return {"extensions": [EXTENSIONS[alias] for alias in sorted(EXTENSIONS)]}


@R.get("/v2.1/extensions/{id}", policy=POLICY)
def show(call: Call, id: str) -> dict[str, Any]:
    if id not in EXTENSIONS:
        raise NotFound("The resource could not be found.")
    return {"extension": EXTENSIONS[id]}
