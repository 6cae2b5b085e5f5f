"""Rules that users ask for with their request: near a server or far from one, near an address, or by an expression."""

import operator
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address, ip_network
from types import EllipsisType
from typing import Any

import msgspec
import numpy as np

from kilonova.model.ask import Ask
from kilonova.scheduler.hosts import Bools, Hosts
from kilonova.scheduler.rules import View, rows, rule

DEPTH = 32  # of an expression; a deeper one is true nowhere


@rule()
def same_host(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Where one of these servers is."""
    if ask.near is None:
        return ...
    near = frozenset(ask.near)
    return rows(hosts, lambda p: p.host in near)


@rule()
def different_host(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Where none of these servers is."""
    if not ask.far:
        return ...
    far = frozenset(ask.far)
    return rows(hosts, lambda p: p.host not in far)


@rule(standard=False)
def near_ip(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts whose address is in the same net as `build_near_host_ip`, of the size `cidr` (/24)."""
    if (near := _first(ask.hints.get("build_near_host_ip"))) is None:
        return ...
    try:
        net = ip_network(f"{near}/{str(_first(ask.hints.get('cidr')) or '/24').lstrip('/')}", strict=False)
    except ValueError:
        return np.zeros(hosts.n, bool)
    return np.fromiter((bool(ip) and ip_address(ip) in net for ip in hosts.ips), bool, hosts.n)


def _first(said: Any) -> Any:
    return (said[0] if said else None) if isinstance(said, list) else said


@rule(standard=False, needs=("loads",))
def json_query(hosts: Hosts, ask: Ask, view: View) -> Bools | EllipsisType:
    """Hosts of which the hint `query` is true: `["and", [">=", "$free_ram_mb", 1024], ["not", …]]`."""
    query = _first(ask.hints.get("query")) if isinstance(ask.hints.get("query"), str) else ask.hints.get("query")
    if query is None:
        return ...
    if isinstance(query, str):
        try:
            query = msgspec.json.decode(query)
        except (msgspec.DecodeError, RecursionError):
            return np.zeros(hosts.n, bool)
    facts = _facts(hosts)
    return np.asarray([_truth(_value(query, partial(facts, row))) for row in range(hosts.n)], bool)


def _facts(hosts: Hosts) -> Callable[[int, str], Any]:
    """What is known of a row, by the names that Nova has for it."""
    total = {name: hosts.capacity[:, i] for name, i in hosts.classes.items()}
    known: dict[str, Any] = {
        "free_ram_mb": hosts.free_of("MEMORY_MB"),
        "free_disk_mb": hosts.free_of("DISK_GB") * 1024,
        "total_usable_ram_mb": total.get("MEMORY_MB"),
        "total_usable_disk_gb": total.get("DISK_GB"),
        "vcpus_total": total.get("VCPU"),
        "vcpus_used": None if "VCPU" not in hosts.classes else hosts.used[:, hosts.classes["VCPU"]],
        "num_instances": hosts.servers,
        "num_io_ops": hosts.ops,
        "hypervisor_version": hosts.version,
    }

    def of(i: int, path: str) -> Any:
        name, *rest = path.split(".")
        if (column := known.get(name)) is not None:
            return None if rest else column[i].item()
        if name in ("host", "nodename", "hypervisor_hostname"):
            return hosts.places[i].host if name == "host" else hosts.places[i].node
        value: Any = getattr(hosts.kinds[hosts.kind[i]], name, None)
        for step in rest:
            value = value.get(step) if isinstance(value, dict) else None
        return value

    return of


def _truth(value: Any) -> bool:
    return any(map(_truth, value)) if isinstance(value, list) else bool(value)


def _value(query: Any, fact: Callable[[str], Any], depth: int = 0) -> Any:
    """Operators are the first of a list; `$name` is a fact; what is unknown compares with nothing."""
    if isinstance(query, str) and query.startswith("$"):
        return fact(query[1:])
    if not isinstance(query, list):
        return query
    if not query or depth > DEPTH or not isinstance(query[0], str) or query[0] not in OPERATORS:
        return False
    return OPERATORS[query[0]]([_value(part, fact, depth + 1) for part in query[1:]])


def _compares(how: Callable[[Any, Any], Any]) -> Callable[[list[Any]], bool]:
    def all_the_rest(values: list[Any]) -> bool:
        try:
            return len(values) > 1 and all(bool(how(values[0], other)) for other in values[1:])
        except TypeError:
            return False

    return all_the_rest


OPERATORS: dict[str, Callable[[list[Any]], Any]] = {
    "=": _compares(operator.eq),
    "<": _compares(operator.lt),
    ">": _compares(operator.gt),
    "<=": _compares(operator.le),
    ">=": _compares(operator.ge),
    "in": lambda values: len(values) > 1 and values[0] in values[1:],
    "not": lambda values: [not _truth(v) for v in values],
    "and": lambda values: all(map(_truth, values)),
    "or": lambda values: any(map(_truth, values)),
}
