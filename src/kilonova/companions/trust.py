"""Who may do more with a companion than its users: operators, and the services of the cloud."""

from kilonova.kit.errors import Unknown
from kilonova.kit.routes import Call


def trusted(call: Call) -> bool:
    """Does an operator ask, or a service of the cloud, in its own name or beside a user's?"""
    if call.context.is_admin or "service" in call.context.roles:
        return True
    token = call.headers("X-Service-Token")
    if not token:
        return False
    try:
        return bool({"service", "admin"} & call.world.authenticate(token).roles)
    except Unknown:
        return False
