"""An image that a server shall run: shown to who asks, ready, and not too large for the flavor."""

import re

from kilonova.api.bodies import dashed
from kilonova.clients import ImageInfo
from kilonova.kit.errors import Forbidden, Invalid, NotFound
from kilonova.kit.routes import Call
from kilonova.model.capture import NOT_OF_SERVERS
from kilonova.model.flavor import Flavor
from kilonova.model.server import Image

GIB = 1 << 30
UUID = r"(?i)[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}"


def shown(call: Call, ref: str) -> ImageInfo:
    """What the image service says of it to the caller. Raises Invalid."""
    if not re.fullmatch(UUID, ref):
        raise Invalid("Invalid imageRef provided.")
    try:
        info: ImageInfo = call.world.neighbours.image.show(dashed(ref), call.context.token)
    except (NotFound, Forbidden):
        raise Invalid("Can not find requested image") from None
    if info.status != "active":
        raise Invalid(f"Image {info.id} is not active.")
    return info


def image_of(info: ImageInfo) -> Image:
    """As a server keeps it."""
    return Image(
        id=info.id,
        name=info.name or "",
        disk_format=info.disk_format or "raw",
        size_bytes=info.size or 0,
        virtual_size_bytes=info.virtual_size or 0,
        min_disk_gb=info.min_disk_gb,
        min_ram_mb=info.min_ram_mb,
        hash_algo=info.hash_algo or "",
        hash_value=info.hash_value or "",
        properties={k: v for k, v in info.properties.items() if k not in NOT_OF_SERVERS},
    )


def fits(call: Call, flavor: Flavor, image: Image, *, volume_backed: bool = False) -> None:
    """Raises Invalid where the flavor is too small, Forbidden where the disk would be of no size."""
    if image.min_ram_mb > flavor.memory_mb:
        raise Invalid("Flavor's memory is too small for requested image.")
    if volume_backed:
        return  # its root has a size of its own
    size = max(image.size_bytes, image.virtual_size_bytes)
    if flavor.disk_gb:
        if size > flavor.disk_gb * GIB:
            raise Invalid(
                f"Flavor's disk is too small for requested image. Flavor disk is {flavor.disk_gb * GIB} bytes, image is {size} bytes."
            )
        if image.min_disk_gb > flavor.disk_gb:
            raise Invalid(
                f"Flavor's disk is smaller than the minimum size specified in image metadata. Flavor disk is {flavor.disk_gb * GIB} bytes, "
                f"minimum size is {image.min_disk_gb * GIB} bytes."
            )
    elif not call.may("os_compute_api:servers:create:zero_disk_flavor"):
        raise Forbidden("Only volume-backed servers are allowed for flavors with zero disk.")
