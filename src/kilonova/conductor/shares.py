"""Shared file systems come and go: a host is let in, its machine has one more directory; and the way back.

Who must be let in to a share is what the rows of servers say (`store/shares.py`), and nobody keeps a second list: each
time something changes, the rules at the service are made what they must be (`agree`).  So two servers of one host may
have the same share, and who goes first does not lock the other out.
"""

import logging
from typing import Any

import msgspec

from kilonova.clients.share import Rule
from kilonova.conductor.world import World
from kilonova.contracts.compute import AttachShare, DetachShare, Done
from kilonova.contracts.jobs import AttachShare as AttachJob
from kilonova.contracts.jobs import DetachShare as DetachJob
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import Conflict, Invalid, NotFound, Unavailable
from kilonova.kit.reconcile import reconciler
from kilonova.kit.workflow import FOREVER, Run, command, effect, record, workflow
from kilonova.model.shares import Sharing, of_machine
from kilonova.model.states import VERBS, Verb
from kilonova.store import compare, hosts, servers, shares

log = logging.getLogger(__name__)

LOOKS = 3  # at what is wanted, before others are let go first


# ---- attach


@workflow
def attach_share(run: Run, job: AttachJob) -> None:
    id, uuid = job.server.id, job.share.uuid
    run.if_undone(failed, id, uuid)
    run.when_alone()
    found = run(place, id, uuid)
    key = run(let_in, found.share)
    run(hand_on, id, found.host or "", found.share, key)
    run(attached, uuid)


class Place(msgspec.Struct, frozen=True):
    host: str | None
    share: Sharing


@record
def place(tx: Tx, id: str, uuid: str) -> Place:
    """Where it is, now that nobody moves it, and as whom its host asks. Raises Conflict, NotFound."""
    server, share = _still(tx, id, uuid, VERBS["attach_share"])
    if share.proto == "NFS":
        who = hosts.address(tx, server.host or "")
        if not who:
            raise Conflict(f"The host of instance {id} has no address that a share could be opened to.")
        share = msgspec.structs.replace(share, kind="ip", who=who)
        shares.change(tx, uuid, kind=share.kind, who=share.who)
    return Place(server.host, share)


class Key(msgspec.Struct, frozen=True):
    """What its host must show beside its name: CephFS only."""

    secret: str = ""

    def __repr__(self) -> str:
        return "Key()"


@effect(event="compute_allow_share")
def let_in(world: World, key: str, share: Sharing) -> Key:
    rule = agree(world, share.share_id).get((share.kind, share.who))
    if rule is None or rule.state == "error":
        raise Conflict(f"Share {share.share_id} could not be opened to the host.")
    if rule.state != "active" or (share.kind == "cephx" and not rule.access_key):
        raise Unavailable(f"Share {share.share_id} is being opened to the host.")
    return Key(rule.access_key or "")


@let_in.undo
def _(world: World, key: str, share: Sharing) -> None:
    agree(world, share.share_id, besides=share.uuid)


@command(patience_s=600)
def hand_on(id: str, host: str, share: Sharing, key: Key) -> To[Done]:
    return To(host, AttachShare(server=id, share=of_machine(share, key.secret)))


@hand_on.undo
def _(id: str, host: str, share: Sharing, key: Key) -> To[Done]:
    return To(host, DetachShare(server=id, share_id=share.share_id, anyway=True))


@record
def attached(tx: Tx, uuid: str) -> None:
    shares.change(tx, uuid, ["attaching"], busy="")


@record
def failed(tx: Tx, id: str, uuid: str) -> None:
    """Nobody is let in for it; its user sees what became of it, and takes it away. With the server it is gone: who deleted
    that may have looked before it was asked for."""
    server = servers.find(tx, [id]).get(id)
    if server is None or server.deleted_at is not None:
        shares.remove(tx, uuid)
    else:
        shares.change(tx, uuid, ["attaching"], busy="error", kind="", who="")


# ---- detach


@workflow
def detach_share(run: Run, job: DetachJob) -> None:
    id, uuid = job.server.id, job.share.uuid
    run.if_undone(kept, uuid, job.was)
    run.when_alone()
    found = run(leaving, id, uuid)
    if found.host is not None:
        run(take_back, id, found.host, found.share)
    run.no_return()
    run(let_out, found.share)
    run(detached, uuid)


@record
def leaving(tx: Tx, id: str, uuid: str) -> Place:
    server, share = _still(tx, id, uuid, VERBS["detach_share"])
    return Place(server.host, share)


@command(patience_s=600)
def take_back(id: str, host: str, share: Sharing) -> To[Done]:
    return To(host, DetachShare(server=id, share_id=share.share_id))


