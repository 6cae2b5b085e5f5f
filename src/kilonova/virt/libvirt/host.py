"""What this host has, and whether it can run guests on its own CPU: asked of the machine, not of what libvirt says.

libvirt's word is not enough for two of these.  Memory: it adds up NUMA cells and can miss some.  KVM: it looks for
/dev/kvm, which also is there where nothing boots with it.  So a probe guest must run; see `docs/decisions/kvm-proof.md`.
"""

import base64
import contextlib
import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import os_traits

from kilonova.kit.clock import Clock
from kilonova.kit.errors import Unsupported
from kilonova.model.host import Cell
from kilonova.model.numa import SMALL_KB

PATH = f"{os.environ.get('PATH', '')}:/usr/local/bin:/usr/bin:/bin:/usr/libexec"
KVM = Path("/dev/kvm")
PROBE_TIMEOUT_S = 2.0


def emulator(architecture: str = "") -> str:
    """The path of QEMU. Raises Unsupported where it is missing."""
    name = f"qemu-system-{architecture or platform.machine()}"
    found = shutil.which(name, path=PATH) or shutil.which("qemu-kvm", path=PATH)
    if not found:
        raise Unsupported(f"There is no {name} on this host.")
    return found


def version(qemu: str) -> int:
    """7002022 is 7.2.22. libvirt could say it too, after it has examined every emulator there is."""
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    found = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", said)
    return (
        sum(int(part or 0) * 1000**power for part, power in zip(found.groups(), (2, 1, 0), strict=True)) if found else 0
    )


# ---- the proof of KVM


class Proof(msgspec.Struct, frozen=True):
    """Does KVM run guests here? `why` is a sentence for the operator; `final`: would it be so again?"""

    works: bool
    why: str
    final: bool = True


def prove_kvm(qemu: str, kept: Path, clock: Clock) -> Proof:
    """The probe's result, which is kept in the file `kept` until kernel, QEMU or boot are other ones. At most 2 s."""
    if not KVM.exists():
        return Proof(False, "This machine has no /dev/kvm, so guests are emulated.")
    if not os.access(KVM, os.R_OK | os.W_OK):
        return Proof(False, "This user may not use /dev/kvm (is it in the group kvm?), so guests are emulated.")
    if platform.machine() != "x86_64":
        return Proof(False, f"No probe guest is known for {platform.machine()}, so guests are emulated.")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    seen = Path(qemu).stat()
    key = f"{PROBE_VERSION} {boot} {platform.release()} {qemu} {seen.st_size} {seen.st_mtime_ns} {os.geteuid()}"
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        was, proof = msgspec.json.decode(kept.read_bytes(), type=tuple[str, Proof])
        if was == key:
            return proof
    since = clock.now()
    why = probe(qemu, "kvm")
    took = clock.now() - since
    if not why:
        proof = Proof(True, f"KVM: a probe guest ran on it in {took:.2f} s.")
    else:
        proof = Proof(
            False,
            f"/dev/kvm is there, but a probe guest did not run on it ({why}), so guests are emulated.",
            final=why != TOO_LONG,
        )
    if proof.final:
        part = kept.with_suffix(".part")
        part.write_bytes(msgspec.json.encode((key, proof)))
        part.replace(kept)
    return proof


