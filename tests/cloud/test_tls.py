"""Everything that listens does so behind TLS where it is told to, and unmodified clients find their way with its authority."""

import http.client
import os
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openstack
import pytest
import requests
from websockets.sync.client import connect

from kilonova.cli.certificates import own
from kilonova.cli.client import Client
from kilonova.cli.process import identity_of
from kilonova.cli.state import StateDir
from kilonova.cli.status import asked
from kilonova.kit.clock import Ids
from kilonova.kit.errors import Invalid
from kilonova.kit.tls import Identity
from kilonova.model import options

ROOT = Path(__file__).resolve().parents[2]
NOW = time.time()


class Up:
    def __init__(self, home: Path) -> None:
        self.state, self.out = home / "state", home / "out"
        words = ["up", "--driver", "sim", "--port", "0", "--no-image", "--tls", "--state-dir", str(self.state)]
        env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HOME": str(home), "KILONOVA_CONSOLE__PORT": "0"}
        with self.out.open("wb") as out:
            argv = [sys.executable, "-m", "kilonova.main", *words]
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=env, cwd=home)
        until = time.monotonic() + 90
        while not (found := re.search(r"Consoles of servers are at (\S+)\.\n", self.out.read_text())):
            assert self.process.poll() is None and time.monotonic() < until, self.out.read_text()
            time.sleep(0.05)
        self.consoles = found[1]
        running = StateDir(self.state).running()
        assert running is not None
        self.url, self.ca = running.url, Path(running.ca_file)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    one = Up(tmp_path_factory.mktemp("tls"))
    yield one
    one.process.terminate()
    one.process.wait(30)


def test_who_trusts_its_authority_is_served(up: Up) -> None:
    assert up.url.startswith("https://") and up.consoles.startswith("https://")
    for path in (
        "/compute/",
        "/placement/",
        "/identity/v3",
        "/image/",
        "/network/",
        "/volume/",
        "/healthz",
        "/metrics",
    ):
        answer = requests.get(up.url + path, verify=str(up.ca), timeout=20)
        assert answer.status_code in (200, 300), (path, answer.status_code)
    links = requests.get(f"{up.url}/compute/", verify=str(up.ca), timeout=20).text
    assert f"{up.url}/compute/v2.1/" in links and "http://" not in links
    assert "database" in asked(up.url, up.ca)


def test_who_does_not_is_not_fooled_and_plain_http_is_no_way_in(up: Up) -> None:
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(up.url, timeout=20)
    with pytest.raises((requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        requests.get(up.url.replace("https:", "http:"), timeout=20)
    host, _, port = up.url.removeprefix("https://").rpartition(":")
    context = ssl.create_default_context(cafile=str(up.ca))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(port)), 20) as raw, context.wrap_socket(raw, server_hostname=host) as s:
        assert s.version() == "TLSv1.2"


def test_an_unmodified_client(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(up.state / "clouds.yaml"))
    cloud = openstack.connect(cloud="kilonova")
    assert {f.name for f in cloud.compute.flavors()} >= {"m1.nano"}
    assert [n.name for n in cloud.network.networks()] and list(cloud.block_storage.volumes()) == []
    assert "OS_CACERT=" in (up.state / "openrc").read_text()


def test_consoles(up: Up) -> None:
    client = Client(up.url, StateDir(up.state).secrets(Ids()).admin_password, ca_file=up.ca)
    client.login()
    image = client.post("/image/v2/images", {"name": "i", "disk_format": "raw", "container_format": "bare"})["id"]
    client.upload(f"/image/v2/images/{image}/file", [b"x" * 512], 512)
    wish = {"name": "one", "imageRef": image, "flavorRef": "42", "networks": "none"}
    id = client.post("/compute/v2.1/servers", {"server": wish})["server"]["id"]
    until = time.monotonic() + 30
    while client.get(f"/compute/v2.1/servers/{id}")["server"]["status"] != "ACTIVE":
        assert time.monotonic() < until
        time.sleep(0.1)
    wanted = {"remote_console": {"protocol": "serial", "type": "serial"}}
    where = client.post(f"/compute/v2.1/servers/{id}/remote-consoles", wanted)["remote_console"]["url"]
    assert where.startswith("wss://")
    with connect(where, ssl=ssl.create_default_context(cafile=str(up.ca)), open_timeout=20) as ws:
        assert ws.recv(timeout=20)
    watched = http.client.HTTPSConnection(
        up.consoles.removeprefix("https://"), timeout=20, context=ssl.create_default_context(cafile=str(up.ca))
    )
    watched.request("GET", "/watch", headers={"X-Auth-Token": client.token})
    assert watched.getresponse().status == 200
    watched.close()


# ---- certificates


def test_own_certificates_are_made_once_and_anew_where_they_do_not_fit(tmp_path: Path) -> None:
    first, ca = own(tmp_path / "tls", ["localhost", "127.0.0.1"], NOW)
    key = first.key_file.read_bytes()
    assert (first.key_file.stat().st_mode & 0o777, ca.stat().st_mode & 0o777) == (0o600, 0o644)
    own(tmp_path / "tls", ["127.0.0.1"], NOW)
    assert first.key_file.read_bytes() == key
    own(tmp_path / "tls", ["127.0.0.1", "another.example.org"], NOW)
    assert first.key_file.read_bytes() != key
    key = first.key_file.read_bytes()
    own(tmp_path / "tls", ["127.0.0.1"], NOW + 3640 * 86_400)
    assert first.key_file.read_bytes() != key


@pytest.mark.parametrize("how", ["half", "absent", "nonsense", "another's"])
def test_what_is_no_identity_is_refused_with_a_sentence(tmp_path: Path, how: str) -> None:
    a, _ = own(tmp_path / "a", ["localhost"], NOW)
    b, _ = own(tmp_path / "b", ["localhost"], NOW)
    (tmp_path / "nonsense").write_text("nonsense")
    said: dict[str, Any] = {
        "half": options.Tls(cert_file=a.cert_file),
        "absent": options.Tls(tmp_path / "none", a.key_file),
        "nonsense": options.Tls(tmp_path / "nonsense", a.key_file),
        "another's": options.Tls(a.cert_file, b.key_file),
    }
    with pytest.raises(Invalid):
        identity_of(options.Config(tls=said[how]))
    assert identity_of(options.Config(tls=options.Tls(a.cert_file, a.key_file))) == Identity(a.cert_file, a.key_file)
