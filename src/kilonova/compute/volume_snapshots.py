"""Files of volumes: a guest's writes go to a new one, or two become one; the guest goes on meanwhile."""

from collections.abc import Callable
from typing import Any

from kilonova.compute.capture import able
from kilonova.compute.host import Host, power_of
from kilonova.contracts.compute import Done, MergeVolume, SnapshotVolume
from kilonova.virt.driver import Branches


def snapshot_volume(host: Host, m: SnapshotVolume) -> Done:
    driver: Branches = able(host, Branches, "make snapshots of volumes")  # type: ignore[type-abstract]
    with host.at_work(m.server, "snapshot_volume"):
        driver.branch_volume(m.server, m.volume_id, m.new_file)
        return Done(power_of(host, m.server))


def merge_volume(host: Host, m: MergeVolume) -> Done:
    driver: Branches = able(host, Branches, "delete snapshots of volumes")  # type: ignore[type-abstract]
    with host.at_work(m.server, "merge_volume"):
        driver.merge_volume(m.server, m.volume_id, m.file, m.into)
        return Done(power_of(host, m.server))


HANDLERS: list[Callable[[Any, Any], Any]] = [snapshot_volume, merge_volume]
