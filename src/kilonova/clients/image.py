"""The image service (Image API v2), as a service asks it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from kilonova.clients.session import Query, Session, decoded, part
from kilonova.kit.clock import parsed
from kilonova.kit.errors import NotFound, Unavailable


class ImageInfo(msgspec.Struct, frozen=True):
    """An image (Image API v2, show). Moments in seconds since 1970; `properties` are those the API has no name for."""

    id: str
    name: str
    status: str
    size: int  # bytes; 0 where there is none yet
    virtual_size: int  # bytes a guest sees; 0: unknown
    disk_format: str
    container_format: str
    min_disk_gb: int
    min_ram_mb: int
    checksum: str
    hash_algo: str
    hash_value: str
    owner: str
    visibility: str
    protected: bool = False
    hidden: bool = False
    created_at: float = 0
    updated_at: float = 0
    tags: list[str] = []
    properties: dict[str, str] = {}


class Image:
    """The image service (Image API v2)."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def show(self, id: str, token: str | None = None) -> ImageInfo:
        """Raises NotFound."""
        return _image(self.session.json("GET", f"/v2/images/{part(id)}", dict[str, Any], token=token))

    def list(self, token: str | None = None, **filters: str | int | Sequence[str] | None) -> Iterator[ImageInfo]:
        """All that fit, page after page; `filters` are the API's (`name=`, `status=`, `visibility=`, `sort=`…)."""
        path: str | None = "/v2/images"
        query: Query | None = filters
        while path:
            page = self.session.json("GET", path, _ImagePage, query=query, token=token)
            yield from map(_image, page.images)
            path, query = page.next, None

    def download(self, id: str, write: Callable[[bytes], object], token: str | None = None) -> int:
        """All its bytes into `write`, in pieces of up to 1 MiB; how many. Checked against what the service says.

        Raises NotFound; Unavailable where it broke off or where the bytes are not those it promised (MD5).
        """
        answer = self.session.ask("GET", f"/v2/images/{part(id)}/file", headers={"Accept": "*/*"}, token=token)
        if answer.status == 204:
            answer.read()
            return 0
        size, digest = 0, hashlib.md5(usedforsecurity=False)
        try:
            for chunk in answer.chunks:
                digest.update(chunk)
                size += len(chunk)
                write(chunk)
        finally:
            answer.close()
        said = answer.headers.get("content-length")
        if said is not None and int(said) != size:
            raise Unavailable("The image service broke off in the middle.", why=f"image {id}: {size} of {said} bytes")
        promised = answer.headers.get("content-md5")
        if promised and promised != digest.hexdigest():
            raise Unavailable("The image arrived damaged.", why=f"image {id}: MD5 {digest.hexdigest()} for {promised}")
        return size

    def create(self, token: str | None = None, **wish: Any) -> ImageInfo:
        """A new image without bytes; `wish` are the API's names (`name=`, `disk_format=`, `owner=`, properties…)."""
        return _image(self.session.json("POST", "/v2/images", dict[str, Any], body=wish, token=token))

    def change(self, id: str, patch: Sequence[dict[str, Any]], token: str | None = None) -> ImageInfo:
        """`patch` as RFC 6902 has it: `{"op": "add", "path": "/key", "value": …}`. Raises NotFound, Forbidden."""
        headers = {"Content-Type": "application/openstack-images-v2.1-json-patch"}
        path, body = f"/v2/images/{part(id)}", msgspec.json.encode(patch)
        answer = self.session.ask("PATCH", path, body=body, headers=headers, token=token)
        return _image(decoded(self.session.name, answer.read(), dict[str, Any]))

    def upload(self, id: str, chunks: Iterable[bytes], token: str | None = None) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        self.session.ask("PUT", f"/v2/images/{part(id)}/file", body=iter(chunks), headers=headers, token=token).read()

    def delete(self, id: str, token: str | None = None) -> None:
        """Also where there is none any more."""
        with suppress(NotFound):
            self.session.tell("DELETE", f"/v2/images/{part(id)}", token=token)


class _ImagePage(msgspec.Struct):
    images: list[dict[str, Any]]
    next: str | None = None


# fmt: off
NAMED = {
    "id", "name", "status", "size", "virtual_size", "disk_format", "container_format", "min_disk", "min_ram",
    "checksum", "os_hash_algo", "os_hash_value", "os_hidden", "owner", "visibility", "protected", "created_at",
    "updated_at", "tags", "self", "file", "schema", "locations", "direct_url", "stores", "members",
}
# fmt: on


def _image(said: dict[str, Any]) -> ImageInfo:
    try:
        return msgspec.convert(
            {
                "id": said["id"],
                "name": said.get("name") or "",
                "status": said["status"],
                "size": said.get("size") or 0,
                "virtual_size": said.get("virtual_size") or 0,
                "disk_format": said.get("disk_format") or "",
                "container_format": said.get("container_format") or "",
                "min_disk_gb": said.get("min_disk") or 0,
                "min_ram_mb": said.get("min_ram") or 0,
                "checksum": said.get("checksum") or "",
                "hash_algo": said.get("os_hash_algo") or "",
                "hash_value": said.get("os_hash_value") or "",
                "owner": said.get("owner") or "",
                "visibility": said.get("visibility") or "private",
                "protected": said.get("protected") or False,
                "hidden": said.get("os_hidden") or False,
                "created_at": parsed(said["created_at"]) if said.get("created_at") else 0.0,
                "updated_at": parsed(said["updated_at"]) if said.get("updated_at") else 0.0,
                "tags": said.get("tags") or [],
                "properties": {k: str(v) for k, v in said.items() if k not in NAMED and v is not None},
            },
            ImageInfo,
        )
    except (KeyError, ValueError) as e:
        raise Unavailable("The image service gave an answer that makes no sense.", why=str(e)) from None