def probe(qemu: str, accelerator: str, timeout_s: float = PROBE_TIMEOUT_S) -> str:
    """Boots the probe guest. "" when it ran to its end, else a few words about what happened."""
    with tempfile.NamedTemporaryFile(prefix="kilonova-probe-") as disk:
        disk.write(PROBE.ljust(510, b"\0") + b"\x55\xaa")
        disk.flush()
        cpu = "host" if accelerator == "kvm" else "max"
        command = [qemu, "-machine", f"pc,accel={accelerator}", "-cpu", cpu, "-m", "16"]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-device", "isa-debug-exit,iobase=0x501,iosize=1", "-debugcon", "stdio"]
        command += ["-drive", f"file={disk.name},format=raw,if=ide,snapshot=on"]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/"
        ) as guest:
            with contextlib.suppress(OSError):
                resource.prlimit(guest.pid, resource.RLIMIT_CORE, (0, 0))
            late = threading.Timer(timeout_s, guest.kill)
            late.start()
            complaint = ""
            assert guest.stderr is not None
            assert guest.stdout is not None
            for line in guest.stderr:
                text = line.decode(errors="replace").strip()
                if "warning:" not in text:
                    complaint = complaint or text
                if "KVM internal error" in text:  # QEMU only pauses the guest then
                    guest.kill()
            said = guest.stdout.read(16)
            code = guest.wait()
            in_time = late.is_alive()
            late.cancel()
    if said == b"K" and code == PROBE_EXIT:
        return ""
    if complaint:
        return re.sub(r"^\S*qemu[^:]*: ", "", complaint)[:120]
    return f"QEMU ended with {code}" if in_time else TOO_LONG


TOO_LONG = "it did not come to its end in time"
PROBE_VERSION = 1
PROBE_EXIT = 0x10 << 1 | 1  # isa-debug-exit's arithmetic

# A boot sector, started by the firmware that guests have.  It goes the way of every kernel: real mode, page tables,
# long mode, an exception through the IDT and back by IRETQ, 33 million turns of a loop (10 ms on a CPU; never done
# in time where each instruction is emulated), CPUID.  Then it says K and ends QEMU.
#
#   cli; cld; zero DS, SS; SP=0x7c00; zero 20 KiB at 0x10000
#   PML4[0]=0x11003  PDPT[0]=0x12003  PD[0]=0x83  IDT[3]=handler, selector 8, type 0x8e
#   lgdt; lidt; CR4=PAE; CR3=0x10000; EFER|=LME; CR0|=PG|PE; ljmp 8:long
#   long: SS=0x10; ESP=0x7c00; int3; ecx=0x2000000; 1: dec ecx; jnz 1b; cpuid
#         out 0xe9,'K'; out 0x501,0x10; 2: hlt; jmp 2b
#   handler: iretq      gdt: 0, code 0x209a, data 0x92
PROBE = base64.b16decode(
    "FAFC31C08ED88ED0BC007CB800108EC031FF31C0B90028F3AB2666C7060000031001002666C7060010032001002666C7"
    "060020830000002666C7063040AB7C08002666C7063440008E00000F0116C87C0F011ECE7C66B8200000000F22E066B8"
    "000001000F22D866B9800000C00F320D00010F300F20C0660D010000800F22C0EA857C0800B8100000008ED0BC007C00"
    "00CCB900000002FFC975FC0FA2B04BE6E9B01066BA0105EEF4EBFD48CF0F1F00000000000000000000000000009A2000"
    "00000000009200001700B07C00003F00004001"
)


# ---- what it has


