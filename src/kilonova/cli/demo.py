"""`kilonova demo`: a first server, through the public API alone, shown as it comes to life."""

import contextlib
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from kilonova.cli.client import Client
from kilonova.cli.state import StateDir, private
from kilonova.kit.errors import NotFound, Refused, Trouble

KEY = "kilonova-demo"
SERVER = "first"
BUILD_S, LOGIN_S = 120.0, 180.0

# The states on the way, for people.
WORDS = {
    "scheduling": "a host is chosen, its room claimed",
    "networking": "a port, an address, the host's wires",
    "block_device_mapping": "disks",
    "spawning": "the image is fetched and the machine started",
}


def run(
    client: Client, state: StateDir, image: str, say: Callable[[str], None], *, tidy: bool = False
) -> dict[str, Any]:
    """Boots a server of `image` and follows it to its login prompt. Raises Trouble with the reason when it does not come.

    `tidy`: then the server is removed.
    """
    key = _keypair(client, state)
    _let_in(client)
    network = _network(client)
    began = time.monotonic()
    wish = {
        "name": SERVER,
        "imageRef": image,
        "flavorRef": _flavor(client),
        "key_name": KEY,
        "networks": [{"uuid": network}],
    }
    made, action = client.started("/compute/v2.1/servers", {"server": wish})
    id = made["server"]["id"]

    def tell(what: str) -> None:
        say(f"  {time.monotonic() - began:7.2f} s  {what}")

    tell(f"accepted: server {id}")
    try:
        server = _built(client, id, tell)
        _events(client, id, action, began, say)
        address = next((a["addr"] for rows in server["addresses"].values() for a in rows if a["version"] == 4), "")
        tell(f"ACTIVE on {server['OS-EXT-SRV-ATTR:host']}, {address}; its console:")
        _console(client, id, tell)
    except Trouble:
        if tidy:
            with contextlib.suppress(Trouble):
                remove(client, id, say)
        raise
    floating = _floating(client, id)
    return {"id": id, "address": address, "floating": floating, "key": key, "seconds": time.monotonic() - began}


def farewell(found: dict[str, Any], state: StateDir, url: str, where: str, say: Callable[[str], None]) -> None:
    """How to reach what was made; `where` is what ssh is told, "" where there is no way in."""
    say("")
    say(f"Your cloud is at {url}; its first server was at its login prompt after {found['seconds']:.1f} s.")
    say("In another terminal:")
    say(f"  export OS_CLIENT_CONFIG_FILE={shlex.quote(str(state.clouds))} OS_CLOUD=kilonova")
    say("  openstack server list                     (pip install python-openstackclient)")
    say(f"  openstack console log show {SERVER}")
    if where:
        say(f"  ssh -i {shlex.quote(str(found['key']))} {where}")
    say(f"Its own address is {found['address']}.")


def remove(client: Client, id: str, say: Callable[[str], None]) -> None:
    """The server, and its floating address."""
    for f in client.get("/network/v2.0/floatingips")["floatingips"]:
        client.delete(f"/network/v2.0/floatingips/{f['id']}")
    client.delete(f"/compute/v2.1/servers/{id}")
    until = time.monotonic() + BUILD_S
    while time.monotonic() < until:
        try:
            client.get(f"/compute/v2.1/servers/{id}")
        except NotFound:
            say("The server is removed.")
            return
        time.sleep(0.05)
    raise Refused("The server was not removed in time.")


def _keypair(client: Client, state: StateDir) -> Path:
    """An ssh key of the demo's own, in the state directory; known to the cloud."""
    file = state.path / "demo-key"
    if not file.exists():
        new = ed25519.Ed25519PrivateKey.generate()
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
        private(file, new.private_bytes(pem, form, serialization.NoEncryption()))
    secret = serialization.load_ssh_private_key(file.read_bytes(), None)
    public = (
        secret.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    )
    try:
        known = client.get(f"/compute/v2.1/os-keypairs/{KEY}")["keypair"]["public_key"]
        if known.split()[:2] == public.split()[:2]:
            return file
        client.delete(f"/compute/v2.1/os-keypairs/{KEY}")
    except NotFound:
        pass
    client.post("/compute/v2.1/os-keypairs", {"keypair": {"name": KEY, "public_key": f"{public} {KEY}", "type": "ssh"}})
    return file


