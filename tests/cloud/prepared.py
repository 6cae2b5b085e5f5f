"""A cloud in which there is one of everything that can be shown: what the specification's tests look at."""

import base64
import re
from pathlib import Path
from typing import Any

import msgspec

from tests.stories import Cloud

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPYvM5xQfZ0C0HjQ2TDFdGEsVYEg1N3bLrqIKVGFc3Wm me@home"
NOBODY = "7d2f9e5c-1b3a-4c8d-9e0f-a1b2c3d4e5f6"


class Prepared:
    """`names`: what stands for a part of a path, by group or by the part's own name. Alice owns the server."""

    def __init__(self, directory: Path) -> None:
        self.cloud = c = Cloud(directory, hosts=4)
        self.alice, self.admin = c.user.token, c.admin
        self.rita = c.services.person("rita", "reader", project_name="of-alice")
        self.reader = self.rita.token
        self.bob = c.services.person("bob", "member").token
        self.aggregate = self.made(
            "/os-aggregates", {"aggregate": {"name": "rack", "availability_zone": "z1"}}, who=c.admin
        )
        c.json("POST", "/flavors/small/os-extra_specs", {"extra_specs": {"hw:x": "y"}}, token=c.admin)
        private = {
            "flavor": {"name": "p", "id": "p", "vcpus": 1, "ram": 64, "disk": 1, "os-flavor-access:is_public": False}
        }
        c.json("POST", "/flavors", private, token=c.admin)
        c.json("POST", "/flavors/p/action", {"addTenantAccess": {"tenant": c.user.project_id}}, token=c.admin)
        c.json("POST", "/os-keypairs", {"keypair": {"name": "mine", "public_key": KEY, "type": "ssh"}}, ok=201)
        self.group = self.made("/os-server-groups", {"server_group": {"name": "g", "policy": "soft-affinity"}})
        self.server = self._server()
        self.network = next(n for n in c.neighbours.network.networks() if n.name == "private").id
        self.volume = self._volume(self.server)
        self.loose = self.made("/os-volumes", {"volume": {"size": 1, "display_name": "loose"}}, version="2.35")
        c.settle()
        self.snapshot = self.made("/os-snapshots", {"snapshot": {"volume_id": self.loose}}, version="2.35")
        self.floating = self._floating()
        self.image = self._image()
        self._errored()
        self.moving, self.migration = self._moving()
        self.console = self._console()
        self.names: dict[str, str] = {
            "os-aggregates": str(self.aggregate),
            "os-keypairs": "mine",
            "os-server-groups": self.group,
            "os-floating-ips": self.floating,
            "os-networks": self.network,
            "os-tenant-networks": self.network,
            "os-security-groups": self.security_group(),
            "os-volumes": self.loose,
            "os-snapshots": self.snapshot,
            "images": self.image,
            "image-metadata": "a",
            "flavors": "small",
            "flavor-extra-specs": "hw:x",
            "extensions": "os-keypairs",
            "versions": "v2.1",
            "os-quota-class-sets": "default",
            "os-quota-sets": c.user.project_id,
            "os-simple-tenant-usage": c.user.project_id,
            "os-instance-actions": c.json("GET", f"/servers/{self.server}/os-instance-actions")["instanceActions"][-1][
                "request_id"
            ],
            "os-interface": self.row().plugs[0].port_id,
            "os-volume_attachments": self.volume,
            "server-ips": "private",
            "server-metadata": "a",
            "server-tags": "a",
            "server-migrations": str(self.migration),
            "os-console-auth-tokens": self.console,
            "os-hosts": "h0",
            "os-baremetal-nodes": NOBODY,
        }  # fmt: skip
        c.json("POST", f"/servers/{self.server}/action", {"lock": {"locked_reason": "why"}}, ok=202)

    def path(self, route: str, group: str, version: int) -> str:
        """A path of the specification, with what is there. Hypervisors and services had numbers until 2.52."""
        c = self.cloud
        if group in ("os-hypervisors", "os-services"):
            what = {"os-hypervisors": "hypervisors", "os-services": "services"}[group]
            (one, *_) = c.json("GET", f"/{group}", token=c.admin, version=f"2.{version}")[what]
            id = "h0" if route.endswith(("/search", "/servers")) else str(one["id"])
        else:
            id = (
                self.server
                if group in ("servers", "os-volumes_boot", "server-actions")
                else self.names.get(group, NOBODY)
            )
        server = self.moving if group == "server-migrations" else self.server
        flavor = "p" if "access" in route else "small"
        route = route.replace("{id}", id).replace("{server_id}", server).replace("{flavor_id}", flavor)
        return route.replace("{image_id}", self.image)

    def made(self, path: str, body: Any, *, version: str = "2.96", who: str = "", ok: int = 200) -> Any:
        said = self.cloud.json("POST", path, body, version=version, token=who, ok=ok)
        return next(iter(said.values()))["id"]

    def row(self) -> Any:
        with self.cloud.db.read() as tx:
            from kilonova.store import servers

            return servers.get(tx, self.server)

    def security_group(self) -> str:
        id: str = self.cloud.neighbours.network.security_groups(project_id=self.cloud.user.project_id)[0].id
        return id

    # -- its parts

    def _server(self) -> str:
        c = self.cloud
        more = {
            "key_name": "mine", "metadata": {"a": "b"}, "user_data": base64.b64encode(b"x").decode(), "tags": ["a"],
            "config_drive": True, "description": "all of it", "availability_zone": "nova",
        }  # fmt: skip
        wish = {"name": "one", "flavorRef": "small", "imageRef": c.image_id, "networks": "auto", **more}
        said = c.json("POST", "/servers", {"server": wish, "os:scheduler_hints": {"group": self.group}}, ok=202)
        c.settle()
        id: str = said["server"]["id"]
        c.json("POST", f"/servers/{id}/os-interface", {"interfaceAttachment": {"tag": "second"}})
        return id

    def _volume(self, server: str) -> str:
        c = self.cloud
        id: str = self.made("/os-volumes", {"volume": {"size": 1, "display_name": "v"}}, version="2.35")
        c.settle()
        wish = {"volumeAttachment": {"volumeId": id, "tag": "t", "delete_on_termination": True}}
        c.json("POST", f"/servers/{server}/os-volume_attachments", wish)
        c.settle()
        return id

    def _floating(self) -> str:
        c = self.cloud
        made = c.json("POST", "/os-floating-ips", None, version="2.35")["floating_ip"]
        c.json(
            "POST", f"/servers/{self.server}/action", {"addFloatingIp": {"address": made["ip"]}}, version="2.35", ok=202
        )
        c.settle()
        id: str = made["id"]
        return id

    def _image(self) -> str:
        wish = {"name": "i", "disk_format": "raw", "container_format": "bare", "a": "b", "instance_uuid": self.server}
        id: str = self.cloud.services.json("POST", "/image/v2/images", wish, self.alice, ok=201)["id"]
        return id

    def _errored(self) -> None:
        wish = {"name": "broken", "flavorRef": "huge", "imageRef": self.cloud.image_id, "networks": "none"}
        self.cloud.json("POST", "/servers", {"server": wish}, ok=202)
        self.cloud.settle()

    def _moving(self) -> tuple[str, Any]:
        """A server on its way to another host, which will not answer."""
        c = self.cloud
        here = self.row().host
        made = [c.boot(f"moving{n}", networks="none") for n in range(2)]
        id = next(s.id for s in made if s.row.host != here)
        migrate = {"os-migrateLive": {"host": None, "block_migration": "auto"}}
        c.json("POST", f"/servers/{id}/action", migrate, ok=202, token=c.admin)
        c.bus.lose = lambda to, raw: to not in (here, f"{here}.asked") and not to.startswith("asker")
        c.tick()
        found = c.json("GET", f"/servers/{id}/migrations", token=c.admin)["migrations"]
        return id, found[0]["id"] if found else 0

    def _console(self) -> str:
        said = self.cloud.json(
            "POST",
            f"/servers/{self.server}/remote-consoles",
            {"remote_console": {"protocol": "vnc", "type": "novnc"}},
        )
        found = re.search(r"token(?:=|%3[dD])([\w-]+)", said["remote_console"]["url"])
        assert found
        return found[1]

    def call(self, method: str, path: str, body: Any = None, token: str = "", version: int = 96) -> tuple[int, bytes]:
        """Status and body, whatever they are."""
        self.cloud.clock.sleep(0.001)
        told = {"OpenStack-API-Version": f"compute 2.{version}"}
        answer = self.cloud.services.ask(method, f"/compute/v2.1{path}", body, token, **told)
        return answer.status, answer.read()

    def json(self, *args: Any, **more: Any) -> tuple[int, Any]:
        status, raw = self.call(*args, **more)
        return status, msgspec.json.decode(raw) if raw else None
