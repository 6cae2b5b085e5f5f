"""Small questions with a yes or no, asked of one host: pure, and slow enough to be asked only where needed."""

from collections.abc import Iterable

from kilonova.model.host import HostFacts

NUMBERS = {"=": "ge", "==": "eq", "!=": "ne", ">=": "ge", "<=": "le"}
TEXTS = {"s==": "eq", "s!=": "ne", "s<": "lt", "s<=": "le", "s>": "gt", "s>=": "ge"}

# Names that images use for what hypervisors call otherwise.
ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "x86-64": "x86_64", "arm64": "aarch64", "i386": "i686"}
HYPERVISORS = {"kvm": {"qemu", "kvm"}, "qemu": {"qemu", "kvm"}}


def matches(value: str, wanted: str) -> bool:
    """Does a host's `value` satisfy an extra spec (scheduler.md, value operators)? `= 4`, `s== x`, `<in> abc`, `<or> a <or> b`."""
    words = wanted.split()
    if not words:
        return value == wanted
    operator, rest = words[0], words[1:]
    if operator == "<or>":
        return value in [w for w in rest if w != "<or>"]
    if operator == "<in>":
        return bool(rest) and " ".join(rest) in value
    if operator == "<all-in>":
        return all(w in value for w in rest)
    if operator in TEXTS and rest:
        return _compared(TEXTS[operator], value, " ".join(rest))
    if operator in NUMBERS and rest:
        try:
            return _compared(NUMBERS[operator], float(value), float(rest[0]))
        except ValueError:
            return False
    return value == wanted


def _compared(how: str, a: float | str, b: float | str) -> bool:
    said = getattr(a, f"__{how}__")(b)
    return said is True


def runs(facts: HostFacts, properties: dict[str, str]) -> bool:
    """Can this hypervisor run an image with these properties: architecture, hypervisor type, way of running?"""
    return (
        _architecture(facts, properties.get("hw_architecture") or properties.get("architecture"))
        and _hypervisor(facts, properties.get("img_hv_type") or properties.get("hypervisor_type"))
        and (properties.get("hw_vm_mode") or properties.get("vm_mode") or "hvm").lower() in ("hvm", "exe")
    )


def _architecture(facts: HostFacts, wanted: str | None) -> bool:
    if not wanted:
        return True
    wanted = ARCHITECTURES.get(wanted.lower(), wanted.lower())
    own = str(facts.cpu_info.get("arch") or "x86_64").lower()
    return wanted == own or (wanted == "i686" and own == "x86_64") or f"COMPUTE_ARCH_{wanted.upper()}" in facts.traits


def _hypervisor(facts: HostFacts, wanted: str | None) -> bool:
    if not wanted:
        return True
    own = facts.hypervisor_type.lower()
    return own in HYPERVISORS.get(wanted.lower(), {wanted.lower()}) or own == "fake"


def aggregate_fits(extra_specs: dict[str, str], metadata: dict[str, set[str]]) -> bool:
    """Does a host whose aggregates say `metadata` fit a flavor's unscoped (or `aggregate_instance_extra_specs:`) specs?"""
    for key, wanted in extra_specs.items():
        scope, colon, name = key.rpartition(":")
        if colon and scope != "aggregate_instance_extra_specs":
            continue
        values = metadata.get(name if colon else key)
        if values is None or not any(matches(v, wanted) for v in values):
            return False
    return True


def tenant_fits(project_id: str, metadata: dict[str, set[str]]) -> bool:
    """Aggregates with `filter_tenant_id*` admit those projects only; those without admit all."""
    named = {
        p.strip()
        for key, values in metadata.items()
        if key.startswith("filter_tenant_id")
        for v in values
        for p in v.split(",")
    }
    return not named or project_id in named


def split_values(values: Iterable[str]) -> set[str]:
    """An aggregate's value may list several, with commas between."""
    return {part.strip() for v in values for part in v.split(",")}