def memory_mb() -> int:
    """All of it; libvirt's count misses some where NUMA cells are not what it expects."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return 0


def cpus() -> int:
    """Those we may use."""
    return len(own_cpus())


def own_cpus() -> set[int]:
    return os.sched_getaffinity(0)


def disk_gb(directory: Path) -> tuple[int, int]:
    """(size, free) of the file system there, in GiB."""
    found = os.statvfs(directory)
    return found.f_blocks * found.f_frsize >> 30, found.f_bavail * found.f_frsize >> 30


class Abilities(msgspec.Struct, frozen=True):
    """What libvirt says of guests on this host: see `abilities`."""

    cpu_info: dict[str, object]
    traits: list[str]
    cpu_models: list[str]  # those that can be had


def abilities(capabilities: str, features: list[str]) -> Abilities:
    """Out of `virConnectGetDomainCapabilities` for the accelerator chosen, and the CPU features guests get."""
    root = ElementTree.fromstring(capabilities)  # noqa: S314  (libvirt's own output)
    host_model = root.find("cpu/mode[@name='host-model']")
    model = host_model.findtext("model", "") if host_model is not None else ""
    vendor = host_model.findtext("vendor", "") if host_model is not None else ""
    architecture = root.findtext("arch", platform.machine())
    info: dict[str, object] = {
        "arch": architecture,
        "model": model,
        "vendor": vendor,
        "features": sorted(features),
        "topology": {"cells": 1, **_topology()},
    }
    traits = {f"COMPUTE_ARCH_{architecture.upper()}", "COMPUTE_FIRMWARE_BIOS", *ALWAYS}
    if architecture in ("x86_64", "i686"):
        traits |= {CPU_TRAITS[f] for f in features if f in CPU_TRAITS}
    for path, prefix, names in OFFERED:
        offered = {value.text or "" for value in root.iterfind(f"{path}/value")}
        traits |= {f"{prefix}{names.get(value, value.upper())}" for value in offered}
    if "efi" in {value.text for value in root.iterfind("os/enum[@name='firmware']/value")}:
        traits.add("COMPUTE_FIRMWARE_UEFI")
        if "yes" in {value.text for value in root.iterfind("os/loader/enum[@name='secure']/value")}:
            traits.add("COMPUTE_SECURITY_UEFI_SECURE_BOOT")
    known = set(os_traits.get_traits())
    models = [m.text or "" for m in root.iterfind("cpu/mode[@name='custom']/model") if m.get("usable") == "yes"]
    return Abilities(info, sorted(traits & known), models)


def cells(capabilities: str, may: set[int]) -> list[Cell]:
    """The host's NUMA nodes, out of `virConnectGetCapabilities`: as far as we may use their CPUs."""
    root = ElementTree.fromstring(capabilities)  # noqa: S314  (libvirt's own output)
    found = []
    for cell in root.iterfind("host/topology/cells/cell"):
        cores: dict[str, list[int]] = {}
        for cpu in cell.iterfind("cpus/cpu"):
            number = int(cpu.get("id", "0"))
            if number in may:
                cores.setdefault(cpu.get("siblings") or str(number), []).append(number)
        ids = sorted(cpu for core in cores.values() for cpu in core)
        pages = {int(p.get("size", "0")): int(p.text or 0) for p in cell.iterfind("pages") if p.get("unit") == "KiB"}
        large = {kb: n for kb, n in pages.items() if kb > SMALL_KB}
        siblings = sorted(cores.values()) if any(len(core) > 1 for core in cores.values()) else []
        sockets = {int(s) for cpu in cell.iterfind("cpus/cpu") if (s := cpu.get("socket_id", "")).isdecimal()}
        socket = sockets.pop() if len(sockets) == 1 else None
        found.append(Cell(len(ids), int(cell.findtext("memory", "0")) // 1024, large, ids, siblings, socket))
    return found


def host_model(capabilities: str) -> str:
    """The host's CPU out of the same capabilities, in the words that `virConnectBaselineHypervisorCPU` takes, or ""."""
    root = ElementTree.fromstring(capabilities)  # noqa: S314  (libvirt's own output)
    model = root.find("cpu/mode[@name='host-model']")
    if model is None or model.get("supported") != "yes":
        return ""
    model.tag, model.attrib = "cpu", {"mode": "custom", "match": "exact"}
    return ElementTree.tostring(model, encoding="unicode")


def features(cpu: str) -> list[str]:
    """The names of all that it has."""
    root = ElementTree.fromstring(cpu)  # noqa: S314  (libvirt's own output)
    return [f.get("name", "") for f in root.iterfind("feature") if f.get("policy") != "disable"]


def _topology() -> dict[str, object]:
    """Sockets, cores of each, threads of each, out of /proc/cpuinfo; it need not say."""
    cpus_seen, sockets, cores = 0, set(), set()
    physical = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "processor":
            cpus_seen += 1
        elif key == "physical id":
            physical = value
            sockets.add(value)
        elif key == "core id":
            cores.add((physical, value))
    n_sockets, n_cores = len(sockets) or 1, len(cores) or cpus_seen or 1
    return {
        "sockets": n_sockets,
        "cores": max(1, n_cores // n_sockets),
        "threads": max(1, cpus_seen // n_cores) if n_cores else 1,
    }


# What this driver does for every machine.
ALWAYS = {
    "OWNER_NOVA",
    "COMPUTE_SOCKET_PCI_NUMA_AFFINITY",
    "COMPUTE_DEVICE_TAGGING",
    "COMPUTE_IMAGE_TYPE_RAW",
    "COMPUTE_IMAGE_TYPE_AMI",
    "COMPUTE_IMAGE_TYPE_QCOW2",
    "COMPUTE_IMAGE_TYPE_ISO",
    "COMPUTE_IMAGE_TYPE_VMDK",
    "COMPUTE_IMAGE_TYPE_VDI",
    "COMPUTE_IMAGE_TYPE_VHD",
    "COMPUTE_IMAGE_TYPE_VHDX",
    "COMPUTE_NET_ATTACH_INTERFACE",
    "COMPUTE_NET_ATTACH_INTERFACE_WITH_TAG",
    "COMPUTE_NET_VIF_MODEL_VIRTIO",
    "COMPUTE_NET_VIF_MODEL_E1000",
    "COMPUTE_NET_VIF_MODEL_E1000E",
    "COMPUTE_NET_VIF_MODEL_RTL8139",
    "COMPUTE_VOLUME_ATTACH",
    "COMPUTE_VOLUME_ATTACH_WITH_TAG",
    "COMPUTE_VOLUME_EXTEND",
    "COMPUTE_VOLUME_MULTI_ATTACH",
}

# fmt: off
OFFERED: list[tuple[str, str, dict[str, str]]] = [
    ("devices/disk/enum[@name='bus']",        "COMPUTE_STORAGE_BUS_",    {}),
    ("devices/video/enum[@name='modelType']", "COMPUTE_GRAPHICS_MODEL_", {}),
]

# libvirt's name of an x86 feature: the trait
CPU_TRAITS = {libvirt: f"HW_CPU_X86_{trait}" for libvirt, trait in {
    "3dnow": "3DNOW",   "abm": "ABM",         "aes": "AESNI",       "avx": "AVX",         "avx2": "AVX2",
    "avx512bw": "AVX512BW",                   "avx512cd": "AVX512CD",                     "avx512dq": "AVX512DQ",
    "avx512er": "AVX512ER",                   "avx512f": "AVX512F",                       "avx512pf": "AVX512PF",
    "avx512vl": "AVX512VL",                   "avx512vnni": "AVX512VNNI",                 "avx512vbmi": "AVX512VBMI",
    "avx512ifma": "AVX512IFMA",               "avx512vbmi2": "AVX512VBMI2",               "avx512bitalg": "AVX512BITALG",
    "vaes": "AVX512VAES",                     "gfni": "AVX512GFNI",                       "vpclmulqdq": "AVX512VPCLMULQDQ",
    "avx512-vpopcntdq": "AVX512VPOPCNTDQ",
    "bmi1": "BMI",      "bmi2": "BMI2",       "f16c": "F16C",       "fma": "FMA3",        "fma4": "FMA4",
    "mmx": "MMX",       "mpx": "MPX",         "pclmuldq": "CLMUL",  "pdpe1gb": "PDPE1GB", "rtm": "TSX",
    "sha-ni": "SHA",    "pni": "SSE3",        "sse": "SSE",         "sse2": "SSE2",       "sse4.1": "SSE41",
    "sse4.2": "SSE42",  "sse4a": "SSE4A",     "ssse3": "SSSE3",     "stibp": "STIBP",     "tbm": "TBM",
    "xop": "XOP",       "svm": "AMD_SVM",     "vmx": "VMX",         "ssbd": "INTEL_SSBD", "ibpb": "AMD_IBPB",
    "amd-ssbd": "AMD_SSBD",                   "virt-ssbd": "AMD_VIRT_SSBD",               "amd-no-ssb": "AMD_NO_SSB",
    "md-clear": "INTEL_MD_CLEAR",             "pcid": "INTEL_PCID",                       "spec-ctrl": "INTEL_SPEC_CTRL",
    "amx-bf16": "AMXBF16",                    "amx-int8": "AMXINT8",                      "amx-tile": "AMXTILE",
}.items()}
# fmt: on
