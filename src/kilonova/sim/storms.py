"""What users do to a simulated cloud: storms from a seed, and small stories told with a crash at every boundary."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kilonova.conductor import create, evacuate, live_migrate, resize
from kilonova.kit.errors import Conflict, Invalid, NotFound, OverQuota
from kilonova.kit.workflow import Step
from kilonova.sim.world import CALM, CROWDED, FLAVOR, LARGE, PINNED, Api, Faults, Sim
from kilonova.store import servers

VERBS: list[tuple[str, Any]] = [
    ("os-stop", None),
    ("os-start", None),
    ("reboot", {"type": "SOFT"}),
    ("reboot", {"type": "HARD"}),
    ("pause", None),
    ("unpause", None),
    ("suspend", None),
    ("resume", None),
    ("createImage", {"name": "image"}),
    ("createBackup", {"name": "backup", "backup_type": "daily", "rotation": 1}),
    ("rebuild", lambda sim: {"imageRef": sim.image_id}),
    ("changePassword", {"adminPass": "of the guest"}),
    ("trigger_crash_dump", None),
]
CALAMITIES = ["", "", "broker", "database", "companions", "cut off", "stopped", "without disk"]
# There and back again.
ERRANDS: list[list[tuple[str, Any]]] = [
    [("shelve", None), ("unshelve", None)],
    [("rescue", None), ("unrescue", None)],
]

MOVES: list[tuple[str, Any]] = [
    ("resize", {"flavorRef": LARGE.id}),
    ("migrate", None),
    ("os-migrateLive", {"host": None, "block_migration": "auto"}),
]
# Steps that may well last longer than somebody waits for them.
LONG: list[Step[Any, Any]] = [
    create.spawn, evacuate.spawn, live_migrate.prepare, live_migrate.send, resize.arrive, resize.come_back, resize.depart,
]  # fmt: skip
OPERATORS = {"migrate", "os-migrateLive"}  # acts that users may not ask for
VOLUME = "OpenStack-API-Version"
NOBODY = "00000000-0000-0000-0000-000000000000"
GIVES_UP_S = 40
RESTORABLE_S = 100  # in a cloud where deleted servers can be restored
GROUPS = (None, None, None, "anti-affinity", "affinity", "soft-anti-affinity")
VOLUMES = ("", "", "", "", "", "", "beside", "root")


ROOT = {"source_type": "image", "destination_type": "local", "boot_index": 0}
ON_VOLUME = {"source_type": "image", "destination_type": "volume", "volume_size": 1, "boot_index": 0}
BLANK = {"source_type": "blank", "destination_type": "volume", "volume_size": 1, "delete_on_termination": True}


class User:
    """Remembers the servers it asked for, by the name it gave them."""

    def __init__(self, sim: Sim) -> None:
        self.sim, self.api, self.known = sim, Api(sim, "api"), dict[str, str]()
        self.groups = dict[str, str]()
        self.migrating = set[str]()  # volumes, as their service sees it

    def create(self, name: str, group: str | None = None, volume: str = "", bare: bool = False) -> None:
        """`group`: a policy; the servers that name the same are in one group. `volume`: one is made with it, and goes
        with it; its "root" or another, "beside" that. `bare`: without a port, as others are by their names."""
        image = self.sim.image_id
        flavor = PINNED if name.endswith(("3", "7")) else FLAVOR  # some have a CPU of their own
        nets = "none" if bare or name.endswith(("2", "5")) else "auto"
        wish: dict[str, Any] = {"name": name, "flavorRef": flavor.id, "imageRef": image, "networks": nets}
        if volume == "beside":
            wish["block_device_mapping_v2"] = [ROOT | {"uuid": image}, BLANK]
        elif volume == "root":
            root = ON_VOLUME | {"uuid": image, "delete_on_termination": True}
            wish |= {"imageRef": "", "block_device_mapping_v2": [root]}
        hints = {} if group is None else {"os:scheduler_hints": {"group": self.group(group)}}
        status, body = self.api.ask("POST", "/servers", {"server": wish} | hints)
        if status == 202:
            self.known[name] = body["server"]["id"]
            self.sim.within_quota()

    def group(self, policy: str) -> str:
        if policy not in self.groups:
            wish = {"server_group": {"name": policy, "policy": policy}}
            status, body = self.api.ask("POST", "/os-server-groups", wish)
            if status != 200:
                return NOBODY
            self.groups[policy] = body["server_group"]["id"]
        return self.groups[policy]

    def delete(self, name: str) -> None:
        if name in self.known:
            self.api.ask("DELETE", f"/servers/{self.known[name]}")

    def act(self, name: str, verb: str, said: Any) -> None:
        if name in self.known:
            token = "admin" if verb in OPERATORS else "t"
            said = said(self.sim) if callable(said) else said  # it may depend on the cloud
            self.api.ask("POST", f"/servers/{self.known[name]}/action", {verb: said}, token=token)

    def abort(self, name: str) -> None:
        """Its live migration, if it is in one."""
        if name in self.known:
            path = f"/servers/{self.known[name]}/migrations"
            status, body = self.api.ask("GET", path, token="admin")
            for m in body["migrations"] if status == 200 else ():
                self.api.ask("DELETE", f"{path}/{m['id']}", token="admin")

    def force(self, name: str) -> None:
        """Its live migration shall come to an end."""
        if name in self.known:
            path = f"/servers/{self.known[name]}/migrations"
            status, body = self.api.ask("GET", path, token="admin")
            for m in body["migrations"] if status == 200 else ():
                self.api.ask("POST", f"{path}/{m['id']}/action", {"force_complete": None}, token="admin")

    def evacuate(self) -> None:
        """All servers of hosts that are down, as an operator does who looks at the list."""
        status, body = self.api.ask("GET", "/os-services?binary=nova-compute", token="admin")
        for host in [s["host"] for s in body["services"] if s["state"] == "down"] if status == 200 else ():
            status, body = self.api.ask("GET", f"/servers?all_tenants=1&host={host}", token="admin")
            for s in body["servers"] if status == 200 else ():
                self.sim.hosts[host].was_gone = True
                self.api.ask("POST", f"/servers/{s['id']}/action", {"evacuate": {}}, token="admin")

    def attach(self, name: str) -> None:
        """One NIC more, on the only network."""
        if name in self.known:
            self.api.ask("POST", f"/servers/{self.known[name]}/os-interface", {"interfaceAttachment": {}})

    def detach(self, name: str) -> None:
        """The newest of its NICs."""
        if name in self.known:
            path = f"/servers/{self.known[name]}/os-interface"
            status, body = self.api.ask("GET", path)
            if status == 200 and body["interfaceAttachments"]:
                self.api.ask("DELETE", f"{path}/{body['interfaceAttachments'][-1]['port_id']}")

    def attach_volume(self, name: str) -> None:
        """One that nobody has; else a new one."""
        if name in self.known:
            free = [v.id for v in self.api.neighbours.volume.list(status="available")]
            id = self.sim.dice.choice(free) if free else self.api.neighbours.volume.create(1).id
            path = f"/servers/{self.known[name]}/os-volume_attachments"
            self.api.ask("POST", path, {"volumeAttachment": {"volumeId": id}})

    def detach_volume(self, name: str) -> None:
        """The newest of its volumes."""
        if name in self.known:
            path = f"/servers/{self.known[name]}/os-volume_attachments"
            status, body = self.api.ask("GET", path)
            if status == 200 and body["volumeAttachments"]:
                self.api.ask("DELETE", f"{path}/{body['volumeAttachments'][-1]['volumeId']}")

    def attach_share(self, name: str) -> None:
        """The one that there is: more servers than one will have it."""
        if name in self.known:
            self.api.ask("POST", f"/servers/{self.known[name]}/shares", {"share": {"share_id": self.sim.share_id}})

    def detach_share(self, name: str) -> None:
        if name in self.known:
            self.api.ask("DELETE", f"/servers/{self.known[name]}/shares/{self.sim.share_id}")

    def swap_volume(self, name: str) -> None:
        """The newest of its volumes for a larger one, as the volume service asks for it while it migrates a volume."""
        if name not in self.known:
            return
        path, volumes = f"/servers/{self.known[name]}/os-volume_attachments", self.api.neighbours.volume
        status, body = self.api.ask("GET", path)
        if status == 200 and body["volumeAttachments"]:
            old, new = body["volumeAttachments"][-1]["volumeId"], volumes.create(2).id
            self.migrating.add(old)
            self.sim.at(GIVES_UP_S, self.give_up, old)
            self._migrates(old, "migrating")
            self.api.ask("PUT", f"{path}/{old}", {"volumeAttachment": {"volumeId": new}}, token="admin")

    def _migrates(self, volume: str, status: str) -> None:
        body = {"os-reset_status": {"migration_status": status}}
        self.api.neighbours.volume.session.tell("POST", f"/v3/volumes/{volume}/action", body=body)

    def give_up(self, volume: str) -> None:
        """The volume service ends a migration that no server swaps for, sooner or later."""
        if volume in self.migrating:
            self.sim.at(GIVES_UP_S, self.give_up, volume)
            if self.api.up and not self.sim.swapping():
                self.api.go(self._given_up, volume)

    def _given_up(self, volume: str) -> None:
        with suppress(NotFound):
            self._migrates(volume, "none")
        self.migrating.discard(volume)

    def extend_volume(self, name: str) -> None:
        """The newest of its volumes is made larger; its service tells the server."""
        if (volume := self._newest(name)) is not None:
            volumes = self.api.neighbours.volume
            with suppress(Conflict, Invalid, OverQuota):  # it is at something else just now, or large enough
                path, size = f"/v3/volumes/{volume}/action", volumes.show(volume).size_gb + 1
                volumes.session.tell(
                    "POST", path, body={"os-extend": {"new_size": size}}, headers={VOLUME: "volume 3.42"}
                )
                self._event("volume-extended", name, volume)

    def branch_volume(self, name: str) -> None:
        """The newest of its volumes goes on in another file, and comes together again: for a snapshot that is no more."""
        if (volume := self._newest(name)) is not None:
            info = {"snapshot_id": NOBODY, "type": "qcow2", "new_file": "next"}
            body = {"snapshot": {"volume_id": volume, "create_info": info}}
            self.api.ask("POST", "/os-assisted-volume-snapshots", body, token="admin")
            self.later(self.sim.dice.uniform(0, 30), self._merge, volume)

    def _merge(self, volume: str) -> None:
        info = f'{{"volume_id":"{volume}"}}'
        self.api.ask("DELETE", f"/os-assisted-volume-snapshots/{NOBODY}?delete_info={info}", token="admin")

    def _newest(self, name: str) -> str | None:
        if name not in self.known:
            return None
        status, body = self.api.ask("GET", f"/servers/{self.known[name]}/os-volume_attachments")
        found = body["volumeAttachments"] if status == 200 else []
        return found[-1]["volumeId"] if found else None

    def readdress(self, name: str) -> None:
        """The network service says that something of its ports is otherwise."""
        if name in self.known:
            self._event("network-changed", name)

    def _event(self, what: str, name: str, tag: str = "") -> None:
        event = {"name": what, "server_uuid": self.known[name]} | ({"tag": tag} if tag else {})
        self.api.ask("POST", "/os-server-external-events", {"events": [event]}, token="admin")

    def precache(self) -> None:
        """All hosts are to have the image beforehand."""
        status, body = self.api.ask("GET", "/os-aggregates", token="admin")
        known = [a["id"] for a in body["aggregates"]] if status == 200 else [0]
        if not known:
            status, body = self.api.ask("POST", "/os-aggregates", {"aggregate": {"name": "all"}}, token="admin")
            known = [body["aggregate"]["id"]] if status == 200 else [0]
        for host in self.sim.hosts:
            self.api.ask("POST", f"/os-aggregates/{known[0]}/action", {"add_host": {"host": host}}, token="admin")
        self.api.ask("POST", f"/os-aggregates/{known[0]}/images", {"cache": [{"id": self.sim.image_id}]}, token="admin")

    def later(self, delay: float, what: Callable[..., None], *args: Any) -> None:
        self.sim.at(delay, self._go, what, *args)

    def _go(self, what: Callable[..., None], *args: Any) -> None:
        if self.api.up:
            self.api.go(what, *args)


def storm(sim: Sim, round: int = 0) -> None:
    """Ten servers, made, tossed about and deleted at any time within five minutes, with and without patience."""
    for step in LONG:
        step.patience_s = sim.dice.choice([25.0, 600.0])
    user = User(sim)
    for i in range(10):
        name, born = f"s{round}-{i}", sim.dice.uniform(0, 120)
        user.later(born, user.create, name, sim.dice.choice(GROUPS), sim.dice.choice(VOLUMES))
        for _ in range(sim.dice.randrange(4)):
            verb, said = sim.dice.choice(VERBS)
            user.later(at := born + sim.dice.uniform(5, 200), user.act, name, verb, said)
            if sim.dice.random() < 0.3:  # twice at once, or nearly
                user.later(at + sim.dice.uniform(0, 1), user.act, name, verb, said)
        for _ in range(sim.dice.randrange(5)):
            what = sim.dice.choice([
                user.attach, user.detach, user.attach_volume, user.detach_volume, user.swap_volume, user.extend_volume,
                user.branch_volume, user.readdress,
            ])  # fmt: skip
            user.later(born + sim.dice.uniform(5, 200), what, name)
        if sim.dice.random() < 0.5:
            journey(sim, user, name, born + sim.dice.uniform(20, 100))
        if sim.dice.random() < 0.4:
            errand(sim, user, name, born + sim.dice.uniform(20, 120))
        if sim.dice.random() < 0.3:
            lending(sim, user, name, born + sim.dice.uniform(20, 100))
        if sim.dice.random() < 0.6:
            ends = born + sim.dice.choice([sim.dice.uniform(0, 40), sim.dice.uniform(0, 250)])
            user.later(ends, user.delete, name)
            if sim.config.compute.reclaim_interval_s:
                second_thoughts(sim, user, name, ends)
    for n in range(sim.dice.randrange(3) + 2 * (sim.faults is CROWDED)):
        rush(sim, user, f"r{round}-{n}", sim.dice.uniform(20, 200))
    for _ in range(4):
        user.later(sim.dice.uniform(60, 300), user.evacuate)
    user.later(sim.dice.uniform(0, 200), user.precache)
    if calamity := sim.dice.choice(CALAMITIES):
        sim.at(sim.dice.uniform(20, 250), sim.calamity, calamity, sim.dice.choice([sim.dice.uniform(2, 15), 40, 120]))
    sim.run(sim.now + 300)


def rush(sim: Sim, user: User, name: str, at: float) -> None:
    """Several want the same at the same moment: the last of a quota, a place beside or apart from each other, one volume."""
    group = sim.dice.choice([None, "anti-affinity", "affinity"])
    names = [f"{name}{letter}" for letter in "abcd"]
    for one in names:
        user.later(at + sim.dice.uniform(0, 0.3), user.create, one, group)
    later = at + sim.dice.uniform(20, 60)
    for one in names:
        user.later(later + sim.dice.uniform(0, 0.3), user.attach_volume, one)
    for verb, said in sim.dice.sample(VERBS, 2):
        user.later(later + sim.dice.uniform(30, 30.3), user.act, names[0], verb, said)
    for one in names:
        if sim.dice.random() < 0.4:
            user.later(later + sim.dice.uniform(0, 120), user.delete, one)


def journey(sim: Sim, user: User, name: str, at: float) -> None:
    """It is sent somewhere, and soon somebody has something to say to that; perhaps too soon, and not only once."""
    verb, said = sim.dice.choice(MOVES)
    user.later(at, user.act, name, verb, said)
    for _ in range(sim.dice.randrange(0, 3) if verb == "os-migrateLive" else 2):
        at += sim.dice.choice([sim.dice.uniform(0, 8), sim.dice.uniform(0, 60)])
        if verb == "os-migrateLive":
            user.later(at, sim.dice.choice([user.abort, user.abort, user.force]), name)
        else:
            user.later(at, user.act, name, sim.dice.choice(["confirmResize", "revertResize"]), None)


def errand(sim: Sim, user: User, name: str, at: float) -> None:
    """It goes somewhere where it does not work, and comes back; perhaps before it is there."""
    for verb, said in sim.dice.choice(ERRANDS):
        user.later(at, user.act, name, verb, said)
        at += sim.dice.choice([sim.dice.uniform(0, 30), sim.dice.uniform(30, 100)])


def lending(sim: Sim, user: User, name: str, at: float) -> None:
    """It is stopped and given a share, and perhaps loses it again; or somebody starts it at just that moment."""
    user.later(at, user.act, name, "os-stop", None)
    for what in (user.attach_share, user.detach_share)[: sim.dice.choice([1, 2, 2])]:
        at += sim.dice.choice([sim.dice.uniform(0, 8), sim.dice.uniform(8, 60)])
        user.later(at, what, name)
        if sim.dice.random() < 0.4:
            user.later(at + sim.dice.uniform(-3, 5), user.act, name, "os-start", None)


def second_thoughts(sim: Sim, user: User, name: str, at: float) -> None:
    """It is to live, or to go for good at once; or nobody thinks of it any more."""
    for _ in range(sim.dice.randrange(3)):
        at += sim.dice.choice([sim.dice.uniform(0, 10), sim.dice.uniform(0, RESTORABLE_S * 1.2)])
        user.later(at, user.act, name, sim.dice.choice(["restore", "restore", "forceDelete"]), None)


def clean(sim: Sim) -> None:
    """All servers are deleted, calmly: the next storm finds an empty cloud."""
    sim.faults, faults = CALM, sim.faults
    user = User(sim)
    for g in user.api.ask("GET", "/os-server-groups")[1]["server_groups"]:
        user.api.ask("DELETE", f"/os-server-groups/{g['id']}")
    for s in user.api.ask("GET", "/servers")[1]["servers"]:
        user.known[s["id"]] = s["id"]
        user.later(0, user.delete, s["id"])
    sim.run(sim.now + 5)
    sim.settle()
    sim.faults = faults


SAID = dict(
    VERBS + MOVES + [act for acts in ERRANDS for act in acts]
)  # what is said with an act that stands once in there


@dataclass(frozen=True)
class Story:
    """What is done when, in seconds; `restorable_s` as the cloud has it in which it happens."""

    tell: Callable[[Sim], None]
    restorable_s: int = 0

    def __call__(self, sim: Sim) -> None:
        self.tell(sim)


# What a story can tell of; everything else is the name of an action.
ACTS: dict[str, tuple[Any, ...]] = {
    "create": (User.create, "s0"),
    "create bare": (User.create, "s0", None, "", True),
    "create with volume": (User.create, "s0", None, "beside"),
    "create on volume": (User.create, "s0", None, "root"),
    "delete": (User.delete, "s0"),
    "attach": (User.attach, "s0"),
    "detach": (User.detach, "s0"),
    "attach volume": (User.attach_volume, "s0"),
    "detach volume": (User.detach_volume, "s0"),
    "swap volume": (User.swap_volume, "s0"),
    "extend volume": (User.extend_volume, "s0"),
    "branch volume": (User.branch_volume, "s0"),
    "attach share": (User.attach_share, "s0"),
    "detach share": (User.detach_share, "s0"),
    "readdress": (User.readdress, "s0"),
    "precache": (User.precache,),
    "abort": (User.abort, "s0"),
    "evacuate": (User.evacuate,),
    "its host is down": (lambda user: lose_host(user.sim, user),),
    "reboot": (User.act, "s0", "reboot", {"type": "SOFT"}),
    "hard reboot": (User.act, "s0", "reboot", {"type": "HARD"}),
}


def story(*acts: tuple[str, float], restorable_s: int = 0) -> Story:
    """Calm but for one crash: `("create", 0), ("delete", 60)`."""

    def tell(sim: Sim) -> None:
        user = User(sim)
        for what, when in acts:
            do, *told = ACTS.get(what) or (User.act, "s0", what, SAID.get(what))
            user.later(when, do, user, *told)
        sim.run(sim.now + 250)

    return Story(tell, restorable_s)


def lose_host(sim: Sim, user: User) -> None:
    """Of s0, for two minutes."""
    with sim.db.read() as tx:
        host = servers.get(tx, user.known["s0"]).host if "s0" in user.known else None
    if host is not None:
        sim.hosts[host].down(120)


STORIES: dict[str, Story] = {
    "build": story(("create", 5)),
    "build, delete": story(("create", 5), ("delete", 100)),
    "delete overtakes build": story(("create", 5), ("delete", 15)),
    "build bare, delete": story(("create bare", 5), ("delete", 100)),
    "delete overtakes bare build": story(("create bare", 5), ("delete", 15)),
    "reboot": story(("create", 5), ("reboot", 100)),
    "hard reboot": story(("create", 5), ("hard reboot", 100)),
    "stop, start": story(("create", 5), ("os-stop", 100), ("os-start", 150)),
    "attach, detach": story(("create", 5), ("attach", 60), ("detach", 120)),
    "delete overtakes attach": story(("create", 5), ("attach", 60), ("delete", 62)),
    "delete overtakes stop": story(("create", 5), ("os-stop", 100), ("delete", 101)),
    "build with volume": story(("create with volume", 5)),
    "build with volume, delete": story(("create with volume", 5), ("delete", 15)),
    "attach, detach volume": story(("create", 5), ("attach volume", 60), ("detach volume", 120)),
    "delete overtakes attach volume": story(("create", 5), ("attach volume", 60), ("delete", 62)),
    "attach, swap volume": story(("create", 5), ("attach volume", 60), ("swap volume", 120)),
    "attach, extend volume": story(("create", 5), ("attach volume", 60), ("extend volume", 100)),
    "attach, branch volume": story(("create", 5), ("attach volume", 60), ("branch volume", 100)),
    "readdress": story(("create", 5), ("readdress", 60)),
    "delete overtakes readdress": story(("create", 5), ("readdress", 60), ("delete", 60.5)),
    "precache": story(("precache", 5), ("create", 8)),
    "attach, detach share": story(("create", 5), ("os-stop", 60), ("attach share", 80), ("detach share", 130)),
    "delete overtakes attach share": story(("create", 5), ("os-stop", 60), ("attach share", 80), ("delete", 82)),
    "snapshot": story(("create", 5), ("createImage", 100)),
    "shelve, unshelve": story(("create", 5), ("shelve", 60), ("unshelve", 120)),
    "delete overtakes shelve": story(("create", 5), ("shelve", 60), ("delete", 75)),
    "rebuild": story(("create", 5), ("rebuild", 60)),
    "rescue, unrescue": story(("create", 5), ("rescue", 60), ("unrescue", 120)),
    "delete overtakes snapshot": story(("create", 5), ("createImage", 100), ("delete", 103)),
    "resize, confirm": story(("create", 5), ("resize", 60), ("confirmResize", 130)),
    "resize, revert": story(("create", 5), ("resize", 60), ("revertResize", 130)),
    "delete overtakes resize": story(("create", 5), ("resize", 60), ("delete", 62)),
    "delete overtakes revert": story(("create", 5), ("resize", 60), ("revertResize", 130), ("delete", 132)),
    "live migrate": story(("create", 5), ("os-migrateLive", 60)),
    "live migrate, abort": story(("create", 5), ("os-migrateLive", 60), ("abort", 65)),
    "delete overtakes live migrate": story(("create", 5), ("os-migrateLive", 60), ("delete", 64)),
    "evacuate": story(("create", 5), ("its host is down", 60), ("evacuate", 140)),
    "build on volume, rebuild": story(("create on volume", 5), ("rebuild", 60)),
    "build on volume, shelve, unshelve": story(("create on volume", 5), ("shelve", 60), ("unshelve", 120)),
    "soft delete": story(("create", 5), ("delete", 60), restorable_s=RESTORABLE_S),
    "soft delete, restore": story(("create", 5), ("delete", 60), ("restore", 100), restorable_s=RESTORABLE_S),
    "soft delete, force delete": story(("create", 5), ("delete", 60), ("forceDelete", 62), restorable_s=RESTORABLE_S),
    "soft delete overtakes shelve": story(("create", 5), ("shelve", 60), ("delete", 62), restorable_s=RESTORABLE_S),
    "delete overtakes evacuate": story(("create", 5), ("its host is down", 60), ("evacuate", 140), ("delete", 145)),
}


def play(
    seed: int,
    *,
    hours: float = 0.0,
    faults: Faults | None = None,
    tell: Callable[[str], None] | None = None,
    judge: Callable[[Sim], list[str]] = Sim.check,
) -> tuple[list[str], Sim]:
    """Storm after storm, each settled and judged, for so many hours of virtual time; one at least.

    In every third cloud deleted servers can be restored; in every fourth transactions are in each other's way all the time;
    in every fifth reconcilers have their turns all the time.
    """
    patience = [step.patience_s for step in LONG]
    faults = faults or (CROWDED if seed % 4 == 1 else None)
    restorable_s = RESTORABLE_S if seed % 3 == 0 else 0
    sim = Sim(seed, faults, tell=tell, restorable_s=restorable_s, pooled=seed % 10 == 9, hasty=seed % 5 == 2)
    began = sim.now
    try:
        for round in itertools.count():
            storm(sim, round)
            sim.settle()
            found = judge(sim)
            sim.tell(f"storm {round}: {len(found)} things wrong")
            if found or sim.now - began >= hours * 3600:
                return found, sim
            clean(sim)
            if found := judge(sim):
                return found, sim
        raise AssertionError("not reached")
    finally:
        for step, before in zip(LONG, patience, strict=True):
            step.patience_s = before
        sim.close()


def look_everywhere(tell: Story, *, step: int = 1) -> Iterator[tuple[int, list[str]]]:
    """The story again and again, each time compared with what should be from the next boundary on, slowly, in the midst of it."""
    how: dict[str, Any] = {"conductors": 1, "restorable_s": tell.restorable_s}
    return _everywhere(tell, lambda k: Sim(k, CALM, look_at=k, **how), lambda sim: sim.looks, step)


def crash_everywhere(tell: Story, *, step: int = 1) -> Iterator[tuple[int, list[str]]]:
    """The story again and again, each time with a crash at the next boundary, until there is none left."""
    how: dict[str, Any] = {"conductors": 1, "restorable_s": tell.restorable_s}
    return _everywhere(tell, lambda k: Sim(1, CALM, crash_at=k, **how), lambda sim: sim.crashes, step)


def _everywhere(
    tell: Story, make: Callable[[int], Sim], happened: Callable[[Sim], int], step: int
) -> Iterator[tuple[int, list[str]]]:
    """(boundary, what is wrong in the end), as long as the story has a boundary at which it happens."""
    for k in itertools.count(1, step):
        sim = make(k)
        tell(sim)
        sim.settle()
        found = sim.check()
        sim.close()
        yield k, found
        if not happened(sim):
            return
