"""What a guest is made of: its NUMA cells, which of its CPUs have a host CPU of their own, how its memory lies.

The words are those of extra specs and image properties (`hw:numa_nodes`, `hw:cpu_policy`, `hw:mem_page_size` …); where
a guest of these cells can be on a host is `model/seat.py`.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

import msgspec

from kilonova.kit.errors import Invalid

SMALL_KB = 4
LARGE, ANY = -1, -2  # instead of a size in KiB: any that is large; any at all, large ones first
SIZES = {"k": 1, "m": 1024, "g": 1024 * 1024, "t": 1024 * 1024 * 1024, "": 1}
MOST = 16  # cells of one guest
YES = frozenset({"true", "1", "yes", "on", "t", "y"})


class GuestCell(msgspec.Struct, frozen=True):
    """`cpus` as the guest numbers them; `pinned` are those of them that have a host CPU of their own."""

    cpus: list[int]
    pinned: list[int]
    memory_mb: int


class Guest(msgspec.Struct, frozen=True):
    """All cells of a guest. `page_kb` 0: not said, and else a size, `LARGE` or `ANY`."""

    cells: list[GuestCell]
    page_kb: int = 0
    threads: str = ""  # prefer, isolate, require
    emulator: str = ""  # isolate: a host CPU of its own; share: with all that float
    realtime: list[int] = []
    locked: bool = False  # its memory is never written out

    @property
    def pcpus(self) -> int:
        """Host CPUs that nobody else has."""
        return sum(len(c.pinned) for c in self.cells) + (self.emulator == "isolate")


def guest(specs: Mapping[str, str], properties: Mapping[str, str], vcpus: int, memory_mb: int) -> Guest | None:
    """None: it has no wish. Raises Invalid where flavor and image contradict each other, or make no whole."""
    if not any(k.startswith(WISHES) for k in (*specs, *properties)):
        return None
    made = _guest(_sorted(specs), _sorted(properties), vcpus, memory_mb)
    if isinstance(made, str):
        raise Invalid(made)
    return made


def parted(specs: Mapping[str, str], properties: Mapping[str, str], vcpus: int, memory_mb: int) -> tuple[int, int]:
    """Host CPUs that it would have to itself, and how many of its CPUs float: all, where its wish is none that can be."""
    found = _if_any(specs, properties, vcpus, memory_mb)
    return (found.pcpus, vcpus - sum(len(c.pinned) for c in found.cells)) if found else (0, vcpus)


def pinned(specs: Mapping[str, str], properties: Mapping[str, str], vcpus: int, memory_mb: int) -> list[int]:
    """Those of the guest's CPUs that have a host CPU of their own."""
    found = _if_any(specs, properties, vcpus, memory_mb)
    return sorted(cpu for c in found.cells for cpu in c.pinned) if found else []


def _if_any(specs: Mapping[str, str], properties: Mapping[str, str], vcpus: int, memory_mb: int) -> Guest | None:
    try:
        return guest(specs, properties, vcpus, memory_mb)
    except Invalid:
        return None


def cpu_set(text: str) -> set[int]:
    """Of `0-3,^2,6`. Raises Invalid."""
    found, not_ = set[int](), set[int]()
    for part in filter(None, (p.strip() for p in text.split(","))):
        m = re.fullmatch(r"(\^?)([0-9]{1,4})(?:-([0-9]{1,4}))?", part, re.ASCII)
        if m is None or int(m[3] or m[2]) < int(m[2]):
            raise Invalid(f"Invalid inclusion expression {part[:64]!r}")
        (not_ if m[1] else found).update(range(int(m[2]), int(m[3] or m[2]) + 1))
    return found - not_


WISHES = ("hw:numa_", "hw:cpu_policy", "hw:cpu_thread_policy", "hw:mem_page_size", "hw:emulator_threads_policy",
          "hw:cpu_realtime", "hw:cpu_dedicated_mask", "hw:locked_memory", "hw_numa_", "hw_cpu_policy", "hw_cpu_thread_policy", "hw_mem_page_size",
          "hw_cpu_realtime_mask", "hw_locked_memory", "resources:PCPU")  # fmt: skip


def _sorted(said: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((k, v) for k, v in said.items() if k.startswith(("hw", "resources:"))))


@lru_cache(1000)
def _guest(
    specs: tuple[tuple[str, str], ...], properties: tuple[tuple[str, str], ...], vcpus: int, memory_mb: int
) -> Guest | str | None:
    try:
        return _Wish(dict(specs), dict(properties), vcpus, memory_mb).guest()
    except Invalid as e:
        return e.said


