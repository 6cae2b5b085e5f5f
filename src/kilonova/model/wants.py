"""What flavor and image want of a host, in Placement's words: amounts of resource classes, and traits (scheduler.md, 4 and 5)."""

import re
from collections.abc import Mapping
from math import ceil

from kilonova.model.flavor import Flavor

VCPU, PCPU, MEMORY_MB, DISK_GB = "VCPU", "PCPU", "MEMORY_MB", "DISK_GB"
MOST = 2**31 - 1
GRANULAR = re.compile(r"(resources|trait)([a-zA-Z0-9_-]{1,64})?:([A-Z0-9_]{1,255})")
YES = frozenset({"true", "1", "yes", "on", "t", "y"})

# fmt: off
# What an image or a flavor may ask of a host, and the trait that says that a host has it; "{}" is the value.
IMAGE_TRAITS = {
    "hw_cdrom_bus":              "COMPUTE_STORAGE_BUS_{}",
    "hw_disk_bus":               "COMPUTE_STORAGE_BUS_{}",
    "hw_video_model":            "COMPUTE_GRAPHICS_MODEL_{}",
    "hw_vif_model":              "COMPUTE_NET_VIF_MODEL_{}",
    "hw_architecture":           "HW_ARCH_{}",
    "hw_emulation_architecture": "COMPUTE_ARCH_{}",
    "hw_viommu_model":           "COMPUTE_VIOMMU_MODEL_{}",
}
# fmt: on


def amounts(flavor: Flavor, *, volume_backed: bool = False) -> dict[str, int]:
    """What a server of this flavor takes. `resources:CLASS=n` (also `resources1:…`) overrides, 0 takes a class out.

    Pinned CPUs are VCPU, too, as where a host of Nova reports no PCPU: none of ours does.
    """
    said: dict[str, int] = {}
    for key, text in flavor.extra_specs.items():
        m = GRANULAR.fullmatch(key)
        if m and m[1] == "resources" and re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) and int(text) <= MOST:
            said[m[3]] = said.get(m[3], 0) + int(text)
    disk_gb = (0 if volume_backed else flavor.disk_gb) + flavor.ephemeral_gb + ceil(flavor.swap_mb / 1024)
    usual = {VCPU: flavor.vcpus, MEMORY_MB: flavor.memory_mb, DISK_GB: disk_gb}
    if PCPU in said:
        del usual[VCPU]
    if _yes(flavor.extra_specs.get("hw:mem_encryption")):
        usual["MEM_ENCRYPTION_CONTEXT"] = 1
    for label in filter(None, flavor.extra_specs.get("hw:pmem", "").split(",")):
        name = f"CUSTOM_PMEM_NAMESPACE_{re.sub(r'[^A-Z0-9_]', '_', label.strip().upper())}"
        usual[name] = usual.get(name, 0) + 1
    return {c: n for c, n in (usual | said).items() if n > 0}


def required(specs: Mapping[str, str], properties: Mapping[str, str]) -> set[str]:
    """Traits that the host must have: those that are named, and those that follow from what else is asked."""
    named = {m[3] for k, v in (*specs.items(), *properties.items()) if v == "required" and (m := _trait(k))}
    return named | _followed(specs, properties)


def forbidden(specs: Mapping[str, str], properties: Mapping[str, str]) -> set[str]:
    """Traits that it must not have."""
    named = {m[3] for k, v in specs.items() if v == "forbidden" and (m := _trait(k))}
    policy = specs.get("hw:cpu_thread_policy") or properties.get("hw_cpu_thread_policy")
    return named | ({"HW_CPU_HYPERTHREADING"} if policy == "isolate" else set())


def of_image(properties: Mapping[str, str], known: frozenset[str]) -> set[str]:
    """What its devices need (image_metadata_prefilter); nothing at all where there is no trait for one of them."""
    found = set()
    for key, form in IMAGE_TRAITS.items():
        if value := properties.get(key):
            trait = form.format(re.sub(r"[^A-Z0-9]", "_", value.upper()))
            if trait not in known:
                return set()
            found.add(trait)
    return found


def _trait(key: str) -> re.Match[str] | None:
    m = GRANULAR.fullmatch(key)
    return m if m and m[1] == "trait" else None


def _followed(specs: Mapping[str, str], properties: Mapping[str, str]) -> set[str]:
    def said(name: str, *, scope: str = "hw") -> str:
        """The flavor's `hw:name`, else the image's `hw_name`."""
        return specs.get(f"{scope}:{name}") or properties.get(f"{scope}_{name}") or ""

    found = set()
    if specs.get("accel:device_profile"):
        found.add("COMPUTE_ACCELERATORS")
    if _yes(said("virtio_packed_ring")):
        found.add("COMPUTE_NET_VIRTIO_PACKED")
    if _yes(said("ephemeral_encryption")):
        found.add("COMPUTE_EPHEMERAL_ENCRYPTION")
        if form := said("ephemeral_encryption_format"):
            found.add(f"COMPUTE_EPHEMERAL_ENCRYPTION_{form.upper()}")
    if said("sound_model").lower() == "virtio":
        found.add("COMPUTE_SOUND_MODEL_VIRTIO")
    if version := said("tpm_version"):
        found.add(f"COMPUTE_SECURITY_TPM_{version.replace('.', '_')}")
        found.add("COMPUTE_SECURITY_TPM_CRB" if said("tpm_model") == "tpm-crb" else "COMPUTE_SECURITY_TPM_TIS")
        found.add(f"COMPUTE_SECURITY_TPM_SECRET_SECURITY_{(said('tpm_secret_security') or 'user').upper()}")
    if said("cpu_thread_policy") == "require":
        found.add("HW_CPU_HYPERTHREADING")
    if specs.get("os:secure_boot", properties.get("os_secure_boot")) == "required":
        found.add("COMPUTE_SECURITY_UEFI_SECURE_BOOT")
    if said("pci_numa_affinity_policy") == "socket":
        found.add("COMPUTE_SOCKET_PCI_NUMA_AFFINITY")
    if (mode := said("maxphysaddr_mode")) in ("passthrough", "emulate"):
        found.add("COMPUTE_ADDRESS_SPACE_PASSTHROUGH" if mode == "passthrough" else "COMPUTE_ADDRESS_SPACE_EMULATED")
    if _yes(properties.get("hw_firmware_stateless")):
        found.add("COMPUTE_SECURITY_STATELESS_FIRMWARE")
    if _yes(said("mem_encryption")):
        model = said("mem_encryption_model") or "amd-sev"
        found.add(f"HW_CPU_X86_{model.upper().replace('-', '_')}")
    return found


def _yes(text: str | None) -> bool:
    return (text or "").lower() in YES
