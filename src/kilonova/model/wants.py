"""What flavor and image want of a host, in Placement's words: amounts of resource classes, and traits (scheduler.md, 4 and 5)."""

import re
from collections.abc import Iterable, Mapping
from math import ceil
from types import MappingProxyType

import msgspec

from kilonova.model import numa
from kilonova.model.flavor import Flavor

VCPU, PCPU, MEMORY_MB, DISK_GB = "VCPU", "PCPU", "MEMORY_MB", "DISK_GB"
MOST = 2**31 - 1
GRANULAR = re.compile(r"(resources|trait)([a-zA-Z0-9_-]{1,64})?:([A-Z0-9_]{1,255})")
OURS = "OWNER_NOVA"
NOTHING: Mapping[str, str] = MappingProxyType({})
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


class Part(msgspec.Struct, frozen=True):
    """What one provider must serve alone (Placement API, granular request groups)."""

    suffix: str
    amounts: dict[str, int]
    required: list[str] = []
    forbidden: list[str] = []


def amounts(flavor: Flavor, properties: Mapping[str, str] = NOTHING, *, volume_backed: bool = False) -> dict[str, int]:
    """All that a server of this flavor and image takes, of its host and of what hangs on it.

    `resources:CLASS=n` (also `resources1:…`) overrides what follows from the flavor, 0 takes a class out.
    """
    said = _summed([*_said(flavor.extra_specs).values(), *(p.amounts for p in _of_aliases(flavor))])
    disk_gb = (0 if volume_backed else flavor.disk_gb) + flavor.ephemeral_gb + ceil(flavor.swap_mb / 1024)
    pinned, floating = numa.parted(flavor.extra_specs, properties, flavor.vcpus, flavor.memory_mb)
    usual = {VCPU: floating, PCPU: pinned, MEMORY_MB: flavor.memory_mb, DISK_GB: disk_gb}
    if VCPU in said or PCPU in said:
        del usual[VCPU], usual[PCPU]
    if _yes(flavor.extra_specs.get("hw:mem_encryption")):
        usual["MEM_ENCRYPTION_CONTEXT"] = 1
    for label in filter(None, flavor.extra_specs.get("hw:pmem", "").split(",")):
        name = f"CUSTOM_PMEM_NAMESPACE_{re.sub(r'[^A-Z0-9_]', '_', label.strip().upper())}"
        usual[name] = usual.get(name, 0) + 1
    return {c: n for c, n in (usual | said).items() if n > 0}


def parts(flavor: Flavor) -> list[Part]:
    """What is asked of one provider each: groups with a suffix, and each device of an alias."""
    specs, found = flavor.extra_specs, list[Part]()
    marks = {v: _marks(specs, v) for v in ("required", "forbidden")}
    for suffix, classes in sorted(_said(specs).items()):
        if suffix and (some := {c: n for c, n in classes.items() if n}):
            traits = [sorted(marks[v].get(suffix, ())) for v in ("required", "forbidden")]
            found.append(Part(suffix, some, *traits))
    return found + _of_aliases(flavor)


def _of_aliases(flavor: Flavor) -> list[Part]:
    found = list[Part]()
    for name, n in aliases(flavor.extra_specs).items() if flavor.aliases else ():
        if (alias := flavor.aliases.get(name)) is not None:
            found += [Part(f"_pci_{name}_{i}", {alias.resource_class: 1}, [OURS, *alias.traits]) for i in range(n)]
    return found


def isolated(specs: Mapping[str, str]) -> bool:
    """Must its groups be served by different providers?"""
    return specs.get("group_policy") == "isolate"


def aliases(specs: Mapping[str, str]) -> dict[str, int]:
    """Names of PCI devices, and how many of each."""
    found: dict[str, int] = {}
    for word in filter(None, (w.strip() for w in specs.get("pci_passthrough:alias", "").split(","))):
        name, _, n = word.rpartition(":")
        if name and re.fullmatch(r"[0-9]{1,4}", n, re.ASCII):
            found[name] = found.get(name, 0) + int(n)
    return found


def numa_policy(flavor: Flavor, properties: Mapping[str, str]) -> str:
    """How near its devices must be: required, socket, legacy, preferred; of several the strictest."""
    said = {flavor.extra_specs.get("hw:pci_numa_affinity_policy") or properties.get("hw_pci_numa_affinity_policy", "")}
    said |= {a.numa_policy for a in flavor.aliases.values()} if said == {""} else set()
    return next((p for p in ("required", "socket", "legacy", "preferred") if p in said), "legacy")


def _said(specs: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """By suffix, `resources<suffix>:CLASS=n`."""
    found: dict[str, dict[str, int]] = {}
    for key, text in specs.items():
        m = GRANULAR.fullmatch(key)
        if m and m[1] == "resources" and re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) and int(text) <= MOST:
            found.setdefault(m[2] or "", {})[m[3]] = int(text)
    return found


def _marks(specs: Mapping[str, str], value: str) -> dict[str, set[str]]:
    """By suffix, `trait<suffix>:T=value`."""
    found: dict[str, set[str]] = {}
    for key, v in specs.items():
        if v == value and (m := _trait(key)):
            found.setdefault(m[2] or "", set()).add(m[3])
    return found


def _summed(all: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for amounts in all:
        for c, n in amounts.items():
            found[c] = found.get(c, 0) + n
    return found


def required(specs: Mapping[str, str], properties: Mapping[str, str]) -> set[str]:
    """Traits that the host must have, but for those of groups with something of their own (`parts`): those that are named, and those that follow from what else is asked."""
    groups = {suffix for suffix, classes in _said(specs).items() if suffix and any(classes.values())}
    named = {t for suffix, traits in _marks(specs, "required").items() if suffix not in groups for t in traits}
    return named | _marks(properties, "required").get("", set()) | _followed(specs, properties)


def forbidden(specs: Mapping[str, str], properties: Mapping[str, str]) -> set[str]:
    """Traits that it must not have."""
    groups = {suffix for suffix, classes in _said(specs).items() if suffix and any(classes.values())}
    named = {t for suffix, traits in _marks(specs, "forbidden").items() if suffix not in groups for t in traits}
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
