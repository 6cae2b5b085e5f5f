"""The stories of the store, told again on the databases that operators trust."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import mariadb, postgres

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("engine", [postgres, mariadb])
def test_the_store_is_the_same_on(engine, tmp_path):
    with engine(tmp_path / "db") as url:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-q", "-x", "tests/store", "--ignore=tests/store/test_evolve.py"],
            cwd=ROOT,
            env=os.environ | {"TEST_DB": url},
            capture_output=True,
            text=True,
            timeout=280,
            stdin=subprocess.DEVNULL,
        )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is None or int(passed[1]) > 100  # `-q -q` of the project's own options shows no count
