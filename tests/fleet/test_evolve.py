"""The schema by steps on the databases that operators trust: what of tests/store/test_evolve.py differs from make to make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import mariadb, postgres

ROOT = Path(__file__).resolve().parents[2]
STORIES = "both_ways or old_code_works or at_once"


@pytest.mark.parametrize("engine", [postgres, mariadb])
def test_steps_lead_to_the_same_on(engine, tmp_path):
    with engine(tmp_path / "db") as url:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-x", "-rs", "tests/store/test_evolve.py", "-k", STORIES],
            cwd=ROOT,
            env=os.environ | {"TEST_DB": url},
            capture_output=True,
            text=True,
            timeout=280,
            stdin=subprocess.DEVNULL,
        )
    assert done.returncode == 0, done.stdout[-3000:]
