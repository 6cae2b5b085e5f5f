"""Who may do more with a companion than its users: operators, and the services of the cloud."""

from kilonova.kit.errors import Unknown
from kilonova.kit.routes import Call


def trusted(call: Call) -> bool:
    """Does an operator ask, or a service of the cloud, in its own name or beside a user's?"""
    return call.context.is_admin or bool({"service", "admin"} & _beside(call))


def serving(call: Call) -> bool:
    """Does a service of the cloud ask? Operators are none."""
    return "service" in _beside(call)


def _beside(call: Call) -> frozenset[str]:
    """The roles of a service that asks in its own name, or beside a user's by a token of its own."""
    if "service" in call.context.roles:
        return call.context.roles
    token = call.headers("X-Service-Token")
    try:
        roles: frozenset[str] = call.world.authenticate(token).roles if token else frozenset()
    except Unknown:
        return frozenset()
    return roles
