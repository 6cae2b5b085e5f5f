"""How much a caller's project may have: by quota sets, or by what the identity service says (unified limits).

Asked before a transaction begins: the identity service may be far away.
"""

from kilonova.api.registry import World
from kilonova.kit.errors import NotFound
from kilonova.kit.routes import Call
from kilonova.model.limits import Unified
from kilonova.store import servers
from kilonova.store.quotas import Most, exceeded


def allowance(call: Call, project_id: str | None = None) -> Most:
    """Of this project, or the caller's own. Raises Unavailable where the identity service does not answer."""
    world: World = call.world
    said = world.config.unified_limits
    if not said.enabled:
        return world.config.quota
    project = (call.context.project_id or "") if project_id is None else project_id
    if (known := call.kept.get(("allowance", project))) is None:
        region = world.config.identity.region
        registered, own = world.neighbours.identity.limits("compute", region, project)
        known = Unified(project, registered, own, frozenset(said.resources), said.strategy == "ignore")
        call.kept["allowance", project] = known
    assert isinstance(known, Unified)
    return known


def allowance_of(call: Call, server_id: str) -> Most:
    """Of the project whose server it is; who asks for none that there is hears of that later."""
    world: World = call.world
    if not world.config.unified_limits.enabled:
        return world.config.quota
    try:
        with world.db.read() as tx:
            project_id = servers.get(tx, server_id).project_id
    except NotFound:
        return world.config.quota
    return allowance(call, project_id)


def at_most(most: Most, word: str, wanted: int, said: str) -> None:
    """Of something that one request holds, by the word of quota sets. Raises OverQuota, with `said` or as unified limits say it."""
    allowed = most.quotas()[word] if isinstance(most, Unified) else getattr(most, word)
    if wanted > allowed >= 0:
        raise exceeded(most, word, wanted, 0, said)
