"""Servers that shall be together on a host, or apart: strictly, or as far as it can be done (the soft policies)."""

from typing import Literal

import msgspec

Policy = Literal["affinity", "anti-affinity", "soft-affinity", "soft-anti-affinity"]
Hard = Literal["affinity", "anti-affinity"]


class ServerGroup(msgspec.Struct, frozen=True):
    """`max_per_host` is said for anti-affinity only (2.64); None: one. `members` are those that live, the oldest first."""

    id: str
    project_id: str
    user_id: str
    name: str
    policy: Policy
    max_per_host: int | None = None
    members: list[str] = []


class Company(msgspec.Struct, frozen=True):
    """A server's group as a scheduler must know it: its policy, and how many of the others are on which host."""

    policy: Policy
    most: int = 1
    at: dict[str, int] = {}


def admits(policy: str, most: int, here: int, elsewhere: int) -> bool:
    """May one more come here, where `here` of the others are, while `elsewhere` of them are on other hosts?"""
    if policy == "anti-affinity":
        return here < most
    return policy != "affinity" or here > 0 or elsewhere == 0
