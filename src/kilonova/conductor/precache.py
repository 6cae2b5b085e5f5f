"""Precache: one host fetches images that an operator wants there (POST /os-aggregates/{id}/images).

A run a host, so that a slow or silent one keeps no other waiting.  An image that cannot be had is left out: the
others are worth having, and a server that needs it will fetch it, or say why not.
"""

import logging

from kilonova.contracts import compute
from kilonova.contracts.compute import Done
from kilonova.contracts.jobs import Precache
from kilonova.kit.bus import To
from kilonova.kit.errors import HostGone, Trouble
from kilonova.kit.workflow import Run, command, workflow
from kilonova.model.machine import ImageSource

log = logging.getLogger(__name__)


@workflow
def precache(run: Run, job: Precache) -> None:
    for image in job.images:
        try:
            run(fetch, job.host, image)
        except HostGone:
            return
        except Trouble as e:
            log.info("%s has no image %s beforehand: %s", job.host, image.image_id, e.said)


@command(patience_s=1800)
def fetch(host: str, image: ImageSource) -> To[Done]:
    return To(host, compute.Precache(image=image))
