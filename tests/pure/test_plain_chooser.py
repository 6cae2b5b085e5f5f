"""The scheduler's columns held against a slow, plain chooser that looks at one host after the other, by the words of the specification."""

import random
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from hypothesis import given, settings
from hypothesis import strategies as st

from kilonova.contracts.scheduler import Choose
from kilonova.model.ask import Ask
from kilonova.model.options import Compute
from kilonova.model.server_group import Company
from kilonova.store import hosts
from tests.pure.test_scheduler import House
from tests.pure.test_scheduler_rules import aggregate, server

FILTERS = [
    "ComputeFilter", "ComputeCapabilitiesFilter", "ImagePropertiesFilter", "ServerGroupAntiAffinityFilter",
    "ServerGroupAffinityFilter", "SameHostFilter", "DifferentHostFilter", "SimpleCIDRAffinityFilter", "IsolatedHostsFilter",
    "AggregateInstanceExtraSpecsFilter", "AggregateImagePropertiesIsolation", "AggregateMultiTenancyIsolation",
    "AggregateTypeAffinityFilter", "AggregateNumInstancesFilter",
]  # fmt: skip
SAID = {
    "filter_tenant_id": ("p", "q", "p,q"), "instance_type": ("small", "large", "small,large"), "ssd": ("true", "false"),
    "os": ("linux", "windows"), "max_instances_per_host": ("1", "2", "many"),
}  # fmt: skip
TRAITS = ("HW_CPU_X86_AVX2", "CUSTOM_FAST")


@dataclass
class Plain:
    """A host, as the chooser knows it."""

    name: str
    ip: str
    vcpus: int
    ratio: float
    used: int
    arch: str
    vendor: str
    traits: set[str]
    disabled: bool
    silent: bool
    zone: str
    servers: int
    groups: list[dict[str, str]] = field(default_factory=list)  # what each aggregate says

    def values(self, key: str) -> set[str]:
        return {v.strip() for g in self.groups if key in g for v in g[key].split(",")}


def lets(h: Plain, ask: Ask, here: dict[str, int], isolated: set[str]) -> bool:
    """Scheduling, sections 3 to 5 and 7, of one host."""
    n = ask.amounts["VCPU"]
    if n > h.vcpus or h.used + n > h.vcpus * h.ratio:
        return False
    if ask.host not in (None, h.name) or h.name in ask.avoid:
        return False
    if ask.forced:
        return True
    if h.disabled or h.silent or (ask.zone is not None and ask.zone != h.zone):
        return False
    if not set(ask.required) <= h.traits or set(ask.forbidden) & h.traits:
        return False
    if ask.properties.get("hw_architecture") not in (None, h.arch):
        return False
    if ask.extra_specs.get("capabilities:vendor") not in (None, h.vendor):
        return False
    ssd, os_ = ask.extra_specs.get("ssd"), ask.properties.get("os")
    if ssd is not None and ssd not in h.values("ssd"):
        return False
    if os_ is not None and h.values("os") and os_ not in h.values("os"):
        return False
    if (tenants := h.values("filter_tenant_id")) and ask.project_id not in tenants:
        return False
    if (types := h.values("instance_type")) and ask.flavor not in types:
        return False
    most = min((int(v) for v in h.values("max_instances_per_host") if v.isdigit()), default=50)
    if h.servers >= most:
        return False
    if (ask.image_id == "special") != (h.name in isolated):
        return False
    if ask.near is not None and h.name not in ask.near:
        return False
    if h.name in ask.far:
        return False
    near = ask.hints.get("build_near_host_ip")
    if near and ip_address(h.ip) not in ip_network(f"{near}{ask.hints['cidr']}", strict=False):
        return False
    if ask.company is not None:
        others = here.get(h.name, 0)
        if ask.company.policy == "anti-affinity" and others >= ask.company.most:
            return False
        if ask.company.policy == "affinity" and here and not others:
            return False
    return True


