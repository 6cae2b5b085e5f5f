"""Unified limits: how much the identity service allows a project, by its own names of resources. Pure.

Identity API v3, "Unified limits": a registered limit holds for every project, a limit for one.
"""

import msgspec

SERVERS = "servers"
# By the words of quota sets; a resource class is "class:" and its name. Of what has no name there is no limit to be kept.
NAMES = {
    "instances": SERVERS,
    "cores": "class:VCPU",
    "ram": "class:MEMORY_MB",
    "key_pairs": "server_key_pairs",
    "metadata_items": "server_metadata_items",
    "server_groups": "server_groups",
    "server_group_members": "server_group_members",
    "injected_files": "server_injected_files",
    "injected_file_content_bytes": "server_injected_file_content_bytes",
    "injected_file_path_length": "server_injected_file_path_bytes",
}


class Unified(msgspec.Struct, frozen=True):
    """`registered`: what holds for every project, `own`: what holds for this one instead.

    A resource that nobody registered may not be had at all if it is `listed`, and else is not looked at; `spared`: the
    other way round.
    """

    project_id: str
    registered: dict[str, int] = {}
    own: dict[str, int] = {}
    listed: frozenset[str] = frozenset({SERVERS})
    spared: bool = False

    def most(self, resource: str) -> int:
        """-1: as much as there is."""
        if resource in self.registered:
            return self.own.get(resource, self.registered[resource])
        return -1 if (resource in self.listed) is self.spared else 0

    def quotas(self) -> dict[str, int]:
        """What is to be kept, by the words of quota sets."""
        return {word: self.most(name) for word, name in NAMES.items()}

    def shown(self) -> dict[str, int]:
        """The same as quota sets show it: of what nobody registered, 0."""
        return {word: self.most(name) if name in self.registered else 0 for word, name in NAMES.items()}

    def over(self, used: dict[str, int], wanted: dict[str, int]) -> list[str]:
        """The resources of which so much more is too much, in order."""
        return sorted(r for r, n in wanted.items() if n > 0 and 0 <= self.most(r) < used.get(r, 0) + n)

    def said(self, over: list[str], used: dict[str, int], wanted: dict[str, int]) -> str:
        """As clients of unified limits know it."""
        each = [
            f"Resource {r} is over limit of {self.most(r)} due to current usage {used.get(r, 0)} and delta {wanted[r]}"
            for r in over
        ]
        return f"Project {self.project_id} is over a limit for [{', '.join(each)}]"
