"""What every test can count on: an environment without the operator's settings, and the same dice each time."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.engines import free_port

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "../shared/spec"

for name in [n for n in os.environ if n.startswith(("KILONOVA_", "OS_"))]:
    del os.environ[name]
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost,169.254.169.254"

# The same examples each time, so that a failure in CI is one here; and no deadline on a machine that others share.
settings.register_profile("kilonova", derandomize=True, deadline=None, database=None)
settings.load_profile("kilonova")


@pytest.fixture(scope="session")
def spec() -> Path:
    """The API's specification as data, where it lies beside the checkout."""
    if not SPEC.is_dir():
        pytest.skip("no ../shared/spec beside the checkout")
    return SPEC


@pytest.fixture(name="free_port")
def _free_port() -> int:
    """A TCP port of loopback that nobody listened on a moment ago. Bind port 0 instead where that is possible."""
    return free_port()
