"""Lists of servers, however many there are: time, SQL statements, bytes, and how the database looks for them.

    python bench/lists.py [N]      N servers (100000) on SQLite, of 20 projects; those of one project, then everybody's

Each server has an address, a security group, two volumes, metadata and tags.  Each list is asked for twice over HTTP, the
second time is told, by the CPU time of server and client; and once more for the memory that it took at its most, in MiB, beside what was there before.  "SCAN" in a plan reads every server there is, "TEMP B-TREE" puts in
order what was found; with an index neither is so.  Counts and plans do not depend on the machine.
"""

import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from builds import Bench, Client

from kilonova.kit.clock import iso
from kilonova.kit.memory import built
from kilonova.model.devices import Device
from kilonova.store import servers
from kilonova.store.servers import T

PROJECTS, EVERY_S = 20, 10.0  # a server is made every so many seconds


def main(n: int) -> None:
    with tempfile.TemporaryDirectory(prefix="kilonova-lists-") as directory:
        with built():  # as `up` does
            bench = Bench(Path(directory), None)
        bench.start()
        client = Client(bench.port)
        image = client.prepare()
        bench.ready()
        client.boot(image, "first")
        bench.settled()
        adorn(bench)
        bench.conductor.close()
        bench.hosts.close()
        fill(bench, client.project, n)
        sent = overheard(bench)
        print(f"{n} servers, {n // PROJECTS} of them of the project that asks")
        print(f"{'what':<44}{'servers':>8}{'CPU ms':>9}{'SQL':>5}{'KiB':>8}{'MiB':>7}  how they are looked for")
        for what, path in questions(bench, client.project, n):
            tell(client, bench, sent, what, path)
        client.http.close()
        bench.server.stop()
        bench.db.close()


def adorn(bench: Bench) -> None:
    """The first server gets all that a list shows of one; it is copied then."""
    volumes = [
        Device(uuid=bench_id(n), source="volume", destination="volume", volume_id=bench_id(n), size=1, name=f"/dev/vd{'bc'[n]}",
               attachment_id=bench_id(n)) for n in range(2)
    ]  # fmt: skip
    with bench.db.tx() as tx:
        (id,) = tx.execute(sa.select(T.c.id)).scalars()
        said = {
            "metadata": {f"key{n}": f"value{n}" for n in range(4)},
            "devices": servers.get(tx, id).devices + volumes,
        }
        servers.change(tx, id, None, **said, tags=["web", "blue"])


def bench_id(n: int) -> str:
    return f"{n:08x}-0000-4000-8000-00000000000f"


def fill(bench: Bench, mine: str, n: int) -> None:
    """The first server, again and again: other ids, names, projects and moments; a tenth is dead, some are ill."""
    facts = {c.name: f'"{c.name}"' for c in T.c if c.name != "number"}
    project = "CASE i % :projects WHEN 0 THEN :mine ELSE 'p' || (i % :projects) END"
    facts |= {
        "id": "printf('%08x-0000-4000-8000-000000000000', i)",
        "project_id": project,
        "name": "'server-' || i",
        "host": "'h' || (i % 1000)",
        "vm_state": "CASE WHEN i % 10 = 3 THEN 'deleted' WHEN i % 500 = 20 THEN 'error' ELSE 'active' END",
        "created_at": "created_at - (:n - i) * :every",
        "updated_at": "created_at - (:n - i) * :every + 60",
        "deleted_at": "CASE WHEN i % 10 = 3 THEN created_at - (:n - i) * :every + 3600 END",
        "tags": "CASE WHEN i % 500 = 40 THEN ',rare,' ELSE tags END",
    }
    series = "WITH RECURSIVE s(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM s WHERE i < :n - 1) "
    names, values = ", ".join(f'"{c}"' for c in facts), ", ".join(facts.values())
    told = {"n": n, "mine": mine, "projects": PROJECTS, "every": EVERY_S}
    with bench.db.tx() as tx:
        first = "(SELECT * FROM servers ORDER BY number LIMIT 1)"
        tx.execute(sa.text(f"INSERT INTO servers ({names}) {series} SELECT {values} FROM s, {first}"), told)
        tx.execute(sa.text("ANALYZE"))