def _let_in(client: Client) -> None:
    """ssh and ping, by the default security group of the project."""
    groups = client.get(f"/network/v2.0/security-groups?name=default&project_id={client.project_id}")["security_groups"]
    for group in groups[:1]:
        has = {
            (r["protocol"], r["port_range_min"])
            for r in group["security_group_rules"]
            if r["direction"] == "ingress" and r["ethertype"] == "IPv4"
        }
        for protocol, port in (("tcp", 22), ("icmp", None)):
            if (protocol, port) not in has:
                rule = {
                    "security_group_id": group["id"],
                    "direction": "ingress",
                    "ethertype": "IPv4",
                    "protocol": protocol,
                }
                client.post(
                    "/network/v2.0/security-group-rules",
                    {"security_group_rule": rule | {"port_range_min": port, "port_range_max": port}},
                )


def _network(client: Client) -> str:
    found = [n for n in client.get("/network/v2.0/networks")["networks"] if not n["router:external"] and n["subnets"]]
    if not found:
        raise Refused("There is no network that a server could be plugged into.")
    return str(next((n["id"] for n in found if n["name"] == "private"), found[0]["id"]))


def _flavor(client: Client) -> str:
    """The smallest that gives a guest 128 MB and a disk."""
    fit = [f for f in client.get("/compute/v2.1/flavors/detail")["flavors"] if f["ram"] >= 128 and f["disk"] >= 1]
    if not fit:
        raise Refused("There is no flavor with 128 MB of memory and a disk.")
    return str(min(fit, key=lambda f: (f["ram"], f["disk"]))["id"])


def _built(client: Client, id: str, tell: Callable[[str], None]) -> dict[str, Any]:
    until, last = time.monotonic() + BUILD_S, None
    while time.monotonic() < until:
        server: dict[str, Any] = client.get(f"/compute/v2.1/servers/{id}")["server"]
        task = server["OS-EXT-STS:task_state"]
        if task and task != last:
            tell(f"{server['status']}/{task}: {WORDS.get(task, task)}")
            last = task
        if server["status"] == "ACTIVE":
            return server
        if server["status"] == "ERROR":
            raise Refused(server.get("fault", {}).get("message", "The server is in error."))
        time.sleep(0.02)
    raise Refused(f"The server was not built within {BUILD_S:.0f} s.")


def _events(client: Client, id: str, action: str, began: float, say: Callable[[str], None]) -> None:
    """What the journal of the run says: the events of the instance action."""
    for e in client.get(f"/compute/v2.1/servers/{id}/os-instance-actions/{action}")["instanceAction"]["events"]:
        say(f"             {e['event']}: {e['result'] or 'under way'}")


def _console(client: Client, id: str, tell: Callable[[str], None]) -> None:
    """The guest's own words, as they come, up to its login prompt."""
    until, shown = time.monotonic() + LOGIN_S, 0
    while time.monotonic() < until:
        status = client.get(f"/compute/v2.1/servers/{id}")["server"]["status"]
        text = client.post(f"/compute/v2.1/servers/{id}/action", {"os-getConsoleOutput": {}})["output"]
        lines = text.replace("\r", "").split("\n")
        for line in lines[shown:-1]:
            tell(f"| {line}")
        shown = max(shown, len(lines) - 1)
        if lines[-1].rstrip().endswith("login:"):
            tell(f"| {lines[-1]}")
            return
        if status not in ("ACTIVE", "BUILD"):
            raise Refused(f"The server is {status} before its login prompt came.")
        time.sleep(0.1)
    raise Refused(f"The guest showed no login prompt within {LOGIN_S:.0f} s.")


def _floating(client: Client, id: str) -> str:
    """An address that the machine itself can reach; "" where the cloud has no way out."""
    try:
        outside = client.get("/network/v2.0/networks?router:external=true")["networks"]
        port = client.get(f"/network/v2.0/ports?device_id={id}")["ports"][0]["id"]
        if not outside:
            return ""
        wish = {"floating_network_id": outside[0]["id"], "port_id": port}
        return str(client.post("/network/v2.0/floatingips", {"floatingip": wish})["floatingip"]["floating_ip_address"])
    except (Trouble, IndexError):
        return ""
