"""`kilonova hosts`: what hosts have, use and have left; `kilonova hosts why FLAVOR`: where such a server could live.

It reads the cloud's database, whether the cloud is up or not.
"""

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kilonova.api.topology import made_of
from kilonova.cli import config as configuration
from kilonova.cli import database
from kilonova.kit.clock import WallClock
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Invalid
from kilonova.model import wants
from kilonova.model.ask import Ask
from kilonova.model.flavor import Flavor
from kilonova.model.options import Config
from kilonova.model.server import Image
from kilonova.scheduler.select import Scheduler
from kilonova.store import catalog, hosts

USUAL = ("VCPU", "MEMORY_MB", "DISK_GB")


def main(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """0; of `why`, 1 when there is no host for it."""
    parser.add_argument("what", nargs="?", choices=["list", "why"], default="list", help="%(choices)s (%(default)s)")
    parser.add_argument("flavor", nargs="?", metavar="FLAVOR", help="of the server that is asked about: name or id")
    parser.add_argument("--zone", metavar="ZONE", help="it shall be in this availability zone")
    parser.add_argument("--host", metavar="HOST", help="it shall be there")
    parser.add_argument("--project", default="", metavar="ID", help="whose it is")
    parser.add_argument(
        "--property", action="append", default=[], metavar="KEY=VALUE", help="of its image; may be repeated"
    )
    parser.add_argument("--volume", action="store_true", help="it boots from a volume")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--config", type=Path, metavar="FILE", help="read this file instead of the usual ones")
    chosen = parser.parse_args(words)
    if (chosen.what == "why") != (chosen.flavor is not None):
        parser.error("hosts why FLAVOR")
    config = configuration.read(chosen.config, {})
    db = database.opened(config, chosen.state_dir)
    try:
        return _why(db, config, chosen) if chosen.what == "why" else _list(db, config, chosen)
    finally:
        db.close()


# ---- list


def listed(tx: Tx, config: Config, now: float) -> list[dict[str, Any]]:
    """What there is to say of each host."""
    zones = hosts.zones(tx)
    return [
        {
            "host": n.host,
            "node": n.node,
            "zone": zones.get(n.host, config.api.default_availability_zone),
            "state": _state(n.service, now, config.compute.host_down_after_s),
            "servers": n.running,
            "resources": {name: _resource(n, name) for name in sorted(n.stocks, key=_order)},
        }
        for n in hosts.nodes(tx)
    ]


def _state(service: hosts.Service, now: float, down_after_s: float) -> str:
    up = "up" if service.up(now, down_after_s) else "down"
    return f"{up}, disabled" if service.disabled else up


def _resource(n: hosts.Node, name: str) -> dict[str, int]:
    stock, used = n.stocks[name], n.used.get(name, 0)
    capacity = int((stock.total - stock.reserved) * stock.allocation_ratio)
    return {
        "total": stock.total,
        "reserved": stock.reserved,
        "capacity": capacity,
        "used": used,
        "free": capacity - used,
    }


def _order(name: str) -> tuple[int, str]:
    return (USUAL.index(name) if name in USUAL else len(USUAL), name)


def _list(db: Db, config: Config, chosen: argparse.Namespace) -> int:
    with db.read() as tx:
        found = listed(tx, config, WallClock().now())
    if chosen.json:
        print(msgspec.json.encode(found).decode())
        return 0
    names = sorted({name for h in found for name in h["resources"]}, key=_order)
    rows = [["host", "zone", "state", "servers", *(f"{n} used/capacity (free)" for n in names)]]
    for h in found:
        of = h["resources"]
        cells = [f"{of[n]['used']}/{of[n]['capacity']} ({of[n]['free']})" if n in of else "-" for n in names]
        rows.append([_called(h), h["zone"], h["state"], str(h["servers"]), *cells])
    print(table(rows))
    return 0


def _called(h: dict[str, Any]) -> str:
    return str(h["host"] if h["host"] == h["node"] else f"{h['host']} {h['node']}")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns one below the other; the first row is what they are called."""
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in wide), *lines[1:]])


# ---- why


def _why(db: Db, config: Config, chosen: argparse.Namespace) -> int:
    with db.read() as tx:
        flavor = _flavor(tx, chosen.flavor)
    down = config.compute.host_down_after_s
    scheduler = Scheduler(
        db,
        clock=WallClock(),
        dice=random.Random(),
        options=config.scheduler,
        down_after_s=down,
        default_zone=config.api.default_availability_zone,
    )
    against = scheduler.explain(_ask(config, flavor, chosen))
    fit = [host for host, rules in against.items() if not rules]
    counts = dict(Counter(name for rules in against.values() for name in rules).most_common())
    if chosen.json:
        print(msgspec.json.encode({"flavor": flavor.name, "fit": fit, "against": against, "counts": counts}).decode())
    else:
        print(f"{flavor.name} could live on {len(fit)} of {len(against)} host{'s' * (len(against) != 1)}.")
        for name, n in counts.items():
            print(f"  {name} turns away {n}")
        if against:
            print()
            print(
                table(
                    [["host", "turned away by"], *([host, ", ".join(rules) or "-"] for host, rules in against.items())]
                )
            )
    return 0 if fit else 1


def _flavor(tx: Tx, said: str) -> Flavor:
    """By name, then by id. Raises NotFound."""
    named = next((f for f in catalog.flavors(tx, project_id=None, name=said) if f.name == said), None)
    return named or catalog.flavor(tx, said)


def _ask(config: Config, flavor: Flavor, chosen: argparse.Namespace) -> Ask:
    """Raises Invalid."""
    if odd := [p for p in chosen.property if "=" not in p]:
        raise Invalid(f"--property {odd[0]}: it must be KEY=VALUE.")
    properties = dict(p.split("=", 1) for p in chosen.property)
    flavor = made_of(config, flavor, Image(properties=properties))
    return Ask(
        amounts=wants.amounts(flavor, properties, volume_backed=chosen.volume),
        parts=wants.parts(flavor),
        isolate=wants.isolated(flavor.extra_specs),
        required=sorted(wants.required(flavor.extra_specs, properties)),
        forbidden=sorted(wants.forbidden(flavor.extra_specs, properties)),
        zone=chosen.zone,
        host=chosen.host,
        project_id=chosen.project,
        flavor=flavor.name,
        extra_specs=flavor.extra_specs,
        properties=properties,
        vcpus=flavor.vcpus,
        memory_mb=flavor.memory_mb,
    )
