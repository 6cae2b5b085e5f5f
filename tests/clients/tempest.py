"""OpenStack's own acceptance tests, unmodified, against a cloud of simulated hosts: what passes, what does not, and why.

    python tests/clients/tempest.py [REGEX] [--python PYTHON] [--workers N] [--keep DIR] [--unified-limits]

REGEX picks tests (`tempest.api.compute`); PYTHON is one with the package `tempest` (this one). The cloud is
`kilonova up --driver sim` on a free port of loopback, in a directory that goes away (`--keep`: that stays, with what
Tempest said).  It ends with the counts, a line for each failure, and how often each reason to skip was given.
`--unified-limits`: the identity service says how much projects may have, and Tempest is told so.
It is no part of the test run: the whole of it takes many minutes.
"""

import argparse
import configparser
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))

from kilonova.cli.client import Client  # noqa: E402

FEATURES = {  # of simulated hosts: all that the API can do, and no guest that answers
    "resize": True,
    "cold_migration": True,
    "live_migration": True,
    "live_migrate_back_and_forth": True,
    "block_migration_for_live_migration": True,
    "block_migrate_cinder_iscsi": False,
    "snapshot": True,
    "pause": True,
    "suspend": True,
    "shelve": True,
    "shelve_migrate": False,
    "rescue": True,
    "stable_rescue": True,
    "interface_attach": True,
    "attach_encrypted_volume": False,
    "swap_volume": True,
    "volume_backed_live_migration": True,
    "volume_multiattach": True,
    "console_output": True,
    "vnc_console": True,
    "spice_console": False,
    "serial_console": False,  # its one test hands letters to int(): Python 3 does not take that
    "personality": True,
    "config_drive": True,
    "change_password": True,
    "metadata_service": False,
    "rebuild_swap": False,
    "barbican_integration_enabled": False,
    "hostname_fqdn_sanitization": True,
    "scheduler_enabled_filters": "all",
    "nova_policy_roles": "admin,manager,member,reader",
}

# Nobody answers who is asked for over the network: that takes no two minutes to know.
PATIENCE = {"ping_timeout": 3, "connect_timeout": 3, "ssh_timeout": 3}


class Cloud:
    """`kilonova up` on simulated hosts."""

    def __init__(self, directory: Path, unified: bool = False) -> None:
        self.state, self.unified = directory / "state", unified
        words = ["up", "--driver", "sim", "--sim-hosts", "4", "--state-dir", str(self.state), "--port", "0"]
        env = os.environ | {
            "PYTHONPATH": str(ROOT / "src"),
            "KILONOVA_SIM__CPUS": "64",
            "KILONOVA_SIM__DISK_GB": "2000",
            "KILONOVA_VOLUME__QUOTA_VOLUMES": "100",  # one test fills each host with them
            "KILONOVA_UNIFIED_LIMITS__ENABLED": str(unified).lower(),
        }
        self.out = (directory / "up.out").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kilonova.main", *words], stdout=self.out, stderr=self.out, env=env
        )
        until = time.monotonic() + 60
        while not (self.state / "running.json").exists() and time.monotonic() < until:
            time.sleep(0.05)
        clouds = (self.state / "clouds.yaml").read_text()
        self.password = re.findall(r"password: (.*)", clouds)[0].strip("'\"")
        self.url = re.findall(r'"url":"([^"]*)"', (self.state / "running.json").read_text())[0]
        self.client = Client(self.url, self.password)
        self.client.login()

    def prepare(self) -> dict[str, str]:
        """Two images, two flavors, the public network: what Tempest wants to be told of."""
        c = self.client
        images = []
        for i in range(2):
            wish = {"name": f"tempest{i}", "disk_format": "raw", "container_format": "bare", "visibility": "public"}
            id = c.post("/image/v2/images", wish)["id"]
            c.upload(f"/image/v2/images/{id}/file", [b"\0" * (1 << 20)], 1 << 20)
            images.append(id)
        for i, ram in ((1, 64), (2, 128)):
            flavor = {"id": f"tempest{i}", "name": f"tempest{i}", "ram": ram, "vcpus": 1, "disk": 1}
            c.post("/compute/v2.1/flavors", {"flavor": flavor})
        if self.unified:
            self.register()
        networks = {n["name"]: n["id"] for n in c.get("/network/v2.0/networks")["networks"]}
        return {"image": images[0], "image_alt": images[1], "public": networks.get("public", "")}

    def register(self) -> None:
        """Limits under which projects may have others."""
        (compute,) = (s["id"] for s in self.client.get("/identity/v3/services?type=compute")["services"])
        names = {"servers": 10, "class:VCPU": 20, "class:MEMORY_MB": 51_200, "class:DISK_GB": 100}
        for region in (None, "RegionOne"):
            wish = [
                {"service_id": compute, "resource_name": r, "default_limit": n, "region_id": region}
                for r, n in names.items()
            ]
            self.client.post("/identity/v3/registered_limits", {"registered_limits": wish})

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.out.close()