def overheard(bench: Bench) -> list[str]:
    """What is sent to the database from now on."""
    sent: list[str] = []
    while bench.db.idle:
        bench.db.idle.pop()[0].close()
    sa.event.listen(bench.db.engine, "connect", lambda driver, _: driver.set_trace_callback(sent.append))
    return sent


def questions(bench: Bench, mine: str, n: int) -> list[tuple[str, str]]:
    of = T.c.project_id == mine, T.c.deleted_at.is_(None)
    with bench.db.read() as tx:
        newest = tx.execute(sa.select(T.c.id).where(*of).order_by(T.c.created_at.desc()).limit(1)).scalar()
        oldest = tx.execute(sa.select(T.c.id).where(*of).order_by(T.c.created_at).offset(101).limit(1)).scalar()
        last = tx.execute(sa.select(sa.func.max(T.c.updated_at))).scalar() or 0.0
    lately = iso(last - 200 * EVERY_S)
    list_, all_ = "/servers/detail?limit=100", "/servers/detail?limit=100&all_tenants=1"
    return [
        ("one server", f"/servers/{newest}"),
        ("a page of names", "/servers?limit=1000"),
        ("a page in detail", "/servers/detail?limit=1000"),
        ("the first hundred", list_),
        ("the last hundred", f"{list_}&marker={oldest}"),
        ("in error", f"{list_}&status=ERROR"),
        ("changed lately", f"{list_}&changes-since={lately}"),
        ("by name (anywhere in it)", f"{list_}&name=server-4242"),
        ("by tag", f"{list_}&tags=rare"),
        ("by address", f"{list_}&ip=10.99.0.77"),
        ("sorted by name", f"{list_}&sort_key=display_name&sort_dir=asc"),
        ("sorted by change", f"{list_}&sort_key=updated_at"),
        ("everybody's, the first hundred", all_),
        ("everybody's, the last hundred", f"{all_}&marker={oldest}"),
        ("everybody's, of a host", f"{all_}&host=h45"),
        ("everybody's, of a project", f"{all_}&project_id=p7"),
        ("everybody's, in error", f"{all_}&status=ERROR"),
        ("everybody's, changed lately", f"{all_}&changes-since={lately}"),
        ("everybody's, dead", f"{all_}&deleted=1"),
        ("limits", "/limits"),
    ]


def tell(client: Client, bench: Bench, sent: list[str], what: str, path: str) -> None:
    ask(client, path)
    sent.clear()
    counted, began = bench.db.statements, time.process_time()
    found, size = ask(client, path)
    took, counted = time.process_time() - began, bench.db.statements - counted
    peak = memory(client, path)
    statements = [s for s in sent if s.lstrip().upper().startswith("SELECT") and " servers" in s]
    print(
        f"{what:<44}{found:>8}{took * 1e3:>9.1f}{counted:>5}{size / 1024:>8.0f}{peak:>7.1f}  {'; '.join(plans(bench, statements))}"
    )


def memory(client: Client, path: str) -> float:
    """MiB at the most while it is answered, the client's own copy with them."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    ask(client, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (peak - before) / 2**20


def ask(client: Client, path: str) -> tuple[int, int]:
    """How many servers, and bytes."""
    client.http.request(
        "GET", f"/compute/v2.1{path}", headers={"X-Auth-Token": client.token, "OpenStack-API-Version": "compute 2.96"}
    )
    answer = client.http.getresponse()
    said = answer.read()
    assert answer.status == 200, (path, answer.status, said)
    servers = msgspec.json.decode(said).get("servers")
    return 1 if servers is None else len(servers), len(said)


def plans(bench: Bench, statements: list[str]) -> list[str]:
    """SQLite's words for each, without those that stand in every one."""
    said: list[Any] = []
    with bench.db.read() as tx:
        for s in dict.fromkeys(statements):
            rows = tx.exec_driver_sql(f"EXPLAIN QUERY PLAN {s}").all()
            said.append(", ".join(str(r[3]) for r in rows))
    return list(dict.fromkeys(said))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
