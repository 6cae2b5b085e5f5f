"""What a host does for an image of a server: freeze a copy of its disk, upload it, or throw it away."""

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from kilonova.compute.host import Host, power_of
from kilonova.contracts.compute import Discard, Done, Freeze, Upload
from kilonova.kit.errors import Trouble, Unsupported
from kilonova.virt.driver import Captures, can

log = logging.getLogger(__name__)
T = TypeVar("T")


def able(host: Host, kind: type[T], what: str) -> T:
    """The driver, as one that can do that. Raises Unsupported."""
    if not can(host.driver, kind):
        raise Unsupported(f"This host cannot {what}.")
    return cast("T", host.driver)


def freeze(host: Host, m: Freeze) -> Done:
    driver: Captures = able(host, Captures, "make images of servers")  # type: ignore[type-abstract]
    with host.at_work(m.server, "freeze"):
        driver.capture(m.server, m.image_id, m.disk_format, host.progress(m.server))
        return Done(power_of(host, m.server))


def upload(host: Host, m: Upload) -> Done:
    """What breaks off because nobody wants it any longer is a verdict; whatever else the image service says, it said."""
    driver: Captures = able(host, Captures, "make images of servers")  # type: ignore[type-abstract]
    if host.images is None:
        raise Unsupported("This host has no image service.")
    with host.at_work(m.server, "upload"):
        stage = host.progress(m.server)
        try:
            host.images.send(m.image_id, _watched(driver, m, stage))
        except Trouble:
            stage("the upload broke off")
            raise
        driver.drop_capture(m.server, m.image_id)
        return Done(power_of(host, m.server))


def discard(host: Host, m: Discard) -> Done:
    if can(host.driver, Captures):
        cast("Captures", host.driver).drop_capture(m.server, m.image_id)
    return Done()


def _watched(driver: Captures, m: Upload, stage: Callable[[str], None]) -> Iterator[bytes]:
    """Looked for when it is needed: an image that has its bytes already needs no copy, and there may be none any more."""
    for chunk in driver.captured(m.server, m.image_id):
        stage("uploading")
        yield chunk


HANDLERS: list[Callable[[Any, Any], Any]] = [freeze, upload, discard]
