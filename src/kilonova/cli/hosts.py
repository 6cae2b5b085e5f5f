"""`kilonova hosts`: what hosts have, use and have left; `kilonova hosts why FLAVOR`: where such a server could live;
`kilonova hosts why --server ID`: why that one is where it is, or nowhere.

They read the cloud's database, whether the cloud is up or not.  `drain HOST` and `balance` speak to its APIs.
"""

import argparse
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kilonova.api.topology import made_of
from kilonova.cli import config as configuration
from kilonova.cli import database, drain
from kilonova.cli.client import Client
from kilonova.cli.state import StateDir, is_home
from kilonova.kit.clock import Ids, WallClock, iso
from kilonova.kit.db import Db, Tx
from kilonova.kit.errors import Invalid, NotFound
from kilonova.model import wants
from kilonova.model.ask import Ask
from kilonova.model.flavor import Flavor
from kilonova.model.host import Stock
from kilonova.model.options import Config
from kilonova.model.server import Image
from kilonova.scheduler.select import Scheduler
from kilonova.store import catalog, choices, hosts, placement, servers

USUAL = ("VCPU", "MEMORY_MB", "DISK_GB")


def main(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """0; of `why`, 1 when there is no host for it; of `drain`, 1 when some servers stay, 130 when it was stopped."""
    parser.add_argument(
        "what", nargs="?", choices=["list", "why", "drain", "balance"], default="list", help="%(choices)s (%(default)s)"
    )
    parser.add_argument(
        "about", nargs="?", metavar="FLAVOR|HOST", help="why: of the server that is asked about; drain: the host"
    )
    parser.add_argument("--plan", action="store_true", help="drain: only say what would be done")
    parser.add_argument("--yes", action="store_true", help="drain: do it without asking")
    parser.add_argument("--live-only", action="store_true", help="drain: turn nothing off that runs")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="drain: moves at a time (%(default)s)")
    parser.add_argument("--timeout", type=float, default=1800, metavar="S", help="drain: for one move (%(default)s s)")
    parser.add_argument(
        "--url", metavar="URL", help="drain, balance: of a cloud elsewhere; OS_PASSWORD is its password"
    )
    parser.add_argument("--server", metavar="ID", help="why: of this one, that is there or came to nothing")
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
    named = chosen.server is not None and chosen.what == "why"
    if (chosen.what in ("why", "drain") and not named) != (chosen.about is not None):
        parser.error("hosts why FLAVOR, hosts why --server ID, hosts drain HOST")
    if chosen.what == "drain":
        return _drain(chosen)
    if chosen.what == "balance":
        return _balance(chosen)
    config = configuration.read(chosen.config, {})
    db = database.opened(config, chosen.state_dir)
    try:
        if named:
            return _why_there(db, chosen)
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


def pools(tx: Tx) -> list[dict[str, Any]]:
    """What is shared with hosts, by whom, with how many."""
    of = {n.uuid: n.host for n in hosts.nodes(tx)}
    with_: dict[str, set[str]] = {}
    for pool, provider in placement.shared(tx):
        if provider in of:
            with_.setdefault(pool, set()).add(of[provider])
    stocks, names = placement.stocks(tx, with_), placement.names(tx, with_)
    return [
        {
            "pool": names[pool],
            "hosts": sorted(there),
            "resources": {c: _sized(*stocks[pool][c]) for c in sorted(stocks.get(pool, ()), key=_order)},
        }
        for pool, there in sorted(with_.items(), key=lambda item: names[item[0]])
    ]


def _state(service: hosts.Service, now: float, down_after_s: float) -> str:
    up = "up" if service.up(now, down_after_s) else "down"
    return f"{up}, disabled" if service.disabled else up


def _resource(n: hosts.Node, name: str) -> dict[str, int]:
    return _sized(n.stocks[name], n.used.get(name, 0))


def _sized(stock: Stock, used: int) -> dict[str, int]:
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
        found, shared = listed(tx, config, WallClock().now()), pools(tx)
    if chosen.json:
        of = {h: {p["pool"]: p["resources"] for p in shared if h in p["hosts"]} for h in {h["host"] for h in found}}
        print(msgspec.json.encode([h | {"shared": of[h["host"]]} for h in found]).decode())
        return 0
    names = sorted({name for h in found for name in h["resources"]}, key=_order)
    rows = [["host", "zone", "state", "servers", *(f"{n} used/capacity (free)" for n in names)]]
    for h in found:
        of = h["resources"]
        cells = [f"{of[n]['used']}/{of[n]['capacity']} ({of[n]['free']})" if n in of else "-" for n in names]
        rows.append([_called(h), h["zone"], h["state"], str(h["servers"]), *cells])
    print(table(rows))
    for p in shared:
        told = ", ".join(f"{r['used']}/{r['capacity']} {c} ({r['free']})" for c, r in p["resources"].items())
        print(f"{p['pool']} is shared by {len(p['hosts'])} hosts: {told or 'it has nothing'}")
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
        flavor = _flavor(tx, chosen.about)
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


