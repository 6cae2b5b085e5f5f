"""Identity, images, networks, volumes and shares of our own, put together: in the one process of `up`, or in one of their own."""

from collections.abc import Callable, Container, Mapping

from kilonova.cli.doors import Doors
from kilonova.cli.state import Secrets
from kilonova.clients import SERVICE_USER, Account, Carrier, Image, Inside, Login, Session
from kilonova.companions import identity, image, network, share, volume
from kilonova.model.wiring import Wiring


class Everybody:
    """As a set of hosts: all there are and will be."""

    def __contains__(self, host: object) -> bool:
        return True


class Companions:
    """Identity, images, networks, volumes and shares of our own. `services`: what the catalog says; None: that all are here.

    `wires`: the hosts whose data plane is here; None where there is none.  `apart`: hosts that make no networks.
    `planes`: who knows the hosts that are other machines.
    """

    def __init__(
        self,
        doors: Doors,
        secrets: Secrets,
        url: str,
        *,
        services: Mapping[str, str] | None,
        wires: Mapping[str, Callable[[Wiring], None]] | None,
        apart: Container[str],
        planes: network.Planes | None = None,
    ) -> None:
        p, db = doors.process, doors.db
        config, state = p.config, p.state
        self.process = p
        home = state.path / "identity"
        self.realm = identity.open_realm(db, p.clock, p.ids, config.identity, home, config.api.public_url)
        self.first = identity.bootstrap(
            self.realm,
            home,
            admin_password=secrets.admin_password,
            service_password=secrets.service_password,
            region=config.identity.region,
            services=services,
        )
        images = config.image.directory or state.path / "images"
        self.images = image.open_store(db, p.clock, p.ids, config.image, images)
        image.recover(self.images)
        self.networks = network.World(db, p.clock, p.ids, config.network, wires, apart, planes)
        network.bootstrap(self.networks, self.first.admin_project_id, way_out=wires is None or bool(wires))
        doors.open("identity", identity.service(self.realm, config.policy.file))
        doors.open("image", image.service(self.images, self.realm.gate, config.policy.file))
        doors.open("network", network.make_service(self.networks, self.realm.gate, config.policy.file))
        self.login = Login(SERVICE_USER, self.first.service_password)
        self.carriers: dict[str, Carrier] = {
            name: Inside(doors.services[name], f"{url}/{name}") for name in ("identity", "image", "network")
        }
        self.volumes = volume.open_store(
            db,
            p.clock,
            p.ids,
            config.volume,
            config.volume.directory or state.path / "volumes",
            images=Image(Session("image", self.carriers["image"], p.clock, self.account)),
            host=p.name,
            authenticate=self.realm.gate,
            crew=volume.Crew(config.volume.threads),
        )
        doors.open("volume", volume.make_service(self.volumes, config.policy.file))
        self.shares = share.open_store(
            db,
            p.clock,
            p.ids,
            config.share,
            config.share.directory or state.path / "shares",
            authenticate=self.realm.gate,
        )
        doors.open("share", share.make_service(self.shares, config.policy.file))
        for name in ("volume", "share"):
            self.carriers[name] = Inside(doors.services[name], f"{url}/{name}")

    @property
    def account(self) -> Account:
        return Account(self.carriers["identity"], self.login, self.process.clock)

    def start(self) -> None:
        if self.volumes.crew is not None:
            self.volumes.crew.start()
        volume.recover(self.volumes)
        share.recover(self.shares)

    def close(self) -> None:
        if self.volumes.crew is not None:
            self.volumes.crew.close()
