"""Networks that are there without anybody asking for them twice: the cloud's first ones, and a project's automatic one."""

from kilonova.companions.network import frame, networks, routers, subnets
from kilonova.companions.network.frame import R, View
from kilonova.companions.network.networks import NetworkWish
from kilonova.companions.network.routers import Gateway
from kilonova.companions.network.subnets import SubnetWish
from kilonova.companions.network.wiring import LEG, weave
from kilonova.companions.network.world import World
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, NotFound
from kilonova.kit.routes import Call
from kilonova.store import networks as store

N = store.networks.c


# ---- the cloud's first


def bootstrap(world: World, project_id: str, *, way_out: bool = True) -> bool:
    """`public`, which leads out and has floating IPs, `private` for everybody, and the router between them.

    Without a `way_out` there is `private` alone: on hosts that make no networks a floating IP would lead nowhere.

    They belong to `project_id` (the administrator's).  Only where there is no network at all: what somebody
    deleted or changed stays so.  Were they made?  The wires are not told yet: see `rewire`.
    """
    return world.change(_bootstrap, world, project_id, way_out)


def _bootstrap(tx: Tx, world: World, project: str, way_out: bool) -> bool:
    if store.find(tx, store.Network):
        return False
    c = world.config
    private = networks.new(tx, world, project, NetworkWish(name="private", description="For everybody", shared=True))
    inner = _subnet(tx, world, project, private, "private", c.private_cidr)
    if not way_out:
        return True
    public = networks.new(
        tx,
        world,
        project,
        NetworkWish(name="public", description="The way out", router_external=True, is_default=True),
    )
    _subnet(tx, world, project, public, "public", c.public_cidr, dhcp=False)
    _join(tx, world, project, "router", public, private, inner)
    return True


def _subnet(
    tx: Tx, world: World, project: str, network: store.Network, name: str, cidr: str, *, dhcp: bool = True
) -> store.Subnet:
    wish = SubnetWish(network_id=network.id, name=name, cidr=cidr, enable_dhcp=dhcp)
    return subnets.new(tx, world, project, store.Place(network, [], None), wish)


def _join(
    tx: Tx, world: World, project: str, name: str, out: store.Network, inner: store.Network, subnet: store.Subnet
) -> store.Router:
    """A router from a network's subnet to the way out."""
    router = routers.new(tx, world, project, {"name": name, "external_gateway_info": Gateway(network_id=out.id)})
    routers.leg(tx, world, router, inner, subnet)
    return router


# ---- a project's automatic one

PATH = "/v2.0/auto-allocated-topology/{project}"
NAME = "auto_allocated_network"


@R.get(PATH, policy="get_auto_allocated_topology", late=True)
def auto(call: Call, project: str) -> View:
    """`networks: auto`: the project's automatic network, made with subnet and router when it is first asked for.

    `fields=dry-run` only says whether that would go.
    """
    project = _whose(call, project, "get_auto_allocated_topology")
    if "dry-run" in (call.raw_query or "") and "dry-run" in [
        f for v in frame.asked(call).get("fields", []) for f in v.split(",")
    ]:
        with call.world.db.read() as tx:
            if _known(tx, project) is None:
                _way_out(tx)
        return _view("dry-run=pass", project)
    with call.world.db.read() as tx:
        known = _known(tx, project)
    if known is None:
        known = call.world.change(_allocate, call.world, project)
        weave(call.world)
    return _view(known.id, project)


@R.delete(PATH, ok=204, policy="delete_auto_allocated_topology", late=True)
def forget(call: Call, project: str) -> None:
    project = _whose(call, project, "delete_auto_allocated_topology")

    def work(tx: Tx) -> None:
        network = _known(tx, project)
        if network is None:
            raise NotFound(f"No auto-allocated topology for tenant {project}.", code="AutoAllocatedTopologyNotFound")
        p = store.ports.c
        for leg in store.find(tx, store.Port, p.network_id == network.id, p.device_owner == LEG):
            router = store.get(tx, store.Router, leg.device_id)
            store.remove(tx, store.Port, leg.id)
            if router is not None and router.name == ROUTER and router.project_id == project:
                routers.drop(tx, call.world, router)
        networks.drop(tx, network)

    call.world.change(work)
    weave(call.world)


ROUTER = "auto_allocated_router"


def _whose(call: Call, project: str, rule: str) -> str:
    mine = call.context.project_id
    if project in ("null", "None", ""):
        project = mine or ""
    call.check({**frame.STRANGER, "project_id": project}, rule)
    if not project or len(project) > 255 or "\x00" in project:
        raise NotFound("No auto-allocated topology for nobody.", code="AutoAllocatedTopologyNotFound")
    return project


def _view(id: str, project: str) -> View:
    return {"auto_allocated_topology": {"id": id, "project_id": project, "tenant_id": project}}


def _known(tx: Tx, project: str) -> store.Network | None:
    found = store.find(tx, store.Network, N.auto_of == project)
    return found[0] if found else None


def _way_out(tx: Tx) -> store.Network:
    """Raises Conflict where the administrator made no default external network."""
    found = store.find(tx, store.Network, N.is_default.is_(True), N.router_external.is_(True))
    if not found:
        raise Conflict("Deployment error: No default router:external network.", code="AutoAllocationFailure")
    return found[0]


def _allocate(tx: Tx, world: World, project: str) -> store.Network:
    if (known := _known(tx, project)) is not None:
        return known
    out = _way_out(tx)
    network = networks.new(tx, world, project, NetworkWish(name=NAME), auto_of=project)
    inner = _subnet(tx, world, project, network, "auto_allocated_subnet_v4", world.config.auto_cidr)
    _join(tx, world, project, ROUTER, out, network, inner)
    return network
