"""Tables of nftables as values, and the shortest transaction that turns one into the next.

The kernel takes a transaction whole or not at all, and packets see the old rules or the new, never half of each.
"""

import msgspec


class Table(msgspec.Struct, frozen=True):
    """Sets and maps are name → (type, elements); a map's elements are key → value. Chains are lines, in order.

    The first line of a base chain is its hook (`type filter hook …;`).
    """

    family: str
    name: str
    sets: dict[str, tuple[str, frozenset[str]]] = {}
    maps: dict[str, tuple[str, dict[str, str]]] = {}
    chains: dict[str, tuple[str, ...]] = {}

    @property
    def called(self) -> str:
        return f"{self.family} {self.name}"


def whole(table: Table) -> str:
    """Makes the table anew, whatever is there."""
    return f"add table {table.called}\ndelete table {table.called}\n" + "\n".join(_make(table)) + "\n"


def remove(table: Table) -> str:
    return f"add table {table.called}\ndelete table {table.called}\n"


def delta(old: Table, new: Table) -> str:
    """From `old`, which is there, to `new`; empty where they are the same. Both are tables of one name."""
    if old == new:
        return ""
    if _reshaped(old, new):
        return whole(new)
    lines = []
    # First what others refer to, then who refers, then what nobody refers to any more.
    for name, (kind, _) in new.sets.items():
        if name not in old.sets:
            lines.append(f"add set {new.called} {name} {{ {kind}; }}")
    for name, (kind, _) in new.maps.items():
        if name not in old.maps:
            lines.append(f"add map {new.called} {name} {{ {kind}; }}")
    lines += [f"add chain {new.called} {name}" for name, rules in new.chains.items() if name not in old.chains]
    for name, (_, had) in old.maps.items():
        has = new.maps[name][1] if name in new.maps else {}
        lines += _elements("delete", new, name, [k for k, v in had.items() if has.get(k) != v])
    for name, (_, members) in old.sets.items():
        if name in new.sets:
            lines += _elements("delete", new, name, members - new.sets[name][1])
    for name, (_, members) in new.sets.items():
        lines += _elements("add", new, name, members - (old.sets[name][1] if name in old.sets else frozenset()))
    for name, rules in new.chains.items():
        before = old.chains.get(name)
        if before != rules:
            lines += [f"flush chain {new.called} {name}"] if before else []
            lines += [f"add rule {new.called} {name} {rule}" for rule in rules if not _is_hook(rule)]
    for name, (_, has) in new.maps.items():
        had = old.maps[name][1] if name in old.maps else {}
        lines += _elements("add", new, name, [f"{k} : {v}" for k, v in has.items() if had.get(k) != v])
    gone = [name for name in old.chains if name not in new.chains]
    lines += [f"flush chain {new.called} {name}" for name in gone]
    lines += [f"delete chain {new.called} {name}" for name in gone]
    lines += [f"delete map {new.called} {name}" for name in old.maps if name not in new.maps]
    lines += [f"delete set {new.called} {name}" for name in old.sets if name not in new.sets]
    return "\n".join(lines) + "\n"


def _make(table: Table) -> list[str]:
    lines = [f"add table {table.called}"]
    lines += [f"add set {table.called} {name} {{ {kind}; }}" for name, (kind, _) in table.sets.items()]
    lines += [f"add map {table.called} {name} {{ {kind}; }}" for name, (kind, _) in table.maps.items()]
    for name, rules in table.chains.items():
        hook = f" {{ {rules[0]} }}" if rules and _is_hook(rules[0]) else ""
        lines.append(f"add chain {table.called} {name}{hook}")
    for name, (_, members) in table.sets.items():
        lines += _elements("add", table, name, members)
    for name, rules in table.chains.items():
        lines += [f"add rule {table.called} {name} {rule}" for rule in rules if not _is_hook(rule)]
    for name, (_, has) in table.maps.items():
        lines += _elements("add", table, name, [f"{k} : {v}" for k, v in has.items()])
    return lines


def _elements(verb: str, table: Table, name: str, elements: "frozenset[str] | list[str]") -> list[str]:
    if not elements:
        return []
    return [f"{verb} element {table.called} {name} {{ {', '.join(sorted(elements))} }}"]


def _is_hook(rule: str) -> bool:
    return rule.startswith("type ")


def _reshaped(old: Table, new: Table) -> bool:
    """Changes that a transaction cannot make in place: another type, another hook."""
    if any(name in old.sets and old.sets[name][0] != kind for name, (kind, _) in new.sets.items()):
        return True
    if any(name in old.maps and old.maps[name][0] != kind for name, (kind, _) in new.maps.items()):
        return True
    hooks = [{n: r[0] for n, r in t.chains.items() if r and _is_hook(r[0])} for t in (old, new)]
    return hooks[0] != hooks[1]