class _Wish:
    """What flavor and image say together."""

    def __init__(self, specs: dict[str, str], properties: dict[str, str], vcpus: int, memory_mb: int) -> None:
        self.specs, self.properties, self.vcpus, self.memory_mb = specs, properties, vcpus, memory_mb

    def guest(self) -> Guest | None:
        policy, page_kb = self.policy(), self.page_kb()
        n = self.nodes()
        pinned = self.pinned(policy)
        if not pinned:
            for name in ("cpu_thread_policy", "emulator_threads_policy"):
                if self.flavor(name) not in ("", "share"):
                    raise Invalid(f"hw:{name} needs hw:cpu_policy dedicated or mixed.")
            if self.flavor("cpu_realtime").lower() in YES:
                raise Invalid("hw:cpu_realtime needs hw:cpu_policy dedicated or mixed.")
        if self.either("locked_memory").lower() in YES and not page_kb:
            raise Invalid("hw:locked_memory needs hw:mem_page_size.")
        if not (n or pinned or page_kb):
            return None
        return Guest(
            cells=[GuestCell(sorted(c), sorted(c & pinned), mb) for c, mb in self.cells(n or 1)],
            page_kb=page_kb,
            threads=self.agreed("cpu_thread_policy"),
            emulator=self.flavor("emulator_threads_policy"),
            realtime=self.realtime(pinned),
            locked=self.either("locked_memory").lower() in YES,
        )

    def flavor(self, name: str) -> str:
        return self.specs.get(f"hw:{name}", "")

    def either(self, name: str) -> str:
        """The flavor's, else the image's."""
        return self.flavor(name) or self.properties.get(f"hw_{name}", "")

    def agreed(self, name: str) -> str:
        ours, theirs = self.flavor(name), self.properties.get(f"hw_{name}", "")
        if ours and theirs and ours != theirs:
            raise Invalid(f"Image property 'hw_{name}' is not permitted to override the flavor's 'hw:{name}'.")
        return ours or theirs

    def policy(self) -> str:
        ours, theirs = self.flavor("cpu_policy"), self.properties.get("hw_cpu_policy", "")
        for said in (ours, theirs):
            if said not in ("", "shared", "dedicated", "mixed"):
                raise Invalid(f"Invalid CPU allocation policy {said[:64]!r}.")
        if ours and ours != "dedicated" and theirs not in ("", ours, "shared"):
            raise Invalid("Image property 'hw_cpu_policy' is not permitted to override CPU pinning of the flavor.")
        named = self.specs.get("resources:PCPU", "")
        if not (ours or theirs) and named.isdecimal() and int(named) == self.vcpus:
            return "dedicated"
        return ours or theirs or "shared"

    def pinned(self, policy: str) -> set[int]:
        all, mask = set(range(self.vcpus)), self.flavor("cpu_dedicated_mask")
        if policy != "mixed":
            if mask:
                raise Invalid("hw:cpu_dedicated_mask needs hw:cpu_policy mixed.")
            return all if policy == "dedicated" else set()
        found = self._mask(mask) if mask else self.realtime_mask(all)
        if not found or not found < all:
            raise Invalid("With hw:cpu_policy mixed some of the CPUs must be dedicated, and not all.")
        return found

    def _mask(self, text: str) -> set[int]:
        """What begins with ^ is all but that."""
        if text.startswith("^"):
            return set(range(self.vcpus)) - cpu_set(text.replace("^", ""))
        return cpu_set(text)

    def realtime_mask(self, all: set[int]) -> set[int]:
        text = self.either("cpu_realtime_mask")
        return self._mask(text) & all if text else set()

    def realtime(self, pinned: set[int]) -> list[int]:
        if self.flavor("cpu_realtime").lower() not in YES:
            return []
        found = self.realtime_mask(pinned) or pinned
        return sorted(found & pinned)

    def page_kb(self) -> int:
        ours, theirs = _page_kb(self.flavor("mem_page_size")), _page_kb(self.properties.get("hw_mem_page_size", ""))
        if not theirs:
            return ours
        if ours == ANY or (ours == LARGE and theirs not in (SMALL_KB, ANY)):
            return theirs
        raise Invalid("Page size of the image is not allowed by the flavor.")

    def nodes(self) -> int:
        text = self.agreed("numa_nodes")
        if not text:
            return 0
        if not re.fullmatch(r"[1-9][0-9]?", text, re.ASCII) or int(text) > MOST:
            raise Invalid(f"hw:numa_nodes must be a number from 1 to {MOST}.")
        return int(text)

    def cells(self, n: int) -> list[tuple[set[int], int]]:
        """CPUs and memory of each: as it is said, and else in equal parts."""
        cpus = [self.agreed(f"numa_cpus.{i}") for i in range(n)]
        memory = [self.agreed(f"numa_mem.{i}") for i in range(n)]
        if any(self.agreed(f"numa_{what}.{n}") for what in ("cpus", "mem")):
            raise Invalid("There are more NUMA cells described than hw:numa_nodes tells.")
        if not (any(cpus) or any(memory)):
            if self.vcpus % n or self.memory_mb % n:
                raise Invalid(f"CPUs and memory cannot be parted evenly among {n} NUMA cells.")
            each = self.vcpus // n
            return [(set(range(i * each, (i + 1) * each)), self.memory_mb // n) for i in range(n)]
        if not (all(cpus) and all(memory)):
            raise Invalid("CPUs and memory must be told of all NUMA cells, or of none.")
        sets = [cpu_set(text) for text in cpus]
        if sorted(c for s in sets for c in s) != list(range(self.vcpus)):
            raise Invalid("Each CPU must be in one NUMA cell, and all of them.")
        if not all(re.fullmatch(r"[1-9][0-9]{0,8}", m, re.ASCII) for m in memory):
            raise Invalid("The memory of a NUMA cell is a number of MB.")
        if sum(map(int, memory)) != self.memory_mb:
            raise Invalid("The memory of the NUMA cells must be that of the flavor, together.")
        return [(s, int(m)) for s, m in zip(sets, memory, strict=True)]


def _page_kb(text: str) -> int:
    """Raises Invalid."""
    text = text.lower()
    if named := {"": 0, "any": ANY, "large": LARGE, "small": SMALL_KB}.get(text):
        return named
    m = re.fullmatch(r"([1-9][0-9]{0,8})([kmgt]?)i?b?", text, re.ASCII)
    if m is None and text:
        raise Invalid(f"Invalid memory page size {text[:64]!r}.")
    return int(m[1]) * SIZES[m[2]] if m else 0
