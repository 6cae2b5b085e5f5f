"""A fleet with real guests: libvirt on two machines, simulated hosts beside them, every role a process."""

import os
import shutil
import time
from collections.abc import Iterator

import pytest
from websockets.sync.client import connect

from kilonova.cli import images
from kilonova.companions.wires.ground import NETNS, Ground
from kilonova.kit.db import Db
from tests.engines import MariaDb, Postgres
from tests.fleet.faults import Cloud, cloud_of
from tests.fleet.fleet import Fleet, FleetClient
from tests.real import guest_cache, processes_of

pytest.importorskip("libvirt", reason="libvirt's Python module is not installed")
PATH = f"{os.environ.get('PATH')}:/usr/sbin:/sbin"
ABSENT = [p for p in ("libvirtd", "qemu-system-x86_64", "ip", "nft", "dnsmasq") if not shutil.which(p, path=PATH)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.metal,
    pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root"),
    pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}"),
]

METAL = ("metal-0", "metal-1")
PASSWORD = "kilonova"  # of our own guest
BOOT_S = 120.0  # idle it is 5


@pytest.fixture(scope="module", params=[Postgres, MariaDb], ids=["postgres", "mariadb"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Two APIs, two conductors, on PostgreSQL two schedulers, metadata, consoles; two machines of metal and a make-believe one."""
    guest_cache()
    home = tmp_path_factory.mktemp("metal")
    with cloud_of(home, request.param, hosts=1, metal=2, schedulers=2 if request.param is Postgres else 0) as one:
        yield one
    left = [line for name in METAL for line in processes_of(one.fleet.directory / name)]
    tags = [Ground("none", one.fleet.directory / name).name for name in METAL]
    assert left == [] and [p.name for p in NETNS.glob("*") if p.name.startswith(tuple(tags))] == []


def test_real_guests_on_two_machines(whole: Cloud) -> None:
    """They boot, are told who they are by the metadata service, hear each other, stop, start, outlive their host's process, go."""
    fleet, client = whole.fleet, whole.fleet.client()
    image = images.guest(client, lambda _: None)
    network = client.get("/network/v2.0/networks?name=private")["networks"][0]["id"]
    ids = {}
    for host in METAL:
        ids[host] = client.boot(host, image, network, availability_zone=f"nova:{host}")
    pretended = client.boot("pretended", image, network, availability_zone="nova:host-0")
    for host, id in ids.items():
        seen = client.until(id, "ACTIVE", 60)
        assert (seen["OS-EXT-SRV-ATTR:host"], seen["OS-EXT-SRV-ATTR:hypervisor_hostname"]) == (host, host)
    client.until(pretended, "ACTIVE")
    for id in ids.values():
        said = console(client, id, "kilonova: ready")
        assert id in said and "login:" in console(client, id, "login:")

    one, two = ids.values()
    with Line(client, one) as line:
        line.log_in()
        assert "metal-0" in line.does("wget -q -O - http://169.254.169.254/latest/meta-data/hostname")

    # Guests do not notice that their host's process ends, or dies; the next life finds them again.
    assert fleet.stop("metal-0") == 0, fleet.tail("metal-0")
    fleet.kill("metal-1")
    for host in METAL:
        fleet.start(host)
    fleet.wait(lambda: len(fleet.hosts_up()) == 3, 60, "all hosts are back")
    for id in ids.values():
        assert client.until(id, "ACTIVE")["OS-EXT-STS:power_state"] == 1
    client.act(one, **{"os-stop": None})
    client.act(two, reboot={"type": "SOFT"})
    client.until(one, "SHUTOFF", 60)
    client.act(one, **{"os-start": None})
    client.until(one, "ACTIVE", 60)
    client.until(two, "ACTIVE", 60)
    for id in ids.values():
        assert console(client, id, "kilonova: ready", times=2)

    gone(fleet, client, [*ids.values(), pretended])


def gone(fleet: Fleet, client: FleetClient, ids: list[str]) -> None:
    """Nothing is left: no machine, no port, no claim."""
    for id in ids:
        client.delete(f"/compute/v2.1/servers/{id}")
    for id in ids:
        client.until(id, "", 60)
    for host in METAL:
        assert list((fleet.directory / host / "hosts" / host / "instances").iterdir()) == []
    db = Db(fleet.database, threads=2)
    try:
        assert fleet.settled(db, 30)[1] == []
    finally:
        db.close()


def console(client: FleetClient, id: str, word: str, times: int = 1) -> str:
    """The console log, once it has the word."""
    until, said = time.monotonic() + BOOT_S, ""
    while said.count(word) < times:
        assert time.monotonic() < until, f"{id} never said {word!r}: {said[-2000:]}"
        said = client.post(f"/compute/v2.1/servers/{id}/action", {"os-getConsoleOutput": {}})["output"]
        time.sleep(0.5)
    return said


class Line:
    """A server's serial console, by the proxy."""

    def __init__(self, client: FleetClient, id: str) -> None:
        site = client.fleet.site
        assert site is not None
        door = site.ground.connect("127.0.0.1", client.fleet.ports["console"], site.machines["console-0"].name)
        wish = {"remote_console": {"protocol": "serial", "type": "serial"}}
        url = client.post(f"/compute/v2.1/servers/{id}/remote-consoles", wish)["remote_console"]["url"]
        self.wire = connect(url, sock=door, legacy=True)
        self.said = ""

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: object) -> None:
        self.wire.close()

    def log_in(self) -> None:
        self.wire.send("\r")
        self.hears("login:")
        self.wire.send("kilonova\r")
        self.hears("Password:")
        self.wire.send(f"{PASSWORD}\r")
        self.hears("#")

    def does(self, command: str) -> str:
        """What it printed."""
        self.said = ""
        self.wire.send(f"{command}; echo en''d\r")
        return self.hears("end")

    def hears(self, word: str) -> str:
        until = time.monotonic() + 30
        while word not in self.said:
            assert time.monotonic() < until, f"no {word!r} in {self.said!r}"
            piece = self.wire.recv(timeout=30)
            self.said += piece if isinstance(piece, str) else piece.decode(errors="replace")
        before, _, self.said = self.said.partition(word)
        return before
