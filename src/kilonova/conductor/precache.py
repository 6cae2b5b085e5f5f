"""Precache: one host fetches images that an operator wants there (POST /os-aggregates/{id}/images).

A run a host, so that a slow or silent one keeps no other waiting.  An image that cannot be had is left out: the
others are worth having, and a server that needs it will fetch it, or say why not.  All hosts that were asked at once are
one subject: how many of them are through, and who is the last, follows from their runs.
"""

import logging

from kilonova.contracts import compute
from kilonova.contracts.compute import Done
from kilonova.contracts.jobs import Precache
from kilonova.kit.bus import To
from kilonova.kit.db import Tx
from kilonova.kit.errors import HostGone, NotFound, Trouble
from kilonova.kit.journal import Said, tell
from kilonova.kit.workflow import Run, command, record, runs_past, workflow
from kilonova.model import notices
from kilonova.model.machine import ImageSource
from kilonova.store import hosts

log = logging.getLogger(__name__)


@workflow
def precache(run: Run, job: Precache) -> None:
    there: list[str] = []
    for image in job.images:
        try:
            run(fetch, job.host, image)
            there.append(image.image_id)
        except HostGone:
            break
        except Trouble as e:
            log.info("%s has no image %s beforehand: %s", job.host, image.image_id, e.said)
    if job.aggregate:
        run(through, run.subject, job, there, run.now)


@command(patience_s=1800)
def fetch(host: str, image: ImageSource) -> To[Done]:
    return To(host, compute.Precache(image=image))


@record
def through(tx: Tx, batch: str, job: Precache, there: list[str], now: float) -> None:
    """Whoever listens is told; of the last host, that all are through. One at a time: two would both be the last but one."""
    try:
        a = hosts.aggregate(tx, job.aggregate, lock=True)
    except NotFound:
        return  # nobody can tell of what is no more
    n = 1 + runs_past(tx, batch, through.name)
    missing = [i.image_id for i in job.images if i.image_id not in there]
    progress = lambda tx: notices.cached(a.id, a.uuid, a.name, job.host, there, missing, n, job.of)
    tell(tx, Said(event="aggregate.cache_images.progress", binary=notices.CONDUCTOR, at=now, of=progress))
    if n == job.of:
        end = lambda tx: notices.aggregate(a.id, a.uuid, a.name, a.hosts, a.metadata)
        tell(tx, Said(event="aggregate.cache_images.end", binary=notices.API, at=now, of=end))
