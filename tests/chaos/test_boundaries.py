"""A process dies before or after each commit, letter, request and act of a story: all or nothing, and nothing is left."""

from collections.abc import Callable

import msgspec
import pytest

from kilonova.model import options
from tests.stories import Cloud, Handle

Story = Callable[[Cloud, str], Handle]


def build(cloud, name):
    return cloud.boot(name)


def build_delete(cloud, name):
    s = cloud.boot(name)
    s.delete()
    return s


def delete_overtakes_build(cloud, name):
    """The build has come as far as its number says."""
    s = cloud.boot(name, settle=False)
    for _ in range(int(name[1:]) % 5):
        cloud.step()
    s.delete()
    return s


def delete_overtakes_stop(cloud, name):
    s = cloud.boot(name)
    s.act("os-stop", settle=False)
    s.delete()
    return s


def reboot(cloud, name):
    s = cloud.boot(name)
    s.act("reboot", {"type": "HARD"})
    return s


def stop_start(cloud, name):
    s = cloud.boot(name)
    s.act("os-stop")
    s.act("os-start")
    return s


def attach_detach(cloud, name):
    s = cloud.boot(name)
    made = cloud.json("POST", f"/servers/{s.id}/os-interface", {"interfaceAttachment": {}})["interfaceAttachment"]
    assert [p.port_id for p in s.row.plugs][1:] == [made["port_id"]]
    cloud.json("DELETE", f"/servers/{s.id}/os-interface/{made['port_id']}", ok=202)
    cloud.settle()
    assert len(s.row.plugs) == 1
    return s


def a_guest_ends(cloud, name):
    s = cloud.boot(name)
    cloud.driver(s.row.host).guest_shuts_down(s.id)
    cloud.settle()
    return s


def next_host(cloud, name):
    """The first that is asked refuses."""
    cloud.states["h0"].broken = True
    s = cloud.boot(name)
    cloud.states["h0"].broken = False
    return s


def pinned(cloud, name):
    """With a CPU, huge pages and a device of its own; the host that it is built on first refuses."""
    if "pinned" not in {f["id"] for f in cloud.json("GET", "/flavors", token=cloud.admin)["flavors"]}:
        body = {"flavor": {"name": "pinned", "id": "pinned", "vcpus": 1, "ram": 512, "disk": 1}}
        cloud.json("POST", "/flavors", body, token=cloud.admin)
        specs = {"hw:cpu_policy": "dedicated", "hw:mem_page_size": "2MB", "resources:CUSTOM_PCI_NIC": "1"}
        cloud.json("POST", "/flavors/pinned/os-extra_specs", {"extra_specs": specs}, token=cloud.admin)
    cloud.states["h0"].broken = True
    s = cloud.boot(name, flavor="pinned")
    cloud.states["h0"].broken = False
    return s


def two_apart(cloud, name):
    """Members of a strict group, placed at the same time on as many hosts as there are."""
    known = cloud.json("GET", "/os-server-groups")["server_groups"]
    wish = {"server_group": {"name": "apart", "policy": "anti-affinity"}}
    group = (known or [cloud.json("POST", "/os-server-groups", wish)["server_group"]])[0]["id"]
    one, two = (cloud.boot(f"{name}{i}", settle=False, hints={"group": group}) for i in "ab")
    cloud.settle()
    one.delete()
    return two


def snapshot(cloud, name):
    s = cloud.boot(name)
    s.act("createImage", {"name": name})
    return s


def snapshot_of_volumes(cloud, name):
    root = {"boot_index": 0, "source_type": "image", "destination_type": "volume", "volume_size": 1}
    root |= {"uuid": cloud.image_id, "delete_on_termination": True}
    s = cloud.boot(name, networks="none", imageRef="", block_device_mapping_v2=[root])
    cloud.edges.count = 0  # how it is built is told elsewhere
    s.act("createImage", {"name": name})
    for one in cloud.neighbours.volume.snapshots(all_projects=True):  # or its volume would outlive it
        cloud.neighbours.volume.delete_snapshot(one.id)
    return s


def shelve_unshelve(cloud, name):
    s = cloud.boot(name)
    s.act("shelve")
    s.act("unshelve")
    return s


def rebuild(cloud, name):
    s = cloud.boot(name)
    s.act("rebuild", {"imageRef": cloud.image_id})
    return s


def rescue(cloud, name):
    s = cloud.boot(name)
    cloud.json("POST", f"/servers/{s.id}/action", {"rescue": None})
    cloud.settle()
    return s


def a_volume(cloud, size=1):
    """One that nobody has, of an earlier telling if there is one."""
    found = [v.id for v in cloud.neighbours.volume.list(all_projects=True, status="available") if v.size_gb == size]
    return found[0] if found else cloud.neighbours.volume.create(size, token=cloud.user.token).id


