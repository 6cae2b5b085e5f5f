"""One guest image for all, and a host for each file that asks for one."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kilonova.companions.guest import build
from tests.metal.lab import Lab, made


@pytest.fixture(scope="session")
def guest() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return build(Path(home) / "kilonova" / "guest", progress=print).disk


@pytest.fixture(scope="module")
def lab(guest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    state = tmp_path_factory.mktemp("a host with a 'long' name & $HOME; ") / ("x" * 60)
    state.mkdir()
    with made(guest, state) as lab:
        yield lab