def configuration(cloud: Cloud, made: dict[str, str], directory: Path) -> str:
    """tempest.conf (Tempest's configuration guide)."""
    conf = configparser.RawConfigParser()
    conf.optionxform = str  # type: ignore[assignment,method-assign]
    sections: dict[str, dict[str, Any]] = {
        "DEFAULT": {"log_file": directory / "tempest.log"},
        "oslo_concurrency": {"lock_path": directory / "locks"},
        "auth": {
            "use_dynamic_credentials": True,
            "admin_username": "admin",
            "admin_password": cloud.password,
            "admin_project_name": "admin",
            "admin_domain_name": "Default",
            "tempest_roles": "member",
            "create_isolated_networks": True,
        },
        "identity": {
            "uri_v3": f"{cloud.url}/identity/v3",
            "auth_version": "v3",
            "region": "RegionOne",
            "v3_endpoint_type": "public",
        },
        "identity-feature-enabled": {"api_v2": False, "api_v3": True},
        "compute": {
            "image_ref": made["image"],
            "image_ref_alt": made["image_alt"],
            "flavor_ref": "tempest1",
            "flavor_ref_alt": "tempest2",
            "min_compute_nodes": 4,
            "build_timeout": 60,
            "build_interval": 1,
            "max_microversion": "2.104",
            "min_microversion": "2.1",
            "fixed_network_name": "",
            "volume_device_name": "vdb",
        },
        "compute-feature-enabled": FEATURES | {"unified_limits": cloud.unified},
        "enforce_scope": {"nova": True},
        "image": {"build_timeout": 60},
        "network": {"public_network_id": made["public"], "project_network_cidr": "10.100.0.0/16"},
        "network-feature-enabled": {"api_extensions": "all", "floating_ips": True, "ipv6": True},
        "service_available": {
            "nova": True,
            "glance": True,
            "neutron": True,
            "cinder": True,
            "swift": False,
            "horizon": False,
        },
        "scenario": {"img_file": directory / "scenario.img", "img_disk_format": "raw", "dhcp_client": ""},
        "validation": {"run_validation": False, "connect_method": "fixed", **PATIENCE},
        "volume": {
            "volume_type_multiattach": "multiattach",
            "build_timeout": 60,
            "catalog_type": "block-storage",
            "max_microversion": "3.71",
        },
        "volume-feature-enabled": {"multi_backend": False, "backup": True, "api_v3": True},
    }
    for name, options in sections.items():
        if name != "DEFAULT":
            conf.add_section(name)
        for option, value in options.items():
            conf.set(name, option, str(value))
    (directory / "scenario.img").write_bytes(b"a disk, and no archive".ljust(1 << 10, b".") * 1024)
    path = directory / "tempest.conf"
    with path.open("w") as f:
        conf.write(f)
    return str(path)


def run(python: Path, directory: Path, regex: str, workers: int) -> Path:
    """Tempest's own runner; gives its report as JUnit writes it."""
    bin = python.parent
    env = os.environ | {
        "TEMPEST_CONFIG_DIR": str(directory),
        "PATH": f"{bin}:{os.environ['PATH']}",
        "OS_TEST_TIMEOUT": "300",
    }
    for name in [n for n in env if n.startswith("OS_") and n != "OS_TEST_TIMEOUT"]:
        del env[name]
    found = subprocess.run(
        [str(python), "-c", "import tempest, pathlib; print(pathlib.Path(tempest.__file__).parent)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (directory / ".stestr.conf").write_text(
        f"[DEFAULT]\ntest_path={found}/test_discover\ntop_dir={Path(found).parent}\ngroup_regex=([^\\.]*\\.)*\n"
    )
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run(
            [str(bin / "stestr"), "run", "--concurrency", str(workers), regex], cwd=directory, env=env, check=True
        )
    stream = subprocess.run([str(bin / "stestr"), "last", "--subunit"], cwd=directory, env=env, capture_output=True)
    lines = subprocess.run([str(python), "-c", READ], input=stream.stdout, capture_output=True, env=env, check=True)
    report = directory / "report.json"
    report.write_bytes(lines.stdout)
    return report


# One JSON line a test, out of subunit's stream; run where Tempest is.
READ = """
import json, sys, subunit, testtools
def told(test):
    words = {n: c.as_text() for n, c in test["details"].items()}
    print(json.dumps({"id": test["id"], "status": test["status"], "words": words}))
stream = testtools.StreamToDict(told)
stream.startTestRun()
subunit.ByteStreamToStreamResult(sys.stdin.buffer).run(stream)
stream.stopTestRun()
"""


def told(report: Path) -> int:
    """Prints the counts; how many failed."""
    tests = [t for line in report.read_text().splitlines() if (t := json.loads(line))["status"] != "exists"]
    bad = [t for t in tests if t["status"] in ("fail", "inprogress", "unknown")]
    skips = Counter(t["words"].get("reason", "").strip()[:200] for t in tests if t["status"] == "skip")
    for t in bad:
        lines = [x for x in t["words"].get("traceback", "").splitlines() if x.strip()]
        print(f"FAILED {t['id']}\n       {lines[-1][:300] if lines else t['status']}")
    for reason, n in skips.most_common():
        print(f"skipped {n}: {reason}")
    n_skipped = sum(skips.values())
    print(f"tempest: {len(tests) - len(bad) - n_skipped} passed, {len(bad)} failed, {n_skipped} skipped")
    return len(bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("regex", nargs="?", default=r"^tempest\.api\.compute")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--unified-limits", action="store_true")
    chosen = parser.parse_args()
    with contextlib.ExitStack() as stack:
        directory = chosen.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kilonova-tempest-")))
        directory.mkdir(parents=True, exist_ok=True)
        cloud = Cloud(directory, chosen.unified_limits)
        stack.callback(cloud.close)
        configuration(cloud, cloud.prepare(), directory)
        return 1 if told(run(chosen.python, directory, chosen.regex, chosen.workers)) else 0


if __name__ == "__main__":
    sys.exit(main())