def boot_from_volume(cloud, name):
    """Its root is made of an image, its data lie there."""
    root = {"boot_index": 0, "source_type": "image", "destination_type": "volume", "volume_size": 1}
    root |= {"uuid": cloud.image_id, "delete_on_termination": True}
    data = {"source_type": "volume", "destination_type": "volume", "uuid": a_volume(cloud)}
    return cloud.boot(name, networks="none", imageRef="", block_device_mapping_v2=[root, data])


def volumes_on_the_next_host(cloud, name):
    cloud.states["h0"].broken = True
    s = boot_from_volume(cloud, name)
    cloud.states["h0"].broken = False
    return s


def delete_overtakes_boot_from_volume(cloud, name):
    body = {"boot_index": 0, "source_type": "image", "destination_type": "volume", "volume_size": 1}
    body |= {"uuid": cloud.image_id, "delete_on_termination": True}
    s = cloud.boot(name, networks="none", imageRef="", block_device_mapping_v2=[body], settle=False)
    for _ in range(int(name[1:]) % 7):
        cloud.step()
    s.delete()
    return s


def volume_attach_detach(cloud, name):
    s, id = cloud.boot(name, networks="none"), a_volume(cloud)
    path = f"/servers/{s.id}/os-volume_attachments"
    cloud.json("POST", path, {"volumeAttachment": {"volumeId": id}})
    cloud.settle()
    assert [d.attachment_id is not None for d in s.row.devices] == [True]
    cloud.json("DELETE", f"{path}/{id}", ok=202)
    cloud.settle()
    assert s.row.devices == []
    return s


def volume_swap(cloud, name):
    s, old, new = cloud.boot(name, networks="none"), a_volume(cloud), a_volume(cloud, 2)
    path = f"/servers/{s.id}/os-volume_attachments"
    cloud.json("POST", path, {"volumeAttachment": {"volumeId": old}})
    cloud.settle()
    status = {"os-reset_status": {"migration_status": "migrating"}}
    cloud.services.json("POST", f"/volume/v3/volumes/{old}/action", status, cloud.admin, ok=202)
    cloud.json("PUT", f"{path}/{old}", {"volumeAttachment": {"volumeId": new}}, ok=202, token=cloud.admin)
    cloud.settle()
    assert [d.volume_id for d in s.row.devices] == [new]
    return s


def delete_overtakes_volume_attach(cloud, name):
    s = cloud.boot(name, networks="none")
    cloud.json("POST", f"/servers/{s.id}/os-volume_attachments", {"volumeAttachment": {"volumeId": a_volume(cloud)}})
    for _ in range(int(name[1:]) % 4):
        cloud.step()
    s.delete()
    return s


ENDS = {
    build: "active",
    build_delete: "deleted",
    delete_overtakes_build: "deleted",
    delete_overtakes_stop: "deleted",
    reboot: "active",
    stop_start: "active",
    attach_detach: "active",
    boot_from_volume: "active",
    volumes_on_the_next_host: "active",
    delete_overtakes_boot_from_volume: "deleted",
    volume_attach_detach: "active",
    volume_swap: "active",
    delete_overtakes_volume_attach: "deleted",
    a_guest_ends: "stopped",
    next_host: "active",
    pinned: "active",
    two_apart: "active",
    snapshot: "active",
    snapshot_of_volumes: "active",
    shelve_unshelve: "active",
    rebuild: "active",
    rescue: "rescued",
}


@pytest.mark.parametrize("story", ENDS, ids=lambda s: s.__name__)
def test_a_crash_at_every_boundary(tmp_path, story):
    own = options.Compute(cpu_dedicated_set="6-7")
    sim = options.Sim(cpus=8, memory_mb=16_384, disk_gb=100, pages={"2048": 512}, devices=("CUSTOM_PCI_NIC=2",))
    cloud = Cloud(tmp_path, hosts=2, sim=sim, config=msgspec.structs.replace(options.Config(), compute=own))
    calm = 0
    for k in range(1, 1000):
        cloud.edges.count, cloud.edges.crash_at = 0, k
        s = story(cloud, f"s{k}")
        crashed, cloud.edges.crash_at = cloud.edges.count >= k, 0
        cloud.settle()
        for name in ("strays", "claims", "stuck"):
            cloud.mend(name)
        cloud.settle()
        assert cloud.check() == [], f"after a crash at {k}"
        assert s.row.vm_state == ENDS[story], f"after a crash at {k}: {s.show().get('fault')}"
        if s.row.vm_state != "deleted":
            s.delete()
        calm += not crashed
        if calm == 5:
            break
    assert k > 20
    assert cloud.check() == []
    cloud.db.close()
