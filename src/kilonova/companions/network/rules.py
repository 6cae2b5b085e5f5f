"""Who may what on the network: the rule names of the Network API, so that operators' `policy.yaml` fits.

`shared` and `router:external` are asked of the target: oslo.policy compares a literal with what the target says.
"""

from kilonova.kit.policy import Rule

ADMIN = "rule:context_is_admin"
TRUSTED = "rule:context_is_admin or rule:service"
READER = "rule:context_is_admin or rule:service or (rule:reads and project_id:%(project_id)s)"
MEMBER = "rule:context_is_admin or rule:service or (rule:writes and project_id:%(project_id)s)"
PARENT_READER = f"({READER}) or (rule:reads and rule:network_owner)"
PARENT_MEMBER = f"({MEMBER}) or (rule:writes and rule:network_owner)"
OF_NETWORK = f"{TRUSTED} or (rule:writes and rule:network_owner)"
ANY = "rule:context_is_admin or rule:service or rule:reads"

# fmt: off
_TERMS = [
    Rule("context_is_admin", "role:admin", "Who sees and may do everything"),
    Rule("service",          "role:service", "Other services of the cloud: they bind ports"),
    Rule("reads",            "role:reader or role:member or role:manager", "Who may look at his project's things"),
    Rule("writes",           "role:member or role:manager", "Who may change his project's things"),
    Rule("network_owner",    "project_id:%(network:project_id)s", "Whose network it is that the thing is a part of"),
    Rule("shared",           "True:%(shared)s", "Networks for all projects"),
    Rule("external",         "True:%(router:external)s", "Networks that lead out"),
]

_RULES = {
    "create_network": MEMBER, "get_network": f"({READER}) or rule:shared or rule:external",
    "update_network": MEMBER, "delete_network": MEMBER,
    "create_network:shared": ADMIN, "create_network:router:external": ADMIN, "create_network:is_default": ADMIN,
    "create_network:port_security_enabled": MEMBER, "create_network:provider:network_type": ADMIN,
    "create_network:provider:physical_network": ADMIN, "create_network:provider:segmentation_id": ADMIN,
    "update_network:shared": ADMIN, "update_network:router:external": ADMIN, "update_network:is_default": ADMIN,
    "update_network:port_security_enabled": MEMBER, "update_network:provider:network_type": ADMIN,
    "update_network:provider:physical_network": ADMIN, "update_network:provider:segmentation_id": ADMIN,
    "get_network:provider:network_type": ADMIN, "get_network:provider:physical_network": ADMIN,
    "get_network:provider:segmentation_id": ADMIN,

    "create_subnet": OF_NETWORK, "get_subnet": f"({PARENT_READER}) or rule:shared or rule:external",
    "update_subnet": PARENT_MEMBER, "delete_subnet": PARENT_MEMBER,

    "create_port": MEMBER, "get_port": PARENT_READER, "update_port": PARENT_MEMBER, "delete_port": PARENT_MEMBER,
    "create_port:device_owner": OF_NETWORK, "create_port:mac_address": OF_NETWORK,
    "create_port:fixed_ips": OF_NETWORK, "create_port:fixed_ips:ip_address": OF_NETWORK,
    "create_port:fixed_ips:subnet_id": f"{OF_NETWORK} or rule:shared",
    "create_port:port_security_enabled": OF_NETWORK, "create_port:allowed_address_pairs": OF_NETWORK,
    "create_port:binding:host_id": TRUSTED, "create_port:binding:profile": TRUSTED,
    "create_port:binding:vnic_type": MEMBER,
    "update_port:device_owner": OF_NETWORK, "update_port:mac_address": TRUSTED,
    "update_port:fixed_ips": OF_NETWORK, "update_port:fixed_ips:ip_address": OF_NETWORK,
    "update_port:fixed_ips:subnet_id": f"{OF_NETWORK} or rule:shared",
    "update_port:port_security_enabled": OF_NETWORK, "update_port:allowed_address_pairs": OF_NETWORK,
    "update_port:binding:host_id": TRUSTED, "update_port:binding:profile": TRUSTED,
    "update_port:binding:vnic_type": TRUSTED,
    "get_port:binding:host_id": TRUSTED, "get_port:binding:profile": TRUSTED,
    "get_port:binding:vif_type": TRUSTED, "get_port:binding:vif_details": TRUSTED,
    "create_port_binding": TRUSTED, "get_port_binding": TRUSTED, "delete_port_binding": TRUSTED,
    "activate": TRUSTED,

    "create_security_group": MEMBER, "get_security_group": READER, "update_security_group": MEMBER,
    "delete_security_group": MEMBER,
    "create_security_group_rule": MEMBER, "get_security_group_rule": READER, "delete_security_group_rule": MEMBER,
    "get_default_security_group_rule": ANY,

    "create_router": MEMBER, "get_router": READER, "update_router": MEMBER, "delete_router": MEMBER,
    "create_router:external_gateway_info": MEMBER, "create_router:external_gateway_info:enable_snat": ADMIN,
    "create_router:external_gateway_info:external_fixed_ips": ADMIN,
    "update_router:external_gateway_info": MEMBER, "update_router:external_gateway_info:enable_snat": ADMIN,
    "update_router:external_gateway_info:external_fixed_ips": ADMIN,
    "add_router_interface": MEMBER, "remove_router_interface": MEMBER,
    "add_extraroutes": MEMBER, "remove_extraroutes": MEMBER,

    "create_floatingip": MEMBER, "create_floatingip:floating_ip_address": ADMIN, "get_floatingip": READER,
    "update_floatingip": MEMBER, "delete_floatingip": MEMBER,

    "get_quota": ANY, "update_quota": ADMIN, "delete_quota": ADMIN, "list_quotas": ADMIN,
    "get_agent": TRUSTED, "get_availability_zone": ANY, "get_network_ip_availability": ADMIN,
    "get_auto_allocated_topology": READER, "delete_auto_allocated_topology": MEMBER,
    "get_subnetpool": ANY, "get_extension": ANY,
}
# fmt: on

RULES = [*_TERMS, *(Rule(name, check) for name, check in _RULES.items())]
NAMES = frozenset(_RULES)
