"""What each role says of itself at /metrics: an operator's figures, from a whole cloud in one process."""

import http.client
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from kilonova.cli.client import Client
from kilonova.cli.cloud import Cloud
from kilonova.cli.state import StateDir
from kilonova.kit.clock import Ids
from kilonova.kit.http import listen
from kilonova.kit.journal import RUNS
from kilonova.model import options
from tests.engines import waited


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    config = options.Config(compute=options.Compute(driver="sim"), sim=options.Sim(hosts=2))
    state, listener = StateDir(tmp_path / "state"), listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    one = Cloud(config, state, state.secrets(Ids(random.Random(1))), listener, url)
    one.start()
    waited(lambda: not one.health.reasons(), 60, "a host reports")
    yield one
    one.close()


def figures(cloud: Cloud) -> dict[str, float]:
    line = http.client.HTTPConnection(cloud.url.removeprefix("http://"), timeout=20)
    line.request("GET", "/metrics")
    text = line.getresponse().read().decode()
    line.close()
    return {m[1]: float(m[2]) for m in re.finditer(r"^(kilonova_[^ ]+) ([-+.e\d]+)$", text, re.MULTILINE)}


def test_the_figures(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kilonova.cli.measures.KEEP_S", 0.0)
    client = Client(cloud.url, cloud.secrets.admin_password)
    client.login()
    image = client.post("/image/v2/images", {"name": "i", "disk_format": "raw", "container_format": "bare"})["id"]
    client.upload(f"/image/v2/images/{image}/file", [b"x" * 512], 512)
    wish = {"name": "one", "imageRef": image, "flavorRef": "42", "networks": "none"}
    id = client.post("/compute/v2.1/servers", {"server": wish})["server"]["id"]
    waited(lambda: client.get(f"/compute/v2.1/servers/{id}")["server"]["status"] == "ACTIVE", 30, "it is built")
    with cloud.db.tx() as tx:
        row = tx.execute(sa.select(RUNS).where(RUNS.c.subject == id)).mappings().one()
        stuck = {**row, "id": "x", "state": "stuck", "finished": cloud.clock.now(), "started": cloud.clock.now() - 500}
        tx.execute(sa.insert(RUNS), stuck)
    said = figures(cloud)
    assert said['kilonova_servers{task_state="",vm_state="active"}'] == 1
    assert said['kilonova_runs{state="stuck",workflow="build_bare"}'] == 1
    assert 500 <= said['kilonova_runs_oldest_seconds{state="stuck",workflow="build_bare"}'] < 600
    assert 0 <= said["kilonova_runs_late_seconds"] < 60 and said["kilonova_runs_queued"] >= 0
    assert said['kilonova_hosts{state="up"}'] == 2 and said['kilonova_hosts{state="down"}'] == 0
    assert 0 <= said['kilonova_host_silence_seconds{quantile="1.0"}'] < 60
    assert said['kilonova_claimed{resource_class="MEMORY_MB"}'] == 128
    assert said['kilonova_capacity{resource_class="VCPU"}'] == 2 * 64 * 4
    assert sum(said[f'kilonova_host_machines{{host="sim-{i}"}}'] for i in range(2)) == 1
    assert said['kilonova_host_reports_total{host="sim-0"}'] >= 1 and said["kilonova_letters_waiting"] >= 0
    assert said['kilonova_mended_total{reconciler="claims"}'] == 0
    assert said["kilonova_sql_statements_total"] > 20
    assert said['kilonova_http_requests_total{service="compute",status="202"}'] == 1


def test_figures_that_cannot_be_read_do_not_take_the_others_along(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kilonova.cli.measures.KEEP_S", 0.0)

    def broken(tx: object) -> object:
        raise sa.exc.OperationalError("SELECT", {}, Exception("away"))

    monkeypatch.setattr("kilonova.store.figures.states", broken)
    said = figures(cloud)
    assert "kilonova_letters_waiting" in said and not any(name.startswith("kilonova_servers") for name in said)
