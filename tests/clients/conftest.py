"""One real cloud for all clients' tours: libvirt, a data plane, guests under TCG where KVM is not proven."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real import Machine, RealCloud, guest_cache


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCloud]:
    guest_cache()
    directory: Path = tmp_path_factory.mktemp("real")
    machine = Machine(f"kn-test-{os.getpid() % 1_000_000}")
    made = RealCloud(directory, machine)
    try:
        made.up()
        made.wait(lambda: "kilonova-guest" in made.openstack("image list --status active"), 60, "no image")
        yield made
    finally:
        made.purge()
        machine.close()
