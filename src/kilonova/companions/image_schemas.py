"""What the image service says of its own bodies, as JSON schemas: older clients build their classes of it."""

from typing import Any

from kilonova.model import options


def image(config: options.Image, containers: tuple[str, ...]) -> dict[str, Any]:
    text: list[str] = ["null", "string"]
    line: dict[str, Any] = {"type": text, "maxLength": 255}
    read_only: dict[str, dict[str, Any]] = {
        "status": {
            "enum": ["queued", "saving", "active", "killed", "deleted", "uploading", "importing", "deactivated"]
        },
        "size": {"type": ["null", "integer"]},
        "virtual_size": {"type": ["null", "integer"]},
        "checksum": {"type": text, "maxLength": 32},
        "os_hash_algo": {"type": text, "maxLength": 64},
        "os_hash_value": {"type": text, "maxLength": 128},
        "created_at": {"type": "string"},
        "updated_at": {"type": "string"},
        "self": {"type": "string"},
        "file": {"type": "string"},
        "schema": {"type": "string"},
        "direct_url": {"type": "string"},
    }
    return {
        "name": "image",
        "properties": {
            "id": {
                "type": "string",
                "pattern": "^([0-9a-fA-F]){8}-([0-9a-fA-F]){4}-([0-9a-fA-F]){4}-([0-9a-fA-F]){4}-([0-9a-fA-F]){12}$",
            },
            "name": line,
            "visibility": {"type": "string", "enum": ["community", "public", "private", "shared"]},
            "protected": {"type": "boolean"},
            "os_hidden": {"type": "boolean"},
            "owner": line,
            "disk_format": {"type": text, "enum": [None, *config.formats]},
            "container_format": {"type": text, "enum": [None, *containers]},
            "min_disk": {"type": "integer"},
            "min_ram": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 255}},
            **{name: {**about, "readOnly": True} for name, about in read_only.items()},
        },
        "additionalProperties": {"type": "string"},
        "links": [
            {"rel": "self", "href": "{self}"},
            {"rel": "enclosure", "href": "{file}"},
            {"rel": "describedby", "href": "{schema}"},
        ],
    }


def many(name: str, item: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "properties": {
            name: {"type": "array", "items": item},
            "first": {"type": "string"},
            "next": {"type": "string"},
            "schema": {"type": "string"},
        },
        "links": [
            {"rel": "first", "href": "{first}"},
            {"rel": "next", "href": "{next}"},
            {"rel": "describedby", "href": "{schema}"},
        ],
    }


MEMBER: dict[str, Any] = {
    "name": "member",
    "properties": {
        "member_id": {"type": "string"},
        "image_id": {"type": "string"},
        "status": {"type": "string", "enum": ["pending", "accepted", "rejected"]},
        "created_at": {"type": "string"},
        "updated_at": {"type": "string"},
        "schema": {"readOnly": True, "type": "string"},
    },
}
