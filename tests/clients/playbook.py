"""Ansible's collection openstack.cloud, unmodified, against a cloud of simulated hosts: does `playbook.yml` run through?

    python tests/clients/playbook.py PLAYBOOK-PROGRAM

PLAYBOOK-PROGRAM is `bin/ansible-playbook` of an environment with the packages `ansible` and `openstacksdk` (4.4: newer
ones the collection 2.5 does not know).  It is no part of the test run: it takes minutes, and the package is large.
Ends with Ansible's own word, and with 1 where anything is left over.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "src")]

from tests.clients.tempest import Cloud  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path, metavar="PLAYBOOK-PROGRAM")
    program = parser.parse_args().program.absolute()
    with tempfile.TemporaryDirectory(prefix="kilonova-playbook-") as directory:
        cloud = Cloud(Path(directory))
        try:
            cloud.prepare()
            env = os.environ | {
                "OS_CLIENT_CONFIG_FILE": str(cloud.state / "clouds.yaml"),
                "ANSIBLE_PYTHON_INTERPRETER": str(program.parent / "python"),
            }
            chosen = ["-e", "image=tempest0", "-e", "ext=public"]
            book = Path(__file__).with_name("playbook.yml")
            status = subprocess.run([program, "-i", "localhost,", "-c", "local", book, *chosen], env=env).returncode
            left = rest(cloud)
            print(f"left over: {left or 'nothing'}")
            return status or bool(left)
        finally:
            cloud.close()


def rest(cloud: Cloud) -> list[str]:
    """What the playbook should have taken away, and what the doctor says of the rest."""
    c = cloud.client
    found = {
        "server": c.get("/compute/v2.1/servers?all_tenants=1")["servers"],
        "volume": c.get("/volume/v3/volumes?all_tenants=1")["volumes"],
        "port": [p for p in c.get("/network/v2.0/ports")["ports"] if p["device_owner"].startswith("compute:")],
    }
    doctor = [ROOT / "kilonova", "doctor", "--state-dir", cloud.state]
    ill = subprocess.run(doctor, capture_output=True, text=True)
    said = [ill.stdout] if ill.returncode else []
    return [f"{what} {x['id']}" for what, them in found.items() for x in them] + said


if __name__ == "__main__":
    sys.exit(main())