def _why_there(db: Db, chosen: argparse.Namespace) -> int:
    """0 where it is on a host."""
    with db.read() as tx:
        server = servers.get(tx, chosen.server)
        found = choices.of_server(tx, server.id)
    if chosen.json:
        told = {"server": server.id, "host": server.host, "choices": choices.shown(found)}
        print(msgspec.json.encode(told).decode())
        return 0 if server.host else 1
    print(f"{server.name} ({server.id}) is {f'on {server.host}' if server.host else 'on no host'}.")
    for c in found:
        print(f"\n{iso(c.at)} {c.action}: {c.fault or ', '.join(p.place.host for p in c.places) or 'nowhere'}")
        print(f"  {c.explained if c.turned_away or not c.places else f'Of {c.hosts} hosts none was turned away.'}")
        for p in c.places:
            parts = ", ".join(f"{name} {w:+}" for name, w in p.weights.items() if w is not None)
            print(
                f"  {p.place.host} weighs {p.weight}{f': {parts}' if parts else ''}{f'; {p.refused}' if p.refused else ''}"
            )
    return 0 if server.host else 1


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


# ---- drain, balance


def _client(chosen: argparse.Namespace) -> Client:
    """An administrator of the cloud that is up in the directory, or of the one at `--url`. Raises NotFound, Unknown."""
    if chosen.url:
        client = Client(chosen.url, os.environ.get("OS_PASSWORD", ""), user=os.environ.get("OS_USERNAME", "admin"))
    else:
        now = StateDir(chosen.state_dir).running() if is_home(chosen.state_dir) else None
        if now is None:
            raise NotFound(f"No cloud is up in {chosen.state_dir}.")
        client = Client(now.url, StateDir(chosen.state_dir).secrets(Ids()).admin_password)
    client.login()
    return client


def _drain(chosen: argparse.Namespace) -> int:
    """The plan first; then, with a yes, the deed."""
    client, host = _client(chosen), chosen.about
    drain.service_of(client, host)
    servers = drain.servers_on(client, host)
    moves = drain.planned(servers)
    room = drain.foreseen(moves, servers, drain.loads(client), host) if moves else {}
    if chosen.json and chosen.plan:
        print(msgspec.json.encode([m._asdict() | {"hosts_with_room": room.get(m.id)} for m in moves]).decode())
        return 0
    print(f"{host} has {len(moves)} server{'s' * (len(moves) != 1)}. It is disabled first, so that no other comes.")
    for m in moves:
        print(f"  {m.name} ({m.id}) {drain.WORDS[m.way]}{f': {m.why}' if m.why else ''}{_room(room.get(m.id))}")
    if chosen.plan:
        return 0
    if not chosen.yes and input("Shall it be done? [y/N] ").strip().lower() not in ("y", "yes"):
        return 1
    do = drain.Drain(
        client,
        host,
        say=lambda text: print(text, flush=True),
        pause=time.sleep,
        at_once=max(1, chosen.at_once),
        patience_s=chosen.timeout,
        cold=not chosen.live_only,
    )
    return drain.drained(do)


def _room(hosts_: int | None) -> str:
    """Of who moves: where it could go, as far as room goes."""
    if hosts_ is None:
        return ""
    return (
        f"; {hosts_} host{'s have' if hosts_ != 1 else ' has'} room for it" if hosts_ else "; no host has room for it"
    )


def _balance(chosen: argparse.Namespace) -> int:
    """A report: nothing is moved."""
    client = _client(chosen)
    all = drain.loads(client)
    shifts = drain.evened(all, {load.host: drain.servers_on(client, load.host) for load in all})
    if chosen.json:
        shown = {
            "hosts": {load.host: round(load.full, 4) for load in all},
            "moves": [{"server": s.server.id, "name": s.server.name, "from": s.of, "to": s.to} for s in shifts],
        }
        print(msgspec.json.encode(shown).decode())
        return 0
    print(table([["host", "full"], *([load.host, f"{load.full:.0%}"] for load in sorted(all, key=lambda x: -x.full))]))
    print()
    print("Moves that would even it out:" if shifts else "No move would even it out by much.")
    for s in shifts:
        print(
            f"  openstack server migrate --live-migration --host {s.to} {s.server.id}  # {s.server.name}, from {s.of}"
        )
    return 0
