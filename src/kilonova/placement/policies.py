"""Who may what in Placement: the rule names of its API, so that operators' `policy.yaml` fits."""

from kilonova.kit.policy import Rule

TRUSTED = "rule:admin_or_service_api"

# fmt: off
RULES = [
    Rule("context_is_admin",     "role:admin", "Who may do everything"),
    Rule("admin_api",            "role:admin", "Operators"),
    Rule("service_api",          "role:service", "Other services of the cloud"),
    Rule("admin_or_service_api", "role:admin or role:service", "Those for whom this API is"),
    Rule("admin_or_project_reader_or_service_api", "role:admin or role:service or (role:reader and project_id:%(project_id)s)",
         "Those, and who may look at the project"),
    *(Rule(f"placement:{name}", TRUSTED) for name in (
        "resource_providers:list", "resource_providers:create", "resource_providers:show", "resource_providers:update",
        "resource_providers:delete",
        "resource_classes:list", "resource_classes:create", "resource_classes:show", "resource_classes:update",
        "resource_classes:delete",
        "resource_providers:inventories:list", "resource_providers:inventories:create",
        "resource_providers:inventories:show", "resource_providers:inventories:update",
        "resource_providers:inventories:delete",
        "resource_providers:aggregates:list", "resource_providers:aggregates:update",
        "resource_providers:usages",
        "traits:list", "traits:show", "traits:update", "traits:delete",
        "resource_providers:traits:list", "resource_providers:traits:update", "resource_providers:traits:delete",
        "allocations:manage", "allocations:list", "allocations:update", "allocations:delete",
        "resource_providers:allocations:list",
        "allocation_candidates:list",
    )),
    Rule("placement:usages", "rule:admin_or_project_reader_or_service_api", "What a project holds"),
    Rule("placement:reshaper:reshape", "rule:service_api", "Rewrite inventories and allocations at once"),
]
# fmt: on
