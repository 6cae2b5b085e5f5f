"""Explain: why a server is on its host, or on none. Kilonova's own; administrators see it, unless policy says otherwise."""

from typing import Any

from kilonova.api.registry import R, the_server
from kilonova.kit.routes import Call
from kilonova.store import choices

RULE = "compute:servers:explain"


@R.get("/v2.1/servers/{server_id}/explain", policy=RULE, late=True)
def explain(call: Call, server_id: str) -> dict[str, Any]:
    """Each time that a host was chosen for it, the newest first: which rules turned away how many, who was weighed how."""
    with call.world.db.read() as tx:
        server = the_server(call, tx, server_id, dead=True)
        found = choices.of_server(tx, server_id)
    return {"explain": {"server": server.id, "host": server.host, "choices": choices.shown(found)}}