@take_back.undo
def _(id: str, host: str, share: Sharing) -> To[Done]:
    """Without the key of CephFS, which the host has of the machine as it was: where that is gone, comparing finds it."""
    if not share.who:  # it never came to be
        return To(host, DetachShare(server=id, share_id=share.share_id, anyway=True))
    return To(host, AttachShare(server=id, share=of_machine(share), anyway=True))


@effect(patience_s=FOREVER, event="compute_deny_share")
def let_out(world: World, key: str, share: Sharing) -> None:
    agree(world, share.share_id, besides=share.uuid)


@record
def detached(tx: Tx, uuid: str) -> None:
    shares.remove(tx, uuid)


@record
def kept(tx: Tx, uuid: str, was: str) -> None:
    shares.change(tx, uuid, ["detaching"], busy=was)


def _still(tx: Tx, id: str, uuid: str, verb: Verb) -> tuple[Any, Sharing]:
    """As they are now: while we waited to be alone another may have brought the server where this cannot be done."""
    server, share = servers.get(tx, id), shares.find(tx, uuid)
    if server.deleted_at is not None or server.vm_state not in verb.start or (verb.host and server.host is None):
        raise servers.why_not(server, verb)
    if share is None:
        raise NotFound(f"Instance {id} does not have that share any longer.")
    return server, share


# ---- who is let in


def agree(world: World, share_id: str, besides: str = "") -> dict[tuple[str, str], Rule]:
    """Our rules at the service are those that the rows want (all but the row `besides`), and while there are any, nobody
    deletes the share. Those rules, by (kind, who).

    What is wanted is looked at again afterwards: who came to want something meanwhile may have found a rule that we were
    about to take away.  Raises Unavailable where it does not come to rest.
    """
    if not world.neighbours.share.there:
        return {}
    for _ in range(LOOKS):
        wanted = _wanted(world, share_id, besides)
        try:
            there = _made_so(world, share_id, wanted)
        except NotFound:
            if wanted:
                raise
            return {}  # it is gone, and its rules with it
        if _wanted(world, share_id, besides) == wanted:
            return there
    raise Unavailable(f"Share {share_id} is opened and closed by many at once.")


def _wanted(world: World, share_id: str, besides: str) -> set[tuple[str, str]]:
    with world.db.read() as tx:
        return shares.rules(tx, share_id, besides)


def _made_so(world: World, share_id: str, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], Rule]:
    """Locked before it is opened, and unlocked when it is closed."""
    service = world.neighbours.share
    locks = service.locks(share_id)
    if wanted and not locks:
        service.lock(share_id)
    try:
        there = {(r.access_type, r.access_to): r for r in service.rules(share_id)}
        for named, rule in there.items():
            if rule.ours and named not in wanted and not rule.going:
                service.deny(share_id, rule.id)
        if missing := [w for w in sorted(wanted) if w not in there or there[w].going]:
            for kind, who in missing:
                try:
                    service.allow(share_id, kind, who)
                except Invalid as e:  # the old one is still on its way out, or another made one at this moment
                    raise Unavailable(f"Share {share_id} is not opened yet.", why=e.said) from e
            there = {(r.access_type, r.access_to): r for r in service.rules(share_id)}
    finally:
        for lock in () if wanted else locks:
            service.unlock(lock.id)
    return {named: rule for named, rule in there.items() if named in wanted}


# ---- what must not be left


@reconciler(every_s=300)
def open_doors(world: World) -> list[str]:
    """Rules and locks of shares that nobody of ours has any longer: the run that was to take them away came to its end
    elsewhere, or a host lost what it had."""
    said = []
    for id, why in left_open(world):
        agree(world, id)
        said.append(f"share {id} {why}")
    return said


def left_open(world: World) -> list[tuple[str, str]]:
    """Those of `open_doors`: each share that we locked, or that servers have, where nobody is at work on it."""
    service, found = world.neighbours.share, []
    with world.db.read() as tx:
        rows = shares.all(tx)
        at_work = compare.at_work(tx, {s.server for s in rows})
    busy = {s.share_id for s in rows if s.server in at_work or s.busy in ("attaching", "detaching")}
    if not service.there:
        return []
    locked = {lock.resource_id for lock in service.locks()}
    for id in sorted((locked | {s.share_id for s in rows}) - busy):
        wanted = _wanted(world, id, "")
        try:
            there = {(r.access_type, r.access_to) for r in service.rules(id) if r.ours}
        except NotFound:
            continue
        if over := there - wanted:
            found.append((id, f"is open to {', '.join(who for _, who in sorted(over))}, where no server has it"))
        elif wanted - there:
            found.append((id, f"is closed to {', '.join(who for _, who in sorted(wanted - there))}"))
        elif bool(wanted) != (id in locked):
            found.append((id, "is locked" if id in locked else "is not locked"))
    return found


RECONCILERS = [open_doors]