def furnished(dice: random.Random, isolated: set[str]) -> tuple[House, list[Plain]]:
    house = House(rules=FILTERS, isolated_hosts=sorted(isolated), isolated_images=["special"])
    all = []
    for i in range(dice.randint(1, 7)):
        h = Plain(
            name=f"h{i}", ip=f"192.0.{i % 3}.{i + 1}", vcpus=dice.randint(2, 8), ratio=dice.choice([1.0, 1.5, 2.0]), used=0,
            arch=dice.choice(["x86_64", "aarch64"]), vendor=dice.choice(["AMD", "Intel"]),
            traits={t for t in TRAITS if dice.random() < 0.7}, disabled=dice.random() < 0.06, silent=False, zone="nova",
            servers=dice.choice([0, 0, 1, 2]),
        )  # fmt: skip
        house.host(
            h.name, host_ip=h.ip, vcpus=h.vcpus, traits=sorted(h.traits), cpu_info={"arch": h.arch, "vendor": h.vendor},
            compute=Compute(reserved_memory_mb=0, cpu_allocation_ratio=h.ratio),
        )  # fmt: skip
        if used := min(h.vcpus, dice.choice([0, 0, 0, 1, 8])):
            house.claim(h.name, {"VCPU": used}, f"x{i}")
            h.used = used
        for k in range(h.servers):
            server(house, f"s{i}-{k}", h.name)
        if h.disabled:
            house.tx(hosts.set_service, house.tx(hosts.service_of, h.name).uuid, 1.0, disabled=True)
        all.append(h)
    for k in range(dice.randint(0, 4)):
        members = [h for h in all if dice.random() < 0.5]
        said = {key: dice.choice(SAID[key]) for key in dice.sample(sorted(SAID), dice.randint(1, 3))}
        free = all if k == 0 else []  # a host is in one zone
        if free and dice.random() < 0.5:
            said["availability_zone"] = "z"
        aggregate(house, f"g{k}", [h.name for h in members], **said)
        for h in members:
            h.groups.append(said)
            h.zone = said.get("availability_zone", h.zone)
    house.clock.at += 100  # all are silent now, but those that are heard
    for h in all:
        h.silent = dice.random() < 0.05
    house.tx(hosts.seen, {h.name: house.clock.at for h in all if not h.silent})
    return house, all


def wished(dice: random.Random, all: list[Plain]) -> Ask:
    def maybe(value, odds: float = 0.12):
        return value if dice.random() < odds else None

    some = [h.name for h in all if dice.random() < 0.5]
    specs = {"ssd": maybe(dice.choice(["true", "false"])), "capabilities:vendor": maybe(dice.choice(["AMD", "Intel"]))}
    properties = {
        "hw_architecture": maybe(dice.choice(["x86_64", "aarch64"])),
        "os": maybe(dice.choice(["linux", "windows"])),
    }
    host = maybe(dice.choice(all).name, 0.1)
    at = {h: dice.randint(1, 2) for h in some}
    company = maybe(Company(dice.choice(["affinity", "anti-affinity"]), dice.randint(1, 2), at), 0.4)
    return Ask(
        amounts={"VCPU": dice.randint(1, 3)},
        required=[t for t in TRAITS if dice.random() < 0.06],
        forbidden=[t for t in TRAITS if dice.random() < 0.04],
        zone=maybe(dice.choice(["z", "nova", "nova", "elsewhere"])),
        host=host,
        forced=host is not None and dice.random() < 0.5,
        avoid=dice.sample(some, min(1, len(some))) if dice.random() < 0.1 else [],
        project_id=dice.choice(["p", "q", "r"]),
        flavor=dice.choice(["small", "large"]),
        extra_specs={k: v for k, v in specs.items() if v},
        properties={k: v for k, v in properties.items() if v},
        image_id=dice.choice(["special", *[""] * 7]),
        hints={"build_near_host_ip": "192.0.1.77", "cidr": dice.choice(["/24", "/16"])} if dice.random() < 0.15 else {},
        near=maybe(some, 0.15),
        far=some if dice.random() < 0.15 else [],
        company=company,
        group_id="g" if company else None,
    )


@settings(max_examples=25)
@given(st.integers(0, 10**9))
def test_the_same_hosts_as_a_plain_chooser(seed):
    dice = random.Random(seed)
    isolated = {"h0"} if dice.random() < 0.4 else set()
    house, all = furnished(dice, isolated)
    for turn in range(8):
        wish = wished(dice, all)
        here = wish.company.at if wish.company else {}
        expect = {h.name for h in all if lets(h, wish, here, isolated)}
        house.scheduler.hosts.mark = -1  # what was chosen before is forgotten
        chosen = house.scheduler.choose(Choose(server=f"s{turn}", ask=wish, most=99, fresh=True))
        assert {p.host for p in chosen.places} == expect, (seed, wish)
        assert sum(chosen.why.values()) == len(all) - len(expect) and chosen.hosts == len(all)
    house.db.close()
