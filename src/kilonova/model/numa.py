"""NUMA nodes that a guest wants, and whether a host's fit: by what the host has, not by what others took of it."""

import re
from collections.abc import Mapping

from kilonova.model.host import Cell

SMALL_KB = 4
SIZES = {"kb": 1, "mb": 1024, "gb": 1024 * 1024, "": 1}
MOST = 16  # nodes of one guest


def wanted(specs: Mapping[str, str], properties: Mapping[str, str], vcpus: int, memory_mb: int) -> list[Cell] | None:
    """The guest's nodes, with the size of their pages; None: it has no wish. An odd wish is one that nobody fulfils."""

    def said(name: str) -> str:
        return specs.get(f"hw:{name}") or properties.get(f"hw_{name}") or ""

    pages, dedicated = said("mem_page_size").lower(), said("cpu_policy") in ("dedicated", "mixed")
    if not (said("numa_nodes") or dedicated or pages):
        return None
    if not re.fullmatch(r"[1-9][0-9]?", nodes := said("numa_nodes") or "1") or (n := int(nodes)) > MOST:
        return [Cell(2**31, 2**31)]
    kb = _page_kb(pages)
    cells = []
    for i in range(n):
        cpus = len(_cpus(said(f"numa_cpus.{i}"))) or -(-vcpus // n)
        text = said(f"numa_mem.{i}")
        cells.append(Cell(cpus, int(text) if text.isdecimal() else -(-memory_mb // n), {kb: 0} if kb else {}))
    return cells


def fits(guest: list[Cell], host: list[Cell]) -> bool:
    """Is there a node of the host of its own for each of the guest's? The hardest first, and back where it fails."""

    def placed(left: list[Cell], free: list[Cell]) -> bool:
        if not left:
            return True
        first, rest = left[0], left[1:]
        return any(_holds(cell, first) and placed(rest, free[:i] + free[i + 1 :]) for i, cell in enumerate(free))

    return len(guest) <= len(host) and placed(sorted(guest, key=lambda c: (-c.cpus, -c.memory_mb)), host)


def _holds(host: Cell, guest: Cell) -> bool:
    if guest.cpus > host.cpus or guest.memory_mb > host.memory_mb:
        return False
    size = next(iter(guest.pages), 0)
    if size == -1:  # "large": of any size
        return any(n * kb >= guest.memory_mb * 1024 for kb, n in host.pages.items() if kb > SMALL_KB)
    return size <= SMALL_KB or host.pages.get(size, 0) * size >= guest.memory_mb * 1024


def _page_kb(text: str) -> int:
    """0: any; -1: some large one."""
    if text in ("", "any", "small"):
        return 0
    m = re.fullmatch(r"([1-9][0-9]{0,8})(kb|mb|gb|)", text)
    return int(m[1]) * SIZES[m[2]] if m else -1


def _cpus(text: str) -> set[int]:
    """Of `0-3,^2,6`."""
    found, not_ = set[int](), set[int]()
    for part in filter(None, text.split(",")):
        m = re.fullmatch(r"(\^?)([0-9]{1,4})(?:-([0-9]{1,4}))?", part.strip())
        if m:
            (not_ if m[1] else found).update(range(int(m[2]), int(m[3] or m[2]) + 1))
    return found - not_
